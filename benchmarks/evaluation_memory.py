"""Peak memory of detecting and scoring as the number of test images grows: it should be flat per image."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks._memory import forget_peak, peak_mb
from evalsuite.backbone import build
from evalsuite.data import source
from evalsuite.data.detection import DetectionSet
from evalsuite.engines._dense import infer_all
from evalsuite.engines.torchvision_rcnn import build_model, detector
from evalsuite.hooks import Registry, load
from evalsuite.progress import Progress
from evalsuite.protocols import DetectionProtocol
from evalsuite.task import Setup
from evalsuite.tasks.detection import Coco
from evalsuite.training import launched

SIZES = (100, 200, 400)


def _repeated(data: DetectionSet, count: int) -> DetectionSet:
    records = [dataclasses.replace(data.records[i % len(data.records)], image_id=i + 1) for i in range(count)]
    return dataclasses.replace(data, records=tuple(records))


def _evaluate(data: DetectionSet, registry: Registry, folder: Path) -> None:
    # every image keeps its full hundred boxes; masks of an untrained network are noise, which hardly compresses
    everything = {"score_threshold": "0.0", "test_min_size": "96", "test_max_size": "160", "masks": "false"}
    protocol = Coco().protocol("smoke").override(everything)
    assert isinstance(protocol, DetectionProtocol)
    backbone = build("timm:test_resnet", registry)
    model = build_model(backbone, protocol, len(data.classes), seed=0)
    setup = Setup(protocol=protocol, work=folder, registry=registry, progress=Progress(quiet=True))
    fabric = launched(torch.device("cpu"))
    made = detector(model, protocol, data, data).on(data, data)
    found = infer_all(model, made, len(data.records), setup, fabric, "detect")
    Coco().score(data, found, protocol)


def run() -> dict[str, Any]:
    registry = load(environ={"EVALSUITE_PLUGINS": ""}).registry
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        layout = source(registry, "coco")
        data = layout.load(layout.demo(Path(folder), seed=0, images=8), "val2017")
        _evaluate(_repeated(data, 50), registry, Path(folder))  # what is loaded and allocated once
        grown = {}
        for count in SIZES:
            forget_peak()
            before = peak_mb()
            _evaluate(_repeated(data, count), registry, Path(folder))
            grown[count] = peak_mb() - before
    per_image = {f"mb_per_image_at_{count}": grown[count] / count for count in SIZES}
    ratio = per_image[f"mb_per_image_at_{SIZES[-1]}"] / max(per_image[f"mb_per_image_at_{SIZES[0]}"], 1e-9)
    return {"name": "evaluation memory", **per_image, "ratio": ratio, "goal": "<= 1.1 (flat)"}
