"""Do mistakes compound? How the mistakes of cloning, DAgger and RLHF grow with the length T of a response.

    python bench/compounding.py --json docs/results/compounding.json                   the toys, (a), (b) and quality
    python bench/compounding.py --part real --json docs/results/compounding.json       (c), the embedded model

(a) and (b) are `drift:narrow` and `drift:recoverable`: the same demonstrations, and an exact expert who differs only in
what is right after a mistake (see tasks/drift.py). A seed is a start of the tiny model with demonstrations of its own; all
arms of a seed begin with its clone:

    bc      behaviour cloning of 1,000 demonstrations, at each step of which the hand slips with a chance of 1 %
    dagger  goes on with the same demonstrations and the expert's answers on its own states
    rlhf    pairs of the clone's responses, compared by their mistakes; a reward model of them; policy gradient on it
    rl      the same policy gradient with the true reward: a perfect reward model

(c) is the embedded model cloned (the top blocks) from few responses of a teacher, itself tuned on movie reviews; there
DAgger gets the teacher's whole distribution on the student's states, and RLHF has the teacher as annotator. A cost is
there the total variation between student and teacher, and `start` is the model before any imitation.

The cost of the first T steps is fitted by a T^b at five lengths of the same responses. Intervals are 95 % and resample
seeds and prompts; all seeds are judged on the same prompts, so one draw of prompts serves all of them. Beside
the measured exponent stands that of the worst case, a mistake never made good, for the error in the expert's states at
these lengths. Stated before any run:

    bc on (a)        the exponent's interval lies above 1.5
    bc on (b)        the exponent's interval lies between 0.8 and 1.2
    dagger on (a)    its exponent less that of bc, paired by seed: the interval lies below 0
    quality          on (a), whatever the noise, the exponent's interval of bc lies above 1.5
    bc on (c)        no threshold: the exponent is reported, and called compounding only where its interval lies above 1

What is not significant is said to be so. On two cores the toys take about 10 minutes, (c) about 25; what is finished is
not run again, and --fresh begins anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import common
import compounding_real as real
import compounding_toy as toy
from tokenmdp import growth
from tokenmdp.lab import meter, workers
from tokenmdp.run import Run
from tokenmdp.tasks import drift

THRESHOLDS = {
    "bc on (a)": "the interval of its exponent lies above 1.5",
    "bc on (b)": "the interval of its exponent lies between 0.8 and 1.2",
    "dagger on (a)": "the interval of its exponent less that of bc, paired by seed, lies below 0",
    "quality": "on (a) the interval of bc's exponent lies above 1.5 at every noise",
}


# ------------------------------------------------------------ figures


def row(found: Sequence[meter.Measured], lengths: Sequence[int]) -> dict[str, Any]:
    """One kind of student at several seeds: costs, exponents, errors, worst case; curves by step are left out."""
    figures = meter.summary(found, lengths, shared_prompts=True)
    figures.pop("by_step")
    seeds = [growth.exponent(lengths, m.until("distance", lengths).mean(0))[0] for m in found]
    return {**rounded(figures), "exponent_by_seed": [round(float(b), 3) if np.isfinite(b) else None for b in seeds]}


def difference(
    a: Sequence[meter.Measured], b: Sequence[meter.Measured], lengths: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """What a has more than b, paired by seed and prompt: of the exponent, and of the cost of the longest responses."""
    first, second = (np.stack([m.until("distance", lengths) for m in found]) for found in (a, b))
    try:
        slope: dict[str, Any] = growth.growth_difference(lengths, first, second, shared_prompts=True)._asdict()
    except ValueError as why:
        slope = {"mean": None, "why": str(why)}
    cost = meter.told((first - second)[:, :, -1:], lambda means: means[:, 0], shared_prompts=True)
    return rounded({"exponent": slope, "cost": cost})


def rounded(value: Any) -> Any:
    """Numbers with five significant digits."""
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def inside(interval: Mapping[str, Any], low: float, high: float) -> bool | None:
    """Whether an interval lies between two numbers; None where there is no interval."""
    return bool(low < interval["low"] and interval["high"] < high) if "low" in interval else None


def shown(found: Mapping[str, Any]) -> str:
    """An estimate with its interval."""
    if found["mean"] is None:
        return "–"
    ends = f" [{found['low']:.2f}, {found['high']:.2f}]" if "low" in found else ""
    return f"{found['mean']:.2f}{ends}"


def against(name: str, task: str, gap: Mapping[str, Mapping[str, Any]]) -> str:
    """A comparison with cloning in words."""
    said = []
    for what, key in (("exponent", "exponent"), ("cost at the longest T", "cost")):
        side = None if "low" not in gap[key] else int(gap[key]["low"] > 0) - int(gap[key]["high"] < 0)
        word = {1: "significantly higher", -1: "significantly lower", 0: "not significantly different"}.get(
            side or 0, ""
        )
        said.append(f"{what} {word if side is not None else 'without an interval'} ({shown(gap[key])})")
    return f"{name} against bc on {task}: {said[0]}, {said[1]}."


# ------------------------------------------------------------ the toys


def toys(size: toy.Size, run: Run, seeds: int, arms: Sequence[str]) -> dict[str, Any]:
    """Tables, comparisons and verdicts of (a) and (b), from finished runs."""
    lengths = growth.halved(size.horizon, size.lengths)
    noise = size.noise[0]
    found: dict[str, dict[str, list[meter.Measured]]] = {}
    about: dict[str, Any] = {}
    for arm in arms:
        for kind in drift.KINDS:
            own = [toy.trial(size, run, arm, "" if arm == "bc" else kind, noise, seed) for seed in range(seeds)]
            found.setdefault(kind, {})[arm] = toy.gathered(own, kind)
            about[f"{arm} {kind}"] = [rounded(one["figures"]) for one in own]
    tables = {kind: {arm: row(m, lengths) for arm, m in found[kind].items()} for kind in drift.KINDS}
    gaps = {
        kind: {arm: difference(m, found[kind]["bc"], lengths) for arm, m in found[kind].items() if arm != "bc"}
        for kind in drift.KINDS
    }
    quality: dict[str, dict[str, Any]] = {}
    for share in sorted(size.noise):
        clones = [toy.trial(size, run, "bc", "", share, seed) for seed in range(seeds)]
        quality[f"{share:g}"] = {
            "broken_off": float(np.mean([c["facts"]["broken_off"] for c in clones])),
            **{kind: row(toy.gathered(clones, kind), lengths) for kind in drift.KINDS},
        }
    slope = {kind: tables[kind]["bc"]["exponent"]["distance"] for kind in drift.KINDS}
    noises = [inside(q["narrow"]["exponent"]["distance"], 1.5, 9.0) for q in quality.values()]
    passed = {
        "bc on (a)": inside(slope["narrow"], 1.5, 9.0),
        "bc on (b)": inside(slope["recoverable"], 0.8, 1.2),
        "dagger on (a)": inside(gaps["narrow"]["dagger"]["exponent"], -9.0, 0.0) if "dagger" in arms else None,
        "quality": None if None in noises else all(noises),
    }
    words = [
        f"bc makes mistakes as T^{shown(slope['narrow'])} on (a), where the worst case with its error would give "
        f"{tables['narrow']['bc']['worst_case']['exponent'] or 0:.2f}, and as T^{shown(slope['recoverable'])} on (b).",
        *(against(arm, f"({'ab'[i]})", gap) for i, kind in enumerate(drift.KINDS) for arm, gap in gaps[kind].items()),
        *(f"{name}: {'not told' if ok is None else 'passed' if ok else 'FAILED'} ({THRESHOLDS[name]})" for name, ok in passed.items()),
    ]  # fmt: skip
    return {
        "seeds": seeds,
        "lengths": lengths,
        "noise": noise,
        "thresholds": THRESHOLDS,
        "passed": passed,
        "verdict": words,
        "tables": tables,
        "against_bc": gaps,
        "quality": quality,
        "runs": about,
    }


def conduct(size: toy.Size, run: Run, seeds: int, arms: Sequence[str], count: int, quick: bool) -> None:
    """Do what is not done yet, in `count` processes."""
    line = [sys.executable, str(Path(__file__).resolve()), *(["--quick"] if quick else []), "--worker", str(run.folder)]
    for phase in toy.orders(size, seeds, arms):
        workers.conduct(
            run, "compounding", phase, lambda o: toy.name_of(*o), lambda o: answered(size, run, o), line, count, str
        )


def answered(size: toy.Size, run: Run, order: Sequence[Any]) -> dict[str, float]:
    """Do one run; the mistakes in its longest responses."""
    done = toy.trial(size, run, *order)
    means = {kind: np.mean(np.sum(m["own/mistakes"], axis=1)) for kind, m in done["measured"].items()}
    return {kind: round(float(x), 3) for kind, x in means.items()}


def worker(size: toy.Size, folder: Path) -> None:
    """Be one of the processes that share the runs in `folder`."""

    def hired() -> Callable[[Any], Any]:
        run = workers.run_of(folder)
        return lambda order: answered(size, run, order)

    workers.serve(hired)


# ------------------------------------------------------------ the embedded model


def models(size: real.Size, run: Run, seeds: int, arms: Sequence[str]) -> dict[str, Any]:
    """The students of the embedded model, and their table."""
    lengths = growth.halved(size.horizon, size.lengths)
    begun = real.begin(size, run)
    runs = {"start": [real.trial(size, run, begun, "start", 0)]}
    for seed in range(seeds):
        for arm in arms:
            runs.setdefault(arm, []).append(real.trial(size, run, begun, arm, seed))
    found = {arm: [meter.Measured.of(one["measured"]) for one in own] for arm, own in runs.items()}
    table = {arm: row(m, lengths) for arm, m in found.items()}
    gaps = {arm: difference(m, found["bc"], lengths) for arm, m in found.items() if arm not in ("bc", "start")}
    slope = table["bc"]["exponent"]["distance"]
    side = {True: "errors compound", False: "no significant compounding", None: "that cannot be told"}
    words = [
        f"bc on (c): the distance to the teacher grows as T^{shown(slope)}: {side[inside(slope, 1.0, 9.0)]}.",
        *(against(arm, "(c)", gap) for arm, gap in gaps.items()),
    ]
    return {
        "model": size.model,
        "seeds": seeds,
        "lengths": lengths,
        "verdict": words,
        "table": table,
        "against_bc": gaps,
        "runs": {arm: [rounded(one["figures"]) for one in own] for arm, own in runs.items()},
    }


# ------------------------------------------------------------ what it says


def show(title: str, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Exponents, errors and costs, a kind of student a row."""
    out = Table(title=title, title_justify="left")
    for name in (
        "",
        "exponent",
        "worst case",
        "error, own states",
        "error, shown states",
        "ratio",
        "cost at longest T",
    ):
        out.add_column(name, justify="left" if not name else "right")
    for name, found in table.items():
        error, worst = found["error"], found["worst_case"]["exponent"]
        cells = [shown(error[k]) for k in ("own_states", "shown_states", "ratio")]
        worst_case = "–" if worst is None else f"{worst:.2f}"
        out.add_row(
            name, shown(found["exponent"]["distance"]), worst_case, *cells, shown(found["cost"]["distance"][-1])
        )
    Console(width=None if sys.stdout.isatty() else 150).print(out)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--part", choices=("toy", "real"), default="toy")
    out.add_argument("--seeds", type=int, default=0, help="0: 5 of the toys, 3 of the embedded model")
    out.add_argument("--arms", default="", help="some of them, with commas between; bc is always there")
    out.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folder is")
    out.add_argument("--workers", type=int, default=2, help="runs at a time, of the toys")
    out.add_argument("--fresh", action="store_true", help="begin anew")
    out.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args: argparse.Namespace = out.parse_args(argv)
    logging.disable_progress_bar()  # each run has a bar of its own
    small = toy.QUICK if args.quick else toy.FULL
    if args.worker:
        worker(small, args.worker)
        return {}
    known = toy.ARMS if args.part == "toy" else real.ARMS
    arms = ["bc", *(a for a in known if a != "bc" and (not args.arms or a in args.arms.split(",")))]
    seeds = args.seeds or (2 if args.quick else 5 if args.part == "toy" else 3)
    folder = args.runs / f"compounding-{args.part}{'-quick' * args.quick}"
    again = args.fresh and (folder / "config.json").exists()
    with Run.open(folder, {"part": args.part, "quick": args.quick}, 0, resume=not again, overwrite=again) as run:
        if args.part == "toy":
            conduct(small, run, seeds, arms, 1 if args.quick else args.workers, args.quick)
            part = toys(small, run, seeds, arms)
        else:
            part = models(real.QUICK if args.quick else real.FULL, run, seeds, arms)
    results = {args.part: {"command": common.command(), **common.machine(), **part}}
    tables = {f"({'ab'[i]}) {k}": part["tables"][k] for i, k in enumerate(drift.KINDS)} if args.part == "toy" else {}
    for title, table in tables.items() or [("(c) the embedded model", part["table"])]:
        show(title, table)
    if args.part == "toy":
        show("(a) by noise of the demonstrations", {k: q["narrow"] for k, q in part["quality"].items()})
    for line in part["verdict"]:
        Console(width=None if sys.stdout.isatty() else 150).print(line, highlight=False)
    if args.json is not None and args.json.exists():  # the other part's figures stay
        results = {**json.loads(args.json.read_text(encoding="utf-8")), **results}
    common.write(args.json, results)
    return results


if __name__ == "__main__":
    main()
