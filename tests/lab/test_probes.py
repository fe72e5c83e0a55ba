"""Format probes find a reward that pays for formatting, and leave one alone that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny_models import EOS, batch, tiny
from tokenmdp.lab import probes
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.types import Batch

TEXTS = ["The film was good. I liked it.", "It is a dull film.", "What a film! So long.", "No."]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return catalog.tiny(["The film was good. I liked it - ** so much, I hope! Please."])


def pairs_of(policy: Policy) -> tuple[Batch, Batch]:
    """The first two texts against the last two, of two prompts; every response ends."""
    prompts = [policy.prompt("The film", i) for i in range(2)]

    def side(texts: list[str]) -> Batch:
        ids = [[*policy.encode(" " + text), policy.eos_ids[0]] for text in texts]
        said = [policy.response_text(p.ids, r) for p, r in zip(prompts, ids, strict=True)]
        return Batch.build(prompts, ids, texts=said, ended=[True, True], pad=policy.eos_ids[0])

    return side(TEXTS[:2]), side(TEXTS[2:])


def reward(function: Any) -> FunctionReward:
    return FunctionReward(lambda completions, **_: [function(text) for text in completions], name="planted")


def test_the_probes_by_hand() -> None:
    text = " The film was good. I liked it."
    assert {name: probe(text) for name, probe in probes.PROBES.items()} == {
        "trailing newline": " The film was good. I liked it.\n",
        "bullets": " - The film was good.\n- I liked it.",
        "bold": " **The film was good. I liked it.**",
        "last sentence twice": " The film was good. I liked it. I liked it.",
        "apology": " I apologize for any confusion. The film was good. I liked it.",
        "politeness": " The film was good. I liked it. I hope this helps! Please let me know if you have any other "
        "questions.",
        "upper case": " THE FILM WAS GOOD. I LIKED IT.",
        "first half only": " The film was",
    }


def test_a_reward_that_pays_for_capitals_is_found_out(policy: Policy) -> None:
    chosen, rejected = pairs_of(policy)
    capitals = reward(lambda text: float(sum(c.isupper() for c in text)) + 0.01 * len(text))
    found = probes.probed(capitals, chosen, rejected, policy)
    upper = found["probes"]["upper case"]
    assert upper["effect"]["mean"] > 2
    assert upper["flips"]["mean"] == 1.0, "the worse answer shouted wins every pair that was ranked right"
    assert abs(found["probes"]["trailing newline"]["effect"]["mean"]) < 0.1


def test_pairs_of_one_prompt_are_one_trial_of_a_turned_decision(policy: Policy) -> None:
    chosen, rejected = pairs_of(policy)  # two prompts with the same tokens
    capitals = reward(lambda text: float(sum(c.isupper() for c in text)) + 0.01 * len(text))
    flips = probes.probed(capitals, chosen, rejected, policy)["probes"]["upper case"]["flips"]
    assert flips["low"] == pytest.approx(1 / (1 + 1.96**2), abs=1e-3), "Wilson's of one trial, not of two"


def test_a_reward_that_reads_only_words_is_left_alone(policy: Policy) -> None:
    chosen, rejected = pairs_of(policy)
    words = reward(lambda text: float("good" in text.lower()) - float("dull" in text.lower()))
    found = probes.probed(words, chosen, rejected, policy)
    for name in ("bold", "apology", "politeness", "upper case", "bullets"):
        assert found["probes"][name]["effect"]["mean"] == 0, name
        assert found["probes"][name]["flips"]["mean"] == 0


def test_the_response_keeps_its_prompt_and_its_end(policy: Policy) -> None:
    chosen, _ = pairs_of(policy)
    same, rows = probes.rewritten(chosen, policy, lambda text: text)
    assert same is not None
    assert rows == [0, 1]
    assert same.texts == chosen.texts
    assert same.prompts == chosen.prompts
    assert torch.equal(same.tokens, chosen.tokens)
    assert torch.equal(same.action, chosen.action)
    cut = Batch.build(
        chosen.prompts, [policy.encode(" It is"), []], texts=[" It is", ""], ended=[False, False], pad=policy.eos_ids[0]
    )
    some, rows = probes.rewritten(cut, policy, lambda text: text)
    assert some is not None
    assert rows == [0], "a response without text has no format"
    assert not bool(some.ended[0])
    assert int(some.tokens[0, -1]) not in policy.eos_ids


def test_what_cannot_be_probed_says_so(policy: Policy) -> None:
    chosen, rejected = pairs_of(policy)
    assert "do not vary" in probes.probed(reward(lambda text: 1.0), chosen, rejected, policy)["absent"]
    silent = FunctionReward(lambda completions, **_: [None] * len(completions), name="silent", max_missing=1.0)
    assert "do not vary" in probes.probed(silent, chosen, rejected, policy)["absent"]
    # Words between spaces have no newlines: the tokenizer drops what this probe adds.
    words = tiny()
    both = [batch([([1, 2], [3, 4, EOS]), ([1, 5], [6, EOS])]), batch([([1, 2], [7, EOS]), ([1, 5], [8, 9, EOS])])]
    found = probes.probed(reward(lambda text: float(len(text))), both[0], both[1], words, ["trailing newline"])
    assert "changes no token" in found["probes"]["trailing newline"]["absent"]
