"""The copying task: its instructions, and the verdict that names what was met."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokenmdp import rewards, tasks
from tokenmdp.models import tiny
from tokenmdp.tasks import copying
from tokenmdp.testing import contracts
from tokenmdp.types import Batch


def test_every_instruction_is_there_once_and_demonstrated_rightly() -> None:
    policy = tiny.tiny()
    task = copying.load(policy, length=2, letters=3)
    assert sorted(p.text for p in task.train) == [f"{a}{b}>" for a in "abc" for b in "abc"]
    assert task.held_out == task.train
    assert task.demonstrations is not None
    assert task.reward is not None
    assert task.reward(task.demonstrations).value.tolist() == [1.0] * 9
    kept = copying.load(policy, length=2, letters=3, held_out=4)
    assert len(kept.train) == 5
    assert len(kept.held_out) == 4
    assert not {p.text for p in kept.train} & {p.text for p in kept.held_out}


def test_the_reward_is_one_for_what_was_asked_and_names_it_otherwise() -> None:
    policy, reward = tiny.tiny(), copying.Begins(2)
    texts = ["abc", "ba", "a", ""]
    b = Batch.build(
        [policy.prompt("ab>")] * 4,
        [[*policy.encode(t), policy.eos_ids[0]] for t in texts],
        texts=texts,
        ended=[True] * 4,
    )
    assert reward(b).value.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert [reward.satisfied(t) for t in texts] == ["ab>", "ba>", None, None]
    contracts.check_reward(reward, b)


def test_it_is_found_by_its_name() -> None:
    policy = tiny.tiny()
    task = tasks.load("copying", policy, letters=4)
    assert len(task.train) == 4
    assert rewards.load("copying", policy).name == "copying"
    drawn = task.draw(2, torch.Generator().manual_seed(0))
    assert len({p.text for p in drawn}) == 2


@pytest.mark.parametrize("options", [{"length": 0}, {"length": 4}, {"letters": 27}, {"held_out": 14}])
def test_what_is_outside_its_range_is_named(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        copying.load(tiny.tiny(), **options)
