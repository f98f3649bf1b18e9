"""What an author of plugins tests with: checks of what each kind owes, backbones whose worth is known, small worlds.

A check raises AssertionError with one line for everything that is wrong, so a test is one line too:

>>> from evalsuite.testing import check_task
>>> check_task(Counting)  # doctest: +SKIP

Methods and modifiers are checked by :mod:`pretrain.testing`; ``evalsuite plugins check NAME`` runs all of it.
"""

from __future__ import annotations

from evalsuite.testing._backbones import check_backbone
from evalsuite.testing._engines import check_engine
from evalsuite.testing._files import check_checkpoint, check_dataset
from evalsuite.testing._imports import check_import
from evalsuite.testing._tasks import cheapest, check_task, runnable
from evalsuite.testing._worlds import OracleBackbone, RandomBackbone, plugin_registry, tiny_world

__all__ = [
    "OracleBackbone",
    "RandomBackbone",
    "cheapest",
    "check_backbone",
    "check_checkpoint",
    "check_dataset",
    "check_engine",
    "check_import",
    "check_task",
    "plugin_registry",
    "runnable",
    "tiny_world",
]
