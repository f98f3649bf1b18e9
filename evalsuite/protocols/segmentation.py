"""Protocols of segmentation, and the engine that they are given to."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from evalsuite.backbone import Backbone
from evalsuite.data.segmentation import SegmentationSet
from evalsuite.errors import UsageError
from evalsuite.protocols.training import Training
from evalsuite.task import Setup

__all__ = ["SegmentationEngine", "SegmentationProtocol", "Segmented"]


@dataclass(frozen=True, kw_only=True)
class SegmentationProtocol(Training):
    """A head that labels every pixel, on a backbone.

    ``head``: ``linear`` is a batch norm and a 1x1 convolution on the ``maps`` coarsest maps, resampled to the finest
    of them; ``fcn`` is ``convs`` 3x3 convolutions of ``width`` channels and ``head_dilation`` on the coarsest map
    (with ``concat``, one more on the map and their output) and a 1x1; ``psp`` (Zhao et al. 2017), ``upernet`` (Xiao
    et al. 2018), ``deeplabv3plus`` (Chen et al. 2018) and ``segformer`` (the all-MLP head of Xie et al. 2021) are
    ``width`` channels wide. ``dropout`` of whole channels comes before the last convolution. ``auxiliary`` weighs
    the loss of a small FCN, one convolution of ``auxiliary_width`` channels, on the features before the last stage.

    ``output_stride``: a network whose coarsest map has a larger stride is dilated until it has this one, with
    the same weights. ``align_corners`` is how maps and logits are resampled.

    Images are sized so that their shorter side is ``short_side`` (None: their own), in training by a factor drawn
    from ``scale`` besides; a ``crop`` (height, width) is cut out, up to ten times until no class has more than the
    share ``crop_share`` of its labelled pixels, and what it lacks is padded and ignored; it is mirrored with
    probability ``flip`` and, with ``photometric``, changed in brightness, contrast, saturation and hue.
    ``class_weights`` is one weight a class (empty: all alike).

    ``inference``: ``whole`` images, or ``slide``, windows of ``crop`` every ``stride`` (rows, columns) whose logits
    are averaged. Class probabilities are averaged over ``test_scales`` and, with ``test_flip``, mirrored images.

    With ``encode`` (height, width) the head is trained and tested on features of whole images of that size, which
    the frozen backbone encodes once into the cache as ``encode_dtype``; crops, scales and flips do not apply. Training
    then compares logits and labels at 1/``label_stride`` of that size.

    The learning rate falls by steps (:class:`Training`), or with ``schedule="poly"`` as (1 - i/iterations)^``power``
    from ``lr`` to ``lr_min``.
    """

    head: Literal["linear", "fcn", "psp", "upernet", "deeplabv3plus", "segformer"]
    train_split: str
    test_split: str
    width: int = 256
    convs: int = 2
    head_dilation: int = 1
    concat: bool = False
    maps: int = 1
    dropout: float = 0.0
    auxiliary: float = 0.0
    auxiliary_width: int = 256
    output_stride: int | None = None
    align_corners: bool = False
    short_side: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    crop: tuple[int, int] = (512, 512)
    crop_share: float = 1.0
    flip: float = 0.5
    photometric: bool = False
    class_weights: tuple[float, ...] = ()
    inference: Literal["whole", "slide"] = "whole"
    stride: tuple[int, int] = (341, 341)
    test_scales: tuple[float, ...] = (1.0,)
    test_flip: bool = False
    encode: tuple[int, int] | None = None
    encode_dtype: Literal["float16", "float32"] = "float16"
    label_stride: int = 1
    schedule: Literal["step", "poly"] = "step"
    power: float = 0.9
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [
            (self.encode is not None and not self.freeze_backbone, "encode without freeze_backbone",
             "features are encoded once only if the backbone does not change", "--set freeze_backbone=true"),
            (self.encode is not None and (self.test_flip or self.test_scales != (1.0,)), "encode with several views",
             "features of whole images are encoded once, at one size", "--set test_flip=false and test_scales=1.0"),
            (self.encode is not None and (self.auxiliary > 0 or self.head not in ("linear", "fcn", "psp")),
             "encode with a head on many maps", "only the coarsest are encoded; the finer ones are large",
             "--set head=linear, fcn or psp, and auxiliary=0.0"),
            (self.label_stride != 1 and (self.encode is None or self.label_stride < 1),
             f"label_stride {self.label_stride}", "it thins out the labels of encoded images, and is 1 without encode",
             "--set label_stride=1"),
            (not self.test_scales, "no test scale", "an image is looked at once at least", "--set test_scales=1.0"),
            (not 0 < self.scale[0] <= self.scale[1], f"scale {self.scale}", "it is a range of positive factors",
             "--set scale=0.5,2.0"),
            (min(*self.crop, *self.stride) < 1, f"crop {self.crop}, stride {self.stride}", "they count pixels",
             "--set crop=512,512"),
            (self.inference == "slide" and any(s > c for s, c in zip(self.stride, self.crop, strict=True)),
             f"windows of {self.crop} every {self.stride} pixels", "they would leave gaps",
             "choose a stride that is not larger than the crop"),
        ]  # fmt: skip
        for applies, problem, cause, fix in wrong:
            if applies:
                raise UsageError(f"{self.id}: {problem}", cause=cause, fix=fix)

    @property
    def pixels(self) -> int:
        height, width = self.crop if self.encode is None else self.encode
        return height * width

    def lr_factor(self, iteration: int) -> float:
        """The factor on the learning rate at an iteration counted from 0."""
        factor = super().lr_factor(iteration)
        if self.schedule == "poly":
            floor = self.lr_min / self.lr
            factor *= (1 - floor) * (1 - iteration / self.iterations) ** self.power + floor
        return factor


@dataclass(frozen=True)
class Segmented:
    """What an engine brings back, for the test images in their order.

    ``counts`` and ``boundary`` (N, C, 3) are pixel counts of each image and class, of all pixels and of those at the
    borders of classes, as :mod:`evalsuite.metrics.segmentation` makes and reads them; ``matrix`` (C, C) counts pixels
    over all images, rows the truth, columns the prediction. ``predictions`` are label maps (H, W) uint8 of a few
    images by their place, for pictures.
    """

    counts: npt.NDArray[np.int64]
    boundary: npt.NDArray[np.int64]
    matrix: npt.NDArray[np.int64]
    predictions: Mapping[int, npt.NDArray[np.uint8]]
    log: list[dict[str, float]]
    timings: dict[str, float]
    details: dict[str, Any]


class SegmentationEngine(typing.Protocol):
    """Who trains a segmenter; as :class:`DetectionEngine`."""

    name: str
    job: str

    def version(self) -> str: ...

    def segment(
        self,
        backbone: Backbone,
        protocol: SegmentationProtocol,
        train: SegmentationSet,
        test: SegmentationSet,
        setup: Setup,
    ) -> Segmented: ...
