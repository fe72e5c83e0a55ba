"""Metrics are tested like losses: what they leave out, and numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tiny_models import batch
from tokenmdp.functional import measures
from tokenmdp.types import Score


def test_a_mean_is_over_the_rows_that_count() -> None:
    value, rows = torch.tensor([1.0, 100.0, 3.0]), torch.tensor([True, False, True])
    assert measures.mean(value, rows) == 2.0
    assert measures.mean(value, torch.zeros(3, dtype=torch.bool)) == 0.0


def test_an_average_over_updates_divides_by_the_weight_each_had() -> None:
    updates = [{"x": 1.0, "w": 0.5}, {"x": 3.0, "w": 1.0}]
    assert measures.average(updates, "x") == 2.0
    assert measures.average(updates, "x", "w") == 2.5  # (2 + 3) / 2
    assert measures.average([], "x") == 0.0


def test_responses_count_actions_ends_and_verdicts() -> None:
    b = batch([([1, 2], [3, 4, 0]), ([1], [5])])  # three tokens and an end; one token, cut
    part = Score(torch.tensor([4.0, 0.0]), torch.tensor([True, False]))
    score = Score(torch.tensor([1.0, 0.0]), torch.tensor([True, False]), parts={"my file.py:Fn": part})
    assert measures.responses(b, score) == {
        "completions/mean_length": 2.0,
        "completions/clipped_ratio": 0.5,
        "completions/distinct_across": 1.0,  # (3, 4) and (4, 0)
        "num_tokens": 4.0,
        "no_verdict": 1.0,
        "rewards/my_file_py_fn": 4.0,
    }


def test_variety_is_across_prompts_and_not_within_one() -> None:
    # First responses: (3, 4, 0) and (3, 4): the pairs 34, 40, 34. What else a prompt was answered does not count.
    b = replace(
        batch([([1], [3, 4, 0]), ([1], [3, 4, 0]), ([2], [3, 4]), ([2], [5, 6])]), group=torch.tensor([7, 7, 9, 9])
    )
    assert measures.distinct_across(b) == pytest.approx(2 / 3)
    assert measures.distinct_across(batch([([1], [3]), ([1], [4])])) == 0.0  # nothing has a neighbour


def test_a_critic_without_rows_explains_nothing() -> None:
    x = torch.tensor([1.0, 2.0])
    assert measures.explained_variance(x, x, torch.zeros(2)) == 0.0


def test_scores_are_cut_and_stacked_with_what_they_carry() -> None:
    token = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]])
    a = Score(torch.tensor([1.0, 0.0]), torch.tensor([True, False]), token, {}, {1: "late"}, 2 * token)
    b = Score(torch.tensor([5.0]), torch.tensor([True]), torch.full((1, 4), 1.25), steps=torch.ones(1, 4))
    whole = Score.concat([b, a])
    assert whole.value.tolist() == [5.0, 1.0, 0.0]
    assert dict(whole.reasons) == {2: "late"}
    assert whole.token is not None
    assert whole.steps is not None
    assert whole.token.tolist() == [[1.25] * 4, [0.25, 0.75, 0.0, 0.0], [0.0] * 4]
    assert whole.steps.tolist() == [[1.0] * 4, [0.5, 1.5, 0.0, 0.0], [0.0] * 4]
    picked = whole.select([2, 0])
    assert picked.verdict.tolist() == [False, True]
    assert dict(picked.reasons) == {0: "late"}
    assert picked.value.tolist() == pytest.approx([0.0, 5.0])
    assert picked.steps is not None
    assert picked.steps.tolist() == [[0.0] * 4, [1.0] * 4]
