"""The page of a prompt log: whether choosing per query pays, by prompt, by kind of query, and where it changed the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenmdp.lab.report import figures
from tokenmdp.lab.report.folder import Figures, number
from tokenmdp.lab.report.words import count, num, percent, signed, span

ROLES = {"random": "muted", "best constant (train)": "sft", "oracle": "arm4"}


def sections(summary: Figures) -> dict[str, Any]:
    """Everything the template needs besides what all pages share."""
    earned, gained = list(choices(summary, "reward")), list(choices(summary, "over_constant"))
    prompts = list(rows(summary, "by_prompt", "rate"))
    kinds = list(rows(summary, "by_cluster", "over_constant"))
    return {
        "tiles": tiles(summary),
        "earned": figures.ladder(earned, "earned", "mean reward of the prompt chosen", unit=True) if earned else None,
        "gained": figures.ladder(gained, "gained", "over the best constant prompt, paired") if gained else None,
        "by_prompt": figures.ladder(prompts, "by-prompt", "share of trials that went well", unit=True)
        if prompts
        else None,
        "by_cluster": figures.ladder(kinds, "by-cluster", "the pick over the best constant prompt") if kinds else None,
        "table": [
            (
                r.get("id"),
                r.get("text"),
                percent(number(r.get("chosen"))),
                num(number(r.get("cost"))),
                percent(number(r.get("cut"))),
            )
            for r in summary.rows("by_prompt")
        ],
        "cut": any(number(r.get("cut")) for r in summary.rows("by_prompt")),
        "clusters": [(r.get("id"), count(number(r.get("queries"))), r.get("text")) for r in summary.rows("by_cluster")],
        "predicted": list(predicted(summary)),
        "overlap": list(overlap(summary)),
        "untold": [n for n, row in summary.mapping("choices").items() if isinstance(row, dict) and row.get("untold")],
        "asked_all": "vote" in summary.mapping("choices") or "confidence" in summary.mapping("choices"),
        "changed": summary.rows("changed"),
        "moved": moved(summary),
    }


def tiles(summary: Figures) -> list[dict[str, Any]]:
    """Size, the constant, the gain, the oracle, how well Υ predicts, and how often two trials agree."""
    out = []

    def tile(label: str, value: str, under: str, role: str = "ink") -> None:
        out.append({"label": label, "value": value, "under": under, "role": role, "bar": None})

    choice = summary.text("choice")
    tile("Questions", count(summary.number("facts.queries")), f"{count(summary.number('facts.trials'))} trials")
    table = summary.mapping("choices")
    for name, label, key, role in (
        ("best constant (train)", "Best constant", "reward", "sft"),
        (choice, "Choosing", "over_constant", "accent"),
        ("oracle", "Oracle", "reward", "arm4"),
    ):
        row = table.get(name)
        if isinstance(row, dict) and row.get("untold"):
            tile(label, "–", "the log does not say", role)
        elif isinstance(row, dict) and (x := Figures({"x": row.get(key)}).interval("x")):
            named = (
                f"Best constant: {best}"
                if name.startswith("best constant") and (best := summary.text("best_constant"))
                else label
            )
            tile(named, num(x.mean) if key == "reward" else signed(x.mean), span(x), role)
    said = Figures({"x": summary.mapping("prediction").get(choice)})
    if (within := said.number("x.auc_within_prompt")) is not None:
        tile("AUC within prompts", num(within), "one half knows nothing of queries")
    if (retest := said.number("x.retest")) is not None:
        tile("Retest agreement", percent(retest), "of two trials; a predictor can do better")
    return out


def choices(summary: Figures, key: str) -> Iterator[figures.Rung]:
    """One rung a way to choose of which the log tells something."""
    for name, row in summary.mapping("choices").items():
        if isinstance(row, dict) and not row.get("untold") and (x := Figures({"x": row.get(key)}).interval("x")):
            yield name, x, ROLES.get(name, "accent")


def overlap(summary: Figures) -> Iterator[tuple[str, ...]]:
    """Of choices that were estimated and not read off: what the log is worth for each, in trials."""
    for name in summary.mapping("choices"):
        found = Figures({"x": summary.mapping("choices").get(name)})
        if (worth := found.number("x.overlap.effective")) is not None:
            trials, largest = count(found.number("x.overlap.trials")), percent(found.number("x.overlap.largest"))
            yield name, count(worth), trials, largest, num(found.number("x.overlap.mean"))


def moved(summary: Figures) -> str:
    """How often the pick is another prompt than the constant, and how often the log can say what that changed."""
    others, both = summary.number("moved.queries"), summary.number("moved.both_tried")
    if others is None or both is None:
        return ""
    said = f"The pick is another prompt than the constant on {count(others)} of {count(summary.number('facts.queries'))} queries"
    return f"{said}." if both == others else f"{said}; on {count(both)} of these the log tried both."


def rows(summary: Figures, part: str, key: str) -> Iterator[figures.Rung]:
    """One rung a row of a table."""
    for row in summary.rows(part):
        if x := Figures({"x": row.get(key)}).interval("x"):
            yield str(row.get("id")), x, "accent"


def predicted(summary: Figures) -> Iterator[tuple[str, ...]]:
    """The proxies' predictions, a row each."""
    for name, row in summary.mapping("prediction").items():
        found = Figures({"x": row})
        kinds = ("accuracy", "precision", "auc", "auc_within_prompt", "ece")
        yield name, *(num(found.number(f"x.{kind}")) for kind in kinds)
