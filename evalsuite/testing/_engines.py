"""What an engine owes to the tasks that call it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evalsuite.backbone import Backbone
from evalsuite.data import source
from evalsuite.data.detection import DetectionSet
from evalsuite.data.segmentation import SegmentationSet
from evalsuite.errors import PluginError
from evalsuite.hooks import Registry, load
from evalsuite.metrics.segmentation import IGNORE, scores
from evalsuite.progress import Progress
from evalsuite.protocols import Detected, DetectionProtocol, Job, SegmentationProtocol, Segmented, job
from evalsuite.task import Protocol, Setup
from evalsuite.testing._faults import Faults, offline, plain
from evalsuite.testing._worlds import OracleBackbone, RandomBackbone

__all__ = ["check_engine"]

IMAGES = 8
SEGMENTATION = SegmentationProtocol(
    id="tiny", version=1, head="linear", train_split="train", test_split="val", iterations=40, batch_size=4, lr=0.02,
    optimizer="adamw", freeze_backbone=True, short_side=64, scale=(1.0, 1.0), crop=(64, 64), flip=0.0,
)  # fmt: skip
DETECTION = DetectionProtocol(
    id="tiny", version=1, model="fpn", train_split="train", test_split="val", iterations=2, batch_size=2, lr=0.001,
    min_sizes=(96,), max_size=128, test_min_size=96, test_max_size=128, pyramid_width=16, box_head_width=16,
    rpn_pre_nms_train=50, rpn_pre_nms_test=50, rpn_post_nms_train=20, rpn_post_nms_test=20, roi_batch=16, detections=10,
    score_threshold=0.0,
)  # fmt: skip


def check_engine(
    make: Callable[[], Any], *, protocol: Protocol | None = None, registry: Registry | None = None
) -> None:
    """Check what every engine owes, of detection (``detect``), segmentation (``segment``) or agents (``play``).

    It says its name, its job and its version. On a tiny world, by ``protocol`` or a tiny one of linear heads, it
    answers for every test image, with numbers that agree; the same seed gives the same answer; it changes nothing of
    the backbone it is given, and fetches nothing. A segmenter of a backbone that sees is better than that of a blind
    one. An agent needs minutes to learn anything, so of an engine of agents only what it says is checked. Raises
    AssertionError with a line for each fault.
    """
    faults, registry = Faults(), registry or load().registry
    with faults.during("making it"):
        engine = make()
        faults.unless(isinstance(getattr(engine, "name", None), str), "it does not say its name")
        with faults.during("asking for its version"):
            version = engine.version()
            faults.unless(isinstance(version, str) and bool(version), f"its version is {version!r}, no text")
        verb = _job(type(engine), faults)
        if verb is not None and not faults.lines:
            with tempfile.TemporaryDirectory() as folder, faults.during(f"asked to {verb}, it"), offline():
                if verb == "segment":
                    _check_segments(engine, protocol or SEGMENTATION, registry, Path(folder), faults)
                elif verb == "detect":
                    _check_detects(engine, protocol or DETECTION, registry, Path(folder), faults)
    faults.settle()


def _job(engine: type, faults: Faults) -> Job | None:
    """Its kind; None, and a fault, where it does not say one that it can do."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        try:
            return job(engine)
        except (PluginError, DeprecationWarning) as error:
            message = f"{error.problem}: {error.cause}" if isinstance(error, PluginError) else str(error)
            faults.unless(False, message)
            return None


def _work(folder: Path, protocol: Protocol, registry: Registry) -> Setup:
    return Setup(protocol, Path(tempfile.mkdtemp(dir=folder)), registry, Progress(quiet=True), demo=True)


def _untouched(backbone: Backbone, ask: Callable[[], Any], verb: str, faults: Faults) -> Any:
    identity, mode = backbone.identity, backbone.training
    answer = ask()
    faults.unless(backbone.identity == identity, f"asked to {verb}, it changes the weights of the backbone it is given")
    faults.unless(backbone.training == mode, f"asked to {verb}, it leaves the backbone in another mode")
    return answer


def _check_segments(engine: Any, protocol: Protocol, registry: Registry, folder: Path, faults: Faults) -> None:
    layout = source(registry, "camvid")
    path = layout.demo(folder, 0, IMAGES)
    train, test = (layout.load(path, layout.roles(path)[role]) for role in ("train", "val"))

    def ask(backbone: Backbone) -> Segmented:
        setup = _work(folder, protocol, registry)
        segmented = _untouched(
            backbone.eval(), lambda: engine.segment(backbone, protocol, train, test, setup), "segment", faults
        )
        assert isinstance(segmented, Segmented), f"it answers with {type(segmented).__name__}, no Segmented"
        return segmented

    seeing = ask(OracleBackbone(gives={"maps"}))
    _check_segmented(seeing, test, faults)
    if not faults.lines:
        again = ask(OracleBackbone(gives={"maps"}))
        same = np.array_equal(seeing.counts, again.counts)
        faults.unless(same, "asked to segment again from the same seed, it finds something else")
        blind = ask(RandomBackbone(gives={"maps"}))
        best, worst = (scores(segmented.counts, test.classes).scores["mIoU"] or 0.0 for segmented in (seeing, blind))
        message = f"a backbone that sees has mIoU {best:.4f}, a blind one {worst:.4f}"
        faults.unless(best > worst, f"{message}: its predictions do not depend on features")


def _check_segmented(segmented: Segmented, test: SegmentationSet, faults: Faults) -> None:
    shape = (len(test), len(test.classes), 3)
    for name in ("counts", "boundary"):
        value = getattr(segmented, name)
        if faults.unless(value.shape == shape, f"{name} is {value.shape} of {len(test)} images, not {shape}"):
            faults.unless(bool((value >= 0).all()), f"{name} holds numbers below 0")
            faults.unless(bool((value[..., 0] <= value[..., 1:].min(-1)).all()), f"{name} share more than there is")
    if faults.lines:
        return
    masks = [test.mask(i) for i in range(len(test))]
    true = np.stack([np.bincount(m[m != IGNORE], minlength=shape[1])[: shape[1]] for m in masks])
    faults.unless(np.array_equal(segmented.counts[..., 2], true), "counts[..., 2] are not the pixels of the test masks")
    totals = segmented.counts.sum(0)
    parts = (segmented.matrix.diagonal(), segmented.matrix.sum(0), segmented.matrix.sum(1))
    agree = all(np.array_equal(totals[:, i], part) for i, part in enumerate(parts))
    faults.unless(agree, "matrix and counts do not agree: rows are the truth, columns the prediction")
    for index, labels in segmented.predictions.items():
        fits = labels.shape == masks[index].shape and labels.dtype == np.uint8
        faults.unless(fits, f"the prediction of image {index} is no uint8 array of its size {masks[index].shape}")
    _check_words(segmented, faults)


def _check_words(result: Segmented | Detected, faults: Faults) -> None:
    for name in ("log", "timings", "details"):
        for line in plain(getattr(result, name), name):
            faults.unless(False, line)


def _check_detects(engine: Any, protocol: Protocol, registry: Registry, folder: Path, faults: Faults) -> None:
    layout = source(registry, "coco")
    path = layout.demo(folder, 0, IMAGES)
    roles = layout.roles(path)
    train, test = (layout.load(path, roles[role]) for role in ("train", "val"))

    def ask() -> Detected:
        backbone, setup = OracleBackbone(gives={"maps"}).eval(), _work(folder, protocol, registry)
        detected = _untouched(backbone, lambda: engine.detect(backbone, protocol, train, test, setup), "detect", faults)
        assert isinstance(detected, Detected), f"it answers with {type(detected).__name__}, no Detected"
        return detected

    detected = ask()
    _check_detected(detected, test, faults)
    if not faults.lines:
        again = ask()
        same = all(
            np.array_equal(one.boxes, other.boxes) and np.array_equal(one.scores, other.scores)
            for one, other in zip(detected.detections, again.detections, strict=True)
        )
        faults.unless(same, "asked to detect again from the same seed, it finds something else")


def _check_detected(detected: Detected, test: DetectionSet, faults: Faults) -> None:
    ids, wanted = [d.image_id for d in detected.detections], [record.image_id for record in test.records]
    faults.unless(ids == wanted, "its detections are not one for each test image, in their order")
    for each, record in zip(detected.detections, test.records, strict=False):
        count = len(each.scores)
        shapes = each.boxes.shape == (count, 4) and each.labels.shape == (count,)
        if not faults.unless(shapes, f"of image {each.image_id} there are {count} scores, boxes {each.boxes.shape}"):
            continue
        x0, y0, x1, y1 = each.boxes.T if count else np.zeros((4, 0))
        inside = (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= record.width).all() and (y1 <= record.height).all()
        faults.unless(bool(inside and (x1 >= x0).all() and (y1 >= y0).all()), f"boxes leave image {each.image_id}")
        faults.unless(bool(((each.scores >= 0) & (each.scores <= 1)).all()), "scores are not between 0 and 1")
        known = bool(((each.labels >= 0) & (each.labels < len(test.classes))).all())
        faults.unless(known, f"labels of image {each.image_id} are no classes, counted from 0")
    _check_words(detected, faults)
