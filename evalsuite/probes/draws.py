"""Which training rows are held out, folded or drawn; every draw is a function of labels and a seed."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from evalsuite import statistics
from evalsuite.errors import DataError, UsageError
from evalsuite.probes.rows import Array, Ints

__all__ = ["draw_fraction", "draw_low_shot", "draw_shots", "fold", "hold_out"]


def hold_out(labels: Array, fraction: float, seed: int, groups: Array | None = None) -> tuple[Ints, Ints]:
    """Training places to fit on and to validate on, both sorted.

    Each class gives its share, one sample at least where it has two; a class of one stays with the fit. With
    ``groups`` whole groups are held out, and shares are kept as well as they allow. Several labels a sample are
    split at random.
    """
    n = len(labels)
    if not 0 < fraction < 1:
        raise UsageError(f"a validation share of {fraction}", cause="it is between 0 and 1", fix="0.1 is usual")
    rng = np.random.default_rng(seed)
    if groups is not None:
        held = _held_groups(np.asarray(labels), np.asarray(groups), fraction, rng)
    elif labels.ndim == 2:
        held = rng.permutation(n)[: round(fraction * n)]
    else:
        shares = []
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares.append(members[: 0 if len(members) < 2 else max(1, round(fraction * len(members)))])
        held = np.concatenate(shares)
    mask = np.zeros(n, dtype=bool)
    mask[held] = True
    if mask.all() or not mask.any():
        raise _no_validation(n, groups)
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def fold(labels: Array, folds: int, seed: int, groups: Array | None = None) -> list[tuple[Ints, Ints]]:
    """Training places to fit on and to validate on, both sorted, of every fold; each sample is held out once.

    Folds have each class's share (scikit-learn's ``StratifiedKFold``, with ``groups`` ``StratifiedGroupKFold``); a
    sample of several labels counts with the rarest of those it has. A class of one sample stays with the fits. There
    are fewer folds where no class has a sample, or there is no group, for each. Raises :class:`DataError` where not
    even two can be made.
    """
    strata = statistics.strata(labels)
    units = [len(np.unique(strata if groups is None else groups[strata == s])) for s in np.unique(strata)]
    counts = np.bincount(strata)[np.unique(strata)] if groups is None else units
    count = min(folds, int(max(counts)), len(labels) if groups is None else len(np.unique(groups)))
    if count < 2:
        raise _no_validation(len(labels), groups)
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    with warnings.catch_warnings():  # of classes with fewer samples than folds, which are in some of them
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        parts = [held for _, held in kind(count, shuffle=True, random_state=seed).split(strata, strata, groups)]
    lone = np.flatnonzero(np.bincount(strata)[strata] == 1) if groups is None else np.zeros(0, dtype=np.int64)
    held = [np.setdiff1d(part, lone) for part in parts]
    splits = [(np.setdiff1d(np.arange(len(labels)), part), part) for part in held if len(part)]
    # where whole groups leave a single class, there is nothing to fit
    sound = [split for split in splits if len(np.unique(strata[split[0]])) > 1] if strata.max() else splits
    if not sound:
        raise _no_validation(len(labels), groups)
    return sound


def _no_validation(count: int, groups: Array | None) -> DataError:
    return DataError(
        f"no validation part can be made of {count} training samples",
        cause="every class has a single sample" if groups is None else "there is a single group, or one of each class",
        fix="choose a protocol with fixed hyper-parameters",
    )


def draw_fraction(labels: Array, fraction: float, seed: int, groups: Array | None = None) -> Ints:
    """A share of the training samples, sorted: of each class, one at least; with ``groups``, of the groups.

    With one seed a larger share holds a smaller one. Several labels a sample are drawn at random.
    """
    rng = np.random.default_rng(seed)
    units = labels if groups is None and labels.ndim == 1 else np.zeros(len(labels), dtype=np.int64)
    names, member = (None, np.arange(len(labels))) if groups is None else np.unique(groups, return_inverse=True)
    chosen = []
    for label in np.unique(units):
        pool = np.arange(len(names)) if names is not None else np.flatnonzero(units == label)
        pool = rng.permutation(pool)
        chosen.append(pool[: max(1, round(fraction * len(pool)))])
    return np.flatnonzero(np.isin(member, np.concatenate(chosen)))


def draw_shots(labels: Array, k: int, draw: int, seed: int) -> Ints:
    """Draw number ``draw`` of k samples a class, sorted. Raises :class:`DataError` for a class with fewer."""
    counts = np.bincount(labels)
    if (few := np.flatnonzero((counts < k) & (counts > 0))).size:
        raise DataError(
            f"class {few[0]} has {counts[few[0]]} training samples, fewer than {k}",
            cause="every shot is a sample of its own",
            fix="ask for fewer shots",
        )
    rng = np.random.default_rng([seed, k, draw])
    members = [rng.permutation(np.flatnonzero(labels == label))[:k] for label in np.unique(labels)]
    return np.sort(np.concatenate(members))


def draw_low_shot(targets: Array, k: int, draw: int, seed: int) -> list[Ints]:
    """The low-shot sets of VOC07 (VISSL): for each label of (N, L), k positives and (L - 1) k negatives.

    Unknown samples (-1) are never drawn. Where a label has fewer of either, all are taken.
    """
    rng = np.random.default_rng([seed, k, draw])
    sets = []
    for column in targets.T:
        positives = rng.permutation(np.flatnonzero(column == 1))[:k]
        negatives = rng.permutation(np.flatnonzero(column == 0))[: k * (targets.shape[1] - 1)]
        sets.append(np.sort(np.concatenate([positives, negatives])))
    return sets


def _held_groups(labels: Array, groups: Array, fraction: float, rng: np.random.Generator) -> Ints:
    """Whole groups, about ``fraction`` of the samples, with the classes' shares as near as may be."""
    names, member = np.unique(groups, return_inverse=True)
    kinds = np.eye(int(labels.max()) + 1)[labels] if labels.ndim == 1 else (labels == 1).astype(np.float64)
    counts = np.concatenate([kinds, np.ones((len(labels), 1))], axis=1)
    of_group = np.zeros((len(names), counts.shape[1]))
    np.add.at(of_group, member, counts)
    wanted = fraction * counts.sum(axis=0)
    held: list[int] = []
    have = np.zeros_like(wanted)
    for group in rng.permutation(len(names)):
        # Take a group where that brings the shares nearer to what is wanted; classes weigh alike.
        now, then = (((have + extra - wanted) / np.maximum(wanted, 1)) for extra in (0.0, of_group[group]))
        if (then**2).sum() < (now**2).sum() and len(held) < len(names) - 1:
            held.append(group)
            have += of_group[group]
    return np.flatnonzero(np.isin(member, held))
