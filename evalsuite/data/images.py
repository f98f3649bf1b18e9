"""Reading image files from strangers: to eight-bit RGB or to labels, or refused by name; and telling files apart."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evalsuite.data import Report
from evalsuite.data.dicom import DICOM, read_dicom
from evalsuite.errors import DataError, ImageError

__all__ = [
    "SUFFIXES",
    "Labels",
    "digest",
    "duplicates",
    "fingerprint",
    "leads_out",
    "read_labels",
    "read_lines",
    "read_list",
    "read_rgb",
    "size",
    "unfitting",
]

SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".webp", ".bmp", ".tif", ".tiff", *DICOM)

# Only formats whose decoders are plain libraries: EPS, for one, would start a PostScript interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_ESCAPES = re.compile(r"(^|/)\.\.(/|$)|^/|\\|^[A-Za-z]:|\0")
Image.init()  # until then Pillow knows only some of them, and says KeyError of the others


def read_rgb(path: Path, expect: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Decode an image to (H, W, 3) uint8 RGB.

    Grey, palette and CMYK images are converted, alpha is dropped, 16-bit values lose their low byte (as
    OpenCV does). The EXIF orientation is not applied: boxes of COCO and VOC refer to pixels as stored.
    Files named ``.dcm`` are read as DICOM (:func:`evalsuite.data.dicom.read_dicom`). ``expect`` is the annotated
    (height, width). Raises :class:`ImageError` naming the file if it is missing or does not decode whole, and
    :class:`DataError` if it has another size.
    """
    if path.suffix.lower() in DICOM:
        pixels = read_dicom(path)
        if expect is not None and pixels.shape[:2] != expect:
            raise _mismatch(path, pixels.shape[:2], expect)
        return pixels
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if expect is not None and (image.height, image.width) != expect:
                raise _mismatch(path, (image.height, image.width), expect)
            return _rgb(path, image)
    except DataError:
        raise
    except Exception as error:  # on a broken file decoders raise OSError, SyntaxError, struct.error, ...
        raise _unreadable(path, error) from error


class Labels(NamedTuple):
    """A label image as stored: ``pixels`` (H, W) uint8 or int32 numbers, or (H, W, 3) uint8 colours. ``palette``
    (P, 3) uint8 are the colours of the numbers, where the file has any."""

    pixels: NDArray[np.uint8] | NDArray[np.int32]
    palette: NDArray[np.uint8] | None


def read_labels(path: Path, expect: tuple[int, int] | None = None) -> Labels:
    """Decode a label image without changing a number: no palette is applied, 16 bits stay 16 bits.

    Alpha is dropped. ``expect`` is its image's (height, width). Raises :class:`DataError` naming the file if it is
    missing, does not decode whole, has another size, or is of a kind that cannot hold labels: a lossy JPEG, floats.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if expect is not None and (image.height, image.width) != expect:
                raise unfitting(path, (image.height, image.width), expect)
            return _labels(path, image)
    except DataError:
        raise
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def unfitting(path: Path, found: tuple[int, int], expect: tuple[int, int]) -> DataError:
    """The refusal of a mask (height, width) that is not as large as its image."""
    return DataError(
        f"mask {path} does not fit its image",
        cause=f"it has {found[1]}x{found[0]} pixels, its image {expect[1]}x{expect[0]}",
        fix="restore the pair at one size; a mask is enlarged or reduced by nearest neighbour only",
    )


def size(path: Path) -> tuple[int, int]:
    """(height, width) from the header, without decoding. Raises :class:`DataError` naming the file."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.height, image.width
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def digest(path: Path) -> str:
    """sha256 of the file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises :class:`DataError` naming a file without any, or no text."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise _no_list(file, "there is no such file") from error
    except (OSError, ValueError) as error:
        raise _no_list(file, f"it is not UTF-8 text: {error}") from error
    if not lines:
        raise _no_list(file, "it lists no image")
    return lines


def read_list(file: Path) -> list[str]:
    """:func:`read_lines` that name files below some folder; a name that leads elsewhere is refused too."""
    names = read_lines(file)
    for name in names:
        if leads_out(name):
            raise _no_list(file, f"{name!r} leads out of the image folder")
    return names


def leads_out(name: str) -> bool:
    """Whether a file's name in a stranger's list may lead out of the folder it counts from."""
    return _ESCAPES.search(name) is not None


def _no_list(file: Path, reason: str) -> DataError:
    return DataError(f"{file} cannot be read", cause=reason, fix="restore or correct the file")


def fingerprint(contents: Iterable[str], files: Iterable[tuple[str, int]]) -> str:
    """sha256 over digests of annotation files and the (name, bytes) of images, in the order given."""
    state = hashlib.sha256()
    for content in contents:
        state.update(f"{content}\n".encode())
    for name, length in files:
        state.update(f"{name} {length}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def duplicates(
    report: Report,
    splits: Mapping[str, Sequence[Path]],
    digests: Mapping[Path, str],
    leaks: Callable[[str, str], bool],
) -> None:
    """Tell of files that are there twice: a fault in one split's list, or in two splits of which ``leaks(split,
    other)`` says so, else a note. ``digests`` are of the files that could be read."""
    places: defaultdict[str, dict[tuple[str, Path], None]] = defaultdict(dict)
    for split, paths in splits.items():
        listed: set[Path] = set()
        for path in paths:
            if path in listed:
                report.faults.append(f"{split} lists {path.name} twice")
            listed.add(path)
            if path in digests:
                places[digests[path]][split, path] = None
    for copies in places.values():
        told = ", ".join(f"{split}/{path.name}" for split, path in copies)
        if any(leaks(a, b) for (a, _), (b, _) in combinations(copies, 2)):
            report.faults.append(f"the same image is in several splits: {told}")
        elif len({path for _, path in copies}) > 1:
            report.notes.append(f"the same image is there under several names: {told}")


def _labels(path: Path, image: Image.Image) -> Labels:
    if image.format == "JPEG":
        raise DataError(
            f"mask {path} cannot be used",
            cause="it is a JPEG, which changes numbers along every edge",
            fix="export the masks as PNG",
        )
    if image.mode in ("RGBA", "LA"):
        image = image.convert(image.mode[:-1])
    if image.mode in ("RGB", "L", "1"):
        return Labels(np.array(image).astype(np.uint8), None)
    if image.mode == "P":
        colours = np.array(image.getpalette() or [], np.uint8).reshape(-1, 3)
        return Labels(np.array(image), colours)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Labels(np.array(image).astype(np.int32), None)
    raise DataError(
        f"mask {path} cannot be used",
        cause=f"its pixels are {image.mode}, neither whole numbers nor RGB colours",
        fix="export the masks as PNG: one channel of class numbers, a palette, or RGB colours",
    )


def _rgb(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in ("I", "F"):
        raise ImageError(
            f"image {path} cannot be read",
            cause="its pixels are 32-bit numbers, whose range nothing tells",
            fix="convert it to 8 or 16 bits",
        )
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # straight to RGB warns where the palette has transparency
    return np.array(image.convert("RGB"))


def _mismatch(path: Path, found: tuple[int, int], expect: tuple[int, int]) -> DataError:
    cause = f"it has {found[1]}x{found[0]} pixels, its annotation says {expect[1]}x{expect[0]}"
    fix = "restore the original image, or correct the annotation"
    if found == expect[::-1]:
        fix = "boxes refer to pixels as stored, before any EXIF rotation: turn the image or its boxes"
    return DataError(f"image {path} does not fit its annotation", cause=cause, fix=fix)


def _unreadable(path: Path, error: Exception) -> ImageError:
    if isinstance(error, FileNotFoundError):
        return ImageError(f"image {path} is missing", cause="there is no such file", fix="restore it")
    empty = path.is_file() and path.stat().st_size == 0
    reason = "it is empty" if empty else str(error) or type(error).__name__
    return ImageError(f"image {path} cannot be decoded", cause=reason, fix="restore the file from its source")
