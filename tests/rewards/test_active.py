"""Active choice: gains worked by hand on two features, equality with the determinant itself, and the law it keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmdp.rewards import active


def log_det(x: torch.Tensor, rows: list[int], margin: torch.Tensor | None = None, ridge: float = 1.0) -> float:
    chosen = x[rows]
    return float(active.information(chosen, None if margin is None else margin[rows], ridge).logdet())


def test_information_by_hand():
    # At θ = 0 every label weighs ¼: I + ¼ [[4, 0], [0, 0]] + ¼ [[1, 1], [1, 1]].
    x = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    assert active.information(x).tolist() == [[2.25, 0.25], [0.25, 1.25]]
    # σ(log 3) = ¾, so that label weighs 3/16; the prior is half as sharp.
    margin = torch.log(torch.tensor([3.0], dtype=torch.float64))
    got = active.information(x[:1], margin, ridge=0.5)
    assert torch.allclose(got, torch.tensor([[0.5 + 4 * 3 / 16, 0.0], [0.0, 0.5]], dtype=torch.float64))


def test_the_second_pick_looks_where_the_first_did_not():
    # Gains at Λ = I: ¼·16 = 4, ¼·15.21, ¼·4. After (4, 0): Λ = diag(5, 1), and (3.9, 0) gains ¼·15.21/5 = 0.76 while
    # (0, 2) still gains 1.
    x = torch.tensor([[3.9, 0.0], [0.0, 2.0], [4.0, 0.0]])
    assert active.d_optimal(x, 3) == [2, 1, 0]
    # What was labelled before counts: with (4, 0) known the other direction comes first.
    assert active.d_optimal(x[:2], 1, known=x[2:]) == [1]
    # A label that is as good as known tells nothing: σ(±20).
    assert active.d_optimal(x, 1, margin=torch.tensor([0.0, 0.0, 20.0])) == [0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_each_pick_is_the_best_by_the_determinant_itself(seed: int, count: int):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=rng, dtype=torch.float64)
    margin, known = torch.randn(12, generator=rng, dtype=torch.float64), torch.randn(3, 4, generator=rng).double()
    picked = active.d_optimal(x, count, margin, known, ridge=0.3)
    base = active.information(known, ridge=0.3)

    def value(rows: list[int]) -> float:
        return float((base + active.information(x[rows], margin[rows], 0.3) - 0.3 * torch.eye(4)).logdet())

    assert len(set(picked)) == count
    for i, row in enumerate(picked):
        best = max(value([*picked[:i], other]) for other in range(12) if other not in picked[:i])
        assert value(picked[: i + 1]) == pytest.approx(best, abs=1e-9)
        assert row not in picked[:i]


def test_its_log_determinant_is_never_below_that_of_a_random_choice():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=rng) * torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.1])
    ours = log_det(x, active.d_optimal(x, 10))
    assert all(log_det(x, active.at_random(60, 10, rng)) <= ours for _ in range(200))


def test_pairs_that_are_all_alike_leave_the_prior_and_the_order():
    same = torch.zeros(5, 3)
    assert active.d_optimal(same, 2) == [0, 1]
    assert torch.equal(active.information(same), torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"ridge=0.*singular"):
        active.information(same, ridge=0.0)


def test_uncertain_pairs_are_those_near_a_coin_toss():
    assert active.uncertain(torch.tensor([-3.0, 0.2, -0.1, 5.0]), 2) == [2, 1]


def test_disagreement_is_about_the_label():
    # Pair 0: margins 5 and 9, σ 0.993 and 1.000. Pair 1: ∓0.5, σ 0.38 and 0.62. Pair 2: ±2. Pair 3: agreed.
    margins = torch.tensor([[5.0, -0.5, 2.0, 1.0], [9.0, 0.5, -2.0, 1.0]])
    assert active.disagreement(margins, 3) == [2, 1, 0]
    with pytest.raises(ValueError, match="at least two"):
        active.disagreement(margins[:1], 1)


def test_chance_takes_no_pair_twice_and_follows_from_the_seed():
    def draw() -> list[int]:
        return active.at_random(20, 20, torch.Generator().manual_seed(3))

    assert sorted(draw()) == list(range(20))
    assert draw() == draw()


@pytest.mark.parametrize("count", [-1, 4])
def test_more_pairs_than_there_are_is_refused(count: int):
    x = torch.ones(3, 2)
    for choose in (
        lambda: active.d_optimal(x, count),
        lambda: active.uncertain(x[:, 0], count),
        lambda: active.disagreement(x.T, count),
        lambda: active.at_random(3, count, torch.Generator()),
    ):
        with pytest.raises(ValueError, match=f"{count} pairs asked for of 3"):
            choose()


def test_broken_features_are_refused():
    x = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="1 of 2 features are not finite"):
        active.d_optimal(x, 1)
    with pytest.raises(ValueError, match="one margin a pair"):
        active.d_optimal(torch.ones(2, 2), 1, torch.ones(3))
    with pytest.raises(ValueError, match="1 of 1 margin are not finite"):
        active.uncertain(torch.tensor([float("inf")]), 1)
