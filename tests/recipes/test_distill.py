"""Distillation: towards the teacher in every divergence, on whose prefixes, at what cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_imitation import build_distill, taught
from tiny_models import tiny
from tiny_recipes import WORDS, policy, task
from tokenmdp.experts import Teacher
from tokenmdp.models import catalog
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import distill
from tokenmdp.run import Run
from tokenmdp.testing.exact import Exact


def trained(folder: Path, **changes: Any) -> tuple[Any, dict[str, float], Teacher]:
    cfg, pieces = build_distill(**changes)
    with Run.open(folder, config={}, seed=0) as run:
        return *distill.train(cfg, *pieces, run=run), pieces[1]


@pytest.mark.parametrize("divergence", ["reverse", "js:0.5"])
def test_the_student_comes_closer_to_the_teacher_on_its_own_prefixes(divergence: str, tmp_path: Path) -> None:
    longer = {
        "steps": 8,
        "prompts": 16,
        "rows": 16,
        "on_policy": 1.0,
        "updates": 4,
        "learning_rate": 1e-2,
        "micro_tokens": 400,
    }
    student, figures, teacher = trained(tmp_path / "run", divergence=divergence, queries=0, **longer)
    assert figures["queries"] > 0
    b = student.sample(list(task().held_out), 8, Sampling(max_new_tokens=5), torch.Generator().manual_seed(3))
    before, after = (distill.distances(p, teacher, b) for p in (policy(), student))
    for name in before:
        assert after[name] < 0.8 * before[name], name


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_distances_are_means_a_token_of_the_enumerated_divergence(temperature: float) -> None:
    one, other = tiny("llama", vocabulary=4), tiny("llama", vocabulary=4, seed=1)
    world = Exact((1, 2), 4, 2, eos=0)
    found = distill.distances(one, Teacher(other), world.batch, temperature)
    with torch.no_grad():
        logits = (m.model(input_ids=world.batch.tokens).logits[:, :-1] for m in (one, other))
        p, q = ((x / temperature).softmax(-1) for x in logits)
    marked = world.batch.action[:, 1:]
    want = {
        "reverse": (p * (p / q).log()).sum(-1),
        "forward": (q * (q / p).log()).sum(-1),
        "tv": 0.5 * (p - q).abs().sum(-1),
    }
    for name, each in want.items():
        assert found[name] == pytest.approx(float(each[marked].mean()), rel=1e-4)


def test_with_demonstrations_alone_it_samples_nothing(tmp_path: Path) -> None:
    """λ = 0: only the task's demonstrations are gone through, so nothing is said of lengths."""
    cfg, pieces = build_distill(on_policy=0.0, aggregate=False, queries=0)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        _, figures = distill.train(cfg, *pieces, run=run)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "completions" not in lines
    lengths = pieces[2].demonstrations.action.sum(1)
    assert figures["queries"] == 2 * int(lengths.sum())  # four phases of six go through all twelve twice


def test_the_teachers_samples_may_stand_in_for_demonstrations(tmp_path: Path) -> None:
    cfg, (start, teacher, _) = build_distill(on_policy=0.5, data="teacher", queries=0)
    bare = replace(taught(), demonstrations=None)
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        assert distill.train(cfg, start, teacher, bare, run)[1]["queries"] > 0
    cfg, (start, teacher, _) = build_distill(on_policy=0.5)
    with (
        Run.open(tmp_path / "none", config={}, seed=0) as run,
        pytest.raises(ValueError, match=r"on_policy=0\.5 takes .* the task liking has none: give --data teacher"),
    ):
        distill.train(cfg, start, teacher, bare, run)


def test_a_budget_is_spent_to_the_last_query_and_no_further(tmp_path: Path) -> None:
    assert trained(tmp_path / "run", queries=50, steps=5)[1]["queries"] == 50


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    cfg, (start, _, prompts) = build_distill()
    other = Teacher(tiny("llama", vocabulary=WORDS + 1))
    with (
        Run.open(tmp_path / "run", config={}, seed=0) as run,
        pytest.raises(ValueError, match=r"\(12 tokens, 12 logits\) .* \(13 tokens, 13 logits\) have different vocab"),
    ):
        distill.train(cfg, start, other, prompts, run)


@pytest.mark.parametrize("name", distill.VARIANTS)
def test_the_variants_are_settings(name: str) -> None:
    assert distill.Config(**distill.VARIANTS[name]).on_policy == {"gkd": 0.5, "kd": 0.0}[name]


def test_what_a_config_cannot_mean_is_said() -> None:
    for wrong, message in (
        ({"divergence": "js:2"}, "divergence is 'js:2'"),
        ({"on_policy": 1.1}, r"on_policy=1\.1"),
        ({"data": "reward"}, "data is 'reward'"),
        ({"updates": 0}, "updates=0"),
    ):
        with pytest.raises(ValueError, match=message):
            distill.Config(**wrong)


def test_main_reports_how_close_the_student_came(tmp_path: Path) -> None:
    other = catalog.load("tiny")
    with torch.no_grad():
        other.model.get_output_embeddings().weight.mul_(2)
    other.save(tmp_path / "teacher")
    cfg = distill.Config(
        model="tiny", teacher=str(tmp_path / "teacher"), task="reversal", steps=4, prompts=4, rows=4, max_new_tokens=5,
        learning_rate=2e-3,
    )  # fmt: skip
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        found = distill.main(cfg, run)
    before, after = (found["on_own_samples"][arm]["reverse"] for arm in ("start", "trained"))
    assert before > 0.1
    assert after not in (0, before)
    assert set(found["on_own_samples"]["trained"]) == {"forward", "reverse", "tv"}
    assert "trained_minus_start" in found["held_out"]


def test_a_student_that_is_its_own_teacher_learns_nothing(tmp_path: Path) -> None:
    cfg = distill.Config(model="tiny", teacher="tiny", task="reversal", steps=1)
    with Run.open(tmp_path / "run", config={}, seed=0) as run, pytest.raises(ValueError, match="are the same model"):
        distill.main(cfg, run)
