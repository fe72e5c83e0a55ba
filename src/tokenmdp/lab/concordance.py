"""Does one score put responses in the order that another does: within a prompt, and across prompts?

    concordance   P( s_i > s_j | g_i > g_j ),   a tie of s counting one half; pairs that tie in g say nothing

A reward model learned from comparisons within prompts is free to add any constant to a prompt: nothing it was asked
says how responses to different prompts compare. Online RL asks it just that, since one batch holds many prompts.

The unit of resampling is the prompt, for pairs across prompts too: both of a pair's prompts are drawn anew. Scores that
are missing are NaN, and the pairs they would be in are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from tokenmdp import stats
from tokenmdp.stats import Array, Interval

LEVEL, RESAMPLES = 0.95, 2000


def by_pairs(score: ArrayLike, gold: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """The concordance of two scores over pairs of one prompt and over pairs of two prompts.

    Args:
        score, gold: [P, k] of k responses to each of P prompts; NaN where there is none.

    Returns:
        `same_prompt`, `cross_prompt` and their `difference` (same less cross), each with an interval over resampled
        prompts (`stats.around`: Student's for few), or with `absent` saying why there is none; `same_pairs`, `cross_pairs`
        counted.

    Raises:
        ValueError: shapes that differ or are not [P, k].

    Source: Kendall's τ of those pairs is twice the concordance less 1; the resampling of a two-sample U-statistic by
    its clusters: Obuchowski 1997.
    """
    s, g = _table(score, gold)
    agree, count = _counts(s, g)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(s), np.full(len(s), 1 / len(s)), size=resamples).astype(np.float64)
    same = _ratio(drawn @ agree.diagonal(), drawn @ count.diagonal())
    np.fill_diagonal(once := agree.copy(), 0)
    np.fill_diagonal(often := count.copy(), 0)
    cross = _ratio(((drawn @ once) * drawn).sum(1), ((drawn @ often) * drawn).sum(1))
    sums = [(agree.trace(), count.trace()), (once.sum(), often.sum())]
    same_mean, cross_mean = (float(a / c) if c else np.nan for a, c in sums)
    return {
        "same_prompt": _interval(same_mean, same, len(s), 0, "no two responses to one prompt differ in gold"),
        "cross_prompt": _interval(cross_mean, cross, len(s), 0, "no two responses to different prompts differ in gold"),
        "difference": _interval(same_mean - cross_mean, same - cross, len(s), -1, "one of the two is unknown"),
        "same_pairs": int(count.trace()),
        "cross_pairs": int(often.sum()),
    }


def by_ranks(score: ArrayLike, gold: ArrayLike, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Spearman's correlation of two scores: within prompts, of all responses together, and of the prompts' means.

    Args:
        score, gold: as in `by_pairs`.

    Returns:
        `within` (the mean over prompts with at least three responses that vary in both), `pooled`, `of_means`, each with an
        interval over resampled prompts or `absent`; `prompts_within` counted.

    Raises:
        ValueError: as `by_pairs`.
    """
    s, g = _table(score, gold)
    known = np.isfinite(s)
    inside = [_spearman(a[k], b[k]) for a, b, k in zip(s, g, known, strict=True)]
    within = [r for r in inside if np.isfinite(r)]
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(s), size=(resamples, len(s)))
    draws = np.array([_spearman(s[r][known[r]], g[r][known[r]]) for r in rows])
    some = known.any(1)
    means = [np.where(known, x, 0).sum(1)[some] / known.sum(1)[some] for x in (s, g)]
    return {
        "within": said(lambda: stats.bootstrap_mean(within) if within else _none("no prompt's responses vary in both")),
        "pooled": _interval(_spearman(s[known], g[known]), draws, len(s), -1, "one of the two scores does not vary"),
        "of_means": said(lambda: stats.spearman(*means)),
        "prompts_within": len(within),
    }


def spread(score: ArrayLike) -> dict[str, Any]:
    """How much a score varies in all, within prompts, and what share of its variance lies between prompts.

        σ²_between = max(0, (MSB − MSW) / k),   share = σ²_between / (σ²_between + MSW)

    Means of k samples differ by the samples' own noise too: the share of the sums of squares would be 1/k of pure noise.

    Args:
        score: [P, k]; NaN where there is none.

    Returns:
        `mean`, `total`, `within` (root mean square deviation from the prompt's mean), `between_share` in [0, 1]; that is
        None for a single prompt, and where no prompt has two samples.

    Source: Searle, Casella and McCulloch 1992, section 3.6 (analysis of variance estimators; where prompts have different
    numbers of samples k is (N − Σ k_p² / N) / (P − 1)).
    """
    x = np.asarray(score, dtype=np.float64)
    known = np.isfinite(x)
    value = np.where(known, x, 0.0)
    centre = value.sum() / max(1, known.sum())
    own = value.sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
    total = float(((value - centre) ** 2 * known).sum())
    inside = float(((value - own) ** 2 * known).sum())
    n = max(1, int(known.sum()))
    size = known.sum(1)[known.any(1)]
    P, share = len(size), None
    if 1 < P < n:
        noise = inside / (n - P)
        between = max(0.0, ((total - inside) / (P - 1) - noise) * (P - 1) / (n - float((size**2).sum()) / n))
        share = between / (between + noise) if between > 0 else 0.0
    return {
        "mean": float(centre),
        "total": float(np.sqrt(total / n)),
        "within": float(np.sqrt(inside / n)),
        "between_share": share,
    }


def said(work: Callable[[], Interval]) -> dict[str, Any]:
    """An interval as results write it, or `absent` with the reason where the data allow none."""
    try:
        return work()._asdict()
    except ValueError as why:
        return {"absent": str(why)}


def known(found: Mapping[str, Any]) -> bool:
    """Whether `said` had an interval to say."""
    return "absent" not in found


def _table(score: ArrayLike, gold: ArrayLike) -> tuple[Array, Array]:
    """Both as [P, k], NaN wherever either is missing."""
    s, g = np.asarray(score, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if s.ndim != 2 or s.shape != g.shape or 0 in s.shape:
        raise ValueError(
            f"score has shape {s.shape} and gold {g.shape}: both must be [prompts, samples], with some of each"
        )
    missing = ~(np.isfinite(s) & np.isfinite(g))
    return np.where(missing, np.nan, s), np.where(missing, np.nan, g)


def _counts(s: Array, g: Array) -> tuple[Array, Array]:
    """[P, P] sums over responses i of prompt p and j of prompt q with g_i > g_j: of agreement, and of 1."""
    agree, count = np.zeros((len(s), len(s))), np.zeros((len(s), len(s)))
    with np.errstate(invalid="ignore"):  # comparisons with NaN are False, which leaves them out
        for p in range(len(s)):
            better = g[p][:, None, None] > g[None]  # [k, P, k]
            right = (s[p][:, None, None] > s[None]) + 0.5 * (s[p][:, None, None] == s[None])
            count[p], agree[p] = better.sum((0, 2)), (right * better).sum((0, 2))
    return agree, count


def _ratio(top: Array, bottom: Array) -> Array:
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def _spearman(x: Array, y: Array) -> float:
    """NaN for fewer than three values, or a constant."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(scipy.stats.rankdata(x), scipy.stats.rankdata(y))[0, 1])


def _interval(mean: float, draws: Array, prompts: int, least: float, why: str) -> dict[str, Any]:
    """The interval of a statistic between `least` and 1, resampled over prompts. A rate (`least` is 0) without any spread has
    Wilson's interval for as many trials as prompts: an interval of width zero would look like certainty.
    """
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(mean) or len(draws) == 0:
        return {"absent": why}
    if np.ptp(draws) > 0:
        return stats.bounded(stats.around(draws, mean, prompts, LEVEL), least, 1.0)._asdict()
    if least == 0:
        return stats.wilson(mean * prompts, prompts, LEVEL)._asdict()
    return {"absent": f"{mean:g} in every resample: the prompts say nothing about its spread"}


def _none(why: str) -> Interval:
    raise ValueError(why)
