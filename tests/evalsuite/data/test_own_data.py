"""Data of strangers: splits by other names, folders at another level, and that what a run refuses is a fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evalsuite.data
from evalsuite.data import as_fault, split_role, split_roles
from evalsuite.data.classification import ClassificationSet, ClassificationSource, Csv, Folder, Npz, split_folders
from evalsuite.errors import DataError
from evalsuite.hooks import Registry
from evalsuite.progress import Progress
from evalsuite.task import Setup
from evalsuite.tasks.classification import Classify

RNG = np.random.default_rng(0)


def images(root: Path, *places: str, count: int = 2) -> Path:
    """Different pictures in each of these folders; returns ``root``."""
    for place in places:
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(root / place / f"{i}.png")
    return root


def splits(root: Path, train: str, test: str, *classes: str) -> Path:
    return images(root, *(f"{split}/{name}" for split in (train, test) for name in classes or ("ant", "bee")))


def setup(data: str) -> Setup:
    shelf = Registry()
    evalsuite.data.evalsuite_register(shelf)
    progress = Progress(quiet=True)
    return Setup(protocol=Classify().protocols[0], work=Path(), registry=shelf, progress=progress, data=data)


def faults(path: Path, layout: ClassificationSource | None = None) -> str:
    return "\n".join((layout or Folder()).verify(path).faults)


def test_what_people_call_splits():
    names = {
        "train": ["Training", "TRAIN", "train_set", "trainset", "seg_train", "train-images", "Train Data", "learn"],
        "val": ["val", "Valid", "validation", "dev", "eval", "val_data"],
        "test": ["test", "Testing", "test_set", "TestSet", "hold-out", "holdout", "images.test"],
    }
    assert {name: split_role(name) for role in names for name in names[role]} == {
        name: role for role in names for name in names[role]
    }
    for name in ("cat", "trainer", "tests", "set", "data", "", "train_test", "birds_train", "steam train"):
        assert split_role(name) is None, name
    assert split_roles(["birds_train", "birds_test", "other"]) == {"birds_train": "train", "birds_test": "test"}
    assert split_roles(["train2017", "val2017"]) == {"train2017": "train", "val2017": "val"}
    assert split_roles(["train_station", "bus_station"]) == {}
    assert split_roles(["train", "test", "old_train", "old_test"]) == {"train": "train", "test": "test"}


@pytest.mark.parametrize(
    ("train", "test", "role"),
    [
        ("Training", "Testing", "test"), ("TRAIN", "VAL", "val"), ("train", "valid", "val"), ("Train", "Test", "test"),
        ("training_set", "test_set", "test"), ("seg_train/seg_train", "seg_test/seg_test", "test"),
        ("train", "dev", "val"), ("train", "eval", "val"), ("birds_train/birds_train", "birds_test/birds_test", "test"),
        ("train/train", "test/test", "test"), ("train", "holdout", "test"), ("train", "validation", "val"),
    ],
)  # fmt: skip
def test_splits_by_other_names_are_read(tmp_path: Path, train: str, test: str, role: str) -> None:
    path = splits(tmp_path, train, test)
    assert Folder().roles(path) == {"train": "train", role: role}
    assert split_folders(path) == {"train": tmp_path / train, role: tmp_path / test}
    report = Folder().verify(path)
    assert report.ok
    assert report.counts[role]["classes"] == {"ant": 2, "bee": 2}
    assert Folder().load(path, role).ids[0] == "ant/0.png"


def test_a_class_may_be_called_as_a_split_is(tmp_path: Path) -> None:
    images(tmp_path / "vehicles", "train", "bus", count=12)
    assert Folder().load(tmp_path / "vehicles", "train").classes == ("bus", "train")
    images(tmp_path / "papers", "valid", "invalid", count=12)
    assert Folder().load(tmp_path / "papers", "train").classes == ("invalid", "valid")


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (("Training", "Testing"), "no class folders"),
        (("cat", "dog", "test"), "test is a split by name, and none is train"),
        (("valid/cat", "valid/dog", "test/cat", "test/dog"), "test, valid are splits by name, and none is train"),
        (("train/cat", "train/dog", "Training/cat"), "several folders that are the split train"),
        (("shapes/train/cat", "shapes/train/dog", "shapes/test/cat", "shapes/test/dog"), "--data folder:{root}/shapes"),
        (("a/b/Train/cat", "a/b/Train/dog", "a/b/Test/cat", "a/b/Test/dog"), "--data folder:{root}/a/b"),
        (("x/train/cat", "x/test/cat", "docs"), "--data folder:{root}/x"),
        (("cat/train", "cat/test", "dog/train", "dog/test"), "put splits above classes: train/cat"),
        (
            ("train/shapes/cat", "train/shapes/dog", "test/shapes/cat"),
            "are cat, dog in {root}/train/shapes the classes",
        ),
        (("shapes/cat", "shapes/dog"), "are cat, dog in {root}/shapes the classes"),
        (("train/cat", "test/cat"), "a single class"),
        (("train/cat", "train/dog"), "nothing to score on"),
        (("train/cat", "train/dog", "test/yak"), "folders that are no class: yak"),
    ],
)
def test_trees_that_cannot_be_read_are_refused_by_run_and_verify_alike(
    tmp_path: Path, places: tuple[str, ...], words: str
) -> None:
    path = images(tmp_path, *places, count=8)
    found = faults(path)
    assert words.format(root=path) in found
    with pytest.raises(DataError) as refusal:
        Classify().sets(setup(f"folder:{path}"))
    assert as_fault(refusal.value) in found


def test_folders_beside_the_splits_are_told(tmp_path: Path) -> None:
    path = images(splits(tmp_path, "train", "test"), "seg_pred/seg_pred", "sample_submissions")
    notes = Folder().verify(path).notes
    assert notes == ["folders that are no split are left out: sample_submissions, seg_pred"]
    images(path / "train", "ant", "bee", count=12)
    assert f"--data folder:{path} reads them" in Folder().verify(path / "train").notes[-1]


def test_run_reads_by_the_function_that_verify_reads_by(tmp_path: Path) -> None:
    """What a layout refuses in ``check``, a run refuses and verification faults, in one wording."""

    class Odd(Folder):
        def check(self, train: ClassificationSet, test: ClassificationSet) -> None:
            raise DataError("never", cause="any", fix="none")

    path = splits(tmp_path, "train", "test")
    assert Odd().verify(path).faults == ["never: any (fix: none)"]
    with pytest.raises(DataError, match="never"):
        Odd().pair(path)


def csv(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def listed(root: Path, labels: dict[str, str], *columns: str) -> Path:
    """A list of a picture for each of {``split/number``: cells}."""
    images(root, "img", count=len(labels))
    rows = [f"img/{i}.png,{name.split('/')[0]},{cells}" for i, (name, cells) in enumerate(labels.items())]
    return csv(root / "list.csv", f"path,split,{','.join(columns)}", *rows)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"train/0": "a", "train/1": "b", "test/0": "a", "test/1": "c"}, "has no image of class c"),
        ({"train/0": "a", "train/1": "a", "test/0": "a"}, "a single class"),
        ({"train/0": "", "train/1": "", "test/0": "a", "test/1": "b"}, "2 of 2 images of list train have no label"),
        ({"train/0": "a", "train/1": "b", "test/0": ""}, "1 of 1 images of list test have no label"),
        ({"train/0": "a", "train/1": "b"}, "nothing to score on"),
        ({"test/0": "a", "test/1": "b"}, "nothing to learn from"),
    ],
)
def test_lists_that_a_run_refuses_are_faults(tmp_path: Path, labels: dict[str, str], words: str) -> None:
    path = listed(tmp_path, labels, "label")
    found = faults(path, Csv())
    assert words in found
    with pytest.raises(DataError) as refusal:
        Classify().sets(setup(f"csv:{path}"))
    assert as_fault(refusal.value) in found


def test_several_labels_of_which_none_can_be_told_are_a_fault(tmp_path: Path) -> None:
    path = listed(
        tmp_path, {"train/0": "1,0", "train/1": "0,1", "test/0": "1,0", "test/1": "1,0"}, "label:a", "label:b"
    )
    assert "no label of list test is there and absent" in faults(path, Csv())
    path = listed(
        tmp_path, {"train/0": "1,0", "train/1": "0,1", "test/0": "1,0", "test/1": "0,0"}, "label:a", "label:b"
    )
    assert faults(path, Csv()) == ""


def test_arrays_that_a_run_refuses_are_faults(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (4, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=pixels[:2], y_train=[0, 0], x_test=pixels[2:], y_test=[0, 0])
    assert "a single class" in faults(tmp_path / "a.npz", Npz())
    np.savez(tmp_path / "b.npz", x_train=pixels, y_train=[0, 1, 0, 1])
    assert "nothing to score on" in faults(tmp_path / "b.npz", Npz())
    np.savez(tmp_path / "c.npz", x_train=pixels[:2], y_train=[0, 1], x_test=pixels[2:], y_test=[0, 2])
    assert "has no image of class 2" in faults(tmp_path / "c.npz", Npz())


def test_a_class_that_lost_its_images_is_named(tmp_path: Path) -> None:
    path = splits(tmp_path, "train", "test")
    for file in (path / "train" / "bee").iterdir():
        file.rename(file.with_suffix(".heic"))
    found = faults(path)
    assert "train has no image of class bee" in found
    assert "2 files are no images: 2 .heic" in found
    path = images(splits(tmp_path / "other", "train", "test"), "train/wasp")
    report = Folder().verify(path)
    assert report.ok
    assert "test: no image of class wasp" in report.notes


def test_pictures_without_contrast_are_told_and_are_no_duplicates(tmp_path: Path) -> None:
    path = splits(tmp_path, "train", "test")
    for split, name, value in (("train", "ant", 3), ("test", "bee", 4), ("test", "ant", 5)):
        Image.fromarray(np.full((9, 9), value, np.uint8)).save(
            path / split / name / f"dark{value}.png", compress_level=value
        )
    Image.fromarray(np.eye(9, dtype=np.uint8) * 255).save(path / "train" / "bee" / "two.png")
    report = Folder().verify(path)
    contrast = "3 of 12 images have next to no contrast when decoded: a range of less than 16 in 255"
    assert [note.split(", the first is")[0] for note in report.notes] == [
        contrast, "1 of 12 images have 4 grey levels or fewer when decoded"
    ]  # fmt: skip
    assert report.ok, report.faults
    twin = path / "train" / "ant" / "twin.png"
    twin.write_bytes((path / "test" / "ant" / "dark5.png").read_bytes())
    assert "the same image is in several splits" in faults(path)


def test_what_reading_had_to_settle_is_told(tmp_path: Path) -> None:
    path = splits(tmp_path, "train", "test")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(
        path / "train" / "ant" / "photo.jpg", exif=exif
    )
    for name in ("x.png", "y.png"):
        deep = RNG.integers(0, 4096, (6, 9)).astype(np.uint16)
        deep[0, 0] = 4095
        Image.fromarray(deep).save(path / "test" / "bee" / name)
    assert Folder().verify(path).notes == [
        "1 of 11 images carry an EXIF turn, the first is train/ant/photo.jpg",
        "2 of 11 images hold 12 bits in 16, and are scaled by that, the first is test/bee/x.png",
    ]


def test_arrays_of_black_images_are_no_duplicates(tmp_path: Path) -> None:
    black = np.zeros((4, 6, 6), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=black, y_train=[0, 1, 0, 1], x_test=black[:2], y_test=[0, 1])
    report = Npz().verify(tmp_path / "a.npz")
    assert report.ok, report.faults
    assert "6 of 6 images have next to no contrast" in report.notes[0]
