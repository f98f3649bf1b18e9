"""How well numbers are predicted: correlations of ranks, the share of variance, the mean error.

All take predictions and targets (N,), or (N, T) of T targets, whose mean is given. With ``weights`` (R, N), whole
numbers that say how often each sample is there, they give (R,), one number a resample: what would come of the samples
repeated. NaN is a number that is not defined, where predictions or targets are all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from evalsuite.errors import UsageError

__all__ = ["METRICS", "kendall", "mae", "r2", "spearman"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


def spearman(predictions: Array, targets: Array, weights: Array | None = None) -> float | Floats:
    """Spearman's correlation, of ranks, ties at their mean rank (``scipy.stats.spearmanr``)."""
    return _columns(_spearman, predictions, targets, weights)


def kendall(predictions: Array, targets: Array, weights: Array | None = None) -> float | Floats:
    """Kendall's tau-b (``scipy.stats.kendalltau``)."""
    return _columns(_kendall, predictions, targets, weights)


def r2(predictions: Array, targets: Array, weights: Array | None = None) -> float | Floats:
    """The share of the targets' variance that is explained, 1 at most (``sklearn.metrics.r2_score``)."""
    return _columns(_r2, predictions, targets, weights)


def mae(predictions: Array, targets: Array, weights: Array | None = None) -> float | Floats:
    """The mean absolute error, in the unit of the targets (``sklearn.metrics.mean_absolute_error``)."""
    return _columns(_mae, predictions, targets, weights)


METRICS: Mapping[str, Callable[..., float | Floats]] = {"spearman": spearman, "kendall": kendall, "r2": r2, "mae": mae}


def _columns(
    metric: Callable[[Floats, Floats, Floats], Floats], predictions: Array, targets: Array, weights: Array | None
) -> float | Floats:
    """The mean of a metric over the targets."""
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (predictions, targets))
    ours, theirs = (values[:, None] if values.ndim == 1 else values for values in (ours, theirs))
    counts = np.ones((1, len(theirs))) if weights is None else np.asarray(weights, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 2 or counts.shape[1:] != (len(theirs),) or not len(theirs):
        raise UsageError(
            f"predictions {np.shape(predictions)}, targets {np.shape(targets)}, weights {counts.shape}",
            cause="predictions and targets are (N,) or (N, T) numbers of one sample at least, and weights (R, N)",
            fix="give a row a sample",
        )
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise UsageError(
            "a prediction or a target is not finite", cause="they are numbers", fix="leave those samples out"
        )
    values = np.mean([metric(ours[:, t], theirs[:, t], counts) for t in range(ours.shape[1])], axis=0)
    return float(values[0]) if weights is None else values


def _spearman(ours: Floats, theirs: Floats, counts: Floats) -> Floats:
    return _correlation(_ranks(ours, counts), _ranks(theirs, counts), counts)


def _ranks(values: Floats, counts: Floats) -> Floats:
    """(R, N): mean ranks among the samples, each there as often as it counts."""
    _, group = np.unique(values, return_inverse=True)
    of_group = np.zeros((len(counts), int(group.max()) + 1))
    np.add.at(of_group.T, group, counts.T)
    ranks: Floats = (np.cumsum(of_group, axis=1) - of_group + (of_group + 1) / 2)[:, group]
    return ranks


def _correlation(ours: Floats, theirs: Floats, counts: Floats) -> Floats:
    """Pearson's correlation of rows (R, N), weighted."""
    total = counts.sum(axis=1, keepdims=True)
    a, b = (values - (counts * values).sum(axis=1, keepdims=True) / total for values in (ours, theirs))
    both, spread = (counts * a * b).sum(axis=1), (counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, both / np.sqrt(spread), np.nan)


def _kendall(ours: Floats, theirs: Floats, counts: Floats) -> Floats:
    def one(times: Floats) -> float:
        rows = np.repeat(np.arange(len(times)), times.astype(np.int64))
        if len(np.unique(ours[rows])) < 2 or len(np.unique(theirs[rows])) < 2:
            return float("nan")
        return float(stats.kendalltau(ours[rows], theirs[rows]).statistic)

    return np.array([one(times) for times in counts])


def _r2(ours: Floats, theirs: Floats, counts: Floats) -> Floats:
    mean = (counts @ theirs / counts.sum(axis=1))[:, None]
    around = (counts * (theirs - mean) ** 2).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(around > 0, 1 - counts @ (theirs - ours) ** 2 / around, np.nan)


def _mae(ours: Floats, theirs: Floats, counts: Floats) -> Floats:
    mean: Floats = counts @ np.abs(ours - theirs) / counts.sum(axis=1)
    return mean
