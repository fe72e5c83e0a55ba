"""The closed form: a difference of log-probabilities, of one vocabulary, a token at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_models import batch, ragged, tiny
from tokenmdp import mdp, rewards
from tokenmdp.functional import preference
from tokenmdp.rewards.log_ratio import LogRatio
from tokenmdp.testing import contracts

WORDS = 12


def test_it_is_a_reward_and_the_difference_of_log_probabilities() -> None:
    cloned, start = (tiny(vocabulary=WORDS, seed=seed) for seed in (1, 0))
    b = ragged(5, vocabulary=WORDS)
    score = contracts.check_reward(LogRatio(cloned, start), b)
    ours, theirs = (p.evaluate(b)["logp"].detach() for p in (cloned, start))
    assert torch.allclose(score.token, ours - theirs, atol=1e-6)
    assert torch.allclose(score.value, preference.implicit_reward(ours.sum(-1), theirs.sum(-1), 1.0), atol=1e-5)
    assert bool(score.verdict.all())


def test_by_hand_and_zero_against_itself() -> None:
    """A model whose weights are 0 says each of V words with probability 1/V; its ratio to itself is 0."""
    start = tiny(vocabulary=WORDS)
    with torch.no_grad():
        for weight in start.model.parameters():
            weight.zero_()
    b = batch([([1], [2, 3, 0])])
    assert LogRatio(start, start)(b).value.tolist() == [0.0]
    cloned = tiny(vocabulary=WORDS, seed=1)
    logp = float(cloned.evaluate(b)["logp"].detach().sum())
    assert LogRatio(cloned, start)(b).at(0) == pytest.approx(logp + 3 * torch.tensor(float(WORDS)).log().item())


def test_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="different tokenizers"):
        LogRatio(tiny(vocabulary=WORDS), tiny(vocabulary=WORDS + 1))


def test_it_is_loaded_by_its_name(tmp_path: Path) -> None:
    cloned, start, judged = (tiny(vocabulary=WORDS, seed=seed) for seed in (1, 0, 2))
    cloned.save(tmp_path / "sft")
    start.save(tmp_path / "init")
    b = ragged(4, vocabulary=WORDS)
    whole = rewards.load(f"log_ratio:{tmp_path / 'sft'},{tmp_path / 'init'}", judged)
    assert torch.allclose(whole(b).value, LogRatio(cloned, start)(b).value, atol=1e-5)
    half = rewards.load(f"log_ratio:{tmp_path / 'sft'}", judged)
    assert torch.allclose(half(b).value, LogRatio(cloned, judged)(b).value, atol=1e-5)
    assert half.name == "log_ratio:sft"
    doubled = rewards.load(f"2*log_ratio:{tmp_path / 'sft'}", judged)
    assert torch.allclose(doubled(b).value, 2 * half(b).value, atol=1e-4)
    with pytest.raises(ValueError, match="names 3 models"):
        rewards.load("log_ratio:a,b,c", judged)
    with pytest.raises(ValueError, match="different tokenizers"):
        rewards.load(f"log_ratio:{tmp_path / 'sft'}", tiny(vocabulary=WORDS + 1))


def test_it_is_a_learned_reward() -> None:
    policy = tiny(vocabulary=WORDS)
    with mdp.within("imitation"), pytest.raises(mdp.OutOfSetting, match="learned reward"):
        LogRatio(policy, policy)(ragged(2, vocabulary=WORDS))
