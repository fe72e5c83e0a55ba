"""Every file in recipes/ keeps the contract: it is found by being there, and its runs repeat, resume and ignore micro-batches."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest

from tokenmdp import recipes
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
