"""What there is to learn from: the rows that a layout of :mod:`evalsuite.data` offers, as samples for a recipe."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evalsuite import DataError, Registry
from evalsuite import data as layouts
from evalsuite.data.classification import npz_rows, read_files
from evalsuite.data.frames import Frames
from evalsuite.data.generated import Demo
from evalsuite.data.learning import FileRows, ImageRows, Learning, PixelRows
from pretrain.batch import Look, Sample

__all__ = [
    "Arrays",
    "Corpus",
    "Files",
    "Images",
    "Joined",
    "Rows",
    "Worlds",
    "demo",
    "parse",
    "read_npz",
    "readable",
    "shown",
    "typical_side",
]

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


class Images(Dataset[Sample]):
    """Rows of images. ``data[i]`` is ``{"image": (3,H,W) uint8}``; a modifier may add to it.

    ``labels`` (N,) are for monitoring alone, -1 where there is none; ``fingerprint`` is a sha256 of what the rows
    are. Reading a row raises :class:`evalsuite.DataError` where its image does not decode.
    """

    labels: Labels
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> Sample: ...

    @property
    def labelled(self) -> bool:
        """Whether every row has a label."""
        return bool(len(self.labels)) and bool((self.labels >= 0).all())


class _Offered(Images):
    """What a layout offers to learn from."""

    def __init__(self, rows: ImageRows, fingerprint: str = "") -> None:
        self.rows, self.labels = rows, rows.labels
        self.fingerprint = fingerprint or rows.fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        sample = dict(self.rows.sample(row))
        # a copy, whatever lies behind it: a mapped file cannot be written to
        image = np.array(sample.pop("image").transpose(2, 0, 1), order="C")
        return {"image": torch.from_numpy(image), **{name: torch.from_numpy(value) for name, value in sample.items()}}


class Arrays(_Offered):
    """Images in memory (or in a mapped file): ``pixels`` (N,H,W,3) uint8, RGB."""

    def __init__(self, pixels: Pixels, labels: Sequence[int] | Labels | None = None, fingerprint: str = "") -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"images are (N,H,W,3) uint8, not {pixels.shape} {pixels.dtype}")
        self.pixels = pixels
        marks = None if labels is None else np.asarray(labels, dtype=np.int64).reshape(-1)
        if marks is not None and len(marks) != len(pixels):
            raise ValueError(f"{len(pixels)} images come with {len(marks)} labels")
        super().__init__(PixelRows(pixels, marks), fingerprint)


class Files(_Offered):
    """Images in files, decoded when they are asked for. Its fingerprint is of their names, what they hold, and labels.

    Raises :class:`evalsuite.DataError` for one that is not there.
    """

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int] | Labels | None = None) -> None:
        self.root = root
        read_files(root, names, complete=True)
        super().__init__(FileRows(root, names, labels))


class Joined(Images):
    """Several sets as one, in order; the same set may come more than once, and its copies are rows of their own."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(p) for p in self.parts])
        self.labels = np.concatenate([p.labels for p in self.parts])
        self.fingerprint = _digest(*(p.fingerprint.encode() for p in self.parts))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> Sample:
        part = int(np.searchsorted(self.ends, row, side="right"))
        return self.parts[part][row - (int(self.ends[part - 1]) if part else 0)]


class Rows(Images):
    """Some rows of a set."""

    def __init__(self, data: Images, rows: Sequence[int] | Labels) -> None:
        self.data, self.rows = data, np.asarray(rows, dtype=np.int64)
        self.labels = data.labels[self.rows]
        self.fingerprint = _digest(data.fingerprint.encode(), self.rows.tobytes())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        return self.data[int(self.rows[row])]


class Worlds(_Offered):
    """``count`` first frames of a simulated world, each drawn when it is asked for; besides ``image`` (3,64,64) a row
    has ``segments`` (64,64) and ``state`` (rows,N), as :class:`evalsuite.data.frames.Frames` says."""

    def __init__(self, task: str, variant: str = "default", count: int = 1_000_000, seed: int = 0) -> None:
        frames = Frames(task, variant, count, seed)
        self.world = frames.world
        super().__init__(frames)


def typical_side(data: Images, look_at: int = 32) -> int | None:
    """The median of the shorter sides, in pixels, of images spread over the rows; None where none can be read."""
    sides = []
    for row in np.unique(np.linspace(0, len(data) - 1, min(look_at, len(data))).astype(int)):
        try:
            sides.append(min(data[int(row)]["image"].shape[1:]))
        except DataError:  # which training passes over, too
            continue
    return int(np.median(sides)) if sides else None


class _Seen(Dataset[tuple[int, Tensor]]):
    def __init__(self, data: Images, look: Look, strict: bool) -> None:
        self.data, self.look, self.strict = data, look, strict

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[int, Tensor] | None:  # type: ignore[override]  # None: not to be shown
        try:
            return row, self.look(self.data[row], torch.Generator().manual_seed(row)).data
        except DataError:
            if self.strict:
                raise
            return None


def _batched(found: Sequence[tuple[int, Tensor] | None]) -> tuple[list[int], Tensor | None]:
    kept = [each for each in found if each is not None]
    return [row for row, _ in kept], torch.stack([pixels for _, pixels in kept]) if kept else None


def shown(data: Images, look: Look, device: torch.device, workers: int = 0) -> Iterator[Tensor]:
    """All images in order, each looked at once, as batches (B,3,H,W) in [0,1] on a device."""
    for _, pixels in _batches(data, look, device, workers, strict=True):
        yield pixels


def readable(data: Images, look: Look, device: torch.device, workers: int = 0) -> Iterator[tuple[list[int], Tensor]]:
    """:func:`shown` of the images that can be read, with the rows that they are of."""
    return _batches(data, look, device, workers, strict=False)


def _batches(
    data: Images, look: Look, device: torch.device, workers: int, strict: bool
) -> Iterator[tuple[list[int], Tensor]]:
    loader = DataLoader(_Seen(data, look, strict), batch_size=256, num_workers=workers, collate_fn=_batched)
    for rows, pixels in loader:
        if pixels is not None:
            yield rows, pixels.to(device).float() / 255


@dataclass(frozen=True)
class Corpus:
    """What there is: images to learn from, and where some are held out, a bank and queries to ask about them. k-NN
    is asked where both are labelled; the methods' own measures always."""

    train: Images
    probe: tuple[Images, Images] | None = None

    @classmethod
    def of(cls, offered: Learning) -> Corpus:
        """Of what a layout offers. Where labelled images have no test split, every fifth row asks the others: its
        pixels were learned from, its label was not."""
        train = _Offered(offered.train)
        learnt: Images = train
        if offered.unlabelled is not None:
            learnt = Joined([train, _Offered(offered.unlabelled)])
        if offered.held_out is not None:
            return cls(learnt, (train, _Offered(offered.held_out)))
        if not train.labelled:
            return cls(learnt)
        rows = np.arange(len(train))
        return cls(learnt, (Rows(train, rows[rows % 5 > 0]), Rows(train, rows[rows % 5 == 0])))


def parse(text: str, registry: Registry | None = None) -> Corpus:
    """What :func:`evalsuite.data.parse` names, as images to learn from: ``layout:path`` of any layout on the shelf
    ``dataset`` (by default of all plugins that are installed), ``demo``, ``demo:N`` or ``worlds:TASK``.

    Raises :class:`evalsuite.UsageError` for an unknown layout and :class:`evalsuite.DataError` where the path holds no
    such data.
    """
    layout, path = layouts.parse(text, registry, learning=True)
    return Corpus.of(layout.learning(path))


def demo(images: int = 512, *, size: int = 32, seed: int = 0) -> Corpus:
    """Generated images of eight classes (:class:`evalsuite.data.generated.Demo`), and half as many again to ask k-NN
    about."""
    found = Demo(images, size, seed)
    train, test = (Arrays(found.drawn(split), found.labels(split)) for split in ("train", "test"))
    return Corpus(train, (train, test))


def read_npz(path: Path) -> Arrays:
    """The training images of an ``.npz`` file: uint8, (N,H,W,3) or grey (N,H,W), by the names that
    :class:`evalsuite.data.classification.Npz` knows. Pickled objects are not read.

    Raises :class:`evalsuite.DataError` for anything else.
    """
    rows = npz_rows(path)
    pixels = rows.pixels if rows.pixels.ndim == 4 else rows.pixels[..., None]
    return Arrays(pixels if pixels.shape[3] == 3 else np.repeat(pixels, 3, axis=3), rows.labels)


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
