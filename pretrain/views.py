"""How samples are looked at, as data: an Augment is a value that can be compared, changed and called."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from evalsuite.resize import resize
from pretrain.batch import Sample, View

__all__ = [
    "Augment",
    "Centre",
    "Jitter",
    "moco_v1",
    "moco_v2",
    "multi_crop",
    "pixpro_pair",
    "simclr",
    "solo_asymmetric",
    "solo_symmetric",
    "swav",
]

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
ORDERS = tuple(permutations(range(4)))
# Grey levels of 1, and a little more: greys have weights of four decimals, so that some lie exactly between two levels,
# where the last digit, which differs between processors, would decide.
LEVELS = 255 * (1 + 2**-20)
ATTEMPTS = 10  # at a crop of the requested area and ratio, before a central one is taken


@dataclass(frozen=True)
class Jitter:
    """Colour jitter, applied with probability ``p``: factors of brightness, contrast and saturation are uniform in
    [max(0, 1 - s), 1 + s], the hue turns by a share of the circle uniform in [-hue, hue]. The four come in random
    order unless ``fixed``. ``jitter / 2`` is half as strong."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    p: float = 0.8
    fixed: bool = False

    def __post_init__(self) -> None:
        if min(self.brightness, self.contrast, self.saturation) < 0 or not 0 <= self.hue <= 0.5:
            raise ValueError(f"strengths are at least 0 and a hue at most 0.5: {self}")

    def __mul__(self, factor: float) -> Jitter:
        return replace(
            self,
            brightness=self.brightness * factor,
            contrast=self.contrast * factor,
            saturation=self.saturation * factor,
            hue=self.hue * factor,
        )

    def __truediv__(self, divisor: float) -> Jitter:
        return self * (1 / divisor)


@dataclass(frozen=True)
class Augment:
    """Random crop, flip, colour jitter, grey, blur and solarisation of an image, in that order: a look.

    ``augment(sample, rng)`` reads ``sample["image"]``, (3,H,W) uint8, and gives a :class:`View` of
    (3,size,size) uint8 with the box of its crop; nothing is normalised, for backbones do that themselves. ``crop``
    and ``ratio`` are the ranges of the crop's share of the area and of its width over height (log-uniform), as
    torchvision's RandomResizedCrop; without a crop the image is resized whole. ``flip``, ``gray``, ``blur`` and
    ``solarize`` are probabilities. The blur is a Gaussian whose standard deviation in pixels is uniform in ``sigma``
    and whose kernel is ``kernel`` of the side, rounded up to odd (SimCLR: 0.1), or reaches three deviations where that
    is 0. Solarisation inverts values from 128 on. ``gray_first`` puts grey before the jitter (MoCo v1).

    Each effect draws from its own place in the stream, so that changing one leaves the others' numbers alone.
    """

    size: int = 224
    crop: tuple[float, float] | None = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: float = 0.5
    jitter: Jitter | None = Jitter()
    gray: float = 0.2
    gray_first: bool = False
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    kernel: float = 0.0
    solarize: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1 or (self.crop and not 0 < self.crop[0] <= self.crop[1] <= 1):
            raise ValueError(f"a crop takes a share of the area in (0,1] to a positive size: {self}")
        if any(not 0 <= p <= 1 for p in (self.flip, self.gray, self.blur, self.solarize)):
            raise ValueError(f"probabilities lie in [0,1]: {self}")

    def __call__(self, sample: Sample, rng: torch.Generator) -> View:
        image: Tensor = sample["image"]
        draws = torch.rand(2 * ATTEMPTS + 14, generator=rng, dtype=torch.float64).tolist()
        (top, left, height, width), draws = self._crop(image, draws[: 2 * ATTEMPTS + 2]), draws[2 * ATTEMPTS + 2 :]
        flipped, jittered, grey, blurred, inverted = (
            u < p
            for u, p in zip(
                draws[:5],
                (self.flip, self.jitter.p if self.jitter else 0, self.gray, self.blur, self.solarize),
                strict=True,
            )
        )
        cut = image[:, top : top + height, left : left + width]
        pixels = resize(cut, self.size, self.size, self.interpolation)
        if flipped:
            pixels = V.horizontal_flip_image(pixels)
        if jittered or grey or blurred or inverted:
            pixels = pixels / 255
            if grey and self.gray_first:
                pixels = V.rgb_to_grayscale_image(pixels, 3)
            if jittered and self.jitter:
                pixels = _jitter(pixels, self.jitter, draws[5:10])
            if grey and not self.gray_first:
                pixels = V.rgb_to_grayscale_image(pixels, 3)
            if blurred:
                pixels = self._blur(pixels, self.sigma[0] + draws[10] * (self.sigma[1] - self.sigma[0]))
            if inverted:
                pixels = torch.where(pixels >= 128 / 255, 1 - pixels, pixels)
            pixels = (pixels * LEVELS).round_().to(torch.uint8)
        return View(pixels, _box((top, left, height, width), image.shape[1:], flipped))

    def _crop(self, image: Tensor, draws: list[float]) -> Box:
        height, width = image.shape[1:]
        if self.crop is None:
            return 0, 0, height, width
        low, high = (math.log(r) for r in self.ratio)
        for i in range(ATTEMPTS):
            area = height * width * (self.crop[0] + draws[2 * i] * (self.crop[1] - self.crop[0]))
            ratio = math.exp(low + draws[2 * i + 1] * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(draws[-2] * (height - h + 1)), int(draws[-1] * (width - w + 1)), h, w
        w, h = width, height  # the image is narrower than any ratio: the largest central crop of the nearest one
        if width / height < self.ratio[0]:
            h = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            w = round(height * self.ratio[1])
        return (height - h) // 2, (width - w) // 2, h, w

    def _blur(self, pixels: Tensor, sigma: float) -> Tensor:
        reach = max(1, int(self.kernel * self.size) // 2) if self.kernel else math.ceil(3 * sigma)
        reach = min(reach, self.size - 1)  # a mirrored border is no wider than the image
        offsets = torch.arange(-reach, reach + 1, dtype=pixels.dtype)
        weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
        weights = weights / weights.sum()
        padded = F.pad(pixels[:, None], [reach] * 4, mode="reflect")
        return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))[:, 0]


def _jitter(pixels: Tensor, jitter: Jitter, draws: list[float]) -> Tensor:
    """The four effects, in an order drawn by the last number unless it is fixed."""
    order = ORDERS[0 if jitter.fixed else int(draws[4] * len(ORDERS))]
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation)
    effects = (V.adjust_brightness_image, V.adjust_contrast_image, V.adjust_saturation_image)
    for which in order:
        if which == 3:
            if jitter.hue:
                pixels = V.adjust_hue_image(pixels, (2 * draws[3] - 1) * jitter.hue)
        elif strength := strengths[which]:
            low = max(0.0, 1 - strength)
            pixels = effects[which](pixels, low + draws[which] * (1 + strength - low))
    return pixels


def _box(crop: Box, size: torch.Size, flipped: bool) -> Tensor:
    """The crop in coordinates in which the centres of the outermost pixels lie at 0 and 1; x0 > x1 where flipped
    (PixPro, contrast/data/transform.py)."""
    top, left, height, width = crop
    down, right = max(1, size[0] - 1), max(1, size[1] - 1)
    x0, x1 = left / right, (left + width - 1) / right
    box = (x1 if flipped else x0, top / down, x0 if flipped else x1, (top + height - 1) / down)
    return torch.tensor(box, dtype=torch.float32)


@dataclass(frozen=True)
class Centre:
    """The middle of an image: its shorter side resized to ``size / share``, then a central square of ``size``. It
    draws nothing; evaluation sees images so."""

    size: int = 224
    share: float = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __call__(self, sample: Sample, rng: torch.Generator | None = None) -> View:
        image: Tensor = sample["image"]
        height, width = image.shape[1:]
        scale = self.size / self.share / min(height, width)
        tall, wide = max(self.size, round(height * scale)), max(self.size, round(width * scale))
        sized = resize(image, tall, wide, self.interpolation)
        return View(V.center_crop_image(sized, [self.size, self.size]))


# What papers did -------------------------------------------------------------------------------------------


def moco_v1(size: int = 224) -> Augment:
    """MoCo v1 (facebookresearch/moco): grey before a jitter that is always on, hue at 0.4."""
    return Augment(size, jitter=Jitter(0.4, 0.4, 0.4, 0.4, p=1.0), gray_first=True)


def moco_v2(size: int = 224, blur: float = 0.5) -> Augment:
    """MoCo v2 (``--aug-plus``), which SimSiam took over. ``blur`` 0 is for images of 32 pixels."""
    return Augment(size, blur=blur)


def simclr(size: int = 224, strength: float = 1.0, blur: float = 0.5) -> Augment:
    """SimCLR (google-research/simclr). On CIFAR: strength 0.5 and no blur."""
    jitter = Jitter(0.8, 0.8, 0.8, 0.2) * strength
    return Augment(size, crop=(0.08, 1.0), jitter=jitter, blur=blur, kernel=0.1)


def pixpro_pair(size: int = 224) -> tuple[Augment, Augment]:
    """PixPro's two views (zdaxie/PixPro): the first always blurred, the second rarely blurred and sometimes
    solarised; their boxes tell which pixels meet."""
    first = Augment(size, crop=(0.08, 1.0), jitter=Jitter(0.4, 0.4, 0.2, 0.1), blur=1.0)
    return first, replace(first, blur=0.1, solarize=0.2)


def multi_crop(*crops: tuple[int, Augment]) -> tuple[Augment, ...]:
    """So many looks of each kind: ``multi_crop((2, large), (6, small))``."""
    return tuple(augment for count, augment in crops for _ in range(count))


def swav(
    large: int = 224,
    small: int = 96,
    counts: tuple[int, int] = (2, 6),
    *,
    areas: tuple[float, float, float, float] = (0.14, 1.0, 0.05, 0.14),
    strength: float = 1.0,
    blur: float = 0.5,
) -> tuple[Augment, ...]:
    """SwAV's multi-crop (facebookresearch/swav): two large crops of 14 to 100 percent of the image, six small ones of
    5 to 14 percent, which is what ``areas`` says as shares."""
    jitter = Jitter(0.8, 0.8, 0.8, 0.2) * strength
    first = Augment(large, crop=areas[:2], jitter=jitter, blur=blur)
    return multi_crop((counts[0], first), (counts[1], replace(first, size=small, crop=areas[2:])))


def solo_symmetric(size: int = 32) -> Augment:
    """What AdaInf's SimCLR baseline sees on CIFAR (solo-learn, ``symmetric.yaml``)."""
    jitter = Jitter(0.8, 0.8, 0.8, 0.2)
    return Augment(size, crop=(0.08, 1.0), interpolation="bicubic", jitter=jitter, blur=0.5)


def solo_asymmetric(size: int = 32) -> tuple[Augment, Augment]:
    """What AdaInf's BYOL baseline sees on CIFAR (solo-learn, ``asymmetric.yaml``)."""
    jitter = Jitter(0.4, 0.4, 0.2, 0.1)
    first = Augment(size, crop=(0.08, 1.0), interpolation="bicubic", jitter=jitter)
    return first, replace(first, solarize=0.2)
