"""Policy gradient with demonstrations: it learns, the demonstrations' weight fades, and without any signal they lead."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import batch
from tiny_policy_gradient import build_dapg, build_reinforce
from tiny_recipes import LIKED, liked_share, task
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import dapg, reinforce
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.types import Batch

LEARNING = {"steps": 8, "prompts": 16, "samples": 4, "demonstrations": 8, "learning_rate": 1e-2, "micro_tokens": 800}
NOTHING = FunctionReward(lambda completions, **_: [0.0] * len(completions), name="nothing")


def train(
    folder: Path, reward: Any = None, shown: Batch | None = None, **changes: Any
) -> tuple[Policy, Policy, list[dict[str, float]]]:
    """The trained policy, its reference, and the metrics of a small run."""
    cfg, (reference, usual, prompts) = build_dapg(**changes)
    if shown is not None:
        prompts = replace(prompts, demonstrations=shown)
    with Run.open(folder, config={}, seed=0) as run:
        trained, _ = dapg.train(cfg, reference, reward or usual, prompts, run)
    return trained, reference, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def liked(trained: Policy) -> float:
    prompts = [*task().held_out, *task().train[:15]]
    b = trained.sample(prompts, 4, Sampling(max_new_tokens=5), torch.Generator().manual_seed(5))
    return sum(liked_share(list(b.texts))) / len(b)


def test_it_improves_the_score(tmp_path: Path) -> None:
    trained, reference, lines = train(tmp_path / "run", **LEARNING)
    assert liked(trained) > liked(reference) + 0.15
    assert all(line["demonstration_weight"] > 0 for line in lines)


def test_demonstrations_of_weight_0_are_not_there(tmp_path: Path) -> None:
    """The first update is that of REINFORCE with its leave-one-out baseline."""
    _, _, mine = train(tmp_path / "dapg", demo_weight=0.0, steps=1, kl=0.1)
    cfg, pieces = build_reinforce(entropy=0.0, steps=1, kl=0.1)
    with Run.open(tmp_path / "reinforce", config={}, seed=0) as run:
        reinforce.train(cfg, *pieces, run)
    other = json.loads((tmp_path / "reinforce" / "metrics.jsonl").read_text())
    for name in ("objective/scores", "grad_norm", "loss/policy_avg"):
        assert mine[0][name] == pytest.approx(other[name], rel=1e-4)


def test_their_weight_fades_by_the_hand_worked_numbers(tmp_path: Path) -> None:
    _, _, lines = train(tmp_path / "run", demo_scale="one", demo_weight=0.4, demo_decay=0.5)
    assert [line["demonstration_weight"] for line in lines] == pytest.approx([0.4, 0.2, 0.1])


def test_where_nothing_scores_only_demonstrations_in_reward_units_teach(tmp_path: Path) -> None:
    settings = {**LEARNING, "demo_weight": 1.0, "kl": 0.0}
    trained, reference, lines = train(tmp_path / "largest", NOTHING, **settings)
    assert trained.fingerprint() == reference.fingerprint()
    assert [line["skipped_updates"] for line in lines] == [1.0] * 8
    trained, reference, lines = train(tmp_path / "one", NOTHING, **settings, demo_scale="one")
    assert not any(line["skipped_updates"] for line in lines)
    assert liked(trained) > liked(reference) + 0.15, f"demonstrators say w{LIKED}"


def test_an_empty_demonstration_is_passed_over(tmp_path: Path) -> None:
    shown = batch([([1, 2], [LIKED, LIKED, 0]), ([2, 2], [])])
    _, _, lines = train(tmp_path / "run", shown=shown, demonstrations=2)
    assert len(lines) == 3


def test_a_task_without_demonstrations_is_refused(tmp_path: Path) -> None:
    cfg, (reference, reward, _) = build_dapg()
    with Run.open(tmp_path / "run", config={}, seed=0) as run, pytest.raises(ValueError, match="no demonstrations"):
        dapg.train(cfg, reference, reward, task(), run)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples": 1}, "samples=1"),
        ({"demo_weight": -1.0}, "demo_weight=-1"),
        ({"demo_decay": 1.5}, "demo_decay=1.5"),
        ({"demo_scale": "max"}, "demo_scale='max'"),
        ({"demonstrations": 0}, "demonstrations=0"),
        ({"kl": -0.1}, "kl=-0.1"),
    ],
)
def test_settings_outside_their_range(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dapg.Config(**changes)
