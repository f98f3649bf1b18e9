"""Resizing images to the same pixels on every processor."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

__all__ = ["resize"]


def resize(
    pixels: Tensor, height: int, width: int, interpolation: Literal["bilinear", "bicubic"] = "bilinear"
) -> Tensor:
    """``pixels`` (..., H, W), antialiased, as Pillow does it.

    Bytes on a processor are resized in fixed point, which gives the same bytes on every one. torchvision does so only
    where it has AVX2, and in floating point elsewhere, a grey level apart; on other devices, and for other numbers,
    torchvision does it.
    """
    if pixels.shape[-2:] == (height, width):
        return pixels
    if pixels.dtype == torch.uint8 and pixels.device.type == "cpu":
        stacked = pixels.reshape(1, -1, *pixels.shape[-2:])
        sized = F.interpolate(stacked, (height, width), mode=interpolation, antialias=True)
        return sized.reshape(*pixels.shape[:-2], height, width)
    mode = InterpolationMode(interpolation)
    return cast(Tensor, vision.resize(pixels, [height, width], mode, antialias=True))
