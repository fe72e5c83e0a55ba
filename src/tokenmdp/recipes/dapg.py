"""Policy gradient augmented by demonstrations: the true reward, and a demonstrator to begin with.

    g_k = E_{a ~ π}[ A(s, a) ∇ log π(a | s) ] + λ_k E_{(s, a) ~ demonstrations}[ ∇ log π(a | s) ]
    λ_k = λ_0 λ_1^k · max A,                     k the phase, max A the largest advantage of its responses

To the gradient a demonstration is one more response, with the advantage λ_k: the reward says what is better, the
demonstrations say what the policy would otherwise seldom try, and the reward has the last word as λ_1^k fades. λ_0 = 0
is `reinforce` with its baseline leave_one_out.

Source: Rajeswaran et al. 2018 (DAPG), section IV, the augmented gradient, with its λ_0 = 0.1 and λ_1 = 0.95.
Differs: a plain gradient under Adam in place of the natural one; the other responses to the prompt are the baseline in
place of a critic; `demo_scale=one` takes 1 in place of max A, for rewards so sparse that at first no response stands
out. Cloning first is `sft`, a recipe of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenmdp import gate, judge, rewards, tasks
from tokenmdp.functional import kl, measures, policy_loss, returns, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.rewards import assign
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Reward, stacked

SETTING = "learning_from_demonstrations"


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # the policy's start and its reference: best the SFT model
    reward: str = "sentiment"  # a reward model's folder, a name, file.py:function, or a mixture "0.5*a + b"
    task: str = "sentiment"  # a task with demonstrations: its name
    gold: str = ""  # another reward: recorded in every phase and the judge at the end, never learned from
    steps: int = 80  # phases of sampling and learning, one update each
    prompts: int = 16  # prompts a phase
    samples: int = 4  # responses a prompt
    demonstrations: int = 16  # demonstrations a phase
    demo_weight: float = 0.1  # λ_0
    demo_decay: float = 0.95  # λ_1, what is left of it after each phase
    demo_scale: str = "largest"  # what λ_0 is in units of: the largest advantage of the phase | one reward unit
    max_new_tokens: int = 24  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling and of what is learned
    learning_rate: float = 2e-5
    warmup: int = 0  # optimiser steps over which the rate rises; Adam's first are as large as any, and mostly noise
    kl: float = 0.05  # β, reward units a nat
    credit: str = "last"  # which tokens earn the score (see `rewards.assign`)
    train: str = "all"  # what of the policy trains: all | top-N blocks | lora-R rank
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(
                f"samples={self.samples}: the baseline is the prompt's other responses; ask for at least 2"
            )
        if min(self.kl, self.demo_weight) < 0 or not 0 <= self.demo_decay <= 1 or not self.temperature > 0:
            raise ValueError(
                f"kl={self.kl}, demo_weight={self.demo_weight}, demo_decay={self.demo_decay}, temperature={self.temperature}: "
                "the first two are at least 0, the third lies between 0 and 1, the last is positive"
            )
        if self.demo_scale not in ("largest", "one") or self.demonstrations < 1:
            raise ValueError(
                f"demo_scale={self.demo_scale!r}, demonstrations={self.demonstrations}: the first is largest or one, the "
                "second at least 1"
            )


def train(
    cfg: Config, reference: Policy, reward: Reward, task: Task, run: Run, gold: Reward | None = None
) -> tuple[Policy, dict[str, float]]:
    """Optimise the reward online, with the task's demonstrations beside; returns the trained policy.

    Args:
        reference: where the policy starts and what the KL is measured to; frozen.
        gold: a second reward that is only recorded, to see proxy and truth drift apart.

    Raises:
        ValueError: the task has no demonstrations.
    """
    if task.demonstrations is None:
        raise ValueError(
            f"the task {task.name} has no demonstrations to learn from: take one that has, or the recipe `reinforce`"
        )
    known = task.demonstrations
    policy = reference.twin(cfg.train, name="dapg")
    actor = Learner(policy, cfg.learning_rate, warmup=cfg.warmup, tokens=cfg.micro_tokens)
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    scheme = assign.load(cfg.credit, reward, reference, sampling)
    run.note(f"reference {reference.name} {reference.fingerprint()}; {len(known)} demonstrations")

    def evaluate(model: Policy, batch: Batch, *want: str) -> dict[str, Tensor]:
        return in_parts(lambda part: model.evaluate(part, want, cfg.temperature), batch)

    def loss(part: Batch, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logp = policy.evaluate(part, temperature=cfg.temperature)["logp"]
        return policy_loss.reinforce(logp, advantage), {}

    for step in run.steps(cfg.steps, actor, title="policy gradient with demonstrations", setting=SETTING):
        # 1. Roll out on the known dynamics; take some demonstrations.
        b = policy.sample(task.draw(cfg.prompts, run.rng), cfg.samples, sampling, run.rng)
        score = reward(b)
        run.missing(step, b, score)
        rows = score.verdict
        shown = known.select(torch.randperm(len(known), generator=run.rng)[: cfg.demonstrations])

        # 2. Look: the policy that sampled, the reference.
        old = evaluate(policy, b, "logp", "entropy")
        logp_old, logp_ref = old["logp"], evaluate(reference, b, "logp")["logp"]

        # 3. What a response earned beyond the prompt's others, and what a demonstration is taken to have earned.
        divergence = kl.reverse_k1(logp_old, logp_ref).sum(-1)
        paid = scheme.paid(b, score)
        total = paid.value - cfg.kl * divergence.to(paid.value.dtype)
        less = partial(returns.leave_one_out, group=b.group, rows=rows)
        advantage = assign.advantage(scheme, b, paid, total, less, policy, run.rng)
        own = weights.per_slot(b.action, cfg.max_new_tokens, rows)
        largest = torch.where(own > 0, advantage, torch.zeros_like(advantage)).max()
        unit = float(largest) if cfg.demo_scale == "largest" else 1.0
        demo_weight = cfg.demo_weight * cfg.demo_decay**step * unit

        # 4. Learn from both at once: each part has its own normaliser.
        both = Batch.concat([b, shown])
        weight = stacked([own, weights.per_slot(shown.action, cfg.max_new_tokens)])
        advantage = stacked([advantage, demo_weight * shown.action.to(advantage.dtype)])
        idle = not bool(((weight > 0) & (advantage != 0)).any())
        learned = {"loss": 0.0, "grad_norm": 0.0} if idle else actor.step(loss, both, weight, advantage=advantage)

        # 5. Say what happened.
        metrics = {
            "objective/scores": measures.mean(score.value, rows),
            "objective/kl": measures.mean(divergence, rows),
            "objective/rlhf_reward": measures.mean(total, rows),
            "objective/entropy": float((old["entropy"] * weights.per_token(b.action, rows)).sum()),
            "loss/policy_avg": learned["loss"],
            "grad_norm": learned["grad_norm"],
            "demonstration_weight": demo_weight,
            "skipped_updates": float(idle),
            **measures.responses(b, score),
            "num_tokens_credit": float(scheme.drawn),
            **measures.sampler_difference(b, logp_old),
        }
        if gold is not None:
            truth = gold(b)
            metrics["objective/gold"] = measures.mean(truth.value, truth.verdict)
        gate.check(step, run, policy, b, logp_old, logp_ref)
        run.log(step, metrics, headline=("objective/scores", "objective/kl"))
    return policy, {}


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the reference, the reward and the task, train, save the policy to `model/` in the run folder."""
    reference = catalog.load(cfg.model).freeze()
    reward = rewards.load(cfg.reward, reference)
    task = tasks.load(cfg.task, reference)
    gold = rewards.load(cfg.gold, reference) if cfg.gold else None
    policy, figures = train(cfg, reference, reward, task, run, gold)
    saved = policy.publish(run.folder / "model")
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    judged = judge.held_out(reference, policy, reward, task, sampling, run, gold)
    return {**figures, **judged, **saved}
