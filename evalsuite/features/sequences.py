"""Rows of an encoded set in groups: the frames of videos, the words of texts, the steps of episodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from evalsuite.errors import DataError, UsageError
from evalsuite.features.cache import Encoded

__all__ = ["Sequences"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Sequences:
    """V sequences that lie one after the other in N rows.

    ``rows`` is (N, ...), features of frames for example, and may be a map of a file: nothing is copied. ``ends`` (V,)
    is where each sequence ends: sequence i is ``rows[ends[i - 1]:ends[i]]``. ``names`` name the sequences, ``times``
    (N,) are seconds from the beginning of each row's sequence, ascending in it. Iterating gives the sequences, an index
    one of them, and a slice fewer, as Sequences.

    >>> walks = Sequences(np.arange(5.0), [2, 5])
    >>> len(walks), walks.lengths.tolist(), walks[1].tolist()
    (2, [2, 3], [2.0, 3.0, 4.0])
    >>> [part.tolist() for part in walks.aligned(np.array([1, 1, 0, 0, 1]))]
    [[1, 1], [0, 0, 1]]

    Raises :class:`UsageError` where ends, names or times do not fit the rows, or a sequence is empty.
    """

    rows: Array
    ends: npt.NDArray[np.int64] | Sequence[int]
    names: Sequence[str] = ()
    times: Array | None = None

    def __post_init__(self) -> None:
        ends = np.asarray(self.ends)
        if ends.ndim != 1 or not len(ends) or not np.issubdtype(ends.dtype, np.integer):
            raise _unfit(f"ends of shape {ends.shape} and type {ends.dtype}", "they are whole numbers, one a sequence")
        if int(ends[-1]) != len(self.rows) or (np.diff(ends, prepend=0) <= 0).any():
            raise _unfit(
                f"ends {_few(ends)} for {len(self.rows)} rows",
                "each is larger than the one before, by the length of a sequence, and the last is the number of rows",
            )
        if self.names and (len(self.names) != len(ends) or len(set(self.names)) != len(ends)):
            raise _unfit(f"{len(self.names)} names for {len(ends)} sequences", "each has one, and they differ")
        object.__setattr__(self, "ends", ends.astype(np.int64))
        if self.times is not None:
            times = np.asarray(self.times, dtype=np.float64)
            if times.shape != (len(self.rows),) or not np.isfinite(times).all():
                raise _unfit(f"times of shape {times.shape} for {len(self.rows)} rows", "each row has one, in seconds")
            for start, end in self.spans:
                if (np.diff(times[start:end]) <= 0).any():
                    raise _unfit(f"times {_few(times[start:end])} of a sequence", "they ascend")
            object.__setattr__(self, "times", times)

    @classmethod
    def of(cls, encoded: Encoded, output: str = "pooled") -> Sequences:
        """One output of an encoded set whose ids are ``video#seconds``, a sequence a video.

        Raises :class:`DataError` for other ids, and where the frames of a video do not stand together or in their
        order.
        """
        parts = [name.rpartition("#") for name in encoded.ids]
        for name, (video, mark, seconds) in zip(encoded.ids, parts, strict=True):
            if not video or not mark or not _is_time(seconds):
                raise DataError(
                    f"{name!r} names no frame of a video",
                    cause="ids of frames are video#seconds, for example walk.mp4#1.25",
                    fix="name the rows of the data set so",
                )
        videos = [(video, len(list(frames))) for video, frames in groupby(parts, key=lambda part: part[0])]
        names = [video for video, _ in videos]
        if len(set(names)) < len(names):
            again = next(name for name in names if names.count(name) > 1)
            raise DataError(
                f"the frames of {again!r} do not stand together",
                cause="frames of another video are among them",
                fix="order the rows by video, and by time within each",
            )
        times = np.array([float(seconds) for _, _, seconds in parts])
        ends = np.cumsum([count for _, count in videos])
        for name, start, end in zip(names, [0, *ends[:-1]], ends, strict=True):
            if (np.diff(times[start:end]) <= 0).any():
                raise DataError(
                    f"the frames of {name!r} are not in their order",
                    cause=f"their seconds are {_few(times[start:end])}",
                    fix="order the rows by video, and by time within each",
                )
        return cls(encoded.arrays[output], ends, names, times)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequences: ...

    def __getitem__(self, index: int | slice) -> Array | Sequences:
        if not isinstance(index, slice):
            start, end = self.spans[index]
            return self.rows[start:end]
        chosen = self.spans[index]
        if not chosen or any(end != start for (_, end), (start, _) in pairwise(chosen)):
            raise UsageError(
                f"the sequences {index} do not lie one after the other",
                cause=f"there are {len(self)}, and a slice is of one at least, in their order and without gaps",
                fix="index them one by one",
            )
        first, last = chosen[0][0], chosen[-1][1]
        return Sequences(
            self.rows[first:last],
            np.array([end - first for _, end in chosen]),
            self.names[index],
            None if self.times is None else self.times[first:last],
        )

    def __iter__(self) -> Iterator[Array]:
        return (self.rows[start:end] for start, end in self.spans)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first row of each sequence, and the one behind its last."""
        ends = [int(end) for end in self.ends]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(V,): how many rows each has."""
        return np.diff(self.ends, prepend=0)

    @property
    def index(self) -> npt.NDArray[np.int64]:
        """(N,): the number of each row's sequence."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def aligned(self, values: Array) -> list[Array]:
        """Values of rows (N, ...), labels for example, as one array a sequence.

        Raises :class:`UsageError` for another number of them.
        """
        if len(values) != len(self.rows):
            raise _unfit(f"{len(values)} values for {len(self.rows)} rows", "there is one for each row")
        return [values[start:end] for start, end in self.spans]

    def spread(self, values: Array) -> Array:
        """Values of sequences (V, ...) as those of their rows (N, ...).

        Raises :class:`UsageError` for another number of them.
        """
        if len(values) != len(self):
            raise _unfit(f"{len(values)} values for {len(self)} sequences", "there is one for each sequence")
        repeated: Array = np.repeat(values, self.lengths, axis=0)
        return repeated

    def between(self, index: int, start: float, stop: float) -> Array:
        """The rows of one sequence from ``start`` up to, and without, ``stop`` seconds."""
        if self.times is None:
            raise _unfit("sequences without times", "seconds are asked for")
        first, last = self.spans[index]
        begin, end = np.searchsorted(self.times[first:last], [start, stop])
        return self.rows[first + int(begin) : first + int(end)]

    def mean(self) -> Array:
        """(V, ...): the mean of the rows of each sequence, in float32."""
        return np.stack([np.asarray(part, dtype=np.float64).mean(axis=0) for part in self]).astype(np.float32)


def _is_time(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)) and float(text) >= 0)
    except ValueError:
        return False


def _few(values: Array) -> str:
    return f"{', '.join(f'{value:g}' for value in values[:6])}{', ...' if len(values) > 6 else ''}"


def _unfit(problem: str, cause: str) -> UsageError:
    return UsageError(problem, cause=cause, fix="give the rows of all sequences, one sequence after the other")
