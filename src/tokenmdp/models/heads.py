"""Heads on a body: the critic's value.

A critic is a body and one linear map: V(s_t) = w · h_{t−1} + b, where h_{t−1} is the body's state after reading
s_t = tokens[:t]. Started from a reward model it is that reward model read at every prefix: V(s_t) = r(s_t) before the
first update.

A head reads either the last state or the mean of the states so far (`pooled`). The last state of a language model is
made for the next token; with few labels and a body that hardly trains, the mean says more about the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenmdp.models.backbone import Backbone
from tokenmdp.types import Batch

POOLS = ("last", "mean")


def pooled(hidden: Float[Tensor, "B L D"], pool: str) -> Float[Tensor, "B L D"]:
    """What a head reads after token t: the state h_t (`last`), or the mean of h_0 … h_t (`mean`).

    Raises:
        ValueError: another pool.
    """
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; it must be one of {', '.join(POOLS)}")
    hidden = hidden.float() if hidden.dtype in (torch.bfloat16, torch.float16) else hidden
    if pool == "last":
        return hidden
    count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)
    return hidden.cumsum(1) / count[:, None]


class Critic:
    """Values of the states in which a batch's actions were taken.

    Attributes:
        backbone: the body; with train spec `head` it does not train and its states can be computed once a batch.
        head: [1, D] weight and bias, in float32.
        pool: what the head reads, as the reward model it starts from.
    """

    def __init__(
        self, backbone: Backbone, weight: Float[Tensor, "D"] | None = None, bias: float = 0.0, pool: str = "last"
    ) -> None:
        self.backbone, self.pool = backbone, pool
        width = int(backbone.model.config.hidden_size)
        self.head = nn.Linear(width, 1).to(backbone.device)
        with torch.no_grad():
            self.head.weight.copy_(torch.zeros(1, width) if weight is None else weight.reshape(1, width))
            self.head.bias.fill_(bias)

    @property
    def body_trains(self) -> bool:
        """False when the body's states may be computed once and reused for every update of the head."""
        return self.backbone.train_spec not in ("head", "none")

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The head's weights, and the body's where they train."""
        yield from self.backbone.trained()
        yield from (("value_" + n, p) for n, p in self.head.named_parameters())

    def states(self, batch: Batch) -> Float[Tensor, "B L D"]:
        """What the head reads, aligned with the state *before* each token: `states[b, t]` has read `tokens[b, :t]`."""
        hidden = pooled(self.backbone.hidden(batch.tokens, batch.read), self.pool)
        return torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)

    def value(self, states: Float[Tensor, "B L D"], batch: Batch) -> Float[Tensor, "B L"]:
        """V(s_t) at every action position, zero elsewhere, from the body's states."""
        value = self.head(states)[..., 0]
        return torch.where(batch.action, value, torch.zeros_like(value))
