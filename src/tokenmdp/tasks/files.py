"""Rows from a file or the hub, as they are: JSONL, JSON, CSV or Parquet, gzipped or not.

Files are read here, by line, so that an error names the line and a changed file is never answered from a cache; the hub
is asked through `datasets`. What columns mean is in `formats`.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_MAGIC = {b"PAR1": "a Parquet file", b"\x1f\x8b\x08": "a gzipped file"}  # what such a file begins with
csv.field_size_limit(1 << 27)  # a cell may hold a whole document; Python's own limit is 128 kB


def rows(source: str | Path, split: str = "train") -> list[Row]:
    """The rows of a JSONL, JSON, CSV or Parquet file, of a folder's `{split}` file, or of a hub data set.

    Args:
        source: a path, or a hub id (`owner/name`, or `owner/name:configuration`).
        split: of a folder or a hub data set; a single file has none.

    Raises:
        ValueError: nothing there, another format, a line that cannot be read, or no rows; with what was tried.
    """
    return list(stream(source, split))


def stream(source: str | Path, split: str = "train") -> Iterator[Row]:
    """As `rows`, one by one: of JSONL, CSV and Parquet no more than a part is in memory at a time."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = _split_file(path, split)
    if path.is_file():
        found = _read(path)
    elif _looks_like_hub_id(str(source)):
        found = iter(_from_hub(str(source), split))
    else:
        near = (
            difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
            if path.parent.is_dir()
            else []
        )
        raise ValueError(
            f"there is no data at {path.absolute()}" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    first = next(found, None)
    if first is None:
        raise ValueError(f"{source} has no rows: there is nothing to learn from")
    yield first
    yield from found


def _looks_like_hub_id(source: str) -> bool:
    """Whether to ask the hub: not for the name of a data file, not in a folder that exists here."""
    owner = source.partition("/")[0] if "/" in source else ""
    return bool(_HUB_ID.fullmatch(source)) and not source.endswith(SUFFIXES) and not (owner and Path(owner).is_dir())


def _split_file(folder: Path, split: str) -> Path:
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    has = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"{folder} has no file {split}.jsonl (or .json, .csv, .parquet); it has {has}")


def _read(path: Path) -> Iterator[Row]:
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind == "parquet":
        yield from _parquet(path)
        return
    if kind not in ("jsonl", "json", "csv"):
        raise ValueError(f"{path} is of a kind that is not read here; a data file ends in one of {', '.join(SUFFIXES)}")
    try:
        with _open(path) as file:
            if kind == "csv":
                yield from _csv(path, file)
            elif kind == "jsonl":
                yield from _lines(path, file)
            else:
                yield from _json(path, file.read())
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        with path.open("rb") as raw:
            first = raw.read(4)
        looks = next((kind for magic, kind in _MAGIC.items() if first.startswith(magic)), "")
        what = f"it is {looks}: give it the ending of one" if looks else "save it as such"
        raise ValueError(f"{path} cannot be read as UTF-8 {kind} ({error}): {what}") from error


def _open(path: Path) -> IO[str]:
    # utf-8-sig: files from spreadsheets begin with a mark that would become part of the first column's name
    if path.suffix == ".gz":
        return cast(IO[str], gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return path.open(encoding="utf-8-sig", newline="")


def _lines(path: Path, file: IO[str] | Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _object(path, f"line {number}", line)


def _object(path: Path, where: str, text: str) -> Row:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, {where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}, {where}: {value!r:.60} is not a row; a row is an object of columns")
    return value


def _json(path: Path, text: str) -> list[Row]:
    """A list of rows; or rows line by line, as many files called .json are."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return list(_lines(path, text.split("\n")))
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{path} holds {type(value).__name__}; it must be a list of rows, each an object of columns")
    return value


def _csv(path: Path, file: IO[str]) -> Iterator[Row]:
    reader = csv.DictReader(file, strict=True)
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, line {reader.line_num}: not as many cells as the {len(reader.fieldnames or [])} columns of "
                "the header"
            )
        yield dict(row)


def _parquet(path: Path) -> Iterator[Row]:
    parquet: Any = importlib.import_module("pyarrow.parquet")  # slow to import, and has no types
    try:
        for part in parquet.ParquetFile(path).iter_batches():
            yield from part.to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's own errors are these
        raise ValueError(f"{path} is not a whole Parquet file ({error})") from error


def _from_hub(name: str, split: str) -> list[Row]:
    import datasets

    owner, _, configuration = name.partition(":")
    try:
        return [dict(row) for row in datasets.load_dataset(owner, configuration or None, split=split)]
    except (
        Exception
    ) as error:  # no network, no such name, split or configuration: many kinds, and the message tells them apart
        raise ValueError(
            f"{name!r} is no file or folder here, and as a hub data set it could not be read (split {split!r}): "
            f"{error}. A configuration is given as owner/name:configuration"
        ) from error
