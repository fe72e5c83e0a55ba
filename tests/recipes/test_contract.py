"""Every file in recipes/ keeps the contract: it is found by being there, and its runs repeat, resume and ignore micro-batches."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest

from tokenmdp import recipes
from tokenmdp.run import Run
from tokenmdp.testing import contracts

# The small runs are in tests/tiny_*.py, family by family.
BUILDERS: dict[str, Any] = {}
for _file in sorted(Path(__file__).parents[1].glob("tiny_*.py")):
    BUILDERS.update(getattr(importlib.import_module(_file.stem), "BUILDERS", {}))

RECIPES = sorted(m.name for m in pkgutil.iter_modules(recipes.__path__) if not m.name.startswith("_"))


@pytest.mark.parametrize("name", RECIPES)
def test_its_text(name: str) -> None:
    contracts.check_recipe(importlib.import_module(f"tokenmdp.recipes.{name}"))


@pytest.mark.parametrize("name", RECIPES)
def test_its_runs(name: str, tmp_path: Path) -> None:
    assert name in BUILDERS, f"recipes/{name}.py has no small run: add one to the BUILDERS of a tests/tiny_*.py"
    contracts.check_recipe_run(importlib.import_module(f"tokenmdp.recipes.{name}"), BUILDERS[name], tmp_path)


@pytest.mark.parametrize("name", ["dapg", "grpo", "online_dpo", "ppo", "raft", "reinforce", "soft_q"])
def test_a_warm_up_makes_the_first_updates_small(name: str, tmp_path: Path) -> None:
    """Adam's first updates are as long as the rate allows; over 1,000 warm-up steps they are thousandths of that."""
    module = importlib.import_module(f"tokenmdp.recipes.{name}")
    moved = []
    for warmup in (0, 1000):
        cfg, pieces = BUILDERS[name](steps=1, warmup=warmup)
        with Run.open(tmp_path / str(warmup), {}, 0) as run:
            policy, _ = module.train(cfg, *pieces, run=run)
        weights = zip(policy.model.parameters(), pieces[0].model.parameters(), strict=True)
        said = (tmp_path / str(warmup) / "log.txt").read_text()
        assert ("the learning rate was still rising after" in said) == bool(warmup), (
            "and that the run ended in it is said"
        )
        moved.append(max(float((after - before).detach().abs().max()) for after, before in weights))
    assert 0 < moved[1] < moved[0] / 50
