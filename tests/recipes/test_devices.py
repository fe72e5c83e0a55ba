"""Every recipe on a second device (`elsewhere`): what it makes lies where the weights are, and its figures are the same."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from test_contract import BUILDERS, RECIPES
from torch import nn

from elsewhere import GPU, DifferentDevices, Elsewhere, send
from tokenmdp.lab import demo
from tokenmdp.models import catalog
from tokenmdp.run import Run
from tokenmdp.testing import contracts


@pytest.mark.parametrize("name", RECIPES)
def test_its_run_on_another_device(name: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"tokenmdp.recipes.{name}")
    figures = []
    for there in (False, True):
        cfg, pieces = BUILDERS[name]()
        with Run.open(tmp_path / str(there), asdict(cfg), 0) as run:
            if not there:
                module.train(cfg, *pieces, run=run)
            else:
                send(list(pieces))
                with Elsewhere():
                    module.train(cfg, *pieces, run=run)
        figures.append((tmp_path / str(there) / "metrics.jsonl").read_bytes())
    assert figures[0] == figures[1]


def test_a_run_is_resumed_on_another_device(tmp_path: Path) -> None:
    def build() -> tuple[Any, Sequence[Any]]:
        cfg, pieces = BUILDERS["ppo"]()
        send(list(pieces))
        return cfg, pieces

    with Elsewhere():
        contracts.check_recipe_run(importlib.import_module("tokenmdp.recipes.ppo"), build, tmp_path)


def test_the_demo_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything from the data to the verdict."""
    load = catalog.load
    monkeypatch.setattr(catalog, "load", lambda name, compute="auto", device="cuda": load(name, compute, device))
    cfg = demo.Config(size="tiny")
    with Run.open(tmp_path / "demo", asdict(cfg), 0) as run, Elsewhere():
        found = demo.main(cfg, run)
    assert found["gold, PPO"]
    assert (tmp_path / "demo/report.html").stat().st_size > 10_000


def test_two_devices_are_told_apart() -> None:
    """The test's own tool: what it refuses, and what a GPU allows."""
    with Elsewhere():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert there.device == GPU
        assert here.device.type == "cpu"
        for wrong in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here[there.long()]):
            with pytest.raises(DifferentDevices):
                wrong()
        with pytest.raises(TypeError, match="cpu"):
            there.numpy()
        with pytest.raises(DifferentDevices, match="generator"):
            torch.rand(2, device="cuda", generator=torch.Generator())
        assert (there + torch.tensor(1.0)).device == GPU, "a number from here"
        assert there[torch.tensor([0, 2])].device == GPU, "an index from here"
        assert there.cpu().numpy().tolist() == [1.0, 1.0, 1.0]
        assert there.device == GPU, "a copy was moved"
        assert copy.deepcopy(nn.Linear(2, 2).to("cuda")).weight.device == GPU
