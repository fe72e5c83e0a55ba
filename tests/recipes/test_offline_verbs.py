"""The `main`s of what chooses, learns from logs, fits values or searches: from names and paths to a policy on disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tokenmdp.models import catalog
from tokenmdp.recipes import awr, evolution, guided, hindsight, ilql, raft, soft_q
from tokenmdp.run import Run

_ONLINE = {"model": "tiny", "task": "addition", "reward": "addition", "steps": 1, "prompts": 2, "max_new_tokens": 3}


def run_main(module: ModuleType, folder: Path, **settings: Any) -> dict[str, Any]:
    cfg = module.Config(**settings)
    with Run.open(folder, config=asdict(cfg), seed=0) as run:
        return run.finish(module.main(cfg, run))


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (raft, {"train": "lora-2"}),
        (soft_q, {}),
        (evolution, {"pairs": 1}),
        (hindsight, {"task": "copying", "reward": "copying"}),
    ],
    ids=["raft", "soft_q", "evolution", "hindsight"],
)
def test_a_policy_is_trained_online_and_saved(module: ModuleType, settings: dict[str, Any], tmp_path: Path) -> None:
    result = run_main(module, tmp_path / "run", **{**_ONLINE, **settings})
    assert catalog.load(result["model"]).fingerprint() == result["fingerprint"]


@pytest.mark.parametrize("module", [awr, ilql], ids=["awr", "ilql"])
def test_a_policy_is_learned_from_a_log_and_saved(module: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{a}+{b}=", "completion": str(a + b + wrong), "reward": 1.0 - wrong}
        for a in range(3) for b in range(3) for wrong in (0, 1)
    ]  # fmt: skip
    path = tmp_path / "logged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_main(module, tmp_path / "run", model="tiny", data=str(path), steps=2, rows=6)
    assert catalog.load(result["model"]).fingerprint() == result["fingerprint"]
    assert result["fingerprint"] != catalog.load("tiny").fingerprint()


def test_held_out_prompts_are_answered_under_guidance(tmp_path: Path) -> None:
    settings = {"model": "tiny", "task": "addition", "reward": "addition", "prompts": 3, "max_new_tokens": 3}
    result = run_main(guided, tmp_path / "run", **settings, k=2, block=1, rollouts=1)
    assert result["prompts"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["first"] * 3 + ["guided"] * 3
