"""What a recipe's setting lacks cannot be touched from its loop: the recipes' own loops, with someone who tries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tiny_models import prompt
from tiny_preferences import BUILDERS as PREFERENCES
from tiny_recipes import BUILDERS, liking, liking_reward_model, policy, responses
from tokenmdp import mdp
from tokenmdp.mdp import OutOfSetting
from tokenmdp.models import tree
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import dpo, ppo, sft
from tokenmdp.run import Run
from tokenmdp.tasks import ExactAnswer

SHORT = Sampling(max_new_tokens=3)


class Peeping(Run):
    """A run in which something is tried after the first step, where the step is logged: inside the recipe's loop."""

    attempt: Callable[[], Any]

    def log(self, step: int, metrics: Any, headline: Sequence[str] = ()) -> None:
        super().log(step, metrics, headline)
        self.attempt()


def loop_of(recipe: ModuleType, build: Callable[..., Any], attempt: Callable[[], Any], folder: Path) -> None:
    cfg, pieces = build()
    with Peeping.open(folder, config=asdict(cfg), seed=0) as run:
        assert isinstance(run, Peeping)
        run.attempt = attempt
        recipe.train(cfg, *pieces, run=run)


def sampled() -> Any:
    return policy().sample([prompt(1, 2)], 1, SHORT, torch.Generator())


def branched() -> Any:
    b = responses(1, 0.5, 0)
    return tree.branch(policy(), b, [[2]], 1, Sampling(max_new_tokens=9), torch.Generator())


def judged() -> Any:
    return ExactAnswer()(responses(2, 0.5, 0))


def proxied() -> Any:
    return liking_reward_model()(responses(2, 0.5, 0))


@pytest.mark.parametrize(
    ("recipe", "build", "attempt", "refused"),
    [
        (sft, BUILDERS["sft"], sampled, "acting"),
        (sft, BUILDERS["sft"], branched, "acting"),
        (sft, BUILDERS["sft"], lambda: liking()(responses(2, 0.5, 0)), "asking the true reward"),
        (sft, BUILDERS["sft"], proxied, "asking a learned reward"),
        (dpo, PREFERENCES["dpo"], judged, "asking the true reward"),
        (dpo, PREFERENCES["dpo"], sampled, None),  # preference RL has dynamics ...
        (dpo, PREFERENCES["dpo"], proxied, None),  # ... and a learned reward
        (ppo, BUILDERS["ppo"], proxied, None),  # RLHF's reward is learned
    ],
)
def test_a_recipe_is_held_to_its_setting(
    recipe: ModuleType, build: Callable[..., Any], attempt: Callable[[], Any], refused: str | None, tmp_path: Path
) -> None:
    if refused is None:
        loop_of(recipe, build, attempt, tmp_path / "run")
    else:
        with pytest.raises(OutOfSetting, match=f"{refused}.* is not in the setting {recipe.SETTING}"):
            loop_of(recipe, build, attempt, tmp_path / "run")
        attempt()  # after the loop it is nobody's business
    assert mdp.running() is None


def test_offline_inverse_rl_cannot_call_the_language_model(tmp_path: Path) -> None:
    reward, logged = liking_reward_model(), responses(4, 0.5, 0)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        sampled()  # before the loop

        def learn() -> None:
            for _ in run.steps(3, title="offline inverse RL", setting="offline_inverse_rl"):
                assert len(reward(logged).value) == 4  # what it learns, it may ask
                sampled()

        with pytest.raises(OutOfSetting, match=r"sampling from a policy.* is not in the setting offline_inverse_rl"):
            learn()


def test_the_setting_holds_in_the_body_alone_and_is_left_on_every_way_out(tmp_path: Path) -> None:
    def steps(name: str) -> Any:
        run = Run.open(tmp_path / name, config={}, seed=0)
        return run, run.steps(3, title=name, every_seconds=0.0, setting="imitation")

    run, loop = steps("whole")
    with run:
        assert [mdp.running() for _ in loop] == ["imitation"] * 3
        assert mdp.running() is None
    run, loop = steps("broken off")
    with run:
        for _ in loop:
            assert mdp.running() == "imitation"
            break
        loop.close()  # this name holds the loop: without one, the break itself closes it
        assert mdp.running() is None
    run, _ = steps("unnamed")
    with run:
        for _ in run.steps(3, title="unnamed", setting="imitation"):
            break
        assert mdp.running() is None
    run, _ = steps("raised")

    def fail() -> None:
        for _ in run.steps(3, title="raised", setting="imitation"):
            raise KeyError("in the body")

    with run, pytest.raises(KeyError):
        fail()
    assert mdp.running() is None
    run, _ = steps("unknown")
    with run, pytest.raises(ValueError, match="setting is 'guessing'"):
        next(iter(run.steps(3, title="unknown", setting="guessing")))


def test_without_a_setting_the_loop_holds_to_the_one_around_it(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config={}, seed=0) as run, mdp.within("rl"):
        assert [mdp.running() for _ in run.steps(2, title="inner")] == ["rl", "rl"]
