from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmdp.models import stems

PREFIXES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=9)


def test_two_prefixes_with_a_common_beginning_by_hand() -> None:
    """a b c d and a b x d: b branches into c, d and x, d; six states for eight tokens."""
    f = stems.plant([[1, 2, 3, 4], [1, 2, 9, 4]])
    assert f.tokens.tolist() == [[1, 2, 3, 4, 9, 4]]
    assert f.position.tolist() == [[0, 1, 2, 3, 2, 3]]
    assert f.node.tolist() == [[0, 1, 2, 3], [0, 1, 4, 5]]
    assert f.sees is not None
    assert f.sees[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


@given(PREFIXES, st.sampled_from([0.0, stems.SHARED, 1.0]))
def test_every_prefix_is_found_again_and_sees_itself_and_nothing_else(prefixes: list[list[int]], shared: float) -> None:
    f = stems._planted(prefixes, stems.families(prefixes, shared))
    for p, prefix in enumerate(prefixes):
        assert int(f.length[p]) == len(prefix)
        row, way = int(f.tree[p]), f.node[p, : len(prefix)]
        assert f.tokens[row, way].tolist() == prefix
        assert f.position[row, way].tolist() == list(range(len(prefix)))
        for t, node in enumerate(way.tolist()):
            seen = torch.arange(f.tokens.shape[1]) <= node if f.sees is None else f.sees[row, 0, node]
            assert seen.nonzero()[:, 0].tolist() == way[: t + 1].tolist()


@given(PREFIXES)
def test_whatever_is_read_costs_no_more_than_a_line_a_prefix(prefixes: list[list[int]]) -> None:
    f = stems.plant(prefixes)
    assert f.tokens.numel() <= len(prefixes) * max(map(len, prefixes))
    assert int(f.node.max()) < f.tokens.shape[1]


def test_the_states_along_one_row_are_that_row() -> None:
    row = [5, 6, 7, 8]
    f = stems.plant([row[:2], row, row[:1], row[:2]])
    assert f.tokens.tolist() == [row]
    assert f.sees is None


def test_a_tree_is_bounded_and_a_line_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stems, "NODES", 8)
    wide = [[1, 1, 1, 1, i] for i in range(9)]
    assert [len(family) for family in stems.families(wide)] == [4, 4, 1]  # 5 + 1 + 1 + 1 nodes
    assert len(stems.families([[1] * n for n in range(1, 30)])) == 1


def test_prefixes_with_little_in_common_are_read_by_themselves() -> None:
    f = stems.plant([[1, 2, 3, 4, 5], [1, 7, 8, 9, 6]])  # one token in five
    assert f.tokens.tolist() == [[1, 2, 3, 4, 5], [1, 7, 8, 9, 6]]
    assert f.sees is None
