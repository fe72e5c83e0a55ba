"""Comparisons: exactly as many flips as asked for, pairs of one prompt or of two, and repetitions that are found."""

from __future__ import annotations

import pytest
import torch

from tiny_models import batch
from tokenmdp.rewards import comparisons
from tokenmdp.types import Batch, Pairs


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def responses() -> Batch:
    """Three responses to each of four prompts."""
    return batch([([1 + p, 2], [10 + 3 * p + r]) for p in range(4) for r in range(3)])


def pairs(count: int = 10) -> Pairs:
    good, bad = (batch([([1, 2], [base + i]) for i in range(count)]) for base in (10, 30))
    return Pairs(good, bad, torch.arange(count).float())


def test_as_many_flips_as_asked_for_nested_and_undone():
    noisy, wrong = comparisons.flipped(pairs(), 0.3, rng())
    assert int(wrong.sum()) == 3
    for i in range(10):
        one, other = (noisy.rejected, noisy.chosen) if wrong[i] else (noisy.chosen, noisy.rejected)
        assert (one.texts[i], other.texts[i]) == (f"w{10 + i}", f"w{30 + i}")
        assert float(noisy.margin[i]) == (-i if wrong[i] else i)
    _, more = comparisons.flipped(pairs(), 0.6, rng())
    assert bool(more[wrong].all()), "the flips of a smaller share are among those of a larger one"
    clean, none = comparisons.flipped(pairs(), 0.0, rng())
    assert not none.any()
    assert clean.chosen.texts == pairs().chosen.texts
    with pytest.raises(ValueError, match=r"flipped labels is 1\.5; it must lie between 0 and 1"):
        comparisons.flipped(pairs(), 1.5, rng())


@pytest.mark.parametrize("across", [False, True])
def test_pairs_of_one_prompt_or_of_two(across: bool):
    b = responses()
    score = torch.arange(12).float()
    made, ties = comparisons.compared(b, score, rng(), across)
    assert ties == 0
    assert len(made) == (6 if across else 4)  # 12 rows make 6 pairs; of three responses to a prompt one is left over
    for i in range(len(made)):
        assert (made.chosen.prompts[i].ids != made.rejected.prompts[i].ids) is across
        won, lost = (int(side.texts[i].removeprefix("w")) for side in (made.chosen, made.rejected))
        assert won > lost
        assert float(made.margin[i]) == won - lost
    used = [*made.chosen.texts, *made.rejected.texts]
    assert len(set(used)) == len(used), "no response is used twice"


def test_a_noisy_labeller_is_wrong_as_often_as_said():
    """Scores 0 and 1 with β = 1: the better one is chosen with probability σ(1) = 0.731."""
    b = batch([([1 + i % 50, 2 + i // 50], [10 + side]) for i in range(1000) for side in (0, 1)])
    score = torch.tensor([0.0, 1.0]).repeat(1000)
    made, _ = comparisons.compared(b, score, rng(), sharpness=1.0)
    right = sum(text == "w11" for text in made.chosen.texts) / len(made)
    assert right == pytest.approx(0.731, abs=0.04)
    assert not made.margin.any(), "a margin would give the better one away"


def test_ties_are_left_out_and_nothing_but_ties_is_no_data():
    b = responses()
    score = torch.tensor([0.0, 0.0, 0.0] + [1.0, 2.0, 3.0] * 3)
    made, ties = comparisons.compared(b, score, rng())
    assert (len(made), ties) == (3, 1)
    with pytest.raises(ValueError, match="no two of one prompt with different scores could be paired"):
        comparisons.compared(b, torch.zeros(12), rng())
    alone = b.select([0, 3, 6, 9])
    with pytest.raises(ValueError, match=r"could be paired \(0 pairs"):
        comparisons.compared(alone, torch.arange(4).float(), rng())
    one = b.select([0, 1, 2])
    with pytest.raises(ValueError, match="no two of two different prompts"):
        comparisons.compared(one, torch.arange(3).float(), rng(), across=True)
    with pytest.raises(ValueError, match=r"\(3,\) scores for 12 rows"):
        comparisons.compared(b, torch.zeros(3), rng())


def told(*rows: tuple[str, str, str]) -> Pairs:
    """Pairs by their texts; each prompt has tokens of its own."""
    sides = []
    for at in (1, 2):
        made = batch([([5 + i, 6], [7 + at]) for i in range(len(rows))])
        prompts = [type(p)(p.ids, text, p.row) for p, (text, _, _) in zip(made.prompts, rows, strict=True)]
        sides.append(Batch(**{**made.__dict__, "prompts": tuple(prompts), "texts": tuple(row[at] for row in rows)}))
    return Pairs(sides[0], sides[1], torch.zeros(len(rows)))


def test_a_pair_on_both_sides_of_the_split_is_found_either_way_round():
    learned = told(("Q: ", "yes", "no"), ("R: ", "a", "b"))
    held = told(("Q:  ", "No", "yes"), ("Q: ", "yes", "maybe"), ("r: ", "A", "B"))
    assert comparisons.repeated(learned, held).tolist() == [True, False, True]
    assert comparisons.duplicates(learned) == 0
    assert comparisons.duplicates(told(("Q: ", "a", "b"), ("Q: ", "b", "a"), ("Q: ", "a", "c"))) == 1


def test_divided_leaves_out_what_repeats_and_says_how_much():
    rows = [(f"P{i}: ", "good", "bad") for i in range(20)]
    # Prompts whose tokens differ and whose text does not: the split by prompt cannot know them.
    copies = [(f"p{i}:  ", "BAD", "good") for i in range(20)]
    everything = told(*rows, *copies)
    learned, kept, found = comparisons.divided(everything, 0.5, rng())
    assert len(learned) == 20
    assert found["repeated_across_split"] == 20 - len(kept) > 0
    assert found["duplicates"] == 20
    assert not comparisons.repeated(learned, kept).any()
    with pytest.raises(ValueError, match="the data repeats itself"):
        comparisons.divided(told(("a", "b", "c"), ("A", "c", "b")), 0.5, rng())
    same = pairs(4)
    with pytest.raises(ValueError, match="there is no preference to learn from"):
        comparisons.divided(Pairs(same.chosen, same.chosen, same.margin), 0.5, rng())
