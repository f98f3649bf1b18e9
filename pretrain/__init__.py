"""What a method author imports: the parts of a recipe, what flows through a step, and views and images as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evalsuite.lazy import lazy

if TYPE_CHECKING:
    from pretrain.batch import Batch, Look, Pairs, Sample, View
    from pretrain.data import Arrays, Corpus, Files, Images, Joined, Rows, Worlds, read_npz
    from pretrain.defaults import build_optimizer, look_at, look_through
    from pretrain.hooks import Recipe, Stages
    from pretrain.plugin import Method, Modifier, Preset, Run, Training
    from pretrain.views import (
        Augment,
        Centre,
        Jitter,
        moco_v1,
        moco_v2,
        multi_crop,
        pixpro_pair,
        simclr,
        solo_asymmetric,
        solo_symmetric,
        swav,
    )

__all__ = [
    "Arrays",
    "Augment",
    "Batch",
    "Centre",
    "Corpus",
    "Files",
    "Images",
    "Jitter",
    "Joined",
    "Look",
    "Method",
    "Modifier",
    "Pairs",
    "Preset",
    "Recipe",
    "Rows",
    "Run",
    "Sample",
    "Stages",
    "Training",
    "View",
    "Worlds",
    "build_optimizer",
    "look_at",
    "look_through",
    "moco_v1",
    "moco_v2",
    "multi_crop",
    "pixpro_pair",
    "read_npz",
    "simclr",
    "solo_asymmetric",
    "solo_symmetric",
    "swav",
]

_HOMES = {
    "batch": ("Batch", "Look", "Pairs", "Sample", "View"),
    "data": ("Arrays", "Corpus", "Files", "Images", "Joined", "Rows", "Worlds", "read_npz"),
    "defaults": ("build_optimizer", "look_at", "look_through"),
    "hooks": ("Recipe", "Stages"),
    "plugin": ("Method", "Modifier", "Preset", "Run", "Training"),
    "views": (
        "Augment",
        "Centre",
        "Jitter",
        "moco_v1",
        "moco_v2",
        "multi_crop",
        "pixpro_pair",
        "simclr",
        "solo_asymmetric",
        "solo_symmetric",
        "swav",
    ),
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _HOMES)
