"""Proportions and predicted probabilities: by hand, against scipy, and covering as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tokenmdp import stats


def test_wilson_by_hand():
    # s = 8, n = 10, z = 1.96: centre (8 + 1.9208) / 13.8416 = 0.71674,
    # half 1.96 * sqrt(10 * .8 * .2 + 0.9604) / 13.8416 = 1.96 * 1.60013 / 13.8416 = 0.22658
    rate, low, high = stats.wilson(8, 10)
    assert rate == 0.8
    assert (low, high) == pytest.approx((0.49016, 0.94332), abs=2e-5)


def test_wilson_is_scipys_and_keeps_inside_0_and_1():
    for s, n in [(0, 5), (5, 5), (3, 7), (400, 512)]:
        peer = scipy_stats.binomtest(s, n).proportion_ci(method="wilson")
        assert stats.wilson(s, n)[1:] == pytest.approx((peer.low, peer.high))
    assert stats.wilson(0, 5).low == 0.0
    assert stats.wilson(5, 5).high == 1.0


def test_wilson_without_trials_is_an_error():
    with pytest.raises(ValueError, match="at least one trial"):
        stats.wilson(0, 0)
    with pytest.raises(ValueError, match="6 successes in 5"):
        stats.wilson(6, 5)


def test_trials_that_share_a_cluster_count_for_what_they_are_worth():
    # Four clusters of two, rates 1, 1, 1/2, 0: p = 5/8; sums of y − p: 3/4, 3/4, −1/4, −5/4; squares 9 + 9 + 1 + 25 = 44
    # sixteenths; v = 4/3 · 44/16 / 64 = 0.0572917; p q / v = 0.234375 / 0.0572917 = 4.0909; times (1.95996 / 3.18245)².
    y, prompt = [1, 1, 1, 1, 1, 0, 0, 0], ["a", "a", "b", "b", "c", "c", "d", "d"]
    trials = 4.090909 * (1.959964 / 3.182446) ** 2
    assert stats.clustered_wilson(y, prompt) == pytest.approx(stats.wilson(0.625 * trials, trials), rel=1e-5)
    # Each its own cluster: Wilson's. One cluster, or all at one rate: as many trials as clusters.
    assert stats.clustered_wilson(y, np.arange(8)) == stats.wilson(5, 8)
    assert stats.clustered_wilson(y, [7] * 8) == stats.wilson(0.625, 1)
    assert stats.clustered_wilson([1] * 8, prompt) == stats.wilson(4, 4)
    assert stats.clustered_wilson([1, 0] * 4, prompt) == stats.wilson(2, 4)
    # Clusters that are more even than chance make no more of the trials than there are.
    many = np.arange(1000) // 2
    assert stats.clustered_wilson([1, 0] * 499 + [1, 1], many) == pytest.approx(stats.wilson(501, 1000))


def test_clustered_rates_are_covered_about_as_often_as_promised():
    """400 studies, 20 prompts with 2 to 10 pairs and rates of their own around 0.8 (Beta(3.2, 0.8)); Wilson's interval over
    pairs covers far less, and this one no less than three standard errors below 95 %."""
    rng = np.random.default_rng(8)
    hits = np.zeros(2)
    for _ in range(400):
        prompt = np.repeat(np.arange(20), rng.integers(2, 11, size=20))
        y = rng.random(len(prompt)) < rng.beta(3.2, 0.8, size=20)[prompt]
        for kind, found in enumerate((stats.clustered_wilson(y, prompt), stats.wilson(float(y.sum()), len(y)))):
            hits[kind] += found.low <= 0.8 <= found.high
    assert hits[0] >= 400 * 0.95 - 3 * np.sqrt(400 * 0.95 * 0.05)
    assert hits[1] < 340


def test_clustered_rates_of_what_is_no_rate_are_errors():
    with pytest.raises(ValueError, match="values span 0 to 2"):
        stats.clustered_wilson([0, 2], [1, 2])
    with pytest.raises(ValueError, match="1 cluster labels for 2 values"):
        stats.clustered_wilson([0, 1], [1])


def test_calibration_by_hand():
    # two bins: {.2, .4} -> predicted .3, observed 0; {.6, .8} -> predicted .7, observed .5
    # ECE = 1/2 * .3 + 1/2 * .2 = .25
    error, table = stats.calibration([0.2, 0.4, 0.6, 0.8], [0, 0, 1, 0], bins=2)
    assert error == pytest.approx(0.25)
    assert table == [
        {"predicted": pytest.approx(0.3), "observed": 0.0, "count": 2},
        {"predicted": pytest.approx(0.7), "observed": 0.5, "count": 2},
    ]


def test_a_probability_of_one_belongs_to_the_last_bin_and_empty_bins_are_left_out():
    error, table = stats.calibration([0.0, 1.0], [0, 1], bins=10)
    assert error == 0.0
    assert [row["count"] for row in table] == [1, 1]


def test_honest_probabilities_are_calibrated():
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    assert stats.calibration(p, rng.random(20_000) < p)[0] < 0.02


@pytest.mark.parametrize(
    ("prob", "outcome", "message"),
    [
        ([], [], "at least one number"),
        ([0.5], [1, 0], "1 probabilities and 2 outcomes"),
        ([1.5], [1], "must lie in"),
        ([0.5], [1.3], "outside"),
        ([float("nan")], [1], "NaN"),
    ],
)
def test_bad_predictions_are_errors(prob, outcome, message):
    with pytest.raises(ValueError, match=message):
        stats.calibration(prob, outcome)
