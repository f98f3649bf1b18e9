"""What engines of dense heads share: train a model as the protocol says, then run it on every test image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from torchvision.ops._utils import split_normalization_params

from evalsuite.preflight import Demand
from evalsuite.protocols import Training
from evalsuite.seeding import manual_seed
from evalsuite.task import Setup
from evalsuite.training import Fit, Steps, fit, launched, mix_seed
from evalsuite.training.processes import together

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["OnBackbone", "Trainable", "Trained", "demand_of", "infer_all", "optimizer_of", "train_and_test"]


@dataclass(frozen=True)
class Trainable:
    """A model as an engine built it, and how to feed and read it.

    ``model(batch)`` of training samples gives named losses in training mode, and of test samples one output each in
    evaluation mode. ``sample(index, seed)`` is a training sample, the index below ``length``; ``view(index)`` a test
    sample; ``read(index, view, output)`` what is kept of its output.
    """

    model: nn.Module
    optimizer: Optimizer
    sample: Callable[[int, int], Any]
    length: int
    view: Callable[[int], Any]
    read: Callable[[int, Any, Any], Any]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What was read of every test image in order, the training log, seconds by phase, and facts worth recording."""

    outputs: list[Any]
    log: list[dict[str, float]]
    timings: dict[str, float]
    details: dict[str, Any]


class OnBackbone(nn.Module):
    """A model whose modules ``body`` came with a backbone: what the protocol holds still, stays still.

    A subclass registers its modules after this constructor and calls :meth:`train` then.
    """

    def __init__(self, body: tuple[nn.Module, ...], protocol: Training) -> None:
        super().__init__()
        self._body, self._freeze = body, protocol.freeze_backbone
        self._frozen_norm = protocol.backbone_norm == "frozen"
        for module in self._still():
            module.requires_grad_(False)

    def _still(self) -> Iterator[nn.Module]:
        """What never leaves evaluation mode; looked up each time, for norms get replaced by synchronised ones."""
        for part in self._body:
            if self._freeze:
                yield part
            elif self._frozen_norm:
                yield from (module for module in part.modules() if isinstance(module, _BatchNorm))

    def train(self, mode: bool = True) -> OnBackbone:
        super().train(mode)
        for module in self._still():
            module.eval()
        return self


def demand_of(protocol: Training, tests: int, setup: Setup) -> Demand:
    """What training a dense head asks of the machine."""
    return Demand(
        what=f"training by {protocol.id}", pixels=protocol.pixels, batch=protocol.batch_size,
        steps=protocol.iterations, tests=tests + protocol.precise_bn * protocol.batch_size, patient=setup.patient,
        shorter=("--set iterations={}", protocol.iterations),
    )  # fmt: skip


def optimizer_of(model: nn.Module, protocol: Training) -> Optimizer:
    """SGD or AdamW, without weight decay on norms (detectron2's SOLVER.WEIGHT_DECAY_NORM = 0)."""
    norms, others = split_normalization_params(model)
    groups = [g for g in ({"params": others}, {"params": norms, "weight_decay": 0.0}) if g["params"]]
    if protocol.optimizer == "adamw":
        return torch.optim.AdamW(groups, protocol.lr, weight_decay=protocol.weight_decay)
    return torch.optim.SGD(groups, protocol.lr, protocol.momentum, weight_decay=protocol.weight_decay)


def train_and_test(
    build: Callable[[], Trainable], protocol: Training, tests: int, setup: Setup, *, key: str, what: str
) -> Trained:
    """Build the model, train it (or go on from ``setup.work``), run it on ``tests`` images.

    ``key`` names what is trained on what: a state of another key is not resumed from. ``what`` is done to test images.
    """
    fabric = launched(setup.device, setup.devices, precision=setup.precision)
    with together(fabric):
        return _train_and_test(build, protocol, tests, setup, fabric, key, what)


def _train_and_test(
    build: Callable[[], Trainable], protocol: Training, tests: int, setup: Setup, fabric: Fabric, key: str, what: str
) -> Trained:
    made = build()
    model = made.model
    if fabric.device.type == "cuda" and fabric.world_size > 1:
        model = convert_sync_batchnorm(model)  # timm's: it keeps the activations its norms carry
    if setup.channels_last:
        model = model.to(memory_format=torch.channels_last)
    run = Fit(
        model=model, optimizer=made.optimizer, lr_factor=protocol.lr_factor, iterations=protocol.iterations,
        sample=made.sample, length=made.length, batch_size=protocol.batch_size, seed=setup.seed,
        key=key, state=setup.work / "state.pt", clip_gradient=protocol.clip_gradient, workers=setup.workers,
        saves=setup.save_every, demand=demand_of(protocol, tests, setup),
    )  # fmt: skip
    began = time.monotonic()
    fit(run, fabric, setup.progress)
    if protocol.precise_bn:
        place = fabric.global_rank, fabric.world_size
        steps = Steps(made.sample, made.length, protocol.batch_size, setup.seed + 1, *place)
        _precise_statistics(model, steps, protocol.precise_bn, setup.workers, fabric)
    trained = time.monotonic()
    outputs = infer_all(model, made, tests, setup, fabric, what)
    timings = {"train": trained - began, what: time.monotonic() - trained}
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Trained(outputs, run.log, timings, {"trained_parameters": parameters, "images": made.length, **made.details})


def _precise_statistics(model: nn.Module, steps: Steps, batches: int, workers: int, fabric: Fabric) -> None:
    """Batch-norm statistics averaged over many training batches with the final weights (PreciseBN of fvcore)."""
    model.train()
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
    with torch.no_grad(), fabric.autocast():
        loader = DataLoader(steps, batch_size=None, sampler=range(batches), num_workers=workers)
        for step, batch in enumerate(loader):  # regions are sampled: a resumed run must sample the same ones
            manual_seed(mix_seed(steps.seed, step, 2 + steps.rank))
            model(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


class _Views(Dataset[Any]):
    def __init__(self, places: range, view: Callable[[int], Any]) -> None:
        self.places, self.view = places, view

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.view(self.places[index])


def infer_all(model: nn.Module, made: Trainable, tests: int, setup: Setup, fabric: Fabric, what: str) -> list[Any]:
    """What is read of every test image, one image at a time as the recipes do, shared among processes."""
    mine = range(tests)[fabric.global_rank :: fabric.world_size]
    loader = DataLoader(_Views(mine, made.view), batch_size=None, num_workers=setup.workers)
    model.eval()
    found: list[Any] = []
    with torch.inference_mode(), fabric.autocast(), setup.progress.track(what, len(mine)) as meter:
        for done, (index, view) in enumerate(zip(mine, loader, strict=True), 1):
            (output,) = model([view])
            found.append(made.read(index, view, output))
            meter.update(done)
    if fabric.world_size == 1:
        return found
    gathered: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(gathered, found)
    return [gathered[index % fabric.world_size][index // fabric.world_size] for index in range(tests)]
