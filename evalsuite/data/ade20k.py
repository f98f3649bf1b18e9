"""ADE20K: the 150 classes of the MIT scene parsing benchmark, and the full data set reduced to them.

Formats: http://sceneparsing.csail.mit.edu and https://github.com/CSAILVision/ADE20K. The tables are those of
https://github.com/CSAILVision/sceneparsing: objectInfo150.txt, color150.mat and convertFromADE/mapFromADE.txt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from evalsuite.data.classes import Coded, coded
from evalsuite.data.images import read_labels, size
from evalsuite.data.segmentation import (
    IGNORE,
    Bytes,
    Coding,
    SegmentationSet,
    SegmentationSource,
    assemble,
    find,
    pair_up,
)
from evalsuite.errors import DataError, UsageError

__all__ = ["CLASSES", "PALETTE", "Ade20k", "Ade20kFull"]

# name:colour:indices in the full data set, in the benchmark's order
_TABLE = """
wall:787878:2978, building:b47878:312, sky:06e6e6:2420, floor:503232:976, tree:04c803:2855, ceiling:787850:447,
road:8c8c8c:2131, bed:cc05ff:165, windowpane:e6e6e6:3055, grass:04fa07:1125, cabinet:e005ff:350,
sidewalk:ebff07:2377, person:96053d:1831, earth:787846:838, door:08ff33:774+783, table:ff0652:2684,
mountain:8fff8c:1610, plant:ccff04:1910, curtain:ff3307:687, chair:cc4603:471, car:0066c8:401, water:3de6fa:2994,
painting:ff0633:1735, sofa:0b66ff:2473, shelf:ff0747:2329, house:ff09e0:1276, sea:0907e6:2264, mirror:dcdcdc:1564,
rug:ff095c:2178, field:7009ff:913, armchair:08ffd6:57, seat:07ffe0:2272, fence:ffb806:907, desk:0aff47:724,
rock:ff290a:2138, wardrobe:07ffff:2985+533, lamp:e0ff08:1395, bathtub:6608ff:155, railing:ff3d06:2053,
cushion:ffc207:689, base:ff7a08:137, box:00ff14:266, column:ff0829:581, signboard:ff0599:2380,
chest of drawers:0633ff:491, counter:eb0cff:627, sand:a09614:2212, sink:00a3ff:2388, skyscraper:8c8c8c:2423,
fireplace:fa0a0f:943, refrigerator:14ff00:2096, grandstand:1fff00:1121, path:ff1f00:1788, stairs:ffe000:2530,
runway:99ff00:2185, case:0000ff:420, pool table:ff4700:1948, pillow:00ebff:1869, screen door:00adff:2251,
stairway:1f00ff:2531, river:0bc8c8:2128, bridge:ff5200:294, bookcase:00fff5:239, blind:003dff:212,
coffee table:00ff70:571, toilet:00ff85:2793, flower:ff0000:978, book:ffa300:236, hill:ff6600:1240, bench:c2ff00:181,
countertop:008fff:629, stove:33ff00:2598, palm:0052ff:1744, kitchen island:00ff29:1374, computer:00ffad:591,
swivel chair:0a00ff:2679, boat:adff00:223, bar:00ff99:123, arcade machine:ff5c00:47, hovel:ff00ff:1282,
bus:ff00f5:327, towel:ff0066:2821, light:ffad00:1451, truck:ff0014:2880, tower:ffb8b8:2828, chandelier:001fff:480,
awning:00ff3d:77, streetlight:0047ff:2616, booth:ff00cc:246+247, television:00ffc2:2733, airplane:00ff52:14,
dirt track:000aff:738, apparel:0070ff:38, pole:3300ff:1936, land:00c2ff:1401, bannister:007aff:120,
escalator:00ffa3:868, ottoman:ff9900:1702, bottle:00ff0a:249, buffet:ff7000:308, poster:8fff00:1969,
stage:5200ff:2526, van:a3ff00:2928, ship:ffeb00:2337, fountain:08b8aa:1023, conveyer belt:8500ff:609,
canopy:00ff5c:389, washer:b800ff:2989, plaything:ff001f:1930, swimming pool:00b8ff:2668, stool:00d6ff:2586,
barrel:ff0070:131, basket:5cff00:146, waterfall:00e0ff:3016, tent:70e0ff:2739, bag:46b8a0:95, minibike:a300ff:1563,
cradle:9900ff:642, oven:47ff00:1708, ball:ff00a3:103, food:ffcc00:1002, step:ff008f:2569, tank:00ffeb:2704,
trade name:85ff00:2833, microwave:ff00eb:1551, pot:f500ff:1981, animal:ff007a:29, bicycle:fff500:187,
lake:0abed4:1393, dishwasher:d6ff00:747, screen:00ccff:2254, blanket:1400ff:206, sculpture:ffff00:2262,
hood:0099ff:1260, sconce:0029ff:2243, vase:00ffcc:2932, traffic light:2900ff:2836, tray:29ff00:2850,
ashcan:ad00ff:64, fan:00f5ff:894, pier:4700ff:1858, crt screen:7a00ff:3109, plate:00ffb8:1919, monitor:005cff:1583,
bulletin board:b8ff00:318, shower:0085ff:2356, radiator:ffd600:2046, glass:19c2c2:1098, clock:66ff00:530,
flag:5c00ff:954
"""
_ROWS = [cell.strip().split(":") for cell in _TABLE.split(",") if cell.strip()]
CLASSES = tuple(name for name, _, _ in _ROWS)
PALETTE = np.array([list(bytes.fromhex(colour)) for _, colour, _ in _ROWS], np.uint8)
_INDICES = {int(index): label for label, (_, _, indices) in enumerate(_ROWS) for index in indices.split("+")}
_SPLITS = {"train": "training", "val": "validation"}
_JPEG = (".jpg", ".jpeg")


class _Ade(SegmentationSource):
    homepage = "https://ade20k.csail.mit.edu"
    licence = "annotations BSD 3-clause; images for non-commercial research and education"
    citation = "Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017"
    folder: ClassVar[str]
    inner: ClassVar[str]

    def locate(self, root: Path | None) -> Path:
        for path in () if root is None else (root / self.folder, root / "ade" / self.folder, root):
            if any((path / self.inner / part).is_dir() for part in _SPLITS.values()):
                return path
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        return tuple(split for split, part in _SPLITS.items() if (path / self.inner / part).is_dir())


class Ade20k(_Ade):
    """The scene parsing benchmark (SceneParsing150): 0 is no class, n is class n-1."""

    name = "ade20k"
    tree = "".join(
        f"ADEChallengeData2016/{kind}/{part}/*.{suffix}\n"
        for kind, suffix in (("images", "jpg"), ("annotations", "png"))
        for part in _SPLITS.values()
    ).rstrip()
    folder, inner = "ADEChallengeData2016", "annotations"

    def read(self, path: Path, split: str, faults: list[str] | None = None) -> SegmentationSet:
        if split not in self.splits(path):
            raise self.no_split(path, split)
        images = find(path / "images" / _SPLITS[split])
        masks = find(path / "annotations" / _SPLITS[split], suffixes=(".png",))
        reader = Coding(
            {0: IGNORE, **{label + 1: label for label in range(len(CLASSES))}},
            hint="the benchmark's annotations are 0 to 150; the full data set's *_seg.png are the layout ade20k-full",
        )
        pairs = pair_up(images, masks, faults)
        told = coded(self, path, pairs, r"^ADE_(train|val|frame)_", Coded(reader, CLASSES, PALETTE))
        return assemble(pairs, *told, name=self.name, split=split, faults=faults)

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        from evalsuite.data.demo import write_masks

        def place(split: str, index: int) -> tuple[str, str]:
            name = f"ADE_{split}_{index + 1:08d}"
            return f"images/{_SPLITS[split]}/{name}.jpg", f"annotations/{_SPLITS[split]}/{name}.png"

        return write_masks(root / self.folder, place, [7, 3, 2, 5, 13, 21, 18, 20], 0, seed, images)


@dataclass(frozen=True)
class _Full:
    """The full data set's ``_seg.png``: red / 10 * 256 + green is the index of an object; what is not among the
    benchmark's 150 has no class."""

    key: ClassVar[str] = f"ade20k full {sorted(_INDICES.items())}"

    @cached_property
    def _table(self) -> NDArray[np.uint8]:
        table = np.full(1 << 13, IGNORE, np.uint8)
        table[list(_INDICES)] = list(_INDICES.values())
        return table

    def __call__(self, path: Path, expect: tuple[int, int]) -> Bytes:
        pixels = read_labels(path, expect).pixels
        if pixels.ndim != 3 or (pixels[..., 0] % 10).any():
            raise DataError(
                f"mask {path} cannot be read",
                cause="it is not an ADE20K _seg.png: red / 10 * 256 + green is to be an object's index",
                fix="restore the file; masks of one channel are another layout, --data ade20k:PATH or pairs:PATH",
            )
        mask: Bytes = self._table[pixels[..., 0].astype(np.int64) // 10 * 256 + pixels[..., 1]]
        return mask

    def size(self, path: Path) -> tuple[int, int] | None:
        return size(path)

    def palette(self, path: Path) -> bytes | None:
        return None


class Ade20kFull(_Ade):
    """The full ADE20K of 2021, its 3,000 and more object names reduced to the benchmark's 150 by the benchmark's own
    table. Not the benchmark: its images were reduced to 512 pixels, and its validation split is another file set."""

    name = "ade20k-full"
    tree = "ADE20K_2021_17_01/images/ADE/training/*/*/*_seg.png\nADE20K_2021_17_01/images/ADE/validation/*/*/*_seg.png"
    folder, inner = "ADE20K_2021_17_01", "images/ADE"

    def read(self, path: Path, split: str, faults: list[str] | None = None) -> SegmentationSet:
        if split not in self.splits(path):
            raise self.no_split(path, split)
        folder = path / self.inner / _SPLITS[split]
        pairs = pair_up(find(folder, suffixes=_JPEG), find(folder, "_seg", (".png",)), faults)
        warning = "ade20k-full is not the scene parsing benchmark: full-size images, classes by mapFromADE.txt"
        return assemble(
            pairs, _Full(), CLASSES, PALETTE, name=self.name, split=split, warnings=[warning], faults=faults
        )

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        raise UsageError(
            f"{self.name} has no demo world",
            cause="the benchmark's layout has one",
            fix="--task ade20k --demo",
        )
