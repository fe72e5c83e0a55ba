"""Prompts from a user's file or hub data set, some of them held out; where all rows have answers, these are demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenmdp.models.policy import Policy
from tokenmdp.tasks import Task, data, files, once
from tokenmdp.types import Batch


def load(policy: Policy, source: str | Path, split: str = "train", held_out: float = 0.1, seed: int = 0) -> Task:
    """The prompts of `source`, split at random by `seed`; a prompt that occurs twice stays on one side, and one that is
    held out is there once with each answer.

    Args:
        source: a file, a folder or a hub id (see `files.rows`).
        split: of a folder or a hub data set.
        held_out: share of the different prompts that is held out; 0 keeps all to learn on.

    Raises:
        ValueError: a share outside [0, 1), or what `files.rows` and `data.prompts` raise.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}; it is a share, at least 0 and below 1")
    rows = files.rows(source, split)
    found = data.prompts(rows, policy)
    distinct = list(dict.fromkeys(p.ids for p in found))
    count = min(round(held_out * len(distinct)), len(distinct) - 1)
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = {distinct[i] for i in order[:count]}
    asked = [p for p in found if p.ids in kept]
    different = tuple(once(asked, lambda p: (p.ids, repr(p.columns.get("answer")))))
    return Task(
        name=Path(source).name,
        train=tuple(p for p in found if p.ids not in kept),
        held_out=different,
        demonstrations=_demonstrations([row for row, p in zip(rows, found, strict=True) if p.ids not in kept], policy),
        facts={"dropped_as_repeated": len(asked) - len(different)},
    )


def _demonstrations(rows: Sequence[Mapping[str, Any]], policy: Policy) -> Batch | None:
    """What the rows that are learned on show, if they all do; a reward's `answer` is none, and needs none."""
    if not all({"prompt", "completion"} <= row.keys() or "messages" in row for row in rows):
        return None
    try:
        return data.demonstrations(rows, policy)
    except ValueError:  # chats that end with a question, say: prompts all the same
        return None
