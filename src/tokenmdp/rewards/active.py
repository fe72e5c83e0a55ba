"""Which pairs to have labelled next: those that tell a Bradley–Terry model with linear scores the most.

    P(first preferred) = σ(θᵀ x),   x = φ(first) − φ(second)           the model, φ being features of a response
    Λ(S) = ridge · I + Σ_{i ∈ S} p_i (1 − p_i) x_i x_iᵀ                Fisher information and prior: [D, D]

    d_optimal       adds to S, one by one, the pair with the largest log det Λ(S ∪ i) − log det Λ(S)
    uncertain       the pairs whose margin |θᵀ x| is smallest: the model does not know
    disagreement    the pairs on whose probability the members of an ensemble differ most
    at_random       what every one of them has to beat

D-optimality asks for the smallest volume of the posterior ellipsoid of θ: pairs that look in directions nothing was
asked about yet. It sees the features, not the noise of the labels in them; where the features that vary most are not
those that matter for the reward, it can lose to chance. That is measured in docs/labels.md, not assumed.

Source: Bayesian D-optimal design: Chaloner & Verdinelli 1995, section 2.2, in the logistic model section 4; for
preferences Das et al. 2024 (active preference optimisation) and Shen et al. 2025 (D-optimal design at the last layer).
Differs: greedy over a pool of pairs, no pair twice; the information of what was labelled already counts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1.0


def information(
    x: Float[Tensor, "N D"], margin: Float[Tensor, "N"] | None = None, ridge: float = RIDGE
) -> Float[Tensor, "D D"]:
    """Λ, the precision of θ after labels on these pairs: Laplace's approximation at the margins given.

        Λ = ridge · I + Σ_i σ(m_i) σ(−m_i) x_i x_iᵀ

    Args:
        x: features of the first side less those of the second; N may be 0.
        margin: m = θᵀx at the present θ; None for θ = 0, where every label has the weight ¼.
        ridge: precision of the prior N(0, I / ridge); positive, so that fewer pairs than directions (or pairs that are
            all alike) leave Λ invertible.

    Raises:
        ValueError: shapes that do not fit, a number that is not finite, or a ridge that is not positive.
    """
    rows = _weighted(x, margin)
    if not ridge > 0:
        raise ValueError(
            f"ridge={ridge}: without a prior Λ is singular until D directions were asked about; give it > 0"
        )
    return ridge * torch.eye(x.shape[1], dtype=rows.dtype, device=rows.device) + rows.T @ rows


def d_optimal(
    x: Float[Tensor, "N D"],
    count: int,
    margin: Float[Tensor, "N"] | None = None,
    known: Float[Tensor, "M D"] | None = None,
    known_margin: Float[Tensor, "M"] | None = None,
    ridge: float = RIDGE,
) -> list[int]:
    """`count` different pairs of the pool, chosen greedily for log det Λ.

    By the determinant lemma the gain of a pair with v = √(p(1−p)) · x is

        log det(Λ + v vᵀ) − log det Λ = log(1 + vᵀ Λ⁻¹ v)

    so one number a pair, h = vᵀ Λ⁻¹ v, ranks the pool. After a pick u = Λ⁻¹ v the Sherman–Morrison formula gives

        Λ⁻¹ ← Λ⁻¹ − u uᵀ / (1 + h_pick),     h_i ← h_i − (v_iᵀ u)² / (1 + h_pick)

    which costs D² + N·D a pick. Ties go to the pair that comes first: shuffle the pool if its order means anything. In a
    pool whose pairs are all alike every choice is as good as another, and the first are taken.

    Args:
        x: the pool, features of first side less second.
        margin: θᵀx of the pool at the present θ; None for θ = 0.
        known, known_margin: the same of the pairs labelled before.
        ridge: as in `information`.

    Returns:
        Rows of `x` in the order they were picked.

    Raises:
        ValueError: `count` outside 0..N, or what `information` raises.

    Source: greedy maximisation of a submodular gain: Nemhauser et al. 1978 (within 1 − 1/e of the best set).
    """
    rows = _weighted(x, margin)
    _enough(len(rows), count)
    inverse = torch.linalg.inv(information(x[:0] if known is None else known, known_margin, ridge))
    gain = ((rows @ inverse) * rows).sum(1)
    picked: list[int] = []
    for _ in range(count):
        best = int(gain.argmax())
        picked.append(best)
        u, scale = inverse @ rows[best], 1 + gain[best].clone()
        inverse -= torch.outer(u, u) / scale
        gain -= (rows @ u).square() / scale
        gain[best] = -torch.inf
    return picked


def uncertain(margin: Float[Tensor, "N"], count: int) -> list[int]:
    """The `count` pairs whose margin is nearest to 0, where P(first preferred) is nearest to ½; ties by order.

    Raises:
        ValueError: `count` outside 0..N, or a margin that is not finite.
    """
    _finite(margin, "margin")
    _enough(len(margin), count)
    return torch.argsort(margin.abs(), stable=True)[:count].tolist()


def disagreement(margins: Float[Tensor, "K N"], count: int) -> list[int]:
    """The `count` pairs on which K members differ most: the spread of σ(m_k), in probability; ties by order.

    In probability and not in margin: members that say 5 and 9 agree on the label.

    Raises:
        ValueError: fewer than two members, `count` outside 0..N, or a margin that is not finite.
    """
    _finite(margins, "margins")
    if len(margins) < 2:
        raise ValueError(f"{len(margins)} member: disagreement takes at least two")
    _enough(margins.shape[1], count)
    spread = torch.sigmoid(margins).var(0, unbiased=False)
    return torch.argsort(spread, descending=True, stable=True)[:count].tolist()


def at_random(size: int, count: int, rng: torch.Generator) -> list[int]:
    """`count` different ones of `size` pairs.

    Raises:
        ValueError: `count` outside 0..size.
    """
    _enough(size, count)
    return torch.randperm(size, generator=rng)[:count].tolist()


def _weighted(x: Tensor, margin: Tensor | None) -> Tensor:
    """[N, D] √(p(1−p)) x in double precision: thousands of rank-one updates follow."""
    if x.ndim != 2 or (margin is not None and margin.shape != x.shape[:1]):
        raise ValueError(
            f"features of shape {tuple(x.shape)} and margins {None if margin is None else tuple(margin.shape)}: give "
            "[pairs, features] and one margin a pair"
        )
    _finite(x, "features")
    if margin is None:
        return 0.5 * x.double()
    _finite(margin, "margin")
    p = torch.sigmoid(margin.double())
    return (p * (1 - p)).sqrt()[:, None] * x.double()


def _finite(x: Tensor, name: str) -> None:
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{bad} of {x.numel()} {name} are not finite: leave out responses without a verdict")


def _enough(size: int, count: int) -> None:
    if not 0 <= count <= size:
        raise ValueError(f"{count} pairs asked for of {size}, none twice: ask for 0 to {size}")
