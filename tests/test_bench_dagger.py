"""The bench of asking: its labels are counted rightly, every arm runs, and its figures and verdict, by hand."""

from __future__ import annotations

import importlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmdp import mdp
from tokenmdp.run import Run

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports the bench as running its file does: its folder comes first."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("dagger")
    for name in ("common", "dagger"):  # such plain names must not stay behind for other tests
        sys.modules.pop(name, None)


@pytest.fixture
def size(bench: Any) -> Any:
    return bench.Size(horizon=5, letters=4, labels=(40,), seeds=1, phases=2, updates=2, rows=4, taught=60, answers=2)


def test_every_arm_runs_with_its_labels_and_answers_from_its_folder(bench: Any, size: Any, tmp_path: Path):
    with Run.open(tmp_path / "runs", asdict(size), 0) as run:
        teachers, rest = bench.orders_of(size)
        orders = [teachers[0], *(["narrow", arm, 40, 0] for arm in bench.ARMS), ["narrow", "expert", 0, 0]]
        assert all(o in [*teachers, *rest] for o in orders)
        bench.conduct(run, size, orders, 1)
        found = {bench.name_of(o): bench.trial(run, size, o) for o in orders}
        for arm in ("dagger", "kd", "gkd", "on-policy"):
            lines = (run.folder / f"narrow-{arm}-40-0" / "metrics.jsonl").read_text().splitlines()
            assert '"expert/queries": 40.0' in lines[-1]
    rows = bench.tabulated(found)
    assert {r["arm"] for r in rows} == {*bench.ARMS, "teacher", "expert"}
    assert all(0 <= r["mistakes"][0] <= 5 for r in rows)
    assert mdp.running() is None


def test_demonstrations_are_cut_to_the_labels_paid_for(bench: Any, size: Any):
    world = bench.World.make(size, "narrow", 0)
    for labels in (1, 7, 40):
        b = world.shown(labels)
        assert int(b.action.sum()) == labels
        assert bool(b.action.any(1).all())


def test_the_slipping_hand_slips_as_often_as_it_should(bench: Any, size: Any):
    world = bench.World.make(bench.Size(horizon=16, noise=0.2), "narrow", 0)
    b = world.task.demonstrations.select(torch.arange(100))
    right, slipped = world.expert.expert(b), world.expert(b)
    share = float((slipped.token != right.token)[right.known].float().mean())
    # 0.2 of the labels are any of 8 letters, an eighth of which are the right one: 0.175, give or take 0.05
    assert abs(share - 0.175) < 0.05
    assert torch.equal(slipped.known, right.known)


def cell(kind: str, arm: str, labels: int, *mistakes: float) -> dict[str, dict[str, float]]:
    return {f"{kind}-{arm}-{labels}-{seed}": {"mistakes": x} for seed, x in enumerate(mistakes)}


def test_the_table_and_the_verdict_by_hand(bench: Any):
    size = bench.Size(labels=(10,), seeds=3)
    found = {
        **cell("narrow", "bc", 10, 5.0, 6.0, 7.0),
        **cell("narrow", "dagger", 10, 1.0, 2.2, 3.0),
        **cell("narrow", "bc", 20, 4.0, 5.1, 6.0),
        **cell("narrow", "kd", 10, 4.0, 4.0, 4.0),
        **cell("narrow", "on-policy", 10, 3.0, 5.0, 4.0),
        **cell("recoverable", "bc", 10, 1.0, 1.2, 0.9),
        **cell("recoverable", "dagger", 10, 1.0, 1.0, 1.2),
    }
    rows = bench.tabulated(found)
    one = next(r for r in rows if (r["arm"], r["labels"], r["task"]) == ("on-policy", 10, "narrow"))
    assert one["seeds"] == [3.0, 5.0, 4.0]
    assert one["mistakes"][0] == 4.0
    assert one["minus_bc"][0] == -2.0  # (3 − 5 + 5 − 6 + 4 − 7) / 3
    assert next(r for r in rows if r["arm"] == "kd")["mistakes"] == [4.0, 4.0, 4.0]
    judged = bench.verdict(rows, size)
    assert judged["dagger"]["met"]
    assert judged["dagger"]["share"] == pytest.approx(6.2 / 18, abs=1e-4)
    assert judged["dagger"]["difference"][0] == pytest.approx(-11.8 / 3, abs=1e-4)
    assert judged["twice"]["met"]
    assert not judged["distil"]["met"]  # +0 on the mean of −1, 1 and 0
    assert judged["distil"]["words"] == "no significant difference"
    assert judged["control"]["met"]
    assert set(judged) == set(bench.THRESHOLDS)
    bench.show(rows, judged)
