"""Many processes that act as one: sums over all of them, and each one's share of the rows.

The first law of this library (a loss is unreduced, a reduction is a weight over the *global* batch) leaves two things
for a process to ask: how many rows, tokens or units of weight there are in all (`world.sum`), and which rows are its
own (`world.shard`). With one process both are the identity, and nothing here touches torch.distributed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

Row = TypeVar("Row")


class World:
    """All processes of this run, seen from one of them."""

    def join(self) -> None:
        """Meet the other processes that `torchrun` started (gloo on a CPU, nccl on GPUs); alone, do nothing.

        Raises:
            RuntimeError: torchrun's environment is there but torch was built without torch.distributed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or self._met:
            return
        if not dist.is_available():
            raise RuntimeError("WORLD_SIZE is set, but this build of torch has no torch.distributed: run one process")
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    @property
    def _met(self) -> bool:
        return dist.is_available() and dist.is_initialized()

    @property
    def size(self) -> int:
        """How many processes there are."""
        return dist.get_world_size() if self._met else 1

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""
        return dist.get_rank() if self._met else 0

    def sum(self, x: Tensor) -> Tensor:
        """Make `x` the elementwise sum of every process's `x`, the same on all, and give it back.

        Every process must call it, with the same shape and dtype. No gradient flows through it: it sums counts, weights
        and gradients, and the loss of a row is the business of the process that holds the row.
        """
        if self.size > 1:
            with torch.no_grad():
                total = x.contiguous()  # x itself, as a rule
                dist.all_reduce(total)
                if total is not x:
                    x.copy_(total)
        return x

    @overload
    def shard(self, rows: Tensor) -> Tensor: ...
    @overload
    def shard(self, rows: Sequence[Row]) -> Sequence[Row]: ...
    def shard(self, rows: Any) -> Any:
        """This process's rows: consecutive, so that the samples of one prompt stay together where they can.

        The shares of all processes, in the order of their ranks, are the rows again; they differ by at most one row.
        """
        start, stop = (len(rows) * r // self.size for r in (self.rank, self.rank + 1))
        return rows[start:stop]


world = World()
