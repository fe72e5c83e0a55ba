"""The bench of credit assignment says what its intervals say; how its arms learn, no test says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import EOS, batch
from tokenmdp.types import Batch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def credit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("credit")
    for name in ("common", "credit"):  # such plain names must not stay behind for other tests
        sys.modules.pop(name, None)


def test_a_verdict_is_what_the_interval_says(credit: Any) -> None:
    said = credit.verdict("attention", "mean score", [0.02, -0.01, 0.05], less_is_better=False)
    assert said == "attention does not beat uniform in mean score: difference 0.02 [-0.01, 0.05]"
    assert "beats uniform" in credit.verdict("branch:4", "mean score", [0.02, 0.01, 0.05], False)
    assert "is worse than uniform" in credit.verdict("branch:4", "error", [0.02, 0.01, 0.05], True)
    assert "beats uniform" in credit.verdict("shaped", "error", [-0.02, -0.05, -0.01], True)
    assert "does not beat" in credit.verdict("shaped", "error", [-0.02, -0.05, 0.0], True), "0 is not below 0"
    assert "no verdict" in credit.verdict("shaped", "error", [-0.02, -0.02, -0.02], True)


def test_the_area_ends_where_the_tokens_end(credit: Any) -> None:
    """Ten tokens a step, 30 besides: of 40 tokens four steps at equal responses, and one when all are counted."""
    run = {"score": [0.0, 0.2, 0.4, 0.6], "tokens": [10.0] * 4, "besides": [30.0] * 4}
    assert credit._mean_until(run, run["tokens"], 40) == pytest.approx(0.3)
    assert credit._mean_until(run, credit._all_tokens(run), 40) == 0.0
    assert credit._mean_until(run, credit._all_tokens(run), 80) == pytest.approx(0.1)
    assert credit._mean_until(run, credit._all_tokens(run), 1) == 0.0, "the first step always counts"


def test_the_value_after_an_action_is_the_next_states(credit: Any) -> None:
    action = torch.tensor([[False, True, False, True], [False, True, True, False]])
    value = torch.tensor([[0.0, 0.5, 0.0, 0.25], [0.0, 0.1, 0.2, 0.0]])
    found = credit._following(value, action, torch.tensor([1.0, 0.0]))
    assert found[action].tolist() == pytest.approx([0.25, 1.0, 0.2, 0.0])


def test_pairs_are_of_one_prompt_and_use_a_response_once(credit: Any) -> None:
    rows = [([1], [k, EOS]) for k in range(1, 7)]
    b = batch(rows)
    grouped = Batch(**{**vars(b), "group": torch.tensor([0, 0, 0, 1, 1, 1])})
    pairs = credit._pairs(grouped, torch.tensor([True, False, True, False, False, True]))
    # group 0: 1 is right and 2 wrong (3 is left over); group 1: 6 is right and 4 wrong
    assert pairs.chosen.tokens[:, 1].tolist() == [1, 6]
    assert pairs.rejected.tokens[:, 1].tolist() == [2, 4]
    with pytest.raises(ValueError, match="0 pairs of a right and a wrong response"):
        credit._pairs(grouped, torch.ones(6, dtype=torch.bool))
