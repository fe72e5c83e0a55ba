"""Cutting a batch into parts changes memory and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_models import ragged, tiny
from tokenmdp.models.parts import cut, in_parts, micro_batches
from tokenmdp.types import Batch, Pairs


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 100))
def test_micro_batches_hold_every_row_once_within_the_budget(cost: list[int], budget: int) -> None:
    parts = [rows.tolist() for rows in micro_batches(torch.tensor(cost), budget)]
    assert sorted(i for part in parts for i in part) == list(range(len(cost)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(cost[i] for i in part) <= budget


def test_rows_of_like_length_share_a_micro_batch() -> None:
    parts = list(micro_batches(torch.tensor([3, 10, 4, 9]), 20))
    assert [p.tolist() for p in parts] == [[1, 3], [2, 0]]


def test_equal_lengths_keep_their_order() -> None:
    assert [p.tolist() for p in micro_batches(torch.full((5,), 4), 8)] == [[0, 1], [2, 3], [4]]


def test_cut_takes_rows_and_the_parts_length() -> None:
    b = ragged(4)
    rows = torch.tensor([2, 0])
    part, L = b.select(rows), int(b.length[[2, 0]].max())
    x = torch.arange(b.tokens.numel()).view(b.tokens.shape)
    assert torch.equal(cut(x, rows, part), x[rows, :L])
    states = torch.randn((*b.tokens.shape, 3))
    assert torch.equal(cut(states, rows, part), states[rows, :L])
    assert torch.equal(cut(torch.arange(4), rows, part), rows)
    pairs = Pairs(b, b, torch.zeros(4))
    wide = torch.randn(4, 5)  # pairs have no positions to cut to
    assert torch.equal(cut(wide, rows, pairs.select(rows)), wide[rows])


@pytest.mark.parametrize("tokens", [1, 17, 64, 10_000])
def test_results_in_parts_equal_results_at_once(tokens: int) -> None:
    policy, b = tiny("llama"), ragged(9)
    policy.model.double()

    def everything(part: Batch) -> dict[str, torch.Tensor]:
        hidden = policy.backbone.hidden(part.tokens)
        real = torch.where(part.real[..., None], hidden, torch.zeros_like(hidden))
        return {**policy.evaluate(part, ("logp", "entropy")), "hidden": real, "length": part.length}

    direct, parted = everything(b), in_parts(everything, b, tokens)
    assert parted.keys() == direct.keys()
    for name, want in direct.items():
        assert parted[name].dtype == want.dtype
        assert parted[name].shape == want.shape
        assert torch.allclose(parted[name], want, rtol=0, atol=1e-12)
        assert not parted[name].requires_grad
