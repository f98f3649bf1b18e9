"""CIFAR-10, CIFAR-100 and STL-10: small images in the official python and binary files."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from evalsuite.data.classification import (
    Arrays,
    ClassificationSet,
    ClassificationSource,
    Folder,
    no_split,
)
from evalsuite.data.demo import labelled, once, write_classes
from evalsuite.data.digests import State, joined, of_paths, state
from evalsuite.data.learning import Learning
from evalsuite.errors import DataError
from evalsuite.files import read_regular

__all__ = ["Cifar10", "Cifar100", "Stl10", "unpickle"]

Bytes = NDArray[np.uint8]


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


def unpickle(path: Path) -> dict[str, Any]:
    """A dictionary of arrays, bytes and numbers. Raises :class:`DataError` for anything else in the file."""
    try:
        content = _Plain(io.BytesIO(read_regular(path)), encoding="bytes").load()
        return {k.decode() if isinstance(k, bytes) else str(k): v for k, v in content.items()}
    except Exception as error:  # a broken pickle raises nearly anything
        raise _broken(path, error) from error


class Cifar10(ClassificationSource):
    """CIFAR-10 in the official python or binary files, or in a folder a class below ``train`` and ``test``."""

    name = "cifar10"
    tree = "cifar-10-batches-py/data_batch_1"
    homepage = "https://www.cs.toronto.edu/~kriz/cifar.html"
    licence = "none stated; free for research with citation"
    citation = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"
    _homes: ClassVar[tuple[str, ...]] = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar10", "cifar-10", ".")
    _parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",),
    }  # fmt: skip
    _key: ClassVar[str] = "labels"
    _names: ClassVar[tuple[str, str]] = ("batches.meta", "label_names")
    _texts: ClassVar[str] = "batches.meta.txt"
    _skip: ClassVar[int] = 1  # label bytes of a record in the binary files; the last one counts

    def locate(self, root: Path | None) -> Path:
        if root is not None:
            for below in (Path(), Path(self.name)):
                for home in self._homes:
                    path = root / below / home
                    if path.is_dir() and (self.kind(path) or (path / "train").is_dir()):
                        return path
        raise self.missing(root)

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        return write_classes(root / self.name, seed, images)

    def splits(self, path: Path) -> tuple[str, ...]:
        return ("train", "test") if self.kind(path) else Folder().splits(path)

    def learning(self, path: Path) -> Learning:
        return super().learning(path) if self.kind(path) else Folder().learning(path)

    def load(self, path: Path, split: str) -> ClassificationSet:
        kind = self.kind(path)
        if not kind:
            return Folder().load(path, split)
        if split not in self._parts:
            raise no_split(path, split, self._parts)
        files = [path / f"{part}{'.bin' if kind == 'bin' else ''}" for part in self._parts[split]]
        for file in files:
            _need(file)
        labels = np.concatenate([self._labels(file, kind) for file in files])
        pixels = Arrays(len(labels), partial(self._pixels, files, kind), _contents(files))
        ids = np.array([f"{split}/{i:05d}" for i in range(len(labels))], dtype=np.str_)
        classes = self._classes(path, kind, int(labels.max()) + 1)
        return ClassificationSet(self.name, split, classes, ids, labels, pixels, np.arange(len(labels)))

    def kind(self, path: Path) -> str:
        """Which official files lie in ``path``: ``py``, ``bin``, or none (empty)."""
        first = self._parts["train"][0]
        return "py" if (path / first).is_file() else "bin" if (path / f"{first}.bin").is_file() else ""

    def _labels(self, file: Path, kind: str) -> NDArray[np.int64]:
        if kind == "bin":
            return _records(file, self._skip + 3072)[:, self._skip - 1].astype(np.int64)
        return _python(file, self._key)[1]

    def _pixels(self, files: Sequence[Path], kind: str) -> Bytes:
        if kind == "bin":
            flat = np.concatenate([_records(f, self._skip + 3072)[:, self._skip :] for f in files])
        else:
            flat = np.concatenate([_python(f, self._key)[0] for f in files])
        return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))

    def _classes(self, path: Path, kind: str, count: int) -> tuple[str, ...]:
        """The official names where the archive's list of them is there, else numbers."""
        file = path / (self._names[0] if kind == "py" else self._texts)
        names: list[Any] = []
        if file.is_file():
            names = list(unpickle(file).get(self._names[1], ())) if kind == "py" else file.read_text().split()
        found = [n.decode() if isinstance(n, bytes) else str(n) for n in names]
        return tuple(found) if len(found) >= count else tuple(str(i) for i in range(count))


class Cifar100(Cifar10):
    """CIFAR-100 with its hundred fine classes, in the layouts of CIFAR-10."""

    name = "cifar100"
    tree = "cifar-100-python/train"
    _homes = ("cifar-100-python", "cifar-100-binary", "cifar100", "cifar-100", ".")
    _parts: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": ("train",), "test": ("test",)}
    _key = "fine_labels"
    _names = ("meta", "fine_label_names")
    _texts = "fine_label_names.txt"
    _skip = 2


class Stl10(ClassificationSource):
    """STL-10 in the official binary files; ``unlabeled`` has 100,000 images without labels."""

    name = "stl10"
    tree = "stl10_binary/train_X.bin"
    homepage = "https://cs.stanford.edu/~acoates/stl10/"
    licence = "images are taken from ImageNet, under its terms"
    citation = "Coates, Lee and Ng, An Analysis of Single-Layer Networks in Unsupervised Feature Learning, AISTATS 2011"

    def locate(self, root: Path | None) -> Path:
        if root is not None:
            for path in (root / "stl10_binary", root / "stl10" / "stl10_binary", root / "stl10", root):
                if (path / "train_X.bin").is_file():
                    return path
        raise self.missing(root)

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        def fill(folder: Path) -> None:
            for number, (split, count) in enumerate((("train", images), ("test", max(6, images // 2)))):
                pixels, labels = labelled(seed, number, count, 96)
                pixels.transpose(0, 3, 2, 1).tofile(folder / f"{split}_X.bin")
                (labels + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")

        return once(root / "stl10_binary", seed, images, fill)

    def splits(self, path: Path) -> tuple[str, ...]:
        return tuple(s for s in ("train", "test", "unlabeled") if (path / f"{s}_X.bin").is_file())

    def roles(self, path: Path) -> Mapping[str, str]:
        more = {"unlabelled": "unlabeled"} if "unlabeled" in self.splits(path) else {}
        return {**super().roles(path), **more}

    def load(self, path: Path, split: str) -> ClassificationSet:
        file = _need(path / f"{split}_X.bin")
        length = 3 * 96 * 96
        count = file.stat().st_size // length
        if not count or file.stat().st_size % length:
            raise _broken(file, ValueError(f"its size is no multiple of {length} bytes"))
        labels = np.full(count, -1, dtype=np.int64)
        if split != "unlabeled":
            labels = np.fromfile(_need(path / f"{split}_y.bin"), dtype=np.uint8).astype(np.int64) - 1
        if len(labels) != count:
            raise _broken(path / f"{split}_y.bin", ValueError(f"{len(labels)} labels for {count} images"))
        names = path / "class_names.txt"
        classes = tuple(names.read_text().split()) if names.is_file() else tuple(str(i) for i in range(1, 11))
        ids = np.array([f"{split}/{i:06d}" for i in range(count)], dtype=np.str_)
        pixels = Arrays(count, partial(_columnwise, file), _contents([file]))
        return ClassificationSet(self.name, split, classes, ids, labels, pixels, np.arange(count))


def _columnwise(file: Path) -> Bytes:
    """Images are stored column by column; they stay in the file until one is asked for."""
    return np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)


@lru_cache(maxsize=2)
def _loaded(file: Path, state: State) -> dict[str, Any]:
    return unpickle(file)


def _python(file: Path, key: str) -> tuple[Bytes, NDArray[np.int64]]:
    content = _loaded(file, state(file))
    try:
        data = np.asarray(content["data"], dtype=np.uint8).reshape(-1, 3072)
        labels = np.asarray(content[key], dtype=np.int64)
        if labels.shape != (len(data),):
            raise ValueError(f"{labels.shape} labels for {len(data)} images")
        return data, labels
    except (KeyError, ValueError, TypeError) as error:
        raise _broken(file, error) from error


def _records(file: Path, length: int) -> Bytes:
    flat = np.fromfile(file, dtype=np.uint8)
    if len(flat) == 0 or len(flat) % length:
        raise _broken(file, ValueError(f"{len(flat)} bytes are no whole number of records of {length}"))
    return flat.reshape(-1, length)


def _contents(files: Sequence[Path]) -> str:
    return joined([], of_paths(files))


def _need(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path} is missing", cause="the layout asks for it", fix="restore it, or check the path")
    return path


def _broken(path: Path, error: Exception) -> DataError:
    reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return DataError(f"{path} cannot be read", cause=reason, fix="restore the file from its source")
