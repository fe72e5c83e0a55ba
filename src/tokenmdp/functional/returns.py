"""Returns, advantages and baselines on the token MDP.

Time runs over *action positions* only. Between two actions of a row there may be tokens nobody chose (a tool's answer,
the next turn of a conversation): they are part of the state, no time passes in them, and they are skipped. After its
last action a row is over, whether it ended or ran into the horizon H: in the finite-horizon MDP that is the end, and
what follows is worth 0.

What lies outside the action mask is never read, so it may hold anything; results are zero there.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def discounted(reward: Float[Tensor, "B L"], action: Bool[Tensor, "B L"], gamma: float = 1.0) -> Float[Tensor, "B L"]:
    """The return that followed each action, its own reward included.

        G_t = r_t + γ G_{t⁺},   t⁺ the next action position;   G after the last action = 0

    Args:
        reward: per-token rewards.
        action: which tokens the policy chose.
        gamma: discount a token, in [0, 1].

    Returns:
        Reward units; zero outside the mask.

    Raises:
        ValueError: when gamma is outside [0, 1].

    Source: Sutton & Barto 2018, eq. 3.9.
    """
    _fraction("gamma", gamma)
    reward = torch.where(action, reward, torch.zeros_like(reward))
    following = torch.zeros_like(reward[:, 0])
    columns = []
    for t in reversed(range(reward.shape[1])):
        following = torch.where(action[:, t], reward[:, t] + gamma * following, following)
        columns.append(following)
    return torch.where(action, torch.stack(columns[::-1], dim=1), torch.zeros_like(reward))


def gae(
    reward: Float[Tensor, "B L"],
    value: Float[Tensor, "B L"],
    action: Bool[Tensor, "B L"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
    """Generalised advantage estimates, and the returns that train the value head.

        δ_t = r_t + γ V(s_{t⁺}) − V(s_t)
        A_t = δ_t + γ λ A_{t⁺}                 t⁺ the next action position; V and A after the last action = 0
        R_t = A_t + V(s_t)

    λ = 1 gives the discounted return minus the value: at γ = 1 and with causal rewards (see `credit`) the policy
    gradient is then exact in expectation, whatever V is. λ < 1 has less variance and is biased where V is wrong.

    Args:
        reward: per-token rewards.
        value: `value[b, t]` is V of the state *before* `tokens[b, t]`, the state in which that token was chosen.
            Compute it without gradient: whatever gradient it carries flows into both results.
        action: which tokens the policy chose.
        gamma: discount a token, in [0, 1].
        lam: λ, in [0, 1].

    Returns:
        Advantages and returns in reward units; both zero outside the mask.

    Raises:
        ValueError: when gamma or lam is outside [0, 1].

    Source: Schulman et al. 2016, eq. 16 (λ = 0: eq. 17, λ = 1: eq. 18); Schulman et al. 2017, eqs. 11-12.
    """
    _fraction("gamma", gamma)
    _fraction("lam", lam)
    zero = torch.zeros_like(value)
    reward, value = torch.where(action, reward, zero), torch.where(action, value, zero)
    advantage, next_value = zero[:, 0], zero[:, 0]
    columns = []
    for t in reversed(range(value.shape[1])):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        advantage = torch.where(action[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(action[:, t], value[:, t], next_value)
        columns.append(advantage)
    result = torch.where(action, torch.stack(columns[::-1], dim=1), zero)
    return result, result + value


def whiten(x: Float[Tensor, "*S"], weight: Float[Tensor, "*S"], shift: bool = True) -> Float[Tensor, "*S"]:
    """The same numbers with mean 0 and variance 1 under the weights.

        y = (x − μ) / σ,   μ = Σ w x / Σ w,  σ² = Σ w (x − μ)² / Σ w

    No small constant is added to σ: the result has variance 1 exactly, in any unit. Numbers that differ by no more
    than their rounding have no spread to divide by, and come back as zeros.

    Args:
        x: what to whiten; read only where the weight is positive.
        weight: how much each entry counts, from `weights`; the scale does not matter.
        shift: False divides by σ and leaves the mean where it is, at μ/σ: for rewards, whose sum says how long to go on.

    Returns:
        Pure numbers; zero where the weight is zero.

    Source: Huang et al. 2022, "The 37 implementation details of PPO", core detail 7.
    Differs: weighted, and without ε in the denominator.
    """
    inside = weight > 0
    zero = torch.zeros_like(x)
    x = torch.where(inside, x, zero)
    weight = torch.where(inside, weight, torch.zeros_like(weight)).to(x.dtype)
    total = weight.sum()
    share = weight / torch.where(total > 0, total, torch.ones_like(total))
    centre = torch.where(inside, x - (share * x).sum(), zero)
    spread = (share * centre.square()).sum().sqrt()
    rounding = 16 * torch.finfo(x.dtype).eps * x.abs().amax()
    varied = spread > rounding
    kept = torch.where(varied, centre if shift else x, zero)
    return kept / torch.where(varied, spread, torch.ones_like(spread))


def group_mean(
    score: Float[Tensor, "B"], group: Int[Tensor, "B"], rows: Bool[Tensor, "B"] | None = None
) -> Float[Tensor, "B"]:
    """For each row the mean score of its group: the samples of one prompt.

        mean_b = 1/|g(b)| Σ_{j ∈ g(b)} score_j

    Args:
        score: one outcome a row.
        group: rows with one number belong together; the numbers themselves mean nothing.
        rows: which rows have a verdict. The others count in no mean and get 0.

    Returns:
        Reward units.
    """
    total, count, rows = _sums(score, group, rows)
    return torch.where(rows, total / count.clamp(min=1), torch.zeros_like(score))


def centred(
    score: Float[Tensor, "B"], group: Int[Tensor, "B"], rows: Bool[Tensor, "B"] | None = None
) -> Float[Tensor, "B"]:
    """Each score minus the mean of its group, its own score being part of that mean.

        A_b = score_b − 1/G Σ_{j ∈ g(b)} score_j                     Σ over a group = 0

    A sample's own score is in its baseline, which shrinks the expected policy gradient by (G − 1)/G and no more: see
    `leave_one_out`. Where a group's scores are all equal (see `spread`) the result is 0 exactly: Adam would make a
    full step of what rounding leaves.

    Args:
        score, group, rows: as in `group_mean`.

    Returns:
        Reward units; zero for rows without a verdict.

    Source: Shao et al. 2024, section 4.1.2, without the division by the standard deviation: Liu et al. 2025 (Dr.
    GRPO), section 3.2.
    """
    varied = spread(score, group, rows) > 0
    return torch.where(varied, score - group_mean(score, group, rows), torch.zeros_like(score))


def leave_one_out(
    score: Float[Tensor, "B"], group: Int[Tensor, "B"], rows: Bool[Tensor, "B"] | None = None
) -> Float[Tensor, "B"]:
    """Each score minus the mean score of the *other* samples of its group.

        A_b = score_b − 1/(G − 1) Σ_{j ∈ g(b), j ≠ b} score_j        Σ over a group = 0

    The baseline does not depend on the sample it judges, so the policy gradient stays unbiased. A row that is alone in
    its group has nothing to be compared with: its advantage is 0, it teaches nothing; and so are those of a group whose
    scores are all equal (see `spread`), exactly.

    Args:
        score, group, rows: as in `group_mean`.

    Returns:
        Reward units; zero for rows without a verdict.

    Source: Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024
    (RLOO).
    """
    total, count, _ = _sums(score, group, rows)
    others = (total - score) / (count - 1).clamp(min=1)
    varied = spread(score, group, rows) > 0
    return torch.where(varied, score - others, torch.zeros_like(score))


def spread(
    score: Float[Tensor, "B"], group: Int[Tensor, "B"], rows: Bool[Tensor, "B"] | None = None
) -> Float[Tensor, "B"]:
    """For each row the standard deviation of its group's scores: how much there is to learn from.

        σ_b = sqrt( 1/(G − 1) Σ_{j ∈ g(b)} (score_j − mean_g)² )

    Exactly 0 for a group whose scores are all equal, or differ by no more than their rounding (one response scored
    twice by a large model seldom gives the same last bit), and for a row that is alone. Give `zeros_like(group)` as
    the group for the spread of the whole batch.

    Args:
        score, group, rows: as in `group_mean`.

    Returns:
        Reward units; zero for rows without a verdict.
    """
    _, count, judged = _sums(score, group, rows)
    centre = torch.where(judged, score - group_mean(score, group, rows), torch.zeros_like(score))
    square, _, _ = _sums(centre.square(), group, judged)
    deviation = (square / (count - 1).clamp(min=1)).sqrt()
    rounding = 16 * torch.finfo(score.dtype).eps * _largest(score, group, judged)
    varied = judged & (count > 1) & (deviation > rounding)
    return torch.where(varied, deviation, torch.zeros_like(deviation))


def scaled(advantage: Float[Tensor, "B *S"], deviation: Float[Tensor, "B"]) -> Float[Tensor, "B *S"]:
    """Advantages in units of the spread of the scores they came from: the group-relative advantage.

        Â = (score − mean_g) / σ_g,     0 where σ_g = 0

    Nothing is added to σ: a hundredfold score gives the same advantages, and a group that does not vary has none. The
    factor depends on the very samples it multiplies, so the policy gradient is biased, towards prompts (and, within a
    prompt, draws) whose scores hardly vary: the tests measure it against enumeration.

    Args:
        advantage: [B], or [B, L] after credit was assigned; from `centred`.
        deviation: of each row's scores, from `spread`.

    Returns:
        Pure numbers.

    Source: Shao et al. 2024 (GRPO), section 4.1.2.
    Differs: σ is that of a sample, with G − 1; the paper's formula does not say which.
    """
    deviation = deviation.reshape(-1, *[1] * (advantage.ndim - 1))
    varied = deviation > 0
    safe = torch.where(varied, deviation, torch.ones_like(deviation))
    return torch.where(varied, advantage, torch.zeros_like(advantage)) / safe


def against(
    score: Float[Tensor, "B"],
    group: Int[Tensor, "B"],
    baseline: Float[Tensor, "K"],
    rows: Bool[Tensor, "B"] | None = None,
) -> Float[Tensor, "B"]:
    """Each score minus one that belongs to its prompt: that of the policy's own greedy response.

        A_b = score(y_b) − score(ŷ_{g(b)}),     ŷ = the most likely token at every step

    A baseline that does not depend on the sample, so the policy gradient stays unbiased, from one sample a prompt on.

    Args:
        score, group, rows: as in `group_mean`; here the groups are numbered 0 … K − 1, as `Policy.sample` does.
        baseline: what to compare group k with.

    Returns:
        Reward units; zero for rows without a verdict.

    Raises:
        ValueError: when a group has no baseline.

    Source: Li et al. 2024 (ReMax), section 4, algorithm 1.
    """
    if not bool(((group >= 0) & (group < len(baseline))).all()):
        raise ValueError(
            f"groups {int(group.min())} to {int(group.max())} and {len(baseline)} baselines: one for each group, in order"
        )
    rows = torch.ones_like(score, dtype=torch.bool) if rows is None else rows
    return torch.where(rows, score - baseline[group], torch.zeros_like(score))


def overlong(length: Int[Tensor, "B"], longest: int, margin: int) -> Float[Tensor, "B"]:
    """What a response that comes near the horizon loses: nothing, then more a token, 1 at the horizon.

        p(y) = 0                                 |y| ≤ H − m
        p(y) = (H − m − |y|) / m,  in [−1, 0)     H − m < |y| ≤ H

    Args:
        length: tokens of each response.
        longest: H, the most tokens a response may have.
        margin: m, the tokens before the horizon in which length costs; 0 for none.

    Returns:
        Reward units, at most 0; to be added to the score.

    Raises:
        ValueError: when the margin is outside 0 to H.

    Source: Yu et al. 2025 (DAPO), eq. 13. Its third case, longer than H, cannot occur here.
    """
    if not 0 <= margin <= longest:
        raise ValueError(f"margin={margin} of {longest} tokens: give 0 for no punishment, and at most the horizon")
    free = longest - margin
    return -(length - free).clamp(0, margin).to(torch.get_default_dtype()) / max(1, margin)


def branch(
    score: Float[Tensor, "N"],
    parent: Int[Tensor, "N"],
    at: Int[Tensor, "N"],
    action: Bool[Tensor, "B L"],
    rows: Bool[Tensor, "N"] | None = None,
) -> Float[Tensor, "B L"]:
    """Values of visited states by resetting to them: the mean score of the futures drawn from each.

        V(s_t) = 1/K Σ_k score(y_{<t} · continuation_k)

    Unbiased for the value of the policy that drew the continuations. A state nobody drew from (the inside of a step,
    where resets are made only between steps; a state whose futures all lack a verdict) has the last value before it in
    its row, and 0 before the first.

    Args:
        score: outcome of each continued response, as a whole.
        parent: the row of `action` whose state it continued.
        at: the position t of that state: tokens before t were kept.
        action: which tokens of the parent rows the policy chose.
        rows: which continued responses have a verdict.

    Returns:
        Reward units, `value[b, t]` of the state before token t; zero outside the mask.

    Raises:
        ValueError: when a state lies outside the mask: no action was taken there.

    Source: Kazemnejad et al. 2024 (VinePPO), section 4.
    """
    if not bool(action[parent, at].all()):
        i = int((~action[parent, at]).nonzero()[0])
        raise ValueError(
            f"position {int(at[i])} of row {int(parent[i])} is no action: a value is of a state one acted in"
        )
    rows = torch.ones_like(parent, dtype=torch.bool) if rows is None else rows
    zero = torch.zeros(action.shape, dtype=score.dtype, device=score.device)
    where = (parent[rows], at[rows])
    total = zero.index_put(where, score[rows], accumulate=True)
    count = zero.index_put(where, torch.ones_like(score[rows]), accumulate=True)
    mean, known, columns = total / count.clamp(min=1), zero[:, 0], []
    for t in range(action.shape[1]):
        known = torch.where(count[:, t] > 0, mean[:, t], known)
        columns.append(known)
    return torch.where(action, torch.stack(columns, dim=1), zero)


def at_steps(value: Float[Tensor, "B L"], action: Bool[Tensor, "B L"], horizon: int = 0) -> Float[Tensor, "B H"]:
    """Token-aligned numbers by their step: `[b, t]` is that of the t-th action of row b, wherever it stands; 0 after the last.

    Args:
        horizon: H, where it is longer than the longest response.
    """
    rows, at, step = _places(action)
    H = max(horizon, int(action.sum(1).max()))
    return value.new_zeros((len(value), H)).index_put((rows, step), value[rows, at])


def at_tokens(value: Float[Tensor, "B H"], action: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Undoes `at_steps`: the number of each step at its token, 0 outside the mask."""
    rows, at, step = _places(action)
    return value.new_zeros(action.shape).index_put((rows, at), value[rows, step])


def _places(action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every action its row, its position, and the how manieth of its row it is, from 0."""
    rows, at = action.nonzero(as_tuple=True)
    return rows, at, (action.cumsum(1) - 1)[rows, at]


def _largest(score: Tensor, group: Tensor, rows: Tensor) -> Tensor:
    """For each row the largest magnitude among its group's scores."""
    names, index = torch.unique(group, return_inverse=True)
    empty = torch.zeros(len(names), dtype=score.dtype, device=score.device)
    return empty.scatter_reduce(0, index, torch.where(rows, score.abs(), torch.zeros_like(score)), "amax")[index]


def _sums(score: Tensor, group: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """For each row: the sum of its group's scores, how many there are, and whether the row has a verdict."""
    rows = torch.ones_like(score, dtype=torch.bool) if rows is None else rows
    names, index = torch.unique(group, return_inverse=True)
    empty = torch.zeros(len(names), dtype=score.dtype, device=score.device)
    total = empty.index_add(0, index, torch.where(rows, score, torch.zeros_like(score)))
    count = empty.index_add(0, index, rows.to(score.dtype))
    return total[index], count[index], rows


def _fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value}, but it is a fraction: give a number from 0 to 1")
