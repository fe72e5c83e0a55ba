"""Addition, a character at a time: `12+7=` is to be continued with `19`.

With one digit the tiny model learns it in a second; a verifier takes the place of a learned reward.
"""

from __future__ import annotations

import re

import torch

from tokenmdp.experts import Answering
from tokenmdp.models.policy import Policy
from tokenmdp.tasks import ExactAnswer, Task, data

_RANGE = re.compile(r"([1-9])(?:-([1-9]))?")


def load(policy: Policy, digits: str | int = "1-2", count: int = 2000, held_out: int = 200, seed: int = 0) -> Task:
    """Sums of two numbers with `digits` digits each.

    Args:
        digits: how many digits a number has, `2`, or between which bounds, `1-3`.
        count: sums to learn on; fewer where there are not so many.
        held_out: sums to judge on, none of them among those; at most a fifth of all.
        seed: which sums are which.

    Raises:
        ValueError: digits that are no range, or no sums asked for.
    """
    low, high = _bounds(digits)
    total = (high - low) ** 2
    if count < 1 or held_out < 0:
        raise ValueError(f"count is {count} and held_out is {held_out}; a task needs at least 1 and at least 0 sums")
    held_out = min(held_out, total // 5)
    rows = []
    for code in _different(min(count + held_out, total), total, seed):
        a, b = low + code // (high - low), low + code % (high - low)
        rows.append({"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)})
    prompts = data.prompts(rows, policy)
    return Task(
        name="addition",
        train=tuple(prompts[held_out:]),
        held_out=tuple(prompts[:held_out]),
        demonstrations=data.demonstrations(rows[held_out:], policy),
        reward=ExactAnswer(),
        expert=Answering(policy),
    )


def _bounds(digits: str | int) -> tuple[int, int]:
    """The least number, and one more than the greatest; a number of one digit may be 0."""
    found = _RANGE.fullmatch(str(digits))
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if least > most:
        raise ValueError(f"digits is {digits!r}; it must be a number from 1 to 9 or a range such as 1-2")
    return (0 if least == 1 else 10 ** (least - 1)), 10**most


def _different(count: int, total: int, seed: int) -> list[int]:
    """`count` different numbers below `total`, at random."""
    generator = torch.Generator().manual_seed(seed)
    if total <= 1 << 20:
        return torch.randperm(total, generator=generator)[:count].tolist()
    seen: dict[int, None] = {}
    while len(seen) < count:
        seen.update(dict.fromkeys(torch.randint(total, (count,), generator=generator).tolist()))
    return list(seen)[:count]
