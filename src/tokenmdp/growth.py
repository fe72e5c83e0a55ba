"""How mistakes grow with the length of a response: the exponent, its interval, and what a worst case would give.

    J(T) = E Σ_{t≤T} c_t  ≈  a T^b,      b by least squares of log J on log T

b near 1: a mistake costs about the same whenever it is made. b near 2: it is paid for at every step that is left, and
the cost of T steps grows with the square of T.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tokenmdp import stats
from tokenmdp.stats import Array, Interval


def halved(longest: int, count: int) -> list[int]:
    """`count` lengths, each about half of the next, up to the longest; fewer where they would not differ.

    Raises:
        ValueError: fewer than two are left.
    """
    found = sorted({round(longest / 2**i) for i in range(count)} - {0})
    if len(found) < 2:
        raise ValueError(f"{count} lengths up to {longest}: a growth needs at least two lengths to be seen at")
    return found


def exponent(lengths: ArrayLike, cost: ArrayLike) -> Array:
    """[R] the least-squares slope b of log J on log T; NaN where a cost is 0, which has no logarithm.

        b = Σ_k (log T_k − mean) log J_k / Σ_k (log T_k − mean)²

    Args:
        lengths: [K] the T, at least two different ones.
        cost: [R, K] or [K] mean costs of that many first steps.

    Raises:
        ValueError: for fewer than two different lengths, one below 1, a negative cost, or shapes that do not match.
    """
    T, J = np.asarray(lengths, dtype=np.float64), np.atleast_2d(np.asarray(cost, dtype=np.float64))
    if T.ndim != 1 or len(set(T.tolist())) < 2 or T.min() < 1:
        raise ValueError(f"lengths are {T.tolist()}: a slope needs at least two different ones, each at least 1")
    if J.shape[1] != len(T) or J.min() < 0:
        raise ValueError(f"cost has shape {J.shape} and least value {J.min():g}: give one cost of at least 0 a length")
    x = np.log(T) - np.log(T).mean()
    positive = (J > 0).all(axis=1)
    slope = np.log(np.where(J > 0, J, 1.0)) @ x / (x @ x)
    return np.asarray(np.where(positive, slope, np.nan), dtype=np.float64)


def growth(
    lengths: ArrayLike,
    cost: ArrayLike,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
    shared_prompts: bool | None = None,
) -> Interval:
    """`exponent` of the mean cost, with an interval that resamples prompts, and seeds where there are several.

    The lengths are of the same responses, so what is drawn is a prompt with all its lengths.

    Args:
        cost: [P, K] the mean cost of each prompt's responses at each length, or [S, P, K] of S seeds.
        shared_prompts: whether prompt p is the same at all seeds; to be said where there are several.

    Raises:
        TypeError, ValueError: as `stats.bootstrap_of_means`, and when no mistake was seen at some length.
    """
    J = np.asarray(cost, dtype=np.float64)
    _seen(lengths, J)
    return stats.bootstrap_of_means(J, lambda means: exponent(lengths, means), level, resamples, seed, shared_prompts)


def growth_difference(
    lengths: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
    shared_prompts: bool | None = None,
) -> Interval:
    """The exponent of a less that of b, paired: seed s and prompt p of both are drawn together.

    Raises:
        TypeError, ValueError: as `growth`, and when the shapes differ.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"costs of shapes {first.shape} and {second.shape}: a paired comparison needs the same of both"
        )
    for J in (first, second):
        _seen(lengths, J)
    K = first.shape[-1]

    def difference(means: Array) -> Array:
        return exponent(lengths, means[:, :K]) - exponent(lengths, means[:, K:])

    both = np.concatenate([first, second], -1)
    return stats.bootstrap_of_means(both, difference, level, resamples, seed, shared_prompts)


def worst_case(error: float, lengths: ArrayLike) -> Array:
    """[K] expected mistakes where the first one is never made good and is made with chance ε at each step.

        J(T) = Σ_{t=1..T} 1 − (1 − ε)^t  =  T − (1 − ε) (1 − (1 − ε)^T) / ε   ≈  ε T² / 2   while ε T is small

    No more than T, and so no straight line on log-log axes: its `exponent` at given lengths is what to compare with.

    Args:
        error: ε, the chance of a mistake in a state the expert gets into.

    Raises:
        ValueError: ε outside [0, 1].

    Source: the bound it stands beside, T² ε, is theorem 2.1 of Ross et al. 2011, due to Ross and Bagnell 2010; this
    is about half of it.
    """
    if not 0 <= error <= 1:
        raise ValueError(f"error is {error}; it is a chance, between 0 and 1")
    T = np.asarray(lengths, dtype=np.float64)
    if error == 0:
        return np.zeros_like(T)
    return np.asarray(T + (1 - error) * np.expm1(T * np.log1p(-error)) / error if error < 1 else T, dtype=np.float64)


def _seen(lengths: ArrayLike, cost: Array) -> None:
    means = cost.reshape(-1, cost.shape[-1]).mean(axis=0)
    for T, mean in zip(np.asarray(lengths).tolist(), means.tolist(), strict=True):
        if mean == 0:
            raise ValueError(
                f"no mistake was seen in the first {T} steps, so there is no growth to fit from there: take more "
                "responses, longer lengths, or the expected cost (`distance`) in place of the counted one"
            )
