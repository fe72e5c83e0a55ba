"""The comparison with TRL: what its result file says, and what happens where TRL is not installed."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "parity_trl.json"
NAMES = ("common", "parity_trl", "trl_losses", "trl_rows")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bench, imported as running its file does."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    yield importlib.import_module("parity_trl")
    for name in NAMES:  # such plain names must not stay behind for other tests
        sys.modules.pop(name, None)


def test_the_result_file_has_every_loss_and_all_of_them_agree() -> None:
    found = json.loads(RESULTS.read_text())
    tolerance = found["_meta"]["tolerance"]
    assert tolerance == 1e-5
    assert "trl" in found["_meta"]["versions"]
    names = " ".join(found["equal"])
    for loss in ("DPO", "robust", "conservative", "IPO", "SimPO", "ORPO", "KTO", "Bradley-Terry", "centring"):
        assert loss in names
    for loss in ("PPO", "GRPO", "per token", "per slot", "DAPO", "GSPO", "CISPO", "RLOO", "k1", "k3"):
        assert loss in names
    for row in found["equal"].values():
        measured = [row[key] for key in ("difference", "gradient_difference") if key in row]
        assert row["agrees"] is True
        assert measured
        assert max(measured) <= tolerance
    for row in found["on_purpose"].values():
        assert row["why"]
        assert row["difference"] > tolerance, "a difference on purpose that is none should be in the other table"


def test_without_trl_it_says_what_to_install(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r'needed for this bench only.*pip install "tokenmdp\[bench\]"'):
        bench.main([])


def test_with_trl_every_loss_agrees(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is an extra: pip install 'tokenmdp[bench]'")
    found = bench.main(["--draws", "2", "--json", str(tmp_path / "parity.json")])
    assert all(row["agrees"] for row in found["equal"].values())
    assert found["equal"].keys() == json.loads(RESULTS.read_text())["equal"].keys()


def test_differences_are_seen(bench: Any) -> None:
    import torch

    ones = torch.ones(3)
    assert bench.difference(ones, ones + torch.tensor([0.0, 0.5, -0.2]), 2.0) == 0.25
    with pytest.raises(ValueError, match="not the same quantity"):
        bench.difference(ones, torch.ones(4), 1.0)


def test_nothing_in_the_package_imports_trl() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "trl" for name in names), path
