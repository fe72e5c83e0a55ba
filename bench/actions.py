"""Is policy learning harder for many actions and sparse feedback? Responses needed against the size of the vocabulary.

    python bench/actions.py --json docs/results/actions.json

The perspective paper's fourth takeaway, on a token MDP that is nothing else: eight prompts, each with one right answer of two
tokens, a table of logits as the policy, and REINFORCE with the leave-one-out baseline (sixteen responses a prompt and phase,
Adam at .05), until the probability of the right answer, which is known exactly, is one half on average over prompts. Counted
are the responses sampled until then. The vocabulary V has 4 to 64 tokens, and

    feedback  whole     1 if the whole answer is right, else 0: one bit at the end
              each      the share of its tokens that are right
    start     uniform   all V tokens alike
              primed    nine tenths on four tokens, the right one among them, as a language model that was cloned first

The exponent of responses in V is a least-squares slope on logarithms; its interval resamples seeds. A run that has not got there in
the phases it has counts as having taken them all, which makes a slope too small. Stated before any run (a pilot had other seeds):

    sparse   from a uniform start the exponent is larger under `whole` than under `each`: the interval of the paired
             difference lies above 0
    primed   under `whole` the exponent is smaller from a primed start than from a uniform one, in the same way
    flat     under `whole` and from a primed start the exponent's interval lies below 1/2: it is then not the vocabulary that
             counts but what the start leaves open
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import common
from tokenmdp import growth
from tokenmdp.functional import policy_loss, returns

VOCABULARIES, PROMPTS, SAMPLES, H, OPEN, KEPT = (4, 8, 16, 32, 64), 8, 16, 2, 4, 0.9
RATE, PHASES, QUICK_PHASES, RIGHT = 0.05, 4000, 800, 0.5
FEEDBACK, STARTS = ("whole", "each"), ("uniform", "primed")
THRESHOLDS = {
    "sparse": "from a uniform start the exponent under `whole` less that under `each` has an interval above 0",
    "primed": "under `whole` the exponent from a primed start less that from a uniform one has an interval below 0",
    "flat": "under `whole` from a primed start the interval of the exponent lies below 1/2",
}


def begin(V: int, start: str, right: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """[P, H, V] logits."""
    logits = torch.zeros(PROMPTS, H, V)
    if start == "primed" and V > OPEN:
        others = torch.rand(PROMPTS, H, V, generator=rng).scatter(-1, right[..., None], 2.0).topk(OPEN, -1).indices
        logits.scatter_(-1, others, math.log(KEPT / (1 - KEPT) * (V - OPEN) / OPEN))
    return logits


def needed(V: int, feedback: str, start: str, seed: int, phases: int) -> int:
    """Responses until the right answers have a probability of one half."""
    rng = torch.Generator().manual_seed(seed)
    right = torch.randint(V, (PROMPTS, H), generator=rng)
    logits = begin(V, start, right, rng).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=RATE)
    group = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    for phase in range(phases):
        p = logits.softmax(-1)
        if float(p.detach().gather(-1, right[..., None])[..., 0].prod(-1).mean()) >= RIGHT:
            return phase * PROMPTS * SAMPLES
        said = torch.multinomial(p.detach().view(-1, V), SAMPLES, replacement=True, generator=rng)
        said = said.view(PROMPTS, H, SAMPLES).transpose(1, 2).reshape(-1, H)  # a row a response
        correct = (said == right[group]).float()
        score = correct.prod(-1) if feedback == "whole" else correct.mean(-1)
        advantage = returns.leave_one_out(score, group)[:, None].expand(-1, H)
        logp = logits.log_softmax(-1)[group].gather(-1, said[..., None])[..., 0]
        optimiser.zero_grad()
        policy_loss.reinforce(logp, advantage).sum().div(len(said)).backward()
        optimiser.step()
    return phases * PROMPTS * SAMPLES


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    args = out.parse_args(argv)
    torch.set_num_threads(1)  # nothing here is large
    phases = QUICK_PHASES if args.quick else PHASES
    cells = [(f, s) for f in FEEDBACK for s in STARTS]
    cost: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        runs = bar.add_task("runs", total=len(cells) * len(VOCABULARIES) * len(args.seeds))
        for cell in cells:
            rows = np.zeros((len(args.seeds), len(VOCABULARIES)))
            for i, seed in enumerate(args.seeds):
                for k, V in enumerate(VOCABULARIES):
                    rows[i, k] = needed(V, *cell, seed, phases)
                    bar.advance(runs)
            cost[cell] = rows
    results: dict[str, Any] = {
        "command": common.command(), **common.machine(), "phases": phases, "seeds": args.seeds, "thresholds": THRESHOLDS,
        "vocabularies": VOCABULARIES, "cells": {},
    }  # fmt: skip
    for cell, rows in cost.items():
        results["cells"][" ".join(cell)] = {
            "responses": [round(float(x)) for x in np.exp(np.log(rows).mean(0))],
            "not_there": int((rows >= phases * PROMPTS * SAMPLES).sum()),
            "exponent": common.rounded(growth.growth(VOCABULARIES, rows)),
        }
    whole, each, primed = cost["whole", "uniform"], cost["each", "uniform"], cost["whole", "primed"]
    differences = {
        "whole less each, uniform": growth.growth_difference(VOCABULARIES, whole, each),
        "primed less uniform, whole": growth.growth_difference(VOCABULARIES, primed, whole),
    }
    results["differences"] = {name: common.rounded(x) for name, x in differences.items()}
    results["passed"] = {
        "sparse": differences["whole less each, uniform"].low > 0,
        "primed": differences["primed less uniform, whole"].high < 0,
        "flat": results["cells"]["whole primed"]["exponent"]["high"] < 0.5,
    }
    common.write(args.json, results)
    show(results)
    return results


def show(results: Mapping[str, Any]) -> None:
    """Print a line a kind of feedback and start, and the verdicts."""
    table = Table(
        title="responses until half of the answers are right (geometric mean), by size of the vocabulary",
        title_justify="left",
    )
    for name in ("feedback, start", *(str(V) for V in VOCABULARIES), "exponent [95 %]", "not there"):
        table.add_column(name, justify="left" if "," in name else "right")
    for name, cell in results["cells"].items():
        b = cell["exponent"]
        span = f"{b['mean']:.2f} [{b['low']:.2f}, {b['high']:.2f}]"
        table.add_row(name, *(f"{x:,}" for x in cell["responses"]), span, str(cell["not_there"]))
    shown = Console(width=None if sys.stdout.isatty() else 120)
    shown.print(table)
    for name, passed in results["passed"].items():
        shown.print(f"{'passed' if passed else 'FAILED'}: {name}, {results['thresholds'][name]}", highlight=False)


if __name__ == "__main__":
    main()
