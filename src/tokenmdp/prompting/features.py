"""Queries and prompts as numbers: each text once, crossed only when a model asks for trials.

    tfidf      singular vectors of TF-IDF counts of words and pairs of words
    surface    lengths, how many numbers there are and how large, words that name operations
    embedding  a sentence model's (see `models.embedding`): what texts mean, at 10 ms a text

What is learned from texts (counts, directions, scales) is learned from the texts given to `fit` and no others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""[N, D] of N texts; cached by whoever gives it."""

KINDS = ("tfidf", "surface", "embedding")
WORDS = (
    "each", "every", "per", "total", "altogether", "left", "remain", "more", "less", "fewer", "than", "times", "twice", "half",
    "percent", "%", "$", "average", "difference", "if", "then", "first", "step", "after", "before", "how many", "how much",
)  # fmt: skip
FLAT = 1e-6  # a spread that is none
PATTERN = r"\S+"  # what a word is: whatever stands between blanks
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def surface(text: str) -> list[float]:
    """Counts and sizes: characters, words, sentences, numbers, the largest of them, fractions, and the words above."""
    lower = text.lower()
    numbers = [float(n.replace(",", "")) for n in _NUMBER.findall(text)]
    return [
        math.log1p(len(text)),
        math.log1p(len(text.split())),
        float(len(re.findall(r"[.!?](?:\s|$)", text))),
        float(len(numbers)),
        math.log1p(min(max(numbers, default=0.0), 1e12)),
        float(sum(n != int(n) for n in numbers if n < 1e15)),
        float(len(re.findall(r"\d\s*/\s*\d", text))),
        *(float(lower.count(word)) for word in WORDS),
    ]


class Features:
    """Texts to [N, D] float32.

    Args:
        kinds: which of `KINDS`, in order.
        components: singular vectors kept of the TF-IDF counts, and of embeddings where they are wider.
        embed: needed for `embedding`.
        seed: of the decomposition's random start.

    Attributes:
        width: D, after `fit`.
    """

    def __init__(
        self,
        kinds: Sequence[str] = ("tfidf", "surface"),
        components: int = 64,
        embed: Embed | None = None,
        seed: int = 0,
    ) -> None:
        self.kinds, self.components, self.embed, self.seed = tuple(kinds), components, embed, seed

    def fit(self, texts: Sequence[str]) -> Features:
        """Learn counts, directions and scales.

        Raises:
            ValueError: an unknown kind, `embedding` without `embed`, or no texts.
        """
        wrong = [kind for kind in self.kinds if kind not in KINDS]
        if wrong or not self.kinds:
            raise ValueError(f"kinds is {self.kinds}; it must hold one or more of {', '.join(KINDS)}")
        if "embedding" in self.kinds and self.embed is None:
            raise ValueError("kinds has `embedding`, so `embed` must be given: a function of texts to [N, D] numbers")
        if not texts:
            raise ValueError("no texts to learn features from")
        from sklearn.preprocessing import StandardScaler

        raw = self._raw(texts, learn=True)
        self.scale = StandardScaler().fit(raw)
        # What is the same in all texts but for rounding would else become noise as large as any feature.
        self.scale.scale_ = np.where(self.scale.scale_ < FLAT, 1.0, self.scale.scale_)
        self.width = raw.shape[1]
        self.last = (tuple(texts), np.asarray(self.scale.transform(raw), dtype=np.float32))
        return self

    def facts(self) -> dict[str, Any]:
        """What `restored` needs besides `arrays`: the settings and the vocabulary."""
        words = {word: int(at) for word, at in self.counts.vocabulary_.items()} if "tfidf" in self.kinds else {}
        return {"kinds": self.kinds, "components": self.components, "seed": self.seed, "vocabulary": words}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The numbers that were learned."""
        found = {"mean": self.scale.mean_, "scale": self.scale.scale_}
        if "tfidf" in self.kinds:
            found["idf"] = self.counts.idf_
            if self.reduce is not None:
                found["directions"] = self.reduce.components_
        if "embedding" in self.kinds and self.embedded is not None:
            found["embedded"] = self.embedded.components_
        return found

    @staticmethod
    def restored(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], embed: Embed | None = None) -> Features:
        """The features that `facts` and `arrays` were taken from."""
        from sklearn.preprocessing import StandardScaler

        self = Features(tuple(facts["kinds"]), int(facts["components"]), embed, int(facts["seed"]))
        if "tfidf" in self.kinds:
            self.counts = _counter(vocabulary=facts["vocabulary"])
            self.counts.idf_ = arrays["idf"]
            self.reduce = _with(arrays.get("directions"))
        self.embedded = _with(arrays.get("embedded"))
        self.scale = StandardScaler()
        self.scale.mean_, self.scale.scale_ = arrays["mean"], arrays["scale"]
        self.scale.n_features_in_ = self.width = len(arrays["mean"])
        self.last = ((), np.zeros((0, self.width), dtype=np.float32))
        return self

    def transform(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[N, D]; of texts never seen, too. Asked for the same texts as last time it says what it said."""
        if not len(texts):
            return np.zeros((0, self.width), dtype=np.float32)
        same = tuple(texts)
        if same != self.last[0]:
            self.last = (same, np.asarray(self.scale.transform(self._raw(texts)), dtype=np.float32))
        return self.last[1]

    def _raw(self, texts: Sequence[str], learn: bool = False) -> NDArray[np.float64]:
        """[N, D] before it is scaled; counts and directions are learned from these texts first, where asked."""
        parts = []
        for kind in self.kinds:
            if kind == "tfidf":
                if learn:
                    self.counts = _counter(min_df=2 if len(texts) > 50 else 1, max_features=1 << 15)
                found = self.counts.fit_transform(texts) if learn else self.counts.transform(texts)
                if learn:
                    self.reduce = _reducer(found, self.components, self.seed)
                parts.append(_reduced(found, self.reduce))
            elif kind == "surface":
                parts.append(np.asarray([surface(text) for text in texts]))
            elif self.embed is not None:
                found = self.embed(texts)
                if learn:
                    wide = found.shape[1] > self.components
                    self.embedded = _reducer(found, self.components, self.seed) if wide else None
                parts.append(_reduced(found, self.embedded))
        return np.concatenate(parts, axis=1)


Learn = Callable[[Sequence[str]], Features]
"""Features that have learned from texts, anew at every call."""


def plain(texts: Sequence[str]) -> Features:
    """Features as they are when nothing is said of them."""
    return Features().fit(texts)


class Once:
    """Learns from the same texts once: proxies of the same trials share what was learned.

    Args:
        learn: what is asked for texts not seen yet.
        kept: sets of texts, as folds are; the oldest is forgotten.
    """

    def __init__(self, learn: Learn = plain, kept: int = 8) -> None:
        self.learn, self.kept, self.known = learn, kept, dict[tuple[str, ...], Features]()

    def __call__(self, texts: Sequence[str]) -> Features:
        same = tuple(texts)
        if same not in self.known:
            while len(self.known) >= self.kept:
                self.known.pop(next(iter(self.known)))
            self.known[same] = self.learn(texts)
        return self.known[same]


def _counter(**more: Any) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=PATTERN, **more)


def _reducer(matrix: Any, components: int, seed: int) -> TruncatedSVD | None:
    """Singular vectors of a matrix [N, W]; none where it is too small to have as many."""
    count = min(components, min(matrix.shape) - 1)
    from sklearn.decomposition import TruncatedSVD

    return TruncatedSVD(count, random_state=seed).fit(matrix) if count >= 1 else None


def _with(directions: NDArray[Any] | None) -> TruncatedSVD | None:
    if directions is None:
        return None
    from sklearn.decomposition import TruncatedSVD

    found = TruncatedSVD(len(directions))
    found.components_ = directions
    return found


def _reduced(matrix: object, by: TruncatedSVD | None) -> NDArray[np.float64]:
    if by is not None:
        return np.asarray(by.transform(matrix), dtype=np.float64)
    dense = matrix.toarray() if hasattr(matrix, "toarray") else matrix
    return np.asarray(dense, dtype=np.float64)
