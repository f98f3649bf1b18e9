"""CheXpert: chest radiographs with fourteen labels, some uncertain; and the 8x200 retrieval lists of ConVIRT."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evalsuite.data import Report
from evalsuite.data.classification import ClassificationSet, ClassificationSource, no_split, read_files
from evalsuite.data.demo import once
from evalsuite.data.radiographs import FINDINGS, chest, write_table
from evalsuite.data.tables import read_columns
from evalsuite.errors import DataError, UsageError

__all__ = ["BLANK", "COMPETITION", "LABELS", "UNCERTAIN", "Chexpert", "Chexpert8x200", "Uncertain", "resolved"]

LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
RETRIEVED = (
    "Atelectasis", "Cardiomegaly", "Edema", "Fracture", "No Finding", "Pleural Effusion", "Pneumonia", "Pneumothorax",
)  # fmt: skip
UNCERTAIN, BLANK = -1, -2  # as this layout's labels hold them; both are no known label

# What GLoRIA and MGCA make of an uncertain label.
_PEERS = {"Atelectasis": 1, "Cardiomegaly": 0, "Consolidation": 0, "Edema": 1, "Pleural Effusion": 1}
_MARKS = {"1.0": 1, "1": 1, "0.0": 0, "0": 0, "-1.0": UNCERTAIN, "-1": UNCERTAIN, "": BLANK}
_PATH = re.compile(r"[^/]+/(?P<inside>.*(?P<patient>patient\d+)/.*)")
_COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")

Ints = NDArray[np.int64]
Uncertain = Literal["peers", "zeros", "ones", "ignore"]


class Chexpert(ClassificationSource):
    """CheXpert v1.0, small or full: ``train.csv`` and the experts' ``valid.csv``, which is scored on.

    Labels are (N, 14) in the files' own marks: 1, 0, :data:`UNCERTAIN` and :data:`BLANK` (not mentioned);
    :func:`resolved` makes what is learnt from of them. Groups are patients, tags the views ``Frontal`` and ``Lateral``.
    """

    name = "chexpert"
    tree = "CheXpert-v1.0-small/train.csv\nCheXpert-v1.0-small/valid.csv"
    homepage = "https://stanfordmlgroup.github.io/competitions/chexpert/"
    licence = "the Stanford research agreement of CheXpert"
    citation = "Irvin et al., CheXpert: A Large Chest Radiograph Dataset, AAAI 2019"

    def locate(self, root: Path | None) -> Path:
        if root is not None:
            for path in (*homes(root), root):
                if all((path / f"{split}.csv").is_file() for split in self.splits(path)):
                    return path
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        return ("train", "valid")

    def roles(self, path: Path) -> Mapping[str, str]:
        return {"train": "train", "test": "valid"}

    def load(self, path: Path, split: str) -> ClassificationSet:
        if split not in self.splits(path):
            raise no_split(path, split, self.splits(path))
        table = read_columns(path / f"{split}.csv", ("Path", "Frontal/Lateral", *LABELS))
        names, patients = _named(path / f"{split}.csv", table["Path"])
        files = read_files(path, names)
        views = np.array(table["Frontal/Lateral"], dtype=np.str_)
        return ClassificationSet(
            self.name, split, LABELS, files.names, _marks(path / f"{split}.csv", table, LABELS), files,
            np.arange(len(files)), patients, tags=views,
        )  # fmt: skip

    def examine(self, path: Path, sets: Mapping[str, ClassificationSet], report: Report) -> None:
        for split, part in sets.items():
            report.counts[split]["uncertain"] = int((part.labels == UNCERTAIN).sum())
            report.counts[split]["blank"] = int((part.labels == BLANK).sum())
            views, numbers = np.unique(part.tags if part.tags is not None else [], return_counts=True)
            report.counts[split]["views"] = dict(zip(views.tolist(), numbers.tolist(), strict=True))
            listed, times = np.unique(part.names, return_counts=True)
            report.faults += [f"{split} lists {name} twice" for name in listed[times > 1].tolist()]

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        def fill(folder: Path) -> None:
            patient = 0
            for number, (split, count) in enumerate((("train", images), ("valid", max(16, images // 2)))):
                rows: list[list[object]] = []
                while len(rows) < count:
                    patient += 1
                    rng = np.random.default_rng((seed, 50 + number, patient))
                    rows += _demo_patient(folder, split, patient, rng)
                write_table(folder / f"{split}.csv", (*_COLUMNS, *LABELS), rows)

        return once(root / "CheXpert-v1.0-small", seed, images, fill)


def resolved(
    labels: Ints, names: Sequence[str], uncertain: Uncertain = "peers", blank: Literal["zero", "ignore"] = "zero"
) -> Ints:
    """(N, L) marks of the labels ``names`` as 1, 0 and -1 (unknown).

    ``uncertain``: 0 (``zeros``), 1 (``ones``) or unknown (``ignore``), the U-Zeros, U-Ones and U-Ignore of the
    CheXpert paper; or ``peers``, as GLoRIA and MGCA have it: 1 for Atelectasis, Edema and Pleural Effusion, 0 for
    Cardiomegaly and Consolidation. ``blank``: not mentioned is 0, or unknown.

    Raises :class:`UsageError` for ``peers`` of a label for which they say nothing.
    """
    if uncertain == "peers":
        lacking = [name for name in names if name not in _PEERS]
        if lacking:
            raise UsageError(
                f"no rule for an uncertain {lacking[0]}",
                cause=f"the peers have one for {', '.join(_PEERS)}",
                fix="--set uncertain=zeros, ones or ignore",
            )
        put = np.array([_PEERS[name] for name in names])
    else:
        put = np.full(len(names), {"zeros": 0, "ones": 1, "ignore": -1}[uncertain])
    found = np.where(labels == UNCERTAIN, put, labels)
    return np.where(found == BLANK, 0 if blank == "zero" else -1, found).astype(np.int64)


class Chexpert8x200(ClassificationSource):
    """The CheXpert 8x200 retrieval lists of ConVIRT: 1600 candidates, 200 of each of eight findings, queries by image
    (10 a finding) and by sentence (5 a finding). The images are those of CheXpert, beside the lists.

    Splits are ``candidates``, with (N, 8) marks, and ``queries``; :meth:`sentences` reads the others. Six patients are
    on both sides as published, hence a note.
    """

    name = "chexpert-retrieval"
    tree = "chexpert-8x200/image-retrieval/candidate.csv\nchexpert-8x200/image-retrieval/query.csv\n" \
        "chexpert-8x200/text-retrieval/query.csv\nCheXpert-v1.0-small/train"  # fmt: skip
    homepage = "https://github.com/yuhaozhang/convirt"
    licence = "none stated for the lists; images under the Stanford research agreement of CheXpert"
    citation = "Zhang et al., Contrastive Learning of Medical Visual Representations from Paired Images and Text, 2022"
    overlap = "note"

    def locate(self, root: Path | None) -> Path:
        if root is not None:
            for path in (root / "chexpert-8x200", root / "convirt", root):
                if (path / "image-retrieval" / "query.csv").is_file():
                    return path
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        return ("candidates", "queries")

    def roles(self, path: Path) -> Mapping[str, str]:
        return {"candidates": "candidates", "queries": "queries"}

    def load(self, path: Path, split: str) -> ClassificationSet:
        if split == "candidates":
            file = path / "image-retrieval" / "candidate.csv"
            table = read_columns(file, ("Path", *RETRIEVED))
            listed, labels = table["Path"], _marks(file, table, RETRIEVED)
        elif split == "queries":
            labels, listed = self.queries(path)
            file = path / "image-retrieval" / "query.csv"
        else:
            raise no_split(path, split, self.splits(path))
        names, patients = _named(file, listed)
        files = read_files(_images(path), names)
        return ClassificationSet(
            self.name, split, RETRIEVED, files.names, labels, files, np.arange(len(files)), patients
        )

    def queries(self, path: Path) -> tuple[Ints, list[str]]:
        """The findings (80,) that images are to find, and the images' paths."""
        return _asked(path / "image-retrieval" / "query.csv", "Path")

    def sentences(self, path: Path) -> tuple[Ints, list[str]]:
        """The findings (40,) that sentences are to find, and the sentences."""
        return _asked(path / "text-retrieval" / "query.csv", "Text")

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        def fill(folder: Path) -> None:
            candidates: list[list[object]] = []
            queries: list[list[object]] = []
            for index in range(max(32, images) + 16):
                rng = np.random.default_rng((seed, 60, index))
                finding, query = RETRIEVED[index % 8], index < 16
                # The first three queries' patients are candidates too, as some are in the real lists.
                place = (
                    f"train/patient{90016 + index if index < 3 else 90000 + index}/study{1 + query}/view1_frontal.jpg"
                )
                _draw(folder / "CheXpert-v1.0-small" / place, rng, [finding])
                path = f"CheXpert-v1.0-small/{place}"
                if query:
                    queries.append([finding, path])
                else:
                    marks = [float(name == finding) for name in LABELS]
                    candidates.append([path, "Female", 60, "Frontal", "AP", *marks])
            sentences = [[f, f"There is {f.lower()} in view {i}."] for f in RETRIEVED for i in range(2)]
            (folder / "image-retrieval").mkdir()
            (folder / "text-retrieval").mkdir()
            write_table(folder / "image-retrieval" / "candidate.csv", (*_COLUMNS, *LABELS), candidates)
            write_table(folder / "image-retrieval" / "query.csv", ("Variable", "Path"), queries)
            write_table(folder / "text-retrieval" / "candidate.csv", (*_COLUMNS, *LABELS), candidates)
            write_table(folder / "text-retrieval" / "query.csv", ("Variable", "Text"), sentences)

        return once(root / "chexpert-8x200", seed, images, fill)


def homes(root: Path) -> Iterator[Path]:
    """Where CheXpert may lie below a data root."""
    yield from (root / name for name in ("CheXpert-v1.0-small", "CheXpert-v1.0", "chexpert"))


def _images(path: Path) -> Path:
    """The CheXpert folder in or beside the folder of the lists."""
    for home in (*homes(path), *homes(path.parent)):
        if (home / "train").is_dir():
            return home
    raise DataError(
        f"the images of {path} were not found",
        cause=f"CheXpert-v1.0-small/train is neither in {path} nor beside it",
        fix="put CheXpert beside the lists, or a link to it",
    )


def _named(file: Path, paths: Sequence[str]) -> tuple[list[str], NDArray[np.str_]]:
    """Paths below the data set's own folder, whatever its name in the file, and their patients."""
    found = [_PATH.fullmatch(path) for path in paths]
    for row, (match, path) in enumerate(zip(found, paths, strict=True)):
        if match is None:
            raise DataError(
                f"{file} names {path!r} in row {row + 2}",
                cause="a path is CheXpert-v1.0-small/SPLIT/patientN/studyN/IMAGE",
                fix="restore the file from its source",
            )
    return (
        [match["inside"] for match in found if match],
        np.array([match["patient"] for match in found if match], dtype=np.str_),
    )


def _marks(file: Path, table: Mapping[str, Sequence[str]], labels: Sequence[str]) -> Ints:
    """(N, L) marks. Raises :class:`DataError` naming the row of another value."""
    for name in labels:
        odd = next((row for row, cell in enumerate(table[name]) if cell not in _MARKS), None)
        if odd is not None:
            raise DataError(
                f"{file} has {table[name][odd]!r} for {name} in row {odd + 2}",
                cause="a label is 1.0, 0.0, -1.0 (uncertain) or blank (not mentioned)",
                fix="correct that cell, or restore the file from its source",
            )
    return np.array([[_MARKS[cell] for cell in table[name]] for name in labels], dtype=np.int64).T


def _asked(file: Path, column: str) -> tuple[Ints, list[str]]:
    table = read_columns(file, ("Variable", column))
    odd = sorted(set(table["Variable"]) - set(RETRIEVED))
    if odd:
        raise DataError(
            f"{file} asks for {odd[0]!r}",
            cause=f"findings are {', '.join(RETRIEVED)}",
            fix="restore the file from its source",
        )
    return np.array([RETRIEVED.index(name) for name in table["Variable"]], dtype=np.int64), table[column]


def _demo_patient(folder: Path, split: str, patient: int, rng: np.random.Generator) -> list[list[object]]:
    """The rows of one patient: one or two studies, every third with a lateral view; uncertain and blank in train."""
    rows: list[list[object]] = []
    for study in range(1, 2 + patient % 2):
        shown = [name for name in COMPETITION if rng.random() < 0.35]
        marks: list[object] = []
        for name in LABELS:
            mark: object = float(name in shown)
            if split == "train" and not rng.integers(6):
                mark = -1.0
            elif split == "train" and name not in shown and rng.integers(2):
                mark = ""
            marks.append(mark)
        for view, lateral in enumerate((False, True) if patient % 3 == 0 else (False,), 1):
            kind = "Lateral" if lateral else "Frontal"
            place = f"{split}/patient{patient:05d}/study{study}/view{view}_{kind.lower()}.jpg"
            _draw(folder / place, rng, shown, lateral)
            rows.append([f"CheXpert-v1.0-small/{place}", "Male", 50, kind, "" if lateral else "AP", *marks])
    return rows


def _draw(path: Path, rng: np.random.Generator, findings: Sequence[str], lateral: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [name for name in findings if name in FINDINGS]
    Image.fromarray(chest(rng, shown, lateral=lateral)).save(path, quality=92)
