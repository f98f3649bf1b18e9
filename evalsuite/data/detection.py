"""Detection data in memory: records, sets of them, and what every layout's reader does with boxes."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval import mask as mask_api
from numpy.typing import NDArray

from evalsuite.data import Report, Source, as_fault
from evalsuite.data.digests import Digests, joined, of_paths
from evalsuite.data.draws import drawn, evenly
from evalsuite.data.images import digest, duplicates, read_rgb, turn_note
from evalsuite.data.learning import FileRows, rows_of_files
from evalsuite.data.reading import left_out
from evalsuite.errors import DataError, ImageError
from evalsuite.progress import Progress

__all__ = [
    "Boxes",
    "DetectionSet",
    "DetectionSource",
    "Image",
    "Record",
    "agree",
    "assemble",
    "check",
    "survey",
    "union",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# COCO rounds x and width to two decimals each, so a box may end this far outside without being wrong.
_ROUNDING = 0.02


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """One image and its objects.

    ``boxes`` (N, 4) float64 are x1, y1, x2, y2 in pixels, continuous and from 0: the whole image is (0, 0,
    width, height). ``labels`` (N,) int64 index the set's classes. ``crowd`` and ``difficult`` (N,) bool
    mark objects that scoring ignores. ``area`` (N,) float64 is in square pixels: of the object where the
    annotation tells, else of its box. ``masks`` are N COCO segmentations (a list of flat x, y polygons, or
    an RLE dictionary), None where the set has none. ``image_id`` is unique in the set.
    """

    image_id: int
    path: Path
    height: int
    width: int
    boxes: Floats
    labels: Ints
    crowd: Bools
    difficult: Bools
    area: Floats
    masks: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DetectionSet:
    """A split: its classes and records.

    ``category_ids`` are the classes' ids in the original files, in the order of ``classes``; gaps are fine.
    ``annotations`` is a sha256 of what is said of the images, and of their names.
    ``degenerate`` names the image of each box that was left out because it has no inside, ``clipped`` of
    each that was cut to its image. ``unreadable`` says why images are left out.
    """

    name: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: tuple[Record, ...]
    annotations: str
    degenerate: tuple[str, ...] = ()
    clipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unreadable: tuple[ImageError, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def title(self) -> str:
        return self.name

    def images(self) -> Iterator[Path]:
        """The images' files."""
        return (record.path for record in self.records)

    files = images

    def rows(self) -> FileRows:
        """The images, to learn from without annotations."""
        return rows_of_files(self.images())

    @cached_property
    def digests(self) -> Digests:
        """(N, 32): of what the images' files hold, as :func:`evalsuite.data.digests.digests`."""
        return of_paths(list(self.images()))

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of the annotations and of what the images' files hold, wherever these lie."""
        return joined([self.annotations], self.digests)

    def without(self, unreadable: Mapping[int, ImageError]) -> DetectionSet:
        """The set without these records, with a fingerprint of its own."""
        kept = tuple(record for row, record in enumerate(self.records) if row not in unreadable)
        mark = joined([self.annotations, f"without {sorted(unreadable)}"])
        gone = (*self.unreadable, *unreadable.values())
        return dataclasses.replace(self, records=kept, annotations=mark, unreadable=gone)

    @property
    def has_masks(self) -> bool:
        """Whether every object has a mask."""
        return bool(self.records) and all(r.masks is not None for r in self.records)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the reader had to mend, in sentences."""
        told = list(self.notes)
        if self.degenerate:
            told.append(f"{self.name}: left out {len(self.degenerate)} boxes without an inside")
        if self.clipped:
            told.append(f"{self.name}: cut {len(self.clipped)} boxes to their images")
        if self.unreadable:
            told.append(f"{self.name}: {left_out(self.unreadable)}")
        return tuple(told)

    def limit(self, count: int | None) -> DetectionSet:
        """At most ``count`` records (None: all), as :func:`evalsuite.data.draws.evenly`, with a fingerprint of its
        own."""
        rows = evenly(len(self), count)
        if rows is None:
            return self
        mark = joined([self.annotations, f"limit {count}"])
        return dataclasses.replace(self, records=tuple(self.records[row] for row in rows), annotations=mark)

    def drawn(self, split: str) -> DetectionSet:
        """``train`` or ``test`` of data without splits: one image in five is tested on, by the hash of its name."""
        names = [record.path.name for record in self.records]
        kept = tuple(drawn(self.records, names, split))
        return dataclasses.replace(self, name=split, records=kept, annotations=joined([self.annotations, split]))

    def decode(self, record: Record) -> torch.Tensor:
        """The image as (3, H, W) uint8 RGB, as large as annotated.

        Raises :class:`DataError` naming the file if it does not decode or is not as large as annotated.
        """
        pixels = read_rgb(record.path, expect=(record.height, record.width))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def rles(self, record: Record) -> list[dict[str, Any]]:
        """The masks as N compressed COCO RLE dictionaries ``{"size": [H, W], "counts": bytes}``.

        Raises :class:`DataError` naming the image if one cannot be drawn, :class:`ValueError` if the set
        has none.
        """
        if record.masks is None:
            raise ValueError(f"{self.name} has no masks")
        return [_rle(mask, record) for mask in record.masks]

    def masks(self, record: Record) -> NDArray[np.uint8]:
        """The masks as (N, H, W) uint8 of 0 and 1. Raises as :meth:`rles`."""
        rles = self.rles(record)
        if not rles:
            return np.zeros((0, record.height, record.width), np.uint8)
        return np.ascontiguousarray(mask_api.decode(rles).transpose(2, 0, 1))

    def counts(self) -> dict[str, Any]:
        """Images, boxes, boxes set aside, and boxes per class."""
        labels = np.concatenate([np.zeros(0, np.int64), *(r.labels for r in self.records)])
        per_class = np.bincount(labels, minlength=len(self.classes))
        return {
            "images": len(self.records),
            "without objects": sum(len(r) == 0 for r in self.records),
            "boxes": len(labels),
            "crowd": sum(int(r.crowd.sum()) for r in self.records),
            "difficult": sum(int(r.difficult.sum()) for r in self.records),
            "degenerate": len(self.degenerate),
            "clipped": len(self.clipped),
            "classes": {name: int(n) for name, n in zip(self.classes, per_class, strict=True)},
        }


@dataclass(frozen=True)
class DetectionSource(Source[DetectionSet]):
    """What the layouts of boxes share.

    ``official``: the classes and splits are those of the data set that made the layout known; else the data tell.
    """

    official: bool = True

    def generic(self) -> DetectionSource:
        return dataclasses.replace(self, official=False)

    @abstractmethod
    def load(self, path: Path, split: str) -> DetectionSet: ...

    def check(self, train: DetectionSet, test: DetectionSet) -> None:
        check(train, test)

    def leaks(self, one: str, other: str) -> bool:
        """Whether an image must not be in both splits."""
        return one != other


class Image(NamedTuple):
    """An image as a layout's annotation tells it."""

    image_id: int
    path: Path
    height: int
    width: int


class Boxes(NamedTuple):
    """All objects of a split as columns: ``owner`` (N,) is the position of the image each belongs to."""

    owner: Ints
    boxes: Floats
    labels: Ints
    crowd: Bools
    difficult: Bools
    area: Floats
    masks: Sequence[Any] | None = None


def assemble(images: Sequence[Image], columns: Boxes, **about: Any) -> DetectionSet:
    """A set from columns: cuts boxes to their images, leaves out those without an inside, groups by image.

    ``about`` are the other fields of :class:`DetectionSet`. An area that is not a number becomes the box's.
    """
    limits = np.array([(i.width, i.height) * 2 for i in images], np.float64).reshape(-1, 4)
    cut = np.clip(columns.boxes, 0.0, limits[columns.owner])
    outside: Bools = np.any(np.abs(cut - columns.boxes) > _ROUNDING, axis=1)
    boxes = np.where(outside[:, None], cut, columns.boxes)
    sides = boxes[:, 2:] - boxes[:, :2]
    inside: Bools = np.all(sides > 0, axis=1)
    area = np.where(np.isnan(columns.area), sides.prod(axis=1), columns.area)
    order = np.argsort(columns.owner, kind="stable")
    order = order[inside[order]]
    ends = np.cumsum(np.bincount(columns.owner[order], minlength=len(images)))
    by_image = [c[order] for c in (boxes, columns.labels, columns.crowd, columns.difficult, area)]
    masks = None if columns.masks is None else [columns.masks[i] for i in order.tolist()]
    records = []
    start = 0
    for image, end in zip(images, ends.tolist(), strict=True):
        part: list[Any] = [column[start:end] for column in by_image]
        part.append(None if masks is None else tuple(masks[start:end]))
        records.append(Record(image.image_id, image.path, image.height, image.width, *part))
        start = end
    named = [[images[i].path.name for i in columns.owner[which]] for which in (~inside, outside & inside)]
    return DetectionSet(records=tuple(records), degenerate=tuple(named[0]), clipped=tuple(named[1]), **about)


def agree(*sets: DetectionSet) -> None:
    """Raise :class:`DataError` unless all sets have the same classes in the same order, by the same ids."""
    for other in sets[1:]:
        if (other.classes, other.category_ids) != (sets[0].classes, sets[0].category_ids):
            raise _differ(sets[0], other)


def _differ(first: DetectionSet, other: DetectionSet) -> DataError:
    odd = sorted(set(first.classes) ^ set(other.classes)) or ["order or ids of the same names"]
    return DataError(
        f"{first.name} and {other.name} do not have the same classes",
        cause=f"they differ in {', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}",
        fix="write the same categories into both",
    )


def check(train: DetectionSet, test: DetectionSet, masks: bool = False) -> None:
    """Raise :class:`DataError` unless a detector (and its ``masks``) can learn from one and be scored on the other."""
    if train.classes != test.classes:
        raise _differ(train, test)
    for part, what, ignored in (
        (train, "learn from", [r.crowd for r in train.records]),
        (test, "score on", [r.crowd | r.difficult for r in test.records]),
    ):
        if all(each.all() for each in ignored):
            count = sum(map(len, ignored))
            raise DataError(
                f"{part.name} has no object to {what}",
                cause=f"its {len(ignored)} images have "
                + (f"{count} objects, all of them crowds or difficult" if count else "no annotation"),
                fix="annotate objects in it, or give another split; with --limit, raise it",
            )
        if masks and not part.has_masks:
            raise DataError(
                f"{part.name} has no masks",
                cause="; ".join(part.notes) or "its objects have boxes but no segmentation",
                fix="train boxes alone: --set masks=false",
            )


def union(name: str, sets: Sequence[DetectionSet]) -> DetectionSet:
    """All records of several sets with the same classes, in order.

    Image ids are kept where they are unique over all sets, else numbered from 1. Raises :class:`DataError` as
    :func:`agree`.
    """
    if len(sets) == 1:
        return dataclasses.replace(sets[0], name=name)
    agree(*sets)
    records = [record for part in sets for record in part.records]
    if len({r.image_id for r in records}) < len(records):
        records = [dataclasses.replace(r, image_id=i) for i, r in enumerate(records, 1)]
    return dataclasses.replace(
        sets[0],
        name=name,
        records=tuple(records),
        annotations=joined(part.annotations for part in sets),
        degenerate=tuple(chain.from_iterable(part.degenerate for part in sets)),
        clipped=tuple(chain.from_iterable(part.clipped for part in sets)),
        notes=tuple(chain.from_iterable(part.notes for part in sets)),
        unreadable=tuple(chain.from_iterable(part.unreadable for part in sets)),
    )


def survey(
    report: Report,
    sets: Mapping[str, DetectionSet],
    leaks: Callable[[str, str], bool],
    progress: Progress | None = None,
    workers: int | None = None,
    masks: bool = True,
) -> Report:
    """Decode every image and draw every mask of ``sets``; add counts, faults and notes to ``report``.

    The same file in two splits is a fault if ``leaks(split, other)`` says so, a mask that cannot be drawn if ``masks``
    are wanted. Decoding releases the
    interpreter lock, so threads keep all cores busy.
    """
    for split, part in sets.items():
        report.counts[split] = part.counts()
        report.notes += [f"{split}: {name}: a box has no inside and is left out" for name in part.degenerate]
        report.notes += [f"{split}: {name}: a box leaves its image and is cut" for name in part.clipped]
        report.notes += part.notes
        if turns := turn_note((record.path, (record.height, record.width)) for record in part.records):
            report.notes.append(f"{split}: {turns}")
    unique = {record.path: (part, record) for part in sets.values() for record in part.records}
    digests: dict[Path, str] = {}
    progress = progress or Progress(quiet=True)
    with ThreadPoolExecutor(workers) as pool, progress.track("decode", len(unique)) as meter:
        examined = pool.map(_examine, unique.values())
        for done, (path, (found, faults, undrawn)) in enumerate(zip(unique, examined, strict=True), 1):
            report.faults += faults + (undrawn if masks else [])
            report.notes += [] if masks else undrawn
            if found:
                digests[path] = found
            meter.update(done)
    paths = {split: [record.path for record in part.records] for split, part in sets.items()}
    duplicates(report, paths, digests, leaks)
    return report


def _examine(item: tuple[DetectionSet, Record]) -> tuple[str, list[str], list[str]]:
    """The file's digest ("" where it cannot be read), and what is wrong with the image and with its masks."""
    part, record = item
    found, faults, undrawn = "", [], []
    try:
        part.decode(record)
        found = digest(record.path)
    except DataError as error:
        faults.append(as_fault(error))
    try:
        if record.masks is not None:
            part.rles(record)
    except DataError as error:
        undrawn.append(as_fault(error))
    return found, faults, undrawn


def _rle(mask: Any, record: Record) -> dict[str, Any]:
    """One segmentation as compressed RLE; refuses polygons so long that drawing them would exhaust memory."""
    height, width = record.height, record.width
    try:
        if isinstance(mask, list):
            flat = np.concatenate(mask)
            if not (np.isfinite(flat).all() and np.abs(flat).max() <= 10 * max(height, width)):
                raise ValueError("a polygon lies far outside")
            rle = mask_api.merge(mask_api.frPyObjects(mask, height, width))
        elif isinstance(mask["counts"], list):
            rle = mask_api.frPyObjects(mask, height, width)
            mask_api.decode(rle)  # this is where runs that leave the image are refused
        else:
            rle = {"size": [height, width], "counts": mask["counts"].encode("ascii")}
            mask_api.decode(rle)
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise DataError(
            f"a mask of image {record.path} cannot be drawn",
            cause=str(error),
            fix="correct or remove its segmentation",
        ) from error
    return {"size": [height, width], "counts": rle["counts"]}
