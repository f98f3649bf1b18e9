"""Protocols of agents that act on features, and the engine that they are given to."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from evalsuite.backbone import Backbone
from evalsuite.errors import UsageError
from evalsuite.features.poolings import PoolingName
from evalsuite.task import Protocol, Setup

__all__ = ["AgentEngine", "AgentProtocol", "Arena", "PPOProtocol", "Played", "ProxyProtocol", "Reading"]


@dataclass(frozen=True, kw_only=True)
class Reading(Protocol):
    """What is made of a frozen encoder's features of a world.

    ``reads``: the vectors that are pooled are the encoder's ``"tokens"`` or its ``"pooled"`` vector; ``"auto"``:
    tokens where it gives them. ``pooling`` is one of :func:`evalsuite.features.poolings.pooling`, with ``layers`` where
    it has any; ``"auto"``: ``transformer`` of tokens, which are told their places if they are patches of a map; ``mlp``
    of one vector. ``encode_size`` is the side in pixels of what the encoder sees (None: its own image size).

    It is learnt in the ``variant`` of the task's worlds, and tested there and, for generalisation, in each of
    ``unseen``.
    """

    reads: Literal["auto", "tokens", "pooled"] = "auto"
    pooling: Literal["auto", PoolingName] = "auto"
    layers: int = 1
    encode_size: int | None = None
    variant: str = "default"
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AgentProtocol(Reading):
    """An agent that learns what to do from an encoder's features, whatever algorithm it learns by.

    A subclass adds the hyper-parameters of an algorithm, and an engine learns by the one whose protocol it is given.
    ``steps`` are made in all by ``environments`` worlds at once.

    ``head``: ``"mlp"`` is 64-64 ReLU shared by policy and value and 64 tanh each, ``"identity"`` nothing. With
    ``fine_tune`` the encoder is trained along by the same optimiser. ``time_limit_is_terminal``: value is not
    bootstrapped where an episode runs out of time.

    The agent is tested over ``test_episodes`` at the end, and on the way every ``test_every`` steps over
    ``curve_episodes``. Its actions are drawn, not the likeliest ones.
    """

    steps: int
    environments: int = 4
    head: Literal["mlp", "identity"] = "mlp"
    fine_tune: bool = False
    test_every: int = 4000
    curve_episodes: int = 100
    test_episodes: int = 1000
    time_limit_is_terminal: bool = True


@dataclass(frozen=True, kw_only=True)
class PPOProtocol(AgentProtocol):
    """An agent that learns by PPO (Schulman et al. 2017).

    After ``rollout`` steps of each world, ``epochs`` passes are made over them in minibatches of ``batch_size``.
    ``discount`` is gamma, ``smoothing`` lambda of the advantages, ``clip`` bounds the ratio of policies, ``entropy``
    and ``value`` weigh their losses. ``clip_gradient`` bounds the norm.

    Raises :class:`evalsuite.UsageError` where the steps of a roll-out are no whole number of minibatches.
    """

    rollout: int = 512
    batch_size: int = 32
    epochs: int = 10
    lr: float = 3e-4
    discount: float = 0.99
    smoothing: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    value: float = 0.5
    clip_gradient: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_once = self.environments * self.rollout
        if at_once % self.batch_size:
            raise UsageError(
                f"{self.id}: {at_once} steps are no whole number of minibatches of {self.batch_size}",
                cause="the last one would be smaller, and its advantages normalised over few steps",
                fix=f"--set batch_size=32, or another divisor of {at_once}",
            )


@dataclass(frozen=True, kw_only=True)
class ProxyProtocol(Reading):
    """In which quadrant the target is, by a pooling and a linear layer on frozen features: no agent, no actions.

    Cross-entropy by AdamW over ``epochs`` of ``train_images`` first frames, whose features are standardised, the
    learning rate rising over a tenth of the steps and falling by a cosine.
    It measures whether features tell objects apart, which is what an agent needs first.
    """

    train_images: int = 4000
    test_images: int = 1000
    epochs: int = 40
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01


class Arena(typing.Protocol):
    """A family of worlds: ``make`` gives many of one variant, in gymnasium's ``AutoresetMode.SAME_STEP``.

    Besides gymnasium's methods they have ``snapshot()``, plain values that say exactly where they are, and
    ``restore(values)``; ``frames()`` are (N, H, W, 3) pictures of them. ``observation`` is ``"image"`` or ``"state"``.
    """

    def make(self, count: int, variant: str, observation: str) -> Any: ...


@dataclass(frozen=True)
class Played:
    """What an agent engine brings back.

    ``successes`` and ``lengths`` hold each test episode of each variant, the one learnt in first; ``curve`` the tests
    on the way, each with ``steps``, ``success``, ``return`` and ``length``; ``film`` the frames (T, H, W, 3) of one
    test episode.
    """

    successes: Mapping[str, npt.NDArray[np.bool_]]
    lengths: Mapping[str, npt.NDArray[np.int64]]
    curve: list[dict[str, float]]
    film: npt.NDArray[np.uint8]
    timings: dict[str, float]
    details: dict[str, Any]


class AgentEngine(typing.Protocol):
    """Who trains an agent; as :class:`DetectionEngine`."""

    name: str
    job: str

    def version(self) -> str: ...

    def play(self, backbone: Backbone, protocol: AgentProtocol, arena: Arena, setup: Setup) -> Played: ...
