"""What every protocol that trains a dense head is made of, and what an engine does."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, cast

from evalsuite.errors import PluginError
from evalsuite.task import Protocol

__all__ = ["JOBS", "Job", "Training", "job"]

Job = Literal["detect", "segment", "play"]
JOBS: tuple[Job, ...] = ("detect", "segment", "play")


@dataclass(frozen=True, kw_only=True)
class Training(Protocol):
    """How a dense head, and with it perhaps the backbone, is trained over a number of iterations.

    ``optimizer`` is ``"sgd"``, as in the published recipes of convolutional networks, or ``"adamw"``; ``momentum`` is
    of the first. Norms are not decayed.

    ``batch_size`` counts images over all devices. The learning rate rises linearly from ``lr * warmup_factor`` to
    ``lr`` over ``warmup_iterations``, then is multiplied by ``gamma`` at each of ``milestones`` (iterations).
    """

    iterations: int
    batch_size: int
    lr: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_iterations: int = 0
    warmup_factor: float = 0.001
    clip_gradient: float | None = None
    freeze_backbone: bool = False
    backbone_norm: Literal["train", "frozen"] = "train"
    precise_bn: int = 0

    @property
    def pixels(self) -> int:
        """How many pixels a training image has, or is enlarged to, at most; 0 where it is not of images."""
        return 0

    def lr_factor(self, iteration: int) -> float:
        """The factor on the learning rate at an iteration counted from 0."""
        factor = self.gamma ** sum(iteration >= m for m in self.milestones)
        if iteration < self.warmup_iterations:
            alpha = iteration / self.warmup_iterations
            factor *= self.warmup_factor * (1 - alpha) + alpha
        return factor


def job(engine: type, owner: str = "") -> Job:
    """The kind of an engine of this class, its ``job``: ``"detect"``, ``"segment"`` or ``"play"``, a method it has.

    One that does not say its job, and has one of these methods, is of that kind, with a :class:`DeprecationWarning`.
    Raises :class:`PluginError`, which names ``owner``, the plugin it is of, for an engine of no such kind.
    """
    able = [name for name in JOBS if callable(getattr(engine, name, None))]
    stated, name = getattr(engine, "job", None), getattr(engine, "name", engine.__name__)
    subject = f"engine {name!r} of {f'plugin {owner!r}' if owner else engine.__module__}"
    if stated is None and len(able) == 1:
        message = f'{subject} does not say its job; give its class job = "{able[0]}", for the next version refuses it'
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return able[0]
    if stated not in able:
        raise PluginError(
            f"{subject} is of an unknown kind",
            cause=f"its job is {stated!r}; of the methods {', '.join(JOBS)} it has {', '.join(able) or 'none'}",
            fix=f"give its class a job, one of {', '.join(JOBS)}, and the method of that name",
        )
    return cast(Job, stated)
