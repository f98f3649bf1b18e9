"""Files that say what the classes of anybody's masks are: classes.txt, classes.json, and what labelling tools write."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from evalsuite.data.images import read_lines
from evalsuite.data.segmentation import IGNORE, Coding, Colour, MaskReader, Pair, SegmentationSource, voc_palette
from evalsuite.data.tables import read_table
from evalsuite.errors import DataError
from evalsuite.files import read_regular

__all__ = ["FORMAT", "Coded", "Table", "as_colour", "class_table", "coded"]

_FILES = ("classes.json", "classes.txt", "class_names.txt", "labelmap.txt", "class_dict.csv", "_classes.csv")
_LARGEST = 1 << 20
_COLOURED = re.compile(
    r"^(?P<a>\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(?P<name>\D.*)$|^(?P<first>.*\S)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\d+)$"
)
FORMAT = (
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


class Table(NamedTuple):
    """The classes, their colours for pictures, and how masks say them."""

    classes: tuple[str, ...]
    palette: list[Colour]
    coding: Coding
    implied: bool  # 255 is no class because nothing says otherwise


def class_table(path: Path) -> Table | None:
    """What the class file in a folder says; None where there is none.

    ``classes.txt`` has a class a line, in the order of the numbers 0, 1, ...; a line may have a colour, before the name
    or behind it (``128 64 128 road``). ``classes.json`` is a list of names, or of ``{"name": ..., "value": number,
    "color": [r, g, b], "ignore": true}``, all but the name optional; without a ``value`` it is the place in the list.
    ``class_names.txt`` is labelme's, ``labelmap.txt`` CVAT's, ``class_dict.csv`` has columns name, r, g and b, and
    Roboflow's ``_classes.csv``, in each split's folder, Pixel Value and Class. Raises :class:`DataError` for a file
    that is none of that, and for two files.
    """
    there = [path / name for name in _FILES if (path / name).is_file()] or sorted(path.glob("*/_classes.csv"))[:1]
    if len(there) > 1:
        raise _broken(there[0], f"{there[1].name} is there too, and only one can be right")
    for file in there:
        if file.suffix == ".json":
            return _tabled(file, _from_json(file))
        if file.suffix == ".csv":
            return _tabled(file, _from_csv(file))
        return _tabled(file, _from_labelmap(file) if file.name == "labelmap.txt" else _from_lines(file))
    return None


class Coded(NamedTuple):
    """How masks are read, the classes in them, and their colours for pictures."""

    reader: MaskReader
    classes: Sequence[str]
    palette: NDArray[np.uint8] | Sequence[Colour]


def coded(layout: SegmentationSource, path: Path, pairs: Iterable[Pair], pattern: str, published: Coded) -> Coded:
    """The classes of data in the layout of a published data set: its own, unless they are anybody's.

    Those are what a class file says. Without one they are the ``published`` classes where all images have names as that
    data set's, by the regular expression ``pattern``. Raises :class:`DataError` for others: nothing says what their
    numbers mean.
    """
    if layout.official or layout.images_only:
        return published
    table = class_table(path)
    if table is not None:
        return Coded(table.coding, table.classes, table.palette)
    stray = next((pair.image_id for pair in pairs if not re.search(pattern, pair.image_id)), None)
    if stray is not None:
        raise DataError(
            f"{path} does not say what its classes are",
            cause=f"there is no classes.txt or classes.json, and image {stray} is none of the data set {layout.name}, "
            f"whose {len(published.classes)} names would be wrong",
            fix=FORMAT,
        )
    return published


def _from_json(file: Path) -> list[_Class]:
    if file.stat().st_size > _LARGEST:
        raise _broken(file, f"it is larger than {_LARGEST >> 20} MiB")
    try:
        found = _FILE.validate_json(read_regular(file))
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


def _from_labelmap(file: Path) -> list[_Class]:
    """Lines ``name:r,g,b:parts:actions`` of CVAT, after one that begins with #."""
    lines = [line for line in read_lines(file) if not line.startswith("#")]
    cells = [line.split(":") for line in lines]
    if any(len(row) < 2 or not re.fullmatch(r"\d+,\d+,\d+", row[1].replace(" ", "")) for row in cells):
        raise _broken(file, "a line is not name:r,g,b:parts:actions")
    try:
        return [_Class(name=row[0], color=[int(n) for n in row[1].split(",")]) for row in cells]
    except ValidationError as error:
        raise _broken(file, error.errors()[0]["msg"]) from error


def _from_csv(file: Path) -> list[_Class]:
    table = read_table(file)
    columns = [re.sub(r"[\W_]+", "", name.lower()) for name in table.columns]
    rows = [dict(zip(columns, row, strict=True)) for row in table.rows]
    numbers = ("r", "g", "b") if {"name", "r", "g", "b"} <= set(columns) else ("pixelvalue",)
    if not rows or not {"class" if len(numbers) == 1 else "name", *numbers} <= set(columns):
        raise _broken(file, f"its columns are {', '.join(table.columns)}, not name, r, g, b or Pixel Value, Class")
    if odd := next((row[n] for row in rows for n in numbers if not row[n].isdecimal()), None):
        raise _broken(file, f"{odd!r} is no number")
    try:
        if len(numbers) == 1:
            return [_Class(name=row["class"], value=int(row["pixelvalue"])) for row in rows]
        return [_Class(name=row["name"], color=[int(row[n]) for n in numbers]) for row in rows]
    except ValidationError as error:
        raise _broken(file, error.errors()[0]["msg"]) from error


def _tabled(file: Path, entries: Sequence[_Class]) -> Table:
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
    palette = shown or [as_colour(c) for c in voc_palette(len(kept)).tolist()]
    coding = Coding(values, colours, hint=f"correct the mask, or {file}")
    return Table(tuple(entry.name for entry in kept), palette, coding, implied)


def _refuse_twice(file: Path, what: str, values: Sequence[object]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise _broken(file, f"{what} {twice[0]!r} is there twice")


def _values(entries: Sequence[_Class]) -> list[int]:
    return [place if entry.value is None else entry.value for place, entry in enumerate(entries)]


def _colours(entries: Sequence[_Class]) -> list[Colour]:
    return [as_colour(entry.color) for entry in entries if entry.color is not None]


def as_colour(rgb: Sequence[int]) -> Colour:
    red, green, blue = rgb
    return red, green, blue


def _broken(file: Path, reason: str) -> DataError:
    return DataError(f"{file} cannot be read", cause=reason, fix=FORMAT)
