"""The rewards of adversarial imitation: numbers by hand, and the laws against the enumerated truth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokenmdp.functional import adversarial
from tokenmdp.testing.exact import Exact, TabularPolicy, expectation, gradient

V, H, EOS = 3, 3, 0


class World:
    """A demonstrator and a policy on 1 + 2 + 4 + 8 = 15 responses, with their occupancies, all in float64."""

    def __init__(self, closeness: float = 0.0) -> None:
        self.exact = Exact((0,), V, H, eos=EOS)
        demonstrator = TabularPolicy(V, H, torch.Generator().manual_seed(1))
        self.policy = TabularPolicy(V, H, torch.Generator().manual_seed(2))
        with torch.no_grad():
            self.policy.table.lerp_(demonstrator.table, closeness)
            self.expert = self.occupancy(self.exact.logp(demonstrator))
        self.logp = self.exact.logp(self.policy)
        self.p = self.exact.probability(self.logp)
        self.own = self.occupancy(self.logp)
        # An end fills the steps that are left: action s·EOS counts H − |s| times.
        self.times = torch.tensor([float(H - len(a) + 1 if a[-1] == EOS else 1) for a in self.exact.actions])
        self.logit = (self.expert.log() - self.own.log()).detach()

    def occupancy(self, logp: Tensor) -> Tensor:
        """[actions] the probability of each prefix s·a: the sum over the responses through it."""
        inside = self.exact.action >= 0
        mass = self.exact.probability(logp)[:, None].expand(logp.shape)[inside]
        return torch.zeros(len(self.exact.actions), dtype=mass.dtype).index_add(0, self.exact.action[inside], mass)

    def on_tokens(self, x: Tensor) -> Tensor:
        return torch.where(self.exact.batch.action, x[self.exact.action], torch.zeros((), dtype=x.dtype))

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        return (self.times * p * (p.log() - q.log())).sum()

    def expected(self, name: str) -> Tensor:
        """E_π[Σ_t r_t] over the H steps, the rewards at the best discriminator held fixed."""
        reward = self.on_tokens(adversarial.REWARDS[name](self.logit))
        total = adversarial.to_go(reward, self.exact.batch.action, self.exact.batch.ended, H)[:, 0]
        return expectation(self.p, total)

    def followed(self, objective: Tensor) -> Tensor:
        return gradient(objective, [self.policy.table])


def test_the_rewards_by_hand() -> None:
    """At D = ¾, h = log 3: −log ¼ = 2 log 2, log 3, −3 log 3, and the odds, 3. At D = ½ the odds are 1."""
    h = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64)
    found = {name: reward(h).tolist() for name, reward in adversarial.REWARDS.items()}
    assert found["gail"] == pytest.approx([2 * math.log(2), math.log(2)])
    assert found["airl"] == pytest.approx([math.log(3), 0.0])
    assert found["fairl"] == pytest.approx([-3 * math.log(3), 0.0])
    assert found["forward"] == pytest.approx([3.0, 1.0])
    # −log ¾ for the demonstrator's token, −log ¼ for the policy's.
    loss = adversarial.discriminator(h[:1].expand(2), torch.tensor([True, False]))
    assert loss.tolist() == pytest.approx([math.log(4 / 3), math.log(4)])


def test_fairl_is_highest_where_the_policy_overdoes_it_by_e() -> None:
    h = torch.linspace(-6, 3, 901, dtype=torch.float64)
    best = adversarial.fairl(h).max(0)
    assert float(h[best.indices]) == pytest.approx(-1.0)
    assert float(best.values) == pytest.approx(1 / math.e, rel=1e-4)


def test_occupancies_fill_the_horizon() -> None:
    world = World()
    for x in (world.expert, world.own):
        assert float((world.times * x.detach()).sum()) == pytest.approx(H)


def test_the_best_discriminator_has_the_log_ratio_as_its_logit() -> None:
    """The gradient of the expected loss is 0 there, and the loss is H log 2 − JS, both sides counting one half."""
    world = World()
    logit = world.logit.clone().requires_grad_()
    every = torch.ones(len(logit), dtype=torch.bool)
    shown, own = adversarial.discriminator(logit, every), adversarial.discriminator(logit, ~every)
    loss = 0.5 * (world.times * (world.expert * shown + world.own.detach() * own)).sum()
    (slope,) = torch.autograd.grad(loss, logit)
    assert float(slope.abs().max()) < 1e-12
    mixed = (world.expert + world.own) / 2
    js = 0.5 * world.kl(world.expert, mixed) + 0.5 * world.kl(world.own, mixed)
    assert float(loss.detach()) == pytest.approx(H * math.log(2) - float(js.detach()))


def test_values_at_the_best_discriminator_are_the_stated_divergences() -> None:
    world = World()
    mixed = (world.expert + world.own) / 2
    wanted = {
        "gail": H * math.log(2) - float(world.kl(world.own, mixed)),
        "airl": -float(world.kl(world.own, world.expert)),
        "fairl": -float(world.kl(world.expert, world.own)),
        "forward": float(H),
    }
    for name, want in wanted.items():
        assert float(world.expected(name)) == pytest.approx(want), name


def test_gradients_with_the_discriminator_held_fixed_are_those_of_the_divergences() -> None:
    world = World()
    mixed = (world.expert + world.own) / 2
    wanted = {
        "gail": world.kl(world.expert, mixed) + world.kl(world.own, mixed),  # 2 JS
        "airl": world.kl(world.own, world.expert),
        "forward": world.kl(world.expert, world.own),
    }
    for name, divergence in wanted.items():
        assert torch.allclose(world.followed(world.expected(name)), -world.followed(divergence), atol=1e-12), name


def test_what_fairl_follows() -> None:
    """Minus the gradient of Σ ρ_E h* log ρ_π: over the horizon, and for five actions in one state by the softmax alone."""
    world = World()
    weighted = (world.times * world.expert * world.logit * world.own.log()).sum()
    assert torch.allclose(world.followed(world.expected("fairl")), -world.followed(weighted), atol=1e-12)
    rng = torch.Generator().manual_seed(0)
    expert = torch.randn(5, dtype=torch.float64, generator=rng).softmax(0)
    table = torch.randn(5, dtype=torch.float64, generator=rng).requires_grad_()
    own = table.softmax(0)
    h = (expert.log() - own.log()).detach()
    (followed,) = torch.autograd.grad((own * adversarial.fairl(h)).sum(), table, retain_graph=True)
    (stated,) = torch.autograd.grad((expert * h * own.log()).sum(), table)
    assert torch.allclose(followed, -stated, rtol=0, atol=1e-14)


def test_fairl_follows_no_divergence_and_near_the_demonstrator_the_wrong_way() -> None:
    def cosine(closeness: float) -> float:
        world = World(closeness)
        down = -world.followed(world.kl(world.expert, world.own))
        return float(torch.cosine_similarity(world.followed(world.expected("fairl")), down, dim=0))

    assert cosine(0.0) < 0.9
    assert cosine(0.9) < -0.9


def test_forward_follows_behaviour_cloning_where_every_response_has_the_whole_horizon() -> None:
    """Of whole responses only: with the reward at the last token alone the gradient is −∇ KL of responses, cloning's."""
    world = World()
    logp = world.logp.sum(1)
    with torch.no_grad():
        demonstrated = World().exact.probability(
            world.exact.logp(TabularPolicy(V, H, torch.Generator().manual_seed(1)))
        )
    reward = adversarial.forward((demonstrated.log() - logp).detach())
    found = world.followed(expectation(world.p, reward))
    assert torch.allclose(found, world.followed((demonstrated * logp).sum()), atol=1e-12)


def test_what_is_ahead_by_hand() -> None:
    """Two tokens, 1 and 2, then the end at step 2 of 4: the 2 is earned three times. Cut instead: once."""
    action = torch.tensor([[False, True, False, True], [False, True, False, True]])
    reward = torch.tensor([[9.0, 1.0, 9.0, 2.0]] * 2)
    found = adversarial.to_go(reward, action, torch.tensor([True, False]), 4)
    assert found.tolist() == [[7.0, 6.0, 4.0, 2.0], [3.0, 2.0, 0.0, 0.0]]
    # One group: at step 1 the others have 3 and 7 ahead, at step 2 they have 2 and 6.
    advantage = adversarial.against_others(found, action, torch.tensor([5, 5]))
    assert advantage.tolist() == [[0.0, 4.0, 0.0, 4.0], [0.0, -4.0, 0.0, -4.0]]
    with pytest.raises(ValueError, match="2 tokens, but the horizon is 1"):
        adversarial.to_go(reward, action, torch.tensor([True, True]), 1)


@pytest.mark.parametrize("name", ["gail", "airl", "forward"])
def test_the_estimator_of_the_recipe_is_unbiased(name: str) -> None:
    """E[Σ_t A_t ∇ log π_t] over all pairs of responses is ∇ E_π[Σ_t r_t], whatever the baseline."""
    world = World()
    batch = world.exact.batch
    ahead = adversarial.to_go(world.on_tokens(adversarial.REWARDS[name](world.logit)), batch.action, batch.ended, H)
    rows, chance = world.exact.draws(world.p.detach(), 2)
    group = torch.arange(len(rows)).repeat_interleave(2)
    flat = rows.reshape(-1)
    advantage = adversarial.against_others(ahead[flat], batch.action[flat], group)
    surrogate = (chance.repeat_interleave(2)[:, None] * advantage * world.logp[flat]).sum() / 2
    assert torch.allclose(world.followed(surrogate), world.followed(world.expected(name)), atol=1e-12)
