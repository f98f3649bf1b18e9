"""The leaderboard as numbers: who was scored on what, how sure that is, and which ranks it allows.

A column is one task by one protocol, engine and data: results that differ in any of them never meet. Only results
that may be ranked count (:attr:`evalsuite.results.Result.ranked`); the others are named with the reason.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evalsuite.errors import DataError
from evalsuite.results import BY_FILE_SIZES, Result, cell_files, read

__all__ = ["Board", "Column", "Contender", "Standing", "collect"]

FIELDS = (
    "backbone", "identity", "arch", "method", "parameters", "flops", "task", "protocol", "protocol_hash", "engine",
    "data", "metric", "value", "low", "high", "seeds", "rank", "best", "worst", "tied",
)  # fmt: skip
WIDTH = statistics.NormalDist().inv_cdf(0.975)  # standard deviations in half an interval of 95 %


@dataclass(frozen=True)
class Column:
    """What was measured. ``key`` is unique among columns, ``title`` is for people."""

    key: str
    title: str
    task: str
    protocol: str
    protocol_hash: str
    engine: str | None
    data: str
    metric: str
    higher_is_better: bool


@dataclass(frozen=True)
class Contender:
    """A backbone. ``label`` is its name, with the beginning of its identity where two have the same name."""

    label: str
    identity: str
    arch: str
    method: str
    parameters: int
    flops: int | None
    spec: Mapping[str, Any]
    provenance: Mapping[str, Any]
    load: Mapping[str, Any]


@dataclass(frozen=True)
class Standing:
    """One backbone in one column: the mean over its seeds, and what can be said of its rank.

    Of a protocol that draws nothing it is the run of the lowest seed, and ``seeds`` is None.

    The interval joins both sources of doubt: half its width is 1.96 sqrt(w^2 + s^2 / n), where w is the mean standard
    deviation that the runs' own intervals over samples stand for, and s the standard deviation over n seeds. ``best``
    and ``worst`` bound the rank: as many are surely better, or surely worse, as have intervals wholly on one side;
    None without an interval. ``tied``: not separable from the first.
    """

    value: float
    low: float | None
    high: float | None
    seeds: int | None
    rank: int = 0
    best: int | None = None
    worst: int | None = None
    tied: bool = False
    encode_ms: float | None = None
    device: str = ""
    command: str = ""
    created: str = ""


@dataclass(frozen=True)
class Board:
    """``standings[column key][label]``; ``unranked`` says which results were left out, and why."""

    columns: tuple[Column, ...]
    contenders: tuple[Contender, ...]
    standings: Mapping[str, Mapping[str, Standing]]
    unranked: tuple[str, ...] = ()
    references: tuple[Mapping[str, Any], ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "columns": [asdict(column) for column in self.columns],
            "backbones": [asdict(contender) for contender in self.contenders],
            "standings": {
                key: {label: asdict(standing) for label, standing in column.items()}
                for key, column in self.standings.items()
            },
            "unranked": list(self.unranked),
            "references": [dict(reference) for reference in self.references],
        }

    def to_csv(self) -> str:
        """One line a backbone and column. Text that a spreadsheet would run as a formula is made text."""
        out = io.StringIO()
        writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
        writer.writeheader()
        known = {contender.label: contender for contender in self.contenders}
        for column in self.columns:
            for label, standing in self.standings[column.key].items():
                row = {**asdict(column), **asdict(known[label]), **asdict(standing), "backbone": label}
                writer.writerow({name: _tame(row[name]) for name in FIELDS})
        return out.getvalue()


def collect(folders: Iterable[str | Path], references: Sequence[Mapping[str, Any]] = ()) -> Board:
    """Read all cells below the folders and rank them. What is no result is named among the unranked.

    Raises :class:`DataError` for a folder that is not there, and where nothing below them can be ranked.
    """
    cells: defaultdict[str, defaultdict[str, dict[int, Result]]] = defaultdict(lambda: defaultdict(dict))
    columns: dict[str, Column] = {}
    backbones: dict[str, Result] = {}
    unranked: list[str] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DataError(
                f"{folder} is no folder", cause="there is nothing to read", fix="give --out of evalsuite run"
            )
        for path in cell_files(folder):
            name = path.relative_to(folder).as_posix()
            try:
                result = read(path)
            except DataError as error:  # one file of a stranger's does not end everybody's board
                unranked.append(f"{name}: it cannot be read: {error.cause}")
                continue
            if reason := _why_not(result):
                unranked.append(f"{name}: {reason}")
                continue
            column = _column(result)
            columns[column.key] = column
            identity = result.backbone.identity
            backbones.setdefault(identity, result)
            if result.seed in cells[column.key][identity]:
                unranked.append(f"{name}: the same cell is there twice")
                continue
            cells[column.key][identity][result.seed] = result
    if not columns:
        raise DataError(
            "there is nothing to rank",
            cause="; ".join(unranked[:3]) or "no seed-*.json below the folders",
            fix="evaluate without --demo, --limit and --set; see: evalsuite run --help",
        )
    labels = _labels(backbones)
    standings = {
        key: _ranked({labels[i]: _standing(list(runs.values())) for i, runs in cell.items()}, columns[key])
        for key, cell in cells.items()
    }
    ordered = sorted(_titled(columns.values()), key=lambda column: column.title)
    contenders = sorted((_contender(labels[i], r) for i, r in backbones.items()), key=lambda c: c.label)
    return Board(
        tuple(ordered),
        tuple(contenders),
        {c.key: standings[c.key] for c in ordered},
        tuple(unranked),
        tuple(references),
    )


def _why_not(result: Result) -> str | None:
    """Why a result is not ranked."""
    score = result.scores.get(result.primary)
    reasons = {
        "it failed": result.status != "ok", "a demo world": result.demo, "limited data": result.limited is not None,
        "a modified protocol": bool(result.protocol.modified),
        "a protocol that is for trying things out": not result.protocol.ranked,
        "a checkpoint that was trusted blindly": result.trusted,
        "a checkpoint that loaded in part": result.partial,
        BY_FILE_SIZES: result.by_file_sizes,
        f"{result.primary} is undefined": score is None or score.value is None,
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), None)


def _column(result: Result) -> Column:
    data = str(result.data.get("fingerprint"))
    protocol = f"{result.protocol.id}-{result.protocol.version}"
    engine = result.engine
    return Column(
        key="|".join([result.task, protocol, result.protocol.hash, engine or "", data]), title="", task=result.task,
        protocol=protocol, protocol_hash=result.protocol.hash, engine=engine, data=data, metric=result.primary,
        higher_is_better=result.scores[result.primary].higher_is_better,
    )  # fmt: skip


def _titled(columns: Iterable[Column]) -> list[Column]:
    """The shortest titles that are unique: task, protocol, then engine, hash and data where they differ."""
    known = list(columns)
    titles = {c.key: f"{c.task} {c.protocol}" for c in known}
    for part in ("engine", "protocol_hash", "data"):
        counts = Counter(titles.values())
        for column in known:
            if counts[titles[column.key]] > 1:
                titles[column.key] += f" {str(getattr(column, part))[:16]}"
    return [Column(**{**asdict(column), "title": titles[column.key]}) for column in known]


def _labels(backbones: Mapping[str, Result]) -> dict[str, str]:
    """Names; equal ones with as much of the identity as makes them unique in brackets that no submission's name has."""
    labels = {identity: result.backbone.name for identity, result in backbones.items()}
    for digits in (8, 64):
        counts = Counter(labels.values())
        labels |= {
            identity: f"{backbones[identity].backbone.name} [{identity[:digits]}]"
            for identity, label in labels.items()
            if counts[label] > 1
        }
    return labels


def _contender(label: str, result: Result) -> Contender:
    record = result.backbone
    provenance = record.provenance
    method = provenance.get("recipe") or provenance.get("method") or ""
    return Contender(
        label=label, identity=record.identity, arch=str(record.spec.get("arch", "")), method=str(method),
        parameters=record.parameters, flops=record.flops, spec=record.spec, provenance=provenance, load=record.load,
    )  # fmt: skip


def _standing(runs: Sequence[Result]) -> Standing:
    """All seeds of one cell as one."""
    first = min(runs, key=lambda run: run.seed)
    runs = runs if first.protocol.seeded else [first]
    scores = [run.scores[run.primary] for run in runs]
    values = [score.value for score in scores if score.value is not None]
    halves = [(s.high - s.low) / 2 for s in scores if s.low is not None and s.high is not None]
    mean = statistics.fmean(values)
    low = high = None
    if len(halves) == len(values):
        within = statistics.fmean(halves) / WIDTH
        between = statistics.stdev(values) if len(values) > 1 else 0.0
        half = WIDTH * math.sqrt(within**2 + between**2 / len(values))
        # the runs' own intervals need not lie evenly around their scores
        skew = statistics.fmean((s.high + s.low) / 2 - s.value for s in scores if None not in (s.low, s.high, s.value))  # type: ignore[operator]
        low, high = mean + skew - half, mean + skew + half
    environment = first.environment
    encoded = first.details.get("encoded")
    images = encoded if isinstance(encoded, int) and "encode" in first.timings else 0
    return Standing(
        value=mean, low=low, high=high, seeds=len(values) if first.protocol.seeded else None,
        encode_ms=1000 * first.timings["encode"] / images if images > 0 else None,
        device=str(environment.get("gpu") or environment.get("device") or ""),
        command=first.command, created=first.created,
    )  # fmt: skip


def _ranked(standings: Mapping[str, Standing], column: Column) -> dict[str, Standing]:
    """Best first, with ranks and their bounds."""
    sign = 1 if column.higher_is_better else -1
    order = sorted(standings, key=lambda label: (-sign * standings[label].value, label))
    sides = {label: _sides(standings[label], sign) for label in order}
    lows = sorted(side[0] for side in sides.values() if side)
    highs = sorted(side[1] for side in sides.values() if side)
    ranked: dict[str, Standing] = {}
    top = sides[order[0]]
    for position, label in enumerate(order, 1):
        standing, side = standings[label], sides[label]
        best = worst = None
        if side is not None:
            best = 1 + len(lows) - bisect_right(lows, side[1])
            worst = len(order) - bisect_left(highs, side[0])
        rank = position
        if position > 1 and standing.value == standings[order[position - 2]].value:
            rank = ranked[order[position - 2]].rank
        tied = label != order[0] and side is not None and top is not None and side[1] >= top[0]
        ranked[label] = Standing(**{**asdict(standing), "rank": rank, "best": best, "worst": worst, "tied": tied})
    return ranked


def _sides(standing: Standing, sign: int) -> tuple[float, float] | None:
    """The interval with the better end last."""
    if standing.low is None or standing.high is None:
        return None
    return (standing.low, standing.high) if sign > 0 else (-standing.high, -standing.low)


def _tame(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value
