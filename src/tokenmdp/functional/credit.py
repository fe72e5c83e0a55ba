"""Credit assignment: from one score a response to a reward a token.

A scheme here is a function `(score [B], action [B, L], ...) -> reward [B, L]`, linear in the score up to a term that
does not depend on it. What the rewards of a row sum to is what the scheme conserves, and it decides which objective is
learned at γ = 1:

    last, uniform, attention   Σ r = score                          the score itself
    shaped, branch             Σ r = score − Φ(s₀), score − V(s₀)   the same, for the start is not the policy's choice
    implicit, process          Σ r = score + something learned      another one: a second reward is added

A scheme is *causal* if the reward of a token depends on nothing that comes after it. With a causal scheme the return
to go from a token is all that the token caused, and policy gradients built on it (`returns.discounted`, `returns.gae`)
are unbiased. With one that is not causal, earlier tokens are paid for what later ones decide, the return to go leaves
that part out, and those gradients are biased, at λ = 1 too, in exchange for less variance. Each scheme says which it
is; the tests measure it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def last(score: Float[Tensor, "B"], action: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """The whole score on the last token the policy chose: when the outcome is known.

        r_t = score · 1[t is the row's last action],      Σ_t r_t = score

    Causal.

    Args:
        score: one outcome a row; 0 for a row without a verdict.
        action: which tokens the policy chose.

    Returns:
        Reward units; zero outside the mask.

    Raises:
        ValueError: when a row has a score but no action to carry it.

    Source: Ziegler et al. 2019, eq. 2; Stiennon et al. 2020, section 3.4.
    """
    _carriers(score, action)
    remaining = action.flip(1).cumsum(dim=1).flip(1)
    score = score[:, None].expand(action.shape)
    return torch.where(action & (remaining == 1), score, torch.zeros_like(score))


def uniform(score: Float[Tensor, "B"], action: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """The score in equal parts on every token the policy chose: the scheme every other must beat.

        r_t = score / |o|  on actions,      Σ_t r_t = score

    Not causal: what the first token is paid depends on the last.

    Args:
        score: one outcome a row; 0 for a row without a verdict.
        action: which tokens the policy chose.

    Returns:
        Reward units; zero outside the mask.

    Raises:
        ValueError: when a row has a score but no action to carry it.
    """
    _carriers(score, action)
    part = (score / action.sum(dim=1).clamp(min=1))[:, None].expand(action.shape)
    return torch.where(action, part, torch.zeros_like(part))


def attention(
    score: Float[Tensor, "B"],
    action: Bool[Tensor, "B L"],
    attention_weights: Float[Tensor, "B L"],
    beta: float = 1.0,
) -> Float[Tensor, "B L"]:
    """The score in the proportions in which the reward model, at its last token, looked back at the response.

        r_t = β α_t score + (1 − β) score · 1[t is the row's last action],     α_t = a_t / Σ_{u an action} a_u

    Σ_t r_t = score. Not causal: the attention is that of the whole response.

    Args:
        score: one outcome a row; 0 for a row without a verdict.
        action: which tokens the policy chose.
        attention_weights: a ≥ 0, from the reward model's last token to each token; what lies outside the mask (the
            prompt) is not read. A row whose weights are all zero gets equal parts.
        beta: β, the part of the score that is spread, in [0, 1].

    Returns:
        Reward units; zero outside the mask.

    Raises:
        ValueError: when beta is outside [0, 1], a weight is negative or not finite, or a row has a score but no action.

    Source: Chan et al. 2024, "Dense reward for free in RLHF", section 3 (ABC, and its mixture with the sparse reward).
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta}: the part of the score that attention spreads lies between 0 and 1")
    _carriers(score, action)
    zero = torch.zeros_like(attention_weights)
    seen = torch.where(action, attention_weights, zero)
    if not bool((torch.isfinite(seen) & (seen >= 0)).all()):
        raise ValueError("an attention weight is negative or not finite: give what a softmax over the tokens gave")
    seen = torch.where((seen.sum(dim=1, keepdim=True) > 0), seen, action.to(seen.dtype))
    total = seen.sum(dim=1, keepdim=True)
    share = (seen / torch.where(total > 0, total, torch.ones_like(total))).to(score.dtype)
    return beta * share * score[:, None] + (1 - beta) * last(score, action)


def shaped(
    score: Float[Tensor, "B"], action: Bool[Tensor, "B L"], potential: Float[Tensor, "B L"], gamma: float = 1.0
) -> Float[Tensor, "B L"]:
    """The score on the last token, and on every token the rise of a potential.

        r_t = score · 1[t is the row's last action] + γ Φ(s_{t⁺}) − Φ(s_t),     Φ after the last action = 0

    The return of a row is less by Φ(s₀), and from any token on by Φ(s_t), however long the row is: at λ = 1 a potential is a
    baseline, and the policy gradient is unbiased whatever Φ is. At γ = 1, Σ_t r_t = score − Φ(s₀). Causal, if Φ(s_t)
    depends on s_t alone.

    Args:
        score: one outcome a row; 0 for a row without a verdict.
        action: which tokens the policy chose.
        potential: Φ of the state *before* each token, the state in which it was chosen.
        gamma: γ, the discount a token with which returns are made of these rewards.

    Returns:
        Reward units; zero outside the mask.

    Raises:
        ValueError: when a row has a score but no action to carry it.

    Source: Ng, Harada & Russell 1999, eq. 2.
    """
    before = torch.where(action, potential, torch.zeros_like(potential)).to(score.dtype)
    following = torch.zeros_like(before[:, 0])
    columns = []
    for t in reversed(range(before.shape[1])):
        columns.append(following)
        following = torch.where(action[:, t], before[:, t], following)
    after = torch.stack(columns[::-1], dim=1)
    return last(score, action) + torch.where(action, gamma * after - before, torch.zeros_like(before))


def branch(
    score: Float[Tensor, "B"], action: Bool[Tensor, "B L"], value: Float[Tensor, "B L"], gamma: float = 1.0
) -> Float[Tensor, "B L"]:
    """What each token did to the expected outcome, the values being Monte-Carlo averages over futures drawn by resets.

        r_t = γ V(s_{t⁺}) − V(s_t),     of the last action: score − V(s_t)

    It is `shaped` with Φ = V, and causal; at γ = 1, Σ_t r_t = score − V(s₀). With the exact V, r_t is the advantage of the
    token, for the dynamics are deterministic: read it with λ = 0 and no critic. With λ = 1 the return from t on is less by
    V(s_t), unbiased for any V whose rollouts were drawn apart from the response.

    Args:
        score: one outcome a row; 0 for a row without a verdict.
        action: which tokens the policy chose.
        value: V of the state *before* each token, from `returns.branch`; its scores are not discounted, so that at γ < 1
            it is a potential and no more.
        gamma: γ, the discount a token with which returns are made of these rewards.

    Returns:
        Reward units; zero outside the mask.

    Raises:
        ValueError: when a row has a score but no action to carry it.

    Source: Kazemnejad et al. 2024 (VinePPO), section 4, with reward at the end only.
    """
    return shaped(score, action, value, gamma)


def implicit(
    score: Float[Tensor, "B"],
    action: Bool[Tensor, "B L"],
    logp_dpo: Float[Tensor, "B L"],
    logp_ref: Float[Tensor, "B L"],
    beta: float = 0.1,
) -> Float[Tensor, "B L"]:
    """The score on the last token, and on every token the reward a preference-trained policy implies.

        r_t = score · 1[t is the row's last action] + β log( π_dpo(a_t | s_t) / π_ref(a_t | s_t) )

    Σ_t r_t = score + β log(π_dpo(y | x) / π_ref(y | x)): the score and, up to a constant a prompt, DPO's reward of the
    whole response. Causal.

    Args:
        score: one outcome a row; 0 for a row without a verdict.
        action: which tokens the policy chose.
        logp_dpo, logp_ref: log-probabilities (nats) of the chosen tokens under the policy trained on preferences and
            under the reference it started from.
        beta: β, reward units a nat; DPO's own β gives the reward its preferences were fitted with.

    Returns:
        Reward units; zero outside the mask.

    Raises:
        ValueError: when beta is negative, or a row has a score but no action to carry it.

    Source: Zhong et al. 2024, "DPO meets PPO" (RTO), algorithm 2; the implied reward: Rafailov et al. 2023, eq. 5.
    Differs: the KL to the reference is left to the recipe, which adds its own.
    """
    if beta < 0:
        raise ValueError(f"beta={beta}: reward units a nat of the implied reward, at least 0")
    dense = beta * torch.where(action, logp_dpo - logp_ref, torch.zeros_like(logp_ref))
    return last(score, action) + dense.to(score.dtype)


def process(
    score: Float[Tensor, "B"],
    action: Bool[Tensor, "B L"],
    step_scores: Float[Tensor, "B L"],
    step_mask: Bool[Tensor, "B L"],
) -> Float[Tensor, "B L"]:
    """The score on the last token, and on the last token of every step what a process reward says of the step.

        r_t = score · 1[t is the row's last action] + p_t · 1[t ends a step]

    Σ_t r_t = score + Σ_{steps} p: a second reward is added, and if p is never negative it pays for taking more steps.
    Causal, if p_t was read after token t and no later.

    Args:
        score: one outcome a row; 0 for a row without a verdict.
        action: which tokens the policy chose.
        step_scores: p, reward units; not read outside `step_mask`.
        step_mask: True at the last token of each step.

    Returns:
        Reward units; zero outside the mask.

    Raises:
        ValueError: when a step ends on a token nobody chose, or a row has a score but no action to carry it.

    Source: Wang et al. 2023 (Math-Shepherd): reinforcement learning with process supervision ("step-by-step PPO").
    """
    stray = step_mask & ~action
    if bool(stray.any()):
        row, t = (int(x) for x in stray.nonzero()[0])
        raise ValueError(f"a step of row {row} ends at position {t}, which is no action: a step ends on a chosen token")
    kept = torch.where(step_mask, step_scores, torch.zeros_like(step_scores))
    return last(score, action) + kept.to(score.dtype)


def _carriers(score: Tensor, action: Tensor) -> None:
    lost = (score != 0) & ~action.any(dim=1)
    if bool(lost.any()):
        row = int(lost.nonzero()[0])
        raise ValueError(
            f"row {row} has a score of {float(score[row]):g} and not one action token to carry it: "
            "drop the row, or mark it as without a verdict and give it the score 0"
        )
