"""The names of the object encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evalsuite import Backbone
from evalsuite_objects.slate import slate
from evalsuite_objects.slots import slot_attention
from evalsuite_objects.state import ground_truth

__all__ = ["build"]

BUILDERS: dict[str, Callable[..., Backbone]] = {
    "slate": slate,
    "slot-attention": slot_attention,
    "state": ground_truth,
}


def build(name: str, **options: Any) -> Backbone:
    """``objects:NAME`` with fresh weights. Raises ValueError for an unknown name."""
    if name not in BUILDERS:
        raise ValueError(f"there is no object encoder {name!r}; there are {', '.join(BUILDERS)}")
    return BUILDERS[name](**options)
