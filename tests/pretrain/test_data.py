"""Reading images from the layouts people have: what comes out, and what is refused."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evalsuite import DataError, ResourceError, UsageError, data
from pretrain import Arrays, Files, Joined, Rows, read_npz
from pretrain.data import Images, demo, parse


def pixels(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def image(data: Images, row: int) -> np.ndarray:
    return data[row]["image"].permute(1, 2, 0).numpy()


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def planes(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 3, 1, 2).reshape(len(array), -1)


# Folders


def tree(root: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    for split in splits:
        for place, name in enumerate(("cat", "dog", "emu")):
            for i in range(3):
                write(root / split / name / f"{i}.png", pixels(1, 6, 10 * place + i)[0])
    return root


def test_a_folder_a_class(tmp_path):
    found = parse(f"folder:{tree(tmp_path)}")
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(image(found.train, 4), pixels(1, 6, 11)[0])
    bank, queries = found.probe
    assert bank is found.train
    assert queries.labels.tolist() == found.train.labels.tolist()


def test_classes_of_a_test_split_are_those_of_the_training_split(tmp_path):
    tree(tmp_path, ("train",))
    write(tmp_path / "val" / "emu" / "0.png", pixels(1)[0])
    assert parse(f"imagenet:{tmp_path}").probe[1].labels.tolist() == [2]


def test_labelled_images_without_a_test_split_ask_themselves(tmp_path):
    found = parse(f"folder:{tree(tmp_path) / 'train'}")
    bank, queries = found.probe
    assert (len(found.train), len(bank), len(queries)) == (9, 7, 2)
    assert np.array_equal(image(queries, 1), image(found.train, 5))


@pytest.mark.parametrize(
    "splits", [("Training", "Testing"), ("train_set", "valid"), ("seg_train/seg_train", "seg_test")]
)
def test_splits_by_other_names_are_learned_from_and_asked(tmp_path, splits):
    found = parse(f"folder:{tree(tmp_path, splits)}")
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    bank, queries = found.probe
    assert bank is found.train
    assert queries.labels.tolist() == found.train.labels.tolist()


def test_images_in_no_folder_have_no_label(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.JPEG", pixels(1)[0])
    found = parse(f"folder:{tmp_path}")
    assert found.train.labels.tolist() == [-1, -1, -1]
    assert found.probe is None


def test_rows_are_in_the_order_of_their_whole_names_and_loose_images_have_no_label(tmp_path):
    names = ["a/1.png", "a/10.png", "a/2.png", "a-b/1.png", "a0/1.png", "a.png"]
    for i, name in enumerate(names):
        write(tmp_path / name, pixels(1, 6, i)[0])
    found = parse(f"folder:{tmp_path}").train
    order = sorted(range(6), key=lambda i: names[i])
    assert order != list(range(6))
    for row, i in enumerate(order):
        assert np.array_equal(image(found, row), pixels(1, 6, i)[0])
    assert found.labels.tolist() == [1, -1, 0, 0, 0, 2]


def test_hidden_files_are_not_images_and_links_are_followed_once(tmp_path):
    tree(tmp_path / "real", ("cat",))
    write(tmp_path / "real" / ".trash" / "x.png", pixels(1)[0])
    write(tmp_path / "real" / "._x.png", pixels(1)[0])
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real")
    assert len(parse(f"folder:{tmp_path / 'linked'}").train) == 9


def test_the_fingerprint_is_of_names_contents_and_labels(tmp_path):
    first = parse(f"folder:{tree(tmp_path / 'a')}").train.fingerprint
    assert parse(f"folder:{tree(tmp_path / 'b')}").train.fingerprint == first
    write(tmp_path / "b" / "train" / "cat" / "9.png", pixels(1)[0])
    assert parse(f"folder:{tmp_path / 'b'}").train.fingerprint != first


FINGERPRINTS = {
    "folder:{}/folder": "41e24cda8b1738daf2016f5debf56ee7c816200c178c8efce3c1980aa6e133d1",
    "imagenet:{}/folder": "41e24cda8b1738daf2016f5debf56ee7c816200c178c8efce3c1980aa6e133d1",
    "npz:{}/rgb.npz": "e858f6483d4bc6c2dafd2293a100f559c20e46230426308bbe39b95195138b97",
    "npz:{}/grey.npz": "99bf2b1c6397fa443a6f357aea38baeaa42c697a67346639880392b13e929c9d",
    "stl10:{}/stl": "761695a4a9b036b1ff47a9d195f0b311de00129808a4a4d866fe33a07b7d1044",
    "worlds:object-goal/ocr-color1:20": "35fee68e8855fc2174cab1192638077b5eed936ed37e81cf5517ec135d63acba",
}


def test_fingerprints_are_pinned_for_runs_that_were_begun_resume_by_them(tmp_path):
    counted = np.arange(2 * 27648, dtype=np.uint64).astype(np.uint8)
    shown = counted[: 4 * 8 * 8 * 3].reshape(4, 8, 8, 3)
    for row, name in enumerate(("a/2", "b/1", "a/10", "c")):
        file = tmp_path / "folder" / f"{name}.ppm"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"P6 8 8 255\n" + shown[row].tobytes())
    np.savez(tmp_path / "rgb.npz", image=shown, label=np.arange(4))
    np.savez(tmp_path / "grey.npz", images=shown[..., 0])
    (tmp_path / "stl").mkdir()
    for split in ("train", "test"):
        counted.tofile(tmp_path / "stl" / f"{split}_X.bin")
        np.array([1, 2], np.uint8).tofile(tmp_path / "stl" / f"{split}_y.bin")
    counted[:27648].tofile(tmp_path / "stl" / "unlabeled_X.bin")
    assert {text: parse(text.format(tmp_path)).train.fingerprint for text in FINGERPRINTS} == FINGERPRINTS


def test_an_empty_folder_and_one_without_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no image") as empty:
        parse(f"folder:{tmp_path}")
    assert empty.value.cause == "it is empty"
    (tmp_path / "cat.npy").write_bytes(b"x")
    (tmp_path / "dog.npy").write_bytes(b"x")
    with pytest.raises(DataError) as other:
        parse(f"folder:{tmp_path}")
    assert other.value.cause.startswith("2 files are no images: 2 .npy")
    assert "npz:PATH" in other.value.fix


def test_a_file_of_a_list_that_is_not_there_is_refused(tmp_path):
    write(tmp_path / "0.png", pixels(1)[0])
    assert len(Files(tmp_path, ["0.png", "0.png"], [1, 2])) == 2
    with pytest.raises(DataError, match=r"1\.png is missing"):
        Files(tmp_path, ["0.png", "1.png"])


def test_an_unreadable_image_is_named(tmp_path):
    tree(tmp_path)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png"):
        parse(f"folder:{tmp_path}").train[1]


@pytest.mark.parametrize(
    "text", ["cifar", "folder", "folder:", "demo:", "demo:many", "demo:1", "worlds", "worlds:", "worlds:x:many"]
)
def test_what_names_no_data_is_refused(text):
    with pytest.raises(UsageError, match="does not name"):
        parse(text)


def test_an_unknown_layout_is_refused_as_by_run(registry):
    with pytest.raises(UsageError, match="no dataset named 'magic'") as learnt:
        parse("magic:x")
    with pytest.raises(UsageError) as judged:
        data.parse("magic:x", registry)
    assert str(learnt.value) == str(judged.value)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="was not found"):
        parse(f"folder:{tmp_path / 'nowhere'}")


def test_tiny_imagenet(tmp_path):
    for name in ("n01", "n02"):
        for i in range(2):
            write(tmp_path / "train" / name / "images" / f"{name}_{i}.JPEG", pixels(1, 8)[0])
    for i in range(3):
        write(tmp_path / "val" / "images" / f"val_{i}.JPEG", pixels(1, 8)[0])
    notes = "val_0.JPEG\tn02\t0\t0\t1\t1\nval_2.JPEG\tn01\t0\t0\t1\t1\nval_1.JPEG\tn02\t0\t0\t1\t1\n"
    (tmp_path / "val" / "val_annotations.txt").write_text(notes)
    found = parse(f"tinyimagenet:{tmp_path}")
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.probe[1].labels.tolist() == [1, 1, 0]
    (tmp_path / "val" / "val_annotations.txt").unlink()
    with pytest.raises(DataError, match=r"val_annotations\.txt is missing"):
        parse(f"tinyimagenet:{tmp_path}")


# CIFAR


def cifar10(root: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    everything, labels = pixels(12), np.arange(12) % 10
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        part, marks = planes(everything[2 * i : 2 * i + 2]), labels[2 * i : 2 * i + 2]
        if kind == "py":
            content = {b"data": part, b"labels": marks.tolist(), b"batch_label": b"x"}
            (root / name).write_bytes(pickle.dumps(content, protocol=2))
        else:
            np.concatenate([marks[:, None].astype(np.uint8), part], 1).tofile(root / f"{name}.bin")
    return everything, labels


@pytest.mark.parametrize("kind", ["py", "bin"])
def test_cifar10_in_the_official_files(tmp_path, kind):
    home = tmp_path / f"cifar-10-batches-{kind}"
    home.mkdir()
    everything, labels = cifar10(home, kind)
    for path in (tmp_path, home):
        found = parse(f"cifar10:{path}")
        assert np.array_equal(np.stack([image(found.train, i) for i in range(10)]), everything[:10])
        assert found.train.labels.tolist() == labels[:10].tolist()
        assert np.array_equal(image(found.probe[1], 1), everything[11])
        assert found.probe[1].labels.tolist() == labels[10:].tolist()


@pytest.mark.parametrize("kind", ["py", "bin"])
def test_cifar100_takes_the_fine_labels(tmp_path, kind):
    shown = pixels(3)
    for name in ("train", "test"):
        if kind == "py":
            content = {b"data": planes(shown), b"fine_labels": [7, 99, 3], b"coarse_labels": [1, 1, 1]}
            (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
        else:
            marks = np.array([[1, 7], [1, 99], [1, 3]], dtype=np.uint8)
            np.concatenate([marks, planes(shown)], 1).tofile(tmp_path / f"{name}.bin")
    found = parse(f"cifar100:{tmp_path}")
    assert found.train.labels.tolist() == [7, 99, 3]
    assert np.array_equal(image(found.train, 2), shown[2])


def test_cifar_in_folders(tmp_path):
    assert len(parse(f"cifar10:{tree(tmp_path)}").train) == 9


def test_a_folder_without_cifar_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not in the layout cifar10") as refusal:
        parse(f"cifar10:{tmp_path}")
    assert "data_batch_1" in refusal.value.fix


class Evil:
    def __reduce__(self):
        return os.system, ("echo harm",)


def test_a_pickle_that_wants_more_than_arrays_is_refused(tmp_path):
    cifar10(tmp_path, "py")
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(DataError, match="data_batch_3 cannot be read") as refusal:
        parse(f"cifar10:{tmp_path}")
    assert "system" in refusal.value.cause


def test_a_truncated_binary_file_and_a_missing_one_are_refused(tmp_path):
    cifar10(tmp_path, "bin")
    path = tmp_path / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"data_batch_2\.bin cannot be read"):
        parse(f"cifar10:{tmp_path}")
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_2\.bin is missing"):
        parse(f"cifar10:{tmp_path}")


# Other arrays


def stl10(root: Path, *, unlabelled: bool) -> np.ndarray:
    shown = pixels(3, 96)
    for name, count in (("train", 3), ("test", 2), ("unlabeled", 2))[: 3 if unlabelled else 2]:
        shown[:count].transpose(0, 3, 2, 1).tofile(root / f"{name}_X.bin")
        if name != "unlabeled":
            np.array([1, 10, 5], dtype=np.uint8)[:count].tofile(root / f"{name}_y.bin")
    return shown


def test_stl10_stores_columns_and_joins_the_unlabelled_images(tmp_path):
    (tmp_path / "stl10_binary").mkdir()
    shown = stl10(tmp_path / "stl10_binary", unlabelled=True)
    found = parse(f"stl10:{tmp_path}")
    assert found.train.labels.tolist() == [0, 9, 4, -1, -1]
    assert np.array_equal(image(found.train, 1), shown[1])
    assert np.array_equal(image(found.train, 4), shown[1])
    assert [len(part) for part in found.probe] == [3, 2]


def test_stl10_without_the_unlabelled_images_or_broken(tmp_path):
    stl10(tmp_path, unlabelled=False)
    assert len(parse(f"stl10:{tmp_path}").train) == 3
    (tmp_path / "train_X.bin").write_bytes(b"123")
    with pytest.raises(DataError, match=r"train_X\.bin cannot be read"):
        parse(f"stl10:{tmp_path}")
    (tmp_path / "train_X.bin").unlink()
    with pytest.raises(DataError, match="is not in the layout stl10"):
        parse(f"stl10:{tmp_path}")


def test_npz_of_generated_images(tmp_path):
    np.savez(tmp_path / "g.npz", image=pixels(4, 8), label=np.full(4, -1))
    found = read_npz(tmp_path / "g.npz")
    assert np.array_equal(image(found, 3), pixels(4, 8)[3])
    assert parse(f"npz:{tmp_path / 'g.npz'}").probe is None


def test_npz_in_the_layout_of_medmnist(tmp_path):
    grey = pixels(5, 8)[..., 0]
    np.savez(
        tmp_path / "m.npz", train_images=grey, train_labels=np.arange(5)[:, None], test_images=grey[:2],
        test_labels=np.arange(2)[:, None], val_images=grey,
    )  # fmt: skip
    found = parse(f"npz:{tmp_path / 'm.npz'}")
    assert found.train.labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(image(found.train, 2), np.repeat(grey[2][..., None], 3, 2))
    assert len(found.probe[1]) == 2


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"image": np.zeros((2, 4, 4, 3))}, "(2, 4, 4, 3) float64"),
        ({"image": np.zeros((2, 3, 4, 4), np.uint8)}, "(2, 3, 4, 4) uint8"),
        ({"image": np.zeros((2, 4, 4, 3), np.uint8), "label": np.zeros(3)}, "(3,) float64 for 2 images"),
        ({"picture": np.zeros((2, 4, 4, 3), np.uint8)}, "its arrays are picture"),
        ({"image": np.array([{}, {}], dtype=object)}, "(2,) object"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, arrays, why):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError) as refusal:
        read_npz(tmp_path / "x.npz")
    assert why in refusal.value.cause


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK but not really")
    with pytest.raises(DataError, match=r"x\.npz cannot be read"):
        read_npz(tmp_path / "x.npz")


# Sets of sets


def test_joined_sets_keep_their_order_and_copies_are_rows_of_their_own():
    one, other = Arrays(pixels(3, 4, 1), [0, 1, 2]), Arrays(pixels(2, 4, 2))
    joined = Joined([one, other, one])
    assert len(joined) == 8
    assert joined.labels.tolist() == [0, 1, 2, -1, -1, 0, 1, 2]
    sources = [one[0], one[1], one[2], other[0], other[1], one[0], one[1], one[2]]
    assert all(torch.equal(joined[i]["image"], s["image"]) for i, s in enumerate(sources))
    assert not joined.labelled
    assert joined.fingerprint != Joined([other, one, one]).fingerprint


def test_rows_of_a_set():
    data = Arrays(pixels(4, 4), [3, 2, 1, 0])
    some = Rows(data, [3, 1])
    assert some.labels.tolist() == [0, 2]
    assert torch.equal(some[0]["image"], data[3]["image"])
    assert some.fingerprint != Rows(data, [1, 3]).fingerprint


def test_arrays_are_known_by_their_pixels():
    assert Arrays(pixels(2, 4)).fingerprint == Arrays(pixels(2, 4)).fingerprint
    assert Arrays(pixels(2, 4)).fingerprint != Arrays(pixels(2, 4, 1)).fingerprint


def test_the_demo_world_is_the_same_for_a_seed_and_balanced():
    found = parse("demo:16")
    assert found.train.fingerprint == demo(16).train.fingerprint != demo(16, seed=1).train.fingerprint
    assert np.bincount(found.train.labels).tolist() == [2] * 8
    assert [len(part) for part in found.probe] == [16, 8]


def test_real_cifar_as_folders(realdata):
    found = parse(f"folder:{realdata / 'cls_cifar10_jpeg'}")
    assert (len(found.train), len(found.probe[1])) == (2000, 1000)
    assert found.train[0]["image"].shape == (3, 32, 32)
    assert np.bincount(found.train.labels).tolist() == [200] * 10


def test_frames_of_a_world_are_the_same_each_time_and_others_in_the_held_out_part():
    found = parse("worlds:random-objects:64")
    held_out = found.probe[1]
    assert (len(found.train), len(held_out)) == (64, 320)
    assert not found.train.labelled
    first, again, other = found.train[3], parse("worlds:random-objects:64").train[3], held_out[3]
    assert all(torch.equal(first[name], again[name]) for name in ("image", "segments", "state"))
    assert not torch.equal(first["image"], other["image"])
    assert found.train.fingerprint == parse("worlds:random-objects:64").train.fingerprint
    assert len({found.train.fingerprint, held_out.fingerprint, parse("worlds:object-goal:64").train.fingerprint}) == 3


def test_a_frame_tells_what_is_seen_where():
    sample = parse("worlds:random-objects:8").train[0]
    assert sample["image"].shape == (3, 64, 64)
    assert sample["state"].shape == (6, 5)
    ground = sample["segments"] == -1
    assert sample["image"][:, ground].float().mean() < 5  # the soft edges of what stands there
    assert set(sample["segments"].unique().tolist()) <= set(range(-1, 5))
    assert sample["image"][:, sample["segments"] == 4].any()


def test_a_variant_of_a_world_is_named_after_a_slash():
    seen = parse("worlds:object-goal/ocr-color3:40").train
    assert {int(row[0]) for i in range(40) for row in seen[i]["state"][:4]} <= {0, 4, 5, 6}
    with pytest.raises(UsageError, match="has no variant"):
        parse("worlds:object-goal/nowhere")
    with pytest.raises(UsageError, match="there is no world 'atlantis'"):
        parse("worlds:atlantis")


def test_a_world_in_three_dimensions_is_data_too():
    try:
        sample = parse("worlds:object-reaching/pretraining:8").train[0]
    except ResourceError as error:  # no OpenGL here
        pytest.skip(f"{error.problem}: {error.cause}")
    assert sample["image"].shape == (3, 64, 64)
    assert sample["state"].shape == (5, 17)
    assert {0, 1, 2, 3} & set(sample["segments"].unique().tolist())


def test_worlds_without_their_extra_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "evalsuite.worlds", None)
    with pytest.raises(ResourceError, match="which is not installed"):
        parse("worlds:random-objects")
