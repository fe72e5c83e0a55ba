"""The log: what is read, what is refused, and numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenmdp.prompting import judged
from tokenmdp.prompting import log as logs

ROWS: list[dict[str, Any]] = [
    {"query": "2+2", "prompt_id": "a", "reward": 1},
    {"query": "2+2", "prompt_id": "b", "reward": 0},
    {"query": "3+3", "prompt_id": "a", "reward": 0.5},
    {"query": "2+2", "prompt_id": "a", "reward": 0},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path: Path, rows: list[dict[str, Any]]) -> logs.Log:
    return logs.read(write(tmp_path / "log.jsonl", rows))


def test_trials_are_kept_as_numbers_and_repeats_are_numbered(tmp_path: Path) -> None:
    log = read(tmp_path, ROWS)
    assert (log.queries, log.prompt_ids) == (("2+2", "3+3"), ("a", "b"))
    assert log.repeat.tolist() == [0, 0, 0, 1]
    assert log.facts["repeated"] == 1
    assert log.facts["untried"] == 1
    expected = np.array([[0.5, 0.0], [0.5, np.nan]])  # query 0 with prompt a: 1 and 0
    np.testing.assert_equal(log.matrix(), expected)


def test_a_query_may_be_called_0(tmp_path: Path) -> None:
    rows = [{**row, "query_id": i} for row, i in zip(ROWS[:3], (0, 0, ""), strict=True)]
    assert read(tmp_path, rows).query_ids == ("0", logs.name_of("3+3"))


def test_a_row_of_outcomes_is_a_trial_for_every_prompt(tmp_path: Path) -> None:
    rows = [{"query": "2+2", "split": "train", "correct": {"a": 1, "b": 0}}]
    log = read(tmp_path, rows)
    assert log.reward.tolist() == [1.0, 0.0]
    assert log.parts == ("train",)
    assert len(log.of_part("train")) == 2
    with pytest.raises(ValueError, match="the log's `split` has no 'test': it has 'train'"):
        log.of_part("test")


def test_prompts_may_be_named_in_one_file_and_told_in_another(tmp_path: Path) -> None:
    prompts = write(
        tmp_path / "prompts.jsonl", [{"prompt_id": i, "prompt": t} for i, t in (("a", "Think."), ("b", "Go."))]
    )
    assert logs.read(write(tmp_path / "log.jsonl", ROWS), prompts).prompts == ("Think.", "Go.")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    log = read(tmp_path, [{**row, "cost": 2, "propensity": 0.5} for row in ROWS])
    logs.write(log, tmp_path / "again.jsonl")
    again = logs.read(tmp_path / "again.jsonl")
    for name in ("query", "prompt", "reward", "repeat", "cost", "propensity"):
        np.testing.assert_equal(getattr(again, name), getattr(log, name))


def test_answers_that_were_cut_are_told_by_prompt(tmp_path: Path) -> None:
    """Prompt a ended once and was cut once, and of its third answer nothing is said. Words of files without types count."""
    log = read(tmp_path, [{**row, "ended": e} for row, e in zip(ROWS, (True, None, None, "false"), strict=True)])
    assert log.cut() == {"a": 0.5}
    assert "were cut before they ended: a 50%. A cut answer is graded by what it had said" in logs.cut_in_words(log)
    logs.write(log, tmp_path / "again.jsonl")
    again = logs.read(tmp_path / "again.jsonl")
    assert again.cut() == log.cut()
    assert again.select(np.array([0])).cut() == {"a": 0.0}
    assert logs.cut_in_words(again.select(np.array([0]))) == ""
    assert read(tmp_path, ROWS).cut() == {}
    with pytest.raises(ValueError, match="ended is 'perhaps'; it must be true or false"):
        read(tmp_path, [*ROWS, {"query": "4", "prompt_id": "a", "reward": 1, "ended": "perhaps"}])


def test_compact_leaves_out_what_has_no_trial(tmp_path: Path) -> None:
    log = read(tmp_path, ROWS).of_prompts([1]).compact()
    assert (log.queries, log.prompt_ids, log.prompt.tolist()) == (("2+2",), ("b",), [0])


def test_retest_by_hand(tmp_path: Path) -> None:
    """Prompt a on 2+2 came to 1, 1, 0: of its three pairs one agrees. Prompt b was tried once and says nothing."""
    rows = [*ROWS[:1], *ROWS[:2], ROWS[3]]
    assert logs.retest(read(tmp_path, rows)) == pytest.approx(1 / 3)
    assert logs.retest(read(tmp_path, ROWS[:3])) is None


def test_a_predictor_can_do_better_than_two_trials_agree() -> None:
    """Of trials that go well with p = 0.8 two agree with 0.68, "well" is right with 0.8 = (1 + √(2·0.68 − 1)) / 2."""
    rng, builder = np.random.default_rng(0), logs.Builder()
    for query in range(4000):
        for _ in range(2):
            builder.add({"query": str(query), "prompt_id": "ab"[query % 2], "reward": float(rng.random() < 0.8)}, "x")
    log = builder.build()
    found = judged.prediction(log, np.full((4000, 2), 0.8))
    assert found["retest"] == pytest.approx(0.68, abs=0.02)
    assert found["accuracy"] == pytest.approx(0.8, abs=0.02)
    assert found["accuracy"] == pytest.approx((1 + np.sqrt(2 * found["retest"] - 1)) / 2, abs=0.02)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "4+4", "prompt_id": "a"}, "row 5 has no reward; its columns are query, prompt_id"),
        ({"query": "4+4", "prompt_id": "a", "reward": 2}, r"reward is 2.0; it must be in \[0, 1\]"),
        ({"query": "4+4", "prompt_id": "a", "reward": "x"}, "reward is 'x'; it must be a number"),
        ({"query": " ", "prompt_id": "a", "reward": 1}, "query is ' '; it must be a text that is not empty"),
        ({"query": "x" * (logs.LONGEST + 1), "prompt_id": "a", "reward": 1}, "query has 1048577 characters"),
        ({"query": "4", "query_id": logs.name_of("2+2"), "prompt_id": "a", "reward": 1}, "stands for two texts"),
        ({"query": "4", "prompt_id": "a", "reward": 1, "propensity": 0}, "propensity is 0.0"),
        ({"query": "4", "prompt_id": "a", "reward": float("nan")}, "reward is nan; it must be finite"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [*ROWS, row])


def test_a_trial_that_the_log_numbers_twice_is_refused(tmp_path: Path) -> None:
    rows = [{**row, "repeat": 0} for row in ROWS]
    with pytest.raises(ValueError, match="repeat 0 of the prompt 'a' on the query '2\\+2' is there twice"):
        read(tmp_path, rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], ROWS[3]], "tries one prompt only, 'a'"),
        ([ROWS[0], {**ROWS[1], "reward": 1}], "all 2 rewards are 1"),
        ([{**ROWS[0], "cost": 1}, ROWS[1]], "1 of 2 trials have no cost"),
    ],
)
def test_logs_without_a_choice_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, rows)


def test_trials_of_several_models_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"query": q, "prompt_id": p, "reward": float(p == m), "model": m} for q in "xy" for p in "ab" for m in "ab"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="row 2: the log holds trials of several models, 'a' and 'b'"):
        logs.read(path)
    log = logs.read(path, model="b")
    assert (len(log), log.reward[log.prompt == log.prompt_ids.index("b")].tolist()) == (4, [1.0, 1.0])
    with pytest.raises(ValueError, match=r"no trials of 'c': it has a \(4\), b \(4\)"):
        logs.read(path, model="c")


def test_champ_is_read_and_graded(tmp_path: Path) -> None:
    def talk(*said: str | None) -> dict[str, Any]:
        return {"messages": [{"role": "User", "text": "?"}, *({"role": "Model.M", "text": s} for s in said)]}

    problems = {
        "P_1": {"_text": "How many strings of length 6?", "_answer": "239", "conversations": {
            "M|0-Shot": talk("work", "There are 239 strings of length 6."), "M|5-Shot": talk("work", "There are 29.")}},
        "P_2": {"_text": "Which of 3 and 7?", "_answer": "7", "conversations": {
            "M|0-Shot": talk("The answer is 7."), "M|5-Shot": talk("Not 7 but 3.")}},
        "P_3": {"_text": "And in general?", "_answer": "n!", "conversations": {"M|0-Shot": talk("n!")}},
        "P_4": {"_text": "Too long?", "_answer": "5", "conversations": {"M|0-Shot": talk("5"), "M|5-Shot": talk("x", None)}},
    }  # fmt: skip
    path = tmp_path / "v0.json"
    path.write_text(json.dumps({"problems": problems, "concepts": {}, "hints": {}}))
    log = logs.read(path)
    assert log.query_ids == ("P_1", "P_2", "P_4")
    assert log.prompt_ids == ("0-Shot", "5-Shot")
    np.testing.assert_array_equal(log.matrix(), [[1, 0], [1, 0], [1, 0]])
    path.write_text(json.dumps({"problems": {"P_1": {}}}))
    with pytest.raises(ValueError, match="not laid out as CHAMP's"):
        logs.read(path)


def test_what_was_not_tried_may_be_null(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"query": "x", "correct": {"a": 1, "b": None}}, {"query": "y", "correct": {"a": 0, "b": 1}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.testing.assert_array_equal(logs.read(path).matrix(), [[1, np.nan], [0, 1]])


def test_one_text_is_one_prompt(tmp_path: Path) -> None:
    path, texts = tmp_path / "t.jsonl", tmp_path / "p.jsonl"
    path.write_text(
        "".join(json.dumps({"query": "x", "prompt_id": p, "prompt": "Same.", "reward": 1}) + "\n" for p in "ab")
    )
    with pytest.raises(ValueError, match="'a' and 'b' are the same text"):
        logs.read(path)
    path.write_text("".join(json.dumps({"query": "x", "prompt_id": p, "reward": 1}) + "\n" for p in "ab"))
    texts.write_text(json.dumps({"prompt_id": "a", "prompt": "A"}) + "\n")
    with pytest.raises(ValueError, match="the file of prompts has no 'b'; it has a"):
        logs.read(path, texts)
    texts.write_text("".join(json.dumps({"prompt_id": "a", "prompt": p}) + "\n" for p in "AB"))
    with pytest.raises(ValueError, match="'a' stands for two texts"):
        logs.read(path, texts)
