"""Proximal policy optimisation on the token MDP: RLHF's online reinforcement learning on known dynamics.

    r_t  = credit(score)_t − β ( log π_old(a_t | s_t) − log π_ref(a_t | s_t) )
    Â_t  = Σ_k (γλ)^k δ_{t+k},   δ_t = r_t + γ V(s_{t+1}) − V(s_t),   V = 0 after the last action
    ℓ_t  = − min( ρ_t Â_t, clip(ρ_t, 1 ± ε) Â_t ),   ρ_t = π(a_t | s_t) / π_old(a_t | s_t)

The critic starts as the reward model read at every prefix. A response cut at the horizon is judged as it stands: the
horizon is part of the MDP, so nothing is bootstrapped after it; `truncation` takes that much off its score where that
is not wanted.

Source: Schulman et al. 2017, eqs. 7, 11, 12; the KL reward: Ouyang et al. 2022, eq. 2; adaptive β: Ziegler et al.
2019, section 2.2; details as in Huang et al. 2024 ("The N+ implementation details of RLHF with PPO").
Differs: by default only the critic's head trains, on the reward model's frozen body, whose states are computed once
a phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenmdp import experts, gate, judge, rewards, tasks
from tokenmdp.functional import measures, policy_loss, returns, weights
from tokenmdp.learner import Learner
from tokenmdp.models import catalog
from tokenmdp.models.heads import Critic
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.rewards import assign
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Reward

SETTING = "rl"


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # what the policy starts as: best the SFT model
    reference: str = (
        ""  # what the KL is measured to, such as the SFT model of a second round; empty for the start itself
    )
    reward: str = "sentiment"  # a reward model's folder, a name, file.py:function, or a mixture "0.5*a + b"
    task: str = "sentiment"  # prompts: a task's name, a file or a hub id
    gold: str = ""  # another reward: recorded in every phase and the judge at the end, never learned from
    steps: int = 40  # phases of sampling and learning
    prompts: int = 16  # prompts a phase
    samples: int = 4  # responses a prompt
    max_new_tokens: int = 24  # the horizon H, in tokens
    temperature: float = 1.0  # of sampling and of the ratio
    learning_rate: float = 2e-5  # of the policy
    warmup: int = (
        0  # optimiser steps over which the policy's rate rises; Adam's first are as large as any, and mostly noise
    )
    critic_learning_rate: float = 1e-3  # of the value head (and of the critic's body where it trains)
    epochs: int = 2  # passes over a phase's responses
    minibatches: int = 2  # optimiser steps a pass
    clip: float = 0.2  # ε, in units of the ratio; 0 for no clip
    value_clip: float = 0.0  # how far from its old value a state's value may move for gain, reward units; 0 for any
    gamma: float = 1.0  # discount a token
    lam: float = 0.95  # λ of GAE: 1 trusts returns, 0 the critic
    kl: float = 0.05  # β, reward units a nat
    kl_target: float = 0.0  # nats a response that β is steered towards; 0 keeps β fixed
    truncation: float = 0.0  # reward units taken off a response that did not end by itself
    score_clip: float = 0.0  # scores are held within ± this, reward units; 0 for any score
    whiten_rewards: bool = False  # divide the phase's token rewards by their spread
    credit: str = "last"  # which tokens earn the score (see `rewards.assign`)
    train: str = "all"  # what of the policy trains: all | top-N blocks | lora-R rank
    critic_train: str = "head"  # what of the critic trains besides its head: head (nothing) | all | top-N | lora-R
    micro_tokens: int = 2048  # padded positions in a micro-batch; changes memory, never the gradient

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; a policy that learns from its own draws needs chance: take one above 0"
            )
        if min(self.kl, self.kl_target, self.truncation, self.score_clip) < 0:
            raise ValueError(
                f"kl={self.kl}, kl_target={self.kl_target}, truncation={self.truncation}, score_clip={self.score_clip}: each is a "
                "price, a target or a bound, at least 0"
            )
        if self.kl_target > 0 and self.kl == 0:
            raise ValueError(
                f"kl_target={self.kl_target} steers kl by factors, and kl=0 stays 0: start it above 0, such as kl=0.05"
            )


class KLCoefficient:
    """β, fixed or steered towards a target KL: β ← β (1 + 0.1 · clip(KL / target − 1, ±0.2)) (Ziegler et al. 2019,
    section 2.2).
    """

    def __init__(self, start: float, target: float) -> None:
        self.value, self.target = start, target

    def update(self, kl: float) -> None:
        if self.target > 0:
            self.value *= 1 + 0.1 * min(max(kl / self.target - 1, -0.2), 0.2)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def scalars(self) -> dict[str, Any]:
        return {"beta": self.value}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.value = float(scalars["beta"])


def train(
    cfg: Config,
    reference: Policy,
    critic: Critic,
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
    policy = (start or reference).twin(cfg.train, name="ppo")
    actor = Learner(policy, cfg.learning_rate, warmup=cfg.warmup, tokens=cfg.micro_tokens)
    valuer = Learner(critic, cfg.critic_learning_rate, tokens=cfg.micro_tokens)
    beta = KLCoefficient(cfg.kl, cfg.kl_target)
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    scheme = assign.load(cfg.credit, reward, reference, sampling, cfg.gamma)
    run.note(f"reference {reference.name} {reference.fingerprint()}; policy starts as {policy.fingerprint()}")

    def evaluate(model: Policy, batch: Batch, *want: str) -> dict[str, Tensor]:
        return in_parts(lambda part: model.evaluate(part, want, cfg.temperature), batch)

    def actor_loss(part: Batch, advantage: Tensor, logp_old: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logp = policy.evaluate(part, temperature=cfg.temperature)["logp"]
        value, clipped = policy_loss.ppo_clip(logp, logp_old, advantage, cfg.clip or None)
        change = logp - logp_old
        return value, {
            "policy/clipfrac_avg": clipped.to(value.dtype),
            "policy/approxkl_avg": change.exp() - 1 - change,
            "val/ratio": change.exp(),
        }

    def critic_loss(
        part: Batch, return_: Tensor, value_old: Tensor, states: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        value = critic.value(critic.states(part) if states is None else states, part)
        return policy_loss.value_clip(value, value_old, return_, cfg.value_clip or None), {}

    for step in run.steps(cfg.steps, actor, valuer, beta, title="PPO", setting=SETTING):
        # 1. Roll out on the known dynamics.
        b = policy.read(policy.sample(task.draw(cfg.prompts, run.rng), cfg.samples, sampling, run.rng))
        score = reward(b)
        run.missing(step, b, score)
        rows = score.verdict

        # 2. Look: the policy that sampled, the reference, the critic.
        old = evaluate(policy, b, "logp", "entropy")
        logp_old, logp_ref = old["logp"], evaluate(reference, b, "logp")["logp"]
        states = in_parts(lambda part: {"states": critic.states(part)}, b)["states"]
        with torch.no_grad():
            value = critic.value(states, b)

        # 3. Reward, return, advantage, all token-aligned.
        paid = scheme.paid(b, score)
        per_token = weights.per_token(b.action, rows=rows)
        held = paid.value.clamp(-cfg.score_clip, cfg.score_clip) if cfg.score_clip else paid.value
        outcome = held - cfg.truncation * (~b.ended).to(held.dtype)
        token_reward = scheme(b, paid, outcome, policy, run.rng) - beta.value * (logp_old - logp_ref)
        if cfg.whiten_rewards:
            token_reward = returns.whiten(token_reward, per_token, shift=False)
        advantage, return_ = returns.gae(token_reward, value, b.action, cfg.gamma, cfg.lam)
        advantage = returns.whiten(advantage, per_token)

        # 4. Learn: the policy conservatively, the critic by regression.
        learned: list[dict[str, float]] = []
        skipped = 0
        for _ in range(cfg.epochs):
            for part in torch.randperm(len(b), generator=run.rng).chunk(cfg.minibatches):
                mini = b.select(part)
                L = mini.tokens.shape[1]
                w = weights.per_token(mini.action, rows=rows[part])
                if not bool((w > 0).any()):  # no row has a verdict: a step would only carry Adam's momentum on
                    skipped += 1
                    continue
                columns = {"advantage": advantage[part, :L], "logp_old": logp_old[part, :L]}
                acted = actor.step(actor_loss, mini, w, **columns)
                kept = {} if critic.body_trains else {"states": states[part, :L]}
                goal = {"return_": return_[part, :L], "value_old": value[part, :L]}
                valued = valuer.step(critic_loss, mini, w, **goal, **kept)
                learned.append({**acted, "loss/value_avg": valued["loss"], "critic_grad_norm": valued["grad_norm"]})

        # 5. Say what happened.
        kl = ((logp_old - logp_ref) * b.action).sum(-1)
        metrics = {
            "objective/scores": measures.mean(score.value, rows),
            "objective/kl": measures.mean(kl, rows),
            "objective/rlhf_reward": measures.mean(outcome - beta.value * kl, rows),
            "objective/entropy": float((old["entropy"] * per_token).sum()),
            "objective/kl_coefficient": beta.value,
            "loss/policy_avg": measures.average(learned, "loss"),
            **{
                name: measures.average(learned, name)
                for name in ("policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio")
            },
            "policy/approxkl_last": learned[-1]["policy/approxkl_avg"] if learned else 0.0,
            **{name: measures.average(learned, name) for name in ("loss/value_avg", "grad_norm", "critic_grad_norm")},
            "skipped_updates": float(skipped),
            "val/explained_variance": measures.explained_variance(value, return_, per_token),
            **measures.responses(b, score),
            "num_tokens_credit": float(scheme.drawn),
            **measures.sampler_difference(b, logp_old),
        }
        if gold is not None:
            truth = gold(b)
            metrics["objective/gold"] = measures.mean(truth.value, truth.verdict)
        ratio = learned[0]["val/ratio"] if learned else None
        gate.check(step, run, policy, b, logp_old, logp_ref if start is None else None, ratio)
        run.log(step, metrics, headline=("objective/scores", "objective/kl"))
        beta.update(float(kl.mean()))  # of all responses: how far they moved needs no verdict
    return policy, {}


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the reference, the reward and the prompts, train, save the policy to `model/` in the run folder."""
    start = catalog.load(cfg.model).freeze()
    task = tasks.load(cfg.task, start)
    reference = experts.reference(cfg.reference, start, task.longest + cfg.max_new_tokens)
    reward = rewards.load(cfg.reward, start)
    gold = rewards.load(cfg.gold, start) if cfg.gold else None
    # Without a reward model to start from, the critic is a value head of zeros on the start's own body.
    body = start.backbone
    critic = reward.critic(cfg.critic_train) if isinstance(reward, RewardModel) else Critic(body.twin(cfg.critic_train))
    policy, figures = train(cfg, reference, critic, reward, task, run, gold, start if cfg.reference else None)
    saved = policy.publish(run.folder / "model")
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    judged = judge.held_out(start, policy, reward, task, sampling, run, gold)
    return {**figures, **judged, **saved}
