"""Small runs of the recipes that learn from judgements: pairs, labels, and pairs the policy samples itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tiny_recipes import liking, policy, preferences, responses, task
from tokenmdp.recipes import dpo, kto, online_dpo
from tokenmdp.types import Batch, Pairs


def judged(count: int, seed: int = 0) -> tuple[Batch, Tensor]:
    """Responses, good ones with many of the liked word and bad ones with few, in turns."""
    good, bad = responses(count, 0.8, seed), responses(count, 0.05, seed + 1)
    both = Batch.concat([good, bad]).select([i + count * (i % 2) for i in range(count)])
    return both, torch.arange(count) % 2 == 0


def build_dpo(**changes: Any) -> tuple[dpo.Config, Sequence[Any]]:
    settings = {"steps": 4, "rows": 6, "learning_rate": 5e-3, "warmup": 1, "evaluate_every": 2, "held_out": 0.2}
    pairs: Pairs = preferences(30)
    return dpo.Config(**{**settings, "micro_tokens": 60, **changes}), (policy(), pairs)


def build_kto(**changes: Any) -> tuple[kto.Config, Sequence[Any]]:
    settings = {"steps": 4, "rows": 6, "learning_rate": 5e-3, "warmup": 1, "evaluate_every": 2, "held_out": 0.2}
    return kto.Config(**{**settings, "micro_tokens": 40, **changes}), (policy(), *judged(40))


def build_online_dpo(**changes: Any) -> tuple[online_dpo.Config, Sequence[Any]]:
    settings = {"steps": 3, "prompts": 4, "samples": 3, "max_new_tokens": 5, "learning_rate": 3e-3, "micro_tokens": 60}
    return online_dpo.Config(**{**settings, **changes}), (policy().freeze(), liking(), task())


BUILDERS: dict[str, Callable[..., tuple[Any, Sequence[Any]]]] = {
    "dpo": build_dpo,
    "kto": build_kto,
    "online_dpo": build_online_dpo,
}
