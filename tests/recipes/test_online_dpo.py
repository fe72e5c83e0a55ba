"""Online DPO: pairs are the best and the worst of the policy's own responses; ties give none; it learns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import EOS, batch
from tiny_preferences import build_online_dpo
from tokenmdp.recipes import online_dpo
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run


def run_it(folder: Path, reward: Any = None, **changes: Any) -> tuple[Any, Any, list[dict[str, float]], str]:
    cfg, (reference, liking, task) = build_online_dpo(**{"micro_tokens": 4000, **changes})
    with Run.open(folder, config={}, seed=0) as run:
        policy, _ = online_dpo.train(cfg, reference, reward or liking, task, run, gold=liking)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return policy, reference, lines, (folder / "log.txt").read_text()


def test_pairs_are_the_best_and_the_worst_of_each_prompt() -> None:
    responses = [[5, EOS], [6, EOS], [7, EOS]] + [[5, EOS]] * 3 + [[8, EOS], [9, EOS], [4, EOS]] + [[5, EOS], [5, EOS]]
    b = batch([([1], r) for r in responses])
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
    outcome = torch.tensor([0.2, 0.9, 0.1, 0.5, 0.5, 0.5, 0.3, 0.0, 0.7, 1.0, 0.0])
    rows = torch.ones(11, dtype=torch.bool)
    rows[8] = False  # the third prompt's best has no verdict
    chosen, rejected = online_dpo.best_and_worst(outcome, group, rows, b)
    # the second prompt ties; the fourth's two are one response, scored differently
    assert (chosen.tolist(), rejected.tolist()) == ([1, 6], [2, 7])
    rows[6] = False  # one judged response is no pair
    assert online_dpo.best_and_worst(outcome, group, rows, b)[0].tolist() == [1]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_it_learns(tmp_path: Path, loss: str) -> None:
    policy, reference, lines, said = run_it(tmp_path / "run", steps=12, prompts=8, samples=4, loss=loss)
    first, last = lines[0], lines[-1]
    assert first["loss"] == pytest.approx(math.log(2) if loss == "sigmoid" else 25.0, rel=1e-5)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert first["rewards/accuracies"] == 0.5
    assert sum(x["objective/scores"] for x in lines[-3:]) / 3 > first["objective/scores"] + 0.2
    assert last["objective/gold"] == pytest.approx(last["objective/scores"])
    assert last["objective/kl"] > 0.5
    assert f"reference llama {reference.fingerprint()}" in said
    assert policy.fingerprint() != reference.fingerprint()


def test_a_reward_that_never_differs_teaches_nothing_and_is_counted(tmp_path: Path) -> None:
    policy, reference, lines, _ = run_it(
        tmp_path / "run", FunctionReward(lambda completions, **_: [1.0] * len(completions), name="one")
    )
    assert policy.fingerprint() == reference.fingerprint()
    for line in lines:
        assert (line["pairs"], line["ties"], line["skipped_updates"]) == (0, 4, 1)
        assert line["frac_reward_zero_std"] == 1
        assert "loss" not in line


def test_responses_without_a_verdict_are_in_no_pair(tmp_path: Path) -> None:
    def sometimes(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i % 3 == 0 else float(i % 3) for i in range(len(completions))]

    _, _, lines, _ = run_it(tmp_path / "run", FunctionReward(sometimes, name="sometimes"), steps=2)
    for line in lines:
        assert line["no_verdict"] == 4
        assert line["pairs"] + line["ties"] == 4
        assert line["objective/scores"] == 1.5


def test_only_the_ranking_counts(tmp_path: Path) -> None:
    """The reward on another scale makes the same run, up to its own scale."""

    def large(completions: list[str], **_: Any) -> list[float]:
        return [1000 * c.split().count("w3") / max(1, len(c.split())) - 7 for c in completions]

    one = run_it(tmp_path / "one")[0]
    other = run_it(tmp_path / "other", FunctionReward(large, name="large"))[0]
    assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "simpo"}, "loss is 'simpo'; it must be one of sigmoid, ipo"),
        ({"beta": 0.0}, "both must be positive"),
        ({"temperature": 0.0}, "both must be positive"),
        ({"prompts": 0}, "each is a count"),
        ({"samples": 1}, "at least 2 responses"),
    ],
)
def test_settings_outside_their_range_are_errors(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        online_dpo.Config(**changes)
