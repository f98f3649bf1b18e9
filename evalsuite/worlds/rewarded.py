"""Worlds whose rewards a function of what is seen gives, in place of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv, VectorWrapper

from evalsuite.errors import PluginError

__all__ = ["Reward", "Rewarded"]

Array = npt.NDArray[Any]
Reward = Callable[[Array, Array], Array]


class Rewarded:
    """An arena whose rewards are ``reward(before, after)``; all else is that of ``arena``, success too.

    ``before`` and ``after`` (N, ...) are what N worlds showed when the actions were chosen and what these led to, which
    for an episode that ends is its own last observation. They are what the arena shows, images (N, H, W, 3) uint8 or
    states, before the agent's encoder: the agent keeps whatever backbone it has. The function returns N finite numbers
    and keeps nothing between calls, so that a run that was stopped goes on to the same ones; otherwise
    :class:`evalsuite.PluginError` is raised.
    """

    def __init__(self, arena: Any, reward: Reward) -> None:
        self.arena, self.reward = arena, reward

    def make(self, count: int, variant: str, observation: str) -> RewardedVector:
        return RewardedVector(self.arena.make(count, variant, observation), self.reward)


class RewardedVector(VectorWrapper):
    """Many worlds in ``AutoresetMode.SAME_STEP``, with the rewards of :class:`Rewarded`."""

    def __init__(self, env: VectorEnv[Array, Array, Array], reward: Reward) -> None:
        super().__init__(env)
        self.reward = reward
        self._seen: Array = np.empty(0)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        seen, info = self.env.reset(seed=seed, options=options)
        self._seen = seen.copy()
        return seen, info

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        seen, _, ended, late, info = self.env.step(actions)
        reached = seen.copy()
        for index in np.flatnonzero(ended | late):
            reached[index] = info["final_obs"][index]
        rewards = np.asarray(self.reward(self._seen, reached), dtype=np.float64)
        if rewards.shape != (self.num_envs,) or not np.isfinite(rewards).all():
            raise PluginError(
                f"the reward of {self.num_envs} worlds is no {self.num_envs} finite numbers",
                cause=f"it is {rewards.tolist() if rewards.size <= 8 else f'an array of shape {rewards.shape}'}",
                fix="return one number for each world",
            )
        self._seen = seen.copy()
        return seen, rewards, ended, late, info

    def frames(self) -> npt.NDArray[np.uint8]:
        """Pictures (N, H, W, 3) of all worlds."""
        pictures: npt.NDArray[np.uint8] = self.env.frames()  # type: ignore[attr-defined]  # every arena's worlds have it
        return pictures

    def snapshot(self) -> dict[str, Any]:
        """Where the worlds are, and what they show."""
        return {
            "worlds": self.env.snapshot(),  # type: ignore[attr-defined]  # as above
            "seen": {"values": self._seen.ravel().tolist(), "dtype": self._seen.dtype.name, "shape": self._seen.shape},
        }

    def restore(self, values: dict[str, Any]) -> None:
        """Bring as many worlds of the same rules to where :meth:`snapshot` was made."""
        self.env.restore(values["worlds"])  # type: ignore[attr-defined]  # as above
        seen = values["seen"]
        self._seen = np.array(seen["values"], dtype=seen["dtype"]).reshape(seen["shape"])
