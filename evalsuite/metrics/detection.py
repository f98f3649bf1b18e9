"""Average precision of object detectors, as COCO and as PASCAL VOC define it, and its bootstrap over images.

Truth and detections are one record an image. Boxes are (x0, y0, x1, y1) in continuous pixels, the first pixel
reaching from 0 to 1. A VOC annotation, whose corners are 1-based and inclusive, becomes such a box by taking
1 off xmin and ymin alone; width and height then are what the devkit calls ``xmax - xmin + 1`` and ``ymax -
ymin + 1``, and the plain overlap of continuous boxes is the devkit's overlap with its "+1".
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle

from evalsuite.errors import DataError, UsageError
from evalsuite.statistics import resample_weights

__all__ = [
    "COCO_METRICS",
    "CocoScores",
    "Detections",
    "Matches",
    "Truth",
    "TruthLike",
    "VocScores",
    "bootstrap_ap",
    "coco_matches",
    "coco_scores",
    "coco_scores_from_json",
    "resampled_ap",
    "voc_matches",
    "voc_scores",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
IouType = Literal["bbox", "segm"]

COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""The twelve numbers of COCO's summary, in its order."""

# As COCO's Params have them: np.linspace, whose last digits differ from those of k / 100.
_COCO_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_COCO_RECALLS = np.linspace(0.0, 1.0, 101)
_COCO_MAX_DETECTIONS = 100
_EVERY_AREA = [0.0, 1e10]
_VOC_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
_VOC07_RECALLS = np.arange(0.0, 1.1, 0.1)

# What averages a precision-recall curve: a grid of recalls, or None for the area beneath the curve.
_CURVES: dict[str, dict[str, Floats | None]] = {
    "coco": {"": _COCO_RECALLS},
    "voc": {"": _VOC07_RECALLS, "_area": None},
}
# Elements of a (replicates, detections) array that are worked on at once: 16 MB in float64.
_BLOCK = 2_000_000
# Pairs of image and class that the library works on at once; it takes some 2 kB for each.
_CELLS = 200_000


class TruthLike(Protocol):
    """The truth of one image with N objects; what a reader of data gives and what :class:`Truth` is."""

    @property
    def image_id(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def boxes(self) -> Floats: ...
    @property
    def labels(self) -> Ints: ...
    @property
    def crowd(self) -> Bools: ...
    @property
    def difficult(self) -> Bools: ...
    @property
    def area(self) -> Floats: ...
    @property
    def masks(self) -> tuple[Any, ...] | None: ...


@dataclass(frozen=True, eq=False)
class Truth:
    """The ground truth of one image.

    ``boxes`` (N, 4) float64 xyxy; ``labels`` (N,) int64 from 0 to K-1; ``crowd`` (N,) bool, COCO's groups,
    which several detections may match and none must; ``difficult`` (N,) bool, VOC's objects that count for
    nothing; ``area`` (N,) float64 in square pixels, that of the object rather than of its box where the data
    know it; ``masks`` N COCO segmentations (lists of polygons, or RLE dictionaries), or None.
    """

    image_id: int
    height: int
    width: int
    boxes: Floats
    labels: Ints
    crowd: Bools
    difficult: Bools
    area: Floats
    masks: tuple[Any, ...] | None = None


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections of one image: ``boxes`` (N, 4) xyxy, ``scores`` (N,), ``labels`` (N,) from 0 to
    K-1, and ``masks``, N compressed RLE dictionaries, or None. Any order."""

    image_id: int
    boxes: Floats
    scores: Floats
    labels: Ints
    masks: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class CocoScores:
    """``scores`` by the names of :data:`COCO_METRICS`, in [0, 1]; ``per_class`` AP by class name; ``curves`` the
    precision, averaged over classes, at recalls 0, 0.01, ... 1, by the IoU that counts as a hit.

    None where the number is undefined for want of ground truth (COCO's tools print -1).
    """

    scores: dict[str, float | None]
    per_class: dict[str, float | None]
    curves: dict[str, list[float]]


@dataclass(frozen=True)
class VocScores:
    """``scores`` in [0, 1]: AP50, AP75 and AP (the mean over IoU .50:.05:.95) by the eleven points of VOC
    2007, and AP50_area, AP75_area and AP_area by the area under the curve of VOC 2010 and later;
    ``per_class`` AP50 by the eleven points.

    Classes without an object that counts have None, and are left out of the means.
    """

    scores: dict[str, float | None]
    per_class: dict[str, float | None]


@dataclass(frozen=True, eq=False)
class Matches:
    """The matching of N detections over I images, K classes and T thresholds: what average precision needs.

    Detections lie by class, and within one by falling score. ``label`` and ``image`` (N,) say whose they are
    (images by their index in the truth); ``outcome`` (T, N) is 1 for a true positive, 0 for a false one, -1
    for what is ignored. ``positives`` (I, K) counts the objects to be detected.
    """

    kind: Literal["coco", "voc"]
    classes: tuple[str, ...]
    thresholds: Floats
    label: Ints
    image: Ints
    outcome: npt.NDArray[np.int8]
    positives: Ints


# ------------------------------------------------------------------------------------------------------- COCO


@contextmanager
def _collector_resting() -> Iterator[None]:
    """Spare Python's cycle collector the walks over some hundred thousand dictionaries, which hold no cycle: they
    take a fifth of the time."""
    resting = not gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not resting:
            gc.enable()


@_collector_resting()
def coco_scores(
    truth: Sequence[TruthLike],
    detections: Iterable[Detections],
    classes: Sequence[str],
    iou_type: IouType = "bbox",
) -> CocoScores:
    """COCO's twelve numbers and the AP of each class.

    Computed by faster-coco-eval, which agrees with pycocotools. An image without a record in ``detections``
    is one without detections. With ``iou_type="segm"`` both sides need masks, and the size of a
    detection is the area of its mask.

    Raises:
        UsageError: records that contradict each other: unknown or repeated images, labels outside 0..K-1,
            arrays of unequal lengths, numbers that are not finite, masks missing.
    """
    columns = _columns(truth, detections, classes)
    ground, predicted = _coco_datasets(truth, columns, classes, iou_type)
    return _coco_summary(ground, predicted, iou_type)


def coco_scores_from_json(
    dataset: Mapping[str, Any], results: Sequence[Mapping[str, Any]], iou_type: IouType = "bbox"
) -> CocoScores:
    """The same from a COCO instances dictionary and a COCO results list, as they are in the files.

    Category ids may have gaps. As in COCO's tools, the size of a result that has a box is that of its box,
    even for ``iou_type="segm"``. Annotations are numbered anew, so one with the id 0 counts as any other
    (COCO's tools take it for unmatched). The arguments are left as they are.

    Raises:
        DataError: a key that is needed is missing, or the data set lacks the image of a result.
    """
    images = _having(dataset.get("images"), {"id"}, "images")
    categories = _having(dataset.get("categories"), {"id", "name"}, "categories")
    shape = {"bbox"} if iou_type == "bbox" else {"segmentation"}
    wanted = {"image_id", "category_id"} | shape
    if not images or not categories:
        raise DataError(
            "there is nothing to score on",
            cause=f"the data set has {len(images)} images and {len(categories)} categories",
            fix="give the annotations of the split that the results were made on",
        )
    annotations = _having(dataset.get("annotations"), wanted | {"area"}, "annotations")
    _having(results, wanted | {"score"}, "results")
    strangers = {entry["image_id"] for entry in results} - {entry["id"] for entry in images}
    if strangers:
        raise DataError(
            f"{len(strangers)} images of the results are not in the data set, {min(strangers)} among them",
            cause="the results were made on another split, or image ids were renumbered",
            fix="score the results against the annotations of the split they were made on",
        )
    ground = {
        "images": [dict(entry) for entry in images],
        "categories": [dict(entry) for entry in categories],
        "annotations": [{"iscrowd": 0, **entry, "id": i} for i, entry in enumerate(annotations, 1)],
    }
    predicted = COCO(ground, print_function=_silent).loadRes([dict(entry) for entry in results]).dataset
    return _coco_summary(ground, predicted, iou_type)


@_collector_resting()
def coco_matches(
    truth: Sequence[TruthLike],
    detections: Iterable[Detections],
    classes: Sequence[str],
    iou_type: IouType = "bbox",
) -> Matches:
    """How COCO matches at IoU .50:.05:.95: objects of every size, at most 100 detections a class and image.

    Raises:
        UsageError: as :func:`coco_scores`.
    """
    columns = _columns(truth, detections, classes)
    ground, predicted = _coco_datasets(truth, columns, classes, iou_type)
    evaluation = _evaluation(ground, predicted, iou_type, separate_eval=True)
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [_EVERY_AREA], ["all"]
    evaluation.params.maxDets = [_COCO_MAX_DETECTIONS]
    by_id = np.argsort(columns.ids, kind="stable")  # the library goes through images by rising id
    present = np.zeros((len(classes), len(truth)), dtype=np.bool_)
    present[columns.predicted_labels, columns.predicted_image] = True
    present = present[:, by_id]
    cells = []
    for block in _class_blocks(evaluation, len(truth)):
        evaluation.evaluate()
        cells += [_cells(evaluation._evalImgs_cpp, k, present[key - 1]) for k, key in enumerate(block)]
    label = np.repeat(np.arange(len(classes)), [cell.score.size for cell in cells])
    score = np.concatenate([cell.score for cell in cells])
    order = np.lexsort((-score, label))
    counted = ~columns.crowd & (columns.area >= _EVERY_AREA[0]) & (columns.area <= _EVERY_AREA[1])
    return Matches(
        kind="coco",
        classes=tuple(classes),
        thresholds=_COCO_THRESHOLDS,
        label=label[order],
        image=by_id[np.concatenate([cell.image for cell in cells])][order],
        outcome=np.concatenate([cell.outcome for cell in cells], axis=1)[:, order],
        positives=_count(columns.image[counted], columns.labels[counted], len(truth), len(classes)),
    )


def _coco_summary(ground: dict[str, Any], predicted: dict[str, Any], iou_type: IouType) -> CocoScores:
    evaluation = _evaluation(ground, predicted, iou_type, separate_eval=False)
    keys = evaluation.params.catIds
    curves = []
    for _ in _class_blocks(evaluation, len(ground["images"])):
        evaluation.evaluate()
        evaluation.accumulate()
        curves.append((evaluation.eval["precision"], evaluation.eval["recall"]))
    evaluation.eval = {
        "precision": np.concatenate([precision for precision, _ in curves], axis=2),
        "recall": np.concatenate([recall for _, recall in curves], axis=1),
    }
    evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, -1]  # (T, recalls, K): every area, 100 detections
    names = {entry["id"]: entry["name"] for entry in ground["categories"]}
    per_class = {names[key]: _mean(precision[..., k]) for k, key in enumerate(keys)}
    values = (None if value < 0 else float(value) for value in evaluation.stats)
    defined = precision[..., (precision > -1).all(axis=(0, 1))]  # classes with an object
    curves_by_iou = {
        f"{threshold:.2f}": defined[t].mean(axis=1).round(4).tolist() if defined.size else []
        for t, threshold in enumerate(evaluation.params.iouThrs) if round(100 * threshold) in (50, 75)
    }  # fmt: skip
    return CocoScores(dict(zip(COCO_METRICS, values, strict=True)), per_class, curves_by_iou)


def _evaluation(ground: dict[str, Any], predicted: dict[str, Any], iou_type: IouType, *, separate_eval: bool) -> Any:
    """The library's evaluator, which prints nothing; with ``separate_eval`` it keeps its matches."""
    return COCOeval_faster(
        COCO(ground, print_function=_silent),
        COCO(predicted, print_function=_silent),
        iou_type,
        print_function=_silent,
        separate_eval=separate_eval,
    )


def _class_blocks(evaluation: Any, images: int) -> Iterator[list[int]]:
    """Give the evaluator its classes a few at a time, and say which; so its memory does not grow with
    images."""
    keys = evaluation.params.catIds
    step = max(1, _CELLS // images)
    for start in range(0, len(keys), step):
        evaluation.params.catIds = keys[start : start + step]
        yield keys[start : start + step]


@dataclass(frozen=True, eq=False)
class _Cells:
    """The detections of one class that the library kept, image by image: (n,), (n,), (T, n)."""

    image: Ints
    score: Floats
    outcome: npt.NDArray[np.int8]


def _cells(evaluated: Sequence[Any], label: int, present: Bools) -> _Cells:
    """Read class ``label`` of a block out of the library's (class, image) list; its records open through
    their pickle state, whose vectors are T blocks, one a threshold, of as many detections as the image
    keeps."""
    images = np.flatnonzero(present)
    states = [evaluated[label * present.size + image].__getstate__() for image in images.tolist()]
    sizes = np.array([len(state[2]) for state in states], dtype=np.int64)
    scores = np.array([value for state in states for value in state[2]], dtype=np.float64)
    matched = np.array([value for state in states for value in state[0]], dtype=np.int64) > 0
    ignored = np.array([value for state in states for value in state[4]], dtype=np.bool_)
    steps = len(_COCO_THRESHOLDS)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    rank = np.arange(scores.size) - first
    where = steps * first + rank + np.arange(steps)[:, None] * np.repeat(sizes, sizes)
    outcome = np.where(ignored, -1, matched).astype(np.int8)
    return _Cells(np.repeat(images, sizes), scores, outcome[where])


def _coco_datasets(
    truth: Sequence[TruthLike], columns: _Columns, classes: Sequence[str], iou_type: IouType
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides as COCO dictionaries. Ids of annotations count from 1: to COCO's tools 0 means
    "unmatched"."""
    images = [{"id": int(r.image_id), "height": int(r.height), "width": int(r.width)} for r in truth]
    categories = [{"id": k, "name": name} for k, name in enumerate(classes, 1)]
    common = {"images": images, "categories": categories}
    area = columns.predicted_area
    if iou_type == "segm":
        _need_masks(columns)
        area = np.asarray(rle.area(columns.predicted_masks) if columns.predicted_masks else [], dtype=np.float64)
    ground = _annotations(columns.ids, columns.image, columns.boxes, columns.labels, columns.area)
    predicted = _annotations(
        columns.ids, columns.predicted_image, columns.predicted_boxes, columns.predicted_labels, area
    )
    for entry, crowd in zip(ground, columns.crowd.tolist(), strict=True):
        entry["iscrowd"] = int(crowd)
    for entry, score in zip(predicted, columns.scores.tolist(), strict=True):
        entry["score"] = score
    if iou_type == "segm":
        for entry, mask in zip(ground + predicted, [*columns.masks, *columns.predicted_masks], strict=True):
            entry["segmentation"] = mask
    return {**common, "annotations": ground}, {**common, "annotations": predicted}


def _annotations(ids: Ints, image: Ints, boxes: Floats, labels: Ints, area: Floats) -> list[dict[str, Any]]:
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    rows = zip(ids[image].tolist(), (labels + 1).tolist(), corners.tolist(), area.tolist(), strict=True)
    return [
        {"id": number, "image_id": key, "category_id": category, "bbox": box, "area": size}
        for number, (key, category, box, size) in enumerate(rows, 1)
    ]


def _need_masks(columns: _Columns) -> None:
    for side, masks, count in (
        ("truth", columns.masks, len(columns.labels)),
        ("detections", columns.predicted_masks, len(columns.predicted_labels)),
    ):
        if len(masks) != count:
            raise UsageError(
                f"mask AP was requested, but the {side} have {len(masks)} masks for {count} objects",
                cause="the data set has no segmentations, or the detector gives boxes alone",
                fix='score boxes (iou_type="bbox"), or use data and a model with masks',
            )


def _having(entries: object, keys: set[str], name: str) -> Sequence[Mapping[str, Any]]:
    """``entries``, if they are a list of mappings with all these keys."""
    if not isinstance(entries, Sequence):
        raise DataError(
            f'no list of "{name}"',
            cause="this is not a COCO instances file with a COCO results list",
            fix="see the data format page of cocodataset.org",
        )
    for index, entry in enumerate(entries):
        missing = keys - entry.keys() if isinstance(entry, Mapping) else keys
        if missing:
            raise DataError(
                f'entry {index} of "{name}" lacks {", ".join(sorted(missing))}',
                cause="the file is not in COCO's format, or was cut",
                fix="see the data format page of cocodataset.org",
            )
    return entries


def _silent(*_: object) -> None:
    """Takes the library's progress lines."""


# -------------------------------------------------------------------------------------------------------- VOC


def voc_scores(truth: Sequence[TruthLike], detections: Iterable[Detections], classes: Sequence[str]) -> VocScores:
    """Average precision as PASCAL VOC defines it, at IoU above .50, .75 and averaged over .50:.05:.95.

    The numbers of detectron2's ``PascalVOCDetectionEvaluator``, which takes the eleven points for VOC 2007
    (so they are what is published as "VOC07 test") and the area for later years; but boxes and scores are not
    rounded to 0.1 pixel and 0.001 on the way, equal scores keep the order of ``truth`` and of the detector,
    and classes without ground truth are left out of the mean.

    Raises:
        UsageError: as :func:`coco_scores`.
    """
    matches = voc_matches(truth, detections, classes)
    curves = _class_precisions(matches, np.ones((1, len(truth))))
    scores = {name: _none_if_nan(values[0]) for name, values in _named_means(matches, curves).items()}
    per_class = map(_none_if_nan, curves[""][0, _VOC_THRESHOLDS.index(0.5)])
    return VocScores(scores, dict(zip(classes, per_class, strict=True)))


def voc_matches(
    truth: Sequence[TruthLike],
    detections: Iterable[Detections],
    classes: Sequence[str],
    thresholds: Sequence[float] = _VOC_THRESHOLDS,
) -> Matches:
    """How the VOC devkit matches: every detection goes to the object of its class it overlaps most, taken or
    not.

    Above the threshold (strictly, as in the Python port of the devkit that detectron2 and py-faster-rcnn use)
    the best-scored detection of an object is a true positive and every further one a false positive; where
    the object is difficult, or a crowd, the detection counts for nothing. There is no limit to the number of
    detections.

    Raises:
        UsageError: as :func:`coco_scores`.
    """
    columns = _columns(truth, detections, classes)
    order = np.lexsort((-columns.scores, columns.predicted_labels))
    overlap, best = _best_overlaps(columns)
    overlap, best = overlap[order], best[order]
    unscored = columns.difficult | columns.crowd
    outcome = np.zeros((len(thresholds), len(order)), dtype=np.int8)
    for row, threshold in zip(outcome, thresholds, strict=True):
        close = np.flatnonzero(overlap > threshold)
        excused = unscored[best[close]]
        row[close[excused]] = -1
        rest = close[~excused]
        row[rest[np.unique(best[rest], return_index=True)[1]]] = 1  # the first, which is the best scored
    counted = ~unscored
    return Matches(
        kind="voc",
        classes=tuple(classes),
        thresholds=np.asarray(thresholds, dtype=np.float64),
        label=columns.predicted_labels[order],
        image=columns.predicted_image[order],
        outcome=outcome,
        positives=_count(columns.image[counted], columns.labels[counted], len(truth), len(classes)),
    )


def _best_overlaps(columns: _Columns) -> tuple[Floats, Ints]:
    """For each detection, its largest IoU with an object of its image and class, and that object; (0, 0) if
    none."""
    overlap = np.zeros(len(columns.predicted_labels))
    best = np.zeros(len(columns.predicted_labels), dtype=np.int64)
    images = np.arange(len(columns.ids) + 1)
    firsts = np.searchsorted(columns.image, images)
    predicted_firsts = np.searchsorted(columns.predicted_image, images)
    for i in images[:-1]:
        objects = slice(firsts[i], firsts[i + 1])
        predicted = slice(predicted_firsts[i], predicted_firsts[i + 1])
        if objects.start == objects.stop or predicted.start == predicted.stop:
            continue
        iou = _iou(columns.predicted_boxes[predicted], columns.boxes[objects])
        iou[columns.predicted_labels[predicted, None] != columns.labels[objects]] = 0.0
        nearest = iou.argmax(axis=1)
        overlap[predicted] = iou[np.arange(len(nearest)), nearest]
        best[predicted] = firsts[i] + nearest
    return overlap, best


def _iou(one: Floats, other: Floats) -> Floats:
    """Overlaps (N, M) of boxes (N, 4) and (M, 4); 0 where both are empty."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.clip(high - low, 0.0, None).prod(axis=2)
    union = (one[:, 2:] - one[:, :2]).prod(axis=1)[:, None] + (other[:, 2:] - other[:, :2]).prod(axis=1) - shared
    overlap: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlap


# -------------------------------------------------------------------------------------------------- bootstrap


def bootstrap_ap(
    truth: Sequence[TruthLike],
    detections: Iterable[Detections],
    classes: Sequence[str],
    kind: Literal["bbox", "segm", "voc"] = "bbox",
    *,
    replicates: int = 200,
    seed: int = 0,
) -> dict[str, Floats]:
    """Bootstrap replicates (R,) over images of AP, AP50 and AP75, named as in CocoScores or VocScores.

    ``kind`` is COCO's metric on boxes or masks, or VOC's. The draws depend on the number of images and the
    seed alone, so the replicates of two detectors are paired. See :func:`resampled_ap` for what a replicate
    is.

    Raises:
        UsageError: as :func:`coco_scores`.
    """
    if kind == "voc":
        matches = voc_matches(truth, detections, classes)
    else:
        matches = coco_matches(truth, detections, classes, kind)
    return resampled_ap(matches, resample_weights(len(truth), replicates, seed))


def resampled_ap(matches: Matches, weights: npt.NDArray[Any]) -> dict[str, Floats]:
    """AP, AP50 and AP75 of R resamples of the images, as :func:`bootstrap_ap` names them.

    ``weights`` (R, I) says how often each replicate holds each image, in the order of the truth; weights of
    one give the score itself. A replicate is what scoring a data set with that many copies of each image
    would give, up to the order of equal scores within one image and class; nothing is matched anew.

    Returns (R,) each, NaN for a replicate that holds no object at all. A threshold that was not matched at
    has no entry. Time grows with R times detections plus R times true positives.

    Raises:
        UsageError: the weights are not (R, I), or some are negative.
    """
    weights = np.asarray(weights)
    images = len(matches.positives)
    if weights.ndim != 2 or weights.shape[1] != images or (weights < 0).any():
        raise UsageError(
            f"weights of shape {weights.shape} do not resample {images} images",
            cause="there is to be one row a replicate and one weight, 0 or more, an image",
            fix="draw them by evalsuite.statistics.resample_weights",
        )
    widest = int(np.bincount(matches.label, minlength=1).max())
    rows = max(1, _BLOCK // max(widest, images))
    parts = [
        _named_means(matches, _class_precisions(matches, weights[start : start + rows]))
        for start in range(0, len(weights), rows)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _class_precisions(matches: Matches, weights: npt.NDArray[Any]) -> dict[str, Floats]:
    """Average precision (R, T, K) by curve, NaN for a class of which a replicate holds no object."""
    weights = weights.astype(np.float64)
    totals = weights @ matches.positives  # (R, K)
    shape = (len(weights), len(matches.thresholds), len(matches.classes))
    curves = {name: np.full(shape, np.nan) for name in _CURVES[matches.kind]}
    edges = np.searchsorted(matches.label, np.arange(len(matches.classes) + 1))
    for k in np.flatnonzero(totals.any(axis=0)):
        own = slice(edges[k], edges[k + 1])
        held = totals[:, k] > 0
        for t, values in enumerate(
            _threshold_precisions(
                weights[held], matches.image[own], matches.outcome[:, own], totals[held, k], matches.kind
            )
        ):
            for name, value in values.items():
                curves[name][held, t, k] = value
    return curves


def _threshold_precisions(
    weights: Floats, image: Ints, outcome: npt.NDArray[np.int8], total: Floats, kind: str
) -> Iterator[dict[str, Floats]]:
    """For one class, threshold by threshold, average precision (R,) by curve.

    Interpolated precision, the largest at any greater recall, is always reached at a true positive, and
    recall only moves there; so the curve is followed at the true positives alone, which are few.
    """
    seen = np.cumsum(np.take(weights, image, axis=1), axis=1)
    for row in outcome:
        hits, ignored = np.flatnonzero(row == 1), np.flatnonzero(row == -1)
        true = np.cumsum(np.take(weights, image[hits], axis=1), axis=1)
        counted = np.take(seen, hits, axis=1)
        if ignored.size:
            skipped = np.zeros((len(weights), ignored.size + 1))
            np.cumsum(np.take(weights, image[ignored], axis=1), axis=1, out=skipped[:, 1:])
            counted -= np.take(skipped, np.searchsorted(ignored, hits), axis=1)
        precision = np.divide(true, counted, out=np.zeros_like(true), where=counted > 0)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = true / total[:, None]
        yield {name: _under(envelope, recall, grid) for name, grid in _CURVES[kind].items()}


def _under(envelope: Floats, recall: Floats, grid: Floats | None) -> Floats:
    """The mean of the envelope over the recalls of ``grid``, or its area.

    Each step counts for the part of the grid, or the stretch of recall, that it is the first to reach; what
    none reaches has precision 0.
    """
    reached = recall if grid is None else np.searchsorted(grid, recall, side="right") / len(grid)
    steps: Floats = np.einsum("rn,rn->r", envelope, np.diff(reached, axis=1, prepend=0.0))
    return steps


def _named_means(matches: Matches, curves: dict[str, Floats]) -> dict[str, Floats]:
    """Means (R,) over classes, of all thresholds together and of .5 and .75 alone."""
    named = {}
    for suffix, values in curves.items():
        named[f"AP{suffix}"] = _defined_mean(values)
        for percent in (50, 75):
            at = np.flatnonzero(np.isclose(matches.thresholds, percent / 100))
            if at.size:
                named[f"AP{percent}{suffix}"] = _defined_mean(values[:, at])
    return named


def _defined_mean(values: Floats) -> Floats:
    """The mean over all axes but the first of what is not NaN; NaN where nothing is."""
    flat = values.reshape(len(values), -1)
    defined = ~np.isnan(flat)
    count = defined.sum(axis=1)
    total = np.where(defined, flat, 0.0).sum(axis=1)
    mean: Floats = np.divide(total, count, out=np.full(len(flat), np.nan), where=count > 0)
    return mean


# ---------------------------------------------------------------------------------------------------- columns


@dataclass(frozen=True, eq=False)
class _Columns:
    """The images end to end, in the order of the truth: M objects and (``predicted_``, ``scores``) N detections.

    ``image`` and ``predicted_image`` are indices into ``ids`` (I,), ascending.
    """

    ids: Ints
    image: Ints
    boxes: Floats
    labels: Ints
    crowd: Bools
    difficult: Bools
    area: Floats
    masks: list[Any]
    predicted_image: Ints
    predicted_boxes: Floats
    predicted_labels: Ints
    scores: Floats
    predicted_masks: list[Any]

    @property
    def predicted_area(self) -> Floats:
        area: Floats = (self.predicted_boxes[:, 2:] - self.predicted_boxes[:, :2]).prod(axis=1)
        return area


def _columns(truth: Sequence[TruthLike], detections: Iterable[Detections], classes: Sequence[str]) -> _Columns:
    ids = np.array([record.image_id for record in truth], dtype=np.int64)
    by_image: dict[int, Detections] = {}
    for predictions in detections:
        _require(predictions.image_id not in by_image, f"two records of detections for image {predictions.image_id}")
        by_image[predictions.image_id] = predictions
    _require(len(ids) > 0, "there is no image to score on")
    _require(len(np.unique(ids)) == len(ids), "two images have the same id")
    strangers = by_image.keys() - set(ids.tolist())
    _require(not strangers, f"the truth lacks image {min(strangers, default=0)} of the detections")
    _require(len(classes) > 0, "there are no classes")
    _require(len(set(classes)) == len(classes), "two classes have the same name")
    for record in truth:
        _agree(record, "boxes", "labels", "crowd", "difficult", "area")
    for predictions in by_image.values():
        _agree(predictions, "boxes", "labels", "scores")
    predicted = [by_image[key] for key in ids.tolist() if key in by_image]
    predicted_sizes = [len(by_image[key].scores) if key in by_image else 0 for key in ids.tolist()]
    columns = _Columns(
        ids=ids,
        image=np.repeat(np.arange(len(ids)), [len(record.labels) for record in truth]),
        boxes=_join([np.reshape(record.boxes, (-1, 4)) for record in truth], np.float64, (0, 4)),
        labels=_join([record.labels for record in truth], np.int64),
        crowd=_join([record.crowd for record in truth], np.bool_),
        difficult=_join([record.difficult for record in truth], np.bool_),
        area=_join([record.area for record in truth], np.float64),
        masks=[mask for record in truth for mask in record.masks or ()],
        predicted_image=np.repeat(np.arange(len(ids)), predicted_sizes),
        predicted_boxes=_join([np.reshape(record.boxes, (-1, 4)) for record in predicted], np.float64, (0, 4)),
        predicted_labels=_join([record.labels for record in predicted], np.int64),
        scores=_join([record.scores for record in predicted], np.float64),
        predicted_masks=[mask for record in predicted for mask in record.masks or ()],
    )
    _check(columns, len(classes))
    return columns


def _join(parts: list[Any], dtype: Any, empty: tuple[int, ...] = (0,)) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(empty, dtype=dtype), *parts]).astype(dtype, copy=False)


def _agree(record: TruthLike | Detections, *names: str) -> None:
    """Refuse a record whose columns, or masks where it has them, differ in length."""
    if record.masks is not None:
        names = (*names, "masks")
    sizes = {name: len(getattr(record, name)) for name in names}
    if len(set(sizes.values())) > 1:
        _require(False, f"columns of image {record.image_id} differ in length: {sizes}")


def _check(columns: _Columns, classes: int) -> None:
    for labels in (columns.labels, columns.predicted_labels):
        _require(((labels >= 0) & (labels < classes)).all(), f"a label is outside 0..{classes - 1}")
    for numbers in (columns.boxes, columns.area, columns.predicted_boxes, columns.scores):
        _require(np.isfinite(numbers).all(), "a box, an area or a score is not a finite number")


def _require(holds: bool | np.bool_, problem: str) -> None:
    if not holds:
        raise UsageError(
            f"detections cannot be scored: {problem}",
            cause="truth and detections contradict each other, or the detector diverged",
            fix="give one record an image on each side, finite numbers, and labels from 0 to classes - 1",
        )


def _count(image: Ints, label: Ints, images: int, classes: int) -> Ints:
    """How many of each class (I, K) each image has."""
    return np.bincount(image * classes + label, minlength=images * classes).reshape(images, classes)


def _mean(precision: Floats) -> float | None:
    """The mean of the defined; COCO marks the undefined by -1."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None


def _none_if_nan(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)
