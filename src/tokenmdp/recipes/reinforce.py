"""REINFORCE on the token MDP: the plain policy gradient, strictly on-policy, one update a phase.

    R_b = score_b − β Σ_t log( π(a_t | s_t) / π_ref(a_t | s_t) ) − c Σ_t log π(a_t | s_t)
    A_b = R_b − baseline_b,          baseline = 0, or a number that does not depend on response b
    ℓ_t = − A_t log π(a_t | s_t),    A_t = what of A_b is credited to a_t and what follows it

Its expected gradient is that of E[score] − β KL(π ‖ π_ref) + c H(π), both of whole responses, for every baseline:

    none            0
    batch           the mean of all other responses of the phase, whatever their prompts
    leave_one_out   the mean of the other responses to the same prompt: RLOO, the verb `rloo`
    greedy          what the policy's own greedy response to the prompt earns: ReMax, the verb `remax`

No ratio and no clip: the responses of a phase are used once, for the policy that drew them.

Source: Williams 1992; Sutton & Barto 2018, eqs. 13.8 and 13.11; leave-one-out: Ahmadian et al. 2024 (RLOO), section
2, after Kool et al. 2019; greedy: Li et al. 2024 (ReMax), algorithm 1.
Differs: the sum over a response's tokens is divided by the horizon, a constant, which only scales the learning rate;
the baseline of `batch` leaves the response itself out, and that of `greedy` pays the KL too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenmdp import experts, gate, judge, rewards, tasks
from tokenmdp.functional import kl, measures, policy_loss, returns, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.rewards import assign
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Reward, Score

SETTING = "rl"
VARIANTS = {
    "rloo": {"baseline": "leave_one_out", "samples": 4},
    "remax": {"baseline": "greedy", "samples": 1, "prompts": 64},
}
BASELINES = ("none", "batch", "leave_one_out", "greedy")


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # what the policy starts as: best the SFT model
    reference: str = (
        ""  # what the KL is measured to, such as the SFT model of a second round; empty for the start itself
    )
    reward: str = "sentiment"  # a reward model's folder, a name, file.py:function, or a mixture "0.5*a + b"
    task: str = "sentiment"  # prompts: a task's name, a file or a hub id
    gold: str = ""  # another reward: recorded in every phase and the judge at the end, never learned from
    baseline: str = "batch"  # none | batch | leave_one_out | greedy
    steps: int = 80  # phases of sampling and learning, one update each
    prompts: int = 16  # prompts a phase
    samples: int = 4  # responses a prompt
    max_new_tokens: int = 24  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling and of what is learned
    learning_rate: float = 2e-5
    warmup: int = 0  # optimiser steps over which the rate rises; Adam's first are as large as any, and mostly noise
    kl: float = 0.05  # β, reward units a nat
    entropy: float = 0.0  # c, reward units a nat: a bonus for responses that were unlikely
    truncation: float = 0.0  # reward units taken off a response that did not end by itself
    credit: str = "last"  # which tokens earn the score (see `rewards.assign`)
    train: str = "all"  # what of the policy trains: all | top-N blocks | lora-R rank
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline is {self.baseline!r}; it must be one of {', '.join(BASELINES)}")
        alone = {"leave_one_out": self.samples, "batch": self.prompts * self.samples}.get(self.baseline, 2) < 2
        if alone:
            raise ValueError(
                f"baseline={self.baseline} compares responses, and prompts={self.prompts} with samples={self.samples} leave "
                "each alone: ask for more, or take baseline=greedy or none"
            )
        if min(self.kl, self.entropy, self.truncation) < 0:
            raise ValueError(
                f"kl={self.kl}, entropy={self.entropy}, truncation={self.truncation}: each is a price or a bonus, at least 0"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; a policy that learns from its own draws needs chance")


def train(
    cfg: Config,
    reference: Policy,
    reward: Reward,
    task: Task,
    run: Run,
    gold: Reward | None = None,
    start: Policy | None = None,
) -> tuple[Policy, dict[str, float]]:
    """Optimise the reward online; returns the trained policy.

    Args:
        reference: what the KL is measured to, and where the policy starts unless `start` is given; frozen.
        gold: a second reward that is only recorded, to see proxy and truth drift apart.
        start: where the policy starts, of the reference's vocabulary; None for the reference.
    """
    policy = (start or reference).twin(cfg.train, name="reinforce")
    actor = Learner(policy, cfg.learning_rate, warmup=cfg.warmup, tokens=cfg.micro_tokens)
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    greedily = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=0.0)
    scheme = assign.load(cfg.credit, reward, reference, sampling)
    run.note(f"reference {reference.name} {reference.fingerprint()}; policy starts as {policy.fingerprint()}")

    def evaluate(model: Policy, batch: Batch, *want: str) -> dict[str, Tensor]:
        return in_parts(lambda part: model.evaluate(part, want, cfg.temperature), batch)

    def price(batch: Batch, logp: Tensor, logp_ref: Tensor) -> Tensor:
        """[B] what a response pays besides its score, reward units."""
        spent = cfg.kl * kl.reverse_k1(logp, logp_ref) + cfg.entropy * logp
        return spent.sum(-1) + cfg.truncation * (~batch.ended)

    def greedy_baseline(b: Batch) -> tuple[Batch, Score, Tensor]:
        """The greedy responses to the prompts of a phase, their scores and what they earn."""
        first = {int(g): p for g, p in zip(b.group, b.prompts, strict=True)}
        best = policy.sample(list(first.values()), 1, greedily, run.rng)
        said = reward(best)
        spent = price(best, evaluate(policy, best, "logp")["logp"], evaluate(reference, best, "logp")["logp"])
        return best, said, scheme.paid(best, said).value - spent

    def loss(part: Batch, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_loss.reinforce(policy.evaluate(part, temperature=cfg.temperature)["logp"], advantage), {}

    baseline = "none" if scheme.baseline else cfg.baseline
    if baseline != cfg.baseline:
        run.note(
            f"credit={cfg.credit} takes off what was to be expected: baseline={cfg.baseline} is not taken off besides"
        )
    for step in run.steps(cfg.steps, actor, title="REINFORCE", setting=SETTING):
        # 1. Roll out on the known dynamics.
        b = policy.read(policy.sample(task.draw(cfg.prompts, run.rng), cfg.samples, sampling, run.rng))
        score = reward(b)
        run.missing(step, b, score)
        rows, sampled = score.verdict, int(b.action.sum())

        # 2. Look: the policy that sampled, the reference.
        old = evaluate(policy, b, "logp", "entropy")
        logp_old, logp_ref = old["logp"], evaluate(reference, b, "logp")["logp"]

        # 3. What a response earned in all, less what was to be expected, on the tokens that earned it.
        paid = scheme.paid(b, score)
        total = paid.value - price(b, logp_old, logp_ref).to(paid.value.dtype)
        greedy = None
        if baseline == "greedy":
            best, said, greedy = greedy_baseline(b)
            rows, sampled = rows & said.verdict[b.group], sampled + int(best.action.sum())
        less = partial(expected_off, baseline, b.group, rows, greedy)
        advantage = assign.advantage(scheme, b, paid, total, less, policy, run.rng)

        # 4. Learn, once. Where no response is better or worse than expected there is nothing to learn.
        w = weights.per_slot(b.action, cfg.max_new_tokens, rows)
        idle = not bool(((w > 0) & (advantage != 0)).any())
        learned = {"loss": 0.0, "grad_norm": 0.0} if idle else actor.step(loss, b, w, advantage=advantage)

        # 5. Say what happened.
        divergence = kl.reverse_k1(logp_old, logp_ref).sum(-1)
        deviation = returns.spread(score.value, b.group, rows)
        metrics = {
            "objective/scores": measures.mean(score.value, rows),
            "objective/kl": measures.mean(divergence, rows),
            "objective/rlhf_reward": measures.mean(total, rows),
            "objective/entropy": float((old["entropy"] * weights.per_token(b.action, rows)).sum()),
            "loss/policy_avg": learned["loss"],
            "grad_norm": learned["grad_norm"],
            "skipped_updates": float(idle),
            "reward": measures.mean(score.value, rows),
            "reward_std": measures.mean(deviation, rows),
            **measures.responses(b, score),
            "no_verdict": float((~rows).sum()),
            "num_tokens_credit": float(scheme.drawn + sampled - int(b.action.sum())),  # besides b: the greedy ones
            **measures.sampler_difference(b, logp_old),
        }
        if baseline == "leave_one_out":  # elsewhere a group without spread is compared with something else
            metrics["frac_reward_zero_std"] = measures.mean((deviation == 0).float(), rows)
        if gold is not None:
            truth = gold(b)
            metrics["objective/gold"] = measures.mean(truth.value, truth.verdict)
        gate.check(step, run, policy, b, logp_old, logp_ref if start is None else None)
        run.log(step, metrics, headline=("objective/scores", "objective/kl"))
    return policy, {}


def expected_off(baseline: str, group: Tensor, rows: Tensor, greedy: Tensor | None, earned: Tensor) -> Tensor:
    """[B] what responses earned less the baseline, which no response is part of its own of; 0 without a verdict."""
    if baseline == "none":
        return torch.where(rows, earned, torch.zeros_like(earned))
    if greedy is not None:
        return returns.against(earned, group, greedy.to(earned.dtype), rows)
    return returns.leave_one_out(earned, group if baseline == "leave_one_out" else torch.zeros_like(group), rows)


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the reference, the reward and the prompts, train, save the policy to `model/` in the run folder."""
    start = catalog.load(cfg.model).freeze()
    task = tasks.load(cfg.task, start)
    reference = experts.reference(cfg.reference, start, task.longest + cfg.max_new_tokens)
    reward = rewards.load(cfg.reward, start)
    gold = rewards.load(cfg.gold, start) if cfg.gold else None
    policy, figures = train(cfg, reference, reward, task, run, gold, start if cfg.reference else None)
    saved = policy.publish(run.folder / "model")
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    judged = judge.held_out(start, policy, reward, task, sampling, run, gold)
    return {**figures, **judged, **saved}
