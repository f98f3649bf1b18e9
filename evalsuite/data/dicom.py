"""Reading DICOM files from strangers: one grey or colour image a file, to eight-bit RGB, or refused by name."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from evalsuite.errors import DataError, ImageError, ResourceError

__all__ = ["DICOM", "Grey", "pydicom", "read_dicom", "windowed"]

DICOM = (".dcm", ".dicom")
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
    first window or VOI table of the file (DICOM PS3.3, C.11.2); without either, eight bits are taken as they are, and
    other depths are stretched from the lowest value to the highest. ``max``: stored values times 255 / their maximum,
    as GLoRIA and MGCA read the RSNA files. MONOCHROME1, whose low values are bright, is inverted at the end.

    Raises :class:`ImageError` naming a file that is missing, broken, no DICOM, or of several frames, and
    :class:`ResourceError` where the extra ``medical`` is not installed.
    """
    library = pydicom()
    try:
        dataset = library.dcmread(path)
        _check(path, dataset)
        return _rgb(library, dataset, grey)
    except DataError:
        raise
    except Exception as error:  # broken files make its parsers and decoders raise nearly anything
        raise _unreadable(path, error) from error


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


def _rgb(library: ModuleType, dataset: Any, grey: Grey) -> NDArray[np.uint8]:
    pixels = dataset.pixel_array  # decompressed, and YBR as RGB
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        colours = library.pixels.apply_color_lut(pixels, dataset)
        return np.ascontiguousarray(_bytes(colours, 8 * colours.dtype.itemsize))
    if pixels.ndim == 3:
        return np.ascontiguousarray(_bytes(pixels, int(dataset.BitsStored)))
    shades = _shades(library, dataset, pixels, grey)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shades = 255 - shades
    return np.repeat(shades[:, :, None], 3, axis=2)


def _bytes(colours: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """The high byte of each value."""
    return (colours >> max(0, bits - 8)).astype(np.uint8)


def _shades(library: ModuleType, dataset: Any, pixels: NDArray[Any], grey: Grey) -> NDArray[np.uint8]:
    """(H, W) uint8, before a look at which end is bright."""
    if grey == "max":
        top = int(pixels.max())
        scaled = pixels.clip(0, None) * (255 / top) if top > 0 else np.zeros(pixels.shape)
        return np.asarray(scaled).round().astype(np.uint8)
    values = library.pixels.apply_modality_lut(pixels, dataset)
    if "VOILUTSequence" in dataset:
        table = dataset.VOILUTSequence[0]
        looked_up = library.pixels.apply_voi(values, dataset)
        share = np.asarray(looked_up, np.float64) / (2 ** int(table.LUTDescriptor[2]) - 1)
    elif dataset.get("WindowWidth") is not None:
        centre, width = (_first(dataset[name].value) for name in ("WindowCenter", "WindowWidth"))
        share = windowed(np.asarray(values, np.float64), centre, width, dataset.get("VOILUTFunction") or "LINEAR")
    elif values.dtype == np.uint8 and dataset.BitsStored == 8:
        return np.asarray(values)
    else:
        low, high = float(values.min()), float(values.max())
        share = (np.asarray(values, np.float64) - low) / (high - low) if high > low else np.zeros(values.shape)
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
