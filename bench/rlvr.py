"""Verifiable rewards on a real model: does GRPO with a numeric verifier raise held-out accuracy, and is it the verifier?

    python bench/rlvr.py --data DIR --seeds 0 1 2 --json docs/results/rlvr.json

DIR holds train.jsonl and test.jsonl with question, equation and answer (MAWPS or its like). Behaviour cloning of short
worked solutions comes first (in runs/rlvr-sft, once for all seeds), then each seed trains by GRPO on the training
problems (runs/rlvr-seed-N). The same held-out problems are answered before and after, eight samples each at temperature
1: pass@1 is the mean over samples, pass@8 the unbiased estimate; intervals resample problems, differences are paired by
problem. The answers before are drawn once and shared by the seeds, so the seeds' differences are not independent.

Two controls take the same start and seeds (all arms, or some by --arms):

    coin      the same GRPO on a reward that knows nothing: a hash of problem, response and seed, 0 or 1. What it gains,
              training gains by itself (Shao et al. 2025, "Spurious rewards")
    sft-more  behaviour cloning of as many response tokens as that seed's GRPO sampled, of the same blocks

A stage that is finished is not run again, and one that was killed goes on where it stopped; --fresh begins anew. On two
cores without matrix units a seed of GRPO takes about an hour, the shared part about 15 minutes. Thresholds, stated before any run:

    pass@1   at every seed the 95 % interval of after minus before is above 0
    pass@8   at no seed does it fall significantly: the interval of after minus before reaches above 0
    coin     at every seed pass@1 after GRPO is above that after the coin, paired by problem: the interval is above 0

Against `sft-more` there is no threshold: it is said. A first try, of 24 phases and otherwise the same, missed both of its own
(pass@1 +3.3, +1.1 and +2.4 points, none significant; pass@8 −3.5, −8.0, −3.5); these are three times as many. (Twice the rate
instead was begun and broken off after 30 phases of one seed: the training score had not risen, at 1 to 3 nats a response.)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import common
from tokenmdp import stats, tasks
from tokenmdp.lab import pass_at_k
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.recipes import grpo, sft
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.tasks import Task, arithmetic
from tokenmdp.types import Batch, Reward

THRESHOLDS = {
    "pass@1": "lower end of the 95 % interval of after minus before above 0 at every seed",
    "pass@8": "upper end of the 95 % interval of after minus before above 0 at every seed",
    "coin": "lower end of the 95 % interval of pass@1 after GRPO minus after the coin above 0 at every seed",
}
ARMS = ("grpo", "coin", "sft-more")


@dataclass(frozen=True)
class Size:
    """What the full and the quick size differ in."""

    model: str
    sft: sft.Config
    grpo: grpo.Config
    judged: pass_at_k.Config
    kept: int  # demonstrations whose likelihood is measured and that are not learned from


FULL = Size(
    model="smollm2-135m-instruct",
    sft=sft.Config(task="arithmetic", steps=120, rows=16, learning_rate=1e-4, evaluate_every=60),
    grpo=grpo.Config(
        model="sft",
        task="arithmetic",
        reward="numeric",
        steps=72,
        prompts=10,
        samples=8,
        max_new_tokens=36,
        learning_rate=5e-5,
        kl=0.01,
        train="top-10",
    ),
    judged=pass_at_k.Config(prompts=200, n=8, max_new_tokens=36),
    kept=48,
)
QUICK = Size(
    model="tiny",
    sft=sft.Config(task="arithmetic", steps=60, rows=32, learning_rate=5e-3, evaluate_every=60, micro_tokens=8192),
    grpo=grpo.Config(
        model="sft",
        task="arithmetic",
        reward="numeric",
        steps=3,
        prompts=8,
        samples=8,
        max_new_tokens=36,
        learning_rate=1e-3,
        micro_tokens=8192,
    ),
    judged=pass_at_k.Config(prompts=24, n=8, max_new_tokens=36),
    kept=32,
)


def begin(size: Size, data: Path | None) -> tuple[Policy, Task]:
    """The model the job starts from and the task in its tokens."""
    made = {"count": 600, "held_out": 60, "largest": 9}
    if size.model != "tiny":
        start = catalog.load(size.model).freeze()
    else:  # words as tokens; the character tokenizer would make very long problems
        learned, _ = arithmetic.made(**made)
        texts = [
            arithmetic.TEMPLATE.replace("{question}", r["question"]) + arithmetic.demonstration(r) for r in learned
        ]
        start = catalog.tiny(texts).freeze()
    return start, tasks.load("arithmetic", start, **(made if data is None else {"source": data}))


def staged(run: Run, name: str, work: Callable[[Run], dict[str, Any]]) -> tuple[dict[str, Any], Path]:
    """A stage's result and folder: from its folder when it is done, else by doing it."""
    stage = run.stage(name)
    done = stage.result()
    if done is None:
        start = time.monotonic()
        done = work(stage)
        done = stage.finish({**done, "minutes": (time.monotonic() - start) / 60})
    return done, stage.folder


def judged(run: Run, name: str, size: Size, policy: Policy, task: Task) -> dict[str, Any]:
    """The stage that answers the held-out problems: `right`, a row of 0 and 1 for each problem."""
    assert task.reward is not None, "the arithmetic task brings its verifier"
    reward, prompts = task.reward, task.held_out[: size.judged.prompts]
    found, _ = staged(
        run, name, lambda stage: {"right": pass_at_k.measure(size.judged, policy, prompts, reward, stage)}
    )
    return found


def clone(
    run: Run, name: str, size: Size, start: Policy, task: Task, cfg: sft.Config | None = None
) -> tuple[dict[str, Any], Path]:
    """The stage of behaviour cloning of the demonstrations that fit into the horizon: a cut one would teach not to end."""
    learned, kept = demonstrations(size, task)

    def work(stage: Run) -> dict[str, Any]:
        policy, figures = sft.train(cfg or size.sft, start, learned, kept, stage)
        policy.save(stage.folder / "model")
        return {**figures, "demonstrations": len(learned) + len(kept)}

    return staged(run, name, work)


def demonstrations(size: Size, task: Task) -> tuple[Batch, Batch]:
    """Those that are learned from, and those whose likelihood is measured."""
    shown = task.demonstrations
    assert shown is not None, "the problems have worked solutions"
    fits = (shown.action.sum(-1) <= size.grpo.max_new_tokens).nonzero()[:, 0].tolist()
    return shown.select(fits[size.kept :]), shown.select(fits[: size.kept])


def optimise(
    run: Run, name: str, size: Size, reference: Policy, reward: Reward, task: Task
) -> tuple[dict[str, Any], Path]:
    """The stage of GRPO on the training problems."""

    def work(stage: Run) -> dict[str, Any]:
        policy, _ = grpo.train(size.grpo, reference, reward, task, stage)
        policy.save(stage.folder / "model")
        return {}

    found, folder = staged(run, name, work)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = {key: [round(line[key], 4) for line in lines] for key in ("objective/scores", "objective/kl")}
    return {**found, **curve, "tokens": sum(int(line["num_tokens"]) for line in lines)}, folder


def coin(seed: int) -> Reward:
    """A reward that knows nothing: one bit of a hash."""

    def toss(completions: list[str], prompts: list[str]) -> list[float]:
        texts = [f"{seed}\n{p}\n{c}".encode() for p, c in zip(prompts, completions, strict=True)]
        return [float(hashlib.sha256(text).digest()[0] & 1) for text in texts]

    return FunctionReward(toss, name="coin")


def trained(run: Run, arm: str, size: Size, reference: Policy, task: Task) -> tuple[dict[str, Any], Path]:
    """The stage of an arm at the run's seed."""
    assert task.reward is not None, "the arithmetic task brings its verifier"
    if arm == "grpo":
        return optimise(run, arm, size, reference, task.reward, task)
    if arm == "coin":
        return optimise(run, arm, size, reference, coin(run.seed), task)
    spent = optimise(run, "grpo", size, reference, task.reward, task)[0]["tokens"]
    learned, _ = demonstrations(size, task)
    each = size.sft.rows * float(learned.action.sum()) / len(learned)
    steps = max(1, round(spent / each))
    cfg = replace(size.sft, steps=steps, train=size.grpo.train, evaluate_every=steps)
    found, folder = clone(run, arm, size, reference, task, cfg)
    return {**found, "tokens": round(steps * each)}, folder


def loaded(folder: Path, name: str) -> Policy:
    """A policy that a stage saved."""
    policy = catalog.load(folder / "model").freeze()
    policy.name = name
    return policy


def figures(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> dict[str, Any]:
    """pass@1 and pass@n after GRPO, and what they gained over the start, paired by problem."""
    x, y = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    n = x.shape[1]
    found: dict[str, Any] = {}
    for name, k in (("pass@1", 1), (f"pass@{n}", n)):
        gained = stats.pass_at_k_values(y, k) - stats.pass_at_k_values(x, k)
        found[name] = common.rounded(stats.pass_at_k(y, k))
        # All differences alike is no spread to resample; an interval of width zero would look like certainty.
        found[f"{name}_gain"] = common.rounded(stats.bootstrap_mean(gained)) if np.ptp(gained) > 0 else None
    return found


def verdicts(arms: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, bool]:
    """Each threshold, over all seeds; of the arms that were run."""
    gains = [(s["pass@1_gain"], s["pass@8_gain"]) for s in arms["grpo"].values()]
    found = {
        "pass@1": all(one is not None and one["low"] > 0 for one, _ in gains),
        "pass@8": all(eight is None or eight["high"] > 0 for _, eight in gains),
    }
    if "coin" in arms:
        below = [s["pass@1_grpo_over"] for s in arms["coin"].values()]
        found["coin"] = all(one is not None and one["low"] > 0 for one in below)
    return found


def in_words(results: Mapping[str, Any]) -> str:
    """The verdict as a sentence."""
    passed, before, arms = results["passed"], results["before"], results["arms"]
    seeds = list(arms["grpo"].values())
    one, eight = (" / ".join(f"{s[name]['mean']:.1%}" for s in seeds) for name in ("pass@1", "pass@8"))
    rose = "rose significantly at every seed" if passed["pass@1"] else "did not rise significantly at every seed"
    fell = "did not fall significantly at any seed" if passed["pass@8"] else "fell significantly at a seed"
    said = [
        f"pass@1 {rose}: {before['pass@1']['mean']:.1%} before, {one} after.",
        f"pass@8 {fell}: {before['pass@8']['mean']:.1%} before, {eight} after.",
    ]
    for arm, called in (("coin", "a reward that is a coin"), ("sft-more", "cloning as many tokens")):
        if arm in arms:
            over = [s["pass@1_grpo_over"] for s in arms[arm].values()]
            sure = sum(x is not None and x["low"] > 0 for x in over)
            ends = " / ".join(f"{s['pass@1']['mean']:.1%}" for s in arms[arm].values())
            said.append(f"After {called}: {ends}; GRPO is significantly above it at {sure} of {len(over)} seeds.")
    return " ".join(said)


def over(best: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What GRPO has more than a control, paired by problem."""
    found = figures(other, best)
    return {f"{name}_grpo_over": found[f"{name}_gain"] for name in ("pass@1", f"pass@{len(best[0])}")}


def about(data: Path | None, task: Task) -> dict[str, Any]:
    """The data by content, for its path means something on one machine only."""
    if data is None:
        return {"made": True, **task.facts}
    files = sorted([data] if data.is_file() else [p for p in data.iterdir() if p.stem in ("train", "test")])
    return {**task.facts, "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}}


def opened(folder: Path, size: Size, data: Path | None, seed: int, fresh: bool) -> Run:
    """The run folder of a seed or of the shared part."""
    settings = {**asdict(size), "data": str(data or "made")}
    again = fresh and (folder / "config.json").exists()
    return Run.open(folder, settings, seed, resume=not again, overwrite=again)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--data", type=Path, metavar="DIR", help="train.jsonl and test.jsonl; not needed with --quick")
    out.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    out.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="grpo always")
    out.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    out.add_argument("--fresh", action="store_true", help="begin everything anew")
    args: argparse.Namespace = out.parse_args(argv)
    if args.data is None and not args.quick:
        out.error("the full size needs --data DIR: a folder with train.jsonl and test.jsonl")
    size, prefix = (QUICK, "rlvr-quick") if args.quick else (FULL, "rlvr")
    start, task = begin(size, args.data)
    line = common.command()
    results: dict[str, Any] = {
        "command": line.replace(shlex.quote(str(args.data)), "DIR") if args.data else line,
        "size": "quick" if args.quick else "full",
        **common.machine(),
        "model": size.model,
        "data": about(args.data, task),
        "settings": {"sft": asdict(size.sft), "grpo": asdict(size.grpo), "judged": asdict(size.judged)},
        "thresholds": THRESHOLDS,
    }
    with opened(args.runs / f"{prefix}-sft", size, args.data, 0, args.fresh) as run:
        cloned, folder = clone(run, "sft", size, start, task)
        reference = loaded(folder, "sft")
        before = judged(run, "before", size, reference, task)
        run.finish({})
    results["sft"] = {name: round(value, 4) for name, value in cloned.items()}
    results["before"] = {
        f"pass@{k}": common.rounded(stats.pass_at_k(before["right"], k)) for k in pass_at_k.attempts(size.judged.n)
    }
    results["arms"] = {}
    right: dict[int, Any] = {}
    for arm in ("grpo", *(a for a in ARMS[1:] if a in args.arms)):  # the controls are told against it
        results["arms"][arm] = {}
        for seed in args.seeds:
            fresh = args.fresh and arm == "grpo"
            with opened(args.runs / f"{prefix}-seed-{seed}", size, args.data, seed, fresh) as run:
                learned, folder = trained(run, arm, size, reference, task)
                after = judged(run, f"after-{arm}", size, loaded(folder, arm), task)
                run.finish({})
            minutes = round(learned.pop("minutes") + after["minutes"], 2)
            found = {**figures(before["right"], after["right"]), "minutes": minutes, **learned}
            found |= {} if arm == "grpo" else over(right[seed], after["right"])
            right.setdefault(seed, after["right"])
            results["arms"][arm][str(seed)] = found
            results["passed"] = verdicts(results["arms"])
            results["verdict"] = in_words(results)
            common.write(args.json, results)
    show(results)
    return results


def show(results: Mapping[str, Any]) -> None:
    """Print a line an arm and seed, and the verdicts."""
    table = Table(title=f"SFT → GRPO with a numeric verifier, size {results['size']}", title_justify="left")
    for name in ("arm", "seed", "pass@1", "gain", "pass@8", "gain", "minutes"):
        table.add_column(name, justify="right")
    first = results["before"]
    table.add_row("SFT", "", f"{first['pass@1']['mean']:.3f}", "", f"{first['pass@8']['mean']:.3f}", "", "")
    for arm, seed, s in ((arm, seed, s) for arm, seeds in results["arms"].items() for seed, s in seeds.items()):
        cells = [arm, seed]
        for name in ("pass@1", "pass@8"):
            gain = s[f"{name}_gain"]
            cells += [
                f"{s[name]['mean']:.3f}",
                "none" if gain is None else f"{gain['low']:+.3f} to {gain['high']:+.3f}",
            ]
        table.add_row(*cells, f"{s['minutes']:.1f}")
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(results["verdict"], highlight=False)
    for name, passed in results["passed"].items():
        console.print(f"{'passed' if passed else 'FAILED'}: {name}, {results['thresholds'][name]}", highlight=False)


if __name__ == "__main__":
    main()
