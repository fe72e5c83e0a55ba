from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tokenmdp.rewards import worker
from tokenmdp.rewards.function import FunctionReward, RewardFailure
from tokenmdp.types import Batch, Prompt

WHY = ", which is no finite 32-bit number"
LIMIT = 2.0  # seconds; long beside what these functions take, short beside a hang


def make_batch(texts: list[str], **columns: list[object]) -> Batch:
    """Responses of one token a character behind the prefix "ab"."""
    prompts = [
        Prompt(ids=(1, 2), text=f"ab{i}", row=i, columns={k: v[i] for k, v in columns.items()})
        for i in range(len(texts))
    ]
    return Batch.build(prompts, [[ord(c) for c in t] for t in texts], texts=texts, ended=[True] * len(texts))


def in_file(folder: Path, source: str, function: str = "judge") -> str:
    path = folder / "rewards_of_mine.py"
    path.write_text(source)
    return f"{path}:{function}"


def test_zero_is_a_score_and_missing_is_not():
    given = [0.0, None, math.nan, math.inf, -2.0, 1]
    reward = FunctionReward(lambda completions, prompts: given, name="mixed")
    score = reward(make_batch(["a"] * 6))
    assert score.verdict.tolist() == [True, False, False, False, True, True]
    assert score.value.tolist() == [0.0, 0.0, 0.0, 0.0, -2.0, 1.0]
    assert dict(score.reasons) == {1: "returned None", 2: f"returned nan{WHY}", 3: f"returned inf{WHY}"}


def test_a_lambda_that_no_process_could_receive_is_fine():
    secret = threading.Lock()  # cannot be sent to another process
    reward = FunctionReward(lambda completions, prompts: [float(len(c)) for c in completions if not secret.locked()])
    assert reward.name == "<lambda>"
    assert reward(make_batch(["a", "bcd"])).value.tolist() == [1.0, 3.0]


def test_columns_arrive_aligned_to_rows_and_only_those_asked_for():
    seen = {}

    def judge(completions, prompts, answer, completion_ids, ended, level=None):
        seen.update(locals())
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    b = make_batch(["x", "yy", "z"], answer=["x", "no", "z"], other=[1, 2, 3])
    assert FunctionReward(judge)(b.select([2, 0, 1])).value.tolist() == [1.0, 1.0, 0.0]
    assert seen["prompts"] == ["ab2", "ab0", "ab1"]
    assert seen["answer"] == ["z", "x", "no"]
    assert seen["completion_ids"] == [[ord("z")], [ord("x")], [ord("y")] * 2]
    assert seen["ended"] == [True, True, True]
    assert seen["level"] is None

    everything = {}
    FunctionReward(lambda completions, **columns: everything.update(columns) or [1.0] * 3)(b)
    assert everything == {"prompts": ["ab0", "ab1", "ab2"], "answer": ["x", "no", "z"], "other": [1, 2, 3]}


def test_a_column_that_a_row_lacks_is_none():
    prompts = [Prompt((1,), "a", 0, {"answer": "x"}), Prompt((1,), "b", 1)]
    b = Batch.build(prompts, [[5], [6]], texts=["x", "y"], ended=[True, True])
    reward = FunctionReward(lambda completions, answer: [None if a is None else 1.0 for a in answer])
    assert reward(b).verdict.tolist() == [True, False]


def test_one_row_that_raises_does_not_cost_the_others():
    def judge(completions, prompts):
        return [1 / len(c.strip("x")) for c in completions]

    reward = FunctionReward(judge)
    score = reward(make_batch(["ab", "xx", "abcd"]))
    assert score.verdict.tolist() == [True, False, True]
    assert score.value.tolist() == [0.5, 0.0, 0.25]
    assert dict(score.reasons) == {1: "ZeroDivisionError: division by zero"}


def test_text_and_odd_objects_give_no_verdict():
    reward = FunctionReward(lambda completions: ["0.5", object(), 10**400, 1.0], max_missing=0.75)
    score = reward(make_batch(["a"] * 4))
    assert score.verdict.tolist() == [False, False, False, True]
    assert [r.split(" (")[0] for r in score.reasons.values()] == [
        "returned text",
        "returned a value of type object, which is no number",
        "returned a value of type int, which is no number",
    ]


def test_a_number_that_scores_cannot_hold_gives_no_verdict():
    reward = FunctionReward(lambda completions: [1e39, 1.0, 3.4e38])
    assert reward(make_batch(["a"] * 3)).verdict.tolist() == [False, True, True]
    reward = FunctionReward(lambda completions: [[3e38, 3e38], [1.0]])
    assert reward(make_batch(["ab", "c"])).verdict.tolist() == [False, True]


def test_a_function_that_changes_its_lists_and_fails_is_repeated_on_the_true_ones():
    def judge(completions):
        first = completions.pop()
        return [float(len(first))] if not completions else 1 / 0

    assert FunctionReward(judge)(make_batch(["a", "bcd"])).value.tolist() == [1.0, 3.0]


def test_tensors_are_lists_too():
    reward = FunctionReward(lambda completions: torch.tensor([0.5, math.nan, 2.0]))
    score = reward(make_batch(["a"] * 3))
    assert score.value.tolist() == [0.5, 0.0, 2.0]
    assert score.verdict.tolist() == [True, False, True]


def test_rewards_a_token_land_on_their_tokens():
    reward = FunctionReward(lambda completions: [[1.0, 2.0], [0.5], [math.nan, 1.0, 1.0]])
    score = reward(make_batch(["ab", "c", "def"]))
    assert score.token is not None
    assert score.token.tolist() == [[0, 0, 1.0, 2.0, 0], [0, 0, 0.5, 0, 0], [0, 0, 0, 0, 0]]
    assert score.value.tolist() == [3.0, 0.5, 0.0]
    assert dict(score.reasons) == {2: f"returned nan{WHY} at response token 0"}


def test_a_wrong_number_of_results_is_an_error_at_once():
    with pytest.raises(ValueError, match="returned 2 results for 3 responses"):
        FunctionReward(lambda completions: [1.0, 2.0])(make_batch(["a"] * 3))
    with pytest.raises(ValueError, match="returned a float, not a list"):
        FunctionReward(lambda completions: 1.0)(make_batch(["a"] * 3))
    with pytest.raises(ValueError, match=r"returned 3 token rewards for the 2 tokens of response 0"):
        FunctionReward(lambda completions: [[1.0] * 3])(make_batch(["ab"]))
    with pytest.raises(ValueError, match="a number for some responses and a list for others"):
        FunctionReward(lambda completions: [1.0, [1.0]])(make_batch(["a", "b"]))


def test_too_many_missing_stop_with_counts_reasons_and_remedy():
    reward = FunctionReward(lambda completions: [None, None, None, 1.0], name="shy")
    with pytest.raises(
        RewardFailure, match=r"shy gave no verdict for 3 of 4 .* row 0: returned None; row 1: .*max_missing 0.5"
    ):
        reward(make_batch(["a"] * 4))
    assert FunctionReward(lambda completions: [None, 1.0])(make_batch(["a"] * 2)).verdict.tolist() == [False, True]


def test_a_function_that_always_raises_is_given_up_early():
    calls = []

    def judge(completions):
        calls.append(len(completions))
        raise KeyError("no")

    with pytest.raises(RewardFailure, match=r"3 of 3 responses \(batch of 4"):
        FunctionReward(judge)(make_batch(["a"] * 4))
    assert calls == [4, 1, 1, 1]


def test_a_hanging_callable_loses_only_its_row():
    release = threading.Event()

    def judge(completions):
        if "h" in completions:
            release.wait()
        return [1.0] * len(completions)

    reward = FunctionReward(judge, timeout_seconds=LIMIT)
    try:
        score = reward(make_batch(["a", "h", "b"]))
    finally:
        release.set()
    assert score.verdict.tolist() == [True, False, True]
    assert "cannot be killed" in score.reasons[1]


def test_the_limit_is_an_items_own():
    """Each row takes a fraction of the limit and all together take more: each gets its verdict, row by row."""

    def judge(completions):
        for _ in completions:
            time.sleep(0.4 * LIMIT)
        return [1.0] * len(completions)

    reward = FunctionReward(judge, timeout_seconds=LIMIT)
    assert bool(reward(make_batch(["a", "b", "c"])).verdict.all())


def test_signature_and_settings_are_checked_before_the_run():
    def judge(texts):
        return texts

    with pytest.raises(ValueError, match=r"judge\(texts\) takes no argument called completions"):
        FunctionReward(judge)
    with pytest.raises(ValueError, match="asks for answer, which the data has not; its columns are: label"):
        FunctionReward(lambda completions, answer: [1.0])(make_batch(["a"], label=[1]))
    with pytest.raises(ValueError, match="timeout_seconds=0"):
        FunctionReward(lambda completions: [1.0], timeout_seconds=0)
    with pytest.raises(ValueError, match="max_missing=2"):
        FunctionReward(lambda completions: [1.0], max_missing=2)


# -- functions given as file.py:function ---------------------------------------------------------------------------


def test_a_function_of_a_file_gets_columns_and_may_print_and_import_its_neighbour(tmp_path: Path, capfd):
    (tmp_path / "neighbour.py").write_text("BONUS = 10\n")
    spec = in_file(
        tmp_path,
        "import neighbour\n"
        "def judge(completions, prompts, answer, **rest):\n"
        "    print('thinking', completions, sorted(rest))\n"
        "    return [neighbour.BONUS * (c == a) for c, a in zip(completions, answer)]\n",
    )
    reward = FunctionReward(spec)
    assert reward.name == "judge"
    score = reward(make_batch(["é", "b", "c"], answer=["é", "x", "c"], level=[[1], {"a": None}, 2.5]))
    assert score.value.tolist() == [10.0, 0.0, 10.0]
    assert bool(score.verdict.all())
    assert "thinking ['é', 'b', 'c'] ['level']" in capfd.readouterr().err


def test_a_hanging_function_of_a_file_is_killed_with_all_it_started_and_the_run_goes_on(tmp_path: Path):
    spec = in_file(
        tmp_path,
        "import os, re, subprocess\n"
        "def judge(completions, prompts):\n"
        "    if 'hang' in completions:\n"
        "        child = subprocess.Popen(['sleep', '600'])\n"
        f"        open({str(tmp_path / 'pids')!r}, 'a').write(f'{{os.getpid()}} {{child.pid}} ')\n"
        "        re.match('(a+)+$', 'a' * 60 + 'b')\n"  # backtracks for ever, holding the interpreter
        "    return [float(len(c)) for c in completions]\n",
    )
    reward = FunctionReward(spec, timeout_seconds=LIMIT)
    score = reward(make_batch(["a", "hang", "bcd"]))
    assert score.verdict.tolist() == [True, False, True]
    assert score.value.tolist() == [1.0, 0.0, 3.0]
    assert dict(score.reasons) == {1: "no answer within 2 s; its process was killed"}
    assert reward(make_batch(["ab"])).value.tolist() == [2.0]
    started = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(started) == 4  # the batch, then the row; each with a child of its own
    assert not any(alive(pid) for pid in started)


def alive(pid: int) -> bool:
    """False as soon as the process is gone or only waits to be reaped."""
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if Path("/proc/self").exists():
            try:
                if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                    return False
            except (FileNotFoundError, ProcessLookupError):
                return False
        else:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return False
        time.sleep(0.05)
    return True


def test_the_process_ends_with_its_parent_even_while_it_hangs(tmp_path: Path):
    path, function = in_file(tmp_path, "def judge(completions):\n    while True: pass\n").rsplit(":", 1)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, worker.__file__, path, function], stdin=pipe, stdout=pipe, start_new_session=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline().startswith(b'{"wants"')
        child.stdin.write(b'{"completions": ["a"]}\n')
        child.stdin.close()  # what happens to a pipe whose other end was killed
        assert child.wait(30) == -signal.SIGKILL


def test_a_function_that_ends_its_process_loses_only_its_row(tmp_path: Path):
    spec = in_file(
        tmp_path,
        "import os\n"
        "def judge(completions):\n"
        "    if 'crash' in completions: os._exit(3)\n"
        "    if 'bad' in completions: raise ValueError('two\\nlines')\n"
        "    return [[1.0] * len(c) for c in completions]\n",
    )
    reward = FunctionReward(spec)
    score = reward(make_batch(["ab", "crash", "bad", "c"]))
    assert score.verdict.tolist() == [True, False, False, True]
    assert score.value.tolist() == [2.0, 0.0, 0.0, 1.0]
    assert dict(score.reasons) == {1: "its process ended with exit code 3", 2: "ValueError: two lines"}


def test_a_file_without_the_function_says_what_it_has(tmp_path: Path):
    source = "def length(completions): return [1.0]\ndef _hidden(): return 1\n"
    with pytest.raises(ValueError, match=r"has no function 'lenght'; it has length; did you mean length\?"):
        FunctionReward(in_file(tmp_path, source, "lenght"))
    with pytest.raises(ValueError, match=r"cannot be loaded: SyntaxError"):
        FunctionReward(in_file(tmp_path, "def judge(:\n"))
    with pytest.raises(ValueError, match=r"did not load: its process ended with exit code 4"):
        FunctionReward(in_file(tmp_path, "raise SystemExit(4)\n"))
    with pytest.raises(ValueError, match=r"there is no file '.*none.py'"):
        FunctionReward(f"{tmp_path}/none.py:judge")
    with pytest.raises(ValueError, match=r"judge returned 1 results for 2 responses"):
        FunctionReward(in_file(tmp_path, "def judge(completions): return [1.0]\n"))(make_batch(["a", "b"]))


def test_a_column_that_json_would_change_is_refused(tmp_path: Path):
    reward = FunctionReward(in_file(tmp_path, "def judge(completions, thing): return [1.0]\n"))
    with pytest.raises(ValueError, match="column thing of row 0 holds a complex"):
        reward(make_batch(["a"], thing=[1j]))
