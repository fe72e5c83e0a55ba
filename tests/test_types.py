"""The few things that walk through the house are validated where they are built, and cutting them loses nothing."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from jaxtyping import config

from tiny_models import batch, prompt, ragged
from tokenmdp.types import Batch, Pairs, Prompt, Score


@pytest.fixture
def three() -> Batch:
    """Rows of 2 + 3, 1 + 1 and 4 + 2 tokens; the second ends by itself."""
    return batch([([1, 2], [3, 4, 5]), ([6], [0]), ([7, 8, 9, 1], [2, 3])])


@pytest.fixture
def unhooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user runs it: without the shape checks that the tests add, so that our own messages are what is read."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)


def test_a_prompt_needs_a_token() -> None:
    with pytest.raises(ValueError, match=r"row 7.*has no tokens"):
        Prompt((), "nothing", row=7)


def test_build_lays_rows_out_token_by_token(three: Batch) -> None:
    assert three.tokens.tolist() == [[1, 2, 3, 4, 5, 0], [6, 0, 0, 0, 0, 0], [7, 8, 9, 1, 2, 3]]
    assert three.action.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert three.length.tolist() == [5, 2, 6]
    assert three.ended.tolist() == [False, True, False]
    assert three.group.tolist() == [0, 1, 2]
    assert three.cost.tolist() == [5, 2, 6]


def test_padding_is_known_by_position_not_by_token(three: Batch) -> None:
    """Row 1 ends in EOS = pad: its EOS is a real, chosen token all the same."""
    assert three.real.int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert int(three.tokens[1, 1]) == 0
    assert bool(three.action[1, 1])


def test_log_probabilities_lie_on_their_tokens() -> None:
    b = Batch.build(
        [prompt(1, 2), prompt(3)], [[4], [5, 6]], texts=["a", "b"], ended=[False, True], logp_mu=[[-1.0], [-2.0, -3.0]]
    )
    assert b.logp_mu is not None
    assert b.logp_mu.tolist() == [[0, 0, -1.0], [0, -2.0, -3.0]]


def test_select_reorders_every_field_and_cuts_the_padding(three: Batch) -> None:
    part = three.select([1, 0])
    assert part.tokens.tolist() == [[6, 0, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert part.action.int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 1, 1]]
    assert part.length.tolist() == [2, 5]
    assert part.ended.tolist() == [True, False]
    assert [p.row for p in part.prompts] == [1, 0]
    assert part.texts == (three.texts[1], three.texts[0])
    assert part.group.tolist() == [1, 0]


def test_select_may_repeat_rows_and_leaves_the_batch_as_it_was(three: Batch) -> None:
    before = three.tokens.clone()
    assert three.select([2, 2]).tokens.tolist() == [[7, 8, 9, 1, 2, 3]] * 2
    assert torch.equal(three.tokens, before)


def test_concat_and_select_undo_each_other(three: Batch) -> None:
    other = ragged(4, seed=3)
    both = Batch.concat([three, other])
    for part, whole in ((three, both.select(range(3))), (other, both.select(range(3, 7)))):
        assert torch.equal(part.tokens, whole.tokens)
        assert torch.equal(part.action, whole.action)
        assert torch.equal(part.ended, whole.ended)
        assert part.prompts == whole.prompts


def test_groups_of_stacked_batches_stay_apart(three: Batch) -> None:
    both = Batch.concat([dataclasses.replace(three, group=torch.tensor([5, 5, 2])), three])
    first, second = set(both.group[:3].tolist()), set(both.group[3:].tolist())
    assert not first & second
    assert both.group[0] == both.group[1] != both.group[2]


def test_concat_keeps_log_probabilities_only_where_all_have_them(three: Batch) -> None:
    sampled = dataclasses.replace(three, logp_mu=-three.action.float())
    assert Batch.concat([sampled, three]).logp_mu is None
    kept = Batch.concat([sampled, sampled]).logp_mu
    assert kept is not None
    assert torch.equal(kept, -torch.cat([three.action, three.action]).float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": torch.zeros(3, 5, dtype=torch.bool)}, "action has shape"),
        ({"length": torch.tensor([5, 2])}, "length has shape"),
        ({"ended": torch.tensor([True])}, "ended has shape"),
        ({"texts": ("a",)}, "1 texts"),
        ({"action": torch.tensor([[True] + [False] * 5] * 3)}, "position 0"),
        ({"action": torch.tensor([[False] * 5 + [True]] * 3)}, "padding"),
        ({"logp_mu": torch.full((3, 6), math.nan)}, "not finite"),
        ({"logp_mu": torch.full((3, 6), -math.inf)}, "not finite"),
    ],
)
@pytest.mark.usefixtures("unhooked")
def test_a_batch_that_contradicts_itself_is_refused(three: Batch, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(three, **change)


def test_a_batch_needs_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Batch.build([], [], texts=[], ended=[])
    with pytest.raises(ValueError, match="no batches"):
        Batch.concat([])


def test_build_wants_one_of_each_a_row() -> None:
    with pytest.raises(ValueError, match="1 prompts, 2 responses"):
        Batch.build([prompt(1)], [[2], [3]], texts=["a", "b"], ended=[True, True])


def test_a_batch_is_frozen(three: Batch) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        three.tokens = torch.zeros(1, 1)


def test_pairs_are_selected_side_by_side(three: Batch) -> None:
    other = ragged(3, seed=5)
    pairs = Pairs(three, other, torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(pairs.cost, three.length + other.length)
    part = pairs.select([2, 0])
    assert len(part) == 2
    assert torch.equal(part.chosen.length, three.length[[2, 0]])
    assert torch.equal(part.rejected.length, other.length[[2, 0]])
    assert torch.equal(part.margin, torch.tensor([0.3, 0.1]))


def test_pairs_need_two_sides_of_one_size(three: Batch) -> None:
    with pytest.raises(ValueError, match="3 chosen rows, 2 rejected rows"):
        Pairs(three, ragged(2), torch.zeros(3))


def test_a_missing_score_is_never_taken_for_zero() -> None:
    score = Score.of(torch.tensor([1.5, math.nan, 0.0, math.inf]))
    assert score.verdict.tolist() == [True, False, True, False]
    assert score.value.tolist() == [1.5, 0.0, 0.0, 0.0]


@pytest.mark.usefixtures("unhooked")
def test_a_score_is_finite_and_has_one_verdict_a_row() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Score(torch.tensor([math.nan]), torch.tensor([True]))
    with pytest.raises(ValueError, match=r"\(2,\) values and \(3,\) verdicts"):
        Score(torch.zeros(2), torch.ones(3, dtype=torch.bool))


@pytest.mark.usefixtures("unhooked")
def test_token_rewards_add_up_to_the_score_and_what_is_said_of_steps_need_not() -> None:
    yes = torch.tensor([True, True])
    parts = torch.tensor([[0.0, 0.9, 0.95], [0.0, 1e6, 0.8 - 1e6]])
    assert Score(torch.tensor([1.85, 0.8]), yes, parts).token is parts, "of large parts the rounding is large"
    with pytest.raises(ValueError, match=r"row 0 add up to 1\.85 and its value is 0\.9: .* belongs in `steps`"):
        Score(torch.tensor([0.9, 0.8]), yes, parts)
    assert Score(torch.tensor([0.9, 0.8]), yes, steps=parts).token is None
