"""Means and ratios over trials, with intervals that resample questions: trials of one question are not independent."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenmdp.stats import Interval, around, wilson


def grouped_ratio(
    top: NDArray[np.float64],
    bottom: NDArray[np.float64],
    group: NDArray[np.int64],
    resamples: int = 2000,
    seed: int = 0,
    least: float = 0.0,
    most: float = 1.0,
) -> Interval:
    """Σ top / Σ bottom over items with a 95 % interval that resamples whole groups (see `stats.around`).

    Where all groups have the same ratio, resamples have no spread, and that is no certainty: then it is `stats.wilson`'s
    for as many trials as there are groups ((Σ B)² / Σ B², B the sum of a group's `bottom`), on the range from `least` to
    `most`. A difference that is 0 everywhere (`least` below 0), as of a choice from itself, is 0 and no other.

    Args:
        least, most: what a ratio may be: 0 and 1 for rewards, −1 and 1 for their differences.

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
    found, mean = found[np.isfinite(found)], float(above.sum() / total)
    if np.ptp(found) > 1e-12 * max(1.0, abs(mean)):  # more than rounding
        return around(found, mean, len(above))
    if least < 0 and not above.any():
        return Interval(0.0, 0.0, 0.0)
    trials, share = float(total**2 / (below @ below)), (mean - least) / (most - least)
    low, high = (least + (most - least) * end for end in wilson(min(max(share, 0.0), 1.0) * trials, trials)[1:])
    return Interval(mean, min(low, mean), max(high, mean))


def grouped_mean(
    value: NDArray[np.float64],
    group: NDArray[np.int64],
    resamples: int = 2000,
    seed: int = 0,
    least: float = 0.0,
    most: float = 1.0,
) -> Interval:
    """The mean over items with a 95 % interval that resamples whole groups; `least` and `most` as in `grouped_ratio`.

    Raises:
        ValueError: fewer than two groups.
    """
    return grouped_ratio(value, np.ones(len(value)), group, resamples, seed, least, most)
