"""What detection engines share: train a detector as the protocol says, then detect on every test image."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from evalsuite.backbone import Backbone
from evalsuite.data.detection import DetectionSet, Record
from evalsuite.fit import Fit, Steps, fit, mix_seed
from evalsuite.metrics.detection import Detections
from evalsuite.protocols import Detected, DetectionProtocol
from evalsuite.task import Setup

__all__ = ["Detector", "detect_all", "learnable", "train_and_detect"]


@dataclass(frozen=True)
class Detector:
    """A detector as an engine built it, and how to feed and read it.

    ``model(batch)`` of training samples gives named losses in training mode, and of test samples one output each in
    evaluation mode. ``sample(index, seed)`` is a training sample of :func:`learnable` images, ``view(record)`` a test
    sample, ``read(record, output)`` its detections in pixels of the original image.
    """

    model: nn.Module
    optimizer: Optimizer
    sample: Callable[[int, int], Any]
    view: Callable[[Record], Any]
    read: Callable[[Record, Any], Detections]
    details: Mapping[str, Any] = field(default_factory=dict)


def learnable(train: DetectionSet) -> list[Record]:
    """The images with at least one object that is no crowd; from the others there is nothing to learn."""
    return [record for record in train.records if (~record.crowd).any()]


def train_and_detect(
    build: Callable[[], Detector], backbone: Backbone, protocol: DetectionProtocol, train: DetectionSet,
    test: DetectionSet, setup: Setup, version: str,
) -> Detected:  # fmt: skip
    """Build the detector, train it (or go on from ``setup.work``), detect on every image of ``test``."""
    fabric = Fabric(
        accelerator=setup.device.type,
        devices=setup.devices if setup.devices > 1 or setup.device.index is None else [setup.device.index],
        # heads a backbone file carries take no part, nor does a mask head without positive regions
        strategy="ddp_find_unused_parameters_true" if setup.devices > 1 else "auto",
        precision=setup.precision,  # type: ignore[arg-type]  # the CLI holds it to Fabric's list
    )
    fabric.launch()
    detector, length = build(), len(learnable(train))
    model = detector.model
    if fabric.device.type == "cuda":
        if fabric.world_size > 1:
            model = convert_sync_batchnorm(model)  # timm's: it keeps the activations its norms carry
        model = model.to(memory_format=torch.channels_last)
    run = Fit(
        model=model, optimizer=detector.optimizer, rate=protocol.rate, iterations=protocol.iterations,
        sample=detector.sample, length=length, batch_size=protocol.batch_size, seed=setup.seed,
        key=f"{backbone.identity} {protocol.hash} {train.fingerprint} {setup.seed} {version}",
        state=setup.work / "state.pt", clip_gradient=protocol.clip_gradient, workers=setup.workers,
        saves=setup.save_every,
    )  # fmt: skip
    began = time.monotonic()
    fit(run, fabric, setup.progress)
    if protocol.precise_bn:
        place = fabric.global_rank, fabric.world_size
        steps = Steps(detector.sample, length, protocol.batch_size, setup.seed + 1, *place)
        _precise_statistics(model, steps, protocol.precise_bn, setup.workers, fabric)
    trained = time.monotonic()
    detections = detect_all(model, detector, test, setup, fabric)
    timings = {"train": trained - began, "detect": time.monotonic() - trained}
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Detected(
        detections, run.log, timings, {"trained_parameters": parameters, "images": length, **detector.details}
    )


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
            torch.manual_seed(mix_seed(steps.seed, step, 2 + steps.rank))
            model(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


class _Views(Dataset[Any]):
    def __init__(self, records: list[Record], view: Callable[[Record], Any]) -> None:
        self.records, self.view = records, view

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.view(self.records[index])


def detect_all(
    model: nn.Module, detector: Detector, test: DetectionSet, setup: Setup, fabric: Fabric
) -> list[Detections]:
    """Detections of every test image, one image at a time as the recipes do, shared among processes."""
    mine = list(test.records)[fabric.global_rank :: fabric.world_size]
    loader = DataLoader(_Views(mine, detector.view), batch_size=None, num_workers=setup.workers)
    model.eval()
    found: list[Detections] = []
    with torch.inference_mode(), fabric.autocast(), setup.progress.track("detect", len(mine)) as meter:
        for done, (record, view) in enumerate(zip(mine, loader, strict=True), 1):
            (output,) = model([view])
            found.append(detector.read(record, output))
            meter.update(done)
    if fabric.world_size == 1:
        return found
    gathered: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(gathered, found)
    by_id = {d.image_id: d for part in gathered for d in part}
    return [by_id[record.image_id] for record in test.records]
