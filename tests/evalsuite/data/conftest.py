"""Writers of small trees in both layouts, with one thing at a time made wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def _noise(path: Path, width: int = 40, height: int = 30, seed: int = 0) -> None:
    """An image that has no copy unless the seed is the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def noise() -> Callable[..., None]:
    return _noise


@pytest.fixture
def coco_document() -> dict[str, Any]:
    """Two images and three annotations: a polygon, an RLE crowd, and a category id gap."""
    return {
        "images": [
            {"id": 7, "file_name": "a.jpg", "height": 30, "width": 40},
            {"id": 3, "file_name": "b.jpg", "height": 30, "width": 40},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 3,
                "category_id": 90,
                "bbox": [4.5, 5, 10, 12],
                "area": 60.0,
                "iscrowd": 0,
                "segmentation": [[4.5, 5, 14.5, 5, 14.5, 17]],
            },
            {
                "id": 2,
                "image_id": 7,
                "category_id": 2,
                "bbox": [0, 0, 1, 30],
                "area": 30,
                "iscrowd": 1,
                "segmentation": {"size": [30, 40], "counts": [0, 30, 1170]},
            },
            {
                "id": 4,
                "image_id": 3,
                "category_id": 2,
                "bbox": [20, 10, 5, 5],
                "area": 25,
                "iscrowd": 0,
                "segmentation": [[20, 10, 25, 10, 25, 15, 20, 15]],
            },
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 2, "name": "bicycle"}],
    }


@pytest.fixture
def coco_tree(tmp_path: Path) -> Callable[..., Path]:
    """Write documents as splits of a COCO tree, with an image for every record."""

    def write(**documents: Mapping[str, Any] | str) -> Path:
        seed = 0
        for split, document in documents.items():
            file = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "coco" / split).mkdir(exist_ok=True)
            file.write_text(document if isinstance(document, str) else json.dumps(document))
            for entry in [] if isinstance(document, str) else document["images"]:
                seed += 1
                _noise(tmp_path / "coco" / split / entry["file_name"], entry["width"], entry["height"], seed)
        return tmp_path / "coco"

    return write


def voc_xml(
    objects: Sequence[tuple[str, Sequence[float], int]], width: int | None = 40, height: int | None = 30
) -> str:
    size = "" if width is None else f"<size><width>{width}</width><height>{height}</height></size>"
    keys = ("xmin", "ymin", "xmax", "ymax")
    entries = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, box, strict=True))
        + "</bndbox></object>"
        for name, box, difficult in objects
    )
    return f"<annotation>{size}{entries}</annotation>"


@pytest.fixture
def xml() -> Callable[..., str]:
    return voc_xml


@pytest.fixture
def voc_year(tmp_path: Path) -> Callable[..., Path]:
    """Write a year's folder: ``annotations`` by image name, splits as keyword arguments."""

    def write(annotations: Mapping[str, str], folder: str = "VOCdevkit/VOC2012", **splits: Sequence[str]) -> Path:
        year = tmp_path / folder
        for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (year / part).mkdir(parents=True, exist_ok=True)
        for seed, (name, text) in enumerate(annotations.items()):
            (year / "Annotations" / f"{name}.xml").write_text(text)
            _noise(year / "JPEGImages" / f"{name}.jpg", seed=100 * len(folder) + seed)
        for split, names in splits.items():
            (year / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{n}\n" for n in names))
        return year

    return write
