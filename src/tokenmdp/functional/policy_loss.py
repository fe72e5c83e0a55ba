"""Policy-gradient losses, per token and unreduced: sum them under a weight from `weights`.

Advantages, old log-probabilities and return targets are constants of an update. They are detached here, where the
equation says so, and no caller can leak a gradient through them. Where log-probabilities, values and advantages are
zero (outside the action mask) every loss is zero.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenmdp.functional.kl import bounded


def reinforce(logp: Float[Tensor, "*S"], advantage: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """The score-function loss, whose gradient on the policy's own samples is minus the policy gradient.

        ℓ_t = −A_t log π(a_t | s_t)

    With A_t the return from t on, less anything that depends on s_t only, E[∇ Σ_t ℓ_t] = −∇J exactly.

    Args:
        logp: log-probability (nats) of the chosen tokens under π; carries the gradient.
        advantage: reward units; a constant.

    Source: Williams 1992; Sutton & Barto 2018, eqs. 13.8 and, with a baseline, 13.11.
    """
    return -advantage.detach() * logp


def ppo_clip(
    logp: Float[Tensor, "*S"],
    logp_old: Float[Tensor, "*S"],
    advantage: Float[Tensor, "*S"],
    clip: float | None = 0.2,
    clip_high: float | None = None,
) -> tuple[Float[Tensor, "*S"], Bool[Tensor, "*S"]]:
    """The clipped surrogate: no gain from moving a token's probability out of the clip range.

        ℓ_t = −min( ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε_high) A_t ),   ρ_t = π(a_t | s_t) / π_old(a_t | s_t)

    At π = π_old the ratio is 1 and the gradient is that of `reinforce`. A token is clipped, and has no gradient, where
    A > 0 and ρ > 1 + ε_high, or A < 0 and ρ < 1 − ε.

    Args:
        logp: log-probability (nats) of the chosen tokens under π; carries the gradient.
        logp_old: the same under the policy at the start of the phase; a constant.
        advantage: reward units (or whitened); a constant.
        clip: ε, in units of the ratio; None for no clipping at all.
        clip_high: ε_high, where the upper side differs; None for ε.

    Returns:
        The loss, and which tokens were clipped (average it over actions for the clip fraction).

    Raises:
        ValueError: when a clip range is not positive, or only the upper one is given.

    Source: Schulman et al. 2017, eq. 7; two-sided ranges: Yu et al. 2025 (DAPO), eq. 8.
    """
    advantage = advantage.detach()
    ratio = bounded(logp - logp_old.detach()).exp()
    if clip is None:
        if clip_high is not None:
            raise ValueError(f"clip_high={clip_high} without clip: give both, or neither for no clipping")
        return -ratio * advantage, torch.zeros_like(ratio, dtype=torch.bool)
    clip_high = clip if clip_high is None else clip_high
    for name, value in (("clip", clip), ("clip_high", clip_high)):
        if value <= 0:
            raise ValueError(
                f"{name}={value}, but a clip range is positive: give e.g. 0.2, or clip=None for no clipping"
            )
    limited = ratio.clamp(1 - clip, 1 + clip_high)
    clipped = limited * advantage < ratio * advantage
    return -torch.where(clipped, limited, ratio) * advantage, clipped


def gspo(
    logp: Float[Tensor, "B L"],
    logp_old: Float[Tensor, "B L"],
    advantage: Float[Tensor, "B L"],
    action: Bool[Tensor, "B L"],
    clip: float | None = 3e-4,
    clip_high: float | None = None,
) -> tuple[Float[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """The clipped surrogate with one ratio a response, the geometric mean of its tokens' ratios.

        s_b     = ( π(y_b | x) / π_old(y_b | x) )^(1/|y_b|) = exp( 1/|y_b| Σ_t log π(a_t | s_t) − log π_old(a_t | s_t) )
        s_{b,t} = sg[s_b] π(a_t | s_t) / sg[π(a_t | s_t)]                       in value s_b; sg stops the gradient
        ℓ_t     = −min( s_{b,t} A_t, clip(s_{b,t}, 1 − ε, 1 + ε_high) A_t )

    With one advantage a response and weights that are constant along it, value and gradient are those of the response's
    own surrogate −min(s_b A_b, clip(s_b) A_b), whose gradient spreads over the tokens as s_b A_b ∇ log π / |y_b|; the
    token form also takes advantages that differ along it. A geometric mean is no importance weight: away from
    π = π_old the gradient is not an unbiased one of anything that was sampled from π_old. At π = π_old it is that of
    `reinforce`.

    Args:
        logp: log-probability (nats) of the chosen tokens under π; carries the gradient.
        logp_old: the same under the policy that sampled; a constant.
        advantage: reward units (or scaled); a constant.
        action: which tokens the policy chose: what the mean runs over.
        clip: ε, in units of the mean ratio, which moves far less than a token's; None for no clipping at all.
        clip_high: ε_high, where the upper side differs; None for ε.

    Returns:
        The loss, zero outside the mask, and which tokens were clipped (all of a response's with A of one sign).

    Raises:
        ValueError: when a clip range is not positive, or only the upper one is given.

    Source: Zheng et al. 2025 (GSPO), eqs. 5 and 7; its token form is section 4.3 there.
    """
    zero = torch.zeros_like(logp)
    change = torch.where(action, logp - logp_old.detach(), zero)
    mean = change.sum(dim=1, keepdim=True) / action.sum(dim=1, keepdim=True).clamp(min=1)
    token = torch.where(action, mean.detach() + logp - logp.detach(), zero)
    return ppo_clip(token, zero, torch.where(action, advantage, zero), clip, clip_high)


def cispo(
    logp: Float[Tensor, "*S"],
    logp_old: Float[Tensor, "*S"],
    advantage: Float[Tensor, "*S"],
    clip: float | None = None,
    clip_high: float | None = 4.0,
) -> tuple[Float[Tensor, "*S"], Bool[Tensor, "*S"]]:
    """The score-function loss under a bounded importance weight: what is out of range is held, not dropped.

        ℓ_t = −sg[ clip(ρ_t, 1 − ε, 1 + ε_high) ] A_t log π(a_t | s_t),   ρ_t = π(a_t | s_t) / π_old(a_t | s_t)

    sg stops the gradient. Unlike in `ppo_clip` every token keeps a gradient, A_t ∇ log π times a number no larger than
    1 + ε_high. Inside the range the gradient is that of the unclipped surrogate −ρ_t A_t.

    Args:
        logp: log-probability (nats) of the chosen tokens under π; carries the gradient.
        logp_old: the same under the policy that sampled; a constant.
        advantage: reward units (or scaled); a constant.
        clip: ε, in units of the ratio; None for no lower bound.
        clip_high: ε_high; None for no upper bound.

    Returns:
        The loss, and which tokens' weights were out of range.

    Raises:
        ValueError: when a clip range is not positive.

    Source: MiniMax 2025 (MiniMax-M1), eqs. 4 and 5.
    """
    ratio = bounded(logp.detach() - logp_old.detach()).exp()
    for name, value in (("clip", clip), ("clip_high", clip_high)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}, but a clip range is positive: give e.g. 4, or None for no bound")
    limited = ratio.clamp(0.0 if clip is None else 1 - clip, math.inf if clip_high is None else 1 + clip_high)
    return -limited * advantage.detach() * logp, limited != ratio


def value_clip(
    value: Float[Tensor, "*S"],
    value_old: Float[Tensor, "*S"],
    return_: Float[Tensor, "*S"],
    clip: float | None = 0.2,
) -> Float[Tensor, "*S"]:
    """Squared error of the value head, with no gain from moving a value out of the clip range.

        ℓ_t = ½ max( (V − R)², (V_old + clip(V − V_old, −ε, ε) − R)² )

    Args:
        value: V(s_t) in reward units; carries the gradient.
        value_old: the same at the start of the phase; a constant.
        return_: the target R_t, from `returns.gae`; a constant.
        clip: ε in reward units; None for the plain squared error.

    Raises:
        ValueError: when the clip range is not positive.

    Source: Huang et al. 2022, "The 37 implementation details of PPO", core detail 9; the error itself: Schulman et al.
    2017, eq. 9.
    """
    target = return_.detach()
    error = (value - target).square()
    if clip is None:
        return 0.5 * error
    if clip <= 0:
        raise ValueError(f"clip={clip}, but a clip range is positive: give e.g. 0.2, or None for no clipping")
    limited = value_old.detach() + (value - value_old.detach()).clamp(-clip, clip)
    return 0.5 * torch.maximum(error, (limited - target).square())
