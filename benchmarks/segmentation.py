"""Our segmentation step against a bare torch loop on the same network, and a frozen recipe from its cache."""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalsuite.backbone import build
from evalsuite.data import source
from evalsuite.data.segmentation import IGNORE
from evalsuite.engines.native import Native, Segmenter, build_model
from evalsuite.hooks import Registry, load
from evalsuite.progress import Progress
from evalsuite.protocols import SegmentationProtocol
from evalsuite.task import Setup
from evalsuite.tasks.segmentation import CamVid
from evalsuite.training import Fit, fit, launched

STEPS, WARM, ROUNDS = 6, 2, 3
SIZE, CLASSES, BATCH = (160, 224), 11, 4


def sample(index: int, seed: int) -> tuple[Tensor, Tensor]:
    """An image of noise and its mask, the same for both loops."""
    rng = torch.Generator().manual_seed(index)
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=rng)
    mask = torch.randint(0, CLASSES, SIZE, dtype=torch.uint8, generator=rng)
    mask[:20] = IGNORE
    return image, mask


class _Timed(nn.Module):
    """The model, noting when each step begins."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.began = model, list[float]()

    def forward(self, batch: Any) -> Any:
        self.began.append(time.process_time())  # of this process: others do not count
        return self.model(batch)


def _ours(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> list[float]:
    timed = _Timed(model)
    plan = Fit(
        model=timed, optimizer=optimizer, lr_factor=lambda step: 1.0, iterations=STEPS + WARM + 1, sample=sample,
        length=16, batch_size=BATCH, seed=0, key="benchmark", state=folder / "state.pt", saves=1e9,
    )  # fmt: skip
    fit(plan, launched(torch.device("cpu")), Progress(quiet=True))
    return [b - a for a, b in zip(timed.began[WARM:], timed.began[WARM + 1 :], strict=False)]


def _bare(model: Segmenter, optimizer: torch.optim.Optimizer) -> list[float]:
    """What a person would write around the same backbone and head."""
    model.train()
    began = []
    for step in range(STEPS + WARM + 1):
        batch = [sample((BATCH * step + i) % 16, 0) for i in range(BATCH)]
        began.append(time.process_time())
        images, masks = torch.stack([i for i, _ in batch]).float() / 255, torch.stack([m for _, m in batch]).long()
        logits = model.head(model.body(images).maps, SIZE)
        logits = F.interpolate(logits, SIZE, mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, masks, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [b - a for a, b in zip(began[WARM:], began[WARM + 1 :], strict=False)]


def _step(registry: Registry) -> dict[str, Any]:
    protocol = CamVid().protocol("smoke")
    assert isinstance(protocol, SegmentationProtocol)
    first = build_model(build("timm:resnet18", registry), protocol, CLASSES, 0)
    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):  # turns alternate, so that a slow spell of the machine hits both
            one, other = copy.deepcopy(first), copy.deepcopy(first)
            ours += _ours(one, torch.optim.SGD(one.parameters(), 1e-4), Path(folder) / str(turn))
            bare += _bare(other, torch.optim.SGD(other.parameters(), 1e-4))
    mine, theirs = statistics.median(ours), statistics.median(bare)
    return {
        "name": "segmentation step",
        "ours_cpu_s": mine,
        "bare_cpu_s": theirs,
        "ratio": mine / theirs,
        "goal": "<= 1.05",
    }


def _cached(registry: Registry) -> dict[str, Any]:
    """CamVid's ``linear`` on a small world: the second run reads what the first encoded."""
    protocol = CamVid().protocol("linear")
    assert isinstance(protocol, SegmentationProtocol)
    protocol = dataclasses.replace(protocol, iterations=20)
    torch.manual_seed(0)
    backbone = build("timm:resnet50", registry).eval()
    took = []
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, EVALSUITE_CACHE=f"{folder}/cache"):
        layout = source(registry, "camvid")
        path = layout.demo(Path(folder), images=12)
        train, test = layout.load(path, "train"), layout.load(path, "test")
        for turn in ("first", "again"):
            work = Path(folder) / turn
            work.mkdir()
            setup = Setup(protocol=protocol, work=work, registry=registry, progress=Progress(quiet=True))
            began = time.perf_counter()
            found = Native().segment(backbone, protocol, train, test, setup)
            took.append((time.perf_counter() - began, found.timings["encode"]))
    (first, encoding), (again, reading) = took
    return {
        "name": "linear segmentation from cache",
        "first_s": first,
        "again_s": again,
        "ratio": again / first,
        "encode_s": encoding,
        "read_s": reading,
    }


def run() -> list[dict[str, Any]]:
    registry = load(environ={"EVALSUITE_PLUGINS": ""}).registry
    return [_step(registry), _cached(registry)]
