"""Adjusted Rand indices against scikit-learn, and average precision of sets against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import adjusted_rand_score

from evalsuite.errors import UsageError
from evalsuite.metrics.objects import ObjectSet, adjusted_rand, foreground_adjusted_rand, owners, set_precision

LABELS = arrays(np.int64, (3, 4, 5), elements=st.integers(-1, 3))


@settings(deadline=None, max_examples=40)
@given(LABELS, LABELS)
def test_they_are_scikit_learns(truth, found):
    whole = [adjusted_rand_score(a.ravel(), b.ravel()) for a, b in zip(truth, found, strict=True)]
    assert adjusted_rand(truth, found) == pytest.approx(whole, abs=1e-12)
    objects = [
        adjusted_rand_score(a[a >= 0], b[a >= 0]) if (a >= 0).any() else np.nan
        for a, b in zip(truth, found, strict=True)
    ]
    assert foreground_adjusted_rand(truth, found) == pytest.approx(objects, abs=1e-12, nan_ok=True)


def test_a_mean_is_over_images_not_over_pixels_of_all():
    truth = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    found = np.array([[5, 5, 7, 7], [1, 2, 1, 2]])
    assert adjusted_rand(truth, found) == pytest.approx([1.0, -0.5])


def test_the_ground_does_not_count_in_the_foreground():
    truth = np.array([[-1, -1, -1, 0, 0, 1, 1]])
    split = np.array([[2, 3, 4, 0, 0, 1, 1]])
    assert foreground_adjusted_rand(truth, split).tolist() == [1.0]
    assert adjusted_rand(truth, split)[0] < 1
    # one mask over ground and an object is no fault, one over two objects is
    assert foreground_adjusted_rand(truth, np.array([[0, 0, 0, 0, 0, 1, 1]])).tolist() == [1.0]
    assert foreground_adjusted_rand(truth, np.array([[1, 1, 1, 0, 0, 0, 0]])).tolist() == [0.0]


def test_one_object_and_none():
    truth = np.array([[-1, 0, 0, 0], [-1, 0, 0, 0], [-1, -1, -1, -1]])
    found = np.array([[1, 2, 2, 2], [1, 2, 2, 1], [1, 2, 3, 3]])
    assert foreground_adjusted_rand(truth, found) == pytest.approx([1.0, 0.0, np.nan], nan_ok=True)


@pytest.mark.parametrize("shape", [(2, 3), (4,)])
def test_labels_of_other_pixels_are_refused(shape):
    with pytest.raises(UsageError, match="do not part the same pixels"):
        adjusted_rand(np.zeros((2, 4)) if len(shape) > 1 else np.zeros(4), np.zeros(shape))


def test_the_owner_of_a_pixel_is_the_largest_mask_at_the_size_asked():
    masks = torch.zeros(1, 3, 2, 2)
    masks[0, 2] = 0.4
    masks[0, 1, :, 1] = 0.6
    assert owners(masks, (2, 2)).tolist() == [[[2, 1], [2, 1]]]
    assert owners(masks, (4, 4))[0, 0].tolist() == [2, 2, 1, 1]


# Sets --------------------------------------------------------------------------------------------------------


def objects(kinds, places, present):
    return ObjectSet(np.array(kinds), np.array(places, dtype=float), np.array(present, dtype=float))


TRUTH = objects([[[0, 1], [1, 1]]], [[[0.0, 0.0], [1.0, 0.0]]], [[1, 1]])


@pytest.mark.parametrize(
    ("kinds", "places", "sure", "expected"),
    [
        # both found: precision 1 up to recall 1
        ([[[0, 1], [1, 1]]], [[[0.1, 0.0], [1.0, 0.1]]], [[0.9, 0.8]], 1.0),
        # one attribute of the surer one is wrong: precision 0 then 1/2, recall ends at 1/2
        ([[[0, 0], [1, 1]]], [[[0.0, 0.0], [1.0, 0.0]]], [[0.9, 0.8]], 0.25),
        # the same with the wrong one less sure
        ([[[0, 0], [1, 1]]], [[[0.0, 0.0], [1.0, 0.0]]], [[0.8, 0.9]], 0.5),
        # the same object twice: the second is a mistake
        ([[[0, 1], [0, 1]]], [[[0.0, 0.0], [0.1, 0.0]]], [[0.9, 0.8]], 0.5),
        # too far away
        ([[[0, 1], [1, 1]]], [[[0.0, 0.5], [1.0, 0.0]]], [[0.9, 0.8]], 0.25),
        # right, wrong, right: the envelope lifts nothing here; (1 + 2/3) / 2
        ([[[0, 1], [5, 5], [1, 1]]], [[[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]], [[0.9, 0.8, 0.7]], 5 / 6),
        # wrong, right, right: precisions 0, 1/2, 2/3, and the envelope makes the second 2/3
        ([[[5, 5], [0, 1], [1, 1]]], [[[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]], [[0.9, 0.8, 0.7]], 2 / 3),
        # nothing right
        ([[[5, 5]]], [[[0.0, 0.0]]], [[0.9]], 0.0),
    ],
)
def test_average_precision_of_a_set(kinds, places, sure, expected):
    (found,) = set_precision(objects(kinds, places, sure), TRUTH, (0.25,))
    assert found == pytest.approx(expected)


def test_predictions_of_all_images_are_ranked_together_and_padding_is_no_object():
    truth = objects([[[0], [0]], [[0], [0]]], [[[0.0], [0.0]], [[0.0], [0.0]]], [[1, 0], [1, 0]])
    found = objects([[[0], [1]], [[0], [1]]], [[[0.0], [0.0]], [[0.0], [0.0]]], [[0.9, 0.8], [0.7, 0.1]])
    # right, wrong, right, wrong of two objects
    assert set_precision(found, truth).tolist() == pytest.approx([(1 + 2 / 3) / 2])


def test_each_distance_has_its_own_and_the_least_is_below():
    found = objects([[[0, 1], [1, 1]]], [[[0.0, 0.3], [1.0, 0.0]]], [[0.9, 0.8]])
    assert set_precision(found, TRUTH, (np.inf, 0.5, 0.3)).tolist() == pytest.approx([1.0, 1.0, 0.25])


def test_the_nearest_alone_is_tried():
    """As in the official code: what lies nearest was found before, and the other one like it is not asked."""
    truth = objects([[[0], [0]]], [[[0.0], [1.0]]], [[1, 1]])
    found = objects([[[0], [0]]], [[[0.1], [0.2]]], [[0.9, 0.8]])
    assert set_precision(found, truth).tolist() == pytest.approx([0.5])


def test_without_objects_there_is_no_precision():
    nothing = ObjectSet(TRUTH.kinds, TRUTH.places, np.zeros((1, 2)))
    assert np.isnan(set_precision(TRUTH, nothing)).all()


def test_sets_of_other_kinds_are_refused():
    other = objects([[[0], [1]]], [[[0.0, 0.0], [1.0, 0.0]]], [[1, 1]])
    with pytest.raises(UsageError, match="do not match the shapes"):
        set_precision(other, TRUTH)
    with pytest.raises(UsageError, match="do not match the shapes"):
        set_precision(ObjectSet(TRUTH.kinds, TRUTH.places, np.zeros((1, 3))), TRUTH)


def official(found: ObjectSet, truth: ObjectSet, distance: float) -> float:
    """``average_precision_clevr`` step by step."""
    slots = found.present.shape[1]
    order = np.argsort(-found.present.ravel(), kind="stable")
    taken: set[tuple[int, int]] = set()
    right = []
    for flat in order:
        image, slot = divmod(int(flat), slots)
        best, near = None, np.inf
        for row in range(truth.present.shape[1]):
            alike = (truth.kinds[image, row] == found.kinds[image, slot]).all() and truth.present[image, row]
            away = float(np.linalg.norm(truth.places[image, row] - found.places[image, slot]))
            if alike and away < near:
                best, near = row, away
        hit = best is not None and near < distance and (image, best) not in taken
        right.append(hit)
        if hit:
            taken.add((image, best))
    hits = np.cumsum(right)
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / truth.present.sum()
    envelope = [max(precision[place:]) for place in range(len(precision))]
    steps = np.diff(np.concatenate([[0.0], recall]))
    return float(sum(step * best for step, best in zip(steps, envelope, strict=True)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("distance", [np.inf, 0.7])
def test_it_is_the_official_loop(seed, distance):
    rng = np.random.default_rng(seed)
    truth = ObjectSet(rng.integers(0, 2, (5, 4, 2)), rng.random((5, 4, 3)), rng.integers(0, 2, (5, 4)))
    found = ObjectSet(rng.integers(0, 2, (5, 6, 2)), rng.random((5, 6, 3)), rng.permutation(30).reshape(5, 6) / 30)
    (precision,) = set_precision(found, truth, (distance,))
    assert precision == pytest.approx(official(found, truth, distance))
    assert 0 < precision < 1
