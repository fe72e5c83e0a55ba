"""Many runs of several solvers: robust means, who beats whom, how sure a handful of seeds can be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy
from numpy.typing import ArrayLike

from tokenmdp.stats.interval import Array, Interval, around, check_finite, checked_level, checked_resamples, vector


def interquartile_mean(values: ArrayLike) -> float:
    """The mean of the middle half: as robust as a median, with less noise. Any shape; all runs and tasks are pooled.

    The lowest and the highest ⌊n/4⌋ values are dropped.

    Raises:
        ValueError: for no values or one that is not finite.

    Source: Agarwal et al. 2021, section 4.3 (IQM).
    """
    ordered = np.sort(vector(np.ravel(np.asarray(values, dtype=np.float64)), "values"))
    dropped = len(ordered) // 4
    return float(ordered[dropped : len(ordered) - dropped].mean())


def probability_of_improvement(a: ArrayLike, b: ArrayLike) -> float:
    """P(a > b) + ½ P(a = b) for one value of each, drawn independently: how likely a run of a beats a run of b.

    Raises:
        ValueError: when either is empty or has a value that is not finite.

    Source: Agarwal et al. 2021, section 4.3 (the Mann-Whitney statistic over |a|·|b|).
    """
    x, y = vector(a, "a"), vector(b, "b")
    rank = scipy.stats.rankdata(np.concatenate([x, y]))[: len(x)]
    return float((rank.sum() - len(x) * (len(x) + 1) / 2) / (len(x) * len(y)))


def stratified_bootstrap(
    runs: ArrayLike,
    statistic: Callable[[Array], float] = interquartile_mean,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """A statistic of several runs, with a bootstrap interval that resamples the runs within each task.

    Tasks are the strata: each keeps its number of runs in every resample, since the tasks are not a sample of anything
    and the seeds are.

    Args:
        runs: [R] the final score of each run on one task, or [R, M] of R runs on each of M tasks.
        statistic: maps an array of that shape to a number; the interquartile mean of all of it if not given.

    Raises:
        ValueError: for fewer than two runs, runs that are all equal, or a value that is not finite.

    Source: Agarwal et al. 2021, section 4.1 (stratified bootstrap over runs).
    Differs: the percentile interval is bias-corrected and its levels are widened for few runs, as in `bootstrap_mean`:
    with five runs the plain one covers too little. For fewer than eight it is Student's around the statistic, with the
    draws' own spread: the interquartile mean of normal runs is covered in 95 (two or three runs) to 97 % (four to
    seven). Of two or three runs that is their mean, of four or five the mean of the middle two or three.
    """
    x = _runs(runs, "runs")
    index = np.random.default_rng(seed).integers(len(x), size=(checked_resamples(resamples), *x.shape))
    draws = np.array([statistic(np.take_along_axis(x, rows, axis=0)) for rows in index])
    return around(draws, float(statistic(x)), len(x), level)


def improvement(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """`probability_of_improvement` of a over b with an exact interval for few runs.

    A bootstrap of five runs that all exceed five others has no width, as if five were many. So the rank test is inverted:
    the ends are the probabilities at which so many wins, or more (or fewer), would be seen with probability α/2 only, if
    a run of a were as good as the best of k runs of b (Lehmann's alternatives):

        P = k / (k + 1),    the best of i runs of a and j of b is one of a with probability  i k / (i k + j)

    It leaves ½ out exactly where the two-sided Mann-Whitney test rejects: five separated from five do, three from three
    do not. A tie counts half a win, rounded to the cautious side.

    Args:
        a, b: [R] final scores of the runs of two solvers on one task; their numbers may differ.

    Raises:
        ValueError: for fewer than two runs of either, or a value that is not finite.

    Source: Agarwal et al. 2021, section 4.3 (probability of improvement); Lehmann 1953; the order under the alternative:
    Savage 1956, section 5. Differs: Agarwal et al. take the bootstrap's interval.
    """
    x, y = vector(a, "a"), vector(b, "b")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} runs: an interval over runs needs at least two of each")
    estimate, pairs, tail = probability_of_improvement(x, y), len(x) * len(y), (1 - checked_level(level)) / 2
    wins = round(2 * estimate * pairs) / 2

    def solved(excess: Callable[[float], float]) -> float:
        k = float(np.exp(scipy.optimize.brentq(excess, -30.0, 30.0)))
        return k / (k + 1)

    def at_least(log_k: float) -> float:
        return float(_wins(len(x), len(y), np.exp(log_k))[int(np.floor(wins)) :].sum()) - tail

    def at_most(log_k: float) -> float:
        return float(_wins(len(x), len(y), np.exp(log_k))[: int(np.ceil(wins)) + 1].sum()) - tail

    low = solved(at_least) if np.floor(wins) > 0 else 0.0
    high = solved(at_most) if np.ceil(wins) < pairs else 1.0
    return Interval(estimate, low, high)


def _wins(better: int, worse: int, k: float) -> Array:
    """[better * worse + 1] the distribution of the number of won pairs under Lehmann's alternative k."""
    size = better * worse + 1
    table = np.zeros((better + 1, worse + 1, size))
    table[0, :, 0] = table[:, 0, 0] = 1.0
    for i in range(1, better + 1):
        for j in range(1, worse + 1):
            first = i * k / (i * k + j)  # the best of all wins j pairs, or it is one of the others
            table[i, j] = (1 - first) * table[i, j - 1]
            table[i, j, j:] += first * table[i - 1, j, : size - j]
    return np.asarray(table[better, worse])


def performance_profile(runs: ArrayLike, thresholds: ArrayLike) -> Array:
    """[T] what share of the runs ends above each threshold τ; all of the distribution instead of one number of it.

        F(τ) = 1/M Σ_m 1/R Σ_r 1[score of run r on task m > τ]

    Args:
        runs: [R], or [R, M]: all runs and tasks are pooled, each task having as many runs.
        thresholds: [T] the values of τ.

    Source: Agarwal et al. 2021, section 4.2 (run-score distributions).
    """
    x = vector(np.ravel(np.asarray(runs, dtype=np.float64)), "runs")
    return np.asarray((x[None] > vector(thresholds, "thresholds")[:, None]).mean(axis=1), dtype=np.float64)


def _runs(values: ArrayLike, name: str) -> Array:
    """[R] or [R, M] finite scores of at least two runs that are not all the same."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim not in (1, 2) or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}: give [runs] or [runs, tasks], with some of each")
    check_finite(x, name)
    if len(x) < 2:
        raise ValueError(f"{name} has one run: an interval over runs needs at least two")
    if np.ptp(x, axis=0).max() == 0:
        raise ValueError(f"all {len(x)} runs of {name} ended alike: resampling them says nothing about their spread")
    return x
