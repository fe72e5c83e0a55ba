"""Off-policy estimates against the truth, where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from tokenmdp.prompting import estimate
from tokenmdp.prompting.log import Log

Q, P = 400, 3


def world(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[Q, P] success probabilities, a logging policy that favours the first prompt, and a target that takes the best."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0.1, 0.9, (Q, P))
    mu = np.tile([0.6, 0.3, 0.1], (Q, 1))
    return truth, mu, estimate.greedy(truth.argmax(1), P)


def logged(truth: np.ndarray, mu: np.ndarray, seed: int) -> Log:
    rng = np.random.default_rng(seed)
    choice = (rng.random((Q, 1)) > mu.cumsum(1)).sum(1)
    every = np.arange(Q)
    reward = (rng.random(Q) < truth[every, choice]) * 1.0
    names = tuple(map(str, every))
    return Log(names, names, ("a", "b", "c"), ("a", "b", "c"), every, choice, reward, every * 0, mu[every, choice])


def test_by_hand() -> None:
    """Trials (query 0, a, 1, ½), (query 1, b, 1, ¼), (query 2, a, 0, ½); π takes b for query 1 and a for the others.

    w = 2, 4, 2. IPS (2 + 4 + 0)/3 = 2; SNIPS 6/8. Υ = 0.5 everywhere: direct 0.5, DR 0.5 + (2·.5 + 4·.5 − 2·.5)/3 = 7/6.
    """
    at = np.arange(3)
    log = Log(
        ("x", "y", "z"),
        ("x", "y", "z"),
        ("a", "b"),
        ("a", "b"),
        at,
        np.array([0, 1, 0]),
        np.array([1.0, 1.0, 0.0]),
        at * 0,
        np.array([0.5, 0.25, 0.5]),
    )
    policy, value = estimate.greedy(np.array([0, 1, 0]), 2), np.full((3, 2), 0.5)
    found = {name: estimate.estimate(name, log, policy, value, resamples=50).mean for name in estimate.ESTIMATORS}
    assert found == pytest.approx({"direct": 0.5, "ips": 2.0, "snips": 0.75, "dr": 7 / 6})
    w = estimate.weights(log, policy)
    about = estimate.overlap(w, at)
    assert about.effective == pytest.approx(64 / 24)  # (2 + 4 + 2)² / (4 + 16 + 4)
    assert about.largest == 0.5


@pytest.mark.parametrize("name", ["ips", "dr"])
def test_unbiased_where_the_propensities_are_known(name: str) -> None:
    """The mean over 300 logs is the target's true worth within three standard errors, with a Υ that is wrong."""
    truth, mu, policy = world()
    worth = float((policy * truth).sum(1).mean())
    wrong = np.clip(truth + 0.2, 0, 1)
    values = []
    for seed in range(300):
        log = logged(truth, mu, seed)
        values.append(estimate.terms(name, log, policy, wrong, estimate.weights(log, policy)).mean())
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - worth) < 3 * error
    assert estimate.terms("direct", log, policy, wrong, None).mean() > worth + 0.05  # as wrong as Υ


def test_doubly_robust_has_less_variance_with_a_good_proxy() -> None:
    truth, mu, policy = world()
    spread = {}
    for name in ("ips", "dr"):
        found = []
        for seed in range(60):
            log = logged(truth, mu, seed)
            found.append(estimate.terms(name, log, policy, truth, estimate.weights(log, policy)).mean())
        spread[name] = np.std(found)
    assert spread["dr"] < 0.8 * spread["ips"]


def test_intervals_cover_the_truth() -> None:
    """Of 60 intervals at 95 % at least 50 hold the true worth (fewer has a chance below one in a thousand)."""
    truth, mu, policy = world()
    worth = float((policy * truth).sum(1).mean())
    held = 0
    for seed in range(60):
        found = estimate.estimate("dr", logged(truth, mu, seed), policy, truth, resamples=300)
        held += found.low <= worth <= found.high
    assert held >= 50


def test_what_is_missing_is_said() -> None:
    truth, mu, policy = world()
    log = logged(truth, mu, 0)
    with pytest.raises(ValueError, match="dr needs Υ"):
        estimate.estimate("dr", log, policy)
    with pytest.raises(ValueError, match="no estimator 'magic'"):
        estimate.estimate("magic", log, policy, truth)
    with pytest.raises(ValueError, match="a distribution over prompts"):
        estimate.weights(log, policy * 2)
    with pytest.raises(ValueError, match="the policy has shape"):
        estimate.weights(log, policy[:, :2])
    never = np.full((Q, P), 0.0)
    never[np.arange(Q), (log.prompt + 1) % P] = 1.0
    with pytest.raises(ValueError, match="all weights are 0"):
        estimate.estimate("snips", log, never)
