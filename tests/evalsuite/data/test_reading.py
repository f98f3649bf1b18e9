"""Images are read once, what was found is remembered, and images in two splits are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evalsuite.data.detection import Boxes, DetectionSet, assemble
from evalsuite.data.detection import Image as Listed
from evalsuite.data.reading import copied, in_both, look, readable, recall, refuse, usable
from evalsuite.errors import DataError, ImageError
from evalsuite.features import default_root
from evalsuite.progress import Progress

QUIET = Progress(quiet=True)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))


def broken(row: int) -> ImageError:
    return ImageError(f"image {row} cannot be decoded", cause="it is short", fix="restore it")


def test_every_row_is_looked_at_once_and_remembered() -> None:
    rows: list[int] = []

    def read(row: int) -> list[int]:
        rows.append(row)
        if row in (1, 4):
            raise broken(row)
        return [row, 7]

    assert recall("key") is None
    first = readable("key", 6, read, QUIET)
    assert sorted(rows) == [0, 1, 2, 3, 4, 5]
    assert sorted(first.unreadable) == [1, 4]
    assert first.labels == {0, 2, 3, 5, 7}
    again = readable("key", 6, read, QUIET)
    assert len(rows) == 6
    assert again.labels == first.labels
    assert {row: str(error) for row, error in again.unreadable.items()} == {row: str(broken(row)) for row in (1, 4)}
    readable("another", 6, read, QUIET)
    assert len(rows) == 12


def test_what_a_killed_process_was_remembering_is_removed_by_the_next() -> None:
    left = default_root().parent / "readable" / ".key.json.a1b2.partial"
    left.parent.mkdir(parents=True)
    left.touch()
    readable("key", 1, lambda row: [row], QUIET)
    assert [path.name for path in left.parent.iterdir()] == ["key.json"]


def test_what_is_wrong_with_data_is_raised_and_not_remembered() -> None:
    def read(row: int) -> list[int]:
        raise DataError("the mask holds 9", cause="it is no class", fix="correct it")

    for _ in range(2):
        with pytest.raises(DataError, match="holds 9"):
            readable("key", 3, read, QUIET)
    assert look(0, read, QUIET).labels == frozenset()


def test_none_left_or_strict_refuses() -> None:
    refuse([broken(1)], 2, strict=False)
    refuse([], 2, strict=True)
    for errors, count, strict in (([broken(1)], 2, True), ([broken(0), broken(1)], 2, False)):
        with pytest.raises(ImageError, match=f"{len(errors)} of 2 images cannot be read; image ") as told:
            refuse(errors, count, strict)
        assert told.value.fix == "restore it"


@pytest.fixture
def part(tmp_path: Path) -> DetectionSet:
    return split(tmp_path / "train", "abc")


def split(folder: Path, names: str) -> DetectionSet:
    """A split of images without objects; the letter is the image."""
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 6), (ord(name), 0, 0)).save(folder / f"{name}.bmp")
    nothing = np.zeros(0, np.int64)
    columns = Boxes(nothing, np.zeros((0, 4)), nothing, nothing.astype(bool), nothing.astype(bool), np.zeros(0))
    return assemble(
        [Listed(i, folder / f"{name}.bmp", 6, 8) for i, name in enumerate(names)],
        columns, name=folder.name, classes=("a",), category_ids=(1,), annotations=folder.name,
    )  # fmt: skip


def reads(part: DetectionSet, seen: list[int]) -> Iterator[tuple[DetectionSet, frozenset[int]]]:
    def read(row: int) -> tuple[()]:
        seen.append(row)
        part.decode(part.records[row])
        return ()

    while True:
        part = dataclasses.replace(part)  # as read anew
        yield usable(part, read, QUIET)


def test_unreadable_images_are_left_out_until_their_files_change(part: DetectionSet) -> None:
    seen: list[int] = []
    path = part.records[1].path
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    again = reads(part, seen)
    found, _ = next(again)
    assert [record.path.stem for record in found.records] == ["a", "c"]
    assert found.fingerprint != part.fingerprint
    assert found.warnings[0].startswith("train: 1 images cannot be read and are left out; image ")
    assert [record.path.stem for record in next(again)[0].records] == ["a", "c"]
    assert len(seen) == 3
    path.write_bytes(whole)
    assert len(next(again)[0]) == 3
    assert len(seen) == 6


def test_what_is_known_can_be_asked_without_reading(part: DetectionSet) -> None:
    def read(row: int) -> tuple[()]:
        pytest.fail("it read")

    assert usable(part, read, QUIET, known=True, strict=True)[0] is part
    part.records[0].path.write_bytes(b"")
    part = dataclasses.replace(part)
    next(reads(part, []))
    with pytest.raises(ImageError, match="1 of 3 images cannot be read"):
        usable(part, read, QUIET, known=True, strict=True)
    assert usable(part, read, QUIET, known=True, kind="masks")[0] is part  # read in another way


def test_images_in_two_splits_are_told_by_their_contents(tmp_path: Path) -> None:
    train, test = split(tmp_path / "train", "abcd"), split(tmp_path / "test", "efg")
    assert copied(train, test) == ()
    test.records[1].path.write_bytes(train.records[3].path.read_bytes())
    (told,) = copied(train, dataclasses.replace(test))
    assert told == (
        f"1 of the images of test are in train too, so that scores are too high: {tmp_path}/test/f.bmp is "
        f"{tmp_path}/train/d.bmp there"
    )
    test.records[1].path.unlink()
    assert copied(train, dataclasses.replace(test)) == ()


def test_digests_stand_for_contents() -> None:
    found = in_both({"a": "1", "b": "2", "c": ""}, {"w": "", "x": "2", "y": "2", "z": "3"})
    assert found is not None
    assert found.number == 2
    assert found.first == ("x", "b")
    assert in_both({"a": "1", "c": ""}, {"b": "2", "c": ""}) is None
