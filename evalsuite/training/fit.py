"""The one training loop, of heads and of pretraining, resumable to the same numbers on one device or many; what it runs
on, and in which precision."""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from evalsuite.errors import TrainingError
from evalsuite.files import atomic, forget_partials
from evalsuite.preflight import Demand, afford, killed_workers, out_of_memory, training_step
from evalsuite.progress import Progress
from evalsuite.seeding import manual_seed
from evalsuite.signals import Told, ignore_signals, signals
from evalsuite.states import going_on_from, read_state

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = [
    "Fit",
    "StepInfo",
    "Steps",
    "fit",
    "full_precision",
    "full_precision_outputs",
    "launched",
    "mix_seed",
    "uncast",
]


def uncast(device: torch.device) -> torch.autocast:
    """A context in which nothing on ``device`` is cast, whatever the autocast around it; of shapes alone, too."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed of several numbers; neighbours give unrelated seeds."""
    high, low = np.random.SeedSequence(numbers).generate_state(2, np.uint32).tolist()
    return int(high >> 1) << 32 | int(low)


def launched(
    device: torch.device, devices: int = 1, *, nodes: int = 1, precision: str = "32-true", own_buffers: bool = False
) -> Fabric:
    """Lightning Fabric on ``device``, or on as many ``devices`` of its kind, its processes started.

    ``precision`` is ``32-true``, ``bf16-mixed``, ``16-mixed`` or ``64-true``. Parameters may be without a gradient: of
    heads that a backbone's file carries, of a mask head without a positive region. Buffers are those of the first
    process, or each process's own: statistics of emulated devices, queues.
    """
    with _without("torchmetrics"):  # Fabric imports it, and half of scipy and transformers, to compare its version
        from lightning_fabric import Fabric
        from lightning_fabric.plugins import MixedPrecision
        from lightning_fabric.strategies.ddp import DDPStrategy

    several, bf16 = devices * nodes > 1, precision == "bf16-mixed"
    buffers = _unshared_buffers() if own_buffers else {}
    fabric = Fabric(
        accelerator=device.type,
        devices=devices if several or device.index is None else [device.index],
        num_nodes=nodes,
        strategy=DDPStrategy(find_unused_parameters=True, **buffers) if several else "auto",
        # by its name Fabric would announce it on the terminal
        plugins=MixedPrecision("bf16-mixed", device.type) if bf16 else None,
        precision=None if bf16 else precision,  # type: ignore[arg-type]  # the command line holds it to Fabric's list
    )
    fabric.launch()
    return fabric


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Within the block ``module`` cannot be imported, unless it has been already."""
    absent = module not in sys.modules
    if absent:
        sys.modules[module] = None  # type: ignore[assignment]  # Python's way to say that there is none
    try:
        yield
    finally:
        if absent:
            del sys.modules[module]


def _unshared_buffers() -> dict[str, Any]:
    """The argument by which DistributedDataParallel leaves each process its own buffers; this torch names it."""
    parameters = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False}


def full_precision(tensor: Tensor) -> Tensor:
    """Half-precision numbers as float32; others as they are, for losses, coordinates and statistics under autocast."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision_outputs(*modules: nn.Module) -> None:
    """Let modules whose code is not ours answer in :func:`full_precision`, in lists, tuples and dictionaries too."""
    for module in modules:
        module.register_forward_hook(lambda _, __, output: tree_map_only(Tensor, full_precision, output))


class _Batch:
    """A batch that Fabric does not look into, for it casts every floating-point tensor it sees to the precision of
    the network: boxes, and other targets too. Networks cast what they compute with by themselves, under autocast."""

    def __init__(self, content: Any) -> None:
        self.content = content


class _OnBatches(nn.Module):
    """A model as Fabric and DistributedDataParallel call it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: _Batch) -> Any:
        return self.model(batch.content)


class Steps(Dataset[list[Any]]):
    """Training batches by step number: batch ``i`` is a function of (seed, i) alone.

    The order is a fresh permutation every epoch; ``sample(index, seed)`` returns a training example with whatever
    randomness its augmentation needs drawn from ``seed``. So a run that is resumed at any step, with any number of
    workers, sees the very same batches. Process ``rank`` of ``world`` gets every world-th example of a batch.
    """

    def __init__(
        self,
        sample: Callable[[int, int], Any],
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sample, self.length, self.batch_size, self.seed = sample, length, batch_size, seed
        self.rank, self.world = rank, world
        self._order: tuple[int, Any] = (-1, None)

    def __getitem__(self, step: int) -> list[Any]:
        places = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)
        return [self.sample(self._index(place), mix_seed(self.seed, place, 1)) for place in places]

    def _index(self, place: int) -> int:
        epoch, position = divmod(place, self.length)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch, 0]).permutation(self.length)
        return int(self._order[1][position])


@dataclass(frozen=True)
class StepInfo:
    """What ``stepped`` is given after a step: how many are made, whether this one is logged, and the seconds since the
    last logged one: those spent waiting for data, and all."""

    step: int
    logged: bool
    waited: float
    passed: float


@dataclass(kw_only=True)
class Fit:
    """One training run. ``model(batch)`` returns named losses; ``lr_factor(step)`` multiplies the learning rate (a
    parameter group with a true ``constant`` keeps its own).

    ``key`` names what is trained on what: a state file of another key is set aside. ``saves`` is the number
    of seconds between two saves of the state; every ``logs`` steps a line goes to ``log``. A step is made of
    ``accumulate`` batches. They are :class:`Steps` of ``sample``, ``length`` and ``batch_size``, or what
    ``batches(first)`` gives, ``first`` being the number of batches that a resumed run has behind it. ``resumed`` hears
    from which step the run goes on. ``stepped`` hears of every step before the state is saved; the numbers it returns
    are logged and shown beside the losses. ``clip_gradient`` is the largest norm of all gradients together, of order
    ``clip_norm`` (infinity: their largest entry). ``advice`` is for a loss that is not finite.

    ``demand`` is what the run asks of the machine, which is estimated before its first step (None: nothing worth it);
    ``few(n)`` is a batch of n images for that, where there are ``batches``.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_factor: Callable[[int], float]
    iterations: int
    seed: int
    key: str
    state: Path
    sample: Callable[[int, int], Any] | None = None
    length: int = 0
    batch_size: int = 0
    what: str = "train"
    clip_gradient: float | None = None
    clip_norm: float = 2.0
    workers: int = 0
    saves: float = 60.0
    log: list[dict[str, float]] = field(default_factory=list)
    logs: int = 20
    accumulate: int = 1
    batches: Callable[[int], Iterable[Any]] | None = None
    stepped: Callable[[StepInfo], Mapping[str, float]] | None = None
    resumed: Callable[[int], None] | None = None
    advice: str = "lower the learning rate (--set lr=...) or clip gradients (--set clip_gradient=1.0)"
    demand: Demand | None = None
    few: Callable[[int], Any] | None = None


def fit(run: Fit, fabric: Fabric, progress: Progress) -> nn.Module:
    """Train to the end, from the beginning or from ``run.state``; the trained model comes back on its device.

    Every step starts from a seed of its own, so a run that was killed and one that was not end in the same bits on
    the same machine. A signal of :func:`signals` saves the state and exits with 128 and its number (SIGTERM 143, SIGINT
    130, SIGUSR1 138); with several processes within the next few steps.

    Raises :class:`evalsuite.ResourceError` when the disk is full, the state before it being whole, or where the run
    asks for more memory or time than there is, and :class:`TrainingError` when the loss is not finite in any process,
    in all of them; the last state before it is kept. :class:`evalsuite.DataError` where the state does not fit the
    model; like one that cannot be read or is of another key, it is set aside.
    """
    model, optimizer = fabric.setup(_OnBatches(run.model), run.optimizer)
    bases = [group["lr"] for group in optimizer.param_groups]
    if fabric.is_global_zero:
        forget_partials(run.state)
    start = _resume(run, optimizer, fabric, progress)
    if run.resumed is not None:
        run.resumed(start)
    model.train()
    if run.demand is not None and not start and fabric.device.type == "cpu" and fabric.world_size == 1:
        afford(run.demand, partial(_small_step, run, model, optimizer, fabric), progress)
    track = progress.track(run.what, run.iterations, start)
    with out_of_memory(run.demand), killed_workers(), ExitStack() as stack:
        meter, received = stack.enter_context(track), stack.enter_context(signals())
        clock = _Clock(run, fabric, received)
        batches = stack.enter_context(closing(clock.waiting(iter(_loader(run, fabric, start)))))
        for step in range(start, run.iterations):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base if group.get("constant") else base * run.lr_factor(step)
            losses = _backward(run, model, fabric, batches, step)
            if run.clip_gradient is not None:
                fabric.clip_gradients(model, optimizer, max_norm=run.clip_gradient, norm_type=run.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            info = clock.step_info(step + 1)
            extra = run.stepped(info) if run.stepped is not None else {}
            if info.logged:
                numbers = _everywhere(losses, fabric)
                run.log.append({"step": step + 1, **numbers, **extra})
                shown = {"loss": sum(numbers.values()), "lr": optimizer.param_groups[0]["lr"]}
                meter.update(step + 1, **(shown | dict(extra)))
            else:
                meter.update(step + 1)
            if clock.save_now(step + 1):
                _save(run, optimizer, step + 1, fabric)
                if received.signal:
                    raise SystemExit(128 + received.signal)
    _save(run, optimizer, run.iterations, fabric)
    return run.model


def _small_step(run: Fit, model: Any, optimizer: Any, fabric: Fabric, images: int) -> Iterator[float]:
    """A step on so many images in the three parts that :func:`evalsuite.preflight.afford` measures."""
    if run.few is not None:
        batch = run.few(images)
    else:
        assert run.sample is not None
        batch = Steps(run.sample, run.length, images, run.seed)[0]
    return training_step(lambda: _total(model(_Batch(batch))), optimizer, fabric.backward)


def _loader(run: Fit, fabric: Fabric, start: int) -> Iterable[Any]:
    if run.batches is not None:
        return run.batches(start * run.accumulate)
    if run.sample is None:
        raise ValueError("a run needs a sample or batches")
    steps = Steps(run.sample, run.length, run.batch_size, run.seed, fabric.global_rank, fabric.world_size)
    return DataLoader(
        steps, batch_size=None, sampler=range(start * run.accumulate, run.iterations * run.accumulate),
        num_workers=run.workers, persistent_workers=False, prefetch_factor=4 if run.workers else None,
        worker_init_fn=ignore_signals,
    )  # fmt: skip


def _backward(run: Fit, model: Any, fabric: Fabric, batches: Iterator[Any], step: int) -> dict[str, Tensor]:
    """The gradient of the mean loss over the batches of a step; the losses come back, averaged alike."""
    mean: dict[str, Tensor] = {}
    finite: Any = True
    for part in range(run.accumulate):
        batch = next(batches)
        manual_seed(mix_seed(run.seed, step, 2 + fabric.global_rank, *([part] * (part > 0))))
        with fabric.no_backward_sync(model, enabled=part < run.accumulate - 1):
            losses = model(_Batch(batch))
            total = _total(losses)
            fabric.backward(total / run.accumulate)
        finite = torch.isfinite(total.detach()) & finite
        for name, loss in losses.items():
            mean[name] = mean.get(name, 0.0) + loss.detach() / run.accumulate
    if fabric.world_size > 1:  # the gradients of one process are already those of all
        finite = finite.int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not finite:  # read after the backward pass is under way, so that a GPU need not wait for the answer
        raise _not_finite(mean, step, run, fabric)
    return mean


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([loss.float() for loss in losses.values()]).sum()


def _everywhere(losses: Mapping[str, Tensor], fabric: Fabric) -> dict[str, float]:
    """The losses averaged over processes, each of which has those of its own part of the batch."""
    values: Any = fabric.all_reduce(torch.stack(list(losses.values())), reduce_op="mean")
    return dict(zip(losses, values.tolist(), strict=True))


class _Clock:
    """When a run logs and when it saves, and where its time goes."""

    AGREE = 8  # steps after which processes ask each other whether to save: they must all do so at the same one

    def __init__(self, run: Fit, fabric: Fabric, received: Told) -> None:
        self.run, self.fabric, self.received = run, fabric, received
        self.saved = self.logged = time.monotonic()
        self.waited = 0.0

    def waiting(self, batches: Iterator[Any]) -> Generator[Any, None, None]:
        """The same batches; the time until each comes is noted."""
        while True:
            began = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.monotonic() - began
            yield batch

    def step_info(self, step: int) -> StepInfo:
        logged = step % self.run.logs == 0 or step == self.run.iterations
        now = time.monotonic()
        info = StepInfo(step, logged, self.waited, now - self.logged)
        if logged:
            self.logged, self.waited = now, 0.0
        return info

    def save_now(self, step: int) -> bool:
        """Whether to save after this step; ``received.signal`` is then the same in all processes."""
        due = time.monotonic() - self.saved >= self.run.saves
        if self.fabric.world_size > 1:
            if step % self.AGREE and step < self.run.iterations:
                return False
            wish = torch.tensor([self.received.signal, int(due)], device=self.fabric.device)
            dist.all_reduce(wish, dist.ReduceOp.MAX)
            self.received.signal, due = int(wish[0]), bool(wish[1])
        if not (due or self.received.signal):
            return False
        self.saved = time.monotonic()
        return True


def _not_finite(losses: Mapping[str, Tensor], step: int, run: Fit, fabric: Fabric) -> TrainingError:
    """Of the first process whose losses are not finite."""
    everyone: list[dict[str, float]] = [{name: float(loss) for name, loss in losses.items()}]
    if fabric.world_size > 1:
        mine, everyone = everyone[0], everyone * fabric.world_size
        dist.all_gather_object(everyone, mine)
    rank = next((r for r, values in enumerate(everyone) if not math.isfinite(sum(values.values()))), 0)
    where = f" in process {rank}" if fabric.world_size > 1 else ""
    return TrainingError(
        f"the loss is not finite at step {step + 1} of {run.iterations}{where}",
        cause=", ".join(f"{name} {value:.4g}" for name, value in everyone[rank].items()),
        fix=run.advice,
    )


def _save(run: Fit, optimizer: Any, step: int, fabric: Fabric) -> None:
    own_buffers = _own_buffers(run.model, fabric)
    if fabric.is_global_zero:
        content = {
            "key": run.key, "step": step, "model": run.model.state_dict(), "apart": own_buffers,
            "optimizer": optimizer.state_dict(), "log": list(run.log),
        }  # fmt: skip
        # through a file of ours: where the disk is full, torch's own writer does not say why it fails
        with atomic(run.state) as partial, partial.open("wb") as file:
            torch.save(content, file)
    fabric.barrier()


def _own_buffers(model: nn.Module, fabric: Fabric) -> list[dict[str, Tensor]]:
    """For each process, the buffers in which it differs from the first: running statistics, queues of its own."""
    if fabric.world_size == 1:
        return []
    kept = model.state_dict()
    mine = {name: b.detach().cpu() for name, b in model.named_buffers() if name in kept}
    everyone: list[Any] | None = [None] * fabric.world_size if fabric.is_global_zero else None
    dist.gather_object(mine, everyone)
    return [
        {name: value for name, value in theirs.items() if not torch.equal(value, mine[name])}
        for theirs in everyone or []
    ]


def _resume(run: Fit, optimizer: Any, fabric: Fabric, progress: Progress) -> int:
    """The steps that are behind."""
    content = read_state(run.state, run.key, progress, alone=fabric.is_global_zero)
    if content is None:
        return 0
    with going_on_from(run.state, alone=fabric.is_global_zero):
        step, log = int(content["step"]), [dict(entry) for entry in content["log"]]
        if not 0 <= step <= run.iterations:
            raise ValueError(f"step {step} of {run.iterations}")
        own_buffers = content.get("apart", [])
        mine = own_buffers[fabric.global_rank] if fabric.global_rank < len(own_buffers) else {}
        run.model.load_state_dict(content["model"] | mine)
        optimizer.load_state_dict(content["optimizer"])
        run.log[:] = log
    return step
