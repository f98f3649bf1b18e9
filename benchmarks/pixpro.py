"""PixPro's similarities, of propagation and of the loss, against the formulas written out with einsum: time and memory.

Both do the forward and backward pass of both directions from given projections and transformed projections. The plain
form is what one would write: coordinates of every pair of pixels, a mask in floats, every matrix kept. Time is that of
the processor, in one process.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from evalsuite_pixpro.method import consistency, nearby, propagated
from torch import Tensor

from benchmarks._memory import forget_peak, peak_mb

REACH, ROUNDS = 0.7, 5
CASES = ((128, 7), (8, 28))  # images and the side of their maps: as published, and a map of stride 8


def run() -> list[dict[str, Any]]:
    rows = []
    for images, side in CASES:
        took: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(ROUNDS):  # turns alternate, so that a slow spell of the machine hits both
            for name, loss in LOSSES.items():
                took[name].append(_seconds(loss, images, side))
        seconds = {name: statistics.median(values) for name, values in took.items()}
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
            ours, plain = fresh.map(partial(_peak, images, side), LOSSES)
        rows.append(
            {
                "name": f"PixPro similarities {images} x {side}x{side}",
                "ours_ms": 1e3 * seconds["ours"],
                "plain_ms": 1e3 * seconds["plain"],
                "time_ratio": seconds["ours"] / seconds["plain"],
                "ours_mb": ours,
                "plain_mb": plain,
                "memory_ratio": ours / plain,
                "goal": "time <= 1.0, memory <= 1.05",
            }
        )
    return rows


def _inputs(images: int, side: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Projections, what is propagated, keys and boxes of two views, some mirrored."""
    rng = torch.Generator().manual_seed(0)
    maps = [torch.randn(images, 256, side, side, generator=rng) for _ in range(6)]
    low = torch.rand(2, images, 2, generator=rng) * 0.5
    boxes = torch.cat([low, low + 0.2 + 0.3 * torch.rand(2, images, 2, generator=rng)], 2)
    boxes[:, ::2] = boxes[:, ::2][..., [2, 1, 0, 3]]
    learned = [m.requires_grad_() for m in maps[:4]]
    return learned[:2], learned[2:], maps[4:], list(boxes)


def _ours(own: list[Tensor], values: list[Tensor], keys: list[Tensor], boxes: list[Tensor]) -> Tensor:
    near = nearby(boxes[0], boxes[1], own[0].shape[2:], REACH)
    first, second = (propagated(x, g) for x, g in zip(own, values, strict=True))
    return consistency(first, keys[1], near) + consistency(second, keys[0], near.mT)


def _plain(own: list[Tensor], values: list[Tensor], keys: list[Tensor], boxes: list[Tensor]) -> Tensor:
    first, second = (_plainly_propagated(x, g) for x, g in zip(own, values, strict=True))
    return _plain_loss(first, keys[1], boxes[0], boxes[1]) + _plain_loss(second, keys[0], boxes[1], boxes[0])


def _plainly_propagated(x: Tensor, g: Tensor) -> Tensor:
    pixels, values = (F.normalize(t, dim=1).flatten(2) for t in (x, g))
    weight = torch.einsum("bci,bcj->bij", pixels, pixels).clamp(min=0) ** 2
    return torch.einsum("bij,bcj->bci", weight, values).view_as(x)


def _plain_loss(q: Tensor, k: Tensor, first: Tensor, second: Tensor) -> Tensor:
    side = q.shape[-1]
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    centres, diagonals = [], []
    for box in (first, second):
        wide, high = ((box[:, 2 + i] - box[:, i]) / side for i in (0, 1))
        centres.append((wide[:, None] * x.flatten() + box[:, :1], high[:, None] * y.flatten() + box[:, 1:2]))
        diagonals.append((wide**2 + high**2).sqrt())
    (qx, qy), (kx, ky) = centres
    apart = ((qx[:, :, None] - kx[:, None]) ** 2 + (qy[:, :, None] - ky[:, None]) ** 2).sqrt()
    mask = (apart / torch.maximum(*diagonals)[:, None, None] < REACH).float()
    cosine = torch.einsum("bci,bcj->bij", F.normalize(q, dim=1).flatten(2), F.normalize(k, dim=1).flatten(2))
    return -2 * ((cosine * mask).sum((1, 2)) / (mask.sum((1, 2)) + 1e-6)).mean()


Loss = Callable[[list[Tensor], list[Tensor], list[Tensor], list[Tensor]], Tensor]
LOSSES: dict[str, Loss] = {"ours": _ours, "plain": _plain}


def _seconds(loss: Loss, images: int, side: int) -> float:
    inputs = _inputs(images, side)
    began = time.process_time()
    loss(*inputs).backward()
    return time.process_time() - began


def _peak(images: int, side: int, which: str) -> float:
    """Peak growth of a process in one pass, after another one has loaded and allocated what comes once."""
    torch.set_num_threads(1)
    LOSSES[which](*_inputs(2, side)).backward()
    inputs = _inputs(images, side)
    gc.collect()
    forget_peak()
    before = peak_mb()
    LOSSES[which](*inputs).backward()
    return peak_mb() - before
