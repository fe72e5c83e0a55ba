"""Credit assignment by name: which of a response's tokens earned its score. The equations are in `functional.credit`.

A scheme turns one outcome a row into a reward a token. Every on-policy recipe takes one as its `credit` setting, and
nothing else in a recipe changes with it:

    last       all on the last token: when the outcome is known
    uniform    the same on every token: what every other scheme must beat
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from tokenmdp.functional import credit
from tokenmdp.models.policy import Policy
from tokenmdp.types import Batch, Reward, Score


class Scheme(Protocol):
    """A way to assign credit.

    Attributes:
        name: what tables call it.
    """

    name: str

    def __call__(
        self, batch: Batch, score: Score, outcome: Float[Tensor, "B"], policy: Policy, rng: torch.Generator
    ) -> Float[Tensor, "B L"]:
        """Token rewards of a batch.

        Args:
            batch: responses that `policy` sampled.
            score: what the reward said of them.
            outcome: what there is to share out a row: the score, less a truncation's penalty or a baseline; 0 for a row
                without a verdict.
            policy: the current policy, for schemes that ask what it would have done from a prefix.
            rng: for schemes that sample.
        """
        ...


class Plain:
    """A scheme that needs the action mask and nothing else."""

    def __init__(self, name: str, equation: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.name, self.equation = name, equation

    def __call__(
        self, batch: Batch, score: Score, outcome: Tensor, policy: Policy, rng: torch.Generator
    ) -> Float[Tensor, "B L"]:
        if score.token is None:
            return self.equation(outcome, batch.action)
        # Rewards a token come as they are; only what the outcome adds to the score is shared out.
        return score.token + self.equation(outcome - score.value, batch.action)


PLAIN = {"last": credit.last, "uniform": credit.uniform}


def load(spec: str, reward: Reward, reference: Policy) -> Scheme:
    """The scheme called `spec`.

    Args:
        reward: the recipe's reward, for schemes that read it at prefixes.
        reference: the frozen start of the policy, for schemes that compare with it.

    Raises:
        ValueError: there is no such scheme, with a suggestion.
    """
    if spec in PLAIN:
        return Plain(spec, PLAIN[spec])
    near = difflib.get_close_matches(spec, PLAIN, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no credit scheme {spec!r}: {guess}a scheme is one of {', '.join(PLAIN)}")
