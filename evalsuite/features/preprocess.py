"""How an image of any size becomes a network's input."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median_low
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as image_ops

from evalsuite.backbone import BackboneSpec
from evalsuite.errors import DataError, UsageError
from evalsuite.resize import resize

__all__ = ["SMALL", "Preprocess", "planes"]

SMALL = 96  # pixels of the shorter side: CIFAR, MedMNIST, Tiny ImageNet and STL-10, and networks for them


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

        ``shape(index)`` gives (..., height, width, channels) of an image, or (height, width), or raises
        :class:`DataError` where it does not decode; at most 64 evenly spaced ones are looked at. Where the input's
        shorter side is at most ``small`` pixels, or that of the median image, or where all images have the network's
        size, images are shown without a margin: ``crop`` with a ratio of 1. Networks for small images are trained on
        whole ones, a small image is all object, and one of the right size was made so. Else ``crop`` with ``ratio``, as
        networks for photographs are evaluated.
        """
        if self.rule != "auto":
            return self
        whole = min(self.size) <= small
        if not whole:
            sizes = _sizes(shape, count)
            whole = bool(sizes) and (median_low(map(min, sizes)) <= small or set(sizes) == {self.size})
        return dataclasses.replace(self, rule="crop", ratio=1.0 if whole else self.ratio)

    def __call__(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """(..., H, W, C) uint8, an image or frames, to (..., C, *size) uint8.

        Raises :class:`DataError` for one that does not fit.
        """
        return self.sized(planes(image))

    def sized(self, pixels: Tensor) -> Tensor:
        """The same for (..., H, W) uint8, on its device: the last two axes are height and width."""
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
            top, left = (height - inner.shape[-2]) // 2, (width - inner.shape[-1]) // 2
            bottom, right = height - inner.shape[-2] - top, width - inner.shape[-1] - left
            return torch.nn.functional.pad(inner, [left, right, top, bottom])
        if tuple(pixels.shape[-2:]) != self.size:
            raise DataError(
                f"an image has {pixels.shape[-1]}x{pixels.shape[-2]} pixels, not {width}x{height}",
                cause="the preprocessing takes images as they are",
                fix="choose a rule that resizes: crop, squash or pad",
            )
        return pixels

    def covering(self, pixels: Tensor) -> Tensor:
        """(..., H, W) uint8 resized as for ``crop``, and not cut yet."""
        return self._scale(pixels, (round(self.size[0] / self.ratio), round(self.size[1] / self.ratio)), max)

    def _scale(self, pixels: Tensor, target: tuple[int, int], choose: Callable[[float, float], float]) -> Tensor:
        """Resize by one factor: of the two that make a side fit, the larger (cover) or the smaller."""
        height, width = pixels.shape[-2:]
        # The side that decides is exact; the other is cut to whole pixels, as torchvision does.
        if choose(target[0] / height, target[1] / width) == target[0] / height:
            return self._resize(pixels, target[0], max(1, target[0] * width // height))
        return self._resize(pixels, max(1, target[1] * height // width), target[1])

    def _resize(self, pixels: Tensor, height: int, width: int) -> Tensor:
        return resize(pixels, height, width, self.interpolation)


def _sizes(shape: Callable[[int], tuple[int, ...]], count: int, most: int = 64) -> list[tuple[int, int]]:
    """(height, width) of at most so many evenly spaced images, those left out that do not decode."""
    sizes = []
    for index in sorted({step * (count - 1) // max(1, most - 1) for step in range(most)}):
        with contextlib.suppress(DataError):
            sides = shape(index)
            height, width = sides if len(sides) == 2 else sides[-3:-1]
            sizes.append((height, width))
    return sizes


def planes(image: npt.NDArray[np.uint8]) -> Tensor:
    """(..., H, W, C) to (..., C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)
