"""The shapes of recipes: which numbers a family of evaluations is made of. The recipes stand in the tasks."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from evalsuite.backbone import Backbone
from evalsuite.data.detection import DetectionSet
from evalsuite.data.segmentation import SegmentationSet
from evalsuite.errors import UsageError
from evalsuite.metrics.detection import Detections
from evalsuite.poolings import PoolingName
from evalsuite.task import Protocol, Setup

__all__ = [
    "AgentEngine",
    "AgentProtocol",
    "Arena",
    "Detected",
    "DetectionEngine",
    "DetectionProtocol",
    "Played",
    "ProxyProtocol",
    "Reading",
    "SegmentationEngine",
    "SegmentationProtocol",
    "Segmented",
    "Training",
    "job",
]

JOBS = ("detect", "segment", "play")


@dataclass(frozen=True, kw_only=True)
class Training(Protocol):
    """How a dense head, and with it perhaps the backbone, is trained over a number of iterations.

    ``optimizer`` is ``"sgd"``, as in the published recipes of convolutional networks, or ``"adamw"``; ``momentum`` is
    of the first. Norms are not decayed.

    ``batch_size`` counts images over all devices. The learning rate rises linearly from ``lr * warmup_factor`` to
    ``lr`` over ``warmup_iterations``, then is multiplied by ``gamma`` at each of ``milestones`` (iterations).
    """

    iterations: int
    batch_size: int
    lr: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_iterations: int = 0
    warmup_factor: float = 0.001
    clip_gradient: float | None = None
    freeze_backbone: bool = False
    backbone_norm: Literal["train", "frozen"] = "train"
    precise_bn: int = 0

    @property
    def pixels(self) -> int:
        """How many pixels a training image has, or is enlarged to, at most; 0 where it is not of images."""
        return 0

    def rate(self, iteration: int) -> float:
        """The factor on the learning rate at an iteration counted from 0."""
        factor = self.gamma ** sum(iteration >= m for m in self.milestones)
        if iteration < self.warmup_iterations:
            alpha = iteration / self.warmup_iterations
            factor *= self.warmup_factor * (1 - alpha) + alpha
        return factor


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
    ``version()`` is what a result records of it.
    """

    name: str

    def version(self) -> str: ...

    def detect(
        self,
        backbone: Backbone,
        protocol: DetectionProtocol,
        train: DetectionSet,
        test: DetectionSet,
        setup: Setup,
    ) -> Detected: ...


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

    def rate(self, iteration: int) -> float:
        """The factor on the learning rate at an iteration counted from 0."""
        factor = super().rate(iteration)
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

    def version(self) -> str: ...

    def segment(
        self,
        backbone: Backbone,
        protocol: SegmentationProtocol,
        train: SegmentationSet,
        test: SegmentationSet,
        setup: Setup,
    ) -> Segmented: ...


@dataclass(frozen=True, kw_only=True)
class Reading(Protocol):
    """What is made of a frozen encoder's features of a world.

    ``reads``: the vectors that are pooled are the encoder's ``"tokens"`` or its ``"pooled"`` vector; ``"auto"``:
    tokens where it gives them. ``pooling`` is one of :func:`evalsuite.poolings.pooling`, with ``layers`` where it has
    any; ``"auto"``: ``transformer`` of tokens, which are told their places if they are patches of a map; ``mlp`` of
    one vector. ``encode_size`` is the side in pixels of what the encoder sees (None: its own image size).

    It is learnt in the ``variant`` of the task's worlds, and tested there and, for generalisation, in each of
    ``unseen``.
    """

    reads: Literal["auto", "tokens", "pooled"] = "auto"
    pooling: Literal["auto", PoolingName] = "auto"
    layers: int = 1
    encode_size: int | None = None
    variant: str = "default"
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AgentProtocol(Reading):
    """An agent that learns by PPO (Schulman et al. 2017) what to do from what an encoder tells it.

    ``steps`` are made in all by ``environments`` worlds at once; after ``rollout`` steps of each, ``epochs`` passes
    are made over them in minibatches of ``batch_size``. ``discount`` is gamma, ``smoothing`` lambda of the advantages,
    ``entropy`` and ``value`` weigh their losses. ``clip_gradient`` bounds the norm.

    ``head``: ``"mlp"`` is 64-64 ReLU shared by policy and value and 64 tanh each, ``"identity"`` nothing. With
    ``fine_tune`` the encoder is trained along by the same optimiser. ``time_limit_is_terminal``: value is not
    bootstrapped where an episode runs out of time.

    The agent is tested over ``test_episodes`` at the end, and on the way every ``test_every`` steps over
    ``curve_episodes``. Its actions are drawn, not the likeliest ones.
    """

    steps: int
    environments: int = 4
    rollout: int = 512
    batch_size: int = 32
    epochs: int = 10
    lr: float = 3e-4
    discount: float = 0.99
    smoothing: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    value: float = 0.5
    clip_gradient: float = 0.5
    head: Literal["mlp", "identity"] = "mlp"
    fine_tune: bool = False
    test_every: int = 4000
    curve_episodes: int = 100
    test_episodes: int = 1000
    time_limit_is_terminal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_once = self.environments * self.rollout
        if at_once % self.batch_size:
            raise UsageError(
                f"{self.id}: {at_once} steps are no whole number of minibatches of {self.batch_size}",
                cause="the last one would be smaller, and its advantages normalised over few steps",
                fix=f"--set batch_size=32, or another divisor of {at_once}",
            )


@dataclass(frozen=True, kw_only=True)
class ProxyProtocol(Reading):
    """In which quadrant the target is, by a pooling and a linear layer on frozen features: no agent, no actions.

    Cross-entropy by AdamW over ``epochs`` of ``train_images`` first frames, whose features are standardised, the
    learning rate rising over a tenth of the steps and falling by a cosine.
    It measures whether features tell objects apart, which is what an agent needs first.
    """

    train_images: int = 4000
    test_images: int = 1000
    epochs: int = 40
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01


class Arena(typing.Protocol):
    """A family of worlds: ``make`` gives many of one variant, in gymnasium's ``AutoresetMode.SAME_STEP``.

    Besides gymnasium's methods they have ``snapshot()``, plain values that say exactly where they are, and
    ``restore(values)``; ``frames()`` are (N, H, W, 3) pictures of them. ``observation`` is ``"image"`` or ``"state"``.
    """

    def make(self, count: int, variant: str, observation: str) -> Any: ...


@dataclass(frozen=True)
class Played:
    """What an agent engine brings back.

    ``successes`` and ``lengths`` hold each test episode of each variant, the one learnt in first; ``curve`` the tests
    on the way, each with ``steps``, ``success``, ``return`` and ``length``; ``film`` the frames (T, H, W, 3) of one
    test episode.
    """

    successes: Mapping[str, npt.NDArray[np.bool_]]
    lengths: Mapping[str, npt.NDArray[np.int64]]
    curve: list[dict[str, float]]
    film: npt.NDArray[np.uint8]
    timings: dict[str, float]
    details: dict[str, Any]


class AgentEngine(typing.Protocol):
    """Who trains an agent; as :class:`DetectionEngine`."""

    name: str

    def version(self) -> str: ...

    def play(self, backbone: Backbone, protocol: AgentProtocol, arena: Arena, setup: Setup) -> Played: ...


def job(engine: type) -> str | None:
    """What an engine of this class is asked for, ``"detect"``, ``"segment"`` or ``"play"``; None: nothing of that."""
    return next((name for name in JOBS if callable(getattr(engine, name, None))), None)
