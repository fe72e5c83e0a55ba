"""Heads on frozen embeddings: a reward fitted in seconds, on what a body has read once.

    linear      r(x) = w · x + b                                  a convex problem, solved to its optimum
    mlp         r(x) = v · gelu(W x + a) + b                       one hidden layer, AdamW
    boosted     r(x) = b + Σ_t leaf_t(x)                           gradient-boosted trees

Two objectives, for d = r(chosen) − r(rejected):

    bradley_terry    −log σ(d)                                     a pair is one observation
    classifier       −½ log σ(r_chosen) − ½ log σ(−r_rejected)     a side is one observation: good or bad?

Under Bradley-Terry σ(d) is the probability of the preference. The classifier's r is the log-odds that a side is chosen
over an average opponent, so its d orders pairs as well and is more cautious (see `functional.preference.both_sides`).

A head on disk is a table of numbers and its kind. Nothing that is read back can run code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tokenmdp.functional import preference
from tokenmdp.models import trees
from tokenmdp.models.trees import Trees

HEADS = ("linear", "mlp", "boosted")
OBJECTIVES = ("bradley_terry", "classifier")

HIDDEN, EPOCHS, ROWS, RATE, DECAY = 64, 6, 128, 3e-3, 0.1  # of the mlp
TREES, LEAVES, SHRINKAGE, LEAF_ROWS = 80, 8, 0.1, 40  # of the boosted head
NEWTON_STEPS, SOLVED = 100, 1e-9  # of the linear head: at most, and the mean gradient at which it is solved


class Head(Protocol):
    """A reward of embeddings."""

    kind: ClassVar[str]

    def score(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N"]: ...
    def arrays(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Linear:
    """r(x) = w · x + b.

    Attributes:
        weight: [D] w.
        bias: [1] b; under Bradley-Terry, where only differences count, that which puts the mean of all sides at 0.
    """

    weight: Float[Tensor, "D"]
    bias: Float[Tensor, "1"]
    kind: ClassVar[str] = "linear"

    def score(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """[N] scores."""
        return features @ self.weight.to(features) + self.bias.to(features)

    def arrays(self) -> dict[str, Tensor]:
        """The numbers that make it."""
        return {"weight": self.weight, "bias": self.bias}


@dataclass(frozen=True)
class MLP:
    """r(x) = v · gelu(W x + a) + b, with the scaling of the features folded into W and a.

    Attributes:
        inner, shift: [K, D] W and [K] a.
        outer, bias: [K] v and [1] b.
    """

    inner: Float[Tensor, "K D"]
    shift: Float[Tensor, "K"]
    outer: Float[Tensor, "K"]
    bias: Float[Tensor, "1"]
    kind: ClassVar[str] = "mlp"

    def score(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """[N] scores."""
        hidden = F.gelu(features @ self.inner.to(features).T + self.shift.to(features))
        return hidden @ self.outer.to(features) + self.bias.to(features)

    def arrays(self) -> dict[str, Tensor]:
        """The numbers that make it."""
        return {"inner": self.inner, "shift": self.shift, "outer": self.outer, "bias": self.bias}


def from_arrays(kind: str, arrays: Mapping[str, Tensor]) -> Head:
    """The head that `arrays()` describes.

    Raises:
        ValueError: another kind, an array too few or too many, a number that is not finite, or trees without an end.
    """
    known: dict[str, Callable[..., Any]] = {"linear": Linear, "mlp": MLP, "boosted": Trees}
    if kind not in known:
        raise ValueError(f"the head is of kind {kind!r}; there are {', '.join(known)}")
    for name, array in arrays.items():
        if array.is_floating_point() and not bool(torch.isfinite(array).all()):
            raise ValueError(f"{name} of the {kind} head holds a number that is not finite: fit the head again")
    try:
        made = known[kind](**arrays)
    except TypeError as error:
        raise ValueError(f"{', '.join(arrays)} are not the arrays of a {kind} head ({error})") from error
    if isinstance(made, Trees):
        every = torch.full((len(made.value),), (1 << made.value.shape[1]) - 1)
        for keeps in made.keeps.T:
            every &= keeps
        if bool((every == 0).any()) or bool((made.feature < 0).any()):
            raise ValueError("a row of the trees may end in no leaf: the file is damaged, fit it again")
    return made


# Fitting ---------------------------------------------------------------------------------------------------------------


def fit(
    chosen: Float[Tensor, "N D"],
    rejected: Float[Tensor, "N D"],
    head: str = "linear",
    objective: str = "bradley_terry",
    penalty: float = 1.0,
    seed: int = 0,
) -> Head:
    """The head that explains N preferences between embeddings.

    Features are scaled to unit variance first (and the scaling is folded into the head), so that what a body writes in
    large numbers counts no more than what it writes in small ones.

    Args:
        chosen, rejected: embeddings of the two sides; row i of `chosen` was preferred to row i of `rejected`.
        head: linear | mlp | boosted.
        objective: bradley_terry | classifier. Trees are fitted by the classifier whichever it is called: see `boosted`.
        penalty: of the linear head: one over the variance that the margin of a pair is thought to have before any label
            is seen, 1/nats². Larger is more cautious; it says the same whatever D is.
        seed: of the mlp's first weights and order; the other heads draw nothing.

    Raises:
        ValueError: shapes that differ, no pair, a number that is not finite, pairs whose sides are all equal, an unknown
            head or objective, or a penalty that is not positive.

    Source: Bradley & Terry 1952; Bishop 2006, eqs. 4.90 and 4.99 (Newton's method for logistic regression); trees:
        Friedman 2001, algorithm 5, as in scikit-learn's histogram gradient boosting.
    """
    _check(chosen, rejected, head, objective, penalty)
    x, y = chosen.detach().cpu().double(), rejected.detach().cpu().double()
    if head == "boosted":
        return boosted(x, y)
    both = torch.cat([x, y])
    mean, spread = both.mean(0), both.std(0, unbiased=False)
    spread = torch.where(spread > 1e-9 * (1 + mean.abs()), spread, torch.ones_like(spread))
    x, y = (x - mean) / spread, (y - mean) / spread
    if head == "linear":
        weight, bias = linear(x, y, objective, penalty)
        weight = weight / spread
        return Linear(weight.float(), (bias - weight @ mean).float().reshape(1))
    inner, shift, outer, bias = mlp(x.float(), y.float(), objective, seed)
    inner = inner.double() / spread
    return MLP(inner.float(), (shift - inner @ mean).float(), outer, bias)


def linear(
    chosen: Float[Tensor, "N D"], rejected: Float[Tensor, "N D"], objective: str, penalty: float
) -> tuple[Float[Tensor, "D"], Float[Tensor, ""]]:
    """The weight and bias of least loss with a ridge, by Newton's method.

        Σ_i softplus(−a_i · u) + ½ λ |w|²,     λ = penalty · mean_i |x_chosen,i − x_rejected,i|²

    with a_i = (difference, 0) and u = w for Bradley-Terry; for the classifier a_i = ±(side, 1), u = (w, b), each side
    counting one half, and b is free. Under the prior that λ stands for a margin has variance 1 / penalty.
    """
    difference = chosen - rejected
    ridge = penalty * float(difference.square().sum(1).mean())
    D = difference.shape[1]
    if objective == "bradley_terry":
        weight = _newton(difference, torch.ones(len(difference)).double(), torch.full((D,), ridge).double())
        return weight, torch.zeros(()).double()
    one = torch.ones((len(chosen), 1), dtype=chosen.dtype)
    sides = torch.cat([torch.cat([chosen, one], 1), -torch.cat([rejected, one], 1)])
    penalties = torch.full((D + 1,), ridge, dtype=chosen.dtype)
    penalties[-1] = 1e-6 * ridge + 1e-9  # free, but for what keeps the system solvable
    solved = _newton(sides, torch.full((len(sides),), 0.5).double(), penalties)
    return solved[:-1], solved[-1]


def _newton(rows: Float[Tensor, "M K"], weight: Float[Tensor, "M"], ridge: Float[Tensor, "K"]) -> Float[Tensor, "K"]:
    """argmin_u Σ_i weight_i softplus(−rows_i · u) + ½ Σ_k ridge_k u_k²: Newton's steps, halved until they descend."""

    def value(u: Tensor) -> float:
        return float((weight * F.softplus(-(rows @ u))).sum() + 0.5 * (ridge * u * u).sum())

    u = torch.zeros(rows.shape[1], dtype=rows.dtype)
    now = value(u)
    for _ in range(NEWTON_STEPS):
        wrong = torch.sigmoid(-(rows @ u))
        gradient = ridge * u - rows.T @ (weight * wrong)
        if float(gradient.abs().max()) <= SOLVED * float(weight.sum()):
            break
        hessian = (rows * (weight * wrong * (1 - wrong))[:, None]).T @ rows
        hessian.diagonal().add_(ridge)
        step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
        size = 1.0
        while (then := value(u - size * step)) > now and size > 1e-9:
            size /= 2
        if size <= 1e-9:  # nothing is left but rounding
            break
        u, now = u - size * step, then
    return u


def mlp(
    chosen: Float[Tensor, "N D"], rejected: Float[Tensor, "N D"], objective: str, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, a, v and b of one hidden layer after a few passes of AdamW in random order; v starts at zero."""
    N, D = chosen.shape
    rng = torch.Generator().manual_seed(seed)
    inner = (torch.randn((HIDDEN, D), generator=rng) / D**0.5).requires_grad_()
    shift, outer, bias = (torch.zeros(size, requires_grad=True) for size in (HIDDEN, HIDDEN, 1))
    weights = [inner, shift, outer, bias]
    steps = EPOCHS * -(-N // ROWS)
    optimiser = torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY, fused=True)
    fall = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda taken: 1 - taken / steps)
    loss = preference.bradley_terry if objective == "bradley_terry" else preference.both_sides
    for _ in range(EPOCHS):
        for rows in torch.randperm(N, generator=rng).split(ROWS):
            x = torch.cat([chosen[rows], rejected[rows]])
            score = F.gelu(x @ inner.T + shift) @ outer + bias
            first, second = score.split(len(rows))
            optimiser.zero_grad(set_to_none=True)
            loss(first, second).mean().backward()
            optimiser.step()
            fall.step()
    found = [weight.detach() for weight in weights]
    if (
        objective == "bradley_terry"
    ):  # the loss leaves b where it is: put the mean of all sides at 0, as the linear head
        mean = F.gelu(torch.cat([chosen, rejected]) @ found[0].T + found[1]) @ found[2]
        found[3] = -mean.mean().reshape(1)
    return found[0], found[1], found[2], found[3]


def boosted(chosen: Float[Tensor, "N D"], rejected: Float[Tensor, "N D"]) -> Trees:
    """Gradient-boosted trees on single sides: a side was chosen or rejected.

    The library that grows the trees knows losses of rows, not of pairs (see `models.trees`).
    """
    x = torch.cat([chosen, rejected]).numpy()
    y = np.repeat([1, 0], [len(chosen), len(rejected)])
    return trees.grow(
        x,
        y,
        max_iter=TREES,
        max_leaf_nodes=LEAVES,
        learning_rate=SHRINKAGE,
        min_samples_leaf=min(LEAF_ROWS, max(1, len(x) // 10)),
        l2_regularization=1.0,
        random_state=0,
    )


def _check(chosen: Tensor, rejected: Tensor, head: str, objective: str, penalty: float) -> None:
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; it must be one of {', '.join(OBJECTIVES)}")
    if not 0 < penalty < float("inf"):
        raise ValueError(f"penalty is {penalty}; it must be positive and finite, such as 1")
    if chosen.ndim != 2 or chosen.shape != rejected.shape or 0 in chosen.shape:
        raise ValueError(
            f"chosen has shape {tuple(chosen.shape)} and rejected {tuple(rejected.shape)}: both must be [pairs, width], "
            "with some of each"
        )
    for name, x in (("chosen", chosen), ("rejected", rejected)):
        bad = (~torch.isfinite(x)).any(1).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(f"the embedding of {name} is not finite in rows {bad[:8]}: embed these texts again")
    if bool((chosen == rejected).all()):
        raise ValueError(
            f"in all {len(chosen)} pairs both sides have the same embedding: there is no preference to learn from; "
            "embed the whole row, or look whether chosen and rejected differ at all"
        )
