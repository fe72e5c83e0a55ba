"""What several runs of several solvers allow one to say: aggregates with intervals, failures, and a verdict in words.

    final score of a run      mean over the held-out prompts on which every run of that seed got a verdict, and over their
                              responses; a run that crashed delivers no policy and counts as its start, and so does one
                              that left less than half of what the start was judged on in common
    failure                   it crashed; a number was not finite; or it did not beat its start significantly, by the 95 %
                              interval of the difference over held-out prompts, paired by prompt, of that seed
    aggregate                 the interquartile mean over seeds, with its stratified bootstrap interval; of fewer than eight
                              seeds with Student's, which is wide where there are two or three
    difference of two solvers significant where the 95 % interval of the probability of improvement leaves ½ out

Intervals are 95 % each and not corrected for the number of solvers: of twenty true nulls about one would be missed.

Source: Agarwal et al. 2021 ("Deep RL at the edge of the statistical precipice"), sections 4.1 and 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenmdp import stats

Result = Mapping[str, Any]
Row = dict[str, Any]
FEW_PROMPTS = 30  # below which their number is said beside what is significant by them


def final(result: Result, start: Result) -> float:
    """The score a run ends with; a run without a policy ends with its start's."""
    return mean(result["scores"] if result["scores"] else start["scores"])


def mean(scores: Sequence[float | None]) -> float:
    """The mean over the prompts that got a verdict; NaN where none did."""
    known = [x for x in scores if x is not None]
    return sum(known) / len(known) if known else float("nan")


def beats(result: Result, start: Result) -> stats.Interval:
    """The gain over the start at one seed, paired by prompt; without an interval where nothing differs or one prompt is all
    there is, and without width where every prompt gains the same."""
    a, b = (np.asarray(r["scores"], dtype=np.float64) for r in (result, start))
    try:
        return stats.paired_bootstrap(a, b, resamples=2_000)
    except ValueError:  # no spread, or one prompt: there is nothing to resample
        gain = float((a - b).mean())
        width = 0.0 if len(a) > 1 and gain != 0 else float("inf")
        return stats.Interval(gain, gain - width, gain + width)


def unjudged(result: Result) -> float | None:
    """The share of a run's judged responses that got no verdict; None of a run that delivered none."""
    return result["no_verdict"] / result["responses"] if result.get("responses") else None


def shared(runs: Sequence[Result]) -> list[Row]:
    """Runs with their scores on the prompts that all of them got a verdict on: scores of different prompts compare badly.

    A run that would leave less than half of what the first was judged on is a failure, and takes nothing from the others.

    Args:
        runs: of one seed, the first of them judged on some prompt.
    """
    known = [np.array([x is not None for x in run["scores"]], dtype=np.bool_) for run in runs]
    inside = [i for i, run in enumerate(runs) if run["scores"]]
    while True:
        common = np.logical_and.reduce([known[i] for i in inside])
        if 2 * common.sum() >= known[0].sum() or len(inside) == 1:
            break
        inside.remove(min(inside[1:], key=lambda i: int((known[i] & known[0]).sum())))
    out = []
    for i, run in enumerate(runs):
        kept = [x for x, both in zip(run["scores"], common, strict=True) if both] if i in inside else []
        mute = i not in inside and bool(run["scores"])
        judged = (
            f"judged on {int((known[i] & known[0]).sum())} of the start's {int(known[0].sum())} prompts" if mute else ""
        )
        out.append({**run, "scores": kept, **({"failure": "no verdict", "message": judged} if mute else {})})
    return out


def rows_of(results: Mapping[str, Sequence[Result]], baselines: Sequence[str]) -> list[Row]:
    """One row a solver, the highest aggregate first.

    Args:
        results: of each solver one a seed, in the same order of seeds; "start" among them, judged at every seed.
        baselines: what every solver is compared with; those of them that were run.
    """
    names = ["start", *(name for name in results if name != "start")]
    by_seed = [shared(runs) for runs in zip(*(results[name] for name in names), strict=True)]
    results = {name: [runs[i] for runs in by_seed] for i, name in enumerate(names)}
    start = results["start"]
    scores = {name: [final(r, s) for r, s in zip(found, start, strict=True)] for name, found in results.items()}
    found = [
        row_of(name, results[name], start, scores, [b for b in baselines if b in results and b != name])
        for name in results
    ]
    return sorted(found, key=lambda row: -row["iqm"]["mean"])


def row_of(
    name: str, mine: Sequence[Result], start: Sequence[Result], scores: Mapping[str, Sequence[float]], others: list[str]
) -> Row:
    """Everything that is said of one solver."""
    ran = [r for r in mine if not r["failure"]]
    gains = [beats(r, s) for r, s in zip(mine, start, strict=True) if not r["failure"]]
    trains = name != "start"
    failures = {kind: sum(r["failure"] == kind for r in mine) for kind in ("crash", "non-finite", "no verdict")}
    failures["not better"] = sum(not g.low > 0 or not np.isfinite(g.low) for g in gains) if trains else 0
    gained = [a - b for a, b in zip(scores[name], scores["start"], strict=True)]
    return {
        "solver": name,
        "family": mine[0]["family"],
        "learning_rate": mine[0]["learning_rate"],
        "scores": list(scores[name]),
        "iqm": aggregate(scores[name]),
        "gain": aggregate(gained) if trains else None,
        "improvement": {other: improvement(scores[name], scores[other]) for other in others},
        "failures": failures,
        "failed": sum(failures.values()),
        "runs": len(mine),
        "no_verdict": _mean([unjudged(r) for r in mine]),
        "prompts": min(len(r["scores"]) for r in start),
        "messages": sorted({r["message"] for r in mine if r["message"]}),
        **{key: _mean([r[key] for r in ran]) for key in ("greedy", "kl", "tokens", "seconds")},
        "curves": [r["curve"] for r in mine],
    }


def aggregate(values: Sequence[float]) -> Row:
    """The interquartile mean with its interval; ends are None where runs are too few or all alike."""
    try:
        return dict(stats.stratified_bootstrap(values)._asdict())
    except ValueError:
        return {"mean": stats.interquartile_mean(values), "low": None, "high": None}


def improvement(a: Sequence[float], b: Sequence[float]) -> Row:
    """The probability that a run of a ends above a run of b; ends are None for a single run."""
    if min(len(a), len(b)) < 2:
        return {"mean": stats.probability_of_improvement(a, b), "low": None, "high": None}
    return dict(stats.improvement(a, b)._asdict())


def side(interval: Row) -> int:
    """1 or −1 where a probability of improvement is significantly above or below ½, else 0."""
    if interval["low"] is None:
        return 0
    return int(interval["low"] > 0.5) - int(interval["high"] < 0.5)


def verdict(rows: Sequence[Row], seeds: int) -> list[str]:
    """What the rows say, in words."""
    start = next(row for row in rows if row["solver"] == "start")
    trained = [row for row in rows if row["family"] not in ("baseline", "decoding")]
    if not trained:
        baselines = f"Nothing but baselines was run: the start scores {start['iqm']['mean']:.3f}."
        return [sentence for sentence in (baselines, _unjudged(rows)) if sentence]
    winners = [row for row in trained if row["failed"] == 0]
    leader = trained[0]
    each = "at every seed" if seeds > 1 else "at the one seed"
    out = [
        f"{_share(len(winners), len(trained))} significantly {each}; {leader['solver']} ends highest, at "
        f"{leader['iqm']['mean']:.3f} against {start['iqm']['mean']:.3f}."
    ]
    out.append(_peers(leader, trained[1:], seeds))
    if cloned := next((row for row in rows if row["solver"] == "sft-more"), None):
        out.append(_against(cloned, trained, seeds))
    few = f"Every run is judged on {start['prompts']} prompts, which is few." if start["prompts"] < FEW_PROMPTS else ""
    out += [_unjudged(rows), _failures(trained), few]
    return [sentence for sentence in out if sentence]


def _share(won: int, of: int) -> str:
    if of == 1:
        return "The one solver beat its start" if won else "The one solver did not beat its start"
    if won in (0, of):
        return f"{'All' if won else 'None of the'} {of} solvers beat their start"
    return f"{won} of {of} solvers beat their start"


def _peers(leader: Row, others: Sequence[Row], seeds: int) -> str:
    """Which solvers cannot be told from the one that ended highest."""
    if not others:
        return ""
    if seeds < 4:
        return (
            f"Which solver is better than which cannot be said from {seeds} seed{'s' * (seeds > 1)}: no significant "
            "difference could show between any two of them, however large."
        )
    found = {row["solver"]: side(improvement(leader["scores"], row["scores"])) for row in others}
    same = [name for name, way in found.items() if way <= 0]
    if not same:
        return f"{leader['solver']} is significantly better than each of the {len(found)} others."
    worse = len(found) - len(same)
    rest = f"; it is significantly better than the {worse} other{'s' * (worse > 1)}" if worse else ""
    return f"No significant difference between {leader['solver']} and {_names(same)}{rest}."


def _against(cloned: Row, trained: Sequence[Row], seeds: int) -> str:
    """How the solvers stand to plain cloning of as many tokens."""
    at = f"SFT continued on as many tokens of demonstrations ends at {cloned['iqm']['mean']:.3f}"
    if seeds < 4:
        return f"{at}."
    ways = {row["solver"]: side(row["improvement"]["sft-more"]) for row in trained}
    parts = []
    for way, words in (
        (1, "significantly above it"),
        (-1, "significantly below it"),
        (0, "not significantly different"),
    ):
        if names := [name for name, found in ways.items() if found == way]:
            parts.append(f"{words}: {_names(names)}")
    return f"{at}; {'; '.join(parts)}."


def _unjudged(rows: Sequence[Row]) -> str:
    """Whose responses the judge gave no verdict on: scores of different prompts compare badly."""
    shares = [f"{row['solver']} {100 * row['no_verdict']:.1f} %" for row in rows if row["no_verdict"]]
    if not shares:
        return ""
    return (
        f"The judge gave no verdict on some responses ({', '.join(shares)}); they are in no score, and all are compared on the "
        f"prompts that every run of a seed was judged on, {rows[0]['prompts']} at the fewest."
    )


def _failures(trained: Sequence[Row]) -> str:
    """How many runs of whom failed, by kind."""
    named = {
        "crash": "crashed",
        "non-finite": "met a number that is not finite",
        "no verdict": "left responses that the judge could not judge",
        "not better": "did not beat their start",
    }
    parts = []
    for kind, words in named.items():
        failed = [
            f"{row['solver']} {row['failures'][kind]} of {row['runs']}" for row in trained if row["failures"][kind]
        ]
        if failed:
            parts.append(f"{words}: {', '.join(failed)}")
    return f"Runs that {'; that '.join(parts)}." if parts else "No run failed."


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
