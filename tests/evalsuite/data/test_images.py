"""Images of every mode become eight-bit RGB; broken ones are refused by name."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evalsuite.data.classification import class_folders
from evalsuite.data.images import (
    decode,
    digest,
    images_by_name,
    list_images,
    orientation,
    read_labels,
    read_rgb,
    size,
    turned,
    walk,
)
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


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize(("top", "depth"), [(200, 8), (900, 10), (1023, 10), (4000, 12), (4096, 14), (16384, 16)])
def test_sixteen_bits_are_scaled_by_the_depth_of_the_data(tmp_path: Path, top: int, depth: int, suffix: str) -> None:
    values = np.linspace(0, top, 40).astype(np.uint16).reshape(5, 8)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    pixels, notes = decode(tmp_path / f"a{suffix}")
    assert (pixels == (values >> (depth - 8))[..., None]).all()
    assert notes == (() if depth == 16 else (f"hold {depth} bits in 16, and are scaled by that",))


def png(path: Path, values: np.ndarray, bits: int | None = None) -> Path:
    """A PNG of 16 bits, grey (H, W) or colours (H, W, C), with what ``sBIT`` says; written by the specification."""
    height, width, *channels = values.shape
    count = channels[0] if channels else 1
    rows = values.astype(">u2").reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    chunks = [(b"IHDR", header), *([(b"sBIT", bytes([bits] * count))] if bits else [])]
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return path


def test_what_a_png_says_of_its_bits_is_believed(tmp_path: Path) -> None:
    values = np.linspace(1, 900, 40).astype(np.uint16).reshape(5, 8)
    assert (read_rgb(png(tmp_path / "a.png", values, 12))[..., 0] == values >> 4).all()
    assert (read_rgb(png(tmp_path / "b.png", values << 4, 12))[..., 0] == values >> 4).all()  # as the standard wants
    assert (read_rgb(png(tmp_path / "c.png", values))[..., 0] == values >> 2).all()
    assert (read_rgb(png(tmp_path / "d.png", values, 16))[..., 0] == values >> 8).all()


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_of_several_channels_are_scaled_too(tmp_path: Path, channels: int) -> None:
    for top, depth in ((4000, 12), (60_000, 16)):
        values = np.linspace(0, top, 40 * channels).astype(np.uint16).reshape(5, 8, channels)
        pixels = read_rgb(png(tmp_path / f"{depth}.png", values))
        np.testing.assert_array_equal(pixels, values[..., :3] >> (depth - 8))


@pytest.mark.parametrize("order", ["<", ">"])
def test_colours_of_sixteen_bits_in_a_tiff_are_scaled_and_turned(tmp_path: Path, order: str) -> None:
    values = np.linspace(0, 1000, 5 * 8 * 3).astype(np.uint16).reshape(5, 8, 3)
    path = tmp_path / "a.tif"
    for code in (1, 6):
        path.write_bytes(tiff(values, order, code))
        shown = np.stack([ORIENTATIONS[code](values[..., i]) for i in range(3)], axis=2)
        np.testing.assert_array_equal(read_rgb(path), shown >> 2)


def tiff(values: np.ndarray, order: str, orientation: int) -> bytes:
    """A plain TIFF of (H, W, 3) 16-bit values in one strip; by the specification (TIFF 6.0)."""
    height, width, channels = values.shape
    data = values.astype(f"{order}u2").tobytes()
    bits = struct.pack(f"{order}3H", 16, 16, 16)
    tags = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8 + len(data)), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 8), (274, 3, 1, orientation), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data)),
    ]  # fmt: skip
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count)
        + (struct.pack(f"{order}HH", value, 0) if kind == 3 and count == 1 else struct.pack(f"{order}I", value))
        for tag, kind, count, value in tags
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data) + len(bits))
    return head + data + bits + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def test_a_grey_map_of_sixteen_bits_is_scaled_by_the_maximum_that_it_says(tmp_path: Path) -> None:
    values = np.linspace(0, 4095, 40).astype(np.uint16).reshape(5, 8)
    (tmp_path / "a.pgm").write_bytes(b"P5\n8 5\n4095\n" + values.astype(">u2").tobytes())
    assert np.abs(read_rgb(tmp_path / "a.pgm")[..., 0] - values / 4095 * 255).max() <= 1


def test_high_bytes_of_sixteen_bits_are_as_before(tmp_path: Path) -> None:
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


ORIENTATIONS = {  # how pixels (H, W) as stored are shown, by the numbers of the EXIF standard
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.T,
    6: lambda p: p[::-1].T,
    7: lambda p: p[::-1, ::-1].T,
    8: lambda p: p[:, ::-1].T,
}


def with_orientation(path: Path, code: int) -> np.ndarray:
    """A picture of 4x6 different values, which says that it is to be turned; as stored."""
    stored = (np.arange(24).reshape(4, 6) * 10).astype(np.uint8)
    image, exif = Image.fromarray(stored), Image.Exif()
    exif[0x0112] = code
    image.save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))
    return stored


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp"])
@pytest.mark.parametrize("code", ORIENTATIONS)
def test_images_are_turned_upright(tmp_path: Path, code: int, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    stored = with_orientation(path, code)
    upright = ORIENTATIONS[code](stored)
    assert size(path) == read_rgb(path).shape[:2] == upright.shape
    assert orientation(path) == code
    assert turned([path, tmp_path / "gone.png"]) == ([] if code == 1 else [path])
    for expect, shown in ((upright.shape, upright), (stored.shape, stored if upright.shape != (4, 6) else upright)):
        assert size(path, expect) == expect
        assert (read_rgb(path, expect)[..., 0] == shown).all()
    with pytest.raises(DataError, match="does not fit its annotation"):
        read_rgb(path, (5, 5))


def test_a_photograph_is_turned_by_the_exif_data_of_its_camera(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    exif[0x010F] = "camera"
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.jpg").shape == (60, 40, 3)
    assert size(tmp_path / "a.jpg") == (60, 40)
    with pytest.raises(DataError) as told:
        read_rgb(tmp_path / "a.jpg", expect=(61, 40))
    assert told.value.cause == "it has 60x40 pixels, its annotation says 40x61"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0no tiff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b""])
def test_exif_data_that_are_none_turn_nothing(tmp_path: Path, exif: bytes) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.jpg").shape == (4, 6, 3)
    assert orientation(tmp_path / "a.jpg") == 1


def test_masks_are_turned_as_their_images_are(tmp_path: Path) -> None:
    stored = with_orientation(tmp_path / "a.png", 6)
    assert (read_labels(tmp_path / "a.png").pixels == ORIENTATIONS[6](stored)).all()
    assert (read_labels(tmp_path / "a.png", expect=(4, 6)).pixels == stored).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (8, 8)).save(tmp_path / "b.jpg", exif=exif)
    with pytest.raises(DataError, match="cannot be used") as told:
        read_labels(tmp_path / "b.jpg")
    assert "JPEG" in told.value.cause


def test_every_kind_that_decodes_is_an_image_in_any_letter_case(tmp_path: Path) -> None:
    names = ["a.jpg", "b.JPEG", "c.Jfif", "d.jpe", "e.PNG", "f.WebP", "g.bmp", "h.DIB", "i.tif", "j.TIFF", "k.gif"]
    names += ["l.ppm", "m.PGM", "n.pbm", "o.pnm"]
    for name in names:
        kind = {"jfif": "JPEG", "jpe": "JPEG", "dib": "BMP"}.get(name[2:].lower())
        image = Image.new({"pgm": "L", "pbm": "1"}.get(name[2:].lower(), "RGB"), (3, 2))
        image.save(tmp_path / name, format=kind)
        assert read_rgb(tmp_path / name).shape == (2, 3, 3)
    for name in ("p.heic", "q.HEIC", "notes.txt", "README"):
        (tmp_path / name).write_text("x")
    found = list_images(tmp_path)
    assert [entry.name for entry in found.images] == names
    assert found.note == "4 files are no images: 2 .heic, 1 without a suffix, 1 .txt"
    assert set(images_by_name(tmp_path)) == set("abcdefghijklmno")


@pytest.mark.parametrize(
    "left", ["@eaDir", "__MACOSX", ".ipynb_checkpoints", ".thumbnails", "$RECYCLE.BIN", "lost+found", "@eadir"]
)
def test_what_tools_leave_is_no_image(tmp_path: Path, left: str) -> None:
    (tmp_path / left / "cat.png").mkdir(parents=True)
    for name in (f"{left}/a.png", f"{left}/cat.png/SYNOPHOTO_THUMB_M.jpg", "b.png", "._b.png", "Thumbs.db"):
        Image.new("L", (2, 2)).save(tmp_path / name, format="PNG")
    (tmp_path / "folder.png").mkdir()
    assert [entry.name for entry in walk(tmp_path)] == ["b.png"]
    assert images_by_name(tmp_path) == {"b": [tmp_path / "b.png"]}
    assert class_folders(tmp_path) == ["folder.png"]


def test_images_of_one_name_come_in_the_order_of_the_kinds(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("in/a_x.png", "in/a_x.JPG", "in/a_y.png"):
        Image.new("L", (2, 2)).save(tmp_path / name)
    assert images_by_name(tmp_path, "_x") == {"in/a": [tmp_path / "in" / "a_x.JPG", tmp_path / "in" / "a_x.png"]}
    assert images_by_name(tmp_path, suffixes=(".png",)).keys() == {"in/a_x", "in/a_y"}


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
