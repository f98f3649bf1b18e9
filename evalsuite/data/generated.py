"""A generated data set, to try things on: no file is needed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from evalsuite.data.classification import Arrays, ClassificationSet, ClassificationSource, no_split
from evalsuite.data.digests import joined
from evalsuite.data.learning import Learning, PixelRows
from evalsuite.errors import UsageError

__all__ = ["Demo", "no_demo"]

_VERSION = 1  # raised when the pictures change, for they are the data
_SHAPES, _TEXTURES = ("disc", "square", "cross", "ring"), ("waves", "checks")
_CLASSES = tuple(f"{shape} with {texture}" for texture in _TEXTURES for shape in _SHAPES)

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def no_demo(name: str) -> UsageError:
    """The refusal of a demo world of what is generated itself."""
    return UsageError(
        f"{name} has no demo world", cause="it is generated itself", fix=f"leave --demo out; --data {name} draws it"
    )


@dataclass(frozen=True)
class Demo(ClassificationSource):
    """One of four shapes, filled with one of two textures, on a background of another colour: ``demo``, or ``demo:N``
    for N images to learn from (512), and half as many again to test on.

    The eight classes are what stays when colour, place, size and texture phase change.
    """

    images: int = 512
    size: int = 32
    seed: int = 0

    name = "demo"
    serves: ClassVar[tuple[str, ...]] = ("classify",)
    generated = "N"
    tree = "nothing: images are drawn when they are asked for"
    homepage = "none: it is generated"
    licence = "none: it is generated"
    citation = "none: it is generated"

    def configured(self, options: str) -> Demo:
        if not options:
            return self
        if not options.isdecimal() or int(options) < 2:
            raise UsageError(
                f"--data demo:{options} does not name data",
                cause=f"{options!r} is no number of images, of 2 at least",
                fix=f"--data demo:{self.images}, or --data demo",
            )
        return dataclasses.replace(self, images=int(options))

    def locate(self, root: Path | None) -> Path:
        return Path(self.name)

    def splits(self, path: Path) -> tuple[str, ...]:
        return ("train", "test")

    def load(self, path: Path, split: str) -> ClassificationSet:
        if split not in self.splits(path):
            raise no_split(path, split, self.splits(path))
        labels = self.labels(split)
        told = f"demo {_VERSION}: {self.images} images of {self.size} pixels, seed {self.seed}, {split}"
        pixels = Arrays(len(labels), partial(self.drawn, split), joined([told]))
        names = np.array([f"{split}/{row:05d}" for row in range(len(labels))], dtype=np.str_)
        return ClassificationSet(self.name, split, _CLASSES, names, labels, pixels, np.arange(len(labels)))

    def learning(self, path: Path) -> Learning:
        train, test = (PixelRows(self.drawn(split), self.labels(split)) for split in self.splits(path))
        return Learning(train, held_out=test)

    def labels(self, split: str) -> Ints:
        """The classes of a split's images, one after the other."""
        labels = _labels(self.images)
        return labels[: self.images] if split == "train" else labels[self.images :]

    def drawn(self, split: str) -> Bytes:
        """(N, size, size, 3): the images of a split."""
        pixels = _pictures(self.images, self.size, self.seed)
        return (pixels[: self.images] if split == "train" else pixels[self.images :]).copy()

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        raise no_demo(self.name)


def _labels(images: int) -> Ints:
    return np.arange(images + images // 2) % len(_CLASSES)


@lru_cache(maxsize=4)
def _pictures(images: int, size: int, seed: int) -> Bytes:
    """Those of both splits, by one generator."""
    rng = np.random.default_rng(seed)
    return np.stack([_picture(rng, int(label), size) for label in _labels(images)])


def _picture(rng: np.random.Generator, label: int, size: int) -> Bytes:
    y, x = np.mgrid[0:size, 0:size] / size
    cy, cx = rng.uniform(0.35, 0.65, 2)
    radius = rng.uniform(0.2, 0.35)
    dy, dx = (y - cy) / radius, (x - cx) / radius
    far = np.hypot(dy, dx)
    inside = (
        far < 1,
        np.maximum(abs(dy), abs(dx)) < 0.85,
        (np.minimum(abs(dy), abs(dx)) < 0.35) & (np.maximum(abs(dy), abs(dx)) < 1),
        (far < 1) & (far > 0.55),
    )[label % 4]
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    wave = np.sin(2 * np.pi * (6 * along + rng.uniform()))
    texture = wave if label < 4 else np.sign(wave * np.sin(2 * np.pi * (6 * across + rng.uniform())))
    fore, back = rng.uniform(0, 1, 3), rng.uniform(0, 1, 3)
    image = np.where(inside[..., None], fore * (0.7 + 0.3 * texture[..., None]), back)
    noisy = image + rng.normal(0, 0.03, image.shape)
    return np.asarray(np.clip(noisy * 255, 0, 255).round(), dtype=np.uint8)
