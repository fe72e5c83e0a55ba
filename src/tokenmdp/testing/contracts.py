"""What every recipe, reward and loss of this library promises, as checks anyone can run on their own.

    check_recipe(my_ppo)                                  its text: equation, source, setting, no dead settings
    check_recipe_run(my_ppo, build, folder)               its runs: repeatable, resumable, finite, micro-batch free, in its setting
    check_reward(reward, batch)                           its scores: one verdict a row, of that row alone
    check_loss(loss, batch, weight, advantage=...)        its values: unreduced, finite, of each row alone

Each raises `ContractBroken` with what was promised, what was found and what to do, and returns nothing.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tokenmdp import mdp
from tokenmdp.mdp import SETTINGS
from tokenmdp.models.parts import cut
from tokenmdp.run import Run
from tokenmdp.types import Batch, Data, Loss, Reward, Score

Build = Callable[[], tuple[Any, Sequence[Any]]]
"""Makes a recipe's config and the pieces its `train` takes between the config and the run, freshly at every call."""

_METRIC = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)*")


class ContractBroken(AssertionError):
    """Something does not keep what everything of its kind promises."""


def _keep(holds: bool, message: str) -> None:
    if not holds:
        raise ContractBroken(message)


# A recipe's text -------------------------------------------------------------------------------------------------------


def check_recipe(module: ModuleType) -> None:
    """A recipe can be read and configured: it says its equation and source, and no setting of it is dead.

    The module has a docstring with an indented equation and a `Source:` line; `SETTING`, a row of `mdp.SETTINGS`; `Config`, a
    frozen dataclass in which every field has a default and is read by some line of the module; `train(cfg, ..., run, ...)` and
    `main(cfg, run)`.

    Raises:
        ContractBroken: naming what is missing.
    """
    name = module.__name__
    text = inspect.cleandoc(module.__doc__ or "")
    equation = any(line.startswith("    ") and re.search(r"[=←∝≤]|min|max", line) for line in text.splitlines())
    _keep(equation, f"{name}: its docstring shows no equation: put the objective on an indented line")
    sourced = re.search(r"^Source: \S", text, re.MULTILINE)
    _keep(bool(sourced), f"{name}: its docstring has no line `Source: ...`: say where the method comes from")
    setting = getattr(module, "SETTING", None)
    _keep(setting in SETTINGS, f"{name}: SETTING is {setting!r}; it must be one of {', '.join(SETTINGS)}")
    _check_config(module)
    for function, needed in (("train", {"cfg", "run"}), ("main", {"cfg", "run"})):
        found = getattr(module, function, None)
        _keep(callable(found), f"{name}: there is no function {function}")
        missing = needed - inspect.signature(getattr(module, function)).parameters.keys()
        _keep(not missing, f"{name}: {function} takes no {' and no '.join(sorted(missing))}")


def _check_config(module: ModuleType) -> None:
    name, config = module.__name__, getattr(module, "Config", None)
    if not (isinstance(config, type) and is_dataclass(config)):
        raise ContractBroken(f"{name}: Config is {config!r}; it must be a dataclass")
    _keep(vars(config)["__dataclass_params__"].frozen, f"{name}: Config can be changed: write @dataclass(frozen=True)")
    bare = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
    _keep(not bare, f"{name}: Config has no default for {', '.join(bare)}: a recipe runs without being told anything")
    read = set(_fields_read(ast.parse(inspect.getsource(module))))
    dead = [f.name for f in fields(config) if f.name not in read]
    _keep(not dead, f"{name}: no line reads {', '.join('cfg.' + f for f in dead)}: use the setting or take it out")


def _fields_read(tree: ast.AST) -> Iterator[str]:
    """Names of attributes read from an argument annotated `Config`, or from anything called cfg."""
    configs = {"cfg"}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name) and node.annotation.id == "Config":
            configs.add(node.arg)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in configs:
            yield node.attr


# A recipe's runs -------------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """Raised in the middle of a step, as a power cut would."""


class _Checked(Run):
    """A run that writes a checkpoint after every step, sees that each is taken inside the recipe's setting, and breaks
    off after it has logged step `stop`, before that step is done.
    """

    stop: int
    recipe: ModuleType

    def steps(
        self,
        n: int,
        *state: Any,
        title: str,
        every_seconds: float = 0.0,
        keep: int = 2,
        setting: str | None = None,
    ) -> Iterator[int]:
        return super().steps(n, *state, title=title, every_seconds=0.0, keep=keep, setting=setting)

    def log(self, step: int, metrics: Any, headline: Sequence[str] = ()) -> None:
        super().log(step, metrics, headline)
        _keep(
            mdp.running() == self.recipe.SETTING,
            f"{self.recipe.__name__}: its SETTING is {self.recipe.SETTING}, step {step} was taken inside {mdp.running()}: write "
            "run.steps(..., setting=SETTING), so that what the setting lacks cannot be touched",
        )
        if step == self.stop:
            raise _Stop


def check_recipe_run(
    module: ModuleType, build: Build, folder: Path | str, *, seed: int = 0, tolerance: float = 1e-4
) -> list[dict[str, float]]:
    """A recipe's runs follow from their seed: repeated, broken off and resumed they write the same metrics, byte for byte.

    Runs `module.train(cfg, *pieces, run)` five times or fewer, so give it three to six small steps, with `cfg, pieces = build()`:

    1. twice with one seed: the same bytes in metrics.jsonl, finite numbers under dashboard names (`a/b_c`);
    2. broken off in the middle of its last step but one and resumed: the same bytes again; every step inside its SETTING;
    3. where Config has `micro_tokens`, with micro-batches of one row: the same metrics up to `tolerance`, relative to each
       metric's largest value.

    Args:
        build: makes the config and the pieces; called before every run, so that no run meets what another has trained.
        folder: an empty folder for the runs.

    Returns:
        The metrics of the first run, step by step.

    Raises:
        ContractBroken: naming the metric and the step.
    """
    name, folder = module.__name__, Path(folder)
    first = _metrics(module, build, folder / "first", seed)
    steps = _named_and_finite(name, first)
    _same(name, "a second run with the same seed", first, _metrics(module, build, folder / "second", seed))
    _same(name, "a run broken off and resumed", first, _resumed(module, build, folder / "resumed", seed, len(steps)))
    cfg, _ = build()
    if any(f.name == "micro_tokens" for f in fields(cfg)):
        _close(name, steps, _rows(_metrics(module, build, folder / "micro", seed, micro_tokens=1)), tolerance)
    return steps


def _metrics(module: ModuleType, build: Build, folder: Path, seed: int, **changes: Any) -> bytes:
    cfg, pieces = build()
    cfg = replace(cfg, **changes)
    with Run.open(folder, config=asdict(cfg), seed=seed) as run:
        module.train(cfg, *pieces, run=run)
    return (folder / "metrics.jsonl").read_bytes()


def _resumed(module: ModuleType, build: Build, folder: Path, seed: int, steps: int) -> bytes:
    stop = max(0, steps - 2)
    cfg, pieces = build()
    run = _Checked.open(folder, config=asdict(cfg), seed=seed)
    assert isinstance(run, _Checked)
    run.stop, run.recipe = stop, module
    try:
        with run:
            module.train(cfg, *pieces, run=run)
    except _Stop:
        _keep(mdp.running() is None, f"{module.__name__}: the loop was left, but its setting {mdp.running()} was not")
        cfg, pieces = build()
        with Run.open(folder, config=asdict(cfg), seed=seed, resume=True) as run:
            module.train(cfg, *pieces, run=run)
        return (folder / "metrics.jsonl").read_bytes()
    raise ContractBroken(
        f"{module.__name__}: it never called run.log({stop}, ...): every step of the loop logs its metrics"
    )


def _rows(data: bytes) -> list[dict[str, float]]:
    return [json.loads(line) for line in data.splitlines()]


def _named_and_finite(name: str, data: bytes) -> list[dict[str, float]]:
    steps = _rows(data)
    _keep(len(steps) >= 3, f"{name}: the run logged {len(steps)} steps; build a run of at least 3")
    for step, line in enumerate(steps):
        _keep(line.pop("step", None) == step, f"{name}: line {step} of metrics.jsonl is not step {step}")
        _keep(bool(line), f"{name}: step {step} logged no metric")
        for metric, value in line.items():
            _keep(
                bool(_METRIC.fullmatch(metric)),
                f"{name}: {metric!r} is no metric's name: write lower_case or group/lower_case",
            )
            _keep(math.isfinite(value), f"{name}: {metric} is {value} at step {step}")
    return steps


def _same(name: str, what: str, first: bytes, second: bytes) -> None:
    if first == second:
        return
    for step, (a, b) in enumerate(zip(_rows(first), _rows(second), strict=False)):
        differ = [m for m in {**a, **b} if a.get(m) != b.get(m)]
        if differ:
            m = differ[0]
            raise ContractBroken(
                f"{name}: {what} differs in {', '.join(differ)} at step {step} ({m} {a.get(m)} and {b.get(m)}): draw from run.rng, "
                "and give run.steps everything that a step changes"
            )
    raise ContractBroken(f"{name}: {what} wrote {len(_rows(second))} steps, the first {len(_rows(first))}")


def _close(name: str, first: list[dict[str, float]], second: list[dict[str, float]], tolerance: float) -> None:
    largest = {m: max(abs(line.get(m, 0.0)) for line in first) for line in first for m in line}
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        for metric, value in a.items():
            _keep(
                abs(value - b[metric]) <= tolerance * (1 + largest[metric]),
                f"{name}: {metric} of step {step} is {value}, but {b[metric]} with micro_tokens=1: weights are made once from the "
                "whole batch, and a loss averages nothing",
            )


# Rewards ---------------------------------------------------------------------------------------------------------------


def check_reward(reward: Reward, batch: Batch, tolerance: float = 1e-5) -> Score:
    """A reward gives each row one finite value and a verdict, the same ones every time and whatever rows stand beside it.

    Args:
        batch: a few rows of different lengths, as the reward will meet them.
        tolerance: for the rounding that other neighbours may cause, in reward units.

    Returns:
        The scores.

    Raises:
        ContractBroken: naming the row and both values.
    """
    B = len(batch)
    score = reward(batch)
    name = getattr(reward, "name", "")
    _keep(isinstance(name, str) and bool(name), f"{reward!r} has no `name`: tables and logs need one")
    _keep(isinstance(score, Score), f"{name} gave {type(score).__name__}; a reward gives a Score")
    _keep(tuple(score.value.shape) == (B,), f"{name} gave values of shape {tuple(score.value.shape)} for {B} rows")
    _keep(
        score.verdict.dtype == torch.bool, f"{name} gave verdicts of type {score.verdict.dtype}; they are True or False"
    )
    _keep(not bool(score.value[~score.verdict].any()), f"{name} gave a value without a verdict: such a value is 0")
    for said, what in ((score.token, "token"), (score.steps, "step")):
        if said is not None:
            shape = tuple(said.shape)
            _keep(shape == tuple(batch.tokens.shape), f"{name} gave {what} rewards of shape {shape}")
            _keep(bool(torch.isfinite(said).all()), f"{name} gave {what} rewards that are not finite")
            _keep(not bool(said[~batch.action].any()), f"{name} gave {what} rewards for tokens that nobody chose")
    again = reward(batch)
    _equal(name, "asked a second time", score, again, range(B), 0.0)
    order = list(reversed(range(B)))
    _equal(name, "with its rows in another order", score, reward(batch.select(order)), order, tolerance)
    for row in range(B):
        _equal(name, "with the row alone", score, reward(batch.select([row])), [row], tolerance)
    return score


def _equal(name: str, when: str, want: Score, found: Score, rows: Sequence[int], tolerance: float) -> None:
    for i, row in enumerate(rows):
        a, b = float(want.value[row]), float(found.value[i])
        same = abs(a - b) <= tolerance * (1 + abs(a)) and bool(want.verdict[row]) == bool(found.verdict[i])
        _keep(same, f"{name} says {a:g} of row {row}, and {b:g} {when}: a score is of its own row, without chance")
        for mine, other, what in ((want.token, found.token, "tokens"), (want.steps, found.steps, "steps")):
            if mine is not None and other is not None:
                L = min(mine.shape[1], other.shape[1])
                gap = float((mine[row, :L] - other[i, :L]).abs().max())
                _keep(gap <= tolerance, f"{name} rewards the {what} of row {row} differently {when}, by {gap:g}")


# Losses ----------------------------------------------------------------------------------------------------------------


def check_loss(loss: Loss, data: Data, weight: Tensor, tolerance: float = 1e-5, **columns: Tensor) -> None:
    """A loss is unreduced: one value a weight, finite everywhere, and each row's of that row alone.

    Args:
        loss: called as the learner calls it: `loss(part, **columns)`, giving values and metrics.
        data: a `Batch` or `Pairs` of two rows or more.
        weight: [B, L] or [B], as it will be given to the learner.
        columns: arrays that belong to the rows.

    Raises:
        ContractBroken: naming what is reduced, not finite, or depends on other rows.
    """
    value, metrics = loss(data, **columns)
    for name, x in {"the loss": value, **metrics}.items():
        shape = tuple(x.shape)
        _keep(
            shape == tuple(weight.shape),
            f"{name} has shape {shape}, its weight {tuple(weight.shape)}: do not reduce it",
        )
        finite = torch.isfinite(x) | (weight == 0)
        _keep(bool(finite.all()), f"{name} is not finite on rows {sorted(set((~finite).nonzero()[:, 0].tolist()))}")
    _keep(value.requires_grad, "the loss carries no gradient: nothing would be learned")
    _keep(
        not any(x.requires_grad for x in metrics.values()) or value.requires_grad,
        "a metric carries the loss's gradient",
    )
    B = len(data)
    for rows in (list(reversed(range(B))), *([row] for row in range(B))):
        index = torch.tensor(rows)
        part = data.select(index)
        found, _ = loss(part, **{k: cut(v, index, part) for k, v in columns.items()})
        want, used = cut(value, index, part), cut(weight, index, part) != 0
        gap = torch.where(used, (found - want).abs(), torch.zeros_like(want))
        _keep(
            bool((gap <= tolerance * (1 + want.abs())).all()),
            f"the loss of rows {rows[:4]} changes by {float(gap.detach().max()):g} with the rows beside them: average nothing in a loss, "
            "compare rows before the learner's step",
        )
