"""Losses that imitate demonstrations or a teacher, per token and unreduced: sum them under a weight from `weights`.

A demonstration says which token was taken; a teacher says how likely every token is, in any state it is asked about, and
one compares whole distributions. With π the student and P the teacher:

    forward   KL(P ‖ π)     covers what the teacher likes (mass-covering); of demonstrations it is `nll`, up to a constant
    reverse   KL(π ‖ P)     avoids what the teacher finds unlikely (mode-seeking)
    js:β      a bounded blend of the two: of forward near β = 0, of reverse near β = 1
    tv        half the distance, bounded by 1: the chance that the best coupling of the two draws different tokens

All are at given states. Where the states are the student's own, how it moves them is left out of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tokenmdp.functional import kl

Measure = Callable[[Tensor, Tensor], Tensor]


def nll(logp: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Behaviour cloning, in language models called supervised fine-tuning: minus the log-likelihood of the
    demonstrated tokens.

        ℓ_t = −log π(a_t | s_t)

    It is `policy_loss.reinforce` with advantage 1 on every demonstrated token; summed over a response and averaged
    over demonstrations it is KL(demonstrator ‖ π) up to a constant. Zero where `logp` is (outside the action mask).

    Args:
        logp: log-probability (nats) of the demonstrated tokens under π; carries the gradient.

    Returns:
        Nats per token.

    Source: Pomerleau 1989 (ALVINN: behaviour cloning); Ouyang et al. 2022, section 3.1 (supervised fine-tuning).
    """
    return -logp


def jensen_shannon(
    logits: Float[Tensor, "*S V"], logits_teacher: Float[Tensor, "*S V"], beta: float = 0.5
) -> Float[Tensor, "*S"]:
    """The generalised Jensen-Shannon divergence: each of the two against their mixture.

        JS_β = β KL(P ‖ M) + (1 − β) KL(π ‖ M),   M = β P + (1 − β) π

    Never negative, 0 only where the two agree, and at most −β log β − (1 − β) log(1 − β) ≤ log 2 nats, even where one of
    them excludes what the other likes. JS_β(P, π) = JS_{1−β}(π, P), so it is symmetric at β = ½. It vanishes with β and
    with 1 − β; what is left over is the KL divergence itself:

        JS_β / β → KL(P ‖ π)  as β → 0,      JS_β / (1 − β) → KL(π ‖ P)  as β → 1

    Args:
        logits: the student's π, unnormalised log-probabilities over V tokens; −inf excludes a token.
        logits_teacher: the teacher's P.
        beta: the teacher's share of the mixture, strictly between 0 and 1.

    Returns:
        Nats. Differentiable in both.

    Raises:
        ValueError: β is not between 0 and 1.

    Source: Agarwal et al. 2024 (GKD), section 2, the generalised JSD; its limits: Huszár 2015.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"β is {beta}: the divergence is 0 at 0 and at 1, and its limits are the forward and the reverse KL; ask for "
            "these by name, or for a β strictly between"
        )
    ours, theirs = logits.log_softmax(-1), logits_teacher.log_softmax(-1)
    # What both exclude has no place in the mixture; the derivative of logaddexp(−inf, −inf) would be NaN.
    excluded = torch.isneginf(ours) & torch.isneginf(theirs)
    zero = torch.zeros_like(ours)
    mixture = torch.logaddexp(
        torch.where(excluded, zero, theirs) + math.log(beta), torch.where(excluded, zero, ours) + math.log1p(-beta)
    )
    mixture = torch.where(excluded, -torch.inf, mixture)
    return beta * kl.exact(theirs, mixture) + (1 - beta) * kl.exact(ours, mixture)


def total_variation(logits: Float[Tensor, "*S V"], logits_teacher: Float[Tensor, "*S V"]) -> Float[Tensor, "*S"]:
    """Half the L1 distance of the two distributions.

        TV = ½ Σ_a |π(a) − P(a)|

    In [0, 1] and symmetric; TV ≤ √(KL / 2) for the KL divergence of either direction (Pinsker's inequality).

    Args:
        logits: the student's π, unnormalised log-probabilities over V tokens; −inf excludes a token.
        logits_teacher: the teacher's P.

    Returns:
        A probability. Differentiable in both, but where the two agree on a token.

    Source: Cover & Thomas 2006, section 11.6 (Pinsker's: lemma 11.6.1); as a loss of distillation: Wen et al. 2023.
    """
    return 0.5 * (logits.softmax(-1) - logits_teacher.softmax(-1)).abs().sum(-1)


def divergence(name: str) -> Measure:
    """The divergence called `name`, as a function of the student's logits and the teacher's: [N, V], [N, V] -> [N].

    Args:
        name: `forward`, `reverse`, `tv`, `js` (β = ½) or `js:β`.

    Raises:
        ValueError: no such divergence, or a β that is not strictly between 0 and 1.
    """
    known: dict[str, Measure] = {"forward": kl.forward_exact, "reverse": kl.exact, "tv": total_variation}
    kind, colon, share = name.partition(":")
    if kind == "js":
        try:
            beta = float(share) if colon else 0.5
        except ValueError:
            beta = math.nan
        if not 0 < beta < 1:
            raise ValueError(f"divergence is {name!r}: the β of js:β lies strictly between 0 and 1, as in js:0.5")
        return lambda logits, logits_teacher: jensen_shannon(logits, logits_teacher, beta)
    if name not in known:
        raise ValueError(f"divergence is {name!r}; it must be one of {', '.join(known)} or js:β, as in js:0.5")
    return known[name]
