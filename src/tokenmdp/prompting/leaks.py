"""Whether queries that are held out repeat queries that are learned from: who has seen the question knows the answer.

Three degrees, of which the first two stop a split and the third is only told:

    same      equal after case, spaces, punctuation of sentences and the spelling of numbers are taken out
    near      almost equal: cosine of character n-gram counts (TF-IDF) at or above 0.95
    template  equal but for the numbers: the same problem with other figures
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenmdp.prompting.log import Log

NEAR, CHUNK = 0.95, 512  # the cosine that counts as near, and queries compared at a time
TOLERATED = 0.01  # the share of held-out queries that may repeat others before a split is stopped
# Marks of sentences and of money, and a dash that stands next to no number.
_IDLE = re.compile(r"""[,;:!?'"‘’“”«»„…¿¡()\[\]{}$€£]+|\.(?!\d)|(?<![\d)])(?<![\d)]\s)[-–—](?!\s*[\d(])""")
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


class Leak(ValueError):
    """Held-out queries repeat queries that are learned from."""


@dataclass(frozen=True)
class Leaks:
    """What a split lets through.

    Attributes:
        same, near, template: [held out] whether a query repeats one that is learned from, to that degree or a stricter one.
        twin: [held out] the number, among those learned from, of what it repeats or comes nearest to.
    """

    same: NDArray[np.bool_]
    near: NDArray[np.bool_]
    template: NDArray[np.bool_]
    twin: NDArray[np.int64]

    def shares(self) -> dict[str, float]:
        """The share of held-out queries, by degree."""
        return {name: float(getattr(self, name).mean()) for name in ("same", "near", "template")}


def normalised(text: str) -> str:
    """The text without case, punctuation of sentences and double spaces, numbers in one spelling: `8.0` and `8` are the same.

    Signs that may be the whole difference between two questions stay: `12 + 5` is not `12 - 5`.
    """
    plain = _NUMBER.sub(lambda found: f" {_spelled(found[0])} ", unicodedata.normalize("NFC", text).lower())
    return " ".join(_IDLE.sub(" ", plain).split())


def _spelled(number: str) -> str:
    """A number without separators and without noughts that say nothing."""
    whole, point, part = number.replace(",", "").partition(".")
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (point + part if part else "")


def template(text: str) -> str:
    """The normalised text with every number masked."""
    return re.sub(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", "#", normalised(text))


def groups(queries: Sequence[str]) -> NDArray[np.int64]:
    """[Q] a number a query; those that are the same question have the same one, and stay on one side of every split."""
    known: dict[str, int] = {}
    return np.asarray([known.setdefault(normalised(text), len(known)) for text in queries], dtype=np.int64)


def find(learned: Sequence[str], held_out: Sequence[str], near: float = NEAR) -> Leaks:
    """Compare every held-out query with every one that is learned from.

    Raises:
        ValueError: one of the two is empty.
    """
    if not len(learned) or not len(held_out):
        raise ValueError(
            f"{len(learned)} queries learned from and {len(held_out)} held out: there must be some of each"
        )
    first: dict[str, int] = {}
    for number, text in enumerate(learned):
        first.setdefault(normalised(text), number)
    exact = np.asarray([first.get(normalised(text), -1) for text in held_out], dtype=np.int64)
    cosine, twin = _nearest(learned, held_out)
    twin = np.where(exact >= 0, exact, twin)
    templates = {template(text) for text in learned}
    same = exact >= 0
    close = same | (cosine >= near)
    alike = close | np.asarray([template(text) in templates for text in held_out])
    return Leaks(same, close, alike, twin)


def _nearest(learned: Sequence[str], held_out: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """[held out] the largest cosine with a query that is learned from, and which one that is."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    count = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), max_features=1 << 16, dtype=np.float32)
    # Counted over both sides: what only a held-out query says must count against its being a repetition.
    both = count.fit_transform([normalised(text) or "?" for text in (*learned, *held_out)])
    known, asked = both[: len(learned)], both[len(learned) :]
    best, at = [], []
    for start in range(0, asked.shape[0], CHUNK):
        cosine = np.asarray((asked[start : start + CHUNK] @ known.T).todense())
        best.append(cosine.max(1))
        at.append(cosine.argmax(1))
    return np.concatenate(best).astype(np.float64), np.concatenate(at).astype(np.int64)


def check(log: Log, learned: NDArray[np.int64], held_out: NDArray[np.int64], allow: bool = False) -> Leaks:
    """What a split of a log's queries lets through; it always runs.

    Args:
        learned, held_out: numbers of queries.
        allow: go on all the same: the caller says that figures on this split are of seen questions.

    Raises:
        Leak: more than one held-out query in a hundred repeats one that is learned from, and `allow` is not given.
    """
    found = find([log.queries[i] for i in learned], [log.queries[i] for i in held_out])
    share = float(found.near.mean())
    if share > TOLERATED and not allow:
        row = int(found.near.argmax())
        raise Leak(
            f"{share:.0%} of the {len(held_out)} held-out queries repeat a query that is learned from, such as "
            f"{log.queries[held_out[row]]!r:.80} and {log.queries[learned[found.twin[row]]]!r:.80}: figures on them would be of "
            "questions already seen. Split by question (the default), or allow it and say so"
        )
    return found
