"""From a request to cells, which are plain values, and to their results: what to run, what is there, what failed.

Importing this loads no torch, nor does reading a result that is there: what evaluates is imported where it does.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

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
from evalsuite.errors import BackboneError, DataError, PluginError, Refusal, ResourceError, UsageError
from evalsuite.files import atomic, forget_partials, is_aside, room_for, set_aside, writable
from evalsuite.hooks import Registry, load
from evalsuite.locks import RANKS, locked, remove_empty
from evalsuite.progress import Progress
from evalsuite.results import BY_FILE_SIZES, BackboneRecord, ProtocolRecord, Result, Score, cell_path, read

if TYPE_CHECKING:
    from evalsuite.checkpoints import Loaded
    from evalsuite.preflight import TooLarge
    from evalsuite.protocols import Training
    from evalsuite.task import Outcome, Protocol, Setup, Task

__all__ = ["Backbones", "Cell", "Request", "demo_root", "execute", "existing", "plan", "run", "settle", "versions"]

DEMO_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for; the fields are the flags of ``evalsuite run``, ``plugins`` its ``-p``."""

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
    plugins: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Paths may come as text, and mappings of any kind."""
        object.__setattr__(self, "out", Path(self.out))
        for name in ("settings", "backbone_options"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        if self.data_root is not None:
            object.__setattr__(self, "data_root", expanded(self.data_root, "data_root"))

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds, of which a number says how many."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)


class ProtocolMark(NamedTuple):
    """By which protocol: what its record says of it, but for its fields."""

    id: str
    version: int
    hash: str
    modified: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to run: a backbone of this identity on a task, by a protocol, from a seed. Plain values all: it pickles
    in about a kilobyte, and any process makes its result of it (:func:`settle`).

    ``request`` is one of a single backbone, task and seed. The rest is what planning found out: the backbone's name,
    ``spec`` (as JSON) and number of ``parameters``, the task's own name and version, the ``path`` of the result and the
    ``fingerprint`` of the data.
    """

    request: Request
    name: str
    identity: str
    spec: Mapping[str, Any]
    parameters: int
    task: str
    task_version: int
    protocol: ProtocolMark
    path: Path
    fingerprint: str = ""

    @property
    def seed(self) -> int:
        (seed,) = self.request.seed_list
        return seed

    @property
    def work(self) -> Path:
        """The folder of its own that outlives a crash."""
        return self.request.out / "work" / self.path.parent.parent.name / self.path.parent.name / self.path.stem

    def __str__(self) -> str:
        protocol = self.protocol
        mark = f" (modified: {', '.join(protocol.modified)})" if protocol.modified else ""
        return f"{self.name} on {self.task}, {protocol.id}-{protocol.version}{mark}, seed {self.seed}"


class Backbones:
    """Loads what requests name, and keeps the backbone that was loaded last: there are never two at once."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._flags: tuple[Any, ...] = ()
        self._loaded: Loaded | None = None

    def load(self, request: Request, progress: Progress) -> Loaded:
        """The only backbone of a request. Raises as :func:`evalsuite.load_backbone`.

        Whoever keeps it keeps two in memory when the next one is loaded.
        """
        from evalsuite.checkpoints import load_backbone

        (text,) = request.backbones
        flags = (
            text, request.arch, dict(request.backbone_options or {}), request.network, request.allow_partial,
            request.trust,
        )  # fmt: skip
        if self._loaded is None or flags != self._flags:
            self.release()
            with progress.doing(f"loading {text}"):
                self._loaded = load_backbone(
                    text, self.registry, arch=request.arch, allow_partial=request.allow_partial, trust=request.trust,
                    options=dict(request.backbone_options or {}), network=request.network,
                )  # fmt: skip
            self._flags = flags
        return self._loaded

    def release(self) -> None:
        """Let go of the backbone, and of the memory that it had on its device."""
        if self._loaded is None:
            return
        self._loaded = None
        gc.collect()  # networks refer to themselves
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


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
    return [result for _, result in execute(request, registry or load(request.plugins).registry, progress)]


def execute(request: Request, registry: Registry, progress: Progress) -> list[tuple[Path, Result]]:
    """What :func:`run` does, with the path of each result."""
    from evalsuite.data.digests import data_session

    backbones = Backbones(registry)
    with data_session(progress, request.verify_data):  # one for all: what cells have in common is read once
        cells = plan(request, registry, progress, backbones)
        return [(cell.path, settle(cell, registry, progress, backbones)) for cell in cells]


def _listed(names: str | Sequence[str]) -> list[str]:
    return [n.strip() for n in names.split(",") if n.strip()] if isinstance(names, str) else list(names)


def plan(request: Request, registry: Registry, progress: Progress, backbones: Backbones | None = None) -> list[Cell]:
    """The cells of a request, everything checked: names, data, and that each backbone gives what each task needs.

    Those of one backbone are beside each other. Each backbone is loaded, looked at and let go of, but for the last one,
    which ``backbones`` keeps.
    """
    for folder in (request.out, request.out / "results", request.out / "work"):
        writable(folder)
    tasks: list[Task] = [registry.get("task", name)() for name in request.tasks]
    protocols = [task.protocol(request.protocol).override(request.settings or {}) for task in tasks]
    for task in tasks:
        _check(task, request, registry)
    pick_device(request.device)
    backbones = backbones or Backbones(registry)
    columns = [_Column(*each) for each in zip(request.tasks, tasks, protocols, strict=True)]
    request = replace(request, data_root=request.data_root or data_root())
    return [
        cell
        for text in request.backbones
        for cell in _cells(replace(request, backbones=(text,)), columns, backbones, progress)
    ]


@dataclass
class _Column:
    """A task by its name in the registry and a protocol, and the fingerprints of its data by seed, which are those of
    all backbones."""

    name: str
    task: Task
    protocol: Protocol
    fingerprints: dict[int, str] = field(default_factory=dict)


def _cells(request: Request, columns: Sequence[_Column], backbones: Backbones, progress: Progress) -> Iterator[Cell]:
    """The cells of a request of one backbone, which is refused where it lacks what a task needs."""
    loaded = backbones.load(request, progress)
    for guess in loaded.report.guesses:
        progress.say(f"warning: {loaded.name}: {guess}")
    for column in columns:
        task, protocol, fingerprints = column.task, column.protocol, column.fingerprints
        task.refuse(loaded.backbone, protocol)
        for seed in request.seed_list:
            cell = _cell(replace(request, tasks=(column.name,), seeds=(seed,)), loaded, task, protocol)
            if seed not in fingerprints:
                setup = _setup(cell, task, protocol, backbones.registry, progress)
                with progress.doing(f"reading the data of {task.name}"):
                    fingerprints[seed] = task.fingerprint(setup)
            yield replace(cell, fingerprint=fingerprints[seed])


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
    from evalsuite.protocols import job

    kinds = {job(registry.get("engine", e), registry.entry("engine", e).owner) for e in (engine, task.engines[0])}
    return len(kinds) == 1


def _cell(request: Request, loaded: Loaded, task: Task, protocol: Protocol) -> Cell:
    record, (seed,) = _protocol_record(protocol), request.seed_list
    identity, variant = loaded.backbone.identity, _variant(task, protocol, request)
    return Cell(
        request=request, name=loaded.name, identity=identity, spec=loaded.backbone.spec.to_json(),
        parameters=loaded.report.parameters, task=task.name, task_version=task.version,
        protocol=ProtocolMark(record.id, record.version, record.hash, record.modified),
        path=cell_path(request.out, loaded.name, identity, task.name, record, seed, variant),
    )  # fmt: skip


def _setup(cell: Cell, task: Task, protocol: Protocol, registry: Registry, progress: Progress) -> Setup:
    """What a cell's request asks for, on this machine."""
    import torch

    from evalsuite.data import is_generated
    from evalsuite.task import Setup

    request = cell.request
    device, precision, workers = pick_device(request.device), request.precision, request.workers
    root, data = request.data_root, request.data
    if request.demo:
        with progress.doing(f"drawing the demo world of {task.name}"):
            root = demo_root(task, registry)
        data = f"{task.world}:{root}" if task.world else None
    gpu = device.type == "cuda"
    if precision == "auto":
        precision = "bf16-mixed" if gpu and torch.cuda.is_bf16_supported() else "32-true"
    return Setup(
        protocol=protocol, work=cell.work, registry=registry, progress=progress, seed=cell.seed, device=device,
        precision=precision, devices=request.devices,
        workers=workers if workers is not None else (os.cpu_count() or 1) - 1 if gpu else 0,
        encode_workers="auto" if workers is None else workers, data_root=root, data=data,
        engine=request.engine, limit=request.limit,
        demo=request.demo or (data is not None and is_generated(data, registry)),
        save_every=request.save_every, strict=request.strict, patient=request.patient,
    )  # fmt: skip


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
    from evalsuite.data import source

    world = task.world or task.name
    if world not in registry.names("dataset"):
        raise UsageError(
            f"{task.name} has no demo world",
            cause="a demo world belongs to a data set; this task takes yours",
            fix="leave --demo out and give --data",
        )
    return source(registry, world).demo(cache_root() / "demo", DEMO_SEED)


def settle(
    cell: Cell,
    registry: Registry | None = None,
    progress: Progress | None = None,
    backbones: Backbones | None = None,
) -> Result:
    """The cell's result: read if it is there, else made, by one process at a time; a failure is a result too.

    A cell is enough: the plugins of its request are loaded where there is no ``registry``, and its backbone where
    ``backbones`` does not keep it. Raises :class:`evalsuite.UsageError` where the result that is there is another's,
    and :class:`evalsuite.PluginError` where the task or the protocol is another here than where it was planned.
    """
    progress = progress or Progress(quiet=True)
    request, work = cell.request, cell.work

    def make() -> Result:
        known = registry or load(request.plugins).registry
        return _made(cell, known, progress, backbones or Backbones(known))

    result = _there(cell, progress)
    left = (request.out / "work").exists()  # perhaps of a process that was killed between its result and its clean-up
    if result is None and not _is_first(request):
        return make()
    if result is not None and not (left and _is_first(request)):
        return _said(cell, result, progress)
    wait = request.devices == 1 or not any(name in os.environ for name in RANKS)  # the other ranks would not wait
    with locked(work.with_name(f"{work.name}.lock"), progress, str(cell), wait=wait, within=request.out):
        result = _there(cell, progress, alone=True)  # another process may have made it while this one waited
        if result is None:
            return make()
        if work.exists():
            _clear(work, request.out)
        return _said(cell, result, progress)


def existing(cell: Cell) -> Result | None:
    """The cell's result if it is there, so that nothing is left to be done; read without torch, and nothing is written.

    None too where a failed one is there, which is tried again, and where a file is no result. Raises as :func:`settle`.
    """
    return _there(cell, Progress(quiet=True))


def _said(cell: Cell, result: Result, progress: Progress) -> Result:
    progress.say(f"{cell}: there already ({cell.path})")
    return result


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


@dataclass
class _Work:
    """What the plain values of a cell stand for, made where it runs; the backbone is there once it is loaded."""

    cell: Cell
    task: Task
    setup: Setup
    loaded: Loaded | None = None

    @property
    def engine(self) -> str | None:
        return self.setup.engine or (self.task.engines[0] if self.task.engines else None)


def _work(cell: Cell, registry: Registry, progress: Progress) -> _Work:
    """The task and the protocol by their names. Raises :class:`PluginError` where they are others than those planned
    with, as another process may have them."""
    request = cell.request
    (name,) = request.tasks
    task: Task = registry.get("task", name)()
    protocol = task.protocol(request.protocol).override(request.settings or {})
    planned, here = (cell.task_version, cell.protocol.hash), (task.version, protocol.hash)
    if planned != here:
        raise PluginError(
            f"{cell} cannot be run here",
            cause=f"version and hash of its task and protocol were {planned} where it was planned, and are {here} here",
            fix="plan and run with the same versions of the suite and its plugins",
        )
    return _Work(cell, task, _setup(cell, task, protocol, registry, progress))


def _made(cell: Cell, registry: Registry, progress: Progress, backbones: Backbones) -> Result:
    """Make the cell's result and write it; of a failure too, but never over a result."""
    from evalsuite.preflight import let_go

    work = _work(cell, registry, progress)
    progress.say(str(cell))
    began = time.monotonic()
    with room_for(cell.work):
        cell.work.mkdir(parents=True, exist_ok=True)
    reset_peak_memory(work.setup.device)
    reserve = _reserve()
    try:
        result = _evaluated(work, backbones, began)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and type(error.code) is int and error.code > 128:
            raise  # a signal, and the state is saved
        del reserve
        let_go(error)  # what its frames hold may be all the memory there is
        failure = _reason(work, error)
        progress.say(failure.told)
        result = _failure(work, failure, time.monotonic() - began)
    if not _first_of_all():
        return result
    if result.status == "failed":
        there = _there(cell, progress, alone=True)  # where nothing keeps two processes apart
        if there is not None:
            return there
    result.write(cell.path)
    if result.status == "ok":
        _clear(cell.work, cell.request.out)
    return read(cell.path)


RESERVE = 16 << 20  # bytes


def _reserve() -> bytearray:
    """Memory to give back where it is short, so that there is some to say so."""
    try:
        return bytearray(RESERVE)
    except MemoryError:
        return bytearray()


def _evaluated(work: _Work, backbones: Backbones, began: float) -> Result:
    from evalsuite.data.digests import data_session
    from evalsuite.preflight import killed_workers
    from evalsuite.task import evaluate

    cell, progress = work.cell, work.setup.progress
    work.loaded = _planned(cell, backbones.load(cell.request, progress))
    with (
        killed_workers(),
        data_session(progress, cell.request.verify_data),
        progress.doing(f"{cell}: at work"),
    ):
        outcome = evaluate(work.task, work.loaded.backbone.to(work.setup.device), work.setup)
    result = _result(work, work.loaded, outcome, time.monotonic() - began)
    if _first_of_all():
        forget_partials(cell.path.with_suffix(""))
        _keep(cell, outcome)
    return result


def _planned(cell: Cell, loaded: Loaded) -> Loaded:
    """The backbone that was planned with. Raises :class:`BackboneError` for another: its file was written since."""
    identity = loaded.backbone.identity
    if identity != cell.identity:
        raise BackboneError(
            f"{cell.request.backbones[0]} is another backbone than when the run was planned",
            cause=f"its weights were {cell.identity[:8]} then, and are {identity[:8]} now",
            fix="run the same command again once the file is written; a plugin's builder draws from torch's generator",
        )
    return loaded


@dataclass(frozen=True)
class _Failure:
    """Why a cell has no scores: for its record, and for the terminal."""

    text: str
    code: int
    told: str


def _reason(work: _Work, error: BaseException) -> _Failure:
    """What is kept of an error, as text that a file can hold."""
    from evalsuite.preflight import TooLarge, is_out_of_memory

    if isinstance(error, TooLarge) and error.__cause__ is None:  # refused before any work, not out of memory in it
        error = _with_lighter(work, error)
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        error = ResourceError(
            f"{work.cell} ran out of memory",
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


def _with_lighter(work: _Work, error: TooLarge) -> TooLarge:
    """The same refusal, which names the first of the task's other protocols that fits this machine."""
    from evalsuite.preflight import Fits, TooLarge, estimating, spell
    from evalsuite.task import evaluate

    setup, loaded = work.setup, work.loaded
    if loaded is None or setup.device.type != "cpu" or setup.devices > 1:
        return error  # only there can another one be estimated
    with setup.progress.doing("looking for a protocol that fits"), estimating():
        for protocol in work.task.protocols:
            if not (_is_lighter(protocol, setup.protocol) and work.task.fits(loaded.backbone, protocol)):
                continue
            try:
                evaluate(work.task, loaded.backbone, replace(setup, protocol=protocol, progress=Progress(quiet=True)))
            except Fits as fits:
                advice = f"--protocol {protocol.id} ({spell(fits.seconds)} or more)"
                return TooLarge(error.problem, cause=error.cause, fix=f"{advice}, or {error.fix}")
            except Exception:  # it does not fit either, or cannot be run on these data
                continue
    return error


def _is_lighter(protocol: Protocol, refused: Protocol) -> bool:
    """Whether a protocol is worth an estimate: of the same kind and less work, by a step that needs no features of all
    images first."""
    from evalsuite.protocols import Training

    if type(protocol) is not type(refused) or getattr(protocol, "encode", None) is not None:
        return False
    if isinstance(protocol, Training) and isinstance(refused, Training):
        return _pixels(protocol) < _pixels(refused)
    return protocol.id != refused.id


def _pixels(protocol: Training) -> int:
    return protocol.iterations * protocol.batch_size * protocol.pixels


def _is_outdated(there: Result, cell: Cell, progress: Progress, alone: bool) -> bool:
    """Whether a result does not say on what data it was made. It is set aside where nobody else writes it."""
    if there.data.get("fingerprint") == cell.fingerprint or not there.by_file_sizes:
        return False
    if alone:
        aside = set_aside(cell.path)
        progress.say(f"{cell}: {aside.name} was {BY_FILE_SIZES}: the cell is run again")
    return True


def _refuse_another(there: Result, cell: Cell) -> None:
    """Refuse a result of the same name that was made otherwise: on other data, or before a recipe was changed."""
    protocol = cell.protocol
    marks = (
        ("on other data", "fingerprint", there.data.get("fingerprint"), cell.fingerprint),
        (f"by another {protocol.id}-{protocol.version}", "hash", there.protocol.hash, protocol.hash),
        (f"of another version of {cell.task}", "version", there.task_version, cell.task_version),
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
    import torch

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


def _result(work: _Work, loaded: Loaded, outcome: Outcome, took: float) -> Result:
    cell = work.cell
    better = {metric.name: metric.higher_is_better for metric in work.task.promises(work.setup.protocol)}
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
        data=dict(outcome.data), files=files, warnings=(*loaded.report.guesses, *outcome.warnings),
        timings={**outcome.timings, "total": took},
        **_common(work, loaded.backbone.flops(), _engine_version(work)),
    )  # fmt: skip


def _interval(
    replicates: np.ndarray, samples: np.ndarray | None, groups: np.ndarray | None
) -> tuple[float | None, float | None]:
    from evalsuite.statistics import score_interval

    low, high = score_interval(replicates, samples, groups)
    return (None, None) if math.isnan(low) else (low, high)


def _failure(work: _Work, failure: _Failure, took: float) -> Result:
    """A record of what is known anyway: nothing is computed for it, memory may be short."""
    version = None
    with suppress(Exception):  # an engine that cannot be imported may be why it failed
        version = _engine_version(work)
    return Result(
        status="failed", error=failure.text, error_code=failure.code,
        data={"fingerprint": work.cell.fingerprint}, timings={"total": took}, **_common(work, None, version),
    )  # fmt: skip


def _engine_version(work: _Work) -> str | None:
    registry, engine = work.setup.registry, work.engine
    version: str | None = registry.get("engine", engine)().version() if engine else None
    return version


def _common(work: _Work, flops: int | None, engine_version: str | None) -> dict[str, Any]:
    """What results and failures say alike; how the backbone was loaded, only where it was."""
    from evalsuite.checkpoints import NEEDED

    cell, setup, task = work.cell, work.setup, work.task
    report = work.loaded.report if work.loaded is not None else None
    provenance = work.loaded.provenance if work.loaded is not None else {}
    source = cell.request.backbones[0] if report is None else report.source
    return {
        "backbone": BackboneRecord(
            name=cell.name, request=_writable_text(source), identity=cell.identity,
            spec=dict(cell.spec), parameters=cell.parameters, flops=flops,
            load={} if report is None else report.to_json(), provenance=dict(provenance),
        ),
        "task": cell.task, "task_version": cell.task_version, "primary": task.leading(setup.protocol),
        "protocol": _protocol_record(setup.protocol), "engine": work.engine, "engine_version": engine_version,
        "seed": cell.seed, "limited": setup.limit, "demo": setup.demo,
        "trusted": cell.request.trust if report is None else report.trusted,
        "partial": report is not None and report.matched < NEEDED, "environment": _environment(setup),
        "peak_memory_mb": peak_memory(setup.device),
        "command": _writable_text(cell.request.command), "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _protocol_record(protocol: Protocol) -> ProtocolRecord:
    return ProtocolRecord(
        id=protocol.id, version=protocol.version, hash=protocol.hash, modified=protocol.modified,
        ranked=protocol.ranked, seeded=protocol.seeded, fields=protocol.fields(),
    )  # fmt: skip


def _environment(setup: Setup) -> dict[str, Any]:
    settings = {"devices": setup.devices, "precision": setup.precision, "workers": setup.workers}
    return {**describe(setup.device), **settings}
