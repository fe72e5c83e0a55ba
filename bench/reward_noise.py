"""Reward models under label noise: classifier against Bradley-Terry, frozen embeddings against a fine-tuned body.

    python bench/reward_noise.py --json docs/results/reward_noise.json

The texts are openings of real movie reviews, the first two tokens of each being the prompt, so that many share one. Gold
is the sentiment task's classifier, trained on reviews that are not among them. A replicate (a seed) divides the prompts
anew, pairs texts of one prompt (or of two prompts) at random, and turns a share of the labels to learn from the wrong way
round, 0 to 40 %; the labels to judge by are gold's own. Compared are

    heads       linear, mlp and boosted on embeddings of the policy's own body and of a small sentence encoder, under both
                objectives (boosted trees know the classifier only)
    bodies      the top four blocks and a head, trained on a smaller number of pairs at two noise levels, under both
                objectives; and the heads again on exactly these pairs
    controls    a linear head that sees only the length in characters, and the constant, which is right half of the time

Cost is seconds (embedding once, fitting, training) and the most memory. Intervals are over replicates, differences are
paired by replicate. Thresholds, stated before any run:

    classifier      it resists noise better if at 30 and 40 % flipped labels, pairs of one prompt, the 95 % interval of its
                    accuracy minus Bradley-Terry's is above 0 for linear and mlp on every embedding; worse if all are below 0
    controls        up to 30 % noise, pairs of one prompt, each head's lower end is above one half and above the mean of the
                    length-only control
    frozen          the linear Bradley-Terry head on the own body's embeddings keeps up with the fine-tuned Bradley-Terry
                    body at equal pairs: the interval of head minus body reaches above −0.02 at both noise levels

What is finished is not run again, and a killed run goes on; --fresh begins anew. About 25 minutes on two cores without
matrix units.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import common
import noise_figures
from tokenmdp.functional import preference
from tokenmdp.models import catalog, embedding
from tokenmdp.models.embedding_cache import Cache, embedded
from tokenmdp.models.policy import Policy
from tokenmdp.recipes import reward_model
from tokenmdp.rewards import comparisons
from tokenmdp.rewards.embedding_head import Head, fit
from tokenmdp.run import Run
from tokenmdp.tasks import data, sentiment
from tokenmdp.types import Batch, Pairs

THRESHOLDS = {
    "classifier": "at 30 and 40 % noise, pairs of one prompt, the interval of classifier minus Bradley-Terry above 0 for "
    "linear and mlp on every embedding (worse: below 0 in all)",
    "controls": "up to 30 % noise, pairs of one prompt, each head's lower end above 0.5 and above the mean of length-only",
    "frozen": "the interval of linear Bradley-Terry head on own embeddings minus fine-tuned Bradley-Terry body, equal "
    "pairs, reaches above -0.02 at both noise levels",
}
FITS = (
    ("linear", "bradley_terry"),
    ("linear", "classifier"),
    ("mlp", "bradley_terry"),
    ("mlp", "classifier"),
    ("boosted", "classifier"),
)
OBJECTIVES = ("bradley_terry", "classifier")
KINDS = ("same", "cross")


@dataclass(frozen=True)
class Size:
    """What the full and the quick size differ in."""

    model: str
    embeddings: tuple[str, ...]
    reviews: int  # texts
    prefix_tokens: int
    horizon: int
    gold: int  # reviews the gold classifier learns from, and a fifth as many that measure it
    pairs: int  # learned from by heads
    judged: int  # held out, of each kind
    held_out: float  # share of the prompts they come from
    noise: tuple[float, ...]
    seeds: int  # replicates of the heads
    body: reward_model.Config
    body_pairs: int
    body_noise: tuple[float, ...]
    body_seeds: int


FULL = Size(
    model="smollm2-135m-instruct",
    embeddings=("own", "minilm"),
    reviews=12_000,
    prefix_tokens=2,
    horizon=32,
    gold=5000,
    pairs=1800,
    judged=600,
    held_out=0.3,
    noise=(0.0, 0.1, 0.2, 0.3, 0.4),
    seeds=5,
    body=reward_model.Config(
        epochs=2, rows=16, learning_rate=1e-4, head_learning_rate=5e-3, warmup=4, train="top-4", pool="mean"
    ),
    body_pairs=800,
    body_noise=(0.0, 0.3),
    body_seeds=3,
)
QUICK = Size(
    model="tiny",
    embeddings=("own",),
    reviews=500,
    prefix_tokens=2,
    horizon=12,
    gold=100,
    pairs=120,
    judged=40,
    held_out=0.3,
    noise=(0.0, 0.3, 0.4),
    seeds=2,
    body=reward_model.Config(
        epochs=1, rows=16, learning_rate=2e-3, head_learning_rate=1e-2, warmup=1, pool="mean", micro_tokens=8192
    ),
    body_pairs=60,
    body_noise=(0.0, 0.3),
    body_seeds=2,
)


# Texts, gold, pairs ----------------------------------------------------------------------------------------------------


def made(path: Path, count: int = 720) -> Path:
    """Made-up reviews that begin in few ways: what the quick size reads."""
    draw = random.Random(0)
    words = {1: ["great", "lovely", "superb", "fun"], 0: ["awful", "boring", "dull", "poor"]}
    first, second = ["The", "This", "Their", "One"], ["film", "story", "cast", "scene", "plot"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["text", "label"])
        for i in range(count):
            said = [draw.choice([*words[i % 2], *second, *words[draw.randrange(2)][:2]]) for _ in range(24)]
            out.writerow([" ".join([draw.choice(first), draw.choice(second), *said, f"number {i}"]), i % 2])
    return path


def begin(size: Size, runs: Path) -> tuple[Policy, Batch, Tensor, dict[str, Any]]:
    """The policy, the texts, gold's score of each, and what is known of gold."""
    source = made(runs / "reward-noise-made.csv") if size.model == "tiny" else None
    policy = catalog.tiny(sentiment.texts(300, source=source), 600) if source else catalog.load(size.model)
    policy.freeze()
    task = sentiment.load(
        policy,
        size.prefix_tokens,
        size.horizon,
        gold=size.gold,
        gold_test=size.gold // 5,
        demonstrations=size.reviews,
        train=1,
        held_out=1,
        source=source,
    )
    assert task.demonstrations is not None, "the sentiment task brings texts"
    assert task.reward is not None, "and its gold reward"
    return policy, task.demonstrations, task.reward(task.demonstrations).value, dict(task.facts)


def replicate(size: Size, texts: Batch, gold: Tensor, seed: int) -> dict[str, tuple[Pairs, Pairs]]:
    """The pairs of a seed to learn from and to judge by, of one prompt and of two; no prompt is in both."""
    worth = dict(zip((p.row for p in texts.prompts), gold.tolist(), strict=True))
    rng = torch.Generator().manual_seed(seed)
    parts = data.split(texts, size.held_out, rng, by_prompt=True)
    found = {}
    for kind in KINDS:
        both = []
        for part, count in zip(parts, (size.pairs, size.judged), strict=True):
            score = torch.tensor([worth[p.row] for p in part.prompts])
            pairs, _ = comparisons.compared(part, score, rng, across=kind == "cross")
            if len(pairs) < count:
                raise ValueError(
                    f"seed {seed} makes {len(pairs)} pairs of {kind} prompts, {count} are asked for: read more reviews"
                )
            shuffled = torch.randperm(len(pairs), generator=rng)
            both.append(pairs.select(shuffled[:count]))
        found[kind] = (both[0], both[1])
    return found


def noisy(pairs: Pairs, share: float, seed: int) -> Pairs:
    """The pairs with a share of labels flipped; the flips of less noise are among those of more."""
    return comparisons.flipped(pairs, share, torch.Generator().manual_seed(1_000_003 + seed))[0]


# Stages ----------------------------------------------------------------------------------------------------------------


def staged(run: Run, name: str, work: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
    """A stage's result: from its folder when it is done, else by doing it."""
    stage = run.stage(name)
    done = stage.result()
    return done if done is not None else stage.finish(work(stage))


def read(run: Run, size: Size, policy: Policy, texts: Batch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The embeddings of all texts by each embedder, and what they cost the first time."""
    found, cost = {}, {}
    for name in size.embeddings:
        embedder = embedding.load(name, policy)
        cache = Cache(run.folder / "embeddings", embedder)

        def work(stage: Run, embedder: embedding.Embedder = embedder, cache: Cache = cache) -> dict[str, Any]:
            start = time.perf_counter()
            with stage.progress(len(texts), f"embedding by {embedder.name}", "texts") as bar:
                embedded(embedder, texts, cache, bar.advance)
            seconds = time.perf_counter() - start
            return {"texts": len(texts), "width": embedder.width, "seconds": seconds, "peak_gb": peak()}

        cost[name] = staged(run, f"embed-{name}", work)
        found[name] = embedded(embedder, texts, cache)
    return found, cost


class Features:
    """Embeddings of the sides of pairs, looked up by the row of the text."""

    def __init__(self, texts: Batch, values: Mapping[str, Tensor]) -> None:
        self.at = {p.row: i for i, p in enumerate(texts.prompts)}
        length = torch.tensor([[float(len(text))] for text in texts.texts])
        self.values = {**values, "length": length}

    def __call__(self, name: str, pairs: Pairs) -> tuple[Tensor, Tensor]:
        chosen, rejected = ([self.at[p.row] for p in side.prompts] for side in (pairs.chosen, pairs.rejected))
        return self.values[name][chosen], self.values[name][rejected]


def right(head: Head, sides: tuple[Tensor, Tensor]) -> float:
    """The share of pairs whose better side scores higher."""
    return float(preference.ranked_right(head.score(sides[0]), head.score(sides[1])).mean())


def heads(
    size: Size, features: Features, pairs: Mapping[str, tuple[Pairs, Pairs]], seed: int, stage: Run
) -> dict[str, Any]:
    """Every head of a seed: accuracy on held-out pairs and seconds to fit."""
    jobs = [(kind, size.pairs, noise) for kind in KINDS for noise in size.noise]
    jobs += [("same", size.body_pairs, noise) for noise in size.body_noise]
    cells = []
    with stage.progress(len(jobs) * len(size.embeddings), f"heads, seed {seed}", "sets") as bar:
        for kind, count, noise in jobs:
            learned, judged = pairs[kind]
            spoiled = noisy(learned.select(range(count)), noise, seed)
            fits = [(name, head, objective) for name in size.embeddings for head, objective in FITS]
            for name, head, objective in [*fits, ("length", "linear", "bradley_terry")]:
                start = time.perf_counter()
                found = fit(*features(name, spoiled), head, objective, seed=seed)
                seconds = time.perf_counter() - start
                cell = {"kind": kind, "pairs": len(spoiled), "noise": noise, "embedding": name}
                cell |= {"head": head, "objective": objective, "seed": seed, "seconds": seconds}
                cell["accuracy"] = right(found, features(name, judged))
                if noise == 0 and count == size.pairs:  # fitted on one kind of pairs, judged on the other
                    other = pairs["cross" if kind == "same" else "same"][1]
                    cell["accuracy_other_kind"] = right(found, features(name, other))
                cells.append(cell)
            bar.advance(len(size.embeddings))
    return {"cells": cells, "judged": {kind: len(judged) for kind, (_, judged) in pairs.items()}}


def body(
    size: Size, policy: Policy, pairs: tuple[Pairs, Pairs], objective: str, noise: float, seed: int, stage: Run
) -> dict[str, Any]:
    """A fine-tuned body: accuracy on the same held-out pairs, and seconds to train and to judge."""
    learned, judged = pairs
    spoiled = noisy(learned.select(range(size.body_pairs)), noise, seed)
    cfg = reward_model.Config(**{**asdict(size.body), "objective": objective})
    start = time.perf_counter()
    reward, figures = reward_model.train(cfg, policy, spoiled, judged, stage)
    del reward
    return {
        "kind": "same",
        "pairs": len(spoiled),
        "noise": noise,
        "embedding": "none",
        "head": "body",
        "objective": objective,
        "seed": seed,
        "seconds": time.perf_counter() - start,
        "accuracy": figures["accuracy"],
        "peak_gb": peak(),
    }


def peak() -> float:
    """The most memory this process has had, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


# The run ---------------------------------------------------------------------------------------------------------------


def opened(folder: Path, size: Size, fresh: bool) -> Run:
    """The run folder."""
    again = fresh and (folder / "config.json").exists()
    return Run.open(folder, asdict(size), 0, resume=not again, overwrite=again)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    out.add_argument("--fresh", action="store_true", help="begin everything anew")
    args: argparse.Namespace = out.parse_args(argv)
    size, name = (QUICK, "reward-noise-quick") if args.quick else (FULL, "reward-noise")
    policy, texts, gold, facts = begin(size, args.runs)
    with opened(args.runs / name, size, args.fresh) as run:
        values, embedding_cost = read(run, size, policy, texts)
        features, cells, judged = Features(texts, values), [], {}
        for seed in range(size.seeds):
            pairs = replicate(size, texts, gold, seed)
            done = staged(run, f"heads-seed-{seed}", lambda stage, p=pairs, s=seed: heads(size, features, p, s, stage))
            cells += done["cells"]
            judged = done["judged"]
        heads_gb = peak()
        for seed, noise, objective in itertools.product(range(size.body_seeds), size.body_noise, OBJECTIVES):
            pairs = replicate(size, texts, gold, seed)
            cells.append(
                staged(
                    run,
                    f"body-{objective}-{noise:g}-seed-{seed}",
                    lambda stage, p=pairs["same"], o=objective, n=noise, s=seed: body(size, policy, p, o, n, s, stage),
                )
            )
        run.finish({})
    rows = noise_figures.table(cells)
    found = noise_figures.verdicts(rows, size.pairs, size.body_noise)
    results: dict[str, Any] = {
        "command": common.command(),
        "size": "quick" if args.quick else "full",
        **common.machine(),
        "model": size.model,
        "settings": asdict(size),
        "gold": facts,
        "texts": len(texts),
        "judged_pairs_a_seed": judged,
        "constant": 0.5,
        "embedding_cost": embedding_cost,
        "peak_gb": {"heads": heads_gb, "bodies": max(c.get("peak_gb", 0.0) for c in cells)},
        "rows": rows,
        "objectives": noise_figures.compared(rows),
        "thresholds": THRESHOLDS,
        "passed": {key: value["passed"] for key, value in found.items()},
        "verdict": {key: value["words"] for key, value in found.items()},
    }
    common.write(args.json, results)
    show(results)
    return results


def show(results: Mapping[str, Any]) -> None:
    """Print a line a head with a column a noise level, pairs of one prompt; then the verdicts."""
    levels = results["settings"]["noise"]
    shown = Table(title="accuracy on held-out pairs of one prompt, by share of flipped labels", title_justify="left")
    for name in ("pairs", "embedding", "head", "objective", *(f"{level:.0%}" for level in levels), "seconds"):
        shown.add_column(name, justify="left" if name in ("embedding", "head", "objective") else "right")
    lines: dict[tuple[Any, ...], dict[float, Mapping[str, Any]]] = {}
    for row in noise_figures.find(results["rows"], kind="same"):
        key = (row["pairs"], row["embedding"], row["head"], row["objective"])
        lines.setdefault(key, {})[row["noise"]] = row
    for key, cells in lines.items():
        seconds = f"{np.median([row['seconds'] for row in cells.values()]):.2f}"
        shown.add_row(*map(str, key), *(noise_figures.said(cells.get(level)) for level in levels), seconds)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(shown)
    for name, words in results["verdict"].items():
        console.print(f"{'passed' if results['passed'][name] else 'FAILED'}: {name}, {words}", highlight=False)


if __name__ == "__main__":
    main()
