"""TensorBoard, W&B and trackio, for those who ask for them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

DASHBOARDS = ("tensorboard", "wandb", "trackio")
Sink = Callable[[str, int, Mapping[str, float]], None]


def open_dashboard(name: str, folder: Path, label: str, config: dict[str, Any]) -> tuple[Sink, Callable[[], None]]:
    """Open a dashboard by name: how to send it a step's metrics, and how to close it.

    A stage's metrics carry its name in front, for every stage counts its steps from 0.
    """
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(stage: str, step: int, metrics: Mapping[str, float]) -> None:
            for key, value in metrics.items():
                writer.add_scalar(stage + key, value, step)

        return to_tensorboard, writer.close
    board: Any = importlib.import_module(name)
    if name == "wandb":
        mode = os.environ.get("WANDB_MODE", "offline")  # nothing leaves the machine unless the user says so
        board = board.init(project="tokenmdp", name=folder.name, id=label, dir=folder, config=config, mode=mode)

        def to_wandb(stage: str, step: int, metrics: Mapping[str, float]) -> None:  # its own count may never go back
            board.log({f"{stage}step": step, **{stage + key: value for key, value in metrics.items()}})

        return to_wandb, board.finish
    board.init(project="tokenmdp", name=f"{folder.name}-{label}", config=config, resume="allow", embed=False)

    def to_trackio(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        board.log({stage + key: value for key, value in metrics.items()}, step=step)

    return to_trackio, board.finish


def check_dashboards(names: Sequence[str]) -> None:
    """Find out before anything is written whether the dashboards can be had."""
    for name in names:
        if name not in DASHBOARDS:
            raise ValueError(f"no dashboard is called {name!r}: there are {', '.join(DASHBOARDS)}")
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"--log {name} needs a package that is not installed: pip install {name}")
