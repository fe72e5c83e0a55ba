"""Small runs of the recipes that choose among samples, learn from logs, fit values, or search; as in tiny_recipes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_recipes import liked_share, liking, policy, responses, task
from tokenmdp.models import tiny as characters
from tokenmdp.models.policy import Policy
from tokenmdp.recipes import awr, evolution, guided, hindsight, ilql, raft, soft_q
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.tasks import Task, copying
from tokenmdp.types import Batch

_SMALL = {"steps": 3, "prompts": 4, "samples": 4, "max_new_tokens": 5, "micro_tokens": 40}


def log(count: int = 60, share: float = 0.25, seed: int = 3) -> tuple[Batch, Tensor]:
    """Responses somebody drew, of which about a quarter of the words are liked, and how liked each was found."""
    logged = responses(count, share, seed)
    return logged, torch.tensor(liked_share(list(logged.texts)))


def silent_after(phases: int, answer: float | None = None) -> FunctionReward:
    """The share of liked words in the first phases of a run; then the same answer for every response, or no verdict."""
    asked = itertools.count()

    def liked_at_first(completions: list[str], **_: Any) -> list[float] | list[float | None]:
        return liked_share(completions) if next(asked) < phases else [answer] * len(completions)

    return FunctionReward(liked_at_first, name="silent_after", max_missing=1.0)


def scored_at_first(count: int, rows: int, folder: Path) -> tuple[Batch, Tensor]:
    """A log in which a run of seed 0 meets rows with a score in its first step, and in the next two none."""
    logged, score = log(count)
    with Run.open(folder, config={}, seed=0) as run:
        drawn = [torch.randperm(count, generator=run.rng)[:rows] for _ in range(3)]
    known = torch.zeros(count, dtype=torch.bool)
    known[drawn[0]] = True
    assert not bool(known[torch.cat(drawn[1:])].any()), "the draws overlap: take other numbers"
    return logged, torch.where(known, score, torch.nan)


def obeying() -> tuple[Policy, Task]:
    """A model of characters that knows nothing, and the instructions it should follow."""
    model = characters.tiny(seed=1)
    return model, copying.load(model, letters=10)


def build_raft(**changes: Any) -> tuple[raft.Config, Sequence[Any]]:
    settings = {**_SMALL, "learning_rate": 3e-3, "kl": 0.05, "truncation": 0.1}
    return raft.Config(**{**settings, **changes}), (policy().freeze(), liking(), task())


def build_awr(**changes: Any) -> tuple[awr.Config, Sequence[Any]]:
    settings = {"steps": 4, "rows": 8, "learning_rate": 5e-3, "warmup": 1, "micro_tokens": 40}
    return awr.Config(**{**settings, **changes}), (policy(), *log())


def build_ilql(**changes: Any) -> tuple[ilql.Config, Sequence[Any]]:
    settings = {"steps": 4, "rows": 8, "learning_rate": 5e-3, "value_learning_rate": 1e-2, "micro_tokens": 40}
    return ilql.Config(**{**settings, **changes}), (policy(), *log())


def build_soft_q(**changes: Any) -> tuple[soft_q.Config, Sequence[Any]]:
    settings = {**_SMALL, "steps": 4, "sync": 2, "learning_rate": 3e-3, "kl": 0.1}
    return soft_q.Config(**{**settings, **changes}), (policy().freeze(), liking(), task())


def build_evolution(**changes: Any) -> tuple[evolution.Config, Sequence[Any]]:
    settings = {"steps": 3, "pairs": 2, "prompts": 4, "max_new_tokens": 5, "train": "lora-2"}
    return evolution.Config(**{**settings, **changes}), (policy().freeze(), liking(), task())


def build_guided(**changes: Any) -> tuple[guided.Config, Sequence[Any]]:
    settings = {"prompts": 6, "k": 3, "block": 2, "max_new_tokens": 5, "chunk": 2}
    cfg = guided.Config(**{**settings, **changes})
    return cfg, (policy().freeze(), list(task().train[: cfg.prompts]), liking())


def build_hindsight(**changes: Any) -> tuple[hindsight.Config, Sequence[Any]]:
    model, asked = obeying()
    settings = {**_SMALL, "learning_rate": 3e-3, "max_new_tokens": 2}
    return hindsight.Config(**{**settings, **changes}), (model.freeze(), asked.reward, asked)


BUILDERS: dict[str, Callable[..., tuple[Any, Sequence[Any]]]] = {
    "awr": build_awr,
    "evolution": build_evolution,
    "guided": build_guided,
    "hindsight": build_hindsight,
    "ilql": build_ilql,
    "raft": build_raft,
    "soft_q": build_soft_q,
}
