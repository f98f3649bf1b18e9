"""Demo worlds: textured shapes over clutter, drawn from a seed and written in a real data set's layout.

Six classes differ in shape and lean in hue and texture, so that a small network learns them in minutes, while
grey images, distractors, crowds, empty images and tiny difficult objects exercise what real data hold.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from evalsuite.errors import DataError

__all__ = [
    "SHAPES",
    "Scene",
    "Thing",
    "draw",
    "labelled",
    "once",
    "write_classes",
    "write_coco",
    "write_marks",
    "write_masks",
    "write_voc",
]

_VERSION = 1
_FINE = 4  # samples a pixel and axis
_SIZES = ((160, 120), (192, 108), (208, 117), (224, 126), (240, 136))
_SKY = (0.55, 0.75, 1.0)
_MARK = "demo.json"

Pixels = NDArray[np.float64]
Points = NDArray[np.float64]


def _polygon(corners: int, inner: float = 1.0, turn: float = 0.0) -> Points:
    """A regular polygon of radius 1; with ``inner`` below 1 every other corner is drawn in."""
    angles = turn + np.arange(corners) * (2 * math.pi / corners)
    radii = np.where(np.arange(corners) % 2, inner, 1.0)[:, None]
    points: Points = radii * np.stack([np.sin(angles), -np.cos(angles)], axis=1)
    return points


def _ring() -> Points:
    """An outer circle joined by a seam to an inner one run backwards: COCO polygons cannot have holes."""
    circle = _polygon(33)
    circle[-1] = circle[0]
    return np.concatenate([circle, 0.55 * circle[::-1]])


_ARM = np.array([(-1, -1), (-1, -3), (1, -3)])
_CROSS = np.concatenate([_ARM, _ARM[:, ::-1] * (-1, 1), -_ARM, _ARM[:, ::-1] * (1, -1)])

# Name: outline in the unit circle, COCO-like id (with gaps), the VOC class it stands for, hue.
SHAPES: dict[str, tuple[Points, int, str, float]] = {
    "disc": (_polygon(32), 1, "aeroplane", 0.58),
    "square": (_polygon(4, turn=math.pi / 4), 3, "bus", 0.02),
    "triangle": (_polygon(3), 7, "boat", 0.33),
    "star": (_polygon(10, inner=0.45), 18, "bird", 0.14),
    "ring": (_ring(), 44, "bicycle", 0.80),
    "cross": (_CROSS / 3.2, 90, "chair", 0.47),
}
_NAMES = tuple(SHAPES)


class Thing(NamedTuple):
    """One object: its shape's name, outline (P, 2) in continuous pixels, and whether it is hard to see."""

    shape: str
    outline: Points
    difficult: bool


@dataclass(frozen=True)
class Scene:
    """An image (H, W, 3) uint8, its objects, and at most one crowd: its shape's name and (H, W) bool mask. The first
    ``horizon`` rows are sky."""

    pixels: NDArray[np.uint8]
    things: tuple[Thing, ...]
    crowd: tuple[str, NDArray[np.bool_]] | None
    horizon: int = 0


def draw(rng: np.random.Generator, *, things: int, crowd: bool = False, grey: bool = False, sky: float = 0.0) -> Scene:
    """Draw one scene. No two objects overlap, and none leaves the image, so outlines are what is seen.

    The upper ``sky`` of its height is tinted blue.
    """
    width, height = _SIZES[rng.integers(len(_SIZES))]
    pixels = _background(rng, height, width)
    horizon = round(sky * height)
    pixels[:horizon] = 0.5 * pixels[:horizon] + 0.5 * np.array(_SKY)
    taken: list[tuple[float, float, float]] = []
    drawn, mask = [], None
    if crowd:
        shape, mask = _NAMES[rng.integers(len(_NAMES))], np.zeros((height, width), bool)
        for x, y, radius in _cluster(rng, height, width, taken):
            mask |= _paint(rng, pixels, shape, _outline(rng, shape, x, y, radius), faint=False) >= 0.5
        crowded = (shape, mask)
    for _ in range(things):
        shape = _NAMES[rng.integers(len(_NAMES))]
        difficult = bool(rng.random() < 0.12)
        radius = rng.uniform(5, 8) if difficult else rng.uniform(10, 0.3 * height)
        spot = _free(rng, height, width, radius, taken)
        if spot is not None:
            outline = _outline(rng, shape, *spot, radius)
            _paint(rng, pixels, shape, outline, faint=difficult)
            drawn.append(Thing(shape, outline, difficult))
    if grey:
        pixels[:] = (pixels @ (0.299, 0.587, 0.114))[:, :, None]
    noisy = pixels + rng.normal(0, 0.02, (height, width, 1 if grey else 3))
    final = (noisy.clip(0, 1) * 255).round().astype(np.uint8)
    return Scene(final, tuple(drawn), crowded if crowd else None, horizon)


def write_coco(path: Path, seed: int = 0, images: int = 64) -> Path:
    """A COCO tree at ``path``: ``images`` in train2017, a third as many in val2017.

    Does nothing if it is there. Raises :class:`DataError` if anything else is.
    """

    def fill(folder: Path) -> None:
        annotation_id = 1
        for number, (split, count) in enumerate((("train2017", images), ("val2017", max(2, images // 3)))):
            (folder / split).mkdir()
            listed, annotations = [], []
            for index, scene in enumerate(_scenes(seed, number, count, crowds=True)):
                image_id = 1000 * (number + 1) + 3 * index
                file = f"{image_id:012d}.jpg"
                _save(scene, folder / split / file)
                height, width = scene.pixels.shape[:2]
                listed.append({"id": image_id, "file_name": file, "height": height, "width": width})
                for entry in _coco_objects(scene):
                    annotations.append({"id": annotation_id, "image_id": image_id, **entry})
                    annotation_id += 1
            categories = [{"id": v[1], "name": k, "supercategory": "shape"} for k, v in SHAPES.items()]
            document = {
                "info": {"description": f"evalsuite demo world, seed {seed}"},
                "images": listed,
                "annotations": annotations,
                "categories": categories,
            }
            (folder / "annotations").mkdir(exist_ok=True)
            target = folder / "annotations" / f"instances_{split}.json"
            target.write_text(json.dumps(document), encoding="utf-8")

    return once(path, seed, images, fill)


def write_voc(path: Path, seed: int = 0, images: int = 64) -> Path:
    """A development kit at ``path``: ``images`` in trainval of each year, a third as many in test of 2007.

    train and val are the halves of trainval. Does nothing if it is there. Raises :class:`DataError` if
    anything else is.
    """

    def fill(folder: Path) -> None:
        _voc_year(folder / "VOC2007", seed, 2, {"trainval": images, "test": max(2, images // 3)})
        _voc_year(folder / "VOC2012", seed, 3, {"trainval": images})

    return once(path, seed, images, fill)


def write_classes(path: Path, seed: int = 0, images: int = 64, test: str = "test") -> Path:
    """Class folders at ``path``: ``images`` below ``train``, half as many below ``test``, one object in each.

    Does nothing if it is there. Raises :class:`DataError` if anything else is.
    """

    def fill(folder: Path) -> None:
        for number, (split, count) in enumerate((("train", images), (test, max(6, images // 2)))):
            for index, (pixels, label) in enumerate(zip(*labelled(seed, number, count, 64), strict=True)):
                place = folder / split / _NAMES[label]
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(place / f"{index:04d}.jpg", quality=92)

    return once(path, seed, images, fill)


def write_marks(path: Path, seed: int = 0, images: int = 64) -> Path:
    """Scenes at ``path``, and ``list.csv`` that marks which shapes each shows: ``images`` of train, half of test.

    A shape of which there are only objects that are hard to see is marked as unknown. Does nothing if it is there.
    Raises :class:`DataError` if anything else is.
    """

    def fill(folder: Path) -> None:
        rows = [["path", "split", *(f"label:{name}" for name in _NAMES)]]
        for number, (split, count) in enumerate((("train", images), ("test", max(8, images // 2)))):
            for index, scene in enumerate(_scenes(seed, 8 + number, count, crowds=False)):
                name = f"{split}{index:04d}.jpg"
                _save(scene, folder / name)
                marks = dict.fromkeys(_NAMES, "0")
                for thing in sorted(scene.things, key=lambda thing: not thing.difficult):
                    marks[thing.shape] = "" if thing.difficult else "1"
                rows.append([name, split, *marks.values()])
        lines = [",".join(row) + "\n" for row in rows]
        (folder / "list.csv").write_text("".join(lines), encoding="utf-8")

    return once(path, seed, images, fill)


def write_masks(
    path: Path,
    place: Callable[[str, int], tuple[str, str]],
    codes: Sequence[int],
    void: int,
    seed: int = 0,
    images: int = 64,
    *,
    splits: Sequence[str] = ("train", "val"),
    palette: NDArray[np.uint8] | None = None,
    lists: Path | None = None,
) -> Path:
    """A segmentation tree at ``path``: ``images`` in the first of ``splits``, a third as many in each other.

    ``place(split, index)`` are the image and the mask below ``path``. ``codes`` are what masks say of the ground, the
    sky and the six shapes, ``void`` of shapes that are hard to see. With ``palette`` (256, 3) masks are palette PNGs;
    below ``lists`` a text file a split names its masks. Does nothing if it is there. Raises :class:`DataError` if
    anything else is.
    """
    table = np.array([*codes, void], np.uint8)

    def fill(folder: Path) -> None:
        for number, split in enumerate(splits):
            names = []
            count = max(4, images // 3) if number else images
            for index, scene in enumerate(_scenes(seed, 16 + number, count, crowds=False, skies=True)):
                image, mask = (folder / name for name in place(split, index))
                for file in (image, mask):
                    file.parent.mkdir(parents=True, exist_ok=True)
                _save(scene, image)
                drawn = Image.fromarray(table[_labels(scene)])
                if palette is not None:
                    drawn.putpalette(palette.tobytes())
                drawn.save(mask)
                names.append(mask.stem)
            if lists is not None:
                (folder / lists).mkdir(parents=True, exist_ok=True)
                (folder / lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")

    return once(path, seed, images, fill)


def _labels(scene: Scene) -> NDArray[np.uint8]:
    """(H, W): 0 the ground, 1 the sky, then the shapes by number, and after them what is hard to see."""
    height, width = scene.pixels.shape[:2]
    labels = np.zeros((height, width), np.uint8)
    labels[: scene.horizon] = 1
    for thing in scene.things:
        window, cover = _cover(thing.outline, height, width)
        labels[window][cover >= 0.5] = 2 + (len(_NAMES) if thing.difficult else _NAMES.index(thing.shape))
    return labels


def labelled(seed: int, split: int, count: int, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(N, size, size, 3) pictures of one object each, and the numbers of their shapes (N,)."""
    pictures, labels = [], []
    for index in range(count):
        rng = np.random.default_rng((seed, 4 + split, index))
        scene = draw(rng, things=1)
        while not scene.things or scene.things[0].difficult:
            scene = draw(rng, things=1)
        outline = scene.things[0].outline
        centre = (outline.min(axis=0) + outline.max(axis=0)) / 2
        half = 0.7 * float(np.ptp(outline, axis=0).max())
        box = (*(centre - half).round().astype(int).tolist(), *(centre + half).round().astype(int).tolist())
        cut = Image.fromarray(scene.pixels).crop(box).resize((size, size), Image.Resampling.BILINEAR)
        pictures.append(np.asarray(cut))
        labels.append(_NAMES.index(scene.things[0].shape))
    return np.stack(pictures), np.array(labels, dtype=np.int64)


def _scenes(seed: int, stream: int, count: int, *, crowds: bool, skies: bool = False) -> Iterator[Scene]:
    """Scenes of one split. Every eighth has a crowd, every ninth is grey, every twelfth is empty."""
    for index in range(count):
        rng = np.random.default_rng((seed, stream, index))
        things = 0 if index % 12 == 11 else int(rng.integers(2, 7))
        sky = 0.2 + 0.05 * (index * 3 % 8) if skies else 0.0
        yield draw(rng, things=things, crowd=crowds and index % 8 == 1, grey=index % 9 == 8, sky=sky)


def _background(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Dull clouds of colour with streaks and blots, so that edges alone do not give an object away."""
    field = np.zeros((height, width, 3))
    for cells, strength in ((3, 0.35), (8, 0.2), (24, 0.12)):
        coarse = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        field += strength * (np.asarray(smooth) / 255 - 0.5)
    grey = field.mean(axis=2, keepdims=True)
    pixels: Pixels = rng.uniform(0.35, 0.65) + grey + 0.35 * (field - grey)
    for _ in range(int(rng.integers(10, 22))):
        x, y = rng.uniform(0, (width, height))
        angle, length, half = rng.uniform(0, math.pi), rng.uniform(4, 50), rng.uniform(0.4, 2.5)
        along = length * np.array([math.cos(angle), math.sin(angle)])
        across = half * np.array([-math.sin(angle), math.cos(angle)])
        corners = np.array([-along - across, along - across, along + across, across - along])
        colour = rng.uniform(0.2, 0.8) + rng.normal(0, 0.04, 3)
        _blend(pixels, corners + np.array([x, y]), colour, rng.uniform(0.3, 0.8))
    return pixels


def _cover(outline: Points, height: int, width: int) -> tuple[tuple[slice, slice], Pixels]:
    """The part of each pixel inside an outline, in the window around it that lies in the image."""
    low = np.floor(outline.min(axis=0)).astype(int).clip(0, (width, height))
    high = np.ceil(outline.max(axis=0)).astype(int).clip(0, (width, height))
    across, down = high - low
    if across == 0 or down == 0:
        return (slice(0, 0), slice(0, 0)), np.zeros((0, 0))
    canvas = Image.new("L", (int(across) * _FINE, int(down) * _FINE))
    # The drawing's pixel centres are integers, ours lie half a pixel in.
    points = (outline - low) * _FINE - 0.5
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in points], fill=255)
    fine = np.asarray(canvas, np.float64) / 255
    cover: Pixels = fine.reshape(down, _FINE, across, _FINE).mean(axis=(1, 3))
    return (slice(low[1], high[1]), slice(low[0], high[0])), cover


def _blend(pixels: Pixels, outline: Points, colour: Pixels, strength: float) -> tuple[tuple[slice, slice], Pixels]:
    """Paint ``colour`` ((3,), or (H, W, 3)) inside an outline."""
    window, cover = _cover(outline, *pixels.shape[:2])
    alpha = strength * cover[:, :, None]
    paint = colour[window] if colour.ndim == 3 else colour
    pixels[window] = (1 - alpha) * pixels[window] + alpha * paint
    return window, cover


def _paint(rng: np.random.Generator, pixels: Pixels, shape: str, outline: Points, *, faint: bool) -> Pixels:
    """Paint an object in its class's hue and texture; returns the part of each pixel it covers."""
    height, width = pixels.shape[:2]
    hue = SHAPES[shape][3] + rng.uniform(-0.05, 0.05)
    base = _rgb(hue, rng.uniform(0.55, 0.9), rng.uniform(0.6, 0.95))
    angle = rng.uniform(0, math.pi)
    y, x = np.mgrid[:height, :width]
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    period = rng.uniform(4, 8)
    wave = np.sin(along * 2 * math.pi / period)
    if _NAMES.index(shape) % 2:
        wave = wave * np.sin(across * 2 * math.pi / period)
    texture = base * (0.8 + 0.25 * wave[:, :, None])
    window, cover = _blend(pixels, outline, texture, 0.45 if faint else 1.0)
    whole = np.zeros((height, width))
    whole[window] = cover
    return whole


def _rgb(hue: float, saturation: float, value: float) -> Pixels:
    wheel = np.abs((hue % 1 * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    rgb: Pixels = value * (1 - saturation * (1 - wheel.clip(0, 1)))
    return rgb


def _outline(rng: np.random.Generator, shape: str, x: float, y: float, radius: float) -> Points:
    """A shape turned a little, put in its place, to two decimals as COCO writes coordinates."""
    turn = rng.uniform(-0.35, 0.35)
    spin = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    points: Points = (SHAPES[shape][0] @ spin * radius + (x, y)).round(2)
    return points


def _free(
    rng: np.random.Generator, height: int, width: int, radius: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float] | None:
    """A centre whose circle touches no other and no border, None where forty tries find none."""
    margin = radius + 1
    for _ in range(40):
        x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
        if all(math.hypot(x - u, y - v) > radius + r for u, v, r in taken):
            taken.append((x, y, radius))
            return x, y
    return None


def _cluster(
    rng: np.random.Generator, height: int, width: int, taken: list[tuple[float, float, float]]
) -> list[tuple[float, float, float]]:
    """Places of a crowd's members: many small ones close together, as people in a stand."""
    reach = 0.27 * height
    spot = _free(rng, height, width, reach, taken)
    if spot is None:  # nothing is taken yet, and the reach is below half the image
        raise AssertionError("a crowd fits into every image")
    members = rng.uniform(-1, 1, (14, 2)) * (reach - 7) / math.sqrt(2) + spot
    return [(float(x), float(y), float(rng.uniform(4, 6))) for x, y in members]


def _save(scene: Scene, path: Path) -> None:
    image = Image.fromarray(scene.pixels)
    if (scene.pixels == scene.pixels[:, :, :1]).all():
        image = image.convert("L")
    image.save(path, quality=92)


def _shoelace(outline: Points) -> float:
    x, y = outline.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def _coco_objects(scene: Scene) -> Iterator[dict[str, Any]]:
    for thing in scene.things:
        low, high = thing.outline.min(axis=0), thing.outline.max(axis=0)
        yield {
            "category_id": SHAPES[thing.shape][1],
            "bbox": np.concatenate([low, high - low]).round(2).tolist(),
            "area": round(_shoelace(thing.outline), 4),
            "iscrowd": 0,
            "segmentation": [thing.outline.ravel().tolist()],
        }
    if scene.crowd is not None:
        shape, mask = scene.crowd
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        yield {
            "category_id": SHAPES[shape][1],
            "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
            "area": int(mask.sum()),
            "iscrowd": 1,
            "segmentation": {"size": list(mask.shape), "counts": _runs(mask)},
        }


def _runs(mask: NDArray[np.bool_]) -> list[int]:
    """Uncompressed COCO RLE: lengths of runs down the columns, zeros first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths: list[int] = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths


def _voc_year(folder: Path, seed: int, stream: int, splits: dict[str, int]) -> None:
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    names: dict[str, list[str]] = {}
    total = sum(splits.values())
    scenes = _scenes(seed, stream, total, crowds=False)
    for split, count in splits.items():
        names[split] = []
        for _ in range(count):
            done = sum(map(len, names.values()))
            name = f"{done + 1:06d}" if folder.name == "VOC2007" else f"2012_{done + 1:06d}"
            scene = next(scenes)
            _save(scene, folder / "JPEGImages" / f"{name}.jpg")
            _voc_annotation(scene, folder.name, name).write(folder / "Annotations" / f"{name}.xml")
            names[split].append(name)
    names["train"], names["val"] = names["trainval"][::2], names["trainval"][1::2]
    for split, listed in names.items():
        file = folder / "ImageSets" / "Main" / f"{split}.txt"
        file.write_text("".join(f"{name}\n" for name in listed), encoding="utf-8")


def _voc_annotation(scene: Scene, year: str, name: str) -> ElementTree.ElementTree[Any]:
    height, width = scene.pixels.shape[:2]
    root = ElementTree.Element("annotation")

    def put(parent: ElementTree.Element, **values: object) -> None:
        for key, value in values.items():
            ElementTree.SubElement(parent, key).text = str(value)

    put(root, folder=year, filename=f"{name}.jpg")
    put(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    put(root, segmented=0)
    for thing in scene.things:
        entry = ElementTree.SubElement(root, "object")
        put(entry, name=SHAPES[thing.shape][2], pose="Unspecified", truncated=0)
        put(entry, difficult=int(thing.difficult))
        low = np.floor(thing.outline.min(axis=0)).astype(int) + 1
        high = np.ceil(thing.outline.max(axis=0)).astype(int)
        put(ElementTree.SubElement(entry, "bndbox"), xmin=low[0], ymin=low[1], xmax=high[0], ymax=high[1])
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def once(path: Path, seed: int, images: int, fill: Callable[[Path], None]) -> Path:
    """Unless it is there, fill a folder beside ``path`` and move it there whole; real data are never replaced."""
    mark = {"evalsuite demo": _VERSION, "seed": seed, "images": images}
    if _marked(path) == mark:
        return path
    if path.exists() and _marked(path) is None:
        raise DataError(
            f"a demo world cannot be written to {path}",
            cause="there is something else, which might be real data",
            fix="choose another folder for the demo",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(path) as scratch:
        made, old = scratch / "new", scratch / "old"
        made.mkdir()
        fill(made)
        (made / _MARK).write_text(json.dumps(mark), encoding="utf-8")
        try:
            if path.exists():
                os.rename(path, old)
            os.rename(made, path)
        except OSError:
            if _marked(path) != mark:  # else another process was faster
                raise
    return path


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder beside ``path``, on the same file system, that is gone afterwards."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _marked(path: Path) -> dict[str, int] | None:
    """What a demo world says of itself; None where there is none."""
    try:
        mark = json.loads((path / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) and "evalsuite demo" in mark else None
