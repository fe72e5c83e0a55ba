"""The verb from file to page, on rewards whose faults are known, and on input that cannot be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import tiny
from tokenmdp import cli, rewards
from tokenmdp.lab import report, reward_eval, reward_words
from tokenmdp.lab.reward_eval import Config, main
from tokenmdp.models.embedding import OwnBody
from tokenmdp.rewards import embedding_reward
from tokenmdp.rewards.embedding_reward import EmbeddingReward
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run

LIKED = """
def liking(completions, **columns):
    return [text.split().count("w3") / max(1, len(text.split())) for text in completions]

def length(completions, **columns):
    return [float(len(text.split())) for text in completions]

def same(completions, **columns):
    return [1.0] * len(completions)

def silent(completions, **columns):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy's folder, a reward model's on the same body and one on another tokenizer, functions, and data."""
    folder = tmp_path_factory.mktemp("reward_eval")
    policy = tiny()
    policy.save(folder / "policy")
    torch.manual_seed(0)
    for name, body in (("model", policy), ("other", tiny(vocabulary=40))):
        reward = RewardModel.from_policy(body, "head", name=name)
        with torch.no_grad():
            reward.head.weight.normal_(0.0, 0.2)
        reward.save(folder / name)
    (folder / "f.py").write_text(LIKED)
    rows = [
        {
            "prompt": f"w{1 + i % 9} w{10 + i}",
            "chosen": " w3" * (1 + i % 4) + f" w{20 + i}",
            "rejected": f" w{5 + i % 7} w6 w7" + " w3" * (i % 2),
            "subset": ("chat", "hard")[i % 2],
            "margin": 0.5 + 0.1 * i,
        }
        for i in range(24)
    ]
    with gzip.open(folder / "pairs.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in [*rows, rows[0]]))
    (folder / "trained.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:6]))
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{i} w2"}) for i in range(1, 9)))
    return folder


def evaluated(place: Path, out: Path, reward: str, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the verb finds, and what it prints."""
    given = {"data": str(place / "pairs.jsonl.gz"), "max_new_tokens": 4, "probed": 8} | settings
    spec = str(place / reward) if "/" not in reward else reward
    with Run.open(out, given, 0) as run:
        shown = main(Config(reward=spec, **given), run)
    return json.loads((out / "summary.json").read_text()), shown


def test_a_reward_model_is_read_by_its_own_tokenizer_and_all_of_it_is_on_the_page(place: Path, tmp_path: Path) -> None:
    found, shown = evaluated(place, tmp_path / "run", "model", trained_on=str(place / "trained.jsonl"))
    pairs = found["pairs"]
    assert pairs["data"]["pairs"] == 24
    assert pairs["data"]["duplicates"] == 1
    assert pairs["accuracy"]["n"] == 24
    assert set(pairs["subsets"]) == {"chat", "hard"}
    assert pairs["trained_on"]["pairs"] == pairs["trained_on"]["openings"] == 6
    assert pairs["trained_on"]["accuracy_without"]["n"] == 18
    assert pairs["calibration"]["scale"] == "as trained"
    assert "ece_tempered" in pairs["calibration"]
    assert "mean" in pairs["margin_spearman"]
    assert "changes no token" in pairs["probes"]["probes"]["trailing newline"]["absent"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Training has seen 6 of these pairs" in page
    assert "Harmless formatting" in page
    assert report.build(tmp_path / "run").read_text() == page
    assert shown["accuracy"] == pairs["accuracy"]
    assert not pairs["asked_as_chat"], "the tokenizer has no chat template"
    # The same scores as the model gives when a policy reads for it.
    policy = tiny()
    reward = rewards.load(str(place / "model"), policy)
    text = policy.prompt("w1 w10").ids
    assert reward_eval.Reader.of(place / "model").prompt("w1 w10").ids == text
    assert reward.name == "model"


def test_a_reward_on_frozen_embeddings_is_read_by_the_body_it_was_fitted_on(place: Path, tmp_path: Path) -> None:
    body = OwnBody(tiny().freeze(), source=str(place / "policy"))
    states = torch.randn(20, body.width, generator=torch.Generator().manual_seed(0))
    reward = EmbeddingReward(body, embedding_reward.fit(states[:10], states[10:]), name="frozen")
    reward.save(tmp_path / "frozen")
    found, _ = evaluated(place, tmp_path / "run", str(tmp_path / "frozen"), probed=0)
    assert found["reader"] == "policy"
    assert found["pairs"]["accuracy"]["n"] == 24
    assert found["pairs"]["calibration"]["scale"] == "as trained"
    assert "probes" not in found["pairs"]


def test_the_policys_samples_against_gold(place: Path, tmp_path: Path) -> None:
    settings = {"data": "", "policy": str(place / "policy"), "task": str(place / "prompts.jsonl"), "samples": 4}
    gold = f"{place / 'f.py'}:liking"
    found, shown = evaluated(place, tmp_path / "a", f"{place / 'f.py'}:length", gold=gold, chunk=3, **settings)
    samples = found["samples"]
    assert samples["prompts"] >= 6
    assert samples["gold"]["name"] == "liking"
    assert {"same_prompt", "cross_prompt"} <= samples["gold"]["pairs"].keys()
    assert len((tmp_path / "a" / "samples.jsonl").read_text().splitlines()) == 4 * samples["prompts"]
    assert any("score's variance lies between prompts" in line for line in found["verdict"])
    itself, _ = evaluated(place, tmp_path / "b", gold, gold=gold, **settings)
    assert "agrees with itself" in itself["samples"]["gold"]["absent"]
    assert (tmp_path / "b" / "report.html").exists()
    assert "samples, same_prompt" in shown


def test_a_reward_that_counts_words_is_called_so(place: Path, tmp_path: Path) -> None:
    found, _ = evaluated(place, tmp_path / "run", f"{place / 'f.py'}:length", policy=str(place / "policy"))
    words = " ".join(found["verdict"])
    assert "It favours longer responses" in words
    assert "It pays for form" in words
    assert "last sentence twice" in words.partition("It pays for form")[2]
    assert found["pairs"]["calibration"]["scale"].startswith("arbitrary")


def test_a_reward_that_prefers_nothing_is_told_so(place: Path, tmp_path: Path) -> None:
    found, _ = evaluated(place, tmp_path / "run", f"{place / 'f.py'}:same", policy=str(place / "policy"))
    assert found["verdict"][0] == "The reward gives both sides of all 24 pairs the same score: it prefers nothing."
    assert any("No format probes" in line for line in found["verdict"])


def test_a_reward_without_verdicts_cannot_be_evaluated(place: Path, tmp_path: Path) -> None:
    silent = f"{place / 'f.py'}:silent:max_missing=1.0"
    with pytest.raises(ValueError, match="no verdict on both sides of any of 24 pairs"):
        evaluated(place, tmp_path / "run", silent, policy=str(place / "policy"))
    assert "no_verdict.jsonl" in {p.name for p in (tmp_path / "run").iterdir()}
    settings = {"data": "", "policy": str(place / "policy"), "task": str(place / "prompts.jsonl"), "prompts": 2}
    with pytest.raises(ValueError, match="no verdict on any of 16 responses"):
        evaluated(place, tmp_path / "samples", silent, **settings)


def test_one_pair_is_little_and_said_to_be(place: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "w1", "chosen": " w3", "rejected": " w4"}))
    found, _ = evaluated(place, tmp_path / "run", "model", data=str(tmp_path / "one.jsonl"))
    assert found["pairs"]["accuracy"]["n"] == 1
    assert "not significantly better than a coin" in found["verdict"][0]


def test_what_cannot_be_used_is_said(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="different tokenizers"):
        evaluated(place, tmp_path / "a", "other", policy=str(place / "policy"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no rows"):
        evaluated(place, tmp_path / "b", "model", data=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="nothing to evaluate the reward on"):
        Config(data="", task="")
    with pytest.raises(ValueError, match="nobody to answer them"):
        Config(task="sentiment")
    with pytest.raises(ValueError, match="gold=sentiment judges a policy's own samples, and no task"):
        Config(gold="sentiment")
    with pytest.raises(ValueError, match="at least 0"):
        Config(probed=-1)


def test_it_is_a_verb() -> None:
    assert cli.find_verbs()["reward-eval"].help.startswith("What a reward is worth")


def test_words_for_every_outcome() -> None:
    assert reward_words.percents({"absent": "no such pairs", "n": 0}) == "unknown (no such pairs)"
    assert reward_words.numbers({"mean": 0.5, "absent": "one prompt"}) == "+0.50"
    assert reward_words.numbers({"absent": "one prompt"}) == "unknown (one prompt)"
    samples = {"prompts": 4, "samples": 2, "policy": "p", "spread": {"between_share": 0.25}}
    known = "On 4 prompts × 2 samples of p, 25% of the score's variance lies between prompts."
    assert reward_words.verdict({"samples": samples}) == [known]
    once = reward_words.verdict({"samples": {**samples, "samples": 1, "spread": {"between_share": None}}})
    assert once[0].endswith("lies between prompts takes two of each to say.")
