"""Divergences: numbers by hand, exact expectations over a small vocabulary, signs, and what infinities do."""

from __future__ import annotations

import math

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped

from tokenmdp.functional import kl

F64 = torch.float64
P = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
Q = torch.tensor([0.25, 0.25, 0.5], dtype=F64)
MU = torch.tensor([0.2, 0.6, 0.2], dtype=F64)


def test_exact_by_hand() -> None:
    # KL(P‖Q) = ½ log 2 + ¼ log 1 + ¼ log ½ = ¼ log 2
    assert float(kl.exact(P.log(), Q.log())) == pytest.approx(0.25 * math.log(2))
    # logits are defined up to a constant
    torch.testing.assert_close(kl.exact(P.log() + 7, Q.log() - 3), kl.exact(P.log(), Q.log()))
    # with the coin (½, ½) against (¾, ¼): forward and reverse differ.
    # KL(coin‖q) = ½ log(2/3) + ½ log 2 = ½ log(4/3);   KL(q‖coin) = ¾ log(3/2) + ¼ log(1/2)
    coin, q = torch.tensor([0.5, 0.5], dtype=F64).log(), torch.tensor([0.75, 0.25], dtype=F64).log()
    assert float(kl.exact(coin, q)) == pytest.approx(0.5 * math.log(4 / 3))
    assert float(kl.forward_exact(coin, q)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_excluded_tokens() -> None:
    inf = math.inf
    p = torch.tensor([0.0, 0.0, -inf], dtype=F64, requires_grad=True)
    q = torch.tensor([0.0, 0.0, -inf], dtype=F64)
    value = kl.exact(p, q)  # both exclude it: 0 log 0/0 = 0
    value.backward()
    assert value.item() == 0
    assert p.grad is not None
    assert bool(torch.isfinite(p.grad).all())
    # p = (½, ½, 0) against uniform thirds: log 3 − log 2
    assert float(kl.exact(q, torch.zeros(3, dtype=F64))) == pytest.approx(math.log(1.5))
    assert float(kl.exact(torch.zeros(3, dtype=F64), q)) == inf  # p chooses what q cannot


def test_estimators_by_hand() -> None:
    # π(a) = ½, ref(a) = ¼, so r = ½, log r = −log 2
    logp, ref = torch.tensor([0.5], dtype=F64).log(), torch.tensor([0.25], dtype=F64).log()
    assert float(kl.reverse_k1(logp, ref)) == pytest.approx(math.log(2))
    assert float(kl.reverse_k2(logp, ref)) == pytest.approx(0.5 * math.log(2) ** 2)
    assert float(kl.reverse_k3(logp, ref)) == pytest.approx(0.5 - 1 + math.log(2))
    assert float(kl.forward_k3(logp, ref)) == pytest.approx(-0.5 * math.log(2) + 0.5)
    # drawn from μ(a) = 1: ρ = ½
    mu = torch.zeros(1, dtype=F64)
    assert float(kl.reverse_k1_off(logp, ref, mu)) == pytest.approx(0.5 * math.log(2))
    assert float(kl.reverse_k3_off(logp, ref, mu)) == pytest.approx(0.5 * (math.log(2) - 0.5))


def test_expectations_are_exact_where_stated() -> None:
    p, q, mu = P.log(), Q.log(), MU.log()
    truth, forward = kl.exact(p, q), kl.exact(q, p)
    torch.testing.assert_close((P * kl.reverse_k1(p, q)).sum(), truth)
    torch.testing.assert_close((P * kl.reverse_k3(p, q)).sum(), truth)
    torch.testing.assert_close((P * kl.forward_k3(p, q)).sum(), forward)
    torch.testing.assert_close((MU * kl.reverse_k1_off(p, q, mu)).sum(), truth)
    torch.testing.assert_close((MU * kl.reverse_k3_off(p, q, mu)).sum(), truth)
    # k2 is biased: ½ (½ log²2 + ¼ log²2) = ⅜ log²2, not ¼ log 2
    assert float((P * kl.reverse_k2(p, q)).sum()) == pytest.approx(0.375 * math.log(2) ** 2)


def test_far_from_the_reference_k3_is_noisier_than_k1() -> None:
    # π = (.99, .01), ref = (.01, .99). k1 = ±log 99 with variance .99·.01·(2 log 99)² = 0.8362;
    # k3 = 1/99 − 1 + log 99 = 3.605 or 99 − 1 − log 99 = 93.405, variance .0099·(89.8)² = 79.83
    pi, ref = torch.tensor([0.99, 0.01], dtype=F64), torch.tensor([0.01, 0.99], dtype=F64)

    def var(x: torch.Tensor) -> float:
        return float((pi * (x - (pi * x).sum()) ** 2).sum())

    assert var(kl.reverse_k1(pi.log(), ref.log())) == pytest.approx(0.8362, abs=1e-3)
    assert var(kl.reverse_k3(pi.log(), ref.log())) == pytest.approx(79.83, abs=1e-1)


logits = st.lists(st.floats(-8, 8), min_size=3, max_size=3)


@settings(max_examples=100, deadline=None)
@given(logits, logits)
def test_divergences_are_never_negative_and_zero_only_at_equality(a: list[float], b: list[float]) -> None:
    p, q = torch.tensor(a, dtype=F64), torch.tensor(b, dtype=F64)
    assert float(kl.exact(p, q)) >= -1e-12
    assert float(kl.exact(p, p)) == 0
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    for estimate in (kl.reverse_k2, kl.reverse_k3, kl.forward_k3):
        assert bool((estimate(logp, logq) >= -1e-15).all())  # rounding
        assert bool((estimate(logp, logp) == 0).all())  # step 0: the reference is the policy


def test_zero_outside_the_mask_finite_everywhere_and_the_dtype_kept() -> None:
    for dtype in (torch.float32, F64):
        logp = torch.tensor([0.0, -1.0, -500.0], dtype=dtype)
        ref = torch.tensor([0.0, -500.0, -1.0], dtype=dtype)
        for x in (
            kl.reverse_k1(logp, ref),
            kl.reverse_k2(logp, ref),
            kl.reverse_k3(logp, ref),
            kl.forward_k3(logp, ref),
            kl.reverse_k1_off(logp, ref, ref),
            kl.reverse_k3_off(ref, logp, logp),
        ):
            assert x.dtype == dtype
            assert float(x[0]) == 0
            assert bool(torch.isfinite(x).all())
    assert kl.exact(P.log(), Q.log()).dtype == F64
    assert kl.exact(P.float(), Q.float()).dtype == torch.float32


def test_best_of_n() -> None:
    assert kl.best_of_n_kl(1) == 0
    assert kl.best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    # the bound is met by a continuous score: with N = 2000 equally likely responses, no ties, the best of 4 has
    # probability ((i + 1)⁴ − i⁴) / N⁴ for the response of rank i
    N, n = 2000, 4
    rank = torch.arange(N + 1, dtype=F64) / N
    best = rank[1:] ** n - rank[:-1] ** n
    truth = float((best * (best * N).log()).sum())
    assert truth < kl.best_of_n_kl(n)
    assert truth == pytest.approx(kl.best_of_n_kl(n), abs=2e-3)
    with pytest.raises(ValueError, match="best of 0"):
        kl.best_of_n_kl(0)


def test_shapes_are_what_the_signatures_say() -> None:
    exact, k3 = jaxtyped(typechecker=beartype)(kl.exact), jaxtyped(typechecker=beartype)(kl.reverse_k3)
    assert exact(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)).shape == (2, 3)
    assert k3(torch.zeros(2, 3), torch.zeros(2, 3)).shape == (2, 3)
    with pytest.raises(TypeCheckError):
        exact(torch.zeros(2, 5), torch.zeros(2, 4))
    with pytest.raises(TypeCheckError):
        k3(torch.zeros(2, 3), torch.zeros(2, 4))
