"""The students of bench/compounding.py on the drift tasks: one run each, in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokenmdp.lab import meter
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import dagger, grpo, reward_model, sft
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run
from tokenmdp.tasks import Task, drift
from tokenmdp.types import Pairs

ARMS = ("bc", "dagger", "rlhf", "rl")


@dataclass(frozen=True)
class Size:
    """What the full and the quick size differ in."""

    horizon: int
    lengths: int
    noise: tuple[float, ...]  # chance of a slip at each step of a demonstration; the first is that of the main table
    demonstrations: int
    pairs: int  # comparisons paid for, a prompt
    samples: int  # responses a prompt when mistakes are counted
    sft: sft.Config
    dagger: dagger.Config
    rm: reward_model.Config
    rl: grpo.Config


FULL = Size(
    horizon=64,
    lengths=5,
    noise=(0.01, 0.0025, 0.005, 0.02),
    demonstrations=1000,
    pairs=80,
    samples=60,
    sft=sft.Config(steps=250, rows=32, learning_rate=5e-3, warmup=20, evaluate_every=250, micro_tokens=8192),
    dagger=dagger.Config(
        steps=8,
        prompts=10,
        samples=12,
        mixture=0.0,
        demonstrations=500,
        updates=40,
        rows=32,
        learning_rate=2e-3,
        micro_tokens=8192,
    ),
    rm=reward_model.Config(
        epochs=2, rows=32, learning_rate=2e-3, head_learning_rate=1e-2, pool="mean", micro_tokens=8192
    ),
    rl=grpo.Config(steps=40, prompts=8, samples=8, learning_rate=3e-4, kl=0.2, micro_tokens=8192),
)
QUICK = replace(
    FULL,
    horizon=12,
    lengths=3,
    noise=(0.03,),
    demonstrations=200,
    pairs=8,
    samples=4,
    sft=replace(FULL.sft, steps=60, rows=16),
    dagger=replace(FULL.dagger, steps=2, samples=2, demonstrations=100, updates=8),
    rl=replace(FULL.rl, steps=3, samples=4),
)


def name_of(arm: str, kind: str, noise: float, seed: int) -> str:
    """The folder of a run; behaviour cloning knows of no kind, so one student serves both."""
    return f"{arm}-{kind or 'both'}-{noise:g}-{seed}"


def orders(size: Size, seeds: int, arms: Sequence[str]) -> list[list[list[Any]]]:
    """The runs in two phases: what the others start from, and the others."""
    first = [["bc", "", noise, seed] for noise in size.noise for seed in range(seeds)]
    rest = [[a, k, size.noise[0], s] for a in arms if a != "bc" for s in range(seeds) for k in drift.KINDS]
    return [first, rest]


def trial(size: Size, run: Run, arm: str, kind: str, noise: float, seed: int) -> dict[str, Any]:
    """One student: trained, and its mistakes counted; from its folder where that is done."""
    stage = run.stage(name_of(arm, kind, noise, seed))
    if (done := stage.result()) is not None:
        return done
    start = catalog.tiny(seed=seed).freeze()
    options: dict[str, Any] = {"horizon": size.horizon, "noise": noise, "count": size.demonstrations, "seed": seed}
    there = {k: drift.load(start, k, **options) for k in drift.KINDS}
    training = stage.stage("train")
    figures = training.result()
    if figures is None:
        if arm == "bc":
            policy, figures = cloned(size, start, there[drift.KINDS[0]], training)
        else:
            base = catalog.load(run.folder / name_of("bc", "", noise, seed) / "train" / "model").freeze()
            policy, figures = TRAIN[arm](size, base, there[kind], training)
        figures = training.finish({**figures, **policy.publish(training.folder / "model")})
    policy = catalog.load(training.folder / "model").freeze()
    policy.name = arm
    found = {k: measured(size, policy, there[k], stage.stage(f"meter-{k}")) for k in ([kind] if kind else drift.KINDS)}
    kept = {k: v for k, v in figures.items() if k not in ("model", "fingerprint")}
    return stage.finish({"figures": kept, "facts": dict(there["narrow"].facts), "measured": found})


def measured(size: Size, policy: Policy, task: Task, stage: Run) -> dict[str, Any]:
    """The mistakes of a student on a task, as `meter.Measured.plain` has them."""
    done = stage.result()
    if done is None:
        assert task.expert is not None, "the drift tasks bring their expert"
        cfg = meter.Config(max_new_tokens=size.horizon, samples=size.samples, chunk=len(task.held_out))
        done = stage.finish(meter.measure(cfg, policy, meter.Exact(task.expert, policy), task.held_out, stage).plain())
    return done


def cloned(size: Size, start: Policy, task: Task, stage: Run) -> tuple[Policy, dict[str, Any]]:
    """Behaviour cloning of the noisy demonstrations."""
    assert task.demonstrations is not None, "the drift tasks bring demonstrations"
    kept = min(100, len(task.demonstrations) // 5)
    shown, held_out = task.demonstrations.select(range(kept, len(task.demonstrations))), range(kept)
    policy, figures = sft.train(size.sft, start, shown, task.demonstrations.select(held_out), stage)
    return policy, {**figures, "labels": int(shown.action.sum())}


def asked(size: Size, start: Policy, task: Task, stage: Run) -> tuple[Policy, dict[str, Any]]:
    """DAgger: on from cloning, the same demonstrations and the exact expert's answers on the student's own states."""
    assert task.expert is not None, "the drift tasks bring their expert"
    return dagger.train(replace(size.dagger, max_new_tokens=size.horizon), start, task.expert, task, stage)


def compared(size: Size, start: Policy, task: Task, stage: Run) -> tuple[Policy, dict[str, Any]]:
    """RLHF: comparisons of the clone's own responses, a reward model of them, and the policy gradient on it."""
    assert task.reward is not None, "the drift tasks bring their reward"
    b = start.sample(task.train, 2 * size.pairs, Sampling(size.horizon), stage.rng)
    value = task.reward(b).value
    first, second = torch.arange(0, len(b), 2), torch.arange(1, len(b), 2)
    untied = value[first] != value[second]
    if int(untied.sum()) < 16:
        raise ValueError(
            f"{int(untied.sum())} of {len(first)} pairs differ in their mistakes: there is nothing to compare"
        )
    better, worse = (
        torch.where((value[first] > value[second]) == side, first, second)[untied] for side in (True, False)
    )
    pairs = Pairs(b.select(better), b.select(worse), torch.zeros(int(untied.sum())))
    kept = len(pairs) // 8
    fit = stage.stage("reward")
    learned, held_out = pairs.select(range(kept, len(pairs))), pairs.select(range(kept))
    if (done := fit.result()) is None:
        reward, about = reward_model.train(size.rm, start, learned, held_out, fit)
        reward.save(fit.folder / "model")
        done = fit.finish({"accuracy": about["accuracy"], "pairs": len(learned), "ties": int((~untied).sum())})
    reward = RewardModel.load(fit.folder / "model", start)
    policy, _ = grpo.train(
        replace(size.rl, max_new_tokens=size.horizon), start, reward, task, stage.stage("rl"), task.reward
    )
    return policy, {**done, "labels": len(first)}


def rewarded(size: Size, start: Policy, task: Task, stage: Run) -> tuple[Policy, dict[str, Any]]:
    """The same policy gradient with the true reward, minus the share of mistakes: what a perfect reward model gives."""
    assert task.reward is not None, "the drift tasks bring their reward"
    policy, figures = grpo.train(replace(size.rl, max_new_tokens=size.horizon), start, task.reward, task, stage)
    return policy, dict(figures)


TRAIN = {"dagger": asked, "rlhf": compared, "rl": rewarded}


def gathered(found: Sequence[Mapping[str, Any]], kind: str) -> list[meter.Measured]:
    """What was measured of students on a task, a seed each."""
    return [meter.Measured.of(one["measured"][kind]) for one in found]
