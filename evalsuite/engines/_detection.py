"""What detection engines share: a detector, trained and run as any dense head is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from evalsuite.backbone import Backbone
from evalsuite.data.detection import DetectionSet, Record
from evalsuite.engines._dense import Trainable, train_and_test
from evalsuite.metrics.detection import Detections
from evalsuite.protocols import Detected, DetectionProtocol
from evalsuite.task import Setup

__all__ = ["Detector", "learnable", "train_and_detect"]


@dataclass(frozen=True)
class Detector:
    """A detector as an engine built it, and how to feed and read it.

    ``model`` and ``sample`` are those of a :class:`Trainable`, ``sample`` of :func:`learnable` images;
    ``view(record)`` is a test sample, ``read(record, output)`` its detections in pixels of the original image.
    """

    model: nn.Module
    optimizer: Optimizer
    sample: Callable[[int, int], Any]
    view: Callable[[Record], Any]
    read: Callable[[Record, Any], Detections]
    details: Mapping[str, Any] = field(default_factory=dict)

    def on(self, train: DetectionSet, test: DetectionSet) -> Trainable:
        """This detector with the images it learns from and is run on."""
        return Trainable(
            self.model,
            self.optimizer,
            self.sample,
            len(learnable(train)),
            partial(_view, self.view, test.records),
            lambda index, view, output: self.read(test.records[index], output),
            self.details,
        )


def _view(view: Callable[[Record], Any], records: Sequence[Record], index: int) -> Any:
    return view(records[index])


def learnable(train: DetectionSet) -> list[Record]:
    """The images with at least one object that is no crowd; from the others there is nothing to learn."""
    return [record for record in train.records if (~record.crowd).any()]


def train_and_detect(
    build: Callable[[], Detector], backbone: Backbone, protocol: DetectionProtocol, train: DetectionSet,
    test: DetectionSet, setup: Setup, version: str,
) -> Detected:  # fmt: skip
    """Build the detector, train it (or go on from ``setup.work``), detect on every image of ``test``."""
    key = f"{backbone.identity} {protocol.hash} {train.fingerprint} {setup.seed} {version}"
    found = train_and_test(lambda: build().on(train, test), protocol, len(test.records), setup, key=key, what="detect")
    return Detected(found.outputs, found.log, found.timings, found.details)
