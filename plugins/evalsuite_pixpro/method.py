"""PixPro: pixels of two views that lie at one place of the image agree.

"Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual Representation Learning", Xie, Lin,
Zhang, Cao, Lin, Hu, CVPR 2021, arXiv 2011.10043; the facts are those of the official code,
``contrast/models/PixPro.py`` and ``tools/pixpro_base_r50_100ep.sh``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalsuite import Features, UsageError, hookimpl
from evalsuite.training import uncast
from pretrain import Batch, Look, Method, Preset, Run, Training, pixpro_pair
from pretrain.blocks import EmaTwin, full_precision, neg_cosine


class PixPro(Method):
    """Lets every pixel of the coarsest feature map of one view foretell the pixels of the other view that lie near
    it in the image.

    One branch projects its map and passes it through the pixel propagation module, where each pixel becomes the sum of
    all (transformed) pixels of its map, weighted by similarity: y_i = sum_j max(cos(x_i, x_j), clamp)^power g(x_j).
    The other is a slow copy of backbone and projector, whose momentum rises from ``momentum_twin`` to 1 on a cosine.
    Two pixels belong together if their centres lie nearer than ``reach`` times the longer diagonal of a pixel of
    either map. The loss of a direction is -2 times the mean cosine of such pairs, image by image; both directions are
    added, so it lies in [-4, 4]. Crops that do not overlap give 0. Batch statistics are of all processes, view by view.

    ``task=contrast`` is the paper's PixContrast: without propagation, a pixel is contrasted with those of the other
    view that are not near it, by a softmax over all of them at ``temperature`` (eq. 2). Its code was not published:
    pixels without a partner are left out, and the mean of both directions is ours. ``instance`` adds the instance
    branch at that weight, the same regression of averaged maps through a projector and a predictor of its own.

    Official recipe (code): ResNet-50, batch 1024, LARS 1.0 B / 256 that leaves vectors alone, five epochs of warm-up
    from a hundredth, a cosine to 1e-6 (``floor`` times the rate), 100 or 400 epochs; the last norm of every residual
    block starts at 0 (as timm's do; torchvision: ``--arch-option zero_init_residual=true``). VOC detection by
    R50-C4 58.8 AP after 100 epochs, 60.2 after 400; COCO by FPN 40.8 and 41.4, the latter with the instance branch
    (README).

    Where this differs: a resumed run goes on along the momentum's schedule, which the official code begins anew. The
    pre-training of FPN and heads, which the paper reports, is not here: neither code nor its settings were published.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        task: Literal["propagation", "contrast"] = "propagation"
        width: int = 256
        hidden: int = 4096  # of the projector
        reach: float = 0.7  # how far apart pixels that belong together lie, in diagonals of a pixel
        clamp: float = 0.0  # the least similarity
        power: float = 2.0
        transform: int = 1  # 1x1 convolutions that transform what is propagated: 0, 1 or 2
        instance: float = 0.0  # weight of the instance branch
        temperature: float = 0.3  # of PixContrast
        momentum_twin: float = 0.99
        blur: bool = True  # as published; not for images of 32 pixels
        optimizer: Literal["sgd", "lars", "adamw"] = "lars"
        lr: float = 1.0
        weight_decay: float = 1e-5
        decay_vectors: bool = False
        warmup: float = 5.0
        start: float = 0.01
        floor: float = 2.5e-7

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.transform not in (0, 1, 2) or self.clamp < 0 or self.power <= 0 or self.reach <= 0:
                raise ValueError("transform is 0, 1 or 2, clamp at least 0, power and reach above it")

    small: ClassVar[Mapping[str, Any]] = {"width": 16, "hidden": 32}
    presets: ClassVar[Mapping[str, Preset]] = {
        "imagenet": Preset("zdaxie/PixPro tools/pixpro_base_r50_100ep.sh", 100, 1024),
        "imagenet-400": Preset("zdaxie/PixPro tools/pixpro_base_r50_400ep.sh", 400, 1024),
        "cifar": Preset("ours", 200, 512, {"size": 32, "hidden": 1024, "blur": False}),
        "quick": Preset(
            "ours, for a few hundred images and four minutes of one processor core",
            110,
            32,
            {"size": 48, "hidden": 512, "width": 128, "optimizer": "adamw", "lr": 2e-3, "scaling": "none"},
        ),
    }

    projector: nn.Module
    slow_backbone: EmaTwin
    slow_projector: EmaTwin

    @hookimpl
    def views(self) -> tuple[Look, ...]:
        looks = pixpro_pair(self.options.size)
        return looks if self.options.blur else tuple(replace(look, blur=0.0) for look in looks)

    @hookimpl
    def prepared(self, run: Run) -> None:
        o, strides = self.options, run.backbone.spec.strides
        if not strides:
            raise UsageError(
                f"pixpro learns from feature maps, which {run.backbone.spec.arch} does not give",
                cause="its pixels are those of the coarsest map",
                fix="choose an architecture with maps, for example --arch timm:resnet50",
            )
        self.stride = max(strides)
        channels = strides[self.stride]
        self.projector = pixel_mlp(channels, o.hidden, o.width)
        self.transform = transform(o.transform, o.width) if o.task == "propagation" else None
        self.slow_backbone = EmaTwin(run.backbone, o.momentum_twin, total=run.steps)
        self.slow_projector = EmaTwin(self.projector, o.momentum_twin, total=run.steps)
        if o.instance:
            self.instance_projector = pixel_mlp(channels, o.hidden, o.width)
            self.instance_predictor = pixel_mlp(o.width, o.hidden, o.width)
            self.slow_instance = EmaTwin(self.instance_projector, o.momentum_twin, total=run.steps)
        self.follow(run)  # officially before the first keys, where nothing has moved: the schedule is one step on

    def follow(self, run: Run) -> None:
        """Move the slow copies a step."""
        self.slow_backbone.update(run.backbone)
        self.slow_projector.update(self.projector)
        if self.options.instance:
            self.slow_instance.update(self.instance_projector)

    @hookimpl
    def features(self, run: Run, batch: Batch) -> list[Features]:
        """View by view, so that batch normalisation sees one at a time."""
        return [run.backbone(view.data) for view in batch.views]

    @hookimpl
    def losses(self, batch: Batch, features: list[Features]) -> dict[str, Tensor]:
        maps = [f.maps[self.stride] for f in features]
        slow = [self.slow_backbone(view.data).maps[self.stride] for view in batch.views]
        terms = {"pixels": self.pixels(batch, maps, slow)}
        if self.options.instance:
            terms["instances"] = self.options.instance * self.instances(maps, slow)
        return terms

    def pixels(self, batch: Batch, maps: list[Tensor], slow: list[Tensor]) -> Tensor:
        """The loss between the pixels of both views, in both directions."""
        o = self.options
        own = [self.projector(m) for m in maps]
        keys = [self.slow_projector(m) for m in slow]
        if self.transform is not None:
            own = [propagated(x, self.transform(x), o.clamp, o.power) for x in own]
        first, second = (view.box for view in batch.views)
        assert first is not None
        assert second is not None
        near = nearby(first, second, maps[0].shape[2:], o.reach)
        if o.task == "contrast":
            both = [pixel_contrast(own[0], keys[1], near, o.temperature)]
            both.append(pixel_contrast(own[1], keys[0], near.mT, o.temperature))
            return torch.stack(both).mean()
        return consistency(own[0], keys[1], near) + consistency(own[1], keys[0], near.mT)

    def instances(self, maps: list[Tensor], slow: list[Tensor]) -> Tensor:
        """-2 cos of the averaged predictions of one view and the averaged projections of the other, both ways."""
        own = [full_precision(self.instance_predictor(self.instance_projector(m))).mean((2, 3)) for m in maps]
        keys = [full_precision(self.slow_instance(m)).mean((2, 3)) for m in slow]
        return 2 * (neg_cosine(own[0], keys[1]) + neg_cosine(own[1], keys[0]))

    @hookimpl
    def stepped(self, run: Run) -> None:
        self.follow(run)


def pixel_mlp(channels: int, hidden: int, width: int) -> nn.Sequential:
    """Two 1x1 convolutions with biases, batch normalisation and ReLU between them."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True), nn.Conv2d(hidden, width, 1)
    )


def transform(layers: int, width: int) -> nn.Module:
    """What turns pixels into what is propagated, of 0, 1 or 2 layers."""
    return (nn.Identity(), nn.Conv2d(width, width, 1), pixel_mlp(width, width, width))[layers]


# Pixels (B,C,H,W) and pairs of them (B,HW,HW), in float32 or better whatever the autocast around them ------------


def unit(pixels: Tensor) -> Tensor:
    """(B,C,H,W) as (B,C,HW), each pixel of length 1."""
    return F.normalize(full_precision(pixels).flatten(2), dim=1)


def propagated(pixels: Tensor, values: Tensor, clamp: float = 0.0, power: float = 2.0) -> Tensor:
    """The pixel propagation module: y_i = sum_j max(cos(x_i, x_j), clamp)^power n(g_j), for pixels x and values g
    (B,C,H,W). There is no softmax, and j = i counts (``PixPro.featprop``).

    Powers below 1 have their base raised by 1e-6, for the sake of the gradient at 0.
    """
    with uncast(pixels.device):
        x = unit(pixels)
        similarity = x.mT @ x
        # in place where nothing needs what was there: fewer matrices are kept for the backward pass
        similarity = similarity.relu_() if clamp == 0 else similarity.clamp_(min=clamp)
        if power < 1:
            similarity = similarity + 1e-6
        weight = similarity.square() if power == 2 else similarity**power
        return (unit(values) @ weight).view(pixels.shape)  # it is symmetric: no transpose need be made


def nearby(first: Tensor, second: Tensor, shape: torch.Size | tuple[int, int], reach: float) -> Tensor:
    """Which pixels of two views lie near each other: (B,HW,HW), true where the distance of their centres is below
    ``reach`` times the longer of the two diagonals of a pixel.

    ``first`` and ``second`` (B,4) are the views' boxes x0, y0, x1, y1 in the image; where x0 > x1 the view is
    mirrored, and so are its pixels. Both maps are of ``shape`` (H,W).
    """
    size = torch.tensor([shape[1], shape[0]], dtype=first.dtype, device=first.device)
    bins = [(box[:, 2:] - box[:, :2]) / size for box in (first, second)]
    limit = reach * torch.stack([b.norm(dim=1) for b in bins]).amax(0)
    squares = []
    for axis in (1, 0):  # rows and columns of the grid apart: their squares only meet in the last sum
        steps = torch.arange(shape[1 - axis], dtype=first.dtype, device=first.device) + 0.5
        a, b = (box[:, axis, None] + steps * bin[:, axis, None] for box, bin in zip((first, second), bins, strict=True))
        squares.append((a[:, :, None] - b[:, None]).square())
    rows, columns = squares
    together = rows[:, :, None, :, None] + columns[:, None, :, None, :] < limit.square()[:, None, None, None, None]
    return together.view(len(first), shape[0] * shape[1], -1)


def consistency(pixels: Tensor, keys: Tensor, near: Tensor) -> Tensor:
    """-2 times the mean cosine of pixels and keys (B,C,H,W) that lie ``near`` each other, over the pairs of an image
    and then over images (``regression_loss``). No gradient reaches the keys.
    """
    with uncast(pixels.device):
        keys = unit(keys.detach())
        pairs = near.to(keys.dtype)
        target = keys @ pairs.mT  # the sum of a pixel's keys: the backward pass then needs no product of matrices
        cosines = (unit(pixels) * target).sum((1, 2)) / (pairs.sum((1, 2)) + 1e-6)
        return -2 * cosines.mean()


def pixel_contrast(pixels: Tensor, keys: Tensor, near: Tensor, temperature: float) -> Tensor:
    """-log of the share that the keys ``near`` a pixel have in its softmax over all keys of the other view, at
    ``temperature``: the mean over the pixels of an image that have such keys, then over images (PixContrast, eq. 2).
    No gradient reaches the keys; an image without such pixels counts as 0.
    """
    with uncast(pixels.device):
        logits = unit(pixels).mT @ unit(keys.detach()) / temperature
        partners = logits.masked_fill(~near, torch.finfo(logits.dtype).min).logsumexp(2)
        has = near.any(2)
        lost = torch.where(has, logits.logsumexp(2) - partners, 0)
        return (lost.sum(1) / has.sum(1).clamp(min=1)).mean()
