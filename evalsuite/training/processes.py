"""Abort all processes of a run when one fails."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from evalsuite.errors import Refusal, TrainingError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["together"]

POLL = 0.2  # seconds between two checks of whether another process has failed
GRACE = 5.0  # seconds a process has to exit by itself: one that waits for another in a collective never does


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """Abort all processes when one fails within the block; all exit with its code.

    The one that failed raises its own error. The others, which may be blocked in a collective, raise a
    :class:`TrainingError` that names it, or, where they cannot be interrupted, exit after ``GRACE`` seconds with the
    same message on standard error. With one process nothing is done. Leaving by a signal (SystemExit) is no failure.
    """
    if fabric.world_size == 1:
        yield
        return
    watchdog = _Watchdog(fabric)
    try:
        yield
        fabric.barrier()  # until here another one may fail
    except Exception as error:
        if isinstance(error, Refusal):
            watchdog.report(error)
            raise
        failure = watchdog.report(error)
        if failure["rank"] == fabric.global_rank:
            raise
        raise _stopped_by(failure) from error
    finally:
        watchdog.close()


class _Watchdog:
    """A thread that polls a key-value store for the failure of another process, and ends this one where it must.

    The store lives in the first process, which therefore exits only after all others have read the failure; these wait
    until it has, for some launchers kill the remaining processes when one of theirs ends.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.rank, self.world = fabric.global_rank, fabric.world_size
        self.store: Any
        if self.rank == 0:
            self.store = _store(0, self.world, True)
            fabric.broadcast(self.store.port)
        else:
            self.store = _store(fabric.broadcast(0), self.world, False)
        self.failure: dict[str, Any] = {}
        self.exiting = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="together", daemon=True)
        self.thread.start()

    def report(self, error: Exception) -> dict[str, Any]:
        """Report a failure to the others and return the first one reported, once no other process needs this one."""
        problem = error.problem if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
        mine = {"rank": self.rank, "problem": problem, "code": error.code if isinstance(error, Refusal) else 1}
        try:
            first = self.failure or json.loads(self.store.compare_set("failed", "", json.dumps(mine)))
        except RuntimeError:  # the store is gone, and the first process with it
            first = self.failure or (self._first_is_gone() if self.rank else mine)
        self.exiting.set()
        self._exit_in_order()
        return dict(first)

    def _exit_in_order(self) -> None:
        """Return in order, or after a time limit: the first process once the others have read, these once it exits."""
        try:
            if self.rank == 0:
                self._wait([f"read by {rank}" for rank in range(1, self.world)])
                self._announce_exit()
            else:
                self.store.set(f"read by {self.rank}", "")
                self._wait(["leaving"])
                time.sleep(10 * POLL)
        except RuntimeError:  # the first process is gone
            return

    def _announce_exit(self) -> None:
        """The others stop using the store once its process announces its exit."""
        self.store.set("leaving", "")
        time.sleep(2 * POLL)

    def _wait(self, keys: list[str]) -> None:
        until = time.monotonic() + 2 * GRACE
        while time.monotonic() < until and not self.store.check(keys):
            time.sleep(POLL)

    def close(self) -> None:
        self.exiting.set()
        self.thread.join()
        self.store = None

    def _watch(self) -> None:
        while not self.failure:
            try:
                if self.store.check(["failed"]):
                    self.failure = json.loads(self.store.get("failed"))
                    self.store.set(f"read by {self.rank}", "")
            except RuntimeError:
                self.failure = self.failure or self._first_is_gone()
            if not self.failure and self.exiting.wait(POLL):
                return
        if not self.exiting.wait(GRACE):
            error = _stopped_by(self.failure)
            print(error, file=sys.stderr, flush=True)
            if self.rank == 0:
                self._announce_exit()
            os._exit(error.code)

    @staticmethod
    def _first_is_gone() -> dict[str, Any]:
        return {"rank": 0, "problem": "it is gone", "code": 1}


def _store(port: int, world: int, host: bool) -> Any:
    """A key-value store, hosted by this process or another; port 0 is any free one."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    return dist.TCPStore(address, port, world, host, timedelta(seconds=60), wait_for_workers=False)  # type: ignore[attr-defined]


def _stopped_by(failure: dict[str, Any]) -> TrainingError:
    error = TrainingError(
        f"process {failure['rank']} has failed, and this one stops with it",
        cause=failure["problem"],
        fix="see what that process says; the last good state is kept and the same command goes on from it",
    )
    error.code = failure["code"]
    return error
