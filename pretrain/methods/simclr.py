"""SimCLR: two views of an image are each other's positive, all other views in the batch are negatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from evalsuite import Features, hookimpl
from pretrain import Batch, Look, Method, Pairs, Preset, Run, Training, simclr
from pretrain.blocks import mlp_head, nt_xent, simclr_head

__all__ = ["SimCLR"]


class SimCLR(Method):
    """Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual Representations",
    ICML 2020 (arXiv 2002.05709), and version 2 of its head (arXiv 2006.10029).

    Both views go through the backbone in one batch; NT-Xent over the rows of all processes, gathered with gradient,
    at ``temperature``. ``head`` is ``v2`` (three layers, the official default now), ``v1`` (two), both with batch
    normalisation after every layer, or ``plain``: two layers of width ``hidden`` without any, as in solo-learn and
    AdaInf. ``loss`` names a convention: ``mean`` over the 2 N anchors; ``sum`` of the means of the two
    directions, twice that, as google-research/simclr has it and its learning rates assume; ``supervised`` counts
    further rows of one source as positives (solo-learn; the same number where every source comes once).

    Official recipe (code, README): batch 4096, LARS with momentum 0.9 and trust 0.001, learning rate 0.075 sqrt(B),
    weight decay 1e-4 on everything but vectors, ten epochs of warm-up, cosine; 100 epochs of ResNet-50 then give
    "around 64.5 %" linear top-1 on ImageNet (README); the released 1x checkpoint of version 1 has 69.1 (README).
    ``cifar`` is the CIFAR-10 command of the README: ResNet-18 with a small stem, batch 512, 1000 epochs, learning
    rate 1.0 scaled linearly, temperature 0.5, jitter strength 0.5, no blur.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        width: int = 128
        head: Literal["v1", "v2", "plain"] = "v2"
        hidden: int = 2048
        temperature: float = 0.1
        loss: Literal["mean", "sum", "supervised"] = "sum"
        strength: float = 1.0
        blur: float = 0.5
        optimizer: Literal["sgd", "lars", "adamw"] = "lars"
        lr: float = 1.2  # 0.075 sqrt(256)
        scaling: Literal["linear", "sqrt", "none"] = "sqrt"
        decay_vectors: bool = False
        warmup: float = 10.0

    presets: ClassVar[Mapping[str, Preset]] = {
        "imagenet": Preset("google-research/simclr README", 100, 4096),
        "cifar": Preset(
            "google-research/simclr README",
            1000,
            512,
            {"size": 32, "temperature": 0.5, "strength": 0.5, "blur": 0.0, "lr": 1.0, "scaling": "linear"},
        ),
    }

    head: nn.Module

    @hookimpl
    def views(self) -> tuple[Look, ...]:
        o = self.options
        augment = simclr(o.size, o.strength, o.blur)
        return augment, augment

    @hookimpl
    def prepared(self, run: Run) -> None:
        o = self.options
        if o.head == "plain":
            self.head = mlp_head(run.dim, o.hidden, o.width, norm=False)
        else:
            self.head = simclr_head(run.dim, o.width, o.head)

    @hookimpl
    def pairs(self, batch: Batch, features: list[Features]) -> list[Pairs]:
        both = self.head(_together(features))
        query, key = both.chunk(2)
        return [Pairs(query, key, batch.index)]

    @hookimpl
    def losses(self, pairs: list[Pairs]) -> dict[str, Tensor]:
        o = self.options
        kin: Literal["ignored", "positive"] = "positive" if o.loss == "supervised" else "ignored"
        terms = [nt_xent(p.query, p.key, p.source, temperature=o.temperature, kin=kin) for p in pairs]
        total = sum(terms[1:], terms[0])
        return {"nt_xent": 2 * total if o.loss == "sum" else total}


def _together(features: list[Features]) -> Tensor:
    """Both views in one batch, so that the head's batch normalisation sees them together."""
    return torch.cat([f.pooled for f in features if f.pooled is not None])
