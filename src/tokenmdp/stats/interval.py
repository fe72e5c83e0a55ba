"""What all statistics here share: an estimate with its interval, intervals of bootstrap draws, and data that can be
answered about.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
CELLS_AT_ONCE = 2_000_000  # resampled cells held in memory together: 16 MB of float64
FEW = 8  # of fewer units than this no resample reaches far enough: see `student`


class Interval(NamedTuple):
    """An estimate and the interval around it; `_asdict()` is how results files write it.

    Attributes:
        mean: the estimate (a mean, a difference, a rate or a correlation).
        low, high: the ends of the interval, in the same units.
    """

    mean: float
    low: float
    high: float


def around(draws: Array, estimate: float, n: float, level: float = 0.95) -> Interval:
    """The interval of bootstrap draws of any statistic of n units: bias-corrected at expanded levels, of few units Student's.

    Args:
        draws: [R] the statistic of each resample, finite.
        estimate: the statistic of the units as they are.
        n: units resampled, at least 2 (a fraction where several kinds are).
    """
    if n < FEW:
        return student(estimate, float(np.sqrt(n / (n - 1)) * draws.std()), n, level)
    return corrected(draws, estimate, n, level, 0.0)


def bounded(interval: Interval, least: float, most: float) -> Interval:
    """The interval without what is impossible, for a quantity with known bounds: Student's t knows of none."""
    mean, low, high = interval
    return Interval(mean, max(low, least), min(high, most))


def student(estimate: float, deviation: float, n: float, level: float) -> Interval:
    """Student's interval, estimate ± t_{n−1} · deviation: exact where the n units are normal.

    A resample of n units lies between the least and the greatest of them, so a bootstrap interval, at whatever levels,
    holds the centre with probability 1 − 2^(1−n) at most: 50, 75, 88, 94 % for 2, 3, 4, 5. The deviation of resamples is
    √((n−1)/n) times that of the estimate, and without that factor this is Student's interval of a mean.
    """
    half = float(scipy.stats.t.ppf(0.5 + checked_level(level) / 2, n - 1)) * deviation
    return Interval(estimate, estimate - half, estimate + half)


def corrected(draws: Array, estimate: float, n: float, level: float, acceleration: float) -> Interval:
    """The BCa interval of bootstrap draws at expanded levels; see `bootstrap_mean`."""
    norm = scipy.stats.norm
    widened = -np.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.5 + checked_level(level) / 2, n - 1)
    below = (np.sum(draws < estimate) + 0.5 * np.sum(draws == estimate)) / len(draws)
    bias = norm.ppf(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws)))
    z = bias + np.array([widened, -widened])
    slope = np.maximum(1 - acceleration * z, 1e-9)  # at extreme levels it could turn negative: the end is the last draw
    low, high = np.quantile(draws, norm.cdf(bias + z / slope))
    return Interval(estimate, float(low), float(high))


def resampled(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """Blocks [rows, n] of resampling weights: how often each of n clusters was drawn, over n."""
    rng = np.random.default_rng(seed)
    for rows in blocks(n, resamples):
        yield rng.multinomial(n, np.full(n, 1 / n), size=rows) / n


def blocks(n: int, resamples: int) -> Iterator[int]:
    at_once = max(1, CELLS_AT_ONCE // n)
    for start in range(0, checked_resamples(resamples), at_once):
        yield min(at_once, resamples - start)


def per_prompt(values: ArrayLike, name: str) -> Array:
    """[P] or [P, k] -> [P] means per prompt."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim not in (1, 2) or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}: give [prompts] or [prompts, samples], with some of each")
    if len(x) < 2:
        raise ValueError(f"{name} has one prompt: an interval over prompts needs at least two")
    check_finite(x, name)
    return x if x.ndim == 1 else x.mean(axis=1)


def numbered(cluster: Iterable[Hashable], n: int) -> NDArray[np.int64]:
    """[n] which cluster each of n values is of, numbered as they come."""
    labels = cluster.tolist() if isinstance(cluster, np.ndarray) else list(cluster)
    if len(labels) != n:
        raise ValueError(f"{len(labels)} cluster labels for {n} values: give one a value")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def vector(values: ArrayLike, name: str) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}: give a list of at least one number")
    check_finite(x, name)
    return x


def check_finite(x: Array, name: str) -> None:
    bad = int((~np.isfinite(x)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {x.size} values of {name} are NaN or infinite: a response without a verdict is not a number; "
            "leave its prompt out of every arm, and say how many were left out"
        )


def checked_level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: a coverage lies between 0 and 1, for example 0.95")
    return level


def checked_resamples(resamples: int) -> int:
    if resamples < 1:
        raise ValueError(f"resamples = {resamples}: at least one is needed, and a thousand for two digits")
    return resamples
