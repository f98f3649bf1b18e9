"""Labelled images in memory, and the layouts anybody's data come in: class folders, a CSV list, arrays in an NPZ file.

Reading a split decodes nothing: names, sizes and labels are enough to know what the data are, and an image is
decoded when it is asked for. A :class:`ClassificationSet` is what the feature cache reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import unicodedata
import zipfile
import zlib
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import combinations, islice
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, NamedTuple, Protocol, cast
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from evalsuite.data import YOURS, Report, Source, split_role, split_roles
from evalsuite.data.demo import write_classes, write_marks
from evalsuite.data.digests import Digests, State, content_of, digests, joined, marks, state
from evalsuite.data.draws import evenly, split_by_hash
from evalsuite.data.images import (
    DECODING,
    SUFFIXES,
    clutter,
    decode,
    digest,
    leads_back,
    leads_out,
    list_images,
    read_rgb,
    same_names,
)
from evalsuite.data.learning import ImageRows, Learning, PixelRows, by_roles, rows_by_name
from evalsuite.data.reading import Contents
from evalsuite.data.tables import COLUMNS, ImageList, read_image_list
from evalsuite.errors import DataError, UsageError
from evalsuite.progress import Progress

__all__ = [
    "Arrays",
    "ClassificationSet",
    "ClassificationSource",
    "Csv",
    "Files",
    "Folder",
    "Npz",
    "Pixels",
    "class_folders",
    "find_images",
    "no_split",
    "npz_array",
    "npz_headers",
    "npz_rows",
    "read_files",
    "read_folder",
    "refuse_single_class",
    "split_by_hash",
    "split_folders",
]

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Names = NDArray[np.str_]


class Pixels(Protocol):
    """Images by number.

    ``digests`` (N, 32) tell equal images, ``digest`` what the files of the images at ``places`` hold, wherever they
    lie; ``version`` changes with what their pixels are read as, too.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> Bytes: ...
    def digests(self, places: Ints) -> Digests: ...
    def digest(self, places: Ints) -> str: ...
    def version(self, places: Ints) -> str: ...


class Files:
    """Images in files below ``root``, which ``read`` decodes. Told apart by their names and what they hold; ``version``
    adds who reads. Reading a file that is not there raises :class:`ImageError`.
    """

    def __init__(self, root: Path, names: Sequence[str], read: Callable[[Path], Bytes] = read_rgb) -> None:
        self.root, self.read = root, read
        self.names = _names(names)
        self._digests = np.zeros((len(names), 32), np.uint8)
        self._digested = np.zeros(len(names), bool)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int, /) -> Bytes:
        return self.read(self.path(place))

    def path(self, place: int) -> Path:
        """The file of one image."""
        return self.root / str(self.names[place])

    def digests(self, places: Ints) -> Digests:
        """(N, 32): of what the files hold, as :func:`evalsuite.data.digests.digests`; each is made once."""
        missing = np.unique(places[~self._digested[places]])
        if len(missing):
            self._digests[missing] = digests(self.root, self.names[missing].tolist())
            self._digested[missing] = True
        return self._digests[places]

    def digest(self, places: Ints) -> str:
        return joined((name.replace(os.sep, "/") for name in self.names[places].tolist()), self.digests(places))

    def version(self, places: Ints) -> str:
        return joined([self.digest(places), f"{self.read.__name__} {DECODING}"])


class Arrays:
    """Images in one array (N,H,W,3), (N,H,W,1) or (N,H,W) uint8, which ``read`` gives when it is first needed.

    ``content`` is a digest of the file it comes from.
    """

    def __init__(self, count: int, read: Callable[[], Bytes], content: str) -> None:
        self._count, self._read, self._content = count, read, content

    @cached_property
    def pixels(self) -> Bytes:
        """The whole array."""
        return self._read()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int, /) -> Bytes:
        image = self.pixels[place]
        image = image[..., None] if image.ndim == 2 else image
        return np.ascontiguousarray(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image)

    def digests(self, places: Ints) -> Digests:
        """(N, 32): the sha256 of each image's pixels."""
        found = [hashlib.sha256(self.pixels[place].tobytes()).digest() for place in places.tolist()]
        return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32)

    def digest(self, places: Ints) -> str:
        return _sha256(self._content.encode(), places)

    version = digest


@dataclass(frozen=True, eq=False)
class ClassificationSet:
    """A split of labelled images.

    ``labels`` are (N,) int64 classes, or (N, L) with 1, 0 and -1 per label; a class of -1, and a row of nothing
    but -1, is a missing label (other negative numbers are of a layout's own). ``names`` (N,) name the images,
    ``groups`` (N,) their patients or scenes, ``tags`` (N,) what kind of image each is (a view, a part of the body, a
    source), where the data tell. ``places`` (N,) are the rows' numbers in ``pixels``. ``subset`` says which part of a
    split this is, where it is one. ``left_out`` counts rows that were there and are not here, by reason.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    names: Names
    labels: Ints
    pixels: Pixels
    places: Ints
    groups: Names | None = None
    notes: tuple[str, ...] = ()
    tags: Names | None = None
    subset: str | None = None
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int, /) -> Bytes:
        """(H, W, 3) uint8 RGB. Raises :class:`DataError` naming an image that does not decode."""
        return self.pixels[int(self.places[row])]

    def __getitems__(self, rows: Sequence[int], /) -> list[Bytes]:
        """Many rows, together where the pixels can be read so: a decoder of videos then need not begin anew."""
        together = getattr(self.pixels, "__getitems__", None)
        places = [int(self.places[row]) for row in rows]
        return [self.pixels[place] for place in places] if together is None else list(together(places))

    @cached_property
    def ids(self) -> list[str]:
        """The names, for the cache."""
        found: list[str] = self.names.tolist()
        return found

    @property
    def multilabel(self) -> bool:
        return self.labels.ndim == 2

    @property
    def known(self) -> NDArray[np.bool_]:
        """(N,): which rows have a label."""
        return np.asarray((self.labels >= 0).any(axis=1) if self.multilabel else self.labels >= 0)

    @cached_property
    def fingerprint(self) -> str:
        """Of the images alone: features are the same whatever the labels say."""
        return self.pixels.version(self.places)

    @cached_property
    def digest(self) -> str:
        """Of images, labels, classes and groups: what a score depends on. It does not depend on where files lie."""
        groups = [] if self.groups is None else self.groups.tolist()
        parts = [self.pixels.digest(self.places), str(len(self.classes)), *self.classes, *groups]
        return joined([_sha256("\0".join(parts).encode()), str(self.labels.shape), _sha256(self.labels)])

    def contents(self) -> Contents:
        """Every image by its name: a digest of its file, or of its pixels."""
        return dict(zip(self.ids, marks(self.pixels.digests(self.places)), strict=True))

    def take(self, rows: Ints | NDArray[np.bool_]) -> ClassificationSet:
        """Some of the rows."""
        return dataclasses.replace(
            self, names=self.names[rows], labels=self.labels[rows], places=self.places[rows],
            groups=None if self.groups is None else self.groups[rows],
            tags=None if self.tags is None else self.tags[rows],
        )  # fmt: skip

    def rows(self) -> ImageRows:
        """What to learn from: images in files in the order of their names. Images of several labels have none here."""
        labels = np.full(len(self), -1) if self.multilabel else np.maximum(self.labels, -1)
        if isinstance(self.pixels, Files):
            return rows_by_name(self.pixels.root, self.pixels.names[self.places], labels, self.pixels.read)
        return _SetRows(self, labels)

    def limit(self, count: int | None) -> ClassificationSet:
        """At most ``count`` rows (None: all), as :func:`evalsuite.data.draws.evenly`."""
        rows = evenly(len(self), count)
        return self if rows is None else self.take(rows)


class _SetRows(ImageRows):
    """The rows of a set whose images are in no files. An array is read now, that the processes which load batches share
    it; a mapped file stays one."""

    def __init__(self, data: ClassificationSet, labels: Ints) -> None:
        self.data, self.labels = data, labels
        if isinstance(data.pixels, Arrays):
            _ = data.pixels.pixels

    @property
    def ids(self) -> list[str]:
        return self.data.ids

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    def __getitem__(self, row: int, /) -> Bytes:
        return self.data[row]


class ClassificationSource(Source[ClassificationSet]):
    """What the layouts of labelled images share: roles by the names of the splits, verification.

    ``overlap`` says what a group in two splits is: a leak, or a thing to know where a data set is published so.
    """

    overlap: ClassVar[Literal["fault", "note"]] = "fault"

    def leaks(self, split: str, other: str) -> bool:
        """Whether an image or a group in both splits is a leak of one into the other."""
        return split != other

    @abstractmethod
    def load(self, path: Path, split: str) -> ClassificationSet: ...

    def roles(self, path: Path) -> Mapping[str, str]:
        found = {name: name for name in self.splits(path) if name in ("train", "val", "test")}
        if "train" not in found or len(found) == 1:
            raise DataError(
                f"{path} has nothing to learn from or nothing to score on",
                cause=f"its splits are {', '.join(self.splits(path)) or 'none'}",
                fix="give it a split named train, and one named test or val",
            )
        return found

    def official(self, path: Path, train: ClassificationSet, fraction: float) -> ClassificationSet | None:
        """The official subset of that share of the training labels, of rows of ``train``, and ``subset`` names it.

        None where the data set has none, or its list is not there.
        """
        return None

    def check(self, train: ClassificationSet, test: ClassificationSet) -> None:
        super().check(train, test)
        for part in (train, test):
            if not part.known.any():
                raise DataError(
                    f"{len(part)} of {len(part)} images of {part.name} {part.split} have no label",
                    cause=f"the first is {part.names[0]}" if len(part) else "there is none",
                    fix="label them",
                )
        if train.multilabel:
            _refuse_one_sided(train, test)
        else:
            _refuse_unlearnt(train, test)
            refuse_single_class(train)

    def verify(self, path: Path, progress: Progress | None = None, workers: int | None = None) -> Report:
        report = Report(self.name, path)
        sets: dict[str, ClassificationSet] = {}
        splits: tuple[str, ...] = ()
        with report.examining():
            splits = self.splits(path)
        if not splits:
            return report
        for split in splits:
            with report.examining():
                sets[split] = self.load(path, split)
        if len(sets) == len(splits) and report.ok:
            self.rehearse(path, report, sets)
        for split, part in sets.items():
            report.counts[split] = _counts(part)
            report.notes += [f"{split}: {note}" for note in part.notes]
            empty = [] if part.multilabel else _first([c for c, n in report.counts[split]["classes"].items() if not n])
            report.notes += [f"{split}: no image of class {empty}"] if empty else []
        self.examine(path, sets, report)
        _survey(report, sets, self.leaks, progress or Progress(quiet=True), workers)
        shared = _shared_groups(sets, self.leaks)
        (report.faults if self.overlap == "fault" else report.notes).extend(shared)
        return report

    def examine(self, path: Path, sets: Mapping[str, ClassificationSet], report: Report) -> None:
        """Tell what else this layout's files say of themselves; nothing, unless a layout has more to compare."""

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        raise UsageError(
            f"{self.name} has no demo world",
            cause="it is a layout for data of your own",
            fix="leave --demo out and give --data",
        )


# --- class folders ----------------------------------------------------------------------------------------------


class Folder(ClassificationSource):
    """``train``, ``val`` and ``test`` with a folder a class, or what people call these (``Training``, ``valid``,
    ``seg_test``). Without such folders, the folder's own are the classes, and one image in five of each, by
    the hash of its name, is tested on (:func:`split_by_hash`).
    """

    name = "folder"
    serves: ClassVar[tuple[str, ...]] = ("classify",)
    tree = "train/CLASS/*.jpg\ntest/CLASS/*.jpg"
    homepage = "https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html"
    licence = YOURS
    citation = "none: it is a layout"

    def locate(self, root: Path | None) -> Path:
        if root is None or not root.is_dir() or not class_folders(root):
            raise self.missing(root)
        return root

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        return write_classes(root / "folder", seed, images)

    def splits(self, path: Path) -> tuple[str, ...]:
        return tuple(split_folders(path)) or ("train", "test")

    def load(self, path: Path, split: str) -> ClassificationSet:
        folders = split_folders(path)
        if not folders:
            whole = read_folder(path, self.name, split, class_folders(path))
            return whole.take(split_by_hash(whole.names, whole.labels) == split)
        if split not in folders:
            raise no_split(path, split, folders)
        return read_folder(folders[split], self.name, split, class_folders(folders["train"]))

    def locate_images(self, root: Path) -> Path:
        """Any folder, where this is anybody's layout: pictures need no classes to be learnt from."""
        return root if self.layout_only else super().locate_images(root)

    def learning(self, path: Path) -> Learning:
        """All images below ``train``, and the images of ``val`` or ``test`` held out; or all images below the folder,
        in folders or not. Images in no class folder have no label."""
        if type(self).load is not Folder.load:  # a subclass that reads something else
            return super().learning(path)
        folders = split_folders(path, refuse=False)
        if "train" not in folders:
            home = path / "train" if (path / "train").is_dir() else path
            return Learning(_by_top_folder(home, class_folders(home)))
        classes = class_folders(folders["train"])
        train = _by_top_folder(folders["train"], classes)
        others = (_by_top_folder(folders[name], classes) for name in ("val", "test") if name in folders)
        return Learning(
            train, held_out=next((rows for rows in others if rows.labelled), None) if train.labelled else None
        )

    def examine(self, path: Path, sets: Mapping[str, ClassificationSet], report: Report) -> None:
        folders = split_folders(path)
        read = {folder.relative_to(path).parts[0] for folder in folders.values()}
        others = [name for name in class_folders(path) if name not in read]
        if folders and others:
            report.notes.append(f"folders that are no split are left out: {_first(others)}")
        parent = path.resolve().parent
        if not folders and {path.resolve().name, "train"} <= _split_names(parent):
            report.notes.append(
                f"{path.name} is divided anew, and lies beside other splits: --data folder:{parent} reads them"
            )


def _by_top_folder(path: Path, classes: Sequence[str]) -> ImageRows:
    """Every image below ``path``, labelled by its top folder; -1 where that is none of the classes."""
    files, _ = find_images(path)
    place = {name: i for i, name in enumerate(classes)}
    tops = [name.split(os.sep)[0] if os.sep in name else "" for name in files.names.tolist()]
    return rows_by_name(path, files.names, np.array([place.get(top, -1) for top in tops], dtype=np.int64))


def _split_names(path: Path) -> set[str]:
    """Folders that are splits by name, and the roles that they have."""
    roles = split_roles(class_folders(path))
    return {*roles, *roles.values()} if len(set(roles.values())) > 1 else set()


_LIKE_SPLITS = ("training", "test", "testing", "val", "validation")  # "train" and "valid" may be a class of images


def split_folders(path: Path, refuse: bool = True) -> dict[str, Path]:
    """{``train``, ``val``, ``test``: its folder of class folders}; none where the folders of ``path`` are classes.

    A split in a folder of its own name (``seg_train/seg_train``) is read from the inner one. ``refuse``: raises
    :class:`DataError` where folders are splits and cannot be classes, but cannot be read as splits either; and where
    splits lie a level below, which it names.
    """
    roles = split_roles(class_folders(path))
    holding = {name: role for name, role in roles.items() if class_folders(path / name)}
    if "train" in holding.values():
        for role in ("train", "val", "test"):
            named = [name for name in holding if holding[name] == role]
            if len(named) > 1:
                raise DataError(
                    f"{path} has several folders that are the split {role}",
                    cause=f"they are {', '.join(named)}",
                    fix="leave the one that is meant, and move the others out of this folder",
                )
        found = {role: name for name, role in holding.items()}
        folders: dict[str, Path] = {role: _inner(path / found[role]) for role in _SETS if role in found}
        if "val" in folders and "test" in folders and _unlabelled(folders["test"], folders["train"]):
            del folders["test"]
        return folders
    if refuse:
        _refuse_like_splits(path, roles, holding)
        _refuse_splits_below(path)
    return {}


def _inner(folder: Path) -> Path:
    """The folder itself, or the only one in it where that is the same split once more, as zips unpack."""
    below = class_folders(folder)
    twice = len(below) == 1 and (below[0] == folder.name or split_role(below[0]) == (split_role(folder.name) or 0))
    return _inner(folder / below[0]) if twice else folder


def _unlabelled(test: Path, train: Path) -> bool:
    """Whether a split has no class folder of the training split's: its images lie in one of another name."""
    classes = {_composed(name) for name in class_folders(train)}
    folders = class_folders(test)
    return len(folders) <= 1 and classes.isdisjoint(map(_composed, folders))


def _composed(name: str) -> str:
    """A name with its accents as part of the letters; macOS writes them apart."""
    return unicodedata.normalize("NFC", name)


def _refuse_like_splits(path: Path, roles: Mapping[str, str], holding: Mapping[str, str]) -> None:
    alike = [*holding, *(name for name in roles if name.lower() in _LIKE_SPLITS)]
    alike = list(roles) if len(set(roles.values())) > 1 else list(dict.fromkeys(alike))
    if alike and "train" in roles.values():
        raise DataError(
            f"{path} has the splits {_first(alike)}, and they have no class folders",
            cause="the classes of images are the names of the folders that they lie in, and a split's name is no class",
            fix=f"sort the images into {alike[0]}/CLASS/; or, with a list of labels, --data csv:PATH.csv",
        )
    if alike:
        raise DataError(
            f"{path} has nothing to learn from or nothing to score on",
            cause=f"{_first(alike)} {'is a split' if len(alike) == 1 else 'are splits'} by name, and none is train",
            fix="give it a split named train, and one named test or val; a class of such a name needs another one",
        )


def _refuse_splits_below(path: Path) -> None:
    """The splits may lie a level or two lower, as zips unpack, or below every class."""
    folders, place = class_folders(path), path
    while len(folders) == 1:
        place = place / folders[0]
        folders = class_folders(place)
        if "train" in split_folders(place, refuse=False):
            raise DataError(
                f"{path} holds one folder, and the splits are in {place.relative_to(path)}",
                cause="it would be the only class",
                fix=f"--data folder:{place}",
            )
    below = [name for name in class_folders(path)[:_LOOKED_AT] if "train" in _split_names(path / name)]
    if below:
        raise DataError(
            f"{path} has folders that hold splits: {_first(below)}",
            cause="a folder of splits is no class",
            fix=f"give one of them, --data folder:{path / below[0]}; or put splits above classes: train/{below[0]}",
        )


_LOOKED_AT = 5  # folders in which splits are looked for


def read_folder(path: Path, name: str, split: str, classes: Sequence[str]) -> ClassificationSet:
    """Images below a folder a class, at any depth, in the order of their names.

    Raises :class:`DataError` for folders that are no class, and where there is no image.
    """
    composed = {_composed(name): name for name in classes}
    folders = {name: composed.get(_composed(name)) for name in class_folders(path)}
    odd = sorted(name for name, known in folders.items() if known is None)
    if odd:
        raise DataError(
            f"{path} has folders that are no class: {', '.join(odd[:5])}",
            cause=f"the {len(classes)} classes are the folders of the training split",
            fix="rename or remove those folders; letter case and spaces count",
        )
    by_class = {known: name for name, known in folders.items()}
    files, note = find_images(path, [by_class.get(name, name) for name in classes])
    place = {by_class.get(name, name): label for label, name in enumerate(classes)}
    labels = np.array([place[name.split(os.sep)[0]] for name in files.names.tolist()], dtype=np.int64)
    astray = sum(entry.is_file() and not clutter(entry.name) for entry in os.scandir(path))
    notes = [note] if note else []
    notes += [f"{astray} files lie in no class folder and are left out"] if astray else []
    return ClassificationSet(
        name, split, tuple(classes), files.names, labels, files, np.arange(len(files)), notes=tuple(notes)
    )


def find_images(path: Path, folders: Sequence[str] = ("",)) -> tuple[Files, str | None]:
    """Images below ``path``, or below these folders of it, at any depth, and a sentence on other files there, if any.

    They come folder after folder, in each in the order of their names. Raises :class:`DataError` where there is no
    image, or one whose name is no text.
    """
    found, others = listing = list_images(path, folders)
    if not found:
        raise DataError(
            f"{path} holds no image",
            cause=f"{listing.note}; those end in {', '.join(SUFFIXES)}" if others else "it is empty",
            fix="give a folder of images, one file an image; arrays of images go in as npz:PATH",
        )
    names = [os.path.relpath(entry.path, path) for entry in found]
    unreadable = next((name for name in names if not _is_text(name)), None)
    if unreadable is not None:
        raise DataError(
            f"{path} holds a file whose name is no text: {unreadable!r}",
            cause="its bytes are not UTF-8",
            fix="rename the file",
        )
    return Files(path, names), listing.note


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_files(
    root: Path, names: Sequence[str], *, complete: bool = False, read: Callable[[Path], Bytes] = read_rgb
) -> Files:
    """Files that a list names, below ``root``.

    One that is not there is told when it is read; at once where all are to be ``complete``, or none is there. Raises
    :class:`DataError` for that, and for a name that leads out of ``root``.
    """
    stray = next((name for name in names if leads_out(name)), None)
    if stray is not None:
        raise DataError(
            f"a list of images below {root} names {stray!r}",
            cause="that may lead out of this folder",
            fix="give paths that count from it, without '..'",
        )
    lost = (name for name in names if not os.path.exists(root / name))
    first = next(lost, None)
    if first is not None and (complete or sum(1 for _ in lost) == len(names) - 1):
        raise DataError(
            f"{root / first} is missing",
            cause="a list of images names it, and it is no file",
            fix="restore it, or correct the list; its names count from the list's own folder",
        )
    return Files(root, names, read)


def class_folders(path: Path) -> list[str]:
    """The folders in ``path`` by name, but for hidden ones, those of tools, and links back to a folder around
    them; none where it is no folder."""
    if not path.is_dir():
        return []
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not clutter(p.name) and not leads_back(p))


# --- CSV --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Csv(ClassificationSource):
    """A list of images with a column ``path`` (from the list's own folder) and a column ``label``, or one of marks,
    ``label:NAME``, for each of several labels.

    ``label`` is a class's name; blank, ``nan``, ``NA``, ``None`` and ``null`` are a missing label. ``label:NAME`` is 1,
    0, or blank or -1 for unknown. ``split`` names each row's split, ``group`` its patient or scene. Without ``split``,
    one group in five of each class, or one image where there are no groups, is tested on, by the hash of its name.

    Columns of other names are taken where the names are usual ones (``filename``, ``class``, ``patient_id``, ...), and
    that is told; or where ``--data`` says so: ``csv:PATH?path=FILE&label=SPECIES&group=BIRD&split=FOLD``, of several
    labels ``label=A,B,C``. ``root=FOLDER`` is where paths count from instead. Cells may be divided by commas,
    semicolons, bars or tabs; an index column and others are left out; paths may be written as on Windows or without
    their suffix; whole numbers may be written ``1.0``.
    """

    options: tuple[tuple[str, str], ...] = ()
    images_only: bool = False  # a list need not have labels

    name = "csv"
    serves: ClassVar[tuple[str, ...]] = ("classify", "classify-multilabel")
    tree = "list.csv"
    homepage = "https://www.rfc-editor.org/rfc/rfc4180"
    licence = YOURS
    citation = "none: it is a layout"
    file = True

    @property
    def key(self) -> Hashable:
        return type(self), self.options, self.images_only

    def configured(self, options: str) -> Csv:
        found = dict(parse_qsl(options, keep_blank_values=True))
        odd = sorted(found.keys() - {*COLUMNS, "root"})
        if odd or not found:
            raise UsageError(
                f"?{options} makes no sense behind a list",
                cause=f"unknown: {', '.join(odd)}" if odd else "it has the form name=value&name=value",
                fix="--data 'csv:PATH?path=COLUMN&label=COLUMN&group=COLUMN&split=COLUMN&root=FOLDER', any of them",
            )
        return Csv(tuple(sorted(found.items())))

    def locate(self, root: Path | None) -> Path:
        if root is None or not root.is_file():
            raise DataError(
                f"{root} is no CSV file", cause="the list itself is wanted, not its folder", fix="--data csv:PATH.csv"
            )
        return root

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        return write_marks(root / "csv", seed, images) / "list.csv"

    def splits(self, path: Path) -> tuple[str, ...]:
        there = {split for split in self._read(path)[1].tolist() if split}
        order = [name for name in ("train", "val", "test") if name in there]
        return (*order, *sorted(there - set(order)))

    def load(self, path: Path, split: str) -> ClassificationSet:
        listed, splits = self._read(path)
        rows = np.flatnonzero(splits == split)
        known = self.splits(path)
        if split not in known:
            raise no_split(path, split, known)
        files = _listed_files(path, listed.root, [listed.paths[row] for row in rows])
        groups = None if listed.groups is None else _names(listed.groups)[rows]
        return ClassificationSet(
            path.stem, split, listed.classes, files.names, listed.labels[rows], files, np.arange(len(files)), groups,
            listed.notes if split == known[0] else (),
        )  # fmt: skip

    def learning(self, path: Path) -> Learning:
        """As of all layouts; of a list without labels all images, unless it names their splits."""
        return by_roles(dataclasses.replace(self, images_only=True), path)

    def roles(self, path: Path) -> Mapping[str, str]:
        """As of all layouts; but a test split without a label is none to score on where there is a val."""
        found = super().roles(path)
        listed, splits = self._read(path)
        known = np.asarray(np.asarray(listed.labels >= 0).reshape(len(splits), -1).any(axis=1))
        withheld = "test" in found and "val" in found and not known[splits == "test"].any()
        return {role: split for role, split in found.items() if role != "test"} if withheld else found

    def _read(self, path: Path) -> tuple[ImageList, Names]:
        return _image_list(path, state(path), self.options, self.images_only)


@lru_cache(maxsize=4)
def _image_list(
    path: Path, state: State, options: tuple[tuple[str, str], ...], unlabelled: bool
) -> tuple[ImageList, Names]:
    """A list, and the split of each row: its own, or by hash."""
    found = read_image_list(path, dict(options), unlabelled=unlabelled)
    if found.splits is not None:
        return found, _names(found.splits)
    if not found.classes:
        return found, _names(["train"] * len(found.paths))
    groups = None if found.groups is None else _names(found.groups)
    return found, split_by_hash(_names(found.paths), np.asarray(found.labels), groups)


def _listed_files(path: Path, root: Path, names: Sequence[str]) -> Files:
    """:func:`read_files`; where none is below ``root``, the refusal names the folder that they are below."""
    try:
        return read_files(root, _as_on_disk(root, names))
    except DataError as missing:
        below = (Path(top) / name for top, folders, _ in os.walk(root) for name in folders if not clutter(name))
        first = re.sub(r"(?<=\d)\.0+$", "", names[0])
        kinds = ("", *SUFFIXES, *map(str.upper, SUFFIXES))
        homes = (f for f in islice(below, _SEARCHED) if any((f / f"{first}{kind}").is_file() for kind in kinds))
        home = next(homes, None)
        if home is None:
            raise
        fix = f"say where paths count from: --data 'csv:{path}?root={home.relative_to(root)}'"
        raise DataError(missing.problem, cause=missing.cause, fix=fix) from missing


def _as_on_disk(root: Path, names: Sequence[str]) -> Sequence[str]:
    """The names with the letter case and the accents of the files, where no file is there by the very name."""
    if all((root / name).exists() for name in names):
        return names
    there = (os.path.relpath(entry.path, root).replace(os.sep, "/") for entry in list_images(root).images)
    alike = same_names(names, there)
    return [alike.get(name, name) for name in names]


_SEARCHED = 1000  # folders


# --- NPZ --------------------------------------------------------------------------------------------------------


class Npz(ClassificationSource):
    """Arrays in one ``.npz`` file, as MedMNIST and Keras name them: ``train_images`` and ``train_labels`` (also
    ``val_`` and ``test_``), or ``x_train`` and ``y_train``. Training images may be called ``images``, ``image``,
    ``data`` or ``arr_0``, too, and their labels ``labels`` or ``label``; without a split beside them, one in five of
    each class is tested on (:func:`split_by_hash`). Images are uint8 (N,H,W), (N,H,W,1) or (N,H,W,3); labels (N,) or
    (N,1) integers, -1 where one is missing, or (N,L) marks. ``train_groups`` and so on may name groups. Pickled
    objects are not read.
    """

    name = "npz"
    serves: ClassVar[tuple[str, ...]] = ("classify", "classify-multilabel")
    tree = "data.npz"
    homepage = "https://numpy.org/doc/stable/reference/generated/numpy.savez.html"
    licence = YOURS
    citation = "none: it is a layout"
    file = True
    classes: ClassVar[tuple[str, ...]] = ()

    def locate(self, root: Path | None) -> Path:
        if root is None or not root.is_file():
            raise DataError(f"{root} is no file", cause="the layout is one file of arrays", fix="--data npz:PATH.npz")
        return root

    def splits(self, path: Path) -> tuple[str, ...]:
        return tuple(_keys(path, npz_headers(path)))

    def load(self, path: Path, split: str) -> ClassificationSet:
        members = npz_headers(path)
        keys = _keys(path, members)
        if split not in keys:
            raise no_split(path, split, keys)
        images, labels, groups = keys[split]
        drawn = sum(each.images == images for each in keys.values()) > 1
        shape = _check_images(path, images, members[images])
        marks = _read_labels(path, labels, shape[0])
        named = npz_array(path, groups).astype(np.str_) if groups in members else None
        classes = self._classes(path, marks, [each.labels for each in keys.values()])
        pixels = Arrays(shape[0], partial(npz_array, path, images), f"{content_of(path)} {images}")
        ids = _names([f"{images.removesuffix('_images')}/{i:0{len(str(shape[0]))}d}" for i in range(shape[0])])
        if named is not None and named.shape != (shape[0],):
            raise _broken(path, ValueError(f"{groups} is of shape {named.shape}"))
        whole = ClassificationSet(path.stem, split, classes, ids, marks, pixels, np.arange(shape[0]), named)
        return whole.take(split_by_hash(ids, marks, named) == split) if drawn else whole

    def learning(self, path: Path) -> Learning:
        """All images where none are set apart to test on, and labels only where there are any."""
        if type(self).load is not Npz.load:
            return super().learning(path)
        members = npz_headers(path)
        keys = _all_keys(path, members)
        train = npz_rows(path)
        others = [keys[split] for split in ("test", "val") if split in keys and keys[split].labels in members]
        rows = (_rows(path, members, each) for each in others if each.images != keys["train"].images)
        return Learning(
            train, held_out=next((each for each in rows if each.labelled), None) if train.labelled else None
        )

    def _classes(self, path: Path, marks: Ints, keys: Sequence[str]) -> tuple[str, ...]:
        """Numbers, up to the largest label of any split."""
        if marks.ndim == 2:
            return tuple(str(i) for i in range(marks.shape[1]))
        top = max(int(npz_array(path, key).max()) for key in keys)
        return tuple(str(i) for i in range(top + 1))


_SETS = ("train", "val", "test")
_ALONE = ("images", "image", "data", "arr_0")  # what training images are called where splits have no names
_LABELS = ("labels", "label", "train_labels", "y_train")

Members = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


class _Keys(NamedTuple):
    """The names of the arrays of one split."""

    images: str
    labels: str
    groups: str


def _keys(path: Path, members: Members) -> dict[str, _Keys]:
    """{split: its arrays}. Raises :class:`DataError` where one has no labels."""
    found = _all_keys(path, members)
    lacking = [keys.labels for keys in found.values() if keys.labels not in members]
    if lacking:
        raise DataError(
            f"{path} holds no labelled images",
            cause=f"{', '.join(dict.fromkeys(lacking))} is missing",
            fix="save train_images, train_labels, test_images and test_labels in it",
        )
    return found


def _all_keys(path: Path, members: Members) -> dict[str, _Keys]:
    """{split: its arrays}, whether or not there are labels."""
    named = {
        s: (_Keys(f"{s}_images", f"{s}_labels", f"{s}_groups"), _Keys(f"x_{s}", f"y_{s}", f"groups_{s}")) for s in _SETS
    }
    found = {
        s: next(k for k in keys if k.images in members)
        for s, keys in named.items()
        if any(k.images in members for k in keys)
    }
    alone = next((name for name in _ALONE if name in members), None)
    if "train" not in found and alone is not None:
        keys = _Keys(alone, next((name for name in _LABELS if name in members), "labels"), "groups")
        found = {"train": keys, **(found or {"test": keys})}
    if "train" in found and found["train"].labels not in members:
        labels = next((name for name in _LABELS if name in members), found["train"].labels)
        found["train"] = found["train"]._replace(labels=labels)
    if not found:
        wanted = ", ".join(("train_images", "x_train", *_ALONE))
        raise DataError(
            f"{path} holds no images",
            cause=f"its arrays are {', '.join(members) or 'none'}, and images are called {wanted}",
            fix="save train_images, train_labels, test_images and test_labels in it",
        )
    return found


def npz_rows(path: Path) -> PixelRows:
    """The training images of an ``.npz`` file, with labels where it has any.

    Raises :class:`DataError` where it is broken or has none, and where labels are not as many as images.
    """
    members = npz_headers(path)
    keys = _all_keys(path, members)
    if "train" not in keys:
        raise no_split(path, "train", keys)
    return _rows(path, members, keys["train"])


def _rows(path: Path, members: Members, keys: _Keys) -> PixelRows:
    """The images of a split; labels that are no classes, as of a regression, are none here."""
    shape = _check_images(path, keys.images, members[keys.images])
    labels = None
    if keys.labels in members and not _measured(path, keys.labels, shape[0]):
        marks = _read_labels(path, keys.labels, shape[0])
        labels = marks if marks.ndim == 1 else None
    return PixelRows(npz_array(path, keys.images), labels)


def _measured(path: Path, key: str, count: int) -> bool:
    """Whether an array holds fractions, one or more an image."""
    values = npz_array(path, key)
    return len(values) == count and values.dtype.kind == "f" and not np.array_equal(values, np.round(values))


def npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of every array of an ``.npz`` file, from the headers alone.

    Raises :class:`DataError` for a file that is no such archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        found[name.removesuffix(".npy")] = _header(file)
            return found
    except _UNREADABLE as error:
        raise _broken(path, error) from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(file)
    return shape, kind


def npz_array(path: Path, key: str) -> NDArray[Any]:
    """One array of an ``.npz`` file. Raises :class:`DataError` where it is broken, or holds pickled objects."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return cast("NDArray[Any]", file[key])
    except _UNREADABLE as error:
        raise _broken(path, error) from error


_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def _check_images(path: Path, key: str, member: tuple[tuple[int, ...], np.dtype[Any]]) -> tuple[int, ...]:
    shape, kind = member
    if kind != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))) or not shape[0]:
        raise DataError(
            f"array {key!r} of {path} is no set of images",
            cause=f"it is {shape} {kind}",
            fix="save grey (N,H,W) or RGB (N,H,W,3) images as uint8",
        )
    return shape


def _read_labels(path: Path, key: str, count: int) -> Ints:
    labels = npz_array(path, key)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and np.array_equal(labels, np.round(labels)))
    marks = labels.ndim == 2 and whole and bool(np.isin(labels, (-1, 0, 1)).all())
    if not whole or len(labels) != count or not (labels.ndim == 1 or marks):
        raise DataError(
            f"array {key!r} of {path} does not label its images",
            cause=f"it is {labels.shape} {labels.dtype} for {count} images",
            fix="save one integer an image, -1 where it is missing, or a row of marks 0 and 1",
        )
    return np.maximum(labels.astype(np.int64), -1)


# --- inside -----------------------------------------------------------------------------------------------------


def _names(values: Sequence[str]) -> Names:
    return np.asarray(values, dtype=np.str_) if len(values) else np.zeros(0, dtype=np.str_)


def _sha256(*parts: bytes | NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.tobytes())
    return digest.hexdigest()


def _counts(part: ClassificationSet) -> dict[str, Any]:
    rows = part.labels == np.arange(len(part.classes))[:, None] if not part.multilabel else part.labels.T == 1
    counts: dict[str, Any] = {"images": len(part), "unlabelled": int((~part.known).sum())}
    if part.groups is not None:
        counts["groups"] = len(set(part.groups.tolist()))
    return counts | {"classes": {c: int(r.sum()) for c, r in zip(part.classes, rows, strict=True)}}


def _survey(
    report: Report,
    sets: Mapping[str, ClassificationSet],
    leaks: Callable[[str, str], bool],
    progress: Progress,
    workers: int | None,
) -> None:
    """Decode every image once. Equal pixels in splits of which one leaks into the other are a fault, else a note."""
    listed: defaultdict[object, list[tuple[ClassificationSet, int]]] = defaultdict(list)
    for part in sets.values():
        for row, place in enumerate(part.places.tolist()):
            listed[part.pixels.path(place) if isinstance(part.pixels, Files) else (part.split, row)].append((part, row))
    places: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    noted: defaultdict[str, list[str]] = defaultdict(list)
    firsts = (rows[0] for rows in listed.values())
    with ThreadPoolExecutor(workers) as pool, progress.track("decode", len(listed)) as meter:
        for done, (rows, found) in enumerate(zip(listed.values(), pool.map(_examine, firsts), strict=True), 1):
            if isinstance(found, DataError):
                report.faults.append(f"{rows[0][0].split}: {found.problem}: {found.cause}")
            else:
                places[found.digest] += [(part.split, str(part.names[row])) for part, row in rows]
                for note in found.notes:
                    noted[note].append(f"{rows[0][0].split}/{rows[0][0].names[rows[0][1]]}")
            meter.update(done)
    for note, names in noted.items():
        report.notes.append(f"{len(names)} of {len(listed)} images {note}, the first is {names[0]}")
    for copies in places.values():
        told = ", ".join(f"{split}/{name}" for split, name in copies)
        splits = sorted({split for split, _ in copies})
        if any(leaks(one, other) for one, other in combinations(splits, 2)):
            report.faults.append(f"the same image is in several splits: {told}")
        elif len(copies) > len(splits):
            report.notes.append(f"the same image is there more than once: {told}")


_CONTRAST = 16  # of 255: pictures of a smaller range show next to nothing


class _Examined(NamedTuple):
    """What tells a picture from others, and what is told of it."""

    digest: str
    notes: tuple[str, ...]


def _examine(item: tuple[ClassificationSet, int]) -> _Examined | DataError:
    part, row = item
    path = part.pixels.path(int(part.places[row])) if isinstance(part.pixels, Files) else None
    try:
        plain = path is not None and isinstance(part.pixels, Files) and part.pixels.read is read_rgb
        image, notes = decode(path) if plain and path is not None else (part[row], ())
    except DataError as error:
        return error
    if int(np.ptp(image)) < _CONTRAST:  # black pictures are equal and not the same
        told = f"have next to no contrast when decoded: a range of less than {_CONTRAST} in 255"
        return _Examined(digest(path) if path is not None else f"{part.split} {row}", (*notes, told))
    grey = (image == image[..., :1]).all()
    few = grey and np.count_nonzero(np.bincount(image[..., 0].ravel(), minlength=256)) <= 4
    return _Examined(
        _sha256(str(image.shape).encode(), image),
        (*notes, "have 4 grey levels or fewer when decoded") if few else notes,
    )


def _shared_groups(sets: Mapping[str, ClassificationSet], leaks: Callable[[str, str], bool]) -> list[str]:
    """What is told of patients in two splits."""
    held = {split: set(part.groups.tolist()) for split, part in sets.items() if part.groups is not None}
    shared = {g for (a, one), (b, other) in combinations(held.items(), 2) if leaks(a, b) for g in one & other}
    return [f"group {group} is in several splits" for group in sorted(shared)]


def refuse_single_class(train: ClassificationSet) -> None:
    """Raise :class:`DataError` where the labelled rows are all of one class."""
    there = np.unique(train.labels[train.known])
    if len(there) < 2:
        raise DataError(
            f"{train.name} {train.split} holds a single class",
            cause=f"its {len(train)} images are all of class {train.classes[int(there[0])]}",
            fix=f"there is nothing to tell apart; check the labels{_folder_below(train)}, or raise --limit"
            + "".join(f"; {note}" for note in train.notes if "no image" in note),
        )


def _folder_below(train: ClassificationSet) -> str:
    """Where class folders lie a level lower than they should, a hint at it."""
    if not isinstance(train.pixels, Files) or len(train.classes) != 1:
        return ""
    folder = train.pixels.root / train.classes[0]
    below = class_folders(folder)
    return f" (are {_first(below)} in {folder} the classes? then give them a level higher)" if len(below) > 1 else ""


def _refuse_unlearnt(train: ClassificationSet, test: ClassificationSet) -> None:
    """A class that is scored on and has no training image can never be right."""
    learnt = set(train.labels.tolist())
    lost = [train.classes[label] for label in sorted(set(test.labels[test.known].tolist()) - learnt)]
    if lost:
        raise DataError(
            f"{train.name} {train.split} has no image of class {_first(lost)}",
            cause=f"{test.split} has, and nothing can be learnt of a class without training images",
            fix=f"add images of it to {train.split}, or take it out of {test.split}"
            + "".join(f"; {note}" for note in train.notes if "no image" in note),
        )


def _refuse_one_sided(train: ClassificationSet, test: ClassificationSet) -> None:
    """Of several labels, one at least must be both present and absent in either split."""
    for part in (train, test):
        if not ((part.labels == 1).any(axis=0) & (part.labels == 0).any(axis=0)).any():
            raise DataError(
                f"no label of {part.name} {part.split} is there and absent",
                cause="each is on all of the images where it is known, or on none",
                fix="mark with 0 what an image does not show, and check the labels",
            )


def _first(names: Sequence[str], count: int = 5) -> str:
    return f"{', '.join(names[:count])}{', ...' if len(names) > count else ''}"


def no_split(path: Path, split: str, splits: Sequence[str] | Mapping[str, Any]) -> DataError:
    """The refusal of a split that is not one of ``splits``."""
    return DataError(
        f"{path} has no split {split!r}", cause=f"it has {', '.join(splits) or 'none'}", fix="choose one of them"
    )


def _broken(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} is missing", cause="there is no such file", fix="restore it, or check the path")
    reason = str(error) or type(error).__name__
    return DataError(f"{path} cannot be read", cause=reason, fix="restore the file from its source")
