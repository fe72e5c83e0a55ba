"""Temperature, top-k, top-p: one draw a row, and its exact log-probability under the distribution really sampled.

    q(v) ∝ exp(z_v / T) · 1[v in the kept set],   a = min{v : Σ_{u ≤ v} q(u) > U},   U ~ Uniform[0, 1)

The draw inverts the cumulative distribution with one uniform number a row, so it costs one pass over the logits instead
of one random number per vocabulary entry, and a row's tokens depend on its own uniforms alone: not on which rows share
its batch. The sum runs over blocks first and inside one block after, which keeps float32 rounding near 1e-6 for any
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Raises:
        ValueError: naming the value and its range, for a temperature below 0, a top_p outside (0, 1], a negative top_k
            or no new token.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0  # 0 takes the most likely token; its log-probability is then 0
    top_p: float = 1.0  # nucleus mass kept
    top_k: int = 0  # most likely tokens kept; 0 keeps all
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; a response needs room for at least 1 token")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it is a probability mass in (0, 1]; 1 keeps everything")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it counts tokens kept; 0 keeps everything")


def _kept(weight: Tensor, sampling: Sampling) -> Tensor:
    """Unnormalised probabilities with everything outside top-k and the nucleus set to zero (Holtzman et al. 2020,
    eq. 3).
    """
    if sampling.top_k and sampling.top_k < weight.shape[-1]:
        top = weight.topk(sampling.top_k, dim=-1)
        weight = torch.zeros_like(weight).scatter_(-1, top.indices, top.values)
    if sampling.top_p < 1:
        ordered, index = weight.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass above each token: the first is always kept
        ordered = torch.where(
            before < sampling.top_p * ordered.sum(-1, keepdim=True), ordered, torch.zeros_like(ordered)
        )
        weight = torch.zeros_like(weight).scatter_(-1, index, ordered)
    return weight


def draw(
    logits: Float[Tensor, "B V"], uniform: Float[Tensor, "B"], sampling: Sampling
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """One token a row and its log-probability (nats) under the truncated, tempered distribution it was drawn from.

    Raises:
        FloatingPointError: a row of logits holds NaN or +inf, or nothing finite.
    """
    top = logits.amax(dim=-1, keepdim=True)  # without indices: a tenth of the time of max
    if not bool(torch.isfinite(top).all()):
        raise FloatingPointError(
            "the model's logits are not finite, nothing can be sampled from them: the weights have diverged or the compute "
            "type overflows; go back to an earlier checkpoint, lower the learning rate or use compute=float32"
        )
    if sampling.temperature == 0:
        return logits.argmax(dim=-1), torch.zeros_like(top[:, 0])
    weight = logits - top
    if sampling.temperature != 1:
        weight = weight.div_(sampling.temperature)
    weight = _kept(weight.exp_(), sampling)

    rows, V = weight.shape
    whole = weight if V % _BLOCK == 0 else torch.nn.functional.pad(weight, (0, -V % _BLOCK))  # pad by 0 would copy
    blocks = whole.view(rows, -1, _BLOCK)
    mass = blocks.sum(-1).double().cumsum(-1)
    target = uniform.double() * mass[:, -1]
    block = _first_above(mass, target)
    rest = target - torch.where(
        block > 0, mass.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], torch.zeros_like(target)
    )
    inside = blocks[torch.arange(rows, device=weight.device), block].double().cumsum(-1)
    token = block * _BLOCK + _first_above(inside, rest)
    logp = weight.gather(1, token[:, None])[:, 0].log() - mass[:, -1].log().to(weight.dtype)
    return token, logp


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index of the first entry that exceeds the target; rounding never lands on an entry of no mass."""
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    # The last entry with mass is where the cumulative sum first reaches its final value.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]
    return torch.minimum(found, last)
