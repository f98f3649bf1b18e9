"""How heads are fitted on a backbone: on features that are encoded once, on all training images or on a few a class."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from evalsuite import probes
from evalsuite.backbone import Backbone
from evalsuite.data.classification import ClassificationSet
from evalsuite.errors import DataError, UsageError
from evalsuite.features import SMALL, Encoded, Output, Preprocess
from evalsuite.task import Protocol, Setup

__all__ = [
    "Criterion",
    "FewShotProtocol",
    "Fitted",
    "Floats",
    "ImageProtocol",
    "ProbeProtocol",
    "Scale",
    "Shot",
    "recipes",
    "vectors_only",
]

Floats = npt.NDArray[Any]
Scale = Literal["logits", "probabilities", "margins"]

# How good (N, C) scores of a scale are for (N,) or (N, L) labels by the task's primary metric; higher is better.
Criterion = Callable[[Floats, npt.NDArray[Any], Scale], float]


class Shot(NamedTuple):
    """Scores (N, C) of the test images by a head that learnt from draw number ``draw`` of ``k`` images a class."""

    k: int
    draw: int
    scores: Floats


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What heads say of the test images.

    ``scores`` are (N, C), one row an image; or, one by one, those of many small training sets. ``choice`` holds the
    hyper-parameters that were chosen and ``table`` every setting that was tried with its validation score.
    ``timings`` are seconds by phase.
    """

    scores: Floats | Iterator[Shot]
    scale: Scale
    choice: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    table: Sequence[tuple[Mapping[str, Any], float]] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ImageProtocol(Protocol, ABC):
    """Heads on a backbone, of whatever kind, that score labelled images.

    ``train_split`` and ``test_split`` are roles, or a split's own name; ``a|b`` is the first of them that the data
    have. ``fraction`` is the share of the training labels to learn from: the official list of the data set where it
    has one and it is there, else a draw by the run's seed, of each class its share and one image at least.
    ``outputs`` are what is read off the network (:class:`evalsuite.features.Output`). ``rule``, ``ratio``, ``small``,
    ``interpolation`` and ``resize`` say how an image that is not augmented becomes the network's input
    (:class:`evalsuite.features.Preprocess`); ``auto`` is decided once, on the training images, for all. What was done
    is ``preprocess`` in a result's details.
    """

    train_split: str = "train"
    test_split: str = "test|val"
    fraction: float = 1.0
    outputs: tuple[str, ...] = ("pooled",)
    rule: Literal["auto", "crop", "squash", "pad"] = "auto"
    ratio: float = 224 / 256
    small: int = SMALL
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    resize: Literal["workers", "device"] = "workers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise UsageError(
                f"{self.fraction} of the training labels",
                cause="a share is more than 0, and 1 at most",
                fix="--set fraction=0.1",
            )

    @abstractmethod
    def fit(
        self, backbone: Backbone, train: ClassificationSet, test: ClassificationSet, criterion: Criterion, setup: Setup
    ) -> Fitted:
        """Fit heads on ``train`` and score ``test``, all of whose labels are hidden (-1).

        Where there is something to choose, ``criterion`` judges it on a part held out of ``train``.
        """

    @property
    def needs(self) -> frozenset[str]:
        """What a backbone must give: ``pooled``, ``maps`` or ``tokens``."""
        return frozenset[str]().union(*(Output.parse(name).needs for name in self.outputs))

    def input_size(self, backbone: Backbone) -> tuple[int, int]:
        """(height, width) in pixels of what this backbone is shown."""
        height, width = backbone.spec.image_size
        return height, width

    def preprocess(self, backbone: Backbone, train: ClassificationSet) -> Preprocess:
        """How an image becomes this backbone's input, training or test image; of ``train`` whole, whatever is drawn."""
        rule = Preprocess(self.input_size(backbone), self.rule, self.ratio, self.interpolation, self.resize)
        return rule.resolved(lambda place: train.pixels[place].shape, len(train.pixels), self.small)

    def encode(
        self, backbone: Backbone, data: ClassificationSet, setup: Setup, preprocess: Preprocess | None = None
    ) -> Encoded:
        """The outputs of every image, from the cache or into it; ``preprocess`` is by default that of ``data``."""
        return setup.cache.features(
            backbone, data, self.outputs, preprocess=preprocess or self.preprocess(backbone, data),
            device=setup.device, precision=setup.precision, workers=setup.encode_workers,
            channels_last=setup.channels_last, pin_memory=setup.pin_memory, progress=setup.progress,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol(ImageProtocol):
    """A head on frozen features of images that are not augmented.

    Of several ``outputs``, one is chosen with the head's hyper-parameters: by the task's primary metric on the share
    ``validation`` of the training images, which keeps classes and groups together; of fewer than ``folds_below`` on
    all of them, in ``folds`` parts (:class:`evalsuite.probes.Selection`). ``refit``: the chosen head is fitted again on
    all of them. ``knn`` takes ``ks`` and ``temperatures``, ``linear`` (logistic regression) and ``svm`` ``costs``,
    which ``svm`` chooses class by class, always in ``folds`` parts, ``ridge`` ``alphas``, ``prototypes``, the nearest
    class mean, nothing, and ``sgd``, linear heads that all learn in one pass, ``lrs``, ``weight_decays``, ``epochs``
    and ``batch_size``; their rates fall along a cosine to zero, step by step, with a momentum of 0.9.
    """

    probe: Literal["knn", "linear", "ridge", "svm", "prototypes", "sgd"]
    normalise: probes.Normalise = "none"
    validation: float = 0.1
    folds: int = 5
    folds_below: int = 1000
    refit: bool = True
    ks: tuple[int, ...] = ()
    temperatures: tuple[float, ...] = ()
    costs: tuple[float, ...] = ()
    alphas: tuple[float, ...] = ()
    lrs: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()
    epochs: int = 0
    batch_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        vectors_only(self.id, map(Output.parse, self.outputs))
        _ = self.selection  # refuses numbers by which nothing can be chosen

    def head(self) -> probes.Probe:
        """The family of heads with its grid."""
        if self.probe == "knn":
            return probes.NearestNeighbours(self.ks, self.temperatures)
        if self.probe == "linear":
            return probes.Logistic(self.costs)
        if self.probe == "prototypes":
            return probes.Prototypes()
        if self.probe == "sgd":
            return probes.SgdHeads(self.lrs, self.weight_decays, self.epochs, self.batch_size)
        return probes.Ridge(self.alphas) if self.probe == "ridge" else probes.LinearSVM(self.costs, folds=self.folds)

    @property
    def selection(self) -> probes.Selection:
        """How a setting is chosen."""
        return probes.Selection(self.validation, self.folds, self.folds_below)

    @property
    def chooses(self) -> bool:
        """Whether there is more than one setting of the head, or output."""
        return len(self.outputs) * len(self.head().settings(10**9)) > 1

    @property
    def seeded(self) -> bool:
        """Whether parts of the training images are drawn, to learn from or to choose on, or the head draws itself."""
        return self.fraction < 1 or self.chooses or self.probe in ("sgd", "svm")

    def fit(
        self, backbone: Backbone, train: ClassificationSet, test: ClassificationSet, criterion: Criterion, setup: Setup
    ) -> Fitted:
        """Encode both splits, choose a setting on a part of ``train``, fit it on all of it, score ``test``."""
        began, shown = monotonic(), self.preprocess(backbone, train)
        known, asked = (self.encode(backbone, part, setup, shown) for part in (train, test))
        encoded, head = monotonic(), self.head()
        found = probes.evaluate(
            head, probes.Train(known.arrays, train.labels, train.groups, len(train.classes)),
            asked.arrays, lambda scores, labels: criterion(scores, labels, head.scale),
            normalise=self.normalise, selection=self.selection, refit=self.refit, runtime=_runtime(setup),
        )  # fmt: skip
        return Fitted(
            scores=found.scores, scale=head.scale, table=found.choice.table, warnings=found.warnings,
            choice={**found.choice.told(), **({"C": found.details["C"]} if self.probe == "svm" else {})},
            details={
                "encoded": known.encoded + asked.encoded, "preprocess": dataclasses.asdict(shown),
                "fit": dict(found.details),
            },
            timings={"encode": encoded - began, "fit": monotonic() - encoded},
        )  # fmt: skip


def vectors_only(protocol: str, outputs: Iterable[Output]) -> None:
    """Raise :class:`UsageError` for an output that is kept whole, of which a head on vectors can make nothing."""
    for output in outputs:
        if not output.vector:
            raise UsageError(
                f"protocol {protocol!r} fits heads on vectors, and {output.name!r} is none",
                cause="what is read whole keeps its shape, for a protocol whose head takes all tokens or all of a map",
                fix=f"pool it: {output.source}/avg or {output.source}/max",
            )


@dataclass(frozen=True, kw_only=True)
class FewShotProtocol(ProbeProtocol):
    """A head with one setting, fitted ``draws`` times on each of ``shots`` images a class.

    A score of k images is the mean over draws; its interval is of both draws and test images. The task's primary
    metric is the mean over ``shots``. Of one class an image, k images of each are drawn; a number that some class
    does not reach is left out and told. Of several labels, k positives and (L - 1) k negatives are drawn for each
    label, or all there are (VISSL). Draws depend on the run's seed.
    """

    shots: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 96)
    draws: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shots or min(self.shots) < 1 or self.draws < 1:
            raise UsageError(
                f"protocol {self.id!r} has nothing to draw",
                cause=f"shots are {self.shots} and draws {self.draws}",
                fix="for example --set shots=1,4,16 --set draws=5",
            )
        if self.chooses:
            raise UsageError(
                f"protocol {self.id!r} has something to choose",
                cause="a few images leave none to choose by",
                fix="give it one output, and one setting of the head",
            )

    def fit(
        self, backbone: Backbone, train: ClassificationSet, test: ClassificationSet, criterion: Criterion, setup: Setup
    ) -> Fitted:
        """Encode both splits once, for all draws."""
        began, head, shown = monotonic(), self.head(), self.preprocess(backbone, train)
        known, asked = (self.encode(backbone, part, setup, shown) for part in (train, test))
        encoded = monotonic()
        learnt = probes.Train(known.arrays, train.labels, train.groups, len(train.classes))
        ks, told = self._reached(train)
        points = asked.arrays[self.outputs[0]]
        shots = probes.few_shots(
            head, learnt, points, ks, self.draws, normalise=self.normalise, runtime=_runtime(setup)
        )
        return Fitted(
            scores=(Shot(*shot) for shot in shots), scale=head.scale, warnings=told,
            details={"encoded": known.encoded + asked.encoded, "preprocess": dataclasses.asdict(shown)},
            timings={"encode": encoded - began},
        )  # fmt: skip

    @property
    def seeded(self) -> bool:
        return True

    def _reached(self, train: ClassificationSet) -> tuple[list[int], tuple[str, ...]]:
        """The numbers of images that every class has, and what is told of the others; of several labels all numbers."""
        if train.multilabel:
            fewest = int((train.labels == 1).sum(axis=0).min())
            more = [str(k) for k in self.shots if k > fewest]
            told = f"draws of {', '.join(more)} images hold all of some label: there are {fewest}"
            return list(self.shots), (told,) if more else ()
        fewest = int(np.bincount(train.labels)[np.unique(train.labels)].min())
        ks = [k for k in self.shots if k <= fewest]
        if not ks:
            raise DataError(
                f"some class of {train.name} {train.split} has {fewest} images",
                cause=f"every one of {', '.join(map(str, self.shots))} shots is an image of its own",
                fix="ask for fewer: --set shots=1",
            )
        lost = [str(k) for k in self.shots if k > fewest]
        return ks, (f"no draws of {', '.join(lost)} images: some class has {fewest}",) if lost else ()


def recipes(rule: Literal["auto", "crop", "squash"] = "auto") -> tuple[ImageProtocol, ...]:
    """The protocols on cached features that all tasks share; all are ours but for ``knn-20``.

    ``linear``: logistic regression at 45 costs, as DINOv2's and the fastest of the linear ones; also on 1 % and 10 % of
    the labels, ``linear-1`` and ``linear-10``. ``knn``: k and T are chosen; ``knn-20``: k = 20 and T = 0.07, as DINO
    reports it. ``ridge`` and ``svm``, one machine a class (VOC07's protocol). ``sweep``:
    linear heads by SGD, many learning rates and weight decays in one pass, as DINOv2 does for a grid of learning rates
    and layers; of images that are not augmented, and chosen on a part of the training data, where DINOv2 takes the
    best on the data that it reports. ``few-shot``: the nearest class mean (the few-shot classifier of OBoW, here
    over all classes at once) and ``few-shot-linear``, logistic regression at C = 1, of 1 to 96 images a class.
    """
    linear = ProbeProtocol(id="linear", version=2, probe="linear", costs=probes.Logistic().costs, rule=rule)
    return (
        linear,
        dataclasses.replace(linear, id="linear-1", fraction=0.01),
        dataclasses.replace(linear, id="linear-10", fraction=0.1),
        ProbeProtocol(
            id="knn", version=2, probe="knn", ks=(1, 5, 10, 20, 50, 100, 200), temperatures=(0.02, 0.07, 0.2, 1.0),
            rule=rule,
        ),
        ProbeProtocol(id="knn-20", version=2, probe="knn", ks=(20,), temperatures=(0.07,), rule=rule),
        ProbeProtocol(
            id="ridge", version=2, probe="ridge", alphas=probes.Ridge().alphas, normalise="standard", rule=rule
        ),
        ProbeProtocol(
            id="svm", version=2, probe="svm", costs=probes.LinearSVM().costs, folds=3, normalise="l2+1e-5", rule=rule
        ),
        ProbeProtocol(
            id="sweep", version=2, probe="sgd", lrs=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
            weight_decays=(0.0, 1e-6, 1e-4), epochs=100, batch_size=256, rule=rule,
        ),
        FewShotProtocol(id="few-shot", version=2, probe="prototypes", rule=rule),
        FewShotProtocol(
            id="few-shot-linear", version=2, probe="linear", costs=(1.0,), normalise="standard", rule=rule
        ),
    )  # fmt: skip


def _runtime(setup: Setup) -> probes.Runtime:
    return probes.Runtime(setup.device, setup.seed, setup.progress)
