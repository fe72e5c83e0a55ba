"""Losses that learn a reward from judgements: pairs (which of two is better) or single labels (good or bad).

A Bradley-Terry reward is known only up to a constant a prompt, because only differences enter; `centring` picks the
constant. All losses are `[B]`, in nats, and unreduced: sum them under `weights.per_row`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def bradley_terry(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    margin: int | float | Float[Tensor, "B"] = 0.0,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "B"]:
    """Minus the log-likelihood of the preferences under a Bradley-Terry model.

        ℓ = −(1 − ε) log σ(d) − ε log σ(−d),      d = r_chosen − r_rejected − m

    With ε = 0 and m = 0 this is the usual reward-model loss. ε is the share of labels believed to be flipped: the loss
    is then least at σ(d) = 1 − ε instead of at infinity.

    Args:
        chosen, rejected: the rewards of the two responses of each pair.
        margin: m, how much better the chosen one must be, in reward units.
        label_smoothing: ε, in [0, 0.5).

    Raises:
        ValueError: when label_smoothing is outside [0, 0.5): at 0.5 the labels say nothing.

    Source: Ouyang et al. 2022, eq. 1; the margin: Touvron et al. 2023 (Llama 2), eq. 2; the smoothing: Mitchell 2023,
    "A note on DPO with noisy preferences" (there for DPO's implicit reward).
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: the share of flipped labels is at least 0 and below 0.5")
    difference = chosen - rejected - margin
    if label_smoothing == 0:
        return -F.logsigmoid(difference)
    return -(1 - label_smoothing) * F.logsigmoid(difference) - label_smoothing * F.logsigmoid(-difference)


def pointwise(score: Float[Tensor, "B"], label: Float[Tensor, "B"] | Bool[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Minus the log-likelihood of good/bad labels of single responses: logistic regression on the reward.

        ℓ = −y log σ(r) − (1 − y) log σ(−r)

    Args:
        score: r, the reward of each response: the log-odds of "good".
        label: y, True or 1 for good, False or 0 for bad; a fraction is a soft label.

    Source: Bishop 2006, eq. 4.90 (the cross-entropy error of logistic regression).
    """
    return F.softplus(score) - label.to(score.dtype) * score


def centring(chosen: Float[Tensor, "B"], rejected: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """A penalty that keeps rewards around zero without touching their differences.

        ℓ = (r_chosen + r_rejected)²

    Add it to `bradley_terry` with a small coefficient, 0.01 as a rule.

    Args:
        chosen, rejected: the rewards of the two responses of each pair.

    Returns:
        Reward units squared.

    Source: Eisenstein et al. 2023, "Helping or herding?", eq. 2.
    """
    return torch.square(chosen + rejected)
