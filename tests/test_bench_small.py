"""Pieces of the small benches by hand: what starts know, what counts as an alarm, how differences are made."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmdp import monitors
from tokenmdp.tasks import ExactAnswer
from tokenmdp.types import Batch, Prompt

NAMES = ("actions", "audit", "common", "monitors", "warmup")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a bench as running its file does: its folder comes first."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    yield importlib.import_module
    for name in NAMES:  # such plain names must not stay behind for other tests
        sys.modules.pop(name, None)


def test_a_primed_start_has_nine_tenths_on_four_tokens_the_right_one_among_them(bench: Any) -> None:
    actions, rng = bench("actions"), torch.Generator().manual_seed(0)
    right = torch.randint(32, (actions.PROMPTS, actions.H), generator=rng)
    p = actions.begin(32, "primed", right, rng).softmax(-1)
    assert torch.allclose(p.topk(4, -1).values.sum(-1), torch.tensor(0.9))
    assert torch.allclose(p.gather(-1, right[..., None]), torch.tensor(0.9 / 4))
    assert torch.allclose(actions.begin(32, "uniform", right, rng).softmax(-1), torch.tensor(1 / 32))
    assert not actions.begin(4, "primed", right % 4, rng).any(), "four of four are all there are"


def test_a_run_that_does_not_get_there_has_taken_all_it_had(bench: Any) -> None:
    actions = bench("actions")
    a_phase = actions.PROMPTS * actions.SAMPLES
    assert actions.needed(64, "whole", "uniform", 0, 3) == 3 * a_phase
    few = actions.needed(4, "each", "uniform", 0, 200)
    assert 0 < few < 200 * a_phase
    assert few % a_phase == 0


def test_alarms_are_hits_in_planted_runs_and_false_in_healthy_ones(bench: Any) -> None:
    module = bench("monitors")
    assert module.PLANTED.keys() == monitors.MONITORS.keys(), "each monitor has its failure"
    alarms = {"grpo": [{}, {"leap": 7}], "ppo": [{}, {}], "cut": [{"cut": 9, "alike": 3}, {"alike": 5}]}
    assert module.rates(alarms["cut"])["alike"] == {"fired": 2, "runs": 2, "at": 4}
    found = module.judged(alarms)
    assert found["hits"]["cut"]["mean"] == 0.5
    assert found["false_alarms"]["mean"] == 0.25
    assert found["false_alarms_by_monitor"]["leap"]["mean"] == 0.25
    assert found["false_alarms_by_monitor"]["alike"]["mean"] == 0
    assert found["passed"] == {"hits": False, "silence": False}


def test_planted_rewards_pay_what_they_say(bench: Any) -> None:
    module = bench("monitors")
    assert module.share_of_e(["ee", "eb", "", "b"]) == [1.0, 0.5, 0.0, 0.0]
    assert module.one_answer(["ab", "a", "cb", "abcd"]) == [1.0, 0.5, 0.5, 0.5]
    prompts = [Prompt((1,), "x", i, {"answer": "y"}) for i in range(4)]
    b = Batch.build(prompts, [[2]] * 4, texts=["y"] * 4, ended=[True] * 4)
    reward = module.FailsLater(ExactAnswer(), 1)
    assert reward(b).verdict.tolist() == [True] * 4
    later = reward(b)
    assert later.verdict.tolist() == [False, True, True, False]
    assert later.value.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_a_difference_of_kinds_resamples_prompts(bench: Any) -> None:
    rows = [
        {"kind": kind, "prompt": prompt, "reread": again}
        for kind, shares in (("a", (1, 1, 1)), ("b", (0, 0, 1)))
        for prompt, again in enumerate(shares)
        for _ in range(5)
    ]
    found = bench("audit").difference(rows, "a", "b")
    assert found["mean"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["low"] == 0.0
    assert found["high"] == 1.0


def test_differences_over_seeds_are_paired(bench: Any) -> None:
    found = bench("warmup").difference([0.1, 0.2, 0.3])
    assert found["mean"] == pytest.approx(0.2)
    assert found["low"] < 0.1 < 0.3 < found["high"], "Student's t of three"
