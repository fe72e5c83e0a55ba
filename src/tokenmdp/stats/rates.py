"""Proportions with their intervals, and whether predicted ones come true."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
import scipy
from numpy.typing import ArrayLike

from tokenmdp.stats.interval import Interval, checked_level, numbered, vector


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
    p, z = successes / n, float(scipy.stats.norm.ppf(0.5 + checked_level(level) / 2))
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
    y = vector(values, "values")
    if y.min() < 0 or y.max() > 1:
        raise ValueError(f"values span {y.min():g} to {y.max():g}: a success is 1, none is 0, a tie ½")
    which = numbered(cluster, len(y))
    N, C, p = len(y), int(which.max()) + 1, float(y.mean())
    trials: float = C
    if 1 < C < N:
        residual = np.bincount(which, weights=y - p)
        variance = C / (C - 1) * float(residual @ residual) / N**2
        if variance > 1e-12 * p * (1 - p) and p * (1 - p) > 0:
            tail = 0.5 + checked_level(level) / 2
            fewer = float((scipy.stats.norm.ppf(tail) / scipy.stats.t.ppf(tail, C - 1)) ** 2)
            trials = min(float(N), p * (1 - p) / variance * fewer)
    return wilson(p * trials, trials, level)


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
    p, y = vector(prob, "prob"), vector(outcome, "outcome")
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
