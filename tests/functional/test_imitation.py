"""Behaviour cloning and its identity with policy gradient; divergences from a teacher: by hand, their laws and limits."""

from __future__ import annotations

import math

import pytest
import torch

from tokenmdp.functional import imitation, kl, policy_loss


def test_by_hand() -> None:
    # tokens of probability ½ and ¼, and one outside the mask
    logp = torch.tensor([[0.0, 0.5, 0.25]], dtype=torch.float64).clamp(min=1e-300).log()
    logp[0, 0] = 0.0
    loss = imitation.nll(logp)
    torch.testing.assert_close(loss, torch.tensor([[0, math.log(2), math.log(4)]], dtype=torch.float64))
    assert loss.dtype == torch.float64
    assert imitation.nll(logp.float()).dtype == torch.float32


def test_cloning_is_policy_gradient_with_reward_one_on_the_demonstrations() -> None:
    logp = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    a, b = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    imitation.nll(a).sum().backward()
    policy_loss.reinforce(b, torch.ones_like(logp)).sum().backward()
    assert torch.equal(a.grad, b.grad)


# Two distributions over two tokens, π = (½, ½) and P = (¾, ¼), worked out by hand.
PI = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
P = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
DIVERGENCES = ("forward", "reverse", "tv", "js", "js:0.1", "js:0.9")


def test_divergences_by_hand() -> None:
    log = math.log
    assert float(imitation.divergence("forward")(PI, P)) == pytest.approx(0.75 * log(1.5) + 0.25 * log(0.5))
    assert float(imitation.divergence("reverse")(PI, P)) == pytest.approx(0.5 * log(2 / 3) + 0.5 * log(2))
    assert float(imitation.total_variation(PI, P)) == pytest.approx(0.25)
    # The mixture of ¼ P and ¾ π is (9/16, 7/16).
    p_to_m = 0.75 * log((3 / 4) / (9 / 16)) + 0.25 * log((1 / 4) / (7 / 16))
    pi_to_m = 0.5 * log((1 / 2) / (9 / 16)) + 0.5 * log((1 / 2) / (7 / 16))
    assert float(imitation.jensen_shannon(PI, P, 0.25)) == pytest.approx(0.25 * p_to_m + 0.75 * pi_to_m)
    assert float(imitation.divergence("js:0.25")(PI, P)) == float(imitation.jensen_shannon(PI, P, 0.25))


def test_two_that_exclude_each_other_are_as_far_apart_as_can_be() -> None:
    # P is certain of the first token, π of the second, and both exclude the third. M = (β, 1 − β, 0).
    out = -math.inf
    p, pi = torch.tensor([0.0, out, out], dtype=torch.float64), torch.tensor([out, 0.0, out], dtype=torch.float64)
    pi.requires_grad_()
    for beta in (0.5, 0.2):
        most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert float(imitation.jensen_shannon(pi.detach(), p, beta)) == pytest.approx(most)
    assert float(imitation.total_variation(pi.detach(), p)) == pytest.approx(1.0)
    imitation.jensen_shannon(pi, p).backward()
    assert pi.grad is not None
    assert bool(torch.isfinite(pi.grad).all())


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """[7, 5] of each; of the last row both are the same up to a constant."""
    rng = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(7, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    b[-1] = a[-1] + 2.0
    return a, b


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_unreduced_never_negative_and_zero_where_the_two_agree(
    name: str, logits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    a, b = logits
    found = imitation.divergence(name)(a, b)
    assert found.shape == (7,)
    assert bool((found[:-1] > 1e-3).all())
    assert float(found[-1]) == pytest.approx(0.0, abs=1e-12)
    assert torch.allclose(imitation.divergence(name)(a + 1.0, b - 3.0), found)  # logits are given up to a constant


def test_laws_of_the_bounded_ones(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = logits
    js, tv = imitation.jensen_shannon, imitation.total_variation(a, b)
    assert torch.allclose(js(a, b), js(b, a))
    assert not torch.allclose(js(a, b, 0.2)[:-1], js(b, a, 0.2)[:-1])
    assert torch.allclose(js(a, b, 0.2), js(b, a, 0.8))
    assert bool((js(a, b) <= math.log(2)).all())
    assert bool((tv <= 1).all())
    for divergence in (kl.exact(a, b), kl.exact(b, a)):
        assert bool((tv <= (divergence.clamp(min=0) / 2).sqrt() + 1e-9).all())  # Pinsker


def test_at_its_ends_the_blend_is_the_one_divergence_or_the_other(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = logits
    small = 1e-6
    assert torch.allclose(imitation.jensen_shannon(a, b, small) / small, kl.forward_exact(a, b), rtol=1e-3, atol=1e-9)
    assert torch.allclose(imitation.jensen_shannon(a, b, 1 - small) / small, kl.exact(a, b), rtol=1e-3, atol=1e-9)


def test_forward_covers_and_reverse_seeks() -> None:
    """A teacher with two modes, and students that can be nothing but a hump: which hump each divergence likes best."""
    at = torch.arange(9, dtype=torch.float64)
    teacher = torch.logaddexp(-((at - 1) ** 2), -((at - 7) ** 2))
    humps = torch.stack([-((at - c) ** 2) / w for c in range(9) for w in (1.0, 20.0)])
    narrow_at_a_mode, wide_in_the_middle = (2 * 1, 2 * 7), 2 * 4 + 1
    forward, reverse = (imitation.divergence(n)(humps, teacher.expand_as(humps)) for n in ("forward", "reverse"))
    assert int(forward.argmin()) == wide_in_the_middle
    assert int(reverse.argmin()) in narrow_at_a_mode


@pytest.mark.parametrize("name", ["jensen", "js:", "js:0", "js:1", "js:half", "reverse:0.5"])
def test_a_divergence_that_is_none_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"divergence is {name!r}"):
        imitation.divergence(name)
    with pytest.raises(ValueError, match=r"β is 1\.0: the divergence is 0 at 0 and at 1"):
        imitation.jensen_shannon(PI, P, 1.0)
