"""Heads fitted on features: nearest neighbours, logistic and ridge regression, SGD heads, SVM, prototypes.

Each probe fits its whole grid of hyper-parameters in one go and tells the scores of every setting on other points.
:func:`select` chooses among them on a validation part of the training data; :func:`evaluate` fits the chosen one and
scores the features of a test set. Nothing here is given the labels of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np

from evalsuite.metrics.ranking import macro, per_label
from evalsuite.probes.draws import draw_fraction, draw_low_shot, draw_shots, fold, hold_out
from evalsuite.probes.linear import LinearHeads, Ridge, SgdHeads
from evalsuite.probes.logistic import COSTS, Logistic, minimise
from evalsuite.probes.neighbours import NearestNeighbours, Prototypes, neighbours
from evalsuite.probes.rows import Array, Normalise, Part, Predictions, Probe, Rows, Runtime, Train
from evalsuite.probes.selection import (
    Choice,
    Probed,
    Selection,
    accuracy,
    choose,
    evaluate,
    few_shots,
    mean_auroc,
    rank_correlation,
    select,
    tied_for_best,
)
from evalsuite.probes.svm import LinearSVM

__all__ = [
    "COSTS",
    "Choice",
    "LinearHeads",
    "LinearSVM",
    "Logistic",
    "NearestNeighbours",
    "Normalise",
    "Part",
    "Predictions",
    "Probe",
    "Probed",
    "Prototypes",
    "Ridge",
    "Rows",
    "Runtime",
    "Selection",
    "SgdHeads",
    "Train",
    "accuracy",
    "choose",
    "draw_fraction",
    "draw_low_shot",
    "draw_shots",
    "evaluate",
    "few_shots",
    "fold",
    "hold_out",
    "mean_auroc",
    "minimise",
    "neighbours",
    "rank_correlation",
    "select",
    "tied_for_best",
]


def __getattr__(name: str) -> object:
    """Older names, with a warning."""
    if name not in _OLDER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    now, value = _OLDER[name]
    message = f"evalsuite.probes.{name} is {now} now; the old name goes with the next version"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return value


def _mean_average_precision(scores: Array, labels: Array) -> float:
    return float(np.asarray(macro(per_label("envelope", scores, labels))))


def _test(features: Mapping[str, Array], labels: object = None) -> dict[str, Array]:
    return dict(features)


_OLDER: dict[str, tuple[str, object]] = {
    "Fitted": ("evalsuite.probes.Predictions", Predictions),
    "Site": ("evalsuite.probes.Runtime", Runtime),
    "Test": ("a mapping of the test set's features, whose labels stay with the caller,", _test),
    "mean_average_precision": (
        "evalsuite.metrics.ranking.per_label('envelope', ...), averaged,",
        _mean_average_precision,
    ),
}
