"""Reward from demonstrations: what it learns, how it stands beside its closed form, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_inverse import H, build_demo_reward, sides
from tiny_recipes import policy, responses
from tokenmdp.functional import imitation, preference, weights
from tokenmdp.learner import Learner
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import demo_reward
from tokenmdp.rewards.log_ratio import LogRatio
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run
from tokenmdp.tasks import data
from tokenmdp.types import Batch, Pairs


def opened(folder: Path) -> Run:
    return Run.open(folder, config={}, seed=0)


def test_the_best_classifier_and_the_best_pairwise_reward_are_the_log_ratio() -> None:
    """Three responses, demonstrated with chances (½, ⅓, ⅙) and said by the start with (¼, ¼, ½): the expected losses
    have gradient 0 at log(2), log(4/3) and log(1/3), Bradley-Terry's also after adding a number to all."""
    p, q = torch.tensor([[1 / 2, 1 / 3, 1 / 6], [1 / 4, 1 / 4, 1 / 2]], dtype=torch.float64)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    chance = p[pairs[:, 0]] * q[pairs[:, 1]]
    for name, shift in (("classifier", 0.0), ("bradley_terry", 0.0), ("bradley_terry", 1.7)):
        r = (p.log() - q.log() + shift).requires_grad_()
        loss = (chance * demo_reward.OBJECTIVES[name](r[pairs[:, 0]], r[pairs[:, 1]])).sum()
        (slope,) = torch.autograd.grad(loss, r)
        assert float(slope.abs().max()) < 1e-12, name
    assert (p / q).tolist() == pytest.approx([2, 4 / 3, 1 / 3])


@pytest.mark.parametrize("objective", ["classifier", "bradley_terry"])
def test_it_finds_what_the_demonstrator_says(objective: str, tmp_path: Path) -> None:
    cfg, (start, pairs, held_out) = build_demo_reward(epochs=6, objective=objective, head_learning_rate=2e-2)
    with opened(tmp_path / "run") as run:
        reward, figures = demo_reward.train(cfg, start, pairs, held_out, run)
    liked, other = responses(20, 1.0, 31), responses(20, 0.0, 32)
    gap = reward(liked).value.mean() - reward(other).value.mean()
    assert float(gap) > 0.5
    assert figures["n_pairs"] == 10
    assert (reward.shift, reward.scale) == (0.0, 1.0), "its unit stays nats"
    assert "closed_spearman" not in figures


def test_it_stands_beside_the_closed_form(tmp_path: Path) -> None:
    """The demonstrator is a policy, so the closed form is exact; with enough of its samples the ranks agree."""
    cfg, (start, *_) = build_demo_reward(epochs=3, rows=32, head_learning_rate=2e-2, micro_tokens=4096)
    cloned = clone(policy(), responses(64, 0.8, 9))
    rng, sampling = torch.Generator().manual_seed(0), Sampling(max_new_tokens=H)

    def drawn(count: int) -> Pairs:
        prompts = responses(count, 0.5, 11).prompts
        return Pairs(*(p.sample(prompts, 1, sampling, rng) for p in (cloned, start)), torch.zeros(count))

    learned, kept = drawn(160), drawn(60)
    with opened(tmp_path / "run") as run:
        _, figures = demo_reward.train(cfg, start, learned, kept, run, LogRatio(cloned, start))
    low, high = figures["closed_spearman_ci"]
    assert 0.3 < low < figures["closed_spearman"] < high
    assert figures["accuracy"] > 0.6
    assert figures["closed_accuracy"] > 0.6


def clone(start: Any, shown: Batch) -> Any:
    trained = start.twin("all")
    learner = Learner(trained, 1e-2)
    for _ in range(12):
        learner.step(
            lambda part: (imitation.nll(trained.evaluate(part)["logp"]), {}), shown, weights.per_token(shown.action)
        )
    return trained.freeze()


def test_equal_sides_are_counted_and_only_equal_ones_refused(tmp_path: Path) -> None:
    cfg, (start, pairs, held_out) = build_demo_reward(epochs=1)
    with opened(tmp_path / "run") as run, pytest.raises(ValueError, match="nothing to tell apart"):
        demo_reward.train(cfg, start, Pairs(pairs.chosen, pairs.chosen, pairs.margin), held_out, run)
    some = Batch.concat([pairs.chosen.select(range(3)), pairs.rejected.select(range(3, len(pairs)))])
    assert int(data.alike(Pairs(pairs.chosen, some, pairs.margin)).sum()) == 3
    with opened(tmp_path / "again") as run:
        demo_reward.train(cfg, start, Pairs(pairs.chosen, some, pairs.margin), held_out, run)
    assert "3 of 24 demonstrations equal" in (tmp_path / "again" / "log.txt").read_text()


def test_both_sides_of_a_prompt_are_one_cluster() -> None:
    """Copies of the pairs, whose prompts they share, are no new evidence of how score and closed form agree."""
    pairs = sides(20, 3)
    copies = [i for i in range(20) for _ in range(4)]
    often = Pairs(pairs.chosen.select(copies), pairs.rejected.select(copies), pairs.margin[copies])
    reward, closed = (
        RewardModel.from_policy(policy(), "head"),
        LogRatio(clone(policy(), responses(32, 0.8, 9)), policy()),
    )
    with torch.no_grad():
        reward.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    once, repeated = (demo_reward.judge(reward, p, closed) for p in (pairs, often))
    ends = [found["accuracy_ci"][1] - found["accuracy_ci"][0] for found in (once, repeated)]
    assert ends[1] > 0.9 * ends[0], "eighty independent trials would have half the width"
    assert repeated["closed_spearman"] == pytest.approx(once["closed_spearman"], abs=1e-3)
    assert repeated["closed_spearman_ci"] == pytest.approx(once["closed_spearman_ci"], abs=1e-3)


def test_a_reward_that_says_nothing_has_accuracy_one_half() -> None:
    figures = demo_reward.judge(RewardModel.from_policy(policy(), "head"), sides(12, 3))
    assert figures["accuracy"] == 0.5
    assert figures["ece"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("setting", "value"), [("objective", "margin"), ("epochs", 0), ("rows", 0), ("centring", -1.0), ("from_sft", True)]
)
def test_a_setting_outside_its_range_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{setting}.*{value}"):
        build_demo_reward(**{setting: value})


def test_the_verb_runs_on_a_file(tmp_path: Path) -> None:
    """The whole way: a start and a clone on disk, demonstrations in a file, samples, the reward and its figures."""
    start = policy()
    start.save(tmp_path / "start")
    clone(policy(), responses(32, 0.8, 9)).save(tmp_path / "sft")
    rows = [{"prompt": f"w{1 + i % 11} w2", "completion": f" w3 w3 w{1 + i % 7}"} for i in range(40)]
    (tmp_path / "shown.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    base = demo_reward.Config(
        model=str(tmp_path / "start"), data=str(tmp_path / "shown.jsonl"), sft=str(tmp_path / "sft"), rows=16,
        max_new_tokens=H, held_out=0.3,
    )  # fmt: skip
    for name, cfg in (("data", base), ("sft-samples", replace(base, from_sft=True))):
        with Run.open(tmp_path / name, config={}, seed=0) as run:
            figures = demo_reward.main(cfg, run)
        assert -1 <= figures["closed_spearman"] <= 1
        assert (tmp_path / name / "model" / "config.json").is_file()


def test_no_demonstrations_are_refused(tmp_path: Path) -> None:
    policy().save(tmp_path / "start")
    (tmp_path / "none.jsonl").write_text("")
    cfg = demo_reward.Config(model=str(tmp_path / "start"), data=str(tmp_path / "none.jsonl"))
    with Run.open(tmp_path / "run", config={}, seed=0) as run, pytest.raises(ValueError, match=r"no rows|empty|has no"):
        demo_reward.main(cfg, run)


def test_its_gradient_is_that_of_both_losses_by_hand() -> None:
    """At r = 0 for both sides the classifier's slope is −½ ∙ ½ at the demonstration, +½ ∙ ½ at the sample."""
    zero = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    slopes = torch.autograd.grad(preference.both_sides(*zero).sum(), zero)
    assert [float(s) for s in slopes] == [-0.25, 0.25]
