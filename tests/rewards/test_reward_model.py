"""The learned reward: read at the last real token by position, the same on disk, in other tools and as a critic."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tiny_models import EOS, VOCABULARY, batch, prompt, ragged, tiny
from tokenmdp.functional import preference, weights
from tokenmdp.learner import Learner
from tokenmdp.models.policy import Policy
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.types import Batch, Pairs


@pytest.fixture(params=["llama", "gpt2"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return tiny(request.param)


def trained(policy: Policy, train: str = "all", pool: str = "last") -> RewardModel:
    """A reward model whose head, which starts at zero, has been given numbers."""
    reward = RewardModel.from_policy(policy, train, pool=pool)
    with torch.no_grad():
        reward.head.weight.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(0))
    return reward


@pytest.fixture
def reward(policy: Policy) -> RewardModel:
    return trained(policy)


def prefixes(b: Batch) -> dict[tuple[int, int], Batch]:
    """The state before each action, as a batch of one row."""
    return {(i, t): batch([(b.tokens[i, :t].tolist(), [])]) for i, t in b.action.nonzero().tolist()}


# -- where the score is read
# ------------------------------------------------------------------------------------------------


def test_the_score_is_read_at_the_last_real_token(reward: RewardModel) -> None:
    """Against each row alone, unpadded; half of the rows end in EOS, which is the padding too."""
    b = ragged()
    found = reward(b)
    assert bool(found.verdict.all())
    for i, length in enumerate(b.length.tolist()):
        alone = reward.backbone.hidden(b.tokens[i : i + 1, :length])[0, -1]
        want = (reward.head.weight[0] @ alone).item()
        assert found.value[i].item() == pytest.approx(want, abs=1e-5)


def test_an_ended_response_is_scored_with_its_end(reward: RewardModel) -> None:
    """The same words with and without EOS are two responses; reading by `ids != pad` would score them alike."""
    b = batch([([3, 4], [5, 6, EOS]), ([3, 4], [5, 6])])
    ended, cut = reward(b).value.tolist()
    assert ended != pytest.approx(cut, abs=1e-3)


def test_padding_is_never_read(reward: RewardModel) -> None:
    b = ragged()
    wide = dataclasses.replace(
        b,
        tokens=nn.functional.pad(torch.where(b.real, b.tokens, torch.full_like(b.tokens, 9)), (0, 7), value=11),
        action=nn.functional.pad(b.action, (0, 7)),
    )
    assert torch.allclose(reward(wide).value, reward(b).value, atol=1e-5)


def test_micro_batches_do_not_change_a_score(reward: RewardModel) -> None:
    b = ragged(9)
    alone = torch.cat([reward(b.select([i])).value for i in range(len(b))])
    assert torch.allclose(reward(b).value, alone, atol=1e-5)


def test_it_starts_indifferent(policy: Policy) -> None:
    assert torch.equal(RewardModel.from_policy(policy, "all")(ragged()).value, torch.zeros(6))


# -- training
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["all", "top-1", "lora-2", "head"])
def test_training_it_leaves_the_policy_alone(policy: Policy, train: str) -> None:
    b = ragged()
    before, fingerprint = policy.evaluate(b)["logp"], policy.fingerprint()
    reward = trained(policy, train)
    scores = reward(b).value
    learner = Learner(reward, 1e-2)
    pairs = Pairs(b.select([0, 1, 2]), b.select([3, 4, 5]), torch.zeros(3))
    learner.step(
        lambda part: (preference.bradley_terry(reward.last(part.chosen), reward.last(part.rejected)), {}),
        pairs,
        weights.per_row(3),
    )
    assert not torch.equal(reward(b).value, scores)
    assert policy.fingerprint() == fingerprint
    assert torch.equal(policy.evaluate(b)["logp"], before)
    names = [name for name, _ in reward.trained()]
    assert any("score" in name for name in names)
    assert (len(names) > 1) == (train != "head")
    theirs, ours = (dict(m.named_parameters()) for m in (policy.backbone.body, reward.backbone.body))
    shared = [n for n in theirs if n in ours and ours[n].data_ptr() == theirs[n].data_ptr()]
    assert bool(shared) == (train != "all")


def test_normalised_scores_have_mean_0_and_variance_1(reward: RewardModel) -> None:
    b = ragged(20)
    raw = reward(b).value
    reward.normalise(b)
    value = reward(b).value
    assert float(value.mean()) == pytest.approx(0, abs=1e-5)
    assert float(value.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(value * reward.scale + reward.shift, raw, atol=1e-4)
    reward.normalise(b)  # a second time changes nothing
    assert torch.allclose(reward(b).value, value, atol=1e-5)


def test_scores_without_spread_are_not_blown_up(policy: Policy) -> None:
    indifferent = RewardModel.from_policy(policy, "head")
    indifferent.normalise(ragged())
    assert torch.equal(indifferent(ragged()).value, torch.zeros(6))


# -- the critic that starts from it
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("train", ["head", "all"])
def test_the_critic_starts_as_the_reward_of_every_prefix(policy: Policy, pool: str, train: str) -> None:
    reward, b = trained(policy, pool=pool), ragged(4)
    reward.normalise(b)
    critic = reward.critic(train)
    value = critic.value(critic.states(b), b)
    for (i, t), state in prefixes(b).items():
        assert value[i, t].item() == pytest.approx(reward(state).value.item(), abs=2e-4)


def test_training_the_critic_leaves_the_reward_alone(reward: RewardModel) -> None:
    b = ragged()
    critic, before = reward.critic("all"), reward(b).value
    learner = Learner(critic, 1e-2)
    learner.step(lambda part: (critic.value(critic.states(part), part).square(), {}), b, b.action.float())
    assert torch.equal(reward(b).value, before)


def test_the_critic_of_a_reward_model_with_adapters_starts_from_them(policy: Policy) -> None:
    reward, b = trained(policy, "lora-2"), ragged(3)
    with torch.no_grad():
        for name, weight in reward.trained():
            if "lora_B" in name:
                weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    want = reward(b).value
    critic = reward.critic("lora-2")
    assert torch.allclose(reward(b).value, want, atol=1e-4)
    value = critic.value(critic.states(b), b)
    for (i, t), state in prefixes(b).items():
        assert value[i, t].item() == pytest.approx(reward(state).value.item(), abs=1e-4)


# -- on disk
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("train", ["all", "lora-2"])
def test_it_is_read_back_as_it_was(policy: Policy, train: str, pool: str, tmp_path: Path) -> None:
    b = ragged(12)
    reward = trained(policy, train, pool)
    reward.normalise(b)
    reward.save(tmp_path / "rm")
    loaded = RewardModel.load(tmp_path / "rm", policy, compute="float32")
    assert loaded.name == "rm"
    assert (loaded.shift, loaded.scale, loaded.pool) == (reward.shift, reward.scale, pool)
    assert torch.allclose(loaded(b).value, reward(b).value, atol=1e-5)
    assert list(loaded.trained()) == []


@pytest.mark.parametrize("padded", [True, False])
def test_other_tools_read_the_same_raw_score(padded: bool, tmp_path: Path) -> None:
    """They find the last token by its identity. Where the tokenizer has no other token to pad with than the one that responses
    end in, they read rows that ended one token early.
    """
    policy = tiny(vocabulary=VOCABULARY + 1)
    if padded:
        policy.tokenizer.pad_token = f"w{VOCABULARY}"  # which no row holds
    reward = trained(policy)
    b = ragged(12)
    reward.normalise(b)
    reward.save(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    padding = AutoTokenizer.from_pretrained(tmp_path).pad_token_id
    assert model.config.num_labels == 1
    assert padding == model.config.pad_token_id == (VOCABULARY if padded else EOS)
    assert 0 < int(b.ended.sum()) < len(b)
    with torch.no_grad():
        raw = model(input_ids=torch.where(b.real, b.tokens, padding)).logits[:, 0]
    same = torch.isclose((raw - reward.shift) / reward.scale, reward(b).value, atol=1e-5)
    assert same.tolist() == ([True] * len(b) if padded else (~b.ended).tolist())


def test_a_classifier_of_several_labels_is_no_reward_model(policy: Policy, tmp_path: Path) -> None:
    config = policy.model.config
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 3 labels; a reward model has one"):
        RewardModel.load(tmp_path, policy)


def test_a_reward_model_of_another_tokenizer_is_refused(reward: RewardModel, tmp_path: Path) -> None:
    reward.save(tmp_path)
    with pytest.raises(ValueError, match="have different tokenizers"):
        RewardModel.load(tmp_path, tiny("llama", vocabulary=59))


def test_a_model_without_a_linear_score_is_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match="no linear `score` or `classifier` layer"):
        RewardModel(policy.backbone, policy.tokenizer)


def test_its_score_is_of_tokens_not_of_text(reward: RewardModel) -> None:
    b = Batch.build([prompt(3, 4)] * 2, [[5, 6]] * 2, texts=["something", "something else"], ended=[False] * 2)
    first, second = reward(b).value.tolist()
    assert first == pytest.approx(second, abs=1e-5)
