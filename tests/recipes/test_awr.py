"""Advantage-weighted regression: its weights by hand and by enumeration, and that it beats plain cloning of one log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import batch
from tiny_offline import build_awr, log, scored_at_first
from tiny_recipes import liked_share, policy, task
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import awr
from tokenmdp.run import Run
from tokenmdp.testing.exact import Exact, TabularPolicy
from tokenmdp.types import Batch

EVERY = torch.ones(4, dtype=torch.bool)


def run_awr(
    folder: Path, data: tuple[Batch, Tensor] | None = None, **changes: Any
) -> tuple[Policy, dict[str, float], list[dict[str, float]]]:
    cfg, (start, *own) = build_awr(**changes)
    with Run.open(folder, config={}, seed=0) as run:
        trained, figures = awr.train(cfg, start, *(data or own), run)
    return trained, figures, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(trained: Policy) -> Tensor:
    b = trained.sample(list(task().train), 2, Sampling(max_new_tokens=5), torch.Generator().manual_seed(5))
    return torch.tensor(liked_share(list(b.texts)))


# -- weights ---------------------------------------------------------------------------------------------------------


def test_the_baseline_is_the_prompts_own_where_it_was_answered_twice() -> None:
    """Scores 1, 3 of one prompt (mean 2), 5 of another (alone: mean of all, 3), and no verdict."""
    logged = batch([([1], [4]), ([1], [5]), ([2], [6]), ([2], [7])])
    score, rows = torch.tensor([1.0, 3.0, 5.0, 0.0]), torch.tensor([True, True, True, False])
    assert awr.advantages(score, logged, rows, "prompt").tolist() == [-1.0, 1.0, 2.0, 0.0]
    assert awr.advantages(score, logged, rows, "mean").tolist() == [-2.0, 0.0, 2.0, 0.0]


def test_the_exponential_weights_by_hand() -> None:
    """Advantages ±1 have deviation 1: with β = 0.5, e² and e⁻², divided by their mean; ω_max = 3 cuts e² to 3."""
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    omega, clipped = awr.exponential(advantage, EVERY, 0.5, 20.0)
    mean = (math.e**2 + math.e**-2) / 2
    assert omega.tolist() == pytest.approx([math.e**2 / mean, math.e**-2 / mean] * 2)
    assert not clipped.any()
    omega, clipped = awr.exponential(advantage, EVERY, 0.5, 3.0)
    assert float(omega[0] / omega[1]) == pytest.approx(3 / math.e**-2)
    assert clipped.tolist() == [True, False] * 2
    assert float(omega.mean()) == pytest.approx(1)


def test_a_row_without_a_verdict_weighs_nothing() -> None:
    rows = torch.tensor([True, True, True, False])
    omega, _ = awr.exponential(torch.tensor([1.0, -1.0, 0.0, 0.0]), rows, 0.5, 20.0)
    assert float(omega[3]) == 0
    assert float(omega.sum()) == pytest.approx(3)
    assert awr.top(torch.tensor([1.0, -1.0, 0.0, 5.0]), rows, 0.3).tolist() == [3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("advantage", "keep", "kept"),
    [
        ([4.0, 1.0, 3.0, 2.0], 0.5, [0, 2]),
        ([4.0, 1.0, 3.0, 2.0], 0.01, [0]),
        ([3.0, 3.0, 3.0, 2.0], 0.25, [0, 1, 2]),
        ([1.0, 0.0, 0.0, 0.0], 0.75, [0]),
    ],
    ids=["half", "at least one", "ties with the last kept", "but not with the worst"],
)
def test_the_top_share(advantage: list[float], keep: float, kept: list[int]) -> None:
    found = awr.top(torch.tensor(advantage), EVERY, keep)
    assert found.nonzero()[:, 0].tolist() == kept
    assert float(found.mean()) == pytest.approx(1)


def test_the_weighted_log_is_the_best_policy_near_the_logs_own() -> None:
    """On all responses of a toy: μ(τ) ω(τ) = μ(τ) exp(score/β) / Z, which is the optimum of E[score] − β KL(π ‖ μ)."""
    world = Exact((0,), 3, 3, eos=2)
    p = world.probability(TabularPolicy(3, 3, torch.Generator().manual_seed(0)).evaluate(world.batch)["logp"]).detach()
    score = world.score(lambda r: r.count(1) - 0.5 * len(r))
    rows = torch.ones(len(world), dtype=torch.bool)
    advantage = awr.advantages(score, world.batch, rows, "prompt")
    omega, _ = awr.exponential(advantage, rows, 0.7, 1e9)
    beta = 0.7 * float(advantage.square().mean().sqrt())
    optimum, _ = world.optimum(
        TabularPolicy(3, 3, torch.Generator().manual_seed(0)).evaluate(world.batch)["logp"], score, beta
    )
    assert torch.allclose(p * omega / (p * omega).sum(), optimum.detach(), atol=1e-12)


# -- learning --------------------------------------------------------------------------------------------------------


def test_it_learns_more_from_a_log_than_cloning_it(tmp_path: Path) -> None:
    """The log has a third of the liked words, the start a twelfth. β = 100 is plain cloning."""
    settings = {"steps": 30, "rows": 16, "micro_tokens": 800}
    data = log(200)
    found = {}
    for name, changes in {"cloned": {"beta": 100.0}, "weighted": {}, "filtered": awr.VARIANTS["filtered-bc"]}.items():
        trained, figures, _ = run_awr(tmp_path / name, data, **{**settings, **changes})
        found[name] = float(scores(trained).mean())
        if name == "cloned":
            assert figures["effective_share"] > 0.99
            assert figures["score_weighted"] == pytest.approx(figures["score_logged"], abs=0.01)
        else:
            assert figures["effective_share"] < 0.5
            assert figures["score_weighted"] > figures["score_logged"] + 0.2
    assert float(scores(policy()).mean()) + 0.05 < found["cloned"]
    assert found["weighted"] > found["cloned"] + 0.1
    assert found["filtered"] > found["cloned"] + 0.1


def test_the_start_is_left_as_it_was(tmp_path: Path) -> None:
    cfg, (start, logged, score) = build_awr()
    before = start.fingerprint()
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        awr.train(cfg, start, logged, score, run)
    assert start.fingerprint() == before


# -- what cannot be used ---------------------------------------------------------------------------------------------


def test_scores_that_are_missing_are_counted_and_leave_the_loss(tmp_path: Path) -> None:
    """Half the log has no score: the policy is the one learned when those rows hold something else."""
    logged, score = log(20)
    other, _ = log(20, share=0.9, seed=99)
    missing = torch.arange(20) % 2 == 1
    score = torch.where(missing, torch.nan, score)
    rows = [i if not missing[i] else 20 + i for i in range(20)]
    changed = Batch.concat([logged, other]).select(rows)
    settings = {"steps": 3, "rows": 20, "weighting": "exponential", "baseline": "mean", "micro_tokens": 4000}
    a, _, lines = run_awr(tmp_path / "a", (logged, score), **settings)
    b, _, _ = run_awr(tmp_path / "b", (changed, score), **settings)
    assert [line["no_verdict"] for line in lines] == [10.0] * 3
    with torch.no_grad():
        assert torch.allclose(a.evaluate(logged)["logp"], b.evaluate(logged)["logp"], atol=1e-5)


def test_a_step_without_a_score_is_skipped_and_counted(tmp_path: Path) -> None:
    """Adam's momentum of the step before does not carry the policy on."""
    data = scored_at_first(200, 6, tmp_path / "draws")
    one, *_ = run_awr(tmp_path / "one", data, steps=1, rows=6)
    three, *_, lines = run_awr(tmp_path / "three", data, steps=3, rows=6)
    assert one.fingerprint() == three.fingerprint() != policy().fingerprint()
    assert [line["skipped_updates"] for line in lines] == [0.0, 1.0, 1.0]
    assert [line["no_verdict"] for line in lines] == [0.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("score", "changes", "word"),
    [
        (torch.full((60,), 0.5), {}, "nothing to prefer"),
        (torch.full((60,), torch.nan), {}, "nothing to prefer"),
        (torch.zeros(59), {}, "59"),
        (None, {"beta": 0.0}, "beta=0.0"),
        (None, {"clip": 0.0}, "clip=0.0"),
        (None, {"weighting": "top", "keep": 1.0}, "keep is 1.0"),
        (None, {"weighting": "linear"}, "'linear'"),
        (None, {"baseline": "none"}, "'none'"),
    ],
)
def test_what_it_cannot_learn_from_is_named(
    score: Tensor | None, changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    logged, own = log()
    with pytest.raises(ValueError, match=word):
        run_awr(tmp_path / "run", (logged, own if score is None else score), **changes)
