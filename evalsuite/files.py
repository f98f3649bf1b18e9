"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evalsuite.errors import Refusal, ResourceError

__all__ = ["atomic", "forget_partials", "room_for", "write_text"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``; it takes ``path``'s place when the block ends well, and is gone otherwise.

    The data reach the disk before the name does, so a crash at any moment leaves the old file or the new one. Raises
    :class:`evalsuite.ResourceError` where the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with room_for(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        partial = Path(name)
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


def forget_partials(path: str | Path) -> None:
    """Remove what writers of ``path`` left that were killed; nobody else may be writing it."""
    path = Path(path)
    for partial in path.parent.glob(".*.partial"):
        if partial.name.startswith(f".{path.name}."):
            partial.unlink()


@contextmanager
def room_for(path: str | Path) -> Iterator[None]:
    """Writing to ``path``: a full disk is told as a :class:`evalsuite.ResourceError`, whoever noticed it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, Refusal) or not _is_full(error):
            raise
        raise ResourceError(
            f"{path} cannot be written",
            cause="there is no room left on the disk, or a limit on files is reached",
            fix=f"free space under {Path(path).parent} and run the same command again; what was there before is whole",
        ) from error


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
