"""The bench of compounding error: its tables and verdicts from given costs, and small runs of both its parts."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenmdp import growth
from tokenmdp.lab import meter
from tokenmdp.models import tiny
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.tasks import Task, drift

BENCH = Path(__file__).parents[1] / "bench"
LENGTHS = [4, 8, 16, 32]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The bench, imported as running its file does: its folder comes first."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("compounding")
    for name in ("common", "compounding", "compounding_toy", "compounding_real"):  # such plain names must not stay
        sys.modules.pop(name, None)


def student(error: float, narrow: bool, prompts: int = 10, n: int = 40, seed: int = 0) -> meter.Measured:
    """The costs of a cloner with this chance of a mistake at every step."""
    rng = np.random.default_rng(seed)
    slips = rng.random((prompts, n, LENGTHS[-1])) < error
    lost = np.logical_or.accumulate(slips, axis=2)
    before = np.concatenate([np.zeros((prompts, n, 1), dtype=bool), lost[:, :, :-1]], axis=2)
    expected = np.where(before, 1.0, error).mean(1) if narrow else np.full((prompts, LENGTHS[-1]), error)
    counted = (lost if narrow else slips).mean(1)
    going = np.ones((prompts, LENGTHS[-1]))
    # One letter in ten is harder, so that prompts are not all the same.
    expected = expected * np.where(np.arange(prompts) == 0, 1.1, 1.0)[:, None]
    shown = np.full((prompts, LENGTHS[-1]), error)
    own = {"distance": expected, "mistakes": counted}
    return meter.Measured(own, {"distance": shown, "mistakes": 0 * shown}, going, going)


def test_a_row_has_the_exponent_of_its_kind(bench: Any) -> None:
    narrow = bench.row([student(0.02, True, seed=s) for s in range(5)], LENGTHS)
    slope, worst = narrow["exponent"]["distance"], narrow["worst_case"]["exponent"]
    assert worst == pytest.approx(float(growth.exponent(LENGTHS, growth.worst_case(0.02, LENGTHS))[0]), abs=1e-3)
    assert slope["low"] < worst < slope["high"]
    assert len(narrow["exponent_by_seed"]) == 5
    assert narrow["error"]["shown_states"]["mean"] == 0.02
    plain = bench.row([student(e, False) for e in (0.01, 0.02, 0.03)], LENGTHS)
    assert plain["exponent"]["distance"]["mean"] == pytest.approx(1.0, abs=1e-4)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_a_comparison_says_which_way_or_that_it_cannot(bench: Any) -> None:
    errors = (0.01, 0.015, 0.02, 0.025, 0.03)
    cloned = [student(e, True, seed=i) for i, e in enumerate(errors)]
    asked = [student(e, False, seed=i) for i, e in enumerate(errors)]
    gap = bench.difference(asked, cloned, LENGTHS)
    assert bench.inside(gap["exponent"], -9, 0) is True
    assert gap["cost"]["high"] < 0
    assert "exponent significantly lower" in bench.against("dagger", "(a)", gap)
    again = [student(e, True, seed=i + 50) for i, e in enumerate(errors)]
    same = bench.difference(again, cloned, LENGTHS)
    assert bench.inside(same["exponent"], -9, 0) is False
    assert "exponent not significantly different" in bench.against("rl", "(a)", same)
    one = bench.difference(cloned[:1], cloned[:1], LENGTHS)
    assert bench.inside(one["exponent"], -9, 0) is None
    assert "without an interval" in bench.against("rl", "(a)", one)


def test_the_toys_from_end_to_end(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = bench.toy.QUICK
    small = replace(
        quick,
        horizon=8,
        lengths=2,
        noise=(0.1, 0.05),
        demonstrations=60,
        pairs=12,
        sft=replace(quick.sft, steps=6),
        dagger=replace(quick.dagger, steps=1, updates=2, demonstrations=20),
        rm=replace(quick.rm, epochs=1),
        rl=replace(quick.rl, steps=1),
    )
    monkeypatch.setattr(bench.toy, "QUICK", small)
    file = tmp_path / "compounding.json"
    file.write_text(json.dumps({"real": "stays"}))
    flags = ["--quick", "--seeds", "1", "--runs", str(tmp_path / "runs"), "--json", str(file)]
    bench.main(flags)
    found = json.loads(file.read_text())
    assert found["real"] == "stays"
    toys = found["toy"]
    assert set(toys["passed"]) == set(toys["thresholds"]) == set(bench.THRESHOLDS)
    assert set(toys["tables"]["narrow"]) == set(toys["tables"]["recoverable"]) == {"bc", "dagger", "rlhf", "rl"}
    assert set(toys["quality"]) == {"0.1", "0.05"}
    assert toys["quality"]["0.1"]["broken_off"] > toys["quality"]["0.05"]["broken_off"]
    assert toys["runs"]["dagger narrow"][0]["queries"] > 0
    # One student serves both kinds: on the expert's own states its error is the same.
    errors = [toys["tables"][kind]["bc"]["error"]["shown_states"]["mean"] for kind in drift.KINDS]
    assert errors[0] == errors[1]
    made = sorted((tmp_path / "runs").rglob("metrics.jsonl"))
    before = [path.stat().st_mtime_ns for path in made]
    bench.main(flags)  # what is finished is read, not run again
    assert [path.stat().st_mtime_ns for path in made] == before
    assert json.loads(file.read_text())["toy"]["tables"] == toys["tables"]


def test_the_students_of_a_teacher_model(bench: Any, tmp_path: Path) -> None:
    real = bench.real
    start, teacher = tiny.tiny(seed=0).freeze(), tiny.tiny(seed=1).freeze()
    prompts = tuple(start.prompt(text, row) for row, text in enumerate("abcdefghijkl"))
    task = Task("letters", train=prompts, held_out=prompts[:4])
    size = replace(
        real.QUICK,
        horizon=6,
        lengths=2,
        demonstrations=8,
        student=replace(real.QUICK.student, steps=2, rows=4, evaluate_every=2),
        dagger=replace(real.QUICK.dagger, steps=1, updates=1, prompts=4, rows=4),
        pairs=12,
        rl=replace(real.QUICK.rl, steps=1, prompts=2, samples=2),
        judged=4,
    )
    with Run.open(tmp_path / "run", {}, 0) as run:
        found = {arm: real.trial(size, run, (start, teacher, task), arm, 0) for arm in ("start", *real.ARMS)}
        assert real.trial(size, run, (start, teacher, task), "rlhf", 0) == found["rlhf"]
    assert found["bc"]["figures"]["labels"] > 0
    for one in found.values():
        table = bench.row([meter.Measured.of(one["measured"])], [3, 6])
        assert 0 < table["cost"]["distance"][-1]["mean"] < 6
    batch = start.sample(list(prompts[:3]), 2, Sampling(5), torch.Generator().manual_seed(0))
    logp = teacher.evaluate(batch)["logp"]
    liking = real.likelihood(teacher, batch)
    for row in range(6):  # the mean over the tokens of the row, whatever the others' lengths
        assert float(liking[row]) == pytest.approx(float(logp[row][batch.action[row]].mean()), abs=1e-5)
