"""Files that are whole or not there, checkpoints and their faults, and the random streams among the states."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


@contextlib.contextmanager
def writing(path: Path, needed: int, kept: str = "") -> Iterator[None]:
    """Turn a failure to write `needed` bytes to `path` into a message that says where, how much, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as fault:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"cannot write {path.name} in {path.parent}: {getattr(fault, 'strerror', None) or fault}. It needs "
            f"{needed / 1e6:,.3f} MB and {free / 1e6:,.3f} MB are free there. {kept}Make room, then go on with --resume"
        ) from fault


def settle(*finished: Path) -> None:
    """Give temporary files (.NAME.tmp) their names; after a power cut each is there whole, or is not there."""
    for temp in finished:
        with open(temp, "rb+") as file:
            os.fsync(file.fileno())
    for temp in finished:
        os.replace(temp, temp.with_name(temp.name[1:-4]))
    folder = os.open(finished[0].parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def write(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    temp = temporary(path)
    with writing(path, len(data)):
        try:
            temp.write_bytes(data)
            settle(temp)
        finally:
            temp.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """What JSON has no word for: paths, tensors and arrays."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor | numpy.ndarray | numpy.generic):
        return value.tolist()
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")


def to_json(value: Mapping[str, Any], indent: int | None = 1, finite: bool = True) -> bytes:
    return (json.dumps(value, indent=indent, allow_nan=not finite, ensure_ascii=False, default=_plain) + "\n").encode()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_header(folder: Path) -> dict[str, Any] | None:
    """What config.json says, or None where there is none of ours (a model's folder has a config.json too)."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) and {"config", "seed", "stage", "files"} <= found.keys() else None


def clear(folder: Path, header: Mapping[str, Any]) -> None:
    """Take away what a run and its stages wrote by themselves, and nothing else; config.json goes last."""
    for inner in folder.iterdir():
        if inner.is_dir() and (stage := read_header(inner)) and stage["stage"]:
            clear(inner, stage)
    for path in [*checkpoint_files(folder), *folder.glob("tensorboard/events.*")]:
        path.unlink()
    for name in [*header["files"], "result.json", "log.txt", "config.json"]:
        (folder / name).unlink(missing_ok=True)
    for emptied in (folder / "checkpoints", folder / "tensorboard", folder):  # a folder with something else in it stays
        with contextlib.suppress(OSError):
            emptied.rmdir()


def checkpoint_files(folder: Path) -> list[Path]:
    """Checkpoints, their hashes, and what a killed process left of either."""
    ours = re.compile(r"\.?step-\d+\.(safetensors|sha256)(\.tmp)?")
    return [path for path in folder.glob("checkpoints/*") if ours.fullmatch(path.name)]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    whole = [path for path in checkpoint_files(folder) if path.suffix == ".safetensors"]
    return sorted(whole, key=lambda path: int(path.stem.removeprefix("step-")), reverse=True)


def read_about(path: Path) -> dict[str, str]:
    """The header of a checkpoint: its step, the states' scalars, the lengths of the files."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def find_fault(path: Path) -> str:
    """Why a checkpoint cannot be used; empty when it is whole."""
    seal = path.with_suffix(".sha256")
    if not seal.exists():
        return f"{seal.name} is missing"
    if seal.read_text().split()[:1] != [sha256(path)]:
        return f"its bytes do not match {seal.name}: it is damaged or half written"
    for name, size in json.loads(read_about(path)["files"]).items():
        file = path.parent.parent / name
        if not file.exists() or file.stat().st_size < size:
            return f"{name} is shorter than it was at that step"
    return ""


def number_of(seed: int, stage: str) -> int:
    """A seed for one stage, the same on every machine; neighbouring seeds and names give unrelated streams."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}".encode()).digest()[:8], "big") >> 1


def seed_the_global_streams(seed: int, stage: str) -> None:
    """Model initialisation, dropout and users' code draw from these; ours draws from `Run.rng`."""
    number = number_of(seed, stage + "/global")
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number % 2**32)


class Chance:
    """Every random stream a step may draw from, as one more state."""

    def __init__(self, rng: torch.Generator) -> None:
        self.rng = rng

    def tensors(self) -> dict[str, Tensor]:
        words = numpy.random.get_state(legacy=False)["state"]["key"].astype(numpy.int64)
        found = {"run": self.rng.get_state(), "torch": torch.get_rng_state(), "numpy": torch.from_numpy(words)}
        found["python"] = torch.tensor(random.getstate()[1])
        if torch.cuda.is_available():
            found |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        return found

    def scalars(self) -> dict[str, Any]:
        state = numpy.random.get_state(legacy=False)
        return {"python": random.getstate()[2], "numpy": [state["state"]["pos"], state["has_gauss"], state["gauss"]]}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.rng.set_state(tensors["run"].clone())
        torch.set_rng_state(tensors["torch"].clone())
        random.setstate((3, tuple(tensors["python"].tolist()), scalars["python"]))
        numpy.random.set_state(("MT19937", tensors["numpy"].numpy().astype(numpy.uint32), *scalars["numpy"]))
        if torch.cuda.is_available() and "cuda0" in tensors:
            torch.cuda.set_rng_state_all([tensors[f"cuda{i}"].clone() for i in range(torch.cuda.device_count())])
