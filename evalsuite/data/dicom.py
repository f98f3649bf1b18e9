"""Reading DICOM files from strangers: one grey or colour image a file, to eight-bit RGB, or refused by name."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from evalsuite.errors import DataError, ImageError, ResourceError
from evalsuite.files import open_regular, refuse_special

__all__ = ["DICOM", "Grey", "decode_dicom", "pydicom", "read_dicom", "shows_dicom", "windowed"]

DICOM = (".dcm", ".dicom", ".ima")
Grey = Literal["window", "max"]
Floats = NDArray[np.float64]

_MOST_PIXELS = 180_000_000  # as of Pillow's refusal of a decompression bomb; the largest radiographs have a tenth


def pydicom() -> ModuleType:
    """The library, which is an extra. Raises :class:`ResourceError` with the line that installs it."""
    try:
        import pydicom.pixels
    except ModuleNotFoundError as error:
        raise ResourceError(
            "DICOM files cannot be read here",
            cause=f"the module {error.name} is not installed",
            fix="pip install 'evalsuite[medical]'",
        ) from error
    found: ModuleType = pydicom
    return found


def read_dicom(path: Path, grey: Grey = "window") -> NDArray[np.uint8]:
    """Decode a DICOM file to (H, W, 3) uint8 RGB. Colour is converted to RGB, palettes are applied.

    ``window``: stored values go through the rescale slope and intercept (or the modality's table), then through the
    first window or VOI table of the file (DICOM PS3.3, C.11.2); without either, or where the window lies off the data
    and would leave nothing to see, eight bits are taken as they are, and other depths are stretched from the lowest
    value to the highest. ``max``: stored values times 255 / their maximum, as GLoRIA and MGCA read the RSNA files.
    MONOCHROME1, whose low values are bright, is inverted at the end. Attributes that are there and empty count as
    absent, and files without preamble or meta header are read by the encoding that their bytes show.

    Raises :class:`ImageError` naming a file that is missing, broken, no DICOM, or of several frames, and
    :class:`ResourceError` where the extra ``medical`` is not installed.
    """
    return decode_dicom(path, grey)[0]


def decode_dicom(path: Path, grey: Grey = "window") -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """:func:`read_dicom`, and what reading had to settle, as predicates of the image in the plural."""
    library = pydicom()
    try:
        refuse_special(path)
        dataset = library.dcmread(path, force=True)
        _check(path, dataset)
        told = _prepare(library, path, dataset)
        pixels, notes = _rgb(library, dataset, grey)
        return pixels, (*told, *notes)
    except DataError:
        raise
    except Exception as error:  # broken files make its parsers and decoders raise nearly anything
        raise _unreadable(path, error) from error


def shows_dicom(path: Path) -> bool:
    """Whether a file's bytes begin as DICOM's do (PS3.10, 7.1), whatever its name."""
    try:
        with open_regular(path) as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def windowed(values: Floats, centre: float, width: float, function: str = "LINEAR") -> Floats:
    """Values through a window, to [0, 1] (DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return np.asarray(expit(4 * (values - centre) / width))
    if function == "LINEAR":  # the edges of the window are centres of pixels, hence the halves
        centre, width = centre - 0.5, width - 1
    if width <= 0:  # a window of one value is a threshold
        return np.asarray(values > centre, dtype=np.float64)
    return np.asarray(((values - centre) / width + 0.5).clip(0, 1))


def _check(path: Path, dataset: Any) -> None:
    if not len(dataset) or ("PixelData" not in dataset and "SOPClassUID" not in dataset):
        raise ImageError(
            f"image {path} cannot be decoded",
            cause="it is no DICOM file, whatever its name says" if path.stat().st_size else "it is empty",
            fix="restore the file from its source, or give it the suffix of what it is",
        )
    if "PixelData" not in dataset:
        raise ImageError(
            f"{path} holds no image", cause="it is a DICOM file without pixels", fix="leave it out of the list"
        )
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise ImageError(
            f"{path} holds {frames} images", cause="one image a file is read", fix="export one frame a file"
        )
    if int(dataset.Rows) * int(dataset.Columns) > _MOST_PIXELS:
        raise ImageError(
            f"{path} says that it has {dataset.Columns}x{dataset.Rows} pixels",
            cause="that is more than any radiograph has, and may be meant to fill the memory",
            fix="restore the file from its source",
        )


def _prepare(library: ModuleType, path: Path, dataset: Any) -> tuple[str, ...]:
    """Take out optional attributes that say nothing; say how pixels are coded where there is no meta header, and which
    end of greys is bright where the file does not. Notes on the latter."""
    for name in _OPTIONAL:
        if name in dataset and _says_nothing(dataset[name]):
            del dataset[name]
    if ("RescaleSlope" in dataset) != ("RescaleIntercept" in dataset):
        dataset.RescaleSlope = dataset.get("RescaleSlope", 1)
        dataset.RescaleIntercept = dataset.get("RescaleIntercept", 0)
    notes: tuple[str, ...] = ()
    if not str(dataset.get("PhotometricInterpretation") or "").strip():
        dataset.SamplesPerPixel = int(dataset.get("SamplesPerPixel") or 1)
        dataset.PhotometricInterpretation = "RGB" if dataset.SamplesPerPixel == 3 else "MONOCHROME2"
        notes = (f"do not say how DICOM's numbers are shown, and are taken as {dataset.PhotometricInterpretation}",)
    if not getattr(dataset.file_meta, "TransferSyntaxUID", None):
        if dataset["PixelData"].is_undefined_length:
            raise ImageError(
                f"image {path} cannot be decoded",
                cause="its pixels are compressed, and without a meta header nothing says how",
                fix="export it again as a DICOM file with a meta header, or as PNG",
            )
        implicit, little = dataset.original_encoding
        kinds = library.uid
        plain = kinds.ExplicitVRLittleEndian if little else kinds.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = kinds.ImplicitVRLittleEndian if implicit else plain
    return notes


_OPTIONAL = (
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "RescaleType", "VOILUTSequence", "WindowCenter",
    "WindowWidth", "VOILUTFunction", "NumberOfFrames", "PlanarConfiguration", "PixelAspectRatio", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "ICCProfile", "ColorSpace", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
)  # fmt: skip


def _says_nothing(element: Any) -> bool:
    """Whether an attribute is empty, or a table that lacks what a table needs."""
    if element.VR == "SQ":
        return not element.value or not all(element.value[0].get(part) for part in ("LUTDescriptor", "LUTData"))
    return bool(element.is_empty) or (element.VM > 1 and str(element.value[0]).strip() in ("", "None"))


def _rgb(library: ModuleType, dataset: Any, grey: Grey) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    pixels = dataset.pixel_array  # decompressed, and YBR as RGB
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        colours = library.pixels.apply_color_lut(pixels, dataset)
        return np.ascontiguousarray(_bytes(colours, 8 * colours.dtype.itemsize)), ()
    if pixels.ndim == 3:
        return np.ascontiguousarray(_bytes(pixels, int(dataset.BitsStored))), ()
    shades, notes = _shades(library, dataset, pixels, grey)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shades = 255 - shades
    return np.repeat(shades[:, :, None], 3, axis=2), notes


def _bytes(colours: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """The high byte of each value."""
    return (colours >> max(0, bits - 8)).astype(np.uint8)


def _shades(
    library: ModuleType, dataset: Any, pixels: NDArray[Any], grey: Grey
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """(H, W) uint8, before a look at which end is bright, and notes."""
    if grey == "max":
        top = int(pixels.max())
        scaled = pixels.clip(0, None) * (255 / top) if top > 0 else np.zeros(pixels.shape)
        return np.asarray(scaled).round().astype(np.uint8), ()
    values = library.pixels.apply_modality_lut(pixels, dataset)
    share = _looked_up(library, dataset, values)
    if share is not None and _off(share) and values.min() < values.max():
        return _whole_range(dataset, values), (
            "have a DICOM window off their values, and are shown in their own range",
        )
    return _whole_range(dataset, values) if share is None else _grey(share), ()


def _looked_up(library: ModuleType, dataset: Any, values: NDArray[Any]) -> Floats | None:
    """Values through the VOI table or window of the file, to [0, 1]; None where it has none."""
    if "VOILUTSequence" in dataset:
        table = dataset.VOILUTSequence[0]
        looked_up: Floats = np.asarray(library.pixels.apply_voi(values, dataset), np.float64)
        return looked_up / (2.0 ** int(table.LUTDescriptor[2]) - 1)
    if "WindowWidth" in dataset and "WindowCenter" in dataset:
        centre, width = (_first(dataset[name].value) for name in ("WindowCenter", "WindowWidth"))
        if width > 0:  # zero is what exporters write for want of a window
            return windowed(np.asarray(values, np.float64), centre, width, dataset.get("VOILUTFunction") or "LINEAR")
    return None


def _off(share: Floats) -> bool:
    """Whether most is cut off at an end, and the rest is less than one grey level in sixteen apart."""
    cut = float(np.mean((share <= 0) | (share >= 1)))
    return cut > 0.5 and float(np.ptp(share)) < 1 / 16


def _whole_range(dataset: Any, values: NDArray[Any]) -> NDArray[np.uint8]:
    """Eight bits as they are, others from the lowest value to the highest."""
    if values.dtype == np.uint8 and dataset.BitsStored == 8:
        return np.asarray(values)
    low, high = float(values.min()), float(values.max())
    return _grey((np.asarray(values, np.float64) - low) / (high - low) if high > low else np.zeros(values.shape))


def _grey(share: Floats) -> NDArray[np.uint8]:
    return np.asarray((255 * share.clip(0, 1)).round(), dtype=np.uint8)


def _first(value: Any) -> float:
    """Of several windows, the first, which viewers show first."""
    return float(value if isinstance(value, (int, float, str)) else value[0])


def _unreadable(path: Path, error: Exception) -> ImageError:
    if isinstance(error, FileNotFoundError):
        return ImageError(f"image {path} is missing", cause="there is no such file", fix="restore it")
    reason = " ".join(str(error).split()) or type(error).__name__
    lacking = "missing dependencies" in reason
    fix = "pip install 'pylibjpeg[all]', which decodes more kinds" if lacking else "restore the file from its source"
    return ImageError(f"image {path} cannot be decoded", cause=reason, fix=fix)
