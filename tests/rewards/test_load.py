from __future__ import annotations

from pathlib import Path

import pytest

from tokenmdp import rewards
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.rewards.classifier import TextClassifier
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.rewards.mixture import Mixture
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.types import Batch

SOURCE = (
    "def length(completions): return [len(c) for c in completions]\ndef one(completions): return [1] * len(completions)"
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return catalog.load("tiny")


@pytest.fixture
def batch(policy: Policy) -> Batch:
    texts = ["2", "19"]
    return Batch.build(
        [policy.prompt("1+1=", 0, {"answer": "2"}), policy.prompt("9+9=", 1, {"answer": "18"})],
        [policy.encode(text) for text in texts],
        texts=texts,
        ended=[True, True],
    )


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return str(path)


def test_a_tasks_true_reward_by_the_tasks_name(policy: Policy, batch: Batch):
    assert rewards.load("addition", policy)(batch).value.tolist() == [1.0, 0.0]


def test_a_function_of_a_file(policy: Policy, batch: Batch, file: str):
    reward = rewards.load(f"{file}:length", policy)
    assert isinstance(reward, FunctionReward)
    assert reward(batch).value.tolist() == [1.0, 2.0]


def test_a_functions_limits(policy: Policy, file: str):
    reward = rewards.load(f"{file}:length:timeout_seconds=2.5,max_missing=0.1", policy)
    assert isinstance(reward, FunctionReward)
    assert (reward.name, reward.timeout_seconds, reward.max_missing) == ("length", 2.5, 0.1)
    with pytest.raises(ValueError, match="no option 'timeout': it has timeout_seconds, max_missing, as name=value"):
        rewards.load(f"{file}:length:timeout=2", policy)


def test_a_mixture_with_weights_and_without(policy: Policy, batch: Batch, file: str):
    reward = rewards.load(f"0.5*{file}:length+1e+1 * addition + {file}:one + -2*{file}:one", policy)
    assert isinstance(reward, Mixture)
    # 0.5·length + 10·right + 1 − 2
    assert reward(batch).value.tolist() == [9.5, 0.0]
    means = {name: float(part.value.mean()) for name, part in reward(batch).parts.items()}
    assert means == {"length": 1.5, "exact_answer": 0.5, "one": 1.0, "one_2": 1.0}
    assert isinstance(rewards.load("2*addition", policy), Mixture)


def test_a_file_whose_path_has_a_plus(policy: Policy, tmp_path: Path):
    folder = tmp_path / "a+b"
    folder.mkdir()
    (folder / "mine.py").write_text(SOURCE)
    assert rewards.load(f"{folder}/mine.py:one", policy).name == "one"


def test_folders_of_a_reward_model_and_of_a_classifier(policy: Policy, batch: Batch, tmp_path: Path):
    model = RewardModel.from_policy(policy, "all")
    model.shift = -0.5  # it starts at zero everywhere; now it says 0.5
    model.save(tmp_path / "model")
    loaded = rewards.load(tmp_path / "model", policy)
    assert isinstance(loaded, RewardModel)
    assert loaded(batch).value.tolist() == [0.5, 0.5]
    TextClassifier.fit(["good film", "bad film"] * 3, [1, 0] * 3).save(tmp_path / "classifier")
    assert isinstance(rewards.load(tmp_path / "classifier", policy), TextClassifier)


def test_what_is_no_reward_is_told_what_could_be(policy: Policy, tmp_path: Path, file: str):
    possible = r"A reward is a task's name \(addition, .*\), the folder of a reward model, path/to/file.py:function, or"
    with pytest.raises(ValueError, match=rf"there is no reward 'sentimant'; did you mean sentiment\? {possible}"):
        rewards.load("sentimant", policy)
    with pytest.raises(ValueError, match=r"there is no reward '' in '0.5\*addition \+'"):
        rewards.load("0.5*addition +", policy)
    with pytest.raises(ValueError, match=r"there is no reward 'x\*addition'"):
        rewards.load("x*addition", policy)
    with pytest.raises(ValueError, match=r"holds neither a reward model \(config.json\) nor a classifier"):
        rewards.load(tmp_path, policy)
    with pytest.raises(ValueError, match=r"mine.py names no function: write .*mine.py:function"):
        rewards.load(file, policy)
    with pytest.raises(ValueError, match=r"there is no file '.*other.py'"):
        rewards.load("other.py:length", policy)
