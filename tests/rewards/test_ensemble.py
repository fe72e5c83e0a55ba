"""Ensembles: the three rules by hand, verdicts, units, and how they are spelled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_models
from tokenmdp import rewards
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.rewards.ensemble import Ensemble, combine
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.rewards.mixture import Mixture
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.types import Batch

SOURCE = (
    "def length(completions): return [len(c) for c in completions]\ndef one(completions): return [1] * len(completions)"
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return catalog.load("tiny")


@pytest.fixture
def batch(policy: Policy) -> Batch:
    texts = ["2", "19"]
    return Batch.build(
        [policy.prompt("1+1=", i) for i in range(2)], [policy.encode(t) for t in texts], texts=texts, ended=[True, True]
    )


def fixed(values, name="fixed"):
    return FunctionReward(lambda completions: values, name=name, max_missing=1.0)


def learned(policy: Policy, seed: int) -> RewardModel:
    """A reward model with a random head."""
    model = RewardModel.from_policy(policy, "head", name=f"seed{seed}")
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def test_the_rules_by_hand():
    # Members say 1, 2 and 6: mean 3, minimum 1, variance (4 + 1 + 9) / 3 = 14/3; 3 − ½ · 14/3 = 2/3.
    scores = torch.tensor([[1.0], [2.0], [6.0]])
    assert float(combine(scores)) == 3
    assert float(combine(scores, "min")) == 1
    assert float(combine(scores, "mean", 0.5)) == pytest.approx(2 / 3)


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=6), st.floats(0, 3))
def test_pessimism_is_never_above_the_mean_and_members_that_agree_pay_nothing(values: list[float], penalty: float):
    scores = torch.tensor(values, dtype=torch.float64)[:, None]
    mean = float(combine(scores))
    assert float(combine(scores, "min")) <= mean + 1e-12
    assert float(combine(scores, "mean", penalty)) <= mean + 1e-12
    agreed = scores[:1].expand(4, 1)
    assert float(combine(agreed, "mean", penalty)) == pytest.approx(values[0])


def test_a_verdict_takes_every_member(batch: Batch):
    ensemble = Ensemble([fixed([1.0, 4.0], "a"), fixed([3.0, None], "b")], "min")
    score = ensemble(batch)
    assert score.value.tolist() == [1.0, 0.0]
    assert score.verdict.tolist() == [True, False]
    assert score.parts["a"].value.tolist() == [1.0, 4.0]
    assert dict(score.reasons) == {1: "b: returned None"}
    assert ensemble.name == "min(a, b)"
    silent = Ensemble([fixed([1.0, 1.0]), fixed([None, None])], penalty=0.5)(batch)
    assert silent.verdict.tolist() == [False, False]
    assert set(silent.parts) == {"fixed_1", "fixed_2"}


def test_token_rewards_of_members_stay_theirs(batch: Batch):
    score = Ensemble([fixed([[1.0], [1.0, 2.0]], "steps"), fixed([5.0, 1.0], "whole")], "min")(batch)
    assert score.token is None
    assert score.value.tolist() == [1.0, 1.0]
    assert score.parts["steps"].token is not None


def test_learned_members_must_be_normalised(policy: Policy, batch: Batch):
    ensemble = Ensemble([learned(policy, 0), learned(policy, 1)], penalty=1.0)
    with pytest.raises(ValueError, match=r"seed0, seed1 of the ensemble mean - 1\*variance\(seed0, seed1\).*normalise"):
        ensemble(batch)
    ensemble.normalise(batch)
    parts = ensemble(batch).parts
    for part in parts.values():  # mean 0 and variance 1 over two rows: −1 and 1
        assert sorted(part.value.tolist()) == pytest.approx([-1.0, 1.0], abs=1e-4)
    nested = Ensemble([Ensemble([learned(policy, 2), learned(policy, 3)]), fixed([0.0, 0.0])], "min")
    nested.normalise(batch)
    assert nested(batch).verdict.all()


def test_what_is_no_ensemble_is_refused(policy: Policy):
    with pytest.raises(ValueError, match="ensemble of 1: one opinion"):
        Ensemble([fixed([1.0])])
    with pytest.raises(ValueError, match="rule is 'median'"):
        Ensemble([fixed([1.0]), fixed([1.0])], "median")
    for rule, penalty in (("min", 0.5), ("mean", -1.0), ("mean", float("nan"))):
        with pytest.raises(ValueError, match="price of a unit of variance"):
            Ensemble([fixed([1.0]), fixed([1.0])], rule, penalty)
    with pytest.raises(ValueError, match="members seed0 and seed1 have different tokenizers"):
        Ensemble([learned(policy, 0), learned(tiny_models.tiny(), 1)])


def test_spelled_out(policy: Policy, batch: Batch, tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    length, one = f"{file}:length", f"{file}:one"
    # Lengths 1 and 2, ones: min 1, 1; mean 1, 1.5; less 2·variance of (2, 1) = 2·¼.
    assert rewards.load(f"min({length}, {one})", policy)(batch).value.tolist() == [1.0, 1.0]
    assert rewards.load(f"mean({length},{one})", policy)(batch).value.tolist() == [1.0, 1.5]
    reward = rewards.load(f"mean-2*variance({length}, {one})", policy)
    assert isinstance(reward, Ensemble)
    assert reward(batch).value.tolist() == [1.0, 1.0]
    assert reward.name == "mean - 2*variance(length, one)"
    # Options of a member, a mixture for a member, an ensemble within another, and one within a mixture.
    deep = f"0.5*min({length}:timeout_seconds=2,max_missing=0.1, mean({one}, {length} + {one})) + {one}"
    reward = rewards.load(deep, policy)
    assert isinstance(reward, Mixture)
    # Row 0: ½ min(1, mean(1, 2)) + 1 = 1.5; row 1: ½ min(2, mean(1, 3)) + 1 = 2.
    assert reward(batch).value.tolist() == [1.5, 2.0]
    with pytest.raises(ValueError, match="ensemble of 1"):
        rewards.load(f"min({length})", policy)
    with pytest.raises(ValueError, match="there is no reward 'nothing'"):
        rewards.load(f"min(nothing, {one})", policy)


def test_saved_members_are_an_ensemble_again(policy: Policy, batch: Batch, tmp_path: Path):
    ensemble = Ensemble([learned(policy, 0), learned(policy, 1)], "min")
    ensemble.normalise(batch)
    for name, member in zip("ab", ensemble.members, strict=True):
        member.save(tmp_path / name)
    again = rewards.load(f"min({tmp_path / 'a'}, {tmp_path / 'b'})", policy)
    assert torch.allclose(again(batch).value, ensemble(batch).value, atol=1e-5)
