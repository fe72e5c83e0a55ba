"""Returns, advantages, whitening and group baselines: by hand, against a textbook recursion, and their laws."""

from __future__ import annotations

import math

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped

from tokenmdp.functional import returns

F64 = torch.float64
NAN = math.nan
# row 0 has a gap at position 2 (somebody else's token); row 1 is short
ACTION = torch.tensor([[False, True, False, True, True], [False, True, True, False, False]])


def test_discounted_by_hand() -> None:
    reward = torch.tensor([[NAN, 1.0, NAN, 2.0, 4.0], [NAN, 1.0, 8.0, NAN, NAN]], dtype=F64)
    # γ = ½. Row 0 from the end: 4; 2 + ½·4 = 4; 1 + ½·4 = 3 (the gap takes no time). Row 1: 8; 1 + ½·8 = 5
    want = torch.tensor([[0, 3.0, 0, 4.0, 4.0], [0, 5.0, 8.0, 0, 0]], dtype=F64)
    assert torch.equal(returns.discounted(reward, ACTION, 0.5), want)


def test_gae_by_hand() -> None:
    # One row, r = (0, 1), V = (2, 3), γ = 1, λ = ½.
    # δ_2 = 1 + 0 − 3 = −2;  δ_1 = 0 + 3 − 2 = 1;  A_2 = −2;  A_1 = 1 + ½·(−2) = 0;  R = A + V = (2, 1)
    action = torch.tensor([[False, True, True]])
    reward = torch.tensor([[9.0, 0.0, 1.0]], dtype=F64)
    value = torch.tensor([[9.0, 2.0, 3.0]], dtype=F64)
    advantage, target = returns.gae(reward, value, action, gamma=1.0, lam=0.5)
    assert advantage.tolist() == [[0, 0, -2]]
    assert target.tolist() == [[0, 2, 1]]


def textbook_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016, eq. 16, as the sum it is: A_t = Σ_l (γλ)^l δ_{t+l}."""
    following = [*values, 0.0][1:]
    delta = [r + gamma * v1 - v for r, v, v1 in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_gae_is_the_textbooks_on_rows_with_gaps(mask: list[list[bool]], gamma: float, lam: float, seed: int) -> None:
    action = torch.tensor(mask)
    draw = torch.Generator().manual_seed(seed)
    reward = torch.randn(action.shape, generator=draw, dtype=F64)
    value = torch.randn(action.shape, generator=draw, dtype=F64)
    # what lies outside the mask is never read
    spoiled_reward, spoiled_value = reward.masked_fill(~action, NAN), value.masked_fill(~action, NAN)
    advantage, target = returns.gae(spoiled_reward, spoiled_value, action, gamma, lam)
    for b in range(len(mask)):
        at = action[b]
        want = textbook_gae(reward[b][at].tolist(), value[b][at].tolist(), gamma, lam)
        torch.testing.assert_close(advantage[b][at], torch.tensor(want, dtype=F64))
        torch.testing.assert_close(target[b][at], advantage[b][at] + value[b][at])
    assert bool((advantage[~action] == 0).all())
    assert bool((target[~action] == 0).all())


def test_gae_at_its_ends() -> None:
    draw = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(2, 5, generator=draw, dtype=F64) for _ in range(2))
    inside = torch.where(ACTION, value, torch.zeros_like(value))
    for gamma in (1.0, 0.9):
        # λ = 1: discounted return minus value, and the target is that return
        ret = returns.discounted(reward, ACTION, gamma)
        advantage, target = returns.gae(reward, value, ACTION, gamma, 1.0)
        torch.testing.assert_close(advantage, ret - inside)
        torch.testing.assert_close(target, ret)
    # λ = 0: the one-step error. Row 1: r_1 + V_2 − V_1, r_2 − V_2
    advantage, _ = returns.gae(reward, value, ACTION, 1.0, 0.0)
    torch.testing.assert_close(advantage[1, 1], reward[1, 1] + value[1, 2] - value[1, 1])
    torch.testing.assert_close(advantage[1, 2], reward[1, 2] - value[1, 2])


def test_padding_and_row_order_change_nothing() -> None:
    draw = torch.Generator().manual_seed(1)
    reward, value = (torch.randn(2, 5, generator=draw, dtype=F64) for _ in range(2))
    advantage, target = returns.gae(reward, value, ACTION, 0.9, 0.8)
    wide = [torch.nn.functional.pad(x.flip(0), (0, 2)) for x in (reward, value, ACTION)]
    for a, b in zip(returns.gae(*wide, 0.9, 0.8), (advantage, target), strict=True):
        assert torch.equal(a[:, :5].flip(0), b)


@pytest.mark.parametrize(("gamma", "lam"), [(1.5, 0.9), (-0.1, 0.9), (0.9, 1.1), (0.9, NAN)])
def test_fractions_are_fractions(gamma: float, lam: float) -> None:
    with pytest.raises(ValueError, match="give a number from 0 to 1"):
        returns.gae(torch.zeros(2, 5), torch.zeros(2, 5), ACTION, gamma, lam)


def test_whiten_by_hand() -> None:
    # equal weights on 1 and 3: mean 2, standard deviation 1
    x = torch.tensor([[NAN, 1.0, 3.0]], dtype=F64)
    assert returns.whiten(x, torch.tensor([[0.0, 0.5, 0.5]], dtype=F64)).tolist() == [[0, -1, 1]]
    # weights ¾ and ¼ on 0 and 4: mean 1, variance ¾·1 + ¼·9 = 3
    y = returns.whiten(torch.tensor([0.0, 4.0], dtype=F64), torch.tensor([3.0, 1.0], dtype=F64))
    torch.testing.assert_close(y, torch.tensor([-1.0, 3.0], dtype=F64) / math.sqrt(3))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-6, 1e6), st.floats(-10, 10))
def test_whitened_numbers_have_mean_0_and_variance_1_in_any_unit(seed: int, unit: float, shift: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, generator=draw, dtype=F64)
    w = torch.rand(3, 4, generator=draw, dtype=F64) * (torch.rand(3, 4, generator=draw) > 0.3)
    w[0, 0] = w[1, 1] = 1.0
    y = returns.whiten(unit * (x + shift), w)
    share = w / w.sum()
    assert float((share * y).sum()) == pytest.approx(0, abs=1e-9)
    assert float((share * y.square()).sum()) == pytest.approx(1)
    assert bool((y[w == 0] == 0).all())


def test_the_mean_may_stay_where_it_is() -> None:
    """σ of (0, 4) at weights 3 and 1 is √3."""
    y = returns.whiten(torch.tensor([0.0, 4.0], dtype=F64), torch.tensor([3.0, 1.0], dtype=F64), shift=False)
    assert y.tolist() == pytest.approx([0.0, 4 / 3**0.5])


def test_what_does_not_vary_whitens_to_zero() -> None:
    for dtype in (torch.float32, F64):
        x = torch.full((7, 11), 0.1, dtype=dtype)  # 0.1 has no exact binary form: rounding must not become signal
        y = returns.whiten(x, torch.rand(7, 11, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(y, torch.zeros_like(x))
    assert torch.equal(returns.whiten(torch.tensor([5.0]), torch.tensor([1.0])), torch.zeros(1))
    assert torch.equal(returns.whiten(torch.tensor([5.0, NAN]), torch.zeros(2)), torch.zeros(2))


def test_group_baselines_by_hand() -> None:
    score = torch.tensor([1.0, 10.0, 2.0, 20.0, 6.0], dtype=F64)
    group = torch.tensor([7, 3, 7, 3, 7])
    # group 7: 1, 2, 6 with mean 3; group 3: 10, 20 with mean 15
    assert returns.group_mean(score, group).tolist() == [3, 15, 3, 15, 3]
    assert returns.centred(score, group).tolist() == [-2, -5, -1, 5, 3]
    # others' means in 7: (2+6)/2 = 4, (1+6)/2 = 3.5, (1+2)/2 = 1.5; in 3: 20 and 10
    assert returns.leave_one_out(score, group).tolist() == [-3, -10, -1.5, 10, 4.5]


def test_rows_without_a_verdict_enter_no_baseline() -> None:
    score = torch.tensor([1.0, NAN, 3.0, 5.0], dtype=F64)
    group = torch.tensor([0, 0, 0, 1])
    rows = torch.tensor([True, False, True, True])
    assert returns.group_mean(score, group, rows).tolist() == [2, 0, 2, 5]
    assert returns.centred(score, group, rows).tolist() == [-1, 0, 1, 0]
    # row 3 is alone: nothing to compare it with
    assert returns.leave_one_out(score, group, rows).tolist() == [-2, 0, 2, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
def test_group_laws(data: list[tuple[float, int, bool]]) -> None:
    score = torch.tensor([d[0] for d in data], dtype=F64)
    group = torch.tensor([d[1] for d in data])
    rows = torch.tensor([d[2] for d in data])
    loo, centred = returns.leave_one_out(score, group, rows), returns.centred(score, group, rows)
    for g in range(4):
        at = group == g
        assert float(loo[at].sum()) == pytest.approx(0, abs=1e-9)
        assert float(centred[at].sum()) == pytest.approx(0, abs=1e-9)
        n = int((at & rows).sum())
        if n > 1:  # the two differ by a factor
            torch.testing.assert_close(loo[at], centred[at] * n / (n - 1))


def test_dtype_and_shapes() -> None:
    check = jaxtyped(typechecker=beartype)
    for dtype in (torch.float32, F64):
        x, s, g = torch.ones(2, 5, dtype=dtype), torch.ones(2, dtype=dtype), torch.tensor([0, 0])
        assert check(returns.discounted)(x, ACTION, 0.9).dtype == dtype
        assert [a.dtype for a in check(returns.gae)(x, x, ACTION)] == [dtype, dtype]
        assert check(returns.whiten)(x, torch.ones(2, 5)).dtype == dtype
        for f in (returns.group_mean, returns.centred, returns.leave_one_out):
            assert check(f)(s, g).dtype == dtype
    with pytest.raises(TypeCheckError):
        check(returns.gae)(torch.ones(2, 5), torch.ones(2, 4), ACTION)


# -- spread, scale, greedy baselines, length ---------------------------------------------------------------------------------


def test_spread_and_scale_by_hand() -> None:
    # group 7: 1, 2, 6 around 3: (4 + 1 + 9)/2 = 7. Group 3: 10, 20: (25 + 25)/1 = 50. Group 1: alone. Group 0: equal.
    score = torch.tensor([1.0, 10.0, 2.0, 20.0, 6.0, 5.0, 4.0, 4.0], dtype=F64)
    group = torch.tensor([7, 3, 7, 3, 7, 1, 0, 0])
    deviation = returns.spread(score, group)
    want = [7**0.5, 50**0.5, 7**0.5, 50**0.5, 7**0.5, 0, 0, 0]
    torch.testing.assert_close(deviation, torch.tensor(want, dtype=F64))
    scaled = returns.scaled(returns.centred(score, group), deviation)
    torch.testing.assert_close(scaled[:2], torch.tensor([-2 / 7**0.5, -5 / 50**0.5], dtype=F64))
    assert scaled[5:].tolist() == [0, 0, 0]
    # the same on tokens
    tokens = returns.scaled(returns.centred(score, group)[:, None] * torch.ones(8, 3, dtype=F64), deviation)
    torch.testing.assert_close(tokens, scaled[:, None].expand(8, 3))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-6, 1e6), st.floats(-10, 10))
def test_scaled_advantages_have_no_unit(seed: int, unit: float, shift: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    score, group = torch.randn(6, generator=draw, dtype=F64), torch.tensor([0, 0, 0, 1, 1, 1])
    rows = torch.tensor([True, True, False, True, True, True])
    plain, moved = (
        returns.scaled(returns.centred(s, group, rows), returns.spread(s, group, rows))
        for s in (score, unit * (score + shift))
    )
    torch.testing.assert_close(plain, moved, rtol=1e-6, atol=1e-6)
    # two opposite numbers of sample variance 1; three of them
    assert float(plain[:2].square().sum()) == pytest.approx(1)
    assert float(plain[3:].square().sum()) == pytest.approx(2)
    assert float(plain[2]) == 0


def test_scores_that_differ_by_rounding_alone_do_not_vary() -> None:
    """Two forward passes of one response: their difference, divided by itself, would be an advantage of ±0.7."""
    for dtype in (torch.float32, F64):
        score = torch.tensor([0.1, 0.1 * (1 + 2 * torch.finfo(dtype).eps), 5.0, 5.5], dtype=dtype)
        group = torch.tensor([0, 0, 1, 1])
        deviation = returns.spread(score, group)
        assert deviation[:2].tolist() == [0, 0]
        assert float(deviation[2]) == pytest.approx(0.5 / 2**0.5)
        assert returns.scaled(returns.centred(score, group), deviation)[:2].tolist() == [0, 0]


def test_equal_scores_leave_no_advantage_at_all() -> None:
    """(8 · 0.7 − 0.7) / 7 is not 0.7 in float32, and Adam makes a full step of any remainder."""
    for dtype in (torch.float32, F64):
        for value in (0.7, 0.1, 1e8, 1e-8):
            score, group = torch.full((8,), value, dtype=dtype), torch.zeros(8, dtype=torch.long)
            for f in (returns.leave_one_out, returns.centred, returns.spread):
                assert not f(score, group).any()


def test_the_spread_of_a_batch_and_of_rows_with_a_verdict() -> None:
    score = torch.tensor([1.0, NAN, 3.0, 8.0], dtype=F64)
    rows = torch.tensor([True, False, True, True])
    # 1, 3, 8 around 4: (9 + 1 + 16)/2 = 13; the row without a verdict has none
    found = returns.spread(score, torch.zeros(4, dtype=torch.long), rows)
    torch.testing.assert_close(found, torch.tensor([13**0.5, 0, 13**0.5, 13**0.5], dtype=F64))
    assert returns.spread(score, torch.zeros(4, dtype=torch.long), ~rows).tolist() == [0, 0, 0, 0]


def test_a_greedy_baseline_by_hand() -> None:
    score, group = torch.tensor([1.0, 2.0, 5.0, NAN], dtype=F64), torch.tensor([0, 0, 1, 1])
    rows = torch.tensor([True, True, True, False])
    assert returns.against(score, group, torch.tensor([1.5, 7.0], dtype=F64), rows).tolist() == [-0.5, 0.5, -2, 0]
    with pytest.raises(ValueError, match="one for each group"):
        returns.against(score, group, torch.tensor([1.5], dtype=F64))


def test_length_costs_near_the_horizon_only() -> None:
    # H = 10, m = 4: free up to 6, then a quarter a token
    length = torch.tensor([1, 6, 7, 9, 10])
    assert returns.overlong(length, 10, 4).tolist() == [0, 0, -0.25, -0.75, -1]
    assert not returns.overlong(length, 10, 0).any()
    for margin in (-1, 11):
        with pytest.raises(ValueError, match=f"margin={margin}"):
            returns.overlong(length, 10, margin)
