"""PPO under the credit schemes that read or draw: its runs still follow from the seed, and what resets cost is logged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Generator

from tiny_recipes import LIKED, build_ppo, liking_reward_model, policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import ppo
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run
from tokenmdp.testing import contracts


def build(credit: str) -> tuple[ppo.Config, Sequence[Any]]:
    """Under branching the reward is a verifier, under the others a reward model."""
    cfg, (reference, critic, reward, prompts) = build_ppo(credit=credit)
    return cfg, (reference, critic, reward if credit.startswith("branch") else liking_reward_model(), prompts)


@pytest.mark.parametrize("credit", ["attention@0.5", "shaped", "branch:2"])
def test_its_runs_repeat_resume_and_ignore_micro_batches(credit: str, tmp_path: Path) -> None:
    lines = contracts.check_recipe_run(ppo, lambda: build(credit), tmp_path)
    for line in lines:
        # Of each of up to 5 states 2 futures, of 1 token at least and as many as are left at most: 5 + 4 + 3 + 2 + 1
        # for a whole response of 5 tokens.
        besides = line["num_tokens_credit"]
        assert (2 * line["num_tokens"] <= besides <= 2 * 8 * 15) if credit == "branch:2" else besides == 0


def test_a_potential_is_discounted_as_the_returns_are(tmp_path: Path) -> None:
    """One that is the same everywhere says nothing: after whitening the first update is that of the plain score, γ < 1 or not."""
    constant = RewardModel.from_policy(policy(), "head")
    constant.shift = -2.0
    constant.save(tmp_path / "rm")
    norms = []
    for name, credit in (("plain", "last"), ("shaped", f"shaped:{tmp_path / 'rm'}")):
        cfg, pieces = build_ppo(credit=credit, gamma=0.5, lam=1.0, steps=1, minibatches=1)
        with Run.open(tmp_path / name, config={}, seed=0) as run:
            ppo.train(cfg, *pieces, run)
        norms.append(json.loads((tmp_path / name / "metrics.jsonl").read_text())["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_with_values_by_resets_in_the_place_of_a_critic_it_improves_the_score(tmp_path: Path) -> None:
    """λ = 0 and a critic that does not learn: each token is credited with what it did to the Monte-Carlo value."""
    cfg, pieces = build_ppo(
        credit="branch:3", lam=0.0, kl=0.0, kl_target=0.0, steps=12, prompts=8, critic_learning_rate=1e-12
    )
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        trained, _ = ppo.train(cfg, *pieces, run)
    reference, _, reward, prompts = pieces
    before, after = (
        float(
            reward(
                p.sample(list(prompts.train), 4, Sampling(max_new_tokens=5), Generator().manual_seed(1))
            ).value.mean()
        )
        for p in (reference, trained)
    )
    assert after > 2 * before, f"share of w{LIKED}: {before} before, {after} after"
