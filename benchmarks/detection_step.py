"""Our detection training step against a bare torchvision loop on the same model and batch."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from evalsuite.backbone import build
from evalsuite.engines.torchvision_rcnn import build_model
from evalsuite.hooks import load
from evalsuite.progress import Progress
from evalsuite.protocols import DetectionProtocol
from evalsuite.tasks.detection import Detect
from evalsuite.training import Fit, fit, launched

STEPS, WARM, ROUNDS = 6, 2, 3


def sample(index: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An image of noise with three boxes, the same for both loops."""
    rng = torch.Generator().manual_seed(index)
    image = torch.randint(0, 256, (3, 240, 320), dtype=torch.uint8, generator=rng)
    corner = torch.rand(3, 2, generator=rng) * 150
    boxes = torch.cat([corner, corner + 20 + 60 * torch.rand(3, 2, generator=rng)], 1)
    return image, {"boxes": boxes, "labels": torch.tensor([1, 2, 3])}


class _Timed(nn.Module):
    """The model, noting when each step begins."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.began = model, list[float]()

    def forward(self, batch: Any) -> Any:
        self.began.append(time.perf_counter())
        return self.model(batch)


def _ours(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> list[float]:
    timed = _Timed(model)
    plan = Fit(
        model=timed, optimizer=optimizer, lr_factor=lambda step: 1.0, iterations=STEPS + WARM + 1, sample=sample,
        length=16, batch_size=2, seed=0, key="benchmark", state=folder / "state.pt", saves=1e9,
    )  # fmt: skip
    fit(plan, launched(torch.device("cpu")), Progress(quiet=True))
    return [b - a for a, b in zip(timed.began[WARM:], timed.began[WARM + 1 :], strict=False)]


def _bare(detector: FasterRCNN, optimizer: torch.optim.Optimizer) -> list[float]:
    """What a person would write around torchvision's detector."""
    detector.train()
    began = []
    for step in range(STEPS + WARM + 1):
        batch = [sample((2 * step + i) % 16, 0) for i in range(2)]
        began.append(time.perf_counter())
        images = [image.float().div(255) for image, _ in batch]
        losses = detector(images, [target for _, target in batch])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return [b - a for a, b in zip(began[WARM:], began[WARM + 1 :], strict=False)]


def run() -> dict[str, Any]:
    registry = load(environ={"EVALSUITE_PLUGINS": ""}).registry
    protocol = Detect().protocol("smoke")
    assert isinstance(protocol, DetectionProtocol)
    first = build_model(build("timm:resnet18", registry), protocol, 3, 0)
    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):  # turns alternate, so that a slow spell of the machine hits both
            one, other = copy.deepcopy(first), copy.deepcopy(first)
            ours += _ours(one, torch.optim.SGD(one.parameters(), 1e-4), Path(folder) / str(turn))
            bare += _bare(other.detector, torch.optim.SGD(other.parameters(), 1e-4))
    mine, theirs = statistics.median(ours), statistics.median(bare)
    return {
        "name": "detection step",
        "ours_s": mine,
        "bare_s": theirs,
        "ratio": mine / theirs,
        "goal": "<= 1.05",
    }
