"""Value-based losses: numbers by hand, and the enumerated truth as the place where their gradients vanish."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmdp.functional import credit, value_loss
from tokenmdp.testing.exact import Exact, TabularPolicy

V, H, EOS = 3, 3, 2


@pytest.fixture
def world() -> Exact:
    return Exact((0,), V, H, eos=EOS)


@pytest.fixture
def logp(world: Exact) -> Tensor:
    policy = TabularPolicy(V, H, torch.Generator().manual_seed(0))
    return policy.evaluate(world.batch)["logp"].detach()


def score_of(world: Exact) -> Tensor:
    return world.score(lambda r: r.count(1) - 0.4 * len(r) + 0.7 * (r[0] == 0))


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_the_expectile_loss_by_hand() -> None:
    """τ = 0.8: 0.8 · 2² = 3.2 for an underestimate of 2, 0.2 · 3² = 1.8 for an overestimate of 3."""
    found = value_loss.expectile(torch.tensor([2.0, -3.0, 0.0]), 0.8)
    assert found.tolist() == pytest.approx([3.2, 1.8, 0.0])


@pytest.mark.parametrize(("tau", "want"), [(0.5, 2.5), (0.75, 5.0)])
def test_its_minimiser_is_the_expectile(tau: float, want: float) -> None:
    """Of 0, 0, 0 and 10: τ = ½ gives the mean; τ = ¾ has ¾ (10 − m) = ¼ · 3 m, so m = 5."""
    data = torch.tensor([0.0, 0.0, 0.0, 10.0], dtype=torch.float64)
    m = torch.tensor(want, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(value_loss.expectile(data - m, tau).sum(), m)
    assert float(slope) == pytest.approx(0, abs=1e-12)


def test_the_td_target_by_hand() -> None:
    """Actions at 1, 2 and 4: r + ½ V of the next action's state; the tool's answer at 3 is skipped, the end is worth 0."""
    action = torch.tensor([[False, True, True, False, True]])
    reward, value = torch.tensor([[9.0, 1.0, 0.0, 9.0, 3.0]]), torch.tensor([[9.0, 5.0, 4.0, 9.0, 2.0]])
    found = value_loss.td_target(reward, value, action, 0.5)
    assert found.tolist() == [[0.0, 1 + 0.5 * 4, 0 + 0.5 * 2, 0.0, 3.0]]


def test_the_regulariser_by_hand() -> None:
    """Q = 0 and log 3: log(1 + 3) − log 3 for the better action, log 4 for the other."""
    q = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    found = value_loss.cql(q, torch.tensor([1, 0]))
    assert found.tolist() == pytest.approx([math.log(4 / 3), math.log(4)])


@pytest.mark.parametrize(("lam", "want"), [(0.0, [1.0, 7.0]), (1.0, [6.5, 7.0]), (0.5, [3.75, 7.0])])
def test_the_soft_target_by_hand(lam: float, want: list[float]) -> None:
    """Rewards 0 and 7, Q = 3 and 1.5, V = 2 and 1: one step says 0 + 1; the path says 0 + 7 − (1.5 − 1) = 6.5; the mixture
    is 0 + 1 + λ (7 − 1.5).
    """
    action = torch.tensor([[False, True, True]])
    reward, q = torch.tensor([[9.0, 0.0, 7.0]]), torch.tensor([[9.0, 3.0, 1.5]])
    value = torch.tensor([[9.0, 2.0, 1.0]])
    assert value_loss.soft_target(reward, q, value, action, 1.0, lam)[0, 1:].tolist() == pytest.approx(want)


def test_the_advantage_weight_by_hand() -> None:
    """β = 0.5: e⁰, e², e⁻¹; e¹⁰ is more than 20."""
    omega, clipped = value_loss.advantage_weight(torch.tensor([0.0, 1.0, -0.5, 5.0]), 0.5)
    assert omega.tolist() == pytest.approx([1.0, math.e**2, 1 / math.e, 20.0])
    assert clipped.tolist() == [False, False, False, True]


def test_an_advantage_beyond_all_bounds_is_clipped_not_infinite() -> None:
    omega, _ = value_loss.advantage_weight(torch.tensor([1e30, -1e30]), 1e-3)
    assert omega.tolist() == pytest.approx([20.0, 0.0])


# -- the enumerated truth --------------------------------------------------------------------------------------------


def slopes(world: Exact, logp: Tensor, q: Tensor, v: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Gradients of the expected losses in a table of Q and in one of V."""
    b = world.batch
    q, v = q.clone().requires_grad_(), v.clone().requires_grad_()
    reward = credit.last(score_of(world), b.action)
    weight = torch.where(b.action, world.probability(logp)[:, None], 0.0)
    q_at, v_at = torch.where(b.action, q[world.action], 0.0), torch.where(b.action, v[world.state], 0.0)
    fit_q = (weight * (value_loss.td_target(reward, v_at, b.action) - q_at).square()).sum()
    fit_v = (weight * value_loss.expectile(q_at.detach() - v_at, tau)).sum()
    return torch.autograd.grad(fit_q, q)[0], torch.autograd.grad(fit_v, v)[0]


def tables(world: Exact, logp: Tensor) -> tuple[Tensor, Tensor]:
    """Q of every action and V of every state, exactly."""
    exact = world.values(logp, credit.last(score_of(world), world.batch.action))
    return torch.stack(list(exact.by_action.values())), torch.stack(list(exact.by_state.values()))


def test_with_tau_one_half_the_true_values_of_the_data_are_the_fixed_point(world: Exact, logp: Tensor) -> None:
    q, v = tables(world, logp)
    slope_q, slope_v = slopes(world, logp, q, v, 0.5)
    assert float(slope_q.abs().max()) < 1e-12
    assert float(slope_v.abs().max()) < 1e-12
    off_q, off_v = slopes(world, logp, q + 0.1, v, 0.5)
    assert float(off_q.abs().max()) > 0.01, "a wrong Q is pulled back"
    assert float(off_v.abs().max()) > 0.01


def test_towards_tau_1_the_value_is_that_of_the_best_action(world: Exact, logp: Tensor) -> None:
    """Sweeps of dynamic programming, each V the expectile of its Q by its own equation: from the mean to the maximum."""
    b = world.batch
    reward = credit.last(score_of(world), b.action)
    best = score_of(world).max()
    start = {}
    for tau in (0.5, 0.9, 0.9999):
        q, v = tables(world, logp)
        for _ in range(H):
            v = expectiles(world, logp, q, tau)
            goal = value_loss.td_target(reward, torch.where(b.action, v[world.state], 0.0), b.action)
            q = q.index_put((world.action[b.action],), goal[b.action])
        start[tau] = float(expectiles(world, logp, q, tau)[0])
    assert start[0.5] == pytest.approx(float(tables(world, logp)[1][0]))
    assert start[0.5] < start[0.9] < start[0.9999] <= float(best) + 1e-9
    assert start[0.9999] == pytest.approx(float(best), abs=0.02)


def expectiles(world: Exact, logp: Tensor, q: Tensor, tau: float) -> Tensor:
    """The τ-expectile of the Q of each state's actions under the policy, by bisection of the loss's slope."""
    mass = world.probability(logp)[:, None].expand_as(logp)
    inside = world.batch.action
    low, high = torch.full((len(world.states),), -9.0).double(), torch.full((len(world.states),), 9.0).double()
    for _ in range(60):
        m = (0.5 * (low + high)).requires_grad_()
        value = torch.where(inside, q[world.action] - m[world.state], 0.0)
        (slope,) = torch.autograd.grad((torch.where(inside, mass, 0.0) * value_loss.expectile(value, tau)).sum(), m)
        low, high = torch.where(slope < 0, m.detach(), low), torch.where(slope < 0, high, m.detach())
    return low


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_at_the_soft_optimum_q_is_the_target_on_every_path(world: Exact, logp: Tensor, lam: float) -> None:
    """V* = β log E_ref[exp(score/β) | s] and Q* likewise given the action: no response, however unlikely, disagrees."""
    beta, b = 0.3, world.batch
    tilted = world.values(logp, credit.last((score_of(world) / beta).exp(), b.action))
    q, value = (torch.where(b.action, beta * x.clamp(min=1e-30).log(), 0.0) for x in (tilted.q, tilted.value))
    reward = credit.last(score_of(world), b.action)
    assert torch.allclose(value_loss.soft_target(reward, q, value, b.action, 1.0, lam), q, atol=1e-12)
    optimum, log_z = world.optimum(logp, score_of(world), beta)
    policy = torch.where(b.action, (q - value) / beta + logp, 0.0)
    assert torch.allclose(policy, world.conditional(optimum), atol=1e-10), "and softmax of Q* is the optimal policy"
    assert float(value[0, 1]) == pytest.approx(float(beta * log_z))


def test_elsewhere_it_is_not(world: Exact, logp: Tensor) -> None:
    """A policy that has not moved has Q = V = 0: the target is then what remains to be learned, the score itself."""
    b = world.batch
    zero = torch.zeros_like(logp)
    reward = credit.last(score_of(world), b.action)
    found = value_loss.soft_target(reward, zero, zero, b.action, 1.0, 1.0)
    assert torch.allclose(found, torch.where(b.action, score_of(world)[:, None], 0.0))


# -- constants, masks, ranges ----------------------------------------------------------------------------------------


def test_targets_carry_no_gradient_and_read_nothing_outside_the_mask() -> None:
    action = torch.tensor([[False, True, True]])
    value = torch.tensor([[math.nan, 1.0, 2.0]], requires_grad=True)
    reward = torch.tensor([[math.nan, 0.5, 1.0]])
    for found in (
        value_loss.td_target(reward, value, action),
        value_loss.soft_target(reward, value, value, action, 1.0, 0.5),
    ):
        assert not found.requires_grad
        assert bool(torch.isfinite(found).all())
        assert float(found[0, 0]) == 0.0


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda x: value_loss.expectile(x, 1.0), "tau=1.0"),
        (lambda x: value_loss.expectile(x, 0.0), "tau=0.0"),
        (lambda x: value_loss.advantage_weight(x, 0.0), "beta=0.0"),
        (lambda x: value_loss.advantage_weight(x, 1.0, -1.0), "clip=-1.0"),
        (lambda x: value_loss.td_target(x, x, x > 0, 1.5), "gamma=1.5"),
        (lambda x: value_loss.soft_target(x, x, x, x > 0, 1.0, -0.1), "lam=-0.1"),
    ],
)
def test_what_is_outside_its_range_is_named(call: Callable[[Tensor], Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call(torch.ones(2, 3))
