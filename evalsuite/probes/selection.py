"""Hyper-parameters chosen on a validation part, and the chosen head's scores on test points."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch import Tensor

from evalsuite.errors import DataError, UsageError
from evalsuite.metrics.ranking import macro, per_label, top_k_hits
from evalsuite.metrics.regression import spearman
from evalsuite.probes.draws import draw_low_shot, draw_shots, fold, hold_out
from evalsuite.probes.rows import (
    FEW,
    Array,
    Floats,
    Ints,
    Kind,
    Metric,
    Normalise,
    Part,
    Probe,
    Rows,
    Runtime,
    Setting,
    Train,
    check_vectors,
    normaliser,
)

__all__ = [
    "Choice",
    "Probed",
    "Selection",
    "accuracy",
    "choose",
    "evaluate",
    "few_shots",
    "mean_auroc",
    "middle",
    "rank_correlation",
    "select",
    "tied_for_best",
]


@dataclass(frozen=True)
class Selection:
    """How a setting is chosen on training data.

    The share ``validation`` is held out (:func:`hold_out`); of fewer than ``folds_below`` samples all are, in turn, in
    ``folds`` parts (:func:`fold`), and the metric is averaged over them: of 130 samples a tenth is 13, on which nearly
    all settings are equally good.
    """

    validation: float = 0.1
    folds: int = 5
    folds_below: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1 or self.folds < 2:
            raise UsageError(
                f"a validation share of {self.validation} and {self.folds} folds",
                cause="a share is between 0 and 1, and there are two folds at least",
                fix="0.1 and 5 are usual",
            )

    def splits(
        self, labels: Array, seed: int, groups: Array | None = None, kind: Kind = "classes"
    ) -> list[tuple[Ints, Ints]]:
        """Rows to fit on and to validate on, once for each fold; numbers that are to be predicted make no strata."""
        labels = np.zeros(len(labels), dtype=np.int64) if kind == "regression" else labels
        if kind == "regression" and groups is None and len(labels) >= self.folds_below:
            groups = np.arange(len(labels))  # every row alone: a class of its own has none to give
        if len(labels) < self.folds_below:
            return fold(labels, self.folds, seed, groups)
        return [hold_out(labels, self.validation, seed, groups)]


@dataclass(frozen=True)
class Choice:
    """What a selection chose.

    ``table`` lists (setting, validation score) for everything that was tried, ``tied`` counts the settings that are as
    good as the best, ``held`` the samples they were judged on, in ``folds`` parts.
    """

    setting: Setting
    value: float | None
    table: tuple[tuple[Setting, float], ...]
    warnings: tuple[str, ...]
    tied: int = 1
    held: int = 0
    folds: int = 0

    def told(self) -> dict[str, Any]:
        """The setting, and how it was chosen, for a result."""
        how = {"validation_score": self.value}
        if self.value is not None:
            how |= {"validation_images": self.held, "validation_folds": self.folds, "tied": self.tied}
        return {**self.setting, **how}


@dataclass(frozen=True)
class Probed:
    """A probe's answer on a test set: per-sample scores (M, C), and how the setting was chosen."""

    scores: Floats
    choice: Choice
    details: Mapping[str, Any]
    warnings: tuple[str, ...]


def evaluate(
    probe: Probe,
    train: Train,
    points: Mapping[str, Array],
    metric: Metric | None = None,
    *,
    normalise: Normalise = "none",
    selection: Selection | None = None,
    refit: bool = True,
    runtime: Runtime | None = None,
) -> Probed:
    """Choose a setting on training data, fit it on all of them, score the test set's features ``points``, as named in
    ``train``. Its labels are not needed, and nothing can be chosen by them.

    Without ``refit`` there are no folds, the fit is on what selection fitted on, and what it held out stays out.
    ``metric(scores, labels)``, higher is better, defaults to :func:`accuracy` or :func:`mean_auroc`, of a regression
    to Spearman's correlation, scores being (N, T).
    """
    check_vectors(points)
    runtime, selection = runtime or Runtime(), selection or Selection()
    selection = selection if refit else dataclasses.replace(selection, folds_below=0)
    choice = select(probe, train, metric, normalise=normalise, selection=selection, runtime=runtime)
    name = choice.setting.get("features", next(iter(train.features)))
    index = None if refit else selection.splits(train.labels, runtime.seed, train.groups, train.kind)[0][0]
    part, norm = _part(probe, train, name, index, normalise, runtime)
    setting = {key: value for key, value in choice.setting.items() if key != "features"}
    fitted = next(iter(probe.fit(part, Rows(points[name], norm=norm), [setting], runtime)))
    return Probed(fitted.scores, choice, fitted.details, (*choice.warnings, *fitted.warnings))


def select(
    probe: Probe,
    train: Train,
    metric: Metric | None = None,
    *,
    normalise: Normalise = "none",
    selection: Selection | None = None,
    runtime: Runtime | None = None,
) -> Choice:
    """The setting, and the output where there are several, with the best metric on what is held out of ``train``.

    Of equally good settings the middle one is taken (:func:`choose`). A setting whose scores are not finite loses. With
    one setting and one output nothing is held out. A choice at the edge of its grid is warned of: the best may lie
    beyond.
    """
    runtime = runtime or Runtime()
    metric = metric or (rank_correlation if train.kind == "regression" else _DEFAULTS[train.labels.ndim])
    grid = probe.settings(len(train.labels))
    if len(grid) == 1 and len(train.features) == 1:
        return Choice(grid[0], None, (), ())
    splits = (selection or Selection()).splits(train.labels, runtime.seed, train.groups, train.kind)
    grid = probe.settings(min(len(fit) for fit, _ in splits))
    table: list[tuple[Setting, float]] = []
    for name in train.features:
        values = np.array([_validated(probe, train, name, split, grid, metric, normalise, runtime) for split in splits])
        extra = {"features": name} if len(train.features) > 1 else {}
        sizes = [len(held) for _, held in splits]
        table += [({**s, **extra}, _mean(column, sizes)) for s, column in zip(grid, values.T, strict=True)]
    return choose(table, sum(len(held) for _, held in splits), len(splits))


def _validated(
    probe: Probe,
    train: Train,
    name: str,
    split: tuple[Ints, Ints],
    grid: Sequence[Setting],
    metric: Metric,
    normalise: Normalise,
    runtime: Runtime,
) -> list[float]:
    """The metric of every setting of one output on what a split holds out; minus infinity where a fit diverged."""
    fit, held = split
    part, norm = _part(probe, train, name, fit, normalise, runtime)
    fits = probe.fit(part, Rows(train.features[name], held, norm), grid, runtime)
    return [metric(f.scores, train.labels[held]) if _sound(f.scores) else -math.inf for f in fits]


def _mean(values: Floats, sizes: Sequence[int]) -> float:
    """The mean over folds, each counting as many times as it has samples, of those on which the metric is defined."""
    defined = ~np.isnan(values)
    return float(np.average(values[defined], weights=np.asarray(sizes)[defined])) if defined.any() else -math.inf


def choose(table: Sequence[tuple[Setting, float]], held: int, folds: int = 1) -> Choice:
    """The best of settings with their validation scores, minus infinity for one that could not be scored.

    Scores that differ by less than a billionth are equal: so far they depend on the processor. Of equally good settings
    the one nearest to the middle of them is taken, number by number (of a cost, a rate, a k); of those with different
    features the first. ``held`` samples in ``folds`` parts gave the scores; where they are few, or many settings are
    equally good, that is warned of. Raises :class:`DataError` where none could be scored.
    """
    value = max(value for _, value in table)
    if value == -math.inf:
        raise DataError(
            "no setting can be scored on the validation part",
            cause="every fit diverged, or the part lacks what the metric needs",
            fix="use smaller learning rates or costs, or a larger validation share",
        )
    tied = tied_for_best(table)
    best = middle(tied, [setting for setting, _ in table])
    doubts = [*_told(best, table)]
    many = len(tied) > 1 and 4 * len(tied) > len(table)
    if held < FEW or many:
        by = f"chosen on {held} validation images{f' in {folds} folds' if folds > 1 else ''}"
        alike = f"{len(tied)} of {len(table)} settings are equally good, and the middle one is taken"
        doubts.append(f"{by}: {alike}" if many else f"{by}, few to choose among {len(table)} settings")
    return Choice(best, value, tuple(table), tuple(doubts), len(tied), held, folds)


def tied_for_best(table: Sequence[tuple[Setting, float]]) -> list[Setting]:
    """The settings whose scores differ from the best one's by no more than rounding errors."""
    value = max(value for _, value in table)
    return [setting for setting, other in table if other >= value - 1e-9]


def middle(tied: Sequence[Setting], grid: Sequence[Setting]) -> Setting:
    """Of settings with the first one's words, that which is nearest to the middle of their numbers, axis by axis."""
    axes = [name for name, value in tied[0].items() if isinstance(value, int | float)]
    alike = [s for s in tied if all(s[name] == tied[0][name] for name in s if name not in axes)]
    steps = {name: {value: i for i, value in enumerate(sorted({s[name] for s in grid}))} for name in axes}
    places = np.array([[steps[name][s[name]] for name in axes] for s in alike]).reshape(len(alike), len(axes))
    middle = np.sort(places, axis=0)[(len(alike) - 1) // 2]
    return alike[int(np.abs(places - middle).sum(axis=1).argmin())]


def rank_correlation(scores: Array, targets: Array) -> float:
    """Spearman's correlation of (M, T) scores and (M,) or (M, T) targets, the mean over targets."""
    return float(spearman(scores, np.reshape(targets, np.shape(scores))))


def accuracy(scores: Array, labels: Array) -> float:
    """Top-1 accuracy of (M, C) scores."""
    return float(top_k_hits(scores, labels).mean())


def mean_auroc(scores: Array, labels: Array) -> float:
    """Macro AUROC over the labels that have positives and negatives."""
    return cast(float, macro(per_label("auroc", scores, labels)))


_DEFAULTS: dict[int, Metric] = {1: accuracy, 2: mean_auroc}


def few_shots(
    probe: Probe,
    train: Train,
    points: Array,
    ks: Sequence[int],
    draws: int,
    *,
    normalise: Normalise = "none",
    runtime: Runtime | None = None,
) -> Iterator[tuple[int, int, Floats]]:
    """(k, draw, scores (M, C)) on ``points`` (M, D) of a probe fitted on each draw of k samples a class.

    The probe has one setting and ``train`` one output. Draws are those of :func:`draw_shots`; of several labels those
    of :func:`draw_low_shot`, and each label's head learns from its own samples. Minus infinity is the score of a label
    that cannot be fitted.
    """
    runtime = runtime or Runtime()
    name = next(iter(train.features))
    alone = Runtime(runtime.device, runtime.seed)  # its progress would be that of one small head
    (setting,) = probe.settings(len(train.labels))
    with runtime.progress.track("few shots", len(ks) * draws) as meter:
        for done, (k, draw) in enumerate((k, draw) for k in ks for draw in range(draws)):
            several, columns = train.labels.ndim == 2, []
            if several:
                sets = draw_low_shot(train.labels, k, draw, runtime.seed)
            else:
                sets = [draw_shots(train.labels, k, draw, runtime.seed)]
            for label, places in enumerate(sets):
                part, norm = _part(probe, train, name, places, normalise, runtime)
                if several:
                    part = dataclasses.replace(part, labels=part.labels[:, [label]], classes=1)
                (fitted,) = probe.fit(part, Rows(points, norm=norm), [setting], alone)
                columns.append(fitted.scores)
            meter.update(done + 1)
            yield k, draw, np.concatenate(columns, axis=1)


def _part(
    probe: Probe, train: Train, name: str, index: Ints | None, normalise: Normalise, runtime: Runtime
) -> tuple[Part, Callable[[Tensor], Tensor] | None]:
    """The training data of one output at ``index`` (None: all), and the normalisation learnt from them."""
    rows = Rows(train.features[name], index)
    if train.kind == "regression" and not getattr(probe, "regression", False):
        raise UsageError(
            f"{type(probe).__name__} does not predict numbers",
            cause="it tells classes apart",
            fix="use probes.Ridge for a regression",
        )
    norm = normaliser(rows, normalise, runtime.device)
    labels = train.labels if index is None else train.labels[index]
    groups = train.groups if index is None or train.groups is None else train.groups[index]
    single = 1 if train.kind == "regression" else int(train.labels.max()) + 1
    columns = train.labels.shape[1] if train.labels.ndim == 2 else single
    return Part(rows.normalised(norm), labels, groups, train.classes or columns, train.kind), norm


def _sound(scores: Floats) -> bool:
    """Minus infinity is a class that was not there; all else that is not finite is a fit that diverged."""
    return not (np.isnan(scores).any() or np.isposinf(scores).any())


def _told(best: Setting, table: Sequence[tuple[Setting, float]]) -> Iterator[str]:
    """Warnings of a selection: diverged fits, and a choice at the edge of a grid of numbers."""
    lost = sum(value == -math.inf for _, value in table)
    if lost:
        yield f"{lost} of {len(table)} settings could not be scored"
    for name, value in best.items():
        if isinstance(value, int | float):
            tried = sorted({setting[name] for setting, _ in table})
            if len(tried) > 1 and value in (tried[0] or None, tried[-1]):  # there is nothing below zero
                yield f"{name}={value:g} is at the edge of its grid, {tried[0]:g} to {tried[-1]:g}"
