"""Simulated worlds an agent acts in, as gymnasium environments.

Importing this module registers ``evalsuite/ObjectGoal-v0``, ``evalsuite/ObjectInteraction-v0``,
``evalsuite/ObjectComparison-v0``, ``evalsuite/PropertyComparison-v0`` and ``evalsuite/RandomObjects-v0``;
``gymnasium.make("evalsuite.worlds:evalsuite/ObjectGoal-v0", variant="ocr-color1")`` does both at once.
"""

from __future__ import annotations

import gymnasium

from evalsuite.worlds.environments import Objects, ObjectsVector, observation_space
from evalsuite.worlds.objects import COLOURS, SCALES, TASKS, Rules, World, rules, variants
from evalsuite.worlds.sprites import SHAPES

__all__ = [
    "COLOURS",
    "SCALES",
    "SHAPES",
    "TASKS",
    "Objects",
    "ObjectsVector",
    "Rules",
    "World",
    "observation_space",
    "rules",
    "variants",
]

for _task in TASKS:
    _name = "".join(part.capitalize() for part in _task.split("-"))
    gymnasium.register(
        f"evalsuite/{_name}-v0",
        entry_point="evalsuite.worlds.environments:Objects",
        vector_entry_point="evalsuite.worlds.environments:ObjectsVector",
        kwargs={"task": _task},
    )
