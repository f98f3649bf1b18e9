"""Places205 and Places365 by their official lists, and in a folder a class."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evalsuite.data.places import Places205, Places365
from evalsuite.errors import DataError


def put(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(path)


@pytest.fixture
def places205(tmp_path) -> Path:
    root = tmp_path / "places205"
    rows = {"train": ["a/abbey/x.jpg 0", "b/bar/y.jpg 1", "a/abbey/z.jpg 0"], "val": ["b/bar/v.jpg 1"]}
    for split, lines in rows.items():
        for line in lines:
            put(root / "data/vision/torralba/deeplearning/images256" / line.split()[0], 50)
        listed = root / "trainvalsplit_places205" / f"{split}_places205.csv"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def places365(tmp_path) -> Path:
    root = tmp_path / "places365"
    (root / "filelist_places365-standard").mkdir(parents=True)
    for name, lines in {
        "places365_train_standard.txt": ["/a/airfield/00000001.jpg 0", "/w/wet_bar/00000001.jpg 1"],
        "places365_val.txt": ["Places365_val_00000001.jpg 1", "Places365_val_00000002.jpg 0"],
        "categories_places365.txt": ["/a/airfield 0", "/w/wet_bar 1"],
    }.items():
        (root / "filelist_places365-standard" / name).write_text("\n".join(lines))
    put(root / "data_256" / "a/airfield/00000001.jpg", 10)
    put(root / "data_256" / "w/wet_bar/00000001.jpg", 20)
    put(root / "val_256" / "Places365_val_00000001.jpg", 30)
    put(root / "val_256" / "Places365_val_00000002.jpg", 40)
    return tmp_path


def test_places205_by_its_lists(places205):
    path = Places205().locate(places205)
    train, val = (Places205().load(path, split) for split in ("train", "val"))
    assert train.classes == val.classes == ("a/abbey", "b/bar")
    assert train.labels.tolist() == [0, 1, 0]
    assert train.ids[0].endswith("images256/a/abbey/x.jpg")
    assert val.labels.tolist() == [1]
    assert val[0].shape == (4, 4, 3)
    assert Places205().roles(path) == {"train": "train", "val": "val"}


def test_places365_by_its_lists(places365):
    path = Places365().locate(places365)
    train, val = (Places365().load(path, split) for split in ("train", "val"))
    assert train.classes == val.classes == ("a/airfield", "w/wet_bar")
    assert train.labels.tolist() == [0, 1]
    assert val.labels.tolist() == [1, 0]
    assert [int(val[i][0, 0, 0]) for i in (0, 1)] == [30, 40]


@pytest.mark.parametrize("source", [Places205, Places365])
def test_a_folder_a_class_is_taken_too(source, tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for name in ("airfield", "bar"):
            for i in range(count):
                put(tmp_path / source._homes[0] / split / name / f"{i}.jpg", i)
    path = source().locate(tmp_path)
    assert source().load(path, "val").labels.tolist() == [0, 1]
    assert source().load(path, "train").classes == ("airfield", "bar")


@pytest.mark.parametrize("source", [Places205, Places365])
def test_a_demo_has_the_official_lists(source, tmp_path):
    path = source().demo(tmp_path, images=24)
    assert source().locate(tmp_path) == path
    train, val = (source().load(path, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (24, 12)
    assert train[0].shape == val[11].shape == (64, 64, 3)
    assert source().verify(path, workers=1).ok


@pytest.mark.parametrize(
    ("name", "lines", "words"),
    [
        ("train", ["a/abbey/x.jpg"], "no name with a number"),
        ("train", ["a/abbey/x.jpg 0", "b/bar/y.jpg 0"], "one label to two classes"),
        ("train", ["a/abbey/x.jpg 1"], "no image of class 0"),
        ("val", ["b/bar/v.jpg 7"], "has the label 7"),
        ("val", ["../../secret.jpg 0"], "leads? out"),
    ],
)
def test_lists_that_cannot_be_are_refused(places205, name, lines, words):
    path = Places205().locate(places205)
    (path / "trainvalsplit_places205" / f"{name}_places205.csv").write_text("\n".join(lines))
    with pytest.raises(DataError) as told:
        Places205().load(path, name)
    assert re.search(words, f"{told.value.problem} {told.value.cause}")


def test_what_is_not_there_is_told(places205, places365, tmp_path):
    with pytest.raises(DataError, match="was not found"):
        Places205().locate(tmp_path / "empty")
    with pytest.raises(DataError, match="no split 'test'"):
        Places205().load(Places205().locate(places205), "test")
    path = Places365().locate(places365)
    (path / "val_256").rename(path / "elsewhere")
    with pytest.raises(DataError, match="lists and no images"):
        Places365().load(path, "val")
    (path / "filelist_places365-standard" / "categories_places365.txt").write_text("/a/airfield 1\n")
    with pytest.raises(DataError, match=r"categories_places365\.txt cannot be read"):
        Places365().load(path, "train")
