"""What several samples of one prompt tell: how diverse they are, the best of n, right in k attempts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tokenmdp.stats.interval import Array, Interval, bounded, check_finite
from tokenmdp.stats.means import bootstrap_mean
from tokenmdp.stats.rates import wilson


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
        check_finite(x, name)
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
