"""The sentiment task on a small file of made-up reviews; and on the real ones where they are in the cache."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest

from tokenmdp.models import fetch
from tokenmdp.models.policy import Policy
from tokenmdp.models.tiny import tiny
from tokenmdp.rewards.classifier import TextClassifier
from tokenmdp.tasks import Task, sentiment

SIZES = {
    "prefix_tokens": 6,
    "horizon": 10,
    "gold": 80,
    "gold_test": 40,
    "demonstrations": 30,
    "train": 30,
    "held_out": 12,
}


@pytest.fixture(scope="module")
def reviews_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """260 reviews, some of them twice, some with markup, some of another source."""
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    draw = random.Random(0)
    words = {1: ["great", "lovely", "superb", "fun"], 0: ["awful", "boring", "dull", "poor"]}
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["text", "label", "source"])
        for i in range(260):
            label = i % 2
            said = " ".join(draw.choice([*words[label], "film", "story", "cast", "scene", "plot"]) for _ in range(30))
            out.writerow([f"Number {i} was a {said}.<br /><br />The  end", label, "imdb"])
            if i % 10 == 0:
                out.writerow([f"number {i} was a {said}.<br/> The end", label, "imdb"])
            if i % 13 == 0:
                out.writerow([f"from elsewhere {i} {said}", label, "rotten_tomatoes"])
    return path


@pytest.fixture(scope="module")
def policy(reviews_csv: Path) -> Policy:
    return tiny(sentiment.texts(100, source=reviews_csv), 400)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMDP_CACHE", str(tmp_path_factory.getbasetemp() / "sentiment-cache"))


def load(policy: Policy, source: Path, **other: int) -> Task:
    return sentiment.load(policy, source=source, **{**SIZES, **other})


def test_reviews_are_cleaned_and_single(reviews_csv: Path) -> None:
    found = sentiment.reviews(reviews_csv)
    assert len(found) == 260
    assert len({r.text.casefold() for r in found}) == 260
    assert all("<" not in r.text and "  " not in r.text and r.text.endswith(". The end") for r in found)


def test_no_review_is_in_two_parts(policy: Policy, reviews_csv: Path) -> None:
    task = load(policy, reviews_csv)
    assert task.demonstrations is not None
    parts = [[p.row for p in part] for part in (task.train, task.held_out, task.demonstrations.prompts)]
    rows = [row for part in parts for row in part]
    assert [len(part) for part in parts] == [30, 12, 30]
    assert len(set(rows)) == len(rows) == 72
    judged = {r.row for r in sentiment.shuffled(sentiment.reviews(reviews_csv), 0)[:120]}
    assert judged.isdisjoint(rows), "the gold classifier and its test saw none of them"
    assert {p.ids for p in task.held_out}.isdisjoint(p.ids for p in task.train)
    assert len({p.ids for p in task.held_out}) == 12


def test_a_prompt_is_the_first_tokens_of_a_review(policy: Policy, reviews_csv: Path) -> None:
    task = load(policy, reviews_csv)
    by_row = {r.row: r for r in sentiment.reviews(reviews_csv)}
    for p in (*task.train, *task.held_out):
        assert p.ids == tuple(policy.encode(by_row[p.row].text)[:6])
        assert by_row[p.row].text.startswith(p.text)
        assert p.columns["label"] == by_row[p.row].label


def test_demonstrations_are_cut_openings(policy: Policy, reviews_csv: Path) -> None:
    b = load(policy, reviews_csv).demonstrations
    assert b is not None
    by_row = {r.row: r for r in sentiment.reviews(reviews_csv)}
    assert tuple(b.tokens.shape) == (30, 16)
    assert not bool(b.ended.any()), "a review goes on after its opening"
    assert not bool((b.tokens == policy.eos_ids[0]).any())
    for i, p in enumerate(b.prompts):
        assert b.tokens[i].tolist() == policy.encode(by_row[p.row].text)[:16]
        assert by_row[p.row].text.startswith(p.text + b.texts[i])


def test_the_seed_alone_decides(policy: Policy, reviews_csv: Path) -> None:
    first, again, other = (load(policy, reviews_csv, seed=s) for s in (0, 0, 1))
    assert first.train == again.train
    assert first.held_out == again.held_out
    assert first.train != other.train


def test_the_gold_reward_knows_good_from_bad_and_is_fitted_once(
    policy: Policy, reviews_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load(policy, reviews_csv)
    assert isinstance(task.reward, TextClassifier)
    assert task.facts["gold_accuracy"] == 1.0
    assert task.reward.logits(["a superb film"])[0] > 0 > task.reward.logits(["a dull film"])[0]

    def never(*_: object, **__: object) -> TextClassifier:
        raise AssertionError("a second load reads the classifier from the cache")

    monkeypatch.setattr(TextClassifier, "fit", never)
    again = load(policy, reviews_csv)
    assert isinstance(again.reward, TextClassifier)
    assert again.reward.logits(["a superb film"]).tolist() == task.reward.logits(["a superb film"]).tolist()


def test_what_cannot_be_had_is_told(policy: Policy, reviews_csv: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train asks for 300 reviews and"):
        load(policy, reviews_csv, train=300)
    with pytest.raises(ValueError, match="held_out asks for 300 different prefixes and"):
        load(policy, reviews_csv, held_out=300)
    with pytest.raises(ValueError, match="horizon is 0"):
        load(policy, reviews_csv, horizon=0)
    with pytest.raises(ValueError, match=r"openings of 6 \+ 600 tokens exceed the context of tiny, 512"):
        load(policy, reviews_csv, horizon=600)
    (tmp_path / "bad.csv").write_text("review,label\nx,1\n")
    with pytest.raises(ValueError, match="has the columns review, label; reviews need text and label"):
        load(policy, tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_text("text,label\nx,pos\n")
    with pytest.raises(ValueError, match="label is 'pos'; it must be 1"):
        load(policy, tmp_path / "bad.csv")


def test_the_real_reviews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the user's cache, not the tests'
    if not fetch.is_cached(sentiment.REVIEWS):
        pytest.skip("the reviews are not in the cache; `tokenmdp demo` fetches them (13 MB)")
    found = sentiment.reviews(fetch.fetch(*sentiment.REVIEWS))
    assert len(found) == 24_902, "25,000 IMDB reviews, 98 of them twice"
    assert abs(sum(r.label for r in found) / len(found) - 0.5) < 0.01
