"""Faster and Mask R-CNN by detectron2 itself: its configurations, models, augmentations and optimiser.

detectron2 is on no package index, so nothing of it is imported before an engine is asked to do something; how
to install it, and how every field of a protocol reaches it, is told in docs/detectron2.md.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.metadata
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from timm.layers import DropBlock2d, DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth

from evalsuite.backbone import Backbone, BackboneSpec
from evalsuite.data.detection import DetectionSet, Record
from evalsuite.engines._dense import OnBackbone
from evalsuite.engines._detection import Detector as Assembled
from evalsuite.engines._detection import learnable, train_and_detect
from evalsuite.errors import BackboneError, TrainingError, UsageError
from evalsuite.metrics.detection import Detections
from evalsuite.protocols import Detected, DetectionProtocol
from evalsuite.pyramid import Pyramid
from evalsuite.seeding import seeded
from evalsuite.task import Setup
from evalsuite.training import full_precision, full_precision_outputs

__all__ = ["Detector", "Detectron2RCNN", "build_detector", "configure", "detectron2_state", "training_sample"]

Sample = dict[str, Any]
DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18, (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50, (True, (3, 4, 23, 3)): 101, (True, (3, 8, 36, 3)): 152,
}  # fmt: skip
LEVELS = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


class Detectron2RCNN:
    """The published recipes by the library they were published with.

    A ResNet (torchvision's or timm's names, depth 18 to 152, any groups and width) becomes detectron2's own
    ResNet, its weights mapped in and its maps compared with ours. Every other backbone is wrapped as a detectron2
    backbone with our :class:`evalsuite.pyramid.Pyramid`, so that both engines train the same network. The training
    loop, and with it batches, learning rates, resuming and clipping, is :func:`evalsuite.training.fit`.

    Where it departs from detectron2's own training script: batches are not grouped by aspect ratio, and truth
    masks are bitmaps rather than polygons.
    """

    name = "detectron2"
    job = "detect"

    def version(self) -> str:
        """The library's version, with the commit it was installed from where pip recorded one.

        Raises :class:`UsageError` where detectron2 is not installed.
        """
        number = _library().version
        try:
            origin = importlib.metadata.distribution("detectron2").read_text("direct_url.json")
        except importlib.metadata.PackageNotFoundError:
            origin = None
        commit = json.loads(origin or "{}").get("vcs_info", {}).get("commit_id", "")
        return f"detectron2 {number}" + (f" {commit[:7]}" if commit else "")

    def detect(
        self,
        backbone: Backbone,
        protocol: DetectionProtocol,
        train: DetectionSet,
        test: DetectionSet,
        setup: Setup,
    ) -> Detected:
        """Train on ``train`` as the protocol says, then detect on every image of ``test``.

        Raises :class:`UsageError` where detectron2 is not installed, :class:`BackboneError` where the protocol
        is C4 and the backbone cannot be cut, :class:`TrainingError` when training diverges.
        """
        version = self.version()

        def build() -> Assembled:
            model = build_detector(backbone, protocol, len(train.classes), setup.seed)
            return Assembled(
                model=model,
                optimizer=_optimizer(model, protocol),
                sample=partial(training_sample, train, learnable(train), protocol),
                view=partial(_test_sample, test, protocol),
                read=_detections,
                details={"network": model.network},
            )

        return train_and_detect(build, backbone, protocol, train, test, setup, version)


@functools.cache
def _library() -> SimpleNamespace:
    """What is used of detectron2, by the library's own names.

    Raises :class:`UsageError` where it is not installed or does not load.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it decorates with torch.jit.script, which newer torch deprecates
        try:
            modules = {
                name: importlib.import_module(f"detectron2.{name}".rstrip("."))
                for name in (
                    "", "config", "data.detection_utils", "data.transforms", "layers", "modeling",
                    "modeling.backbone.fpn", "modeling.backbone.resnet", "modeling.poolers",
                    "modeling.roi_heads.roi_heads", "solver", "solver.build", "structures", "utils.events",
                )
            }  # fmt: skip
            _hush_tracing()
        except ImportError as error:  # also what a compiled part built for another torch raises
            raise UsageError(
                "engine detectron2 cannot run",
                cause=f"detectron2 is not installed, or not for this torch: {error}",
                fix="install it from source as docs/detectron2.md tells, or use --engine torchvision",
            ) from error
    wanted = {
        "config": ("get_cfg",),
        "layers": ("ShapeSpec", "get_norm"),
        "modeling": (
            "Backbone",
            "GeneralizedRCNN",
            "build_model",
            "build_proposal_generator",
            "build_roi_heads",
        ),
        "modeling.backbone.fpn": ("LastLevelMaxPool",),
        "modeling.poolers": ("ROIPooler",),
        "modeling.backbone.resnet": ("BasicBlock", "ResNet", "build_resnet_backbone"),
        "modeling.roi_heads.roi_heads": ("ROI_HEADS_REGISTRY", "Res5ROIHeads"),
        "solver": ("build_optimizer",),
        "solver.build": ("get_default_optimizer_params",),
        "structures": ("BoxMode",),
        "utils.events": ("EventStorage",),
    }
    parts = {name: getattr(modules[module], name) for module, names in wanted.items() for name in names}
    return SimpleNamespace(
        version=modules[""].__version__,
        # its model_zoo would find these files too, but imports pkg_resources, which setuptools 82 took away
        configs=Path(str(modules[""].__file__)).parent / "model_zoo" / "configs",
        transforms=modules["data.transforms"],
        annotations=modules["data.detection_utils"],
        **parts,
    )


def _hush_tracing() -> None:
    """Have torch tell here, where nobody hears it, what it tells once of the way detectron2 asks about tracing."""
    log = logging.getLogger("torch.fx._symbolic_trace")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        importlib.import_module("detectron2.utils.tracing").is_fx_tracing()
    finally:
        log.setLevel(level)


class Detector(OnBackbone):
    """A detectron2 model as our loop calls it.

    Training: ``detector(batch)`` of samples from :func:`training_sample` gives named losses. Evaluating:
    dictionaries of ``image`` (3,h,w) uint8 and the original ``height`` and ``width`` give detectron2's
    dictionaries, in pixels of the original images. ``body`` are the modules of ``rcnn`` that came with the
    backbone; ``network`` says in words what they are.
    """

    def __init__(
        self,
        rcnn: nn.Module,
        cfg: Any,
        body: tuple[nn.Module, ...],
        network: str,
        protocol: DetectionProtocol,
    ) -> None:
        super().__init__(body, protocol)
        self.rcnn, self.cfg, self.network = rcnn, cfg, network
        self.train()

    def forward(self, batch: list[Sample]) -> Any:
        try:
            with warnings.catch_warnings(), _library().EventStorage():  # its heads write statistics to one
                warnings.filterwarnings("ignore", "torch.meshgrid")  # told of detectron2's anchors by newer torch
                return self.rcnn(batch)
        except FloatingPointError as error:
            raise TrainingError(
                "training diverged",
                cause=str(error),
                fix="lower the learning rate (--set lr=...) or clip gradients (--set clip_gradient=1.0)",
            ) from error


def build_detector(backbone: Backbone, protocol: DetectionProtocol, classes: int, seed: int) -> Detector:
    """The detector on a copy of the weights of ``backbone``; its new parts are initialised from ``seed``.

    Raises :class:`BackboneError` where the protocol is C4 and the backbone cannot be cut.
    """
    resnet = _as_resnet(backbone)
    cfg = configure(protocol, backbone.spec, classes, resnet or {})
    with seeded(seed):
        if resnet is not None:
            rcnn, body = _native(cfg, backbone)
            network = f"detectron2's ResNet-{cfg.MODEL.RESNETS.DEPTH}"
        else:
            rcnn, body = _wrapped(cfg, copy.deepcopy(backbone), protocol)
            network = f"{backbone.spec.arch}, wrapped"
    _coordinates_in_float32(rcnn)
    return Detector(rcnn, cfg, body, network, protocol)


def _coordinates_in_float32(rcnn: Any) -> None:
    """Boxes, masks and losses in float32 where the network computes in less: detectron2 rounds regions to the precision
    of the maps that they are drawn from, and takes losses of logits as they come."""
    heads, pooler = rcnn.roi_heads, _library().ROIPooler
    full_precision_outputs(rcnn.proposal_generator.rpn_head, heads.box_predictor)
    if heads.mask_on:
        full_precision_outputs(heads.mask_head.predictor)
    for module in heads.modules():
        if isinstance(module, pooler):
            module.register_forward_pre_hook(lambda _, inputs: ([full_precision(m) for m in inputs[0]], *inputs[1:]))


def configure(protocol: DetectionProtocol, spec: BackboneSpec, classes: int, resnet: Mapping[str, Any]) -> Any:
    """detectron2's configuration of a protocol: its base file with every number of ours written over it.

    ``resnet`` are values below MODEL.RESNETS. What has no key there, and is done by this engine or by
    :func:`evalsuite.training.fit`: ``flip`` (a probability), ``clip_gradient`` (over all parameters),
    ``freeze_backbone``, ``train_split``, ``test_split`` and ``metric``.
    """
    d2 = _library()
    cfg = d2.get_cfg()
    cfg.merge_from_file(str(d2.configs / f"Base-RCNN-{protocol.model.upper()}.yaml"))
    fpn = protocol.model == "fpn"
    sizes = [[size] for size in protocol.anchor_sizes] if fpn else [list(protocol.anchor_sizes)]
    values: dict[str, Any] = {
        "MODEL.DEVICE": "cpu",  # where it is built; Fabric moves it
        "MODEL.MASK_ON": protocol.masks,
        "MODEL.PIXEL_MEAN": [255 * value for value in spec.mean],
        "MODEL.PIXEL_STD": [255 * value for value in spec.std],
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.NORM": "FrozenBN" if protocol.backbone_norm == "frozen" else "BN",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": spec.strides.get(32, 2048) // 8,
        "MODEL.FPN.OUT_CHANNELS": protocol.pyramid_width,
        "MODEL.FPN.NORM": protocol.pyramid_norm or "",
        "MODEL.ANCHOR_GENERATOR.SIZES": sizes,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [list(protocol.anchor_ratios)],
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": protocol.rpn_pre_nms_train,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": protocol.rpn_pre_nms_test,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": protocol.rpn_post_nms_train,
        "MODEL.RPN.POST_NMS_TOPK_TEST": protocol.rpn_post_nms_test,
        "MODEL.RPN.NMS_THRESH": protocol.rpn_nms,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": protocol.rpn_batch,
        "MODEL.ROI_HEADS.NUM_CLASSES": classes,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": protocol.roi_batch,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": protocol.roi_positive,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": protocol.score_threshold,
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": protocol.nms,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": protocol.roi_size,
        "MODEL.ROI_BOX_HEAD.FC_DIM": protocol.box_head_width,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": protocol.mask_head_width,
        "INPUT.FORMAT": "RGB",
        "INPUT.MASK_FORMAT": "bitmask",
        "INPUT.MIN_SIZE_TRAIN": protocol.min_sizes,
        "INPUT.MAX_SIZE_TRAIN": protocol.max_size,
        "INPUT.MIN_SIZE_TEST": protocol.test_min_size,
        "INPUT.MAX_SIZE_TEST": protocol.test_max_size,
        "SOLVER.MAX_ITER": protocol.iterations,
        "SOLVER.IMS_PER_BATCH": protocol.batch_size,
        "SOLVER.BASE_LR": protocol.lr,
        "SOLVER.MOMENTUM": protocol.momentum,
        "SOLVER.WEIGHT_DECAY": protocol.weight_decay,
        "SOLVER.STEPS": protocol.milestones,
        "SOLVER.GAMMA": protocol.gamma,
        "SOLVER.WARMUP_ITERS": protocol.warmup_iterations,
        "SOLVER.WARMUP_FACTOR": protocol.warmup_factor,
        "TEST.DETECTIONS_PER_IMAGE": protocol.detections,
        "TEST.PRECISE_BN.ENABLED": bool(protocol.precise_bn),
        "TEST.PRECISE_BN.NUM_ITER": protocol.precise_bn,
    }
    if not fpn:
        values["MODEL.ROI_HEADS.NAME"] = _register_heads(protocol.res5_norm)
    values |= {f"MODEL.RESNETS.{key}": value for key, value in resnet.items()}
    cfg.merge_from_list([item for pair in values.items() for item in pair])
    return cfg


def detectron2_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's tensors under detectron2's names; the classifier is left out.

    The mapping is that of detectron2's tools/convert-torchvision-to-d2.py, which MoCo's and PixPro's converters
    share.
    """
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("fc."):
            continue
        name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
        name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[name if name.startswith("res") else f"stem.{name}"] = tensor
    return renamed


def _as_resnet(backbone: Backbone) -> dict[str, Any] | None:
    """What below MODEL.RESNETS makes detectron2's ResNet the same network, or None where nothing does.

    The tensors must map one to one and the maps come out equal. Dropped paths and the momentum of norms, which act
    in training only and show in neither, are looked for.
    """
    state = detectron2_state(backbone.net.state_dict())
    options = _shape_of_resnet(state)
    norms = [module for module in backbone.net.modules() if isinstance(module, _BatchNorm)]
    random = (DropPath, DropBlock2d, StochasticDepth)
    if (
        options is None
        or set(backbone.spec.strides) != {2, 4, 8, 16, 32}
        or any((norm.eps, norm.momentum) != (1e-5, 0.1) for norm in norms)
        or any(isinstance(module, random) for module in backbone.net.modules())
    ):
        return None
    d2 = _library()
    cfg = d2.get_cfg()
    fixed = {"NORM": "BN", "STRIDE_IN_1X1": False, "OUT_FEATURES": ["res2", "res3", "res4", "res5"]}
    values = {f"MODEL.RESNETS.{key}": value for key, value in (options | fixed).items()}
    cfg.merge_from_list([item for pair in values.items() for item in pair])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        theirs = d2.build_resnet_backbone(cfg, d2.ShapeSpec(channels=3)).eval()
        wanted = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
        if wanted != {name: tensor.shape for name, tensor in state.items()}:
            return None
        theirs.load_state_dict(state)
        pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        ours = copy.deepcopy(backbone).cpu().float().eval().look(pixels).maps
        pairs = [(ours[2 ** int(name[3])], level) for name, level in theirs(pixels).items()]
    return options if all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs) else None


def _shape_of_resnet(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Depth, groups and widths told by names and shapes, or None where they are not a ResNet's."""
    stem, second = state.get("stem.conv1.weight"), state.get("res2.0.conv2.weight")
    if stem is None or second is None:
        return None
    blocks = tuple(len({name.split(".")[1] for name in state if name.startswith(f"res{n}.")}) for n in range(2, 6))
    bottleneck = "res2.0.conv3.weight" in state
    depth = DEPTHS.get((bottleneck, blocks))
    if depth is None:
        return None
    last = state["res2.0.conv3.weight" if bottleneck else "res2.0.conv2.weight"]
    groups = second.shape[0] // second.shape[1]
    return {
        "DEPTH": depth,
        "NUM_GROUPS": groups,
        "WIDTH_PER_GROUP": second.shape[0] // groups,
        "RES2_OUT_CHANNELS": last.shape[0],
        "STEM_OUT_CHANNELS": stem.shape[0],
    }


def _native(cfg: Any, backbone: Backbone) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """The model a configuration describes, with our weights in its ResNet; and the parts they are in."""
    rcnn: Any = _library().build_model(cfg)
    state = detectron2_state(backbone.net.state_dict())
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    if hasattr(rcnn.backbone, "bottom_up"):
        rcnn.backbone.bottom_up.load_state_dict(state)
        return rcnn, (rcnn.backbone.bottom_up,)
    trunk = {name: tensor for name, tensor in state.items() if not name.startswith("res5.")}
    rcnn.backbone.load_state_dict(trunk)
    blocks = nn.ModuleDict({n: block for n, block in rcnn.roi_heads.res5.named_children() if n != "norm"})
    blocks.load_state_dict({name[5:]: tensor for name, tensor in state.items() if name not in trunk})
    return rcnn, (rcnn.backbone, *blocks.values())


def _wrapped(cfg: Any, body: Backbone, protocol: DetectionProtocol) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """A model on a backbone of any kind, and the parts of it that are the backbone's."""
    d2 = _library()
    parts: tuple[nn.Module, ...]
    if protocol.model == "fpn":
        levels = _pyramid_class()(body, protocol)
        heads = d2.build_roi_heads(cfg, levels.output_shape())
        parts = (body,)
    else:
        parts = body.split()
        if not {16, 32} <= set(body.spec.strides):
            raise BackboneError(
                f"{body.spec.arch} has no map of stride 16 to draw regions from",
                cause=f"its strides are {', '.join(map(str, sorted(body.spec.strides)))}",
                fix="choose a pyramid protocol, for example --protocol fpn",
            )
        trunk, tail = parts
        levels = _trunk_class()(trunk, body.spec.strides[16])
        heads = _heads_on(cfg, levels.output_shape(), tail)
    rcnn = d2.GeneralizedRCNN(
        backbone=levels,
        proposal_generator=d2.build_proposal_generator(cfg, levels.output_shape()),
        roi_heads=heads,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        input_format=cfg.INPUT.FORMAT,
    )
    return rcnn, parts


@functools.cache
def _pyramid_class() -> Any:
    d2 = _library()

    class WrappedPyramid(d2.Backbone):  # type: ignore[name-defined,misc]
        """Our maps through our pyramid, named p2 to p6 as detectron2's FPN models name them."""

        def __init__(self, body: Backbone, protocol: DetectionProtocol) -> None:
            super().__init__()
            self.body = body
            self.pyramid = Pyramid(body.spec.strides, protocol.pyramid_width, protocol.pyramid_norm)
            self.top = d2.LastLevelMaxPool()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            levels = self.pyramid(self.body.look(x).maps, (x.shape[-2], x.shape[-1]))
            named = {name: levels[stride] for name, stride in LEVELS.items()}
            (named["p6"],) = self.top(named["p5"])
            return named

        @property
        def size_divisibility(self) -> int:
            return max(LEVELS.values())

        def output_shape(self) -> dict[str, Any]:
            strides = LEVELS | {"p6": 64}
            return {n: d2.ShapeSpec(channels=self.pyramid.channels, stride=s) for n, s in strides.items()}

    return WrappedPyramid


@functools.cache
def _trunk_class() -> Any:
    d2 = _library()

    class WrappedTrunk(d2.Backbone):  # type: ignore[name-defined,misc]
        """A network up to stride 16, its map named res4 as detectron2's C4 models name it."""

        def __init__(self, trunk: nn.Module, channels: int) -> None:
            super().__init__()
            self.trunk, self.channels = trunk, channels

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"res4": self.trunk(x)}

        def output_shape(self) -> dict[str, Any]:
            return {"res4": d2.ShapeSpec(channels=self.channels, stride=16)}

    return WrappedTrunk


def _register_heads(norm: bool) -> str:
    """The name, in detectron2's registry, of region heads that run a ResNet's last stage.

    detectron2's own know bottleneck blocks only. With ``norm``, a batch norm follows the stage, as in MoCo's
    transfer (Res5ROIHeadsExtraNorm; facebookresearch/moco, issue 121). It is trained even where the
    backbone's norms are frozen, for it has nothing pretrained to keep.
    """
    d2 = _library()
    names = ("EvalsuiteRes5ROIHeads", "EvalsuiteRes5ROIHeadsExtraNorm")
    if names[0] not in d2.ROI_HEADS_REGISTRY:

        class EvalsuiteRes5ROIHeads(d2.Res5ROIHeads):  # type: ignore[name-defined,misc]
            @classmethod
            def _build_res5_block(cls, cfg: Any) -> tuple[nn.Module, int]:
                resnets = cfg.MODEL.RESNETS
                if resnets.DEPTH >= 50:
                    stage, width = super()._build_res5_block(cfg)
                    return stage, width
                width = resnets.RES2_OUT_CHANNELS * 8
                count = {18: 2, 34: 3}[resnets.DEPTH]
                blocks = d2.ResNet.make_stage(
                    d2.BasicBlock, count, stride_per_block=[2] + [1] * (count - 1),
                    in_channels=width // 2, out_channels=width, norm=resnets.NORM,
                )  # fmt: skip
                return nn.Sequential(*blocks), width

        class EvalsuiteRes5ROIHeadsExtraNorm(EvalsuiteRes5ROIHeads):
            @classmethod
            def _build_res5_block(cls, cfg: Any) -> tuple[nn.Module, int]:
                stage, width = super()._build_res5_block(cfg)
                stage.add_module("norm", d2.get_norm("BN", width))
                return stage, width

        d2.ROI_HEADS_REGISTRY.register(EvalsuiteRes5ROIHeads)
        d2.ROI_HEADS_REGISTRY.register(EvalsuiteRes5ROIHeadsExtraNorm)
    return names[norm]


def _heads_on(cfg: Any, shapes: Mapping[str, Any], tail: nn.Module) -> nn.Module:
    """The region heads a C4 configuration names, with ``tail`` in place of the stage they would build."""
    heads: Any = _library().build_roi_heads(cfg, shapes)
    norm = [module for name, module in heads.res5.named_children() if name == "norm"]
    heads.res5 = nn.Sequential(tail, *norm)
    return heads  # type: ignore[no-any-return]


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """detectron2's augmentations draw from numpy's global generator; it comes back as it was."""
    state = np.random.get_state()
    np.random.seed([seed >> 32, seed & 0xFFFFFFFF])
    try:
        yield
    finally:
        np.random.set_state(state)


def training_sample(
    data: DetectionSet, records: list[Record], protocol: DetectionProtocol, index: int, seed: int
) -> Sample:
    """Image ``index`` sized and perhaps flipped as ``seed`` draws it, and its objects.

    Gives ``image`` (3,h,w) uint8 and ``instances`` (detectron2's Instances): what its DatasetMapper gives, from
    images and masks that our readers decode. Crowds are left out, difficult objects are kept.
    """
    d2, record = _library(), records[index]
    t = d2.transforms
    augmentations = [t.ResizeShortestEdge(list(protocol.min_sizes), protocol.max_size, "choice")]
    augmentations.append(t.RandomFlip(prob=protocol.flip))
    seen = t.AugInput(_pixels(data, record))
    with _numpy_seeded(seed):
        transforms = t.AugmentationList(augmentations)(seen)
    size = seen.image.shape[:2]
    objects = [
        d2.annotations.transform_instance_annotations(
            {"bbox": box, "bbox_mode": d2.BoxMode.XYXY_ABS, "category_id": int(label)}, transforms, size
        )
        for box, label in zip(record.boxes[~record.crowd], record.labels[~record.crowd], strict=True)
    ]
    if protocol.masks:
        for thing, mask in zip(objects, data.masks(record)[~record.crowd], strict=True):
            thing["segmentation"] = np.array(transforms.apply_segmentation(mask))  # a copy torch may write to
    instances = d2.annotations.annotations_to_instances(objects, size, mask_format="bitmask")
    return {"image": _tensor(seen.image), "instances": d2.annotations.filter_empty_instances(instances)}


def _pixels(data: DetectionSet, record: Record) -> Any:
    return np.ascontiguousarray(data.decode(record).permute(1, 2, 0).numpy())


def _tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _optimizer(model: Detector, protocol: DetectionProtocol) -> torch.optim.Optimizer:
    """detectron2's own SGD; AdamW on the groups its default gives, norms undecayed in both."""
    optimizer: torch.optim.Optimizer
    if protocol.optimizer == "adamw":
        groups = _library().get_default_optimizer_params(model, weight_decay_norm=0.0)
        optimizer = torch.optim.AdamW(groups, protocol.lr, weight_decay=protocol.weight_decay)
    else:
        optimizer = _library().build_optimizer(model.cfg, model)
    return optimizer


def _test_sample(data: DetectionSet, protocol: DetectionProtocol, record: Record) -> Sample:
    """A test image sized as detectron2's DefaultPredictor does."""
    image = _pixels(data, record)
    resize = _library().transforms.ResizeShortestEdge([protocol.test_min_size], protocol.test_max_size, "choice")
    with _numpy_seeded(0):  # a choice of one, but drawn
        sized = resize.get_transform(image).apply_image(image)
    return {"image": _tensor(sized), "height": record.height, "width": record.width}


def _detections(record: Record, output: Any) -> Detections:
    instances, masks = output["instances"].to("cpu"), None
    if instances.has("pred_masks"):
        masks = tuple(rle.encode(np.asfortranarray(mask, np.uint8)) for mask in instances.pred_masks.numpy())
    return Detections(
        image_id=record.image_id,
        boxes=instances.pred_boxes.tensor.double().numpy(),
        scores=instances.scores.double().numpy(),
        labels=instances.pred_classes.numpy(),
        masks=masks,
    )
