"""Whether a folder of results from a stranger can be taken into a leaderboard: every fault on a line of its own.

Nothing in it is trusted. Files are looked at before they are opened, opened before they are believed, and what they
say of themselves is checked against what the suite knows: tasks, protocols and their hashes, promised metrics, the
path of a cell, and the per-sample scores from which its numbers must follow.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evalsuite import statistics
from evalsuite.board import report, site, table
from evalsuite.compare import compare
from evalsuite.errors import DataError, Refusal, SubmissionError
from evalsuite.hooks import Registry
from evalsuite.results import BY_FILE_SIZES, DEEPEST, Result, cell_path, read_arrays, validated
from evalsuite.task import Metric, Protocol, Task

__all__ = ["CARD", "Card", "Fault", "check", "refuse_faults"]

CARD = "submission.json"
LARGEST = {".json": 4 << 20, ".npz": 64 << 20, ".png": 8 << 20, ".gif": 8 << 20}  # bytes, by suffix
WHOLE = 512 << 20
MANY = 20_000  # files
CLOSE = 1e-4  # how far a score may be from what its samples say: files hold 32 bits
NAME = re.compile(r"[\w .+:/@()=,#%~-]{1,200}")  # of backbones and requests: nothing that means something in HTML
Arrays = dict[str, npt.NDArray[Any]]


class Card(BaseModel):
    """``submission.json``: who submits what, in words."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    name: str = Field(min_length=1, max_length=100)
    authors: list[str] = Field(min_length=1, max_length=100)
    licence: str = Field(min_length=1, max_length=100)
    description: str = Field(default="", max_length=2000)
    url: str = Field(default="", max_length=300, pattern=r"^(https://[^\s<>\"']+)?$")


@dataclass(frozen=True, order=True)
class Fault:
    """What is wrong, and with which file of the submission."""

    path: str
    problem: str

    def __str__(self) -> str:
        """One line, whatever the file is called."""
        return " ".join(f"{_printable(self.path)}: {_printable(self.problem)}".split())


def check(folder: str | Path, registry: Registry) -> list[Fault]:
    """Every fault of a submission, sorted; none: it can be taken.

    A submission is ``submission.json`` (:class:`Card`) and cells as ``evalsuite run`` writes them below ``results/``.
    One without a fault is made into a leaderboard, a report and comparisons besides, for others are built with it.
    Raises :class:`DataError` where there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir() or root.is_symlink():
        raise DataError(
            f"{root} is no folder",
            cause="a submission is a folder with submission.json and results/",
            fix="give the folder; unpack an archive first",
        )
    files, faults = _files(root)
    faults += _check_card(root, files)
    cells: dict[Path, Result] = {}
    for path in sorted(files):
        if path.match("seed-*.json"):
            parsed = _read(path)
            if isinstance(parsed, Result):
                cells[path] = parsed
            else:
                faults += [Fault(_name(path, root), problem) for problem in parsed]
    if not any(path.match("seed-*.json") for path in files):
        faults.append(Fault(".", "there is no result: no seed-*.json below results/"))
    owned = {root / CARD}
    for path, result in cells.items():
        beside = [path.with_name(name) for name in result.files.values() if _plain(name)]
        owned |= {path, *beside}
        faults += [Fault(_name(path, root), problem) for problem in _problems(path, result, root, files, registry)]
    broken = {path for path in files if path.match("seed-*.json")} - set(cells)
    for path in sorted(set(files) - owned - broken):
        faults.append(Fault(_name(path, root), "no result refers to this file"))
    faults += _duplicates(cells, root)
    return sorted(set(faults or _tried(root, cells)))


def refuse_faults(faults: list[Fault], folder: str | Path) -> None:
    """Raise :class:`SubmissionError` where there are any."""
    if faults:
        raise SubmissionError(
            f"{folder} cannot be taken: {len(faults)} fault{'s' if len(faults) > 1 else ''}",
            cause=str(faults[0]) + (f"; and {len(faults) - 1} more above" if len(faults) > 1 else ""),
            fix="mend them and check again; scores are mended by evaluating again, not by hand",
        )


# --- files ------------------------------------------------------------------------------------------------------


def _files(root: Path) -> tuple[set[Path], list[Fault]]:
    """The regular files of known kinds and sizes; everything else is a fault, and is not opened."""
    files, faults, total = set(), [], 0
    for count, path in enumerate(_walk(root), 1):
        if count > MANY:
            faults.append(Fault(".", f"more than {MANY} files"))
            break
        problem, size = _unfit(path, root)
        total += size
        if problem:
            faults.append(Fault(_name(path, root), problem))
        else:
            files.add(path)
    if total > WHOLE:
        faults.append(Fault(".", f"{total / 2**20:.0f} MiB in all; {WHOLE >> 20} MiB are taken"))
    return files, faults


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root, followlinks=False):
        names.sort()
        for name in sorted(files) + [n for n in names if (Path(folder) / n).is_symlink()]:
            yield Path(folder) / name


def _unfit(path: Path, root: Path) -> tuple[str | None, int]:
    """Why a file is not opened, and its size."""
    about = path.lstat()
    if stat.S_ISLNK(about.st_mode):
        return "a link; it could lead anywhere", 0
    if not stat.S_ISREG(about.st_mode):
        return "not a regular file", 0
    if not all(part.isprintable() and NAME.fullmatch(part) for part in path.relative_to(root).parts):
        return "a name with characters that are not taken", about.st_size
    if path.suffix not in LARGEST:
        return (
            f"files of kind {path.suffix or 'without a suffix'} are not taken: {', '.join(LARGEST)} are",
            about.st_size,
        )
    if about.st_size > LARGEST[path.suffix]:
        return (
            f"{about.st_size / 2**20:.0f} MiB; {LARGEST[path.suffix] >> 20} MiB are taken of {path.suffix}",
            about.st_size,
        )
    return None, about.st_size


def _check_card(root: Path, files: set[Path]) -> list[Fault]:
    path = root / CARD
    if path not in files:
        return [Fault(CARD, "it is missing: name, authors, licence; description and url if you like")]
    content = _json(path)
    if isinstance(content, str):
        return [Fault(CARD, content)]
    try:
        Card.model_validate(content)
    except ValidationError as error:
        return [Fault(CARD, _message(fault)) for fault in error.errors()]
    return []


def _json(path: Path) -> Any:
    """The content of a JSON file, or in words why there is none."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except RecursionError:
        return "not JSON: nested too deeply"
    except (OSError, ValueError) as error:
        return f"not JSON: {error}"
    if not isinstance(content, dict):
        return "not JSON of one object"
    return content if _depth(content) <= DEEPEST else f"nested more than {DEEPEST} levels deep"


def _depth(value: Any) -> int:
    deepest, left = 0, [(value, 1)]
    while left:
        inner, depth = left.pop()
        deepest = max(deepest, depth)
        children = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()
        left += [(child, depth + 1) for child in children]
    return deepest


def _read(path: Path) -> Result | list[str]:
    content = _json(path)
    if isinstance(content, str):
        return [content]
    if strange := sorted(set(content) - set(Result.model_fields)):
        return [f"unknown field {name}" for name in strange]
    try:
        return validated(content)
    except ValidationError as error:
        return [_message(fault) for fault in error.errors()[:5]]
    except ValueError as error:
        return [str(error)]


# --- one cell ---------------------------------------------------------------------------------------------------


def _problems(path: Path, result: Result, root: Path, files: set[Path], registry: Registry) -> Iterator[str]:
    yield from _of_words(result)
    yield from _of_path(path, result, root)
    if result.status != "ok":
        yield "it failed; only results that came to an end are taken"
        return
    yield from (f"it is {flag}, and such results are not ranked" for flag in _unranked(result))
    try:
        task: Task = registry.get("task", result.task)()
        protocol = task.protocol(result.protocol.id)
    except Refusal as refusal:
        yield refusal.problem
        return
    yield from _of_recipe(result, task, protocol)
    if not protocol.ranked:
        yield f"protocol {protocol.id} is for trying things out, and results by it are not ranked"
    yield from _of_scores(result, task.promises(protocol))
    for name in result.files.values():
        if not _plain(name):
            yield f"file name {name!r} leads out of its folder"
        elif path.with_name(name) not in files:
            yield f"file {name} is missing, or is not taken"
        elif name.endswith(".npz") and isinstance(reason := _arrays(path.with_name(name)), str):
            yield f"file {name}: {reason}"
    samples = result.files.get("samples", "")
    if _plain(samples) and path.with_name(samples) in files:
        yield from _of_samples(path.with_name(samples), result)
    elif not samples:
        yield "it has no samples or replicates: its scores cannot be checked"


def _of_words(result: Result) -> Iterator[str]:
    """Names go into pages and paths; metadata must be whole."""
    for what, text in (("backbone name", result.backbone.name), ("backbone request", result.backbone.request)):
        if not NAME.fullmatch(text):
            yield f"{what} {text[:60]!r} has characters that are not taken"
    if not re.fullmatch(r"[0-9a-f]{64}", result.backbone.identity):
        yield "backbone identity is no sha256"
    if not isinstance(result.backbone.spec.get("arch"), str) or not result.backbone.spec["arch"]:
        yield "backbone spec is incomplete: no arch"
    if not result.command:
        yield "command is empty"
    packages = result.environment.get("packages")
    if not isinstance(packages, dict) or "evalsuite" not in packages:
        yield "environment does not say which version of evalsuite it was"
    if not isinstance(result.data.get("fingerprint"), str) or not result.data["fingerprint"]:
        yield "data have no fingerprint"
    if result.by_file_sizes:
        yield f"it was {BY_FILE_SIZES}; evaluate it again"
    try:
        datetime.fromisoformat(result.created)
    except ValueError:
        yield f"created {result.created[:40]!r} is no date"


def _of_path(path: Path, result: Result, root: Path) -> Iterator[str]:
    """The path of a cell follows from its content; what variants differ in (engine, data) may follow the protocol."""
    due = cell_path(root, result.backbone.name, result.backbone.identity, result.task, result.protocol, result.seed)
    backbone, recipe = path.parent.parent, path.parent.name
    at_home = backbone == due.parent.parent and (recipe == due.parent.name or recipe.startswith(due.parent.name + "+"))
    if not at_home or path.name != due.name:
        yield f"it belongs to {due.relative_to(root)}"


def _unranked(result: Result) -> list[str]:
    flags = {
        "limited": result.limited is not None, "of a demo world": result.demo,
        "of a checkpoint that was trusted blindly": result.trusted,
        "of a checkpoint that loaded in part": result.partial,
        "of a modified protocol": bool(result.protocol.modified),
    }  # fmt: skip
    return [flag for flag, raised in flags.items() if raised]


def _of_recipe(result: Result, task: Task, protocol: Protocol) -> Iterator[str]:
    if result.task_version != task.version:
        yield f"task {task.name} is of version {task.version} now, this is of {result.task_version}"
    if result.protocol.version != protocol.version:
        yield f"protocol {protocol.id} is of version {protocol.version} now, this is of {result.protocol.version}"
    elif not result.protocol.modified and result.protocol.hash != protocol.hash:
        yield f"protocol {protocol.id} has hash {protocol.hash}, this says {result.protocol.hash[:20]}"
    elif not result.protocol.modified and result.protocol.seeded > protocol.seeded:
        yield f"protocol {protocol.id} draws nothing, and this counts its seeds"
    if result.engine is not None and result.engine not in task.engines:
        yield f"task {task.name} has no engine {result.engine!r}"
    if result.engine is None and task.engines:
        yield f"task {task.name} runs on {' or '.join(task.engines)}, and this names none"
    if result.primary != task.leading(protocol):
        yield f"the metric that counts is {task.leading(protocol)}, not {result.primary}"


def _of_scores(result: Result, promised: tuple[Metric, ...]) -> Iterator[str]:
    metrics = {metric.name: metric for metric in promised}
    for name in sorted(set(metrics) - set(result.scores)):
        yield f"score {name} is missing"
    for name, score in result.scores.items():
        if name not in metrics:
            yield f"score {name} is none of this task's"
            continue
        metric = metrics[name]
        if score.higher_is_better != metric.higher_is_better:
            yield f"score {name}: {'higher' if metric.higher_is_better else 'lower'} is better"
        if score.value is not None and not metric.low <= score.value <= metric.high:
            yield f"score {name} is {score.value:g}, outside [{metric.low:g}, {metric.high:g}]"
        if score.low is not None and score.high is not None and score.low > score.high:
            yield f"score {name} has an interval from {score.low:g} down to {score.high:g}"


def _of_samples(path: Path, result: Result) -> Iterator[str]:
    """The claimed numbers must follow from the stored ones: scores from samples, intervals from replicates."""
    arrays = _arrays(path)
    if isinstance(arrays, str):
        return  # reported already
    for name, score in result.scores.items():
        samples, replicates = arrays.get(f"samples/{name}"), arrays.get(f"replicates/{name}")
        if samples is not None and (score.value is None or abs(float(samples.mean()) - score.value) > CLOSE):
            claimed = "undefined" if score.value is None else f"{score.value:.6g}"
            yield f"score {name} is said to be {claimed}, its samples say {float(samples.mean()):.6g}"
        if replicates is None or score.low is None or score.high is None or score.value is None:
            continue
        low, high = statistics.score_interval(replicates, samples, arrays.get("samples/group"), score.level)
        if not (math.isclose(low, score.low, abs_tol=CLOSE) and math.isclose(high, score.high, abs_tol=CLOSE)):
            yield (
                f"score {name} is said to lie in [{score.low:.6g}, {score.high:.6g}], "
                f"its {'replicates' if samples is None else 'samples'} say [{low:.6g}, {high:.6g}]"
            )
        if not np.nanmin(replicates) - CLOSE <= score.value <= np.nanmax(replicates) + CLOSE:
            yield f"score {name} is {score.value:.6g}, and no replicate of it is as far out"
    if not any(name.startswith(("samples/", "replicates/")) for name in arrays):
        yield f"file {path.name} holds neither samples nor replicates"


def _arrays(path: Path) -> Arrays | str:
    """Finite arrays of numbers or text, read without unpickling; or in words why there are none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        odd = [name for name in names if ".." in PurePosixPath(name).parts or name[:1] == "/"]
        if odd:
            return f"member {odd[0]!r} leads out of the archive"
        arrays = read_arrays(path)
    except ValueError as error:
        pickled = "pickle" in str(error)
        return "it holds pickled objects, which are never opened" if pickled else f"cannot be read: {error}"
    except Exception as error:  # a broken archive raises nearly anything
        return f"cannot be read: {type(error).__name__}: {error}"
    ids = arrays.get("ids")
    if ids is not None and (ids.ndim != 1 or ids.dtype.kind not in "US"):
        return "ids are no row of names"
    for name, array in arrays.items():
        if name.startswith("samples/"):
            if array.dtype.kind not in "fiub" or array.ndim != 1 or not array.size or not np.isfinite(array).all():
                return f"{name} is no row of finite numbers"
            if ids is not None and len(array) != len(ids):
                return f"{name} has {len(array)} values, and there are {len(ids)} ids"
        if name.startswith("replicates/") and (
            array.dtype.kind not in "fiu" or array.ndim != 1 or np.isinf(array).any() or np.isnan(array).all()
        ):
            return f"{name} is no row of numbers"
    return arrays


def _tried(root: Path, cells: dict[Path, Result]) -> Iterator[Fault]:
    """What goes wrong when this submission alone is made into a board, a report, and comparisons with itself."""
    folders = sorted({path.parent.parent for path in cells})
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        attempts: dict[str, Callable[[], object]] = {
            "leaderboard": lambda: site.build(table.collect([root]), out / "site"),
            "report": lambda: report.report(root, out / "report.html"),
            "comparison": lambda: [compare([each, each / ".." / each.name]) for each in folders],
        }
        for name, attempt in attempts.items():
            try:
                attempt()
            except Exception as error:  # whatever it is, it would end everybody's
                cause = error.problem if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
                yield Fault(".", f"no {name} can be made of it: {cause}")


def _duplicates(cells: dict[Path, Result], root: Path) -> Iterator[Fault]:
    seen: dict[tuple[Any, ...], Path] = {}
    for path, r in cells.items():
        data = str(r.data.get("fingerprint"))
        key = (r.backbone.identity, r.task, r.protocol.hash, r.engine, r.seed, r.limited, r.demo, data)
        if key in seen:
            yield Fault(_name(path, root), f"the same cell as {_name(seen[key], root)}")
        seen.setdefault(key, path)


def _plain(name: str) -> bool:
    return bool(name) and NAME.fullmatch(name) is not None and "/" not in name and name not in (".", "..")


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _message(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])


def _printable(text: str) -> str:
    """No terminal is steered by what a stranger wrote."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:500]
