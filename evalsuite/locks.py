"""One process at a time: a lock that the kernel frees with its process, and a note of who holds it.

The lock is the kernel's on a file (``flock``), so that it is free again however its process ended. The file holds who
has it, and is removed by whoever leaves in order. One that is there and free tells of a process that was killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from evalsuite.errors import ResourceError
from evalsuite.files import room_for
from evalsuite.progress import Progress

__all__ = ["RANKS", "Holder", "holder", "locked", "refuse_held", "remove_empty"]

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # of a file system without locks
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # who starts several processes says which is which in one of these
POLL = 0.2  # seconds between two tries


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock, or did. ``pid`` 0: nobody knows."""

    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=platform.node)
    since: str = field(default_factory=_now)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}" if self.pid else "another process"


def holder(path: Path) -> Holder | None:
    """Who holds the lock at ``path`` now; None where nobody does."""
    if not path.exists():
        return None
    lock = _lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return _read(path) or Holder(0, "", "")
    except OSError:  # whoever takes the lock will hear of it
        return None
    lock.release()
    return None


@contextmanager
def locked(path: Path, progress: Progress, what: str, *, wait: bool, within: Path | None = None) -> Iterator[None]:
    """Hold the lock at ``path``; ``what`` is done meanwhile, for messages.

    Where another process holds it, it is said which; then this one waits, or where it shall not raises
    :class:`evalsuite.ResourceError`. Where the process before was killed, that is said. Where the file system knows no
    locks, it is said that nothing keeps two processes apart. Afterwards the file is gone, and so are the folders
    above it that are empty, up to ``within`` (None: those that were made for it).
    """
    path = Path(path)
    within = within or next(folder for folder in path.parents if folder.exists())
    lock = _lock(path)
    held = _acquire(lock, path, progress, what, wait)
    try:
        left = _read(path)
        if left is not None:
            end = "was killed at it, by hand or by the kernel for want of memory (dmesg tells); this one goes on from"
            end = f"{end} the last saved state" if held else "may still be at it"
            progress.say(f"warning: {what}: {left}, {end}")
        with room_for(path):
            path.write_text(json.dumps(asdict(Holder())), encoding="utf-8")
        yield
    finally:
        if lock.is_locked or not held:  # not in a child that was forked meanwhile
            path.unlink(missing_ok=True)
            lock.release()
            remove_empty(path.parent, within)


def refuse_held(path: Path, what: str) -> None:
    """Raise :class:`evalsuite.ResourceError` where another process holds the lock at ``path`` now."""
    who = holder(path)
    if who is not None:
        raise _held_by(who, path, what)


def remove_empty(folder: Path, within: Path) -> None:
    """Remove a folder and those above it, below ``within``, as far as they are empty."""
    for each in (folder, *folder.parents):
        if each == within:
            return
        try:
            each.rmdir()
        except OSError:  # it holds something, perhaps since just now
            return


def _lock(path: Path) -> FileLock:
    return FileLock(path, thread_local=False, fallback_to_soft=False)


def _acquire(lock: FileLock, path: Path, progress: Progress, what: str, wait: bool) -> bool:
    """Whether the lock is held at the end; it is not where there are no locks."""
    try:
        if _take(lock, path):
            return True
        who = _read(path) or Holder(0, "", "")
        if not wait:
            raise _held_by(who, path, what)
        progress.say(f"{what}: waiting for {who}, which is at it; what it leaves is taken")
        with progress.doing(f"{what}: waiting for {who}"):
            while not _take(lock, path):
                time.sleep(POLL)
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        progress.say(
            f"warning: {what}: the file system of {path.parent} knows no locks ({error.strerror}): nothing keeps"
            " another process from doing the same at once"
        )
        return False


def _take(lock: FileLock, path: Path) -> bool:
    """One try; the folder may vanish in between, with whoever used it before."""
    with room_for(path):
        while True:
            with contextlib.suppress(FileNotFoundError):
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire(blocking=False)
                    return True
                except Timeout:
                    return False


def _held_by(who: Holder, path: Path, what: str) -> ResourceError:
    """The refusal of what another process is at."""
    return ResourceError(
        f"{what} is being done by another process",
        cause=f"{who} holds {path}",
        fix="wait until it has ended, or end it, and run the same command again; or choose another --out",
    )


def _read(path: Path) -> Holder | None:
    """Who wrote the note; None where there is none, or none that is whole."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return Holder(int(note["pid"]), str(note["host"])[:100], str(note["since"])[:40])
    except (OSError, ValueError, KeyError, TypeError):
        return None
