"""Credit: by hand, what each scheme conserves for any mask, never lost silently, and what it does to the policy gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped

from tokenmdp.functional import credit, policy_loss, returns
from tokenmdp.testing.exact import Exact, TabularPolicy, expectation, gradient

ACTION = torch.tensor([[False, True, False, True, False], [False, True, True, True, True]])
SCORE = torch.tensor([3.0, -2.0])


def test_by_hand() -> None:
    assert credit.last(SCORE, ACTION).tolist() == [[0, 0, 0, 3, 0], [0, 0, 0, 0, -2]]
    # 3 over two tokens, −2 over four
    assert credit.uniform(SCORE, ACTION).tolist() == [[0, 1.5, 0, 1.5, 0], [0, -0.5, -0.5, -0.5, -0.5]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=1, max_size=5), st.integers(0, 99)
)
def test_every_scheme_conserves_what_it_says(mask: list[list[bool]], seed: int) -> None:
    """And is linear in the score, up to what does not depend on it: a baseline may be taken off first."""
    action = torch.tensor(mask)
    rng = torch.Generator().manual_seed(seed)
    score = torch.randn(len(mask), generator=rng, dtype=torch.float64)
    a, b = (torch.randn(action.shape, generator=rng, dtype=torch.float64) for _ in range(2))
    at_start = a.gather(1, action.long().argmax(1)[:, None])[:, 0]
    closing = action & (b > 0)
    schemes = {
        "last": (credit.last, 0 * score),
        "uniform": (credit.uniform, 0 * score),
        "attention": (lambda s, m: credit.attention(s, m, a.abs()), 0 * score),
        "mixture": (lambda s, m: credit.attention(s, m, a.abs(), 0.3), 0 * score),
        "shaped": (lambda s, m: credit.shaped(s, m, a), -at_start),
        "branch": (lambda s, m: credit.branch(s, m, a), -at_start),
        "implicit": (lambda s, m: credit.implicit(s, m, a, b, 0.2), 0.2 * ((a - b) * action).sum(1)),
        "process": (lambda s, m: credit.process(s, m, a, closing), (a * closing).sum(1)),
    }
    for name, (scheme, besides) in schemes.items():
        reward = scheme(score, action)
        torch.testing.assert_close(reward.sum(1), score + besides, msg=name)
        assert reward.dtype == torch.float64
        assert bool((reward[~action] == 0).all())
        doubled, none = scheme(2 * score, action), scheme(0 * score, action)
        torch.testing.assert_close(doubled - none, 2 * (reward - none), msg=name)


def test_learned_schemes_by_hand() -> None:
    x = torch.tensor([[9.0, 1.0, 9.0, 3.0, 9.0], [9.0, 1.0, 0.0, 2.0, 1.0]])
    # attention 1 and 3 of 4, then 1, 0, 2, 1 of 4; what lies outside the mask is not read
    assert credit.attention(SCORE, ACTION, x).tolist() == [[0, 0.75, 0, 2.25, 0], [0, -0.5, 0, -1, -0.5]]
    # half of it so, the other half on the last token: 1.5 + 0.5 · 2.25
    assert credit.attention(SCORE, ACTION, x, 0.5)[0].tolist() == [0, 0.375, 0, 2.625, 0]
    # the potential rises from 1 to 3 and ends at 0: 3 − 1, then the score 3 − 3
    assert credit.shaped(SCORE, ACTION, x).tolist() == [[0, 2, 0, 0, 0], [0, -1, 2, -1, -3]]
    # log-ratios 1 and 3 (then 1, 0, 2, 1) in units of a half, and the score
    assert credit.implicit(SCORE, ACTION, x, 0 * x, 0.5).tolist() == [[0, 0.5, 0, 4.5, 0], [0, 0.5, 0, 1, -1.5]]
    ends = torch.tensor([[False, True, False, False, False], [False, False, False, True, True]])
    assert credit.process(SCORE, ACTION, x, ends).tolist() == [[0, 1, 0, 3, 0], [0, 0, 0, 2, -1]]


def test_a_row_nobody_looked_at_gets_equal_parts() -> None:
    assert credit.attention(SCORE, ACTION, torch.zeros(2, 5)).tolist() == credit.uniform(SCORE, ACTION).tolist()


def test_arguments_that_cannot_be_are_refused() -> None:
    weights = torch.ones(2, 5)
    for beta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"beta=.* lies between 0 and 1"):
            credit.attention(SCORE, ACTION, weights, beta)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="negative or not finite"):
            credit.attention(SCORE, ACTION, torch.where(ACTION, bad, weights))
    with pytest.raises(ValueError, match=r"beta=-0\.1: .* at least 0"):
        credit.implicit(SCORE, ACTION, weights, weights, -0.1)
    with pytest.raises(ValueError, match="a step of row 0 ends at position 2, which is no action"):
        credit.process(SCORE, ACTION, weights, torch.ones(2, 5, dtype=torch.bool) & (torch.arange(5) > 1))


# -- what a scheme does to the gradient, on a toy whose every response is written down


class Toy:
    """Fifteen responses of up to three of three tokens, a tabular policy, a score and its true gradient."""

    def __init__(self) -> None:
        self.world = Exact(start=(0,), vocabulary=3, horizon=3, eos=2)
        self.policy = TabularPolicy(3, 3, torch.Generator().manual_seed(0))
        self.action = self.world.batch.action
        self.score = self.world.score(lambda r: r.count(1) - 0.7 * (r[0] == 0) + 0.2 * len(r))
        self.logp = self.policy.evaluate(self.world.batch)["logp"]
        self.p = self.world.probability(self.logp)
        self.parameters = list(self.policy.parameters())
        self.truth = gradient(expectation(self.p, self.score), self.parameters)
        self.values = self.world.values(self.logp.detach(), credit.last(self.score, self.action))

    def gradient(self, advantage: torch.Tensor) -> torch.Tensor:
        """The expected score-function gradient with these advantages."""
        loss = policy_loss.reinforce(self.logp, advantage).sum(1)
        return -gradient(expectation(self.p.detach(), loss), self.parameters)

    def of_the_state(self, seed: int) -> torch.Tensor:
        """Any function of the state before each token."""
        number = torch.randn(len(self.world.states), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return torch.where(self.action, number[self.world.state], 0.0)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def test_branching_with_the_exact_values_gives_the_exact_advantages(toy: Toy) -> None:
    reward = credit.branch(toy.score, toy.action, toy.values.value)
    torch.testing.assert_close(reward, toy.values.advantage)
    # and so it stays through GAE with λ = 0 and no critic
    advantage, _ = returns.gae(reward, torch.zeros_like(reward), toy.action, 1.0, 0.0)
    torch.testing.assert_close(advantage, toy.values.advantage)
    torch.testing.assert_close(toy.gradient(advantage), toy.truth)


@pytest.mark.parametrize("seed", [1, 2])
def test_shaping_leaves_the_policy_gradient_unbiased(toy: Toy, seed: int) -> None:
    """Whatever the potential is; returns from each token on, or with any critic at λ = 1."""
    reward = credit.shaped(toy.score, toy.action, toy.of_the_state(seed))
    torch.testing.assert_close(toy.gradient(returns.discounted(reward, toy.action)), toy.truth)
    advantage, _ = returns.gae(reward, toy.of_the_state(9), toy.action, 1.0, 1.0)
    torch.testing.assert_close(toy.gradient(advantage), toy.truth)


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("scheme", [credit.shaped, credit.branch])
def test_a_potential_is_a_baseline_at_any_discount(toy: Toy, scheme: Callable[..., torch.Tensor], gamma: float) -> None:
    """Returns from each token on are less by its potential, whatever the length; so the gradient is that of none."""
    plain = returns.discounted(credit.last(toy.score, toy.action), toy.action, gamma)
    found = returns.discounted(scheme(toy.score, toy.action, toy.of_the_state(1), gamma), toy.action, gamma)
    torch.testing.assert_close(found, plain - toy.of_the_state(1))
    torch.testing.assert_close(toy.gradient(found), toy.gradient(plain))


def test_the_implied_reward_adds_an_objective_of_its_own(toy: Toy) -> None:
    """The gradient is that of the score plus β times the expected log-ratio, the two other policies being constants."""
    a, b = toy.of_the_state(3) - 2, toy.of_the_state(4)
    reward = credit.implicit(toy.score, toy.action, a, b, 0.3)
    both = toy.score + 0.3 * ((a - b) * toy.action).sum(1)
    want = gradient(expectation(toy.p, both), toy.parameters)
    torch.testing.assert_close(toy.gradient(returns.discounted(reward, toy.action)), want)


def test_attention_of_the_whole_response_is_not_causal(toy: Toy) -> None:
    """Returns from a token on leave out what earlier tokens were paid for it: the gradient is another one, as uniform's."""
    looked = torch.where(toy.action, 1.0 + toy.world.batch.tokens, 0.0)
    for reward in (credit.attention(toy.score, toy.action, looked), credit.uniform(toy.score, toy.action)):
        found = toy.gradient(returns.discounted(reward, toy.action))
        assert float((found - toy.truth).norm()) > 0.1 * float(toy.truth.norm())


# -- values of branches


def test_branch_values_by_hand() -> None:
    """Row 0: 1 and 3 at its first action, nothing at its second. Row 1: 4 at its second action, 6 and 2 at its last,
    of which 6 has no verdict."""
    score = torch.tensor([1.0, 3.0, 4.0, 6.0, 2.0])
    parent, at = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1, 1, 2, 4, 4])
    verdict = torch.tensor([True, True, True, False, True])
    assert returns.branch(score, parent, at, ACTION, verdict).tolist() == [[0, 2, 0, 2, 0], [0, 0, 4, 4, 2]]
    with pytest.raises(ValueError, match="position 2 of row 0 is no action"):
        returns.branch(score, parent, torch.tensor([2, 1, 2, 4, 4]), ACTION)


def test_a_score_is_never_lost() -> None:
    nobody = torch.tensor([[False, True], [False, False]])
    for scheme in (credit.last, credit.uniform, lambda s, m: credit.attention(s, m, m.float())):
        with pytest.raises(ValueError, match="row 1 has a score of -2 and not one action"):
            scheme(SCORE, nobody)
        # a row without a verdict has score 0 and loses nothing
        assert scheme(torch.tensor([1.0, 0.0]), nobody).tolist() == [[0, 1], [0, 0]]


def test_shapes_are_what_the_signatures_say() -> None:
    last = jaxtyped(typechecker=beartype)(credit.last)
    assert math.isclose(float(last(SCORE, ACTION).sum()), 1.0)
    with pytest.raises(TypeCheckError):
        last(torch.ones(3), ACTION)
