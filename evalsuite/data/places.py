"""Places205 and Places365: scenes, by the official lists or in a folder a class.

Formats: http://places.csail.mit.edu/downloadData.html (``train_places205.csv``: ``a/abbey/gsun_0123.jpg 0`` a line) and
http://places2.csail.mit.edu/download.html (``places365_train_standard.txt``, ``categories_places365.txt``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evalsuite.data.classification import ClassificationSet, ClassificationSource, Folder, read_files
from evalsuite.data.demo import SHAPES, labelled, once
from evalsuite.data.images import read_lines
from evalsuite.errors import DataError

__all__ = ["Places205", "Places365"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Split:
    """Where the list of a split may lie, and the folders that its names may count from; the first that is there."""

    lists: tuple[str, ...]
    images: tuple[str, ...]


class Places205(ClassificationSource):
    """Places205: 2,448,873 images to learn from, scored on the 20,500 of val; the test labels are withheld.

    By ``trainvalsplit_places205`` and the images of 256 pixels as they are unpacked, or ``train`` and ``val`` with a
    folder a class.
    """

    name = "places"
    tree = (
        "places205/trainvalsplit_places205/train_places205.csv\n"
        "places205/data/vision/torralba/deeplearning/images256/a/abbey/*.jpg"
    )
    homepage = "http://places.csail.mit.edu/"
    licence = "for non-commercial research and education, under the terms of places.csail.mit.edu"
    citation = "Zhou et al., Learning Deep Features for Scene Recognition using Places Database, NeurIPS 2014"
    _homes: ClassVar[tuple[str, ...]] = ("places205", "Places205", "places", ".")
    _layout: ClassVar[Mapping[str, _Split]] = {
        split: _Split(
            (f"trainvalsplit_places205/{split}_places205.csv", f"{split}_places205.csv"),
            ("data/vision/torralba/deeplearning/images256", "images256"),
        )
        for split in ("train", "val")
    }

    def locate(self, root: Path | None) -> Path:
        for path in () if root is None else [root / home for home in self._homes]:
            if _first(path, self._layout["train"].lists) or ((path / "train").is_dir() and (path / "val").is_dir()):
                return path
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        return ("train", "val")

    def load(self, path: Path, split: str) -> ClassificationSet:
        if not _first(path, self._layout["train"].lists):
            return Folder().load(path, split)
        train = self._listed(path, "train")
        classes = self.categories(path, train)
        names, labels = train if split == "train" else self._listed(path, split)
        if labels.max() >= len(classes):
            raise DataError(
                f"the list of {split} in {path} has the label {labels.max()}",
                cause=f"there are {len(classes)} classes, counted from 0",
                fix="restore the lists from the official archive",
            )
        files = read_files(path, names)
        return ClassificationSet(self.name, split, classes, files.names, labels, files, np.arange(len(files)))

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        def fill(folder: Path) -> None:
            for number, (split, count) in enumerate((("train", images), ("val", max(6, images // 2)))):
                place, lines = self._layout[split], []
                for index, (pixels, label) in enumerate(zip(*labelled(seed, number, count, 64), strict=True)):
                    name = self._demo_name(split, index, int(label))
                    file = folder / place.images[0] / name.removeprefix("/")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(file, quality=92)
                    lines.append(f"{name} {label}\n")
                listed = folder / place.lists[0]
                listed.parent.mkdir(parents=True, exist_ok=True)
                listed.write_text("".join(lines), encoding="utf-8")
            self._demo_extra(folder)

        return once(root / self._homes[0], seed, images, fill)

    def categories(self, path: Path, train: tuple[Sequence[str], Ints]) -> tuple[str, ...]:
        """The classes in the order of their labels: the folders of the training images, ``a/abbey``.

        Raises :class:`DataError` where a label is of several folders, or of none.
        """
        base = len(PurePosixPath(_folder(path, self._layout["train"])).parts)
        names, labels = train
        found: dict[int, str] = {}
        for name, label in zip(names, labels.tolist(), strict=True):
            folder = "/".join(PurePosixPath(name).parts[base:-1])
            if found.setdefault(label, folder) != folder:
                raise DataError(
                    f"the training list of {path} gives one label to two classes",
                    cause=f"{label} is of {found[label]} and of {folder}",
                    fix="restore the lists from the official archive",
                )
        lost = sorted(set(range(max(found) + 1)) - set(found))
        if lost:
            raise DataError(
                f"the training list of {path} has no image of class {lost[0]}",
                cause=f"its labels run from 0 to {max(found)}",
                fix="restore the lists from the official archive",
            )
        return tuple(found[label] for label in range(len(found)))

    def _demo_name(self, split: str, index: int, label: int) -> str:
        return f"{tuple(SHAPES)[label][0]}/{tuple(SHAPES)[label]}/gsun_{split}{index:04d}.jpg"

    def _demo_extra(self, folder: Path) -> None:
        """What else the layout has."""

    def _listed(self, path: Path, split: str) -> tuple[list[str], Ints]:
        """Names below ``path``, and labels, of the official list of a split."""
        if split not in self._layout:
            raise DataError(
                f"{path} has no split {split!r}", cause="its splits are train and val", fix="choose one of them"
            )
        place = self._layout[split]
        file = _first(path, place.lists) or path / place.lists[0]
        folder = _folder(path, place)
        rows = [line.rsplit(maxsplit=1) for line in read_lines(file)]
        odd = next((row for row in rows if len(row) != 2 or not row[1].isdecimal()), None)
        if odd is not None:
            raise DataError(
                f"{file} cannot be read",
                cause=f"the line {' '.join(odd)!r} is no name with a number",
                fix="restore it from the official archive",
            )
        names = [f"{folder}/{name.removeprefix('/')}" for name, _ in rows]
        return names, np.array([int(label) for _, label in rows], dtype=np.int64)


class Places365(Places205):
    """Places365-Standard: 1,803,460 images to learn from, scored on the 36,500 of val; the test labels are withheld.

    By the official lists, beside images of 256 pixels or the large ones (torchvision's names of folders, or the
    archives'), or ``train`` and ``val`` with a folder a class.
    """

    name = "places365"
    tree = (
        "places365/places365_train_standard.txt\nplaces365/data_256_standard/a/airfield/*.jpg\nplaces365/val_256/*.jpg"
    )
    homepage = "http://places2.csail.mit.edu/"
    licence = "for non-commercial research and education, under the terms of places2.csail.mit.edu"
    citation = "Zhou et al., Places: A 10 Million Image Database for Scene Recognition, TPAMI 2018"
    _homes = ("places365", "Places365", "places365_standard", ".")
    _layout: ClassVar[Mapping[str, _Split]] = {
        split: _Split((name, f"filelist_places365-standard/{name}"), images)
        for split, name, images in (
            (
                "train",
                "places365_train_standard.txt",
                ("data_256_standard", "data_256", "data_large_standard", "data_large"),
            ),
            ("val", "places365_val.txt", ("val_256", "val_large")),
        )
    }
    _names: ClassVar[tuple[str, str]] = (
        "categories_places365.txt",
        "filelist_places365-standard/categories_places365.txt",
    )

    def categories(self, path: Path, train: tuple[Sequence[str], Ints]) -> tuple[str, ...]:
        """Those of ``categories_places365.txt``; where it is not there, as of Places205."""
        file = _first(path, self._names)
        if file is None:
            return super().categories(path, train)
        rows = [line.rsplit(maxsplit=1) for line in read_lines(file)]
        if [row[-1] for row in rows] != [str(i) for i in range(len(rows))] or any(len(row) != 2 for row in rows):
            raise DataError(
                f"{file} cannot be read",
                cause="its lines are not names with the numbers from 0 on",
                fix="restore it from the official archive",
            )
        return tuple(name.removeprefix("/") for name, _ in rows)

    def _demo_name(self, split: str, index: int, label: int) -> str:
        return f"/{super()._demo_name(split, index, label)}" if split == "train" else f"Places365_val_{index:08d}.jpg"

    def _demo_extra(self, folder: Path) -> None:
        lines = [f"/{name[0]}/{name} {label}\n" for label, name in enumerate(SHAPES)]
        (folder / self._names[0]).write_text("".join(lines), encoding="utf-8")


def _first(path: Path, names: Sequence[str]) -> Path | None:
    return next((path / name for name in names if (path / name).is_file()), None)


def _folder(path: Path, split: _Split) -> str:
    """The folder of a split's images, below ``path``. Raises :class:`DataError` where there is none."""
    found = next((name for name in split.images if (path / name).is_dir()), None)
    if found is None:
        raise DataError(
            f"{path} has lists and no images",
            cause=f"none of the folders {', '.join(split.images)} is there",
            fix="unpack the images there, or link to them",
        )
    return found
