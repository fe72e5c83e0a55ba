"""The column formats people's data already has, turned into typed rows.

    demonstrations    text | messages | prompt, completion | question, answer
    prompts           prompt | question | query | messages | chosen, rejected
    preferences       prompt, chosen, rejected | chosen, rejected           (two chats, or two hh-rlhf transcripts)
    comparisons       the same, with lists of texts in chosen or rejected   (RewardBench: each chosen one beats each rejected)
    labelled          prompt, completion, label
    logged            prompt, completion, reward
    stepwise          prompt, completions, labels                           (a label a step)

A prompt, a completion, chosen and rejected are strings or lists of chat messages `{"role": ..., "content": ...}`. A
column that is null counts as absent. Nothing here knows a tokenizer: see `data` for that.

Source: the formats of TRL's documentation ("Dataset formats and types"), of Anthropic's hh-rlhf, of GSM8K and of
RewardBench (Lambert et al. 2024; its second version has several completions a row, Malik et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
Content = str | list[Message]

TURN = "\n\nAssistant:"  # what opens a reply in an hh-rlhf transcript
ASKED = "\n\nHuman:"  # what opens a human's turn there
_LARGEST = 3.4e38  # what float32 holds
_TRUE, _FALSE = {"true", "1", "1.0", "yes"}, {"false", "0", "0.0", "no"}


@dataclass(frozen=True)
class Demonstration:
    """What a demonstrator said.

    Attributes:
        prompt: what it answered; None for plain text, where the text itself is what was said.
        completion: what it said; a list holds one assistant message.
        columns: the row's other columns.
    """

    prompt: Content | None
    completion: Content
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which `chosen` was preferred, by `margin` reward units where the data says so."""

    prompt: Content
    chosen: Content
    rejected: Content
    margin: float
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Steps:
    """An answer written in steps, each found right or wrong.

    Attributes:
        prompt: what was asked.
        steps: the answer's parts in order, at least one, as text.
        labels: one a step, True for right.
        columns: the row's other columns.
    """

    prompt: Content
    steps: tuple[str, ...]
    labels: tuple[bool, ...]
    columns: Mapping[str, Any]


def demonstration(row: Mapping[str, Any], index: int) -> Demonstration:
    """A row as a demonstration.

    Raises:
        ValueError: naming the row, what it has and what is needed.
    """
    if _has(row, "prompt", "completion"):
        prompt, completion = _content(row, "prompt", index), _content(row, "completion", index)
        return Demonstration(
            prompt, _reply(completion, "completion", prompt, index), _rest(row, "prompt", "completion")
        )
    if _has(row, "question", "answer"):
        return Demonstration(_text(row, "question", index), _text(row, "answer", index), _rest(row, "question"))
    if _has(row, "messages"):
        messages = _messages(row, "messages", index)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise ValueError(
                f"row {index}: messages end with {messages[-1]['role']!r}; a demonstration is an assistant's reply "
                "to others"
            )
        return Demonstration(messages[:-1], messages[-1:], _rest(row, "messages"))
    if _has(row, "text"):
        return Demonstration(None, _text(row, "text", index), _rest(row, "text"))
    raise _missing(row, index, "a demonstration", "text | messages | prompt, completion | question, answer")


def prompt(row: Mapping[str, Any], index: int) -> tuple[Content, dict[str, Any]]:
    """A row's prompt, and its other columns.

    Raises:
        ValueError: naming the row, what it has and what is needed.
    """
    for column in ("prompt", "question", "query"):
        if _has(row, column):
            return _content(row, column, index), _rest(row, column)
    if _has(row, "messages"):
        messages = _messages(row, "messages", index)
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not asked:
            raise ValueError(
                f"row {index}: messages hold nothing but an assistant's reply; a prompt is what it replies to"
            )
        return asked, _rest(row, "messages")
    if _has(row, "chosen", "rejected"):
        found = preference(row, index)
        return found.prompt, dict(found.columns)
    raise _missing(row, index, "a prompt", "prompt | question | query | messages | chosen, rejected")


def preference(row: Mapping[str, Any], index: int) -> Preference:
    """A row as a preference; without a prompt column it is what the two transcripts or chats begin with in common.

    Raises:
        ValueError: naming the row, what it has and what is needed; or two transcripts that begin differently.
    """
    if not _has(row, "chosen", "rejected"):
        raise _missing(row, index, "a preference", "prompt, chosen, rejected | chosen, rejected")
    chosen, rejected = _content(row, "chosen", index), _content(row, "rejected", index)
    asked: Content
    if _has(row, "prompt"):
        asked = _content(row, "prompt", index)
        chosen, rejected = _reply(chosen, "chosen", asked, index), _reply(rejected, "rejected", asked, index)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        asked, chosen, rejected = _transcripts(chosen, rejected, index)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        same = _shared(chosen, rejected)
        asked = chosen[: min(same, len(chosen) - 1, len(rejected) - 1)]
        if not asked:
            raise ValueError(
                f"row {index}: the chats in chosen and rejected have no first message in common, so there is no prompt"
            )
        chosen, rejected = (
            _reply(chosen[len(asked) :], "chosen", asked, index),
            _reply(rejected[len(asked) :], "rejected", asked, index),
        )
    else:
        raise ValueError(
            f"row {index}: chosen is {_kind(chosen)}, rejected is {_kind(rejected)}; both must be of one kind"
        )
    return Preference(asked, chosen, rejected, _margin(row, index), _rest(row, "prompt", "chosen", "rejected"))


def comparisons(row: Mapping[str, Any], index: int) -> list[Preference]:
    """A row as one preference or several: where `chosen` or `rejected` lists texts, each chosen one was preferred to each
    rejected one. The row's other columns (`subset`, `chosen_model`, ...) go with each of them.

    Raises:
        ValueError: as `preference`; or an empty list of texts.
    """
    if not _has(row, "chosen", "rejected"):
        raise _missing(row, index, "a comparison", "prompt, chosen, rejected | chosen, rejected")
    return [
        preference({**row, "chosen": chosen, "rejected": rejected}, index)
        for chosen in _answers(row, "chosen", index)
        for rejected in _answers(row, "rejected", index)
    ]


def _answers(row: Mapping[str, Any], column: str, index: int) -> list[Any]:
    """The answers of a column: a list of texts is several, anything else is one."""
    value = row[column]
    if isinstance(value, list) and not value:
        raise ValueError(f"row {index}: {column} is an empty list; it must hold at least one text or chat message")
    return value if isinstance(value, list) and all(isinstance(answer, str) for answer in value) else [value]


def chat(found: Preference) -> Preference:
    """A preference between texts as one between an assistant's replies to a user's message.

    Chats stay as they are, and so do hh-rlhf transcripts, whose text has its own turns.
    """
    if isinstance(found.prompt, list) or found.prompt.endswith(TURN):
        return found
    asked = [{"role": "user", "content": found.prompt}]
    chosen, rejected = ([{"role": "assistant", "content": str(side)}] for side in (found.chosen, found.rejected))
    return Preference(asked, chosen, rejected, found.margin, found.columns)


def first_turn(content: Content) -> str:
    """What a conversation begins with: its first message by a user, or a transcript's first human turn; of plain text all.

    Space is made single and case folded, so that two conversations that begin alike have the same. Group a split by it:
    the same opening with different replies is the same question asked again.
    """
    if isinstance(content, list):
        said = next((m["content"] for m in content if m["role"] == "user"), content[0]["content"])
    else:
        said = content.partition(TURN)[0].partition(ASKED)[2] if ASKED in content else content
    return " ".join(said.split()).casefold()


def labelled(row: Mapping[str, Any], index: int) -> Demonstration:
    """A row with a completion that was found good or bad; `columns["label"]` of the result is a bool.

    Raises:
        ValueError: naming the row, what it has and what is needed.
    """
    if not _has(row, "prompt", "completion", "label"):
        raise _missing(row, index, "a labelled completion", "prompt, completion, label")
    label = _label(row["label"], "label", index)
    found = demonstration(row, index)
    return Demonstration(found.prompt, found.completion, {**found.columns, "label": label})


def logged(row: Mapping[str, Any], index: int) -> Demonstration:
    """A row with a completion and the reward it was given; `columns["reward"]` of the result is a finite float.

    Raises:
        ValueError: naming the row, what it has and what is needed; a row without a reward is no logged one.
    """
    if not _has(row, "prompt", "completion", "reward"):
        raise _missing(row, index, "a logged completion", "prompt, completion, reward")
    reward = _number(row["reward"], "reward", index)
    found = demonstration(row, index)
    return Demonstration(found.prompt, found.completion, {**found.columns, "reward": reward})


def stepwise(row: Mapping[str, Any], index: int) -> Steps:
    """A row with an answer in steps and a label for each.

    Raises:
        ValueError: naming the row and the step: no steps, an empty one, one that is not text, a label that is neither
            true nor false, or not as many labels as steps.
    """
    if not _has(row, "prompt", "completions", "labels"):
        raise _missing(row, index, "an answer in steps", "prompt, completions, labels")
    steps, labels = row["completions"], row["labels"]
    for column, value in (("completions", steps), ("labels", labels)):
        if not isinstance(value, list) or not value:
            raise ValueError(f"row {index}: {column} is {value!r:.60}; it must be a list with one entry a step")
    if len(steps) != len(labels):
        raise ValueError(f"row {index}: {len(steps)} completions and {len(labels)} labels; each step needs one label")
    for at, step in enumerate(steps):
        if not isinstance(step, str) or not step:
            raise ValueError(f"row {index}: step {at} of completions is {step!r:.60}; a step is text, and not empty")
    return Steps(
        _content(row, "prompt", index),
        tuple(steps),
        tuple(_label(label, f"label {at} of labels", index) for at, label in enumerate(labels)),
        _rest(row, "prompt", "completions", "labels"),
    )


def _label(value: Any, what: str, index: int) -> bool:
    word = str(value).strip().lower()
    if word not in _TRUE | _FALSE:
        raise ValueError(f"row {index}: {what} is {value!r}; it must be true or false, 1 or 0")
    return word in _TRUE


def _transcripts(chosen: str, rejected: str, index: int) -> tuple[str, str, str]:
    """hh-rlhf: the prompt is everything up to the last reply that both begin together."""
    at = chosen.rfind(TURN, 0, _shared(chosen, rejected))
    if at < 0:
        raise ValueError(
            f"row {index}: chosen and rejected have no {TURN!r} in the part they share, so where the prompt ends is "
            "unknown: add a prompt column"
        )
    end = at + len(TURN)
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if ASKED in text[end:]:
            raise ValueError(
                f"row {index}: {side} goes on with another {ASKED!r} after the reply in which the two first differ: what "
                "humans said is no response; cut both after that reply"
            )
    return chosen[:end], chosen[end:], rejected[end:]


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many characters, or messages, two texts or chats begin with in common."""
    differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


def _margin(row: Mapping[str, Any], index: int) -> float:
    return 0.0 if row.get("margin") is None else _number(row["margin"], "margin", index)


def _number(value: Any, column: str, index: int) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= _LARGEST:  # NaN too
        raise ValueError(
            f"row {index}: {column} is {value!r}; it must be a finite number of reward units, at most {_LARGEST:.3g} either way"
        )
    return number


def _reply(value: Content, column: str, asked: Content, index: int) -> Content:
    """An answer of the same kind as its prompt: text to text, one assistant message to messages."""
    if isinstance(value, str) and isinstance(asked, list):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, list):
        if isinstance(asked, str):
            raise ValueError(
                f"row {index}: {column} is chat messages but the prompt is text; give both as messages or both as text"
            )
        if len(value) != 1 or value[0]["role"] != "assistant":
            roles = [message["role"] for message in value]
            raise ValueError(
                f"row {index}: {column} holds messages by {roles}; it must be one by the assistant: move the rest to "
                "the prompt"
            )
    return value


def _content(row: Mapping[str, Any], column: str, index: int) -> Content:
    return _messages(row, column, index) if isinstance(row[column], list) else _text(row, column, index)


def _text(row: Mapping[str, Any], column: str, index: int) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(
            f"row {index}: {column} is {_kind(value)} ({value!r:.60}); it must be text or a list of chat messages"
        )
    if not value:
        raise ValueError(f"row {index}: {column} is empty; drop the row or fill it")
    return value


def _messages(row: Mapping[str, Any], column: str, index: int) -> list[Message]:
    value = row[column]
    if not isinstance(value, list) or not value:
        raise ValueError(f"row {index}: {column} is {value!r:.60}; it must be a list of at least one chat message")
    for message in value:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f"row {index}: {column} holds {message!r:.80}; a message is {{'role': text, 'content': text}}"
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _has(row: Mapping[str, Any], *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def _rest(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in used}


def _missing(row: Mapping[str, Any], index: int, what: str, accepted: str) -> ValueError:
    present = ", ".join(name for name in row if row[name] is not None) or "no columns"
    return ValueError(
        f"row {index} has {present}; {what} needs one of: {accepted}. Rename the columns of your data to these"
    )


def _kind(value: Any) -> str:
    names = {
        "str": "text",
        "list": "a list",
        "int": "a number",
        "float": "a number",
        "dict": "an object",
        "bool": "true or false",
    }
    return names.get(type(value).__name__, type(value).__name__)
