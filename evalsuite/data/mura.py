"""MURA: radiographs of upper limbs, several images a study, one label a study."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from evalsuite.data import Report
from evalsuite.data.classification import ClassificationSet, ClassificationSource, no_split, read_files
from evalsuite.data.demo import once
from evalsuite.data.images import read_list
from evalsuite.data.radiographs import limb
from evalsuite.errors import DataError

__all__ = ["Mura", "study_of"]

_CLASSES = ("normal", "abnormal")
_PATH = re.compile(r"[^/]+/(?P<inside>[^/]+/XR_(?P<part>\w+)/(?P<patient>patient\d+)/study\d+_(?P<label>\w+?)/[^/]+)")
_PARTS = ("ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST")


def study_of(name: str) -> str:
    """The study of an image: the folder that it lies in."""
    return str(PurePosixPath(name).parent)


class Mura(ClassificationSource):
    """MURA v1.1: ``train_image_paths.csv`` and ``valid_image_paths.csv`` list images, whose study's folder says
    ``positive`` (abnormal) or ``negative``. Groups are patients, tags parts of the body. ``valid`` is scored on.
    """

    name = "mura"
    tree = (
        "MURA-v1.1/train_image_paths.csv\nMURA-v1.1/valid_image_paths.csv\nMURA-v1.1/train/XR_*/patient*/study*/*.png"
    )
    homepage = "https://stanfordmlgroup.github.io/competitions/mura/"
    licence = "the Stanford research agreement of MURA"
    citation = (
        "Rajpurkar et al., MURA: Large Dataset for Abnormality Detection in Musculoskeletal Radiographs, MIDL 2018"
    )

    def locate(self, root: Path | None) -> Path:
        if root is not None:
            for path in (root / "MURA-v1.1", root / "mura", root):
                if all((path / f"{split}_image_paths.csv").is_file() for split in self.splits(path)):
                    return path
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        return ("train", "valid")

    def roles(self, path: Path) -> Mapping[str, str]:
        return {"train": "train", "test": "valid"}

    def load(self, path: Path, split: str) -> ClassificationSet:
        if split not in self.splits(path):
            raise no_split(path, split, self.splits(path))
        file = path / f"{split}_image_paths.csv"
        found = [_read(file, line) for line in read_list(file)]
        files = read_files(path, [image["inside"] for image in found])
        labels = np.array([{"positive": 1, "negative": 0}.get(image["label"], -1) for image in found], dtype=np.int64)
        patients, parts = (np.array([image[key] for image in found], dtype=np.str_) for key in ("patient", "part"))
        return ClassificationSet(
            self.name, split, _CLASSES, files.names, labels, files, np.arange(len(files)), patients, tags=parts
        )

    def examine(self, path: Path, sets: Mapping[str, ClassificationSet], report: Report) -> None:
        """Hold the folders' labels to those of ``train_labeled_studies.csv`` and count the studies."""
        for split, part in sets.items():
            of_study = dict(zip(map(study_of, part.names.tolist()), part.labels.tolist(), strict=True))
            report.counts[split]["studies"] = len(of_study)
            file = path / f"{split}_labeled_studies.csv"
            if not file.is_file():
                continue
            listed = {}
            for line in read_list(file):
                study, _, label = line.rpartition(",")
                listed[study.partition("/")[2].rstrip("/")] = label
            for study, label in sorted(of_study.items()):
                if listed.get(study) != str(label):
                    said = f"says {listed[study]}" if study in listed else "does not list it"
                    report.faults.append(f"{split}: {study} has the label {label} by its folder, {file.name} {said}")

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        def fill(folder: Path) -> None:
            patient = 0
            for number, (split, count) in enumerate((("train", images), ("valid", max(12, images // 2)))):
                paths: list[str] = []
                studies: list[str] = []
                while len(paths) < count:
                    patient += 1
                    rng = np.random.default_rng((seed, 30 + number, patient))
                    for study in range(1, 2 + patient % 2):  # every other patient has two studies
                        broken = bool((patient + study) % 2)
                        place = f"{split}/XR_{_PARTS[patient % 7]}/patient{patient:05d}"
                        place += f"/study{study}_{'positive' if broken else 'negative'}"
                        (folder / place).mkdir(parents=True)
                        studies.append(f"MURA-v1.1/{place}/,{int(broken)}")
                        for view in range(1, 2 + (patient + study) % 3):
                            Image.fromarray(limb(rng, broken)).save(folder / place / f"image{view}.png")
                            paths.append(f"MURA-v1.1/{place}/image{view}.png")
                (folder / f"{split}_image_paths.csv").write_text("\n".join(paths) + "\n", encoding="utf-8")
                (folder / f"{split}_labeled_studies.csv").write_text("\n".join(studies) + "\n", encoding="utf-8")

        return once(root / "MURA-v1.1", seed, images, fill)


def _read(file: Path, line: str) -> dict[str, str]:
    found = _PATH.fullmatch(line)
    if found is None:
        raise DataError(
            f"{file} names {line!r}",
            cause="a line is MURA-v1.1/SPLIT/XR_PART/patientN/studyN_positive/IMAGE",
            fix="restore the file from its source",
        )
    return found.groupdict()
