"""Heads fitted on features: nearest neighbours, logistic and ridge regression, SGD heads, SVM, prototypes.

Each probe fits its whole grid of hyper-parameters in one go and tells the scores of every setting on other points.
:func:`select` chooses among them on a validation part of the training data; it is never given a test set. A
:class:`Test` shows its features to anyone and its labels once, to whoever hands in final scores. :func:`evaluate` is
the way from one to the other.
"""

from __future__ import annotations

from evalsuite.probes.draws import draw_fraction, draw_low_shot, draw_shots, fold, hold_out
from evalsuite.probes.linear import LinearHeads, Ridge, SgdHeads
from evalsuite.probes.logistic import COSTS, Logistic, minimise
from evalsuite.probes.neighbours import NearestNeighbours, Prototypes, neighbours
from evalsuite.probes.rows import Fitted, Normalise, Part, Probe, Rows, Site, Test, Train
from evalsuite.probes.selection import (
    Choice,
    Probed,
    Selection,
    accuracy,
    choose,
    evaluate,
    few_shots,
    mean_auroc,
    mean_average_precision,
    select,
    tied_for_best,
)
from evalsuite.probes.svm import LinearSVM

__all__ = [
    "COSTS",
    "Choice",
    "Fitted",
    "LinearHeads",
    "LinearSVM",
    "Logistic",
    "NearestNeighbours",
    "Normalise",
    "Part",
    "Probe",
    "Probed",
    "Prototypes",
    "Ridge",
    "Rows",
    "Selection",
    "SgdHeads",
    "Site",
    "Test",
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
    "mean_average_precision",
    "minimise",
    "neighbours",
    "select",
    "tied_for_best",
]
