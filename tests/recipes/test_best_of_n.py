"""Best-of-n: it keeps the best, never what has no verdict, and stays within its divergence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import EOS, tiny
from tiny_recipes import build_best_of_n, liked_share
from tokenmdp.functional import kl
from tokenmdp.recipes import best_of_n
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.testing.exact import Exact


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_best_of_each_group_is_taken() -> None:
    value = torch.tensor([0.1, 0.9, 0.3, -5.0, -7.0, -6.0])
    assert best_of_n.best(value, torch.ones(6, dtype=torch.bool), 3).tolist() == [1, 3]


def test_what_has_no_verdict_loses_to_everything() -> None:
    value = torch.tensor([0.0, -3.0, 0.0, -1.0])
    assert best_of_n.best(value, torch.tensor([False, True, False, True]), 2).tolist() == [1, 3]


def test_the_first_of_equals_is_taken() -> None:
    assert best_of_n.best(torch.ones(6), torch.ones(6, dtype=torch.bool), 3).tolist() == [0, 3]


def test_one_response_is_its_own_best() -> None:
    assert best_of_n.best(torch.randn(5), torch.ones(5, dtype=torch.bool), 1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_its_divergence_is_within_the_bound_by_enumeration(n: int) -> None:
    """All ways to draw n of the 13 responses of a toy, the best kept: KL(best of n ‖ π) ≤ log n − (n − 1)/n."""
    policy = tiny("llama", vocabulary=4)
    policy.model.double()
    world = Exact((1, 2), 4, 2, eos=EOS)
    with torch.no_grad():
        p = world.probability(policy.evaluate(world.batch)["logp"])
    score = world.score(lambda r: 3 * r[0] + (r[1] if len(r) > 1 else 0)).double()
    rows, probability = world.draws(p, n)
    chosen = best_of_n.best(score[rows.reshape(-1)], torch.ones(rows.numel(), dtype=torch.bool), n)
    kept = torch.zeros_like(p).index_add(0, rows.reshape(-1)[chosen], probability)
    divergence = float((kept * (kept / p).log().nan_to_num()).sum())
    assert float(kept.sum()) == pytest.approx(1)
    assert divergence <= kl.best_of_n_kl(n) + 1e-12
    if n > 1:
        assert divergence > 0.3 * kl.best_of_n_kl(n)
        assert float(kept @ score) > float(p @ score)


def test_a_run_keeps_the_best_and_writes_both_arms(tmp_path: Path) -> None:
    cfg, pieces = build_best_of_n(prompts=5, n=6, chunk=2)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        result = best_of_n.train(cfg, *pieces, run)
    samples = lines(tmp_path / "run", "samples.jsonl")
    first = [s for s in samples if s["arm"] == "first"]
    best = [s for s in samples if s["arm"] == "best_of_n"]
    assert [s["row"] for s in first] == [s["row"] for s in best] == [p.row for p in pieces[1]]
    assert all(b["proxy"] >= f["proxy"] for b, f in zip(best, first, strict=True))
    assert all(s["proxy"] == pytest.approx(liked_share([s["text"]])[0]) for s in samples)
    assert result["score_best"] == pytest.approx(sum(s["proxy"] for s in best) / 5)
    assert result["score_best"] > result["score_mean"]
    assert result["kl_bound_nats"] == pytest.approx(math.log(6) - 5 / 6)
    assert len(lines(tmp_path / "run", "metrics.jsonl")) == 3


def test_more_samples_are_better(tmp_path: Path) -> None:
    found = []
    for n in (1, 4, 16):
        cfg, (policy, _, reward) = build_best_of_n(n=n, prompts=20, chunk=20)
        _, (_, prompts, _) = build_best_of_n(prompts=20)
        with Run.open(tmp_path / str(n), config={}, seed=0) as run:
            found.append(best_of_n.train(cfg, policy, prompts, reward, run)["score_best"])
    assert found[0] < found[1] < found[2]


def test_a_prompt_without_any_verdict_is_not_counted_as_zero(tmp_path: Path) -> None:
    """Every response of one prompt fails; the figures are those of the others."""

    def judge(completions: list[str], prompts: list[str], **_: Any) -> list[float | None]:
        return [None if p == lost else 1.0 for p in prompts]

    cfg, (policy, prompts, _) = build_best_of_n(prompts=4, n=3)
    lost = prompts[1].text
    reward = FunctionReward(judge, name="lost", max_missing=1.0)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        result = best_of_n.train(cfg, policy, prompts, reward, run)
    assert result["score_mean"] == 1.0
    assert result["score_best"] == 1.0
    assert result["no_verdict"] == 3
    assert sum(line["no_verdict"] for line in lines(tmp_path / "run", "metrics.jsonl")) == 3
    assert [s["proxy"] for s in lines(tmp_path / "run", "samples.jsonl") if s["row"] == prompts[1].row] == [None, None]


def test_without_any_verdict_there_is_no_score(tmp_path: Path) -> None:
    def judge(completions: list[str], **_: Any) -> list[float | None]:
        return [None] * len(completions)

    cfg, (policy, prompts, _) = build_best_of_n(prompts=4, n=3)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        result = best_of_n.train(cfg, policy, prompts, FunctionReward(judge, max_missing=1.0), run)
    assert result["score_mean"] is result["score_best"] is None
    assert result["no_verdict"] == 12
    assert all("objective/scores" not in line for line in lines(tmp_path / "run", "metrics.jsonl"))
