"""Reversal, a character at a time: `abc>` is to be continued with `cba`.

Needs attention to every position of the prompt, so a model cannot guess it from the last characters; the verifier is
exact.
"""

from __future__ import annotations

import string

import torch

from tokenmdp.experts import Answering
from tokenmdp.models.policy import Policy
from tokenmdp.tasks import ExactAnswer, Task, data


def load(
    policy: Policy, length: int = 4, letters: int = 10, count: int = 2000, held_out: int = 200, seed: int = 0
) -> Task:
    """Random words of `length` characters from the first `letters` of the alphabet.

    Args:
        count: words to learn on; fewer where there are not so many.
        held_out: words to judge on, none of them among those; at most a fifth of all.

    Raises:
        ValueError: a length or an alphabet of none, or no words asked for.
    """
    if length < 1 or not 1 <= letters <= 26:
        raise ValueError(
            f"length is {length} and letters is {letters}; a word has at least 1 character, of 1 to 26 letters"
        )
    total = letters**length
    if count < 1 or held_out < 0:
        raise ValueError(f"count is {count} and held_out is {held_out}; a task needs at least 1 and at least 0 words")
    held_out = min(held_out, total // 5)
    generator = torch.Generator().manual_seed(seed)
    words: dict[str, None] = {}
    while len(words) < min(count + held_out, total):
        drawn = torch.randint(letters, (count + held_out, length), generator=generator).tolist()
        words.update(dict.fromkeys("".join(string.ascii_lowercase[i] for i in word) for word in drawn))
    chosen = list(words)[: count + held_out]
    rows = [{"prompt": f"{word}>", "completion": word[::-1], "answer": word[::-1]} for word in chosen]
    prompts = data.prompts(rows, policy)
    return Task(
        name="reversal",
        train=tuple(prompts[held_out:]),
        held_out=tuple(prompts[:held_out]),
        demonstrations=data.demonstrations(rows[held_out:], policy),
        reward=ExactAnswer(),
        expert=Answering(policy),
    )
