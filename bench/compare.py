"""Every solver on one task, at several seeds: who learns, who does not, and how sure that is.

    python bench/compare.py char --json docs/results/compare_char.json
    python bench/compare.py char-long --json docs/results/compare_char_long.json
    python bench/compare.py sentiment --json docs/results/compare_sentiment.json
    python bench/compare.py arithmetic --json docs/results/compare_arithmetic.json

`char` is addition, a character at a time, on the tiny model: every solver, five seeds, each solver's learning rate
chosen from three beforehand. `char-long` gives those online solvers that missed the threshold of `char` four times the
tokens, beside one that did not (a first try, from a start that was right in .53 of its answers, had no evolution, which was tried
with three times the noise in `char`). `sentiment` is the embedded model on movie reviews, scored by the gold classifier: one
solver of each family or two, three seeds; an hour on two cores that multiply bfloat16 in hardware, hours on others.
`arithmetic` is the same model on sums of one and two digits, after cloning some of them, scored by a verifier that says 0 or
1 (word problems take ten times the tokens a response: bench/rlvr.py has GRPO on them).
Each is one `tokenmdp compare` in runs/compare-NAME, whose page is report.html there. What is finished is not run again,
and what was killed goes on where it stopped; --fresh begins anew. Judged by what was stated before any run:

    start        `char`, `char-long`: the start is right in 30 to 50 % of sampled responses, so that there is something to learn and
                 something to learn from
    on_policy    the same: every online solver beats its start at every seed: the 95 % interval of the difference, paired by
                 held-out prompt, is above 0. Who does not is named
    tokens       every solver that samples or clones spends the budget within 5 %
    policy_gradient  `arithmetic`: of rloo, grpo and ppo one or more beat their start at every seed
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import common

FLAGS: dict[str, dict[str, Any]] = {
    "char": {"task": "addition", "solvers": "all", "seeds": 5, "tune": True, "workers": 2},
    "char-long": {
        "task": "addition",
        "solvers": "rloo,online-dpo,bon-distill,soft-q,evolution",
        "seeds": 5,
        "warm-score": 0.45,
        "budget-tokens": 240_000,
        "tune": True,
        "workers": 2,
    },
    "sentiment": {
        "task": "sentiment",
        "model": "smollm2-135m-instruct",
        "solvers": "rloo,grpo,ppo,raft,dpo,kto,awr,best-of-n",
        "seeds": 3,
        "budget-tokens": 15_360,
        "warm-steps": 40,
        "warm-learning-rate": 1e-4,
        "warm-score": 1e9,  # all 40 steps
        "prompts": 16,
        "samples": 4,
        "max-new-tokens": 24,
        "kl": 0.05,
        "rate": 0.1,
        "train": "top-10",
        "held-out": 64,
        "answers": 4,
        "micro-tokens": 2048,
        "workers": 2,
    },
    "arithmetic": {
        "task": "addition",
        "model": "smollm2-135m-instruct",
        "solvers": "rloo,grpo,ppo,raft,dpo,awr,best-of-n",
        "seeds": 3,
        "budget-tokens": 8_000,
        "warm-steps": 200,
        "warm-learning-rate": 1e-4,
        "warm-score": 0.35,
        "prompts": 8,
        "samples": 8,
        "max-new-tokens": 4,
        "kl": 0.01,
        "rate": 0.05,
        "train": "top-10",
        "held-out": 200,
        "answers": 4,
        "micro-tokens": 2048,
        "workers": 2,
    },
}
POLICY_GRADIENT = ("rloo", "grpo", "ppo")
QUICK = {"solvers": "rloo,dpo,awr", "seeds": 2, "budget-tokens": 2000, "held-out": 40, "answers": 2, "workers": 1}
START, TOKENS_WITHIN = (0.3, 0.5), 0.05
THRESHOLDS = {
    "start": f"the start is right in {START[0]:.0%} to {START[1]:.0%} of held-out responses",
    "on_policy": "every online solver beats its start at every seed",
    "tokens": f"tokens within {TOKENS_WITHIN:.0%} of the budget for all that spend any",
    "policy_gradient": f"of {', '.join(POLICY_GRADIENT)} one or more beat their start at every seed",
}


def command_of(flags: Mapping[str, Any], folder: Path, seed: int, fresh: bool) -> list[str]:
    """The comparison as a command."""
    words = [sys.executable, "-m", "tokenmdp", "compare", "--out", str(folder), "--seed", str(seed)]
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [] if value is False else [f"--{name}", str(value)]
    return [*words, "--overwrite" if fresh and (folder / "config.json").exists() else "--resume"]


def line_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a solver."""

    def ends(interval: Mapping[str, Any] | None) -> list[float | None] | None:
        if interval is None:
            return None
        return [None if interval[k] is None else round(interval[k], 4) for k in ("mean", "low", "high")]

    kept = {key: row[key] for key in ("family", "learning_rate", "failures", "runs", "messages")}
    numbers = {key: None if row[key] is None else round(row[key], 4) for key in ("greedy", "kl", "tokens", "seconds")}
    return {
        **kept,
        "scores": [round(x, 4) for x in row["scores"]],
        "iqm": ends(row["iqm"]),
        "gain": ends(row["gain"]),
        "improvement": {other: ends(interval) for other, interval in row["improvement"].items()},
        **numbers,
        "curve": mean_curve(row["curves"]),
    }


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """[tokens, score] of the training responses, the mean over seeds; empty for solvers without a curve."""
    known = [np.asarray(curve) for curve in curves if len(curve) > 1]
    if not known:
        return []
    x = np.linspace(max(c[0, 0] for c in known), min(c[-1, 0] for c in known), min(len(c) for c in known))
    y = np.mean([np.interp(x, c[:, 0], c[:, 1]) for c in known], axis=0)
    return [[round(float(a)), round(float(b), 4)] for a, b in zip(x, y, strict=True)]


def judged(name: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Each threshold that is stated for this comparison; who falls short is named."""
    rows = {row["solver"]: row for row in summary["rows"]}
    budget = summary["budget_tokens"]
    spent = {n: row["tokens"] for n, row in rows.items() if row["tokens"]}
    off = sorted(n for n, tokens in spent.items() if abs(tokens / budget - 1) > TOKENS_WITHIN)
    found: dict[str, Any] = {"tokens": {"passed": not off, "not": off}}
    if name.startswith("char"):
        slow = sorted(n for n, row in rows.items() if row["family"] == "online" and row["failed"])
        level = rows["start"]["iqm"]["mean"]
        found["on_policy"] = {"passed": not slow, "not": slow}
        found["start"] = {"passed": bool(START[0] <= level <= START[1]), "score": round(level, 4)}
    if name == "arithmetic":
        beat = [n for n in POLICY_GRADIENT if n in rows and not rows[n]["failed"]]
        found["policy_gradient"] = {"passed": bool(beat), "beat": beat}
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("which", choices=tuple(FLAGS))
    out.add_argument("--seed", type=int, default=0, help="of the start and of what all seeds follow from")
    out.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folder is")
    out.add_argument("--fresh", action="store_true", help="begin anew")
    args: argparse.Namespace = out.parse_args(argv)
    flags = {**FLAGS[args.which], **(QUICK | {"tune": False} if args.quick else {})}
    folder = args.runs / f"compare-{args.which}{'-quick' * args.quick}"
    code = subprocess.run(command_of(flags, folder, args.seed, args.fresh), check=False).returncode
    if code != 0:
        raise RuntimeError(f"the comparison in {folder} ended with code {code}; the same command goes on from there")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    shared = (
        "title",
        "task",
        "model",
        "judge",
        "seed",
        "seeds",
        "budget_tokens",
        "held_out",
        "answers",
        "tuning",
        "start",
    )
    results: dict[str, Any] = {
        "command": common.command(),
        "runs": summary["command"],
        **common.machine(),
        **{key: summary[key] for key in shared},
        "verdict": summary["verdict"],
        "thresholds": THRESHOLDS,
        "passed": judged(args.which, summary),
        "solvers": {row["solver"]: line_of(row) for row in summary["rows"]},
    }
    common.write(args.json, results)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for name, found in results["passed"].items():
        console.print(f"{'passed' if found['passed'] else 'FAILED'}: {THRESHOLDS[name]} {found}", highlight=False)
    return results


if __name__ == "__main__":
    main()
