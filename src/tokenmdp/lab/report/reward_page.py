"""The page of a reward's evaluation: where it is right, whether its probabilities hold, what form does to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from tokenmdp.lab.report import figures
from tokenmdp.lab.report.folder import Figures, number
from tokenmdp.lab.report.words import count, num, percent, signed, span
from tokenmdp.stats import Interval

MOST = 24  # subsets drawn; the table has them all


def sections(summary: Figures) -> dict[str, Any]:
    """Everything the template needs besides what all pages share."""
    rungs, effects = list(accuracies(summary)), list(probes(summary))
    return {
        "tiles": tiles(summary),
        "accuracies": figures.ladder(rungs, "accuracy", "share of pairs ranked right", unit=True) if rungs else None,
        "reliability": reliability(summary),
        "probes": figures.ladder(effects, "probes", "effect on the score, in its spreads") if effects else None,
        "ranks": figures.ladder(list(ranks(summary)), "ranks", "rank correlation with gold")
        if list(ranks(summary))
        else None,
        "rows": [(name, percent(x.mean), span(x, "percent")) for name, x, _ in accuracies(summary, most=10**6)],
        "counted": [
            (name.replace("_", " "), count(number(value))) for name, value in summary.mapping("pairs.data").items()
        ],
    }


def tiles(summary: Figures) -> list[dict[str, Any]]:
    """Accuracy, calibration, length, leaks; agreement on the policy's samples."""
    out = []

    def tile(label: str, value: str, under: str, role: str = "ink") -> None:
        out.append({"label": label, "value": value, "under": under, "role": role, "bar": None})

    if x := summary.interval("pairs.accuracy"):
        tile("Accuracy", percent(x.mean), span(x, "percent") or "no interval", "accent")
    if x := summary.interval("pairs.longer_is_better"):
        tile("“The longer one”", percent(x.mean), span(x, "percent") or "no interval", "sft")
    for name, words in (("ece", "as trained"), ("ece_tempered", "after a temperature")):
        if (error := summary.number(f"pairs.calibration.{name}")) is not None:
            tile("Calibration error", num(error), words)
    if x := summary.interval("pairs.length.score_length_spearman"):
        tile("Score and length", signed(x.mean), span(x) or "no interval")
    if (seen := summary.number("pairs.trained_on.openings")) is not None:
        tile("Seen in training", count(summary.number("pairs.trained_on.pairs")), f"pairs; {count(seen)} openings")
    for name, words in (("same_prompt", "pairs of one prompt"), ("cross_prompt", "pairs of two prompts")):
        if x := summary.interval(f"samples.gold.pairs.{name}"):
            tile("Agrees with gold", percent(x.mean), words, "ppo")
    return out


def accuracies(summary: Figures, most: int = MOST) -> Iterator[figures.Rung]:
    """All pairs, the plain rule, where length speaks against the answer, without what training saw, each subset."""
    named = [
        ("all pairs", "pairs.accuracy", "accent"),
        ("“the longer one”", "pairs.longer_is_better", "sft"),
        ("chosen is shorter", "pairs.length.accuracy_chosen_shorter", "arm3"),
        ("chosen is longer", "pairs.length.accuracy_chosen_longer", "arm3"),
        ("unseen in training", "pairs.trained_on.accuracy_without", "accent"),
        ("of other prompts", "pairs.cross_prompt", "arm4"),
        ("samples, one prompt", "samples.gold.pairs.same_prompt", "ppo"),
        ("samples, two prompts", "samples.gold.pairs.cross_prompt", "ppo"),
    ]
    for name, path, role in named:
        if x := summary.interval(path):
            yield name, x, role
    for name in list(summary.mapping("pairs.subsets"))[:most]:
        if x := _of(summary.mapping("pairs.subsets"), name):
            yield name, x, "arm5"


def probes(summary: Figures) -> Iterator[figures.Rung]:
    """The effect of each probe; what it pays for in one colour, what it marks down in another."""
    found = summary.mapping("pairs.probes.probes")
    for name, probe in found.items():
        if isinstance(probe, Mapping) and (x := _of(probe, "effect")):
            yield name, x, "minus" if x.mean > 0 else "plus"


def ranks(summary: Figures) -> Iterator[figures.Rung]:
    """Spearman's correlations on the samples."""
    for name, key in (("within prompts", "within"), ("all responses", "pooled"), ("prompts' means", "of_means")):
        if x := summary.interval(f"samples.gold.ranks.{key}"):
            yield name, x, "ppo"


def _of(table: Mapping[str, Any], name: str) -> Interval | None:
    """An entry by its name, which is a data set's and may hold dots."""
    return Figures({"x": table.get(name)}).interval("x")


def reliability(summary: Figures) -> Markup | None:
    """The calibration table as a picture: on the trained scale where there is one, else after a temperature."""
    for name in ("table", "table_tempered"):
        rows = summary.rows(f"pairs.calibration.{name}")
        points = [[number(row.get(key)) for key in ("predicted", "observed", "count")] for row in rows]
        known = [(p, o, int(n)) for p, o, n in points if p is not None and o is not None and n is not None and n > 0]
        if known:
            return figures.reliability(known)
    return None
