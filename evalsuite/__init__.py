"""The public face of the suite: what users call and what plugin authors import.

Names are imported when they are first touched, so ``import evalsuite`` loads no torch and ``--help``
stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evalsuite.backbone import Backbone, BackboneSpec, Features
    from evalsuite.checkpoints import load_backbone
    from evalsuite.errors import (
        BackboneError,
        DataError,
        PluginError,
        Refusal,
        RegressionError,
        ResourceError,
        SubmissionError,
        TrainingError,
        UsageError,
    )
    from evalsuite.hooks import Registry, hookimpl
    from evalsuite.results import Result
    from evalsuite.runner import run
    from evalsuite.task import Metric, Outcome, Protocol, Setup, Task, evaluate

    __version__: str

__all__ = [
    "Backbone",
    "BackboneError",
    "BackboneSpec",
    "DataError",
    "Features",
    "Metric",
    "Outcome",
    "PluginError",
    "Protocol",
    "Refusal",
    "Registry",
    "RegressionError",
    "ResourceError",
    "Result",
    "Setup",
    "SubmissionError",
    "Task",
    "TrainingError",
    "UsageError",
    "__version__",
    "evaluate",
    "hookimpl",
    "load_backbone",
    "run",
]

_HOMES = {
    "backbone": ("Backbone", "BackboneSpec", "Features"),
    "checkpoints": ("load_backbone",),
    "errors": (
        "BackboneError",
        "DataError",
        "PluginError",
        "Refusal",
        "RegressionError",
        "ResourceError",
        "SubmissionError",
        "TrainingError",
        "UsageError",
    ),
    "hooks": ("Registry", "hookimpl"),
    "results": ("Result",),
    "runner": ("run",),
    "task": ("Metric", "Outcome", "Protocol", "Setup", "Task", "evaluate"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # a type checker would take it for a promise of any name

    def __getattr__(name: str) -> object:
        value: object
        if name == "__version__":
            from importlib.metadata import version  # takes longer than all the rest of this module

            value = version("evalsuite")
        elif name in _HOME:
            value = getattr(importlib.import_module(f"evalsuite.{_HOME[name]}"), name)
        else:
            raise AttributeError(f"module 'evalsuite' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
