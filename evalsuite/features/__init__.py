"""From pixels to features on disk, once: preprocessing, what is read off a network, the encoder and its cache."""

from __future__ import annotations

from evalsuite.features.cache import SHARD, Cache, Encoded, Entry, default_root
from evalsuite.features.encoder import Encoder, ImageSet, autocast, images_in_order
from evalsuite.features.outputs import Output, Taps
from evalsuite.features.preprocess import SMALL, Preprocess
from evalsuite.features.sequences import Sequences
from evalsuite.features.texts import Texts

__all__ = [
    "SHARD",
    "SMALL",
    "Cache",
    "Encoded",
    "Encoder",
    "Entry",
    "ImageSet",
    "Output",
    "Preprocess",
    "Sequences",
    "Taps",
    "Texts",
    "autocast",
    "default_root",
    "images_in_order",
]
