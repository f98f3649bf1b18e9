"""Semantic segmentation: Cityscapes, PASCAL VOC, ADE20K, CamVid, and anybody's images and masks."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from evalsuite.backbone import Backbone
from evalsuite.data import Source, source
from evalsuite.data.digests import fingerprint, loaded
from evalsuite.data.reading import copied, left_out, usable
from evalsuite.data.segmentation import SegmentationSet, SegmentationSource, check_pixels
from evalsuite.metrics.segmentation import SEGMENTATION_METRICS, bootstrap_scores, scores
from evalsuite.pictures import iou_chart, segmentation_sheet
from evalsuite.protocols import SegmentationProtocol, Segmented
from evalsuite.statistics import REPLICATES
from evalsuite.task import Metric, Outcome, Setup, Task

__all__ = ["Ade20k", "CamVid", "Cityscapes", "Segment", "VocSegmentation"]

# The fully convolutional network of MoCo (He et al. 2020, appendix A.5). How maps are resampled is not told there;
# crops of 513 and 769 pixels are whole strides and one, which is how aligned corners want them.
MOCO: dict[str, Any] = {
    "head": "fcn", "output_stride": 16, "width": 256, "convs": 2, "head_dilation": 6, "align_corners": True,
    "batch_size": 16, "weight_decay": 1e-4, "scale": (0.5, 2.0), "inference": "whole",
}  # fmt: skip
# The FCN of mmsegmentation that mmselfsup evaluates by (configs/fcn of 1.2.2).
D8: dict[str, Any] = {
    "head": "fcn", "output_stride": 8, "width": 512, "convs": 2, "concat": True, "dropout": 0.1, "auxiliary": 0.4,
    "lr": 0.01, "weight_decay": 5e-4, "schedule": "poly", "lr_min": 1e-4, "crop_share": 0.75, "photometric": True,
}  # fmt: skip
# UPerNet as in mmsegmentation (configs/_base_/models/upernet_r50.py), trained by AdamW, which suits a ViT too. Ours.
UPERNET: dict[str, Any] = {
    "head": "upernet", "width": 512, "dropout": 0.1, "auxiliary": 0.4, "optimizer": "adamw", "lr": 1e-4,
    "weight_decay": 0.05, "schedule": "poly", "power": 1.0, "warmup_iterations": 1500, "clip_gradient": 1.0,
    "iterations": 40_000, "batch_size": 16, "crop": (512, 512), "crop_share": 0.75, "photometric": True,
}  # fmt: skip
# Heads on features that are encoded once, after DINOv2's linear segmentation (Oquab et al. 2023, section 7.4). Ours.
FROZEN: dict[str, Any] = {
    "freeze_backbone": True, "backbone_norm": "frozen", "optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-4,
    "schedule": "poly", "power": 1.0, "batch_size": 16, "encode": (512, 512), "label_stride": 4,
}  # fmt: skip
LINEAR: dict[str, Any] = {**FROZEN, "head": "linear", "iterations": 3000}
FROZEN_FCN: dict[str, Any] = {**FROZEN, "head": "fcn", "width": 256, "convs": 2, "iterations": 3000}
SMALL: dict[str, Any] = {
    "head": "upernet", "width": 64, "optimizer": "adamw", "lr": 6e-4, "weight_decay": 0.05, "schedule": "poly",
    "iterations": 200, "batch_size": 4, "warmup_iterations": 20, "clip_gradient": 10.0, "scale": (0.75, 1.5),
    "short_side": 240, "crop": (224, 256),
}  # fmt: skip


class _Segmentation(Task[SegmentationProtocol]):
    needs = frozenset({"maps"})
    engines = ("native", "mmseg")
    primary = "mIoU"
    metrics = tuple(Metric(name) for name in (*SEGMENTATION_METRICS, "boundary_mIoU"))
    protocols: ClassVar[tuple[SegmentationProtocol, ...]]

    @abstractmethod
    def place(self, setup: Setup[SegmentationProtocol]) -> tuple[Source[SegmentationSet], Path]:
        """The layout of the data, and where they lie."""

    def sets(self, setup: Setup[SegmentationProtocol]) -> tuple[SegmentationSet, SegmentationSet]:
        """What to train on and what to test on."""
        layout, path = self.place(setup)
        protocol = setup.protocol
        return _load(layout, path, protocol.train_split, protocol.test_split, setup.limit)

    def fingerprint(self, setup: Setup[SegmentationProtocol]) -> str:
        train, test = self.sets(setup)
        if setup.strict:
            for part in (train, test):
                _readable(part, setup, known=True)
        return fingerprint(train.fingerprint, test.fingerprint)

    def refuse(self, backbone: Backbone, protocol: SegmentationProtocol) -> None:
        super().refuse(backbone, protocol)
        stride = protocol.output_stride if isinstance(protocol, SegmentationProtocol) else None
        if stride is not None and not backbone.dilates(stride):
            backbone.dilated(stride)  # which says why not

    def run(self, backbone: Backbone, setup: Setup[SegmentationProtocol]) -> Outcome:
        protocol = setup.protocol
        (train, learnt), (test, tested) = (_readable(part, setup) for part in self.sets(setup))
        check_pixels(train, learnt, test, tested)
        copies = copied(train, test)
        engine = setup.registry.get("engine", setup.engine or self.engines[0])()
        found: Segmented = engine.segment(backbone, protocol, train, test, setup)
        began = monotonic()
        values, replicates, details = _scored(found, test)
        figures = {"segmentation": setup.work / "segmentation.png", "classes": setup.work / "classes.png"}
        segmentation_sheet(test, found.predictions, figures["segmentation"])
        iou_chart(test, details["IoU_by_class"], figures["classes"])
        records = setup.work / "predictions.npz"
        _write_counts(records, found, test)
        return Outcome(
            scores=values,
            replicates=replicates,
            ids=[record.image_id for record in test.records],
            data={
                "fingerprint": self.fingerprint(setup),
                "train": f"{train.name} {train.split}", "train_images": len(train),
                "test": f"{test.name} {test.split}", "test_images": len(test), "classes": len(test.classes),
                **({"train_unreadable": len(train.unreadable)} if train.unreadable else {}),
                **({"test_unreadable": len(test.unreadable)} if test.unreadable else {}),
            },
            figures=figures,
            records={"predictions": records},
            timings={**found.timings, "score": monotonic() - began},
            details={**found.details, **details, "log": found.log},
            warnings=(
                *dict.fromkeys((*train.warnings, *test.warnings)),
                *(f"{part.split}: {left_out(part.unreadable)}" for part in (train, test) if part.unreadable),
                *copies,
            ),
        )  # fmt: skip


class _Named(_Segmentation):
    """A data set of its own name below the data root."""

    def place(self, setup: Setup[SegmentationProtocol]) -> tuple[Source[SegmentationSet], Path]:
        layout = source(setup.registry, self.name)
        return layout, layout.locate(setup.data_root)


class Cityscapes(_Named):
    """19 classes of street scenes: train on the 2975 finely annotated images of train, scored on the 500 of val.

    Protocols:

    ``fcn-moco`` (default): R50 of output stride 16, two 3x3 convolutions of 256 channels and dilation 6, crops of 769
    scaled by 0.5 to 2, 90k iterations of 16 images at 0.01, steps at 70 and 90 %, whole images (MoCo, He et al.
    2020, appendix A.5; its mean is over 5 seeds).
    ``fcn-d8``: R50 of output stride 8, convolutions of 512 channels and an auxiliary head, 40k iterations of 8
    images, polynomial rate, windows of 769 every 513 pixels (mmselfsup, by mmsegmentation's
    fcn_r50-d8_4xb2-40k_cityscapes-769x769). Not comparable with ``fcn-moco``.
    ``upernet``: UPerNet on a pyramid of any backbone. Ours.
    ``linear``: one linear classifier on the frozen coarsest map of images at 512x1024, encoded once. Ours.
    ``frozen-fcn``: two convolutions on the same features. Ours.
    ``smoke``: small images, few iterations. Ours; it shows that everything works, on a CPU, and is not to be quoted.
    """

    name = "cityscapes"
    _splits: ClassVar[dict[str, Any]] = {"train_split": "train", "test_split": "val"}
    protocols = (
        SegmentationProtocol(
            id="fcn-moco", version=1, iterations=90_000, lr=0.01, milestones=(63_000, 81_000), crop=(769, 769),
            **MOCO, **_splits,
        ),
        SegmentationProtocol(
            id="fcn-d8", version=1, iterations=40_000, batch_size=8, crop=(769, 769), inference="slide",
            stride=(513, 513), align_corners=True, **D8, **_splits,
        ),
        SegmentationProtocol(
            id="upernet", version=1, **{**UPERNET, "crop": (512, 1024), "batch_size": 8}, **_splits,
        ),
        SegmentationProtocol(id="linear", version=1, **{**LINEAR, "encode": (512, 1024)}, **_splits),
        SegmentationProtocol(id="frozen-fcn", version=1, **{**FROZEN_FCN, "encode": (512, 1024)}, **_splits),
        SegmentationProtocol(id="smoke", version=1, ranked=False, **{**SMALL, "crop": (224, 448)}, **_splits),
    )  # fmt: skip


class VocSegmentation(_Named):
    """21 classes of PASCAL VOC 2012: train on the 10,582 images of train_aug (with SBD's masks), scored on val.

    Protocols:

    ``fcn-moco`` (default): as of ``cityscapes``, with crops of 513, 30k iterations at 0.003 (MoCo, appendix A.5).
    ``fcn-d8``: crops of 512 of images whose shorter side is 512, 20k iterations of 16 images, whole images (mmselfsup,
    by mmsegmentation's fcn_r50-d8_4xb4-20k_voc12aug-512x512).
    ``upernet``, ``linear``, ``frozen-fcn``: as of ``cityscapes``, images at 512x512. Ours.
    ``smoke``: VOC's own train, small images, few iterations. Ours; not to be quoted.
    """

    name = "voc-seg"
    _splits: ClassVar[dict[str, Any]] = {"train_split": "train_aug", "test_split": "val"}
    protocols = (
        SegmentationProtocol(
            id="fcn-moco", version=1, iterations=30_000, lr=0.003, milestones=(21_000, 27_000), crop=(513, 513),
            **MOCO, **_splits,
        ),
        SegmentationProtocol(
            id="fcn-d8", version=1, iterations=20_000, batch_size=16, short_side=512, crop=(512, 512), **D8, **_splits,
        ),
        SegmentationProtocol(id="upernet", version=1, short_side=512, **UPERNET, **_splits),
        SegmentationProtocol(id="linear", version=1, **LINEAR, **_splits),
        SegmentationProtocol(id="frozen-fcn", version=1, **FROZEN_FCN, **_splits),
        SegmentationProtocol(id="smoke", version=1, ranked=False, train_split="train", test_split="val", **SMALL),
    )  # fmt: skip


class Ade20k(_Named):
    """The 150 classes of the MIT scene parsing benchmark: train on training, scored on validation.

    Protocols, all ours: ``upernet`` (default; crops of 512 of images whose shorter side is 512, 80k iterations),
    ``linear``, ``frozen-fcn``, ``smoke``, as of ``cityscapes`` with images at 512x512.
    """

    name = "ade20k"
    _splits: ClassVar[dict[str, Any]] = {"train_split": "train", "test_split": "val"}
    protocols = (
        SegmentationProtocol(id="upernet", version=1, short_side=512, **{**UPERNET, "iterations": 80_000}, **_splits),
        SegmentationProtocol(id="linear", version=1, **{**LINEAR, "iterations": 10_000}, **_splits),
        SegmentationProtocol(id="frozen-fcn", version=1, **{**FROZEN_FCN, "iterations": 10_000}, **_splits),
        SegmentationProtocol(id="smoke", version=1, ranked=False, **SMALL, **_splits),
    )


class CamVid(_Named):
    """11 classes of driving scenes: train on train, scored on test, as the SegNet tutorial splits them.

    Protocols, all ours: ``upernet`` (default; crops of 352x480, 10k iterations), ``linear`` and ``frozen-fcn`` (images
    at 384x512, 1000 iterations), ``smoke``.
    """

    name = "camvid"
    _splits: ClassVar[dict[str, Any]] = {"train_split": "train", "test_split": "test"}
    _once: ClassVar[dict[str, Any]] = {"encode": (384, 512), "iterations": 1000, "batch_size": 8}
    protocols = (
        SegmentationProtocol(
            id="upernet", version=1, **{**UPERNET, "crop": (352, 480), "iterations": 10_000, "batch_size": 8}, **_splits
        ),
        SegmentationProtocol(id="linear", version=1, **{**LINEAR, **_once}, **_splits),
        SegmentationProtocol(id="frozen-fcn", version=1, **{**FROZEN_FCN, **_once}, **_splits),
        SegmentationProtocol(id="smoke", version=1, ranked=False, **{**SMALL, "crop": (224, 320)}, **_splits),
    )


class Segment(_Segmentation):
    """Anybody's data: ``--data pairs:PATH``, or any other layout of masks (``cityscapes:PATH``, ``ade20k-full:PATH``).

    In the layout of a published data set, classes are those of a ``classes.txt`` beside the data; without one the names
    of the images must be that data set's.

    It learns from the split ``train`` and scores on ``test`` or, where there is none, on ``val``. Protocols, all
    ours: ``upernet`` (default; 20k iterations), ``fcn`` (MoCo's network by that schedule, for ResNets), ``linear``,
    ``frozen-fcn``, ``smoke``, as of ``cityscapes`` with images at 512x512.
    """

    name = "segment"
    generic = True
    _own: ClassVar[dict[str, Any]] = {"train_split": "train", "test_split": "test|val"}
    protocols = (
        SegmentationProtocol(id="upernet", version=1, **{**UPERNET, "iterations": 20_000}, **_own),
        SegmentationProtocol(
            id="fcn", version=1, iterations=20_000, lr=0.01, milestones=(14_000, 18_000), crop=(513, 513),
            **MOCO, **_own,
        ),
        SegmentationProtocol(id="linear", version=1, **LINEAR, **_own),
        SegmentationProtocol(id="frozen-fcn", version=1, **FROZEN_FCN, **_own),
        SegmentationProtocol(id="smoke", version=1, ranked=False, **SMALL, **_own),
    )  # fmt: skip

    def place(self, setup: Setup[SegmentationProtocol]) -> tuple[Source[SegmentationSet], Path]:
        return SegmentationSource.given(
            setup.data, setup.registry, task=self.name, lacks="has no masks", fix="--data pairs:PATH"
        )


def _readable(
    part: SegmentationSet, setup: Setup[SegmentationProtocol], known: bool = False
) -> tuple[SegmentationSet, frozenset[int]]:
    """The images that can be read with their masks, and the values of these; each is read once, before any training."""

    def read(row: int) -> list[int]:
        part.image(row)
        values: list[int] = np.unique(part.mask(row)).tolist()
        return values

    return usable(part, read, setup.progress, strict=setup.strict, known=known)


def _load(
    layout: Source[SegmentationSet], path: Path, train: str, test: str, limit: int | None
) -> tuple[SegmentationSet, SegmentationSet]:
    """Both splits."""

    def load() -> tuple[SegmentationSet, SegmentationSet]:
        first, second = layout.pair(path, train, test)
        return first.limit(limit), second.limit(limit)

    return loaded((layout, path.resolve(), train, test, limit), load)


def _scored(
    found: Segmented, test: SegmentationSet
) -> tuple[dict[str, float | None], dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Scores, bootstrap replicates of them over images, and what there is by class."""
    area, border = scores(found.counts, test.classes), scores(found.boundary, test.classes)
    # the same resamples of the images for every backbone, seed and engine, so that their replicates are paired
    replicates: dict[str, npt.NDArray[Any]] = {**bootstrap_scores(found.counts, REPLICATES)}
    replicates["boundary_mIoU"] = bootstrap_scores(found.boundary, REPLICATES)["mIoU"]
    details = {
        "IoU_by_class": area.iou,
        "accuracy_by_class": area.accuracy,
        "boundary_IoU_by_class": border.iou,
    }
    return {**area.scores, "boundary_mIoU": border.scores["mIoU"]}, replicates, details


def _write_counts(path: Path, found: Segmented, test: SegmentationSet) -> None:
    """Pixel counts by image and class, what every score can be made from again; the confusion matrix over all images
    (rows the truth); and the labels of the images in the picture."""
    labels: dict[str, Any] = {f"labels/{test.records[i].image_id}": said for i, said in found.predictions.items()}
    np.savez_compressed(
        path,
        image_id=np.array([record.image_id for record in test.records]),
        classes=np.array(test.classes),
        counts=found.counts,
        boundary=found.boundary,
        matrix=found.matrix,
        **labels,
    )
