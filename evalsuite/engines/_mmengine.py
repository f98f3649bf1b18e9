"""mmengine's runner as this suite runs it: nothing of the process is changed, and nothing is left beside the work
folder. Importing this makes mmsegmentation importable with mmcv-lite.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.registry import DefaultScope
from mmengine.runner import BaseLoop, Runner
from mmengine.visualization import Visualizer
from torch import nn
from torch.optim import Optimizer

from evalsuite.errors import ResourceError, TrainingError
from evalsuite.features import autocast
from evalsuite.files import atomic
from evalsuite.progress import Meter, Progress
from evalsuite.seeding import manual_seed
from evalsuite.signals import Told
from evalsuite.states import read_state
from evalsuite.training import mix_seed

__all__ = ["LrFactor", "Mixed", "Saving", "Training", "Watching", "apart", "saved_run"]

NAME = "evalsuite"
LOGS = 20  # steps from one line of the log to the next
SHARED = (MMLogger, MessageHub, Visualizer, DefaultScope)  # whose instances mmengine keeps by name, for ever
# what mmsegmentation says of choices that are the protocol's, and of itself
HARMLESS = (
    "Default ``avg_non_ignore`` is False", "For binary segmentation", "When align_corners=",
    "The shape of value will convert", "``build_loss`` would be deprecated",
)  # fmt: skip


class _NoOperators(ModuleType):
    """Stands for mmcv's compiled operators: mmsegmentation looks them up at import, and the heads here use none."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **options: Any) -> Any:
            raise ResourceError(
                f"mmcv's operator {name} is not here",
                cause="mmcv-lite, which the extra 'mmseg' installs, has no compiled operators",
                fix="build the full mmcv for this torch, or --engine native",
            )

        return absent


if importlib.util.find_spec("mmcv._ext") is None:
    _stand_in = _NoOperators("mmcv._ext")
    _stand_in.__spec__ = ModuleSpec("mmcv._ext", None)
    sys.modules["mmcv._ext"] = _stand_in
with warnings.catch_warnings():
    warnings.simplefilter("ignore", ImportWarning)  # mmcv tells of operators that moved within it
    importlib.import_module("mmseg.models")


@contextmanager
def apart() -> Iterator[None]:
    """What mmengine keeps for the whole process is afterwards as it was, and nothing is written to standard output."""
    before = [(kind, dict(kind._instance_dict)) for kind in SHARED]
    try:
        for kind in SHARED:
            kind._instance_dict.clear()
        MMLogger.get_instance(NAME).handlers.clear()  # the newest instance is the one that is told and asked
        DefaultScope.get_instance(NAME, scope_name="mmseg")
        with warnings.catch_warnings():
            for message in HARMLESS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for kind, instances in before:
            kind._instance_dict.clear()
            kind._instance_dict.update(instances)


def saved_run(path: Path, key: str, progress: Progress) -> Mapping[str, Any] | None:
    """What :class:`Saving` wrote for the same ``key``; None where it wrote nothing."""
    return read_state(path, key, progress, key_of=lambda content: content["meta"].get("key"))


class Training(Runner):  # type: ignore[misc]
    """The runner, on ``device``; ``resumed`` is what :func:`saved_run` found.

    As mmengine has it, a runner sets how processes start, limits on files and OpenCV's threads, seeds everything, logs
    to the terminal, describes the machine in a file and picks a device. None of that is done here. A checkpoint is
    written whole or not at all and holds plain values only, so that reading one runs no code.
    """

    def __init__(self, *, device: torch.device, resumed: Mapping[str, Any] | None, **options: Any) -> None:
        self.device, self.resumed = device, resumed
        super().__init__(
            resume=resumed is not None, load_from=NAME if resumed is not None else None, default_scope="mmseg",
            experiment_name=NAME, **options,
        )  # fmt: skip

    def setup_env(self, env_cfg: Any) -> None:
        self._rank, self._world_size, self._timestamp = 0, 1, "mmengine"

    def set_randomness(self, seed: int, diff_rank_seed: bool = False, deterministic: bool = False) -> None:
        self._seed, self._deterministic = seed, deterministic

    def build_logger(self, *args: Any, **options: Any) -> MMLogger:
        return MMLogger.get_current_instance()

    def build_visualizer(self, visualizer: Any = None) -> None:
        return None

    def _log_env(self, env_cfg: Any) -> None:
        return None

    def dump_config(self) -> None:
        return None

    def train(self) -> nn.Module:
        """Train, and end the processes that read images: a runner is part of a cycle, and would keep them for long."""
        try:
            model: nn.Module = super().train()
            return model
        finally:
            if isinstance(self._train_loop, BaseLoop):
                self._train_loop.dataloader_iterator = None

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **options: Any) -> None:
        with atomic(Path(out_dir) / filename) as partial:
            super().save_checkpoint(str(partial.parent), partial.name, *args, **options)

    def load_checkpoint(self, filename: str, *args: Any, **options: Any) -> Mapping[str, Any]:
        assert self.resumed is not None
        self.call_hook("after_load_checkpoint", checkpoint=self.resumed)
        self.model.load_state_dict(self.resumed["state_dict"])
        return self.resumed


class LrFactor(LRSchedulerMixin, _ParamScheduler):  # type: ignore[misc]
    """The learning rate of each step by a formula: ``lr_factor(step)`` multiplies it."""

    def __init__(self, optimizer: Any, lr_factor: Callable[[int], float]) -> None:
        self.lr_factor = lr_factor
        super().__init__(optimizer, by_epoch=False)

    def _get_value(self) -> list[float]:
        return [base * self.lr_factor(self.last_step) for base in self.base_values]

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "lr_factor"}


class Mixed(OptimWrapper):  # type: ignore[misc]
    """An optimiser whose losses are computed in a precision. mmengine's own scales losses, which bfloat16 does not need
    and which a resumed run would have to be told."""

    def __init__(self, optimizer: Optimizer, device: torch.device, precision: str, **options: Any) -> None:
        self.where = device, precision
        super().__init__(optimizer, **options)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), autocast(*self.where):
            yield


class Watching(Hook):  # type: ignore[misc]
    """Before a step its seed, after it the log: as :func:`evalsuite.training.fit` has both, so that a run that was
    killed and one that was not end in the same bits.

    Raises :class:`TrainingError` when the loss is not finite; the last state before it is kept.
    """

    def __init__(self, key: str, seed: int, meter: Meter, log: list[dict[str, float]]) -> None:
        self.key, self.seed, self.meter, self.log = key, seed, meter, log

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        manual_seed(mix_seed(self.seed, batch_idx, 2))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        step, last = batch_idx + 1, runner.max_iters
        if not torch.isfinite(outputs["loss"]):
            raise TrainingError(
                f"the loss is not finite at step {step} of {last}",
                cause=", ".join(f"{name} {value.item():.4g}" for name, value in outputs.items()),
                fix="lower the learning rate (--set lr=...) or clip gradients (--set clip_gradient=1.0)",
            )
        if step % LOGS and step < last:
            self.meter.update(step)
            return
        named = {"loss": "decode.loss_ce", "loss_auxiliary": "aux.loss_ce"}
        losses = {ours: outputs[theirs].item() for ours, theirs in named.items() if theirs in outputs}
        self.log.append({"step": step, **losses})
        self.meter.update(step, loss=sum(losses.values()), lr=runner.optim_wrapper.param_groups[0]["lr"])

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        checkpoint["meta"].update(key=self.key, log=list(self.log))
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}

    def after_load_checkpoint(self, runner: Runner, checkpoint: Mapping[str, Any]) -> None:
        self.log[:] = checkpoint["meta"]["log"]


class Saving(CheckpointHook):  # type: ignore[misc]
    """A checkpoint ``name`` every ``seconds``, after the last step, and when a signal came, which ends the run."""

    def __init__(self, name: str, seconds: float, told: Told) -> None:
        super().__init__(by_epoch=False, filename_tmpl=name, max_keep_ckpts=-1)
        self.seconds, self.told, self.saved = seconds, told, time.monotonic()

    def every_n_train_iters(self, runner: Runner, n: int, start: int = 0) -> bool:
        now = time.monotonic()
        if not self.told.signal and now - self.saved < self.seconds:
            return False
        self.saved = now
        return True

    def after_train_iter(self, *args: Any, **options: Any) -> None:
        super().after_train_iter(*args, **options)
        if self.told.signal:
            raise SystemExit(128 + self.told.signal)
