from __future__ import annotations

import math

import pytest
import torch

from tokenmdp.functional import measures
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.rewards.mixture import Mixture
from tokenmdp.types import Batch, Prompt, Score


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
    # Each part over its own verdicts: (2 + 4 + 0) / 3 and (1 + 1 + 0) / 3.
    found = measures.responses(make_batch(["x"] * 4), score)
    assert (found["rewards/a"], found["rewards/b"]) == (2.0, pytest.approx(2 / 3))
    assert dict(score.reasons) == {1: "a: returned None", 2: "b: returned None"}


def test_token_rewards_and_outcomes_add_up_to_the_value():
    mixture = Mixture([(2.0, fixed([[1.0, 0.5], [1.0]])), (10.0, fixed([3.0, -1.0]))])
    score = mixture(make_batch(["xy", "z"]))
    assert score.token is not None
    # 2·(1, 0.5) with 10·3 on the last token; 2·1 with 10·(−1) on the same one.
    assert score.token.tolist() == [[0, 2.0, 31.0], [0, -8.0, 0]]
    assert torch.equal(score.token.sum(1), score.value)
    assert set(score.parts) == {"fixed", "fixed_2"}


def test_rows_without_a_verdict_have_no_token_rewards():
    mixture = Mixture([(1.0, fixed([[1.0], [1.0]])), (1.0, fixed([None, 1.0]))])
    score = mixture(make_batch(["x", "y"]))
    assert score.token is not None
    assert score.token.tolist() == [[0, 0], [0, 2.0]]


class Stepped:
    """Says 0.5 of the first and 0.25 of the second token of every row; the score is the lesser."""

    name = "stepped"

    def __call__(self, batch: Batch) -> Score:
        steps = torch.zeros(batch.tokens.shape)
        steps[:, 1:3] = torch.tensor([0.5, 0.25])
        return Score(torch.full((len(batch),), 0.25), torch.ones(len(batch), dtype=torch.bool), steps=steps)


def test_what_is_said_of_steps_is_summed_apart_from_the_score():
    both = [(2.0, Stepped()), (10.0, Stepped())]
    score = Mixture([*both, (1.0, fixed([3.0, None]))])(make_batch(["xy", "zz"]))
    # 2·0.25 + 10·0.25 + 3; of the steps 12 times what one says
    assert score.value.tolist() == [6.0, 0.0]
    assert score.token is None
    assert score.steps is not None
    assert score.steps.tolist() == [[0, 6.0, 3.0], [0, 0, 0]]
    score = Mixture([(2.0, Stepped()), (1.0, fixed([[1.0, 0.5], [1.0, 1.0]]))])(make_batch(["xy", "zz"]))
    # its score joins the token rewards on the last token, its steps do not
    assert score.token is not None
    assert score.steps is not None
    assert score.token.tolist() == [[0, 1.0, 1.0], [0, 1.0, 1.5]]
    assert score.steps.tolist() == [[0, 1.0, 0.5]] * 2


def test_what_a_part_said_is_kept_where_the_mixture_has_no_verdict():
    silent = FunctionReward(lambda completions: [None, None], name="silent", max_missing=1.0)
    mixture = Mixture([(1.0, silent), (1.0, fixed([1.0, 2.0]))])
    score = mixture(make_batch(["x", "y"]))
    assert score.verdict.tolist() == [False, False]
    assert score.parts["fixed"].value.tolist() == [1.0, 2.0]
    assert not score.parts["silent"].verdict.any()


def test_bad_mixtures_are_refused():
    with pytest.raises(ValueError, match="no rewards"):
        Mixture([])
    with pytest.raises(ValueError, match="finite number, got fixed: nan"):
        Mixture([(math.nan, fixed([1.0]))])
