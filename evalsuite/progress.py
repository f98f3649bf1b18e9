"""Telling how far along we are: bars on a terminal, one line per interval elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

__all__ = ["Meter", "Progress"]


class Meter:
    """One running activity; ``update`` says how much is done, with numbers to show beside it."""

    def update(self, done: int, **numbers: float) -> None:
        """``done`` of the total so far; ``numbers`` (losses, rates) are shown in compact form."""


class Progress:
    """Where activities report. ``Progress()`` writes to standard error; ``Progress(quiet=True)`` says nothing.

    On a terminal each activity is a bar. Elsewhere (a log file, a batch job) it is one line at the start, one
    every ``interval`` seconds and one at the end, so that logs stay small.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None, interval: float = 30.0) -> None:
        self.stream = stream or sys.stderr
        self.quiet, self.interval = quiet, interval
        self.terminal = not quiet and self.stream.isatty()

    def say(self, line: str) -> None:
        """One line of its own."""
        if not self.quiet:
            print(line, file=self.stream, flush=True)

    @contextmanager
    def track(self, what: str, total: int, done: int = 0) -> Iterator[Meter]:
        """Report an activity of ``total`` steps of which ``done`` were made before (a resumed run)."""
        if self.quiet:
            yield Meter()
        elif self.terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            console = Console(file=self.stream)
            with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=False) as bars:
                yield _BarMeter(bars, what, total, done)
        else:
            meter = _LineMeter(self, what, total, done)
            yield meter
            meter.end()


class _BarMeter(Meter):
    def __init__(self, bars: Bars, what: str, total: int, done: int) -> None:
        self.bars = bars
        self.task = bars.add_task(what, total=total, completed=done, numbers="")

    def update(self, done: int, **numbers: float) -> None:
        self.bars.update(self.task, completed=done, numbers=_compact(numbers))


class _LineMeter(Meter):
    def __init__(self, progress: Progress, what: str, total: int, done: int) -> None:
        self.progress, self.what, self.total, self.first = progress, what, total, done
        self.done, self.numbers = done, ""
        self.start = self.spoke = time.monotonic()
        progress.say(f"{what}: {done}/{total}")

    def update(self, done: int, **numbers: float) -> None:
        self.done, self.numbers = done, _compact(numbers)
        now = time.monotonic()
        if now - self.spoke >= self.progress.interval and done < self.total:
            self.spoke = now
            left = (now - self.start) / max(done - self.first, 1) * (self.total - done)
            self.progress.say(f"{self.what}: {done}/{self.total} {self.numbers} eta {_clock(left)}")

    def end(self) -> None:
        took = _clock(time.monotonic() - self.start)
        self.progress.say(" ".join(f"{self.what}: {self.done}/{self.total} {self.numbers} in {took}".split()))


def _compact(numbers: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
