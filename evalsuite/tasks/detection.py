"""Object detection: PASCAL VOC, COCO, and anybody's data in either layout."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar, Literal

import numpy as np

from evalsuite.backbone import Backbone
from evalsuite.data import source
from evalsuite.data.detection import DetectionSet, DetectionSource, check
from evalsuite.data.digests import fingerprint, loaded
from evalsuite.data.reading import copied, usable
from evalsuite.metrics.detection import (
    COCO_METRICS,
    Detections,
    bootstrap_ap,
    coco_scores,
    voc_scores,
)
from evalsuite.pictures import detections_sheet
from evalsuite.protocols import Detected, DetectionProtocol
from evalsuite.statistics import REPLICATES
from evalsuite.task import Metric, Outcome, Setup, Task

__all__ = ["Coco", "Detect", "Voc"]

SMALL: dict[str, Any] = {
    "model": "fpn", "iterations": 150, "batch_size": 4, "optimizer": "adamw", "lr": 0.0006, "weight_decay": 0.05,
    "milestones": (120,), "warmup_iterations": 20,
    "min_sizes": (240,), "max_size": 320, "test_min_size": 240, "test_max_size": 320,
    "pyramid_width": 64, "box_head_width": 256, "mask_head_width": 64,
    "anchor_sizes": (16, 32, 64, 128, 256),
    "rpn_pre_nms_train": 1000, "rpn_post_nms_train": 500, "rpn_post_nms_test": 300, "roi_batch": 128,
    "clip_gradient": 10.0,
}  # fmt: skip
FROZEN: dict[str, Any] = {
    "model": "fpn", "freeze_backbone": True, "backbone_norm": "frozen", "iterations": 3000,
    "batch_size": 16, "lr": 0.02,
    "milestones": (2000, 2700), "warmup_iterations": 200, "min_sizes": (400, 432, 464, 480), "max_size": 800,
    "test_min_size": 480, "test_max_size": 800, "pyramid_width": 128, "box_head_width": 512,
    "mask_head_width": 128, "roi_batch": 256,
}  # fmt: skip
_SIDES = {"s": "of less than 32x32 pixels", "m": "between 32x32 and 96x96 pixels", "l": "of more than 96x96 pixels"}


def _coco_metric(name: str) -> Metric:
    size = _SIDES.get(name[-1])
    return Metric(name, undefined=f"no object of the test images is {size}") if size else Metric(name)


class _Detection(Task[DetectionProtocol]):
    needs = frozenset({"maps"})
    engines = ("torchvision", "detectron2")
    primary = "AP"
    protocols: ClassVar[tuple[DetectionProtocol, ...]]

    def requires(self, protocol: DetectionProtocol) -> frozenset[str]:
        c4 = protocol.model == "c4"
        return self.needs | ({"stages"} if c4 else set())

    @abstractmethod
    def sets(self, setup: Setup[DetectionProtocol]) -> tuple[DetectionSet, DetectionSet]:
        """What to train on and what to test on."""

    def fingerprint(self, setup: Setup[DetectionProtocol]) -> str:
        train, test = self.sets(setup)
        if setup.strict:
            for part in (train, test):
                _readable(part, setup, known=True)
        return fingerprint(train.fingerprint, test.fingerprint)

    def run(self, backbone: Backbone, setup: Setup[DetectionProtocol]) -> Outcome:
        protocol = setup.protocol
        train, test = (_readable(part, setup) for part in self.sets(setup))
        check(train, test, protocol.masks)
        copies = copied(train, test)
        engine = setup.registry.get("engine", setup.engine or self.engines[0])()
        found: Detected = engine.detect(backbone, protocol, train, test, setup)
        began = monotonic()
        with setup.progress.doing("scoring detections"):
            scores, replicates, details = self.score(test, found.detections, protocol)
        picture = setup.work / "detections.png"
        detections_sheet(test, found.detections, picture)
        records = setup.work / "predictions.npz"
        _write_predictions(records, found.detections)
        return Outcome(
            scores=scores,
            replicates=replicates,
            ids=[str(record.image_id) for record in test.records],
            data={
                "fingerprint": self.fingerprint(setup),
                "train": train.name, "train_images": len(train.records),
                "test": test.name, "test_images": len(test.records), "classes": len(test.classes),
                **({"train_unreadable": len(train.unreadable)} if train.unreadable else {}),
                **({"test_unreadable": len(test.unreadable)} if test.unreadable else {}),
            },
            figures={"detections": picture},
            records={"predictions": records},
            timings={**found.timings, "score": monotonic() - began},
            details={**found.details, **details, "log": found.log},
            warnings=(*train.warnings, *test.warnings, *copies),
        )  # fmt: skip

    def score(
        self, test: DetectionSet, found: list[Detections], protocol: DetectionProtocol
    ) -> tuple[dict[str, float | None], dict[str, np.ndarray], dict[str, Any]]:
        """Scores, bootstrap replicates of them over images, and AP by class."""
        scores, replicates, details = self._family(test, found, "bbox")
        if any(metric.name.startswith("mask_") for metric in self.promises(protocol)):
            mask, again, of_masks = self._family(test, found, "segm")
            scores |= {f"mask_{name}": mask[name] for name in COCO_METRICS}
            replicates |= {f"mask_{name}": values for name, values in again.items()}
            details |= {f"mask_{name}": values for name, values in of_masks.items()}
        return scores, replicates, details

    def _family(
        self, test: DetectionSet, found: list[Detections], kind: Literal["bbox", "segm"]
    ) -> tuple[dict[str, float | None], dict[str, np.ndarray], dict[str, Any]]:
        scored = coco_scores(test.records, found, test.classes, kind)
        # the same resamples of the images for every backbone, seed and engine, so that their replicates are paired
        replicates = bootstrap_ap(test.records, found, test.classes, kind, replicates=REPLICATES, seed=0)
        details = {"AP_by_class": dict(scored.per_class), "precision_by_recall": dict(scored.curves)}
        return dict(scored.scores), replicates, details


def _write_predictions(path: Path, found: list[Detections]) -> None:
    """Boxes, scores and labels of all images, flat, with the image of each: what a score can be made from again."""
    counts = [len(d.scores) for d in found]
    np.savez_compressed(
        path,
        image_id=np.repeat([d.image_id for d in found], counts),
        boxes=np.concatenate([d.boxes for d in found]).astype(np.float32),
        scores=np.concatenate([d.scores for d in found]).astype(np.float32),
        labels=np.concatenate([d.labels for d in found]).astype(np.int32),
    )


class Coco(_Detection):
    """Mask R-CNN on COCO train2017, scored on val2017 with the COCO metrics of boxes and masks.

    Protocols:

    ``fpn-1x`` (default): R50-FPN, 90k iterations of 16 images at 0.02, steps at 60k and 80k, shorter side 640 to
    800, batch norm trained (synchronised over devices) in backbone and pyramid: MoCo's FPN transfer (He et al.,
    2020, appendix A.3; facebookresearch/moco issue 34), which is detectron2's mask_rcnn_R_50_FPN_1x otherwise.
    ``fpn-2x``: twice the iterations, steps at 120k and 160k.
    ``c4-1x``: R50-C4 with batch norm trained (MoCo, detection/configs/coco_R_50_C4_2x_moco.yaml at the 1x schedule).
    ``frozen-fpn``: the backbone is not trained; a light pyramid and head on it. Ours; minutes on a GPU.
    ``smoke``: small images, few iterations. Ours; it shows that everything works, on a CPU, and is not to be quoted.
    """

    name = "coco"
    metrics = tuple(map(_coco_metric, (*COCO_METRICS, *(f"mask_{name}" for name in COCO_METRICS))))
    _splits: ClassVar[dict[str, Any]] = {
        "train_split": "train2017",
        "test_split": "val2017",
        "masks": True,
    }
    _published: ClassVar[dict[str, Any]] = {
        **_splits, "batch_size": 16, "lr": 0.02, "warmup_iterations": 1000,
        "min_sizes": (640, 672, 704, 736, 768, 800), "iterations": 90_000, "milestones": (60_000, 80_000),
    }  # fmt: skip
    _fpn: ClassVar[DetectionProtocol] = DetectionProtocol(
        id="fpn-1x", version=1, model="fpn", pyramid_norm="BN", **_published
    )
    protocols = (
        _fpn,
        replace(_fpn, id="fpn-2x", iterations=180_000, milestones=(120_000, 160_000)),
        DetectionProtocol(
            id="c4-1x", version=1, model="c4", roi_size=14, res5_norm=True, precise_bn=200,
            rpn_pre_nms_train=12_000, rpn_pre_nms_test=6_000, rpn_post_nms_train=2_000, **_published,
        ),
        DetectionProtocol(id="frozen-fpn", version=1, **{**_splits, **FROZEN}),
        DetectionProtocol(id="smoke", version=1, ranked=False, **{**_splits, **SMALL}),
    )  # fmt: skip

    def promises(self, protocol: DetectionProtocol) -> tuple[Metric, ...]:
        masks = protocol.masks
        return tuple(metric for metric in self.metrics if masks or not metric.name.startswith("mask_"))

    def sets(self, setup: Setup[DetectionProtocol]) -> tuple[DetectionSet, DetectionSet]:
        return _of_root(setup, "coco")


class Voc(_Detection):
    """Faster R-CNN on PASCAL VOC, scored with the VOC2007 metric.

    ``AP50`` is the 11-point average precision of the VOC2007 devkit at IoU 0.5, ``AP75`` at 0.75, ``AP`` the mean
    over IoU 0.5 to 0.95 in steps of 0.05, as detectron2 reports them; ``AP50_area`` is the area under the curve of
    the devkits since 2010. Protocols:

    ``c4`` (default): R50-C4 on VOC07+12 trainval, tested on VOC07 test; 24k iterations of 16 images at 0.02, steps
    at 18k and 22k, warm-up of 100, shorter side 480 to 800, batch norm trained (synchronised over devices), an
    extra norm after the last stage, PreciseBN over 200 batches (MoCo, pascal_voc_R_50_C4_24k_moco.yaml;
    PixPro uses the same).
    ``fpn``: the same schedule on a pyramid, for backbones that are no ResNets. Ours.
    ``frozen-fpn``: the backbone is not trained. Ours; minutes on a GPU.
    ``smoke``: VOC2012 train, tested on VOC2012 val, small images, few iterations. Ours; not to be quoted.
    """

    name = "voc"
    metrics = tuple(Metric(name) for name in ("AP", "AP50", "AP75", "AP50_area"))
    _official: ClassVar[dict[str, Any]] = {
        "train_split": "2007:trainval+2012:trainval", "test_split": "2007:test",
    }  # fmt: skip
    _schedule: ClassVar[dict[str, Any]] = {
        "iterations": 24_000, "batch_size": 16, "lr": 0.02, "milestones": (18_000, 22_000), "warmup_iterations": 100,
        "min_sizes": tuple(range(480, 801, 32)),
    }  # fmt: skip
    protocols = (
        DetectionProtocol(
            id="c4", version=1, model="c4", roi_size=14, res5_norm=True, precise_bn=200,
            rpn_pre_nms_train=12_000, rpn_pre_nms_test=6_000, rpn_post_nms_train=2_000, **_schedule, **_official,
        ),
        DetectionProtocol(id="fpn", version=1, model="fpn", pyramid_norm="BN", **_schedule, **_official),
        DetectionProtocol(id="frozen-fpn", version=1, **FROZEN, **_official),
        DetectionProtocol(
            id="smoke", version=1, ranked=False, train_split="2012:train", test_split="2012:val", **SMALL
        ),
    )  # fmt: skip

    def sets(self, setup: Setup[DetectionProtocol]) -> tuple[DetectionSet, DetectionSet]:
        return _of_root(setup, "voc")

    def score(
        self, test: DetectionSet, found: list[Detections], protocol: DetectionProtocol
    ) -> tuple[dict[str, float | None], dict[str, np.ndarray], dict[str, Any]]:
        scored = voc_scores(test.records, found, test.classes)
        replicates = bootstrap_ap(test.records, found, test.classes, "voc", replicates=REPLICATES, seed=0)
        names = [metric.name for metric in self.metrics]
        return (
            {name: scored.scores[name] for name in names},
            {name: replicates[name] for name in names},
            {"AP50_by_class": dict(scored.per_class)},
        )


class Detect(_Detection):
    """Faster R-CNN on anybody's data in VOC or COCO layout, scored with the COCO box metrics.

    Classes are read from the data. It trains on the split ``train`` and tests on ``test`` or, where there is none,
    on ``val``. Protocols, all ours: ``fpn`` (default; 9k iterations of 16 images), ``frozen-fpn``, ``smoke``.
    """

    name = "detect"
    generic = True
    metrics = tuple(map(_coco_metric, COCO_METRICS))
    _own: ClassVar[dict[str, Any]] = {"train_split": "train", "test_split": "test|val"}
    protocols = (
        DetectionProtocol(
            id="fpn", version=1, model="fpn", pyramid_norm="BN", iterations=9_000, batch_size=16, lr=0.02,
            milestones=(6_000, 8_000), warmup_iterations=500, min_sizes=tuple(range(480, 801, 32)), **_own,
        ),
        DetectionProtocol(id="frozen-fpn", version=1, **FROZEN, **_own),
        DetectionProtocol(id="smoke", version=1, ranked=False, **SMALL, **_own),
    )  # fmt: skip

    def sets(self, setup: Setup[DetectionProtocol]) -> tuple[DetectionSet, DetectionSet]:
        layout, path = DetectionSource.given(
            setup.data, setup.registry, task=self.name, lacks="has no boxes",
            fix="--data voc:PATH or --data coco:PATH",
        )  # fmt: skip
        return _load(layout, path, setup)


def _readable(part: DetectionSet, setup: Setup[DetectionProtocol], known: bool = False) -> DetectionSet:
    """The images that can be read. Each is read once, before any training; masks are drawn where they are learnt."""
    masks = setup.protocol.masks

    def read(row: int) -> tuple[()]:
        record = part.records[row]
        part.decode(record)
        if masks:
            part.rles(record)
        return ()

    kind = "masks" if masks else "boxes"
    return usable(part, read, setup.progress, strict=setup.strict, known=known, kind=kind)[0]


def _of_root(setup: Setup[DetectionProtocol], name: str) -> tuple[DetectionSet, DetectionSet]:
    layout = source(setup.registry, name)
    assert isinstance(layout, DetectionSource)
    return _load(layout, layout.locate(setup.data_root), setup)


def _load(layout: DetectionSource, path: Path, setup: Setup[DetectionProtocol]) -> tuple[DetectionSet, DetectionSet]:
    """Both splits."""
    protocol = setup.protocol

    def load() -> tuple[DetectionSet, DetectionSet]:
        train, test = layout.pair(path, protocol.train_split, protocol.test_split)
        train, test = train.limit(setup.limit), test.limit(setup.limit)
        check(train, test, protocol.masks)
        return train, test

    key = (layout, path.resolve(), protocol.train_split, protocol.test_split, setup.limit, protocol.masks)
    return loaded(key, load)
