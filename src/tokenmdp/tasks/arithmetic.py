"""Arithmetic word problems, judged by the number that a response gives: from the user's file, or made here.

    tokenmdp grpo --task arithmetic                    one- and two-step problems made from templates
    tokenmdp grpo --task arithmetic:problems.jsonl     a file; a part of it is held out
    tokenmdp grpo --task arithmetic:folder             train.jsonl and test.jsonl (or .json, .csv, .parquet)

A file has the columns `question` and `answer`, and `equation` where there is one: GSM8K (the answer ends with `#### 18`),
MAWPS and its like (`x=12-5`, 7), or plain numbers. A question never stands on both sides, whatever its case, spacing and
punctuation, and is held out once with each answer; of problems made here, no template stands on both sides with the same numbers.

The demonstrations work the equation out, a step at a time: `12 - 5 = 7. 7 * 3 = 21. The answer is 21.`
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from tokenmdp.models.policy import Policy
from tokenmdp.rewards import numerals
from tokenmdp.rewards.verifier import NumericVerifier
from tokenmdp.tasks import Task, data, files, once

TEMPLATE = "Question: {question}\nAnswer:"
MADE = 2000  # problems made where no number is given
_IN_VAIN = 5000  # draws in a row without a new problem, after which there are no more

Row = dict[str, Any]

# What happens to the numbers a, b, c, and the expression that answers the question.
_ONE_STEP = (
    ("{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?", "a + b"),
    ("{name} has {a} {things} and {friend} has {b}. How many {things} do they have together?", "a + b"),
    ("{name} had {a} {things} and gave {b} of them to {friend}. How many {things} are left?", "a - b"),
    ("{name} needs {a} {things} and has {b} of them. How many more {things} are needed?", "a - b"),
    ("Each box holds {a} {things}. How many {things} are there in {b} boxes?", "a * b"),
    ("{name} lays out {a} rows of {b} {things}. How many {things} are laid out?", "a * b"),
    ("{name} shares {a} {things} equally among {b} friends. How many {things} does each of them get?", "a / b"),
    ("{name} packs {a} {things} into bags of {b}. How many bags does {name} need?", "a / b"),
)
_TWO_STEPS = (
    ("{name} had {a} {things}, bought {b} more and lost {c}. How many {things} are left?", "a + b - c"),
    ("{name} bought {a} packs of {b} {things} and found {c} more. How many {things} is that in all?", "a * b + c"),
    ("{name} filled {a} trays with {b} {things} each and sold {c} {things}. How many {things} remain?", "a * b - c"),
    ("Of {a} guests {b} went home. The others sat at tables of {c}. How many tables did they take?", "(a - b) / c"),
    (
        "{name} earns {a} dollars an hour and worked {b} hours one day and {c} the next. How many dollars?",
        "a * (b + c)",
    ),
    ("{name} and {friend} pick {a} and {b} {things} and share them among {c}. How many for each?", "(a + b) / c"),
)
_NAMES = ("Ada", "Ben", "Chloe", "Dan", "Ella", "Finn", "Grace", "Hugo", "Ivy", "Jack", "Lena", "Max", "Nina", "Omar")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps", "stickers")

_UNKNOWN_ALONE = re.compile(r"\s*[A-Za-z]+\s*=\s*([^=A-Za-z]+)|([^=A-Za-z]+?)\s*(?:=\s*[A-Za-z]+\s*)?")
_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|[-+*/()]")
_OPERATIONS = ("+-", "*/")


def load(
    policy: Policy,
    source: str | Path | None = None,
    count: int = 0,
    held_out: int = 200,
    seed: int = 0,
    template: str = TEMPLATE,
    largest: int = 20,
    max_tokens: int | None = None,
) -> Task:
    """The task in the tokens of `policy`.

    Args:
        source: a file, a folder or a hub id with problems; None makes them.
        count: the most problems to learn on; 0 takes all there are, or makes 2,000.
        held_out: the most problems to judge on; of a source without a test part at most a fifth.
        seed: which problems are made, held out and left out.
        template: the prompt; the question stands where it says {question}.
        largest: the largest number in problems made here, at least 4.
        max_tokens: longer demonstrations are cut there, and then do not end.

    Raises:
        ValueError: an option outside its range, a row without a question, or no problem with an answer that can be read.
    """
    if count < 0 or held_out < 0 or largest < 4:
        raise ValueError(
            f"count is {count}, held_out {held_out}, largest {largest}: the first two are at least 0, the last at least 4"
        )
    if "{question}" not in template:
        raise ValueError(f"the template {template!r} does not say where the question stands: write {{question}} there")
    if source is None:
        learned, kept = made(count or MADE, held_out, largest, seed)
        unreadable = shared = repeated = 0
    else:
        learned, kept, shared, repeated, unreadable = _split(source, count, held_out, seed)
    built = data.prompts([_prompt_row(row, template) for row in (*learned, *kept)], policy)
    shown = [{**_prompt_row(row, template), "completion": said} for row in learned if (said := demonstration(row))]
    return Task(
        name="arithmetic",
        train=tuple(built[: len(learned)]),
        held_out=tuple(built[len(learned) :]),
        demonstrations=data.demonstrations(shown, policy, max_tokens) if shown else None,
        reward=NumericVerifier(),
        facts={
            "problems": len(learned),
            "held_out": len(kept),
            "demonstrations": len(shown),
            "dropped_as_held_out": shared,
            "dropped_as_repeated": repeated,
            "unreadable": unreadable,
        },
    )


Step = tuple[Fraction, str, Fraction, Fraction]
"""An operation and its result: 12, "-", 5, 7."""


def made(count: int, held_out: int, largest: int = 20, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Problems from templates, to learn on and held out: whole positive numbers at every step, all instances different.

    An instance is a template with its numbers. Where there are not so many, fewer are made and at most a fifth of them
    is held out.
    """
    rng = random.Random(seed)
    found: dict[tuple[str, str], Row] = {}
    since_new = 0
    while len(found) < count + held_out and since_new < _IN_VAIN:
        since_new += 1
        text, expression = rng.choice(_ONE_STEP if rng.random() < 0.5 else _TWO_STEPS)
        numbers = {letter: str(rng.randint(2, largest)) for letter in "abc"}
        name, friend = rng.sample(_NAMES, 2)
        question = text.format(name=name, friend=friend, things=rng.choice(_THINGS), **numbers)
        equation = "".join(numbers.get(letter, letter) for letter in expression)
        value, steps = worked(equation) or (Fraction(0), [])
        whole = bool(steps) and all(result > 0 and result.denominator == 1 for *_, result in steps)
        if whole and (text, equation) not in found:
            found[text, equation] = {"question": question, "equation": equation, "answer": int(value)}
            since_new = 0
    rows = list(found.values())
    cut = held_out if len(rows) == count + held_out else min(held_out, len(rows) // 5)
    return rows[cut:][:count], rows[:cut]


def demonstration(row: Row) -> str:
    """A short worked answer to a row, as the verifier reads it; empty if its numbers have no short decimal form.

    GSM8K's own solution, without the calculator's notes; else the equation's steps, if they lead to the answer; else
    the answer alone.
    """
    right = numerals.known(row["answer"])
    text = str(row["answer"])
    if right is None:
        return ""
    if "####" in text:
        return " " + re.sub(r"<<[^<>]*>>", "", text).strip()
    last = f"The answer is {numerals.written(right.value)}{'%' * right.percent}."
    value, steps = worked(str(row.get("equation") or "")) or (None, [])
    if value is not None and numerals.same(numerals.Numeral(value), right, 1e-9):
        shown = [[numerals.written(x) if isinstance(x, Fraction) else x for x in step] for step in steps]
        lines = [f"{a} {operation} {b} = {result}." for a, operation, b, result in shown]
        last = f"The answer is {numerals.written(value)}."
        if not any("/" in number for a, _, b, result in shown for number in (a, b, result)):
            return " " + " ".join([*lines, last])
    return "" if "/" in last else f" {last}"


def worked(equation: str) -> tuple[Fraction, list[Step]] | None:
    """The value of `x=(12-5)*3`, `12-5=x` or `12-5` and the operations that lead to it, in the order they are done.

    None where the unknown does not stand alone on its side, or the rest is anything but numbers, + - * / and brackets.
    """
    alone = _UNKNOWN_ALONE.fullmatch(equation[:200])
    side = "" if alone is None else (alone[1] or alone[2])
    todo = _TOKEN.findall(side)[::-1]
    if "".join(todo[::-1]) != re.sub(r"\s", "", side):
        return None
    steps: list[Step] = []

    def level(at: int) -> Fraction:
        """A sum (at 0), a product (at 1) or what these are made of; takes its tokens off `todo`."""
        if at == len(_OPERATIONS):
            token = todo.pop()
            if token == "-":
                return -level(at)
            if token != "(":
                return Fraction(token)
            inner = level(0)
            if todo.pop() != ")":
                raise ValueError
            return inner
        left = level(at + 1)
        while todo and todo[-1] in _OPERATIONS[at]:
            operation, right = todo.pop(), level(at + 1)
            result = {"+": left + right, "-": left - right, "*": left * right}.get(operation)
            result = left / right if result is None else result
            steps.append((left, operation, right, result))
            left = result
        return left

    try:
        value = level(0)
    except (IndexError, ValueError, ZeroDivisionError):  # it broke off, or is no expression
        return None
    return None if todo else (value, steps)


def key(question: str) -> str:
    """What two spellings of one question have in common: words, numbers and signs, without case, space, punctuation."""
    return " ".join(re.findall(r"\d+(?:[.,]\d+)*|\w+|[^\w\s.,;:!?'\"]", question.casefold()))


def _split(source: str | Path, count: int, held_out: int, seed: int) -> tuple[list[Row], list[Row], int, int, int]:
    """The rows of a source to learn on and to judge on; how many left the first as they stand in the second, and the
    second as they stand there already; and how many had no answer that can be read.
    """
    path, rng = Path(source).expanduser(), random.Random(seed)
    with_test = any(path.glob("test.*")) if path.is_dir() else not path.is_file()
    everything = files.rows(source, "train")
    learned = list(_readable(everything))
    asked = files.rows(source, "test") if with_test else []
    kept = list(_readable(asked))
    unreadable = len(everything) + len(asked) - len(learned) - len(kept)
    if with_test:
        never = {key(row["question"]) for row in kept}  # also those that are not among the `held_out` drawn
        different = _different(kept)
        repeated = len(kept) - len(different)
        kept = [different[i] for i in sorted(rng.sample(range(len(different)), min(held_out, len(different))))]
    else:
        questions = sorted({key(row["question"]) for row in learned})
        never = set(rng.sample(questions, min(held_out, len(questions) // 5)))
        asked = [row for row in learned if key(row["question"]) in never]
        kept = _different(asked)
        repeated = len(asked) - len(kept)
        learned = [row for row in learned if key(row["question"]) not in never]
    apart = [row for row in learned if key(row["question"]) not in never]
    shared = len(learned) - len(apart)
    if not apart:
        raise ValueError(
            f"{source} leaves no problem to learn on: of {len(everything)} rows {unreadable} have no answer that can be "
            "read as a number, and the others are held out"
        )
    if count and count < len(apart):
        apart = [apart[i] for i in sorted(rng.sample(range(len(apart)), count))]
    return apart, kept, shared, repeated, unreadable


def _different(rows: Sequence[Row]) -> list[Row]:
    """Each question once with each answer."""
    return list(once(rows, lambda row: (key(row["question"]), numerals.known(row["answer"]))))


def _readable(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows whose answer is a number.

    Raises:
        ValueError: a row lacks the question or the answer column.
    """
    for index, row in enumerate(rows):
        if not isinstance(row.get("question"), str) or "answer" not in row:
            raise ValueError(
                f"row {index} has {', '.join(row) or 'no columns'}; a word problem needs question and answer (and may "
                "have equation): rename the columns of your data to these"
            )
        if numerals.known(row["answer"]) is not None:
            yield row


def _prompt_row(row: Row, template: str) -> Row:
    """A row as a prompt with what the verifier needs."""
    return {
        "prompt": template.replace("{question}", row["question"].strip()),
        "question": row["question"],
        "answer": row["answer"],
    }
