"""Figures and verdicts of `reward_noise.py`: rows over seeds, paired differences, thresholds in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import common
from tokenmdp import stats

KEEPS_UP = -0.02  # accuracy by which a frozen body may fall short of a trained one
HARD, HELD_TO_CONTROLS = 0.3, 0.3  # noise from which the classifier must show; up to which heads must beat the controls
KEY = ("kind", "pairs", "noise", "embedding", "head", "objective")


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % interval over replicates; the mean alone where they do not differ."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return {"mean": round(float(x.mean()), 4)}
    return common.rounded(stats.bootstrap_mean(x))


def table(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each setting: accuracy over seeds with its interval, and the median of the seconds."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[name] for name in KEY), []).append(cell)
    rows = []
    for key, group in groups.items():
        group = sorted(group, key=lambda cell: cell["seed"])
        row = dict(zip(KEY, key, strict=True))
        row |= {"accuracy": interval([c["accuracy"] for c in group]), "seeds": [c["seed"] for c in group]}
        row["accuracies"] = [round(c["accuracy"], 4) for c in group]
        row["seconds"] = round(float(np.median([c["seconds"] for c in group])), 3)
        if all("accuracy_other_kind" in c for c in group):
            row["accuracy_other_kind"] = interval([c["accuracy_other_kind"] for c in group])
        rows.append(row)
    return rows


def find(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def gap(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy of a minus that of b, paired by the seeds both have."""
    x, y = (dict(zip(row["seeds"], row["accuracies"], strict=True)) for row in (a, b))
    return interval([x[seed] - y[seed] for seed in x if seed in y])


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Classifier minus Bradley-Terry, wherever both were fitted on the same pairs."""
    found = []
    for row in rows:
        peer = find(rows, **{**{name: row[name] for name in KEY}, "objective": "bradley_terry"})
        if row["objective"] == "classifier" and peer:
            where = {name: row[name] for name in KEY if name != "objective"}
            found.append({**where, "classifier_minus_bradley_terry": gap(row, peer[0])})
    return found


def verdicts(rows: Sequence[Mapping[str, Any]], pairs: int, body_noise: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Each threshold: whether it holds, and in words.

    Args:
        pairs: how many the heads learned from in the main comparison.
        body_noise: the noise levels at which bodies were trained.
    """
    return {
        "classifier": classifier(rows, pairs),
        "controls": controls(rows, pairs),
        "frozen": frozen(rows, body_noise),
    }


def classifier(rows: Sequence[Mapping[str, Any]], pairs: int) -> dict[str, Any]:
    cells = [c for c in compared(rows) if c["kind"] == "same" and c["noise"] >= HARD and c["pairs"] == pairs]
    gaps = [c["classifier_minus_bradley_terry"] for c in cells if c["head"] in ("linear", "mlp")]
    above = sum(g.get("low", g["mean"]) > 0 for g in gaps)
    below = sum(g.get("high", g["mean"]) < 0 for g in gaps)
    words = (
        "the classifier resists label noise better than Bradley-Terry"
        if above == len(gaps)
        else "the classifier resists label noise worse than Bradley-Terry"
        if below == len(gaps)
        else "no consistent difference between classifier and Bradley-Terry under label noise"
    )
    return {
        "passed": above == len(gaps),
        "words": f"{words}: of {len(gaps)} comparisons {above} above 0, {below} below",
    }


def controls(rows: Sequence[Mapping[str, Any]], pairs: int) -> dict[str, Any]:
    failed, count = [], 0
    for row in find(rows, kind="same", pairs=pairs):
        if row["embedding"] == "length" or row["noise"] > HELD_TO_CONTROLS:
            continue
        [plain] = find(rows, kind="same", pairs=pairs, noise=row["noise"], embedding="length")
        count += 1
        if row["accuracy"].get("low", row["accuracy"]["mean"]) <= max(0.5, plain["accuracy"]["mean"]):
            failed.append(f"{row['head']} {row['objective']} on {row['embedding']} at {row['noise']:.0%}")
    words = f"{count - len(failed)} of {count} heads are above one half and above length alone"
    return {"passed": not failed, "words": words + (f"; not: {', '.join(failed)}" if failed else "")}


def frozen(rows: Sequence[Mapping[str, Any]], body_noise: Sequence[float]) -> dict[str, Any]:
    said, passed = [], True
    for noise in body_noise:
        same: dict[str, Any] = {"kind": "same", "noise": noise, "objective": "bradley_terry"}
        [tuned] = find(rows, **same, head="body")
        [plain] = find(rows, **same, head="linear", embedding="own", pairs=tuned["pairs"])
        found = gap(plain, tuned)
        passed &= found.get("high", found["mean"]) > KEEPS_UP
        said.append(f"at {noise:.0%} noise {plain['accuracy']['mean']:.3f} against {tuned['accuracy']['mean']:.3f}")
        said[-1] += (
            f" ({found['mean']:+.3f}, {found.get('low', found['mean']):+.3f} to {found.get('high', found['mean']):+.3f})"
        )
    return {
        "passed": passed,
        "words": ("a frozen body with a linear head keeps up" if passed else "the fine-tuned body is clearly better")
        + f" at equal pairs: {'; '.join(said)}",
    }


def said(row: Mapping[str, Any] | None) -> str:
    """An accuracy with its interval."""
    if row is None:
        return ""
    a = row["accuracy"]
    return f"{a['mean']:.3f}" + (f" [{a['low']:.3f}, {a['high']:.3f}]" if "low" in a else "")
