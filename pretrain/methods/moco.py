"""MoCo: contrasts a view with the keys of many other images, which a slow copy of the network made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from evalsuite import Features, hookimpl
from pretrain import Augment, Batch, Look, Method, Pairs, Preset, Run, Training, moco_v1, moco_v2
from pretrain.blocks import EmaTwin, Queue, firsts, full_precision, gather, info_nce, mlp_head, rank, world_size

__all__ = ["MoCo", "MoCo1"]


class MoCo(Method):
    """He, Fan, Wu, Xie and Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020
    (arXiv 1911.05722); version 2: Chen, Fan, Girshick and He, "Improved Baselines with Momentum Contrastive
    Learning" (arXiv 2003.04297).

    The first view is the query; the second goes through a copy of backbone and head whose parameters follow
    with ``momentum``. InfoNCE at ``temperature`` against a queue of the last ``queue`` keys, to which the batch's own
    are added after the step. The queue must be a multiple of the batch.

    Batch normalisation would give the pairs away, for query and key of an image would share their statistics.
    The official code has eight devices of 32 images, each with its own statistics, and shuffles the keys over them.
    Here the batch is put into ``groups`` groups wherever it lies: on one process the groups have statistics of their
    own and the keys are shuffled among them; on several, the groups are shared out and the images of the keys
    exchanged. The numbers do not depend on how many processes there are. ``groups=1`` is for networks without batch
    normalisation.

    Official recipe (code): ResNet-50, batch 256, SGD 0.03 with momentum 0.9 and weight decay 1e-4 on everything, 200
    epochs; head of two layers, temperature 0.2, cosine by epoch. Linear top-1 on ImageNet (README): 67.7 after 200
    epochs, 71.1 after 800. ``cifar`` takes the queue, learning rate and temperature that AdaInf trains MoCo v2 with
    on CIFAR (code), with one direction and a constant momentum as here.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        width: int = 128
        head: Literal["linear", "mlp"] = "mlp"
        temperature: float = 0.2
        queue: int = 65536
        momentum_twin: float = 0.999
        groups: int = 8
        blur: float = 0.5
        lr: float = 0.03
        by_epoch: bool = True

    small: ClassVar[Mapping[str, Any]] = {"groups": 2, "queue": 64}
    presets: ClassVar[Mapping[str, Preset]] = {
        "imagenet": Preset("facebookresearch/moco README", 200, 256),
        "cifar": Preset(
            "ours, after PKU-ML/adainf",
            200,
            512,
            {"size": 32, "queue": 32768, "lr": 0.15, "momentum_twin": 0.99, "blur": 0.0},
        ),
    }

    head: nn.Module
    slow_backbone: EmaTwin
    slow_head: EmaTwin
    queue: Queue

    @property
    def norm_groups(self) -> int:
        return int(self.options.groups)

    def augment(self) -> Augment:
        """The official views of this version."""
        return moco_v2(self.options.size, self.options.blur)

    @hookimpl
    def views(self) -> tuple[Look, ...]:
        return self.augment(), self.augment()

    @hookimpl
    def prepared(self, run: Run) -> None:
        o = self.options
        widths = (run.dim, run.dim, o.width) if o.head == "mlp" else (run.dim, o.width)
        self.head = mlp_head(*widths, norm=False)
        self.slow_backbone = EmaTwin(run.backbone, o.momentum_twin)
        self.slow_head = EmaTwin(self.head, o.momentum_twin)
        self.queue = Queue(o.queue, o.width)
        self.queue.fits(run.batch_size // world_size())

    @hookimpl
    def features(self, run: Run, batch: Batch) -> list[Features]:
        """Of the query's view by the backbone, of the key's by its slow copy."""
        query, key = (view.data for view in batch.views)
        return [run.backbone(query), self._slow(key, run.rng)]

    @torch.no_grad()
    def _slow(self, images: Tensor, rng: torch.Generator) -> Features:
        """The slow backbone's pooled features, its batch normalisation grouped otherwise than the queries'."""
        order, back = shuffle(len(images) * world_size(), rng, images.device)
        mixed = gather(images)[order] if self.options.groups > 1 else images
        pooled: Any = self.slow_backbone(mixed).pooled
        return Features(gather(pooled)[back] if self.options.groups > 1 else pooled)

    @hookimpl
    def pairs(self, batch: Batch, features: list[Features]) -> list[Pairs]:
        query, key = features
        unit = nn.functional.normalize(full_precision(self.slow_head(key.pooled)))
        return [Pairs(self.head(query.pooled), unit, batch.index)]

    @hookimpl
    def losses(self, pairs: list[Pairs]) -> dict[str, Tensor]:
        terms = [info_nce(p.query, p.key, self.queue.rows, temperature=self.options.temperature) for p in pairs]
        return {"info_nce": sum(terms[1:], terms[0])}

    @hookimpl
    def stepped(self, run: Run, batch: Batch, pairs: list[Pairs]) -> None:
        """Follow the step, then remember one key of each row of the batch: as many on every process, even where an
        image stands twice in it. The official code follows before the next step's keys, which is the same."""
        self.slow_backbone.update(run.backbone)
        self.slow_head.update(self.head)
        for p in pairs:
            self.queue.push(p.key[firsts(p.source, batch.index)])


class MoCo1(MoCo):
    """MoCo as first published (arXiv 1911.05722): a linear head, temperature 0.07, no blur, grey before a jitter that
    is always on, the learning rate down by ten at 120 and 160 of 200 epochs (code). Linear top-1 on ImageNet after 200
    epochs: 60.6 (README). The rest is as in MoCo."""

    @dataclass(frozen=True, kw_only=True)
    class Options(MoCo.Options):
        head: Literal["linear", "mlp"] = "linear"
        temperature: float = 0.07
        blur: float = 0.0
        schedule: Literal["cosine", "step", "constant"] = "step"

    presets: ClassVar[Mapping[str, Preset]] = {
        "imagenet": Preset("facebookresearch/moco README", 200, 256),
        "cifar": Preset("ours", 200, 512, {"size": 32, "queue": 32768, "momentum_twin": 0.99}),
    }

    def augment(self) -> Augment:
        return replace(moco_v1(self.options.size), blur=self.options.blur)


def shuffle(count: int, rng: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of this process's rows of a shuffled batch of ``count`` among gathered ones, and of its own rows among
    the gathered results.

    Row i of process r is row i * world + r of the whole batch, as everywhere; gathered rows come process by process.
    """
    world, mine = world_size(), rank()
    order = torch.randperm(count, generator=rng)
    back = order.argsort()

    def gathered(rows: Tensor) -> Tensor:
        return (rows % world) * (count // world) + rows // world

    return gathered(order[mine::world]).to(device), gathered(back[mine::world]).to(device)
