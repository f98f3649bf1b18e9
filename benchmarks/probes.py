"""How fast are the probes against scikit-learn, at equal answers, and does k-NN's memory stay flat?

``logistic``: 45 costs on 20,000 x 512 features of ten classes, all in one batched solve, against scikit-learn's
``LogisticRegression``. Theirs runs on nine of the 45 costs, every fifth, and its time is taken times five; each
setting's objective, in float64, must be no worse than theirs by more than 1e-4, and their test accuracies be near.
``knn``: the 20 nearest of 50,000 x 512 rows to 10,000 points, against ``NearestNeighbors(algorithm="brute")`` on the
same unit vectors. ``knn memory``: how much more the process holds at its peak for a bank four times as large.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from threading import Thread
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors

from evalsuite.metrics.ranking import top_k_hits
from evalsuite.probes import Logistic, Part, Rows, Runtime, neighbours
from evalsuite.probes import rows as probe_rows

__all__ = ["run"]

SAMPLES, WIDTH, CLASSES, TEST = 20_000, 512, 10, 2_000
COSTS = Logistic().costs
BANK, POINTS, NEAR = 50_000, 10_000, 20

Array = npt.NDArray[Any]


def run() -> list[dict[str, Any]]:
    return [logistic(), knn(), knn_memory()]


def logistic() -> dict[str, Any]:
    x, y = _world(SAMPLES + TEST)
    x, y, points, labels = x[:SAMPLES], y[:SAMPLES], x[SAMPLES:], y[SAMPLES:]
    probe = Logistic(COSTS)

    def ours() -> list[tuple[float, float]]:
        found = probe.fit(Part(Rows(x), y, None, CLASSES), Rows(points), probe.settings(SAMPLES), Runtime())
        return [(f.details["objective"], float(top_k_hits(f.scores, labels).mean())) for f in found]

    def theirs() -> list[tuple[float, float]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where it stops at the limit of iterations, its objective tells
            models = [LogisticRegression(C=cost, max_iter=1000).fit(x, y) for cost in COSTS[2::5]]
        return [
            (_objective(model, x, y, cost), float(model.score(points, labels)))
            for model, cost in zip(models, COSTS[2::5], strict=True)
        ]

    seconds, scores = _timed(ours)
    expected_seconds, expected = _timed(theirs)
    worse = max(a[0] / b[0] - 1 for a, b in zip(scores[2::5], expected, strict=True))
    apart = max(abs(a[1] - b[1]) for a, b in zip(scores[2::5], expected, strict=True))
    if worse > 1e-4:
        raise AssertionError(f"an objective is worse than scikit-learn's by {worse:.2g} of it")
    return {
        "benchmark": "logistic", "ratio": 5 * expected_seconds / seconds, "seconds": seconds,
        "scikit_learn_seconds": 5 * expected_seconds, "objective_worse_by": worse, "accuracy_apart": apart,
    }  # fmt: skip


def knn() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    bank, points = (rng.standard_normal((n, WIDTH), dtype=np.float32) for n in (BANK, POINTS))
    unit, unit_points = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (bank, points))
    seconds, found = _timed(lambda: neighbours(Rows(bank), Rows(points), NEAR)[1].numpy())
    searcher = NearestNeighbors(n_neighbors=NEAR, algorithm="brute").fit(unit)
    expected_seconds, expected = _timed(lambda: searcher.kneighbors(unit_points, return_distance=False))
    same = float(np.mean([len(set(a) & set(b)) / NEAR for a, b in zip(found, expected, strict=True)]))
    if same < 0.999:
        raise AssertionError(f"only {same:.4f} of the neighbours are scikit-learn's")
    return {
        "benchmark": "knn", "ratio": expected_seconds / seconds, "seconds": seconds,
        "scikit_learn_seconds": expected_seconds, "same_neighbours": same,
    }  # fmt: skip


def knn_memory() -> dict[str, Any]:
    """Peaks of two fresh processes; the banks lie on disk, and are mapped."""
    small, large = (_peak(rows) for rows in (50_000, 200_000))
    return {"benchmark": "knn memory", "ratio": large / small, "mb_50k": small, "mb_200k": large}


def _peak(rows: int) -> float:
    """What a search adds to the memory of a fresh process at its peak, in MB; pages of the mapped file do not count."""
    code = f"from benchmarks.probes import search; print(search({rows}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def search(rows: int) -> float:
    """Search a bank on disk in chunks, and say how much memory that took at its peak, in MB."""
    probe_rows.free_memory = lambda device: 0  # so that the bank is not read into memory whole
    rng = np.random.default_rng(0)
    points = Rows(rng.standard_normal((2_000, 128), dtype=np.float32))
    with tempfile.TemporaryFile() as file:
        bank = np.memmap(file, np.float16, "w+", shape=(rows, 128))
        for start in range(0, rows, 10_000):
            bank[start : start + 10_000] = rng.standard_normal((10_000, 128), dtype=np.float32)
        before = most = _anonymous()
        worker = Thread(target=neighbours, args=(Rows(bank), points, NEAR))
        worker.start()
        while worker.is_alive():
            most = max(most, _anonymous())
            worker.join(0.002)
        return (most - before) / 2**20


def _anonymous() -> int:
    """Memory of this process that no file holds, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def _world(samples: int) -> tuple[Array, Array]:
    """Features as networks give them: correlated, a few strong directions and many weak ones, off centre."""
    rng = np.random.default_rng(0)
    axes = rng.standard_normal((samples, WIDTH))
    labels = (axes @ rng.normal(0, 0.15, (WIDTH, CLASSES)) + 1.5 * rng.gumbel(size=(samples, CLASSES))).argmax(1)
    turned = (axes / np.sqrt(np.arange(1, WIDTH + 1))) @ np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    return (3 * turned + 1).astype(np.float32), labels


def _objective(model: Any, x: Array, y: Array, cost: float) -> float:
    logits = x.astype(np.float64) @ model.coef_.astype(np.float64).T + model.intercept_
    losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(y)), y]
    return float(cost * losses.sum() + (model.coef_.astype(np.float64) ** 2).sum() / 2)


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    result = function()
    return perf_counter() - start, result
