"""Soft Q-learning: it approaches the enumerated optimum, from stale data too, and says how stale they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import EOS, prompt, tiny
from tiny_offline import build_soft_q, silent_after
from tiny_recipes import liked_share, policy, task
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import soft_q
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.testing.exact import Exact, expectation


def run_soft_q(folder: Path, reward: Any = None, **changes: Any) -> tuple[Policy, Policy, list[dict[str, float]]]:
    cfg, (reference, own, prompts) = build_soft_q(**changes)
    with Run.open(folder, config={}, seed=0) as run:
        trained, _ = soft_q.train(cfg, reference, reward or own, prompts, run)
    return trained, reference, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(trained: Policy) -> torch.Tensor:
    b = trained.sample(list(task().train), 2, Sampling(max_new_tokens=5), torch.Generator().manual_seed(5))
    return torch.tensor(liked_share(list(b.texts)))


@pytest.mark.parametrize(("sync", "lam"), [(1, 0.95), (4, 1.0)])
def test_it_closes_most_of_the_gap_to_the_enumerated_optimum(sync: int, lam: float, tmp_path: Path) -> None:
    """All 40 responses of a toy: J = E[score] − β KL begins at E_ref[score] and can reach β log Z, no more."""
    V, H, start, beta = 4, 3, (1, 2), 0.5
    reference = tiny("llama", vocabulary=V).freeze()
    world = Exact(start, V, H, eos=EOS)

    def words(completions: list[str], **_: Any) -> list[float]:
        return [text.split().count("w3") - 0.5 * text.split().count("w1") for text in completions]

    score = world.score(lambda r: r.count(3) - 0.5 * r.count(1))
    prompts = Task(name="toy", train=(prompt(*start),))
    cfg = soft_q.Config(
        steps=30,
        prompts=1,
        samples=48,
        sync=sync,
        max_new_tokens=H,
        learning_rate=5e-3,
        kl=beta,
        lam=lam,
        target_rate=0.5,
    )
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        trained, _ = soft_q.train(cfg, reference, FunctionReward(words, name="words"), prompts, run)
    with torch.no_grad():
        ref = reference.evaluate(world.batch)["logp"].double()
        logp = trained.evaluate(world.batch)["logp"].double()
    objective = expectation(world.probability(logp), score) - beta * world.kl(logp, ref)
    before, best = expectation(world.probability(ref), score), beta * world.optimum(ref, score, beta)[1]
    assert float(best - before) > 0.2
    assert float(best - objective) < 0.15 * float(best - before)


@pytest.mark.parametrize(
    "changes", [{"sync": 1}, {"sync": 3}, {"train": "lora-4", "learning_rate": 1e-2, "sync": 1}], ids=str
)
def test_it_improves_the_score(changes: dict[str, Any], tmp_path: Path) -> None:
    trained, reference, lines = run_soft_q(
        tmp_path / "run", **{"steps": 8, "prompts": 16, "learning_rate": 5e-3, "micro_tokens": 800, **changes}
    )
    assert float(scores(trained).mean()) > float(scores(reference).mean()) + 0.15
    assert lines[-1]["objective/kl"] > 0.2
    assert lines[0]["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_the_data_are_as_old_as_sync_says(tmp_path: Path) -> None:
    """The sampler catches up before phases 0, 3 and 6: there it is the policy; between, it lags further and further."""
    _, _, lines = run_soft_q(tmp_path / "run", steps=7, sync=3)
    lag = [line["sampling/sampling_logp_difference/mean"] for line in lines]
    assert [i for i, x in enumerate(lag) if x < 1e-5] == [0, 3, 6]
    assert lag[1] < lag[2]
    _, _, lines = run_soft_q(tmp_path / "fresh", steps=4, sync=1)
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-4 for line in lines)


def test_the_first_loss_is_what_the_score_leaves_to_learn(tmp_path: Path) -> None:
    """Q = V = 0 at the start, and a score of 1 on the last token: with λ = 1 every token's target is 1, the loss ½."""
    reward = FunctionReward(lambda completions, **_: [1.0] * len(completions), name="ones")
    _, _, lines = run_soft_q(tmp_path / "run", reward, steps=1, epochs=1, minibatches=1, lam=1.0)
    assert lines[0]["loss/value_avg"] == pytest.approx(0.5, abs=1e-5)


def test_rows_without_a_verdict_teach_nothing(tmp_path: Path) -> None:
    reward = FunctionReward(lambda completions, **_: [None] * len(completions), name="none", max_missing=1.0)
    trained, reference, lines = run_soft_q(tmp_path / "run", reward)
    assert trained.fingerprint() == reference.fingerprint()
    assert [line["no_verdict"] for line in lines] == [16.0] * 4
    assert all(line["skipped_updates"] > 0 and line["grad_norm"] == 0 for line in lines)


def test_a_phase_without_a_verdict_takes_no_step(tmp_path: Path) -> None:
    """Adam's momentum of the phase before does not carry the policy on."""
    trained = []
    for steps in (1, 3):
        trained.append(run_soft_q(tmp_path / str(steps), silent_after(1), steps=steps)[0])
    assert trained[0].fingerprint() == trained[1].fingerprint() != policy().fingerprint()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"kl": 0.0}, "kl=0.0"),
        ({"sync": 0}, "sync=0"),
        ({"lam": 1.5}, "lam=1.5"),
        ({"temperature": 0.0}, "temperature is 0"),
    ],
)
def test_what_is_outside_its_range_is_named(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=word):
        run_soft_q(tmp_path / "run", **changes)


def test_a_stale_sampler_is_measured_when_it_was_refreshed(tmp_path: Path) -> None:
    run_soft_q(tmp_path / "run", sync=2, steps=4)
    found = [json.loads(line) for line in (tmp_path / "run" / "gate.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [0, 1]
    assert found[1]["sampler_learner_mean_difference"] < 1e-4
