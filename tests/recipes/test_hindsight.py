"""Hindsight: failures are rewritten into demonstrations, and it learns where successes alone do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_offline import build_hindsight, obeying
from tiny_recipes import liking
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import hindsight
from tokenmdp.run import Run
from tokenmdp.tasks import copying
from tokenmdp.types import Batch, Score


def run_hindsight(folder: Path, reward: Any = None, **changes: Any) -> tuple[Policy, Policy, list[dict[str, float]]]:
    cfg, (reference, own, task) = build_hindsight(**changes)
    with Run.open(folder, config={}, seed=0) as run:
        trained, _ = hindsight.train(cfg, reference, reward or own, task, run)
    return trained, reference, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_failure_becomes_a_demonstration_of_what_it_did() -> None:
    model, _ = obeying()
    asked = [model.prompt("a>", row=4), model.prompt("b>", row=5), model.prompt("c>", row=6)]
    texts = ["xy", "b", ""]
    b = Batch.build(asked, [[*model.encode(t), model.eos_ids[0]] for t in texts], texts=texts, ended=[True] * 3)
    reward = copying.Begins(1)
    goals = [reward.satisfied(t) for t in b.texts]
    assert goals == ["x>", "b>", None]
    shown = hindsight.relabelled(b, goals, model)
    assert shown is not None
    assert [p.text for p in shown.prompts] == ["x>", "b>"], "what satisfied nothing is left out"
    assert [p.row for p in shown.prompts] == [4, 5]
    for row, whole in enumerate(("x>xy", "b>b")):
        assert model.decode(shown.tokens[row, : int(shown.length[row])].tolist()) == whole
    assert shown.action.sum(1).tolist() == [3, 2], "the response is the action, its end included"
    assert reward(shown).value.tolist() == [1.0, 1.0]
    assert hindsight.relabelled(b, [None] * 3, model) is None


def test_every_instruction_weighs_the_same() -> None:
    """Three rows of one instruction and one of another: 2/3 each and 2, which sum to 2 on either side."""
    model, _ = obeying()
    rows = [model.prompt(t) for t in ("a>", "b>", "a>", "a>")]
    b = Batch.build(rows, [[5]] * 4, texts=["x"] * 4, ended=[False] * 4)
    assert hindsight.balance(b).tolist() == pytest.approx([2 / 3, 2.0, 2 / 3, 2 / 3])


LEARNING = {"steps": 12, "prompts": 10, "samples": 16, "max_new_tokens": 1, "learning_rate": 1e-2, "micro_tokens": 2000}


def test_it_learns_to_follow_where_one_in_a_hundred_succeeds_by_chance(tmp_path: Path) -> None:
    """An untrained model and ten instructions. With successes alone the few that were met crowd out the others."""
    trained, reference, lines = run_hindsight(tmp_path / "hindsight", **LEARNING)
    _, _, control = run_hindsight(tmp_path / "control", relabel=False, **LEARNING)
    assert lines[0]["objective/scores"] == control[0]["objective/scores"] < 0.05
    assert lines[0]["hindsight/kept"] > 0.9
    assert control[0]["hindsight/kept"] < 0.05
    assert lines[-1]["objective/scores"] > 0.9
    assert lines[-1]["objective/scores"] > control[-1]["objective/scores"] + 0.3
    _, task = obeying()
    b = trained.sample(list(task.train), 1, Sampling(max_new_tokens=1, temperature=0.0), torch.Generator())
    assert float(copying.Begins(1)(b).value.mean()) > 0.9
    assert trained.fingerprint() != reference.fingerprint()


class Nothing:
    """Satisfies nobody."""

    name = "nothing"

    def satisfied(self, text: str) -> str | None:
        return None

    def __call__(self, batch: Batch) -> Score:
        return Score.of(torch.zeros(len(batch)))


def test_a_round_that_satisfies_nothing_takes_no_step(tmp_path: Path) -> None:
    trained, reference, lines = run_hindsight(tmp_path / "run", Nothing())
    assert trained.fingerprint() == reference.fingerprint()
    assert [line["hindsight/kept"] for line in lines] == [0.0] * 3
    assert all("loss/policy_avg" not in line for line in lines)


def test_a_reward_that_cannot_name_what_was_met_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="liking cannot name"):
        run_hindsight(tmp_path / "run", liking())


def test_without_chance_there_is_nothing_to_learn_from() -> None:
    with pytest.raises(ValueError, match=r"temperature is 0.*: take one above 0"):
        hindsight.Config(temperature=0.0)
