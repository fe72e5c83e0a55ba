"""Inverse RL from demonstrations alone: which divergence falls, and is the learned reward its closed form?

    python bench/reward_from_demos.py --json docs/results/reward_from_demos.json

1. modes   A demonstrator with three modes and a student that can say one of them, or all of them badly (inverse_toy.py).
           `exact`: a table of logits, exact gradients, the best discriminator there is. `sampled`: the recipe, on a
           student that sees one token back, against a learned discriminator. Every divergence is a sum over all responses.
2. toy     The demonstrator is the best policy for a hidden gold reward at a KL weight of 1/2 to the start, so the closed
           form log π_demonstrator − log π_start is 2 gold less a number a prompt, exactly. Rewards are learned from its
           responses against the start's.
3. model   The embedded model, first cloned from reviews (the start), then from those openings that gold likes most (SFT).
           Rewards are learned on the start's body from the demonstrations, and from SFT samples, where the closed form is
           exact; gold is the task's classifier, which nothing is trained on besides choosing the demonstrations.

In 2 and 3 the rewards are judged on fresh responses: rank correlation with the closed form over responses of both sides,
accuracy on held-out pairs (demonstration or SFT sample against the start's), and the gold of the best of n of the start's
responses by each reward, n = 1 to 16. Random choice, which is n = 1, is the constant to beat. Intervals resample prompts.

Stated before the full run, at every seed:
    falls       under gail, airl and forward the divergence each follows is lower at the end than at the start (modes)
    seeks       under airl the largest mode has more than 3/4 of all probability, the others less than 1/100 (modes, exact)
    covers      under bc and forward no mode has less than 2/3 of the largest (modes, exact)
    crossed     airl ends with a lower KL(π ‖ E) than bc, bc with a lower KL(E ‖ π) than airl (modes, exact and sampled)
    ranks       Spearman of the classifier and the closed form: lower end above 0.7 (toy), above 0 (model, SFT samples)
    tells       accuracy on held-out pairs: lower end above 1/2 (toy; model)
    selects     best-of-16 by the classifier beats random choice in gold: lower end above 0 (toy; model)
    closed      best-of-16 by the classifier against by the closed form: better, worse or no significant difference (no
                threshold: it is said)

Finished parts are kept in --runs and not taken again; a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import common
import inverse_arms as arms
import inverse_toy as modes
from tokenmdp.run import Run

PARTS = ("modes", "toy", "model")
ARMS = ("classifier", "bradley_terry", "sft_samples")


@dataclass(frozen=True)
class Size:
    """How much is done; everything else follows from it."""

    seeds: int = 5  # of the toys
    model_seeds: int = 3
    exact_steps: int = 600
    sampled: modes.Sampled = field(default_factory=modes.Sampled)
    toy: arms.Toy = field(default_factory=arms.Toy)
    model: arms.Model = field(default_factory=arms.Model)


QUICK = Size(
    seeds=2,
    model_seeds=2,
    exact_steps=5,
    sampled=modes.Sampled(steps=2, prompts=8, demonstrations=64, methods=("bc", "airl")),
    toy=arms.Toy(demonstrations=64, held_out=24, groups=12, epochs=1),
    model=arms.Model(
        name="tiny",
        start_steps=2,
        sft_steps=2,
        learned=24,
        held_out=12,
        prompts=6,
        train="all",
        task={"gold": 120, "gold_test": 40, "demonstrations": 300, "train": 20, "held_out": 20},
    ),
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which of the three")
    parser.add_argument(
        "--seeds", type=int, default=0, help="of every part; 0 means five of the toys, three of the model"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="what is finished is kept in a folder there")
    parser.add_argument("--source", type=Path, help="a file of reviews (text, label), in place of the package's")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else Size()
    if args.seeds:
        size = replace(size, seeds=args.seeds, model_seeds=args.seeds)
    folder = args.runs / f"reward_from_demos{'-quick' if args.quick else ''}"
    about = {"command": common.command(), **common.machine(), "size": asdict(size)}
    results: dict[str, Any] = {}
    if args.json is not None and args.json.exists():  # other parts' figures stay
        results = json.loads(args.json.read_text(encoding="utf-8"))
    for part in args.parts:
        seeds = range(size.model_seeds if part == "model" else size.seeds)
        works = {"modes": modes_of, "toy": toy_of, "model": model_of}[part](size, folder, args.source)
        found = {str(seed): staged(folder, part, seed, size, works) for seed in seeds}
        results[part] = {**about, "seeds": found, "passed": THRESHOLDS[part](found), "verdict": in_words(part, found)}
        common.write(args.json, results)
    show({part: results[part] for part in args.parts})
    return results


Work = Callable[[Run], dict[str, Any]]


def config_of(size: Size, part: str) -> dict[str, Any]:
    """What a seed of a part follows from: not how many other seeds there are, nor the other parts."""
    found = asdict(size)
    return {name: found[name] for name in {"modes": ("exact_steps", "sampled")}.get(part, (part,))}


def staged(folder: Path, part: str, seed: int, size: Size, work: Work) -> dict[str, Any]:
    """What a seed of a part found: from its folder where that is done, else by doing it."""
    with Run.open(folder / f"{part}-{seed}", config=config_of(size, part), seed=seed, resume=True) as run:
        done = run.result()
        if done is None:
            begun = time.monotonic()
            found = work(run)
            done = run.finish({**found, "minutes": round((time.monotonic() - begun) / 60, 2)})
    return done


def modes_of(size: Size, folder: Path, source: Path | None) -> Work:
    """Part 1: every method, exactly and by samples."""
    demonstrator = modes.toy()

    def work(run: Run) -> dict[str, Any]:
        exact: dict[str, Any] = {}
        with run.progress(len(modes.METHODS), "exact gradients", "methods") as bar:
            for method in modes.METHODS:
                exact[method] = modes.exact_run(demonstrator, method, run.seed, size.exact_steps)
                bar.advance()
        return {
            "exact": exact,
            "sampled": {
                m: modes.sampled_run(demonstrator, m, size.sampled, run.stage(m)) for m in size.sampled.methods
            },
        }

    return work


def toy_of(size: Size, folder: Path, source: Path | None) -> Work:
    """Part 2."""
    return lambda run: arms.toy(size.toy, run)


def model_of(size: Size, folder: Path, source: Path | None) -> Work:
    """Part 3; what the seeds start from is made once."""
    with Run.open(folder / "model-start", config=config_of(size, "model"), seed=0, resume=True) as run:
        start, task, expert = arms.begin(size.model, run, source)
    return lambda run: arms.model(size.model, start, task, expert, run)


# -- thresholds ----------------------------------------------------------------------------------------------------------

Seeds = Mapping[str, Any]


def passed_modes(seeds: Seeds) -> dict[str, bool]:
    """The thresholds of part 1, over all seeds."""
    exact, sampled = ([s[how] for s in seeds.values()] for how in ("exact", "sampled"))

    def falls(runs: Sequence[Any]) -> bool:
        named = [(r[m], modes.OWN[m]) for r in runs for m in ("gail", "airl", "forward") if m in r]
        return all(curve[-1][own] < curve[0][own] for curve, own in named)

    def crossed(runs: Sequence[Any]) -> bool:
        ends = [(r["airl"][-1], r["bc"][-1]) for r in runs]
        return all(a["kl_reverse"] < b["kl_reverse"] and b["kl_forward"] < a["kl_forward"] for a, b in ends)

    seeking = [sorted(r["airl"][-1]["modes"]) for r in exact]
    covering = [sorted(r[m][-1]["modes"]) for r in exact for m in ("bc", "forward")]
    return {
        "falls, exact": falls(exact),
        "falls, sampled": falls(sampled),
        "seeks": all(m[-1] > 0.75 and m[-2] < 0.01 for m in seeking),
        "covers": all(m[0] > 2 / 3 * m[-1] for m in covering),
        "crossed, exact": crossed(exact),
        "crossed, sampled": crossed(sampled),
    }


def passed_toy(seeds: Seeds) -> dict[str, bool]:
    """Those of part 2."""
    found = [s["classifier"] for s in seeds.values()]
    return {
        "ranks": all(_low(s["demonstration_pairs"]["spearman"]) > 0.7 for s in found),
        "tells": all(_low(s["demonstration_pairs"]["accuracy"]) > 0.5 for s in found),
        "selects": all(_low(s["over_random"]) > 0 for s in found),
    }


def passed_model(seeds: Seeds) -> dict[str, bool]:
    """Those of part 3."""
    found = list(seeds.values())
    return {
        "ranks": all(_low(s["sft_samples"]["sft_pairs"]["spearman"]) > 0 for s in found),
        "tells": all(_low(s["classifier"]["demonstration_pairs"]["accuracy"]) > 0.5 for s in found),
        "selects": all(_low(s["classifier"]["over_random"]) > 0 for s in found),
    }


THRESHOLDS: Mapping[str, Callable[[Seeds], dict[str, bool]]] = {
    "modes": passed_modes,
    "toy": passed_toy,
    "model": passed_model,
}


def _low(found: Mapping[str, float] | None) -> float:
    """The lower end of an interval; without one nothing is above anything."""
    return found["low"] if found is not None and "low" in found else -np.inf


# -- in words ------------------------------------------------------------------------------------------------------------


def in_words(part: str, seeds: Seeds) -> list[str]:
    """What the part found, a sentence each."""
    runs = list(seeds.values())
    if part == "modes":
        return [_mode_words(how, [s[how] for s in runs]) for how in ("exact", "sampled")]
    side = "demonstration_pairs" if part == "toy" else "sft_pairs"
    said = []
    for name in (n for n in runs[0] if n in ARMS):
        told = [s[name][side] for s in runs]
        ranks = " / ".join("–" if t["spearman"] is None else f"{t['spearman']['mean']:.2f}" for t in told)
        right = " / ".join(f"{t['accuracy']['mean']:.2f}" for t in told)
        said.append(
            f"{name}: Spearman with the closed form {ranks}, pair accuracy {right}, best-of-16 against random choice "
            f"{_signs([s[name]['over_random'] for s in runs])}, against the closed form "
            f"{_signs([s[name]['over_closed'] for s in runs])}"
        )
    return said


def _mode_words(how: str, runs: Sequence[Any]) -> str:
    def mean(method: str, name: str) -> float:
        return float(np.mean([r[method][-1][name] for r in runs]))

    def spread(method: str) -> str:
        ordered = np.mean([sorted(r[method][-1]["modes"], reverse=True) for r in runs], axis=0)
        return " ".join(f"{x:.2f}" for x in ordered)

    each = "; ".join(
        f"{m} {spread(m)} (reverse {mean(m, 'kl_reverse'):.2f}, forward {mean(m, 'kl_forward'):.2f})" for m in runs[0]
    )
    return f"{how}: probability on the three modes, largest first, and both KLs in nats: {each}"


def _signs(found: Sequence[Mapping[str, float]]) -> str:
    """One word a seed: what the interval of a difference says."""

    def word(x: Mapping[str, float]) -> str:
        if "low" not in x:
            return "equal" if x["mean"] == 0 else f"{x['mean']:+.2f} without spread"
        if x["low"] <= 0 <= x["high"]:
            return f"{x['mean']:+.2f} (no significant difference)"
        return f"{x['mean']:+.2f} ({'better' if x['low'] > 0 else 'worse'})"

    return " / ".join(word(x) for x in found)


def show(results: Mapping[str, Any]) -> None:
    """Print the best-of-n curves, the sentences and the thresholds."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for part in PARTS:
        if part not in results:
            continue
        if part != "modes":
            table = Table(title=f"{part}: gold of the best of n, mean over seeds", title_justify="left")
            for name in ("reward", *map(str, arms.CURVE)):
                table.add_column(name, justify="right")
            runs = list(results[part]["seeds"].values())
            for name in (n for n in (*ARMS, "closed_form", "gold") if n in runs[0]):
                means = [np.mean([s[name]["best_of_n"][str(n)]["mean"] for s in runs]) for n in arms.CURVE]
                table.add_row(name, *(f"{x:.2f}" for x in means))
            console.print(table)
        for sentence in results[part]["verdict"]:
            console.print(sentence, highlight=False)
        for name, passed in results[part]["passed"].items():
            console.print(f"{'passed' if passed else 'FAILED'}: {part}, {name}", highlight=False)


if __name__ == "__main__":
    main()
