"""A bonus for what a policy did not say before: few counts, much novelty.

    bonus(y) = 1/|y|ₙ Σ_g 1 / √(1 + N(g)),    g the different n-grams of y, |y|ₙ how many places for one y has

N counts n-grams in a *fixed* corpus, best what the initial policy says. A reward in this library is a function of its
row alone; counts that grew while training would change the score of a response from phase to phase, with the rows
beside it and with a resume. The price: the bonus does not fade as the policy comes to say the new things. It says "be
unlike the start", not "go where you have not been"; for the second fit it again between two runs. An n-gram counts
once in a response, so that repeating one new phrase earns nothing more.

    reward="sentiment + 0.1*novelty:runs/best-of-n/samples.jsonl"

Source: the bonus 1/√N: Strehl & Littman 2008 (MBIE-EB), eq. 6; on counts of what resembles a state Bellemare et al.
2016. Differs: a fixed corpus, n-grams of tokens, a mean over the response.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from tokenmdp.models.policy import Policy
from tokenmdp.tasks import files
from tokenmdp.types import Batch, Score

Gram = tuple[int, ...]


class Novelty:
    """The bonus against the counts of a corpus; make one with `fit` or `load`.

    Args:
        counts: how often the corpus has each n-gram.
        n: tokens of an n-gram; 0 takes a whole response as one.
        end: tokens that are no part of a response, such as the end of the text: the corpus is counted without them.

    Raises:
        ValueError: n is negative.
    """

    def __init__(self, counts: Mapping[Gram, int], n: int = 2, name: str = "novelty", end: Sequence[int] = ()) -> None:
        if n < 0:
            raise ValueError(f"n={n}: an n-gram has at least 1 token; 0 takes the whole response as one")
        self.counts, self.n, self.name, self.end = Counter(counts), n, name, frozenset(end)

    @staticmethod
    def fit(batch: Batch, n: int = 2, end: Sequence[int] = ()) -> Novelty:
        """Count the responses of a batch, such as samples of the initial policy.

        Args:
            end: tokens to leave out, such as the end of the text.
        """
        kept = [[t for t in tokens if t not in end] for tokens in responses(batch)]
        return Novelty(Counter(g for tokens in kept for g in grams(tokens, n)), n, end=end)

    @staticmethod
    def load(path: Path | str, policy: Policy, n: int = 2) -> Novelty:
        """Count the responses in a file: its column `text` (as in a run's samples.jsonl) or `completion`.

        Raises:
            ValueError: a row has neither, or what `files.rows` raises.
        """
        counts: Counter[Gram] = Counter()
        for index, row in enumerate(files.rows(path)):
            text = row.get("text", row.get("completion"))
            if not isinstance(text, str):
                raise ValueError(
                    f"row {index} of {path} has no text; its columns are {', '.join(row)}: a corpus has `text` or "
                    "`completion`"
                )
            counts.update(grams(policy.encode(text), n))
        return Novelty(counts, n, end=policy.eos_ids)

    def bonus(self, tokens: Sequence[int]) -> float:
        """Of one response, in (0, 1]: 1 if nothing of it was ever said."""
        places = grams(tokens, self.n)
        return sum(1 / math.sqrt(1 + self.counts[g]) for g in dict.fromkeys(places)) / len(places)

    def __call__(self, batch: Batch) -> Score:
        """[B] the bonus of each response; one that says nothing has no verdict."""
        said = [[t for t in tokens if t not in self.end] for tokens in responses(batch)]
        found = [self.bonus(tokens) if tokens else math.nan for tokens in said]
        return Score.of(torch.tensor(found, device=batch.tokens.device))


def responses(batch: Batch) -> list[list[int]]:
    """The chosen tokens of each row."""
    return [tokens[chosen].tolist() for tokens, chosen in zip(batch.tokens, batch.action, strict=True)]


def grams(tokens: Iterable[int], n: int) -> list[Gram]:
    """The n-grams in order; a response shorter than n, or any for n = 0, is one gram. Nothing has none."""
    own = tuple(tokens)
    if not own:
        return []
    if n == 0 or len(own) < n:
        return [own]
    return [own[i : i + n] for i in range(len(own) - n + 1)]
