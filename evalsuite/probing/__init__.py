"""Tasks on labelled images: a protocol fits heads on a backbone, the task scores what they say of the test images.

An :class:`ImageProtocol` is a recipe of heads. It gets the test images without their labels, and answers with scores
for each of them. :class:`ProbeProtocol` fits heads on features that are encoded once and cached,
:class:`FewShotProtocol` fits them on a few images a class; a protocol of any other kind says how it fits its own.
A :class:`Probing` task says where its data lie and how scores are measured; :class:`OneClass` and
:class:`Multilabel` are the two ways to measure them. A task of one's own is a few lines:

>>> class Birds(Named, OneClass):  # its data set is called birds, too
...     name = "birds"
...     protocols = recipes()
"""

from __future__ import annotations

from evalsuite.probing.protocols import (
    Criterion,
    FewShotProtocol,
    Fitted,
    Floats,
    ImageProtocol,
    ProbeProtocol,
    Scale,
    Shot,
    recipes,
)
from evalsuite.probing.regression import Numbers, Regression, RegressionProtocol
from evalsuite.probing.tasks import (
    AUROC,
    ECE,
    NO_LABEL,
    Measure,
    Multilabel,
    Named,
    OneClass,
    Probing,
    on_readable,
    refuse_known,
)

__all__ = [
    "AUROC",
    "ECE",
    "NO_LABEL",
    "Criterion",
    "FewShotProtocol",
    "Fitted",
    "Floats",
    "ImageProtocol",
    "Measure",
    "Multilabel",
    "Named",
    "Numbers",
    "OneClass",
    "ProbeProtocol",
    "Probing",
    "Regression",
    "RegressionProtocol",
    "Scale",
    "Shot",
    "on_readable",
    "recipes",
    "refuse_known",
]
