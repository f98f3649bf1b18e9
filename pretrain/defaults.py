"""What every stage answers where a method does not: the first part of any recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from evalsuite import Features, hookimpl
from pretrain.batch import Batch, Look
from pretrain.blocks import LARS, cosine_schedule, reached, split_decay, step_schedule, warmup_share
from pretrain.data import Images, shown
from pretrain.plugin import Plugin, Run, Training
from pretrain.views import moco_v2

__all__ = ["Defaults", "build_optimizer", "look_at", "look_through"]


def look_at(run: Run, batch: Batch) -> list[Features]:
    """The backbone's features of each image view. Views of one size go through it together, so that batch
    normalisation sees them together, as in SimCLR and SwAV."""
    features: dict[int, Features] = {}
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index, view in enumerate(batch.views):
        sizes.setdefault(tuple(view.data.shape[1:]), []).append(index)
    for indices in sizes.values():
        joined = run.backbone(torch.cat([batch.views[p].data for p in indices]))
        features.update(zip(indices, _split(joined, len(indices)), strict=True))
    return [features[index] for index in range(len(batch.views))]


def _split(features: Features, parts: int) -> Iterator[Features]:
    def chunks(tensor: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * parts if tensor is None else tensor.chunk(parts)

    pooled, tokens, masks = chunks(features.pooled), chunks(features.tokens), chunks(features.masks)
    maps = {stride: level.chunk(parts) for stride, level in features.maps.items()}
    for i in range(parts):
        yield Features(pooled[i], {stride: level[i] for stride, level in maps.items()}, tokens[i], masks[i])


def look_through(run: Run, data: Images, look: Look) -> Iterator[Tensor]:
    """Images, each looked at once and in order, as batches (B,3,H,W) in [0,1] on the run's device: for ``measures``."""
    return shown(data, look, run.device, run.workers)


class Defaults(Plugin):
    """Two views as in MoCo v2, batches in random order, and the optimiser and schedule that ``run.training`` names."""

    Options = Training

    @hookimpl
    def dataset(self, data: Images) -> Images:
        return data

    @hookimpl
    def views(self, run: Run) -> tuple[Look, ...]:
        augment = moco_v2(run.training.size)
        return augment, augment

    @hookimpl
    def batches(self, run: Run, data: Images, epoch: int) -> Iterable[Tensor]:
        order = np.random.default_rng([run.seed, epoch, 0]).permutation(len(data))
        whole = len(order) // run.batch_size * run.batch_size
        return list(torch.from_numpy(order[:whole]).view(-1, run.batch_size))

    @hookimpl
    def features(self, run: Run, batch: Batch) -> list[Features]:
        return look_at(run, batch)

    @hookimpl
    def optimizer(self, run: Run, modules: nn.Module) -> Optimizer:
        return build_optimizer(run.training, run.batch_size, _groups(modules))

    @hookimpl
    def rate(self, run: Run) -> float:
        t = run.training
        at, total = run.step / run.epoch_steps, run.steps / run.epoch_steps
        if not reached(at, t.warmup):
            return t.start + (1 - t.start) * warmup_share(run.step, t.warmup * run.epoch_steps, t.rise)
        at = max(float(int(at)), t.warmup) if t.by_epoch else at
        if t.schedule == "cosine":
            return cosine_schedule(max(at, t.warmup), total, 1.0, floor=t.floor, warmup=t.warmup)
        if t.schedule == "step":
            return step_schedule(at, 1.0, [share * total for share in t.milestones], t.factor)
        return 1.0


def _groups(modules: nn.Module) -> list[dict[str, Any]]:
    """The trained parameters, in two groups: those of modules that ask for a constant learning rate, and the rest."""
    constant = {id(p) for m in modules.modules() if getattr(m, "constant_rate", False) for p in m.parameters()}
    trained = [p for p in modules.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in constant], "constant": False},
        {"params": [p for p in trained if id(p) in constant], "constant": True},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(t: Training, batch_size: int, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimiser that a recipe names, over parameter groups with a mark ``constant`` each; ``lr`` in a group
    overrides the recipe's."""
    scale = {"linear": batch_size / 256, "sqrt": (batch_size / 256) ** 0.5, "none": 1.0}[t.scaling]
    lr = t.lr * scale
    parted: list[dict[str, Any]] = []
    for group in groups:
        mark = {"constant": group["constant"], "lr": group.get("lr", t.lr) * scale}
        if t.decay_vectors:
            parted.append({"params": group["params"], "weight_decay": t.weight_decay, "adapt": True} | mark)
        else:
            parted += [part | mark for part in split_decay(group["params"], t.weight_decay)]
    if t.optimizer == "lars":
        return LARS(parted, lr, momentum=t.momentum, trust=t.trust, ratio=t.trust_ratio, clip=t.trust_clip)
    if t.optimizer == "adamw":
        return AdamW(parted, lr, betas=t.betas)
    return SGD(parted, lr, momentum=t.momentum, nesterov=t.nesterov)
