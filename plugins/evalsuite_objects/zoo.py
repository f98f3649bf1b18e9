"""The names of the object encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evalsuite import Backbone
from evalsuite.options import declared_by_name
from evalsuite_objects.cnn import cnn, cnn_map, multi_cnn
from evalsuite_objects.iodine import iodine
from evalsuite_objects.slate import slate, slate_pixels
from evalsuite_objects.slots import slot_attention, slot_set
from evalsuite_objects.state import ground_truth
from evalsuite_objects.vae import vae

__all__ = ["build"]

BUILDERS: dict[str, Callable[..., Backbone]] = {
    "cnn": cnn,
    "cnn-map": cnn_map,
    "iodine": iodine,
    "multi-cnn": multi_cnn,
    "slate": slate,
    "slate-pixels": slate_pixels,
    "slot-attention": slot_attention,
    "slot-set": slot_set,
    "state": ground_truth,
    "vae": vae,
}


@declared_by_name(BUILDERS.get)
def build(name: str, **options: Any) -> Backbone:
    """``objects:NAME`` with fresh weights. Raises ValueError for an unknown name."""
    if name not in BUILDERS:
        raise ValueError(f"there is no object encoder {name!r}; there are {', '.join(BUILDERS)}")
    return BUILDERS[name](**options)
