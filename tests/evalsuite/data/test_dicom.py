"""DICOM files: the library's own arithmetic as the witness, real files of all kinds, and broken ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evalsuite.data.dicom import decode_dicom, read_dicom, windowed
from evalsuite.data.images import read_rgb
from evalsuite.data.radiographs import write_dicom
from evalsuite.errors import DataError, ImageError, ResourceError

pydicom = pytest.importorskip("pydicom", reason="needs the medical extra")

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.fixture
def dicom(tmp_path: Path) -> Callable[..., Path]:
    """A file of grey values with elements replaced; ``None`` removes one."""

    def write(pixels: np.ndarray = RAMP, **elements: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.dcm"
        write_dicom(path, RAMP)
        dataset = pydicom.dcmread(path)
        bits = 8 * pixels.dtype.itemsize
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.BitsAllocated = dataset.BitsStored = bits
        dataset.HighBit = bits - 1
        dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
        dataset.PixelData = pixels.tobytes()
        dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
        for name, value in elements.items():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)
        dataset.save_as(path)
        return path

    return write


def grey(path: Path, **how: Any) -> np.ndarray:
    pixels = read_dicom(path, **how)
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


def test_eight_bits_are_taken_as_they_are_and_monochrome1_is_inverted(tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP)
    write_dicom(tmp_path / "b.dcm", RAMP, inverted=True)
    assert pydicom.dcmread(tmp_path / "b.dcm").PhotometricInterpretation == "MONOCHROME1"
    stored = pydicom.dcmread(tmp_path / "b.dcm").pixel_array
    np.testing.assert_array_equal(stored, 255 - RAMP)
    for name in ("a.dcm", "b.dcm"):
        np.testing.assert_array_equal(grey(tmp_path / name), RAMP)
        np.testing.assert_array_equal(read_rgb(tmp_path / name)[:, :, 1], RAMP)


def test_deeper_values_are_stretched_and_rescaled(dicom):
    values = np.linspace(100, 1100, 256).astype(np.uint16).reshape(16, 16)
    expected = (255 * (values - 100.0) / 1000).round()
    np.testing.assert_array_equal(grey(dicom(values)), expected)
    # A slope below zero turns bright into dark.
    np.testing.assert_array_equal(grey(dicom(values, RescaleSlope=-2.0, RescaleIntercept=5.0)), 255 - expected)
    assert (grey(dicom(np.full((4, 4), 900, np.int16))) == 0).all()


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_a_window_is_the_librarys(dicom, function):
    values = np.linspace(-900, 1100, 256).astype(np.int16).reshape(16, 16)
    path = dicom(
        values, WindowCenter=[40.0, 1.0], WindowWidth=[400.0, 2.0], VOILUTFunction=function, RescaleSlope=2.0,
        RescaleIntercept=-100.0,
    )  # fmt: skip
    dataset = pydicom.dcmread(path)
    rescaled = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    ends = pydicom.pixels.apply_windowing(np.array([-1e4, 1e4]), dataset)
    expected = (pydicom.pixels.apply_windowing(rescaled, dataset) - ends[0]) / (ends[1] - ends[0])
    np.testing.assert_allclose(grey(path), 255 * expected, atol=0.51)
    np.testing.assert_array_equal(grey(dicom(values, WindowCenter=0.0, WindowWidth=1.0)), 255 * (values > -0.5))


def test_windows_by_hand():
    # PS3.3 C.11.2.1.2.1, the standard's own example: centre 2048, width 4096 covers 0 to 4095.
    np.testing.assert_allclose(windowed(np.array([0.0, 4095.0, -5.0, 5000.0]), 2048, 4096), [0, 1, 0, 1])
    assert windowed(np.array([2047.5]), 2048, 4096) == pytest.approx(0.5)
    assert windowed(np.array([50.0]), 50, 10, "SIGMOID") == pytest.approx(0.5)


def test_a_voi_table_goes_before_a_window(dicom):
    item = pydicom.Dataset()
    item.LUTDescriptor = [256, 0, 8]
    item.LUTData = np.arange(255, -1, -1, dtype=np.uint16).tobytes()
    item["LUTData"].VR = "OW"
    path = dicom(VOILUTSequence=pydicom.Sequence([item]), WindowCenter=5.0, WindowWidth=2.0)
    np.testing.assert_array_equal(grey(path), 255 - RAMP)


def empty_table(**parts: Any) -> Any:
    """A sequence of one item, a look-up table that lacks what is not given."""
    item = pydicom.Dataset()
    for name, value in parts.items():
        setattr(item, name, value)
    return pydicom.Sequence([item])


@pytest.mark.parametrize(
    "elements",
    [
        {"VOILUTSequence": pydicom.Sequence([])},
        {"VOILUTSequence": empty_table()},
        {"VOILUTSequence": empty_table(LUTDescriptor=[256, 0, 8])},
        {"ModalityLUTSequence": pydicom.Sequence([])},
        {"ModalityLUTSequence": empty_table(ModalityLUTType="US")},
        {"RescaleSlope": "", "RescaleIntercept": ""},
        {"RescaleSlope": "1"},
        {"RescaleIntercept": "0", "RescaleSlope": ""},
        {"WindowCenter": "", "WindowWidth": ""},
        {"WindowCenter": "40"},
        {"WindowWidth": "400", "WindowCenter": ""},
        {"WindowCenter": ["", ""], "WindowWidth": ["", ""]},
        {"WindowCenter": "0", "WindowWidth": "0"},
        {"NumberOfFrames": "", "VOILUTFunction": "", "PlanarConfiguration": None},
    ],
    ids=lambda elements: ",".join(elements),
)
def test_optional_attributes_that_say_nothing_count_as_absent(dicom, elements):
    values = np.linspace(100, 1100, 256).astype(np.uint16).reshape(16, 16)
    path = dicom(values)
    dataset = pydicom.dcmread(path)
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    np.testing.assert_array_equal(grey(path), grey(dicom(values)))


def test_a_slope_without_an_intercept_is_used(dicom):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    both = dicom(values, RescaleSlope=2.0, RescaleIntercept=0.0, WindowCenter=100.0, WindowWidth=80.0)
    np.testing.assert_array_equal(
        grey(dicom(values, RescaleSlope=2.0, WindowCenter=100.0, WindowWidth=80.0)), grey(both)
    )


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("meta", [True, False])
def test_files_without_preamble_or_meta_header_are_read(dicom, tmp_path, implicit, meta):
    values = np.linspace(0, 4000, 256).astype(np.uint16).reshape(16, 16)
    dataset = pydicom.dcmread(dicom(values))
    bare = tmp_path / "bare.dcm"
    del dataset.preamble
    if not meta:
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
    if implicit and meta:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    dataset.save_as(bare, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert not bare.read_bytes().startswith(b"\0" * 128 + b"DICM")
    np.testing.assert_array_equal(grey(bare), (255.0 * values / values.max()).round())


def test_no_advice_is_for_a_python_caller(dicom, tmp_path):
    (tmp_path / "photo.dcm").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    (tmp_path / "words.dcm").write_bytes(b"These are words, and no image at all. " * 20)
    dataset = pydicom.dcmread(dicom())
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.save_as(tmp_path / "packed.dcm", implicit_vr=False, little_endian=True, enforce_file_format=False)
    for name in ("photo", "words", "packed"):
        with pytest.raises(ImageError, match="cannot be decoded") as refused:
            read_rgb(tmp_path / f"{name}.dcm")
        assert "force" not in str(refused.value)
    assert "compressed" in refused.value.cause


@pytest.mark.parametrize(
    ("centre", "width", "off"),
    [(-5000.0, 100.0, True), (90_000.0, 400.0, True), (1095.0, 2.0, False), (600.0, 800.0, False), (600.0, 1e6, False)],
)
def test_a_window_off_the_values_is_told_and_not_used(dicom, centre, width, off):
    values = np.linspace(100, 1100, 256).astype(np.uint16).reshape(16, 16)
    pixels, notes = decode_dicom(dicom(values, WindowCenter=centre, WindowWidth=width))
    expected = 255 * windowed(values.astype(float), centre, width)
    if off:
        expected = 255 * (values - 100.0) / 1000
    assert np.abs(pixels[..., 0] - expected).max() <= 0.5
    assert bool(notes) == off
    assert decode_dicom(dicom(np.full((4, 4), 900, np.int16), WindowCenter=-9.0, WindowWidth=2.0))[1] == ()


def test_the_peers_way_scales_by_the_maximum_alone(dicom):
    values = np.array([[0, 60], [90, 120]], np.uint8)
    np.testing.assert_array_equal(grey(dicom(values), grey="max"), [[0, 128], [191, 255]])
    inverted = dicom(values, PhotometricInterpretation="MONOCHROME1", WindowCenter=1.0, WindowWidth=1.0)
    np.testing.assert_array_equal(grey(inverted, grey="max"), [[255, 127], [64, 0]])
    assert (grey(dicom(np.zeros((2, 2), np.uint8)), grey="max") == 0).all()


def test_broken_files_are_refused_by_name_in_three_lines(dicom, tmp_path):
    whole = dicom().read_bytes()
    broken = {
        "cut.dcm": whole[:-100], "header.dcm": whole[:140], "empty.dcm": b"", "text.dcm": b"not a DICOM file" * 40,
    }  # fmt: skip
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    frames = np.zeros((8, 8), np.uint8)
    told = {
        **{tmp_path / name: "" for name in broken},
        tmp_path / "gone.dcm": "is missing",
        dicom(PixelData=None): "holds no image",
        dicom(frames, NumberOfFrames=2, Rows=4): "holds 2 images",
        dicom(Rows=60_000, Columns=60_000): "60000x60000",
    }
    for path, words in told.items():
        with pytest.raises(ImageError) as refused:
            read_rgb(path)
        assert path.name in refused.value.problem
        assert words in refused.value.problem
        assert len(str(refused.value).splitlines()) == 3
        assert refused.value.code == 3


def test_without_the_extra_it_says_what_to_install(monkeypatch, tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP)
    monkeypatch.setitem(sys.modules, "pydicom.pixels", None)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ResourceError) as told:
        read_rgb(tmp_path / "a.dcm")
    assert told.value.fix == "pip install 'evalsuite[medical]'"


def test_another_size_than_annotated_is_refused(dicom):
    assert read_rgb(dicom(), expect=(16, 16)).shape == (16, 16, 3)
    with pytest.raises(DataError, match="does not fit its annotation"):
        read_rgb(dicom(), expect=(16, 20))


def test_real_files_of_all_kinds(realdata):
    folder = realdata / "med_dicom"
    found = {path.stem: read_rgb(path) for path in sorted(folder.glob("*.dcm"))}
    assert len(found) == 12
    assert all(pixels.dtype == np.uint8 and pixels.shape[2] == 3 for pixels in found.values())
    # SOURCE.md: byte-equal arrays, one tag apart, so one is the negative of the other.
    one, other = found["Fake_MONOHR1"], found["cxr_monochrome2_jpeg"]
    assert one.shape == (1024, 1024, 3)
    np.testing.assert_array_equal(one, 255 - other)
    # One image in three transfer syntaxes.
    np.testing.assert_array_equal(found["MR_small"], found["MR_small_RLE"])
    np.testing.assert_array_equal(found["MR_small"], found["MR_small_bigendian"])
    # One colour picture, whole and as a YBR JPEG.
    colours = found["SC_rgb_rle"]
    assert colours[0, 50].tolist() == [255, 0, 0]
    assert np.abs(colours.astype(int) - found["SC_rgb_jpeg_dcmtk"]).max() <= 8
    assert set(np.unique(found["liver_1frame"])) == {0, 255}
    assert len(np.unique(found["examples_palette"].reshape(-1, 3), axis=0)) > 200  # colours, not numbers of a palette
