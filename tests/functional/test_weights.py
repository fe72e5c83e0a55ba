"""Weights: numbers by hand, what each sums to, and that cutting a batch cannot change a weighted sum."""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped

from tokenmdp.functional import weights

# two rows: three actions (with a gap: position 2 is not one) and one action
ACTION = torch.tensor([[False, True, False, True, True], [False, True, False, False, False]])
F64 = torch.float64


def test_per_token_by_hand() -> None:
    # 4 actions in the batch: 1/4 each
    want = torch.tensor([[0, 0.25, 0, 0.25, 0.25], [0, 0.25, 0, 0, 0]])
    torch.testing.assert_close(weights.per_token(ACTION), want)


def test_per_sequence_by_hand() -> None:
    # 2 rows, 1/2 each: split over 3 tokens 1/6, over 1 token 1/2
    want = torch.tensor([[0, 1 / 6, 0, 1 / 6, 1 / 6], [0, 0.5, 0, 0, 0]])
    torch.testing.assert_close(weights.per_sequence(ACTION), want)


def test_per_slot_by_hand() -> None:
    # 2 rows of 5 slots: 1/10 each, whatever was sampled
    want = torch.tensor([[0, 0.1, 0, 0.1, 0.1], [0, 0.1, 0, 0, 0]])
    torch.testing.assert_close(weights.per_slot(ACTION, slots=5), want)


def test_per_row_by_hand() -> None:
    torch.testing.assert_close(weights.per_row(4), torch.full((4,), 0.25))
    torch.testing.assert_close(weights.per_row(torch.tensor([True, False, True])), torch.tensor([0.5, 0, 0.5]))


def test_rows_without_a_verdict_get_nothing_and_leave_the_normaliser() -> None:
    rows = torch.tensor([False, True])
    only_the_second = torch.tensor([[0.0] * 5, [0, 1, 0, 0, 0]])
    torch.testing.assert_close(weights.per_token(ACTION, rows), only_the_second)
    torch.testing.assert_close(weights.per_sequence(ACTION, rows), only_the_second)
    torch.testing.assert_close(weights.per_slot(ACTION, 5, rows), only_the_second / 5)


def test_nothing_counts_gives_zeros_not_nan() -> None:
    nothing = torch.zeros(2, dtype=torch.bool)
    for w in (
        weights.per_token(ACTION, nothing),
        weights.per_sequence(ACTION, nothing),
        weights.per_slot(ACTION, 3, nothing),
    ):
        assert torch.equal(w, torch.zeros(2, 5))
    assert torch.equal(weights.per_row(nothing), torch.zeros(2))


def test_a_row_without_actions_is_no_response() -> None:
    action = torch.cat([ACTION, torch.zeros(1, 5, dtype=torch.bool)])
    torch.testing.assert_close(weights.per_sequence(action)[:2], weights.per_sequence(ACTION))
    torch.testing.assert_close(weights.per_slot(action, 5)[:2], weights.per_slot(ACTION, 5))


def test_total_is_the_count_of_the_whole_batch() -> None:
    for make in (weights.per_token, weights.per_sequence, lambda a, total: weights.per_slot(a, 5, total=total)):
        whole = make(ACTION, total=None)
        total = {weights.per_token: 4, weights.per_sequence: 2}.get(make, torch.tensor(2))
        parts = torch.cat([make(ACTION[:1], total=total), make(ACTION[1:], total=total)])
        torch.testing.assert_close(parts, whole)
    with pytest.raises(ValueError, match=r"total=3 action tokens, but 4 are counted"):
        weights.per_token(ACTION, total=3)
    with pytest.raises(ValueError, match=r"slots=0"):
        weights.per_slot(ACTION, 0)


masks = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(masks, st.randoms(use_true_random=False))
def test_laws_for_any_mask(mask: list[list[bool]], random) -> None:
    action = torch.tensor(mask)
    for make in (weights.per_token, weights.per_sequence, lambda a, dtype: weights.per_slot(a, 4, dtype=dtype)):
        w = make(action, dtype=F64)
        assert w.dtype == F64
        assert bool(torch.isfinite(w).all())
        assert bool((w[~action] == 0).all())
        order = random.sample(range(len(mask)), len(mask))
        torch.testing.assert_close(make(action[order], dtype=F64), w[order])  # row order
        wider = torch.nn.functional.pad(action, (0, 3))
        torch.testing.assert_close(make(wider, dtype=F64)[:, :4], w)  # padding
    if action.any():
        assert float(weights.per_token(action, dtype=F64).sum()) == pytest.approx(1)
        assert float(weights.per_sequence(action, dtype=F64).sum()) == pytest.approx(1)
        assert float(weights.per_slot(action, 4, dtype=F64).sum()) <= 1 + 1e-12


def test_shapes_are_what_the_signatures_say() -> None:
    per_token = jaxtyped(typechecker=beartype)(weights.per_token)
    per_token(ACTION, torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeCheckError):
        per_token(ACTION, torch.ones(3, dtype=torch.bool))
