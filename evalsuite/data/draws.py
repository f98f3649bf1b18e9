"""Which rows: those of a limit, and those to test on of data that have no split of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["TEST_SHARE", "drawn", "evenly", "hashed", "split_by_hash"]

Item = TypeVar("Item")
Ints = NDArray[np.int64]
Names = NDArray[np.str_]

TEST_SHARE = 5  # one unit in so many is tested on


def evenly(length: int, count: int | None) -> Ints | None:
    """Which rows stay where at most ``count`` of ``length`` are wanted; None where all do. They are evenly spaced, for
    data are often sorted by class or by scene."""
    if count is None or length <= count:
        return None
    return np.linspace(0, length - 1, count).round().astype(np.int64)


def drawn(items: Sequence[Item], names: Sequence[str], split: str) -> list[Item]:
    """The items of the split ``train`` or ``test``, by :func:`hashed` of their names."""
    return [item for item, tested in zip(items, hashed(names), strict=True) if tested == (split == "test")]


def hashed(names: Sequence[str]) -> list[bool]:
    """Which names are to be tested on: one in five and one at least, those whose hashes come first."""
    tested: list[bool] = _first_by_hash(names, np.zeros(len(names), np.int64), -(-len(names) // TEST_SHARE)).tolist()
    return tested


def split_by_hash(ids: Names, labels: Ints, groups: Names | None = None) -> Names:
    """``train`` or ``test`` for every row: of each class one unit in five is tested on, those with the lowest hashes of
    their ids; of two units one, of a single one none.

    Units are rows, or groups, which count with the class that most of their rows have; a row of several labels counts
    with the rarest of those it has. A unit that is added or removed moves at most one other, and that of its own class
    (but where it changes which of two labels is the rarer).
    """
    from evalsuite.statistics import strata  # scipy: only data without splits pay for it

    units, member = np.unique(ids if groups is None else groups, return_inverse=True)
    pairs, rows = np.unique(np.stack([member, strata(labels)], axis=1), axis=0, return_counts=True)
    pairs = pairs[np.lexsort((pairs[:, 1], -rows, pairs[:, 0]))]  # of each unit its most frequent class first
    kind = pairs[np.unique(pairs[:, 0], return_index=True)[1], 1]
    sizes = np.bincount(kind)
    wanted = np.where(sizes > 1, np.maximum(1, (sizes + TEST_SHARE // 2) // TEST_SHARE), 0)
    chosen = _first_by_hash(units.tolist(), kind, wanted)
    if not chosen.any() and len(units) > 1:  # every class is a single unit
        chosen[np.argmin(kind)] = True
    return np.where(chosen[member], "test", "train") if len(ids) else np.zeros(0, dtype=np.str_)


def _first_by_hash(names: Sequence[str], kind: Ints, wanted: int | Ints) -> NDArray[np.bool_]:
    """(N,): of the names of each kind the ``wanted``, one number or one a kind, whose hashes come first; of equal names
    the first ones."""
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    order = np.lexsort((np.argsort(np.argsort(hashes, kind="stable"), kind="stable"), kind))  # kind after kind, by hash
    sizes = np.bincount(kind)
    place = np.arange(len(names)) - (np.cumsum(sizes) - sizes)[kind[order]]
    chosen = np.zeros(len(names), bool)
    chosen[order] = place < np.broadcast_to(wanted, sizes.shape)[kind[order]]
    return chosen
