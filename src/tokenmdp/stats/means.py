"""Intervals of means over prompts, of paired differences, and of what is made of several means."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike

from tokenmdp.stats.interval import (
    FEW,
    Array,
    Interval,
    around,
    blocks,
    check_finite,
    corrected,
    per_prompt,
    resampled,
    student,
)


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
    x = per_prompt(values, "values")
    if np.ptp(x) == 0:
        raise ValueError(
            f"all {len(x)} values equal {x[0]:g}: resampling them says nothing about their spread; "
            "report the number without an interval, or measure more prompts"
        )
    if len(x) < FEW:
        return student(float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))), len(x), level)
    means = np.concatenate([weight @ x for weight in resampled(len(x), resamples, seed)])
    d = x - x.mean()
    acceleration = float((d**3).sum() / (6 * (d**2).sum() ** 1.5))
    return corrected(means, float(x.mean()), len(x), level, acceleration)


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
    x, y = per_prompt(a, "a"), per_prompt(b, "b")
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
    check_finite(x, "values")
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
    for rows in blocks(S * K + P, resamples):
        w = rng.multinomial(S, np.full(S, 1 / S), size=rows) / S
        v = rng.multinomial(P, np.full(P, 1 / P), size=rows) / P
        of_seed = np.tensordot(v, x, axes=(1, 1))  # [R, S, K]
        yield np.einsum("rs,rsk->rk", w, of_seed), w @ x.mean(axis=1), of_seed.mean(axis=1)


def _nested(x: Array, resamples: int, seed: int) -> Iterator[Array]:
    """Blocks of means [R, K] of resampled [S, P, K]: seeds drawn, and prompts within each."""
    S, P, _ = x.shape
    rng = np.random.default_rng(seed)
    for rows in blocks(S * P, resamples):
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
