"""The figures of a reward on held-out pairs, by hand."""

from __future__ import annotations

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
    chosen = batch([([1], [3]), ([1], [4, 4]), ([1], [5]), ([1], [6, 6, 9])])
    rejected = batch([([1], [2]), ([1], [4]), ([1], [7]), ([1], [8])])
    found = judge(LastToken(), Pairs(chosen, rejected, torch.zeros(4)))
    # Margins 1, 0, −2, 1 in the units that were fitted: right, a tie, wrong, right.
    assert found["accuracy"] == pytest.approx(2.5 / 4)
    assert found["n_pairs"] == 4
    # Seen from sides 1, 2, 1, 2: σ(1) = .731 and it was, ½ and it was not, σ(−2) = .119 and it was, σ(−1) = .269 and not.
    assert found["ece"] == pytest.approx((0.269 + 0.5 + 0.881 + 0.269) / 4, abs=1e-3)
    low, high = found["length_correlation_ci"]
    assert low <= found["length_correlation"] <= high


def test_nothing_is_said_of_length_where_it_does_not_vary():
    one, other = batch([([1], [3]), ([1], [4])]), batch([([1], [2]), ([1], [5])])
    assert "length_correlation" not in judge(LastToken(), Pairs(one, other, torch.zeros(2)))
