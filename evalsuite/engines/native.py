"""Semantic segmentation on torch's and torchvision's parts: any backbone, nothing to compile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from evalsuite.backbone import Backbone
from evalsuite.data.images import DECODING
from evalsuite.data.segmentation import IGNORE, SegmentationSet
from evalsuite.engines._dense import OnBackbone, Trainable, optimizer_of
from evalsuite.engines._segmentation import (
    Before,
    Reading,
    check,
    padded,
    stored_pair,
    target_size,
    train_and_segment,
    training_sample,
    windows,
)
from evalsuite.features import Preprocess
from evalsuite.protocols import SegmentationProtocol, Segmented
from evalsuite.pyramid import Levels
from evalsuite.resize import resize
from evalsuite.seeding import seeded
from evalsuite.task import Setup

__all__ = ["CachedSegmenter", "Native", "Segmenter", "build_head", "build_model"]

POOLS = (1, 2, 3, 6)
ATROUS = (6, 12, 18)  # at stride 16
CHUNK = 32  # classes whose logits are resampled at once
_BATCH = 16  # images encoded at once: they are large

Size = tuple[int, int]
Maps = Mapping[int, Tensor]


class Native:
    """The default engine. Where it departs from mmsegmentation's segmenters:

    the loss is averaged over labelled pixels (mmsegmentation: over all); images whose sides are no multiple of the
    coarsest stride are padded to one, so that logits lie where their pixels are; the spatial pyramid of DeepLabV3+
    is torchvision's, with plain convolutions; weights of convolutions start as torch has them.
    """

    name = "native"
    job = "segment"

    def version(self) -> str:
        return f"torchvision {torchvision.__version__}"

    def segment(
        self,
        backbone: Backbone,
        protocol: SegmentationProtocol,
        train: SegmentationSet,
        test: SegmentationSet,
        setup: Setup,
    ) -> Segmented:
        """Train on ``train`` as the protocol says, then label every image of ``test``.

        Raises :class:`BackboneError` where the backbone cannot be dilated as the protocol says, and
        :class:`UsageError` for a protocol that does not fit the data.
        """
        check(protocol, len(train.classes), setup.devices)
        if protocol.encode is not None:
            return _segment_cached(backbone, protocol, train, test, setup, self.version())

        def build() -> Trainable:
            model = build_model(backbone, protocol, len(train.classes), setup.seed)
            return Trainable(
                model=model,
                optimizer=optimizer_of(model, protocol),
                sample=partial(training_sample, train, protocol, backbone.spec),
                length=len(train),
                view=partial(stored_pair, test),
                read=Reading(test),
            )

        return train_and_segment(build, backbone, protocol, train, test, setup, self.version())


# --- heads: maps {stride: (B,C,h,w)} of an image to logits (B,K,h',w') -------------------------------------------


class _Linear(nn.Module):
    """A norm and a linear classifier at every place of the ``strides``, resampled to the finest of them."""

    def __init__(self, strides: Mapping[int, int], protocol: SegmentationProtocol, classes: int) -> None:
        super().__init__()
        self.strides, self.corners = sorted(strides)[-protocol.maps :], protocol.align_corners
        channels = sum(strides[s] for s in self.strides)
        self.norm = nn.BatchNorm2d(channels)
        self.classify = _classifier(channels, classes, protocol.dropout)

    def forward(self, maps: Maps, size: Size) -> Tensor:
        logits: Tensor = self.classify(self.norm(_together([maps[s] for s in self.strides], self.corners)))
        return logits


class _Fcn(nn.Module):
    """Convolutions on one map (Long et al. 2015; the dilated ones are MoCo's, appendix A.5)."""

    def __init__(
        self, stride: int, channels: int, classes: int, width: int, convs: int, *,
        dilation: int = 1, concat: bool = False, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stride = stride
        widths = [channels, *[width] * convs]
        self.convs = nn.Sequential(*(_conv(a, b, 3, dilation) for a, b in pairwise(widths)))
        self.merge = _conv(channels + widths[-1], width, 3) if concat else None
        self.classify = _classifier(width if concat else widths[-1], classes, dropout)

    def forward(self, maps: Maps, size: Size) -> Tensor:
        x = maps[self.stride]
        y = self.convs(x)
        logits: Tensor = self.classify(y if self.merge is None else self.merge(torch.cat([x, y], 1)))
        return logits


class _Context(nn.Module):
    """The pyramid pooling module: averages over 1, 4, 9 and 36 parts of a map beside the map itself."""

    def __init__(self, channels: int, width: int, corners: bool) -> None:
        super().__init__()
        self.corners = corners
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(parts), _conv(channels, width, 1)) for parts in POOLS
        )
        self.merge = _conv(channels + len(POOLS) * width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [_sized(pool(x), (x.shape[-2], x.shape[-1]), self.corners) for pool in self.pools]
        merged: Tensor = self.merge(torch.cat([x, *pooled], 1))
        return merged


class _Psp(nn.Module):
    """Zhao, Shi, Qi, Wang and Jia, Pyramid Scene Parsing Network (CVPR 2017)."""

    def __init__(self, strides: Mapping[int, int], protocol: SegmentationProtocol, classes: int) -> None:
        super().__init__()
        self.stride = max(strides)
        self.context = _Context(strides[self.stride], protocol.width, protocol.align_corners)
        self.classify = _classifier(protocol.width, classes, protocol.dropout)

    def forward(self, maps: Maps, size: Size) -> Tensor:
        logits: Tensor = self.classify(self.context(maps[self.stride]))
        return logits


class _UperNet(nn.Module):
    """Xiao, Liu, Zhou, Jiang and Sun, Unified Perceptual Parsing (ECCV 2018): a feature pyramid under a pooling one."""

    def __init__(self, channels: Mapping[int, int], protocol: SegmentationProtocol, classes: int) -> None:
        super().__init__()
        width, self.corners = protocol.width, protocol.align_corners
        self.fine = sorted(channels)[:-1]
        self.coarsest = max(channels)
        self.context = _Context(channels[self.coarsest], width, self.corners)
        self.laterals = nn.ModuleList(_conv(channels[level], width, 1) for level in self.fine)
        self.outputs = nn.ModuleList(_conv(width, width, 3) for _ in self.fine)
        self.merge = _conv(len(channels) * width, width, 3)
        self.classify = _classifier(width, classes, protocol.dropout)

    def forward(self, maps: Maps, size: Size) -> Tensor:
        top = self.context(maps[self.coarsest])
        levels = [top]
        for level, lateral in zip(reversed(self.fine), reversed(self.laterals), strict=True):
            here = lateral(maps[level])
            top = here + _sized(top, (here.shape[-2], here.shape[-1]), self.corners)
            levels.insert(0, top)
        finished = [out(level) for out, level in zip(self.outputs, levels, strict=False)]
        logits: Tensor = self.classify(self.merge(_together([*finished, levels[-1]], self.corners)))
        return logits


class _DeepLab(nn.Module):
    """Chen, Zhu, Papandreou, Schroff and Adam (ECCV 2018), DeepLabV3+: atrous pooling, then the map of stride 4."""

    def __init__(self, strides: Mapping[int, int], protocol: SegmentationProtocol, classes: int) -> None:
        super().__init__()
        self.coarse = max(strides)
        self.fine, self.corners = min(strides, key=lambda s: (abs(s - 4), s)), protocol.align_corners
        rates = [max(1, rate * 16 // self.coarse) for rate in ATROUS]
        self.context = ASPP(strides[self.coarse], rates, protocol.width)
        self.lateral = _conv(strides[self.fine], 48, 1)
        self.merge = nn.Sequential(
            _conv(protocol.width + 48, protocol.width, 3), _conv(protocol.width, protocol.width, 3)
        )
        self.classify = _classifier(protocol.width, classes, protocol.dropout)

    def forward(self, maps: Maps, size: Size) -> Tensor:
        fine = self.lateral(maps[self.fine])
        logits: Tensor = self.classify(self.merge(_together([fine, self.context(maps[self.coarse])], self.corners)))
        return logits


class _SegFormer(nn.Module):
    """The all-MLP head of Xie, Wang, Yu, Anandkumar, Alvarez and Luo, SegFormer (NeurIPS 2021)."""

    def __init__(self, channels: Mapping[int, int], protocol: SegmentationProtocol, classes: int) -> None:
        super().__init__()
        self.levels, self.corners = sorted(channels), protocol.align_corners
        self.laterals = nn.ModuleList(_conv(channels[level], protocol.width, 1) for level in self.levels)
        self.merge = _conv(len(channels) * protocol.width, protocol.width, 1)
        self.classify = _classifier(protocol.width, classes, protocol.dropout)

    def forward(self, maps: Maps, size: Size) -> Tensor:
        levels = [lateral(maps[level]) for level, lateral in zip(self.levels, self.laterals, strict=True)]
        logits: Tensor = self.classify(self.merge(_together(levels, self.corners)))
        return logits


class _OnLevels(nn.Module):
    """A head that reads maps of strides 4 to 32, whatever the backbone gives."""

    def __init__(self, levels: Levels, head: nn.Module) -> None:
        super().__init__()
        self.levels, self.head = levels, head

    def forward(self, maps: Maps, size: Size) -> Tensor:
        logits: Tensor = self.head(self.levels(maps, size), size)
        return logits


def build_head(strides: Mapping[int, int], protocol: SegmentationProtocol, classes: int) -> nn.Module:
    """The protocol's head on maps of these {stride: channels}: ``head(maps, size of the image)`` gives logits."""
    if protocol.head in ("upernet", "segformer"):
        levels = Levels(strides)
        kind = _UperNet if protocol.head == "upernet" else _SegFormer
        return _OnLevels(levels, kind(levels.channels, protocol, classes))
    if protocol.head == "fcn":
        coarsest = max(strides)
        return _Fcn(
            coarsest, strides[coarsest], classes, protocol.width, protocol.convs,
            dilation=protocol.head_dilation, concat=protocol.concat, dropout=protocol.dropout,
        )  # fmt: skip
    plain: dict[str, Callable[..., nn.Module]] = {"linear": _Linear, "psp": _Psp, "deeplabv3plus": _DeepLab}
    return plain[protocol.head](strides, protocol, classes)


def _conv(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Module:
    """A convolution without bias, its batch norm and ReLU."""
    block: nn.Module = Conv2dNormActivation(inputs, outputs, kernel, dilation=dilation)
    return block


def _classifier(channels: int, classes: int, dropout: float) -> nn.Module:
    last = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(last.weight, std=0.01)  # first predictions alike, whatever the features' size
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Dropout2d(dropout), last) if dropout else last


def _sized(x: Tensor, size: Size, corners: bool) -> Tensor:
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size, mode="bilinear", align_corners=corners)


def _together(levels: Sequence[Tensor], corners: bool) -> Tensor:
    """All resampled to the first, and concatenated."""
    size = levels[0].shape[-2], levels[0].shape[-1]
    return torch.cat([_sized(level, size, corners) for level in levels], 1)


# --- the model ---------------------------------------------------------------------------------------------------


class _Scored(nn.Module):
    """What turns logits into losses and labels."""

    weights: Tensor

    def __init__(self, protocol: SegmentationProtocol, classes: int) -> None:
        super().__init__()
        each = torch.tensor(protocol.class_weights or [1.0] * classes)
        self.register_buffer("weights", F.pad(each, (0, IGNORE + 1 - classes)), persistent=False)
        self.classes, self.corners = classes, protocol.align_corners

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """The mean cross-entropy of (B,K,H,W) over labelled pixels, weighted by class; 0 where there is none."""
        each = self.weights[: self.classes]
        total = F.cross_entropy(logits, masks, each, ignore_index=IGNORE, reduction="sum")
        return total / self.weights[masks].sum().clamp(min=torch.finfo(torch.float32).tiny)

    def labels(self, logits: Tensor, grow: Callable[[Tensor], Tensor]) -> Tensor:
        """The best class (H,W) uint8 of (1,K,h,w) grown to (1,K,H,W), some classes at a time to spare memory."""
        best, labels = (found[0] for found in grow(logits[:, :CHUNK]).max(1))
        for start in range(CHUNK, self.classes, CHUNK):
            value, place = (found[0] for found in grow(logits[:, start : start + CHUNK]).max(1))
            labels = torch.where(value > best, place + start, labels)
            best = torch.maximum(value, best)
        return labels.to(torch.uint8)


class Segmenter(OnBackbone):
    """A backbone and a head.

    Training: ``model(batch)`` of samples from :func:`training_sample` gives named losses. Evaluating: images (3,H,W)
    uint8 (with their masks, which are not looked at) give labels (H,W) uint8.
    """

    def __init__(self, body: Backbone, protocol: SegmentationProtocol, classes: int) -> None:
        super().__init__((body,), protocol)
        self.body, self.protocol = body, protocol
        self.head = build_head(body.spec.strides, protocol, classes)
        coarsest = max(body.spec.strides)
        self.unit = max(32, coarsest) if isinstance(self.head, _OnLevels) else coarsest
        self.auxiliary: nn.Module | None = None
        if protocol.auxiliary:
            self.before = Before(body)
            self.auxiliary = _Fcn(
                self.before.stride, self.before.channels, classes, protocol.auxiliary_width, 1,
                dilation=protocol.head_dilation, dropout=protocol.dropout,
            )  # fmt: skip
        self.scored = _Scored(protocol, classes)
        self.train()

    def forward(self, batch: list[Any]) -> Any:
        device = self.scored.weights.device
        if not self.training:
            return [self.predict(view[0].to(device, non_blocking=True)) for view in batch]
        images = torch.stack([image for image, _ in batch]).to(device, non_blocking=True)
        masks = torch.stack([mask for _, mask in batch]).to(device, non_blocking=True).long()
        size = images.shape[-2], images.shape[-1]
        maps = self._maps(images)
        logits = self.head(maps, self._padded(size)).float()
        losses = {"loss": self.scored.loss(self._grown(logits, size), masks)}
        if self.auxiliary is not None:
            other = self.auxiliary({self.before.stride: self.before.take(maps)}, self._padded(size)).float()
            losses["loss_auxiliary"] = self.protocol.auxiliary * self.scored.loss(self._grown(other, size), masks)
        return losses

    def _maps(self, images: Tensor) -> Maps:
        """The maps of (B,3,h,w) in 0 to 255, padded so that each place of the coarsest stands for as many pixels."""
        x = self.body.normalise(images.float() / 255)
        height, width = self._padded((x.shape[-2], x.shape[-1]))
        x = F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.protocol.freeze_backbone):
            return self.body.look(x).maps

    def _padded(self, size: Size) -> Size:
        return padded(size, self.unit, self.protocol.align_corners)

    def _grown(self, logits: Tensor, size: Size, original: Size | None = None) -> Tensor:
        """Logits of a padded image at the pixels of the image, and resampled from those to ``original``."""
        corners = self.protocol.align_corners
        grown = _sized(logits, self._padded(size), corners)[..., : size[0], : size[1]]
        return grown if original is None else _sized(grown, original, corners)

    def predict(self, image: Tensor) -> Tensor:
        """Labels (H,W) uint8 of an image (3,H,W) uint8, as the protocol looks at it."""
        mirrors = (False, True) if self.protocol.test_flip else (False,)
        views = [(scale, mirror) for scale in self.protocol.test_scales for mirror in mirrors]
        if len(views) == 1:
            return self.scored.labels(*self._view(image, *views[0]))
        total = torch.zeros((), device=image.device)
        for scale, mirror in views:
            logits, grow = self._view(image, scale, mirror)
            chances = grow(logits).softmax(1)
            total = total + (chances.flip(-1) if mirror else chances)
        return total[0].argmax(0).to(torch.uint8)

    def _view(self, image: Tensor, scale: float, mirror: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits (1,K,h,w) of one view, and what grows them, or those of some classes, to the image's size."""
        original = image.shape[-2], image.shape[-1]
        size = target_size(original, self.protocol, scale)
        pixels = resize(image.flip(-1) if mirror else image, *size)[None]
        if self.protocol.inference == "whole":
            logits = self.head(self._maps(pixels), self._padded(size)).float()
            return logits, partial(self._grown, size=size, original=original)
        total = torch.zeros(1, self.scored.classes, *size, device=image.device)
        hits = torch.zeros(size, device=image.device)
        for rows, columns in windows(size, self.protocol):
            part = pixels[:, :, rows, columns]
            inner = part.shape[-2], part.shape[-1]
            total[:, :, rows, columns] += self._grown(self.head(self._maps(part), self._padded(inner)).float(), inner)
            hits[rows, columns] += 1
        return total / hits, partial(_sized, size=original, corners=self.protocol.align_corners)


def build_model(backbone: Backbone, protocol: SegmentationProtocol, classes: int, seed: int) -> Segmenter:
    """The segmenter on a copy of ``backbone``, dilated where the protocol says so; its head starts from ``seed``.

    Raises :class:`BackboneError` where the backbone cannot be dilated.
    """
    body = _body(backbone, protocol)
    with seeded(seed):
        return Segmenter(body, protocol, classes)


def _body(backbone: Backbone, protocol: SegmentationProtocol) -> Backbone:
    return copy.deepcopy(backbone) if protocol.output_stride is None else backbone.dilated(protocol.output_stride)


# --- heads on features that were encoded once --------------------------------------------------------------------


@dataclass(frozen=True)
class _Images:
    """A split as the cache reads it."""

    data: SegmentationSet

    @property
    def fingerprint(self) -> str:
        return f"{self.data.fingerprint} {DECODING}"

    @property
    def split(self) -> str:
        return self.data.split

    @property
    def ids(self) -> list[str]:
        return [record.image_id for record in self.data.records]

    @property
    def labels(self) -> None:
        return None

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        return self.data.image(index)


@dataclass(frozen=True)
class _Features:
    """A split's maps on disk, {stride: (N, C h w)}, the shape of each map, and the masks with them."""

    arrays: Mapping[int, npt.NDArray[Any]]
    shapes: Mapping[int, tuple[int, ...]]
    data: SegmentationSet
    labels: Size

    def maps(self, index: int) -> dict[int, Tensor]:
        return {
            stride: torch.from_numpy(np.array(rows[index])).view(self.shapes[stride])
            for stride, rows in self.arrays.items()
        }

    def sample(self, index: int, seed: int) -> tuple[dict[int, Tensor], Tensor]:
        """The maps of an image (C,h,w) and its mask, of the size ``labels``."""
        mask = torch.from_numpy(self.data.mask(index))[None]
        return self.maps(index), vision.resize(mask, list(self.labels), InterpolationMode.NEAREST_EXACT)[0]

    def view(self, index: int) -> tuple[dict[int, Tensor], Tensor]:
        """The maps of an image, and its mask as it is."""
        return self.maps(index), torch.from_numpy(self.data.mask(index))


class CachedSegmenter(nn.Module):
    """A head on maps: samples and views are those of :class:`_Features`."""

    def __init__(self, strides: Mapping[int, int], protocol: SegmentationProtocol, classes: int, size: Size) -> None:
        super().__init__()
        self.size = size
        self.head = build_head(strides, protocol, classes)
        self.scored = _Scored(protocol, classes)

    def forward(self, batch: list[Any]) -> Any:
        device, corners = self.scored.weights.device, self.scored.corners
        with torch.autocast("cpu", enabled=False):  # which has no rule for maps that are stored as float16
            stacked = {stride: torch.stack([each[stride] for each, _ in batch]) for stride in batch[0][0]}
        maps = {stride: each.to(device, non_blocking=True).float() for stride, each in stacked.items()}
        logits = self.head(maps, self.size).float()
        if self.training:
            masks = torch.stack([mask for _, mask in batch]).to(device, non_blocking=True).long()
            return {"loss": self.scored.loss(_sized(logits, (masks.shape[-2], masks.shape[-1]), corners), masks)}
        return [
            self.scored.labels(one[None], partial(_sized, size=(mask.shape[0], mask.shape[1]), corners=corners))
            for one, (_, mask) in zip(logits, batch, strict=True)
        ]


def _segment_cached(
    backbone: Backbone, protocol: SegmentationProtocol, train: SegmentationSet, test: SegmentationSet,
    setup: Setup, version: str,
) -> Segmented:  # fmt: skip
    """Encode both splits once, train the head on what the cache holds, and label the test images from it too."""
    assert protocol.encode is not None
    body = _body(backbone, protocol).eval()
    size = padded(protocol.encode, max(body.spec.strides), False)
    strides = sorted(body.spec.strides)[-(protocol.maps if protocol.head == "linear" else 1) :]
    began = monotonic()
    shapes = _shapes(body.to(setup.device), strides, size)
    (known, new), (asked, newer) = (_encode(body, part, shapes, size, protocol, setup) for part in (train, test))
    took = monotonic() - began

    def build() -> Trainable:
        with seeded(setup.seed):
            model = CachedSegmenter({s: shape[0] for s, shape in shapes.items()}, protocol, len(train.classes), size)
        return Trainable(
            model=model,
            optimizer=optimizer_of(model, protocol),
            sample=known.sample,
            length=len(train),
            view=asked.view,
            read=Reading(test),
            details={"encoded": new + newer},
        )

    found = train_and_segment(build, backbone, protocol, train, test, setup, version)
    return replace(found, timings={"encode": took, **found.timings})


def _shapes(body: Backbone, strides: Sequence[int], size: Size) -> dict[int, tuple[int, ...]]:
    """The (C, h, w) of the maps of these strides, of images of ``size``."""
    with torch.no_grad():
        maps = body(torch.zeros(1, 3, *size, device=body.mean.device)).maps
    return {stride: tuple(maps[stride].shape[1:]) for stride in strides}


def _encode(
    body: Backbone, data: SegmentationSet, shapes: Mapping[int, tuple[int, ...]], size: Size,
    protocol: SegmentationProtocol, setup: Setup,
) -> tuple[_Features, int]:  # fmt: skip
    """The maps of a split, and how many images went through the network for them."""
    names = {stride: f"map{stride}/full" for stride in shapes}
    found = setup.cache.features(
        body, _Images(data), list(names.values()), preprocess=Preprocess(size, "squash"), device=setup.device,
        precision=setup.precision, dtype=protocol.encode_dtype, batch_size=_BATCH, workers=setup.encode_workers,
        channels_last=setup.channels_last, pin_memory=setup.pin_memory, progress=setup.progress,
    )  # fmt: skip
    arrays = {stride: found.arrays[name] for stride, name in names.items()}
    thinned = size[0] // protocol.label_stride, size[1] // protocol.label_stride
    return _Features(arrays, shapes, data, thinned), found.encoded
