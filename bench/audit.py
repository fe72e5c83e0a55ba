"""Where does T(s, a) = concat(s, a) break when text is passed on? Models of several sizes, by kind of query.

    python bench/audit.py --models smollm2-135m-instruct OTHER --json docs/results/audit.json

What `tokenmdp audit` measures (tokenmdp.lab.audit says what each column is), with eight responses to each of its 28 prompts at
temperature 1, for each model named: by a catalogue name, a folder or a GGUF file. Thresholds, stated before the run:

    carried   sampler and learner differ by no more than rounding explains (`gate.ROUNDING`): tokens that are carried do not drift
    drift     for every model the share of responses that are other tokens when read again has an interval above 0
    scripts   for every model that share is larger for other scripts than for prose: the interval of the difference, by a bootstrap
              over prompts, lies above 0
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import common
from tokenmdp import gate
from tokenmdp.lab import audit
from tokenmdp.models import catalog
from tokenmdp.models.sampling import Sampling

THRESHOLDS = {
    "carried": "sampler and learner differ by no more than rounding explains, for every model",
    "drift": "share of responses that are other tokens when read again: interval above 0, for every model",
    "scripts": "that share, other scripts less prose: interval above 0, for every model",
}


def difference(rows: Sequence[Mapping[str, Any]], one: str, other: str, seed: int = 0) -> dict[str, float]:
    """Of two kinds the difference in the share that is read otherwise, resampling the prompts of each."""
    rng = np.random.default_rng(seed)

    def by_prompt(kind: str) -> np.ndarray[Any, Any]:
        mine = [row for row in rows if row["kind"] == kind]
        return np.array(
            [np.mean([r["reread"] for r in mine if r["prompt"] == p]) for p in sorted({r["prompt"] for r in mine})]
        )

    a, b = by_prompt(one), by_prompt(other)
    drawn = [
        rng.choice(a, len(a)).mean() - rng.choice(b, len(b)).mean() for _ in range(4000)
    ]  # four prompts a kind: the interval is rough
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"mean": round(float(a.mean() - b.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--models", nargs="+", default=["smollm2-135m-instruct"], help="names, folders or GGUF files")
    out.add_argument("--seed", type=int, default=0)
    args = out.parse_args(argv)
    cfg = replace(audit.Config(), samples=1 if args.quick else 8, max_new_tokens=12 if args.quick else 48)
    line = common.command()
    for model in args.models:
        if Path(model).exists():
            line = line.replace(model, Path(model).name)  # a path means something on one machine only
    results: dict[str, Any] = {"command": line, **common.machine(), "thresholds": THRESHOLDS, "models": {}}
    for model in args.models:
        policy = catalog.load(model).freeze()
        queries = audit.asked(cfg, policy)
        rng = torch.Generator().manual_seed(args.seed)
        b = policy.sample([q.prompt for q in queries], cfg.samples, Sampling(cfg.max_new_tokens), rng)
        rows = audit.looked_at(policy, [q for q in queries for _ in range(cfg.samples)], b, cfg.stops, 1.0)
        found = audit.measured(rows)
        spelled = audit.special_tokens(policy)
        parameters = sum(p.numel() for p in policy.model.parameters())
        kept = {"sha256": hashlib.sha256(Path(model).read_bytes()).hexdigest()} if Path(model).is_file() else {}
        results["models"][Path(model).name] = {
            "parameters": parameters,
            **kept,
            "compute": policy.paths["compute"],
            "verdict": audit.in_words(found["all"], spelled),
            "spelled": spelled,
            "scripts_less_prose": difference(rows, "other scripts", "prose"),
            "kinds": found,
        }
        Console(width=None if sys.stdout.isatty() else 140).print(audit.table(found, Path(model).name))
    made = results["models"].values()
    results["passed"] = {
        "carried": all(m["kinds"]["all"]["paths"] <= gate.explained(gate.ROUNDING, m["compute"]) for m in made),
        "drift": all(m["kinds"]["all"]["reread"]["low"] > 0 for m in made),
        "scripts": all(m["scripts_less_prose"]["low"] > 0 for m in made),
    }
    common.write(args.json, results)
    for name, passed in results["passed"].items():
        print(f"{'passed' if passed else 'FAILED'}: {name}, {THRESHOLDS[name]}")
    return results


if __name__ == "__main__":
    main()
