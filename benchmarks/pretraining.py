"""Our SimCLR against lightly's example loop and a bare torch loop, its stages, its augmentations and its memory.

All three loops train the same network with the same head on the same images, batch, strengths of augmentation, loss
and optimiser, in one process, which also augments. The bare loop has our augmentations, so that it is the loop and the
stages that are compared; lightly's loop is that of its documentation and has lightly's own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import _loops as loops
from benchmarks._loops import Case
from benchmarks._memory import forget_peak, peak_mb
from evalsuite import Backbone, Features, hookimpl
from pretrain import Augment, Batch, Images, Method, Modifier, Pairs, Recipe, Run, simclr
from pretrain.blocks import simclr_head
from pretrain.data import demo
from pretrain.methods.simclr import SimCLR
from pretrain.testing import tiny_backbone

LR, TEMPERATURE = 0.06, 0.5  # those of lightly's example

CASES = (Case("CIFAR", "small:resnet18", 32, 16, 0.5, 0.0), Case("96 px", "timm:resnet18", 96, 16, 1.0, 0.5))


def run() -> list[dict[str, Any]]:
    rows = [row for case in CASES for row in _speed(case)]
    rows.append(_stages())
    rows += [_augmentation(case) for case in CASES]
    return [*rows, _memory(CASES[1])]


# Steps a second ----------------------------------------------------------------------------------------------


def _speed(case: Case) -> list[dict[str, Any]]:
    rate = loops.steps_a_second(case, {"ours": _ours, "bare": _bare, "lightly": _lightly})
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


def _ours(case: Case, backbone: Backbone, data: Images, steps: int) -> list[float]:
    method = SimCLR(
        SimCLR.Options(
            size=case.size, head="v1", temperature=TEMPERATURE, loss="mean", strength=case.strength, blur=case.blur,
            optimizer="sgd", lr=LR, scaling="none", momentum=0.0, weight_decay=0.0, warmup=0.0, schedule="constant",
        )
    )  # fmt: skip
    return loops.train_by(method, case, backbone, data, steps)


class _TwoViews(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, data: Images, augment: Augment) -> None:
        self.data, self.augment, self.rng = data, augment, torch.Generator()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        sample = self.data[row]
        return self.augment(sample, self.rng).data, self.augment(sample, self.rng).data


def _bare(case: Case, backbone: Backbone, data: Images, steps: int) -> list[float]:
    """What a person would write in torch."""
    model = nn.Sequential(backbone.net, simclr_head(backbone.spec.dim, version="v1")).train()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.spec.mean, backbone.spec.std))
    views = _TwoViews(data, simclr(case.size, case.strength, case.blur))
    at = []
    for x0, x1 in loops.forever(DataLoader(views, case.batch, shuffle=True, drop_last=True), steps):
        z = F.normalize(model((torch.cat([x0, x1]).float() / 255 - mean) / std))
        logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        loss = F.cross_entropy(logits, torch.arange(len(z)).roll(len(x0)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        at.append(time.perf_counter())
    return at


def _transform(case: Case) -> Any:
    return SimCLRTransform(input_size=case.size, cj_strength=case.strength, gaussian_blur=case.blur)


def _lightly(case: Case, backbone: Backbone, data: Images, steps: int) -> list[float]:
    """The loop of lightly's SimCLR example: its transform, its head, its loss, one view after the other."""
    model = nn.Sequential(backbone.net, SimCLRProjectionHead(backbone.spec.dim, backbone.spec.dim, 128)).train()
    criterion, optimizer = NTXentLoss(TEMPERATURE), torch.optim.SGD(model.parameters(), LR)
    pictures = loops.Pictures(data, _transform(case))
    at = []
    for x0, x1 in loops.forever(DataLoader(pictures, case.batch, shuffle=True, drop_last=True), steps):
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
    samples, pictures = [data[i] for i in range(64)], [loops.picture(data, i) for i in range(64)]
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
    backbone, data = loops.backbone(case), loops.images(case)
    forget_peak()
    before = peak_mb()
    {"ours": _ours, "bare": _bare}[which](case, backbone, data, 3)
    return peak_mb() - before
