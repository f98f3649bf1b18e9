"""Several processes of one run stand and fall together."""

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

POLL = 0.2  # seconds between two looks at whether another process has failed
GRACE = 5.0  # seconds a process has to leave by itself: one that waits for another in a collective never does


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """Where one of several processes fails within the block, all of them leave it, with its exit code.

    The one that failed raises its own error. The others, which may wait for it in a collective without end, raise a
    :class:`TrainingError` that names it, or, where they cannot be woken, end after ``GRACE`` seconds with the same
    words on standard error. With one process nothing is done. Leaving by a signal (SystemExit) is no failure.
    """
    if fabric.world_size == 1:
        yield
        return
    lookout = _Lookout(fabric)
    try:
        yield
        fabric.barrier()  # until here another one may fail
    except Exception as error:
        if isinstance(error, Refusal):
            lookout.tell(error)
            raise
        told = lookout.tell(error)
        if told["rank"] == fabric.global_rank:
            raise
        raise _stopped_by(told) from error
    finally:
        lookout.close()


class _Lookout:
    """A thread that hears when another process fails, over a store of its own, and ends this one if it must.

    The store lives in the first process, which therefore waits with leaving until all others have heard; these wait
    until it has left, for some launchers kill what is left when one of their processes ends.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.rank, self.world = fabric.global_rank, fabric.world_size
        self.store: Any
        if self.rank == 0:
            self.store = _store(0, self.world, True)
            fabric.broadcast(self.store.port)
        else:
            self.store = _store(fabric.broadcast(0), self.world, False)
        self.told: dict[str, Any] = {}
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="together", daemon=True)
        self.thread.start()

    def tell(self, error: Exception) -> dict[str, Any]:
        """Tell the others; what was told first comes back, and only once nobody depends on this process."""
        problem = error.problem if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
        mine = {"rank": self.rank, "problem": problem, "code": error.code if isinstance(error, Refusal) else 1}
        try:
            first = self.told or json.loads(self.store.compare_set("failed", "", json.dumps(mine)))
        except RuntimeError:  # the store is gone, and the first process with it
            first = self.told or (self._gone() if self.rank else mine)
        self.left.set()
        self._linger()
        return dict(first)

    def _linger(self) -> None:
        """Leave in order: the first process once the others have heard, these once it leaves; or late."""
        try:
            if self.rank == 0:
                self._wait([f"heard by {rank}" for rank in range(1, self.world)])
                self._leave()
            else:
                self.store.set(f"heard by {self.rank}", "")
                self._wait(["leaving"])
                time.sleep(10 * POLL)
        except RuntimeError:  # the first process is gone
            return

    def _leave(self) -> None:
        """Nobody asks the store any more once it is said that it goes."""
        self.store.set("leaving", "")
        time.sleep(2 * POLL)

    def _wait(self, keys: list[str]) -> None:
        until = time.monotonic() + 2 * GRACE
        while time.monotonic() < until and not self.store.check(keys):
            time.sleep(POLL)

    def close(self) -> None:
        self.left.set()
        self.thread.join()
        self.store = None

    def _watch(self) -> None:
        while not self.told:
            try:
                if self.store.check(["failed"]):
                    self.told = json.loads(self.store.get("failed"))
                    self.store.set(f"heard by {self.rank}", "")
            except RuntimeError:
                self.told = self.told or self._gone()
            if not self.told and self.left.wait(POLL):
                return
        if not self.left.wait(GRACE):
            error = _stopped_by(self.told)
            print(error, file=sys.stderr, flush=True)
            if self.rank == 0:
                self._leave()
            os._exit(error.code)

    @staticmethod
    def _gone() -> dict[str, Any]:
        return {"rank": 0, "problem": "it is gone", "code": 1}


def _store(port: int, world: int, host: bool) -> Any:
    """Keys and values in the process that is their host, at whatever port is free where ``port`` is 0."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    return dist.TCPStore(address, port, world, host, timedelta(seconds=60), wait_for_workers=False)  # type: ignore[attr-defined]


def _stopped_by(told: dict[str, Any]) -> TrainingError:
    error = TrainingError(
        f"process {told['rank']} has failed, and this one stops with it",
        cause=told["problem"],
        fix="see what that process says; the last good state is kept and the same command goes on from it",
    )
    error.code = told["code"]
    return error
