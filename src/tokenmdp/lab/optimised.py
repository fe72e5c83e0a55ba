"""Curves of over-optimisation: gold and proxy gained against √KL, prompt by prompt, and the published forms fitted to them.

A curve is one row a prompt and one column a distance, so that intervals resample prompts: the fit of each resample is a
fit of its own, and what varies is reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from tokenmdp import stats
from tokenmdp.functional import kl, overoptimisation
from tokenmdp.functional.overoptimisation import FORMS, Form
from tokenmdp.lab import concordance
from tokenmdp.stats import Array

LEVEL, RESAMPLES = 0.95, 2000


def numbers(most: int) -> list[int]:
    """The n of a best-of-n curve: every one to 8, then about six an octave, and `most`."""
    steps = (round(2 ** (i / 6)) for i in range(18, 6 * most.bit_length()))
    return sorted({*range(1, min(8, most) + 1), *(n for n in steps if n <= most), most})


def best_of_n(proxy: ArrayLike, gold: ArrayLike, ns: Sequence[int]) -> tuple[Array, Array, Array]:
    """What best of n gains over one sample, for each prompt and n, from k samples of each prompt.

    Args:
        proxy, gold: [P, k] what the reward that chooses and the true one say of each sample.
        ns: the n, each 1 to k.

    Returns:
        [K] √KL, by the analytic KL, an upper bound where scores tie; [P, K] gold gained; [P, K] proxy gained. All gains
        are the unbiased estimates over the subsets of n samples (`stats.best_of_n_values`), less those of n = 1.

    Raises:
        ValueError: as `stats.best_of_n_values`.
    """
    d = np.array([math.sqrt(max(0.0, kl.best_of_n_kl(n))) for n in ns])
    gained = []
    for judge in (gold, proxy):
        one = stats.best_of_n_values(proxy, judge, 1)
        gained.append(np.stack([stats.best_of_n_values(proxy, judge, n) - one for n in ns], axis=1))
    return d, gained[0], gained[1]


def fits(d: ArrayLike, gains: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Both published forms fitted to the mean curve, with intervals from resampled prompts.

    Args:
        d: [K] distances √KL.
        gains: [P, K] gold gained by each prompt at each distance.

    Returns:
        For each form `alpha`, `beta`, `r_squared` and `peak`, each with the percentile interval over resamples (`peak`
        without a mean or an end where the form never turns), and `turns`: the share of resamples with a peak within the
        distances measured, which is how sure one is of seeing over-optimisation at all.

    Raises:
        ValueError: fewer than two prompts, or as `functional.overoptimisation.fit`.
    """
    x, g = np.asarray(d, dtype=np.float64), np.asarray(gains, dtype=np.float64)
    if g.ndim != 2 or len(g) < 2:
        raise ValueError(
            f"gains have shape {g.shape}: give [prompts, distances], with at least two prompts to resample"
        )
    rng = np.random.default_rng(seed)
    weight = rng.multinomial(len(g), np.full(len(g), 1 / len(g)), size=resamples) / len(g)
    curves = torch.as_tensor(np.concatenate([g.mean(0, keepdims=True), weight @ g]))
    return {form: _one(torch.as_tensor(x), curves, form) for form in FORMS}


def _one(d: torch.Tensor, curves: torch.Tensor, form: Form) -> dict[str, Any]:
    """The fit of the first curve, and the spread of the others about it."""
    found = overoptimisation.fit(d, curves, form)
    out: dict[str, Any] = {}
    for name, value in found._asdict().items():
        # Order statistics, not interpolated: between a finite and an infinite peak there is nothing.
        low, high = torch.quantile(
            value[1:], torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double(), interpolation="nearest"
        )
        ends = [float(value[0]), float(low), float(high)]
        out[name] = dict(zip(("mean", "low", "high"), [e if math.isfinite(e) else None for e in ends], strict=True))
    out["turns"] = float((found.peak[1:] < d.max()).double().mean())
    return out


def lost(gains: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """How much gold is lost between the highest point of the mean curve and its end, paired by prompt.

    The highest point is chosen on one half of the prompts and the loss measured on the other, both ways, for a maximum
    of noisy means is above all of them even where nothing falls.

    Args:
        gains: [P, K] gold gained at rising distances.

    Returns:
        The mean loss with its interval over prompts, or `absent`; above 0 is over-optimisation.
    """
    g = np.asarray(gains, dtype=np.float64)
    order = np.random.default_rng(seed).permutation(len(g))
    loss = np.zeros(len(g))
    for here, there in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        if len(there):
            loss[here] = g[here, int(g[there].mean(0).argmax())] - g[here, -1]
    return concordance.said(lambda: stats.bootstrap_mean(loss))
