"""Anybody's segmentation data: images and masks of the same names, and a file that says what the classes are."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from evalsuite.data import YOURS
from evalsuite.data.images import SUFFIXES, read_labels, read_lines
from evalsuite.data.segmentation import (
    IGNORE,
    Coding,
    Colour,
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
_MASKS = SUFFIXES  # JPEGs too, to be refused by name
_LARGEST = 1 << 20
_LOOKED_AT = 16  # masks whose numbers are looked at before any work
_COLOURED = re.compile(
    r"^(?P<a>\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(?P<name>\D.*)$|^(?P<first>.*\S)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\d+)$"
)
_FORMAT = (
    'write classes.txt, one name a line in the order of the numbers, or classes.json: [{"name": "cell", "value": 1}]'
)

Byte = Annotated[int, Field(ge=0, le=255)]


class _Class(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    value: Annotated[int, Field(ge=0, lt=1 << 16)] | None = None
    color: Annotated[list[Byte], Field(min_length=3, max_length=3)] | None = None
    ignore: bool = False


_FILE = TypeAdapter(list[str | _Class])


class _Table(NamedTuple):
    """The classes, their colours for pictures, and how masks say them."""

    classes: tuple[str, ...]
    palette: list[Colour]
    coding: Coding
    implied: bool  # 255 is no class because nothing says otherwise


class Pairs(SegmentationSource):
    """``images`` and ``masks`` with a folder a split (or a folder a split with ``images`` and ``masks``), where an
    image and its mask have the same name but for the suffix.

    ``classes.txt`` has a class a line, in the order of the numbers 0, 1, ...; a line may have a colour, before the name
    or behind it (``128 64 128 road``). ``classes.json`` is a list of names, or of ``{"name": ..., "value": number,
    "color": [r, g, b], "ignore": true}``, all but the name optional; without a ``value`` it is the place in the list.

    Masks of three channels are read by colours, those of one channel by numbers, 8 or 16 bits, palette PNGs by the
    colours of their palette if the classes have colours and by their numbers if not. 255 is no class unless a value
    says so. Without a class file the masks must be palette PNGs: their numbers are the classes, and their names.
    """

    name = "pairs"
    tree = "images/train/*.jpg\nimages/val/*.jpg\nmasks/train/*.png\nmasks/val/*.png\nclasses.txt"
    homepage = "https://mmsegmentation.readthedocs.io/en/latest/advanced_guides/add_datasets.html"
    licence = YOURS
    serves = ("segment",)
    citation = "none: it is a layout"

    def locate(self, root: Path | None) -> Path:
        if root is None or not any(_folders(root, split) for split in _SPLITS):
            raise self.missing(root)
        return root

    def splits(self, path: Path) -> tuple[str, ...]:
        return tuple(split for split in _SPLITS if _folders(path, split))

    def read(self, path: Path, split: str, faults: list[str] | None = None) -> SegmentationSet:
        folders = _folders(path, split)
        if folders is None:
            raise self.no_split(path, split)
        pairs = pair_up(find(folders[0]), find(folders[1], suffixes=_MASKS), faults)
        table = _table(path) or self._numbered(path)
        if table.implied and len(table.classes) > 1:
            _refuse_black_and_white(path, table)
        return assemble(pairs, table.coding, table.classes, table.palette, name=self.name, split=split, faults=faults)

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        raise UsageError(
            f"{self.name} has no demo world",
            cause="it is a layout for data of your own",
            fix="leave --demo out and give --data; or --task cityscapes --demo",
        )

    def _numbered(self, path: Path) -> _Table:
        """The table of palette PNGs without a class file, from the numbers in the masks of all splits."""
        numbers: set[int] = set()
        palette = None
        for folders in filter(None, (_folders(path, split) for split in _SPLITS)):
            for mask in find(folders[1], suffixes=_MASKS).values():
                try:
                    labels = read_labels(mask)
                except ImageError:  # left out and told of later
                    continue
                if labels.palette is None:
                    raise DataError(
                        f"{path} does not say what its classes are",
                        cause=f"there is no classes.txt or classes.json, and mask {mask} has no palette",
                        fix=_FORMAT,
                    )
                palette = labels.palette if palette is None else palette
                numbers.update(np.unique(labels.pixels).tolist())
        count = max(numbers - {IGNORE}, default=-1) + 1
        if palette is None or not count:
            raise DataError(
                f"{path} holds no class", cause="its masks hold nothing but 255", fix="check the masks, or " + _FORMAT
            )
        colours = voc_palette(256)
        colours[: len(palette)] = palette
        coding = Coding({IGNORE: IGNORE, **{n: n for n in range(count)}})
        return _Table(tuple(map(str, range(count))), [_colour(c) for c in colours[:count].tolist()], coding, False)


def _folders(path: Path, split: str) -> tuple[Path, Path] | None:
    """Where a split's images and masks are."""
    for images, masks in (
        (path / "images" / split, path / "masks" / split),
        (path / split / "images", path / split / "masks"),
    ):
        if images.is_dir() and masks.is_dir():
            return images, masks
    return None


def _table(path: Path) -> _Table | None:
    """What the class file says; None where there is none."""
    listed, text = path / "classes.json", path / "classes.txt"
    if listed.is_file() and text.is_file():
        raise _broken(listed, f"{text.name} is there too, and only one can be right")
    if text.is_file():
        return _tabled(text, _from_lines(text))
    return _tabled(listed, _from_json(listed)) if listed.is_file() else None


def _from_json(file: Path) -> list[_Class]:
    if file.stat().st_size > _LARGEST:
        raise _broken(file, f"it is larger than {_LARGEST >> 20} MiB")
    try:
        found = _FILE.validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[-1]
        raise _broken(file, f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}") from error
    return [_Class(name=entry) if isinstance(entry, str) else entry for entry in found]


def _from_lines(file: Path) -> list[_Class]:
    entries = []
    for line in read_lines(file):
        match = _COLOURED.match(line)
        numbers = [int(n) for n in match.groups() if n and n.isdigit()] if match else None
        name = (match["name"] or match["first"]) if match else line
        try:
            entries.append(_Class(name=name, color=numbers))
        except ValidationError as error:
            raise _broken(file, f"{line[:60]!r}: {error.errors()[0]['msg']}") from error
    return entries


def _tabled(file: Path, entries: Sequence[_Class]) -> _Table:
    kept = [entry for entry in entries if not entry.ignore]
    if not 1 <= len(kept) <= IGNORE:
        raise _broken(file, f"it has {len(kept)} classes; 1 to {IGNORE} are possible")
    numbers, given = _values(entries), _colours(entries)
    _refuse_twice(file, "name", [entry.name for entry in kept])
    _refuse_twice(file, "value", numbers)
    _refuse_twice(file, "color", given)
    if given and len(given) < len(entries):
        raise _broken(file, f"{len(given)} of {len(entries)} entries have a color: give it to all or to none")
    places = iter(range(len(kept)))
    labels = [IGNORE if entry.ignore else next(places) for entry in entries]
    values = dict(zip(numbers, labels, strict=True))
    colours = dict(zip(given, labels, strict=True)) if given else {}
    implied = IGNORE not in values
    if implied:
        values[IGNORE] = IGNORE
    shown = [colour for colour, entry in zip(given, entries, strict=True) if not entry.ignore] if given else None
    palette = shown or [_colour(c) for c in voc_palette(len(kept)).tolist()]
    coding = Coding(values, colours, hint=f"correct the mask, or {file}")
    return _Table(tuple(entry.name for entry in kept), palette, coding, implied)


def _refuse_twice(file: Path, what: str, values: Sequence[object]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise _broken(file, f"{what} {twice[0]!r} is there twice")


def _values(entries: Sequence[_Class]) -> list[int]:
    return [place if entry.value is None else entry.value for place, entry in enumerate(entries)]


def _colours(entries: Sequence[_Class]) -> list[Colour]:
    return [_colour(entry.color) for entry in entries if entry.color is not None]


def _colour(rgb: Sequence[int]) -> Colour:
    red, green, blue = rgb
    return red, green, blue


def _refuse_black_and_white(path: Path, table: _Table) -> None:
    """255 as the foreground's number, the habit of many tools, would make it no class without a word."""
    folders = filter(None, (_folders(path, split) for split in _SPLITS))
    masks = [mask for _, folder in folders for mask in list(find(folder, suffixes=_MASKS).values())[:_LOOKED_AT]]
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


def _broken(file: Path, reason: str) -> DataError:
    return DataError(f"{file} cannot be read", cause=reason, fix=_FORMAT)
