"""What segmentation engines share: cutting training images, laying windows, counting label maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from evalsuite.backbone import Backbone, BackboneSpec
from evalsuite.data.segmentation import IGNORE, SegmentationSet
from evalsuite.engines._dense import Trainable, Trained, train_and_test
from evalsuite.errors import UsageError
from evalsuite.metrics.segmentation import Confusion, boundary_counts
from evalsuite.pictures import segmentation_rows
from evalsuite.protocols import SegmentationProtocol, Segmented
from evalsuite.resize import resize
from evalsuite.task import Setup

__all__ = [
    "Before",
    "Reading",
    "check",
    "key_of",
    "padded",
    "segmented",
    "stored_pair",
    "target_size",
    "train_and_segment",
    "training_sample",
    "windows",
]

TRIES = 10  # crops drawn for one that no class fills
SHIFT = 32 / 255  # brightness, and the ranges of contrast, saturation and hue: mmsegmentation's PhotoMetricDistortion
FACTOR = (0.5, 1.5)
HUE = 18 / 180

Size = tuple[int, int]


def train_and_segment(
    build: Callable[[], Trainable], backbone: Backbone, protocol: SegmentationProtocol, train: SegmentationSet,
    test: SegmentationSet, setup: Setup, version: str,
) -> Segmented:  # fmt: skip
    """Build the segmenter, train it (or go on from ``setup.work``), label every image of ``test``.

    What :class:`Trainable` reads of a test image is a :class:`_Counted`, as :class:`Reading` makes it.
    """
    key = key_of(backbone, protocol, train, setup, version)
    return segmented(train_and_test(build, protocol, len(test), setup, key=key, what="segment"), test)


def key_of(
    backbone: Backbone, protocol: SegmentationProtocol, train: SegmentationSet, setup: Setup, version: str
) -> str:
    """What names the training of this on that: a state of another key is not gone on from."""
    return f"{backbone.identity} {protocol.hash} {train.fingerprint} {setup.seed} {version}"


def segmented(found: Trained, test: SegmentationSet) -> Segmented:
    """What was found on the images of ``test``, its outputs being those of :class:`Reading`."""
    counted: list[_Counted] = found.outputs
    matrix = np.zeros((len(test.classes),) * 2, np.int64)
    for image in counted:
        matrix.reshape(-1)[image.cells] += image.pixels
    return Segmented(
        counts=np.stack([image.counts for image in counted]),
        boundary=np.stack([image.boundary for image in counted]),
        matrix=matrix,
        predictions={i: image.prediction for i, image in enumerate(counted) if image.prediction is not None},
        log=found.log,
        timings=found.timings,
        details=found.details,
    )


def check(protocol: SegmentationProtocol, classes: int, devices: int) -> None:
    """Raise :class:`UsageError` for a protocol that does not fit the data or the devices."""
    if protocol.class_weights and len(protocol.class_weights) != classes:
        raise UsageError(
            f"{len(protocol.class_weights)} class weights for {classes} classes",
            cause="each class has one, in the order of the data's classes",
            fix="list as many, or none: --set class_weights=[]",
        )
    if protocol.head in ("psp", "upernet", "deeplabv3plus") and protocol.batch_size < 2 * devices:
        raise UsageError(
            f"a batch of {protocol.batch_size} images on {devices} devices",
            cause=f"{protocol.head} norms an average over each image; a single one on a device has no variance",
            fix=f"--set batch_size={2 * devices}",
        )


class Before:
    """The features that go into a backbone's last stage: of a ResNet those of the stage before it, whatever its
    stride, else the map of the next finer stride."""

    def __init__(self, body: Backbone) -> None:
        strides = body.spec.strides
        self.stride, self.channels = (found := sorted(strides)[-2:][0]), strides[found]
        self.hooked, self.kept = "stages" in body.gives, list[Tensor]()
        if self.hooked:
            tail = body.split()[1]
            self.channels = next(m for m in tail.modules() if isinstance(m, nn.Conv2d)).in_channels
            tail.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.kept[:] = inputs

    def take(self, maps: Mapping[int, Tensor]) -> Tensor:
        """Once after each forward pass that gave ``maps``."""
        return self.kept.pop() if self.hooked else maps[self.stride]


# --- training images ---------------------------------------------------------------------------------------------


def training_sample(
    data: SegmentationSet, protocol: SegmentationProtocol, spec: BackboneSpec, index: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Image ``index`` sized, cut, mirrored and coloured as ``seed`` draws it: (3,h,w) uint8, and its mask (h,w) uint8.

    Both are ``protocol.crop`` large. Where the image is smaller it is padded below and to the right with the
    network's mean colour, which is zero once normalised, and the mask with IGNORE.
    """
    rng = np.random.default_rng(seed)
    image, mask = torch.from_numpy(data.image(index)).permute(2, 0, 1), torch.from_numpy(data.mask(index))
    size = target_size((mask.shape[0], mask.shape[1]), protocol, float(rng.uniform(*protocol.scale)))
    image, mask = resize(image, *size), vision.resize(mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
    top, left = _place(mask, protocol, rng)
    height, width = protocol.crop
    image, mask = image[:, top : top + height, left : left + width], mask[top : top + height, left : left + width]
    if rng.random() < protocol.flip:
        image, mask = image.flip(-1), mask.flip(-1)
    if protocol.photometric:
        image = _coloured(image, rng)
    lacking = (0, width - mask.shape[1], 0, height - mask.shape[0])
    padded = torch.stack([F.pad(c, lacking, value=round(255 * m)) for c, m in zip(image, spec.mean, strict=True)])
    return padded, F.pad(mask, lacking, value=IGNORE)


def target_size(size: Size, protocol: SegmentationProtocol, factor: float = 1.0) -> Size:
    """The (height, width) an image of ``size`` is given: by ``short_side``, and by ``factor`` besides."""
    if protocol.short_side is not None:
        factor *= protocol.short_side / min(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _place(mask: Tensor, protocol: SegmentationProtocol, rng: np.random.Generator) -> tuple[int, int]:
    """The top left corner of the crop."""
    room = [max(0, side - crop) + 1 for side, crop in zip(mask.shape, protocol.crop, strict=True)]
    for _ in range(TRIES):
        top, left = (int(rng.integers(free)) for free in room)
        if protocol.crop_share >= 1:
            break
        inside = mask[top : top + protocol.crop[0], left : left + protocol.crop[1]]
        counts = np.bincount(inside.flatten().numpy(), minlength=256)[:IGNORE]
        if (counts > 0).sum() > 1 and counts.max() < protocol.crop_share * counts.sum():
            break
    return top, left


def _coloured(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Each of brightness, contrast, saturation and hue changed with probability one half; contrast third or last."""
    pixels = image.float() / 255
    contrast_last = rng.random() < 0.5

    def contrast(x: Tensor) -> Tensor:
        return x * float(rng.uniform(*FACTOR)) if rng.random() < 0.5 else x

    if rng.random() < 0.5:
        pixels = pixels + float(rng.uniform(-SHIFT, SHIFT))
    if not contrast_last:
        pixels = contrast(pixels)
    pixels = pixels.clamp(0, 1)
    if rng.random() < 0.5:
        pixels = vision.adjust_saturation(pixels, float(rng.uniform(*FACTOR)))
    if rng.random() < 0.5:
        pixels = vision.adjust_hue(pixels, float(rng.uniform(-HUE, HUE)))
    if contrast_last:
        pixels = contrast(pixels)
    return pixels.clamp(0, 1).mul(255).round().to(torch.uint8)


# --- test images -------------------------------------------------------------------------------------------------


def padded(size: Size, unit: int, corners: bool) -> Size:
    """The next larger size whose sides are multiples of ``unit`` (of which the corners are aligned: and one)."""
    height, width = (-(-(side - corners) // unit) * unit + corners for side in size)
    return height, width


def stored_pair(data: SegmentationSet, index: int) -> tuple[Tensor, Tensor]:
    """The image (3,H,W) and its mask (H,W), uint8, as stored."""
    return torch.from_numpy(data.image(index)).permute(2, 0, 1), torch.from_numpy(data.mask(index))


def windows(size: Size, protocol: SegmentationProtocol) -> Iterator[tuple[slice, slice]]:
    """The windows that cover an image of ``size``; the last of a row or column is moved back to its edge."""
    starts = []
    for side, crop, stride in zip(size, protocol.crop, protocol.stride, strict=True):
        last = max(side - crop, 0)
        starts.append([min(i * stride, last) for i in range(-(-last // stride) + 1)])
    for top in starts[0]:
        for left in starts[1]:
            yield slice(top, top + protocol.crop[0]), slice(left, left + protocol.crop[1])


@dataclass(frozen=True)
class _Counted:
    """One test image: counts (C, 3) of all pixels and of the boundaries, what of the confusion matrix is not zero,
    and its labels where they are kept."""

    counts: npt.NDArray[np.int64]
    boundary: npt.NDArray[np.int64]
    cells: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.int64]
    prediction: npt.NDArray[np.uint8] | None


class Reading:
    """Counts what is predicted of each image of ``data``; of those to be pictured the labels are kept."""

    def __init__(self, data: SegmentationSet) -> None:
        self.classes, self.kept = len(data.classes), set(segmentation_rows(data))

    def __call__(self, index: int, view: Any, prediction: Tensor) -> _Counted:
        """``view`` ends with the mask (H,W); ``prediction`` is (H,W) of the same size, on any device."""
        truth = view[-1]
        confusion = Confusion(self.classes)
        confusion.update(prediction, truth.to(prediction.device))
        labels = prediction.to("cpu", torch.uint8).numpy()
        flat = confusion.matrix.reshape(-1)
        cells = np.flatnonzero(flat)
        return _Counted(
            counts=confusion.counts[0],
            boundary=boundary_counts(labels, truth.cpu().numpy(), self.classes),
            cells=cells,
            pixels=flat[cells],
            prediction=labels if index in self.kept else None,
        )
