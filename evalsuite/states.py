"""Reading back what a run saved to go on from: whole and of the same settings, or told and set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evalsuite.errors import DataError, Refusal, ResourceError
from evalsuite.files import open_regular, set_aside
from evalsuite.progress import Progress

__all__ = ["going_on_from", "read_state"]

REASON = 200  # characters


def _key(content: dict[str, Any]) -> Any:
    return content["key"]


def read_state(
    path: Path, key: str, progress: Progress, *, key_of: Callable[[dict[str, Any]], Any] = _key, alone: bool = True
) -> dict[str, Any] | None:
    """What was saved at ``path`` under ``key``; None where nothing was.

    A file that cannot be read, or is of another key, is set aside, which is said; ``alone`` is false in all but one of
    several processes. Raises :class:`evalsuite.ResourceError` where the system does not let it be read.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be read",
            cause=f"the system says: {error.strerror or error}",
            fix="make it readable, or move it away to begin anew",
        ) from error
    try:
        with file:
            content = torch.load(file, map_location="cpu", weights_only=True)
        kept = key_of(content)
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        _put_aside(path, f"cannot be read ({_short(error)})", progress, alone)
        return None
    if kept != key:
        _put_aside(path, "was saved by a run of other settings or data", progress, alone)
        return None
    return dict(content)


def _put_aside(path: Path, why: str, progress: Progress, alone: bool) -> None:
    if alone:
        progress.say(f"warning: {path} {why}; it is set aside as {set_aside(path).name}, and the run begins anew")


@contextmanager
def going_on_from(path: Path, alone: bool = True) -> Iterator[None]:
    """While what :func:`read_state` gave is put to use: where it does not fit, the file is set aside, so that the next
    try begins anew, and a :class:`evalsuite.DataError` says so."""
    try:
        yield
    except (Refusal, MemoryError):
        raise
    except Exception as error:  # of whatever shape and type a stranger's file is
        aside = set_aside(path).name if alone else f"{path.name}.aside-1"
        raise DataError(
            f"{path} cannot be gone on from",
            cause=f"it does not fit what is trained here: {_short(error)}",
            fix=f"run the same command again, which begins anew; the state is set aside as {aside}",
        ) from error


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:REASON]}"
