"""How fast a reward is fitted on cached embeddings, beside scikit-learn's own estimators on the same numbers.

    python bench/heads.py --json docs/results/heads.json

10,000 pairs of made-up embeddings of width 576, the embedded model's, with labels drawn by a linear reward. Each head is
fitted by us and by the peer a user would otherwise take, in turns; a rate is pairs a second, the ratio ours over the
peer's. What the peer is told differs as little as its interface allows:

    linear      LogisticRegression (lbfgs) on differences, no intercept, the same ridge
    mlp         MLPClassifier on sides (relu), as wide, with as many passes, sides a step and the same learning rate
    boosted     HistGradientBoostingClassifier on sides with the same settings: what copying its trees out costs

Threshold, stated before any run: each head is fitted on 10,000 cached pairs in less than five seconds on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor

import common
from tokenmdp.rewards import embedding_head
from tokenmdp.rewards.embedding_head import HEADS, fit

LIMIT_SECONDS = 5.0
PAIRS, WIDTH = 10_000, 576
QUICK_PAIRS, QUICK_WIDTH = 400, 32


def made(pairs: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs of correlated features, labelled by σ of twice the difference of a linear reward."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn((width, width), generator=rng) / width**0.5
    x, y = torch.randn((2, pairs, width), generator=rng) @ mix
    worth = torch.randn(width, generator=rng) / width**0.5
    first = torch.rand(pairs, generator=rng) < torch.sigmoid(2 * (x - y) @ worth)
    return torch.where(first[:, None], x, y), torch.where(first[:, None], y, x)


def peers(chosen: Tensor, rejected: Tensor) -> dict[str, Callable[[], Any]]:
    """What fits each head in scikit-learn, from the same arrays."""
    both = torch.cat([chosen, rejected])
    scaled = ((both - both.mean(0)) / both.std(0, unbiased=False)).numpy()
    labels = np.repeat([1, 0], [len(chosen), len(rejected)])
    difference = scaled[: len(chosen)] - scaled[len(chosen) :]
    ridge = float(np.square(difference).sum(1).mean())
    half = np.full(2 * len(difference), 0.5)
    head = embedding_head

    def linear() -> None:
        peer = LogisticRegression(C=1 / ridge, fit_intercept=False, max_iter=1000, tol=1e-6)
        peer.fit(np.concatenate([difference, -difference]), labels, sample_weight=half)

    def mlp() -> None:
        rows = min(2 * head.ROWS, len(scaled))
        size = {"hidden_layer_sizes": (head.HIDDEN,), "batch_size": rows, "max_iter": head.EPOCHS}
        peer = MLPClassifier(**size, learning_rate_init=head.RATE, tol=0.0, n_iter_no_change=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it stops after as many passes as ours
            peer.fit(scaled, labels)

    def boosted() -> None:
        HistGradientBoostingClassifier(
            max_iter=head.TREES,
            max_leaf_nodes=head.LEAVES,
            learning_rate=head.SHRINKAGE,
            min_samples_leaf=head.LEAF_ROWS,
            l2_regularization=1.0,
            early_stopping=False,
        ).fit(both.double().numpy(), labels)

    return {"linear": linear, "mlp": mlp, "boosted": boosted}


def measure(pairs: int, width: int, runs: int) -> dict[str, dict[str, Any]]:
    """A row a head: our rate, the peer's, and the seconds of our median fit."""
    chosen, rejected = made(pairs, width)
    other = peers(chosen, rejected)
    rows = {}
    for name in HEADS:

        def ours(name: str = name) -> float:
            fit(chosen, rejected, name)
            return float(pairs)

        def theirs(name: str = name) -> float:
            other[name]()
            return float(pairs)

        rates = common.alternate({"ours": ours, "peer": theirs}, runs, name)
        seconds = pairs / statistics.median(rates["ours"])
        rows[name] = common.row(
            rates["ours"], rates["peer"], "pairs/s", seconds=round(seconds, 3), within=seconds < LIMIT_SECONDS
        )
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--threads", type=int, default=0, help="threads of torch; 0 leaves torch's choice")
    out.add_argument("--runs", type=int, default=0, help="runs a side")
    args: argparse.Namespace = out.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    pairs, width = (QUICK_PAIRS, QUICK_WIDTH) if args.quick else (PAIRS, WIDTH)
    start = time.perf_counter()
    rows = measure(pairs, width, common.runs_of(args))
    results: dict[str, Any] = {
        **rows,
        "_meta": {
            "command": common.command(),
            **common.machine(),
            "pairs": pairs,
            "width": width,
            "threshold": f"each head fitted on {PAIRS:,} pairs in less than {LIMIT_SECONDS:g} seconds on two cores",
            "passed": all(row["within"] for row in rows.values()),
            "seconds": round(time.perf_counter() - start, 1),
        },
    }
    common.write(args.json, results)
    common.show(f"fitting a head on {pairs:,} cached pairs of width {width}", rows, "ours", "peer")
    for name, row in rows.items():
        print(f"{'passed' if row['within'] else 'FAILED'}: {name}, {row['seconds']:.2f} s for {pairs:,} pairs")
    return results


if __name__ == "__main__":
    main()
