"""The worlds as gymnasium environments: one at a time, and many in one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from evalsuite.errors import ResourceError, UsageError
from evalsuite.worlds import objects
from evalsuite.worlds.objects import Rules, World
from evalsuite.worlds.reaching import VARIANTS, ReachingRules, ReachingWorld, reaching_rules

__all__ = ["TASKS", "Objects", "ObjectsVector", "observation_space", "rules", "variants", "world"]

Seen = Literal["image", "state", "mask"]
Array = npt.NDArray[Any]
ZOOM = 8  # screen pixels a pixel

TASKS: Mapping[str, Mapping[str, Rules | ReachingRules]] = {**objects.TASKS, "object-reaching": VARIANTS}


def variants(task: str) -> tuple[str, ...]:
    """The named variants of a task, ``"default"`` first."""
    return tuple(TASKS[task])


def rules(task: str, variant: str = "default", **changes: Any) -> Rules | ReachingRules:
    """The rules of a task's variant, with fields changed: :func:`evalsuite.worlds.objects.rules`, and
    :func:`evalsuite.worlds.reaching.reaching_rules` for ``object-reaching``. They need no simulator.

    Raises :class:`UsageError` for a variant or a field that does not exist, and for rules that contradict each other.
    """
    return reaching_rules(variant, **changes) if task == "object-reaching" else objects.rules(task, variant, **changes)


def world(rules: Rules | ReachingRules, size: int = 64) -> World | ReachingWorld:
    """What plays by these rules, and draws pictures of ``size`` x ``size``.

    Raises :class:`ResourceError` where ``object-reaching`` lacks its simulator.
    """
    return World(rules, size) if isinstance(rules, Rules) else ReachingWorld(rules, size)


def observation_space(rules: Rules | ReachingRules, observation: Seen, size: int) -> gymnasium.spaces.Box:
    """What an agent sees of a world.

    ``"image"``: (size, size, 3) bytes. ``"state"``: floats, a row an item: (rows, 5), objects, goal, agent, then zeros,
    each its colour, shape and scale as indices into the lists of :mod:`evalsuite.worlds`, x and y; (rows, 17) as in
    :meth:`evalsuite.worlds.ReachingWorld.state`. ``"mask"``: (rows + 1, size, size) bytes, where each item would be
    seen alone, the background last.

    Raises :class:`UsageError` for another name.
    """
    if observation == "image":
        return gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
    if observation == "mask":
        return gymnasium.spaces.Box(0, 1, (rules.rows + 1, size, size), np.uint8)
    if observation != "state":
        raise UsageError(
            f"there is no observation {observation!r}",
            cause="worlds are seen as image, state or mask",
            fix="use one of them",
        )
    return gymnasium.spaces.Box(*rules.bounds)


def _actions(rules: Rules | ReachingRules) -> gymnasium.spaces.Space[Any]:
    """Four directions; or targets for the three joints."""
    if isinstance(rules, Rules):
        return gymnasium.spaces.Discrete(4)
    return gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)


def _rendered(mode: str | None, known: list[str]) -> str | None:
    if mode is not None and mode not in known:
        raise UsageError(
            f"there is no render_mode {mode!r}", cause=f"there are {', '.join(known)}, and none", fix="use one of them"
        )
    return mode


def _observe(world: World | ReachingWorld, observation: Seen, out: Array) -> None:
    if observation == "state":
        world.state(out)
    elif observation == "mask":
        world.masks(out)
    else:
        world.image(out)


def _empty(space: gymnasium.Space[Any]) -> Array:
    assert space.shape is not None
    return np.empty(space.shape, space.dtype)


class _Window:
    """Pictures on the screen, by pygame, as many a second as the world has steps."""

    def __init__(self, size: int, rate: int) -> None:
        try:
            import pygame
        except ModuleNotFoundError as error:
            raise ResourceError(
                "render_mode='human' needs pygame, which is not installed",
                cause="it comes with the extra 'rl'",
                fix="pip install 'evalsuite[rl]', or render_mode='rgb_array'",
            ) from error
        self._pygame, self._size, self._rate = pygame, (size * ZOOM, size * ZOOM), rate
        self._surface: Any = None

    def show(self, image: Array) -> None:
        pygame = self._pygame
        if self._surface is None:
            pygame.display.init()
            self._surface, self._clock = pygame.display.set_mode(self._size), pygame.time.Clock()
        picture = pygame.surfarray.make_surface(image.swapaxes(0, 1))
        self._surface.blit(pygame.transform.scale(picture, self._size), (0, 0))
        pygame.event.pump()
        pygame.display.flip()
        self._clock.tick(self._rate)

    def close(self) -> None:
        if self._surface is not None:
            self._surface = None
            self._pygame.display.quit()


class Objects(gymnasium.Env[Array, Any]):
    """One world. ``info["is_success"]`` is true on the step that reaches the target.

    ``variant`` and further rules are those of :func:`evalsuite.worlds.rules`. An episode ends by touch
    (``terminated``) or after ``rules.steps`` steps (``truncated``); with ``time_limit_is_terminal`` the latter is
    ``terminated`` as well, as in the benchmark, whose agents do not bootstrap there. Actions: 0 up, 1 left, 2 down,
    3 right; in ``object-reaching`` targets from -1 to 1 for three joints. ``step`` raises :class:`ValueError` for
    others.

    ``render_mode="human"`` shows every step in a window (pygame).
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": 10}  # noqa: RUF012  # as gymnasium's

    def __init__(
        self,
        task: str,
        variant: str = "default",
        observation: Seen = "image",
        size: int = 64,
        time_limit_is_terminal: bool = False,
        render_mode: str | None = None,
        **changes: Any,
    ) -> None:
        self.rules = rules(task, variant, **changes)
        self.observation = observation
        self.time_limit_is_terminal = time_limit_is_terminal
        self.render_mode = _rendered(render_mode, self.metadata["render_modes"])
        self.metadata = {**self.metadata, "render_fps": self.rules.rate}
        self.world = world(self.rules, size)
        self.action_space = _actions(self.rules)
        self.observation_space = observation_space(self.rules, observation, size)
        self._size = size
        self._window = _Window(size, self.rules.rate) if render_mode == "human" else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self.world.reset(self.np_random)
        self._show()
        return self._seen(), {"is_success": False}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        reward, success, ended = self.world.act(action)
        late = not ended and self.world.taken >= self.rules.steps
        terminal = self.time_limit_is_terminal
        self._show()
        return self._seen(), reward, ended or (late and terminal), late and not terminal, {"is_success": success}

    def render(self) -> Array | None:
        if self.render_mode != "rgb_array":
            return None
        return self._picture()

    def close(self) -> None:
        if self._window is not None:
            self._window.close()

    def _show(self) -> None:
        if self._window is not None:
            self._window.show(self._picture())

    def _picture(self) -> Array:
        image = np.empty((self._size, self._size, 3), dtype=np.uint8)
        self.world.image(image)
        return image

    def _seen(self) -> Array:
        out = _empty(self.observation_space)
        _observe(self.world, self.observation, out)
        return out


class ObjectsVector(VectorEnv[Array, Array, Array]):
    """Many worlds of one kind in one process; arguments as of :class:`Objects`, but there is no window.

    World ``i`` is seeded with ``seed + i``. An episode that ends is followed by the next one in the same step
    (gymnasium's ``AutoresetMode.SAME_STEP``): the observation is the next episode's first, and
    ``info["final_obs"]`` and ``info["final_info"]`` hold the last of the one that ended.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  # as gymnasium's
        "render_modes": ["rgb_array"],
        "render_fps": 10,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int,
        task: str,
        variant: str = "default",
        observation: Seen = "image",
        size: int = 64,
        time_limit_is_terminal: bool = False,
        render_mode: str | None = None,
        **changes: Any,
    ) -> None:
        self.rules = rules(task, variant, **changes)
        self.num_envs = num_envs
        self.observation = observation
        self.time_limit_is_terminal = time_limit_is_terminal
        self.render_mode = _rendered(render_mode, self.metadata["render_modes"])
        self.metadata = {**self.metadata, "render_fps": self.rules.rate}
        self.worlds = [world(self.rules, size) for _ in range(num_envs)]
        self.single_action_space = _actions(self.rules)
        self.single_observation_space = observation_space(self.rules, observation, size)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._size = size
        self._rngs: list[np.random.Generator] = []

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        seeds = (
            [None if seed is None else seed + i for i in range(self.num_envs)] if not isinstance(seed, list) else seed
        )
        if seed is not None or not self._rngs:
            self._rngs = [gymnasium.utils.seeding.np_random(one)[0] for one in seeds]
        for world, rng in zip(self.worlds, self._rngs, strict=True):
            world.reset(rng)
        seen = _empty(self.observation_space)
        for index in range(self.num_envs):
            self._see(index, seen[index])
        return seen, {"is_success": np.zeros(self.num_envs, bool), "_is_success": np.ones(self.num_envs, bool)}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """One action each. Raises :class:`ValueError` before any world has moved where one cannot be done."""
        space, actions = self.action_space, np.asarray(actions)
        whole = actions.dtype.kind in "iu" or isinstance(space, gymnasium.spaces.Box)
        if not whole or actions.shape != space.shape or not space.contains(actions.astype(space.dtype)):
            raise ValueError(f"the actions of {self.num_envs} worlds are {space}, not {actions}")
        seen = _empty(self.observation_space)
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        ended, late, success = (np.zeros(self.num_envs, dtype=bool) for _ in range(3))
        last = np.full(self.num_envs, None, dtype=object)
        for index, (world, action) in enumerate(zip(self.worlds, actions, strict=True)):
            rewards[index], success[index], ended[index] = world.act(action)
            late[index] = not ended[index] and world.taken >= self.rules.steps
            self._see(index, seen[index])
            if ended[index] or late[index]:
                last[index] = seen[index].copy()
                world.reset(self._rngs[index])
                self._see(index, seen[index])
        over = ended | late
        info: dict[str, Any] = {"is_success": success & ~over, "_is_success": ~over}
        if over.any():
            info |= {"final_obs": last, "_final_obs": over.copy()}
            info["final_info"] = {"is_success": success & over, "_is_success": over.copy()}
            info["_final_info"] = over.copy()
        if self.time_limit_is_terminal:
            ended, late = over, np.zeros_like(late)
        return seen, rewards, ended, late, info

    def render(self) -> tuple[Array, ...] | None:
        return tuple(self.frames()) if self.render_mode == "rgb_array" else None

    def frames(self) -> npt.NDArray[np.uint8]:
        """Pictures (num_envs, size, size, 3) of all worlds, whatever the agent sees of them."""
        images = np.empty((self.num_envs, self._size, self._size, 3), dtype=np.uint8)
        for world, image in zip(self.worlds, images, strict=True):
            world.image(image)
        return images

    def snapshot(self) -> dict[str, Any]:
        """Where the worlds are and what they will draw next, in plain values."""
        return {
            "worlds": [world.snapshot() for world in self.worlds],
            "generators": [rng.bit_generator.state for rng in self._rngs],
        }

    def restore(self, values: dict[str, Any]) -> None:
        """Bring as many worlds of the same rules to where :meth:`snapshot` was made."""
        for world, there in zip(self.worlds, values["worlds"], strict=True):
            world.restore(there)
        for rng, state in zip(self._rngs, values["generators"], strict=True):
            rng.bit_generator.state = state

    def _see(self, index: int, out: Array) -> None:
        _observe(self.worlds[index], self.observation, out)
