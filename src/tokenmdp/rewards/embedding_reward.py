"""The learned reward on frozen embeddings: a body read once, and a head that is fitted in seconds.

    r(x, y) = ( head(embedding(x, y)) − shift ) / scale

What costs minutes, reading the texts, is done once and kept (`models.embedding_cache`); what is tried many times, heads,
objectives and label noise, costs seconds. On disk it is a small folder of two files: how to make the embedding again
with the fingerprint that it must have, and the numbers of the head.

Source: heads on fixed embeddings as reward models: Sun, Shen & Ton 2024; see `embedding_head`.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tokenmdp import mdp
from tokenmdp.models import catalog, embedding
from tokenmdp.models.embedding import Embedder
from tokenmdp.models.embedding_cache import Cache, embedded
from tokenmdp.models.policy import Policy
from tokenmdp.rewards.embedding_head import HEADS, OBJECTIVES, Head, fit, from_arrays
from tokenmdp.types import Batch, Score

__all__ = ["FILE", "HEADS", "OBJECTIVES", "EmbeddingReward", "Head", "fit", "from_arrays"]

FILE = "embedding_reward.json"
_HEAD = "head.safetensors"


class EmbeddingReward:
    """Scores a response by its embedding.

    Attributes:
        embedder: what reads the response.
        head: what makes a score of it.
        shift, scale: the affine map that makes scores comparable between runs.
        cache: where embeddings are looked up and kept; None, as after loading, keeps none: a policy's samples are new.
    """

    def __init__(
        self, embedder: Embedder, head: Head, name: str = "embedding_reward", cache: Cache | None = None
    ) -> None:
        self.embedder, self.head, self.name, self.cache = embedder, head, name, cache
        self.shift, self.scale = 0.0, 1.0

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Score:
        """[B] scores; each has a verdict, an empty response too."""
        mdp.touch("learned_reward")
        raw = self.head.score(embedded(self.embedder, batch, self.cache))
        return Score.of(((raw - self.shift) / self.scale).float().to(batch.tokens.device))

    def normalise(self, batch: Batch) -> None:
        """Set shift and scale so that this batch's scores have mean 0 and variance 1."""
        self.shift, self.scale = 0.0, 1.0
        value = self(batch).value
        self.shift, self.scale = float(value.mean()), max(float(value.std(unbiased=False)), 1e-6)

    def save(self, folder: Path | str) -> None:
        """Write `embedding_reward.json` and `head.safetensors`; each appears whole or not at all.

        The body is not copied: the folder says where it came from and what its fingerprint is.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        e = self.embedder
        source = str(Path(e.source).resolve()) if Path(e.source).exists() else e.source
        about = {
            "embedding": {
                "kind": e.kind,
                "source": source,
                "pool": e.pool,
                "over": e.over,
                "fingerprint": e.fingerprint(),
            },
            "head": self.head.kind,
            "name": self.name,
            "shift": self.shift,
            "scale": self.scale,
        }
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            words, numbers = Path(partial) / FILE, Path(partial) / _HEAD
            words.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            save_file({name: array.contiguous() for name, array in self.head.arrays().items()}, numbers)
            for file in (numbers, words):
                os.replace(file, folder / file.name)

    @staticmethod
    def load(folder: Path | str, policy: Policy) -> EmbeddingReward:
        """Read what `save` wrote; a body of the policy's own is that of `policy` where it is the same, else loaded.

        Raises:
            ValueError: a file is missing or damaged, the body is not where it was or not what it was, or it has another
                tokenizer than the policy.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / FILE).read_text(encoding="utf-8"))
            head = from_arrays(str(about["head"]), load_file(folder / _HEAD))
            made, name, shift, scale = about["embedding"], about["name"], float(about["shift"]), float(about["scale"])
            kind, source, pool, over, fingerprint = (
                str(made[key]) for key in ("kind", "source", "pool", "over", "fingerprint")
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"there is no whole embedding reward in {folder} ({error}): fit it again with `tokenmdp embedding-reward`, "
                "or restore the folder"
            ) from error
        embedder = embedding.load(source if kind == "encoder" else kind, policy, pool, over, source)
        if kind == "own" and embedder.fingerprint() != fingerprint:
            embedder = embedding.OwnBody(_body(folder, source, policy), pool, over, source)
        if embedder.fingerprint() != fingerprint:
            raise ValueError(
                f"the reward in {folder} was fitted on embeddings of {fingerprint}, and {source} makes those of "
                f"{embedder.fingerprint()}: put back the model that was there, or fit the reward again"
            )
        out = EmbeddingReward(embedder, head, name)
        out.shift, out.scale = shift, scale
        return out


def _body(folder: Path, source: str, policy: Policy) -> Policy:
    """The policy whose body a reward was fitted on, which is not the one to be judged."""
    try:
        other = catalog.load(source, str(policy.backbone.compute).removeprefix("torch."), str(policy.device)).freeze()
    except ValueError as error:
        raise ValueError(
            f"the reward in {folder} reads the body of {source}, which cannot be loaded ({error}): put that model back, or "
            "fit the reward again on this policy's body"
        ) from error
    if other.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ValueError(
            f"the reward in {folder} reads tokens of {source}, whose tokenizer is not that of {policy.name}: fit it on this "
            "policy's body, or with --embedding minilm, which reads text"
        )
    return other
