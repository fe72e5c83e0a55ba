"""Small runs of the recipes that imitate an expert who can be asked, and such an expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from tiny_models import tiny
from tiny_recipes import WORDS, policy, responses, task
from tokenmdp import mdp
from tokenmdp.experts import Advice, Teacher
from tokenmdp.recipes import dagger, distill
from tokenmdp.tasks import Task
from tokenmdp.types import Batch


class Counting:
    """After word i comes word i + 1, and the first after the last: right in any state, whatever led there."""

    name = "counting"

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, batch: Batch) -> Advice:
        mdp.touch("expert")
        self.asked += int(batch.action.sum())
        before = torch.cat([torch.zeros_like(batch.tokens[:, :1]), batch.tokens[:, :-1]], 1)
        return Advice(torch.where(batch.action, before % (WORDS - 1) + 1, 0), batch.action)


def taught() -> Task:
    return replace(task(), demonstrations=responses(12, 0.8, 3))


def build_dagger(**changes: Any) -> tuple[dagger.Config, Sequence[Any]]:
    settings = {
        "steps": 4, "prompts": 4, "samples": 2, "max_new_tokens": 5, "mixture": 0.8, "decay": 0.5, "demonstrations": 2,
        "queries": 100, "updates": 2, "rows": 6, "learning_rate": 3e-3, "micro_tokens": 40,
    }  # fmt: skip
    return dagger.Config(**{**settings, **changes}), (policy(), Counting(), taught())


def build_distill(**changes: Any) -> tuple[distill.Config, Sequence[Any]]:
    settings = {
        "steps": 4, "prompts": 3, "samples": 2, "rows": 6, "max_new_tokens": 5, "on_policy": 0.5, "divergence": "js:0.3", "updates": 2,
        "aggregate": True, "queries": 70, "learning_rate": 3e-3, "micro_tokens": 40,
    }  # fmt: skip
    teacher = Teacher(tiny("llama", vocabulary=WORDS, seed=1))
    return distill.Config(**{**settings, **changes}), (policy(), teacher, taught())


BUILDERS: dict[str, Callable[..., tuple[Any, Sequence[Any]]]] = {
    "dagger": build_dagger,
    "distill": build_distill,
}
