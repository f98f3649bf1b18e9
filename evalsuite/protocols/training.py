"""What every protocol that trains a dense head is made of, and what an engine does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evalsuite.task import Protocol

__all__ = ["Training", "job"]


JOBS = ("detect", "segment", "play")


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


def job(engine: type) -> str | None:
    """What an engine of this class is asked for, ``"detect"``, ``"segment"`` or ``"play"``; None: nothing of that."""
    return next((name for name in JOBS if callable(getattr(engine, name, None))), None)
