"""Telling how far along we are: bars on a terminal, one line per interval elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Thread
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from evalsuite.errors import printable

__all__ = ["Meter", "Progress"]

PATIENCE = 1.5  # seconds without a word


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
        self._spoke, self._tracked = time.perf_counter(), 0
        self._inside: list[Event] = []

    def say(self, line: str) -> None:
        """One line of its own."""
        self._spoke = time.perf_counter()
        if not self.quiet:
            print(printable(line), file=self.stream, flush=True)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Something without steps to count, which is nearly always quick. Where nothing is said within it for longer
        than ``PATIENCE`` seconds, not by an activity that is tracked or done inside either, it is said what is being
        done, and again at every interval."""
        if self.quiet:
            yield
            return
        over = Event()
        self._inside.append(over)
        thread = Thread(target=self._speak, args=(what, over), name="doing", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._inside.remove(over)

    def _speak(self, what: str, over: Event) -> None:
        began, wait, again = time.perf_counter(), PATIENCE, False
        while not over.wait(0.1):
            now = time.perf_counter()
            if self._inside[-1:] == [over] and not self._tracked and now - max(began, self._spoke) >= wait:
                self.say(f"{what} ({_clock(now - began)})" if again else what)
                wait, again = max(PATIENCE, self.interval), True

    @contextmanager
    def track(self, what: str, total: int, done: int = 0) -> Iterator[Meter]:
        """Report an activity of ``total`` steps of which ``done`` were made before (a resumed run)."""
        self._tracked += 1
        try:
            yield from self._meter(what, total, done)
        finally:
            self._tracked -= 1
            self._spoke = time.perf_counter()

    def _meter(self, what: str, total: int, done: int) -> Iterator[Meter]:
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
