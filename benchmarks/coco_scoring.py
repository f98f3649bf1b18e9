"""How much faster is COCO scoring than pycocotools, and does it give the same numbers?

2,000 synthetic images, 100 detections each, 80 classes. Ours is
:func:`evalsuite.metrics.detection.coco_scores` from arrays, the conversion included; theirs is ``loadRes``,
``evaluate``, ``accumulate`` and ``summarize`` from dictionaries that are ready. Both run once, in one
process, one after the other.
"""

from __future__ import annotations

import contextlib
import io
from time import perf_counter
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evalsuite.metrics.detection import COCO_METRICS, Detections, Truth, coco_scores

__all__ = ["run"]

IMAGES, DETECTIONS, CLASSES, SIDE = 2_000, 100, 80, 640


def world(seed: int = 0) -> tuple[list[Truth], list[Detections]]:
    """1 to 14 objects an image, one in fifty a crowd; four detections in ten lie near an object of their
    class."""
    random = np.random.default_rng(seed)
    truth, found = [], []
    for key in range(1, IMAGES + 1):
        count = int(random.integers(1, 15))
        boxes = _boxes(random, count)
        labels = random.integers(0, CLASSES, count)
        extent = boxes[:, 2:] - boxes[:, :2]
        truth.append(
            Truth(
                key, SIDE, SIDE, boxes, labels,
                crowd=random.random(count) < 0.02,
                difficult=np.zeros(count, bool), area=0.7 * extent.prod(axis=1),
            )
        )  # fmt: skip
        source = random.integers(0, count, DETECTIONS)
        near = random.random(DETECTIONS) < 0.4
        close = boxes[source] + random.normal(0, 0.06, (DETECTIONS, 4)) * np.tile(extent[source], 2)
        close[:, 2:] = np.maximum(close[:, 2:], close[:, :2] + 1)
        found.append(
            Detections(
                key,
                np.where(near[:, None], close, _boxes(random, DETECTIONS)),
                random.random(DETECTIONS),
                np.where(near, labels[source], random.integers(0, CLASSES, DETECTIONS)),
            )
        )
    return truth, found


def _boxes(random: np.random.Generator, count: int) -> np.ndarray:
    corner = random.uniform(0, 0.7 * SIDE, (count, 2))
    return np.concatenate([corner, corner + random.uniform(5, 0.3 * SIDE, (count, 2))], axis=1)


def dictionaries(truth: list[Truth], found: list[Detections]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same world as an instances dictionary and a results list."""
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in truth:
        rows = zip(_corner_and_size(image.boxes), image.labels, image.area, image.crowd, strict=True)
        annotations += [
            {
                "id": len(annotations) + i, "image_id": image.image_id, "category_id": int(label) + 1,
                "bbox": box, "area": float(area), "iscrowd": int(crowd),
            }
            for i, (box, label, area, crowd) in enumerate(rows, 1)
        ]  # fmt: skip
    for told in found:
        results += [
            {"image_id": told.image_id, "category_id": int(label) + 1, "bbox": box, "score": float(score)}
            for box, label, score in zip(_corner_and_size(told.boxes), told.labels, told.scores, strict=True)
        ]
    images = [{"id": image.image_id, "height": image.height, "width": image.width} for image in truth]
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)]
    return {"images": images, "categories": categories, "annotations": annotations}, results


def _corner_and_size(boxes: np.ndarray) -> list[list[float]]:
    listed: list[list[float]] = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    return listed


def run() -> dict[str, Any]:
    """``ours_s`` and ``theirs_s`` seconds, their ``ratio``, and whether all twelve numbers agree to 1e-9."""
    truth, found = world()
    dataset, results = dictionaries(truth, found)
    began = perf_counter()
    ours = coco_scores(truth, found, [f"class {k}" for k in range(1, CLASSES + 1)])
    ours_s = perf_counter() - began

    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = dataset
        ground.createIndex()
        began = perf_counter()
        theirs = COCOeval(ground, ground.loadRes(results), "bbox")
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
        theirs_s = perf_counter() - began
    mine = [ours.scores[name] for name in COCO_METRICS]
    return {
        "name": f"COCO scoring against pycocotools, {IMAGES} images x {DETECTIONS} boxes, {CLASSES} classes",
        "ours_s": ours_s,
        "theirs_s": theirs_s,
        "ratio": theirs_s / ours_s,
        "goal": ">= 7x",
        "equal": bool(np.allclose([-1.0 if x is None else x for x in mine], theirs.stats, rtol=0, atol=1e-9)),
    }
