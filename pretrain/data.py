"""What there is to learn from: images as rows, read from the layouts people have on disk, or from a demo world."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evalsuite import DataError, ResourceError, UsageError
from evalsuite.data import classification
from evalsuite.data.cifar import Cifar10, Cifar100, Stl10
from evalsuite.data.classification import (
    ClassificationSet,
    ClassificationSource,
    class_folders,
    find_images,
    npz_array,
    npz_headers,
    read_files,
    split_folders,
)
from evalsuite.data.imagenet import TinyImageNet
from evalsuite.data.images import read_rgb
from pretrain.batch import Look, Sample

__all__ = [
    "SCHEMES",
    "Arrays",
    "Corpus",
    "Files",
    "Images",
    "Joined",
    "Rows",
    "Worlds",
    "demo",
    "parse",
    "read_npz",
    "shown",
    "typical_side",
]

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


class Images(Dataset[Sample]):
    """Rows of images. ``data[i]`` is ``{"image": (3,H,W) uint8}``; a modifier may add to it.

    ``labels`` (N,) are for monitoring alone, -1 where there is none; ``fingerprint`` is a sha256 of what the rows
    are. Reading a row raises :class:`evalsuite.DataError` where its image does not decode.
    """

    labels: Labels
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> Sample: ...

    @property
    def labelled(self) -> bool:
        """Whether every row has a label."""
        return bool(len(self.labels)) and bool((self.labels >= 0).all())


class Arrays(Images):
    """Images in memory (or in a mapped file): ``pixels`` (N,H,W,3) uint8, RGB."""

    def __init__(self, pixels: Pixels, labels: Sequence[int] | Labels | None = None, fingerprint: str = "") -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"images are (N,H,W,3) uint8, not {pixels.shape} {pixels.dtype}")
        self.pixels = pixels
        self.labels = np.full(len(pixels), -1) if labels is None else np.asarray(labels, dtype=np.int64).reshape(-1)
        if len(self.labels) != len(pixels):
            raise ValueError(f"{len(pixels)} images come with {len(self.labels)} labels")
        self.fingerprint = fingerprint or _digest(str(pixels.shape).encode(), np.ascontiguousarray(pixels).data)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> Sample:
        return {"image": torch.from_numpy(np.array(self.pixels[row].transpose(2, 0, 1), order="C"))}


class Files(Images):
    """Images in files, decoded when they are asked for. Its fingerprint is of their names, what they hold, and labels.

    Raises :class:`evalsuite.DataError` for one that is not there.
    """

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int] | Labels | None = None) -> None:
        self.root = root
        self.names = np.array(names, dtype=np.bytes_ if all(n.isascii() for n in names) else np.str_)
        self.labels = np.full(len(names), -1) if labels is None else np.asarray(labels, dtype=np.int64)
        files = read_files(root, names, complete=True)
        self.fingerprint = _digest(files.digest(np.arange(len(files))).encode(), self.labels.tobytes())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> Sample:
        name = self.names[row]
        path = self.root / (name.decode() if isinstance(name, bytes) else str(name))
        return {"image": torch.from_numpy(read_rgb(path)).permute(2, 0, 1).contiguous()}


class Joined(Images):
    """Several sets as one, in order; the same set may come more than once, and its copies are rows of their own."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(p) for p in self.parts])
        self.labels = np.concatenate([p.labels for p in self.parts])
        self.fingerprint = _digest(*(p.fingerprint.encode() for p in self.parts))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> Sample:
        part = int(np.searchsorted(self.ends, row, side="right"))
        return self.parts[part][row - (int(self.ends[part - 1]) if part else 0)]


class Rows(Images):
    """Some rows of a set."""

    def __init__(self, data: Images, rows: Sequence[int] | Labels) -> None:
        self.data, self.rows = data, np.asarray(rows, dtype=np.int64)
        self.labels = data.labels[self.rows]
        self.fingerprint = _digest(data.fingerprint.encode(), self.rows.tobytes())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        return self.data[int(self.rows[row])]


class Worlds(Images):
    """``count`` first frames of a simulated world (:mod:`evalsuite.worlds`), each drawn when it is asked for.

    A row depends on ``seed``, its place and the rules alone. Besides ``image`` (3,64,64) it has ``segments`` (64,64)
    int64, which item is seen at each pixel, -1 where it is the ground, and ``state`` (rows,N) float32, the items as an
    agent is told them. Raises :class:`evalsuite.UsageError` for a world or a variant that does not exist.
    """

    SIZE = 64

    def __init__(self, task: str, variant: str = "default", count: int = 1_000_000, seed: int = 0) -> None:
        try:
            from evalsuite.worlds import TASKS, rules, world  # gymnasium, which other data do not need
        except ModuleNotFoundError as error:
            raise ResourceError(
                f"--data worlds:{task} needs {error.name}, which is not installed",
                cause="it comes with the extra 'rl'",
                fix="pip install 'evalsuite[rl]'",
            ) from error

        if task not in TASKS:
            raise UsageError(
                f"there is no world {task!r}",
                cause=f"there are {', '.join(TASKS)}",
                fix="--data worlds:random-objects, or another of these",
            )
        self.seed, self.labels = seed, np.full(count, -1)
        self.world = world(rules(task, variant), self.SIZE)
        self.fingerprint = _digest(f"{asdict(self.world.rules)} {self.SIZE} {count} {seed}".encode())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Sample:
        image = np.empty((self.SIZE, self.SIZE, 3), dtype=np.uint8)
        state = np.empty(self.world.rules.bounds[0].shape, dtype=np.float32)
        self.world.reset(np.random.default_rng([self.seed, row]))
        self.world.image(image)
        self.world.state(state)
        return {
            "image": torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            "segments": torch.from_numpy(self.world.segments()),
            "state": torch.from_numpy(state),
        }


def typical_side(data: Images, look_at: int = 32) -> int | None:
    """The median of the shorter sides, in pixels, of images spread over the rows; None where none can be read."""
    sides = []
    for row in np.unique(np.linspace(0, len(data) - 1, min(look_at, len(data))).astype(int)):
        try:
            sides.append(min(data[int(row)]["image"].shape[1:]))
        except DataError:  # which training passes over, too
            continue
    return int(np.median(sides)) if sides else None


class _Seen(Dataset[Tensor]):
    def __init__(self, data: Images, look: Look) -> None:
        self.data, self.look = data, look

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Tensor:
        return self.look(self.data[row], torch.Generator().manual_seed(row)).data


def shown(data: Images, look: Look, device: torch.device, workers: int = 0) -> Iterator[Tensor]:
    """All images in order, each looked at once, as batches (B,3,H,W) in [0,1] on a device."""
    for pixels in DataLoader(_Seen(data, look), batch_size=256, num_workers=workers):
        yield pixels.to(device).float() / 255


@dataclass(frozen=True)
class Corpus:
    """What was found: images to learn from, and where some are held out, a bank and queries to ask about them. k-NN
    is asked where both are labelled; the methods' own measures always."""

    train: Images
    probe: tuple[Images, Images] | None = None


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# Folders ---------------------------------------------------------------------------------------------------


def _folder(path: Path) -> Corpus:
    """``train`` and, for k-NN, ``val`` or ``test`` with a folder a class, by whatever name people give these; or just
    images, in folders or not."""
    folders = split_folders(path, refuse=False)
    if "train" not in folders:
        home = path / "train" if (path / "train").is_dir() else path
        return _held_out(_labelled_by_folder(home, class_folders(home)))
    classes = class_folders(folders["train"])
    train = _labelled_by_folder(folders["train"], classes)
    for name in ("val", "test"):
        if name in folders and train.labelled:
            test = _labelled_by_folder(folders[name], classes)
            if test.labelled:
                return Corpus(train, (train, test))
    return _held_out(train)


def _held_out(data: Images) -> Corpus:
    """Where labelled images have no test split, every fifth row asks the others: its pixels were learned from, its
    label was not."""
    if not data.labelled:
        return Corpus(data)
    rows = np.arange(len(data))
    return Corpus(data, (Rows(data, rows[rows % 5 > 0]), Rows(data, rows[rows % 5 == 0])))


def _labelled_by_folder(path: Path, classes: Sequence[str]) -> Files:
    """Every image below ``path``, labelled by its top folder; -1 where that is none of the classes."""
    found, _ = find_images(path)
    place = {name: i for i, name in enumerate(classes)}
    tops = [name.split(os.sep)[0] if os.sep in name else "" for name in found.names.tolist()]
    return _by_name(found, np.array([place.get(top, -1) for top in tops], dtype=np.int64))


def _by_name(files: classification.Files, labels: Labels) -> Files:
    """The rows are in the order of their whole names, whatever way they were found."""
    order = np.argsort(files.names)
    return Files(files.root, files.names[order].tolist(), labels[order])


# The known data sets ---------------------------------------------------------------------------------------


def _cifar(source: Cifar10, file: str) -> Callable[[Path], Corpus]:
    def read(path: Path) -> Corpus:
        home = _locate(source, path, "CIFAR", f"{file} or {file}.bin in it, and no folder train")
        return _splits(source, home, "test") if source.kind(home) else _folder(home)

    return read


def _stl10(path: Path) -> Corpus:
    source = Stl10()
    home = _locate(source, path, "STL-10", "train_X.bin in it")
    found = _splits(source, home, "test")
    if "unlabeled" not in source.splits(home):
        return found
    return Corpus(Joined([found.train, _images(source.load(home, "unlabeled"))]), found.probe)


def _tiny_imagenet(path: Path) -> Corpus:
    home = _locate(TinyImageNet(), path, "Tiny ImageNet", "folder train, or no folder val, in it")
    return _splits(TinyImageNet(), home, "val")


def _locate(source: ClassificationSource, path: Path, name: str, lacking: str) -> Path:
    try:
        return source.locate(path)
    except DataError as error:
        raise DataError(
            f"{path} does not hold {name}",
            cause=f"there is no {lacking}",
            fix="give the folder that the official archive unpacks to",
        ) from error


def _splits(source: ClassificationSource, home: Path, test: str) -> Corpus:
    train = _images(source.load(home, "train"))
    return Corpus(train, (train, _images(source.load(home, test))))


def _images(found: ClassificationSet) -> Images:
    """A whole split. Its pixels are read now, that the processes which load batches share them; a mapped file stays
    one."""
    pixels = found.pixels
    if isinstance(pixels, classification.Files):
        return _by_name(pixels, found.labels)
    assert isinstance(pixels, classification.Arrays)
    return Arrays(pixels.pixels, found.labels, found.fingerprint)


# Arrays ----------------------------------------------------------------------------------------------------

IMAGE_KEYS = ("image", "images", "train_images", "x_train", "data", "arr_0")
LABEL_KEYS = ("label", "labels", "train_labels", "y_train")
TEST_KEYS = (("test_images", "test_labels"), ("x_test", "y_test"))


def read_npz(path: Path) -> Arrays:
    """The training images of an ``.npz`` file: uint8, (N,H,W,3) or grey (N,H,W), under one of the keys in use
    (``image``, ``images``, ``train_images``, ``x_train``, ``data``, ``arr_0``). Pickled objects are not read.

    Raises :class:`evalsuite.DataError` for anything else.
    """
    return _arrays(path, IMAGE_KEYS, LABEL_KEYS)


def _npz(path: Path) -> Corpus:
    train, names = read_npz(path), npz_headers(path)
    for images, labels in TEST_KEYS:
        if images in names and labels in names and train.labelled:
            return Corpus(train, (train, _arrays(path, (images,), (labels,))))
    return _held_out(train)


def _arrays(path: Path, images: Sequence[str], labels: Sequence[str]) -> Arrays:
    names = npz_headers(path)
    name = next((n for n in images if n in names), None)
    if name is None:
        raise DataError(
            f"{path} holds no images",
            cause=f"none of its arrays is called {', '.join(images)}",
            fix="save them as np.savez(path, image=pixels)",
        )
    pixels = npz_array(path, name)
    if pixels.ndim == 3:
        pixels = np.repeat(pixels[..., None], 3, axis=3)
    classes = next((npz_array(path, n) for n in labels if n in names), None)
    try:
        return Arrays(pixels, None if classes is None else classes.astype(np.int64))
    except ValueError as error:
        raise DataError(
            f"array {name!r} of {path} cannot be learned from",
            cause=f"{error}",
            fix="save RGB images of one size as uint8 (N,H,W,3)",
        ) from error


# The demo world --------------------------------------------------------------------------------------------


def demo(images: int = 512, *, size: int = 32, seed: int = 0) -> Corpus:
    """A generated world: one of four shapes, filled with one of two textures, on a background of another colour.

    The eight classes are what stays when colour, place, size and texture phase change. Half as many images again
    are there to ask k-NN about.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(images + images // 2) % 8
    pixels = np.stack([_picture(rng, int(label), size) for label in labels])
    train = Arrays(pixels[:images], labels[:images])
    return Corpus(train, (train, Arrays(pixels[images:], labels[images:])))


def _picture(rng: np.random.Generator, label: int, size: int) -> Pixels:
    y, x = np.mgrid[0:size, 0:size] / size
    cy, cx = rng.uniform(0.35, 0.65, 2)
    radius = rng.uniform(0.2, 0.35)
    dy, dx = (y - cy) / radius, (x - cx) / radius
    far = np.hypot(dy, dx)
    inside = (
        far < 1,
        np.maximum(abs(dy), abs(dx)) < 0.85,
        (np.minimum(abs(dy), abs(dx)) < 0.35) & (np.maximum(abs(dy), abs(dx)) < 1),
        (far < 1) & (far > 0.55),
    )[label % 4]
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    wave = np.sin(2 * np.pi * (6 * along + rng.uniform()))
    texture = wave if label < 4 else np.sign(wave * np.sin(2 * np.pi * (6 * across + rng.uniform())))
    fore, back = rng.uniform(0, 1, 3), rng.uniform(0, 1, 3)
    image = np.where(inside[..., None], fore * (0.7 + 0.3 * texture[..., None]), back)
    noisy = image + rng.normal(0, 0.03, image.shape)
    return np.asarray(np.clip(noisy * 255, 0, 255).round(), dtype=np.uint8)


# Names -----------------------------------------------------------------------------------------------------

SCHEMES: dict[str, Callable[[Path], Corpus]] = {
    "folder": _folder,
    "imagenet": _folder,
    "cifar10": _cifar(Cifar10(), "data_batch_1"),
    "cifar100": _cifar(Cifar100(), "train"),
    "stl10": _stl10,
    "tinyimagenet": _tiny_imagenet,
    "npz": _npz,
}


def _worlds(text: str) -> Corpus:
    """``TASK`` or ``TASK/VARIANT``, and perhaps ``:N``: that many frames, and a hundredth as many, but 320 at least, to
    measure by. A million by default, as Yoon et al. (ICML 2023) have them."""
    name, _, count = text.partition(":")
    task, _, variant = name.partition("/")
    if count and not (count.isdecimal() and int(count)):
        raise UsageError(
            f"--data worlds:{text!r} does not name data to learn from",
            cause=f"{count!r} is no number of images",
            fix="--data worlds:random-objects:100000",
        )
    size = int(count) if count else 1_000_000
    train, held_out = (
        Worlds(task, variant or "default", n, seed) for n, seed in ((size, 0), (max(size // 100, 320), 1))
    )
    return Corpus(train, (train, held_out))


def parse(text: str) -> Corpus:
    """``scheme:path``, or ``demo``, as images to learn from.

    ``folder:`` and ``imagenet:`` take images in folders (``train/<class>/...`` with ``val`` or ``test`` beside it for
    k-NN), ``cifar10:`` and ``cifar100:`` the official python or binary files or a folder, ``stl10:`` the binary
    files (labelled and unlabelled images together), ``tinyimagenet:`` the official tree, ``npz:`` one file of arrays;
    ``worlds:random-objects`` draws frames of a simulated world, of any variant (``worlds:object-goal/ocr-color1``) and
    as many as you like (``worlds:random-objects:100000``); ``demo`` or ``demo:N`` generates N images.

    Raises :class:`evalsuite.UsageError` for an unknown scheme or world and :class:`evalsuite.DataError` where the path
    holds no such data.
    """
    scheme, colon, path = text.partition(":")
    if scheme == "demo" and (not colon or path.isdecimal()):
        return demo(int(path) if path else 512)
    if scheme == "worlds" and path:
        return _worlds(path)
    if scheme not in SCHEMES or not path:
        raise UsageError(
            f"--data {text!r} does not name data to learn from",
            cause="it has the form scheme:path",
            fix=f"one of {', '.join(f'{name}:PATH' for name in SCHEMES)}, worlds:random-objects, or demo",
        )
    place = Path(path).expanduser()
    if not place.exists() or (scheme != "npz" and not place.is_dir()):
        raise DataError(
            f"--data {text} was not found",
            cause=f"{place} is no {'file' if scheme == 'npz' else 'folder'}",
            fix="check the path",
        )
    return SCHEMES[scheme](place)
