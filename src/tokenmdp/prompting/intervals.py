"""Means and ratios over trials, with intervals that resample questions: trials of one question are not independent."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenmdp.stats import Interval, around


def grouped_ratio(
    top: NDArray[np.float64],
    bottom: NDArray[np.float64],
    group: NDArray[np.int64],
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Σ top / Σ bottom over items with a 95 % interval that resamples whole groups (see `stats.around`).

    Raises:
        ValueError: fewer than two groups, or `bottom` is 0 everywhere.
    """
    _, place = np.unique(group, return_inverse=True)
    above, below = (np.asarray(np.bincount(place, x), dtype=np.float64) for x in (top, bottom))
    if len(above) < 2:
        raise ValueError(f"{len(above)} question: an interval over questions needs at least two")
    rng = np.random.default_rng(seed)
    even = np.full(len(above), 1 / len(above))
    found = np.full(resamples, np.nan)
    for i in range(resamples):  # one at a time: a million questions are eight megabytes a resample
        counts = rng.multinomial(len(above), even)
        divisor = counts @ below
        found[i] = counts @ above / divisor if divisor else np.nan
    total = below.sum()
    if not total or np.isnan(found).all():
        raise ValueError("all weights are 0: the log never tried what the policy chooses, so it says nothing about it")
    return around(found[np.isfinite(found)], float(above.sum() / total), len(above))


def grouped_mean(
    value: NDArray[np.float64], group: NDArray[np.int64], resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean over items with a 95 % interval that resamples whole groups.

    Raises:
        ValueError: fewer than two groups.
    """
    return grouped_ratio(value, np.ones(len(value)), group, resamples, seed)
