"""Pixel counts and the scores made of them, against outside witnesses."""

from __future__ import annotations

from pathlib import Path

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from scipy import ndimage
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

from evalsuite.errors import UsageError
from evalsuite.metrics.segmentation import (
    IGNORE,
    Confusion,
    bootstrap_scores,
    boundary_counts,
    scores,
)
from evalsuite.statistics import resample_weights

Labels = np.ndarray
CLASSES = 5
NAMES = tuple("abcde")


def pair(
    random: np.random.Generator, height: int = 20, width: int = 30, classes: int = CLASSES
) -> tuple[Labels, Labels]:
    truth = random.integers(0, classes, (height, width))
    said = np.where(random.random(truth.shape) < 0.6, truth, random.integers(0, classes, truth.shape))
    truth[random.random(truth.shape) < 0.1] = IGNORE
    return said, truth


def counted(pairs: list[tuple[Labels, Labels]], classes: int = CLASSES) -> Confusion:
    confusion = Confusion(classes)
    for said, truth in pairs:
        confusion.update(torch.from_numpy(said), torch.from_numpy(truth))
    return confusion


@pytest.fixture
def pairs() -> list[tuple[Labels, Labels]]:
    random = np.random.default_rng(3)
    return [pair(random) for _ in range(6)]


def test_a_case_by_hand() -> None:
    truth = torch.tensor([[0, 0, 1], [1, 255, 255]])
    said = torch.tensor([[0, 1, 1], [1, 0, 2]])
    confusion = Confusion(3)
    confusion.update(said, truth)
    assert len(confusion) == 1
    assert confusion.matrix.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert confusion.counts.tolist() == [[[1, 1, 2], [2, 3, 2], [0, 0, 0]]]
    found = scores(confusion.counts, ("x", "y", "z"))
    assert found.iou == {"x": 1 / 2, "y": 2 / 3, "z": None}
    assert found.accuracy == {"x": 1 / 2, "y": 1.0, "z": None}
    assert found.scores == pytest.approx({"mIoU": 7 / 12, "mAcc": 3 / 4, "aAcc": 3 / 4})
    zero = scores(confusion.counts, ("x", "y", "z"), absent="zero")
    assert zero.scores == pytest.approx({"mIoU": 7 / 18, "mAcc": 1 / 2, "aAcc": 3 / 4})


def test_a_class_that_is_only_predicted_has_an_iou_of_zero_and_no_accuracy() -> None:
    found = scores(counted([(np.array([[0, 2]]), np.array([[0, 0]]))], 3).counts, ("x", "y", "z"))
    assert found.iou == {"x": 0.5, "y": None, "z": 0.0}
    assert found.accuracy == {"x": 0.5, "y": None, "z": None}
    assert found.scores["mIoU"] == 0.25


def test_nothing_to_judge_by() -> None:
    for confusion in (Confusion(2), counted([(np.zeros((2, 2), int), np.full((2, 2), IGNORE))], 2)):
        assert scores(confusion.counts, ("x", "y")).scores == {"mIoU": None, "mAcc": None, "aAcc": None}
    empty = Confusion(2)
    empty.update(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64))
    assert empty.counts.tolist() == [[[0, 0, 0], [0, 0, 0]]]


def test_against_scikit_learn(pairs: list[tuple[Labels, Labels]]) -> None:
    confusion = counted(pairs)
    said, truth = (np.concatenate([p[side].ravel() for p in pairs]) for side in (0, 1))
    said, truth = said[truth != IGNORE], truth[truth != IGNORE]
    assert (confusion.matrix == confusion_matrix(truth, said, labels=range(CLASSES))).all()
    found = scores(confusion.counts, NAMES)
    assert list(found.iou.values()) == pytest.approx(jaccard_score(truth, said, average=None).tolist(), abs=1e-12)
    assert found.scores["aAcc"] == pytest.approx(accuracy_score(truth, said), abs=1e-12)


@pytest.mark.mmseg
@pytest.mark.parametrize("classes", [5, 19, 150])
def test_against_mmsegmentation(classes: int) -> None:
    """One class more than the labels use, so that one is absent on both sides."""
    from mmseg.evaluation.metrics.iou_metric import IoUMetric

    random = np.random.default_rng(classes)
    made = [pair(random, 40, 50, classes - 1) for _ in range(3)]
    areas = [IoUMetric.intersect_and_union(*map(torch.from_numpy, p), classes, IGNORE) for p in made]
    theirs = IoUMetric.total_area_to_metrics(*(sum(column) for column in zip(*areas, strict=True)))  # type: ignore[arg-type]
    found = scores(counted(made, classes).counts, tuple(map(str, range(classes))))
    assert [v if v is not None else np.nan for v in found.iou.values()] == pytest.approx(
        theirs["IoU"].tolist(), rel=1e-6, nan_ok=True
    )
    assert found.iou[str(classes - 1)] is None
    assert found.scores["mIoU"] == pytest.approx(float(np.nanmean(theirs["IoU"])), rel=1e-6)
    assert found.scores["mAcc"] == pytest.approx(float(np.nanmean(theirs["Acc"])), rel=1e-6)
    assert found.scores["aAcc"] == pytest.approx(float(theirs["aAcc"]), rel=1e-6)


def test_the_published_answer_of_the_scene_parsing_benchmark(realdata: Path) -> None:
    """CSAILVision/sceneparsing prints a mean IoU of 0.1000 and a pixel accuracy of 100.00 % for its sample."""
    folder = realdata / "metric_ade_sceneparsing"
    confusion = Confusion(150)
    for file in sorted((folder / "annotations").glob("*.png")):
        truth, said = (
            np.asarray(Image.open(p)).astype(np.int64) - 1 for p in (file, folder / "predictions" / file.name)
        )
        truth[truth < 0] = IGNORE
        confusion.update(torch.from_numpy(said.clip(0)), torch.from_numpy(truth))
    names = tuple(map(str, range(150)))
    assert scores(confusion.counts, names, absent="zero").scores["mIoU"] == pytest.approx(0.1)
    skipped = scores(confusion.counts, names)
    assert skipped.scores == {"mIoU": 1.0, "mAcc": 1.0, "aAcc": 1.0}
    assert sum(value is not None for value in skipped.iou.values()) == 15


@settings(max_examples=40)
@given(
    st.integers(1, 7).flatmap(
        lambda classes: st.tuples(
            st.just(classes),
            arrays.arrays(np.int64, (4, 6), elements=st.integers(0, classes - 1)),
            arrays.arrays(np.int64, (4, 6), elements=st.sampled_from([*range(classes), IGNORE])),
        )
    )
)
def test_properties_of_counts(drawn: tuple[int, Labels, Labels]) -> None:
    classes, said, truth = drawn
    confusion = counted([(said, truth)], classes)
    kept = truth != IGNORE
    expected = np.zeros((classes, classes), int)
    np.add.at(expected, (truth[kept], said[kept]), 1)
    assert (confusion.matrix == expected).all()
    names = tuple(map(str, range(classes)))
    found = scores(confusion.counts, names)
    for name, value in found.iou.items():
        accuracy = found.accuracy[name]
        assert value is None or 0 <= value <= 1
        assert accuracy is None or (value is not None and value <= accuracy)
    perfect = scores(counted([(np.where(kept, truth, 0), truth)], classes).counts, names)
    assert set(perfect.iou.values()) <= {1.0, None}
    order = np.random.default_rng(0).permutation(classes)
    renamed = scores(counted([(order[said], np.where(kept, order[truth % classes], IGNORE))], classes).counts, names)
    assert [renamed.iou[str(order[label])] for label in range(classes)] == list(found.iou.values())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_type(kind: torch.dtype, pairs: list[tuple[Labels, Labels]]) -> None:
    confusion = Confusion(CLASSES)
    for said, truth in pairs:
        confusion.update(torch.from_numpy(said).to(kind).T, torch.from_numpy(truth).to(torch.uint8).T)  # not contiguous
    assert (confusion.matrix == counted(pairs).matrix).all()


def test_labels_up_to_the_last_byte() -> None:
    said, truth = np.array([[254, 3]]), np.array([[254, 254]])
    confusion = counted([(said, truth)], 255)
    assert confusion.matrix[254, 254] == confusion.matrix[254, 3] == 1


@pytest.mark.gpu
def test_on_a_device(pairs: list[tuple[Labels, Labels]]) -> None:
    confusion = Confusion(CLASSES)
    for said, truth in pairs:
        confusion.update(torch.from_numpy(said).cuda(), torch.from_numpy(truth).cuda())
    assert (confusion.matrix == counted(pairs).matrix).all()


@pytest.mark.parametrize(
    ("said", "truth", "told"),
    [
        (torch.zeros(2, 2).long(), torch.zeros(2, 3).long(), r"prediction is \(2, 2\) and truth \(2, 3\)"),
        (torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).long(), "not both the same"),
        (torch.zeros(2, 2), torch.zeros(2, 2).long(), "not integers"),
        (torch.full((2, 2), 3), torch.zeros(2, 2).long(), "predicted labels go from 3 to 3"),
        (torch.full((2, 2), -1), torch.zeros(2, 2).long(), "predicted labels go from -1"),
        (torch.full((2, 2), 256), torch.zeros(2, 2).long(), "predicted labels go from 256"),
        (torch.zeros(2, 2).long(), torch.full((2, 2), 3), "true labels are above 2"),
        (torch.zeros(2, 2).long(), torch.full((2, 2), 256), "true labels go from 256"),
    ],
)
def test_refusals(said: torch.Tensor, truth: torch.Tensor, told: str) -> None:
    confusion = Confusion(3)
    with pytest.raises(UsageError, match=told):
        confusion.update(said, truth)
    assert len(confusion) == 0


def test_refused_shapes() -> None:
    for wrong in (0, 256):
        with pytest.raises(UsageError, match=f"{wrong} classes"):
            Confusion(wrong)
    with pytest.raises(UsageError, match=r"counts of shape \(2, 3\) for 3 classes"):
        scores(np.zeros((2, 3)), ("x", "y", "z"))
    with pytest.raises(UsageError, match=r"not \(N, C, 3\)"):
        bootstrap_scores(np.zeros((2, 3)))
    with pytest.raises(UsageError, match="no samples"):
        bootstrap_scores(np.zeros((0, 2, 3)))


def test_bootstrap_is_scoring_the_copies(pairs: list[tuple[Labels, Labels]]) -> None:
    counts = counted(pairs).counts
    replicates = bootstrap_scores(counts, 20, seed=4)
    for row, weights in enumerate(resample_weights(len(pairs), 20, 4)):
        again = scores(np.repeat(counts, weights, axis=0), NAMES).scores
        assert {name: values[row] for name, values in replicates.items()} == pytest.approx(again, abs=1e-12)


def test_bootstrap_is_paired(pairs: list[tuple[Labels, Labels]]) -> None:
    better = [(np.where(truth == IGNORE, 0, truth), truth) for _, truth in pairs]
    worse, best = (bootstrap_scores(counted(p).counts, 50)["mIoU"] for p in (pairs, better))
    assert (best == 1).all()
    assert (bootstrap_scores(counted(pairs).counts, 50)["mIoU"] == worse).all()
    assert 0 < worse.std() < 0.1


def test_bootstrap_leaves_out_what_a_replicate_lacks() -> None:
    one = counted([(np.array([[0]]), np.array([[0]])), (np.array([[0]]), np.array([[IGNORE]]))], 2).counts
    values = bootstrap_scores(one, 200)["mIoU"]
    assert np.isnan(values).any()
    assert set(values[~np.isnan(values)]) == {1.0}


def official_boundary(mask: Labels, ratio: float) -> Labels:
    """The paper's mask minus its erosion, step by step, nothing lying beyond the image."""
    steps = max(1, round(ratio * float(np.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2))))
    padded = np.pad(mask, 1)
    eroded = ndimage.binary_erosion(padded, np.ones((3, 3)), iterations=steps, border_value=1)
    return np.asarray(mask & ~eroded[1:-1, 1:-1])


def blobs(random: np.random.Generator, height: int, width: int) -> Labels:
    noise = ndimage.gaussian_filter(random.random((3, height, width)), (0, 3, 3))
    return np.asarray(noise.argmax(axis=0))


@pytest.mark.parametrize(("height", "width", "ratio"), [(60, 80, 0.02), (33, 50, 0.08), (7, 90, 0.2), (12, 9, 0.001)])
def test_boundaries_as_the_paper_draws_them(height: int, width: int, ratio: float) -> None:
    random = np.random.default_rng(height)
    said, truth = blobs(random, height, width), blobs(random, height, width)
    said[: height // 2] = truth[: height // 2]
    truth[random.random(truth.shape) < 0.01] = IGNORE
    counts = boundary_counts(said, truth, 3, ratio)
    cut = np.where(truth == IGNORE, IGNORE, said)
    for label in range(3):
        ours, theirs = (official_boundary(side == label, ratio) for side in (cut, truth))
        assert counts[label].tolist() == [(ours & theirs).sum(), ours.sum(), theirs.sum()]


def test_boundary_iou_of_the_same_is_one_and_falls_with_a_shift() -> None:
    truth = np.zeros((50, 70), np.uint8)
    truth[10:40, 20:50] = 1
    values = [
        scores(boundary_counts(np.roll(truth, shift, axis=1), truth, 2), ("ground", "box")).iou["box"]
        for shift in (0, 1, 5)
    ]
    assert values[0] == 1.0
    assert values[1] is not None
    assert values[2] is not None
    assert 0 <= values[2] < values[1] < 1.0


def test_boundaries_refuse_what_counts_refuse() -> None:
    with pytest.raises(UsageError, match="predicted labels"):
        boundary_counts(np.full((3, 3), 2), np.zeros((3, 3), int), 2)
