"""What the curves of a run look like: which failure signatures they show, at which step each was first seen.

A run says the same while it runs (`tokenmdp.monitors`, where each signature and its limits stand); this reads it off any
folder with a metrics.jsonl, its stages' included, from our runs or under the same metric names from elsewhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenmdp import monitors
from tokenmdp.run import Run
from tokenmdp.run.files import read_lines

SCRATCH = True  # a tool: it leaves no run folder behind unless one is asked for


@dataclass(frozen=True)
class Config:
    folder: str = "runs/ppo"  # the run


def main(cfg: Config, run: Run) -> dict[str, Any]:
    """Read the metrics, print the alarms.

    Raises:
        ValueError: no folder is named.
        FileNotFoundError: there is no metrics.jsonl in the folder or in one below it.
    """
    if not cfg.folder:
        raise ValueError("folder is empty: give the folder of a run")
    root = Path(cfg.folder)
    found = sorted(path for path in root.rglob("metrics.jsonl") if path.is_file())
    if not found:
        raise FileNotFoundError(f"there is no metrics.jsonl in {root} or below it: give the folder of a run")
    alarms: list[dict[str, Any]] = []
    asked: set[str] = set()
    table = Table(title=f"{root}: what its curves show", title_justify="left")
    for head in ("stage", "monitor", "step", "what it means"):
        table.add_column(head, overflow="fold")
    for path in found:
        stage = path.parent.relative_to(root).as_posix().removeprefix(".")
        watch = monitors.watched(read_lines(path))
        if watch.curves.keys() & set(monitors.LEARNING):
            asked |= {name for name, (_, reads) in monitors.MONITORS.items() if set(reads) <= watch.curves.keys()}
        for alarm in watch.given.values():
            alarms.append({"stage": stage, **asdict(alarm)})
            table.add_row(Text(stage), alarm.monitor, str(alarm.step), Text(alarm.says))
    console = Console(width=None if Console().is_terminal else 140)
    if alarms:
        console.print(table)
    blind = {name: reads for name, (_, reads) in monitors.MONITORS.items() if name not in asked}
    count = f"{len(found)} metrics.jsonl in {root}"
    console.print(
        f"{count}: {len(alarms) or 'no'} alarms. Asked: {', '.join(sorted(asked)) or 'nothing'}.", highlight=False
    )
    if blind:
        said = "; ".join(f"{name} needs {', '.join(reads)}" for name, reads in blind.items())
        console.print(f"Not asked, for what they read is not there or nothing was learned: {said}.", highlight=False)
    return {"alarms": alarms, "asked": sorted(asked), "not_asked": sorted(blind)}
