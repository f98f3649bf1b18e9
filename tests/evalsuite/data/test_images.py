"""Images of every mode become eight-bit RGB; broken ones are refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evalsuite.data.images import digest, read_rgb, size
from evalsuite.errors import DataError

RED = (200, 30, 40)


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp", "webp"])
def test_colour_is_kept(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (6, 4), RED).save(path, **({"lossless": True} if suffix == "webp" else {}))
    pixels = read_rgb(path)
    assert pixels.shape == (4, 6, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == RED).all()


def test_grey_is_repeated(tmp_path: Path) -> None:
    Image.new("L", (6, 4), 77).save(tmp_path / "a.png")
    assert (read_rgb(tmp_path / "a.png") == 77).all()


def test_alpha_is_dropped(tmp_path: Path) -> None:
    Image.new("RGBA", (6, 4), (*RED, 10)).save(tmp_path / "a.png")
    assert (read_rgb(tmp_path / "a.png") == RED).all()


def test_cmyk_is_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    pixels = read_rgb(tmp_path / "a.jpg").astype(int)
    assert (abs(pixels - (255, 0, 0)) <= 3).all()


def test_a_palette_with_transparency_does_not_warn(tmp_path: Path) -> None:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (read_rgb(tmp_path / "a.png") == RED).all()


def test_sixteen_bits_lose_the_low_byte(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 30_000, 65_535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = read_rgb(tmp_path / "a.png")
    assert pixels.shape == (1, 5, 3)
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 117, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.zeros((3, 3), dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff cannot be read"):
        read_rgb(tmp_path / "a.tiff")


def test_exif_does_not_rotate(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.jpg").shape == (4, 6, 3)
    with pytest.raises(DataError) as told:
        read_rgb(tmp_path / "a.jpg", expect=(6, 4))
    assert "EXIF" in told.value.fix


def test_another_size_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png", expect=(4, 6)).shape == (4, 6, 3)
    with pytest.raises(DataError, match=r"a\.png does not fit") as told:
        read_rgb(tmp_path / "a.png", expect=(5, 6))
    assert told.value.cause == "it has 6x4 pixels, its annotation says 6x5"


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.9])
def test_a_cut_file_is_refused(tmp_path: Path, keep: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(DataError, match=r"a\.jpg cannot be decoded") as told:
        read_rgb(path)
    assert told.value.code == 3
    assert (told.value.cause == "it is empty") == (keep == 0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_rgb, size):
        with pytest.raises(DataError, match=r"gone\.jpg is missing"):
            read(tmp_path / "gone.jpg")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    for read in (read_rgb, size):
        with pytest.raises(DataError, match="cannot be decoded"):
            read(tmp_path / "a.jpg")


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="cannot be decoded") as told:
        read_rgb(tmp_path / "a.png")
    assert "exceeds limit" in told.value.cause


def test_size_reads_the_header_alone(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:-40])
    assert size(tmp_path / "a.jpg") == (40, 60)


def test_digest_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
