"""Reward modelling: it learns a preference, says how well, and leaves the policy alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tiny_recipes import build_reward_model, preferences
from tokenmdp.recipes import reward_model
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run
from tokenmdp.types import Batch, Pairs

HELD_OUT = preferences(60, seed=7)
Learned = tuple[RewardModel, dict[str, object], list[dict[str, float]]]


@pytest.fixture(scope="module", params=["all", "lora-4"])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """A reward model trained on 120 pairs, its figures on 60 others, and the metrics of its run."""
    cfg, (body, _, _) = build_reward_model(train=request.param, learning_rate=1e-2)
    folder = tmp_path_factory.mktemp("reward_model") / "run"
    with Run.open(folder, config={}, seed=0) as run:
        reward, figures = reward_model.train(cfg, body, preferences(120), HELD_OUT, run)
    return reward, figures, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_a_preference(learned: Learned) -> None:
    _, figures, lines = learned
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "it starts indifferent: −log σ(0)"
    assert lines[0]["rewards/accuracies"] == pytest.approx(0.5), "and every pair is a tie"
    assert figures["n_pairs"] == 60
    assert figures["accuracy"] > 0.85
    assert figures["low"] < figures["accuracy"] <= figures["high"] + 1e-9
    assert sum(line["rewards/accuracies"] for line in lines[-5:]) / 5 > 0.85
    assert 0 <= figures["ece"] < 0.35


def test_the_accuracy_is_that_of_the_scores(learned: Learned) -> None:
    reward, figures, _ = learned
    right = (reward(HELD_OUT.chosen).value > reward(HELD_OUT.rejected).value).float().mean()
    assert figures["accuracy"] == pytest.approx(float(right))


def test_scores_are_normalised_on_the_held_out_responses(learned: Learned) -> None:
    value = learned[0](Batch.concat([HELD_OUT.chosen, HELD_OUT.rejected])).value
    assert float(value.mean()) == pytest.approx(0, abs=1e-4)
    assert float(value.std(unbiased=False)) == pytest.approx(1, abs=1e-4)


def test_every_epoch_meets_every_pair_once(tmp_path: Path) -> None:
    """21 pairs, 8 a step: three steps an epoch, the last one of 5."""
    cfg, (body, _, held_out) = build_reward_model(rows=8, epochs=2)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        reward_model.train(cfg, body, preferences(21), held_out, run)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_tie_counts_half() -> None:
    """A reward that always says 0 is right half of the time."""
    _, (body, _, _) = build_reward_model()
    figures = reward_model.judge(RewardModel.from_policy(body, "head"), preferences(10))
    assert figures["accuracy"] == 0.5


def test_a_demanded_margin_enters_the_loss(tmp_path: Path) -> None:
    """At the start both scores are 0, so the loss is −log σ(−3) with a margin of 3, and log 2 where none is demanded."""
    first = {}
    for margin in (False, True):
        cfg, (body, pairs, held_out) = build_reward_model(epochs=1, margin=margin)
        wide = Pairs(pairs.chosen, pairs.rejected, torch.full((len(pairs),), 3.0))
        with Run.open(tmp_path / str(margin), config={}, seed=0) as run:
            reward_model.train(cfg, body, wide, held_out, run)
        first[margin] = json.loads((tmp_path / str(margin) / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first == pytest.approx({False: math.log(2), True: math.log(1 + math.exp(3))}, rel=1e-6)


def test_the_classifier_learns_a_preference_too_and_knows_no_margin(tmp_path: Path) -> None:
    cfg, (body, _, held_out) = build_reward_model(learning_rate=1e-2, objective="classifier")
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        _, figures = reward_model.train(cfg, body, preferences(120), held_out, run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "each side starts at one half"
    assert figures["accuracy"] > 0.75
    for changes, message in (
        ({"objective": "classifier", "margin": True}, "knows no margin"),
        ({"objective": "hinge"}, "objective is 'hinge'"),
    ):
        cfg, pieces = build_reward_model(**changes)
        with Run.open(tmp_path / message[:9], config={}, seed=0) as run, pytest.raises(ValueError, match=message):
            reward_model.train(cfg, *pieces, run=run)


@pytest.mark.parametrize(
    ("margins", "why"),
    [((None, None), "none of the 2 rows has a column `margin`"), ((1.0, -1.0), "row 1: margin is -1")],
)
def test_margins_that_are_demanded_must_be_there(tmp_path: Path, margins: tuple[float | None, ...], why: str) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": m} for m in margins]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = reward_model.Config(model="tiny", data=str(tmp_path / "a.jsonl"), margin=True)
    with Run.open(tmp_path / "run", config={}, seed=0) as run, pytest.raises(ValueError, match=why):
        reward_model.main(cfg, run)
