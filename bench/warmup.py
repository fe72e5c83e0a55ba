"""Does on-policy learning need its learning rate warmed up? Scores early and late, with a warm-up of 0 and of 10 updates.

    python bench/warmup.py --json docs/results/warmup.json

Adam divides the mean gradient by its root mean square, so its first updates are as long as any later one, while there is no
mean yet to take the noise out of one batch. Supervised recipes warm up by habit; most published on-policy settings do not.

The task is to copy two letters, `ab>`, 600 prompts, from a start that is right in about half of its answers (35 steps of
cloning, another start for each seed); `grpo`, `rloo` and `ppo` at two learning rates, 60 phases of 128 responses. For each run
the drop (the start's score less the mean of phases 2 to 7, both of training prompts) and the score on 76 held-out prompts in
the end, eight responses each. Differences of the two are paired by seed, Student's t over seeds.

Stated before the run, at the higher rate, for each of the three:
    drop    it is smaller with the warm-up: the interval of the difference is below 0
    final   the final score is no lower with it: the interval reaches above 0
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import common
from tokenmdp import stats, tasks
from tokenmdp.models import catalog
from tokenmdp.models.heads import Critic
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import grpo, ppo, reinforce, sft
from tokenmdp.run import Run
from tokenmdp.run.files import read_lines
from tokenmdp.tasks import Task

SOLVERS, RATES, WARMUPS = ("grpo", "rloo", "ppo"), (1e-3, 3e-3), (0, 10)
PHASES, QUICK_PHASES, PROMPTS, SAMPLES, H, RESPONSES = 60, 10, 16, 8, 4, 8
EARLY = slice(1, 7)
THRESHOLDS = {
    "drop": f"at the rate {RATES[-1]:g} the drop is smaller with the warm-up, for each solver: the interval of the difference below 0",
    "final": f"at the rate {RATES[-1]:g} the final score is no lower with it, for each solver: the interval reaches above 0",
}


def begin(runs: Path, seed: int, fresh: bool) -> tuple[Policy, Task]:
    """The task of a seed, and a policy that is right about half of the time."""
    policy = catalog.load("tiny").freeze()
    task = tasks.load("copying", policy, length=2, letters=26, held_out=76, seed=seed)
    task = replace(task, reward=tasks.ExactAnswer())
    assert task.demonstrations is not None, "the task has demonstrations"
    cfg = sft.Config(steps=35, rows=64, learning_rate=5e-3, micro_tokens=1 << 16, evaluate_every=35)
    with opened(runs / f"start-{seed}", seed, fresh) as run:
        if run.result() is None:
            kept, learned = task.demonstrations.select(range(64)), task.demonstrations.select(range(64, 600))
            sft.train(cfg, policy, learned, kept, run)[0].save(run.folder / "model")
            run.finish({})
    return catalog.load(runs / f"start-{seed}" / "model").freeze(), task


def opened(folder: Path, seed: int, fresh: bool) -> Run:
    again = fresh and (folder / "config.json").exists()
    return Run.open(folder, {"bench": folder.name}, seed, resume=not again, overwrite=again)


def right(policy: Policy, task: Task, seed: int) -> float:
    """The share of right answers on held-out prompts; the same uniform numbers for every policy of a seed."""
    assert task.reward is not None, "the task has a verifier"
    b = policy.sample(task.held_out, RESPONSES, Sampling(H), torch.Generator().manual_seed(seed))
    return float(task.reward(b).value.mean())


def trial(
    folder: Path, solver: str, rate: float, warmup: int, start: Policy, task: Task, seed: int, phases: int, fresh: bool
) -> dict[str, Any]:
    """One run; from its folder where it is done."""
    assert task.reward is not None, "the task has a verifier"
    shared = {
        "steps": phases, "prompts": PROMPTS, "samples": SAMPLES, "max_new_tokens": H, "learning_rate": rate,
        "warmup": warmup, "kl": 0.0, "micro_tokens": 1 << 16,
    }  # fmt: skip
    with opened(folder, seed, fresh) as run:
        if (done := run.result()) is not None:
            return done
        if solver == "ppo":
            cfg = ppo.Config(**shared, critic_train="all", critic_learning_rate=3e-3)
            policy, _ = ppo.train(cfg, start, Critic(start.backbone.twin("all")), task.reward, task, run)
        elif solver == "rloo":
            policy, _ = reinforce.train(
                reinforce.Config(**shared, baseline="leave_one_out"), start, task.reward, task, run
            )
        else:
            policy, _ = grpo.train(grpo.Config(**shared), start, task.reward, task, run)
        scores = [line["objective/scores"] for line in read_lines(run.folder / "metrics.jsonl")]
        early = float(np.mean(scores[EARLY]))
        return run.finish({"early": early, "final": right(policy, task, seed), "curve": [round(x, 4) for x in scores]})


def difference(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % interval over seeds."""
    return common.rounded(stats.bootstrap_mean(np.array(values)))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    out.add_argument("--runs", type=Path, default=Path("runs/warmup"), help="where the run folders are")
    out.add_argument("--fresh", action="store_true", help="begin everything anew")
    args = out.parse_args(argv)
    torch.set_num_threads(1)  # a model of this size has nothing for a second thread
    phases = QUICK_PHASES if args.quick else PHASES
    runs = args.runs.with_name(f"{args.runs.name}-quick") if args.quick else args.runs
    results: dict[str, Any] = {
        "command": common.command(), **common.machine(), "phases": phases, "seeds": args.seeds, "thresholds": THRESHOLDS,
        "starts": {}, "cells": {},
    }  # fmt: skip
    found: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for seed in args.seeds:
        start, task = begin(runs, seed, args.fresh)
        known = Sampling(H)
        b = start.sample(task.train[:128], 4, known, torch.Generator().manual_seed(seed))
        assert task.reward is not None
        base = float(task.reward(b).value.mean())
        results["starts"][str(seed)] = {"train": round(base, 4), "held_out": round(right(start, task, seed), 4)}
        for solver in SOLVERS:
            for rate in RATES:
                for warmup in WARMUPS:
                    folder = runs / f"{solver}-{rate:g}-{warmup}-{seed}"
                    made = trial(folder, solver, rate, warmup, start, task, seed, phases, args.fresh)
                    found.setdefault((solver, rate, warmup), []).append({**made, "drop": base - made["early"]})
    for solver in SOLVERS:
        for rate in RATES:
            without, with_ = found[solver, rate, WARMUPS[0]], found[solver, rate, WARMUPS[1]]
            cell: dict[str, Any] = {}
            for key in ("drop", "final"):
                for warmup, rows in zip(WARMUPS, (without, with_), strict=True):
                    cell[f"{key}_{warmup}"] = difference([row[key] for row in rows])
                cell[f"{key}_difference"] = difference([b[key] - a[key] for a, b in zip(without, with_, strict=True)])
            results["cells"][f"{solver} {rate:g}"] = cell
    high = [results["cells"][f"{solver} {RATES[-1]:g}"] for solver in SOLVERS]
    results["passed"] = {
        "drop": all(cell["drop_difference"]["high"] < 0 for cell in high),
        "final": all(cell["final_difference"]["high"] > 0 for cell in high),
    }
    common.write(args.json, results)
    show(results)
    return results


def show(results: Mapping[str, Any]) -> None:
    """Print a line a solver and rate, and the verdicts."""
    table = Table(
        title=f"a warm-up of {WARMUPS[1]} updates against none, {len(results['seeds'])} seeds", title_justify="left"
    )
    for name in ("solver, rate", "drop, none", "drop, with", "difference", "final, none", "final, with", "difference"):
        table.add_column(name, justify="left" if name.startswith("solver") else "right")
    for name, cell in results["cells"].items():
        cells = []
        for key in ("drop", "final"):
            d = cell[f"{key}_difference"]
            cells += [f"{cell[f'{key}_{w}']['mean']:.3f}" for w in WARMUPS]
            cells.append(f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]")
        table.add_row(name, *cells)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    for name, passed in results["passed"].items():
        console.print(f"{'passed' if passed else 'FAILED'}: {name}, {results['thresholds'][name]}", highlight=False)


if __name__ == "__main__":
    main()
