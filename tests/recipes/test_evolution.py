"""Evolution strategies: ranks by hand, noise that is drawn again and taken back exactly, an unbiased direction, learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_offline import build_evolution, silent_after
from tiny_recipes import liked_share, policy, task
from tokenmdp.models.parts import micro_batches
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import evolution
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.types import Batch, Score


def run_evolution(folder: Path, reward: Any = None, **changes: Any) -> tuple[Policy, Policy, list[dict[str, float]]]:
    cfg, (reference, own, prompts) = build_evolution(**changes)
    with Run.open(folder, config={}, seed=0) as run:
        trained, _ = evolution.train(cfg, reference, reward or own, prompts, run)
    return trained, reference, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(trained: Policy) -> torch.Tensor:
    b = trained.sample(list(task().train), 2, Sampling(max_new_tokens=5), torch.Generator().manual_seed(5))
    return torch.tensor(liked_share(list(b.texts)))


@pytest.mark.parametrize(
    ("fitness", "want"),
    [
        ([3.0, 100.0, -7.0], [0.0, 0.5, -0.5]),
        ([1.0, 1.0, 0.0, 2.0, 5.0], [-0.125, -0.125, -0.5, 0.25, 0.5]),
        ([2.0, 2.0], [0.0, 0.0]),
        ([4.0], [0.0]),
        ([], []),
    ],
    ids=["three", "ties share 1 and 2", "all equal", "one", "none"],
)
def test_ranks_by_hand(fitness: list[float], want: list[float]) -> None:
    found = evolution.centred_ranks(torch.tensor(fitness))
    assert found.tolist() == pytest.approx(want)
    assert float(found.sum()) == pytest.approx(0)


def test_the_weights_come_back_to_the_last_bit() -> None:
    trained = policy().twin("all")
    weights = [w for _, w in trained.trained()]
    before = [w.detach().clone() for w in weights]
    with evolution.pushed(weights, 7, 0.3):
        up = [w.detach() - b for w, b in zip(weights, before, strict=True)]
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    with evolution.pushed(weights, 7, -0.3):
        down = [w.detach() - b for w, b in zip(weights, before, strict=True)]
    epsilon = list(evolution.noise(7, weights))
    assert all(torch.allclose(u, 0.3 * e, atol=1e-6) for u, e in zip(up, epsilon, strict=True))
    assert all(torch.allclose(u, -d, atol=1e-6) for u, d in zip(up, down, strict=True))
    assert not torch.equal(epsilon[0], next(iter(evolution.noise(8, weights))))


def test_one_direction_is_in_memory_at_a_time() -> None:
    directions = evolution.Directions(torch.arange(5), size=1000)
    assert [len(rows) for rows in micro_batches(directions.cost, 1)] == [1] * 5
    assert directions.select([3, 1]).seed.tolist() == [3, 1]


class Length:
    """Judges nothing but remembers: who was asked for what, and with what chance."""

    name = "length"

    def __init__(self) -> None:
        self.seen: list[Batch] = []

    def __call__(self, batch: Batch) -> Score:
        self.seen.append(batch)
        return Score.of(batch.action.sum(-1).float())


def test_all_tries_of_a_phase_share_prompts_and_chance(tmp_path: Path) -> None:
    """With noise too small to matter, all 2n tries give the same responses; the next phase gives others."""
    reward = Length()
    run_evolution(tmp_path / "run", reward, steps=2, sigma=1e-12)
    first, second = reward.seen
    tries = [first.texts[i : i + 4] for i in range(0, 16, 4)]
    assert tries[0] == tries[1] == tries[2] == tries[3]
    assert first.texts[:4] != second.texts[:4]


def test_it_learns_from_scores_of_whole_policies(tmp_path: Path) -> None:
    """From a twelfth of liked words; 10 phases of 16 tries, and no gradient of the policy."""
    settings = {"steps": 10, "pairs": 8, "prompts": 8, "train": "all", "sigma": 0.05, "learning_rate": 4e-2}
    trained, reference, lines = run_evolution(tmp_path / "run", **settings)
    assert float(scores(trained).mean()) > float(scores(reference).mean()) + 0.15
    assert lines[-1]["objective/scores"] > lines[0]["objective/scores"] + 0.1


class Ids:
    """The mean token id of a response, of which hardly two are equal; remembers its scores."""

    name = "ids"

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, batch: Batch) -> Score:
        chosen = (batch.tokens * batch.action).sum(-1) / batch.action.sum(-1)
        self.seen.append(chosen)
        return Score.of(chosen)


@pytest.mark.parametrize("seed", [3, 4])
def test_with_one_pair_every_weight_goes_where_the_better_try_was(seed: int, tmp_path: Path) -> None:
    """Adam's first step is the sign of the gradient: along ε where θ + σε scored more than θ − σε, else against it."""
    cfg, (reference, _, prompts) = build_evolution(
        steps=1, pairs=1, prompts=8, train="all", sigma=0.2, learning_rate=1e-3
    )
    reward = Ids()
    with Run.open(tmp_path / "run", config={}, seed=seed) as run:
        probe = torch.Generator()
        probe.set_state(run.rng.get_state())
        trained, _ = evolution.train(cfg, reference, reward, prompts, run)
    prompts.draw(cfg.prompts, probe)
    drawn = int(torch.randint(1 << 62, (1,), generator=probe)[0])
    up, down = reward.seen[0].view(2, -1).mean(1)
    assert float(up) != float(down)
    before = [w for _, w in policy().twin("all").trained()]
    moved = [a.detach() - b.detach() for (_, a), b in zip(trained.trained(), before, strict=True)]
    epsilon = list(evolution.noise(drawn, before))
    along = sum(float((m.sign() * e.sign()).sum()) for m, e in zip(moved, epsilon, strict=True))
    assert along * float((up - down).sign()) > 0.99 * sum(m.numel() for m in moved)


@pytest.mark.parametrize("answer", [1.0, None], ids=["equal", "no verdict"])
def test_where_no_try_is_better_nothing_changes(answer: float | None, tmp_path: Path) -> None:
    reward = FunctionReward(lambda completions, **_: [answer] * len(completions), name="same", max_missing=1.0)
    trained, _, lines = run_evolution(tmp_path / "run", reward, train="all")
    assert trained.fingerprint() == policy().fingerprint()
    assert [line["evolution/ties"] for line in lines] == [1.0] * 3
    assert [line["no_verdict"] for line in lines] == [0.0 if answer else 16.0] * 3
    assert [line["skipped_updates"] for line in lines] == [1.0] * 3


@pytest.mark.parametrize("answer", [1.0, None], ids=["equal", "no verdict"])
def test_a_phase_that_tells_nothing_takes_no_step(answer: float | None, tmp_path: Path) -> None:
    """Adam's momentum of the phase before does not carry the policy on."""
    runs = [run_evolution(tmp_path / str(n), silent_after(1, answer), steps=n, train="all") for n in (1, 3)]
    assert runs[0][0].fingerprint() == runs[1][0].fingerprint() != policy().fingerprint()
    assert [line["skipped_updates"] for line in runs[1][2]] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("changes", "word"), [({"pairs": 0}, "pairs=0"), ({"sigma": 0.0}, "sigma=0.0")])
def test_what_is_outside_its_range_is_named(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=word):
        run_evolution(tmp_path / "run", **changes)
