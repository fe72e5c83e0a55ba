"""The growth of mistakes with the length: exponents worked by hand, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest

from tokenmdp import growth

T = [4, 8, 16, 32, 64]


def test_lengths_are_halves():
    assert growth.halved(64, 5) == T
    assert growth.halved(5, 9) == [1, 2, 5]  # 5, 2.5, 1.25, 0.6: rounded to even, those that differ
    with pytest.raises(ValueError, match="at least two"):
        growth.halved(1, 5)


@pytest.mark.parametrize("b", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_the_power(b):
    assert growth.exponent(T, 0.03 * np.asarray(T, dtype=float) ** b)[0] == pytest.approx(b)


def test_the_exponent_by_hand():
    # log T = 0, 1, 2 times log 2, centred −1, 0, 1; J = 1, 4, 4: slope (log₂ 4 − log₂ 1) / 2 = 1.
    # A cost of 0 has no logarithm.
    np.testing.assert_allclose(growth.exponent([1, 2, 4], [[1, 4, 4], [0, 1, 2]]), [1.0, np.nan])


def test_the_worst_case_is_its_sum():
    for error in (0.0, 1e-9, 0.01, 0.3, 1.0):
        summed = [sum(1 - (1 - error) ** t for t in range(1, n + 1)) for n in T]
        np.testing.assert_allclose(growth.worst_case(error, T), summed, rtol=1e-6)
    # While ε T is small: ε T (T + 1) / 2, below the bound T² ε.
    assert growth.worst_case(1e-6, [100])[0] == pytest.approx(1e-6 * 100 * 101 / 2, rel=1e-3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        growth.worst_case(1.5, T)


def simulated(rng: np.random.Generator, error: float, narrow: bool, prompts: int, n: int = 16) -> np.ndarray:
    """[P, K] mean mistakes of n responses a prompt, of the cloner whose truth is known."""
    slips = rng.random((prompts, n, T[-1])) < error
    wrong = np.logical_or.accumulate(slips, axis=2) if narrow else slips
    return wrong.cumsum(2)[:, :, np.asarray(T) - 1].mean(1)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for narrow in (True, False):
        truth = float(growth.exponent(T, growth.worst_case(0.02, T))[0]) if narrow else 1.0
        covered = 0
        for _ in range(60):
            found = growth.growth(T, simulated(rng, 0.02, narrow, 26), resamples=400)
            covered += found.low <= truth <= found.high
        assert covered >= 51  # binomial of 60 with 0.95: fewer has a probability of 1 %


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(1)
    alike = np.stack([simulated(rng, 0.02, True, 40) for _ in range(5)])
    spread = np.stack([simulated(rng, error, True, 40) for error in (0.005, 0.01, 0.02, 0.05, 0.1)])
    widths = [np.ptp(growth.growth(T, x, resamples=500, shared_prompts=False)[1:]) for x in (alike, spread)]
    assert widths[1] > 1.5 * widths[0]


def test_a_difference_is_paired():
    rng = np.random.default_rng(2)
    errors = (0.01, 0.02, 0.03, 0.05, 0.08)
    cloned, asked = (np.stack([simulated(rng, error, narrow, 26) for error in errors]) for narrow in (True, False))
    found = growth.growth_difference(T, asked, cloned, shared_prompts=False)
    assert found.high < 0
    one, other = (growth.growth(T, x, shared_prompts=False).mean for x in (asked, cloned))
    assert found.mean == pytest.approx(one - other)
    with pytest.raises(ValueError, match="same of both"):
        growth.growth_difference(T, asked, cloned[:4])


def test_several_seeds_must_say_whether_they_share_their_prompts():
    cost = np.stack([simulated(np.random.default_rng(3), 0.05, True, 20)] * 3)
    alone = growth.growth(T, cost[0])
    # Copies of one seed, on the same prompts: they know what one knows, and not three times as much.
    assert np.ptp(growth.growth(T, cost, shared_prompts=True)[1:]) == pytest.approx(np.ptp(alone[1:]), rel=0.1)
    for asked in (lambda: growth.growth(T, cost), lambda: growth.growth_difference(T, cost, 2 * cost)):
        with pytest.raises(TypeError, match="say shared_prompts"):
            asked()


def test_no_mistake_seen_is_no_growth():
    cost = np.ones((5, 5))
    cost[:, 0] = 0
    with pytest.raises(ValueError, match="no mistake was seen in the first 4 steps"):
        growth.growth(T, cost)
    for bad in ([3], [3, 3], [0, 2]):
        with pytest.raises(ValueError, match="slope needs"):
            growth.exponent(bad, np.ones(len(bad)))
    with pytest.raises(ValueError, match="one cost"):
        growth.exponent(T, [1.0, 2.0])
