from __future__ import annotations

import math

import pytest
import torch

from tokenmdp.rewards.function import FunctionReward
from tokenmdp.rewards.mixture import Mixture
from tokenmdp.types import Batch, Prompt


def make_batch(texts: list[str]) -> Batch:
    prompts = [Prompt((1,), "p", i) for i in range(len(texts))]
    return Batch.build(prompts, [[7] * len(t) for t in texts], texts=texts, ended=[True] * len(texts))


def fixed(values, name="fixed"):
    return FunctionReward(lambda completions: values, name=name)


def test_a_mixture_is_the_weighted_sum_where_all_parts_have_a_verdict():
    mixture = Mixture([(0.5, fixed([2.0, None, 4.0, 0.0], "a")), (-1.0, fixed([1.0, 1.0, None, 0.0], "b"))])
    score = mixture(make_batch(["x"] * 4))
    # 0.5·2 − 1·1 = 0 is a score; rows 1 and 2 lack one part each; 0.5·0 − 1·0 = 0 again.
    assert score.value.tolist() == [0.0, 0.0, 0.0, 0.0]
    assert score.verdict.tolist() == [True, False, False, True]
    assert mixture.name == "0.5*a + -1*b"
    assert mixture.parts == {"a": 2.0, "b": pytest.approx(2 / 3)}  # each over its own verdicts


def test_token_rewards_and_outcomes_add_up_to_the_value():
    mixture = Mixture([(2.0, fixed([[1.0, 0.5], [1.0]])), (10.0, fixed([3.0, -1.0]))])
    score = mixture(make_batch(["xy", "z"]))
    assert score.token is not None
    # 2·(1, 0.5) with 10·3 on the last token; 2·1 with 10·(−1) on the same one.
    assert score.token.tolist() == [[0, 2.0, 31.0], [0, -8.0, 0]]
    assert torch.equal(score.token.sum(1), score.value)
    assert set(mixture.parts) == {"fixed", "fixed_2"}


def test_rows_without_a_verdict_have_no_token_rewards():
    mixture = Mixture([(1.0, fixed([[1.0], [1.0]])), (1.0, fixed([None, 1.0]))])
    score = mixture(make_batch(["x", "y"]))
    assert score.token is not None
    assert score.token.tolist() == [[0, 0], [0, 2.0]]


def test_a_part_without_any_verdict_is_absent_from_parts():
    silent = FunctionReward(lambda completions: [None, None], name="silent", max_missing=1.0)
    mixture = Mixture([(1.0, silent), (1.0, fixed([1.0, 2.0]))])
    assert mixture(make_batch(["x", "y"])).verdict.tolist() == [False, False]
    assert mixture.parts == {"fixed": 1.5}


def test_bad_mixtures_are_refused():
    with pytest.raises(ValueError, match="no rewards"):
        Mixture([])
    with pytest.raises(ValueError, match="finite number, got fixed: nan"):
        Mixture([(math.nan, fixed([1.0]))])
