"""Embeddings computed once: read in batches of similar length, kept on disk, never mixed.

    folder/FINGERPRINT/*.safetensors        hashes of pieces, their embeddings, and a hash of both

The fingerprint is of everything an embedding depends on besides the tokens, the hash of a piece is of its tokens: nothing
is read twice and no two models are mixed. A cache is plain numbers, in files that are written whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenmdp.models import fetch
from tokenmdp.models.embedding import KEY_BYTES, Embedder, Piece
from tokenmdp.models.parts import FORWARD_TOKENS, micro_batches
from tokenmdp.types import Batch

PART_ROWS = 1024  # embeddings computed before they go into a file


@torch.no_grad()
def embedded(
    embedder: Embedder,
    data: Batch | Sequence[str],
    cache: Cache | None = None,
    advance: Callable[[int], None] | None = None,
    tokens: int = FORWARD_TOKENS,
) -> Float[Tensor, "N D"]:
    """The embeddings of rows or texts, in order, in float32.

    Equal pieces are read once; what the cache holds is not read at all; the rest is read in batches of similar length,
    and goes into the cache as it comes, so that a call that was killed goes on where it stopped. A row without a token
    that counts (an empty response) is embedded as zeros.

    Args:
        cache: where embeddings are kept; None keeps them nowhere.
        advance: called with a number of finished rows, for a progress bar.
        tokens: padded positions in one pass; changes memory and speed only.

    Raises:
        ValueError: the cache is another embedder's.
    """
    pieces = embedder.pieces(data)
    if cache is not None and cache.fingerprint != embedder.fingerprint():
        raise ValueError(
            f"the cache in {cache.folder} is of the embedder {cache.fingerprint}, and {embedder.name} is "
            f"{embedder.fingerprint()}: open a cache for it"
        )
    different = {piece.key: piece for piece in pieces}
    known = {} if cache is None else {key: cache[key] for key in different if key in cache}
    missing = [piece for key, piece in different.items() if key not in known]
    tell = advance if advance is not None else lambda _: None
    tell(len(pieces) - len(missing))
    fresh: dict[bytes, Tensor] = {}
    for rows in micro_batches(torch.tensor([len(piece.ids) for piece in missing], dtype=torch.long), tokens):
        part = [missing[i] for i in rows.tolist()]
        fresh |= zip((piece.key for piece in part), _read(embedder, part), strict=True)
        tell(len(part))
        if cache is not None and len(fresh) >= PART_ROWS:
            cache.add(fresh)
            known, fresh = known | fresh, {}
    if cache is not None and fresh:
        cache.add(fresh)
    known |= fresh
    return torch.stack([known[piece.key] for piece in pieces]) if pieces else torch.zeros((0, embedder.width))


def _read(embedder: Embedder, part: Sequence[Piece]) -> Float[Tensor, "B D"]:
    """The embeddings of a few pieces, in one pass."""
    L = max(1, *(len(piece.ids) for piece in part))
    tokens = torch.zeros((len(part), L), dtype=torch.long)
    for row, piece in enumerate(part):
        tokens[row, : len(piece.ids)] = torch.tensor(piece.ids)
    at = torch.arange(L)
    length, start = (torch.tensor(x)[:, None] for x in ([len(p.ids) for p in part], [p.start for p in part]))
    real, counts = at < length, (at >= start) & (at < length)
    device = embedder.device
    states = embedder.states(tokens.to(device), (real | (at == 0)).to(device)).float().cpu()
    return embedder.finished(pooled(states, counts, embedder.pool))


def pooled(states: Float[Tensor, "B L D"], counts: Bool[Tensor, "B L"], pool: str) -> Float[Tensor, "B D"]:
    """One state a row: the mean of those that count, the last of them, or the first; zeros where none does."""
    some = counts.any(1, keepdim=True)
    if pool == "mean":
        total = torch.where(counts[..., None], states, torch.zeros_like(states)).sum(1)
        return total / counts.sum(1, keepdim=True).clamp(min=1)
    places = torch.where(counts, torch.arange(counts.shape[1]), -1)
    at = places.max(1).values if pool == "last" else counts.int().argmax(1)
    picked = states[torch.arange(len(states)), at.clamp(min=0)]
    return torch.where(some, picked, torch.zeros_like(picked))


class Cache:
    """Embeddings of one embedder on disk.

    A file that does not have its hash is set aside as `*.damaged`, and what it held is computed again. Several processes
    may write to one folder.

    Args:
        folder: where caches of any embedders are.
        embedder: whose.

    Attributes:
        damaged: files that were set aside when the cache was opened.

    Raises:
        ValueError: a file is whole, but of another embedder: somebody has put it there.
    """

    def __init__(self, folder: Path | str, embedder: Embedder) -> None:
        self.fingerprint = embedder.fingerprint()
        self.folder = Path(folder).expanduser() / self.fingerprint
        self.damaged: list[Path] = []
        self._known: dict[bytes, Tensor] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def __getitem__(self, key: bytes) -> Float[Tensor, "D"]:
        return self._known[key]

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                about = dict(file.metadata() or {})
            arrays = load_file(path)
            keys, values = arrays["keys"], arrays["values"]
            whole = about.get("sha256") == _digest(keys, values) and len(keys) == len(values)
        except (SafetensorError, OSError, KeyError):
            whole, about = False, {}
        if not whole:
            aside = path.with_suffix(".damaged")
            os.replace(path, aside)
            self.damaged.append(aside)
            return
        if about.get("embedder") != self.fingerprint:
            raise ValueError(
                f"{path} holds embeddings of {about.get('embedder')}, and this is the cache of {self.fingerprint}: take the "
                "file away"
            )
        self._known |= zip((bytes(key) for key in keys.numpy()), values, strict=True)

    def add(self, found: dict[bytes, Tensor]) -> None:
        """Keep embeddings, by the hash of their piece: one more file, whole or not at all."""
        keys = torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8).view(-1, KEY_BYTES)
        values = torch.stack(list(found.values())).contiguous()
        digest = _digest(keys, values)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=fetch.PARTIAL, dir=self.folder) as partial:
            whole = Path(partial) / "part"
            save_file({"keys": keys, "values": values}, whole, {"embedder": self.fingerprint, "sha256": digest})
            os.replace(whole, self.folder / f"{digest[:16]}.safetensors")
        self._known |= found


def cache_folder() -> Path:
    """Where embeddings are kept if nothing else is said: beside what was fetched."""
    return fetch.cache_folder() / "embeddings"


def _digest(keys: Tensor, values: Tensor) -> str:
    digest = hashlib.sha256(keys.contiguous().numpy().data)
    digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()
