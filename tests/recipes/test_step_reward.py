"""A process reward as an online recipe's reward: the run optimises what its credit scheme says a row is paid in all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_offline import build_soft_q
from tiny_policy_gradient import build_dapg, build_grpo, build_reinforce
from tiny_recipes import LIKED, build_ppo, liked_share
from tokenmdp.functional import credit
from tokenmdp.recipes import dapg, grpo, ppo, reinforce, soft_q
from tokenmdp.rewards.function import FunctionReward
from tokenmdp.run import Run
from tokenmdp.types import Batch, Score

ONLINE = {
    "ppo": (ppo, build_ppo),
    "grpo": (grpo, build_grpo),
    "reinforce": (reinforce, build_reinforce),
    "dapg": (dapg, build_dapg),
    "soft_q": (soft_q, build_soft_q),
}
PLAIN: dict[str, dict[str, Any]] = {"grpo": {"overlong": 0, "dynamic_sampling": 0}, "reinforce": {"entropy": 0.0}}
"""What else in a small run would change what rows are paid."""


class Stepped:
    """Every liked word ends a step; what is said of the steps is `scale` each, the score that of the share of liked words."""

    name = "stepped"

    def __init__(self, scale: float = 0.3) -> None:
        self.scale = scale

    def __call__(self, batch: Batch) -> Score:
        value = torch.tensor(liked_share(list(batch.texts)))
        closing = batch.action & (batch.tokens == LIKED)
        return Score(value, torch.ones(len(batch), dtype=torch.bool), steps=torch.where(closing, self.scale, 0.0))


class Evened:
    """The score and what is said of the one step, at the last token, differ from row to row; their sum is 1 in all."""

    name = "evened"

    def __call__(self, batch: Batch) -> Score:
        value = torch.tensor(liked_share(list(batch.texts)))
        return Score(value, torch.ones(len(batch), dtype=torch.bool), steps=credit.last(1 - value, batch.action))


def lines(name: str, folder: Path, reward: Any, **changes: Any) -> list[dict[str, Any]]:
    recipe, build = ONLINE[name]
    cfg, pieces = build(**changes)
    at = next(i for i, piece in enumerate(pieces) if isinstance(piece, FunctionReward))
    with Run.open(folder, config={}, seed=0) as run:
        recipe.train(cfg, *pieces[:at], reward, *pieces[at + 1 :], run)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ONLINE)
def test_steps_are_paid_under_process_and_not_under_other_schemes(name: str, tmp_path: Path) -> None:
    """In the first phase the KL is 0, so what is optimised is what rows are paid: twice the steps, twice the difference."""
    paid = {}
    for scheme, scale in (("last", 0.3), ("process", 0.3), ("process", 0.6)):
        folder = tmp_path / f"{scheme}{scale}"
        (line,) = lines(name, folder, Stepped(scale), credit=scheme, steps=1, **PLAIN.get(name, {}))
        paid[scheme, scale] = line["objective/rlhf_reward"] - line["objective/scores"]
    assert paid["last", 0.3] == pytest.approx(0, abs=1e-6)
    assert paid["process", 0.3] > 0.05
    assert paid["process", 0.6] == pytest.approx(2 * paid["process", 0.3], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("grpo", {"scale": "none"}),
        ("dapg", {}),
        *(("reinforce", {"baseline": name}) for name in ("batch", "leave_one_out", "greedy")),
    ],
)
def test_baselines_are_of_what_rows_are_paid(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Rows that are paid the same in all, at the same place, teach nothing, however differently it is made up."""
    changes = {**PLAIN.get(name, {}), **changes, "steps": 1, "kl": 0.0}
    for line in lines(name, tmp_path / "run", Evened(), credit="process", **changes):
        assert line["grad_norm"] == pytest.approx(0, abs=1e-5)
    for line in lines(name, tmp_path / "score", Evened(), credit="last", **changes):
        assert line["grad_norm"] > 1e-3
