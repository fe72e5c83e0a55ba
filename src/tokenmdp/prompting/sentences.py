"""What queries and prompts mean, by a sentence model: computed once a text, kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenmdp.models import embedding
from tokenmdp.models.embedding_cache import Cache, embedded
from tokenmdp.prompting.features import Embed, Features, Learn


def embedder(name: str, cache: Path | None = None) -> Embed:
    """A function of texts to [N, D], by the sentence model of a name: `minilm`, a folder or a hub id.

    Args:
        cache: a folder in which each text's numbers are kept, by model and text.
    """
    model = embedding.minilm() if name == "minilm" else embedding.encoder(name)
    kept = None if cache is None else Cache(cache, model)

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray(embedded(model, list(texts), kept).float().numpy(), dtype=np.float32)

    return embed


def learn(name: str, components: int, cache: Path) -> Learn:
    """How the queries' features are learned: words and sizes, and meanings where a sentence model is named.

    Args:
        name: minilm, a folder or a hub id; empty for none.
        components: singular vectors kept of the words, and of the embeddings.
        cache: where embeddings are kept.
    """
    if not name:
        return lambda texts: Features(components=components).fit(texts)
    embed = embedder(name, cache)
    return lambda texts: Features(("tfidf", "surface", "embedding"), components, embed).fit(texts)
