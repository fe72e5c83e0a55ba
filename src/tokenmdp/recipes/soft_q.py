"""Soft Q-learning on the token MDP: the policy's logits are Q, and every path, however old, says what they should be.

    Q_θ(s, a) = β (z_θ(s, a) − z_ref(s, a)),      π_θ = softmax z_θ
    min_θ  Σ_t ½ (Q_θ(s_t, a_t) − G_t)²,          G_t = r_t + γ ( V̄(s_{t⁺}) + λ (G_{t⁺} − Q̄(s_{t⁺}, a_{t⁺})) )

A bar marks the target network. The optimum is that of KL-regularised RL, π* ∝ π_ref exp(Q*/β), and Q* satisfies the
equation on every path, so it may be learned from data that another policy drew. `sync` says how old they are: the
sampler takes over the policy's weights every `sync` phases (1: fresh in every phase), with no correction, which is what
staleness is compared by. Where fresh data and small steps keep policy gradients stable, here nothing does.

Source: Guo et al. 2021, "Text generation with efficient (soft) Q-learning", section 3; Nachum et al. 2017 (path
consistency).
Differs: entropy is relative to a reference, which is also the start, so that Q = V = 0 before the first update; paths of
    all lengths are mixed by λ instead of adding the one-step and the whole-path loss; the gradient is that of Q, its
    level included, not of log π alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmdp import gate, judge, rewards, tasks
from tokenmdp.functional import measures, value_loss, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog, soft
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.models.target import Target
from tokenmdp.rewards import assign
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Reward

SETTING = "rl"


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # the policy's start and its reference: best the SFT model
    reward: str = "sentiment"  # a reward model's folder, a name, file.py:function, or a mixture "0.5*a + b"
    task: str = "sentiment"  # prompts: a task's name, a file or a hub id
    gold: str = ""  # another reward: recorded in every phase and the judge at the end, never learned from
    steps: int = 40  # phases of sampling and learning
    prompts: int = 16  # prompts a phase
    samples: int = 4  # responses a prompt
    sync: int = 1  # phases between two copies of the policy to the sampler; 1 samples from the policy itself
    max_new_tokens: int = 24  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling
    learning_rate: float = 2e-5
    warmup: int = 0  # optimiser steps over which the rate rises; Adam's first are as large as any, and mostly noise
    epochs: int = 2  # passes over a phase's responses
    minibatches: int = 2  # optimiser steps a pass
    gamma: float = 1.0  # discount a token
    lam: float = 0.95  # λ: 1 trusts whole paths, 0 the target network's value of the next state
    kl: float = 0.05  # β, reward units a nat: the temperature of the soft optimum
    target_rate: float = 0.2  # ρ, the share of the way the target network goes to the policy after a phase
    truncation: float = 0.0  # reward units taken off a response that did not end by itself
    credit: str = "last"  # which tokens earn the score (see `rewards.assign`)
    train: str = "all"  # all | top-N blocks | lora-R rank
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; a policy that learns from its own draws needs chance: take one above 0"
            )


def train(
    cfg: Config, reference: Policy, reward: Reward, task: Task, run: Run, gold: Reward | None = None
) -> tuple[Policy, dict[str, float]]:
    """Fit Q to the paths that the sampler walked; returns the policy that its logits are.

    Args:
        reference: where the policy starts and what its entropy is relative to; frozen.
        gold: a second reward that is only recorded.

    Raises:
        ValueError: β is not positive, or sync is below 1.
    """
    if not cfg.kl > 0 or cfg.sync < 1:
        raise ValueError(
            f"kl={cfg.kl}, sync={cfg.sync}: the first must be positive, for it is the temperature that turns Q into a "
            "policy; the second counts phases, at least 1"
        )
    policy = reference.twin(cfg.train, name="soft-q")
    behaviour, slow = reference.twin(cfg.train, name="behaviour"), reference.twin(cfg.train, name="target")
    learner = Learner(policy, cfg.learning_rate, warmup=cfg.warmup, tokens=cfg.micro_tokens)
    sampler, target = Target(behaviour, policy), Target(slow, policy)
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    scheme = assign.load(cfg.credit, reward, reference, sampling, cfg.gamma)
    run.note(f"reference {reference.name} {reference.fingerprint()}; data are up to {cfg.sync - 1} phases old")

    def look(model: Policy, b: Batch, *want: str) -> dict[str, Tensor]:
        return in_parts(lambda part: model.evaluate(part, want, cfg.temperature), b)

    def loss(part: Batch, goal: Tensor, logit_ref: Tensor, log_z_ref: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        q = soft.values(policy, part, logit_ref, log_z_ref, cfg.kl)["q"]
        return 0.5 * (q - goal).square(), {}

    for step in run.steps(cfg.steps, learner, sampler, target, title="soft Q", setting=SETTING):
        # 1. Sample from the policy of some phases ago, judge.
        b = behaviour.sample(task.draw(cfg.prompts, run.rng), cfg.samples, sampling, run.rng)
        score = reward(b)
        run.missing(step, b, score)
        rows = score.verdict
        now, logp_ref = look(policy, b, "logp", "entropy"), look(reference, b, "logp")["logp"]
        if step % cfg.sync == 0:  # later the sampler is behind on purpose
            gate.check(step // cfg.sync, run, policy, b, now["logp"], logp_ref)

        # 2. What Q should be, by the rest of each path and the target network.
        paid = scheme.paid(b, score)
        outcome = paid.value - cfg.truncation * (~b.ended).to(paid.value.dtype)
        token_reward = scheme(b, paid, outcome, behaviour, run.rng)
        z = in_parts(lambda part: reference.evaluate(part, soft.WANT), b)
        y = in_parts(lambda part: slow.evaluate(part, soft.WANT), b)
        q, value = cfg.kl * (y["logit"] - z["logit"]), cfg.kl * (y["log_z"] - z["log_z"])
        goal = value_loss.soft_target(token_reward, q, value, b.action, cfg.gamma, cfg.lam)

        # 3. Learn by regression; the target network follows, the sampler when it is due.
        learned: list[dict[str, float]] = []
        skipped = 0
        for _ in range(cfg.epochs):
            for part in torch.randperm(len(b), generator=run.rng).chunk(cfg.minibatches):
                mini = b.select(part)
                L = mini.tokens.shape[1]
                columns = {"goal": goal, "logit_ref": z["logit"], "log_z_ref": z["log_z"]}
                w = weights.per_token(mini.action, rows=rows[part])
                if not bool((w > 0).any()):  # no row has a verdict: a step would only carry Adam's momentum on
                    skipped += 1
                    continue
                learned.append(learner.step(loss, mini, w, **{k: v[part, :L] for k, v in columns.items()}))
        target.follow(cfg.target_rate)
        if (step + 1) % cfg.sync == 0:
            sampler.follow(1.0)

        # 4. Say what happened.
        assert b.logp_mu is not None  # it was sampled here
        kl = ((b.logp_mu - logp_ref) * b.action).sum(-1)
        metrics = {
            "objective/scores": measures.mean(score.value, rows),
            "objective/kl": measures.mean(kl, rows),
            "objective/rlhf_reward": measures.mean(outcome - cfg.kl * kl, rows),
            "objective/entropy": float((now["entropy"] * weights.per_token(b.action, rows)).sum()),
            "loss/value_avg": measures.average(learned, "loss"),
            "grad_norm": measures.average(learned, "grad_norm"),
            "skipped_updates": float(skipped),
            **measures.responses(b, score),
            "num_tokens_credit": float(scheme.drawn),
            **measures.sampler_difference(b, now["logp"]),
        }
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
