"""Pairs of image and mask: how masks are read, what is refused, and anybody's data."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evalsuite.data import Report, as_fault
from evalsuite.data.pairs import Pairs
from evalsuite.data.segmentation import IGNORE, Coding, SegmentationSet, voc_palette
from evalsuite.errors import DataError

Mask = Any


def write(path: Path, pixels: Mask, mode: str | None = None, palette: Mask | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(pixels)
    image = Image.fromarray(array if array.dtype == np.uint16 else array.astype(np.uint8))
    if mode is not None:
        image = image.convert(mode)
    if palette is not None:
        image.putpalette(np.asarray(palette, np.uint8).tobytes())
    image.save(path)
    return path


def photo(path: Path, height: int = 4, width: int = 6, seed: int = 0) -> Path:
    return write(path, np.random.default_rng(seed).integers(0, 255, (height, width, 3)))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two training pairs and one to score on; 0 and 1 and some 255."""
    for number, (split, name) in enumerate((("train", "a"), ("train", "deep/b"), ("val", "c"))):
        photo(tmp_path / "images" / split / f"{name}.jpg", seed=number)
        mask = np.arange(24).reshape(4, 6) // 12
        mask[0, 0] = IGNORE
        write(tmp_path / "masks" / split / f"{name}.png", mask)
    (tmp_path / "classes.txt").write_text("ground\ncell\n")
    return tmp_path


def refused(path: Path, split: str = "train") -> DataError:
    """What loading a split, or reading one of its masks, says; in three lines and with exit code 3."""

    def masks() -> None:
        found = Pairs().load(path, split)
        for place in range(len(found)):
            found.mask(place)

    with pytest.raises(DataError) as told:
        masks()
    assert len(str(told.value).splitlines()) == 3
    assert told.value.code == 3
    return told.value


def faults(path: Path) -> list[str]:
    return Pairs().verify(path).faults


# --- a good set ------------------------------------------------------------------------------------------------


def test_a_good_set(world: Path) -> None:
    source = Pairs()
    assert source.locate(world) == world
    assert source.splits(world) == ("train", "val")
    assert source.roles(world) == {"train": "train", "val": "val"}
    found = source.load(world, "train")
    assert (found.name, found.split, found.classes, len(found)) == ("pairs", "train", ("ground", "cell"), 2)
    assert [r.image_id for r in found.records] == ["a", "deep/b"]
    assert found.records[0].size == (4, 6)
    assert found.palette.tolist() == voc_palette(2).tolist()
    assert found.image(0).shape == (4, 6, 3)
    mask = found.mask(1)
    assert mask.dtype == np.uint8
    assert mask.tolist() == [[255, 0, 0, 0, 0, 0], [0] * 6, [1] * 6, [1] * 6]
    assert found.warnings == ()
    assert pickle.loads(pickle.dumps(found)).mask(1).tolist() == mask.tolist()  # data workers are sent it


def test_verify_counts_pixels(world: Path) -> None:
    report: Report = Pairs().verify(world)
    assert report.ok
    assert not report.notes
    assert report.counts["train"] == {
        "images": 2, "pixels": 48, "ignored": 2, "classes": {"ground": 22, "cell": 24},
    }  # fmt: skip


def test_a_folder_a_split(world: Path, tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            target = tmp_path / "other" / split / kind
            target.parent.mkdir(parents=True, exist_ok=True)
            (world / kind / split).rename(target)
    (world / "classes.txt").rename(tmp_path / "other" / "classes.txt")
    assert len(Pairs().load(tmp_path / "other", "train")) == 2


def test_the_fingerprint_is_of_the_content(world: Path, tmp_path: Path) -> None:
    def mark(path: Path = world) -> str:
        return Pairs().load(path, "train").fingerprint

    before = mark()
    assert mark() == before
    moved = world.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    assert mark(moved) == before
    mask = Pairs().load(moved, "train").mask(0)
    mask[3, 3] = 0
    write(moved / "masks" / "train" / "a.png", mask)
    assert (changed := mark(moved)) != before
    (moved / "classes.txt").write_text("soil\ncell\n")
    assert mark(moved) not in (before, changed)


def test_limit_is_evenly_spaced_and_another_set(tmp_path: Path) -> None:
    for number in range(5):
        photo(tmp_path / "images" / "train" / f"{number}.png", seed=number)
        write(tmp_path / "masks" / "train" / f"{number}.png", np.zeros((4, 6)))
    (tmp_path / "classes.txt").write_text("ground\n")
    found: SegmentationSet = Pairs().load(tmp_path, "train")
    assert [r.image_id for r in found.limit(3).records] == ["0", "2", "4"]
    assert found.limit(5) is found.limit(None) is found
    assert len({found.fingerprint, found.limit(3).fingerprint, found.limit(2).fingerprint}) == 3
    with pytest.raises(DataError, match="nothing to learn from or nothing to score on"):
        Pairs().roles(tmp_path)


# --- what masks may be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["uint16", "palette", "grey alpha", "tiff"])
def test_one_channel_is_read_by_numbers(world: Path, how: str) -> None:
    mask = np.array([[0, 1, 255, 0, 1, 1]] * 4)
    target = world / "masks" / "train" / "a.png"
    if how == "uint16":
        write(target, mask.astype(np.uint16))
        with Image.open(target) as image:
            assert image.mode.startswith("I")
    elif how == "palette":
        write(target, mask, palette=voc_palette(256)[::-1])  # its colours mean nothing
    elif how == "grey alpha":
        write(target, mask, mode="LA")
    else:
        target.unlink()
        write(target.with_suffix(".tif"), mask)
    assert Pairs().load(world, "train").mask(0).tolist() == mask.tolist()


def test_one_bit(world: Path) -> None:
    Image.fromarray(np.array([[True, False] * 3] * 4)).save(world / "masks" / "train" / "a.png")
    assert Pairs().load(world, "train").mask(0)[0].tolist() == [1, 0, 1, 0, 1, 0]


COLOURS = {"ground": [10, 20, 30], "cell": [200, 0, 7]}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "10 20 30 ground\n200 0 7\tcell\n"),
        ("classes.txt", "ground 10 20 30\ncell, 200, 0, 7\n"),
        ("classes.json", json.dumps([{"name": n, "color": c} for n, c in COLOURS.items()])),
    ],
)
def test_colours(world: Path, file: str, text: str) -> None:
    (world / "classes.txt").unlink()
    (world / file).write_text(text)
    numbers = np.array([[0, 1, 1, 0, 0, 0]] * 4)
    drawn = np.array(list(COLOURS.values()))[numbers]
    folder = world / "masks" / "train"
    write(folder / "a.png", drawn, mode="RGBA")
    write(
        folder / "deep" / "b.png", 1 - numbers, palette=[*list(COLOURS.values())[::-1]]
    )  # numbers the other way round
    found = Pairs().load(world, "train")
    assert found.palette.tolist() == list(COLOURS.values())
    assert found.mask(0).tolist() == found.mask(1).tolist() == numbers.tolist()
    write(folder / "a.png", drawn + 1)
    told = refused(world)
    assert told.problem.endswith("holds colours that are no class: 11-21-31, 201-1-8")
    assert told.cause == "24 pixels; known are 10-20-30, 200-0-7"


def test_values_and_classes_that_do_not_count(world: Path) -> None:
    (world / "classes.txt").unlink()
    (world / "classes.json").write_text(
        json.dumps(
            [{"name": "soil", "value": 3}, {"name": "dirt", "value": 9, "ignore": True}, {"name": "cell", "value": 255}]
        )
    )
    write(world / "masks" / "train" / "a.png", [[3, 9, 255, 3, 3, 3]] * 4)
    found = Pairs().load(world, "train")
    assert found.classes == ("soil", "cell")
    assert found.mask(0)[0].tolist() == [0, IGNORE, 1, 0, 0, 0]


def test_palettes_without_a_class_file(world: Path) -> None:
    (world / "classes.txt").unlink()
    shades = voc_palette(256)
    shades[2] = (1, 2, 3)
    for name, top in (("train/a", 0), ("train/deep/b", 1), ("val/c", 2)):
        write(world / "masks" / f"{name}.png", [[0, top, 255, 0, 0, 0]] * 4, palette=shades)
    found = Pairs().load(world, "train")
    assert found.classes == ("0", "1", "2")  # the same in every split
    assert found.palette.tolist() == shades[:3].tolist()
    assert found.mask(1)[0].tolist() == [0, 1, IGNORE, 0, 0, 0]
    write(world / "masks" / "val" / "c.png", np.zeros((4, 6)))
    told = refused(world)
    assert "does not say what its classes are" in told.problem
    assert "c.png has no palette" in told.cause
    assert "classes.txt" in told.fix


# --- bad input -------------------------------------------------------------------------------------------------


def test_a_mask_of_another_size(world: Path) -> None:
    write(world / "masks" / "train" / "a.png", np.zeros((6, 4)))
    told = refused(world)
    assert "a.png does not fit its image" in told.problem
    assert told.cause == "it has 4x6 pixels, its image 6x4"
    assert len(faults(world)) == 1


def test_a_number_outside_the_table(world: Path) -> None:
    write(world / "masks" / "train" / "a.png", [[0, 1, 2, 7, 8, 255]] * 4)
    told = refused(world)
    assert told.problem.endswith("a.png holds numbers that are no class: 2, 7, 8")
    assert told.cause == "12 pixels; known are 0, 1, 255"
    assert str(world / "classes.txt") in told.fix
    assert len(faults(world)) == 1


def test_sixteen_bits_are_neither_scaled_nor_cut(world: Path) -> None:
    write(world / "masks" / "train" / "a.png", np.full((4, 6), 257, np.uint16))  # 1 in either byte
    assert refused(world).problem.endswith("no class: 257")
    write(world / "masks" / "train" / "a.png", np.full((4, 6), 65535, np.uint16))
    assert refused(world).problem.endswith("no class: 65535")


def test_colours_where_numbers_are_expected_and_the_other_way_round(world: Path) -> None:
    write(world / "masks" / "train" / "a.png", np.zeros((4, 6, 3)))
    assert refused(world).cause == "it holds RGB colours, and its classes are told by numbers"
    only_colours = Coding({}, {(0, 0, 0): 0})
    path = write(world / "grey.png", np.zeros((4, 6)))
    with pytest.raises(DataError, match="cannot be read") as told:
        only_colours(path, (4, 6))
    assert told.value.cause == "it holds numbers, and its classes are told by colours"


def test_lossy_and_broken_masks(world: Path) -> None:
    folder = world / "masks" / "train"
    (folder / "a.png").unlink()
    write(folder / "a.jpg", np.zeros((4, 6)))
    assert "JPEG" in refused(world).cause
    (folder / "a.jpg").unlink()
    (folder / "a.png").write_bytes(b"\x89PNG nothing")
    found = Pairs().load(world, "train")  # the others can be used
    assert len(found) == 1
    assert ["a.png cannot be decoded" in error.problem for error in found.unreadable] == [True]
    Image.fromarray(np.zeros((4, 6), np.float32)).save(folder / "a.tif")
    (folder / "a.png").unlink()
    assert "neither whole numbers nor RGB colours" in refused(world).cause


def test_a_mask_that_is_cut_short(world: Path) -> None:
    file = world / "masks" / "train" / "a.png"
    write(file, np.random.default_rng(0).integers(0, 2, (200, 200)))
    photo(world / "images" / "train" / "a.jpg", 200, 200)
    file.write_bytes(file.read_bytes()[:-1000])
    assert "a.png cannot be decoded" in refused(world).problem
    report = Pairs().verify(world)
    assert len(report.faults) == 1
    assert report.counts["train"]["pixels"] == 24  # the other mask's


def test_missing_partners(world: Path) -> None:
    (world / "masks" / "train" / "a.png").unlink()
    photo(world / "images" / "train" / "d.jpg", seed=9)
    told = refused(world)
    assert told.problem.endswith("a.jpg has no mask")
    assert told.cause.startswith("2 names are incomplete")
    (world / "images" / "train" / "deep" / "b.jpg").unlink()
    found = faults(world)
    assert len(found) == 4  # a, b, d, and nothing is left of the split
    assert sum("has no image" in fault for fault in found) == 1


def test_two_files_of_one_name(world: Path) -> None:
    photo(world / "images" / "train" / "a.png")
    assert refused(world).cause in ("a.jpg and a.png", "a.png and a.jpg")


def test_the_same_image_in_two_splits(world: Path) -> None:
    (world / "images" / "val" / "c.jpg").write_bytes((world / "images" / "train" / "a.jpg").read_bytes())
    assert faults(world) == ["the same image is in several splits: train/a.jpg, val/c.jpg"]


def test_nothing_but_ignored_pixels(world: Path) -> None:
    write(world / "masks" / "val" / "c.png", np.full((4, 6), IGNORE))
    (fault,) = faults(world)
    assert fault.startswith("pairs val has no pixel to judge by: every pixel of its masks is ignored (fix: ")


def test_verify_refuses_masks_of_one_class_as_a_run_does(world: Path) -> None:
    for name in ("train/a", "train/deep/b"):
        write(world / "masks" / f"{name}.png", np.ones((4, 6)))
    (fault,) = faults(world)
    assert fault.startswith("pairs train has nothing to learn from: every pixel of its masks is ")
    (world / "classes.txt").write_text("cell\n")
    assert any(fault.startswith("pairs train has a single class: it is cell") for fault in faults(world))
    (world / "masks" / "val").rename(world / "masks" / "elsewhere")
    assert any("nothing to learn from or nothing to score on" in fault for fault in faults(world))


@pytest.mark.parametrize(
    ("images", "masks"),
    [("images", "masks"), ("images", "annotations"), ("Images", "labels"), ("JPEGImages", "SegmentationClass")],
)
def test_images_and_masks_without_folders_of_splits_are_split_by_hash(tmp_path: Path, images: str, masks: str) -> None:
    for i in range(8):
        photo(tmp_path / images / f"{i}.jpg", seed=i)
        write(tmp_path / masks / f"{i}.png", np.arange(24).reshape(4, 6) // 12)
    (tmp_path / "classes.txt").write_text("ground\ncell\n")
    source = Pairs()
    assert source.locate(tmp_path) == tmp_path
    assert source.roles(tmp_path) == {"train": "train", "test": "test", "val": "test"}
    train, test = (source.load(tmp_path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (6, 2)
    assert {r.image_id for r in train.records} | {r.image_id for r in test.records} == set("01234567")
    assert faults(tmp_path) == []
    (tmp_path / masks / "3.png").unlink()
    assert any("3.jpg has no mask" in fault for fault in faults(tmp_path))
    with pytest.raises(DataError, match="has no split"):
        source.load(tmp_path, "val")


@pytest.mark.parametrize(("train", "val"), [("Training", "Validation"), ("train_set", "valid"), ("TRAIN", "dev")])
def test_splits_by_other_names(world: Path, train: str, val: str) -> None:
    for kind in ("images", "masks"):
        (world / kind / "train").rename(world / kind / train)
        (world / kind / "val").rename(world / kind / val)
    assert Pairs().splits(world) == ("train", "val")
    assert len(Pairs().load(world, "train")) == 2
    assert faults(world) == []


def test_a_folder_of_a_split_without_masks_is_no_reason_to_split_by_hash(world: Path) -> None:
    (world / "masks" / "train").rename(world / "masks" / "other")
    (world / "masks" / "val").rename(world / "masks" / "another")
    with pytest.raises(DataError, match=r"was not found|not in the layout"):
        Pairs().locate(world)


RED, BLUE, BLACK = [255, 0, 0], [0, 0, 255], [0, 0, 0]


def palettes(world: Path, suffix: str, **colours: list[list[int]]) -> None:
    """The three masks, of the numbers 0 and 1, with palettes of their own."""
    for mask in (world / "masks").rglob("*.png"):
        mask.unlink()
    for name, palette in colours.items():
        place = {"a": "train/a", "b": "train/deep/b", "c": "val/c"}[name]
        write(world / "masks" / f"{place}.{suffix}", np.arange(24).reshape(4, 6) // 12, "P", palette)


@pytest.mark.parametrize(("suffix", "names"), [("png", "ab"), ("png", "ac"), ("gif", "ab")])
@pytest.mark.parametrize("listed", [True, False])
def test_numbers_of_palettes_that_differ_are_no_classes(world: Path, suffix: str, names: str, listed: bool) -> None:
    palettes(world, suffix, **{name: [BLACK, BLUE if name == names[1] else RED] for name in "abc"})
    if not listed:
        (world / "classes.txt").unlink()
    with pytest.raises(DataError, match="palettes differ: ") as told:
        Pairs().pair(world)
    assert "0-0-255" in told.value.cause
    assert as_fault(told.value) in faults(world)
    (world / "classes.txt").write_text("0 0 0 ground\n255 0 0 cell\n0 0 255 sea\n")
    assert faults(world) == []


def test_palettes_may_differ_in_what_no_pixel_has(world: Path) -> None:
    palettes(world, "png", a=[BLACK, RED], b=[BLACK, RED, BLUE], c=[BLACK, RED, RED, BLUE])
    assert faults(world) == []


def test_grey_gifs_whose_numbers_are_no_levels(world: Path) -> None:
    for mask in (world / "masks").rglob("*.png"):
        mask.unlink()
    for place, level in (("train/a", 1), ("train/deep/b", 2), ("val/c", 1)):
        write(world / "masks" / f"{place}.gif", np.arange(24).reshape(4, 6) // 12 * level)
    assert any("palettes differ" in fault for fault in faults(world))


def test_images_that_carry_an_exif_turn_are_noted(world: Path) -> None:
    for name, code, turned in (("train/a", 6, True), ("train/deep/b", 8, False), ("val/c", 3, True)):
        image = world / "images" / f"{name}.jpg"
        exif = Image.Exif()
        exif[0x0112] = code
        Image.open(image).save(image, exif=exif)
        if turned and code != 3:
            write(world / "masks" / f"{name}.png", np.arange(24).reshape(6, 4) // 12)
    assert Pairs().verify(world).notes == [
        "train: 2 images carry an EXIF turn: 1 are turned upright, 1 are annotated as stored",
        "val: 1 images carry an EXIF turn: of 1 the size does not tell which way they were annotated: turned upright",
    ]


def test_black_and_white_masks_are_not_taken_for_no_class(world: Path) -> None:
    for name in ("train/a", "train/deep/b"):
        write(world / "masks" / f"{name}.png", [[0, 255] * 3] * 4)
    assert len(Pairs().load(world, "train")) == 2  # val has both classes, so 255 is what it is by default
    write(world / "masks" / "val" / "c.png", [[0, 255] * 3] * 4)
    told = refused(world)
    assert as_fault(told) in faults(world)
    assert "hold 0 and 255 alone" in told.problem
    example = json.loads(told.fix.removeprefix("write classes.json: "))
    (world / "classes.txt").unlink()
    (world / "classes.json").write_text(json.dumps(example))
    assert Pairs().load(world, "train").mask(0)[0].tolist() == [0, 1] * 3


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{}", "valid array"),
        ('[{"name": "a", "valeu": 3}]', "valeu"),
        ('[{"name": "a", "value": "3"}]', "integer"),
        ('[{"name": "a", "value": -1}]', "greater than or equal to 0"),
        ('[{"name": "a", "color": [1, 2]}]', "at least 3"),
        ('[{"name": "a", "color": [1, 2, 256]}]', "less than or equal to 255"),
        ('[{"name": "a"}, {"name": "b", "value": 0}]', "value 0 is there twice"),
        ('["a", "a"]', "name 'a' is there twice"),
        ('[{"name": "a", "color": [1, 2, 3]}, {"name": "b", "color": [1, 2, 3]}]', "there twice"),
        ('[{"name": "a", "color": [1, 2, 3]}, "b"]', "1 of 2 entries have a color"),
        ('[{"name": "a", "ignore": true}]', "0 classes"),
        ("[", "JSON"),
    ],
)
def test_class_files_that_make_no_sense(world: Path, text: str, cause: str) -> None:
    (world / "classes.txt").unlink()
    (world / "classes.json").write_text(text)
    told = refused(world)
    assert "classes.json cannot be read" in told.problem
    assert cause in told.cause


def test_two_class_files(world: Path) -> None:
    (world / "classes.json").write_text('["a", "b"]')
    assert "only one can be right" in refused(world).cause
    (world / "classes.json").unlink()
    (world / "classes.txt").write_text("\n")
    assert "classes.txt cannot be read" in refused(world).problem
    (world / "classes.txt").write_text("a 1 2 900\n")
    assert "less than or equal to 255" in refused(world).cause


def test_a_split_that_is_not_there(world: Path) -> None:
    assert refused(world, "test").cause == "its splits with masks are train, val"


def test_the_palette_of_voc() -> None:
    assert voc_palette(256)[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
