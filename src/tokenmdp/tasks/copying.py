"""Instructions that a character model can follow: `q>` asks for a response that begins with `q`, `ab>` with `ab`.

Every response of enough characters does what *some* instruction asks: that one can be written over the one it failed,
and the failure becomes a demonstration (the recipe `hindsight`). A random policy obeys one in about 98 to the power of
`length`, so a reward alone seldom speaks.
"""

from __future__ import annotations

import itertools
import string

import torch

from tokenmdp import mdp
from tokenmdp.experts import Answering
from tokenmdp.models.policy import Policy
from tokenmdp.tasks import Task, data
from tokenmdp.types import Batch, Score


class Begins:
    """1 where the response begins as its prompt asks, else 0.

    Args:
        length: characters an instruction asks for.
    """

    name = "copying"

    def __init__(self, length: int) -> None:
        self.length = length

    def satisfied(self, text: str) -> str | None:
        """The one instruction that a response satisfies; None for a response too short for any."""
        return f"{text[: self.length]}>" if len(text) >= self.length else None

    def __call__(self, batch: Batch) -> Score:
        """[B] 0 or 1."""
        mdp.touch("reward")
        right = [float(self.satisfied(t) == p.text) for t, p in zip(batch.texts, batch.prompts, strict=True)]
        return Score.of(torch.tensor(right, device=batch.tokens.device))


def load(policy: Policy, length: int = 1, letters: int = 26, held_out: int = 0, seed: int = 0) -> Task:
    """All instructions of `length` of the first `letters` of the alphabet.

    Args:
        held_out: instructions that are judged only, at most half of all. With none, those learned on are judged too.
        seed: which are held out.

    Raises:
        ValueError: a length, letters or held_out outside its range.
    """
    if not 1 <= letters <= 26 or not 1 <= length <= 3:
        raise ValueError(f"length is {length} and letters is {letters}; they are 1 to 3 and 1 to 26")
    asked = ["".join(word) for word in itertools.product(string.ascii_lowercase[:letters], repeat=length)]
    if not 0 <= held_out <= len(asked) // 2:
        raise ValueError(f"held_out is {held_out}; of {len(asked)} instructions it is 0 to {len(asked) // 2}")
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [{"prompt": f"{asked[i]}>", "completion": asked[i], "answer": asked[i]} for i in order]
    prompts = tuple(data.prompts(rows, policy))
    return Task(
        name="copying",
        train=prompts[held_out:],
        held_out=prompts[:held_out] or prompts,
        demonstrations=data.demonstrations(rows[held_out:], policy),
        reward=Begins(length),
        expert=Answering(policy),
    )
