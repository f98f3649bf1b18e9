"""Which backbone is better, and is the difference significant: from result files alone, no network and no GPU.

Cells are compared where task, protocol, engine, data and limits are the same. The test is on paired samples: both
backbones saw the same images, and their per-sample scores and bootstrap replicates are stored in the same order.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evalsuite import statistics
from evalsuite.errors import DataError, RegressionError, UsageError
from evalsuite.results import BY_FILE_SIZES, Result, arrays, read, read_all

__all__ = ["Comparison", "Estimate", "Pair", "Report", "compare", "refuse_worse"]

ALPHA = 0.05
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A backbone's score: the mean over its seeds, with its interval over samples and seeds.

    ``seeds`` is None of a protocol that draws nothing; its score is that of the lowest seed.
    """

    value: float
    low: float | None
    high: float | None
    seeds: int | None


@dataclass(frozen=True)
class Pair:
    """Two backbones on one task. ``difference`` is second less first, in the metric's own units.

    ``p`` is of the ``test`` that decides: ``mcnemar`` for hits of single images, ``permutation`` for other per-sample
    scores or where samples come in groups, ``bootstrap`` where there are several seeds or no per-sample scores.
    ``tests`` has all that could be made. ``adjusted`` is ``p`` after Holm over all pairs and tasks. ``improvement``
    is the share of replicates in which the second is better, ties counting half. All are None where the results hold
    neither samples nor replicates.
    """

    first: str
    second: str
    difference: float
    low: float | None = None
    high: float | None = None
    test: str | None = None
    p: float | None = None
    adjusted: float | None = None
    improvement: float | None = None
    tests: Mapping[str, float] | None = None

    @property
    def separable(self) -> bool:
        """Whether the difference is more than chance, at a family-wise error rate of 5 %."""
        return self.adjusted is not None and self.adjusted < ALPHA


@dataclass(frozen=True)
class Comparison:
    """One task by one protocol. ``groups`` are runs of the ranking, best first, without a significant difference."""

    task: str
    protocol: str
    metric: str
    higher_is_better: bool
    scores: Mapping[str, Estimate]
    pairs: tuple[Pair, ...]
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """All comparisons. ``backbones`` are the labels with the sha256 of their weights; ``skipped`` says what was not
    compared, and why."""

    backbones: Mapping[str, str]
    comparisons: tuple[Comparison, ...]
    skipped: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        report = asdict(self)
        for comparison, original in zip(report["comparisons"], self.comparisons, strict=True):
            for pair, known in zip(comparison["pairs"], original.pairs, strict=True):
                pair["separable"] = known.separable
        return report

    def markdown(self) -> str:
        """Tables for people: scores, pairs, and which backbones are not significantly different."""
        lines = [f"- **{_cell(label)}** {identity[:12]}" for label, identity in self.backbones.items()]
        for comparison in self.comparisons:
            lines += ["", *_section(comparison)]
        lines += ["", f"p after Holm over all pairs and tasks; significant below {ALPHA:g}. Intervals are of 95 %."]
        if self.skipped:
            lines += ["", "Not compared:", *(f"- {_cell(line)}" for line in self.skipped)]
        return "\n".join(lines) + "\n"


def compare(paths: Sequence[str | Path]) -> Report:
    """Compare the backbones in folders of results or single result files, each on its tasks' primary metric.

    Raises :class:`UsageError` for fewer than two backbones or nothing in common, and :class:`DataError` for what is no
    result, or results that were scored on other samples than their fingerprint says.
    """
    entries = _labelled([entry for path in paths for entry in _entries(Path(path))])
    if len({e.label for e in entries}) < 2:
        raise UsageError(
            "there is nothing to compare",
            cause=f"{', '.join(map(str, paths))} hold {len({e.label for e in entries})} evaluated backbone",
            fix="evalsuite compare RUNS_A RUNS_B, each a folder of results or a result file",
        )
    cells, skipped = _cells(entries)
    made = [_compared(key, cell) for key, cell in cells.items()]
    if not made:
        raise UsageError(
            "the backbones have no task in common",
            cause="; ".join(skipped[:3]) or "no two of them were scored by one protocol on the same data",
            fix="evaluate them with the same tasks, protocols and data",
        )
    return Report({e.label: e.result.backbone.identity for e in entries}, tuple(_adjusted(made)), tuple(skipped))


def refuse_worse(report: Report, limits: Mapping[str, float]) -> None:
    """Raise :class:`RegressionError` where a backbone is worse than the first by more than a task's limit.

    ``limits`` are {task: delta}, in the units of the task's primary metric; delta 0 allows no loss at all. It is the
    scores that count, not their intervals. Raises :class:`UsageError` where a backbone was not compared with the
    first on one of the tasks.
    """
    baseline = next(iter(report.backbones))
    worse = []
    for task, delta in limits.items():
        pairs = [(c, p) for c in report.comparisons if c.task == task for p in c.pairs if p.first == baseline]
        missing = set(report.backbones) - {p.second for _, p in pairs} - {baseline}
        if missing:
            raise UsageError(
                f"--fail-if-worse {task}: {', '.join(sorted(missing))} was not compared with {baseline} on it",
                cause="; ".join(report.skipped[:3]) or f"compared were {_tasks(report)}",
                fix="name a task that all were evaluated on, by the same protocol and on the same data",
            )
        for comparison, pair in pairs:
            loss = -pair.difference if comparison.higher_is_better else pair.difference
            if loss > delta:
                worse.append(f"{pair.second} on {task}@{comparison.protocol} by {loss:.4f} {comparison.metric}")
    if worse:
        raise RegressionError(
            f"worse than {baseline} by more than is allowed",
            cause="; ".join(worse),
            fix="look at what changed, or allow a larger --fail-if-worse TASK:DELTA",
        )


def _tasks(report: Report) -> str:
    return ", ".join(sorted({c.task for c in report.comparisons}))


# --- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    argument: Path
    path: Path
    result: Result
    label: str = ""


Key = tuple[str, str, str, str | None, int | None, bool, str]
_Cell = dict[str, list[_Entry]]


def _entries(path: Path) -> list[_Entry]:
    if not path.exists():
        raise DataError(f"{path} was not found", cause="there is no such file or folder", fix="check the path")
    results = [(path, read(path))] if path.is_file() else list(read_all(path))
    if not results:
        raise DataError(
            f"{path} holds no result", cause="there is no seed-*.json below it", fix="give the --out of evalsuite run"
        )
    return [_Entry(path, where, result) for where, result in results]


def _labelled(entries: Sequence[_Entry]) -> list[_Entry]:
    """Entries with their backbones' names; the argument, or the weights, go with a name that is there twice.

    The same weights in two arguments are two backbones: comparing two runs of one backbone shows that no
    difference is significant.
    """
    known = list(dict.fromkeys((e.argument, e.result.backbone.name, e.result.backbone.identity) for e in entries))
    names = Counter(name for _, name, _ in known)
    counts = Counter((argument, name) for argument, name, _ in known)
    labels = {}
    for argument, name, identity in known:
        label = name if names[name] == 1 else f"{name} ({argument})"
        labels[argument, name, identity] = label if counts[argument, name] == 1 else f"{label} {identity[:8]}"
    return [
        _Entry(e.argument, e.path, e.result, labels[e.argument, e.result.backbone.name, e.result.backbone.identity])
        for e in entries
    ]


def _cells(entries: Iterable[_Entry]) -> tuple[dict[Key, _Cell], list[str]]:
    """Entries by what makes them comparable, then by backbone; and what has nobody to be compared with."""
    cells: defaultdict[Key, _Cell] = defaultdict(lambda: defaultdict(list))
    skipped = []
    for entry in entries:
        result = entry.result
        score = result.scores.get(result.primary)
        if result.status != "ok" or score is None or score.value is None:
            reason = "it failed" if result.status != "ok" else f"its {result.primary} is undefined"
            skipped.append(f"{entry.label} on {_recipe(result)}, seed {result.seed}: {reason}")
            continue
        if result.by_file_sizes:
            message = f"{entry.label} on {_recipe(result)}, seed {result.seed}: {BY_FILE_SIZES}; evaluate it again"
            skipped.append(message)
            continue
        key = (
            result.task, f"{result.protocol.id}-{result.protocol.version}", result.protocol.hash, result.engine,
            result.limited, result.demo, str(result.data.get("fingerprint")),
        )  # fmt: skip
        cells[key][entry.label].append(entry)
    for key in [key for key, cell in cells.items() if len(cell) < 2]:
        label, alone = next(iter(cells.pop(key).items()))
        skipped.append(f"{label} on {_recipe(alone[0].result)}: nobody else by this protocol on these data")
    return dict(cells), skipped


def _recipe(result: Result) -> str:
    return f"{result.task}@{result.protocol.id}-{result.protocol.version}"


@dataclass(frozen=True)
class _Evidence:
    """What a backbone's results hold of one metric: mean, seeds, and per-sample scores and replicates, if any."""

    value: float
    runs: int
    seeds: int | None
    ids: npt.NDArray[np.str_] | None
    samples: Floats | None
    replicates: Floats | None
    groups: npt.NDArray[np.int64] | None


def _evidence(entries: Sequence[_Entry], metric: str, stream: int) -> _Evidence:
    seeded = entries[0].result.protocol.seeded
    entries = entries if seeded else [min(entries, key=lambda entry: entry.result.seed)]
    tables = [arrays(entry.path, entry.result, "samples") for entry in entries]
    values = [score.value for e in entries if (score := e.result.scores[metric]).value is not None]
    samples = [t[f"samples/{metric}"] for t in tables if f"samples/{metric}" in t]
    replicates = [t[f"replicates/{metric}"] for t in tables if f"replicates/{metric}" in t]
    for what, rows in (("samples", samples), ("replicates", replicates)):
        if any(row.ndim != 1 or len(row) != len(rows[0]) for row in rows):
            raise DataError(
                f"the seeds of {entries[0].label} have different numbers of {what}",
                cause=f"{metric}: {', '.join(str(row.shape) for row in rows)}",
                fix="evaluate all seeds again, on the same data",
            )
    whole = len(entries)
    return _Evidence(
        float(np.mean(values)),
        whole,
        whole if seeded else None,
        tables[0].get("ids"),
        np.mean(np.stack(samples), axis=0) if len(samples) == whole else None,
        statistics.over_seeds(replicates, stream) if len(replicates) == whole else None,
        tables[0].get("samples/group"),
    )


# --- comparing --------------------------------------------------------------------------------------------------


def _compared(key: Key, cell: _Cell) -> Comparison:
    first = next(iter(cell.values()))[0].result
    metric, better = first.primary, first.scores[first.primary].higher_is_better
    evidence = {label: _evidence(entries, metric, i) for i, (label, entries) in enumerate(cell.items())}
    pairs = tuple(_pair(a, b, evidence[a], evidence[b], better) for a, b in itertools.combinations(evidence, 2))
    return Comparison(key[0], key[1], metric, better, {label: _estimate(e) for label, e in evidence.items()}, pairs, ())


def _estimate(evidence: _Evidence) -> Estimate:
    if evidence.replicates is None:
        return Estimate(evidence.value, None, None, evidence.seeds)
    samples = evidence.samples if evidence.runs == 1 else None  # of several runs the replicates hold the seeds, too
    return Estimate(evidence.value, *_bounds(evidence.replicates, samples, evidence.groups), evidence.seeds)


def _bounds(
    replicates: Floats, samples: Floats | None = None, groups: npt.NDArray[np.int64] | None = None
) -> tuple[float | None, float | None]:
    low, high = statistics.score_interval(replicates, samples, groups)
    return (None, None) if np.isnan(low) else (low, high)


def _pair(first: str, second: str, a: _Evidence, b: _Evidence, better: bool) -> Pair:
    lengths = {len(e.samples) for e in (a, b) if e.samples is not None}
    if (a.ids is not None and b.ids is not None and not np.array_equal(a.ids, b.ids)) or len(lengths) > 1:
        raise DataError(
            f"{first} and {second} were scored on other samples",
            cause="their fingerprints are equal, but the ids stored with their scores are not",
            fix="evaluate both again",
        )
    difference, tests = b.value - a.value, dict[str, float]()
    low = high = improvement = None
    if a.replicates is not None and b.replicates is not None and len(a.replicates) == len(b.replicates):
        moved = b.replicates - a.replicates
        low, high = _bounds(moved)
        tests["bootstrap"] = statistics.bootstrap_test(moved)
        gained = moved if better else -moved
        improvement = float(np.mean((gained > 0) + 0.5 * (gained == 0)))
    if a.samples is not None and b.samples is not None:
        tests["permutation"] = statistics.permutation_test(b.samples - a.samples, a.groups)
        if a.groups is None and all(np.isin(s, (0, 1)).all() for s in (a.samples, b.samples)):
            tests["mcnemar"] = statistics.mcnemar_test(a.samples, b.samples)
    test = _deciding(tests, max(a.seeds or 1, b.seeds or 1))
    return Pair(first, second, difference, low, high, test, tests.get(test or ""), None, improvement, tests or None)


def _deciding(tests: Mapping[str, float], seeds: int) -> str | None:
    """Samples alone do not show what another seed would give; of several seeds the bootstrap over both decides."""
    order = ("bootstrap", "permutation") if seeds > 1 else ("mcnemar", "permutation", "bootstrap")
    return next((name for name in order if name in tests), None)


def _adjusted(made: Sequence[Comparison]) -> list[Comparison]:
    """With p-values adjusted over all pairs of all tasks, and with the groups that follow."""
    ps = iter(statistics.holm([p.p for c in made for p in c.pairs if p.p is not None]))
    adjusted = []
    for comparison in made:
        pairs = tuple(
            Pair(**{**vars(pair), "adjusted": next(ps)}) if pair.p is not None else pair for pair in comparison.pairs
        )
        ranked = sorted(
            comparison.scores, key=lambda n: comparison.scores[n].value, reverse=comparison.higher_is_better
        )
        different = {pair for p in pairs if p.separable for pair in ((p.first, p.second), (p.second, p.first))}
        runs = statistics.ties(ranked, different)
        adjusted.append(Comparison(**{**vars(comparison), "pairs": pairs, "groups": tuple(map(tuple, runs))}))
    return adjusted


# --- rendering --------------------------------------------------------------------------------------------------


def _section(comparison: Comparison) -> list[str]:
    arrow = "higher" if comparison.higher_is_better else "lower"
    lines = [
        f"## {_cell(comparison.task)}@{_cell(comparison.protocol)}: {comparison.metric}, {arrow} is better",
        "", "| backbone | score | interval | seeds |", "|---|---|---|---|",
    ]  # fmt: skip
    for label, e in comparison.scores.items():
        lines.append(f"| {_cell(label)} | {e.value:.4f} | {_interval(e.low, e.high)} | {e.seeds or ''} |")
    lines += [
        "",
        "| pair | difference | interval | test | p | p (Holm) | significant |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in comparison.pairs:
        numbers = ("", "", "") if p.p is None or p.adjusted is None else (p.test, f"{p.p:.4g}", f"{p.adjusted:.4g}")
        verdict = "no samples" if p.p is None else "yes" if p.separable else "no"
        lines.append(
            f"| {_cell(p.second)} less {_cell(p.first)} | {p.difference:+.4f} | {_interval(p.low, p.high)} "
            f"| {numbers[0]} | {numbers[1]} | {numbers[2]} | {verdict} |"
        )
    tied = [group for group in comparison.groups if len(group) > 1]
    lines += ["", *(f"Not separable: {', '.join(_cell(label) for label in group)}" for group in tied)]
    return lines if tied else lines[:-1]


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"


def _cell(text: str) -> str:
    """Text of strangers in a table: no line and no cell of its own making, and no HTML."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return flat.replace("|", "\\|")
