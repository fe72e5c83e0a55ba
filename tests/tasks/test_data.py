"""Rows from files of every kind, and tokens from rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmdp.models.policy import Policy
from tokenmdp.models.tiny import tiny
from tokenmdp.tasks import data, files
from tokenmdp.types import Pairs

ROWS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "<b>2+2</b>=", "completion": 'a "quoted", line\nand é'}]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny()


@pytest.fixture
def chatty() -> Policy:
    policy = tiny()
    policy.tokenizer.chat_template = TEMPLATE
    return policy


# -- rows ---------------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format the file's name asks for."""
    import csv
    import io

    import pyarrow
    from pyarrow import parquet

    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if kind == "csv":
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    else:
        text = json.dumps(rows) if kind == "json" else "\n".join(json.dumps(row) for row in rows) + "\n\n"
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz", "d.csv.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert files.rows(write(tmp_path / name, ROWS)) == ROWS


def test_a_folder_has_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.csv", ROWS[:1])
    assert len(files.rows(tmp_path)) == 2
    assert len(files.rows(tmp_path, "test")) == 1
    with pytest.raises(ValueError, match=r"no file dev\.jsonl.*it has test\.csv, train\.jsonl"):
        files.rows(tmp_path, "dev")


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ROWS)
    files.rows(path)
    write(path, ROWS[:1])
    assert files.rows(path) == ROWS[:1]


def test_marks_and_lines_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / "bom.csv").write_bytes("﻿prompt,answer\r\nq,4\r\n".encode())
    assert files.rows(tmp_path / "bom.csv") == [{"prompt": "q", "answer": "4"}]
    (tmp_path / "lines.json").write_text('{"prompt": "a\\u2028b"}\n{"prompt": "c"}\n')
    assert [r["prompt"] for r in files.rows(tmp_path / "lines.json")] == ["a\u2028b", "c"]
    (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(files.rows(tmp_path / "long.csv")[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("d.jsonl", b"[1, 2]\n", "line 1: [1, 2] is not a row"),
        ("d.jsonl", b"", "has no rows"),
        ("d.json", b"3", "it must be a list of rows"),
        ("d.csv", b"a,b\n1,2,3\n", "line 2: not as many cells as the 2 columns"),
        ("d.csv", b"a,b\n", "has no rows"),
        ("d.csv", b'a,b\n"1,2\n', "cannot be read as UTF-8 csv"),
        ("d.jsonl", b'{"a": "\xff"}\n', "cannot be read as UTF-8 jsonl"),
        ("d.jsonl.gz", b"not gzip", "cannot be read as UTF-8 jsonl"),
        ("d.parquet", b"not parquet", "not a whole Parquet file"),
        ("d.xlsx", b"", "ends in one of .jsonl, .json, .csv, .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        files.rows(tmp_path / name)
    assert words in str(caught.value)


def test_data_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "preferences.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"there is no data at .*did you mean .*preferences\.jsonl\?"):
        files.rows(tmp_path / "preference.jsonl")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no file or folder here, and as a hub data set it could not be read"):
        files.rows("someone/some-data-nobody-has")


# -- tokens -------------------------------------------------------------------------------------------------------------


def test_a_demonstration_is_state_then_actions_then_the_end(policy: Policy) -> None:
    b = data.demonstrations(ROWS, policy)
    end = policy.eos_ids[0]
    for i, row in enumerate(ROWS):
        said = b.tokens[i][b.action[i]].tolist()
        assert said == [*policy.encode(row["completion"]), end], "the end of text is learned: it is an action"
        assert b.prompts[i].ids == tuple(policy.encode(row["prompt"]))
        assert b.tokens[i, : len(b.prompts[i].ids)].tolist() == list(b.prompts[i].ids)
    assert b.ended.tolist() == [True, True]
    assert b.texts[0] == "2"


def test_cut_demonstrations_do_not_end(policy: Policy) -> None:
    b = data.demonstrations(
        [{"prompt": "q", "completion": "abc"}, {"prompt": "q", "completion": "ab"}], policy, max_tokens=3
    )
    assert b.ended.tolist() == [False, True], "three letters and no end; two letters and the end"
    assert b.texts == ("abc", "ab")
    assert policy.eos_ids[0] not in b.tokens[0][b.action[0]].tolist()


def test_plain_text_starts_where_the_tokenizer_starts_it(policy: Policy) -> None:
    b = data.demonstrations([{"text": "abc"}, {"text": "z"}], policy)
    assert [p.text for p in b.prompts] == ["a", "z"]
    assert b.texts == ("bc", "")
    assert b.action.sum(-1).tolist() == [3, 1], "bc and the end; the end alone"
    begun = tiny()
    from tokenizers import processors

    begun.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", begun.tokenizer.bos_token_id)]
    )
    b = data.demonstrations([{"text": "abc"}], begun)
    assert b.prompts[0].ids == (begun.tokenizer.bos_token_id,)
    assert b.texts == ("abc",)


def test_a_chat_goes_through_the_template_and_ends_once(chatty: Policy) -> None:
    ask, reply = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    for row in ({"messages": [ask, reply]}, {"prompt": [ask], "completion": "yo"}):
        b = data.demonstrations([row], chatty)
        assert b.prompts[0].text == "<user>hi<assistant>"
        # The template writes the end and a newline; the newline comes after the end and is no action.
        assert b.tokens[0][b.action[0]].tolist() == [*chatty.encode("yo"), chatty.eos_ids[0]]
        assert b.texts == ("yo",)


def test_messages_without_a_template_are_an_error_with_a_remedy(policy: Policy) -> None:
    with pytest.raises(
        ValueError, match="row 0 holds chat messages, but the tokenizer of tiny has no chat template: give"
    ):
        data.prompts([{"messages": [{"role": "user", "content": "hi"}]}], policy)


def test_a_template_that_rewrites_the_past_is_an_error(chatty: Policy) -> None:
    chatty.tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="row 0: the chat template of tiny writes a conversation differently"):
        data.demonstrations([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}], chatty)


def test_prompts_carry_their_row_and_columns(policy: Policy) -> None:
    found = data.prompts([{"question": "2+2?", "answer": "#### 4"}, {"prompt": "q", "level": 3}], policy)
    assert [(p.row, p.text, dict(p.columns)) for p in found] == [
        (0, "2+2?", {"answer": "#### 4"}),
        (1, "q", {"level": 3}),
    ]


def test_pairs_share_the_prompt_and_keep_the_margin(policy: Policy) -> None:
    rows = [
        {"prompt": "q", "chosen": "yes", "rejected": "no", "margin": 0.5},
        {"prompt": "r", "chosen": "a", "rejected": "b"},
    ]
    pairs = data.pairs(rows, policy)
    assert pairs.chosen.prompts == pairs.rejected.prompts
    assert (pairs.chosen.texts, pairs.rejected.texts) == (("yes", "a"), ("no", "b"))
    assert pairs.margin.tolist() == [0.5, 0.0]
    assert bool(pairs.chosen.ended.all())


def test_labelled_completions(policy: Policy) -> None:
    b, label = data.labelled(
        [{"prompt": "q", "completion": "a", "label": "true"}, {"prompt": "q", "completion": "b", "label": 0}], policy
    )
    assert label.tolist() == [True, False] == [p.columns["label"] for p in b.prompts]
    assert b.texts == ("a", "b")


def test_logged_completions(policy: Policy, chatty: Policy) -> None:
    b, reward = data.logged(
        [{"prompt": "q", "completion": "a", "reward": "-1.5"}, {"prompt": "q", "completion": "b", "reward": 0}], policy
    )
    assert reward.tolist() == [-1.5, 0.0]
    assert b.texts == ("a", "b")
    ask = {"role": "user", "content": "hi"}
    b, reward = data.logged([{"prompt": [ask], "completion": "yo", "reward": 2, "id": 7}], chatty)
    assert (b.texts, reward.tolist(), b.prompts[0].columns["id"]) == (("yo",), [2.0], 7)


STEPS = {"prompt": "2*3+1=", "completions": ["2*3=6", "6+1=8"], "labels": [True, False], "source": "hand"}


def test_a_step_is_labelled_at_its_last_token(policy: Policy) -> None:
    """One character a token: the prompt's six, `2*3=6\\n` at 6 to 11, `6+1=8` at 12 to 16, the end at 17."""
    b, label, where = data.stepwise([STEPS, {"prompt": "q", "completions": ["a"], "labels": ["1"]}], policy)
    assert b.texts == ("2*3=6\n6+1=8", "a")
    assert b.ended.tolist() == [True, True]
    assert int(b.length[0]) == 18
    assert where.nonzero().tolist() == [[0, 11], [0, 16], [1, 1]]
    assert label[where].tolist() == [1.0, 0.0, 1.0]
    assert not bool(label[~where].any())
    assert b.prompts[0].columns == {"source": "hand"}
    assert bool((where <= b.action).all()), "a step's last token is an action"


def test_steps_take_the_separator_asked_for_and_the_chats_prompt(policy: Policy, chatty: Policy) -> None:
    b, _, where = data.stepwise([STEPS], policy, separator="")
    assert b.texts == ("2*3=66+1=8",)
    assert where.nonzero().tolist() == [[0, 10], [0, 15]]
    b, _, where = data.stepwise([{**STEPS, "prompt": [{"role": "user", "content": "hi"}]}], chatty)
    start = len(chatty.encode("<user>hi<assistant>"))
    assert b.prompts[0].text == "<user>hi<assistant>"
    assert where.nonzero()[:, 1].tolist() == [start + 5, start + 10]


def test_steps_that_are_cut_off_have_no_label(policy: Policy) -> None:
    b, label, where = data.stepwise([STEPS], policy, max_tokens=8)
    assert b.ended.tolist() == [False]
    assert where.nonzero().tolist() == [[0, 11]]
    assert label.sum() == 1


def test_steps_are_tokenised_as_they_are_written_one_after_the_other() -> None:
    """Tokens join within a step, as ` film` does after a word, and never across the end of a step."""
    words = tiny(["the film was good, the film was bad"] * 9, 300)
    rows = [{"prompt": "the", "completions": [" film was", " good"], "labels": [1, 0]}]
    b, _, where = data.stepwise(rows, words, separator="")
    assert b.tokens[0][b.action[0]].tolist()[:-1] == words.encode("the film was good")[1:]
    first, second = where[0].nonzero()[:, 0].tolist()
    assert words.decode(b.tokens[0, : first + 1].tolist()) == "the film was"
    assert second == int(b.length[0]) - 2


def test_pairs_with_equal_sides_are_taken_out_and_counted(policy: Policy) -> None:
    rows = [{"prompt": "q", "chosen": c, "rejected": r} for c, r in (("yes", "no"), ("a", "a"), ("ab", "a"))]
    kept, equal = data.distinct(data.pairs(rows, policy))
    assert equal == 1
    assert kept.chosen.texts == ("yes", "ab")
    assert data.distinct(kept)[1] == 0
    with pytest.raises(ValueError, match="in all 1 pairs chosen and rejected are the same response"):
        data.distinct(data.pairs(rows[1:2], policy))


def test_what_does_not_fit_the_context_says_row_length_and_limit(policy: Policy) -> None:
    limit = policy.context
    with pytest.raises(ValueError, match=rf"prompt of row 1 has {limit} tokens, the context of tiny is {limit}"):
        data.prompts([{"prompt": "a"}, {"prompt": "a" * limit}], policy)
    with pytest.raises(ValueError, match=rf"row 0 has 12 prompt and {limit + 1} response tokens.*at most {limit - 12}"):
        data.demonstrations([{"prompt": "a" * 12, "completion": "b" * limit}], policy)


def test_all_rows_that_cannot_be_used_are_named_at_once(policy: Policy) -> None:
    long = {"prompt": "a" * policy.context, "chosen": "b", "rejected": "c"}
    fine = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(
        ValueError, match=r"prompt of row 1 has .*\(3 of the 5 rows cannot be used; the others are 3, 4\)"
    ):
        data.pairs([fine, long, fine, long, {"prompt": "a", "chosen": "b"}], policy)
    with pytest.raises(
        ValueError, match=r"row 0.*\(21 of the first 21 rows cannot be used; the others are 1, 2, .*, 20\)"
    ):
        data.prompts([{"body": "a"}] * 5000, policy)  # the wrong column: the rest is not looked at


@pytest.mark.parametrize(
    "read", [data.prompts, data.demonstrations, data.pairs, data.labelled, data.logged, data.stepwise]
)
def test_no_rows_is_an_error(policy: Policy, read: Any) -> None:
    with pytest.raises(ValueError, match="there are no rows"):
        read([], policy)


def test_max_tokens_must_leave_room(policy: Policy) -> None:
    with pytest.raises(ValueError, match="max_tokens is 0"):
        data.demonstrations(ROWS, policy, max_tokens=0)


@given(st.text(max_size=20).filter(bool), st.text(max_size=20).filter(bool))
@settings(max_examples=60, deadline=None)
def test_markup_and_control_characters_are_just_text(prompt: str, completion: str) -> None:
    """With a tokenizer that can spell everything, prompt and completion come back to the letter."""
    words = _words()
    b = data.demonstrations([{"prompt": prompt, "completion": completion}], words)
    assert b.prompts[0].text == prompt
    assert words.decode(b.tokens[0][b.action[0]].tolist()) == completion


_kept: list[Policy] = []


def _words() -> Policy:
    if not _kept:
        _kept.append(tiny(["some words and <b>markup</b> to learn"] * 3, 300))
    return _kept[0]


def test_a_response_is_tokenised_as_it_is_written_after_its_prompt() -> None:
    """`film` alone may be other tokens than ` film` after a word: what follows a prompt is what the policy would have to write."""
    words = tiny(["the film was good, the film was bad"] * 9, 300)
    b = data.demonstrations([{"prompt": "the", "completion": " film"}, {"prompt": "the fi", "completion": "lm"}], words)
    assert b.tokens[0][b.action[0]].tolist()[:-1] == words.encode("the film")[1:]
    assert words.decode(b.tokens[1].tolist()[: int(b.length[1]) - 1]) == "the film"
    assert b.prompts[1].ids == tuple(words.encode("the fi")), "a prompt keeps its own tokens, whatever follows"


# -- split --------------------------------------------------------------------------------------------------------------


def test_a_split_is_disjoint_whole_and_of_the_generator(policy: Policy) -> None:
    b = data.demonstrations([{"prompt": f"{i}", "completion": "a"} for i in range(20)], policy)
    learned, kept = data.split(b, 0.25, torch.Generator().manual_seed(0))
    rows = [p.row for p in learned.prompts], [p.row for p in kept.prompts]
    assert (len(rows[0]), len(rows[1])) == (15, 5)
    assert sorted(rows[0] + rows[1]) == list(range(20))
    again = data.split(b, 0.25, torch.Generator().manual_seed(0))
    other = data.split(b, 0.25, torch.Generator().manual_seed(1))
    assert [p.row for p in again[1].prompts] == rows[1] != [p.row for p in other[1].prompts]


def test_pairs_of_one_prompt_stay_together(policy: Policy) -> None:
    rows = [{"prompt": f"{i % 5}", "chosen": f"{i}", "rejected": "b"} for i in range(20)]
    learned, kept = data.split(data.pairs(rows, policy), 0.4, torch.Generator().manual_seed(0))
    assert isinstance(learned, Pairs)
    sides = [{p.text for p in part.chosen.prompts} for part in (learned, kept)]
    assert sides[0].isdisjoint(sides[1])
    assert (len(learned), len(kept)) == (12, 8)


def test_rows_of_one_prompt_stay_together_where_asked(policy: Policy) -> None:
    b = data.demonstrations([{"prompt": f"{i % 5}", "completion": f"{i}"} for i in range(20)], policy)
    learned, kept = data.split(b, 0.4, torch.Generator().manual_seed(0), by_prompt=True)
    assert {p.text for p in learned.prompts}.isdisjoint({p.text for p in kept.prompts})
    assert (len(learned), len(kept)) == (12, 8)


def test_a_split_of_too_little_is_an_error(policy: Policy) -> None:
    rng = torch.Generator()
    b = data.demonstrations(ROWS, policy)
    with pytest.raises(ValueError, match=r"share is 1\.0; it must lie between 0 and 1"):
        data.split(b, 1.0, rng)
    with pytest.raises(ValueError, match="1 rows with 1 different prompts cannot be split"):
        data.split(b.select([0]), 0.5, rng)
    learned, kept = data.split(b, 0.01, rng)
    assert (len(learned), len(kept)) == (1, 1), "both parts have something"


def test_a_response_that_goes_on_after_its_end_is_refused(policy: Policy) -> None:
    row = {"prompt": "1+1=", "completion": f"2{policy.tokenizer.eos_token}3"}
    with pytest.raises(ValueError, match="token 1 of the response of row 0 is an end-of-text token, and 2 more follow"):
        data.demonstrations([row], policy)


def test_a_file_with_the_wrong_ending_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"PAR1\x15\x04\x15\xff\xfe")
    with pytest.raises(ValueError, match="it is a Parquet file: give it the ending of one"):
        files.rows(tmp_path / "a.jsonl")


# -- cut responses ------------------------------------------------------------------------------------------------------


def test_cut_responses_are_told_of(policy: Policy):
    said: list[str] = []
    rows = [{"prompt": "1+1=", "completion": "2" * n} for n in (1, 2, 9, 9)]
    batch = data.demonstrations(rows, policy, max_tokens=4)
    data.tell_cut(batch, 4, said.append)
    assert said == [
        "warning: 2 of 4 responses (50.0%) were cut at max_tokens=4: nothing is learned from them about how to end; raise "
        "max_tokens to keep them whole"
    ]
    pairs = data.pairs([{"prompt": "1+1=", "chosen": "2", "rejected": "3" * n} for n in (1, 9)], policy, max_tokens=4)
    data.tell_cut(pairs, 4, said.append)
    assert said[1].startswith("warning: 1 of 4 responses")
    data.tell_cut(data.demonstrations(rows, policy), 99, said.append)
    assert len(said) == 2  # nothing was cut: nothing is said


# -- several answers a row ------------------------------------------------------------------------------------------------


def test_lists_of_answers_are_as_many_pairs(policy: Policy):
    """Two chosen and three rejected texts are six pairs of one prompt; a row of two texts stays one."""
    rows = [
        {"prompt": "1+1=", "chosen": ["2", "two"], "rejected": ["3", "4", "11"], "margin": 0.5},
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
    ]
    pairs = data.pairs(rows, policy)
    said = [(a.strip(), b.strip()) for a, b in zip(pairs.chosen.texts, pairs.rejected.texts, strict=True)]
    assert said == [(a, b) for a in ("2", "two") for b in ("3", "4", "11")] + [("4", "5")]
    assert [p.row for p in pairs.chosen.prompts] == [0] * 6 + [1]
    assert pairs.margin.tolist() == [0.5] * 6 + [0.0]
    learned, kept = data.split(pairs, 0.5, torch.Generator().manual_seed(0))
    assert {len(learned), len(kept)} == {1, 6}  # by prompt
    with pytest.raises(ValueError, match="row 0: chosen is an empty list"):
        data.pairs([{"prompt": "1", "chosen": [], "rejected": ["2"]}], policy)
