"""Medical classification by heads on one backbone: RSNA pneumonia, CheXpert, COVIDx and MURA.

Images are fitted into the network's input whole and padded with black: a finding may be at the border. Intervals are
of resampled patients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax, logsumexp

from evalsuite.data.chexpert import COMPETITION, LABELS, Uncertain, resolved
from evalsuite.data.classification import ClassificationSet
from evalsuite.data.mura import study_of
from evalsuite.errors import DataError
from evalsuite.metrics.ranking import macro, per_label
from evalsuite.probing import (
    AUROC,
    ECE,
    NO_LABEL,
    Floats,
    ImageProtocol,
    Measure,
    Multilabel,
    Named,
    OneClass,
    ProbeProtocol,
    Scale,
    recipes,
)
from evalsuite.task import Metric, Protocol

__all__ = ["Chexpert", "ChexpertProtocol", "Covidx", "Mura", "Rsna"]

_ONE_CLASS = (AUROC, Metric("top1"), Metric("balanced_accuracy"), ECE)


def _whole(**fields: Any) -> tuple[ImageProtocol, ...]:
    """The shared recipes on whole images."""
    return tuple(dataclasses.replace(protocol, rule="pad", **fields) for protocol in recipes("squash"))


class Rsna(Named, OneClass):
    """RSNA pneumonia: is there a box or not, AUROC, on the split of GLoRIA and MGCA (70 : 15 : 15).

    Protocols as of ``cifar10``, on whole images; ``linear-1`` and ``linear-10`` learn from 1 % and 10 % of the labels.
    These are logistic regressions on images that are not augmented; GLoRIA and MGCA learn from random crops.
    """

    name = "rsna"
    metrics = _ONE_CLASS
    primary = "auroc"
    protocols = _whole()


@dataclass(frozen=True, kw_only=True)
class ChexpertProtocol(ProbeProtocol):
    """A head for findings of which some are uncertain.

    ``views`` are those learnt from and scored on. ``uncertain`` and ``blank`` say what is made of the training marks
    (:func:`evalsuite.data.chexpert.resolved`); the experts' test labels are taken as they are.
    """

    views: Literal["Frontal", "Lateral", "all"] = "Frontal"
    uncertain: Uncertain = "peers"
    blank: Literal["zero", "ignore"] = "zero"


def _chexpert(protocol: ImageProtocol) -> ChexpertProtocol:
    values = {field.name: getattr(protocol, field.name) for field in dataclasses.fields(protocol)}
    return ChexpertProtocol(**values)


class Chexpert(Named, Multilabel):
    """CheXpert: macro AUROC over the five findings of its competition, on the experts' labels of ``valid``.

    Findings without positives or negatives among the test images are left out of the means, and told. Protocols as of
    ``rsna``, but for those of a few images; an uncertain mark is by default what GLoRIA and MGCA make of it, a blank
    one 0, and only frontal images count.
    """

    name = "chexpert"
    metrics = (
        *Multilabel.metrics,
        *(Metric(f"auroc_{name.lower().replace(' ', '_')}", undefined=NO_LABEL) for name in COMPETITION),
    )
    protocols = tuple(_chexpert(protocol) for protocol in _whole() if type(protocol) is ProbeProtocol)

    def prepared(self, data: ClassificationSet, protocol: Protocol) -> ClassificationSet:
        assert isinstance(protocol, ChexpertProtocol)
        columns = [LABELS.index(name) for name in COMPETITION]
        if data.tags is not None and protocol.views != "all":
            rows = np.flatnonzero(data.tags == protocol.views)
            if not len(rows):
                raise DataError(
                    f"{data.name} {data.split} has no {protocol.views.lower()} image",
                    cause=f"its views are {', '.join(sorted(set(data.tags.tolist())))}",
                    fix="--set views=all",
                )
            data = data.take(rows)
        learnt = data.split == "train"
        rules: tuple[Uncertain, Literal["zero", "ignore"]] = (
            (protocol.uncertain, protocol.blank) if learnt else ("ignore", "ignore")
        )
        marks = resolved(data.labels[:, columns], COMPETITION, *rules)
        return dataclasses.replace(data, labels=marks, classes=COMPETITION)

    def measure(self, scores: Floats, labels: npt.NDArray[Any], scale: Scale, wanted: Sequence[str]) -> Measure:
        others = super().measure(scores, labels, scale, [name for name in wanted if name == "map"])
        names = [metric.name for metric in self.metrics if metric.name.startswith("auroc_")]

        def measure(weights: Floats) -> dict[str, Floats]:
            table = per_label("auroc", scores, labels, weights)
            found = {"auroc": np.asarray(macro(table)), **dict(zip(names, table.T, strict=True))}
            return {**others(weights), **{name: found[name] for name in wanted if name in found}}

        return measure


class Covidx(Named, OneClass):
    """COVIDx 9A: accuracy over normal, pneumonia and COVID-19, on the official test list of 400 images.

    Another version is ``--set 'train_split=train 5' --set 'test_split=test 5'``. ``auroc`` is the mean over classes
    against the rest. Protocols as of ``rsna``.
    """

    name = "covidx"
    metrics = (Metric("top1"), Metric("balanced_accuracy"), AUROC, ECE)
    protocols = _whole(train_split="train 9A", test_split="test 9A")
    one_against_rest: ClassVar[bool] = True


class Mura(Named, OneClass):
    """MURA: AUROC of abnormal studies, each scored by the mean probability of its images, on the official ``valid``.

    A head learns from images, which have their study's label, and is chosen by its AUROC on images. Where it gives
    margins, these are averaged. Protocols as of ``rsna``.
    """

    name = "mura"
    metrics = _ONE_CLASS
    primary = "auroc"
    protocols = _whole()

    def units(self, scores: Floats, scale: Scale, test: ClassificationSet) -> tuple[Floats, ClassificationSet]:
        studies, first, member = np.unique(
            [study_of(name) for name in test.names.tolist()], return_index=True, return_inverse=True
        )
        if scale == "logits":  # the logarithm of a mean probability is a logit of it
            chances = log_softmax(scores.astype(np.float64), axis=1)
            joined = np.stack([logsumexp(chances[member == i], axis=0) for i in range(len(studies))])
            joined -= np.log(np.bincount(member))[:, None]
        else:
            joined = np.stack([scores[member == i].astype(np.float64).mean(axis=0) for i in range(len(studies))])
        return joined, dataclasses.replace(test.take(first), names=studies)
