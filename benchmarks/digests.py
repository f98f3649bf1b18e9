"""What it costs to know data by content: digesting 100,000 small images, against encoding them for the first time.

The images are JPEGs of 64 pixels; the network is a ResNet-18 at their size on the processor, as small a first encoding
as one makes. It is timed on some of the images and counted for all.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evalsuite.checkpoints import load_backbone
from evalsuite.data.classification import Folder
from evalsuite.features import Cache, Preprocess
from evalsuite.hooks import load

_SIDE = 64
_CLASSES = 100


def run(images: int = 100_000, encoded: int = 2000) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        before = os.environ.get("EVALSUITE_CACHE")
        os.environ["EVALSUITE_CACHE"] = str(root / "cache")
        try:
            _write(root / "data", images)
            first, again = _digest(root / "data"), min(_digest(root / "data") for _ in range(3))
            encoding = _encode(root, encoded) * images / encoded
        finally:
            os.environ.pop("EVALSUITE_CACHE") if before is None else os.environ.update(EVALSUITE_CACHE=before)
    return {
        "name": f"digest {images} files", "seconds": first, "remembered_s": again,
        "goal_remembered": "< 2 s", "encoding_s": encoding, "share_of_encoding": first / encoding,
        "goal_share": "< 0.05",
    }  # fmt: skip


def _digest(path: Path) -> float:
    part = Folder().load(path, "train")
    return _seconds(lambda: part.digest)


def _encode(root: Path, count: int) -> float:
    backbone = load_backbone("random:timm:resnet18", load().registry).backbone
    part = Folder().load(root / "data", "train").limit(count)
    assert part.fingerprint  # known before it is timed
    how = Preprocess((_SIDE, _SIDE), "none")
    return _seconds(lambda: Cache(root / "features").features(backbone, part, preprocess=how))


def _write(folder: Path, images: int) -> None:
    """One photograph-like image, of which each file has a corner of its own."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (8, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    for number in range(images):
        path = folder / "train" / f"class{number % _CLASSES:02d}" / f"{number:06d}.jpg"
        if number < _CLASSES:
            path.parent.mkdir(parents=True)
        pixels[:8, :8] = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "test" / "class00").mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "test" / "class00" / "0.jpg")


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
