"""A file of preferences as something to judge by: what can be read, what is in it twice, what training has seen.

A row that cannot be used is left out and counted, with the reason; so is a pair between equal responses, and a pair that
stands in the file before. A held-out file shares nothing with what was trained on only if somebody looked: `overlap` does,
in the text (case and space do not count), whatever columns either file has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenmdp.models.policy import Policy
from tokenmdp.tasks import data, formats
from tokenmdp.tasks.formats import ASKED, TURN, Content, Preference
from tokenmdp.types import Batch, Pairs

Exact = str | tuple[tuple[str, str], ...]
FAULTS = 5  # reasons kept


@dataclass(frozen=True)
class Compared:
    """The preferences of a file that can be judged.

    Attributes:
        pairs: in the tokens of the reward's reader.
        said: each pair as the file says it.
        row: the row of the file that each pair comes from; a row may hold several.
        counts: `rows`, `pairs`, and of what was left out: `unreadable` rows, `equal_sides`, `duplicates`; `contradicted`
            pairs stand in the file the other way round too, and are kept.
        faults: the first reasons why rows could not be read.
    """

    pairs: Pairs
    said: tuple[Preference, ...]
    row: tuple[int, ...]
    counts: Mapping[str, int]
    faults: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.said)


def read(
    rows: Sequence[Mapping[str, Any]], policy: Policy, max_tokens: int | None = None, chat: bool = False
) -> Compared:
    """The comparisons of the rows, each once.

    Args:
        policy: gives the tokens; nothing is sampled from it.
        max_tokens: longer responses are cut there.
        chat: put plain-text prompts as a user's message (see `formats.chat`).

    Raises:
        ValueError: nothing is left to judge, with what was wrong.
    """
    said: list[Preference] = []
    at: list[int] = []
    built: list[Pairs] = []
    faults: list[str] = []
    seen: set[tuple[Exact, Exact, Exact]] = set()
    counts = dict.fromkeys(
        ("rows", "pairs", "unreadable", "equal_sides", "cut", "cut_alike", "duplicates", "contradicted"), 0
    )
    for index, row in enumerate(rows):
        try:
            found = [formats.chat(p) if chat else p for p in formats.comparisons(row, index)]
            tokens = [_tokens(p, index, policy, max_tokens) for p in found]
        except ValueError as fault:
            counts["unreadable"] += 1
            faults.append(str(fault))
            continue
        for preference, pair in zip(found, tokens, strict=True):
            question, better, worse = (_exact(x) for x in (preference.prompt, preference.chosen, preference.rejected))
            counts["cut"] += int((~pair.chosen.ended).sum() + (~pair.rejected.ended).sum())
            if better == worse:
                counts["equal_sides"] += 1
            elif bool(data.alike(pair)):
                counts["cut_alike"] += 1
            elif (question, better, worse) in seen:
                counts["duplicates"] += 1
            else:
                counts["contradicted"] += (question, worse, better) in seen
                seen.add((question, better, worse))
                said.append(preference)
                at.append(index)
                built.append(pair)
    counts |= {"rows": len(rows), "pairs": len(said)}
    if not built:
        why = f"; the first: {faults[0]}" if faults else ""
        raise ValueError(
            f"none of the {len(rows)} rows has a pair to judge: {counts['unreadable']} could not be read and "
            f"{counts['equal_sides']} pairs have two equal sides, {counts['cut_alike']} more up to max_tokens={max_tokens}{why}"
        )
    margin = [p.margin for p in built]
    pairs = Pairs(
        Batch.concat([p.chosen for p in built]),
        Batch.concat([p.rejected for p in built]),
        margin[0].new_tensor([float(m) for m in margin]),
    )
    return Compared(pairs, tuple(said), tuple(at), counts, tuple(faults[:FAULTS]))


def overlap(said: Sequence[Preference], trained: Sequence[Mapping[str, Any]]) -> tuple[list[bool], list[bool], int]:
    """Which preferences a training file holds too, and which share their opening with one of its rows.

    Args:
        said: the preferences judged.
        trained: the rows of the training file.

    Returns:
        For each preference whether its two responses were trained on, as a pair in either order or one of them as a
        demonstration; whether the same first turn was; and how many rows of the training file could not be read.
    """
    pairs: set[tuple[str, frozenset[str]]] = set()
    shown: set[str] = set()
    openings: set[str] = set()
    unreadable = 0
    for index, row in enumerate(trained):
        try:
            if {"chosen", "rejected"} <= row.keys():
                found = formats.comparisons(row, index)
                pairs |= {_pair(p) for p in found}
                openings |= {formats.first_turn(p.prompt) for p in found}
            else:
                one = formats.demonstration(row, index)
                shown.add(_whole(one.prompt or "", one.completion))
                openings |= set() if one.prompt is None else {formats.first_turn(one.prompt)}
        except ValueError:
            unreadable += 1

    def seen(p: Preference) -> bool:
        return _pair(p) in pairs or not shown.isdisjoint(_whole(p.prompt, side) for side in (p.chosen, p.rejected))

    return [seen(p) for p in said], [formats.first_turn(p.prompt) in openings for p in said], unreadable


def looks_like_rewardbench(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the rows are RewardBench's: text prompts that are meant as a user's message."""
    named = {"subset", "chosen_model", "models"}
    return any(isinstance(row.get("prompt"), str) and named & row.keys() for row in rows[:20])


def _tokens(found: Preference, index: int, policy: Policy, max_tokens: int | None) -> Pairs:
    """One preference in tokens; its prompt knows the row."""
    one = {"prompt": found.prompt, "chosen": found.chosen, "rejected": found.rejected, "margin": found.margin}
    try:
        pairs = data.pairs([{**found.columns, **one}], policy, max_tokens)
    except ValueError as fault:
        raise ValueError(str(fault).replace("row 0", f"row {index}", 1)) from fault
    chosen, rejected = (
        replace(side, prompts=(replace(side.prompts[0], row=index),)) for side in (pairs.chosen, pairs.rejected)
    )
    return Pairs(chosen, rejected, pairs.margin)


def _pair(found: Preference) -> tuple[str, frozenset[str]]:
    return _flat(found.prompt), frozenset((_flat(found.chosen), _flat(found.rejected)))


def _whole(prompt: Content, answer: Content) -> str:
    """A prompt with an answer to it, as one text without any space: some files have it on this side, some on that."""
    return (_flat(prompt) + _flat(answer)).replace(" ", "")


def _exact(content: Content) -> Exact:
    """What was said, to the letter: capitals and indentation can be all that a comparison is about."""
    return content if isinstance(content, str) else tuple((m["role"], m["content"]) for m in content)


def _flat(content: Content) -> str:
    """What was said, without who said it: chats, transcripts and plain text of the same words are the same."""
    text = " ".join(m["content"] for m in content) if isinstance(content, list) else content
    return " ".join(text.replace(TURN, " ").replace(ASKED, " ").split()).casefold()
