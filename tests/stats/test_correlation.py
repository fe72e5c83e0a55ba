"""Correlations: against scipy, with ties, and covering where pairs share a prompt."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tokenmdp import stats
from tokenmdp.stats import correlation


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


@pytest.mark.parametrize(("clusters", "size"), [(3, 1), (3, 4), (5, 1), (5, 4), (7, 4)])
def test_the_interval_of_few_clusters_covers(clusters, size):
    """r of normal pairs with correlation 0.5, one or four a cluster: 200 studies, within three standard errors (1.5 points)."""
    hits = 0
    for study in range(200):
        rng = np.random.default_rng(study)
        shared, own = rng.normal(size=(2, clusters, 1)), 0.7 * rng.normal(size=(2, clusters, size)) * (size > 1)
        x, other = (shared + own).reshape(2, -1)
        cluster = np.repeat(np.arange(clusters), size)
        interval = stats.pearson(x, 0.5 * x + np.sqrt(0.75) * other, resamples=300, seed=study, cluster=cluster)
        hits += interval.low <= 0.5 <= interval.high
        assert -1 <= interval.low <= interval.mean <= interval.high <= 1
    assert hits / 200 >= 0.95 - 0.046


@pytest.mark.parametrize("measure", [stats.pearson, stats.spearman])
def test_pairs_in_perfect_order_are_not_certain(measure):
    """Half as many trials as pairs, all successes: Wilson's interval begins at n/(n + z²), and 2n/(n + z²) − 1 is the end."""
    for n in (3, 5, 7, 8, 200):
        low = n / (n / 2 + 1.959964**2) - 1
        assert measure(range(n), range(n)) == pytest.approx((1.0, low, 1.0))
        assert measure(range(n), range(n, 0, -1)) == pytest.approx((-1.0, -1.0, -low))
    assert measure(range(7), range(7)).low < 0 < measure(range(8), range(8)).low


def test_a_resample_without_any_spread_has_no_correlation():
    """A constant less its rounded mean is some 1e-17 and not 0: its correlation is not defined, and not 0 either."""
    rng = np.random.default_rng(0)
    for n in range(3, 40):
        for constant in (0.1, 1 / 3, 1e-9, 1e9 + 0.1):
            rows, other, once = np.full((4, n), constant), rng.normal(size=(4, n)), np.ones((4, n))
            assert np.isnan(correlation._rowwise_pearson(rows, other, once)).all()
            assert np.isnan(correlation._rowwise_pearson(other, rows, once)).all()
            rows[:, 0], once[:, 0] = 7.0, 0.0  # what was not drawn says nothing
            assert np.isnan(correlation._rowwise_pearson(rows, other, once)).all()
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
    linear = correlation._rowwise_pearson(np.broadcast_to(x, weight.shape), np.broadcast_to(y, weight.shape), weight)
    rank = correlation._rowwise_pearson(correlation._ranks(x, weight), correlation._ranks(y, weight), weight)
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
