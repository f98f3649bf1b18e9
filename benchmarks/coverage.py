"""Do the intervals of ``linear`` on a few images hold what they say, and is its cost well chosen?

Gaussian classes, so that what a fitted head is worth can be measured on 20,000 further points. For each size a head is
fitted as the protocol ``linear`` does it, at six of its costs: ``covered`` is the share of 95 % intervals
(bootstrap of the test images) that contain the true accuracy of their own head, ``noise`` the standard error of that
share. ``folds`` and ``tenth`` are mean true accuracies of heads whose cost was chosen in five folds and on a tenth of
the images, ``best`` of the best cost of the grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from evalsuite import probes
from evalsuite.probes import COSTS, Logistic, Part, Rows, Selection, Site
from evalsuite.statistics import bootstrap_mean, interval

__all__ = ["run"]

Floats = npt.NDArray[Any]
SIZES = ((60, 40), (130, 50), (400, 100))  # images to learn from and to test on
WIDTH, CLASSES, NOISE, DATASETS, FURTHER = 64, 4, 4.0, 100, 20_000
PROBE = Logistic(COSTS[4:25:4])  # 1e-5 to 1: features are of length 32 or so


def run() -> list[dict[str, Any]]:
    return [_row(train, test) for train, test in SIZES]


def _row(train: int, test: int) -> dict[str, Any]:
    found = [_one(train, test, seed) for seed in range(DATASETS)]
    covered, folds, tenth, best = np.array(found, dtype=float).T
    share = float(covered.mean())
    return {
        "benchmark": "coverage", "train": train, "test": test, "covered": share,
        "noise": float(np.sqrt(share * (1 - share) / DATASETS)), "folds": float(folds.mean()),
        "tenth": float(tenth.mean()), "best": float(best.mean()),
    }  # fmt: skip


def _one(train: int, test: int, seed: int) -> tuple[bool, float, float, float]:
    """Whether the interval holds the true accuracy, and the true accuracies by folds, by a tenth and at best."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(CLASSES, WIDTH))

    def draw(count: int) -> tuple[Floats, Floats]:
        labels = rng.integers(0, CLASSES, count)
        return (centres[labels] + NOISE * rng.normal(size=(count, WIDTH))).astype(np.float32), labels

    (x, y), (points, marks) = draw(train), draw(test + FURTHER)
    whole = Part(Rows(x), y, None, CLASSES)
    settings = PROBE.settings(train)
    hits = [f.scores.argmax(1) == marks for f in PROBE.fit(whole, Rows(points), settings, Site())]
    true = [float(h[test:].mean()) for h in hits]
    chosen = {}
    for name, below in (("folds", 1000), ("tenth", 0)):
        selection = Selection(folds_below=below)
        choice = probes.select(PROBE, probes.Train({"f": x}, y), selection=selection, site=Site(seed=seed))
        chosen[name] = settings.index(dict(choice.setting))
    low, high = interval(bootstrap_mean(hits[chosen["folds"]][:test].astype(float)))
    return low <= true[chosen["folds"]] <= high, true[chosen["folds"]], true[chosen["tenth"]], max(true)
