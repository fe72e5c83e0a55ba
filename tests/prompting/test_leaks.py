"""The leak detector finds what is planted and is silent on what is different."""

from __future__ import annotations

import numpy as np
import pytest

from tokenmdp.prompting import leaks, splits
from tokenmdp.prompting.log import Log

LEARNED = ["Ann has 3 apples and buys 8.0 more. How many?", "A train goes 60 miles in 2 hours. How fast?"]


def log_of(queries: list[str]) -> Log:
    n = len(queries)
    every = np.arange(n)
    names = tuple(map(str, every))
    return Log(tuple(queries), names, ("p", "q"), ("p", "q"), every, every % 2, (every % 3 == 0) * 1.0, every * 0)


def test_three_degrees() -> None:
    held_out = [
        "ANN has 3 apples, and buys 8 more!  How many",  # the same
        "In 2 hours a train goes 60 miles. How fast is that?",  # not quite
        "Ann has 5 apples and buys 2 more. How many?",  # other numbers
        "What is the capital of France?",
    ]
    found = leaks.find(LEARNED, held_out)
    assert found.same.tolist() == [True, False, False, False]
    assert found.template.tolist() == [True, False, True, False]
    assert found.twin[0] == 0
    assert not found.near[3]
    assert leaks.find(LEARNED, held_out, near=0.5).near.tolist() == [True, True, True, False]


def test_numbers_are_one_spelling() -> None:
    assert leaks.normalised("It costs $1,000.50, or 2.0 each.") == leaks.normalised("it costs 1000.5 or 2 EACH")
    assert leaks.normalised("1.5") != leaks.normalised("15")
    assert leaks.normalised("Order 1000000100") != leaks.normalised("Order 1000000200")


def test_signs_that_are_the_difference_stay() -> None:
    different = ["12 + 5 =", "12 - 5 =", "12 * 5 =", "12 / 5 =", "😀", "🎉", "की", "का", "a < b", "a > b"]
    assert len(set(map(leaks.normalised, different))) == len(different)
    assert leaks.normalised("Well-known apples - and 8.0 pears!") == leaks.normalised("well known apples and 8 pears")


def test_templates() -> None:
    assert leaks.template("12 pens at 3.5") == leaks.template("1 pens at 2")


def test_a_leaking_split_is_stopped_unless_allowed() -> None:
    log = log_of([*LEARNED, LEARNED[0].lower(), "another question altogether"])
    learned, held_out = np.array([0, 1]), np.array([2, 3])
    with pytest.raises(leaks.Leak, match="50% of the 2 held-out queries repeat a query"):
        leaks.check(log, learned, held_out)
    assert leaks.check(log, learned, held_out, allow=True).shares()["same"] == 0.5
    assert leaks.check(log, learned, np.array([3])).shares() == {"same": 0.0, "near": 0.0, "template": 0.0}


@pytest.mark.parametrize("seed", [0, 1])
def test_folds_hold_out_each_question_once_and_never_part_it(seed: int) -> None:
    group = leaks.groups([f"question {i % 7}" for i in range(40)])
    seen = []
    for learned, held in splits.folds(group, 3, seed):
        assert not set(group[learned]) & set(group[held])
        seen += held.tolist()
    assert sorted(seen) == list(range(40))
    learned, held = splits.halves(group, 0.3, seed)
    assert len(set(group[held])) == 2
    assert sorted([*learned, *held]) == list(range(40))


def test_too_few_questions_for_the_folds() -> None:
    with pytest.raises(ValueError, match="3 folds of 2 different questions"):
        next(splits.folds(np.array([0, 0, 1]), 3, 0))
    with pytest.raises(ValueError, match=r"a share of 1\.0 of 2"):
        splits.halves(np.array([0, 1]), 1.0, 0)
