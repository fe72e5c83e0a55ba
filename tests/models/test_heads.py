"""The critic reads the state before each token, and only that."""

from __future__ import annotations

import pytest
import torch

from tiny_models import ragged, tiny
from tokenmdp.models.heads import Critic, pooled
from tokenmdp.types import Batch


@pytest.fixture
def critic() -> Critic:
    policy = tiny("llama")
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return Critic(policy.backbone.twin("head"), weight, bias=0.25)


def test_values_are_zero_outside_the_actions_and_finite_inside(critic: Critic) -> None:
    b = ragged()
    value = critic.value(critic.states(b), b)
    assert torch.equal(value != 0, b.action)
    assert bool(torch.isfinite(value).all())


def test_a_value_is_that_of_the_prefix_before_the_token(critic: Critic) -> None:
    """V(s_t) computed from tokens[:t] alone, row by row and position by position."""
    b = ragged(3)
    value = critic.value(critic.states(b), b)
    for i, t in b.action.nonzero().tolist():
        hidden = critic.backbone.hidden(b.tokens[i : i + 1, :t])[0, -1]
        assert float(value[i, t]) == pytest.approx(critic.head(hidden).detach().item(), rel=1e-4, abs=1e-4)


def test_a_value_does_not_see_the_token_it_precedes(critic: Critic) -> None:
    b = ragged(2)
    row, last = 0, int(b.length[0]) - 1
    other = b.tokens.clone()
    other[row, last] = (other[row, last] + 1) % 61
    changed = Batch(**{**vars(b), "tokens": other})
    assert torch.equal(critic.value(critic.states(changed), changed)[row], critic.value(critic.states(b), b)[row])


def test_without_weights_every_state_is_worth_nothing() -> None:
    b = ragged(2)
    critic = Critic(tiny("llama").backbone.twin("head"))
    assert torch.equal(critic.value(critic.states(b), b), torch.zeros(b.tokens.shape))


@pytest.mark.parametrize(
    ("train", "body"), [("head", False), ("none", False), ("all", True), ("top-1", True), ("lora-2", True)]
)
def test_the_head_always_trains_and_the_body_where_asked(train: str, body: bool) -> None:
    critic = Critic(tiny("llama").backbone.twin(train))
    names = [name for name, _ in critic.trained()]
    assert critic.body_trains == body
    assert {"value_weight", "value_bias"} <= set(names)
    assert (len(names) > 2) == body
    assert len(names) == len(set(names))


def test_a_head_reads_the_last_state_or_the_mean_of_the_states_so_far() -> None:
    """States 2, 4, 9 have running means 2, 3, 5."""
    hidden = torch.tensor([2.0, 4.0, 9.0]).view(1, 3, 1)
    assert torch.equal(pooled(hidden, "last"), hidden)
    assert pooled(hidden, "mean").flatten().tolist() == [2.0, 3.0, 5.0]
    with pytest.raises(ValueError, match="pool is 'max'; it must be one of last, mean"):
        pooled(hidden, "max")
