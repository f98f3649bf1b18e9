"""The public face of the suite: what users call and what plugin authors import.

Names are imported when they are first touched, so ``import evalsuite`` loads no torch and ``--help``
stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evalsuite.lazy import lazy

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


if not TYPE_CHECKING:  # a type checker would take it for a promise of any name
    _lazy, __dir__ = lazy(__name__, _HOMES)

    def __getattr__(name: str) -> object:
        if name != "__version__":
            return _lazy(name)
        from importlib.metadata import version  # takes longer than all the rest of this module

        return globals().setdefault(name, version("evalsuite"))
