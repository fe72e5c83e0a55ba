"""The students of bench/compounding.py on the embedded model: a teacher tuned on movie reviews, and who imitates it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tokenmdp.experts import Teacher
from tokenmdp.functional import weights
from tokenmdp.lab import meter
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import distill, grpo, reward_model, sft
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run
from tokenmdp.tasks import Task, sentiment
from tokenmdp.types import Batch, Pairs

ARMS = ("bc", "dagger", "rlhf")


@dataclass(frozen=True)
class Size:
    """What the full and the quick size differ in."""

    model: str
    horizon: int
    lengths: int
    reviews: dict[str, Any]  # of the sentiment task: how many in each part
    teacher: sft.Config
    demonstrations: int  # responses of the teacher that a student clones
    student: sft.Config
    dagger: distill.Config
    pairs: int  # prompts with two responses each, compared by the teacher
    rm: reward_model.Config
    rl: grpo.Config
    judged: int  # prompts on which mistakes are counted
    samples: int


FULL = Size(
    model="smollm2-135m-instruct",
    horizon=64,
    lengths=5,
    reviews={"gold": 200, "gold_test": 50, "demonstrations": 2000, "train": 1000, "held_out": 64},
    teacher=sft.Config(steps=40, rows=16, learning_rate=1e-4, evaluate_every=40),
    demonstrations=96,
    student=sft.Config(steps=24, rows=16, learning_rate=1e-4, train="top-4", evaluate_every=24),
    dagger=distill.Config(
        divergence="forward", steps=3, prompts=24, rows=16, updates=8, aggregate=True, learning_rate=1e-4, train="top-4"
    ),
    pairs=48,
    rm=reward_model.Config(epochs=2, rows=16, learning_rate=1e-4, head_learning_rate=5e-3, train="top-4", pool="mean"),
    rl=grpo.Config(steps=6, prompts=8, samples=4, learning_rate=5e-5, kl=0.02, train="top-4"),
    judged=32,
    samples=2,
)
QUICK = replace(
    FULL,
    model="tiny",
    horizon=12,
    lengths=3,
    reviews={"gold": 60, "gold_test": 20, "demonstrations": 200, "train": 60, "held_out": 8},
    teacher=replace(FULL.teacher, steps=20, learning_rate=5e-3, evaluate_every=20, micro_tokens=8192),
    demonstrations=16,
    student=replace(FULL.student, steps=5, learning_rate=3e-3, train="all", evaluate_every=5),
    dagger=replace(FULL.dagger, steps=2, prompts=8, rows=8, updates=2, learning_rate=3e-3, train="all"),
    pairs=24,
    rm=replace(FULL.rm, learning_rate=2e-3, train="all"),
    rl=replace(FULL.rl, steps=2, prompts=4, learning_rate=1e-3, train="all"),
    judged=8,
)


def begin(size: Size, run: Run) -> tuple[Policy, Policy, Task]:
    """The start, the teacher made of it (in the folder `teacher`), and the task in their tokens."""
    start = (catalog.tiny(sentiment.texts()) if size.model == "tiny" else catalog.load(size.model)).freeze()
    task = sentiment.load(start, 8, size.horizon, **size.reviews)
    stage = run.stage("teacher")
    if stage.result() is None:
        assert task.demonstrations is not None, "the sentiment task brings demonstrations"
        kept = len(task.demonstrations) // 20
        learned = task.demonstrations.select(range(kept, len(task.demonstrations)))
        teacher, figures = sft.train(size.teacher, start, learned, task.demonstrations.select(range(kept)), stage)
        stage.finish({**figures, **teacher.publish(stage.folder / "model")})
    teacher = catalog.load(stage.folder / "model").freeze()
    teacher.name = "teacher"
    return start, teacher, task


def trial(size: Size, run: Run, begun: tuple[Policy, Policy, Task], arm: str, seed: int) -> dict[str, Any]:
    """One student: trained, and measured against the teacher; from its folder where that is done."""
    stage = run.stage(f"{arm}-{seed}")
    if (done := stage.result()) is not None:
        return done
    start, teacher, task = begun
    if arm == "start":
        policy, figures = start, {}
    else:
        training = stage.stage("train")
        figures = training.result() or {}
        if not figures:
            if arm == "bc":
                policy, figures = cloned(size, start, teacher, task, training)
            else:
                base = catalog.load(run.folder / f"bc-{seed}" / "train" / "model").freeze()
                policy, figures = {"dagger": asked, "rlhf": compared}[arm](size, base, teacher, task, training)
            figures = training.finish({**figures, **policy.publish(training.folder / "model")})
        policy = catalog.load(training.folder / "model").freeze()
        policy.name = arm
    cfg = meter.Config(max_new_tokens=size.horizon, samples=size.samples, chunk=32)
    prompts = task.held_out[: size.judged]
    found = meter.measure(cfg, policy, meter.Model(teacher, policy), prompts, stage.stage("meter"))
    kept = {k: v for k, v in figures.items() if k not in ("model", "fingerprint")}
    return stage.finish({"figures": kept, "measured": found.plain()})


def cloned(size: Size, start: Policy, teacher: Policy, task: Task, stage: Run) -> tuple[Policy, dict[str, Any]]:
    """Behaviour cloning of few responses of the teacher."""
    shown = teacher.sample(task.draw(size.demonstrations, stage.rng), 1, Sampling(size.horizon), stage.rng)
    kept = max(2, size.demonstrations // 12)
    parts = [shown.select(range(kept, len(shown))), shown.select(range(kept))]
    policy, figures = sft.train(size.student, start, parts[0], parts[1], stage)
    return policy, {**figures, "labels": int(parts[0].action.sum())}


def asked(size: Size, start: Policy, teacher: Policy, task: Task, stage: Run) -> tuple[Policy, dict[str, Any]]:
    """DAgger with a teacher that tells its whole distribution: forward KL on the student's states of all phases."""
    cfg = replace(size.dagger, max_new_tokens=size.horizon)
    return distill.train(cfg, start, Teacher(teacher), task, stage)


def compared(size: Size, start: Policy, teacher: Policy, task: Task, stage: Run) -> tuple[Policy, dict[str, Any]]:
    """RLHF with the teacher as annotator: it prefers the response it finds more likely a token."""
    b = start.sample(task.draw(size.pairs, stage.rng), 2, Sampling(size.horizon), stage.rng)
    liking = likelihood(teacher, b)
    first, second = torch.arange(0, len(b), 2), torch.arange(1, len(b), 2)
    better, worse = (torch.where((liking[first] > liking[second]) == side, first, second) for side in (True, False))
    pairs = Pairs(b.select(better), b.select(worse), torch.zeros(len(first)))
    kept = len(pairs) // 6
    fit = stage.stage("reward")
    if (done := fit.result()) is None:
        learned, held_out = pairs.select(range(kept, len(pairs))), pairs.select(range(kept))
        reward, about = reward_model.train(size.rm, start, learned, held_out, fit)
        reward.save(fit.folder / "model")
        done = fit.finish({"accuracy": about["accuracy"], "pairs": len(learned)})
    reward = RewardModel.load(fit.folder / "model", start)
    policy, _ = grpo.train(replace(size.rl, max_new_tokens=size.horizon), start, reward, task, stage.stage("rl"))
    return policy, {**done, "labels": len(pairs)}


def likelihood(teacher: Policy, batch: Batch) -> torch.Tensor:
    """[B] mean log-probability a token."""
    logp = in_parts(teacher.evaluate, batch)["logp"]
    share = weights.per_sequence(batch.action)
    return (logp * share).sum(-1) * len(batch)
