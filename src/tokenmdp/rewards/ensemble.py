"""Several rewards of the same thing as one: their mean, their minimum, or their mean less a price for disagreement.

    mean                   r̄ = 1/K Σ_k r_k                           errors that differ average out
    min                    min_k r_k                                 worst case: good only where every member says so
    mean - λ·variance      r̄ − λ · 1/K Σ_k (r_k − r̄)²                disagreement costs, λ in 1/reward units

A single learned reward is highest where it is wrong in the policy's favour, so optimising it finds its errors. Members
fitted from other seeds or other pairs are wrong elsewhere; where they disagree, none of them is to be trusted.

A minimum and a variance compare members, so these must speak one unit: learned members are normalised (mean 0, variance
1 over the same samples) by `Ensemble.normalise` or by what trained them, and one that is not is refused. A task's
reward, a classifier or a function is taken in the units its author gave it.

Source: Coste et al. 2023, "Reward model ensembles help mitigate overoptimization": mean, worst-case and uncertainty-
weighted optimisation. Differs: any reward may be a member.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tokenmdp.types import Batch, Reward, Score

RULES = ("mean", "min")


@runtime_checkable
class Normalised(Protocol):
    """A learned reward, whose unit means nothing until it is fixed: score = (raw − shift) / scale."""

    shift: float
    scale: float

    def normalise(self, batch: Batch) -> None: ...


def combine(scores: Float[Tensor, "K B"], rule: str = "mean", penalty: float = 0.0) -> Float[Tensor, "B"]:
    """[B] what K members' scores come to, by the equations above.

    Args:
        rule: "mean", from which `penalty` times the members' variance is taken, or "min".
        penalty: λ ≥ 0, in 1/reward units; "min" has none.

    Raises:
        ValueError: another rule, a negative or infinite penalty, or a penalty with "min".

    Source: Coste et al. 2023, section 3. Differs: none; the variance is that of the K members, divided by K.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}")
    if not (math.isfinite(penalty) and penalty >= 0) or (rule == "min" and penalty):
        raise ValueError(
            f"penalty={penalty} with rule={rule}: it is the price of a unit of variance, at least 0 and finite, and "
            "only the mean pays one"
        )
    if rule == "min":
        return scores.amin(0)
    return scores.mean(0) - penalty * scores.var(0, unbiased=False)


class Ensemble:
    """Judges a batch by what several rewards make of it together.

    A response has a verdict only where every member gave one: a minimum over those that happened to answer would be
    higher where the strictest is silent. Members' token rewards are theirs alone (a minimum of sums is no sum of
    minima): the ensemble's score stands on the whole response, and `parts` has what each member said.

    Args:
        members: at least two.
        rule, penalty: see `combine`.
        name: for logs; the ensemble as it is written if not given.

    Raises:
        ValueError: fewer than two members, members that read tokens of different tokenizers, or what `combine` raises.
    """

    def __init__(
        self, members: Sequence[Reward], rule: str = "mean", penalty: float = 0.0, name: str | None = None
    ) -> None:
        if len(members) < 2:
            raise ValueError(
                f"an ensemble of {len(members)}: one opinion has neither a spread nor a minimum; give at least two "
                "members, or use the reward itself"
            )
        combine(torch.zeros(2, 1), rule, penalty)  # refuses a bad rule now, not after the first rollout
        _one_tokenizer(members)
        self.members, self.rule, self.penalty = tuple(members), rule, float(penalty)
        names = [member.name for member in members]
        self.names = names if len(set(names)) == len(names) else [f"{n}_{k}" for k, n in enumerate(names, 1)]
        spelled = f"mean - {penalty:g}*variance" if penalty else rule
        self.name = name or f"{spelled}({', '.join(self.names)})"

    def __call__(self, batch: Batch) -> Score:
        """Scores of a batch, with what each member said in `parts`.

        Raises:
            ValueError: a learned member was never normalised.
        """
        raw = [n for n, m in zip(self.names, self.members, strict=True) if _raw(m)]
        if raw:
            raise ValueError(
                f"{', '.join(raw)} of the ensemble {self.name} was never normalised (shift 0, scale 1), so its unit is "
                "arbitrary beside the others': call `normalise` with samples of the policy the members are to judge"
            )
        scores = [member(batch) for member in self.members]
        parts = dict(zip(self.names, scores, strict=True))
        reasons = {row: f"{name}: {why}" for name, part in parts.items() for row, why in part.reasons.items()}
        verdict = torch.stack([score.verdict for score in scores]).all(0)
        value = combine(torch.stack([score.value for score in scores]), self.rule, self.penalty)
        return Score(torch.where(verdict, value, torch.zeros_like(value)), verdict, None, parts, reasons)

    def normalise(self, batch: Batch) -> None:
        """Give every learned member mean 0 and variance 1 over this batch, such as samples of the initial policy.

        Members keep that when they are saved, so an ensemble needs no file of its own.
        """
        for member in self.members:
            if isinstance(member, Normalised | Ensemble):
                member.normalise(batch)


def _raw(member: Reward) -> bool:
    """Whether this is a learned reward whose unit nobody fixed."""
    return isinstance(member, Normalised) and (member.shift, member.scale) == (0.0, 1.0)


def _one_tokenizer(members: Sequence[Reward]) -> None:
    """Raises where two members read token ids and do not mean the same by them."""
    known = [(m.name, t.get_vocab()) for m in members if (t := getattr(m, "tokenizer", None)) is not None]
    for name, vocabulary in known[1:]:
        if vocabulary != known[0][1]:
            raise ValueError(
                f"the members {known[0][0]} and {name} have different tokenizers, but a batch has one kind of token ids: "
                "train them on one body, or wrap one as a text reward (file.py:function)"
            )
