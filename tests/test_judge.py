"""The figures every online run ends with: paired by prompt, from prompts it never learned from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import batch
from tiny_recipes import LIKED, liking, policy, task
from tokenmdp import judge
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run

SAMPLING = Sampling(max_new_tokens=5)


def better(longer: float = 6.0) -> Policy:
    """A policy that says the liked word more often than the start: its output row is longer."""
    other = policy().twin("all")
    with torch.no_grad():
        other.model.get_output_embeddings().weight[LIKED] *= longer
    return other.freeze()


def judged(folder: Path, trained: Policy, reward: Any = None, sampling: Sampling = SAMPLING) -> Any:
    with Run.open(folder, config={}, seed=0) as run:
        return judge.held_out(policy().freeze(), trained, reward or liking(), task(), sampling, run)["held_out"]


def test_a_policy_beside_itself_has_gained_nothing_and_has_no_kl(tmp_path: Path) -> None:
    found = judged(tmp_path / "run", policy().freeze())
    gain = found["trained_minus_start"]
    assert gain["low"] <= 0 <= gain["high"]
    assert found["kl_nats"] == {"mean": pytest.approx(0, abs=1e-9), "n": 5}, "no spread, no interval"
    assert found["prompts"] == 5


def test_a_changed_policy_has_kl_and_its_responses_are_kept(tmp_path: Path) -> None:
    found = judged(tmp_path / "run", better())
    assert found["kl_nats"]["mean"] > 0.5  # nats; its interval is that of five prompts, and wide
    lines = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["start"] * 5 + ["trained"] * 5
    assert {line["row"] for line in lines} == {p.row for p in task().held_out}


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_kl_is_that_of_the_responses_temperature(temperature: float, tmp_path: Path) -> None:
    """On the very responses that were judged, by the enumerated vocabulary; that of T = 1 is far off."""
    trained, start = better(1.3), policy().freeze()
    sampling = replace(SAMPLING, temperature=temperature)
    found = judged(tmp_path / "run", trained, sampling=sampling)["kl_nats"]["mean"]
    with Run.open(tmp_path / "again", config={}, seed=0) as run:
        _, b = (p.sample(list(task().held_out), judge.ANSWERS, sampling, run.rng) for p in (start, trained))
    with torch.no_grad():
        logits = [p.model(input_ids=b.tokens).logits[:, :-1] for p in (trained, start)]
    want = {}
    for T in (temperature, 1.0):
        p, q = (torch.log_softmax(x / T, -1) for x in logits)
        want[T] = float(torch.where(b.action[:, 1:], (p.exp() * (p - q)).sum(-1), 0.0).sum(-1).mean())
    assert found == pytest.approx(want[temperature], rel=1e-3)
    assert found != pytest.approx(want[1.0], rel=0.5)


def test_greedy_responses_are_measured_at_temperature_1(tmp_path: Path) -> None:
    found = judged(tmp_path / "run", better(), sampling=replace(SAMPLING, temperature=0.0))["kl_nats"]["mean"]
    b = better().sample(list(task().held_out), 1, replace(SAMPLING, temperature=0.0), torch.Generator())
    assert found == pytest.approx(float(better().kl_to(policy(), b).sum(-1).mean()), rel=1e-4)


def test_rows_without_a_verdict_leave_the_means(tmp_path: Path) -> None:
    """Every second response of a prompt has no verdict, the others score 1: the mean is 1, not one half."""
    reward = FunctionReward(
        lambda completions, **_: [None, 1.0] * (len(completions) // 2), name="half", max_missing=1.0
    )
    found = judged(tmp_path / "run", policy().freeze(), reward)
    assert found["score_start"]["mean"] == found["score_trained"]["mean"] == 1.0
    assert [found[name] for name in ("prompts_left_out", "no_verdict_start", "no_verdict_trained")] == [0, 10, 10]
    assert "no verdict on 10 of 20 responses of the start and 10" in (tmp_path / "run" / "log.txt").read_text()
    none = FunctionReward(lambda completions, **_: [None] * len(completions), name="none", max_missing=1.0)
    assert "no verdict" in judged(tmp_path / "none", policy().freeze(), none)


def test_without_held_out_prompts_that_is_said(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        found = judge.held_out(policy(), policy(), liking(), replace(task(), held_out=()), SAMPLING, run)
    assert "holds no prompts out" in str(found["held_out"])


def test_prompts_that_were_learned_on_too_are_told_of(tmp_path: Path) -> None:
    both = replace(task(), held_out=(*task().held_out, *task().train[:2]))
    with Run.open(tmp_path / "run", config={}, seed=0) as run:
        found: Any = judge.held_out(policy().freeze(), better(), liking(), both, SAMPLING, run)["held_out"]
    assert (found["prompts"], found["prompts_learned_on"]) == (7, 2)
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "warning: 2 of the 7 prompts judged are among those that liking gives to learn on" in said
    assert "prompts_learned_on" not in judged(tmp_path / "apart", better())
    assert '"gold"' not in (tmp_path / "apart" / "samples.jsonl").read_text()


# -- diversity ----------------------------------------------------------------------------------------------------------


def test_a_policy_that_says_one_thing_is_told_of(tmp_path: Path) -> None:
    found = judged(tmp_path / "well", policy().freeze())
    assert found["distinct_2_change"]["mean"] == pytest.approx(0, abs=0.05)
    assert "repeat each other" not in (tmp_path / "well" / "log.txt").read_text()
    found = judged(tmp_path / "ill", better(60.0))
    assert found["distinct_2_trained"]["mean"] < 0.4 < 0.8 < found["distinct_2_start"]["mean"]
    assert found["distinct_2_change"]["mean"] < -0.4
    assert "warning: responses to one prompt repeat each other" in (tmp_path / "ill" / "log.txt").read_text()


def test_diversity_and_length_by_hand() -> None:
    """Of (1 2), (1 2), (3 1 2) and an end: 4 pairs, of which (1 2) and (3 1) are different. The second prompt has none."""
    rows = [[1, 2, 0], [1, 2, 0], [3, 1, 2, 0], [0]] + [[5, 0]] * 4
    b = batch([([1], row) for row in rows])
    found = judge._distinct(b)
    assert found[0] == 0.5
    assert np.isnan(found[1])


# -- another judge ------------------------------------------------------------------------------------------------------


def test_a_gain_that_the_other_judge_does_not_see_is_told_of(tmp_path: Path) -> None:
    """The policy learned to say the liked word; the judge likes another one."""

    def judged_by(name: str, word: int) -> Any:
        def share(completions: list[str], **_: Any) -> list[float]:
            return [c.split().count(f"w{word}") / max(1, len(c.split())) for c in completions]

        gold = FunctionReward(share, name="gold")
        with Run.open(tmp_path / name, config={}, seed=0) as run:
            start = policy().freeze()
            wide = replace(task(), train=task().train[40:], held_out=task().train[:40])
            return judge.held_out(start, better(), liking(), wide, SAMPLING, run, gold)["held_out"]

    found = judged_by("other", LIKED + 1)
    assert found["judge"] == "gold"
    assert found["proxy_trained_minus_start"]["low"] > 0 > found["trained_minus_start"]["mean"]
    assert "warning: liking, which was optimised, rose by" in (tmp_path / "other" / "log.txt").read_text()
    lines = [json.loads(line) for line in (tmp_path / "other" / "samples.jsonl").read_text().splitlines()]
    for line in lines:  # each judge's own word, under its own name
        words = line["text"].split()
        said = [words.count(f"w{word}") / max(1, len(words)) for word in (LIKED, LIKED + 1)]
        assert [line["proxy"], line["gold"]] == pytest.approx(said)
    assert any(line["proxy"] != line["gold"] for line in lines)
    assert judged_by("same", LIKED)["trained_minus_start"]["low"] > 0
    assert not (tmp_path / "same" / "log.txt").exists()  # nothing was worth a line
    assert "proxy_trained_minus_start" not in judged(tmp_path / "none", better())
