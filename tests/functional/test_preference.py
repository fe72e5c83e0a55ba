"""Losses of judgements: by hand, where their minimum lies, their symmetries, and no overflow."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from tokenmdp.functional import preference

F64 = torch.float64


def vector(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


def test_bradley_terry_by_hand() -> None:
    # equal rewards: −log ½. A difference of log 3: σ = ¾, −log ¾
    loss = preference.bradley_terry(vector(1.0, math.log(3)), vector(1.0, 0.0))
    torch.testing.assert_close(loss, vector(math.log(2), math.log(4 / 3)))
    # a margin of log 3 takes that difference away again
    loss = preference.bradley_terry(vector(math.log(3), 2.0), vector(0.0, 2.0), margin=vector(math.log(3), 0.0))
    torch.testing.assert_close(loss, vector(math.log(2), math.log(2)))
    # ε = 0.1 at σ = ¾: −0.9 log ¾ − 0.1 log ¼
    loss = preference.bradley_terry(vector(math.log(3)), vector(0.0), label_smoothing=0.1)
    torch.testing.assert_close(loss, vector(-0.9 * math.log(0.75) - 0.1 * math.log(0.25)))


def test_smoothing_puts_the_minimum_at_the_believed_flip_rate() -> None:
    # ∂ℓ/∂d = σ(d) − (1 − ε) vanishes at σ(d) = 0.9, d = log 9
    d = torch.tensor([math.log(9.0)], dtype=F64, requires_grad=True)
    preference.bradley_terry(d, vector(0.0), label_smoothing=0.1).sum().backward()
    assert d.grad is not None
    assert float(d.grad) == pytest.approx(0, abs=1e-12)
    for bad in (-0.1, 0.5, 1.0):
        with pytest.raises(ValueError, match="label_smoothing"):
            preference.bradley_terry(vector(1.0), vector(0.0), label_smoothing=bad)


def test_only_differences_matter_and_centring_settles_the_rest() -> None:
    chosen, rejected = vector(2.0, -1.0), vector(1.0, 3.0)
    torch.testing.assert_close(
        preference.bradley_terry(chosen + 5, rejected + 5), preference.bradley_terry(chosen, rejected)
    )
    assert preference.centring(chosen, rejected).tolist() == [9.0, 4.0]  # (2+1)², (−1+3)²
    assert preference.centring(chosen, -chosen).tolist() == [0.0, 0.0]


def test_the_two_orders_of_a_pair_are_one_probability() -> None:
    a, b = vector(0.3, 4.0, -2.0), vector(1.0, 1.0, 1.0)
    there, back = preference.bradley_terry(a, b), preference.bradley_terry(b, a)
    torch.testing.assert_close((-there).exp() + (-back).exp(), vector(1, 1, 1))


def test_pointwise_by_hand() -> None:
    # r = log 3: σ = ¾. Good: −log ¾; bad: −log ¼; half-good: the mean of the two
    score = vector(math.log(3), math.log(3), math.log(3))
    loss = preference.pointwise(score, vector(1.0, 0.0, 0.5))
    good, bad = math.log(4 / 3), math.log(4)
    torch.testing.assert_close(loss, vector(good, bad, (good + bad) / 2))
    torch.testing.assert_close(preference.pointwise(score, torch.tensor([True, False, True]))[:2], vector(good, bad))


def test_a_tie_is_ranked_right_one_time_in_two() -> None:
    chosen, rejected = vector(2.0, 1.0, 1.0, 1.0), vector(1.0, 1.0, 1.05, 2.0)
    assert preference.ranked_right(chosen, rejected).tolist() == [1.0, 0.5, 0.0, 0.0]
    assert preference.ranked_right(chosen, rejected, tie=0.1).tolist() == [1.0, 0.5, 0.5, 0.0]
    with pytest.raises(ValueError, match="tie=-1"):
        preference.ranked_right(chosen, rejected, tie=-1)


def test_large_rewards_stay_finite_and_the_dtype_is_kept() -> None:
    for dtype in (torch.float32, F64):
        far = torch.tensor([1e4, -1e4], dtype=dtype)
        for loss in (
            preference.bradley_terry(far, -far),
            preference.bradley_terry(far, -far, label_smoothing=0.2),
            preference.pointwise(far, torch.tensor([False, True])),
            preference.centring(far, far),
        ):
            assert loss.dtype == dtype
            assert bool(torch.isfinite(loss).all())


def test_shapes_are_what_the_signatures_say() -> None:
    check = jaxtyped(typechecker=beartype)
    assert check(preference.bradley_terry)(torch.zeros(3), torch.zeros(3), torch.zeros(3)).shape == (3,)
    for f in (preference.bradley_terry, preference.centring, preference.pointwise):
        with pytest.raises(TypeCheckError):
            check(f)(torch.zeros(3), torch.zeros(4))


# -- the policy's own log-probabilities as the reward -------------------------------------------------------------------

PAIR = (vector(-1.0, -2.0), vector(-3.0, -1.0), vector(-2.0, -2.0), vector(-2.0, -3.0))  # chosen, rejected, both of ref
PAIRWISE = {
    "dpo": preference.dpo,
    "cdpo": partial(preference.dpo, label_smoothing=0.1),
    "robust": preference.robust_dpo,
    "ipo": preference.ipo,
}


def test_the_implicit_reward_by_hand() -> None:
    # 0.5 · (−1 + 2) and 0.5 · (−2 + 2)
    assert preference.implicit_reward(PAIR[0], PAIR[2], beta=0.5).tolist() == [0.5, 0.0]


def test_dpo_by_hand() -> None:
    # log-ratios: chosen 1 and 0, rejected −1 and 2; h = 2 and −2. β = log(3)/2 gives d = log 3 and −log 3: σ = ¾ and ¼
    beta = math.log(3) / 2
    loss = preference.dpo(*PAIR, beta)
    torch.testing.assert_close(loss, vector(-math.log(0.75), -math.log(0.25)))
    # ε = 0.1: −0.9 log ¾ − 0.1 log ¼ and the other way round
    smooth = preference.dpo(*PAIR, beta, label_smoothing=0.1)
    want = [-0.9 * math.log(a) - 0.1 * math.log(1 - a) for a in (0.75, 0.25)]
    torch.testing.assert_close(smooth, vector(*want))
    # robust: (0.9 ℓ(d) − 0.1 ℓ(−d)) / 0.8
    robust = preference.robust_dpo(*PAIR, beta, label_smoothing=0.1)
    torch.testing.assert_close(
        robust, vector(*[(-0.9 * math.log(a) + 0.1 * math.log(1 - a)) / 0.8 for a in (0.75, 0.25)])
    )


def test_ipo_by_hand() -> None:
    # h = 2 and −2 against 1/(2·0.5) = 1: 1 and 9
    assert preference.ipo(*PAIR, beta=0.5).tolist() == [1.0, 9.0]


def test_simpo_by_hand() -> None:
    # means −0.5 and −1.5, β = 2: a difference of 2, less γ = 2: −log ½. With γ = 2 − log 3: −log ¾
    args = (vector(-1.0), vector(-3.0), torch.tensor([2]), torch.tensor([2]))
    torch.testing.assert_close(preference.simpo(*args, beta=2.0, margin=2.0), vector(math.log(2)))
    torch.testing.assert_close(preference.simpo(*args, beta=2.0, margin=2 - math.log(3)), vector(-math.log(0.75)))


def test_orpo_by_hand() -> None:
    # P_c = ½ (odds 1), P_r = ¼ (odds ⅓): an odds ratio of 3, σ = ¾. The cloning part is log 2.
    args = (vector(2 * math.log(0.5)), vector(3 * math.log(0.25)), torch.tensor([2]), torch.tensor([3]))
    torch.testing.assert_close(preference.orpo(*args, beta=0.3), vector(math.log(2) - 0.3 * math.log(0.75)))


def test_kto_by_hand() -> None:
    # r̂ − βz = log 3 · (1 − 0) = log 3 and log 3 · (0 − 1) = −log 3 ...
    logp, logp_ref, beta = vector(-1.0, -2.0, -1.0, -2.0), vector(-2.0, -3.0, -2.0, -3.0), math.log(3)
    label = torch.tensor([True, True, False, False])
    z = vector(0.0, 2.0, 0.0, 2.0)
    loss = preference.kto(logp, logp_ref, label, z, beta, desirable=1.0, undesirable=2.0)
    # good: 1 − ¾ and 1 − ¼; bad, twice as heavy: 1 − ¼ and 1 − ¾
    torch.testing.assert_close(loss, vector(0.25, 0.75, 1.5, 0.5))


def test_the_reference_point_is_one_clamped_mean_without_gradient() -> None:
    logp = vector(-1.0, -2.0).requires_grad_()
    z = preference.kto_reference(logp, vector(-2.0, -5.0))  # (1 + 3) / 2
    assert (float(z), z.requires_grad) == (2.0, False)
    assert float(preference.kto_reference(vector(-3.0), vector(-1.0))) == 0.0
    with pytest.raises(ValueError, match="no mismatched response"):
        preference.kto_reference(vector(), vector())
    # and none flows through it into the loss
    z = vector(2.0).requires_grad_()
    preference.kto(vector(-1.0).requires_grad_(), vector(-1.0), torch.tensor([True]), z).sum().backward()
    assert z.grad is None


def test_where_policy_and_reference_are_one_nothing_is_known_yet() -> None:
    same = (PAIR[2], PAIR[3], PAIR[2], PAIR[3])
    for name, want in (("dpo", math.log(2)), ("cdpo", math.log(2)), ("robust", math.log(2)), ("ipo", 1 / (4 * 0.2**2))):
        torch.testing.assert_close(PAIRWISE[name](*same, beta=0.2), vector(want, want))
    loss = preference.kto(PAIR[2], PAIR[2], torch.tensor([True, False]), 0.0, desirable=2.0)
    assert loss.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("name", PAIRWISE)
def test_only_the_log_ratios_enter_and_only_their_difference(name: str) -> None:
    chosen, rejected, ref_chosen, ref_rejected = PAIR
    want = PAIRWISE[name](*PAIR, beta=0.3)
    torch.testing.assert_close(PAIRWISE[name](chosen - 4, rejected, ref_chosen - 4, ref_rejected, beta=0.3), want)
    torch.testing.assert_close(PAIRWISE[name](chosen - 4, rejected - 4, ref_chosen, ref_rejected, beta=0.3), want)


def test_the_two_orders_of_a_pair() -> None:
    chosen, rejected, ref_chosen, ref_rejected = PAIR
    swapped = (rejected, chosen, ref_rejected, ref_chosen)
    there, back = preference.dpo(*PAIR), preference.dpo(*swapped)
    torch.testing.assert_close((-there).exp() + (-back).exp(), vector(1, 1))  # one probability
    # (h − c)² − (−h − c)² = −4 h c with c = 1/(2β): −2 h / β, h = 2 and −2
    torch.testing.assert_close(preference.ipo(*PAIR, beta=0.5) - preference.ipo(*swapped, beta=0.5), vector(-8, 8))
    # robust DPO undoes the flips on average: (1 − ε) ℓ(d) + ε ℓ(−d) is the plain loss
    for flips in (0.0, 0.1, 0.4):
        mixed = (1 - flips) * preference.robust_dpo(*PAIR, label_smoothing=flips)
        mixed = mixed + flips * preference.robust_dpo(*swapped, label_smoothing=flips)
        torch.testing.assert_close(mixed, there)
    # the two labels of one response share λ: 1 − σ(x) + 1 − σ(−x)
    good = preference.kto(chosen, ref_chosen, torch.tensor([True, True]), 0.7)
    bad = preference.kto(chosen, ref_chosen, torch.tensor([False, False]), 0.7)
    torch.testing.assert_close(good + bad, vector(1, 1))


def preferences_of(reward: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All ordered pairs of responses, and how often the first is preferred under Bradley-Terry."""
    first, second = torch.tensor([(i, j) for i in range(len(reward)) for j in range(len(reward)) if i != j]).T
    return first, second, torch.sigmoid(reward[first] - reward[second])


@pytest.mark.parametrize("name", ["dpo", "robust"])
def test_the_optimum_of_dpo_is_the_reference_tilted_by_the_reward(name: str) -> None:
    """On every pair of five responses, as often as a reward prefers it: least at π ∝ ref · exp(r / β) and nowhere else.

    In the logits the loss is convex, so a vanishing gradient is the minimum. Robust DPO meets labels flipped one time in
    five and finds the same policy.
    """
    rng = torch.Generator().manual_seed(0)
    logp_ref = torch.randn(5, generator=rng, dtype=F64).log_softmax(0)
    reward, beta = torch.randn(5, generator=rng, dtype=F64), 0.4
    first, second, p = preferences_of(reward)
    flips = 0.2 if name == "robust" else 0.0
    seen = (1 - flips) * p + flips * (1 - p)

    def population(logits: torch.Tensor) -> torch.Tensor:
        logp = logits.log_softmax(0)
        sides = (logp[first], logp[second], logp_ref[first], logp_ref[second])
        if name == "robust":
            return (seen * preference.robust_dpo(*sides, beta, flips)).sum()
        return (seen * preference.dpo(*sides, beta)).sum()

    best = (logp_ref + reward / beta).log_softmax(0)
    at = best.clone().requires_grad_()
    population(at).backward()
    assert at.grad is not None
    assert float(at.grad.abs().max()) < 1e-12
    for _ in range(20):
        other = best + 0.3 * torch.randn(5, generator=rng, dtype=F64)
        assert float(population(other)) > float(population(best))


def test_the_optimum_of_ipo_is_finite_also_for_a_preference_that_never_varies() -> None:
    # preferred with probability p: h* = (p − ½) / β, here β = 0.25: 2 for p = 1 and 0.8 for p = 0.7
    for p, want in ((1.0, 2.0), (0.7, 0.8)):
        h = torch.tensor([want], dtype=F64, requires_grad=True)
        zero = vector(0.0)
        loss = p * preference.ipo(h, zero, zero, zero, 0.25) + (1 - p) * preference.ipo(zero, h, zero, zero, 0.25)
        loss.sum().backward()
        assert h.grad is not None
        assert float(h.grad) == pytest.approx(0, abs=1e-12)


def test_what_lies_outside_its_range_is_an_error() -> None:
    lengths = (torch.tensor([2, 1]), torch.tensor([1, 3]))
    label = torch.tensor([True, False])
    for beta in (0.0, -0.1, math.nan):
        for call in (
            *(partial(loss, *PAIR) for loss in PAIRWISE.values()),
            partial(preference.simpo, *PAIR[:2], *lengths),
            partial(preference.orpo, *PAIR[:2], *lengths),
            partial(preference.kto, *PAIR[:2], label, 0.0),
            partial(preference.implicit_reward, *PAIR[:2]),
        ):
            with pytest.raises(ValueError, match="beta="):
                call(beta=beta)
    for loss in (preference.dpo, preference.robust_dpo):
        for flips in (-0.1, 0.5, 0.7):
            with pytest.raises(ValueError, match="label_smoothing"):
                loss(*PAIR, label_smoothing=flips)
    with pytest.raises(ValueError, match="margin=-1"):
        preference.simpo(*PAIR[:2], *lengths, margin=-1)
    with pytest.raises(ValueError, match="undesirable=-1"):
        preference.kto(*PAIR[:2], label, 0.0, undesirable=-1)
    for mean in (preference.simpo, preference.orpo):
        with pytest.raises(ValueError, match="row 1 has no token"):
            mean(*PAIR[:2], torch.tensor([2, 0]), torch.tensor([2, 2]))


def test_certain_and_impossible_responses_stay_finite() -> None:
    for dtype in (torch.float32, F64):
        chosen = torch.tensor([0.0, -1e4], dtype=dtype, requires_grad=True)
        rejected, zero, one = torch.tensor([-1e4, 0.0], dtype=dtype), torch.zeros(2, dtype=dtype), torch.tensor([1, 1])
        losses = [
            preference.dpo(chosen, rejected, zero, zero),
            preference.robust_dpo(chosen, rejected, zero, zero),
            preference.ipo(chosen, rejected, zero, zero),
            preference.simpo(chosen, rejected, one, one),
            preference.orpo(chosen, rejected, one, one),
            preference.kto(chosen, zero, torch.tensor([True, False]), 0.0),
        ]
        for loss in losses:
            assert loss.dtype == dtype
            assert bool(torch.isfinite(loss).all())
            (gradient,) = torch.autograd.grad(loss.sum(), chosen)
            assert bool(torch.isfinite(gradient).all())


def test_shapes_of_the_policys_losses() -> None:
    check = jaxtyped(typechecker=beartype)
    x, n = torch.zeros(3), torch.ones(3, dtype=torch.long)
    for paired in (preference.dpo, preference.robust_dpo, preference.ipo):
        assert check(paired)(x, x, x, x).shape == (3,)
        with pytest.raises(TypeCheckError):
            check(paired)(x, x, x, torch.zeros(4))
    for free in (preference.simpo, preference.orpo):
        assert check(free)(x - 1, x - 1, n, n).shape == (3,)
        with pytest.raises(TypeCheckError):
            check(free)(x, x, n, torch.ones(4, dtype=torch.long))
    assert check(preference.kto)(x, x, n > 0, x).shape == (3,)
    assert check(preference.kto_reference)(x, x).shape == ()


def test_both_sides_of_a_pair_are_classified() -> None:
    """r = 1 and −2: −½ log σ(1) − ½ log σ(2) = (0.3133 + 0.1269) / 2. With 0 and 0 it is log 2, as Bradley-Terry."""
    value = preference.both_sides(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0]))
    torch.testing.assert_close(value, torch.tensor([0.2201, math.log(2)]), atol=1e-4, rtol=0)
