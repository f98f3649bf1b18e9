"""VOC image labels: the devkit's class lists, and the same from annotations."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from evalsuite.data.voc import CLASSES, Voc
from evalsuite.data.voc_classification import VocClassification
from evalsuite.errors import DataError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return VocClassification().demo(tmp_path_factory.mktemp("voc"), images=24)


@pytest.fixture
def devkit(world, tmp_path):
    return shutil.copytree(world, tmp_path / "VOCdevkit")


def write_lists(devkit, split, part):
    """The class lists as the devkit has them: 1, -1, and 0 for difficult."""
    folder = devkit / "VOC2007" / "ImageSets" / "Main"
    marks = {1: " 1", 0: "-1", -1: " 0"}
    for column, name in enumerate(CLASSES):
        rows = zip(part.names.tolist(), part.labels[:, column].tolist(), strict=True)
        (folder / f"{name}_{split}.txt").write_text("".join(f"{n[:-4]} {marks[m]}\n" for n, m in rows))


def test_labels_follow_from_annotations(devkit):
    found = VocClassification().load(devkit, "2007:trainval")
    boxes = Voc().load(devkit, "2007:trainval")
    assert found.classes == CLASSES
    assert found.labels.shape == (24, 20)
    for row, record in zip(found.labels, boxes.records, strict=True):
        for label in range(20):
            difficult = record.difficult[record.labels == label]
            expected = 0 if not len(difficult) else -1 if difficult.all() else 1
            assert row[label] == expected
    assert (found.labels == -1).any()
    assert found[0].shape == (boxes.records[0].height, boxes.records[0].width, 3)


def test_class_lists_say_the_same_and_are_taken_first(devkit):
    source = VocClassification()
    annotated = source.load(devkit, "2007:trainval")
    write_lists(devkit, "trainval", annotated)
    listed = source.load(devkit, "2007:trainval")
    np.testing.assert_array_equal(listed.labels, annotated.labels)
    assert source.verify(devkit, workers=1).ok
    file = devkit / "VOC2007" / "ImageSets" / "Main" / "cat_trainval.txt"
    file.write_text(file.read_text().replace("-1", " 1", 1))
    assert source.load(devkit, "2007:trainval").labels[0, CLASSES.index("cat")] == 1
    faults = source.verify(devkit, workers=1).faults
    assert any("the class lists mark 1 images otherwise than their annotations" in fault for fault in faults)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text.replace("-1", "2", 1), "has the line"),
        (lambda text: text.split("\n", 1)[1], "its images are not those of trainval.txt"),
        (lambda text: text.replace("000001", "999999"), "its images are not those of trainval.txt"),
    ],
)
def test_a_list_of_other_images_or_marks_is_refused(devkit, spoil, words):
    write_lists(devkit, "trainval", VocClassification().load(devkit, "2007:trainval"))
    file = devkit / "VOC2007" / "ImageSets" / "Main" / "dog_trainval.txt"
    file.write_text(spoil(file.read_text()))
    with pytest.raises(DataError, match=r"dog_trainval\.txt does not mark") as told:
        VocClassification().load(devkit, "2007:trainval")
    assert words in told.value.cause


def test_one_list_of_twenty_is_refused(devkit):
    write_lists(devkit, "trainval", VocClassification().load(devkit, "2007:trainval"))
    (devkit / "VOC2007" / "ImageSets" / "Main" / "sheep_trainval.txt").unlink()
    with pytest.raises(DataError, match=r"sheep_trainval\.txt"):
        VocClassification().load(devkit, "2007:trainval")


def test_roles_are_those_of_2007_and_other_splits_can_be_named(devkit, tmp_path):
    source = VocClassification()
    assert source.locate(devkit.parent) == devkit
    assert source.splits(devkit) == ("2007:trainval", "2007:test")
    assert source.roles(devkit) == {"train": "2007:trainval", "test": "2007:test"}
    assert len(source.load(devkit, "2012:trainval")) == 24
    with pytest.raises(DataError, match="voc07-cls"):
        source.locate(tmp_path / "nothing")


def test_real_annotations_have_the_classes_they_are_known_for(realdata):
    part = VocClassification().load(realdata / "det_voc2012_100" / "VOCdevkit", "train")
    boxes = Voc().load(realdata / "det_voc2012_100" / "VOCdevkit", "train")
    assert len(part) == 80
    shown = {(i, int(c)) for i, r in enumerate(boxes.records) for c in r.labels[~r.difficult]}
    assert {(int(i), int(c)) for i, c in zip(*np.nonzero(part.labels == 1), strict=True)} == shown
