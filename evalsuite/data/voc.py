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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from xml.etree import ElementTree

import numpy as np

from evalsuite.data import Report, as_fault, split_role, split_roles
from evalsuite.data.detection import Boxes, DetectionSet, DetectionSource, Image, assemble, survey, union
from evalsuite.data.digests import joined
from evalsuite.data.draws import drawn
from evalsuite.data.images import (
    DRAWN,
    clutter,
    images_by_name,
    listed_name,
    not_utf8,
    read_lines,
    read_list,
    same_names,
    size,
    subfolder,
)
from evalsuite.errors import DataError, ImageError
from evalsuite.files import read_regular

if TYPE_CHECKING:
    from evalsuite.progress import Progress

__all__ = ["CLASSES", "Voc"]

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

Data = TypeVar("Data")

_SPLITS = ("train", "val", "trainval", "test")
_ROLES = {"train": ("train", "trainval"), "val": ("val", "test"), "test": ("test",)}
_LISTS = Path("ImageSets", "Main")
_IMAGES, _ANNOTATIONS = ("JPEGImages", "images"), ("Annotations", "annotations")
_KINDS = {"jpegimages", "images", "imgs", "annotations", "labels", "xmls", "xml"}  # folders that are no part of a name
_LEVELS = ("*", "*/*", "*/*/*")  # how deep zips put a layout
_LARGEST = 16 * 2**20
_DECLARED = re.compile(rb"""^<\?xml[^>]{0,100}encoding=["']([A-Za-z0-9._-]{1,40})["']""")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_FLAGS = {"0": False, "false": False, "": False, "unspecified": False, "1": True, "true": True}


@dataclass(frozen=True)
class Voc(DetectionSource):
    """PASCAL VOC detection. ``official``: its classes are the twenty of the challenge; else the data tell.

    A split is a name (``train``) in the folder of one year, ``year:name`` in a development kit, or a union of
    several, ``2007:trainval+2012:trainval``. Classes from the data are the names in all splits, sorted. Anybody's data
    need no lists: a folder of images and one of annotations, the two in each of ``train``, ``val`` and ``test``, or
    every annotation beside its image. Folders ``train``, ``val`` and ``test`` are splits, else one image in five is
    tested on, by the hash of its name.
    """

    name = "voc"
    serves = ("detect",)
    own_tree = "JPEGImages/*.jpg\nAnnotations/*.xml\nImageSets/Main/train.txt\nImageSets/Main/val.txt"
    tree = "".join(
        f"VOCdevkit/VOC{year}/{part}\n"
        for year in (2007, 2012)
        for part in ("JPEGImages/*.jpg", "Annotations/*.xml", "ImageSets/Main/*.txt")
    ).rstrip()
    homepage = "http://host.robots.ox.ac.uk/pascal/VOC/"
    licence = "images are subject to the terms of Flickr"
    citation = "Everingham et al., The PASCAL Visual Object Classes (VOC) Challenge, IJCV 2010"

    def locate(self, root: Path | None) -> Path:
        if root is not None and root.is_dir():
            for path in (root / "VOCdevkit", root):
                if _years(path) or (path / _LISTS).is_dir():
                    return path
            below = [place.parents[1] for level in _LEVELS for place in root.glob(f"{level}/{_LISTS}")]
            inner = list(dict.fromkeys(path.parent if path in _years(path.parent).values() else path for path in below))
            if len(inner) == 1:
                return inner[0]
            if not self.official and _Year(root).annotations:
                return root
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        return tuple(f"{y}:{name}" if y else name for y, year in _found(path).items() for name in year.splits)

    def roles(self, path: Path) -> Mapping[str, str]:
        """All years together, but for splits without annotations.

        For want of a train split trainval stands in, for want of a val split test.
        """
        found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        for y, year in _found(path).items():
            for role, choices in _ROLES.items():
                names = [name for name in choices if name in year.splits and not year.withheld(name)]
                found[role] += [f"{y}:{name}" if y else name for name in names[:1]]
        if not (found["train"] and found["val"]):
            raise DataError(
                f"{path} has nothing to learn from or nothing to score on",
                cause=f"its splits with annotations are {', '.join(chain.from_iterable(found.values())) or 'none'}",
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
        classes: tuple[str, ...] = CLASSES if self.official else ()
        for split in self.splits(path):
            with report.examining():
                year, stem = _place(path, split)
                if year.withheld(stem):
                    report.notes.append(f"{split} has no annotations")
                else:
                    classes = classes or self._classes(path, report.faults)
                    sets[split] = self._read(path, split, classes, report.faults)
        with report.examining():
            joined = [name for name in self.roles(path).values() if set(name.split("+")) <= sets.keys()]
            self.pair(path, loaded={name: union(name, [sets[part] for part in name.split("+")]) for name in joined})
        report.faults[:] = dict.fromkeys(report.faults)  # trainval repeats what train and val told
        survey(report, sets, self.leaks, progress, workers)
        report.notes[:] = dict.fromkeys(report.notes)
        return report

    def leaks(self, one: str, other: str) -> bool:
        """Whether an image must not be in both splits: trainval is train and val, and years may be joined."""
        names = {one.rpartition(":")[2], other.rpartition(":")[2]}
        return len(names) == 2 and names not in ({"trainval", "train"}, {"trainval", "val"})

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        from evalsuite.data.demo import write_voc

        return write_voc(root / "VOCdevkit", seed, images)

    def _classes(self, path: Path, faults: list[str] | None = None) -> tuple[str, ...]:
        """All names in all splits' annotations, so that every split numbers them alike."""
        files = {
            year.annotations[name]
            for year in _found(path).values()
            for split in year.splits
            for name in year.names(split)
            if name in year.annotations
        }
        names: set[str] = set()
        broken = None
        for file in sorted(files):
            try:
                names.update(_annotation(file).names)
            except DataError as error:
                if faults is None:
                    raise
                broken = broken or error
        if not names:
            told = "no annotation of any split holds an object"
            raise broken or DataError(f"{path} has no objects", cause=told, fix="check Annotations/*.xml")
        return tuple(sorted(names))

    def _read(self, path: Path, split: str, classes: tuple[str, ...], faults: list[str] | None = None) -> DetectionSet:
        """One split of one year. What is wrong with a file is raised, or goes to ``faults`` if given."""
        year, stem = _place(path, split)
        label = {name: i for i, name in enumerate(classes)}
        images: list[Image] = []
        unreadable: list[ImageError] = []
        files, contents, owner, names, numbers, difficult = [], [], [], [], [], []
        for name in year.names(stem):
            try:
                image = year.image(name)
                file = year.annotation(name)
                found = _annotation(file)
                _check_names(file, found.names, label)
                height, width = found.size or size(image)
            except DataError as error:
                if faults is not None:
                    faults.append(as_fault(error))
                elif isinstance(error, ImageError):
                    unreadable.append(error)
                else:
                    raise
                continue
            owner += [len(images)] * len(found.names)
            images.append(Image(len(images) + 1, image, height, width))
            files.append(f"{name}{image.suffix}")
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
            annotations=joined([*contents, *files]),
            notes=tuple(f"{split}: {note}" for note in year.notes(stem)),
            unreadable=tuple(unreadable),
        )


@dataclass(frozen=True)
class _Year:
    """A folder with images, annotations and, mostly, lists of splits. What was looked up is kept as long as this is."""

    folder: Path

    @cached_property
    def _apart(self) -> bool:
        """Whether annotations have a folder of their own; else they lie beside the images, or in each split's."""
        return subfolder(self.folder, _ANNOTATIONS).is_dir()

    @cached_property
    def images(self) -> dict[str, list[Path]]:
        return _named(images_by_name(subfolder(self.folder, _IMAGES) if self._apart else self.folder), not self._apart)

    @cached_property
    def annotations(self) -> dict[str, Path]:
        folder = subfolder(self.folder, _ANNOTATIONS) if self._apart else self.folder
        files = images_by_name(folder, suffixes=(".xml",))
        alone = {name: paths[0] for name, paths in files.items() if name not in self.images}
        found = {name: paths[0] for name, paths in files.items() if name in self.images} | _named(alone)
        alike = same_names(found, self.images)
        return {alike.get(name, name): file for name, file in found.items()}

    @cached_property
    def lists(self) -> dict[str, Path]:
        """The lists by their names; those of splits by these too, whatever people call them (``Train``, ``valid``)."""
        folder = self.folder / _LISTS
        folder = folder if folder.is_dir() else folder.parent
        found = {file.stem: file for file in sorted(folder.glob("*.txt")) if not clutter(file.name)}
        named = {file: stem.lower() if stem.lower() in _SPLITS else split_role(stem) for stem, file in found.items()}
        return {name: file for file, name in named.items() if name} | found

    @cached_property
    def splits(self) -> tuple[str, ...]:
        return tuple(name for name in _SPLITS if name in self.lists) or tuple(self._unlisted)

    @cached_property
    def _unlisted(self) -> dict[str, list[str]]:
        """The names of each split where no list says them: by folders, else by hash. A single list of another name, as
        CVAT's default.txt, says what there is."""
        pool = sorted(self.annotations.keys() & self.images.keys())
        if self.lists:
            pool = self._entries(next(iter(self.lists))) if len(self.lists) == 1 else []
        levels = min((name.count("/") for name in pool), default=0)
        for folder in ({name: name.split("/")[level] for name in pool} for level in range(levels)):
            roles = split_roles(set(folder.values()))
            if set(folder.values()) <= roles.keys():
                return {
                    split: [name for name in pool if roles[folder[name]] == split]
                    for split in _SPLITS
                    if split in roles.values()
                }
        halves = {split: drawn(pool, pool, split) for split in DRAWN}
        return halves if all(halves.values()) else {}

    def names(self, split: str) -> list[str]:
        """The names of a split's images."""
        if split in self.lists:
            return self._entries(split)
        if split not in self.splits:
            raise DataError(
                f"VOC split {split!r} is missing",
                cause=f"{self.folder / _LISTS / split}.txt is not there; found: {', '.join(self.splits) or 'none'}",
                fix="list the split's images in that file, one name without suffix a line",
            )
        return self._unlisted[split]

    def _entries(self, split: str) -> list[str]:
        known = self.images.keys() | self.annotations.keys()
        return [listed_name(line, known) for line in read_list(self.lists[split])]

    def notes(self, split: str) -> list[str]:
        """What a reader of scores must know of how a split was found."""
        if split in self.lists:
            changed = sum(a != b for a, b in zip(self._entries(split), read_lines(self.lists[split]), strict=True))
            return [f"{changed} names in {split}.txt are not as those of the files: read without suffix"] * (
                changed > 0
            )
        if self.lists:
            return []
        lone = len(self.annotations.keys() ^ self.images.keys())
        return [f"{lone} images or annotations without the other are left out"] if lone else []

    def withheld(self, split: str) -> bool:
        """Whether a split has images without a single annotation, as the test images of VOC2012 are."""
        names = self.names(split)
        return not any(name in self.annotations for name in names) and any(name in self.images for name in names)

    def image(self, name: str) -> Path:
        """An image's file."""
        if name in self.images:
            return self.images[name][0]
        raise DataError(
            f"image {subfolder(self.folder, _IMAGES) / name}.jpg is missing",
            cause="a split in ImageSets/Main lists it",
            fix="restore it, or take its name off the split",
        )

    def annotation(self, name: str) -> Path:
        """An image's annotation file."""
        if name in self.annotations:
            return self.annotations[name]
        raise DataError(
            f"annotation {subfolder(self.folder, _ANNOTATIONS) / name}.xml is missing",
            cause="a split in ImageSets/Main lists its image",
            fix="restore it, or take its name off the split (no objects is a file without <object>)",
        )


def _named(found: dict[str, Data], kinds: bool = True) -> dict[str, Data]:
    """Files by their names without the folders that tell images from annotations, if these are to go."""
    if not kinds:
        return found
    return {"/".join(p for p in name.split("/") if p.lower() not in _KINDS): each for name, each in found.items()}


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


def _found(path: Path) -> dict[str, _Year]:
    """The folders with a year's layout, by year; "" for a folder that is one itself."""
    years = {} if (path / _LISTS).is_dir() else _years(path)
    return {year: _Year(folder) for year, folder in years.items()} or {"": _Year(path)}


def _place(path: Path, split: str) -> tuple[_Year, str]:
    """The year's folder and the split's name there."""
    y, colon, stem = split.rpartition(":")
    years = _found(path)
    if not colon and len(years) == 1:
        y = next(iter(years))
    elif "" in years and path.name == f"VOC{y}":
        y = ""
    if y not in years or not re.fullmatch(r"[\w-]+", stem):
        raise DataError(
            f"VOC split {split!r} is missing",
            cause=f"{path} holds {', '.join(year.folder.name for year in years.values())}",
            fix="name splits as year:name, for example 2007:trainval+2012:trainval",
        )
    return years[y], stem


def _annotation(file: Path) -> _Annotation:
    """Read one annotation. Raises :class:`DataError` naming the file and the reason."""
    try:
        size, data = file.stat().st_size, read_regular(file) if file.stat().st_size <= _LARGEST else b""
    except OSError as error:
        raise _broken(file, str(error)) from error
    if size > _LARGEST:
        raise _broken(file, f"it is larger than {_LARGEST >> 20} MiB")
    if not (data.startswith(_UTF16) or _DECLARED.match(data)) and (encoding := not_utf8(data)):
        raise DataError(f"{file} cannot be read", cause=encoding.cause, fix=encoding.fix)
    try:
        root = ElementTree.fromstring(_text(data))
        for element in root.iter():  # some tools write <Annotation>, or a namespace before each name
            element.tag = element.tag.rpartition("}")[2].lower()
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
    if data.startswith(_UTF16):
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
    """xmin, ymin, xmax, ymax; of a box that was drawn from another corner they may be in the other order."""
    x, y = (sorted(_number(entry, f"bndbox/{axis}{end}") for end in ("min", "max")) for axis in "xy")
    return x[0], y[0], x[1], y[1]


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
    """Whether it is 1; what is left open (``Unspecified``, as labelling tools write) is 0."""
    text = (entry.findtext(key) or "").strip()
    if text.lower() not in _FLAGS:
        raise ValueError(f"<{key}> is {text[:60]!r}, not 0 or 1")
    return _FLAGS[text.lower()]


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
