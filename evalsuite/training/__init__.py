"""Training: the loop, its optimizers, the devices it runs on, and the abort of all processes when one fails."""

from __future__ import annotations

from evalsuite.lazy import moved
from evalsuite.training.fit import (
    Fit,
    StepInfo,
    Steps,
    fit,
    full_precision,
    full_precision_outputs,
    launched,
    mix_seed,
    uncast,
)
from evalsuite.training.optim import LARS, cosine
from evalsuite.training.processes import together

__all__ = [
    "LARS",
    "Fit",
    "StepInfo",
    "Steps",
    "cosine",
    "fit",
    "full_precision",
    "full_precision_outputs",
    "launched",
    "mix_seed",
    "together",
    "uncast",
]

__getattr__ = moved(__name__, renamed={"Moment": "evalsuite.training.StepInfo"})
