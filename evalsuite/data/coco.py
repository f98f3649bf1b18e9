"""COCO JSON: instances with polygons, run-length masks, crowds and category ids with gaps.

Format: https://cocodataset.org/#format-data. Boxes are [x, y, width, height] in continuous pixels from 0.
"""

from __future__ import annotations

import codecs
import gc
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic_core
from numpy.typing import NDArray

from evalsuite.data import Report, Source
from evalsuite.data.detection import Boxes, DetectionSet, Image, agree, assemble, survey
from evalsuite.data.images import fingerprint
from evalsuite.errors import DataError

if TYPE_CHECKING:
    from evalsuite.progress import Progress

__all__ = ["Coco", "read"]

_PREFIX = "instances_"
_LARGEST_SIDE = 65_535  # what a JPEG can have; masks are allocated by what the file says
_ESCAPES = re.compile(r"(^|/)\.\.(/|$)|^/|\\|^[A-Za-z]:|\0")
_FIX = "give a COCO instances file: https://cocodataset.org/#format-data"


@dataclass(frozen=True)
class Coco(Source[DetectionSet]):
    """COCO detection. ``official``: its splits are train2017 and val2017; else those that are there."""

    name = "coco"
    tree = (
        "coco/annotations/instances_train2017.json\n"
        "coco/annotations/instances_val2017.json\n"
        "coco/train2017/*.jpg\n"
        "coco/val2017/*.jpg"
    )
    homepage = "https://cocodataset.org"
    licence = "annotations CC BY 4.0; images under the terms of their authors on Flickr"
    citation = "Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014"

    official: bool = True

    def generic(self) -> Coco:
        return Coco(official=False)

    def locate(self, root: Path | None) -> Path:
        for path in () if root is None else (root / "coco", root):
            if any((path / "annotations").glob(f"{_PREFIX}*.json")):
                return path
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        files = (path / "annotations").glob(f"{_PREFIX}*.json")
        return tuple(sorted(file.stem.removeprefix(_PREFIX) for file in files))

    def roles(self, path: Path) -> Mapping[str, str]:
        if self.official:
            return {"train": "train2017", "val": "val2017"}
        found = self.splits(path)
        roles = {}
        for role in ("train", "val", "test"):
            fitting = [name for name in found if name.startswith(role)]
            if len(fitting) > 1:
                raise DataError(
                    f"which split of {path} is {role}?",
                    cause=f"several fit: {', '.join(fitting)}",
                    fix="leave one of them in annotations/, or link the wanted into a folder of their own",
                )
            if fitting:
                roles[role] = fitting[0]
        if "val" not in roles and "test" in roles:
            roles["val"] = roles["test"]
        if not {"train", "val"} <= roles.keys():
            raise DataError(
                f"{path} has nothing to learn from or nothing to score on",
                cause=f"its splits are {', '.join(found)}",
                fix="name the files annotations/instances_train*.json and annotations/instances_val*.json",
            )
        return roles

    def load(self, path: Path, split: str) -> DetectionSet:
        return read(*self._files(path, split), split)

    def verify(self, path: Path, progress: Progress | None = None, workers: int | None = None) -> Report:
        report = Report(self.name, path)
        sets: dict[str, DetectionSet] = {}
        try:
            for split in dict.fromkeys(self.roles(path).values()):
                try:
                    sets[split] = read(*self._files(path, split), split, report.faults)
                except DataError as error:
                    report.faults.append(f"{error.problem}: {error.cause}")
            if sets:
                agree(*sets.values())
        except DataError as error:
            report.faults.append(f"{error.problem}: {error.cause}")
        return survey(report, sets, lambda one, other: one != other, progress, workers)

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        from evalsuite.data.demo import write_coco

        return write_coco(root / "coco", seed, images)

    def _files(self, path: Path, split: str) -> tuple[Path, Path]:
        """The annotation file of a split and the folder of its images."""
        found = self.splits(path)
        file = path / "annotations" / f"{_PREFIX}{split}.json"
        if split not in found:
            raise DataError(
                f"COCO split {split!r} is missing",
                cause=f"{file} is not there; found: {', '.join(found) or 'none'}",
                fix=f"complete the tree: {', '.join(self.tree.split())}",
            )
        for folder in (path / split, path / "images" / split):
            if folder.is_dir():
                return file, folder
        raise DataError(
            f"the images of COCO split {split!r} are missing",
            cause=f"{path / split} is not a folder",
            fix=f"complete the tree: {', '.join(self.tree.split())}",
        )


def read(annotation: Path, folder: Path, name: str, faults: list[str] | None = None) -> DetectionSet:
    """Read a COCO instances file whose ``file_name`` are relative to ``folder``.

    Classes are in the order of their ids, as in COCO's own tools. ``iscrowd`` and ``area`` may be missing:
    0, and the box's. Masks are there if every annotation has a segmentation. Raises :class:`DataError`
    naming the file and the reason; images that are not there go to ``faults`` where that is given, and are
    left out.
    """
    document, content = _parse(annotation)
    with _explained(annotation):
        category_ids, classes = _categories(document)
        ids, images, lengths = _images(document, folder)
        columns, notes = _columns(document["annotations"], ids, images, category_ids)
    absent = [image.path for image, length in zip(images, lengths, strict=True) if length < 0]
    if absent and faults is None:
        raise DataError(
            f"image {absent[0]} is missing",
            cause=f"{annotation} names {len(images)} images, {len(absent)} of which are not there",
            fix="restore them, or evalsuite data verify to list them all",
        )
    files = [(image.path.relative_to(folder).as_posix(), n) for image, n in zip(images, lengths, strict=True)]
    found = assemble(
        images,
        columns,
        name=name,
        classes=classes,
        category_ids=category_ids,
        fingerprint=fingerprint([content], files),
        notes=tuple(f"{name}: {note}" for note in notes),
    )
    if absent and faults is not None:
        faults += [f"{name}: image {path} is missing" for path in absent]
        gone = set(absent)
        found = replace(found, records=tuple(r for r in found.records if r.path not in gone))
    return found


class _Odd(ValueError):
    """What is wrong with a file, in words that follow its name."""


@contextmanager
def _explained(annotation: Path) -> Iterator[None]:
    try:
        yield
    except _Odd as error:
        raise DataError(f"{annotation} is not valid COCO JSON", cause=str(error), fix=_FIX) from error


def _parse(annotation: Path) -> tuple[dict[str, Any], str]:
    """The document with polygons as float64 arrays, and the digest of its bytes.

    COCO's own training file has a million polygons: as lists of Python floats they would take gigabytes, and
    the garbage collector would walk over them again and again.
    """
    text = annotation.read_bytes()
    content = hashlib.sha256(text).hexdigest()
    collecting = gc.isenabled()
    gc.disable()
    try:
        document = pydantic_core.from_json(text.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        cause = "the file is empty" if not text else f"it is not JSON: {error}"
        raise DataError(f"{annotation} cannot be read", cause=cause, fix=_FIX) from error
    finally:
        if collecting:
            gc.enable()
    with _explained(annotation):
        if not isinstance(document, dict):
            raise _Odd(f"it holds a {type(document).__name__}, not an object with images and annotations")
        for key in ("images", "annotations", "categories"):
            if not isinstance(document.get(key), list):
                raise _Odd(f"it has no list {key!r}")
            if not all(isinstance(entry, dict) for entry in document[key]):
                raise _Odd(f"something in {key!r} is not an object")
    for entry in document["annotations"]:
        if isinstance(mask := entry.get("segmentation"), list):
            entry["segmentation"] = [_flat(polygon) for polygon in mask]
    return document, content


def _flat(polygon: Any) -> Any:
    """A flat list of numbers as float64; anything else as it is, to be refused where its place is known."""
    try:
        array = np.array(polygon)
    except (ValueError, OverflowError):
        return polygon
    return array.astype(np.float64, copy=False) if array.ndim == 1 and array.dtype.kind in "iuf" else polygon


def _column(
    entries: Sequence[dict[str, Any]], key: str, kind: str, what: str, default: float | None = None
) -> NDArray[Any]:
    """One field of all entries as an array. Refuses a missing or mistyped field, naming the entry."""
    kinds = {"an integer": "ib", "a number": "iufb"}[kind]
    try:
        if default is None:
            values = np.array([entry[key] for entry in entries] or [0])
        else:
            values = np.array([entry.get(key, default) for entry in entries] or [0])
        if values.ndim == 1 and values.dtype.kind in kinds:
            return values[: len(entries)].astype(np.int64 if kind == "an integer" else np.float64)
    except (KeyError, ValueError, OverflowError):
        pass
    types = (int,) if kind == "an integer" else (int, float)
    for place, entry in enumerate(entries):
        value = entry.get(key, default)
        if not isinstance(value, types) or (kind == "an integer" and abs(value) >= 2**63):
            told = f"has no {key!r}" if key not in entry else f"has {key!r} {_short(value)}, not {kind}"
            raise _Odd(f"{what} {entry.get('id', f'number {place}')} {told}")
    raise _Odd(f"some {what} has a {key!r} that is not {kind}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _categories(document: dict[str, Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    entries = document["categories"]
    if not entries:
        raise _Odd("it has no categories")
    ids = _column(entries, "id", "an integer", "category").tolist()
    for entry in entries:
        if not isinstance(entry.get("name"), str) or not entry["name"]:
            raise _Odd(f"category {entry['id']} has no name")
    names = [entry["name"] for entry in entries]
    for what, values in (("id", ids), ("name", names)):
        if twice := _twice(values):
            raise _Odd(f"category {what} {twice[0]!r} is there twice")
    pairs = sorted(zip(ids, names, strict=True))
    return tuple(i for i, _ in pairs), tuple(n for _, n in pairs)


def _images(document: dict[str, Any], folder: Path) -> tuple[NDArray[np.int64], list[Image], list[int]]:
    """Ids, images, and the files' lengths in bytes, -1 where a file is not there."""
    entries = document["images"]
    if not entries:
        raise _Odd("it has no images")
    ids, heights, widths = (_column(entries, key, "an integer", "image") for key in ("id", "height", "width"))
    if twice := _twice(ids.tolist()):
        raise _Odd(f"image id {twice[0]} is there twice")
    wrong = (np.minimum(heights, widths) < 1) | (np.maximum(heights, widths) > _LARGEST_SIDE)
    if wrong.any():
        first = int(wrong.argmax())
        raise _Odd(f"image {ids[first]} is said to have {widths[first]}x{heights[first]} pixels")
    images, lengths = [], []
    columns = zip(ids.tolist(), heights.tolist(), widths.tolist(), entries, strict=True)
    for image_id, height, width, entry in columns:
        file = entry.get("file_name")
        if not isinstance(file, str) or not file:
            raise _Odd(f"image {image_id} has no file_name")
        if _ESCAPES.search(file):
            raise _Odd(f"image {image_id} has the file_name {file!r}, which leads out of the image folder")
        images.append(Image(image_id, folder / file, height, width))
        lengths.append(_length(images[-1].path))
    return ids, images, lengths


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


def _columns(
    entries: list[dict[str, Any]], ids: NDArray[np.int64], images: list[Image], category_ids: tuple[int, ...]
) -> tuple[Boxes, list[str]]:
    owner = _position(_column(entries, "image_id", "an integer", "annotation"), ids, entries, "image")
    known = np.array(category_ids, np.int64)
    labels = _position(_column(entries, "category_id", "an integer", "annotation"), known, entries, "category")
    boxes = _boxes(entries)
    boxes[:, 2:] += boxes[:, :2]
    crowd = _column(entries, "iscrowd", "an integer", "annotation", default=0).astype(bool)
    area = _column(entries, "area", "a number", "annotation", default=float("nan"))
    if np.isinf(area).any():
        raise _Odd(f"annotation {entries[int(np.isinf(area).argmax())].get('id')} has an infinite area")
    present = [_has_mask(entry, images[i]) for entry, i in zip(entries, owner.tolist(), strict=True)]
    notes = []
    if any(present) and not all(present):
        lacking = f"{present.count(False)} of {len(present)} annotations have no segmentation"
        notes.append(f"{lacking}: masks are not used")
    masks = [entry["segmentation"] for entry in entries] if all(present) and present else None
    return Boxes(owner, boxes, labels, crowd, np.zeros_like(crowd), area, masks), notes


def _boxes(entries: list[dict[str, Any]]) -> NDArray[np.float64]:
    try:
        boxes = np.array([entry["bbox"] for entry in entries] or np.zeros((0, 4)))
        if boxes.shape == (len(entries), 4) and boxes.dtype.kind in "iuf" and np.isfinite(boxes).all():
            return boxes.astype(np.float64)
    except (KeyError, ValueError, OverflowError):
        pass
    for place, entry in enumerate(entries):
        box: Any = entry.get("bbox")
        numbers = isinstance(box, list) and all(type(v) in (int, float) and abs(v) < 1e18 for v in box)
        if not (numbers and len(box) == 4):
            name = entry.get("id", f"number {place}")
            raise _Odd(f"annotation {name} has the bbox {_short(box)}, not four numbers")
    raise _Odd("some annotation has a bbox that is not four numbers")


def _position(values: NDArray[Any], known: NDArray[np.int64], entries: list[dict[str, Any]], what: str) -> NDArray[Any]:
    """Where each value stands in ``known``; refuses one that is not there, naming the annotation."""
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)
    found: NDArray[Any] = order[place]
    odd = known[found] != values
    if odd.any():
        first = int(odd.argmax())
        name = entries[first].get("id", f"number {first}")
        such = f" ({int(odd.sum())} such)"
        raise _Odd(f"annotation {name} names {what} {values[first]}, which is not there{such}")
    return found


def _has_mask(entry: dict[str, Any], image: Image) -> bool:
    """Whether an annotation has a segmentation; refuses one that is not COCO."""
    mask = entry.get("segmentation")
    if not mask:
        return False
    if isinstance(mask, list):
        good = all(isinstance(p, np.ndarray) and len(p) >= 6 and len(p) % 2 == 0 for p in mask)
        told = "a polygon that is not a list of at least three points"
    elif isinstance(mask, dict):
        counts = mask.get("counts")
        good = isinstance(counts, str) or _runs(counts, image.height * image.width)
        good = good and mask.get("size") == [image.height, image.width]
        told = f"an RLE that is not of its image, {image.height}x{image.width}"
    else:
        good, told = False, "a segmentation that is neither polygons nor RLE"
    if not good:
        raise _Odd(f"annotation {entry.get('id')} has {told}")
    return True


def _runs(counts: Any, pixels: int) -> bool:
    """Whether these are run lengths that fill the image."""
    return isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts) and sum(counts) == pixels


def _twice(values: Sequence[Any]) -> list[Any]:
    seen: set[Any] = set()
    return [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]
