"""PASCAL VOC image classification: which of the twenty classes an image shows.

Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2007/htmldoc/ section 8.1 (``ImageSets/Main/CLASS_SPLIT.txt``: one
image a line with 1 for present, -1 for absent, 0 where all objects of the class are difficult).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evalsuite.data import Report
from evalsuite.data.classification import ClassificationSet, ClassificationSource, read_files
from evalsuite.data.detection import DetectionSet
from evalsuite.data.images import read_lines
from evalsuite.data.voc import CLASSES, Voc
from evalsuite.errors import DataError

__all__ = ["VocClassification"]

_MARKS = {"1": 1, "-1": 0, "0": -1}


class VocClassification(ClassificationSource):
    """VOC 2007 with its twenty labels an image: 5,011 images of trainval to learn from, 4,952 of test to score on.

    A label is 1, 0, or -1 where every object of the class is marked difficult: the devkit leaves such an image out of
    that class. Labels are those of the devkit's class lists, or, where a development kit comes without them, follow
    from its annotations by the same rule; ``evalsuite data verify`` compares the two. Splits are named as those of
    the data set ``voc``.
    """

    name = "voc07-cls"
    tree = Voc.tree.partition("\nVOCdevkit/VOC2012")[0]
    homepage = "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/"
    licence = Voc.licence
    citation = Voc.citation

    def locate(self, root: Path | None) -> Path:
        try:
            return Voc().locate(root)
        except DataError:
            raise self.missing(root) from None

    def splits(self, path: Path) -> tuple[str, ...]:
        there = Voc().splits(path)
        return tuple(split for split in self.roles(path).values() if split in there) or there

    def roles(self, path: Path) -> Mapping[str, str]:
        return {"train": "2007:trainval", "test": "2007:test"}

    def load(self, path: Path, split: str) -> ClassificationSet:
        found = Voc().load(path, split)
        folder = found.records[0].path.parent.parent
        names = [record.path.stem for record in found.records]
        marks = _listed(folder, split.rpartition(":")[2], names)
        labels = _annotated(found) if marks is None else marks
        files = read_files(folder / "JPEGImages", [record.path.name for record in found.records])
        return ClassificationSet(self.name, split, CLASSES, files.names, labels, files, np.arange(len(files)))

    def examine(self, path: Path, sets: Mapping[str, ClassificationSet], report: Report) -> None:
        for split, part in sets.items():
            apart = (part.labels != _annotated(Voc().load(path, split))).any(axis=1)
            if apart.any():
                told = f"{split}: the class lists mark {int(apart.sum())} images otherwise than their annotations"
                report.faults.append(f"{told}, first {part.names[apart][0]}")

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        return Voc().demo(root, seed, images)


def _annotated(found: DetectionSet) -> NDArray[np.int64]:
    """(N, 20) marks from the annotations."""
    marks = np.zeros((len(found), len(CLASSES)), dtype=np.int64)
    for row, record in zip(marks, found.records, strict=True):
        row[record.labels[record.difficult]] = -1
        row[record.labels[~record.difficult]] = 1
    return marks


def _listed(folder: Path, stem: str, names: Sequence[str]) -> NDArray[np.int64] | None:
    """(N, 20) marks of the devkit's class lists; None where it has none of them.

    Raises :class:`DataError` for a list that is missing beside others, or does not mark the images of the split.
    """
    files = [folder / "ImageSets" / "Main" / f"{name}_{stem}.txt" for name in CLASSES]
    if not any(file.is_file() for file in files):
        return None
    columns = []
    for file in files:
        rows = [line.split() for line in read_lines(file)]
        odd = next((row for row in rows if len(row) != 2 or row[1] not in _MARKS), None)
        if odd is not None or [row[0] for row in rows] != list(names):
            raise DataError(
                f"{file} does not mark the images of {stem}",
                cause=f"it has the line {' '.join(odd)!r}" if odd else f"its images are not those of {stem}.txt",
                fix="restore it from the official archive, or remove all of the lists: labels are annotated too",
            )
        columns.append([_MARKS[row[1]] for row in rows])
    return np.ascontiguousarray(np.array(columns, dtype=np.int64).T)
