"""The bench of reward ranking: its pairs, its folds and its verdicts; how good any reward is, no test says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("reward_ranking")
    for name in ("common", "reward_ranking"):  # such plain names must not stay behind for other tests
        sys.modules.pop(name, None)


def test_pairs_of_either_kind_use_each_response_once_and_follow_gold(bench: Any) -> None:
    gold = np.arange(40.0)[::-1] * 5  # far apart: at sharpness 3 the better one always wins
    for kind in ("same", "cross"):
        chosen, rejected = bench.labelled(gold, kind, 3.0, seed=1)
        assert sorted([*chosen, *rejected]) == list(range(40))
        assert (gold[chosen] > gold[rejected]).all()
        assert ((chosen // 2 == rejected // 2) == (kind == "same")).all()
    blind, other = bench.labelled(gold, "same", 0.0, seed=1)
    assert 4 <= int((gold[blind] > gold[other]).sum()) <= 16, "without sharpness labels are coins"


def test_folds_keep_a_conversation_together(bench: Any) -> None:
    groups = [f"turn {i // 3}" for i in range(60)]
    fold = bench.folds(groups, 4, seed=0)
    assert np.bincount(fold).tolist() == [15, 15, 15, 15]
    assert all(len(set(fold[i : i + 3])) == 1 for i in range(0, 60, 3))
    assert (bench.folds(groups, 4, seed=1) != fold).any()


def test_no_head_judges_what_it_was_fitted_to(bench: Any) -> None:
    """Sides that differ by noise alone: a head that had seen them would rank them right, one that had not cannot."""
    rng = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(120, 200, generator=rng) for _ in range(2))
    fold = bench.folds([str(i) for i in range(120)], 4, seed=0)
    c, r = bench.out_of_fold(chosen, rejected, fold, "linear", 0)
    assert 0.3 < float((c > r).mean()) < 0.7
    for at in range(4):
        both = np.concatenate([c[fold == at], r[fold == at]])
        assert both.mean() == pytest.approx(0, abs=1e-9)
        assert both.std() == pytest.approx(1)


def test_rates_over_pairs_and_over_first_turns(bench: Any) -> None:
    values = np.array([1.0, 1, 1, 0])
    assert bench.of_pairs(values)["mean"] == 0.75
    found = bench.of_turns(values, np.array([0, 0, 0, 1]))
    assert (found["mean"], found["n"]) == (0.5, 4)


def figure(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def results(low: float, linear: float) -> dict[str, Any]:
    arm = {
        "spearman_pooled": figure(0.3, low, 0.5),
        "spearman_within": figure(0.2, 0.1, 0.3),
        "cross_prompt": figure(0.6, 0.5 + low, 0.7),
        "same_prompt": figure(0.6, 0.55, 0.7),
        "difference": {"absent": "too few"},
    }
    kinds = {kind: figure(0.7, 0.6, 0.8) for kind in ("same", "cross")}
    head = {
        "accuracy": figure(0.6, 0.58, 0.62),
        "over_longer": figure(0.02, linear, 0.05),
        "cross_prompt": figure(0.55, 0.5, 0.6),
    }
    return {
        "sentiment": {
            "held_out": dict.fromkeys(("tuned same", "gold", "longer"), kinds),
            "differences": {"one thing less another": figure(0.1, 0.05, 0.2)},
            "samples": {
                "0": {"tuned same": arm},
                "1": {"tuned same": {**arm, "spearman_pooled": figure(0.3, 0.1, 0.5)}},
            },
        },
        "human": {
            "data": {"pairs": 100},
            "first_turns": 90,
            "longer": figure(0.5, 0.4, 0.6),
            "seeds": {"0": dict.fromkeys(("linear", "mlp", "leaky"), head)},
        },
    }


def test_verdicts_need_every_seed_and_words_say_what_the_intervals_say(bench: Any) -> None:
    good = results(0.1, 0.01)
    assert bench.verdicts(good) == {"held_out": True, "samples": True, "cross": True, "human": True}
    assert bench.verdicts(results(-0.1, -0.01)) == {"held_out": True, "samples": False, "cross": False, "human": False}
    assert "human" not in bench.verdicts({"sentiment": good["sentiment"]})
    words = " ".join(bench.in_words(good))
    assert "One thing less another: +0.100 [+0.050, +0.200], significantly more." in words
    assert "linear head 60.0%" in words
    assert bench.difference(figure(0.1, -0.1, 0.2)).endswith("no significant difference")
    assert not bench.above({"absent": "no data"}, 0)
    assert bench.rounded({"a": [0.123456, 1]}) == {"a": [0.1235, 1]}
