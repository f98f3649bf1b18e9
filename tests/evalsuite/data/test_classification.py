"""Labelled images from every layout: what is read, what is refused, and what verification finds."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evalsuite.data
from evalsuite.data import parse
from evalsuite.data.cifar import Cifar10, Cifar100, Stl10
from evalsuite.data.classification import (
    Arrays,
    ClassificationSet,
    Csv,
    Folder,
    Npz,
    class_folders,
    find_images,
    split_by_hash,
)
from evalsuite.data.imagenet import ImageNet, TinyImageNet
from evalsuite.data.medical import MedMnist
from evalsuite.data.reading import look
from evalsuite.errors import DataError, UsageError
from evalsuite.features import ImageSet
from evalsuite.hooks import Registry
from evalsuite.progress import Progress

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def picture(path: Path, pixels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(8, 8, 3) if pixels is None else pixels).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two splits of three classes."""
    root = tmp_path / "mine"
    for split, count in (("train", 4), ("test", 2)):
        for label in ("cat", "dog", "newt"):
            for i in range(count):
                picture(root / split / label / f"{i}.png")
    return root


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Write a CSV file of lines, and an image for every path in it."""

    def write(*lines: str, images: int = 0) -> Path:
        for i in range(images):
            picture(tmp_path / f"{i}.png")
        path = tmp_path / f"list{len(list(tmp_path.glob('*.csv')))}.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture
def shelf() -> Registry:
    registry = Registry()
    evalsuite.data.evalsuite_register(registry)
    return registry


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(DataError) as told:
        call()
    assert len(str(told.value).splitlines()) == 3
    for word in words:
        assert word in str(told.value)


# ----------------------------------------------------------------------------------------------------- folders


def test_a_folder_a_class(tree):
    train, test = Folder().load(tree, "train"), Folder().load(tree, "test")
    assert train.classes == test.classes == ("cat", "dog", "newt")
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert train.ids[5] == "dog/1.png"
    with Image.open(tree / "train" / "dog" / "1.png") as image:
        np.testing.assert_array_equal(train[5], np.asarray(image))
    assert Folder().roles(tree) == {"train": "train", "test": "test"}
    assert isinstance(train, ClassificationSet)
    kept: ImageSet = train  # what the cache reads
    assert len(kept.ids) == 12


def test_folders_are_read_at_any_depth_without_hidden_files_or_endless_links(tree):
    picture(tree / "train" / "cat" / "images" / "deep.PNG")
    (tree / "train" / "cat" / ".DS_Store").write_text("x")
    (tree / "train" / "cat" / "notes.txt").write_text("x")
    (tree / "train" / "cat" / "again").symlink_to(tree / "train" / "cat", target_is_directory=True)
    train = Folder().load(tree, "train")
    assert len(train) == 13
    assert train.ids[4] == "cat/images/deep.PNG"
    assert train.notes == ("1 file is no image: 1 .txt",)
    picture(tree / "train" / "stray.png")
    assert "1 files lie in no class folder and are left out" in Folder().load(tree, "train").notes
    Path(os.fsdecode(os.fsencode(tree / "train" / "cat") + b"/\xff.png")).write_bytes(b"x")
    refused(lambda: Folder().load(tree, "train"), "no text", "UTF-8")


def test_images_are_found_whatever_their_folders_mean(tree):
    picture(tree / "stray.JPEG")
    (tree / "notes.txt").write_text("x")
    picture(tree / ".hidden" / "0.png")
    files, others = find_images(tree)
    assert (len(files), others) == (19, "1 file is no image: 1 .txt")
    assert files.names.tolist()[:2] == ["stray.JPEG", "test/cat/0.png"]
    assert files.path(0) == tree / "stray.JPEG"
    files, others = find_images(tree, ["train", "test/dog"])
    assert files.names.tolist()[-3:] == ["train/newt/3.png", "test/dog/0.png", "test/dog/1.png"]
    assert (len(files), others) == (14, None)
    assert class_folders(tree) == ["test", "train"]
    assert class_folders(tree / "stray.JPEG") == []


def test_class_folders_alone_are_divided_by_the_hash_of_their_names(tmp_path):
    for label in ("a", "b"):
        for i in range(30):
            picture(tmp_path / label / f"{i}.png")
    train, test = Folder().load(tmp_path, "train"), Folder().load(tmp_path, "test")
    assert not set(train.ids) & set(test.ids)
    assert len(train) + len(test) == 60
    assert np.bincount(test.labels).tolist() == [6, 6]  # one in five of each class
    shutil.rmtree(tmp_path / "b")
    assert set(Folder().load(tmp_path, "test").ids) == {i for i in test.ids if i.startswith("a/")}


def test_a_test_folder_that_is_no_class_is_refused(tree):
    picture(tree / "test" / "yak" / "0.png")
    refused(lambda: Folder().load(tree, "test"), "yak")


def test_folders_without_images_or_splits_are_refused(tree, tmp_path):
    (tmp_path / "bare" / "train" / "cat").mkdir(parents=True)
    refused(lambda: Folder().load(tmp_path / "bare", "train"), "holds no image")
    refused(lambda: Folder().load(tree, "val"), "no split 'val'", "train, test")
    shutil.rmtree(tree / "test")
    refused(lambda: Folder().roles(tree), "nothing to score on")
    refused(lambda: Folder().locate(tmp_path / "nowhere"), "train/CLASS")


# ------------------------------------------------------------------------------------------------ what data are


def test_the_digest_tells_data_apart_and_not_where_they_lie(tree, tmp_path):
    here = Folder().load(tree, "train")
    moved = Folder().load(Path(shutil.copytree(tree, tmp_path / "copy")), "train")
    assert moved.digest == here.digest
    picture(tmp_path / "copy" / "train" / "cat" / "0.png", noise(9, 9, 3))
    changed = Folder().load(tmp_path / "copy", "train")
    assert changed.digest != here.digest
    assert here.take(here.labels > 0).digest != here.digest


def test_an_image_written_anew_at_the_same_size_is_not_served_from_the_cache(tmp_path):
    for split in ("train", "test"):
        for label in ("a", "b"):
            picture(tmp_path / split / label / "0.bmp")
    before = Folder().load(tmp_path, "train").fingerprint
    changed = picture(tmp_path / "train" / "a" / "0.bmp")
    os.utime(changed, ns=(1, 1))
    assert Folder().load(tmp_path, "train").fingerprint != before


def test_features_do_not_depend_on_labels_and_scores_do(table):
    first = Csv().load(table("path,label,split", "0.png,a,train", "1.png,b,train", images=2), "train")
    other = Csv().load(table("path,label,split", "0.png,b,train", "1.png,a,train"), "train")
    assert first.fingerprint == other.fingerprint
    assert first.digest != other.digest


def test_a_limit_takes_rows_of_all_classes(tree):
    train = Folder().load(tree, "train")
    few = train.limit(6)
    assert np.bincount(few.labels).tolist() == [2, 2, 2]
    np.testing.assert_array_equal(few[5], train[11])
    assert train.limit(None) is train
    assert train.limit(100) is train


# --------------------------------------------------------------------------------------------------------- CSV


def test_a_csv_names_paths_labels_splits_and_groups(table):
    path = table(
        "path,label,split,group", "0.png,2,train,p1", "1.png,10,train,p2", "2.png,,train,p2", "3.png,2,test,p3",
        images=4,
    )  # fmt: skip
    train, test = Csv().load(path, "train"), Csv().load(path, "test")
    assert train.classes == ("2", "10")  # numbers in their own order
    assert train.labels.tolist() == [0, 1, -1]
    assert train.known.tolist() == [True, True, False]
    assert train.groups is not None
    assert train.groups.tolist() == ["p1", "p2", "p2"]
    assert test.classes == train.classes
    assert test[0].shape == (8, 8, 3)
    assert Csv().splits(path) == ("train", "test")


def test_a_csv_with_a_column_a_label_has_several_labels(table):
    path = table("path,label:cat,label:dog", "0.png,1,0", "1.png,,-1", "2.png,1.0,1", images=3)
    whole = [Csv().load(path, split) for split in Csv().splits(path)]
    rows = {name: row for part in whole for name, row in zip(part.ids, part.labels.tolist(), strict=True)}
    assert rows == {"0.png": [1, 0], "1.png": [-1, -1], "2.png": [1, 1]}
    assert whole[0].multilabel
    assert whole[0].classes == ("cat", "dog")
    assert {n: k for part in whole for n, k in zip(part.ids, part.known.tolist(), strict=True)}["1.png"] is False


def test_without_a_column_split_groups_stay_together(table):
    lines = [f"{i}.png,{i % 2},p{i // 4}" for i in range(80)]
    path = table("path,label,group", *lines, images=80)
    train, test = Csv().load(path, "train"), Csv().load(path, "test")
    assert train.groups is not None
    assert test.groups is not None
    assert not set(train.groups) & set(test.groups)
    assert len(train) + len(test) == 80
    assert len(test) % 4 == 0


@pytest.mark.parametrize(("count", "tested"), [(1, 0), (2, 1), (5, 1), (7, 1), (8, 2), (40, 8)])
def test_every_class_of_two_images_is_tested_on(count, tested):
    ids = np.array([f"a/{i}" for i in range(count)] + [f"b/{i}" for i in range(50)])
    labels = np.array([0] * count + [1] * 50)
    splits = split_by_hash(ids, labels)
    assert ((splits == "test") & (labels == 0)).sum() == tested
    assert ((splits == "test") & (labels == 1)).sum() == 10


@pytest.mark.parametrize("label", [0, 1])
def test_an_image_more_moves_at_most_one_other_and_that_of_its_class(label):
    ids, labels = np.array([f"{i % 3}/{i}" for i in range(60)]), np.arange(60) % 3
    before = dict(zip(ids.tolist(), split_by_hash(ids, labels).tolist(), strict=True))
    kinds = dict(zip(ids.tolist(), labels.tolist(), strict=True))
    for extra in range(40):
        more = np.append(ids, f"{label}/new{extra}")
        after = dict(zip(more.tolist(), split_by_hash(more, np.append(labels, label)).tolist(), strict=True))
        moved = [name for name in before if before[name] != after[name]]
        assert len(moved) <= 1
        assert all(kinds[name] == label for name in moved)


def test_a_split_by_hash_is_pinned():
    """Scores of data without splits may not drift between versions."""
    ids, labels = np.array([f"{i}.png" for i in range(20)]), np.arange(20) % 2
    splits = split_by_hash(ids, labels)
    assert [name for name, split in zip(ids.tolist(), splits.tolist(), strict=True) if split == "test"] == [
        "0.png",
        "6.png",
        "7.png",
        "19.png",
    ]
    shuffled = np.random.default_rng(0).permutation(20)
    assert (split_by_hash(ids[shuffled], labels[shuffled]) == splits[shuffled]).all()


def test_groups_and_several_labels_are_shared_out_too():
    groups, labels = np.array([f"p{i // 3}" for i in range(90)]), np.repeat([0, 1, 2], 30)
    labels[::3] = 2  # of each patient one image is of another class
    splits = split_by_hash(np.array([str(i) for i in range(90)]), labels, groups)
    tested = set(groups[splits == "test"])
    assert not tested & set(groups[splits == "train"])
    assert [sum(int(g[1:]) // 10 == kind for g in tested) for kind in range(3)] == [2, 2, 2]
    marks = np.zeros((100, 2), int)
    marks[:80, 0], marks[10:20, 1], marks[95:] = 1, 1, -1
    several = split_by_hash(np.array([str(i) for i in range(100)]), marks) == "test"
    assert marks[several, 1].tolist().count(1) == 2
    assert several[:80].sum() == 16


def test_where_every_class_is_a_single_image_one_is_tested_on():
    assert sorted(split_by_hash(np.array(["a", "b", "c"]), np.arange(3)).tolist()) == ["test", "train", "train"]
    assert split_by_hash(np.array(["a"]), np.zeros(1, int)).tolist() == ["train"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["what,label", "0.png,a"], ["what", "path,label[,split]", "?path=COLUMN"]),
        (["path", "0.png"], ["path", "label"]),
        (["path,label,label:cat", "0.png,a,1"], ["label:cat"]),
        (["path,label,label", "0.png,a,a"], ["once"]),
        (["path,label"], ["lists nothing"]),
        (["path,label", "0.png"], ["line 2 has 1 cells"]),
        (["path,label:cat", "0.png,maybe"], ["'maybe'", "row 2"]),
        (["path,label,split", "gone.png,a,train"], ["gone.png"]),
        (['path,label', '"0.png,a'], ["no table"]),
    ],
)  # fmt: skip
def test_a_csv_that_says_nothing_is_refused(table, lines, words):
    path = table(*lines, images=1)
    refused(lambda: Csv().load(path, "train"), *words)


def test_a_csv_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(b"path,label\n\xff\xfe,a\n")
    refused(lambda: Csv().splits(path), "list.csv", "UTF-8")


# --------------------------------------------------------------------------------------------------------- NPZ


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_an_npz_as_medmnist_has_it(tmp_path):
    grey, colour = noise(5, 28, 28), noise(3, 28, 28, 3)
    path = save(
        tmp_path / "x.npz", train_images=grey, train_labels=np.array([[0], [1], [1], [0], [-1]]),
        test_images=colour, test_labels=np.array([[2], [0], [1]], dtype=np.uint8),
    )  # fmt: skip
    train, test = Npz().load(path, "train"), Npz().load(path, "test")
    assert train.classes == test.classes == ("0", "1", "2")
    assert train.known.tolist() == [True] * 4 + [False]
    np.testing.assert_array_equal(train[3], np.repeat(grey[3][..., None], 3, axis=2))
    np.testing.assert_array_equal(test[2], colour[2])
    assert train.digest != test.digest


def test_an_npz_as_keras_has_it_and_one_that_is_not_divided(tmp_path):
    path = save(
        tmp_path / "x.npz", x_train=noise(4, 8, 8, 1), y_train=[0, 1, 0, 1], x_test=noise(2, 8, 8), y_test=[0, 1]
    )
    assert Npz().load(path, "test").ids == ["x_test/0", "x_test/1"]
    whole = save(tmp_path / "y.npz", images=noise(50, 4, 4), labels=np.arange(50) % 5, groups=np.arange(50) // 5)
    train, test = Npz().load(whole, "train"), Npz().load(whole, "test")
    assert len(train) + len(test) == 50
    assert train.groups is not None
    assert test.groups is not None
    assert not set(train.groups) & set(test.groups)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": noise(2, 4, 4)}, ["pictures"]),
        ({"train_images": noise(2, 4, 4)}, ["train_labels is missing"]),
        ({"train_images": np.zeros((2, 4, 4), np.float32), "train_labels": [0, 1]}, ["float32"]),
        ({"train_images": noise(2, 4, 4, 4), "train_labels": [0, 1]}, ["(2, 4, 4, 4)"]),
        ({"train_images": noise(2, 4, 4), "train_labels": [0, 1, 0]}, ["(3,)"]),
        ({"train_images": noise(2, 4, 4), "train_labels": [0.5, 1]}, ["float64"]),
        ({"train_images": noise(2, 4, 4), "train_labels": [[0, 2], [1, 0]]}, ["does not label"]),
        ({"train_images": noise(2, 4, 4), "train_labels": [0, 1], "train_groups": ["a"]}, ["train_groups"]),
    ],
)
def test_an_npz_that_is_no_data_set_is_refused(tmp_path, arrays, words):
    path = save(tmp_path / "x.npz", **arrays)
    refused(lambda: Npz().load(path, "train"), *words)


def test_pickled_and_truncated_arrays_are_refused(tmp_path):
    bad = save(tmp_path / "x.npz", train_images=noise(2, 4, 4), train_labels=np.array([{}, "a"], dtype=object))
    refused(lambda: Npz().load(bad, "train"), "x.npz")
    good = save(tmp_path / "y.npz", train_images=noise(20, 32, 32), train_labels=np.arange(20))
    good.write_bytes(good.read_bytes()[:9000])
    refused(lambda: Npz().load(good, "train"), "y.npz")
    (tmp_path / "z.npz").write_bytes(b"no archive")
    refused(lambda: Npz().splits(tmp_path / "z.npz"), "z.npz")
    refused(lambda: Npz().splits(tmp_path / "nowhere.npz"), "nowhere.npz is missing")


# ------------------------------------------------------------------------------------------- the known data sets


def cifar_python(folder: Path, names: tuple[str, ...], key: bytes, images: int = 4) -> np.ndarray:
    folder.mkdir(parents=True)
    pixels = noise(len(names) * images, 3072)
    for i, name in enumerate(names):
        part = pixels[i * images : (i + 1) * images]
        content = {b"data": part, key: [j % 10 for j in range(images)], b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return pixels


TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))


def test_cifar10_in_python_and_binary_files_is_the_same(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    pixels = cifar_python(folder, (*TRAIN, "test_batch"), b"labels")
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [f"class {i}".encode() for i in range(10)]}))
    assert Cifar10().locate(tmp_path) == folder
    train = Cifar10().load(folder, "train")
    assert len(train) == 20
    assert train.classes[3] == "class 3"
    assert train.labels.tolist() == [0, 1, 2, 3] * 5
    np.testing.assert_array_equal(train[7], pixels[7].reshape(3, 32, 32).transpose(1, 2, 0))
    binary = tmp_path / "b" / "cifar-10-batches-bin"
    binary.mkdir(parents=True)
    labels = np.tile(np.arange(4, dtype=np.uint8), 6)[:, None]
    rows = np.concatenate([labels, pixels], axis=1)
    for i, name in enumerate((*TRAIN, "test_batch")):
        rows[4 * i : 4 * i + 4].tofile(binary / f"{name}.bin")
    again = Cifar10().load(Cifar10().locate(tmp_path / "b"), "train")
    assert again.labels.tolist() == train.labels.tolist()
    np.testing.assert_array_equal(again[7], train[7])
    (binary / "data_batch_2.bin").write_bytes(b"123")
    refused(lambda: Cifar10().load(binary, "train"), "data_batch_2.bin")


def test_cifar100_has_its_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    cifar_python(folder, ("train", "test"), b"fine_labels")
    assert Cifar100().load(Cifar100().locate(tmp_path), "test").labels.tolist() == [0, 1, 2, 3]


def test_cifar_in_folders(tree):
    shutil.copytree(tree, tree.parent / "cifar10")
    path = Cifar10().locate(tree.parent)
    assert Cifar10().load(path, "train").classes == ("cat", "dog", "newt")
    assert Cifar10().splits(path) == ("train", "test")
    shutil.copytree(path / "test", path / "val")
    assert Cifar10().splits(path) == ("train", "val", "test")
    assert Cifar10().roles(path)["val"] == "val"
    assert len(Cifar10().load(path, "val")) == 6


def test_a_pickle_that_asks_for_more_than_arrays_is_refused_and_runs_nothing(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    cifar_python(folder, (*TRAIN, "test_batch"), b"labels")
    flag = tmp_path / "ran"

    class Bad:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(flag),)

    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Bad()}))
    refused(lambda: Cifar10().load(folder, "train"), "data_batch_1", "mkdir")
    assert not flag.exists()
    (folder / "data_batch_1").write_bytes(b"no pickle")
    refused(lambda: Cifar10().load(folder, "train"), "data_batch_1")


def test_stl10_is_stored_by_columns(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = noise(2, 96, 96, 3)
    pixels.transpose(0, 3, 2, 1).tofile(folder / "train_X.bin")
    np.array([1, 10], dtype=np.uint8).tofile(folder / "train_y.bin")
    noise(1, 3, 96, 96).tofile(folder / "unlabeled_X.bin")
    train = Stl10().load(Stl10().locate(tmp_path), "train")
    assert train.labels.tolist() == [0, 9]
    np.testing.assert_array_equal(train[1], pixels[1])
    assert not Stl10().load(folder, "unlabeled").known.any()
    (folder / "train_y.bin").write_bytes(b"\x01")
    refused(lambda: Stl10().load(folder, "train"), "1 labels for 2 images")


def test_tiny_imagenet_and_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for wnid in ("n01", "n02"):
        picture(root / "train" / wnid / "images" / f"{wnid}_0.JPEG")
    for i in range(2):
        picture(root / "val" / "images" / f"val_{i}.JPEG")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n")
    assert TinyImageNet().locate(tmp_path) == root
    assert TinyImageNet().load(root, "train").labels.tolist() == [0, 1]
    val = TinyImageNet().load(root, "val")
    assert val.labels.tolist() == [1, 0]
    assert val[0].shape == (8, 8, 3)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn09\t0\n")
    refused(lambda: TinyImageNet().load(root, "val"), "n09")
    (root / "val" / "val_annotations.txt").unlink()
    refused(lambda: TinyImageNet().load(root, "val"), "val_annotations.txt is missing")
    for split in ("train", "val"):
        picture(tmp_path / "imagenet" / split / "n01" / "0.JPEG")
    path = ImageNet().locate(tmp_path)
    assert ImageNet().roles(path) == {"train": "train", "val": "val"}
    assert ImageNet().load(path, "val").ids == ["n01/0.JPEG"]


def test_medmnist_is_the_one_file_below_its_folder(tmp_path):
    refused(lambda: MedMnist().locate(tmp_path), "medmnist/pneumoniamnist.npz")
    (tmp_path / "medmnist").mkdir()
    one = save(tmp_path / "medmnist" / "bloodmnist.npz", train_images=noise(2, 4, 4), train_labels=[0, 1])
    assert MedMnist().locate(tmp_path) == one
    shutil.copy(one, tmp_path / "medmnist" / "pathmnist.npz")
    refused(lambda: MedMnist().locate(tmp_path), "bloodmnist.npz, pathmnist.npz", "--data npz:")


def test_schemes_take_files_and_folders(shelf, tree, table):
    path = table("path,label,split", "0.png,a,train", images=1)
    assert parse(f"csv:{path}", shelf)[1] == path
    assert parse(f"folder:{tree}", shelf)[1] == tree
    refused(lambda: parse(f"csv:{tree}", shelf), "not a file")
    refused(lambda: parse(f"folder:{path}", shelf), "not a folder")
    with pytest.raises(UsageError, match="no demo world"):
        Npz().demo(tree)


@pytest.mark.parametrize("layout", [Folder(), Csv()])
def test_layouts_of_anybodys_data_have_a_demo_too(layout, tmp_path):
    path = layout.demo(tmp_path, seed=1, images=12)
    assert layout.locate(path) == path == layout.demo(tmp_path, seed=1, images=12)
    assert layout.verify(path, workers=1).ok
    train = layout.load(path, "train")
    assert len(train) == 12
    assert train.multilabel == isinstance(layout, Csv)
    assert {0, 1} <= set(train.labels.ravel().tolist())


@pytest.mark.parametrize("layout", [Cifar10(), Cifar100(), ImageNet(), MedMnist(), Stl10(), TinyImageNet()])
def test_a_demo_is_found_and_sound_and_the_same_by_seed(layout, tmp_path):
    path = layout.demo(tmp_path / "a", seed=1, images=24)
    assert layout.locate(tmp_path / "a") == path
    report = layout.verify(path, workers=1)
    assert report.ok, report.faults
    roles = layout.roles(path)
    sets = [layout.load(path, roles["train"]), layout.load(path, roles.get("test") or roles["val"])]
    assert [len(part) for part in sets] == [24, 12]
    assert sets[0].classes == sets[1].classes
    assert len(set(sets[0].labels.tolist())) > 3
    again = layout.demo(tmp_path / "b", seed=1, images=24)
    np.testing.assert_array_equal(layout.load(again, roles["train"])[5], sets[0][5])


# ----------------------------------------------------------------------------------------------------- verifying


def test_clean_data_are_clean(tree):
    report = Folder().verify(tree, workers=1)
    assert report.ok
    assert report.counts["train"] == {"images": 12, "unlabelled": 0, "classes": {"cat": 4, "dog": 4, "newt": 4}}


def test_planted_faults_are_found_by_name(table, tmp_path):
    path = table(
        "path,label,split,group", "0.png,a,train,p1", "1.png,b,train,p2", "2.png,,train,p3", "3.png,a,test,p2",
        "4.png,b,test,p4", images=5,
    )  # fmt: skip
    shutil.copy(tmp_path / "0.png", tmp_path / "3.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    report = Csv().verify(path, workers=1)
    assert any("same image" in f and "train/0.png, test/3.png" in f for f in report.faults)
    assert any("1.png" in f and "decoded" in f for f in report.faults)
    assert "group p2 is in several splits" in report.faults
    assert report.counts["train"]["unlabelled"] == 1
    assert len(report.faults) == 3


def test_links_to_nothing_are_told_when_they_are_read(tree):
    link = tree / "train" / "cat" / "5.png"
    link.symlink_to(tree / "nowhere.png")
    train = Folder().load(tree, "train")
    row = train.ids.index("cat/5.png")
    refused(lambda: train[row], "cat/5.png is missing")
    assert list(look(len(train), lambda i: {int(train[i][0, 0, 0])}, Progress(quiet=True)).unreadable) == [row]
    before = train.fingerprint
    picture(tree / "nowhere.png")
    assert Folder().load(tree, "train").fingerprint != before
    link.unlink()
    link.symlink_to(link)  # to itself
    assert len(Folder().verify(tree, workers=1).faults) == 1


def test_a_csv_cannot_name_files_elsewhere(table, tmp_path):
    for stray in ("../../etc/passwd", "a/../../b.png", "/etc/passwd", "C:\\boot.ini"):
        path = table("path,label,split", "0.png,a,train", f"{stray},b,train", images=1)
        refused(lambda path=path: Csv().load(path, "train"), repr(stray), "lead out")


def test_a_csv_may_lack_some_of_its_images_but_not_all(table):
    path = table("path,label,split", "0.png,a,train", "gone.png,b,train", "gone.png,b,test", images=1)
    part = Csv().load(path, "train")
    refused(lambda: part[1], "gone.png is missing")
    refused(lambda: Csv().load(path, "test"), "gone.png is missing")
    told = Csv().verify(path, workers=1).faults
    assert len(told) == 2  # the split that cannot be loaded, and the image of the other
    assert all("gone.png is missing" in fault for fault in told)


def test_images_of_all_modes_are_rgb(tree):
    for i, mode in enumerate(("L", "RGBA", "P", "CMYK", "1", "I;16")):
        suffix = "jpg" if mode == "CMYK" else "png"
        image = Image.new("L", (6, 5), 130).convert("L") if mode != "I;16" else Image.new("I;16", (6, 5), 130 * 256)
        (image if mode in ("L", "I;16") else image.convert(mode)).save(tree / "train" / "cat" / f"m{i}.{suffix}")
    train = Folder().load(tree, "train")
    for row, name in enumerate(train.ids):
        if name.startswith("cat/m"):
            assert train[row].shape == (5, 6, 3)


def test_real_pneumoniamnist_has_the_official_counts(realdata):
    (path,) = (realdata / "med_pneumoniamnist").glob("*.npz")
    sets = {split: Npz().load(path, split) for split in Npz().splits(path)}
    assert {name: len(part) for name, part in sets.items()} == {"train": 4708, "val": 524, "test": 624}
    assert np.bincount(sets["train"].labels).tolist() == [1214, 3494]
    assert sets["test"][0].shape == (28, 28, 3)


def test_images_are_read_when_they_are_asked_for(tree):
    (tree / "train" / "cat" / "0.png").write_bytes(b"broken")
    train = Folder().load(tree, "train")
    refused(lambda: train[0], "cat/0.png")
    assert train[1].shape == (8, 8, 3)


def test_many_rows_are_read_together_where_the_pixels_can(tmp_path):
    class Decoder(Arrays):
        asked: list[list[int]]

        def __getitems__(self, places):
            self.asked = [*getattr(self, "asked", []), list(places)]
            return [self[place] for place in places]

    images = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    names = np.array([f"im{i}" for i in range(5)])
    for kind in (Arrays, Decoder):
        data = ClassificationSet(
            "n", "s", ("a",), names, np.zeros(5, np.int64), kind(5, lambda: images, "c"), np.arange(5)
        )
        few = data.take(np.array([4, 0, 2]))
        np.testing.assert_array_equal(np.stack(few.__getitems__([2, 0])), images[[2, 4]])
    assert few.pixels.asked == [[2, 4]]
