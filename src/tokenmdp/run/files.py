"""Files that are whole or not there, checkpoints and their faults, and the random streams among the states."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
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


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a *.jsonl file, one a line; a line that was broken off says nothing, and no more does a file that is not there."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(found := json.loads(line), dict):
                    yield found


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_header(folder: Path) -> dict[str, Any] | None:
    """What config.json says, or None where there is none of ours (a model's folder has a config.json too)."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    kinds = {"config": dict, "seed": int, "stage": str, "files": list}
    if not isinstance(found, dict) or any(not isinstance(found.get(key), kind) for key, kind in kinds.items()):
        return None
    # These files are cut and taken away, and anyone may have written the list: it must not reach out of the folder.
    found["files"] = [n for n in found["files"] if isinstance(n, str) and Path(n).name == n and n.endswith(".jsonl")]
    return found


def header_fault(folder: Path) -> str:
    """What is wrong with a config.json that cannot be read; empty where there is none, or one that is not a run's."""
    try:
        json.loads((folder / "config.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as fault:
        return f"its config.json cannot be read: {fault.strerror}"
    except ValueError as fault:
        return f"its config.json is cut off or damaged: {fault}"
    return ""


_PARTS = re.compile(r"[,()+*:]")  # what rewards, credits and tasks are put together with
_READ = (".safetensors", ".json", ".jsonl", ".csv", ".parquet", ".gz", ".jinja", ".model", ".txt", ".gguf")


def named_paths(value: Any) -> Iterator[str]:
    """The files and folders that a config names and that are there: `a.jsonl`, `folder`, and those that a longer name is
    made of: `a.py:function`, `min(one, two)`, `0.5*one + two`, `log_ratio:one,two`.
    """
    if isinstance(value, str):
        for name in dict.fromkeys((value, *(part.strip() for part in _PARTS.split(value)))):
            if name.strip("./~ ") and os.path.exists(os.path.expanduser(name)):
                yield name
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from named_paths(inner)


def hashes(names: Iterable[str], but: Path | None = None) -> dict[str, str]:
    """The SHA-256 of each that is a regular file, and of what is read of one that is a folder: the model of a run's, else
    weights, data and settings in it.

    Args:
        but: a folder that is passed over, for what is in it changes.
    """
    found: dict[str, str] = {}
    for name in sorted(set(names)):
        path = Path(name).expanduser()
        run = path.is_dir() and read_header(path) is not None
        inside = sorted((path / "model" if run else path).glob("*")) if path.is_dir() else []
        for file in [path, *(file for file in inside if file.name.endswith(_READ))]:
            if file.is_file() and not (but is not None and file.resolve().is_relative_to(but.resolve())):
                found[name if file == path else str(file)] = sha256(file)
    return found


def belongings(folder: Path, header: Mapping[str, Any]) -> list[Path]:
    """The files that a run and its stages wrote by themselves, and no other; config.json last."""
    found = []
    for inner in folder.iterdir():
        if inner.is_dir() and (stage := read_header(inner)) and stage["stage"]:
            found += belongings(inner, stage)
    found += [*model_files(folder / "model"), *checkpoint_files(folder), *folder.glob("tensorboard/events.*")]
    ours = [folder / name for name in [*header["files"], "result.json", "log.txt", "config.json"]]
    return found + [path for path in ours if path.is_file() or path.is_symlink()]


def clear(folder: Path, header: Mapping[str, Any]) -> None:
    """Take away what a run and its stages wrote by themselves, and nothing else; config.json goes last."""
    gone = belongings(folder, header)
    for path in gone:
        path.unlink()
    emptied = {folder / "checkpoints", folder / "tensorboard", *(path.parent for path in gone)}
    for inner in sorted(emptied, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):  # a folder with something else in it stays
            inner.rmdir()


def model_files(folder: Path) -> list[Path]:
    """What saving a model writes, config.json last: while it is there, the folder is known to hold a model."""
    ours = re.compile(
        r"((adapter_|generation_)?config|(tokenizer|special|added|chat|tokenmdp)_\w+|tokenizer|vocab)\.json"
        r"|(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
        r"|(vocab|merges)\.txt|chat_template\.jinja|(tokenizer|spiece|sentencepiece\.bpe)\.model"
    )
    if folder.is_symlink() or not (folder / "config.json").is_file() or read_header(folder) is not None:
        return []
    found = [path for path in folder.iterdir() if ours.fullmatch(path.name) and not path.is_dir()]
    return sorted(found, key=lambda path: (path.name == "config.json", path.name))


def checkpoint_files(folder: Path, folders: bool = False) -> list[Path]:
    """Checkpoints, their hashes, and what a killed process left of either; or the folders that bear such a name."""
    ours = re.compile(r"\.?step-\d+\.(safetensors|sha256)(\.tmp)?")
    return [p for p in folder.glob("checkpoints/*") if ours.fullmatch(p.name) and p.is_dir() == folders]


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
    try:
        if seal.read_bytes().split()[:1] != [sha256(path).encode()]:  # bytes: a damaged seal need not be text
            return f"its bytes do not match {seal.name}: it is damaged or half written"
        about = read_about(path)
        sizes = dict(json.loads(about["files"]))
        json.loads(about["scalars"])
        int(about["step"])
    except OSError as fault:
        return f"it cannot be read: {fault}"
    except (SafetensorError, KeyError, TypeError, ValueError) as fault:
        return f"it matches {seal.name} and yet is no checkpoint: {fault!r}"
    for name, size in sizes.items():
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
