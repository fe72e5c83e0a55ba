"""One optimiser step is one gradient, however the batch is cut; a bad loss changes nothing; a restored learner goes
on bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_models import ragged, tiny
from tokenmdp.functional import weights
from tokenmdp.learner import Learner, NonFiniteLoss
from tokenmdp.models.policy import Policy
from tokenmdp.types import Batch, Pairs


class One:
    """The smallest thing that trains: one vector."""

    def __init__(self, *start: float) -> None:
        self.x = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "x", self.x

    def slope(self, part: Batch, slope: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss [B] linear in x, one slope a row: its gradient is known by hand."""
        return slope * self.x.sum(), {}


@pytest.fixture
def policy() -> Policy:
    policy = tiny("llama")
    policy.model.double()
    return policy.twin("all")


@pytest.fixture
def b() -> Batch:
    return ragged(9)


def gradients(learner: Learner) -> dict[str, Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in learner.named.items()}
    learner.optimiser.zero_grad(set_to_none=True)
    return found


def assert_equal(found: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    size = torch.cat([w.reshape(-1) for w in want.values()]).norm()
    error = torch.cat([(found[n] - want[n]).reshape(-1) for n in want]).norm()
    assert float(error) <= tolerance * float(size)


def advantages(b: Batch) -> Tensor:
    noise = torch.randn(b.tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.where(b.action, noise, torch.zeros_like(noise))


# -- one gradient
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weigh", [weights.per_token, weights.per_sequence], ids=["per_token", "per_sequence"])
@pytest.mark.parametrize("tokens", [1, 25, 60, 100_000])
def test_micro_batches_do_not_change_the_gradient(policy: Policy, b: Batch, tokens: int, weigh: Any) -> None:
    """Against autograd through the whole batch at once."""
    advantage, w = advantages(b), weigh(b.action, dtype=torch.float64)
    learner = Learner(policy, 1e-3, tokens=tokens)

    def loss(part: Batch, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logp = policy.evaluate(part)["logp"]
        return -advantage * logp, {"logp": logp}

    whole = (w * -advantage * policy.evaluate(b)["logp"]).sum()
    whole.backward()
    want = gradients(learner)
    totals = learner.gradient(loss, b, w, advantage=advantage)
    assert_equal(gradients(learner), want, 1e-10)
    assert totals["loss"] == pytest.approx(float(whole.detach()), rel=1e-10)
    assert totals["logp"] == pytest.approx(float((w * policy.evaluate(b)["logp"]).sum().detach()), rel=1e-10)


def test_row_order_does_not_change_the_gradient(policy: Policy, b: Batch) -> None:
    advantage, w = advantages(b), weights.per_token(b.action, dtype=torch.float64)
    learner = Learner(policy, 1e-3, tokens=40)

    def loss(part: Batch, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -advantage * policy.evaluate(part)["logp"], {}

    learner.gradient(loss, b, w, advantage=advantage)
    want = gradients(learner)
    order = torch.randperm(len(b), generator=torch.Generator().manual_seed(1))
    learner.gradient(loss, b.select(order), w[order], advantage=advantage[order])
    assert_equal(gradients(learner), want, 1e-10)


def test_padding_does_not_change_the_gradient(policy: Policy, b: Batch) -> None:
    learner = Learner(policy, 1e-3, tokens=40)

    def loss(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return -policy.evaluate(part)["logp"], {}

    learner.gradient(loss, b, weights.per_token(b.action, dtype=torch.float64))
    want = gradients(learner)
    wide = dataclasses.replace(
        b, tokens=nn.functional.pad(b.tokens, (0, 11), value=5), action=nn.functional.pad(b.action, (0, 11))
    )
    learner.gradient(loss, wide, weights.per_token(wide.action, dtype=torch.float64))
    assert_equal(gradients(learner), want, 1e-10)


@pytest.mark.parametrize("tokens", [1, 70, 100_000])
def test_pairs_are_cut_like_rows(policy: Policy, b: Batch, tokens: int) -> None:
    pairs = Pairs(b, ragged(9, seed=4), torch.linspace(0, 1, 9))
    learner, w = Learner(policy, 1e-3, tokens=tokens), weights.per_row(9, dtype=torch.float64)

    def loss(part: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        gap = policy.evaluate(part.chosen)["logp"].sum(1) - policy.evaluate(part.rejected)["logp"].sum(1)
        return -nn.functional.logsigmoid(0.1 * gap - part.margin), {"gap": gap}

    value = loss(pairs)[0]
    (w * value).sum().backward()
    want = gradients(learner)
    totals = learner.gradient(loss, pairs, w)
    assert_equal(gradients(learner), want, 1e-10)
    assert totals["loss"] == pytest.approx(float(value.mean().detach()), rel=1e-10)


def test_columns_of_states_are_cut_along_with_their_rows(b: Batch) -> None:
    one = One(0.0)
    learner = Learner(one, 1.0, tokens=30)
    states = torch.randn((*b.tokens.shape, 3), dtype=torch.float64)
    number = torch.arange(len(b), dtype=torch.float64)

    def loss(part: Batch, states: Tensor, number: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert states.shape == (*part.tokens.shape, 3)
        return (states.sum(-1) + number[:, None]) * one.x, {}

    w = weights.per_token(b.action, dtype=torch.float64)
    learner.gradient(loss, b, w, states=states, number=number)
    want = (w * (states.sum(-1) + number[:, None])).sum()
    assert float(gradients(learner)["x"]) == pytest.approx(float(want), rel=1e-12)


def test_a_row_without_weight_teaches_nothing_and_may_be_anything(b: Batch) -> None:
    """Row 2 has no verdict: its loss is NaN, its weight 0."""
    one = One(1.0)
    learner = Learner(one, 1.0)
    w = weights.per_row(torch.arange(9) != 2, dtype=torch.float64)
    offset = torch.where(torch.arange(9) == 2, torch.nan, 0.0).double()
    totals = learner.gradient(
        lambda part, offset: (one.x.expand(len(part)) + offset, {"offset": offset}), b, w, offset=offset
    )
    assert totals == pytest.approx({"loss": 1.0, "offset": 0.0})
    assert float(gradients(learner)["x"]) == pytest.approx(1.0)


def test_a_loss_that_is_already_reduced_is_refused(b: Batch) -> None:
    one = One(1.0)
    with pytest.raises(ValueError, match=r"the loss has shape \(\), its weight \(9,\): a loss is unreduced"):
        Learner(one, 1.0).gradient(lambda part: (one.x.sum(), {}), b, weights.per_row(9))


# -- one step
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 100.0])
def test_a_step_is_adam_on_the_clipped_gradient(policy: Policy, b: Batch, clip_norm: float) -> None:
    """Against torch's own AdamW and clipping, three steps with weight decay."""
    w = weights.per_token(b.action, dtype=torch.float64)
    copies = {n: nn.Parameter(p.detach().clone()) for n, p in policy.trained()}
    adam = torch.optim.AdamW(copies.values(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    learner = Learner(policy, 3e-3, weight_decay=0.1, clip_norm=clip_norm, tokens=50)

    def loss(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return -policy.evaluate(part)["logp"], {}

    for _ in range(3):
        (w * loss(b)[0]).sum().backward()
        for name, grad in gradients(learner).items():
            copies[name].grad = grad
        norm = float(nn.utils.clip_grad_norm_(copies.values(), clip_norm or float("inf")))
        adam.step()
        metrics = learner.step(loss, b, w)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-9)
        assert_equal(
            {n: p.detach() for n, p in learner.named.items()}, {n: p.detach() for n, p in copies.items()}, 1e-9
        )


def test_the_gradient_is_clipped_as_a_whole(b: Batch) -> None:
    """Gradient (12, 5) of norm 13 clipped to 1.3 is (1.2, 0.5); Adam's first moment is a tenth of it."""
    one = One(0.0, 0.0)
    learner = Learner(one, 1.0, clip_norm=1.3)
    slope = torch.tensor([12.0, 5.0], dtype=torch.float64)
    w = weights.per_row(9, dtype=torch.float64)
    metrics = learner.step(lambda part: ((slope * one.x).sum().expand(len(part)), {}), b, w)
    assert metrics["grad_norm"] == pytest.approx(13.0)
    assert learner.optimiser.state[one.x]["exp_avg"].tolist() == pytest.approx([0.12, 0.05])


def test_the_schedule_by_hand(b: Batch) -> None:
    """Warm-up over 4 steps to 1, decay over 10: the smaller of (t + 1)/4 and 1 − t/10; after that nothing moves."""
    one = One(0.0)
    learner = Learner(one, 2.0, steps=10, warmup=4, schedule="linear")
    w, slope = weights.per_row(9, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    rates = [learner.step(one.slope, b, w, slope=slope)["learning_rate"] for _ in range(11)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 1.4, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    # With a constant gradient every Adam step is the rate itself: x = −Σ rates.
    assert float(one.x) == pytest.approx(-sum(rates), rel=1e-6)


class Two:
    """A body and a head of one number each."""

    def __init__(self) -> None:
        self.body, self.head = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "body.x", self.body
        yield "score.x", self.head


def test_weights_may_have_a_rate_of_their_own(b: Batch) -> None:
    """The schedule of 1, ½ applies to both rates; with a constant gradient every Adam step is the rate itself."""
    two = Two()
    learner = Learner(two, 0.5, rates={"score": 4.0}, steps=2, schedule="linear")
    w = weights.per_row(9, dtype=torch.float64)
    found = [learner.step(lambda part: ((two.body + two.head).expand(len(part)), {}), b, w) for _ in range(2)]
    assert [metrics["learning_rate"] for metrics in found] == [0.5, 0.25]
    assert two.body.tolist() == pytest.approx([-0.75], rel=1e-6)
    assert two.head.tolist() == pytest.approx([-6.0], rel=1e-6)


def test_a_constant_rate_rises_once_and_stays(b: Batch) -> None:
    one = One(0.0)
    learner = Learner(one, 1.0, warmup=2)
    w, slope = weights.per_row(9, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    assert [learner.step(one.slope, b, w, slope=slope)["learning_rate"] for _ in range(4)] == [0.5, 1.0, 1.0, 1.0]


# -- bad losses
# -------------------------------------------------------------------------------------------------------------


def snapshot(learner: Learner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.tensors().items()}


def assert_bit_equal(a: dict[str, Tensor], c: dict[str, Tensor]) -> None:
    assert a.keys() == c.keys()
    for name, value in a.items():
        assert torch.equal(value, c[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing_and_names_its_rows(policy: Policy, b: Batch, bad: float) -> None:
    w, factor = weights.per_token(b.action, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    learner = Learner(policy, 1e-2, tokens=40)

    def loss(part: Batch, factor: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -factor[:, None] * policy.evaluate(part)["logp"], {}

    learner.step(loss, b, w, factor=factor)
    before = snapshot(learner)
    factor[5] = bad
    with pytest.raises(
        NonFiniteLoss, match=r"not finite on rows \[5\] of the batch at optimiser step 1; no weight was changed"
    ):
        learner.step(loss, b, w, factor=factor)
    assert_bit_equal(snapshot(learner), before)
    assert learner.taken == 1
    factor[5] = 1.0
    learner.step(loss, b, w, factor=factor)  # and nothing of the bad gradient is left over
    after = snapshot(learner)
    learner.restore(before, {"taken": 1})
    learner.step(loss, b, w, factor=factor)
    assert_bit_equal(snapshot(learner), after)


def test_a_gradient_that_is_not_finite_changes_nothing(b: Batch) -> None:
    """√x has a finite value and an infinite slope at 0."""
    one = One(0.0)
    learner = Learner(one, 1.0)
    before = snapshot(learner)
    with pytest.raises(NonFiniteLoss, match="norm is inf at optimiser step 0"):
        learner.step(lambda part: (one.x.sqrt().expand(len(part)), {}), b, weights.per_row(9, dtype=torch.float64))
    assert_bit_equal(snapshot(learner), before)
    assert one.x.grad is None


# -- checkpoints
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["all", "top-1", "lora-2"])
def test_a_restored_learner_goes_on_bit_for_bit(b: Batch, train: str) -> None:
    def start() -> tuple[Policy, Learner]:
        twin = tiny("llama").twin(train)
        return twin, Learner(twin, 1e-2, steps=6, warmup=2, schedule="linear", weight_decay=0.01, tokens=60)

    def take(policy: Policy, learner: Learner, steps: int) -> list[dict[str, float]]:
        w = weights.per_token(b.action)
        return [learner.step(lambda part: (-policy.evaluate(part)["logp"], {}), b, w) for _ in range(steps)]

    policy, learner = start()
    take(policy, learner, 2)
    tensors, scalars = snapshot(learner), learner.scalars()
    want = take(policy, learner, 3)
    other_policy, other = start()
    other.restore(tensors, scalars)
    assert take(other_policy, other, 3) == want
    assert_bit_equal(snapshot(other), snapshot(learner))
    assert other_policy.fingerprint() == policy.fingerprint()


def test_restoring_copies_and_does_not_share(b: Batch) -> None:
    one, two = One(1.0), One(2.0)
    w, slope = weights.per_row(9, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    first, second = Learner(one, 1.0), Learner(two, 1.0)
    first.step(one.slope, b, w, slope=slope)
    saved = snapshot(first)
    second.restore(first.tensors(), first.scalars())
    second.step(two.slope, b, w, slope=slope)
    assert_bit_equal(snapshot(first), saved)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    learner = Learner(One(1.0), 1.0)
    with pytest.raises(ValueError, match="no weight for x"):
        learner.restore({}, {"taken": 0})
    with pytest.raises(ValueError, match=r"shape \(2,\) for x \(1,\)"):
        learner.restore({"weight/x": torch.zeros(2)}, {"taken": 0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"tokens": 0}, "tokens=0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"schedule": "cosine"}, "schedule is 'cosine'; it must be constant or linear"),
        ({"schedule": "linear"}, "say how many there will be"),
    ],
)
def test_settings_outside_their_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Learner(One(1.0), **{"learning_rate": 1.0, **settings})


def test_a_learner_needs_something_that_trains() -> None:
    with pytest.raises(ValueError, match="no weight trains: take a twin"):
        Learner(tiny("llama").freeze(), 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": -1}, "warmup=-1"),
        ({"steps": -2}, "steps=-2"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"clip_norm": float("nan")}, "clip_norm=nan"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"rates": {"x": -1.0}}, r"rates\['x'\]=-1\.0"),
        ({"rates": {"x": float("inf")}}, r"rates\['x'\]=inf"),
    ],
)
def test_what_would_train_nonsense_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Learner(One(1.0), **{"learning_rate": 1e-3, **changes})
