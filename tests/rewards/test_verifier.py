"""The numeric verifier: how numbers are read, which one is the answer, and that the thinking is never scored."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmdp import rewards
from tokenmdp.models.tiny import tiny
from tokenmdp.rewards import numerals
from tokenmdp.rewards.mixture import Mixture
from tokenmdp.rewards.verifier import NumericVerifier, after_thinking
from tokenmdp.types import Batch, Prompt


def said(texts: list[str], answer: Any = 42, prompt: str = "Q") -> Batch:
    prompts = [Prompt((1,), prompt, i, {"answer": answer}) for i in range(len(texts))]
    return Batch.build(prompts, [[1]] * len(texts), texts=texts, ended=[True] * len(texts))


def scores(texts: list[str], answer: Any = 42, prompt: str = "Q", **options: Any) -> list[float]:
    return NumericVerifier(**options)(said(texts, answer, prompt)).value.tolist()


def values(text: str) -> list[Fraction]:
    return [n.value for n in numerals.numerals(text)]


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # signs
        ("-5", "-5"), ("\u22125", "-5"), ("it is minus 5", "-5"), ("negative 5", "-5"), ("x = - 5", "-5"), ("(-7)", "-7"),
        ("+3", "3"), ("-$5.50", "-11/2"), ("$-5", "-5"), ("covid-19", "19"), ("a 5-year-old", "5"),
        # thousands
        ("1,234", "1234"), ("1 234", "1234"), ("1\u202f234\u202f567", "1234567"), ("1'234", "1234"), ("1{,}234", "1234"),
        ("1\\,234", "1234"), ("1.234.567", "1234567"), ("1,234.5", "2469/2"), ("1.234,5", "2469/2"), ("12 345,6", "61728/5"),
        # decimals; one comma before other than three digits, or after a leading zero, is decimal; one point always is
        ("2,5", "5/2"), ("0,123", "123/1000"), ("1.234", "617/500"), (".5", "1/2"), ("12.", "12"), ("007", "7"),
        # fractions
        ("3/4", "3/4"), ("-3/4", "-3/4"), ("1 1/2", "3/2"), ("-1 1/2", "-3/2"), ("1 and 1/2", "3/2"), ("\u00bd", "1/2"),
        ("1\u00bd", "3/2"), ("\\frac{3}{4}", "3/4"), ("-\\dfrac34", "-3/4"), ("1\\frac{1}{2}", "3/2"), ("6/3", "2"),
        # powers of ten
        ("1.5e3", "1500"), ("2E-2", "1/50"), ("1.5 \u00d7 10^3", "1500"), ("1.5 x 10\u00b3", "1500"),
        ("1.5 \\times 10^{-3}", "3/2000"), ("2*10^-1", "1/5"),
        # units
        ("$42", "42"), ("\\$42", "42"), ("\u20ac 42", "42"), ("Rs.50", "50"), ("USD 5", "5"), ("5kg", "5"), ("5 kg.", "5"),
    ],
)  # fmt: skip
def test_one_number(text: str, expected: str):
    assert values(text) == [Fraction(expected)]
    assert values(f"so we get {text} in all") == [Fraction(expected)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12-5", [12, 5]),
        ("12 - 5 = 7", [12, 5, 7]),
        ("10 minus 4", [10, 4]),
        ("3\u20134 apples", [3, 4]),  # an en dash between numbers is a range
        ("1,2,3", [1, 2, 3]),
        ("5 12/4", [5, 3]),  # no mixed number: 12/4 is not below 1
        ("x1 and H2O", []),
        ("twelve", []),
        ("5/0", []),
        ("9" * 5000, []),  # noise; Python itself refuses to read so long a number
        ("1e999999999", [10**1000]),  # and nothing waits for a billion digits
    ],
)
def test_several_numbers_or_none(text: str, expected: list[int]):
    assert values(text) == expected


@given(st.integers(-(10**9), 10**9), st.sampled_from([",", " ", "\u00a0", "\u2009", "\u202f", "'"]))
def test_whole_numbers_round_trip_with_any_thousands_mark(number: int, mark: str):
    text = f"{number:,}".replace(",", mark)
    assert values(text) == [number]
    assert values(text.replace("-", "\u2212")) == [number]


@given(st.decimals(-(10**6), 10**6, places=3))
def test_decimals_round_trip_both_ways_of_marking(number: Decimal):
    exact, text = Fraction(number), f"{number:,.3f}"
    assert values(text) == [exact]
    if (
        abs(number) >= 1000
    ):  # with both marks the last is decimal; without thousands one comma before three digits is not
        assert values(text.translate(str.maketrans(",.", ".,"))) == [exact]
    if number:
        assert values(f"{number:e}") == [exact]


@given(st.integers(-99, 99), st.integers(1, 98), st.integers(2, 99))
def test_fractions_round_trip(whole: int, top: int, bottom: int):
    part = Fraction(top, bottom)
    assert values(f"{top}/{bottom}") == values(f"\\frac{{{top}}}{{{bottom}}}") == [part]
    if part < 1:
        mixed = whole - part if whole < 0 else whole + part
        assert values(f"{whole} {top}/{bottom}") == values(f"{whole}\\frac{{{top}}}{{{bottom}}}") == [mixed]


@given(st.fractions(-1000, 1000, max_denominator=500))
def test_the_plain_form_is_read_back(number: Fraction):
    assert values(numerals.written(number)) == [number]
    assert "/" not in numerals.written(Fraction(round(number * 100), 100))


@given(st.text(st.sampled_from("0123456789.,-/ %$e^{}\\x*frac"), max_size=40))
def test_any_text_is_read_without_an_error(text: str):
    assert all(isinstance(value, Fraction) for value in values(text))


# -- which number is the answer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "42",
        "There are 6 rows of 7, so 42",
        "6 * 7 = 42\n#### 42",
        "The answer is 42 apples, 5 more than before.",
        "The answer is 6 * 7 = 42.",
        "The answer to the question is 42. Check: 42 / 7 = 6.",
        "**Answer:** 42\n\nI used 6 and 7.",
        "The final answer is:\n\n42\nbecause of 3 reasons",
        "Thus \\boxed{42}, as 7 is prime.",
        "\\boxed{x = 42 \\text{ apples}} of 50",
        "The answer is 41. No: the answer is 42. Both took 3 lines.",
        "#### 41\n\\boxed{42} 9",
        "The answer is $ 42.00",
    ],
)
def test_the_marked_answer_wins_else_the_last_number(text: str):
    assert scores([text]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot answer that.",
        "The answer is unclear.\n42",  # a mark with nothing on its line: the number elsewhere is no answer
        "\\boxed{42",  # never closed
        "42 or maybe 43",
        "#### 41 or 42",
        "-42",
        "4.2",
        "0.42",
        "4242",
        "forty-two",
    ],
)
def test_refusals_no_number_and_wrong_numbers_score_zero_with_a_verdict(text: str):
    score = NumericVerifier()(said([text]))
    assert score.value.tolist() == [0.0]
    assert score.verdict.tolist() == [True]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("\\boxed{2\\sqrt{3}}", 2), ("\\boxed{2\\sqrt{3}}", 3), ("\\boxed{2^{10}}", 2), ("\\boxed{2^{10}}", 10),
        ("\\boxed{3\\pi}", 3), ("\\boxed{3 \u03c0}", 3), ("\\boxed{10^3}", 10), ("\\boxed{5\u00b2}", 5),
        ("\\boxed{\\sqrt{3}}", 3), ("\\boxed{\\frac{\\pi}{3}}", 3), ("\\boxed{\\frac{\\sqrt{3}}{2}}", 3),
        ("\\boxed{3 \\cdot 4}", 3), ("\\boxed{3 \\times 4}", 3), ("\\boxed{0.\\overline{3}}", 0), ("\\boxed{(5, 6)}", 5),
        ("The answer is 2**10", 2), ("The answer is 2 * x", 2), ("#### 12 - 5", 12), ("#### 3 x 4", 3),
        ("The answer is not 5", 5), ("The answer is 5 or 6", 5), ("it is 5 or 6", 6), ("#### 5 6 7 8", 5), ("#### 1,2,3", 1),
        ("Answer: 5, 6, 7", 5), ("#### 0x1F", 0), ("2\\sqrt{3}", 3), ("10^3", 3), ("3\\pi", 3),
    ],
)  # fmt: skip
def test_no_part_of_an_expression_passes_for_the_whole(text: str, number: int):
    assert scores([text], number) == [0.0]


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{42^\\circ}", "\\boxed{42^{\\circ}}", "\\boxed{42\\text{ kg}}", "\\boxed{42\\,\\mathrm{m}^2}", "\\boxed{42\\%}",
        "\\boxed{\\$42}", "\\boxed{\\text{42}}", "\\boxed{x \\approx 42}", "The answer is \\(42\\).", "The answer is $42$.",
        "**Answer:** **42**", "The answer is **42** apples", "The answer is 42, not 41", "The answer is 42, 5 more.",
        "The answer is 42/day", "The answer is 42 m^2", "Answer: 42 - because 6*7", "The answer is 42 (6 + 36)",
        "The answer is 42! Yes", "#### 4.2 \\times 10^{1}", "\\boxed{4.2e1}", "so 42\n* checked",
    ],
)  # fmt: skip
def test_units_words_and_layout_leave_a_number_alone(text: str):
    assert scores([text]) == [1.0]


def test_a_mark_in_words_takes_an_answer_back_only_with_a_number_at_once():
    later = " This is the answer: explained in 3 steps."
    assert scores([first + later for first in ("The answer is 42.", "\\boxed{42}", "#### 42\n")]) == [1, 1, 1]
    assert scores(["The answer is 41. So the answer is about 42.", "The answer is 42. No: the answer is 41."]) == [1, 0]


def test_percent_passes_for_the_number_and_for_the_share():
    assert scores(["50%", "50", "0.5", "1/2", "0.50 percent", "5000%"], "50%") == [1, 1, 1, 1, 0, 0]
    assert scores(["50%", "0.5", "50", "50 per cent"], 0.5) == [1, 1, 0, 1]
    assert scores(["50%", "50", "0.5"], 50) == [1, 1, 0]


def test_the_tolerance_is_for_floating_point_and_for_nothing_else():
    # 11/6 as data sets store it; 1,000,000 and 1,000,001 differ by a millionth
    assert scores(["11/6", "1 5/6", "1.8333333333", "1.83"], 1.8333333333333335) == [1, 1, 1, 0]
    assert scores(["1000001", "1,000,000"], 1_000_000) == [0, 1]
    assert scores(["11/6"], 1.8333333333333335, tolerance=0.0) == [0]
    assert scores(["42.4", "42.5"], tolerance=0.01) == [1, 0]  # 1 % of 42 is 0.42
    assert scores(["0.0000001", "0", "-0"], 0) == [0, 1, 1]


@pytest.mark.parametrize(
    "answer", [42, 42.0, "42", "42.00", "6 * 7 = <<6*7=42>>42\n#### 42", Fraction(84, 2), Decimal("42.0"), " $42 "]
)
def test_answers_as_data_sets_write_them(answer: Any):
    assert scores(["it is 42", "43"], answer) == [1.0, 0.0]


def asked(*columns: dict[str, Any]) -> Batch:
    prompts = [Prompt((1,), "Q", i, row) for i, row in enumerate(columns)]
    return Batch.build(prompts, [[1]] * len(prompts), texts=["42"] * len(prompts), ended=[True] * len(prompts))


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "",
        "unknown",
        float("nan"),
        float("inf"),
        True,
        [42],
        "0x2A",
        "42\\sqrt{2}",
        "3\\pi",
        "42^{10}",
        "41 or 42",
    ],
)
def test_an_answer_that_is_not_there_is_no_verdict(answer: Any):
    score = NumericVerifier()(asked({"answer": answer}, {"answer": 42}, {}))
    assert score.verdict.tolist() == [False, True, False]
    assert score.value.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("rows", [[{}], [{"answer": None}] * 2, [{"solution": 42, "level": 3}] * 2])
def test_a_batch_without_any_answer_names_the_column_and_those_there_are(rows: list[dict[str, Any]]):
    names = ", ".join(rows[0]) or "none"
    with pytest.raises(ValueError, match=rf"'answer'.*the columns are: {names}\. .*numeric:column=NAME"):
        NumericVerifier()(asked(*rows))
    assert NumericVerifier(column="solution")(asked({"solution": 42})).value.tolist() == [1.0]


# -- thinking ---------------------------------------------------------------------------------------------------------


def test_only_what_follows_the_thinking_counts():
    texts = [
        "<think>6 * 7 = 41</think>42",
        "<think>the answer is 42</think>I do not know",
        "<think>the answer is 42",  # never closed
        "6 * 7 is 41, no: </think> 42",  # opened by the prompt, or not at all
        "<think>a</think>41<think>b</think>42",
        "<think>a</think>42<think>b",  # thinking again, without an end
        "42",
    ]
    assert scores(texts) == [1, 0, 0, 1, 1, 0, 1]


def test_a_prompt_may_have_begun_the_thinking():
    assert scores(["42", "41</think>42"], prompt="Q <think>\n") == [0.0, 1.0]
    assert scores(["42"], prompt="Think between <think> and </think>, then answer: Q") == [1.0]


def test_delimiters_of_the_users():
    texts = ["[plan] 42 [/plan] 7", "[plan] 7 [/plan] 42", "<think>41", "[plan] 42"]
    assert scores(texts, think=("[plan]", "[/plan]")) == [0, 1, 0, 0]
    assert scores(["42", "41 Final: 42", "42 Final: 41"], think=("", "Final:")) == [0, 1, 0]
    with pytest.raises(ValueError, match="needs a closing delimiter"):
        NumericVerifier(think=("<think>", ""))
    with pytest.raises(ValueError, match=r"tolerance is 1\.0"):
        NumericVerifier(tolerance=1.0)


TEXT = st.text(st.characters(codec="utf-8"), max_size=60).filter(lambda text: "think>" not in text)
NUMBERS = st.one_of(TEXT, st.integers(-50, 50).map("The answer is {}. ".format), st.just("\\boxed{42} #### 42 "))


@given(NUMBERS, NUMBERS, st.one_of(NUMBERS, st.just("42")))
def test_editing_the_thinking_leaves_the_reward_unchanged(first: str, second: str, rest: str):
    texts = [f"<think>{first}</think>{rest}", f"<think>{second}</think>{rest}", f"{second}</think>{rest}", rest]
    assert len(set(scores(texts))) == 1
    assert after_thinking(f"<think>{first}</think>{rest}") == rest
    assert scores([f"<think>{first}", f"{rest}<think>{second}"]) == [0.0, 0.0]


# -- by name ----------------------------------------------------------------------------------------------------------


def test_by_name_with_options():
    policy = tiny()
    plain = rewards.load("numeric", policy)
    assert isinstance(plain, NumericVerifier)
    assert (plain.name, plain.column, plain.think, plain.tolerance) == (
        "numeric",
        "answer",
        ("<think>", "</think>"),
        1e-9,
    )
    tuned = rewards.load("numeric:tolerance=0.01, column=target,think=<r> </r>", policy)
    assert isinstance(tuned, NumericVerifier)
    assert (tuned.column, tuned.think, tuned.tolerance) == ("target", ("<r>", "</r>"), 0.01)
    alone = rewards.load("numeric:think=Final:", policy)
    assert isinstance(alone, NumericVerifier)
    assert alone.think == ("", "Final:")
    mixed = rewards.load("0.5*numeric + addition:1", policy)
    assert isinstance(mixed, Mixture)
    assert mixed(said(["42", "it is 42"])).value.tolist() == [1.5, 0.5]
    with pytest.raises(ValueError, match=r"no option 'tolerence': it has tolerance, column, think"):
        rewards.load("numeric:tolerence=1", policy)
    with pytest.raises(ValueError, match="tolerance='much'; it must be a number"):
        rewards.load("numeric:tolerance=much", policy)
    with pytest.raises(ValueError, match="did you mean numeric"):
        rewards.load("numerik", policy)


def test_long_texts_are_read_from_a_blank_on_and_in_linear_time() -> None:
    """Half a numeral at the cut is no answer; what made regular expressions retry for hours is read at once."""
    for text in ("The answer is 12345" + "." + " " * 99_997, "-5" + " apples" + " " * 99_992, "2^10 kg" + " " * 99_995):
        assert numerals.answer(text) is None
    assert numerals.answer("7 " * 60_000 + "The answer is 12.") == numerals.Numeral(Fraction(12))
    assert numerals.answer("the answer to" + " " * 90_000) is None
    assert numerals.answer("The answer is: " * 6_000) is None
