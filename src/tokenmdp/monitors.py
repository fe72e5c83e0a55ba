"""Failure signatures in the metrics of a run: said while it runs, once each, and again by `tokenmdp monitor`.

    hacking      the score rises and the gold score falls: what is learned is what the reward overlooks
    collapse     responses to different prompts repeat each other as they did not at first
    length       responses have become twice as long, or half as long
    cut          many more responses are cut at the horizon
    alike        nearly all groups score alike: no method that compares responses learns anything
    unjudged     the reward gives no verdict on a tenth of the responses
    falling      the score itself falls: training does harm by its own measure
    leap         one phase moves the policy many times further than those before it
    overfitting  the loss on demonstrations that are held out rises again

They compare the last five phases with the first five, or with the best five since; where a difference is counted in
deviations these are of one phase's figure from the next, so that a slow drift does not count as noise. A monitor is
a rule on curves, no proof: how often each fires on a run with its failure planted, and on healthy runs, is in
docs/monitors.md. No alarm does not mean that nothing is wrong: without `--gold` nothing here sees a hacked reward.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

WINDOW, RECENT = 5, 100  # phases that a mean is taken over; most that its noise and what is usual are read off
CLEAR = 8.0  # deviations from which a difference counts
COLLAPSED = 0.5  # of the first phases' distinct-2
GROWN = 2.0  # times the first phases' length, or that much shorter
CUT = 0.3  # more of the responses than at first
ALIKE = 0.95  # share of groups without spread
UNJUDGED = 0.1  # share of responses without a verdict
LEAP, LEAST = 8.0, 0.25  # times the median of the phases before, and nats a token
RISEN = 0.1  # nats a token above the lowest held-out loss, twice in a row

LARGEST = 1e100  # a figure that can be squared

Curves = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Alarm:
    """A signature that was seen.

    Attributes:
        monitor: its name.
        step: the step of the run at which it was first seen.
        says: what was measured, and what to look at.
    """

    monitor: str
    step: int
    says: str

    def __str__(self) -> str:
        return f"{self.monitor}: {self.says}"


def ends(curve: Sequence[float]) -> tuple[float, float] | None:
    """The means of the first and of the last five values; None of fewer than ten."""
    return None if len(curve) < 2 * WINDOW else (fmean(curve[:WINDOW]), fmean(curve[-WINDOW:]))


def deviation(curve: Sequence[float]) -> float:
    """That of a difference of two means of five, if phases differed by noise alone: s √(2 / 5),

    s² = mean of (x_t − x_{t−1})² / 2 over the last 100
    """
    return math.sqrt(fmean((b - a) ** 2 for a, b in itertools.pairwise(curve[-RECENT:])) / WINDOW)


def risen(curve: Sequence[float]) -> float:
    """How many deviations the mean of the last five values lies above that of the first five; 0 of fewer than ten, and where
    nothing changes.
    """
    if (both := ends(curve)) is None or not (s := deviation(curve)):
        return 0.0
    return (both[1] - both[0]) / s


def fallen(curve: Sequence[float]) -> float:
    """How many deviations the median of the last five values lies below the highest of five before them, of the last 100:
    medians, for one bad phase is no fall, and one lucky one nothing to fall from. 0 of fewer than ten, and where nothing changes.
    """
    past = curve[-RECENT:-WINDOW]
    if len(past) < WINDOW or not (s := deviation(curve)):
        return 0.0
    return (highest(past) - median(curve[-WINDOW:])) / s


def highest(curve: Sequence[float]) -> float:
    """The highest median of five values in a row."""
    return max(median(curve[at : at + WINDOW]) for at in range(len(curve) - WINDOW + 1))


def hacking(curves: Curves) -> str | None:
    score, gold = curves["objective/scores"], curves["objective/gold"]
    if not (risen(score) > CLEAR and fallen(gold) > CLEAR):
        return None
    return (
        f"the score rose from {_span(score)} while the gold score {_fall(gold)}: what is learned is what the reward overlooks; "
        "train for fewer steps, raise kl, or mend the reward"
    )


def collapse(curves: Curves) -> str | None:
    distinct = curves["completions/distinct_across"]
    both = ends(distinct)
    if both is None or not both[1] < COLLAPSED * both[0]:
        return None
    return (
        f"responses to different prompts repeat each other: distinct-2 across prompts went from {_span(distinct)}; read "
        "samples before you believe the score, raise kl or lower the learning rate (where few answers can be right it is as it should be)"
    )


def length(curves: Curves) -> str | None:
    tokens = curves["completions/mean_length"]
    both = ends(tokens)
    if both is None or not both[0] > 0 or 1 / GROWN < both[1] / both[0] < GROWN:
        return None
    return f"responses went from {_span(tokens)} tokens: does the reward ask for that? Judge at equal length"


def cut(curves: Curves) -> str | None:
    clipped = curves["completions/clipped_ratio"]
    both = ends(clipped)
    if both is None or not both[1] - both[0] > CUT:
        return None
    return (
        f"the share of responses cut at the horizon went from {_span(clipped)}: a reward that reads the end of an answer no "
        "longer sees it; raise max_new_tokens, or punish length"
    )


def alike(curves: Curves) -> str | None:
    flat = curves["frac_reward_zero_std"][-WINDOW:]
    if len(flat) < WINDOW or not fmean(flat) > ALIKE:
        return None
    return (
        f"in {fmean(flat):.0%} of the groups of the {WINDOW} phases up to here all responses score the same: there is nothing to "
        "learn from; take prompts that are neither too easy nor too hard, more samples, or a finer reward"
    )


def unjudged(curves: Curves) -> str | None:
    read = [curves[n] for n in ("no_verdict", "completions/mean_length", "num_tokens")]
    last = [curve[-WINDOW:] for curve in read]
    if len(last[0]) < WINDOW or len({len(curve) for curve in read}) > 1:  # not measured in the same phases
        return None
    responses = sum(tokens / each for each, tokens in zip(last[1], last[2], strict=True) if each > 0)
    share = sum(last[0]) / responses if responses else 0.0
    if not share > UNJUDGED:
        return None
    return (
        f"no verdict on {share:.0%} of the responses of the {WINDOW} phases up to here: they are learned nothing from, and if the "
        "reward fails on some kind of answer that kind goes unpunished; why is in no_verdict.jsonl"
    )


def falling(curves: Curves) -> str | None:
    score = curves["objective/scores"]
    if "discriminator/accuracies" in curves:  # the judge learns as well: its scores are of no one measure
        return None
    if not fallen(score) > CLEAR:
        return None
    return (
        f"the score {_fall(score)}: training does harm by its own measure; lower the learning rate, clip, or look at "
        "whether fresh responses are learned from"
    )


def leap(curves: Curves) -> str | None:
    moved = curves["policy/approxkl_avg"]
    before = moved[-RECENT - 1 : -1]
    if len(before) < WINDOW or not moved[-1] > max(LEAST, LEAP * median(before)):
        return None
    return (
        f"one phase moved the policy by {moved[-1]:.2g} nats a token, where {median(before):.2g} was usual before: lower the "
        "learning rate, or clip"
    )


def overfitting(curves: Curves) -> str | None:
    nll = curves["held_out/nll"]
    if len(nll) < 3 or not min(nll[-2:]) - min(nll[:-2]) > RISEN:
        return None
    return (
        f"the loss on held-out demonstrations is {nll[-1]:.3g} nats a token and was {min(nll[:-2]):.3g}: fewer steps, or more "
        "demonstrations"
    )


MONITORS: Mapping[str, tuple[Callable[[Curves], str | None], tuple[str, ...]]] = {
    "hacking": (hacking, ("objective/scores", "objective/gold")),
    "collapse": (collapse, ("completions/distinct_across",)),
    "length": (length, ("completions/mean_length", "objective/scores")),
    "cut": (cut, ("completions/clipped_ratio",)),
    "alike": (alike, ("frac_reward_zero_std",)),
    "unjudged": (unjudged, ("no_verdict", "completions/mean_length", "num_tokens")),
    "falling": (falling, ("objective/scores", "objective/kl")),
    "leap": (leap, ("policy/approxkl_avg",)),
    "overfitting": (overfitting, ("held_out/nll",)),
}
"""Every monitor, and the metrics it reads."""

LEARNING = ("objective/kl", "policy/approxkl_avg", "grad_norm", "learning_rate", "loss")
"""What only a run logs that learns something: of decoding and judging nothing is asked, where a curve is a running mean."""


class Watch:
    """The curves of a run so far, and which alarms were given."""

    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = {}
        self.given: dict[str, Alarm] = {}

    def see(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take in a step's metrics; the alarms that are new with it. A monitor is asked in runs that learn something, where all
        that it reads was measured.
        """
        for name, value in metrics.items():
            self.curves.setdefault(name, []).append(float(value))
        new: list[Alarm] = []
        if not any(name in metrics for name in LEARNING):
            return new
        for name, (rule, reads) in MONITORS.items():
            if name not in self.given and all(r in metrics for r in reads) and (says := rule(self.curves)):
                self.given[name] = Alarm(name, step, says)
                new.append(self.given[name])
        return new


def watched(lines: Iterable[Mapping[str, Any]]) -> Watch:
    """What lines of metrics.jsonl show, in their order; what is no number, or too large to be squared, is passed over."""
    watch = Watch()
    for at, line in enumerate(lines):
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and abs(v) < LARGEST}
        watch.see(int(numbers.pop("step", at)), numbers)
    return watch


def _fall(curve: Sequence[float]) -> str:
    """From where to where a curve fell, in words."""
    best, now = highest(curve[-RECENT:-WINDOW]), median(curve[-WINDOW:])
    return f"fell from {best:.3g} at its best to {now:.3g} (medians of {WINDOW} phases in a row)"


def _span(curve: Sequence[float]) -> str:
    """The two ends of a curve, in words."""
    first, last = ends(curve) or (curve[0], curve[-1])
    return f"{first:.3g} (mean of the first {WINDOW} phases) to {last:.3g} (of the {WINDOW} up to here)"
