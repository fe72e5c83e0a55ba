"""Correlations with intervals that resample clusters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenmdp.stats.interval import FEW, Array, Interval, around, blocks, corrected, numbered, vector
from tokenmdp.stats.rates import wilson

_ALMOST = 1 - 1e-6  # a correlation beyond it is taken as this: atanh(1) is infinite


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
    correlation and are left out. For fewer than eight clusters it is Student's, of atanh r (95 to 100 % coverage for three
    to seven normal pairs or clusters of four), where resamples reach too far in or stick to ±1.

    Where all resamples agree, as where all pairs lie on a line, they say nothing of the spread. Then clusters are taken two
    by two, which are in the same order or not: with Wilson's interval [l, h] of the share (1 + r)/2 in C/2 trials it is
    [2l − 1, 2h − 1], which for r = 1 and 3, 8, 100 clusters begins at −0.44, 0.02, 0.86.

    Args:
        cluster: [N] a label each, such as the prompt: pairs with the same one are drawn together. Without it every pair
            is a cluster.

    Raises:
        ValueError: for fewer than three pairs or clusters, lengths that differ, a value that is not finite, or x or y all
            equal.

    Source: Efron and Tibshirani 1993, sections 6.3 and 14.3; clusters: Davison and Hinkley 1997, section 3.8;
    atanh: Fisher 1921.
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
    u, v = vector(x, "x"), vector(y, "y")
    if len(u) != len(v):
        raise ValueError(f"x has {len(u)} values and y {len(v)}: a correlation needs pairs")
    which = np.arange(len(u)) if cluster is None else numbered(cluster, len(u))
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
    for rows in blocks(len(u), resamples):
        at = rng.integers(C, size=(rows, C)) + C * np.arange(rows)[:, None]
        often = np.bincount(at.ravel(), minlength=rows * C).reshape(rows, C)
        draws.append(measured(often[:, which].astype(np.float64)))
    drawn = np.concatenate(draws)
    drawn = drawn[np.isfinite(drawn)]
    if np.ptp(drawn) <= 1e-12:  # equal but for rounding
        share = wilson((1 + estimate) / 2 * C / 2, C / 2, level)
        return Interval(estimate, 2 * share.low - 1, 2 * share.high - 1)
    if C >= FEW:
        return corrected(drawn, estimate, C, level, 0.0)
    z = np.arctanh(np.clip([estimate, *drawn], -_ALMOST, _ALMOST))
    _, low, high = np.tanh(around(z[1:], float(z[0]), C, level)).tolist()
    return Interval(estimate, min(low, estimate), max(high, estimate))


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
