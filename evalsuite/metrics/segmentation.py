"""Scores of semantic segmentation from pixel counts: mean intersection over union, accuracies, boundary IoU.

Everything is made of three numbers a class and image: how many pixels truth and prediction share, how many the
prediction has, how many the truth has. They are counted once, on the device the labels are on; scores of a whole
set, of each image, and of every bootstrap resample of the images follow from them by sums.

Pixels whose truth is :data:`IGNORE` count for nothing, on either side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evalsuite.errors import UsageError
from evalsuite.statistics import REPLICATES, weight_blocks

__all__ = [
    "IGNORE",
    "SEGMENTATION_METRICS",
    "Confusion",
    "SegmentationScores",
    "bootstrap_scores",
    "boundary_counts",
    "scores",
]

IGNORE = 255
"""The truth of a pixel that has no class."""

SEGMENTATION_METRICS = ("mIoU", "mAcc", "aAcc")
"""Mean intersection over union, mean accuracy of the classes, accuracy of all pixels."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Absent = Literal["skip", "zero"]


@dataclass(frozen=True)
class SegmentationScores:
    """``scores`` by the names of :data:`SEGMENTATION_METRICS`, in [0, 1]; IoU and accuracy by class name.

    None where a number is undefined: no pixel to judge it by.
    """

    scores: dict[str, float | None]
    iou: dict[str, float | None]
    accuracy: dict[str, float | None]


class Confusion:
    """Counts pixels image by image, on the device the labels are on.

    Memory grows by 24 bytes a class and image. Several processes each keep their own: matrices add, counts
    concatenate.
    """

    def __init__(self, classes: int) -> None:
        """``classes`` are 1 to 255.

        Raises:
            UsageError: any other number, for labels are bytes and 255 is no class.
        """
        _require(1 <= classes <= IGNORE, f"there are {classes} classes, and labels are 0 to 254")
        self.classes = classes
        self._matrix = torch.zeros(classes, classes, dtype=torch.int64)
        self._counts: list[Tensor] = []

    def __len__(self) -> int:
        """Images so far."""
        return len(self._counts)

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Count one image: ``prediction`` (H, W) of labels 0 to C-1, ``truth`` (H, W) of the same and IGNORE.

        Any integer types; both on one device, where the counting is done.

        Raises:
            UsageError: shapes that differ, types that are not integers, labels outside the classes.
        """
        matrix = _matrix(prediction, truth, self.classes)
        self._matrix += matrix
        self._counts.append(torch.stack([matrix.diagonal(), matrix.sum(0), matrix.sum(1)], dim=1))

    @property
    def matrix(self) -> Ints:
        """(C, C) int64: pixels over all images, rows the truth, columns the prediction, as scikit-learn has it."""
        return self._matrix.numpy().copy()

    @property
    def counts(self) -> Ints:
        """(N, C, 3) int64: pixels of each image and class in both, in the prediction, and in the truth."""
        if not self._counts:
            return np.zeros((0, self.classes, 3), np.int64)
        return torch.stack(self._counts).numpy()


def scores(counts: npt.ArrayLike, classes: Sequence[str], absent: Absent = "skip") -> SegmentationScores:
    """Scores of pixel counts (C, 3), or (N, C, 3) of N images, as :attr:`Confusion.counts` has them.

    The counts of all images are summed first, then a class's IoU is shared / (predicted + true - shared) and its
    accuracy shared / true. aAcc is the share of all pixels that are right.

    ``absent="skip"``: a class that neither truth nor prediction has, in any image, has no IoU and is left out of
    the mean, and one that the truth lacks has no accuracy: what mmsegmentation's IoUMetric does. ``"zero"``: such a
    class counts as 0 in both means, as in the evaluation code of the MIT scene parsing benchmark
    (CSAILVision/sceneparsing), which divides by all 150 classes.

    Raises:
        UsageError: counts that are not (C, 3) or (N, C, 3).
    """
    array: Ints = np.asarray(counts, dtype=np.int64)
    _require(
        array.ndim in (2, 3) and array.shape[-2:] == (len(classes), 3),
        f"counts of shape {array.shape} for {len(classes)} classes",
    )
    total: Floats = array.reshape(-1, len(classes), 3).sum(axis=0).astype(np.float64)
    iou, accuracy = _ratios(total)
    if absent == "zero":
        iou, accuracy = np.nan_to_num(iou), np.nan_to_num(accuracy)
    means = {name: _number(value.item()) for name, value in _means(total[None], iou[None], accuracy[None]).items()}
    named = [dict(zip(classes, map(_number, values), strict=True)) for values in (iou, accuracy)]
    return SegmentationScores(means, *named)


def bootstrap_scores(
    counts: npt.ArrayLike, replicates: int = REPLICATES, seed: int = 0, groups: npt.ArrayLike | None = None
) -> dict[str, Floats]:
    """Bootstrap replicates (R,) over images of mIoU, mAcc and aAcc, from counts (N, C, 3).

    A replicate is the score of a set with so many copies of each image, absent classes left out. The draws depend
    on the number of images (or of ``groups`` (N,), of which whole ones are drawn) and the seed alone, so the
    replicates of two models are paired. NaN where a replicate has no pixel to judge by.

    Raises:
        UsageError: counts that are not (N, C, 3), no images, no replicates.
    """
    array: Floats = np.asarray(counts, dtype=np.float64)
    _require(array.ndim == 3 and array.shape[2] == 3, f"counts of shape {array.shape}, not (N, C, 3)")
    images, classes, _ = array.shape
    flat = array.reshape(images, 3 * classes)
    parts = []
    for block in weight_blocks(images, replicates, seed, groups):
        totals: Floats = (block.astype(np.float64) @ flat).reshape(len(block), classes, 3)  # whole numbers: exact
        parts.append(_means(totals, *_ratios(totals)))
    return {name: np.concatenate([part[name] for part in parts]) for name in SEGMENTATION_METRICS}


def boundary_counts(prediction: npt.ArrayLike, truth: npt.ArrayLike, classes: int, ratio: float = 0.02) -> Ints:
    """Pixel counts (C, 3) of the classes' inner boundaries alone, for :func:`scores`: boundary IoU.

    Cheng, Girshick, Dollar, Berg and Kirillov, Boundary IoU (CVPR 2021), as in the authors' code: a pixel of a
    class is on its boundary if it is lost when the class's mask, nothing lying beyond the image, is eroded d times
    by a 3x3 square, d being ``ratio`` of the image's diagonal, rounded, at least 1. The paper is about single
    objects; here a class's mask is an object. The truth's ignored pixels are taken out of the prediction too,
    before boundaries are drawn.

    ``prediction`` and ``truth`` (H, W) as :meth:`Confusion.update` takes them.

    Raises:
        UsageError: as :meth:`Confusion.update`.
    """
    guess, real = (torch.as_tensor(np.asarray(labels)) for labels in (prediction, truth))
    _matrix(guess, real, classes)
    said, known = guess.numpy().astype(np.uint8), real.numpy().astype(np.uint8)
    said = np.where(known == IGNORE, np.uint8(IGNORE), said)
    reach = max(1, round(ratio * math.hypot(*known.shape)))
    near_said, near_known = _near_border(said, reach), _near_border(known, reach)
    both = said[near_said & near_known & (said == known)]
    ours, theirs = said[near_said], known[near_known]
    return np.stack([np.bincount(part, minlength=256)[:classes] for part in (both, ours, theirs)], axis=1)


def _near_border(labels: npt.NDArray[np.uint8], reach: int) -> npt.NDArray[np.bool_]:
    """Where the square of ``reach`` pixels around a pixel holds another label or leaves the image.

    That is every class's inner boundary at once: eroded by this square, a mask keeps the pixels whose square is all of
    one label, so that no two neighbours in it differ.
    """
    height, width = labels.shape
    near = np.ones((height, width), np.bool_)
    if min(height, width) > 2 * reach:
        across = _in_boxes(labels[:, 1:] != labels[:, :-1], 2 * reach + 1, 2 * reach)
        down = _in_boxes(labels[1:] != labels[:-1], 2 * reach, 2 * reach + 1)
        near[reach:-reach, reach:-reach] = across | down
    return near


def _in_boxes(marks: npt.NDArray[np.bool_], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Whether there is a mark in each box of this size that lies in the image, by its first corner: the sums of a box
    come from four sums from the image's corner."""
    sums = np.zeros((marks.shape[0] + 1, marks.shape[1] + 1), np.int32)
    np.cumsum(marks, axis=0, out=sums[1:, 1:])
    np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
    return np.asarray(
        sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width] > 0
    )


def _matrix(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(C, C) int64 on the CPU: rows the truth, columns the prediction."""
    _require(
        prediction.shape == truth.shape and prediction.ndim == 2,
        f"prediction is {tuple(prediction.shape)} and truth {tuple(truth.shape)}, not both the same (H, W)",
    )
    whole = not (prediction.is_floating_point() or truth.is_floating_point())
    _require(whole, f"labels are {prediction.dtype} and {truth.dtype}, not integers")
    if not truth.numel():
        return torch.zeros(classes, classes, dtype=torch.int64)
    for labels, last, what in ((prediction, classes - 1, "predicted"), (truth, IGNORE, "true")):
        low, high = (int(side) for side in labels.aminmax())
        _require(low >= 0 and high <= last, f"{what} labels go from {low} to {high}, classes are 0 to {classes - 1}")
    # one row for every byte: labels between the classes and IGNORE are detected without another pass
    pairs = truth.to(torch.int32).mul_(classes).add_(prediction)
    rows = torch.bincount(pairs.flatten(), minlength=256 * classes).view(256, classes).cpu()
    _require(not rows[classes:IGNORE].any(), f"true labels are above {classes - 1} and not {IGNORE}")
    return rows[:classes]


def _ratios(totals: Floats) -> tuple[Floats, Floats]:
    """IoU and accuracy (..., C) of counts (..., C, 3), NaN where undefined."""
    shared, predicted, true = np.moveaxis(totals, -1, 0)
    with np.errstate(invalid="ignore"):
        return shared / (predicted + true - shared), shared / true


def _means(totals: Floats, iou: Floats, accuracy: Floats) -> dict[str, Floats]:
    """The three metrics (R,) of counts (R, C, 3) and the classes' ratios (R, C)."""
    with np.errstate(invalid="ignore"):
        overall = totals[..., 0].sum(axis=1) / totals[..., 2].sum(axis=1)
    return {"mIoU": _nanmean(iou), "mAcc": _nanmean(accuracy), "aAcc": overall}


def _nanmean(values: Floats) -> Floats:
    """The mean (R,) over the defined of (R, C); NaN where none is."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(defined, values, 0.0).sum(axis=1) / defined.sum(axis=1)
    return mean


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise UsageError(
            f"segmentation cannot be scored: {problem}",
            cause="truth and prediction contradict each other or the classes",
            fix="give (H, W) integer labels from 0 to classes - 1, and 255 in the truth for pixels without a class",
        )
