"""Pictures of segmentations: what is shown where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evalsuite.data.cityscapes import Cityscapes
from evalsuite.data.segmentation import IGNORE, SegmentationSet
from evalsuite.pictures import (
    HATCH,
    HEADER,
    MARGIN,
    TILE,
    WRONG,
    colour,
    columns_sheet,
    iou_chart,
    painted,
    segmentation_rows,
    segmentation_sheet,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SegmentationSet:
    return Cityscapes().load(Cityscapes().demo(tmp_path_factory.mktemp("demo"), images=9), "train")


def panels(path: Path) -> list[np.ndarray]:
    """Image, truth, prediction and errors of the first row."""
    with Image.open(path) as image:
        sheet = np.asarray(image)
    top = HEADER + MARGIN
    lefts = [MARGIN + column * (TILE + MARGIN) for column in range(4)]
    return [sheet[top : top + 100, left : left + TILE] for left in lefts]


def test_rows_are_spread(data: SegmentationSet) -> None:
    assert segmentation_rows(data) == [0, 3, 5, 8]
    assert segmentation_rows(data.limit(2)) == [0, 1]


def test_a_right_prediction_has_no_errors(data: SegmentationSet, tmp_path: Path) -> None:
    truth = {place: data.mask(place) for place in segmentation_rows(data)}
    segmentation_sheet(data, {place: np.where(m == IGNORE, 0, m) for place, m in truth.items()}, tmp_path / "a.png")
    image, shown, said, errors = panels(tmp_path / "a.png")
    assert np.unique(image.reshape(-1, 3), axis=0).shape[0] > 100
    colours = {tuple(c) for c in np.unique(shown.reshape(-1, 3), axis=0).tolist()}
    palette = {tuple(c) for c in data.palette.tolist()}
    assert len(colours & palette) >= 2
    assert colours <= palette | {HATCH, (255, 255, 255)}
    assert not (errors == WRONG).all(axis=2).any()
    assert {tuple(c) for c in np.unique(said.reshape(-1, 3), axis=0).tolist()} <= palette


def test_errors_are_red_and_only_where_there_is_a_class(data: SegmentationSet, tmp_path: Path) -> None:
    place = next(i for i in range(len(data)) if (data.mask(i) == IGNORE).any())
    truth = data.mask(place)
    segmentation_sheet(data, {place: np.full(truth.shape, 18)}, tmp_path / "a.png")  # nothing there is a bicycle
    errors = panels(tmp_path / "a.png")[3]
    red = (errors == WRONG).all(axis=2)
    assert 0.9 < red.mean() < 1
    assert {tuple(c) for c in np.unique(errors[~red], axis=0).tolist()} == {HATCH, (255, 255, 255)}


def test_many_classes_and_tall_images(data: SegmentationSet, tmp_path: Path) -> None:
    segmentation_sheet(data, {}, tmp_path / "none.png")
    with Image.open(tmp_path / "none.png") as image:
        assert image.width == 4 * (TILE + MARGIN) + MARGIN


def test_chart(data: SegmentationSet, tmp_path: Path) -> None:
    iou: dict[str, float | None] = {name: index / 20 for index, name in enumerate(data.classes)}
    iou_chart(data, iou, tmp_path / "all.png")
    iou_chart(data, {**iou, "road": None, "car": None}, tmp_path / "some.png")
    iou_chart(data, dict.fromkeys(data.classes), tmp_path / "none.png")
    heights = []
    for name in ("all", "some", "none"):
        with Image.open(tmp_path / f"{name}.png") as image:
            heights.append(image.height)
    assert heights[0] > heights[1] > heights[2]
    with Image.open(tmp_path / "all.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == data.palette[13]).all(axis=1).sum() > 1000  # the bar of the car, in its colour


def test_masks_are_mixed_of_a_colour_each() -> None:
    masks = torch.zeros(1, 2, 2, 2)
    masks[:, 0], masks[:, 1, 0, 0] = 1.0, 0.5
    masks[:, 0, 0, 0] = 0.5
    drawn = painted(masks)
    first, second = (torch.tensor(colour(place)) / 255 for place in range(2))
    torch.testing.assert_close(drawn[0, :, 1, 1], first)
    torch.testing.assert_close(drawn[0, :, 0, 0], (first + second) / 2)


def test_columns_of_pictures_of_any_size(tmp_path: Path) -> None:
    columns_sheet({"small": torch.rand(2, 3, 4, 4), "large": torch.rand(2, 3, 32, 32)}, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 2 * 300
        assert picture.height > 2 * 300
    with pytest.raises(ValueError, match=r"shorter|longer"):
        columns_sheet({"two": torch.rand(2, 3, 4, 4), "one": torch.rand(1, 3, 4, 4)}, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()
