"""Policy losses: by hand, their gradients, and that constants are constants."""

from __future__ import annotations

import math

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from tokenmdp.functional import policy_loss

F64 = torch.float64


def vector(*x: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(x, dtype=F64, requires_grad=grad)


def test_reinforce_by_hand() -> None:
    logp = vector(-1.0, -2.0, 0.0, grad=True)
    loss = policy_loss.reinforce(logp, vector(3.0, -0.5, 0.0))
    assert loss.tolist() == [3.0, -1.0, 0.0]  # −3·(−1), 0.5·(−2), nothing outside the mask
    loss.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [-3.0, 0.5, 0.0]


def test_ppo_by_hand() -> None:
    # ratios 1.5, 1.5, 0.5, 0.5, 1.1 with advantages +1, −1, +1, −1, +2 and ε = 0.2
    #   +1, 1.5: min(1.5, 1.2) = 1.2   clipped     −1, 1.5: min(−1.5, −1.2) = −1.5   not clipped
    #   +1, 0.5: min(0.5, 0.8) = 0.5   not         −1, 0.5: min(−0.5, −0.8) = −0.8   clipped
    #   +2, 1.1: 2.2                   not
    ratio, advantage = vector(1.5, 1.5, 0.5, 0.5, 1.1), vector(1.0, -1.0, 1.0, -1.0, 2.0)
    logp = ratio.log().requires_grad_()
    loss, clipped = policy_loss.ppo_clip(logp, torch.zeros(5, dtype=F64), advantage, 0.2)
    torch.testing.assert_close(loss, vector(-1.2, 1.5, -0.5, 0.8, -2.2))
    assert clipped.tolist() == [True, False, False, True, False]
    loss.sum().backward()
    # unclipped: −A ρ; clipped: none
    torch.testing.assert_close(logp.grad, vector(0.0, 1.5, -0.5, 0.0, -2.2))


def test_two_sided_and_absent_clipping() -> None:
    logp, old = vector(math.log(1.25), math.log(0.75)), vector(0.0, 0.0)
    advantage = vector(1.0, -1.0)
    # up to 1.3 is allowed above, down to 0.8 below
    loss, clipped = policy_loss.ppo_clip(logp, old, advantage, 0.2, 0.3)
    torch.testing.assert_close(loss, vector(-1.25, 0.8))
    assert clipped.tolist() == [False, True]
    loss, clipped = policy_loss.ppo_clip(logp, old, advantage, None)
    torch.testing.assert_close(loss, vector(-1.25, 0.75))
    assert not clipped.any()
    with pytest.raises(ValueError, match="clip=0"):
        policy_loss.ppo_clip(logp, old, advantage, 0.0)
    with pytest.raises(ValueError, match="clip_high=-1"):
        policy_loss.ppo_clip(logp, old, advantage, 0.2, -1.0)
    with pytest.raises(ValueError, match="without clip"):
        policy_loss.ppo_clip(logp, old, advantage, None, 0.3)


def test_at_ratio_one_ppo_has_reinforces_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    logp = -torch.rand(3, 4, generator=draw, dtype=F64)
    advantage = torch.randn(3, 4, generator=draw, dtype=F64)
    a, b = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss, clipped = policy_loss.ppo_clip(a, logp, advantage)
    loss.sum().backward()
    policy_loss.reinforce(b, advantage).sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert not clipped.any()
    torch.testing.assert_close(loss.detach(), -advantage)


def test_value_clip_by_hand() -> None:
    # target 1, old 0, ε = 0.2. V = 0.5: clipped to 0.2, ½ max(0.25, 0.64) = 0.32, no gradient.
    # V = −0.5: clipped to −0.2, ½ max(2.25, 1.44) = 1.125, gradient V − R = −1.5. V = 0.1: ½·0.81, gradient −0.9.
    value = vector(0.5, -0.5, 0.1, grad=True)
    loss = policy_loss.value_clip(value, vector(0, 0, 0), vector(1, 1, 1), 0.2)
    torch.testing.assert_close(loss, vector(0.32, 1.125, 0.405))
    loss.sum().backward()
    torch.testing.assert_close(value.grad, vector(0.0, -1.5, -0.9))
    plain = policy_loss.value_clip(vector(0.5, 0.0), vector(9, 9), vector(1, 0), None)
    torch.testing.assert_close(plain, vector(0.125, 0.0))
    with pytest.raises(ValueError, match="clip=-1"):
        policy_loss.value_clip(value, value, value, -1.0)


def test_constants_are_constants() -> None:
    advantage, old, target = vector(1.0, grad=True), vector(-1.0, grad=True), vector(2.0, grad=True)
    logp, value = vector(-1.0, grad=True), vector(0.0, grad=True)
    total = policy_loss.reinforce(logp, advantage) + policy_loss.ppo_clip(logp, old, advantage)[0]
    (total + policy_loss.value_clip(value, old, target)).sum().backward()
    assert advantage.grad is None
    assert old.grad is None
    assert target.grad is None
    assert logp.grad is not None
    assert value.grad is not None


def test_zero_outside_the_mask_finite_everywhere_and_the_dtype_kept() -> None:
    for dtype in (torch.float32, F64):
        # position 0 is outside; the other two are ratios of e^±500, which no dtype's exponential should turn into inf
        logp = torch.tensor([0.0, -500.0, 0.0], dtype=dtype)
        old = torch.tensor([0.0, 0.0, -500.0], dtype=dtype)
        advantage = torch.tensor([0.0, 1.0, -1.0], dtype=dtype)
        for clip in (0.2, None):
            loss, _ = policy_loss.ppo_clip(logp, old, advantage, clip)
            assert loss.dtype == dtype
            assert float(loss[0]) == 0
            assert bool(torch.isfinite(loss).all())
        assert policy_loss.value_clip(logp * 0, old * 0, advantage * 0).dtype == dtype
        assert float(policy_loss.value_clip(logp, old, advantage)[0]) == 0


def test_shapes_are_what_the_signatures_say() -> None:
    ppo = jaxtyped(typechecker=beartype)(policy_loss.ppo_clip)
    loss, clipped = ppo(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    assert loss.shape == clipped.shape == (2, 3)
    with pytest.raises(TypeCheckError):
        ppo(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1))


# -- one ratio a response, bounded weights -------------------------------------------------------------------------------


def grouped(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logp, logp_old, advantage, action of three responses of 4, 2 and 3 tokens after one token of prefix."""
    draw = torch.Generator().manual_seed(seed)
    action = torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
    action[:, 0] = False
    logp, old = (-torch.rand(3, 5, generator=draw, dtype=F64) * action for _ in range(2))
    advantage = torch.where(action, torch.randn(3, 1, generator=draw, dtype=F64).expand(3, 5), 0.0)
    return logp.requires_grad_(), old, advantage, action


def test_gspo_by_hand() -> None:
    # Row 0: ratios 2 and ½, mean log 0, so s = 1 on both tokens. Row 1: ratios 4 and 1, s = sqrt(4 · 1) = 2; row 2: s = ½.
    # ε = 0.5: A = 1 is held at 1.5 in row 1; A = −1 is held at ½ only below it, and row 2 lies on the bound.
    ratio = torch.tensor([[2.0, 0.5], [4.0, 1.0], [0.25, 1.0]], dtype=F64)
    logp, action = ratio.log().requires_grad_(), torch.ones(3, 2, dtype=torch.bool)
    advantage = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]], dtype=F64)
    loss, clipped = policy_loss.gspo(logp, torch.zeros(3, 2, dtype=F64), advantage, action, 0.5)
    torch.testing.assert_close(loss, torch.tensor([[-1.0, -1.0], [-1.5, -1.5], [0.5, 0.5]], dtype=F64))
    assert clipped.tolist() == [[False, False], [True, True], [False, False]]
    loss.sum().backward()
    # each token's gradient is −s A, whatever its own ratio; none where clipped
    torch.testing.assert_close(logp.grad, torch.tensor([[-1.0, -1.0], [0.0, 0.0], [0.5, 0.5]], dtype=F64))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_gspos_token_form_has_the_value_and_gradient_of_the_responses_own_surrogate(clip: float | None) -> None:
    """Under weights 1/(N |y|), Zheng et al. 2025: section 4.3 against eq. 5, written out."""
    logp, old, advantage, action = grouped()
    length = action.sum(1, keepdim=True)
    loss, clipped = policy_loss.gspo(logp, old, advantage, action, clip)
    (mine,) = torch.autograd.grad((loss / (3 * length)).sum(), logp)
    ratio = (((logp - old) * action).sum(1) / length[:, 0]).exp()
    limited = ratio if clip is None else ratio.clamp(1 - clip, 1 + clip)
    whole = -torch.minimum(ratio * advantage[:, 1], limited * advantage[:, 1]).mean()
    (want,) = torch.autograd.grad(whole, logp)
    torch.testing.assert_close((loss / (3 * length)).sum(), whole)
    torch.testing.assert_close(mine, want)
    assert bool(clipped.any()) == (clip is not None)
    assert not bool(loss[~action].any())
    assert not bool(clipped[~action].any())


def test_cispo_by_hand() -> None:
    # ratios 8, 1.5, 0.1 with bounds [0.5, 5]: weights 5, 1.5, 0.5. ℓ = −w A log π, gradient −w A
    old = vector(-3.0, -2.0, -1.0)
    logp = (old + vector(8.0, 1.5, 0.1).log()).requires_grad_()
    advantage = vector(1.0, -2.0, 1.0)
    loss, clipped = policy_loss.cispo(logp, old, advantage, 0.5, 4.0)
    torch.testing.assert_close(loss, -vector(5.0, 1.5, 0.5) * advantage * logp.detach())
    assert clipped.tolist() == [True, False, True]
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, vector(-5.0, 3.0, -0.5))
    # without bounds, and with the upper one alone
    assert not policy_loss.cispo(logp, old, advantage, None, None)[1].any()
    assert policy_loss.cispo(logp, old, advantage)[1].tolist() == [True, False, False]


def test_at_ratio_one_gspo_and_cispo_have_reinforces_gradient() -> None:
    logp, _, advantage, action = grouped()
    (want,) = torch.autograd.grad(policy_loss.reinforce(logp, advantage).sum(), logp)
    for loss, clipped in (
        policy_loss.gspo(logp, logp.detach(), advantage, action),
        policy_loss.cispo(logp, logp.detach(), advantage),
    ):
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), logp)[0], want)
        assert not clipped.any()


def test_inside_its_range_cispo_has_the_gradient_of_the_unclipped_ratio() -> None:
    logp, old, advantage, _ = grouped()
    (mine,) = torch.autograd.grad(policy_loss.cispo(logp, old, advantage, None, 100.0)[0].sum(), logp)
    (want,) = torch.autograd.grad(policy_loss.ppo_clip(logp, old, advantage, None)[0].sum(), logp)
    torch.testing.assert_close(mine, want)


@pytest.mark.parametrize(("clip", "high", "says"), [(0.0, None, "clip=0"), (0.2, -1.0, "clip_high=-1")])
def test_ranges_are_positive(clip: float, high: float | None, says: str) -> None:
    logp, old, advantage, action = grouped()
    with pytest.raises(ValueError, match=says):
        policy_loss.gspo(logp, old, advantage, action, clip, high)
    with pytest.raises(ValueError, match=says):
        policy_loss.cispo(logp, old, advantage, clip, high)


def test_far_ratios_stay_finite() -> None:
    for dtype in (torch.float32, F64):
        logp = torch.tensor([[0.0, -500.0, 0.0]], dtype=dtype)
        old, advantage = logp.flip(1), torch.tensor([[0.0, 1.0, -1.0]], dtype=dtype)
        action = torch.tensor([[False, True, True]])
        old = torch.where(action, old, 0.0)
        for loss, _ in (
            policy_loss.gspo(logp, old, advantage, action, None),
            policy_loss.cispo(logp, old, advantage, None, None),
        ):
            assert loss.dtype == dtype
            assert float(loss[0, 0]) == 0
            assert bool(torch.isfinite(loss).all())
    # a row without a single action has a mean over nothing: 0, not NaN
    none = torch.zeros(1, 3, dtype=torch.bool)
    assert policy_loss.gspo(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, 3), none)[0].tolist() == [[0, 0, 0]]
