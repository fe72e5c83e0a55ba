"""Grouped splits: what is the same question stays on one side."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def folds(groups: NDArray[np.int64], count: int, seed: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """`count` times (learned, held out): positions in `groups`, each held out once, whole groups at a time.

    Args:
        groups: [Q] a number an item; equal numbers are never parted.
        count: how many folds, at least 2.
        seed: which groups go together.

    Raises:
        ValueError: fewer groups than folds.
    """
    names = np.unique(groups)
    if count < 2 or len(names) < count:
        raise ValueError(
            f"{count} folds of {len(names)} different questions: there must be at least 2, and a question each"
        )
    fold = np.random.default_rng(seed).permutation(len(names)) % count
    of = fold[np.searchsorted(names, groups)]
    for number in range(count):
        yield np.flatnonzero(of != number), np.flatnonzero(of == number)


def halves(groups: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(learned, held out): positions, about `share` of the groups held out, at least one and not all.

    Raises:
        ValueError: a share outside (0, 1), or one group only.
    """
    names = np.unique(groups)
    if not 0 < share < 1 or len(names) < 2:
        raise ValueError(f"a share of {share} of {len(names)} different questions: a share in (0, 1) of at least 2")
    order = np.random.default_rng(seed).permutation(names)
    out = order[: min(max(1, round(share * len(names))), len(names) - 1)]
    held = np.isin(groups, out)
    return np.flatnonzero(~held), np.flatnonzero(held)
