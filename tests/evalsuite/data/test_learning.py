"""What layouts offer to learn from: images of every kind of data, in an order and with fingerprints of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evalsuite.data
from evalsuite import hooks, runner
from evalsuite.data import Source, parse, source
from evalsuite.data.chexpert import Chexpert
from evalsuite.data.cifar import Stl10
from evalsuite.data.classification import ClassificationSource, Csv, Folder, Npz
from evalsuite.data.coco import Coco
from evalsuite.data.covidx import Covidx
from evalsuite.data.frames import Worlds
from evalsuite.data.generated import Demo
from evalsuite.data.learning import FileRows, Learning, PixelRows
from evalsuite.data.places import Places205
from evalsuite.data.voc import Voc
from evalsuite.errors import DataError, Refusal, UsageError
from evalsuite.hooks import Registry
from evalsuite.testing import check_dataset
from pretrain.data import Corpus


@pytest.fixture(scope="module")
def shelf() -> Registry:
    registry = Registry()
    evalsuite.data.evalsuite_register(registry)
    return registry


def learnt(text: str, shelf: Registry) -> Learning:
    layout, path = parse(text, shelf, learning=True)
    return layout.learning(path)


NAMES = [entry.name for entry in hooks.load(environ={"EVALSUITE_PLUGINS": ""}).registry.entries("dataset")]
WITHOUT = (
    "ade20k-full",
    "chexpert-retrieval",
    "demo",
    "npz",
    "pairs",
    "worlds",
)  # lists for judging alone, or no demo world


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(WITHOUT)))
def test_every_layout_is_learnt_from(name: str, shelf: Registry, tmp_path: Path) -> None:
    layout = source(shelf, name)
    labelled = isinstance(layout, ClassificationSource) and name != "voc07-cls"
    path = layout.demo(tmp_path, images=24 if labelled else 4)  # scenes take long to draw; 24 have all classes
    found = learnt(f"{name}:{path}", shelf)
    assert len(found.train) >= 4
    assert len(set(found.train.ids)) == len(found.train)
    image = found.train[len(found.train) - 1]
    assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
    assert found.train.sample(0).keys() == {"image"}
    assert len(Corpus.of(found).train) == len(found.train)
    home = path if path.is_dir() else path.parent
    copy = Path(shutil.copytree(home, tmp_path / "elsewhere" / home.name))
    again = learnt(f"{name}:{copy / path.relative_to(home)}", shelf)
    assert again.train.fingerprint == found.train.fingerprint


def test_classes_are_labels_and_several_labels_are_none(tmp_path: Path) -> None:
    places = Places205().learning(Places205().demo(tmp_path, images=24))
    assert places.train.labelled
    assert places.held_out is not None
    assert places.held_out.labelled
    marks = Chexpert().learning(Chexpert().demo(tmp_path, images=24))
    assert set(marks.train.labels.tolist()) == {-1}
    assert marks.held_out is not None


@pytest.mark.parametrize("layout", [Coco(official=False), Voc(official=False)])
def test_images_of_boxes_have_no_labels_and_the_other_split_is_held_out(layout: Source[Any], tmp_path: Path) -> None:
    path = layout.demo(tmp_path, images=4)
    found = layout.learning(path)
    roles = layout.roles(path)
    assert isinstance(found.train, FileRows)
    assert len(found.train) == len(layout.load(path, roles["train"]))
    assert not found.train.labelled
    assert found.held_out is not None
    assert len(found.held_out) == len(layout.load(path, roles["val"]))


def test_rows_are_in_the_order_of_their_names_and_a_list_keeps_its_labels(
    tmp_path: Path, noise: Callable[..., None]
) -> None:
    for seed, name in enumerate("cab"):
        noise(tmp_path / f"{name}.png", seed=seed)
    (tmp_path / "list.csv").write_text("path,label,split\nc.png,x,train\na.png,y,train\nb.png,x,train\n")
    found = Csv().learning(tmp_path / "list.csv")
    assert found.train.ids == ["a.png", "b.png", "c.png"]
    assert found.train.labels.tolist() == [1, 0, 0]
    assert found.held_out is None  # the only split is enough to learn from
    bank, queries = Corpus.of(found).probe or (None, None)
    assert bank is not None
    assert queries is not None
    assert (len(bank), len(queries)) == (2, 1)


def test_a_list_need_not_have_labels_to_be_learnt_from(tmp_path: Path, noise: Callable[..., None]) -> None:
    for seed in range(5):
        noise(tmp_path / f"{seed}.png", seed=seed)
    (tmp_path / "a.csv").write_text("path\n" + "".join(f"{i}.png\n" for i in range(5)))
    (tmp_path / "b.csv").write_text(
        "path,split\n" + "".join(f"{i}.png,{'test' if i > 2 else 'train'}\n" for i in range(5))
    )
    whole, divided = (Csv().learning(tmp_path / f"{name}.csv") for name in "ab")
    assert whole.train.labels.tolist() == [-1] * 5
    assert whole.held_out is None
    assert divided.train.ids == ["0.png", "1.png", "2.png"]
    assert divided.held_out is not None
    assert len(divided.held_out) == 2
    for name in "ab":
        with pytest.raises(DataError, match="label"):
            Csv().pair(tmp_path / f"{name}.csv")


def test_the_only_split_there_is_can_be_learnt_from(
    coco_document: dict[str, Any], coco_tree: Callable[..., Path], shelf: Registry
) -> None:
    found = learnt(f"coco:{coco_tree(val2017=coco_document)}", shelf)
    assert found.train.ids == ["a.jpg", "b.jpg"]
    assert found.held_out is None


def test_of_several_splits_to_learn_from_none_is_guessed(tmp_path: Path) -> None:
    path = Covidx().demo(tmp_path, images=24)
    for split in ("train", "test"):
        shutil.copy(path / f"{split}_COVIDx9A.txt", path / f"{split}_COVIDx7A.txt")
    with pytest.raises(DataError, match="which split of") as refusal:
        Covidx().learning(path)
    assert "several are named train: train 7A" in refusal.value.cause


def test_unlabelled_images_come_besides(tmp_path: Path) -> None:
    path = Stl10().demo(tmp_path, images=24)
    assert Stl10().learning(path).unlabelled is None
    np.random.default_rng(0).integers(0, 256, 2 * 27648, dtype=np.uint8).tofile(path / "unlabeled_X.bin")
    found = Stl10().learning(path)
    assert found.unlabelled is not None
    assert (len(found.train), len(found.unlabelled)) == (24, 2)
    corpus = Corpus.of(found)
    assert corpus.train.labels[-3:].tolist() == [found.train.labels[-1], -1, -1]
    assert Stl10().verify(path).ok


def test_pictures_without_classes_are_learnt_from_and_not_judged_by(
    tmp_path: Path, noise: Callable[..., None], shelf: Registry
) -> None:
    for seed in range(3):
        noise(tmp_path / f"{seed}.png", seed=seed)
    assert learnt(f"folder:{tmp_path}", shelf).train.labels.tolist() == [-1, -1, -1]
    assert len(learnt(f"imagenet:{tmp_path}", shelf).train) == 3
    for name in ("folder", "imagenet"):
        with pytest.raises(DataError):
            parse(f"{name}:{tmp_path}", shelf)
    with pytest.raises(DataError, match="is not in the layout places"):  # whose layout says what its images are
        learnt(f"places:{tmp_path}", shelf)


class Numbers(Source[list[float]]):
    """A plugin's layout of something that is no image."""

    name = "numbers"
    tree = "numbers.txt"

    def locate(self, root: Path | None) -> Path:
        return root or Path()

    def splits(self, path: Path) -> tuple[str, ...]:
        return ("train", "val")

    def roles(self, path: Path) -> Mapping[str, str]:
        return {"train": "train", "val": "val"}

    def load(self, path: Path, split: str) -> list[float]:
        return [1.0]

    verify = demo = None  # type: ignore[assignment]


class Other(Folder):
    """A plugin's layout in folders, of which it reads some images alone."""

    name = "other"

    def load(self, path: Path, split: str) -> Any:
        return super().load(path, split).take(np.arange(2))


def test_a_plugins_layout_is_learnt_from_by_what_it_reads(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the layout numbers has no images to learn from") as refusal:
        Numbers().learning(tmp_path)
    assert "a list, which has no method rows" in refusal.value.cause
    path = Folder().demo(tmp_path, images=24)
    assert len(Folder().learning(path).train) == 24
    assert len(Other().learning(path).train) == 2


def pixels(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


LABELS = np.arange(20) % 2


@pytest.mark.parametrize(
    ("names", "tested"),
    [
        (("image", "label"), 4),
        (("images", "labels"), 4),
        (("data", "label"), 4),
        (("arr_0", "labels"), 4),
        (("x_train", "y_train", "x_test", "y_test"), 20),
        (("train_images", "train_labels", "val_images", "val_labels"), 20),
        (("image", "label", "test_images", "test_labels"), 20),
        (("x_train", "labels", "test_images", "test_labels"), 20),
    ],
)
def test_an_npz_that_trains_is_evaluated(names: tuple[str, ...], tested: int, tmp_path: Path) -> None:
    arrays = {name: pixels(20 + place) if place % 2 == 0 else LABELS for place, name in enumerate(names)}
    arrays = {name: array[-20:] for name, array in arrays.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    train, test = Npz().pair(tmp_path / "a.npz")
    assert len(test) == tested
    assert Npz().verify(tmp_path / "a.npz").counts.keys() >= {"train"}
    found = Npz().learning(tmp_path / "a.npz")
    assert isinstance(found.train, PixelRows)
    assert len(found.train) == 20  # all of them, where none are set apart
    assert found.train.labels.tolist() == LABELS.tolist()
    assert (found.held_out is None) == (tested == 4)
    assert np.array_equal(found.train[int(train.names[1].split("/")[1])], train[1])


def test_arrays_without_labels_and_with_fractions_are_learnt_from(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=pixels(4))
    np.savez(tmp_path / "b.npz", image=pixels(4), labels=np.arange(4) / 3)
    for name in ("a", "b"):
        assert Npz().learning(tmp_path / f"{name}.npz").train.labels.tolist() == [-1] * 4
        with pytest.raises(DataError):
            Npz().pair(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "c.npz", test_images=pixels(4))
    with pytest.raises(DataError, match="has no split 'train'"):
        Npz().learning(tmp_path / "c.npz")


def test_an_old_name_is_another_for_the_same(shelf: Registry, tmp_path: Path) -> None:
    path = source(shelf, "tiny-imagenet").demo(tmp_path, images=24)
    assert (
        learnt(f"tinyimagenet:{path}", shelf).train.fingerprint
        == learnt(f"tiny-imagenet:{path}", shelf).train.fingerprint
    )
    other = Registry()
    other.dataset("tinyimagenet", "evalsuite.data.classification:Folder")
    assert isinstance(source(other, "tinyimagenet"), Folder)  # a plugin's own name comes first


@pytest.mark.parametrize(
    "text", ["", "voc", "voc:", "cocoo:x", "voc:{0}/nowhere", "voc:{0}", "csv:{0}", "npz:{0}", "demo:x"]
)
def test_what_cannot_be_read_is_refused_in_the_same_words(text: str, shelf: Registry, tmp_path: Path) -> None:
    said = []
    for learning in (False, True):
        with pytest.raises(Refusal) as refusal:
            parse(text.format(tmp_path), shelf, learning=learning)
        said.append(str(refusal.value))
    assert said[0] == said[1]
    assert len(said[0].splitlines()) == 3


# --- what is generated ------------------------------------------------------------------------------------------


def test_generated_sources_need_no_path(shelf: Registry) -> None:
    assert parse("demo", shelf) == (Demo(), Path("demo"))
    assert parse("demo:64", shelf)[0] == Demo(64)
    assert parse("worlds:object-goal/ocr-color1:9", shelf)[0] == Worlds("object-goal", "ocr-color1", 9)
    with pytest.raises(UsageError) as refusal:
        parse("voc", shelf)
    assert "demo:N" in refusal.value.fix
    assert "worlds:TASK" in refusal.value.fix
    assert "voc:PATH" in refusal.value.fix


def test_generated_images_are_sound_and_the_same_to_learn_from(shelf: Registry) -> None:
    layout, path = parse("demo:16", shelf)
    report = layout.verify(path)
    assert report.ok, report.faults
    assert {split: counts["images"] for split, counts in report.counts.items()} == {"train": 16, "test": 8}
    found = layout.learning(path)
    train, test = layout.pair(path)
    assert np.array_equal(found.train[3], train[3])
    assert found.held_out is not None
    assert np.array_equal(found.held_out[3], test[3])
    other, _ = parse("demo:17", shelf)[0].pair(path)
    assert len({train.fingerprint, test.fingerprint, other.fingerprint}) == 3
    worlds, path = parse("worlds:random-objects:4", shelf)
    report = worlds.verify(path)
    assert report.ok
    assert report.counts["train"] == {"images": 4}
    for kind in (Demo, Worlds):
        check_dataset(kind)


def test_generated_images_are_judged_by_and_worlds_are_refused(registry: Registry, tmp_path: Path) -> None:
    flags = {"protocol": "knn", "registry": registry, "out": tmp_path, "device": "cpu"}
    (result,) = runner.run("random:timm:test_resnet", "classify", data="demo:16", **flags)
    assert result.status == "ok"
    assert not result.ranked
    for task in ("classify", "detect", "segment"):
        with pytest.raises(UsageError, match="--data worlds:random-objects:4") as refusal:
            runner.run("random:timm:test_resnet", task, data="worlds:random-objects:4", **{**flags, "protocol": None})
        assert refusal.value.cause == "worlds is for evalsuite pretrain"
    with pytest.raises(UsageError, match="--data demo:8 has no boxes") as refusal:
        runner.run("random:timm:test_resnet", "detect", data="demo:8", **{**flags, "protocol": None})
    assert (refusal.value.cause, refusal.value.fix[-18:]) == ("demo is a layout of another task", "or --task classify")
