"""Object-centric reinforcement learning: worlds with pictures against PIL's way of drawing them, and an encoder that is
asked once an observation against one inside the policy.

PIL's way is that of spriteworld, in which the benchmark's worlds were drawn: polygons on a canvas ten times too large,
brought down by a Lanczos filter, the whole picture anew at every step. Rules, actions and episodes are the same.

The agents are stable-baselines3's PPO with the published numbers over a shorter roll-out, ten passes over each, which
does not move the ratio: an encoder inside the policy sees an observation once when it acts and once a pass. It is
frozen and runs without gradients in both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.spaces import Box
from PIL import Image, ImageDraw
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from evalsuite.backbone import build
from evalsuite.engines.sb3 import Encoded
from evalsuite.features.poolings import ObservationEncoder
from evalsuite.hooks import load
from evalsuite.protocols import PPOProtocol
from evalsuite.tasks.objects import ObjectGoal
from evalsuite.worlds import Objects, ObjectsVector, World
from evalsuite.worlds.sprites import outline

TASK, SIZE, WORLDS = "object-goal", 64, 16
ROUNDS = 3
SIDES = {64: 128, 224: 16}  # what the encoder sees, its own size the last -> steps of each of four worlds in a roll-out


def run() -> list[dict[str, Any]]:
    return [*_worlds(), *(row for side, rollout in SIDES.items() for row in _encoder(side, rollout))]


# Worlds ----------------------------------------------------------------------------------------------------


class _ByPil(Objects):
    """The same world, drawn by PIL."""

    def _seen(self) -> npt.NDArray[Any]:
        image = Image.new("RGB", (10 * SIZE, 10 * SIZE))
        draw = ImageDraw.Draw(image)
        assert isinstance(self.world, World)
        for sprite in self.world.sprites():
            corners = 10 * SIZE * (np.array([sprite.x, sprite.y]) + sprite.scale * outline(sprite.shape))
            draw.polygon([(float(x), float(y)) for x, y in corners], fill=sprite.rgb)
        return np.flipud(np.array(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)))


def _worlds() -> list[dict[str, Any]]:
    loops: Mapping[str, Callable[[], float]] = {
        "pil": lambda: _alone(_ByPil(TASK), 300),
        "single": lambda: _alone(Objects(TASK), 3000),
        "batched": _together,
    }
    found: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(ROUNDS):
        for name, loop in loops.items():
            found[name].append(loop())
    rate = {name: statistics.median(values) for name, values in found.items()}
    return [
        {
            "name": f"{TASK}, {SIZE} pixels, {told}", "steps_s": rate[name], "pil_steps_s": rate["pil"],
            "ratio": rate[name] / rate["pil"], "goal": goal,
        }
        for name, told, goal in (("single", "one world", ">= 10"), ("batched", f"{WORLDS} worlds", ">= 20"))
    ]  # fmt: skip


def _alone(world: Objects, steps: int) -> float:
    """Steps a second, resets among them."""
    world.reset(seed=0)
    actions = np.random.default_rng(0).integers(4, size=steps)
    began = time.process_time()
    for action in actions:
        _, _, ended, late, _ = world.step(action)
        if ended or late:
            world.reset()
    return steps / (time.process_time() - began)


def _together(steps: int = 300) -> float:
    worlds = ObjectsVector(WORLDS, TASK)
    worlds.reset(seed=0)
    actions = np.random.default_rng(0).integers(4, size=(steps, WORLDS))
    began = time.process_time()
    for row in actions:
        worlds.step(row)
    return steps * WORLDS / (time.process_time() - began)


# Agents ----------------------------------------------------------------------------------------------------


class _Inside(BaseFeaturesExtractor):
    """Encoder and pooling as the policy's own."""

    def __init__(self, space: Box, encoder: ObservationEncoder, inside: bool) -> None:
        pool = encoder.pool()
        super().__init__(space, int(pool.width))  # type: ignore[arg-type]  # every pooling has one
        self.pool, self.inside, self.seen = pool, inside, 0
        self._encoder = [encoder]  # in a list, so that the policy neither trains nor draws it

    def forward(self, seen: Tensor) -> Tensor:
        if self.inside:
            self.seen += len(seen)
            with torch.no_grad():
                seen = self._encoder[0].look(seen)
        pooled: Tensor = self.pool(seen)
        return pooled


def _encoder(side: int, rollout: int) -> list[dict[str, Any]]:
    kinds = {"wrapper": False, "policy": True}
    agents = {name: _agent(inside, side, rollout) for name, inside in kinds.items()}
    took: dict[str, list[float]] = {name: [] for name in agents}
    steps = 4 * rollout
    for _ in range(ROUNDS):
        for name, (agent, _) in agents.items():
            began = time.process_time()
            agent.learn(steps, reset_num_timesteps=False)
            took[name].append((time.process_time() - began) / steps * 10_000)
    seconds = {name: statistics.median(values) for name, values in took.items()}
    asked = {name: _asked(agent, encoder) / agent.num_timesteps for name, (agent, encoder) in agents.items()}
    about = {"encoder": "ResNet-18", "pixels": side}
    return [
        {
            "name": "PPO, encoder once an observation against inside the policy", **about,
            "wrapper_s_10k": seconds["wrapper"], "policy_s_10k": seconds["policy"],
            "ratio": seconds["policy"] / seconds["wrapper"], "goal": ">= 5",
        },
        {
            "name": "encodings an observation", **about, "policy": asked["policy"], "ratio": asked["wrapper"],
            "goal": "1",
        },
    ]  # fmt: skip


def _agent(inside: bool, side: int, rollout: int) -> tuple[PPO, ObservationEncoder]:
    torch.manual_seed(0)
    backbone = build("timm:resnet18", load(environ={"EVALSUITE_PLUGINS": ""}).registry).eval()
    encoder = ObservationEncoder(backbone, torch.device("cpu"), reads="pooled", size=side)
    published = next(p for p in ObjectGoal.protocols if isinstance(p, PPOProtocol))
    protocol = replace(published, fine_tune=inside)  # shows the images themselves
    worlds = Encoded(ObjectsVector(4, TASK), encoder, protocol)
    agent = PPO(
        ActorCriticPolicy, worlds, n_steps=rollout, batch_size=32, seed=0, device="cpu",
        policy_kwargs={
            "features_extractor_class": _Inside,
            "features_extractor_kwargs": {"encoder": encoder, "inside": inside},
            "optimizer_kwargs": {"eps": 1e-5, "fused": True},
        },
    )  # fmt: skip
    encoder.calls = encoder.encoded = 0
    return agent, encoder


def _asked(agent: PPO, encoder: ObservationEncoder) -> int:
    """How many observations were encoded, here or there."""
    extractor = agent.policy.features_extractor
    assert isinstance(extractor, _Inside)
    return encoder.encoded + extractor.seen
