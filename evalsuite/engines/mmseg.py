"""Semantic segmentation by mmsegmentation itself: its segmentors and heads, trained by mmengine's runner."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from time import monotonic
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from evalsuite.backbone import Backbone
from evalsuite.data.segmentation import IGNORE, SegmentationSet
from evalsuite.engines._dense import OnBackbone, Trainable, Trained, demand_of, infer_all, optimizer_of
from evalsuite.engines._mmengine import (
    LrFactor,
    Mixed,
    Saving,
    Training,
    Watching,
    apart,
    saved_run,
)  # before mmseg: see there
from evalsuite.engines._segmentation import (
    Before,
    Reading,
    check,
    key_of,
    padded,
    segmented,
    stored_pair,
    target_size,
    training_sample,
)
from evalsuite.errors import UsageError
from evalsuite.preflight import afford, training_step
from evalsuite.protocols import SegmentationProtocol, Segmented
from evalsuite.pyramid import Levels
from evalsuite.resize import resize
from evalsuite.seeding import seeded
from evalsuite.signals import ignore_signals, signals
from evalsuite.task import Setup
from evalsuite.training import Steps, full_precision_outputs, launched

# isort: split
import mmseg
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as SHELF
from mmengine.structures import PixelData
from mmseg.models.segmentors import SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

__all__ = ["Maps", "Mmseg", "Segmenter", "build_model", "configure", "packed", "run_loop"]

STATE = "mmengine.pt"
POOLS = (1, 2, 3, 6)
ATROUS = (6, 12, 18)  # at stride 16

Data = dict[str, Any]


class Mmseg:
    """The recipes by the library that most segmentation results are published with.

    Network, losses and inference are mmsegmentation's, the loop mmengine's; training images, optimiser, learning
    rates and scoring are those of the engine ``native``, by the same code. docs/mmseg.md tells how every field of a
    protocol reaches it.
    """

    name = "mmseg"
    job = "segment"

    def version(self) -> str:
        return f"mmsegmentation {mmseg.__version__}"

    def segment(
        self,
        backbone: Backbone,
        protocol: SegmentationProtocol,
        train: SegmentationSet,
        test: SegmentationSet,
        setup: Setup,
    ) -> Segmented:
        """Train on ``train`` as the protocol says, then label every image of ``test``.

        Raises :class:`UsageError` for a protocol that does not fit the data, or that mmsegmentation has nothing for;
        :class:`BackboneError` where the backbone cannot be dilated; :class:`TrainingError` when training diverges.
        """
        check(protocol, len(train.classes), setup.devices)
        _refuse(protocol, len(train.classes), setup)
        key = key_of(backbone, protocol, train, setup, self.version())
        with apart():
            return segmented(_trained(backbone, protocol, train, test, setup, key), test)


def _refuse(protocol: SegmentationProtocol, classes: int, setup: Setup) -> None:
    """Raise :class:`UsageError` for what mmsegmentation does not do, or not as the protocol means it."""
    wrong = [
        (protocol.encode is not None, "features that are encoded once", "mmsegmentation trains on images"),
        (protocol.head == "linear", "head linear", "mmsegmentation has no linear classifier on several maps"),
        (protocol.head == "fcn" and protocol.convs < 1, "an FCN without a convolution",
         "mmsegmentation's then keeps the width of the map"),
        (bool(protocol.class_weights), "class weights",
         "mmsegmentation 1.2 looks up the weight of pixels without a class, and there is none"),
        (protocol.precise_bn > 0, "precise_bn", "mmengine's loop does not measure batch-norm statistics anew"),
        (classes < 2, "one class", "mmsegmentation takes a single class for the foreground of two"),
        (setup.devices > 1, f"{setup.devices} devices", "this engine trains on one"),
        (setup.precision not in ("32-true", "bf16-mixed"), f"precision {setup.precision}",
         "this engine does not scale the loss, which float16 needs"),
    ]  # fmt: skip
    for applies, what, cause in wrong:
        if applies:
            raise UsageError(
                f"engine mmseg does not train {protocol.id} with {what}", cause=cause, fix="--engine native"
            )


# --- the model ---------------------------------------------------------------------------------------------------


class Maps(OnBackbone):
    """A backbone as mmsegmentation calls it: normalised images (B,3,h,w) give a list of maps.

    ``channels`` is the width of each. They are those the head reads, from fine to coarse, and after them, where the
    protocol asks for an auxiliary head, the features before the last stage.
    """

    def __init__(self, body: Backbone, protocol: SegmentationProtocol) -> None:
        super().__init__((body,), protocol)
        strides, self.body, self.freeze = body.spec.strides, body, protocol.freeze_backbone
        self.coarsest = max(strides)
        self.levels = Levels(strides) if protocol.head in ("upernet", "segformer") else None
        self.strides = [self.coarsest]
        if protocol.head == "deeplabv3plus":
            self.strides.insert(0, min(strides, key=lambda s: (abs(s - 4), s)))
        self.channels = list(self.levels.channels.values()) if self.levels else [strides[s] for s in self.strides]
        self.before = Before(body) if protocol.auxiliary else None
        if self.before is not None:
            self.channels.append(self.before.channels)
        self.train()

    @property
    def unit(self) -> int:
        """What the sides of an image should be multiples of, so that maps lie where their pixels are."""
        return self.coarsest if self.levels is None else max(32, self.coarsest)

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            maps = self.body.look(x).maps
        if self.levels is None:
            found = [maps[stride] for stride in self.strides]
        else:
            found = list(self.levels(maps, (x.shape[-2], x.shape[-1])).values())
        return found if self.before is None else [*found, self.before.take(maps)]


@SHELF.register_module(force=True)  # type: ignore[untyped-decorator]
def EvalsuiteBackbone(maps: Maps) -> Maps:
    """mmsegmentation builds a backbone from a configuration; ours is there already."""
    return maps


def configure(maps: Maps, protocol: SegmentationProtocol, classes: int) -> dict[str, Any]:
    """mmsegmentation's configuration of the segmentor: an EncoderDecoder on ``maps``."""
    spec = maps.body.spec
    test = {"mode": "slide", "crop_size": protocol.crop, "stride": protocol.stride}
    config: dict[str, Any] = {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor", "mean": [255 * v for v in spec.mean], "std": [255 * v for v in spec.std],
            "pad_val": 0, "seg_pad_val": IGNORE, "size": padded(protocol.crop, maps.unit, protocol.align_corners),
        },
        "backbone": {"type": "EvalsuiteBackbone", "maps": maps},
        "decode_head": _head(maps, protocol, classes),
        "train_cfg": {},
        "test_cfg": test if protocol.inference == "slide" else {"mode": "whole"},
    }  # fmt: skip
    if protocol.auxiliary:
        config["auxiliary_head"] = {
            "type": "FCNHead", "in_channels": maps.channels[-1], "in_index": len(maps.channels) - 1,
            "channels": protocol.auxiliary_width, "num_convs": 1, "concat_input": False,
            "dilation": protocol.head_dilation, **_common(protocol, classes, protocol.auxiliary),
        }  # fmt: skip
    return config


def _head(maps: Maps, protocol: SegmentationProtocol, classes: int) -> dict[str, Any]:
    read = maps.channels[:-1] if protocol.auxiliary else maps.channels
    last: dict[str, Any] = {"in_channels": read[-1], "in_index": len(read) - 1}
    every: dict[str, Any] = {"in_channels": list(read), "in_index": list(range(len(read)))}
    rates = [max(1, rate * 16 // maps.coarsest) for rate in ATROUS]
    kinds: dict[str, dict[str, Any]] = {
        "fcn": {
            "type": "FCNHead", "num_convs": protocol.convs, "concat_input": protocol.concat,
            "dilation": protocol.head_dilation, **last,
        },
        "psp": {"type": "PSPHead", "pool_scales": POOLS, **last},
        "upernet": {"type": "UPerHead", "pool_scales": POOLS, **every},
        "deeplabv3plus": {
            "type": "DepthwiseSeparableASPPHead", "dilations": (1, *rates), "c1_in_channels": read[0],
            "c1_channels": 48, **last,
        },
        "segformer": {"type": "SegformerHead", **every},
    }  # fmt: skip
    return {**kinds[protocol.head], "channels": protocol.width, **_common(protocol, classes, 1.0)}


def _common(protocol: SegmentationProtocol, classes: int, weight: float) -> dict[str, Any]:
    return {
        "num_classes": classes, "dropout_ratio": protocol.dropout, "norm_cfg": {"type": "BN", "requires_grad": True},
        "align_corners": protocol.align_corners, "ignore_index": IGNORE,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight},
    }  # fmt: skip


def build_model(backbone: Backbone, protocol: SegmentationProtocol, classes: int, seed: int) -> tuple[Any, Data]:
    """mmsegmentation's segmentor on a copy of ``backbone``, and its configuration; its heads start from ``seed``.

    Raises :class:`BackboneError` where the backbone cannot be dilated as the protocol says.
    """
    body = backbone.dilated(protocol.output_stride or max(backbone.spec.strides))
    with apart(), seeded(seed):
        config = configure(Maps(body, protocol), protocol, classes)
        model: Any = MODELS.build(ConfigDict(config))
        model.init_weights()
    heads = [model.decode_head] + ([model.auxiliary_head] if protocol.auxiliary else [])
    full_precision_outputs(*(head.conv_seg for head in heads))  # logits are resampled, and losses made, in float32
    told = copy.deepcopy({**config, "backbone": {"type": "EvalsuiteBackbone", "arch": body.spec.arch}})
    return model, told


class Segmenter(nn.Module):
    """A segmentor on views of test images, as :func:`_view` makes them: labels (H,W) uint8 of each."""

    def __init__(self, segmentor: Any, protocol: SegmentationProtocol) -> None:
        super().__init__()
        several = protocol.test_flip or len(protocol.test_scales) > 1
        self.tested: Any = SegTTAModel(segmentor) if several else segmentor

    def forward(self, views: list[tuple[Data, Tensor]]) -> list[Tensor]:
        found = [self.tested.test_step(data)[0].pred_sem_seg.data for data, _ in views]
        return [labels.view(mask.shape).to(torch.uint8) for labels, (_, mask) in zip(found, views, strict=True)]


# --- data --------------------------------------------------------------------------------------------------------


def packed(batch: list[tuple[Tensor, Tensor]]) -> Data:
    """Samples of :func:`training_sample` as mmsegmentation takes them."""
    images, masks = zip(*batch, strict=True)
    truths = [SegDataSample(gt_sem_seg=PixelData(data=mask[None].long())) for mask in masks]
    return {"inputs": list(images), "data_samples": truths}


class _Batches(Dataset[Data | None]):
    """Training batches by step. mmengine's loop asks a resumed run for those before ``first`` again, and throws them
    away; they are not made."""

    def __init__(self, steps: Steps, first: int) -> None:
        self.steps, self.first = steps, first

    def __getitem__(self, step: int) -> Data | None:
        if step < self.first:
            return None
        return packed(self.steps[step])


def _view(test: SegmentationSet, maps: Maps, protocol: SegmentationProtocol, index: int) -> tuple[Data, Tensor]:
    """A test image as the protocol looks at it, and its mask (H,W). Of several views there is a list of lists."""
    image, mask = stored_pair(test, index)
    original = mask.shape[0], mask.shape[1]
    inputs, samples = [], []
    for scale in protocol.test_scales:
        size = target_size(original, protocol, scale)
        for mirror in (False, True) if protocol.test_flip else (False,):
            pixels, about = _filled(resize(image.flip(-1) if mirror else image, *size), maps, protocol)
            flip = {"flip": mirror, "flip_direction": "horizontal" if mirror else None}
            named = {"ori_shape": original, "img_path": test.records[index].image_id}
            inputs.append([pixels])
            samples.append([SegDataSample(metainfo={**named, **flip, **about})])
    if len(inputs) == 1:
        return {"inputs": inputs[0], "data_samples": samples[0]}, mask
    return {"inputs": inputs, "data_samples": samples}, mask


def _filled(pixels: Tensor, maps: Maps, protocol: SegmentationProtocol) -> tuple[Tensor, Data]:
    """An image (3,h,w) filled up below and to the right with the network's mean colour, zero once normalised, and what
    mmsegmentation must know to cut it off again.

    A whole image is filled up to whole strides, so that logits lie where their pixels are; where windows slide, to
    one window at least.
    """
    height, width = pixels.shape[-2], pixels.shape[-1]
    if protocol.inference == "whole":
        full = padded((height, width), maps.unit, protocol.align_corners)
    else:
        full = max(height, protocol.crop[0]), max(width, protocol.crop[1])
    right, below = full[1] - width, full[0] - height
    colours = zip(pixels.float(), maps.body.spec.mean, strict=True)
    filled = torch.stack([F.pad(channel, (0, right, 0, below), value=255 * mean) for channel, mean in colours])
    about = {"img_shape": (height, width), "pad_shape": full, "padding_size": (0, right, 0, below)}
    return filled, about


# --- a run -------------------------------------------------------------------------------------------------------


def _trained(
    backbone: Backbone, protocol: SegmentationProtocol, train: SegmentationSet, test: SegmentationSet, setup: Setup,
    key: str,
) -> Trained:  # fmt: skip
    """Train to the end, from the beginning or from ``setup.work``, and run the result on every test image."""
    model, config = build_model(backbone, protocol, len(train.classes), setup.seed)
    made = Trainable(
        model=model,
        optimizer=optimizer_of(model, protocol),
        sample=partial(training_sample, train, protocol, backbone.spec),
        length=len(train),
        view=partial(_view, test, model.backbone, protocol),
        read=Reading(test),
    )
    began = monotonic()
    log = run_loop(made, protocol, setup, key, len(test))
    trained = monotonic()
    fabric = launched(setup.device, precision=setup.precision)
    outputs = infer_all(Segmenter(model, protocol), made, len(test), setup, fabric, "segment")
    timings = {"train": trained - began, "segment": monotonic() - trained}
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    details = {"trained_parameters": parameters, "images": len(train), "config": config}
    return Trained(outputs, log, timings, details)


def _small_step(made: Trainable, seed: int, images: int) -> Iterator[float]:
    """A step on so many images in the three parts that :func:`evalsuite.preflight.afford` measures."""
    model: Any = made.model.train()
    data = model.data_preprocessor(packed(Steps(made.sample, made.length, images, seed)[0]), True)
    return training_step(lambda: model.parse_losses(model(**data, mode="loss"))[0], made.optimizer)


def run_loop(
    made: Trainable, protocol: SegmentationProtocol, setup: Setup, key: str, tests: int = 0
) -> list[dict[str, float]]:
    """mmengine's loop over the protocol's iterations, within :func:`apart`; the training log comes back.

    ``key`` names what is trained on what: a state in ``setup.work`` of another key is not gone on from. ``tests`` are
    the images that are looked at afterwards, for the estimate of time.
    """
    resumed: Mapping[str, Any] | None = saved_run(setup.work / STATE, key, setup.progress)
    start = resumed["meta"]["iter"] if resumed is not None else 0
    steps = Steps(made.sample, made.length, protocol.batch_size, setup.seed)
    loader = DataLoader(
        _Batches(steps, start),
        batch_size=None,
        sampler=range(protocol.iterations),
        num_workers=setup.workers,
        worker_init_fn=ignore_signals,
    )
    if resumed is None and setup.device.type == "cpu":
        afford(demand_of(protocol, tests, setup), partial(_small_step, made, setup.seed), setup.progress)
    clip = {"max_norm": protocol.clip_gradient} if protocol.clip_gradient is not None else None
    wrapped = Mixed(made.optimizer, setup.device, setup.precision, clip_grad=clip)
    log: list[dict[str, float]] = []
    with setup.progress.track("train", protocol.iterations, start) as meter, signals() as told:
        runner = Training(
            model=made.model,
            device=setup.device,
            resumed=resumed,
            work_dir=str(setup.work),
            train_dataloader=loader,
            train_cfg={"type": "IterBasedTrainLoop", "max_iters": protocol.iterations},
            optim_wrapper=wrapped,
            param_scheduler=[LrFactor(wrapped, protocol.lr_factor)],
            randomness={"seed": setup.seed},
            default_hooks={
                "timer": None, "sampler_seed": None, "logger": None,
                "checkpoint": Saving(STATE, setup.save_every, told),
            },
            custom_hooks=[Watching(key, setup.seed, meter, log)],
        )  # fmt: skip
        runner.train()
    return log
