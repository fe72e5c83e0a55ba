"""Process reward: it learns which steps are wrong, an outcome model on the same data does not, and labels come by resets."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_credit import CLOSES, build_process_reward, in_steps
from tiny_recipes import policy
from tokenmdp import stats
from tokenmdp.learner import Learner
from tokenmdp.models.catalog import tiny as character_model
from tokenmdp.recipes import process_reward
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.rewards.step_model import StepRewardModel
from tokenmdp.run import Run

Learned = tuple[StepRewardModel, dict[str, Any], list[dict[str, float]]]


def learn(folder: Path, count: int = 240, **changes: Any) -> Learned:
    cfg, _ = build_process_reward(epochs=4, rows=16, learning_rate=1e-2, micro_tokens=400, held_out=0.25, **changes)
    with Run.open(folder, config={}, seed=0) as run:
        model, figures = process_reward.train(cfg, policy(), *in_steps(count, seed=1), run)
    return model, figures, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Learned]:
    """The process and the outcome reward of the same 180 responses, judged on the same 60 others, to 30 prompts."""
    folder = tmp_path_factory.mktemp("process_reward")
    return {name: learn(folder / name, outcome=name == "outcome") for name in ("process", "outcome")}


def test_no_prompt_is_both_learned_from_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve responses to three prompts: those to one are judged, all four, and none of its steps is in training."""
    cfg, (body, *_) = build_process_reward(held_out=0.3, rows=4, epochs=1)
    b, label, mask = in_steps(12, seed=0)
    b = replace(b, prompts=tuple(b.prompts[row % 3] for row in range(12)))
    seen: dict[str, set[tuple[int, ...]]] = {"learned": set(), "judged": set()}
    step, judge = Learner.step, process_reward.judge

    def watched(self: Learner, loss: Any, part: Any, *rest: Any, **columns: Any) -> Any:
        seen["learned"] |= {p.ids for p in part.prompts}
        return step(self, loss, part, *rest, **columns)

    def judging(model: Any, part: Any, *rest: Any) -> Any:
        seen["judged"] |= {p.ids for p in part.prompts}
        return judge(model, part, *rest)

    monkeypatch.setattr(Learner, "step", watched)
    monkeypatch.setattr(process_reward, "judge", judging)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        _, figures = process_reward.train(cfg, body, b, label, mask, run)
    assert (len(seen["learned"]), len(seen["judged"])) == (2, 1)
    assert not seen["learned"] & seen["judged"]
    assert (figures["n_prompts"], figures["n_responses"], figures["n_steps"]) == (1, 4, 12)
    # One prompt is one trial, however many of its steps are right.
    rate = figures["step_accuracy"]
    assert (rate["low"], rate["high"]) == pytest.approx(stats.wilson(rate["mean"], 1)[1:])


def test_it_learns_which_steps_are_wrong(both: dict[str, Learned]) -> None:
    _, figures, lines = both["process"]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "it starts indifferent: −log ½"
    assert lines[0]["num_steps"] == 16 * 3
    assert figures["n_responses"] == 60
    assert figures["n_prompts"] == 30
    assert figures["n_steps"] == 180
    assert figures["step_accuracy"]["mean"] > 0.95
    assert figures["first_error_found"]["mean"] > 0.9
    assert 0 <= figures["ece"] < 0.2


def test_an_outcome_model_on_the_same_responses_finds_the_wrong_step_less_often(both: dict[str, Learned]) -> None:
    """Half of the right answers (1 − 0.7²) come with a wrong step, which an outcome says nothing of."""
    process, outcome = both["process"][1], both["outcome"][1]
    assert both["outcome"][2][0]["num_steps"] == 16
    assert outcome["outcome_accuracy"]["mean"] > 0.95
    assert process["outcome_accuracy"]["mean"] > 0.95
    assert outcome["first_error_found"]["high"] < process["first_error_found"]["low"]
    assert outcome["step_accuracy"]["high"] < process["step_accuracy"]["low"]


def test_its_scores_are_those_of_its_steps(both: dict[str, Learned]) -> None:
    model = both["process"][0]
    b, label, mask = in_steps(100, seed=9)
    score = model(b)
    assert score.steps is not None
    assert torch.equal(score.steps > 0, mask), "it finds the ends of steps by itself"
    assert float(((score.steps > 0.5) == (label > 0.5))[mask].float().mean()) > 0.95
    clean = (label == mask).all(dim=1)
    assert float(((score.value > 0.5) == clean).float().mean()) > 0.9, "the weakest step is the response's score"


def test_the_first_wrong_step_by_hand() -> None:
    """Three responses: wrong at step two; right; wrong at step one. A model that trusts everything finds one of three."""
    b, label, mask = in_steps(3, seed=0)
    at = mask[0].nonzero()[:, 0]
    label = torch.zeros_like(label)
    label[0, at[0]] = 1.0
    label[1, at] = 1.0
    trusting = RewardModel.from_policy(policy(), "head")
    figures = process_reward.judge(StepRewardModel(_biased(trusting, b), f"w{CLOSES}"), b, label, mask)
    assert figures["first_error_found"]["mean"] == pytest.approx(1 / 3)
    assert figures["step_accuracy"]["mean"] == pytest.approx(4 / 9)
    assert figures["outcome_accuracy"]["mean"] == pytest.approx(1 / 3)


def _biased(model: RewardModel, b: Any) -> RewardModel:
    """A head that says yes to all states of this batch: along their mean."""
    with torch.no_grad():
        mean = model.backbone.hidden(b.tokens)[b.action].mean(0)
        model.head.weight.copy_(100 * mean)
        assert bool((model.head(model.backbone.hidden(b.tokens))[b.action] > 0).all())
    return model


def test_labels_may_be_shares(tmp_path: Path) -> None:
    """With every label ½ there is nothing better than to be indifferent: the loss stays at log 2."""
    cfg, (body, b, label, mask) = build_process_reward()
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        process_reward.train(cfg, body, b, torch.where(mask, 0.5, label), mask, run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] == pytest.approx(math.log(2), abs=1e-6) for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, y, m: (b, y + 2 * m, m), "it must be 0 to 1"),
        (lambda b, y, m: (b, torch.where(m, math.nan, y), m), "is nan: it must be 0 to 1"),
        (lambda b, y, m: (b, y, m | True), "ends on a token that is no action"),
        (lambda b, y, m: (b, y[:, 1:], m), "one number a token, aligned with it"),
        (lambda b, y, m: (b, y, m & False), "0 of 20 responses have a labelled step"),
    ],
)
def test_labels_that_cannot_be_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    cfg, (body, b, label, mask) = build_process_reward()
    with Run.open(tmp_path / "run", config={}, seed=0) as run, pytest.raises(ValueError, match=message):
        process_reward.train(cfg, body, *change(b, label, mask), run)


def test_from_a_file_of_steps(tmp_path: Path) -> None:
    """The command's own way, on the character model."""
    rows = [
        {"prompt": f"{i}+1=", "completions": ["so", "is", f"{i + i % 2}"], "labels": [True, True, bool(i % 2)]}
        for i in range(12)
    ]
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = process_reward.Config(model="tiny", data=str(tmp_path / "steps.jsonl"), rows=4, epochs=2)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        figures = process_reward.main(cfg, run)
    assert figures["n_steps"] == 3
    model = StepRewardModel.load(str(figures["model"]), character_model())
    assert model.delimiter == "\n"
    rows = [{**row, "labels": [True] * 3} for row in rows]
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (
        Run.open(tmp_path / "alike", config={}, seed=0) as run,
        pytest.raises(ValueError, match="36 labelled steps are"),
    ):
        process_reward.main(cfg, run)


def test_an_answer_that_is_cut_has_no_outcome(tmp_path: Path) -> None:
    """Its last step that is left may be right, and the answer wrong all the same."""
    rows = [
        {"prompt": f"{i}+1=", "completions": ["so", "is" * (1 + 9 * (i % 2))], "labels": [True, i % 3 == 0]}
        for i in range(24)
    ]
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = process_reward.Config(
        model="tiny", data=str(tmp_path / "steps.jsonl"), rows=4, max_tokens=8, outcome=True, held_out=0.5
    )
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        figures = process_reward.main(cfg, run)
    assert figures["n_responses"] == 6  # half of the whole ones
    assert "12 of 24 answers were cut at max_tokens=8" in (tmp_path / "run/log.txt").read_text()


def test_labels_by_resets(tmp_path: Path) -> None:
    """An untrained character model on one-digit sums: it is never right, and every label says so."""
    cfg = process_reward.Config(
        model="tiny", futures=2, prompts=4, samples=2, max_new_tokens=4, delimiter="", rows=4, held_out=0.3
    )
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        figures = process_reward.main(cfg, run)
    assert figures["responses"] == 8
    assert figures["right_with_wrong_steps"] <= figures["right"]
    assert int(str(figures["tokens_drawn_for_labels"])) > 8
    assert (Path(str(figures["model"])) / "tokenmdp_steps.json").is_file()
