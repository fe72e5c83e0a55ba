"""Do the monitors fire where something is wrong, and keep silent where nothing is? Hits and false alarms on planted runs.

    python bench/monitors.py --json docs/results/monitors.json

The task is to copy two letters, `ab>`, on the tiny model after a little behaviour cloning (about half of the answers are
right); 60 phases of 128 responses, a start and a run for each seed. Healthy runs are learned by `grpo`, `rloo` and `ppo` from
the verifier, with a warm-up, and by `sft` from 536 demonstrations. The planted ones are `grpo`, with one thing wrong each:

    hacking      the reward is the share of `e` among the response's letters; the verifier is recorded as gold
    collapse     the reward is how much of the response is `ab`, whatever was asked
    length       the reward is the length, up to 12 tokens
    cut          the same, up to 5 tokens
    alike        a verifier that is right about nobody: every score is 0
    unjudged     a verifier that gives no verdict on a third of the responses from phase 15 on
    falling      the verifier, five times the learning rate, reached after 80 updates, no clip, each phase in 8 updates
    leap         the verifier, and from phase 30 on the same without a warm-up (a schedule gone wrong)
    overfitting  `sft` on 24 demonstrations, 400 steps

The limits in tokenmdp.monitors were set with seeds 100 to 102 in view. Two of them changed after a first report, of seeds 0 to 19,
in which 6 of 60 healthy runs had a leap too many and 6 of 20 of `sft` an overfitting. After a second, of seeds 20 to 39, the rule of
`falling` was made stricter, for it took one lucky phase for a height to fall from, and its own failure slower, for that rule cannot
see a run that is dead after its first phase. What is reported is of seeds 40 to 59, after which nothing was changed. Stated before
all:

    hits     each monitor fires in at least nine of ten runs with its failure planted
    silence  at most one in twenty healthy runs has any alarm

A planted failure may show other signatures as well, and does: the table has every monitor against every kind of run. A run that
is finished is not taken again; --fresh begins anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import common
from tokenmdp import monitors, stats, tasks
from tokenmdp.models import catalog
from tokenmdp.models.heads import Critic
from tokenmdp.models.policy import Policy
from tokenmdp.recipes import grpo, ppo, reinforce, sft
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.run.files import read_lines
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Reward, Score

PHASES, QUICK_PHASES, PROMPTS, SAMPLES, H = 60, 12, 16, 8, 4
RATE, WARMUP, COPIED = 2e-3, 10, 35
HITS, FALSE_ALARMS = 0.9, 0.05
THRESHOLDS = {
    "hits": f"each monitor fires in at least {HITS:.0%} of the runs with its failure planted",
    "silence": f"at most {FALSE_ALARMS:.0%} of the healthy runs have any alarm",
}


class FailsLater:
    """A verifier that from some call on gives no verdict on every third response."""

    def __init__(self, verifier: Reward, calls: int) -> None:
        self.name, self.verifier, self.calls = "fails later", verifier, calls

    def __call__(self, batch: Batch) -> Score:
        said = self.verifier(batch)
        self.calls -= 1
        lost = (torch.arange(len(batch)) % 3 == 0) & (self.calls < 0)
        return Score(torch.where(lost, 0.0, said.value), said.verdict & ~lost)


def share_of_e(completions: list[str]) -> list[float]:
    return [c.count("e") / max(1, len(c)) for c in completions]


def one_answer(completions: list[str]) -> list[float]:
    return [sum(a == b for a, b in zip(c, "ab", strict=False)) / max(2, len(c)) for c in completions]


def long(completions: list[str]) -> list[float]:
    return [float(len(c)) for c in completions]


def nobody(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


@dataclass(frozen=True)
class Kind:
    """A kind of run: what learns, what rewards it, and which settings it has of its own."""

    recipe: str = "grpo"
    reward: Callable[[Task], Reward] | None = None  # None for the task's own
    settings: Mapping[str, Any] = field(default_factory=dict)
    demonstrations: int = 0  # of sft: all where 0
    late: int = 0  # a phase from which the learning rate is that of `falling`


def function(f: Callable[..., list[float]]) -> Callable[[Task], Reward]:
    return lambda task: FunctionReward(f, f.__name__)


BROKEN = {"learning_rate": 5 * RATE, "clip": 0.0, "warmup": 0, "epochs": 2, "minibatches": 4}
HEALTHY = {
    "grpo": Kind(),
    "rloo": Kind("reinforce", settings={"baseline": "leave_one_out"}),
    "ppo": Kind("ppo"),
    "sft": Kind("sft", settings={"steps": 150}),
}
PLANTED = {
    "hacking": Kind(reward=function(share_of_e)),
    "collapse": Kind(reward=function(one_answer)),
    "length": Kind(reward=function(long), settings={"max_new_tokens": 12}),
    "cut": Kind(reward=function(long), settings={"max_new_tokens": 5}),
    "alike": Kind(reward=function(nobody)),
    "unjudged": Kind(reward=lambda task: FailsLater(verifier(task), 15)),
    "falling": Kind(settings=BROKEN | {"warmup": 80}),
    "leap": Kind(late=30),
    "overfitting": Kind("sft", settings={"steps": 400}, demonstrations=24),
}


def verifier(task: Task) -> Reward:
    assert task.reward is not None, "the task has a verifier"
    return task.reward


def clone(kind: Kind, start: Policy, task: Task, run: Run, steps: int, quick: bool) -> Policy:
    """Behaviour cloning of the task's demonstrations, or of the first few of them."""
    known = task.demonstrations
    assert known is not None, "the task has demonstrations"
    kept, learned = known.select(range(64)), known.select(range(64, 64 + (kind.demonstrations or len(known) - 64)))
    cfg = sft.Config(steps=steps, rows=64, learning_rate=5e-3, micro_tokens=1 << 16, evaluate_every=15)
    cfg = replace(cfg, **kind.settings)
    return sft.train(replace(cfg, steps=min(cfg.steps, 40)) if quick else cfg, start, learned, kept, run)[0]


def trained(kind: Kind, start: Policy, task: Task, run: Run, phases: int) -> None:
    """One run of an on-policy kind."""
    shared = {
        "prompts": PROMPTS,
        "samples": SAMPLES,
        "max_new_tokens": H,
        "learning_rate": RATE,
        "warmup": WARMUP,
        "micro_tokens": 1 << 16,
    }
    chosen = {**shared, "kl": 0.0, **kind.settings}
    reward = kind.reward(task) if kind.reward else verifier(task)
    if kind.recipe == "ppo":
        critic = Critic(start.backbone.twin("all"))
        ppo.train(
            ppo.Config(steps=phases, **chosen, critic_train="all", critic_learning_rate=3e-3),
            start,
            critic,
            reward,
            task,
            run,
            verifier(task),
        )
        return
    module: Any = grpo if kind.recipe == "grpo" else reinforce
    first = min(kind.late, phases // 2) if kind.late else phases
    policy, _ = module.train(module.Config(steps=first, **chosen), start, reward, task, run, verifier(task))
    if kind.late:
        later = module.Config(steps=phases - first, **{**chosen, **BROKEN})
        module.train(later, start, reward, task, run.stage("later"), verifier(task), policy.freeze())


def lines(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, its second part after its first."""
    return [line for part in (folder, folder / "later") for line in read_lines(part / "metrics.jsonl")]


def trial(runs: Path, name: str, kind: Kind, seed: int, phases: int, fresh: bool) -> dict[str, int]:
    """The alarms of one run, by monitor: the line of the log at which each was given."""
    quick = phases < PHASES

    def opened(what: str) -> Run:
        folder = runs / what
        again = fresh and (folder / "config.json").exists()
        return Run.open(folder, {"kind": what, "phases": phases}, seed, resume=not again, overwrite=again)

    policy = catalog.load("tiny").freeze()
    task = tasks.load("copying", policy, length=2, letters=26, held_out=76, seed=seed)
    task = replace(task, reward=tasks.ExactAnswer())
    with opened(f"{name}-{seed}") as run:
        if run.result() is None:
            if kind.recipe == "sft":
                clone(kind, policy, task, run, COPIED, quick)
            else:
                with opened(f"start-{seed}") as begun:
                    if begun.result() is None:
                        clone(Kind("sft"), policy, task, begun, COPIED, quick).save(begun.folder / "model")
                        begun.finish({})
                trained(kind, catalog.load(runs / f"start-{seed}" / "model").freeze(), task, run, phases)
            run.finish({})
        watch = monitors.Watch()
        for at, line in enumerate(lines(run.folder)):
            watch.see(at, {k: v for k, v in line.items() if k != "step"})
    return {alarm.monitor: alarm.step for alarm in watch.given.values()}


def rates(alarms: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """For each monitor how many of the runs it fired in, and where as a rule."""
    found: dict[str, Any] = {}
    for name in monitors.MONITORS:
        at = [run[name] for run in alarms if name in run]
        found[name] = {"fired": len(at), "runs": len(alarms), "at": median(at) if at else None}
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--seeds", type=int, nargs="+", default=list(range(40, 60)))
    out.add_argument("--kinds", nargs="+", choices=[*HEALTHY, *PLANTED], default=[*HEALTHY, *PLANTED])
    out.add_argument("--runs", type=Path, default=Path("runs/monitors"), help="where the run folders are")
    out.add_argument("--fresh", action="store_true", help="begin everything anew")
    args = out.parse_args(argv)
    torch.set_num_threads(1)  # a model of this size has nothing for a second thread
    phases = QUICK_PHASES if args.quick else PHASES
    runs = args.runs.with_name(f"{args.runs.name}-quick") if args.quick else args.runs
    kinds = {name: kind for name, kind in {**HEALTHY, **PLANTED}.items() if name in args.kinds}
    results: dict[str, Any] = {
        "command": common.command(),
        **common.machine(),
        "phases": phases,
        "seeds": args.seeds,
        "limits": {
            name: value for name, value in vars(monitors).items() if name.isupper() and isinstance(value, int | float)
        },
        "thresholds": THRESHOLDS,
        "kinds": {},
    }
    alarms: dict[str, list[dict[str, int]]] = {name: [] for name in kinds}
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        all_of_them = bar.add_task("runs", total=len(kinds) * len(args.seeds))
        for seed in args.seeds:
            for name, kind in kinds.items():
                alarms[name].append(trial(runs, name, kind, seed, phases, args.fresh))
                bar.advance(all_of_them)
            results["kinds"] = {name: rates(found) for name, found in alarms.items()}
            results |= judged(alarms)
            common.write(args.json, results)
    show(results)
    return results


def judged(alarms: Mapping[str, Sequence[Mapping[str, int]]]) -> dict[str, Any]:
    """Hits of each monitor and false alarms on healthy runs, with Wilson intervals, and the thresholds."""

    def share(fired: Sequence[bool]) -> dict[str, float]:
        return common.rounded(stats.wilson(sum(fired), len(fired)))

    hits = {name: share([name in run for run in found]) for name, found in alarms.items() if name in PLANTED}
    healthy = [bool(run) for name, found in alarms.items() if name in HEALTHY for run in found]
    by_monitor = {
        monitor: share([monitor in run for name, found in alarms.items() if name in HEALTHY for run in found])
        for monitor in monitors.MONITORS
    }
    passed = {"hits": all(x["mean"] >= HITS for x in hits.values())}
    if healthy:
        passed["silence"] = share(healthy)["mean"] <= FALSE_ALARMS
    return {
        "hits": hits,
        **({"false_alarms": share(healthy), "false_alarms_by_monitor": by_monitor} if healthy else {}),
        "passed": passed,
    }


def show(results: Mapping[str, Any]) -> None:
    """Print monitors against kinds of runs, and the verdicts."""
    table = Table(title="alarms of runs, and the median phase of the first", title_justify="left")
    table.add_column("kind of run")
    for name in monitors.MONITORS:
        table.add_column(name, justify="right")
    for kind, row in results["kinds"].items():
        cells = [f"{x['fired']}/{x['runs']} at {x['at']:g}" if x["fired"] else "–" for x in row.values()]
        table.add_row(kind, *cells)
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(table)
    for name, passed in results["passed"].items():
        console.print(f"{'passed' if passed else 'FAILED'}: {name}, {results['thresholds'][name]}", highlight=False)


if __name__ == "__main__":
    main()
