"""PASCAL VOC 2012 segmentation, and its extension by the Semantic Boundaries Dataset (SBD).

Formats: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ (palette PNGs: 0 background, 1 to 20 the classes, 255 borders
and objects that do not count) and http://home.bharathh.info/pubs/codes/SBD/download.html (MATLAB files).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy.io import loadmat

from evalsuite.data import split_role
from evalsuite.data.classes import Coded, coded
from evalsuite.data.draws import drawn
from evalsuite.data.images import DRAWN, clutter, images_by_name, listed_name, read_list, size, unfitting
from evalsuite.data.segmentation import (
    IGNORE,
    Bytes,
    Coding,
    SegmentationSet,
    SegmentationSource,
    assemble,
    pair_up,
    voc_palette,
)
from evalsuite.data.voc import CLASSES as OBJECTS
from evalsuite.errors import DataError

__all__ = ["CLASSES", "VocSegmentation"]

CLASSES = ("background", *OBJECTS)
_LISTS = Path("ImageSets", "Segmentation")
_AUGMENTED = "train_aug"
_NAMED = ("train", "val", "trainval", _AUGMENTED)
_CODING = Coding(
    {IGNORE: IGNORE, **{label: label for label in range(len(CLASSES))}},
    hint="restore the palette PNGs of SegmentationClass; numbers are 0 to 20, and 255",
)


@dataclass(frozen=True)
class _Masks:
    """PNG files by their numbers, SBD's ``.mat`` files by ``GTcls.Segmentation``."""

    key: ClassVar[str] = f"voc {_CODING.key}"

    def __call__(self, path: Path, expect: tuple[int, int]) -> Bytes:
        return _matlab(path, expect) if path.suffix == ".mat" else _CODING(path, expect)

    def size(self, path: Path) -> tuple[int, int] | None:
        return None if path.suffix == ".mat" else size(path)

    def palette(self, path: Path) -> bytes | None:
        return None if path.suffix == ".mat" else _CODING.palette(path)


class VocSegmentation(SegmentationSource):
    """VOC 2012: ``train`` (1,464 images), ``val`` (1,449), ``trainval``, and ``train_aug`` (10,582), the union of VOC's
    train with SBD's images that are not in VOC's val.

    ``train_aug`` is listed in ImageSets/Segmentation/train_aug.txt (or trainaug.txt), or is train.txt and aug.txt
    together. A mask of it is VOC's own where VOC has one, as in mmsegmentation; else that of SegmentationClassAug; else
    SBD's ``benchmark_RELEASE/dataset/cls/*.mat`` beside VOCdevkit or in it. The test split has no public masks.
    Anybody's data say their classes in ``labelmap.txt``, as CVAT writes it, or in a file as of the layout ``pairs``.
    """

    name = "voc-seg"
    tree = (
        "VOCdevkit/VOC2012/JPEGImages/*.jpg\n"
        "VOCdevkit/VOC2012/SegmentationClass/*.png\n"
        "VOCdevkit/VOC2012/ImageSets/Segmentation/*.txt"
    )
    homepage = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
    licence = "images are subject to the terms of Flickr"
    citation = (
        "Everingham et al., The PASCAL Visual Object Classes (VOC) Challenge, IJCV 2010; "
        "Hariharan et al., Semantic Contours from Inverse Detectors, ICCV 2011"
    )

    def locate(self, root: Path | None) -> Path:
        for path in () if root is None else (root / "VOCdevkit" / "VOC2012", root / "VOC2012", root):
            if (path / _LISTS).is_dir():
                return path
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        named = tuple(split for split in _NAMED if _lists(path, split))
        return named or (DRAWN if not self.official and _lone(path) else ())

    def leaks(self, one: str, other: str) -> bool:
        return {one, other} in ({"train", "val"}, {"val", _AUGMENTED})

    def read(self, path: Path, split: str, faults: list[str] | None = None) -> SegmentationSet:
        if split not in self.splits(path):
            raise self.no_split(path, split)
        photos = {name: paths[0] for name, paths in images_by_name(path / "JPEGImages").items()}
        unlisted = not any(_lists(path, name) for name in _NAMED)
        lines = [line for file in (_lone(path) if unlisted else _lists(path, split)) for line in read_list(file)]
        names = list(dict.fromkeys(listed_name(line, photos) for line in lines))
        if unlisted:
            names = drawn(names, names, split)
        folders = [(path / "SegmentationClass", ".png")]
        if split == _AUGMENTED:
            folders.append((path / "SegmentationClassAug", ".png"))
            folders += [
                (parent / "benchmark_RELEASE" / "dataset" / "cls", ".mat") for parent in (path.parents[1], path.parent)
            ]
        pairs = pair_up(photos, _present(folders, names), faults, names)
        published = Coded(_Masks(), CLASSES, voc_palette(len(CLASSES)))
        told = coded(self, path, pairs, r"^20\d\d_\d{6}$", published)
        return assemble(pairs, *told, name=self.name, split=split, faults=faults)

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        from evalsuite.data.demo import SHAPES, write_masks

        def place(split: str, index: int) -> tuple[str, str]:
            name = f"2012_{split}_{index:06d}"
            return f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png"

        codes = [0, 0, *(CLASSES.index(voc) for _, _, voc, _ in SHAPES.values())]
        return write_masks(
            root / "VOCdevkit" / "VOC2012", place, codes, IGNORE, seed, images, palette=voc_palette(256), lists=_LISTS
        )


def _lists(path: Path, split: str) -> list[Path]:
    """The files that list a split; none where it is not there."""
    folder = path / _LISTS
    named = [file.name for file in sorted(folder.glob("*.txt")) if split_role(file.stem) == split]
    choices = [[f"{split}.txt"], *([name] for name in named)]
    if split == _AUGMENTED:
        choices += [["trainaug.txt"], ["train.txt", "aug.txt"]]
    for names in choices:
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    return []


def _lone(path: Path) -> list[Path]:
    """The one list of a task that was exported without splits (CVAT's ``default.txt``)."""
    lists = sorted(file for file in (path / _LISTS).glob("*.txt") if not clutter(file.name))
    return lists if len(lists) == 1 else []


def _present(folders: Sequence[tuple[Path, str]], names: Sequence[str]) -> dict[str, Path]:
    """Each name's file in the first of the folders (with the suffix it has there) that has one."""
    found: dict[str, Path] = {}
    for folder, suffix in reversed(folders):
        found |= {name: paths[0] for name, paths in images_by_name(folder, suffixes=(suffix,)).items()}
    return {name: found[name] for name in names if name in found}


def _matlab(path: Path, expect: tuple[int, int]) -> Bytes:
    try:
        labels = np.asarray(loadmat(path, squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation)
    except Exception as error:  # a broken file makes scipy raise nearly anything
        raise DataError(
            f"mask {path} cannot be read",
            cause=str(error) or type(error).__name__,
            fix="restore the file of SBD's dataset/cls",
        ) from error
    if labels.shape != expect:
        raise unfitting(path, np.atleast_2d(labels).shape[:2], expect)
    odd = np.unique(labels[(labels < 0) | (labels >= len(CLASSES))]).tolist()
    if odd:
        raise DataError(
            f"mask {path} holds numbers that are no class: {odd[:5]}",
            cause="SBD's are 0 to 20",
            fix="restore the file of SBD's dataset/cls",
        )
    return labels.astype(np.uint8)
