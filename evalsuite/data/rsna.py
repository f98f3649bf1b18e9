"""RSNA pneumonia: DICOM radiographs of the Kaggle challenge's second stage, boxes in one CSV file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from evalsuite.data import Report
from evalsuite.data.classification import ClassificationSet, ClassificationSource, no_split, read_files
from evalsuite.data.demo import once
from evalsuite.data.dicom import pydicom, read_dicom
from evalsuite.data.radiographs import chest, write_dicom, write_table
from evalsuite.data.tables import read_columns
from evalsuite.errors import DataError

__all__ = ["Rsna", "divided", "read_rsna"]

LABELS = "stage_2_train_labels.csv"
DETAILS = "stage_2_detailed_class_info.csv"
IMAGES = "stage_2_train_images"
_CLASSES = ("no pneumonia", "pneumonia")


def read_rsna(path: Path) -> NDArray[np.uint8]:
    """One image as GLoRIA and MGCA read it: stored values times 255 / their maximum, MONOCHROME1 inverted."""
    return read_dicom(path, "max")


def divided(patients: list[str]) -> dict[str, list[str]]:
    """Train, val and test, 70 : 15 : 15, of the sorted ids: the split of GLoRIA and MGCA.

    It is scikit-learn's ``train_test_split``, once at 0.3 and once at 0.5, both with ``random_state=0``; the first part
    of the second is test.
    """
    train, rest = train_test_split(sorted(patients), test_size=0.3, random_state=0)
    test, val = train_test_split(rest, test_size=0.5, random_state=0)
    return {"train": train, "val": val, "test": test}


class Rsna(ClassificationSource):
    """The RSNA pneumonia detection challenge, stage 2: is there pneumonia (a box) or not.

    The test images of the challenge have no labels; the labelled ones are divided as :func:`divided` says. A patient
    with several boxes has several rows and one image. Tags are the classes of the detailed list, where it is there.
    """

    name = "rsna"
    tree = f"rsna/{LABELS}\nrsna/{IMAGES}/*.dcm"
    homepage = "https://www.kaggle.com/c/rsna-pneumonia-detection-challenge"
    licence = "the terms of the challenge: for non-commercial research and education"
    citation = "Shih et al., Augmenting the NIH Chest Radiograph Dataset, Radiology: AI 2019"

    def locate(self, root: Path | None) -> Path:
        if root is not None:
            for path in (root / "rsna", root / "rsna-pneumonia-detection-challenge", root / "rsna_pneumonia", root):
                if (path / LABELS).is_file() and (path / IMAGES).is_dir():
                    return path
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        return ("train", "val", "test")

    def load(self, path: Path, split: str) -> ClassificationSet:
        pydicom()  # refused here, before hours of work
        targets, disagreeing = _targets(path / LABELS)
        if len(targets) < 7:
            raise DataError(
                f"{path / LABELS} lists {len(targets)} patients",
                cause="they are divided 70 : 15 : 15",
                fix="restore the file from the challenge",
            )
        patients = divided(list(targets))
        if split not in patients:
            raise no_split(path, split, patients)
        chosen = patients[split]
        files = read_files(path / IMAGES, [f"{patient}.dcm" for patient in chosen], read=read_rsna)
        labels = np.array([targets[patient] for patient in chosen], dtype=np.int64)
        kinds = _details(path)
        tags = None if kinds is None else np.array([kinds.get(p, {""}).copy().pop() for p in chosen], dtype=np.str_)
        odd = len(disagreeing & set(chosen))
        notes = (f"{odd} patients have rows with and without pneumonia; one with counts",) if odd else ()
        groups = np.array(chosen, dtype=np.str_)
        return ClassificationSet(
            self.name, split, _CLASSES, files.names, labels, files, np.arange(len(files)), groups, notes, tags
        )

    def examine(self, path: Path, sets: Mapping[str, ClassificationSet], report: Report) -> None:
        kinds = _details(path)
        for split, part in sets.items():
            report.counts[split]["boxes"] = _boxes(path / LABELS, part)
            if kinds is None or part.groups is None:
                continue
            named = [kinds.get(patient, set()) for patient in part.groups.tolist()]
            lacking = sum(not kind for kind in named)
            report.counts[split]["detailed"] = dict(Counter(next(iter(kind)) for kind in named if len(kind) == 1))
            report.faults += [f"{split}: {lacking} patients are not in {DETAILS}"] if lacking else []
            several = [p for p, kind in zip(part.groups.tolist(), named, strict=True) if len(kind) > 1]
            report.faults += [f"{split}: {patient} has several classes in {DETAILS}" for patient in several]

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        def fill(folder: Path) -> None:
            (folder / IMAGES).mkdir()
            boxes, details = [], []
            for index in range(max(10, round(images / 0.7))):
                rng = np.random.default_rng((seed, 20, index))
                patient = rng.bytes(8).hex()
                findings = ((), ("Pneumonia",), ("Cardiomegaly",), ("Pneumonia",))[index % 4]
                kind = {(): "Normal", ("Pneumonia",): "Lung Opacity"}.get(findings, "No Lung Opacity / Not Normal")
                write_dicom(folder / IMAGES / f"{patient}.dcm", chest(rng, findings), inverted=index % 5 < 2)
                for _ in range(1 + index % 3 if findings == ("Pneumonia",) else 1):
                    corner = [f"{v:.1f}" for v in rng.uniform(5, 30, 4)] if findings == ("Pneumonia",) else [""] * 4
                    boxes.append([patient, *corner, int(findings == ("Pneumonia",))])
                    details.append([patient, kind])
            write_table(folder / LABELS, ["patientId", "x", "y", "width", "height", "Target"], boxes)
            write_table(folder / DETAILS, ["patientId", "class"], details)

        return once(root / "rsna", seed, images, fill)


def _targets(file: Path) -> tuple[dict[str, int], set[str]]:
    """{patient: 1 if any row says so, 0, or -1 where all are blank}, and the patients whose rows disagree."""
    table = read_columns(file, ("patientId", "Target"))
    said: defaultdict[str, set[int]] = defaultdict(set)
    for row, (patient, target) in enumerate(zip(table["patientId"], table["Target"], strict=True)):
        if target not in ("0", "1", "") or not patient:
            raise DataError(
                f"{file} has the target {target!r} for patient {patient!r} in row {row + 2}",
                cause="a target is 0 or 1, or blank where it is missing, and a row has a patient",
                fix="correct that row, or restore the file from the challenge",
            )
        said[patient].add(int(target) if target else -1)
    return {p: max(values) for p, values in said.items()}, {p for p, values in said.items() if {0, 1} <= values}


def _boxes(file: Path, part: ClassificationSet) -> int:
    table = read_columns(file, ("patientId", "Target"))
    held = set(() if part.groups is None else part.groups.tolist())
    return sum(p in held and t == "1" for p, t in zip(table["patientId"], table["Target"], strict=True))


def _details(path: Path) -> dict[str, set[str]] | None:
    """{patient: its detailed classes, one in sound files}; None where the list is not there."""
    if not (path / DETAILS).is_file():
        return None
    table = read_columns(path / DETAILS, ("patientId", "class"))
    found: defaultdict[str, set[str]] = defaultdict(set)
    for patient, kind in zip(table["patientId"], table["class"], strict=True):
        found[patient].add(kind)
    return dict(found)
