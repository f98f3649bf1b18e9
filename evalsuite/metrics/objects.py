"""Metrics of encoders that decompose images into objects: which object owns a pixel, and which objects there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from evalsuite.errors import UsageError
from evalsuite.metrics.ranking import average_precision

__all__ = ["ObjectSet", "adjusted_rand", "foreground_adjusted_rand", "owners", "set_precision"]

Floats = npt.NDArray[np.float64]


def owners(masks: Tensor, size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """The slot of each pixel (B, H, W), from masks (B, S, h, w): resized to that size (bilinear), the largest taken."""
    sized = F.interpolate(masks.float(), size, mode="bilinear", align_corners=False)
    owner: npt.NDArray[np.int64] = sized.argmax(dim=1).cpu().numpy()
    return owner


def adjusted_rand(truth: npt.ArrayLike, predicted: npt.ArrayLike) -> Floats:
    """The adjusted Rand index of each image (B,): how well two ways of parting its pixels agree (Hubert and Arabie
    1985); 1 where they are the same, around 0 where they agree as chance does.

    Both are labels (B, H, W) or (B, P), any integers. As scikit-learn's ``adjusted_rand_score``, it is 1 where both put
    all pixels together, and where both put each apart; where only the truth has a single part, it is 0.

    Raises :class:`UsageError` where the two are not of one shape.
    """
    one, other = _labels(truth, predicted)
    return np.array([adjusted_rand_score(a, b) for a, b in zip(one, other, strict=True)])


def foreground_adjusted_rand(truth: npt.ArrayLike, predicted: npt.ArrayLike) -> Floats:
    """:func:`adjusted_rand` of the pixels that belong to an object, those whose truth is 0 or more: FG-ARI (Greff et
    al., ICML 2019). How the background is segmented does not matter.

    An image with a single object has 1 if all its pixels have one predicted label, else 0. One without any is NaN.
    """
    one, other = _labels(truth, predicted)
    seen = one >= 0
    return np.array(
        [adjusted_rand_score(a[s], b[s]) if s.any() else np.nan for a, b, s in zip(one, other, seen, strict=True)],
        dtype=np.float64,
    )


def _labels(truth: npt.ArrayLike, predicted: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    one, other = np.asarray(truth), np.asarray(predicted)
    if one.shape != other.shape or one.ndim < 2:
        raise UsageError(
            f"labels {one.shape} and {other.shape} do not part the same pixels",
            cause="both are (images, height, width), or (images, pixels)",
            fix="bring masks to the size of the truth first",
        )
    return one.reshape(len(one), -1), other.reshape(len(other), -1)


@dataclass(frozen=True)
class ObjectSet:
    """Sets of objects, one an image: ``kinds`` (B, N, K), what each is in K respects, as integers; ``places``
    (B, N, D), where it is; and ``present`` (B, N): of a truth, whether it is an object at all (padding is not), of
    a prediction, how sure it is that it is one."""

    kinds: npt.NDArray[np.integer[Any]]
    places: npt.NDArray[np.floating[Any]]
    present: npt.NDArray[Any]


def set_precision(predicted: ObjectSet, truth: ObjectSet, distances: Sequence[float] = (np.inf,)) -> Floats:
    """Average precision of set prediction, one number a distance: AP as slot attention was measured on CLEVR
    (Locatello et al., NeurIPS 2020; ``average_precision_clevr`` of google-research/slot_attention at 0c1bbe5f).

    All predictions of all images are ranked, the surest first. One is right if the nearest object of its image that
    is like it in every kind lies nearer than the distance and was not matched before; the next nearest is not
    tried. Precision is then made monotone and averaged over recall, as PASCAL VOC does from 2010 on. Tied predictions
    are one step of the curve, where the official code leaves their order to an unstable sort; which of two
    that are equally sure matches an object is decided by their order. NaN where there is no object.

    Raises :class:`UsageError` where the two are not about the same images, kinds and dimensions.
    """
    _fit(predicted, truth)
    alike = (predicted.kinds[:, :, None] == truth.kinds[:, None]).all(axis=3) & truth.present[:, None].astype(bool)
    distance = np.linalg.norm(predicted.places[:, :, None] - truth.places[:, None], axis=3)
    distance = np.where(alike, distance, np.inf)
    nearest, away = distance.argmin(axis=2), distance.min(axis=2)
    order = np.argsort(-predicted.present.ravel(), kind="stable")
    objects = int(truth.present.astype(bool).sum())
    return np.array([_precision(predicted.present, nearest, away < d, order, objects) for d in distances])


def _precision(
    sure: npt.NDArray[Any],
    nearest: npt.NDArray[np.integer[Any]],
    near: npt.NDArray[np.bool_],
    order: npt.NDArray[np.integer[Any]],
    objects: int,
) -> float:
    if not objects:
        return float("nan")
    image = np.arange(near.size) // near.shape[1]
    taken = order[near.ravel()[order]]
    names = image[taken] * (int(nearest.max()) + 1) + nearest.ravel()[taken]
    _, first = np.unique(names, return_index=True)
    right = np.zeros(near.size, dtype=bool)
    right[taken[first]] = True
    # recall ends at the share of objects that were matched, the curve beyond at zero
    return (
        float(average_precision(sure.ravel(), right, curve="envelope")) * right.sum() / objects if len(first) else 0.0
    )


def _fit(predicted: ObjectSet, truth: ObjectSet) -> None:
    shapes = [(s.kinds.shape, s.places.shape, s.present.shape) for s in (predicted, truth)]
    fits = all(len({kinds[:2], places[:2], present}) == 1 for kinds, places, present in shapes)
    of = {(kinds[0], kinds[2], places[2]) for kinds, places, _ in shapes} if fits else set()
    if len(of) != 1:
        raise UsageError(
            f"predictions {shapes[0]} do not match the shapes of objects {shapes[1]}",
            cause="kinds are (B, N, K), places (B, N, D) and present (B, N), with the same B, K and D on both sides",
            fix="pass both in these shapes",
        )
