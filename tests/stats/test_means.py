"""Intervals of means: by hand, against the textbook, and covering as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tokenmdp import stats
from tokenmdp.stats import interval, means


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
    monkeypatch.setattr(interval, "CELLS_AT_ONCE", 900)
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
    drawn = [np.concatenate(part)[:, 0] for part in zip(*means._crossed(X[..., None], 40_000, 0), strict=True)]
    # The variance of 40,000 draws is known within some 0.7 % (√(2/40,000)).
    assert [part.var() for part in drawn] == pytest.approx([crossed, by_seed, by_prompt], rel=0.03)
    own = np.concatenate(list(means._nested(X[..., None], 40_000, 0)))[:, 0]
    assert own.var() == pytest.approx(nested, rel=0.03)
    assert nested < 0.5 * crossed, "here the prompts' share is what a wrong layout would miss"
    for part in (*drawn, own):
        assert part.mean() == pytest.approx(X.mean(), abs=4 * np.sqrt(crossed / 40_000))


def test_units_by_hand():
    # Draws −1, 1 have variance 1, of n units n / (n − 1). Alike: (5/4 + 5/4)² / (2 (5/4)² / 4) = 8 and one. One varies
    # alone: its own. NaN is left out.
    varied, still = np.array([-1.0, 1.0, np.nan]), np.zeros(3)
    assert means._units((varied, 5), (varied, 5)) == pytest.approx(9)
    assert means._units((still, 3), (varied, 40)) == pytest.approx(40)
    assert means._units((varied, 3), (still, 40)) == pytest.approx(3)
    assert means._units((still, 1), (varied, 7)) == pytest.approx(7)
    assert means._units((still, 3), (still, 40)) == 3


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
