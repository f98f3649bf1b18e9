"""Resampling: how far a score would move had other samples, or groups of them, been drawn; and whether two differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from evalsuite.errors import UsageError

__all__ = [
    "REPLICATES",
    "bootstrap_mean",
    "bootstrap_test",
    "holm",
    "interval",
    "iqm",
    "mcnemar_test",
    "over_seeds",
    "permutation_test",
    "resample_weights",
    "score_interval",
    "strata",
    "stratified_bootstrap",
    "ties",
    "weight_blocks",
]

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int32]

REPLICATES = 1000  # bootstrap replicates of every score

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
    samples: npt.ArrayLike, replicates: int = REPLICATES, seed: int = 0, groups: npt.ArrayLike | None = None
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


def score_interval(
    replicates: npt.ArrayLike,
    samples: npt.ArrayLike | None = None,
    groups: npt.ArrayLike | None = None,
    level: float = 0.95,
) -> tuple[float, float]:
    """The interval of a score: of a share of hits Wilson's (1927), of any other the percentiles of its replicates.

    A share of hits is the mean of ``samples`` (n,) that are all 0 or 1 and come without ``groups``. Percentiles are too
    narrow for one near 0 or 1, and have no width where all samples are hits; Wilson's score interval holds the true
    share about as often as it says there too (Brown, Cai and DasGupta 2001, Statistical Science 16:101).

    Raises:
        UsageError: as :func:`interval`.
    """
    hits = None if samples is None or groups is not None else np.asarray(samples, dtype=np.float64)
    if hits is None or not hits.size or not np.isin(hits, (0, 1)).all():
        return interval(replicates, level)
    low, high = stats.binomtest(int(hits.sum()), hits.size).proportion_ci(level, method="wilson")
    return float(low), float(high)


def over_seeds(replicates: Sequence[npt.ArrayLike], seed: int = 0) -> Floats:
    """Replicates (R,) of the mean over runs from several seeds, given those of each run.

    Two levels: for each replicate as many runs are drawn with replacement as there are, and their scores on that
    replicate's samples are averaged. Of one run it is the replicates themselves.
    """
    table: Floats = np.stack([np.asarray(r, dtype=np.float64) for r in replicates])
    if len(table) > 1:
        drawn = np.random.default_rng(seed).integers(0, len(table), table.shape)
        table = np.take_along_axis(table, drawn, axis=0)
    return np.asarray(table.mean(axis=0))


def iqm(scores: npt.ArrayLike) -> float:
    """The interquartile mean of ``scores`` (runs, tasks): the mean of all of them together, less a quarter at each end.

    Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical Precipice (arXiv 2108.13264),
    section 4.2; as in rliable, a quarter of n scores is the whole part of n / 4.
    """
    return float(stats.trim_mean(np.ravel(np.asarray(scores, dtype=np.float64)), 0.25))


def stratified_bootstrap(
    scores: npt.ArrayLike, statistic: Callable[[Floats], float] = iqm, replicates: int = REPLICATES, seed: int = 0
) -> Floats:
    """Replicates (R,) of a ``statistic`` of ``scores`` (runs, tasks), runs being drawn anew for each task by itself.

    Agarwal et al. 2021, section 4.1, and rliable: tasks are given, runs on one task have nothing to do with those on
    another. With one run there is nothing to draw.

    Raises:
        UsageError: ``scores`` are no table of two runs or more, or not all are finite.
    """
    table: Floats = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or len(table) < 2 or not np.isfinite(table).all():
        raise UsageError(
            f"no interval over runs of scores of shape {table.shape}",
            cause="it takes a table (runs, tasks) of two runs or more, all of them finite",
            fix="run more seeds",
        )
    drawn = np.random.default_rng(seed).integers(0, len(table), (replicates, *table.shape))
    return np.array([statistic(np.take_along_axis(table, rows, axis=0)) for rows in drawn])


def bootstrap_test(differences: npt.ArrayLike) -> float:
    """Two-sided p of no difference, from paired bootstrap replicates (R,) of a difference.

    Twice the smaller share of replicates on one side of zero, (count + 1) / (R + 1), zeros being on both sides.
    Undefined replicates (NaN) are left out; without any, p is 1.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[~np.isnan(values)]
    fewest = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return min(1.0, 2 * (fewest + 1) / (len(values) + 1))


def permutation_test(
    differences: npt.ArrayLike, groups: npt.ArrayLike | None = None, permutations: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p of no difference in the mean, from per-sample differences (n,): their signs are flipped at random.

    With ``groups`` (n,) the samples of a group flip together. p is (count + 1) / (permutations + 1), and never 0.

    Raises:
        UsageError: no samples, or ``groups`` of another length.
    """
    values: Floats = np.asarray(differences, dtype=np.float64)
    units, member = _units(len(values), groups)
    if member is not None:
        values = np.bincount(member, weights=values, minlength=units).astype(np.float64)
    values = values[values != 0]
    if not values.size:
        return 1.0
    found = abs(float(values.sum())) * (1 - 1e-12)  # equal sums in another order differ by rounding
    random, extreme = np.random.default_rng(seed), 0
    rows = max(1, _BLOCK // len(values))
    for start in range(0, permutations, rows):
        signs = random.integers(0, 2, (min(rows, permutations - start), len(values)), dtype=np.int8) * 2.0 - 1
        extreme += int((np.abs(signs @ values) >= found).sum())
    return (extreme + 1) / (permutations + 1)


def mcnemar_test(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Two-sided mid-p of equal accuracy, from what each of two models has right (n,) of the same samples.

    McNemar's exact test less half the probability of what was seen, which brings its error rate to the nominal one
    (Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91).
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only = int((a & ~b).sum()), int((b & ~a).sum())
    if not sum(only):
        return 1.0
    seen = stats.binom(sum(only), 0.5)
    return min(1.0, float(2 * seen.cdf(min(only)) - seen.pmf(min(only))))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given: each below alpha keeps the family's error rate at alpha."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, floor = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = floor
    return adjusted


def ties(ranked: Sequence[str], apart: Collection[tuple[str, str]]) -> list[list[str]]:
    """Maximal runs of a ranking, best first, in which no two are ``apart``. They may overlap; none is in another."""
    runs: list[list[str]] = []
    end = 0
    for start in range(len(ranked)):
        stop = start + 1
        while stop < len(ranked) and not any((one, ranked[stop]) in apart for one in ranked[start:stop]):
            stop += 1
        if stop > end:
            runs.append(list(ranked[start:stop]))
            end = stop
    return runs


def strata(labels: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """What (N,) samples are divided by when each part is to be like the whole: their class, counted from 0.

    Of several labels (N, L) with 1, 0 and -1 a sample counts with the rarest of those it has; those with none are one
    part.
    """
    marks = np.asarray(labels)
    if marks.ndim == 2:
        has = marks == 1
        order = np.argsort(has.sum(axis=0), kind="stable")
        rarest = order[has[:, order].argmax(axis=1)]
        marks = np.where(has.any(axis=1), rarest, -1)
    return np.unique(marks, return_inverse=True)[1].astype(np.int64)


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
