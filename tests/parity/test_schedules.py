"""Every method's learning rate, step by step over a whole run, against the formula of the code it follows.

The formulas were typed off facebookresearch/swav ``main_swav.py``, solo-learn ``lr_scheduler.py``,
google-research/simclr ``model_util.py``, facebookresearch/mae ``lr_sched.py``, zdaxie/PixPro ``lr_scheduler.py``,
valeoai/obow ``solver.py``, google-research slot_attention ``train.py``, singhgautam/slate and jsikyoon/OCRL
``linear_warmup``, and mmcv 1.x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evalsuite_objects.discovery import SlotDiscovery
from evalsuite_objects.mae import MAE
from evalsuite_objects.setprediction import SlotSet
from evalsuite_objects.slate_method import SlateMethod
from evalsuite_obow.method import OBoW
from evalsuite_pixpro.method import PixPro
from evalsuite_rotnet.method import RotNet
from evalsuite_swav.method import SwAV
from lightly.utils.scheduler import cosine_warmup_schedule, linear_warmup_schedule

from pretrain import Method, Recipe, Run
from pretrain.blocks import step_schedule
from pretrain.methods.byol import BYOL
from pretrain.methods.simclr import SimCLR
from pretrain.testing import tiny_backbone

Rates = Sequence[float]


def rates(method: Method, epochs: int, epoch_steps: int) -> Rates:
    """The factor on the learning rate at every step."""
    recipe = Recipe(method)
    run = Run(tiny_backbone(), 0, torch.device("cpu"), Path(), epochs, 8, 8, epochs * epoch_steps, epoch_steps)
    run.training = recipe.method.options
    found = []
    for step in range(run.steps):
        run.step = step
        found.append(recipe.rate(run))
    return found


def cosine(at: float, end: float, floor: float = 0.0) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * at / end))


def swav(epochs: int, n: int, warm: int, start: float, floor: float) -> Rates:
    """numpy's straight line, both ends included, and then the cosine from its own first step."""
    rest = n * (epochs - warm)
    return np.concatenate([np.linspace(start, 1, n * warm), [cosine(t, rest, floor) for t in range(rest)]]).tolist()


def solo(epochs: int, n: int, warm: int, start: float, floor: float) -> Rates:
    """solo-learn adds the same to the rate after every step, so that the last of the warm-up has the peak."""
    found, step_up = [start], (1 - start) / (n * warm - 1)
    while len(found) < n * warm:
        found.append(found[-1] + step_up)
    return found + [cosine(t, n * (epochs - warm), floor) for t in range(n * (epochs - warm))]


def simclr(epochs: int, n: int, warm: int) -> Rates:
    return [s / (n * warm) if s < n * warm else cosine(s - n * warm, n * (epochs - warm)) for s in range(n * epochs)]


def mae(epochs: int, n: int, warm: int) -> Rates:
    """By the epoch and its share that is done."""
    at = [epoch + step / n for epoch in range(epochs) for step in range(n)]
    return [t / warm if t < warm else cosine(t - warm, epochs - warm) for t in at]


def pixpro(epochs: int, n: int, warm: int, multiplier: float, floor: float) -> Rates:
    """The warm-up holds up to and including the step at its end."""
    rest = n * (epochs - warm)
    return [
        ((multiplier - 1) * s / (n * warm) + 1) / multiplier if s <= n * warm else cosine(s - n * warm, rest, floor)
        for s in range(n * epochs)
    ]


def obow(epochs: int, n: int, warm: int, floor: float) -> Rates:
    return [s / (n * warm) if s // n < warm else cosine(s // n - warm, epochs - warm, floor) for s in range(n * epochs)]


def slots(steps: int, warm: int, half: float, ahead: int) -> Rates:
    """Slot Attention begins at 0, SLATE and OCRL a step ahead; both are halved from the first step on."""
    return [min(1.0, (s + ahead) / warm) * 0.5 ** (s / half) for s in range(steps)]


def mmcv(epochs: int, n: int, warm: int, start: float, milestones: Sequence[int]) -> Rates:
    return [
        1 - (1 - s / (n * warm)) * (1 - start) if s < n * warm else 0.1 ** sum(s // n >= m for m in milestones)
        for s in range(n * epochs)
    ]


def preset(kind: type[Method], name: str, **options: Any) -> Method:
    return kind(kind.Options(**{**kind.preset(name).options, **options}))


CASES: dict[str, tuple[Callable[[], Method], tuple[int, int], Rates]] = {
    "swav": (SwAV, (25, 7), swav(25, 7, 10, 0.3 / 4.8, 0.001)),
    "swav in two steps": (lambda: SwAV(SwAV.Options(warmup=2)), (5, 1), swav(5, 1, 2, 0.3 / 4.8, 0.001)),
    "byol": (BYOL, (25, 7), solo(25, 7, 10, 3e-5, 0.0)),
    "simclr": (SimCLR, (25, 7), simclr(25, 7, 10)),
    "mae": (MAE, (50, 3), mae(50, 3, 40)),
    "pixpro": (PixPro, (12, 7), pixpro(12, 7, 5, 100, 1e-6 / 4)),
    "obow": (OBoW, (25, 7), obow(25, 7, 10, 0.001)),
    "slot-attention": (SlotDiscovery, (8, 25), slots(200, 16, 160, 0)),
    "slot-attention, benchmark": (
        lambda: preset(SlotDiscovery, "benchmark"), (8, 25), slots(200, 18, 150, 1)
    ),
    "slot-set": (SlotSet, (2, 125), slots(250, 64, 3200, 0)),
    "slate, benchmark": (
        lambda: preset(SlateMethod, "benchmark", warmup_steps=9, halving_steps=80), (2, 20), slots(40, 9, 80, 1)
    ),
    "rotnet, mmselfsup": (
        lambda: preset(RotNet, "imagenet-resnet50"), (70, 3), mmcv(70, 3, 5, 0.1, (30, 50))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_rate_of_every_step_is_the_official_one(name):
    make, (epochs, epoch_steps), expected = CASES[name]
    assert rates(make(), epochs, epoch_steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("rise", "shift"), [("next", 0), ("ahead", 1)])
def test_rises_against_lightly(rise, shift):
    """Its linear warm-up begins at the start, the one before a cosine a step ahead; 0 of it is skipped."""
    found = rates(SimCLR(SimCLR.Options(warmup=4, start=0.2, rise=rise)), 12, 5)[:20]
    theirs = {
        0: [linear_warmup_schedule(s, 20, 0.2, 1.0) for s in range(20)],
        1: [cosine_warmup_schedule(s, 60, 1.0, 0.0, 20, 0.2) for s in range(20)],
    }[shift]
    assert found == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("rise", ["next", "last", "ahead"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 0.5, 0.7, 1.1, 2.0])
@pytest.mark.parametrize("epoch_steps", [1, 3, 10])
def test_however_short_a_warm_up_is_it_rises_from_the_start_and_never_above_the_peak(rise, warmup, epoch_steps):
    line = rates(SimCLR(SimCLR.Options(warmup=warmup, start=0.25, rise=rise)), 5, epoch_steps)
    rising = line[: math.ceil(round(warmup * epoch_steps, 9))]
    assert rising == sorted(rising)
    assert all(0.25 <= rate <= 1 for rate in rising)
    assert line[len(rising)] == pytest.approx(1.0, abs=0.25)
    if rising and rise != "ahead":
        assert rising[0] == 0.25
    if len(rising) > 1 and rise == "last":
        assert rising[-1] == 1


@pytest.mark.parametrize("epochs", [7, 25, 50, 100])
def test_a_share_of_the_run_is_the_epoch_it_means(epochs):
    """Whatever the last digit of the product says: 0.28 * 25 is above 7."""
    for hundredths in range(1, 100):
        line = [step_schedule(e, 1.0, [hundredths / 100 * epochs], 0.5) for e in range(epochs)]
        first = -(-hundredths * epochs // 100)
        assert line == [1.0] * first + [0.5] * (epochs - first), hundredths


def test_a_milestone_of_a_method_is_the_epoch_it_means():
    line = rates(RotNet(RotNet.Options(milestones=(0.28,), factor=0.5)), 25, 2)
    assert line == [1.0] * 14 + [0.5] * 36


def test_a_third_of_a_run_is_a_third():
    for epochs in (21, 42, 210):
        line = rates(SimCLR(SimCLR.Options(schedule="step", milestones=(1 / 3, 5 / 7), warmup=0.0)), epochs, 1)
        assert [line.count(rate) for rate in sorted(set(line), reverse=True)] == [
            epochs // 3, epochs * 5 // 7 - epochs // 3, epochs - epochs * 5 // 7
        ]  # fmt: skip
