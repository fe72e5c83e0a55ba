"""Reward-ranked fine-tuning (RAFT): sample k responses a prompt, clone the one the reward likes best, and again.

    y*(x) = argmax_{y_1 … y_k ~ μ(·|x)}  r(x, y) − β log μ(y|x)/π_ref(y|x)
    min_θ  − Σ_x Σ_t w_t log π_θ(y*_t | x, y*_{<t})

Policy improvement by selection, then supervised fine-tuning on what was selected: no critic, no ratio, no gradient of
the reward. `sampler` says who draws: the policy itself, round after round (RAFT), or always the reference, which makes
all phases one long round and distils the best-of-k policy into the weights (the variant `bon-distill`).

Source: Dong et al. 2023 (RAFT), algorithm 1. Best-of-n distillation: Gao, Schulman & Hilton 2023 measure best-of-n as a
policy; cloned on its samples it is the supervised case of Sessa et al. 2024 (BOND).
Differs: a prompt whose responses score the same has no best; it is left out and counted (`frac_reward_zero_std`). One
    optimiser through all rounds; every kept token weighs the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmdp import gate, judge, rewards, tasks
from tokenmdp.functional import imitation, measures, returns, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Reward

SETTING = "rl"
VARIANTS = {"bon-distill": {"sampler": "reference", "samples": 16}}


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # the policy's start and its reference: best the SFT model
    reward: str = "sentiment"  # a reward model's folder, a name, file.py:function, or a mixture "0.5*a + b"
    task: str = "sentiment"  # prompts: a task's name, a file or a hub id
    gold: str = ""  # another reward: recorded in every phase and the judge at the end, never learned from
    steps: int = 40  # rounds of sampling, choosing and cloning
    prompts: int = 16  # prompts a round
    samples: int = 4  # k, responses a prompt
    sampler: str = "policy"  # who is sampled: policy | reference
    max_new_tokens: int = 24  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling and of the loss
    learning_rate: float = 5e-5
    warmup: int = 0  # optimiser steps over which the rate rises; Adam's first are as large as any, and mostly noise
    epochs: int = 2  # passes over a round's chosen responses
    minibatches: int = 2  # optimiser steps a pass
    kl: float = 0.0  # β, reward units a nat: what distance from the reference costs in the ranking
    truncation: float = 0.0  # reward units taken off a response that did not end by itself
    train: str = "all"  # all | top-N blocks | lora-R rank
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; among responses drawn without chance there is no best: take one above 0"
            )


def best(outcome: Tensor, group: Tensor, deviation: Tensor) -> Tensor:
    """[K] the best row of every group in which there is one.

    Args:
        outcome: [B] reward units.
        group: [B] rows with one number are responses to one prompt.
        deviation: [B] from `returns.spread`: 0 where a group does not vary, and for a row without a verdict.
    """
    varied = deviation > 0
    ranked = torch.where(varied, outcome, torch.full_like(outcome, -torch.inf))
    rows = [(group == name).nonzero()[:, 0] for name in group[varied].unique().tolist()]
    return torch.tensor([int(mine[ranked[mine].argmax()]) for mine in rows], dtype=torch.long, device=outcome.device)


def train(
    cfg: Config, reference: Policy, reward: Reward, task: Task, run: Run, gold: Reward | None = None
) -> tuple[Policy, dict[str, float]]:
    """Improve the policy by cloning the best of its own responses, or of the reference's.

    Args:
        reference: where the policy starts; frozen.
        gold: a second reward that is only recorded.

    Raises:
        ValueError: one response a prompt, or an unknown sampler.
    """
    if cfg.samples < 2:
        raise ValueError(f"samples={cfg.samples}: among one response there is no best; draw at least 2 a prompt")
    if cfg.sampler not in ("policy", "reference"):
        raise ValueError(f"sampler is {cfg.sampler!r}; it must be policy or reference")
    policy = reference.twin(cfg.train, name="raft")
    learner = Learner(policy, cfg.learning_rate, warmup=cfg.warmup, tokens=cfg.micro_tokens)
    sampler = policy if cfg.sampler == "policy" else reference
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    run.note(f"reference {reference.name} {reference.fingerprint()}; {cfg.sampler} is sampled")

    def loss(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return imitation.nll(policy.evaluate(part, temperature=cfg.temperature)["logp"]), {}

    def look(model: Policy, b: Batch, *want: str) -> dict[str, Tensor]:
        return in_parts(lambda part: model.evaluate(part, want, cfg.temperature), b)

    for step in run.steps(cfg.steps, learner, title="RAFT", setting=SETTING):
        # 1. Sample, judge, choose.
        b = sampler.sample(task.draw(cfg.prompts, run.rng), cfg.samples, sampling, run.rng)
        score = reward(b)
        run.missing(step, b, score)
        rows = score.verdict
        seen = look(sampler, b, "logp", "entropy")
        logp_ref = look(reference, b, "logp")["logp"]
        gate.check(step, run, sampler, b, seen["logp"], logp_ref)
        kl = ((seen["logp"] - logp_ref) * b.action).sum(-1)
        outcome = score.value - cfg.truncation * (~b.ended).to(score.value.dtype) - cfg.kl * kl
        deviation = returns.spread(outcome, b.group, rows)
        chosen = best(outcome, b.group, deviation)

        # 2. Clone.
        learned: list[dict[str, float]] = []
        for _ in range(cfg.epochs if len(chosen) else 0):
            for part in chosen[torch.randperm(len(chosen), generator=run.rng)].chunk(cfg.minibatches):
                mini = b.select(part)
                learned.append(learner.step(loss, mini, weights.per_token(mini.action)))

        # 3. Say what happened.
        spread = returns.spread(score.value, b.group, rows)
        metrics = {
            "objective/scores": measures.mean(score.value, rows),
            "objective/rlhf_reward": measures.mean(outcome, rows),
            "reward": measures.mean(score.value, rows),
            "reward_std": measures.mean(spread, rows),
            "frac_reward_zero_std": measures.mean((spread == 0).float(), rows),
            **measures.responses(b, score),
        }
        if learned:  # a round without any best response takes no optimiser step
            metrics["objective/scores_best"] = float(score.value[chosen].mean())
            metrics["loss/policy_avg"] = sum(m["loss"] for m in learned) / len(learned)
            metrics["grad_norm"] = sum(m["grad_norm"] for m in learned) / len(learned)
        if sampler is policy:  # the reference's samples say nothing of the policy
            metrics["objective/kl"] = measures.mean(kl, rows)
            metrics["objective/entropy"] = float((seen["entropy"] * weights.per_token(b.action, rows)).sum())
        if gold is not None:
            truth = gold(b)
            metrics["objective/gold"] = measures.mean(truth.value, truth.verdict)
        run.log(step, metrics, headline=("objective/scores", "objective/kl"))
    return policy, {}


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
