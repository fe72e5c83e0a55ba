"""The statistics: numbers worked by hand, brute force, coverage on simulated data, and clear errors."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from tokenmdp import stats

# ------------------------------------------------------------------------------------------------ bootstrap


def test_the_mean_and_the_difference_are_exact():
    assert stats.bootstrap_mean([1.0, 2.0, 6.0]).mean == 3.0
    # per-prompt means: a = 2, 5; b = 1, 1; differences 1 and 4, mean 2.5
    assert stats.paired_bootstrap([[1.0, 3.0], [5.0, 5.0]], [[1.0, 0.0, 2.0], [1.0, 1.0, 1.0]]).mean == 2.5


def test_few_prompts_have_students_interval():
    # Two values, 0 and 1: deviation √(½ / (2 · 1)) = ½, t = 12.706. Seven, −3 to 3: √(28 / (7 · 6)), t = 2.4469.
    half = 12.7062 / 2
    assert stats.bootstrap_mean([0.0, 1.0], seed=3) == pytest.approx((0.5, 0.5 - half, 0.5 + half), rel=1e-5)
    half = 2.446912 * np.sqrt(28 / 42)
    assert stats.bootstrap_mean(np.arange(-3.0, 4.0)) == pytest.approx((0.0, -half, half), rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_few_units_are_covered_as_often_as_promised(n):
    """3,000 studies of n normal values: 95 % within three standard errors (1.2 points). No resample of three reaches
    beyond the least or greatest of them, between which the centre lies 75 times in a hundred."""
    x = np.random.default_rng(n).normal(size=(3000, n))
    found = np.array([stats.bootstrap_mean(study) for study in x])
    assert ((found[:, 1] <= 0) & (found[:, 2] >= 0)).mean() == pytest.approx(0.95, abs=0.012)
    assert ((x.min(1) <= 0) & (x.max(1) >= 0)).mean() == pytest.approx(1 - 2.0 ** (1 - n), abs=0.03)


def test_what_is_impossible_is_cut_off():
    assert stats.bounded(stats.Interval(0.5, -5.0, 0.8), 0.0, 1.0) == (0.5, 0.0, 0.8)
    few = stats.pass_at_k([[1, 1], [0, 1], [0, 0]], 1)
    assert few == (0.5, 0.0, 1.0)  # ½ ± 4.3 · √(½ / 6), which is more than 1


def test_the_interval_of_many_normal_values_is_the_textbooks():
    x = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    mean, low, high = stats.bootstrap_mean(x, seed=5)
    half = scipy_stats.t.ppf(0.975, 399) * x.std(ddof=1) / 20
    assert mean == pytest.approx(x.mean())
    assert low == pytest.approx(mean - half, abs=0.03 * half + 0.01)
    assert high == pytest.approx(mean + half, abs=0.03 * half + 0.01)


def test_close_to_scipys_bca_where_the_widening_is_small():
    x = np.random.default_rng(2).exponential(size=300)
    ours = stats.bootstrap_mean(x, resamples=4000, seed=1)
    peer = scipy_stats.bootstrap((x,), np.mean, n_resamples=4000, method="BCa", rng=np.random.default_rng(1))
    width = peer.confidence_interval.high - peer.confidence_interval.low
    assert ours.low == pytest.approx(peer.confidence_interval.low, abs=0.04 * width)
    assert ours.high == pytest.approx(peer.confidence_interval.high, abs=0.04 * width)
    assert ours.high - ours.mean > ours.mean - ours.low  # skewed data: the longer arm is on the long tail's side


@pytest.mark.parametrize("prompts", [12, 40])
def test_the_interval_covers_the_truth_as_often_as_it_says(prompts):
    """600 simulated studies of skewed data: 95 % coverage within three standard errors (0.9 points each)."""
    rng = np.random.default_rng(0)
    hits = 0
    for study in range(600):
        interval = stats.bootstrap_mean(rng.gamma(4.0, size=prompts), resamples=500, seed=study)
        hits += interval.low <= 4.0 <= interval.high
    assert 0.95 - 0.027 <= hits / 600 <= 0.985


def test_samples_of_one_prompt_are_one_cluster():
    """A prompt's difficulty is shared by its samples: repeating each sample ten times must not narrow the interval."""
    x = np.random.default_rng(3).normal(size=(20, 1))
    assert stats.bootstrap_mean(np.repeat(x, 10, axis=1)) == pytest.approx(stats.bootstrap_mean(x[:, 0]))
    wrong = stats.bootstrap_mean(np.repeat(x, 10))
    right = stats.bootstrap_mean(x)
    assert (wrong.high - wrong.low) < 0.4 * (right.high - right.low)


def test_pairing_removes_the_prompts_difficulty():
    rng = np.random.default_rng(4)
    difficulty = rng.normal(0, 10, size=50)
    a, b = difficulty + 1 + rng.normal(0, 0.1, size=50), difficulty + rng.normal(0, 0.1, size=50)
    mean, low, high = stats.paired_bootstrap(a, b)
    assert 0.9 < low < mean < high < 1.1


def test_one_seed_one_answer_whatever_the_block_size(monkeypatch):
    x = np.random.default_rng(5).normal(size=30)
    first = stats.bootstrap_mean(x, resamples=1000, seed=7)
    assert stats.bootstrap_mean(x, resamples=1000, seed=7) == first
    assert stats.bootstrap_mean(x, resamples=1000, seed=8) != first
    monkeypatch.setattr(stats, "CELLS_AT_ONCE", 900)
    assert stats.bootstrap_mean(x, resamples=1000, seed=7) == first


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "some of each"),
        ([1.0], "at least two"),
        ([1.0, float("nan")], "NaN or infinite"),
        ([2.0, 2.0, 2.0], "all 3 values equal 2"),
        (np.ones((2, 2, 2)), r"\(2, 2, 2\)"),
    ],
)
def test_what_has_no_interval_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        stats.bootstrap_mean(values)


def test_arms_that_cannot_be_compared_are_errors():
    with pytest.raises(ValueError, match="3 prompts and b 2"):
        stats.paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="same responses"):
        stats.paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"level = 95"):
        stats.bootstrap_mean([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="resamples = 0"):
        stats.bootstrap_mean(range(9), resamples=0)


# ------------------------------------------------------------------------------------------------ proportions


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


# ------------------------------------------------------------------------------------------------ calibration


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


# ------------------------------------------------------------------------------------------------ many runs


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
    assert stats._wins(2, 1, 2.0) == pytest.approx([3 / 15, 4 / 15, 8 / 15])


def test_performance_profile_by_hand():
    # above 0: 4 of 4; above 1: 3 of 4 (one run is at 1 and not above); above 3: none
    assert stats.performance_profile([1, 2, 2, 3], [0, 1, 3]).tolist() == [1.0, 0.75, 0.0]
    assert stats.performance_profile([[1, 2], [2, 3]], [1]).tolist() == [0.75]


# ------------------------------------------------------------------------------------------------ correlations


def test_correlations_by_hand():
    # x - 2 = -1, 0, 1; y - 2 = -1, 1, 0: sum of products 1, spreads 2 and 2: r = 1/2, and the ranks are the values
    assert stats.pearson([1, 2, 3], [1, 3, 2], resamples=50).mean == pytest.approx(0.5)
    assert stats.spearman([1, 2, 3], [10, 1000, 20], resamples=50).mean == pytest.approx(0.5)


def test_correlations_are_scipys_with_ties():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 5, size=60).astype(float)
    y = x + rng.normal(size=60)
    linear, rank = stats.pearson(x, y), stats.spearman(x, y)
    assert linear.mean == pytest.approx(scipy_stats.pearsonr(x, y).statistic)
    assert rank.mean == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    for interval in (linear, rank):
        assert -1 <= interval.low < interval.mean < interval.high <= 1


def test_the_correlations_interval_covers():
    """r of a bivariate normal with correlation 0.5, n = 40: 250 studies, within three standard errors (1.4 points)."""
    rng = np.random.default_rng(1)
    hits = 0
    for study in range(250):
        x = rng.normal(size=40)
        y = 0.5 * x + np.sqrt(0.75) * rng.normal(size=40)
        interval = stats.pearson(x, y, resamples=400, seed=study)
        hits += interval.low <= 0.5 <= interval.high
    assert hits / 250 >= 0.95 - 0.042


def test_a_resample_without_any_spread_has_no_correlation():
    """A constant less its rounded mean is some 1e-17 and not 0: its correlation is not defined, and not 0 either."""
    rng = np.random.default_rng(0)
    for n in range(3, 40):
        for constant in (0.1, 1 / 3, 1e-9, 1e9 + 0.1):
            rows, other, once = np.full((4, n), constant), rng.normal(size=(4, n)), np.ones((4, n))
            assert np.isnan(stats._rowwise_pearson(rows, other, once)).all()
            assert np.isnan(stats._rowwise_pearson(other, rows, once)).all()
            rows[:, 0], once[:, 0] = 7.0, 0.0  # what was not drawn says nothing
            assert np.isnan(stats._rowwise_pearson(rows, other, once)).all()
    # One value of twenty differs: a third of the resamples miss it (0.95^20 = 0.36). Kept as r = 0 they would be a tenth
    # and more of what lies below, and the interval of a correlation of 0.99 would reach down to 0.
    x = np.array([0.1] * 19 + [5.0])
    y = x + 0.05 * rng.normal(size=20)
    assert stats.pearson(x, y).low > 0.5


def test_weighted_correlations_are_those_of_the_repeated_pairs():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 4, size=15).astype(float), rng.integers(0, 4, size=15).astype(float)
    often = rng.multinomial(15, np.full(15, 1 / 15), size=30)
    weight = often.astype(float)
    linear = stats._rowwise_pearson(np.broadcast_to(x, weight.shape), np.broadcast_to(y, weight.shape), weight)
    rank = stats._rowwise_pearson(stats._ranks(x, weight), stats._ranks(y, weight), weight)
    for row, times in enumerate(often):
        a, b = np.repeat(x, times), np.repeat(y, times)
        assert linear[row] == pytest.approx(scipy_stats.pearsonr(a, b).statistic)
        assert rank[row] == pytest.approx(scipy_stats.spearmanr(a, b).statistic)


def test_both_sides_of_a_pair_are_one_cluster():
    """Repeating every pair three times, labelled as one, must not narrow the interval; nor may labels of their own widen it."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=30)
    y = x + rng.normal(size=30)
    for measure in (stats.pearson, stats.spearman):
        plain = measure(x, y)
        prompts = [(i, "ids") for i in range(30)]
        assert measure(np.tile(x, 3), np.tile(y, 3), cluster=prompts * 3) == pytest.approx(plain)
        assert measure(x, y, cluster=np.arange(30)) == plain
        independent = measure(np.tile(x, 3), np.tile(y, 3))
        assert np.ptp(independent[1:]) < 0.7 * np.ptp(plain[1:])
    with pytest.raises(ValueError, match="2 clusters, of 30 pairs"):
        stats.spearman(x, y, cluster=np.arange(30) % 2)
    with pytest.raises(ValueError, match="29 cluster labels for 30 values"):
        stats.spearman(x, y, cluster=range(29))


def test_the_interval_of_clustered_sides_covers():
    """Chosen and rejected side share their prompt's score and length: 200 studies of 40 pairs, true correlation 0."""
    rng = np.random.default_rng(3)
    hits = np.zeros(2)
    for study in range(200):
        shared = rng.normal(size=(2, 40, 1))
        x, y = (shared + 0.3 * rng.normal(size=(2, 40, 2))).reshape(2, -1)
        for kind, cluster in enumerate((np.repeat(np.arange(40), 2), None)):
            found = stats.spearman(x, y, resamples=400, seed=study, cluster=cluster)
            hits[kind] += found.low <= 0 <= found.high
    assert hits[0] >= 200 * 0.95 - 3 * np.sqrt(200 * 0.95 * 0.05)
    assert hits[1] < 180, "as independent the sides cover too little, so this test can tell"


def test_a_correlation_with_a_constant_is_an_error():
    with pytest.raises(ValueError, match="all values of y equal 4"):
        stats.pearson([1, 2, 3], [4, 4, 4])
    with pytest.raises(ValueError, match="at least three"):
        stats.spearman([1, 2], [1, 2])
    with pytest.raises(ValueError, match="needs pairs"):
        stats.spearman([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="1 of 3 values of x"):
        stats.spearman([1, float("inf"), 3], [1, 2, 3])


# ------------------------------------------------------------------------------------------------ distinct-n


def test_distinct_n_by_hand():
    # words: the film the film | the end -> 6 unigrams, 3 distinct;
    # bigrams: the film, film the, the film | the end -> 4, 3 distinct; none across the two texts
    texts = ["the film the film", "the  end"]
    assert stats.distinct_n(texts, 1) == 3 / 6
    assert stats.distinct_n(texts, 2) == 3 / 4
    assert stats.distinct_n([[1, 2, 1, 2], [1, 3]], 2) == 3 / 4
    assert stats.distinct_n(texts, 4) == 1.0


def test_distinct_n_without_n_grams_is_an_error():
    with pytest.raises(ValueError, match="none of the 2 responses has 3 tokens"):
        stats.distinct_n(["a b", ""], 3)
    with pytest.raises(ValueError, match="n = 0"):
        stats.distinct_n(["a"], 0)


# ------------------------------------------------------------------------------------------------ best of n


def brute_force(proxy, gold, n):
    """Every subset, its proxy-best (an average over equals)."""
    total = []
    for p, g in zip(proxy, gold, strict=True):
        picked = []
        for subset in combinations(range(len(p)), n):
            best = max(p[i] for i in subset)
            picked.append(np.mean([g[i] for i in subset if p[i] == best]))
        total.append(np.mean(picked))
    return total


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_best_of_n_is_the_average_over_all_subsets(n, seed):
    rng = np.random.default_rng(seed)
    proxy = rng.integers(0, 4, size=(3, 6)).astype(float)  # few values: many ties
    gold = rng.normal(size=(3, 6))
    assert stats.best_of_n_values(proxy, gold, n) == pytest.approx(brute_force(proxy, gold, n))
    assert stats.best_of_n_curve(proxy, gold, n) == pytest.approx(np.mean(brute_force(proxy, gold, n)))


def test_best_of_n_by_hand_and_at_its_ends():
    # best of 2 among proxies 1 < 2 < 3: the first never wins, the second wins 1 subset of 3, the third 2 of 3
    assert stats.best_of_n_curve([[1, 2, 3]], [[9.0, 3.0, 6.0]], 2) == pytest.approx(3 / 3 + 2 * 6 / 3)
    assert stats.best_of_n_curve([[1, 2, 3]], [[9.0, 3.0, 6.0]], 1) == pytest.approx(6.0)
    assert stats.best_of_n_curve([[1, 2, 3]], [[9.0, 3.0, 6.0]], 3) == pytest.approx(6.0)


def test_best_of_n_of_the_proxy_itself_never_falls():
    proxy = np.random.default_rng(0).normal(size=(4, 64))
    curve = [stats.best_of_n_curve(proxy, proxy, n) for n in range(1, 65)]
    assert np.all(np.diff(curve) > 0)


def test_best_of_n_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="n between 1 and 3"):
        stats.best_of_n_curve([[1, 2, 3]], [[1, 2, 3]], 4)
    with pytest.raises(ValueError, match="prompts, samples"):
        stats.best_of_n_curve([1, 2, 3], [1, 2, 3], 1)
    with pytest.raises(ValueError, match="values of gold"):
        stats.best_of_n_curve([[1, 2]], [[1, float("nan")]], 1)


# ------------------------------------------------------------------------------------------------ pass@k


def test_pass_at_k_by_hand():
    # n = 4, c = 1: of the 6 pairs 3 hold the right one; c = 2: one pair of 6 holds neither; c = 3: any two hold one.
    right = [[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(stats.pass_at_k_values(right, 2), [1 / 2, 5 / 6, 1, 0])
    np.testing.assert_allclose(stats.pass_at_k_values(right, 1), [1 / 4, 1 / 2, 3 / 4, 0])
    np.testing.assert_allclose(stats.pass_at_k_values(right, 4), [1, 1, 1, 0])
    found = stats.pass_at_k(right, 2)
    assert found.mean == pytest.approx(7 / 12)
    assert found.low < found.mean < found.high
    assert stats.pass_at_k(right * 3, 1) == stats.bootstrap_mean(np.asarray(right * 3, dtype=float))


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    subsets = [any(chosen) for chosen in combinations(samples, k)]
    np.testing.assert_allclose(stats.pass_at_k_values([samples], k), [np.mean(subsets)])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_unbiased(k):
    # Enumerated: n = 5 samples, each right with probability 0.3; the estimate's mean is 1 − 0.7^k.
    outcomes = np.array(list(product([0, 1], repeat=5)))
    chance = 0.3 ** outcomes.sum(1) * 0.7 ** (5 - outcomes.sum(1))
    assert chance @ stats.pass_at_k_values(outcomes, k) == pytest.approx(1 - 0.7**k)


def test_pass_at_k_without_any_spread_is_not_certain():
    # 20 problems, none ever solved: Wilson's upper end is z² / (20 + z²) with z = 1.96
    found = stats.pass_at_k(np.zeros((20, 4)), 2)
    assert (found.mean, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(1.959964**2 / (20 + 1.959964**2), rel=1e-6)
    assert stats.pass_at_k(np.ones((20, 4)), 2).low < 1.0


def test_pass_at_k_refuses_what_has_no_answer():
    for bad in ([1, 0], np.zeros((2, 0))):
        with pytest.raises(ValueError, match=r"give \[problems, samples\]"):
            stats.pass_at_k_values(bad, 1)
    for entry in (0.5, float("nan"), 2):
        with pytest.raises(ValueError, match="right holds something other than 0 and 1"):
            stats.pass_at_k_values([[entry, 1]], 1)
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k = {k} with 2 samples"):
            stats.pass_at_k_values([[0, 1]], k)
    with pytest.raises(ValueError, match="one prompt"):
        stats.pass_at_k([[0, 1]], 1)


def test_a_function_of_means_has_the_interval_of_a_mean_where_it_is_one():
    values = np.random.default_rng(0).normal(size=(30, 1))
    found = stats.bootstrap_of_means(values, lambda means: means[:, 0], resamples=10_000)
    plain = stats.bootstrap_mean(values[:, 0])
    np.testing.assert_allclose(found, plain, atol=0.04)  # but for chance and the acceleration
    assert found == stats.bootstrap_of_means(values[None], lambda means: means[:, 0], resamples=10_000)


def test_a_ratio_of_means_is_not_the_mean_of_ratios():
    # Two prompts, 1 mistake in 10 steps and 1 in 2: the ratio of the means is 2/12.
    found = stats.bootstrap_of_means([[1.0, 10.0], [1.0, 2.0]], lambda means: means[:, 0] / means[:, 1])
    assert found.mean == pytest.approx(2 / 12)


def test_seeds_are_drawn_as_well_as_prompts():
    rng = np.random.default_rng(3)
    # Five seeds far apart, prompts nearly alike: the interval must be that of five numbers.
    level = rng.normal(size=5)
    values = level[:, None, None] + 0.01 * rng.normal(size=(5, 40, 1))
    five = stats.bootstrap_mean(level)
    for shared in (True, False):
        found = stats.bootstrap_of_means(values, lambda means: means[:, 0], resamples=20_000, shared_prompts=shared)
        np.testing.assert_allclose(found, five, atol=0.03 * np.ptp(five[1:]))


def test_prompts_that_all_seeds_share_are_drawn_once_for_all():
    """Five seeds that are copies of one know no more than one; taken for five with prompts of their own they seem to."""
    one = np.random.default_rng(4).normal(size=(40, 1))
    told = {
        shared: stats.bootstrap_of_means(
            np.repeat(one[None], 5, axis=0), lambda means: means[:, 0], resamples=20_000, shared_prompts=shared
        )
        for shared in (True, False)
    }
    alone = stats.bootstrap_of_means(one, lambda means: means[:, 0], resamples=20_000)
    np.testing.assert_allclose(told[True], alone, atol=0.02)
    assert np.ptp(told[False][1:]) < 0.8 * np.ptp(alone[1:])


def test_resampled_means_vary_as_the_layout_says():
    """The variance of resampled means given the data, in closed form, of a layout S x P.

    With C = 1 − 11'/n, the covariance of n multinomial counts, and X the table: crossed, w'Xv/(SP) has
    (1'XCX'1 + 1'X'CX1 + tr(CXCX')) / (SP)²; nested, the seeds' means / S + the mean of the variances within / (SP).
    """
    rng = np.random.default_rng(5)
    S, P = 4, 6
    X = rng.normal(size=S)[:, None] + 2 * rng.normal(size=P) + 0.5 * rng.normal(size=(S, P))
    c, d = np.eye(S) - 1 / S, np.eye(P) - 1 / P
    rows, columns = X.sum(1), X.sum(0)
    by_seed, by_prompt = rows @ c @ rows / (S * P) ** 2, columns @ d @ columns / (S * P) ** 2
    crossed = by_seed + by_prompt + np.trace(c @ X @ d @ X.T) / (S * P) ** 2
    nested = X.mean(1).var() / S + X.var(axis=1).mean() / (S * P)
    drawn = [np.concatenate(part)[:, 0] for part in zip(*stats._crossed(X[..., None], 40_000, 0), strict=True)]
    # The variance of 40,000 draws is known within some 0.7 % (√(2/40,000)).
    assert [part.var() for part in drawn] == pytest.approx([crossed, by_seed, by_prompt], rel=0.03)
    own = np.concatenate(list(stats._nested(X[..., None], 40_000, 0)))[:, 0]
    assert own.var() == pytest.approx(nested, rel=0.03)
    assert nested < 0.5 * crossed, "here the prompts' share is what a wrong layout would miss"
    for part in (*drawn, own):
        assert part.mean() == pytest.approx(X.mean(), abs=4 * np.sqrt(crossed / 40_000))


def test_units_by_hand():
    # Draws −1, 1 have variance 1, of n units n / (n − 1). Alike: (5/4 + 5/4)² / (2 (5/4)² / 4) = 8 and one. One varies
    # alone: its own. NaN is left out.
    varied, still = np.array([-1.0, 1.0, np.nan]), np.zeros(3)
    assert stats._units((varied, 5), (varied, 5)) == pytest.approx(9)
    assert stats._units((still, 3), (varied, 40)) == pytest.approx(40)
    assert stats._units((varied, 3), (still, 40)) == pytest.approx(3)
    assert stats._units((still, 1), (varied, 7)) == pytest.approx(7)
    assert stats._units((still, 3), (still, 40)) == 3


@pytest.mark.parametrize("layout", [(1.0, 0.1, 0.2), (0.1, 1.0, 0.2)])
def test_crossed_seeds_and_prompts_are_covered_as_often_as_promised(layout):
    """200 studies, 5 seeds and 30 prompts, difficulty of prompts, luck of seeds and noise as given: at least 95 % less
    three standard errors. As nested the first, where prompts matter most, covers less than nine in ten."""
    rng = np.random.default_rng(6)
    hits = np.zeros(2)
    for study in range(200):
        parts = (rng.normal(size=(1, 30)), rng.normal(size=(5, 1)), rng.normal(size=(5, 30)))
        x = sum(size * part for size, part in zip(layout, parts, strict=True))[..., None]
        for kind, shared in enumerate((True, False)):
            found = stats.bootstrap_of_means(x, lambda means: means[:, 0], 0.95, 300, study, shared)
            hits[kind] += found.low <= 0 <= found.high
    assert hits[0] >= 200 * 0.95 - 3 * np.sqrt(200 * 0.95 * 0.05)
    assert hits[1] < 180 or layout[0] < layout[1]


def test_functions_of_means_that_say_nothing():
    for bad, why in (
        (np.ones((3, 2)), "all resamples give 1"),
        (np.ones((1, 2)), "one prompt and one seed"),
        (np.ones(3), "give .prompts, columns."),
        (np.full((3, 2), np.nan), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=why):
            stats.bootstrap_of_means(bad, lambda means: means[:, 0])
    with pytest.raises(TypeError, match="values of 2 seeds: say shared_prompts"):
        stats.bootstrap_of_means(np.ones((2, 3, 1)), lambda means: means[:, 0])
    with pytest.raises(ValueError, match="finite for 0 of 100"):
        stats.bootstrap_of_means(np.eye(3), lambda means: means[:, 0] * np.nan, resamples=100)
