"""Users' data as batches, prompts and pairs: rows (see `files`) whose columns (see `formats`) are given tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenmdp.models.policy import Policy
from tokenmdp.tasks import formats
from tokenmdp.tasks.formats import Content, Demonstration
from tokenmdp.types import Batch, Pairs, Prompt

_MANY_CUT = 0.05  # share of responses cut from which it is a warning
_ALL_WRONG, _NAMED = 20, 20  # rows that are wrong before the rest is not looked at; rows an error names
Made = TypeVar("Made")


def prompts(rows: Sequence[Mapping[str, Any]], policy: Policy) -> list[Prompt]:
    """A prompt a row, in order; a row's other columns go with it.

    Raises:
        ValueError: a row without a prompt (naming its columns), messages for a tokenizer without a chat template, or a
            prompt that leaves no room in the context.
    """

    def one(row: Mapping[str, Any], index: int) -> Prompt:
        content, columns = formats.prompt(row, index)
        return policy.prompt(content, index, columns)

    return _each(rows, one)


def demonstrations(rows: Sequence[Mapping[str, Any]], policy: Policy, max_tokens: int | None = None) -> Batch:
    """A demonstration a row: the prompt is the state, what was said the actions, with the end-of-text token last.

    Plain `text` has no prompt: its state is the token the tokenizer itself begins a text with, else the text's first
    token.

    Args:
        max_tokens: longer responses are cut there; they then have no end-of-text token and `ended` is False.

    Raises:
        ValueError: as `prompts`; or prompt and response together exceed the context.
    """
    return _batch(rows, formats.demonstration, policy, max_tokens)


def labelled(
    rows: Sequence[Mapping[str, Any]], policy: Policy, max_tokens: int | None = None
) -> tuple[Batch, Bool[Tensor, "B"]]:
    """As `demonstrations`, of completions that were found good or bad; with them [B] labels, True for good.

    Raises:
        ValueError: as `demonstrations`; or a label that is neither true nor false.
    """
    batch = _batch(rows, formats.labelled, policy, max_tokens)
    return batch, torch.tensor([bool(p.columns["label"]) for p in batch.prompts], device=policy.device)


def logged(
    rows: Sequence[Mapping[str, Any]], policy: Policy, max_tokens: int | None = None
) -> tuple[Batch, Float[Tensor, "B"]]:
    """As `demonstrations`, of completions that were given a reward; with them [B] rewards, in reward units.

    Raises:
        ValueError: as `demonstrations`; or a reward that is missing or not a finite number.
    """
    batch = _batch(rows, formats.logged, policy, max_tokens)
    return batch, torch.tensor([float(p.columns["reward"]) for p in batch.prompts], device=policy.device)


def stepwise(
    rows: Sequence[Mapping[str, Any]], policy: Policy, max_tokens: int | None = None, separator: str = "\n"
) -> tuple[Batch, Float[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Answers in steps, each found right or wrong: the steps in order, then the end-of-text token.

    Args:
        max_tokens: longer answers are cut there; steps whose last token is cut off have no label.
        separator: written after every step but the last, and part of it: a step ends where the next one begins.

    Returns:
        The answers; 1 for right and 0 for wrong at the last token of each step, 0 elsewhere; and where those tokens
        are.

    Raises:
        ValueError: as `demonstrations`; or steps and labels that do not fit each other.
    """
    built = _Rows(policy, max_tokens)

    def one(row: Mapping[str, Any], index: int) -> list[tuple[int, int, bool]]:
        found = formats.stepwise(row, index)
        prompt = policy.prompt(found.prompt, index, found.columns)
        ends = built.add_steps(prompt, [*(step + separator for step in found.steps[:-1]), found.steps[-1]])
        return [(index, len(prompt.ids) + end, right) for end, right in zip(ends, found.labels, strict=True)]

    marks = _each(rows, one)
    batch = built.batch()
    label, where = torch.zeros(batch.tokens.shape, device=policy.device), torch.zeros_like(batch.action)
    for row_at, at, right in chain.from_iterable(marks):
        if at < int(batch.length[row_at]):
            label[row_at, at], where[row_at, at] = float(right), True
    return batch, label, where


def pairs(rows: Sequence[Mapping[str, Any]], policy: Policy, max_tokens: int | None = None) -> Pairs:
    """A preference a row, both responses ending in the end-of-text token; `margin` where the data has that column.

    A row whose `chosen` or `rejected` lists several texts is as many pairs: each chosen one was preferred to each rejected
    one. Their prompt is the same, so they stay on one side of a split.

    Args:
        max_tokens: longer responses are cut there, and then do not end.

    Raises:
        ValueError: as `demonstrations`.
    """
    chosen, rejected = _Rows(policy, max_tokens), _Rows(policy, max_tokens)

    def one(row: Mapping[str, Any], index: int) -> list[float]:
        several = formats.comparisons(row, index)
        for found in several:
            prompt = policy.prompt(found.prompt, index, found.columns)
            chosen.add(prompt, found.prompt, found.chosen)
            rejected.add(prompt, found.prompt, found.rejected)
        return [found.margin for found in several]

    margins = list(chain.from_iterable(_each(rows, one)))
    return Pairs(chosen.batch(), rejected.batch(), torch.tensor(margins, device=policy.device))


def distinct(pairs: Pairs) -> tuple[Pairs, int]:
    """The pairs whose sides differ, and how many had two equal sides: between equal responses nothing is preferred.

    Raises:
        ValueError: when no pair is left.
    """
    differ = (~alike(pairs)).nonzero()[:, 0].tolist()
    if not differ:
        cut = int((~pairs.chosen.ended & ~pairs.rejected.ended).sum())
        why = f" ({cut} of them were cut at max_tokens on both sides, and may differ after it)" if cut else ""
        raise ValueError(
            f"in all {len(pairs)} pairs chosen and rejected are the same response{why}: there is no preference to learn from"
        )
    return pairs.select(differ), len(pairs) - len(differ)


def alike(pairs: Pairs) -> Bool[Tensor, "B"]:
    """[B] where chosen and rejected are the same tokens: such a pair says nothing."""
    said = [[b.tokens[i][b.action[i]].tolist() for i in range(len(pairs))] for b in (pairs.chosen, pairs.rejected)]
    return torch.tensor([chosen == rejected for chosen, rejected in zip(*said, strict=True)], dtype=torch.bool)


def tell_cut(data: Batch | Pairs, max_tokens: int, say: Callable[[str], None]) -> None:
    """Say how many responses were cut, and so never show how to end, if any was."""
    sides = [data.chosen, data.rejected] if isinstance(data, Pairs) else [data]
    cut, of = sum(int((~b.ended).sum()) for b in sides), sum(len(b) for b in sides)
    if cut:
        say(
            f"{'warning: ' if cut >= _MANY_CUT * of else ''}{cut} of {of} responses ({cut / of:.1%}) were cut at "
            f"max_tokens={max_tokens}: nothing is learned from them about how to end; raise max_tokens to keep them whole"
        )


def _batch(
    rows: Sequence[Mapping[str, Any]],
    read: Callable[[Mapping[str, Any], int], Demonstration],
    policy: Policy,
    max_tokens: int | None,
) -> Batch:
    built = _Rows(policy, max_tokens)

    def one(row: Mapping[str, Any], index: int) -> None:
        found = read(row, index)
        if found.prompt is None:
            built.add_text(str(found.completion), index, found.columns)
        else:
            built.add(policy.prompt(found.prompt, index, found.columns), found.prompt, found.completion)

    _each(rows, one)
    return built.batch()


class _Rows:
    """Prompts and responses on their way into a batch."""

    def __init__(self, policy: Policy, max_tokens: int | None) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; a response needs room for at least 1 token")
        self.policy, self.max_tokens = policy, max_tokens
        self.prompts: list[Prompt] = []
        self.responses: list[list[int]] = []
        self.ended: list[bool] = []

    def add(self, prompt: Prompt, asked: Content, answer: Content) -> None:
        """Add a reply to a prompt."""
        if isinstance(answer, str):
            self._append(prompt, [*self._after(prompt, answer), self.policy.eos_ids[0]])
            return
        assert isinstance(asked, list), "formats gives a message for messages only"
        whole = self.policy.chat([*asked, *answer], f"row {prompt.row}")
        if not whole.startswith(prompt.text):
            raise ValueError(
                f"row {prompt.row}: the chat template of {self.policy.name} writes a conversation differently once "
                "it has a reply, so the reply's tokens cannot be told from the prompt's: give prompt and completion "
                "as text"
            )
        ids = self._after(prompt, whole[len(prompt.text) :])
        ends = [at for at, token in enumerate(ids) if token in self.policy.eos_ids]
        # What a template writes after the end (a newline, mostly) is no action: the episode is over.
        self._append(prompt, ids[: ends[-1] + 1] if ends else [*ids, self.policy.eos_ids[0]])

    def add_text(self, text: str, row: int, columns: Mapping[str, Any]) -> None:
        """Add plain text."""
        ids = list(self.policy.tokenizer(text)["input_ids"])
        if ids and ids[-1] in self.policy.eos_ids:  # some tokenizers add it by themselves
            ids = ids[:-1]
        first = ids[:1] or [self.policy.eos_ids[0]]
        self._append(
            Prompt(tuple(first), self.policy.decode(first), row, dict(columns)), [*ids[1:], self.policy.eos_ids[0]]
        )

    def add_steps(self, prompt: Prompt, steps: Sequence[str]) -> list[int]:
        """Add a reply written step by step; returns where in the reply each step's last token is."""
        ids: list[int] = []
        ends, text = [], ""
        for step in steps:
            so_far = Prompt((*prompt.ids, *ids), prompt.text + text, prompt.row)
            written = self._after(so_far, step)
            if not written:
                raise ValueError(f"row {prompt.row}: step {step!r} has no tokens to carry its label: drop the step")
            ids += written
            text += step
            ends.append(len(ids) - 1)
        self._append(prompt, [*ids, self.policy.eos_ids[0]])
        return ends

    def _after(self, prompt: Prompt, text: str) -> list[int]:
        """The tokens of a text after a prompt: as both are written together, if the prompt's tokens stay the same."""
        together = self.policy.encode(prompt.text + text)
        for whole in (together, [*self.policy.opening, *together]):
            if tuple(whole[: len(prompt.ids)]) == prompt.ids:
                return whole[len(prompt.ids) :]
        return self.policy.encode(text)

    def _append(self, prompt: Prompt, response: list[int]) -> None:
        ends = [at for at, token in enumerate(response[:-1]) if token in self.policy.eos_ids]
        if ends:
            raise ValueError(
                f"token {ends[0]} of the response of row {prompt.row} is an end-of-text token, and {len(response) - ends[0] - 1} "
                "more follow: no policy can go on after its end; cut the row there, or take the token out of its text"
            )
        whole = self.max_tokens is None or len(response) <= self.max_tokens
        kept = response if whole else response[: self.max_tokens]
        if len(prompt.ids) + len(kept) > self.policy.context:
            raise ValueError(
                f"row {prompt.row} has {len(prompt.ids)} prompt and {len(kept)} response tokens, the context of "
                f"{self.policy.name} is {self.policy.context}: set max_tokens to at most "
                f"{self.policy.context - len(prompt.ids)}, or drop the row"
            )
        self.prompts.append(prompt)
        self.responses.append(kept)
        self.ended.append(whole)

    def batch(self) -> Batch:
        texts = [self.policy.response_text(p.ids, r) for p, r in zip(self.prompts, self.responses, strict=True)]
        pad = self.policy.eos_ids[0]
        return Batch.build(self.prompts, self.responses, texts=texts, ended=self.ended, pad=pad).to(self.policy.device)


def _each(rows: Sequence[Mapping[str, Any]], use: Callable[[Mapping[str, Any], int], Made]) -> list[Made]:
    """What `use` makes of every row. The rows it refuses are told of together, so that they are taken out at once."""
    if not rows:
        raise ValueError("there are no rows: the data is empty, or a filter left nothing")
    made: list[Made] = []
    refused: list[int] = []
    first: ValueError | None = None
    for index, row in enumerate(rows):
        try:
            made.append(use(row, index))
        except ValueError as fault:
            first = first or fault
            refused.append(index)
            if len(refused) > index >= _ALL_WRONG:  # the wrong file or column: no need to read the rest
                break
    if first is None:
        return made
    if len(refused) == 1:
        raise first
    read = f"the {len(rows)} rows" if index + 1 == len(rows) else f"the first {index + 1} rows"
    more = ", ".join(map(str, refused[1 : _NAMED + 1])) + ", ..." * (len(refused) > _NAMED + 1)
    raise ValueError(f"{first} ({len(refused)} of {read} cannot be used; the others are {more})") from first


Part = TypeVar("Part", Batch, Pairs)


def split(data: Part, share: float, rng: torch.Generator, by_prompt: bool = False) -> tuple[Part, Part]:
    """Two disjoint parts at random, in the data's order: what is learned from, and the `share` that is held out.

    Pairs with the same prompt stay on one side, so that a held-out comparison never has its prompt in training.

    Args:
        by_prompt: do so with the rows of a batch too; `share` is then of the prompts.

    Raises:
        ValueError: a share outside (0, 1), or too few rows for two parts.
    """
    if not 0 < share < 1:
        raise ValueError(f"the held-out share is {share}; it must lie between 0 and 1, such as 0.05")
    keys = _keys(data, by_prompt)
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < 2:
        raise ValueError(
            f"{len(data)} rows with {len(distinct)} different prompts cannot be split in two: give more data"
        )
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    chosen = {distinct[i] for i in torch.randperm(len(distinct), generator=rng)[:count].tolist()}
    learned = [i for i, key in enumerate(keys) if key not in chosen]
    kept = [i for i, key in enumerate(keys) if key in chosen]
    return data.select(learned), data.select(kept)


def _keys(data: Batch | Pairs, by_prompt: bool) -> list[tuple[int, ...]]:
    """What stays together: pairs, by their prompt. Rows of text may share a one-token state, which is no leak."""
    if isinstance(data, Pairs):
        data, by_prompt = data.chosen, True
    return [p.ids for p in data.prompts] if by_prompt else [(i,) for i in range(len(data))]
