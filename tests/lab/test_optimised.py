"""Curves of over-optimisation: what best of n gains, what the fits find, what is lost at the end."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tokenmdp.lab import optimised


def test_the_numbers_of_a_curve() -> None:
    assert optimised.numbers(1) == [1]
    assert optimised.numbers(4) == [1, 2, 3, 4]
    found = optimised.numbers(64)
    assert found[:8] == list(range(1, 9))
    assert found[-1] == 64
    assert found == sorted(set(found))
    assert 16 < len(found) < 32


def test_best_of_n_gains_are_those_of_every_subset() -> None:
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    d, gained, proxied = optimised.best_of_n(proxy, gold, [1, 3])
    assert d[0] == 0
    assert d[1] == pytest.approx(math.sqrt(math.log(3) - 2 / 3))
    for p in range(3):
        best = [max(subset, key=lambda i: proxy[p, i]) for subset in itertools.combinations(range(6), 3)]
        assert gained[p, 1] == pytest.approx(gold[p, best].mean() - gold[p].mean())
        assert proxied[p, 1] == pytest.approx(proxy[p, best].mean() - proxy[p].mean())
    assert (gained[:, 0] == 0).all()


def test_fits_find_the_curve_that_noise_hides_and_say_how_surely_it_turns() -> None:
    rng = np.random.default_rng(0)
    d = np.linspace(0, 3, 10)
    noise = 0.3 * rng.normal(size=(60, 10))
    turning = optimised.fits(d, d * (1.0 - 0.25 * d) + noise, resamples=300)  # highest at 2
    best = turning["best_of_n"]
    assert best["alpha"]["low"] < 1.0 < best["alpha"]["high"]
    assert best["peak"]["low"] < 2.0 < best["peak"]["high"]
    assert best["turns"] > 0.95
    assert best["r_squared"]["mean"] > turning["rl"]["r_squared"]["mean"]
    rising = optimised.fits(d, d + noise, resamples=300)["best_of_n"]
    assert rising["turns"] < 0.05
    assert rising["peak"]["high"] is None, "a form that never turns has no peak, and infinity is no JSON"
    with pytest.raises(ValueError, match="at least two prompts"):
        optimised.fits(d, d[None])


def test_what_is_lost_is_not_a_maximum_of_noise() -> None:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(80, 12))
    nothing = optimised.lost(flat)
    assert nothing["low"] < 0 < nothing["high"], (
        "the highest of twelve noisy means is above the last one, but by chance"
    )
    falling = optimised.lost(flat + np.concatenate([np.linspace(0, 3, 6), np.linspace(3, 1, 6)]))
    assert falling["low"] > 1
    assert falling["mean"] == pytest.approx(2, abs=0.5)
    assert "absent" in optimised.lost([[0.0, 1.0]])
