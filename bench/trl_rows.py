"""Every loss that tokenmdp and TRL both have: the two sides of each, and the tensors they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import trl_losses as trl
from tokenmdp.functional import kl, policy_loss, preference, returns, weights

PAIRS, LENGTH, SAMPLES, VOCABULARY = 6, 12, 4, 11


@dataclass(frozen=True)
class Draw:
    """Random rows, ragged and token-aligned; the first half are the chosen responses of pairs, the second the rejected.

    Attributes:
        action, real: [2P, L] masks.
        logp: [2P, L] log-probabilities of the policy: what is differentiated.
        old, ref, other: [2P, L] log-probabilities of other policies; `other` is of mismatched responses.
        score: [2P] scores, and what reward models say: differentiated there.
        label: [2P] good or bad.
        group: [2P] four neighbours are samples of one prompt.
        logits: [2P, L, V] and tokens [2P, L], for losses that read logits.
    """

    action: Tensor
    real: Tensor
    logp: Tensor
    old: Tensor
    ref: Tensor
    other: Tensor
    score: Tensor
    label: Tensor
    group: Tensor
    logits: Tensor
    tokens: Tensor

    @staticmethod
    def make(seed: int) -> Draw:
        rng = torch.Generator().manual_seed(seed)
        rows = 2 * PAIRS
        length = torch.randint(4, LENGTH + 1, (rows, 1), generator=rng)
        at = torch.arange(LENGTH)
        action = (at >= 1) & (at < length)

        def tokens(scale: float, around: Tensor | None = None) -> Tensor:
            noise = scale * torch.randn((rows, LENGTH), generator=rng)
            return torch.where(action, -noise.abs() - 0.01 if around is None else around + noise, 0.0)

        logp = tokens(1.5)
        return Draw(
            action=action,
            real=at < length,
            logp=logp,
            old=tokens(0.3, logp),
            ref=tokens(0.5, logp),
            other=tokens(1.5),
            score=torch.randn(rows, generator=rng),
            label=torch.rand(rows, generator=rng) < 0.5,
            group=torch.arange(rows) // SAMPLES,
            logits=torch.randn((rows, LENGTH, VOCABULARY), generator=rng),
            tokens=torch.randint(VOCABULARY, (rows, LENGTH), generator=rng),
        )

    @property
    def length(self) -> Tensor:
        return self.action.sum(1)

    def spread(self, x: Tensor) -> Tensor:
        """A number a row, on each of its actions."""
        return torch.where(self.action, x[:, None], 0.0)


Side = Callable[[Draw, Tensor], Tensor]
"""A number, or one a row, from a draw and the tensor of it that is differentiated."""


@dataclass(frozen=True)
class Row:
    """One loss, both sides.

    Attributes:
        name: what it is.
        peer: TRL's method.
        ours, theirs: the two sides.
        of: the tensor of the draw that is differentiated.
        gradient_only: values differ by what has no gradient.
        no_gradient: a number that is never differentiated.
        why: for a difference on purpose, its reason; empty for a row that has to agree.
    """

    name: str
    peer: str
    ours: Side
    theirs: Side
    of: str = "logp"
    gradient_only: bool = False
    no_gradient: bool = False
    why: str = ""


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2)
    return first, second


def paired(loss: Callable[..., Tensor], **settings: float) -> Side:
    """The mean over pairs of a loss with a reference."""
    return lambda d, logp: loss(*halves(logp.sum(1)), *halves(d.ref.sum(1)), **settings).mean()


def free(loss: Callable[..., Tensor], **settings: float) -> Side:
    """The mean over pairs of a loss without one."""
    return lambda d, logp: loss(*halves(logp.sum(1)), *halves(d.length), **settings).mean()


def weighed(weigh: Callable[[Draw], Tensor], token_loss: Callable[[Draw, Tensor], Tensor]) -> Side:
    """Σ weight · loss."""
    return lambda d, logp: (weigh(d) * token_loss(d, logp)).sum()


def clipped(d: Draw, logp: Tensor) -> Tensor:
    return policy_loss.ppo_clip(logp, d.old, d.spread(d.score), 0.2, 0.28)[0]


def per_token(d: Draw) -> Tensor:
    return weights.per_token(d.action)


def per_sequence(d: Draw) -> Tensor:
    return weights.per_sequence(d.action)


def per_slot(d: Draw) -> Tensor:
    return weights.per_slot(d.action, LENGTH - 1)


def cloned(d: Draw, logits: Tensor) -> Tensor:
    """ORPO from logits: the one shift of a language model, then the log-probabilities of whole responses."""
    chosen = torch.nn.functional.pad(logits[:, :-1].log_softmax(-1).gather(2, d.tokens[:, 1:, None]).squeeze(2), (1, 0))
    return free(preference.orpo, beta=0.1)(d, torch.where(d.action, chosen, 0.0))


def in_two_parts(d: Draw, logp: Tensor, loss: str) -> Tensor:
    """TRL's loss accumulated over two micro-batches."""
    total = int(d.action.sum())
    parts = [slice(None, PAIRS), slice(PAIRS, None)]
    settings: dict[str, Any] = {"loss": loss, "clip_high": 0.28, "accumulate": 2, "tokens": total}
    return torch.stack([trl.grpo(logp[p], d.action[p], d.old[p], d.score[p], **settings) for p in parts]).sum()


def rows() -> list[Row]:
    """Every loss that both have."""

    def grpo(loss: str, **settings: Any) -> Side:
        settings = {"clip_high": 0.28, "horizon": LENGTH - 1, **settings}
        return lambda d, logp: trl.grpo(
            logp, d.action, d.old, d.score, loss, logp_ref=d.ref if settings.get("kl") else None, **settings
        )

    def centred(d: Draw, score: Tensor) -> Tensor:
        return returns.centred(score, d.group)

    def grouped(d: Draw, score: Tensor, scale: str | None, **more: Any) -> Tensor:
        return trl.advantages(score, SAMPLES, scale, d.action, **more)

    def penalised(d: Draw, score: Tensor) -> Tensor:
        return score - 0.1 * kl.reverse_k1(d.logp, d.ref).sum(1)

    def missing(score: Tensor) -> tuple[Tensor, Tensor]:
        """The same scores, the first of which is no verdict."""
        judged = torch.arange(len(score)) != 0
        return torch.where(judged, score, torch.nan), judged

    dpo, robust = "DPOTrainer, loss_type", "DPOTrainer, loss_type robust"
    group, reward = "GRPOTrainer", "RewardTrainer"
    score = {"of": "score", "no_gradient": True}
    return [
        Row(
            "DPO",
            f"{dpo} sigmoid",
            paired(preference.dpo, beta=0.1),
            lambda d, x: trl.dpo(x, d.action, d.ref.sum(1), "sigmoid", 0.1),
        ),
        Row(
            "conservative DPO, label smoothing 0.1",
            "CPOTrainer.cpo_loss, sigmoid, of log-ratios",
            paired(preference.dpo, beta=0.1, label_smoothing=0.1),
            lambda d, x: trl.cpo(*halves(x.sum(1) - d.ref.sum(1)), "sigmoid", 0.1, 0.1).mean(),
        ),
        Row(
            "robust DPO, label smoothing 0.1",
            robust,
            paired(preference.robust_dpo, beta=0.1, label_smoothing=0.1),
            lambda d, x: trl.dpo(x, d.action, d.ref.sum(1), "robust", 0.1, 0.1),
        ),
        Row(
            "IPO, log-probabilities summed",
            "CPOTrainer.cpo_loss, ipo, of log-ratios",
            paired(preference.ipo, beta=0.1),
            lambda d, x: trl.cpo(*halves(x.sum(1) - d.ref.sum(1)), "ipo", 0.1).mean(),
        ),
        Row(
            "IPO, log-probabilities averaged",
            f"{dpo} ipo",
            lambda d, x: preference.ipo(
                *halves(x.sum(1) / d.length), *halves(d.ref.sum(1) / d.length), beta=0.1
            ).mean(),
            lambda d, x: trl.dpo(x, d.action, d.ref.sum(1), "ipo", 0.1),
        ),
        Row(
            "SimPO",
            "CPOTrainer.cpo_loss, simpo",
            free(preference.simpo, beta=2.0, margin=1.0),
            lambda d, x: trl.cpo(*halves(x.sum(1) / d.length), "simpo", 2.0, gamma=1.0).mean(),
        ),
        Row(
            "ORPO, the odds",
            "ORPOTrainer.odds_ratio_loss",
            lambda d, x: (
                preference.orpo(*halves(x.sum(1)), *halves(d.length), beta=0.1) + halves(x.sum(1) / d.length)[0]
            ).mean(),
            lambda d, x: trl.orpo_odds(*halves(x.sum(1) / d.length), 0.1).mean(),
        ),
        Row(
            "KTO, with its reference point",
            "KTOTrainer, loss_type kto",
            lambda d, x: preference.kto(
                x.sum(1),
                d.ref.sum(1),
                d.label,
                preference.kto_reference(d.other.sum(1), d.ref.sum(1) - 3),
                beta=0.1,
                desirable=1.0,
                undesirable=1.3,
            ).mean(),
            lambda d, x: trl.kto(x, d.action, d.ref.sum(1), d.label, d.other, d.ref.sum(1) - 3, 0.1, 1.0, 1.3),
        ),
        Row(
            "Bradley-Terry",
            reward,
            lambda d, x: preference.bradley_terry(*halves(x)).mean(),
            lambda d, x: trl.reward(*halves(x), None, None),
            of="score",
        ),
        Row(
            "Bradley-Terry with margin and centring",
            reward,
            lambda d, x: (
                preference.bradley_terry(*halves(x), d.ref.sum(1)[:PAIRS].abs())
                + 0.01 * preference.centring(*halves(x))
            ).mean(),
            lambda d, x: trl.reward(*halves(x), d.ref.sum(1)[:PAIRS].abs(), 0.01),
            of="score",
        ),
        Row(
            "PPO's clip, an advantage a token",
            f"{group}, loss_type bnpo",
            weighed(per_token, lambda d, x: policy_loss.ppo_clip(x, d.old, d.other + 2, 0.2, 0.28)[0]),
            lambda d, x: trl.grpo(x, d.action, d.old, (d.other + 2)[:, 1:], "bnpo", clip_high=0.28),
        ),
        Row("GRPO: clip, per sequence", f"{group}, loss_type grpo", weighed(per_sequence, clipped), grpo("grpo")),
        Row("clip, per token", f"{group}, loss_type bnpo", weighed(per_token, clipped), grpo("bnpo")),
        Row("DAPO: clip, per token", f"{group}, loss_type dapo", weighed(per_token, clipped), grpo("dapo")),
        Row("Dr. GRPO: clip, per slot", f"{group}, loss_type dr_grpo", weighed(per_slot, clipped), grpo("dr_grpo")),
        Row(
            "GRPO with k3 in the loss",
            f"{group}, beta 0.04",
            weighed(per_sequence, lambda d, x: clipped(d, x) + 0.04 * kl.reverse_k3(x, d.ref)),
            grpo("grpo", kl=0.04),
        ),
        Row(
            "GSPO",
            f"{group}, importance_sampling_level sequence",
            weighed(per_sequence, lambda d, x: policy_loss.gspo(x, d.old, d.spread(d.score), d.action, 0.02, 0.03)[0]),
            grpo("grpo", level="sequence", clip=0.02, clip_high=0.03),
        ),
        Row(
            "CISPO, upper bound 1.2",
            f"{group}, loss_type cispo, epsilon_high 1.2",
            weighed(per_token, lambda d, x: policy_loss.cispo(x, d.old, d.spread(d.score), None, 0.2)[0]),
            grpo("cispo", clip_high=1.2),
        ),
        Row(
            "RLOO, on its own samples",
            "RLOOTrainer",
            # Ours divides by the horizon too, a constant.
            lambda d, x: (LENGTH - 1) * (per_slot(d) * policy_loss.reinforce(x, d.spread(d.score))).sum(),
            lambda d, x: trl.rloo(x, d.action, d.logp, d.score),
            gradient_only=True,
        ),
        Row(
            "RLOO's advantages, one row without a verdict",
            "RLOOTrainer",
            lambda d, x: returns.leave_one_out(torch.nan_to_num(missing(x)[0]), d.group, missing(x)[1]),
            lambda d, x: grouped(d, missing(x)[0], None),
            **score,
        ),
        Row(
            "RLOO's advantages with k1 in the reward",
            "RLOOTrainer, beta 0.1",
            lambda d, x: returns.leave_one_out(penalised(d, x), d.group),
            lambda d, x: grouped(d, x, None, logp=d.logp, logp_ref=d.ref, kl=0.1),
            **score,
        ),
        Row(
            "Dr. GRPO's advantages",
            f"{group}, scale_rewards none",
            centred,
            lambda d, x: grouped(d, x, "none"),
            **score,
        ),
        # -- on purpose
        Row(
            "IPO in recipes.dpo",
            f"{dpo} ipo",
            paired(preference.ipo, beta=0.1),
            lambda d, x: trl.dpo(x, d.action, d.ref.sum(1), "ipo", 0.1),
            why="the recipe sums log-probabilities over tokens, as the paper's eq. 17 does; TRL averages them",
        ),
        Row(
            "ORPO, the whole loss",
            "ORPOTrainer.get_batch_loss_metrics",
            cloned,
            lambda d, x: trl.orpo(x, d.tokens, d.action, d.real, 0.1),
            of="logits",
            why="ours clones the response and counts each response the same (the paper's eq. 3); TRL's clones the prompt "
            "too, and counts each token of the micro-batch the same",
        ),
        Row(
            "per token, in two micro-batches",
            f"{group}, loss_type bnpo, 2 accumulation steps",
            weighed(per_token, clipped),
            lambda d, x: in_two_parts(d, x, "bnpo"),
            why="TRL averages each micro-batch by itself, so where rows differ in length the gradient depends on how the "
            "batch is cut; our weights are made once, over the whole batch (its loss_type dapo does so too)",
        ),
        Row(
            "GRPO's advantages",
            f"{group}, scale_rewards group",
            lambda d, x: returns.scaled(centred(d, x), returns.spread(x, d.group)),
            lambda d, x: grouped(d, x, "group"),
            **score,
            why="TRL adds 1e-4 to the standard deviation; ours adds nothing and gives a group that does not vary 0",
        ),
    ]


ABSENT = {
    "PPO's value clip and GAE": "TRL has removed its PPOTrainer; ours are held to enumeration in the tests",
}
