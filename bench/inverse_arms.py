"""Parts 2 and 3 of bench/reward_from_demos.py: rewards learned from demonstrations, and how they are judged."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
import inverse_toy
from tokenmdp import stats
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import demo_reward, sft
from tokenmdp.rewards.log_ratio import LogRatio
from tokenmdp.run import Run
from tokenmdp.tasks import Task, sentiment
from tokenmdp.testing.exact import Exact
from tokenmdp.types import Batch, Pairs, Prompt, Reward, Score

CURVE = (1, 2, 4, 8, 16)


# -- how a reward is judged ---------------------------------------------------------------------------------------------


def judged(
    rewards: Mapping[str, Reward], closed: Reward, gold: Reward, sides: Mapping[str, Pairs], answers: Batch, each: int
) -> dict[str, Any]:
    """Each reward on fresh responses; the closed form is one of them.

    Args:
        sides: held-out pairs, a demonstrator's response as `chosen` and the start's as `rejected`, by the demonstrator.
        answers: responses of the start, `each` to a prompt, side by side.
    """
    truth = _rows(gold(answers), each)
    known = {name: closed(_both(pairs)).value.double().numpy() for name, pairs in sides.items()}
    by_closed = stats.best_of_n_values(_rows(closed(answers), each), truth, max(CURVE))
    at_random = stats.best_of_n_values(truth, truth, 1)
    found: dict[str, Any] = {}
    for name, reward in {**rewards, "closed_form": closed}.items():
        proxy = _rows(reward(answers), each)
        curve = {n: stats.best_of_n_values(proxy, truth, n) for n in CURVE}
        found[name] = {
            **{f"{side}_pairs": _told(reward, pairs, known[side]) for side, pairs in sides.items()},
            "best_of_n": {str(n): interval(values) for n, values in curve.items()},
            "over_random": interval(curve[max(CURVE)] - at_random),
            "over_closed": interval(curve[max(CURVE)] - by_closed),
        }
    found["gold"] = {"best_of_n": {str(n): interval(stats.best_of_n_values(truth, truth, n)) for n in CURVE}}
    return found


def _told(reward: Reward, pairs: Pairs, known: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Accuracy on the pairs, and the rank correlation with the closed form over the responses of both sides."""
    score = reward(_both(pairs)).value.double().numpy()
    shown, own = np.split(score, 2)
    right = (shown > own) + 0.5 * (shown == own)
    prompts = [p.ids for p in pairs.chosen.prompts]  # sides and pairs of one prompt are no independent trials
    varied = np.ptp(score) > 0 and np.ptp(known) > 0
    return {
        "accuracy": common.rounded(stats.clustered_wilson(right, prompts)),
        "spearman": common.rounded(stats.spearman(score, known, cluster=prompts * 2)) if varied else None,
    }


def _both(pairs: Pairs) -> Batch:
    return Batch.concat([pairs.chosen, pairs.rejected])


def _rows(score: Score, each: int) -> np.ndarray[Any, Any]:
    return score.value.double().numpy().reshape(-1, each)


def interval(values: np.ndarray[Any, Any]) -> dict[str, float]:
    """The mean over prompts and its 95 % interval; the mean alone where prompts do not differ."""
    if len(values) < 2 or np.ptp(values) == 0:
        return {"mean": round(float(values.mean()), 4)}
    return common.rounded(stats.bootstrap_mean(values))


# -- 2. a toy whose closed form is known --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """How much is done."""

    demonstrations: int = 2000
    held_out: int = 500
    groups: int = 200  # prompts answered 16 times
    epochs: int = 4
    beta: float = 0.5  # of the demonstrator: reward units a nat


WORDS, HORIZON, EOS = 5, 4, 0


class Table:
    """A reward that is written down: by prompt and response."""

    def __init__(self, values: Mapping[tuple[int, tuple[int, ...]], float], name: str) -> None:
        self.values, self.name = values, name

    def __call__(self, batch: Batch) -> Score:
        said = [tuple(batch.tokens[i][batch.action[i]].tolist()) for i in range(len(batch))]
        return Score.of(torch.tensor([self.values[p.ids[0], r] for p, r in zip(batch.prompts, said, strict=True)]))


class Enumerated:
    """For each prompt all responses, what the start makes of them, and the demonstrator who is best for gold."""

    def __init__(self, start: Policy, beta: float) -> None:
        closed: dict[tuple[int, tuple[int, ...]], float] = {}
        liked: dict[tuple[int, tuple[int, ...]], float] = {}
        self.worlds: dict[int, Exact] = {}
        self.chance: dict[int, torch.Tensor] = {}
        for word in range(1, WORDS):
            world = Exact((word,), WORDS, HORIZON, eos=EOS)
            gold = world.score(lambda r, w=word: _gold(w, r))
            with torch.no_grad():
                logp = start.evaluate(world.batch)["logp"].double()
            best, _ = world.optimum(logp, gold, beta)
            ratio = best.log() - logp.sum(1)
            for response, value, r in zip(world.responses, gold.tolist(), ratio.tolist(), strict=True):
                liked[word, response], closed[word, response] = value, r
            self.worlds[word], self.chance[word] = world, best
        self.gold, self.closed = Table(liked, "gold"), Table(closed, "closed_form")

    def demonstrate(self, prompts: Sequence[Prompt], rng: torch.Generator) -> Batch:
        rows = []
        for prompt in prompts:
            word = prompt.ids[0]
            row = int(torch.multinomial(self.chance[word], 1, generator=rng))
            rows.append((self.worlds[word].responses[row], bool(self.worlds[word].batch.ended[row])))
        return Batch.build(
            prompts, [r for r, _ in rows], texts=[str(r) for r, _ in rows], ended=[e for _, e in rows], pad=EOS
        )


def _gold(word: int, response: tuple[int, ...]) -> float:
    """Gold likes the prompt's word, twice as much where it comes right after itself, and dislikes an early end."""
    again = sum(a == b == word for a, b in itertools.pairwise(response))
    return 0.5 * response.count(word) + 0.5 * again - 0.5 * (len(response) < HORIZON)


def toy(size: Toy, run: Run) -> dict[str, Any]:
    """One seed: the start's weights, the demonstrations and the fits are all its own."""
    start = inverse_toy.small(HORIZON + 1, run.seed, WORDS)
    world, sampling = Enumerated(start, size.beta), Sampling(max_new_tokens=HORIZON)

    def pairs(count: int) -> Pairs:
        prompts = [Prompt((1 + i % (WORDS - 1),), f"w{1 + i % (WORDS - 1)}", i) for i in range(count)]
        return Pairs(
            world.demonstrate(prompts, run.rng), start.sample(prompts, 1, sampling, run.rng), torch.zeros(count)
        )

    learned, kept = pairs(size.demonstrations), pairs(size.held_out)
    fitted: dict[str, Reward] = {}
    for objective in demo_reward.OBJECTIVES:
        cfg = demo_reward.Config(
            objective=objective,
            epochs=size.epochs,
            rows=64,
            learning_rate=3e-3,
            head_learning_rate=1e-2,
            micro_tokens=8192,
        )
        fitted[objective], _ = demo_reward.train(cfg, start, learned, kept, run.stage(objective))
    asked = [Prompt((1 + i % (WORDS - 1),), "", i) for i in range(size.groups)]
    answers = start.sample(asked, max(CURVE), sampling, run.rng)
    return judged(fitted, world.closed, world.gold, {"demonstration": kept}, answers, max(CURVE))


# -- 3. the embedded model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """How much is done."""

    name: str = "smollm2-135m-instruct"
    start_steps: int = 100  # of cloning reviews, once for all seeds
    sft_steps: int = 64  # of cloning what gold likes most
    learned: int = 512  # demonstrations to learn from, and as many SFT samples
    held_out: int = 64
    prompts: int = 48  # answered 16 times
    train: str = "top-10"
    rate: float = 1e-4
    horizon: int = 24
    task: Mapping[str, int] = field(default_factory=lambda: {"demonstrations": 6000})


def begin(size: Model, run: Run, source: Path | None) -> tuple[Policy, Task, Batch]:
    """The start, cloned from a third of the openings, the task, and of the rest the quarter that gold likes most."""
    base = catalog.tiny(sentiment.texts(seed=0, source=source)) if size.name == "tiny" else catalog.load(size.name)
    task = sentiment.load(base.freeze(), horizon=size.horizon, source=source, **size.task)
    assert task.demonstrations is not None, "the sentiment task brings demonstrations"
    assert task.reward is not None, "the sentiment task brings its gold reward"
    third = len(task.demonstrations) // 3
    seen, rest = task.demonstrations.select(range(third)), task.demonstrations.select(range(third, 3 * third))
    folder = run.folder / "start"
    if run.result() is None:
        cfg = sft.Config(
            steps=size.start_steps, learning_rate=size.rate, train=size.train, evaluate_every=size.start_steps
        )
        start, _ = sft.train(cfg, base, seen.select(range(32, len(seen))), seen.select(range(32)), run)
        start.freeze().save(folder)
        run.finish({})
    start = catalog.load(folder).freeze()
    start.name = "start"
    liked = task.reward(rest).value.argsort(descending=True, stable=True)[: len(rest) // 4]
    return start, task, rest.select(liked)


def model(size: Model, start: Policy, task: Task, expert: Batch, run: Run) -> dict[str, Any]:
    """One seed: which demonstrations, the fits, and what the start answers are its own."""
    assert task.reward is not None, "the sentiment task brings its gold reward"
    order = torch.randperm(len(expert), generator=run.rng)[: size.learned + size.held_out]
    shown, sampling = expert.select(order), Sampling(max_new_tokens=size.horizon)
    with run.progress(2 * len(shown) + max(CURVE) * size.prompts, "the start and SFT answer", "responses") as bar:
        own = start.sample(shown.prompts, 1, sampling, run.rng, bar.advance)
        cloned = _cloned(size, start, shown.select(range(size.learned)), run.stage("sft"))
        theirs = cloned.sample(shown.prompts, 1, sampling, run.rng, bar.advance)
        asked = [
            task.held_out[i] for i in torch.randperm(len(task.held_out), generator=run.rng)[: size.prompts].tolist()
        ]
        answers = start.sample(asked, max(CURVE), sampling, run.rng, bar.advance)
    closed = LogRatio(cloned, start)
    first, last = range(size.learned), range(size.learned, len(shown))
    sides = {"demonstration": shown, "sft": theirs}
    learned, kept = (
        {name: Pairs(b.select(rows), own.select(rows), torch.zeros(len(rows))) for name, b in sides.items()}
        for rows in (first, last)
    )
    fitted: dict[str, Reward] = {}
    for name, side, objective in (
        ("classifier", "demonstration", "classifier"),
        ("bradley_terry", "demonstration", "bradley_terry"),
        ("sft_samples", "sft", "classifier"),
    ):
        cfg = demo_reward.Config(objective=objective, learning_rate=size.rate / 2, train=size.train, pool="mean")
        fitted[name], _ = demo_reward.train(cfg, start, learned[side], kept[side], run.stage(name))
    found = judged(fitted, closed, task.reward, kept, answers, max(CURVE))
    gold = {"demonstration": shown, "start": own, "sft": theirs}
    return {**found, "gold_of": {name: interval(task.reward(b).value.double().numpy()) for name, b in gold.items()}}


def _cloned(size: Model, start: Policy, shown: Batch, run: Run) -> Policy:
    folder = run.folder / "model"
    if run.result() is None:
        cfg = sft.Config(steps=size.sft_steps, learning_rate=size.rate, train=size.train, evaluate_every=size.sft_steps)
        cloned, figures = sft.train(cfg, start, shown, shown.select(range(min(16, len(shown)))), run)
        cloned.freeze().save(folder)
        run.finish(dict(figures))
    return catalog.load(folder).freeze()
