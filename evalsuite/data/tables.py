"""Tables of strangers: delimited text of any dialect, and lists of labelled images under whatever names of columns."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evalsuite.data import split_roles
from evalsuite.data.images import SUFFIXES, images_by_name, not_utf8, relative_name
from evalsuite.errors import DataError, UsageError
from evalsuite.files import read_regular

__all__ = ["COLUMNS", "ImageList", "Table", "read_columns", "read_image_list", "read_table"]

# What people call these columns, the plainest first; letter case and punctuation do not matter.
COLUMNS = {
    "path": (
        "path", "file_path", "filepath", "image_path", "img_path", "filename", "file_name", "image_name", "image_file",
        "file", "image", "img", "images", "image_id", "img_id", "id",
    ),
    "label": ("label", "class", "category", "target", "class_name", "label_name", "category_name", "labels", "y"),
    "group": ("group", "group_id", "patient", "patient_id", "patientid", "subject", "subject_id", "case", "case_id"),
    "split": ("split", "subset", "partition", "set", "phase"),
}  # fmt: skip
MISSING = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "nat", "none", "null"})  # what tools write for nothing
_INDEX = re.compile(r"|unnamed: \d+|index|level_0", re.IGNORECASE)
_WHOLE = re.compile(r"(-?\d+)\.0*")
_SEPARATOR = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)
_DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class Table:
    """Cells as text, without the spaces around them: a name a column, and rows with the lines that they end in."""

    path: Path
    columns: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        """The cells of a column. Equal texts are one object, as most tables have few of them."""
        place = self.columns.index(name)
        return [sys.intern(row[place]) for row in self.rows]


def read_table(path: Path) -> Table:
    """A delimited text with a first line of names: cells divided by ``,``, ``;``, ``|`` or tabs, quoted or not.

    Raises :class:`DataError` for a file that is missing, is not UTF-8 (and names the encoding), or is no such table.
    """
    try:
        data = read_regular(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing", cause="there is no such file", fix="restore it, or check the path"
        ) from error
    except OSError as error:
        raise _no_table(path, str(error)) from error
    if encoding := not_utf8(data):
        raise DataError(f"{path} is no table as wanted", cause=encoding.cause, fix=encoding.fix)
    text = data.decode("utf-8-sig")
    said = _SEPARATOR.match(text)  # a first line by which spreadsheets tell the delimiter
    text = text[said.end() :] if said else text
    first = re.sub(r'"[^"]*"', "", text.lstrip().partition("\n")[0])
    delimiter = said[1] if said else max(_DELIMITERS, key=first.count)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns = [cell.strip() for cell in next(reader, [])]
        rows, lines = [], []
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if len(cells) == len(columns) + 1 and not cells[-1]:  # a delimiter behind the last cell
                del cells[-1]
            if len(cells) != len(columns):
                raise _no_table(path, f"line {reader.line_num} has {len(cells)} cells, the first one {len(columns)}")
            rows.append(cells)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise _no_table(path, str(error)) from error
    return Table(path, columns, rows, lines)


def read_columns(path: Path, wanted: Sequence[str]) -> dict[str, list[str]]:
    """These columns of a table of a known layout, whatever others it has.

    Raises :class:`DataError` for a file that is no table, lacks one of them, or lists nothing.
    """
    table = read_table(path)
    lacking = [name for name in wanted if table.columns.count(name) != 1]
    if lacking:
        listed = ", ".join(table.columns)
        raise _no_table(path, f"it has no column {', '.join(lacking)}; its first line is {listed!r:.200}")
    if not table.rows:
        raise _no_table(path, "it has a first line and no other")
    return {name: table.column(name) for name in wanted}


def _no_table(path: Path, cause: str) -> DataError:
    return DataError(
        f"{path} is no table as wanted", cause=cause, fix="write it as UTF-8, cells divided by commas, all columns"
    )


@dataclass(frozen=True)
class ImageList:
    """A list of labelled images, row by row.

    ``paths`` count from ``root``. ``labels`` are (N,) classes, -1 where one is missing, or (N, L) marks 1, 0 and -1.
    ``splits`` and ``groups`` are None where the list does not tell them. ``notes`` say how it was read.
    """

    root: Path
    paths: list[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    splits: list[str] | None
    groups: list[str] | None
    notes: tuple[str, ...]


def read_image_list(path: Path, options: Mapping[str, str], *, unlabelled: bool = False) -> ImageList:
    """A list with a column of paths, and of labels, or one of marks a label. ``unlabelled``: there may be no labels;
    they are -1 then, of no classes.

    ``options`` say which columns they are: ``path``, ``label`` (several, with commas between, are marks), ``group``,
    ``split``; and ``root``, the folder that paths count from, itself counted from the list's own. Columns that are not
    named are taken by their usual names. Raises :class:`DataError` for a table without them or with wrong cells, and
    :class:`UsageError` where an option names what is not there.
    """
    return _Reader(read_table(path), options, unlabelled).read()


@dataclass(frozen=True)
class _Reader:
    table: Table
    options: Mapping[str, str]
    unlabelled: bool

    def read(self) -> ImageList:
        several = self._several()
        chosen = {role: self._column(role) for role in COLUMNS if role != "label" or not several}
        labelled = bool(several or chosen["label"])
        if chosen["path"] is None or not (labelled or self.unlabelled):
            raise self._unclear("path" if chosen["path"] is None else "label")
        if several and "label" in map(str.lower, self.table.columns) and "label" not in self.options:
            raise DataError(
                f"{self.table.path} has the columns {', '.join(self.table.columns)}",
                cause=f"label and {several[0]} are two ways to say labels",
                fix="leave one of them out, or say which: csv:PATH?label=COLUMN",
            )
        if not self.table.rows:
            raise DataError(
                f"{self.table.path} lists nothing", cause="it has a first line and no other", fix="list images in it"
            )
        notes = self._choices(chosen, several)
        paths = self._paths(str(chosen["path"]))
        labels, classes, told = self._labels(several, chosen.get("label"))
        if several and self._one_hot() == several:
            labels = labels.argmax(1)
            told = [f"columns {', '.join(several[:5])} have one 1 a row: they are taken as classes"]
        groups = self._groups(chosen["group"], paths)
        splits, untold = self._splits(chosen["split"])
        return ImageList(self.root, paths, labels, classes, splits, groups, (*notes, *told, *untold))

    @cached_property
    def root(self) -> Path:
        """The folder that paths count from."""
        home = self.table.path.parent
        root = home / Path(self.options.get("root", ".")).expanduser()
        if not root.is_dir():
            raise UsageError(
                f"?root={self.options['root']} is no folder",
                cause=f"{root} is not there; it counts from the folder of the list",
                fix=f"give a folder below {home}, or a whole path",
            )
        return root

    # --- which columns -------------------------------------------------------------------------------------------

    def _several(self) -> list[str]:
        """The columns of marks, one a label; none where there is one column of classes."""
        if "label" in self.options:
            named = self.options["label"].split(",") if self.options["label"] not in self.table.columns else []
            return [self._known(name.strip()) for name in named] if len(named) > 1 else []
        marks = [name for name in self.table.columns if name.lower().startswith("label:")]
        return marks or ([] if self._column("label") else self._one_hot())

    def _one_hot(self) -> list[str]:
        """Columns of 0 and 1 with one 1 a row, where no column is one of labels: a class each."""
        if "label" in self.options or any(name.lower().startswith("label:") for name in self.table.columns):
            return []
        taken = {self._column(role) for role in COLUMNS} - {None}
        cells = {
            n: _whole(self.table.column(n)) for n in self.table.columns if n not in taken and not _INDEX.fullmatch(n)
        }
        marks = [name for name, values in cells.items() if set(values) <= {"0", "1"}]
        ones = [sum(row) for row in zip(*([v == "1" for v in cells[name]] for name in marks), strict=True)]
        return marks if len(marks) > 1 and set(ones) == {1} else []

    def _column(self, role: str) -> str | None:
        if role in self.options:
            return self._known(self.options[role])
        plain = {name: re.sub(r"[\W_]+", "_", name.lower()) for name in self.table.columns}
        for usual in COLUMNS[role]:
            fitting = [name for name in self.table.columns if plain[name] == usual]
            if len(fitting) > 1:
                raise DataError(
                    f"{self.table.path} has the columns {', '.join(self.table.columns)}",
                    cause=f"{' and '.join(fitting)} would both be the {role}; each column is to be there once",
                    fix=f"remove one of them, or say which: csv:PATH?{role}=COLUMN",
                )
            if fitting:
                return fitting[0]
        return None

    def _known(self, name: str) -> str:
        if self.table.columns.count(name) != 1:
            raise UsageError(
                f"{self.table.path} has no column {name!r}",
                cause=f"its columns are {', '.join(filter(None, self.table.columns)) or 'none'}",
                fix="name one of them; write %20 for a space and %26 for &",
            )
        return name

    def _unclear(self, role: str) -> DataError:
        columns = ", ".join(filter(None, self.table.columns)) or "none"
        return DataError(
            f"{self.table.path} has the columns {columns}",
            cause=f"none of them is called {', '.join(COLUMNS[role][:5])} or the like, so that the {role} is not known",
            fix="say which they are, --data 'csv:PATH?path=COLUMN&label=COLUMN&group=COLUMN&split=COLUMN'; or write as "
            "the first line path,label[,split][,group] or path,label:NAME,...[,split][,group]",
        )

    def _choices(self, chosen: Mapping[str, str | None], several: Sequence[str]) -> list[str]:
        """What is told of columns that were taken by their usual names, and of those that were not taken."""
        guessed = [f"{role} is {name!r}" for role, name in chosen.items() if name and role not in self.options]
        guessed = guessed if any(name and name != role for role, name in chosen.items()) else []
        used = {*several, *chosen.values()}
        left = [name for name in self.table.columns if name not in used and not _INDEX.fullmatch(name)]
        notes = [f"columns: {', '.join(guessed)}"] if guessed else []
        return notes + ([f"columns that are not used: {', '.join(left[:10])}"] if left else [])

    # --- what is in them -----------------------------------------------------------------------------------------

    def _paths(self, column: str) -> list[str]:
        cells = self.table.column(column)
        home = str(self.root.resolve())
        paths = []
        for cell, line in zip(cells, self.table.lines, strict=True):
            inside = cell.removeprefix(f"{home}/").removeprefix("./").removeprefix(".\\")
            name = relative_name(inside)
            if name is None or not name:
                raise DataError(
                    f"{self.table.path} names {cell!r} in line {line}",
                    cause="that may lead out of the folder that paths count from" if cell else "a path is missing",
                    fix=f"give paths that count from {self.root}, without '..'; ?root=FOLDER names another folder",
                )
            paths.append(name)
        return self._with_suffixes(paths)

    def _with_suffixes(self, paths: list[str]) -> list[str]:
        """Images that are named without their suffix, or by a number as ``12.0``, by the names of their files."""
        bare = {name for name in paths if os.path.splitext(name)[1].lower() not in SUFFIXES}
        bare = {name for name in bare if not (self.root / name).is_file()}
        if not bare:
            return paths
        there = {name: found[0].relative_to(self.root).as_posix() for name, found in images_by_name(self.root).items()}
        return [there.get(re.sub(r"(?<=\d)\.0+$", "", name), name) if name in bare else name for name in paths]

    def _classes(self, column: str) -> tuple[NDArray[np.int64], tuple[str, ...], list[str]]:
        cells = _whole(self.table.column(column))
        lost = Counter(cell for cell in cells if cell.lower() in MISSING)
        names = {cell for cell in cells if cell not in lost}
        if "-1" in names and len(names) > 2 and all(re.fullmatch(r"\d+|-1", name) for name in names):
            lost["-1"] = cells.count("-1")  # beside 0, 1, ... it marks what nobody labelled
            names.remove("-1")
        self._refuse_measures(column, names)
        classes = tuple(sorted(names, key=lambda n: (int(n), n)) if all(map(_is_number, names)) else sorted(names))
        place = {name: i for i, name in enumerate(classes)} | dict.fromkeys(lost, -1)
        words = [f"{count} {word}" for word, count in lost.items() if word]
        total = sum(lost[word] for word in lost if word)
        told = [f"{total} labels of the list are missing: {', '.join(words)}"] if words else []
        return np.array([place[cell] for cell in cells], dtype=np.int64), classes, told

    def _refuse_measures(self, column: str, names: set[str]) -> None:
        """Numbers of which hardly two are equal are no classes."""
        fractions = [name for name in names if re.fullmatch(r"-?\d*\.\d+(e-?\d+)?", name, re.IGNORECASE)]
        if len(names) > 20 and 2 * len(names) > len(self.table.rows) and 2 * len(fractions) > len(names):
            raise DataError(
                f"column {column!r} of {self.table.path} holds measures, not classes",
                cause=f"it has {len(names)} different numbers in {len(self.table.rows)} rows, such as {fractions[0]}",
                fix="divide them into classes, or name another column: csv:PATH?label=COLUMN",
            )

    def _labels(
        self, several: Sequence[str], column: str | None
    ) -> tuple[NDArray[np.int64], tuple[str, ...], list[str]]:
        """Labels, classes and what is told of them: of columns of marks, of one of classes, or of neither."""
        if several:
            return self._marks(several)
        return self._classes(column) if column else (np.full(len(self.table.rows), -1), (), [])

    def _marks(self, columns: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...], list[str]]:
        marks = [[self._mark(i, cell) for i, cell in enumerate(self.table.column(name))] for name in columns]
        names = tuple(name[6:] if name.lower().startswith("label:") else name for name in columns)
        return np.array(marks, dtype=np.int64).T, names, []

    def _mark(self, row: int, text: str) -> int:
        mark = {"1": 1, "0": 0, "-1": -1, "true": 1, "false": 0, "1.0": 1, "0.0": 0, "-1.0": -1}.get(text.lower())
        if mark is None and text.lower() not in MISSING:
            raise DataError(
                f"{self.table.path} has the mark {text!r} in row {row + 2}",
                cause="the mark of a label is 1, 0, or blank or -1 for unknown",
                fix="correct that cell, or use one column label with names of classes",
            )
        return -1 if mark is None else mark

    def _groups(self, column: str | None, paths: Sequence[str]) -> list[str] | None:
        """A row without a group is one of its own."""
        if column is None:
            return None
        cells = _whole(self.table.column(column))
        return [path if cell.lower() in MISSING else cell for cell, path in zip(cells, paths, strict=True)]

    def _splits(self, column: str | None) -> tuple[list[str] | None, list[str]]:
        """Names of splits by what they are for; "" in rows that name none."""
        if column is None:
            return None, []
        cells = ["" if cell.lower() in MISSING else cell for cell in _whole(self.table.column(column))]
        roles = split_roles(set(cells))
        untold = cells.count("")
        told = [f"{untold} rows name no split and are left out"] if untold else []
        return [roles.get(cell, cell) for cell in cells], told


def _is_number(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name, re.ASCII) is not None


def _whole(cells: list[str]) -> list[str]:
    """``1.0`` as ``1`` where all cells are whole numbers: what became of integers beside a blank cell."""
    known = [cell for cell in cells if cell.lower() not in MISSING]
    if not all(_is_number(cell) or _WHOLE.fullmatch(cell) for cell in known):
        return cells
    return [match[1] if (match := _WHOLE.fullmatch(cell)) else cell for cell in cells]
