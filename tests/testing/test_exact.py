"""The oracle against itself (Bellman, chain rule, closed forms), and every estimator against the oracle.

Nothing is sampled here: an estimator's expectation is a sum over all responses, so "unbiased" means equal to 1e-10, and
a bias is a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tokenmdp.functional import credit, imitation, kl, policy_loss, returns, weights
from tokenmdp.testing.exact import (
    Exact,
    TabularPolicy,
    expectation,
    gradient,
    row_gradients,
    variance,
)
from tokenmdp.types import Batch

V, H, EOS = 3, 3, 2
EXACT = {"rtol": 0, "atol": 1e-10}


def world() -> Exact:
    """Three tokens, three steps, token 2 ends: 15 responses, 8 of them truncated."""
    return Exact(start=(1, 0), vocabulary=V, horizon=H, eos=EOS)


def policy(seed: int) -> TabularPolicy:
    return TabularPolicy(V, H, torch.Generator().manual_seed(seed), start=2)


def taste(response: Sequence[int]) -> float:
    """A score with no structure to lean on, different for every response."""
    return math.sin(1.0 + sum((i + 2) * (3.7 * a + 1) for i, a in enumerate(response)))


def logp_of(model: TabularPolicy, batch: Batch) -> Tensor:
    return model.evaluate(batch)["logp"]


def state_function(w: Exact, seed: int) -> Tensor:
    """An arbitrary function of the state, spread over the batch."""
    table = torch.randn(len(w.states), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(w.batch.action, table[w.state], torch.zeros(w.state.shape, dtype=torch.float64))


def policy_gradient(w: Exact, pi: TabularPolicy) -> Tensor:
    """∇J, by differentiating J = Σ p r itself."""
    J = expectation(w.probability(logp_of(pi, w.batch)), w.score(taste))
    return gradient(J, list(pi.parameters()))


def expected_gradient(w: Exact, pi: TabularPolicy, loss: Tensor) -> Tensor:
    """E[∇ Σ_t ℓ_t] of a per-token loss, the probabilities being those of the sampler, not of the loss."""
    p = w.probability(logp_of(pi, w.batch)).detach()
    return gradient(expectation(p, loss.sum(1)), list(pi.parameters()))


# ---- the oracle itself ---------------------------------------------------------------------------------------------


def test_enumeration_by_hand() -> None:
    w = Exact(start=(0,), vocabulary=2, horizon=2, eos=1)
    # 1 ends at once; 0 goes on to 00 (truncated) or 01 (ended)
    assert w.responses == ((0, 0), (0, 1), (1,))
    assert w.batch.ended.tolist() == [False, True, True]
    assert w.batch.length.tolist() == [3, 3, 2]
    assert w.batch.action.tolist() == [[False, True, True], [False, True, True], [False, True, False]]
    assert w.states == ((), (0,))
    assert w.actions == ((0,), (0, 0), (0, 1), (1,))
    assert w.state.tolist() == [[-1, 0, 1], [-1, 0, 1], [-1, 0, -1]]
    for vocabulary, horizon, eos in itertools.product((1, 2, 4), (1, 2, 3), (None, 0)):
        count = len(Exact((0,), vocabulary, horizon, eos))
        # without EOS V^H; with it one ended response per way of going on, and what is left at H
        ended = 0 if eos is None else sum((vocabulary - 1) ** t for t in range(horizon))
        assert count == ended + (vocabulary if eos is None else vocabulary - 1) ** horizon
    with pytest.raises(ValueError, match="1000000 responses"):
        Exact((0,), 10, 6)


def test_values_by_hand() -> None:
    w = Exact(start=(0,), vocabulary=2, horizon=2, eos=1)
    # π(0) = ¾ at the start, ½ after; scores 4 for 00, 2 for 01, 1 for 1
    logp = torch.tensor([[0, 0.75, 0.5], [0, 0.75, 0.5], [0, 0.25, 0]], dtype=torch.float64).log()
    logp = torch.where(w.batch.action, logp, torch.zeros_like(logp))
    score = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    found = w.values(logp, credit.last(score, w.batch.action))
    # V(0) = 3; V() = ¾·3 + ¼·1 = 2.5; Q(, 0) = 3, Q(, 1) = 1
    assert {s: v.item() for s, v in found.by_state.items()} == pytest.approx({(): 2.5, (0,): 3.0})
    assert {a: q.item() for a, q in found.by_action.items()} == pytest.approx({(0,): 3, (1,): 1, (0, 0): 4, (0, 1): 2})
    torch.testing.assert_close(found.advantage[2], torch.tensor([0, -1.5, 0], dtype=torch.float64))
    assert expectation(w.probability(logp), score).item() == pytest.approx(2.5)


def test_probabilities_sum_to_one_and_a_causal_model_is_read_right() -> None:
    w, pi = world(), policy(0)
    logp = logp_of(pi, w.batch)
    torch.testing.assert_close(w.probability(logp).sum(), torch.ones((), dtype=torch.float64), **EXACT)
    torch.testing.assert_close(w.logp(pi), logp, **EXACT)  # the oracle's own shift and the policy's

    class Recurrent(nn.Module):  # a model that reads its whole past
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cell, self.head = nn.Embedding(V, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, V)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.cell(self.embed(tokens))[0])

    torch.manual_seed(0)
    model = Recurrent().double()
    assert w.probability(w.logp(model)).sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_bellman(gamma: float) -> None:
    w, pi = world(), policy(1)
    logp = logp_of(pi, w.batch).detach()
    draw = torch.Generator().manual_seed(2)
    by_action = torch.randn(len(w.actions), generator=draw, dtype=torch.float64)  # a reward for every (s, a)
    reward = torch.where(w.batch.action, by_action[w.action], torch.zeros_like(logp))
    found = w.values(logp, reward, gamma)
    for s in w.states:
        pi_s = pi(torch.tensor([w.mdp.start + s]))[0, -1].softmax(-1)
        q = torch.stack([found.by_action[(*s, a)] for a in range(V)])
        torch.testing.assert_close(found.by_state[s], (pi_s * q).sum(), **EXACT)  # V = Σ_a π Q
    for i, a in enumerate(w.actions):
        following = found.by_state.get(a, torch.zeros((), dtype=torch.float64))  # 0 after the end and at the horizon
        torch.testing.assert_close(found.by_action[a], by_action[i] + gamma * following, **EXACT)  # Q = r + γ V(s')
    assert found.by_state[()].item() == pytest.approx(
        expectation(w.probability(logp), returns.discounted(reward, w.batch.action, gamma)[:, 2]).item()
    )


def test_the_chain_rule_of_kl() -> None:
    w, pi, ref = world(), policy(0), policy(5)
    logp, logp_ref = logp_of(pi, w.batch), logp_of(ref, w.batch)
    torch.testing.assert_close(w.kl_by_step(logp, logp_ref).sum(), w.kl(logp, logp_ref), **EXACT)
    assert w.kl_by_step(logp, logp_ref).shape == (H,)
    # at each state the enumerated divergence is the one `kl.exact` takes from the logits
    at = kl.exact(pi(w.batch.tokens), ref(w.batch.tokens))[:, :-1]
    inside = torch.where(w.batch.action, nn.functional.pad(at, (1, 0)), torch.zeros_like(logp))
    torch.testing.assert_close(w.kl_at(logp, logp_ref), inside, **EXACT)
    assert w.kl(logp, logp).item() == 0


def test_the_regularised_optimum() -> None:
    w, beta = world(), 0.3
    logp_ref, score = logp_of(policy(5), w.batch).detach(), w.score(taste)
    best, log_z = w.optimum(logp_ref, score, beta)
    assert best.sum().item() == pytest.approx(1, abs=1e-12)
    optimal = w.conditional(best)  # as a token policy
    torch.testing.assert_close(w.probability(optimal), best, **EXACT)

    def objective(logp: Tensor) -> Tensor:
        return expectation(w.probability(logp), score) - beta * w.kl(logp, logp_ref)

    torch.testing.assert_close(objective(optimal), beta * log_z, **EXACT)
    for seed in range(3):  # any other policy falls short by exactly β KL(π ‖ π*)
        logp = logp_of(policy(seed), w.batch).detach()
        torch.testing.assert_close(beta * log_z - objective(logp), beta * w.kl(logp, optimal), **EXACT)
    with pytest.raises(ValueError, match="beta=0"):
        w.optimum(logp_ref, score, 0.0)


def test_moments_by_hand() -> None:
    p, x = torch.tensor([0.25, 0.75]), torch.tensor([[4.0], [0.0]])
    assert expectation(p, x).tolist() == [1.0]
    assert variance(p, x).tolist() == [3.0]  # ¼·9 + ¾·1
    w = Exact((0,), 2, 1)
    rows, weight = w.draws(p, 2)
    assert rows.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert weight.tolist() == [1 / 16, 3 / 16, 3 / 16, 9 / 16]
    with pytest.raises(ValueError, match="drawn 20 times"):
        w.draws(p, 20)


def test_a_tabular_policy_is_a_policy() -> None:
    w, pi = world(), policy(0)
    found = pi.evaluate(w.batch, want=("logp", "entropy"))
    # entropy = −E[log π] at each state: two ways to the expected entropy of a response
    p = w.probability(found["logp"])
    torch.testing.assert_close(expectation(p, found["entropy"].sum(1)), -expectation(p, found["logp"].sum(1)), **EXACT)
    uniform = pi.evaluate(w.batch, want=("entropy",), temperature=1e9)["entropy"]
    torch.testing.assert_close(uniform[w.batch.action], torch.full((int(w.batch.action.sum()),), math.log(3)).double())
    with pytest.raises(ValueError, match="hidden"):
        pi.evaluate(w.batch, want=("hidden",))


# ---- policy gradients are unbiased ---------------------------------------------------------------------------------


def test_reinforce_is_the_policy_gradient() -> None:
    w, pi = world(), policy(0)
    score, action, logp = w.score(taste), w.batch.action, logp_of(pi, w.batch)
    truth = policy_gradient(w, pi)
    assert truth.norm().item() > 0.05
    # the whole score on every token, the return from t on, and either with any baseline of the state
    whole = torch.where(action, score[:, None], torch.zeros_like(logp))
    to_go = returns.discounted(credit.last(score, action), action)
    for advantage in (whole, to_go, whole - state_function(w, 3), to_go - state_function(w, 4)):
        got = expected_gradient(w, pi, policy_loss.reinforce(logp, advantage))
        torch.testing.assert_close(got, -truth, **EXACT)
    # a baseline that looks at the action is not allowed, and the oracle sees it
    table = torch.randn(len(w.actions), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    looks = to_go - torch.where(action, table[w.action], torch.zeros_like(logp))
    assert (expected_gradient(w, pi, policy_loss.reinforce(logp, looks)) + truth).norm().item() > 1e-2


def test_uniform_credit_is_not_causal_so_its_return_to_go_is_biased() -> None:
    w, pi = world(), policy(0)
    score, action, logp = w.score(taste), w.batch.action, logp_of(pi, w.batch)
    truth = policy_gradient(w, pi)
    reward = credit.uniform(score, action)
    p = w.probability(logp).detach()
    spread = {}
    for name, paid in {"last": credit.last(score, action), "uniform": reward}.items():
        loss = policy_loss.reinforce(logp, returns.discounted(paid, action))
        g = row_gradients(loss.sum(1), list(pi.parameters()))
        spread[name] = variance(p, g).sum().item()
    # earlier tokens were paid a part of the outcome that this token decided; its return to go leaves that part out:
    # a bias of 38 % of the gradient here, and 58 % of the variance
    assert (expectation(p, g) + truth).norm().item() == pytest.approx(0.3753 * truth.norm().item(), rel=1e-3)
    assert spread["uniform"] < 0.6 * spread["last"]
    # the objective is the same, and the whole return, the parts already paid included, is unbiased
    whole = torch.where(action, reward.sum(1, keepdim=True), torch.zeros_like(logp))
    got = expected_gradient(w, pi, policy_loss.reinforce(logp, whole))
    torch.testing.assert_close(got, -truth, **EXACT)


def test_row_gradients_give_expectation_and_variance() -> None:
    w, pi = world(), policy(0)
    score, action, logp = w.score(taste), w.batch.action, logp_of(pi, w.batch)
    p = w.probability(logp).detach()
    to_go = returns.discounted(credit.last(score, action), action)
    value = w.values(logp.detach(), credit.last(score, action)).value
    spread = {}
    for name, advantage in {"score": to_go + 5, "value": to_go - value}.items():
        g = row_gradients(policy_loss.reinforce(logp, advantage).sum(1), list(pi.parameters()))
        torch.testing.assert_close(expectation(p, g), -policy_gradient(w, pi), **EXACT)
        spread[name] = variance(p, g).sum().item()
    assert spread["value"] < 0.1 * spread["score"]  # what a baseline is for


def test_ppo_at_ratio_one_with_exact_advantages_is_the_policy_gradient() -> None:
    w, pi = world(), policy(0)
    score, logp = w.score(taste), logp_of(pi, w.batch)
    found = w.values(logp.detach(), credit.last(score, w.batch.action))
    loss, clipped = policy_loss.ppo_clip(logp, logp.detach(), found.advantage, clip=0.2)
    torch.testing.assert_close(expected_gradient(w, pi, loss), -policy_gradient(w, pi), **EXACT)
    assert not clipped.any()


def test_gae_is_unbiased_at_lambda_one_and_its_bias_below_is_the_values_fault() -> None:
    w, pi = world(), policy(0)
    score, action, logp = w.score(taste), w.batch.action, logp_of(pi, w.batch)
    truth = policy_gradient(w, pi)
    right, wrong = w.values(logp.detach(), credit.last(score, action)).value, state_function(w, 6)

    def bias(value: Tensor, lam: float) -> float:
        advantage, _ = returns.gae(credit.last(score, action), value, action, 1.0, lam)
        loss, _ = policy_loss.ppo_clip(logp, logp.detach(), advantage)
        return (expected_gradient(w, pi, loss) + truth).norm().item()

    assert bias(wrong, 1.0) < 1e-10
    found = [bias(wrong, lam) for lam in (1.0, 0.95, 0.5, 0.0)]
    assert found == sorted(found)
    assert found[1] > 1e-3
    for lam in (0.95, 0.5, 0.0):
        assert bias(right, lam) < 1e-10


def test_leave_one_out_is_unbiased_and_the_group_mean_shrinks() -> None:
    w, pi, G = world(), policy(0), 2
    score, logp = w.score(taste), logp_of(pi, w.batch)
    truth = policy_gradient(w, pi)
    rows, p = w.draws(w.probability(logp).detach(), G)  # all 225 pairs of responses
    group = torch.arange(len(rows)).repeat_interleave(G)
    flat = rows.reshape(-1)
    for advantage_of, factor in ((returns.leave_one_out, 1.0), (returns.centred, (G - 1) / G)):
        advantage = advantage_of(score[flat], group)[:, None].expand(len(flat), logp.shape[1])
        loss = policy_loss.reinforce(logp[flat], advantage).sum(1).reshape(-1, G).mean(1)
        got = gradient(expectation(p, loss), list(pi.parameters()))
        torch.testing.assert_close(got, -factor * truth, **EXACT)


def test_cloning_minimises_the_forward_kl_of_responses() -> None:
    w, pi, expert = world(), policy(0), policy(9)
    logp, logp_expert = logp_of(pi, w.batch), logp_of(expert, w.batch).detach()
    demonstrated = w.probability(logp_expert)
    loss = expectation(demonstrated, imitation.nll(logp).sum(1))
    entropy = -expectation(demonstrated, logp_expert.sum(1))
    torch.testing.assert_close(loss - entropy, w.kl(logp_expert, logp), **EXACT)


# ---- estimators of KL ----------------------------------------------------------------------------------------------


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    w, pi, ref, mu = world(), policy(0), policy(5), policy(7)
    logp, logp_ref, logp_mu = (logp_of(x, w.batch).detach() for x in (pi, ref, mu))
    p, truth = w.probability(logp), w.kl(logp, logp_ref)
    # token by token along responses of π: Σ_t E KL_t is the divergence of responses
    torch.testing.assert_close(expectation(p, kl.reverse_k1(logp, logp_ref).sum(1)), truth, **EXACT)
    torch.testing.assert_close(expectation(p, kl.reverse_k3(logp, logp_ref).sum(1)), truth, **EXACT)
    assert abs(expectation(p, kl.reverse_k2(logp, logp_ref).sum(1)) - truth).item() > 1e-2
    # the other direction at the states π visits
    forward = expectation(p, w.kl_at(logp_ref, logp).sum(1))
    torch.testing.assert_close(expectation(p, kl.forward_k3(logp, logp_ref).sum(1)), forward, **EXACT)
    # tokens of μ, reweighted: KL(π ‖ ref) at the states μ visits
    p_mu, visited = w.probability(logp_mu), w.kl_at(logp, logp_ref).sum(1)
    for estimate in (kl.reverse_k1_off, kl.reverse_k3_off):
        got = expectation(p_mu, estimate(logp, logp_ref, logp_mu).sum(1))
        torch.testing.assert_close(got, expectation(p_mu, visited), **EXACT)


def near(delta: float) -> tuple[Exact, Tensor, Tensor, Tensor]:
    """π and a reference δ away from it, on one step."""
    w = Exact((0,), 5, 1)
    draw = torch.Generator().manual_seed(0)
    logits, tilt = (torch.randn(5, generator=draw, dtype=torch.float64) for _ in range(2))

    def logp(x: Tensor) -> Tensor:
        return w.logp(lambda tokens: x.expand(*tokens.shape, 5))

    a, b = logp(logits), logp(logits + delta * tilt)
    return w, w.probability(a), a, b


def test_the_order_of_k2s_bias_and_of_the_variances() -> None:
    bias, var1, var3, size = {}, {}, {}, {}
    for delta in (0.02, 0.01):
        w, p, logp, logp_ref = near(delta)
        size[delta] = w.kl(logp, logp_ref).item()
        bias[delta] = expectation(p, kl.reverse_k2(logp, logp_ref).sum(1)).item() - size[delta]
        var1[delta] = variance(p, kl.reverse_k1(logp, logp_ref).sum(1)).item()
        var3[delta] = variance(p, kl.reverse_k3(logp, logp_ref).sum(1)).item()
    # halving δ divides the divergence by 4, k2's bias by 8, k1's variance by 4, k3's by 16
    assert size[0.02] / size[0.01] == pytest.approx(4, rel=0.05)
    assert bias[0.02] / bias[0.01] == pytest.approx(8, rel=0.05)
    assert var1[0.02] / var1[0.01] == pytest.approx(4, rel=0.05)
    assert var3[0.02] / var3[0.01] == pytest.approx(16, rel=0.05)
    assert var3[0.01] < 1e-3 * var1[0.01]


def test_what_each_estimator_does_as_a_loss() -> None:
    w, pi, ref, mu = world(), policy(0), policy(5), policy(7)
    logp = logp_of(pi, w.batch)
    logp_ref, logp_mu = (logp_of(x, w.batch).detach() for x in (ref, mu))
    parameters = list(pi.parameters())

    def at_visited(sampler: Tensor, divergence: Tensor) -> Tensor:
        """∇ of the divergences at the states the sampler visits, their distribution held fixed."""
        return gradient(expectation(w.probability(sampler).detach(), divergence.sum(1)), parameters)

    def got(sampler: Tensor, estimate: Tensor) -> Tensor:
        return gradient(expectation(w.probability(sampler).detach(), estimate.sum(1)), parameters)

    reverse, forward = w.kl_at(logp, logp_ref), w.kl_at(logp_ref, logp)
    assert (at_visited(logp, reverse) - at_visited(logp, forward)).norm().item() > 1e-2
    torch.testing.assert_close(
        got(logp, kl.reverse_k1(logp, logp_ref)), torch.zeros(pi.table.numel()).double(), **EXACT
    )
    torch.testing.assert_close(got(logp, kl.reverse_k2(logp, logp_ref)), at_visited(logp, reverse), **EXACT)
    torch.testing.assert_close(got(logp, kl.reverse_k3(logp, logp_ref)), at_visited(logp, forward), **EXACT)
    for estimate in (kl.reverse_k1_off, kl.reverse_k3_off):
        for sampler in (logp.detach(), logp_mu):  # on the policy's own tokens, and on another's
            found = got(sampler, estimate(logp, logp_ref, sampler))
            torch.testing.assert_close(found, at_visited(sampler, reverse), **EXACT)


def test_a_kl_penalty_on_the_reward_is_the_regularised_gradient() -> None:
    w, pi, beta = world(), policy(0), 0.3
    action, logp = w.batch.action, logp_of(pi, w.batch)
    logp_ref, score = logp_of(policy(5), w.batch).detach(), w.score(taste)
    # what PPO does in RLHF: r_t = score at the end − β k1, a constant of the update
    reward = credit.last(score, action) - beta * kl.reverse_k1(logp.detach(), logp_ref)
    advantage, _ = returns.gae(reward, state_function(w, 3), action, 1.0, 1.0)
    objective = expectation(w.probability(logp), score) - beta * w.kl(logp, logp_ref)
    got = expected_gradient(w, pi, policy_loss.reinforce(logp, advantage))
    torch.testing.assert_close(got, -gradient(objective, list(pi.parameters())), **EXACT)


# ---- weights and micro-batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["per_token", "per_sequence", "per_slot"])
def test_micro_batches_row_order_and_padding_do_not_change_the_gradient(kind: str) -> None:
    w, pi = world(), policy(0)
    batch, parameters = w.batch, list(pi.parameters())
    advantage = state_function(w, 3)
    make = {
        "per_token": weights.per_token,
        "per_sequence": weights.per_sequence,
        "per_slot": lambda action, dtype: weights.per_slot(action, H, dtype=dtype),
    }[kind]

    def loss_of(rows: list[int], weight: Tensor) -> Tensor:
        part = batch.select(rows)  # cut to its longest row, like a real micro-batch
        L = part.tokens.shape[1]
        return (weight[:, :L] * policy_loss.reinforce(logp_of(pi, part), advantage[rows, :L])).sum()

    everything = list(range(len(batch)))
    weight = make(batch.action, dtype=torch.float64)
    whole = gradient(loss_of(everything, weight), parameters)
    for size in (1, 2, 7):
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(size)).tolist()
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        summed = torch.stack([loss_of(rows, weight[rows]) for rows in parts]).sum()
        torch.testing.assert_close(gradient(summed, parameters), whole, **EXACT)
    if kind == "per_token":
        # what this rules out: on ragged rows, the average of micro-batch averages is another gradient
        halves = [i for i in everything if batch.length[i] == 3], [i for i in everything if batch.length[i] > 3]
        averages = [loss_of(rows, make(batch.action[rows], dtype=torch.float64)) for rows in halves]
        assert (gradient(torch.stack(averages).mean(), parameters) - whole).norm() > 0.1 * whole.norm()


def test_per_slot_keeps_reinforce_unbiased_and_the_others_do_not() -> None:
    w, pi = world(), policy(0)
    action, logp = w.batch.action, logp_of(pi, w.batch)
    advantage = torch.where(action, w.score(taste)[:, None], torch.zeros_like(logp))
    loss, truth = policy_loss.reinforce(logp, advantage), policy_gradient(w, pi)
    rows = range(len(w))
    # a batch of one response: its weights depend on that response alone
    slots = torch.cat([weights.per_slot(action[i : i + 1], H, dtype=torch.float64) for i in rows])
    torch.testing.assert_close(H * expected_gradient(w, pi, slots * loss), -truth, **EXACT)
    lengths = torch.cat([weights.per_sequence(action[i : i + 1], dtype=torch.float64) for i in rows])
    biased = -expected_gradient(w, pi, lengths * loss)
    cosine = nn.functional.cosine_similarity(biased, truth, dim=0).item()
    assert cosine < 0.999  # not even the direction: short responses are favoured
