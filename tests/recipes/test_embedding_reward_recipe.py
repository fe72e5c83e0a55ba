"""Reward modelling on frozen embeddings: it learns, its curve rises, the command leaves a reward that loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny_embedding import build_embedding_reward
from tiny_recipes import preferences
from tokenmdp import cli, rewards
from tokenmdp.models import catalog
from tokenmdp.recipes import embedding_reward
from tokenmdp.rewards.embedding_reward import EmbeddingReward
from tokenmdp.run import Run
from tokenmdp.types import Batch, Pairs


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_a_preference_from_more_and_more_pairs(tmp_path: Path):
    cfg, (embedder, _, _) = build_embedding_reward(cache=str(tmp_path / "cache"))
    pairs, held_out = preferences(160), preferences(60, seed=7)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        reward, figures = embedding_reward.train(cfg, embedder, pairs, held_out, run)
    assert figures["accuracy"] > 0.85
    assert [line["pairs"] for line in lines(tmp_path / "run")] == [10, 20, 40, 80]
    right = (reward(held_out.chosen).value > reward(held_out.rejected).value).float().mean()
    assert figures["accuracy"] == pytest.approx(float(right))
    value = reward(Batch.concat([held_out.chosen, held_out.rejected])).value
    assert float(value.mean()) == pytest.approx(0, abs=1e-5)
    [folder] = (tmp_path / "cache").iterdir()
    assert folder.name == embedder.fingerprint()


@pytest.mark.parametrize("head", ["mlp", "boosted"])
def test_other_heads_are_a_setting(tmp_path: Path, head: str):
    cfg, (embedder, _, _) = build_embedding_reward(head=head, objective="classifier", curve=1)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        _, figures = embedding_reward.train(cfg, embedder, preferences(160), preferences(60, seed=7), run)
    assert figures["accuracy"] > 0.8


def test_a_damaged_cache_is_said_and_healed(tmp_path: Path):
    cfg, pieces = build_embedding_reward(cache=str(tmp_path / "cache"), curve=1)
    with Run.open(tmp_path / "one", config={}, seed=0) as run:
        _, first = embedding_reward.train(cfg, *pieces, run=run)
    for part in (tmp_path / "cache").rglob("*.safetensors"):
        part.write_bytes(b"not numbers")
    with Run.open(tmp_path / "two", config={}, seed=0) as run:
        _, second = embedding_reward.train(cfg, *pieces, run=run)
    assert first == second
    assert "damaged part of the cache" in (tmp_path / "two" / "log.txt").read_text()


def test_what_cannot_be_learned_from(tmp_path: Path):
    cfg, (embedder, pairs, held_out) = build_embedding_reward()
    same = Pairs(pairs.chosen, pairs.chosen, torch.zeros(len(pairs)))
    with Run.open(tmp_path / "a", config={}, seed=0) as run, pytest.raises(ValueError, match="the same embedding"):
        embedding_reward.train(cfg, embedder, same, held_out, run)
    with Run.open(tmp_path / "b", config={}, seed=0) as run, pytest.raises(ValueError, match="curve is 0; it must be"):
        embedding_reward.train(replace(cfg, curve=0), embedder, pairs, held_out, run)


def test_the_command_leaves_a_reward_that_loads(tmp_path: Path):
    rows = [
        {"prompt": f"{i}+{j}=", "chosen": str(i + j), "rejected": f"{i}{j}99"} for i in range(1, 7) for j in range(1, 7)
    ]
    rows += [rows[0], {"prompt": "1+1=", "chosen": "2", "rejected": "2"}]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, cache = str(tmp_path / "run"), str(tmp_path / "cache")
    flags = ["--model", "tiny", "--data", str(data), "--cache", cache, "--held-out", "0.3", "--out", out]
    assert cli.main(["embedding-reward", *flags]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["accuracy"] > 0.9
    assert (result["equal_sides"], result["duplicates"], result["repeated_across_split"]) == (1, 1, 0)
    policy = catalog.load("tiny")
    loaded = rewards.load(tmp_path / "run", policy)
    assert isinstance(loaded, EmbeddingReward)
