"""SimSiam: one view predicts the other, whose gradient is stopped; no negatives and no slow copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from evalsuite import Features, hookimpl
from pretrain import Batch, Look, Method, Pairs, Preset, Run, Training, moco_v2
from pretrain.blocks import mlp_head, neg_cosine

__all__ = ["SimSiam"]


class SimSiam(Method):
    """Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021 (arXiv 2011.10566).

    Each view goes through the backbone and a projector of three layers by itself; a predictor with a bottleneck maps
    its projection onto the other view's, whose gradient is stopped. The loss is half the sum of the negative
    cosines of both directions, in [-1, 1]. ``layers`` is the number of layers of the projector.
    ``fixed_predictor_rate`` keeps the predictor's learning rate (``--fix-pred-lr``). Without the ``predictor`` it
    collapses, which the alarm then tells.

    Official recipe (code): ResNet-50 whose residual branches start at zero, batch 512, SGD 0.05 B / 256, momentum 0.9,
    weight decay 1e-4 on everything, 100 epochs, cosine by epoch, views of MoCo v2, synchronised batch normalisation;
    linear top-1 on ImageNet 68.1 (batch 512), 68.3 (batch 256) (README). ``cifar`` is that recipe at 32 pixels without
    blur, narrower heads, ours.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        width: int = 2048
        bottleneck: int = 512
        layers: int = 3
        predictor: bool = True
        fixed_predictor_rate: bool = True
        blur: float = 0.5
        by_epoch: bool = True

    small: ClassVar[Mapping[str, Any]] = {"width": 32, "bottleneck": 8}
    presets: ClassVar[Mapping[str, Preset]] = {
        "imagenet": Preset("facebookresearch/simsiam README", 100, 512),
        "cifar": Preset("ours", 800, 512, {"size": 32, "blur": 0.0, "width": 512, "bottleneck": 128}),
    }

    projector: nn.Module
    predictor: nn.Module

    @hookimpl
    def views(self) -> tuple[Look, ...]:
        augment = moco_v2(self.options.size, self.options.blur)
        return augment, augment

    @hookimpl
    def prepared(self, run: Run) -> None:
        o = self.options
        widths = [run.dim, *[o.width] * o.layers]
        self.projector = mlp_head(*widths, last_norm="plain", last_bias=False)
        self.predictor = mlp_head(o.width, o.bottleneck, o.width) if o.predictor else nn.Identity()
        self.predictor.constant_rate = o.fixed_predictor_rate

    @hookimpl
    def features(self, run: Run, batch: Batch) -> list[Features]:
        """View by view, so that batch normalisation sees one at a time."""
        return [run.backbone(view.data) for view in batch.views]

    @hookimpl
    def pairs(self, batch: Batch, features: list[Features]) -> list[Pairs]:
        z: list[Any] = [self.projector(f.pooled) for f in features]
        p = [self.predictor(row) for row in z]
        return [
            Pairs(p[0], z[1].detach(), batch.index, mate=p[1]),
            Pairs(p[1], z[0].detach(), batch.index, mate=p[0]),
        ]

    @hookimpl
    def losses(self, pairs: list[Pairs]) -> dict[str, Tensor]:
        terms = [neg_cosine(p.query, p.key) for p in pairs]
        return {"cosine": sum(terms[1:], terms[0]) / len(terms)}
