"""Object-centric reinforcement learning: what an encoder is worth to an agent among a few objects."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar, Self

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor, nn

from evalsuite.backbone import Backbone
from evalsuite.errors import BackboneError, ResourceError, UsageError
from evalsuite.features.poolings import ObservationEncoder
from evalsuite.files import atomic
from evalsuite.protocols import AgentProtocol, Arena, Played, PPOProtocol, ProxyProtocol
from evalsuite.states import going_on_from, read_state
from evalsuite.statistics import REPLICATES, iqm, over_seeds, stratified_bootstrap, weight_blocks
from evalsuite.task import Metric, Outcome, Protocol, Setup, Task, evaluate
from evalsuite.training import Fit, cosine, fit, launched, mix_seed
from evalsuite.worlds import VERSION, ObjectsVector, Rules, rules, world

__all__ = [
    "ObjectCentric",
    "ObjectComparison",
    "ObjectGoal",
    "ObjectInteraction",
    "ObjectReaching",
    "PropertyComparison",
    "Suite",
]

Floats = npt.NDArray[Any]

COLOURS = ("ocr-color1", "ocr-color2", "ocr-color3")
REACHING = ("agent-color1", "agent-color2", "agent-color3")
LOOKS = (
    "agent-color1", "agent-color2", "agent-shape1", "agent-shape2", "ocr-color1", "ocr-color2", "ocr-shape1",
    "ocr-shape2", "ocr-color2-shape2",
)  # fmt: skip


OwnProtocol = AgentProtocol | ProxyProtocol


def _recipes(counts: tuple[int, ...], looks: tuple[str, ...], short: int, **own: Any) -> tuple[OwnProtocol, ...]:
    """The protocols all tasks here share; ``counts`` are numbers of objects that were not learnt."""
    unseen = (*looks, *(f"objects-{n}" for n in counts))
    paper = PPOProtocol(id="ppo-2m", version=1, steps=2_000_000, unseen=unseen, **own)
    return (
        paper,
        replace(paper, id="ppo-short", steps=short, test_every=10_240, curve_episodes=50, test_episodes=300),
        ProxyProtocol(id="proxy", version=1, unseen=looks),
    )


GENERALISATION = Metric("generalisation", undefined="the protocol tests on no variant but the one that it learns on")


class _Objects(Task[OwnProtocol]):
    """One task of the benchmark.

    Protocols: ``ppo-2m`` (default) is the benchmark's recipe (Yoon et al., ICML 2023; jsikyoon/OCRL, configs/):
    two million steps of four worlds, entropy 0.01 (its Slot Attention runs have ``--set entropy=0.001``), tests of
    100 episodes every 4,000 steps, with actions drawn. Ground-truth states have three layers there:
    ``--set layers=3``. ``ppo-short``: the same over fewer steps; ours. ``proxy``: no agent but a supervised head,
    minutes; ours, and not to be compared with success rates.

    ``success`` is the share of test episodes that reach the target, ``area`` the mean of the curve of success over
    steps, ``generalisation`` the mean success over the unseen variants; ``accuracy`` is the proxy's.
    """

    metrics = (Metric("success"), Metric("area"), GENERALISATION)
    primary = "success"
    needs = frozenset[str]()
    shows = frozenset({"image", "state"})
    engines = ("sb3",)
    protocols: ClassVar[tuple[OwnProtocol, ...]]

    def promises(self, protocol: OwnProtocol) -> tuple[Metric, ...]:
        return PROXY if isinstance(protocol, ProxyProtocol) else self.metrics

    def leading(self, protocol: OwnProtocol) -> str:
        return "accuracy" if isinstance(protocol, ProxyProtocol) else self.primary

    def requires(self, protocol: OwnProtocol) -> frozenset[str]:
        return frozenset() if protocol.reads == "auto" else frozenset({protocol.reads})

    def refuse(self, backbone: Backbone, protocol: OwnProtocol) -> None:
        super().refuse(backbone, protocol)
        if not backbone.gives & {"tokens", "pooled"}:
            raise BackboneError(
                f"{self.name} needs tokens or pooled, and {backbone.spec.arch} gives neither",
                cause=f"it gives {', '.join(sorted(backbone.gives))}",
                fix="choose a backbone that gives a vector an image, or a set of them",
            )

    def fingerprint(self, setup: Setup[OwnProtocol]) -> str:
        """The rules are the data."""
        protocol = setup.protocol
        known = [asdict(rules(self.name, variant)) for variant in (protocol.variant, *protocol.unseen)]
        return hashlib.sha256(f"{VERSION} {known}".encode()).hexdigest()[:32]

    def run(self, backbone: Backbone, setup: Setup[OwnProtocol]) -> Outcome:
        protocol = setup.protocol
        if isinstance(protocol, ProxyProtocol):
            return _proxy(self, backbone, setup, protocol)
        return self._play(backbone, setup, protocol)

    def arena(self, protocol: AgentProtocol) -> Arena:
        """Where the agent acts."""
        return _Arena(self.name, protocol.time_limit_is_terminal)

    def _play(self, backbone: Backbone, setup: Setup[OwnProtocol], protocol: AgentProtocol) -> Outcome:
        if setup.limit is not None:
            protocol = replace(protocol, test_episodes=min(protocol.test_episodes, setup.limit))
        engine = setup.registry.get("engine", setup.engine or self.engines[0])()
        found: Played = engine.play(backbone, protocol, self.arena(protocol), setup)
        success = found.successes[protocol.variant]
        unseen = {name: found.successes[name] for name in protocol.unseen}
        curve, film = setup.work / "curve.png", setup.work / "episode.gif"
        _draw_curves({"": _banded(found.curve, protocol)}, self.name, curve)
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


class ObjectReaching(_Objects):
    """Touch the blue one of four cubes, and no other, with a robot's finger in three dimensions.

    The benchmark's task on a simulator of ours (:mod:`evalsuite.worlds.reaching`); it needs MuJoCo (extra
    ``robotics``) and, to show images, OpenGL without a screen: OSMesa, or EGL with a GPU. Actions are targets for
    three joints. The learning rate is 5e-5 there, the clip 0.1, the entropy 0. ``proxy`` asks in which quarter of
    the sector before the finger the target is.
    """

    name = "object-reaching"
    protocols = _recipes((1, 2, 3, 5, 6), REACHING, 400_000, lr=5e-5, clip=0.1, entropy=0.0)

    def refuse(self, backbone: Backbone, protocol: OwnProtocol) -> None:
        super().refuse(backbone, protocol)
        _try_simulator(pictures=backbone.spec.takes != "state")


@cache
def _try_simulator(pictures: bool) -> None:
    """Fail now rather than in the midst of a run where there is no simulator, or none that can draw."""
    found = rules("object-reaching")
    place, image = world(found), np.empty((64, 64, 3), dtype=np.uint8)
    place.reset(np.random.default_rng(0))
    if pictures:
        place.image(image)


def _resampled(success: npt.NDArray[np.bool_], seed: int = 0) -> Floats:
    """Bootstrap replicates of the mean over episodes, the same resamples whoever played."""
    blocks = [block @ success / block.sum(axis=1) for block in weight_blocks(len(success), REPLICATES, seed)]
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


def _banded(curve: list[dict[str, float]], protocol: AgentProtocol) -> Floats:
    """Steps, success, and the 95 % Wilson interval of each test (T, 4)."""
    rows = []
    for place, point in enumerate(curve):
        count = protocol.test_episodes if place == len(curve) - 1 else protocol.curve_episodes
        band = binomtest(round(point["success"] * count), count).proportion_ci(method="wilson")
        rows.append([point["steps"], point["success"], band.low, band.high])
    return np.array(rows)


def _draw_curves(lines: Mapping[str, Floats], title: str, path: Path) -> None:
    """Success over steps with bands, a line a name; each is (T, 4): steps, success, lower and upper bound."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure((5, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, line in lines.items():
            steps, success, low, high = line.T
            axes.fill_between(steps / 1000, low, high, alpha=0.25, linewidth=0)
            axes.plot(steps / 1000, success, label=name)
        longest = max(line[-1, 0] for line in lines.values()) / 1000
        axes.set(xlabel="thousand steps", ylabel="success", ylim=(0, 1), xlim=(0, longest), title=title)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False)
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

PROXY = (Metric("accuracy"), GENERALISATION)


class _Head(nn.Module):
    """A pooling and a linear layer that says in which quadrant the target is.

    Each number of the vectors is standardised over all of ``seen`` (N, tokens, width): encoders, and the rows of a
    state above all, differ in scale by orders, by which a learning rate would suit one and not another.
    """

    def __init__(self, encoder: ObservationEncoder, seen: Tensor) -> None:
        super().__init__()
        self.mean, self.scale = nn.Buffer(seen.mean((0, 1))), nn.Buffer(seen.std((0, 1)).clamp_min(1e-6))
        self.pool = encoder.pool()
        self.linear = nn.Linear(int(self.pool.width), 4)  # type: ignore[arg-type]  # every pooling has one

    def forward(self, batch: list[tuple[Tensor, int]]) -> Mapping[str, Tensor]:
        device = self.linear.weight.device
        logits = self.logits(torch.stack([tokens for tokens, _ in batch]).to(device))
        labels = torch.tensor([label for _, label in batch], device=device)
        return {"cross_entropy": nn.functional.cross_entropy(logits, labels)}

    def logits(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.linear(self.pool((tokens - self.mean) / self.scale))
        return found


def _frames(
    task: str, variant: str, count: int, seed: int, encoder: ObservationEncoder
) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """Features (count, tokens, width) of first frames, and where their targets are: one of four.

    Flat objects are one a quadrant where there are four; others, and those to be pushed, may be anywhere.
    """
    found = rules(task, variant)
    if isinstance(found, Rules):
        quadrants = found.kind != "interaction" and found.objects == (4, 4)
        found = replace(found, mode="normal" if quadrants else "hard")
    rng, place = np.random.default_rng(seed), world(found)
    parts, labels = [], np.empty(count, dtype=np.int64)
    for start in range(0, count, 64):
        size = min(64, count - start)
        if encoder.observation == "state":
            seen = np.empty((size, *found.bounds[0].shape), dtype=np.float32)
        else:
            seen = np.empty((size, 64, 64, 3), dtype=np.uint8)
        for row, out in enumerate(seen):
            place.reset(rng)
            labels[start + row] = place.where()
            if encoder.observation == "state":
                place.state(out)
            else:
                place.image(out)
        parts.append(encoder.encode(seen))
    return torch.from_numpy(np.concatenate(parts)), labels


def _proxy(task: _Objects, backbone: Backbone, setup: Setup[OwnProtocol], protocol: ProxyProtocol) -> Outcome:
    encoder = ObservationEncoder(
        backbone, setup.device, reads=protocol.reads, pooling=protocol.pooling, layers=protocol.layers,
        size=protocol.encode_size, precision=setup.precision,
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
    head = _fit_head(_Head(encoder, seen), seen, labels, backbone, setup, protocol)
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
    head: _Head,
    seen: Tensor,
    labels: npt.NDArray[np.int64],
    backbone: Backbone,
    setup: Setup[OwnProtocol],
    protocol: ProxyProtocol,
) -> _Head:
    steps = math.ceil(len(seen) / protocol.batch_size) * protocol.epochs

    def sample(index: int, seed: int) -> tuple[Tensor, int]:
        return seen[index], int(labels[index])

    run = Fit(
        model=head,
        optimizer=torch.optim.AdamW(head.parameters(), protocol.lr, weight_decay=protocol.weight_decay),
        # transformers with their norms last need the warm-up
        lr_factor=partial(cosine, steps=steps, warmup=steps // 10), iterations=steps, sample=sample, length=len(seen),
        batch_size=protocol.batch_size, seed=setup.seed,
        key=f"{backbone.identity} {protocol.hash} {len(seen)} {setup.seed}", state=setup.work / "state.pt",
        saves=setup.save_every,
    )  # fmt: skip
    fit(run, launched(setup.device), setup.progress)
    return head.to(setup.device)


@torch.inference_mode()
def _hits(head: _Head, seen: Tensor, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    device = head.linear.weight.device
    found = [head.eval().logits(part.to(device)).argmax(dim=1).cpu().numpy() for part in seen.split(256)]
    return np.asarray(np.concatenate(found) == labels)


# --- the benchmark ----------------------------------------------------------------------------------------------

PARTS: Mapping[str, _Objects] = {
    task.name: task
    for task in (ObjectGoal(), ObjectInteraction(), ObjectComparison(), PropertyComparison(), ObjectReaching())
}
STRIDE = 1111  # between the seeds of two agents: from 1234 on they are the benchmark's


@dataclass(frozen=True, kw_only=True)
class Suite(Protocol):
    """Each of ``tasks`` by its own protocol of this name, ``runs`` times: with the seed, and with 1111 more each time.

    ``--set`` with a field of those protocols changes it in all tasks; ``settings`` holds what was set, and ``recipes``
    the hashes that follow, ``TASK@HASH``, so that this one's hash is over all there is.
    """

    tasks: tuple[str, ...] = tuple(PARTS)
    runs: int = 3
    settings: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks or not set(self.tasks) <= set(PARTS) or self.runs < 1:
            raise UsageError(
                f"ocrl of {self.runs} runs of {', '.join(self.tasks) or 'no task'} cannot be run",
                cause=f"it has the tasks {', '.join(PARTS)}, and at least one run",
                fix="--set tasks=object-goal,object-comparison --set runs=1",
            )
        recipes = tuple(f"{name}@{part.hash}" for name, part in self.parts().items())
        object.__setattr__(self, "recipes", recipes)

    def parts(self) -> dict[str, OwnProtocol]:
        """The protocol of each task."""
        changes = dict(setting.split("=", 1) for setting in self.settings)
        return {name: PARTS[name].protocol(self.id).override(changes) for name in self.tasks}

    def override(self, settings: Mapping[str, str]) -> Self:
        own = {name: text for name, text in settings.items() if name in ("tasks", "runs")}
        changed = super().override(own)
        rest = tuple(f"{name}={text}" for name, text in settings.items() if name not in own)
        changed = replace(changed, settings=(*self.settings, *rest))
        moved = {name for part in changed.parts().values() for name in part.modified}
        return replace(changed, modified=tuple(sorted({*changed.modified, *moved})))


class ObjectCentric(Task[Suite]):
    """The five tasks of the object-centric benchmark (Yoon et al., ICML 2023), with one backbone.

    ``success`` is the mean over tasks and agents, with an interval over agents and episodes. ``iqm`` is the mean of
    the middle half of the scores of all agents on all tasks, with rliable's interval over agents
    (:func:`evalsuite.statistics.stratified_bootstrap`), which one agent does not have. ``area`` and
    ``generalisation`` are means, too. Each task's own score goes by its name.

    An agent is a run, and has a seed of its own; three make a result, as in the benchmark, whose seeds are those of the
    seed 1234. ``evalsuite compare`` compares ``success``, and takes the mean of several results. A run that was killed
    goes on at the agent it was at; finished ones are neither trained nor tested again.

    Without MuJoCo it is refused; ``--set tasks=object-goal,object-interaction,object-comparison,property-comparison``
    leaves out the task that needs it, as a modified protocol.
    """

    name = "ocrl"
    metrics = (Metric("success"), Metric("iqm"), Metric("area"), GENERALISATION, *map(Metric, PARTS))
    primary = "success"
    needs = frozenset[str]()
    shows = frozenset({"image", "state"})
    engines = ("sb3",)
    protocols = (
        Suite(id="ppo-2m", version=1),
        Suite(id="ppo-short", version=1, runs=1),
        Suite(id="proxy", version=1),
    )

    def promises(self, protocol: Suite) -> tuple[Metric, ...]:
        shared = PROXY if self.leading(protocol) == "accuracy" else _Objects.metrics
        return (*shared, Metric("iqm"), *map(Metric, protocol.tasks))

    def leading(self, protocol: Suite) -> str:
        return "accuracy" if protocol.id == "proxy" else self.primary

    def requires(self, protocol: Suite) -> frozenset[str]:
        return frozenset[str]().union(*(PARTS[name].requires(part) for name, part in protocol.parts().items()))

    def refuse(self, backbone: Backbone, protocol: Suite) -> None:
        super().refuse(backbone, protocol)
        for name, part in protocol.parts().items():
            try:
                PARTS[name].refuse(backbone, part)
            except ResourceError as error:
                others = ",".join(other for other in protocol.tasks if other != name)
                fix = f"{error.fix}; or without it: --set tasks={others}" if others else error.fix
                raise ResourceError(error.problem, cause=error.cause, fix=fix) from error

    def fingerprint(self, setup: Setup[Suite]) -> str:
        known = [PARTS[name].fingerprint(setup.by(part)) for name, part in setup.protocol.parts().items()]
        return hashlib.sha256(" ".join(known).encode()).hexdigest()[:32]

    def run(self, backbone: Backbone, setup: Setup[Suite]) -> Outcome:
        suite, lead = setup.protocol, self.leading(setup.protocol)
        parts = suite.parts()
        seeds = [setup.seed + STRIDE * run for run in range(suite.runs)]
        found: dict[str, list[Outcome]] = {name: [] for name in parts}
        for name, part in parts.items():
            for seed in seeds:
                work = setup.work / f"{name}-{seed}"
                own = setup.by(part, seed=seed, work=work)
                found[name].append(_once(PARTS[name], backbone, own))
        return Outcome(
            **_joined(found, lead),
            figures=_pictures(found, setup.work / "curve.png"),
            data={"fingerprint": self.fingerprint(setup), "worlds": list(parts)},
            timings=_summed([outcome.timings for outcomes in found.values() for outcome in outcomes]),
            details={
                "seeds": seeds,
                "protocols": {name: part.fields() for name, part in parts.items()},
                "runs": {name: [dict(outcome.scores) for outcome in outcomes] for name, outcomes in found.items()},
                "tasks": {name: dict(outcomes[0].details) for name, outcomes in found.items()},
            },
        )


def _once(task: _Objects, backbone: Backbone, setup: Setup[OwnProtocol]) -> Outcome:
    """What a task found; read back where a run that was stopped later has left it."""
    path = setup.work / "outcome.pt"
    key = (
        f"{backbone.identity} {setup.protocol.hash} {task.fingerprint(setup)} {setup.seed} {setup.engine} {setup.limit}"
    )
    kept = read_state(path, key, setup.progress)
    if kept is not None:
        with going_on_from(path):
            replicates, samples = ({k: v.numpy() for k, v in kept[n].items()} for n in ("replicates", "samples"))
            figures = {name: setup.work / file for name, file in kept["figures"].items()}
            return Outcome(**json.loads(kept["plain"]), replicates=replicates, samples=samples, figures=figures)
    setup.progress.say(f"{task.name}, seed {setup.seed}")
    setup.work.mkdir(parents=True, exist_ok=True)
    found = evaluate(task, backbone, setup)
    plain = {name: getattr(found, name) for name in ("scores", "data", "ids", "timings", "details")}
    content = {
        "key": key, "plain": json.dumps(plain), "figures": {name: file.name for name, file in found.figures.items()},
        "replicates": {name: torch.from_numpy(values) for name, values in found.replicates.items()},
        "samples": {name: torch.from_numpy(values) for name, values in found.samples.items()},
    }  # fmt: skip
    with atomic(path) as partial:
        torch.save(content, partial)
    return found


def _joined(found: Mapping[str, list[Outcome]], lead: str) -> dict[str, Any]:
    """Scores, replicates and samples of the benchmark, of the agents' outcomes on each task."""
    table = np.array([[outcome.scores[lead] for outcome in outcomes] for outcomes in found.values()], dtype=float).T
    means = dict(zip(found, table.mean(axis=0).tolist(), strict=True))
    replicates: dict[str, Floats] = {
        name: over_seeds([_resampled(outcome.samples[lead], place) for outcome in outcomes], place)
        for place, (name, outcomes) in enumerate(found.items())
    }
    replicates[lead] = np.mean([replicates[name] for name in found], axis=0)
    scores = {lead: float(table.mean()), "iqm": iqm(table), **means}
    if len(table) > 1:
        replicates["iqm"] = stratified_bootstrap(table, iqm, REPLICATES)
    every = [outcome for outcomes in found.values() for outcome in outcomes]
    for name in sorted({"area", "generalisation"} & set(every[0].scores)):
        values = [value for outcome in every if (value := outcome.scores[name]) is not None]
        scores[name] = float(np.mean(values)) if len(values) == len(every) else None
        if all(name in outcome.replicates for outcome in every):
            draws = [over_seeds([o.replicates[name] for o in own], n) for n, own in enumerate(found.values())]
            replicates[name] = np.mean(draws, axis=0)
    lengths = [len(outcome.samples[lead]) for outcome in every]
    named = [f"{name}/run-{run}" for name, outcomes in found.items() for run in range(len(outcomes))]
    return {
        "scores": scores, "replicates": replicates,
        "samples": {  # the episodes of one agent are resampled as a group
            lead: np.concatenate([outcome.samples[lead] for outcome in every]),
            "group": np.repeat(np.arange(len(every)), lengths),
        },
        "ids": [f"{where}/{one}" for where, outcome in zip(named, every, strict=True) for one in outcome.ids],
    }  # fmt: skip


def _pictures(found: Mapping[str, list[Outcome]], path: Path) -> dict[str, Path]:
    """Curves of all tasks, the mean over agents between the worst and the best; a film of the first one each."""
    if not all(outcome.figures for outcomes in found.values() for outcome in outcomes):
        return {}
    lines = {}
    for name, outcomes in found.items():
        curves = np.array([[[p["steps"], p["success"]] for p in outcome.details["curve"]] for outcome in outcomes])
        steps, success = curves[0, :, 0], curves[:, :, 1]
        lines[name] = np.stack([steps, success.mean(axis=0), success.min(axis=0), success.max(axis=0)], axis=1)
    _draw_curves(lines, "ocrl", path)
    return {"curve": path} | {f"episode-{name}": outcomes[0].figures["episode"] for name, outcomes in found.items()}


def _summed(timings: list[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(t.get(name, 0.0) for t in timings) for name in dict.fromkeys(n for t in timings for n in t)}
