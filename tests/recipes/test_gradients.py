"""The whole house against enumeration: Policy.evaluate, rewards, returns, losses, weights and Learner give the true gradient.

A four-token model has 40 responses of up to three tokens. With every response in the batch, weighted by its probability,
what the learner accumulates is an expectation without sampling noise, and must equal the gradient of the enumerated objective.

GPT-2 computes in float64 throughout, so equality is to 1e-9; Llama's norms always compute in float32, and it is held to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tiny_models import EOS, prompt, tiny
from tokenmdp.functional import credit, imitation, policy_loss, returns
from tokenmdp.learner import Learner
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.testing.exact import Exact, expectation, gradient, row_gradients, variance
from tokenmdp.types import Batch

V, H = 4, 3
START = (1, 2)


class Toy(NamedTuple):
    """A real policy small enough to enumerate.

    Attributes:
        policy: what trains.
        reference: what it started from; different by now.
        world: every response.
        score: of each response.
        tolerance: relative, of gradients.
    """

    policy: Policy
    reference: Policy
    world: Exact
    score: Tensor
    tolerance: float

    def logp(self, policy: Policy | None = None, temperature: float = 1.0) -> Tensor:
        """By the model's own forward pass over whole rows: nothing of `Policy.evaluate`."""
        model = (policy or self.policy).model
        return self.world.logp(lambda tokens: model(input_ids=tokens, use_cache=False).logits / temperature)

    @property
    def parameters(self) -> list[Tensor]:
        return [p for _, p in self.policy.trained()]

    def assert_gradient(
        self, loss: Callable[..., Tensor], weight: Tensor, want: Tensor, tokens: int = 60, **columns: Tensor
    ) -> None:
        """The learner's gradient of Σ weight · loss is `want`."""
        learner = Learner(self.policy, 1.0, tokens=tokens)
        learner.gradient(lambda part, **c: (loss(part, **c), {}), self.world.batch, weight, **columns)
        zeros = (torch.zeros_like(p) if p.grad is None else p.grad for p in learner.named.values())
        found = torch.cat([g.reshape(-1) for g in zeros])
        assert float(want.norm()) > 1e-3, "a test against no gradient shows nothing"
        assert float((found - want).norm()) < self.tolerance * float(want.norm())


@pytest.fixture(params=["gpt2 all", "gpt2 lora-2", "llama top-1"])
def toy(request: pytest.FixtureRequest) -> Toy:
    name, train = request.param.split()
    reference = tiny(name, vocabulary=V)
    reference.model.double()
    policy = reference.twin(train)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in policy.trained():
            weight.add_(0.1 * torch.randn(weight.shape, generator=rng, dtype=torch.float64))
    world = Exact(START, V, H, eos=EOS)
    assert len(world) == 40
    score = world.score(lambda r: r.count(3) - 0.5 * (r[-1] == EOS) + 0.3 * (r[0] == 2))
    return Toy(policy, reference, world, score, 1e-9 if name == "gpt2" else 1e-5)


def everywhere(toy: Toy, x: Tensor) -> Tensor:
    """A number a row, on each of its actions."""
    return torch.where(toy.world.batch.action, x[:, None].expand(toy.world.batch.tokens.shape), 0.0)


def probabilities(toy: Toy, policy: Policy | None = None) -> Tensor:
    """p(τ) of each row, as the weight of each of its tokens."""
    return everywhere(toy, toy.world.probability(toy.logp(policy)).detach())


def test_evaluate_is_the_enumerated_policy(toy: Toy) -> None:
    with torch.no_grad():
        logp = toy.policy.evaluate(toy.world.batch)["logp"]
        assert torch.allclose(logp, toy.logp(), rtol=0, atol=1e-12)
        assert float(toy.world.probability(logp).sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("tokens", [20, 10_000])
def test_the_score_function_gradient(toy: Toy, tokens: int) -> None:
    want = -gradient(expectation(toy.world.probability(toy.logp()), toy.score), toy.parameters)

    def loss(part: Batch, advantage: Tensor) -> Tensor:
        return policy_loss.reinforce(toy.policy.evaluate(part)["logp"], advantage)

    toy.assert_gradient(loss, probabilities(toy), want, tokens, advantage=everywhere(toy, toy.score))


def test_the_score_function_gradient_at_another_temperature(toy: Toy) -> None:
    """What is sampled, evaluated and differentiated is the tempered policy."""
    p = toy.world.probability(toy.logp(temperature=0.6))
    want = -gradient(expectation(p, toy.score), toy.parameters)

    def loss(part: Batch, advantage: Tensor) -> Tensor:
        return policy_loss.reinforce(toy.policy.evaluate(part, temperature=0.6)["logp"], advantage)

    toy.assert_gradient(loss, everywhere(toy, p.detach()), want, advantage=everywhere(toy, toy.score))


@pytest.mark.parametrize(
    ("lam", "critic"), [(1.0, "any"), (1.0, "exact"), (0.5, "exact"), (0.0, "exact")], ids=lambda x: str(x)
)
def test_the_ppo_gradient_at_the_first_update(toy: Toy, lam: float, critic: str) -> None:
    """Score on the last token, KL in the reward, GAE, clipped ratio: the gradient of E[score] − β KL(π ‖ ref).

    λ = 1 forgives any critic, for a critic is a baseline; λ < 1 is unbiased with the exact one.
    """
    beta, b, world = 0.3, toy.world.batch, toy.world
    logp, logp_ref = toy.logp(), toy.logp(toy.reference).detach()
    objective = expectation(world.probability(logp), toy.score) - beta * world.kl(logp, logp_ref)
    want = -gradient(objective, toy.parameters)

    with torch.no_grad():
        logp_old = toy.policy.evaluate(b)["logp"]
        reward = credit.last(toy.score, b.action) - beta * (logp_old - toy.reference.evaluate(b)["logp"])
        value = world.values(logp_old, reward).value
    if critic == "any":
        guess = torch.randn(len(world.states), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        value = torch.where(b.action, guess[world.state], 0.0)
    advantage, _ = returns.gae(reward, value, b.action, 1.0, lam)

    def loss(part: Batch, advantage: Tensor, logp_old: Tensor) -> Tensor:
        return policy_loss.ppo_clip(toy.policy.evaluate(part)["logp"], logp_old, advantage, 0.2)[0]

    toy.assert_gradient(loss, probabilities(toy), want, advantage=advantage, logp_old=logp_old)


@pytest.mark.parametrize("clip", [0.05, 0.2])
def test_the_ppo_gradient_at_a_later_update(toy: Toy, clip: float) -> None:
    """Responses drawn from the policy as it was (here the reference), clipped as the definition says."""
    b, world = toy.world.batch, toy.world
    logp_old = toy.logp(toy.reference).detach()
    advantage = world.values(logp_old, credit.last(toy.score, b.action)).advantage.detach()
    ratio = (toy.logp() - logp_old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    weight = probabilities(toy, toy.reference)
    want = -gradient((weight * surrogate).sum(), toy.parameters)
    outside = ((ratio - 1).abs() > clip) & b.action
    assert bool(outside.any()), "nothing would be clipped"

    def loss(part: Batch, advantage: Tensor, logp_old: Tensor) -> Tensor:
        return policy_loss.ppo_clip(toy.policy.evaluate(part)["logp"], logp_old, advantage, clip)[0]

    toy.assert_gradient(loss, weight, want, advantage=advantage, logp_old=logp_old)


def test_the_gradient_of_behaviour_cloning(toy: Toy) -> None:
    """On all responses of a demonstrator, weighted by its probabilities: the gradient of KL(demonstrator ‖ π)."""
    demonstrator = toy.logp(toy.reference).detach()
    want = gradient(toy.world.kl(demonstrator, toy.logp()), toy.parameters)

    def loss(part: Batch) -> Tensor:
        return imitation.nll(toy.policy.evaluate(part)["logp"])

    toy.assert_gradient(loss, probabilities(toy, toy.reference), want)


def test_cloning_is_the_policy_gradient_with_reward_1(toy: Toy) -> None:
    ones = torch.ones(len(toy.world), dtype=torch.float64)
    weight = probabilities(toy, toy.reference)
    clone = (weight * imitation.nll(toy.policy.evaluate(toy.world.batch)["logp"])).sum()
    want = gradient(clone, toy.parameters)

    def loss(part: Batch, advantage: Tensor) -> Tensor:
        return policy_loss.reinforce(toy.policy.evaluate(part)["logp"], advantage)

    toy.assert_gradient(loss, weight, want, advantage=everywhere(toy, ones))


def test_sampled_responses_give_the_gradient_within_their_standard_error() -> None:
    """From `Policy.sample` to a gradient: along the true direction the mean of 4,000 responses is 4 standard errors off at most."""
    policy = tiny("llama", vocabulary=V).twin("all")
    world = Exact(START, V, H, eos=EOS)
    score = world.score(lambda r: r.count(3)).float()
    logp = policy.evaluate(world.batch)["logp"]
    p = world.probability(logp)
    parameters = [w for _, w in policy.trained()]
    truth = gradient(expectation(p, score), parameters)
    direction = truth / truth.norm()
    along = row_gradients(score.to(logp.dtype) * logp.sum(1), parameters) @ direction

    drawn = policy.sample([prompt(*START)], 4000, Sampling(max_new_tokens=H), torch.Generator().manual_seed(1))
    place = {r: i for i, r in enumerate(world.responses)}
    rows = [place[tuple(drawn.tokens[i][drawn.action[i]].tolist())] for i in range(len(drawn))]
    error = float((variance(p.detach(), along) / len(rows)).sqrt())
    assert abs(float(along[rows].mean()) - float(truth.norm())) < 4 * error
