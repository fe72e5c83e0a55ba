"""Several samples of a prompt: against brute force over all subsets."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmdp import stats


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
