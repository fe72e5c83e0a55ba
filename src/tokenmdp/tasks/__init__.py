"""Tasks: where episodes start, and what is known about the right answer.

A task is a file in this folder with a function `load(policy, **options) -> Task`; the command line finds it by its
name. A path or a hub id is the task `prompts` on that source. What follows a colon is the task's first option:
`addition:1-3`, `arithmetic:problems.jsonl`, `reasoning_gym:countdown`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from tokenmdp import mdp
from tokenmdp.experts import Expert
from tokenmdp.models.policy import Policy
from tokenmdp.rewards.verifier import after_thinking
from tokenmdp.types import Batch, Prompt, Reward, Score

_NOT_TASKS = {"__init__", "data", "files", "formats"}
Item = TypeVar("Item")


@dataclass(frozen=True)
class Task:
    """Initial states and what judges the responses to them.

    Attributes:
        name: what tables call it.
        train: prompts to learn on.
        held_out: prompts to judge on; none of them is in `train`, but where a task has so few that it judges on what it
            gives to learn on: `learned` tells.
        demonstrations: what a demonstrator did, where the task has one.
        reward: the true reward, where the task knows it.
        expert: who knows what to do in any state, where the task has one to ask.
        facts: figures worth printing, such as the accuracy of a gold reward.
    """

    name: str
    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...] = ()
    demonstrations: Batch | None = None
    reward: Reward | None = None
    expert: Expert | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError(
                f"the task {self.name} has no prompts to learn on: its data is empty or all of it is held out"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.ids) for prompt in (*self.train, *self.held_out))

    def draw(self, k: int, rng: torch.Generator) -> list[Prompt]:
        """`k` different training prompts at random; `rng` alone decides which.

        Raises:
            ValueError: k is below 1, or more than there are.
        """
        if not 1 <= k <= len(self.train):
            raise ValueError(
                f"asked for {k} prompts of the task {self.name}, which has {len(self.train)}: ask for 1 to "
                f"{len(self.train)}"
            )
        return [self.train[i] for i in torch.randperm(len(self.train), generator=rng)[:k].tolist()]

    def learned(self, prompts: Sequence[Prompt]) -> int:
        """How many of the prompts are, by their tokens, among those to learn on: what is right there may be learned by heart."""
        known = {p.ids for p in self.train}
        return sum(p.ids in known for p in prompts)

    def first(self, k: int, say: Callable[[str], None]) -> list[Prompt]:
        """The first `k` prompts there are, those held out before those to learn on; where some of the latter are among
        them, that is said.
        """
        kept = {p.ids for p in self.held_out}
        asked = [*self.held_out, *(p for p in self.train if p.ids not in kept)][:k]
        if seen := self.learned(asked):
            say(f"{seen} of the {len(asked)} prompts are among those that {self.name} gives to learn on")
        return asked


class ExactAnswer:
    """1 where the response, after any thinking and stripped of surrounding space, is the prompt's `answer` column, else 0."""

    name = "exact_answer"

    def __call__(self, batch: Batch) -> Score:
        """[B] 0 or 1; a prompt without an answer gives no verdict."""
        mdp.touch("reward")
        answers = [p.columns.get("answer") for p in batch.prompts]
        said = [after_thinking(text, prompt=p.text) for text, p in zip(batch.texts, batch.prompts, strict=True)]
        right = [float(x is not None and x.strip() == str(answer)) for x, answer in zip(said, answers, strict=True)]
        verdict = torch.tensor([answer is not None for answer in answers], device=batch.tokens.device)
        return Score(torch.where(verdict, torch.tensor(right, device=batch.tokens.device), 0.0), verdict)


def once(items: Iterable[Item], key: Callable[[Item], Hashable]) -> Iterator[Item]:
    """The first item of each key: what is judged is there once, since every judge takes its rows as independent."""
    seen = set[Hashable]()
    for item in items:
        if (own := key(item)) not in seen:
            seen.add(own)
            yield item


def names() -> list[str]:
    """The tasks there are."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _NOT_TASKS)


def load(spec: str | Path, policy: Policy, **options: Any) -> Task:
    """The task called `spec`, or the prompts in the file or hub data set `spec`, in the tokens of `policy`.

    Args:
        spec: a task's name, `name:value` with a value for its first option, or a source of prompts.
        options: of the task.

    Raises:
        ValueError: no such task or file, or an option the task does not have, each with a suggestion; or what the task
            itself raises.
    """
    name, colon, first = str(spec).partition(":")
    if name in names():
        module = importlib.import_module(f"{__name__}.{name}")
    elif Path(spec).expanduser().exists() or "/" in str(spec) or "." in str(spec):
        module = importlib.import_module(f"{__name__}.prompts")
        options = {"source": spec, **options}
    else:
        near = difflib.get_close_matches(name, names(), n=1)
        guess = f"did you mean {near[0] + colon + first}? " if near else ""
        raise ValueError(
            f"there is no task {str(spec)!r}: {guess}a task is one of {', '.join(names())}, a data file or a hub id "
            "owner/name"
        )
    known = [option for option in inspect.signature(module.load).parameters if option != "policy"]
    if name in names() and colon:
        options = {known[0]: int(first) if first.isdecimal() else first, **options}
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"the task {spec} has no option {option!r}: {guess}it has {', '.join(known)}")
    task = module.load(policy, **options)
    assert isinstance(task, Task)
    return task
