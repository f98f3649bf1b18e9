"""Classification by heads fitted on frozen features: encode once, fit many, score the test split once."""

from __future__ import annotations

import dataclasses
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from evalsuite import probes
from evalsuite.backbone import Backbone
from evalsuite.cache import Cache, Encoded, Output, Preprocess
from evalsuite.data import parse, source
from evalsuite.data.classification import ClassificationSet, ClassificationSource
from evalsuite.errors import DataError, UsageError
from evalsuite.metrics.ranking import (
    auroc,
    balanced_accuracy,
    calibration_error,
    class_accuracy,
    macro,
    per_label,
    top_k_hits,
)
from evalsuite.statistics import weight_blocks
from evalsuite.task import Metric, Outcome, Protocol, Setup, Task

__all__ = [
    "Cifar10",
    "Cifar100",
    "Classify",
    "ClassifyMultilabel",
    "ImageNet",
    "MedMnist",
    "ProbeProtocol",
    "Stl10",
    "TinyImageNet",
]

REPLICATES = 1000
Floats = npt.NDArray[Any]
Scored = tuple[dict[str, float | None], dict[str, Floats], dict[str, Floats]]


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol(Protocol):
    """A head on frozen features of images that are not augmented.

    ``outputs`` are what is read off the network (:class:`evalsuite.cache.Output`); of several, one is chosen with
    the head's hyper-parameters: by accuracy, or by macro AUROC where there are several labels, on the share
    ``validation`` of the training split, which keeps classes and groups together. ``refit``: the chosen head is
    fitted again on all of it. ``rule``, ``ratio`` and ``interpolation`` say how an image becomes the network's input
    (:class:`evalsuite.cache.Preprocess`). ``knn`` takes ``ks`` and ``temperatures``, ``linear`` (logistic regression)
    and ``svm`` ``costs``, ``ridge`` ``alphas``. ``missing_labels``: rows without a label are left out and counted, or
    refused.
    """

    probe: Literal["knn", "linear", "ridge", "svm"]
    train_split: str = "train"
    test_split: str = "test|val"
    outputs: tuple[str, ...] = ("pooled",)
    normalise: Literal["none", "l2", "l2+1e-5", "standard"] = "none"
    validation: float = 0.1
    refit: bool = True
    rule: Literal["crop", "squash", "pad"] = "crop"
    ratio: float = 224 / 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    ks: tuple[int, ...] = ()
    temperatures: tuple[float, ...] = ()
    costs: tuple[float, ...] = ()
    alphas: tuple[float, ...] = ()
    missing_labels: Literal["skip", "refuse"] = "skip"

    def head(self) -> probes.Probe:
        """The family of heads with its grid."""
        if self.probe == "knn":
            return probes.NearestNeighbours(self.ks, self.temperatures)
        if self.probe == "linear":
            return probes.Logistic(self.costs)
        return probes.Ridge(self.alphas) if self.probe == "ridge" else probes.LinearSVM(self.costs)


def _recipes(rule: Literal["crop", "squash"]) -> tuple[ProbeProtocol, ...]:
    """The protocols all tasks here share. All are ours but for ``knn-20``."""
    return (
        ProbeProtocol(id="linear", version=1, probe="linear", costs=probes.Logistic().costs, rule=rule),
        ProbeProtocol(
            id="knn", version=1, probe="knn", ks=(1, 5, 10, 20, 50, 100, 200), temperatures=(0.02, 0.07, 0.2, 1.0),
            rule=rule,
        ),
        ProbeProtocol(id="knn-20", version=1, probe="knn", ks=(20,), temperatures=(0.07,), rule=rule),
        ProbeProtocol(
            id="ridge", version=1, probe="ridge", alphas=probes.Ridge().alphas, normalise="standard", rule=rule
        ),
        ProbeProtocol(
            id="svm", version=1, probe="svm", costs=probes.LinearSVM().costs, normalise="l2+1e-5", rule=rule
        ),
    )  # fmt: skip


class _Probing(Task):
    needs = frozenset({"pooled"})
    protocols: ClassVar[tuple[ProbeProtocol, ...]]

    def requires(self, protocol: Protocol) -> frozenset[str]:
        if not isinstance(protocol, ProbeProtocol):
            return self.needs
        sources = [Output.parse(name).source for name in protocol.outputs]
        given = {"maps" if name.startswith("map") else name for name in sources if not name.startswith("layer:")}
        return frozenset(given)

    @abstractmethod
    def place(self, setup: Setup) -> tuple[ClassificationSource, Path]:
        """The layout of the data, and where they lie."""

    @abstractmethod
    def score(self, scores: Floats, scale: str, test: ClassificationSet) -> Scored:
        """Scores, replicates and samples of (N, C) ``scores`` for the labels of ``test``."""

    @abstractmethod
    def check(self, data: ClassificationSet) -> None:
        """Refuse labels of the wrong kind."""

    def sets(self, setup: Setup) -> tuple[ClassificationSet, ClassificationSet]:
        """What to learn from and what to score on, rows without a label left out."""
        layout, path = self.place(setup)
        protocol = _protocol(setup)
        roles = layout.roles(path)
        train, test = (_role(roles, wanted) for wanted in (protocol.train_split, protocol.test_split))
        found = _load(layout, path, train, test)
        for part in found:
            self.check(part)
        first, second = (_labelled(part, protocol.missing_labels).limit(setup.limit) for part in found)
        if not first.multilabel and len(np.unique(first.labels)) < 2:
            raise DataError(
                f"{first.name} {first.split} holds a single class",
                cause=f"its {len(first)} images are all of class {first.classes[int(first.labels[0])]}",
                fix="there is nothing to tell apart; check the labels, or raise --limit",
            )
        return first, second

    def fingerprint(self, setup: Setup) -> str:
        train, test = self.sets(setup)
        return f"{train.digest[:16]}-{test.digest[:16]}"

    def run(self, backbone: Backbone, setup: Setup) -> Outcome:
        protocol = _protocol(setup)
        train, test = self.sets(setup)
        began = monotonic()
        known, asked = (_encode(backbone, part, setup) for part in (train, test))
        encoded = monotonic()
        learnt = probes.Train(known.arrays, train.labels, train.groups, len(train.classes))
        sealed = probes.Test(asked.arrays, test.labels)
        head = protocol.head()
        found = probes.evaluate(
            head, learnt, sealed, normalise=protocol.normalise, validation=protocol.validation, refit=protocol.refit,
            site=probes.Site(setup.device, setup.seed, setup.progress),
        )  # fmt: skip
        fitted = monotonic()
        scores, replicates, samples = self.score(found.scores, head.scale, test)
        if test.groups is not None:
            samples["group"] = np.unique(test.groups, return_inverse=True)[1]
        chosen = dict(found.choice.setting) | ({"C": found.details["C"]} if protocol.probe == "svm" else {})
        records = setup.work / "predictions.npz"
        _write_predictions(records, found.scores, test)
        return Outcome(
            scores=scores,
            replicates=replicates,
            samples=samples,
            ids=test.ids,
            data={"fingerprint": self.fingerprint(setup), **_described(train, test)},
            records={"predictions": records},
            selected={**chosen, "validation_score": found.choice.value},
            timings={"encode": encoded - began, "fit": fitted - encoded, "score": monotonic() - fitted},
            details={
                "encoded": known.encoded + asked.encoded,
                "validation": [{**s, "score": v if np.isfinite(v) else None} for s, v in found.choice.table],
                "fit": dict(found.details),
                **_by_class(found.scores, test),
            },
            warnings=(*_warnings(train, test), *found.warnings),
        )  # fmt: skip


class _OneClass(_Probing):
    """Scores of one class an image."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("top1"), Metric("top5"), Metric("balanced_accuracy"), Metric("ece", higher_is_better=False),
    )  # fmt: skip
    primary = "top1"
    one_against_rest: ClassVar[bool] = False  # whether AUROC is taken of more than two classes

    def check(self, data: ClassificationSet) -> None:
        if data.multilabel:
            raise DataError(
                f"{data.name} has several labels an image",
                cause=f"{self.name} scores one class an image",
                fix="--task classify-multilabel",
            )

    def score(self, scores: Floats, scale: str, test: ClassificationSet) -> Scored:
        classes, labels = len(test.classes), test.labels
        hits = {"top1": top_k_hits(scores, labels)}
        if classes > 5:
            hits["top5"] = top_k_hits(scores, labels, 5)
        chances = None if scale == "margins" else scores if scale == "probabilities" else _softmax(scores)
        promised = [metric.name for metric in self.metrics]
        ranks = _ranks(scores, scale) if "auroc" in promised and (classes == 2 or self.one_against_rest) else None
        onehot = np.eye(classes)[labels] if ranks is not None and ranks.ndim == 2 else None

        def measure(weights: Floats) -> dict[str, Floats]:
            found = {name: weights @ hit / weights.sum(axis=1) for name, hit in hits.items()}
            found["balanced_accuracy"] = balanced_accuracy(hits["top1"], labels, classes, weights)
            if chances is not None:
                found["ece"] = calibration_error(chances, labels, weights)
            if ranks is not None and onehot is not None:
                found["auroc"] = np.asarray(macro(per_label("auroc", ranks, onehot, weights)))
            elif ranks is not None:
                found["auroc"] = auroc(ranks, labels, weights)
            return found

        values, replicates = _resampled(measure, test, promised)
        return values, replicates, {name: hit.astype(np.float32) for name, hit in hits.items()}


class _Named(_OneClass):
    """A data set of its own name below the data root."""

    def place(self, setup: Setup) -> tuple[ClassificationSource, Path]:
        layout = source(setup.registry, self.name)
        assert isinstance(layout, ClassificationSource)
        return layout, layout.locate(setup.data_root)


class Cifar10(_Named):
    """CIFAR-10: 50,000 images to learn from, 10,000 to score on, at the backbone's own image size.

    Protocols: ``linear`` (default; logistic regression at 45 costs), ``knn``, ``knn-20`` (k = 20, T = 0.07, as DINO
    reports it), ``ridge``, ``svm`` (one against the rest, as VISSL does for VOC07).
    """

    name = "cifar10"
    protocols = _recipes("squash")


class Cifar100(_Named):
    """CIFAR-100, its hundred fine classes; protocols as of ``cifar10``."""

    name = "cifar100"
    protocols = _recipes("squash")


class Stl10(_Named):
    """STL-10: 5,000 labelled images to learn from, 8,000 to score on; protocols as of ``cifar10``."""

    name = "stl10"
    protocols = _recipes("squash")


class TinyImageNet(_Named):
    """Tiny ImageNet: 100,000 images to learn from, scored on the 10,000 of val; protocols as of ``cifar10``."""

    name = "tiny-imagenet"
    protocols = _recipes("squash")


class ImageNet(_Named):
    """ImageNet-1k, scored on val; resized to 256/224 of the backbone's image size, and its centre cut out.

    Protocols as of ``cifar10``. Training images are not augmented: these are no published linear evaluations.
    """

    name = "imagenet"
    protocols = _recipes("crop")


class _AnyData(_Probing):
    """Data of the user's own."""

    generic = True

    def place(self, setup: Setup) -> tuple[ClassificationSource, Path]:
        if setup.data is None:
            raise UsageError(
                f"{self.name} needs data",
                cause="it is a task for data of your own",
                fix="--data folder:PATH, --data csv:PATH or --data npz:PATH",
            )
        layout, path = parse(setup.data, setup.registry)
        if not isinstance(layout, ClassificationSource):
            raise UsageError(
                f"--data {setup.data} does not label whole images",
                cause=f"{layout.name} is a layout of another task",
                fix="--data folder:PATH, --data csv:PATH or --data npz:PATH",
            )
        return layout, path


class Classify(_AnyData, _OneClass):
    """Anybody's images with one class each: ``--data folder:PATH``, ``csv:PATH`` or ``npz:PATH``.

    It learns from the split ``train`` and scores on ``test`` or, where there is none, on ``val``. ``auroc`` is of two
    classes, the second one positive. Protocols as of ``cifar10``; ``--set rule=squash`` keeps whole images in view.
    """

    name = "classify"
    metrics = (*_OneClass.metrics, Metric("auroc"))
    protocols = _recipes("crop")


class ClassifyMultilabel(_AnyData):
    """Anybody's images with several labels each: CSV columns ``label:NAME``, or rows of marks in an NPZ file.

    Labels are scored where they are known; those without positives or negatives in the test split are left out of
    the mean. ``auroc`` and ``map`` (area under the step curve) are means over labels. Protocols as of ``classify``.
    """

    name = "classify-multilabel"
    metrics = (Metric("auroc"), Metric("map"))
    primary = "auroc"
    protocols = _recipes("crop")

    def check(self, data: ClassificationSet) -> None:
        if not data.multilabel:
            raise DataError(
                f"{data.name} has one class an image",
                cause=f"{self.name} scores several labels an image",
                fix="--task classify",
            )

    def score(self, scores: Floats, scale: str, test: ClassificationSet) -> Scored:
        def measure(weights: Floats) -> dict[str, Floats]:
            return {
                "auroc": np.asarray(macro(per_label("auroc", scores, test.labels, weights))),
                "map": np.asarray(macro(per_label("step", scores, test.labels, weights))),
            }

        return *_resampled(measure, test, ["auroc", "map"]), {}


class MedMnist(_AnyData, _OneClass):
    """A MedMNIST data set with one class an image: ``--data npz:PATH``, or ``medmnist`` below the data root.

    It learns from ``train`` and scores on the official ``test``. ``auroc`` is the mean over classes against the rest,
    ``top1`` what MedMNIST calls ACC. Protocols as of ``cifar10``.
    """

    name = "medmnist"
    metrics = (*_OneClass.metrics, Metric("auroc"))
    primary = "auroc"
    protocols = _recipes("squash")
    one_against_rest = True

    def place(self, setup: Setup) -> tuple[ClassificationSource, Path]:
        if setup.data is not None:
            return super().place(setup)
        layout = source(setup.registry, self.name)
        assert isinstance(layout, ClassificationSource)
        return layout, layout.locate(setup.data_root)


# --- data -------------------------------------------------------------------------------------------------------


def _protocol(setup: Setup) -> ProbeProtocol:
    assert isinstance(setup.protocol, ProbeProtocol)
    return setup.protocol


def _role(roles: Mapping[str, str], wanted: str) -> str:
    """The split of the first of the roles ``a|b`` that the data have; a name that is no role is a split's own."""
    return next((roles[name] for name in wanted.split("|") if name in roles), wanted)


_LOADED: dict[tuple[Any, ...], tuple[ClassificationSet, ClassificationSet]] = {}


def _load(
    layout: ClassificationSource, path: Path, train: str, test: str
) -> tuple[ClassificationSet, ClassificationSet]:
    """Both splits; the last pair is kept, since fingerprint, run and every seed ask for the same one.

    It is read again when a file is added or taken away.
    """
    key = (type(layout), path.resolve(), train, test, _stamp(path))
    if key not in _LOADED:
        _LOADED.clear()
        first, second = layout.load(path, train), layout.load(path, test)
        if first.classes != second.classes:
            raise DataError(
                f"{train} and {test} of {path} do not have the same classes",
                cause=f"only in one of them: {', '.join(sorted(set(first.classes) ^ set(second.classes)))}",
                fix="name the same classes in both",
            )
        _LOADED[key] = first, second
    return _LOADED[key]


def _stamp(path: Path) -> tuple[int, ...]:
    """When the file, or any folder below and including this one, was last changed."""
    if path.is_file():
        return path.stat().st_mtime_ns, path.stat().st_size
    places = (place for top, below, _ in os.walk(path) for place in (top, *(os.path.join(top, b) for b in below)))
    return tuple(os.stat(place).st_mtime_ns for place in places)


def _labelled(data: ClassificationSet, missing: str) -> ClassificationSet:
    """The rows that have a label."""
    known = data.known
    if known.all():
        return data
    lost = int((~known).sum())
    if missing == "refuse" or not known.any():
        raise DataError(
            f"{lost} of {len(data)} images of {data.name} {data.split} have no label",
            cause=f"the first is {data.names[~known][0]}",
            fix="label them, or leave them out with --set missing_labels=skip" if known.any() else "label them",
        )
    notes = (*data.notes, f"{lost} images have no label and are left out")
    return dataclasses.replace(data.take(known), notes=notes)


def _encode(backbone: Backbone, data: ClassificationSet, setup: Setup) -> Encoded:
    protocol = _protocol(setup)
    height, width = backbone.spec.image_size
    preprocess = Preprocess((height, width), protocol.rule, protocol.ratio, protocol.interpolation)
    return Cache().features(
        backbone, data, protocol.outputs, preprocess=preprocess, device=setup.device, precision=setup.precision,
        workers=setup.workers, progress=setup.progress,
    )  # fmt: skip


def _described(train: ClassificationSet, test: ClassificationSet) -> dict[str, Any]:
    found: dict[str, Any] = {
        "train": f"{train.name} {train.split}", "train_images": len(train),
        "test": f"{test.name} {test.split}", "test_images": len(test), "classes": len(test.classes),
    }  # fmt: skip
    if test.groups is not None:
        found["test_groups"] = len(set(test.groups.tolist()))
    return found


def _warnings(train: ClassificationSet, test: ClassificationSet) -> list[str]:
    told = [f"{part.split}: {note}" for part in (train, test) for note in part.notes]
    if train.groups is not None and test.groups is not None:
        shared = len(set(train.groups.tolist()) & set(test.groups.tolist()))
        if shared:
            told.append(f"{shared} groups are in both {train.split} and {test.split}: scores are too high")
    if not train.multilabel:
        lone = int((np.bincount(train.labels, minlength=len(train.classes)) == 1).sum())
        if lone:
            told.append(f"{lone} classes have a single training image")
    return told


# --- scores -----------------------------------------------------------------------------------------------------


def _resampled(
    measure: Callable[[Floats], dict[str, Floats]], test: ClassificationSet, promised: Sequence[str]
) -> tuple[dict[str, float | None], dict[str, Floats]]:
    """Every promised metric on the data, None where it is undefined, and on bootstrap resamples of the samples.

    Whole groups are drawn where there are groups. The resamples are the same for every backbone, seed and protocol,
    so that replicates are paired.
    """
    once = {name: float(v[0]) for name, v in measure(np.ones((1, len(test)))).items()}
    values: dict[str, float | None] = {n: once[n] if np.isfinite(once.get(n, np.nan)) else None for n in promised}
    parts: dict[str, list[Floats]] = {name: [] for name, value in values.items() if value is not None}
    for block in weight_blocks(len(test), REPLICATES, 0, test.groups):
        found = measure(block.astype(np.float64))
        for name, part in parts.items():
            part.append(found[name])
    return values, {name: np.concatenate(part) for name, part in parts.items()}


def _softmax(logits: Floats) -> Floats:
    chances: Floats = np.exp(log_softmax(logits.astype(np.float64), axis=1))
    return chances


def _ranks(scores: Floats, scale: str) -> Floats:
    """What AUROC ranks by: of two classes the difference (N,), else each class's own chance or margin (N, C)."""
    if scores.shape[1] == 2:
        return np.asarray(scores[:, 1].astype(np.float64) - scores[:, 0])
    return np.asarray(log_softmax(scores.astype(np.float64), axis=1)) if scale == "logits" else scores


def _by_class(scores: Floats, test: ClassificationSet) -> dict[str, Any]:
    """Accuracy, or AUROC, of every class; None where the test split has none of it."""
    if test.multilabel:
        name, values = "auroc_by_class", per_label("auroc", scores, test.labels)
    else:
        values = class_accuracy(top_k_hits(scores, test.labels), test.labels, len(test.classes))
        name = "accuracy_by_class"
    return {name: {c: float(v) if np.isfinite(v) else None for c, v in zip(test.classes, values, strict=True)}}


def _write_predictions(path: Path, scores: Floats, test: ClassificationSet, most: int = 5) -> None:
    """The labels and, of each image, the best classes with their scores; of several labels all scores."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :most]
    if test.multilabel:
        best = np.tile(np.arange(scores.shape[1]), (len(scores), 1))
    np.savez_compressed(
        path, labels=test.labels.astype(np.int32), classes=best.astype(np.int32),
        scores=np.take_along_axis(scores, best, axis=1).astype(np.float32), names=np.array(test.classes),
    )  # fmt: skip
