"""The contracts catch what they are for: each test breaks one promise and expects its name."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_models import ragged
from tiny_recipes import liking, liking_reward_model, policy, responses
from tokenmdp.functional import policy_loss, preference, weights
from tokenmdp.testing.contracts import ContractBroken, check_loss, check_recipe, check_recipe_run, check_reward
from tokenmdp.types import Batch, Pairs, Score

GOOD = '''"""Gradient descent on a parabola.

    x ← x − rate · (x − noise)

Source: Cauchy 1847.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SETTING = "rl"


@dataclass(frozen=True)
class Config:
    steps: int = 5
    rate: float = 0.1
    micro_tokens: int = 7


class State:
    def __init__(self) -> None:
        self.x = torch.ones(3)

    def tensors(self):
        return {"x": self.x}

    def scalars(self):
        return {}

    def restore(self, tensors, scalars):
        self.x = tensors["x"].clone()


def train(cfg, state, run):
    for step in run.steps(cfg.steps, state, title="descent", setting=SETTING):
        noise = torch.randn(3, generator=run.rng)
        parts = (state.x - noise).split(cfg.micro_tokens)
        loss = sum(part.square().sum() for part in parts)
        state.x = state.x - cfg.rate * (state.x - noise)
        run.log(step, {"loss": float(loss), "val/x": float(state.x.sum())})
    return state


def main(cfg, run):
    return {"x": float(train(cfg, State(), run).x.sum())}
'''


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., ModuleType]:
    """Makes a module of the good recipe with some of its text exchanged."""
    number = itertools.count()

    def make(*exchanges: tuple[str, str]) -> ModuleType:
        text = GOOD
        for old, new in exchanges:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"descent_{next(number)}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up by name.
        monkey.setitem(importlib.import_module("sys").modules, path.stem, module)
        spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as monkey:
        yield make


def build(module: ModuleType) -> Callable[[], tuple[Any, list[Any]]]:
    return lambda: (module.Config(), [module.State()])


# -- a recipe's text --------------------------------------------------------------------------------------------------------


def test_a_good_recipe_is_left_alone(recipe: Callable[..., ModuleType], tmp_path: Path) -> None:
    module = recipe()
    check_recipe(module)
    steps = check_recipe_run(module, build(module), tmp_path / "runs")
    assert len(steps) == 5
    assert steps[0].keys() == {"loss", "val/x"}


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        (("    x ← x − rate · (x − noise)\n", "It goes down.\n"), "shows no equation"),
        (("Source: Cauchy 1847.", "By Cauchy."), "no line `Source: ...`"),
        (("Source: Cauchy 1847.", "Source:"), "no line `Source: ...`"),
        (('SETTING = "rl"', 'SETTING = "supervised"'), "SETTING is 'supervised'; it must be one of rl, offline_rl"),
        (('SETTING = "rl"', ""), "SETTING is None"),
        (("@dataclass(frozen=True)", "@dataclass"), "Config can be changed"),
        (("@dataclass(frozen=True)\nclass Config:", "class Config:"), "it must be a dataclass"),
        (("    steps: int = 5\n", "    steps: int\n"), "no default for steps"),
        (
            ("    rate: float = 0.1\n", "    rate: float = 0.1\n    momentum: float = 0.9\n"),
            "no line reads cfg.momentum",
        ),
        (("def main(cfg, run):", "def start(cfg, run):"), "there is no function main"),
        (("def main(cfg, run):\n    return", "def main(cfg):\n    run = None\n    return"), "main takes no run"),
    ],
)
def test_what_is_missing_in_a_recipe_is_named(
    recipe: Callable[..., ModuleType], exchange: tuple[str, str], message: str
) -> None:
    with pytest.raises(ContractBroken, match=message):
        check_recipe(recipe(exchange))


def test_a_setting_counts_as_read_under_any_name_of_the_config(recipe: Callable[..., ModuleType]) -> None:
    """By its annotation; a read of another object's attribute of the same name does not count."""
    check_recipe(recipe(("def train(cfg, state, run):\n", "def train(cfg, state, run):\n    helper(cfg)\n"),
                        ("class State:", "def helper(c: Config) -> int:\n    return c.depth\n\n\nclass State:"),
                        ("    rate: float = 0.1\n", "    rate: float = 0.1\n    depth: int = 1\n")))  # fmt: skip
    with pytest.raises(ContractBroken, match=r"no line reads cfg\.x"):
        check_recipe(recipe(("    rate: float = 0.1\n", "    rate: float = 0.1\n    x: int = 1\n")))


# -- a recipe's runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        (
            ('"loss": float(loss)', '"loss": float(loss) + torch.seed() % 9973'),
            "a second run with the same seed differs in loss",
        ),
        (("        self.x = tensors", "        self.y = tensors"), "a run broken off and resumed differs in"),
        (
            ("loss = sum(part.square().sum()", "loss = sum(part.square().mean()"),
            "loss of step 0 is .* with micro_tokens=1",
        ),
        (('"val/x"', '"Value of X"'), "'Value of X' is no metric's name"),
        (("steps: int = 5", "steps: int = 2"), "logged 2 steps; build a run of at least 3"),
        (("run.log(step, {", "run.log(step + 1, {"), "line 0 of metrics.jsonl is not step 0"),
        ((", setting=SETTING", ""), "its SETTING is rl, step 0 was taken inside None"),
        (("setting=SETTING", 'setting="imitation"'), "its SETTING is rl, step 0 was taken inside imitation"),
    ],
)
def test_a_run_that_does_not_follow_from_its_seed_is_caught(
    recipe: Callable[..., ModuleType], exchange: tuple[str, str], message: str, tmp_path: Path
) -> None:
    module = recipe(exchange)
    with pytest.raises(ContractBroken, match=message):
        check_recipe_run(module, build(module), tmp_path / "runs")


def test_chance_from_elsewhere_is_caught(recipe: Callable[..., ModuleType], tmp_path: Path) -> None:
    """A generator of its own, seeded alike in every run, is not put back on resume."""
    module = recipe(
        ("        self.x = torch.ones(3)\n", "        self.x = torch.ones(3)\n        self.rng = torch.Generator()\n"),
        ("generator=run.rng", "generator=state.rng"),
    )
    with pytest.raises(ContractBroken, match="broken off and resumed differs in loss"):
        check_recipe_run(module, build(module), tmp_path / "runs")


def test_the_global_random_stream_is_put_back_too(recipe: Callable[..., ModuleType], tmp_path: Path) -> None:
    module = recipe(("torch.randn(3, generator=run.rng)", "torch.randn(3)"))
    check_recipe_run(module, build(module), tmp_path / "runs")


# -- rewards ----------------------------------------------------------------------------------------------------------------


@dataclass
class Judge:
    """A reward made of a function of the batch."""

    function: Callable[[Batch], Any]
    name: str = "judge"

    def __call__(self, batch: Batch) -> Any:
        return self.function(batch)


def length(batch: Batch) -> Tensor:
    return batch.action.sum(1).float()


def yes(batch: Batch) -> Tensor:
    return torch.ones(len(batch), dtype=torch.bool)


def test_a_good_reward_is_left_alone() -> None:
    b = responses(6, 0.5, 0)
    assert torch.equal(check_reward(liking(), b).value, liking()(b).value)
    check_reward(Judge(lambda b: Score(length(b), yes(b), torch.where(b.action, 1.0, 0.0))), b)
    check_reward(liking_reward_model(), b)
    check_reward(Judge(lambda b: Score(torch.where(b.ended, length(b), 0.0), b.ended)), b)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda b: length(b), "gave Tensor; a reward gives a Score"),
        (lambda b: Score(length(b)[:-1], yes(b)[:-1]), r"values of shape \(5,\) for 6 rows"),
        (lambda b: Score(length(b), torch.zeros(len(b), dtype=torch.bool)), "a value without a verdict"),
        (lambda b: Score(length(b) - length(b).mean(), yes(b)), "with the row alone: a score is of its own row"),
        (lambda b: Score(torch.arange(len(b)).float(), yes(b)), "with its rows in another order"),
        (lambda b: Score(torch.rand(len(b)), yes(b)), "asked a second time"),
        (
            lambda b: Score(torch.full_like(length(b), b.tokens.shape[1]), yes(b), torch.ones(b.tokens.shape)),
            "token rewards for tokens that nobody chose",
        ),
        (
            lambda b: Score(length(b), yes(b), steps=torch.ones(b.tokens.shape)),
            "step rewards for tokens that nobody chose",
        ),
        (
            lambda b: Score(length(b), yes(b), torch.where(b.action, float("nan"), 0.0)),
            "token rewards that are not finite",
        ),
        (lambda b: Score(2 + 0 * length(b), yes(b), torch.ones(len(b), 2)), r"token rewards of shape \(6, 2\)"),
    ],
)
def test_what_a_reward_breaks_is_named(function: Callable[[Batch], Any], message: str) -> None:
    with pytest.raises(ContractBroken, match=message):
        check_reward(Judge(function), responses(6, 0.5, 0))


def test_a_reward_needs_a_name() -> None:
    with pytest.raises(ContractBroken, match="has no `name`"):
        check_reward(Judge(lambda b: Score(length(b), yes(b)), name=""), responses(3, 0.5, 0))


# -- losses -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slope() -> nn.Parameter:
    return nn.Parameter(torch.tensor(2.0))


def test_a_good_loss_is_left_alone(slope: nn.Parameter) -> None:
    b = ragged()
    advantage = torch.where(b.action, torch.randn(b.tokens.shape), 0.0)

    def loss(part: Batch, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return slope * advantage, {"advantage": advantage}

    check_loss(loss, b, weights.per_token(b.action), advantage=advantage)
    check_loss(lambda part: (slope * length(part), {}), b, weights.per_row(len(b)))


def test_the_loss_of_a_real_policy_and_of_a_real_reward_model_is_left_alone() -> None:
    trained, reward, b = policy().twin("all"), liking_reward_model(), responses(5, 0.5, 0)
    logp_old = trained.evaluate(b)["logp"].detach()

    def ppo(part: Batch, logp_old: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, clipped = policy_loss.ppo_clip(trained.evaluate(part)["logp"], logp_old, part.action.float())
        return loss, {"clipped": clipped.float()}

    def bradley_terry(part: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        return preference.bradley_terry(reward.last(part.chosen), reward.last(part.rejected)), {}

    check_loss(ppo, b, weights.per_token(b.action), logp_old=logp_old)
    check_loss(bradley_terry, Pairs(b, responses(5, 0.1, 1), torch.zeros(5)), weights.per_row(5))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, x, part: (s * x).mean(), r"the loss has shape \(\), its weight \(6, .*\): do not reduce it"),
        (lambda s, x, part: s * x.sum(1), r"the loss has shape \(6,\)"),
        (lambda s, x, part: s * (x - x.mean()), "changes by .* with the rows beside them"),
        (lambda s, x, part: s * x / len(part), "changes by .* with the rows beside them"),
        (lambda s, x, part: s * x / (x != 0).float(), r"is not finite on rows"),
        (lambda s, x, part: x, "carries no gradient"),
    ],
)
def test_what_a_loss_breaks_is_named(
    slope: nn.Parameter, function: Callable[[Tensor, Tensor, Batch], Tensor], message: str
) -> None:
    b = ragged()
    x = torch.where(b.action, torch.arange(b.tokens.numel()).view(b.tokens.shape).float(), 0.0)
    x[0][b.action[0]] = 0.0
    with pytest.raises(ContractBroken, match=message):
        check_loss(lambda part, x: (function(slope, x, part), {}), b, weights.per_token(b.action), x=x)


def test_a_reduced_metric_is_named(slope: nn.Parameter) -> None:
    b = ragged()
    with pytest.raises(ContractBroken, match=r"clipped has shape \(\)"):
        check_loss(lambda part: (slope * length(part), {"clipped": slope}), b, weights.per_row(len(b)))
