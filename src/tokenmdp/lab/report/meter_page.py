"""The page of the meter: how mistakes grow with the length, and where along the response they are made."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from tokenmdp.lab.report.folder import Figures, number
from tokenmdp.lab.report.ink import canvas, colour, dot, fixed_ticks, label_axes, svg, whisker
from tokenmdp.lab.report.words import NONE, fine, marked, span, tick, visible

HERE = Path(__file__).parent


def write(folder: Path, figures: Mapping[str, Any], said: Sequence[str], title: str) -> Path:
    """Write `meter.html` into a run folder; it appears there whole or not at all."""
    target = folder / "meter.html"
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(render(figures, said, title), encoding="utf-8", errors="xmlcharrefreplace")
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def render(figures: Mapping[str, Any], said: Sequence[str], title: str) -> str:
    """The page as text, from what `lab.meter.summary` found."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["marked"] = marked  # which other pages' responses need
    found = Figures(figures)
    return environment.get_template("meter.html.jinja").render(
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),  # ours, without a reader's text in it
        title=visible(title),
        verdict=[visible(line) for line in said],
        coloured=None,
        growth=growth(found),
        steps=by_step(found),
        rows=rows(found),
    )


def growth(found: Figures) -> Markup | None:
    """The cost of the first T steps against T, both on logarithmic scales, between what costs once and what costs for ever.

    None where a cost is 0 at every length.
    """
    lengths = [float(x) for x in found.numbers("lengths") if x]
    cost = [number(row.get("mean")) for row in found.rows("cost.distance")]
    seen = [(T, c, row) for T, c, row in zip(lengths, cost, found.rows("cost.distance"), strict=True) if c and c > 0]
    if not seen:
        return None
    figure, axes = canvas(420, 320, left=48, right=96, top=28, bottom=38)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, path, role in (("worst case", "worst_case.cost", "minus"), ("costs once", "worst_case.linear", "plus")):
        reference = [(T, y) for T, y in zip(lengths, found.numbers(path), strict=True) if y and y > 0]
        if reference:
            x, y = zip(*reference, strict=True)
            axes.plot(x, y, color=colour(role), linewidth=1.4, linestyle=(0, (4, 3)), zorder=2)
            # Beside what was measured, and not over it.
            near = abs(math.log(y[-1] / seen[-1][1])) < 0.5
            _note(axes, x[-1], y[-1], name, role, (9 if y[-1] > seen[-1][1] else -9) if near else 0)
    axes.plot([T for T, _, _ in seen], [c for _, c, _ in seen], color=colour("ppo"), linewidth=2, zorder=4)
    for T, c, row in seen:
        low, high = number(row.get("low")), number(row.get("high"))
        if low is not None and high is not None and low > 0:
            whisker(axes, T, low, high, "ppo")
        dot(axes, T, c, "ppo")
    _note(axes, seen[-1][0], seen[-1][1], "measured", "ppo")
    _decades(axes, lengths)
    label_axes(figure, axes, "T, steps", "expected cost of the first T steps")
    return svg(
        figure, "growth", "The cost of the first T steps against T, with the lines of no and of full compounding"
    )


def by_step(found: Figures) -> Markup | None:
    """The expected cost of each step, in the student's own states and in the teacher's."""
    curves = {name: [x or 0.0 for x in found.numbers(f"by_step.{name}")] for name in ("own", "shown")}
    if not curves["own"]:
        return None
    figure, axes = canvas(420, 320, left=48, right=96, top=28, bottom=38)
    for name, role, label in (("own", "ppo", "own states"), ("shown", "sft", "teacher's states")):
        x = np.arange(1, len(curves[name]) + 1)
        axes.plot(x, curves[name], color=colour(role), linewidth=2, zorder=3)
        _note(axes, float(x[-1]), curves[name][-1], label, role)
    axes.set_ylim(bottom=0)
    label_axes(figure, axes, "step t", "expected cost of step t")
    return svg(figure, "steps", "The expected cost of each step in the student's own states and in the teacher's")


def rows(found: Figures) -> list[list[str]]:
    """A line for each T: the cost with its interval, counted mistakes, worst case, bound, share still going."""
    out = []
    columns = [
        found.numbers(p) for p in ("worst_case.cost", "worst_case.linear", "worst_case.bound_cloning", "still_going")
    ]
    for k, T in enumerate(found.numbers("lengths")):
        cells = [f"{T:g}" if T else NONE]
        for kind in ("distance", "mistakes"):
            interval = Figures({"x": found.rows(f"cost.{kind}")[k]}).interval("x")
            ends = span(interval) if interval and math.isfinite(interval.low) else ""
            cells.append(f"{fine(interval.mean if interval else None)}{f' ({ends})' if ends else ''}")
        out.append([*cells, *(fine(column[k]) for column in columns)])
    return out


def _note(axes: Axes, x: float, y: float, text: str, role: str, shift: float = 0) -> None:
    axes.annotate(
        text, (x, y), xytext=(8, shift), textcoords="offset points", color=colour(role), fontsize=11, va="center",
        annotation_clip=False,
    )  # fmt: skip


def _decades(axes: Axes, lengths: Sequence[float]) -> None:
    """Ticks at the lengths and at whole powers of ten, with no small ones between."""
    low, high = axes.get_ylim()
    powers = [10.0**p for p in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    fixed_ticks(axes, lengths, powers or [low, high])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda v, _: tick(v))
