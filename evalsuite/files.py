"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from evalsuite.errors import Refusal, ResourceError, UsageError

__all__ = [
    "atomic",
    "forget_partials",
    "is_aside",
    "open_regular",
    "read_regular",
    "refuse_special",
    "room_for",
    "set_aside",
    "special",
    "writable",
    "writable_file",
    "write_text",
]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SPECIAL = {
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}  # fmt: skip
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``; it takes ``path``'s place when the block ends well, and is gone otherwise.

    The data reach the disk before the name does, so a crash at any moment leaves the old file or the new one. Raises
    :class:`evalsuite.ResourceError` where the disk is full or the system does not let it be written.
    """
    path = Path(path)
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = _partial(path)
        try:
            yield partial
            mask = os.umask(0)
            os.umask(mask)
            partial.chmod(0o666 & ~mask)  # mkstemp makes files private; results are to be shared like any other
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
            os.close(handle)


def _partial(path: Path) -> tuple[int, Path]:
    """A new file beside ``path``, locked as long as this process has it open: nobody takes it for a dead writer's."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)  # somebody has removed it, in the moment before it was locked


def writable(folder: str | Path, flag: str = "--out") -> None:
    """Refuse a folder that cannot be made or written into, before the work whose results belong there.

    It is tried in the nearest folder that is there, and nothing is left behind. Raises :class:`UsageError` where a
    file is in the way and :class:`ResourceError` where the system does not let it be written.
    """
    folder = Path(folder)
    try:
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not there.is_dir():
            raise UsageError(
                f"{flag} {folder} cannot be a folder",
                cause=f"{there} is {'a link to nothing' if there.is_symlink() and not there.exists() else 'a file'}",
                fix=f"name a folder: {flag} {there.with_name(there.stem + '-results')}",
            )
        missing = folder.relative_to(there).parts
        with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=there) as scratch:
            Path(scratch, *missing).mkdir(parents=True, exist_ok=True)
            Path(scratch, *missing, "file").touch()
    except (OSError, ValueError) as error:  # ValueError: a character that no path can have
        raise ResourceError(
            f"{flag} {folder} cannot be written",
            cause=f"the system says: {getattr(error, 'strerror', None) or error}",
            fix=f"{flag} with a folder that you may write into",
        ) from error


def writable_file(path: str | Path, flag: str = "--out") -> None:
    """As :func:`writable`, of a file to be written: a folder must not have its name."""
    path = Path(path)
    if os.path.isdir(path):  # not Path.is_dir, which raises where a name is too long
        raise UsageError(
            f"{flag} {path} cannot be a file", cause="it is a folder", fix=f"name a file: {flag} {path / 'FILE'}"
        )
    writable(path.parent, flag)


def forget_partials(path: str | Path) -> None:
    """Remove what writers of ``path`` left that were killed, and of files whose names go on after it and a dot.

    What a living process writes stays, and everything where the file system knows no locks to tell them apart; so does
    what another user wrote and only they may touch."""
    path = Path(path)
    for partial in path.parent.glob(".*.partial"):
        if partial.name.startswith(f".{path.name}."):
            with suppress(FileNotFoundError, PermissionError):  # its writer has just come to its end; or another user's
                handle = os.open(partial, os.O_RDWR)
                try:
                    if _lock(handle):
                        partial.unlink(missing_ok=True)
                finally:
                    os.close(handle)


def _lock(handle: int) -> bool:
    """Whether an open file is locked by this process from now on, until it is closed."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it, or there are no locks
        return False
    return True


ASIDE = ".aside-"


def set_aside(path: str | Path) -> Path:
    """Rename what cannot be used, or not for what is done now, to the first free ``NAME.aside-1``, ``-2``, ...; the
    new path."""
    path = Path(path)
    number = 1
    while os.path.lexists(there := path.with_name(f"{path.name}{ASIDE}{number}")):
        number += 1
    with room_for(path):
        path.rename(there)
    return there


def is_aside(path: Path) -> bool:
    """Whether :func:`set_aside` gave a file its name."""
    name, aside, number = path.name.rpartition(ASIDE)
    return bool(name and aside and number.isdecimal())


@contextmanager
def room_for(path: str | Path) -> Iterator[None]:
    """Writing to ``path``: a full disk is told as a :class:`evalsuite.ResourceError`, whoever noticed it; so is what
    the system does not let be written there."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and _is_denied(error, Path(path)):
            raise ResourceError(
                f"{path} cannot be written",
                cause=f"the system says: {error.strerror} ({error.filename})",
                fix=f"make {Path(path).parent} a folder that you may write into, or choose another",
            ) from error
        if isinstance(error, Refusal) or not _is_full(error):
            raise
        raise ResourceError(
            f"{path} cannot be written",
            cause="there is no room left on the disk, or a limit on files is reached",
            fix=f"free space under {Path(path).parent} and run the same command again; what was there before is whole",
        ) from error


def _is_denied(error: OSError, path: Path) -> bool:
    """Whether it is ``path`` that cannot be written: within a block other files may be read."""
    if error.errno not in DENIED or not isinstance(error.filename, str):
        return False
    return Path(error.filename) in (path, *path.parents) or Path(error.filename).parent == path.parent


def _is_full(error: BaseException) -> bool:
    """Writers of their own (torch, safetensors) raise errors of their own, about or after the system's."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    if any(f"(os error {number})" in str(error) for number in FULL):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and _is_full(before)


def write_text(path: str | Path, text: str) -> None:
    """Write text atomically, as UTF-8."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def open_regular(path: str | Path) -> BufferedReader:
    """A file of somebody's to be read. Raises :class:`OSError` for a pipe, a socket, a device or a folder, which is
    never waited for, as for whatever else cannot be read."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else a pipe waits for somebody who writes
    try:
        if (kind := _kind(os.fstat(handle).st_mode)) is not None:
            raise OSError(f"it is {kind}, not a file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | Path) -> bytes:
    """The content of a file. Raises as :func:`open_regular`."""
    with open_regular(path) as file:
        return file.read()


def special(path: str | Path) -> str | None:
    """What a path is that is there and is no regular file: ``a pipe``, ``a socket``, ``a device``, ``a folder``."""
    try:
        return _kind(os.stat(path).st_mode)
    except (OSError, ValueError):
        return None


def refuse_special(path: str | Path) -> None:
    """Raise :class:`OSError` for a path that is there and is no regular file, before a library opens it: a pipe would
    wait for ever, and a device may never end."""
    if (kind := special(path)) is not None:
        raise OSError(f"it is {kind}, not a file")


def _kind(mode: int) -> str | None:
    return None if stat.S_ISREG(mode) else _SPECIAL.get(stat.S_IFMT(mode), "something else")
