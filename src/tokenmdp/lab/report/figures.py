"""The charts of the page: each takes numbers and gives one inline SVG.

Labels stand beside what they name, intervals are drawn wherever they are known, an arm has one colour throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tokenmdp.lab.report.folder import Curve, Figures, number
from tokenmdp.lab.report.ink import canvas, colour, dot, fixed_ticks, label_axes, quiet, svg, whisker
from tokenmdp.lab.report.words import count, num, percent, signed, visible
from tokenmdp.stats import Interval, wilson

Rung = tuple[str, Interval, str]  # what it is called, the figure, the role of its colour
POINTS = 240  # a curve of more than twice as many points is drawn as the means and ranges of so many stretches


@dataclass(frozen=True)
class Path:
    """Points along a budget of KL: √KL on the x axis, a score on the y axis, and what each point is called."""

    root_kl: list[float]
    score: list[float]
    name: list[str]


def path(summary: Figures, curve: str, score: str, name: str) -> Path:
    """`bon_curve` or `ppo_curve` as a path; points without a score or a KL are left out."""
    found = Path([], [], [])
    for row in summary.rows(curve):
        kl, y, label = number(row.get("kl")), number(row.get(score)), number(row.get(name))
        if kl is not None and y is not None:
            found.root_kl.append(math.sqrt(max(kl, 0.0)))  # a sampled estimate of a KL near 0 may fall below it
            found.score.append(y)
            found.name.append(count(label) if label is not None else "")
    return found


# ------------------------------------------------------------ the picture of the page


def frontier(summary: Figures, score: str) -> Markup | None:
    """The gold or the proxy score against √KL: best-of-n's curve, PPO's way through training, and where PPO ended.

    None where none of the three is known.
    """
    best, ppo = path(summary, "bon_curve", score, "n"), path(summary, "ppo_curve", score, "step")
    final, kl = _end(summary, score), summary.interval("kl_nats.ppo")
    if not (best.score or ppo.score or (final and kl)):
        return None
    figure, axes = canvas(370, 330, left=38, right=18, top=28, bottom=38)
    _draw_ppo(axes, ppo)
    _draw_best_of_n(axes, best)
    if final and kl:
        x = math.sqrt(max(kl.mean, 0.0))
        whisker(axes, x, final.low, final.high, "ppo", width=2.2)
        if math.isfinite(kl.low) and math.isfinite(kl.high):
            ends = (math.sqrt(max(kl.low, 0.0)), math.sqrt(max(kl.high, 0.0)))
            whisker(axes, final.mean, *ends, "ppo", vertical=False, width=2.2)
        dot(axes, x, final.mean, "ppo", 9)
        _note(axes, x, final.mean, "PPO, held out", "ppo", (-9, 9), "right", bold=True)
    sft = summary.interval("gold_sft") if score == "gold" else _plain(summary.number("proxy.sft"))
    if sft:
        whisker(axes, 0, sft.low, sft.high, "sft", width=2.2)
        dot(axes, 0, sft.mean, "sft", 9)
        _note(axes, 0, sft.mean, "SFT", "sft", (9, -9), "left", bold=True)
    axes.set_xlim(left=-0.12)
    axes.margins(y=0.12)
    label_axes(figure, axes, "√KL to SFT, √nats a response", f"{score} score")
    return svg(figure, f"frontier-{score}", f"The {score} score against the root of the KL to the SFT policy")


def _draw_best_of_n(axes: Axes, best: Path) -> None:
    if not best.score:
        return
    axes.plot(best.root_kl, best.score, color=colour("bon"), linewidth=2, zorder=4)
    shown = {1, 2, 4, 8, 16, 32, 64, 128, 256, len(best.score)}
    for x, y, n in zip(best.root_kl, best.score, best.name, strict=True):
        if n.isdigit() and int(n) in shown:
            axes.plot([x], [y], "o", markersize=4, color=colour("bon"), zorder=4)
    x, y, n = best.root_kl[-1], best.score[-1], best.name[-1]
    _note(axes, x, y, f"best of {n}", "bon", (-4, 8), "right", bold=True)


def _draw_ppo(axes: Axes, ppo: Path) -> None:
    if not ppo.score:
        return
    axes.plot(ppo.root_kl, ppo.score, color=colour("ppo"), linewidth=1.2, alpha=0.45, zorder=2)
    for at, (x, y) in enumerate(zip(ppo.root_kl, ppo.score, strict=True)):
        axes.plot([x], [y], "o", markersize=4, color=colour("ppo"), alpha=0.25 + 0.6 * at / len(ppo.score), zorder=2)
    middle = len(ppo.score) // 2
    x, y = ppo.root_kl[middle], min(ppo.score[middle:])  # below all that is drawn to the right of it
    _note(axes, x, y, "PPO in training", "ppo", (8, -14), "left")


def _end(summary: Figures, score: str) -> Interval | None:
    return summary.interval("gold_ppo") if score == "gold" else _plain(summary.number("proxy.ppo"))


def _plain(value: float | None) -> Interval | None:
    return None if value is None else Interval(value, math.nan, math.nan)


@dataclass(frozen=True)
class Gain:
    """A gain over SFT by each reward: in standard deviations over SFT samples where known, else in its own units."""

    proxy: float
    gold: Interval


def spreads(summary: Figures) -> tuple[float, float] | None:
    """The standard deviations of proxy and gold over SFT samples; None leaves gains in the rewards' own units."""
    proxy, gold = summary.number("proxy_spread_sft"), summary.number("gold_spread_sft")
    return (proxy, gold) if proxy and gold and proxy > 0 and gold > 0 else None


def gain(summary: Figures, arm: str) -> Gain | None:
    """How far an arm is above SFT by the proxy and by gold; None where one of the four figures is missing."""
    base, end = summary.interval("gold_sft"), summary.interval(f"gold_{arm}")
    proxy_base, proxy = summary.number("proxy.sft"), summary.number(f"proxy.{arm}")
    if base is None or end is None or proxy_base is None or proxy is None:
        return None
    per_proxy, per_gold = spreads(summary) or (1.0, 1.0)
    paired = summary.interval(f"{arm}_minus_sft") or Interval(end.mean - base.mean, math.nan, math.nan)
    return Gain((proxy - proxy_base) / per_proxy, Interval(*(x / per_gold for x in paired)))


def gains(summary: Figures) -> Markup | None:
    """What the proxy promised (its gain over SFT) against what arrived (gold's gain); None without the SFT figures."""
    base, proxy_base = summary.interval("gold_sft"), summary.number("proxy.sft")
    if base is None or proxy_base is None:
        return None
    per_proxy, per_gold = spreads(summary) or (1.0, 1.0)
    figure, axes = canvas(370, 330, left=38, right=18, top=28, bottom=38)
    largest = 0.1
    for curve, role, style in (("bon_curve", "bon", (2.0, 1.0)), ("ppo_curve", "ppo", (1.2, 0.45))):
        rows = [(number(r.get("proxy")), number(r.get("gold"))) for r in summary.rows(curve)]
        known = [(p, g) for p, g in rows if p is not None and g is not None]
        points = [((p - proxy_base) / per_proxy, (g - base.mean) / per_gold) for p, g in known]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour(role), linewidth=style[0], alpha=style[1], zorder=2)
            largest = max(largest, *x, *y)
    for arm, label in (("bon", "best-of-n"), ("ppo", "PPO")):
        if found := gain(summary, arm):
            whisker(axes, found.proxy, found.gold.low, found.gold.high, arm, width=2.2)
            dot(axes, found.proxy, found.gold.mean, arm, 9)
            _note(axes, found.proxy, found.gold.mean, label, arm, (10, -3), "left", bold=True)
            largest = max(largest, found.proxy, found.gold.mean)
    axes.plot(
        [0, largest * 1.1], [0, largest * 1.1], color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)), zorder=1
    )
    _note(axes, largest * 1.06, largest * 1.06, "all of it arrives", "muted", (-8, 2), "right")
    dot(axes, 0, 0, "sft", 9)
    _note(axes, 0, 0, "SFT", "sft", (9, -10), "left", bold=True)
    axes.set_xlim(right=largest * 1.22)
    unit = ", SD of SFT samples" if spreads(summary) else ""
    label_axes(figure, axes, f"proxy gain over SFT{unit}", f"gold gain over SFT{unit}")
    return svg(figure, "gains", "Gain in gold against gain in proxy, over the SFT policy")


def _note(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    role: str,
    offset: tuple[float, float],
    align: str,
    *,
    bold: bool = False,
    size: float = 12,
) -> None:
    """A label beside a point, `offset` pixels away."""
    axes.annotate(
        visible(text, keep=""),
        (x, y),
        offset,
        textcoords="offset points",
        ha=align,
        color=colour(role),
        fontsize=size,
        fontweight="bold" if bold else "normal",
        zorder=6,
        annotation_clip=False,
    )


# ------------------------------------------------------------ curves


def curve(line: Curve, name: str, role: str = "accent", height: float = 150) -> Markup:
    """One metric over steps: every value faint, a centred moving mean strong; long curves as means with their range."""
    figure, axes = canvas(280, height, left=40, right=10, top=8, bottom=24)
    x, y = np.asarray(line.step), np.asarray(line.value)
    if len(x) > 2 * POINTS:
        x, y, low, high = stretches(x, y)
        axes.fill_between(x, low, high, color=colour(role), alpha=0.18, linewidth=0)
    faint = len(x) >= 12
    axes.plot(x, y, color=colour(role), linewidth=1 if faint else 1.8, alpha=0.4 if faint else 1)
    if faint:
        axes.plot(x, smooth(y), color=colour(role), linewidth=2)
    elif len(x) < 6:
        axes.plot(x, y, "o", color=colour(role), markersize=4)
    if y.min() < 0 < y.max():
        axes.axhline(0, color=colour("muted"), linewidth=0.9)
    if np.ptp(y) == 0:  # a flat line would make an axis of meaningless small differences
        room = max(abs(float(y[0])) * 0.1, 1e-3)
        axes.set_ylim(y[0] - room, y[0] + room)
        fixed_ticks(axes, y=[float(y[0])])
    axes.margins(x=0.02, y=0.1)
    return svg(figure, name, f"{line.name} over {len(line.step)} steps")


def smooth(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """A moving mean over about a tenth of the curve, centred; at the ends over what there is of that window."""
    half = max(1, len(y) // 20)
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
    return np.asarray((total[high] - total[low]) / (high - low))


def stretches(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """A long curve as POINTS stretches: the mean step, and the mean, least and greatest value of each."""
    parts = [slice(part[0], part[-1] + 1) for part in np.array_split(np.arange(len(x)), POINTS)]
    return tuple(np.array([f(a[p]) for p in parts]) for a, f in ((x, np.mean), (y, np.mean), (y, np.min), (y, np.max)))


def settled(line: Curve) -> float:
    """Where a curve ends, noise smoothed away."""
    y = np.asarray(line.value)
    return float((smooth(y) if len(y) >= 12 else y)[-1])


def spark(line: Curve, name: str, role: str) -> Markup:
    """A curve without axes, its first and last value written on it: for the strip of steps."""
    figure, axes = canvas(200, 84, left=34, right=38, top=10, bottom=22)
    quiet(axes, grid="")
    axes.spines["bottom"].set_visible(False)
    fixed_ticks(axes, [], [])
    y = np.asarray(line.value)
    drawn = smooth(y) if len(y) >= 12 else y
    axes.plot(line.step, drawn, color=colour(role), linewidth=2.2, solid_capstyle="round")
    floor = float(drawn.min() - 0.1 * (np.ptp(drawn) or 1.0))
    axes.fill_between(line.step, floor, drawn, color=colour(role), alpha=0.12, linewidth=0)
    for x, at, shift, align in ((line.step[0], drawn[0], -6, "right"), (line.step[-1], drawn[-1], 6, "left")):
        dot(axes, x, float(at), role, 6)
        _note(axes, x, float(at), num(float(at)), "ink", (shift, -4), align)
    figure.text(
        34 / 200, 8 / 84, f"step {count(line.step[0])}", color=colour("muted"), fontsize=10.5, ha="left", va="center"
    )
    figure.text(162 / 200, 8 / 84, count(line.step[-1]), color=colour("muted"), fontsize=10.5, ha="right", va="center")
    axes.margins(x=0.01)
    return svg(figure, name, f"{line.name}, first {num(float(drawn[0]))}, last {num(float(drawn[-1]))}")


# ------------------------------------------------------------ one number with its interval


def accuracy(rm: Figures, name: str, width: float, height: float) -> Markup:
    """Held-out accuracy with its interval, between chance and the most that noisy labels allow."""
    figure, axes = canvas(width, height, left=12, right=16, top=26, bottom=24)
    quiet(axes, grid="x")
    value = Interval(*(math.nan if (x := rm.number(k)) is None else x for k in ("accuracy", "low", "high")))
    left = min(0.45, value.low - 0.03 if math.isfinite(value.low) else 0.45, value.mean - 0.03)
    axes.set_xlim(left, 1.0)
    axes.set_ylim(-1, 1)
    fixed_ticks(axes, [0.5, 0.75, 1.0] if left > 0.4 else [0, 0.25, 0.5, 0.75, 1.0], [])
    axes.xaxis.set_major_formatter(lambda x, _: percent(x))
    axes.axvline(0.5, color=colour("muted"), linewidth=1, linestyle=(0, (3, 3)))
    ceiling = rm.number("bayes_accuracy")
    if ceiling is not None:
        axes.axvline(ceiling, color=colour("ink"), linewidth=1.2, linestyle=(0, (3, 3)))
        _note(axes, ceiling, -0.9, "ceiling", "ink", (4, 2), "left")
    _note(axes, 0.5, -0.9, "chance", "muted", (4, 2), "left")
    whisker(axes, 0.1, value.low, value.high, "accent", vertical=False, width=4)
    dot(axes, value.mean, 0.1, "accent", 9)
    _note(axes, value.mean, 0.1, percent(value.mean), "accent", (0, 10), "center", bold=True)
    return svg(figure, name, f"Held-out accuracy {percent(value.mean)}")


def arms(summary: Figures) -> Markup | None:
    """Gold of the three arms with intervals on one scale: for the strip of steps."""
    found = [
        (label, role, interval)
        for key, role, label in (
            ("gold_sft", "sft", "SFT"),
            ("gold_bon", "bon", "best-of-n"),
            ("gold_ppo", "ppo", "PPO"),
        )
        if (interval := summary.interval(key))
    ]
    if not found:
        return None
    figure, axes = canvas(200, 84, left=58, right=14, top=2, bottom=18)
    quiet(axes, grid="x")
    fixed_ticks(axes, None, [])
    for at, (label, role, interval) in enumerate(found):
        whisker(axes, -at, interval.low, interval.high, role, vertical=False, width=3)
        dot(axes, interval.mean, -at, role, 8)
        y = (len(found) - at - 0.5) / len(found) * (64 / 84) + 18 / 84
        figure.text(0, y, label, color=colour(role), fontsize=11, fontweight="bold", va="center")
    axes.set_ylim(-len(found) + 0.5, 0.5)
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    return svg(figure, "arms", "Gold of " + ", ".join(f"{label} {num(i.mean)}" for label, _, i in found))


# ------------------------------------------------------------ the reward model


def reliability(table: Sequence[tuple[float, float, int]]) -> Markup:
    """Predicted against observed frequencies with Wilson intervals, and below how many predictions each bin has."""
    figure, axes = canvas(370, 330, left=40, right=16, top=26, bottom=104)
    axes.plot([0, 1], [0, 1], color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)))
    _note(axes, 1.0, 1.0, "calibrated", "muted", (-24, 0), "right")
    axes.plot([p for p, _, _ in table], [o for _, o, _ in table], color=colour("accent"), linewidth=1.4, alpha=0.6)
    for predicted, observed, size in table:
        interval = wilson(round(observed * size, 6), size)
        whisker(axes, predicted, interval.low, interval.high, "accent", width=1.6)
        dot(axes, predicted, observed, "accent", 8)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.03, 1.03)
    fixed_ticks(axes, [0, 0.25, 0.5, 0.75, 1], [0, 0.25, 0.5, 0.75, 1])
    axes.set_xticklabels([])
    counts = figure.add_axes((40 / 370, 40 / 330, 314 / 370, 48 / 330))
    quiet(counts, grid="")
    fixed_ticks(counts, [0, 0.25, 0.5, 0.75, 1], [])
    width = 0.8 / max(10, len(table))
    for predicted, _, size in table:
        counts.bar(predicted, size, width=width, color=colour("accent"), alpha=0.45)
        counts.annotate(
            f"{size:,}",
            (predicted, size),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=colour("muted"),
        )
    counts.set_xlim(-0.02, 1.02)
    counts.margins(y=0.35)
    label_axes(figure, axes, "predicted probability; bars: number of predictions", "observed frequency")
    return svg(figure, "reliability", f"Calibration of the reward model in {len(table)} bins")


def correlation(value: float) -> Markup:
    """A correlation on its whole scale from −1 to 1."""
    figure, axes = canvas(370, 110, left=12, right=16, top=26, bottom=24)
    quiet(axes, grid="x")
    axes.set_xlim(-1, 1)
    axes.set_ylim(-1, 1)
    fixed_ticks(axes, [-1, -0.5, 0, 0.5, 1], [])
    axes.axvline(0, color=colour("muted"), linewidth=1.2)
    axes.plot([0, value], [0, 0], color=colour("accent"), linewidth=4, solid_capstyle="butt")
    dot(axes, value, 0, "accent", 9)
    _note(axes, value, 0, num(value), "accent", (0, 10), "center", bold=True)
    return svg(figure, "correlation", f"Correlation of the score with length: {num(value)}")


def durations(rows: Sequence[tuple[str, float]]) -> Markup:
    """Where the minutes went, one bar a stage."""
    height = 22 * len(rows) + 8
    figure, axes = canvas(370, height, left=104, right=64, top=2, bottom=4)
    quiet(axes, grid="")
    axes.spines["bottom"].set_visible(False)
    fixed_ticks(axes, [], [])
    for at, (name, value) in enumerate(rows):
        axes.barh(-at, value, height=0.62, color=colour("accent"), alpha=0.8)
        _note(axes, value, -at, f"{value:.1f} min", "ink", (6, -4), "left")
        y = (height - 2 - (at + 0.5) * (height - 6) / len(rows)) / height
        figure.text(0, y, name, color=colour("muted"), fontsize=11, va="center")
    axes.set_ylim(-len(rows) + 0.5, 0.5)
    axes.set_xlim(0, max(value for _, value in rows) or 1)
    return svg(figure, "durations", "Minutes by stage")


def ladder(rungs: Sequence[Rung], name: str, words: str, *, unit: bool = False) -> Markup:
    """One rung a figure, with its interval; the line is one half for shares and 0 for the rest."""
    height = 25 * len(rungs) + 66
    top, bottom = 30, 36
    figure, axes = canvas(560, height, left=142, right=52, top=top, bottom=bottom)
    quiet(axes, grid="x")
    fixed_ticks(axes, [0, 0.25, 0.5, 0.75, 1] if unit else None, [])
    axes.axvline(0.5 if unit else 0, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)))
    for at, (label, x, role) in enumerate(rungs):
        whisker(axes, -at, x.low, x.high, role, vertical=False, width=3)
        dot(axes, x.mean, -at, role, 8)
        y = (height - top - (at + 0.5) * (height - top - bottom) / len(rungs)) / height
        figure.text(0, y, visible(label)[:24], color=colour("ink"), fontsize=11, va="center")
        shown = percent(x.mean) if unit else signed(x.mean)
        figure.text(1, y, shown, color=colour("muted"), fontsize=11, va="center", ha="right")
    axes.set_ylim(-len(rungs) + 0.5, 0.5)
    if unit:
        axes.set_xlim(-0.02, 1.02)
    else:
        axes.margins(x=0.1)
    label_axes(figure, axes, words)
    return svg(figure, name, "; ".join(f"{label} {num(x.mean)}" for label, x, _ in rungs))
