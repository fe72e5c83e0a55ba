"""Choosing prompts per query from a published log: does it pay on clean splits, what was the leak worth, who estimates it well?

    python bench/prompt_logs.py llama2 --data DIR --json docs/results/prompts_llama2.json
    python bench/prompt_logs.py leak   --data DIR --json docs/results/prompts_leak.json
    python bench/prompt_logs.py ope    --data DIR --json docs/results/prompts_ope.json

DIR holds llama2_{gsm8k,mawps,svamp}.jsonl.gz and prompts.json: real outcomes of LLaMA-2-7B-chat under six published prompts (ten
more on part of the questions), one row a question with `correct: {prompt_id: 0 or 1}`. No language model is called.

`llama2` holds every question out once (five folds of whole questions) and compares, paired by question: a random prompt, the
best constant prompt of the training part, each proxy's pick, the pick that abstains, the oracle. Then K = 1 … 6 training
prompts with the others unseen, and ten prompts of GSM8K that no proxy was trained on. `leak` measures the published splits:
what share of held-out rows repeats a training question, and how much better than on clean splits everything looks there.
`ope` draws logs from the full matrix by a known policy, so that the truth is known, and asks for each estimator's bias,
spread and coverage. Thresholds, stated before any run (with the boosted proxy in the place of the stack; that what suits a query
needs a weight of its own was learned in a pilot on these very questions, so that the stack's gains are not blind):

    auc       GSM8K, clean: within-prompt AUC of the stacked proxy at or above .65
    pick      each set: the abstaining pick's reward at or above the best constant's
    detector  MAWPS and SVAMP: at least 95 % of published held-out rows repeat a training question; GSM8K: below 1 %
    coverage  DR: 95 % intervals hold the truth in 90 to 99 % of logs, at every log size
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import common
from tokenmdp.prompting import choose, estimate, judged, leaks, proxy, splits, stacked
from tokenmdp.prompting import log as logs
from tokenmdp.prompting.features import Once
from tokenmdp.prompting.log import Log

SETS = ("gsm8k", "mawps", "svamp")
PROXIES = ("constant", "neighbours", "logistic", "factorised", "two-tower", "boosted", "logistic+boosted")
CHOICE, FOLDS, SEED = "logistic+boosted", 5, 0
AUC, REPEATS, COVERAGE = 0.65, 0.95, (0.90, 0.99)
SIZES, LOGS = (250, 1000, 4000), 200  # trials of a sub-sampled log, and how many logs of each size
THRESHOLDS = {
    "auc": f"GSM8K, clean: within-prompt AUC of {CHOICE} at or above {AUC}",
    "pick": "each set: the abstaining pick's reward at or above the best constant's",
    "detector": f"MAWPS and SVAMP: at least {REPEATS:.0%} of published held-out rows repeat a training question; GSM8K below 1 %",
    "coverage": f"DR intervals hold the truth in {COVERAGE[0]:.0%} to {COVERAGE[1]:.0%} of logs at every size",
}


def read(folder: Path, name: str) -> tuple[Log, list[int]]:
    """A set's log, and the numbers of its six published prompts."""
    texts = folder / "prompts.json"
    log = logs.read(folder / f"llama2_{name}.jsonl.gz", texts)
    published = [
        row["prompt_id"] for row in json.loads(texts.read_text(encoding="utf-8")) if row.get("source") == "published"
    ]
    return log, [log.prompt_ids.index(p) for p in published]


def cut(log: Log, quick: bool) -> Log:
    """The log, or its first 400 questions."""
    return log.of_queries(range(400)).compact() if quick else log


def rounded(value: Any) -> Any:
    """Numbers as results files write them."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items() if k != "calibration"}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return round(float(value), 4) if isinstance(value, float | np.floating) else value


# ------------------------------------------------------------ the published outcomes, on clean splits


def llama2(folder: Path, quick: bool, console: Console) -> dict[str, Any]:
    """Every set, every proxy, every question held out once."""
    out: dict[str, Any] = {"sets": {}}
    for name in SETS[:1] if quick else SETS:
        log, six = read(folder, name)
        log = cut(log.of_prompts(six).compact(), quick)
        start = time.monotonic()
        once = Once(kept=FOLDS * 5)
        makers = {which: stacked.named(which, once, seed=SEED) for which in (PROXIES[:3] if quick else PROXIES)}
        choice = "logistic" if quick else CHOICE
        values, constant = judged.held_out(log, makers, FOLDS, SEED)
        picks = {which: choose.best(value) for which, value in values.items() if which != "constant"}
        picks["abstaining"] = judged.abstaining(log, values[choice], constant, FOLDS, SEED)
        earned = judged.choices(log, picks, constant, SEED)
        out["sets"][name] = {
            "facts": dict(log.facts),
            "questions": len(np.unique(leaks.groups(log.queries))),
            "verdict": judged.in_words(earned, choice),
            "choices": earned,
            "prediction": {which: judged.prediction(log, value) for which, value in values.items()},
            "prompts_known": known_prompts(log, choice),
            "minutes": (time.monotonic() - start) / 60,
        }
        console.print(f"{name}: {out['sets'][name]['verdict']}", highlight=False)
    if not quick:
        out["ten_unseen_prompts"] = unseen_prompts(folder)
    out["passed"] = {
        "auc": out["sets"]["gsm8k"]["prediction"]["logistic" if quick else CHOICE]["auc_within_prompt"] >= AUC,
        "pick": all(s["choices"]["abstaining"]["over_constant"]["mean"] >= 0 for s in out["sets"].values()),
    }
    return out


def known_prompts(log: Log, choice: str) -> dict[str, Any]:
    """Training on the trials of K prompts, choosing among all: what is said of the prompts not trained on."""
    learned, held = splits.halves(leaks.groups(log.queries), 0.3, SEED)
    rest = log.of_queries(held)
    texts = [log.queries[i] for i in held]
    out = {}
    for count in range(1, len(log.prompts) + 1):
        part = log.of_queries(learned).of_prompts(range(count))
        value = np.full((len(log.queries), len(log.prompts)), np.nan)
        value[held] = stacked.named(choice, seed=SEED)().fit(part).predict(texts, log.prompts)
        constant = np.full(len(log.queries), choose.best_constant(part))
        earned = judged.choices(rest, {"pick": choose.best(value)}, constant, SEED)
        unseen = rest.of_prompts(range(count, len(log.prompts)))
        out[str(count)] = {
            "prompts": list(log.prompt_ids[:count]),
            "auc_within_prompt": judged.within_prompt_auc(rest, value[rest.query, rest.prompt]),
            "auc_within_unseen": judged.within_prompt_auc(unseen, value[unseen.query, unseen.prompt])
            if len(unseen)
            else None,
            "pick": earned["pick"],
            "constant": earned[judged.CONSTANT]["reward"],
        }
    return out


def unseen_prompts(folder: Path) -> dict[str, Any]:
    """GSM8K: a proxy of the six published prompts on the ten it never saw, on questions it never saw."""
    log, six = read(folder, "gsm8k")
    ten = [i for i in range(len(log.prompts)) if i not in six]
    asked = log.of_prompts(ten).tried()
    rest = log.of_queries(asked)
    part = log.of_queries(np.setdiff1d(log.tried(), asked)).of_prompts(six)
    value = np.full((len(log.queries), len(log.prompts)), np.nan)
    value[asked] = stacked.named(CHOICE, seed=SEED)().fit(part).predict([log.queries[i] for i in asked], log.prompts)
    among = np.where(np.isin(np.arange(len(log.prompts)), ten), value, -np.inf)
    constant = np.full(len(log.queries), choose.best_constant(part))
    unseen = rest.of_prompts(ten)
    score = value[unseen.query, unseen.prompt]
    return {
        "questions": len(asked),
        "auc_within_prompt": judged.within_prompt_auc(unseen, score),
        "auc": judged.auc(score, unseen.reward > 0.5),
        "choices": judged.choices(
            rest, {"among the ten": choose.best(among), "among all sixteen": choose.best(value)}, constant, SEED
        ),
    }


# ------------------------------------------------------------ the published splits


def leak(folder: Path, quick: bool, console: Console) -> dict[str, Any]:
    """What the detector says of each set's published split, and what the leak is worth."""
    out: dict[str, Any] = {"sets": {}}
    for name in SETS[1:2] if quick else SETS:
        log, six = read(folder, name)
        log = cut(log.of_prompts(six).compact(), quick)
        learned, held = log.of_part("train"), log.of_part("test")
        asked = held.tried()
        found = leaks.find([log.queries[i] for i in learned.tried()], [log.queries[i] for i in asked])
        rows = np.bincount(held.query, minlength=len(log.queries))[asked]  # a question that is asked twice leaks twice
        shares = {k: float((getattr(found, k) * rows).sum() / rows.sum()) for k in ("same", "near", "template")}
        out["sets"][name] = {
            "held_out_rows_that_repeat": shares,
            "published": on_split(log, learned, held),
            "by_question": on_split(log, *by_question(log, len(held) / len(log))),
        }
        worth = out["sets"][name]
        gained = worth["published"]["pick"]["reward"]["mean"] - worth["published"]["constant"]["mean"]
        clean = worth["by_question"]["pick"]["reward"]["mean"] - worth["by_question"]["constant"]["mean"]
        worth["worth_in_points"] = 100 * (gained - clean)
        console.print(
            f"{name}: {shares['same']:.1%} repeat; the leak is worth {worth['worth_in_points']:+.1f} points",
            highlight=False,
        )
    same = {name: s["held_out_rows_that_repeat"]["same"] for name, s in out["sets"].items()}
    out["passed"] = {
        "detector": all(share >= REPEATS if name != "gsm8k" else share < 0.01 for name, share in same.items())
    }
    return out


def by_question(log: Log, share: float) -> tuple[Log, Log]:
    """A clean split with about as much held out."""
    learned, held = splits.halves(leaks.groups(log.queries), share, SEED)
    return log.of_queries(learned), log.of_queries(held)


def on_split(log: Log, learned: Log, held: Log) -> dict[str, Any]:
    """The pick of a proxy that remembers well, and its predictions, on one split."""
    at = held.tried()
    value = np.full((len(log.queries), len(log.prompts)), np.nan)
    maker = proxy.Boosted(trees=400, rate=0.1, leaves=62, smallest=5, seed=SEED)
    value[at] = maker.fit(learned).predict([log.queries[i] for i in at], log.prompts)
    constant = np.full(len(log.queries), choose.best_constant(learned))
    earned = judged.choices(held, {"pick": choose.best(value)}, constant, SEED)
    said = judged.prediction(held, value)
    return {
        "pick": earned["pick"],
        "constant": earned[judged.CONSTANT]["reward"],
        **{k: said[k] for k in ("accuracy", "auc", "auc_within_prompt", "retest")},
    }


# ------------------------------------------------------------ off-policy estimates against the truth


def ope(folder: Path, quick: bool, console: Console) -> dict[str, Any]:
    """Logs drawn from the full matrix by a known policy; the target is a proxy's pick on questions it never saw."""
    log, six = read(folder, "gsm8k")
    log = cut(log.of_prompts(six).compact(), quick)
    learned, asked = splits.halves(leaks.groups(log.queries), 0.6, SEED)
    part = log.of_queries(learned)
    texts = [log.queries[i] for i in asked]
    value = stacked.named("logistic")().fit(part).predict(texts, log.prompts)
    truth = log.matrix()[asked]
    targets = {
        "per query": estimate.greedy(choose.best(value), len(log.prompts)),
        "best constant": estimate.greedy(np.full(len(asked), choose.best_constant(part)), len(log.prompts)),
    }
    rng = np.random.default_rng(SEED)
    loggers = {
        "uniform": np.full(truth.shape, 1 / truth.shape[1]),
        "skewed": np.tile(_skewed(truth.shape[1]), (len(truth), 1)),
    }
    out: dict[str, Any] = {"cells": []}
    for logger, mu in loggers.items():
        for target, policy in targets.items():
            worth = float((policy * truth).sum(1).mean())
            for size in (100,) if quick else SIZES:
                found = sampled(truth, mu, policy, value, size, 20 if quick else LOGS, rng)
                for name, (means, low, high) in found.items():
                    out["cells"].append(
                        {
                            "logger": logger,
                            "target": target,
                            "trials": size,
                            "estimator": name,
                            "truth": worth,
                            "bias": float(means.mean() - worth),
                            "bias_error": float(means.std() / len(means) ** 0.5),
                            "spread": float(means.std()),
                            "rmse": float(np.sqrt(((means - worth) ** 2).mean())),
                            "coverage": float(((low <= worth) & (worth <= high)).mean()),
                            "logs": len(means),
                        }
                    )
            console.print(f"{logger} log, {target}: truth {worth:.3f}", highlight=False)
    dr = [cell["coverage"] for cell in out["cells"] if cell["estimator"] == "dr"]
    out["passed"] = {"coverage": all(COVERAGE[0] <= c <= COVERAGE[1] for c in dr)}
    return out


def _skewed(prompts: int) -> NDArray[np.float64]:
    """A logging policy that halves its probability from prompt to prompt."""
    p = 0.5 ** np.arange(prompts)
    return np.asarray(p / p.sum())


def sampled(
    truth: NDArray[np.float64],
    mu: NDArray[np.float64],
    policy: NDArray[np.float64],
    value: NDArray[np.float64],
    size: int,
    count: int,
    rng: np.random.Generator,
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]:
    """For every estimator its means and interval ends over `count` logs of `size` trials, those that allow one."""
    names = tuple(map(str, range(len(truth))))
    prompts = tuple(map(str, range(truth.shape[1])))
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in estimate.ESTIMATORS}
    for _ in range(count):
        query = rng.integers(len(truth), size=size)
        choice = (rng.random((size, 1)) > mu[query].cumsum(1)).sum(1)
        log = Log(names, names, prompts, prompts, query, choice, truth[query, choice], query * 0, mu[query, choice])
        for name in estimate.ESTIMATORS:
            try:
                found[name].append(tuple(estimate.estimate(name, log, policy, value, resamples=300)))
            except ValueError:  # a log that never tried what the policy chooses: it says so, and is no estimate
                continue
    return {name: tuple(np.asarray(rows).T) for name, rows in found.items() if rows}  # type: ignore[misc]


PARTS = {"llama2": llama2, "leak": leak, "ope": ope}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("part", choices=tuple(PARTS))
    out.add_argument("--data", type=Path, metavar="DIR", required=True, help="where the published outcomes are")
    args: argparse.Namespace = out.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    line = common.command().replace(str(args.data), "DIR")
    found = PARTS[args.part](args.data, args.quick, console)
    results = {
        "command": line,
        "size": "quick" if args.quick else "full",
        **common.machine(),
        "seed": SEED,
        "thresholds": THRESHOLDS,
    }
    results |= rounded(found)
    common.write(args.json, results)
    for name, passed in results["passed"].items():
        console.print(f"{'passed' if passed else 'FAILED'}: {THRESHOLDS[name]}", highlight=False)
    return results


if __name__ == "__main__":
    main()
