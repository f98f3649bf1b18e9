"""Data that segmentation engines learn by heart."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from evalsuite.data import source
from evalsuite.data.segmentation import IGNORE, SegmentationSet
from evalsuite.hooks import Registry

COLOURS = np.array([(40, 60, 200), (220, 50, 40), (60, 190, 70), (200, 200, 210)])
SIDE = 64


@pytest.fixture(scope="session")
def blocks(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> SegmentationSet:
    """Four images of coloured blocks, 32 pixels a side, whose class is their colour; a corner has no class."""
    folder, rng = tmp_path_factory.mktemp("blocks"), np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(4):
            mask = np.kron(rng.integers(0, 4, (2, 2)), np.ones((32, 32), int)).astype(np.uint8)
            pixels = COLOURS[mask] + rng.normal(0, 8, (SIDE, SIDE, 3))
            mask[:8, :8] = IGNORE
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / split / f"{number}.png")
            Image.fromarray(mask).save(folder / "masks" / split / f"{number}.png")
    (folder / "classes.txt").write_text("water\nbrick\nleaf\nsnow\n")
    layout = source(registry, "pairs")
    return layout.load(layout.locate(folder), "train")
