"""The bench of labels: what its arms pay, what its comparisons demand, and that it runs through and goes on."""

from __future__ import annotations

import csv
import importlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
NAMES = ("common", "labels", "labels_choice", "labels_toy")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a bench as running its file does: its folder comes first."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module
    for name in NAMES:  # such plain names must not stay behind for other tests
        sys.modules.pop(name, None)


def reviews(path: Path) -> Path:
    """230 made-up reviews."""
    draw = random.Random(0)
    words = {1: ["great", "lovely", "superb", "fun"], 0: ["awful", "boring", "dull", "poor"]}
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["text", "label", "source"])
        for i in range(230):
            said = " ".join(draw.choice([*words[i % 2], "film", "story", "cast", "plot"]) for _ in range(24))
            out.writerow([f"Number {i} was a {said}.", i % 2, "imdb"])
    return path


def test_every_choice_pays_the_same_and_a_pair_has_one_label(bench: Any):
    choice = bench("labels_choice")
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(40, 3, generator=rng)
    pool = choice.Pool.of(features, features @ torch.tensor([2.0, -1.0, 0.0]), 4, rng, share=0.5)
    assert len(pool.pairs) == 5 * 6  # half of ten prompts, six pairs each
    assert (pool.pairs[:, 0] // 4 == pool.pairs[:, 1] // 4).all()
    labels: dict[tuple[int, ...], tuple[int, int]] = {}
    for name in choice.CHOICES:
        for budget, (ledger, head, rows) in zip(
            (5, 12), choice.buy(pool, name, (5, 12), torch.Generator().manual_seed(1)), strict=True
        ):
            assert (ledger.paid["labels"], len(rows)) == (budget, budget)
            assert len({tuple(sorted(pair)) for pair in rows.tolist()}) == budget  # none is paid for twice
            for pair in rows.tolist():
                assert labels.setdefault(tuple(sorted(pair)), tuple(pair)) == tuple(pair)
            assert budget < 12 or float(torch.corrcoef(torch.stack([head.score(features), pool.gold]))[0, 1]) > 0.7


def test_a_difference_holds_only_over_seeds_and_over_prompts(bench: Any):
    versus = bench("labels_choice").versus
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 40, generator=draw, dtype=torch.float64)
    assert versus(noise + 3, noise * 0.5)["holds"]
    assert versus(noise * 0.5, noise + 3)["opposite"]
    # One seed carries the whole difference: prompts alone would believe it.
    lucky = torch.zeros(5, 40, dtype=torch.float64)
    lucky[0] = 5 + 0.1 * noise[0]
    found = versus(lucky, torch.zeros(5, 40))
    assert found["over_prompts"][0] > 0
    assert not found["holds"]
    assert not versus(noise, noise)["holds"]


def test_direct_labels_are_a_knock_out_that_stops_at_the_budget(bench: Any):
    direct = bench("labels").direct
    gold = torch.tensor(
        [[0.0, 50.0, 100.0], [100.0, 50.0, 0.0]], dtype=torch.float64
    )  # so far apart that labels are sure
    rng = torch.Generator().manual_seed(0)
    assert [direct(gold, budget, rng) for budget in (0, 1, 3, 99)] == [
        [0.0, 100.0],
        [50.0, 100.0],
        [100.0, 100.0],
        [100.0, 100.0],
    ]


def test_accuracy_counts_equal_scores_half(bench: Any):
    accuracy = bench("labels").accuracy
    gold = torch.tensor([[1.0, 2.0, 3.0]])
    assert accuracy(gold, gold) == 1
    assert accuracy(-gold, gold) == 0
    assert accuracy(torch.zeros(1, 3), gold) == 0.5
    assert accuracy(torch.tensor([[1.0, 1.0, 3.0]]), gold) == pytest.approx(5 / 6)


def test_worth_of_a_response_by_hand(bench: Any):
    worth = bench("labels_toy").Worth(0)
    worth.worth = {str(d): float(d) for d in range(10)}
    # 1 and 3 are in the prompt: (1 + 1) + 2 + (3 + 1) and −2 for the letter, over four characters.
    assert worth.of("103:", "12x3") == pytest.approx((2 + 2 - 2 + 4) / 4)


def test_it_runs_through_and_what_is_done_is_read(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKENMDP_CACHE", str(tmp_path / "cache"))
    labels, toy = bench("labels"), bench("labels_toy")
    monkeypatch.setattr(toy, "QUICK", toy.Size(budgets=(8, 16), seeds=2, prompts=8, clone_steps=2, phases=1, judged=4))
    file = tmp_path / "labels.json"
    flags = ["--quick", "--reviews", str(reviews(tmp_path / "reviews.csv")), "--runs", str(tmp_path / "runs")]
    found = labels.main([*flags, "--json", str(file)])
    assert json.loads(file.read_text())["verdict"] == found["verdict"]
    assert set(found["features"]["gold"]) == {"random", "uncertain", "disagreement", "d_optimal", "direct"}
    assert {"sample", "best constant", "gold"} <= set(found["features"]["beside"])
    assert len(found["features"]["seeds"]["random"]) == 3
    best = found["features"]["beside"]["gold"]["mean"]
    assert all(at["mean"] <= best for values in found["features"]["gold"].values() for at in values)
    assert set(found["toy"]["labels"].values()) == {8, 16}
    assert len(found["toy"]["seeds"]["start"]) == 2
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("result.json")}
    assert labels.main(flags)["features"] == found["features"]  # what is finished is read, not made again
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("result.json")} == written
