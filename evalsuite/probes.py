"""Heads fitted on features: nearest neighbours, logistic and ridge regression, SGD heads, SVM, prototypes.

Each probe fits its whole grid of hyper-parameters in one go and tells the scores of every setting on other points.
:func:`select` chooses among them on a validation part of the training data; it is never given a test set. A
:class:`Test` shows its features to anyone and its labels once, to whoever hands in final scores. :func:`evaluate` is
the way from one to the other.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.svm import LinearSVC
from torch import Tensor

from evalsuite import statistics
from evalsuite.errors import DataError, UsageError
from evalsuite.metrics.ranking import macro, per_label, top_k_hits
from evalsuite.progress import Progress

__all__ = [
    "Choice",
    "Fitted",
    "LinearHeads",
    "LinearSVM",
    "Logistic",
    "NearestNeighbours",
    "Part",
    "Probe",
    "Probed",
    "Prototypes",
    "Ridge",
    "Rows",
    "Selection",
    "SgdHeads",
    "Site",
    "Test",
    "Train",
    "accuracy",
    "choose",
    "draw_fraction",
    "draw_low_shot",
    "draw_shots",
    "evaluate",
    "few_shots",
    "fold",
    "hold_out",
    "mean_auroc",
    "mean_average_precision",
    "minimise",
    "neighbours",
    "select",
    "tied_for_best",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
Setting = Mapping[str, Any]
Metric = Callable[[Array, Array], float]
Normalise = Literal["none", "l2", "l2+1e-5", "standard"]

_CHUNK = 8192  # rows streamed at once

# DINOv2's 45 costs of logistic regression, four a decade, written out: computed, their last digits differ by processor.
COSTS = (*(float(f"{digits}e{power}") for power in range(-6, 5) for digits in ("1", "1.78", "3.16", "5.62")), 1e5)


class Rows:
    """Rows of a feature matrix (N, D), read in chunks as float32, so that a matrix on disk stays there.

    ``index`` picks rows. ``norm`` is applied to each chunk.
    """

    def __init__(self, base: Array, index: Ints | None = None, norm: Callable[[Tensor], Tensor] | None = None) -> None:
        if base.ndim != 2:
            raise UsageError(
                f"features of shape {base.shape}", cause="features are (samples, width)", fix="pool or flatten them"
            )
        self.base, self.index, self.norm = base, index, norm

    def __len__(self) -> int:
        return len(self.base) if self.index is None else len(self.index)

    @property
    def width(self) -> int:
        return int(self.base.shape[1])

    def take(self, index: Ints) -> Rows:
        """Some of these rows, not copied."""
        return Rows(self.base, index if self.index is None else self.index[index], self.norm)

    def normalised(self, norm: Callable[[Tensor], Tensor] | None) -> Rows:
        """These rows with another normalisation."""
        return Rows(self.base, self.index, norm)

    def at(self, where: slice | Ints, device: torch.device | str = "cpu") -> Tensor:
        """(b, D) float32 on a device."""
        rows = self.base[where if self.index is None else self.index[where]]
        with warnings.catch_warnings():  # a read-only map: torch warns that writing to it is undefined; we do not
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            tensor = torch.from_numpy(np.ascontiguousarray(rows))
        tensor = tensor.to(device, torch.float32)
        return tensor if self.norm is None else self.norm(tensor)

    def chunks(self, device: torch.device | str = "cpu", size: int = _CHUNK) -> Iterator[tuple[slice, Tensor]]:
        """(places, rows) from the first to the last."""
        for start in range(0, len(self), size):
            where = slice(start, min(start + size, len(self)))
            yield where, self.at(where, device)

    def resident(self, device: torch.device | str) -> Tensor | None:
        """All rows on the device, if they take no more than a third of what is free there."""
        if len(self) * self.width * 4 > _free_memory(torch.device(device)) // 3:
            return None
        return self.at(slice(None), device)


@dataclass(frozen=True)
class Train:
    """What may be learnt from. ``features`` {name: (N, D)}: the outputs to choose among, or the only one.

    ``labels`` are (N,) classes from 0, or (N, L) with 1, 0 and -1 (unknown) per label. ``groups`` (N,) name each
    sample's patient or scene: no group is on both sides of a validation split. ``classes`` is their number, where the
    training data may lack some.
    """

    features: Mapping[str, Array]
    labels: Array
    groups: Array | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        sizes = {name: len(array) for name, array in self.features.items()} | {"labels": len(self.labels)}
        if self.groups is not None:
            sizes["groups"] = len(self.groups)
        if len(set(sizes.values())) != 1 or not self.features or not len(self.labels):
            raise DataError(
                f"training data of different lengths: {sizes}",
                cause="features, labels and groups have one row a sample, and there is at least one",
                fix="leave out samples without a label before",
            )
        if self.labels.ndim == 1 and self.labels.min() < 0:
            raise DataError(
                f"{int((self.labels < 0).sum())} training samples have no class",
                cause="classes are counted from 0",
                fix="leave those samples out",
            )


class Test:
    """A test split. Its features are open; its labels are handed out once, in exchange for final scores."""

    __test__ = False  # nothing for pytest to collect

    def __init__(self, features: Mapping[str, Array], labels: Array) -> None:
        self.features = dict(features)
        self._reveal = _seal(np.asarray(labels))

    def reveal(self, scores: Array) -> Array:
        """The labels, for the one set of scores (M, ...) that this test set is for.

        Raises :class:`UsageError` the second time, or for scores of another length.
        """
        return self._reveal(scores)


@dataclass(frozen=True)
class Site:
    """Where and how a probe is fitted."""

    device: torch.device | str = "cpu"
    seed: int = 0
    progress: Progress = field(default_factory=lambda: Progress(quiet=True))


@dataclass(frozen=True)
class Part:
    """Training data of one output as a probe gets them: rows, labels as in :class:`Train`, groups, classes."""

    rows: Rows
    labels: Array
    groups: Array | None
    classes: int

    @property
    def multilabel(self) -> bool:
        return self.labels.ndim == 2

    def targets(self) -> Floats:
        """(N, C): one-hot classes, or the labels; unknown ones are NaN."""
        if self.multilabel:
            return np.where(self.labels < 0, np.nan, self.labels).astype(np.float32)
        return np.eye(self.classes, dtype=np.float32)[self.labels]


class Fitted(NamedTuple):
    """Scores (M, C) of one setting on the points asked for, and what there is to tell of the fit."""

    scores: Floats
    details: Mapping[str, Any] = {}
    warnings: tuple[str, ...] = ()


class Probe(Protocol):
    """A family of heads. ``scale`` says what its scores are."""

    @property
    def scale(self) -> Literal["logits", "probabilities", "margins"]: ...

    def settings(self, samples: int) -> list[dict[str, Any]]:
        """The grid for that many training samples, from the simplest head to the most flexible."""
        ...

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], site: Site) -> Iterator[Fitted]:
        """Fit all settings on ``part``; their scores on ``points``, in order."""
        ...


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

    def splits(self, labels: Array, seed: int, groups: Array | None = None) -> list[tuple[Ints, Ints]]:
        """Places to fit on and to validate on, once for each fold."""
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
    """A probe's answer on a test set: per-sample scores (M, C), the labels, and how the setting was chosen."""

    scores: Floats
    labels: Array
    choice: Choice
    details: Mapping[str, Any]
    warnings: tuple[str, ...]


def evaluate(
    probe: Probe,
    train: Train,
    test: Test,
    metric: Metric | None = None,
    *,
    normalise: Normalise = "none",
    selection: Selection | None = None,
    refit: bool = True,
    site: Site | None = None,
) -> Probed:
    """Choose a setting on training data, fit it on all of them, score once.

    Without ``refit`` there are no folds, the fit is on what selection fitted on, and what it held out stays out.
    ``metric(scores, labels)``, higher is better, defaults to :func:`accuracy` or :func:`mean_auroc`.
    """
    site, selection = site or Site(), selection or Selection()
    selection = selection if refit else dataclasses.replace(selection, folds_below=0)
    choice = select(probe, train, metric, normalise=normalise, selection=selection, site=site)
    name = choice.setting.get("features", next(iter(train.features)))
    index = None if refit else selection.splits(train.labels, site.seed, train.groups)[0][0]
    part, norm = _part(train, name, index, normalise, site)
    setting = {key: value for key, value in choice.setting.items() if key != "features"}
    fitted = next(iter(probe.fit(part, Rows(test.features[name], norm=norm), [setting], site)))
    labels = test.reveal(fitted.scores)
    return Probed(fitted.scores, labels, choice, fitted.details, (*choice.warnings, *fitted.warnings))


def select(
    probe: Probe,
    train: Train,
    metric: Metric | None = None,
    *,
    normalise: Normalise = "none",
    selection: Selection | None = None,
    site: Site | None = None,
) -> Choice:
    """The setting, and the output where there are several, with the best metric on what is held out of ``train``.

    Of equally good settings the middle one is taken (:func:`choose`). A setting whose scores are not finite loses. With
    one setting and one output nothing is held out. A choice at the edge of its grid is warned of: the best may lie
    beyond.
    """
    site = site or Site()
    metric = metric or (accuracy if train.labels.ndim == 1 else mean_auroc)
    grid = probe.settings(len(train.labels))
    if len(grid) == 1 and len(train.features) == 1:
        return Choice(grid[0], None, (), ())
    splits = (selection or Selection()).splits(train.labels, site.seed, train.groups)
    grid = probe.settings(min(len(fit) for fit, _ in splits))
    table: list[tuple[Setting, float]] = []
    for name in train.features:
        values = np.array([_validated(probe, train, name, split, grid, metric, normalise, site) for split in splits])
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
    site: Site,
) -> list[float]:
    """The metric of every setting of one output on what a split holds out; minus infinity where a fit diverged."""
    fit, held = split
    part, norm = _part(train, name, fit, normalise, site)
    fits = probe.fit(part, Rows(train.features[name], held, norm), grid, site)
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
    best = _middle(tied, [setting for setting, _ in table])
    doubts = [*_told(best, table)]
    many = len(tied) > 1 and 4 * len(tied) > len(table)
    if held < _FEW or many:
        by = f"chosen on {held} validation images{f' in {folds} folds' if folds > 1 else ''}"
        alike = f"{len(tied)} of {len(table)} settings are equally good, and the middle one is taken"
        doubts.append(f"{by}: {alike}" if many else f"{by}, few to choose among {len(table)} settings")
    return Choice(best, value, tuple(table), tuple(doubts), len(tied), held, folds)


_FEW = 100  # validation samples, of which one right or wrong moves an accuracy by a hundredth


def tied_for_best(table: Sequence[tuple[Setting, float]]) -> list[Setting]:
    """The settings whose scores differ from the best one's by no more than rounding errors."""
    value = max(value for _, value in table)
    return [setting for setting, other in table if other >= value - 1e-9]


def _middle(tied: Sequence[Setting], grid: Sequence[Setting]) -> Setting:
    """Of settings with the first one's words, that which is nearest to the middle of their numbers, axis by axis."""
    axes = [name for name, value in tied[0].items() if isinstance(value, int | float)]
    alike = [s for s in tied if all(s[name] == tied[0][name] for name in s if name not in axes)]
    steps = {name: {value: i for i, value in enumerate(sorted({s[name] for s in grid}))} for name in axes}
    places = np.array([[steps[name][s[name]] for name in axes] for s in alike]).reshape(len(alike), len(axes))
    middle = np.sort(places, axis=0)[(len(alike) - 1) // 2]
    return alike[int(np.abs(places - middle).sum(axis=1).argmin())]


def accuracy(scores: Array, labels: Array) -> float:
    """Top-1 accuracy of (M, C) scores."""
    return float(top_k_hits(scores, labels).mean())


def mean_auroc(scores: Array, labels: Array) -> float:
    """Macro AUROC over the labels that have positives and negatives."""
    return cast(float, macro(per_label("auroc", scores, labels)))


def mean_average_precision(scores: Array, labels: Array) -> float:
    """Mean over labels of VOC's average precision."""
    return cast(float, macro(per_label("envelope", scores, labels)))


def hold_out(labels: Array, fraction: float, seed: int, groups: Array | None = None) -> tuple[Ints, Ints]:
    """Training places to fit on and to validate on, both sorted.

    Each class gives its share, one sample at least where it has two; a class of one stays with the fit. With
    ``groups`` whole groups are held out, and shares are kept as well as they allow. Several labels a sample are
    split at random.
    """
    n = len(labels)
    if not 0 < fraction < 1:
        raise UsageError(f"a validation share of {fraction}", cause="it is between 0 and 1", fix="0.1 is usual")
    rng = np.random.default_rng(seed)
    if groups is not None:
        held = _held_groups(np.asarray(labels), np.asarray(groups), fraction, rng)
    elif labels.ndim == 2:
        held = rng.permutation(n)[: round(fraction * n)]
    else:
        shares = []
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares.append(members[: 0 if len(members) < 2 else max(1, round(fraction * len(members)))])
        held = np.concatenate(shares)
    mask = np.zeros(n, dtype=bool)
    mask[held] = True
    if mask.all() or not mask.any():
        raise _no_validation(n, groups)
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def fold(labels: Array, folds: int, seed: int, groups: Array | None = None) -> list[tuple[Ints, Ints]]:
    """Training places to fit on and to validate on, both sorted, of every fold; each sample is held out once.

    Folds have each class's share (scikit-learn's ``StratifiedKFold``, with ``groups`` ``StratifiedGroupKFold``); a
    sample of several labels counts with the rarest of those it has. A class of one sample stays with the fits. There
    are fewer folds where no class has a sample, or there is no group, for each. Raises :class:`DataError` where not
    even two can be made.
    """
    strata = statistics.strata(labels)
    units = [len(np.unique(strata if groups is None else groups[strata == s])) for s in np.unique(strata)]
    counts = np.bincount(strata)[np.unique(strata)] if groups is None else units
    count = min(folds, int(max(counts)), len(labels) if groups is None else len(np.unique(groups)))
    if count < 2:
        raise _no_validation(len(labels), groups)
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    with warnings.catch_warnings():  # of classes with fewer samples than folds, which are in some of them
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        parts = [held for _, held in kind(count, shuffle=True, random_state=seed).split(strata, strata, groups)]
    lone = np.flatnonzero(np.bincount(strata)[strata] == 1) if groups is None else np.zeros(0, dtype=np.int64)
    held = [np.setdiff1d(part, lone) for part in parts]
    splits = [(np.setdiff1d(np.arange(len(labels)), part), part) for part in held if len(part)]
    # where whole groups leave a single class, there is nothing to fit
    sound = [split for split in splits if len(np.unique(strata[split[0]])) > 1] if strata.max() else splits
    if not sound:
        raise _no_validation(len(labels), groups)
    return sound


def _no_validation(count: int, groups: Array | None) -> DataError:
    return DataError(
        f"no validation part can be made of {count} training samples",
        cause="every class has a single sample" if groups is None else "there is a single group, or one of each class",
        fix="choose a protocol with fixed hyper-parameters",
    )


def draw_fraction(labels: Array, fraction: float, seed: int, groups: Array | None = None) -> Ints:
    """A share of the training samples, sorted: of each class, one at least; with ``groups``, of the groups.

    With one seed a larger share holds a smaller one. Several labels a sample are drawn at random.
    """
    rng = np.random.default_rng(seed)
    units = labels if groups is None and labels.ndim == 1 else np.zeros(len(labels), dtype=np.int64)
    names, member = (None, np.arange(len(labels))) if groups is None else np.unique(groups, return_inverse=True)
    chosen = []
    for label in np.unique(units):
        pool = np.arange(len(names)) if names is not None else np.flatnonzero(units == label)
        pool = rng.permutation(pool)
        chosen.append(pool[: max(1, round(fraction * len(pool)))])
    return np.flatnonzero(np.isin(member, np.concatenate(chosen)))


def draw_shots(labels: Array, k: int, draw: int, seed: int) -> Ints:
    """Draw number ``draw`` of k samples a class, sorted. Raises :class:`DataError` for a class with fewer."""
    counts = np.bincount(labels)
    if (few := np.flatnonzero((counts < k) & (counts > 0))).size:
        raise DataError(
            f"class {few[0]} has {counts[few[0]]} training samples, fewer than {k}",
            cause="every shot is a sample of its own",
            fix="ask for fewer shots",
        )
    rng = np.random.default_rng([seed, k, draw])
    members = [rng.permutation(np.flatnonzero(labels == label))[:k] for label in np.unique(labels)]
    return np.sort(np.concatenate(members))


def draw_low_shot(targets: Array, k: int, draw: int, seed: int) -> list[Ints]:
    """The low-shot sets of VOC07 (VISSL): for each label of (N, L), k positives and (L - 1) k negatives.

    Unknown samples (-1) are never drawn. Where a label has fewer of either, all are taken.
    """
    rng = np.random.default_rng([seed, k, draw])
    sets = []
    for column in targets.T:
        positives = rng.permutation(np.flatnonzero(column == 1))[:k]
        negatives = rng.permutation(np.flatnonzero(column == 0))[: k * (targets.shape[1] - 1)]
        sets.append(np.sort(np.concatenate([positives, negatives])))
    return sets


def few_shots(
    probe: Probe,
    train: Train,
    points: Array,
    ks: Sequence[int],
    draws: int,
    *,
    normalise: Normalise = "none",
    site: Site | None = None,
) -> Iterator[tuple[int, int, Floats]]:
    """(k, draw, scores (M, C)) on ``points`` (M, D) of a probe fitted on each draw of k samples a class.

    The probe has one setting and ``train`` one output. Draws are those of :func:`draw_shots`; of several labels those
    of :func:`draw_low_shot`, and each label's head learns from its own samples. Minus infinity is the score of a label
    that cannot be fitted.
    """
    site = site or Site()
    name = next(iter(train.features))
    alone = Site(site.device, site.seed)  # its progress would be that of one small head
    (setting,) = probe.settings(len(train.labels))
    with site.progress.track("few shots", len(ks) * draws) as meter:
        for done, (k, draw) in enumerate((k, draw) for k in ks for draw in range(draws)):
            several, columns = train.labels.ndim == 2, []
            if several:
                sets = draw_low_shot(train.labels, k, draw, site.seed)
            else:
                sets = [draw_shots(train.labels, k, draw, site.seed)]
            for label, places in enumerate(sets):
                part, norm = _part(train, name, places, normalise, site)
                if several:
                    part = dataclasses.replace(part, labels=part.labels[:, [label]], classes=1)
                (fitted,) = probe.fit(part, Rows(points, norm=norm), [setting], alone)
                columns.append(fitted.scores)
            meter.update(done + 1)
            yield k, draw, np.concatenate(columns, axis=1)


# --- nearest neighbours -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NearestNeighbours:
    """Weighted k-NN (Wu et al. 2018; as in DINO): the k rows with the highest cosine vote with exp(cosine / T).

    Scores are the shares of the vote. Features are normalised to unit length here, whatever was done before.
    """

    ks: tuple[int, ...] = (10, 20, 100, 200)
    temperatures: tuple[float, ...] = (0.07,)
    scale: Literal["probabilities"] = "probabilities"

    def settings(self, samples: int) -> list[dict[str, Any]]:
        ks = [k for k in sorted(self.ks, reverse=True) if k <= samples]
        if not ks:
            raise DataError(
                f"{samples} training samples have no {min(self.ks)} neighbours",
                cause="k is larger than the training set",
                fix="ask for a smaller k",
            )
        return [{"k": k, "temperature": t} for k in ks for t in sorted(self.temperatures, reverse=True)]

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], site: Site) -> Iterator[Fitted]:
        similarity, index = neighbours(part.rows, points, max(s["k"] for s in settings), site.device)
        labels = torch.from_numpy(np.ascontiguousarray(part.labels))
        for setting in settings:
            near, where = similarity[:, : setting["k"]], index[:, : setting["k"]]
            weights = torch.softmax(near / setting["temperature"], dim=1)
            yield Fitted(self._votes(weights, labels[where], part).numpy())

    def _votes(self, weights: Tensor, labels: Tensor, part: Part) -> Tensor:
        if not part.multilabel:
            return torch.zeros(len(weights), part.classes).scatter_add_(1, labels, weights)
        known = (labels >= 0).float() * weights[:, :, None]  # of each label, those vote who know it
        return (known * (labels == 1)).sum(1) / known.sum(1).clamp_min(torch.finfo(torch.float32).tiny)


def neighbours(
    bank: Rows, points: Rows, k: int, device: torch.device | str = "cpu", *, rows: int = 1024, columns: int = 16384
) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of ``bank`` with the highest cosine to each point: (M, k) cosines, descending, and places.

    Of equal cosines the lower place comes first. ``rows`` x ``columns`` similarities are held at once, however large
    the bank is. On the CPU the best of blocks of 16 are looked at first: the k best are in the k best blocks.
    """
    k = min(k, len(bank))
    found = []
    whole = bank.resident(device)
    stored = None if whole is None else _unit(whole)
    for _, part in points.chunks(device, rows):
        queries = _unit(part)
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, len(bank), columns):
            where = slice(start, min(start + columns, len(bank)))
            columns_here = _unit(bank.at(where, device)) if stored is None else stored[where]
            values, places = _highest(queries @ columns_here.T, k)
            places = places + start
            if best is not None:  # both are sorted, and the places before are lower
                values, order = torch.cat([best[0], values], 1).sort(dim=1, descending=True, stable=True)
                places = torch.cat([best[1], places], 1).gather(1, order)
            best = values[:, :k], places[:, :k]
        assert best is not None
        found.append((best[0].cpu(), best[1].cpu()))
    return torch.cat([values for values, _ in found]), torch.cat([places for _, places in found])


def _highest(similarity: Tensor, k: int, block: int = 16) -> tuple[Tensor, Tensor]:
    """The k highest of each row, descending, the lower place first among equals; all where there are fewer."""
    count = similarity.shape[1]
    if count <= k:
        return similarity.sort(dim=1, descending=True, stable=True)
    values, places = _top(similarity, k + 1, block)
    # Which of several equals are in is topk's choice; only where equals lie across the border does it matter.
    torn = (values[:, k] == values[:, k - 1]).nonzero()[:, 0]
    values, places = values[:, :k], places[:, :k]
    if len(torn):
        sorted_values, sorted_places = similarity[torn].sort(dim=1, descending=True, stable=True)
        values[torn], places[torn] = sorted_values[:, :k], sorted_places[:, :k]
    places, order = places.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def _top(similarity: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """``topk`` with values descending, by way of the maxima of blocks where that pays."""
    rows, count = similarity.shape
    blocks = count // block
    if similarity.is_cuda or blocks < 4 * k:
        return similarity.topk(k, dim=1)
    maxima = similarity[:, : blocks * block].unflatten(1, (blocks, block)).amax(2)
    first = maxima.topk(k, dim=1, sorted=False).indices
    places = (first[:, :, None] * block + torch.arange(block)).flatten(1)
    rest = torch.arange(blocks * block, count).expand(rows, -1)
    places = torch.cat([places, rest], 1)
    values, order = similarity.gather(1, places).topk(k, dim=1)
    return values, places.gather(1, order)


@dataclass(frozen=True)
class Prototypes:
    """Nearest class mean (OBoW's few-shot classifier): unit-length features, their mean per class, again unit length.

    Scores are cosines times ``factor``.
    """

    factor: float = 10.0
    scale: Literal["logits"] = "logits"

    def settings(self, samples: int) -> list[dict[str, Any]]:
        return [{}]

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], site: Site) -> Iterator[Fitted]:
        targets = torch.from_numpy(np.nan_to_num(part.targets()))
        sums = torch.zeros(part.classes, part.rows.width, dtype=torch.float64, device=site.device)
        for where, rows in part.rows.chunks(site.device):
            sums += targets[where].to(site.device).T.double() @ _unit(rows).double()
        means = _unit(sums.float())
        scores = [self.factor * (_unit(rows) @ means.T).cpu() for _, rows in points.chunks(site.device)]
        for _ in settings:
            yield Fitted(torch.cat(scores).numpy())


# --- ridge and logistic regression ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ridge:
    """Least squares on targets +1 and -1 with an L2 penalty: the whole grid from one eigendecomposition.

    Minimises ``sum (x w + b - y)^2 + alpha |w|^2`` per class, b free: scikit-learn's ``RidgeClassifier``.
    """

    alphas: tuple[float, ...] = tuple(float(f"1e{e}") for e in range(-4, 7))
    scale: Literal["margins"] = "margins"

    def settings(self, samples: int) -> list[dict[str, Any]]:
        return [{"alpha": alpha} for alpha in sorted(self.alphas, reverse=True)]

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], site: Site) -> Iterator[Fitted]:
        targets = torch.from_numpy(np.nan_to_num(part.targets() * 2 - 1, nan=0.0)).double()
        basis = _Basis.of(part.rows, site.device)
        mean = targets.mean(0)
        cross = torch.zeros(basis.rank, part.classes, dtype=torch.float64, device=site.device)
        for where, rows in part.rows.chunks(site.device):
            cross += basis.project(rows).double().T @ (targets[where] - mean).to(site.device)
        projected = [(basis.project(rows)).double() for _, rows in points.chunks(site.device)]
        for setting in settings:
            weights = cross / (basis.eigenvalues + setting["alpha"])[:, None]
            yield Fitted(torch.cat([(z @ weights).cpu() + mean for z in projected]).float().numpy())


@dataclass(frozen=True)
class Logistic:
    """Logistic regression for a path of costs C, all of them solved at once by batched L-BFGS.

    Minimises scikit-learn's objective, ``C sum loss + |w|^2 / 2`` with a free intercept: softmax cross-entropy for
    three classes and more, one logistic loss for two, and one per label for several labels a sample (unknown ones
    left out). It ends when the gradient of the objective divided by C N is shorter than ``tolerance`` (scikit-learn
    compares its largest entry). ``together`` is how many costs are solved in one batch (None: as many as memory
    allows); each batch starts where the one before ended. A class that has no training samples scores minus infinity.
    """

    costs: tuple[float, ...] = COSTS
    tolerance: float = 1e-5
    max_evaluations: int = 1000
    together: int | None = None
    dtype: Literal["float32", "float64"] = "float32"
    scale: Literal["logits"] = "logits"

    def settings(self, samples: int) -> list[dict[str, Any]]:
        return [{"C": cost} for cost in sorted(self.costs)]

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], site: Site) -> Iterator[Fitted]:
        problem = _LogisticProblem(part, site.device, getattr(torch, self.dtype))
        costs = torch.tensor([s["C"] for s in settings], dtype=torch.float64)
        together = self.together or max(1, problem.fitting(len(costs)))
        start: Tensor | None = None
        projected = [problem.basis.project(rows) for _, rows in points.chunks(site.device)]
        for at in range(0, len(costs), together):
            here = costs[at : at + together]
            solution = problem.solve(here, start, self.tolerance, self.max_evaluations)
            start = solution.x[-1]
            for i in range(len(here)):
                yield self._fitted(problem, solution, i, float(here[i]), projected)

    def _fitted(
        self, problem: _LogisticProblem, solution: Solution, i: int, cost: float, projected: Sequence[Tensor]
    ) -> Fitted:
        details = {
            "objective": float(solution.value[i]) * cost * problem.samples,
            "gradient": float(solution.gradient_norm[i]),
            "evaluations": int(solution.evaluations[i]),
        }
        told: tuple[str, ...] = ()
        if not solution.converged[i]:
            told = (f"logistic regression at C={cost:g} stopped at a gradient of {details['gradient']:.2g}",)
        scores = torch.cat([problem.scores(solution.x[i], z).cpu() for z in projected])
        return Fitted(scores.numpy(), details, told)


class _Basis:
    """The principal axes of centred features: mean (D,), axes (D, r), eigenvalues (r,) of the scatter matrix.

    An L2 penalty leaves a solution in the span of the centred features, so r numbers a class are enough.
    """

    def __init__(self, mean: Tensor, axes: Tensor, eigenvalues: Tensor) -> None:
        self.mean, self.axes, self.eigenvalues = mean, axes, eigenvalues
        self.rank = axes.shape[1]

    @classmethod
    def of(cls, rows: Rows, device: torch.device | str) -> _Basis:
        """From the scatter matrix, D x D, or from inner products, N x N, whichever is smaller; in float64."""
        total = torch.zeros(rows.width, dtype=torch.float64, device=device)
        for _, chunk in rows.chunks(device):
            total += chunk.sum(0, dtype=torch.float64)
        mean = total / len(rows)
        if len(rows) < rows.width:
            centred = rows.at(slice(None), device).double() - mean
            values, vectors = torch.linalg.eigh(centred @ centred.T)
            keep = _kept(values, rows)
            return cls(mean, centred.T @ vectors[:, keep] / values[keep].sqrt(), values[keep])
        scatter = torch.zeros(rows.width, rows.width, dtype=torch.float64, device=device)
        for _, chunk in rows.chunks(device):
            centred = chunk.double() - mean
            scatter += centred.T @ centred
        values, vectors = torch.linalg.eigh(scatter)
        keep = _kept(values, rows)
        return cls(mean, vectors[:, keep], values[keep])

    def project(self, rows: Tensor) -> Tensor:
        """(b, D) to (b, r), as precise as its input."""
        projected: Tensor = (rows - self.mean.to(rows.dtype)) @ self.axes.to(rows.dtype)
        return projected


def _kept(eigenvalues: Tensor, rows: Rows) -> Tensor:
    """Which eigenvalues are not rounding errors of a zero."""
    floor = eigenvalues[-1] * max(len(rows), rows.width) * torch.finfo(torch.float64).eps
    return (eigenvalues > floor).nonzero()[:, 0]


class _LogisticProblem:
    """Regularised logistic regression at many strengths, in the principal axes of the features.

    A point is (G, K, r + 1): weights along the axes, then the intercept of the centred features. K is the number of
    columns: the classes that are there, 1 for two, the labels where there are several a sample.
    """

    def __init__(self, part: Part, device: torch.device | str, dtype: torch.dtype) -> None:
        self.classes, self.dtype, self.device = part.classes, dtype, torch.device(device)
        self.rows, self.samples = part.rows, len(part.rows)
        self.basis = _Basis.of(part.rows, device)
        self._targets(part)
        self.data = self._resident()
        self.moments = torch.zeros(self.columns, self.basis.rank + 1, dtype=torch.float64, device=self.device)
        for where, z in self._chunks():
            y = self.targets[where].to(self.device, self.dtype).nan_to_num()
            self.moments[:, :-1] += (y.T @ z).double()
            self.moments[:, -1] += y.sum(0, dtype=torch.float64)

    def _targets(self, part: Part) -> None:
        targets = torch.from_numpy(part.targets())
        present = torch.arange(part.classes) if part.multilabel else targets.any(0).nonzero()[:, 0]
        if len(present) < 2 and not part.multilabel:
            raise DataError(
                "the training data hold a single class", cause="there is nothing to tell apart", fix="check the labels"
            )
        self.present, self.softmax = present, not part.multilabel and len(present) > 2
        binary = not part.multilabel and len(present) == 2
        self.targets = targets[:, present[1:]] if binary else targets[:, present]
        self.columns = self.targets.shape[1]
        self.known = None if not torch.isnan(self.targets).any() else ~torch.isnan(self.targets)

    def _resident(self) -> Tensor | None:
        if self.samples * self.basis.rank * 8 > _free_memory(self.device) // 2:
            return None
        return torch.cat([self.basis.project(rows.to(self.dtype)) for _, rows in self.rows.chunks(self.device)])

    def _chunks(self, size: int = _CHUNK) -> Iterator[tuple[slice, Tensor]]:
        if self.data is None:
            for where, rows in self.rows.chunks(self.device, size):
                yield where, self.basis.project(rows.to(self.dtype))
        else:
            for start in range(0, self.samples, size):
                yield slice(start, start + size), self.data[start : start + size]

    def fitting(self, wanted: int) -> int:
        """How many problems fit into a quarter of the free memory: a point, its history and its logits."""
        each = self.columns * ((self.basis.rank + 1) * 30 + 4 * 512) * self.dtype.itemsize
        return min(wanted, _free_memory(self.device) // 4 // each)

    def solve(self, costs: Tensor, start: Tensor | None, tolerance: float, most: int) -> Solution:
        """Solve for all ``costs`` (G,) at once, from ``start`` (K (r + 1),) or from zero."""
        penalty = (1 / (costs * self.samples)).to(self.device, self.dtype)
        shape = (len(costs), self.columns * (self.basis.rank + 1))
        x = torch.zeros(shape, dtype=self.dtype, device=self.device) if start is None else start.expand(shape)
        scatter = torch.cat([self.basis.eigenvalues / self.samples, self.basis.eigenvalues.new_ones(1)])
        scatter = scatter.to(self.dtype)
        curvature = torch.ones(len(costs), self.columns, dtype=self.dtype, device=self.device)

        def value(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            values, gradient, curvature[which] = self._value(points, penalty[which])
            return values, gradient

        def precondition(vectors: Tensor, which: Tensor) -> Tensor:
            # The Hessian, were the probabilities of all samples alike: curvature times scatter, plus the penalty.
            diagonal = curvature[which, :, None] * scatter
            diagonal[:, :, :-1] += penalty[which, None, None]
            moved: Tensor = vectors.unflatten(1, (self.columns, -1)) / diagonal
            return moved.flatten(1)

        return minimise(value, x.clone(), precondition, tolerance=tolerance, max_evaluations=most)

    def _value(self, points: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss plus penalty (G,), its gradient (G, P), and the mean curvature of the loss (G, K)."""
        count, weights = len(points), points.unflatten(1, (self.columns, -1))
        flat = weights.transpose(0, 1).reshape(self.columns * count, -1)  # (K G, r + 1): classes lead
        slopes, offsets = flat[:, :-1].contiguous(), flat[:, -1:].contiguous()
        # Targets enter linearly: sum of y z w is the product with the moments, once for all samples.
        loss = -(self.moments * weights.double()).sum((1, 2))
        gradient = -self.moments.to(self.dtype).repeat(count, 1, 1)
        curvature = None
        for where, z in self._chunks(max(256, min(4096, 1 << 20 // (self.columns * count)))):
            logits = torch.addmm(offsets, slopes, z.T).unflatten(0, (self.columns, count))
            known = None if self.known is None else self.known[where].T[:, None].to(self.device)
            part, p = self._loss(logits, known)
            loss += part
            if curvature is None:  # of the first chunk; it serves the preconditioner alone
                curvature = self._curvature(p)
            flat_p = p.flatten(0, 1)
            step = torch.cat([flat_p @ z, flat_p.sum(1, keepdim=True)], 1)
            gradient += step.unflatten(0, (self.columns, count)).transpose(0, 1)
        gradient = gradient / self.samples
        gradient[:, :, :-1] += penalty[:, None, None] * weights[:, :, :-1]
        square = weights[:, :, :-1].double().pow(2).sum((1, 2))
        assert curvature is not None
        return loss / self.samples + penalty.double() * square / 2, gradient.flatten(1), curvature

    def _loss(self, logits: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of the losses but for the targets' linear term (G,), and the probabilities, in place of logits."""
        if self.softmax:
            top = logits.amax(0)
            p = logits.sub_(top).exp_()
            total = p.sum(0)
            p *= total.reciprocal()
            return (top + total.log_()).sum(1, dtype=torch.float64), p
        terms = torch.nn.functional.softplus(logits)
        p = logits.sigmoid_()
        if known is not None:
            terms, p = terms * known, p * known
        return terms.sum((0, 2), dtype=torch.float64), p

    def _curvature(self, p: Tensor) -> Tensor:
        if self.softmax:
            spread = ((1 - p.pow(2).sum(0)).mean(1) / (self.columns - 1))[:, None].expand(-1, self.columns)
        else:
            spread = (p * (1 - p)).mean(2).T
        return spread.clamp_min(1e-6)

    def scores(self, x: Tensor, z: Tensor) -> Tensor:
        """(b, C) logits of points given along the axes."""
        weights = x.unflatten(0, (self.columns, -1))
        logits: Tensor = (z.to(self.dtype) @ weights[:, :-1].T + weights[:, -1]).float()
        if not self.softmax and self.columns == 1 and self.classes > 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        if logits.shape[1] == self.classes:
            return logits
        table = torch.full((len(z), self.classes), -math.inf, device=logits.device)
        table[:, self.present.to(logits.device)] = logits
        return table


class Solution(NamedTuple):
    """Minima of G functions: points (G, P), values, gradient lengths, evaluations and whether each converged (G,)."""

    x: Tensor
    value: Tensor
    gradient_norm: Tensor
    evaluations: Tensor
    converged: Tensor


def minimise(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    precondition: Callable[[Tensor, Tensor], Tensor],
    *,
    tolerance: float,
    max_evaluations: int = 1000,
    history: int = 10,
) -> Solution:
    """L-BFGS (Nocedal and Wright 2006, algorithm 7.4) on G smooth convex functions at once, each at its own pace.

    ``function(points (g, P), which (g,))`` gives values (g,), float64, and gradients (g, P) of the functions
    ``which``; ``precondition(vectors, which)`` applies an approximate inverse Hessian. Every evaluation moves each
    function on by one trial, accepted or shortened, and those that are done drop out of the batch. A function is done
    when its gradient is no longer than ``tolerance``, and given up when neither it nor a shorter step brings it lower
    than rounding errors.
    """
    count, device = len(x), x.device
    noise = 8 * torch.finfo(x.dtype).eps
    which = torch.arange(count, device=device)
    value, gradient = function(x, which)
    evaluations = torch.ones(count, dtype=torch.long, device=device)
    memory = _History(x, history)
    direction = -precondition(gradient, which)
    step = torch.ones(count, dtype=x.dtype, device=device)
    tries, idle = torch.zeros_like(evaluations), torch.zeros_like(evaluations)
    norm = gradient.norm(dim=1)
    for _ in range(max_evaluations - 1):
        which = ((norm > tolerance) & (tries < 20) & (idle < 5)).nonzero()[:, 0]
        if not len(which):
            break
        trial = x[which] + step[which, None] * direction[which]
        found, slope_there = function(trial, which)
        evaluations[which] += 1
        slope = (gradient[which] * direction[which]).sum(1).double()
        length = step[which].double()
        limit = value[which] + 1e-4 * length * slope + noise * value[which].abs()
        good = torch.isfinite(found) & (found <= limit)
        bad = which[~good]
        # Shorten to the minimum of the parabola through what is known, within a tenth and a half.
        parabola = -slope * length / (2 * (found - value[which] - slope * length)).clamp_min(1e-300)
        shorter = (torch.nan_to_num(parabola, 0.1).clamp(0.1, 0.5) * length).to(x.dtype)
        step[bad] = shorter[~good]
        tries[bad] += 1
        done = which[good]
        memory.push(done, trial[good] - x[done], slope_there[good] - gradient[done])
        length_there = slope_there[good].norm(dim=1)
        gained = (value[done] - found[good] > noise * value[done].abs()) | (length_there < 0.9 * norm[done])
        idle[done] = torch.where(gained, 0, idle[done] + 1)
        x[done], value[done], gradient[done] = trial[good], found[good], slope_there[good]
        norm[done], step[done], tries[done] = length_there, 1.0, 0
        direction[done] = -memory.inverse_hessian(gradient[done], done, precondition)
    return Solution(x, value, norm, evaluations, norm <= tolerance)


class _History:
    """The last steps and changes of gradient of each function: (m, G, P) rings, each with its own place."""

    def __init__(self, x: Tensor, length: int) -> None:
        self.length = length
        self.steps, self.changes = x.new_zeros(length, *x.shape), x.new_zeros(length, *x.shape)
        self.inverse = x.new_zeros(length, len(x))  # 1 / (step . change); 0: there is none
        self.place = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def push(self, which: Tensor, step: Tensor, change: Tensor) -> None:
        product = (step * change).sum(1)
        # Convex, so never negative but for rounding; such a pair would spoil the estimate.
        sound = product > torch.finfo(step.dtype).eps * step.norm(dim=1) * change.norm(dim=1)
        which, step, change = which[sound], step[sound], change[sound]
        place = self.place[which]
        self.steps[place, which], self.changes[place, which] = step, change
        self.inverse[place, which] = 1 / product[sound]
        self.place[which] = (place + 1) % self.length

    def inverse_hessian(
        self, vector: Tensor, which: Tensor, precondition: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The two-loop recursion around the preconditioner, scaled to the newest pair."""
        places = [(self.place[which] - 1 - j) % self.length for j in range(self.length)]
        factors = []
        vector = vector.clone()
        for place in places:
            factor = self.inverse[place, which] * (self.steps[place, which] * vector).sum(1)
            vector -= factor[:, None] * self.changes[place, which]
            factors.append(factor)
        change, inverse = self.changes[places[0], which], self.inverse[places[0], which]
        scale = 1 / (inverse * (change * precondition(change, which)).sum(1))
        result = precondition(vector, which) * torch.where(inverse > 0, scale, 1.0)[:, None]
        for place, factor in zip(reversed(places), reversed(factors), strict=True):
            back = self.inverse[place, which] * (self.changes[place, which] * result).sum(1)
            result += (factor - back)[:, None] * self.steps[place, which]
        return result


# --- heads trained by SGD ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SgdHeads:
    """Linear heads trained by SGD, one for each learning rate and weight decay, all in one pass over the features.

    The rate falls along a cosine to zero, step by step. Heads on augmented images are :mod:`evalsuite.heads`.
    """

    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...] = (0.0,)
    epochs: int = 100
    batch_size: int = 256
    momentum: float = 0.9
    scale: Literal["logits"] = "logits"

    def settings(self, samples: int) -> list[dict[str, Any]]:
        decays, lrs = sorted(self.weight_decays, reverse=True), sorted(self.lrs)
        return [{"lr": lr, "weight_decay": decay} for lr in lrs for decay in decays]

    def rate(self, epoch: float) -> float:
        """The factor on the learning rate after ``epoch`` epochs."""
        return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], site: Site) -> Iterator[Fitted]:
        heads = LinearHeads(
            part.rows.width, part.classes, [s["lr"] for s in settings], [s["weight_decay"] for s in settings],
            momentum=self.momentum, seed=site.seed, device=site.device,
        )  # fmt: skip
        whole, targets = part.rows.resident(site.device), torch.from_numpy(part.targets()).to(site.device)
        samples, rng = len(part.rows), np.random.default_rng(site.seed)
        starts = range(0, samples, self.batch_size)
        with site.progress.track("linear heads", self.epochs * len(starts)) as meter:
            for epoch in range(self.epochs):
                order = rng.permutation(samples)
                for i, start in enumerate(starts):
                    batch = np.sort(order[start : start + self.batch_size])
                    index = torch.from_numpy(batch).to(site.device)
                    x = part.rows.at(batch, site.device) if whole is None else whole[index]
                    rate = self.rate(epoch + i / len(starts))
                    loss = heads.step(x, targets[index], rate, softmax=not part.multilabel)
                    if (epoch * len(starts) + i) % 100 == 0:
                        meter.update(epoch * len(starts) + i, loss=float(loss.min()))
            meter.update(self.epochs * len(starts))
        yield from (Fitted(scores) for scores in self._scores(heads, points, site))

    def _scores(self, heads: LinearHeads, points: Rows, site: Site) -> Iterator[Floats]:
        for head in range(heads.count):  # one at a time: all at once would be G x M x C numbers
            yield torch.cat([heads.scores(x, head).cpu() for _, x in points.chunks(site.device)]).numpy()


class LinearHeads:
    """G linear heads on the same features, and SGD on them, one learning rate and weight decay each.

    ``weight`` is (D, G, C) and ``bias`` (G, C), so that the heads of a batch are one matrix product, and so is their
    gradient. As ``torch.optim.SGD``: ``g += decay w; v = momentum v + g; w -= lr v``. Weights start from N(0, 0.01),
    the same for all heads; biases from zero.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        lrs: Sequence[float],
        weight_decays: Sequence[float],
        *,
        momentum: float = 0.9,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.count, self.momentum = len(lrs), momentum
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(width, 1, classes, generator=generator) * 0.01
        self.weight = first.repeat(1, self.count, 1).to(device)
        self.bias = torch.zeros(self.count, classes, device=device)
        self.velocity = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self.lr = torch.tensor(lrs, dtype=torch.float32, device=device)[:, None]
        self.decay = torch.tensor(weight_decays, dtype=torch.float32, device=device)[:, None]

    def step(self, x: Tensor, targets: Tensor, rate: float = 1.0, *, softmax: bool = True) -> Tensor:
        """One step on features (B, D) and targets (B, C), NaN where unknown; the loss of each head before it (G,).

        ``rate`` is the factor on the learning rates. ``softmax``: cross-entropy; else a logistic loss per label,
        averaged over what is known.
        """
        logits = (x @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias  # (B, G, C)
        known = ~torch.isnan(targets[:, None])
        y = targets[:, None].nan_to_num()
        if softmax:
            logs = torch.log_softmax(logits, 2)
            loss, error, total = -(logs * y).sum((0, 2)), logs.exp() - y, len(x)
        else:
            terms = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none")
            loss, error, total = (terms * known).sum((0, 2)), (logits.sigmoid() - y) * known, max(1, int(known.sum()))
        error = error / total
        self._update(self.weight, (x.T @ error.flatten(1)).view_as(self.weight), 0, rate)
        self._update(self.bias, error.sum(0), 1, rate)
        return loss / total

    def scores(self, x: Tensor, head: int) -> Tensor:
        """(B, C) logits of one head."""
        return x @ self.weight[:, head] + self.bias[head]

    def _update(self, tensor: Tensor, gradient: Tensor, place: int, rate: float) -> None:
        velocity = self.velocity[place].mul_(self.momentum).add_(gradient + self.decay * tensor)
        tensor.sub_(self.lr * rate * velocity)


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

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], site: Site) -> Iterator[Fitted]:
        x, where = part.rows.at(slice(None)).numpy(), points.at(slice(None)).numpy()
        targets, costs = part.targets(), sorted(self.costs)
        scores = np.full((len(points), part.classes), -np.inf, dtype=np.float32)
        chosen: list[float | None] = []
        told: list[str] = []
        tied = 0
        with site.progress.track("svm", part.classes) as meter, _convergence(told):
            for label in range(part.classes):
                keep = slice(None) if self.unknown == "negative" else ~np.isnan(targets[:, label])
                y = np.where(targets[keep, label] == 1, 1, -1)
                groups = None if part.groups is None else part.groups[keep]
                cost, alike = self._cost(x[keep], y, groups, costs, site.seed)
                chosen.append(cost)
                tied += alike > 1
                if cost is not None:
                    scores[:, label] = self._machine(cost, site.seed).fit(x[keep], y).decision_function(where)
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
            yield Fitted(scores, {"C": chosen}, tuple(told))

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
        return _middle(tied, tied)["C"], len(tied)

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


# --- inside -----------------------------------------------------------------------------------------------------


def _seal(labels: Array) -> Callable[[Array], Array]:
    """Labels behind a function that gives them once."""
    opened = False

    def reveal(scores: Array) -> Array:
        nonlocal opened
        if opened:
            raise UsageError(
                "this test set was scored before",
                cause="labels are shown once, so that nothing can be chosen by them",
                fix="choose on training data with select(), and score the choice",
            )
        if len(scores) != len(labels):
            raise UsageError(
                f"{len(scores)} scores for {len(labels)} test samples",
                cause="there is one row of scores a sample",
                fix="score all test samples, in their order",
            )
        opened = True
        return labels

    return reveal


def _part(
    train: Train, name: str, index: Ints | None, normalise: Normalise, site: Site
) -> tuple[Part, Callable[[Tensor], Tensor] | None]:
    """The training data of one output at ``index`` (None: all), and the normalisation learnt from them."""
    rows = Rows(train.features[name], index)
    norm = _normaliser(rows, normalise, site.device)
    labels = train.labels if index is None else train.labels[index]
    groups = train.groups if index is None or train.groups is None else train.groups[index]
    found = train.labels.shape[1] if train.labels.ndim == 2 else int(train.labels.max()) + 1
    return Part(rows.normalised(norm), labels, groups, train.classes or found), norm


def _normaliser(rows: Rows, kind: Normalise, device: torch.device | str) -> Callable[[Tensor], Tensor] | None:
    if kind == "none":
        return None
    if kind == "l2":
        return _unit
    if kind == "l2+1e-5":
        return lambda x: x / (x.norm(dim=1, keepdim=True) + 1e-5)
    total = torch.zeros(rows.width, dtype=torch.float64, device=device)
    square = torch.zeros_like(total)
    shift = rows.at(slice(0, 1), device)[0].double()  # so that the squares of large, nearly equal numbers do not cancel
    for _, chunk in rows.chunks(device):
        moved = chunk.double() - shift
        total += moved.sum(0)
        square += moved.pow(2).sum(0)
    mean = total / len(rows)
    spread = (square / len(rows) - mean**2).clamp_min(0).sqrt()
    centre, scale = (mean + shift).float(), torch.where(spread > 0, spread, 1.0).float()
    return lambda x: (x - centre.to(x.device)) / scale.to(x.device)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)


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


def _held_groups(labels: Array, groups: Array, fraction: float, rng: np.random.Generator) -> Ints:
    """Whole groups, about ``fraction`` of the samples, with the classes' shares as near as may be."""
    names, member = np.unique(groups, return_inverse=True)
    kinds = np.eye(int(labels.max()) + 1)[labels] if labels.ndim == 1 else (labels == 1).astype(np.float64)
    counts = np.concatenate([kinds, np.ones((len(labels), 1))], axis=1)
    of_group = np.zeros((len(names), counts.shape[1]))
    np.add.at(of_group, member, counts)
    wanted = fraction * counts.sum(axis=0)
    held: list[int] = []
    have = np.zeros_like(wanted)
    for group in rng.permutation(len(names)):
        # Take a group where that brings the shares nearer to what is wanted; classes weigh alike.
        now, then = (((have + extra - wanted) / np.maximum(wanted, 1)) for extra in (0.0, of_group[group]))
        if (then**2).sum() < (now**2).sum() and len(held) < len(names) - 1:
            held.append(group)
            have += of_group[group]
    return np.flatnonzero(np.isin(member, held))


def _free_memory(device: torch.device) -> int:
    """Bytes that may be taken: on the GPU, or of this machine within the limit of its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as table:
        free = next(int(line.split()[1]) * 1024 for line in table if line.startswith("MemAvailable:"))
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
    except OSError:  # no control groups of version 2
        return free
    return free if limit.strip() == "max" else max(0, min(free, int(limit) - int(used)))
