"""Simulated worlds an agent acts in, as gymnasium environments.

Importing this module registers ``evalsuite/ObjectGoal-v0``, ``evalsuite/ObjectInteraction-v0``,
``evalsuite/ObjectComparison-v0``, ``evalsuite/PropertyComparison-v0``, ``evalsuite/RandomObjects-v0`` and, in three
dimensions, ``evalsuite/ObjectReaching-v0``, which needs MuJoCo;
``gymnasium.make("evalsuite.worlds:evalsuite/ObjectGoal-v0", variant="ocr-color1")`` does both at once.
"""

from __future__ import annotations

import gymnasium

from evalsuite.worlds.environments import (
    TASKS,
    Objects,
    ObjectsVector,
    observation_space,
    rules,
    variants,
    world,
)
from evalsuite.worlds.objects import COLOURS, SCALES, Rules, World
from evalsuite.worlds.reaching import ReachingRules, ReachingWorld
from evalsuite.worlds.rewarded import Rewarded
from evalsuite.worlds.sprites import SHAPES

__all__ = [
    "COLOURS",
    "SCALES",
    "SHAPES",
    "TASKS",
    "VERSION",
    "Objects",
    "ObjectsVector",
    "ReachingRules",
    "ReachingWorld",
    "Rewarded",
    "Rules",
    "World",
    "observation_space",
    "rules",
    "variants",
    "world",
]

VERSION = 1  # raised when rules or pictures change: they are the data, and fingerprints tell them by it

for _task in TASKS:
    _name = "".join(part.capitalize() for part in _task.split("-"))
    gymnasium.register(
        f"evalsuite/{_name}-v0",
        entry_point="evalsuite.worlds.environments:Objects",
        vector_entry_point="evalsuite.worlds.environments:ObjectsVector",
        kwargs={"task": _task},
    )
