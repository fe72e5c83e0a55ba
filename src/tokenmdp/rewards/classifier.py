"""A text classifier as a reward: TF-IDF of words and word pairs, then logistic regression.

    score(x, y) = b + Σ_f w_f · u_f / |u|,   u_f = (1 + log count_f(x + y)) · idf_f,   P(label 1 | text) = σ(score)

It reads the prompt's text and the response as one text. It is fast, fixed and open to inspection: a gold reward that
stands in for people, trained on texts that nothing else sees.

Source: features as scikit-learn's `TfidfVectorizer` (sublinear counts, smooth idf, rows of unit length); the score is
the log-odds, in nats. Differs: at prediction the features are computed here, so a saved classifier is two plain files
and no version of another library.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tokenmdp import mdp
from tokenmdp.types import Batch, Score

_WORD = re.compile(r"(?u)\b\w\w+\b")  # scikit-learn's own: words of two characters or more


class TextClassifier:
    """A fitted classifier; make one with `fit` or `load`.

    Attributes:
        name: what tables call it.
        vocabulary: feature (a word, or two words with a space) to its index.
        weight: [F] log-odds a unit of each feature.
        idf: [F] inverse document frequency, log((1 + n) / (1 + n_f)) + 1.
        bias: log-odds of an empty text.
    """

    def __init__(
        self, vocabulary: Mapping[str, int], idf: np.ndarray, weight: np.ndarray, bias: float, name: str = "classifier"
    ):
        self.name = name
        self.vocabulary = dict(vocabulary)
        self.idf, self.weight, self.bias = idf.astype(np.float64), weight.astype(np.float64), float(bias)

    @staticmethod
    def fit(
        texts: Sequence[str], labels: Sequence[int], name: str = "classifier", min_texts: int = 2
    ) -> TextClassifier:
        """Learn from labelled texts.

        Args:
            labels: 1 for what the score should be high for, else 0.
            min_texts: a feature must occur in that many texts.

        Raises:
            ValueError: texts and labels differ in number, labels are not 0 and 1 with both present, or no feature is
                frequent enough.
        """
        if len(texts) != len(labels):
            raise ValueError(f"{len(texts)} texts came with {len(labels)} labels: one a text")
        if set(labels) != {0, 1}:
            raise ValueError(
                f"the labels are {sorted(set(labels))[:5]}; a classifier needs 0 and 1, and examples of both"
            )
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=min_texts, sublinear_tf=True)
        try:
            features = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ValueError(
                f"{len(texts)} texts share no word that occurs in {min_texts} of them: give more text"
            ) from error
        # Rows have length 1, so the usual C = 1 would press the log-odds of a calibrated classifier to less than half
        # of what they are.
        model = LogisticRegression(C=10.0, max_iter=1000).fit(features, labels)
        vocabulary = {feature: int(index) for feature, index in vectorizer.vocabulary_.items()}
        return TextClassifier(vocabulary, vectorizer.idf_, model.coef_[0], float(model.intercept_[0]), name)

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """[N] log-odds of label 1, in nats."""
        return np.array([self._logit(text) for text in texts], dtype=np.float64)

    def _logit(self, text: str) -> float:
        words = _WORD.findall(text.lower())
        pairs = [f"{first} {second}" for first, second in pairwise(words)]
        counts = Counter(self.vocabulary[feature] for feature in [*words, *pairs] if feature in self.vocabulary)
        if not counts:
            return self.bias
        index = np.fromiter(counts.keys(), dtype=np.int64)
        value = (1.0 + np.log(np.fromiter(counts.values(), dtype=np.float64))) * self.idf[index]
        return self.bias + float(value @ self.weight[index]) / math.sqrt(float(value @ value))

    def accuracy(self, texts: Sequence[str], labels: Sequence[int]) -> float:
        """The share of texts whose label the sign of the score gives."""
        if not texts:
            raise ValueError("no texts to measure an accuracy on: the selection is empty")
        return float(np.mean((self.logits(texts) > 0) == (np.asarray(labels) == 1)))

    def __call__(self, batch: Batch) -> Score:
        """[B] log-odds of prompt and response read as one text."""
        mdp.touch("reward")
        texts = [prompt.text + text for prompt, text in zip(batch.prompts, batch.texts, strict=True)]
        return Score.of(torch.from_numpy(self.logits(texts)).float().to(batch.tokens.device))

    def save(self, folder: Path | str) -> None:
        """Write `vocabulary.json` and `weights.safetensors`; each appears whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        order = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            words, weights = Path(partial) / "vocabulary.json", Path(partial) / "weights.safetensors"
            words.write_text(json.dumps({"name": self.name, "features": order}, ensure_ascii=False), encoding="utf-8")
            save_file({"idf": self.idf, "weight": self.weight, "bias": np.array([self.bias])}, weights)
            for file in (words, weights):
                os.replace(file, folder / file.name)

    @staticmethod
    def load(folder: Path | str) -> TextClassifier:
        """Read what `save` wrote.

        Raises:
            ValueError: a file is missing, damaged or does not belong to the other.
        """
        folder = Path(folder)
        try:
            words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
            arrays = load_file(folder / "weights.safetensors")
            features, idf, weight, bias = words["features"], arrays["idf"], arrays["weight"], arrays["bias"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"there is no whole classifier in {folder} ({error}): fit it again or restore the folder"
            ) from error
        if not len(features) == len(idf) == len(weight):
            raise ValueError(
                f"{folder} has {len(features)} features and {len(weight)} weights: its files are from two classifiers"
            )
        return TextClassifier({f: i for i, f in enumerate(features)}, idf, weight, float(bias[0]), words["name"])
