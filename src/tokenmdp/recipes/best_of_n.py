"""Best-of-n: sample n responses, keep the one the reward likes best; policy improvement without any training.

    y* = argmax_{y_1 … y_n ~ π} r(x, y),   KL(π_bo-n ‖ π) ≤ log n − (n − 1)/n

Source: Stiennon et al. 2020, appendix G.3 for the KL, which is exact when no two responses tie and an upper bound in
general (Beirami et al. 2024, theorem 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmdp import gate, rewards, tasks
from tokenmdp.functional import kl, measures
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.types import Batch, Prompt, Reward

SETTING = "rl"


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # a name, a folder or a hub id
    reward: str = "sentiment"  # a reward model's folder, a name, file.py:function, or a mixture "0.5*a + b"
    task: str = "sentiment"  # prompts: a task's name, a file or a hub id; its held-out prompts are answered first
    prompts: int = 64  # prompts answered
    n: int = 8  # responses drawn a prompt
    max_new_tokens: int = 24  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling
    chunk: int = 16  # prompts answered between checkpoints


def best(value: Tensor, verdict: Tensor, n: int) -> Tensor:
    """[prompts] row of the best-scored of each n neighbouring rows; rows without a verdict lose to all others.

    The first of equal scores is taken: responses are drawn independently, so this is as good as a coin.
    """
    ranked = torch.where(verdict, value, torch.full_like(value, -torch.inf)).view(-1, n)
    return ranked.argmax(-1) + n * torch.arange(len(ranked), device=value.device)


def train(cfg: Config, policy: Policy, prompts: list[Prompt], reward: Reward, run: Run) -> dict[str, object]:
    """Answer each prompt by the best of n; responses go to samples.jsonl. (Nothing is trained: the name is the
    recipes' common one.)

    Returns:
        Mean scores, of all responses and of the best: None where none got a verdict; `no_verdict` counts those that
        got none.
    """
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    totals = measures.Sums()
    chunks = [prompts[i : i + cfg.chunk] for i in range(0, len(prompts), cfg.chunk)]
    for step in run.steps(len(chunks), totals, title="best of n", setting=SETTING):
        b: Batch = policy.sample(chunks[step], cfg.n, sampling, run.rng)
        score = reward(b)
        run.missing(step, b, score)
        if step == 0:
            gate.tell(run, policy, b)
        chosen = best(score.value, score.verdict, cfg.n)
        for arm, rows in (("first", range(0, len(b), cfg.n)), ("best_of_n", chosen.tolist())):
            for i in rows:
                run.sample(b, i, arm, proxy=score.at(i))
        judged = score.verdict
        kept = chosen[judged[chosen]]  # of a prompt whose every response lacks a verdict nothing is counted
        totals.add(all=float(score.value[judged].sum()), judged=int(judged.sum()), missing=int((~judged).sum()))
        totals.add(best=float(score.value[kept].sum()), kept=len(kept))
        found = {"objective/scores": totals.mean("all", "judged"), "objective/scores_best": totals.mean("best", "kept")}
        known = {name: value for name, value in found.items() if value is not None}
        run.log(step, {**known, **measures.responses(b, score)}, headline=tuple(known))
    return {
        "score_mean": totals.mean("all", "judged"),
        "score_best": totals.mean("best", "kept"),
        "kl_bound_nats": kl.best_of_n_kl(cfg.n),
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
