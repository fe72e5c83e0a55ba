"""Trials are made once each, graded, kept through every interruption; endpoints that fail are survived and said."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tokenmdp import cli
from tokenmdp.models import catalog
from tokenmdp.models.sampling import Sampling
from tokenmdp.prompting import collect
from tokenmdp.prompting import log as logs
from tokenmdp.run import Run

QUERIES = [{"query": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]
PROMPTS = [{"prompt_id": "a", "prompt": "Add."}, {"prompt_id": "b", "prompt": "Guess."}]


class Server(ThreadingHTTPServer):
    """Answers chat requests on the loopback: the sum for `Add.`, 0 for `Guess.`, or as `mood` says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mood = "well"
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        self.server.asked.append(text)
        mood = self.server.mood
        if mood == "busy once" and self.server.asked.count(text) == 1:
            return self.reply(429, {"error": {"message": "slow down"}})
        if mood == "down":
            return self.reply(400, {"error": {"message": "no such model"}})
        if mood == "garbage":
            return self.reply(200, b"<html>hello</html>")
        if mood == "odd":
            return self.reply(
                200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": "abc"}
            )
        if mood == "empty":
            return self.reply(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": []})
        total = sum(map(int, text.partition("=")[0].split("+")))
        right = mood.removeprefix("likes ") in text if mood.startswith("likes ") else "Add" in text
        said = f"That makes {total}." if right else "It is 0."
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        whole = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [message],
            "usage": usage,
        }
        return self.reply(200, whole)

    def reply(self, status: int, body: dict[str, Any] | bytes) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def endpoint(server: Server, **more: Any) -> collect.Endpoint:
    return collect.Endpoint("m", Sampling(16), server.url, **{"concurrency": 2, "retries": 1, **more})


class Some:
    """A model that answers the first few and then breaks, as a process that is killed."""

    name = "some"
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[collect.Asked] = []

    def answer(self, asked: Sequence[collect.Asked]) -> Iterator[collect.Answered]:
        for number, a in enumerate(asked):
            if number == self.most:
                raise KeyboardInterrupt
            self.asked.append(a)
            yield collect.Answered(a, "4")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_trials_are_graded_and_their_cost_is_counted(server: Server, tmp_path: Path) -> None:
    asked = collect.wanted(QUERIES, PROMPTS, 2)
    trials = collect.Trials(tmp_path / "trials.jsonl")
    found = collect.collect(endpoint(server), asked, trials, price_in=1.0, price_out=2.0)
    assert found == {
        "made": 16,
        "found": 0,
        "failed": 0,
        "cut": 0,
        "tokens_in": 160,
        "tokens_out": 80,
        "cost": pytest.approx(320e-6),
    }
    assert all(row["ended"] for row in rows(tmp_path / "trials.jsonl"))
    log = logs.read(tmp_path / "trials.jsonl")
    assert log.matrix()[:, log.prompt_ids.index("a")].tolist() == [1.0] * 4
    assert log.matrix()[:, log.prompt_ids.index("b")].tolist() == [1.0, 0, 0, 0]  # 0 is right for 0+0 alone
    assert log.cost is not None
    assert log.cost.sum() == pytest.approx(320e-6)


def test_nothing_is_asked_twice_whatever_ended_the_first_attempt(tmp_path: Path) -> None:
    asked = collect.wanted(QUERIES, PROMPTS, 1)
    path = tmp_path / "trials.jsonl"
    first = Some(3)
    with pytest.raises(KeyboardInterrupt):
        collect.collect(first, asked, collect.Trials(path))
    with path.open("ab") as file:  # killed in the middle of a line
        file.write(b'{"query_id": "torn')
    trials = collect.Trials(path)
    assert trials.dropped == 18
    second = Some(99)
    found = collect.collect(second, asked, trials)
    assert (found["made"], found["found"]) == (5, 3)
    assert sorted(map(hash, first.asked + second.asked)) == sorted(map(hash, asked))
    assert len(rows(path)) == 8
    assert collect.collect(Some(0), asked, collect.Trials(path))["made"] == 0


def test_a_query_that_is_there_twice_is_asked_once() -> None:
    assert collect.wanted(QUERIES[:1] * 2, PROMPTS, 1) == collect.wanted(QUERIES[:1], PROMPTS, 1)


def test_what_is_no_log_is_not_touched(tmp_path: Path) -> None:
    for name, text in (
        ("a.jsonl", '{"some": "thing"}'),
        ("b.jsonl", '{"some": "thing"}\n'),
        ("c.jsonl", "query,reward\n"),
    ):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ValueError, match="line 1: not a trial"):
            collect.Trials(path)
        assert path.read_text() == text
    with pytest.raises(ValueError, match=r"to a file called \*.jsonl"):
        collect.Trials(tmp_path / "t.csv")


def test_a_whole_trial_without_an_end_of_line_is_kept(tmp_path: Path) -> None:
    asked, path = collect.wanted(QUERIES, PROMPTS, 1), tmp_path / "t.jsonl"
    collect.collect(Some(99), asked[:3], collect.Trials(path))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    trials = collect.Trials(path)
    assert (len(trials.done), trials.dropped) == (3, 0)
    collect.collect(Some(99), asked[:4], trials)
    assert len(rows(path)) == 4


def test_another_text_or_another_setting_is_not_taken_for_what_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    collect.collect(Some(99), collect.wanted(QUERIES, PROMPTS, 1), collect.Trials(path))
    other = [{**PROMPTS[0], "prompt": "Otherwise."}, PROMPTS[1]]
    with pytest.raises(ValueError, match="trials of another text as prompt_id 'a'"):
        collect.collect(Some(99), collect.wanted(QUERIES, other, 1), collect.Trials(path))
    hot = Some(99)
    hot.settings = {"temperature": 2}
    with pytest.raises(ValueError, match=r"asked with \{'temperature': 2\}"):
        collect.collect(hot, collect.wanted(QUERIES, PROMPTS, 2), collect.Trials(path))


def test_an_answer_that_was_cut_is_graded_by_what_it_had_said(tmp_path: Path) -> None:
    class Cut(Some):
        def answer(self, asked: Sequence[collect.Asked]) -> Iterator[collect.Answered]:
            for a in asked:
                yield collect.Answered(a, "The answer is 2. Now let me", ended=False)

    collect.collect(Cut(0), collect.wanted(QUERIES, PROMPTS, 1), collect.Trials(tmp_path / "t.jsonl"))
    told = {(row["query"], row["reward"]) for row in rows(tmp_path / "t.jsonl")}
    assert told == {("0+0=", 0.0), ("1+1=", 1.0), ("2+2=", 0.0), ("3+3=", 0.0)}


def test_a_query_may_be_called_0() -> None:
    asked = collect.wanted([{**QUERIES[1], "query_id": 0}, {**QUERIES[2], "query_id": None}], PROMPTS[:1], 1)
    assert [a.query_id for a in asked] == ["0", logs.name_of("2+2=")]


def test_models_of_one_name_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    path, asked = tmp_path / "t.jsonl", collect.wanted(QUERIES, PROMPTS, 1)
    first, second = (catalog.load("tiny").freeze() for _ in "ab")
    with torch.no_grad():
        next(second.model.parameters()).add_(1.0)
    collect.collect(collect.Local(first, Sampling(2)), asked[:4], collect.Trials(path))
    with pytest.raises(ValueError, match="answers of the two must not be mixed"):
        collect.collect(collect.Local(second, Sampling(2)), asked, collect.Trials(path))
    assert len(rows(path)) == 4
    # Trials written before weights were told apart say nothing of them: they are read, and go on.
    before = rows(path)
    assert all(row["settings"].pop("fingerprint") == first.fingerprint() for row in before)
    path.write_text("".join(json.dumps(row) + "\n" for row in before))
    found = collect.collect(collect.Local(second, Sampling(2)), asked, collect.Trials(path))
    assert (found["found"], found["made"]) == (4, 4)
    with pytest.raises(ValueError, match="must not be mixed"):
        collect.collect(collect.Local(first, Sampling(2)), asked, collect.Trials(path))


def test_a_log_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    line = f"from pathlib import Path; from tokenmdp.prompting import collect; collect.Trials(Path({str(path)!r}))"
    held = collect.Trials(path)
    said = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True)
    assert "another process is adding to" in said.stderr
    held.close()
    assert subprocess.run([sys.executable, "-c", line]).returncode == 0


def test_an_endpoint_that_is_busy_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.mood = "busy once"
    found = collect.collect(endpoint(server), collect.wanted(QUERIES, PROMPTS, 1), collect.Trials(tmp_path / "t.jsonl"))
    assert (found["made"], found["failed"]) == (8, 0)
    assert len(server.asked) == 16


@pytest.mark.parametrize(
    ("mood", "reason"),
    [("down", "no such model"), ("garbage", "failed 3 times"), ("empty", "holds no text"), ("odd", "holds no text")],
)
def test_an_endpoint_that_fails_is_given_up_with_the_reason(
    server: Server, tmp_path: Path, mood: str, reason: str
) -> None:
    asked, path = collect.wanted(QUERIES, PROMPTS, 1), tmp_path / "t.jsonl"
    collect.collect(endpoint(server), asked[:2], collect.Trials(path))
    server.mood = mood
    with pytest.raises(collect.TooManyFaults, match=reason):
        collect.collect(endpoint(server), asked, collect.Trials(path), most_faults=3)
    assert len(rows(path)) == 2
    server.mood = "well"
    assert collect.collect(endpoint(server), asked, collect.Trials(path))["made"] == 6


def test_an_endpoint_that_is_not_there(tmp_path: Path) -> None:
    gone = Server()
    gone.server_close()
    with pytest.raises(collect.TooManyFaults, match="Connection"):
        collect.collect(
            endpoint(gone, retries=0),
            collect.wanted(QUERIES, PROMPTS, 1),
            collect.Trials(tmp_path / "t.jsonl"),
            most_faults=2,
        )


def test_a_local_model_answers_through_our_engine(tmp_path: Path) -> None:
    policy = catalog.load("tiny").freeze()
    asked = collect.wanted(QUERIES, PROMPTS, 1)
    found = {}
    for name in ("one", "two"):
        model = collect.Local(policy, Sampling(4), chat=False, rows=3)
        collect.collect(model, asked, collect.Trials(tmp_path / f"{name}.jsonl"))
        found[name] = rows(tmp_path / f"{name}.jsonl")
    assert found["one"] == found["two"]
    assert {row["reward"] for row in found["one"]} <= {0.0, 1.0}
    assert all(row["confidence"] < 0 for row in found["one"]), "a mean log-probability"


def test_a_prompt_may_say_where_the_query_goes() -> None:
    inside = {"prompt_id": "i", "prompt": "Q: {query}\nA:"}
    first, second = collect.wanted(
        [{"query": " 1 + 1? ", "answer": 2}], [inside, {"prompt_id": "b", "prompt": " Think."}], 1
    )
    assert (first.text, second.text) == ("Q: 1 + 1?\nA:", "1 + 1? Think.")


def test_the_verb(server: Server, tmp_path: Path) -> None:
    from tokenmdp.lab.prompts import collect as verb

    for name, data in (("q", [{"question": q["query"], "answer": q["answer"]} for q in QUERIES]), ("p", PROMPTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    cfg = verb.Config(
        queries=str(tmp_path / "q.jsonl"), prompts=str(tmp_path / "p.jsonl"), trials=str(tmp_path / "t.jsonl"), model="m",
        endpoint=server.url, limit=3,
    )  # fmt: skip
    with Run.open(tmp_path / "run", {}, 0) as run:
        assert verb.main(cfg, run)["made"] == 6


@pytest.mark.parametrize(
    ("queries", "prompts", "repeats", "message"),
    [
        ([{"query": "x"}], PROMPTS, 1, "query 1 has no answer; its columns are query"),
        (QUERIES, [{"prompt": "x"}], 1, "prompt 1 has no prompt_id"),
        ([QUERIES[0], {**QUERIES[0], "answer": 99}], PROMPTS, 1, "query 2 has the answer 99, and an earlier one"),
        (QUERIES, PROMPTS[:1] * 2, 1, "is there twice"),
        (QUERIES, PROMPTS, 0, "0 repeats"),
    ],
)
def test_what_cannot_be_asked_is_refused(queries: Any, prompts: Any, repeats: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect.wanted(queries, prompts, repeats)


def test_answers_that_cannot_be_graded_and_files_that_are_no_log_cost_nothing(tmp_path: Path) -> None:
    asked = collect.wanted([{"query": "who?", "answer": "Ann"}], PROMPTS, 1)
    model = Some(9)
    with pytest.raises(ValueError, match="the answer 'Ann' holds no number"):
        collect.collect(model, asked, collect.Trials(tmp_path / "t.jsonl"))
    assert not model.asked
    (tmp_path / "other.jsonl").write_text("a shopping list\n")
    with pytest.raises(ValueError, match=r"other.jsonl, line 1: not a trial .* nothing was changed"):
        collect.Trials(tmp_path / "other.jsonl")


def test_the_pace_is_kept() -> None:
    """At 60,000 a minute the gap is a millisecond: after ten the eleventh's turn is ten gaps after the first's."""
    pace, begun = collect.Pace(60_000), time.monotonic()
    for _ in range(10):
        pace.wait()
    assert pace.next >= begun + 10 * 1e-3
    assert collect.Pace(0).gap == 0


def test_the_same_command_goes_on_in_the_log_and_a_folder_asked_for_is_about_the_last_time(tmp_path: Path) -> None:
    for name, data in (("q", QUERIES), ("p", PROMPTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    paths = [
        f"--{flag}={tmp_path / name}.jsonl" for flag, name in (("queries", "q"), ("prompts", "p"), ("trials", "t"))
    ]
    line = ["prompts", "collect", *paths, "--model=tiny", "--max-new-tokens=2", f"--out={tmp_path / 'run'}"]
    assert cli.main([*line, "--limit=2"]) == 0
    assert cli.main([*line, "--limit=3"]) == 0
    assert len(rows(tmp_path / "t.jsonl")) == 6
    assert json.loads((tmp_path / "run" / "result.json").read_text())["found"] == 4


def test_answers_that_are_cut_are_counted(tmp_path: Path) -> None:
    """The untrained model hardly ever ends within two tokens."""
    model = collect.Local(catalog.load("tiny"), Sampling(max_new_tokens=2))
    trials = collect.Trials(tmp_path / "trials.jsonl")
    found = collect.collect(model, collect.wanted(QUERIES, PROMPTS, 3), trials)
    cut = [not row["ended"] for row in rows(tmp_path / "trials.jsonl")]
    assert found["cut"] == sum(cut)
    assert sum(cut) > len(cut) / 2
