"""Cityscapes, VOC 2012, ADE20K and CamVid in the layouts they are published in."""

from __future__ import annotations

import importlib.util
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from typer.testing import CliRunner

from evalsuite.cli import app
from evalsuite.data import ade20k, camvid, cityscapes, voc_segmentation
from evalsuite.data.ade20k import Ade20k, Ade20kFull
from evalsuite.data.camvid import CamVid
from evalsuite.data.cityscapes import Cityscapes
from evalsuite.data.demo import SHAPES
from evalsuite.data.segmentation import IGNORE, SegmentationSource, voc_palette
from evalsuite.data.voc_segmentation import VocSegmentation
from evalsuite.errors import DataError, UsageError
from evalsuite.metrics.segmentation import Confusion, scores

SIZE = (4, 6)


def photo(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(path)


def mask(path: Path, row: list[int] | list[list[int]], palette: np.ndarray | None = None) -> None:
    """A mask of four such rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array([row] * SIZE[0], np.uint8))
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(path)


# --- the tables ------------------------------------------------------------------------------------------------


@pytest.mark.mmseg
def test_tables_are_those_of_mmsegmentation() -> None:
    package = importlib.util.find_spec("mmseg")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "utils" / "class_names.py"
    theirs = runpy.run_path(str(file))  # importing its package would take mmcv's compiled operators
    assert list(cityscapes.CLASSES) == theirs["cityscapes_classes"]()
    assert [list(colour) for colour in cityscapes.PALETTE] == theirs["cityscapes_palette"]()
    assert list(voc_segmentation.CLASSES) == theirs["voc_classes"]()
    assert voc_palette(21).tolist() == theirs["voc_palette"]()
    assert ade20k.PALETTE.tolist() == theirs["ade_palette"]()
    renamed = {"bed ": "bed", "television receiver": "television"}  # the benchmark's file begins with the latter
    assert list(ade20k.CLASSES) == [renamed.get(name, name) for name in theirs["ade_classes"]()]


def test_classes_of_ade20k_are_those_of_the_benchmark(realdata: Path) -> None:
    rows = (realdata / "metric_ade_sceneparsing" / "objectInfo150.txt").read_text().splitlines()[1:]
    assert tuple(row.split("\t")[4].split(",")[0].strip() for row in rows) == ade20k.CLASSES


# --- Cityscapes ------------------------------------------------------------------------------------------------


@pytest.fixture
def street(tmp_path: Path) -> Path:
    for seed, (split, city, row) in enumerate(
        (
            ("train", "aachen", [7, 8, 33, 0, 3, 9]),
            ("train", "bonn", [26, 26, 18, 17, 4, 31]),
            ("val", "lindau", [7, 7, 7, 7, 7, 7]),
            ("test", "berlin", [3, 3, 3, 3, 3, 3]),
        )
    ):
        stem = f"{split}/{city}/{city}_000000_000019"
        photo(tmp_path / "cityscapes" / f"leftImg8bit/{stem}_leftImg8bit.png", seed)
        mask(tmp_path / "cityscapes" / f"gtFine/{stem}_gtFine_labelIds.png", row)
        mask(tmp_path / "cityscapes" / f"gtFine/{stem}_gtFine_instanceIds.png", [200] * 6)
    return tmp_path


def test_label_ids_become_the_scored_classes(street: Path) -> None:
    source = Cityscapes()
    path = source.locate(street)
    assert path == source.locate(street / "cityscapes") == street / "cityscapes"
    assert source.roles(path) == {"train": "train", "val": "val"}
    found = source.load(path, "train")
    assert len(found.classes) == 19
    assert [r.image_id for r in found.records] == ["aachen/aachen_000000_000019", "bonn/bonn_000000_000019"]
    assert found.mask(0)[0].tolist() == [0, 1, 18, 255, 255, 255]
    assert found.mask(1)[0].tolist() == [13, 13, 255, 5, 255, 16]
    assert source.verify(path).ok


def test_ready_made_train_ids_are_for_want_of_label_ids(street: Path) -> None:
    path = street / "cityscapes"
    ready = "gtFine/train/{0}/{0}_000000_000019_gtFine_labelTrainIds.png"
    for city in ("aachen", "bonn"):
        mask(path / ready.format(city), [18, 0, 255, 2, 2, 2])
    assert Cityscapes().load(path, "train").mask(0)[0].tolist() == [0, 1, 18, 255, 255, 255]
    (path / "gtFine/train/bonn/bonn_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError, match=r"bonn.*has no mask"):  # not one of this and one of that
        Cityscapes().load(path, "train")
    (path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png").unlink()
    assert Cityscapes().load(path, "train").mask(0)[0].tolist() == [18, 0, 255, 2, 2, 2]


def test_numbers_that_cityscapes_does_not_have(street: Path) -> None:
    path = street / "cityscapes"
    mask(path / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png", [7, 34, 255, 7, 7, 7])
    with pytest.raises(DataError, match="no class: 34, 255"):
        Cityscapes().load(path, "val").mask(0)
    with pytest.raises(DataError, match="no split 'test'"):
        Cityscapes().load(path, "test")


def test_verify_and_where_on_the_command_line(street: Path) -> None:
    runner = CliRunner()
    where = runner.invoke(app, ["data", "where", "cityscapes", "--data-root", str(street)])
    assert where.output == f"cityscapes: {street / 'cityscapes'}\n"
    mask(street / "cityscapes/gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png", [99] * 6)
    broken = runner.invoke(app, ["data", "verify", f"cityscapes:{street}"])
    assert broken.exit_code == 3
    assert "holds numbers that are no class: 99" in " ".join(broken.output.split())


# --- VOC and SBD -----------------------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    path = tmp_path / "VOCdevkit" / "VOC2012"
    lists = path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for number, (split, name) in enumerate(
        (("train", "2007_1"), ("val", "2007_2"), ("aug", "2008_3"), ("aug", "2008_4"))
    ):
        photo(path / "JPEGImages" / f"{name}.jpg", number)
        if split != "aug":
            mask(path / "SegmentationClass" / f"{name}.png", [0, 15, 20, 255, number, 0], voc_palette(256))
        with (lists / f"{split}.txt").open("a") as file:
            file.write(f"{name}\n")
    mask(path / "SegmentationClassAug" / "2007_1.png", [1] * 6)  # VOC's own goes before it
    mask(path / "SegmentationClassAug" / "2008_3.png", [3] * 6)
    sbd = tmp_path / "benchmark_RELEASE" / "dataset" / "cls"
    sbd.mkdir(parents=True)
    savemat(sbd / "2008_4.mat", {"GTcls": {"Segmentation": np.full(SIZE, 4, np.uint8), "Boundaries": np.zeros(3)}})
    return path


def test_voc(voc: Path) -> None:
    source = VocSegmentation()
    assert source.locate(voc.parents[1]) == source.locate(voc.parent) == source.locate(voc) == voc
    assert source.splits(voc) == ("train", "val", "train_aug")
    assert source.roles(voc) == {"train": "train", "val": "val"}
    found = source.load(voc, "train")
    assert len(found.classes) == 21
    assert found.mask(0)[0].tolist() == [0, 15, 20, IGNORE, 0, 0]
    augmented = source.load(voc, "train_aug")
    assert [r.image_id for r in augmented.records] == ["2007_1", "2008_3", "2008_4"]
    assert [int(augmented.mask(i)[0, 1]) for i in range(3)] == [15, 3, 4]
    assert source.verify(voc).ok


@pytest.mark.parametrize("name", ["train_aug", "trainaug"])
def test_a_list_of_train_aug(voc: Path, name: str) -> None:
    (voc / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("2008_3\n2007_1\n")
    assert [r.image_id for r in VocSegmentation().load(voc, "train_aug").records] == ["2008_3", "2007_1"]


def test_sbd_must_not_bring_val_into_training(voc: Path) -> None:
    (voc / "ImageSets" / "Segmentation" / "aug.txt").write_text("2007_2\n")
    faults = VocSegmentation().verify(voc).faults
    assert faults == ["the same image is in several splits: val/2007_2.jpg, train_aug/2007_2.jpg"]


def test_broken_voc(voc: Path) -> None:
    sbd = voc.parents[1] / "benchmark_RELEASE" / "dataset" / "cls" / "2008_4.mat"
    for content, told in (
        ({"other": 1}, "cannot be read"),
        ({"GTcls": {"Segmentation": np.full(SIZE, 21)}}, "no class: .21."),
    ):
        savemat(sbd, content)
        with pytest.raises(DataError, match=told):
            VocSegmentation().load(voc, "train_aug").mask(2)
    savemat(sbd, {"GTcls": {"Segmentation": np.zeros((6, 4))}})
    with pytest.raises(DataError, match="does not fit its image") as size:
        VocSegmentation().load(voc, "train_aug").mask(2)
    assert size.value.cause == "it has 4x6 pixels, its image 6x4"
    sbd.write_bytes(b"MATLAB 5.0 no more")
    with pytest.raises(DataError, match="cannot be read"):
        VocSegmentation().load(voc, "train_aug").mask(2)
    mask(voc / "SegmentationClass" / "2007_1.png", [0, 21, 0, 0, 0, 0], voc_palette(256))
    with pytest.raises(DataError, match="no class: 21"):
        VocSegmentation().load(voc, "train").mask(0)
    drawn = voc / "SegmentationClass" / "2007_1.png"
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(drawn)
    with pytest.raises(DataError, match="cannot be read") as colours:
        VocSegmentation().load(voc, "train").mask(0)
    assert colours.value.cause == "it holds RGB colours, and its classes are told by numbers"


@pytest.mark.parametrize(
    ("line", "told"),
    [("../../secret", "leads out"), ("/etc/passwd", "leads out"), ("nobody", "nobody is listed, but has neither")],
)
def test_lists_of_strangers(voc: Path, line: str, told: str) -> None:
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text(f"2007_1\n{line}\n")
    with pytest.raises(DataError, match=told):
        VocSegmentation().load(voc, "train")
    assert any(told in fault for fault in VocSegmentation().verify(voc).faults)


def test_lists_may_name_files(voc: Path) -> None:
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("JPEGImages\\2007_1.JPG\n")
    assert [record.image_id for record in VocSegmentation().load(voc, "train").records] == ["2007_1"]


# --- anybody's data in the layout of a published set ------------------------------------------------------------

OWN = {
    "voc-seg": ("JPEGImages/{split}_{i}.jpg", "SegmentationClass/{split}_{i}.png"),
    "cityscapes": ("leftImg8bit/{split}/mine_{i}_leftImg8bit.png", "gtFine/{split}/mine_{i}_gtFine_labelIds.png"),
    "ade20k": ("images/{ade}/mine_{i}.jpg", "annotations/{ade}/mine_{i}.png"),
    "camvid": ("{split}/mine_{i}.png", "{split}annot/mine_{i}.png"),
}


@pytest.fixture(params=OWN)
def own(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[SegmentationSource, Path]:
    """Masks of 1 and 2 in one of these layouts, of images that are not of the data set."""
    sources = (VocSegmentation(), Cityscapes(), Ade20k(), CamVid())
    source = next(each for each in sources if each.name == request.param)
    for split, ade in (("train", "training"), ("val", "validation")):
        for i in range(2):
            image, truth = (tmp_path / each.format(split=split, ade=ade, i=i) for each in OWN[source.name])
            photo(image, i + len(split))
            mask(truth, [1, 1, 2, 2, 1, 2], voc_palette(256))
        lists = tmp_path / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text(f"{split}_0\n{split}_1\n")
    return source, source.locate(tmp_path)


def test_classes_of_anybodys_data_are_not_those_of_the_data_set(own: tuple[SegmentationSource, Path]) -> None:
    source, path = own
    assert len(source.load(path, "train").classes) > 10
    layout = source.generic()
    with pytest.raises(DataError, match="does not say what its classes are") as told:
        layout.load(path, "train")
    assert f"is none of the data set {source.name}" in told.value.cause
    assert told.value.fix in layout.verify(path).faults[0]
    (path / "classes.txt").write_text("soil\nleaf\nstem\n")
    assert layout.load(path, "train").classes == ("soil", "leaf", "stem")
    assert layout.load(path, "val").mask(0)[0].tolist() == [1, 1, 2, 2, 1, 2]
    assert layout.verify(path).ok


def test_the_data_set_itself_keeps_its_classes(voc: Path, tmp_path: Path) -> None:
    for name in ("2007_1", "2007_2"):
        for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
            (voc / folder / f"{name}.{suffix}").rename(voc / folder / f"{name[:5]}00000{name[5:]}.{suffix}")
        file = voc / "ImageSets" / "Segmentation" / ("train.txt" if name == "2007_1" else "val.txt")
        file.write_text(f"{name[:5]}00000{name[5:]}\n")
    assert VocSegmentation().generic().load(voc, "train").classes == voc_segmentation.CLASSES


def test_classes_as_labelling_tools_write_them(own: tuple[SegmentationSource, Path]) -> None:
    layout, path = own[0].generic(), own[1]
    _, one, two = voc_palette(3).tolist()
    (path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nleaf:{}::\nbackground:0,0,0::\nstem:{}::\n".format(
            *(",".join(map(str, colour)) for colour in (one, two))
        )
    )
    found = layout.load(path, "train")
    assert found.classes == ("leaf", "background", "stem")
    assert found.mask(0)[0].tolist() == [0, 0, 2, 2, 0, 2]
    (path / "labelmap.txt").write_text("leaf\n")
    with pytest.raises(DataError) as told:
        layout.load(path, "train")
    assert told.value.cause == "a line is not name:r,g,b:parts:actions"
    (path / "labelmap.txt").rename(path / "class_names.txt")
    (path / "class_names.txt").write_text("_background_\nleaf\nstem\n")
    assert layout.load(path, "train").classes == ("_background_", "leaf", "stem")


# --- ADE20K ----------------------------------------------------------------------------------------------------


def test_the_scene_parsing_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "ADEChallengeData2016"
    for part in ("training", "validation"):
        photo(path / "images" / part / "ADE_1.jpg", len(part))
        mask(path / "annotations" / part / "ADE_1.png", [0, 1, 2, 150, 0, 13])
    assert Ade20k().locate(tmp_path) == path
    assert Ade20k().roles(path) == {"train": "train", "val": "val"}
    found = Ade20k().load(path, "val")
    assert found.mask(0)[0].tolist() == [IGNORE, 0, 1, 149, IGNORE, 12]
    assert [found.classes[i] for i in (0, 12, 149)] == ["wall", "person", "flag"]
    mask(path / "annotations" / "validation" / "ADE_1.png", [151] * 6)
    with pytest.raises(DataError, match="no class: 151"):
        Ade20k().load(path, "val").mask(0)


def test_the_benchmarks_own_sample_through_the_reader(realdata: Path, tmp_path: Path) -> None:
    """Its predictions are perfect: pixel accuracy 1, and a mean IoU of 0.1 over 150 classes of which 15 are there."""
    sample = realdata / "metric_ade_sceneparsing"
    for kind, source in (("truth", "annotations"), ("said", "predictions")):
        for folder, files in (("images", "images"), ("annotations", source)):
            target = tmp_path / kind / folder / "validation"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(sample / files, target_is_directory=True)
    truth, said = (Ade20k().load(tmp_path / kind, "val") for kind in ("truth", "said"))
    assert len(truth) == 3
    confusion = Confusion(150)
    for place in range(3):
        prediction = np.where(said.mask(place) == IGNORE, 0, said.mask(place))
        confusion.update(torch.from_numpy(prediction), torch.from_numpy(truth.mask(place)))
    found = scores(confusion.counts, truth.classes, absent="zero")
    assert found.scores["aAcc"] == 1.0
    assert found.scores["mIoU"] == pytest.approx(0.1)


def test_the_full_data_set(tmp_path: Path) -> None:
    path = tmp_path / "ADE20K_2021_17_01"
    street = path / "images" / "ADE" / "training" / "urban" / "street"
    photo(street / "ADE_train_1.jpg")
    codes = [2978, 401, 774, 783, 1023, 1]  # wall, car, door, double door, fountain, an object of no class
    mask(street / "ADE_train_1_seg.png", [[code // 256 * 10, code % 256, 7] for code in codes])
    mask(street / "ADE_train_1_parts_1.png", [0] * 6)
    found = Ade20kFull().load(Ade20kFull().locate(tmp_path), "train")
    names = [None if label == IGNORE else found.classes[label] for label in found.mask(0)[0].tolist()]
    assert names == ["wall", "car", "door", "door", "fountain", None]
    assert "not the scene parsing benchmark" in found.warnings[0]
    with pytest.raises(DataError, match="nothing to learn from or nothing to score on"):
        Ade20kFull().roles(path)
    mask(street / "ADE_train_1_seg.png", [[11, 0, 0]] * 6)
    with pytest.raises(DataError, match="cannot be read"):
        Ade20kFull().load(path, "train").mask(0)
    with pytest.raises(UsageError, match="no demo world"):
        Ade20kFull().demo(tmp_path)


def test_the_full_data_sets_own_files(realdata: Path) -> None:
    """What each image's JSON names as a class of the benchmark is in its mask, and nothing else is."""
    rows = (realdata / "metric_ade_sceneparsing" / "objectInfo150.txt").read_text().splitlines()[1:]
    labels = {row.split("\t")[4].strip(): label for label, row in enumerate(rows)}
    source = Ade20kFull()
    path = source.locate(realdata / "seg_ade20k_2021")
    (fault,) = source.verify(path).faults  # there is no other split
    assert "nothing to score on" in fault
    found = source.load(path, "train")
    assert len(found) == 3
    for place, record in enumerate(found.records):
        objects = json.loads(record.image.with_suffix(".json").read_text(encoding="latin-1"))["annotation"]["object"]
        whole = {labels[o["name"]] for o in objects if o["parts"]["part_level"] == 0 and o["name"] in labels}
        seen = set(np.unique(found.mask(place)).tolist()) - {IGNORE}
        assert seen <= whole
        assert len(seen) >= len(whole) - 2  # an object can be hidden by others


# --- CamVid ----------------------------------------------------------------------------------------------------


def test_the_segnet_tutorials_files(realdata: Path) -> None:
    source = CamVid()
    path = source.locate(realdata / "seg_camvid")
    assert source.roles(path) == {"train": "train", "val": "val", "test": "test"}
    report = source.verify(path)
    assert report.ok
    assert {split: counts["images"] for split, counts in report.counts.items()} == {"train": 20, "val": 5, "test": 12}
    found = source.load(path, "test")
    assert found.records[0].size == (360, 480)
    assert found.classes[0] == "sky"
    assert not found.warnings


def test_cambridges_files(tmp_path: Path) -> None:
    path = tmp_path / "CamVid"
    for number, name in enumerate(("0001TP_1", "0001TP_2", "Seq05VD_3")):
        photo(path / "701_StillsRaw_full" / f"{name}.png", number)
        row = [[128, 128, 128], [192, 0, 128], [0, 0, 0], [192, 128, 192], [192, 0, 192], [0, 0, 64]]
        mask(path / "LabeledApproved_full" / f"{name}_L.png", row)
    assert CamVid().splits(path) == ()
    with pytest.raises(DataError, match="nothing to learn from"):
        CamVid().roles(path)
    (path / "train.txt").write_text("/SegNet/CamVid/train/0001TP_2.png /SegNet/CamVid/trainannot/0001TP_2.png\n")
    (path / "val.txt").write_text("0001TP_1\n")
    found = CamVid().load(CamVid().locate(tmp_path), "train")
    assert [r.image_id for r in found.records] == ["0001TP_2"]
    names = [None if label == IGNORE else found.classes[label] for label in found.mask(0)[0].tolist()]
    assert names == ["sky", "building", None, "car", "bicyclist", "pole"]
    assert "not the SegNet tutorial's files" in found.warnings[0]
    assert sum(map(len, camvid._GROUPS.values())) == 31  # and void


# --- demo worlds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Cityscapes(), VocSegmentation(), Ade20k(), CamVid()], ids=lambda s: s.name)
def test_demo_worlds(source: SegmentationSource, tmp_path: Path) -> None:
    path = source.demo(tmp_path, seed=1, images=8)
    assert source.locate(tmp_path) == path
    assert source.demo(tmp_path, seed=1, images=8) == path
    report = source.verify(path)
    assert report.ok, report.faults
    found = source.load(path, source.roles(path)["train"])
    assert len(found) == 8
    assert len({record.size for record in found.records}) > 1
    used = [name for name, count in report.counts["train"]["classes"].items() if count]
    assert len(used) == len(SHAPES) + (1 if source.name == "voc-seg" else 2)
    assert report.counts["train"]["ignored"] > 0
    assert source == type(source)()
    assert hash(source) == hash(type(source)())


def test_what_is_drawn_is_what_is_labelled(tmp_path: Path) -> None:
    """In colour images a pixel's hue tells a car (a blue disc) from the ground."""
    path = Cityscapes().demo(tmp_path, images=8)
    found = Cityscapes().load(path, "train")
    blue: dict[str, list[float]] = {"car": [], "road": []}
    for place in range(8):
        pixels, labels = found.image(place).astype(float), found.mask(place)
        if (pixels == pixels[:, :, :1]).all():
            continue
        for name, values in blue.items():
            inside = pixels[labels == found.classes.index(name)]
            values += [float((inside[:, 2] - inside[:, 0]).mean())] if len(inside) else []
    assert min(blue["car"]) > 40
    assert max(map(abs, blue["road"])) < 30
