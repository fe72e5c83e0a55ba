"""New prompts: proposed, ranked by Υ, paid for and kept only if they pay; and a policy trained on Υ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from test_choose import log_of
from test_collect import Server, server

from tokenmdp import rewards
from tokenmdp.lab.prompts import write as verb
from tokenmdp.models import catalog
from tokenmdp.models.sampling import Sampling
from tokenmdp.prompting import log as logs
from tokenmdp.prompting import stacked, stored, write
from tokenmdp.prompting.choose import Chooser
from tokenmdp.recipes import grpo
from tokenmdp.run import Run
from tokenmdp.tasks import Task
from tokenmdp.testing import contracts

__all__ = ["server"]  # a fixture

KNOWN = ("First read it. Then answer.", "Think, step by step: now answer.", "Be brief.")


def fitted(folder: Path) -> Path:
    chooser = Chooser(stacked.named("logistic"), abstain=False).fit(log_of(0.8))
    stored.save(chooser, folder / "model", {"log": "planted"})
    return folder


def test_recombined_prompts_are_new_and_made_of_known_clauses() -> None:
    found = write.recombined(KNOWN, 6, np.random.default_rng(0))
    assert len(set(found)) == 6
    assert not set(found) & set(KNOWN)
    clauses = {"First read it.", "Then answer.", "Think,", "step by step:", "now answer.", "Be brief."}
    for text in found:
        rest = text
        for clause in clauses:
            rest = rest.replace(clause, "")
        assert not rest.strip(), text
    assert write.recombined(("Only one.",), 3, np.random.default_rng(0)) == []


def test_a_model_proposes_lines_that_are_not_there_yet() -> None:
    policy = catalog.load("tiny").freeze()
    found = write.proposed(policy, KNOWN, 4, torch.Generator().manual_seed(0), tokens=24)
    assert len(found) == len(set(found)) <= 4
    assert all(8 <= len(text) <= write.LONGEST and text not in KNOWN and "\n" not in text for text in found)


def test_what_a_prompt_adds_by_hand() -> None:
    """Υ of the known prompts (.5, .5), of the new one (.7, .4) on two queries: it adds (.2 + 0)/2 = .1."""

    class Said:
        def fit(self, log: logs.Log) -> Said:
            return self

        def predict(self, queries: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
            new = np.array([[0.7], [0.4]])
            return np.tile(new, (1, len(prompts))) if prompts[0] == "new" else np.full((2, len(prompts)), 0.5)

    chooser = Chooser(Said, abstain=False).fit(log_of(0.0))
    (found,) = write.ranked(chooser, ["x", "y"], ["new"])
    assert found.added == pytest.approx(0.1)
    assert found.expected == pytest.approx(0.55)
    assert write.ranked(chooser, ["x", "y"], []) == []


@pytest.mark.parametrize(("word", "kept"), [("nature. Think", 1), ("zebra", 0)])
def test_a_proposal_is_kept_only_if_the_paid_check_agrees(server: Server, tmp_path: Path, word: str, kept: int) -> None:
    """An endpoint that answers rightly where it reads one recombination, or nowhere at all."""
    server.mood = f"likes {word}"
    rows = [{"query": f"{i}+{i}=", "answer": str(2 * i)} for i in range(1, 13)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = verb.Config(
        chooser=str(fitted(tmp_path / "fit")), queries=str(tmp_path / "q.jsonl"), count=4, finalists=4, check=10, model="m",
        endpoint=server.url,
    )  # fmt: skip
    with Run.open(tmp_path / "run", {}, 0) as run:
        found = verb.main(cfg, run)
    assert found["trials_paid"] == 10 * (found["checked"] + 1) == len(server.asked)
    assert found["kept"] == kept
    assert (tmp_path / "run/prompts.jsonl").exists() is bool(kept)


def test_a_check_on_few_questions_confirms_nothing(server: Server, tmp_path: Path) -> None:
    trials = [
        {"query": f"question {'abcdefghij'[i]}", "query_id": i, "prompt_id": name, "reward": reward}
        for i in range(10)
        for name, reward in (("new", 1.0), ("old", 0.0))
    ]
    assert write.checked(trials[:14], "new", "old") is None  # seven questions
    found = write.checked(trials, "new", "old")
    assert found is not None
    assert 0 < found.low < 0.5  # ten that all agree are no certainty
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"query": f"{i}+{i}=", "answer": 2 * i}) + "\n" for i in (1, 2))
    )
    cfg = verb.Config(
        chooser=str(fitted(tmp_path / "fit")),
        queries=str(tmp_path / "q.jsonl"),
        count=4,
        model="m",
        endpoint=server.url,
    )
    with (
        Run.open(tmp_path / "run", {}, 0) as run,
        pytest.raises(ValueError, match=r"2 different questions \(2 of 2 queries\), and fewer than 8 confirm nothing"),
    ):
        verb.main(cfg, run)
    assert not server.asked


def test_a_policy_is_trained_on_what_a_prompt_would_earn(tmp_path: Path) -> None:
    reward = rewards.load(fitted(tmp_path / "fit"), catalog.load("tiny"))
    policy = catalog.load("tiny").freeze()
    asked = tuple(policy.prompt(f"cow {i}:", i, {"query": f"Tell me about the cow number {i}"}) for i in range(8))
    b = policy.sample(asked, 2, Sampling(6), torch.Generator().manual_seed(0))
    contracts.check_reward(reward, b)
    task = Task("writing", asked[2:], asked[:2], reward=reward)
    cfg = grpo.Config(model="tiny", steps=2, prompts=3, samples=4, max_new_tokens=6, train="all", learning_rate=1e-3)
    with Run.open(tmp_path / "run", {}, 0) as run:
        trained, _ = grpo.train(cfg, policy, reward, task, run)
    assert trained.fingerprint() != policy.fingerprint()
