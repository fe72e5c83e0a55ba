"""Kullback-Leibler divergences between token distributions: exact over the vocabulary, or estimated from chosen tokens.

    KL(p ‖ q) = Σ_a p(a) log( p(a) / q(a) )       in nats

Two directions, and they are different things. With π the policy and ref the reference,

    reverse   KL(π ‖ ref)   what RLHF penalises; π avoids what ref finds unlikely (mode-seeking)
    forward   KL(ref ‖ π)   what imitation minimises; π covers what ref finds likely (mass-covering)

Names say the direction, the estimator, and who drew the tokens: no suffix means that π drew them, `_off` that another
policy μ did and the token is reweighted by π/μ. All are per token and unreduced. Where `logp` and `logp_ref` are zero
(outside the action mask) every estimator is zero.

A value and a loss are different uses. As a *value* (a penalty taken off the reward, a metric) k1 and k3 are unbiased.
As a *loss* to differentiate, on tokens that π drew and with their distribution held fixed, what comes out is, in
expectation

    ∇ reverse_k1  →  0                      no signal at all
    ∇ reverse_k2  →  ∇ KL(π ‖ ref)          the reverse gradient, although its value is biased
    ∇ reverse_k3  →  ∇ KL(ref ‖ π)          the gradient of the other direction
    ∇ reverse_k1_off, ∇ reverse_k3_off  →  ∇ KL(π ‖ ref), also where μ = π

of the divergence at the states that were visited; how π moves the states themselves is the business of a reward
penalty.

Sources: Schulman 2020, "Approximating KL Divergence" (k1, k2, k3; unnumbered); for the gradients Tang & Munos 2025,
"On a few pitfalls in KL divergence gradient estimation for RL". The tests show each line above against enumeration.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def exact(logits_p: Float[Tensor, "*S V"], logits_q: Float[Tensor, "*S V"]) -> Float[Tensor, "*S"]:
    """The divergence itself, summed over the vocabulary.

        KL(p ‖ q) = Σ_a p(a) (log p(a) − log q(a)),   p = softmax(logits_p), q = softmax(logits_q)

    Args:
        logits_p, logits_q: unnormalised log-probabilities over V tokens; −inf excludes a token.

    Returns:
        Nats. Differentiable in both. +inf where p can choose a token that q excludes: that is its value.

    Source: Cover & Thomas 2006, eq. 2.26.
    """
    logp, logq = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
    p = logp.exp()
    # 0 log 0 = 0: what p cannot choose contributes nothing, however q treats it (−inf − −inf would be NaN)
    possible = p > 0
    zero = torch.zeros_like(p)
    return (p * (torch.where(possible, logp, zero) - torch.where(possible, logq, zero))).sum(-1)


def forward_exact(logits: Float[Tensor, "*S V"], logits_ref: Float[Tensor, "*S V"]) -> Float[Tensor, "*S"]:
    """The exact divergence in the direction of imitation, with the policy still named first.

        KL(ref ‖ π) = Σ_a ref(a) (log ref(a) − log π(a))

    Returns:
        Nats; see `exact`.
    """
    return exact(logits_ref, logits)


def reverse_k1(logp: Float[Tensor, "*S"], logp_ref: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """The plain estimate of KL(π ‖ ref) from tokens that π drew: unbiased, often negative, noisy.

        k1 = log π(a) − log ref(a)

    E[k1] = KL(π ‖ ref) exactly. Its variance shrinks only as fast as the divergence itself when π comes close to ref.
    Summed over a response it is log π(y) − log ref(y), whose expectation is the divergence of whole responses. As a
    loss its expected gradient is 0.

    Args:
        logp: log-probability (nats) of the chosen tokens under π.
        logp_ref: the same under ref.

    Source: Schulman 2020, k1. As a penalty on the reward: Ziegler et al. 2019, eq. 2.
    """
    return logp - logp_ref


def reverse_k2(logp: Float[Tensor, "*S"], logp_ref: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Half the squared log-ratio from tokens that π drew: never negative, biased as a value, right as a loss.

        k2 = ½ (log π(a) − log ref(a))²

    For ref = π exp(δ f) / Z the bias E[k2] − KL(π ‖ ref) is of order δ³, the divergence being of order δ². As a loss,
    its expected gradient is ∇KL(π ‖ ref) at the visited states, exactly.

    Args:
        logp: log-probability (nats) of the chosen tokens under π.
        logp_ref: the same under ref.

    Source: Schulman 2020, k2.
    """
    return 0.5 * (logp - logp_ref).square()


def reverse_k3(logp: Float[Tensor, "*S"], logp_ref: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """The estimate of KL(π ‖ ref) that is both unbiased and never negative, from tokens that π drew.

        k3 = r − 1 − log r,   r = ref(a) / π(a)

    E[k3] = KL(π ‖ ref) exactly wherever ref's support lies in π's. Close to ref its variance is of order δ⁴ against
    k1's δ²; far from ref, where π rarely draws what ref likes, r is huge at times and the variance is larger than
    k1's. As a loss, its expected gradient is that of the other direction, ∇KL(ref ‖ π).

    Args:
        logp: log-probability (nats) of the chosen tokens under π.
        logp_ref: the same under ref.

    Source: Schulman 2020, k3; Shao et al. 2024, eq. 4.
    """
    log_ratio = logp_ref - logp
    return torch.expm1(bounded(log_ratio)) - log_ratio


def reverse_k1_off(
    logp: Float[Tensor, "*S"], logp_ref: Float[Tensor, "*S"], logp_mu: Float[Tensor, "*S"]
) -> Float[Tensor, "*S"]:
    """k1 for tokens that another policy μ drew: an unbiased estimate of KL(π ‖ ref) at the states μ visited.

        ρ (log π(a) − log ref(a)),   ρ = π(a) / μ(a)

    Unbiased wherever π's support lies in μ's (top-k and top-p sampling breaks that: give untruncated samples, or read
    the result as conditional on them). Differentiable through ρ: its expected gradient is ∇KL(π ‖ ref) at those
    states, also where μ = π.

    Args:
        logp: log-probability (nats) of the chosen tokens under π.
        logp_ref: the same under ref.
        logp_mu: the same under the distribution that was sampled.

    Source: Schulman 2020, k1, with a token's importance weight (Tang & Munos 2025).
    """
    return _ratio(logp, logp_mu) * reverse_k1(logp, logp_ref)


def reverse_k3_off(
    logp: Float[Tensor, "*S"], logp_ref: Float[Tensor, "*S"], logp_mu: Float[Tensor, "*S"]
) -> Float[Tensor, "*S"]:
    """k3 for tokens that another policy μ drew: unbiased for KL(π ‖ ref) at the states μ visited, never negative.

        ρ (r − 1 − log r),   ρ = π(a) / μ(a),  r = ref(a) / π(a)

    Unbiased wherever the supports of π and ref lie in μ's. Differentiable through ρ: its expected gradient is ∇KL(π ‖
    ref) at those states, also where μ = π, which `reverse_k3` alone does not give.

    Args:
        logp: log-probability (nats) of the chosen tokens under π.
        logp_ref: the same under ref.
        logp_mu: the same under the distribution that was sampled.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2), eq. 7.
    """
    return _ratio(logp, logp_mu) * reverse_k3(logp, logp_ref)


def forward_k3(logp: Float[Tensor, "*S"], logp_ref: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """An estimate of the forward divergence KL(ref ‖ π) from tokens that π drew: unbiased and never negative.

        r log r − (r − 1),   r = ref(a) / π(a)

    E[r log r] = Σ_a ref(a) log(ref(a)/π(a)) and E[r − 1] = 0, wherever ref's support lies in π's. It is sound but
    heavy-tailed: a token that ref likes and π hardly ever draws carries the sum. Prefer `forward_exact` where logits
    are at hand.

    Args:
        logp: log-probability (nats) of the chosen tokens under π.
        logp_ref: the same under ref.

    Source: Schulman 2020, the note on the other direction at its end.
    """
    log_ratio = bounded(logp_ref - logp)
    return log_ratio.exp() * log_ratio - torch.expm1(log_ratio)


def best_of_n_kl(n: int) -> float:
    """How far best-of-n moves from the policy it samples, at most: nats per response.

        KL(best of n ‖ π) ≤ log n − (n − 1)/n

    Equality holds where no two responses tie in score and each has vanishing probability (a continuous score); with
    few distinct responses the truth is smaller.

    Raises:
        ValueError: when n < 1.

    Source: Stiennon et al. 2020, appendix G.3 (as an equality); Beirami et al. 2024 show that it is an upper bound.
    """
    if n < 1:
        raise ValueError(f"best of {n}: at least one response must be drawn")
    return math.log(n) - (n - 1) / n


def bounded(log_ratio: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """A log-ratio whose exponential, and the product of two such, is finite in its dtype.

    The bound is just under half the logarithm of the largest number: 43 nats in float32, 347 in float64. No ratio of a
    policy and its neighbour comes near it, and one stray token cannot turn the numbers of a run to infinity.
    """
    return log_ratio.clamp(max=0.49 * math.log(torch.finfo(log_ratio.dtype).max))


def _ratio(logp: Tensor, logp_mu: Tensor) -> Tensor:
    return bounded(logp - logp_mu).exp()
