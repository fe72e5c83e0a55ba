"""Behaviour cloning: by hand, and the identity with policy gradient."""

from __future__ import annotations

import math

import torch

from tokenmdp.functional import imitation, policy_loss


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
