"""Calls a user's reward function and reads its answer; also the program a function given as `file.py:function` runs in.

As a program it reads one JSON request a line on its standard input and writes one JSON answer a line on what was its
standard output. It uses the standard library alone, so it starts in a few hundredths of a second and holds no model.
Whatever the function prints goes to standard error, and the process ends, with everything it started, as soon as its
parent is gone.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

Row = float | list[float] | str
"""What one response got: a number, a number a token, or (a string) the reason why there is no verdict."""


LARGEST = 3.4028234663852886e38  # of a 32-bit number, which is what scores are


class WrongAnswer(ValueError):
    """The function does not keep its contract: a wrong number of results, or no list at all."""


@dataclass(frozen=True)
class Wants:
    """Which arguments a function takes.

    Attributes:
        names: parameters that can be given by name.
        required: those of them without a default.
        everything: True if it takes `**columns`.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    everything: bool

    @staticmethod
    def of(function: Callable[..., Any]) -> Wants:
        """Read a function's signature."""
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return Wants(
            names=tuple(p.name for p in named),
            required=tuple(p.name for p in named if p.default is p.empty),
            everything=any(p.kind is p.VAR_KEYWORD for p in parameters),
        )


def call(function: Callable[..., Any], arguments: dict[str, list[Any]]) -> list[Row]:
    """Call the function on the rows and read one result a row.

    Raises:
        WrongAnswer: it returned something that is no list, or a list of another length.
        Exception: whatever the function raises.
    """
    rows = len(arguments["completions"])
    answer = function(**arguments)
    if isinstance(answer, (str, bytes, dict, set)) or not hasattr(answer, "__iter__"):
        raise WrongAnswer(
            f"returned a {type(answer).__name__}, not a list with one result for each of {rows} responses"
        )
    results = list(answer)
    if len(results) != rows:
        raise WrongAnswer(
            f"returned {len(results)} results for {rows} responses; each needs one (None where there is no verdict)"
        )
    return [read(result) for result in results]


def read(result: Any) -> Row:
    """One result as a finite number, a list of finite numbers, or the reason why it is neither."""
    if hasattr(result, "tolist"):  # an array or a tensor
        result = result.tolist()
    if isinstance(result, (list, tuple)):
        parts = []
        for t, part in enumerate(result):
            read_part = number(part)
            if isinstance(read_part, str):
                return f"{read_part} at response token {t}"
            parts.append(read_part)
        total = number(sum(parts))
        return total if isinstance(total, str) else parts
    return number(result)


def number(result: Any) -> float | str:
    """A finite number, or the reason why it is none."""
    if result is None:
        return "returned None"
    if isinstance(result, (str, bytes)):
        return f"returned text ({result[:40]!r}) where a number is asked for"
    try:
        value = float(result)
    except (TypeError, ValueError, OverflowError) as error:
        return f"returned a value of type {type(result).__name__}, which is no number ({error})"
    return value if abs(value) <= LARGEST else f"returned {value}, which is no finite 32-bit number"


def explain(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= 200 else line[:199] + "…"


def load(path: str, name: str) -> Callable[..., Any]:
    """The function `name` of the Python file `path`, which may import its neighbours as a program started there could.

    Raises:
        WrongAnswer: the file has no such function; the message lists those it has.
        Exception: whatever running the file raises.
    """
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    spec = importlib.util.spec_from_file_location("user_reward", path)
    if spec is None or spec.loader is None:
        raise WrongAnswer("is no Python file; a reward function is given as path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_reward"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        there = sorted(k for k, v in vars(module).items() if inspect.isfunction(v) and not k.startswith("_"))
        raise WrongAnswer(f"has no function {name!r}; it has {', '.join(there) or 'none'}")
    return function


def main() -> None:
    """Load the function named on the command line, say what it takes, then answer requests until the parent is gone."""
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    source = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the function's own prints must not mix with the answers,
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nor its input() eat a request
    threading.Thread(target=_listen, args=(source, requests), daemon=True).start()

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        function = load(sys.argv[1], sys.argv[2])
        answer({"wants": asdict(Wants.of(function))})
    except Exception as error:
        answer({"wrong": str(error) if isinstance(error, WrongAnswer) else f"cannot be loaded: {explain(error)}"})
        return
    while True:
        try:
            answer({"rows": call(function, json.loads(requests.get()))})
        except WrongAnswer as error:
            answer({"wrong": str(error)})
        except Exception as error:
            answer({"raised": explain(error)})


def _listen(source: Any, requests: queue.SimpleQueue[str]) -> None:
    """Pass requests on; when the parent is gone, end this process group even if the function hangs."""
    for line in source:
        requests.put(line)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
