"""Tasks by name, drawing, prompts from files, and the two character tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tokenmdp import tasks
from tokenmdp.models.policy import Policy
from tokenmdp.models.tiny import tiny
from tokenmdp.tasks import ExactAnswer, Task
from tokenmdp.types import Batch, Prompt


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny()


def said(prompts: list[Prompt], texts: list[str]) -> Batch:
    return Batch.build(prompts, [[1]] * len(prompts), texts=texts, ended=[True] * len(prompts))


# -- the task -----------------------------------------------------------------------------------------------------------


def test_a_draw_is_of_different_prompts_and_of_the_generator_alone() -> None:
    task = Task("t", tuple(Prompt((i + 1,), str(i), i) for i in range(10)))
    rng = torch.Generator().manual_seed(0)
    first, second = task.draw(6, rng), task.draw(6, rng)
    assert len({p.row for p in first}) == 6
    assert first != second
    assert task.draw(6, torch.Generator().manual_seed(0)) == first
    assert {p.row for p in task.draw(10, rng)} == set(range(10))
    for k in (0, 11):
        with pytest.raises(ValueError, match=f"asked for {k} prompts of the task t, which has 10"):
            task.draw(k, rng)
    with pytest.raises(ValueError, match="the task t has no prompts to learn on"):
        Task("t", ())


def test_what_is_judged_and_learned_on_is_told_by_its_tokens(policy: Policy) -> None:
    prompts = tuple(Prompt((i + 1,), str(i), i) for i in range(10))
    said: list[str] = []
    apart = Task("t", prompts[4:], prompts[:4])
    assert (apart.learned(apart.held_out), apart.learned(prompts)) == (0, 6)
    assert apart.first(4, said.append) == list(prompts[:4])
    assert not said
    assert apart.first(6, said.append) == list(prompts[:6])
    same = Task("t", prompts, prompts)
    assert same.first(20, said.append) == list(prompts), "none is asked twice"
    told = "prompts are among those that t gives to learn on"
    assert said == [f"2 of the 6 {told}", f"10 of the 10 {told}"]
    for name in ("copying", "drift"):  # so few that they are judged on what they give to learn on
        task = tasks.load(name, policy)
        assert task.learned(task.held_out) == len(task.held_out) > 0
    addition = tasks.load("addition", policy)
    assert addition.learned(addition.held_out) == 0


def test_tasks_are_found_by_name_and_mistakes_get_a_suggestion(policy: Policy) -> None:
    assert {"addition", "prompts", "reversal", "sentiment"} <= set(tasks.names())
    assert "data" not in tasks.names()
    with pytest.raises(ValueError, match="there is no task 'adition': did you mean addition"):
        tasks.load("adition", policy)
    with pytest.raises(ValueError, match="the task addition has no option 'digit': did you mean digits"):
        tasks.load("addition", policy, digit=2)


# -- prompts from files -------------------------------------------------------------------------------------------------


def test_prompts_of_a_file_are_split_by_prompt(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "asks.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"q{i % 20}", "answer": i}) for i in range(40)))
    task = tasks.load(path, policy, held_out=0.25)
    assert (task.name, len(task.train), len(task.held_out)) == ("asks.jsonl", 30, 10)
    assert {p.text for p in task.train}.isdisjoint(p.text for p in task.held_out)
    assert sorted(p.columns["answer"] for p in (*task.train, *task.held_out)) == list(range(40))
    assert tasks.load("prompts", policy, source=path, held_out=0.25) == task
    assert tasks.load(path, policy, held_out=0.25, seed=1).held_out != task.held_out
    assert tasks.load(path, policy, held_out=0.0).held_out == ()
    with pytest.raises(ValueError, match=r"held_out is 1\.0; it is a share"):
        tasks.load(path, policy, held_out=1.0)


def test_a_prompt_is_held_out_once_with_each_answer(policy: Policy, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 20}", "answer": i % 40, "chosen": f" {i}", "rejected": " no"} for i in range(200)]
    path = tmp_path / "repeated.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = tasks.load(path, policy, held_out=0.25)
    # 5 of 20 prompts with 2 answers each are 10 rows, and each stands there five times.
    assert (len(task.train), len(task.held_out), task.facts) == (150, 10, {"dropped_as_repeated": 40})
    assert len({(p.ids, p.columns["answer"]) for p in task.held_out}) == 10


def test_a_single_prompt_stays_to_learn_on(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("prompt\nhello\n")
    task = tasks.load(tmp_path / "one.csv", policy, held_out=0.9)
    assert (len(task.train), len(task.held_out)) == (1, 0)


# -- addition and reversal ----------------------------------------------------------------------------------------------


def test_addition_says_sums(policy: Policy) -> None:
    task = tasks.load("addition", policy)
    assert (len(task.train), len(task.held_out)) == (2000, 200)
    everything = [*task.train, *task.held_out]
    assert len({p.text for p in everything}) == 2200, "no sum twice, so none is in both parts"
    for p in everything[:200]:
        a, b = p.text.removesuffix("=").split("+")
        assert p.columns["answer"] == str(int(a) + int(b))
    assert task.demonstrations is not None
    assert task.demonstrations.prompts[0].text == task.train[0].text
    assert task.reward is not None
    assert bool((task.reward(task.demonstrations).value == 1).all()), "the demonstrator is always right"
    assert bool(task.demonstrations.ended.all())


@pytest.mark.parametrize(("digits", "low", "high"), [("1", 0, 9), (2, 10, 99), ("1-3", 0, 999), ("3", 100, 999)])
def test_digits_bound_the_numbers(policy: Policy, digits: str | int, low: int, high: int) -> None:
    task = tasks.load("addition", policy, digits=digits, count=80, held_out=20)
    numbers = [int(n) for p in (*task.train, *task.held_out) for n in p.text.removesuffix("=").split("+")]
    assert low <= min(numbers) <= max(numbers) <= high
    assert len(task.train) + len(task.held_out) == 100


def test_all_hundred_sums_of_single_digits_and_no_more(policy: Policy) -> None:
    task = tasks.load("addition", policy, digits=1, count=1000, held_out=10)
    assert {p.text for p in (*task.train, *task.held_out)} == {f"{a}+{b}=" for a in range(10) for b in range(10)}
    assert len(tasks.load("addition", policy, digits=1).held_out) == 20, "a fifth at most"
    with pytest.raises(ValueError, match="count is 0 and held_out is 10"):
        tasks.load("addition", policy, digits=1, count=0, held_out=10)
    for digits in ("3-1", "two", "0", 10):
        with pytest.raises(ValueError, match="must be a number from 1 to 9 or a range such as 1-2"):
            tasks.load("addition", policy, digits=digits)


def test_many_digits_are_drawn_without_listing_all(policy: Policy) -> None:
    task = tasks.load("addition", policy, digits="9", count=30, held_out=10)
    assert len({p.text for p in (*task.train, *task.held_out)}) == 40


def test_reversal_says_the_word_backwards(policy: Policy) -> None:
    task = tasks.load("reversal", policy, length=3, letters=4, count=50, held_out=10)
    everything = [*task.train, *task.held_out]
    assert len({p.text for p in everything}) == 60
    assert all(p.columns["answer"] == p.text.removesuffix(">")[::-1] for p in everything)
    assert all(len(p.text) == 4 and set(p.text) <= set("abcd>") for p in everything)
    assert len(tasks.load("reversal", policy, length=2, letters=4, held_out=60).held_out) == 3, "a fifth of 16"
    with pytest.raises(ValueError, match="letters is 27"):
        tasks.load("reversal", policy, letters=27)


def test_seeds_choose_and_seeds_alone(policy: Policy) -> None:
    for name in ("addition", "reversal"):
        first, second = (tasks.load(name, policy, count=50, held_out=10, seed=s) for s in (0, 1))
        assert first.train != second.train
        assert tasks.load(name, policy, count=50, held_out=10, seed=0).train == first.train


def test_the_exact_answer_verifier() -> None:
    prompts = [Prompt((1,), "2+2=", i, {"answer": "4"}) for i in range(4)] + [Prompt((1,), "?", 4)]
    score = ExactAnswer()(said(prompts, ["4", " 4\n", "44", "", "4"]))
    assert score.value.tolist() == [1, 1, 0, 0, 0]
    assert score.verdict.tolist() == [True, True, True, True, False], "without an answer there is no verdict, and no 0"
    thought = ["<think>5?</think> 4", "<think>4</think>5", "<think>4", "4 is it"]
    assert ExactAnswer()(said(prompts[:4], thought)).value.tolist() == [1, 0, 0, 0]  # only what follows the thinking


def test_answers_in_a_file_of_prompts_are_demonstrations_of_those_learned_on(policy: Policy, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tasks.load(str(tmp_path / "a.jsonl"), policy)
    assert task.demonstrations is not None
    assert [p.text for p in task.demonstrations.prompts] == [p.text for p in task.train]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"prompt": r["prompt"]}) for r in rows))
    assert tasks.load(str(tmp_path / "b.jsonl"), policy).demonstrations is None
