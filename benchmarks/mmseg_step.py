"""Our training loop against mmengine's runner on the same mmsegmentation model, and our engine against it."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evalsuite.backbone import build
from evalsuite.data.segmentation import IGNORE
from evalsuite.engines import native
from evalsuite.engines._dense import Trainable, optimizer_of
from evalsuite.engines._mmengine import apart
from evalsuite.engines.mmseg import build_model, packed, run_loop
from evalsuite.hooks import load
from evalsuite.progress import Meter, Progress
from evalsuite.protocols import SegmentationProtocol
from evalsuite.task import Setup
from evalsuite.tasks.segmentation import CamVid
from evalsuite.training import Fit, fit, launched

STEPS, WARM, ROUNDS = 6, 2, 3
SIZE, CLASSES = (224, 320), 11


def sample(index: int, seed: int) -> tuple[Tensor, Tensor]:
    """An image of noise and its mask, the same for all loops."""
    rng = torch.Generator().manual_seed(index)
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=rng)
    mask = torch.randint(0, CLASSES, SIZE, dtype=torch.uint8, generator=rng)
    mask[:20] = IGNORE
    return image, mask


class _Clock(Progress):
    """Hears of every step of any loop, and when."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.at: list[float] = []

    @contextmanager
    def track(self, what: str, total: int, done: int = 0) -> Iterator[Meter]:
        yield _Ticks(self.at)


class _Ticks(Meter):
    def __init__(self, at: list[float]) -> None:
        self.at = at

    def update(self, done: int, **numbers: float) -> None:
        self.at.append(time.perf_counter())


class _Called(nn.Module):
    """mmsegmentation's model as our loop calls it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> dict[str, Tensor]:
        losses = self.model(**self.model.data_preprocessor(packed(batch), True), mode="loss")
        return {name: value for name, value in losses.items() if "loss" in name}


def _by_us(model: nn.Module, protocol: SegmentationProtocol, setup: Setup) -> None:
    plan = Fit(
        model=model, optimizer=optimizer_of(model, protocol), lr_factor=protocol.lr_factor,
        iterations=protocol.iterations, sample=sample, length=16, batch_size=protocol.batch_size, seed=0,
        key="benchmark", state=setup.work / "state.pt", saves=setup.save_every, clip_gradient=protocol.clip_gradient,
    )  # fmt: skip
    fit(plan, launched(torch.device("cpu")), setup.progress)


def _by_mmengine(model: nn.Module, protocol: SegmentationProtocol, setup: Setup) -> None:
    made = Trainable(
        model=model, optimizer=optimizer_of(model, protocol), sample=sample, length=16, view=lambda index: None,
        read=lambda index, view, output: None,
    )  # fmt: skip
    with apart():
        run_loop(made, protocol, setup, "benchmark")


def run() -> list[dict[str, Any]]:
    registry = load(environ={"EVALSUITE_PLUGINS": ""}).registry
    smoke = CamVid().protocol("smoke")
    assert isinstance(smoke, SegmentationProtocol)
    protocol = dataclasses.replace(smoke, iterations=STEPS + WARM + 1, crop=SIZE)
    backbone = build("timm:resnet18", registry)
    theirs, _ = build_model(backbone, protocol, CLASSES, 0)
    ours = native.build_model(backbone, protocol, CLASSES, 0)
    loops = {"mmengine": (_by_mmengine, theirs), "ours": (_by_us, _Called(theirs)), "native": (_by_us, ours)}
    took: dict[str, list[float]] = {name: [] for name in loops}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):  # turns alternate, so that a slow spell of the machine hits all
            for name, (loop, model) in loops.items():
                work, clock = Path(folder) / f"{name}-{turn}", _Clock()
                work.mkdir()
                setup = Setup(protocol=protocol, work=work, registry=registry, progress=clock, save_every=1e9)
                loop(copy.deepcopy(model), protocol, setup)
                took[name] += [b - a for a, b in pairwise(clock.at[WARM:])]
    median = {name: statistics.median(seconds) for name, seconds in took.items()}
    return [
        {
            "name": name, "ours_s": median[which], "mmengine_s": median["mmengine"],
            "ratio": median[which] / median["mmengine"], "goal": "<= 1",
        }
        for which, name in (("ours", "loop on mmsegmentation's model"), ("native", "native engine's step"))
    ]  # fmt: skip
