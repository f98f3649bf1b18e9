"""Linear support vector machines, one for each label."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.svm import LinearSVC

from evalsuite.probes.rows import Array, Ints, Part, Predictions, Rows, Runtime, Setting
from evalsuite.probes.selection import middle, tied_for_best

__all__ = ["LinearSVM"]


# --- support vector machines ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearSVM:
    """One linear SVM a class, each with its own cost, chosen by cross-validated average precision on training data.

    The VOC07 protocol (Goyal et al. 2019; VISSL, mmselfsup): LIBLINEAR's squared hinge loss in the dual, positives
    weighing ``positive_weight``, features normalised with ``l2+1e-5``. Scores are decision values; a class without
    positives and negatives scores minus infinity. ``unknown``: what a label of -1 is in training, a ``negative`` as
    the official code has it, or left out.
    """

    costs: tuple[float, ...] = (1.0, 10.0, 100.0, *(0.5**e for e in range(4, 20)))
    positive_weight: float = 2.0
    folds: int = 3
    unknown: Literal["negative", "drop"] = "negative"
    max_iterations: int = 2000
    scale: Literal["margins"] = "margins"

    def settings(self, samples: int) -> list[dict[str, Any]]:
        return [{}]  # costs are chosen class by class, inside

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], runtime: Runtime) -> Iterator[Predictions]:
        x, where = part.rows.at(slice(None)).numpy(), points.at(slice(None)).numpy()
        targets, costs = part.targets(), sorted(self.costs)
        scores = np.full((len(points), part.classes), -np.inf, dtype=np.float32)
        chosen: list[float | None] = []
        told: list[str] = []
        tied = 0
        with runtime.progress.track("svm", part.classes) as meter, _convergence(told):
            for label in range(part.classes):
                keep = slice(None) if self.unknown == "negative" else ~np.isnan(targets[:, label])
                y = np.where(targets[keep, label] == 1, 1, -1)
                groups = None if part.groups is None else part.groups[keep]
                cost, alike = self._cost(x[keep], y, groups, costs, runtime.seed)
                chosen.append(cost)
                tied += alike > 1
                if cost is not None:
                    scores[:, label] = self._machine(cost, runtime.seed).fit(x[keep], y).decision_function(where)
                meter.update(label + 1)
        edges = [c for c in chosen if c in (costs[0], costs[-1]) and len(costs) > 1]
        if edges:
            told.append(f"SVM: {len(edges)} of {part.classes} costs are at the edge of {costs[0]:g} to {costs[-1]:g}")
        if tied:
            told.append(
                f"SVM: for {tied} of {part.classes} classes several costs are equally good on {len(x)} images in "
                f"{self.folds} folds, and the middle one is taken"
            )
        for _ in settings:
            yield Predictions(scores, {"C": chosen}, tuple(told))

    def _machine(self, cost: float, seed: int) -> LinearSVC:
        return LinearSVC(
            C=cost, class_weight={1: self.positive_weight, -1: 1.0}, dual=True, loss="squared_hinge", penalty="l2",
            tol=1e-4, max_iter=self.max_iterations, random_state=seed,
        )  # fmt: skip

    def _cost(
        self, x: Array, y: Ints, groups: Array | None, costs: Sequence[float], seed: int
    ) -> tuple[float | None, int]:
        """The cost with the best mean average precision over the folds, and how many are as good, the middle one of
        which it is; None for a class that cannot be fitted."""
        rarest = min((y == 1).sum(), (y == -1).sum())
        if len(costs) == 1 or rarest < self.folds:  # too few to divide: the middle of the grid, for want of better
            return None if rarest == 0 else costs[len(costs) // 2], 1
        folds = StratifiedKFold(self.folds) if groups is None else StratifiedGroupKFold(self.folds)
        parts = [p for p in folds.split(x, y, groups) if (y[p[1]] == 1).any() and len(set(y[p[0]])) == 2]
        if not parts:
            return costs[len(costs) // 2], 1
        means = [float(np.mean([self._precision(cost, seed, x, y, *fold) for fold in parts])) for cost in costs]
        tied = tied_for_best([({"C": cost}, mean) for cost, mean in zip(costs, means, strict=True)])
        return middle(tied, tied)["C"], len(tied)

    def _precision(self, cost: float, seed: int, x: Array, y: Ints, fit: Ints, held: Ints) -> float:
        machine = self._machine(cost, seed).fit(x[fit], y[fit])
        return float(average_precision_score(y[held] == 1, machine.decision_function(x[held])))


class _convergence:
    """LIBLINEAR's warnings that it stopped early, counted into one line; the official code ignores them."""

    def __init__(self, told: list[str]) -> None:
        self.told = told
        self.catcher = warnings.catch_warnings(record=True)

    def __enter__(self) -> None:
        self.caught = self.catcher.__enter__()
        warnings.simplefilter("always", ConvergenceWarning)

    def __exit__(self, *error: Any) -> None:
        self.catcher.__exit__(*error)
        early = [w for w in self.caught or [] if issubclass(w.category, ConvergenceWarning)]
        for other in (w for w in self.caught or [] if not issubclass(w.category, ConvergenceWarning)):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        if early:
            self.told.append(f"SVM: {len(early)} fits stopped at the limit of iterations")
