"""The figures of a reward on held-out pairs, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny_models import batch
from tokenmdp.rewards.judged import judge
from tokenmdp.types import Batch, Pairs, Score


class LastToken:
    """The number of the last token, in units of 2."""

    name, scale = "last", 2.0

    def __call__(self, b: Batch) -> Score:
        last = b.tokens[torch.arange(len(b)), b.length - 1]
        return Score.of(last.float() / self.scale)


def test_accuracy_calibration_and_length():
    chosen = batch([([1], [3]), ([2], [4, 4]), ([3], [5]), ([4], [6, 6, 9])])
    rejected = batch([([1], [2]), ([2], [4]), ([3], [7]), ([4], [8])])
    found = judge(LastToken(), Pairs(chosen, rejected, torch.zeros(4)))
    # Margins 1, 0, −2, 1 in the units that were fitted: right, a tie, wrong, right.
    assert found["accuracy"] == pytest.approx(2.5 / 4)
    assert found["n_pairs"] == 4
    # Seen from sides 1, 2, 1, 2: σ(1) = .731 and it was, ½ and it was not, σ(−2) = .119 and it was, σ(−1) = .269 and not.
    assert found["ece"] == pytest.approx((0.269 + 0.5 + 0.881 + 0.269) / 4, abs=1e-3)
    low, high = found["length_correlation_ci"]
    assert low <= found["length_correlation"] <= high


def test_nothing_is_said_of_length_where_it_does_not_vary():
    one, other = batch([([i], [3 + i]) for i in (1, 2, 3)]), batch([([i], [2]) for i in (1, 2, 3)])
    assert "length_correlation" not in judge(LastToken(), Pairs(one, other, torch.zeros(3)))


def test_the_prompt_is_the_cluster_of_its_sides_and_pairs():
    """Ten prompts, each pair there once or three times: copies are no new evidence. Two prompts are too few to tell."""
    chosen = [([i], [3 + (7 * i) % 11] * (1 + i % 3)) for i in range(1, 11)]
    rejected = [([i], [2 + (5 * i) % 7] * (1 + i % 2)) for i in range(1, 11)]

    def told(times: int, prompts: int = 10) -> dict[str, Any]:
        return judge(
            LastToken(),
            Pairs(batch(chosen[:prompts] * times), batch(rejected[:prompts] * times), torch.zeros(prompts * times)),
        )

    assert told(3)["high"] - told(3)["low"] > 0.9 * (told(1)["high"] - told(1)["low"])
    assert told(3)["length_correlation_ci"] == pytest.approx(told(1)["length_correlation_ci"])
    assert "length_correlation" not in told(4, prompts=2)
