"""Credit assignment: from one score a response to a reward a token.

A scheme here is a function `(score [B], action [B, L], ...) -> reward [B, L]` that conserves the score: the rewards of
a row sum to it, so at γ = 1 every scheme has the same objective, and only the learning differs.

A scheme is *causal* if the reward of a token depends on nothing that comes after it. With a causal scheme the return
to go from a token is all that the token caused, and policy gradients built on it (`returns.discounted`, `returns.gae`)
are unbiased. With one that is not causal, earlier tokens are paid for what later ones decide, the return to go leaves
that part out, and those gradients are biased, at λ = 1 too, in exchange for less variance. Each scheme says which it
is; the tests measure it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def last(score: Float[Tensor, "B"], action: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """The whole score on the last token the policy chose: when the outcome is known.

        r_t = score · 1[t is the row's last action],      Σ_t r_t = score

    Causal.

    Args:
        score: one outcome a row; 0 for a row without a verdict.
        action: which tokens the policy chose.

    Returns:
        Reward units; zero outside the mask.

    Raises:
        ValueError: when a row has a score but no action to carry it.

    Source: Ziegler et al. 2019, eq. 2; Stiennon et al. 2020, section 3.4.
    """
    _carriers(score, action)
    remaining = action.flip(1).cumsum(dim=1).flip(1)
    score = score[:, None].expand(action.shape)
    return torch.where(action & (remaining == 1), score, torch.zeros_like(score))


def uniform(score: Float[Tensor, "B"], action: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """The score in equal parts on every token the policy chose: the scheme every other must beat.

        r_t = score / |o|  on actions,      Σ_t r_t = score

    Not causal: what the first token is paid depends on the last.

    Args:
        score: one outcome a row; 0 for a row without a verdict.
        action: which tokens the policy chose.

    Returns:
        Reward units; zero outside the mask.

    Raises:
        ValueError: when a row has a score but no action to carry it.
    """
    _carriers(score, action)
    part = (score / action.sum(dim=1).clamp(min=1))[:, None].expand(action.shape)
    return torch.where(action, part, torch.zeros_like(part))


def _carriers(score: Tensor, action: Tensor) -> None:
    lost = (score != 0) & ~action.any(dim=1)
    if bool(lost.any()):
        row = int(lost.nonzero()[0])
        raise ValueError(
            f"row {row} has a score of {float(score[row]):g} and not one action token to carry it: "
            "drop the row, or mark it as without a verdict and give it the score 0"
        )
