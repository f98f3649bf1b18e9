"""COCO JSON: instances with polygons, run-length masks, crowds and category ids with gaps.

Format: https://cocodataset.org/#format-data. Boxes are [x, y, width, height] in continuous pixels from 0.
"""

from __future__ import annotations

import codecs
import gc
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pydantic_core
from numpy.typing import NDArray

from evalsuite.data import Report, split_role, split_roles
from evalsuite.data.detection import Boxes, DetectionSet, DetectionSource, Image, assemble, check, survey
from evalsuite.data.digests import joined
from evalsuite.data.images import (
    DRAWN,
    clutter,
    list_images,
    not_utf8,
    relative_name,
    same_names,
    size,
)
from evalsuite.errors import DataError
from evalsuite.files import read_regular

if TYPE_CHECKING:
    from evalsuite.progress import Progress

__all__ = ["Coco", "read"]

_PREFIX = "instances_"
_ROBOFLOW = "_annotations.coco.json"
_NUMBERED = {"image": ("images", "image_id"), "category": ("categories", "category_id")}
_WHOLE = ("annotations.json", "instances.json", "labels.json", "result.json", _ROBOFLOW)  # as tools export them
_LARGEST_SIDE = 65_535  # what a JPEG can have; masks are allocated by what the file says
_LARGEST_ID = 2**53  # up to which a float is every whole number
_NO_MASK = "no segmentation"
_FIX = "give a COCO instances file: https://cocodataset.org/#format-data"


class _Part(NamedTuple):
    """A split on disk: its annotation file, and where its images may lie, the likeliest folder first."""

    file: Path
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class Coco(DetectionSource):
    """COCO detection. ``official``: its splits are train2017 and val2017; else those that are there, in COCO's own
    tree, in Roboflow's (``train/_annotations.coco.json`` beside the images) or CVAT's (``annotations`` and ``images``).

    A single annotation file that names no split is of all images: one in five is tested on, by the hash of its name.
    """

    name = "coco"
    serves = ("detect",)
    own_tree = "annotations/instances_train.json\nannotations/instances_val.json\ntrain/*.jpg\nval/*.jpg"
    tree = (
        "coco/annotations/instances_train2017.json\n"
        "coco/annotations/instances_val2017.json\n"
        "coco/train2017/*.jpg\n"
        "coco/val2017/*.jpg"
    )
    homepage = "https://cocodataset.org"
    licence = "annotations CC BY 4.0; images under the terms of their authors on Flickr"
    citation = "Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014"

    def locate(self, root: Path | None) -> Path:
        for path in () if root is None else (root / "coco", root):
            if any((path / "annotations").glob(f"{_PREFIX}*.json")) or (not self.official and _parts(path)):
                return path
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        parts = _parts(path)
        return DRAWN if _whole(parts) else tuple(sorted(parts))

    def roles(self, path: Path) -> Mapping[str, str]:
        if self.official:
            return {"train": "train2017", "val": "val2017"}
        found = self.splits(path)
        roles = {}
        for role in ("train", "val", "test"):
            fitting = [name for name in found if _is_of(name, role)]
            if len(fitting) > 1:
                raise DataError(
                    f"which split of {path} is {role}?",
                    cause=f"several fit: {', '.join(fitting)}",
                    fix="leave one of them in annotations/, or link the wanted into a folder of their own",
                )
            if fitting:
                roles[role] = fitting[0]
        if "test" in roles and "val" in roles and self._without_annotations(path, roles["test"]):
            del roles["test"]
        if "val" not in roles and "test" in roles:
            roles["val"] = roles["test"]
        if not {"train", "val"} <= roles.keys():
            raise DataError(
                f"{path} has nothing to learn from or nothing to score on",
                cause=f"its splits are {', '.join(found)}",
                fix="name the files annotations/instances_train*.json and annotations/instances_val*.json",
            )
        return roles

    def _without_annotations(self, path: Path, split: str) -> bool:
        part = _parts(path).get(split)
        return part is not None and _withheld(part.file, part.file.stat().st_mtime_ns)

    def load(self, path: Path, split: str) -> DetectionSet:
        return self._read(path, split)

    def verify(self, path: Path, progress: Progress | None = None, workers: int | None = None) -> Report:
        report = Report(self.name, path)
        sets: dict[str, DetectionSet] = {}
        with report.examining():
            for split in dict.fromkeys(self.roles(path).values()):
                with report.examining():
                    sets[split] = self._read(path, split, report.faults)
            check(*self.pair(path, loaded=sets), masks=self.official)
            left = [name for name in self.splits(path) if name not in sets and self._without_annotations(path, name)]
            report.notes += [f"{name} has no annotations, and is left out" for name in left]
        report.faults[:] = dict.fromkeys(report.faults)  # two splits of one file tell the same
        return survey(report, sets, self.leaks, progress, workers, masks=self.official)

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        from evalsuite.data.demo import write_coco

        return write_coco(root / "coco", seed, images)

    def _read(self, path: Path, split: str, faults: list[str] | None = None) -> DetectionSet:
        parts = _parts(path)
        whole = _whole(parts)
        part = whole if whole and split in DRAWN else parts.get(split)
        if part is None:
            raise DataError(
                f"COCO split {split!r} is missing",
                cause=f"there is no annotation file of it in {path}; found: {', '.join(self.splits(path)) or 'none'}",
                fix=f"complete the tree: {', '.join(self.tree.split())}",
            )
        folders = [folder for folder in part.folders if folder.is_dir()]
        if not folders:
            raise DataError(
                f"the images of COCO split {split!r} are missing",
                cause=f"{part.folders[0]} is not a folder",
                fix=f"complete the tree: {', '.join(self.tree.split())}",
            )
        folders.append(path)  # of names that begin with such a folder
        found = read(part.file, folders, split, faults, lambda: _used([each.file for each in parts.values()]))
        return found.drawn(split) if part is whole else found


def _parts(path: Path) -> dict[str, _Part]:
    """The splits in COCO's tree, else in Roboflow's; else whatever annotation files there are, by name."""
    inner = path / "annotations"
    found = {
        name: _Part(file, (path / name, path / "images" / name, path / "images"))
        for file in sorted(inner.glob(f"{_PREFIX}*.json"))
        for name in [file.stem.removeprefix(_PREFIX)]
    }
    if not found:
        found = _in_split_folders(path)
    if not found:
        named = split_roles(file.stem for file in path.glob("*.json"))
        files = [*sorted(inner.glob("*.json")), *(path / name for name in _WHOLE if (path / name).is_file())]
        files += [file for file in sorted(path.glob("*.json")) if not inner.is_dir() and file.stem in named]
        places = (path / "images", path / "data", path / "JPEGImages", path)
        found = {f.stem: _Part(f, (path / f.stem, path / "images" / f.stem, *places)) for f in files}
    return found


def _in_split_folders(path: Path) -> dict[str, _Part]:
    """Splits of which each has its folder with one annotation file in it, beside the images or a folder of them."""
    folders = {p.name: p for p in sorted(path.iterdir()) if p.is_dir() and not clutter(p.name)} if path.is_dir() else {}
    roles = split_roles(folders)
    found = {}
    for name, folder in folders.items():
        files = [f for f in sorted(folder.glob("*.json")) if not clutter(f.name)]
        roboflow = [f for f in files if f.name == _ROBOFLOW]
        if roboflow or (name in roles and len(files) == 1):
            file = (roboflow or files)[0]
            found[name] = _Part(
                file, (*(folder / each for each in ("images", "data") if (folder / each).is_dir()), folder)
            )
    return found


@lru_cache(maxsize=16)
def _withheld(file: Path, mtime: int) -> bool:
    """Whether a file lists images and no annotation, as those of test images do."""
    try:
        document = pydantic_core.from_json(read_regular(file).removeprefix(codecs.BOM_UTF8))
    except (OSError, ValueError):  # told of by whoever reads it
        return False
    return isinstance(document, dict) and bool(document.get("images")) and not document.get("annotations")


def _whole(parts: Mapping[str, _Part]) -> _Part | None:
    """The only annotation file, where its name says no split."""
    (name,) = parts if len(parts) == 1 else ("",)
    return parts[name] if name and not any(_is_of(name, role) for role in ("train", "val", "test")) else None


def _is_of(name: str, role: str) -> bool:
    """Whether a split of that name is ``train``, ``val`` or ``test``: train2017, Train, valid, test-dev."""
    return name.lower().startswith(role) or split_role(name) == role


def _used(files: Iterable[Path]) -> frozenset[int]:
    """The ids of the categories that some annotation of these files has."""
    entries = (entry for file in files for entry in _parse(file)[0]["annotations"])
    return frozenset(int(i) for entry in entries if isinstance(i := entry.get("category_id"), int | float))


def read(
    annotation: Path,
    folder: Path | Sequence[Path],
    name: str,
    faults: list[str] | None = None,
    used: Callable[[], Collection[int]] | None = None,
) -> DetectionSet:
    """Read a COCO instances file whose ``file_name`` are relative to ``folder``, or to the first of several that holds
    the first image.

    Classes are in the order of their ids, as in COCO's own tools. A category that groups others and that no annotation
    has is none: ``used`` gives the ids that annotations have, those of this file by default. ``iscrowd`` and ``area``
    may be missing: 0, and the box's. Masks are there if every annotation has a segmentation that can be one. Raises
    :class:`DataError` naming the file and the reason; images that are not there go to ``faults`` where that is given,
    and are left out.
    """
    document, content = _parse(annotation)
    with _explained(annotation):
        if not document["images"]:
            raise _Odd("it has no images")
        category_ids, classes, notes = _categories(document, used or (lambda: _used([annotation])))
        names, slashes = _file_names(document["images"])
        folders = [folder] if isinstance(folder, Path) else folder
        below = next((each for each in folders if _length(each / names[0]) >= 0), folders[0])
        names = _as_on_disk(below, names)
        ids, images, lengths = _images(document, below, names)
        columns, odd = _columns(document["annotations"], ids, images, category_ids)
    absent = [image.path for image, length in zip(images, lengths, strict=True) if length < 0]
    if absent and (faults is None or len(absent) == len(images)):
        raise DataError(
            f"image {absent[0]} is missing",
            cause=f"{annotation} names {len(images)} images, {len(absent)} of which are not there",
            fix="restore them, or evalsuite data verify to list them all",
        )
    found = assemble(
        images,
        columns,
        name=name,
        classes=classes,
        category_ids=category_ids,
        annotations=joined([content]),
        notes=tuple(f"{name}: {note}" for note in (*notes, *slashes, *odd)),
    )
    if absent and faults is not None:
        faults += [f"{name}: image {path} is missing" for path in absent]
        gone = set(absent)
        found = replace(found, records=tuple(r for r in found.records if r.path not in gone))
    return found


class _Odd(ValueError):
    """What is wrong with a file, in words that follow its name, and what to do about it."""

    def __init__(self, cause: str, fix: str = _FIX) -> None:
        super().__init__(cause)
        self.fix = fix


@contextmanager
def _explained(annotation: Path) -> Iterator[None]:
    try:
        yield
    except _Odd as error:
        raise DataError(f"{annotation} is not valid COCO JSON", cause=str(error), fix=error.fix) from error


def _parse(annotation: Path) -> tuple[dict[str, Any], str]:
    """The document with polygons as float64 arrays, and the digest of its bytes.

    COCO's own training file has a million polygons: as lists of Python floats they would take gigabytes, and
    the garbage collector would walk over them again and again.
    """
    try:
        text = read_regular(annotation)
    except OSError as error:
        raise DataError(f"{annotation} cannot be read", cause=str(error), fix=_FIX) from error
    content = hashlib.sha256(text).hexdigest()
    if encoding := not_utf8(text):
        raise DataError(f"{annotation} cannot be read", cause=encoding.cause, fix=encoding.fix)
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
    with _explained(annotation):
        for what, (listed, named) in _NUMBERED.items():
            _number(document[listed], document["annotations"], named, what)
    for entry in document["annotations"]:
        if isinstance(mask := entry.get("segmentation"), list):
            entry["segmentation"] = [_flat(polygon) for polygon in mask]
    return document, content


def _number(entries: list[dict[str, Any]], annotations: list[dict[str, Any]], named: str, what: str) -> None:
    """Ids that are texts as numbers: their own where they are digits, else by the order of the texts."""
    if not any(isinstance(entry.get("id"), str) for entry in entries):
        return
    texts = [str(entry.get("id")) for entry in entries]
    own = all(re.fullmatch(r"\d{1,15}", text, re.ASCII) for text in texts) and not _twice([int(t) for t in texts])
    numbers = {text: int(text) if own else place for place, text in enumerate(sorted(set(texts)), 1)}
    if len(numbers) == len(texts):  # else told of as ids that are there twice
        for entry, text in zip(entries, texts, strict=True):
            entry["id"] = numbers[text]
    for place, entry in enumerate(annotations):
        value = entry.get(named)
        if str(value) in numbers:
            entry[named] = numbers[str(value)]
        elif not (own and isinstance(value, str) and value.isdecimal() and int(value) in numbers.values()):
            raise _Odd(
                f"annotation {entry.get('id', f'number {place}')} names {what} {value!r}, which is not there",
                f"take such annotations out, or list the {what} they name",
            )
        else:
            entry[named] = int(value)


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
    found: list[Any] = [_untexted(entry.get(key)) for entry in entries]
    if default is not None:
        found = [default if value is None else value for value in found]
    whole = kind == "an integer"
    try:
        values = np.array(found or [0])
        if values.ndim == 1 and values.dtype.kind in ("ib" if whole else "iufb"):
            return values[: len(found)].astype(np.int64 if whole else np.float64)
        if whole and all(map(_is_whole, found)):  # 3.0, as pandas writes ids
            return np.array([int(value) for value in found], np.int64)
    except (ValueError, OverflowError):
        pass
    for place, (entry, value) in enumerate(zip(entries, found, strict=True)):
        good = _is_whole(value) if whole else isinstance(value, int | float)
        if not good or (isinstance(value, int) and abs(value) >= 2**63):
            told = f"has no {key!r}" if key not in entry else f"has {key!r} {_short(value)}, not {kind}"
            raise _Odd(f"{what} {entry.get('id', f'number {place}')} {told}", f"write {key!r} as {kind}")
    raise _Odd(f"some {what} has a {key!r} that is not {kind}", f"write {key!r} as {kind}")


_NUMERAL = re.compile(r"\s*[+-]?\d{1,15}(\.\d{0,15})?\s*", re.ASCII)
_WORDS = {"true": 1, "false": 0}


def _untexted(value: Any) -> Any:
    """A number or a mark that was written as text, as a number; anything else as it is."""
    if not isinstance(value, str):
        return value
    if _NUMERAL.fullmatch(value):
        return float(value) if "." in value else int(value)
    return _WORDS.get(value.strip().lower(), value)


def _untexted_box(box: Any) -> Any:
    return [_untexted(v) for v in box] if isinstance(box, list) and any(isinstance(v, str) for v in box) else box


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST_ID)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _categories(
    document: dict[str, Any], used: Callable[[], Collection[int]]
) -> tuple[tuple[int, ...], tuple[str, ...], list[str]]:
    """Ids and names, and a note on those that are left out: the groups of others, which no annotation has."""
    entries = document["categories"]
    if not entries:
        raise _Odd("it has no categories")
    ids = _column(entries, "id", "an integer", "category").tolist()
    for entry in entries:
        if not isinstance(entry.get("name"), str) or not entry["name"]:
            raise _Odd(f"category {entry['id']} has no name")
    if twice := _twice(ids):
        raise _Odd(f"category id {twice[0]!r} is there twice")
    kept, groups = dict(zip(ids, (entry["name"] for entry in entries), strict=True)), {}
    grouping = [i for i, name in kept.items() if any(e.get("supercategory") == name and e["id"] != i for e in entries)]
    if grouping:
        taken = used()
        groups = {i: kept.pop(i) for i in grouping if i not in taken}
    if twice := _twice(list(kept.values())):
        raise _Odd(f"category name {twice[0]!r} is there twice")
    if not kept:
        raise _Odd("its categories are groups of others, and no annotation has any")
    notes = [f"category {name!r} (id {i}) groups others and has no annotation: left out" for i, name in groups.items()]
    return (*sorted(kept),), tuple(kept[i] for i in sorted(kept)), notes


def _file_names(entries: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The images' names below their folder, and a note where they are written as Windows does."""
    names = []
    for place, entry in enumerate(entries):
        file, image = entry.get("file_name"), entry.get("id", f"number {place}")
        if not isinstance(file, str) or not file:
            raise _Odd(f"image {image} has no file_name")
        name = relative_name(file)
        if name is None:
            raise _Odd(
                f"image {image} has the file_name {file!r}, which leads out of the image folder",
                "write file names that count from the image folder, without '..'",
            )
        names.append(name)
    slashes = sum(entry["file_name"] != name for entry, name in zip(entries, names, strict=True))
    return names, [f"{slashes} file names are written with \\, and read with /"] if slashes else []


def _as_on_disk(folder: Path, names: list[str]) -> list[str]:
    """The names with the letter case and the accents of the files, where no file is there by the very name."""
    if all(_length(folder / name) >= 0 for name in names):
        return names
    there = (Path(entry.path).relative_to(folder).as_posix() for entry in list_images(folder).images)
    alike = same_names(names, there)
    return [alike.get(name, name) for name in names]


def _images(
    document: dict[str, Any], folder: Path, names: Sequence[str]
) -> tuple[NDArray[np.int64], list[Image], list[int]]:
    """Ids, images, and the files' lengths in bytes, -1 where a file is not there."""
    entries = document["images"]
    for entry, name in zip(entries, names, strict=True):
        if not (entry.get("height") and entry.get("width")) and _length(folder / name) >= 0:
            entry["height"], entry["width"] = size(folder / name)
    ids, heights, widths = (_column(entries, key, "an integer", "image") for key in ("id", "height", "width"))
    if twice := _twice(ids.tolist()):
        raise _Odd(f"image id {twice[0]} is there twice")
    wrong = (np.minimum(heights, widths) < 1) | (np.maximum(heights, widths) > _LARGEST_SIDE)
    if wrong.any():
        first = int(wrong.argmax())
        raise _Odd(f"image {ids[first]} is said to have {widths[first]}x{heights[first]} pixels")
    columns = zip(ids.tolist(), names, heights.tolist(), widths.tolist(), strict=True)
    images = [Image(image_id, folder / name, height, width) for image_id, name, height, width in columns]
    return ids, images, [_length(image.path) for image in images]


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
    faults = [_mask_fault(entry, images[i]) for entry, i in zip(entries, owner.tolist(), strict=True)]
    present = [fault is None for fault in faults]
    masks = [entry["segmentation"] for entry in entries] if all(present) and present else None
    return Boxes(owner, boxes, labels, crowd, np.zeros_like(crowd), area, masks), _maskless(entries, faults)


def _maskless(entries: list[dict[str, Any]], faults: list[str | None]) -> list[str]:
    """A note on annotations without a mask, where others have one, and on masks that are none."""
    lacking, odd = faults.count(_NO_MASK), [i for i, fault in enumerate(faults) if fault not in (None, _NO_MASK)]
    notes = []
    if 0 < lacking < len(faults):
        notes.append(f"{lacking} of {len(faults)} annotations have no segmentation: masks are not used")
    if odd:
        first = f"annotation {entries[odd[0]].get('id', f'number {odd[0]}')} has {faults[odd[0]]}"
        notes.append(f"{len(odd)} of {len(faults)} segmentations are no masks ({first}): masks are not used")
    return notes


def _boxes(entries: list[dict[str, Any]]) -> NDArray[np.float64]:
    try:
        boxes = np.array([_untexted_box(entry["bbox"]) for entry in entries] or np.zeros((0, 4)))
        if boxes.shape == (len(entries), 4) and boxes.dtype.kind in "iuf" and np.isfinite(boxes).all():
            if len(boxes) and (boxes <= 1).all() and (boxes % 1 > 0).any():
                raise _Odd("its boxes are shares of the images' sizes", "write bbox as [x, y, width, height] in pixels")
            return boxes.astype(np.float64)
    except _Odd:
        raise
    except (KeyError, ValueError, OverflowError):
        pass
    for place, entry in enumerate(entries):
        box: Any = _untexted_box(entry.get("bbox"))
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
        raise _Odd(
            f"annotation {name} names {what} {values[first]}, which is not there{such}",
            f"take such annotations out, or list the {what} they name",
        )
    return found


def _mask_fault(entry: dict[str, Any], image: Image) -> str | None:
    """Why an annotation has no mask: :data:`_NO_MASK`, or what its segmentation is instead; None where it has one."""
    mask = entry.get("segmentation")
    if not mask:
        return _NO_MASK
    if isinstance(mask, list):
        good = all(isinstance(p, np.ndarray) and len(p) >= 6 and len(p) % 2 == 0 for p in mask)
        return None if good else "a polygon that is not a list of at least three points"
    if not isinstance(mask, dict):
        return "a segmentation that is neither polygons nor RLE"
    counts = mask.get("counts")
    good = isinstance(counts, str) or _runs(counts, image.height * image.width)
    good = good and mask.get("size") == [image.height, image.width]
    return None if good else f"an RLE that is not of its image, {image.height}x{image.width}"


def _runs(counts: Any, pixels: int) -> bool:
    """Whether these are run lengths that fill the image."""
    return isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts) and sum(counts) == pixels


def _twice(values: Sequence[Any]) -> list[Any]:
    seen: set[Any] = set()
    return [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]
