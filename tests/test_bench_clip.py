"""What the clip bench makes of its runs, by hand; the runs themselves are long."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("clip")
    for name in ("common", "clip"):
        sys.modules.pop(name, None)


def ended(final: float, spike: float, seed: int, failure: str = "") -> dict[str, Any]:
    return {
        "start": 0.4, "final": final + 0.001 * seed, "failure": failure, "kl_mean": spike / 2, "kl_largest": spike + 1e-5 * seed,
        "clipped": 0.1, "tokens": 100, "curve": [0.3, 0.4, 0.5 + 0.01 * seed][: 3 - seed % 2],
    }  # fmt: skip


def cells(clip: Any, tight: float, none_spike: float) -> dict[str, Any]:
    """Five runs a range; 0.1 ends highest, the tightest at `tight`, and no clip spikes to `none_spike`."""
    finals = {"0.02": tight, "0.05": 0.5, "0.1": 0.6, "0.2": 0.55, "0.4": 0.5, "0": 0.45}
    return {
        name: clip.cell([ended(final, none_spike if name == "0" else 0.01, s) for s in range(5)])
        for name, final in finals.items()
    }


def test_too_tight_too_loose_and_between(clip: Any) -> None:
    found = clip.verdict(cells(clip, tight=0.41, none_spike=1.0))
    assert {name: row["passed"] for name, row in found.items()} == {"stalls": True, "spikes": True, "between": True}
    assert found["between"]["highest"] == "0.1"
    assert clip.in_words(found).startswith("At the rate 0.001: too tight a range stalls; without a clip single phases")
    found = clip.verdict(cells(clip, tight=0.9, none_spike=0.01))
    assert {name: row["passed"] for name, row in found.items()} == {"stalls": False, "spikes": False, "between": False}
    assert clip.in_words(found).endswith("(highest: 0.02).")


def test_a_cell_by_hand(clip: Any) -> None:
    found = clip.cell([ended(0.5, 0.01, s, "diverged" if s == 4 else "") for s in range(5)])
    assert found["iqm"][0] == pytest.approx(0.502)  # seeds 1, 2, 3
    assert found["gain"][0] == pytest.approx(0.102)
    assert found["broken"] == 1
    middle, low, high = found["kl_spike"]  # of 0.01000 to 0.01004
    assert 0 < low < middle < high
    assert middle == pytest.approx(0.01002, abs=1e-6)
    assert found["curve"] == [0.3, 0.4]  # as long as the shortest


def test_the_picture_names_every_range(clip: Any) -> None:
    one = cells(clip, tight=0.41, none_spike=1.0)
    drawn = clip.picture({"cells": {"0.0003": one, "0.001": one}, "start_score": 0.4})
    assert drawn.startswith("<svg")
    for name in ("none", "0.02", "0.4", "rate 0.001", "clip range"):
        assert f">{name}<" in drawn
