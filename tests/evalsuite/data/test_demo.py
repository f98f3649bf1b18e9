"""The demo worlds: what is drawn is what is annotated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evalsuite.data.coco import Coco
from evalsuite.data.demo import SHAPES, draw
from evalsuite.data.voc import CLASSES, Voc


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Coco().demo(tmp_path_factory.mktemp("demo"), images=24)


def test_coco_has_what_coco_has(coco: Path) -> None:
    found = Coco().load(coco, "train2017")
    assert found.classes == tuple(SHAPES)
    assert np.diff(found.category_ids).max() > 1
    counts = found.counts()
    assert counts["crowd"] >= 2
    assert counts["without objects"] >= 1
    assert all(counts["classes"].values())
    document = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    kinds = {(type(a["segmentation"]), a["iscrowd"]) for a in document["annotations"]}
    assert kinds == {(list, 0), (dict, 1)}
    assert len({a["id"] for a in document["annotations"]}) == len(document["annotations"])
    modes = set()
    for record in found.records:
        with Image.open(record.path) as image:
            modes.add(image.mode)
    assert modes == {"L", "RGB"}


def test_masks_boxes_and_areas_agree(coco: Path) -> None:
    found = Coco().load(coco, "train2017")
    for record in found.records:
        masks = found.masks(record)
        np.testing.assert_allclose(masks.sum(axis=(1, 2)), record.area, rtol=0.2, atol=16)
        for mask, box in zip(masks, record.boxes, strict=True):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(tight, box, atol=1.6)
        assert masks.sum(axis=0).max(initial=0) <= 1  # no two objects overlap


def test_objects_are_where_they_are_said_to_be() -> None:
    """Drawn twice with and without objects, images differ inside the masks, and only there but for noise."""
    from evalsuite.data.demo import _cover

    scene = draw(np.random.default_rng(0), things=6)
    height, width = scene.pixels.shape[:2]
    inside = np.zeros((height, width), bool)
    colourful = scene.pixels.astype(int).max(axis=2) - scene.pixels.astype(int).min(axis=2)
    for thing in scene.things:
        window, cover = _cover(thing.outline, height, width)
        if not thing.difficult:
            inside[window] |= cover > 0.9
    assert inside.sum() > 500
    assert np.median(colourful[inside]) > 2 * np.median(colourful[~inside])


def test_the_hole_of_a_ring_is_a_hole() -> None:
    from evalsuite.data.demo import _cover

    outline = SHAPES["ring"][0] * 20 + 30
    window, cover = _cover(outline, 60, 60)
    whole = np.zeros((60, 60))
    whole[window] = cover
    assert whole[30, 30] == 0
    assert whole[30, 14] == 1
    assert whole.sum() == pytest.approx(np.pi * 400 * (1 - 0.55**2), rel=0.05)


def test_voc_has_what_voc_has(tmp_path: Path) -> None:
    path = Voc().demo(tmp_path, images=16)
    assert Voc().splits(path) == (
        "2007:train", "2007:val", "2007:trainval", "2007:test", "2012:train", "2012:val", "2012:trainval",
    )  # fmt: skip
    both = Voc().load(path, "2007:trainval+2012:trainval")
    assert both.classes == CLASSES
    assert len(both) == 32
    counts = both.counts()
    assert 0 < counts["difficult"] < counts["boxes"] / 2
    assert {name for name, n in counts["classes"].items() if n} == {entry[2] for entry in SHAPES.values()}
    names = [{r.path.name for r in Voc().load(path, f"2007:{split}").records} for split in ("train", "val")]
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == {r.path.name for r in Voc().load(path, "2007:trainval").records}
