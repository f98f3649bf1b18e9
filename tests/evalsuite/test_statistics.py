from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evalsuite.errors import UsageError
from evalsuite.statistics import (
    bootstrap_mean,
    interval,
    iqm,
    resample_weights,
    score_interval,
    stratified_bootstrap,
    weight_blocks,
)


def test_weights_are_multinomial():
    weights = resample_weights(50, 4000, seed=3)
    assert weights.shape == (4000, 50)
    assert (weights.sum(axis=1) == 50).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(50), abs=0.08)
    assert weights.var() == pytest.approx(1 - 1 / 50, abs=0.02)
    counts = np.bincount(weights[:, 0], minlength=6)[:6]
    expected = 4000 * stats.binom.pmf(np.arange(6), 50, 1 / 50)
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


def test_weights_depend_on_the_seed_alone_and_blocks_are_their_rows():
    whole = resample_weights(7, 40, seed=1)
    np.testing.assert_array_equal(whole, resample_weights(7, 40, seed=1))
    assert (whole != resample_weights(7, 40, seed=2)).any()
    for size in (1, 21, 10_000):
        blocks = list(weight_blocks(7, 40, 1, size=size))
        assert max(map(len, blocks)) <= max(1, size // 7)
        np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_groups_are_drawn_whole():
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    weights = resample_weights(6, 300, seed=0, groups=groups)
    by_group = np.stack([weights[:, 1], weights[:, 0], weights[:, 3]], axis=1)
    np.testing.assert_array_equal(weights, by_group[:, [1, 0, 1, 2, 0, 1]])
    assert (by_group.sum(axis=1) == 3).all()
    assert len(np.unique(weights.sum(axis=1))) > 1


@pytest.mark.parametrize("grouped", [False, True])
def test_the_mean_of_each_replicate(grouped: bool):
    samples = np.random.default_rng(0).normal(size=(9, 3))
    groups = [0, 0, 0, 0, 1, 1, 2, 3, 3] if grouped else None
    weights = resample_weights(9, 20, seed=4, groups=groups)
    expected = np.stack([np.repeat(samples, row, axis=0).mean(axis=0) for row in weights])
    np.testing.assert_allclose(bootstrap_mean(samples, 20, seed=4, groups=groups), expected)
    np.testing.assert_allclose(bootstrap_mean(samples[:, 1], 20, seed=4, groups=groups), expected[:, 1])


def test_the_spread_is_that_of_the_mean_and_of_clusters_where_there_are_groups():
    samples = np.random.default_rng(0).normal(size=400)
    assert bootstrap_mean(samples, 4000).std() == pytest.approx(samples.std() / 20, rel=0.05)
    groups = np.repeat(np.arange(40), 10)
    alike = np.random.default_rng(1).normal(size=40)[groups]  # ten copies of forty independent values
    clustered = bootstrap_mean(alike, 4000, groups=groups).std()
    assert clustered == pytest.approx(alike.std() / np.sqrt(40), rel=0.05)
    assert bootstrap_mean(alike, 4000).std() < 0.5 * clustered


def test_the_interval_agrees_with_scipy():
    samples = np.random.default_rng(0).exponential(size=120)
    theirs = stats.bootstrap(
        (samples,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert interval(bootstrap_mean(samples, 20_000)) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_the_interval_is_the_middle_of_what_is_defined():
    values = np.arange(101.0)
    assert interval(values) == pytest.approx((2.5, 97.5))
    assert interval(values, 0.5) == pytest.approx((25, 75))
    assert interval([*values, np.nan, np.nan]) == interval(values)
    assert np.isnan(interval([np.nan])).all()


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_intervals_cover_the_truth_as_often_as_they_say(draw: str):
    """1000 experiments of 200 samples: 95 +- 2 per cent of the intervals hold the true mean."""
    random = np.random.default_rng(7)
    mean = {"normal": 0.0, "exponential": 1.0}[draw]
    covered = 0
    for seed in range(50):
        experiments = getattr(random, draw)(size=(200, 20))
        replicates = bootstrap_mean(experiments, 500, seed=seed)
        covered += sum(low <= mean <= high for low, high in map(interval, replicates.T))
    assert covered / 1000 == pytest.approx(0.95, abs=0.02)


def test_a_share_of_hits_has_wilsons_interval():
    """Against his formula, solved by hand: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    z = stats.norm.ppf(0.975)
    for right, n in ((20, 20), (0, 7), (81, 263)):
        p = right / n
        middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n * n))
        hits = np.arange(n) < right
        wilson = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
        assert score_interval(bootstrap_mean(hits), hits) == pytest.approx(wilson)


@pytest.mark.parametrize(("true", "n"), [(0.97, 20), (0.97, 100), (0.6, 20)])
def test_it_holds_the_truth_near_one_too(true: float, n: int):
    """Of the share of hits, exactly: what the binomial distribution says of every number of hits."""
    intervals = [score_interval([0.5], np.arange(n) < right) for right in range(n + 1)]
    held = [low <= true <= high for low, high in intervals]
    assert stats.binom(n, true).pmf(range(n + 1)) @ held >= 0.93


def test_other_scores_have_the_percentiles_of_their_replicates():
    random = np.random.default_rng(0)
    hits, shares, groups = random.random(50) < 0.9, random.random(50), np.arange(50) // 5
    replicates = bootstrap_mean(shares)
    assert score_interval(replicates) == interval(replicates)
    assert score_interval(replicates, shares) == interval(replicates)
    assert score_interval(replicates, hits, groups) == interval(replicates)


@pytest.mark.parametrize(
    "call",
    [
        lambda: resample_weights(0, 10, 0),
        lambda: resample_weights(5, 0, 0),
        lambda: resample_weights(5, 10, 0, groups=[1, 2]),
        lambda: bootstrap_mean([1.0, np.nan]),
        lambda: bootstrap_mean(3.0),
        lambda: interval([1.0, 2.0], level=95),
        lambda: interval([[1.0, 2.0]]),
    ],
)
def test_what_makes_no_sense_is_refused(call):
    with pytest.raises(UsageError):
        call()


@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (10, 26), (4, 1)])
def test_the_interquartile_mean_is_scipys_trimmed_mean_of_all_scores(shape: tuple[int, int]):
    scores = np.random.default_rng(0).random(shape)
    assert iqm(scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None))  # as rliable has it
    quarter = scores.size // 4
    middle = np.sort(scores.ravel())[quarter : scores.size - quarter]
    assert iqm(scores) == pytest.approx(middle.mean())


def test_runs_are_drawn_for_each_task_by_itself():
    """Against the distribution itself: of two runs on two tasks there are sixteen draws."""
    scores = np.array([[0.0, 10.0], [1.0, 30.0]])
    drawn = stratified_bootstrap(scores, lambda table: float(table.mean()), replicates=4000)
    every = [(a + b) / 4 + (c + d) / 4 for a in (0, 1) for b in (0, 1) for c in (10, 30) for d in (10, 30)]
    for value in set(every):
        assert np.mean(drawn == value) == pytest.approx(every.count(value) / 16, abs=0.03)
    assert set(drawn) == set(every)


def test_the_interval_of_the_interquartile_mean_agrees_with_a_slow_bootstrap():
    scores = np.random.default_rng(1).beta(2, 2, (6, 5)) + np.linspace(0, 1, 5)
    random = np.random.default_rng(2)
    slow = []
    for _ in range(1000):
        columns = [[column[random.integers(6)] for _ in range(6)] for column in scores.T]
        slow.append(stats.trim_mean(np.ravel(columns), 0.25))
    assert interval(stratified_bootstrap(scores, replicates=1000)) == pytest.approx(interval(slow), abs=0.015)
    assert np.array_equal(stratified_bootstrap(scores, seed=3), stratified_bootstrap(scores, seed=3))


@pytest.mark.parametrize("scores", [[[0.1, 0.2]], [0.1, 0.2], [[0.1], [float("nan")]]])
def test_one_run_has_no_interval_over_runs(scores: list[object]):
    with pytest.raises(UsageError, match="no interval over runs"):
        stratified_bootstrap(scores)
