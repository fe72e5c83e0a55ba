"""The procedural tasks of the `reasoning-gym` package, by name, each judged by its own scorer.

    tokenmdp grpo --task reasoning_gym:basic_arithmetic

The package is an extra: `pip install "tokenmdp[tasks]"`. An answer counts as right where the scorer gives 0.99 or more,
and what it reads is what follows the thinking. The scorers are the package's: some of them (`countdown` is one) compute what
the answer says, by means that a malicious answer could abuse; they run in a process of their own, which is no sandbox.

Source: Stojanovski et al. 2025 ("Reasoning Gym").
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tokenmdp.models.policy import Policy
from tokenmdp.rewards import gym
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.rewards.verifier import THINK, after_thinking
from tokenmdp.tasks import Task, data
from tokenmdp.types import Batch, Score

TEMPLATE = "Question: {question}\nAnswer:"


class GymReward:
    """1 where the scorer of the question's task calls the answer right, else 0.

    Thinking without an end and empty answers score 0. A scorer that fails, or takes longer than the limit, gives no
    verdict for that answer.

    Args:
        think: what opens and what closes the thinking (see `verifier.after_thinking`).
        timeout_seconds: the limit of an answer (see `function.FunctionReward`).
    """

    name = "reasoning_gym"

    def __init__(self, think: tuple[str, str] = THINK, timeout_seconds: float = 10.0) -> None:
        self.think, self.timeout_seconds = think, timeout_seconds

    @functools.cached_property
    def scorer(self) -> FunctionReward:
        """The process that scores, started when the first answer is there."""
        return FunctionReward(f"{gym.__file__}:judge", self.name, self.timeout_seconds)

    def __call__(self, batch: Batch) -> Score:
        """[B] 0 or 1."""
        said = (after_thinking(text, self.think, p.text) for text, p in zip(batch.texts, batch.prompts, strict=True))
        return self.scorer(replace(batch, texts=tuple(text or "" for text in said)))


def load(
    policy: Policy,
    name: str = "basic_arithmetic",
    count: int = 500,
    held_out: int = 100,
    seed: int = 0,
    template: str = TEMPLATE,
    settings: Mapping[str, Any] | None = None,
) -> Task:
    """One of the package's tasks in the tokens of `policy`.

    Args:
        name: of the task.
        count: questions to learn on; fewer where the task repeats itself.
        held_out: questions to judge on, all different and none of them among those.
        seed: which questions are made.
        template: the prompt; the question stands where it says {question}.
        settings: further arguments of the task's data set, such as `{"max_digits": 2}`; plain numbers, text and lists.

    Raises:
        ImportError: the package is not installed.
        ValueError: no such task or setting, sizes out of range, or a task that makes too few different questions.
    """
    if count < 1 or held_out < 0 or "{question}" not in template:
        raise ValueError(
            f"count is {count}, held_out {held_out}, template {template!r}: at least 1, at least 0, and with a {{question}}"
        )
    source = {"name": name, "size": count + held_out, "seed": seed, "settings": dict(settings or {})}
    entries = _entries(source)
    distinct: dict[str, int] = {}
    for index, entry in enumerate(entries):
        distinct.setdefault(" ".join(str(entry["question"]).split()), index)
    if len(distinct) <= held_out:
        raise ValueError(
            f"{name} made {len(distinct)} different questions of {count + held_out}: hold out fewer than {held_out}"
        )
    rows = [
        {
            "prompt": template.replace("{question}", str(entries[i]["question"])),
            "completion": f" {entries[i]['answer']}",
            "answer": str(entries[i]["answer"]),
            "gym": {**source, "entry": i},
            "gym_question": entries[i]["question"],
        }
        for i in distinct.values()
    ]
    prompts = data.prompts([{k: v for k, v in row.items() if k != "completion"} for row in rows], policy)
    known = [row for row in rows[held_out:] if entries[row["gym"]["entry"]]["answer"]]
    return Task(
        name=name,
        train=tuple(prompts[held_out:]),
        held_out=tuple(prompts[:held_out]),
        demonstrations=data.demonstrations(known, policy) if known else None,
        reward=GymReward(),
        facts={"questions": len(distinct), "repeated": len(entries) - len(distinct)},
    )


def _entries(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All entries of a data set: question, answer, metadata."""
    try:
        known = sorted(importlib.import_module("reasoning_gym.factory").DATASETS)
    except ImportError as error:
        raise ImportError(
            f"the task reasoning_gym needs a package that cannot be imported ({error}): "
            'pip install "tokenmdp[tasks]", or pip install reasoning-gym'
        ) from error
    name = source["name"]
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        raise ValueError(
            f"reasoning-gym has no task {name!r}{f'; did you mean {near[0]}?' if near else ''} It has {', '.join(known)}"
        )
    try:
        made = gym.dataset(name, source["size"], source["seed"], json.dumps(source["settings"], sort_keys=True))
    except (TypeError, AssertionError) as error:  # how its data classes refuse a setting
        raise ValueError(f"reasoning-gym's {name} does not take {source['settings']}: {error}") from error
    return [made[i] for i in range(source["size"])]
