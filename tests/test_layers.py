"""Who may import whom, read from the source: the layers, no cycles, and what no file here may do."""

from __future__ import annotations

import ast
import graphlib
import itertools
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import jaxtyping
import pytest
import torch

from tokenmdp.functional import weights

ROOT = Path(__file__).parents[1]

# A module may import its own layer and those above it in this list.
LAYERS = [
    ("types", "mdp", "stats", "growth", "ledger"),
    ("functional",),
    ("models",),
    ("tasks", "rewards", "experts", "prompting", "environment"),
    ("config", "learner", "parallel", "monitors", "run", "gate", "judge"),
    ("recipes",),
    ("testing",),
    ("lab",),
    ("cli", "__main__"),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

UNSAFE_MODULES = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "os.popen", "os.system", "torch.load", "yaml.full_load", "yaml.unsafe_load"}
UNSAFE_NAMES = {"yaml.FullLoader", "yaml.Loader", "yaml.UnsafeLoader"}
UNSAFE_ARGUMENTS = {"allow_pickle", "shell", "trust_remote_code"}

Trees = dict[str, ast.Module]


def parse(source: Path) -> Trees:
    """Every module of the package under `source`, by its dotted name."""
    paths = sorted((source / "tokenmdp").rglob("*.py"))
    names = [".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in zip(names, paths, strict=True)}


def imports(trees: Trees, name: str, lazy: bool = True) -> Iterator[tuple[int, str]]:
    """The line and target of a module's imports; if not `lazy`, only of those that run when it is imported itself."""
    todo: list[ast.AST] = [trees[name]]
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:  # `from a import b` means a.b where that is a module
                longer = f"{node.module}.{alias.name}"
                yield node.lineno, longer if longer in trees else "." * node.level + (node.module or "")
        elif lazy or not (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ):
            todo += ast.iter_child_nodes(node)


def place(module: str) -> str:
    """What of the package a module belongs to: tokenmdp.models.policy → models; nothing for other packages."""
    parts = [*module.split("."), ""]
    return parts[1] if parts[0] == "tokenmdp" else ""


def layer_faults(trees: Trees) -> list[str]:
    """Imports that point the wrong way, by module, line and rule."""
    faults = [f"{name} stands in no layer; name it in LAYERS" for name in trees if place(name) not in {"", *RANK}]
    for name in trees:
        for line, target in imports(trees, name):
            own, other, outside = place(name), place(target), target.split(".")[0]
            rule = ""
            if target.startswith("."):
                rule = "imports are absolute, so that a search finds them"
            elif own == "functional" and not (
                other in ("functional", "types") or outside in {"torch", "jaxtyping", *sys.stdlib_module_names}
            ):
                rule = "functional imports torch and types only"
            elif own == other == "recipes" and target != "tokenmdp.recipes":
                rule = "recipes never import recipes: share the equation in functional, repeat the loop"
            elif own and RANK.get(other, 0) > RANK.get(own, 0):
                rule = f"{other} stands on {own}, not {own} on {other}"
            if rule:
                faults.append(f"{name}:{line} imports {target}: {rule}")
    return faults


def import_cycle(trees: Trees) -> str:
    """A chain of imports at module level that comes back to where it began; empty if there is none."""
    graph = {name: {t for _, t in imports(trees, name, lazy=False) if t in trees and t != name} for name in trees}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return ""


def unsafe(trees: Trees) -> list[str]:
    """Ways to run code that came with data: pickle, eval, a shell, remote code."""
    faults = []
    for name, tree in trees.items():
        for line, target in imports(trees, name):
            if target.split(".")[0] in UNSAFE_MODULES:
                faults.append(f"{name}:{line} imports {target}: it runs code from data; use JSON or safetensors")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_NAMES:
                faults.append(f"{name}:{node.lineno} uses {ast.unparse(node)}: only a safe loader reads plain data")
            if isinstance(node, ast.Call):
                if (called := ast.unparse(node.func)) in UNSAFE_CALLS:
                    faults.append(f"{name}:{node.lineno} calls {called}: it runs code from data")
                for keyword in node.keywords:
                    if keyword.arg in UNSAFE_ARGUMENTS and ast.unparse(keyword.value) != "False":
                        faults.append(f"{name}:{node.lineno} passes {ast.unparse(keyword)}: only False is safe")
    return faults


@pytest.fixture(scope="module")
def trees() -> Trees:
    return parse(ROOT / "src")


def test_imports_point_downwards(trees: Trees):
    assert not layer_faults(trees)


def test_no_module_imports_itself_by_a_detour(trees: Trees):
    assert import_cycle(trees) == ""


def test_nothing_runs_code_that_came_with_data(trees: Trees):
    assert not unsafe(trees)


def test_every_package_imported_is_declared_and_every_one_declared_is_imported(trees: Trees):
    def distributions(names: Iterable[str]) -> set[str]:
        return {re.sub(r"[-_.]+", "-", re.split(r"[<>=~!\[; ]", name)[0]).lower() for name in names}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = distributions(project["dependencies"])
    optional = distributions(itertools.chain.from_iterable(project["optional-dependencies"].values()))
    packages = {target.split(".")[0] for name in trees for _, target in imports(trees, name)}
    providers = packages_distributions()
    outside = packages - {"tokenmdp"} - sys.stdlib_module_names
    used = distributions(itertools.chain.from_iterable(providers.get(package, [package]) for package in outside))
    assert not used - needed - optional, "imported, but pyproject.toml does not name them"
    assert not needed - used, "pyproject.toml requires them, but nothing imports them"


def test_the_rules_catch_what_they_forbid(tmp_path: Path):
    planted = {
        "__init__": "",
        "types": "",
        "cellar": "",
        "functional/kl": "import math, torch\nimport tokenmdp.types\nfrom tokenmdp.models import policy\nimport numpy",
        "models/policy": "def f():\n    from tokenmdp import learner",
        "learner": "from tokenmdp import recipes",
        "recipes/__init__": "",
        "recipes/ppo": "from tokenmdp.recipes.sft import Config\nfrom tokenmdp.learner import Learner",
        "recipes/sft": "import tokenmdp.recipes.ppo\nfrom . import ppo",
        "lab/demo": "import pickle\ntorch.load('x')\neval('1')\nmodel.eval()\nrun('x', shell=True)\nrun(shell=False)",
    }
    for name, text in planted.items():
        path = tmp_path / "tokenmdp" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    trees = parse(tmp_path)
    found = layer_faults(trees)
    assert found[0] == "tokenmdp.cellar stands in no layer; name it in LAYERS"
    assert found[3] == "tokenmdp.learner:1 imports tokenmdp.recipes: recipes stands on learner, not learner on recipes"
    assert [fault.split(" ")[0] for fault in found[1:]] == [
        "tokenmdp.functional.kl:3",
        "tokenmdp.functional.kl:4",
        "tokenmdp.learner:1",
        "tokenmdp.models.policy:2",
        "tokenmdp.recipes.ppo:1",
        "tokenmdp.recipes.sft:1",
        "tokenmdp.recipes.sft:2",
    ]
    assert set(import_cycle(trees).split(" imports ")) == {"tokenmdp.recipes.ppo", "tokenmdp.recipes.sft"}
    assert [fault.split(": ")[0] for fault in unsafe(trees)] == [
        "tokenmdp.lab.demo:1 imports pickle",
        "tokenmdp.lab.demo:2 calls torch.load",
        "tokenmdp.lab.demo:3 calls eval",
        "tokenmdp.lab.demo:5 passes shell=True",
    ]


def test_shapes_in_signatures_are_checked_here():
    with pytest.raises(jaxtyping.TypeCheckError, match="action"):
        weights.per_token(torch.ones(3, dtype=torch.bool))
