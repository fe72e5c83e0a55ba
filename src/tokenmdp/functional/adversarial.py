"""Adversarial imitation: a discriminator's loss, and the rewards that make of its logit a divergence.

A discriminator reads a state and the token taken there, and says how likely it is that the demonstrator took it:
D = σ(h). ρ(s, a) is how often a policy passes through state s and takes action a there, the expected number of times in
the H steps of the horizon; on a tree of prefixes that is the probability of the prefix s·a. Shown as many demonstrations
as responses of the policy, the best discriminator has the logit

    h*(s, a) = log ρ_E(s, a) − log ρ_π(s, a)

and a reward is a function of h, one number a token:

    name      reward            value at h*: E_π[Σ_t r_t] is              gradient with h* held fixed: minus that of
    gail      log(1 + e^h)      H log 2 − KL(ρ_π ‖ ½ρ_π + ½ρ_E)           2 JS(ρ_E, ρ_π)
    airl      h                 −KL(ρ_π ‖ ρ_E)                            KL(ρ_π ‖ ρ_E)
    fairl     −h e^h            −KL(ρ_E ‖ ρ_π)                            Σ ρ_E h* log ρ_π, h* held fixed: no divergence
    forward   e^h               H, whatever π is                          KL(ρ_E ‖ ρ_π)

where KL and JS of ρ sum over all states and actions: they are those of the first t tokens, summed over t = 1..H.

A policy gradient holds the reward fixed while π moves, so the last column is what is followed and the middle one is not.
For f(u) with u = ρ_E / ρ_π the divergence Σ ρ_π f(u) has the derivative f(u) − u f′(u) in ρ_π: `gail`, `airl` and
`forward` are minus that up to constants. `fairl` is minus f(u) = u log u itself. It has the right value, but where π comes
close to the demonstrator it falls in u with slope −1 while the true derivative rises: it rewards what is already done too
often (the tests show both).

After the end of a response the state is absorbing and is visited at every step that is left of the horizon (`to_go`).
Without that, a reward that is always positive pays for being long and one that is always negative for being short.

Sources: Ho & Ermon 2016 (GAIL); Fu et al. 2018 (AIRL); Ghasemipour et al. 2020 (f-MAX, FAIRL); Kostrikov et al. 2019
(absorbing states).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tokenmdp.functional import preference, returns


def discriminator(logit: Float[Tensor, "*S"], demonstrated: Bool[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Minus the log-likelihood of who took each token: logistic regression, here a token at a time.

        ℓ = −log D where the demonstrator took it, −log(1 − D) where the policy did;   D = σ(h)

    Weighted so that both sides count the same, its minimum over all functions h is h* = log ρ_E − log ρ_π.

    Args:
        logit: h; carries the gradient.
        demonstrated: whose token it is, True for the demonstrator's.

    Returns:
        Nats, log 2 at h = 0; also outside the action mask, where a weight of 0 belongs.

    Source: Ho & Ermon 2016, eq. 14, with D the probability of the demonstrator's side; Goodfellow et al. 2014,
    proposition 1 (the optimum).
    """
    return preference.pointwise(logit.reshape(-1), demonstrated.reshape(-1)).reshape(logit.shape)


def gail(logit: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """The reward whose policy gradient is minus that of twice the Jensen-Shannon divergence.

        r = −log(1 − D) = log(1 + e^h)

    Always positive; log 2 where the two sides cannot be told apart.

    Source: Ho & Ermon 2016, algorithm 1, their D being the probability of the other side.
    """
    return F.softplus(logit)


def airl(logit: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """The reward whose policy gradient is minus that of KL(ρ_π ‖ ρ_E): mode-seeking.

        r = log D − log(1 − D) = h

    Source: Fu et al. 2018, algorithm 1 (the reward log D − log(1 − D)); as an f-divergence: Ghasemipour et al. 2020.
    Differs: h is any function of the prefix, not the difference of a reward, a potential and log π; on
    prefixes, where every state has one past, the two classes are the same.
    """
    return logit


def fairl(logit: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """The published reward for KL(ρ_E ‖ ρ_π): that is its expected value at h*, but not what its gradient follows.

        r = −h e^h

    Highest, 1/e, at h = −1: at tokens that the policy takes e times as often as the demonstrator. With a discriminator
    that keeps up with the policy it moves away from the demonstrator; see the head of this file, and `forward`.

    Source: Ghasemipour et al. 2020 (FAIRL).
    """
    return -logit * logit.exp()


def forward(logit: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """The reward whose policy gradient is minus that of KL(ρ_E ‖ ρ_π): mode-covering.

        r = e^h = ρ_E / ρ_π at h*

    The gradient is that of behaviour cloning, by importance weights: only what the policy itself tries can be
    rewarded, so it is as noisy as these are spread.

    Source: Ghasemipour et al. 2020 (f-MAX: the policy maximises E_π[f*(T)]) with f(u) = u log u, for
    which f*(f′(u)) = u.
    """
    return logit.exp()


REWARDS: Mapping[str, Callable[[Tensor], Tensor]] = {"gail": gail, "airl": airl, "fairl": fairl, "forward": forward}


def to_go(
    reward: Float[Tensor, "B L"], action: Bool[Tensor, "B L"], ended: Bool[Tensor, "B"], horizon: int
) -> Float[Tensor, "B H"]:
    """What is still to be earned at each step of the horizon, the absorbing state after an end included.

        G_t = Σ_{u ≥ t} r_u,     r_u = the reward of the last token, for every step u after a response that ended

    The state after the end is reached by the last token and by nothing else, so it has that token's ρ, and its reward.

    Args:
        reward: per-token rewards; read on actions only.
        action: which tokens the policy chose.
        ended: which responses ended by themselves; after the others no step is left, or nothing is known of it.
        horizon: H, in tokens.

    Returns:
        Reward units; step t is that of the t-th action, whatever its position.

    Raises:
        ValueError: when a response has more tokens than the horizon.

    Source: Kostrikov et al. 2019 (DAC), section 4.2 (absorbing states). Differs: they learn the absorbing state's
    reward; here it is known.
    """
    length = action.sum(1)
    if int(length.max()) > horizon:
        raise ValueError(f"a response of {int(length.max())} tokens, but the horizon is {horizon}: cut it, or raise it")
    laid = returns.at_steps(reward, action, horizon)
    last = laid.gather(1, (length - 1).clamp(min=0)[:, None])
    after = (torch.arange(horizon, device=laid.device) >= length[:, None]) & ended[:, None]
    return torch.where(after, last, laid).flip(1).cumsum(1).flip(1)


def against_others(
    ahead: Float[Tensor, "B H"], action: Bool[Tensor, "B L"], group: Int[Tensor, "B"]
) -> Float[Tensor, "B L"]:
    """What each token has ahead of it, less what the other responses of its group have ahead at the same step.

        A_t = G_t − mean of the others' G_t

    A response that is over has 0 ahead, or what its absorbing state still earns. The baseline is made of other
    responses only, so the policy gradient stays unbiased.

    Args:
        ahead: G, from `to_go`.
        action: which tokens the policy chose.
        group: rows with one number are compared; a row that is alone teaches nothing.

    Returns:
        Reward units; zero outside the mask.

    Source: as `returns.leave_one_out`, at each step.
    """
    centred = torch.stack([returns.leave_one_out(ahead[:, t], group) for t in range(ahead.shape[1])], dim=1)
    return returns.at_tokens(centred, action)
