"""The process reward: one probability a step, read after the step and no later; one score from them; the same on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_models import EOS, batch, ragged, tiny
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.rewards.step_model import StepRewardModel
from tokenmdp.testing import contracts


def made(aggregate: str = "min", delimiter: str = "w4", pool: str = "last") -> StepRewardModel:
    model = RewardModel.from_policy(tiny(), "head", pool)
    with torch.no_grad():
        model.head.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(0))
    return StepRewardModel(model, delimiter, aggregate)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_it_keeps_the_contract_of_rewards(pool: str) -> None:
    contracts.check_reward(made(pool=pool), ragged())


def test_a_step_is_judged_by_what_came_up_to_its_end() -> None:
    b = batch([([1, 2], [3, 4, 6, 7, 4, 8, EOS])])
    said = made()(b).steps
    assert said is not None
    assert said[0].nonzero()[:, 0].tolist() == [3, 6, 7]
    for t in (3, 6, 7):
        alone = made()(batch([(b.tokens[0, :2].tolist(), b.tokens[0, 2 : t + 1].tolist())])).steps
        assert alone is not None
        assert float(alone[0, t]) == pytest.approx(float(said[0, t]), abs=1e-6)
    other = made()(batch([([1, 2], [3, 4, 6, 7, 4, 9, 9, EOS])])).steps
    assert other is not None
    assert other[0, [3, 6]].tolist() == pytest.approx(said[0, [3, 6]].tolist(), abs=1e-6)


def test_one_score_from_the_steps() -> None:
    b = batch([([1, 2], [3, 4, 6, 7, 4, 8, EOS]), ([1], [5])])
    said = made()(b).steps
    assert said is not None
    p = said[0][said[0] > 0]
    want = {"min": p.min(), "last": p[-1], "product": p.prod()}
    for aggregate, value in want.items():
        found = made(aggregate)(b)
        assert found.value.tolist() == pytest.approx([float(value), float(said[1].sum())])


def test_a_response_without_tokens_has_no_verdict() -> None:
    score = made()(batch([([1, 2], []), ([1], [5])]))
    assert score.verdict.tolist() == [False, True]
    assert float(score.value[0]) == 0.0


def test_it_is_the_same_on_disk(tmp_path: Path) -> None:
    model, policy, b = made("product", "w7"), tiny(), ragged()
    model.save(tmp_path / "prm")
    found = StepRewardModel.load(tmp_path / "prm", policy)
    assert (found.delimiter, found.aggregate, found.name) == ("w7", "product", "prm")
    torch.testing.assert_close(found(b).value, model(b).value)
    assert {f.suffix for f in (tmp_path / "prm").iterdir()} <= {".json", ".safetensors"}


def test_another_aggregate_is_refused() -> None:
    with pytest.raises(ValueError, match="aggregate is 'mean'; it must be one of min, last, product"):
        made("mean")
