"""Small runs of the recipes that learn and assign credit, and a toy in which steps are right or wrong for all to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tiny_models import EOS, batch
from tiny_recipes import policy
from tokenmdp.recipes import process_reward
from tokenmdp.types import Batch

CLOSES = 4  # the word that closes a step
WRONG_STEP = 5  # an inner step with this word is wrong; the answer does not show it
WRONG_ANSWER = 6  # a last step with this word is wrong, and so is the response
ASKED = (1, 2, 3, 7, 8, 9, 10, 11)  # what prompts are made of: no word that says anything of a step


def in_steps(count: int, seed: int, most: int = 3) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Responses of `most` steps of two words, three in ten of them wrong, and the labels of the steps; to 120 prompts."""
    rng = torch.Generator().manual_seed(seed)
    rows, labels = [], []
    for i in range(count):
        response: list[int] = []
        marks = {}
        for k in range(most):
            words = torch.randint(7, 12, (2,), generator=rng).tolist()
            wrong = float(torch.rand((), generator=rng)) < 0.3
            if wrong:
                words[int(torch.randint(2, (), generator=rng))] = WRONG_ANSWER if k == most - 1 else WRONG_STEP
            response += [*words, CLOSES]
            marks[len(response) - 1] = float(not wrong)
        rows.append(([ASKED[i % 8], ASKED[i // 8 % 5], ASKED[i // 40 % 3]], [*response, EOS]))
        labels.append(marks)
    b = batch(rows)
    label, mask = torch.zeros(b.tokens.shape), torch.zeros_like(b.action)
    for row, marks in enumerate(labels):
        for at, y in marks.items():
            label[row, 3 + at], mask[row, 3 + at] = y, True
    return b, label, mask


def build_process_reward(**changes: Any) -> tuple[process_reward.Config, Sequence[Any]]:
    settings = {
        "epochs": 2, "rows": 8, "learning_rate": 5e-3, "head_learning_rate": 5e-3, "warmup": 1, "micro_tokens": 60,
        "delimiter": f"w{CLOSES}", "held_out": 0.2,
    }  # fmt: skip
    return process_reward.Config(**{**settings, **changes}), (policy(), *in_steps(20, seed=0))


BUILDERS: dict[str, Callable[..., tuple[Any, Sequence[Any]]]] = {"process_reward": build_process_reward}
