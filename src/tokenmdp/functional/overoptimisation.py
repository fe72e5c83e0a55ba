"""How the true reward rises and falls as a proxy of it is optimised: the two published functional forms, and their fit.

    best of n    R(d) = d (α − β d)
    RL           R(d) = d (α − β log d),        d = √KL(π ‖ π_init),  R(0) = 0

R is the gain of the gold reward over the initial policy, d how far optimisation went. α says how much the first steps
gain, β how fast that is lost again. Both forms are linear in α and β, so the fit is one least-squares problem, and a
bootstrap solves thousands of them at once.

Source: Gao, Schulman and Hilton 2023 ("Scaling laws for reward model overoptimization"), section 1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Form = Literal["best_of_n", "rl"]
FORMS: tuple[Form, ...] = ("best_of_n", "rl")


class Fit(NamedTuple):
    """A fitted form.

    Attributes:
        alpha: [*S] gold reward units per √nat.
        beta: [*S] gold reward units per nat (best of n), or per √nat (RL).
        r_squared: [*S] share of the variance of R about its mean over the points; below 0 where a constant fits better.
        peak: [*S] the d at which the form is highest; infinite where it never turns, 0 where it falls from the start.
    """

    alpha: Tensor
    beta: Tensor
    r_squared: Tensor
    peak: Tensor


def gain(
    d: Float[Tensor, "*#S"], alpha: float | Float[Tensor, "*#S"], beta: float | Float[Tensor, "*#S"], form: Form
) -> Float[Tensor, "*S"]:
    """R(d) by one of the two forms; 0 at d = 0, where d log d has its limit. The shapes are broadcast.

    Raises:
        ValueError: another form, or a negative d.
    """
    first, second = _terms(d, form)
    return alpha * first + beta * second


def fit(d: Float[Tensor, "K"], gains: Float[Tensor, "*S K"], form: Form) -> Fit:
    """α and β of least squared error, of one curve of K points or of many over the same distances.

        (α, β) = argmin Σ_k ( R(d_k) − gain_k )²,      R² = 1 − Σ (R(d_k) − gain_k)² / Σ (gain_k − mean gain)²

    Args:
        d: distances √KL, in √nats; a point at 0 says nothing of α and β but counts in R².
        gains: gold reward less that of the initial policy at each distance.

    Raises:
        ValueError: fewer than two different positive distances, a negative one, a value that is not finite, gains that
            do not vary, or another form.

    Differs: Gao et al. leave small d out of some fits; here the points given are the points fitted.
    """
    if d.ndim != 1 or gains.shape[-1] != len(d):
        raise ValueError(f"{tuple(d.shape)} distances and {tuple(gains.shape)} gains: one gain a distance, points last")
    if not (bool(torch.isfinite(d).all()) and bool(torch.isfinite(gains).all())):
        raise ValueError("a distance or a gain is not finite: leave that point out, and say so")
    d, gains = d.double(), gains.double()
    if len(torch.unique(d[d > 0])) < 2:
        raise ValueError(f"{d.tolist()}: two unknowns need at least two different distances above 0")
    about_mean = ((gains - gains.mean(-1, keepdim=True)) ** 2).sum(-1)
    if bool((about_mean == 0).any()):
        raise ValueError("all gains of a curve are equal: there is no rise or fall for the form to explain")
    terms = torch.stack(_terms(d, form), -1)
    solved = torch.linalg.lstsq(terms, gains.reshape(-1, len(d)).T).solution
    alpha, beta = solved.view(2, *gains.shape[:-1])
    error = ((alpha[..., None] * terms[:, 0] + beta[..., None] * terms[:, 1] - gains) ** 2).sum(-1)
    return Fit(alpha, beta, 1 - error / about_mean, peak(alpha, beta, form))


def peak(alpha: Float[Tensor, "*S"], beta: Float[Tensor, "*S"], form: Form) -> Float[Tensor, "*S"]:
    """The distance at which the form is highest.

        best of n:  α / (2β)        RL:  exp(α/β − 1)

    Infinite where β ≤ 0 and it never turns; 0 for best of n with α ≤ 0 < β, and with α ≤ 0 = β.
    """
    _check(form)
    turns = beta > 0
    safe = torch.where(turns, beta, torch.ones_like(beta))
    top = (alpha / (2 * safe)).clamp(min=0) if form == "best_of_n" else (alpha / safe - 1).exp()
    flat = torch.where((alpha <= 0) & (beta == 0), 0.0, torch.inf).to(top.dtype)
    return torch.where(turns, top, flat)


def _terms(d: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """What α and β multiply."""
    _check(form)
    if bool((d < 0).any()):
        raise ValueError(f"the distance {float(d.min()):g} is negative; it is the root of a KL divergence")
    if form == "best_of_n":
        return d, -d * d
    return d, -d * torch.where(d > 0, d, torch.ones_like(d)).log()


def _check(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
