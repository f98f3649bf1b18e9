"""Segmentation data in memory: pairs of image and mask, and what every layout's reader does with them.

A mask is (H, W) uint8: the class of each pixel, :data:`IGNORE` where it has none. How a file says that is its
layout's :class:`MaskReader`; what a file holds beyond it is refused, never guessed.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from evalsuite.data import Report, Source, as_fault
from evalsuite.data.digests import Digests, joined, of_paths
from evalsuite.data.draws import evenly
from evalsuite.data.images import (
    SUFFIXES,
    Labels,
    digest,
    duplicates,
    header_palette,
    images_by_name,
    read_labels,
    read_rgb,
    same_names,
    size,
    turn_note,
    unfitting,
)
from evalsuite.data.learning import FileRows, Learning, by_roles, rows_of_files
from evalsuite.errors import DataError, ImageError
from evalsuite.metrics.segmentation import IGNORE
from evalsuite.progress import Progress

__all__ = [
    "IGNORE",
    "Bytes",
    "Coding",
    "Colour",
    "MaskReader",
    "Pair",
    "Record",
    "SegmentationSet",
    "SegmentationSource",
    "assemble",
    "check_pixels",
    "find",
    "pair_up",
    "voc_palette",
]

Bytes = NDArray[np.uint8]
Colour = tuple[int, int, int]

_NUMBERS = 1 << 16  # more than any label file's numbers need; greater ones are no classes
_UNKNOWN = -1


class MaskReader(Protocol):
    """How a layout's mask files say the class of a pixel."""

    @property
    def key(self) -> str:
        """What tells one way of reading from another; it goes into the fingerprint."""

    def __call__(self, path: Path, expect: tuple[int, int]) -> Bytes:
        """The mask (H, W) of classes and IGNORE. ``expect`` is the (height, width) of its image.

        Raises :class:`DataError` naming a file that does not decode, has another size, or holds something that is
        no class.
        """

    def size(self, path: Path) -> tuple[int, int] | None:
        """(height, width) where the file tells it without being decoded."""

    def palette(self, path: Path) -> bytes | None:
        """The palette of a file of which the numbers are classes, as red, green and blue; None where none matters."""


@dataclass(frozen=True)
class Coding:
    """Masks in image files: ``values`` maps a stored number to a class or IGNORE, ``colours`` an RGB colour.

    A file of one channel is read by its numbers, whatever their width: 16 bits are fine where each number is in the
    table. A file of three channels is read by colours. A palette file is read by the colours of its palette where
    colours are known, by its numbers otherwise. ``hint`` is what to do about a number or colour outside the table.
    """

    values: Mapping[int, int]
    colours: Mapping[Colour, int] = field(default_factory=dict)
    hint: str = "correct the mask, or the table of classes"

    @cached_property
    def key(self) -> str:
        return f"{sorted(self.values.items())} {sorted(self.colours.items())}"

    def __call__(self, path: Path, expect: tuple[int, int]) -> Bytes:
        labels = read_labels(path, expect)
        found = self._by_colour(path, labels) if self._coloured(labels) else self._by_number(path, labels)
        if (found == _UNKNOWN).any():
            raise self._outside(path, labels, found == _UNKNOWN)
        return found.astype(np.uint8)

    def size(self, path: Path) -> tuple[int, int] | None:
        return size(path)

    def palette(self, path: Path) -> bytes | None:
        return None if self.colours else header_palette(path)

    def _coloured(self, labels: Labels) -> bool:
        return labels.pixels.ndim == 3 or (labels.palette is not None and bool(self.colours))

    def _by_number(self, path: Path, labels: Labels) -> NDArray[np.int16]:
        if not self.values:
            raise DataError(
                f"mask {path} cannot be read",
                cause="it holds numbers, and its classes are told by colours",
                fix="export the masks in colour, or give the classes numbers",
            )
        stored = labels.pixels
        if stored.dtype != np.uint8:
            stored = np.where((stored >= 0) & (stored < _NUMBERS), stored, _NUMBERS)
        return self._numbers[stored]

    def _by_colour(self, path: Path, labels: Labels) -> NDArray[np.int16]:
        if not self.colours:
            raise DataError(
                f"mask {path} cannot be read",
                cause="it holds RGB colours, and its classes are told by numbers",
                fix="export one channel of class numbers, or a palette PNG",
            )
        if labels.palette is not None:
            table = np.full(256, _UNKNOWN, np.int16)
            table[: len(labels.palette)] = self._classes(labels.palette)
            if table[IGNORE] == _UNKNOWN and self.values.get(IGNORE) == IGNORE:
                table[IGNORE] = IGNORE  # 255 is no class in every palette file, whatever its colour
            return table[labels.pixels]
        return self._classes(labels.pixels)

    @cached_property
    def _numbers(self) -> NDArray[np.int16]:
        table = np.full(_NUMBERS + 1, _UNKNOWN, np.int16)
        table[list(self.values)] = list(self.values.values())
        return table

    def _classes(self, colours: NDArray[Any]) -> NDArray[np.int16]:
        """The classes of (..., 3) colours."""
        known = np.array(sorted((_packed(np.array(rgb)), label) for rgb, label in self.colours.items()))
        packed = _packed(colours)
        place = np.searchsorted(known[:, 0], packed).clip(max=len(known) - 1)
        return np.where(known[place, 0] == packed, known[place, 1], _UNKNOWN).astype(np.int16)

    def _outside(self, path: Path, labels: Labels, where: NDArray[np.bool_]) -> DataError:
        stored = labels.pixels[where]
        if self._coloured(labels) and labels.palette is not None:
            colours = np.zeros((256, 3), np.uint8)
            colours[: len(labels.palette)] = labels.palette
            stored = colours[stored]
        odd = np.unique(stored, axis=0).tolist()
        known: list[Any] = sorted(self.colours if self._coloured(labels) else self.values)
        what = "colours" if self._coloured(labels) else "numbers"
        return DataError(
            f"mask {path} holds {what} that are no class: {_first(odd)}",
            cause=f"{int(where.sum())} pixels; known are {_first(known, 8)}",
            fix=self.hint,
        )


def _packed(colours: NDArray[Any]) -> NDArray[np.int32]:
    wide = colours.astype(np.int32)
    packed: NDArray[np.int32] = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    return packed


def _first(values: Sequence[Any], count: int = 5) -> str:
    shown = values if len(values) <= count else [*values[: count - 1], "...", values[-1]]
    return ", ".join("-".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in shown)


class Pair(NamedTuple):
    """An image and its mask on disk; ``image_id`` is unique in its split."""

    image_id: str
    image: Path
    mask: Path


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a set and its mask, both ``height`` by ``width`` pixels."""

    image_id: str
    image: Path
    mask: Path
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.height, self.width


@dataclass(frozen=True, eq=False)
class SegmentationSet:
    """A split: its classes, their colours (C, 3) uint8, and records.

    ``annotations`` is a sha256 of how masks are read, the classes, and the images' names. ``warnings`` are what a
    reader of scores must know, in sentences, ``unreadable`` why pairs are left out. ``palettes`` are those of the masks
    read by the numbers of one.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    palette: Bytes
    records: tuple[Record, ...]
    reader: MaskReader
    annotations: str
    warnings: tuple[str, ...] = ()
    unreadable: tuple[ImageError, ...] = ()
    palettes: Mapping[Path, bytes] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def title(self) -> str:
        return f"{self.name} {self.split}"

    def images(self) -> Iterator[Path]:
        """The images' files."""
        return (record.image for record in self.records)

    def files(self) -> Iterator[Path]:
        """The images' and the masks' files."""
        return (path for record in self.records for path in (record.image, record.mask))

    def rows(self) -> FileRows:
        """The images, to learn from without annotations."""
        return rows_of_files(self.images())

    @cached_property
    def digests(self) -> Digests:
        """(N, 32): of what the images' files hold, as :func:`evalsuite.data.digests.digests`."""
        return of_paths(list(self.images()))

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of the classes and of what the images' and the masks' files hold, wherever these lie."""
        masks = of_paths([record.mask for record in self.records])
        return joined([self.annotations], np.concatenate([self.digests, masks]))

    def without(self, unreadable: Mapping[int, ImageError]) -> SegmentationSet:
        """The set without these records, with a fingerprint of its own."""
        kept = tuple(record for row, record in enumerate(self.records) if row not in unreadable)
        mark = joined([self.annotations, f"without {sorted(unreadable)}"])
        gone = (*self.unreadable, *unreadable.values())
        return dataclasses.replace(self, records=kept, annotations=mark, unreadable=gone)

    def image(self, index: int) -> Bytes:
        """(H, W, 3) uint8 RGB, as large as its mask. Raises :class:`DataError` naming a file that does not decode."""
        record = self.records[index]
        return read_rgb(record.image, expect=record.size)

    def mask(self, index: int) -> Bytes:
        """(H, W) uint8: classes 0 to C-1, and IGNORE.

        Raises :class:`DataError` naming a file that does not decode, has another size than its image, or holds
        something that is no class.
        """
        record = self.records[index]
        return self.reader(record.mask, record.size)

    def limit(self, count: int | None) -> SegmentationSet:
        """At most ``count`` records (None: all), as :func:`evalsuite.data.draws.evenly`, with a fingerprint of its
        own."""
        rows = evenly(len(self), count)
        if rows is None:
            return self
        mark = joined([self.annotations, f"limit {count}"])
        return dataclasses.replace(self, records=tuple(self.records[row] for row in rows), annotations=mark)


def find(folder: Path, ending: str = "", suffixes: Sequence[str] = SUFFIXES) -> dict[str, Path]:
    """:func:`evalsuite.data.images.images_by_name`. Raises :class:`DataError` where two files have one name."""
    found = images_by_name(folder, ending, suffixes)
    for name, paths in found.items():
        if len(paths) > 1:
            raise DataError(
                f"{folder} holds two files named {name}",
                cause=f"{paths[0].name} and {paths[1].name}",
                fix="remove one of them",
            )
    return {name: path for name, (path,) in found.items()}


def pair_up(
    images: Mapping[str, Path],
    masks: Mapping[str, Path],
    faults: list[str] | None = None,
    names: Sequence[str] | None = None,
) -> list[Pair]:
    """Images and masks of one name, in the order of the images, or of ``names``, which then are all that is wanted.

    Without ``names``, names may differ in letter case and in how accents are encoded; or by a beginning or ending that
    all masks have (``a_mask.png`` of ``a.jpg``), where no mask has an image's own name.

    Raises :class:`DataError` for one without the other, and for a name without either; all such go to ``faults``
    where that is given.
    """
    if names is not None:
        images = {name: images[name] for name in dict.fromkeys(names) if name in images}
        masks = {name: masks[name] for name in dict.fromkeys(names) if name in masks}
    else:
        masks = _by_image(images, masks)
    lone = [f"image {path} has no mask" for name, path in images.items() if name not in masks]
    lone += [f"mask {path} has no image" for name, path in masks.items() if name not in images]
    lone += [
        f"{name} is listed, but has neither image nor mask" for name in names or () if name not in {**images, **masks}
    ]
    if lone and faults is None:
        raise DataError(
            lone[0],
            cause=f"{len(lone)} names are incomplete; an image and its mask have one name",
            fix="restore or remove them; evalsuite data verify lists them all",
        )
    if faults is not None:
        faults += lone
    return [Pair(name, path, masks[name]) for name, path in images.items() if name in masks]


def _by_image(images: Mapping[str, Path], masks: Mapping[str, Path]) -> dict[str, Path]:
    """Masks by the names of their images where they are called a little otherwise, else by their own."""
    if masks and images.keys().isdisjoint(masks):
        sample = min(masks)
        folder, _, stem = sample.rpartition("/")
        known = [name.rpartition("/") for name in images]
        inner = {own for home, _, own in known if home == folder and own in stem}
        marks = {(stem[: stem.index(own)], stem[stem.index(own) + len(own) :]) for own in inner}
        for before, after in sorted(marks, key=lambda mark: len("".join(mark))):
            named = {_without(name, before, after): path for name, path in masks.items()}
            if len(named) == len(masks) and named.keys() <= images.keys():
                return named
    alike = same_names(masks, images)
    return {alike.get(name, name): path for name, path in masks.items()}


def _without(name: str, before: str, after: str) -> str:
    folder, slash, stem = name.rpartition("/")
    return f"{folder}{slash}{stem.removeprefix(before).removesuffix(after)}"


def assemble(
    pairs: Sequence[Pair],
    reader: MaskReader,
    classes: Sequence[str],
    palette: Bytes | Sequence[Colour],
    *,
    name: str,
    split: str,
    warnings: Sequence[str] = (),
    faults: list[str] | None = None,
) -> SegmentationSet:
    """A set of these pairs: sizes are read and held to each other, nothing is decoded.

    Pairs with a file that is no image are ``unreadable``. Raises :class:`DataError` naming the first mask that does not
    fit its image. All such go to ``faults`` where that is given. Raises it too where no pair is left.
    """
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda pair: _opened(pair, reader), pairs))
    broken = [each for each in found if isinstance(each, DataError)]
    unreadable = tuple(error for error in broken if isinstance(error, ImageError))
    if faults is not None:
        faults += map(as_fault, broken)
    elif len(unreadable) < len(broken):
        raise next(error for error in broken if not isinstance(error, ImageError))
    whole = [each for each in found if not isinstance(each, DataError)]
    if not whole:
        raise DataError(
            f"split {split!r} of {name} has no usable pair",
            cause=f"{len(pairs)} were found, {len(broken)} of them broken"
            + (f"; {broken[0].problem}: {broken[0].cause}" if broken else ""),
            fix="evalsuite data verify lists what is wrong",
        )
    known: dict[bytes, bytes] = {}  # one copy of each
    palettes = {r.mask: known.setdefault(colours, colours) for r, colours in whole if colours is not None}
    table = [reader.key, *(f"class {label} {title}" for label, title in enumerate(classes))]
    return SegmentationSet(
        name=name,
        split=split,
        classes=tuple(classes),
        palette=np.array(palette, np.uint8).reshape(len(classes), 3),
        records=tuple(record for record, _ in whole),
        reader=reader,
        annotations=joined([*table, *(record.image_id for record, _ in whole)]),
        warnings=tuple(warnings),
        unreadable=unreadable,
        palettes=palettes,
    )


def _opened(pair: Pair, reader: MaskReader) -> tuple[Record, bytes | None] | DataError:
    """The record and its mask's palette; or what is wrong with it."""
    try:
        told = reader.size(pair.mask)
        height, width = size(pair.image, expect=told)
        if told is not None and told != (height, width):
            return unfitting(pair.mask, told, (height, width))
        return Record(*pair, height, width), reader.palette(pair.mask)
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"mask {pair.mask} cannot be read", cause=str(error), fix="restore the file from its source")


def check_pixels(train: SegmentationSet, learnt: Set[int], test: SegmentationSet, tested: Set[int]) -> None:
    """Raise :class:`DataError` unless there are pixels to learn from and to score on. ``learnt`` and ``tested`` are the
    values of the masks' pixels."""
    if len(learnt - {IGNORE}) < 2:
        only = [train.classes[label] for label in learnt - {IGNORE}]
        raise DataError(
            f"{train.title} has nothing to learn from",
            cause=f"every pixel of its masks is {only[0]}" if only else "every pixel of its masks is ignored",
            fix="check the masks, and what their numbers mean; with --limit, raise it",
        )
    if not tested - {IGNORE}:
        raise DataError(
            f"{test.title} has no pixel to judge by",
            cause="every pixel of its masks is ignored",
            fix="check the masks, and what their numbers mean; with --limit, raise it",
        )


def _refuse_palettes(palettes: Mapping[Path, bytes]) -> None:
    """Refuse masks read by number of which some number has two colours: an optimised palette, or one a file."""
    distinct = sorted(set(palettes.values()), key=len)
    if all(longest.startswith(each) for longest in distinct[-1:] for each in distinct):
        return
    seen: dict[int, tuple[bytes, Path]] = {}
    for path, colours in palettes.items():
        for number in _numbers_in(path):
            colour = colours[3 * number : 3 * number + 3]
            first, where = seen.setdefault(number, (colour, path))
            if colour and first and colour != first:
                raise DataError(
                    f"palettes differ: {where} and {path}",
                    cause=f"number {number} is of the colour {_first([tuple(first)])} in one and "
                    f"{_first([tuple(colour)])} in the other, and the classes are told by numbers",
                    fix="give the classes colours, a line a class in classes.txt: 128 64 128 road",
                )


def _numbers_in(mask: Path) -> list[int]:
    try:
        numbers: list[int] = np.unique(read_labels(mask).pixels).tolist()
    except ImageError:  # told of by whoever reads it
        return []
    return numbers


@dataclass(frozen=True)
class SegmentationSource(Source[SegmentationSet]):
    """What the layouts of images and masks share: roles by the names of the splits, loading, verification.

    ``official``: the classes are those of the data set that made the layout known; else the data tell, unless
    ``images_only`` are wanted.
    """

    official: bool = True
    images_only: bool = False

    def generic(self) -> SegmentationSource:
        return dataclasses.replace(self, official=False)

    @abstractmethod
    def read(self, path: Path, split: str, faults: list[str] | None = None) -> SegmentationSet:
        """Read a split; what is wrong with a file is raised, or goes to ``faults`` where that is given."""

    def load(self, path: Path, split: str) -> SegmentationSet:
        return self.read(path, split)

    def learning(self, path: Path) -> Learning:
        """The images, whatever the classes are."""
        return by_roles(dataclasses.replace(self, images_only=True), path)

    def roles(self, path: Path) -> Mapping[str, str]:
        splits = self.splits(path)
        found: dict[str, str] = {name: name for name in ("train", "val", "test") if name in splits}
        if "val" not in found and "test" in found:
            found["val"] = "test"
        if not {"train", "val"} <= found.keys():
            raise DataError(
                f"{path} has nothing to learn from or nothing to score on",
                cause=f"its splits with masks are {', '.join(splits) or 'none'}",
                fix=f"complete the tree: {', '.join(self.tree.split())}",
            )
        return found

    def check(self, train: SegmentationSet, test: SegmentationSet) -> None:
        """Raise :class:`DataError` unless the sets have the same classes, more than one, told alike in all masks."""
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes)) or ["their order"]
            raise DataError(
                f"{train.title} and {test.title} do not have the same classes",
                cause=f"only in one of them: {_first(odd)}",
                fix="name the same classes in both",
            )
        if len(train.classes) < 2:
            raise DataError(
                f"{train.title} has a single class",
                cause=f"it is {train.classes[0]}, and there is nothing to tell it apart from",
                fix="name the background as a class, too",
            )
        _refuse_palettes({**train.palettes, **test.palettes})

    def leaks(self, one: str, other: str) -> bool:
        """Whether an image must not be in both splits."""
        return one != other

    def verify(self, path: Path, progress: Progress | None = None, workers: int | None = None) -> Report:
        report = Report(self.name, path)
        sets: dict[str, SegmentationSet] = {}
        for split in self.splits(path):
            with report.examining():
                sets[split] = self.read(path, split, report.faults)
        seen = _survey(report, sets, self.leaks, progress or Progress(quiet=True), workers)
        with report.examining():
            roles = self.roles(path)
            if {roles["train"], roles.get("test", roles["val"])} <= sets.keys():  # else it is told why one is not
                train, test = self.pair(path, loaded=sets)
                check_pixels(train, seen[train.split], test, seen[test.split])
        report.faults[:] = dict.fromkeys(report.faults)  # trainval repeats what train and val told
        report.notes[:] = dict.fromkeys(report.notes)
        return report

    def no_split(self, path: Path, split: str) -> DataError:
        """The refusal of a split that is not there."""
        return DataError(
            f"{path} has no split {split!r}",
            cause=f"its splits with masks are {', '.join(self.splits(path)) or 'none'}",
            fix=f"choose one of them, or complete the tree: {', '.join(self.tree.split())}",
        )


def _survey(
    report: Report,
    sets: Mapping[str, SegmentationSet],
    leaks: Callable[[str, str], bool],
    progress: Progress,
    workers: int | None,
) -> dict[str, Set[int]]:
    """Decode every image and mask of ``sets``; add counts, faults and notes to ``report``. Returns the values of each
    split's masks."""
    rows = [(split, part, i) for split, part in sets.items() for i in range(len(part))]
    pixels = {split: np.zeros(256, np.int64) for split in sets}
    digests: dict[Path, str] = {}
    with ThreadPoolExecutor(workers) as pool, progress.track("decode", len(rows)) as meter:
        examined = pool.map(lambda row: _examine(*row[1:]), rows)
        for done, ((split, part, i), (found, counts, faults)) in enumerate(zip(rows, examined, strict=True), 1):
            report.faults += [fault for fault in faults if fault not in report.faults]
            pixels[split] += counts
            if found:
                digests[part.records[i].image] = found
            meter.update(done)
    for split, part in sets.items():
        _count(report, split, part, pixels[split])
    duplicates(report, {s: [r.image for r in part.records] for s, part in sets.items()}, digests, leaks)
    return {split: set(np.flatnonzero(counts).tolist()) for split, counts in pixels.items()}


def _examine(part: SegmentationSet, index: int) -> tuple[str, NDArray[np.int64], list[str]]:
    """The image's digest ("" where it cannot be read), its mask's pixels by label (256,), and what is wrong."""
    found, counts, faults = "", np.zeros(256, np.int64), []
    try:
        part.image(index)
        found = digest(part.records[index].image)
    except DataError as error:
        faults.append(as_fault(error))
    try:
        counts = np.bincount(part.mask(index).ravel(), minlength=256)
    except DataError as error:
        faults.append(as_fault(error))
    return found, counts, faults


def _count(report: Report, split: str, part: SegmentationSet, pixels: NDArray[np.int64]) -> None:
    per_class = dict(zip(part.classes, pixels[: len(part.classes)].tolist(), strict=True))
    report.counts[split] = {
        "images": len(part), "pixels": int(pixels.sum()), "ignored": int(pixels[IGNORE]), "classes": per_class,
    }  # fmt: skip
    report.notes += part.warnings
    if turns := turn_note((record.image, record.size) for record in part.records):
        report.notes.append(f"{split}: {turns}")
    absent = [name for name, count in per_class.items() if not count]
    if absent and pixels.any():
        report.notes.append(f"{split}: {len(absent)} of {len(per_class)} classes have no pixel: {_first(absent)}")


def voc_palette(count: int) -> Bytes:
    """The first ``count`` colours (count, 3) of PASCAL VOC, which spread the bits of a number over the channels:
    the function ``VOClabelcolormap`` of the development kit."""
    numbers = np.arange(count)
    palette = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette
