"""Do the intervals of ``linear`` on a few images hold what they say, and is its cost well chosen?

Gaussian classes, so that what a fitted head is worth can be measured on 20,000 further points. For each number of
images to learn from, and for classes that are far apart (``spread`` 1.5) and near (3), a head is fitted as the
protocol ``linear`` does it, at six of its costs, on eight data sets:
``folds`` and ``tenth`` are mean true accuracies of heads whose cost was chosen in five folds and on a tenth of the
images, ``best`` of the best cost of the grid. ``covered`` is the share of 95 % intervals (Wilson's, of the hits)
that contain the true accuracy of their own head, over 150 draws of so many test images for each head; ``noise`` is the
standard error of that share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from evalsuite import probes
from evalsuite.probes import COSTS, Logistic, Part, Rows, Runtime, Selection
from evalsuite.statistics import bootstrap_mean, score_interval

__all__ = ["run"]

Floats = npt.NDArray[Any]
TRAIN, TEST = (40, 60, 130, 300), (20, 40, 100)  # numbers of images to learn from and to test on
SPREADS = (3.0, 1.5)  # of a class, where the centres are as far from 0 in each of the dimensions as 1
WIDTH, CLASSES, DATASETS, DRAWS, FURTHER = 32, 4, 8, 150, 20_000
PROBE = Logistic(COSTS[4:25:4])  # 1e-5 to 1: features are of length 20 or so


def run() -> Iterator[dict[str, Any]]:
    for train, spread in itertools.product(TRAIN, SPREADS):
        found = [_one(train, spread, seed) for seed in range(DATASETS)]
        folds, tenth, best = np.mean([accuracies for _, accuracies in found], axis=0)
        for column, test in enumerate(TEST):
            share = float(np.mean([covered[column] for covered, _ in found]))
            yield {
                "benchmark": "coverage", "train": train, "spread": spread, "test": test, "covered": share,
                "noise": float(np.sqrt(share * (1 - share) / (DATASETS * DRAWS))), "folds": float(folds),
                "tenth": float(tenth), "best": float(best),
            }  # fmt: skip


def _one(train: int, spread: float, seed: int) -> tuple[list[float], tuple[float, float, float]]:
    """The share of intervals that hold the true accuracy, by test size; true accuracies by folds, a tenth, at best."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(CLASSES, WIDTH))

    def draw(count: int) -> tuple[Floats, Floats]:
        labels = rng.integers(0, CLASSES, count)
        return (centres[labels] + spread * rng.normal(size=(count, WIDTH))).astype(np.float32), labels

    (x, y), (points, marks) = draw(train), draw(FURTHER)
    settings = PROBE.settings(train)
    fitted = PROBE.fit(Part(Rows(x), y, None, CLASSES), Rows(points), settings, Runtime())
    hits = [(f.scores.argmax(1) == marks).astype(float) for f in fitted]
    chosen = {}
    for name, below in (("folds", 1000), ("tenth", 0)):
        choice = probes.select(
            PROBE, probes.Train({"f": x}, y), selection=Selection(folds_below=below), runtime=Runtime(seed=seed)
        )
        chosen[name] = settings.index(dict(choice.setting))
    true = [float(h.mean()) for h in hits]
    shares = [_covered(hits[chosen["folds"]], test, rng) for test in TEST]
    return shares, (true[chosen["folds"]], true[chosen["tenth"]], max(true))


def _covered(hits: Floats, test: int, rng: np.random.Generator) -> float:
    """The share of draws of so many test images whose interval holds the mean of all."""
    held = 0
    for _ in range(DRAWS):
        drawn = rng.choice(hits, test)
        low, high = score_interval(bootstrap_mean(drawn, replicates=1), drawn)
        held += low <= hits.mean() <= high
    return held / DRAWS
