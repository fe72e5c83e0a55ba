"""For every recipe a run of a few small steps: what the contract and the recipes' own tests run.

A builder gives a config and what `train` takes between the config and the run, freshly made at every call. A new recipe is
tested by adding its builder to `BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tiny_models import EOS, batch, prompt, tiny
from tokenmdp.models.heads import Critic
from tokenmdp.models.policy import Policy
from tokenmdp.recipes import best_of_n, ppo, reward_model, sft
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Pairs

WORDS = 12  # the vocabulary; token 0 is EOS
LIKED = 3  # what demonstrators say, comparisons prefer and the reward counts


def policy() -> Policy:
    """A fresh policy over a dozen words, near uniform."""
    return tiny("llama", vocabulary=WORDS, spread=0.15)


def liked_share(completions: list[str], **_: Any) -> list[float]:
    """The share of a response's words that are the liked one."""
    words = [text.split() for text in completions]
    return [w.count(f"w{LIKED}") / max(1, len(w)) for w in words]


def liking() -> FunctionReward:
    return FunctionReward(liked_share, name="liking")


def task() -> Task:
    prompts = tuple(prompt(a, b, row=10 * a + b) for a in range(1, WORDS) for b in range(1, 6))
    return Task(name="liking", train=prompts[5:], held_out=prompts[:5], reward=liking())


def responses(count: int, share: float, seed: int) -> Batch:
    """Responses of one to six words, of which `share` are the liked one, every second of them ended by EOS."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(1, 7, (), generator=rng))
        words = torch.randint(1, WORDS, (length,), generator=rng)
        liked = torch.rand(length, generator=rng) < share
        response = torch.where(liked, LIKED, words).tolist()
        rows.append(([1 + i % 5, 2], response + [EOS] * (i % 2)))
    return batch(rows)


def preferences(count: int, seed: int = 0) -> Pairs:
    """The response with more liked words is the chosen one."""
    return Pairs(responses(count, 0.8, seed), responses(count, 0.05, seed + 1), torch.zeros(count))


def build_sft(**changes: Any) -> tuple[sft.Config, Sequence[Any]]:
    settings = {"steps": 4, "rows": 6, "learning_rate": 5e-3, "warmup": 1, "evaluate_every": 2, "micro_tokens": 40}
    return sft.Config(**{**settings, **changes}), (policy(), responses(24, 0.8, 1), responses(8, 0.8, 2))


def build_reward_model(**changes: Any) -> tuple[reward_model.Config, Sequence[Any]]:
    settings = {"epochs": 2, "rows": 8, "learning_rate": 5e-3, "warmup": 1, "micro_tokens": 60}
    return reward_model.Config(**{**settings, **changes}), (policy(), preferences(20), preferences(10, seed=7))


def build_ppo(**changes: Any) -> tuple[ppo.Config, Sequence[Any]]:
    settings = {
        "steps": 3, "prompts": 4, "samples": 2, "max_new_tokens": 5, "learning_rate": 3e-3, "epochs": 1, "micro_tokens": 40,
        "kl_target": 0.5,
    }  # fmt: skip
    reference = policy().freeze()
    critic = Critic(reference.backbone.twin("head"))
    return ppo.Config(**{**settings, **changes}), (reference, critic, liking(), task())


def build_best_of_n(**changes: Any) -> tuple[best_of_n.Config, Sequence[Any]]:
    settings = {"prompts": 6, "n": 4, "max_new_tokens": 5, "chunk": 2}
    cfg = best_of_n.Config(**{**settings, **changes})
    return cfg, (policy().freeze(), list(task().train[: cfg.prompts]), liking())


BUILDERS: dict[str, Callable[..., tuple[Any, Sequence[Any]]]] = {
    "best_of_n": build_best_of_n,
    "ppo": build_ppo,
    "reward_model": build_reward_model,
    "sft": build_sft,
}


def liking_reward_model() -> RewardModel:
    """A reward model with a random head: enough to start a critic from."""
    reward = RewardModel.from_policy(policy(), "head")
    with torch.no_grad():
        reward.head.weight.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(0))
    return reward
