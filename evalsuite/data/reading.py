"""Which images of a split can be read, and which stand in two splits: looked at once, and remembered beside the cache.

What is remembered goes by a key that changes with the files: a fingerprint of what they hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from evalsuite.data.digests import Digests, joined, marks
from evalsuite.data.images import DECODING
from evalsuite.environment import cache_root
from evalsuite.errors import ImageError
from evalsuite.files import forget_partials, write_text
from evalsuite.progress import Progress

__all__ = [
    "Contents",
    "Copies",
    "Readable",
    "Split",
    "copied",
    "in_both",
    "left_out",
    "look",
    "readable",
    "recall",
    "refuse",
    "usable",
]


class Readable(NamedTuple):
    """What looking at every row of a split found: which cannot be read, and the classes that occur in the others."""

    unreadable: dict[int, ImageError]
    labels: frozenset[int]


class Split(Protocol):
    """A split in files of which rows can be left out.

    ``title`` is its name for readers of scores. ``unreadable`` says why rows were left out, ``fingerprint`` is of the
    others, ``digests`` (N, 32) of the files of its ``images``.
    """

    @property
    def title(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def unreadable(self) -> tuple[ImageError, ...]: ...
    def __len__(self) -> int: ...
    @property
    def digests(self) -> Digests: ...
    def images(self) -> Iterable[Path]: ...
    def without(self, unreadable: Mapping[int, ImageError]) -> Self: ...


Given = TypeVar("Given", bound=Split)


def usable(
    part: Given,
    read: Callable[[int], Iterable[int]],
    progress: Progress,
    *,
    strict: bool = False,
    known: bool = False,
    kind: str = "",
) -> tuple[Given, frozenset[int]]:
    """``part`` without the images that cannot be read, and the classes that occur in it.

    Every row is read once, and what that found is remembered, by ``kind`` where rows are read in several ways; with
    ``known`` nothing is read, and only what an earlier look found is left out. Raises :class:`ImageError` where no
    image can be read, or with ``strict`` where one cannot, and whatever else ``read`` raises.
    """
    key = joined([part.fingerprint, kind, str(DECODING)])
    found = recall(key) if known else readable(key, len(part), read, progress)
    if found is None:
        found = Readable({}, frozenset())
    refuse([*part.unreadable, *found.unreadable.values()], len(part) + len(part.unreadable), strict)
    return part.without(found.unreadable) if found.unreadable else part, found.labels


def refuse(unreadable: Sequence[ImageError], count: int, strict: bool) -> None:
    """Raise :class:`ImageError` where none of ``count`` images can be read, or with ``strict`` where one cannot."""
    if unreadable and (strict or len(unreadable) == count):
        first = unreadable[0]
        told = f"{len(unreadable)} of {count} images cannot be read; {first.problem}"
        raise ImageError(told, cause=first.cause, fix=first.fix)


def left_out(unreadable: Sequence[ImageError]) -> str:
    """What is told of images that are left out."""
    first = unreadable[0]
    return f"{len(unreadable)} images cannot be read and are left out; {first.problem}: {first.cause}"


def readable(key: str, count: int, read: Callable[[int], Iterable[int]], progress: Progress) -> Readable:
    """Look at every row once, or remember what an earlier look of the same ``key`` found.

    ``read`` decodes a row and gives the classes in it. Rows of which it raises :class:`ImageError` are unreadable; what
    else it raises is wrong with the data, and is raised.
    """
    found = recall(key)
    if found is None:
        found = look(count, read, progress)
        told = {str(row): [e.problem, e.cause, e.fix] for row, e in found.unreadable.items()}
        forget_partials(_memory("readable", key))
        write_text(_memory("readable", key), json.dumps({"unreadable": told, "labels": sorted(found.labels)}))
    return found


def recall(key: str) -> Readable | None:
    """What an earlier look found; None where there was none."""
    memory = _memory("readable", key)
    if not memory.is_file():
        return None
    known: dict[str, Any] = json.loads(memory.read_text(encoding="utf-8"))
    errors = {int(row): ImageError(p, cause=c, fix=f) for row, (p, c, f) in known["unreadable"].items()}
    return Readable(errors, frozenset(known["labels"]))


def look(count: int, read: Callable[[int], Iterable[int]], progress: Progress) -> Readable:
    """As :func:`readable`, without a memory. Decoding releases the interpreter lock, so threads keep all cores busy."""

    def attempt(row: int) -> frozenset[int] | ImageError:
        try:
            return frozenset(read(row))
        except ImageError as error:
            return error

    unreadable: dict[int, ImageError] = {}
    labels: set[int] = set()
    with ThreadPoolExecutor() as pool, progress.track("check images", count) as meter:
        for row, found in enumerate(pool.map(attempt, range(count))):
            if isinstance(found, ImageError):
                unreadable[row] = found
            else:
                labels |= found
            meter.update(row + 1)
    return Readable(unreadable, frozenset(labels))


class Copies(NamedTuple):
    """How many images of one split are, byte for byte, in another one too, and the names of the first in both."""

    number: int
    first: tuple[str, str]

    def warning(self, train: str, test: str) -> str:
        """What a reader of scores must know."""
        return (
            f"{self.number} of the images of {test} are in {train} too, so that scores are too high: "
            f"{self.first[0]} is {self.first[1]} there"
        )


# An image by its name: a digest of what it holds, "" where that cannot be read.
Contents = Mapping[str, str]


def copied(train: Split, test: Split) -> tuple[str, ...]:
    """A warning of images that stand in both splits."""
    learnt, tested = (dict(zip(map(str, part.images()), marks(part.digests), strict=True)) for part in (train, test))
    found = in_both(learnt, tested)
    return () if found is None else (found.warning(train.title, test.title),)


def in_both(train: Contents, test: Contents) -> Copies | None:
    """The images of ``test`` that are in ``train`` too."""
    names = {mark: name for name, mark in train.items() if mark}
    found = [(name, names[mark]) for name, mark in test.items() if mark in names]
    return Copies(len(found), found[0]) if found else None


def _memory(kind: str, key: str) -> Path:
    return cache_root() / kind / f"{key}.json"
