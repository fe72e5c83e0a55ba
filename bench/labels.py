"""What labels buy: the gold score of what is done with them, against how many were paid for.

    python bench/labels.py --json docs/results/labels.json

A reward model is a cheap proxy of expensive feedback. The price of a policy is then its labels: noisy verdicts on pairs,
P(first preferred) = σ(3 (gold₁ − gold₂)), each paid for on a ledger.

On features (the embedded model after behaviour cloning on reviews; gold is the sentiment task's classifier). Responses are
drawn once and embedded once; linear Bradley-Terry heads are fitted to 25 … 1600 labels, five seeds, each with three
quarters of the prompts and its own labels. The pairs to label are chosen

    random         by chance: what the others must beat
    uncertain      smallest margin under the head so far
    disagreement   largest spread of five heads fitted to resampled labels
    d_optimal      largest gain of Fisher information

and quality is the gold of the best of 16 responses by that head, on held-out prompts. Beside them: `sample` (one response,
no label: best-of-n by a constant reward is that), `best constant` (one and the same response to every prompt, chosen by
gold itself), `direct` (the labels are spent on the held-out prompts' own responses, a knock-out from the first; it must be
paid again for every new prompt), `winners` (mean gold of labelled winners above their pool: what perfect cloning of them
would add), and `gold` (best of 16 by gold itself). At two budgets a policy is trained by GRPO on the learned reward
(seed 0).

On a toy (`labels_toy.py`) policies are trained at every budget and seed: GRPO on a learned reward, cloning of labelled
winners, DPO on the labels.

THRESHOLDS, stated before any run. A difference holds where its 95 % intervals over seeds and over held-out prompts (paired)
both lie above 0.

    pays      features: random at the most labels beats `sample`
    grows     features: random at the most labels beats random at the fewest
    direct    features: random at the most labels beats `direct` at as many
    active    features: an active choice beats random in the mean over all budgets (each choice for itself)
    policy    the policy trained with the most labels beats its start, and the policy with fewer (over prompts: one seed)
    toy       the same `pays` and `grows` with trained policies; reward path against cloned winners and against DPO

What does not hold is reported as "no significant difference", or as the opposite where both intervals lie below 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import common
import labels_toy
from labels_choice import CHOICES, SHARPNESS, Pool, buy, interval, versus
from tokenmdp import stats
from tokenmdp.ledger import Ledger
from tokenmdp.models import catalog, embedding, embedding_cache
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.recipes import grpo, sft
from tokenmdp.rewards.classifier import TextClassifier
from tokenmdp.rewards.embedding_reward import EmbeddingReward
from tokenmdp.run import Run
from tokenmdp.tasks import Task, data, sentiment
from tokenmdp.types import Batch, Prompt


@dataclass(frozen=True)
class Size:
    """How much is done."""

    model: str
    clone: sft.Config
    rl: grpo.Config
    horizon: int
    prefix_tokens: int
    pool: int  # prompts
    samples: int  # responses to each of them
    held_out: int  # prompts
    candidates: int  # responses to each of them: n
    budgets: tuple[int, ...]
    seeds: int
    trained: tuple[int, ...]  # budgets at which a policy is trained
    chunk: int = 8  # prompts sampled at a time


FULL = Size(
    model="smollm2-135m-instruct",
    clone=sft.Config(steps=40, rows=16, learning_rate=1e-4, evaluate_every=1000),
    rl=grpo.Config(steps=12, samples=4, learning_rate=7e-5, kl=0.05, train="top-10"),
    horizon=24,
    prefix_tokens=8,
    pool=400,
    samples=6,
    held_out=160,
    candidates=16,
    budgets=(25, 50, 100, 200, 400, 800, 1600),
    seeds=5,
    trained=(100, 1600),
)
QUICK = Size(
    model="tiny",
    clone=sft.Config(steps=20, rows=16, learning_rate=5e-3, evaluate_every=1000, micro_tokens=4096),
    rl=grpo.Config(steps=2, prompts=4, samples=4, max_new_tokens=8, learning_rate=1e-3, micro_tokens=4096),
    horizon=8,
    prefix_tokens=6,
    pool=24,
    samples=4,
    held_out=12,
    candidates=4,
    budgets=(8, 16, 32),
    seeds=2,
    trained=(8, 32),
)


@dataclass(frozen=True)
class World:
    """What is made once: the cloned policy, its responses, their embeddings and gold scores."""

    policy: Policy
    task: Task
    gold: TextClassifier
    pool: Batch
    held_out: Batch
    pool_features: Tensor
    held_out_features: Tensor
    pool_gold: Tensor
    held_out_gold: Tensor


# -- once ---------------------------------------------------------------------------------------------------------------


def prepare(run: Run, size: Size, reviews: Path | None) -> World:
    """Clone, sample, embed and score; each stage is read from its folder where it is done."""
    start = catalog.tiny(sentiment.texts(300, source=reviews)) if size.model == "tiny" else catalog.load(size.model)
    few = {"gold": 60, "gold_test": 20, "demonstrations": 60, "train": 60, "held_out": 20} if reviews else {}
    task = sentiment.load(start.freeze(), size.prefix_tokens, size.horizon, source=reviews, **few)
    assert task.demonstrations is not None
    assert isinstance(task.reward, TextClassifier)
    stage = run.stage("clone")
    if stage.result() is None:
        learned, kept = data.split(task.demonstrations, 0.05, stage.rng)
        policy, figures = sft.train(size.clone, start, learned, kept, stage)
        policy.save(stage.folder / "model")
        stage.finish(figures)
    policy = catalog.load(stage.folder / "model").freeze()
    pool = drawn(run.stage("pool"), policy, task.train[: size.pool], size.samples, size)
    held_out = drawn(run.stage("held_out"), policy, task.held_out[: size.held_out], size.candidates, size)
    body = embedding.OwnBody(policy, over="response")
    cache = embedding_cache.Cache(run.folder / "embeddings", body)
    features = [embedding_cache.embedded(body, b, cache) for b in (pool, held_out)]
    golds = [task.reward(b).value for b in (pool, held_out)]
    return World(policy, task, task.reward, pool, held_out, *features, *golds)


def drawn(stage: Run, policy: Policy, prompts: Sequence[Prompt], samples: int, size: Size) -> Batch:
    """`samples` responses to each prompt, sampled once, a few prompts at a time."""
    if stage.result() is None:
        chunks = [prompts[i : i + size.chunk] for i in range(0, len(prompts), size.chunk)]
        for step in stage.steps(len(chunks), title=f"responses of {stage.folder.name}"):
            b = policy.sample(chunks[step], samples, Sampling(max_new_tokens=size.horizon), stage.rng)
            for i in range(len(b)):
                ids = b.tokens[i][b.action[i]].tolist()
                stage.append("responses.jsonl", {"ids": ids, "text": b.texts[i], "ended": bool(b.ended[i])})
        stage.finish({"responses": len(prompts) * samples})
    rows = [json.loads(line) for line in (stage.folder / "responses.jsonl").read_text().splitlines()]
    return Batch.build(
        [p for p in prompts for _ in range(samples)],
        [r["ids"] for r in rows],
        texts=[r["text"] for r in rows],
        ended=[r["ended"] for r in rows],
        group=[i for i in range(len(prompts)) for _ in range(samples)],
        pad=policy.eos_ids[0],
    )


# -- what the labels buy ------------------------------------------------------------------------------------------------


def curves(world: World, size: Size) -> dict[str, Any]:
    """[budgets, seeds, prompts] gold of the best of n by each choice's head, `direct`'s, and the heads' accuracy."""
    P, n = size.held_out, size.candidates
    gold = world.held_out_gold.reshape(P, n).double()
    arms: dict[str, list[list[list[float]]]] = {name: [[] for _ in size.budgets] for name in (*CHOICES, "direct")}
    right: dict[str, list[list[float]]] = {name: [[] for _ in size.budgets] for name in CHOICES}
    winners: list[float] = []
    for seed in range(size.seeds):
        pool = Pool.of(
            world.pool_features, world.pool_gold, size.samples, torch.Generator().manual_seed(seed), share=0.75
        )
        for choice in CHOICES:
            rng = torch.Generator().manual_seed(seed)  # the first labels of two choices by chance are the same
            for at, (ledger, head, rows) in enumerate(buy(pool, choice, size.budgets, rng)):
                proxy = head.score(world.held_out_features).reshape(P, n).double()
                arms[choice][at].append(stats.best_of_n_values(proxy, gold, n).tolist())
                right[choice][at].append(accuracy(proxy, gold))
                if choice == "random" and ledger.left("labels") == 0:
                    winners.append(float(pool.gold[rows[:, 0]].mean() - pool.gold[rows].mean()))
        for at, budget in enumerate(size.budgets):
            arms["direct"][at].append(direct(gold, budget, torch.Generator().manual_seed(seed)))
    return {"arms": arms, "accuracy": right, "winners": winners}


def accuracy(proxy: Tensor, gold: Tensor) -> float:
    """The share of pairs of responses to one prompt that the proxy orders as gold does; equal scores count half."""
    ours, theirs = (torch.sign(x[:, :, None] - x[:, None, :]) for x in (proxy, gold))
    counts = theirs != 0
    return float(((ours * theirs)[counts] + 1).mean() / 2)


def direct(gold: Tensor, budget: int, rng: torch.Generator) -> list[float]:
    """[P] gold of each prompt's champion, where labels go round the prompts and each pits the champion against the next.

    A prompt without a label keeps its first response; labels beyond all responses are not spent.
    """
    P, n = gold.shape
    ledger = Ledger(labels=budget)
    champion = torch.zeros(P, dtype=torch.long)
    for turn in range(1, n):
        for p in range(P):
            luck = float(torch.rand((), generator=rng))
            if ledger.left("labels") == 0:
                continue
            ledger.pay("labels")
            champion[p] = (
                turn if luck < torch.sigmoid(SHARPNESS * (gold[p, turn] - gold[p, champion[p]])) else champion[p]
            )
    return gold[torch.arange(P), champion].tolist()


def best_constant(world: World, size: Size) -> tuple[str, list[float]]:
    """The response that, said to every prompt, has the highest gold on prompts of the pool, of the 50 likeliest; and its
    gold on each held-out prompt."""
    prompts = [world.pool.prompts[i * size.samples].text for i in range(min(100, size.pool))]
    likely = [world.pool.texts[i] for i in world.pool_gold.argsort(descending=True)[:50].tolist()]
    said = max(likely, key=lambda text: float(world.gold.logits([p + text for p in prompts]).mean()))
    asked = [world.held_out.prompts[i * size.candidates].text for i in range(size.held_out)]
    return said, world.gold.logits([p + said for p in asked]).tolist()


def policies(run: Run, world: World, size: Size) -> dict[int, list[float]]:
    """[P] mean gold of four responses of the policy trained on the reward of each budget in `trained`, seed 0."""
    pool = Pool.of(world.pool_features, world.pool_gold, size.samples, torch.Generator().manual_seed(0), share=0.75)
    found: dict[int, list[float]] = {}
    prompts = list(world.task.held_out[: size.held_out])
    for budget, (_, head, _) in zip(
        size.trained, buy(pool, "random", size.trained, torch.Generator().manual_seed(0)), strict=True
    ):
        stage = run.stage(f"policy-{budget}")
        done = stage.result()
        if done is None:
            reward = EmbeddingReward(embedding.OwnBody(world.policy, over="response"), head)
            raw = head.score(world.pool_features)  # what `normalise` would read the pool again for
            reward.shift, reward.scale = float(raw.mean()), float(raw.std(unbiased=False))
            policy, _ = grpo.train(size.rl, world.policy, reward, world.task, stage, world.gold)
            b = policy.freeze().sample(prompts, 4, Sampling(max_new_tokens=size.horizon), stage.rng)
            value = world.gold(b).value.reshape(len(prompts), 4).mean(1)
            done = stage.finish({"gold": value.tolist()})
        found[budget] = done["gold"]
    return found


# -- findings -----------------------------------------------------------------------------------------------------------


def findings(world: World, size: Size, bought: dict[str, Any], trained: dict[int, list[float]]) -> dict[str, Any]:
    """Curves with intervals, the rows beside them, and the comparisons stated above."""
    P, n = size.held_out, size.candidates
    gold = world.held_out_gold.reshape(P, n).double().numpy()
    arms = {name: np.array(values) for name, values in bought["arms"].items()}  # [budgets, seeds, prompts]
    sample = np.broadcast_to(gold.mean(1), arms["random"][0].shape)
    said, constant = best_constant(world, size)
    active = {
        f"active: {name}": versus(arms[name].mean(0), arms["random"].mean(0)) for name in CHOICES if name != "random"
    }
    trained_arms = {budget: np.array(values)[None] for budget, values in trained.items()}
    fewest, most = (trained_arms[b] for b in (min(trained_arms), max(trained_arms)))
    compared = {
        "pays": versus(arms["random"][-1], sample),
        "grows": versus(arms["random"][-1], arms["random"][0]),
        "direct": versus(arms["random"][-1], arms["direct"][-1]),
        **active,
        "policy pays": _one_seed(most, sample[:1]),
        "policy grows": _one_seed(most, fewest),
    }
    return {
        "budgets": list(size.budgets),
        "gold": {name: [interval(at.mean(0)) for at in values] for name, values in arms.items()},
        "seeds": {name: np.round(values.mean(2), 4).tolist() for name, values in arms.items()},
        "accuracy": {name: [interval(at) for at in values] for name, values in bought["accuracy"].items()},
        "beside": {
            "sample": interval(gold.mean(1)),
            "best constant": {**interval(constant), "said": said},
            "gold": interval(gold.max(1)),
            "winners, above their pool": interval(bought["winners"]),
            **{f"policy trained on {b} labels": interval(values) for b, values in trained.items()},
        },
        "at_each_budget": {
            name: [versus(a, b) for a, b in zip(arms[name], arms["random"], strict=True)]
            for name in CHOICES
            if name != "random"
        },
        "compared": compared,
    }


def _one_seed(ours: Any, theirs: Any) -> dict[str, Any]:
    """As `versus`, with one seed: only prompts are resampled, and that is said."""
    found = versus(ours, theirs)
    low, high = found["over_prompts"]
    return {**found, "holds": low is not None and low > 0, "opposite": high is not None and high < 0, "one_seed": True}


def verdict(compared: dict[str, dict[str, Any]], where: str) -> list[str]:
    """Each comparison in words."""
    return [
        f"{where}: {name}: {c['mean']:+.3f} gold "
        f"({'holds' if c['holds'] else 'the opposite holds' if c['opposite'] else 'no significant difference'}"
        f"{'; one seed' if c.get('one_seed') else ''})"
        for name, c in compared.items()
    ]


def show(found: dict[str, Any], toy: dict[str, Any], words: Sequence[str]) -> None:
    """The curve, the rows beside it, the toy, the verdicts."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title="gold of the best of n by the learned reward [95 % over prompts]", title_justify="left")
    for name in ("labels", *found["gold"]):
        table.add_column(name, justify="right")
    for at, budget in enumerate(found["budgets"]):
        table.add_row(str(budget), *(_shown(values[at]) for values in found["gold"].values()))
    console.print(table)
    for title, rows in (("beside", found["beside"]), ("toy, trained policies [95 % over seeds]", toy["gold"])):
        side = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows.items():
            side.add_row(name, _shown(value))
        console.print(side)
    for line in words:
        console.print(line, highlight=False)


def _shown(x: dict[str, Any]) -> str:
    return f"{x['mean']:.2f}" + ("" if x["low"] is None else f" [{x['low']:.2f}, {x['high']:.2f}]")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folder is")
    out.add_argument("--reviews", type=Path, help="a CSV file of reviews instead of the package's (with --quick)")
    args: argparse.Namespace = out.parse_args(argv)
    size, toy_size = (QUICK, labels_toy.QUICK) if args.quick else (FULL, labels_toy.Size())
    if args.reviews and not args.quick:
        out.error("--reviews is for --quick: the result file is about the package's reviews")
    folder = args.runs / f"labels{'-quick' * args.quick}"
    with Run.open(folder, {"size": asdict(size), "toy": asdict(toy_size)}, 0, resume=folder.exists()) as run:
        toy = labels_toy.run(folder / "toy", toy_size, run.note)
        world = prepare(run, size, args.reviews)
        stage = run.stage("curves")
        bought = stage.result() or stage.finish(curves(world, size))
        found = findings(world, size, bought, policies(run, world, size))
    words = [*verdict(found["compared"], "features"), *verdict(toy["compared"], "toy")]
    results = {
        "command": common.command(),
        **common.machine(),
        "size": asdict(size),
        "gold_accuracy": world.task.facts.get("gold_accuracy"),
        "features": found,
        "toy": {"size": asdict(toy_size), **toy},
        "verdict": words,
    }
    common.write(args.json, results)
    show(found, toy, words)
    return results


if __name__ == "__main__":
    main()
