"""Every file in recipes/ keeps the contract: it is found by being there, and its runs repeat, resume and ignore micro-batches."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

from tiny_recipes import BUILDERS
from tokenmdp import recipes
from tokenmdp.testing import contracts

RECIPES = sorted(m.name for m in pkgutil.iter_modules(recipes.__path__) if not m.name.startswith("_"))


@pytest.mark.parametrize("name", RECIPES)
def test_its_text(name: str) -> None:
    contracts.check_recipe(importlib.import_module(f"tokenmdp.recipes.{name}"))


@pytest.mark.parametrize("name", RECIPES)
def test_its_runs(name: str, tmp_path: Path) -> None:
    assert name in BUILDERS, f"recipes/{name}.py has no small run: add one to BUILDERS in tests/tiny_recipes.py"
    contracts.check_recipe_run(importlib.import_module(f"tokenmdp.recipes.{name}"), BUILDERS[name], tmp_path)
