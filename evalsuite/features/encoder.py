"""Batches of images through a frozen backbone, in as many parts as memory asks for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """What a network runs in, on ``device``: nothing for ``32-true``, else bfloat16 or float16 for what stands it."""
    kind = AUTOCAST[precision]
    return torch.autocast(device.type, kind, enabled=kind is not None)


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
            return self.preprocess(image) if self.preprocess.resize == "workers" else planes(image)
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
        self.most = FIRST_BATCH.get(device.type, 64) if most is None else most
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
