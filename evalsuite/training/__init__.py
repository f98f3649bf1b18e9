"""Training: the loop, its optimizers, and processes that end together."""

from __future__ import annotations

from evalsuite.training.fit import (
    Fit,
    Moment,
    Steps,
    fit,
    full_precision,
    full_precision_outputs,
    launched,
    mix_seed,
    uncast,
)
from evalsuite.training.optim import LARS
from evalsuite.training.processes import together

__all__ = [
    "LARS",
    "Fit",
    "Moment",
    "Steps",
    "fit",
    "full_precision",
    "full_precision_outputs",
    "launched",
    "mix_seed",
    "together",
    "uncast",
]
