"""How much faster is a confusion matrix than mmsegmentation's histograms, and how much memory does it take?

Masks of 1024 x 2048 with 19 classes and some ignored pixels, in patches as labels are, and predictions that agree with
nine pixels in ten, int64 as argmax gives them. Ours is :class:`evalsuite.metrics.segmentation.Confusion`, which keeps
the whole matrix and each image's counts; theirs is ``IoUMetric.intersect_and_union`` of mmsegmentation, which keeps the
counts. Both run on the same threads, in turns, the best of five rounds each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from mmseg.evaluation.metrics.iou_metric import IoUMetric
from torch import Tensor

from benchmarks._memory import forget_peak, peak_mb
from evalsuite.metrics.segmentation import IGNORE, Confusion

__all__ = ["run"]

HEIGHT, WIDTH, CLASSES, IMAGES, ROUNDS = 1024, 2048, 19, 4, 5


def world(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Predictions and truths (H, W) int64 in patches of 32 pixels, a tenth of the truth ignored."""
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(IMAGES):
        patches = random.integers(0, CLASSES, (HEIGHT // 32, WIDTH // 32))
        said = np.repeat(np.repeat(patches, 32, axis=0), 32, axis=1)
        true = np.where(random.random(said.shape) < 0.9, said, random.integers(0, CLASSES, said.shape))
        true[np.repeat(np.repeat(random.random(patches.shape) < 0.1, 32, axis=0), 32, axis=1)] = IGNORE
        pairs.append((torch.from_numpy(said), torch.from_numpy(true)))
    return pairs


def ours(pairs: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    confusion = Confusion(CLASSES)
    for said, true in pairs:
        confusion.update(said, true)
    return confusion.counts


def theirs(pairs: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    counts = []
    for said, true in pairs:
        shared, _, predicted, real = IoUMetric.intersect_and_union(said, true, CLASSES, IGNORE)
        counts.append(torch.stack([shared, predicted, real], dim=1))
    return torch.stack(counts).long().numpy()


def _measured(
    count: Callable[[list[tuple[Tensor, Tensor]]], Any], pairs: list[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Seconds an image, and the most memory beyond what was held, in MiB."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier rounds freed would be used again unseen
    forget_peak()
    held = peak_mb()
    began = perf_counter()
    count(pairs)
    return (perf_counter() - began) / len(pairs), peak_mb() - held


def run() -> dict[str, Any]:
    """``ours_s`` and ``theirs_s`` seconds an image, their ``ratio``, ``ours_mb`` and ``theirs_mb`` working memory, and
    whether all counts are the same."""
    pairs = world()
    equal = bool((ours(pairs) == theirs(pairs)).all())
    rounds = [(_measured(ours, pairs), _measured(theirs, pairs)) for _ in range(ROUNDS)]
    (ours_s, ours_mb), (theirs_s, theirs_mb) = (
        (min(r[side][0] for r in rounds), max(r[side][1] for r in rounds)) for side in (0, 1)
    )
    return {
        "name": f"confusion matrix against mmseg's histograms, {HEIGHT}x{WIDTH}, {CLASSES} classes",
        "ours_s": ours_s,
        "theirs_s": theirs_s,
        "ratio": theirs_s / ours_s,
        "goal": ">= 2x",
        "ours_mb": ours_mb,
        "theirs_mb": theirs_mb,
        "equal": equal,
    }
