from __future__ import annotations

import numpy as np
import pytest

from tokenmdp import stats
from tokenmdp.prompting import intervals


@pytest.mark.parametrize("questions", [5, 40])
def test_with_one_trial_a_question_it_is_the_interval_of_a_mean(questions: int) -> None:
    value = np.random.default_rng(0).normal(size=questions)
    ours = intervals.grouped_mean(value, np.arange(questions), resamples=20_000)
    plain = stats.bootstrap_mean(value)
    assert ours.mean == pytest.approx(plain.mean)
    assert ours == pytest.approx(plain, abs=0.05 * (plain.high - plain.low))


def test_repeats_of_a_question_do_not_narrow_its_interval() -> None:
    value = np.random.default_rng(1).normal(size=12)
    once = intervals.grouped_mean(value, np.arange(12))
    thrice = intervals.grouped_mean(np.tile(value, 3), np.tile(np.arange(12), 3))
    assert thrice == pytest.approx(once)


def test_values_without_spread_are_not_certain() -> None:
    """As many trials as groups: of rewards Wilson's own interval, of differences the same on −1 to 1."""
    group, ones = np.repeat(np.arange(10), 3), np.ones(30)
    share = stats.wilson(10, 10)
    assert intervals.grouped_mean(ones, group) == pytest.approx(share)
    assert intervals.grouped_mean(0 * ones, group) == pytest.approx(stats.wilson(0, 10))
    assert intervals.grouped_mean(0.3 * ones, group) == pytest.approx(stats.wilson(3, 10))
    assert intervals.grouped_mean(ones, group, least=-1.0) == pytest.approx((1.0, 2 * share.low - 1, 1.0))
    assert intervals.grouped_mean(0.1 * ones, group, least=-1.0).low < 0
    assert intervals.grouped_mean(ones[:2], np.arange(2), least=-1.0).low < 0
    assert intervals.grouped_mean(0 * ones, group, least=-1.0) == (0.0, 0.0, 0.0)  # a choice and itself
    # Weights 9 and 1 of ten groups: (9 + 9·1)² / (9² + 9) = 3.6 groups are what they are worth.
    weight = np.array([9.0] + [1.0] * 9)
    found = intervals.grouped_ratio(weight, weight, np.arange(10))
    assert found == pytest.approx(stats.wilson(3.6, 3.6))


def test_a_ratio_is_of_sums_and_needs_weight() -> None:
    top, bottom = np.array([1.0, 0.0, 3.0]), np.array([1.0, 1.0, 2.0])
    assert intervals.grouped_ratio(top, bottom, np.arange(3)).mean == 1.0
    with pytest.raises(ValueError, match="all weights are 0"):
        intervals.grouped_ratio(top, np.zeros(3), np.arange(3))
    with pytest.raises(ValueError, match="1 question"):
        intervals.grouped_mean(top, np.zeros(3, dtype=np.int64))
