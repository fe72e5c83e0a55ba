"""Preference files as they are: doubles, contradictions, rows of other kinds, and what training has seen of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny_models import tiny
from tokenmdp.lab import preference_file
from tokenmdp.tasks import formats

POLICY = tiny()


def row(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_what_is_left_out_is_counted() -> None:
    rows = [
        row("w1 w2", " w3", " w4", margin=2.0),
        row("w1 w2", " w3", " w4"),  # the first again
        row("w1 w2", " w4", " w3"),  # and the other way round
        row("w1 w2", " w5", " w5"),
        row("w1 w2", "", " w5"),
        {"prompt": "w1"},
        row("w6", [" w7", " w8"], " w9", subset="ties"),
    ]
    found = preference_file.read(rows, POLICY)
    assert found.counts == {
        "rows": 7, "pairs": 4, "unreadable": 2, "equal_sides": 1, "cut": 0, "cut_alike": 0,
        "duplicates": 1, "contradicted": 1,
    }  # fmt: skip
    assert found.row == (0, 2, 6, 6)
    assert [p.row for p in found.pairs.chosen.prompts] == [0, 2, 6, 6]
    assert found.pairs.margin.tolist() == [2, 0, 0, 0]
    assert found.pairs.chosen.prompts[3].columns["subset"] == "ties"
    assert found.faults[0].startswith("row 4: chosen is empty")
    assert found.faults[1].startswith("row 5 has prompt")
    first = found.pairs.chosen
    assert torch.equal(first.tokens[0][first.action[0]], torch.tensor([3, 0])), "the response and its end"


def test_nothing_to_judge_says_what_was_wrong() -> None:
    with pytest.raises(ValueError, match=r"none of the 2 rows .*1 could not be read and 1 pairs have two equal sides"):
        preference_file.read([{"text": "w1"}, row("w1", " w2", " w2")], POLICY)
    with pytest.raises(ValueError, match="none of the 0 rows"):
        preference_file.read([], POLICY)


def test_a_row_too_long_for_the_model_is_left_out_by_its_number() -> None:
    rows = [row("w1", " w2", " w3"), row("w1", " w2" * 90, " w3")]
    found = preference_file.read(rows, POLICY)
    assert found.counts["unreadable"] == 1
    assert "row 1 has" in found.faults[0]
    assert preference_file.read(rows, POLICY, max_tokens=8).counts["unreadable"] == 0


def test_what_training_has_seen_is_found_in_other_columns_too() -> None:
    talk = "\n\nHuman: w1 w2\n\nAssistant:"
    said = [
        formats.preference(row("w1 w2", " w3", " w4"), 0),
        formats.preference(row("w1 w2", " w3", " w5"), 1),
        formats.preference(row("w9", " w3", " w4"), 2),
    ]
    trained: list[dict[str, Any]] = [
        {"chosen": talk + " w4", "rejected": talk + " w3"},  # the first, turned round, as a transcript
        {"label": "no text"},
    ]
    pairs, openings, unreadable = preference_file.overlap(said, trained)
    assert pairs == [True, False, False]
    assert openings == [True, True, False]
    assert unreadable == 1
    shown = [{"prompt": "W1", "completion": "w2 w4"}, {"text": "w9  w3"}]
    assert preference_file.overlap(said, shown) == ([True, False, True], [False, False, False], 0)
    assert preference_file.overlap(said, [{"label": 1}])[2] == 1
    chats = [formats.chat(p) for p in said]
    assert preference_file.overlap(chats, trained)[:2] == (pairs, openings)


def test_capitals_and_indentation_may_be_all_that_is_compared() -> None:
    rows = [row("w1", "  w2", " w2"), row("w1", " W2", " w2")]
    assert preference_file.read(rows, POLICY).counts["equal_sides"] == 0


def test_what_the_cut_makes_alike_is_not_called_equal() -> None:
    rows = [row("w1", " w2 w3 w4", " w2 w3 w5"), row("w1", " w2", " w3")]
    counts = preference_file.read(rows, POLICY, max_tokens=2).counts
    assert (counts["pairs"], counts["cut"], counts["cut_alike"], counts["equal_sides"]) == (1, 2, 1, 0)
    with pytest.raises(ValueError, match=r"0 pairs have two equal sides, 1 more up to max_tokens=2"):
        preference_file.read(rows[:1], POLICY, max_tokens=2)


def test_rewardbench_is_told_by_its_columns() -> None:
    assert preference_file.looks_like_rewardbench([row("q", "a", "b", subset="chat")])
    assert not preference_file.looks_like_rewardbench([row("q", "a", "b")])
    assert not preference_file.looks_like_rewardbench([{"prompt": [{"role": "user", "content": "q"}], "subset": "s"}])
