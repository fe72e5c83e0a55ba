"""Many runs: by hand, by counting, and never more certain than a handful of seeds can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from tokenmdp import stats
from tokenmdp.stats import runs


def test_interquartile_mean_by_hand():
    # eight values: drop two at each end, the mean of 3, 4, 5, 6
    assert stats.interquartile_mean([1, 2, 3, 4, 5, 6, 7, 800]) == 4.5
    assert stats.interquartile_mean([[1, 2, 3, 4], [5, 6, 7, 800]]) == 4.5
    assert stats.interquartile_mean([3.0, 3.0]) == 3.0
    with pytest.raises(ValueError, match="at least one"):
        stats.interquartile_mean([])


def test_probability_of_improvement_by_hand():
    # pairs (2,1) > , (2,2) =, (2,3) <, (4,1) (4,2) (4,3) > : (4 + 1/2) / 6
    assert stats.probability_of_improvement([2, 4], [1, 2, 3]) == pytest.approx(4.5 / 6)
    assert stats.probability_of_improvement([1, 1], [1, 1]) == 0.5


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=8),
    st.lists(st.integers(-3, 3), min_size=1, max_size=8),
)
def test_probability_of_improvement_is_counting(a, b):
    counted = sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))
    assert stats.probability_of_improvement(a, b) == pytest.approx(counted)
    assert stats.probability_of_improvement(b, a) == pytest.approx(1 - counted)


def test_stratified_bootstrap_resamples_within_each_task():
    # Two tasks whose levels lie 100 apart: were runs mixed across tasks, the mean could leave [50, 59].
    runs = np.arange(10.0)[:, None] + [0.0, 100.0]
    interval = stats.stratified_bootstrap(runs, np.mean, seed=2)
    assert interval.mean == 54.5
    assert 50.0 <= interval.low < 54.5 < interval.high <= 59.0
    # Three runs: Student's. A task's mean has variance (2/3) / 3, the mean of two half of that, 3/2 of it are 1/6.
    half = 4.302653 / np.sqrt(6)
    few = stats.stratified_bootstrap(runs[:3], np.mean, resamples=20_000)
    assert few == pytest.approx((51.0, 51.0 - half, 51.0 + half), abs=0.05)
    assert stats.stratified_bootstrap([1.0, 2.0, 3.0, 4.0, 40.0]).mean == 3.0  # one dropped at each end


def test_stratified_bootstrap_of_the_mean_agrees_with_bootstrap_mean():
    """Symmetric data, where BCa's acceleration is 0: the same interval up to the noise of resampling."""
    x = np.concatenate([y := np.random.default_rng(0).normal(size=20), -y]) + 3
    ours, theirs = stats.stratified_bootstrap(x, np.mean, resamples=10_000), stats.bootstrap_mean(x)
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_few_runs_are_covered_as_often_as_promised(seeds):
    """400 simulated solvers with two to five seeds each: the interval of the IQM holds the truth in 95 % of them, no
    fewer than 92 % (three standard errors), where resamples of three cannot in more than 75."""
    rng = np.random.default_rng(7)
    hits = 0
    for study in range(400):
        interval = stats.stratified_bootstrap(rng.normal(size=seeds), resamples=200, seed=study)
        hits += interval.low <= 0.0 <= interval.high
    assert hits / 400 >= 0.917


@pytest.mark.parametrize(
    ("runs", "match"),
    [([1.0], "one run"), ([2.0, 2.0], "ended alike"), ([1.0, float("nan")], "NaN"), ([], "some of each")],
)
def test_stratified_bootstrap_refuses_what_it_cannot_answer(runs, match):
    with pytest.raises(ValueError, match=match):
        stats.stratified_bootstrap(runs)


def test_improvement_has_an_interval_and_few_runs_never_look_certain():
    rng = np.random.default_rng(3)
    mean, low, high = stats.improvement(rng.normal(0.5, 1, size=40), rng.normal(0, 1, size=40))
    assert 0.5 < low < mean < high < 1
    assert mean == pytest.approx(0.638, abs=0.15)  # Φ(0.5/√2)
    # All of five above all of five. With k = 2 that has probability 2/7 · 4/9 · 6/11 · 8/13 · 10/15 = 0.0284, so the k
    # for 0.025 is a little below 2, and P = k/(k+1) a little below 2/3.
    separated = stats.improvement([5, 6, 7, 8, 9], [0, 1, 2, 3, 4])
    assert separated == (1.0, pytest.approx(0.655, abs=0.005), 1.0)
    assert stats.improvement([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]) == (0.0, 0.0, pytest.approx(1 - separated.low))
    with pytest.raises(ValueError, match="at least two of each"):
        stats.improvement([1.0], [0.0, 2.0])


@pytest.mark.parametrize(("n", "m"), [(3, 3), (4, 4), (5, 5), (5, 3), (3, 8)])
def test_improvement_leaves_one_half_out_where_the_rank_test_rejects(n, m):
    """For every number of won pairs; they are made by pushing one run of b up past the runs of a at a time."""
    for wins in range(n * m + 1):
        full, rest = divmod(wins, n)  # so many runs of b below all of a, one below `rest` of them, the others above all
        b = [-1.0] * full + ([n - rest - 0.5] if full < m else []) + [n + 1.0] * (m - full - 1)
        a = np.arange(n, dtype=float)
        interval = stats.improvement(a, b)
        assert interval.mean == pytest.approx(wins / (n * m))
        p = scipy_stats.mannwhitneyu(a, b + 1e-9 * np.arange(m), method="exact").pvalue
        assert (interval.low > 0.5 or interval.high < 0.5) == (p < 0.05)
        assert interval.low <= interval.mean <= interval.high


def test_won_pairs_have_the_distribution_of_the_best_of_k():
    # Two of a and one of b with k = 2: a, a first 4/5 · 2/3, then b: 2 wins; a, b, a: 4/5 · 1/3, 1 win; b first 1/5: none.
    assert runs._wins(2, 1, 2.0) == pytest.approx([3 / 15, 4 / 15, 8 / 15])


def test_performance_profile_by_hand():
    # above 0: 4 of 4; above 1: 3 of 4 (one run is at 1 and not above); above 3: none
    assert stats.performance_profile([1, 2, 2, 3], [0, 1, 3]).tolist() == [1.0, 0.75, 0.0]
    assert stats.performance_profile([[1, 2], [2, 3]], [1]).tolist() == [0.75]
