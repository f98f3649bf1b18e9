"""What there is to learn from: images as rows, read from the layouts people have on disk, or from a demo world."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from evalsuite import DataError, UsageError
from evalsuite.data.images import SUFFIXES, read_rgb
from pretrain.batch import Sample

__all__ = ["SCHEMES", "Arrays", "Corpus", "Files", "Images", "Joined", "Rows", "demo", "parse", "read_npz"]

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
    """Images in files, decoded when they are asked for. Its fingerprint is of their names, sizes and labels."""

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int] | Labels | None = None) -> None:
        self.root = root
        self.names = np.array(names, dtype=np.bytes_ if all(n.isascii() for n in names) else np.str_)
        self.labels = np.full(len(names), -1) if labels is None else np.asarray(labels, dtype=np.int64)
        listed = (f"{n}\t{(root / n).stat().st_size}\t{c}\n" for n, c in zip(names, self.labels, strict=True))
        self.fingerprint = _digest(*(line.encode() for line in listed))

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


@dataclass(frozen=True)
class Corpus:
    """What was found on disk: images to learn from, and where there are labels, a bank and queries for k-NN."""

    train: Images
    probe: tuple[Images, Images] | None = None


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# Folders ---------------------------------------------------------------------------------------------------


def _folder(path: Path) -> Corpus:
    """``train`` and, for k-NN, ``val`` or ``test`` with a folder a class; or just images, in folders or not."""
    if not (path / "train").is_dir():
        return _held_out(_files(path))
    train = _files(path / "train")
    for name in ("val", "test"):
        if (path / name).is_dir() and train.labelled:
            test = _files(path / name, _classes(path / "train"))
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


def _classes(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(path: Path, classes: Sequence[str] | None = None) -> Files:
    """Every image below ``path``, in name order, labelled by its top folder."""
    found, others = [], 0
    seen: set[str] = set()
    for folder, below, names in os.walk(path, followlinks=True):
        here = os.path.realpath(folder)
        below[:] = sorted(b for b in below if not b.startswith(".")) if here not in seen else []
        if here not in seen:
            images = [n for n in names if n.endswith(SUFFIXES) and not n.startswith(".")]
            found += [os.path.relpath(os.path.join(folder, n), path) for n in images]
            others += len(names) - len(images)
        seen.add(here)
    if not found:
        raise DataError(
            f"{path} holds no image",
            cause=f"of {others} files none ends in {', '.join(s for s in SUFFIXES if s.islower())}"
            if others
            else "it is empty",
            fix="give a folder of images, one file an image; arrays of images go in as npz:PATH",
        )
    found.sort()
    place = {name: i for i, name in enumerate(_classes(path) if classes is None else classes)}
    tops = [name.split(os.sep)[0] if os.sep in name else "" for name in found]
    return Files(path, found, [place.get(top, -1) for top in tops])


def _tiny_imagenet(path: Path) -> Corpus:
    train, classes = _files(_need(path / "train")), _classes(path / "train")
    notes = _need(path / "val" / "val_annotations.txt").read_text().splitlines()
    place = {name: i for i, name in enumerate(classes)}
    rows = sorted(line.split("\t")[:2] for line in notes if line.strip())
    names = [f"images/{name}" for name, _ in rows]
    return Corpus(train, (train, Files(path / "val", names, [place.get(wnid, -1) for _, wnid in rows])))


# Arrays ----------------------------------------------------------------------------------------------------


class _Plain(pickle.Unpickler):
    """The official CIFAR files are pickles; nothing but arrays, bytes and containers is let out of them."""

    def find_class(self, module: str, name: str) -> Any:
        rebuild = np.zeros(0).__reduce__()[0]  # numpy.core.multiarray._reconstruct, wherever this numpy keeps it
        allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): rebuild,
            ("numpy._core.multiarray", "_reconstruct"): rebuild,
            ("_codecs", "encode"): _encode,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return allowed[module, name]


def _encode(text: str, encoding: str) -> bytes:
    """Python 3 pickles bytes for protocol 2 as a call of this."""
    return text.encode(encoding)


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        content = _Plain(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return {k.decode() if isinstance(k, bytes) else str(k): v for k, v in content.items()}
    except Exception as error:  # a broken pickle raises nearly anything
        raise _broken(path, error) from error


def _cifar(path: Path, files: dict[str, tuple[list[str], list[str]]], label: str, skip: int) -> Corpus:
    """The python files (by their folder's ``py``), else the binary ones (``bin``), else a folder of images."""
    for kind, (train, test) in files.items():
        for home in (path, *sorted(path.glob("cifar-10*"))):
            if (home / train[0]).is_file():
                read = _python_files if kind == "py" else _binary_files
                first, last = (read(home, names, label, skip) for names in (train, test))
                return Corpus(first, (first, last))
    if (path / "train").is_dir():
        return _folder(path)
    expected = " or ".join(train[0] for train, _ in files.values())
    raise DataError(
        f"{path} does not hold CIFAR",
        cause=f"there is no {expected} in it, and no folder train",
        fix="give the folder that the official archive unpacks to",
    )


def _python_files(home: Path, names: Sequence[str], label: str, skip: int) -> Arrays:
    parts = [_unpickle(_need(home / name)) for name in names]
    try:
        flat = np.concatenate([np.asarray(p["data"], dtype=np.uint8).reshape(-1, 3, 32, 32) for p in parts])
        return Arrays(_channels_last(flat), [int(c) for p in parts for c in p[label]])
    except (KeyError, ValueError, TypeError) as error:
        raise _broken(home / names[0], error) from error


def _binary_files(home: Path, names: Sequence[str], label: str, skip: int) -> Arrays:
    """Records of ``skip`` label bytes, the last of which counts, and 3072 of pixels."""
    data = np.concatenate([_records(_need(home / name), skip + 3072) for name in names])
    return Arrays(_channels_last(data[:, skip:].reshape(-1, 3, 32, 32)), data[:, skip - 1].astype(np.int64))


def _records(path: Path, length: int) -> Pixels:
    flat = np.fromfile(path, dtype=np.uint8)
    if len(flat) == 0 or len(flat) % length:
        raise _broken(path, ValueError(f"{len(flat)} bytes are no whole number of records of {length}"))
    return flat.reshape(-1, length)


def _channels_last(pixels: Pixels) -> Pixels:
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def _cifar10(path: Path) -> Corpus:
    train = [f"data_batch_{i}" for i in range(1, 6)]
    files = {"py": (train, ["test_batch"]), "bin": ([f"{n}.bin" for n in train], ["test_batch.bin"])}
    return _cifar(path, files, "labels", 1)


def _cifar100(path: Path) -> Corpus:
    return _cifar(path, {"py": (["train"], ["test"]), "bin": (["train.bin"], ["test.bin"])}, "fine_labels", 2)


def _stl10(path: Path) -> Corpus:
    home = next((p for p in (path, path / "stl10_binary") if (p / "train_X.bin").is_file()), None)
    if home is None:
        raise DataError(
            f"{path} does not hold STL-10",
            cause="there is no train_X.bin in it",
            fix="give the folder that the official stl10_binary archive unpacks to",
        )
    train, test = (_stl10_part(home, name, labelled=True) for name in ("train", "test"))
    if not (home / "unlabeled_X.bin").is_file():
        return Corpus(train, (train, test))
    return Corpus(Joined([train, _stl10_part(home, "unlabeled", labelled=False)]), (train, test))


def _stl10_part(home: Path, name: str, *, labelled: bool) -> Arrays:
    """Images are stored column by column; the unlabelled 2.6 GB stay in the file until they are asked for."""
    path = _need(home / f"{name}_X.bin")
    length = 3 * 96 * 96
    if path.stat().st_size == 0 or path.stat().st_size % length:
        raise _broken(path, ValueError(f"its size is no multiple of {length} bytes"))
    pixels = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    labels = np.fromfile(_need(home / f"{name}_y.bin"), dtype=np.uint8).astype(np.int64) - 1 if labelled else None
    fingerprint = _digest(f"stl10 {name} {pixels.shape}".encode(), np.ascontiguousarray(pixels[:64]).data)
    try:
        return Arrays(pixels, labels, fingerprint)
    except ValueError as error:
        raise _broken(path, error) from error


IMAGE_KEYS = ("image", "images", "train_images", "x_train", "data", "arr_0")
LABEL_KEYS = ("label", "labels", "train_labels", "y_train")
TEST_KEYS = (("test_images", "test_labels"), ("x_test", "y_test"))


def read_npz(path: Path) -> Arrays:
    """The training images of an ``.npz`` file: uint8, (N,H,W,3) or grey (N,H,W), under one of the keys in use
    (``image``, ``images``, ``train_images``, ``x_train``, ``data``, ``arr_0``). Pickled objects are not read.

    Raises :class:`evalsuite.DataError` for anything else.
    """
    return _arrays(path, _npz(path), IMAGE_KEYS, LABEL_KEYS)


def _npz_corpus(path: Path) -> Corpus:
    content = _npz(path)
    train = _arrays(path, content, IMAGE_KEYS, LABEL_KEYS)
    for images, labels in TEST_KEYS:
        if images in content and labels in content and train.labelled:
            return Corpus(train, (train, _arrays(path, content, (images,), (labels,))))
    return _held_out(train)


def _npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(_need(path), allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in _KEYS}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise _broken(path, error) from error


_KEYS = {*IMAGE_KEYS, *LABEL_KEYS, *(key for pair in TEST_KEYS for key in pair)}


def _arrays(path: Path, content: dict[str, NDArray[Any]], images: Sequence[str], labels: Sequence[str]) -> Arrays:
    name = next((n for n in images if n in content), None)
    if name is None:
        raise DataError(
            f"{path} holds no images",
            cause=f"none of its arrays is called {', '.join(images)}",
            fix="save them as np.savez(path, image=pixels)",
        )
    pixels = content[name]
    if pixels.ndim == 3:
        pixels = np.repeat(pixels[..., None], 3, axis=3)
    classes = next((content[n] for n in labels if n in content), None)
    try:
        return Arrays(pixels, None if classes is None else classes.astype(np.int64))
    except ValueError as error:
        raise DataError(
            f"array {name!r} of {path} cannot be learned from",
            cause=f"{error}",
            fix="save RGB images of one size as uint8 (N,H,W,3)",
        ) from error


def _need(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path} is missing", cause="the layout asks for it", fix="restore it, or check the path")
    return path


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read",
        cause=f"{error}" or type(error).__name__,
        fix="restore the file from its source",
    )


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
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "stl10": _stl10,
    "tinyimagenet": _tiny_imagenet,
    "npz": _npz_corpus,
}


def parse(text: str) -> Corpus:
    """``scheme:path``, or ``demo``, as images to learn from.

    ``folder:`` and ``imagenet:`` take images in folders (``train/<class>/...`` with ``val`` or ``test`` beside it for
    k-NN), ``cifar10:`` and ``cifar100:`` the official python or binary files or a folder, ``stl10:`` the binary
    files (labelled and unlabelled images together), ``tinyimagenet:`` the official tree, ``npz:`` one file of arrays;
    ``demo`` or ``demo:N`` generates N images. Raises :class:`evalsuite.UsageError` for an unknown scheme and
    :class:`evalsuite.DataError` where the path holds no such data.
    """
    scheme, colon, path = text.partition(":")
    if scheme == "demo" and (not colon or path.isdecimal()):
        return demo(int(path) if path else 512)
    if scheme not in SCHEMES or not path:
        raise UsageError(
            f"--data {text!r} does not name data to learn from",
            cause="it has the form scheme:path",
            fix=f"one of {', '.join(f'{name}:PATH' for name in SCHEMES)}, or demo",
        )
    place = Path(path).expanduser()
    if not place.exists() or (scheme != "npz" and not place.is_dir()):
        raise DataError(
            f"--data {text} was not found",
            cause=f"{place} is no {'file' if scheme == 'npz' else 'folder'}",
            fix="check the path",
        )
    return SCHEMES[scheme](place)
