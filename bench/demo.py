"""The main job at several seeds: does it reach what it promises?

    python bench/demo.py --seeds 0 1 2 --json docs/results/demo.json

Each seed is `tokenmdp demo` in a process of its own, one after the other, in runs/demo-seed-N. A seed that is finished
is not run again, and one that was killed goes on where it stopped; --fresh begins all of them anew. The figures are
read from each run's summary.json and judged by thresholds that were stated before any run:

    ppo_minus_sft   at every seed the 95 % interval of PPO's gold score minus SFT's, paired by held-out prefix, is above 0
    kl_nats         at every seed the KL of PPO to SFT is below 20 nats a response
    minutes         at every seed the job takes at most 15 minutes, downloads apart, on two cores that multiply bfloat16
                    in hardware; `bfloat16_units` says by what: where it is empty, the figure is no verdict
    peak_gb         at every seed memory peaks at 8 GB or less
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import common

KL_BELOW, MINUTES_AT_MOST, GB_AT_MOST = 20.0, 15.0, 8.0
THRESHOLDS = {
    "ppo_minus_sft": "lower end of the 95 % interval above 0 at every seed",
    "kl_nats": f"below {KL_BELOW:g} at every seed",
    "minutes": f"at most {MINUTES_AT_MOST:g} at every seed, on a machine that multiplies bfloat16 in hardware",
    "peak_gb": f"at most {GB_AT_MOST:g} at every seed",
}


def folder_of(runs: Path, size: str, seed: int) -> Path:
    """Where a seed's run lives."""
    return runs / (f"demo-seed-{seed}" if size == "full" else f"demo-{size}-seed-{seed}")


def finished(folder: Path, size: str, seed: int) -> dict[str, Any] | None:
    """The figures of a seed, or None where its run is not finished."""
    if not (folder / "result.json").is_file() or not (folder / "summary.json").is_file():
        return None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return figures(summary) if (summary["size"], summary["seed"]) == (size, seed) else None


def figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run's summary."""
    gained, rm = summary["ppo_minus_sft"], summary["rm"]
    return {
        **{name: round(summary[name]["mean"], 4) for name in ("gold_sft", "gold_bon", "gold_ppo")},
        "ppo_minus_sft_ci": [round(gained["low"], 4), round(gained["high"], 4)],
        "kl_nats": round(summary["kl_nats"]["ppo"]["mean"], 4),
        "rm_accuracy": round(rm["accuracy"], 4),
        "rm_accuracy_ci": [round(rm["low"], 4), round(rm["high"], 4)],
        "minutes": round(summary["minutes"]["total"], 2),
        "peak_gb": round(summary["peak_gb"], 2),
    }


def judged(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """Each threshold, over all seeds."""
    found = list(seeds.values())
    return {
        "ppo_minus_sft": all(s["ppo_minus_sft_ci"][0] > 0 for s in found),
        "kl_nats": all(s["kl_nats"] < KL_BELOW for s in found),
        "minutes": all(s["minutes"] <= MINUTES_AT_MOST for s in found),
        "peak_gb": all(s["peak_gb"] <= GB_AT_MOST for s in found),
    }


def run_seed(folder: Path, size: str, seed: int, fresh: bool) -> dict[str, Any]:
    """Run (or go on with) one seed.

    Raises:
        RuntimeError: the run failed, or ended without its figures.
    """
    if fresh:
        (folder / "summary.json").unlink(missing_ok=True)
    how = "--overwrite" if fresh and (folder / "config.json").exists() else "--resume"
    line = [sys.executable, "-m", "tokenmdp", "demo", "--size", size, "--seed", str(seed), "--out", str(folder), how]
    code = subprocess.run(line, check=False).returncode
    if code != 0:
        raise RuntimeError(
            f"seed {seed} ended with code {code}; its log is {folder / 'log.txt'}; the same command goes on from there"
        )
    found = finished(folder, size, seed)
    if found is None:
        raise RuntimeError(
            f"seed {seed} left no figures of its own in {folder / 'summary.json'}: run it again with --fresh"
        )
    return found


def show(results: Mapping[str, Any]) -> None:
    """Print a line a seed and the verdict on each threshold."""
    table = Table(title=f"tokenmdp demo, size {results['size']}", title_justify="left")
    for name in ("seed", "SFT", "best-of-n", "PPO", "PPO − SFT", "KL, nats", "reward model", "minutes", "peak GB"):
        table.add_column(name, justify="right")
    for seed, s in results["seeds"].items():
        low, high = s["ppo_minus_sft_ci"]
        golds = [f"{s[name]:.2f}" for name in ("gold_sft", "gold_bon", "gold_ppo")]
        interval, accuracy = f"{low:.2f} to {high:.2f}", f"{s['rm_accuracy']:.2f}"
        table.add_row(
            seed, *golds, interval, f"{s['kl_nats']:.1f}", accuracy, f"{s['minutes']:.1f}", f"{s['peak_gb']:.1f}"
        )
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    for name, passed in results["passed"].items():
        console.print(f"{'passed' if passed else 'FAILED'}: {name}, {results['thresholds'][name]}", highlight=False)
    if not results["bfloat16_units"]:
        console.print(
            "nothing here multiplies bfloat16 in hardware: `minutes` is no verdict on the promise", highlight=False
        )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    out.add_argument("--size", choices=("full", "tiny"), default="full")
    out.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    out.add_argument("--fresh", action="store_true", help="begin every seed anew")
    args: argparse.Namespace = out.parse_args(argv)
    size, seeds = ("tiny", args.seeds[:1]) if args.quick else (args.size, args.seeds)
    results: dict[str, Any] = {
        "command": common.command(),
        "size": size,
        **common.machine(),
        "thresholds": THRESHOLDS,
        "seeds": {},
        "passed": {},
    }
    for seed in seeds:
        folder = folder_of(args.runs, size, seed)
        found = None if args.fresh else finished(folder, size, seed)
        results["seeds"][str(seed)] = found if found is not None else run_seed(folder, size, seed, args.fresh)
    results["passed"] = judged(results["seeds"])
    common.write(args.json, results)
    show(results)
    return results


if __name__ == "__main__":
    main()
