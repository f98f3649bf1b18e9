"""COVIDx: chest radiographs from many sources, in versions that differ by their lists of train and test images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from evalsuite.data.classification import ClassificationSet, ClassificationSource, read_files
from evalsuite.data.demo import once
from evalsuite.data.images import read_list
from evalsuite.data.radiographs import chest
from evalsuite.errors import DataError

__all__ = ["Covidx"]

_KINDS = (("normal", "pneumonia", "COVID-19"), ("negative", "positive"))
_LIST = re.compile(r"(train|test|val)(?:_COVIDx(\w*))?\.txt")
_ROW = re.compile(r"(?P<named>.+) (?P<label>normal|pneumonia|COVID-19|negative|positive)(?: (?P<source>\S+))?")


class _Row(NamedTuple):
    patient: str
    file: str
    label: str
    source: str


class Covidx(ClassificationSource):
    """COVIDx of any version: ``train_COVIDx9A.txt`` and ``test_COVIDx9A.txt`` are the splits ``train 9A`` and
    ``test 9A``. A line is a patient, a file name, a class and, from version 3 on, a source, divided by spaces, which
    patients (versions 7 and 8) and file names may hold too. Images are in ``train`` and ``test``, or in those below
    ``data``. Groups are patients of a source, tags sources. Versions A have three classes, B two.
    """

    name = "covidx"
    tree = "covidx/train_COVIDx9A.txt\ncovidx/test_COVIDx9A.txt\ncovidx/train/*.png\ncovidx/test/*.png"
    homepage = "https://github.com/lindawangg/COVID-Net/blob/master/docs/COVIDx.md"
    licence = "that of each source; see the page of the data set"
    citation = "Wang, Lin and Wong, COVID-Net, Scientific Reports 2020"

    def locate(self, root: Path | None) -> Path:
        if root is not None:
            for path in (root / "covidx", root / "COVIDx", root / "covidx-cxr2", root):
                if _lists(path) and _images(path, "train").is_dir():
                    return path
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        return tuple(_lists(path))

    def roles(self, path: Path) -> Mapping[str, str]:
        """Every split is its own role; those of the only version there is are ``train`` and ``test`` too."""
        found = {split: split for split in self.splits(path)}
        versions = {_version(split) for split in found}
        return found if len(versions) > 1 else found | {split.split()[0]: split for split in found}

    def leaks(self, split: str, other: str) -> bool:
        """A later version's train split holds what an earlier one's did; only one version's splits must not share."""
        return split != other and _version(split) == _version(other)

    def load(self, path: Path, split: str) -> ClassificationSet:
        lists = _lists(path)
        if split not in lists:
            versions = sorted({_version(name) for name in lists})
            raise DataError(
                f"{path} has no list {split!r}",
                cause=f"it has {', '.join(lists)}",
                fix=" or ".join(
                    f"--set 'train_split={f'train {v}'.strip()}' --set 'test_split={f'test {v}'.strip()}'"
                    for v in versions
                ),
            )
        folder = _images(path, split.split()[0])
        there = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        rows = [_row(lists[split], line, there) for line in read_list(lists[split])]
        classes = next((kind for kind in _KINDS if {row.label for row in rows} <= set(kind)), None)
        if classes is None:
            raise DataError(
                f"{lists[split]} mixes classes of two versions",
                cause=f"it has {', '.join(sorted({row.label for row in rows}))}",
                fix="restore the file from its source",
            )
        files = read_files(folder, [row.file for row in rows])
        labels = np.array([classes.index(row.label) for row in rows], dtype=np.int64)
        patients = np.array([f"{row.source}/{row.patient}" for row in rows], dtype=np.str_)
        sources = np.array([row.source for row in rows], dtype=np.str_)
        return ClassificationSet(
            self.name, split, classes, files.names, labels, files, np.arange(len(files)), patients, tags=sources
        )

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        def fill(folder: Path) -> None:
            for number, (split, count) in enumerate((("train", images), ("test", max(12, images // 2)))):
                (folder / split).mkdir()
                lines = []
                for index in range(count):
                    rng = np.random.default_rng((seed, 40 + number, index))
                    label = _KINDS[0][index % 3]
                    findings = {"normal": (), "pneumonia": ("Pneumonia",), "COVID-19": ("Edema",)}[label]
                    patient, file = _demo_names(split, index)
                    Image.fromarray(chest(rng, findings)).save(folder / split / file)
                    lines.append(f"{patient} {file} {label} {('cohen', 'rsna', 'sirm')[index % 3]}")
                (folder / f"{split}_COVIDx9A.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

        return once(root / "covidx", seed, images, fill)


def _demo_names(split: str, index: int) -> tuple[str, str]:
    """Patients with several images, ids with a space (versions 7 and 8) and file names with one."""
    number = index + (0 if split == "train" else 5000)
    if index % 9 == 2:
        return f"COVID {number}", f"COVID({number}).png"
    if index % 9 == 5:
        return f"COVID-19({number})", f"COVID-19 ({number}).png"
    return f"p{number // 6}", f"{number:05d}.png"


def _lists(path: Path) -> dict[str, Path]:
    """{split: its list}, older versions first; lists lie in the folder itself or in ``labels``."""
    found = {}
    for folder in (path / "labels", path):
        for file in folder.glob("*.txt") if folder.is_dir() else ():
            match = _LIST.fullmatch(file.name)
            if match is not None and match[2] != "Sev":  # grades of severity, another task
                found[f"{match[1]} {match[2] or ''}".strip()] = file
    return dict(sorted(found.items(), key=lambda item: (_version(item[0]), item[0].startswith("test"))))


def _version(split: str) -> str:
    return split.partition(" ")[2]


def _images(path: Path, split: str) -> Path:
    return path / "data" / split if (path / "data" / split).is_dir() else path / split


def _row(file: Path, line: str, there: set[str]) -> _Row:
    """Of several places where the patient may end, the one that leaves the name of a file that is there; else the last
    one, as no published file name has a space."""
    found = _ROW.fullmatch(line)
    words = found["named"].split(" ") if found else []
    ways = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(len(words) - 1, 0, -1)]
    ways = [(patient, name) for patient, name in ways if "/" not in name]
    if found is None or not ways:
        raise DataError(
            f"{file} has the line {line!r}",
            cause="a line is a patient, a file name, a class and perhaps a source",
            fix="restore the file from its source",
        )
    patient, name = next((way for way in ways if way[1] in there), ways[0])
    return _Row(patient, name, found["label"], found["source"] or "")
