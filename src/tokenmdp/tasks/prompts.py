"""Prompts from a user's file or hub data set, some of them held out."""

from __future__ import annotations

from pathlib import Path

import torch

from tokenmdp.models.policy import Policy
from tokenmdp.tasks import Task, data, files


def load(policy: Policy, source: str | Path, split: str = "train", held_out: float = 0.1, seed: int = 0) -> Task:
    """The prompts of `source`, split at random by `seed`; a prompt that occurs twice stays on one side.

    Args:
        source: a file, a folder or a hub id (see `files.rows`).
        split: of a folder or a hub data set.
        held_out: share of the different prompts that is held out; 0 keeps all to learn on.

    Raises:
        ValueError: a share outside [0, 1), or what `files.rows` and `data.prompts` raise.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}; it is a share, at least 0 and below 1")
    found = data.prompts(files.rows(source, split), policy)
    distinct = list(dict.fromkeys(p.ids for p in found))
    count = min(round(held_out * len(distinct)), len(distinct) - 1)
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = {distinct[i] for i in order[:count]}
    return Task(
        name=Path(source).name,
        train=tuple(p for p in found if p.ids not in kept),
        held_out=tuple(p for p in found if p.ids in kept),
    )
