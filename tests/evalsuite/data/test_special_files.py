"""Pipes, sockets, devices and links that lead back among somebody's data: nothing waits, and nothing is read twice."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evalsuite.data.classes import class_table
from evalsuite.data.classification import Csv, Folder, find_images
from evalsuite.data.coco import Coco
from evalsuite.data.dicom import read_dicom
from evalsuite.data.images import (
    header_palette,
    orientation,
    read_labels,
    read_lines,
    read_rgb,
    size,
    walk,
)
from evalsuite.data.tables import read_table
from evalsuite.data.voc import Voc
from evalsuite.errors import DataError, ImageError
from evalsuite.files import open_regular, refuse_special


def image(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(path)
    return path


@pytest.fixture(params=["pipe", "socket", "device", "link to a pipe"])
def special(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Makes a special file of a name below the test's folder."""
    held: list[socket.socket] = []

    def make(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "socket":
            monkeypatch.chdir(path.parent)  # the paths of sockets are short
            held.append(socket.socket(socket.AF_UNIX))
            held[-1].bind(path.name)
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        else:
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to(tmp_path / "pipe")
        return path

    yield make
    for each in held:
        each.close()


@pytest.mark.parametrize("name", ["a.png", "7", "a.dcm"])  # a file without a suffix may be DICOM, by its bytes
def test_no_reader_waits_for_what_is_no_file(name: str, special: Callable[[Path], Path], tmp_path: Path) -> None:
    path = special(tmp_path / "data" / name)
    for read in (read_rgb, read_labels, size, orientation, header_palette, read_dicom):
        with pytest.raises(ImageError, match=f"{re.escape(name)} cannot be decoded") as refusal:
            read(path)
        assert "not a file" in refusal.value.cause
    for read in (read_lines, read_table):
        with pytest.raises(DataError):
            read(path)
    with pytest.raises(OSError, match=r"not a file|No such device"):
        open_regular(path)
    with pytest.raises(OSError, match="not a file"):
        refuse_special(path)
    refuse_special(tmp_path / "nothing")


def test_folders_leave_them_out_with_a_line(special: Callable[[Path], Path], tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in "ab":
            image(tmp_path / "set" / split / label / "0.png")
    special(tmp_path / "set" / "train" / "a" / "1.png")
    train = Folder().load(tmp_path / "set", "train")
    assert len(train) == 2
    assert train.notes[0].startswith("1 file is no image: 1 ")
    assert train.notes[0].endswith(("pipe", "socket", "device"))


def test_lists_that_name_them_have_an_unreadable_image(special: Callable[[Path], Path], tmp_path: Path) -> None:
    image(tmp_path / "0.png")
    special(tmp_path / "1.png")
    (tmp_path / "list.csv").write_text("path,label,split\n0.png,a,train\n1.png,b,train\n0.png,a,test\n")
    train = Csv().load(tmp_path / "list.csv", "train")
    assert train[0].shape == (8, 8, 3)
    with pytest.raises(ImageError, match=r"1\.png cannot be decoded"):
        _ = train[1]
    report = Csv().verify(tmp_path / "list.csv")
    assert any("not a file" in fault for fault in report.faults)


def test_annotations_are_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "train").mkdir()
    os.mkfifo(tmp_path / "coco" / "annotations" / "instances_train.json")
    with pytest.raises(DataError, match=r"instances_train\.json cannot be read"):
        Coco(official=False).load(tmp_path / "coco", "train")
    image(tmp_path / "voc" / "JPEGImages" / "a.jpg")
    (tmp_path / "voc" / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "voc" / "Annotations").mkdir()
    (tmp_path / "voc" / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (tmp_path / "voc" / "Annotations" / "a.xml").symlink_to(tmp_path / "gone.xml")
    with pytest.raises(DataError, match=r"a\.xml cannot be read"):
        Voc(official=False).load(tmp_path / "voc", "train")
    os.mkfifo(tmp_path / "classes.txt")
    assert class_table(tmp_path) is None


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with a class a folder in train and val, an image in each."""
    for shade, name in enumerate(("train/cat", "train/dog", "val/cat", "val/dog")):
        image(tmp_path / "set" / name / f"{shade}.png", shade)
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/cat/again", "."), ("train/cat/up", ".."), ("train/cat/all", "../.."), ("train/all", ".."),
        ("train/self", "../train"), ("train/cat/deep/up", "../../.."), ("train/cat/root", "/"),
    ],
)  # fmt: skip
def test_a_link_back_shows_no_image_of_another_split(tree: Path, link: str, target: str) -> None:
    (tree / link).parent.mkdir(exist_ok=True)
    (tree / link).symlink_to(target, target_is_directory=True)
    train = Folder().load(tree, "train")
    assert train.classes == ("cat", "dog")
    assert train.ids == ["cat/0.png", "dog/1.png"]
    assert [int(train[row].max()) for row in range(2)] == [0, 1]
    files, note = find_images(tree / "train")
    assert files.names.tolist() == train.ids
    assert note is None


def test_two_links_that_lead_in_a_ring_are_left_out(tree: Path) -> None:
    (tree / "train" / "cat" / "more").symlink_to("../../val/dog", target_is_directory=True)
    (tree / "val" / "dog" / "more").symlink_to("../../train/cat", target_is_directory=True)
    assert Folder().load(tree, "train").ids == ["cat/0.png", "dog/1.png"]
    assert Folder().load(tree, "val").ids == ["cat/2.png", "dog/3.png"]


def test_links_to_folders_elsewhere_are_followed(tree: Path, tmp_path: Path) -> None:
    image(tmp_path / "store" / "x" / "9.png", 9)
    (tmp_path / "store" / "loop").symlink_to(".", target_is_directory=True)
    (tree / "train" / "cat" / "store").symlink_to(tmp_path / "store", target_is_directory=True)
    (tree / "train" / "fox").symlink_to(tmp_path / "store" / "x", target_is_directory=True)
    train = Folder().load(tree, "train")
    assert train.ids == ["cat/0.png", "cat/store/x/9.png", "dog/1.png", "fox/9.png"]
    assert np.array_equal(train[1], train[3])
    names = [os.path.relpath(entry.path, tree / "train") for entry in walk(tree / "train")]
    assert names == ["cat/0.png", "cat/store/x/9.png", "dog/1.png"]  # each folder once
