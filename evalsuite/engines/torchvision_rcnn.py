"""Faster and Mask R-CNN on torchvision's parts: any backbone, nothing to compile."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from faster_coco_eval.core import mask as rle
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import roi_align

from evalsuite.backbone import Backbone
from evalsuite.data.detection import DetectionSet, Record
from evalsuite.engines._dense import OnBackbone, optimizer_of
from evalsuite.engines._detection import Detector, learnable, train_and_detect
from evalsuite.errors import BackboneError
from evalsuite.metrics.detection import Detections
from evalsuite.protocols import Detected, DetectionProtocol
from evalsuite.pyramid import Pyramid
from evalsuite.resize import resize
from evalsuite.seeding import seeded
from evalsuite.task import Setup
from evalsuite.training import full_precision, full_precision_outputs

__all__ = ["RCNN", "TorchvisionRCNN", "build_model", "detector", "training_sample"]

Sample = tuple[Tensor, dict[str, Tensor]]


class TorchvisionRCNN:
    """The default engine. Where it departs from detectron2's recipes:

    box regression uses smooth L1 with beta 1/9 in the RPN and 1/9 in the head (detectron2: plain L1); region
    features of the pyramid come from RoIAlign without the half-pixel shift and with 2x2 samples a bin; in C4 with masks
    the last stage sees positive regions a second time; batches are not grouped by aspect ratio.
    """

    name = "torchvision"
    job = "detect"

    def version(self) -> str:
        return f"torchvision {torchvision.__version__}"

    def detect(
        self,
        backbone: Backbone,
        protocol: DetectionProtocol,
        train: DetectionSet,
        test: DetectionSet,
        setup: Setup,
    ) -> Detected:
        """Train on ``train`` as the protocol says, then detect on every image of ``test``."""

        def build() -> Detector:
            return detector(build_model(backbone, protocol, len(train.classes), setup.seed), protocol, train, test)

        return train_and_detect(build, backbone, protocol, train, test, setup, self.version())


def detector(model: RCNN, protocol: DetectionProtocol, train: DetectionSet, test: DetectionSet) -> Detector:
    """The model with its optimiser and its way of sizing and reading images."""
    return Detector(
        model=model,
        optimizer=optimizer_of(model, protocol),
        sample=partial(training_sample, train, learnable(train), protocol),
        view=partial(_test_sample, test, protocol),
        read=_detections,
    )


class RCNN(OnBackbone):
    """torchvision's detector on images that are sized already, with detections in pixels of the original images.

    Training: ``model(batch)`` of samples from :func:`training_sample` gives named losses. Evaluating: images
    (3,h,w) uint8 and their original (height, width) give torchvision's dictionaries. ``body`` are the modules of
    ``detector`` that came with the backbone.
    """

    def __init__(self, detector: FasterRCNN, body: tuple[nn.Module, ...], protocol: DetectionProtocol) -> None:
        super().__init__(body, protocol)
        self.detector = detector
        self.train()

    def forward(self, batch: list[Any]) -> Any:
        device = next(self.parameters()).device
        images = [image.to(device, non_blocking=True).float().div_(255) for image, _ in batch]
        if self.training:
            targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for _, target in batch]
            return self.detector(images, targets)
        d = self.detector
        sized, _ = d.transform(images)
        features = d.backbone(sized.tensors)
        proposals, _ = d.rpn(sized, features)
        found, _ = d.roi_heads(features, proposals, sized.image_sizes)
        return d.transform.postprocess(found, sized.image_sizes, [size for _, size in batch])


def build_model(backbone: Backbone, protocol: DetectionProtocol, classes: int, seed: int) -> RCNN:
    """The detector on a copy of ``backbone``, its new parts initialised from ``seed``.

    Raises :class:`BackboneError` where the protocol is C4 and the backbone cannot be cut.
    """
    body = copy.deepcopy(backbone)
    with seeded(seed):
        parts = _c4(body, protocol, classes) if protocol.model == "c4" else _fpn(body, protocol, classes)
        detector = (MaskRCNN if protocol.masks else FasterRCNN)(
            **parts,
            rpn_pre_nms_top_n_train=protocol.rpn_pre_nms_train,
            rpn_pre_nms_top_n_test=protocol.rpn_pre_nms_test,
            rpn_post_nms_top_n_train=protocol.rpn_post_nms_train,
            rpn_post_nms_top_n_test=protocol.rpn_post_nms_test,
            rpn_nms_thresh=protocol.rpn_nms,
            rpn_batch_size_per_image=protocol.rpn_batch,
            box_batch_size_per_image=protocol.roi_batch,
            box_positive_fraction=protocol.roi_positive,
            box_score_thresh=protocol.score_threshold,
            box_nms_thresh=protocol.nms,
            box_detections_per_img=protocol.detections,
        )
        _start_small(detector)
    heads = detector.roi_heads
    # from here on boxes and masks are made, and losses: torchvision computes these in the precision of what it is given
    full_precision_outputs(detector.rpn.head, heads.box_predictor, *([heads.mask_predictor] if protocol.masks else []))
    detector.transform = GeneralizedRCNNTransform(
        protocol.test_min_size,
        protocol.test_max_size,
        list(body.spec.mean),
        list(body.spec.std),
        _skip_resize=True,
    )
    pieces = (parts["backbone"].trunk, parts["box_head"].res5.tail) if protocol.model == "c4" else (body,)
    return RCNN(detector, pieces, protocol)


def _start_small(detector: FasterRCNN) -> None:
    """detectron2's starting weights of the heads: first predictions near zero, whatever the features' size.

    torchvision's own give first losses that grow with the features, which are large in a network without norms.
    """
    heads = detector.roi_heads
    for layer, std in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    if isinstance(heads.box_head, TwoMLPHead):
        for layer in (heads.box_head.fc6, heads.box_head.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    if heads.has_mask():
        nn.init.normal_(heads.mask_predictor.mask_fcn_logits.weight, std=0.001)


class _PyramidBody(nn.Module):
    """Images to the five levels of Lin et al. (2017): strides 4 to 32, and 64 by subsampling."""

    def __init__(self, body: Backbone, protocol: DetectionProtocol) -> None:
        super().__init__()
        self.body, self.frozen = body, protocol.freeze_backbone
        self.pyramid = Pyramid(body.spec.strides, protocol.pyramid_width, protocol.pyramid_norm)
        self.out_channels = protocol.pyramid_width

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.body.look(x).maps
        levels = self.pyramid(maps, (x.shape[-2], x.shape[-1]))
        named = OrderedDict((str(stride), level) for stride, level in levels.items())
        named["64"] = F.max_pool2d(levels[32], 1, 2)
        return named


class _Anchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors in float32 at least: torchvision rounds them to the precision of the maps, which may be whole pixels."""

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        # of a map only its size, precision and device are looked at
        anchors: list[Tensor] = super().forward(image_list, [full_precision(level[:1, :1]) for level in feature_maps])
        return anchors


def _fpn(body: Backbone, protocol: DetectionProtocol, classes: int) -> dict[str, Any]:
    levels = ["4", "8", "16", "32"]
    pool = partial(torchvision.ops.MultiScaleRoIAlign, levels, sampling_ratio=2)
    anchors = _Anchors(tuple((size,) for size in protocol.anchor_sizes), (protocol.anchor_ratios,) * 5)
    parts = {
        "backbone": _PyramidBody(body, protocol),
        "rpn_anchor_generator": anchors,
        "box_roi_pool": pool(protocol.roi_size),
        "box_head": TwoMLPHead(protocol.pyramid_width * protocol.roi_size**2, protocol.box_head_width),
        "box_predictor": FastRCNNPredictor(protocol.box_head_width, classes + 1),
    }
    if protocol.masks:
        parts["mask_roi_pool"] = pool(14)
        width = protocol.mask_head_width
        parts["mask_head"] = MaskRCNNHeads(protocol.pyramid_width, (width,) * 4, 1)
        parts["mask_predictor"] = MaskRCNNPredictor(width, width, classes + 1)
    return parts


class _Trunk(nn.Module):
    """A ResNet up to stride 16."""

    def __init__(self, trunk: nn.Module, channels: int, frozen: bool) -> None:
        super().__init__()
        self.trunk, self.out_channels, self.frozen = trunk, channels, frozen

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return {"16": self.trunk(x)}


class _AlignedRegions(torchvision.ops.MultiScaleRoIAlign):  # type: ignore[misc]  # MaskRCNN takes nothing else
    """RoIAlign on the only map, aligned and densely sampled as in detectron2 (ROIAlignV2)."""

    def __init__(self, size: int) -> None:
        super().__init__(["16"], size, sampling_ratio=-1)

    def forward(self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        options = {"sampling_ratio": self.sampling_ratio, "aligned": True}
        regions: Tensor = roi_align(features["16"], boxes, self.output_size, 1 / 16, **options)
        return regions


class _Res5(nn.Module):
    """The last stage on regions; with the extra norm after it of MoCo's transfer (Res5ROIHeadsExtraNorm)."""

    def __init__(self, tail: nn.Module, channels: int, norm: bool) -> None:
        super().__init__()
        self.tail = tail
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.tail(x))
        return y


class _Res5Pooled(nn.Module):
    def __init__(self, res5: _Res5) -> None:
        super().__init__()
        self.res5 = res5

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.res5(x).mean((2, 3))
        return pooled


def _c4(body: Backbone, protocol: DetectionProtocol, classes: int) -> dict[str, Any]:
    trunk, tail = body.split()
    if not {16, 32} <= set(body.spec.strides):
        raise BackboneError(
            f"{body.spec.arch} has no map of stride 16 to draw regions from",
            cause=f"its strides are {', '.join(map(str, sorted(body.spec.strides)))}",
            fix="choose a pyramid protocol, for example --protocol fpn",
        )
    width = body.spec.strides[max(body.spec.strides)]
    res5 = _Res5(tail, width, protocol.res5_norm)
    parts = {
        "backbone": _Trunk(trunk, body.spec.strides[16], protocol.freeze_backbone),
        "rpn_anchor_generator": _Anchors((protocol.anchor_sizes,), (protocol.anchor_ratios,)),
        "box_roi_pool": _AlignedRegions(protocol.roi_size),
        "box_head": _Res5Pooled(res5),
        "box_predictor": FastRCNNPredictor(width, classes + 1),
    }
    if protocol.masks:
        parts |= {
            "mask_roi_pool": _AlignedRegions(protocol.roi_size),
            "mask_head": res5,
            "mask_predictor": MaskRCNNPredictor(width, protocol.mask_head_width, classes + 1),
        }
    return parts


def training_sample(
    data: DetectionSet, records: list[Record], protocol: DetectionProtocol, index: int, seed: int
) -> Sample:
    """Image ``index`` sized and perhaps flipped as ``seed`` draws it: (3,h,w) uint8, and its targets.

    Targets are ``boxes`` (N,4) in pixels of the sized image, ``labels`` (N,) from 1, and ``masks`` (N,h,w) where
    the protocol trains them. Crowds are left out, difficult objects are kept, as in detectron2.
    """
    record, rng = records[index], np.random.default_rng(seed)
    image, (sy, sx) = _sized(data.decode(record), int(rng.choice(protocol.min_sizes)), protocol.max_size)
    keep = ~record.crowd
    target = {
        "boxes": torch.from_numpy(record.boxes[keep] * (sx, sy, sx, sy)).float(),
        "labels": torch.from_numpy(record.labels[keep]) + 1,
    }
    if protocol.masks:
        masks = torch.as_tensor(data.masks(record))[torch.from_numpy(keep)]
        target["masks"] = F.interpolate(masks[None].float(), image.shape[1:], mode="nearest-exact")[0].to(torch.uint8)
    if rng.random() < protocol.flip:
        image = image.flip(-1)
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        target["boxes"] = torch.stack([image.shape[2] - x1, y0, image.shape[2] - x0, y1], 1)
        if protocol.masks:
            target["masks"] = target["masks"].flip(-1)
    return image, target


def _sized(image: Tensor, shorter: int, longest: int) -> tuple[Tensor, tuple[float, float]]:
    """The image with its shorter side at ``shorter``, or its longer at ``longest`` if that is less; and (sy, sx)."""
    height, width = image.shape[1:]
    scale = min(shorter / min(height, width), longest / max(height, width))
    new = round(height * scale), round(width * scale)
    return resize(image, *new), (new[0] / height, new[1] / width)


def _test_sample(data: DetectionSet, protocol: DetectionProtocol, record: Record) -> tuple[Tensor, tuple[int, int]]:
    """The image (3,h,w) uint8 at its test size, and its original (height, width)."""
    image = data.decode(record)
    return _sized(image, protocol.test_min_size, protocol.test_max_size)[0], (record.height, record.width)


def _detections(record: Record, output: Mapping[str, Tensor]) -> Detections:
    masks = None
    if "masks" in output:
        binary = (output["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
        masks = tuple(rle.encode(np.asfortranarray(mask)) for mask in binary)
    return Detections(
        image_id=record.image_id,
        boxes=output["boxes"].double().cpu().numpy(),
        scores=output["scores"].double().cpu().numpy(),
        labels=(output["labels"] - 1).cpu().numpy(),
        masks=masks,
    )
