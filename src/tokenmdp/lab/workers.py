"""Work in processes of one thread each: orders go out a line at a time, answers come back a line at a time.

A worker ends as soon as its parent is gone, however that came about, so that whoever goes on with the work finds nobody
else at it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch

BROKEN = "!"  # begins the answer of a worker that gives up


def employ(line: Sequence[str], orders: Sequence[str], workers: int, heard: Callable[[str, str], None]) -> None:
    """Have every order done by one of some processes.

    Args:
        line: the command that a worker is; it calls `serve`.
        orders: one line each; who is free takes the next.
        workers: how many processes.
        heard: called with an order and its answer as each comes in, from several threads.

    Raises:
        RuntimeError: a worker broke off; orders that were not begun are not done.
    """
    todo = deque(orders)

    def manage(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        while todo:
            order = todo.popleft()
            process.stdin.write(order + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer or answer.startswith(BROKEN):
                todo.clear()
                raise RuntimeError(f"the worker that did {order} broke off: {answer[1:].strip() or 'no answer'}")
            heard(order, answer)

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


def serve(hired: Callable[[], Callable[[str], str]]) -> None:
    """Be a worker: do what comes in on standard input until nobody is there any more.

    Args:
        hired: makes ready, and returns what turns an order into an answer of one line.
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
            print(answer(orders.get()), file=out, flush=True)
    except Exception as fault:
        print(f"{BROKEN}{fault!r}".replace("\n", " "), file=out, flush=True)
