"""The reward on embeddings: its contract, and a folder that says what body it needs and accepts no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tiny_embedding import encoder
from tiny_models import ragged, tiny
from tokenmdp import rewards
from tokenmdp.models.embedding import Embedder, OwnBody
from tokenmdp.models.embedding_cache import Cache, embedded
from tokenmdp.models.policy import Policy
from tokenmdp.rewards.embedding_reward import FILE, HEADS, EmbeddingReward, fit
from tokenmdp.testing import contracts
from tokenmdp.types import Batch


@pytest.fixture
def policy() -> Policy:
    return tiny("llama").freeze()


def made(embedder: Embedder, head: str = "linear") -> EmbeddingReward:
    b = ragged(24, seed=5)
    x = embedded(embedder, b)
    reward = EmbeddingReward(embedder, fit(x[:12], x[12:], head))
    reward.normalise(b)
    return reward


@pytest.mark.parametrize("head", HEADS)
def test_the_contract(policy: Policy, head: str):
    score = contracts.check_reward(made(OwnBody(policy), head), ragged())
    assert bool(score.verdict.all())


def test_scores_are_normalised(policy: Policy):
    value = made(OwnBody(policy))(ragged(24, seed=5)).value
    assert float(value.mean()) == pytest.approx(0, abs=1e-5)
    assert float(value.std(unbiased=False)) == pytest.approx(1, abs=1e-5)


def test_a_cache_changes_no_score(policy: Policy, tmp_path: Path):
    reward, b = made(OwnBody(policy)), ragged()
    plain = reward(b).value
    reward.cache = Cache(tmp_path, reward.embedder)
    assert torch.equal(reward(b).value, plain)
    assert len(reward.cache) == len(b)
    assert torch.equal(reward(b).value, plain)


@pytest.mark.parametrize("head", HEADS)
def test_the_same_from_its_folder_and_from_its_runs(policy: Policy, tmp_path: Path, head: str):
    reward, b = made(OwnBody(policy, "last", "response"), head), ragged()
    reward.save(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text("{}")  # a run's folder has one
    for place in (tmp_path / "run" / "model", tmp_path / "run"):
        loaded = rewards.load(place, policy)
        assert isinstance(loaded, EmbeddingReward)
        torch.testing.assert_close(loaded(b).value, reward(b).value)
    assert {path.name for path in (tmp_path / "run" / "model").iterdir()} == {FILE, "head.safetensors"}


def test_an_encoder_of_a_folder_is_found_again(policy: Policy, tmp_path: Path):
    bert = encoder(kind="encoder", source=str(tmp_path / "bert"))
    bert.model.save_pretrained(tmp_path / "bert")
    bert.tokenizer.save_pretrained(tmp_path / "bert")
    reward = made(bert)
    reward.save(tmp_path / "reward")
    with pytest.raises(ValueError, match="put back the model that was there, or fit the reward again"):
        rewards.load(tmp_path / "reward", policy)  # from a folder it reads more tokens of a text than this one did
    bert.max_tokens, bert._fingerprint = 40, ""
    reward.save(tmp_path / "reward")
    assert torch.allclose(rewards.load(tmp_path / "reward", policy)(ragged()).value, reward(ragged()).value, atol=1e-5)


def test_another_policy_is_judged_by_the_body_it_was_fitted_on(policy: Policy, tmp_path: Path):
    policy.save(tmp_path / "body")
    reward, b = made(OwnBody(policy, source=str(tmp_path / "body"))), ragged()
    reward.save(tmp_path / "reward")
    other = tiny("llama", seed=1).freeze()
    loaded = rewards.load(tmp_path / "reward", other)
    assert torch.allclose(loaded(b).value, reward(b).value, atol=1e-5)
    other.save(tmp_path / "body")  # now something else is there
    with pytest.raises(ValueError, match="put back the model that was there"):
        rewards.load(tmp_path / "reward", other)
    strange = tiny("llama", vocabulary=30).freeze()
    with pytest.raises(ValueError, match="whose tokenizer is not that of"):
        rewards.load(tmp_path / "reward", strange)
    (tmp_path / "body" / "config.json").unlink()
    with pytest.raises(ValueError, match="which cannot be loaded"):
        rewards.load(tmp_path / "reward", other)


@pytest.mark.parametrize("damage", ["head gone", "half a head", "no JSON", "a field gone"])
def test_a_damaged_folder_says_so(policy: Policy, tmp_path: Path, damage: str):
    made(OwnBody(policy)).save(tmp_path)
    words, head = tmp_path / FILE, tmp_path / "head.safetensors"
    if damage == "head gone":
        head.unlink()
    elif damage == "half a head":
        head.write_bytes(head.read_bytes()[:40])
    elif damage == "no JSON":
        words.write_text("{")
    else:
        about = json.loads(words.read_text())
        words.write_text(json.dumps({key: value for key, value in about.items() if key != "scale"}))
    with pytest.raises(ValueError, match=r"there is no whole embedding reward in .* fit it again"):
        rewards.load(tmp_path, policy)


def test_an_empty_response_gets_a_verdict(policy: Policy):
    b = Batch.build([ragged().prompts[0]], [[]], texts=[""], ended=[False])
    assert bool(made(OwnBody(policy, "mean", "response"))(b).verdict.all())
