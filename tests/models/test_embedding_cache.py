"""Embeddings computed once: equal pieces, other processes, killed runs, damaged files, other models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny_models import ragged, tiny
from tokenmdp.models import embedding_cache
from tokenmdp.models.embedding import OwnBody
from tokenmdp.models.embedding_cache import Cache, embedded
from tokenmdp.types import Batch


class Counting(OwnBody):
    """Counts the rows it reads, and breaks off after some of them, as a power cut would."""

    rows, most = 0, 1_000_000

    def states(self, tokens: Tensor, real: Tensor) -> Tensor:
        self.rows += len(tokens)
        if self.rows > self.most:
            raise KeyboardInterrupt
        return super().states(tokens, real)


def test_equal_rows_are_read_once_and_progress_counts_them_all():
    own, told = Counting(tiny("llama").freeze()), []
    b = ragged()
    found = embedded(own, Batch.concat([b, b]), advance=told.append)
    assert own.rows == len(b)
    assert sum(told) == 2 * len(b)
    assert torch.equal(found[: len(b)], found[len(b) :])


def test_a_cache_answers_for_the_body_bit_for_bit_and_grows(tmp_path: Path):
    first, b = Counting(tiny("llama").freeze()), ragged(8)
    cache = Cache(tmp_path, first)
    half = embedded(first, b.select(range(4)), cache)
    assert len(cache) == 4
    again = Counting(tiny("llama").freeze())
    reopened = Cache(tmp_path, again)
    assert torch.equal(embedded(again, b.select(range(4)), reopened), half)
    assert again.rows == 0
    embedded(again, b, reopened)
    assert again.rows == 4
    assert len(Cache(tmp_path, again)) == 8
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")], "nothing half-written stays"


def test_a_call_that_was_killed_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedding_cache, "PART_ROWS", 2)
    own, b = Counting(tiny("llama").freeze()), ragged(8)
    own.most = 5
    with pytest.raises(KeyboardInterrupt):
        embedded(own, b, Cache(tmp_path, own), tokens=1)
    own.rows, own.most = 0, 100
    embedded(own, b, Cache(tmp_path, own), tokens=1)
    assert own.rows == 4, "five rows were read and four of them had been kept"


def test_a_damaged_part_is_set_aside_and_read_again(tmp_path: Path):
    own, b = Counting(tiny("llama").freeze()), ragged(4)
    wanted = embedded(own, b, Cache(tmp_path, own))
    [part] = tmp_path.rglob("*.safetensors")
    data = bytearray(part.read_bytes())
    data[-3] ^= 1  # one bit of the last number: the file still opens
    part.write_bytes(data)
    cache = Cache(tmp_path, own)
    assert len(cache) == 0
    assert [path.suffix for path in cache.damaged] == [".damaged"]
    assert torch.equal(embedded(own, b, cache), wanted)
    part.write_bytes(data[:50])
    assert Cache(tmp_path, own).damaged == [part.with_suffix(".damaged")]


def test_models_are_never_mixed(tmp_path: Path):
    one, other = OwnBody(tiny("llama").freeze()), OwnBody(tiny("llama", seed=1).freeze())
    cache = Cache(tmp_path, one)
    embedded(one, ragged(), cache)
    with pytest.raises(ValueError, match=r"is of the embedder .* open a cache for it"):
        embedded(other, ragged(), cache)
    [part] = tmp_path.rglob("*.safetensors")
    theirs = tmp_path / other.fingerprint()
    theirs.mkdir()
    (theirs / part.name).write_bytes(part.read_bytes())
    with pytest.raises(ValueError, match=f"holds embeddings of {one.fingerprint()}, and this is the cache of"):
        Cache(tmp_path, other)
