"""RAFT: it clones the best and only the best, learns by it, and leaves out prompts that have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_offline import build_raft
from tiny_recipes import liked_share, liking, task
from tokenmdp.functional import returns
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import raft
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.types import Batch, Score

LEARNING = {"prompts": 16, "learning_rate": 5e-3, "kl": 0.0, "truncation": 0.0, "micro_tokens": 800}


def run_raft(folder: Path, reward: Any = None, **changes: Any) -> tuple[Policy, Policy, list[dict[str, float]]]:
    cfg, (reference, own, prompts) = build_raft(**changes)
    with Run.open(folder, config={}, seed=0) as run:
        trained, _ = raft.train(cfg, reference, reward or own, prompts, run)
    return trained, reference, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(policy: Policy) -> torch.Tensor:
    b = policy.sample(list(task().train), 2, Sampling(max_new_tokens=5), torch.Generator().manual_seed(5))
    return torch.tensor(liked_share(list(b.texts)))


def chosen(outcome: list[float], group: list[int], rows: list[bool] | None = None) -> list[int]:
    value, names = torch.tensor(outcome), torch.tensor(group)
    verdict = None if rows is None else torch.tensor(rows)
    return raft.best(value, names, returns.spread(value, names, verdict)).tolist()


# -- choosing --------------------------------------------------------------------------------------------------------


def test_the_best_of_each_group_is_chosen() -> None:
    assert chosen([0.1, 0.9, 0.3, -5.0, -7.0, -6.0], [4, 4, 4, 2, 2, 2]) == [3, 1]


def test_equal_scores_have_no_best() -> None:
    assert chosen([1.0, 1.0, 0.0, 2.0], [0, 0, 1, 1]) == [3]
    assert chosen([1.0, 1.0, 1.0, 1.0], [0, 0, 1, 1]) == []


def test_what_has_no_verdict_is_never_chosen_and_one_verdict_is_no_choice() -> None:
    assert chosen([0.0, -3.0, -2.0], [0, 0, 0], [False, True, True]) == [2]
    assert chosen([0.0, -3.0], [0, 0], [False, True]) == []


class Recorder:
    """The usual reward, which remembers what it judged."""

    name = "recorder"

    def __init__(self) -> None:
        self.seen: list[tuple[Batch, Score]] = []

    def __call__(self, batch: Batch) -> Score:
        score = liking()(batch)
        self.seen.append((batch, score))
        return score


def test_the_loss_is_that_of_the_best_responses(tmp_path: Path) -> None:
    """Before the first update the policy is the reference: the first loss is the mean −log π of the chosen tokens."""
    recorder = Recorder()
    changes = {"steps": 1, "epochs": 1, "minibatches": 1, "prompts": 8, "kl": 0.0, "truncation": 0.0}
    _, reference, lines = run_raft(tmp_path / "run", recorder, **changes)
    ((b, score),) = recorder.seen
    rows = []
    for group in range(8):
        mine = (b.group == group).nonzero()[:, 0]
        if float(score.value[mine].max()) > float(score.value[mine].min()):
            rows.append(int(mine[score.value[mine].argmax()]))
    assert 0 < len(rows) < 8, "some groups have a best response, some do not"
    best = b.select(rows)
    with torch.no_grad():
        logp = reference.evaluate(best)["logp"]
    assert lines[0]["loss/policy_avg"] == pytest.approx(-float(logp.sum() / best.action.sum()), rel=1e-5)
    assert lines[0]["frac_reward_zero_std"] == pytest.approx(1 - len(rows) / 8)
    assert lines[0]["objective/scores_best"] == pytest.approx(float(score.value[rows].mean()))


def test_distance_and_truncation_count_in_the_ranking(tmp_path: Path) -> None:
    """A truncated response that costs more than any score is never the best of a group that has another."""
    recorder = Recorder()
    run_raft(tmp_path / "run", recorder, steps=1, truncation=10.0, kl=0.0, samples=8, prompts=8)
    (b, score) = recorder.seen[0]
    outcome = score.value - 10.0 * (~b.ended)
    picked = raft.best(outcome, b.group, returns.spread(outcome, b.group))
    mixed = [g for g in range(8) if bool(b.ended[b.group == g].any())]
    assert mixed
    assert all(bool(b.ended[i]) for i in picked.tolist() if int(b.group[i]) in mixed)


# -- learning --------------------------------------------------------------------------------------------------------


def test_round_after_round_it_improves_the_score(tmp_path: Path) -> None:
    trained, reference, lines = run_raft(tmp_path / "run", steps=6, **LEARNING)
    before, after = scores(reference), scores(trained)
    error = float((before.var() / len(before) + after.var() / len(after)).sqrt())
    assert float(after.mean() - before.mean()) > 10 * error
    assert lines[-1]["objective/scores"] > lines[0]["objective/scores"] + 0.4
    assert lines[-1]["objective/kl"] > 0.5


def test_distilling_best_of_n_improves_from_the_references_samples_alone(tmp_path: Path) -> None:
    """Its samples never improve; the policy comes near the best of 8 of them, and not beyond it."""
    assert raft.VARIANTS["bon-distill"]["sampler"] == "reference"
    changes = {**LEARNING, "steps": 8, "samples": 8, "sampler": "reference"}
    trained, reference, lines = run_raft(tmp_path / "run", **changes)
    assert abs(lines[-1]["objective/scores"] - lines[0]["objective/scores"]) < 0.08
    assert "objective/kl" not in lines[0], "nothing was drawn from the policy"
    best = sum(line["objective/scores_best"] for line in lines) / len(lines)
    assert float(scores(reference).mean()) + 0.1 < float(scores(trained).mean()) < best + 0.1


# -- nothing to choose -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [1.0, None], ids=["equal", "no verdict"])
def test_where_nothing_differs_nothing_is_learned(answer: float | None, tmp_path: Path) -> None:
    reward = FunctionReward(lambda completions, **_: [answer] * len(completions), name="same", max_missing=1.0)
    trained, reference, lines = run_raft(tmp_path / "run", reward, kl=0.0, truncation=0.0)
    assert trained.fingerprint() == reference.fingerprint()
    assert all("loss/policy_avg" not in line for line in lines)
    assert [line["no_verdict"] for line in lines] == [0.0 if answer else 16.0] * 3
    if answer:
        assert [line["frac_reward_zero_std"] for line in lines] == [1.0] * 3


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"samples": 1}, "samples=1"), ({"sampler": "old"}, "'old'"), ({"temperature": 0.0}, "temperature is 0")],
)
def test_what_it_cannot_be_asked_is_named(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=word):
        run_raft(tmp_path / "run", **changes)
