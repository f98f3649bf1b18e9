"""Loading a ResNet-50 whose architecture is told from its tensors, against torch.load into a network that is known."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

from evalsuite.checkpoints import load_backbone
from evalsuite.hooks import load


def run(rounds: int = 5) -> dict[str, Any]:
    registry = load(environ={"EVALSUITE_PLUGINS": ""}).registry
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "resnet50.pth"
        torch.save(torchvision.models.resnet50().state_dict(), path)
        took = [
            (_seconds(lambda: load_backbone(path, registry)), _seconds(lambda: _plainly(path))) for _ in range(rounds)
        ]
    ours, plain = (min(times) for times in zip(*took, strict=True))
    return {"name": "load a ResNet-50", "cpu_s": ours, "torch_load_cpu_s": plain, "ratio": ours / plain}


def _plainly(path: Path) -> None:
    torchvision.models.resnet50().load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _seconds(call: Callable[[], object]) -> float:
    """Of the processor, which other processes do not lengthen."""
    began = time.process_time()
    call()
    return time.process_time() - began
