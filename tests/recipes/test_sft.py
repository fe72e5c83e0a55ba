"""Behaviour cloning: its gradient, that it learns, and what it reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tiny_recipes import LIKED, build_sft, policy, responses
from tokenmdp.functional import imitation, policy_loss, weights
from tokenmdp.learner import Learner
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import sft
from tokenmdp.run import Run


def test_its_gradient_is_the_policy_gradient_with_reward_1_on_the_demonstrations() -> None:
    trained, b = policy().twin("all"), responses(12, 0.8, 3)
    learner, w = Learner(trained, 1.0), weights.per_token(b.action)

    def clone(part: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return imitation.nll(trained.evaluate(part)["logp"]), {}

    def reinforce(part: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logp = trained.evaluate(part)["logp"]
        return policy_loss.reinforce(logp, torch.ones_like(logp)), {}

    found = []
    for loss in (clone, reinforce):
        learner.gradient(loss, b, w)
        found.append({n: p.grad.clone() for n, p in learner.named.items() if p.grad is not None})
        learner.optimiser.zero_grad(set_to_none=True)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize(("train", "weight"), [("all", "per_token"), ("lora-4", "per_sequence")])
def test_the_held_out_loss_falls_and_responses_become_the_demonstrators(
    train: str, weight: str, tmp_path: Path
) -> None:
    cfg, pieces = build_sft(steps=20, rows=12, learning_rate=1e-2, train=train, weight=weight)
    start, _, held_out = pieces
    before = sft.held_out_nll(start, held_out)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        trained, figures = sft.train(cfg, *pieces, run)
    assert figures["held_out_nll_before"] == pytest.approx(before)
    assert figures["held_out_nll"] == pytest.approx(sft.held_out_nll(trained, held_out))
    assert figures["held_out_nll"] < before - 0.5
    assert sft.held_out_nll(start, held_out) == before, "the start is frozen"
    prompts = list(held_out.prompts)
    sampled = trained.sample(prompts, 8, Sampling(max_new_tokens=6), torch.Generator().manual_seed(0))
    assert (
        float((sampled.tokens[sampled.action] == LIKED).float().mean()) > 0.35
    )  # it was 1/12; the demonstrators' is 0.6


def test_the_held_out_loss_is_the_mean_over_tokens() -> None:
    """ln 12 for a policy that knows nothing, whatever the lengths."""
    start, b = policy(), responses(9, 0.5, 5)
    with torch.no_grad():
        for weight in start.model.parameters():
            weight.zero_()
    assert sft.held_out_nll(start, b) == pytest.approx(torch.tensor(12.0).log().item(), rel=1e-5)


def test_it_measures_the_held_out_loss_when_it_says_so(tmp_path: Path) -> None:
    cfg, pieces = build_sft(steps=5, evaluate_every=2)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        sft.train(cfg, *pieces, run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["held_out/nll" in line for line in lines] == [False, True, False, True, True]
    assert lines[0]["learning_rate"] == pytest.approx(cfg.learning_rate)


@pytest.mark.parametrize(("setting", "value"), [("weight", "per_row"), ("steps", -1), ("rows", 0)])
def test_a_setting_outside_its_range_is_refused(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{setting}.*{value}"):
        build_sft(**{setting: value})
