"""Online DPO: pairs of the policy's own responses, ranked by any reward, for direct preference optimisation.

    y_1 … y_n ~ π_θ(· | x),    chosen = the best of them by r, rejected = the worst
    ℓ = − log σ( r̂(chosen) − r̂(rejected) ),     r̂ = β log( π_θ(y | x) / ref(y | x) )

Only the ranking enters, not how much better the best one is, so a reward may be of any scale. Prompts whose responses
all score the same give no pair: they are skipped and counted. What offline DPO lacks is here: the pairs are of the
policy as it now is, so what becomes likely is seen and judged.

Source: Guo et al. 2024, "Direct language model alignment from online AI feedback", section 3 and algorithm 1; the loss:
Rafailov et al. 2023, eq. 7; ipo: Azar et al. 2024, eq. 17.
Differs: the best and the worst of n responses, of which the paper draws two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmdp import gate, judge, rewards, tasks
from tokenmdp.functional import measures, preference, returns, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Pairs, Reward

SETTING = "rl"
LOSSES = {"sigmoid": preference.dpo, "ipo": preference.ipo}
ROUNDING = 1e-3  # nats by which log-probabilities of one response may differ between two batches


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # the policy's start and its reference: best the SFT model
    reward: str = "sentiment"  # a reward model's folder, a name, file.py:function, or a mixture "0.5*a + b"
    task: str = "sentiment"  # prompts: a task's name, a file or a hub id
    gold: str = ""  # another reward: recorded in every phase and the judge at the end, never learned from
    loss: str = "sigmoid"  # sigmoid | ipo
    beta: float = 0.1  # β, in units of the implicit reward a nat: how hard the policy is held to the reference
    steps: int = 40  # phases of sampling and learning
    prompts: int = 16  # prompts a phase, each giving one pair at most
    samples: int = 4  # responses a prompt
    max_new_tokens: int = 24  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling and of what is learned
    learning_rate: float = 2e-5
    warmup: int = 0  # optimiser steps over which the rate rises; Adam's first are as large as any, and mostly noise
    epochs: int = 1  # passes over a phase's pairs
    minibatches: int = 1  # optimiser steps a pass
    truncation: float = 0.0  # reward units taken off a response that did not end by itself
    train: str = "all"  # what of the policy trains: all | top-N blocks | lora-R rank
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; it must be one of {', '.join(LOSSES)}")
        if not self.beta > 0 or not self.temperature > 0:
            raise ValueError(f"beta={self.beta}, temperature={self.temperature}: both must be positive")
        if min(self.steps, self.prompts, self.epochs, self.minibatches) < 1:
            raise ValueError(
                f"steps={self.steps}, prompts={self.prompts}, epochs={self.epochs}, minibatches={self.minibatches}: "
                "each is a count, at least 1"
            )
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}; a pair needs at least 2 responses to a prompt")


def best_and_worst(outcome: Tensor, group: Tensor, rows: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """[P] rows of the best and of the worst response of each group in which they differ, in outcome and in tokens.

    Args:
        outcome: [B] what each response is ranked by.
        group: [B] responses to one prompt share a number.
        rows: [B] which have a verdict; the others are in no pair.
        batch: the responses; of equal outcomes the first is taken.
    """
    chosen, rejected = [], []
    for number in group.unique().tolist():
        judged = ((group == number) & rows).nonzero()[:, 0]
        if len(judged) < 2:
            continue
        high, low = int(judged[outcome[judged].argmax()]), int(judged[outcome[judged].argmin()])
        if outcome[high] > outcome[low] and not _same(batch, high, low):
            chosen.append(high)
            rejected.append(low)
    return torch.tensor(chosen, dtype=torch.long), torch.tensor(rejected, dtype=torch.long)


def train(
    cfg: Config, reference: Policy, reward: Reward, task: Task, run: Run, gold: Reward | None = None
) -> tuple[Policy, dict[str, float]]:
    """Optimise the reward's ranking online; returns the trained policy.

    Args:
        reference: where the policy starts and what the implicit reward is measured from; frozen.
        gold: a second reward that is only recorded, to see proxy and truth drift apart.
    """
    policy = reference.twin(cfg.train, name="online_dpo")
    learner = Learner(policy, cfg.learning_rate, warmup=cfg.warmup, tokens=cfg.micro_tokens)
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    run.note(f"reference {reference.name} {reference.fingerprint()}; policy starts as {policy.fingerprint()}")

    def evaluate(model: Policy, batch: Batch, *want: str) -> dict[str, Tensor]:
        return in_parts(lambda part: model.evaluate(part, want, cfg.temperature), batch)

    def loss(part: Pairs, chosen_ref: Tensor, rejected_ref: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        both = Batch.concat([part.chosen, part.rejected])
        logp = policy.evaluate(both, temperature=cfg.temperature)["logp"].sum(-1)
        chosen, rejected = logp.split(len(part))
        good = preference.implicit_reward(chosen, chosen_ref, cfg.beta)
        bad = preference.implicit_reward(rejected, rejected_ref, cfg.beta)
        return LOSSES[cfg.loss](chosen, rejected, chosen_ref, rejected_ref, cfg.beta), {
            "rewards/chosen": good,
            "rewards/rejected": bad,
            "rewards/margins": good - bad,
            "rewards/accuracies": preference.ranked_right(good, bad, cfg.beta * ROUNDING),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }

    for step in run.steps(cfg.steps, learner, title="online DPO", setting=SETTING):
        # 1. Roll out on the known dynamics.
        b = policy.read(policy.sample(task.draw(cfg.prompts, run.rng), cfg.samples, sampling, run.rng))
        score = reward(b)
        run.missing(step, b, score)
        rows = score.verdict

        # 2. Look: the policy that sampled, the reference.
        old = evaluate(policy, b, "logp", "entropy")
        logp_old, logp_ref = old["logp"], evaluate(reference, b, "logp")["logp"]

        # 3. Rank: the best and the worst response to each prompt.
        outcome = score.value - cfg.truncation * (~b.ended).to(score.value.dtype)
        chosen, rejected = best_and_worst(outcome, b.group, rows, b)
        ref = logp_ref.sum(-1)

        # 4. Learn from the pairs.
        learned: list[dict[str, float]] = []
        for _ in range(cfg.epochs if len(chosen) else 0):
            for part in torch.randperm(len(chosen), generator=run.rng).chunk(cfg.minibatches):
                one, other = chosen[part], rejected[part]
                pairs = Pairs(b.select(one), b.select(other), outcome[one] - outcome[other])
                columns = {"chosen_ref": ref[one], "rejected_ref": ref[other]}
                learned.append(learner.step(loss, pairs, weights.per_row(len(part)), **columns))

        # 5. Say what happened.
        kl = (logp_old - logp_ref).sum(-1)
        deviation = returns.spread(score.value, b.group, rows)
        metrics = {
            "objective/scores": measures.mean(score.value, rows),
            "objective/kl": measures.mean(kl, rows),
            "objective/rlhf_reward": measures.mean(outcome - cfg.beta * kl, rows),
            "objective/entropy": float((old["entropy"] * weights.per_token(b.action, rows)).sum()),
            **{name: sum(m[name] for m in learned) / len(learned) for name in (learned[0] if learned else ())},
            "pairs": float(len(chosen)),
            "ties": float(sum(int(rows[b.group == g].sum()) > 1 for g in b.group.unique()) - len(chosen)),
            "skipped_updates": float(not learned),
            "reward": measures.mean(score.value, rows),
            "reward_std": measures.mean(deviation, rows),
            "frac_reward_zero_std": measures.mean((deviation == 0).float(), rows),
            **measures.responses(b, score),
            **measures.sampler_difference(b, logp_old),
        }
        if gold is not None:
            truth = gold(b)
            metrics["objective/gold"] = measures.mean(truth.value, truth.verdict)
        gate.check(step, run, policy, b, logp_old, logp_ref)
        run.log(step, metrics, headline=("objective/scores", "objective/kl"))
    return policy, {}


def _same(b: Batch, i: int, j: int) -> bool:
    return bool(torch.equal(b.tokens[i][b.action[i]], b.tokens[j][b.action[j]]))


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the reference, the reward and the prompts, train, save the policy to `model/` in the run folder."""
    reference = catalog.load(cfg.model).freeze()
    reward = rewards.load(cfg.reward, reference)
    task = tasks.load(cfg.task, reference)
    gold = rewards.load(cfg.gold, reference) if cfg.gold else None
    policy, figures = train(cfg, reference, reward, task, run, gold)
    saved = policy.publish(run.folder / "model")
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    judged = judge.held_out(reference, policy, reward, task, sampling, run, gold)
    return {**figures, **judged, **saved}
