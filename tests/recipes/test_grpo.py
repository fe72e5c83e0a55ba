"""GRPO and its family: every member learns, staleness, dynamic sampling, length, and what is skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_policy_gradient import build_grpo
from tiny_recipes import LIKED, liked_share, liking, policy, task
from tokenmdp import gate
from tokenmdp.functional import returns
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.models.target import Target
from tokenmdp.recipes import grpo
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.types import Batch, Score

PLAIN = {"steps": 3, "sync": 1, "dynamic_sampling": 0, "overlong": 0, "minibatches": 1}
LEARNING = {
    **PLAIN,
    "steps": 6,
    "prompts": 10,
    "samples": 4,
    "learning_rate": 1.5e-2,
    "minibatches": 2,
    "micro_tokens": 800,
}


def train(folder: Path, reward: Any = None, **changes: Any) -> tuple[Policy, Policy, list[dict[str, float]]]:
    """The trained policy, its reference, and the metrics of a small run."""
    cfg, (reference, usual, prompts) = build_grpo(**changes)
    with Run.open(folder, config={}, seed=0) as run:
        trained, _ = grpo.train(cfg, reference, reward or usual, prompts, run)
    return trained, reference, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(trained: Policy) -> torch.Tensor:
    prompts = [*task().held_out, *task().train[:15]]
    b = trained.sample(prompts, 4, Sampling(max_new_tokens=5), torch.Generator().manual_seed(5))
    return torch.tensor(liked_share(list(b.texts)))


@pytest.mark.parametrize(
    "changes",
    [{}, *({**preset, "overlong": 0} for preset in grpo.VARIANTS.values()), {"scale": "batch", "sync": 2, "epochs": 2}],
    ids=["grpo", *grpo.VARIANTS, "stale"],
)
def test_it_improves_the_score_beyond_chance(changes: dict[str, Any], tmp_path: Path) -> None:
    trained, reference, lines = train(tmp_path / "run", **{**LEARNING, **changes})
    before, after = scores(reference), scores(trained)
    error = float((before.var() / len(before) + after.var() / len(after)).sqrt())
    assert float(after.mean() - before.mean()) > 4 * error
    assert lines[0]["objective/kl"] == 0, "the policy starts as the reference"
    assert max(line["policy/clipfrac_avg"] for line in lines) <= 1


def test_the_first_update_of_a_phase_has_ratio_1_under_every_weight(tmp_path: Path) -> None:
    for weight in grpo.WEIGHTS:
        _, _, lines = train(tmp_path / weight, **PLAIN, weight=weight)
        for line in lines:
            assert line["val/ratio"] == pytest.approx(1, abs=1e-4)
            assert line["policy/approxkl_avg"] == pytest.approx(0, abs=1e-6)
            assert line["policy/clipfrac_avg"] == 0


@pytest.mark.parametrize("part", ["all", "lora-2"])
def test_a_sampler_refreshed_every_third_phase_is_up_to_two_phases_old(part: str, tmp_path: Path) -> None:
    """One update a phase: the ratio is 1 after a refresh and moves on from there."""
    _, _, lines = train(
        tmp_path / "run", **{**PLAIN, "steps": 6, "sync": 3, "learning_rate": 1e-2, "kl": 0.0}, train=part
    )
    apart = [line["policy/approxkl_avg"] for line in lines]
    assert [a < 1e-6 for a in apart] == [True, False, False] * 2
    assert apart[2] > apart[1]
    # the rollout is the sampler's own: its log-probabilities are known to it
    assert max(line["sampling/sampling_logp_difference/max"] for line in lines) < 1e-4


def test_without_a_clip_nothing_is_clipped(tmp_path: Path) -> None:
    far = {**PLAIN, "minibatches": 2, "epochs": 3, "learning_rate": 3e-2, "kl": 0.0}
    clipped = {c: train(tmp_path / str(c), **{**far, "clip": c})[2] for c in (0.0, 0.2)}
    assert not any(line["policy/clipfrac_avg"] for line in clipped[0.0])
    assert any(line["policy/clipfrac_avg"] > 0 for line in clipped[0.2])


def test_scaled_by_the_group_the_unit_of_the_score_does_not_matter(tmp_path: Path) -> None:
    """64 times the score, bit for bit the same policy: a power of two rounds nothing."""
    large = FunctionReward(lambda completions, **_: [64 * s for s in liked_share(completions)], name="large")
    for scale, same in (("group", True), ("batch", True), ("none", False)):
        both = [
            train(tmp_path / scale / str(r), r, **{**PLAIN, "steps": 2}, kl=0.0, scale=scale)[2] for r in (None, large)
        ]
        assert ([x["grad_norm"] for x in both[0]] == [x["grad_norm"] for x in both[1]]) == same


@pytest.mark.parametrize("estimator", grpo.ESTIMATORS)
def test_a_heavy_penalty_in_the_loss_keeps_it_at_the_reference(estimator: str, tmp_path: Path) -> None:
    moved = {}
    for beta in (0.0, 5.0):
        settings = {**LEARNING, "kl": beta, "kl_estimator": estimator, "prompts": 8, "minibatches": 4, "steps": 4}
        trained, reference, lines = train(tmp_path / str(beta), **settings)
        b = trained.sample(list(task().train), 2, Sampling(max_new_tokens=5), torch.Generator().manual_seed(1))
        moved[beta] = float(trained.kl_to(reference, b).sum(1).mean())
        assert lines[-1]["loss/kl_avg"] > 0
    assert moved[5.0] < 0.5 * moved[0.0]


# -- groups that do not vary, long responses -----------------------------------------------------------------------------


def by_parity(completions: list[str], prompts: list[str], **_: Any) -> list[float]:
    """Prompts that begin with an odd word are judged by length, the others are all the same."""
    odd = [int(p.split()[0].removeprefix("w")) % 2 for p in prompts]
    return [o * len(c.split()) / 5 for o, c in zip(odd, completions, strict=True)]


def test_groups_that_do_not_vary_are_drawn_anew_and_leave_the_update(tmp_path: Path) -> None:
    cfg, (reference, _, prompts) = build_grpo(**{**PLAIN, "prompts": 8, "samples": 6, "dynamic_sampling": 12})
    reward = FunctionReward(by_parity, name="by_parity")
    sampling = Sampling(max_new_tokens=5)
    with Run.open(tmp_path / "a", config={}, seed=0) as run:
        b, score, redrawn = grpo.rollout(cfg, reference, sampling, reward, prompts, run)
    varied = returns.spread(score.value, b.group, score.verdict) > 0
    groups = b.group.unique()
    assert 0 < redrawn <= 12 * 8
    assert len(groups) == 8 + redrawn
    assert len(b.group[varied].unique()) == 8, "as many as were asked for vary"
    assert all(len(b.group[b.group == g]) == 6 for g in groups)
    assert torch.equal(score.value, reward(b).value), "scores belong to their rows"

    _, _, lines = train(tmp_path / "run", reward, **{**PLAIN, "steps": 1, "prompts": 4, "dynamic_sampling": 3})
    assert all(line["groups_redrawn"] > 0 and line["frac_reward_zero_std"] > 0.2 for line in lines)
    assert all(line["num_tokens"] > 4 * 3 * line["completions/mean_length"] for line in lines), "all draws are paid for"


@pytest.mark.parametrize("tries", [0, 2])
def test_equal_scores_everywhere_are_skipped_and_counted(tries: int, tmp_path: Path) -> None:
    same = FunctionReward(lambda completions, **_: [0.7] * len(completions), name="same")
    trained, reference, lines = train(tmp_path / "run", same, **{**PLAIN, "dynamic_sampling": tries}, kl=0.0)
    assert trained.fingerprint() == reference.fingerprint()
    for line in lines:
        assert (line["skipped_updates"], line["frac_reward_zero_std"]) == (1.0, 1.0)
        assert line["groups_redrawn"] == 4 * tries


def test_length_near_the_horizon_is_punished(tmp_path: Path) -> None:
    nothing = FunctionReward(lambda completions, **_: [0.0] * len(completions), name="nothing")
    lengths = {}
    for margin in (0, 5):
        trained, _, _ = train(
            tmp_path / str(margin), nothing, **{**LEARNING, "steps": 6, "prompts": 8, "overlong": margin, "kl": 0.0}
        )
        b = trained.sample(list(task().train), 4, Sampling(max_new_tokens=5), torch.Generator().manual_seed(1))
        lengths[margin] = float(b.action.sum(1).float().mean())
    assert lengths[5] < lengths[0] - 0.5


def test_truncated_rows_that_are_masked_teach_nothing(tmp_path: Path) -> None:
    """With one token to say, nearly every response is cut; a phase in which all are is skipped."""
    settings = {**PLAIN, "steps": 6, "prompts": 1, "samples": 3, "max_new_tokens": 1, "mask_truncated": True, "kl": 1.0}
    _, _, lines = train(tmp_path / "run", **settings)
    cut = [line["completions/clipped_ratio"] == 1 for line in lines]
    assert any(cut)
    assert [line["skipped_updates"] == 1 for line in lines] == cut


class ByToken:
    """A reward a token, whose sum is the value."""

    name = "per_token"

    def __call__(self, batch: Batch) -> Score:
        token = torch.where(batch.action & (batch.tokens == LIKED), 0.2, 0.0)
        return Score(token.sum(1), torch.ones(len(batch), dtype=torch.bool), token)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_rewards_a_token_are_used_where_they_are_given(scale: str, tmp_path: Path) -> None:
    trained, reference, _ = train(tmp_path / "run", ByToken(), **{**LEARNING, "scale": scale, "dynamic_sampling": 1})
    assert float(scores(trained).mean()) > float(scores(reference).mean()) + 0.1


def test_rows_without_a_verdict_are_counted(tmp_path: Path) -> None:
    def some(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i % 3 == 0 else share for i, share in enumerate(liked_share(completions))]

    reward = FunctionReward(some, name="some", max_missing=1.0)
    _, _, lines = train(tmp_path / "run", reward, **PLAIN)
    assert [line["no_verdict"] for line in lines] == [4.0] * 3
    none = FunctionReward(lambda completions, **_: [None] * len(completions), name="none", max_missing=1.0)
    trained, reference, lines = train(tmp_path / "none", none, **PLAIN)
    assert trained.fingerprint() == reference.fingerprint()
    assert [line["skipped_updates"] for line in lines] == [1.0] * 3


def test_the_reference_never_changes(tmp_path: Path) -> None:
    for sync in (1, 2):
        _, reference, _ = train(tmp_path / str(sync), liking(), **{**PLAIN, "sync": sync})
        assert reference.fingerprint() == policy().fingerprint()


def test_a_stale_sampler_is_measured_when_it_was_refreshed(tmp_path: Path) -> None:
    """Of six phases two apart, the first and the third; and what it is measured against is the learner."""
    train(tmp_path / "run", liking(), **{**PLAIN, "sync": 2, "steps": 6})
    found = [json.loads(line) for line in (tmp_path / "run" / "gate.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [0, 1]
    assert all(line["ratio_first_update"] == pytest.approx(1, abs=1e-4) for line in found)
    assert found[1]["sampler_learner_mean_difference"] < 1e-4


def test_a_sampler_that_is_not_refreshed_when_it_is_due_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "follow", lambda self, rate: None)
    with pytest.raises(gate.NotOnePolicy, match="stale weights"):
        train(tmp_path / "run", liking(), **{**LEARNING, "sync": 2, "steps": 6, "learning_rate": 0.1})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples": 1}, "samples=1: a group of one"),
        ({"loss": "ppo"}, "loss is 'ppo'"),
        ({"scale": "std"}, "scale is 'std'"),
        ({"weight": "mean"}, "weight is 'mean'"),
        ({"kl_estimator": "k1"}, "kl_estimator is 'k1'"),
        ({"kl": -0.1}, "kl=-0.1"),
        ({"clip": -0.2}, "clip=-0.2"),
        ({"clip": 0.0, "clip_high": 0.3}, "give both, or neither"),
        ({"sync": 0}, "sync=0"),
        ({"overlong": 99}, "overlong=99"),
        ({"temperature": 0.0}, "temperature=0"),
    ],
)
def test_settings_outside_their_range(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        grpo.Config(**changes)


@pytest.mark.parametrize("name", grpo.VARIANTS)
def test_the_variants_are_settings_of_it(name: str) -> None:
    assert grpo.Config(**grpo.VARIANTS[name]).kl == 0
