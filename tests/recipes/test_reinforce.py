"""REINFORCE: every baseline learns, what it pays for, and what it does where nothing can be learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_policy_gradient import build_reinforce
from tiny_recipes import liked_share, liking, task
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import reinforce
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.types import Batch, Score

LEARNING = {
    "steps": 8,
    "prompts": 16,
    "samples": 4,
    "learning_rate": 1e-2,
    "kl": 0.01,
    "entropy": 0.0,
    "micro_tokens": 800,
}


def train(folder: Path, reward: Any = None, **changes: Any) -> tuple[Policy, Policy, list[dict[str, float]]]:
    """The trained policy, its reference, and the metrics of a small run."""
    cfg, (reference, usual, prompts) = build_reinforce(**changes)
    with Run.open(folder, config={}, seed=0) as run:
        trained, _ = reinforce.train(cfg, reference, reward or usual, prompts, run)
    return trained, reference, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(trained: Policy) -> torch.Tensor:
    prompts = [*task().held_out, *task().train[:15]]
    b = trained.sample(prompts, 4, Sampling(max_new_tokens=5), torch.Generator().manual_seed(5))
    return torch.tensor(liked_share(list(b.texts)))


@pytest.mark.parametrize("baseline", reinforce.BASELINES)
def test_it_improves_the_score_beyond_chance(baseline: str, tmp_path: Path) -> None:
    trained, reference, lines = train(tmp_path / "run", baseline=baseline, **LEARNING)
    before, after = scores(reference), scores(trained)
    error = float((before.var() / len(before) + after.var() / len(after)).sqrt())
    assert float(after.mean() - before.mean()) > 4 * error
    assert lines[0]["objective/kl"] == 0, "the policy starts as the reference"
    assert lines[-1]["objective/kl"] > 0.05


@pytest.mark.parametrize("baseline", ["batch", "leave_one_out", "greedy"])
def test_a_constant_added_to_the_score_changes_nothing(baseline: str, tmp_path: Path) -> None:
    """That is what a baseline is for; the metrics agree to rounding."""
    shifted = FunctionReward(lambda completions, **_: [s + 8 for s in liked_share(completions)], name="shifted")
    plain, moved = (train(tmp_path / n, r, baseline=baseline)[2] for n, r in (("plain", None), ("moved", shifted)))
    for a, b in zip(plain, moved, strict=True):
        assert b["objective/scores"] == pytest.approx(a["objective/scores"] + 8, abs=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)


def test_truncation_and_the_gold_score_are_heard(tmp_path: Path) -> None:
    cfg, (reference, reward, prompts) = build_reinforce(truncation=2.0, entropy=0.0, credit="uniform", steps=1)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        reinforce.train(cfg, reference, reward, prompts, run, gold=liking())
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["objective/gold"] == pytest.approx(line["objective/scores"])
    # in the first phase the KL is 0
    paid = line["objective/scores"] - 2 * line["completions/clipped_ratio"]
    assert line["objective/rlhf_reward"] == pytest.approx(paid, abs=1e-6)
    assert line["completions/clipped_ratio"] > 0


def test_a_heavy_penalty_keeps_it_at_the_reference(tmp_path: Path) -> None:
    moved = {}
    for beta in (0.0, 3.0):
        trained, reference, _ = train(tmp_path / str(beta), **{**LEARNING, "kl": beta})
        b = trained.sample(list(task().train), 2, Sampling(max_new_tokens=5), torch.Generator().manual_seed(1))
        moved[beta] = float(trained.kl_to(reference, b).sum(1).mean())
    assert moved[3.0] < 0.4 * moved[0.0]


def test_an_entropy_bonus_alone_makes_responses_less_likely(tmp_path: Path) -> None:
    """The bonus is the entropy of whole responses: they also become longer."""
    nothing = FunctionReward(lambda completions, **_: [0.0] * len(completions), name="nothing")
    trained, reference, lines = train(tmp_path / "run", nothing, **{**LEARNING, "kl": 0.0, "entropy": 0.5})
    assert not any(line["skipped_updates"] for line in lines)
    surprise = []
    for model in (reference, trained):
        b = model.sample(list(task().train), 4, Sampling(max_new_tokens=5), torch.Generator().manual_seed(1))
        assert b.logp_mu is not None
        surprise.append(-float(b.logp_mu.sum(1).mean()))
    assert surprise[1] > surprise[0] + 0.3


# -- where nothing can be learned ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["batch", "leave_one_out", "greedy"])
def test_equal_scores_are_skipped_and_counted(baseline: str, tmp_path: Path) -> None:
    same = FunctionReward(lambda completions, **_: [0.7] * len(completions), name="same")
    trained, reference, lines = train(tmp_path / "run", same, baseline=baseline, kl=0.0, entropy=0.0)
    assert trained.fingerprint() == reference.fingerprint()
    grouped = 1.0 if baseline == "leave_one_out" else None  # elsewhere there are no groups to be equal in
    assert [(x["skipped_updates"], x.get("frac_reward_zero_std")) for x in lines] == [(1.0, grouped)] * 3


def test_rows_without_a_verdict_are_counted_and_leave_the_baseline(tmp_path: Path) -> None:
    """A row a prompt is judged: alone in its group it teaches nothing."""

    def second(completions: list[str], **_: Any) -> list[float | None]:
        return [share if i % 2 else None for i, share in enumerate(liked_share(completions))]

    half = FunctionReward(second, name="half", max_missing=1.0)
    trained, reference, lines = train(tmp_path / "run", half)
    assert [line["no_verdict"] for line in lines] == [4.0] * 3
    assert trained.fingerprint() == reference.fingerprint()


class SomeGreedyFail:
    """No verdict on the first greedy response, which is known by there being one a prompt."""

    name = "some_greedy_fail"

    def __call__(self, batch: Batch) -> Score:
        found = liking()(batch)
        greedy = len(batch) == len(set(batch.group.tolist()))
        verdict = torch.tensor([not (greedy and i == 0) for i in range(len(batch))])
        return Score(torch.where(verdict, found.value, 0.0), verdict)


def test_a_prompt_whose_greedy_response_has_no_verdict_is_left_out(tmp_path: Path) -> None:
    _, _, lines = train(tmp_path / "run", SomeGreedyFail(), baseline="greedy")
    assert [line["no_verdict"] for line in lines] == [2.0] * 3
    for line in lines:  # the greedy responses are tokens too
        assert line["num_tokens"] == 8 * line["completions/mean_length"]
        assert line["num_tokens_credit"] >= 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"baseline": "loo"}, "baseline is 'loo'"),
        ({"baseline": "leave_one_out", "samples": 1}, "samples=1"),
        ({"baseline": "batch", "prompts": 1, "samples": 1}, "each alone"),
        ({"kl": -0.1}, "kl=-0.1"),
        ({"entropy": -1.0}, "entropy=-1"),
        ({"temperature": 0.0}, "temperature is 0"),
    ],
)
def test_settings_outside_their_range(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        reinforce.Config(**changes)


@pytest.mark.parametrize("name", reinforce.VARIANTS)
def test_the_variants_are_settings_of_it(name: str) -> None:
    assert reinforce.Config(**reinforce.VARIANTS[name]).baseline == {"rloo": "leave_one_out", "remax": "greedy"}[name]
