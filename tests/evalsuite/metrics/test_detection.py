"""Detection metrics against pycocotools, a plain devkit, published answers, and physically resampled data."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evalsuite.errors import DataError, UsageError
from evalsuite.metrics import detection
from evalsuite.metrics.detection import (
    COCO_METRICS,
    Detections,
    Truth,
    bootstrap_ap,
    coco_matches,
    coco_scores,
    coco_scores_from_json,
    resampled_ap,
    voc_matches,
    voc_scores,
)
from evalsuite.statistics import resample_weights

SIDE = 48
CLASSES = ("ant", "bee", "cow", "dog", "eel")


@dataclass(frozen=True)
class Odds:
    """What a made-up world is like; every default is a hard case of its own."""

    images: int = 12
    objects: int = 6
    detections: int = 10
    crowd: float = 0.2
    difficult: float = 0.2
    empty: float = 0.2
    ties: bool = True
    pixels: float = 1.0  # scale of boxes and areas: 1 is all small, 4 spans small, medium and large


def world(seed: int, odds: Odds = Odds()) -> tuple[list[Truth], list[Detections]]:
    """Boxes on whole pixels, so that overlaps of exactly one half happen; some empty, some hit exactly."""
    random = np.random.default_rng(seed)
    side = int(SIDE * odds.pixels)
    truth, found = [], []
    for key in random.permutation(odds.images * 3)[: odds.images].tolist():
        count = 0 if random.random() < odds.empty else int(random.integers(1, odds.objects + 1))
        boxes = _boxes(random, count)
        labels = random.integers(0, len(CLASSES) - 1, count)  # the last class has no ground truth
        truth.append(
            Truth(
                key, side, side, boxes * odds.pixels, labels,
                crowd=random.random(count) < odds.crowd,
                difficult=random.random(count) < odds.difficult,
                area=odds.pixels**2 * _area(boxes) * random.uniform(0.3, 1, count),
                masks=tuple(_mask(random, box * odds.pixels, side) for box in boxes),
            )
        )  # fmt: skip
        guesses = 0 if random.random() < odds.empty else int(random.integers(1, odds.detections + 1))
        if guesses == 0 and random.random() < 0.5:
            continue  # no record at all
        spread, told = _boxes(random, guesses), random.integers(0, len(CLASSES), guesses)
        if count:
            source = random.integers(0, count, guesses)
            near = random.random(guesses) < 0.7
            spread[near] = boxes[source[near]]
            told[near] = labels[source[near]]
            moved = near & (random.random(guesses) < 0.7)
            spread[moved, :2] += random.integers(-2, 3, (int(moved.sum()), 2))
            spread = np.concatenate([spread[:, :2], np.maximum(spread[:, :2], spread[:, 2:])], axis=1)
            spread = spread.clip(0, SIDE)
        scores = random.integers(1, 6, guesses) / 5 if odds.ties else random.random(guesses)
        rectangles = tuple(_rectangle(box * odds.pixels, side) for box in spread)
        found.append(Detections(key, spread * odds.pixels, scores, told, rectangles))
    return truth, found


def _boxes(random: np.random.Generator, count: int) -> np.ndarray:
    corner = random.integers(0, SIDE - 16, (count, 2)).astype(float)
    return np.concatenate([corner, corner + random.integers(0, 17, (count, 2))], axis=1)


def _area(boxes: np.ndarray) -> np.ndarray:
    area: np.ndarray = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return area


def _rectangle(box: np.ndarray, side: int) -> dict[str, Any]:
    x0, y0, x1, y1 = box.astype(int)
    picture = np.zeros((side, side), dtype=np.uint8, order="F")
    picture[y0:y1, x0:x1] = 1
    encoded: dict[str, Any] = masks.encode(picture)
    return encoded


def _mask(random: np.random.Generator, box: np.ndarray, side: int) -> Any:
    """A polygon, compressed RLE or uncompressed RLE, all of which COCO's files hold."""
    x0, y0, x1, y1 = (box + np.array([0, 0, 1, 1])).tolist()
    kind = random.integers(3)
    if kind == 0:
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]
    if kind == 1:
        return _rectangle(box, side)
    picture = np.zeros((side, side), dtype=bool)
    picture[int(y0) : int(y1), int(x0) : int(x1)] = True
    flat = picture.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]]).astype(int)))
    return {"size": [side, side], "counts": np.diff([0, *edges.tolist(), flat.size]).tolist()}


def as_json(truth: list[Truth], found: list[Detections], kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The world as COCO files; category ids have gaps (10, 20, ...)."""
    dataset: dict[str, Any] = {
        "images": [{"id": t.image_id, "height": t.height, "width": t.width} for t in truth],
        "categories": [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(CLASSES)],
        "annotations": [],
    }
    for t in truth:
        for i in range(len(t.labels)):
            dataset["annotations"].append(
                {
                    "id": len(dataset["annotations"]) + 1, "image_id": t.image_id, "area": float(t.area[i]),
                    "category_id": 10 * (int(t.labels[i]) + 1), "iscrowd": int(t.crowd[i]),
                    "bbox": [*t.boxes[i, :2].tolist(), *(t.boxes[i, 2:] - t.boxes[i, :2]).tolist()],
                    "segmentation": t.masks[i] if t.masks else [],
                }
            )  # fmt: skip
    results = []
    for f in found:
        for i in range(len(f.labels)):
            shape: dict[str, Any] = {"segmentation": f.masks[i]} if kind == "segm" and f.masks else {}
            if kind == "bbox":
                shape["bbox"] = [*f.boxes[i, :2].tolist(), *(f.boxes[i, 2:] - f.boxes[i, :2]).tolist()]
            category = 10 * (int(f.labels[i]) + 1)
            results.append({"image_id": f.image_id, "category_id": category, "score": float(f.scores[i]), **shape})
    return dataset, results


def pycocotools(dataset: dict[str, Any], results: list[dict[str, Any]], kind: str) -> tuple[list[float], list[float]]:
    """The witness: its twelve numbers and AP by class, -1 where undefined."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = copy.deepcopy(dataset)
        ground.createIndex()
        if results:
            told = ground.loadRes(copy.deepcopy(results))
        else:  # loadRes cannot read an empty list
            told = COCO()
            told.dataset = {**ground.dataset, "annotations": []}
            told.createIndex()
        judge = COCOeval(ground, told, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    per_class = []
    for k in range(len(dataset["categories"])):
        values = judge.eval["precision"][:, :, k, 0, -1]
        per_class.append(float(values[values > -1].mean()) if (values > -1).any() else -1.0)
    return judge.stats.tolist(), per_class


def listed(scores: dict[str, float | None]) -> list[float]:
    return [-1.0 if value is None else value for value in scores.values()]


def assert_equal_to_pycocotools(truth: list[Truth], found: list[Detections], kind: Any) -> None:
    dataset, results = as_json(truth, found, kind)
    stats, per_class = pycocotools(dataset, results, kind)
    for scores in (coco_scores(truth, found, CLASSES, kind), coco_scores_from_json(dataset, results, kind)):
        assert tuple(scores.scores) == COCO_METRICS
        assert tuple(scores.per_class) == CLASSES
        assert listed(scores.scores) == pytest.approx(stats, abs=1e-9)
        assert listed(scores.per_class) == pytest.approx(per_class, abs=1e-9)


# ------------------------------------------------------------------------------------------------------- COCO

HARD = {
    "ties and crowds": Odds(),
    "three sizes": Odds(pixels=8.0, crowd=0.0),
    "all crowds": Odds(crowd=1.0),
    "nothing to find": Odds(objects=0, empty=1.0),
    "more than 100": Odds(images=3, detections=900, objects=30, empty=0.0),
    "one image": Odds(images=1, empty=0.0),
    "distinct scores": Odds(images=30, ties=False),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("odds", HARD.values(), ids=HARD)
def test_boxes_score_as_in_pycocotools(odds: Odds, seed: int):
    truth, found = world(seed, odds)
    if odds.objects == 0:
        found = [replace(f, boxes=f.boxes + 1) for f in world(seed, replace(odds, empty=0.0, objects=1))[1]]
        found = [f for f in found if f.image_id in {t.image_id for t in truth}]
    assert_equal_to_pycocotools(truth, found, "bbox")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ["ties and crowds", "three sizes", "all crowds", "distinct scores", "more than 100"])
def test_masks_score_as_in_pycocotools(case: str, seed: int):
    truth, found = world(seed, HARD[case])
    assert_equal_to_pycocotools(truth, found, "segm")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    odds=st.builds(
        Odds,
        images=st.integers(1, 8),
        objects=st.integers(1, 8),
        detections=st.integers(1, 40),
        crowd=st.sampled_from([0.0, 0.1, 0.5]),
        empty=st.sampled_from([0.0, 0.3, 0.9]),
        ties=st.booleans(),
        pixels=st.sampled_from([1.0, 2.5, 8.0]),
    ),
)
def test_any_world_scores_as_in_pycocotools(seed: int, odds: Odds):
    truth, found = world(seed, odds)
    assert_equal_to_pycocotools(truth, found, "bbox")


def test_the_worlds_are_hard():
    """The comparisons above would mean little if the worlds held no case that matters."""
    truth, found = world(1, HARD["more than 100"])
    assert max(np.bincount(f.labels).max() for f in found) > 100
    truth, found = world(0, HARD["three sizes"])
    area = np.concatenate([t.area for t in truth])
    assert min((area < 32**2).sum(), ((area > 32**2) & (area < 96**2)).sum(), (area > 96**2).sum()) > 0
    truth, found = world(0)
    assert any((f.boxes[:, 2:] == f.boxes[:, :2]).any() for f in found)
    assert any(len(t.labels) == 0 for t in truth)
    assert {t.image_id for t in truth} != {f.image_id for f in found}
    scores = coco_scores(truth, found, CLASSES).scores
    assert scores["AP"] is not None
    assert 0 < scores["AP"] < 1


def test_no_detection_at_all_scores_nothing():
    truth, _ = world(0)
    assert_equal_to_pycocotools(truth, [], "bbox")
    scores = coco_scores(truth, [], CLASSES)
    assert scores.scores["AP"] == 0
    assert scores.per_class["eel"] is None


def test_without_ground_truth_scores_are_undefined():
    truth, found = world(0, Odds(crowd=1.0))
    assert set(coco_scores(truth, found, CLASSES).scores.values()) == {None}
    assert np.isnan(bootstrap_ap(truth, found, CLASSES, replicates=3)["AP"]).all()


def test_classes_taken_a_few_at_a_time_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch):
    truth, found = world(3, Odds(pixels=4.0))
    whole, matches = coco_scores(truth, found, CLASSES), coco_matches(truth, found, CLASSES)
    monkeypatch.setattr(detection, "_CELLS", 2 * len(truth))
    assert coco_scores(truth, found, CLASSES) == whole
    parted = coco_matches(truth, found, CLASSES)
    for name in ("label", "image", "outcome", "positives"):
        np.testing.assert_array_equal(getattr(parted, name), getattr(matches, name))


def test_an_annotation_with_the_id_0_counts_and_arguments_stay_as_they_are():
    dataset, results = as_json(*world(0, Odds(images=4, empty=0.0, crowd=0.0)), "bbox")
    expected = coco_scores_from_json(dataset, results)
    dataset["annotations"][0]["id"] = 0
    before = copy.deepcopy((dataset, results))
    assert coco_scores_from_json(dataset, results) == expected
    assert (dataset, results) == before


@pytest.mark.parametrize("wanted", [True, False])
def test_the_collector_is_left_as_it_was(wanted: bool):
    truth, found = world(0)
    try:
        (gc.enable if wanted else gc.disable)()
        coco_scores(truth, found, CLASSES)
        assert gc.isenabled() == wanted
        with pytest.raises(UsageError):
            coco_matches([], found, CLASSES)
        assert gc.isenabled() == wanted
    finally:
        gc.enable()


def test_scoring_prints_and_logs_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG")
    coco_scores(*world(0), CLASSES)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d, r: d.pop("images"), 'no list of "images"'),
        (lambda d, r: d.update(images=[]), "nothing to score on"),
        (lambda d, r: d["annotations"][2].pop("area"), 'entry 2 of "annotations" lacks area'),
        (lambda d, r: r[1].pop("score"), 'entry 1 of "results" lacks score'),
        (lambda d, r: r.insert(0, 7), 'entry 0 of "results" lacks'),
        (
            lambda d, r: r[0].update(image_id=10**6),
            "1 images of the results are not in the data set, 1000000",
        ),
    ],
)
def test_files_that_are_not_coco_are_refused(change: Any, words: str):
    dataset, results = as_json(*world(0), "bbox")
    change(dataset, results)
    with pytest.raises(DataError, match=words):
        coco_scores_from_json(dataset, results)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, f: (t + t[:1], f), "two images have the same id"),
        (lambda t, f: (t, f + f[:1]), "two records of detections"),
        (lambda t, f: (t[1:], f), "the truth lacks image"),
        (lambda t, f: ([], []), "no image"),
        (lambda t, f: (t, [replace(f[0], labels=f[0].labels + 5)]), r"outside 0\.\.4"),
        (lambda t, f: (t, [replace(f[0], labels=f[0].labels - 5)]), r"outside 0\.\.4"),
        (lambda t, f: (t, [replace(f[0], scores=f[0].scores * np.nan)]), "not a finite number"),
        (lambda t, f: (t, [replace(f[0], scores=f[0].scores[1:])]), "differ in length"),
        (lambda t, f: ([replace(t[0], crowd=t[0].crowd[1:])], []), "differ in length"),
    ],
)
def test_records_that_contradict_each_other_are_refused(change: Any, words: str):
    truth, found = change(*world(0, Odds(empty=0.0)))
    for score in (coco_scores, voc_scores, bootstrap_ap):
        with pytest.raises(UsageError, match=words):
            score(truth, found, CLASSES)


def test_mask_scores_need_masks_on_both_sides():
    truth, found = world(0)
    with pytest.raises(UsageError, match="the detections have"):
        coco_scores(truth, [replace(f, masks=None) for f in found], CLASSES, "segm")
    with pytest.raises(UsageError, match="the truth have"):
        coco_scores([replace(t, masks=None) for t in truth], found, CLASSES, "segm")


def test_the_published_answer_on_coco_val2014(realdata: Path):
    folder = realdata / "metric_coco_val2014_100"
    dataset = json.loads((folder / "instances_val2014_100_gt_bbox_area.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    expected = json.loads((folder / "expected_bbox.json").read_text())
    names = (
        "AP",
        "AP50",
        "AP75",
        "APsmall",
        "APmedium",
        "APlarge",
        "AR1",
        "AR10",
        "AR100",
        "ARsmall",
        "ARmedium",
    )
    wanted = [expected[name] for name in (*names, "ARlarge")]
    assert listed(coco_scores_from_json(dataset, results).scores) == pytest.approx(wanted, abs=expected["tolerance"])
    truth, found, classes = from_json(dataset, results)
    assert listed(coco_scores(truth, found, classes).scores) == pytest.approx(wanted, abs=expected["tolerance"])


def test_the_known_answer_on_voc2012(realdata: Path):
    folder = realdata / "det_voc2012_100" / "coco"
    dataset = json.loads((folder / "instances_all.json").read_text())
    results = json.loads((folder / "detections_results.json").read_text())
    wanted = [0.3470, 0.6100, 0.3537, 0.0752, 0.3395, 0.4979, 0.3735, 0.5206, 0.5226]
    assert listed(coco_scores_from_json(dataset, results).scores)[:9] == pytest.approx(wanted, abs=5e-5)
    truth, found, classes = from_json(dataset, results)
    scores = coco_scores(truth, found, classes)
    assert listed(scores.scores)[:9] == pytest.approx(wanted, abs=5e-5)
    whole = resampled_ap(coco_matches(truth, found, classes), np.ones((1, len(truth))))
    assert {name: values[0] for name, values in whole.items()} == pytest.approx(
        {name: scores.scores[name] for name in ("AP", "AP50", "AP75")}, abs=1e-9
    )


def from_json(
    dataset: dict[str, Any], results: list[dict[str, Any]]
) -> tuple[list[Truth], list[Detections], list[str]]:
    keys = [category["id"] for category in dataset["categories"]]

    def column(entries: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        boxes = np.array([entry["bbox"] for entry in entries], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes, np.array([keys.index(entry["category_id"]) for entry in entries], dtype=np.int64)

    truth, found = [], []
    for image in dataset["images"]:
        here = [entry for entry in dataset["annotations"] if entry["image_id"] == image["id"]]
        told = [entry for entry in results if entry["image_id"] == image["id"]]
        crowd = np.array([entry.get("iscrowd", 0) for entry in here], dtype=bool)
        area = np.array([entry["area"] for entry in here], dtype=float)
        sides = image.get("height", 1), image.get("width", 1)
        truth.append(Truth(image["id"], *sides, *column(here), crowd, np.zeros_like(crowd), area))
        found.append(Detections(image["id"], column(told)[0], np.array([x["score"] for x in told]), column(told)[1]))
    return truth, found, [category["name"] for category in dataset["categories"]]


# -------------------------------------------------------------------------------------------------------- VOC


def plain_voc(truth: list[Truth], found: list[Detections], label: int, threshold: float, eleven: bool) -> float | None:
    """The devkit as one reads it: one detection after another, inclusive corners, "+1" in every side."""
    objects = {}
    for t in truth:
        own = np.flatnonzero(t.labels == label)
        skipped = t.difficult | t.crowd
        objects[t.image_id] = [[t.boxes[i] + (1, 1, 0, 0), bool(skipped[i]), False] for i in own]
    total = sum(not skip for image in objects.values() for _, skip, _ in image)
    order = {t.image_id: place for place, t in enumerate(truth)}
    told = [
        (-f.scores[i], order[f.image_id], i, f.image_id, f.boxes[i] + (1, 1, 0, 0))
        for f in found for i in np.flatnonzero(f.labels == label)
    ]  # fmt: skip
    if total == 0:
        return None
    precisions, recalls, true, false = [], [], 0, 0
    for *_, key, box in sorted(told, key=lambda entry: entry[:3]):
        best, chosen = -1.0, None
        for candidate in objects[key]:
            other = candidate[0]
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            shared = max(width, 0) * max(height, 0)
            areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, other)]
            union = sum(areas) - shared
            overlap = shared / union if union else 0.0
            if overlap > best:
                best, chosen = overlap, candidate
        if chosen is None or best <= threshold:
            false += 1
        elif not chosen[1]:
            if chosen[2]:
                false += 1
            else:
                true, chosen[2] = true + 1, True
        precisions.append(true / max(true + false, 1))
        recalls.append(true / total)
    if eleven:
        points = np.arange(0.0, 1.1, 0.1)
        return (
            sum(max([p for p, r in zip(precisions, recalls, strict=True) if r >= at], default=0.0) for at in points)
            / 11
        )
    area, last = 0.0, 0.0
    for i, recall in enumerate(recalls):
        area += (recall - last) * max(precisions[i:])
        last = recall
    return area


@pytest.mark.parametrize("seed", range(6))
def test_voc_scores_as_the_plain_devkit(seed: int):
    truth, found = world(seed, Odds(images=10, detections=25, crowd=0.05))
    scores = voc_scores(truth, found, CLASSES)
    for suffix, eleven in (("", True), ("_area", False)):
        by_threshold = {
            percent: [plain_voc(truth, found, k, percent / 100, eleven) for k in range(len(CLASSES))]
            for percent in range(50, 100, 5)
        }
        if eleven:
            assert list(scores.per_class.values()) == pytest.approx(by_threshold[50], abs=1e-12)
        means = {p: np.mean([v for v in values if v is not None]) for p, values in by_threshold.items()}
        assert scores.scores[f"AP50{suffix}"] == pytest.approx(means[50], abs=1e-12)
        assert scores.scores[f"AP75{suffix}"] == pytest.approx(means[75], abs=1e-12)
        assert scores.scores[f"AP{suffix}"] == pytest.approx(np.mean(list(means.values())), abs=1e-12)
    assert scores.per_class["eel"] is None


def one_image(boxes: list[list[float]], difficult: list[bool]) -> list[Truth]:
    count = len(boxes)
    corners = np.array(boxes, dtype=float).reshape(-1, 4)
    return [
        Truth(
            1, 100, 100, corners, np.zeros(count, np.int64), np.zeros(count, bool), np.array(difficult, bool),
            np.ones(count),
        )
    ]  # fmt: skip


def said(boxes: list[list[float]], scores: list[float]) -> list[Detections]:
    return [Detections(1, np.array(boxes, dtype=float), np.array(scores), np.zeros(len(scores), np.int64))]


def test_voc_rules_one_by_one():
    ten, far = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]
    half = [0.0, 0.0, 10.0, 5.0]  # overlaps ten by exactly one half

    def outcome(truth: list[Truth], found: list[Detections]) -> list[int]:
        listed: list[int] = voc_matches(truth, found, ["cat"], (0.5,)).outcome[0].tolist()
        return listed

    assert outcome(one_image([ten], [False]), said([ten, ten], [0.9, 0.8])) == [1, 0], "the second is false"
    assert outcome(one_image([ten], [False]), said([far, ten], [0.9, 0.8])) == [0, 1]
    assert outcome(one_image([ten], [True]), said([ten, ten, far], [0.9, 0.8, 0.7])) == [-1, -1, 0]
    assert outcome(one_image([ten], [False]), said([half], [0.9])) == [0], "one half is not above one half"
    near = [0.0, 0.0, 10.0, 9.0]  # its best object is taken, and it does not turn to the other
    assert outcome(one_image([ten, [0, 0, 10, 7]], [False, False]), said([ten, near], [0.9, 0.8])) == [1, 0]
    matches = voc_matches(one_image([ten, far], [True, False]), [], ["cat"])
    assert matches.positives.tolist() == [[1]]


def test_a_class_without_ground_truth_is_left_out_of_the_voc_mean():
    truth, found = one_image([[0, 0, 10, 10]], [False]), said([[0, 0, 10, 10]], [0.9])
    scores = voc_scores(truth, found, ["cat", "dog"])
    assert scores.scores == pytest.approx(dict.fromkeys(scores.scores, 1.0))
    assert scores.per_class == {"cat": pytest.approx(1.0), "dog": None}
    assert set(voc_scores(one_image([], []), found, ["cat"]).scores.values()) == {None}


def test_the_published_voc_example(realdata: Path):
    """IoU 0.3, 24.57 % by every point and 26.84 % by eleven, both sides one pixel wider than x2 - x1."""
    folder = realdata / "metric_voc_ap_example"

    def rows(path: Path) -> list[list[float]]:
        return [[float(word) for word in line.split()[1:]] for line in path.read_text().splitlines() if line]

    truth, found = [], []
    for path in sorted((folder / "groundtruths").glob("*.txt")):
        key = int(path.stem)
        boxes = np.array(rows(path))
        boxes[:, 2:] += boxes[:, :2] + 1
        truth += [replace(one_image(boxes.tolist(), [False] * len(boxes))[0], image_id=key)]
        told = np.array(rows(folder / "detections" / path.name))
        told[:, 3:] += told[:, 1:3] + 1
        found += [replace(said(told[:, 1:].tolist(), told[:, 0].tolist())[0], image_id=key)]
    assert sum(len(t.labels) for t in truth) == 15
    assert sum(len(f.labels) for f in found) == 24
    scores = resampled_ap(voc_matches(truth, found, ["person"], (0.3,)), np.ones((1, 7)))
    assert scores["AP_area"] == pytest.approx([0.245687], abs=1e-6)
    assert scores["AP"] == pytest.approx([0.268398], abs=1e-6)
    assert set(scores) == {"AP", "AP_area"}, "nothing was matched at .5 and .75"


# -------------------------------------------------------------------------------------------------- bootstrap


def scored(truth: list[Truth], found: list[Detections], kind: Any) -> dict[str, float | None]:
    if kind == "voc":
        return voc_scores(truth, found, CLASSES).scores
    scores = coco_scores(truth, found, CLASSES, kind).scores
    return {name: scores[name] for name in ("AP", "AP50", "AP75")}


def matched(truth: list[Truth], found: list[Detections], kind: Any) -> Any:
    return voc_matches(truth, found, CLASSES) if kind == "voc" else coco_matches(truth, found, CLASSES, kind)


@pytest.mark.parametrize("case", ["ties and crowds", "more than 100"])
@pytest.mark.parametrize("kind", ["bbox", "segm", "voc"])
@pytest.mark.parametrize("seed", range(2))
def test_weights_of_one_give_the_score(kind: str, case: str, seed: int):
    truth, found = world(seed, HARD[case])
    values = resampled_ap(matched(truth, found, kind), np.ones((2, len(truth)), dtype=np.int32))
    expected = scored(truth, found, kind)
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name] == pytest.approx([value, value], abs=1e-9)


@pytest.mark.parametrize("kind", ["bbox", "segm", "voc"])
@pytest.mark.parametrize("seed", range(3))
def test_a_replicate_is_the_score_of_images_physically_repeated(kind: str, seed: int):
    truth, found = world(seed, Odds(images=14, detections=30, ties=False))
    weights = resample_weights(len(truth), 6, seed)
    assert (weights == 0).any()
    assert (weights > 1).any()
    values = resampled_ap(matched(truth, found, kind), weights)
    by_image = {f.image_id: f for f in found}
    for r, row in enumerate(weights):
        copies = [t for t, times in zip(truth, row, strict=True) for _ in range(times)]
        numbered = [replace(t, image_id=i) for i, t in enumerate(copies)]
        again = [replace(by_image[t.image_id], image_id=i) for i, t in enumerate(copies) if t.image_id in by_image]
        for name, value in scored(numbered, again, kind).items():
            assert values[name][r] == pytest.approx(np.nan if value is None else value, abs=1e-9, nan_ok=True)


def test_replicates_are_paired_seeded_and_blockwise_the_same(monkeypatch: pytest.MonkeyPatch):
    truth, found = world(5, Odds(images=20))
    one = bootstrap_ap(truth, found, CLASSES, replicates=50, seed=1)
    assert one["AP"].shape == (50,)
    weights = resample_weights(len(truth), 50, 1)
    np.testing.assert_array_equal(one["AP"], resampled_ap(coco_matches(truth, found, CLASSES), weights)["AP"])
    assert (bootstrap_ap(truth, found, CLASSES, replicates=50, seed=2)["AP"] != one["AP"]).any()
    worse = [replace(f, scores=1 - f.scores) for f in found]
    other = bootstrap_ap(truth, worse, CLASSES, replicates=50, seed=1)
    assert np.var(one["AP"] - other["AP"]) < np.var(one["AP"]) + np.var(other["AP"]), "paired draws move together"
    monkeypatch.setattr(detection, "_BLOCK", 100)
    for name, values in bootstrap_ap(truth, found, CLASSES, replicates=50, seed=1).items():
        np.testing.assert_allclose(values, one[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", [np.ones(12), np.ones((2, 5)), -np.ones((1, 12))])
def test_weights_that_do_not_resample_are_refused(weights: np.ndarray):
    truth, found = world(0)
    with pytest.raises(UsageError, match="do not resample 12 images"):
        resampled_ap(coco_matches(truth, found, CLASSES), weights)
