"""Encode a data set once: features on disk, found again by the content of everything that made them.

An entry is a folder named by its key, the sha256 of the weights' identity, the backbone's spec and source code, the
preprocessing, the data's fingerprint, its split and ids, the output (which layer, how pooled), the precision and
the format. Nothing is ever found by a name. In it:

``features.npy``     (N, D) numbers, allocated whole before the first batch, mapped into memory by readers
``shard-00012``      says that rows 12*SHARD and on are on disk, and their sha256; there while encoding goes on
``manifest.json``    the key, the shape and the hash of every shard; written last: an entry with it is complete
``used``             its time of modification is the time of last use

A process that is killed leaves whole shards behind, and the next encodes only what is missing. Batches never cross
the border of a shard, so those rows come out as they would have. One process encodes an entry at a time (``flock``,
which the kernel lets go of when its holder dies); others wait, then read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms.v2 import functional as image_ops

from evalsuite.backbone import Backbone, BackboneSpec, Features, source_digest
from evalsuite.errors import BackboneError, DataError, ResourceError, UsageError
from evalsuite.files import atomic, write_text
from evalsuite.progress import Progress
from evalsuite.resize import resize
from evalsuite.signals import ignore_signals, signals

__all__ = [
    "SHARD",
    "SMALL",
    "Cache",
    "Encoded",
    "Encoder",
    "Entry",
    "ImageSet",
    "Output",
    "Preprocess",
    "Taps",
    "autocast",
    "default_root",
    "images_in_order",
]

FORMAT = 1
SHARD = 4096  # rows; part of the format
SMALL = 96  # pixels of the shorter side: CIFAR, MedMNIST, Tiny ImageNet and STL-10, and networks for them
_DTYPES = {"float32": np.float32, "float16": np.float16}
_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_FIRST_BATCH = {"cuda": 1024, "cpu": 64}
_MANIFEST, _FEATURES, _USED = "manifest.json", "features.npy", "used"

Floats = npt.NDArray[Any]


class ImageSet(Protocol):
    """A split of a data set, as the cache reads it.

    ``fingerprint`` digests the data, ``split`` names the part, ``ids`` name the images. An item is (H, W, 3) uint8
    RGB and is read in worker processes. Labels pass through untouched and are no part of the key.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Any: ...
    def __getitem__(self, index: int, /) -> npt.NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Preprocess:
    """How an image of any size becomes the network's input of ``size`` (height, width), all in uint8.

    ``auto``: ``crop``, with a margin or without one, as the network and the images ask for (:meth:`resolved`).
    ``crop``: resize so that the image covers ``size / ratio``, keeping its aspect, and cut out the centre (ImageNet's
    Resize 256, CenterCrop 224). ``squash``: resize to ``size``. ``pad``: resize to fit into ``size`` keeping the
    aspect, and pad with black, half on each side. ``none``: images are taken as they are and must all be of ``size``.
    Resizing is antialiased, as Pillow's. ``resize`` says where it is done: by the ``workers`` that decode, in fixed
    point, or on the ``device``, in floating point, which spares the processor where that is what one waits for. On
    photographs the first is Pillow's but for one level in 1.5 % of the values, the second but for one in 15 %; the
    features of the two are 0.1 % of their length apart (``python -m benchmarks precision``).
    """

    size: tuple[int, int]
    rule: Literal["auto", "crop", "squash", "pad", "none"] = "crop"
    ratio: float = 224 / 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    resize: Literal["workers", "device"] = "workers"

    @classmethod
    def of(cls, spec: BackboneSpec) -> Preprocess:
        """The default for a backbone: to its image size by ``auto``."""
        return cls((spec.image_size[0], spec.image_size[1]), "auto")

    def resolved(self, shape: Callable[[int], tuple[int, ...]], count: int, small: int = SMALL) -> Preprocess:
        """What ``auto`` is for a set of ``count`` images, the same for all of them; any other rule is itself.

        ``shape(index)`` gives (height, width, ...) of an image, or raises :class:`DataError` where it does not decode;
        at most 64 evenly spaced ones are looked at. Where the input's shorter side is at most ``small`` pixels, or that
        of the median image, or where all images have the network's size, images are shown without a margin: ``crop``
        with a ratio of 1. Networks for small images are trained on whole ones, a small image is all object, and one
        of the right size was made so. Else ``crop`` with ``ratio``, as networks for photographs are evaluated.
        """
        if self.rule != "auto":
            return self
        whole = min(self.size) <= small
        if not whole:
            sizes = _sizes(shape, count)
            whole = bool(sizes) and (median_low(map(min, sizes)) <= small or set(sizes) == {self.size})
        return dataclasses.replace(self, rule="crop", ratio=1.0 if whole else self.ratio)

    def __call__(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) uint8 to (3, *size) uint8. Raises :class:`DataError` for an image that does not fit."""
        return self.sized(_planes(image))

    def sized(self, pixels: Tensor) -> Tensor:
        """The same for (3, H, W) uint8, on its device."""
        height, width = self.size
        if self.rule == "auto":
            raise UsageError(
                "an image alone does not say how it is to be shown",
                cause="the rule auto is decided once for a whole set of images",
                fix="use what Preprocess.resolved() gives",
            )
        if self.rule == "squash":
            return self._resize(pixels, height, width)
        if self.rule == "crop":
            return cast(Tensor, image_ops.center_crop(self.covering(pixels), [height, width]))
        if self.rule == "pad":
            inner = self._scale(pixels, self.size, min)
            top, left = (height - inner.shape[1]) // 2, (width - inner.shape[2]) // 2
            bottom, right = height - inner.shape[1] - top, width - inner.shape[2] - left
            return cast(Tensor, image_ops.pad(inner, [left, top, right, bottom]))
        if tuple(pixels.shape[1:]) != self.size:
            raise DataError(
                f"an image has {pixels.shape[2]}x{pixels.shape[1]} pixels, not {width}x{height}",
                cause="the preprocessing takes images as they are",
                fix="choose a rule that resizes: crop, squash or pad",
            )
        return pixels

    def covering(self, pixels: Tensor) -> Tensor:
        """(3, H, W) uint8 resized as for ``crop``, and not cut yet."""
        return self._scale(pixels, (round(self.size[0] / self.ratio), round(self.size[1] / self.ratio)), max)

    def _scale(self, pixels: Tensor, target: tuple[int, int], choose: Callable[[float, float], float]) -> Tensor:
        """Resize by one factor: of the two that make a side fit, the larger (cover) or the smaller."""
        height, width = pixels.shape[1:]
        # The side that decides is exact; the other is cut to whole pixels, as torchvision does.
        if choose(target[0] / height, target[1] / width) == target[0] / height:
            return self._resize(pixels, target[0], max(1, target[0] * width // height))
        return self._resize(pixels, max(1, target[1] * height // width), target[1])

    def _resize(self, pixels: Tensor, height: int, width: int) -> Tensor:
        return resize(pixels, height, width, self.interpolation)


@dataclass(frozen=True)
class Output:
    """One (B, D) tensor read off a forward pass, named ``source`` or ``source/pool`` or ``source/pool+grid``.

    ``pooled`` is the backbone's own vector, ``joint`` the one in a space shared with text. ``map16`` is its map of
    stride 16 and ``layer:NAME`` the output of that submodule of the network, both pooled over space; ``tokens`` are
    pooled over the set. ``pool`` is ``avg`` (the default) or ``max``; ``max6`` pools a map adaptively to 6 x 6 and
    flattens it, channel first. ``full`` is all of a map, flattened likewise.
    """

    name: str
    source: str
    pool: str
    grid: int

    @classmethod
    def parse(cls, name: str) -> Output:
        """Read a name. Raises :class:`UsageError` for one that says nothing."""
        found = re.fullmatch(r"(pooled|joint|tokens|map[1-9]\d*|layer:[\w.]+)(?:/(avg|max|full)([1-9]\d*)?)?", name)
        plain = found is not None and found[1] in ("pooled", "joint") and found[2] is not None
        whole = found is not None and found[2] == "full" and (found[1] == "tokens" or found[3] is not None)
        if found is None or plain or whole or (found[1] == "tokens" and found[3]):
            raise UsageError(
                f"{name!r} names no output of a backbone",
                cause="outputs are pooled, joint, tokens, map16 or layer:NAME, the last three with /avg, /max or a "
                "grid, maps and layers with /full",
                fix="for example pooled, tokens/max, map32/avg2, map16/full or layer:layer3/max6",
            )
        return cls(name, found[1], found[2] or "avg", int(found[3] or 1))

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`BackboneError` where the backbone does not give the source."""
        spec = backbone.spec
        if self.source.startswith("layer:"):
            has, gives = self.module in dict(backbone.net.named_modules()), "the names of its submodules"
        elif self.source.startswith("map"):
            has, gives = int(self.source[3:]) in spec.strides, f"maps of stride {sorted(spec.strides)}"
        else:
            has, gives = self.source in spec.gives, ", ".join(sorted(spec.gives))
        if not has:
            raise BackboneError(
                f"{spec.arch} has no output {self.name!r}",
                cause=f"it gives {gives}",
                fix="name one that it gives",
            )

    @property
    def module(self) -> str:
        """The submodule of a ``layer:`` source."""
        return self.source.removeprefix("layer:")

    def read(self, features: Features, layers: Mapping[str, Tensor]) -> Tensor:
        """The (B, D) tensor, in float32."""
        return self._pool(self.whole(features, layers))

    def whole(self, features: Features, layers: Mapping[str, Tensor]) -> Tensor:
        """What is pooled: (B, D), (B, N, D) or (B, C, H, W), in float32."""
        if self.source == "pooled":
            found = features.pooled
        elif self.source == "joint":
            found = features.joint
        elif self.source == "tokens":
            found = features.tokens
        elif self.source.startswith("map"):
            found = features.maps.get(int(self.source[3:]))
        else:
            found = layers.get(self.source)
        if found is None or found.ndim not in (2, 3, 4):
            raise BackboneError(
                f"the backbone gave no output {self.name!r}",
                cause="it is None, or no tensor of 2, 3 or 4 dimensions",
                fix="correct what the backbone's spec says that it gives",
            )
        return found.float()

    def _pool(self, values: Tensor) -> Tensor:
        if self.pool == "full":
            return values.flatten(1)
        if values.ndim == 4:
            pooling = nn.functional.adaptive_avg_pool2d if self.pool == "avg" else nn.functional.adaptive_max_pool2d
            return pooling(values, self.grid).flatten(1)
        if values.ndim == 3:
            return values.mean(1) if self.pool == "avg" else values.amax(1)
        return values


@dataclass(frozen=True)
class Encoded:
    """Features of a split. ``arrays`` are read-only maps of files, {output: (N, D)}; rows are in the order of ``ids``.

    ``encoded`` counts the images that went through the network just now (0: all came from the cache).
    """

    arrays: Mapping[str, Floats]
    ids: Sequence[str]
    labels: Any
    encoded: int


@dataclass(frozen=True)
class Entry:
    """One entry: its digest, what it holds, its size in bytes, when it was last used (seconds since the epoch)."""

    digest: str
    key: Mapping[str, Any]
    rows: int
    width: int
    size: int
    used: float
    complete: bool


@dataclass(frozen=True)
class _Job:
    """What one call asks for, once for all of its outputs."""

    backbone: Backbone
    data: ImageSet
    preprocess: Preprocess
    device: torch.device
    precision: str
    dtype: np.dtype[Any]
    batch_size: int
    workers: int | Literal["auto"]
    channels_last: bool
    pin_memory: bool
    progress: Progress


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """What a network runs in, on ``device``: nothing for ``32-true``, else bfloat16 or float16 for what stands it."""
    kind = _AUTOCAST[precision]
    return torch.autocast(device.type, kind, enabled=kind is not None)


def default_root() -> Path:
    """``EVALSUITE_CACHE/features``, or ``~/.cache/evalsuite/features``."""
    return Path(os.environ.get("EVALSUITE_CACHE") or Path.home() / ".cache" / "evalsuite").expanduser() / "features"


class Cache:
    """The features under one folder; any number of processes may share it.

    >>> encoded = Cache().features(backbone, images, what=("pooled", "map16/max6"))  # doctest: +SKIP
    >>> encoded.arrays["pooled"].shape  # doctest: +SKIP
    (5011, 2048)
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = default_root() if root is None else Path(root)

    def features(
        self,
        backbone: Backbone,
        data: ImageSet,
        what: Sequence[str] = ("pooled",),
        *,
        preprocess: Preprocess | None = None,
        device: torch.device | str = "cpu",
        precision: str = "32-true",
        dtype: str = "float32",
        batch_size: int | Literal["auto"] = "auto",
        workers: int | Literal["auto"] = 0,
        channels_last: bool | None = None,
        pin_memory: bool | None = None,
        progress: Progress | None = None,
    ) -> Encoded:
        """The outputs ``what`` of every image, in one pass through the network over those that are not here yet.

        ``preprocess`` is by default :meth:`Preprocess.of` the backbone; the rule ``auto`` is decided on ``data``.
        ``precision`` is ``32-true``, ``bf16-mixed`` or ``16-mixed`` (the network's arithmetic); ``dtype`` is what is
        stored, float32 or float16. ``batch_size="auto"`` starts at 1024 on a GPU and 64 on a CPU; any batch that
        does not fit into memory is halved. ``workers="auto"`` times the reading of a few images. ``channels_last``
        is for convolutional networks, ``pin_memory`` for batches; both are on by default on a GPU. The backbone is
        moved to ``device``, runs in evaluation mode whatever its own, and is given back in the mode it was in.

        bf16 moves features less than probes can tell: on a CIFAR ResNet-20 by 0.7 % of their length, on an untrained
        ResNet-18 by 0.3 %, and accuracies on 1,000 images by 0.001 to 0.003 where their standard error is 0.012 to
        0.014 (``python -m benchmarks precision``).

        Raises :class:`UsageError` for an unknown output or precision, :class:`BackboneError` for an output that the
        backbone does not give or a feature that is not finite, :class:`DataError` for an empty split and damaged
        entries, and :class:`ResourceError` where memory, disk or file locks do not suffice.
        """
        outputs = [Output.parse(name) for name in dict.fromkeys(what)]
        _check_options(precision, dtype, batch_size)
        for output in outputs:
            output.check(backbone)
        if not len(data.ids):
            raise DataError(
                f"split {data.split!r} is empty",
                cause="it lists no images",
                fix="check the data and the limit",
            )
        device = torch.device(device)
        shown = preprocess or Preprocess.of(backbone.spec)
        shown = shown.resolved(lambda index: data[index].shape, len(data.ids))
        job = _Job(
            backbone, data, shown, device, precision, np.dtype(_DTYPES[dtype]),
            _FIRST_BATCH.get(device.type, 64) if batch_size == "auto" else batch_size, workers,
            device.type == "cuda" if channels_last is None else channels_last,
            device.type == "cuda" if pin_memory is None else pin_memory, progress or Progress(quiet=True),
        )  # fmt: skip
        keys = self._keys(job, outputs)
        folders = {output: self._folder(_digest(key)) for output, key in keys.items()}
        encoded = 0
        if not all(_complete(folder) for folder in folders.values()):
            encoded = self._encode(job, folders, keys)
        arrays = {output.name: _open(folder, len(data.ids)) for output, folder in folders.items()}
        return Encoded(arrays, data.ids, data.labels, encoded)

    def ls(self) -> list[Entry]:
        """All entries, the most recently used first."""
        return sorted((_entry(folder) for folder in self._folders()), key=lambda e: (-e.used, e.digest))

    def verify(self, digests: Iterable[str] = (), progress: Progress | None = None) -> dict[str, str]:
        """Read every shard of the complete entries (or those named by the beginnings of their digests) again.

        The faults by digest; empty where all is well.
        """
        folders = [folder for folder in self._named(digests) if (folder / _MANIFEST).exists()]
        faults: dict[str, str] = {}
        with (progress or Progress(quiet=True)).track("verify", len(folders)) as meter:
            for done, folder in enumerate(folders, 1):
                if fault := _fault(folder):
                    faults[folder.name] = fault
                meter.update(done)
        return faults

    def gc(self, max_size: int) -> list[Entry]:
        """Remove entries, the least recently used first, until all together take ``max_size`` bytes or less.

        An entry that some process is encoding is left alone. What was removed.
        """
        entries = self.ls()
        total, removed = sum(entry.size for entry in entries), []
        for entry in reversed(entries):
            if total <= max_size:
                break
            if self._remove(entry.digest):
                removed.append(entry)
                total -= entry.size
        return removed

    def rm(self, digests: Iterable[str]) -> list[Entry]:
        """Remove the entries whose digests begin so. Raises :class:`UsageError` where there is no such entry, or more
        than one, and :class:`ResourceError` for one that is being encoded.
        """
        names = list(digests)
        entries = [_entry(folder) for folder in self._named(names)] if names else []
        for entry in entries:
            if not self._remove(entry.digest):
                raise ResourceError(
                    f"cache entry {entry.digest[:12]} is in use",
                    cause="another process is encoding it",
                    fix="wait for it, or end it, and remove the entry then",
                )
        return entries

    def _keys(self, job: _Job, outputs: Sequence[Output]) -> dict[Output, dict[str, Any]]:
        backbone = job.backbone
        ids = hashlib.sha256()
        for name in job.data.ids:
            ids.update(f"{len(name)}:{name}".encode())
        common = {
            "format": FORMAT,
            "weights": backbone.identity,
            "spec": backbone.spec.to_json(),
            "code": _code(backbone),
            "preprocess": dataclasses.asdict(job.preprocess),
            "data": job.data.fingerprint,
            "split": job.data.split,
            "ids": ids.hexdigest(),
            "rows": len(job.data.ids),
            "precision": job.precision,
            "dtype": job.dtype.name,
        }
        return {output: common | {"output": output.name} for output in outputs}

    def _folder(self, digest: str) -> Path:
        return self.root / digest[:2] / digest

    def _folders(self) -> list[Path]:
        return sorted(p for p in self.root.glob("[0-9a-f][0-9a-f]/*") if re.fullmatch("[0-9a-f]{64}", p.name))

    def _named(self, digests: Iterable[str]) -> list[Path]:
        folders, names = self._folders(), list(digests)
        chosen = []
        for name in names:
            found = [folder for folder in folders if name and folder.name.startswith(name)]
            if len(found) != 1:
                raise UsageError(
                    f"{len(found) or 'no'} cache entries begin with {name!r}",
                    cause=f"the cache is {self.root}",
                    fix="evalsuite cache ls shows the digests",
                )
            chosen += found
        return chosen if names else folders

    def _remove(self, digest: str) -> bool:
        with _locked(self.root / "locks" / digest, wait=None) as held:
            if held:
                shutil.rmtree(self._folder(digest))
                (self.root / "locks" / digest).unlink()
        return held

    def _encode(self, job: _Job, folders: Mapping[Output, Path], keys: Mapping[Output, Mapping[str, Any]]) -> int:
        """Encode what is missing; the number of images that took."""
        with contextlib.ExitStack() as stack:
            # In the order of their names, so that two processes that share some entries cannot wait for each other.
            for folder in sorted(set(folders.values())):
                stack.enter_context(_locked(self.root / "locks" / folder.name, wait=job.progress))
            writers = [
                _Writer(output, folder, keys[output], job.dtype)
                for output, folder in folders.items()
                if not _complete(folder)
            ]
            shards = math.ceil(len(job.data.ids) / SHARD)
            missing = [i for i in range(shards) if any(i not in writer.hashes for writer in writers)]
            done = sum(_shard_rows(i, len(job.data.ids)) for i in range(shards) if i not in missing)
            with job.progress.track("encode", len(job.data.ids), done) as meter, signals() as told:
                count = 0
                for shard, start, blocks in _forward(job, [w.output for w in writers], missing):
                    for writer, block in zip(writers, blocks, strict=True):
                        writer.put(shard, start, block)
                    count += len(blocks[0])
                    meter.update(done + count)
                    if told.signal:  # the shards on disk are whole, and the next run goes on after them
                        raise SystemExit(128 + told.signal)
            for writer in writers:
                writer.finish()
        return count


class _Writer:
    """One entry while it is being encoded. ``hashes`` are those of the shards that are on disk."""

    def __init__(self, output: Output, folder: Path, key: Mapping[str, Any], dtype: np.dtype[Any]) -> None:
        self.output, self.folder, self.key, self.dtype = output, folder, key, dtype
        self.rows: int = key["rows"]
        self.hashes: dict[int, str] = {}
        self.array: np.memmap[Any, Any] | None = None
        self.digest, self.put_rows = hashlib.sha256(), 0
        with _disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for partial in folder.glob(".*.partial"):  # of a process that was killed; we hold the lock
                partial.unlink()
            self._resume()

    def put(self, shard: int, start: int, block: Tensor) -> None:
        """Rows ``start`` and on of a shard; the shard is complete when its last row is here."""
        if shard in self.hashes:
            return
        with np.errstate(over="ignore"):  # told below, by name
            rows = block.numpy().astype(self.dtype)
        if not np.isfinite(rows).all():
            raise _not_finite(self.output, block, self.dtype)
        with _disk(self.folder):
            if self.array is None:
                self.array = self._allocate(rows.shape[1])
            self.array[start : start + len(rows)] = rows
            self.digest.update(rows.tobytes())
            self.put_rows += len(rows)
            if self.put_rows == _shard_rows(shard, self.rows):
                self.array.flush()  # the rows reach the disk before the marker that says so
                write_text(self.folder / f"shard-{shard:05d}", self.digest.hexdigest())
                self.hashes[shard] = self.digest.hexdigest()
                self.digest, self.put_rows = hashlib.sha256(), 0

    def finish(self) -> None:
        """Write the manifest, and with it the entry is complete."""
        with _disk(self.folder):
            if self.array is None:
                self.array = self._map()
            manifest = {
                "format": FORMAT,
                "key": self.key,
                "rows": self.rows,
                "width": int(self.array.shape[1]),
                "dtype": self.dtype.name,
                "shard": SHARD,
                "sha256": [self.hashes[i] for i in range(len(self.hashes))],
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "torch": torch.__version__,
            }
            write_text(self.folder / _MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
            for marker in self.folder.glob("shard-*"):
                marker.unlink()

    def _resume(self) -> None:
        """Take over the shards of an encoding that was cut short."""
        if not (self.folder / _FEATURES).exists():
            return
        try:  # to read: a map to write would make a file that was cut whole again, with zeros
            whole = len(np.load(self.folder / _FEATURES, mmap_mode="r", allow_pickle=False)) == self.rows
        except ValueError:
            whole = False
        if not whole:  # the shards are not what their markers say
            for marker in self.folder.glob("shard-*"):
                marker.unlink()
            return
        self.array = self._map()
        for marker in self.folder.glob("shard-*"):
            self.hashes[int(marker.name.removeprefix("shard-"))] = marker.read_text()

    def _map(self) -> np.memmap[Any, Any]:
        return np.lib.format.open_memmap(self.folder / _FEATURES, mode="r+")

    def _allocate(self, width: int) -> np.memmap[Any, Any]:
        """The whole file at once: a full disk is found out now and not after hours; and there it is whole or not."""
        with atomic(self.folder / _FEATURES) as partial:
            np.lib.format.open_memmap(partial, mode="w+", dtype=self.dtype, shape=(self.rows, width)).flush()
            with partial.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        return self._map()


def _sizes(shape: Callable[[int], tuple[int, ...]], count: int, most: int = 64) -> list[tuple[int, int]]:
    """(height, width) of at most so many evenly spaced images, those left out that do not decode."""
    sizes = []
    for index in sorted({place * (count - 1) // max(1, most - 1) for place in range(most)}):
        with contextlib.suppress(DataError):
            height, width = shape(index)[:2]
            sizes.append((height, width))
    return sizes


def _planes(image: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


class _Packed(NamedTuple):
    """Images of any sizes as one tensor, for one message from a worker and one copy to the device."""

    pixels: Tensor
    sizes: list[tuple[int, int]]

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> _Packed:
        flat = torch.cat([image.reshape(-1) for image in images])
        return cls(flat, [(image.shape[1], image.shape[2]) for image in images])

    def unpack(self, device: torch.device) -> list[Tensor]:
        """The images (3, H, W), on the device."""
        parts = self.pixels.to(device, non_blocking=True).split([3 * h * w for h, w in self.sizes])
        return [part.view(3, h, w) for part, (h, w) in zip(parts, self.sizes, strict=True)]


class _Reader(TorchDataset[Tensor | DataError]):
    """Images for a loader's workers, through the preprocessing where they are to do it.

    A refusal is handed over as it is: one that is raised in a worker comes out as a text about processes.
    """

    def __init__(self, data: ImageSet, preprocess: Preprocess) -> None:
        self.data, self.preprocess = data, preprocess

    def __getitem__(self, index: int) -> Tensor | DataError:
        try:
            image = self.data[index]
            return self.preprocess(image) if self.preprocess.resize == "workers" else _planes(image)
        except DataError as error:
            return error

    def batch(self, images: Sequence[Tensor | DataError]) -> Tensor | _Packed | DataError:
        """Images as one batch; or the first refusal among them."""
        whole = [image for image in images if not isinstance(image, DataError)]
        if len(whole) < len(images):
            return next(image for image in images if isinstance(image, DataError))
        if self.preprocess.resize == "device":
            return _Packed.of(whole)
        return cast("Tensor", default_collate(whole))


def images_in_order(
    data: ImageSet,
    preprocess: Preprocess,
    batches: Sequence[Sequence[int]],
    workers: int | Literal["auto"],
    pin: bool = False,
) -> Iterator[Any]:
    """Batches of images by number, each as :class:`Encoder` takes them.

    Raises :class:`DataError` for one that does not decode.
    """
    reader = _Reader(data, preprocess)
    count = _measured_workers(reader, len(data.ids)) if workers == "auto" else workers
    loader: DataLoader[Any] = DataLoader(
        reader, batch_sampler=[list(batch) for batch in batches], num_workers=count, pin_memory=pin,
        prefetch_factor=4 if count else None, collate_fn=reader.batch, worker_init_fn=ignore_signals,
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _forward(job: _Job, outputs: Sequence[Output], shards: Sequence[int]) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(shard, first row, one (b, D) tensor an output) batch after batch over the shards, on the CPU."""
    rows = len(job.data.ids)
    batches = [
        range(start, min(start + job.batch_size, shard * SHARD + _shard_rows(shard, rows)))
        for shard in shards
        for start in range(shard * SHARD, shard * SHARD + _shard_rows(shard, rows), job.batch_size)
    ]
    loader = images_in_order(job.data, job.preprocess, batches, job.workers, pin=job.pin_memory)
    encoder = Encoder(
        job.backbone, outputs, job.preprocess, job.device, job.precision, job.batch_size, job.channels_last,
        job.progress,
    )  # fmt: skip
    with encoder:
        for batch, pixels in zip(batches, loader, strict=True):
            yield batch.start // SHARD, batch.start, [tensor.cpu() for tensor in encoder(pixels)]


class Taps:
    """Reads outputs off a backbone's forward pass; hooks sit on the layers asked for while the block lasts."""

    def __init__(self, backbone: Backbone, outputs: Sequence[Output], whole: bool = False) -> None:
        self.backbone, self.outputs, self.whole = backbone, outputs, whole
        self.layers: dict[str, Tensor] = {}

    def __enter__(self) -> Taps:
        modules = dict(self.backbone.net.named_modules())
        sources = {output.source: output.module for output in self.outputs if output.source.startswith("layer:")}
        self.hooks = [modules[name].register_forward_hook(self._keep(source)) for source, name in sources.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """Pixels (B, 3, H, W) in [0,1] to one (B, D) tensor an output, or what it is pooled from, where ``whole``."""
        try:
            features = self.backbone(pixels)
            return [(o.whole if self.whole else o.read)(features, self.layers) for o in self.outputs]
        finally:
            self.layers.clear()

    def _keep(self, source: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.layers[source] = output

        return hook


class Encoder:
    """A frozen backbone in evaluation mode on its device; as it was, but for the device, when the block ends.

    ``encoder(pixels)`` takes (B, 3, H, W) uint8 (or what :func:`images_in_order` gives) through the network in as many
    parts as memory asks for. ``most`` is how many images are tried at once.
    """

    def __init__(
        self,
        backbone: Backbone,
        outputs: Sequence[Output],
        preprocess: Preprocess,
        device: torch.device,
        precision: str = "32-true",
        most: int | None = None,
        channels_last: bool | None = None,
        progress: Progress | None = None,
        whole: bool = False,
    ) -> None:
        self.backbone, self.preprocess, self.device, self.precision = backbone, preprocess, device, precision
        self.most = _FIRST_BATCH.get(device.type, 64) if most is None else most
        self.channels_last = device.type == "cuda" if channels_last is None else channels_last
        self.progress = progress or Progress(quiet=True)
        self.taps = Taps(backbone, outputs, whole)

    def __enter__(self) -> Encoder:
        self.backbone.to(self.device)
        self.modes = {module: module.training for module in self.backbone.modules()}
        self.backbone.eval()
        if self.channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        self.taps.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.taps.__exit__()
        if self.channels_last:
            self.backbone.to(memory_format=torch.contiguous_format)
        for module, training in self.modes.items():
            module.training = training

    def __call__(self, pixels: Tensor | _Packed) -> list[Tensor]:
        """One tensor an output, on the device."""
        images = pixels.unpack(self.device) if isinstance(pixels, _Packed) else pixels
        parts: list[list[Tensor]] = []
        start = 0
        while start < len(images):
            part = images[start : start + self.most]
            found = self._attempt(part)
            if found is None:
                self._halve(len(part))
            else:
                parts.append(found)
                start += len(part)
        return parts[0] if len(parts) == 1 else [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    def _attempt(self, images: Tensor | list[Tensor]) -> list[Tensor] | None:
        """None where memory does not suffice."""
        try:
            if isinstance(images, list):
                images = torch.stack([self.preprocess.sized(image) for image in images])
            batch = images.to(self.device, non_blocking=True)
            if self.channels_last:
                batch = batch.contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), autocast(self.device, self.precision):
                return self.taps(batch.float() / 255)
        except (torch.OutOfMemoryError, MemoryError):
            return None
        except RuntimeError as error:  # what torch raises on a CPU
            if "can't allocate memory" in str(error):
                return None
            raise

    def _halve(self, size: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            raise ResourceError(
                f"one image of {self.preprocess.size} does not fit into the memory of {self.device}",
                cause="the network needs more than is free",
                fix="free memory, use --precision bf16-mixed, or another device",
            )
        self.most = size // 2
        self.progress.say(f"encode: out of memory at {size} images; going on with {self.most} at a time")


def _measured_workers(reader: _Reader, rows: int, probe: int = 8, patience: float = 2.0) -> int:
    """0 where reading all takes less than starting workers does, else one a core but one, at most 16."""
    start = time.perf_counter()
    for index in range(min(probe, rows)):
        reader[index]
    whole = (time.perf_counter() - start) / max(1, min(probe, rows)) * rows
    return 0 if whole < patience else max(1, min(16, len(os.sched_getaffinity(0)) - 1))


def _shard_rows(shard: int, rows: int) -> int:
    return min(SHARD, rows - shard * SHARD)


def _check_options(precision: str, dtype: str, batch_size: int | Literal["auto"]) -> None:
    for name, value, known in (("precision", precision, _AUTOCAST), ("feature dtype", dtype, _DTYPES)):
        if value not in known:
            raise UsageError(
                f"{name} {value!r} is unknown",
                cause=f"known are {', '.join(known)}",
                fix="choose one of them",
            )
    if batch_size != "auto" and batch_size < 1:
        raise UsageError(f"batch size {batch_size}", cause="a batch holds at least one image", fix="leave it at auto")


def _not_finite(output: Output, block: Tensor, dtype: np.dtype[Any]) -> BackboneError:
    if torch.isfinite(block).all():
        return BackboneError(
            f"features of {output.name!r} do not fit into {dtype.name}",
            cause=f"their largest magnitude is {float(block.abs().max()):.3g}",
            fix="store them as float32",
        )
    return BackboneError(
        f"features of {output.name!r} are not finite",
        cause=f"{int((~torch.isfinite(block)).any(1).sum())} of {len(block)} images of a batch gave NaN or infinity",
        fix="check the weights and the normalisation; with 16-bit precision, try 32-true",
    )


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _code(backbone: Backbone) -> str:
    """A digest of the source files that define the network, torch's own left out.

    Weights do not tell what is done with them; a plugin's author who changes a forward pass must not be served
    yesterday's features.
    """
    names = {type(module).__module__ for module in backbone.modules()}
    for function in (backbone._look, backbone.forward):
        names.add(getattr(function, "__module__", None) or type(function).__module__)
    return source_digest(name for name in names if name.partition(".")[0] != "torch")


def _complete(folder: Path) -> bool:
    return (folder / _MANIFEST).exists()


def _open(folder: Path, rows: int) -> Floats:
    """Map a complete entry, and note its use. Raises :class:`DataError` where it is damaged."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        array: Floats = np.load(folder / _FEATURES, mmap_mode="r", allow_pickle=False)
        if array.shape != (rows, manifest["width"]) or array.dtype.name != manifest["dtype"]:
            raise ValueError(f"it holds {array.shape} {array.dtype.name}")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"cache entry {folder.name[:12]} is damaged",
            cause=f"{type(error).__name__}: {error}",
            fix=f"evalsuite cache rm {folder.name[:12]}, and run the same command again",
        ) from error
    with contextlib.suppress(PermissionError):  # a shared cache may be readable only; then its owner sees no use
        (folder / _USED).touch()
    return array


def _entry(folder: Path) -> Entry:
    manifest: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # ls shows damaged entries too, so that they can be removed
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    size = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    used = folder / _USED
    return Entry(
        folder.name, manifest.get("key", {}), manifest.get("rows", 0), manifest.get("width", 0), size,
        (used if used.exists() else folder).stat().st_mtime, bool(manifest),
    )  # fmt: skip


def _fault(folder: Path) -> str | None:
    """What is wrong with a complete entry."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if _digest(manifest["key"]) != folder.name:
            return "the manifest is of another entry"
        array = np.load(folder / _FEATURES, mmap_mode="r", allow_pickle=False)
        for shard, expected in enumerate(manifest["sha256"]):
            rows = np.ascontiguousarray(array[shard * manifest["shard"] : (shard + 1) * manifest["shard"]])
            if hashlib.sha256(rows.tobytes()).hexdigest() != expected:
                return f"shard {shard} is not what was written"
        return None if len(array) == manifest["rows"] else f"it has {len(array)} rows, not {manifest['rows']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ResourceError) as error:  # the latter of a full disk, which knows nothing of caches
        reason = error.__cause__ if isinstance(error, ResourceError) else error
        raise ResourceError(
            f"features cannot be written to {folder.parent.parent}",
            cause=f"{getattr(reason, 'strerror', None) or reason}",
            fix="free space there (evalsuite cache gc --max-size 10GB), or point EVALSUITE_CACHE elsewhere",
        ) from error


@contextmanager
def _locked(path: Path, wait: Progress | None) -> Iterator[bool]:
    """Hold an exclusive lock on ``path``; whether it is held (always, where ``wait`` is given and tells of waiting).

    The file may have been removed, with its entry, between opening and locking it: then another try is made.
    """
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with _disk(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _flock(handle, path, wait)
            if held and not _same_file(handle, path):
                continue
            yield held
            return
        finally:
            os.close(handle)


def _flock(handle: int, path: Path, wait: Progress | None) -> bool:
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                return False
            wait.say("encode: waiting for another process that encodes the same features")
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be locked",
            cause=f"{error.strerror or error}: the file system knows no locks",
            fix="point EVALSUITE_CACHE to a local disk",
        ) from error
    return True


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
