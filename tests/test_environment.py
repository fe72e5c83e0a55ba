"""The Gymnasium face: its states are concatenations, its scores those of the task, and Gymnasium finds no fault with it."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenmdp import tasks
from tokenmdp.mdp import OutOfSetting, within
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Score

gymnasium = pytest.importorskip("gymnasium")
from gymnasium.utils import env_checker  # noqa: E402

from tokenmdp.environment import TokenEnv  # noqa: E402

H = 4  # what the longest sum and its end take


class Silent:
    """No verdict on anything."""

    name = "silent"

    def __call__(self, batch: Batch) -> Score:
        return Score.of(torch.full((len(batch),), torch.nan))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return catalog.load("tiny").freeze()


@pytest.fixture(scope="module")
def task(policy: Policy) -> Task:
    return tasks.load("addition", policy)  # prompts of several lengths


def env(policy: Policy, task: Task, **options: Any) -> TokenEnv:
    return TokenEnv(policy, task, **{"max_new_tokens": H, **options})


def test_gymnasium_finds_no_fault_with_it(policy: Policy, task: Task) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # It is not made by `gymnasium.make`, so the checker has no spec to make a second one of.
        warnings.filterwarnings("ignore", message=".*spec.*")
        env_checker.check_env(env(policy, task, render_mode="ansi"), skip_render_check=True)


def test_a_state_is_its_prompt_and_the_actions_and_the_end_is_paid(policy: Policy, task: Task) -> None:
    world = env(policy, task)
    V, draw = world.mdp.vocabulary, np.random.default_rng(0)
    assert len({len(p.ids) for p in task.train}) > 1
    for episode in range(300):
        seen, info = world.reset(seed=episode)
        prompt, actions, done = task.train[info["prompt"]], [], False
        while not done:
            want = [*[V] * (task.longest - len(prompt.ids)), *prompt.ids, *actions, *[V] * (H - len(actions))]
            assert seen.tolist() == want
            assert world.observation_space.contains(seen)
            actions.append(int(draw.choice([draw.integers(V), policy.eos_ids[0]], p=[0.8, 0.2])))
            seen, earned, done, truncated, info = world.step(np.int64(actions[-1]))
            ended = actions[-1] in policy.eos_ids
            assert done == (ended or len(actions) == H)
            assert not truncated
            assert done or (earned, info) == (0.0, {})
        assert info["ended"] == ended


def test_a_response_earns_what_the_task_says_of_it(policy: Policy, task: Task) -> None:
    world, reward = env(policy, task), task.reward
    assert reward is not None
    whole = task.demonstrations
    assert whole is not None
    sampled = policy.sample(task.train[:8], 4, Sampling(H), torch.Generator().manual_seed(0))
    right = 0.0
    for b in (sampled, whole.select(range(8))):
        said = reward(b)
        for i, prompt in enumerate(b.prompts):
            world.reset(options={"prompt": [p.ids for p in task.train].index(prompt.ids)})
            for token in b.tokens[i][b.action[i]].tolist():
                _, earned, done, _, info = world.step(np.int64(token))
            assert done
            assert (earned, info["score"]) == (float(said.value[i]), said.at(i))
            assert (info["text"], info["ended"]) == (b.texts[i], bool(b.ended[i]))
            right += earned
    assert right >= 8  # the demonstrations


def test_an_episode_may_begin_inside_a_response(policy: Policy, task: Task) -> None:
    world = env(policy, task, render_mode="ansi")
    assert world.render() is None
    start, _ = world.reset(options={"prompt": 2})
    middle, _, _, _, _ = world.step(np.int64(7))
    again, info = world.reset(options={"prompt": 2, "response": [7]})
    assert again.tolist() == middle.tolist() != start.tolist()
    assert info == {"prompt": 2}
    assert world.render() == policy.decode([*task.train[2].ids, 7])
    done = [world.step(np.int64(token))[2] for token in (5, 6, 5)]
    assert done == [False, False, True]


def test_the_seed_decides_the_prompts(policy: Policy, task: Task) -> None:
    world = env(policy, task)

    def drawn(seed: int) -> list[int]:
        first = world.reset(seed=seed)[1]["prompt"]
        return [first, *(world.reset()[1]["prompt"] for _ in range(9))]

    assert drawn(3) == drawn(3) != drawn(4)


def test_a_missing_verdict_is_no_zero(policy: Policy, task: Task) -> None:
    end = np.int64(policy.eos_ids[0])
    world = env(policy, task, reward=Silent())
    world.reset(seed=0)
    with pytest.raises(ValueError, match=r"silent gave no verdict .*missing=0\.0"):
        world.step(end)
    with pytest.raises(ValueError, match="gave no verdict"):  # and so again: the step was not taken
        world.step(end)
    world = env(policy, task, reward=Silent(), missing=-1.0)
    world.reset(seed=0)
    _, earned, done, _, info = world.step(end)
    assert (earned, done, info["score"]) == (-1.0, True, None)


def test_a_function_of_the_users_judges(policy: Policy, task: Task) -> None:
    world = env(
        policy, task, reward=FunctionReward(lambda completions: [float(len(c)) for c in completions], "letters")
    )
    world.reset(seed=0)
    a = np.int64(policy.encode("1")[0])
    assert [world.step(a)[1] for _ in range(H)] == [0.0, 0.0, 0.0, 4.0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": 1}, "there is no option 'prompts'"),
        ({"prompt": 10_000}, "prompt 10000 of "),
        ({"prompt": 1.5}, r"'prompt' is 1\.5: give a whole number"),
        ({"prompt": True}, "'prompt' is True"),
        ({"response": None}, "'response' is None: give the tokens"),
        ({"response": "ab"}, "'response' is 'ab'"),
        ({"response": [1.5]}, r"a token of 'response' is 1\.5"),
        ({"prompt": 0, "response": [1] * H}, "response of 4 tokens that is over"),
        ({"prompt": 0, "response": [1] * (H + 1)}, "horizon is 4"),
        ({"prompt": 0, "response": [-1]}, "outside the vocabulary"),
    ],
)
def test_states_that_cannot_be(policy: Policy, task: Task, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        env(policy, task).reset(options=options)


def test_what_cannot_be_built_or_stepped(policy: Policy, task: Task) -> None:
    with pytest.raises(ValueError, match="before the first reset"):
        env(policy, task).step(np.int64(1))
    with pytest.raises(ValueError, match="exceeds the context"):
        env(policy, task, max_new_tokens=policy.context)
    with pytest.raises(ValueError, match="knows no true reward"):
        env(policy, Task("bare", task.train))
    with pytest.raises(ValueError, match="holds no prompts out"):
        env(policy, Task("bare", task.train, reward=task.reward), held_out=True)
    for wrong in (float("nan"), "x"):
        with pytest.raises(ValueError, match="missing is"):
            env(policy, task, missing=wrong)
    world = env(policy, task)
    world.reset(seed=0)
    with pytest.raises(ValueError, match=r"the action is 1\.7"):
        world.step(1.7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'ansi'"):
        env(policy, task, render_mode="human")
    world = env(policy, task)
    world.reset(seed=0)
    world.step(np.int64(policy.eos_ids[0]))
    with pytest.raises(ValueError, match="absorbing"):
        world.step(np.int64(1))
    with within("offline_imitation"), pytest.raises(OutOfSetting):
        world.reset()


def test_the_bench_judges_a_model_by_what_its_actions_earn(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    bench = importlib.import_module("environment")
    try:
        assert bench.share(["ab", "ba", "a", ""], ["ab"] * 4) == [1.0, 0.0, 0.5, 0.0]
        assert bench.constant(["ab", "ac", "bc"]) == pytest.approx((0.5 + 1 + 0.5) / 3)  # it says `ac`
        copying = tasks.load("copying", policy, length=2, letters=3)
        world = TokenEnv(policy, copying, 2, FunctionReward(bench.share))

        class Copies:
            """Says the letters that are asked for."""

            def predict(self, seen: Any, deterministic: bool) -> tuple[np.int64, None]:
                return seen[0] if seen[3] == world.mdp.vocabulary else seen[1], None

        assert bench.judged(Copies(), world).tolist() == [1.0] * 9
    finally:
        for name in ("environment", "common"):
            sys.modules.pop(name, None)
