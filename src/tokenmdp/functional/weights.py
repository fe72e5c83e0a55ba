"""Reductions. A loss says how bad each token is; a weight says how much that token counts.

Every loss in this library is unreduced, `[B, L]` per token or `[B]` per row, and the number that is minimised is
`(weight * loss).sum()`. The weights are made here, once an optimiser step, from the action mask of the *whole* batch.
Cutting the batch afterwards cuts a sum, so the micro-batch size cannot change the gradient. Averages taken micro-batch by
micro-batch do change it when rows differ in length.

Which tokens count alike is a choice that has names in the literature:

    per_token     every token of the batch counts the same: a long response counts more
    per_sequence  every response counts the same: a token of a long response counts less
    per_slot      every token counts the same, and the divisor does not depend on the lengths that were sampled

All three take `rows`, which rows have a verdict (the others get weight 0 and leave the normaliser), and `total`, the
normaliser of the whole batch for a caller that holds only a part of it. Where nothing counts, all weights are 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def per_token(
    action: Bool[Tensor, "B L"],
    rows: Bool[Tensor, "B"] | None = None,
    total: int | float | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "B L"]:
    """Weights under which every action token counts the same.

        w[b, t] = 1 / N  on actions, 0 elsewhere;   N = number of action tokens in the whole batch

    Args:
        action: which tokens the policy chose.
        rows: which rows have a verdict; None for all.
        total: N, where `action` is only a part of the batch.
        dtype: of the weights; None for torch's default. Give float64 with a float64 loss.

    Raises:
        ValueError: when `total` is smaller than the number of tokens counted here.

    Source: Yu et al. 2025 (DAPO), eq. 8, the normaliser 1 / sum_i |o_i|.
    """
    counted = _counted(action, rows)
    return _spread(counted, _normaliser(counted.sum(), total, "action tokens"), dtype)


def per_sequence(
    action: Bool[Tensor, "B L"],
    rows: Bool[Tensor, "B"] | None = None,
    total: int | float | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "B L"]:
    """Weights under which every response counts the same, its tokens sharing its part equally.

        w[b, t] = 1 / (N |o_b|)  on actions, 0 elsewhere;   N = number of responses, |o_b| = action tokens of row b

    A row without any action token has nothing to share and is not counted in N.

    Args:
        action: which tokens the policy chose.
        rows: which rows have a verdict; None for all.
        total: N, where `action` is only a part of the batch.
        dtype: of the weights; None for torch's default.

    Raises:
        ValueError: when `total` is smaller than the number of responses counted here.

    Source: Shao et al. 2024 (GRPO), eq. 3, the normaliser 1/G sum_i 1/|o_i|.
    """
    counted = _counted(action, rows)
    length = counted.sum(dim=1, keepdim=True)
    return _spread(counted, length * _normaliser((length > 0).sum(), total, "responses"), dtype)


def per_slot(
    action: Bool[Tensor, "B L"],
    slots: int,
    rows: Bool[Tensor, "B"] | None = None,
    total: int | float | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "B L"]:
    """Weights that divide by a fixed number of slots a response, used or not.

        w[b, t] = 1 / (N M)  on actions, 0 elsewhere;   N = number of responses, M = slots

    The divisor does not depend on what was sampled, so the weighted policy gradient stays an unbiased estimate of the
    gradient of the score (up to the constant M), which neither `per_token` nor `per_sequence` can say.

    Args:
        action: which tokens the policy chose.
        slots: M, a constant of the run: usually the horizon.
        rows: which rows have a verdict; None for all.
        total: N, where `action` is only a part of the batch.
        dtype: of the weights; None for torch's default.

    Raises:
        ValueError: when `slots` is not positive, or `total` is smaller than the number of responses counted here.

    Source: Liu et al. 2025 (Dr. GRPO), figure 1 and section 3.2: the length term replaced by a constant.
    """
    if slots < 1:
        raise ValueError(
            f"slots={slots}, but a response has at least one: give the horizon, or another positive constant"
        )
    counted = _counted(action, rows)
    responses = counted.any(dim=1).sum()
    return _spread(counted, slots * _normaliser(responses, total, "responses"), dtype)


def per_row(
    rows: int | Bool[Tensor, "B"], total: int | float | Tensor | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "B"]:
    """Weights for losses of one number a row, such as those of preference pairs: their plain average.

        w[b] = 1 / N  on rows that count, 0 elsewhere;   N = number of rows that count in the whole batch

    Args:
        rows: how many rows there are, all of them counting, or which rows count.
        total: N, where `rows` is only a part of the batch.
        dtype: of the weights; None for torch's default.

    Raises:
        ValueError: when `total` is smaller than the number of rows counted here.
    """
    counted = torch.ones(rows, dtype=torch.bool) if isinstance(rows, int) else rows
    return _spread(counted, _normaliser(counted.sum(), total, "rows"), dtype)


def _counted(action: Tensor, rows: Tensor | None) -> Tensor:
    return action if rows is None else action & rows[:, None]


def _normaliser(here: Tensor, total: int | float | Tensor | None, what: str) -> Tensor:
    if total is None:
        return here
    if float(total) < float(here):
        raise ValueError(
            f"total={float(total):g} {what}, but {int(here)} are counted in this part alone: "
            "`total` must count the whole batch, over all its parts"
        )
    return torch.as_tensor(total, device=here.device)


def _spread(counted: Tensor, divisor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """1 / divisor where counted, 0 elsewhere; a divisor of 0 (an empty row, an empty batch) is never divided by."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    safe = torch.where(divisor > 0, divisor, torch.ones_like(divisor)).to(dtype)
    share = safe.reciprocal().expand(counted.shape)
    return torch.where(counted, share, torch.zeros_like(share))
