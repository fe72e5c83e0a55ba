"""New prompts: proposed by a model or by recombination, ranked by Υ, kept if a small paid check agrees.

    added(p) = E_q [ max(0, Υ(q, p) − max_a Υ(q, a)) ]      what a prompt would add to the best choice among those there are
    kept       if the 95 % interval of E_q [ r(q, p) − r(q, a*) ] on freshly paid trials of 8 questions or more lies above 0

Υ has never seen a trial of the new prompt: it extrapolates from what prompts have in common, and errs on the side that was
picked for being high. Hence the check, paired by query with the best constant prompt a*.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.prompting import intervals, leaks
from tokenmdp.prompting.choose import Chooser
from tokenmdp.prompting.log import name_of
from tokenmdp.stats import FEW, Interval

LONGEST, SHOWN = 300, 6  # characters of a proposal, and prompts a model is shown
_PIECES = re.compile(r"(?<=[.!?:;,])\s+")


@dataclass(frozen=True)
class Proposal:
    """A prompt that might be used.

    Attributes:
        added: reward units by which Υ says it would raise the best choice.
        expected: the mean of Υ over the queries.
    """

    prompt_id: str
    prompt: str
    added: float
    expected: float


def recombined(prompts: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """New prompts from clauses of known ones: the beginning of one, the end of another; none that is there already."""
    split = [_PIECES.split(p.strip()) for p in prompts]
    made: dict[str, None] = {}
    for _ in range(20 * count):
        first, second = (split[i] for i in rng.integers(len(split), size=2))
        head, tail = rng.integers(1, len(first) + 1), rng.integers(len(second))
        text = " ".join([*first[:head], *second[tail:]]).strip()
        if text not in prompts and len(text) <= LONGEST and len({*first[:head]} & {*second[tail:]}) == 0:
            made[text] = None
        if len(made) == count:
            break
    return list(made)


def proposed(policy: Policy, prompts: Sequence[str], count: int, rng: torch.Generator, tokens: int = 40) -> list[str]:
    """New prompts by a model that goes on with a list of known ones; none that is there already, fewer where it repeats."""
    made: dict[str, None] = {}
    for _ in range(4):
        order = torch.randperm(len(prompts), generator=rng)[:SHOWN].tolist()
        text = "Instructions that help to solve problems:\n" + "".join(f"- {prompts[i].strip()}\n" for i in order) + "-"
        b = policy.sample([policy.prompt(text)], count, Sampling(tokens), rng)
        for answer in b.texts:
            line = answer.strip().splitlines()[0].strip(" -*\t") if answer.strip() else ""
            if 8 <= len(line) <= LONGEST and line not in prompts:
                made[line] = None
        if len(made) >= count:
            break
    return list(made)[:count]


def ranked(chooser: Chooser, queries: Sequence[str], texts: Sequence[str]) -> list[Proposal]:
    """The proposals, best first by what they would add on these queries."""
    if not texts:
        return []
    there = chooser.value(queries).max(1)
    new = chooser.proxy.predict(queries, list(texts))
    added = np.maximum(new - there[:, None], 0.0).mean(0)
    found = [
        Proposal(f"new-{name_of(text)[:6]}", text, float(a), float(e))
        for text, a, e in zip(texts, added, new.mean(0), strict=True)
    ]
    return sorted(found, key=lambda p: (-p.added, -p.expected))


def checked(trials: Iterable[Mapping[str, Any]], prompt_id: str, constant_id: str, seed: int = 0) -> Interval | None:
    """What a prompt gained over the constant one in freshly paid trials, paired by query; None where fewer than
    `stats.FEW` questions have trials of both.

    Args:
        trials: rows with query, query_id, prompt_id and reward.
    """
    reward: dict[str, dict[str, float]] = {prompt_id: {}, constant_id: {}}
    queries: dict[str, str] = {}
    for row in trials:
        if row["prompt_id"] in reward:
            queries[row["query_id"]] = row["query"]
            reward[row["prompt_id"]][row["query_id"]] = float(row["reward"])
    both = [name for name in queries if all(name in of for of in reward.values())]
    group = leaks.groups([queries[name] for name in both])
    if len(np.unique(group)) < FEW:
        return None
    difference = np.asarray([reward[prompt_id][name] - reward[constant_id][name] for name in both])
    return intervals.grouped_mean(difference, group, seed=seed, least=-1.0)
