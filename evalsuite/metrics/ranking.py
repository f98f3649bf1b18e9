"""Scores of classifiers: top-k, accuracies over classes, AUROC, average precision, calibration.

Functions of truth and scores that also take bootstrap weights: ``weights`` (R, N) counts how often each sample is in
each of R replicates (:func:`evalsuite.statistics.resample_weights`), and the answer then is (R,) instead of a number.
What is undefined (a class without samples, a ranking without positives) is NaN, never 0.
"""

from __future__ import annotations

import warnings
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from evalsuite.errors import DataError, UsageError

__all__ = [
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "calibration_error",
    "class_accuracy",
    "macro",
    "per_label",
    "precision_recall",
    "top_k_hits",
]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Curve = Literal["step", "envelope", "11point"]


def top_k_hits(scores: npt.ArrayLike, labels: npt.ArrayLike, k: int = 1) -> Bools:
    """Whether each sample's label (N,) is among the k classes with the highest scores (N, C): (N,).

    Of tied classes the lower index goes first, so k=1 agrees with ``argmax``. Their mean is top-k accuracy.
    """
    values, truth = np.asarray(scores), np.asarray(labels)
    if values.ndim != 2 or truth.shape != values.shape[:1] or not 1 <= k <= values.shape[1]:
        raise UsageError(
            f"no top-{k} of scores {values.shape} against labels {truth.shape}",
            cause="scores are (N, C), labels (N,), and k is 1 to C",
            fix="pass one score a class and one label a sample",
        )
    own = np.take_along_axis(values, truth[:, None], axis=1)
    before = np.arange(values.shape[1])[None] < truth[:, None]
    hits: Bools = ((values > own) | ((values == own) & before)).sum(axis=1) < k
    return hits


def class_accuracy(
    hits: npt.ArrayLike, labels: npt.ArrayLike, classes: int, weights: npt.ArrayLike | None = None
) -> Floats:
    """The share of hits among the samples of each class: (C,), or (R, C); NaN for a class without samples."""
    truth = np.asarray(labels, dtype=np.int64)
    order = np.argsort(truth, kind="stable")
    there, starts = np.unique(truth[order], return_index=True)
    w = _rows(weights, len(truth))[:, order]
    shares = np.full((len(w), classes), np.nan)
    if len(truth):
        with np.errstate(invalid="ignore"):
            good = np.add.reduceat(w * np.asarray(hits, dtype=np.float64)[order], starts, axis=1)
            shares[:, there] = good / np.add.reduceat(w, starts, axis=1)
    accuracies: Floats = shares[0] if weights is None else shares
    return accuracies


@overload
def balanced_accuracy(hits: npt.ArrayLike, labels: npt.ArrayLike, classes: int) -> float: ...
@overload
def balanced_accuracy(hits: npt.ArrayLike, labels: npt.ArrayLike, classes: int, weights: npt.ArrayLike) -> Floats: ...
def balanced_accuracy(
    hits: npt.ArrayLike, labels: npt.ArrayLike, classes: int, weights: npt.ArrayLike | None = None
) -> float | Floats:
    """Mean class accuracy, over the classes that have samples (scikit-learn's ``balanced_accuracy_score``)."""
    return macro(class_accuracy(hits, labels, classes, weights))


@overload
def auroc(scores: npt.ArrayLike, targets: npt.ArrayLike) -> float: ...
@overload
def auroc(scores: npt.ArrayLike, targets: npt.ArrayLike, weights: npt.ArrayLike) -> Floats: ...
def auroc(scores: npt.ArrayLike, targets: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float | Floats:
    """The probability that a positive scores higher than a negative, a tie counting half; NaN without either.

    ``scores`` and ``targets`` (1 positive, 0 negative) are (N,). With weights, N log N once and N a replicate.
    """
    ranking = _Ranking(scores, targets, weights)
    positive, negative = ranking.weights * ranking.targets, ranking.weights * (1 - ranking.targets)
    above = np.cumsum(negative, axis=1)
    # Of the negatives down to the end of a positive's group of ties, those of the group itself count half.
    through = above[:, ranking.end]
    before = np.where(ranking.start > 0, above[:, ranking.start - 1], 0.0)
    lost = (positive * (through + before)).sum(axis=1) / 2
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return ranking.answer(1 - lost / pairs)


@overload
def average_precision(scores: npt.ArrayLike, targets: npt.ArrayLike, *, curve: Curve = "step") -> float: ...
@overload
def average_precision(
    scores: npt.ArrayLike, targets: npt.ArrayLike, weights: npt.ArrayLike, *, curve: Curve = "step"
) -> Floats: ...
def average_precision(
    scores: npt.ArrayLike,
    targets: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    curve: Curve = "step",
) -> float | Floats:
    """The area under the precision-recall curve of one ranking; NaN without a positive.

    ``step`` sums precision over the steps in recall (scikit-learn's ``average_precision_score``). ``envelope`` first
    makes precision monotone: at each recall the best at that recall or more (PASCAL VOC from 2010 on, and the VOC07
    SVM protocol of VISSL and mmselfsup). ``11point`` is the mean of that best at the recalls 0, 0.1, ... 1 (PASCAL VOC
    up to 2009). Tied scores are one step of the curve, so that the order of samples, which the official codes leave to
    an unstable sort, cannot matter.
    """
    ranking = _Ranking(scores, targets, weights)
    precision = ranking.precision()
    if curve != "step":
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    positive = ranking.weights * ranking.targets
    if curve == "11point":
        return ranking.answer(_eleven_points(np.cumsum(positive, axis=1), precision))
    with np.errstate(invalid="ignore"):
        return ranking.answer((positive * precision).sum(axis=1) / positive.sum(axis=1))


def _eleven_points(hits: Floats, best: Floats) -> Floats:
    """(R,): the mean over eleven recalls of ``best`` (R, N), which falls along the ranking; NaN without a positive."""
    total = hits[:, -1:]
    points = []
    for tenth in range(11):
        reached = 10 * hits >= tenth * total  # in whole numbers: 0.1 * 3 is more than 0.3
        points.append(np.take_along_axis(best, reached.argmax(axis=1)[:, None], axis=1))
    return np.where(total[:, 0] > 0, np.mean(np.concatenate(points, axis=1), axis=1), np.nan)


def precision_recall(scores: npt.ArrayLike, targets: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Precision and recall at every distinct score, from the highest down, and those scores: for a plot."""
    ranking = _Ranking(scores, targets, None)
    ends = np.unique(ranking.end)
    hits = np.cumsum(ranking.targets)
    with np.errstate(invalid="ignore"):
        return ranking.precision()[0][ends], (hits / hits[-1])[ends], ranking.scores[ends]


def per_label(
    metric: Literal["auroc", "step", "envelope", "11point"],
    scores: npt.ArrayLike,
    targets: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
) -> Floats:
    """AUROC or average precision of every label: (L,), or (R, L) with weights, from scores and targets (N, L).

    Targets are 1, 0, or -1 or NaN for unknown (uncertain, difficult); a label is scored on the samples that know it.
    A label without positives, and for AUROC without negatives, is NaN.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if values.ndim != 2 or values.shape != truth.shape:
        raise UsageError(
            f"scores {values.shape} against targets {truth.shape}",
            cause="both are (samples, labels)",
            fix="pass one column a label",
        )
    w = None if weights is None else np.asarray(weights)
    columns = []
    for label in range(values.shape[1]):
        known = truth[:, label] >= 0
        part = np.ones((1, known.sum())) if w is None else w[:, known]
        if metric == "auroc":
            columns.append(auroc(values[known, label], truth[known, label], part))
        else:
            columns.append(average_precision(values[known, label], truth[known, label], part, curve=metric))
    table = np.stack(columns, axis=1)
    return table[0] if weights is None else table


def macro(values: Floats, *, absent: Literal["skip", "refuse"] = "skip") -> float | Floats:
    """The mean over labels, the last axis: of (L,) a number, of (R, L) (R,).

    Labels that are undefined (NaN) are left out, and where all are, so is the mean. With ``absent="refuse"`` an
    undefined label raises :class:`DataError`; a replicate without positives is no reason to, so use it on (L,).
    """
    values = np.asarray(values)
    if absent == "refuse" and np.isnan(values).any():
        raise DataError(
            f"{int(np.isnan(values).sum())} of {values.size} labels cannot be scored",
            cause="the test split lacks positives or negatives of them",
            fix="score another split, or leave absent labels out of the mean",
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        mean = np.nanmean(values, axis=-1)
    return float(mean) if values.ndim == 1 else np.asarray(mean)


@overload
def calibration_error(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, bins: int = 15) -> float: ...
@overload
def calibration_error(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike, *, bins: int = 15
) -> Floats: ...
def calibration_error(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    bins: int = 15,
) -> float | Floats:
    """Expected calibration error (Guo et al. 2017, equation 3) of (N, C) probabilities: top-label, equal-width bins.

    A confidence c is in bin ``ceil(c * bins)``: bins are open below and closed above. (N,) probabilities are those of
    the positive class, and labels 0 or 1.

    Raises:
        UsageError: ``probabilities`` are not between 0 and 1.
    """
    p, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if not (np.isfinite(p).all() and p.min(initial=0.0) >= 0 and p.max(initial=0.0) <= 1 + 1e-6):
        raise UsageError(
            "these are no probabilities", cause="some are not between 0 and 1", fix="pass a softmax of the logits"
        )
    p = np.stack([1 - p, p], axis=1) if p.ndim == 1 else p
    confidence, hit = p.max(axis=1), p.argmax(axis=1) == truth
    member = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.eye(bins)[member] * (confidence - hit)[:, None]
    w = _rows(weights, len(p))
    error = np.abs(w @ gaps).sum(axis=1) / w.sum(axis=1)
    return float(error[0]) if weights is None else np.asarray(error)


class _Ranking:
    """Samples from the highest score down. ``start`` and ``end`` are the first and last index of each one's ties."""

    def __init__(self, scores: npt.ArrayLike, targets: npt.ArrayLike, weights: npt.ArrayLike | None) -> None:
        values, truth = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)
        if values.ndim != 1 or values.shape != truth.shape or np.isnan(values).any():
            raise UsageError(
                f"no ranking of scores {values.shape} with targets {truth.shape}",
                cause="both are (N,), and scores are numbers",
                fix="pass one score and one target a sample; per_label takes tables",
            )
        if not np.isin(truth, (0, 1)).all():
            raise UsageError(
                "targets other than 0 and 1", cause="one ranking has two classes", fix="leave unknown samples out"
            )
        order = np.argsort(-values, kind="stable")
        self.scores, self.targets = values[order], truth[order]
        self.weights = _rows(weights, len(values))[:, order]
        first = np.ones(len(values), dtype=bool)
        first[1:] = self.scores[1:] != self.scores[:-1]
        group = np.cumsum(first) - 1
        starts = np.flatnonzero(first)
        ends = np.append(starts[1:], len(values)) - 1 if len(values) else starts
        self.start, self.end = starts[group], ends[group]
        self.single = weights is None

    def precision(self) -> Floats:
        """(R, N): of the samples down to the end of each one's ties, the share that is positive; 0 where none are."""
        hits = np.cumsum(self.weights * self.targets, axis=1)[:, self.end]
        total = np.cumsum(self.weights, axis=1)[:, self.end]
        shares: Floats = np.divide(hits, total, out=np.zeros_like(hits), where=total > 0)
        return shares

    def answer(self, values: Floats) -> float | Floats:
        return float(values[0]) if self.single else values


def _rows(weights: npt.ArrayLike | None, n: int) -> Floats:
    """Weights as (R, n); one row of ones where there are none."""
    return np.ones((1, n)) if weights is None else np.asarray(weights, dtype=np.float64)
