"""Whether work fits: memory and time of a training run, estimated from one small step before it begins.

The step is a real one, made in a forked child on few images: whatever it does to weights, statistics and generators is
gone with it. The child is watched and killed before it takes the memory there is. On a GPU no process can be forked;
there the first step shows in seconds whether memory suffices (:func:`out_of_memory`).
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _error_if_any_worker_fails

from evalsuite.errors import ResourceError
from evalsuite.progress import Progress
from evalsuite.signals import SIGNALS

__all__ = [
    "HOPELESS", "Cost", "Demand", "Fits", "TooLarge", "afford", "estimating", "free_memory", "is_out_of_memory",
    "killed_workers", "let_go", "out_of_memory", "spell", "training_step",
]  # fmt: skip

HOPELESS = 12 * 3600.0  # seconds on a CPU: what takes longer is begun only with --yes
PATIENCE = 2.0  # seconds of a step, after which one that shows the run to take ``FAR`` too long is cut short
FAR = 16
LONGEST = 16.0  # seconds of any step; then it is known to take that long at least
CUT = LONGEST / PATIENCE  # how many times more a step may take that was cut short
SLACK = 1.1  # an allocator holds on to as much more after a few steps as after the first one
STUCK = 120.0  # seconds by the clock
WARM = 0.5  # seconds of a first step, below which a second one is timed: the first one prepares kernels
UNIT = 224 * 224  # pixels
SMALL_STEP, SMALL_RUN = 4 * UNIT, 512 * UNIT  # pixels a step and in all that fit everywhere and are not estimated
FEW = 4 * UNIT  # pixels of the small step, so that what images take outweighs what weights do

_estimating: ContextVar[bool] = ContextVar("estimating", default=False)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a run asks of a machine: ``steps`` of ``batch`` images, each of so many ``pixels``, of which ``at_once`` are
    in memory together; then ``tests`` images are looked at without learning. ``times``: as many such runs.

    ``few`` are those of the small step (0: as many as their pixels ask for); images come in so many ``groups`` of one
    size, two at least. ``patient``: it may take any time.

    What is advised where it does not fit are flags, with ``{}`` for the number that fits: ``less`` of images at once,
    ``shorter`` of whatever the run has as many of as stand beside it, ``smaller`` of pixels a side.
    """

    what: str
    pixels: int
    batch: int
    steps: int
    tests: int = 0
    times: int = 1
    at_once: int = 0
    few: int = 0
    groups: int = 1
    unit: str = "images"
    patient: bool = False
    less: Sequence[str] = ("--set batch_size={}",)
    shorter: tuple[str, int] | None = None
    smaller: tuple[str, int] | None = None

    @property
    def part(self) -> int:
        """Images in memory together."""
        return self.at_once or self.batch

    def whole(self, images: float) -> int:
        """As many images or less, in whole groups."""
        return int(images) // self.groups * self.groups

    @property
    def small(self) -> bool:
        """Whether it fits wherever the suite runs, so that nothing need be estimated."""
        images = self.times * self.batch * self.steps
        return self.part * self.pixels <= SMALL_STEP and (images + self.tests) * self.pixels <= SMALL_RUN


@dataclass(frozen=True)
class Cost:
    """Of a step of ``images``: ``fixed`` bytes of gradients and of the optimizer, ``peak`` bytes besides, ``seconds``
    of one processor, ``looking`` of them before the backward pass; ``whole``: whether the step came to its end, or
    takes that much at least."""

    images: int
    fixed: float
    peak: float
    seconds: float
    looking: float
    whole: bool = True

    def memory(self, images: int) -> float:
        """Bytes that a process takes for steps of so many images."""
        return self.fixed + SLACK * self.peak / self.images * images

    def time(self, demand: Demand, threads: int) -> float:
        """Seconds of the whole run where all threads help perfectly: it takes that long at least."""
        images = demand.batch * demand.steps * self.seconds + demand.tests * self.looking
        return demand.times * images / self.images / threads


class TooLarge(ResourceError):
    """A run does not fit into the memory or the time there is; what would fit is in the advice."""


class Fits(Exception):
    """Where only an estimate is wanted (:func:`estimating`): the run fits, and would take ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


@contextmanager
def estimating() -> Iterator[None]:
    """Within the block a run that fits is not begun: :class:`Fits` is raised instead."""
    token = _estimating.set(True)
    try:
        yield
    finally:
        _estimating.reset(token)


Step = Callable[[int], Iterator[float]]


def training_step(
    loss: Callable[[], Tensor], optimizer: Any, backward: Callable[[Tensor], Any] = Tensor.backward
) -> Iterator[float]:
    """A training step in the three parts that :func:`afford` measures."""
    total = loss()
    yield 0.0
    backward(total)
    yield _size(p.grad for group in optimizer.param_groups for p in group["params"])
    optimizer.step()
    yield _size(value for state in optimizer.state.values() for value in state.values())


def _size(values: Iterable[Any]) -> float:
    return float(sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor)))


def afford(demand: Demand, step: Step, progress: Progress) -> None:
    """Raise :class:`TooLarge` where ``demand`` asks for more memory, or on a CPU for more time, than there is.

    ``step(n)`` is a training step on n images in three parts, each of which ends with a yield: the forward pass, the
    backward pass, which yields the bytes of the gradients, and the update, which yields those of the optimizer. It is
    run in a child and changes nothing here. Where no child can be forked and watched nothing is refused.
    """
    room = free_memory()
    seconds = 0.0
    if room is not None and not demand.small and hasattr(os, "fork"):
        images = demand.few or min(demand.part, demand.whole(max(2 * demand.groups, FEW / demand.pixels)))
        with progress.doing(f"{demand.what}: estimating memory and time from a small step"):
            cost = measure(step, images, demand, room)
            if cost is None and images < demand.part:  # some recipes cannot make a smaller one
                cost = measure(step, demand.part, demand, room)
        if cost is not None:
            _refuse_memory(demand, cost, room)
            seconds = cost.time(demand, torch.get_num_threads())
            _refuse_time(demand, cost, seconds)
    if _estimating.get():
        raise Fits(seconds)


def _refuse_memory(demand: Demand, cost: Cost, room: float) -> None:
    needed = cost.memory(demand.part)
    if needed <= room:
        return
    share = (0.9 * room - cost.fixed) / (cost.memory(demand.part) - cost.fixed) / (1 if cost.whole else CUT)
    advice = _less(demand, share) + _sized(demand, share)
    raise TooLarge(
        f"{demand.what} does not fit into the memory of this machine",
        cause=f"a step of {demand.part} images takes {'about' if cost.whole else 'more than'} {_bytes(needed)}, and"
        f" {_bytes(room)} are free",
        fix=", or ".join(advice) or "a smaller backbone, smaller images, or a machine with more memory",
    )


def _refuse_time(demand: Demand, cost: Cost, seconds: float) -> None:
    if seconds <= HOPELESS or demand.patient:
        return
    threads = torch.get_num_threads()
    images = demand.times * demand.batch * demand.steps
    share = HOPELESS / seconds / (1 if cost.whole else CUT)
    advice = [*_shorter(demand, share), *_sized(demand, share), "--yes to begin all the same"]
    raise TooLarge(
        f"{demand.what} would take {'about' if cost.whole else 'more than'} {spell(seconds)} on this CPU",
        cause=f"{images:,} {demand.unit} to learn from at {cost.seconds / cost.images / threads:.2g} s each or more, on"
        f" {threads} thread{'s' * (threads > 1)}",
        fix=", or ".join(advice),
    )


def _less(demand: Demand, share: float) -> list[str]:
    fits = demand.whole(demand.part * share)
    return [flag.format(fits) for flag in demand.less] if fits >= 2 * demand.groups else []


def _shorter(demand: Demand, share: float) -> list[str]:
    if demand.shorter is None:
        return []
    flag, count = demand.shorter
    return [flag.format(int(count * share))] if count * share >= 1 else []


def _sized(demand: Demand, share: float) -> list[str]:
    """Memory and time grow with the area; networks halve images five times."""
    if demand.smaller is None or share <= 0:
        return []
    flag, side = demand.smaller
    fits = int(side * share**0.5) // 32 * 32
    return [flag.format(fits)] if fits else []


def spell(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of this machine or of a device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def out_of_memory(demand: Demand | None) -> Iterator[None]:
    """Where a step finds the memory of its device full, which is how a GPU says it, say it as :class:`TooLarge`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        part = demand.part if demand is not None else 0
        advice = _less(demand, 0.5) if demand is not None else []
        raise TooLarge(
            f"{demand.what if demand is not None else 'this'} does not fit into the memory of its device",
            cause=f"a step{f' of {part} images' if part else ''} asks for more: {_first_line(error)}",
            fix=", or ".join(advice) or "a smaller backbone, smaller images, or a device with more memory",
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def let_go(error: BaseException | None) -> None:
    """Let go of what the frames of an error, and of those it came from, hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


WORKER_ENDED = ("DataLoader worker (pid", "Pin memory thread exited")  # how torch begins to say it


def _is_handing_over(error: BaseException) -> bool:
    """Whether an error is of receiving a tensor's memory from another process, which is not there any more."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "multiprocessing.resource_sharer" for frame, _ in frames)


def _hear_of_workers(patience: float) -> None:
    """Wait for torch to say that a worker has ended, which it raises: a process closes its sockets before it counts as
    ended."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        _error_if_any_worker_fails()
        time.sleep(0.01)


@contextmanager
def killed_workers(patience: float = 2.0) -> Iterator[None]:
    """Where a process that reads images was killed, which torch says at whatever line it hears of it, say it as a
    :class:`ResourceError`.

    Where a batch was just being handed over, its reader hears of a broken connection first: then torch is waited for,
    ``patience`` seconds.
    """
    try:
        try:
            yield
        except (OSError, EOFError) as error:
            if _is_handing_over(error):
                _hear_of_workers(patience)
            raise
    except RuntimeError as error:
        if not str(error).startswith(WORKER_ENDED):
            raise
        let_go(error)  # of the loader: while it lives, torch says the same again at every child that ends
        raise ResourceError(
            "a process that reads images was killed",
            cause=f"{_first_line(error).rstrip('. ')}: memory was short, or /dev/shm full, or somebody ended it",
            fix="fewer --workers (0: none), a smaller batch, or more memory; the same command goes on from the last"
            " saved state",
        ) from error


# The child -------------------------------------------------------------------------------------------------------


def measure(step: Step, images: int, demand: Demand, room: float) -> Cost | None:
    """What a step of so many images costs, found in a child; None where the step fails, as the run itself will."""
    reading, writing = os.pipe()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, of which the child uses none
            child = os.fork()
    except OSError:  # no more processes are allowed, or all memory is promised
        os.close(reading)
        os.close(writing)
        return None
    if child == 0:
        os.close(reading)
        _in_child(step, images, writing)
    os.close(writing)
    try:
        return _watched(child, reading, images, demand, room)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)


def _in_child(step: Step, images: int, writing: int) -> NoReturn:
    """One step, told to the parent as JSON; never returns, and says nothing."""
    code = 1
    try:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        with suppress(OSError):  # where the kernel has to kill, this one
            Path("/proc/self/oom_score_adj").write_text("1000")
        torch.set_num_threads(1)  # the threads of the parent are not here
        told = _timed(step, images)
        if told["seconds"] < WARM:
            told |= {key: value for key, value in _timed(step, images).items() if key in ("seconds", "looking")}
        os.write(writing, json.dumps(told).encode())
        code = 0
    finally:
        os._exit(code)


def _timed(step: Step, images: int) -> dict[str, float]:
    began, before = time.process_time(), _peak()
    parts = step(images)
    next(parts)
    looked, forward = time.process_time(), _peak() - before
    gradients = next(parts)
    backward = _peak() - before - gradients
    fixed = gradients + next(parts)
    seconds = time.process_time() - began
    return {"fixed": fixed, "peak": max(forward, backward), "seconds": seconds, "looking": looked - began}


def _peak() -> float:
    """The most bytes of memory this process ever had; a fork begins with what it has."""
    return _line(Path("/proc/self/status"), "VmHWM:") or 0.0


def _watched(child: int, reading: int, images: int, demand: Demand, room: float) -> Cost | None:
    """The child's answer, or what is known of its step once that takes longer or more memory than there is."""
    start, began, threads = _resident(child), time.monotonic(), torch.get_num_threads()
    full = Cost(images, 0.0, room * images / demand.part, 0.0, 0.0, whole=False)
    while True:
        if select.select([reading], [], [], 0.01)[0]:
            told = os.read(reading, 4096)
            return Cost(images, **json.loads(told)) if told else full if _was_killed(child) else None
        grown, seconds = _resident(child) - start, _processor(child)
        seen = Cost(images, 0.0, grown, seconds, 0.0, whole=False)
        if grown > 0.9 * room:
            return replace(full, peak=max(grown, full.peak))
        hopeless = seen.time(demand, threads) > FAR * HOPELESS and not demand.patient
        if seconds > LONGEST or (seconds > PATIENCE and hopeless):
            return seen
        if time.monotonic() - began > STUCK:
            return None


def _was_killed(child: int) -> bool:
    """Whether a child that says nothing was killed, which nobody but the kernel does, for want of memory."""
    information = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    return information is not None and information.si_code == os.CLD_KILLED and information.si_status == signal.SIGKILL


def _resident(process: int) -> float:
    try:
        return float(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it has just ended
        return 0.0


def _processor(process: int) -> float:
    """Seconds of processor time so far."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# The machine -----------------------------------------------------------------------------------------------------


def free_memory(root: Path = Path("/")) -> float | None:
    """Bytes of memory that can be had now, by the machine and by the control groups of this process (a container, a
    batch job), versions 1 and 2; None where the system does not say. ``root`` is where ``proc`` and ``sys`` are."""
    free = _line(root / "proc/meminfo", "MemAvailable:")
    if free is None:
        return None
    return max(0.0, min([free, *_left_in_groups(root)]))


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left_in_groups(root: Path) -> Iterator[float]:
    """What each limit on a group above this process leaves; pages of files that were read count as free."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount, names = (root / "sys/fs/cgroup", V2) if not controllers else (root / "sys/fs/cgroup/memory", V1)
        folder = mount / path.strip("/")
        for group in (folder, *folder.parents):
            limit, used = (_text(group / name).strip() for name in names[:2])
            if limit.isdecimal() and used.isdecimal():
                reclaimed = _line(group / "memory.stat", names[2], 1) or 0.0
                yield int(limit) - int(used) + reclaimed
            if group == mount:
                break


def _line(path: Path, name: str, unit: int = 1024) -> float | None:
    """The number after a name in a file of the system."""
    lines = (line.split() for line in _text(path).splitlines())
    return next((float(words[1]) * unit for words in lines if words[:1] == [name]), None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
