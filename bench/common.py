"""What the benches share: runs that alternate, medians, a table, one JSON file.

Two programs timed one after the other meet two different machines: another process wakes up, the clock changes. So the
sides of a bench take turns, A B A B, in one process, and what is reported is the median of each side and their ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tokenmdp import stats
from tokenmdp.lab import compare, workers
from tokenmdp.models.backbone import bfloat16_units, compute_dtype
from tokenmdp.models.policy import Policy

FULL_RUNS, QUICK_RUNS = 5, 3


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags every bench takes."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument(
        "--quick", action="store_true", help=f"{QUICK_RUNS} short runs a side: to see that it works, not to quote"
    )
    out.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    return out


def model_flags(out: argparse.ArgumentParser) -> None:
    """The flags of the benches that run a model of their own."""
    out.add_argument("--model", default="smollm2-135m-instruct", help="a name, a folder or a hub id")
    out.add_argument(
        "--compute", default="auto", choices=("auto", "float32", "bfloat16"), help="type of the matrix products"
    )
    out.add_argument("--threads", type=int, default=0, help="threads of torch; 0 leaves torch's choice")
    out.add_argument(
        "--runs", type=int, default=0, help=f"runs a side; 0 means {FULL_RUNS}, or {QUICK_RUNS} with --quick"
    )


def runs_of(args: argparse.Namespace) -> int:
    """How many runs a side the flags ask for."""
    return int(args.runs) or (QUICK_RUNS if args.quick else FULL_RUNS)


def alternate(sides: Mapping[str, Callable[[], float]], runs: int, title: str) -> dict[str, list[float]]:
    """Rates of the sides, taken in turns: A B A B.

    Args:
        sides: each does its work once and returns how much it did (tokens, GFLOP).
        runs: turns of each side, after one that is not counted.

    Returns:
        For each side its rates, work a second, in the order they were taken.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=len(sides) * (runs + 1))
        for turn in range(runs + 1):
            for name, work in sides.items():
                start = time.perf_counter()
                done = work()
                seconds = time.perf_counter() - start
                if turn > 0:
                    rates[name].append(done / seconds)
                bar.advance(task)
    return rates


def row(ours: Sequence[float], peer: Sequence[float], unit: str, **more: Any) -> dict[str, Any]:
    """One row of a bench: medians of both sides, their ratio, and every run."""
    mine, theirs = statistics.median(ours), statistics.median(peer)
    return {
        "ratio": round(mine / theirs, 4),
        "ours": round(mine, 2),
        "peer": round(theirs, 2),
        "unit": unit,
        "runs": len(ours),
        "ours_all": [round(x, 2) for x in ours],
        "peer_all": [round(x, 2) for x in peer],
        **more,
    }


def versions() -> dict[str, str]:
    """What was measured with; of our own code the commit."""
    found = {"python": platform.python_version(), "tokenmdp": commit()}
    for package in ("torch", "transformers"):
        found[package] = version(package)
    return found


def commit() -> str:
    """The commit of this checkout, with `-dirty` where what is measured differs from it (a result file that an earlier bench
    rewrote does not); `unknown` outside of one.
    """
    git = ["git", "-C", str(Path(__file__).parents[1])]
    measured = ["src", "bench", "pyproject.toml", "constraints.txt"]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *measured], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + "-dirty" * bool(changed.strip())


def machine() -> dict[str, Any]:
    """The versions, torch's threads and compute type, and what multiplies bfloat16 matrices here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "compute": str(compute_dtype("auto", device)).removeprefix("torch."),
        "bfloat16_units": bfloat16_units(device) or None,
    }


def meta(policy: Policy, runs: int) -> dict[str, Any]:
    """How the rows came about: enough to run the command again and to know what differs."""
    return {
        "command": command(),
        **machine(),
        "compute": str(policy.backbone.compute).removeprefix("torch."),
        "model": policy.name,
        "runs": runs,
    }


def conduct(
    lab: compare.Lab,
    title: str,
    orders: Sequence[Sequence[Any]],
    name: Callable[..., str],
    trial: Callable[..., dict[str, Any]],
    count: int,
    file: str,
    said: Callable[[Any], str],
) -> None:
    """Do what is not done yet of a lab's trials, `trial(lab, *order)` each, in `count` processes that run `file`."""
    line = [sys.executable, str(Path(file).resolve()), "--worker", str(lab.run.folder)]
    workers.conduct(lab.run, title, orders, lambda o: name(*o), lambda o: trial(lab, *o), line, count, said)


def work(folder: Path, trial: Callable[..., dict[str, Any]]) -> None:
    """Be one of the processes that share the trials of the lab in `folder`."""

    def hired() -> Callable[[Any], Any]:
        lab = compare.joined(folder)
        return lambda order: trial(lab, *order)

    workers.serve(hired)


def rounded(interval: stats.Interval) -> dict[str, float]:
    """An interval as result files write it."""
    return {name: round(value, 4) for name, value in interval._asdict().items()}


def command() -> str:
    """The command line, as it can be typed from the repository's root."""
    return shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def write(path: Path | None, rows: Mapping[str, Any]) -> None:
    """Write the rows as JSON, where a file was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def show(title: str, rows: Mapping[str, Mapping[str, Any]], ours: str, peer: str, ratio: str = "ratio") -> None:
    """Print the rows as a table; names that begin with an underscore are not rows."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for name in (ours, peer, "unit", ratio, "runs"):
        shown.add_column(name, justify="left" if name == "unit" else "right")
    for name, r in rows.items():
        if not name.startswith("_"):
            shown.add_row(
                name, f"{r['ours']:,.1f}", f"{r['peer']:,.1f}", r["unit"], f"{r['ratio']:.2f}", str(r["runs"])
            )
    Console(width=None if sys.stdout.isatty() else 120).print(shown)
