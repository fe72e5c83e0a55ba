"""The novelty bonus: counts by hand, a function of its row alone, and what it is worth in a mixture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tiny_models import EOS, batch, ragged
from tiny_recipes import liking, policy, task
from tokenmdp.models.sampling import Sampling
from tokenmdp.rewards.mixture import Mixture
from tokenmdp.rewards.novelty import Novelty, grams
from tokenmdp.testing import contracts


def test_the_bonus_by_hand() -> None:
    """The corpus has (4, 5) three times and (5, 6) not at all: ½ and 1, a mean of ¾. What is said twice counts once."""
    novelty = Novelty({(4, 5): 3}, n=2)
    assert novelty.bonus([4, 5, 6]) == pytest.approx((1 / math.sqrt(4) + 1) / 2)
    assert novelty.bonus([7, 8]) == 1.0
    assert novelty.bonus([7, 8, 7, 8]) == pytest.approx(2 / 3), "(7, 8), (8, 7) and (7, 8) again"


def test_ngrams_of_any_length() -> None:
    assert grams([1, 2, 3], 2) == [(1, 2), (2, 3)]
    assert grams([1, 2, 3], 1) == [(1,), (2,), (3,)]
    assert grams([1, 2, 3], 0) == [(1, 2, 3)]
    assert grams([1], 2) == [(1,)], "one that is too short is one whole"
    assert grams([], 2) == []


def test_it_counts_a_batch_and_reads_nothing_but_the_response() -> None:
    corpus = batch([([9, 9], [4, 5, EOS]), ([8], [4, 5]), ([4], [5, 4, EOS])])
    novelty = Novelty.fit(corpus, n=2, end=(EOS,))
    assert dict(novelty.counts) == {(4, 5): 2, (5, 4): 1}
    same = batch([([1], [4, 5]), ([7, 7, 7], [4, 5]), ([1], [4, 5, EOS]), ([1], [EOS])])
    found = novelty(same)
    assert found.value[:3].tolist() == pytest.approx([1 / math.sqrt(3)] * 3), "ending is nothing new"
    assert found.verdict.tolist() == [True, True, True, False], "who says nothing is not judged by it"


@pytest.mark.parametrize("n", [0, 1, 3])
def test_it_keeps_the_contract_of_a_reward(n: int) -> None:
    contracts.check_reward(Novelty.fit(ragged(6, seed=1), n), ragged(6))


def test_a_response_without_a_token_has_no_verdict() -> None:
    score = Novelty({}, 2)(batch([([1], []), ([1], [2])]))
    assert score.verdict.tolist() == [False, True]
    assert score.value.tolist() == [0.0, 1.0]


def test_against_its_own_samples_a_policy_is_less_novel_than_another() -> None:
    start = policy()
    rng = torch.Generator().manual_seed(0)
    corpus = start.sample(list(task().train), 4, Sampling(max_new_tokens=5), rng)
    novelty = Novelty.fit(corpus, 2)
    own = float(novelty(start.sample(list(task().train), 1, Sampling(max_new_tokens=5), rng)).value.mean())
    other = batch([([1], [11] * i + [10, 9, 11]) for i in range(1, 4)])
    assert own < 0.75
    assert own < float(Novelty(novelty.counts - novelty.counts, 2)(other).value.mean())


def test_it_joins_a_mixture() -> None:
    b = batch([([1], [3, 3]), ([1], [4, 5])])
    mixture = Mixture([(1.0, liking()), (0.1, Novelty({(4, 5): 3}, 2))])
    assert mixture(b).value.tolist() == pytest.approx([1.0 + 0.1, 0.0 + 0.1 * 0.5])
    assert mixture(b).parts["novelty"].value.tolist() == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("column", ["text", "completion"])
def test_it_is_read_from_a_file_of_samples(column: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(json.dumps({column: text, "row": 0}) for text in ("w4 w5", "w4 w5 w6")))
    novelty = Novelty.load(path, policy(), n=2)
    assert dict(novelty.counts) == {(4, 5): 2, (5, 6): 1}


def test_what_cannot_be_counted_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"answer": "4"}\n')
    with pytest.raises(ValueError, match=r"row 0 of .*answer"):
        Novelty.load(path, policy())
    with pytest.raises(ValueError, match="n=-1"):
        Novelty({}, -1)
