"""Frames of simulated worlds, each drawn when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evalsuite.data import Report, Source
from evalsuite.data.generated import no_demo
from evalsuite.data.learning import ImageRows, Learning
from evalsuite.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from evalsuite.progress import Progress

__all__ = ["Frames", "Worlds"]

_DRAWN = 64  # frames of a split that verification draws

Bytes = NDArray[np.uint8]


class Frames(ImageRows):
    """``count`` first frames of a simulated world (:mod:`evalsuite.worlds`).

    A row depends on ``seed``, its number and the rules alone. Besides ``image`` (64,64,3) a sample has ``segments``
    (64,64) int64, which item is seen at each pixel, -1 where it is the ground, and ``state`` (rows,N) float32, the
    items as an agent is told them. Raises :class:`evalsuite.UsageError` for a world or a variant that does not exist.
    """

    SIZE = 64

    def __init__(self, task: str, variant: str = "default", count: int = 1_000_000, seed: int = 0) -> None:
        try:
            from evalsuite.worlds import TASKS, VERSION, rules, world  # gymnasium, which other data do not need
        except ModuleNotFoundError as error:
            raise ResourceError(
                f"--data worlds:{task} needs {error.name}, which is not installed",
                cause="it comes with the extra 'rl'",
                fix="pip install 'evalsuite[rl]'",
            ) from error

        if task not in TASKS:
            raise UsageError(
                f"there is no world {task!r}",
                cause=f"there are {', '.join(TASKS)}",
                fix="--data worlds:random-objects, or another of these",
            )
        self.seed, self.labels = seed, np.full(count, -1)
        self.world = world(rules(task, variant), self.SIZE)
        # of version 1 as it was before versions counted, so that runs begun then can be resumed
        version = f" {VERSION}" if VERSION > 1 else ""
        told = f"{asdict(self.world.rules)} {self.SIZE} {count} {seed}{version}"
        self._fingerprint = hashlib.sha256(told.encode()).hexdigest()

    @property
    def ids(self) -> Sequence[str]:
        return [f"frame-{row}" for row in range(len(self))]

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def __getitem__(self, row: int, /) -> Bytes:
        image = np.empty((self.SIZE, self.SIZE, 3), dtype=np.uint8)
        self.world.reset(np.random.default_rng([self.seed, row]))
        self.world.image(image)
        return image

    def sample(self, row: int) -> Mapping[str, NDArray[Any]]:
        image = self[row]
        state = np.empty(self.world.rules.bounds[0].shape, dtype=np.float32)
        self.world.state(state)
        return {"image": image, "segments": self.world.segments(), "state": state}

    def rows(self) -> Frames:
        return self


@dataclass(frozen=True)
class Worlds(Source[Frames]):
    """Frames of a simulated world, to pretrain on: ``worlds:TASK`` or ``worlds:TASK/VARIANT``, and perhaps ``:N`` for
    so many of them, a million by default (Yoon et al., ICML 2023), and a hundredth as many, but 320 at least, held out.
    """

    task: str = ""
    variant: str = "default"
    count: int = 1_000_000

    name = "worlds"
    generated = "TASK"
    tree = "nothing: frames are drawn when they are asked for"
    homepage = "https://arxiv.org/abs/2302.04419"
    licence = "none: it is generated"
    citation = "Yoon et al., An Investigation into Pre-Training Object-Centric Representations for RL, ICML 2023"

    def configured(self, options: str) -> Worlds:
        name, _, count = options.partition(":")
        task, _, variant = name.partition("/")
        if not task or (count and not (count.isdecimal() and int(count))):
            raise UsageError(
                f"--data worlds:{options} does not name data",
                cause=f"{count!r} is no number of frames" if task else "it names no world",
                fix="--data worlds:random-objects, or worlds:random-objects:100000",
            )
        return Worlds(task, variant or "default", int(count) if count else self.count)

    def locate(self, root: Path | None) -> Path:
        return Path(self.name)

    def splits(self, path: Path) -> tuple[str, ...]:
        return ("train", "test")

    def roles(self, path: Path) -> Mapping[str, str]:
        return {split: split for split in self.splits(path)}

    def load(self, path: Path, split: str) -> Frames:
        train = split == "train"
        return Frames(self.task, self.variant, self.count if train else max(self.count // 100, 320), 0 if train else 1)

    def learning(self, path: Path) -> Learning:
        return Learning(self.load(path, "train"), held_out=self.load(path, "test"))

    def verify(self, path: Path, progress: Progress | None = None, workers: int | None = None) -> Report:
        report = Report(self.name, path)
        for split in self.splits(path):
            frames = self.load(path, split)
            drawn = min(_DRAWN, len(frames))
            for row in range(drawn):
                frames.sample(row)
            report.counts[split] = {"images": len(frames)}
            report.notes.append(f"{split}: the first {drawn} frames were drawn; frames follow from rules alone")
        return report

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        raise no_demo(self.name)
