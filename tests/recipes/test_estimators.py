"""Every gradient estimator of the policy-gradient family against enumeration: what is unbiased is, and what is biased is by how much.

Four tokens, horizon 3, 40 responses, GPT-2 in float64. A group of two has 40² = 1,600 outcomes, each with its probability: an
estimator that compares the samples of a group has an exact expectation too. A loss is linear in ∇ log π(a | s) with
coefficients that do not depend on the gradient, so its expected gradient is that of Σ_t c[n, t] log π(a_t | s_t) with
c[n, t] the expected coefficient of row n: one backward pass, however many groups.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tiny_models import EOS, tiny
from tokenmdp.functional import kl, policy_loss, returns, weights
from tokenmdp.rewards import assign
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.testing.exact import Exact, expectation, gradient
from tokenmdp.types import Score

V, H = 4, 3
START = (1, 2)
MEASURED = {"group spread": 0.2320, "per sequence": 0.2608}
"""The bias of two estimators here: the relative distance from the truth that is left at the best scale."""


class Toy(NamedTuple):
    world: Exact
    parameters: list[Tensor]
    logp: Tensor  # [N, L] of the policy, with its graph
    logp_ref: Tensor  # [N, L] of another policy, a constant
    p: Tensor  # [N]
    score: Tensor  # [N]
    truth: Tensor  # the gradient of E[score]

    def mean_gradient(self, coefficient: Tensor) -> Tensor:
        """The gradient of Σ coefficient · log π, coefficient [N, L] or [N] a constant."""
        c = coefficient[:, None] * self.world.batch.action if coefficient.ndim == 1 else coefficient
        return gradient((c.detach() * self.logp).sum(), self.parameters)


@pytest.fixture(scope="module")
def toy() -> Toy:
    reference = tiny("gpt2", vocabulary=V)
    reference.model.double()
    policy = reference.twin("all")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in policy.trained():
            weight.add_(0.1 * torch.randn(weight.shape, generator=draw, dtype=torch.float64))
    world = Exact(START, V, H, eos=EOS)
    score = world.score(lambda r: r.count(3) - 0.5 * (r[-1] == EOS) + 0.3 * (r[0] == 2))
    parameters = [p for _, p in policy.trained()]
    logp = policy.evaluate(world.batch)["logp"]
    p = world.probability(logp)
    truth = gradient(expectation(p, score), parameters)
    with torch.no_grad():
        logp_ref = reference.evaluate(world.batch)["logp"]
    return Toy(world, parameters, logp, logp_ref, p.detach(), score, truth)


def close(found: Tensor, want: Tensor) -> bool:
    return float((found - want).norm()) < 1e-9 * float(want.norm())


def bias(found: Tensor, want: Tensor) -> float:
    """Relative: ‖found − want‖ / ‖want‖."""
    return float((found - want).norm() / want.norm())


def per_draw(toy: Toy, advantage: Tensor, rows: Tensor, probability: Tensor) -> Tensor:
    """[N] the expected coefficient of each response: Σ over draws and their members, of probability · A / k."""
    M, k = rows.shape
    share = probability[:, None] * advantage / k
    return torch.zeros(len(toy.world), dtype=share.dtype).index_add(0, rows.reshape(M * k), share.reshape(M * k))


def draws(toy: Toy, k: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [M, k] of every draw, its probability, and the flat scores and groups the functions take."""
    rows, probability = toy.world.draws(toy.p, k)
    M = len(rows)
    return rows, probability, toy.score[rows.reshape(-1)], torch.arange(M).repeat_interleave(k)


# -- REINFORCE and its baselines -----------------------------------------------------------------------------------------


def test_without_a_baseline_and_with_any_constant_it_is_unbiased(toy: Toy) -> None:
    for constant in (0.0, 0.7, -3.0):
        assert close(toy.mean_gradient(toy.p * (toy.score - constant)), toy.truth)


def test_the_greedy_baseline_is_unbiased(toy: Toy) -> None:
    """ReMax: what the most likely token at every step earns."""
    response: tuple[int, ...] = ()
    logp = toy.logp.detach()
    by_action = {
        toy.world.actions[int(a)]: x for a, x in zip(toy.world.action.flatten(), logp.flatten(), strict=True) if a >= 0
    }
    while len(response) < H and (not response or response[-1] != EOS):
        response = max(((*response, a) for a in range(V)), key=lambda r: float(by_action[r]))
    earned = toy.score[toy.world.responses.index(response)]
    advantage = returns.against(toy.score, torch.zeros(40, dtype=torch.long), earned[None])
    assert float(earned) != 0, "a baseline of 0 shows nothing"
    assert close(toy.mean_gradient(toy.p * advantage), toy.truth)


def test_leave_one_out_is_unbiased(toy: Toy) -> None:
    """RLOO, and the baseline `batch`: over every way to draw two responses."""
    rows, probability, score, group = draws(toy)
    advantage = returns.leave_one_out(score, group).reshape(rows.shape)
    assert close(toy.mean_gradient(per_draw(toy, advantage, rows, probability)), toy.truth)


def test_token_rewards_compared_at_each_step_are_unbiased_and_less_noisy(toy: Toy) -> None:
    """1 for every 3, .8 for every other token: most of what a response earns lies behind its late tokens."""
    b = toy.world.batch
    token = torch.where(b.action, 0.8 + 0.2 * (b.tokens == 3).double(), 0.0)
    truth = gradient(expectation(toy.world.probability(toy.logp), token.sum(1)), toy.parameters)
    rows, probability, _, group = draws(toy)
    flat, M = rows.reshape(-1), len(rows)
    drawn = b.select(flat)
    paid = Score(token[flat].sum(1), torch.ones(2 * M, dtype=torch.bool), token[flat])

    def compare(x: Tensor) -> Tensor:
        return returns.leave_one_out(x, group)

    policy = tiny("gpt2", vocabulary=V)  # `last` asks it nothing
    scheme = assign.load("last", FunctionReward(lambda completions, **_: [0.0] * len(completions)), policy)
    found, noise = {}, {}
    ahead = returns.discounted(token[flat], drawn.action)
    for name, advantage in (
        ("each step", assign.advantage(scheme, drawn, paid, paid.value, compare, policy, torch.Generator())),
        ("whole", torch.where(drawn.action, ahead - (paid.value - compare(paid.value))[:, None], 0.0)),
    ):
        share = probability.repeat_interleave(2)[:, None] * advantage / 2
        found[name] = toy.mean_gradient(torch.zeros_like(token).index_add(0, flat, share))
        noise[name] = float((probability.repeat_interleave(2)[:, None] * advantage.square()).sum())
    assert close(found["each step"], truth)
    assert close(found["whole"], truth)
    assert noise["each step"] < 0.5 * noise["whole"]


def test_the_mean_of_the_group_shrinks_the_gradient_by_one_sample(toy: Toy) -> None:
    """(G − 1)/G exactly, and no other bias."""
    for k in (2, 3):
        rows, probability, score, group = draws(toy, k)
        advantage = returns.centred(score, group).reshape(rows.shape)
        assert close(toy.mean_gradient(per_draw(toy, advantage, rows, probability)), (k - 1) / k * toy.truth)


def test_division_by_the_groups_spread_is_biased_and_by_how_much(toy: Toy) -> None:
    """A group of two has advantages ±1/√2 or 0, whatever the scores: only who was better is left of them.

    Measured against the truth at the best scale, which a learning rate could repair: 23 % of it points elsewhere.
    """
    rows, probability, score, group = draws(toy)
    advantage = returns.scaled(returns.centred(score, group), returns.spread(score, group)).reshape(rows.shape)
    assert sorted({round(a, 9) for a in advantage.abs().reshape(-1).tolist()}) == [0.0, round(0.5**0.5, 9)]
    found = toy.mean_gradient(per_draw(toy, advantage, rows, probability))
    scale = float(found @ toy.truth / (found @ found))
    assert bias(scale * found, toy.truth) == pytest.approx(MEASURED["group spread"], rel=0.02)


# -- what counts alike ---------------------------------------------------------------------------------------------------


def test_per_slot_is_unbiased_and_per_sequence_is_not(toy: Toy) -> None:
    """One response a batch. per_slot gives truth / H exactly; per_sequence divides each response by its own length."""
    b = toy.world.batch
    alone = [weights.per_slot(b.select([n]).action, H, dtype=torch.float64)[0, -1] for n in range(40)]
    assert set(map(float, alone)) == {1 / H}
    assert close(H * toy.mean_gradient(toy.p * toy.score * torch.stack(alone)), toy.truth)
    length = b.action.sum(1).double()
    found = toy.mean_gradient(toy.p * toy.score / length)
    scale = float(found @ toy.truth / (found @ found))
    assert bias(scale * found, toy.truth) == pytest.approx(MEASURED["per sequence"], rel=0.02)


# -- ratios --------------------------------------------------------------------------------------------------------------


def test_every_loss_with_a_ratio_is_reinforce_where_the_ratio_is_1(toy: Toy) -> None:
    action = toy.world.batch.action
    old, advantage = toy.logp.detach(), torch.where(action, toy.score[:, None].expand(action.shape), 0.0)
    for value, clipped in (
        policy_loss.ppo_clip(toy.logp, old, advantage),
        policy_loss.gspo(toy.logp, old, advantage, action),
        policy_loss.cispo(toy.logp, old, advantage),
    ):
        assert close(-gradient((toy.p[:, None] * value).sum(), toy.parameters), toy.truth)
        assert not clipped.any()


def stale(toy: Toy) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sampled from the reference: its log-probabilities, its p(τ), the token advantages, and the mask."""
    action = toy.world.batch.action
    advantage = torch.where(action, toy.score[:, None].expand(action.shape), 0.0)
    return toy.logp_ref, toy.world.probability(toy.logp_ref), advantage, action


def test_on_stale_samples_only_the_ratio_of_whole_responses_is_unbiased(toy: Toy) -> None:
    """Π ρ is the importance weight of a response; a token's own ratio ignores how its state came about."""
    old, p_old, advantage, _ = stale(toy)
    whole = (toy.logp.sum(1) - old.sum(1)).exp().detach()
    assert close(toy.mean_gradient(p_old * whole * toy.score), toy.truth)
    value, _ = policy_loss.ppo_clip(toy.logp, old, advantage, None)
    assert bias(-gradient((p_old[:, None] * value).sum(), toy.parameters), toy.truth) > 0.01


def test_cispos_gradient_is_the_bounded_weight_times_the_score_function(toy: Toy) -> None:
    old, p_old, advantage, _ = stale(toy)
    value, clipped = policy_loss.cispo(toy.logp, old, advantage, None, 0.1)
    assert bool(clipped.any()), "nothing would be bounded"
    ratio = (toy.logp - old).exp().detach()
    want = toy.mean_gradient(p_old[:, None] * ratio.clamp(max=1.1) * advantage)
    assert close(-gradient((p_old[:, None] * value).sum(), toy.parameters), want)


def test_gspos_gradient_is_the_geometric_mean_ratio_times_the_score_function(toy: Toy) -> None:
    old, p_old, advantage, action = stale(toy)
    value, clipped = policy_loss.gspo(toy.logp, old, advantage, action, None)
    mean = ((toy.logp - old).sum(1) / action.sum(1)).exp().detach()
    assert close(-gradient((p_old[:, None] * value).sum(), toy.parameters), toy.mean_gradient(p_old * mean * toy.score))
    assert not clipped.any()


# -- KL ------------------------------------------------------------------------------------------------------------------


def test_kl_in_the_reward_is_the_gradient_of_the_responses_divergence(toy: Toy) -> None:
    """score − β Σ (log π − log ref), the sequence's total, as `reinforce` has it; −c Σ log π is the entropy's."""
    beta, c = 0.3, 0.2
    total = toy.score - beta * (toy.logp - toy.logp_ref).sum(1) - c * toy.logp.sum(1)
    probability = toy.world.probability(toy.logp)
    entropy = -(probability * toy.logp.sum(1)).sum()
    objective = expectation(probability, toy.score) - beta * toy.world.kl(toy.logp, toy.logp_ref) + c * entropy
    assert close(toy.mean_gradient(toy.p * total.detach()), gradient(objective, toy.parameters))


@pytest.mark.parametrize(("estimator", "own"), [(kl.reverse_k2, True), (kl.reverse_k3, False)])
def test_kl_in_the_loss_follows_the_divergence_at_the_visited_states(toy: Toy, estimator: object, own: bool) -> None:
    """k2 gives ∇KL(π ‖ ref), the published k3 ∇KL(ref ‖ π), both with the states as they were visited."""
    assert callable(estimator)
    found = gradient((toy.p[:, None] * estimator(toy.logp, toy.logp_ref)).sum(), toy.parameters)
    at = toy.world.kl_at(toy.logp, toy.logp_ref) if own else toy.world.kl_at(toy.logp_ref, toy.logp)
    assert close(found, gradient((toy.p[:, None] * at).sum(), toy.parameters))
