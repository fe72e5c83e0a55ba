"""Proxies and choices judged on held-out trials: how well Υ predicts, and what choosing by it earns.

within-prompt AUC   Σ_a n⁺_a n⁻_a AUC_a / Σ_a n⁺_a n⁻_a:  of two queries with one prompt, is the one that went well ranked
                    higher? A proxy that only knows which prompts are good has 1/2 here, however good its pooled AUC.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from tokenmdp import stats
from tokenmdp.prompting import choose, estimate, intervals, leaks, splits, stacked
from tokenmdp.prompting.log import UNKNOWN, Log, retest
from tokenmdp.prompting.proxy import Proxy

CONSTANT = "best constant (train)"


def auc(score: NDArray[np.float64], right: NDArray[np.bool_]) -> float | None:
    """The chance that a success scores above a failure, ties half; None without both."""
    good, bad = int(right.sum()), int((~right).sum())
    if not good or not bad:
        return None
    ranks = scipy.stats.rankdata(score)
    return float((ranks[right].sum() - good * (good + 1) / 2) / (good * bad))


def within_prompt_auc(log: Log, score: NDArray[np.float64]) -> float | None:
    """AUC between trials of one prompt, prompts weighted by their pairs of a success and a failure."""
    total, pairs = 0.0, 0
    for prompt in np.unique(log.prompt):
        at = log.prompt == prompt
        right = log.reward[at] > 0.5
        found = auc(score[at], right)
        if found is not None:
            count = int(right.sum()) * int((~right).sum())
            total, pairs = total + found * count, pairs + count
    return total / pairs if pairs else None


def prediction(log: Log, value: NDArray[np.float64]) -> dict[str, Any]:
    """How well Υ says what held-out trials came to.

    Args:
        value: [Q, P] Υ.

    Returns:
        accuracy and precision at 1/2, AUC pooled and within prompts (a reward above 1/2 being a success), the mean squared
        error, calibration error, and how often two trials agree (`log.retest`; a predictor can do better).
    """
    score, right = value[log.query, log.prompt], log.reward > 0.5
    says = score > 0.5
    error, table = stats.calibration(score, log.reward, bins=10)
    return {
        "trials": len(log),
        "base_rate": float(right.mean()),
        "accuracy": float((says == right).mean()),
        "precision": float(right[says].mean()) if says.any() else None,
        "auc": auc(score, right),
        "auc_within_prompt": within_prompt_auc(log, score),
        "squared_error": float(np.square(score - log.reward).mean()),
        "ece": error,
        "calibration": table,
        "retest": retest(log),
    }


def held_out(
    log: Log,
    makers: Mapping[str, Callable[[], Proxy]],
    folds: int,
    seed: int,
    tell: Callable[[], None] = lambda: None,
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
    """Every query held out once, whole questions at a time: [Q, P] of each proxy, and [Q] the best constant prompt of
    the trials it was held out of. `tell` is called after each fold of each proxy.
    """
    shape = (len(log.queries), len(log.prompts))
    values = {name: np.full(shape, np.nan) for name in makers}
    constant = np.zeros(shape[0], dtype=np.int64)
    for name, make in makers.items():
        for part, value in stacked.out_of_fold(log, make, folds, seed):
            at = part.tried()
            values[name][at] = value[at]
            tell()
    tried = log.tried()
    for learned, held in splits.folds(leaks.groups([log.queries[i] for i in tried]), folds, seed):
        constant[tried[held]] = choose.best_constant(log.of_queries(tried[learned]))
    return values, constant


def abstaining(
    log: Log, value: NDArray[np.float64], constant: NDArray[np.int64], parts: int, seed: int
) -> NDArray[np.int64]:
    """[Q] the pick of held-out predictions where its gain over the constant is significant, else the constant.

    The gain that a question goes by is measured on the held-out predictions of other questions, in `parts` parts.

    Args:
        log: the held-out trials.
    """
    tried, picks = log.tried(), choose.best(value)
    group = leaks.groups(log.queries)
    out = constant.copy()
    for others, mine in splits.folds(group[tried], parts, seed):
        gain = choose.gained(log.of_queries(tried[others]), picks, constant, value, group, seed=seed)
        if gain is not None and gain.low > 0:
            out[tried[mine]] = picks[tried[mine]]
    return out


def choices(
    log: Log,
    chosen: Mapping[str, NDArray[np.int64]],
    constant: NDArray[np.int64],
    seed: int = 0,
    value: NDArray[np.float64] | None = None,
) -> dict[str, dict[str, Any]]:
    """What each way to choose earns on the held-out queries, beside the best constant prompt, chance and the oracle.

    A log that tried (nearly) every prompt on every query is read off. Of one that did not, and says with what
    probability it tried what it tried, everything is estimated (`estimate`, doubly robust); the oracle is then unknown.

    Args:
        log: held-out trials; a choice counts on the queries where it was tried.
        chosen: [Q] prompts by name of the chooser, in the log's numbers of queries and prompts.
        constant: [Q] the best constant prompt of the log that each query was held out of.
        value: [Q, P] Υ, which did not see these trials, for the estimates.

    Returns:
        By name `reward` and `over_constant`, paired by query, each a mean and a 95 % interval that resamples questions;
        `checked`: on what share of the queries that it moved away from the constant both were tried (1 for estimates);
        of estimates `overlap`: how far the log speaks of that policy at all (`estimate.Overlap`); and where the log tells
        nothing of what it gains, `untold`: why. Such figures are of whatever queries are left, and not to be shown.
    """
    table, tried = log.matrix(), log.tried()
    table = table[tried]
    group = leaks.groups(log.queries)
    whole = choose.whole(log)
    picked = {CONSTANT: constant, **chosen}
    if not whole and log.propensity is not None and value is not None:
        return _said(_estimated(log, picked, value, group, seed))
    known = ~np.isnan(table).all(1)
    at, rows = group[tried], np.arange(len(tried))
    earned = {
        "random": np.nanmean(table, axis=1),
        **{name: table[rows, picks[tried]] for name, picks in picked.items()},
        **({"oracle": np.nanmax(np.where(np.isnan(table), -np.inf, table), axis=1)} if whole else {}),
    }
    out: dict[str, dict[str, Any]] = {}
    for name, reward in earned.items():
        both = known & ~np.isnan(reward) & ~np.isnan(earned[CONSTANT])
        moved = (picked[name] != constant)[tried] if name in picked else np.ones(len(tried), dtype=np.bool_)
        out[name] = {
            "reward": intervals.grouped_mean(reward[both], at[both], seed=seed)._asdict(),
            "over_constant": intervals.grouped_mean(
                (reward - earned[CONSTANT])[both], at[both], seed=seed, least=-1.0
            )._asdict(),
            "queries": int(both.sum()),
            "checked": float(both[moved].mean()) if moved.any() else 1.0,
        }
    return _said(out)


def _said(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same, with the reason where a row tells nothing."""
    return {name: {**row, **({"untold": why} if (why := untold(found, name)) else {})} for name, row in found.items()}


def _estimated(
    log: Log,
    picked: Mapping[str, NDArray[np.int64]],
    value: NDArray[np.float64],
    group: NDArray[np.int64],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """What policies are worth by a log that tried part of the prompts, doubly robust."""
    P = len(log.prompts)
    policies = {"random": np.full(value.shape, 1 / P), **{name: estimate.greedy(x, P) for name, x in picked.items()}}
    filled = np.nan_to_num(value)  # of queries that were never tried, which no trial asks for
    return {
        name: {
            "reward": estimate.estimate("dr", log, policy, filled, groups=group, seed=seed)._asdict(),
            "over_constant": estimate.difference(log, policy, policies[CONSTANT], filled, group, seed)._asdict(),
            "queries": len(log.tried()),
            "checked": 1.0,
            "overlap": asdict(estimate.overlap(estimate.weights(log, policy), group[log.query])),
        }
        for name, policy in policies.items()
    }


def after_asking(
    log: Log, constant: NDArray[np.int64], seed: int = 0, scores: Mapping[str, NDArray[np.float64]] | None = None
) -> dict[str, dict[str, Any]]:
    """What it earns to ask every prompt and keep one of the answers: P calls a query, where choosing before takes one.

        confidence   the answer its model was surest of, by the mean log-probability of its tokens
        vote         the number given most often, the earliest of equals (self-consistency over prompts)

    Args:
        log: trials; the first of each query and prompt counts, on the queries where every prompt was tried and the log says
            of every one what a row goes by.
        constant: [Q] the best constant prompt, as in `choices`.
        scores: further numbers a trial, [N] by name, of whose answers the highest is kept.

    Returns:
        As `choices`, with `calls`; nothing of what the log does not say. `left_out` counts the queries of which it says it
        of some prompts only.
    """
    at = np.full((len(log.queries), len(log.prompts)), -1, dtype=np.int64)
    order = np.argsort(-log.repeat, kind="stable")
    at[log.query[order], log.prompt[order]] = order  # of several the last that is written stays: the smallest repeat
    asked = np.flatnonzero((at >= 0).all(1))
    if not len(asked):
        return {}
    trial, rows = at[asked], np.arange(len(asked))
    reward, group = log.reward[trial], leaks.groups(log.queries)[asked]
    base = reward[rows, constant[asked]]
    given = dict(scores or {})
    if log.confidence is not None:
        given = {"confidence": log.confidence, **given}
    earned = {
        name: np.where(
            np.isnan(score[trial]).any(1),
            np.nan,
            reward[rows, np.where(np.isnan(score), -np.inf, score)[trial].argmax(1)],
        )
        for name, score in given.items()
    }
    if log.answer is not None:
        kept = [choose.vote([None if a < 0 else a for a in said]) for said in log.answer[trial].tolist()]
        # Where nobody gave a number, nothing was voted for, and that is wrong.
        voted = np.array(
            [[k is not None and a == k for a in said] for k, said in zip(kept, log.answer[trial], strict=True)]
        )
        worth = np.where(voted.any(1), reward[rows, voted.argmax(1)], 0.0)
        earned["vote"] = np.where((log.answer[trial] == UNKNOWN).any(1), np.nan, worth)
    known = {name: ~np.isnan(value) for name, value in earned.items()}
    return {
        name: {
            "reward": intervals.grouped_mean(value[known[name]], group[known[name]], seed=seed)._asdict(),
            "over_constant": intervals.grouped_mean(
                (value - base)[known[name]], group[known[name]], seed=seed, least=-1.0
            )._asdict(),
            "queries": int(known[name].sum()),
            "checked": 1.0,
            "calls": len(log.prompts),
            "left_out": int((~known[name]).sum()),
        }
        for name, value in earned.items()
        if known[name].any()
    }


def untold(found: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Why the log tells nothing of what the choice `name` gains; empty where it does."""
    if found[name]["checked"] < choose.TOLD:
        return (
            f"where it moves away from the best constant prompt the log tried both on {found[name]['checked']:.0%} of the queries, "
            "and it gives no propensities"
        )
    for who, called in ((name, "this choice"), (CONSTANT, "the best constant prompt")):
        lies = found[who].get("overlap")
        if lies and (fault := estimate.Overlap(**lies).fault(called)):
            return fault
    return ""


def in_words(
    found: Mapping[str, Mapping[str, Any]],
    name: str,
    abstaining: str = "",
    over_one: Mapping[str, float] | None = None,
) -> str:
    """The first line of a report: whether choosing by Υ pays.

    Args:
        name: the choice that always chooses.
        abstaining: the one that chooses where it paid on other questions, if it was judged, too.
        over_one: where the best constant prompt differs between folds, the gain over the one that is best on the whole log. A
            constant that was best on the other folds is by that a little worse than itself on its own, the more so the closer
            two prompts are.
    """
    gain, told = found[name]["over_constant"], ""
    if why := untold(found, name):
        return f"Nothing can be told: {why}."
    if abstaining and gain["low"] > 0 and not found[abstaining]["over_constant"]["low"] > 0:
        told = ", but not reliably: going by what other questions of this log say, one would mostly not have chosen"
    span = f"{_span(gain)} over the best constant prompt{told}"
    if over_one is not None:
        span += f"; which that is differs between folds, and over the one that is best on the whole log it is {_span(over_one)}"
    if gain["low"] > 0:
        sure = not told and (over_one is None or over_one["low"] > 0)
        return f"Choosing a prompt per query {'pays' if sure else 'may pay'} here: {span}."
    if gain["high"] < 0:
        return f"Choosing a prompt per query is worse here: {span}."
    return f"No significant gain from choosing a prompt per query: {span}."


def _span(x: Mapping[str, float]) -> str:
    return f"{x['mean']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]"
