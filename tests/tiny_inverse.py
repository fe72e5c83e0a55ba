"""Small runs of the recipes that learn a reward from demonstrations alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tiny_recipes import policy, responses
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import adversarial, demo_reward
from tokenmdp.types import Batch, Pairs

H = 7  # as long as the longest of `responses`


def sides(count: int, seed: int) -> Pairs:
    """Demonstrations that say the liked word, and a fresh policy's own responses to the same prompts."""
    shown = responses(count, 0.8, seed)
    own = policy().freeze().sample(shown.prompts, 1, Sampling(max_new_tokens=H), torch.Generator().manual_seed(seed))
    return Pairs(shown, own, torch.zeros(count))


def build_adversarial(**changes: Any) -> tuple[adversarial.Config, Sequence[Any]]:
    settings = {
        "steps": 3, "prompts": 6, "samples": 2, "max_new_tokens": H, "learning_rate": 3e-3, "minibatches": 2,
        "discriminator_learning_rate": 3e-3, "kl": 0.01, "entropy": 0.01, "micro_tokens": 40,
    }  # fmt: skip
    start = policy().freeze()
    discriminator = adversarial.Discriminator(start.backbone.twin("all"))
    shown: tuple[Batch, Batch] = (responses(24, 0.8, 1), responses(8, 0.8, 2))
    return adversarial.Config(**{**settings, **changes}), (start, discriminator, *shown)


def build_demo_reward(**changes: Any) -> tuple[demo_reward.Config, Sequence[Any]]:
    settings = {"epochs": 2, "rows": 8, "learning_rate": 5e-3, "warmup": 1, "max_new_tokens": H, "micro_tokens": 60}
    return demo_reward.Config(**{**settings, **changes}), (policy().freeze(), sides(24, 1), sides(10, 5))


BUILDERS: dict[str, Callable[..., tuple[Any, Sequence[Any]]]] = {
    "adversarial": build_adversarial,
    "demo_reward": build_demo_reward,
}
