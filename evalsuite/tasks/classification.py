"""Classification by heads on one backbone: the data sets everybody reports, and anybody's own."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from evalsuite.data import source
from evalsuite.data.classification import ClassificationSource
from evalsuite.probing import (
    AUROC,
    NO_LABEL,
    FewShotProtocol,
    Multilabel,
    Named,
    OneClass,
    ProbeProtocol,
    Probing,
    published,
    recipes,
)
from evalsuite.task import Metric, Setup

__all__ = [
    "Cifar10",
    "Cifar100",
    "Classify",
    "ClassifyMultilabel",
    "ImageNet",
    "MedMnist",
    "Places205",
    "Places365",
    "Stl10",
    "TinyImageNet",
    "Voc07Classification",
]


def _svm(name: str, costs: tuple[float, ...], rule: Literal["crop", "squash"] = "crop") -> ProbeProtocol:
    """VOC07's support vector machines: features to unit length, at these costs."""
    return ProbeProtocol(id=name, version=2, probe="svm", costs=costs, folds=3, normalise="l2+1e-5", rule=rule)


class Cifar10(Named, OneClass):
    """CIFAR-10: 50,000 images to learn from, 10,000 to score on, at the backbone's own image size.

    Protocols: heads on frozen features (:func:`evalsuite.probing.recipes`; ``linear``, logistic regression at 45 costs,
    is the default) and classifiers trained on augmented images (:func:`evalsuite.probing.published.recipes`).
    """

    name = "cifar10"
    protocols = (*recipes("squash"), *published.recipes("small"))


class Cifar100(Named, OneClass):
    """CIFAR-100, its hundred fine classes; protocols as of ``cifar10``."""

    name = "cifar100"
    protocols = (*recipes("squash"), *published.recipes("small"))


class Stl10(Named, OneClass):
    """STL-10: 5,000 labelled images to learn from, 8,000 to score on; protocols as of ``cifar10``."""

    name = "stl10"
    protocols = (*recipes("squash"), *published.recipes("small"))


class TinyImageNet(Named, OneClass):
    """Tiny ImageNet: 100,000 images to learn from, scored on the 10,000 of val; protocols as of ``cifar10``."""

    name = "tiny-imagenet"
    protocols = (*recipes("squash"), *published.recipes("small"))


class ImageNet(Named, OneClass):
    """ImageNet-1k, scored on val; resized to 256/224 of the backbone's image size, and its centre cut out.

    Networks for at most 96 pixels are shown it without that margin. Protocols as of ``cifar10``; the published linear
    evaluations are those on augmented images, ``linear-moco`` and so on. Those on 1 % and 10 % of the labels learn from
    SimCLR's lists where they are there.
    """

    name = "imagenet"
    protocols = (*recipes(), *published.recipes("imagenet"))


class Places205(Named, OneClass):
    """Places205, scored on val; protocols as of ``imagenet``."""

    name = "places"
    protocols = (*recipes(), *published.recipes("imagenet"))


class Places365(Named, OneClass):
    """Places365-Standard, scored on val; protocols as of ``imagenet``."""

    name = "places365"
    protocols = (*recipes(), *published.recipes("imagenet"))


class Voc07Classification(Named, Multilabel):
    """PASCAL VOC 2007 image classification: twenty labels, trainval to test, one SVM a class on frozen features.

    ``map`` is the mean over classes of the area under the precision envelope, which VISSL and mmselfsup tell as mAP;
    ``map_11point`` the challenge's own number, at eleven recalls. An image all of whose objects of a class are
    difficult is left out of that class's score, as by the devkit.

    Protocols: ``svm`` (default; VISSL: eleven costs, images cut as SwAV and PIRL do), ``svm-mmselfsup`` (its nineteen
    costs, whole images squashed) and ``svm-obow`` (seven costs). For each class the cost is chosen by the average
    precision of three folds of trainval; in training a difficult class counts as absent, as in the official code.
    They depart in what it resizes with: one antialiased resize of the decoded image; and OBoW's features were read by
    Caffe2. ``svm-low-shot``: k = 1 to 96 positives and 19 k negatives a class, five draws, no difficult ones. The
    official code trains at several costs (mmselfsup 1, 10 and 100) and tells the one that is best on the test set; here
    the cost is 1. The others are those on frozen features of :func:`evalsuite.probing.recipes`.
    """

    name = "voc07-cls"
    metrics = tuple(Metric(name, undefined=NO_LABEL) for name in ("map", "map_11point"))
    primary = "map"
    kinds: ClassVar = {"map": "envelope", "map_11point": "11point"}
    protocols = (
        _svm("svm", (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)),
        _svm("svm-mmselfsup", (1.0, 10.0, 100.0, *(0.5**e for e in range(4, 20))), rule="squash"),
        _svm("svm-obow", (0.05, 0.1, 0.3, 0.5, 1.0, 3.0, 5.0)),
        FewShotProtocol(id="svm-low-shot", version=2, probe="svm", costs=(1.0,), normalise="l2+1e-5", rule="crop"),
        *(protocol for protocol in recipes() if protocol.id != "svm"),
    )


class _AnyData(Probing):
    """Data of the user's own."""

    generic = True

    def place(self, setup: Setup) -> tuple[ClassificationSource, Path]:
        return ClassificationSource.given(
            setup.data, setup.registry, task=self.name, lacks="does not label whole images",
            fix="--data folder:PATH, --data csv:PATH or --data npz:PATH",
        )  # fmt: skip


class Classify(_AnyData, OneClass):
    """Anybody's images with one class each: ``--data folder:PATH``, ``csv:PATH`` or ``npz:PATH``.

    It learns from the split ``train`` and scores on ``test`` or, where there is none, on ``val``. ``auroc`` is of two
    classes, the second one positive. Protocols as of ``cifar10``. Images are resized and cut as ImageNet's are, without
    a margin where they, or the network's input, are small (up to 96 pixels), or all of the network's size; ``--set
    rule=squash`` keeps all of images in view that are not square.
    """

    name = "classify"
    world = "folder"
    metrics = (*OneClass.metrics, AUROC)
    protocols = (*recipes(), *published.recipes("imagenet"))


class ClassifyMultilabel(_AnyData, Multilabel):
    """Anybody's images with several labels each: CSV columns ``label:NAME``, or rows of marks in an NPZ file.

    Labels are scored where they are known; those without positives or negatives in the test split are left out of
    the mean. ``auroc`` and ``map`` (area under the step curve) are means over labels. Protocols as of ``classify``.
    """

    name = "classify-multilabel"
    world = "csv"
    protocols = (*recipes(), *published.recipes("imagenet"))


class MedMnist(_AnyData, OneClass):
    """A MedMNIST data set with one class an image: ``--data npz:PATH``, or ``medmnist`` below the data root.

    It learns from ``train`` and scores on the official ``test``. ``auroc`` is the mean over classes against the rest,
    ``top1`` what MedMNIST calls ACC. Protocols as of ``cifar10``.
    """

    name = "medmnist"
    metrics = (*OneClass.metrics, AUROC)
    primary = "auroc"
    protocols = (*recipes("squash"), *published.recipes("small"))
    one_against_rest = True

    def place(self, setup: Setup) -> tuple[ClassificationSource, Path]:
        if setup.data is not None:
            return super().place(setup)
        layout = source(setup.registry, self.name)
        assert isinstance(layout, ClassificationSource)
        return layout, layout.locate(setup.data_root)
