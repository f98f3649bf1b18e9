"""Scores of classifiers against scikit-learn and plain slow versions, ties and weights included."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from evalsuite.errors import DataError, UsageError
from evalsuite.metrics import ranking
from evalsuite.statistics import resample_weights


def draw(seed: int, n: int = 60, levels: int = 0):
    """Random scores and binary targets; ``levels`` distinct scores, so that there are ties (0: no ties)."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=n) if not levels else rng.integers(0, levels, n).astype(float)
    targets = rng.integers(0, 2, n)
    targets[:2] = 0, 1
    return scores, targets


def replicates_by_hand(metric, weights):
    """What a weighted metric must equal: the plain metric of the samples written out as often as they were drawn."""
    return np.array([metric(np.repeat(np.arange(weights.shape[1]), row)) for row in weights])


@pytest.mark.parametrize("levels", [0, 2, 7])
@pytest.mark.parametrize("seed", range(4))
def test_auroc_and_average_precision_equal_scikit_learn(seed, levels):
    scores, targets = draw(seed, levels=levels)
    assert ranking.auroc(scores, targets) == pytest.approx(sk.roc_auc_score(targets, scores), abs=1e-12)
    assert ranking.average_precision(scores, targets) == pytest.approx(
        sk.average_precision_score(targets, scores), abs=1e-12
    )


@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_auroc_is_the_share_of_pairs_in_order(seed, n, levels):
    scores, targets = draw(seed, n, levels)
    pairs = [(a > b) + (a == b) / 2 for a in scores[targets == 1] for b in scores[targets == 0]]
    assert ranking.auroc(scores, targets) == pytest.approx(np.mean(pairs), abs=1e-12)


@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_eleven_points_are_the_best_precision_at_each_recall_or_more(seed, n, levels):
    scores, targets = draw(seed, n, levels)
    curve = []
    for threshold in np.unique(scores):
        above = scores >= threshold
        curve.append((int(targets[above].sum()), targets[above].mean()))
    total = int(targets.sum())
    best = [max(p for hits, p in curve if 10 * hits >= tenth * total) for tenth in range(11)]
    assert ranking.average_precision(scores, targets, curve="11point") == pytest.approx(np.mean(best), abs=1e-12)
    weights = resample_weights(n, 5, seed)
    found = ranking.average_precision(scores, targets, weights, curve="11point")
    expected = [
        ranking.average_precision(scores[rows], targets[rows], curve="11point")
        for rows in (np.repeat(np.arange(n), row) for row in weights)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_envelope_is_the_area_under_the_best_precision_to_the_right(seed, n, levels):
    scores, targets = draw(seed, n, levels)
    points = []
    for threshold in np.unique(scores):
        above = scores >= threshold
        points.append((targets[above].sum() / targets.sum(), targets[above].mean()))
    grid = sorted({0.0, *(recall for recall, _ in points)})
    area = sum(
        (right - left) * max(p for recall, p in points if recall >= right) for left, right in itertools.pairwise(grid)
    )
    assert ranking.average_precision(scores, targets, curve="envelope") == pytest.approx(area, abs=1e-12)


def test_envelope_reproduces_the_official_voc_value():
    """seeds: the VOC SVM protocol's get_precision_recall and calculate_ap, executed on these targets."""
    scores, targets = np.sin(0.37 * np.arange(10) + 0.11), np.array([1, 0, 1, 1, 0, 0, 1, 0, -1, 0])
    known = targets >= 0
    assert ranking.average_precision(scores[known], targets[known], curve="envelope") == pytest.approx(0.575)
    assert ranking.per_label("envelope", scores[:, None], targets[:, None])[0] == pytest.approx(0.575)


@pytest.mark.parametrize("metric", ["auroc", "step", "envelope"])
@pytest.mark.parametrize("levels", [0, 4])
def test_weights_are_repeated_samples(metric, levels):
    scores, targets = draw(3, 40, levels)
    weights = resample_weights(40, 20, seed=1)
    found = ranking.per_label(metric, scores[:, None], targets[:, None], weights)[:, 0]
    by_hand = replicates_by_hand(lambda i: ranking.per_label(metric, scores[i, None], targets[i, None])[0], weights)
    np.testing.assert_allclose(found, by_hand, atol=1e-12)


def test_a_ranking_without_a_class_is_undefined():
    scores = np.array([0.1, 0.2])
    assert math.isnan(ranking.auroc(scores, [1, 1]))
    assert math.isnan(ranking.auroc(scores, [0, 0]))
    assert math.isnan(ranking.average_precision(scores, [0, 0]))
    assert ranking.average_precision(scores, [1, 1]) == 1
    # A replicate may lack a class that the sample has.
    found = ranking.auroc([0.1, 0.2, 0.3], [0, 1, 1], [[1, 1, 1], [0, 2, 1]])
    assert found[0] == 1
    assert math.isnan(found[1])


def test_labels_leave_unknown_samples_and_absent_labels_out():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(50, 4)), rng.integers(0, 2, (50, 4)).astype(float)
    targets[::5, 0], targets[1::5, 1], targets[:, 3] = -1, np.nan, 0
    found = ranking.per_label("auroc", scores, targets)
    for label in range(3):
        known = targets[:, label] >= 0
        assert found[label] == pytest.approx(sk.roc_auc_score(targets[known, label], scores[known, label]))
    assert math.isnan(found[3])
    assert ranking.macro(found) == pytest.approx(found[:3].mean())
    with pytest.raises(DataError, match="1 of 4 labels cannot be scored"):
        ranking.macro(found, absent="refuse")
    assert math.isnan(ranking.macro(np.full(3, np.nan)))
    weighted = ranking.per_label("auroc", scores, targets, np.ones((2, 50), int))
    np.testing.assert_allclose(weighted, [found, found])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_equals_scikit_learn_without_ties(k):
    rng = np.random.default_rng(k)
    scores, labels = rng.normal(size=(200, 6)), rng.integers(0, 6, 200)
    expected = sk.top_k_accuracy_score(labels, scores, k=k, labels=range(6))
    assert ranking.top_k_hits(scores, labels, k).mean() == pytest.approx(expected)


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_top_k_breaks_ties_by_index_as_argmax_does(seed, k):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 3, (20, 4)), rng.integers(0, 4, 20)
    slow = [
        label in sorted(range(4), key=lambda c: (-row[c], c))[:k] for row, label in zip(scores, labels, strict=True)
    ]
    assert ranking.top_k_hits(scores, labels, k).tolist() == slow
    assert (ranking.top_k_hits(scores, labels, 1) == (scores.argmax(1) == labels)).all()


def test_a_constant_classifier_gets_no_more_than_its_class():
    labels = np.arange(100) % 10
    assert ranking.top_k_hits(np.zeros((100, 10)), labels, 1).mean() == pytest.approx(0.1)


def test_class_accuracies_equal_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, 80), rng.integers(0, 4, 80)
    hits = labels == predictions
    expected = sk.recall_score(labels, predictions, average=None, labels=range(4))
    np.testing.assert_allclose(ranking.class_accuracy(hits, labels, 4), expected)
    assert ranking.balanced_accuracy(hits, labels, 4) == pytest.approx(sk.balanced_accuracy_score(labels, predictions))
    absent = ranking.class_accuracy(hits, labels, 5)
    assert math.isnan(absent[4])
    assert ranking.balanced_accuracy(hits, labels, 5) == pytest.approx(sk.balanced_accuracy_score(labels, predictions))
    weights = resample_weights(80, 10, seed=0)
    by_hand = replicates_by_hand(lambda i: sk.balanced_accuracy_score(labels[i], predictions[i]), weights)
    np.testing.assert_allclose(ranking.balanced_accuracy(hits, labels, 4, weights), by_hand)


def slow_calibration_error(probabilities, labels, bins):
    error = 0.0
    for low in range(bins):
        inside = [
            (p.max(), p.argmax() == label)
            for p, label in zip(probabilities, labels, strict=True)
            if low / bins < p.max() <= (low + 1) / bins
        ]
        if inside:
            confidence, hit = np.mean(inside, axis=0)
            error += abs(confidence - hit) * len(inside) / len(labels)
    return error


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_equals_the_slow_version(bins):
    rng = np.random.default_rng(bins)
    probabilities = rng.dirichlet(np.ones(4), 300)
    labels = rng.integers(0, 4, 300)
    found = ranking.calibration_error(probabilities, labels, bins=bins)
    assert found == pytest.approx(slow_calibration_error(probabilities, labels, bins), abs=1e-12)
    weights = resample_weights(300, 5, seed=0)
    by_hand = replicates_by_hand(lambda i: slow_calibration_error(probabilities[i], labels[i], bins), weights)
    np.testing.assert_allclose(ranking.calibration_error(probabilities, labels, weights, bins=bins), by_hand)


def test_calibration_error_by_hand():
    # Confidence 0.8 with one of two right: |0.8 - 0.5|. As probabilities of the positive class as well.
    assert ranking.calibration_error([[0.8, 0.2], [0.2, 0.8]], [0, 0]) == pytest.approx(0.3)
    assert ranking.calibration_error([0.2, 0.8], [0, 0]) == pytest.approx(0.3)
    assert ranking.calibration_error([[1.0, 0.0]], [0]) == 0
    with pytest.raises(UsageError, match="no probabilities"):
        ranking.calibration_error([[2.0, -1.0]], [0])


def test_precision_recall_equals_scikit_learn():
    scores, targets = draw(5, 50, 8)
    precision, recall, thresholds = ranking.precision_recall(scores, targets)
    p, r, t = sk.precision_recall_curve(targets, scores)
    np.testing.assert_allclose(precision[::-1], p[:-1])
    np.testing.assert_allclose(recall[::-1], r[:-1])
    np.testing.assert_allclose(thresholds[::-1], t)


def test_nonsense_is_refused():
    with pytest.raises(UsageError):
        ranking.auroc([0.1, math.nan], [0, 1])
    with pytest.raises(UsageError):
        ranking.auroc([0.1, 0.2], [0, 2])
    with pytest.raises(UsageError):
        ranking.top_k_hits(np.zeros((3, 2)), [0, 1, 0], 3)
    with pytest.raises(UsageError):
        ranking.per_label("auroc", np.zeros((3, 2)), np.zeros((3, 3)))
