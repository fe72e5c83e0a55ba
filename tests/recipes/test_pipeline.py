"""The recipes' `main`s from names and paths, one after another as a user runs them: clone, model the reward, optimise, choose."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tokenmdp import cli
from tokenmdp.models import catalog
from tokenmdp.recipes import best_of_n, ppo, reward_model, sft
from tokenmdp.rewards.reward_model import RewardModel
from tokenmdp.run import Run


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_main(module: ModuleType, folder: Path, **settings: Any) -> dict[str, Any]:
    cfg = module.Config(**settings)
    with Run.open(folder, config=asdict(cfg), seed=0) as run:
        return run.finish(module.main(cfg, run))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    rows = [{"prompt": f"{a}{b}>", "completion": f"{b}{a}"} for a in "abcd" for b in "abcd"]
    return {
        "demonstrations": write(tmp_path / "demonstrations.jsonl", rows),
        "preferences": write(
            tmp_path / "preferences.jsonl",
            [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "zzzz"} for r in rows],
        ),
        "prompts": write(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in rows]),
    }


def test_every_stage_takes_what_the_last_one_wrote(files: dict[str, str], tmp_path: Path) -> None:
    cloned = run_main(
        sft,
        tmp_path / "sft",
        model="tiny",
        data=files["demonstrations"],
        steps=6,
        rows=8,
        learning_rate=3e-3,
        held_out=0.2,
    )
    assert cloned["held_out_nll"] < cloned["held_out_nll_before"]
    assert catalog.load(cloned["model"]).fingerprint() == cloned["fingerprint"]

    judged = run_main(
        reward_model, tmp_path / "rm", model=cloned["model"], data=files["preferences"], rows=4, epochs=2,
        learning_rate=3e-3, held_out=0.3,
    )  # fmt: skip
    assert judged["accuracy"] > 0.9
    start = catalog.load(cloned["model"])
    assert RewardModel.load(judged["model"], start).scale != 1.0

    small = {"model": cloned["model"], "reward": judged["model"], "task": files["prompts"], "max_new_tokens": 4}
    tuned = run_main(ppo, tmp_path / "ppo", **small, steps=2, prompts=4, samples=2)
    assert catalog.load(tuned["model"]).fingerprint() == tuned["fingerprint"] != cloned["fingerprint"]
    gate = json.loads((tmp_path / "ppo" / "gate.jsonl").read_text().splitlines()[0])
    assert gate["kl_reference"] == 0.0

    chosen = run_main(best_of_n, tmp_path / "bon", **small, prompts=3, n=4)
    assert chosen["score_best"] >= chosen["score_mean"]
    assert chosen["prompts"] == 3, "the two that are held out, and one of the others"


@pytest.mark.parametrize("verb", ["ppo", "grpo", "reinforce", "raft", "online-dpo", "soft-q"])
def test_another_judge_by_its_flag(verb: str, tmp_path: Path) -> None:
    """What is optimised is the length; the task's own verifier looks on, and judges at the end."""
    (tmp_path / "long.py").write_text("def score(completions, **_):\n    return [len(c) / 10 for c in completions]\n")
    line = [
        verb,
        "--model",
        "tiny",
        "--task",
        "addition",
        "--reward",
        f"{tmp_path / 'long.py'}:score",
        "--gold",
        "addition",
    ]
    line += [
        "--steps",
        "2",
        "--prompts",
        "4",
        "--samples",
        "2",
        "--max-new-tokens",
        "4",
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.dispatch(line) == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())["held_out"]
    assert found["judge"] == "exact_answer"
    assert found["score_start"]["mean"] <= 1
    assert "proxy_trained_minus_start" in found
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("objective/gold" in x for x in lines)
    assert (tmp_path / "run" / "gate.jsonl").exists()
