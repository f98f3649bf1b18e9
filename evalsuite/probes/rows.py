"""What a probe is given and what it answers: rows of features, training and test parts, the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evalsuite.errors import DataError, UsageError
from evalsuite.progress import Progress

__all__ = [
    "CHUNK",
    "FEW",
    "Array",
    "Floats",
    "Ints",
    "Kind",
    "Metric",
    "Normalise",
    "Part",
    "Predictions",
    "Probe",
    "Rows",
    "Runtime",
    "Setting",
    "Train",
    "check_vectors",
    "free_memory",
    "normaliser",
    "unit",
]


Array = npt.NDArray[Any]
Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
Setting = Mapping[str, Any]
Metric = Callable[[Array, Array], float]
Normalise = Literal["none", "l2", "l2+1e-5", "standard"]
Kind = Literal["classes", "regression"]

CHUNK = 8192  # rows streamed at once


class Rows:
    """Rows of a feature matrix (N, D), read in chunks as float32, so that a matrix on disk stays there.

    ``index`` picks rows. ``norm`` is applied to each chunk.
    """

    def __init__(self, base: Array, index: Ints | None = None, norm: Callable[[Tensor], Tensor] | None = None) -> None:
        if base.ndim != 2:
            raise _no_vectors("features", base)
        self.base, self.index, self.norm = base, index, norm

    def __len__(self) -> int:
        return len(self.base) if self.index is None else len(self.index)

    @property
    def width(self) -> int:
        return int(self.base.shape[1])

    def take(self, index: Ints) -> Rows:
        """Some of these rows, not copied."""
        return Rows(self.base, index if self.index is None else self.index[index], self.norm)

    def normalised(self, norm: Callable[[Tensor], Tensor] | None) -> Rows:
        """These rows with another normalisation."""
        return Rows(self.base, self.index, norm)

    def at(self, where: slice | Ints, device: torch.device | str = "cpu") -> Tensor:
        """(b, D) float32 on a device."""
        rows = self.base[where if self.index is None else self.index[where]]
        with warnings.catch_warnings():  # a read-only map: torch warns that writing to it is undefined; we do not
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            tensor = torch.from_numpy(np.ascontiguousarray(rows))
        tensor = tensor.to(device, torch.float32)
        return tensor if self.norm is None else self.norm(tensor)

    def chunks(self, device: torch.device | str = "cpu", size: int = CHUNK) -> Iterator[tuple[slice, Tensor]]:
        """(places, rows) from the first to the last."""
        for start in range(0, len(self), size):
            where = slice(start, min(start + size, len(self)))
            yield where, self.at(where, device)

    def resident(self, device: torch.device | str) -> Tensor | None:
        """All rows on the device, if they take no more than a third of what is free there."""
        if len(self) * self.width * 4 > free_memory(torch.device(device)) // 3:
            return None
        return self.at(slice(None), device)


@dataclass(frozen=True)
class Train:
    """What may be learnt from. ``features`` {name: (N, D)}: the outputs to choose among, or the only one.

    ``labels`` are (N,) classes from 0, or (N, L) with 1, 0 and -1 (unknown) per label; where ``kind`` is
    ``regression``, (N,) or (N, T) numbers. ``groups`` (N,) name each
    sample's patient or scene: no group is on both sides of a validation split. ``classes`` is their number, where the
    training data may lack some.
    """

    features: Mapping[str, Array]
    labels: Array
    groups: Array | None = None
    classes: int | None = None
    kind: Kind = "classes"

    def __post_init__(self) -> None:
        check_vectors(self.features)
        sizes = {name: len(array) for name, array in self.features.items()} | {"labels": len(self.labels)}
        if self.groups is not None:
            sizes["groups"] = len(self.groups)
        if len(set(sizes.values())) != 1 or not self.features or not len(self.labels):
            raise DataError(
                f"training data of different lengths: {sizes}",
                cause="features, labels and groups have one row a sample, and there is at least one",
                fix="leave out samples without a label before",
            )
        if self.kind == "regression":
            object.__setattr__(self, "labels", _numbers(self.labels))
        elif self.labels.ndim == 1 and self.labels.min() < 0:
            raise DataError(
                f"{int((self.labels < 0).sum())} training samples have no class",
                cause="classes are counted from 0",
                fix="leave those samples out",
            )


@dataclass(frozen=True)
class Runtime:
    """Where a probe is fitted, by which seed, and who is told of it."""

    device: torch.device | str = "cpu"
    seed: int = 0
    progress: Progress = field(default_factory=lambda: Progress(quiet=True))


@dataclass(frozen=True)
class Part:
    """Training data of one output as a probe gets them: rows, labels as in :class:`Train`, groups, classes.

    ``classes`` is the number of columns of scores: of numbers that are to be predicted, how many there are a row.
    """

    rows: Rows
    labels: Array
    groups: Array | None
    classes: int
    kind: Kind = "classes"

    @property
    def multilabel(self) -> bool:
        return self.labels.ndim == 2

    def targets(self) -> Floats:
        """(N, C): one-hot classes, or the labels; unknown ones are NaN. Of a regression the numbers, in float64."""
        if self.kind == "regression":
            return np.asarray(self.labels, dtype=np.float64).reshape(len(self.labels), -1)
        if self.multilabel:
            return np.where(self.labels < 0, np.nan, self.labels).astype(np.float32)
        return np.eye(self.classes, dtype=np.float32)[self.labels]


class Predictions(NamedTuple):
    """Scores (M, C) of one setting on the points asked for, and what there is to tell of the fit."""

    scores: Floats
    details: Mapping[str, Any] = {}
    warnings: tuple[str, ...] = ()


class Probe(Protocol):
    """A family of heads. ``scale`` says what its scores are; one that fits numbers has an attribute ``regression``."""

    @property
    def scale(self) -> Literal["logits", "probabilities", "margins"]: ...

    def settings(self, samples: int) -> list[dict[str, Any]]:
        """The grid for that many training samples, from the simplest head to the most flexible."""
        ...

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], runtime: Runtime) -> Iterator[Predictions]:
        """Fit all settings on ``part``; their scores on ``points``, in order."""
        ...


FEW = 100  # validation samples, of which one right or wrong moves an accuracy by a hundredth


# --- inside -----------------------------------------------------------------------------------------------------


def check_vectors(features: Mapping[str, Array]) -> None:
    """Raise :class:`UsageError`, by name, for features that are no (N, D)."""
    for name, array in features.items():
        if array.ndim != 2:
            raise _no_vectors(repr(name), array)


def _no_vectors(name: str, array: Array) -> UsageError:
    return UsageError(
        f"{name} of shape {array.shape}: probes take vectors",
        cause="features of a probe are (samples, width)",
        fix="pool or flatten them: outputs such as tokens/avg or map16/avg, not tokens/whole",
    )


def _numbers(targets: Array) -> Array:
    numbers = np.asarray(targets)
    sound = numbers.ndim in (1, 2) and np.issubdtype(numbers.dtype, np.number) and np.isfinite(numbers).all()
    if not sound or np.iscomplexobj(numbers):
        raise DataError(
            f"targets of shape {numbers.shape} and type {numbers.dtype} cannot be predicted",
            cause="they are (N,) or (N, T) finite numbers",
            fix="leave out samples without one",
        )
    return numbers.astype(np.float64)


def normaliser(rows: Rows, kind: Normalise, device: torch.device | str) -> Callable[[Tensor], Tensor] | None:
    if kind == "none":
        return None
    if kind == "l2":
        return unit
    if kind == "l2+1e-5":
        return lambda x: x / (x.norm(dim=1, keepdim=True) + 1e-5)
    total = torch.zeros(rows.width, dtype=torch.float64, device=device)
    square = torch.zeros_like(total)
    shift = rows.at(slice(0, 1), device)[0].double()  # so that the squares of large, nearly equal numbers do not cancel
    for _, chunk in rows.chunks(device):
        moved = chunk.double() - shift
        total += moved.sum(0)
        square += moved.pow(2).sum(0)
    mean = total / len(rows)
    spread = (square / len(rows) - mean**2).clamp_min(0).sqrt()
    centre, scale = (mean + shift).float(), torch.where(spread > 0, spread, 1.0).float()
    return lambda x: (x - centre.to(x.device)) / scale.to(x.device)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def free_memory(device: torch.device) -> int:
    """Bytes that may be taken: on the GPU, or of this machine within the limit of its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as table:
        free = next(int(line.split()[1]) * 1024 for line in table if line.startswith("MemAvailable:"))
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
    except OSError:  # no control groups of version 2
        return free
    return free if limit.strip() == "max" else max(0, min(free, int(limit) - int(used)))
