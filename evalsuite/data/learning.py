"""What a layout offers to learn from: images by row, without their annotations."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from evalsuite.data import Source, split_role, split_roles
from evalsuite.data.digests import digests, joined
from evalsuite.data.images import read_rgb
from evalsuite.errors import DataError, UsageError

__all__ = ["FileRows", "ImageRows", "Learning", "PixelRows", "by_roles", "rows_by_name", "rows_of_files"]

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


class ImageRows(ABC):
    """Images by row.

    ``labels`` (N,) int64 are for monitoring alone, -1 where a row has none.
    """

    labels: Ints

    @property
    @abstractmethod
    def ids(self) -> Sequence[str]:
        """The names of the rows."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of what the rows are, in their order, wherever they lie."""

    @abstractmethod
    def __getitem__(self, row: int, /) -> Bytes:
        """(H, W, 3) uint8 RGB. Raises :class:`DataError` naming an image that does not decode."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether there are rows, and each has a label."""
        return bool(len(self.labels)) and bool((self.labels >= 0).all())

    def sample(self, row: int) -> Mapping[str, NDArray[Any]]:
        """The image, as ``image``, and whatever else the source knows of it."""
        return {"image": self[row]}


class FileRows(ImageRows):
    """Images in files below ``root``, which ``read`` decodes; known by their names, what they hold, and labels."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: Sequence[int] | Ints | None = None,
        read: Callable[[Path], Bytes] = read_rgb,
    ) -> None:
        self.root, self.read = root, read
        self.labels = np.full(len(names), -1) if labels is None else np.asarray(labels, dtype=np.int64)
        # a quarter of the memory of texts, of which a million rows have more than of anything else
        self._names = np.array(names, dtype=np.bytes_ if all(n.isascii() for n in names) else np.str_)

    @property
    def ids(self) -> list[str]:
        return [self._name(row) for row in range(len(self))]

    @cached_property
    def fingerprint(self) -> str:
        names = self.ids
        files = joined((name.replace(os.sep, "/") for name in names), digests(self.root, names))
        reader = b"" if self.read is read_rgb else self.read.__name__.encode()
        return hashlib.sha256(files.encode() + self.labels.tobytes() + reader).hexdigest()

    def __getitem__(self, row: int, /) -> Bytes:
        return self.read(self.root / self._name(row))

    def _name(self, row: int) -> str:
        name = self._names[row]
        return name.decode() if isinstance(name, bytes) else str(name)


class PixelRows(ImageRows):
    """Images in one array (N,H,W,3), (N,H,W,1) or (N,H,W) uint8, known by their pixels."""

    def __init__(self, pixels: Bytes, labels: Sequence[int] | Ints | None = None) -> None:
        self.pixels = pixels
        self.labels = np.full(len(pixels), -1) if labels is None else np.asarray(labels, dtype=np.int64)

    @property
    def ids(self) -> list[str]:
        return [str(row) for row in range(len(self))]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(str((*self.pixels.shape[:3], 3)).encode())
        for row in range(len(self)):
            digest.update(self[row].data)
        return digest.hexdigest()

    def __getitem__(self, row: int, /) -> Bytes:
        image = self.pixels[row]
        image = image[..., None] if image.ndim == 2 else image
        return np.ascontiguousarray(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image)


def rows_by_name(
    root: Path,
    names: Sequence[str] | NDArray[np.str_],
    labels: Ints | None = None,
    read: Callable[[Path], Bytes] = read_rgb,
) -> FileRows:
    """Files in the order of their whole names, whatever way they were listed."""
    order = np.argsort(np.asarray(names, dtype=np.str_), kind="stable")
    return FileRows(root, [str(names[i]) for i in order.tolist()], None if labels is None else labels[order], read)


def rows_of_files(paths: Iterable[Path]) -> FileRows:
    """Files anywhere, by their names below the folder that they have in common."""
    files = [path.absolute() for path in paths]
    if not files:
        return FileRows(Path(), [])
    root = os.path.commonpath([path.parent for path in files])
    return rows_by_name(Path(root), [os.path.relpath(path, root) for path in files])


@dataclass(frozen=True)
class Learning:
    """What there is to learn from: ``train``, and further images that have no labels. ``held_out`` are images of
    another split, to watch learning by."""

    train: ImageRows
    unlabelled: ImageRows | None = None
    held_out: ImageRows | None = None


@runtime_checkable
class _HasRows(Protocol):
    def rows(self) -> ImageRows: ...


def by_roles(source: Source[Any], path: Path) -> Learning:
    """The training split, that of the role ``unlabelled``, and of val and test the first that has labels where the
    training split has.

    Raises :class:`DataError` where no split is one to learn from, :class:`UsageError` for splits without images.
    """
    roles = _roles(source, path)
    train = _rows(source, path, roles["train"])
    more = _rows(source, path, roles["unlabelled"]) if "unlabelled" in roles else None
    others = (_rows(source, path, roles[role]) for role in ("val", "test") if role in roles)
    return Learning(train, more, next((rows for rows in others if rows.labelled >= train.labelled), None))


def _roles(source: Source[Any], path: Path) -> Mapping[str, str]:
    """The splits by their roles; for want of one to score on, the only split, or the only one named train."""
    try:
        roles = source.roles(path)
    except DataError:
        roles = {}
    if "train" in roles:
        return roles
    splits = source.splits(path)
    together = split_roles(splits)
    named = [name for name in splits if "train" in (together.get(name), split_role(name))]
    fitting = list(splits) if len(splits) == 1 else named
    if len(fitting) != 1:
        raise DataError(
            f"which split of {path} is to be learnt from?",
            cause=f"{'several are' if fitting else 'none is'} named train: {', '.join(splits) or 'it has none'}",
            fix="name one split train; folder:PATH takes all images below a folder",
        )
    return {"train": fitting[0]}


def _rows(source: Source[Any], path: Path, split: str) -> ImageRows:
    data = source.load(path, split)
    if not isinstance(data, _HasRows):
        raise UsageError(
            f"the layout {source.name} has no images to learn from",
            cause=f"its split {split} is a {type(data).__name__}, which has no method rows",
            fix="give data of another layout; the layout's author adds rows() -> evalsuite.data.learning.ImageRows",
        )
    return data.rows()
