"""Charts as inline SVG that follow the page: its fonts, its colours, its light and its dark.

matplotlib does the geometry. Colours are drawn as stand-in hex values, one for each role a colour can play, and become
CSS variables afterwards, so the reader's colour scheme decides what they look like. Text stays text (selectable, and in
the page's font). Ids are prefixed with the chart's name, so that many charts can live in one page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from tokenmdp.lab.report.words import tick, visible

# What a colour means, and the colour matplotlib is given in its place. The page's style sheet defines `--ROLE`.
ROLES = {
    name: f"#0a{index:02x}0f"
    for index, name in enumerate(
        ("ink", "muted", "rule", "card", "sft", "bon", "ppo", "arm3", "arm4", "arm5", "accent", "plus", "minus"),
        start=1,
    )
}
ARMS = {"sft": "sft", "best_of_n": "bon", "bon": "bon", "ppo": "ppo"}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "chart",
    "text.parse_math": False,
    "path.simplify": True,
    "font.size": 10.5,
}


def colour(role: str) -> str:
    """The stand-in for a role's colour."""
    return ROLES[role]


def arm_role(arm: str, index: int = 0) -> str:
    """The role that colours an arm; arms without a colour of their own take the spare ones in order."""
    return ARMS.get(arm, f"arm{3 + index % 3}")


def canvas(
    width: float, height: float, *, left: float = 40, right: float = 14, top: float = 18, bottom: float = 32
) -> tuple[Figure, Axes]:
    """An empty chart of width x height CSS pixels with margins in pixels: quiet grid, no box."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
    quiet(axes)
    return figure, axes


def quiet(axes: Axes, grid: Literal["x", "y", ""] = "y") -> None:
    """The house style of axes: a base line, light grid lines, small muted tick labels."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colour("rule"))
    axes.tick_params(length=0, colors=colour("muted"), labelsize=11, pad=5)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=colour("rule"), linewidth=0.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: tick(v)))
    axes.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
    axes.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=2))


def label_axes(figure: Figure, axes: Axes, x: str = "", y: str = "") -> None:
    """The names of the axes with their units: x under its right end, y above its upper end, both set upright."""
    width, height = (size * 72 for size in figure.get_size_inches())
    if y:
        figure.text(2 / width, 1 - 9 / height, y, color=colour("muted"), fontsize=11, ha="left", va="center")
    if x:
        figure.text(axes.get_position().x1, 6 / height, x, color=colour("muted"), fontsize=11, ha="right", va="center")


def whisker(
    axes: Axes, x: float, low: float, high: float, role: str, *, vertical: bool = True, width: float = 1.8
) -> None:
    """An interval as a plain line; nothing where an end is not known."""
    if math.isfinite(low) and math.isfinite(high):
        points = ([x, x], [low, high]) if vertical else ([low, high], [x, x])
        axes.plot(*points, color=colour(role), linewidth=width, solid_capstyle="round", zorder=3)


def dot(axes: Axes, x: float, y: float, role: str, size: float = 6, *, hollow: bool = False, marker: str = "o") -> None:
    """One point, ringed in the card's colour so that it stands out of lines."""
    face, edge = (colour("card"), colour(role)) if hollow else (colour(role), colour("card"))
    axes.plot([x], [y], marker=marker, markersize=size, color=face, markeredgecolor=edge, markeredgewidth=1.4, zorder=5)


def fixed_ticks(axes: Axes, x: Sequence[float] | None = None, y: Sequence[float] | None = None) -> None:
    """Put the ticks exactly there."""
    if x is not None:
        axes.xaxis.set_major_locator(FixedLocator(list(x)))
    if y is not None:
        axes.yaxis.set_major_locator(FixedLocator(list(y)))


def svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an inline `<svg>`.

    Args:
        name: letters, digits and hyphens; unique on the page: it prefixes the ids.
        description: what the picture shows, for those who cannot see it.

    Raises:
        ValueError: for a name that could not be part of an id.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError(f"chart name {name!r}: use small letters, digits and hyphens, since ids are made from it")
    for label in figure.findobj(Text):  # labels were put in outside of `canvas`, and a user's $ is a dollar
        label.set_parse_math(False)
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    width, height = (round(size * 72, 2) for size in figure.get_size_inches())
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    said = escape(visible(description, keep=""))
    return Markup(  # the body is matplotlib's own XML, in which it has escaped every label
        f'<svg class="chart" role="img" aria-label="{said}" viewBox="0 0 {width:g} {height:g}" '
        f'style="--width:{width:g}px">{_tidy(body, name)}</svg>'
    )


def _tidy(body: str, name: str) -> str:
    """Take out what a page must not inherit from a chart, and what nobody reads."""
    for pattern in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r"<style.*?</style>"):
        body = re.sub(pattern, "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", body)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r' (d|transform)="([^"]*)"', lambda m: f' {m[1]}="{_short(m[2])}"', body)
    body = re.sub(r' (x|y)="(-?[\d.]+)"', lambda m: f' {m[1]}="{_short(m[2])}"', body)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{name}-", body)
    for role, stand_in in ROLES.items():
        body = body.replace(stand_in, f"var(--{role})")
    body = re.sub(r">\s+<", "><", body)
    return re.sub(r"<defs></defs>|<g></g>", "", body).strip()


def _short(numbers: str) -> str:
    """Coordinates to a tenth of a pixel, on one line."""
    joined = " ".join(numbers.split())
    return re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), joined)


def sheet(charts: Sequence[Sequence[str]], width: float, height: float) -> str:
    """Charts in rows as one SVG file that stands alone: their places, and the page's light colours.

    Args:
        charts: rows of what `svg` made, each `width` by `height`.
    """
    placed = [
        re.sub(
            r'^<svg class="chart"',
            f'<svg x="{x * width:g}" y="{y * height:g}" width="{width:g}" height="{height:g}"',
            one,
        )
        for y, row in enumerate(charts)
        for x, one in enumerate(map(str, row))
    ]
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    palette = ";".join(dict.fromkeys(re.findall(r"--[a-z]+\d?: #[0-9a-f]{6}", style.partition("@media")[0])))
    size = f"0 0 {max(map(len, charts)) * width:g} {len(charts) * height:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif"><style>:root{{{palette}}}</style>'
        f'<rect width="100%" height="100%" fill="var(--card)"/>{"".join(placed)}</svg>\n'
    )
