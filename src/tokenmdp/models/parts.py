"""Cutting a batch into parts of bounded memory, and laying the parts' results back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tokenmdp.types import Batch

FORWARD_TOKENS = 8192  # padded positions in one pass without gradient


def micro_batches(cost: Tensor, budget: int) -> Iterator[Tensor]:
    """Rows in parts of at most `budget` padded positions (a longer row is a part alone), sorted by cost so that
    little is padding.
    """
    order = torch.argsort(cost, descending=True, stable=True)
    start = 0
    while start < len(order):
        count = max(1, budget // max(1, int(cost[order[start]])))
        yield order[start : start + count]
        start += count


def cut(value: Tensor, rows: Tensor, part: Any) -> Tensor:
    """The rows of an array that belong to a part; token-aligned arrays are cut to the part's length too."""
    picked = value[rows]
    tokens = getattr(part, "tokens", None)
    return picked[:, : tokens.shape[1]] if tokens is not None and picked.ndim > 1 else picked


@torch.no_grad()
def in_parts(
    function: Callable[[Batch], dict[str, Tensor]], batch: Batch, tokens: int = FORWARD_TOKENS
) -> dict[str, Tensor]:
    """Token-aligned results of `function` over the whole batch, computed without gradient a part at a time."""
    out: dict[str, Tensor] = {}
    for rows in micro_batches(batch.cost, tokens):
        part = batch.select(rows)
        for name, value in function(part).items():
            if name not in out:
                shape = (len(batch), batch.tokens.shape[1], *value.shape[2:]) if value.ndim > 1 else (len(batch),)
                out[name] = torch.zeros(shape, dtype=value.dtype, device=value.device)
            if value.ndim > 1:
                out[name][rows, : value.shape[1]] = value
            else:
                out[name][rows] = value
    return out
