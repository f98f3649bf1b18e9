"""The one training loop of dense heads: resumable to the same numbers, on one device or many."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from evalsuite.errors import ResourceError, TrainingError
from evalsuite.files import atomic
from evalsuite.progress import Progress

__all__ = ["Fit", "Steps", "fit", "mix_seed"]


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed of several numbers; neighbours give unrelated seeds."""
    high, low = np.random.SeedSequence(numbers).generate_state(2, np.uint32).tolist()
    return int(high >> 1) << 32 | int(low)


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


class HasLosses(Protocol):
    """A model whose call on a batch gives named losses, to be summed."""

    def __call__(self, batch: Any) -> Mapping[str, Tensor]: ...


@dataclass
class Fit:
    """One training run. ``model(batch)`` returns named losses; ``rate(step)`` is the factor on the learning rate.

    ``key`` names what is trained on what: a state file of another key is not resumed from. ``saves`` is the number
    of seconds between two saves of the state.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    iterations: int
    sample: Callable[[int, int], Any]
    length: int
    batch_size: int
    seed: int
    key: str
    state: Path
    what: str = "train"
    clip_gradient: float | None = None
    workers: int = 0
    saves: float = 60.0
    log: list[dict[str, float]] = field(default_factory=list)


def fit(run: Fit, fabric: Fabric, progress: Progress) -> nn.Module:
    """Train to the end, from the beginning or from ``run.state``; the trained model comes back on its device.

    Every step starts from a seed of its own, so a run that was killed and one that was not end in the same bits on
    the same machine. A termination signal saves the state and exits 143, an interrupt 130.

    Raises :class:`TrainingError` when the loss is not finite; the last state before it is kept.
    """
    model, optimizer = fabric.setup(run.model, run.optimizer)
    bases = [group["lr"] for group in optimizer.param_groups]
    start = _resume(run, model, optimizer, fabric)
    steps = Steps(run.sample, run.length, run.batch_size, run.seed, fabric.global_rank, fabric.world_size)
    loader = DataLoader(
        steps, batch_size=None, sampler=range(start, run.iterations), num_workers=run.workers,
        persistent_workers=False, prefetch_factor=4 if run.workers else None,
    )  # fmt: skip
    model.train()
    saved = time.monotonic()
    with progress.track(run.what, run.iterations, start) as meter, _signals() as told:
        for step, batch in zip(range(start, run.iterations), loader, strict=True):
            torch.manual_seed(mix_seed(run.seed, step, 2 + fabric.global_rank))
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * run.rate(step)
            losses = model(batch)
            total = _total(losses, step, run)
            fabric.backward(total)
            if run.clip_gradient is not None:
                fabric.clip_gradients(model, optimizer, max_norm=run.clip_gradient)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % 20 == 0 or step + 1 == run.iterations:
                run.log.append({"step": step + 1, **{name: float(loss.detach()) for name, loss in losses.items()}})
                meter.update(step + 1, loss=float(total.detach()), lr=optimizer.param_groups[0]["lr"])
            else:
                meter.update(step + 1)
            if told.signal or time.monotonic() - saved >= run.saves:
                _save(run, model, optimizer, step + 1, fabric)
                saved = time.monotonic()
                if told.signal:
                    raise SystemExit(128 + told.signal)
    _save(run, model, optimizer, run.iterations, fabric)
    return run.model


def _total(losses: Mapping[str, Tensor], step: int, run: Fit) -> Tensor:
    total = torch.stack([loss.float() for loss in losses.values()]).sum()
    if not torch.isfinite(total):
        shown = ", ".join(f"{name} {float(loss.detach()):.4g}" for name, loss in losses.items())
        raise TrainingError(
            f"the loss is not finite at step {step + 1} of {run.iterations}",
            cause=shown,
            fix="lower the learning rate (--set lr=...) or clip gradients (--set clip_gradient=1.0)",
        )
    return total


def _save(run: Fit, model: nn.Module, optimizer: Any, step: int, fabric: Fabric) -> None:
    if fabric.is_global_zero:
        content = {
            "key": run.key, "step": step, "model": run.model.state_dict(),
            "optimizer": optimizer.state_dict(), "log": run.log,
        }  # fmt: skip
        try:
            with atomic(run.state) as partial:
                torch.save(content, partial)
        except OSError as error:
            raise ResourceError(
                f"the training state cannot be written at step {step}",
                cause=f"{error}",
                fix=f"free space under {run.state.parent} and run the same command again; the previous state is whole",
            ) from error
    fabric.barrier()


def _resume(run: Fit, model: nn.Module, optimizer: Any, fabric: Fabric) -> int:
    if not run.state.exists():
        return 0
    content = torch.load(run.state, map_location="cpu", weights_only=True)
    if content["key"] != run.key:
        return 0
    run.model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    run.log[:] = content["log"]
    return int(content["step"])


@dataclass
class _Told:
    signal: int = 0


@contextmanager
def _signals() -> Iterator[_Told]:
    """Note termination and interrupt instead of dying in the middle of a step."""
    told = _Told()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def note(number: int, frame: object) -> None:
        told.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
