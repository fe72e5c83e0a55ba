"""Small runs of the policy-gradient recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tiny_recipes import liking, policy, responses, task
from tokenmdp.recipes import dapg, grpo, reinforce


def build_reinforce(**changes: Any) -> tuple[reinforce.Config, Sequence[Any]]:
    settings = {
        "steps": 3, "prompts": 4, "samples": 2, "max_new_tokens": 5, "learning_rate": 3e-3, "entropy": 0.01,
        "baseline": "leave_one_out", "micro_tokens": 40,
    }  # fmt: skip
    return reinforce.Config(**{**settings, **changes}), (policy().freeze(), liking(), task())


def build_grpo(**changes: Any) -> tuple[grpo.Config, Sequence[Any]]:
    """Stale by up to a phase, so that a run broken off between two refreshes must restore the sampler."""
    settings = {
        "steps": 5, "prompts": 4, "samples": 3, "max_new_tokens": 5, "learning_rate": 3e-3, "epochs": 1, "sync": 2,
        "dynamic_sampling": 1, "overlong": 2, "micro_tokens": 40,
    }  # fmt: skip
    return grpo.Config(**{**settings, **changes}), (policy().freeze(), liking(), task())


def build_dapg(**changes: Any) -> tuple[dapg.Config, Sequence[Any]]:
    settings = {
        "steps": 3, "prompts": 4, "samples": 2, "demonstrations": 3, "max_new_tokens": 5, "learning_rate": 3e-3,
        "micro_tokens": 40,
    }  # fmt: skip
    shown = replace(task(), demonstrations=responses(12, 0.8, 1))
    return dapg.Config(**{**settings, **changes}), (policy().freeze(), liking(), shown)


BUILDERS: dict[str, Callable[..., tuple[Any, Sequence[Any]]]] = {
    "dapg": build_dapg,
    "grpo": build_grpo,
    "reinforce": build_reinforce,
}
