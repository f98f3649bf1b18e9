"""Encode a data set once: features on disk, found again by the content of everything that made them.

An entry is a folder named by its key, the sha256 of the weights' identity, the backbone's spec and source code, the
kind of input and its preprocessing, the data's fingerprint, its split and ids, the output (which layer, how pooled),
the precision and the format. Nothing is ever found by a name. In it:

``features.npy``     (N, D) numbers, or (N, ...) of an output that is kept whole, allocated before the first batch,
                     mapped into memory by readers
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evalsuite.backbone import PIXELS, Backbone, source_digest
from evalsuite.environment import cache_root
from evalsuite.errors import BackboneError, DataError, ResourceError, UsageError
from evalsuite.features.encoder import AUTOCAST, FIRST_BATCH, Encoder, ImageSet, images_in_order
from evalsuite.features.outputs import Output
from evalsuite.features.preprocess import Preprocess
from evalsuite.files import atomic, write_text
from evalsuite.options import by_content
from evalsuite.progress import Progress
from evalsuite.signals import signals

__all__ = ["SHARD", "Cache", "Encoded", "Entry", "default_root"]


FORMAT = 2
SHARD = 4096  # rows; part of the format
_DTYPES = {"float32": np.float32, "float16": np.float16}
_MANIFEST, _FEATURES, _USED = "manifest.json", "features.npy", "used"

Floats = npt.NDArray[Any]


@dataclass(frozen=True)
class Encoded:
    """Features of a split. ``arrays`` are read-only maps of files, {output: (N, D)}; rows are in the order of ``ids``.

    An output that is kept whole is (N, ...): ``tokens/whole`` (N, tokens, D), ``map16/whole`` (N, C, H, W).
    ``encoded`` counts the rows that went through the network just now (0: all came from the cache).
    """

    arrays: Mapping[str, Floats]
    ids: Sequence[str]
    labels: Any
    encoded: int


@dataclass(frozen=True)
class Entry:
    """One entry: its digest, what it holds, its size in bytes, when it was last used (seconds since the epoch).

    ``shape`` is that of a row, and ``width`` how many numbers it has.
    """

    digest: str
    key: Mapping[str, Any]
    rows: int
    shape: tuple[int, ...]
    size: int
    used: float
    complete: bool

    @property
    def width(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Job:
    """What one call asks for, once for all of its outputs."""

    backbone: Backbone
    data: ImageSet
    kind: str
    preprocess: Preprocess | None
    device: torch.device
    precision: str
    dtype: np.dtype[Any]
    batch_size: int
    workers: int | Literal["auto"]
    channels_last: bool
    pin_memory: bool
    progress: Progress


def default_root() -> Path:
    """``features`` in :func:`evalsuite.environment.cache_root`."""
    return cache_root() / "features"


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
        """The outputs ``what`` of every row, in one pass through the network over those that are not here yet.

        What the rows are, ``data`` say by an attribute ``kind`` (none: images); texts, and other kinds than images and
        clips, go to the backbone as they are (:meth:`Backbone.encode`).
        ``preprocess`` is by default :meth:`Preprocess.of` the backbone; the rule ``auto`` is decided on ``data``.
        ``precision`` is ``32-true``, ``bf16-mixed`` or ``16-mixed`` (the network's arithmetic); ``dtype`` is what is
        stored, float32 or float16. ``batch_size="auto"`` starts at 1024 on a GPU and 64 on a CPU; any batch that
        does not fit into memory is halved. ``workers="auto"`` times the reading of a few images. ``channels_last``
        is for convolutional networks, ``pin_memory`` for batches; both are on by default on a GPU. The backbone is
        moved to ``device``, runs in evaluation mode whatever its own, and is given back in the mode it was in.

        bf16 moves features less than probes can tell: on a CIFAR ResNet-20 by 0.7 % of their length, on an untrained
        ResNet-18 by 0.3 %, and accuracies on 1,000 images by 0.001 to 0.003 where their standard error is 0.012 to
        0.014 (``python -m benchmarks precision``).

        Raises :class:`UsageError` for an unknown output or precision, :class:`BackboneError` for a kind that the
        backbone does not take, an output that it does not give or a feature that is not finite, :class:`DataError` for
        an empty split and damaged entries, and :class:`ResourceError` where memory, disk or file locks do not suffice.
        """
        outputs = [Output.parse(name) for name in dict.fromkeys(what)]
        _check_options(precision, dtype, batch_size)
        kind = getattr(data, "kind", "image")
        backbone.check_takes(kind)
        for output in outputs:
            output.check(backbone)
        if not len(data.ids):
            raise DataError(
                f"split {data.split!r} is empty",
                cause=f"it lists no rows of the kind {kind}",
                fix="check the data and the limit",
            )
        device = torch.device(device)
        shown = None
        if kind in PIXELS:
            shown = preprocess or Preprocess.of(backbone.spec)
            shown = shown.resolved(lambda index: data[index].shape, len(data.ids))
        job = _Job(
            backbone, data, kind, shown, device, precision, np.dtype(_DTYPES[dtype]),
            FIRST_BATCH.get(device.type, 64) if batch_size == "auto" else batch_size, workers,
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
            "spec": backbone.spec.to_json() | {"options": by_content(dict(backbone.spec.options))},
            "code": _code(backbone),
            "kind": job.kind,
            "preprocess": None if job.preprocess is None else dataclasses.asdict(job.preprocess),
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
                self.array = self._allocate(rows.shape[1:])
            if self.array.shape[1:] != rows.shape[1:]:
                raise _other_shape(self.output, rows.shape, (len(rows), *self.array.shape[1:]))
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
                "shape": [int(side) for side in self.array.shape[1:]],
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

    def _allocate(self, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
        """The whole file at once: a full disk is found out now and not after hours; and there it is whole or not."""
        with atomic(self.folder / _FEATURES) as partial:
            np.lib.format.open_memmap(partial, mode="w+", dtype=self.dtype, shape=(self.rows, *shape)).flush()
            with partial.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        return self._map()


def _forward(job: _Job, outputs: Sequence[Output], shards: Sequence[int]) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(shard, first row, one (b, ...) tensor an output) batch after batch over the shards, on the CPU."""
    rows = len(job.data.ids)
    batches = [
        range(start, min(start + job.batch_size, shard * SHARD + _shard_rows(shard, rows)))
        for shard in shards
        for start in range(shard * SHARD, shard * SHARD + _shard_rows(shard, rows), job.batch_size)
    ]
    loader = images_in_order(job.data, job.preprocess, batches, job.workers, pin=job.pin_memory)
    encoder = Encoder(
        job.backbone, outputs, job.preprocess, job.device, job.precision, job.batch_size, job.channels_last,
        job.progress, kind=job.kind,
    )  # fmt: skip
    with encoder:
        for batch, inputs in zip(batches, loader, strict=True):
            tensors = [tensor.cpu() for tensor in encoder(inputs)]
            for output, tensor in zip(outputs, tensors, strict=True):
                if len(tensor) != len(batch):
                    raise _other_shape(output, tuple(tensor.shape), (len(batch), *tensor.shape[1:]))
            yield batch.start // SHARD, batch.start, tensors


def _shard_rows(shard: int, rows: int) -> int:
    return min(SHARD, rows - shard * SHARD)


def _check_options(precision: str, dtype: str, batch_size: int | Literal["auto"]) -> None:
    for name, value, known in (("precision", precision, AUTOCAST), ("feature dtype", dtype, _DTYPES)):
        if value not in known:
            raise UsageError(
                f"{name} {value!r} is unknown",
                cause=f"known are {', '.join(known)}",
                fix="choose one of them",
            )
    if batch_size != "auto" and batch_size < 1:
        raise UsageError(f"batch size {batch_size}", cause="a batch holds at least one image", fix="leave it at auto")


def _other_shape(output: Output, shape: tuple[int, ...], expected: tuple[int, ...]) -> BackboneError:
    return BackboneError(
        f"{output.name!r} is {shape} for {expected[0]} rows",
        cause=f"{expected} was expected: one entry a row, and all rows of one shape",
        fix="pool it (/avg or /max), show all rows at one size, or name another layer",
    )


def _not_finite(output: Output, block: Tensor, dtype: np.dtype[Any]) -> BackboneError:
    if torch.isfinite(block).all():
        return BackboneError(
            f"features of {output.name!r} do not fit into {dtype.name}",
            cause=f"their largest magnitude is {float(block.abs().max()):.3g}",
            fix="store them as float32",
        )
    bad = int((~torch.isfinite(block)).flatten(1).any(1).sum())
    return BackboneError(
        f"features of {output.name!r} are not finite",
        cause=f"{bad} of {len(block)} rows of a batch gave NaN or infinity",
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
    for function in (backbone._look, backbone.forward, *backbone.towers.values()):
        names.add(getattr(function, "__module__", None) or type(function).__module__)
    return source_digest(name for name in names if name.partition(".")[0] != "torch")


def _complete(folder: Path) -> bool:
    return (folder / _MANIFEST).exists()


def _open(folder: Path, rows: int) -> Floats:
    """Map a complete entry, and note its use. Raises :class:`DataError` where it is damaged."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        array: Floats = np.load(folder / _FEATURES, mmap_mode="r", allow_pickle=False)
        if array.shape != (rows, *manifest["shape"]) or array.dtype.name != manifest["dtype"]:
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
        folder.name, manifest.get("key", {}), manifest.get("rows", 0), _row_shape(manifest), size,
        (used if used.exists() else folder).stat().st_mtime, bool(manifest),
    )  # fmt: skip


def _row_shape(manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """Of one row; entries of the first format have vectors alone."""
    return tuple(manifest.get("shape", (manifest.get("width", 0),)))


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
