"""Data sets as people already have them on disk: one reader a layout, and the contract they share.

Nothing is downloaded. A :class:`Source` finds its tree under a data root, reads a split, verifies it, and
writes a small demo world in the same layout.

A run reads data through :meth:`Source.pair`, and :meth:`Source.verify` goes through it too, so that no data pass
verification which a run refuses.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

from evalsuite.errors import DataError, Refusal, UsageError
from evalsuite.hooks import Registry, hookimpl, load

if TYPE_CHECKING:
    from evalsuite.data.learning import Learning
    from evalsuite.progress import Progress

__all__ = ["YOURS", "Report", "Source", "as_fault", "is_generated", "parse", "source", "split_role", "split_roles"]

Data = TypeVar("Data", covariant=True)

YOURS = "that of your data"  # the licence of a layout without a data set of its own

# What people call the split to learn from, to choose by and to score on.
_ROLES = {
    "train": ("train", "training", "trn", "learn"),
    "val": ("val", "valid", "validation", "validate", "vali", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst", "holdout"),
}
_ALIASES = {"tinyimagenet": "tiny-imagenet"}
_FILLERS = {"seg", "cls", "data", "dataset", "image", "images", "img", "imgs", "folder", "split", "set"}


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.dataset("ade20k", "evalsuite.data.ade20k:Ade20k", "ADE20K, the 150 classes of the scene parsing benchmark")
    registry.dataset("ade20k-full", "evalsuite.data.ade20k:Ade20kFull", "the full ADE20K of 2021, by the same classes")
    registry.dataset("camvid", "evalsuite.data.camvid:CamVid", "CamVid, 11 classes: SegNet's packing or Cambridge's")
    registry.dataset("chexpert", "evalsuite.data.chexpert:Chexpert", "CheXpert, the official tree")
    registry.dataset(
        "chexpert-retrieval", "evalsuite.data.chexpert:Chexpert8x200", "the CheXpert 8x200 retrieval lists"
    )
    registry.dataset("cifar10", "evalsuite.data.cifar:Cifar10", "CIFAR-10: python or binary files, or class folders")
    registry.dataset("cifar100", "evalsuite.data.cifar:Cifar100", "CIFAR-100: python or binary files, or class folders")
    registry.dataset("cityscapes", "evalsuite.data.cityscapes:Cityscapes", "Cityscapes, the fine masks of 19 classes")
    registry.dataset("coco", "evalsuite.data.coco:Coco", "COCO 2017 detection, or any data in COCO JSON")
    registry.dataset("covidx", "evalsuite.data.covidx:Covidx", "COVIDx: lists of any version and their images")
    registry.dataset("csv", "evalsuite.data.classification:Csv", "any images listed in a CSV file with their labels")
    registry.dataset(
        "demo", "evalsuite.data.generated:Demo", "generated images of eight classes: demo, or demo:N of them"
    )
    registry.dataset("folder", "evalsuite.data.classification:Folder", "any images in a folder a class")
    registry.dataset("imagenet", "evalsuite.data.imagenet:ImageNet", "ImageNet-1k in class folders")
    registry.dataset("medmnist", "evalsuite.data.medical:MedMnist", "MedMNIST, one .npz file a data set")
    registry.dataset("mura", "evalsuite.data.mura:Mura", "MURA, the official tree")
    registry.dataset("npz", "evalsuite.data.classification:Npz", "any images and labels in one .npz file")
    registry.dataset("pairs", "evalsuite.data.pairs:Pairs", "any images and masks of the same names")
    registry.dataset("rsna", "evalsuite.data.rsna:Rsna", "RSNA pneumonia: DICOM files and boxes")
    registry.dataset("places", "evalsuite.data.places:Places205", "Places205: the official lists, or class folders")
    registry.dataset("places365", "evalsuite.data.places:Places365", "Places365: the official lists, or class folders")
    registry.dataset("stl10", "evalsuite.data.cifar:Stl10", "STL-10: binary files")
    registry.dataset("tiny-imagenet", "evalsuite.data.imagenet:TinyImageNet", "Tiny ImageNet, the official tree")
    registry.dataset("voc", "evalsuite.data.voc:Voc", "PASCAL VOC 2007 and 2012, or any data in VOC XML")
    registry.dataset(
        "voc07-cls", "evalsuite.data.voc_classification:VocClassification", "PASCAL VOC 2007, twenty labels"
    )
    registry.dataset("voc-seg", "evalsuite.data.voc_segmentation:VocSegmentation", "PASCAL VOC 2012 masks, SBD's too")
    registry.dataset(
        "worlds", "evalsuite.data.frames:Worlds", "frames of a simulated world, to pretrain on: worlds:TASK"
    )


@dataclass
class Report:
    """What verifying a data set found.

    ``faults`` make results wrong or impossible (an image that does not decode, a split that leaks into
    another). ``notes`` are survived by the reader (a degenerate box is left out). ``counts`` hold numbers per
    split: ``{split: {"images": n, "boxes": n, ..., "classes": {name: n}}}``.
    """

    source: str
    path: Path
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults

    @contextmanager
    def examining(self) -> Iterator[None]:
        """What is refused inside is a fault, in the words of the refusal."""
        try:
            yield
        except DataError as error:
            if as_fault(error) not in self.faults:
                self.faults.append(as_fault(error))


def as_fault(error: DataError) -> str:
    """A refusal in the one line of a fault."""
    return f"{error.problem}: {error.cause} (fix: {error.fix})"


def split_role(name: str) -> str | None:
    """``train``, ``val`` or ``test`` for what people call such a split, in any letter case (``Training``, ``valid``,
    ``test_set``, ``seg_train``); None for any other name."""
    return split_roles([name]).get(name)


def split_roles(names: Iterable[str]) -> dict[str, str]:
    """{name: role} of those among the names of one folder, or column, that are splits, as :func:`split_role`.

    What such names have in common is no matter where both a training split and another one have it: ``birds_train``
    and ``birds_test``.
    """
    alike: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        words = [word for word in re.findall(r"[^\W\d_]+|\d+", name.lower()) if word not in _FILLERS]
        roles = {word: _role(word) for word in (*words, "".join(words)) if _role(word)}
        if len(roles) == 1:
            ((word, role),) = roles.items()
            alike[" ".join(w for w in words if w != word) if word in words else ""][name] = str(role)
    plain = "train" in alike[""].values()
    found = [named for rest, named in alike.items() if not rest or (not plain and {"train"} < set(named.values()))]
    return {name: role for named in found for name, role in named.items()}


def _role(word: str) -> str | None:
    return next((role for role, words in _ROLES.items() if word in words or word.removesuffix("set") in words), None)


class MissingData(DataError):
    """A folder does not hold a layout at all; other refusals say what is wrong in one that does."""


class Source(ABC, Generic[Data]):
    """A layout on disk, and the data set that made it known. Instances hold nothing that was read.

    ``tree`` lists what must be there below the data root, one path a line. ``file``: anybody's data in this layout
    are one file, not a folder. ``serves`` names the generic tasks that take anybody's data in this layout; its tree is
    ``own_tree``, below the path that ``--data`` gives, where that differs from the data set's own. ``generated``: what
    ``--data`` gives behind the name of a source that needs no path; empty for what lies on disk.
    """

    name: ClassVar[str]
    tree: ClassVar[str]
    homepage: ClassVar[str]
    licence: ClassVar[str]
    citation: ClassVar[str]
    file: ClassVar[bool] = False
    serves: ClassVar[tuple[str, ...]] = ()
    own_tree: ClassVar[str] = ""
    generated: ClassVar[str] = ""

    @property
    def layout_only(self) -> bool:
        """Whether there is no data set of that name, and all data in the layout are somebody's own."""
        return self.licence == YOURS

    @property
    def key(self) -> Hashable:
        """Equal for sources that read the same of the same files."""
        return type(self)

    def configured(self, options: str) -> Source[Data]:
        """The same layout, read as ``?name=value&...`` behind a path of ``--data`` says; of a generated one, as all
        that stands behind its name.

        Raises :class:`UsageError` for options that the layout has not.
        """
        raise UsageError(
            f"the layout {self.name} takes no options",
            cause=f"it was given ?{options}",
            fix="leave out '?' and the rest",
        )

    def generic(self) -> Source[Data]:
        """The same layout with anybody's data in it: classes and splits are taken from the data."""
        return self

    @classmethod
    def given(cls, data: str | None, registry: Registry, *, task: str, lacks: str, fix: str) -> tuple[Self, Path]:
        """:func:`parse` of what ``--data`` gives to a generic task that takes this kind of layout.

        Raises :class:`UsageError` where it gives nothing, or another kind, which ``lacks`` what the task needs.
        """
        if data is None:
            raise UsageError(f"{task} needs data", cause="it is a task for data of your own", fix=fix)
        layout, path = parse(data, registry)
        if not isinstance(layout, cls):
            use = "a layout of another task" if layout.serves or not layout.generated else "for evalsuite pretrain"
            tasks = f"; or --task {' or '.join(layout.serves)}" if layout.serves else ""
            raise UsageError(f"--data {data} {lacks}", cause=f"{layout.name} is {use}", fix=f"{fix}{tasks}")
        return layout, path

    @abstractmethod
    def locate(self, root: Path | None) -> Path:
        """The data set's own folder, below ``root`` or ``root`` itself.

        Raises :class:`DataError` with the expected tree where it is not there.
        """

    def locate_images(self, root: Path) -> Path:
        """Where images to learn from are: as :meth:`locate`, but that a layout may take what cannot be scored on."""
        return self.locate(root)

    @abstractmethod
    def splits(self, path: Path) -> tuple[str, ...]:
        """The splits found in ``path``."""

    @abstractmethod
    def roles(self, path: Path) -> Mapping[str, str]:
        """Which split to learn from and which to score on: ``train``, ``val``, and ``test`` if there is one; and
        ``unlabelled``, further images for ``evalsuite pretrain``.

        Raises :class:`DataError` where that cannot be told.
        """

    @abstractmethod
    def load(self, path: Path, split: str) -> Data:
        """Read the annotations of a split, without decoding an image.

        Raises :class:`DataError` naming the file at fault.
        """

    def learning(self, path: Path) -> Learning:
        """The images to learn from without annotations, and those held out, by the roles of the splits
        (:func:`evalsuite.data.learning.by_roles`). A layout may offer more here than it can be scored on by.

        Raises :class:`DataError` where there is nothing to learn from, :class:`UsageError` for data without images.
        """
        from evalsuite.data.learning import by_roles

        return by_roles(self, path)

    def pair(
        self, path: Path, train: str = "train", test: str = "test|val", loaded: Mapping[str, Data] | None = None
    ) -> tuple[Data, Data]:
        """What to learn from and what to score on, by role (``a|b``: the first that there is) or by the split's name.

        Splits that are ``loaded`` already are not read again. Raises :class:`DataError` where there is no such split,
        and for whatever else makes a run on the two impossible (:meth:`check`).
        """
        names = [self._named(path, wanted) for wanted in (train, test)]
        first, second = ((loaded or {}).get(name) or self.load(path, name) for name in names)
        self.check(first, second)
        return first, second

    def check(self, train: Any, test: Any) -> None:
        """Raise :class:`DataError` where nothing can be learnt from ``train``, or ``test`` cannot be scored by it."""
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise DataError(
                f"the splits to learn from and to score on, of {train.name}, do not have the same classes",
                cause=f"only in one of them: {', '.join(odd[:5])}" if odd else "they are in another order",
                fix="name the same classes in both",
            )

    def rehearse(self, path: Path, report: Report, loaded: Mapping[str, Any]) -> None:
        """Add to the faults what a run on these data would refuse, in the same words and with the same fix."""
        with report.examining():
            if "train" in self.roles(path):
                self.pair(path, loaded=loaded)

    def _named(self, path: Path, wanted: str) -> str:
        """The split of a role; a name that is no role is a split's own."""
        choices = wanted.split("|")
        try:
            roles = self.roles(path)
        except DataError:
            if wanted not in self.splits(path) and not _ROLES.keys().isdisjoint(choices):
                raise
            return wanted
        return next((roles[name] for name in choices if name in roles), wanted)

    @abstractmethod
    def verify(self, path: Path, progress: Progress | None = None, workers: int | None = None) -> Report:
        """Read everything, decode every image, and tell what is wrong. Raises nothing for broken data."""

    @abstractmethod
    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        """Write a demo world of ``images`` training images below ``root``; returns its folder, as ``locate``.

        The same world that is there already is left alone. Raises :class:`DataError` rather than replace
        anything that is no demo world.
        """

    def missing(self, root: Path | None) -> MissingData:
        """The refusal of a data root that does not hold this data set."""
        own = [f"data of your own: --task {task} --data {self.name}:PATH" for task in self.serves[:1]]
        if self.layout_only:
            return MissingData(
                f"{root} is not in the layout {self.name}",
                cause=f"{root} does not hold its tree" if root and root.is_dir() else f"{root} is not a folder",
                fix="; ".join([f"give the folder that holds {', '.join(self.tree.split())}", *own]),
            )
        if root is None:
            cause = "no data root was given"
        elif not root.is_dir():
            cause = f"{root} is not a folder"
        else:
            cause = f"{root} does not hold its layout"
        paths = ", ".join(self.tree.split())
        return MissingData(
            f"data set {self.name!r} was not found",
            cause=cause,
            fix="; ".join([f"point --data-root or EVALSUITE_DATA to a folder that holds {paths}; or try --demo", *own]),
        )


def source(registry: Registry, name: str) -> Source[Any]:
    """The data source of that name. Raises :class:`UsageError` for an unknown one."""
    if name in _ALIASES and name not in registry.names("dataset"):
        name = _ALIASES[name]
    return cast("Source[Any]", registry.get("dataset", name)())


def parse(text: str, registry: Registry | None = None, *, learning: bool = False) -> tuple[Source[Any], Path]:
    """``scheme:path`` as a source for anybody's data and its folder, for example ``voc:~/cells``; ``demo`` and
    ``worlds:TASK`` are generated, and need no path. ``learning``: images are enough (:meth:`Source.locate_images`).
    Without a ``registry`` it is that of all plugins.

    Raises :class:`UsageError` for an unknown scheme, :class:`DataError` where the path holds no such layout.
    """
    registry = load().registry if registry is None else registry
    scheme, colon, path = text.partition(":")
    if not ((is_generated(text, registry) and not colon) or (scheme and colon and path)):
        raise UsageError(
            f"--data {text!r} does not name a layout and a path",
            cause="it has the form scheme:path",
            fix=f"one of {', '.join(f'{name}:{_behind(registry, name)}' for name in registry.names('dataset'))}",
        )
    found = source(registry, scheme).generic()
    if found.generated:
        return found.configured(path), Path(text)
    tree = found.own_tree or found.tree
    place = Path(path).expanduser()
    if "?" in path and not place.exists():
        path, _, options = path.rpartition("?")
        found, place = found.configured(options), Path(path).expanduser()
    if not (place.is_file() if found.file else place.is_dir()):
        raise DataError(
            f"--data {text} was not found",
            cause=f"{place} is not a {'file' if found.file else 'folder'}",
            fix="give the file itself" if found.file else f"give the folder that holds {', '.join(tree.split())}",
        )
    try:
        return found, found.locate_images(place) if learning else found.locate(place)
    except DataError as error:
        raise _elsewhere(error, found, scheme, place) from error


def is_generated(text: str, registry: Registry) -> bool:
    """Whether ``--data`` names what is generated: results on it are marked, and never ranked."""
    scheme = text.partition(":")[0]
    return scheme in registry.names("dataset") and bool(source(registry, scheme).generated)


def _behind(registry: Registry, name: str) -> str:
    """What ``--data`` gives behind the name of a layout."""
    try:
        return source(registry, name).generated or "PATH"
    except Refusal:  # a plugin's, which is told of where it is asked for
        return "PATH"


def _elsewhere(error: DataError, layout: Source[Any], scheme: str, path: Path) -> DataError:
    """The refusal of a folder, which says where the layout is if it is a level or two lower, or what became of it."""
    if not path.is_dir():
        return error
    windows = next((each.name for each in path.iterdir() if "\\" in each.name), None)
    if windows is not None:
        return DataError(
            error.problem,
            cause=f"a zip made on Windows was unpacked without folders: a file is named {windows!r}",
            fix="unpack it with 7z x or bsdtar -xf, which make folders of such names",
        )
    outer = _subfolders(path)[:_LOOKED_AT]
    below = [*outer, *(place for folder in outer for place in _subfolders(folder))][:_LOOKED_AT]
    fitting = [place for place in below if _holds(layout, place)]
    fitting = [place for place in fitting if not any(other in place.parents for other in fitting)]
    if not fitting:
        if not isinstance(error, MissingData):
            return error
        tree = (layout.own_tree or layout.tree).split()
        return DataError(
            f"{path} is not in the layout {scheme}",
            cause=f"{path} does not hold its tree",
            fix=f"give the folder that holds {', '.join(tree)}",
        )
    return DataError(
        error.problem,
        cause=f"the layout is in {', '.join(str(place.relative_to(path)) for place in fitting[:5])}",
        fix=f"--data {scheme}:{fitting[0]}" + ("; or another of them" if len(fitting) > 1 else ""),
    )


_LOOKED_AT = 100  # folders in which a layout is looked for


def _subfolders(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:  # which knows folders without asking for each of a million files
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except OSError:
        return []


def _holds(layout: Source[Any], path: Path) -> bool:
    try:
        layout.locate(path)
    except DataError:
        return False
    return True
