"""What a prompt policy is worth, from a log of what another policy chose.

    direct   1/N Σ_i Σ_a π(a | q_i) Υ(q_i, a)
    IPS      1/N Σ_i w_i r_i,                                w_i = π(a_i | q_i) / μ(a_i | q_i)
    SNIPS    Σ_i w_i r_i / Σ_i w_i
    DR       1/N Σ_i [ Σ_a π(a | q_i) Υ(q_i, a) + w_i ( r_i − Υ(q_i, a_i) ) ]

N logged trials, μ the logging policy. `direct` is as right as Υ; IPS is unbiased if μ is known and positive wherever π is,
with a variance that grows with w²; SNIPS trades a bias of order 1/N for less of it; DR is unbiased if either μ or Υ is right.

Source: Horvitz & Thompson 1952 (IPS); Swaminathan & Joachims 2015 (SNIPS); Dudík, Langford & Li 2011, eq. 1 (DR).
Differs: intervals resample groups of trials (all of one question), since trials of one question are not independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenmdp.prompting.intervals import grouped_ratio
from tokenmdp.prompting.log import Log
from tokenmdp.stats import Interval

ESTIMATORS = ("direct", "ips", "snips", "dr")
WORTH = 30  # questions that a log must be worth, weighted to a policy, for an estimate to be told
OFF = 0.1  # how far from 1, noise apart, the mean weight may be


@dataclass(frozen=True)
class Overlap:
    """Whether the log says anything about the policy. Trials of one question are taken together: W is the sum of theirs.

    Attributes:
        trials: how many there are.
        effective: (Σ W)² / Σ W², the number of questions the weights are worth.
        largest: the largest W's share of their sum.
        mean: the mean of w, which is 1 in expectation; less by the probability that π gives to prompts to which μ gives
            none, and anything else where the propensities are not those by which prompts were tried.
        margin: three standard errors of `mean` over questions: a log that is what it says is off by more once in 400 times.
    """

    trials: int
    effective: float
    largest: float
    mean: float
    margin: float

    def fault(self, called: str) -> str:
        """Why the log tells nothing of the policy `called` so; empty where it does."""
        if self.effective < WORTH:
            return (
                f"weighted to {called} the log's {self.trials} trials are worth {self.effective:.0f} questions, and an estimate "
                f"takes {WORTH} or more"
            )
        if abs(self.mean - 1) <= max(OFF, self.margin):
            return ""
        why = (
            "in part it asks for prompts that were never tried there, or the propensities are too large"
            if self.mean < 1
            else "the propensities are smaller than the chances by which its prompts were tried"
        )
        return (
            f"weighted to {called} the log's trials have a mean weight of {self.mean:.2f}, where it should be 1: {why}"
        )


def weights(
    log: Log, policy: NDArray[np.float64], propensity: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """[N] w_i = π(a_i | q_i) / μ(a_i | q_i).

    Args:
        policy: [Q, P] π; each row sums to 1.
        propensity: [N] μ of what was tried; None takes the log's own.

    Raises:
        ValueError: the shape is another, a row of π is no distribution, or the log holds no propensities.
    """
    shape = (len(log.queries), len(log.prompts))
    if policy.shape != shape:
        raise ValueError(f"the policy has shape {policy.shape}, the log {shape[0]} queries and {shape[1]} prompts")
    rows = policy[np.unique(log.query)]
    if (rows < 0).any() or not np.allclose(rows.sum(1), 1.0, atol=1e-6):
        raise ValueError("each row of a policy is a distribution over prompts: not negative, with sum 1")
    known = log.propensity if propensity is None else propensity
    if known is None:
        raise ValueError(
            "the log holds no propensities: give those of the policy that chose the prompts (1/P each where all were "
            "tried, or drawn uniformly), or use the direct estimate"
        )
    return policy[log.query, log.prompt] / known


def terms(
    name: str, log: Log, policy: NDArray[np.float64], value: NDArray[np.float64] | None, w: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """[N] what each trial adds to the estimate's mean (for `snips` before it is divided by the mean weight)."""
    if name in ("direct", "dr") and value is None:
        raise ValueError(f"{name} needs Υ, [Q, P] predicted rewards")
    if name != "direct" and w is None:
        raise ValueError(f"{name} needs weights")
    expected = np.zeros(len(log)) if value is None else (policy * value).sum(1)[log.query]
    if name == "direct":
        return expected
    assert w is not None
    if name in ("ips", "snips"):
        return w * log.reward
    if name == "dr":
        assert value is not None
        return expected + w * (log.reward - value[log.query, log.prompt])
    raise ValueError(f"there is no estimator {name!r}: it is one of {', '.join(ESTIMATORS)}")


def estimate(
    name: str,
    log: Log,
    policy: NDArray[np.float64],
    value: NDArray[np.float64] | None = None,
    propensity: NDArray[np.float64] | None = None,
    groups: NDArray[np.int64] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The worth of a policy with its 95 % interval.

    Args:
        name: direct, ips, snips or dr.
        policy: [Q, P] π.
        value: [Q, P] Υ, learned from other trials than these: on its own training trials it would flatter itself.
        propensity: [N] μ of what was tried; None takes the log's own.
        groups: [Q] which queries are one question (`leaks.groups`); None takes each for itself.

    Raises:
        ValueError: what an estimator needs is missing, or fewer than two questions.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"there is no estimator {name!r}: it is one of {', '.join(ESTIMATORS)}")
    w = None if name == "direct" else weights(log, policy, propensity)
    parts = terms(name, log, policy, value, w)
    divisor = w if name == "snips" and w is not None else np.ones(len(log))
    which = (np.arange(len(log.queries)) if groups is None else groups)[log.query]
    return grouped_ratio(parts, divisor, which, resamples, seed)


def difference(
    log: Log,
    policy: NDArray[np.float64],
    other: NDArray[np.float64],
    value: NDArray[np.float64],
    groups: NDArray[np.int64],
    seed: int = 0,
) -> Interval:
    """What a policy is worth more than another, doubly robust and paired, with its 95 % interval; see `estimate`."""
    one, two = (terms("dr", log, p, value, weights(log, p)) for p in (policy, other))
    return grouped_ratio(one - two, np.ones(len(log)), groups[log.query], seed=seed, least=-1.0)


def overlap(w: NDArray[np.float64], question: NDArray[np.int64]) -> Overlap:
    """What the weights say about how far the log speaks of the policy.

    Args:
        w: [N] of the trials.
        question: [N] which question each is of.
    """
    _, at, count = np.unique(question, return_inverse=True, return_counts=True)
    own = np.bincount(at, w)  # W
    total, squares, mean = float(own.sum()), float((own**2).sum()), float(w.mean())
    spread = own - mean * count
    return Overlap(
        trials=len(w),
        effective=total**2 / squares if squares else 0.0,
        largest=float(own.max()) / total if total else 0.0,
        mean=mean,
        margin=3 * float(np.sqrt((spread**2).sum())) / len(w) if len(own) > 1 else float("inf"),
    )


def greedy(choice: NDArray[np.int64], prompts: int) -> NDArray[np.float64]:
    """[Q, P] the policy that takes `choice`, [Q], every time."""
    return np.eye(prompts)[choice]
