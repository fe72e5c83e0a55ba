"""The benches of prompts run from their commands to their files, on made-up outcomes laid out as the published ones."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "bench"
PROMPTS = ("a", "b", "c", "d", "e", "f")
NAMES = ("common", "prompt_logs", "prompts_scalability", "prompts_collected", "prompts")


@pytest.fixture
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The bench, imported as running its file does: its folder comes first."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module(request.param)
    for name in NAMES:  # such plain names must not stay behind for other tests
        sys.modules.pop(name, None)


@pytest.fixture
def outcomes(tmp_path: Path) -> Path:
    """Three sets of 90 questions under six prompts; of each third a published test part that repeats one question."""
    rng = np.random.default_rng(0)
    texts = [{"prompt_id": p, "prompt": f"Do it as {p} does.", "source": "published"} for p in PROMPTS]
    (tmp_path / "prompts.json").write_text(json.dumps(texts))
    for name in ("gsm8k", "mawps", "svamp"):
        rows = []
        for i in range(90):
            hard = rng.random()
            row = {"query_id": str(i), "query": f"{'Ann' if hard > 0.5 else 'Bob'} has {i} of {hard:.2f}. How many?"}
            row |= {"split": "test" if i % 3 == 0 else "train", "row": i}
            rows.append({**row, "correct": {p: int(rng.random() > hard) for p in PROMPTS}})
        rows[3] = {**rows[3], "query": rows[1]["query"]}
        with gzip.open(tmp_path / f"llama2_{name}.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("bench", ["prompt_logs"], indirect=True)
@pytest.mark.parametrize("part", ["llama2", "leak", "ope"])
def test_published_logs(bench: Any, part: str, outcomes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench/prompt_logs.py", part, "--data", str(outcomes)])
    file = outcomes / "out.json"
    found = bench.main([part, "--quick", "--data", str(outcomes), "--json", str(file)])
    assert json.loads(file.read_text())["command"] == f"python bench/prompt_logs.py {part} --data DIR"
    if part == "llama2":
        one = found["sets"]["gsm8k"]
        assert set(one["choices"]) == {
            "random",
            "best constant (train)",
            "neighbours",
            "logistic",
            "abstaining",
            "oracle",
        }
        assert one["questions"] == 89
        assert list(one["prompts_known"]) == ["1", "2", "3", "4", "5", "6"]
    if part == "leak":
        assert found["sets"]["mawps"]["held_out_rows_that_repeat"]["same"] == pytest.approx(1 / 30, abs=1e-4)
    if part == "ope":
        assert {cell["estimator"] for cell in found["cells"]} == {"direct", "ips", "snips", "dr"}


@pytest.mark.parametrize("bench", ["prompts_scalability"], indirect=True)
def test_scalability(bench: Any, outcomes: Path) -> None:
    found = bench.main(["--quick", "--data", str(outcomes), "--json", str(outcomes / "out.json")])
    (cell,) = found["logs"]["gsm8k, LLaMA-2-7B-chat"]["pooled"]
    assert (cell["questions"], cell["prompts"], cell["draws"]) == (60, 2, 1)
    assert set(cell["by_difficulty"]) <= {"hard", "middle", "easy"}
    two = {"x": [{**cell, "questions": size} for size in (60, 89)]}
    assert bench.picture(two).count("<svg") == 2  # the sheet and one chart


@pytest.mark.parametrize("bench", ["prompts_collected"], indirect=True)
def test_collected_logs(bench: Any, tmp_path: Path) -> None:
    for name in ("train", "test", "valid"):
        rows = [{"question": f"What is {i} + {len(name)}?", "answer": i + len(name)} for i in range(20)]
        rows += [{"question": "What is 1 + 1?", "answer": 2}] * 2
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["--quick", "--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "out.json")]
    assert len(bench.problems(tmp_path, 100)) == 20, "train's are out, and what is in test and valid is there once"
    found = bench.main(line)["models"]["first"]
    assert found["trials"] == 20 * 6 + 4 * 6
    assert set(found["after_asking_all"]) == {"confidence", "self-critic", "vote"}
    before = (tmp_path / "runs" / "prompts-collected-quick" / "first.jsonl").read_bytes()
    again = bench.main(line)["models"]["first"]
    assert (tmp_path / "runs" / "prompts-collected-quick" / "first.jsonl").read_bytes() == before
    assert again["choices"] == found["choices"]


@pytest.mark.parametrize("bench", ["prompts"], indirect=True)
def test_speed(bench: Any, outcomes: Path) -> None:
    found = bench.main(["--quick", "--data", str(outcomes), "--json", str(outcomes / "out.json")])
    assert set(found) == {"fit", "choose", "rows", "_meta"}
    assert all({"ratio", "ours", "peer", "unit", "runs"} <= set(found[name]) for name in ("fit", "choose", "rows"))


@pytest.mark.parametrize("bench", ["prompts_collected"], indirect=True)
def test_the_critic_is_shown_the_number(bench: Any) -> None:
    assert bench.in_short("3 + 4 = 7, so the answer is 7.0 apples.") == "7"
    assert bench.in_short("About a quarter, 25%") == "25%"
    assert bench.in_short(" I do not know." * 9) == ("I do not know. " * 9).strip()[-60:]
