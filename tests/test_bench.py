"""The benches write rows of the promised shape; how fast anything is, no test says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tokenmdp.models import catalog

BENCH = Path(__file__).parents[1] / "bench"
SUMMARY: dict[str, Any] = {
    "size": "tiny",
    "seed": 3,
    "gold_sft": {"mean": 0.5, "low": 0.3, "high": 0.7},
    "gold_bon": {"mean": 1.0, "low": 0.8, "high": 1.2, "n": 8},
    "gold_ppo": {"mean": 1.5, "low": 1.2, "high": 1.8},
    "ppo_minus_sft": {"mean": 1.0, "low": 0.7, "high": 1.3},
    "kl_nats": {"ppo": {"mean": 4.0, "low": 3.5, "high": 4.5}, "bon_analytic": 1.2},
    "rm": {"accuracy": 0.7, "low": 0.6, "high": 0.8, "bayes_accuracy": 0.9},
    "minutes": {"total": 12.0, "sft": 3.0},
    "peak_gb": 4.0,
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a bench as running its file does: its folder comes first."""
    monkeypatch.syspath_prepend(BENCH)
    names = ("common", "rollout", "learner", "demo", "oracle", "oracle_page", "oracle_toy")
    yield importlib.import_module
    for name in names:  # such plain names must not stay behind for other tests
        sys.modules.pop(name, None)


def rows_of(module: ModuleType, file: Path) -> dict[str, Any]:
    """What a bench writes in its quickest form."""
    module.main(["--quick", "--runs", "1", "--model", "tiny", "--json", str(file)])
    return dict(json.loads(file.read_text()))


def check_rows(found: dict[str, Any], unit: str) -> None:
    meta = found.pop("_meta")
    assert meta["model"] == "tiny"
    assert meta["compute"] == "float32"
    assert {"command", "versions", "threads", "bfloat16_units"} <= meta.keys()
    assert len(found) == 4
    for row in found.values():
        assert row["unit"] == unit
        assert row["runs"] == len(row["ours_all"]) == len(row["peer_all"]) == 1
        assert row["ours"] > 0
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"], rel=0.05)


def test_rollout_bench_writes_its_rows(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows_of(bench("rollout"), tmp_path / "rollout.json")
    assert "64 rows x 16 new tokens, 8 prompts x 8 samples, 48-token prompts" in found
    check_rows(found, "tokens/s")
    assert "generate" in capsys.readouterr().out


def test_learner_bench_writes_its_rows(bench: Any, tmp_path: Path) -> None:
    found = rows_of(bench("learner"), tmp_path / "learner.json")
    assert all(row["tokens_per_s"] > 0 for name, row in found.items() if name != "_meta")
    assert [name.split(",")[1].strip() for name in found if name != "_meta"] == ["train=all", "train=top-1"] * 2
    check_rows(found, "GFLOP/s")


def test_oracle_bench_finds_what_is_known_and_writes_its_page(bench: Any, tmp_path: Path) -> None:
    file, page = tmp_path / "results" / "oracle.json", tmp_path / "estimators.md"
    bench("oracle").main(["--quick", "--json", str(file)])
    found = json.loads(file.read_text())
    on_policy = found["tables"]["on_policy"]
    assert on_policy["leave one out (RLOO)"]["bias"]["median"] == 0
    assert on_policy["group mean (Dr. GRPO)"]["bias"]["median"] == 0.5, "groups of two"
    assert on_policy["group mean and spread (GRPO)"]["off"]["median"] > 0.01
    assert found["tables"]["stale"]["1 update: ratio of the response"]["bias"]["median"] == 0
    text = page.read_text()
    assert found["command"] in text
    assert all(f"| {row} |" in text for table in found["tables"].values() for row in table)


def test_quick_means_fewer_runs_unless_a_number_is_given(bench: Any) -> None:
    common = bench("common")
    out = common.parser(None)
    common.model_flags(out)
    asked = ([], ["--quick"], ["--quick", "--runs", "7"])
    assert [common.runs_of(out.parse_args(flags)) for flags in asked] == [5, 3, 7]


def test_sides_take_turns_and_the_first_turn_does_not_count(bench: Any) -> None:
    order: list[str] = []

    def side(name: str, work: float) -> Any:
        def run() -> float:
            order.append(name)
            return work

        return run

    rates = bench("common").alternate({"ours": side("a", 2.0), "peer": side("b", 1.0)}, 2, "turns")
    assert order == ["a", "b"] * 3
    assert [len(r) for r in rates.values()] == [2, 2]


def test_tokens_after_the_end_do_not_count(bench: Any) -> None:
    # 9 ends a row: 2 tokens of the first, all 4 of the second, 1 of the third
    response = torch.tensor([[5, 9, 9, 9], [5, 6, 7, 8], [9, 5, 5, 9]])
    assert bench("rollout").useful(response, [9]) == 2 + 4 + 1


@pytest.mark.parametrize("train", ["all", "top-1", "none"])
def test_learner_bench_counts_the_products_that_run(bench: Any, train: str) -> None:
    learner = bench("learner")
    start = catalog.load("tiny")
    policy = start.twin(train)
    data = learner.batch_of(policy, rows=2, prefix=3, response=4)
    policy.evaluate(data)  # the first call also asks whether the head is linear
    with learner.counted(policy.model) as total:
        policy.evaluate(data)
    # A block of the tiny model: q and o 64·64, k and v 64·32, three of 64·120; the head 64·99 at 8 action positions of 14.
    block, head = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 120, 64 * 99
    forward = 2 * block * 14 + head * 8
    if train == "all":
        # Every weight and every input has a gradient; the embedding trains, so the first block's input has one too.
        expected = 2.0 * 3 * forward
    elif train == "top-1":
        # The last block's weights and inputs (the norm before q, k and v trains too), and the head's input.
        expected = 2.0 * (forward + 2 * block * 14 + head * 8)
    else:
        expected = 2.0 * forward
    assert total[0] == expected


def test_demo_bench_keeps_the_figures_and_judges_them(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = bench("demo")
    folder = demo.folder_of(tmp_path / "runs", "tiny", 3)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    assert demo.finished(folder, "tiny", 3) is None  # no result.json: the run was killed before its end
    (folder / "result.json").write_text("{}")
    assert demo.finished(folder, "tiny", 4) is None  # another seed's figures

    file = tmp_path / "results" / "demo.json"
    demo.main(["--seeds", "3", "--size", "tiny", "--runs", str(tmp_path / "runs"), "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["seeds"]["3"] == {
        "gold_sft": 0.5,
        "gold_bon": 1.0,
        "gold_ppo": 1.5,
        "ppo_minus_sft_ci": [0.7, 1.3],
        "kl_nats": 4.0,
        "rm_accuracy": 0.7,
        "rm_accuracy_ci": [0.6, 0.8],
        "minutes": 12.0,
        "peak_gb": 4.0,
    }
    assert found["passed"] == dict.fromkeys(("ppo_minus_sft", "kl_nats", "minutes", "peak_gb"), True)
    assert {"command", "size", "versions", "threads", "compute", "bfloat16_units", "thresholds"} <= found.keys()
    assert "passed: kl_nats" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [("ppo_minus_sft_ci", [0.0, 1.0]), ("kl_nats", 20.0), ("minutes", 15.01), ("peak_gb", 8.01)],
)
def test_one_seed_beyond_a_threshold_fails_it(bench: Any, name: str, value: Any) -> None:
    demo = bench("demo")
    good = demo.figures(SUMMARY)
    failed = [key for key, passed in demo.judged({"0": good, "1": {**good, name: value}}).items() if not passed]
    assert failed == [name.removesuffix("_ci")]
