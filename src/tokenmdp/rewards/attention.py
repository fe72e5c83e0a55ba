"""Where a reward model looks when it judges: its last layer's attention, from the last token back over the row.

    a_t = 1/heads Σ_h softmax_u( q_h(last) · k_h(u) / √d )_t,      Σ_t a_t = 1 over the row

Fast attention never writes these numbers down, so for one pass the model runs transformers' plain ("eager") attention,
which does, and is switched back afterwards. Written down they take layers · heads · L² numbers a row, so rows are taken
in parts of bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokenmdp.models.parts import micro_batches
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.types import Batch

CELLS = 1 << 25  # attention weights held at once, all layers and heads together: 128 MB of float32


@torch.no_grad()
def attention_of(reward: RewardModel, batch: Batch) -> Float[Tensor, "B L"]:
    """How much of its attention the reward model's last layer gives to each token when it reads the last one.

    Returns:
        The mean over heads: at least 0, of sum 1 over a row's tokens, its prompt included; zero in padding.

    Raises:
        ValueError: the model's layers do not say what they attended to.
    """
    config = reward.backbone.model.config
    a_row = batch.length.square() * int(config.num_hidden_layers) * int(config.num_attention_heads)
    out = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
    with _eager(reward):
        for rows in micro_batches(a_row, CELLS):
            part = batch.select(rows)
            with reward.backbone.autocast():
                seen = reward.backbone.body(input_ids=part.tokens, use_cache=False, output_attentions=True).attentions
            if not seen or seen[-1] is None:
                raise ValueError(
                    f"{type(reward.backbone.body).__name__} does not return its attention weights, so they cannot assign "
                    "credit: use another scheme, or a reward model with ordinary attention"
                )
            final = seen[-1][torch.arange(len(part)), :, part.length - 1].float().mean(dim=1)
            out[rows, : final.shape[1]] = torch.where(part.real, final, torch.zeros_like(final))
    return out


@contextmanager
def _eager(reward: RewardModel) -> Iterator[None]:
    """While this lasts the model computes its attention weights; afterwards it is as it was."""
    body: Any = reward.backbone.body
    before = body.config._attn_implementation
    body.set_attn_implementation("eager")
    try:
        yield
    finally:
        body.set_attn_implementation(before)
