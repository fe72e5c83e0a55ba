"""The record of a run: its config and results as tables, and every curve it logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenmdp.lab.report import figures
from tokenmdp.lab.report.folder import RunFolder, number
from tokenmdp.lab.report.ink import arm_role
from tokenmdp.lab.report.words import count, fine, trend

MOST_CURVES = 48  # of one folder; more would make a page nobody reads


def flat(value: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) rows; lists of plain values stay on one line."""
    rows: list[tuple[str, str]] = []
    for key, inner in value.items():
        name = f"{before}{key}"
        if isinstance(inner, Mapping) and inner:
            rows += flat(inner, f"{name}.")
        else:
            rows.append((name, said(inner)))
    return rows


def grouped(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings as groups of rows: the plain ones first, then each nested part under its own name."""
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    nested = [(str(key), flat(value)) for key, value in config.items() if isinstance(value, Mapping) and value]
    return ([("", flat(plain))] if plain else []) + nested


def said(value: Any) -> str:
    """A setting's value as one reads it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(said(x) for x in value) or "none"
    if value is None:
        return "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def curves_of(run: RunFolder, without: set[tuple[str, str]] | None = None) -> list[dict[str, Any]]:
    """A group of small charts for each folder with metrics, except those already shown as `(folder, metric)`."""
    groups = []
    for at, (where, curves) in enumerate(run.curves.items()):
        lines = [line for line in curves.values() if (where, line.name) not in (without or set())]
        role = (
            {"sft": "sft", "ppo": "ppo"}.get(where, "accent")
            if where in ("", "sft", "ppo", "reward_model")
            else arm_role(where, at)
        )
        charts = [
            {
                "title": line.name,
                "chart": figures.curve(line, f"curve-{at}-{i}", role),
                "words": trend(line.value),
                "steps": len(line.step),
            }
            for i, line in enumerate(lines[:MOST_CURVES])
        ]
        if charts:
            groups.append({"where": where, "charts": charts, "left_out": max(len(lines) - MOST_CURVES, 0)})
    return groups


def key_results(result: Mapping[str, Any], most: int = 8) -> list[dict[str, Any]]:
    """The first figures of result.json as tiles, a mean with its interval as one."""
    rows = _numbers(result)[:most]
    return [{"label": name, "value": fine(x), "under": under, "role": "ink", "bar": None} for name, x, under in rows]


def _numbers(value: Mapping[str, Any], before: str = "") -> list[tuple[str, float, str]]:
    rows: list[tuple[str, float, str]] = []
    for key, inner in value.items():
        if isinstance(inner, Mapping) and (x := number(inner.get("mean"))) is not None:
            low, high = number(inner.get("low")), number(inner.get("high"))
            rows.append((f"{before}{key}", x, "" if low is None or high is None else f"{fine(low)} to {fine(high)}"))
        elif isinstance(inner, Mapping):
            rows += _numbers(inner, f"{before}{key}.")
        elif (x := number(inner)) is not None:
            rows.append((f"{before}{key}", x, ""))
    return rows


def log_table(run: RunFolder, most: int = 8) -> dict[str, Any] | None:
    """The last steps as a table of the metrics that came first; None without metrics."""
    if not run.last:
        return None
    names = list(dict.fromkeys(name for row in run.last for name in row if name != "step"))[:most]
    rows = [[count(number(row.get("step")))] + [fine(number(row.get(name))) for name in names] for row in run.last]
    return {"names": names, "rows": rows}
