"""What every reader does with boxes, sets and their union."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.data.detection import Boxes, DetectionSet, Image, agree, assemble, union
from evalsuite.errors import DataError

ABOUT: dict[str, Any] = {"name": "t", "classes": ("a", "b"), "category_ids": (1, 5), "annotations": "f"}


def columns(owner: list[int], boxes: list[list[float]], masks: list[Any] | None = None) -> Boxes:
    count = len(owner)
    return Boxes(
        owner=np.array(owner, np.int64),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        labels=np.arange(count, dtype=np.int64) % 2,
        crowd=np.zeros(count, bool),
        difficult=np.zeros(count, bool),
        area=np.full(count, np.nan),
        masks=masks,
    )


def made(ids: list[int], **about: Any) -> DetectionSet:
    images = [Image(i, Path(f"{i}.jpg"), 10, 20) for i in ids]
    return assemble(images, columns(list(range(len(ids))), [[0, 0, 5, 5]] * len(ids)), **{**ABOUT, **about})


coordinate = st.floats(-40, 60, allow_nan=False, width=32)


@given(st.lists(st.tuples(st.integers(0, 3), *[coordinate] * 4), max_size=30))
def test_boxes_are_inside_and_have_an_inside(objects: list[tuple[float, ...]]) -> None:
    images = [Image(10 + i, Path(f"{i}.jpg"), 10 + i, 20 + i) for i in range(4)]
    found = assemble(images, columns([int(o[0]) for o in objects], [list(o[1:]) for o in objects]), **ABOUT)
    assert [r.image_id for r in found.records] == [10, 11, 12, 13]
    assert sum(map(len, found.records)) + len(found.degenerate) == len(objects)
    for place, record in enumerate(found.records):
        slack = 0.02
        assert (record.boxes >= -slack).all()
        assert (record.boxes <= np.array([record.width, record.height] * 2) + slack).all()
        assert (record.boxes[:, 2:] > record.boxes[:, :2]).all()
        np.testing.assert_allclose(record.area, np.prod(record.boxes[:, 2:] - record.boxes[:, :2], axis=1))
        own = [i for i, o in enumerate(objects) if o[0] == place]
        kept = [i % 2 for i in own if _has_inside(objects[i][1:], record.width, record.height)]
        assert record.labels.tolist() == kept  # of the right image, in the order of the file


def _has_inside(box: tuple[float, ...], width: int, height: int) -> bool:
    limits = np.array([width, height] * 2)
    cut = np.clip(box, 0, limits)
    if (np.abs(cut - box) <= 0.02).all():
        cut = np.array(box)
    return bool((cut[2:] > cut[:2]).all())


def test_rounding_of_the_annotators_tools_is_left_alone() -> None:
    found = assemble([Image(1, Path("a"), 10, 20)], columns([0], [[-0.01, 0, 20.015, 10.02]]), **ABOUT)
    assert found.records[0].boxes.tolist() == [[-0.01, 0, 20.015, 10.02]]
    assert found.clipped == ()


def test_clipped_and_degenerate_are_counted_by_image() -> None:
    boxes = [[-3, 0, 5, 5], [4, 4, 4, 8], [30, 0, 40, 5], [1, 1, 2, 2]]
    images = [Image(1, Path("x/a.jpg"), 10, 20), Image(2, Path("x/b.jpg"), 10, 20)]
    found = assemble(images, columns([0, 0, 1, 1], boxes), **ABOUT)
    assert found.clipped == ("a.jpg",)
    assert found.degenerate == ("a.jpg", "b.jpg")
    assert found.records[0].boxes.tolist() == [[0, 0, 5, 5]]
    assert found.warnings == ("t: left out 2 boxes without an inside", "t: cut 1 boxes to their images")
    assert found.counts()["classes"] == {"a": 1, "b": 1}


def test_limit_takes_rows_evenly_and_changes_the_fingerprint() -> None:
    whole = made([4, 5, 6])
    assert whole.limit(None) is whole
    assert whole.limit(3) is whole
    part = whole.limit(2)
    assert [r.image_id for r in part.records] == [4, 6]
    assert part.fingerprint not in (whole.fingerprint, whole.limit(1).fingerprint)
    assert whole.limit(2).fingerprint == part.fingerprint


def test_union_keeps_ids_that_are_unique() -> None:
    both = union("u", [made([4, 5]), made([9])])
    assert [r.image_id for r in both.records] == [4, 5, 9]
    assert [r.path.name for r in both.records] == ["4.jpg", "5.jpg", "9.jpg"]
    assert both.name == "u"


def test_union_numbers_ids_that_collide() -> None:
    both = union("u", [made([1, 2]), made([1, 2, 3])])
    assert [r.image_id for r in both.records] == [1, 2, 3, 4, 5]
    assert both.fingerprint != made([1]).fingerprint


def test_union_refuses_other_classes() -> None:
    with pytest.raises(DataError, match="do not have the same classes") as told:
        union("u", [made([1]), made([2], classes=("a", "c"))])
    assert told.value.cause == "they differ in b, c"
    with pytest.raises(DataError):
        agree(made([1]), made([2], category_ids=(1, 6)))


def drawn(mask: Any) -> np.ndarray:
    found = assemble([Image(1, Path("a.jpg"), 4, 6)], columns([0], [[0, 0, 3, 3]], [mask]), **ABOUT)
    return found.masks(found.records[0])


def test_masks_of_all_three_kinds_are_drawn_alike() -> None:
    expected = np.zeros((1, 4, 6), np.uint8)
    expected[0, 1:3, 2:4] = 1
    polygon = [np.array([2.0, 1, 4, 1, 4, 3, 2, 3])]
    runs = {"size": [4, 6], "counts": [9, 2, 2, 2, 9]}
    np.testing.assert_array_equal(drawn(polygon), expected)
    np.testing.assert_array_equal(drawn(runs), expected)
    found = assemble([Image(1, Path("a.jpg"), 4, 6)], columns([0], [[0, 0, 3, 3]], [polygon]), **ABOUT)
    compressed = found.rles(found.records[0])[0]
    np.testing.assert_array_equal(drawn({**compressed, "counts": compressed["counts"].decode()}), expected)


def test_parts_of_a_mask_are_joined() -> None:
    left, right = (np.array([x, 0.0, x + 1, 0, x + 1, 4, x, 4]) for x in (0.0, 5.0))
    assert drawn([left, right]).sum(axis=1).tolist() == [[4, 0, 0, 0, 0, 4]]


@pytest.mark.parametrize(
    "mask",
    [
        [np.array([0, 0, 1e12, 0, 1, 1])],
        [np.array([0, 0, np.inf, 0, 1, 1])],
        {"size": [4, 6], "counts": "zzzzzzzzzz"},
        {"size": [4, 6], "counts": "\u20ac"},
        {"size": [4, 6], "counts": "0d"},
    ],
)
def test_a_mask_that_cannot_be_is_refused(mask: Any) -> None:
    with pytest.raises(DataError, match=r"a mask of image a\.jpg cannot be drawn"):
        drawn(mask)


def test_no_objects_and_no_masks() -> None:
    empty = assemble([Image(1, Path("a.jpg"), 4, 6)], columns([], [], []), **ABOUT)
    assert empty.has_masks
    assert empty.masks(empty.records[0]).shape == (0, 4, 6)
    bare = made([1])
    assert not bare.has_masks
    with pytest.raises(ValueError, match="has no masks"):
        bare.masks(bare.records[0])
