"""How fast a chooser of prompts is fitted and asked, beside what one would otherwise take, and how its cost grows.

    python bench/prompts.py --data DIR --json docs/results/prompts_speed.json

DIR holds llama2_gsm8k.jsonl.gz and prompts.json: 8,473 questions under six prompts, 50,838 trials. Rates are trials, pairs or
rows a second, the ratio ours over the peer's.

    fit       the stack of `tokenmdp prompts fit`, with its five fits of each member and the gain it measures, on 70 % of
              the questions; the peer is the published recipe: 2,000 trees, depth 10, rate 0.001, on the same features,
              fitted once. Beside the rates: what either is worth on the other questions, and the memory of ours
    choose    Υ of every query under 16 prompts from features that are there: against the same trees asked by scikit-learn
              on pairs written out
    rows      ours on made-up logs of 10,000, 100,000 and 1,000,000 trials: the exponent of seconds against trials

Thresholds, stated before any run: 45,000 trials fitted in less than 60 s on two cores and in less than 2 GB; 2,000 queries a second
or more under 16 prompts; an exponent below 1.1.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier

import common
from prompt_logs import read
from tokenmdp.prompting import choose, judged, leaks, proxy, splits, stacked
from tokenmdp.prompting.features import Once
from tokenmdp.prompting.log import Log

SECONDS, GIGABYTES, RATE, EXPONENT = 60.0, 2.0, 2000.0, 1.1
PROMPTS, SIZES, QUICK_SIZES = 16, (10_000, 100_000, 1_000_000), (320, 640)
RECIPE = {"max_iter": 2000, "max_depth": 10, "learning_rate": 0.001, "max_leaf_nodes": None, "early_stopping": False}


def gigabytes() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def fit(log: Log, runs: int, trees: int) -> dict[str, Any]:
    """Ours and the recipe, on the same questions, judged on the others."""
    learned, held = splits.halves(leaks.groups(log.queries), 0.3, 0)
    part, rest = log.of_queries(learned), log.of_queries(held)
    texts = [log.queries[i] for i in held]
    constant = np.full(len(log.queries), choose.best_constant(part))
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        chooser = choose.Chooser().fit(part)
        seconds.append(time.perf_counter() - start)
    memory = gigabytes()

    def worth(value: NDArray[np.float64]) -> dict[str, Any]:
        whole = np.full((len(log.queries), len(log.prompts)), np.nan)
        whole[held] = value
        found = judged.choices(rest, {"pick": choose.best(whole)}, constant)["pick"]["over_constant"]
        said = judged.prediction(rest, whole)
        return {"over_constant": found, "auc_within_prompt": said["auc_within_prompt"], "ece": said["ece"]}

    table = proxy.Boosted()
    start = time.perf_counter()
    table.learn_texts(part)
    x = table.trials(part)
    recipe = HistGradientBoostingClassifier(**{**RECIPE, "max_iter": trees}).fit(x, part.reward)
    took = time.perf_counter() - start
    left, right = table.query_side.transform(texts), table.prompt_rows(log.prompts)
    said = recipe.predict_proba(crossed(left, right))[:, 1].reshape(len(texts), -1)
    return common.row(
        [len(part) / s for s in seconds],
        [len(part) / took],
        "trials/s",
        trials=len(part),
        seconds=statistics.median(seconds),
        seconds_of_45000=statistics.median(seconds) * 45_000 / len(part),
        peer_seconds=took,
        gigabytes=memory,
        ours_on_others=worth(chooser.value(texts)),
        peer_on_others=worth(said),
    )


def crossed(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """[Q · P, D + D'] every query's features beside every prompt's."""
    return np.concatenate([np.repeat(left, len(right), 0), np.tile(right, (len(left), 1))], axis=1)


def choice(log: Log, runs: int) -> dict[str, Any]:
    """The stack under 16 prompts; the peer asks only its trees."""
    once = Once()
    chooser = choose.Chooser(lambda: stacked.Stacked(stacked.usual(once)), abstain=False).fit(log)
    chooser.prompts = tuple(f"{log.prompts[i % len(log.prompts)]} ({i})" for i in range(PROMPTS))
    chooser.charge = np.zeros(PROMPTS)
    boosted = chooser.proxy.proxies[1]
    settings = {"max_iter": boosted.trees, "max_leaf_nodes": boosted.leaves, "learning_rate": boosted.rate}
    peer = HistGradientBoostingClassifier(**settings, early_stopping=False).fit(boosted.trials(log), log.reward)
    left, right = boosted.query_side.transform(log.queries), boosted.prompt_rows(chooser.prompts)

    def ours() -> float:
        chooser.choose(log.queries)
        return float(len(log.queries))

    def theirs() -> float:
        peer.decision_function(crossed(left, right)).reshape(len(left), -1).argmax(1)
        return float(len(log.queries))

    rates = common.alternate({"ours": ours, "peer": theirs}, runs, "choosing")
    return common.row(rates["ours"], rates["peer"], "queries/s", prompts=PROMPTS, queries=len(log.queries))


def generated(trials: int) -> Log:
    """Queries of made-up words under 16 prompts, each tried once on each; rewards depend on both."""
    rng = np.random.default_rng(0)
    count = trials // PROMPTS
    vocabulary = np.asarray([f"word{i}" for i in range(5000)])
    words = np.minimum(rng.zipf(1.3, (count, 30)), 5000) - 1
    queries = tuple(f"{i} " + " ".join(vocabulary[row]) for i, row in enumerate(words))
    prompts = tuple(f"Do it in way {i}." for i in range(PROMPTS))
    query, prompt = np.repeat(np.arange(count), PROMPTS), np.tile(np.arange(PROMPTS), count)
    score = np.sin(words[:, 0])[query] + 0.5 * np.cos(words[:, 1][query] + prompt)
    reward = (rng.random(len(query)) < 1 / (1 + np.exp(-score))).astype(np.float64)
    return Log(queries, tuple(map(str, range(count))), prompts, prompts, query, prompt, reward, query * 0)


def rows(trials: int) -> tuple[float, float]:
    """Seconds and gigabytes of a fit of so many made-up trials, in a process of its own: memory is a process's most."""
    line = [sys.executable, str(Path(__file__).resolve()), "--data", ".", "--trials", str(trials)]
    said = subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()
    return float(said[0]), float(said[1])


def measure(log: Log, runs: int, quick: bool) -> dict[str, dict[str, Any]]:
    """All rows."""
    found = {"fit": fit(log, runs, 20 if quick else RECIPE["max_iter"]), "choose": choice(log, runs)}
    sizes = QUICK_SIZES if quick else SIZES
    grown = {size: rows(size) for size in sizes}
    (few, (short, _)), (many, (long, _)) = min(grown.items()), max(grown.items())
    found["rows"] = common.row(
        [many / long],
        [few / short],
        "trials/s",
        exponent=math.log(long / short) / math.log(many / few),
        seconds={str(size): round(s, 1) for size, (s, _) in grown.items()},
        gigabytes={str(size): round(g, 2) for size, (_, g) in grown.items()},
    )
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--data", type=Path, metavar="DIR", required=True, help="where the published outcomes are")
    out.add_argument("--runs", type=int, default=0, help="runs a side")
    out.add_argument("--trials", type=int, default=0, help=argparse.SUPPRESS)
    args: argparse.Namespace = out.parse_args(argv)
    if args.trials:
        log = generated(args.trials)
        start = time.perf_counter()
        choose.Chooser().fit(log)
        print(time.perf_counter() - start, gigabytes())
        return {}
    log, six = read(args.data, "gsm8k")
    log = log.of_prompts(six).compact()
    log = log.of_queries(range(80)).compact() if args.quick else log
    start = time.perf_counter()
    found = measure(log, 1 if args.quick else args.runs or 3, args.quick)
    passed = {
        "seconds": found["fit"]["seconds_of_45000"] < SECONDS,
        "memory": found["fit"]["gigabytes"] < GIGABYTES,
        "choose": found["choose"]["ours"] >= RATE,
        "linear": found["rows"]["exponent"] < EXPONENT,
    }
    results: dict[str, Any] = {
        **found,
        "_meta": {
            "command": common.command().replace(str(args.data), "DIR"),
            **common.machine(),
            "passed": passed,
            "seconds": round(time.perf_counter() - start, 1),
        },
    }
    common.write(args.json, results)
    common.show("choosing prompts", found, "ours", "peer")
    for name, fine in passed.items():
        print(f"{'passed' if fine else 'FAILED'}: {name}")
    return results


if __name__ == "__main__":
    main()
