"""Protocols of detection, and the engine that they are given to."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any, Literal

from evalsuite.backbone import Backbone
from evalsuite.data.detection import DetectionSet
from evalsuite.errors import UsageError
from evalsuite.metrics.detection import Detections
from evalsuite.protocols.training import Training
from evalsuite.task import Setup

__all__ = ["Detected", "DetectionEngine", "DetectionProtocol"]


@dataclass(frozen=True, kw_only=True)
class DetectionProtocol(Training):
    """Faster or Mask R-CNN on a backbone.

    ``model`` is ``"fpn"`` (a pyramid of any backbone, Lin et al. 2017) or ``"c4"`` (a ResNet cut before its last
    stage, which becomes the head on regions, Ren et al. 2015). Sizes are in pixels: a training image's shorter side
    is drawn from ``min_sizes``, its longer side is at most ``max_size``. ``anchor_sizes`` are side lengths; ``fpn``
    puts one on each of its five levels (strides 4 to 64), ``c4`` all on its only one. ``roi_batch`` regions an image
    are sampled, the share ``roi_positive`` of them positive.
    """

    model: Literal["fpn", "c4"]
    train_split: str
    test_split: str
    masks: bool = False
    min_sizes: tuple[int, ...] = (800,)
    max_size: int = 1333
    test_min_size: int = 800
    test_max_size: int = 1333
    flip: float = 0.5
    pyramid_width: int = 256
    pyramid_norm: Literal["BN"] | None = None
    res5_norm: bool = False
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_pre_nms_train: int = 2000
    rpn_pre_nms_test: int = 1000
    rpn_post_nms_train: int = 1000
    rpn_post_nms_test: int = 1000
    rpn_nms: float = 0.7
    rpn_batch: int = 256
    roi_batch: int = 512
    roi_positive: float = 0.25
    roi_size: int = 7
    box_head_width: int = 1024
    mask_head_width: int = 256
    score_threshold: float = 0.05
    nms: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model == "fpn" and len(self.anchor_sizes) != 5:
            raise UsageError(
                f"{len(self.anchor_sizes)} anchor sizes for a pyramid",
                cause="each of its five levels has one",
                fix="--set anchor_sizes=32,64,128,256,512",
            )

    @property
    def pixels(self) -> int:
        return max(self.min_sizes) * self.max_size


@dataclass(frozen=True)
class Detected:
    """What an engine brings back: detections of every test image, the training log and how long things took."""

    detections: list[Detections]
    log: list[dict[str, float]]
    timings: dict[str, float]
    details: dict[str, Any]


class DetectionEngine(typing.Protocol):
    """Who trains a detector. The same data in and the same detections out, whoever does it.

    ``detect`` leaves the backbone as it was and keeps what it needs to resume in ``setup.work``.
    ``job`` is ``"detect"``, its kind, the same in all of its class. ``version()`` is what a result records of it.
    """

    name: str
    job: str

    def version(self) -> str: ...

    def detect(
        self,
        backbone: Backbone,
        protocol: DetectionProtocol,
        train: DetectionSet,
        test: DetectionSet,
        setup: Setup,
    ) -> Detected: ...
