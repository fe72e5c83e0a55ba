"""Every column format, by hand; and what is said of rows that are none."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmdp.tasks import formats
from tokenmdp.tasks.formats import Demonstration, Preference, Steps

ASK = {"role": "user", "content": "2+2?"}
REPLY = {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"text": "a text", "source": 7}, Demonstration(None, "a text", {"source": 7})),
        ({"prompt": "q", "completion": "a", "id": 3}, Demonstration("q", "a", {"id": 3})),
        ({"prompt": [ASK], "completion": [REPLY]}, Demonstration([ASK], [REPLY], {})),
        ({"prompt": [ASK], "completion": "4"}, Demonstration([ASK], [REPLY], {})),
        ({"messages": [ASK, REPLY]}, Demonstration([ASK], [REPLY], {})),
        ({"messages": [ASK, WRONG, ASK, REPLY]}, Demonstration([ASK, WRONG, ASK], [REPLY], {})),
        (
            {"question": "2+2?", "answer": "It is 4.\n#### 4"},
            Demonstration("2+2?", "It is 4.\n#### 4", {"answer": "It is 4.\n#### 4"}),
        ),
        (
            {"prompt": None, "completion": None, "text": "t"},
            Demonstration(None, "t", {"prompt": None, "completion": None}),
        ),
    ],
)
def test_demonstrations(row: dict[str, Any], want: Demonstration) -> None:
    assert formats.demonstration(row, 0) == want


@pytest.mark.parametrize(
    ("row", "prompt", "columns"),
    [
        ({"prompt": "q", "answer": 4}, "q", {"answer": 4}),
        ({"question": "q", "answer": "#### 4"}, "q", {"answer": "#### 4"}),
        ({"query": "q", "query_id": 1}, "q", {"query_id": 1}),
        ({"messages": [ASK]}, [ASK], {}),
        ({"messages": [ASK, REPLY]}, [ASK], {}),
        (
            {"chosen": "Human: hi\n\nAssistant: yes", "rejected": "Human: hi\n\nAssistant: no"},
            "Human: hi\n\nAssistant:",
            {},
        ),
    ],
)
def test_prompts(row: dict[str, Any], prompt: formats.Content, columns: dict[str, Any]) -> None:
    assert formats.prompt(row, 0) == (prompt, columns)


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b", "id": 1}, Preference("q", "a", "b", 0.0, {"id": 1})),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1.5"},
            Preference("q", "a", "b", 1.5, {"margin": "1.5"}),
        ),
        ({"prompt": [ASK], "chosen": [REPLY], "rejected": [WRONG]}, Preference([ASK], [REPLY], [WRONG], 0.0, {})),
        ({"chosen": [ASK, REPLY], "rejected": [ASK, WRONG]}, Preference([ASK], [REPLY], [WRONG], 0.0, {})),
        ({"chosen": [ASK, REPLY], "rejected": [ASK, REPLY]}, Preference([ASK], [REPLY], [REPLY], 0.0, {})),
    ],
)
def test_preferences(row: dict[str, Any], want: Preference) -> None:
    assert formats.preference(row, 0) == want


def test_transcripts_share_all_up_to_the_last_reply_they_begin_together() -> None:
    begin = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    found = formats.preference({"chosen": begin + " good", "rejected": begin + " bad"}, 0)
    assert (found.prompt, found.chosen, found.rejected) == (begin, " good", " bad")
    # Both replies begin with the same word: it belongs to the replies, not to the prompt.
    found = formats.preference({"chosen": begin + " I do", "rejected": begin + " I don't"}, 0)
    assert (found.prompt, found.chosen, found.rejected) == (begin, " I do", " I don't")
    # One is the beginning of the other; and one says nothing.
    found = formats.preference({"chosen": begin + " yes.", "rejected": begin}, 0)
    assert (found.prompt, found.chosen, found.rejected) == (begin, " yes.", "")


@pytest.mark.parametrize(("label", "want"), [(True, True), (0, False), ("1", True), ("False", False), (1.0, True)])
def test_labels(label: object, want: bool) -> None:
    assert formats.labelled({"prompt": "q", "completion": "a", "label": label}, 0).columns["label"] is want


@pytest.mark.parametrize(("reward", "want"), [(1, 1.0), ("-0.5", -0.5), (0.0, 0.0)])
def test_rewards(reward: object, want: float) -> None:
    found = formats.logged({"prompt": "q", "completion": "a", "reward": reward, "id": 1}, 0)
    assert found == Demonstration("q", "a", {"reward": want, "id": 1})


def test_steps() -> None:
    row = {"prompt": [ASK], "completions": ["2+2 is 4.", "So 5."], "labels": [1, "false"], "id": 3}
    assert formats.stepwise(row, 0) == Steps([ASK], ("2+2 is 4.", "So 5."), (True, False), {"id": 3})


@pytest.mark.parametrize(
    ("read", "row", "words"),
    [
        (
            formats.demonstration,
            {"qestion": "q", "answr": "a"},
            "row 5 has qestion, answr; a demonstration needs one of: text | messages",
        ),
        (formats.demonstration, {}, "row 5 has no columns"),
        (formats.prompt, {"text": "t"}, "row 5 has text; a prompt needs one of: prompt | question"),
        (formats.preference, {"chosen": "c"}, "row 5 has chosen; a preference needs one of: prompt, chosen, rejected"),
        (
            formats.labelled,
            {"prompt": "q", "completion": "a"},
            "a labelled completion needs one of: prompt, completion, label",
        ),
        (
            formats.labelled,
            {"prompt": "q", "completion": "a", "label": "maybe"},
            "label is 'maybe'; it must be true or false",
        ),
        (
            formats.logged,
            {"prompt": "q", "completion": "a", "reward": None},
            "row 5 has prompt, completion; a logged completion needs one of: prompt, completion, reward",
        ),
        (formats.logged, {"prompt": "q", "completion": "a", "reward": "nan"}, "reward is 'nan'; it must be a finite"),
        (formats.logged, {"prompt": "q", "completion": "a", "reward": True}, "reward is True; it must be a finite"),
        (formats.logged, {"prompt": "q", "completion": "", "reward": 1}, "row 5: completion is empty"),
        (
            formats.stepwise,
            {"prompt": "q", "completion": "a"},
            "row 5 has prompt, completion; an answer in steps needs one of: prompt, completions, labels",
        ),
        (
            formats.stepwise,
            {"prompt": "q", "completions": ["a", "b"], "labels": [1]},
            "2 completions and 1 labels; each step needs one label",
        ),
        (formats.stepwise, {"prompt": "q", "completions": [], "labels": []}, "completions is []; it must be a list"),
        (formats.stepwise, {"prompt": "q", "completions": "a", "labels": [1]}, "completions is 'a'; it must be a list"),
        (formats.stepwise, {"prompt": "q", "completions": ["a"], "labels": 1}, "labels is 1; it must be a list"),
        (formats.stepwise, {"prompt": "q", "completions": ["a", ""], "labels": [1, 1]}, "step 1 of completions is ''"),
        (
            formats.stepwise,
            {"prompt": "q", "completions": ["a"], "labels": [0.5]},
            "label 0 of labels is 0.5; it must be true or false",
        ),
        (formats.demonstration, {"text": ""}, "row 5: text is empty"),
        (formats.demonstration, {"prompt": "q", "completion": ""}, "row 5: completion is empty"),
        (formats.prompt, {"prompt": 7}, "row 5: prompt is a number (7); it must be text or a list"),
        (formats.prompt, {"prompt": ["q"]}, "a message is {'role': text, 'content': text}"),
        (formats.prompt, {"prompt": [{"role": "user", "content": None}]}, "a message is"),
        (formats.prompt, {"prompt": []}, "at least one chat message"),
        (formats.prompt, {"messages": [REPLY]}, "nothing but an assistant's reply"),
        (formats.demonstration, {"messages": [ASK]}, "messages end with 'user'"),
        (formats.demonstration, {"prompt": "q", "completion": [REPLY]}, "give both as messages or both as text"),
        (formats.demonstration, {"prompt": [ASK], "completion": [ASK, REPLY]}, "must be one by the assistant"),
        (
            formats.preference,
            {"chosen": "one", "rejected": "two"},
            "where the prompt ends is unknown: add a prompt column",
        ),
        (formats.preference, {"chosen": [ASK, REPLY], "rejected": "two"}, "both must be of one kind"),
        (formats.preference, {"chosen": [ASK, REPLY], "rejected": [REPLY, ASK]}, "no first message in common"),
        (
            formats.preference,
            {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "nan"},
            "a finite number of reward units",
        ),
    ],
)
def test_a_row_that_is_none_says_why(read: Any, row: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="row 5") as caught:
        read(row, 5)
    assert words in str(caught.value)


def test_rewardbench_rows_are_comparisons_with_their_subset() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_model": "m", "rejected_model": "n", "subset": "s"}
    [found] = formats.comparisons(row, 0)
    assert (found.prompt, found.chosen, found.rejected) == ("q", "a", "b")
    assert found.columns == {"chosen_model": "m", "rejected_model": "n", "subset": "s"}


def test_lists_of_texts_are_compared_each_with_each() -> None:
    row = {"prompt": "q", "chosen": ["a", "b"], "rejected": ["c", "d", "e"], "subset": "ties"}
    found = formats.comparisons(row, 3)
    assert [(f.chosen, f.rejected) for f in found] == [(x, y) for x in "ab" for y in "cde"]
    assert all(f.columns == {"subset": "ties"} for f in found)
    # A list of messages is one answer.
    [one] = formats.comparisons({"prompt": [ASK], "chosen": [REPLY], "rejected": [WRONG]}, 0)
    assert one == Preference([ASK], [REPLY], [WRONG], 0.0, {})
    with pytest.raises(ValueError, match="row 4: rejected is an empty list"):
        formats.comparisons({"prompt": "q", "chosen": "a", "rejected": []}, 4)
    with pytest.raises(ValueError, match="row 2 has prompt; a comparison needs"):
        formats.comparisons({"prompt": "q"}, 2)


def test_a_text_is_put_to_a_chat_model_as_a_users_message() -> None:
    found = formats.chat(Preference("2+2?", "4", "5", 0.5, {"id": 1}))
    assert found == Preference([ASK], [REPLY], [WRONG], 0.5, {"id": 1})
    assert formats.chat(found) == found
    transcript = Preference("\n\nHuman: a\n\nAssistant:", " b", " c", 0.0, {})
    assert formats.chat(transcript) == transcript


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ("\n\nHuman: How  Much?\n\nAssistant: none\n\nHuman: why\n\nAssistant:", "how much?"),
        ([{"role": "system", "content": "be good"}, {"role": "user", "content": "Hi\nyou"}, REPLY, ASK], "hi you"),
        ([{"role": "assistant", "content": "Hello"}], "hello"),
        ("The film  was", "the film was"),
    ],
)
def test_the_first_turn_of_a_conversation(content: formats.Content, want: str) -> None:
    assert formats.first_turn(content) == want


def test_a_transcript_that_goes_on_after_the_reply_compared_is_refused() -> None:
    start = "\n\nHuman: a\n\nAssistant:"
    later = {"chosen": start + " b\n\nHuman: c\n\nAssistant: d", "rejected": start + " e"}
    with pytest.raises(ValueError, match=r"row 3: chosen goes on with another .*what humans said is no response"):
        formats.preference(later, 3)


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_a_reward_beyond_float32_names_its_row(value: float) -> None:
    with pytest.raises(ValueError, match=r"row 2: reward is .*at most 3.4e\+38"):
        formats.logged({"prompt": "a", "completion": "b", "reward": value}, 2)
