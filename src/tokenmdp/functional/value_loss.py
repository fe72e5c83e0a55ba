"""Losses, targets and weights of value-based and offline RL, per token and unreduced: sum them under a weight.

Time runs over action positions only, as in `returns`: the state after the last action of a row is worth 0. Everything
that an equation takes as a target is detached here. Outside the action mask nothing is read and results are zero.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenmdp.functional import returns


def expectile(error: Float[Tensor, "*S"], tau: float) -> Float[Tensor, "*S"]:
    """Squared error that counts an underestimate τ and an overestimate 1 − τ.

        L(u) = |τ − 1[u < 0]| u²,   u = target − estimate

    Its minimiser is the τ-expectile of the targets: τ = ½ gives their mean, τ → 1 their maximum. So a state's value,
    fitted to the Q of the actions that the data took there, comes near the best of those and never asks for others.

    Args:
        error: target − estimate, reward units; carries the gradient of the estimate.
        tau: τ, in (0, 1).

    Raises:
        ValueError: when tau is outside its range.

    Source: Newey & Powell 1987; as a value's loss Kostrikov et al. 2021 (IQL), eq. 5.
    """
    if not 0.0 < tau < 1.0:
        raise ValueError(f"tau={tau}, but an expectile lies between 0 and 1: 0.5 is the mean, 0.9 close to the best")
    return torch.where(error < 0, 1 - tau, tau) * error.square()


def td_target(
    reward: Float[Tensor, "B L"], value: Float[Tensor, "B L"], action: Bool[Tensor, "B L"], gamma: float = 1.0
) -> Float[Tensor, "B L"]:
    """What an action is worth by its reward and the value of the state it leads to.

        y_t = r_t + γ V(s_{t⁺}),   t⁺ the next action position;   V after the last action = 0

    Args:
        reward: per-token rewards.
        value: `value[b, t]` is V of the state before `tokens[b, t]`; a constant.
        action: which tokens the policy chose.
        gamma: discount a token, in [0, 1].

    Returns:
        Reward units; zero outside the mask.

    Raises:
        ValueError: when gamma is outside [0, 1].

    Source: Kostrikov et al. 2021 (IQL), eq. 6; on tokens Snell et al. 2022 (ILQL), section 4.
    """
    value = torch.where(action, value, torch.zeros_like(value)).detach()
    advantage, _ = returns.gae(reward, value, action, gamma, 0.0)  # r_t + γ V(s_{t⁺}) − V(s_t)
    return advantage + value


def cql(q: Float[Tensor, "*S V"], chosen: Int[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """How far the Q of all actions stand above the Q of the one that the data took.

        ℓ = log Σ_a exp Q(s, a) − Q(s, a_t) ≥ 0

    The cross-entropy of the data's actions under softmax(Q): it presses down what was never seen, whose Q nothing else
    holds, and so keeps the policy near the data.

    Args:
        q: Q of every action, reward units.
        chosen: the action of the data.

    Source: Kumar et al. 2020 (CQL), eq. 4, its form CQL(H); on tokens Snell et al. 2022 (ILQL), section 4.
    """
    return q.logsumexp(-1) - q.gather(-1, chosen[..., None]).squeeze(-1)


def soft_target(
    reward: Float[Tensor, "B L"],
    q: Float[Tensor, "B L"],
    value: Float[Tensor, "B L"],
    action: Bool[Tensor, "B L"],
    gamma: float = 1.0,
    lam: float = 1.0,
) -> Float[Tensor, "B L"]:
    """What soft Q of an action should be, by the rest of the path it is on.

        G_t = r_t + γ ( V(s_{t⁺}) + λ (G_{t⁺} − Q(s_{t⁺}, a_{t⁺})) ),      Q − V = β log π/π_ref

    λ = 0 is the one-step target r + γ V. λ = 1 is the whole path, Σ_{k ≥ t} γ^{k−t} r_k less β log π/π_ref of every
    later action, with no value in it at γ = 1 but through π. At the optimum Q* is the target on *every* path, whoever
    drew it: no importance weights are needed, and old data stay right.

    Args:
        reward: per-token rewards.
        q: Q(s_t, a_t) of the chosen actions under the target network, reward units.
        value: V(s_t) under the same.
        action: which tokens were chosen.
        gamma: discount a token, in [0, 1].
        lam: λ, in [0, 1].

    Returns:
        Reward units; zero outside the mask; without gradient.

    Raises:
        ValueError: when gamma or lam is outside [0, 1].

    Source: Nachum et al. 2017 (path consistency learning), theorem 1, and corollary 2 for paths; for text Guo et al.
    2021, section 3.
    Differs: paths of all lengths mixed by λ, as GAE mixes returns; the entropy is relative to a reference policy.
    """
    zero = torch.zeros_like(value)
    q, value = torch.where(action, q, zero).detach(), torch.where(action, value, zero).detach()
    residual, _ = returns.gae(reward - (q - value), value, action, gamma, lam)
    return residual + q


def advantage_weight(
    advantage: Float[Tensor, "*S"], beta: float, clip: float = 20.0
) -> tuple[Float[Tensor, "*S"], Bool[Tensor, "*S"]]:
    """How much an example is imitated: exponentially more, the better it was than expected.

        ω = min( exp(A / β), ω_max )

    It is the ratio of the best policy within a KL of the data's to the data's own, up to a constant.

    Args:
        advantage: reward units.
        beta: β, reward units: small is greedy, large is behaviour cloning.
        clip: ω_max; it bounds what one lucky example can do.

    Returns:
        The weights, and where they were clipped.

    Raises:
        ValueError: when beta or clip is not positive.

    Source: Peng et al. 2019 (AWR), algorithm 1 (their code clips at ω_max = 20); Kostrikov et al. 2021 (IQL), eq. 7.
    """
    for name, number in (("beta", beta), ("clip", clip)):
        if not number > 0:
            raise ValueError(f"{name}={number}, but it must be positive: beta is in reward units, clip a weight")
    exponent = advantage.detach() / beta
    clipped = exponent > math.log(clip)
    return torch.where(clipped, math.log(clip), exponent).exp(), clipped
