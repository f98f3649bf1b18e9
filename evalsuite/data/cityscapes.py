"""Cityscapes, finely annotated: 19 classes of street scenes.

Format: https://github.com/mcordts/cityscapesScripts. ``*_gtFine_labelIds.png`` hold the 34 label ids of the release,
which the table of cityscapesscripts/helpers/labels.py (here from torchvision) takes to the 19 classes that are scored
("trainIds"), everything else to none.
"""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import Cityscapes as _Torchvision

from evalsuite.data.classes import Coded, coded
from evalsuite.data.segmentation import IGNORE, Coding, SegmentationSet, SegmentationSource, assemble, find, pair_up

__all__ = ["CLASSES", "PALETTE", "Cityscapes"]

_SCORED = sorted((c for c in _Torchvision.classes if 0 <= c.train_id < IGNORE), key=lambda c: c.train_id)
CLASSES = tuple(c.name for c in _SCORED)
PALETTE = [tuple(c.color) for c in _SCORED]
_IDS = {c.id: c.train_id for c in _Torchvision.classes if c.id >= 0}
_DEMO = ("road", "sky", "car", "bus", "person", "vegetation", "traffic sign", "building")
_IMAGE, _LABEL_IDS, _TRAIN_IDS = "_leftImg8bit", "_gtFine_labelIds", "_gtFine_labelTrainIds"


class Cityscapes(SegmentationSource):
    """The fine annotations. Label ids are read where they are there, because they are the release itself; ready-made
    labelTrainIds, which everyone writes with a table of their own, only in a split without label ids.

    The test split has no public labels (its files hold nothing but void), so there is none here.
    """

    name = "cityscapes"
    tree = "".join(
        f"cityscapes/{kind}/{split}/*/*{ending}.png\n"
        for kind, ending in (("leftImg8bit", _IMAGE), ("gtFine", _LABEL_IDS))
        for split in ("train", "val")
    ).rstrip()
    homepage = "https://www.cityscapes-dataset.com"
    licence = "non-commercial research and education, after registration"
    citation = "Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016"

    def locate(self, root: Path | None) -> Path:
        for path in () if root is None else (root / "cityscapes", root):
            if (path / "leftImg8bit").is_dir() and (path / "gtFine").is_dir():
                return path
        raise self.missing(root)

    def splits(self, path: Path) -> tuple[str, ...]:
        return tuple(s for s in ("train", "val") if all((path / k / s).is_dir() for k in ("leftImg8bit", "gtFine")))

    def read(self, path: Path, split: str, faults: list[str] | None = None) -> SegmentationSet:
        if split not in self.splits(path):
            raise self.no_split(path, split)
        folder = path / "gtFine" / split
        masks, values = find(folder, _LABEL_IDS, (".png",)), _IDS
        if not masks:
            masks = find(folder, _TRAIN_IDS, (".png",))
            values = {IGNORE: IGNORE, **{label: label for label in range(len(CLASSES))}}
        reader = Coding(values, hint=f"restore the release's *{_LABEL_IDS}.png, whose ids are 0 to 33")
        pairs = pair_up(find(path / "leftImg8bit" / split, _IMAGE), masks, faults)
        told = coded(self, path, pairs, r"_\d{6}_\d{6}$", Coded(reader, CLASSES, PALETTE))
        return assemble(pairs, *told, name=self.name, split=split, faults=faults)

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        from evalsuite.data.demo import write_masks

        def place(split: str, index: int) -> tuple[str, str]:
            stem = f"{split}/demo/demo_{index:06d}_000019"
            return f"leftImg8bit/{stem}{_IMAGE}.png", f"gtFine/{stem}{_LABEL_IDS}.png"

        ids = {c.name: c.id for c in _Torchvision.classes}
        return write_masks(root / self.name, place, [ids[name] for name in _DEMO], 0, seed, images)
