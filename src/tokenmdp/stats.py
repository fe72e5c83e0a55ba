"""The statistics of a comparison: how large, how sure, and compared with what.

The unit of resampling is the prompt. Several responses to one prompt share its difficulty, so they are one cluster; to
count them as independent makes every interval too narrow. Functions that draw at random take a seed and give the same
numbers for it on every machine. What cannot be answered (no data, a NaN, data without any spread) is an error that says
so: an interval of width zero would look like certainty.

Plain numpy and scipy; tensors on the CPU are accepted wherever arrays are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from math import comb
from typing import Any, NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
CELLS_AT_ONCE = 2_000_000  # resampled cells held in memory together: 16 MB of float64
FEW = 8  # of fewer units than this no resample reaches far enough: see `_student`


class Interval(NamedTuple):
    """An estimate and the interval around it; `_asdict()` is how results files write it.

    Attributes:
        mean: the estimate (a mean, a difference, a rate or a correlation).
        low, high: the ends of the interval, in the same units.
    """

    mean: float
    low: float
    high: float


# ------------------------------------------------------------ intervals of means


def bootstrap_mean(values: ArrayLike, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean over prompts, with a bootstrap interval that resamples prompts.

    The interval is bias-corrected and accelerated (BCa), at levels widened for few prompts:

        α' = Φ(−√(P/(P−1)) · t_{P−1}(1−α/2))        instead of α/2
        quantile of the resampled means at Φ(z₀ + (z₀+z) / (1 − a(z₀+z))),  z = Φ⁻¹(α'), Φ⁻¹(1−α')
        z₀ = Φ⁻¹(share of resampled means below the mean),   a = Σd³ / (6 (Σd²)^1.5),  d = x − x̄

    The plain percentile interval covers too little for few prompts (92 % instead of 95 % for ten normal values). For
    fewer than eight it is Student's, exact for normal values: no resampled mean leaves the values' range, which holds
    the truth with probability 1 − 2^(1−P) only.

        x̄ ± t_{P−1}(1−α/2) √( Σd² / (P (P−1)) )

    Args:
        values: [P] one number a prompt, or [P, k] k samples a prompt, which are averaged first (a prompt is a cluster).
        level: the coverage asked for, between 0 and 1.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Raises:
        ValueError: for fewer than two prompts, a value that is not finite, values that are all equal, or a bad level.

    Source: Efron and Tibshirani 1993, eqs. 14.9, 14.10, 14.14, 14.15 (BCa); Hesterberg 2015, "What teachers should know
    about the bootstrap" (the expanded level α').
    """
    x = _per_prompt(values, "values")
    if np.ptp(x) == 0:
        raise ValueError(
            f"all {len(x)} values equal {x[0]:g}: resampling them says nothing about their spread; "
            "report the number without an interval, or measure more prompts"
        )
    if len(x) < FEW:
        return _student(float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))), len(x), level)
    means = np.concatenate([weight @ x for weight in _resampled(len(x), resamples, seed)])
    d = x - x.mean()
    acceleration = float((d**3).sum() / (6 * (d**2).sum() ** 1.5))
    return _corrected(means, float(x.mean()), len(x), level, acceleration)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of a − b over the same prompts, with a bootstrap interval that resamples prompts.

    Pairing removes the prompts' own difficulty from the difference. The interval is `bootstrap_mean`'s, of a − b.

    Args:
        a, b: [P] or [P, k] scores of the two arms, prompt p in row p of both. Their k may differ: each row is averaged.

    Raises:
        ValueError: as `bootstrap_mean`, and when the arms have different numbers of prompts.
    """
    x, y = _per_prompt(a, "a"), _per_prompt(b, "b")
    if len(x) != len(y):
        raise ValueError(f"a has {len(x)} prompts and b {len(y)}: a paired comparison needs the same prompts in both")
    if np.ptp(x - y) == 0:
        raise ValueError(
            f"the arms differ by {x[0] - y[0]:g} on each of the {len(x)} prompts: a difference without any spread has "
            "no interval; check that the two arms are not the same responses"
        )
    return bootstrap_mean(x - y, level, resamples, seed)


def bootstrap_of_means(
    values: ArrayLike,
    function: Callable[[Array], Array],
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
    shared_prompts: bool | None = None,
) -> Interval:
    """A function of several means, such as a ratio or a slope, with a bootstrap interval that resamples prompts.

        f( x̄_1, ..., x̄_K ),   all K columns of a prompt drawn together

    With several seeds these are drawn as well: what a run is like is as much chance as what a prompt is like. Where all
    seeds answer the same prompts, seeds and prompts are crossed, and one draw of prompts serves all seeds:

        x̄ = Σ_s Σ_p w_s v_p x_sp / (S P),   w, v how often a seed and a prompt was drawn

    so that what prompt p costs at every seed varies the mean as σ²/P, and not as σ²/(SP). Where each seed has prompts of
    its own, prompts are drawn within the drawn seeds, anew for each.

    Bias-corrected, at the levels of `bootstrap_mean` without its acceleration, for as many units as there are prompts
    (of one seed), seeds (with prompts of their own), or, where crossed,

        1 + (A + B)² / ( A²/(S−1) + B²/(P−1) ),   A, B the variance with only the seeds, or only the prompts, drawn

    For fewer than eight units it is Student's interval.

    Args:
        values: [P, K] K numbers a prompt, or [S, P, K] those of each of S seeds (one seed is the same as [P, K]).
        function: maps means [R, K] to numbers [R], a row at a time; NaN where a number cannot be told. Such resamples
            are left out.
        shared_prompts: whether row p is the same prompt at all seeds; to be said where there are several seeds.

    Raises:
        TypeError: several seeds, and `shared_prompts` is not given.
        ValueError: for another shape, a value that is not finite, a single prompt of a single seed, a function that says
            nothing of the values themselves or of most resamples, or resamples that are all equal.

    Source: Efron and Tibshirani 1993, section 14.3; crossed: Owen 2007, "The pigeonhole bootstrap" (what is particular
    to a seed and a prompt together counts up to three times: cautious); nested: Davison and Hinkley 1997, section 3.8; the
    units: Satterthwaite 1946.
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[None] if x.ndim == 2 else x
    if x.ndim != 3 or x.size == 0:
        raise ValueError(f"values have shape {x.shape}: give [prompts, columns] or [seeds, prompts, columns]")
    _finite(x, "values")
    S, P, _ = x.shape
    if S == P == 1:
        raise ValueError("values of one prompt and one seed: there is nothing to resample")
    if S > 1 and shared_prompts is None:
        raise TypeError(
            f"values of {S} seeds: say shared_prompts=True where row p is the same prompt at all of them, False where each "
            "seed has prompts of its own"
        )
    estimate = float(function(x.mean(axis=(0, 1))[None])[0])
    if S > 1 and not shared_prompts:
        n: float = S
        drawn = np.concatenate([function(means) for means in _nested(x, resamples, seed)])
    else:
        three = [[function(means) for means in drawn] for drawn in _crossed(x, resamples, seed)]
        drawn, by_seed, by_prompt = (np.concatenate(part) for part in zip(*three, strict=True))
        n = _units((by_seed, S), (by_prompt, P))
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(estimate) or len(drawn) < resamples / 2:
        raise ValueError(
            f"the function is {estimate} of these values and finite for {len(drawn)} of {resamples} resamples"
        )
    if np.ptp(drawn) <= 1e-12 * abs(estimate):  # equal but for rounding
        raise ValueError(
            f"all resamples give {estimate:g}: they say nothing about its spread; report it without an interval"
        )
    return around(drawn, estimate, n, level)


def _crossed(x: Array, resamples: int, seed: int) -> Iterator[tuple[Array, Array, Array]]:
    """Blocks of means [R, K] of resampled [S, P, K]: seeds and prompts drawn, the seeds only, the prompts only."""
    S, P, K = x.shape
    rng = np.random.default_rng(seed)
    for rows in _blocks(S * K + P, resamples):
        w = rng.multinomial(S, np.full(S, 1 / S), size=rows) / S
        v = rng.multinomial(P, np.full(P, 1 / P), size=rows) / P
        of_seed = np.tensordot(v, x, axes=(1, 1))  # [R, S, K]
        yield np.einsum("rs,rsk->rk", w, of_seed), w @ x.mean(axis=1), of_seed.mean(axis=1)


def _nested(x: Array, resamples: int, seed: int) -> Iterator[Array]:
    """Blocks of means [R, K] of resampled [S, P, K]: seeds drawn, and prompts within each."""
    S, P, _ = x.shape
    rng = np.random.default_rng(seed)
    for rows in _blocks(S * P, resamples):
        seeds = rng.multinomial(S, np.full(S, 1 / S), size=rows)
        # A seed drawn twice brings two independent draws of its prompts.
        weight = rng.multinomial(P * seeds, np.full(P, 1 / P)) / (S * P)
        yield np.einsum("rsp,spk->rk", weight, x)


def _units(*parts: tuple[Array, int]) -> float:
    """How many units a sum of two variances is as sure as: Satterthwaite's degrees of freedom, and one."""
    top, bottom = 0.0, 0.0
    for drawn, n in parts:
        if n > 1:
            known = drawn[np.isfinite(drawn)]
            variance = float(known.var()) * n / (n - 1) if len(known) else 0.0
            top, bottom = top + variance, bottom + variance**2 / (n - 1)
    return 1 + top**2 / bottom if bottom > 0 else min(n for _, n in parts if n > 1)


def wilson(successes: float, n: float, level: float = 0.95) -> Interval:
    """A proportion with its score interval, which behaves for few trials and for rates near 0 and 1.

        (s + z²/2) / (n + z²)  ±  z √(n p q + z²/4) / (n + z²),    p = s/n, q = 1 − p, z = Φ⁻¹((1+level)/2)

    Trials are taken as independent; several pairs of one prompt are not (use `clustered_wilson`).

    Args:
        successes: number of successes; a tie may count one half.
        n: number of trials.

    Raises:
        ValueError: when n is not positive, or successes is not between 0 and n.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001, section 3.1.1.
    """
    if not (np.isfinite(n) and n > 0):
        raise ValueError(f"n = {n} trials: a proportion needs at least one trial")
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials: successes must lie between 0 and n")
    p, z = successes / n, float(scipy.stats.norm.ppf(0.5 + _level(level) / 2))
    centre = (successes + z * z / 2) / (n + z * z)
    half = z * np.sqrt(n * p * (1 - p) + z * z / 4) / (n + z * z)
    # At 0 or n successes the interval ends at the estimate exactly; rounding must not put it a hair inside.
    low, high = min(p, max(centre - half, 0.0)), max(p, min(centre + half, 1.0))
    return Interval(p, float(low), float(high))


def clustered_wilson(values: ArrayLike, cluster: Iterable[Hashable], level: float = 0.95) -> Interval:
    """A proportion over trials of which some belong together, with Wilson's interval for as many trials as they are worth.

        v  = C/(C−1) Σ_c ( Σ_{i∈c} (y_i − p) )² / N²          the variance of p if C clusters are drawn
        n* = p q / v · ( z / t_{C−1} )²,   at most N           trials that are worth as much

    Pairs of one prompt, or steps of its responses, share its difficulty: as independent trials they count too often.
    Where no two trials share a cluster it is `wilson`. Where clusters say nothing of their spread (there is one, or all
    have the same rate) there are as many trials as clusters.

    Args:
        values: [N] 1 for a success, 0 for none, ½ for a tie.
        cluster: [N] a label each, such as the prompt.

    Raises:
        ValueError: no values, one outside [0, 1], or another number of labels.

    Source: Korn and Graubard 1998 (effective sample size, with t for few clusters); with Wilson's interval: Franco et al.
    2019; v: Cochran 1977, chapter 9A (clusters of unequal sizes). Resampling clusters instead covers less where they are
    few or the rate is near 1 (88 for 96 %, three to eight clusters).
    """
    y = _vector(values, "values")
    if y.min() < 0 or y.max() > 1:
        raise ValueError(f"values span {y.min():g} to {y.max():g}: a success is 1, none is 0, a tie ½")
    which = _numbered(cluster, len(y))
    N, C, p = len(y), int(which.max()) + 1, float(y.mean())
    trials: float = C
    if 1 < C < N:
        residual = np.bincount(which, weights=y - p)
        variance = C / (C - 1) * float(residual @ residual) / N**2
        if variance > 1e-12 * p * (1 - p) and p * (1 - p) > 0:
            tail = 0.5 + _level(level) / 2
            fewer = float((scipy.stats.norm.ppf(tail) / scipy.stats.t.ppf(tail, C - 1)) ** 2)
            trials = min(float(N), p * (1 - p) / variance * fewer)
    return wilson(p * trials, trials, level)


# ------------------------------------------------------------ predicted probabilities


def calibration(prob: ArrayLike, outcome: ArrayLike, bins: int = 10) -> tuple[float, list[dict[str, float]]]:
    """Does what is predicted at 70 % happen 70 % of the time?

        ECE = Σ_bins (count/N) · |mean outcome − mean prob|

    Bins have equal widths over [0, 1]; empty bins are left out. For preferences, orient each pair without looking at
    the answer (say, first response against second): with "chosen" always first every outcome is 1, which says nothing.
    With N of few hundred an ECE of a few hundredths is noise: it is biased upwards.

    Args:
        prob: [N] predicted probabilities.
        outcome: [N] what happened, 0 or 1, or a share of it between.
        bins: number of bins.

    Returns:
        The expected calibration error, and the table: `{"predicted", "observed", "count"}` for each bin that has data.

    Raises:
        ValueError: for no data, lengths that differ, a probability or an outcome outside [0, 1].

    Source: Guo et al. 2017, eq. 3, with the probability of the outcome in the place of top-label confidence.
    """
    p, y = _vector(prob, "prob"), _vector(outcome, "outcome")
    if len(p) != len(y):
        raise ValueError(f"{len(p)} probabilities and {len(y)} outcomes: one of each a prediction")
    if p.min() < 0 or p.max() > 1:
        raise ValueError(
            f"probabilities span {p.min():g} to {p.max():g}: they must lie in [0, 1] (apply the sigmoid first)"
        )
    if y.min() < 0 or y.max() > 1:
        raise ValueError("an outcome lies outside [0, 1]: give what happened, not a score")
    if bins < 1:
        raise ValueError(f"bins = {bins}: at least one bin is needed")
    which = np.minimum((p * bins).astype(int), bins - 1)
    table = []
    for i in np.unique(which):
        here = which == i
        row = {"predicted": float(p[here].mean()), "observed": float(y[here].mean()), "count": int(here.sum())}
        table.append(row)
    error = sum(row["count"] / len(p) * abs(row["observed"] - row["predicted"]) for row in table)
    return float(error), table


# ------------------------------------------------------------ many runs


def interquartile_mean(values: ArrayLike) -> float:
    """The mean of the middle half: as robust as a median, with less noise. Any shape; all runs and tasks are pooled.

    The lowest and the highest ⌊n/4⌋ values are dropped.

    Raises:
        ValueError: for no values or one that is not finite.

    Source: Agarwal et al. 2021, section 4.3 (IQM).
    """
    ordered = np.sort(_vector(np.ravel(np.asarray(values, dtype=np.float64)), "values"))
    dropped = len(ordered) // 4
    return float(ordered[dropped : len(ordered) - dropped].mean())


def probability_of_improvement(a: ArrayLike, b: ArrayLike) -> float:
    """P(a > b) + ½ P(a = b) for one value of each, drawn independently: how likely a run of a beats a run of b.

    Raises:
        ValueError: when either is empty or has a value that is not finite.

    Source: Agarwal et al. 2021, section 4.3 (the Mann-Whitney statistic over |a|·|b|).
    """
    x, y = _vector(a, "a"), _vector(b, "b")
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
    index = np.random.default_rng(seed).integers(len(x), size=(_many(resamples), *x.shape))
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
    x, y = _vector(a, "a"), _vector(b, "b")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} runs: an interval over runs needs at least two of each")
    estimate, pairs, tail = probability_of_improvement(x, y), len(x) * len(y), (1 - _level(level)) / 2
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
    x = _vector(np.ravel(np.asarray(runs, dtype=np.float64)), "runs")
    return np.asarray((x[None] > _vector(thresholds, "thresholds")[:, None]).mean(axis=1), dtype=np.float64)


def _runs(values: ArrayLike, name: str) -> Array:
    """[R] or [R, M] finite scores of at least two runs that are not all the same."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim not in (1, 2) or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}: give [runs] or [runs, tasks], with some of each")
    _finite(x, name)
    if len(x) < 2:
        raise ValueError(f"{name} has one run: an interval over runs needs at least two")
    if np.ptp(x, axis=0).max() == 0:
        raise ValueError(f"all {len(x)} runs of {name} ended alike: resampling them says nothing about their spread")
    return x


def _many(resamples: int) -> int:
    if resamples < 1:
        raise ValueError(f"resamples = {resamples}: at least one is needed, and a thousand for two digits")
    return resamples


# ------------------------------------------------------------ correlations


def pearson(
    x: ArrayLike,
    y: ArrayLike,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
    cluster: Iterable[Hashable] | None = None,
) -> Interval:
    """The linear correlation of x and y with a bootstrap interval that resamples the pairs (x_i, y_i), or their clusters.

    Bias-corrected, at the levels of `bootstrap_mean` (no acceleration). Resamples in which x or y is constant have no
    correlation and are left out.

    Args:
        cluster: [N] a label each, such as the prompt: pairs with the same one are drawn together. Without it every pair
            is a cluster.

    Raises:
        ValueError: for fewer than three pairs or clusters, lengths that differ, a value that is not finite, or x or y all
            equal.

    Source: Efron and Tibshirani 1993, sections 6.3 and 14.3; clusters: Davison and Hinkley 1997, section 3.8.
    """
    return _correlation(x, y, level, resamples, seed, cluster, lambda v, weight: np.broadcast_to(v, weight.shape))


def spearman(
    x: ArrayLike,
    y: ArrayLike,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
    cluster: Iterable[Hashable] | None = None,
) -> Interval:
    """The rank correlation of x and y (ties share their mean rank), with the interval of `pearson`, re-ranked too.

    Source: Spearman 1904; the interval as in `pearson`.
    """
    return _correlation(x, y, level, resamples, seed, cluster, _ranks)


def _ranks(v: Array, weight: Array) -> Array:
    """[R, N] ranks of N values in each of R resamples in which value i stands weight[r, i] times; ties share theirs.

    below + (alike + 1) / 2,    how many smaller values the resample holds, and how many equal ones
    """
    _, group, size = np.unique(v, return_inverse=True, return_counts=True)
    alike = np.add.reduceat(weight[:, np.argsort(group, kind="stable")], np.cumsum(size) - size, axis=1)
    rank = np.cumsum(alike, axis=1) - alike + (alike + 1) / 2
    return np.asarray(rank[:, group], dtype=np.float64)


def _correlation(
    x: ArrayLike,
    y: ArrayLike,
    level: float,
    resamples: int,
    seed: int,
    cluster: Iterable[Hashable] | None,
    transform: Callable[[Array, Array], Array],
) -> Interval:
    u, v = _vector(x, "x"), _vector(y, "y")
    if len(u) != len(v):
        raise ValueError(f"x has {len(u)} values and y {len(v)}: a correlation needs pairs")
    which = np.arange(len(u)) if cluster is None else _numbered(cluster, len(u))
    C = int(which.max()) + 1
    if C < 3:
        what = "pairs" if cluster is None else f"clusters, of {len(u)} pairs"
        raise ValueError(f"{C} {what}: a correlation with an interval needs at least three")
    for name, w in (("x", u), ("y", v)):
        if np.ptp(w) == 0:
            raise ValueError(f"all values of {name} equal {w[0]:g}: the correlation with a constant is not defined")

    def measured(weight: Array) -> Array:
        return _rowwise_pearson(transform(u, weight), transform(v, weight), weight)

    estimate = float(measured(np.ones((1, len(u))))[0])
    rng = np.random.default_rng(seed)
    draws = []
    for rows in _blocks(len(u), resamples):
        at = rng.integers(C, size=(rows, C)) + C * np.arange(rows)[:, None]
        often = np.bincount(at.ravel(), minlength=rows * C).reshape(rows, C)
        draws.append(measured(often[:, which].astype(np.float64)))
    drawn = np.concatenate(draws)
    return _corrected(drawn[np.isfinite(drawn)], estimate, C, level, 0.0)


def _rowwise_pearson(u: Array, v: Array, weight: Array) -> Array:
    """[R] weighted correlations of the rows of two [R, N] arrays; NaN where a row is constant."""
    total, drawn = weight.sum(axis=1, keepdims=True), weight > 0

    def varies(x: Array) -> NDArray[np.bool_]:
        # Of the values themselves: less its rounded mean a constant row leaves some 1e-17, and a correlation of noise.
        return np.asarray(np.where(drawn, x, -np.inf).max(axis=1) > np.where(drawn, x, np.inf).min(axis=1))

    defined = varies(u) & varies(v)
    u, v = (x - (weight * x).sum(axis=1, keepdims=True) / total for x in (u, v))
    spread = np.sqrt((weight * u * u).sum(axis=1) * (weight * v * v).sum(axis=1))
    product = (weight * u * v).sum(axis=1)
    r = np.divide(product, spread, out=np.full(len(u), np.nan), where=defined & (spread > 0))
    return np.asarray(np.clip(r, -1.0, 1.0))


# ------------------------------------------------------------ texts and samples


def distinct_n(texts: Sequence[str] | Sequence[Sequence[int]], n: int) -> float:
    """The share of n-grams that are different from each other, over all responses together: 1 is no repetition at all.

        distinct n-grams / n-grams

    It falls with the amount of text, so compare arms with about as many tokens each.

    Args:
        texts: responses as strings (words between white space are the tokens) or as sequences of token ids.
        n: length of the n-grams, at least 1. They never reach across two responses.

    Raises:
        ValueError: when n < 1, or no response has n tokens.

    Source: Li et al. 2016 (distinct-1 and distinct-2). Differs: divided by the number of n-grams, not of tokens, so
    that 1 can be reached.
    """
    if n < 1:
        raise ValueError(f"n = {n}: an n-gram has at least one token")
    seen: Counter[tuple[Any, ...]] = Counter()
    for text in texts:
        tokens: list[Any] = text.split() if isinstance(text, str) else list(text)
        seen.update(zip(*(tokens[i:] for i in range(n)), strict=False))
    total = seen.total()
    if total == 0:
        raise ValueError(f"none of the {len(texts)} responses has {n} tokens: there is no {n}-gram to count")
    return len(seen) / total


def best_of_n_values(proxy: ArrayLike, gold: ArrayLike, n: int) -> Array:
    """[P] For each prompt, the exact expected gold of the response the proxy likes best among n drawn of its k samples.

    Drawn without replacement, every subset equally likely. With the samples in rising order of proxy, the one with j
    samples below it is the best of the subset with probability C(j, n−1) / C(k, n). Samples of equal proxy share the
    probability of their block, (C(end, n) − C(start, n)) / C(k, n): the best among equals is drawn at random.

    Args:
        proxy, gold: [P, k] scores of k samples of each of P prompts.
        n: how many are drawn, 1 to k. n = 1 gives the mean of gold, n = k the gold of the proxy's favourite.

    Raises:
        ValueError: for shapes that differ or are not [P, k], a value that is not finite, or n outside 1..k.

    Source: Nakano et al. 2021 (WebGPT), appendix I, the estimator of best-of-n used by Gao et al. 2023; with ties.
    """
    p, g = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if p.ndim != 2 or p.shape != g.shape or 0 in p.shape:
        raise ValueError(
            f"proxy has shape {p.shape} and gold {g.shape}: both must be [prompts, samples], with some of each"
        )
    for name, x in (("proxy", p), ("gold", g)):
        _finite(x, name)
    k = p.shape[1]
    if not 1 <= n <= k:
        raise ValueError(f"n = {n} with {k} samples a prompt: the best of n needs n between 1 and {k}")
    # C(j, n) / C(k, n): the chance that a subset of n lies among the j samples of lowest proxy.
    among = np.array([comb(j, n) / comb(k, n) for j in range(k + 1)])
    return np.array([_best_of_row(row, p[i], among) for i, row in enumerate(g)])


def best_of_n_curve(proxy: ArrayLike, gold: ArrayLike, n: int) -> float:
    """The best-of-n curve at n: the mean over prompts of `best_of_n_values`; give proxy twice for the proxy's curve."""
    return float(best_of_n_values(proxy, gold, n).mean())


def _best_of_row(gold: Array, proxy: Array, among: Array) -> float:
    _, block, size = np.unique(proxy, return_inverse=True, return_counts=True)
    end = np.cumsum(size)
    probability = among[end] - among[end - size]
    return float((np.bincount(block, weights=gold) / size) @ probability)


# ------------------------------------------------------------ right or wrong, k attempts


def pass_at_k_values(right: ArrayLike, k: int) -> Array:
    """[P] For each problem, the unbiased estimate of the chance that at least one of k attempts is right.

        1 − C(n − c, k) / C(n, k),    c of its n samples being right

    It is the share of the subsets of k samples that hold a right one. (1 − (1 − c/n)^k is biased downwards.)

    Args:
        right: [P, n] 1 (or True) for each right one of n samples of each of P problems, 0 for the others.
        k: attempts, 1 to n. k = 1 gives the mean.

    Raises:
        ValueError: for a shape other than [P, n], an entry other than 0 and 1, or k outside 1..n.

    Source: Chen et al. 2021 (Codex), eq. 1.
    """
    x = np.asarray(right, dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"right has shape {x.shape}: give [problems, samples], with some of each")
    if not np.isin(x, (0.0, 1.0)).all():
        raise ValueError(
            "right holds something other than 0 and 1: an attempt is right or it is not (threshold the score)"
        )
    n = x.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} with {n} samples a problem: pass@k needs k between 1 and {n}")
    missed = np.array([comb(n - c, k) / comb(n, k) for c in range(n + 1)])
    return np.asarray(1 - missed[x.sum(axis=1).astype(int)], dtype=np.float64)


def pass_at_k(right: ArrayLike, k: int, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of `pass_at_k_values` over problems, with an interval that resamples problems.

    The interval is `bootstrap_mean`'s, within 0 and 1. Where every problem has the same value (none is ever solved, say)
    there is no spread to resample: then it is `wilson`'s for as many trials as problems, which is wide enough for any
    values between 0 and 1 with that mean.

    Raises:
        ValueError: as `pass_at_k_values`, and for a single problem.
    """
    values = pass_at_k_values(right, k)
    if len(values) > 1 and np.ptp(values) == 0:
        return wilson(float(values.sum()), len(values), level)
    return bounded(bootstrap_mean(values, level, resamples, seed), 0.0, 1.0)


# ------------------------------------------------------------ what they share


def _resampled(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """Blocks [rows, n] of resampling weights: how often each of n clusters was drawn, over n."""
    rng = np.random.default_rng(seed)
    for rows in _blocks(n, resamples):
        yield rng.multinomial(n, np.full(n, 1 / n), size=rows) / n


def _blocks(n: int, resamples: int) -> Iterator[int]:
    if resamples < 1:
        raise ValueError(f"resamples = {resamples}: at least one is needed, and a thousand for two digits")
    at_once = max(1, CELLS_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        yield min(at_once, resamples - start)


def _student(estimate: float, deviation: float, n: float, level: float) -> Interval:
    """Student's interval, estimate ± t_{n−1} · deviation: exact where the n units are normal.

    A resample of n units lies between the least and the greatest of them, so a bootstrap interval, at whatever levels,
    holds the centre with probability 1 − 2^(1−n) at most: 50, 75, 88, 94 % for 2, 3, 4, 5. The deviation of resamples is
    √((n−1)/n) times that of the estimate, and without that factor this is Student's interval of a mean.
    """
    half = float(scipy.stats.t.ppf(0.5 + _level(level) / 2, n - 1)) * deviation
    return Interval(estimate, estimate - half, estimate + half)


def around(draws: Array, estimate: float, n: float, level: float = 0.95) -> Interval:
    """The interval of bootstrap draws of any statistic of n units: bias-corrected at expanded levels, of few units Student's.

    Args:
        draws: [R] the statistic of each resample, finite.
        estimate: the statistic of the units as they are.
        n: units resampled, at least 2 (a fraction where several kinds are).
    """
    if n < FEW:
        return _student(estimate, float(np.sqrt(n / (n - 1)) * draws.std()), n, level)
    return _corrected(draws, estimate, n, level, 0.0)


def bounded(interval: Interval, least: float, most: float) -> Interval:
    """The interval without what is impossible, for a quantity with known bounds: Student's t knows of none."""
    mean, low, high = interval
    return Interval(mean, max(low, least), min(high, most))


def _corrected(draws: Array, estimate: float, n: float, level: float, acceleration: float) -> Interval:
    """The BCa interval of bootstrap draws at expanded levels; see `bootstrap_mean`."""
    norm = scipy.stats.norm
    widened = -np.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.5 + _level(level) / 2, n - 1)
    below = (np.sum(draws < estimate) + 0.5 * np.sum(draws == estimate)) / len(draws)
    bias = norm.ppf(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws)))
    z = bias + np.array([widened, -widened])
    slope = np.maximum(1 - acceleration * z, 1e-9)  # at extreme levels it could turn negative: the end is the last draw
    low, high = np.quantile(draws, norm.cdf(bias + z / slope))
    return Interval(estimate, float(low), float(high))


def _per_prompt(values: ArrayLike, name: str) -> Array:
    """[P] or [P, k] -> [P] means per prompt."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim not in (1, 2) or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}: give [prompts] or [prompts, samples], with some of each")
    if len(x) < 2:
        raise ValueError(f"{name} has one prompt: an interval over prompts needs at least two")
    _finite(x, name)
    return x if x.ndim == 1 else x.mean(axis=1)


def _numbered(cluster: Iterable[Hashable], n: int) -> NDArray[np.int64]:
    """[n] which cluster each of n values is of, numbered as they come."""
    labels = cluster.tolist() if isinstance(cluster, np.ndarray) else list(cluster)
    if len(labels) != n:
        raise ValueError(f"{len(labels)} cluster labels for {n} values: give one a value")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def _vector(values: ArrayLike, name: str) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}: give a list of at least one number")
    _finite(x, name)
    return x


def _finite(x: Array, name: str) -> None:
    bad = int((~np.isfinite(x)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {x.size} values of {name} are NaN or infinite: a response without a verdict is not a number; "
            "leave its prompt out of every arm, and say how many were left out"
        )


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: a coverage lies between 0 and 1, for example 0.95")
    return level
