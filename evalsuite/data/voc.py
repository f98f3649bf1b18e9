"""PASCAL VOC XML: boxes with ``difficult`` flags, split lists, two years.

Format: the VOC development kit, http://host.robots.ox.ac.uk/pascal/VOC/. Boxes in the files are inclusive
pixels counted from 1, so (xmin, ymin, xmax, ymax) covers (xmin - 1, ymin - 1, xmax, ymax) in continuous
coordinates.
"""

from __future__ import annotations

import codecs
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

import numpy as np

from evalsuite.data import Report, Source
from evalsuite.data.detection import Boxes, DetectionSet, Image, assemble, survey, union
from evalsuite.data.images import fingerprint, images_by_name, read_list, size
from evalsuite.errors import DataError

if TYPE_CHECKING:
    from evalsuite.progress import Progress

__all__ = ["CLASSES", "Voc"]

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_SPLITS = ("train", "val", "trainval", "test")
_ROLES = {"train": ("train", "trainval"), "val": ("val", "test"), "test": ("test",)}
_LISTS = Path("ImageSets", "Main")
_LARGEST = 16 * 2**20
_DECLARED = re.compile(rb"""^<\?xml[^>]{0,100}encoding=["']([A-Za-z0-9._-]{1,40})["']""")


@dataclass(frozen=True)
class Voc(Source[DetectionSet]):
    """PASCAL VOC detection. ``official``: its classes are the twenty of the challenge; else the data tell.

    A split is a name (``train``) in the folder of one year, ``year:name`` in a development kit, or a union of
    several, ``2007:trainval+2012:trainval``. Classes from the data are the names in all splits, sorted.
    """

    name = "voc"
    tree = "".join(
        f"VOCdevkit/VOC{year}/{part}\n"
        for year in (2007, 2012)
        for part in ("JPEGImages/*.jpg", "Annotations/*.xml", "ImageSets/Main/*.txt")
    ).rstrip()
    homepage = "http://host.robots.ox.ac.uk/pascal/VOC/"
    licence = "images are subject to the terms of Flickr"
    citation = "Everingham et al., The PASCAL Visual Object Classes (VOC) Challenge, IJCV 2010"

    official: bool = True

    def generic(self) -> Voc:
        return Voc(official=False)

    def locate(self, root: Path | None) -> Path:
        if root is not None and root.is_dir():
            for path in (root / "VOCdevkit", root):
                if _years(path) or (path / _LISTS).is_dir():
                    return path
            inner = [path for path in root.iterdir() if (path / _LISTS).is_dir()]
            if len(inner) == 1:
                return inner[0]
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        found = []
        for year, folder in _folders(path).items():
            names = [name for name in _SPLITS if (folder / _LISTS / f"{name}.txt").is_file()]
            found += [f"{year}:{name}" if year else name for name in names]
        return tuple(found)

    def roles(self, path: Path) -> Mapping[str, str]:
        """All years together, but for splits without annotations.

        For want of a train split trainval stands in, for want of a val split test.
        """
        found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        for year, folder in _folders(path).items():
            for role, choices in _ROLES.items():
                there = [n for n in choices if (folder / _LISTS / f"{n}.txt").is_file()]
                names = [f"{year}:{n}" if year else n for n in there]
                found[role] += [name for name in names if not _withheld(path, name)][:1]
        if not (found["train"] and found["val"]):
            raise DataError(
                f"{path} has nothing to learn from or nothing to score on",
                cause=f"its splits are {', '.join(self.splits(path)) or 'none'}",
                fix="list images in ImageSets/Main/train.txt and ImageSets/Main/val.txt",
            )
        return {role: "+".join(names) for role, names in found.items() if names}

    def load(self, path: Path, split: str) -> DetectionSet:
        classes = CLASSES if self.official else self._classes(path)
        parts = [self._read(path, part, classes) for part in split.split("+")]
        return union(split, parts)

    def verify(self, path: Path, progress: Progress | None = None, workers: int | None = None) -> Report:
        report = Report(self.name, path)
        sets: dict[str, DetectionSet] = {}
        splits = self.splits(path)
        classes: tuple[str, ...] = CLASSES if self.official else ()
        if not splits:
            report.faults.append(f"{path} has no split")
        for split in splits:
            try:
                if _withheld(path, split):
                    report.notes.append(f"{split} has no annotations")
                else:
                    classes = classes or self._classes(path, report.faults)
                    sets[split] = self._read(path, split, classes, report.faults)
            except DataError as error:
                report.faults.append(f"{error.problem}: {error.cause}")
        report.faults[:] = dict.fromkeys(report.faults)  # trainval repeats what train and val told
        survey(report, sets, _leaks, progress, workers)
        report.notes[:] = dict.fromkeys(report.notes)
        return report

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        from evalsuite.data.demo import write_voc

        return write_voc(root / "VOCdevkit", seed, images)

    def _classes(self, path: Path, faults: list[str] | None = None) -> tuple[str, ...]:
        """All names in all splits' annotations, so that every split numbers them alike."""
        files = {
            folder / "Annotations" / f"{name}.xml"
            for split in self.splits(path)
            for folder, stem in [_place(path, split)]
            for name in _listed(folder, stem)
        }
        names: set[str] = set()
        for file in sorted(files):
            if file.is_file():
                try:
                    names.update(_annotation(file).names)
                except DataError:
                    if faults is None:
                        raise
        if not names:
            told = "no annotation of any split holds an object"
            raise DataError(f"{path} has no objects", cause=told, fix="check Annotations/*.xml")
        return tuple(sorted(names))

    def _read(self, path: Path, split: str, classes: tuple[str, ...], faults: list[str] | None = None) -> DetectionSet:
        """One split of one year. What is wrong with a file is raised, or goes to ``faults`` if given."""
        folder, stem = _place(path, split)
        label = {name: i for i, name in enumerate(classes)}
        photos = images_by_name(folder / "JPEGImages")
        images: list[Image] = []
        files, contents, owner, names, numbers, difficult = [], [], [], [], [], []
        for name in _listed(folder, stem):
            try:
                image, length = _image(folder, photos, name)
                file = folder / "Annotations" / f"{name}.xml"
                found = _annotation(file)
                _check_names(file, found.names, label)
                height, width = found.size or size(image)
            except DataError as error:
                if faults is None:
                    raise
                faults.append(f"{error.problem}: {error.cause}")
                continue
            owner += [len(images)] * len(found.names)
            images.append(Image(len(images) + 1, image, height, width))
            files.append((f"{name}{image.suffix}", length))
            contents.append(found.digest)
            names += found.names
            numbers += found.boxes
            difficult += found.difficult
        boxes = np.array(numbers, np.float64).reshape(-1, 4)
        boxes[:, :2] -= 1
        # A box of one pixel by the letter of the format is a slip of the mouse in practice: it has no inside.
        slips = boxes[:, 2:] - boxes[:, :2] <= 1
        boxes[:, 2:] = np.where(slips, boxes[:, :2], boxes[:, 2:])
        columns = Boxes(
            owner=np.array(owner, np.int64),
            boxes=boxes,
            labels=np.array([label[n] for n in names], np.int64),
            crowd=np.zeros(len(boxes), bool),
            difficult=np.array(difficult, bool),
            area=np.full(len(boxes), math.nan),
        )
        return assemble(
            images,
            columns,
            name=split,
            classes=classes,
            category_ids=tuple(range(1, len(classes) + 1)),
            fingerprint=fingerprint(contents, files),
        )


class _Annotation(NamedTuple):
    """One file. ``size`` is (height, width), None where it does not tell; boxes are as in the file."""

    size: tuple[int, int] | None
    names: list[str]
    boxes: list[tuple[float, ...]]
    difficult: list[bool]
    digest: str


def _years(path: Path) -> dict[str, Path]:
    found = sorted(path.glob("VOC[0-9][0-9][0-9][0-9]"))
    return {folder.name[3:]: folder for folder in found if (folder / _LISTS).is_dir()}


def _folders(path: Path) -> dict[str, Path]:
    """The folders with a year's layout, by year; "" for a folder that is one itself."""
    return {"": path} if (path / _LISTS).is_dir() else _years(path)


def _place(path: Path, split: str) -> tuple[Path, str]:
    """The year's folder and the split's name there."""
    year, colon, stem = split.rpartition(":")
    folders = _folders(path)
    if not colon and len(folders) == 1:
        year = next(iter(folders))
    elif "" in folders and path.name == f"VOC{year}":
        year = ""
    if year not in folders or not re.fullmatch(r"[\w-]+", stem):
        raise DataError(
            f"VOC split {split!r} is missing",
            cause=f"{path} holds {', '.join(folder.name for folder in folders.values()) or 'no VOC year'}",
            fix="name splits as year:name, for example 2007:trainval+2012:trainval",
        )
    return folders[year], stem


def _listed(folder: Path, stem: str) -> list[str]:
    """The image names of a split."""
    file = folder / _LISTS / f"{stem}.txt"
    if not file.is_file():
        known = sorted(p.stem for p in file.parent.glob("*.txt") if p.stem in _SPLITS)
        raise DataError(
            f"VOC split {stem!r} is missing",
            cause=f"{file} is not there; found: {', '.join(known) or 'none'}",
            fix="list the split's images in that file, one name without suffix a line",
        )
    return read_list(file)


def _withheld(path: Path, split: str) -> bool:
    """Whether a split is listed without a single annotation, as the test images of VOC2012 are."""
    folder, stem = _place(path, split)
    return not any((folder / "Annotations" / f"{name}.xml").is_file() for name in _listed(folder, stem))


def _image(folder: Path, photos: Mapping[str, Sequence[Path]], name: str) -> tuple[Path, int]:
    """An image's file and its length in bytes."""
    if name in photos:
        return photos[name][0], photos[name][0].stat().st_size
    raise DataError(
        f"image {folder / 'JPEGImages' / name}.jpg is missing",
        cause="a split in ImageSets/Main lists it",
        fix="restore it, or take its name off the split",
    )


def _annotation(file: Path) -> _Annotation:
    """Read one annotation. Raises :class:`DataError` naming the file and the reason."""
    if not file.is_file():
        raise DataError(
            f"annotation {file} is missing",
            cause="a split in ImageSets/Main lists its image",
            fix="restore it, or take its name off the split (no objects is a file without <object>)",
        )
    if file.stat().st_size > _LARGEST:
        raise _broken(file, f"it is larger than {_LARGEST >> 20} MiB")
    data = file.read_bytes()
    try:
        root = ElementTree.fromstring(_text(data))
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}>, not <annotation>")
        objects = root.findall("object")
        return _Annotation(
            _size(root),
            [_name(entry) for entry in objects],
            [_box(entry) for entry in objects],
            [_flag(entry, "difficult") for entry in objects],
            hashlib.sha256(data).hexdigest(),
        )
    except (ValueError, LookupError, ElementTree.ParseError) as error:
        raise _broken(file, str(error)) from error


def _text(data: bytes) -> str:
    """The file's text, refusing document types: they are how XML reads other files and explodes in memory."""
    if not data.strip():
        raise ValueError("it is empty")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16")
    else:
        declared = _DECLARED.match(data)
        text = data.decode(declared[1].decode("ascii") if declared else "utf-8-sig")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("it declares a document type or an entity, which VOC files never do")
    return text.removeprefix("\ufeff")


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width); None where the file does not tell, or says 0 as some tools do."""
    if root.find("size") is None:
        return None
    height, width = (_number(root, f"size/{key}") for key in ("height", "width"))
    if not (height.is_integer() and width.is_integer() and height >= 0 and width >= 0):
        raise ValueError(f"its size is {width}x{height}")
    return (int(height), int(width)) if height and width else None


def _name(entry: ElementTree.Element) -> str:
    name = (entry.findtext("name") or "").strip()
    if not name:
        raise ValueError("an <object> has no <name>")
    return name


def _box(entry: ElementTree.Element) -> tuple[float, ...]:
    return tuple(_number(entry, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))


def _number(entry: ElementTree.Element, path: str) -> float:
    text = entry.findtext(path)
    try:
        value = float(text) if text is not None and len(text) < 100 else math.nan
    except ValueError:
        value = math.nan
    if not abs(value) < 1e9:
        told = "is missing" if text is None else f"is {text.strip()[:60]!r}, not a number"
        raise ValueError(f"<{path.replace('/', '><')}> of <{entry.tag}> {told}")
    return value


def _flag(entry: ElementTree.Element, key: str) -> bool:
    text = (entry.findtext(key) or "0").strip()
    if text not in ("0", "1"):
        raise ValueError(f"<{key}> is {text[:60]!r}, not 0 or 1")
    return text == "1"


def _check_names(file: Path, names: list[str], known: Mapping[str, int]) -> None:
    for name in names:
        if name not in known:
            raise DataError(
                f"annotation {file} has an object of an unknown class",
                cause=f"{name!r} is none of {', '.join(known)}",
                fix="for data with classes of their own: --task detect --data voc:PATH",
            )


def _broken(file: Path, reason: str) -> DataError:
    return DataError(f"{file} cannot be read", cause=reason, fix="restore or correct the file")


def _leaks(one: str, other: str) -> bool:
    """Whether an image must not be in both splits: trainval is train and val, and years may be joined."""
    names = {one.rpartition(":")[2], other.rpartition(":")[2]}
    return len(names) == 2 and names not in ({"trainval", "train"}, {"trainval", "val"})
