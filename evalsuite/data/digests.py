"""Digests of files' contents: every file is read once, and what it held is remembered beside the cache.

A memory is one ``.npz`` file a folder of data: names below it, the state of each file (size, time of modification, time
of change, inode) and its sha256. A file in the state that is remembered is not opened. Times can be set back, but the
time of change cannot (the system sets it whenever a file is written, replaced or renamed), so that a file of other
contents is read anew whatever its size and times say. Of two processes that remember at once the last one wins: the
other's files are read once more, no digest is ever wrong.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from evalsuite.environment import cache_root
from evalsuite.errors import ResourceError
from evalsuite.files import atomic, forget_partials, open_regular
from evalsuite.progress import Progress

__all__ = [
    "Digests",
    "State",
    "content_of",
    "data_session",
    "digests",
    "fingerprint",
    "joined",
    "loaded",
    "marks",
    "of_paths",
    "state",
]

_WIDTH = hashlib.sha256().digest_size
_CHUNK = 256  # files a thread takes at once
_QUICK = 1e-4  # seconds a file, below which one thread takes all: more would wait for the interpreter lock
_TICK = 0.02  # seconds within which two writes may leave one time of change: some ticks of the system's clock
_STATE = 4

Digests = NDArray[np.uint8]
State = tuple[int, int, int, int]
Ints = NDArray[np.int64]
Value = TypeVar("Value")


# --- sessions ---------------------------------------------------------------------------------------------------


@dataclass
class _Session:
    progress: Progress
    verify: bool
    verified: set[tuple[str, str]] = field(default_factory=set)
    loaded: tuple[Hashable, Any] | None = None

    def unverified(self, key: str, names: Sequence[str]) -> NDArray[np.bool_]:
        """(N,): which of these files of a memory are to be digested whatever is remembered, and were not yet."""
        wanted = np.array([self.verify and (key, name) not in self.verified for name in names], bool)
        if self.verify:
            self.verified.update((key, name) for name in names)
        return wanted


_session: ContextVar[_Session | None] = ContextVar("data session", default=None)


@contextmanager
def data_session(progress: Progress, verify: bool = False) -> Iterator[None]:
    """Within it data are taken not to change: splits are loaded once (:func:`loaded`).

    ``progress`` is told of long work. ``verify``: every file is digested anew, once, whatever is remembered. Within
    another session it is that one.
    """
    if _session.get() is not None:
        yield
        return
    token = _session.set(_Session(progress, verify))
    try:
        yield
    finally:
        _session.reset(token)


def loaded(key: Hashable, load: Callable[[], Value]) -> Value:
    """What ``load`` gives; within a session the last one is kept, since fingerprint, run and every seed need it."""
    session = _session.get()
    if session is None:
        return load()
    if session.loaded is None or session.loaded[0] != key:
        session.loaded = None  # both at once may not fit into memory
        session.loaded = key, load()
    value: Value = session.loaded[1]
    return value


# --- digests ----------------------------------------------------------------------------------------------------


def digests(root: Path, names: Sequence[str]) -> Digests:
    """The sha256 (N, 32) of files below ``root``, zeros of what cannot be read or is no regular file.

    Files that are remembered in the state that they are in are not opened.
    """
    session = _session.get() or _Session(Progress(quiet=True), verify=False)
    memory = _Memory.of(root)
    known = memory.recall(session.progress)
    states = np.concatenate(_in_threads(_states, os.fspath(root), names))
    found, same = known.of(names, states)
    wanted = (states[:, 0] >= 0) & ~(same & ~session.unverified(memory.key, names))
    chosen = [name for name, one in zip(names, wanted.tolist(), strict=True) if one]
    if not chosen:
        return found
    _wait_a_tick(states[wanted])
    with session.progress.doing(f"digesting {len(chosen)} of {len(names)} files in {root}"):
        chunks = _in_threads(_digest_all, os.fspath(root), chosen)
    fresh, opened = (np.concatenate(each) for each in zip(*chunks, strict=True))
    changed = np.flatnonzero(same[wanted] & (fresh != found[wanted]).any(axis=1)).tolist()
    if changed:
        session.progress.say(
            f"warning: {len(changed)} files in {root} hold something else than before, though their sizes and times "
            f"are the same: the first is {chosen[changed[0]]}"
        )
    found[wanted] = fresh
    _remember(memory, session.progress, chosen, opened, fresh)
    return found


def of_paths(paths: Sequence[Path]) -> Digests:
    """:func:`digests` of files anywhere."""
    if not paths:
        return np.zeros((0, _WIDTH), np.uint8)
    root = os.path.commonpath({str(path.parent.absolute()) for path in paths})
    return digests(Path(root), [str(path.absolute())[len(root) :].lstrip(os.sep) for path in paths])


def state(file: Path) -> State:
    """What changes when a file does: size, time of modification, time of change, inode."""
    return _state(file.stat())


def content_of(file: Path) -> str:
    """The sha256 of one file in hexadecimal, zeros where it cannot be read."""
    return str(of_paths([file]).tobytes().hex())


def marks(found: Digests) -> list[str]:
    """Digests in hexadecimal, "" for a file that could not be read."""
    return [row.tobytes().hex() if row.any() else "" for row in found]


def joined(parts: Iterable[str], found: Digests | None = None) -> str:
    """One sha256 in hexadecimal of texts and of the digests of files, in their order."""
    text = "".join(f"{part}\n" for part in parts)
    state = hashlib.sha256(text.encode("utf-8", "surrogateescape"))
    state.update(b"" if found is None else found.tobytes())
    return state.hexdigest()


def fingerprint(*parts: str) -> str:
    """The data fingerprint of a result, of the digests of its splits: 64 bits of each, behind a word for their kind."""
    return f"content:{'-'.join(part[:16] for part in parts)}"


def _states(root: str, names: Sequence[str]) -> Ints:
    """(N, 4): size, time of modification, time of change, inode; -1 of what is not there."""
    found: list[State] = []
    for name in names:
        try:
            found.append(_state(os.stat(os.path.join(root, name))))
        except (OSError, ValueError):
            found.append((-1, -1, -1, -1))
    return np.array(found, np.int64).reshape(-1, _STATE)


def _state(stat: os.stat_result) -> State:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino & 0x7FFF_FFFF_FFFF_FFFF


def _digest_all(root: str, names: Sequence[str]) -> tuple[Digests, Ints]:
    """Digests, and the states that the files were in when they were opened; zeros and -1 of what cannot be read."""
    found = np.zeros((len(names), _WIDTH), np.uint8)
    states = np.full((len(names), _STATE), -1, np.int64)
    for row, name in enumerate(names):
        try:
            with open_regular(os.path.join(root, name)) as file:
                states[row] = _state(os.fstat(file.fileno()))
                found[row] = np.frombuffer(hashlib.file_digest(file, "sha256").digest(), np.uint8)
        except (OSError, ValueError):
            states[row] = -1
    return found, states


def _in_threads(work: Callable[[str, Sequence[str]], Value], root: str, names: Sequence[str]) -> list[Value]:
    """``work`` on chunks of the names. Reading and hashing release the interpreter lock."""
    began = time.perf_counter()
    first = work(root, names[:_CHUNK])
    rest = [names[start : start + _CHUNK] for start in range(_CHUNK, len(names), _CHUNK)]
    if time.perf_counter() - began < _CHUNK * _QUICK:  # threads would spend more on the interpreter lock than they save
        return [first, *(work(root, chunk) for chunk in rest)]
    with ThreadPoolExecutor() as pool:
        return [first, *pool.map(lambda chunk: work(root, chunk), rest)]


def _wait_a_tick(states: Ints) -> None:
    """A file that was written just now may be written again without another time of change: let that time pass."""
    if len(states) and states[:, 2].max() > time.time_ns() - int(_TICK * 1e9):
        time.sleep(_TICK)


# --- memories ---------------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """What is remembered of a folder: names (N,), and their states (N, 4) and digests (N, 32)."""

    names: list[str]
    states: Ints
    digests: Digests

    @classmethod
    def nothing(cls) -> _Known:
        return cls([], np.zeros((0, _STATE), np.int64), np.zeros((0, _WIDTH), np.uint8))

    def of(self, names: Sequence[str], states: Ints) -> tuple[Digests, NDArray[np.bool_]]:
        """Digests (N, 32) of the files that are in the states that are remembered, and which (N,) these are."""
        rows = self._rows_of(names)
        same = (rows >= 0) & (states[:, 0] >= 0)
        same[same] = (self.states[rows[same]] == states[same]).all(axis=1)
        found = np.zeros((len(names), _WIDTH), np.uint8)
        found[same] = self.digests[rows[same]]
        return found, same

    def _rows_of(self, names: Sequence[str]) -> Ints:
        """The row (N,) of each name, -1 of one that is not known."""
        if self.names == list(names):  # the same data as the last time, of perhaps a million files
            return np.arange(len(names))
        row_of = {name: row for row, name in enumerate(self.names)}
        return np.array([row_of.get(name, -1) for name in names], np.int64)

    def updated(self, names: Sequence[str], states: Ints, digests: Digests) -> _Known:
        """With these in the place of what was known of the same names."""
        replaced = set(names)
        rows = [row for row, name in enumerate(self.names) if name not in replaced]
        return _Known(
            [*(self.names[row] for row in rows), *names],
            np.concatenate([self.states[rows], states]),
            np.concatenate([self.digests[rows], digests]),
        )


class _Memory(NamedTuple):
    """The file in which digests of a folder are remembered."""

    key: str
    file: Path

    @classmethod
    def of(cls, root: Path) -> _Memory:
        key = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
        return cls(key, cache_root() / "digests" / f"{key}.npz")

    def recall(self, progress: Progress) -> _Known:
        """What is remembered; nothing, with a line, where the file is damaged."""
        if not self.file.is_file():
            return _Known.nothing()
        try:
            with self.file.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
                text, states, digests = (arrays[name] for name in ("names", "states", "digests"))
            names = os.fsdecode(text.tobytes()).split("\0") if text.size else []
            good = states.shape == (len(names), _STATE) and digests.shape == (len(names), _WIDTH)
            if not good or (text.dtype, states.dtype, digests.dtype) != (np.uint8, np.int64, np.uint8):
                raise ValueError("its arrays do not fit together")
        except Exception as error:  # a damaged archive raises nearly anything
            progress.say(f"{self.file} is damaged ({error}): it is left out, and files are digested anew")
            return _Known.nothing()
        return _Known(names, states, digests)

    def write(self, known: _Known) -> None:
        text = np.frombuffer(os.fsencode("\0".join(known.names)), np.uint8)
        forget_partials(self.file)
        with atomic(self.file) as partial, partial.open("wb") as handle:
            np.savez(handle, names=text, states=known.states, digests=known.digests)


def _remember(memory: _Memory, progress: Progress, names: Sequence[str], states: Ints, digests: Digests) -> None:
    """Write what was digested beside what another process may have remembered meanwhile."""
    rows = {names[row]: row for row in np.flatnonzero(states[:, 0] >= 0).tolist()}
    if not rows:
        return
    chosen = list(rows.values())
    try:
        memory.write(memory.recall(Progress(quiet=True)).updated(list(rows), states[chosen], digests[chosen]))
    except ResourceError as error:
        progress.say(f"digests of data cannot be remembered: {error.problem}: {error.cause}")
