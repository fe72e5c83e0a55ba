"""What asking the expert in the learner's own states is worth, at equal labels: DAgger and distillation against cloning.

    python bench/dagger.py --json docs/results/dagger.json

Two tasks with the same demonstrations (`tasks.drift`), 8 letters, 16 tokens a response; the tiny model, untrained. In
`narrow` a mistake is paid for at every step until it is undone in a way that no demonstration shows; in `recoverable`
it costs once, and what follows is in the demonstrations: the control, where asking should gain nothing. The expert's
hand slips in 5 % of all labels, demonstrated and asked alike, so every learner makes mistakes, and as many labels are
as good in either way. A label is the expert's action in one state; the arms that have as many of them:

    bc         behaviour cloning of demonstrations
    dagger     demonstrations for an eighth of the labels, then the learner's own states, aggregated
    kd         distillation on the same demonstrations: the teacher's whole distribution at each of their states
    gkd        half demonstrations, half the student's own prefixes, by the blend js:0.5
    on-policy  the student's own prefixes alone, by the reverse KL

and beside them `start` (nothing learned), `bc` with twice the labels, `expert` (its own slipping hand, the floor), and
`teacher` (the model that the three distillations ask: it learned from 8,000 labels). A teacher's label holds more than
an expert's, so distillation is to be compared with `kd`, which has the same. All arms take the same number of optimiser
steps of the same size. Mistakes a response are counted against the exact expert on responses sampled from the learner.

Stated before any run; each is judged at the most labels, by the paired difference over seeds and its 95 % interval:

    dagger     `dagger` makes at most half of `bc`'s mistakes on `narrow`, and the interval leaves 0 out
    twice      `dagger` makes fewer mistakes than `bc` with twice the labels on `narrow`, and the interval leaves 0 out
    distil     `on-policy` makes fewer mistakes than `kd` on `narrow`, and the interval leaves 0 out
    control    on `recoverable`, `dagger` and `bc` differ by less than half a mistake a response
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import common
from tokenmdp import stats, tasks
from tokenmdp.experts import Advice, Expert, Queried, Teacher
from tokenmdp.lab import workers
from tokenmdp.ledger import Ledger
from tokenmdp.models import tiny
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import dagger, distill, sft
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.types import Batch

KINDS = ("narrow", "recoverable")
ARMS = ("bc", "dagger", "kd", "gkd", "on-policy")
THRESHOLDS = {
    "dagger": "at most half of bc's mistakes on narrow, and the paired interval leaves 0 out",
    "twice": "fewer mistakes than bc with twice the labels on narrow, and the paired interval leaves 0 out",
    "distil": "on-policy makes fewer mistakes than kd on narrow, and the paired interval leaves 0 out",
    "control": "on recoverable, dagger and bc differ by less than half a mistake a response",
}


@dataclass(frozen=True)
class Size:
    """What all runs share."""

    horizon: int = 16  # tokens of a response
    letters: int = 8  # of the alphabet; as many prompts
    noise: float = 0.05  # of the expert's hand, in every label
    labels: tuple[int, ...] = (512, 1024, 2048)  # the budgets
    seeds: int = 5
    phases: int = 8  # of gathering, in all arms that gather
    updates: int = 320  # optimiser steps of every arm
    rows: int = 32  # an update
    learning_rate: float = 3e-3
    taught: int = 8_000  # labels of the teacher
    answers: int = 64  # responses to each prompt, to count mistakes on


QUICK = Size(horizon=6, labels=(48, 96), seeds=2, phases=2, updates=4, rows=8, taught=200, answers=2)


class Slipping:
    """An expert whose hand slips: with probability `noise` a label is any letter instead of the right one.

    It draws from torch's own stream, which a run seeds and puts back on resume.
    """

    def __init__(self, expert: Any, noise: float) -> None:
        self.expert, self.noise, self.name = expert, noise, f"slipping {expert.name}"

    def __call__(self, batch: Batch) -> Advice:
        advice: Advice = self.expert(batch)
        letters: Tensor = self.expert.letters
        slips = torch.rand(advice.token.shape) < self.noise
        others = letters[torch.randint(len(letters), advice.token.shape)]
        return Advice(torch.where(advice.known & slips, others, advice.token), advice.known)


@dataclass(frozen=True)
class World:
    """One seed's task, start, and expert."""

    size: Size
    task: Task
    start: Policy
    expert: Expert

    @staticmethod
    def make(size: Size, kind: str, seed: int) -> World:
        start = tiny.tiny(seed=seed).freeze()
        # A slip ends a demonstration, so they come shorter than the horizon: enough of them for the most labels twice.
        count = 6 * max(size.labels) // size.horizon + 26
        task = tasks.load(
            "drift",
            start,
            kind=kind,
            horizon=size.horizon,
            letters=size.letters,
            noise=size.noise,
            count=count,
            seed=seed,
        )
        assert task.expert is not None
        return World(size, task, start, Slipping(task.expert, size.noise))

    def shown(self, labels: int) -> Batch:
        """Demonstrations with that many tokens, the last one cut."""
        assert self.task.demonstrations is not None
        total = self.task.demonstrations.action.sum(1).cumsum(0)
        assert int(total[-1]) >= labels
        b = self.task.demonstrations.select(torch.arange(int((total < labels).sum()) + 1))
        spare = int(b.action.sum()) - labels
        last = torch.where(torch.arange(len(b)) == len(b) - 1, b.length - spare, b.length)
        kept = b.action & (torch.arange(b.tokens.shape[1]) < last[:, None])
        return Batch(b.tokens, kept, b.length, b.ended, b.prompts, b.texts, b.group)

    def mistakes(self, b: Batch) -> float:
        """Mistakes a response, of `horizon` tokens."""
        assert self.task.reward is not None
        return -self.size.horizon * float(self.task.reward(b).value.mean())

    def judged(self, policy: Policy, seed: int) -> float:
        """Mistakes along the policy's own responses; every arm of a seed meets the same uniform numbers."""
        rng = torch.Generator().manual_seed(1_000 + seed)
        sampling = Sampling(max_new_tokens=self.size.horizon)
        return self.mistakes(policy.sample(list(self.task.held_out), self.size.answers, sampling, rng))


# ------------------------------------------------------------ the arms


def clone(world: World, labels: int, stage: Run) -> Policy:
    s = world.size
    shown = world.shown(labels)
    cfg = sft.Config(steps=s.updates, rows=s.rows, learning_rate=s.learning_rate, evaluate_every=s.updates)
    return sft.train(cfg, world.start, shown, shown.select([0]), stage)[0]


def ask(world: World, labels: int, stage: Run, phases: int = 0, decay: float = 0.0) -> Policy:
    s = world.size
    phases = phases or s.phases
    prompts, samples = shares(world, labels - labels // phases, phases - 1)
    cfg = dagger.Config(
        steps=phases, prompts=prompts, samples=samples, max_new_tokens=s.horizon, mixture=decay, decay=decay,
        demonstrations=len(world.shown(labels // phases)), queries=labels, updates=s.updates // phases, rows=s.rows,
        learning_rate=s.learning_rate,
    )  # fmt: skip
    return dagger.train(cfg, world.start, world.expert, world.task, stage)[0]


def distilled(world: World, labels: int, stage: Run, teacher: Policy, divergence: str, on_policy: float) -> Policy:
    s = world.size
    # Demonstrations are cut short by slips: more of them are as many labels. The budget ends the last phase.
    prompts, samples = shares(world, labels if on_policy == 1 else 2 * labels, s.phases)
    cfg = distill.Config(
        steps=s.phases, prompts=prompts, samples=samples, max_new_tokens=s.horizon, divergence=divergence,
        on_policy=on_policy, queries=labels, updates=s.updates // s.phases, rows=s.rows, aggregate=True,
        learning_rate=s.learning_rate,
    )  # fmt: skip
    return distill.train(cfg, world.start, Teacher(teacher), world.task, stage)[0]


def shares(world: World, labels: int, phases: int) -> tuple[int, int]:
    """Prompts and samples a phase that make about so many labels."""
    rows = -(-labels // (world.size.horizon * phases))
    prompts = min(rows, len(world.task.train))
    return prompts, -(-rows // prompts)


def taught(world: World, stage: Run) -> Policy:
    """The teacher: it has asked the same expert much more often; kept in the stage's folder."""
    folder = stage.folder / "model"
    if stage.result() is None:
        big = World(
            Size(**{**asdict(world.size), "updates": 2 * world.size.updates}), world.task, world.start, world.expert
        )
        stage.finish(ask(big, world.size.taught, stage, decay=0.7).publish(folder))
    model = tiny.tiny()
    model.model.load_state_dict(
        load_file(folder / "model.safetensors"), strict=False
    )  # the tied output layer is not there
    model.name = "teacher"
    return model


def trial(run: Run, size: Size, order: Sequence[Any]) -> dict[str, Any]:
    """One arm with so many labels on one seed; from its folder where it is done."""
    kind, arm, labels, seed = order
    stage = run.stage(name_of(order))
    world = World.make(size, kind, seed)
    if arm == "teacher":
        return {"mistakes": world.judged(taught(world, stage), seed)}
    if (done := stage.result()) is not None:
        return done
    if arm == "start":
        return stage.finish({"mistakes": world.judged(world.start, seed)})
    if arm == "expert":
        return stage.finish({"mistakes": by_hand(world, stage)})
    if arm == "bc":
        policy = clone(world, labels, stage)
    elif arm == "dagger":
        policy = ask(world, labels, stage)
    else:
        divergence, on_policy = {"kd": ("forward", 0.0), "gkd": ("js:0.5", 0.5), "on-policy": ("reverse", 1.0)}[arm]
        teacher = taught(world, run.stage(name_of([kind, "teacher", size.taught, seed])))
        policy = distilled(world, labels, stage, teacher, divergence, on_policy)
    return stage.finish({"mistakes": world.judged(policy, seed)})


def by_hand(world: World, stage: Run) -> float:
    """The expert acts by itself, its hand slipping as in its labels."""
    prompts = list(world.task.held_out)
    sampling = Sampling(max_new_tokens=world.size.horizon)
    asked = Queried(world.expert, Ledger())
    return world.mistakes(
        dagger.mixed(world.start, asked, prompts, max(1, world.size.answers // 8), 1.0, sampling, stage.rng)[0]
    )


def name_of(order: Sequence[Any]) -> str:
    return "-".join(str(x) for x in order)


def orders_of(size: Size) -> tuple[list[list[Any]], list[list[Any]]]:
    """The teachers, and everything that may come after them. The control is judged at the most labels alone."""
    most = max(size.labels)
    teachers = [[kind, "teacher", size.taught, s] for s in range(size.seeds) for kind in KINDS]
    rest: list[list[Any]] = []
    for seed in range(size.seeds):
        rest += [[kind, arm, 0, seed] for kind in KINDS for arm in ("start", "expert")]
        rest += [["narrow", arm, labels, seed] for labels in size.labels for arm in ARMS]
        rest += [["recoverable", arm, most, seed] for arm in ARMS]
        rest += [[kind, "bc", 2 * most, seed] for kind in KINDS]
    return teachers, rest


# ------------------------------------------------------------ what came out


def interval(values: Sequence[float]) -> list[float]:
    """Mean over seeds with its 95 % interval; where seeds do not differ, the mean thrice."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return [round(float(x.mean()), 4)] * 3
    return [round(v, 4) for v in stats.bootstrap_mean(x)]


def tabulated(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task, arm and number of labels, seeds together; `minus_bc` is paired, at as many labels."""
    cells: dict[tuple[str, str, int], dict[int, float]] = {}
    for name, result in found.items():
        *head, labels, seed = name.rsplit("-", 2)
        kind, arm = head[0].split("-", 1)
        cells.setdefault((kind, arm, int(labels)), {})[int(seed)] = float(result["mistakes"])
    rows = []
    for (kind, arm, labels), by_seed in sorted(cells.items()):
        row: dict[str, Any] = {"task": kind, "arm": arm, "labels": labels, "mistakes": interval(list(by_seed.values()))}
        row["seeds"] = [round(by_seed[s], 4) for s in sorted(by_seed)]
        rows.append(row | versus(by_seed, cells.get((kind, "bc", labels)), "minus_bc"))
    return rows


def versus(mine: Mapping[int, float], other: Mapping[int, float] | None, name: str) -> dict[str, list[float]]:
    """The paired difference over the seeds that both have, with its interval."""
    both = sorted(mine.keys() & (other or {}).keys())
    return {name: interval([mine[s] - (other or {})[s] for s in both])} if both and mine is not other else {}


def verdict(rows: Sequence[Mapping[str, Any]], size: Size) -> dict[str, dict[str, Any]]:
    """Each threshold: met or not, and by what figures."""
    most = max(size.labels)

    def seeds(kind: str, arm: str, labels: int) -> dict[int, float]:
        row = next(r for r in rows if (r["task"], r["arm"], r["labels"]) == (kind, arm, labels))
        return dict(enumerate(row["seeds"]))

    def difference(a: dict[int, float], b: dict[int, float]) -> list[float]:
        return interval([a[s] - b[s] for s in sorted(a)])

    bc, asked = seeds("narrow", "bc", most), seeds("narrow", "dagger", most)
    found: dict[str, dict[str, Any]] = {}
    gap = difference(asked, bc)
    share = float(np.mean(list(asked.values())) / max(1e-9, float(np.mean(list(bc.values())))))
    found["dagger"] = {"met": gap[2] < 0 and share <= 0.5, "difference": gap, "share": round(share, 4)}
    gap = difference(asked, seeds("narrow", "bc", 2 * most))
    found["twice"] = {"met": gap[2] < 0, "difference": gap}
    gap = difference(seeds("narrow", "on-policy", most), seeds("narrow", "kd", most))
    found["distil"] = {"met": gap[2] < 0, "difference": gap}
    gap = difference(seeds("recoverable", "dagger", most), seeds("recoverable", "bc", most))
    found["control"] = {"met": abs(gap[0]) < 0.5, "difference": gap}
    for name, one in found.items():
        one["threshold"] = THRESHOLDS[name]
        one["met"] = bool(one["met"] and size.seeds > 1)  # one seed shows nothing
        low, high = one["difference"][1:]
        one["words"] = (
            "no significant difference" if low <= 0 <= high else "fewer mistakes" if high < 0 else "more mistakes"
        )
    return found


def show(rows: Sequence[Mapping[str, Any]], judged: Mapping[str, Mapping[str, Any]]) -> None:
    """The table, then the verdict."""
    table = Table(
        title="mistakes a response, mean over seeds [95 %]; beside it the paired difference to bc", title_justify="left"
    )
    for name in ("task", "arm", "labels", "mistakes", "minus bc"):
        table.add_column(name, justify="left" if name in ("task", "arm") else "right")
    for r in rows:
        cells = [f"{x[0]:.2f} [{x[1]:.2f}, {x[2]:.2f}]" if (x := r.get(k)) else "" for k in ("mistakes", "minus_bc")]
        table.add_row(r["task"], r["arm"], str(r["labels"]), *cells)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, one in judged.items():
        x = one["difference"]
        met = "met" if one["met"] else "NOT met"
        console.print(
            f"{name}: {met} ({one['threshold']}): {x[0]:+.2f} [{x[1]:+.2f}, {x[2]:+.2f}], {one['words']}",
            highlight=False,
        )


# ------------------------------------------------------------ running


def conduct(run: Run, size: Size, orders: Sequence[Sequence[Any]], count: int) -> None:
    """Do what is not done yet, in `count` processes."""
    line = [sys.executable, str(Path(__file__).resolve()), "--worker", str(run.folder)]

    def said(found: Mapping[str, Any]) -> str:
        return f"{found['mistakes']:.3f} mistakes a response"

    workers.conduct(run, "asking the expert", orders, name_of, lambda o: trial(run, size, o), line, count, said)


def worker(folder: Path) -> None:
    """Be one of the processes that share the runs in `folder`."""

    def hired() -> Callable[[Any], Any]:
        run = workers.run_of(folder)
        size = Size(**{**run.config, "labels": tuple(run.config["labels"])})
        return lambda order: trial(run, size, order)

    workers.serve(hired)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folder is")
    out.add_argument("--workers", type=int, default=2, help="runs at a time")
    out.add_argument("--fresh", action="store_true", help="begin anew")
    out.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args: argparse.Namespace = out.parse_args(argv)
    if args.worker:
        worker(args.worker)
        return {}
    size = QUICK if args.quick else Size()
    folder = args.runs / f"dagger{'-quick' * args.quick}"
    again = args.fresh and (folder / "config.json").exists()
    with Run.open(folder, asdict(size), 0, resume=not again, overwrite=again) as run:
        teachers, rest = orders_of(size)
        for orders in (teachers, rest):
            conduct(run, size, orders, 1 if args.quick else args.workers)
        rows = tabulated({name_of(o): trial(run, size, o) for o in (*teachers, *rest)})
    judged = verdict(rows, size)
    results = {
        "command": common.command(),
        **common.machine(),
        "size": asdict(size),
        "rows": rows,
        "verdict": judged,
    }
    common.write(args.json, results)
    show(rows, judged)
    return results


if __name__ == "__main__":
    main()
