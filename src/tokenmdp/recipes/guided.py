"""Reward-guided decoding: of k ways to go on for a block of tokens keep the most promising, and so on to the end.

    s_{j+1} = argmax_{s ∈ {s_j·y_1, …, s_j·y_k}}  V̂(s),    y_i ~ π(· | s_j), a block of M tokens (fewer where it ends)
    V̂(s) = r(s) read at the prefix,  or  1/m Σ r(s · rest_i),  rest_i ~ π(· | s): the mean of m completions
    KL(result ‖ π) ≤ blocks · ( log k − (k − 1)/k )

Policy improvement without training, which stops at prefixes where best-of-n waits for the end: with one block it is
best-of-n, with blocks of one token it is the greediest. A reward model can be read at any prefix; a verifier cannot
judge half an answer, and takes `rollouts` completions, which only known dynamics allow: the state is reset, again and
again, to the same prefix.

Source: Mudgal et al. 2024 (controlled decoding), section 3, blockwise; the KL of one choice as in best-of-n (Beirami et
al. 2024, theorem 3.1), summed along the blocks by the chain rule.
Differs: no prefix scorer is trained; the value is the reward itself, at the prefix or after completions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tokenmdp import rewards, tasks
from tokenmdp.functional import kl, measures
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.types import Batch, Prompt, Reward, Score

SETTING = "rl"


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # a name, a folder or a hub id
    reward: str = "sentiment"  # a reward model's folder, a name, file.py:function, or a mixture "0.5*a + b"
    task: str = "sentiment"  # prompts: a task's name, a file or a hub id; its held-out prompts are answered
    prompts: int = 64  # prompts answered
    k: int = 4  # ways to go on that are compared
    block: int = 6  # M, tokens between two choices
    rollouts: int = 0  # m, completions a value is the mean of; 0 reads the reward at the prefix
    max_new_tokens: int = 24  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling
    chunk: int = 16  # prompts answered between checkpoints


def joined(policy: Policy, prompts: list[Prompt], done: list[list[int]], more: Batch | None = None) -> Batch:
    """The responses so far as one batch of the original prompts, so that a reward sees what it always sees.

    Args:
        prompts: one a row.
        done: the tokens chosen so far, one list a row.
        more: what was sampled after them, as many rows to each prompt as divide evenly.
    """
    n = 1 if more is None else len(more) // len(prompts)
    rows = [p for p in prompts for _ in range(n)]
    tokens = [list(d) for d in done for _ in range(n)]
    if more is not None:
        tokens = [d + t[a].tolist() for d, t, a in zip(tokens, more.tokens, more.action, strict=True)]
    return Batch.build(
        rows,
        tokens,
        texts=[policy.response_text(p.ids, r) for p, r in zip(rows, tokens, strict=True)],
        ended=[bool(r) and r[-1] in policy.eos_ids for r in tokens],
        group=[i for i in range(len(prompts)) for _ in range(n)],
        pad=policy.eos_ids[0],
    ).to(policy.device)


def state(prompt: Prompt, done: list[int]) -> Prompt:
    """The prefix to reset to: the prompt and what was chosen after it."""
    return replace(prompt, ids=(*prompt.ids, *done))


class Guide:
    """Decodes and counts.

    Attributes:
        tokens: how many tokens were sampled, for choices and for their values.
        missing: how many candidates had no verdict.
    """

    def __init__(self, cfg: Config, policy: Policy, reward: Reward, rng: torch.Generator) -> None:
        self.cfg, self.policy, self.reward, self.rng = cfg, policy, reward, rng
        self.tokens = self.missing = 0

    def answer(self, prompts: list[Prompt]) -> Batch:
        """One response to each prompt."""
        cfg = self.cfg
        done: list[list[int]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        while live:
            left = cfg.max_new_tokens - len(done[live[0]])  # whoever is live has taken every token so far
            at = [state(prompts[i], done[i]) for i in live]
            more = self._sample(at, cfg.k, min(cfg.block, left))
            b = joined(self.policy, [prompts[i] for i in live], [done[i] for i in live], more)
            score = self._value(b, left - cfg.block)
            ranked = torch.where(score.verdict, score.value, torch.full_like(score.value, -torch.inf)).view(-1, cfg.k)
            for place, row in enumerate(
                (ranked.argmax(1) + cfg.k * torch.arange(len(live)).to(ranked.device)).tolist()
            ):
                done[live[place]] = b.tokens[row][b.action[row]].tolist()
            live = [i for i in live if len(done[i]) < cfg.max_new_tokens and done[i][-1] not in self.policy.eos_ids]
        return joined(self.policy, prompts, done)

    def _sample(self, at: list[Prompt], n: int, most: int) -> Batch:
        sampling = Sampling(max_new_tokens=most, temperature=self.cfg.temperature)
        drawn = self.policy.sample(at, n, sampling, self.rng)
        self.tokens += int(drawn.action.sum())
        return drawn

    def _value(self, b: Batch, left: int) -> Score:
        """[B] what each prefix promises; `left` tokens may follow it."""
        if not self.cfg.rollouts:
            score = self.reward(b)
            self.missing += int((~score.verdict).sum())
            return score
        m = self.cfg.rollouts
        rows = list(range(len(b)))
        going = [i for i in rows if not bool(b.ended[i])] if left > 0 else []
        over = [i for i in rows if i not in set(going)]
        total, count = torch.zeros(len(b)), torch.zeros(len(b))
        for some, whole in ((over, b.select(over) if over else None), (going, self._complete(b, going, m, left))):
            if whole is None:
                continue
            score = self.reward(whole)
            self.missing += int((~score.verdict).sum())
            index = torch.tensor(some).repeat_interleave(len(whole) // len(some))
            total.index_add_(0, index, score.value.float().cpu())
            count.index_add_(0, index, score.verdict.float().cpu())
        return Score(torch.where(count > 0, total / count.clamp(min=1), torch.zeros_like(total)), count > 0)

    def _complete(self, b: Batch, rows: list[int], m: int, left: int) -> Batch | None:
        if not rows:
            return None
        prompts, done = [b.prompts[i] for i in rows], [b.tokens[i][b.action[i]].tolist() for i in rows]
        more = self._sample([state(p, d) for p, d in zip(prompts, done, strict=True)], m, left)
        return joined(self.policy, prompts, done, more)


def train(cfg: Config, policy: Policy, prompts: list[Prompt], reward: Reward, run: Run) -> dict[str, object]:
    """Answer each prompt plainly and guided; responses go to samples.jsonl. (Nothing is trained: the name is the
    recipes' common one.)

    Returns:
        Mean scores, of plain and of guided answers: None where none got a verdict; `no_verdict` counts the answers of
        both kinds that got none (the metric of that name counts candidates).

    Raises:
        ValueError: k or block is below 1, or rollouts below 0.
    """
    if cfg.k < 1 or cfg.block < 1 or cfg.rollouts < 0:
        raise ValueError(f"k={cfg.k}, block={cfg.block}, rollouts={cfg.rollouts}: at least 1, 1 and 0")
    totals = measures.Sums()
    plain = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    chunks = [prompts[i : i + cfg.chunk] for i in range(0, len(prompts), cfg.chunk)]
    for step in run.steps(len(chunks), totals, title="guided decoding", setting=SETTING):
        guide = Guide(cfg, policy, reward, run.rng)
        arms = {"first": policy.sample(chunks[step], 1, plain, run.rng), "guided": guide.answer(chunks[step])}
        for arm, b in arms.items():
            score = reward(b)
            judged = int(score.verdict.sum())
            total = float(score.value[score.verdict].sum())
            totals.add(**{arm: total, f"{arm}_judged": judged}, missing=len(b) - judged)
            for i in range(len(b)):
                run.sample(b, i, arm, proxy=score.at(i))
        b = arms["guided"]
        totals.add(tokens=guide.tokens, plain_tokens=float(arms["first"].action.sum()))
        first, guided = (totals.mean(arm, f"{arm}_judged") for arm in arms)
        found = {"objective/scores": first, "objective/scores_best": guided}
        known = {name: value for name, value in found.items() if value is not None}
        run.log(
            step,
            {
                **known,
                "completions/mean_length": float(b.action.sum(-1).float().mean()),
                "completions/clipped_ratio": float((~b.ended).float().mean()),
                "num_tokens": float(guide.tokens),
                "no_verdict": float(guide.missing),
            },
            headline=tuple(known),
        )
    blocks = -(-cfg.max_new_tokens // cfg.block)
    return {
        "score_mean": totals.mean("first", "first_judged"),
        "score_guided": totals.mean("guided", "guided_judged"),
        "tokens_guided_per_plain": totals.mean("tokens", "plain_tokens"),
        "kl_bound_nats": blocks * kl.best_of_n_kl(cfg.k),
        "prompts": len(prompts),
        "no_verdict": int(totals.sums.get("missing", 0)),
    }


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the policy, the reward and the prompts; answer the held-out ones."""
    policy = catalog.load(cfg.model).freeze()
    reward = rewards.load(cfg.reward, policy)
    task = tasks.load(cfg.task, policy)
    prompts = task.first(cfg.prompts, run.note)
    return train(cfg, policy, prompts, reward, run)
