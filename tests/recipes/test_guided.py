"""Guided decoding: it keeps the most promising block, by enumeration; values by completion; what ended stays ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import EOS, prompt, tiny
from tiny_offline import build_guided
from tiny_recipes import LIKED, liked_share
from tokenmdp.models.policy import Policy
from tokenmdp.recipes import guided
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.types import Batch, Score


def run_guided(folder: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, float]]]:
    exchanged = {k: changes.pop(k) for k in ("reward", "policy", "asked") if k in changes}
    cfg, (policy, prompts, reward) = build_guided(**changes)
    pieces = (exchanged.get("policy", policy), exchanged.get("asked", prompts), exchanged.get("reward", reward))
    with Run.open(folder, config={}, seed=0) as run:
        figures = guided.train(cfg, *pieces, run)
    samples, metrics = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("samples.jsonl", "metrics.jsonl")
    )
    return figures, samples, metrics


class ByToken:
    """The id of the last token: all different, so no two candidates tie unless they are equal."""

    name = "last_token"

    def __call__(self, batch: Batch) -> Score:
        return Score.of(batch.tokens[torch.arange(len(batch)), batch.length - 1].float())


def first_token(policy: Policy) -> Tensor:
    """π of the first token after the prompt (1, 2)."""
    with torch.no_grad():
        return policy.model(input_ids=torch.tensor([[1, 2]]), use_cache=False).logits[0, -1].softmax(-1).double()


def test_one_choice_has_the_distribution_of_the_best_of_k(tmp_path: Path) -> None:
    """P(best of 3 = a) = F(a)³ − F(a − 1)³, F the distribution function over token ids; 1,200 answers, 4 errors."""
    policy, k, count = tiny("llama", vocabulary=4).freeze(), 3, 1200
    settings = {"k": k, "block": 1, "max_new_tokens": 1, "chunk": count, "prompts": count}
    _, samples, _ = run_guided(
        tmp_path / "run", policy=policy, asked=[prompt(1, 2)] * count, reward=ByToken(), **settings
    )
    F = first_token(policy).cumsum(0)
    want = F**k - torch.cat([torch.zeros(1).double(), F[:-1]]) ** k
    got = torch.zeros(4).double()
    for line in samples:
        if line["arm"] == "guided":
            got[int(line["proxy"])] += 1 / count
    assert float(((got - want).abs() / (want * (1 - want) / count).sqrt()).max()) < 4


def test_smaller_blocks_choose_more_often(tmp_path: Path) -> None:
    """The share of liked words can be read at any prefix: 5 choices of a token beat one choice of 5 tokens."""
    found = {}
    for block in (5, 1):
        figures, _, _ = run_guided(tmp_path / str(block), block=block, k=4, prompts=20, chunk=20)
        found[block] = figures["score_guided"]
        assert figures["score_mean"] < 0.2
    assert found[5] > 0.18
    assert found[1] > found[5] + 0.08


def test_the_bound_adds_up_the_choices(tmp_path: Path) -> None:
    """Five tokens in blocks of two are three choices of the best of 4: 3 (log 4 − 3/4) nats."""
    figures, _, _ = run_guided(tmp_path / "run", k=4, block=2)
    assert figures["kl_bound_nats"] == pytest.approx(3 * (1.3862943611 - 0.75))
    assert run_guided(tmp_path / "one", k=1)[0]["kl_bound_nats"] == 0


def twice(completions: list[str], **_: Any) -> list[float]:
    """A verifier: nothing is right before the word was said twice."""
    return [float(text.split().count(f"w{LIKED}") >= 2) for text in completions]


def test_completions_show_a_verifier_what_a_prefix_promises(tmp_path: Path) -> None:
    settings = {"reward": FunctionReward(twice, name="twice"), "k": 6, "block": 1, "prompts": 24, "chunk": 24}
    blind, _, _ = run_guided(tmp_path / "blind", **settings)
    shown, _, _ = run_guided(tmp_path / "shown", rollouts=6, **settings)
    assert shown["score_guided"] > blind["score_guided"] + 0.1
    assert shown["tokens_guided_per_plain"] > blind["tokens_guided_per_plain"]


@pytest.mark.parametrize("rollouts", [0, 2])
def test_answers_are_of_the_prompts_asked_and_end_once(rollouts: int) -> None:
    cfg, (policy, prompts, reward) = build_guided(prompts=40, max_new_tokens=5, rollouts=rollouts)
    guide = guided.Guide(cfg, policy, reward, torch.Generator().manual_seed(0))
    b = guide.answer(prompts)
    assert b.prompts == tuple(prompts)
    for row, p in enumerate(prompts):
        response = b.tokens[row][b.action[row]].tolist()
        assert tuple(b.tokens[row, : len(p.ids)].tolist()) == p.ids
        assert 1 <= len(response) <= 5
        assert EOS not in response[:-1]
        assert bool(b.ended[row]) == (response[-1] == EOS)
        assert bool(b.ended[row]) or len(response) == 5
    assert bool(b.ended.any())
    assert not bool(b.ended.all())


def test_a_value_by_completion_is_their_mean() -> None:
    """The reward is the length of the whole response. Ended and full prefixes are judged as they are."""

    class Length:
        name = "length"

        def __call__(self, batch: Batch) -> Score:
            return Score.of(batch.action.sum(-1).float())

    cfg, (policy, prompts, _) = build_guided(rollouts=3)
    guide = guided.Guide(cfg, policy, Length(), torch.Generator().manual_seed(0))
    done = [[4, EOS], [4, 5], [4, 5, 6]]
    b = guided.joined(policy, prompts[:3], done)
    assert guide._value(b, 0).value.tolist() == [2.0, 2.0, 3.0]
    value = guide._value(b, 2).value
    assert float(value[0]) == 2.0
    assert 3.0 <= float(value[1]) <= 4.0
    assert 4.0 <= float(value[2]) <= 5.0


def test_what_has_no_verdict_is_kept_last_and_counted(tmp_path: Path) -> None:
    """Liked words cannot be judged: they are never chosen while anything else is there."""

    def judge(completions: list[str], **_: Any) -> list[float | None]:
        return [None if share > 0 else 0.0 for share in liked_share(completions)]

    reward = FunctionReward(judge, name="judge", max_missing=1.0)
    _, samples, metrics = run_guided(tmp_path / "run", reward=reward, k=6, block=1, prompts=20, chunk=20)
    assert sum(line["no_verdict"] for line in metrics) > 0
    plain, chosen = (sum(s["proxy"] is None for s in samples if s["arm"] == arm) for arm in ("first", "guided"))
    assert plain >= 3
    assert chosen == 0


def test_without_any_verdict_there_is_no_score(tmp_path: Path) -> None:
    def judge(completions: list[str], **_: Any) -> list[float | None]:
        return [None] * len(completions)

    reward = FunctionReward(judge, name="judge", max_missing=1.0)
    figures, _, metrics = run_guided(tmp_path / "run", reward=reward, prompts=4)
    assert figures["score_mean"] is figures["score_guided"] is None
    assert figures["no_verdict"] == 8  # four plain answers and four guided ones
    assert all("objective/scores" not in line for line in metrics)


@pytest.mark.parametrize("changes", [{"k": 0}, {"block": 0}, {"rollouts": -1}])
def test_what_is_outside_its_range_is_named(changes: dict[str, Any], tmp_path: Path) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        run_guided(tmp_path / "run", **changes)
