"""How conservative must an update be? PPO across clip ranges, including none: what is learned, how far a phase moves.

    python bench/clip.py --json docs/results/clip.json --svg docs/results/clip.svg

PPO (`ppo`, with its critic) on addition, a character at a time, on the tiny model after behaviour cloning: the task,
start and judgement of bench/compare.py. Every phase is learned from in 8 updates, so that there is something to hold
back, at two learning rates: 3e-4, which `compare` gives PPO, and 1e-3, at which reused phases do harm (bench/staleness.py).
Every run spends the same response tokens; the clip range is all that differs. For each range and rate

    final     score on held-out prompts, five seeds: interquartile mean with its interval, and the gain over the start
    KL        nats a token that the last of a phase's updates was from the sampler, as the recipe reports it: mean over
              phases, and the largest phase of a run, which is its spike
    clipped   share of tokens whose gradient the clip took

Stated before any run, at the rate 1e-3 (the claim of the perspective paper's third first experiment, "too tight stalls, too
loose spikes"):

    stalls    the tightest range, 0.02, ends below 0.2: the interval of the probability of improvement leaves 1/2 out
    spikes    without a clip the largest phase's KL is above that of 0.2 in the same way
    between   some range strictly between the tightest and none ends highest of all six, on average
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import common
from tokenmdp import config
from tokenmdp.lab import compare, ranking
from tokenmdp.lab.report.ink import canvas, colour, fixed_ticks, label_axes, sheet, svg, whisker
from tokenmdp.lab.solvers import Metered
from tokenmdp.models.heads import Critic
from tokenmdp.recipes import ppo
from tokenmdp.run import Run

CLIPS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.0)  # 0 is none
RATES = (3e-4, 1e-3)
STATED = 1e-3  # the rate of the thresholds
EPOCHS, MINIBATCHES = 2, 4
THRESHOLDS = {
    "stalls": "at 1e-3 the range 0.02 ends below 0.2: P(0.2 ends higher) above 1/2 by its interval",
    "spikes": "at 1e-3 the largest phase's KL without a clip is above that of 0.2: the same of the KL",
    "between": "at 1e-3 the highest mean final score is of a range strictly between 0.02 and none",
}


def name_of(clip: float, rate: float, seed: int) -> str:
    return f"clip-{clip:g}-rate-{rate:g}-{seed}"


def trial(lab: compare.Lab, clip: float, rate: float, seed: int) -> dict[str, Any]:
    """One run; from its folder where it is done."""
    stage = lab.run.stage(name_of(clip, rate, seed))
    if (done := stage.result()) is not None:
        return done
    given, judged = lab.given(compare.Trial("start", seed, 1.0))
    cfg = ppo.Config(
        steps=2 * given.tokens // int(given.rows * given.length) + 2,
        prompts=given.prompts,
        samples=given.samples,
        max_new_tokens=given.max_new_tokens,
        learning_rate=rate,
        critic_learning_rate=3e-3,
        critic_train="all",
        epochs=EPOCHS,
        minibatches=MINIBATCHES,
        clip=clip,
        kl=given.kl,
        micro_tokens=given.micro_tokens,
    )
    start = ranking.mean(lab.judgement(given.start, judged, seed)["scores"])
    found: dict[str, Any] = {"start": start, "final": start, "failure": ""}
    metered = Metered(stage, given.tokens)
    try:
        critic = Critic(given.start.backbone.twin(cfg.critic_train))
        policy, _ = ppo.train(cfg, given.start, critic, given.reward, given.task, metered)
        found["final"] = ranking.mean(lab.judgement(policy, judged, seed)["scores"])
    except ArithmeticError as fault:  # NonFiniteLoss is one: it broke, and counts as its start
        found |= {"failure": str(fault)}
    lines = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
    kl = [line["policy/approxkl_last"] for line in lines]
    found |= {
        "kl_mean": float(np.mean(kl)),
        "kl_largest": max(kl),
        "clipped": float(np.mean([line["policy/clipfrac_avg"] for line in lines])),
        "tokens": metered.meter.spent,
        "curve": [round(line["objective/scores"], 4) for line in lines],
    }
    return stage.finish(found)


def cell(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is said of a range at a rate."""

    def ends(values: Sequence[float]) -> list[float | None]:
        row = ranking.aggregate(values)
        return [None if row[k] is None else round(row[k], 5) for k in ("mean", "low", "high")]

    return {
        "final": [round(f["final"], 4) for f in found],
        "iqm": ends([f["final"] for f in found]),
        "gain": ends([f["final"] - f["start"] for f in found]),
        "broken": sum(bool(f["failure"]) for f in found),
        "kl_mean": ends([f["kl_mean"] for f in found]),
        "kl_largest": [round(f["kl_largest"], 5) for f in found],
        "kl_spike": [  # on the logarithmic scale it is drawn on: a divergence is positive, and spreads by factors
            None if x is None else round(10**x, 6) for x in ends([math.log10(f["kl_largest"]) for f in found])
        ],
        "clipped": round(float(np.mean([f["clipped"] for f in found])), 4),
        "curve": [round(float(x), 4) for x in np.mean(trimmed([f["curve"] for f in found]), axis=0)],
    }


def trimmed(curves: Sequence[Sequence[float]]) -> list[list[float]]:
    """Curves cut to the length of the shortest."""
    length = min(len(c) for c in curves)
    return [list(c[:length]) for c in curves]


def verdict(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each threshold on the cells of the stated rate, by clip range."""
    tight, usual, none = (cells[f"{c:g}"] for c in (CLIPS[0], 0.2, 0.0))
    stalls = ranking.improvement(usual["final"], tight["final"])
    spikes = ranking.improvement(none["kl_largest"], usual["kl_largest"])
    best = max(cells, key=lambda c: float(np.mean(cells[c]["final"])))
    return {
        "stalls": {"passed": ranking.side(stalls) > 0, "p": stalls},
        "spikes": {"passed": ranking.side(spikes) > 0, "p": spikes},
        "between": {"passed": best not in (f"{CLIPS[0]:g}", "0"), "highest": best},
    }


def in_words(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The verdict as a sentence or two."""
    said = {
        "stalls": ("too tight a range stalls", "a range of 0.02 does not end significantly below 0.2"),
        "spikes": (
            "without a clip single phases move further",
            "no clip moves no significantly larger step in its largest phase",
        ),
        "between": ("the best range lies between", "the best of the six lies at an end"),
    }
    parts = [said[name][0 if row["passed"] else 1] for name, row in found.items()]
    best = found["between"]["highest"]
    return f"At the rate {STATED:g}: {'; '.join(parts)} (highest: {'none' if best == '0' else best})."


def picture(results: Mapping[str, Any]) -> str:
    """Final score, and largest KL of a phase on a logarithmic scale, against the range: a colour a rate."""
    width, height = 400.0, 260.0
    figures = [canvas(width, height, left=50, right=16, top=46, bottom=38) for _ in range(2)]
    for k, ((rate, cells), role) in enumerate(zip(results["cells"].items(), ("sft", "bon"), strict=False)):
        for panel, (figure, axes) in enumerate(figures):
            rows = [cells[f"{c:g}"][("iqm", "kl_spike")[panel]] for c in CLIPS]
            shown = [[None if y is None else (y, math.log10(y))[panel] for y in row] for row in rows]
            x = [i + 0.08 * (k - 0.5) for i in range(len(CLIPS))]
            axes.plot(x, [y for y, _, _ in shown], color=colour(role), linewidth=2, marker="o", markersize=4)
            for at, (_, low, high) in zip(x, shown, strict=True):
                if low is not None and high is not None:
                    whisker(axes, at, low, high, role)
            figure.text((50 + 90 * k) / width, 1 - 30 / height, f"rate {rate}", color=colour(role), fontsize=10.5)
    for panel, (figure, axes) in enumerate(figures):
        fixed_ticks(axes, range(len(CLIPS)))
        axes.set_xticklabels(["none" if c == 0 else f"{c:g}" for c in CLIPS])
        label_axes(
            figure, axes, "clip range", ("score on held-out prompts", "largest KL of a phase, nats a token")[panel]
        )
    score, spike = (axes for _, axes in figures)
    score.axhline(results["start_score"], color=colour("muted"), linewidth=1, linestyle=":")
    ends = range(math.floor(spike.get_ylim()[0]), math.ceil(spike.get_ylim()[1]) + 1)
    fixed_ticks(spike, y=ends)
    spike.set_yticklabels([f"{10.0**e:g}" for e in ends])
    about = ("final score by clip range; dotted: the start", "largest KL of a phase by clip range")
    charts = [svg(figure, f"clip-{i}", about[i]) for i, (figure, _) in enumerate(figures)]
    return sheet([charts], width, height)


def said(found: Mapping[str, Any]) -> str:
    """A run that has ended in a few words."""
    return f"{found['final']:.3f}, largest KL {found['kl_largest']:.3g} {found['failure']}"


def show(results: Mapping[str, Any]) -> None:
    """A range a row, for each rate, then the thresholds."""
    for rate, cells in results["cells"].items():
        table = Table(title=f"PPO at rate {rate}, {results['seeds']} seeds", title_justify="left")
        for name in ("clip", "final, IQM [95 %]", "KL a phase", "largest", "clipped", "broken"):
            table.add_column(name, justify="right")
        for clip, c in cells.items():
            low, high = c["iqm"][1:]
            span = "" if low is None else f" [{low:.3f}, {high:.3f}]"
            row = [
                f"{c['iqm'][0]:.3f}{span}",
                f"{c['kl_mean'][0]:.4f}",
                f"{c['kl_spike'][0]:.4f}",
                f"{c['clipped']:.1%}",
            ]
            table.add_row("none" if clip == "0" else clip, *row, str(c["broken"]))
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(table)
    console.print(results["verdict"], highlight=False)
    for name, row in results["passed"].items():
        console.print(f"{'passed' if row['passed'] else 'FAILED'}: {THRESHOLDS[name]}", highlight=False)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--svg", type=Path, metavar="FILE", help="draw the figure there")
    out.add_argument("--seeds", type=int, default=5)
    out.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folder is")
    out.add_argument("--workers", type=int, default=2, help="runs at a time")
    out.add_argument("--fresh", action="store_true", help="begin anew")
    out.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args: argparse.Namespace = out.parse_args(argv)
    if args.worker:
        common.work(args.worker, trial)
        return {}
    seeds, rates = (2, (STATED,)) if args.quick else (args.seeds, RATES)
    folder = args.runs / f"clip{'-quick' * args.quick}"
    few = {"budget_tokens": 2000, "warm_steps": 100, "held_out": 40, "answers": 2}
    cfg = compare.Config(**(few if args.quick else {}))
    again = args.fresh and (folder / "config.json").exists()
    with Run.open(folder, config.plain(cfg), 0, resume=not again, overwrite=again) as run:
        lab = compare.Lab(cfg, run)
        orders = [[clip, rate, seed] for seed in range(seeds) for rate in rates for clip in CLIPS]
        common.conduct(lab, "clip", orders, name_of, trial, 1 if args.quick else args.workers, __file__, said)
        found = {
            f"{rate:g}": {f"{clip:g}": [trial(lab, clip, rate, s) for s in range(seeds)] for clip in CLIPS}
            for rate in rates
        }
    cells = {rate: {clip: cell(runs) for clip, runs in row.items()} for rate, row in found.items()}
    passed = verdict(cells[f"{STATED:g}"])
    results: dict[str, Any] = {
        "command": common.command(),
        **common.machine(),
        "seeds": seeds,
        "budget_tokens": cfg.budget_tokens,
        "updates_a_phase": EPOCHS * MINIBATCHES,
        "start": lab.about,
        "start_score": round(float(np.mean([f["start"] for f in found[f"{STATED:g}"]["0.2"]])), 4),
        "thresholds": THRESHOLDS,
        "passed": passed,
        "verdict": in_words(passed),
        "cells": cells,
    }
    common.write(args.json, results)
    if args.svg:
        args.svg.parent.mkdir(parents=True, exist_ok=True)
        args.svg.write_text(picture(results), encoding="utf-8")
    show(results)
    return results


if __name__ == "__main__":
    main()
