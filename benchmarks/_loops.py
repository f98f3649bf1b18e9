"""What benchmarks of pretraining share: a case, its images and network, and steps a second of several loops."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evalsuite import Backbone, hookimpl
from evalsuite.backbone import build
from evalsuite.hooks import load
from pretrain import Images, Method, Modifier, Recipe
from pretrain.data import Corpus, demo
from pretrain.train import Plan, train

STEPS, WARM, ROUNDS = 3, 1, 3


@dataclass(frozen=True)
class Case:
    name: str
    arch: str
    size: int
    batch: int
    strength: float
    blur: float


Loop = Callable[[Case, Backbone, Images, int], list[float]]
"""A loop over so many steps: when each was made."""


def steps_a_second(case: Case, loops: Mapping[str, Loop], steps: int = STEPS) -> dict[str, float]:
    """Of each loop, the median over rounds; turns alternate, so that a slow spell of the machine hits all."""
    data, took = images(case), dict[str, list[float]]()
    for _ in range(ROUNDS):
        for name, loop in loops.items():
            at = loop(case, backbone(case), data, 1 + WARM + steps)[WARM:]
            took.setdefault(name, []).extend(b - a for a, b in pairwise(at))
    return {name: 1 / statistics.median(seconds) for name, seconds in took.items()}


def images(case: Case) -> Images:
    return demo(8 * case.batch, size=case.size).train


def backbone(case: Case) -> Backbone:
    torch.manual_seed(0)
    return build(case.arch, load(environ={"EVALSUITE_PLUGINS": ""}).registry)


class _Ticks(Modifier):
    """Notes when each step was made."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[float] = []

    @hookimpl
    def stepped(self) -> None:
        self.at.append(time.perf_counter())


def train_by(method: Method, case: Case, backbone: Backbone, data: Images, steps: int) -> list[float]:
    """A method of ours, by the very function that the command calls: when each step was made."""
    ticks = _Ticks()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            out=Path(folder), epochs=1, batch_size=case.batch, steps=steps, device="cpu", workers=0, save_every=1e9
        )
        train(Recipe(method, ticks), backbone, Corpus(data), plan)
    return ticks.at


def forever(loader: DataLoader[Any], steps: int) -> Iterator[Any]:
    return islice((batch for _ in range(steps) for batch in loader), steps)


class Pictures(Dataset[list[Tensor]]):
    """Images as PIL's, through a transform of somebody else."""

    def __init__(self, data: Images, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.pictures = [picture(data, row) for row in range(len(data))]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> list[Tensor]:
        return self.transform(self.pictures[row])


def picture(data: Images, row: int) -> Image.Image:
    return Image.fromarray(data[row]["image"].permute(1, 2, 0).numpy())
