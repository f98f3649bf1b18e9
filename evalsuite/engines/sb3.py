"""Agents by stable-baselines3, on worlds that are encoded once an observation, outside the policy."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from evalsuite.backbone import Backbone
from evalsuite.errors import UsageError
from evalsuite.features.poolings import ObservationEncoder
from evalsuite.files import atomic
from evalsuite.preflight import Demand, afford
from evalsuite.protocols import AgentProtocol, Arena, Played, PPOProtocol
from evalsuite.seeding import manual_seed
from evalsuite.signals import signals
from evalsuite.states import going_on_from, read_state
from evalsuite.task import Setup
from evalsuite.training import mix_seed

__all__ = ["Encoded", "Policy", "StableBaselines3", "policy_arguments"]

Array = npt.NDArray[Any]
PIXELS, FEW_STEPS = 64 * 64, 64  # of a picture of a world; steps that are timed to estimate the whole
TEST_WORLDS = 20  # that are played at once in a test
TRAIN, CURVE, FINAL, FILM = range(4)  # what a seed is for


class StableBaselines3:
    """The encoder runs in the worlds' wrapper, once an observation; the roll-out buffer holds its features.

    The algorithm is that of the protocol: PPO of a :class:`PPOProtocol`. Another one is a protocol of its own and a
    subclass whose :meth:`algorithm` knows it.
    """

    name = "sb3"
    job = "play"

    def version(self) -> str:
        return f"stable-baselines3 {version('stable-baselines3')}"

    def play(self, backbone: Backbone, protocol: AgentProtocol, arena: Arena, setup: Setup) -> Played:
        """Learn, then play the test episodes. Raises :class:`UsageError` for an encoder to be trained in float16."""
        if protocol.fine_tune and setup.precision == "16-mixed":
            raise UsageError(
                f"{protocol.id} does not train its encoder in precision 16-mixed",
                cause="this engine does not scale the loss, which float16 needs",
                fix="--precision bf16-mixed or 32-true",
            )
        with _global_generators():
            return _play(backbone, protocol, arena, setup, self)

    def algorithm(
        self, encoder: ObservationEncoder, worlds: Encoded, protocol: AgentProtocol, setup: Setup
    ) -> OnPolicyAlgorithm:
        """What learns by this protocol, on these worlds, its weights drawn anew.

        Raises :class:`UsageError` for the protocol of an algorithm that this engine does not have.
        """
        if isinstance(protocol, PPOProtocol):
            return _ppo(encoder, worlds, protocol, setup)
        raise UsageError(
            f"engine {self.name} does not learn by {protocol.id}",
            cause=f"its protocol is a {type(protocol).__name__}, and this engine has PPO",
            fix="--engine NAME of one that does, or a protocol of PPO",
        )


def _play(backbone: Backbone, protocol: AgentProtocol, arena: Arena, setup: Setup, engine: StableBaselines3) -> Played:
    encoder = ObservationEncoder(
        backbone, setup.device, reads=protocol.reads, pooling=protocol.pooling, layers=protocol.layers,
        size=protocol.encode_size, precision=setup.precision,
    )  # fmt: skip

    def make(count: int, variant: str) -> Encoded:
        return Encoded(arena.make(count, variant, encoder.observation), encoder, protocol)

    worlds = make(protocol.environments, protocol.variant)
    agent = engine.algorithm(encoder, worlds, protocol, setup)
    _begin(agent, encoder, worlds, setup)
    tokens = [encoder.tokens, encoder.width]
    _check_unseen(worlds, make, protocol, encoder)
    run = _Run(agent, worlds, encoder, f"{backbone.identity} {protocol.hash} {setup.seed} {engine.version()}", setup)
    began = time.monotonic()
    _learn(run, protocol, setup, make)
    trained = time.monotonic()
    successes, lengths = {}, {}
    for place, variant in enumerate((protocol.variant, *protocol.unseen)):
        count = min(TEST_WORLDS, protocol.test_episodes)
        found = _test(agent, make(count, variant), protocol.test_episodes, mix_seed(setup.seed, FINAL, place))
        successes[variant], _, lengths[variant] = found
    film = _film(agent, make(1, protocol.variant), setup.seed)
    details = {
        "policy_parameters": sum(p.numel() for p in agent.policy.parameters()), "steps": agent.num_timesteps,
        "encoded": run.encoded, "pooling": encoder.pooling,
        "tokens": tokens,
    }  # fmt: skip
    timings = {"train": trained - began, "test": time.monotonic() - trained}
    return Played(successes, lengths, run.curve, film, timings, details)


def _check_unseen(
    worlds: Encoded, make: Callable[[int, str], Encoded], protocol: AgentProtocol, encoder: ObservationEncoder
) -> None:
    """Refuse variants that show another number of vectors than the pooling takes, before anything is learnt."""
    for variant in protocol.unseen:
        shape = make(1, variant).observation_space.shape
        if shape != worlds.observation_space.shape and encoder.pooling not in ("transformer", "relation"):
            raise UsageError(
                f"an agent with pooling {encoder.pooling} cannot be tested on {variant}",
                cause=f"it learns from {worlds.observation_space.shape} and would see {shape}",
                fix="--set pooling=transformer, or leave the variant out of --set unseen=...",
            )


def _learn(run: _Run, protocol: AgentProtocol, setup: Setup, make: Callable[[int, str], Encoded]) -> None:
    """Update after update; a test comes first, at the first update at or after each ``test_every`` steps, and last."""
    agent, taken = run.agent, run.resume()
    update = agent.n_steps * agent.n_envs
    if not taken and setup.device.type == "cpu":
        afford(_demand(agent, protocol, setup), partial(_small_play, agent), setup.progress)
    with setup.progress.track("play", protocol.steps, taken) as meter, signals() as told:
        while True:
            over = taken >= protocol.steps
            if taken >= len(run.curve) * protocol.test_every or (over and run.curve[-1]["steps"] < taken):
                there = make(min(TEST_WORLDS, protocol.curve_episodes), protocol.variant)
                success, returns, lengths = _test(
                    agent, there, protocol.curve_episodes, mix_seed(setup.seed, CURVE, taken)
                )
                means = {"success": success.mean(), "return": returns.mean(), "length": lengths.mean()}
                run.curve.append({"steps": float(taken), **{name: float(mean) for name, mean in means.items()}})
            if over:
                break
            encoded = run.encoder.encoded
            agent.learn(update, reset_num_timesteps=False)
            run.encoded += run.encoder.encoded - encoded
            taken = agent.num_timesteps
            meter.update(min(taken, protocol.steps), success=run.curve[-1]["success"])
            run.save_if_due(stop=bool(told.signal))
            if told.signal:
                raise SystemExit(128 + told.signal)
    run.save_if_due(stop=True)


def _demand(agent: OnPolicyAlgorithm, protocol: AgentProtocol, setup: Setup) -> Demand:
    """What learning asks of the machine: time above all. A small step is as many whole minibatches of a few rounds."""
    few = math.lcm(agent.n_envs, getattr(agent, "batch_size", 1))
    few *= math.ceil(FEW_STEPS / few)
    return Demand(
        what=f"an agent by {protocol.id}", unit="steps", pixels=PIXELS, batch=1, at_once=few, few=few,
        steps=protocol.steps, patient=setup.patient, less=(), shorter=("--set steps={}", protocol.steps),
    )  # fmt: skip


def _small_play(agent: OnPolicyAlgorithm, steps: int) -> Iterator[float]:
    """So many steps and the update that they are for, in place of a whole roll-out: for a child process."""
    agent.n_steps = agent.rollout_buffer.buffer_size = steps // agent.n_envs
    agent.rollout_buffer.reset()
    agent.learn(steps, reset_num_timesteps=False)
    yield 0.0
    yield 0.0
    yield 0.0


# --- the worlds -------------------------------------------------------------------------------------------------


class Encoded(VecEnv):
    """Worlds for stable-baselines3, which shows the agent what the encoder says of them.

    With a fine-tuned encoder it shows the images (3, H, W) themselves. The observation an episode ended with is
    given only where value is bootstrapped from it.
    """

    def __init__(self, worlds: Any, encoder: ObservationEncoder, protocol: AgentProtocol) -> None:
        self.worlds, self.encoder, self.protocol = worlds, encoder, protocol
        self.bare = protocol.fine_tune
        self.start = 0  # the seed of the episodes that begin with a reset
        seen, _ = worlds.reset(seed=0)
        encoder.tokens, encoder.width = encoder.encode(seen[:1]).shape[1:]
        space: gymnasium.spaces.Box[Any]
        if self.bare:
            space = gymnasium.spaces.Box(0, 255, self._show(seen).shape[1:], np.uint8)
        else:
            space = gymnasium.spaces.Box(-np.inf, np.inf, (encoder.tokens, encoder.width), np.float32)
        self._actions = np.zeros(worlds.num_envs, dtype=np.int64)
        self._returns, self._lengths = np.zeros(worlds.num_envs), np.zeros(worlds.num_envs, dtype=np.int64)
        super().__init__(worlds.num_envs, space, worlds.single_action_space)

    def begin(self, seed: int) -> Array:
        """First observations of episodes that this seed fixes."""
        self._returns[:], self._lengths[:] = 0, 0
        return self._show(self.worlds.reset(seed=seed % 2**31)[0])

    def reset(self) -> Array:
        return self.begin(self.start)

    def step_async(self, actions: Array) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        seen, rewards, ended, late, info = self.worlds.step(self._actions)
        over = ended | late
        self._returns += rewards
        self._lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for place in np.flatnonzero(over):
            infos[place] = {
                "is_success": bool(info["final_info"]["is_success"][place]),
                "episode": {"r": float(self._returns[place]), "l": int(self._lengths[place]), "t": 0.0},
                "TimeLimit.truncated": bool(late[place]),
            }
            if late[place]:
                infos[place]["terminal_observation"] = self._show(info["final_obs"][place][None])[0]
        self._returns[over], self._lengths[over] = 0, 0
        return self._show(seen), rewards.astype(np.float32), over, infos

    def snapshot(self) -> dict[str, Any]:
        return {
            "worlds": self.worlds.snapshot(), "returns": self._returns.tolist(), "lengths": self._lengths.tolist()
        }  # fmt: skip

    def restore(self, values: dict[str, Any]) -> None:
        self.worlds.restore(values["worlds"])
        self._returns[:], self._lengths[:] = values["returns"], values["lengths"]

    def close(self) -> None:
        self.worlds.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.worlds, attr_name, None)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"worlds are what their rules say; {attr_name} cannot be set")

    def env_method(self, method_name: str, *arguments: Any, indices: Any = None, **named: Any) -> list[Any]:
        raise AttributeError(f"worlds have no {method_name} of their own")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        # episodes are counted here as stable-baselines3's Monitor does
        return [wrapper_class.__name__ == "Monitor"] * len(list(self._get_indices(indices)))

    def _show(self, seen: Array) -> Array:
        if self.bare:
            return np.ascontiguousarray(seen.transpose(0, 3, 1, 2))
        return self.encoder.encode(seen)


# --- the agent --------------------------------------------------------------------------------------------------


class _Pooled(BaseFeaturesExtractor):
    """The pooling; with it the encoder where that is trained along, whose norms keep their statistics."""

    def __init__(self, space: gymnasium.spaces.Box, encoder: ObservationEncoder, fine_tune: bool) -> None:
        pool = encoder.pool()
        super().__init__(space, int(pool.width))  # type: ignore[arg-type]  # every pooling has one
        self.pool, self.trained = pool, None
        if fine_tune:  # stable-baselines3 draws weights as matrices, which channels last are not
            self.trained = deepcopy(encoder.backbone).to(memory_format=torch.contiguous_format)
        self._encoder = [encoder]  # in a list, so that it is no part of this module

    def forward(self, seen: Tensor) -> Tensor:
        if self.trained is not None:
            (encoder,) = self._encoder
            whole, encoder.backbone = encoder.backbone, self.trained
            try:
                seen = encoder.look(seen)  # stable-baselines3 has divided by 255
            finally:
                encoder.backbone = whole
        pooled: Tensor = self.pool(seen)
        return pooled

    def train(self, mode: bool = True) -> _Pooled:
        super().train(mode)
        if self.trained is not None:
            self.trained.eval()
        return self


class _Heads(nn.Module):
    """What policy and value are read off: 64-64 ReLU that both share, then 64 tanh each; or nothing."""

    def __init__(self, width: int, kind: Literal["mlp", "identity"]) -> None:
        super().__init__()
        mlp = kind == "mlp"
        self.latent_dim_pi = self.latent_dim_vf = 64 if mlp else width
        shared = [nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        self.shared = nn.Sequential(*shared) if mlp else nn.Identity()
        self.policy = nn.Sequential(nn.Linear(64, 64), nn.Tanh()) if mlp else nn.Identity()
        self.value = nn.Sequential(nn.Linear(64, 64), nn.Tanh()) if mlp else nn.Identity()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.shared(features)
        return self.policy(shared), self.value(shared)

    def forward_actor(self, features: Tensor) -> Tensor:
        found: Tensor = self.policy(self.shared(features))
        return found

    def forward_critic(self, features: Tensor) -> Tensor:
        found: Tensor = self.value(self.shared(features))
        return found


class Policy(ActorCriticPolicy):
    """Policy and value on pooled features, by the ``head`` of the protocol."""

    def __init__(self, *arguments: Any, head: Literal["mlp", "identity"], **named: Any) -> None:
        self._head: Literal["mlp", "identity"] = head
        super().__init__(*arguments, **named)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _Heads(self.features_dim, self._head)  # type: ignore[assignment]  # same face, other layers


def policy_arguments(encoder: ObservationEncoder, protocol: AgentProtocol) -> dict[str, Any]:
    """The ``policy_kwargs`` of stable-baselines3 that :class:`Policy` takes, whatever the algorithm."""
    return {
        "features_extractor_class": _Pooled, "head": protocol.head,
        "features_extractor_kwargs": {"encoder": encoder, "fine_tune": protocol.fine_tune},
    }  # fmt: skip


def _ppo(encoder: ObservationEncoder, worlds: Encoded, protocol: PPOProtocol, setup: Setup) -> PPO:
    return PPO(
        Policy, worlds, learning_rate=protocol.lr, n_steps=protocol.rollout, batch_size=protocol.batch_size,
        n_epochs=protocol.epochs, gamma=protocol.discount, gae_lambda=protocol.smoothing, clip_range=protocol.clip,
        ent_coef=protocol.entropy, vf_coef=protocol.value, max_grad_norm=protocol.clip_gradient,
        seed=setup.seed, device=setup.device,
        policy_kwargs={
            **policy_arguments(encoder, protocol),
            "optimizer_kwargs": {"eps": 1e-5, "fused": True},  # stable-baselines3's own Adam, in one call a step
        },
    )  # fmt: skip


def _begin(agent: OnPolicyAlgorithm, encoder: ObservationEncoder, worlds: Encoded, setup: Setup) -> None:
    """Before the first step: no log files, the encoder's own weights where it is trained, and seeded episodes."""
    agent.set_logger(Logger(folder=None, output_formats=[]))  # its own makes a folder for each run in /tmp
    trained = agent.policy.features_extractor.trained
    if isinstance(trained, nn.Module):  # stable-baselines3 draws all layers anew, those of the encoder too
        trained.load_state_dict(encoder.backbone.state_dict())
    agent._last_obs = worlds.begin(mix_seed(setup.seed, TRAIN))
    agent._last_episode_starts = np.ones(worlds.num_envs, dtype=bool)


@dataclass
class _Run:
    """A run's state between two updates, on disk: the same numbers follow whether it was read back or not."""

    agent: OnPolicyAlgorithm
    worlds: Encoded
    encoder: ObservationEncoder
    key: str
    setup: Setup
    curve: list[dict[str, float]] = field(default_factory=list)
    encoded: int = 0  # observations, while it learnt
    saved: float = field(default_factory=time.monotonic)

    def resume(self) -> int:
        """The steps that are behind; 0 where there is no state of this run."""
        path = self.setup.work / "agent.pt"
        found = read_state(path, self.key, self.setup.progress)
        if found is None:
            return 0
        with going_on_from(path):
            self._restore(found)
        return int(found["steps"])

    def _restore(self, found: dict[str, Any]) -> None:
        self.agent.policy.load_state_dict(found["policy"])
        self.agent.policy.optimizer.load_state_dict(found["optimizer"])
        self.agent.num_timesteps, self.agent._n_updates = found["steps"], found["updates"]
        self.agent._last_obs = found["seen"].numpy()
        self.agent._last_episode_starts = found["starts"].numpy()
        self.worlds.restore(found["worlds"])
        kind, keys, *rest = found["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(found["torch"])
        torch.cuda.set_rng_state_all(found["cuda"])
        self.curve[:], self.encoded = found["curve"], found["encoded"]

    def save_if_due(self, stop: bool) -> None:
        if not stop and time.monotonic() - self.saved < self.setup.save_every:
            return
        self.saved = time.monotonic()
        kind, keys, *rest = np.random.get_state(legacy=True)
        content = {
            "key": self.key, "steps": self.agent.num_timesteps, "updates": self.agent._n_updates,
            "policy": self.agent.policy.state_dict(), "optimizer": self.agent.policy.optimizer.state_dict(),
            "seen": torch.from_numpy(np.asarray(self.agent._last_obs)),
            "starts": torch.from_numpy(np.asarray(self.agent._last_episode_starts)),
            "worlds": self.worlds.snapshot(), "numpy": [kind, np.asarray(keys).tolist(), *rest],
            "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all(),
            "curve": self.curve, "encoded": self.encoded,
        }  # fmt: skip
        with atomic(self.setup.work / "agent.pt") as partial:
            torch.save(content, partial)


# --- tests ------------------------------------------------------------------------------------------------------


def _test(agent: OnPolicyAlgorithm, worlds: Encoded, episodes: int, seed: int) -> tuple[Array, Array, Array]:
    """Success, return and length of as many episodes, counted by stable-baselines3 so that short ones gain nothing.

    They are in the order of worlds, and within a world of time: the k-th layout of a world does not depend on who
    plays, so that two agents' episodes are paired.
    """
    found: list[tuple[int, int, bool, float, int]] = []

    def note(inside: dict[str, Any], outside: dict[str, Any]) -> None:
        if inside["done"]:
            told = inside["info"]
            found.append((inside["i"], len(found), told["is_success"], told["episode"]["r"], told["episode"]["l"]))

    worlds.start = seed
    with _own_torch_generator(seed), _shown(agent, worlds):
        evaluate_policy(agent.policy, worlds, episodes, deterministic=False, callback=note, warn=False)
    _, _, success, returns, lengths = zip(*sorted(found), strict=True)
    return np.array(success, dtype=bool), np.array(returns), np.array(lengths, dtype=np.int64)


def _film(agent: OnPolicyAlgorithm, world: Encoded, seed: int) -> npt.NDArray[np.uint8]:
    """The frames of one episode."""
    frames, over = [], False
    with _own_torch_generator(mix_seed(seed, FILM)):
        seen = world.begin(mix_seed(seed, FILM))
        while not over:
            frames.append(world.worlds.frames()[0])
            world.step_async(agent.policy.predict(seen, deterministic=False)[0])
            seen, _, ends, _ = world.step_wait()
            over = bool(ends[0])
    return np.stack(frames)


@contextmanager
def _shown(agent: OnPolicyAlgorithm, worlds: Encoded) -> Iterator[None]:
    """The policy takes what these worlds show, perhaps more or fewer vectors than those it learns in."""
    before, agent.policy.observation_space = agent.policy.observation_space, worlds.observation_space
    try:
        yield
    finally:
        agent.policy.observation_space = before


@contextmanager
def _own_torch_generator(seed: int) -> Iterator[None]:
    """Draw what is drawn inside from ``seed``, and leave torch's generator as it was."""
    with torch.random.fork_rng():
        manual_seed(seed)
        yield


@contextmanager
def _global_generators() -> Iterator[None]:
    """Stable-baselines3 seeds Python's and numpy's own generators: give them back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
