"""Nearest neighbours and class means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from evalsuite.errors import DataError
from evalsuite.probes.rows import Part, Predictions, Rows, Runtime, Setting, unit

__all__ = ["NearestNeighbours", "Prototypes", "neighbours"]


# --- nearest neighbours -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NearestNeighbours:
    """Weighted k-NN (Wu et al. 2018; as in DINO): the k rows with the highest cosine vote with exp(cosine / T).

    Scores are the shares of the vote. Features are normalised to unit length here, whatever was done before.
    """

    ks: tuple[int, ...] = (10, 20, 100, 200)
    temperatures: tuple[float, ...] = (0.07,)
    scale: Literal["probabilities"] = "probabilities"

    def settings(self, samples: int) -> list[dict[str, Any]]:
        ks = [k for k in sorted(self.ks, reverse=True) if k <= samples]
        if not ks:
            raise DataError(
                f"{samples} training samples have no {min(self.ks)} neighbours",
                cause="k is larger than the training set",
                fix="ask for a smaller k",
            )
        return [{"k": k, "temperature": t} for k in ks for t in sorted(self.temperatures, reverse=True)]

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], runtime: Runtime) -> Iterator[Predictions]:
        similarity, index = neighbours(part.rows, points, max(s["k"] for s in settings), runtime.device)
        labels = torch.from_numpy(np.ascontiguousarray(part.labels))
        for setting in settings:
            near, where = similarity[:, : setting["k"]], index[:, : setting["k"]]
            weights = torch.softmax(near / setting["temperature"], dim=1)
            yield Predictions(self._votes(weights, labels[where], part).numpy())

    def _votes(self, weights: Tensor, labels: Tensor, part: Part) -> Tensor:
        if not part.multilabel:
            return torch.zeros(len(weights), part.classes).scatter_add_(1, labels, weights)
        known = (labels >= 0).float() * weights[:, :, None]  # of each label, those vote who know it
        return (known * (labels == 1)).sum(1) / known.sum(1).clamp_min(torch.finfo(torch.float32).tiny)


def neighbours(
    bank: Rows, points: Rows, k: int, device: torch.device | str = "cpu", *, rows: int = 1024, columns: int = 16384
) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of ``bank`` with the highest cosine to each point: (M, k) cosines, descending, and places.

    Of equal cosines the lower place comes first. ``rows`` x ``columns`` similarities are held at once, however large
    the bank is. On the CPU the best of blocks of 16 are looked at first: the k best are in the k best blocks.
    """
    k = min(k, len(bank))
    found = []
    whole = bank.resident(device)
    stored = None if whole is None else unit(whole)
    for _, part in points.chunks(device, rows):
        queries = unit(part)
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, len(bank), columns):
            where = slice(start, min(start + columns, len(bank)))
            columns_here = unit(bank.at(where, device)) if stored is None else stored[where]
            values, places = _highest(queries @ columns_here.T, k)
            places = places + start
            if best is not None:  # both are sorted, and the places before are lower
                values, order = torch.cat([best[0], values], 1).sort(dim=1, descending=True, stable=True)
                places = torch.cat([best[1], places], 1).gather(1, order)
            best = values[:, :k], places[:, :k]
        assert best is not None
        found.append((best[0].cpu(), best[1].cpu()))
    return torch.cat([values for values, _ in found]), torch.cat([places for _, places in found])


def _highest(similarity: Tensor, k: int, block: int = 16) -> tuple[Tensor, Tensor]:
    """The k highest of each row, descending, the lower place first among equals; all where there are fewer."""
    count = similarity.shape[1]
    if count <= k:
        return similarity.sort(dim=1, descending=True, stable=True)
    values, places = _top(similarity, k + 1, block)
    # Which of several equals are in is topk's choice; only where equals lie across the border does it matter.
    torn = (values[:, k] == values[:, k - 1]).nonzero()[:, 0]
    values, places = values[:, :k], places[:, :k]
    if len(torn):
        sorted_values, sorted_places = similarity[torn].sort(dim=1, descending=True, stable=True)
        values[torn], places[torn] = sorted_values[:, :k], sorted_places[:, :k]
    places, order = places.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def _top(similarity: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """``topk`` with values descending, by way of the maxima of blocks where that pays."""
    rows, count = similarity.shape
    blocks = count // block
    if similarity.is_cuda or blocks < 4 * k:
        return similarity.topk(k, dim=1)
    maxima = similarity[:, : blocks * block].unflatten(1, (blocks, block)).amax(2)
    first = maxima.topk(k, dim=1, sorted=False).indices
    places = (first[:, :, None] * block + torch.arange(block)).flatten(1)
    rest = torch.arange(blocks * block, count).expand(rows, -1)
    places = torch.cat([places, rest], 1)
    values, order = similarity.gather(1, places).topk(k, dim=1)
    return values, places.gather(1, order)


@dataclass(frozen=True)
class Prototypes:
    """Nearest class mean (OBoW's few-shot classifier): unit-length features, their mean per class, again unit length.

    Scores are cosines times ``factor``.
    """

    factor: float = 10.0
    scale: Literal["logits"] = "logits"

    def settings(self, samples: int) -> list[dict[str, Any]]:
        return [{}]

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], runtime: Runtime) -> Iterator[Predictions]:
        targets = torch.from_numpy(np.nan_to_num(part.targets()))
        sums = torch.zeros(part.classes, part.rows.width, dtype=torch.float64, device=runtime.device)
        for where, rows in part.rows.chunks(runtime.device):
            sums += targets[where].to(runtime.device).T.double() @ unit(rows).double()
        means = unit(sums.float())
        scores = [self.factor * (unit(rows) @ means.T).cpu() for _, rows in points.chunks(runtime.device)]
        for _ in settings:
            yield Predictions(torch.cat(scores).numpy())
