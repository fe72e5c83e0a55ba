"""Several rewards as one: their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenmdp.functional import credit
from tokenmdp.types import Batch, Reward, Score


class Mixture:
    """Judges a batch by a weighted sum of rewards.

        score = Σ_k w_k · score_k

    A response has a verdict only if every part gave one. Where some part gives rewards a token, the others' scores join
    them on the last action token, so nothing is lost. What parts say of steps is summed with the same weights, apart from
    the score, as it is in the parts.

    Args:
        parts: weight (reward units of the mixture, one of the part's) and reward of each part.
        name: for logs; the sum as written if not given.

    Raises:
        ValueError: there is no part, or a weight is not finite.
    """

    def __init__(self, parts: Sequence[tuple[float, Reward]], name: str | None = None) -> None:
        if not parts:
            raise ValueError("a mixture of no rewards judges nothing; give at least one (weight, reward)")
        bad = [f"{reward.name}: {weight}" for weight, reward in parts if not math.isfinite(weight)]
        if bad:
            raise ValueError(f"the weight of a reward must be a finite number, got {', '.join(bad)}")
        self.weighted = tuple((float(weight), reward) for weight, reward in parts)
        self.names = _apart([reward.name for _, reward in parts])
        self.name = name or " + ".join(f"{w:g}*{n}" for (w, _), n in zip(self.weighted, self.names, strict=True))

    def __call__(self, batch: Batch) -> Score:
        """Scores of a batch, with what each part said in `parts`."""
        scores = [reward(batch) for _, reward in self.weighted]
        parts = dict(zip(self.names, scores, strict=True))
        reasons = {row: f"{name}: {why}" for name, part in parts.items() for row, why in part.reasons.items()}
        weights = [weight for weight, _ in self.weighted]
        verdict = torch.stack([score.verdict for score in scores]).all(0)
        value = sum((w * s.value for w, s in zip(weights, scores, strict=True)), torch.zeros_like(scores[0].value))
        value = torch.where(verdict, value, torch.zeros_like(value))
        token = steps = None
        if any(score.token is not None for score in scores):
            token = _sum(weights, [_by_token(score, batch) for score in scores], verdict)
        said = [(w, score.steps) for w, score in zip(weights, scores, strict=True) if score.steps is not None]
        if said:
            steps = _sum([w for w, _ in said], [p for _, p in said], verdict)
        return Score(value, verdict, token, parts, reasons, steps)


def _sum(weights: Sequence[float], parts: Sequence[Tensor], verdict: Tensor) -> Tensor:
    """[B, L] the weighted sum, 0 in rows without a verdict."""
    total = sum((w * part for w, part in zip(weights, parts, strict=True)), torch.zeros_like(parts[0]))
    return torch.where(verdict[:, None], total, torch.zeros_like(total))


def _by_token(score: Score, batch: Batch) -> Tensor:
    """[B, L] a part's token rewards; a score without them stands on the last action token."""
    return credit.last(score.value, batch.action) if score.token is None else score.token


def _apart(names: Sequence[str]) -> list[str]:
    """Names told apart where two are equal: a, a → a, a_2."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return out
