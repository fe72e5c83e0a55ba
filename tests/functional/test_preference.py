"""Reward-learning losses: by hand, where their minimum lies, and no overflow."""

from __future__ import annotations

import math

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from tokenmdp.functional import preference

F64 = torch.float64


def vector(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


def test_bradley_terry_by_hand() -> None:
    # equal rewards: −log ½. A difference of log 3: σ = ¾, −log ¾
    loss = preference.bradley_terry(vector(1.0, math.log(3)), vector(1.0, 0.0))
    torch.testing.assert_close(loss, vector(math.log(2), math.log(4 / 3)))
    # a margin of log 3 takes that difference away again
    loss = preference.bradley_terry(vector(math.log(3), 2.0), vector(0.0, 2.0), margin=vector(math.log(3), 0.0))
    torch.testing.assert_close(loss, vector(math.log(2), math.log(2)))
    # ε = 0.1 at σ = ¾: −0.9 log ¾ − 0.1 log ¼
    loss = preference.bradley_terry(vector(math.log(3)), vector(0.0), label_smoothing=0.1)
    torch.testing.assert_close(loss, vector(-0.9 * math.log(0.75) - 0.1 * math.log(0.25)))


def test_smoothing_puts_the_minimum_at_the_believed_flip_rate() -> None:
    # ∂ℓ/∂d = σ(d) − (1 − ε) vanishes at σ(d) = 0.9, d = log 9
    d = torch.tensor([math.log(9.0)], dtype=F64, requires_grad=True)
    preference.bradley_terry(d, vector(0.0), label_smoothing=0.1).sum().backward()
    assert d.grad is not None
    assert float(d.grad) == pytest.approx(0, abs=1e-12)
    for bad in (-0.1, 0.5, 1.0):
        with pytest.raises(ValueError, match="label_smoothing"):
            preference.bradley_terry(vector(1.0), vector(0.0), label_smoothing=bad)


def test_only_differences_matter_and_centring_settles_the_rest() -> None:
    chosen, rejected = vector(2.0, -1.0), vector(1.0, 3.0)
    torch.testing.assert_close(
        preference.bradley_terry(chosen + 5, rejected + 5), preference.bradley_terry(chosen, rejected)
    )
    assert preference.centring(chosen, rejected).tolist() == [9.0, 4.0]  # (2+1)², (−1+3)²
    assert preference.centring(chosen, -chosen).tolist() == [0.0, 0.0]


def test_the_two_orders_of_a_pair_are_one_probability() -> None:
    a, b = vector(0.3, 4.0, -2.0), vector(1.0, 1.0, 1.0)
    there, back = preference.bradley_terry(a, b), preference.bradley_terry(b, a)
    torch.testing.assert_close((-there).exp() + (-back).exp(), vector(1, 1, 1))


def test_pointwise_by_hand() -> None:
    # r = log 3: σ = ¾. Good: −log ¾; bad: −log ¼; half-good: the mean of the two
    score = vector(math.log(3), math.log(3), math.log(3))
    loss = preference.pointwise(score, vector(1.0, 0.0, 0.5))
    good, bad = math.log(4 / 3), math.log(4)
    torch.testing.assert_close(loss, vector(good, bad, (good + bad) / 2))
    torch.testing.assert_close(preference.pointwise(score, torch.tensor([True, False, True]))[:2], vector(good, bad))


def test_large_rewards_stay_finite_and_the_dtype_is_kept() -> None:
    for dtype in (torch.float32, F64):
        far = torch.tensor([1e4, -1e4], dtype=dtype)
        for loss in (
            preference.bradley_terry(far, -far),
            preference.bradley_terry(far, -far, label_smoothing=0.2),
            preference.pointwise(far, torch.tensor([False, True])),
            preference.centring(far, far),
        ):
            assert loss.dtype == dtype
            assert bool(torch.isfinite(loss).all())


def test_shapes_are_what_the_signatures_say() -> None:
    check = jaxtyped(typechecker=beartype)
    assert check(preference.bradley_terry)(torch.zeros(3), torch.zeros(3), torch.zeros(3)).shape == (3,)
    for f in (preference.bradley_terry, preference.centring, preference.pointwise):
        with pytest.raises(TypeCheckError):
            check(f)(torch.zeros(3), torch.zeros(4))
