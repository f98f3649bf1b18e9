"""Object-centric reinforcement learning: what an encoder is worth to an agent among a few objects."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor, nn

from evalsuite.backbone import Backbone
from evalsuite.errors import BackboneError
from evalsuite.files import atomic
from evalsuite.fit import Fit, fit, mix_seed
from evalsuite.poolings import Encoder
from evalsuite.protocols import AgentProtocol, Arena, Played, ProxyProtocol, Reading
from evalsuite.statistics import weight_blocks
from evalsuite.task import Metric, Outcome, Protocol, Setup, Task
from evalsuite.worlds import ObjectsVector, World, rules

__all__ = ["ObjectComparison", "ObjectGoal", "ObjectInteraction", "PropertyComparison"]

REPLICATES = 1000
WORLDS = 1  # raised when rules or pictures change, for they are the data
Floats = npt.NDArray[Any]

COLOURS = ("ocr-color1", "ocr-color2", "ocr-color3")
LOOKS = (
    "agent-color1", "agent-color2", "agent-shape1", "agent-shape2", "ocr-color1", "ocr-color2", "ocr-shape1",
    "ocr-shape2", "ocr-color2-shape2",
)  # fmt: skip


def _recipes(counts: tuple[int, ...], looks: tuple[str, ...], short: int) -> tuple[Reading, ...]:
    """The protocols all tasks here share; ``counts`` are numbers of objects that were not learnt."""
    unseen = (*looks, *(f"objects-{n}" for n in counts))
    paper = AgentProtocol(id="ppo-2m", version=1, steps=2_000_000, unseen=unseen)
    return (
        paper,
        replace(paper, id="ppo-short", steps=short, test_every=10_240, curve_episodes=50, test_episodes=300),
        ProxyProtocol(id="proxy", version=1, unseen=looks),
    )


class _Objects(Task):
    """One task of the benchmark.

    Protocols: ``ppo-2m`` (default) is the benchmark's recipe (Yoon et al., ICML 2023; jsikyoon/OCRL, configs/):
    two million steps of four worlds, entropy 0.01 (its Slot Attention runs have ``--set entropy=0.001``), tests of
    100 episodes every 4,000 steps, with actions drawn. Ground-truth states have three layers there:
    ``--set layers=3``. ``ppo-short``: the same over fewer steps; ours. ``proxy``: no agent but a supervised head,
    minutes; ours, and not to be compared with success rates.

    ``success`` is the share of test episodes that reach the target, ``area`` the mean of the curve of success over
    steps, ``generalisation`` the mean success over the unseen variants; ``accuracy`` is the proxy's.
    """

    metrics = (Metric("success"), Metric("area"), Metric("generalisation"))
    primary = "success"
    needs = frozenset[str]()
    engines = ("sb3",)
    protocols: ClassVar[tuple[Reading, ...]]

    def promises(self, protocol: Protocol) -> tuple[Metric, ...]:
        return PROXY if isinstance(protocol, ProxyProtocol) else self.metrics

    def leading(self, protocol: Protocol) -> str:
        return "accuracy" if isinstance(protocol, ProxyProtocol) else self.primary

    def requires(self, protocol: Protocol) -> frozenset[str]:
        reads = protocol.reads if isinstance(protocol, Reading) else "auto"
        return frozenset() if reads == "auto" else frozenset({reads})

    def refuse(self, backbone: Backbone, protocol: Protocol) -> None:
        super().refuse(backbone, protocol)
        if not backbone.gives & {"tokens", "pooled"}:
            raise BackboneError(
                f"{self.name} needs tokens or pooled, and {backbone.spec.arch} gives neither",
                cause=f"it gives {', '.join(sorted(backbone.gives))}",
                fix="choose a backbone that gives a vector an image, or a set of them",
            )

    def fingerprint(self, setup: Setup) -> str:
        """The rules are the data."""
        protocol = _reading(setup)
        known = [asdict(rules(self.name, variant)) for variant in (protocol.variant, *protocol.unseen)]
        return hashlib.sha256(f"{WORLDS} {known}".encode()).hexdigest()[:32]

    def run(self, backbone: Backbone, setup: Setup) -> Outcome:
        if isinstance(setup.protocol, ProxyProtocol):
            return _proxy(self, backbone, setup, setup.protocol)
        return self._play(backbone, setup)

    def arena(self, protocol: AgentProtocol) -> Arena:
        """Where the agent acts."""
        return _Arena(self.name, protocol.time_limit_is_terminal)

    def _play(self, backbone: Backbone, setup: Setup) -> Outcome:
        protocol = setup.protocol
        assert isinstance(protocol, AgentProtocol)
        if setup.limit is not None:
            protocol = replace(protocol, test_episodes=min(protocol.test_episodes, setup.limit))
        engine = setup.registry.get("engine", setup.engine or self.engines[0])()
        found: Played = engine.play(backbone, protocol, self.arena(protocol), setup)
        success = found.successes[protocol.variant]
        unseen = {name: found.successes[name] for name in protocol.unseen}
        curve, film = setup.work / "curve.png", setup.work / "episode.gif"
        _draw_curve(found.curve, protocol, self.name, curve)
        _write_film(found.film, film)
        general, again = _generalisation(unseen)
        return Outcome(
            scores={"success": float(success.mean()), "area": _area(found.curve), "generalisation": general},
            replicates={"success": _resampled(success), **again},
            samples={"success": success.astype(np.float32)},
            ids=[f"episode-{place}" for place in range(len(success))],
            data={"fingerprint": self.fingerprint(setup), "worlds": self.name, "test_episodes": len(success)},
            figures={"curve": curve, "episode": film},
            timings=found.timings,
            details={
                **found.details, "curve": found.curve,
                "success_by_variant": {name: float(values.mean()) for name, values in found.successes.items()},
                "length_by_variant": {name: float(values.mean()) for name, values in found.lengths.items()},
            },
        )  # fmt: skip


class _Arena:
    def __init__(self, task: str, time_limit_is_terminal: bool) -> None:
        self.task, self.terminal = task, time_limit_is_terminal

    def make(self, count: int, variant: str, observation: str) -> ObjectsVector:
        return ObjectsVector(
            count, self.task, variant, "state" if observation == "state" else "image",
            time_limit_is_terminal=self.terminal,
        )  # fmt: skip


class ObjectGoal(_Objects):
    """Go to the blue square among four objects."""

    name = "object-goal"
    protocols = _recipes((1, 2, 3, 5, 6, 7), COLOURS, 200_000)


class ObjectInteraction(_Objects):
    """Push the blue square, of three, into the lower left corner."""

    name = "object-interaction"
    protocols = _recipes((), COLOURS, 400_000)


class ObjectComparison(_Objects):
    """Go to the object that differs from the three others, which are alike, in one property."""

    name = "object-comparison"
    protocols = _recipes((3, 5, 6), LOOKS, 400_000)


class PropertyComparison(_Objects):
    """Go to the object that has a colour or a shape of its own; in the other property no object is alone."""

    name = "property-comparison"
    protocols = _recipes((3, 5, 6), LOOKS, 400_000)


def _reading(setup: Setup) -> Reading:
    assert isinstance(setup.protocol, Reading)
    return setup.protocol


def _resampled(success: npt.NDArray[np.bool_]) -> Floats:
    """Bootstrap replicates of the mean over episodes, the same resamples whoever played."""
    blocks = [block @ success / block.sum(axis=1) for block in weight_blocks(len(success), REPLICATES, 0)]
    return np.concatenate(blocks)


def _generalisation(unseen: Mapping[str, npt.NDArray[np.bool_]]) -> tuple[float | None, dict[str, Floats]]:
    """The mean over variants, and its replicates; None where there are none."""
    if not unseen:
        return None, {}
    replicates = np.mean([_resampled(values) for values in unseen.values()], axis=0)
    return float(np.mean([values.mean() for values in unseen.values()])), {"generalisation": replicates}


def _area(curve: list[dict[str, float]]) -> float:
    """The mean success over all steps, by the trapezoidal rule."""
    steps, success = np.array([[point["steps"], point["success"]] for point in curve]).T
    return float(np.trapezoid(success, steps) / (steps[-1] - steps[0]))


def _draw_curve(curve: list[dict[str, float]], protocol: AgentProtocol, title: str, path: Path) -> None:
    """Success over steps, with the 95 % Wilson interval of each test."""
    bands = []
    for place, point in enumerate(curve):
        count = protocol.test_episodes if place == len(curve) - 1 else protocol.curve_episodes
        bands.append(binomtest(round(point["success"] * count), count).proportion_ci(method="wilson"))
    steps = [point["steps"] / 1000 for point in curve]
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure((5, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.fill_between(steps, [b.low for b in bands], [b.high for b in bands], alpha=0.25, linewidth=0)
        axes.plot(steps, [point["success"] for point in curve])
        axes.set(xlabel="thousand steps", ylabel="success", ylim=(0, 1), xlim=(0, steps[-1]), title=title)
        axes.spines[["top", "right"]].set_visible(False)
        with atomic(path) as partial:
            figure.savefig(partial, dpi=150, format="png")


def _write_film(frames: npt.NDArray[np.uint8], path: Path, zoom: int = 4) -> None:
    """An animated GIF, ten frames a second; the last one stays."""
    pictures = [
        Image.fromarray(f).resize((f.shape[1] * zoom, f.shape[0] * zoom), Image.Resampling.NEAREST) for f in frames
    ]
    durations = [100] * (len(pictures) - 1) + [1000]
    with atomic(path) as partial:
        pictures[0].save(partial, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


# --- the proxy --------------------------------------------------------------------------------------------------

PROXY = (Metric("accuracy"), Metric("generalisation"))


class _Head(nn.Module):
    """A pooling and a linear layer that says in which quadrant the target is."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.pool = encoder.pool()
        self.linear = nn.Linear(int(self.pool.width), 4)  # type: ignore[arg-type]  # every pooling has one

    def forward(self, batch: list[tuple[Tensor, int]]) -> Mapping[str, Tensor]:
        device = self.linear.weight.device
        logits = self.logits(torch.stack([tokens for tokens, _ in batch]).to(device))
        labels = torch.tensor([label for _, label in batch], device=device)
        return {"cross_entropy": nn.functional.cross_entropy(logits, labels)}

    def logits(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.linear(self.pool(tokens))
        return found


def _frames(task: str, variant: str, count: int, seed: int, encoder: Encoder) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """Features (count, tokens, width) of first frames, and the quadrants of their targets.

    Objects are one a quadrant where there are four; where they are three, the target may be anywhere.
    """
    found = rules(task, variant, mode="hard" if task == "object-interaction" else "normal")
    rng, world = np.random.default_rng(seed), World(found)
    parts, labels = [], np.empty(count, dtype=np.int64)
    for start in range(0, count, 64):
        size = min(64, count - start)
        shape = (size, found.rows, 5) if encoder.observation == "state" else (size, 64, 64, 3)
        seen = np.empty(shape, np.float32 if encoder.observation == "state" else np.uint8)
        for place in range(size):
            world.reset(rng)
            if encoder.observation == "state":
                world.state(seen[place])
            else:
                world.image(seen[place])
            target = world.items[world.target]
            labels[start + place] = int(target.x > 0.5) + 2 * int(target.y > 0.5)
        parts.append(encoder.encode(seen))
    return torch.from_numpy(np.concatenate(parts)), labels


def _proxy(task: Task, backbone: Backbone, setup: Setup, protocol: ProxyProtocol) -> Outcome:
    encoder = Encoder(
        backbone, setup.device, reads=protocol.reads, pooling=protocol.pooling, layers=protocol.layers,
        size=protocol.encode_size,
    )  # fmt: skip
    began = monotonic()
    train, test = (
        n if setup.limit is None else min(n, setup.limit) for n in (protocol.train_images, protocol.test_images)
    )
    # all seeds are tested on the same frames; each learns from its own
    seen, labels = _frames(task.name, protocol.variant, train, mix_seed(setup.seed, 0), encoder)
    asked = {
        variant: _frames(task.name, variant, test, mix_seed(0, 1, place), encoder)
        for place, variant in enumerate((protocol.variant, *protocol.unseen))
    }
    encoded = monotonic()
    head = _fit_head(_Head(encoder), seen, labels, backbone, setup, protocol)
    hits = {variant: _hits(head, *found) for variant, found in asked.items()}
    own = hits[protocol.variant]
    general, again = _generalisation({name: hits[name] for name in protocol.unseen})
    return Outcome(
        scores={"accuracy": float(own.mean()), "generalisation": general},
        replicates={"accuracy": _resampled(own), **again},
        samples={"accuracy": own.astype(np.float32)},
        ids=[f"frame-{place}" for place in range(len(own))],
        data={"fingerprint": task.fingerprint(setup), "worlds": task.name, "train_images": train, "test_images": test},
        timings={"encode": encoded - began, "fit": monotonic() - encoded},
        details={
            "proxy": "a supervised head, no agent", "pooling": encoder.pooling,
            "tokens": [encoder.tokens, encoder.width], "encoder_calls": encoder.calls, "encoded": encoder.encoded,
            "accuracy_by_variant": {name: float(values.mean()) for name, values in hits.items()},
        },
    )  # fmt: skip


def _fit_head(
    head: _Head, seen: Tensor, labels: npt.NDArray[np.int64], backbone: Backbone, setup: Setup, protocol: ProxyProtocol
) -> _Head:
    steps = math.ceil(len(seen) / protocol.batch_size) * protocol.epochs
    fabric = Fabric(accelerator=setup.device.type, devices=1 if setup.device.index is None else [setup.device.index])
    fabric.launch()

    def sample(index: int, seed: int) -> tuple[Tensor, int]:
        return seen[index], int(labels[index])

    run = Fit(
        model=head,
        optimizer=torch.optim.AdamW(head.parameters(), protocol.lr, weight_decay=protocol.weight_decay),
        rate=partial(_cosine, steps=steps), iterations=steps, sample=sample, length=len(seen),
        batch_size=protocol.batch_size, seed=setup.seed,
        key=f"{backbone.identity} {protocol.hash} {len(seen)} {setup.seed}", state=setup.work / "state.pt",
        saves=setup.save_every,
    )  # fmt: skip
    fit(run, fabric, setup.progress)
    return head.to(setup.device)


def _cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.inference_mode()
def _hits(head: _Head, seen: Tensor, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    device = head.linear.weight.device
    found = [head.eval().logits(part.to(device)).argmax(dim=1).cpu().numpy() for part in seen.split(256)]
    return np.asarray(np.concatenate(found) == labels)
