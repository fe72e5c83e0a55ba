"""What the benches of solvers make of figures, by hand; the figures themselves come from long runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a bench as running its file does: its folder comes first."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module
    for name in ("common", "compare", "staleness"):  # such plain names must not stay behind for other tests
        sys.modules.pop(name, None)


def row(solver: str, family: str, failed: int, tokens: float, score: float) -> dict[str, Any]:
    return {"solver": solver, "family": family, "failed": failed, "tokens": tokens, "iqm": {"mean": score}}


def test_who_falls_short_is_named(bench: Any):
    rows = [
        row("start", "baseline", 0, 0.0, 0.4),
        row("rloo", "online", 0, 990.0, 0.6),
        row("ppo", "online", 2, 1040.0, 0.5),
        row("dpo", "preferences", 5, 1100.0, 0.3),
    ]
    found = bench("compare").judged("char", {"rows": rows, "budget_tokens": 1000})
    assert found["on_policy"] == {"passed": False, "not": ["ppo"]}  # dpo is not online
    assert found["tokens"] == {"passed": False, "not": ["dpo"]}  # 10 % over; 4 % is within
    assert found["start"]["passed"]
    assert set(bench("compare").judged("sentiment", {"rows": rows, "budget_tokens": 1000})) == {"tokens"}


def test_arithmetic_asks_for_one_policy_gradient_that_learns(bench: Any):
    rows = [row(name, "online", failed, 1000.0, 0.4) for name, failed in (("rloo", 1), ("grpo", 0), ("raft", 0))]
    found = bench("compare").judged("arithmetic", {"rows": rows, "budget_tokens": 1000})
    assert found["policy_gradient"] == {"passed": True, "beat": ["grpo"]}  # raft is none
    found = bench("compare").judged("arithmetic", {"rows": [rows[0], rows[2]], "budget_tokens": 1000})
    assert not found["policy_gradient"]["passed"]


def test_the_mean_curve_by_hand(bench: Any):
    # Seeds with 3 and 2 points share 20 to 40 tokens; at both ends: (0.1 + 0.3)/2 and (0.5 + 0.7)/2.
    curves = [[[20, 0.1], [30, 0.3], [40, 0.5]], [[20, 0.3], [40, 0.7]], []]
    assert bench("compare").mean_curve(curves) == [[20, 0.2], [40, 0.6]]
    assert bench("compare").mean_curve([[], []]) == []


def test_the_command_says_how_to_go_on(bench: Any, tmp_path: Path):
    line = bench("compare").command_of({"tune": True, "workers": 2, "quiet": False}, tmp_path, 3, fresh=False)
    assert line[2:] == [
        "tokenmdp",
        "compare",
        "--out",
        str(tmp_path),
        "--seed",
        "3",
        "--tune",
        "--workers",
        "2",
        "--resume",
    ]
    (tmp_path / "config.json").touch()
    assert bench("compare").command_of({}, tmp_path, 0, fresh=True)[-1] == "--overwrite"


def test_a_collapse_is_half_of_the_best_mean(bench: Any):
    collapsed = bench("staleness").collapsed
    assert not collapsed([0.4] * 5 + [0.2] * 5)  # 0.2 is not below half of 0.4
    assert collapsed([0.4] * 5 + [0.19] * 5)
    assert not collapsed([0.9, 0.1, 0.1])  # too short for a mean


def ended(final: float, failure: str = "") -> dict[str, Any]:
    return {"start": 0.4, "final": final, "failure": failure, "clipped": 0.1}


def cells(bench: Any, failing: dict[tuple[str, str], int], runs: int = 10) -> dict[str, dict[str, Any]]:
    """All cells alike, around 0.5, but for those with so many failures: these end lower."""
    staleness = bench("staleness")

    def one(arm: str, level: str) -> Any:
        lost = failing.get((arm, level), 0)
        good = [ended(0.5 + 0.001 * i) for i in range(runs - lost)]
        return staleness.cell(good + [ended(0.2 + 0.001 * i, "below") for i in range(lost)])

    return {arm: {level: one(arm, level) for level in staleness.LEVELS} for arm in staleness.ARMS}


def test_a_cell_counts_failures_and_says_how_sure_the_rate_is(bench: Any):
    found = cells(bench, {("clip", "stale"): 2})["clip"]["stale"]
    assert found["failures"] == {"below": 2, "collapse": 0, "broken": 0}
    # Wilson for 2 of 10: (2 + 1.9207)/(10 + 3.8415) ± 1.96 · sqrt(1.6 + 0.9604)/13.8415
    assert found["rate"] == pytest.approx([0.2, 0.0567, 0.5098], abs=2e-4)
    assert found["gain"] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        ({}, "neither shows here"),
        ({("no clip", "stale"): 9}, "both hold here"),
        (
            {("no clip", "stale"): 9, ("clip", "stale"): 9},
            "the nearly on-policy data hold here and the clip does not show",
        ),
        ({("no clip", "stale"): 9, ("no clip", "fresh"): 9}, "the conservative update holds here"),
    ],
)
def test_the_verdict_separates_fresh_data_from_the_clip(bench: Any, failing: dict[tuple[str, str], int], words: str):
    effects, said = bench("staleness").verdict(cells(bench, failing), 10)
    assert words in said[-1]
    assert len(said) == len(effects) + 1
    if not failing:
        assert all("no significant difference" in line for line in said[:-1])
