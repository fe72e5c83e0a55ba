"""Implicit Q-learning: its heads by hand, that it tells good tokens from bad ones, and that its policy lives on that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import ragged
from tiny_offline import build_ilql, log, scored_at_first
from tiny_recipes import LIKED, liked_share, policy, task
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import ilql
from tokenmdp.run import Run
from tokenmdp.testing import contracts
from tokenmdp.types import Batch

LEARNING = {"steps": 60, "rows": 16, "micro_tokens": 800}


def run_ilql(
    folder: Path, data: tuple[Batch, Tensor] | None = None, **changes: Any
) -> tuple[Policy, list[dict[str, float]]]:
    cfg, (start, *own) = build_ilql(**changes)
    with Run.open(folder, config={}, seed=0) as run:
        trained, _ = ilql.train(cfg, start, *(data or own), run)
    return trained, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(trained: Policy) -> Tensor:
    b = trained.sample(list(task().train), 2, Sampling(max_new_tokens=5), torch.Generator().manual_seed(5))
    return torch.tensor(liked_share(list(b.texts)))


# -- heads -----------------------------------------------------------------------------------------------------------


def test_the_heads_read_state_and_action_as_written() -> None:
    """Q(s, a) = u·h + c + e_a·W h, one token by hand; the target is the lesser of the two target heads."""
    values, b = ilql.Values(policy().backbone.twin("all")), ragged(3, vocabulary=12)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for head in (values.twin, values.target):
            for _, weight in head.trained():
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        found, states = values.read(b), values.critic.states(b)
        row, at = (int(x) for x in b.action.nonzero()[5])
        h, e = states[row, at], values.embedding[b.tokens[row, at]]

        def q(head: ilql.Twin, i: int) -> float:
            return float(head.level.weight[i] @ h + head.level.bias[i] + h @ head.action[i] @ e)

        assert float(found["q1"][row, at]) == pytest.approx(q(values.twin, 0), abs=1e-5)
        assert float(found["q2"][row, at]) == pytest.approx(q(values.twin, 1), abs=1e-5)
        least = min(q(values.target, 0), q(values.target, 1))
        assert float(found["q_target"][row, at]) == pytest.approx(least, abs=1e-5)
    assert all(not x[~b.action].any() for x in found.values())
    assert bool((found["cql1"][b.action] > 0).all())


def test_the_twins_begin_apart_and_the_targets_do_not_train() -> None:
    values, b = ilql.Values(policy().backbone.twin("head")), ragged(3, vocabulary=12)
    found = values.read(b)
    assert float((found["q1"] - found["q2"]).detach().abs().max()) > 0.01
    trained = {id(p) for _, p in values.trained()}
    assert not any(id(p) in trained for _, p in values.target.trained())
    assert not found["q_target"].requires_grad


def test_its_losses_are_unreduced_and_of_each_row_alone() -> None:
    values, b = ilql.Values(policy().backbone.twin("all")), ragged(4, vocabulary=12)

    def loss(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        found = values.read(part)
        return found["q1"] + found["q2"] + found["value"] + found["cql1"], {}

    contracts.check_loss(loss, b, b.action.float())


# -- learning --------------------------------------------------------------------------------------------------------


def test_it_learns_more_from_a_log_than_cloning_it_and_its_values_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of the log's words are liked. The only score is that of the whole response, yet liked tokens stand out."""
    kept: list[ilql.Values] = []
    original = ilql.Values.__init__

    def remember(self: ilql.Values, body: Any) -> None:
        original(self, body)
        kept.append(self)

    monkeypatch.setattr(ilql.Values, "__init__", remember)
    logged, score = log(200)
    weighted, _ = run_ilql(tmp_path / "weighted", (logged, score), **LEARNING)
    cloned, _ = run_ilql(tmp_path / "cloned", (logged, score), beta=1e6, **LEARNING)
    before, plain, after = (float(scores(p).mean()) for p in (policy(), cloned, weighted))
    assert before + 0.05 < plain
    assert plain + 0.1 < after
    with torch.no_grad():
        found = kept[0].read(logged)
    advantage = found["q_target"] - found["value"]
    liked = logged.action & (logged.tokens == LIKED)
    assert float(advantage[liked].mean()) > float(advantage[logged.action & ~liked].mean()) + 0.25


@pytest.mark.parametrize("value_train", ["head", "lora-2"])
def test_the_values_may_train_any_part_of_their_body(value_train: str, tmp_path: Path) -> None:
    _, lines = run_ilql(tmp_path / "run", value_train=value_train, steps=16, value_learning_rate=1e-2, rows=16)
    first, last = (sum(line["loss/value_avg"] for line in part) for part in (lines[:4], lines[-4:]))
    assert last < 0.8 * first


# -- what cannot be used ---------------------------------------------------------------------------------------------


def test_scores_that_are_missing_are_counted(tmp_path: Path) -> None:
    logged, score = log(20)
    score = torch.where(torch.arange(20) % 2 == 1, torch.nan, score)
    _, lines = run_ilql(tmp_path / "run", (logged, score), rows=20)
    assert [line["no_verdict"] for line in lines] == [10.0] * 4


def test_a_step_without_a_score_is_skipped_and_counted(tmp_path: Path) -> None:
    """Adam's momentum of the step before does not carry the policy on."""
    data = scored_at_first(200, 6, tmp_path / "draws")
    one, *_ = run_ilql(tmp_path / "one", data, steps=1, rows=6)
    three, *_, lines = run_ilql(tmp_path / "three", data, steps=3, rows=6)
    assert one.fingerprint() == three.fingerprint() != policy().fingerprint()
    assert [line["skipped_updates"] for line in lines] == [0.0, 1.0, 1.0]
    assert [line["no_verdict"] for line in lines] == [0.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("score", "changes", "word"),
    [
        (torch.full((60,), 0.5), {}, "all have the same"),
        (torch.full((60,), torch.nan), {}, "all have the same"),
        (torch.zeros(59), {}, "59"),
        (None, {"tau": 1.0}, "tau=1.0"),
        (None, {"beta": 0.0}, "beta=0.0"),
        (None, {"gamma": 2.0}, "gamma=2.0"),
        (None, {"target_rate": 0.0}, "rate=0.0"),
    ],
)
def test_what_it_cannot_learn_from_is_named(
    score: Tensor | None, changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    logged, own = log()
    with pytest.raises(ValueError, match=word):
        run_ilql(tmp_path / "run", (logged, own if score is None else score), **changes)
