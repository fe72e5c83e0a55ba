"""Losses that learn from judgements: pairs (which of two is better) or single labels (good or bad).

The first three learn a reward. A Bradley-Terry reward is known only up to a constant a prompt, because only differences
enter; `centring` picks the constant. The others learn the policy itself, whose log-probabilities take the reward's
place. All losses are `[B]` and unreduced: sum them under `weights.per_row`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def bradley_terry(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    margin: int | float | Float[Tensor, "B"] = 0.0,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "B"]:
    """Minus the log-likelihood of the preferences under a Bradley-Terry model.

        ℓ = −(1 − ε) log σ(d) − ε log σ(−d),      d = r_chosen − r_rejected − m

    With ε = 0 and m = 0 this is the usual reward-model loss. ε is the share of labels believed to be flipped: the loss
    is then least at σ(d) = 1 − ε instead of at infinity.

    Args:
        chosen, rejected: the rewards of the two responses of each pair.
        margin: m, how much better the chosen one must be, in reward units.
        label_smoothing: ε, in [0, 0.5).

    Raises:
        ValueError: when label_smoothing is outside [0, 0.5): at 0.5 the labels say nothing.

    Source: Ouyang et al. 2022, eq. 1; the margin: Touvron et al. 2023 (Llama 2), eq. 2; the smoothing: Mitchell 2023,
    "A note on DPO with noisy preferences" (there for DPO's implicit reward).
    """
    _flips(label_smoothing)
    difference = chosen - rejected - margin
    if label_smoothing == 0:
        return -F.logsigmoid(difference)
    return -(1 - label_smoothing) * F.logsigmoid(difference) - label_smoothing * F.logsigmoid(-difference)


def pointwise(score: Float[Tensor, "B"], label: Float[Tensor, "B"] | Bool[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Minus the log-likelihood of good/bad labels of single responses: logistic regression on the reward.

        ℓ = −y log σ(r) − (1 − y) log σ(−r)

    Args:
        score: r, the reward of each response: the log-odds of "good".
        label: y, True or 1 for good, False or 0 for bad; a fraction is a soft label.

    Source: Bishop 2006, eq. 4.90 (the cross-entropy error of logistic regression).
    """
    return F.softplus(score) - label.to(score.dtype) * score


def both_sides(chosen: Float[Tensor, "B"], rejected: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """`pointwise` on the two sides of a pair, the chosen one good and the rejected one bad: a reward model as a
    classifier.

        ℓ = −½ log σ(r_chosen) − ½ log σ(−r_rejected)

    Here a reward has a zero, at which "chosen" is as likely as not, where `bradley_terry` leaves it open. Were the sides
    labelled one by one, σ(r_first − r_second) would be the probability that of two of which one is good it is the first.
    In comparisons a side is labelled against its opponent, and the classifier sees it against the average one, so that
    differences of its rewards come out smaller than the log-odds of the preference.

    Args:
        chosen, rejected: the rewards of the two responses of each pair.

    Returns:
        Nats; log 2 where both rewards are 0, as `bradley_terry`.

    Source: Sun, Shen & Ton 2024, "Rethinking Bradley-Terry models in preference-based reward modeling" (reward models
    as classifiers).
    """
    good, bad = torch.ones_like(chosen), torch.zeros_like(rejected)
    return 0.5 * (pointwise(chosen, good) + pointwise(rejected, bad))


def centring(chosen: Float[Tensor, "B"], rejected: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """A penalty that keeps rewards around zero without touching their differences.

        ℓ = (r_chosen + r_rejected)²

    Add it to `bradley_terry` with a small coefficient, 0.01 as a rule.

    Args:
        chosen, rejected: the rewards of the two responses of each pair.

    Returns:
        Reward units squared.

    Source: Eisenstein et al. 2023, "Helping or herding?", eq. 2.
    """
    return torch.square(chosen + rejected)


def ranked_right(chosen: Float[Tensor, "B"], rejected: Float[Tensor, "B"], tie: float = 0.0) -> Float[Tensor, "B"]:
    """Whether the rewards put the preferred response first: its mean is the accuracy.

        1 where r_chosen > r_rejected,  0 where r_chosen < r_rejected,  ½ where they are equal

    A half is what a coin would earn, so a reward that says nothing has accuracy ½ and not 0.

    Args:
        chosen, rejected: the rewards of the two responses of each pair.
        tie: a difference up to this counts as none, in reward units. An implicit reward is a difference of
            log-probabilities computed in different batches, and is 0 only up to their rounding.

    Raises:
        ValueError: when tie is negative.
    """
    if tie < 0:
        raise ValueError(f"tie={tie}: the largest difference that counts as none is at least 0")
    difference = chosen - rejected
    half = torch.full_like(difference, 0.5)
    return torch.where(difference.abs() <= tie, half, (difference > 0).to(difference.dtype))


# From here on the reward is the policy's own: nothing but log-probabilities of whole responses enters ---------------


def implicit_reward(logp: Float[Tensor, "B"], logp_ref: Float[Tensor, "B"], beta: float = 0.1) -> Float[Tensor, "B"]:
    """The reward under which a policy is the best there is for `E[r] − β KL(π ‖ ref)`, up to a constant a prompt.

        r̂ = β ( log π(y | x) − log ref(y | x) )

    Args:
        logp: log-probability (nats) of the whole response under π: the sum over its tokens.
        logp_ref: the same under the reference.
        beta: β, reward units a nat.

    Returns:
        Reward units; 0 where π is the reference.

    Raises:
        ValueError: when beta is not positive.

    Source: Rafailov et al. 2023, eq. 5, without β log Z(x), which every response to x shares.
    """
    _positive("beta", beta)
    return beta * (logp - logp_ref)


def dpo(
    logp_chosen: Float[Tensor, "B"],
    logp_rejected: Float[Tensor, "B"],
    logp_ref_chosen: Float[Tensor, "B"],
    logp_ref_rejected: Float[Tensor, "B"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "B"]:
    """Direct preference optimisation: `bradley_terry` of the implicit rewards, so that fitting the reward is solving
    the MDP.

        ℓ = −(1 − ε) log σ(d) − ε log σ(−d),      d = r̂_chosen − r̂_rejected

    Over all pairs of a prompt, labelled as a reward r would, it is least at π ∝ ref · exp(r / β), which is the best
    policy for r. Only the difference of the two log-ratios enters: nothing keeps the chosen response from becoming less
    likely as long as the rejected one does so faster.

    Args:
        logp_chosen, logp_rejected: log-probability (nats) of the whole responses under π; carry the gradient.
        logp_ref_chosen, logp_ref_rejected: the same under the reference.
        beta: β, reward units a nat.
        label_smoothing: ε, the share of labels believed to be flipped, in [0, 0.5); above 0 this is conservative DPO,
            least at σ(d) = 1 − ε instead of at infinity.

    Returns:
        Nats; log 2 where π is the reference.

    Raises:
        ValueError: when beta is not positive, or label_smoothing is outside [0, 0.5).

    Source: Rafailov et al. 2023, eq. 7; the smoothing: Mitchell 2023, "A note on DPO with noisy preferences", eq. 3.
    """
    chosen = implicit_reward(logp_chosen, logp_ref_chosen, beta)
    return bradley_terry(chosen, implicit_reward(logp_rejected, logp_ref_rejected, beta), 0.0, label_smoothing)


def robust_dpo(
    logp_chosen: Float[Tensor, "B"],
    logp_rejected: Float[Tensor, "B"],
    logp_ref_chosen: Float[Tensor, "B"],
    logp_ref_rejected: Float[Tensor, "B"],
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Float[Tensor, "B"]:
    """DPO whose expectation over labels flipped at a known rate is DPO on the true labels.

        ℓ = ( −(1 − ε) log σ(d) + ε log σ(−d) ) / (1 − 2 ε),      d = r̂_chosen − r̂_rejected

    With ℓ₀ the plain loss, (1 − ε) ℓ(d) + ε ℓ(−d) = ℓ₀(d): the flips cancel on average, at the price of more variance.
    It has no minimum in one pair alone, where it falls without bound as d grows; `dpo` with the same ε has one.

    Args:
        logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected, beta: as in `dpo`.
        label_smoothing: ε, the rate of flipped labels, in [0, 0.5).

    Returns:
        Nats; log 2 where π is the reference.

    Raises:
        ValueError: when beta is not positive, or label_smoothing is outside [0, 0.5).

    Source: Chowdhury, Kini & Natarajan 2024, "Provably robust DPO", eq. 12.
    """
    chosen = implicit_reward(logp_chosen, logp_ref_chosen, beta)
    rejected = implicit_reward(logp_rejected, logp_ref_rejected, beta)
    _flips(label_smoothing)
    kept, flipped = bradley_terry(chosen, rejected), bradley_terry(rejected, chosen)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(
    logp_chosen: Float[Tensor, "B"],
    logp_rejected: Float[Tensor, "B"],
    logp_ref_chosen: Float[Tensor, "B"],
    logp_ref_rejected: Float[Tensor, "B"],
    beta: float = 0.1,
) -> Float[Tensor, "B"]:
    """Identity preference optimisation: regress the difference of the log-ratios on a constant, so that even a
    preference that never varies asks for a finite one.

        ℓ = ( h − 1 / (2 β) )²,      h = log π(y_c)/ref(y_c) − log π(y_r)/ref(y_r)

    Of two responses of which one is preferred with probability p, it is least at h = (p − ½) / β.

    Args:
        logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected: as in `dpo`: sums over tokens.
        beta: the paper's τ, inverse nats.

    Returns:
        Nats squared; 1 / (4 β²) where π is the reference.

    Raises:
        ValueError: when beta is not positive.

    Source: Azar et al. 2024, "A general theoretical paradigm to understand learning from human preferences", eq. 17.
    Differs: none from the paper; some libraries put averages over tokens in place of the sums.
    """
    _positive("beta", beta)
    difference = (logp_chosen - logp_ref_chosen) - (logp_rejected - logp_ref_rejected)
    return torch.square(difference - 1 / (2 * beta))


def simpo(
    logp_chosen: Float[Tensor, "B"],
    logp_rejected: Float[Tensor, "B"],
    length_chosen: Int[Tensor, "B"],
    length_rejected: Int[Tensor, "B"],
    beta: float = 2.0,
    margin: float = 1.0,
) -> Float[Tensor, "B"]:
    """Simple preference optimisation: `bradley_terry` with the mean log-probability of a token as the reward, and no
    reference.

        ℓ = −log σ( β log π(y_c) / |y_c| − β log π(y_r) / |y_r| − γ )

    Args:
        logp_chosen, logp_rejected: log-probability (nats) of the whole responses under π; carry the gradient.
        length_chosen, length_rejected: |y|, tokens of each, at least 1.
        beta: β, reward units a nat; around 2, as means a token are small.
        margin: γ, reward units by which the chosen one must be better.

    Raises:
        ValueError: when beta is not positive, margin is negative, or a response has no token.

    Source: Meng et al. 2024, eq. 6.
    """
    _positive("beta", beta)
    if margin < 0:
        raise ValueError(f"margin={margin}: the chosen response must be better by at least 0; give 0 or more")
    chosen, rejected = _mean(logp_chosen, length_chosen), _mean(logp_rejected, length_rejected)
    return bradley_terry(beta * chosen, beta * rejected, margin)


def orpo(
    logp_chosen: Float[Tensor, "B"],
    logp_rejected: Float[Tensor, "B"],
    length_chosen: Int[Tensor, "B"],
    length_rejected: Int[Tensor, "B"],
    beta: float = 0.1,
) -> Float[Tensor, "B"]:
    """Odds-ratio preference optimisation: clone the chosen response, and weigh its odds against the rejected one's; no
    reference.

        ℓ = −log P_c − β log σ( log P_c/(1 − P_c) − log P_r/(1 − P_r) ),      P = exp( log π(y) / |y| )

    Args:
        logp_chosen, logp_rejected: log-probability (nats) of the whole responses under π; carry the gradient.
        length_chosen, length_rejected: |y|, tokens of each, at least 1.
        beta: the paper's λ, how much the odds count beside the cloning.

    Raises:
        ValueError: when beta is not positive, or a response has no token.

    Source: Hong, Lee & Thorne 2024, eq. 6, with eqs. 3, 4 and 7.
    """
    _positive("beta", beta)
    chosen, rejected = _mean(logp_chosen, length_chosen), _mean(logp_rejected, length_rejected)
    return -chosen + beta * bradley_terry(_log_odds(chosen), _log_odds(rejected))


def kto_reference(logp: Float[Tensor, "B"], logp_ref: Float[Tensor, "B"]) -> Float[Tensor, ""]:
    """The reference point of `kto`: how far the policy has moved anyway, which a good response must exceed.

        z = max( 0, mean_i ( log π(y_j | x_i) − log ref(y_j | x_i) ) ),      y_j a response to another prompt than x_i

    A coarse estimate of KL(π ‖ ref) that needs no sampling, clamped as a divergence is. It compares rows, so it is made
    once, from the whole batch of an optimiser step, before the learner sees any part of it.

    Args:
        logp: log-probability (nats) of mismatched responses under π.
        logp_ref: the same under the reference.

    Returns:
        Nats, one number; carries no gradient.

    Raises:
        ValueError: when there is no mismatched response.

    Source: Ethayarajh et al. 2024 (KTO), section 4.1, the estimate of z₀.
    """
    if len(logp) == 0:
        raise ValueError("no mismatched response to estimate the reference point from: give a batch of at least 2 rows")
    return (logp - logp_ref).detach().mean().clamp(min=0)


def kto(
    logp: Float[Tensor, "B"],
    logp_ref: Float[Tensor, "B"],
    label: Bool[Tensor, "B"],
    reference_point: Float[Tensor, "B"] | Float[Tensor, ""] | float,
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Float[Tensor, "B"]:
    """Kahneman-Tversky optimisation: gains and losses of single responses against a reference point, each with
    diminishing sensitivity.

        ℓ = λ_D ( 1 − σ( r̂ − β z ) )  where the label is good,      λ_U ( 1 − σ( β z − r̂ ) )  where it is bad

    Args:
        logp: log-probability (nats) of the whole response under π; carries the gradient.
        logp_ref: the same under the reference.
        label: True for good.
        reference_point: z, nats, from `kto_reference` of the whole batch; a constant, or the same one in each row.
        beta: β, reward units a nat.
        desirable, undesirable: λ_D and λ_U, what a gain and a loss are worth. To balance labels of unequal number,
            choose them so that λ_D n_D / (λ_U n_U) lies between 1 and 4/3 (the paper's last version: 3/2).

    Returns:
        Between 0 and λ; λ / 2 where π is the reference and z = 0.

    Raises:
        ValueError: when beta is not positive, or a weight is negative.

    Source: Ethayarajh et al. 2024 (KTO), arXiv version 1, eq. 7; the balance of the weights: eq. 8 (eq. 9 in the last).
    """
    for name, value in (("desirable", desirable), ("undesirable", undesirable)):
        if value < 0:
            raise ValueError(f"{name}={value}: the weight of a kind of label is at least 0")
    if isinstance(reference_point, Tensor):
        reference_point = reference_point.detach()
    gain = implicit_reward(logp, logp_ref, beta) - beta * reference_point
    # 1 − σ(x) = σ(−x)
    return torch.where(label, desirable * torch.sigmoid(-gain), undesirable * torch.sigmoid(gain))


def _mean(logp: Tensor, length: Tensor) -> Tensor:
    if bool((length < 1).any()):
        row = int((length < 1).nonzero()[0])
        raise ValueError(f"the response of row {row} has no token, so no mean log-probability: drop the row")
    return logp / length


def _log_odds(logp: Tensor) -> Tensor:
    """log p/(1 − p) from log p; finite at p = 1, where the odds are not."""
    below = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return below - torch.log(-torch.expm1(below))


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value}, but it must be positive: give e.g. 0.1")


def _flips(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: the share of flipped labels is at least 0 and below 0.5")
