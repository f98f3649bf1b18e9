"""Tasks on labelled images: where the data lie, and how scores on the test images are measured."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from evalsuite import probes
from evalsuite.backbone import Backbone
from evalsuite.data import reading, source
from evalsuite.data.classification import ClassificationSet, ClassificationSource, refuse_single_class
from evalsuite.data.digests import fingerprint, loaded
from evalsuite.errors import DataError, ImageError
from evalsuite.metrics.ranking import (
    auroc,
    balanced_accuracy,
    calibration_error,
    class_accuracy,
    macro,
    per_label,
    top_k_hits,
)
from evalsuite.probing.protocols import FewShotProtocol, Fitted, Floats, ImageProtocol, Scale
from evalsuite.statistics import REPLICATES, over_seeds, weight_blocks
from evalsuite.task import Metric, Outcome, Protocol, Setup, Task

__all__ = ["AUROC", "ECE", "NO_LABEL", "Multilabel", "Named", "OneClass", "Probing", "on_readable", "refuse_known"]


FEW_TEST = 5  # test images of a class, below which its accuracy says next to nothing
TOP5 = Metric("top5", undefined="there are no more than five classes")
ECE = Metric("ece", higher_is_better=False, undefined="the scores of this protocol are no probabilities")
NO_LABEL = "no label has both positives and negatives among the test images"
AUROC = Metric("auroc", undefined="it takes two classes, both among the test images")
Measure = Callable[[Floats], dict[str, Floats]]
Scored = tuple[dict[str, float | None], dict[str, Floats], dict[str, Floats]]


# --- tasks ------------------------------------------------------------------------------------------------------


class Probing(Task[ImageProtocol]):
    """A task on labelled images.

    Subclasses say where the data are, which labels they have and how scores are measured.
    """

    needs = frozenset({"pooled"})
    protocols: ClassVar[tuple[ImageProtocol, ...]]

    @abstractmethod
    def place(self, setup: Setup[ImageProtocol]) -> tuple[ClassificationSource, Path]:
        """The layout of the data, and where they lie."""

    @abstractmethod
    def check(self, data: ClassificationSet) -> None:
        """Refuse labels of the wrong kind."""

    @abstractmethod
    def measure(self, scores: Floats, labels: npt.NDArray[Any], scale: Scale, wanted: Sequence[str]) -> Measure:
        """A function from sample weights (R, N) to the ``wanted`` metrics {name: (R,)} of ``scores`` (N, C).

        It may leave one out that is undefined on these data, or give NaN.
        """

    @abstractmethod
    def by_class(self, scores: Floats, test: ClassificationSet) -> dict[str, Floats]:
        """Scores of every class or label {name: (C,)}, NaN where undefined, to tell beside the metrics."""

    def samples(self, scores: Floats, test: ClassificationSet) -> dict[str, Floats]:
        """Per-sample scores {metric: (N,)} for paired tests, of metrics that are means over samples."""
        return {}

    def prepared(self, data: ClassificationSet, protocol: Protocol) -> ClassificationSet:
        """A split as it is learnt from or scored on: which rows, and what marks mean. As it is, if no task says so."""
        return data

    def units(self, scores: Floats, scale: Scale, test: ClassificationSet) -> tuple[Floats, ClassificationSet]:
        """What is scored: every image, unless a task joins those of a study or a patient, in scores of the same scale.

        The set that is returned gives the labels, names and groups of the rows of the scores.
        """
        return scores, test

    def requires(self, protocol: ImageProtocol) -> frozenset[str]:
        return protocol.needs

    def promises(self, protocol: ImageProtocol) -> tuple[Metric, ...]:
        if not isinstance(protocol, FewShotProtocol):
            return self.metrics
        (primary,) = (metric for metric in self.metrics if metric.name == self.primary)
        few = dataclasses.replace(primary, undefined="some class has fewer images than that to learn from")
        return primary, *(dataclasses.replace(few, name=f"{primary.name}_k{k}") for k in protocol.shots)

    def sets(self, setup: Setup[ImageProtocol]) -> tuple[ClassificationSet, ClassificationSet]:
        """What to learn from and what to score on, rows without a label left out."""
        layout, path = self.place(setup)
        protocol = setup.protocol
        found = _load(layout, path, protocol.train_split, protocol.test_split)
        for part in found:
            self.check(part)
        first, second = (_labelled(self.prepared(part, protocol), setup.strict) for part in found)
        first = first if protocol.fraction == 1 else layout.official(path, first, protocol.fraction) or first
        first, second = first.limit(setup.limit), second.limit(setup.limit)
        if not first.multilabel:
            refuse_single_class(first)
        return first, second

    def fingerprint(self, setup: Setup[ImageProtocol]) -> str:
        train, test = self.sets(setup)
        refuse_known(setup, train, test)
        return fingerprint(train.digest, test.digest)

    def run(self, backbone: Backbone, setup: Setup[ImageProtocol]) -> Outcome:
        train, test = self.sets(setup)
        outcome = on_readable(lambda known, asked: self._run(backbone, known, asked, setup), setup, train, test)
        return dataclasses.replace(outcome, warnings=(*outcome.warnings, *_copied(train, test)))

    def _run(
        self, backbone: Backbone, train: ClassificationSet, test: ClassificationSet, setup: Setup[ImageProtocol]
    ) -> Outcome:
        learnt = _drawn(train, setup.protocol.fraction, setup.seed)
        found = setup.protocol.fit(backbone, learnt, _hidden(test), self.criterion, setup)
        began = monotonic()
        told = self._few(found, test, setup) if isinstance(found.scores, Iterator) else self._all(found, test, setup)
        return dataclasses.replace(
            told,
            data={"fingerprint": self.fingerprint(setup), **_described(learnt, test)},
            selected=dict(found.choice),
            timings={**found.timings, "score": monotonic() - began},
            details={
                **found.details, **told.details,
                "validation": [{**s, "score": v if np.isfinite(v) else None} for s, v in found.table],
            },
            warnings=(*_warnings(learnt, test), *found.warnings),
        )  # fmt: skip

    def criterion(self, scores: Floats, labels: npt.NDArray[Any], scale: Scale) -> float:
        """The primary metric of (N, C) scores; higher is better. NaN where it is undefined."""
        (primary,) = (metric for metric in self.metrics if metric.name == self.primary)
        found = self.measure(scores, labels, scale, [self.primary])(np.ones((1, len(labels))))
        value = float(found[self.primary][0]) if self.primary in found else float("nan")
        return value if primary.higher_is_better else -value

    def _all(self, found: Fitted, test: ClassificationSet, setup: Setup[ImageProtocol]) -> Outcome:
        """Every metric, with what is kept of each sample."""
        assert isinstance(found.scores, np.ndarray)
        scores, units = self.units(found.scores, found.scale, test)
        wanted = [metric.name for metric in self.metrics]
        told, replicates = _resampled(self.measure(scores, units.labels, found.scale, wanted), units, wanted)
        samples = self.samples(scores, units)
        if units.groups is not None:
            samples["group"] = np.unique(units.groups, return_inverse=True)[1]
        records = setup.work / "predictions.npz"
        _write_predictions(records, scores, units)
        return Outcome(
            scores=told, replicates=replicates, samples=samples, ids=units.ids, data={},
            records={"predictions": records},
            details={
                name: {c: float(v) if np.isfinite(v) else None for c, v in zip(units.classes, values, strict=True)}
                for name, values in self.by_class(scores, units).items()
            } | self._by_tag(scores, found.scale, units),
        )  # fmt: skip

    def _by_tag(self, scores: Floats, scale: Scale, units: ClassificationSet) -> dict[str, Any]:
        """The primary metric on each kind of image, a part of the body or a source, where it is defined."""
        kinds = () if units.tags is None else sorted(set(units.tags.tolist()))
        rows = {kind: np.flatnonzero(units.tags == kind) for kind in kinds}
        values = {kind: self.criterion(scores[at], units.labels[at], scale) for kind, at in rows.items()}
        found = {kind: value for kind, value in values.items() if np.isfinite(value)}
        return {f"{self.primary}_by_tag": found} if len(kinds) > 1 and found else {}

    def _few(self, found: Fitted, test: ClassificationSet, setup: Setup[ImageProtocol]) -> Outcome:
        """The primary metric of every draw: for each k the mean over draws, and the mean over all k."""
        table: dict[str, list[tuple[float, Floats]]] = {}
        assert isinstance(found.scores, Iterator)
        for shot in found.scores:
            scores, units = self.units(shot.scores, found.scale, test)
            measure = self.measure(scores, units.labels, found.scale, [self.primary])
            values, replicates = _resampled(measure, units, [self.primary])
            value = values[self.primary]
            if value is not None:
                table.setdefault(f"{self.primary}_k{shot.k}", []).append((value, replicates[self.primary]))
        means = {name: float(np.mean([value for value, _ in draws])) for name, draws in table.items()}
        # The same draws for every backbone: replicates are paired over draws and over samples.
        spread = {name: over_seeds([r for _, r in draws]) for name, draws in table.items()}
        promised = [metric.name for metric in self.promises(setup.protocol)]
        if means:
            means[self.primary] = float(np.mean(list(means.values())))
            spread[self.primary] = np.mean(list(spread.values()), axis=0)
        return Outcome(
            scores={name: means.get(name) for name in promised}, replicates=spread, data={},
            details={"draws": {name: [value for value, _ in draws] for name, draws in table.items()}},
        )  # fmt: skip


class OneClass(Probing):
    """Scores of one class an image."""

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("top1"), TOP5, Metric("balanced_accuracy"), ECE)
    primary = "top1"
    one_against_rest: ClassVar[bool] = False  # whether AUROC is taken of more than two classes

    def check(self, data: ClassificationSet) -> None:
        if data.multilabel:
            raise DataError(
                f"{data.name} has several labels an image",
                cause=f"{self.name} scores one class an image",
                fix="--task classify-multilabel",
            )

    def by_class(self, scores: Floats, test: ClassificationSet) -> dict[str, Floats]:
        hits = top_k_hits(scores, test.labels)
        return {"accuracy_by_class": class_accuracy(hits, test.labels, len(test.classes))}

    def samples(self, scores: Floats, test: ClassificationSet) -> dict[str, Floats]:
        kinds = {"top1": 1, "top5": 5} if scores.shape[1] > 5 else {"top1": 1}
        return {name: top_k_hits(scores, test.labels, k).astype(np.float32) for name, k in kinds.items()}

    def measure(self, scores: Floats, labels: npt.NDArray[Any], scale: Scale, wanted: Sequence[str]) -> Measure:
        classes = scores.shape[1]
        top1 = top_k_hits(scores, labels)
        top5 = top_k_hits(scores, labels, 5) if classes > 5 and "top5" in wanted else None
        chances = None if scale == "margins" else scores if scale == "probabilities" else _softmax(scores)
        ranks = _ranks(scores, scale) if "auroc" in wanted and (classes == 2 or self.one_against_rest) else None
        onehot = np.eye(classes)[labels] if ranks is not None and ranks.ndim == 2 else None

        def measure(weights: Floats) -> dict[str, Floats]:
            found = {"top1": weights @ top1 / weights.sum(axis=1)}
            if top5 is not None:
                found["top5"] = weights @ top5 / weights.sum(axis=1)
            if "balanced_accuracy" in wanted:
                found["balanced_accuracy"] = balanced_accuracy(top1, labels, classes, weights)
            if chances is not None and "ece" in wanted:
                found["ece"] = calibration_error(chances, labels, weights)
            if ranks is not None and onehot is not None:
                found["auroc"] = np.asarray(macro(per_label("auroc", ranks, onehot, weights)))
            elif ranks is not None:
                found["auroc"] = auroc(ranks, labels, weights)
            return found

        return measure


class Multilabel(Probing):
    """Scores of several labels an image.

    Each metric is a mean over labels, each on the images where it is known; labels without positives, or negatives, in
    the test split are left out. ``kinds`` say what is averaged: AUROC, or a kind of average precision
    (:func:`evalsuite.metrics.ranking.average_precision`). ``map`` is the area under the step curve.
    """

    metrics: ClassVar[tuple[Metric, ...]] = tuple(Metric(name, undefined=NO_LABEL) for name in ("auroc", "map"))
    primary = "auroc"
    kinds: ClassVar[Mapping[str, Literal["auroc", "step", "envelope", "11point"]]] = {"auroc": "auroc", "map": "step"}

    def check(self, data: ClassificationSet) -> None:
        if not data.multilabel:
            raise DataError(
                f"{data.name} has one class an image",
                cause=f"{self.name} scores several labels an image",
                fix="--task classify",
            )

    def by_class(self, scores: Floats, test: ClassificationSet) -> dict[str, Floats]:
        return {
            f"{name.replace('map', 'ap')}_by_class": per_label(kind, scores, test.labels)
            for name, kind in self.kinds.items()
        }

    def measure(self, scores: Floats, labels: npt.NDArray[Any], scale: Scale, wanted: Sequence[str]) -> Measure:
        def measure(weights: Floats) -> dict[str, Floats]:
            return {
                name: np.asarray(macro(per_label(kind, scores, labels, weights)))
                for name, kind in self.kinds.items()
                if name in wanted
            }

        return measure


class Named(Probing):
    """A task whose data set has the task's own name and lies below the data root."""

    def place(self, setup: Setup) -> tuple[ClassificationSource, Path]:
        layout = source(setup.registry, self.name)
        assert isinstance(layout, ClassificationSource)
        return layout, layout.locate(setup.data_root)


# --- data -------------------------------------------------------------------------------------------------------


def _hidden(test: ClassificationSet) -> ClassificationSet:
    """The test images without their labels: whatever a protocol does, it cannot choose by them."""
    return dataclasses.replace(test, labels=np.full_like(test.labels, -1))


def _load(
    layout: ClassificationSource, path: Path, train: str, test: str
) -> tuple[ClassificationSet, ClassificationSet]:
    """Both splits."""
    return loaded((layout.key, path.resolve(), train, test), lambda: layout.pair(path, train, test))


def _labelled(data: ClassificationSet, strict: bool) -> ClassificationSet:
    """The rows that have a label."""
    known = data.known
    if known.all():
        return data
    lost = int((~known).sum())
    if strict or not known.any():
        raise DataError(
            f"{lost} of {len(data)} images of {data.name} {data.split} have no label",
            cause=f"the first is {data.names[~known][0]}",
            fix="label them, or leave them out: run without --strict" if known.any() else "label them",
        )
    notes = (*data.notes, f"{lost} images have no label and are left out")
    return dataclasses.replace(data.take(known), notes=notes, left_out={**data.left_out, "unlabelled": lost})


def on_readable(work: Callable[..., Outcome], setup: Setup, *parts: Any) -> Outcome:
    """``work(*parts)`` on the images that can be read, of splits such as :class:`ClassificationSet` or ``Numbers``.

    Nothing is decoded to find them: where work meets one that does not decode, every image is tried, those are left
    out, counted and remembered, and work starts again; what it had encoded of other images is in the cache. With
    ``setup.strict``, :class:`ImageError` is raised instead.
    """
    try:
        return work(*(_readable(part, setup) for part in parts))
    except ImageError:
        if setup.strict:
            raise
    shutil.rmtree(setup.work, ignore_errors=True)  # what it left to resume from is of other rows
    setup.work.mkdir(parents=True)
    return work(*(_readable(part, setup, look=True) for part in parts))


def refuse_known(setup: Setup, *parts: Any) -> None:
    """With ``setup.strict``, raise :class:`ImageError` for images that an earlier run found unreadable."""
    if setup.strict:
        for part in parts:
            _readable(part, setup)


def _readable(data: Any, setup: Setup, look: bool = False) -> Any:
    """The rows whose images decode, as far as is known; ``look`` tries all where nothing is known."""
    key = hashlib.sha256("\0".join([data.fingerprint, data.split, *data.ids]).encode()).hexdigest()

    def decode(row: int) -> tuple[()]:
        _ = data[row]
        return ()

    found = reading.readable(key, len(data), decode, setup.progress) if look else reading.recall(key)
    if found is None or not found.unreadable:
        return data
    bad = list(found.unreadable.values())
    reading.refuse(bad, len(data), setup.strict)
    keep = np.setdiff1d(np.arange(len(data)), list(found.unreadable))
    notes = (*data.notes, reading.left_out(bad))
    return dataclasses.replace(data.take(keep), notes=notes, left_out={**data.left_out, "unreadable": len(bad)})


def _copied(train: ClassificationSet, test: ClassificationSet) -> tuple[str, ...]:
    """A warning of images that stand in both splits."""
    found = reading.in_both(train.contents(), test.contents())
    return () if found is None else (found.warning(train.split, test.split),)


def _drawn(train: ClassificationSet, fraction: float, seed: int) -> ClassificationSet:
    """The share of the training images to learn from: what an official list chose, or a draw."""
    if fraction == 1 or train.subset is not None:
        return train
    rows = probes.draw_fraction(train.labels, fraction, seed, train.groups)
    told = f"{fraction:.6g} of each class, drawn with seed {seed}"
    return dataclasses.replace(train.take(rows), subset=told)


def _described(train: ClassificationSet, test: ClassificationSet) -> dict[str, Any]:
    found: dict[str, Any] = {
        "train": f"{train.name} {train.split}", "train_images": len(train),
        "test": f"{test.name} {test.split}", "test_images": len(test), "classes": len(test.classes),
    }  # fmt: skip
    found |= {f"train_{why}": n for why, n in train.left_out.items()}
    found |= {f"test_{why}": n for why, n in test.left_out.items()}
    if train.subset is not None:
        found["train_subset"] = train.subset
    if test.groups is not None:
        found["test_groups"] = len(set(test.groups.tolist()))
    return found


def _warnings(train: ClassificationSet, test: ClassificationSet) -> list[str]:
    told = [f"{part.split}: {note}" for part in (train, test) for note in part.notes]
    if train.groups is not None and test.groups is not None:
        shared = len(set(train.groups.tolist()) & set(test.groups.tolist()))
        if shared:
            told.append(f"{shared} groups are in both {train.split} and {test.split}: scores are too high")
    if test.multilabel:
        absent = [c for c, marks in zip(test.classes, test.labels.T, strict=True) if not {0, 1} <= set(marks.tolist())]
    else:
        absent = [c for i, c in enumerate(test.classes) if not (test.labels == i).any()]
    if absent:
        named = f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
        told.append(f"means over classes leave out {len(absent)} that {test.split} does not tell apart: {named}")
    rare = _rare(test)
    if rare:
        more = ", ..." if len(rare) > 10 else ""
        told.append(
            f"{test.split} has fewer than {FEW_TEST} images of {len(rare)} classes: {', '.join(rare[:10])}{more}"
        )
    if not train.multilabel:
        lone = int((np.bincount(train.labels, minlength=len(train.classes)) == 1).sum())
        if lone:
            told.append(f"{lone} classes have a single training image")
    return told


def _rare(test: ClassificationSet) -> list[str]:
    """Classes with few test images, or labels with few positives or negatives, and how many; absent ones left out."""
    if test.multilabel:
        counts = np.minimum((test.labels == 1).sum(axis=0), (test.labels == 0).sum(axis=0))
    else:
        counts = np.bincount(test.labels, minlength=len(test.classes))
    return [f"{name} ({n})" for name, n in zip(test.classes, counts.tolist(), strict=True) if 0 < n < FEW_TEST]


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


def _write_predictions(path: Path, scores: Floats, test: ClassificationSet, most: int = 5) -> None:
    """The labels and, of each image, the best classes with their scores; of several labels all scores."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :most]
    if test.multilabel:
        best = np.tile(np.arange(scores.shape[1]), (len(scores), 1))
    np.savez_compressed(
        path, labels=test.labels.astype(np.int32), classes=best.astype(np.int32),
        scores=np.take_along_axis(scores, best, axis=1).astype(np.float32), names=np.array(test.classes),
    )  # fmt: skip
