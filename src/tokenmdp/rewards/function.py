"""A user's plain function as a reward.

    f(completions, prompts, **columns) -> one number a response; or one number a response token; or None, "no verdict"

A function that returns NaN or infinity, raises, or runs over its time gives no verdict for that response: the row is
counted and leaves the loss, and it never becomes a silent 0. A call that fails is repeated row by row, so one bad row
does not cost the others.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from tokenmdp import mdp
from tokenmdp.rewards import worker
from tokenmdp.rewards.worker import Row, Wants
from tokenmdp.types import Batch, Score

LOAD_SECONDS = 300.0
"""How long a file may take to load (it may import large libraries)."""

OPTIONS = "on the command line they follow the name: --reward file.py:function:timeout_seconds=20,max_missing=0.9"
"""How a function's limits are given, for the errors that ask for others."""


class RewardFailure(ValueError):
    """Too many responses of one batch got no verdict: the function or its limits need a change."""


class NoAnswer(Exception):
    """One call gave nothing: it raised, ran over its time, or its process died. The message is the reason."""


class Runner(Protocol):
    """Where a function runs."""

    wants: Wants

    def __call__(self, arguments: dict[str, list[Any]], seconds: float) -> list[Row]: ...


class FunctionReward:
    """Judges a batch by calling `function(completions=..., prompts=..., **columns)`.

    Each argument is a list with one entry a row: `completions` the responses as text, `prompts` the prefixes as text,
    and every column of the prompts' data that the function names (all of them if it takes `**columns`; None where a row
    lacks one). A function that names them also gets `completion_ids` (the response's token ids) and `ended` (False
    where it was truncated). Results a token are aligned to `completion_ids`; the row's value is then their sum. Each
    row is judged by itself: after a failed call the function sees one row at a time.

    Given as `path/to/file.py:function` the function runs in a process of its own, which is killed and started again
    when a call runs over its time. Given as a Python callable it runs in a thread. Python cannot kill a thread: one
    that hangs goes on in the background, and one that never lets the interpreter go (a regular expression that
    backtracks for ever) stops the whole program. A function that may hang is better given by its file.

    Args:
        function: a callable, or `path/to/file.py:function`.
        name: for logs; the function's own name if not given.
        timeout_seconds: how long one call may take, be it for a batch or for a row. A batch that takes longer is judged
            row by row, and each row then has this time for itself: it is the limit of an item, and one that hangs loses
            its own verdict only.
        max_missing: the largest share of a batch that may lack a verdict, in [0, 1].

    Raises:
        ValueError: the function cannot be found, loaded or called like this, or an argument is outside its range.
    """

    def __init__(
        self,
        function: Callable[..., Any] | str,
        name: str | None = None,
        timeout_seconds: float = 10.0,
        max_missing: float = 0.5,
    ) -> None:
        if not timeout_seconds > 0 or not 0 <= max_missing <= 1:
            raise ValueError(
                f"timeout_seconds={timeout_seconds}, max_missing={max_missing}: the first must be positive, the second "
                f"a share between 0 and 1; {OPTIONS}"
            )
        self._call: Runner
        if isinstance(function, str):
            path, _, called = function.rpartition(":")
            self._call = InProcess(path, called)
        else:
            called = getattr(function, "__name__", type(function).__name__)
            self._call = InThread(function)
        self.name = name or called
        self.timeout_seconds, self.max_missing = timeout_seconds, max_missing
        if "completions" not in self._call.wants.names and not self._call.wants.everything:
            raise ValueError(
                f"reward function {self.name}({', '.join(self._call.wants.names)}) takes no argument called "
                "completions; write it as f(completions, prompts, **columns)"
            )

    def __call__(self, batch: Batch) -> Score:
        """Scores of a batch; why a row has no verdict is in `reasons`.

        Raises:
            RewardFailure: more than `max_missing` of the rows have no verdict.
            ValueError: the function asks for a column the data lacks, or returns a wrong number of results.
        """
        mdp.touch("reward")
        try:
            rows = self._judge(self._arguments(batch), len(batch))
        except worker.WrongAnswer as error:
            raise ValueError(f"reward function {self.name} {error}") from None
        reasons = [(b, row) for b, row in enumerate(rows) if isinstance(row, str)]
        if len(reasons) > self.max_missing * len(batch):
            first = "; ".join(f"row {b}: {reason}" for b, reason in reasons[:3])
            raise RewardFailure(
                f"reward {self.name} gave no verdict for {len(reasons)} of {len(rows)} responses (batch of "
                f"{len(batch)}, at most {self.max_missing:.0%} may lack one). {first}. Mend the function, or "
                f"allow more: timeout_seconds is {self.timeout_seconds:g}, max_missing {self.max_missing:g}; {OPTIONS}"
            )
        return self._score(batch, rows)

    def _arguments(self, batch: Batch) -> dict[str, list[Any]]:
        """The function's arguments, one entry a row."""
        wants = self._call.wants
        names = dict.fromkeys(itertools.chain.from_iterable(prompt.columns for prompt in batch.prompts))
        columns: dict[str, list[Any]] = {
            name: [prompt.columns.get(name) for prompt in batch.prompts]
            for name in names
            if wants.everything or name in wants.names
        }
        if "completion_ids" in wants.names:
            columns["completion_ids"] = [t[a].tolist() for t, a in zip(batch.tokens, batch.action, strict=True)]
        if "ended" in wants.names:
            columns["ended"] = batch.ended.tolist()
        columns["completions"] = list(batch.texts)
        if wants.everything or "prompts" in wants.names:
            columns["prompts"] = [prompt.text for prompt in batch.prompts]
        lacking = [name for name in wants.required if name not in columns]
        if lacking:
            raise ValueError(
                f"reward function {self.name} asks for {', '.join(lacking)}, which the data has not; its columns are: "
                f"{', '.join(names) or 'none'}"
            )
        return columns

    def _judge(self, arguments: dict[str, list[Any]], count: int) -> list[Row]:
        """One result a row. Fewer rows only if so many failed already that the batch is lost."""
        try:
            return self._call(arguments, self.timeout_seconds)
        except NoAnswer as failure:
            if count == 1:
                return [str(failure)]
        rows: list[Row] = []
        for b in range(count):
            try:
                rows += self._call(
                    {name: values[b : b + 1] for name, values in arguments.items()}, self.timeout_seconds
                )
            except NoAnswer as failure:
                rows.append(str(failure))
            if sum(isinstance(row, str) for row in rows) > self.max_missing * count:
                break
        return rows

    def _score(self, batch: Batch, rows: list[Row]) -> Score:
        """Rows as tensors."""
        given = [row for row in rows if not isinstance(row, str)]
        per_token = any(isinstance(row, list) for row in given)
        if per_token and not all(isinstance(row, list) for row in given):
            raise ValueError(
                f"reward function {self.name} returned a number for some responses and a list for others; choose one "
                "number a response or one a response token"
            )
        value = torch.zeros(len(batch))
        token = torch.zeros(batch.tokens.shape)
        for b, row in enumerate(rows):
            if isinstance(row, float):
                value[b] = row
            elif isinstance(row, list):
                chosen = batch.action[b].cpu()
                if len(row) != int(chosen.sum()):
                    raise ValueError(
                        f"reward function {self.name} returned {len(row)} token rewards for the {int(chosen.sum())} "
                        f"tokens of response {b}; there must be one for each of its completion_ids (the end-of-text "
                        "token is one)"
                    )
                token[b, chosen] = torch.tensor(row)
                value[b] = sum(row)
        verdict = torch.tensor([not isinstance(row, str) for row in rows])
        device = batch.tokens.device
        reasons = {b: row for b, row in enumerate(rows) if isinstance(row, str)}
        return Score(value.to(device), verdict.to(device), token.to(device) if per_token else None, reasons=reasons)


class InThread:
    """Calls a Python callable in a daemon thread, without gradients."""

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            self.wants = Wants.of(function)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{function!r} cannot be a reward function ({error}); write f(completions, prompts, **columns)"
            ) from None
        self.function = function

    def __call__(self, arguments: dict[str, list[Any]], seconds: float) -> list[Row]:
        outcome: list[list[Row] | BaseException] = []

        def work() -> None:
            try:
                with torch.no_grad():
                    # Copies: the function may change its lists, and the rows are needed again if it fails.
                    copies = {name: list(values) for name, values in arguments.items()}
                    outcome.append(worker.call(self.function, copies))
            except BaseException as error:  # also SystemExit, which would end the thread without a word
                outcome.append(error)

        thread = threading.Thread(target=work, daemon=True, name="reward")
        thread.start()
        thread.join(seconds)
        if not outcome:
            raise NoAnswer(
                f"no answer within {seconds:g} s; its thread cannot be killed and goes on (given as file.py:function, "
                "the function can)"
            )
        if isinstance(outcome[0], worker.WrongAnswer):
            raise outcome[0]
        if isinstance(outcome[0], BaseException):
            raise NoAnswer(worker.explain(outcome[0]))
        return outcome[0]


class InProcess:
    """Calls a function of a file in a process of its own, over pipes of JSON lines; kills it when it hangs."""

    def __init__(self, path: str, function: str) -> None:
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path!r}; a reward function is given as path/to/file.py:function")
        self.path, self.function = path, function
        self.wants = self._start()

    def __call__(self, arguments: dict[str, list[Any]], seconds: float) -> list[Row]:
        for name, values in arguments.items():
            for b, value in enumerate(values):
                _check_plain(name, b, value)
        if not self._stop.alive:
            self._start()
        answer = self._ask(json.dumps(arguments), seconds)
        if "raised" in answer:
            raise NoAnswer(answer["raised"])
        if "wrong" in answer:
            raise worker.WrongAnswer(answer["wrong"])
        rows: list[Row] = answer["rows"]
        return rows

    def _start(self) -> Wants:
        """Start the process and wait until it has loaded the file."""
        process = subprocess.Popen(
            [sys.executable, worker.__file__, self.path, self.function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # killed together with whatever it starts
        )
        self._process = process
        self._stop = weakref.finalize(self, _end, process)
        try:
            answer = self._ask(None, LOAD_SECONDS)
        except NoAnswer as failure:
            raise ValueError(f"{self.path} did not load: {failure}") from None
        if "wrong" in answer:
            self._stop()
            raise ValueError(f"{self.path} {answer['wrong']}{self._suggestion(answer['wrong'])}")
        wants = answer["wants"]
        return Wants(tuple(wants["names"]), tuple(wants["required"]), wants["everything"])

    def _suggestion(self, message: str) -> str:
        close = difflib.get_close_matches(self.function, message.partition("; it has ")[2].split(", "), n=1)
        return f"; did you mean {close[0]}?" if close else ""

    def _ask(self, request: str | None, seconds: float) -> dict[str, Any]:
        """Send a line, wait for a line; ends the process if none comes in time."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # both are pipes
        assert stdout is not None
        deadline, received = time.monotonic() + seconds, b""
        try:
            if request is not None:
                stdin.write(request.encode() + b"\n")
                stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(stdout, selectors.EVENT_READ)
                while not received.endswith(b"\n"):
                    if not selector.select(max(0.0, deadline - time.monotonic())):
                        self._stop()
                        raise NoAnswer(f"no answer within {seconds:g} s; its process was killed")
                    part = os.read(stdout.fileno(), 1 << 16)
                    if not part:
                        raise BrokenPipeError
                    received += part
        except BrokenPipeError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self._stop()
            raise NoAnswer(f"its process ended with exit code {self._process.returncode}") from None
        answer: dict[str, Any] = json.loads(received)
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a function's process and everything it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()  # it is gone already
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _check_plain(name: str, row: int, value: Any) -> None:
    """Refuse what JSON cannot carry to the other process unchanged."""
    if isinstance(value, (list, tuple)):
        for part in value:
            _check_plain(name, row, part)
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for part in value.values():
            _check_plain(name, row, part)
    elif value is not None and not isinstance(value, (str, int, float, bool)):
        raise ValueError(
            f"column {name} of row {row} holds a {type(value).__name__}, which cannot be sent to the function's "
            "process; have the function not ask for it, turn it into text or numbers, or give the function "
            "as a Python callable"
        )
