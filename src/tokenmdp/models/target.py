"""A copy that follows what trains: the target network of value-based RL, or the stale policy that draws the samples.

    θ̄ ← θ̄ + ρ (θ − θ̄)

Source: Polyak & Juditsky 1992; for target networks Lillicrap et al. 2016 (DDPG), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Named(Protocol):
    """What has weights that train, by name: a policy, a critic, heads."""

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class Target:
    """The weights of `copy`, which follow those of `source`; give it to `Run.steps`, it is part of the state.

    Args:
        copy: what follows; its weights that train must be those of the source, by name and shape. Nothing else trains
            it.
        source: what an optimiser trains.

    Raises:
        ValueError: the two differ in a name or a shape.
    """

    def __init__(self, copy: Named, source: Named) -> None:
        self.copy, self.source = dict(copy.trained()), dict(source.trained())
        shapes = [{n: tuple(p.shape) for n, p in side.items()} for side in (self.copy, self.source)]
        if shapes[0] != shapes[1]:
            odd = sorted(n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
            raise ValueError(f"a copy must have the weights of what it follows; {', '.join(odd[:3])} differ")
        self.follow(1.0)

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Move towards the source; a rate of 1 makes the two equal.

        Raises:
            ValueError: the rate is outside (0, 1].
        """
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"rate={rate}, but it is the share of the way to go: above 0, at most 1")
        for name, weight in self.copy.items():
            weight.lerp_(self.source[name].detach(), rate)

    def tensors(self) -> dict[str, Tensor]:
        """The copy's weights."""
        return {name: weight.detach() for name, weight in self.copy.items()}

    def scalars(self) -> dict[str, Any]:
        """Nothing besides."""
        return {}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Put the weights back."""
        for name, weight in self.copy.items():
            weight.copy_(tensors[name])
