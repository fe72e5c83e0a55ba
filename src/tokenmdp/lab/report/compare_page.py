"""The page of a comparison: verdict, aggregates with intervals, learning curves, the table, failures, the record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from tokenmdp.lab.report.folder import Figures, RunFolder, number
from tokenmdp.lab.report.ink import canvas, colour, dot, fixed_ticks, label_axes, quiet, svg, whisker
from tokenmdp.lab.report.words import count, fine, listed, num, percent, signed, span, visible
from tokenmdp.stats import Interval

FAMILIES = {
    "online": ("ppo", "learns while it samples"),
    "preferences": ("arm3", "learns from ranked pairs of the start's responses"),
    "offline": ("arm5", "learns from scored responses of the start"),
    "baseline": ("sft", "the start, and the start cloning as many tokens"),
    "decoding": ("bon", "trains nothing; needs the reward at every use"),
}
GRID = 60  # points of a mean curve


def sections(run: RunFolder, summary: Figures) -> dict[str, Any]:
    """Everything the template needs besides what all pages share."""
    rows = [row for row in summary.rows("rows") if str(row.get("solver", ""))]
    return {
        "tiles": tiles(summary, rows),
        "aggregates": aggregates(rows),
        "curves": curves(summary, rows),
        "table": [_line(row) for row in rows],
        "families": [(role, name, words) for name, (role, words) in FAMILIES.items() if _of(rows, name)],
        "failures": failures(rows),
    }


def _of(rows: Sequence[Mapping[str, Any]], family: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row.get("family") == family]


def _role(row: Mapping[str, Any]) -> str:
    return FAMILIES.get(str(row.get("family")), ("accent", ""))[0]


def _named(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    return next((row for row in rows if row.get("solver") == name), None)


def _interval(row: Mapping[str, Any] | None, path: str) -> Interval | None:
    return None if row is None else Figures(row).interval(path)


# ------------------------------------------------------------ key figures


def tiles(summary: Figures, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The start, cloning, the one that ended highest; what it all cost."""
    trained = [row for row in rows if row.get("family") not in ("baseline", "decoding")]
    shown = [("Start", _named(rows, "start")), ("SFT continued", _named(rows, "sft-more"))]
    shown += [(f"Highest: {trained[0].get('solver')}", trained[0])] if trained else []
    out = []
    for label, row in shown:
        if row is not None and (interval := _interval(row, "iqm")):
            out.append(_tile(label, num(interval.mean), span(interval) or "no interval", _role(row)))
    failed = sum(int(number(row.get("failed")) or 0) for row in trained)
    runs = sum(int(number(row.get("runs")) or 0) for row in trained)
    out.append(_tile("Runs that failed", f"{failed} of {runs}", "crashed, or not above the start"))
    out.append(_tile("Tokens a run", count(summary.number("budget_tokens")), f"{count(summary.number('seeds'))} seeds"))
    if seconds := [(number(row.get("seconds")) or 0.0) * (number(row.get("runs")) or 0.0) for row in rows]:
        out.append(_tile("Time", f"{sum(seconds) / 60:.1f} min", "training, all runs together"))
    return out


def _tile(label: str, value: str, under: str, role: str = "ink") -> dict[str, Any]:
    return {"label": label, "value": value, "under": under, "role": role, "bar": None}


# ------------------------------------------------------------ aggregates


def aggregates(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """Interquartile means, and how likely each is to end above cloning (or the start): sorted as the rows are."""
    start, cloned = _interval(_named(rows, "start"), "iqm"), _interval(_named(rows, "sft-more"), "iqm")
    marks = [(x.mean, name) for name, x in (("start", start), ("SFT continued", cloned)) if x]
    scores = [(row, x) for row in rows if (x := _interval(row, "iqm"))]
    charts: list[tuple[str, Markup]] = []
    if scores:
        words = "interquartile mean over seeds, prompts judged"
        charts.append(("Final score", ladder(scores, "iqm", marks, words, dots=True)))
    other, called = ("sft-more", "SFT continued") if cloned else ("start", "the start")
    won = [(row, x) for row in rows if (x := _interval(row, f"improvement.{other}"))]
    if won:
        words = f"probability that a run ends above one of {called}"
        charts.append((f"Against {called}", ladder(won, "improvement", [(0.5, "even")], words, unit=True)))
    return charts


def ladder(
    rows: Sequence[tuple[Mapping[str, Any], Interval]],
    name: str,
    marks: Sequence[tuple[float, str]],
    words: str,
    *,
    unit: bool = False,
    dots: bool = False,
) -> Markup:
    """One rung a solver: its interval, its estimate, and with `dots` every run of it; `marks` are vertical lines."""
    height = 25 * len(rows) + 66
    top, bottom = 30, 36
    figure, axes = canvas(560, height, left=96, right=48, top=top, bottom=bottom)
    quiet(axes, grid="x")
    fixed_ticks(axes, [0, 0.25, 0.5, 0.75, 1] if unit else None, [])
    for at, (row, interval) in enumerate(rows):
        role = _role(row)
        for score in (number(x) for x in row.get("scores", [])) if dots else ():
            if score is not None:
                axes.plot([score], [-at], "|", color=colour(role), alpha=0.45, markersize=9, zorder=2)
        whisker(axes, -at, interval.low, interval.high, role, vertical=False, width=4)
        dot(axes, interval.mean, -at, role, 8)
        y = 1 - (top + (at + 0.5) * (height - top - bottom) / len(rows)) / height
        figure.text(
            0,
            y,
            visible(str(row["solver"]), keep=""),
            color=colour(role),
            fontsize=11.5,
            fontweight="bold",
            va="center",
        )
        figure.text(1, y, num(interval.mean), color=colour("ink"), fontsize=11.5, va="center", ha="right")
    axes.set_ylim(-len(rows) + 0.5, 0.5)
    if unit:
        axes.set_xlim(-0.02, 1.02)
    else:
        axes.margins(x=0.06)
    for step, (x, label) in enumerate(sorted(marks)):
        axes.axvline(x, color=colour("muted"), linewidth=1.1, linestyle=(0, (3, 3)), zorder=1)
        axes.annotate(
            label,
            (x, 0.5),
            (3 if step else -3, 5),
            textcoords="offset points",
            ha="left" if step or len(marks) == 1 else "right",
            color=colour("muted"),
            fontsize=11,
            annotation_clip=False,
        )
    label_axes(figure, axes, words)
    said = ", ".join(f"{row['solver']} {num(x.mean)}" for row, x in rows)
    return svg(figure, f"ladder-{name}", f"{words}: {said}")


# ------------------------------------------------------------ learning curves


def curves(summary: Figures, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Training score against tokens sampled, a chart a solver, all on one scale; of those that log one."""
    found = [(row, _seeds(row)) for row in rows]
    found = [(row, seeds) for row, seeds in found if seeds]
    if not found:
        return []
    start = _interval(_named(rows, "start"), "iqm")
    every = [y for _, seeds in found for _, ys in seeds for y in ys] + ([start.mean] if start else [])
    room = 0.05 * ((max(every) - min(every)) or 1.0)
    limits = (min(every) - room, max(every) + room)
    budget = summary.number("budget_tokens") or max(x for _, seeds in found for xs, _ in seeds for x in xs)
    charts = []
    for at, (row, seeds) in enumerate(found):
        chart = learning(row, seeds, start.mean if start else None, limits, budget, f"learning-{at}")
        first, last = (float(np.mean([ys[i] for _, ys in seeds])) for i in (0, -1))
        ending = _interval(row, "iqm")
        words = f"in training {num(first)} to {num(last)}" + (f"; held out {num(ending.mean)}" if ending else "")
        charts.append({"title": str(row["solver"]), "chart": chart, "words": words})
    return charts


def _seeds(row: Mapping[str, Any]) -> list[tuple[list[float], list[float]]]:
    """(tokens, score) of every seed that has a curve of two points or more."""
    out = []
    for points in row.get("curves") or []:
        known = [(number(p[0]), number(p[1])) for p in points if isinstance(p, list) and len(p) == 2]
        clean = [(x, y) for x, y in known if x is not None and y is not None]
        if len(clean) >= 2:
            out.append(([x for x, _ in clean], [y for _, y in clean]))
    return out


def learning(
    row: Mapping[str, Any],
    seeds: Sequence[tuple[list[float], list[float]]],
    start: float | None,
    limits: tuple[float, float],
    budget: float,
    name: str,
) -> Markup:
    """Every seed faint, their mean strong, the range between them shaded, and where the start stands."""
    role = _role(row)
    figure, axes = canvas(280, 160, left=40, right=12, top=8, bottom=24)
    x = np.linspace(max(xs[0] for xs, _ in seeds), min(xs[-1] for xs, _ in seeds), GRID)
    drawn: NDArray[np.float64] = np.array([np.interp(x, xs, ys) for xs, ys in seeds])
    axes.fill_between(x, drawn.min(0), drawn.max(0), color=colour(role), alpha=0.16, linewidth=0)
    for xs, ys in seeds:
        axes.plot(xs, ys, color=colour(role), linewidth=0.9, alpha=0.4)
    axes.plot(x, drawn.mean(0), color=colour(role), linewidth=2.2, solid_capstyle="round")
    if start is not None:
        axes.axhline(start, color=colour("sft"), linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set_ylim(*limits)
    axes.set_xlim(0, 1.02 * budget)
    return svg(figure, name, f"Training score of {row['solver']} over tokens sampled, {len(seeds)} seeds")


# ------------------------------------------------------------ the table


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    figures = Figures(row)
    failed = {kind: int(number(n) or 0) for kind, n in figures.mapping("failures").items()}
    runs = count(figures.number("runs"))
    return {
        "name": str(row["solver"]),
        "role": _role(row),
        "family": str(row.get("family", "")),
        "iqm": _cell(figures.interval("iqm")),
        "gain": _cell(figures.interval("gain"), "signed"),
        "over_start": _cell(figures.interval("improvement.start")),
        "over_cloning": _cell(figures.interval("improvement.sft-more")),
        "unjudged": percent(share) if (share := figures.number("no_verdict")) is not None else "–",
        "greedy": num(figures.number("greedy")),
        "kl": num(figures.number("kl")),
        "failed": ("–" if row["solver"] == "start" else f"{sum(failed.values())} of {runs}", _said(failed)),
        "tokens": count(round(figures.number("tokens") or 0)),
        "seconds": fine(figures.number("seconds")),
        "rate": _rate(figures.number("learning_rate")),
        "scores": " ".join(num(number(x)) for x in row.get("scores", [])),
    }


def _cell(interval: Interval | None, show: str = "num") -> tuple[str, str]:
    if interval is None or math.isnan(interval.mean):
        return ("–", "")
    return (signed(interval.mean) if show == "signed" else num(interval.mean), span(interval, show))


def _rate(rate: float | None) -> str:
    """A learning rate with two digits, which scaling leaves it: 1.5e−5; one where the second is a nought."""
    return "–" if rate is None else f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("-", "−")


def _said(failed: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in failed.items() if n)


def failures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Solvers with failed runs, how they failed, and what they said."""
    out = []
    for row in rows:
        failed = {kind: int(number(n) or 0) for kind, n in Figures(row).mapping("failures").items()}
        if sum(failed.values()):
            share = sum(failed.values()) / max(1.0, number(row.get("runs")) or 1.0)
            said = [str(m)[:300] for m in row.get("messages") or []]
            words = listed([f"{kind} at {n}" for kind, n in failed.items() if n])
            out.append(
                {"name": str(row["solver"]), "role": _role(row), "share": percent(share), "words": words, "said": said}
            )
    return out
