"""Batches of images through a frozen backbone, in as many parts as memory asks for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset

from evalsuite.backbone import Backbone
from evalsuite.errors import DataError, ResourceError
from evalsuite.features.outputs import Output, Taps
from evalsuite.features.preprocess import Preprocess, planes
from evalsuite.progress import Progress
from evalsuite.signals import ignore_signals

__all__ = ["AUTOCAST", "FIRST_BATCH", "Encoder", "ImageSet", "autocast", "images_in_order"]

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
FIRST_BATCH = {"cuda": 1024, "cpu": 64}


class ImageSet(Protocol):
    """A split of a data set, as the cache reads it.

    ``fingerprint`` digests the data, ``split`` names the part, ``ids`` name the rows. An item is (H, W, 3) uint8
    RGB and is read in worker processes; of a data set whose attribute ``kind`` says so it is a clip (T, H, W, 3), a
    text, or an array of another kind (:data:`evalsuite.backbone.KINDS`). Where there is ``__getitems__``, which takes
    a list of rows and gives their items in that order, the rows of a batch are read by one call: a decoder of videos
    need not begin anew for each frame. Labels pass through untouched and are no part of the key.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Any: ...
    def __getitem__(self, index: int, /) -> Any: ...


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """What a network runs in, on ``device``: nothing for ``32-true``, else bfloat16 or float16 for what stands it."""
    kind = AUTOCAST[precision]
    return torch.autocast(device.type, kind, enabled=kind is not None)


class _Packed(NamedTuple):
    """Images of any sizes as one tensor, for one message from a worker and one copy to the device."""

    pixels: Tensor
    shapes: list[torch.Size]

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> _Packed:
        return cls(torch.cat([image.reshape(-1) for image in images]), [image.shape for image in images])

    def unpack(self, device: torch.device) -> list[Tensor]:
        """The images (..., C, H, W), on the device."""
        parts = self.pixels.to(device, non_blocking=True).split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class _Reader(TorchDataset[Any]):
    """Rows for a loader's workers, through the preprocessing where they are to do it (None: as they are).

    A refusal is handed over as it is: one that is raised in a worker comes out as a text about processes.
    """

    def __init__(self, data: ImageSet, preprocess: Preprocess | None) -> None:
        self.data, self.preprocess = data, preprocess

    def __getitem__(self, index: int) -> Any:
        try:
            return self._sized(self.data[index])
        except DataError as error:
            return error

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The rows of a batch, by one call of the data where they take many."""
        read = getattr(self.data, "__getitems__", None)
        if read is None:
            return [self[index] for index in indices]
        try:
            rows = read(indices)
            if len(rows) != len(indices):
                raise _miscounted(self.data, len(rows), len(indices))
            return [self._sized(row) for row in rows]
        except DataError as error:
            return [error]

    def _sized(self, row: Any) -> Any:
        if self.preprocess is None:
            return row if isinstance(row, str) else torch.as_tensor(row)
        return self.preprocess(row) if self.preprocess.resize == "workers" else planes(row)

    def batch(self, rows: Sequence[Any]) -> Any:
        """Rows as one batch: a tensor, packed images, or texts; or the first refusal among them."""
        for row in rows:
            if isinstance(row, DataError):
                return row
        if isinstance(rows[0], str):
            return list(rows)
        if self.preprocess is not None and self.preprocess.resize == "device":
            return _Packed.of(rows)
        return default_collate(list(rows))  # in a worker, straight into memory that is shared


def _miscounted(data: ImageSet, given: int, asked: int) -> DataError:
    return DataError(
        f"split {data.split!r} gave {given} rows where {asked} were asked for",
        cause=f"__getitems__ of its {type(data).__name__} gives one item for each row in its list, in that order",
        fix="correct what reads the data",
    )


def images_in_order(
    data: ImageSet,
    preprocess: Preprocess | None,
    batches: Sequence[Sequence[int]],
    workers: int | Literal["auto"],
    pin: bool = False,
) -> Iterator[Any]:
    """Batches of rows by number, each as :class:`Encoder` takes them; without ``preprocess`` they are no pixels.

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


class Encoder:
    """A frozen backbone in evaluation mode on its device; as it was, but for the device, when the block ends.

    ``encoder(batch)`` takes (B, 3, H, W) uint8 (or what :func:`images_in_order` gives) through the network in as many
    parts as memory asks for. ``most`` is how many images are tried at once. ``kind`` is what the batch is of (None:
    what the backbone's spec says); without ``preprocess`` it goes into the network as it is, not as pixels.
    """

    def __init__(
        self,
        backbone: Backbone,
        outputs: Sequence[Output],
        preprocess: Preprocess | None,
        device: torch.device,
        precision: str = "32-true",
        most: int | None = None,
        channels_last: bool | None = None,
        progress: Progress | None = None,
        whole: bool = False,
        kind: str | None = None,
    ) -> None:
        self.backbone, self.preprocess, self.device, self.precision = backbone, preprocess, device, precision
        self.most = FIRST_BATCH.get(device.type, 64) if most is None else most
        self.channels_last = device.type == "cuda" if channels_last is None else channels_last
        self.progress = progress or Progress(quiet=True)
        self.taps = Taps(backbone, outputs, whole, kind)

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

    def __call__(self, batch: Any) -> list[Tensor]:
        """One tensor an output, on the device."""
        rows = batch.unpack(self.device) if isinstance(batch, _Packed) else batch
        parts: list[list[Tensor]] = []
        start = 0
        while start < len(rows):
            part = rows[start : start + self.most]
            features = self._attempt(part)
            if features is None:
                self._halve(len(part))
            else:
                parts.append(features)
                start += len(part)
        return parts[0] if len(parts) == 1 else [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    def _attempt(self, rows: Any) -> list[Tensor] | None:
        """None where memory does not suffice."""
        try:
            batch = self._input(rows)
            with torch.no_grad(), autocast(self.device, self.precision):
                return self.taps(batch)
        except (torch.OutOfMemoryError, MemoryError):
            return None
        except RuntimeError as error:  # what torch raises on a CPU
            if "can't allocate memory" in str(error):
                return None
            raise

    def _input(self, rows: Any) -> Any:
        """What the network is shown: pixels in [0, 1] on the device, or what are no pixels as they are."""
        if self.preprocess is None:
            return rows.to(self.device, non_blocking=True) if isinstance(rows, Tensor) else rows
        if isinstance(rows, list):
            rows = torch.stack([self.preprocess.sized(image) for image in rows])
        batch = rows.to(self.device, non_blocking=True)
        if self.channels_last and batch.ndim == 4:
            batch = batch.contiguous(memory_format=torch.channels_last)
        return batch.float() / 255

    def _halve(self, size: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            of = "" if self.preprocess is None else f" of {self.preprocess.size}"
            raise ResourceError(
                f"one {self.taps.kind}{of} does not fit into the memory of {self.device}",
                cause="the network needs more than is free",
                fix="free memory, use --precision bf16-mixed, or another device",
            )
        self.most = size // 2
        self.progress.say(f"encode: out of memory at {size} images; going on with {self.most} at a time")


def _measured_workers(reader: _Reader, rows: int, probe: int = 8, patience: float = 2.0) -> int:
    """0 where reading all takes less than starting workers does, else one a core but one, at most 16."""
    start = time.perf_counter()
    reader.__getitems__(list(range(min(probe, rows))))
    whole = (time.perf_counter() - start) / max(1, min(probe, rows)) * rows
    return 0 if whole < patience else max(1, min(16, len(os.sched_getaffinity(0)) - 1))
