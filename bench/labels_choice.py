"""What `labels.py` and `labels_toy.py` share: a pool of pairs, labels that cost, choices of what to have labelled, and the
reward that follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenmdp import stats
from tokenmdp.ledger import Ledger
from tokenmdp.rewards import active, embedding_head
from tokenmdp.rewards.embedding_head import Head

CHOICES = ("random", "uncertain", "disagreement", "d_optimal")
MEMBERS = 5  # heads of the ensemble whose disagreement is asked
PENALTY = 1.0  # of the linear heads, see `embedding_head.fit`
SHARPNESS = 3.0  # β of the labels: P(first preferred) = σ(β (gold₁ − gold₂)), as in the demo


@dataclass(frozen=True)
class Pool:
    """Pairs that could be labelled.

    Attributes:
        features: [N, D] of the responses.
        gold: [N] their gold scores, which only labels may see.
        pairs: [M, 2] the two responses of each pair.
        luck: [M] uniform numbers that decide each pair's noisy label, so that every way to choose gets the same label
            for the same pair.
    """

    features: Float[Tensor, "N D"]
    gold: Float[Tensor, "N"]
    pairs: Int[Tensor, "M 2"]
    luck: Float[Tensor, "M"]

    @staticmethod
    def of(features: Tensor, gold: Tensor, samples: int, rng: torch.Generator, share: float = 1.0) -> Pool:
        """All pairs of responses to one prompt, of a random share of the prompts; rows are `samples` a prompt."""
        prompts = len(gold) // samples
        taken = torch.randperm(prompts, generator=rng)[: max(1, round(share * prompts))].tolist()
        rows = [[p * samples + i, p * samples + j] for p in taken for i, j in combinations(range(samples), 2)]
        order = torch.randperm(len(rows), generator=rng)
        return Pool(features, gold, torch.tensor(rows)[order], torch.rand(len(rows), generator=rng))

    def label(self, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The preferred and the other response of each pair, by a noisy label."""
        first, second = self.pairs[list(which)].T
        sure = torch.sigmoid(SHARPNESS * (self.gold[first] - self.gold[second]))
        wins = self.luck[list(which)] < sure
        return torch.where(wins, first, second), torch.where(wins, second, first)


def buy(pool: Pool, choice: str, budgets: Sequence[int], rng: torch.Generator) -> Iterator[tuple[Ledger, Head, Tensor]]:
    """Label pairs up to each budget in turn, choosing by all that was learned so far.

    Yields, at each budget: the ledger, the head fitted to all labels so far, and [b, 2] the rows (preferred, other).
    """
    ledger = Ledger(labels=budgets[-1])
    # As `embedding_head.fit` sees them: unit variance, and the ridge that its penalty stands for.
    scaled = pool.features.double() / pool.features.double().std(0).clamp_min(1e-9)
    x = scaled[pool.pairs[:, 0]] - scaled[pool.pairs[:, 1]]
    ridge = PENALTY * float(x.square().sum(1).mean())
    picked: list[int] = []
    heads: list[Head] = []
    for budget in budgets:
        count = budget - len(picked)
        taken = set(picked)
        rest = torch.tensor([i for i in range(len(x)) if i not in taken])
        scores = torch.stack([head.score(pool.features) for head in heads]) if heads else None
        margins = None if scores is None else (scores[:, pool.pairs[:, 0]] - scores[:, pool.pairs[:, 1]]).double()
        if choice == "d_optimal":
            now = None if margins is None else margins[0]
            rows = active.d_optimal(
                x[rest],
                count,
                None if now is None else now[rest],
                known=x[picked],
                known_margin=None if now is None else now[picked],
                ridge=ridge,
            )
        elif margins is None or choice == "random":
            rows = active.at_random(len(rest), count, rng)
        elif choice == "uncertain":
            rows = active.uncertain(margins[0][rest], count)
        else:
            rows = active.disagreement(margins[1:, rest], count)
        ledger.pay("labels", count)
        picked += rest[rows].tolist()
        chosen, rejected = pool.label(picked)
        heads = [fit(pool.features, chosen, rejected)]
        for _ in range(MEMBERS if choice == "disagreement" else 0):
            again = torch.randint(len(picked), (len(picked),), generator=rng)
            heads.append(fit(pool.features, chosen[again], rejected[again]))
        yield ledger, heads[0], torch.stack([chosen, rejected], 1)


def fit(features: Tensor, chosen: Tensor, rejected: Tensor) -> Head:
    """The linear Bradley-Terry head."""
    return embedding_head.fit(features[chosen], features[rejected], "linear", "bradley_terry", PENALTY)


def interval(values: Any) -> dict[str, float | None]:
    """Mean and 95 % interval; without one where there is nothing to resample."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return {"mean": float(x.mean()), "low": None, "high": None}
    return {k: float(v) for k, v in stats.bootstrap_mean(x)._asdict().items()}


def versus(ours: Any, theirs: Any) -> dict[str, Any]:
    """The difference of two arms [seeds, prompts], paired by both; it holds where both intervals lie above 0.

    One interval resamples seeds (other labels, other pools), one prompts (other questions): a difference that only one of
    them allows is no finding.
    """
    d = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    seeds, prompts = interval(d.mean(1)), interval(d.mean(0))
    lows = [found["low"] for found in (seeds, prompts)]
    highs = [found["high"] for found in (seeds, prompts)]
    return {
        "mean": float(d.mean()),
        "over_seeds": [seeds["low"], seeds["high"]],
        "over_prompts": [prompts["low"], prompts["high"]],
        "holds": all(low is not None and low > 0 for low in lows),
        "opposite": all(high is not None and high < 0 for high in highs),
    }
