"""From a request to result cells: what to run, what is there already, what failed and why."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evalsuite import statistics
from evalsuite.checkpoints import NEEDED, Loaded, load_backbone
from evalsuite.data import is_generated, source
from evalsuite.data.digests import data_session
from evalsuite.environment import (
    cache_root,
    data_root,
    describe,
    expanded,
    peak_memory,
    pick_device,
    reset_peak_memory,
    versions,
)
from evalsuite.errors import DataError, Refusal, ResourceError, UsageError
from evalsuite.files import atomic, forget_partials, is_aside, room_for, set_aside, writable
from evalsuite.hooks import Registry, load
from evalsuite.locks import RANKS, locked, remove_empty
from evalsuite.preflight import Fits, TooLarge, estimating, is_out_of_memory, killed_workers, let_go, spell
from evalsuite.progress import Progress
from evalsuite.protocols import Training, job
from evalsuite.results import BY_FILE_SIZES, BackboneRecord, ProtocolRecord, Result, Score, cell_path, read
from evalsuite.task import Outcome, Protocol, Setup, Task, evaluate

__all__ = ["Cell", "Request", "demo_root", "execute", "plan", "run", "versions"]

DEMO_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for; the fields are the flags of ``evalsuite run``."""

    backbones: Sequence[str]
    tasks: Sequence[str]
    protocol: str | None = None
    engine: str | None = None
    seeds: int | Sequence[int] = (0,)
    data_root: Path | None = None
    data: str | None = None
    demo: bool = False
    device: str = "auto"
    devices: int = 1
    precision: str = "auto"
    workers: int | None = None
    settings: Mapping[str, str] | None = None
    limit: int | None = None
    save_every: float = 60.0
    strict: bool = False
    verify_data: bool = False
    patient: bool = False
    out: Path = Path("runs/evalsuite")
    arch: str | None = None
    backbone_options: Mapping[str, Any] | None = None
    network: str | None = None
    allow_partial: bool = False
    trust: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        """Paths may come as text."""
        object.__setattr__(self, "out", Path(self.out))
        if self.data_root is not None:
            object.__setattr__(self, "data_root", expanded(self.data_root, "data_root"))


@dataclass(frozen=True)
class Cell:
    """One thing to run: a backbone of this identity on a task, by a protocol, from a seed."""

    loaded: Loaded
    identity: str
    task: Task
    setup: Setup
    path: Path
    fingerprint: str


def run(
    backbone: str | Sequence[str],
    task: str | Sequence[str],
    *,
    registry: Registry | None = None,
    progress: Progress | None = None,
    **flags: Any,
) -> list[Result]:
    """Evaluate backbones on tasks and return their results, as ``evalsuite run`` does.

    ``flags`` are the fields of :class:`Request`. Cells whose result is there already are read, not run again. All
    that can be refused is refused before anything runs, with a :class:`evalsuite.Refusal`; a cell that fails while
    running gives a result of status ``"failed"`` and the others go on.
    """
    request = Request(backbones=_listed(backbone), tasks=_listed(task), **flags)
    progress = progress or Progress(quiet=True)
    return [result for _, result in execute(request, registry or load().registry, progress)]


def execute(request: Request, registry: Registry, progress: Progress) -> list[tuple[Path, Result]]:
    """What :func:`run` does, with the path of each result."""
    with data_session(progress, request.verify_data):
        return [(cell.path, _settle(cell, request, progress)) for cell in plan(request, registry, progress)]


def _listed(names: str | Sequence[str]) -> list[str]:
    return [n.strip() for n in names.split(",") if n.strip()] if isinstance(names, str) else list(names)


def plan(request: Request, registry: Registry, progress: Progress) -> list[Cell]:
    """The cells of a request, everything checked: names, data, and that each backbone gives what each task needs."""
    for folder in (request.out, request.out / "results", request.out / "work"):
        writable(folder)
    tasks: list[Task] = [registry.get("task", name)() for name in request.tasks]
    recipes = [task.protocol(request.protocol).override(request.settings or {}) for task in tasks]
    for task in tasks:
        _check(task, request, registry)
    device = pick_device(request.device)
    seeds = range(request.seeds) if isinstance(request.seeds, int) else request.seeds
    cells = []
    for spec in request.backbones:
        with progress.doing(f"loading {spec}"):
            loaded = load_backbone(
                spec, registry, arch=request.arch, allow_partial=request.allow_partial, trust=request.trust,
                options=dict(request.backbone_options or {}), network=request.network,
            )  # fmt: skip
        for guess in loaded.report.guesses:
            progress.say(f"warning: {loaded.name}: {guess}")
        for task, protocol in zip(tasks, recipes, strict=True):
            task.refuse(loaded.backbone, protocol)
            for seed in seeds:
                cells.append(_cell(loaded, task, protocol, seed, device, request, registry, progress))
    return cells


def _check(task: Task, request: Request, registry: Registry) -> None:
    if request.engine is not None:
        registry.entry("engine", request.engine)
        if not _does(request.engine, task, registry):
            raise UsageError(
                f"{task.name} has no engine {request.engine!r}",
                cause=f"it runs on {', '.join(task.engines) or 'none'}",
                fix=f"--engine {task.engines[0]}" if task.engines else "leave --engine out",
            )
    if request.data is not None and not task.generic:
        raise UsageError(
            f"{task.name} has its own data set",
            cause=f"--data {request.data} is for the generic tasks",
            fix="--task detect, segment or classify for data of your own, or --data-root for where the data set lies",
        )
    if request.limit is not None and request.limit < 1:
        raise UsageError(f"--limit {request.limit} leaves nothing", cause="it is a number of images", fix="--limit 100")


def _does(engine: str, task: Task, registry: Registry) -> bool:
    """Whether an engine does what the task's own do: it is one of them, or a plugin's of the same kind."""
    if engine in task.engines or not task.engines:
        return engine in task.engines
    kinds = {job(registry.get("engine", e), registry.entry("engine", e).owner) for e in (engine, task.engines[0])}
    return len(kinds) == 1


def _cell(
    loaded: Loaded, task: Task, protocol: Protocol, seed: int, device: torch.device, request: Request,
    registry: Registry, progress: Progress,
) -> Cell:  # fmt: skip
    variant, identity = _variant(task, protocol, request), loaded.backbone.identity
    path = cell_path(
        request.out,
        loaded.name,
        identity,
        task.name,
        _protocol_record(protocol),
        seed,
        variant,
    )
    work = request.out / "work" / path.parent.parent.name / path.parent.name / path.stem
    root, data = request.data_root or data_root(), request.data
    if request.demo:
        with progress.doing(f"drawing the demo world of {task.name}"):
            root = demo_root(task, registry)
        data = f"{task.world}:{root}" if task.world else None
    precision = request.precision
    if precision == "auto":
        precision = "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"
    workers = (
        request.workers if request.workers is not None else (os.cpu_count() or 1) - 1 if device.type == "cuda" else 0
    )
    setup = Setup(
        protocol=protocol, work=work, registry=registry, progress=progress, seed=seed, device=device,
        precision=precision, devices=request.devices, workers=workers,
        encode_workers="auto" if request.workers is None else request.workers, data_root=root, data=data,
        engine=request.engine, limit=request.limit,
        demo=request.demo or (data is not None and is_generated(data, registry)),
        save_every=request.save_every, strict=request.strict, patient=request.patient,
    )  # fmt: skip
    with progress.doing(f"reading the data of {task.name}"):
        fingerprint = task.fingerprint(setup)
    return Cell(loaded, identity, task, setup, path, fingerprint)


def _variant(task: Task, protocol: Protocol, request: Request) -> tuple[str, ...]:
    parts = []
    if protocol.modified:
        parts.append(f"modified-{protocol.hash[:8]}")
    if request.engine is not None and request.engine != task.engines[0]:
        parts.append(request.engine)
    if request.data is not None:
        parts.append(f"data-{hashlib.sha256(request.data.encode()).hexdigest()[:8]}")
    if request.limit is not None:
        parts.append(f"limit-{request.limit}")
    return (*parts, "demo") if request.demo else tuple(parts)


def demo_root(task: Task, registry: Registry) -> Path:
    """The generated world of a task's data set, written to disk on first use."""
    world = task.world or task.name
    if world not in registry.names("dataset"):
        raise UsageError(
            f"{task.name} has no demo world",
            cause="a demo world belongs to a data set; this task takes yours",
            fix="leave --demo out and give --data",
        )
    return source(registry, world).demo(cache_root() / "demo", DEMO_SEED)


def _settle(cell: Cell, request: Request, progress: Progress) -> Result:
    """The cell's result: read if it is there, else made, by one process at a time; a failure is a result too."""
    work = cell.setup.work
    lock = work.with_name(f"{work.name}.lock")
    there = _there(cell, progress)
    left = (request.out / "work").exists()  # perhaps of a process that was killed between its result and its clean-up
    if there is None and not _is_first(request):
        return _made(cell, request, progress)
    if there is not None and not (left and _is_first(request)):
        return _told(cell, there, progress)
    wait = request.devices == 1 or not any(name in os.environ for name in RANKS)  # the other ranks would not wait
    with locked(lock, progress, _name(cell), wait=wait, within=request.out):
        there = _there(cell, progress, alone=True)  # another process may have made it while this one waited
        if there is None:
            return _made(cell, request, progress)
        if work.exists():
            _clear(work, request.out)
        return _told(cell, there, progress)


def _told(cell: Cell, there: Result, progress: Progress) -> Result:
    progress.say(f"{_name(cell)}: there already ({cell.path})")
    return there


def _is_first(request: Request) -> bool:
    """Whether this process is the only one of a run, or the first."""
    rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    return request.devices == 1 or rank == "0"


def _there(cell: Cell, progress: Progress, alone: bool = False) -> Result | None:
    """The result that is there; None where there is none, or of a failure, which is tried again. A file that is no
    result is set aside where nobody else writes it."""
    if not cell.path.exists():
        return None
    try:
        there = read(cell.path)
    except DataError as error:
        if isinstance(error.__cause__, OSError):
            raise
        if alone:
            aside = set_aside(cell.path)
            progress.say(f"warning: {cell.path} is no result ({error.cause}); it is set aside as {aside.name}")
        return None
    if there.status != "ok" or _is_outdated(there, cell, progress, alone):
        return None
    _refuse_another(there, cell)
    return there


def _made(cell: Cell, request: Request, progress: Progress) -> Result:
    """Make the cell's result and write it; of a failure too, but never over a result."""
    progress.say(_name(cell))
    began = time.monotonic()
    with room_for(cell.setup.work):
        cell.setup.work.mkdir(parents=True, exist_ok=True)
    reset_peak_memory(cell.setup.device)
    reserve = _reserve()
    try:
        result = _evaluated(cell, request, progress, began)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and type(error.code) is int and error.code > 128:
            raise  # a signal, and the state is saved
        del reserve
        let_go(error)  # what its frames hold may be all the memory there is
        failure = _reason(cell, error)
        progress.say(failure.told)
        result = _failure(cell, request, failure, time.monotonic() - began)
    if not _first_of_all():
        return result
    if result.status == "failed":
        there = _there(cell, progress, alone=True)  # where nothing keeps two processes apart
        if there is not None:
            return there
    result.write(cell.path)
    if result.status == "ok":
        _clear(cell.setup.work, request.out)
    return read(cell.path)


RESERVE = 16 << 20  # bytes


def _reserve() -> bytearray:
    """Memory to give back where it is short, so that there is some to say so."""
    try:
        return bytearray(RESERVE)
    except MemoryError:
        return bytearray()


def _evaluated(cell: Cell, request: Request, progress: Progress, began: float) -> Result:
    with killed_workers(), progress.doing(f"{_name(cell)}: at work"):
        outcome = evaluate(cell.task, cell.loaded.backbone.to(cell.setup.device), cell.setup)
    result = _result(cell, request, outcome, time.monotonic() - began)
    if _first_of_all():
        forget_partials(cell.path.with_suffix(""))
        _keep(cell, outcome)
    return result


@dataclass(frozen=True)
class _Failure:
    """Why a cell has no scores: for its record, and for the terminal."""

    text: str
    code: int
    told: str


def _reason(cell: Cell, error: BaseException) -> _Failure:
    """What is kept of an error, as text that a file can hold."""
    if isinstance(error, TooLarge) and error.__cause__ is None:  # refused before any work, not out of memory in it
        error = _with_lighter(cell, error)
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        error = ResourceError(
            f"{_name(cell)} ran out of memory",
            cause=" ".join(str(error).split())[:200] or "the system gives no more",
            fix="a smaller backbone, a smaller --set batch_size, fewer --workers, or a machine with more memory",
        )
    if isinstance(error, Refusal):
        text = told = str(error)
        code = error.code
    else:
        lines = traceback.format_exception(error)
        text, told, code = "".join(lines[-6:]), "".join(lines).rstrip(), 1
    return _Failure(_writable_text(text), code, told)


def _writable_text(text: str) -> str:
    """Text as a file can hold it: names of files may be in no encoding, and an error's words endless."""
    return text[:LONGEST_ERROR].encode("utf-8", "backslashreplace").decode()


LONGEST_ERROR = 20_000


def _with_lighter(cell: Cell, error: TooLarge) -> TooLarge:
    """The same refusal, which names the first of the task's other protocols that fits this machine."""
    if cell.setup.device.type != "cpu" or cell.setup.devices > 1:
        return error  # only there can another one be estimated
    with cell.setup.progress.doing("looking for a protocol that fits"), estimating():
        for protocol in cell.task.protocols:
            if not _is_lighter(protocol, cell):
                continue
            try:
                setup = replace(cell.setup, protocol=protocol, progress=Progress(quiet=True))
                evaluate(cell.task, cell.loaded.backbone, setup)
            except Fits as fits:
                advice = f"--protocol {protocol.id} ({spell(fits.seconds)} or more)"
                return TooLarge(error.problem, cause=error.cause, fix=f"{advice}, or {error.fix}")
            except Exception:  # it does not fit either, or cannot be run on these data
                continue
    return error


def _is_lighter(protocol: Protocol, cell: Cell) -> bool:
    """Whether a protocol is worth an estimate: of the same kind and less work, by a step that needs no features of all
    images first."""
    refused = cell.setup.protocol
    if type(protocol) is not type(refused) or getattr(protocol, "encode", None) is not None:
        return False
    if not cell.task.fits(cell.loaded.backbone, protocol):
        return False
    if isinstance(protocol, Training) and isinstance(refused, Training):
        return _work(protocol) < _work(refused)
    return protocol.id != refused.id


def _work(protocol: Training) -> int:
    return protocol.iterations * protocol.batch_size * protocol.pixels


def _is_outdated(there: Result, cell: Cell, progress: Progress, alone: bool) -> bool:
    """Whether a result does not say on what data it was made. It is set aside where nobody else writes it."""
    if not there.by_file_sizes or there.data.get("fingerprint") == cell.fingerprint:
        return False
    if alone:
        aside = set_aside(cell.path)
        progress.say(f"{_name(cell)}: {aside.name} was {BY_FILE_SIZES}: the cell is run again")
    return True


def _refuse_another(there: Result, cell: Cell) -> None:
    """Refuse a result of the same name that was made otherwise: on other data, or before a recipe was changed."""
    protocol = cell.setup.protocol
    marks = (
        ("on other data", "fingerprint", there.data.get("fingerprint"), cell.fingerprint),
        (f"by another {protocol.id}-{protocol.version}", "hash", there.protocol.hash, protocol.hash),
        (f"of another version of {cell.task.name}", "version", there.task_version, cell.task.version),
    )
    for what, mark, then, now in marks:
        if then != now:
            raise UsageError(
                f"{cell.path} holds the result {what}",
                cause=f"{mark} {then} then, {now} now",
                fix="choose another --out, or move that result away",
            )


def _first_of_all() -> bool:
    """Whether this process writes; where there are several, it waits until all have come here."""
    if not torch.distributed.is_initialized():
        return True
    torch.distributed.barrier()
    return torch.distributed.get_rank() == 0


def _clear(work: Path, out: Path) -> None:
    """Remove a finished cell's working state but for what was set aside, and the folders that are left empty."""
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            _clear(path, work)
        elif not is_aside(path):
            path.unlink()
    remove_empty(work, out)


def _name(cell: Cell) -> str:
    protocol = cell.setup.protocol
    mark = f" (modified: {', '.join(protocol.modified)})" if protocol.modified else ""
    return f"{cell.loaded.name} on {cell.task.name}, {protocol.id}-{protocol.version}{mark}, seed {cell.setup.seed}"


def _keep(cell: Cell, outcome: Outcome) -> None:
    """Move figures and records beside the cell, and write replicates and samples there."""
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    for name, made in {**outcome.figures, **outcome.records}.items():
        with atomic(_beside(cell.path, name, made.suffix)) as partial:
            shutil.copyfile(made, partial)
    arrays: dict[str, Any] = {f"replicates/{k}": v for k, v in outcome.replicates.items()}
    arrays |= {f"samples/{k}": v for k, v in outcome.samples.items()}
    if arrays:
        arrays["ids"] = np.asarray(list(outcome.ids), dtype=np.str_)
        with atomic(_beside(cell.path, "samples", ".npz")) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)


def _beside(path: Path, name: str, suffix: str) -> Path:
    return path.with_name(f"{path.stem}.{name}{suffix}")


def _result(cell: Cell, request: Request, outcome: Outcome, took: float) -> Result:
    better = {metric.name: metric.higher_is_better for metric in cell.task.promises(cell.setup.protocol)}
    scores = {}
    for name, value in outcome.scores.items():
        replicates = outcome.replicates.get(name)
        low = high = None
        if replicates is not None and value is not None:
            low, high = _interval(replicates, outcome.samples.get(name), outcome.samples.get("group"))
        scores[name] = Score(value=value, low=low, high=high, higher_is_better=better[name])
    files = {
        name: _beside(cell.path, name, p.suffix).name for name, p in {**outcome.figures, **outcome.records}.items()
    }
    if outcome.replicates or outcome.samples:
        files["samples"] = _beside(cell.path, "samples", ".npz").name
    return Result(
        status="ok", scores=scores, selected=dict(outcome.selected), details=dict(outcome.details),
        data=dict(outcome.data), files=files, warnings=(*cell.loaded.report.guesses, *outcome.warnings),
        timings={**outcome.timings, "total": took},
        **_common(cell, request, cell.loaded.backbone.flops(), _engine_version(cell)),
    )  # fmt: skip


def _interval(
    replicates: np.ndarray, samples: np.ndarray | None, groups: np.ndarray | None
) -> tuple[float | None, float | None]:
    low, high = statistics.score_interval(replicates, samples, groups)
    return (None, None) if math.isnan(low) else (low, high)


def _failure(cell: Cell, request: Request, failure: _Failure, took: float) -> Result:
    """A record of what is known anyway: nothing is computed for it, memory may be short."""
    version = None
    with suppress(Exception):  # an engine that cannot be imported may be why it failed
        version = _engine_version(cell)
    return Result(
        status="failed", error=failure.text, error_code=failure.code,
        data={"fingerprint": cell.fingerprint}, timings={"total": took}, **_common(cell, request, None, version),
    )  # fmt: skip


def _engine(cell: Cell) -> str | None:
    return cell.setup.engine or (cell.task.engines[0] if cell.task.engines else None)


def _engine_version(cell: Cell) -> str | None:
    engine = _engine(cell)
    version: str | None = cell.setup.registry.get("engine", engine)().version() if engine else None
    return version


def _common(cell: Cell, request: Request, flops: int | None, engine_version: str | None) -> dict[str, Any]:
    spec, report = cell.loaded.backbone.spec, cell.loaded.report
    return {
        "backbone": BackboneRecord(
            name=cell.loaded.name, request=_writable_text(report.source), identity=cell.identity,
            spec=spec.to_json(), parameters=report.parameters, flops=flops,
            load=report.to_json(),
            provenance=dict(cell.loaded.provenance),
        ),
        "task": cell.task.name, "task_version": cell.task.version, "primary": cell.task.leading(cell.setup.protocol),
        "protocol": _protocol_record(cell.setup.protocol), "engine": _engine(cell),
        "engine_version": engine_version,
        "seed": cell.setup.seed, "limited": cell.setup.limit, "demo": cell.setup.demo, "trusted": report.trusted,
        "partial": report.matched < NEEDED, "environment": _environment(cell.setup),
        "peak_memory_mb": peak_memory(cell.setup.device),
        "command": _writable_text(request.command), "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _protocol_record(protocol: Protocol) -> ProtocolRecord:
    return ProtocolRecord(
        id=protocol.id, version=protocol.version, hash=protocol.hash, modified=protocol.modified,
        ranked=protocol.ranked, seeded=protocol.seeded, fields=protocol.fields(),
    )  # fmt: skip


def _environment(setup: Setup) -> dict[str, Any]:
    settings = {"devices": setup.devices, "precision": setup.precision, "workers": setup.workers}
    return {**describe(setup.device), **settings}
