"""Probes against scikit-learn, torch's own optimizer and official values; and that nothing is chosen on test."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.linear_model import Ridge as SkRidge
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import NearestNeighbors as SkNeighbors
from sklearn.svm import LinearSVC

from evalsuite import probes
from evalsuite.errors import DataError, UsageError
from evalsuite.metrics.ranking import top_k_hits
from evalsuite.probes import Part, Predictions, Rows, Runtime, Train, logistic
from evalsuite.probes import rows as rows_module
from evalsuite.probes.neighbours import _highest
from evalsuite.probes.rows import free_memory, normaliser


def formula(shape, a, b):
    """The recipe of the golden values: sin(a i + b) over the flat index."""
    return np.sin(a * np.arange(math.prod(shape)) + b).reshape(shape)


def world(samples=300, width=12, classes=4, seed=0, noise=1.0, scale=1.0):
    """Gaussian classes: features float32, labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.integers(0, classes, samples)
    features = centres[labels] + noise * rng.normal(size=(samples, width)) + 1.5
    return (scale * features).astype(np.float32), labels


def part(features, labels, classes=None, groups=None):
    found = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    return Part(Rows(features), labels, groups, classes or found)


def fit(probe, train, points, grid=None, **runtime):
    rows = points if isinstance(points, Rows) else Rows(points)
    return list(probe.fit(train, rows, grid or probe.settings(len(train.rows)), Runtime(**runtime)))


# --- nearest neighbours


def test_knn_reproduces_dino():
    """The official knn_classifier, executed on these features."""
    train = formula((200, 8), 0.37, 0.11).astype(np.float32)
    test = formula((100, 8), 0.53, 0.7).astype(np.float32)
    probe = probes.NearestNeighbours(ks=(20,), temperatures=(0.07,))
    (found,) = fit(probe, part(train, np.arange(200) % 10), test)
    assert top_k_hits(found.scores, np.arange(100) % 10, 1).mean() == pytest.approx(0.09)
    assert top_k_hits(found.scores, np.arange(100) % 10, 5).mean() == pytest.approx(0.47)
    np.testing.assert_allclose(found.scores.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(7, 33), (64, 4096), (64, 1000)])
def test_neighbours_equal_scikit_learn(rows, columns):
    rng = np.random.default_rng(0)
    bank, points = rng.normal(size=(1500, 16)).astype(np.float32), rng.normal(size=(50, 16)).astype(np.float32)
    similarity, index = probes.neighbours(Rows(bank), Rows(points), 9, rows=rows, columns=columns)
    distance, expected = SkNeighbors(n_neighbors=9, metric="cosine").fit(bank).kneighbors(points)
    assert (index.numpy() == expected).all()
    np.testing.assert_allclose(similarity.numpy(), 1 - distance, atol=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 12), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_the_lower_place_comes_first_among_equals_whatever_the_chunks(seed, n, k, columns):
    rng = np.random.default_rng(seed)
    corners = np.eye(3, dtype=np.float32)  # cosines are exactly 0 or 1: ties everywhere
    bank, points = corners[rng.integers(0, 3, n)], corners[rng.integers(0, 3, 4)]
    similarity, index = probes.neighbours(Rows(bank), Rows(points), k, columns=columns)
    for i, point in enumerate(points):
        exact = bank @ point
        order = sorted(range(n), key=lambda j: (-exact[j], j))[:k]
        assert index[i].tolist() == order
        assert similarity[i].tolist() == exact[order].tolist()


def test_blocks_give_what_topk_gives():
    similarity = torch.randn(20, 1003)
    values, places = _highest(similarity, 5)  # blocks, and a rest of 11
    expected = similarity.topk(5)
    assert torch.equal(values, expected.values)
    assert torch.equal(places, expected.indices)
    tied = torch.randint(0, 3, (20, 1003)).float()
    values, places = _highest(tied, 5)
    order = tied.sort(dim=1, descending=True, stable=True)
    assert torch.equal(places, order.indices[:, :5])


def test_knn_votes_by_hand():
    bank = np.array([[1, 0], [1, 0.1], [0, 1]], dtype=np.float32)
    probe = probes.NearestNeighbours(ks=(3, 1), temperatures=(0.1, 1.0))
    found = fit(probe, part(bank, np.array([0, 1, 1])), np.array([[2, 0]], dtype=np.float32))
    assert probe.settings(3) == [
        {"k": 3, "temperature": 1.0}, {"k": 3, "temperature": 0.1},
        {"k": 1, "temperature": 1.0}, {"k": 1, "temperature": 0.1},
    ]  # fmt: skip
    cosines = np.array([1, 1 / math.sqrt(1.01), 0])
    for i, temperature in enumerate((1.0, 0.1)):
        weights = np.exp(cosines / temperature)
        assert found[i].scores[0, 0] == pytest.approx(weights[0] / weights.sum(), rel=1e-5)
    assert found[2].scores.tolist() == [[1, 0]]


def test_knn_of_several_labels_asks_those_who_know():
    bank = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=np.float32)
    labels = np.array([[1, 0], [0, -1], [-1, -1], [1, 1]])
    (found,) = fit(probes.NearestNeighbours(ks=(3,)), part(bank, labels), np.array([[1, 0]], dtype=np.float32))
    np.testing.assert_allclose(found.scores, [[0.5, 0]], atol=1e-6)


def test_more_neighbours_than_samples_are_left_out_or_refused():
    assert [s["k"] for s in probes.NearestNeighbours().settings(50)] == [20, 10]
    with pytest.raises(DataError, match="5 training samples have no 10 neighbours"):
        probes.NearestNeighbours().settings(5)


def test_prototypes_reproduce_obow():
    """The official few-shot scores, executed on these features."""
    train, test = formula((6, 5), 0.37, 0.11), formula((4, 5), 0.53, 0.7)
    (found,) = fit(probes.Prototypes(), part(train, np.array([0, 1, 2, 0, 1, 2])), test)
    expected = [
        [4.78147113, 9.15637614, -8.64486576], [-7.86393946, -6.8842406, 9.84765279],
        [9.72825095, 3.12301726, -9.29902966], [-9.45323781, 2.06587271, 6.30939633],
    ]  # fmt: skip
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)


# --- logistic and ridge regression


def objective(coefficients, intercept, features, labels, cost):
    """scikit-learn's, in float64."""
    logits = features.astype(np.float64) @ coefficients.T + intercept
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], 1)
    losses = np.logaddexp.reduce(logits, axis=1) - np.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return cost * losses.sum() + (coefficients**2).sum() / 2


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("shape", [(300, 12), (40, 60)])
def test_logistic_equals_scikit_learn(classes, shape):
    features, labels = world(*shape, classes)
    points = world(50, shape[1], classes, seed=1)[0]
    costs = (1e-3, 1e-1, 10.0)
    probe = probes.Logistic(costs, tolerance=1e-8, dtype="float64")
    found = fit(probe, part(features, labels), points)
    for cost, one in zip(costs, found, strict=True):
        model = LogisticRegression(C=cost, tol=1e-10, max_iter=20_000).fit(features.astype(np.float64), labels)
        expected = model.decision_function(points.astype(np.float64))
        if classes == 2:
            assert (one.scores[:, 0] == 0).all()
            np.testing.assert_allclose(one.scores[:, 1], expected, atol=2e-5 * max(1, np.abs(expected).max()))
        else:  # softmax has no place of its own for a constant
            centred = expected - expected.mean(1, keepdims=True)
            ours = one.scores - one.scores.mean(1, keepdims=True)
            np.testing.assert_allclose(ours, centred, atol=2e-5 * max(1, np.abs(centred).max()))
        value = objective(model.coef_, model.intercept_, features, labels, cost)
        assert one.details["objective"] == pytest.approx(value, rel=1e-8)
        assert not one.warnings


def test_logistic_in_single_precision_is_as_good_as_scikit_learn():
    features, labels = world(500, 20, 5, noise=2.0, scale=3.0)
    found = fit(probes.Logistic(tuple(np.logspace(-4, 3, 8))), part(features, labels), features)
    for setting, one in zip(np.logspace(-4, 3, 8), found, strict=True):
        model = LogisticRegression(C=setting, max_iter=2000).fit(features, labels)
        value = objective(model.coef_.astype(float), model.intercept_.astype(float), features, labels, setting)
        assert one.details["objective"] <= value * (1 + 1e-4)
        assert not one.warnings


def test_many_labels_are_one_logistic_regression_each():
    features, _ = world(200, 8)
    rng = np.random.default_rng(1)
    labels = np.stack([features[:, 0] + rng.normal(size=200) > 1.5, rng.random(200) < 0.1], axis=1).astype(int)
    labels[::7, 0] = -1
    (found,) = fit(probes.Logistic((0.3,), tolerance=1e-9, dtype="float64"), part(features, labels), features)
    for label in range(2):
        known = labels[:, label] >= 0
        model = LogisticRegression(C=0.3, tol=1e-10, max_iter=5000)
        model.fit(features[known].astype(np.float64), labels[known, label])
        np.testing.assert_allclose(found.scores[:, label], model.decision_function(features), atol=1e-4)


def test_the_path_in_parts_ends_where_one_batch_does_and_sooner():
    features, labels = world()
    costs = tuple(np.logspace(-3, 1, 12))
    one = fit(probes.Logistic(costs, tolerance=1e-6, dtype="float64"), part(features, labels), features)
    many = fit(probes.Logistic(costs, tolerance=1e-6, dtype="float64", together=1), part(features, labels), features)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, atol=5e-3)
    cold = sum(f.details["evaluations"] for f in one)
    assert sum(f.details["evaluations"] for f in many) < cold  # each began where the one before ended


def test_a_class_without_training_samples_scores_minus_infinity():
    features, labels = world(classes=3)
    labels[labels == 1] = 2
    (found,) = fit(probes.Logistic((1.0,)), part(features, labels, classes=4), features)
    assert np.isneginf(found.scores[:, [1, 3]]).all()
    assert np.isfinite(found.scores[:, [0, 2]]).all()
    with pytest.raises(DataError, match="a single class"):
        fit(probes.Logistic((1.0,)), part(features, np.zeros(300, int), classes=2), features)


def test_streaming_changes_nothing(monkeypatch):
    features, labels = world()
    probe = probes.Logistic((0.1, 10.0), tolerance=1e-8, dtype="float64", together=2)
    resident = fit(probe, part(features, labels), features)
    for module in (rows_module, logistic):
        monkeypatch.setattr(module, "free_memory", lambda device: 0)
    monkeypatch.setattr(Rows.chunks, "__defaults__", ("cpu", 64))
    streamed = fit(probe, part(features, labels), features)
    for a, b in zip(resident, streamed, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)


def test_a_fit_that_does_not_end_says_so():
    features, labels = world()
    (found,) = fit(probes.Logistic((10.0,), max_evaluations=3), part(features, labels), features)
    assert "C=10 stopped at a gradient of" in found.warnings[0]


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_lbfgs_finds_the_minima_of_quadratics_each_at_its_own_pace(seed):
    torch.manual_seed(seed)
    factors = torch.randn(5, 8, 8, dtype=torch.float64)
    hessians = factors @ factors.mT + 0.1 * torch.eye(8)
    hessians *= torch.tensor([1e-3, 1.0, 1e3, 1.0, 10.0]).view(-1, 1, 1)
    minima = torch.randn(5, 8, dtype=torch.float64)

    def function(x, which):
        slope = torch.einsum("gij,gj->gi", hessians[which], x - minima[which])
        return ((x - minima[which]) * slope).sum(1) / 2, slope

    found = probes.minimise(
        function, torch.zeros(5, 8, dtype=torch.float64), lambda v, which: v, tolerance=1e-8, max_evaluations=500
    )
    assert found.converged.all()
    slope = function(found.x, torch.arange(5))[1].norm(dim=1)
    assert (slope <= 1e-8).all()


@pytest.mark.parametrize("shape", [(200, 10), (20, 50)])
def test_ridge_equals_scikit_learn(shape):
    features, labels = world(*shape, 3)
    points = world(30, shape[1], 3, seed=5)[0]
    probe = probes.Ridge((1e-2, 1.0, 100.0))
    assert [s["alpha"] for s in probe.settings(10)] == [100.0, 1.0, 1e-2]
    for setting, found in zip(probe.settings(10), fit(probe, part(features, labels), points), strict=True):
        signs = np.eye(3)[labels] * 2 - 1
        model = SkRidge(alpha=setting["alpha"], solver="svd").fit(features.astype(np.float64), signs)
        np.testing.assert_allclose(found.scores, model.predict(points.astype(np.float64)), atol=1e-4)
        classifier = RidgeClassifier(alpha=setting["alpha"]).fit(features.astype(np.float64), labels)
        assert (found.scores.argmax(1) == classifier.predict(points)).all()


# --- SGD


@pytest.mark.parametrize("softmax", [True, False])
def test_every_head_is_torchs_sgd(softmax):
    torch.manual_seed(0)
    lrs, decays = [0.1, 0.5, 0.1], [0.0, 1e-2, 1e-1]
    heads = probes.LinearHeads(6, 3, lrs, decays, seed=3)
    first = heads.weight[:, 0].clone()
    batches = [(torch.randn(8, 6), torch.eye(3)[torch.randint(0, 3, (8,))]) for _ in range(6)]
    losses = [
        heads.step(x, y, rate, softmax=softmax) for (x, y), rate in zip(batches, (1, 1, 1, 0.1, 0.1, 0.1), strict=True)
    ]
    for head, (lr, decay) in enumerate(zip(lrs, decays, strict=True)):
        linear = torch.nn.Linear(6, 3)
        linear.weight.data, linear.bias.data = first.T.clone(), torch.zeros(3)
        optimizer = torch.optim.SGD(linear.parameters(), lr, momentum=0.9, weight_decay=decay)
        criterion = torch.nn.CrossEntropyLoss() if softmax else torch.nn.BCEWithLogitsLoss()
        for step, (x, y) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = lr * (1 if step < 3 else 0.1)
            loss = criterion(linear(x), y)
            torch.testing.assert_close(losses[step][head], loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(heads.weight[:, head].T, linear.weight.data)
        torch.testing.assert_close(heads.bias[head], linear.bias.data)


def test_the_rate_falls_along_a_cosine():
    rates = [probes.SgdHeads((1.0,), epochs=100).rate(e) for e in (0, 0.5, 50, 99.5)]
    assert rates == pytest.approx([1, (1 + math.cos(0.005 * math.pi)) / 2, 0.5, (1 + math.cos(0.995 * math.pi)) / 2])


def test_many_heads_are_the_same_as_one_at_a_time():
    features, labels = world()
    probe = probes.SgdHeads((0.01, 1.0), (0.0, 1e-3), epochs=3, batch_size=32)
    grid = probe.settings(300)
    assert grid[0] == {"lr": 0.01, "weight_decay": 1e-3}
    together = fit(probe, part(features, labels), features, grid)
    for setting, one in zip(grid, together, strict=True):
        (alone,) = fit(probe, part(features, labels), features, [setting])
        np.testing.assert_allclose(alone.scores, one.scores, rtol=1e-4, atol=1e-4)
    assert top_k_hits(together[-1].scores, labels).mean() > 0.8


def test_unknown_labels_pull_no_head():
    heads = probes.LinearHeads(4, 2, [1.0], [0.0])
    before = heads.weight.clone()
    targets = torch.tensor([[math.nan, 1.0], [math.nan, 0.0]])
    heads.step(torch.randn(2, 4), targets, softmax=False)
    assert torch.equal(heads.weight[..., 0], before[..., 0])
    assert not torch.equal(heads.weight[..., 1], before[..., 1])


# --- SVM


def multilabel(seed=0, samples=120, labels=3):
    features, _ = world(samples, 6, seed=seed)
    rng = np.random.default_rng(seed)
    targets = (features[:, :labels] + rng.normal(size=(samples, labels)) > 1.8).astype(int)
    return features, targets


def test_svm_is_the_voc07_protocol():
    features, targets = multilabel()
    targets[::11, 0] = -1
    costs = (0.01, 0.1, 1.0)
    (found,) = fit(probes.LinearSVM(costs, max_iterations=20_000), part(features, targets), features)
    for label in range(3):
        y = np.where(targets[:, label] == 1, 1, -1)  # the official code trains on unknown as negative

        def machine(cost):
            return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=20_000, random_state=0)

        means = [cross_val_score(machine(c), features, y, cv=3, scoring="average_precision").mean() for c in costs]
        best = costs[int(np.argmax(means))]
        assert found.details["C"][label] == best
        expected = machine(best).fit(features, y).decision_function(features)
        np.testing.assert_allclose(found.scores[:, label], expected, rtol=1e-5, atol=1e-6)


def test_svm_can_drop_unknown_labels_and_survives_absent_ones():
    features, targets = multilabel()
    targets[::3, 0] = -1
    targets[:, 1] = 0
    targets[:, 2] = 0
    targets[5, 2] = 1  # a single positive: nothing to cross-validate
    (found,) = fit(
        probes.LinearSVM((0.1, 1.0, 10.0), unknown="drop", max_iterations=20_000),
        part(features, targets),
        features,
    )
    assert found.details["C"][1] is None
    assert np.isneginf(found.scores[:, 1]).all()
    assert found.details["C"][2] == 1.0
    known = targets[:, 0] >= 0
    y = np.where(targets[known, 0] == 1, 1, -1)
    machine = LinearSVC(C=found.details["C"][0], class_weight={1: 2, -1: 1}, dual=True, max_iter=20_000, random_state=0)
    np.testing.assert_allclose(
        found.scores[:, 0], machine.fit(features[known], y).decision_function(features), rtol=1e-5
    )


def test_svm_tells_of_edges_and_of_stopping_early():
    features, targets = multilabel()
    (found,) = fit(probes.LinearSVM((1e-5, 1e-4), max_iterations=1), part(features * 100, targets), features)
    assert any("costs are at the edge of 1e-05 to 0.0001" in line for line in found.warnings)
    assert any("fits stopped at the limit of iterations" in line for line in found.warnings)


def test_svm_keeps_groups_together_in_its_folds():
    features, targets = multilabel(samples=60)
    doubled, twice = np.repeat(features, 2, axis=0), np.repeat(targets, 2, axis=0)
    groups = np.repeat(np.arange(60), 2)
    (found,) = fit(probes.LinearSVM((0.01, 1.0)), part(doubled, twice, groups=groups), features)
    assert np.isfinite(found.scores).all()


def test_low_shot_machines_are_fitted_on_their_own_samples():
    features, targets = multilabel()
    svm, train = probes.LinearSVM((1.0,), max_iterations=20_000), probes.Train({"f": features}, targets)
    found = list(probes.few_shots(svm, train, features, (4, 6), 2))
    assert [(k, draw) for k, draw, _ in found] == [(4, 0), (4, 1), (6, 0), (6, 1)]
    for k, draw, scores in found:
        for label, places in enumerate(probes.draw_low_shot(targets, k, draw, seed=0)):
            y = np.where(targets[places, label] == 1, 1, -1)
            machine = LinearSVC(C=1.0, class_weight={1: 2, -1: 1}, dual=True, max_iter=20_000, random_state=0)
            expected = machine.fit(features[places], y).decision_function(features)
            np.testing.assert_allclose(scores[:, label], expected, rtol=1e-5, atol=1e-6)
    assert average_precision_score(targets[:, 0], found[0][2][:, 0]) > targets[:, 0].mean()


def test_few_shot_heads_are_fitted_on_each_draw():
    features, labels = multilabel()[0], np.repeat([0, 1, 2], [40, 40, 40])
    train = probes.Train({"f": features[:120]}, labels, classes=4)
    head = probes.Logistic((1.0,))
    for k, draw, scores in probes.few_shots(head, train, features[:30], (2, 8), 3, normalise="standard"):
        places = probes.draw_shots(labels, k, draw, seed=0)
        mean, spread = features[places].mean(0), features[places].std(0)
        (alone,) = fit(
            head, part((features[places] - mean) / spread, labels[places], classes=4), (features[:30] - mean) / spread
        )
        np.testing.assert_allclose(scores, alone.scores, atol=2e-3)
        assert np.isneginf(scores[:, 3]).all()


# --- draws


@given(st.integers(0, 1000), st.sampled_from([0.1, 0.25, 0.5]))
@settings(deadline=None, max_examples=40)
def test_hold_out_is_stratified_and_whole(seed, fraction):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 80)
    labels[0] = 9  # a class of one stays with the fit
    fitted, held = probes.hold_out(labels, fraction, seed)
    assert sorted([*fitted, *held]) == list(range(80))
    assert 0 in fitted
    for label in range(4):
        count = (labels == label).sum()
        assert (labels[held] == label).sum() == max(1, round(fraction * count))
    again = probes.hold_out(labels, fraction, seed)
    assert (again[1] == held).all()


@given(st.integers(0, 1000), st.booleans())
@settings(deadline=None, max_examples=40)
def test_no_group_is_on_both_sides(seed, several):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (200, 3)) if several else rng.integers(0, 3, 200)
    groups = np.array([f"p{g}" for g in rng.integers(0, 60, 200)])
    fitted, held = probes.hold_out(labels, 0.2, seed, groups)
    assert not set(groups[fitted]) & set(groups[held])
    assert 20 <= len(held) <= 60
    if not several:
        shares = np.bincount(labels[held], minlength=3) / np.bincount(labels, minlength=3)
        assert (np.abs(shares - 0.2) < 0.12).all()


def test_no_validation_part_of_single_samples():
    with pytest.raises(DataError, match="every class has a single sample"):
        probes.hold_out(np.arange(5), 0.1, 0)
    with pytest.raises(DataError, match="a single group"):
        probes.hold_out(np.zeros(5, int), 0.1, 0, np.zeros(5))
    with pytest.raises(UsageError):
        probes.hold_out(np.arange(5), 1.0, 0)


def test_fractions_are_stratified_nested_and_keep_groups_whole():
    labels = np.repeat([0, 1, 2], [100, 40, 5])
    small, large = probes.draw_fraction(labels, 0.1, 0), probes.draw_fraction(labels, 0.5, 0)
    assert np.bincount(labels[small]).tolist() == [10, 4, 1]
    assert set(small) <= set(large)
    assert (probes.draw_fraction(labels, 1.0, 0) == np.arange(145)).all()
    groups = np.arange(145) // 5
    drawn = probes.draw_fraction(labels, 0.2, 0, groups)
    assert len(drawn) == 30
    assert not set(groups[drawn]) & set(groups[np.setdiff1d(np.arange(145), drawn)])


def test_shots_are_k_of_each_class():
    labels = np.repeat([0, 1, 3], 6)
    sets = [probes.draw_shots(labels, 4, draw, seed=1) for draw in range(5)]
    assert all(np.bincount(labels[s]).tolist() == [4, 4, 0, 4] for s in sets)
    assert len({tuple(s) for s in sets}) == 5
    with pytest.raises(DataError, match="class 0 has 6 training samples, fewer than 7"):
        probes.draw_shots(labels, 7, 0, seed=0)


def test_low_shot_sets_hold_k_positives_and_their_share_of_negatives():
    targets = np.random.default_rng(0).integers(-1, 2, (300, 4))
    for label, places in enumerate(probes.draw_low_shot(targets, 8, 1, seed=0)):
        assert (targets[places, label] == 1).sum() == 8
        assert (targets[places, label] == 0).sum() == 24
        assert len(places) == 32


# --- selection


@dataclass(frozen=True)
class Planted:
    """A probe one of whose settings is perfect on test data alone: it knows the labels of points it has seen there."""

    answers: dict
    scale: str = "logits"

    def settings(self, samples):
        return [{"trick": trick} for trick in ("weak", "honest", "oracle")]

    def fit(self, train, points, settings, runtime):
        for setting in settings:
            rows = points.at(slice(None)).numpy()
            right = np.array([self.answers.get(row.tobytes(), -1) for row in rows])
            if setting["trick"] == "oracle":  # on validation points it knows nothing
                scores = np.where(right[:, None] == np.arange(4), 1.0, 0.0)
            else:
                weight = 1.0 if setting["trick"] == "honest" else 0.0
                (found,) = probes.Prototypes().fit(train, points, [{}], runtime)
                scores = weight * found.scores
            yield Predictions(scores)


def test_a_setting_that_is_best_on_test_alone_is_not_chosen():
    train_x, train_y = world(300, noise=2.0)
    test_x, test_y = world(100, noise=2.0, seed=7)
    probe = Planted({row.tobytes(): label for row, label in zip(test_x, test_y, strict=True)})
    (oracle,) = fit(probe, part(train_x, train_y), test_x, [{"trick": "oracle"}])
    assert probes.accuracy(oracle.scores, test_y) == 1  # selecting on test would take it
    found = probes.evaluate(probe, Train({"f": train_x}, train_y), {"f": test_x})
    assert found.choice.setting == {"trick": "honest"}
    assert probes.accuracy(found.scores, test_y) < 1


def test_no_labels_of_test_rows_are_needed():
    features, labels = world(60)
    found = probes.evaluate(probes.Ridge((1.0,)), Train({"f": features}, labels), {"f": features[:7]})
    assert found.scores.shape == (7, 4)
    assert "labels" not in vars(found)
    with pytest.raises(UsageError, match="'f' of shape"):
        probes.evaluate(probes.Ridge((1.0,)), Train({"f": features}, labels), {"f": features[:, :, None]})
    with pytest.raises(UsageError, match="'tokens/whole' of shape"):
        Train({"tokens/whole": np.zeros((60, 3, 2))}, labels)


def test_the_choice_is_reported_with_everything_tried_and_the_edge_of_the_grid():
    features, labels = world(noise=3.0)
    train = Train({"layer3": features[:, :3], "layer4": features}, labels)
    choice = probes.select(probes.Logistic((1e-4, 1e-3)), train)
    assert len(choice.table) == 4
    assert choice.setting["features"] == "layer4"
    assert choice.value == max(value for _, value in choice.table)
    assert any(line.endswith("is at the edge of its grid, 0.0001 to 0.001") for line in choice.warnings)
    few, marks = world(60, noise=2.0)
    wide = probes.select(probes.Logistic((1e-6, 1e-2, 1e6)), Train({"f": few}, marks))
    assert wide.setting == {"C": 1e-2}
    assert wide.warnings == ("chosen on 60 validation images in 5 folds, few to choose among 3 settings",)


# --- a few samples to choose by


def test_of_equally_good_settings_the_middle_one_is_taken():
    features, labels = world(noise=0.01)
    choice = probes.select(probes.Logistic((0.1, 1.0, 10.0, 100.0, 1000.0)), Train({"f": features}, labels))
    assert choice.told() == {
        "C": 10.0, "validation_score": 1.0, "validation_images": 300, "validation_folds": 5, "tied": 5
    }  # fmt: skip
    assert choice.warnings == (
        "chosen on 300 validation images in 5 folds: 5 of 5 settings are equally good, and the middle one is taken",
    )


def test_the_middle_is_that_of_the_best_ones_axis_by_axis_whatever_lies_between():
    grid = [{"lr": lr, "decay": d, "features": f} for f in ("a", "b") for lr in (1, 2, 3, 4, 5) for d in (0.0, 0.1)]
    best = {(3, 0.0), (4, 0.0), (4, 0.1), (5, 0.0)}
    table = [(s, 0.75 if (s["lr"], s["decay"]) in best else 0.5) for s in grid]
    assert probes.choose(table, 500).setting == {"lr": 4, "decay": 0.0, "features": "a"}
    assert probes.choose(table, 500).tied == 8
    gap = [({"C": c}, 1.0 if c in (1, 2, 8, 9) else 0.0) for c in (1, 2, 4, 8, 9)]
    assert probes.choose(gap, 500).setting == {"C": 2}
    assert probes.choose([({"C": 1}, 0.9), ({"C": 2}, 0.8)], 500).warnings == (
        "C=1 is at the edge of its grid, 1 to 2",
    )


def test_scores_that_differ_by_rounding_are_equal():
    """A mean of AUROCs has other last digits on other processors."""
    table = [({"C": c}, 0.9 + 1e-13 * (c % 2)) for c in (1, 2, 3, 4, 5)]
    assert probes.choose(table, 500).setting == {"C": 3}
    machines = [({"C": c}, 0.9 - 1e-13 * (c % 2)) for c in (1, 2, 3, 4, 5)]
    assert probes.choose(machines, 500).setting == {"C": 3}


@given(st.integers(0, 100), st.sampled_from([2, 3, 5]))
@settings(deadline=None, max_examples=25)
def test_folds_hold_every_sample_out_once_with_the_classes_shares(seed, folds):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([0, 1, 4, 7], [30, 20, 10, 1]))
    parts = probes.fold(labels, folds, seed)
    assert len(parts) == folds
    held = np.concatenate([held for _, held in parts])
    assert sorted(held) == np.flatnonzero(labels != 7).tolist()  # a class of one stays with every fit
    for fitted, held in parts:
        assert sorted([*fitted, *held]) == list(range(61))
        assert (np.abs(np.bincount(labels[held], minlength=5)[[0, 1, 4]] - np.array([30, 20, 10]) / folds) <= 1).all()
    again = probes.fold(labels, folds, seed)
    assert all((a[1] == b[1]).all() for a, b in zip(parts, again, strict=True))


def test_folds_keep_groups_whole():
    labels, groups = np.repeat([0, 1, 2], 20), np.repeat([f"p{i}" for i in range(20)], 3)
    for fitted, held in probes.fold(labels, 5, 0, groups):
        assert not set(groups[fitted]) & set(groups[held])
        assert len(held) in range(9, 16)
    assert len(probes.fold(labels[:9], 5, 0, groups[:9])) == 3  # three patients
    with pytest.raises(DataError, match="a single group"):
        probes.fold(labels[:3], 5, 0, groups[:3])
    with pytest.raises(DataError, match="one of each class"):  # held out, a patient leaves a single class
        probes.fold(np.repeat([0, 1], 4), 5, 0, np.repeat(["p", "q"], 4))
    uneven = np.repeat([0, 0, 0, 1], 4), np.repeat(["p", "q", "r", "s"], 4)
    assert all(len(set(uneven[0][fitted])) == 2 for fitted, _ in probes.fold(uneven[0], 5, 0, uneven[1]))


def test_there_are_no_more_folds_than_samples_of_a_class():
    assert len(probes.fold(np.repeat([0, 1, 2], 3), 5, 0)) == 3
    with pytest.raises(DataError, match="every class has a single sample"):
        probes.fold(np.arange(4), 5, 0)


def test_folds_of_several_labels_share_out_the_rarest():
    marks = np.zeros((60, 3), int)
    marks[:30, 0], marks[20:40, 1], marks[25:30, 2] = 1, 1, 1
    marks[50:, 0] = -1
    for _, held in probes.fold(marks, 5, 0):
        assert marks[held, 2].sum() == 1
        assert (marks[held, 1] == 1).sum() in (3, 4, 5)


def test_few_samples_are_all_used_to_choose_and_many_are_not():
    features, labels = world(120, noise=2.5, width=40)
    seen = []

    @dataclass(frozen=True)
    class Spy(probes.Logistic):
        def fit(self, train, points, settings, runtime):
            seen.append((len(train.rows), len(points)))
            return super().fit(train, points, settings, runtime)

    spy, train = Spy((1e-3, 1.0)), Train({"f": features}, labels)
    assert probes.select(spy, train).held == sum(held for _, held in seen) == 120
    assert [fitted + held for fitted, held in seen] == [120] * 5
    seen.clear()
    assert probes.select(spy, train, selection=probes.Selection(folds_below=120)).folds == len(seen) == 1
    seen.clear()
    found = probes.evaluate(spy, train, {"f": features}, refit=False)
    assert len(seen) == 2  # what is held out stays out of the fit that is scored: there are no folds
    assert seen[0][0] == seen[1][0] < 120
    assert found.choice.folds == 1


def test_folds_find_the_setting_that_a_tenth_of_few_images_does_not():
    """Six images cannot tell settings apart: the mean over seeds of the accuracy of what is chosen."""
    scores = {"tenth": [], "folds": []}
    for seed in range(12):
        features, labels = world(60, noise=3.0, width=100, classes=3, seed=seed)
        test = world(500, noise=3.0, width=100, classes=3, seed=seed + 100)
        for name, below in (("tenth", 0), ("folds", 1000)):
            found = probes.evaluate(
                probes.Ridge(), Train({"f": features}, labels), {"f": test[0]},
                selection=probes.Selection(folds_below=below), runtime=Runtime(seed=seed),
            )  # fmt: skip
            scores[name].append(probes.accuracy(found.scores, test[1]))
    assert np.mean(scores["folds"]) > np.mean(scores["tenth"]) + 0.02


@pytest.mark.parametrize("wrong", [{"validation": 0.0}, {"validation": 1.0}, {"folds": 1}])
def test_a_selection_that_holds_nothing_out_is_refused(wrong):
    with pytest.raises(UsageError):
        probes.Selection(**wrong)


def test_a_machine_takes_the_middle_of_equally_good_costs():
    features, labels = world(60, noise=0.01)
    (found,) = fit(probes.LinearSVM((0.01, 0.1, 1.0, 10.0, 100.0)), part(features, labels), features)
    assert found.details["C"] == [1.0] * 4
    told = "SVM: for 4 of 4 classes several costs are equally good on 60 images in 3 folds, and the middle one is taken"
    assert told in found.warnings


def test_one_setting_holds_nothing_out():
    features, labels = world()
    found = probes.evaluate(probes.NearestNeighbours(ks=(20,)), Train({"f": features}, labels), {"f": features})
    assert found.choice.value is None
    assert found.choice.setting == {"k": 20, "temperature": 0.07}
    corners, classes = {"f": np.eye(4)}, np.arange(4)  # nothing could be held out of one sample a class
    single = probes.evaluate(probes.Ridge((1.0,)), Train(corners, classes), corners)
    assert probes.accuracy(single.scores, classes) == 1


def test_a_head_that_diverges_loses_and_is_told_of():
    features, labels = world(scale=1e4)
    probe = probes.SgdHeads((1e-9, 1e30), epochs=2, batch_size=64)
    choice = probes.select(probe, Train({"f": features}, labels))
    assert choice.setting["lr"] == 1e-9
    assert "1 of 2 settings could not be scored" in choice.warnings
    with pytest.raises(DataError, match="no setting can be scored"):
        probes.select(probes.SgdHeads((1e30, 1e31), epochs=2, batch_size=64), Train({"f": features}, labels))


def test_groups_stay_on_one_side_of_the_selection():
    features, labels = world(60)
    doubled, twice, groups = np.repeat(features, 2, 0), np.repeat(labels, 2), np.repeat(np.arange(60), 2)
    seen = []

    @dataclass(frozen=True)
    class Spy(probes.Prototypes):
        def settings(self, samples):
            return [{"a": 1}, {"a": 2}]

        def fit(self, train, points, settings, runtime):
            seen.append((train.rows.at(slice(None)), points.at(slice(None))))
            return super().fit(train, points, settings, runtime)

    for below in (0, 1000):
        probes.select(Spy(), Train({"f": doubled}, twice, groups), selection=probes.Selection(folds_below=below))
    assert len(seen) == 1 + 5
    for fitted, held in seen:
        assert not {row.numpy().tobytes() for row in fitted} & {row.numpy().tobytes() for row in held}


@pytest.mark.parametrize("kind", ["l2", "l2+1e-5", "standard"])
def test_normalisation_is_learnt_from_training_rows(kind):
    features, labels = world(scale=7.0)
    features[:, 3] = 5.0  # constant
    other = world(50, seed=3, scale=2.0)[0]
    norm = normaliser(Rows(features), kind, "cpu")
    if kind == "standard":
        spread = features.std(0, dtype=np.float64)
        expected = (other - features.mean(0, dtype=np.float64)) / np.where(spread > 1e-9, spread, 1)
    else:
        expected = other / (np.linalg.norm(other, axis=1, keepdims=True) + (1e-5 if kind == "l2+1e-5" else 0))
    np.testing.assert_allclose(norm(torch.from_numpy(other)).numpy(), expected, atol=1e-4, rtol=1e-5)
    assert np.isfinite(fit(probes.Ridge((1.0,)), part(features, labels), Rows(other, norm=norm))[0].scores).all()


def test_features_on_disk_in_half_precision_are_read_as_they_are(tmp_path):
    features, labels = world()
    np.save(tmp_path / "f.npy", features.astype(np.float16))
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = probes.evaluate(
            probes.Logistic((0.1, 1.0)),
            Train({"f": mapped}, labels),
            {"f": mapped},
            normalise="standard",
        )
    assert probes.accuracy(found.scores, labels) > 0.8
    assert (mapped == features.astype(np.float16)).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "probe",
    [
        probes.NearestNeighbours(ks=(5, 10)),
        probes.Prototypes(),
        probes.Ridge((0.1, 10.0)),
        probes.Logistic((0.01, 1.0)),
        probes.SgdHeads((0.01, 0.1), epochs=2),
    ],
    ids=lambda probe: type(probe).__name__,
)
def test_a_gpu_gives_the_same_scores(probe):
    features, labels = world(400)
    here = fit(probe, part(features, labels), features)
    there = fit(probe, part(features, labels), features, device="cuda")
    for a, b in zip(here, there, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, atol=5e-3)


def test_free_memory_is_what_the_control_group_leaves(monkeypatch):
    free = free_memory(torch.device("cpu"))
    assert 0 < free < 2**50
    limits = {"memory.max": "1000\n", "memory.current": "400\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: limits[path.name])
    assert free_memory(torch.device("cpu")) == 600
    limits["memory.max"] = "max\n"
    assert free_memory(torch.device("cpu")) > 600


def test_ragged_training_data_are_refused():
    with pytest.raises(DataError, match="different lengths"):
        Train({"f": np.zeros((3, 2))}, np.zeros(4, int))
    with pytest.raises(DataError, match="1 training samples have no class"):
        Train({"f": np.zeros((3, 2))}, np.array([0, 1, -1]))
    with pytest.raises(UsageError):
        Rows(np.zeros((3, 2, 2)))


# --- numbers


def numbers(samples=120, width=6, targets=1, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(samples, width)) + 2
    weights = np.random.default_rng(5).normal(size=(width, targets))
    values = features @ weights + noise * rng.normal(size=(samples, targets)) - 7
    return features.astype(np.float32), values[:, 0] if targets == 1 else values


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("width", [6, 200])
def test_ridge_on_numbers_equals_scikit_learn(width, targets):
    features, values = numbers(width=width, targets=targets)
    train = Train({"f": features[:90]}, values[:90], kind="regression")
    for alpha in (1e-3, 1.0, 100.0):
        found = probes.evaluate(probes.Ridge((alpha,)), train, {"f": features[90:]})
        model = SkRidge(alpha=alpha).fit(features[:90].astype(np.float64), values[:90])
        expected = model.predict(features[90:].astype(np.float64)).reshape(30, targets)
        np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("below", [1000, 0])
@pytest.mark.parametrize("groups", [None, np.repeat(np.arange(30), 4)])
def test_an_alpha_is_chosen_by_a_correlation_of_ranks(below, groups):
    features, values = numbers(noise=1.0)
    outputs = {"noise": np.random.default_rng(1).normal(size=(120, 4)), "f": features}
    train = Train(outputs, values, groups, kind="regression")
    choice = probes.select(probes.Ridge((0.1, 1e6)), train, selection=probes.Selection(0.25, 3, below))
    assert choice.setting["features"] == "f"
    assert choice.held == 120 if below else abs(choice.held - 30) < 4  # whole groups, as near as may be
    assert choice.folds == (3 if below else 1)
    assert choice.value > 0.5
    worst = probes.select(probes.Ridge((0.1, 1e6)), train, lambda *given: -probes.rank_correlation(*given))
    assert worst.setting["features"] == "noise"


def test_no_row_of_a_regression_is_held_out_and_fitted_on():
    for seed in range(5):
        values = np.random.default_rng(seed).normal(size=50)
        ((fitted, held),) = probes.Selection(0.2, 3, 0).splits(values, seed, None, "regression")
        assert (len(held), sorted([*fitted, *held])) == (10, list(range(50)))


@pytest.mark.parametrize(
    "values",
    [np.array(["a"] * 9), np.full(9, np.nan), np.zeros((9, 2, 2)), np.r_[np.inf, np.zeros(8)], np.zeros(9) * 1j],
)
def test_what_is_no_number_is_refused(values):
    with pytest.raises(DataError, match="cannot be predicted"):
        Train({"f": np.zeros((9, 2))}, values, kind="regression")


@pytest.mark.parametrize(
    "probe",
    [probes.Logistic((1.0,)), probes.NearestNeighbours((3,)), probes.Prototypes(), probes.LinearSVM((1.0,)),
    probes.SgdHeads((0.1,))], ids=lambda probe: type(probe).__name__,
)  # fmt: skip
def test_heads_of_classes_refuse_numbers(probe):
    features, values = numbers()
    with pytest.raises(UsageError, match="does not predict numbers"):
        probes.evaluate(probe, Train({"f": features}, values, kind="regression"), {"f": features})


@pytest.mark.parametrize(("name", "now"), [("Fitted", Predictions), ("Site", Runtime)])
def test_older_names_warn(name, now):
    with pytest.warns(DeprecationWarning, match=f"probes.{name} is"):
        assert getattr(probes, name) is now
    with pytest.raises(AttributeError):
        probes.Nothing  # noqa: B018
