"""Regression metrics against scipy and scikit-learn, on samples and on resamples of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mean_absolute_error, r2_score

from evalsuite.errors import UsageError
from evalsuite.metrics.regression import METRICS, spearman

WITNESSES = {
    "spearman": lambda ours, theirs: stats.spearmanr(ours, theirs).statistic,
    "kendall": lambda ours, theirs: stats.kendalltau(ours, theirs).statistic,
    "r2": lambda ours, theirs: r2_score(theirs, ours),
    "mae": lambda ours, theirs: mean_absolute_error(theirs, ours),
}


@pytest.mark.parametrize("name", METRICS)
@given(st.integers(0, 10_000), st.integers(5, 30), st.sampled_from([2, 5, 0]))
@settings(deadline=None, max_examples=25)
def test_metrics_equal_their_witnesses_on_resamples(name, seed, count, levels):
    rng = np.random.default_rng(seed)
    draw = (lambda: rng.integers(0, levels, count) * 0.7) if levels else (lambda: rng.normal(size=count))
    ours, theirs = np.r_[0.0, 1.0, draw()], np.r_[1.0, 0.0, draw()]  # never all the same
    weights = np.r_["1", np.ones((3, 2), int), rng.integers(0, 4, (3, count))]
    assert METRICS[name](ours, theirs) == pytest.approx(WITNESSES[name](ours, theirs), abs=1e-12)
    rows = [np.repeat(np.arange(count + 2), times) for times in weights]
    expected = [WITNESSES[name](ours[index], theirs[index]) for index in rows]
    np.testing.assert_allclose(METRICS[name](ours, theirs, weights), expected, atol=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_several_targets_are_averaged(name):
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 20, 3))
    expected = np.mean([WITNESSES[name](ours[:, t], theirs[:, t]) for t in range(3)])
    assert METRICS[name](ours, theirs) == pytest.approx(expected)


def test_what_is_all_the_same_has_no_correlation():
    for name in ("spearman", "kendall"):
        assert np.isnan(METRICS[name](np.ones(5), np.arange(5)))
        assert np.isnan(METRICS[name](np.arange(5), np.ones(5), np.ones((2, 5)))).all()
    assert np.isnan(METRICS["r2"](np.arange(5), np.ones(5)))
    assert METRICS["r2"](np.full(5, 2.0), np.arange(5)) == 0
    assert METRICS["mae"](np.ones(5), np.ones(5)) == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "weights"),
    [
        (np.ones(3), np.ones(4), None), (np.ones((3, 2)), np.ones(3), None), (np.ones(0), np.ones(0), None),
        (np.ones(3), np.ones(3), np.ones((2, 4))), (np.array([1, np.nan]), np.ones(2), None),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(ours, theirs, weights):
    with pytest.raises(UsageError):
        spearman(ours, theirs, weights)
