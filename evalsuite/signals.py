"""Signals to stop: whoever loops over work notes them, saves what it has and leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["SIGNALS", "Told", "ignore_signals", "signals"]

# SLURM's --signal and preemption send SIGUSR1 or SIGUSR2 some time before the end, a closed terminal SIGHUP.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
ALWAYS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Told:
    """The number of the signal that came, 0: none."""

    signal: int = 0


@contextmanager
def signals() -> Iterator[Told]:
    """Note a signal to stop, one of ``SIGNALS``, instead of dying in the middle of a step.

    SIGUSR1, SIGUSR2 and SIGHUP are left alone where they are ignored (``nohup``) or somebody else handles them
    (a launcher that requeues).
    """
    told = Told()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def note(number: int, frame: object) -> None:
        told.signal = number

    before = {number: handler for number in SIGNALS if _ours(number, handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, note)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ours(number: signal.Signals, handler: Any) -> bool:
    """Whether a signal may be taken from its handler; None is one outside Python, which could not be given back."""
    return handler is not None and (number in ALWAYS or handler is signal.SIG_DFL)


def ignore_signals(_: int = 0) -> None:
    """For data workers: a signal to the whole group is for the trainer, which still needs its data for the step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
