"""The classifier reward against scikit-learn's own prediction, and what is written of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from tokenmdp.rewards.classifier import TextClassifier
from tokenmdp.types import Batch, Prompt

GOOD = [
    "a good film, really good",
    "I loved it: great fun!",
    "good good fun",
    "great story and a great cast",
    "loved it",
]
BAD = ["a bad film, really bad", "I hated it: no fun!", "bad bad story", "a boring story and a dull cast", "hated it"]
TEXTS, LABELS = [*GOOD, *BAD] * 3, [*[1] * 5, *[0] * 5] * 3
UNSEEN = [
    "a great film",
    "BAD, bad, bad!",
    "",
    "x y z",
    "don't you love naïve café stories? 12 %",
    "good bad\n\ngood\tfun film",
]


def batch(prompts: list[str], responses: list[str]) -> Batch:
    return Batch.build(
        [Prompt((1,), text, i) for i, text in enumerate(prompts)],
        [[2]] * len(prompts),
        texts=responses,
        ended=[True] * len(prompts),
    )


def test_equal_to_scikit_learn_on_texts_it_never_saw() -> None:
    ours = TextClassifier.fit(TEXTS, LABELS)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    peer = LogisticRegression(C=10.0, max_iter=1000).fit(vectorizer.fit_transform(TEXTS), LABELS)
    for texts in (TEXTS, UNSEEN):
        np.testing.assert_allclose(ours.logits(texts), peer.decision_function(vectorizer.transform(texts)), atol=1e-6)


def test_a_number_by_hand() -> None:
    # Features good (idf 1, weight 2) and "good film" (idf 2, weight −1). The text has good twice and "good film" once:
    # u = ((1 + ln 2)·1, 1·2), score = 0.5 + (2·u₁ − 1·u₂) / |u|.
    classifier = TextClassifier({"good": 0, "good film": 1}, np.array([1.0, 2.0]), np.array([2.0, -1.0]), 0.5)
    u1, u2 = 1 + math.log(2), 2.0
    want = 0.5 + (2 * u1 - u2) / math.hypot(u1, u2)
    assert classifier.logits(["Good, a GOOD film!"])[0] == pytest.approx(want, abs=1e-12)
    assert classifier.logits(["nothing known", ""]).tolist() == [0.5, 0.5]


def test_prompt_and_response_are_read_as_one_text() -> None:
    classifier = TextClassifier.fit(TEXTS, LABELS, name="gold")
    score = classifier(batch(["a really go", "a really ba"], ["od film", "d film"]))
    np.testing.assert_allclose(score.value, classifier.logits(["a really good film", "a really bad film"]), atol=1e-6)
    assert score.value[0] > 0 > score.value[1]
    assert bool(score.verdict.all())
    assert (score.value.dtype, classifier.name) == (torch.float32, "gold")


def test_accuracy_counts_signs() -> None:
    classifier = TextClassifier.fit(TEXTS, LABELS)
    assert classifier.accuracy(TEXTS, LABELS) == 1.0
    assert classifier.accuracy(["good", "good"], [1, 0]) == 0.5
    with pytest.raises(ValueError, match="no texts"):
        classifier.accuracy([], [])


def test_saved_and_loaded_it_says_the_same_to_the_last_bit(tmp_path: Path) -> None:
    classifier = TextClassifier.fit(TEXTS, LABELS, name="gold")
    classifier.save(tmp_path / "gold")
    assert sorted(p.name for p in (tmp_path / "gold").iterdir()) == ["vocabulary.json", "weights.safetensors"]
    again = TextClassifier.load(tmp_path / "gold")
    assert np.array_equal(again.logits([*TEXTS, *UNSEEN]), classifier.logits([*TEXTS, *UNSEEN]))
    assert again.name == "gold"


def test_a_damaged_folder_is_told(tmp_path: Path) -> None:
    TextClassifier.fit(TEXTS, LABELS).save(tmp_path)
    (tmp_path / "vocabulary.json").write_text('{"name": "gold", "features": ["good"]}')
    with pytest.raises(ValueError, match="from two classifiers"):
        TextClassifier.load(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="no whole classifier"):
        TextClassifier.load(tmp_path)
    with pytest.raises(ValueError, match="no whole classifier"):
        TextClassifier.load(tmp_path / "nowhere")


def test_bad_data_is_told() -> None:
    with pytest.raises(ValueError, match="2 texts came with 1 labels"):
        TextClassifier.fit(["a", "b"], [1])
    with pytest.raises(ValueError, match=r"labels are \[1\]; a classifier needs 0 and 1"):
        TextClassifier.fit(["a b", "a c"], [1, 1])
    with pytest.raises(ValueError, match="share no word that occurs in 2"):
        TextClassifier.fit(["one two", "three four"], [1, 0])
