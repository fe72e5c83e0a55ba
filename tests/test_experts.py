"""Experts: what each knows, what it does not, what it costs, and how it may fail."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny_imitation import Counting
from tiny_models import batch, ragged, tiny
from tiny_recipes import policy
from tokenmdp import mdp, tasks
from tokenmdp.experts import (
    Advice,
    Aggregate,
    Answering,
    ExpertFailure,
    Queried,
    Teacher,
    Worked,
    affordable,
    check_vocabularies,
    reference,
)
from tokenmdp.functional import kl
from tokenmdp.ledger import Ledger, Overdrawn
from tokenmdp.models.tiny import tiny as characters
from tokenmdp.types import Batch

PATH = batch([([1, 2], [3, 4, 0]), ([1, 2], [5, 6]), ([7], [8])])


def answers(advice: Advice) -> list[list[int | None]]:
    """Row by row; None where nothing is known."""
    return [
        [t if k else None for t, k in zip(row, known, strict=True)]
        for row, known in zip(advice.token.tolist(), advice.known.tolist(), strict=True)
    ]


# -- who is asked


def test_a_teacher_says_the_token_it_finds_most_likely() -> None:
    model, b = tiny(), ragged()
    with torch.no_grad():
        logits = model.model(input_ids=b.tokens, use_cache=False).logits
    want = torch.where(b.action, logits.argmax(-1).roll(1, dims=1), 0)
    advice = Teacher(model)(b)
    assert torch.equal(advice.token, want)
    assert torch.equal(advice.known, b.action)
    assert not any(p.requires_grad for p in model.model.parameters())


def test_a_teacher_with_another_vocabulary_is_refused() -> None:
    small = tiny(vocabulary=59)
    with pytest.raises(ValueError, match="the batch holds token 60, but llama has 59: teacher and student need one"):
        Teacher(small)(batch([([1], [60])]))
    # 61 words against 59: two are in one only, and the others have the same number.
    with pytest.raises(
        ValueError, match=r"\(61 tokens, 61 logits\) .* \(59 tokens, 59 logits\).* 2 tokens are in one "
    ):
        check_vocabularies(tiny(), small)
    with pytest.raises(ValueError, match="have different vocabularies"):
        check_vocabularies(tiny(), characters())
    check_vocabularies(tiny(), tiny("gpt2"))


def test_a_reference_with_a_shorter_context_is_refused(tmp_path: Path) -> None:
    start, short = tiny(), tiny("gpt2", n_positions=16)
    short.save(tmp_path / "short")
    with pytest.raises(ValueError, match=r"the context of the reference .* is 16 tokens, and .* makes 17"):
        reference(str(tmp_path / "short"), start, 17)
    assert reference(str(tmp_path / "short"), start, 16).context == 16
    assert reference("", start, 17) is start
    with pytest.raises(ValueError, match="rows of 20 tokens exceed the context of gpt2, 16"):
        short.evaluate(batch([([1], [2] * 19)]))


def test_a_teachers_divergence_is_the_students_to_it() -> None:
    student, teacher, b = tiny(), tiny(seed=1), ragged()
    found = Teacher(teacher).divergence(student, b, kl.exact)
    assert found.requires_grad
    assert torch.allclose(found, student.kl_to(teacher, b), atol=1e-6)


def test_worked_answers_are_known_along_their_path_alone() -> None:
    worked = Worked(PATH)
    b = batch([([1, 2], [3, 9, 0]), ([1, 2], [5, 6, 2]), ([7], [8]), ([8], [8])])
    # Row 0 leaves the first answer at its second token, where the answer is still known. Of the two answers to 1 2 the
    # first one's token comes first; the second is followed once it is begun, and says nothing after its end.
    assert answers(worked(b)) == [
        [None, None, 3, 4, None],
        [None, None, 3, 6, None],
        [None, 8, None, None, None],
        [None] * 5,
    ]


def test_the_answer_goes_on_whatever_was_said_before() -> None:
    model = characters()
    b = Batch.build(
        [model.prompt("12+7=", columns={"answer": "19"}), model.prompt("1+1=", columns={})],
        [model.encode("1x33"), model.encode("2")],
        texts=["1x33", "2"],
        ended=[False, False],
    )
    one, nine, end = model.encode("1")[0], model.encode("9")[0], model.eos_ids[0]
    assert answers(Answering(model)(b)) == [[None] * 5 + [one, nine, end, end], [None] * 9]  # the second has no answer


@pytest.mark.parametrize("name", ["addition", "reversal", "copying"])
def test_the_exact_experts_agree_with_their_tasks_demonstrations(name: str) -> None:
    task = tasks.load(name, characters(), **({} if name == "copying" else {"count": 20, "held_out": 4}))
    assert task.expert is not None
    assert task.demonstrations is not None
    shown = task.demonstrations
    by_prompt = {p.ids: p for p in task.train}
    b = replace(shown, prompts=tuple(by_prompt[p.ids] for p in shown.prompts))
    advice = task.expert(b)
    assert torch.equal(advice.known, b.action)
    assert torch.equal(advice.token, torch.where(b.action, b.tokens, 0))


def test_asking_needs_a_setting_with_an_expert() -> None:
    model = policy()
    for expert in (Counting(), Teacher(model), Worked(PATH), Answering(model), Queried(Counting(), Ledger())):
        with mdp.within("offline_imitation"), pytest.raises(mdp.OutOfSetting, match="asking an expert"):
            expert(PATH)
        with mdp.within("imitation"):
            expert(PATH)


def test_advice_has_one_answer_a_position() -> None:
    with pytest.raises(ValueError, match=r"advice of shape \(1, 2\), known on \(1, 3\)"):
        Advice(torch.zeros((1, 2), dtype=torch.long), torch.zeros((1, 3), dtype=torch.bool))
    nothing = Advice.none(PATH)
    assert not bool(nothing.known.any())


# -- what it costs


def test_every_known_answer_is_paid_for_and_no_other() -> None:
    ledger = Ledger(queries=10)
    expert = Queried(Worked(PATH), ledger)
    expert(batch([([1, 2], [3, 9, 0])]))
    assert ledger.paid == {"queries": 2}  # of three positions two are known
    Queried(Counting(), ledger)(PATH)
    assert ledger.paid == {"queries": 8}  # 3 + 2 + 1 actions
    with pytest.raises(Overdrawn, match="6 positions to ask about and 2 queries left of 10; nothing was asked"):
        expert(PATH)
    assert ledger.paid == {"queries": 8}


def test_what_can_be_paid_for_is_marked_from_the_first_row_on() -> None:
    ledger = Ledger(queries=4)
    marked = affordable(PATH, ledger)
    assert marked.action.sum(1).tolist() == [3, 1, 0]  # of 3, 2 and 1
    assert affordable(PATH, Ledger()) is PATH
    counting = Counting()
    Queried(counting, ledger)(marked)
    assert counting.asked == 4
    assert ledger.left("queries") == 0


# -- how it may fail


class Moody(Counting):
    """Cannot stand rows with a token above 7; says so, or keeps silent until told to go."""

    def __init__(self, silent: threading.Event | None = None) -> None:
        super().__init__()
        self.silent = silent

    def __call__(self, batch: Batch) -> Advice:
        if int(batch.tokens.max()) > 7:
            if self.silent is None:
                raise RuntimeError("not this one")
            self.silent.wait(30)
        return super().__call__(batch)


def test_a_row_that_the_expert_cannot_stand_loses_its_own_answers_only() -> None:
    ledger = Ledger()
    expert = Queried(Moody(), ledger, max_missing=0.4)
    advice = expert(PATH)  # the third row holds an 8
    assert advice.known.sum(1).tolist() == [3, 2, 0]
    assert torch.equal(advice.token[:2], Counting()(PATH.select([0, 1])).token)
    assert expert.failed == 1
    assert ledger.paid == {"queries": 5}


def test_too_many_failures_are_an_error_that_says_why() -> None:
    expert = Queried(Moody(), Ledger(queries=100), max_missing=0.2)
    with pytest.raises(
        ExpertFailure, match=r"no answer for 1 of the first 3 of 3 rows, .* 20% .*RuntimeError: not this"
    ):
        expert(PATH)
    assert expert.ledger.paid == {"queries": 0}
    with pytest.raises(ExpertFailure, match="1 of the first 1 of 1 rows"):
        expert(PATH.select([2]))


def test_an_expert_that_hangs_is_not_waited_for() -> None:
    release = threading.Event()
    expert = Queried(Moody(release), Ledger(), timeout_seconds=0.2, max_missing=0.4)
    try:
        with mdp.within("imitation"):  # which holds in the thread that asks, too
            advice = expert(PATH)
        assert advice.known.sum(1).tolist() == [3, 2, 0]  # waited for, it would have answered for all
    finally:
        release.set()


def test_an_experts_mistakes_in_form_and_place_are_errors() -> None:
    class Loose(Counting):
        def __call__(self, batch: Batch) -> Advice:
            return Advice(batch.tokens, torch.ones_like(batch.action))

    with pytest.raises(ValueError, match="or where no action is marked"):
        Queried(Loose(), Ledger())(PATH)
    with pytest.raises(ValueError, match=r"max_missing 1\.5: at least 0, and a share"):
        Queried(Counting(), Ledger(), max_missing=1.5)
    with mdp.within("rl"), pytest.raises(mdp.OutOfSetting):  # no failure of the expert's
        Queried(Counting(), Ledger())(PATH)


def test_what_was_paid_and_failed_outlives_a_checkpoint() -> None:
    expert = Queried(Moody(), Ledger(queries=9), max_missing=0.4)
    expert(PATH)
    again = Queried(Moody(), Ledger(queries=9), max_missing=0.4)
    again.restore(expert.tensors(), expert.scalars())
    assert (again.failed, again.ledger.left("queries")) == (1, 4)


# -- what was gathered


def test_the_aggregate_keeps_what_was_answered_and_comes_back_from_a_checkpoint() -> None:
    gathered = Aggregate()
    with pytest.raises(ValueError, match="nothing was gathered"):
        gathered.draw(1, torch.Generator())
    again = Aggregate()
    again.restore(gathered.tensors(), gathered.scalars())
    assert len(again) == 0
    gathered.add(PATH, Worked(PATH.select([0, 2]))(PATH))  # of row 1 only the first token is known
    gathered.add(batch([([9], [9, 9, 9, 9, 9])]), Counting()(batch([([9], [9, 9, 9, 9, 9])])))
    gathered.add(batch([([9], [9])]), Advice.none(batch([([9], [9])])))  # nothing known: nothing to keep
    again.restore(gathered.tensors(), gathered.scalars())
    for one in (gathered, again):
        b, token = one.draw(10, torch.Generator().manual_seed(0))
        assert len(one) == len(b) == 4
        assert sorted(b.action.sum(1).tolist()) == [1, 1, 3, 5]
        assert sorted(token[b.action].tolist()) == [0, 3, 3, 4, 8, 10, 10, 10, 10, 10]
        assert token.shape == b.tokens.shape
        assert not bool(token[~b.action].any())
    part, token = again.draw(2, torch.Generator().manual_seed(1))
    assert len(part) == 2
    assert token.shape == part.tokens.shape
    again.clear()
    assert len(again) == 0
