"""The bench of label noise: which pairs it makes, what its figures and verdicts say, and that it goes on where it stopped."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(params=["reward_noise"])
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The bench, imported as running its file does: its folder comes first."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module(request.param)
    for name in ("common", "noise_figures", request.param):  # such plain names must not stay behind for other tests
        sys.modules.pop(name, None)


def cells(bench: Any, accuracy: dict[tuple[str, str], list[float]], **more: Any) -> list[dict[str, Any]]:
    """Cells of given accuracies, seed by seed, for (head, objective), at 30 and 40 % noise."""
    same = {"kind": "same", "pairs": bench.FULL.pairs, "embedding": "own", "seconds": 1.0, **more}
    return [
        {**same, "noise": noise, "head": head, "objective": objective, "seed": seed, "accuracy": value}
        for noise in more.get("levels", (0.3, 0.4))
        for (head, objective), values in accuracy.items()
        for seed, value in enumerate(values)
    ]


def test_a_row_has_its_interval_over_seeds_and_differences_are_paired(bench: Any):
    base = [0.60, 0.70, 0.62, 0.66, 0.64]
    better = [x + gain for x, gain in zip(base, (0.010, 0.012, 0.009, 0.011, 0.010), strict=True)]
    rows = bench.noise_figures.table(
        cells(bench, {("linear", "bradley_terry"): base, ("linear", "classifier"): better})
    )
    assert len(rows) == 4
    first = rows[0]["accuracy"]
    assert first["mean"] == pytest.approx(sum(base) / 5, abs=1e-4)
    assert first["low"] < 0.63
    assert first["high"] > 0.65
    [gap, _] = [c["classifier_minus_bradley_terry"] for c in bench.noise_figures.compared(rows)]
    assert gap["mean"] == pytest.approx(0.0104, abs=1e-4)
    assert gap["low"] > 0.008, "the seeds' own spread is gone from the difference"


@pytest.mark.parametrize(("sign", "said"), [(1, "noise better"), (-1, "noise worse"), (0, "no consistent difference")])
def test_the_verdict_on_the_classifier(bench: Any, sign: int, said: str):
    base = [0.60, 0.70, 0.62, 0.66, 0.64]
    moved = [x + sign * gain for x, gain in zip(base, (0.010, 0.012, 0.009, 0.011, 0.010), strict=True)]
    found = {(head, o): base if o == "bradley_terry" else moved for head in ("linear", "mlp") for o in bench.OBJECTIVES}
    verdict = bench.noise_figures.classifier(bench.noise_figures.table(cells(bench, found)), bench.FULL.pairs)
    assert said in verdict["words"]
    assert verdict["passed"] is (sign == 1)


def test_the_verdict_on_the_body(bench: Any):
    size = bench.FULL
    small = {"pairs": size.body_pairs, "levels": size.body_noise}
    for tuned, passed in (([0.70, 0.71, 0.72], True), ([0.80, 0.81, 0.82], False)):
        rows = bench.noise_figures.table(
            cells(bench, {("linear", "bradley_terry"): [0.70, 0.71, 0.725]}, **small)
            + cells(bench, {("body", "bradley_terry"): tuned}, **small)
        )
        verdict = bench.noise_figures.frozen(rows, size.body_noise)
        assert verdict["passed"] is passed
        assert ("keeps up" in verdict["words"]) is passed


def small(bench: Any) -> Any:
    quick = bench.QUICK
    body = replace(quick.body, rows=12)
    few = {"reviews": 240, "pairs": 40, "judged": 20, "noise": (0.0, 0.3), "seeds": 1, "body_seeds": 1}
    return replace(quick, **few, body=body, body_pairs=24)


def test_pairs_keep_prompts_apart_and_kinds_are_what_they_say(bench: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("TOKENMDP_CACHE", str(tmp_path / "cache"))
    _, texts, gold, facts = bench.begin(small(bench), tmp_path)
    assert facts["gold_accuracy"] > 0.8
    worth = dict(zip((p.row for p in texts.prompts), gold.tolist(), strict=True))
    for kind, (learned, judged) in bench.replicate(small(bench), texts, gold, 0).items():
        asked = [{p.ids for side in (part.chosen, part.rejected) for p in side.prompts} for part in (learned, judged)]
        assert not asked[0] & asked[1], "no prompt is learned from and judged on"
        for won, lost in zip(judged.chosen.prompts, judged.rejected.prompts, strict=True):
            assert (won.ids == lost.ids) is (kind == "same")
            assert worth[won.row] > worth[lost.row]
        spoiled = bench.noisy(learned, 0.25, 0)
        wrong = sum(a.row != b.row for a, b in zip(spoiled.chosen.prompts, learned.chosen.prompts, strict=True))
        assert wrong == round(0.25 * len(learned))


def test_it_runs_and_what_is_finished_is_read(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKENMDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "QUICK", small(bench))
    file = tmp_path / "noise.json"
    flags = ["--quick", "--runs", str(tmp_path / "runs"), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench/reward_noise.py", *flags])
    results = bench.main(flags)
    found = json.loads(file.read_text())
    assert found["passed"].keys() == found["thresholds"].keys() == found["verdict"].keys()
    kinds = {(row["kind"], row["embedding"], row["head"]) for row in found["rows"]}
    heads = {(embedding, head) for _, embedding, head in kinds}
    assert heads == {("own", "linear"), ("own", "mlp"), ("own", "boosted"), ("length", "linear"), ("none", "body")}
    assert {kind for kind, _, _ in kinds} == {"same", "cross"}
    assert all(0 <= row["accuracy"]["mean"] <= 1 and row["seconds"] > 0 for row in found["rows"])
    made = (tmp_path / "runs" / "reward-noise-quick" / "heads-seed-0" / "result.json").stat().st_mtime_ns
    again = bench.main(flags)
    assert again["rows"] == results["rows"]
    assert (tmp_path / "runs" / "reward-noise-quick" / "heads-seed-0" / "result.json").stat().st_mtime_ns == made


@pytest.mark.parametrize("bench", ["heads"], indirect=True)
def test_the_bench_of_heads(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "QUICK_PAIRS", 60)
    monkeypatch.setattr(sys, "argv", ["bench/heads.py", "--quick"])
    threads = torch.get_num_threads()
    file = tmp_path / "heads.json"
    bench.main(["--quick", "--runs", "1", "--json", str(file)])
    found = json.loads(file.read_text())
    assert {"linear", "mlp", "boosted"} < found.keys()
    assert all(found[name]["ratio"] > 0 and found[name]["seconds"] > 0 for name in ("linear", "mlp", "boosted"))
    assert found["_meta"]["pairs"] == 60
    assert torch.get_num_threads() == threads
