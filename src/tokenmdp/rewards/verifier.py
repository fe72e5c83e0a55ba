"""A verifier for word problems: 1 where the response's number is the right one, else 0; exact arithmetic, no model.

The score reads only what follows the thinking, so it cannot reward how the thinking looks; whatever is written there,
the reward is the same. Which number of the rest is the answer, and how numbers are read, is in `numerals`.
"""

from __future__ import annotations

import math

import torch

from tokenmdp import mdp
from tokenmdp.rewards import numerals
from tokenmdp.types import Batch, Prompt, Score

THINK = ("<think>", "</think>")


def after_thinking(text: str, delimiters: tuple[str, str] = THINK, prompt: str = "") -> str | None:
    """What a response says after its thinking; None where the thinking is never closed, so that nothing was said.

    What follows the last closing delimiter counts, the whole response if it has neither delimiter. A prompt that ends
    with the opening one (some chat templates write it) has begun the thinking already.

    Args:
        text: the response.
        delimiters: what opens and what closes the thinking. With an empty opening one every response begins by
            thinking: it says nothing until the closing one.
        prompt: what the response follows.
    """
    opening, closing = delimiters
    _, closed, rest = text.rpartition(closing)
    begun = opening == "" or prompt.rstrip().endswith(opening)
    if not closed and begun:
        return None
    return None if opening and opening in rest else rest


class NumericVerifier:
    """1 where the number that a response gives after its thinking equals the one in the prompt's `column`, else 0.

    A refusal, no number at all and thinking without an end score 0: they are wrong answers. A prompt whose column holds
    no number gives no verdict. So does one whose column holds an expression (`2\\sqrt{3}`) or 0x1F: see `numerals`.

        right  ⇔  |said − answer| ≤ tolerance · |answer|        in rational arithmetic

    Args:
        tolerance: relative; the default makes up for answers stored as floating-point numbers (1.8333333333333335) and
            for nothing else: 1.83 is not 11/6.
        think: what opens and what closes the thinking (see `after_thinking`).
        column: where a prompt's row holds the answer: a number, or text such as `18`, `3/4` or GSM8K's `... #### 18`.
        name: for logs.

    Raises:
        ValueError: a tolerance outside [0, 1), or no closing delimiter.
    """

    def __init__(
        self,
        tolerance: float = 1e-9,
        think: tuple[str, str] = THINK,
        column: str = "answer",
        name: str = "numeric",
    ) -> None:
        if not (math.isfinite(tolerance) and 0 <= tolerance < 1):
            raise ValueError(f"tolerance is {tolerance}; it is a share of the answer, at least 0 and below 1")
        if not think[1]:
            raise ValueError("the thinking needs a closing delimiter, such as </think>; what follows it is scored")
        self.tolerance, self.think, self.column, self.name = tolerance, think, column, name

    def __call__(self, batch: Batch) -> Score:
        """[B] 0 or 1.

        Raises:
            ValueError: no row of the batch has a value in `column`: nothing could ever be learned from it.
        """
        mdp.touch("reward")
        if all(prompt.columns.get(self.column) is None for prompt in batch.prompts):
            names = dict.fromkeys(name for prompt in batch.prompts for name in prompt.columns)
            raise ValueError(
                f"no row of the batch ({len(batch)} rows) has a value in the column {self.column!r} that the verifier "
                f"{self.name} reads the right answer from; the columns are: {', '.join(names) or 'none'}. Give the answers "
                "there, or name their column: --reward numeric:column=NAME"
            )
        judged = [self.judge(prompt, text) for prompt, text in zip(batch.prompts, batch.texts, strict=True)]
        device = batch.tokens.device
        value = torch.tensor([float(right or False) for right in judged], device=device)
        return Score(value, torch.tensor([right is not None for right in judged], device=device))

    def judge(self, prompt: Prompt, text: str) -> bool | None:
        """Whether one response is right; None where the prompt's answer is unknown."""
        right = numerals.known(prompt.columns.get(self.column))
        if right is None:
            return None
        rest = after_thinking(text, self.think, prompt.text)
        said = None if rest is None else numerals.answer(rest)
        return said is not None and numerals.same(said, right, self.tolerance)
