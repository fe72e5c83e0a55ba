"""Work in processes of one thread each: orders go out a line of JSON at a time, results come back so.

A worker ends as soon as its parent is gone, however that came about, so that whoever goes on with the work finds nobody
else at it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from tokenmdp.run import Run

BROKEN = "!"  # begins the answer of a worker that gives up


def conduct(
    run: Run,
    title: str,
    orders: Sequence[Any],
    name: Callable[[Any], str],
    do: Callable[[Any], Any],
    line: Sequence[str],
    workers: int,
    said: Callable[[Any], str],
) -> None:
    """Do what is not done yet: every order whose folder has no result.

    Args:
        orders: each as JSON has it.
        name: an order's folder in the run's.
        do: does one order here, where there is one worker.
        line: the command that a worker is, where there are several; it calls `serve`.
        said: an order's result in a few words, for the run's notes.
    """
    pending = [order for order in orders if not (run.folder / name(order) / "result.json").exists()]
    if not pending:
        return
    with run.progress(len(pending), title, "runs") as bar:

        def heard(order: Any, result: Any) -> None:
            run.note(f"{name(order)}: {said(result)}")
            bar.advance()

        if workers > 1:
            employ(line, pending, workers, heard)
        else:
            for order in pending:
                heard(order, do(order))


def run_of(folder: Path) -> Run:
    """The run that a worker has a share in; its folder is locked by whoever employs it."""
    header = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Run(folder, header["config"], header["seed"], "", None)


def employ(line: Sequence[str], orders: Sequence[Any], workers: int, heard: Callable[[Any, Any], None]) -> None:
    """Have every order done by one of some processes.

    Args:
        line: the command that a worker is; it calls `serve`.
        orders: each as JSON has it; who is free takes the next.
        workers: how many processes.
        heard: called with an order and its result as each comes in, from several threads.

    Raises:
        RuntimeError: a worker broke off; orders that were not begun are not done.
    """
    todo = deque(orders)

    def manage(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        while todo:
            order = todo.popleft()
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer or answer.startswith(BROKEN):
                todo.clear()
                raise RuntimeError(f"the worker that did {order} broke off: {answer[1:].strip() or 'no answer'}")
            heard(order, json.loads(answer))

    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(min(workers, len(orders))):
            process = subprocess.Popen(
                list(line),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        with ThreadPoolExecutor(len(processes)) as pool:
            for ended in [pool.submit(manage, process) for process in processes]:
                ended.result()


def serve(hired: Callable[[], Callable[[Any], Any]]) -> None:
    """Be a worker: do what comes in on standard input until nobody is there any more.

    Args:
        hired: makes ready, and returns what turns an order into a result.
    """
    orders: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            orders.put(line.rstrip("\n"))
        os._exit(1)  # the parent is gone; whatever is half done is left as a kill would leave it

    threading.Thread(target=listen, daemon=True).start()
    torch.set_num_threads(1)
    out, sys.stdout = sys.stdout, sys.stderr  # what the work itself prints must not look like an answer
    try:
        answer = hired()
        while True:
            print(json.dumps(answer(json.loads(orders.get()))), file=out, flush=True)
    except Exception as fault:
        print(f"{BROKEN}{fault!r}".replace("\n", " "), file=out, flush=True)
