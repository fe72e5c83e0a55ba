"""CHAMP's conversations as trials: four models under up to eighteen strategies on 270 competition problems.

The data set holds no verdicts. Problems whose answer is a whole number can be graded here (79 of them): the last message of a
conversation is a summary in one sentence, which is right where it says that number. Where the problem itself says the
number, too, it must be what the sentence gives as its answer (`numerals.answer`).

Source: Mao, Kim & Zhou 2024 (CHAMP), the file `v0.json` of the package `champ-dataset`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenmdp.rewards import numerals

_WHOLE = re.compile(r"-?\d+")


def recognised(path: Path) -> bool:
    """Whether a file is CHAMP's."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return re.match(r'\s*\{\s*"problems"\s*:\s*\{', file.read(256)) is not None


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The trials, in a log's columns; a conversation that broke off earns nothing.

    Raises:
        ValueError: the file is not laid out as CHAMP's.
    """
    try:
        for name, problem in json.loads(path.read_text(encoding="utf-8"))["problems"].items():
            answer, query = str(problem["_answer"]).strip(), str(problem["_text"])
            if not _WHOLE.fullmatch(answer):
                continue
            for label, talk in problem["conversations"].items():
                model, strategy = label.split("|")
                said = talk["messages"][-1]["text"] or ""
                yield {
                    "query_id": name,
                    "query": query,
                    "prompt_id": strategy,
                    "model": model,
                    "response": said,
                    "reward": float(right(query, said, int(answer))),
                }
    except (KeyError, TypeError, AttributeError) as fault:
        raise ValueError(f"{path} is not laid out as CHAMP's v0.json: {fault!r}") from fault


def right(query: str, said: str, answer: int) -> bool:
    """Whether a sentence says the answer."""
    if any(found.value == answer for found in numerals.numerals(query)):
        given = numerals.answer(said)
        return given is not None and given.value == answer
    return any(found.value == answer for found in numerals.numerals(said))
