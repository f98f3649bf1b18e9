"""Anybody's segmentation data: images and masks of the same names, and a file that says what the classes are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from evalsuite.data import YOURS, split_role, split_roles
from evalsuite.data.classes import FORMAT, Table, as_colour, class_table
from evalsuite.data.draws import drawn
from evalsuite.data.images import DRAWN, SUFFIXES, clutter, images_by_name, list_images, read_labels, subfolder
from evalsuite.data.segmentation import (
    IGNORE,
    Coding,
    SegmentationSet,
    SegmentationSource,
    assemble,
    find,
    pair_up,
    voc_palette,
)
from evalsuite.errors import DataError, ImageError, UsageError

__all__ = ["Pairs"]

_SPLITS = ("train", "val", "test")
_IMAGES = ("images", "JPEGImages", "imgs", "img_dir", "image", "img")
_IN = (
    "masks", "annotations", "labels", "SegmentationClass", "SegmentationClassPNG", "ann_dir", "mask", "label",
    "masks_machine",
)  # fmt: skip
_MASKS_OF = re.compile(r"[_-]?(masks?|labels?|annot|annotations?)$", re.IGNORECASE)  # what follows a split's name
_IMAGES_OF = re.compile(r"[_-]?(images?|imgs?)$", re.IGNORECASE)
_BESIDE = "_mask"  # the ending of masks that lie beside their images
_MASKS = SUFFIXES  # JPEGs too, to be refused by name
_LARGEST = 1 << 20
_LOOKED_AT = 16  # masks whose numbers are looked at before any work


class Pairs(SegmentationSource):
    """``images`` and ``masks`` with a folder a split (or a folder a split with ``images`` and ``masks``), where an
    image and its mask have the same name but for the suffix, and for an ending or a beginning that all masks have
    (``a_mask.png``). Masks may lie beside their images as ``a_mask.png``, with ``_classes.csv``, as Roboflow exports
    them. Without folders of splits one image in five is tested on,
    by the hash of its name. The masks may be in ``annotations`` or ``labels``, too.

    ``classes.txt`` has a class a line, in the order of the numbers 0, 1, ...; a line may have a colour, before the name
    or behind it (``128 64 128 road``). ``classes.json`` is a list of names, or of ``{"name": ..., "value": number,
    "color": [r, g, b], "ignore": true}``, all but the name optional; without a ``value`` it is the place in the list.

    Masks of three channels are read by colours, those of one channel by numbers, 8 or 16 bits, palette PNGs by the
    colours of their palette if the classes have colours and by their numbers if not; palettes that differ then say no
    class, and are refused. 255 is no class unless a value says so. Without a class file the masks must be palette PNGs:
    their numbers are the classes, and their names.
    """

    name = "pairs"
    tree = "images/train/*.jpg\nimages/val/*.jpg\nmasks/train/*.png\nmasks/val/*.png\nclasses.txt"
    homepage = "https://mmsegmentation.readthedocs.io/en/latest/advanced_guides/add_datasets.html"
    licence = YOURS
    serves = ("segment",)
    citation = "none: it is a layout"

    def locate(self, root: Path | None) -> Path:
        if root is None or not self.splits(root):
            raise self.missing(root)
        return root

    def splits(self, path: Path) -> tuple[str, ...]:
        return tuple(split for split in _SPLITS if _folders(path, split)) or (DRAWN if _flat(path) else ())

    def read(self, path: Path, split: str, faults: list[str] | None = None) -> SegmentationSet:
        own = _folders(path, split)
        folders = own or (_flat(path) if split in self.splits(path) else None)
        if folders is None:
            raise self.no_split(path, split)
        pairs = pair_up(*_files(*folders), faults)
        if own is None:
            pairs = drawn(pairs, [pair.image_id for pair in pairs], split)
        if self.images_only:
            return assemble(pairs, Coding({}), ["any"], voc_palette(1), name=self.name, split=split, faults=faults)
        table = class_table(path) or self._numbered(path)
        if table.implied and len(table.classes) > 1:
            _refuse_black_and_white(path, table)
        return assemble(pairs, table.coding, table.classes, table.palette, name=self.name, split=split, faults=faults)

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        raise UsageError(
            f"{self.name} has no demo world",
            cause="it is a layout for data of your own",
            fix="leave --demo out and give --data; or --task cityscapes --demo",
        )

    def _numbered(self, path: Path) -> Table:
        """The table of palette PNGs without a class file, from the numbers in the masks of all splits."""
        numbers: set[int] = set()
        palette = None
        for masks in _mask_folders(path):
            for mask in _masks_in(masks).values():
                try:
                    labels = read_labels(mask)
                except ImageError:  # left out and told of later
                    continue
                if labels.palette is None:
                    raise DataError(
                        f"{path} does not say what its classes are",
                        cause=f"there is no classes.txt or classes.json, and mask {mask} has no palette",
                        fix=FORMAT,
                    )
                palette = labels.palette if palette is None else palette
                numbers.update(np.unique(labels.pixels).tolist())
        count = max(numbers - {IGNORE}, default=-1) + 1
        if palette is None or not count:
            raise DataError(
                f"{path} holds no class", cause="its masks hold nothing but 255", fix="check the masks, or " + FORMAT
            )
        colours = voc_palette(256)
        colours[: len(palette)] = palette
        coding = Coding({IGNORE: IGNORE, **{n: n for n in range(count)}})
        return Table(tuple(map(str, range(count))), [as_colour(c) for c in colours[:count].tolist()], coding, False)


def _folders(path: Path, split: str) -> tuple[Path, Path] | None:
    """Where a split's images and masks are."""
    images, masks = _of(subfolder(path, _IMAGES), split), _of(_home(path), split)
    if images and masks and list_images(masks).images:
        return images, masks
    inner = _of(path, split)
    below = (subfolder(inner, _IMAGES), _home(inner)) if inner else None
    if below and all(each.is_dir() for each in below) and list_images(below[1]).images:
        return below
    return (inner, inner) if inner and _beside(inner) else _side_by_side(path, split)


def _home(path: Path) -> Path:
    """The folder of masks, the first that there is with an image in it."""
    there = [subfolder(path, [name]) for name in _IN]
    there = [folder for folder in there if folder.is_dir()]
    return next((folder for folder in there if list_images(folder).images), there[0] if there else path / _IN[0])


def _side_by_side(path: Path, split: str) -> tuple[Path, Path] | None:
    """``train`` and ``train_masks``, ``train_images`` and ``train_masks``, ``train`` and ``trainannot``."""
    there = {each.name: each for each in sorted(path.iterdir()) if each.is_dir()} if path.is_dir() else {}
    masks = {stem: name for name in there if (stem := _MASKS_OF.sub("", name)) != name}
    for name, folder in there.items():
        stem = _IMAGES_OF.sub("", name)
        if stem in masks and split_role(stem) == split and name != masks[stem]:
            return folder, there[masks[stem]]
    return None


def _beside(folder: Path) -> bool:
    """Whether masks lie beside their images, ``a_mask.png`` beside ``a.jpg``, as Roboflow exports them."""
    names = images_by_name(folder) if folder.is_dir() else {}
    masked = {name.removesuffix(_BESIDE) for name in names if name.endswith(_BESIDE)}
    return bool(masked) and not masked.isdisjoint(names)


def _files(images: Path, masks: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and masks of a split by their names; of one folder, the masks are those of that ending."""
    if images != masks:
        return find(images), find(masks, suffixes=_MASKS)
    return {name: path for name, path in find(images).items() if not name.endswith(_BESIDE)}, find(images, _BESIDE)


def _of(folder: Path, split: str) -> Path | None:
    """The folder in ``folder`` that is of a split, by that name or another that people give it."""
    there = [each.name for each in folder.iterdir() if each.is_dir()] if folder.is_dir() else []
    fitting = sorted(
        (name for name, role in split_roles(there).items() if role == split), key=lambda n: (n != split, n)
    )
    return folder / fitting[0] if fitting else None


def _flat(path: Path) -> tuple[Path, Path] | None:
    """Where all images and masks are, if there are no folders of splits."""
    images, masks = subfolder(path, _IMAGES), _home(path)
    if not (images.is_dir() and masks.is_dir()):
        folders = not path.is_dir() or any(each.is_dir() and not clutter(each.name) for each in path.iterdir())
        return (path, path) if not folders and _beside(path) else None
    names = images_by_name(images)
    split = split_roles({name.partition("/")[0] for name in names if "/" in name})
    return (images, masks) if len(names) > 1 and not split else None


def _masks_in(folder: Path) -> dict[str, Path]:
    return find(folder, _BESIDE if _beside(folder) else "", _MASKS)


def _mask_folders(path: Path) -> list[Path]:
    found = [folders[1] for folders in (_folders(path, split) for split in _SPLITS) if folders]
    flat = None if found else _flat(path)
    return [flat[1]] if flat else found


def _refuse_black_and_white(path: Path, table: Table) -> None:
    """255 as the foreground's number, the habit of many tools, would make it no class without a word."""
    folders = _mask_folders(path)
    masks = [mask for folder in folders for mask in list(_masks_in(folder).values())[:_LOOKED_AT]]
    seen: set[int] = set()
    for mask in masks:
        try:
            labels = read_labels(mask)
        except DataError:
            continue  # told of by whoever reads or verifies it
        if labels.pixels.ndim == 3 or labels.palette is not None:
            return
        seen.update(np.unique(labels.pixels).tolist())
    if seen == {0, IGNORE}:
        example = json.dumps([{"name": table.classes[0], "value": 0}, {"name": table.classes[-1], "value": IGNORE}])
        raise DataError(
            f"the masks hold 0 and {IGNORE} alone, {masks[0]} among them",
            cause=f"{IGNORE} means no class unless a class has it as its value, which would leave one class",
            fix=f"write classes.json: {example}",
        )
