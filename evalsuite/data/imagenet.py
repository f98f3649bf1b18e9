"""ImageNet-1k and Tiny ImageNet in the folders people unpack them to."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePath

import numpy as np

from evalsuite.data.classification import ClassificationSet, ClassificationSource, Folder, class_folders, read_files
from evalsuite.data.demo import write_classes
from evalsuite.data.images import read_lines
from evalsuite.errors import DataError

__all__ = ["ImageNet", "TinyImageNet"]


class ImageNet(Folder):
    """ImageNet-1k: ``train`` and ``val`` with a folder a class, named by its WordNet id.

    The official lists of 1 % and 10 % of the training images are SimCLR's (google-research/simclr,
    ``imagenet_subsets/1percent.txt`` and ``10percent.txt``, a file name a line); they are looked for in that folder
    beside ``train``, and beside the data set's own folder, and as ``imagenet_1percent.txt``, VISSL's name for them.
    """

    name = "imagenet"
    serves = ()
    tree = "imagenet/train/n01440764/*.JPEG\nimagenet/val/n01440764/*.JPEG"
    homepage = "https://www.image-net.org/challenges/LSVRC/2012/"
    licence = "for non-commercial research, under the terms of image-net.org"
    citation = "Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015"

    def locate(self, root: Path | None) -> Path:
        if root is not None:
            for path in (root / "imagenet", root / "ILSVRC2012", root / "ILSVRC" / "Data" / "CLS-LOC", root):
                if (path / "train").is_dir() and (path / "val").is_dir():
                    return path
        raise self.missing(root)

    def locate_images(self, root: Path) -> Path:
        """Any folder, so that other images by ImageNet's names for folders can be learnt from."""
        try:
            return self.locate(root)
        except DataError:
            return root

    def official(self, path: Path, train: ClassificationSet, fraction: float) -> ClassificationSet | None:
        name = {0.01: "1percent.txt", 0.1: "10percent.txt"}.get(fraction)
        homes = [
            home / part for home in (path, path.parent) for part in (f"imagenet_subsets/{name}", f"imagenet_{name}")
        ]
        file = next((home for home in homes if name and home.is_file()), None)
        if file is None:
            return None
        wanted = set(read_lines(file))
        names = np.array([PurePath(image).name for image in train.names.tolist()])
        rows = np.isin(names, sorted(wanted))
        if rows.sum() != len(wanted):
            lost = sorted(wanted - set(names[rows].tolist()))
            raise DataError(
                f"{file} does not list images of {train.name} {train.split}",
                cause=f"{len(lost)} of {len(wanted)} are not there, first {lost[0]}"
                if lost
                else "names are there twice",
                fix="restore the images, or take the list away: a draw of each class stands in for it",
            )
        return dataclasses.replace(train.take(rows), subset=f"the official list {file.name}")

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        return write_classes(root / "imagenet", seed, images, test="val")


class TinyImageNet(ClassificationSource):
    """Tiny ImageNet: ``train/CLASS/images``, and ``val/images`` with ``val_annotations.txt``. Test labels are withheld.

    A ``val`` that was sorted into a folder a class is taken too.
    """

    name = "tiny-imagenet"
    tree = "tiny-imagenet-200/train/n01443537/images/*.JPEG\ntiny-imagenet-200/val/val_annotations.txt"
    homepage = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    licence = "images are taken from ImageNet, under its terms"
    citation = "Le and Yang, Tiny ImageNet Visual Recognition Challenge, 2015"

    def locate(self, root: Path | None) -> Path:
        if root is not None:
            for path in (root / "tiny-imagenet-200", root / "tiny-imagenet", root):
                if (path / "train").is_dir() and (path / "val").is_dir():
                    return path
        raise self.missing(root)

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        return write_classes(root / "tiny-imagenet-200", seed, images, test="val")

    def splits(self, path: Path) -> tuple[str, ...]:
        return ("train", "val")

    def load(self, path: Path, split: str) -> ClassificationSet:
        notes = path / "val" / "val_annotations.txt"
        if split == "train" or not (notes.is_file() or (path / "val" / "images").is_dir()):
            return Folder().load(path, split)
        if not notes.is_file():
            raise DataError(
                f"{notes} is missing",
                cause="it alone tells the classes of val/images",
                fix="restore the file from the official archive",
            )
        classes = class_folders(path / "train")
        place = {name: i for i, name in enumerate(classes)}
        rows = sorted(line.split("\t")[:2] for line in notes.read_text(encoding="utf-8").splitlines() if line.strip())
        odd = [row for row in rows if len(row) != 2 or row[1] not in place]
        if odd or not rows:
            raise DataError(
                f"{notes} cannot be read",
                cause=f"{odd[0]} names no class" if odd else "it is empty",
                fix="restore the file from the official archive",
            )
        files = read_files(path / "val" / "images", [name for name, _ in rows])
        labels = np.array([place[wnid] for _, wnid in rows], dtype=np.int64)
        return ClassificationSet(self.name, split, tuple(classes), files.names, labels, files, np.arange(len(files)))
