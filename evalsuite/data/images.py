"""Reading image files from strangers: to eight-bit RGB, or refused by name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evalsuite.errors import DataError

__all__ = ["SUFFIXES", "digest", "read_rgb", "size"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".webp", ".bmp", ".tif", ".tiff")

# Only formats whose decoders are plain libraries: EPS, for one, would start a PostScript interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
Image.init()  # until then Pillow knows only some of them, and says KeyError of the others


def read_rgb(path: Path, expect: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Decode an image to (H, W, 3) uint8 RGB.

    Grey, palette and CMYK images are converted, alpha is dropped, 16-bit values lose their low byte (as
    OpenCV does). The EXIF orientation is not applied: boxes of COCO and VOC refer to pixels as stored.
    ``expect`` is the annotated (height, width). Raises :class:`DataError` naming the file if it is missing,
    does not decode whole, or has another size.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if expect is not None and (image.height, image.width) != expect:
                raise _mismatch(path, (image.height, image.width), expect)
            return _rgb(path, image)
    except DataError:
        raise
    except Exception as error:  # on a broken file decoders raise OSError, SyntaxError, struct.error, ...
        raise _unreadable(path, error) from error


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


def _rgb(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in ("I", "F"):
        raise DataError(
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


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"image {path} is missing", cause="there is no such file", fix="restore it")
    empty = path.is_file() and path.stat().st_size == 0
    reason = "it is empty" if empty else str(error) or type(error).__name__
    return DataError(f"image {path} cannot be decoded", cause=reason, fix="restore the file from its source")
