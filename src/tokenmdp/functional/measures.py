"""What a recipe reports of a batch besides what it minimises. Metrics are computed here once, and tested like losses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from tokenmdp.types import Batch, Score


class Sums:
    """Running sums by name, which a checkpoint can hold: for means over more rows than are looked at at a time."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def add(self, **values: float) -> None:
        """Add to the sums of these names."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def mean(self, name: str, count: str) -> float | None:
        """One sum over another; None where nothing was counted: that is no 0."""
        return self.sums[name] / self.sums[count] if self.sums.get(count) else None

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def scalars(self) -> dict[str, Any]:
        return {"sums": self.sums}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.sums = dict(scalars["sums"])


def mean(value: Float[Tensor, "B"], rows: Bool[Tensor, "B"]) -> float:
    """The mean over the rows that count, as a rule those with a verdict; 0 where none does."""
    return float(value[rows].mean()) if bool(rows.any()) else 0.0


def average(updates: Sequence[Mapping[str, float]], name: str, over: str = "") -> float:
    """The mean of a metric over a phase's updates, each divided by its `over` where that is given; 0 without updates."""
    return sum(m[name] / (m[over] if over else 1.0) for m in updates) / max(1, len(updates))


def responses(b: Batch, score: Score) -> dict[str, float]:
    """Lengths, truncation, variety, missing verdicts, and the mean of every part of a mixed reward over its verdicts.

    Returns:
        `completions/mean_length` (tokens), `completions/clipped_ratio` (share of responses that did not end by
        themselves), `completions/distinct_across` (see `distinct_across`), `num_tokens` (response tokens sampled),
        `no_verdict` (rows), and `rewards/NAME` a part.
    """
    return {
        "completions/mean_length": float(b.action.sum(-1).float().mean()),
        "completions/clipped_ratio": float((~b.ended).float().mean()),
        "completions/distinct_across": distinct_across(b),
        "num_tokens": float(b.action.sum()),
        "no_verdict": float((~score.verdict).sum()),
        **{f"rewards/{_plain(name)}": mean(part.value, part.verdict) for name, part in score.parts.items()},
    }


def distinct_across(b: Batch) -> float:
    """Different pairs of neighbouring tokens / pairs, over the first response to each prompt: 1 is no repetition.

    Responses to one prompt may well agree, where it has one right answer; those to different prompts that do are a policy
    that says one thing to everything. 0 where no response has two tokens.

    Source: Li et al. 2016 (distinct-n), section 5.1. Differs: one response a prompt.
    """
    first = {int(group): row for row, group in reversed(list(enumerate(b.group.tolist())))}
    said = [b.tokens[row][b.action[row]].tolist() for row in first.values()]
    pairs = [pair for tokens in said for pair in itertools.pairwise(tokens)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def sampler_difference(b: Batch, logp: Float[Tensor, "B L"]) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the learner's on the same tokens, nats.

        |log π(a_t | s_t) − log μ(a_t | s_t)|, mean and maximum over actions

    Args:
        logp: the learner's log-probabilities under the weights, and at the temperature, that sampled.

    Returns:
        Nothing for a batch that nobody here sampled.
    """
    if b.logp_mu is None:
        return {}
    difference = (logp - b.logp_mu).abs()[b.action]
    return {
        "sampling/sampling_logp_difference/mean": float(difference.mean()),
        "sampling/sampling_logp_difference/max": float(difference.max()),
    }


def explained_variance(value: Float[Tensor, "*S"], return_: Float[Tensor, "*S"], weight: Float[Tensor, "*S"]) -> float:
    """How much of the returns a critic foresees: 1 is all, 0 is no better than a constant, below 0 is worse.

    1 − Var(R − V) / Var(R), under the weights; 0 where nothing counts or all returns are equal
    """
    total = float(weight.sum())
    if total == 0:
        return 0.0

    def variance(x: Tensor) -> float:
        centre = (weight * x).sum() / total
        return float((weight * (x - centre) ** 2).sum() / total)

    spread = variance(return_)
    return 1 - variance(return_ - value) / spread if spread > 0 else 0.0


def _plain(name: str) -> str:
    """A reward's name as part of a metric's: lower case, anything else than letters and digits an underscore."""
    return "_".join("".join(c if c.isascii() and c.isalnum() else " " for c in name.lower()).split()) or "part"
