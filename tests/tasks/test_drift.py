"""The drift tasks: what the expert says after mistakes, and the growth of mistakes against the enumerated truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from drift_world import PROMPT, Cloner, expert, world
from tokenmdp import growth, mdp, tasks
from tokenmdp.models import tiny
from tokenmdp.models.policy import Policy
from tokenmdp.tasks import drift
from tokenmdp.testing import contracts
from tokenmdp.testing.exact import expectation
from tokenmdp.types import Batch, Prompt


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny.tiny()


def said(policy: Policy, *texts: str, prompt: str = "c>") -> Batch:
    """Responses to one prompt."""
    p = policy.prompt(prompt, 0, {"first": "abcd".index(prompt[0])})
    ids = [policy.encode(text) for text in texts]
    return Batch.build([p] * len(texts), ids, texts=texts, ended=[False] * len(texts))


def answers(policy: Policy, kind: str, text: str) -> str:
    """What the expert would have said in place of each character."""
    task = drift.load(policy, kind, horizon=8, letters=4)
    assert task.expert is not None
    batch = said(policy, text)
    advice = task.expert(batch)
    assert torch.equal(advice.known, batch.action)
    return policy.decode(advice.token[0][batch.action[0]].tolist())


@pytest.mark.parametrize(
    ("kind", "text", "right"),
    [
        ("narrow", "#cdabc", "#cdabc"),  # the path: after the last letter the first
        ("recoverable", "#cdabc", "#cdabc"),
        # One wrong letter, and from there on nothing is right but `#`, however well the letters follow each other.
        ("narrow", "#cbcda", "#cd###"),
        ("recoverable", "#cbcda", "#cdcda"),  # the letter after the wrong one is right again
        ("narrow", "#cb##d#", "#cd####"),  # also after `#`
        ("narrow", "cdab", "####"),  # not begun
        ("recoverable", "cdab", "#dab"),
        ("narrow", "#c#cd", "#cd##"),  # `#` where it was not right is a mistake like another
        ("recoverable", "#7ab", "#c#b"),  # what no demonstration knows at all
    ],
)
def test_what_is_right_after_what(policy: Policy, kind: str, text: str, right: str) -> None:
    assert answers(policy, kind, text) == right


def test_only_what_is_asked_is_answered_from_all_that_was_said(policy: Policy) -> None:
    batch = said(policy, "#cbcda")
    only = batch.action.clone()
    only[:, :-1] = False
    task = drift.load(policy, letters=4)
    assert task.expert is not None
    advice = task.expert(Batch(batch.tokens, only, batch.length, batch.ended, batch.prompts, batch.texts, batch.group))
    assert advice.known.sum() == 1
    assert policy.decode(advice.token[0, -1:].tolist()) == "#"
    assert advice.token[0, :-1].sum() == 0


def test_the_two_kinds_have_the_same_demonstrations(policy: Policy) -> None:
    narrow, other = (drift.load(policy, kind, horizon=20, noise=0.05, count=200) for kind in drift.KINDS)
    assert narrow.demonstrations is not None
    assert other.demonstrations is not None
    assert torch.equal(narrow.demonstrations.tokens, other.demonstrations.tokens)
    assert narrow.train == other.train
    shown = narrow.demonstrations
    for task in (narrow, other):
        assert task.expert is not None
        wrong = shown.action & (shown.tokens != task.expert(shown).token)
        length = shown.action.sum(-1)
        # A slip is the last token of a demonstration that breaks off; whole ones may slip at their last step too.
        assert bool((wrong.sum(-1)[length < 20] == 1).all())
        assert torch.equal(wrong.any(-1), wrong[torch.arange(200), shown.length - 1])
        # 200 demonstrations of up to 20 steps: a slip in 64 % of them, of which one in 20 comes at the last step.
        assert 0.5 < float(wrong.any(-1).float().mean()) < 0.76
    assert narrow.facts["broken_off"] == pytest.approx(float((length < 20).float().mean()))
    clean = drift.load(policy, horizon=5, noise=0.0, count=30, letters=3)
    assert clean.demonstrations is not None
    assert clean.demonstrations.texts[:3] == ("#abca", "#bcab", "#cabc")
    assert clean.reward is not None
    assert clean.reward(clean.demonstrations).value.tolist() == [0.0] * 30


def test_slips_are_letters_other_than_the_right_one(policy: Policy) -> None:
    task = drift.load(policy, horizon=6, noise=0.9, count=600, letters=4)
    assert task.demonstrations is not None
    first = [text[0] for text in task.demonstrations.texts if len(text) == 1]
    assert set(first) <= set("abcd")
    second = {
        (p.text[0], t[1]) for p, t in zip(task.train * 150, task.demonstrations.texts, strict=True) if len(t) == 2
    }
    assert second == {(right, wrong) for right in "abcd" for wrong in "abcd" if right != wrong}


def test_the_reward_counts_what_was_wrong_and_what_is_missing(policy: Policy) -> None:
    batch = said(policy, "#cdabc", "#cbcda", "#cd", "xy")
    narrow, other = (drift.load(policy, kind, horizon=8, letters=4).reward for kind in drift.KINDS)
    assert narrow is not None
    assert other is not None
    # Wrong: 0, 4, 0, 2 of the narrow task; 0, 1, 0, 2 of the other. Missing of 8: 2, 2, 5, 6.
    assert narrow(batch).value.tolist() == [-2 / 8, -6 / 8, -5 / 8, -1.0]
    assert other(batch).value.tolist() == [-2 / 8, -3 / 8, -5 / 8, -1.0]
    contracts.check_reward(narrow, batch)


def test_the_expert_and_the_reward_keep_to_the_setting(policy: Policy) -> None:
    task = drift.load(policy, letters=4)
    batch = said(policy, "#c")
    assert task.expert is not None
    assert task.reward is not None
    with mdp.within("rl"), pytest.raises(mdp.OutOfSetting):
        task.expert(batch)
    with mdp.within("imitation"), pytest.raises(mdp.OutOfSetting):
        task.reward(batch)


@pytest.mark.parametrize("error", [0.01, 0.1, 0.5])
def test_mistakes_of_a_cloner_grow_as_the_enumeration_says(error: float) -> None:
    horizon = 5
    toy, cloner = world(horizon), Cloner(error)
    p = toy.probability(cloner.evaluate(toy.batch)["logp"])
    assert float(p.sum()) == pytest.approx(1.0)
    T = np.arange(1, horizon + 1)
    grown = {}
    for kind, truth in (("narrow", growth.worst_case(error, T)), ("recoverable", error * T)):
        wrong = toy.batch.action & (toy.batch.tokens != expert(kind).right(toy.batch))
        cost = expectation(p, wrong.double().cumsum(1))[len(PROMPT.ids) :]
        np.testing.assert_allclose(cost.numpy(), truth, rtol=1e-12)
        grown[kind] = float(growth.exponent(T[1:], cost.numpy()[1:])[0])
    assert grown["recoverable"] == pytest.approx(1.0)
    # ε T (T + 1) / 2 to first order: from T = 2 to 5 a slope of about log(15/3) / log(5/2) = 1.76, less where ε is large.
    assert grown["narrow"] == pytest.approx(1.76, abs=0.06) if error == 0.01 else 1.0 < grown["narrow"] < 1.76


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "wide"}, "kind is 'wide'"),
        ({"letters": 2}, "letters are 3 to 26"),
        ({"noise": 1.0}, "noise=1.0"),
        ({"horizon": 0}, "horizon=0"),
    ],
)
def test_bad_options(policy: Policy, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drift.load(policy, **options)


def test_a_prompt_of_another_task_and_a_tokenizer_of_words(policy: Policy) -> None:
    task = tasks.load("drift:recoverable", policy)
    assert task.expert is not None
    with pytest.raises(ValueError, match="knows its own task's prompts only"):
        task.expert(Batch.build([Prompt((5,), "x")], [[6]], texts=["y"], ended=[False]))
    with pytest.raises(ValueError, match="take `--model tiny`"):
        drift.load(tiny.tiny(["some words to learn tokens from, cd and #c and abc"], vocabulary=300))
