"""Tasks whose targets are numbers: ridge regression on frozen features, and correlations of ranks.

A task of one's own says where its rows are (:class:`Numbers`), and no more:

>>> class Depth(Regression):
...     name = "depth"
...     def sets(self, setup):
...         return load(setup.data_root / "train"), load(setup.data_root / "test")
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from evalsuite import probes
from evalsuite.backbone import PIXELS, Backbone
from evalsuite.data.digests import fingerprint, joined
from evalsuite.data.draws import evenly
from evalsuite.errors import DataError
from evalsuite.features import ImageSet, Output, Preprocess
from evalsuite.metrics.regression import METRICS
from evalsuite.probing.protocols import vectors_only
from evalsuite.probing.tasks import on_readable, refuse_known
from evalsuite.statistics import REPLICATES, weight_blocks
from evalsuite.task import Metric, Outcome, Protocol, Setup, Task

__all__ = ["Numbers", "Regression", "RegressionProtocol"]

Floats = npt.NDArray[np.float64]
SAME = "predictions or targets are all the same"


@dataclass(frozen=True, eq=False)
class Numbers:
    """Rows with numbers to predict: ``images`` are a split as the cache reads it, of whatever kind.

    ``values`` are (N,) or (N, T), ``groups`` (N,) name patients or scenes, of which none is on both sides of a
    validation split. Raises :class:`DataError` for values that are not finite, or not one a row.
    """

    images: ImageSet
    values: npt.NDArray[Any]
    groups: npt.NDArray[np.str_] | None = None
    rows: npt.NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        count = len(self.images.ids) if self.rows is None else len(self.rows)
        if values.ndim not in (1, 2) or len(values) != count or not np.isfinite(values).all():
            raise DataError(
                f"values of shape {values.shape} for {count} rows of {self.images.split!r}",
                cause="each row has one finite number, or T of them",
                fix="leave out rows without one",
            )
        object.__setattr__(self, "values", values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int, /) -> Any:
        return self.images[self._row(index)]

    def __getattr__(self, name: str) -> Any:
        if name != "__getitems__" or not hasattr(self.images, name):
            raise AttributeError(name)
        read = getattr(self.images, name)
        return lambda indices: read([self._row(index) for index in indices])

    def _row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])

    @property
    def kind(self) -> str:
        return getattr(self.images, "kind", "image")

    @property
    def split(self) -> str:
        return self.images.split

    @property
    def labels(self) -> npt.NDArray[Any]:
        return self.values

    @cached_property
    def ids(self) -> list[str]:
        return [self.images.ids[self._row(index)] for index in range(len(self))]

    @property
    def fingerprint(self) -> str:
        """Of the rows alone."""
        return self.images.fingerprint

    @cached_property
    def digest(self) -> str:
        """Of rows, values and groups: what a score depends on."""
        groups = [] if self.groups is None else self.groups.tolist()
        return joined(
            [self.fingerprint, *self.ids, *groups, str(self.values.shape), *map(repr, self.values.ravel().tolist())]
        )

    def take(self, rows: npt.NDArray[Any]) -> Numbers:
        """Some of the rows."""
        chosen = np.arange(len(self))[rows]
        kept = chosen if self.rows is None else self.rows[chosen]
        groups = None if self.groups is None else self.groups[chosen]
        return dataclasses.replace(self, values=self.values[chosen], groups=groups, rows=kept)

    def limit(self, count: int | None) -> Numbers:
        """At most ``count`` rows, evenly spaced."""
        rows = evenly(len(self), count)
        return self if rows is None else self.take(rows)


@dataclass(frozen=True, kw_only=True)
class RegressionProtocol(Protocol):
    """Ridge regression on frozen features.

    Of ``alphas``, and of several ``outputs`` (:class:`evalsuite.features.Output`), those are taken whose ``criterion``
    is best on the share ``validation`` of the training rows; of fewer than ``folds_below`` on all of them, in ``folds``
    parts. The chosen head is fitted again on all training rows. ``rule``, ``ratio`` and ``interpolation`` say how an
    image becomes the network's input (:class:`evalsuite.features.Preprocess`).
    """

    outputs: tuple[str, ...] = ("pooled",)
    alphas: tuple[float, ...] = probes.Ridge().alphas
    criterion: Literal["spearman", "kendall", "r2", "mae"] = "spearman"
    normalise: probes.Normalise = "standard"
    validation: float = 0.1
    folds: int = 5
    folds_below: int = 1000
    rule: Literal["auto", "crop", "squash", "pad"] = "auto"
    ratio: float = 224 / 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        vectors_only(self.id, map(Output.parse, self.outputs))
        _ = self.selection  # refuses numbers by which nothing can be chosen

    @property
    def selection(self) -> probes.Selection:
        """How a setting is chosen."""
        return probes.Selection(self.validation, self.folds, self.folds_below)

    @property
    def needs(self) -> frozenset[str]:
        """What a backbone must give."""
        return frozenset[str]().union(*(Output.parse(name).needs for name in self.outputs))

    @property
    def seeded(self) -> bool:
        return len(self.outputs) * len(self.alphas) > 1


class Regression(Task[RegressionProtocol]):
    """Numbers told from frozen features: progress, saliency, similarity, depth.

    Subclasses say where the rows are (:meth:`sets`); of several targets a row, metrics are means over them.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("spearman", low=-1.0, undefined=SAME), Metric("kendall", low=-1.0, undefined=SAME),
        Metric("r2", low=-float("inf"), undefined=SAME),
        Metric("mae", higher_is_better=False, high=float("inf")),
    )  # fmt: skip
    primary = "spearman"
    needs = frozenset({"pooled"})
    protocols: ClassVar[tuple[Protocol, ...]] = (RegressionProtocol(id="ridge", version=1),)

    @abstractmethod
    def sets(self, setup: Setup[RegressionProtocol]) -> tuple[Numbers, Numbers]:
        """What to learn from and what to score on."""

    def requires(self, protocol: RegressionProtocol) -> frozenset[str]:
        return protocol.needs

    def fingerprint(self, setup: Setup[RegressionProtocol]) -> str:
        train, test = self._limited(setup)
        refuse_known(setup, train, test)
        return fingerprint(train.digest, test.digest)

    def run(self, backbone: Backbone, setup: Setup[RegressionProtocol]) -> Outcome:
        train, test = self._limited(setup)
        mark = fingerprint(train.digest, test.digest)
        return on_readable(lambda known, points: self._run(backbone, known, points, mark, setup), setup, train, test)

    def _limited(self, setup: Setup[RegressionProtocol]) -> tuple[Numbers, Numbers]:
        train, test = self.sets(setup)
        return train.limit(setup.limit), test.limit(setup.limit)

    def _run(
        self, backbone: Backbone, train: Numbers, test: Numbers, mark: str, setup: Setup[RegressionProtocol]
    ) -> Outcome:
        recipe, began = setup.protocol, monotonic()
        shown = _shown(recipe, backbone, train)
        known, points = (
            setup.cache.features(
                backbone, part, recipe.outputs, preprocess=shown, device=setup.device, precision=setup.precision,
                workers=setup.encode_workers, channels_last=setup.channels_last, pin_memory=setup.pin_memory,
                progress=setup.progress,
            )
            for part in (train, test)
        )  # fmt: skip
        encoded, sign = monotonic(), -1.0 if recipe.criterion == "mae" else 1.0
        probed = probes.evaluate(
            probes.Ridge(recipe.alphas), probes.Train(known.arrays, train.values, train.groups, kind="regression"),
            points.arrays, lambda scores, values: sign * float(METRICS[recipe.criterion](_like(scores, values),
            values)), normalise=recipe.normalise, selection=recipe.selection, runtime=probes.Runtime(setup.device,
            setup.seed, setup.progress),
        )  # fmt: skip
        predictions = _like(probed.scores.astype(np.float64), test.values)
        scores, replicates = self._measured(predictions, test)
        samples: dict[str, npt.NDArray[Any]] = {"mae": np.abs(predictions - test.values).reshape(len(test), -1).mean(1)}
        if test.groups is not None:
            samples["group"] = np.unique(test.groups, return_inverse=True)[1]
        records = setup.work / "predictions.npz"
        np.savez_compressed(records, predictions=predictions, targets=test.values)
        return Outcome(
            scores=scores, replicates=replicates, samples=samples, ids=test.ids, records={"predictions": records},
            selected=probed.choice.told(),
            warnings=(*(f"{p.split}: {note}" for p in (train, test) for note in p.notes), *probed.warnings),
            timings={"encode": encoded - began, "fit": monotonic() - encoded},
            data={
                "fingerprint": mark, "train_rows": len(train), "test_rows": len(test),
                **{f"test_{why}": count for why, count in test.left_out.items()},
            },
            details={
                "encoded": known.encoded + points.encoded,
                "preprocess": None if shown is None else dataclasses.asdict(shown),
                "validation": [{**s, "score": v if np.isfinite(v) else None} for s, v in probed.choice.table],
            },
        )  # fmt: skip

    def _measured(
        self, predictions: Floats, test: Numbers
    ) -> tuple[dict[str, float | None], dict[str, npt.NDArray[Any]]]:
        """The metrics, and on bootstrap resamples of the rows, or of their groups."""
        once = {m.name: float(METRICS[m.name](predictions, test.values)) for m in self.metrics}
        scores = {name: value if np.isfinite(value) else None for name, value in once.items()}
        blocks = list(weight_blocks(len(test), REPLICATES, 0, test.groups))
        return scores, {
            name: np.concatenate([np.asarray(METRICS[name](predictions, test.values, block)) for block in blocks])
            for name, value in scores.items()
            if value is not None
        }


def _shown(recipe: RegressionProtocol, backbone: Backbone, train: Numbers) -> Preprocess | None:
    """How an image becomes the network's input, decided on the training rows; None for rows that are no pixels."""
    if train.kind not in PIXELS:
        return None
    height, width = backbone.spec.image_size
    rule = Preprocess((height, width), recipe.rule, recipe.ratio, recipe.interpolation)
    return rule.resolved(lambda index: train[index].shape, len(train))


def _like(scores: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Scores (N, T) in the shape of the values."""
    return scores[:, 0] if values.ndim == 1 else scores
