"""What a run shows while it works: bars with the time left, and lines."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


def clock(seconds: float) -> str:
    """A duration as people read it: 0:07, 12:10, 1:02:03."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


class Bar:
    """One bar of the display: `advance` moves it; it goes when it is full or its `with` block ends."""

    def __init__(self, screen: Screen, total: int, title: str, unit: str, done: int = 0) -> None:
        self.total, self.title, self.unit, self.done, self.headline = total, title, unit, done, ""
        self._screen, self._first, self._born, self._moved = screen, done, time.monotonic(), time.monotonic()

    def __enter__(self) -> Self:
        self._screen.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.remove(self)

    def advance(self, k: int = 1) -> None:
        """Count `k` more units as done."""
        self.done, self._moved = self.done + k, time.monotonic()
        self._screen.moved(self)

    def __str__(self) -> str:
        parts = [f"{self.done}/{self.total} {self.unit}".rstrip()]
        if self.done > self._first:
            each = (self._moved - self._born) / (self.done - self._first)
            parts.append(f"{clock(each * (self.total - self.done) - (time.monotonic() - self._moved))} left")
        return "  ".join([*parts, self.headline] if self.headline else parts)


class Screen:
    """The bars of a run and its stages: live on a terminal, a plain line every 15 seconds elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars: dict[Bar, TaskID] = {}
        self._spoke = time.monotonic()
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            TextColumn("{task.fields[bar]}", markup=False),
            console=self._console,
            transient=True,
            refresh_per_second=2,
            # A live display sends what is printed to its own stream, stderr: a piped stdout must stay as it is.
            redirect_stdout=sys.stdout.isatty(),
        )

    def add(self, bar: Bar) -> None:
        """Show a bar below those that are there."""
        if bar not in self._bars:
            self._bars[bar] = self._live.add_task(bar.title, total=bar.total, completed=bar.done, bar=bar)
        if self._console.is_interactive:
            self._live.start()

    def moved(self, bar: Bar) -> None:
        """Bring a bar up to date; one that is full goes."""
        if bar.done >= bar.total:
            self.remove(bar)
            return
        self.add(bar)
        self._live.update(self._bars[bar], completed=bar.done, total=bar.total)
        if not self._console.is_interactive and time.monotonic() - self._spoke > 15.0:
            self.say(" | ".join(f"{b.title}: {b}" for b in self._bars))

    def remove(self, bar: Bar) -> None:
        """Take a bar away; the display ends with its last bar."""
        if (task := self._bars.pop(bar, None)) is not None:
            self._live.remove_task(task)
        if not self._bars and self._console.is_interactive:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars, as it is."""
        self._spoke = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take every bar away."""
        for bar in list(self._bars):
            self.remove(bar)
