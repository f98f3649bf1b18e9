"""Heads fitted on features: nearest neighbours, logistic and ridge regression, SGD heads, SVM, prototypes.

Each probe fits its whole grid of hyper-parameters in one go and tells the scores of every setting on other points.
:func:`select` chooses among them on a validation part of the training data; :func:`evaluate` fits the chosen one and
scores the features of a test set. Nothing here is given the labels of one.
"""

from __future__ import annotations

from evalsuite.lazy import moved
from evalsuite.probes.draws import draw_fraction, draw_low_shot, draw_shots, fold, hold_out
from evalsuite.probes.linear import LinearHeads, Ridge, SgdHeads
from evalsuite.probes.logistic import COSTS, Logistic, minimise
from evalsuite.probes.neighbours import NearestNeighbours, Prototypes, neighbours
from evalsuite.probes.rows import Normalise, Part, Predictions, Probe, Rows, Runtime, Train
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


__getattr__ = moved(__name__, renamed={"Fitted": "evalsuite.probes.Predictions", "Site": "evalsuite.probes.Runtime"})
