"""Word problems: from files, from templates, worked solutions, and that nothing held out is learned from."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmdp import cli, tasks
from tokenmdp.models.policy import Policy
from tokenmdp.models.tiny import tiny
from tokenmdp.tasks import arithmetic


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


GSM8K = {
    "question": "Natalia sold 48 clips, and then half as many. How many?",
    "answer": "She then sold 48/2 = <<48/2=24>>24 clips.\nThat is 48+24 = <<48+24=72>>72.\n#### 72",
}
MAWPS = {"question": "A waiter had 22 guests . 14 left .", "equation": "X=((22.0-14.0)/4.0)", "answer": 2.0}


# -- worked solutions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"equation": "x=12-5", "answer": 7.0}, " 12 - 5 = 7. The answer is 7."),
        (MAWPS, " 22 - 14 = 8. 8 / 4 = 2. The answer is 2."),
        ({"equation": "11.08+14.33=x", "answer": "25.41"}, " 11.08 + 14.33 = 25.41. The answer is 25.41."),
        (GSM8K, " She then sold 48/2 = 24 clips.\nThat is 48+24 = 72.\n#### 72"),
        ({"answer": "1,200"}, " The answer is 1200."),
        ({"answer": "50%"}, " The answer is 50%."),
        ({"equation": "(x+6)*(x-6)=189", "answer": -15.0}, " The answer is -15."),  # not solved by evaluation
        ({"equation": "x=12-5", "answer": 8}, " The answer is 8."),  # the equation does not lead there
        ({"equation": "x=10/3*3", "answer": 10}, " The answer is 10."),  # 10/3 has no short decimal form
        ({"equation": "x=10/3", "answer": 3.3333333333333335}, ""),
        ({"answer": "unknown"}, ""),
    ],
)
def test_demonstrations(row: dict[str, Any], expected: str):
    assert arithmetic.demonstration(row) == expected


def test_expressions_by_hand():
    value, steps = arithmetic.worked("x = -(2 + 3) * 4 - 10 / 4") or (None, [])
    assert value == Fraction(-45, 2)  # −20 − 2.5
    assert [(op, result) for _, op, _, result in steps] == [
        ("+", 5),
        ("*", -20),
        ("/", Fraction(5, 2)),
        ("-", Fraction(-45, 2)),
    ]
    for broken in (
        "",
        "x",
        "x=",
        "x=2+",
        "x=(2",
        "x=2)",
        "x=1/0",
        "x=2+y",
        "2x=4",
        "x=2=2",
        "x=2 3",
        "x=2**3",
        "x=a",
        "__import__",
    ):
        assert arithmetic.worked(broken) is None, broken


@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 99)), max_size=4), st.integers(0, 99))
def test_evaluation_agrees_with_pythons_precedence(tail: list[tuple[str, int]], first: int):
    # A sum of products: split at + and −, multiply within.
    terms = [Fraction(first)]
    for operation, number in tail:
        if operation == "*":
            terms[-1] *= number
        else:
            terms.append(Fraction(number if operation == "+" else -number))
    found = arithmetic.worked(f"x={first}" + "".join(f"{op}{n}" for op, n in tail))
    assert found is not None
    assert found[0] == sum(terms)
    assert len(found[1]) == len(tail)


# -- made problems ----------------------------------------------------------------------------------------------------


def test_made_problems_are_all_different_whole_and_right(policy: Policy):
    task = tasks.load("arithmetic", policy, count=300, held_out=60)
    assert (len(task.train), len(task.held_out)) == (300, 60)
    everything = [*task.train, *task.held_out]
    assert len({arithmetic.key(str(p.columns["question"])) for p in everything}) == 360
    assert all(isinstance(p.columns["answer"], int) and p.columns["answer"] > 0 for p in everything)
    assert all(p.text.startswith("Question: ") and p.text.endswith("\nAnswer:") for p in everything)
    assert not any("{" in p.text for p in everything)
    assert task.demonstrations is not None
    assert task.reward is not None
    assert bool((task.reward(task.demonstrations).value == 1).all()), "the demonstrator is always right"
    assert {len(text.split("=")) - 1 for text in task.demonstrations.texts} == {1, 2}, "one and two steps"


def test_no_template_has_the_same_numbers_on_both_sides():
    learned, kept = arithmetic.made(400, 100, largest=6, seed=1)
    shapes = [{(row["equation"], _words(row["question"])) for row in side} for side in (learned, kept)]
    assert len(learned) > 100
    assert not shapes[0] & shapes[1]


def _words(question: str) -> str:
    """A question without what may differ between two tellings of one instance: names and things."""
    gone = {name.lower() for name in (*arithmetic._NAMES, *arithmetic._THINGS)}
    return " ".join(word for word in arithmetic.key(question).split() if word not in gone)


def test_the_seed_and_the_numbers_decide():
    assert arithmetic.made(50, 10, seed=3) == arithmetic.made(50, 10, seed=3)
    assert arithmetic.made(50, 10, seed=3) != arithmetic.made(50, 10, seed=4)
    learned, kept = arithmetic.made(10_000, 5_000, largest=4)  # there are not so many
    assert 0 < len(kept) == (len(learned) + len(kept)) // 5
    assert max(int(n) for row in learned for n in arithmetic._TOKEN.findall(row["equation"]) if n.isdigit()) == 4


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_split_by_question(policy: Policy, tmp_path: Path):
    rows = [{"question": f"What is {i % 25} and {i % 5}?", "answer": i % 25 + i % 5} for i in range(50)]
    rows[30]["question"] = rows[30]["question"].upper() + "  "  # another spelling of the same question
    task = tasks.load(f"arithmetic:{write(tmp_path / 'mine.jsonl', rows)}", policy)
    # Each question stands there twice; a fifth of them is held out, once each.
    assert (len(task.train), len(task.held_out), task.facts["dropped_as_repeated"]) == (40, 5, 5)
    sides = [{arithmetic.key(str(p.columns["question"])) for p in side} for side in (task.train, task.held_out)]
    assert (len(sides[0]), len(sides[1])) == (20, 5)
    assert not sides[0] & sides[1]
    again = tasks.load(
        "arithmetic", policy, source=tmp_path / "mine.jsonl", count=7, held_out=2, template="{question} ="
    )
    assert (len(again.train), len(again.held_out)) == (7, 2)
    assert again.train[0].text.endswith("? =")


def test_a_folder_has_a_test_part_that_training_never_meets(policy: Policy, tmp_path: Path):
    asked = [GSM8K, {"question": "Two and two?", "answer": "4"}, {"question": "Two and two", "answer": "= 4"}]
    write(
        tmp_path / "train.jsonl",
        [MAWPS, {"question": "two  and TWO ?", "answer": 4}, {"question": "Why?", "answer": "so"}],
    )
    write(tmp_path / "test.jsonl", asked)
    for held_out in (1, 2):  # a test question is not learned from even where it is not asked
        task = tasks.load("arithmetic", policy, source=tmp_path, held_out=held_out)
        assert [p.columns["answer"] for p in task.train] == [2.0]
        assert len(task.held_out) == held_out
        assert task.facts == {
            "problems": 1, "held_out": held_out, "demonstrations": 1, "dropped_as_held_out": 1,
            "dropped_as_repeated": 1, "unreadable": 1,
        }  # fmt: skip
    assert task.reward is not None
    assert task.demonstrations is not None
    assert task.demonstrations.texts == (" 22 - 14 = 8. 8 / 4 = 2. The answer is 2.",)
    assert task.reward(task.demonstrations).value.tolist() == [1.0]


def test_what_cannot_be_used_is_said(policy: Policy, tmp_path: Path):
    with pytest.raises(ValueError, match="row 0 has problem, answer; a word problem needs question and answer"):
        tasks.load("arithmetic", policy, source=write(tmp_path / "a.jsonl", [{"problem": "?", "answer": 1}]))
    with pytest.raises(ValueError, match="leaves no problem to learn on: of 1 rows 1 have no answer"):
        tasks.load("arithmetic", policy, source=write(tmp_path / "b.jsonl", [{"question": "?", "answer": "so"}]))
    with pytest.raises(ValueError, match="does not say where the question stands"):
        tasks.load("arithmetic", policy, template="Q:")
    with pytest.raises(ValueError, match="largest 3"):
        tasks.load("arithmetic", policy, largest=3)
    with pytest.raises(ValueError, match="there is no data at"):
        tasks.load(f"arithmetic:{tmp_path / 'none.jsonl'}", policy)


# -- the command line -------------------------------------------------------------------------------------------------


def test_a_task_takes_its_first_option_after_a_colon(policy: Policy):
    assert len(tasks.load("addition:1", policy).train) == 80
    assert tasks.load("reversal:3", policy).train[0].text.endswith(">")
    with pytest.raises(ValueError, match="did you mean arithmetic:x"):
        tasks.load("arithmetik:x", policy)


def test_cloning_the_task_and_counting_its_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"question": f"{i} + 1", "equation": f"x={i}+1", "answer": i + 1} for i in range(20)]
    task = f"arithmetic:{write(tmp_path / 'sums.jsonl', rows)}"
    common = ["--task", task, "--model", "tiny", "--out"]
    assert cli.main(["sft", *common, str(tmp_path / "sft"), "--steps", "2", "--rows", "4"]) == 0
    flags = ["--n", "3", "--max-new-tokens", "4", "--chunk", "2"]
    assert cli.main(["pass-at-k", *common, str(tmp_path / "pass"), *flags]) == 0
    found = json.loads((tmp_path / "pass" / "result.json").read_text())
    assert found["prompts"] == 4
    assert {"pass@1", "pass@2", "pass@3"} <= found.keys()
    assert found["pass@1"]["mean"] <= found["pass@3"]["mean"] <= found["pass@3"]["high"]
    samples = [json.loads(line) for line in (tmp_path / "pass" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12
    capsys.readouterr()
    assert cli.main(["sft", "--task", "addition:x", "--model", "tiny", "--out", str(tmp_path / "x")]) == 2
    assert "digits is 'x'" in capsys.readouterr().err
