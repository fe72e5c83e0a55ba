"""The whole path in bfloat16, as it runs where there are matrix units for it: learned, sampled, judged, and finite.

bfloat16 keeps 8 bits of fraction. A row computed beside other rows, or token by token, rounds apart by a few 2⁻⁸ of a
logit, so ratios before the first update are near 1 and not 1, and the sampler's log-probabilities are near the learner's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tiny_recipes import liking, policy, preferences, responses, task
from tokenmdp.models.policy import Policy
from tokenmdp.recipes import dpo, grpo, ppo, reward_model, sft
from tokenmdp.run import Run


def low() -> Policy:
    plain = policy()
    return Policy(plain.model, plain.tokenizer, compute="bfloat16")


@pytest.mark.parametrize("train", ["all", "top-1", "lora-2"])
def test_cloned_rewarded_and_optimised_in_bfloat16(train: str, tmp_path: Path) -> None:
    cfg = sft.Config(steps=20, rows=12, learning_rate=5e-3, warmup=1, evaluate_every=10, train=train)
    with Run.open(tmp_path / "sft", config={}, seed=0) as run:
        cloned, figures = sft.train(cfg, low(), responses(40, 0.5, 1), responses(10, 0.5, 2), run)
    assert figures["held_out_nll"] < figures["held_out_nll_before"]
    start = cloned.freeze()
    with Run.open(tmp_path / "rm", config={}, seed=0) as run:
        fit = reward_model.Config(epochs=4, rows=8, learning_rate=5e-3, head_learning_rate=0.05, train="top-1")
        learned, judged = reward_model.train(fit, start, preferences(40), preferences(20, seed=7), run)
    assert float(str(judged["accuracy"])) > 0.7
    online = {"steps": 4, "prompts": 6, "samples": 4, "max_new_tokens": 5, "learning_rate": 3e-3, "train": train}
    with Run.open(tmp_path / "ppo", config={}, seed=0) as run:
        trained, _ = ppo.train(ppo.Config(**online), start, learned.critic("head"), learned, task(), run)
    gate = json.loads((tmp_path / "ppo/gate.jsonl").read_text().splitlines()[0])
    assert gate["compute"] == "bfloat16"
    assert gate["ratio_first_update"] == pytest.approx(1, abs=0.02)
    assert gate["sampler_learner_max_difference"] < 0.1
    with Run.open(tmp_path / "grpo", config={}, seed=0) as run:
        grpo.train(grpo.Config(**online), start, liking(), task(), run)
    with Run.open(tmp_path / "dpo", config={}, seed=0) as run:
        dpo.train(dpo.Config(steps=3, rows=6, train=train), start, preferences(20), run)
    assert all(bool(torch.isfinite(p).all()) for p in trained.model.parameters())
