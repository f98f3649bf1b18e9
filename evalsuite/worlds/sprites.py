"""Flat shapes drawn as Spriteworld's PIL renderer draws them: ten times too large, then reduced by a Lanczos filter.

The look is that of google-deepmind/spriteworld (shapes.py, constants.py, renderers/pil_renderer.py): outlines of area
one times the squared scale, the later sprite on top, a black ground, y upwards. What is drawn here is equal to it to
within one grey level of 255 a pixel; the two roundings of the filter are the only freedom. It is fast because
:class:`Painter` repaints only the window that changed, as matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

__all__ = ["SHAPES", "Painter", "Sprite", "outline"]

Bytes = npt.NDArray[np.uint8]
SUPERSAMPLING = 10
LOBES = 3  # of the Lanczos filter, in output pixels
KEPT = 4096  # first passes over sprites; some kilobytes each
# corners, angle of the first one, kind
_FORMS: dict[str, tuple[int, float, str]] = {
    "square": (4, np.pi / 4, "polygon"),
    "triangle": (3, np.pi / 2, "polygon"),
    "star_4": (4, np.pi / 4, "star"),
    "circle": (30, 0.0, "polygon"),
    "pentagon": (5, np.pi / 2, "polygon"),
    "hexagon": (6, 0.0, "polygon"),
    "octagon": (8, 0.0, "polygon"),
    "star_5": (5, np.pi + np.pi / 10, "star"),
    "star_6": (6, 0.0, "star"),
    "spoke_4": (4, np.pi / 4, "spokes"),
    "spoke_5": (5, np.pi + np.pi / 10, "spokes"),
    "spoke_6": (6, 0.0, "spokes"),
}
SHAPES = tuple(_FORMS)


@cache
def outline(shape: str) -> npt.NDArray[np.float64]:
    """Corners (N, 2) of a shape of area one around the origin, x to the right and y upwards.

    Stars reach from an inner circle to twice its radius; spokes are rectangles of the circle's radius on its sides.
    Spriteworld normalises a star and spokes by formulas that are kept, so that sizes are the same as there.
    """
    corners, start, kind = _FORMS[shape]
    step = 2 * np.pi / corners
    angles = start + step * np.arange(corners)

    def ring(shift: float, radius: float = 1.0) -> npt.NDArray[np.float64]:
        return radius * np.stack([np.cos(angles + shift * step), np.sin(angles + shift * step)], axis=1)

    if kind == "polygon":
        points, area = ring(0), corners * np.sin(step / 2) * np.cos(step / 2)
    elif kind == "star":
        points = np.stack([ring(0), ring(0.5, 2.0)], axis=1).reshape(-1, 2)
        area = 2 * corners * np.sin(step / 2)
    else:
        here, before, after = ring(0), ring(-0.5), ring(0.5)
        points = np.stack([here + before, here, here + after], axis=1).reshape(-1, 2)
        area = corners * np.sin(step / 2) * (2 + np.cos(step / 2))
    path: npt.NDArray[np.float64] = points / np.sqrt(area)
    path.flags.writeable = False
    return path


@dataclass(frozen=True)
class Sprite:
    """A shape of one colour; position and scale are parts of the canvas, whose origin is below on the left."""

    x: float
    y: float
    shape: str
    scale: float
    rgb: tuple[int, int, int]

    def corners(self, canvas: int) -> npt.NDArray[np.int64]:
        """Whole pixels (N, 2) of a canvas of that width, y upwards; PIL drops the fractions, and so do we."""
        centre = np.array([self.x, self.y])
        whole: npt.NDArray[np.int64] = np.trunc(canvas * (centre + self.scale * outline(self.shape))).astype(np.int64)
        return whole


class _Box(NamedTuple):
    """A rectangle of canvas or output pixels; ends are exclusive."""

    left: int
    low: int
    right: int
    high: int

    def meets(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.low < other.high and other.low < self.high

    def joined(self, other: _Box) -> _Box:
        return _Box(
            min(self.left, other.left),
            min(self.low, other.low),
            max(self.right, other.right),
            max(self.high, other.high),
        )


class _Stamp(NamedTuple):
    """A shape at its position: its pixels on the canvas, and the first pass of the filter over them.

    ``box`` holds the mask (rows, columns) on the canvas, ``window`` the output pixels that are coloured; ``half`` is
    (rows of ``box``, columns of ``window``). Rows count upwards.
    """

    box: _Box
    window: _Box
    mask: npt.NDArray[np.bool_]
    half: npt.NDArray[np.float32]


@cache
def _weights(size: int) -> npt.NDArray[np.float32]:
    """Lanczos weights (size, size * 10) of canvas pixels in output pixels.

    As PIL's ``Image.resize``: the support is three output pixels on either side, cut off at the border and
    normalised.
    """
    width = size * SUPERSAMPLING
    centres = (np.arange(size)[:, None] + 0.5) * SUPERSAMPLING
    pixels = np.arange(width)[None]
    first = np.trunc(centres - LOBES * SUPERSAMPLING + 0.5)
    last = np.trunc(centres + LOBES * SUPERSAMPLING + 0.5)
    offset = (pixels - centres + 0.5) / SUPERSAMPLING
    weights = np.where(np.abs(offset) < LOBES, np.sinc(offset) * np.sinc(offset / LOBES), 0.0)
    weights[(pixels < first) | (pixels >= last)] = 0.0
    normalised: npt.NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normalised


@lru_cache(maxsize=KEPT)
def _stamp(shape: str, scale: float, x: float, y: float, size: int) -> _Stamp:
    canvas = size * SUPERSAMPLING
    corners = Sprite(x, y, shape, scale, (0, 0, 0)).corners(canvas)
    left, low = np.maximum(corners.min(axis=0), 0).tolist()
    right, high = np.minimum(corners.max(axis=0) + 1, canvas).tolist()
    box = _Box(left, low, max(right, left), max(high, low))
    image = Image.new("1", (box.right - box.left, box.high - box.low))
    ImageDraw.Draw(image).polygon((corners - (left, low)).ravel().tolist(), fill=1)
    mask = np.asarray(image)
    window = _Box(
        max(left // SUPERSAMPLING - LOBES, 0), max(low // SUPERSAMPLING - LOBES, 0),
        min(-(-right // SUPERSAMPLING) + LOBES, size), min(-(-high // SUPERSAMPLING) + LOBES, size),
    )  # fmt: skip
    return _Stamp(box, window, mask, _first_pass(mask, box, window, size))


def _first_pass(mask: npt.NDArray[np.bool_], box: _Box, window: _Box, size: int) -> npt.NDArray[np.float32]:
    across = _weights(size)[window.left : window.right, box.left : box.right]
    half: npt.NDArray[np.float32] = mask.astype(np.float32) @ across.T
    return half


class Painter:
    """Draws sprites on square images of ``size`` pixels."""

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._along = _weights(size)

    def paint(self, sprites: Sequence[Sprite], out: Bytes) -> None:
        """Fill ``out`` (size, size, 3) with the sprites, the last one on top."""
        stamps = self._stamps(sprites)
        out[:] = 0
        for window in _apart([stamp.window for stamp in stamps]):
            self._repaint(sprites, stamps, window, out)

    def move(self, before: Sequence[Sprite], after: Sequence[Sprite], out: Bytes) -> None:
        """Bring ``out``, which shows ``before``, to show ``after``: as many sprites, some of them elsewhere."""
        stamps = self._stamps(after)
        changed = [
            self._stamps([old])[0].window.joined(stamp.window)
            for old, new, stamp in zip(before, after, stamps, strict=True)
            if old != new
        ]
        for window in _apart(changed):
            self._repaint(after, stamps, window, out)

    def cover(self, sprites: Sequence[Sprite]) -> npt.NDArray[np.int64]:
        """The sprite seen at the middle of every pixel (size, size): its index in ``sprites``, -1 the background."""
        half = SUPERSAMPLING // 2
        seen = np.full((self.size, self.size), -1, dtype=np.int64)
        for number, (box, _, mask, _) in enumerate(self._stamps(sprites)):
            columns = np.arange(-(-(box.left - half) // SUPERSAMPLING), -(-(box.right - half) // SUPERSAMPLING))
            rows = np.arange(-(-(box.low - half) // SUPERSAMPLING), -(-(box.high - half) // SUPERSAMPLING))
            inside = mask[np.ix_(rows * SUPERSAMPLING + half - box.low, columns * SUPERSAMPLING + half - box.left)]
            window = np.ix_(rows, columns)
            seen[window] = np.where(inside, number, seen[window])
        return seen[::-1].copy()

    def _stamps(self, sprites: Sequence[Sprite]) -> list[_Stamp]:
        return [_stamp(s.shape, s.scale, s.x, s.y, self.size) for s in sprites]

    def _repaint(self, sprites: Sequence[Sprite], stamps: Sequence[_Stamp], window: _Box, out: Bytes) -> None:
        """Both passes over one window; what a sprite hides is taken out of those below it before the first."""
        reach = LOBES + 1
        low = max(window.low - reach, 0) * SUPERSAMPLING
        high = min(window.high + reach, self.size) * SUPERSAMPLING
        half = np.zeros((3, high - low, window.right - window.left), dtype=np.float32)
        for index, (sprite, stamp) in enumerate(zip(sprites, stamps, strict=True)):
            left, right = max(stamp.window.left, window.left), min(stamp.window.right, window.right)
            bottom, top = max(stamp.box.low, low), min(stamp.box.high, high)
            if left >= right or bottom >= top:
                continue
            first = self._seen(stamp, stamps[index + 1 :])
            rows = slice(bottom - stamp.box.low, top - stamp.box.low)
            part = first[rows, left - stamp.window.left : right - stamp.window.left]
            into = half[:, bottom - low : top - low, left - window.left : right - window.left]
            for channel, value in enumerate(sprite.rgb):
                if value:
                    into[channel] += value * part
        along = self._along[window.low : window.high, low:high]
        levels = _whole(along @ _whole(half))
        flipped = out[::-1]  # rows upwards
        flipped[window.low : window.high, window.left : window.right] = levels.transpose(1, 2, 0)

    def _seen(self, stamp: _Stamp, above: Sequence[_Stamp]) -> npt.NDArray[np.float32]:
        hiding = [other for other in above if other.box.meets(stamp.box)]
        if not hiding:
            return stamp.half
        mask, box = stamp.mask.copy(), stamp.box
        for other in hiding:
            left, right = max(box.left, other.box.left), min(box.right, other.box.right)
            low, high = max(box.low, other.box.low), min(box.high, other.box.high)
            mask[low - box.low : high - box.low, left - box.left : right - box.left] &= ~other.mask[
                low - other.box.low : high - other.box.low, left - other.box.left : right - other.box.left
            ]
        return _first_pass(mask, box, stamp.window, self.size)


def _apart(boxes: Sequence[_Box]) -> Iterator[_Box]:
    """Boxes that do not meet, which hold all of these."""
    left = list(boxes)
    while left:
        box = left.pop()
        while meeting := [other for other in left if other.meets(box)]:
            for other in meeting:
                left.remove(other)
                box = box.joined(other)
        yield box


def _whole(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rounded to grey levels, in place, as PIL does after each of its two passes."""
    values += np.float32(0.5)
    np.floor(values, out=values)
    return np.clip(values, 0, 255, out=values)
