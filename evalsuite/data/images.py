"""Reading image files from strangers: which files are images, their pixels as RGB or labels, and telling files apart.

What is an image: a file of one of :data:`SUFFIXES` in any letter case, which is not :func:`clutter`. Every reader that
looks into folders does so by :func:`walk`, :func:`list_images` or :func:`images_by_name`.

EXIF orientation: images and masks are turned upright as EXIF says, as OpenCV, detectron2 and viewers do. The exception
is an image with an annotated size that only the pixels as stored have: it was annotated as stored, and is read so.

Depth: values of 16 bits become 8 by the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value of the file:
cameras, scanners and detectors store 10 to 14 bits in 16 and rarely say so. A PNG's ``sBIT`` chunk says so, and is
believed where the values are not scaled to 16 bits already. 8 bits are taken as they are.
"""

from __future__ import annotations

import codecs
import hashlib
import math
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from evalsuite.data import Report
from evalsuite.data.dicom import DICOM, decode_dicom, shows_dicom
from evalsuite.data.draws import hashed
from evalsuite.errors import DataError, ImageError
from evalsuite.files import open_regular, read_regular, refuse_special, special

__all__ = [
    "DECODING",
    "DRAWN",
    "SUFFIXES",
    "Decoded",
    "Labels",
    "Listing",
    "clutter",
    "decode",
    "digest",
    "duplicates",
    "hashed",
    "header_palette",
    "images_by_name",
    "leads_back",
    "leads_out",
    "list_images",
    "listed_name",
    "not_utf8",
    "orientation",
    "read_labels",
    "read_lines",
    "read_list",
    "read_rgb",
    "relative_name",
    "same_names",
    "size",
    "subfolder",
    "turn_note",
    "turned",
    "unfitting",
    "walk",
]

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", *DICOM,
)  # fmt: skip
DECODING = 3  # raised when the same file decodes to other pixels than before: features cached of those are stale

DRAWN = ("train", "test")  # the splits of data that have none, see hashed

# Only formats whose decoders are plain libraries: EPS, for one, would start a PostScript interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_ESCAPES = re.compile(r"(^|/)\.\.(/|$)|^/|\\|^[A-Za-z]:|\0")
# What file managers, storage servers and archivers leave beside people's files: thumbnails, copies, bins.
_CLUTTER = {
    "@eadir", "@recycle", "@__thumb", "@tmp", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "recycler",
    "system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__",
}  # fmt: skip
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {**_TURNS, 6: _TURNS[8], 8: _TURNS[6]}
Image.init()  # until then Pillow knows only some of them, and says KeyError of the others


def clutter(name: str) -> bool:
    """Whether a file or folder of that name is none of the data: a hidden one (``.ipynb_checkpoints``, ``._a.jpg``), or
    what a tool left there (``@eaDir``, ``__MACOSX``, ``Thumbs.db``)."""
    return name.startswith(".") or name.lower() in _CLUTTER


def walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Files below a folder at any depth, in the order of their names, without :func:`clutter`; none where there is no
    folder. Pipes, sockets and devices are among them.

    Links are followed, and each folder is entered once. A link that leads back to a folder around it is left out, with
    what can be reached by it alone: it would show a split's or a class's images as those of another.
    """
    return iter(_walk(folder).files)


class _Walked(NamedTuple):
    """Files below a folder, and how far up the links below it lead back: the place of the topmost such folder in the
    way that led here."""

    files: list[os.DirEntry[str]]
    back: float


def _walk(folder: Path) -> _Walked:
    seen: set[str] = set()

    def enter(path: str, way: tuple[str, ...]) -> _Walked:
        files, back = list[os.DirEntry[str]](), math.inf
        with os.scandir(path) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            if clutter(entry.name):
                continue
            if not os.path.isdir(entry.path):  # entry.is_dir() raises for a link to itself
                files.append(entry)
                continue
            real = os.path.realpath(entry.path)
            around = next((place for place, above in enumerate(way) if _holds(real, above)), math.inf)
            back = min(back, around)
            if around < math.inf or real in seen:
                continue
            before = set(seen) if entry.is_symlink() else set[str]()
            seen.add(real)
            inner = enter(entry.path, (*way, real))
            back = min(back, inner.back)
            if entry.is_symlink() and inner.back < len(way):  # by this link one comes back here
                seen.intersection_update(before)
            else:
                files += inner.files
        return _Walked(files, back)

    if not folder.is_dir():
        return _Walked([], math.inf)
    top = os.path.realpath(folder)
    seen.add(top)
    return enter(str(folder), (top,))


def _holds(folder: str, path: str) -> bool:
    """Whether a folder is ``path``, or one above it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one that holds it."""
    return folder.is_symlink() and _holds(os.path.realpath(folder), os.path.realpath(folder.parent))


class Listing(NamedTuple):
    """What :func:`walk` found: images, and how many other files of each suffix (lower case, "" without one), pipes,
    sockets and devices."""

    images: list[os.DirEntry[str]]
    others: Counter[str]

    @property
    def note(self) -> str | None:
        """The other files in a sentence; None where there are none."""
        if not self.others:
            return None
        kinds = ", ".join(f"{n} {suffix or 'without a suffix'}" for suffix, n in self.others.most_common(5))
        count = self.others.total()
        return f"{count} {'file is no image' if count == 1 else 'files are no images'}: {kinds}"


def list_images(folder: Path, folders: Sequence[str] = ("",), suffixes: Sequence[str] = SUFFIXES) -> Listing:
    """Images below ``folder``, or below these folders of it one after the other, at any depth."""
    found = Listing([], Counter())
    for entry in (entry for name in folders for entry in walk(folder / name)):
        suffix = os.path.splitext(entry.name)[1].lower()
        if not entry.is_file(follow_symlinks=False) and (kind := special(entry.path)) is not None:
            found.others[kind.removeprefix("a ") if suffix in suffixes else suffix] += 1
        elif suffix not in suffixes and not (_bare(suffix) and DICOM[0] in suffixes and shows_dicom(Path(entry.path))):
            found.others[suffix] += 1
        else:
            found.images.append(entry)
    return found


def _bare(suffix: str) -> bool:
    """Whether a suffix says nothing: of DICOM's files names are numbers, with dots or without."""
    return not suffix.strip(".0123456789")


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its suffix, or by its bytes where it has none."""
    suffix = path.suffix.lower()
    return suffix in DICOM or (_bare(suffix) and shows_dicom(path))


def images_by_name(folder: Path, ending: str = "", suffixes: Sequence[str] = SUFFIXES) -> dict[str, list[Path]]:
    """Images below a folder at any depth, by their path there (with ``/``) without ``ending`` and suffix.

    Names that do not end so are left out. Images of one name are in the order of ``suffixes``.
    """
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for entry in list_images(folder, suffixes=suffixes).images:
        path, suffix = os.path.splitext(os.path.relpath(entry.path, folder))
        stem = (path if suffix.lower() in suffixes else path + suffix).replace(os.sep, "/")
        if stem.endswith(ending):
            found[stem.removesuffix(ending)].append(Path(entry.path))
    for paths in found.values():
        paths.sort(key=lambda path: [*suffixes, path.suffix.lower()].index(path.suffix.lower()))
    return dict(found)


def same_names(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """{name: the known one} of names that are not known, where one known name is the same but for letter case and how
    its accents are encoded (macOS decomposes them). Names of which two would be the same are left out."""
    names, there = set(names), set(known)
    lost, free = sorted(names - there), sorted(there - names)
    if not lost or not free:
        return {}
    alike: defaultdict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, listed in enumerate((lost, free)):
        for name in listed:
            alike[unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())][side].append(name)
    return {mine[0]: theirs[0] for mine, theirs in alike.values() if len(mine) == len(theirs) == 1}


class Decoded(NamedTuple):
    """An image (H, W, 3) uint8 RGB, and what reading it had to settle, as predicates of the image in the plural."""

    pixels: NDArray[np.uint8]
    notes: tuple[str, ...] = ()


def read_rgb(path: Path, expect: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Decode an image to (H, W, 3) uint8 RGB.

    Grey, palette and CMYK images are converted, alpha is dropped, 16-bit values are scaled by the depth of the data
    (see above). Images are turned upright as EXIF says; with ``expect``, the annotated (height, width), they are left
    as stored where only that has this size. Files named ``.dcm``, and those without a suffix that begin so, are read as
    DICOM (:func:`evalsuite.data.dicom.read_dicom`). Raises :class:`ImageError` naming the file if it is missing or does
    not decode whole, and :class:`DataError` if it has another size.
    """
    return decode(path, expect).pixels


def decode(path: Path, expect: tuple[int, int] | None = None) -> Decoded:
    """:func:`read_rgb`, with what verification tells of the image."""
    if is_dicom(path):
        found = Decoded(*decode_dicom(path))
        if expect is not None and found.pixels.shape[:2] != expect:
            raise _mismatch(path, found.pixels.shape[:2], expect)
        return found
    try:
        with _opened(path) as image:
            turn = _Turn.of(image)
            if expect is not None and expect not in (turn.upright, turn.stored):
                raise _mismatch(path, turn.stored, expect)
            pixels, notes = _rgb(path, image, turn, expect)
            return Decoded(pixels, (*notes, *(["carry an EXIF turn"] if turn.code != 1 else ())))
    except DataError:
        raise
    except Exception as error:  # on a broken file decoders raise OSError, SyntaxError, struct.error, ...
        raise _unreadable(path, error) from error


class Labels(NamedTuple):
    """A label image: ``pixels`` (H, W) uint8 or int32 numbers, or (H, W, 3) uint8 colours. ``palette`` (P, 3) uint8 are
    the colours of the numbers, where the file has any."""

    pixels: NDArray[np.uint8] | NDArray[np.int32]
    palette: NDArray[np.uint8] | None


def read_labels(path: Path, expect: tuple[int, int] | None = None) -> Labels:
    """Decode a label image without changing a number: no palette is applied, 16 bits stay 16 bits.

    Alpha is dropped. ``expect`` is its image's (height, width); masks are turned as images are. Raises
    :class:`DataError` naming the file if it is missing, does not decode whole, has another size, or is of a kind that
    cannot hold labels: a lossy JPEG, floats.
    """
    try:
        with _opened(path) as image:
            turn = _Turn.of(image)
            if expect is not None and expect not in (turn.upright, turn.stored):
                raise unfitting(path, turn.stored, expect)
            return _labels(path, turn.apply(image, expect))
    except DataError:
        raise
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def header_palette(path: Path) -> bytes | None:
    """The palette of a file whose pixels are numbers of one, as red, green and blue; None where they are not.

    A grey GIF is one too, though Pillow hides that. Raises :class:`DataError` naming the file.
    """
    try:
        with _opened(path) as image:
            if image.mode == "P":
                plain = image.format == "PNG" and image.palette is not None and image.palette.rawmode == "RGB"
                return bytes(image.palette.palette if plain and image.palette else image.getpalette() or ())
            return bytes(np.repeat(np.arange(256), 3)) if (image.format, image.mode) == ("GIF", "L") else None
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def subfolder(folder: Path, names: Sequence[str]) -> Path:
    """The folder of one of these names, in any letter case, or of the first where none is there."""
    there = {each.name.lower(): each for each in folder.iterdir() if each.is_dir()} if folder.is_dir() else {}
    return next((there[name.lower()] for name in names if name.lower() in there), folder / names[0])


def unfitting(path: Path, found: tuple[int, int], expect: tuple[int, int]) -> DataError:
    """The refusal of a mask (height, width) that is not as large as its image."""
    return DataError(
        f"mask {path} does not fit its image",
        cause=f"it has {found[1]}x{found[0]} pixels, its image {expect[1]}x{expect[0]}",
        fix="restore the pair at one size; a mask is enlarged or reduced by nearest neighbour only",
    )


def size(path: Path, expect: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) that :func:`read_rgb` with the same ``expect`` gives, from the header, without decoding.

    It is the upright size where neither is the expected one. Raises :class:`DataError` naming the file.
    """
    return _turn(path).size(expect)


def orientation(path: Path) -> int:
    """The EXIF orientation of an image, 2 to 8; 1 where it says nothing. Raises :class:`DataError` naming the file."""
    return _turn(path).code


def turned(paths: Iterable[Path]) -> list[Path]:
    """Which of these images carry an EXIF turn; a file that cannot be read does not."""
    found = []
    for path in paths:
        try:
            if not is_dicom(path) and orientation(path) != 1:
                found.append(path)
        except DataError:  # told of by whoever decodes it
            continue
    return found


def turn_note(images: Iterable[tuple[Path, tuple[int, int]]]) -> str | None:
    """A sentence on those of some images, of the annotated (height, width), that carry an EXIF turn; None without any.

    Which way an image was annotated is told by its size; where both ways have the same, nothing tells it.
    """
    upright = stored = untold = 0
    for path, expect in images:
        try:
            turn = None if is_dicom(path) else _turn(path)
        except DataError:  # told of by whoever decodes it
            continue
        if turn is not None and turn.code != 1:
            untold += turn.upright == turn.stored
            upright += turn.upright != turn.stored and expect != turn.stored
            stored += turn.upright != turn.stored and expect == turn.stored
    parts = [f"{upright} are turned upright" if upright else "", f"{stored} are annotated as stored" if stored else ""]
    parts.append(f"of {untold} the size does not tell which way they were annotated: turned upright" if untold else "")
    count = upright + stored + untold
    return f"{count} images carry an EXIF turn: {', '.join(part for part in parts if part)}" if count else None


def _opened(path: Path) -> ImageFile.ImageFile:
    refuse_special(path)
    return Image.open(path, formats=_FORMATS)


class _Turn(NamedTuple):
    """The EXIF orientation of an image; its (height, width) as stored and upright; whether loading turns it."""

    code: int
    stored: tuple[int, int]
    upright: tuple[int, int]
    itself: bool

    @classmethod
    def of(cls, image: Image.Image) -> _Turn:
        """Of an image that is opened and not loaded."""
        code, given = _code(image), (image.height, image.width)
        other = given[::-1] if code >= 5 else given
        itself = image.format == "TIFF"  # Pillow turns these as they are loaded, and says so in their size
        return cls(code, other if itself else given, given if itself else other, itself)

    def size(self, expect: tuple[int, int] | None) -> tuple[int, int]:
        return self.stored if expect == self.stored else self.upright

    def apply(self, image: Image.Image, expect: tuple[int, int] | None) -> Image.Image:
        """Upright, or as stored where ``expect`` is of that alone."""
        if isinstance(image, ImageFile.ImageFile):
            image.filename = ""  # else Pillow 13 maps an uncompressed TIFF into memory, by its upright size: garbage
        image.load()
        as_stored = expect is not None and expect != self.upright
        if self.code == 1 or as_stored != self.itself:
            return image
        result = image.transpose((_BACK if as_stored else _TURNS)[self.code])
        result.format = image.format
        return result


def _turn(path: Path) -> _Turn:
    try:
        with _opened(path) as image:
            return _Turn.of(image)
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _code(image: Image.Image) -> int:
    """The EXIF orientation; 1 too where the EXIF data cannot be read, which viewers overlook as well."""
    try:
        code = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # not PngImageFile's, which decodes
    except Exception:  # whatever bytes that are no EXIF data make its parser raise
        return 1
    return code if code in _TURNS else 1


def digest(path: Path) -> str:
    """sha256 of the file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises :class:`DataError` naming a file without any, or no text."""
    try:
        data = read_regular(file)
    except FileNotFoundError as error:
        raise _no_list(file, "there is no such file") from error
    except OSError as error:
        raise _no_list(file, str(error)) from error
    if encoding := not_utf8(data):
        raise DataError(f"{file} cannot be read", cause=encoding.cause, fix=encoding.fix)
    lines = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise _no_list(file, "it lists no image")
    return lines


def read_list(file: Path) -> list[str]:
    """:func:`read_lines` that name files below some folder, with / for the \\ of Windows; a name that leads elsewhere
    is refused too."""
    names = []
    for line in read_lines(file):
        name = relative_name(line)
        if name is None:
            raise _no_list(file, f"{line!r} leads out of the image folder")
        names.append(name)
    return names


def listed_name(line: str, known: Collection[str]) -> str:
    """Which of the ``known`` names (paths without suffix) a line of a list means: with or without a folder, a suffix,
    and the 1, 0 or -1 that lists of one class have. The line itself where it means none."""
    for name in (line, line.removeprefix("./"), re.sub(r"\s+-?[01]$", "", line)):
        stem, suffix = os.path.splitext(name)
        stem = stem if suffix.lower() in (*SUFFIXES, ".xml") else name
        for each in (name, stem, stem.rpartition("/")[2]):
            if each in known:
                return each
    return line


def relative_name(name: str) -> str | None:
    """A file's name in a stranger's list, with / for the \\ of Windows; None where it may lead out of the folder it
    counts from."""
    name = name.replace("\\", "/")
    return None if leads_out(name) else name


def leads_out(name: str) -> bool:
    """Whether a file's name in a stranger's list may lead out of the folder it counts from."""
    return _ESCAPES.search(name) is not None


class Encoding(NamedTuple):
    """Why bytes are no UTF-8 text, and what to do."""

    cause: str
    fix: str


def not_utf8(data: bytes) -> Encoding | None:
    """What other encoding a text has; None where it is UTF-8, with a byte order mark or without."""
    kind = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if kind is None and b"\0" in data:
        kind = "UTF-16LE" if data[1::2].count(0) >= data[::2].count(0) else "UTF-16BE"
    if kind is None:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            line, kind = data.count(b"\n", 0, error.start) + 1, "CP1252"
            cause = f"line {line} has the byte 0x{data[error.start]:02x}, which is no UTF-8 but may be Windows' CP1252"
        else:
            return None
    else:
        cause = f"it is {kind}, not UTF-8"
    return Encoding(cause, f"save it as UTF-8, or: iconv -f {kind} -t UTF-8 FILE > NEW")


def _no_list(file: Path, reason: str) -> DataError:
    return DataError(f"{file} cannot be read", cause=reason, fix="restore or correct the file")


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
    if image.format in ("JPEG", "MPO"):
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


def _rgb(
    path: Path, image: ImageFile.ImageFile, turn: _Turn, expect: tuple[int, int] | None
) -> tuple[NDArray[np.uint8], list[str]]:
    deep = image.mode in ("RGB", "RGBA") and any("16" in str(tile.args) for tile in image.tile)
    loaded = turn.apply(image, expect)
    if loaded.mode in ("I", "F") and image.format != "PPM":
        raise ImageError(
            f"image {path} cannot be read",
            cause="its pixels are 32-bit numbers, whose range nothing tells",
            fix="convert it to 8 or 16 bits",
        )
    if loaded.mode == "I" or loaded.mode.startswith("I;16"):
        depth, grey = _eight_bits(path, np.asarray(loaded).astype(np.uint16))
        return np.repeat(grey[:, :, None], 3, axis=2), _depth_note(depth)
    if loaded.mode in ("P", "PA"):
        loaded = loaded.convert("RGBA")  # straight to RGB warns where the palette has transparency
    pixels = np.array(loaded.convert("RGB"))
    if deep and pixels.max(initial=0) < 1 << 6:  # Pillow gives the high bytes alone, and there may be nothing in them
        depth, pixels = _eight_bits(path, pixels * np.uint16(256) + _low_bytes(path, turn, expect))
        return pixels, _depth_note(depth)
    return pixels, []


_DEPTHS = (8, 10, 12, 14, 16)


def _eight_bits(path: Path, values: NDArray[np.uint16]) -> tuple[int, NDArray[np.uint8]]:
    """How many bits 16-bit values hold, and the upper eight of those."""
    top = int(values.max(initial=0))
    depth = next(bits for bits in _DEPTHS if top < 1 << bits)
    said = _significant_bits(path)
    if said is not None and 8 <= said <= 16:
        scaled = top >= 1 << said or not (values & ((1 << (16 - said)) - 1)).any()
        depth = 16 if scaled else said
    return depth, (values >> (depth - 8)).astype(np.uint8)


def _depth_note(depth: int) -> list[str]:
    return [f"hold {depth} bits in 16, and are scaled by that"] if depth < 16 else []


def _significant_bits(path: Path) -> int | None:
    """What a PNG's ``sBIT`` chunk says (PNG specification, 11.3.2.7); None where there is none."""
    with open_regular(path) as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return None
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"sBIT":
                return max(file.read(length), default=None)
            if kind == b"IDAT":
                return None
            file.seek(length + 4, os.SEEK_CUR)
    return None


def _low_bytes(path: Path, turn: _Turn, expect: tuple[int, int] | None) -> NDArray[np.uint8]:
    """(H, W, 3): the other bytes of an image of 16 bits and several channels, by naming the wrong byte order."""
    swapped = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
    with _opened(path) as image:
        for number, tile in enumerate(image.tile):
            raw, *rest = (tile.args,) if isinstance(tile.args, str) else tile.args or ("",)
            raw = f"{raw[:-3]}{swapped[raw[-3:]]}"
            image.tile[number] = tile._replace(args=(raw, *rest) if rest else raw)
        return np.asarray(turn.apply(image, expect).convert("RGB"))


def _mismatch(path: Path, found: tuple[int, int], expect: tuple[int, int]) -> DataError:
    cause = f"it has {found[1]}x{found[0]} pixels, its annotation says {expect[1]}x{expect[0]}"
    fix = "restore the original image, or correct the annotation"
    if found == expect[::-1]:
        fix = "turn the image or its annotation: no EXIF orientation says that it is shown on its side"
    return DataError(f"image {path} does not fit its annotation", cause=cause, fix=fix)


def _unreadable(path: Path, error: Exception) -> ImageError:
    if isinstance(error, FileNotFoundError):
        return ImageError(f"image {path} is missing", cause="there is no such file", fix="restore it")
    empty = path.is_file() and path.stat().st_size == 0
    reason = "it is empty" if empty else str(error) or type(error).__name__
    return ImageError(f"image {path} cannot be decoded", cause=reason, fix="restore the file from its source")
