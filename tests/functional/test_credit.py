"""Credit: by hand, conserved for any mask, and never lost silently."""

from __future__ import annotations

import math

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped

from tokenmdp.functional import credit

ACTION = torch.tensor([[False, True, False, True, False], [False, True, True, True, True]])
SCORE = torch.tensor([3.0, -2.0])


def test_by_hand() -> None:
    assert credit.last(SCORE, ACTION).tolist() == [[0, 0, 0, 3, 0], [0, 0, 0, 0, -2]]
    # 3 over two tokens, −2 over four
    assert credit.uniform(SCORE, ACTION).tolist() == [[0, 1.5, 0, 1.5, 0], [0, -0.5, -0.5, -0.5, -0.5]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=1, max_size=5), st.integers(0, 99)
)
def test_every_scheme_conserves_the_score(mask: list[list[bool]], seed: int) -> None:
    action = torch.tensor(mask)
    score = torch.randn(len(mask), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for scheme in (credit.last, credit.uniform):
        reward = scheme(score, action)
        torch.testing.assert_close(reward.sum(1), score)
        assert reward.dtype == torch.float64
        assert bool((reward[~action] == 0).all())


def test_a_score_is_never_lost() -> None:
    nobody = torch.tensor([[False, True], [False, False]])
    for scheme in (credit.last, credit.uniform):
        with pytest.raises(ValueError, match="row 1 has a score of -2 and not one action"):
            scheme(SCORE, nobody)
        # a row without a verdict has score 0 and loses nothing
        assert scheme(torch.tensor([1.0, 0.0]), nobody).tolist() == [[0, 1], [0, 0]]


def test_shapes_are_what_the_signatures_say() -> None:
    last = jaxtyped(typechecker=beartype)(credit.last)
    assert math.isclose(float(last(SCORE, ACTION).sum()), 1.0)
    with pytest.raises(TypeCheckError):
        last(torch.ones(3), ACTION)
