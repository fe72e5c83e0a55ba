"""Reading a run folder for its report: everything optional, nothing trusted, what cannot be read said and not hidden.

A run may have been killed while it wrote, so a broken line is a note on the page and not an error. Only a folder in
which there is nothing to report on is one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenmdp.monitors import Alarm, watched
from tokenmdp.stats import Interval

STAGES = ("sft", "reward_model", "ppo")  # sub-folders a demo has; any other with a metrics.jsonl is shown too
NUMBERS = ("advantage", "kl", "reward")  # what a token may carry


@dataclass(frozen=True)
class Token:
    """One generated token: its text, and what training knew of it (None where it was not recorded)."""

    text: str
    advantage: float | None
    kl: float | None
    reward: float | None


@dataclass(frozen=True)
class Sample:
    """One response of one arm to one prompt; scores are None where nobody scored."""

    prompt: str
    arm: str
    row: int
    text: str
    ended: bool | None
    gold: float | None
    proxy: float | None
    kl: float | None
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Curve:
    """One metric over the steps that logged it."""

    name: str
    step: tuple[float, ...]
    value: tuple[float, ...]


class Figures:
    """The summary's figures by dotted path; one that is missing, null, NaN or not a number is None, never a crash."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def get(self, path: str) -> Any:
        here: Any = self.raw
        for key in path.split("."):
            if not isinstance(here, Mapping) or key not in here:
                return None
            here = here[key]
        return here

    def number(self, path: str) -> float | None:
        return number(self.get(path))

    def text(self, path: str) -> str:
        value = self.get(path)
        return "" if value is None else str(value)

    def interval(self, path: str) -> Interval | None:
        """mean, low and high; ends that are not known are NaN. None where there is no mean."""
        mean = self.number(f"{path}.mean")
        if mean is None:
            return None
        ends = [self.number(f"{path}.{end}") for end in ("low", "high")]
        return Interval(mean, *(math.nan if end is None else end for end in ends))

    def numbers(self, path: str) -> list[float | None]:
        value = self.get(path)
        return [number(x) for x in value] if isinstance(value, list) else []

    def rows(self, path: str) -> list[Mapping[str, Any]]:
        value = self.get(path)
        return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []

    def mapping(self, path: str) -> Mapping[str, Any]:
        value = self.get(path)
        return value if isinstance(value, Mapping) else {}


@dataclass
class RunFolder:
    """What a run folder holds.

    Attributes:
        name: the folder's own name (not its path: a page is for showing around).
        summary: the demo's summary.json, or None: then this is a plain run.
        config, result: config.json and result.json, empty where missing.
        curves: the metrics of the folder itself ("") and of its sub-folders, by sub-folder and metric name.
        last: the last lines of metrics.jsonl, as they are.
        log: the last lines of log.txt.
        samples: the responses of samples.jsonl.
        alarms: failure signatures in the metrics, each with the sub-folder it was seen in.
        notes: sentences about what could not be read.
    """

    name: str
    summary: Figures | None
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    curves: dict[str, dict[str, Curve]]
    last: list[Mapping[str, Any]]
    log: list[str]
    samples: list[Sample]
    alarms: list[tuple[str, Alarm]]
    notes: list[str] = field(default_factory=list)


def read(folder: str | Path) -> RunFolder:
    """Read a run folder.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when it holds nothing a report could show.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"no run folder at {path}: give the folder that holds config.json and metrics.jsonl")
    notes: list[str] = []
    summary = _json(path / "summary.json", notes)
    config, result = (_json(path / f"{name}.json", notes) or {} for name in ("config", "result"))
    lines = {where: _lines(path / where / "metrics.jsonl", notes, path) for where in _with_metrics(path)}
    samples = [_sample(line) for line in _lines(path / "samples.jsonl", notes, path)]
    if config.keys() & {"model_type", "architectures"}:  # a model's: no run wrote it
        config = {}
    if not (summary or config or result or lines or samples):
        raise ValueError(
            f"{path} has no readable config.json, metrics.jsonl, samples.jsonl, result.json or summary.json: "
            "there is nothing to report on; is it the run folder itself?" + "".join(f" ({note})" for note in notes)
        )
    return RunFolder(
        name=path.resolve().name,
        summary=Figures(summary) if summary else None,
        config=config,
        result=result,
        curves={where: found for where, rows in lines.items() if (found := _curves(rows))},
        last=lines.get("", [])[-12:],
        log=_tail(path / "log.txt"),
        samples=samples,
        alarms=[(where, alarm) for where, rows in lines.items() for alarm in watched(rows).given.values()],
        notes=notes,
    )


def number(value: Any) -> float | None:
    """A finite number, or None; True and False are not numbers here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None  # NaN and the infinities fail this comparison too


def _with_metrics(path: Path) -> list[str]:
    inside = sorted(p.name for p in path.iterdir() if p.is_dir() and (p / "metrics.jsonl").is_file())
    inside.sort(key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
    return ([""] if (path / "metrics.jsonl").is_file() else []) + inside


def _json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        notes.append(f"{path.name} could not be read ({type(error).__name__}) and is left out.")
        return None
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds no JSON object and is left out.")
        return None
    return value


def _lines(path: Path, notes: list[str], root: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        return []
    rows: list[Mapping[str, Any]] = []
    broken: list[int] = []
    for at, line in _numbered(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(at)
    if broken:
        where = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        notes.append(f"{len(broken)} line(s) of {path.relative_to(root).as_posix()} could not be read (line {where}).")
    return rows


def _tail(path: Path, most: int = 40) -> list[str]:
    return [line.rstrip("\n") for _, line in _numbered(path)][-most:] if path.is_file() else []


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    # Split at line feeds only: a response may hold other characters that str.splitlines takes for line ends.
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        yield from ((at, line) for at, line in enumerate(file, start=1) if line.strip())


def _curves(rows: list[Mapping[str, Any]]) -> dict[str, Curve]:
    points: dict[str, list[tuple[float, float]]] = {}
    for at, row in enumerate(rows):
        step = number(row.get("step"))
        for name, value in row.items():
            if name != "step" and (y := number(value)) is not None:
                points.setdefault(name, []).append((at if step is None else step, y))
    return {name: Curve(name, tuple(x for x, _ in p), tuple(y for _, y in p)) for name, p in points.items()}


def _sample(line: Mapping[str, Any]) -> Sample:
    row, ended, tokens = line.get("row"), line.get("ended"), line.get("tokens")
    return Sample(
        prompt=_text(line.get("prompt")),
        arm=_text(line.get("arm")) or "response",
        row=row if isinstance(row, int) else -1,
        text=_text(line.get("text")),
        ended=ended if isinstance(ended, bool) else None,
        gold=number(line.get("gold")),
        proxy=number(line.get("proxy")),
        kl=number(line.get("kl")),
        tokens=tuple(
            Token(_text(t.get("text")), *(number(t.get(key)) for key in NUMBERS))
            for t in (tokens if isinstance(tokens, list) else [])
            if isinstance(t, Mapping)
        ),
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)
