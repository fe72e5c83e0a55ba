"""Tasks of the reasoning-gym package by name; what needs the package is left out where it is not installed."""

from __future__ import annotations

import sys

import pytest

from tokenmdp import rewards, tasks
from tokenmdp.models.policy import Policy
from tokenmdp.models.tiny import tiny
from tokenmdp.rewards import gym
from tokenmdp.rewards.function import RewardFailure
from tokenmdp.tasks import Task
from tokenmdp.tasks.reasoning_gym import GymReward
from tokenmdp.types import Batch, Prompt


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny()


@pytest.fixture(scope="module")
def arithmetic(policy: Policy) -> Task:
    pytest.importorskip("reasoning_gym")
    return tasks.load("reasoning_gym:basic_arithmetic", policy, count=40, held_out=10, settings={"max_digits": 1})


@pytest.fixture(scope="module")
def countdown(policy: Policy) -> Task:
    pytest.importorskip("reasoning_gym")
    return tasks.load("reasoning_gym:countdown", policy, count=4, held_out=1)


def said(prompts: list[Prompt], texts: list[str]) -> Batch:
    return Batch.build(prompts, [[1]] * len(prompts), texts=texts, ended=[True] * len(prompts))


def test_without_the_package_the_error_names_the_extra(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    gym.dataset.cache_clear()
    with pytest.raises(ImportError, match=r"pip install \"tokenmdp\[tasks\]\""):
        tasks.load("reasoning_gym:basic_arithmetic", policy)


def test_a_task_by_name_with_its_own_scorer(policy: Policy, arithmetic: Task):
    task = arithmetic
    assert (task.name, len(task.held_out)) == ("basic_arithmetic", 10)
    questions = [str(p.columns["gym_question"]) for p in (*task.held_out, *task.train)]
    assert len(set(questions)) == len(questions) == task.facts["questions"]
    assert task.reward is not None
    assert task.demonstrations is not None
    assert bool((task.reward(task.demonstrations.select(range(8))).value == 1).all())

    p = task.train[0]
    answer = str(p.columns["answer"])
    texts = [
        f" {answer}\n",
        f"<think>{answer}</think>{answer}",
        f"so <answer> {answer} </answer> it is",
        f"it is {answer}9",
        f"<think>{answer}",
        "",
        "no idea",
    ]
    score = task.reward(said([p] * len(texts), texts))
    assert score.value.tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert bool(score.verdict.all())

    again = tasks.load("reasoning_gym:basic_arithmetic", policy, count=40, held_out=10, settings={"max_digits": 1})
    assert again.train == task.train
    assert isinstance(rewards.load("reasoning_gym:basic_arithmetic", policy), type(task.reward))


def test_a_wrong_answer_that_earns_a_little_is_wrong_and_one_that_hangs_loses_its_own_verdict_only(countdown: Task):
    p, reward = countdown.train[0], GymReward(timeout_seconds=3.0)
    # The scorer gives 0.05 for an expression that uses other numbers or misses the target.
    assert 0 < gym.score("1 + 1", dict(p.columns["gym"]), str(p.columns["gym_question"])) < gym.RIGHT
    right = str(p.columns["answer"])
    # ... and computes what it reads.
    score = reward(said([p] * 4, [right, "9**9**9**9", "1 + 1", right]))
    assert score.verdict.tolist() == [True, False, True, True]
    assert score.value.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert dict(score.reasons) == {1: "no answer within 3 s; its process was killed"}


def test_a_data_set_that_differs_in_the_other_process_gives_no_verdict(arithmetic: Task):
    p = arithmetic.train[0]
    other = Prompt(p.ids, p.text, p.row, {**p.columns, "gym_question": "What is this?"})
    assert arithmetic.reward is not None
    with pytest.raises(RewardFailure, match="PYTHONHASHSEED=0"):
        arithmetic.reward(said([other], ["1"]))


def test_mistakes_are_named(policy: Policy):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="no task 'basic_arithmetik'; did you mean basic_arithmetic"):
        tasks.load("reasoning_gym:basic_arithmetik", policy)
    with pytest.raises(ValueError, match=r"basic_arithmetic does not take {'digits': 1}"):
        tasks.load("reasoning_gym:basic_arithmetic", policy, settings={"digits": 1})
    with pytest.raises(ValueError, match="count is 0"):
        tasks.load("reasoning_gym:basic_arithmetic", policy, count=0)
