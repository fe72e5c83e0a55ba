"""The bench of inverse RL from demonstrations: its toys are what they say, and its verdicts what the intervals say."""

from __future__ import annotations

import csv
import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
NAMES = ("common", "inverse_toy", "inverse_arms", "reward_from_demos")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("reward_from_demos")
    for name in NAMES:  # such plain names must not stay behind for other tests
        sys.modules.pop(name, None)


def test_the_demonstrator_has_three_modes_and_slips(bench: Any) -> None:
    """4⁰ + … + 4⁴ ended responses and 4⁵ cut ones; a mode has 0.95/3 and its part of the slips."""
    toy = bench.modes.toy()
    assert len(toy.world) == 341 + 1024
    assert float(toy.probability.sum()) == pytest.approx(1)
    assert toy.probability[toy.modes].tolist() == pytest.approx([0.95 / 3 + 0.05 / 1365] * 3)
    assert float((toy.times * toy.visits).sum()) == pytest.approx(5), "the horizon is filled"
    same = toy.figures(toy.probability.log())
    assert [same[name] for name in set(bench.modes.OWN.values())] == pytest.approx([0.0] * 4, abs=1e-9)


def test_the_student_cannot_remember(bench: Any) -> None:
    """What it says after the joint does not depend on what came before it."""
    student = bench.modes.small(1, 0)
    world = bench.modes.toy().world
    rows = [world.responses.index((word, 4, 1, 4, 1)) for word in (1, 2)]
    logp = student.evaluate(world.batch.select(rows))["logp"]
    assert torch.allclose(logp[0, 3:], logp[1, 3:], atol=1e-5)
    drawn = student.sample(
        world.batch.prompts[:1], 32, bench.arms.Sampling(max_new_tokens=5), torch.Generator().manual_seed(0)
    )
    assert torch.allclose(student.evaluate(drawn)["logp"], drawn.logp_mu, atol=1e-4)


def test_exact_imitation_covers_and_seeks(bench: Any) -> None:
    toy = bench.modes.toy()
    cover, seek = (bench.modes.exact_run(toy, method, 0, 40, rate=0.3)[-1] for method in ("bc", "airl"))
    assert min(cover["modes"]) > 0.9 * max(cover["modes"])
    assert max(seek["modes"]) > 10 * sorted(seek["modes"])[1]
    assert seek["kl_reverse"] < cover["kl_reverse"]
    assert cover["kl_forward"] < seek["kl_forward"]


def test_the_toys_closed_form_is_gold(bench: Any) -> None:
    """log π* − log π_start = gold / β − log Z of the prompt, response by response."""
    arms = bench.arms
    start = bench.modes.small(arms.HORIZON + 1, 0, arms.WORDS)
    world = arms.Enumerated(start, 0.5)
    of_one = [(world.closed.values[k] - 2 * world.gold.values[k]) for k in world.gold.values if k[0] == 1]
    assert np.ptp(of_one) < 1e-9
    assert arms._gold(2, (2, 2, 1, 2)) == 2.0, "three times the word, once after itself"
    assert arms._gold(2, (2, 0)) == 0.0


def test_verdicts_are_what_the_intervals_say(bench: Any) -> None:
    assert bench._signs([{"mean": 0.1, "low": -0.1, "high": 0.3}]) == "+0.10 (no significant difference)"
    assert bench._signs([{"mean": 0.1, "low": 0.01, "high": 0.3}]) == "+0.10 (better)"
    assert bench._signs([{"mean": -0.1, "low": -0.2, "high": -0.01}]) == "-0.10 (worse)"
    assert bench._signs([{"mean": 0.0}]) == "equal"
    assert bench._low(None) == -np.inf


def reviews(path: Path, count: int) -> Path:
    draw = random.Random(0)
    words = {1: ["great", "lovely", "superb", "fun"], 0: ["awful", "boring", "dull", "poor"]}
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["text", "label"])
        for i in range(count):
            said = [*words[i % 2], "film", "story", "cast", "scene", "plot"]
            out.writerow([" ".join([str(i), *(draw.choice(said) for _ in range(40))]), i % 2])
    return path


def test_the_quick_size_runs_once_and_is_read_after(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMDP_CACHE", str(tmp_path / "cache"))
    source, file = reviews(tmp_path / "reviews.csv", 600), tmp_path / "found.json"
    flags = ["--quick", "--seeds", "1", "--source", str(source), "--runs", str(tmp_path / "runs"), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench/reward_from_demos.py", *flags])
    bench.main(flags)
    found = json.loads(file.read_text())
    assert found["modes"]["seeds"]["0"]["exact"].keys() == set(bench.modes.METHODS)
    assert set(found["toy"]["seeds"]["0"]) >= {"classifier", "bradley_terry", "closed_form", "gold"}
    model = found["model"]["seeds"]["0"]
    assert model["closed_form"]["sft_pairs"]["spearman"]["mean"] == pytest.approx(1)
    assert model["closed_form"]["over_closed"] == {"mean": 0.0}
    assert model["gold_of"]["demonstration"]["mean"] > model["gold_of"]["start"]["mean"]
    assert all(found[part]["passed"] and found[part]["verdict"] for part in bench.PARTS)
    made = (tmp_path / "runs" / "reward_from_demos-quick" / "toy-0" / "result.json").stat().st_mtime_ns
    bench.main(flags)
    assert json.loads(file.read_text())["toy"] == found["toy"]
    assert (tmp_path / "runs" / "reward_from_demos-quick" / "toy-0" / "result.json").stat().st_mtime_ns == made
