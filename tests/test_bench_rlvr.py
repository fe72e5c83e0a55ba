"""The bench of verifiable rewards: its figures and verdicts from given answers, and what it writes of its data."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_models import batch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def rlvr(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The bench, imported as running its file does: its folder comes first."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("rlvr")
    for name in ("common", "rlvr"):  # such plain names must not stay behind for other tests
        sys.modules.pop(name, None)


def answers(counts: list[int]) -> list[list[float]]:
    """Eight samples a problem, of which so many are right."""
    return [[1.0] * count + [0.0] * (8 - count) for count in counts]


def test_figures_are_paired_by_problem(rlvr: Any):
    before, after = answers([0, 2, 4, 8] * 10), answers([2, 4, 4, 8] * 10)
    found = rlvr.figures(before, after)
    assert found["pass@1"]["mean"] == pytest.approx((2 + 4 + 4 + 8) / 32, abs=1e-4)
    assert found["pass@1_gain"]["mean"] == pytest.approx((2 + 2 + 0 + 0) / 32)
    assert found["pass@8_gain"]["mean"] == pytest.approx(1 / 4)  # one problem in four is solved at last
    # Both gains are the same in every fourth problem: the interval knows only that, not how hard the problems are.
    assert 0 < found["pass@1_gain"]["low"] < found["pass@1_gain"]["mean"] < found["pass@1_gain"]["high"]
    assert rlvr.figures(before, before)["pass@1_gain"] is None


def test_verdicts_need_every_seed(rlvr: Any):
    def seed(one: tuple[float, float] | None, eight: tuple[float, float] | None) -> dict[str, Any]:
        ends = {"pass@1_gain": one, "pass@8_gain": eight}
        return {name: None if e is None else {"low": e[0], "high": e[1]} for name, e in ends.items()}

    good = seed((0.01, 0.1), (-0.05, 0.05))

    def of(*seeds: dict[str, Any], **controls: Any) -> dict[str, bool]:
        return dict(rlvr.verdicts({"grpo": {str(i): s for i, s in enumerate(seeds)}, **controls}))

    assert of(good, seed((0.02, 0.1), None)) == {"pass@1": True, "pass@8": True}
    assert of(good, seed((-0.01, 0.1), (-0.1, 0.0))) == {"pass@1": False, "pass@8": False}
    assert of(seed(None, (0.1, 0.2))) == {"pass@1": False, "pass@8": True}
    above, even = ({"pass@1_grpo_over": {"low": x, "high": 0.1}} for x in (0.01, -0.01))
    assert of(good, good, coin={"0": above, "1": above})["coin"]
    assert not of(good, good, coin={"0": above, "1": even})["coin"]


def test_a_coin_knows_the_seed_and_nothing_else(rlvr: Any):
    b = batch([([1], [2, 3]), ([1], [2, 3]), *(([1], [2 + i]) for i in range(40))])
    one, again, other = (rlvr.coin(seed)(b).value.tolist() for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert one[0] == one[1]
    assert 10 < sum(one) < 32


def test_what_grpo_has_more_than_a_control_is_paired_by_problem(rlvr: Any):
    found = rlvr.over(answers([4, 4, 8, 8] * 10), answers([2, 4, 4, 8] * 10))
    assert found["pass@1_grpo_over"]["mean"] == pytest.approx((2 + 0 + 4 + 0) / 32, abs=1e-4)
    assert found["pass@8_grpo_over"] is None


def test_the_path_of_the_data_stays_out_of_the_results(rlvr: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "my data"
    folder.mkdir()
    for part, first in (("train", 3), ("test", 40)):
        rows = [{"question": f"{first + i} + 1", "answer": first + i + 1} for i in range(30)]
        (folder / f"{part}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    quick = rlvr.QUICK
    small = rlvr.Size(
        model="tiny",
        sft=replace(quick.sft, steps=2, rows=4),
        grpo=replace(quick.grpo, steps=1, prompts=2, samples=2, max_new_tokens=12),
        judged=replace(quick.judged, prompts=4, n=8, max_new_tokens=12),
        kept=4,
    )
    monkeypatch.setattr(rlvr, "QUICK", small)
    file = tmp_path / "rlvr.json"
    flags = ["--quick", "--data", str(folder), "--seeds", "0", "--runs", str(tmp_path / "runs"), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench/rlvr.py", *flags])
    rlvr.main(flags)
    text = file.read_text()
    assert str(folder) not in text
    found = json.loads(text)
    assert "--data DIR" in found["command"]
    assert set(found["data"]["sha256"]) == {"train.jsonl", "test.jsonl"}
    assert found["data"]["held_out"] == 30
    assert (
        len(found["arms"]["grpo"]["0"]["objective/scores"]) == len(found["arms"]["coin"]["0"]["objective/scores"]) == 1
    )
    grpo, more = (found["arms"][arm]["0"]["tokens"] for arm in ("grpo", "sft-more"))
    assert more == pytest.approx(grpo, rel=0.9)  # of one step's many tokens
    assert found["passed"].keys() == found["thresholds"].keys()
    made = (tmp_path / "runs" / "rlvr-quick-seed-0" / "grpo" / "metrics.jsonl").stat().st_mtime_ns
    rlvr.main(flags)  # what is finished is read, not run again
    assert json.loads(file.read_text())["arms"] == found["arms"]
    assert (tmp_path / "runs" / "rlvr-quick-seed-0" / "grpo" / "metrics.jsonl").stat().st_mtime_ns == made
