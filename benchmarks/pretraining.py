"""Our SimCLR against lightly's example loop and a bare torch loop, its stages, its augmentations and its memory.

All three loops train the same network with the same head on the same images, batch, strengths of augmentation, loss
and optimiser, in one process, which also augments. The bare loop has our augmentations, so that it is the loop and the
stages that are compared; lightly's loop is that of its documentation and has lightly's own.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks._memory import forget_peak, peak_mb
from evalsuite import Backbone, Features, hookimpl
from evalsuite.backbone import build
from evalsuite.hooks import load
from pretrain import Augment, Batch, Images, Method, Modifier, Pairs, Recipe, Run, simclr
from pretrain.blocks import simclr_head
from pretrain.data import Corpus, demo
from pretrain.methods.simclr import SimCLR
from pretrain.testing import tiny_backbone
from pretrain.train import Plan, train

STEPS, WARM, ROUNDS = 3, 1, 3
LR, TEMPERATURE = 0.06, 0.5  # those of lightly's example


@dataclass(frozen=True)
class Case:
    name: str
    arch: str
    size: int
    batch: int
    strength: float
    blur: float


CASES = (Case("CIFAR", "small:resnet18", 32, 16, 0.5, 0.0), Case("96 px", "timm:resnet18", 96, 16, 1.0, 0.5))


def run() -> list[dict[str, Any]]:
    rows = [row for case in CASES for row in _speed(case)]
    rows.append(_stages())
    rows += [_augmentation(case) for case in CASES]
    return [*rows, _memory(CASES[1])]


# Steps a second ----------------------------------------------------------------------------------------------


def _speed(case: Case) -> list[dict[str, Any]]:
    data, took = _images(case), dict[str, list[float]]()
    for _ in range(ROUNDS):  # turns alternate, so that a slow spell of the machine hits all
        for name, loop in (("ours", _ours), ("bare", _bare), ("lightly", _lightly)):
            at = loop(case, _backbone(case), data, 1 + WARM + STEPS)[WARM:]
            took.setdefault(name, []).extend(b - a for a, b in pairwise(at))
    rate = {name: 1 / statistics.median(seconds) for name, seconds in took.items()}
    about = {"batch": case.batch, "ours_steps_s": rate["ours"]}
    return [
        {
            "name": f"SimCLR {case.name} against {whose}",
            **about,
            f"{other}_steps_s": rate[other],
            "ratio": rate["ours"] / rate[other],
            "goal": goal,
        }
        for other, whose, goal in (("lightly", "lightly", ">= 1.0"), ("bare", "a bare loop", ">= 0.95"))
    ]


def _images(case: Case) -> Images:
    return demo(8 * case.batch, size=case.size).train


def _backbone(case: Case) -> Backbone:
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


def _ours(case: Case, backbone: Backbone, data: Images, steps: int) -> list[float]:
    method = SimCLR(
        SimCLR.Options(
            size=case.size, head="v1", temperature=TEMPERATURE, loss="mean", strength=case.strength, blur=case.blur,
            optimizer="sgd", lr=LR, scaling="none", momentum=0.0, weight_decay=0.0, warmup=0.0, schedule="constant",
        )
    )  # fmt: skip
    ticks = _Ticks()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            out=Path(folder), epochs=1, batch_size=case.batch, steps=steps, device="cpu", workers=0, save_every=1e9
        )
        train(Recipe(method, ticks), backbone, Corpus(data), plan)
    return ticks.at


class _TwoViews(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, data: Images, augment: Augment) -> None:
        self.data, self.augment, self.rng = data, augment, torch.Generator()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        sample = self.data[row]
        return self.augment(sample, self.rng).data, self.augment(sample, self.rng).data


def _forever(loader: DataLoader[Any], steps: int) -> Iterator[Any]:
    return islice((batch for _ in range(steps) for batch in loader), steps)


def _bare(case: Case, backbone: Backbone, data: Images, steps: int) -> list[float]:
    """What a person would write in torch."""
    model = nn.Sequential(backbone.net, simclr_head(backbone.spec.dim, version="v1")).train()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.spec.mean, backbone.spec.std))
    views = _TwoViews(data, simclr(case.size, case.strength, case.blur))
    at = []
    for x0, x1 in _forever(DataLoader(views, case.batch, shuffle=True, drop_last=True), steps):
        z = F.normalize(model((torch.cat([x0, x1]).float() / 255 - mean) / std))
        logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        loss = F.cross_entropy(logits, torch.arange(len(z)).roll(len(x0)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        at.append(time.perf_counter())
    return at


class _Pictures(Dataset[list[Tensor]]):
    def __init__(self, data: Images, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.pictures = [_picture(data, row) for row in range(len(data))]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> list[Tensor]:
        return self.transform(self.pictures[row])


def _picture(data: Images, row: int) -> Image.Image:
    return Image.fromarray(data[row]["image"].permute(1, 2, 0).numpy())


def _transform(case: Case) -> Any:
    return SimCLRTransform(input_size=case.size, cj_strength=case.strength, gaussian_blur=case.blur)


def _lightly(case: Case, backbone: Backbone, data: Images, steps: int) -> list[float]:
    """The loop of lightly's SimCLR example: its transform, its head, its loss, one view after the other."""
    model = nn.Sequential(backbone.net, SimCLRProjectionHead(backbone.spec.dim, backbone.spec.dim, 128)).train()
    criterion, optimizer = NTXentLoss(TEMPERATURE), torch.optim.SGD(model.parameters(), LR)
    pictures = _Pictures(data, _transform(case))
    at = []
    for x0, x1 in _forever(DataLoader(pictures, case.batch, shuffle=True, drop_last=True), steps):
        loss = criterion(model(x0), model(x1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        at.append(time.perf_counter())
    return at


# What stages cost --------------------------------------------------------------------------------------------


class _Nothing(Method):
    """Does nothing in every stage of a step, so that only the calls remain."""

    @hookimpl
    def rate(self) -> float:
        return 1.0

    @hookimpl
    def features(self, run: Run, batch: Batch) -> list[Features]:
        return []

    @hookimpl
    def pairs(self, batch: Batch, features: list[Features]) -> list[Pairs]:
        return []

    @hookimpl
    def losses(self, pairs: list[Pairs]) -> dict[str, Tensor]:
        return {}

    @hookimpl
    def stepped(self, run: Run, pairs: list[Pairs]) -> None:
        return None


class _Passes(Modifier):
    """Wraps pairs and hears of steps, as most modifiers do."""

    @hookimpl(wrapper=True)
    def pairs(self) -> Generator[None, list[Pairs], list[Pairs]]:
        return (yield)

    @hookimpl
    def stepped(self, pairs: list[Pairs]) -> None:
        return None


def _stages(calls: int = 2000) -> dict[str, Any]:
    """The microseconds a step spends on calling stages: a method and four modifiers that do nothing."""
    recipe = Recipe(_Nothing(), *(_Passes() for _ in range(4)), names=["nothing", "a", "b", "c", "d"])
    run = Run(tiny_backbone(), 0, torch.device("cpu"), Path(), epochs=1, batch_size=8, micro_size=8)
    batch = Batch((), torch.arange(8))
    took = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(calls):
            recipe.rate(run)
            features = recipe.features(run, batch)
            pairs = recipe.pairs(run, batch, features)
            recipe.losses(run, batch, features, pairs)
            recipe.stepped(run, batch, pairs)
        took.append((time.perf_counter() - began) / calls)
    return {"name": "stages of a step", "us": 1e6 * statistics.median(took), "goal": "< 50 us"}


# Augmentation ------------------------------------------------------------------------------------------------


def _augmentation(case: Case) -> dict[str, Any]:
    """Views a second of one worker, against lightly's transform with the same strengths."""
    data, rng = demo(64, size=case.size).train, torch.Generator()
    augment, transform = simclr(case.size, case.strength, case.blur), _transform(case).transforms[0]
    samples, pictures = [data[i] for i in range(64)], [_picture(data, i) for i in range(64)]
    took: dict[str, list[float]] = {"ours": [], "lightly": []}
    for _ in range(5):
        took["ours"].append(_seconds(lambda sample: augment(sample, rng), samples))
        took["lightly"].append(_seconds(transform, pictures))
    rate = {name: len(samples) / statistics.median(seconds) for name, seconds in took.items()}
    return {
        "name": f"augmentation {case.name}",
        "ours_views_s": rate["ours"],
        "lightly_views_s": rate["lightly"],
        "ratio": rate["ours"] / rate["lightly"],
        "goal": ">= 1.0",
    }


def _seconds(look: Callable[[Any], Any], things: Iterable[Any]) -> float:
    began = time.perf_counter()
    for thing in things:
        look(thing)
    return time.perf_counter() - began


# Memory ------------------------------------------------------------------------------------------------------


def _memory(case: Case) -> dict[str, Any]:
    """Peak growth of a fresh process over three steps: what one loop leaves behind would hide the other's."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        ours, bare = fresh.map(partial(_peak, case), ("ours", "bare"))
    return {
        "name": f"peak memory {case.name}",
        "batch": case.batch,
        "ours_mb": ours,
        "bare_mb": bare,
        "ratio": ours / bare,
        "goal": "<= 1.1",
    }


def _peak(case: Case, which: str) -> float:
    torch.set_num_threads(1)
    backbone, data = _backbone(case), _images(case)
    forget_peak()
    before = peak_mb()
    {"ours": _ours, "bare": _bare}[which](case, backbone, data, 3)
    return peak_mb() - before
