"""Does PPO win by its clip, or by fresh data? Failure rates of policy gradient and soft Q against staleness x clip.

    python bench/staleness.py --json docs/results/staleness.json

Addition, a character at a time, on the tiny model after behaviour cloning; every run spends the same response tokens,
and all arms have the same learning rate, which is set so that fresh data work for each of them. The arms:

    clip         the clipped surrogate of PPO with group baselines (`grpo`), ratio against the sampler, range 0.2
    no clip      the same with the ratio and without a clip: the importance-weighted policy gradient
    soft Q       path-consistent soft Q-learning (`soft_q`), which has no ratio to clip

and how old the data are when they are learned from:

    fresh        the policy itself samples, and each response is used in one update
    old sampler  the sampler's weights are refreshed every 4 phases
    reused       the policy samples, and each phase is gone through twice, in 4 updates a pass
    stale        both

`fresh` and `stale` with `clip` and `no clip` are the 2 x 2 that separates on-policy data from the clip. Stated before any
run, a run fails if

    below        its final score on held-out prompts is below its start's (the same prompts, the same uniform numbers), or
    collapse     its last training score is less than half of the best it reached (both means of 5 phases), or
    broken       it crashed, or a number was not finite

Rates come with Wilson intervals. The verdict calls an effect of the clip (or of freshness) significant where Fisher's
exact test on the failures, or the probability of improvement of the final scores, leaves no doubt at 5 %; everything else
is "no significant difference".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy import stats as scipy_stats

import common
from tokenmdp import config, stats
from tokenmdp.lab import compare
from tokenmdp.lab.solvers import Metered
from tokenmdp.recipes import grpo, soft_q
from tokenmdp.run import Run

ARMS: dict[str, dict[str, Any]] = {
    "clip": {"recipe": "grpo", "clip": 0.2},
    "no clip": {"recipe": "grpo", "clip": 0.0},
    "soft Q": {"recipe": "soft_q"},
}
LEVELS = {
    "fresh": {"sync": 1, "epochs": 1, "minibatches": 1},
    "old sampler": {"sync": 4, "epochs": 1, "minibatches": 1},
    "reused": {"sync": 1, "epochs": 2, "minibatches": 4},
    "stale": {"sync": 4, "epochs": 2, "minibatches": 4},
}
LEARNING_RATE, WINDOW = 1e-3, 5
THRESHOLDS = {
    "below": "final held-out score below its start's",
    "collapse": f"last training score below half of the best, both means of {WINDOW} phases",
    "broken": "it crashed, or a number was not finite",
}


def name_of(arm: str, level: str, seed: int) -> str:
    return f"{arm}-{level}-{seed}".replace(" ", "_")


def collapsed(scores: Sequence[float], window: int = WINDOW) -> bool:
    """Whether the last mean of `window` phases is below half of the best such mean."""
    means = [sum(scores[i : i + window]) / window for i in range(len(scores) - window + 1)]
    return bool(means) and means[-1] < 0.5 * max(means)


def trial(lab: compare.Lab, arm: str, level: str, seed: int) -> dict[str, Any]:
    """One run; from its folder where it is done."""
    stage = lab.run.stage(name_of(arm, level, seed))
    if (done := stage.result()) is not None:
        return done
    given, judged = lab.given(compare.Trial("start", seed, 1.0))
    choice = dict(ARMS[arm])
    module: Any = {"grpo": grpo, "soft_q": soft_q}[choice.pop("recipe")]
    cfg = module.Config(
        steps=2 * given.tokens // int(given.rows * given.length) + 2,
        prompts=given.prompts,
        samples=given.samples,
        max_new_tokens=given.max_new_tokens,
        learning_rate=LEARNING_RATE,
        kl=given.kl,
        micro_tokens=given.micro_tokens,
        **choice,
        **LEVELS[level],
    )
    start = lab.judgement(given.start, judged, seed)["scores"]
    found: dict[str, Any] = {"start": sum(start) / len(start), "final": sum(start) / len(start), "failure": ""}
    metered = Metered(stage, given.tokens)
    try:
        policy, _ = module.train(cfg, given.start, given.reward, given.task, metered)
        final = lab.judgement(policy, judged, seed)["scores"]
        found["final"] = sum(final) / len(final)
    except (FloatingPointError, ArithmeticError) as fault:
        found |= {"failure": "broken", "message": str(fault)}
    lines = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
    scores = [line["objective/scores"] for line in lines]
    if not found["failure"] and collapsed(scores):
        found["failure"] = "collapse"
    if not found["failure"] and found["final"] < found["start"]:
        found["failure"] = "below"
    found |= {"tokens": metered.meter.spent, "curve": [round(x, 4) for x in scores]}
    found["clipped"] = sum(line.get("policy/clipfrac_avg", 0.0) for line in lines) / max(1, len(lines))
    return stage.finish(found)


def cell(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The failures and final scores of one arm at one level."""
    failed = [f["failure"] for f in found if f["failure"]]
    rate = stats.wilson(len(failed), len(found))
    finals = [float(f["final"]) for f in found]
    return {
        "failures": {kind: failed.count(kind) for kind in THRESHOLDS},
        "failed": len(failed),
        "runs": len(found),
        "rate": [round(x, 4) for x in rate],
        "final": [round(x, 4) for x in finals],
        "iqm": round(stats.interquartile_mean(finals), 4),
        "gain": round(stats.interquartile_mean([f["final"] - f["start"] for f in found]), 4),
        "clipped": round(sum(f["clipped"] for f in found) / len(found), 4),
    }


def effect(better: Mapping[str, Any], worse: Mapping[str, Any]) -> dict[str, Any]:
    """What tells two cells apart: Fisher's exact test on failures, the probability of improvement on final scores."""
    counts = [[c["failed"], c["runs"] - c["failed"]] for c in (better, worse)]
    p = float(scipy_stats.fisher_exact(counts).pvalue)
    wins = stats.improvement(better["final"], worse["final"]) if min(better["runs"], worse["runs"]) > 1 else None
    side = 0 if wins is None else int(wins.low > 0.5) - int(wins.high < 0.5)
    return {
        "failed": [better["failed"], worse["failed"]],
        "fisher_p": round(p, 4),
        "improvement": None if wins is None else [round(x, 4) for x in wins],
        "significant": bool(p < 0.05 or side),
        "direction": side or int(better["failed"] < worse["failed"]) - int(better["failed"] > worse["failed"]),
    }


def sentence(what: str, found: Mapping[str, Any], runs: int) -> str:
    """One effect in words."""
    first, second = found["failed"]
    counts = f"{first} of {runs} runs failed with it, {second} of {runs} without"
    wins = (
        ""
        if found["improvement"] is None
        else f"; a run with it ends higher with probability {found['improvement'][0]:.2f}"
    )
    if not found["significant"]:
        return f"{what}: no significant difference ({counts}{wins})."
    return f"{what} {'helps' if found['direction'] > 0 else 'hurts'} significantly ({counts}{wins})."


def verdict(cells: Mapping[str, Mapping[str, Mapping[str, Any]]], runs: int) -> tuple[dict[str, Any], list[str]]:
    """The 2 x 2 as four effects, soft Q as one, and what they say about takeaway five."""
    effects = {
        "the clip, on fresh data": effect(cells["clip"]["fresh"], cells["no clip"]["fresh"]),
        "the clip, on stale data": effect(cells["clip"]["stale"], cells["no clip"]["stale"]),
        "fresh data, with the clip": effect(cells["clip"]["fresh"], cells["clip"]["stale"]),
        "fresh data, without the clip": effect(cells["no clip"]["fresh"], cells["no clip"]["stale"]),
        "fresh data, for soft Q": effect(cells["soft Q"]["fresh"], cells["soft Q"]["stale"]),
        "clipped policy gradient over soft Q, on fresh data": effect(cells["clip"]["fresh"], cells["soft Q"]["fresh"]),
    }
    words = [sentence(what[0].upper() + what[1:], found, runs) for what, found in effects.items()]

    def helps(name: str) -> bool:
        return bool(effects[name]["significant"] and effects[name]["direction"] > 0)

    clip, fresh = helps("the clip, on stale data"), helps("fresh data, without the clip")
    words.append(
        "Of the two explanations of PPO's stability, "
        + {
            (
                True,
                True,
            ): "both hold here: the clip protects where data are stale, and fresh data do where there is no clip.",
            (True, False): "the conservative update holds here and the fresh data do not show.",
            (False, True): "the nearly on-policy data hold here and the clip does not show.",
            (False, False): "neither shows here at these settings.",
        }[clip, fresh]
    )
    return effects, words


def settings(quick: bool) -> compare.Config:
    """The comparison's own defaults, or few tokens."""
    return compare.Config(**({"budget_tokens": 2000, "warm_steps": 100, "held_out": 40, "answers": 2} if quick else {}))


def said(found: Mapping[str, Any]) -> str:
    """A run that has ended in a few words."""
    return f"{found['final']:.3f} {found['failure']}"


def show(cells: Mapping[str, Mapping[str, Mapping[str, Any]]], words: Sequence[str]) -> None:
    """Failures and final scores, an arm a row, then the verdict."""
    table = Table(title="failed runs, rate [95 %], interquartile mean of final scores", title_justify="left")
    table.add_column("")
    for level in LEVELS:
        table.add_column(level, justify="right")
    for arm, levels in cells.items():
        shown = [
            f"{c['failed']}/{c['runs']} [{c['rate'][1]:.2f}, {c['rate'][2]:.2f}]  {c['iqm']:.3f}"
            for c in levels.values()
        ]
        table.add_row(arm, *shown)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for line in words:
        console.print(line, highlight=False)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--seeds", type=int, default=10)
    out.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folder is")
    out.add_argument("--workers", type=int, default=2, help="runs at a time")
    out.add_argument("--fresh", action="store_true", help="begin anew")
    out.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args: argparse.Namespace = out.parse_args(argv)
    if args.worker:
        common.work(args.worker, trial)
        return {}
    seeds = 1 if args.quick else args.seeds
    folder = args.runs / f"staleness{'-quick' * args.quick}"
    cfg = settings(args.quick)
    again = args.fresh and (folder / "config.json").exists()
    with Run.open(folder, config.plain(cfg), 0, resume=not again, overwrite=again) as run:
        lab = compare.Lab(cfg, run)
        orders = [[arm, level, seed] for seed in range(seeds) for arm in ARMS for level in LEVELS]
        common.conduct(lab, "staleness", orders, name_of, trial, 1 if args.quick else args.workers, __file__, said)
        cells = {
            arm: {level: cell([trial(lab, arm, level, s) for s in range(seeds)]) for level in LEVELS} for arm in ARMS
        }
    effects, words = verdict(cells, seeds)
    results: dict[str, Any] = {
        "command": common.command(),
        **common.machine(),
        "seeds": seeds,
        "budget_tokens": cfg.budget_tokens,
        "learning_rate": LEARNING_RATE,
        "start": lab.about,
        "levels": LEVELS,
        "arms": ARMS,
        "failure": THRESHOLDS,
        "cells": cells,
        "effects": effects,
        "verdict": words,
    }
    common.write(args.json, results)
    show(cells, words)
    return results


if __name__ == "__main__":
    main()
