"""Retrieval: how many of the nearest candidates are of a query's kind.

Tied candidates are taken in all orders at once: a number is the mean over the orders of the tied. So the order of the
files on disk cannot matter, and a collapsed backbone, to which all images are the same, scores what chance does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import gammaln
from torch import Tensor

from evalsuite.errors import UsageError

__all__ = ["Retrieved", "rank", "relevance", "retrieve", "score_similarities"]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Retrieved:
    """Per query, {k: (Q,)} or (Q,).

    ``precision`` is the share of the first k candidates that is relevant, ``recall`` the share of the relevant that
    is among the first k, ``hit`` whether one at least is (what papers on image and text call R@k), ``ap`` average
    precision. ``relevant`` counts the relevant candidates and ``left_out`` those excluded. A query without relevant
    candidates has precision and hit 0; its recall and ap are NaN, and means leave it out.
    """

    precision: dict[int, Floats]
    recall: dict[int, Floats]
    hit: dict[int, Floats]
    ap: Floats
    relevant: npt.NDArray[np.int64]
    left_out: npt.NDArray[np.int64]

    def table(self) -> dict[str, Floats]:
        """``precision@k``, ``recall@k``, ``hit@k`` and ``map`` of every query (Q,)."""
        of_k = {f"{name}@{k}": v for name in ("precision", "recall", "hit") for k, v in getattr(self, name).items()}
        return of_k | {"map": self.ap}

    def means(self) -> dict[str, float]:
        """The means of :meth:`table` over the queries on which each is defined."""
        return {
            name: float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")
            for name, values in self.table().items()
        }


def score_similarities(
    similarity: npt.ArrayLike,
    relevant: npt.ArrayLike,
    ks: Sequence[int] = (5, 10, 50),
    excluded: npt.ArrayLike | None = None,
) -> Retrieved:
    """Score (Q, N) similarities of queries to candidates against (Q, N) relevance.

    ``excluded`` (Q, N) marks candidates that a query may not retrieve: itself, or images of the same patient. Where
    fewer than k candidates are left, the missing ones count as misses in precision@k.
    """
    sims, truth = np.array(similarity, dtype=np.float64), np.asarray(relevant, dtype=bool)
    out = np.zeros(truth.shape, dtype=bool) if excluded is None else np.asarray(excluded, dtype=bool)
    if sims.ndim != 2 or not sims.shape == truth.shape == out.shape or np.isnan(sims).any() or min(ks) < 1:
        raise UsageError(
            f"similarities {sims.shape}, relevance {truth.shape}, excluded {out.shape}, k {tuple(ks)}",
            cause="all three are (queries, candidates), similarities are numbers, and k is 1 at least",
            fix="pass one row a query",
        )
    truth = truth & ~out
    sims[out] = -np.inf
    order = np.argsort(-sims, axis=1, kind="stable")
    ranked = np.take_along_axis(sims, order, axis=1)
    hits = np.take_along_axis(truth, order, axis=1).astype(np.float64)
    start, end = _ties(ranked)
    cumulative_hits = np.concatenate([np.zeros((len(sims), 1)), np.cumsum(hits, axis=1)], axis=1)
    total, left = cumulative_hits[:, -1], (~out).sum(axis=1)
    with np.errstate(invalid="ignore"):
        ranks = np.arange(1, sims.shape[1] + 1, dtype=np.float64)
        ap = (hits * np.take_along_axis(cumulative_hits, end + 1, axis=1) / ranks[end]).sum(axis=1) / total
        precision, recall, hit = {}, {}, {}
        for k in ks:
            expected, chance = _within(k, cumulative_hits, start, end, left)
            precision[k], recall[k], hit[k] = expected / k, expected / total, chance
    return Retrieved(precision, recall, hit, ap, total.astype(np.int64), out.sum(axis=1))


def retrieve(
    queries: Tensor | npt.ArrayLike,
    candidates: Tensor | npt.ArrayLike,
    query_labels: npt.ArrayLike,
    candidate_labels: npt.ArrayLike,
    ks: Sequence[int] = (5, 10, 50),
    *,
    query_groups: npt.ArrayLike | None = None,
    candidate_groups: npt.ArrayLike | None = None,
    device: torch.device | str = "cpu",
    chunk: int = 256,
) -> Retrieved:
    """Rank candidates (N, D) by their cosine to each query (Q, D), and score the ranking.

    Labels are (N,) integers, or (N, L) with 1 where a candidate shows a label; relevance is :func:`relevance`. With
    groups, (Q,) and (N,), a query does not retrieve candidates of its own group: give patients, or ids to keep each
    query from finding itself. Memory is ``chunk`` x N.
    """
    if (query_groups is None) != (candidate_groups is None):
        raise UsageError(
            "groups of one side only", cause="a candidate is left out when its group is the query's", fix="pass both"
        )
    labels = np.asarray(query_labels)
    groups = None if query_groups is None else np.asarray(query_groups)

    def excluded(rows: slice) -> Bools | None:
        return None if groups is None else groups[rows, None] == np.asarray(candidate_groups)[None]

    return _ranked(
        queries, candidates, lambda rows: relevance(labels[rows], candidate_labels), excluded, ks, device, chunk
    )


def rank(
    queries: Tensor | npt.ArrayLike,
    candidates: Tensor | npt.ArrayLike,
    relevant: npt.ArrayLike,
    ks: Sequence[int] = (5, 10, 50),
    *,
    excluded: npt.ArrayLike | None = None,
    device: torch.device | str = "cpu",
    chunk: int = 256,
) -> Retrieved:
    """As :func:`retrieve`, of any relevance (Q, N); ``excluded`` (Q, N) marks what a query may not retrieve.

    Raises :class:`UsageError` where they are not of that shape.
    """
    truth, out = np.asarray(relevant, dtype=bool), None if excluded is None else np.asarray(excluded, dtype=bool)
    shape = (len(queries), len(candidates))  # type: ignore[arg-type]  # what has rows has a length
    if truth.shape != shape or (out is not None and out.shape != shape):
        raise UsageError(
            f"relevance {truth.shape} and excluded {None if out is None else out.shape} for {shape}",
            cause="both are (queries, candidates)",
            fix="give a row a query",
        )
    return _ranked(
        queries,
        candidates,
        lambda rows: truth[rows],
        lambda rows: None if out is None else out[rows],
        ks,
        device,
        chunk,
    )


def _ranked(
    queries: Tensor | npt.ArrayLike,
    candidates: Tensor | npt.ArrayLike,
    relevant: Callable[[slice], Bools],
    excluded: Callable[[slice], Bools | None],
    ks: Sequence[int],
    device: torch.device | str,
    chunk: int,
) -> Retrieved:
    """Rank by cosine, ``chunk`` queries at a time; ``relevant`` and ``excluded`` are of the queries of a slice."""
    bank, points = _unit(candidates, device), _unit(queries, device)
    parts = []
    for start in range(0, len(points), chunk):
        rows = slice(start, start + chunk)
        similarities = (points[rows] @ bank.T).cpu().numpy()
        parts.append(score_similarities(similarities, relevant(rows), ks, excluded(rows)))
    return _join(parts, ks)


def relevance(query_labels: npt.ArrayLike, candidate_labels: npt.ArrayLike) -> Bools:
    """(Q, N): whether a candidate is of a query's label. The query's labels are integers (Q,).

    A candidate's are one integer (N,), or a row (N, L) with 1 at every label that it shows.
    """
    wanted, shown = np.asarray(query_labels), np.asarray(candidate_labels)
    if wanted.ndim != 1 or shown.ndim not in (1, 2):
        raise UsageError(
            f"labels of queries {wanted.shape} and of candidates {shown.shape}",
            cause="they are (Q,) integers, and (N,) integers or (N, L) marks",
            fix="give each query the label to retrieve",
        )
    relevant: Bools = wanted[:, None] == shown[None] if shown.ndim == 1 else (shown == 1).T[wanted]
    return relevant


def _unit(features: Tensor | npt.ArrayLike, device: torch.device | str) -> Tensor:
    # A copy: features come as read-only maps of files, of which torch warns.
    values = features if isinstance(features, Tensor) else torch.from_numpy(np.array(features, dtype=np.float32))
    return torch.nn.functional.normalize(values.to(device, torch.float32), dim=1)


def _ties(ranked: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first and last index of the ties of each entry, in rows that descend."""
    ranks = np.broadcast_to(np.arange(ranked.shape[1]), ranked.shape)
    new = np.ones(ranked.shape, dtype=bool)
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    start = np.maximum.accumulate(np.where(new, ranks, 0), axis=1)
    last = np.ones(ranked.shape, dtype=bool)
    last[:, :-1] = new[:, 1:]
    behind = np.where(last, ranks, ranked.shape[1])
    end = np.minimum.accumulate(behind[:, ::-1], axis=1)[:, ::-1]
    return start, end


def _within(
    k: int, cumulative_hits: Floats, start: npt.NDArray[Any], end: npt.NDArray[Any], left: npt.NDArray[Any]
) -> tuple[Floats, Floats]:
    """How many relevant candidates the first k hold, and the chance of one at least, over the orders of the tied."""
    queries = np.arange(len(cumulative_hits))
    k_of = np.minimum(k, left)
    kth = np.maximum(k_of - 1, 0)
    first, last = start[queries, kth], end[queries, kth]
    above = cumulative_hits[queries, first]
    size, good, take = last + 1 - first, cumulative_hits[queries, last + 1] - above, k_of - first
    expected = np.where(k_of > 0, above + good * take / size, 0.0)
    # No relevant one among `take` of `size`, of which `good` are: choose(size - good, take) / choose(size, take).
    bad = size - good
    log_none = _log_choose(bad, np.minimum(take, bad)) - _log_choose(size, np.minimum(take, size))
    none = np.where((above > 0) | (take > bad), 0.0, np.exp(log_none))
    return expected, np.where(k_of > 0, 1 - none, 0.0)


def _log_choose(n: npt.NDArray[Any], k: npt.NDArray[Any]) -> Floats:
    chosen: Floats = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return chosen


def _join(parts: Sequence[Retrieved], ks: Sequence[int]) -> Retrieved:
    def tables(name: str) -> dict[int, Floats]:
        return {k: np.concatenate([getattr(part, name)[k] for part in parts]) for k in ks}

    return Retrieved(
        tables("precision"), tables("recall"), tables("hit"),
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("ap", "relevant", "left_out")),
    )  # fmt: skip
