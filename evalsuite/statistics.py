"""Resampling: how far a score would move had other samples, or groups of samples, been drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from evalsuite.errors import UsageError

__all__ = ["bootstrap_mean", "interval", "resample_weights", "weight_blocks"]

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int32]

# Weights held at once by what does not need them all: 16 MB.
_BLOCK = 4_000_000


def resample_weights(n: int, replicates: int, seed: int, groups: npt.ArrayLike | None = None) -> Counts:
    """How often each of ``n`` samples is in each bootstrap replicate: (replicates, n) counts.

    Without ``groups`` a row is multinomial: n draws with replacement. With ``groups`` (n,), the label of each
    sample's patient, video or scene, whole groups are drawn, as many as there are (the cluster bootstrap),
    so samples of a group share their count and the size of a replicate varies. The same arguments give the
    same counts, whatever is scored with them; that pairs the replicates of two models.

    Raises:
        UsageError: no samples, no replicates, or ``groups`` of another length.
    """
    return np.concatenate(list(weight_blocks(n, replicates, seed, groups)))


def weight_blocks(
    n: int, replicates: int, seed: int, groups: npt.ArrayLike | None = None, *, size: int = _BLOCK
) -> Iterator[Counts]:
    """The rows of :func:`resample_weights`, ``size`` counts or one row at a time, for very many samples."""
    units, member = _units(n, groups)
    if replicates < 1:
        raise UsageError(
            f"{replicates} bootstrap replicates",
            cause="there is nothing to draw",
            fix="ask for 1000 or so",
        )
    random = np.random.default_rng(seed)
    rows = max(1, size // n)
    for start in range(0, replicates, rows):
        count = min(rows, replicates - start)
        drawn = random.integers(0, units, (count, units)) + units * np.arange(count)[:, None]
        block = np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units).astype(np.int32)
        yield block if member is None else block[:, member]


def bootstrap_mean(
    samples: npt.ArrayLike, replicates: int = 1000, seed: int = 0, groups: npt.ArrayLike | None = None
) -> Floats:
    """Means of resampled ``samples``, (replicates,) for (n,) and (replicates, m) for m quantities (n, m).

    With ``groups`` whole groups are resampled, see :func:`resample_weights`; the mean is still over samples.

    Raises:
        UsageError: as :func:`resample_weights`, or a sample is not a finite number.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim not in (1, 2) or not np.isfinite(values).all():
        raise UsageError(
            f"no mean of samples of shape {values.shape}",
            cause="samples are (n,) or (n, m) and finite; some are not",
            fix="look at what gave NaN or infinity before asking for its interval",
        )
    parts = []
    for block in weight_blocks(len(values), replicates, seed, groups):
        weights = block.astype(np.float64)
        parts.append(((weights @ values).T / weights.sum(axis=1)).T)
    return np.concatenate(parts)


def interval(replicates: npt.ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap replicates (R,): the middle ``level`` of them.

    Replicates on which the score is undefined (NaN: a resample without a single object, say) are left out, so
    the interval is conditional on the score being defined; (nan, nan) where it never is.

    Raises:
        UsageError: ``level`` is not between 0 and 1, or ``replicates`` is not a row of numbers.
    """
    values: npt.NDArray[Any] = np.asarray(replicates, dtype=np.float64)
    if values.ndim != 1 or not 0 < level < 1:
        raise UsageError(
            f"no interval of level {level} from replicates of shape {values.shape}",
            cause="the level is a share between 0 and 1, and replicates are one row",
            fix="pass level=0.95 for 95 per cent",
        )
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _units(n: int, groups: npt.ArrayLike | None) -> tuple[int, npt.NDArray[np.int64] | None]:
    """How many units are drawn, and the unit of each sample (None: its own)."""
    if n < 1:
        raise UsageError(
            "no samples to resample", cause="the evaluation scored nothing", fix="check the data and split"
        )
    if groups is None:
        return n, None
    labels = np.asarray(groups)
    if labels.shape != (n,):
        raise UsageError(
            f"groups of shape {labels.shape} for {n} samples",
            cause="groups hold one label a sample",
            fix="pass the label of every sample, in the order of the samples",
        )
    names, member = np.unique(labels, return_inverse=True)
    return len(names), member
