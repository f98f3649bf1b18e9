"""How far is bfloat16 from float32? Everything that runs a network, for a few steps in each, on a CPU.

A row for every engine and dense protocol, head and probe, task on worlds, method and modifier that is registered, each
made as small as it goes. ``loss`` is the largest difference of a term of the loss at any step, over the larger of that
term and a tenth of the whole loss (of 1, where that is less); of the gradient, of features and of scores it is the
length of the difference over their length. Tests hold these to bounds (tests/test_mixed.py), and run the same cases in
the memory layout of a GPU, from pinned memory, and with data workers.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features, build
from evalsuite.data import source
from evalsuite.data.classification import Arrays, ClassificationSet
from evalsuite.errors import UsageError
from evalsuite.features import Cache
from evalsuite.hooks import Registry, load
from evalsuite.metrics.ranking import top_k_hits
from evalsuite.probing import Fitted, ImageProtocol, Multilabel, ProbeProtocol
from evalsuite.probing.heads import HeadProtocol
from evalsuite.progress import Progress
from evalsuite.protocols import (
    DetectionProtocol,
    PPOProtocol,
    ProxyProtocol,
    SegmentationProtocol,
    job,
)
from evalsuite.task import Protocol, Setup, Task
from evalsuite.tasks.discovery import DiscoveryProtocol
from evalsuite.tasks.objects import Suite
from evalsuite.worlds import ObjectsVector
from pretrain import Method, Modifier, Training
from pretrain.methods.simclr import SimCLR
from pretrain.testing import losses, small_backbone, small_corpus, small_options, tiny_backbone, tiny_train

__all__ = ["BF16", "Case", "Numbers", "Way", "apart", "cases", "run"]

Floats = npt.NDArray[np.float64]
SIDE = 32  # of most images, in pixels
MOST = 1_000_000  # numbers of a gradient that are compared


@dataclass(frozen=True)
class Way:
    """What of a machine's defaults is not part of a protocol."""

    precision: str = "32-true"
    channels_last: bool = False
    pin_memory: bool = False
    workers: int = 0


BF16 = Way("bf16-mixed")


@dataclass(frozen=True)
class Numbers:
    """What a run computed: terms of the loss {term: (steps,)}, and other numbers {name: any shape}."""

    losses: Mapping[str, Floats]
    others: Mapping[str, Floats]


@dataclass(frozen=True)
class Case:
    """``run(way, folder)`` gives the numbers. ``loader`` is the code by which its workers read images ("": none do),
    and ``package`` what it needs besides.
    """

    name: str
    run: Callable[[Way, Path], Numbers]
    loader: str = ""
    package: str | None = None

    def __call__(self, way: Way = Way()) -> Numbers:
        with tempfile.TemporaryDirectory() as folder, _features_in(Path(folder) / "cache"):
            torch.manual_seed(0)
            return self.run(way, Path(folder))


def apart(found: Numbers, wanted: Numbers) -> dict[str, float]:
    """How far numbers are from others, as is said above: ``loss``, and each of the others by its name."""
    if found.losses.keys() != wanted.losses.keys() or found.others.keys() != wanted.others.keys():
        raise ValueError(f"other numbers: {[*found.losses, *found.others]}, not {[*wanted.losses, *wanted.others]}")
    far: dict[str, float] = {}
    if wanted.losses:
        ours, theirs = (np.stack(list(numbers.losses.values())) for numbers in (found, wanted))
        scale = np.maximum(np.abs(theirs), np.maximum(np.abs(theirs.sum(0)), 1) / 10)
        far["loss"] = float((np.abs(ours - theirs) / scale).max())
    for name, values in wanted.others.items():
        far[name] = float(np.linalg.norm(found.others[name] - values)) / max(float(np.linalg.norm(values)), 1e-12)
    return far


def run() -> Iterator[dict[str, Any]]:
    for case in cases(load(environ={"EVALSUITE_PLUGINS": ""}).registry):
        try:
            yield {"benchmark": case.name, **apart(case(BF16), case())}
        except UsageError as refusal:  # a package that is not installed
            yield {"benchmark": case.name, "refused": refusal.problem}


def cases(registry: Registry) -> list[Case]:
    """One for each thing that is registered and runs a network, and that no other is like."""
    tasks = [registry.get("task", name)() for name in registry.names("task")]
    found = [
        *(case for engine in registry.names("engine") for case in _of_engine(engine, tasks, registry)),
        *_of_image_tasks(tasks, registry),
        *_of_world_tasks(tasks, registry),
        *(_of_method(name, registry) for name in registry.names("method")),
        *(_of_modifier(name, registry) for name in registry.names("modifier")),
    ]
    lacking = {
        type(p).__name__ for task in tasks for p in task.protocols if not isinstance(p, KINDS) and not _is_encoded(p)
    }
    if lacking:
        raise NotImplementedError(f"nobody says how to make {', '.join(sorted(lacking))} small")
    return found


def _distinct(pairs: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Of protocols that are the same but for their names, versions and splits, the first."""
    seen = set[str]()
    for name, protocol in pairs:
        splits = {key: "" for key in ("train_split", "test_split") if hasattr(protocol, key)}
        nameless = dataclasses.replace(protocol, id="", version=0, **splits)
        if (key := f"{type(protocol)} {nameless.hash}") not in seen:
            seen.add(key)
            yield name, protocol


def _setup(protocol: Protocol, way: Way, folder: Path, registry: Registry) -> Setup:
    return Setup(
        protocol=protocol, work=Path(tempfile.mkdtemp(dir=folder)), registry=registry, progress=Progress(quiet=True),
        precision=way.precision, workers=way.workers, encode_workers=way.workers, channels_last=way.channels_last,
        pin_memory=way.pin_memory,
    )  # fmt: skip


@contextmanager
def _features_in(folder: Path) -> Iterator[None]:
    """Encode into that folder: an entry of the cache does not tell by which layout or how many workers it was made."""
    before = os.environ.get("EVALSUITE_CACHE")
    os.environ["EVALSUITE_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["EVALSUITE_CACHE"]
        if before is not None:
            os.environ["EVALSUITE_CACHE"] = before


def _gradients(work: Path) -> dict[str, Floats]:
    """What the optimiser of a run remembers of its gradients: their running sum, or mean."""
    (path,) = (file for file in work.glob("*.pt") if not file.name.startswith("choose"))
    states = torch.load(path, map_location="cpu", weights_only=True)["optimizer"]["state"].values()
    sums = [s[name] for s in states for name in ("momentum_buffer", "exp_avg", "velocity") if s.get(name) is not None]
    whole = torch.cat([each.flatten() for each in sums]) if sums else torch.zeros(0)
    return {"gradient": whole[:: 1 + len(whole) // MOST].double().numpy()} if sums else {}


def _logged(log: list[dict[str, float]]) -> dict[str, Floats]:
    return {name: np.array([entry[name] for entry in log]) for name in log[0] if name != "step"}


class _Net(nn.Module):
    """Two convolutions with batch normalisation, of strides 2 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, pixels: Tensor) -> Features:
        fine = self.conv1(pixels)
        coarse = self.conv2(fine)
        pooled = coarse.mean((2, 3))
        return Features(pooled, {16: fine, 32: coarse}, coarse.flatten(2).transpose(1, 2))


def _small_net() -> Backbone:
    torch.manual_seed(0)
    gives = frozenset({"pooled", "maps", "tokens"})
    return Backbone(_Net(), BackboneSpec("small", 16, {16: 8, 32: 16}, gives, image_size=(SIDE, SIDE))).eval()


def _resnet(registry: Registry) -> Backbone:
    torch.manual_seed(0)
    return build("timm:test_resnet", registry).eval()


@cache
def _world(layout: str, registry: Registry) -> Any:
    """A demo world, drawn once a process: training and test images."""
    folder = Path(_folder().name) / layout
    found = source(registry, layout)
    path = found.demo(folder, 0, 4)
    roles = found.roles(path)
    return found.load(path, roles["train"]), found.load(path, roles["val"]).limit(1)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


# --- dense engines -----------------------------------------------------------------------------------------------


def _of_engine(name: str, tasks: list[Task], registry: Registry) -> Iterator[Case]:
    package = name if name in ("detectron2", "mmseg") else None
    kind = "segment" if package == "mmseg" else job(registry.get("engine", name))  # it may not be there to be asked
    pairs: list[tuple[str, Any]] = [(f"{task.name} {p.id}", p) for task in tasks for p in task.protocols]
    jobs: dict[str, tuple[Any, Any]] = {
        "detect": (_detect, _small_detections), "segment": (_segment, _small_segmentations),
        "play": (_play, _small_agents),
    }  # fmt: skip
    run, small = jobs[str(kind)]
    for where, protocol in _distinct((where, p) for where, whole in pairs for p in small(whole)):
        encoded = getattr(protocol, "encode", None) is not None
        if encoded and package == "mmseg":
            continue  # mmsegmentation trains on images, not on features that were encoded once
        loader = "" if kind == "play" else f"{name}, encoded" if encoded else name
        tuned = ", fine-tuned" if getattr(protocol, "fine_tune", False) else ""
        yield Case(f"{name}: {where}{tuned}", partial(run, name, protocol, registry), loader, package)


def _small_detections(protocol: Protocol) -> Iterator[DetectionProtocol]:
    if not isinstance(protocol, DetectionProtocol):
        return
    yield dataclasses.replace(
        protocol, iterations=2, batch_size=2 if protocol.model == "c4" else 4, milestones=(),
        lr=1e-3 if protocol.optimizer == "sgd" else 1e-4,
        warmup_iterations=0, min_sizes=(64,), max_size=96, test_min_size=64, test_max_size=96,
        anchor_sizes=(8, 16, 32, 64, 128), pyramid_width=16, box_head_width=32, mask_head_width=16, roi_batch=4,
        rpn_pre_nms_train=100, rpn_pre_nms_test=50, rpn_post_nms_train=20, rpn_post_nms_test=4, detections=4,
        precise_bn=min(protocol.precise_bn, 1), score_threshold=0.0,
    )  # fmt: skip


def _detect(engine: str, protocol: DetectionProtocol, registry: Registry, way: Way, folder: Path) -> Numbers:
    train, test = _world("coco", registry)
    made = registry.get("engine", engine)()
    setup = _setup(protocol, way, folder, registry)
    found = made.detect(_resnet(registry), protocol, train, test, setup)
    return Numbers(_logged(found.log), _gradients(setup.work))


def _small_segmentations(protocol: Protocol) -> Iterator[SegmentationProtocol]:
    if not isinstance(protocol, SegmentationProtocol):
        return
    side = SIDE + 1 if protocol.align_corners else SIDE
    yield dataclasses.replace(
        protocol, iterations=2, batch_size=4, lr=1e-3 if protocol.optimizer == "sgd" else 1e-4, lr_min=0.0,
        milestones=(), warmup_iterations=0, width=8, auxiliary_width=4, crop=(side, side), stride=(side // 2,) * 2,
        short_side=SIDE, scale=(1.0, 1.0), dropout=0.0, encode=(SIDE, SIDE) if protocol.encode else None,
    )  # fmt: skip


def _segment(engine: str, protocol: SegmentationProtocol, registry: Registry, way: Way, folder: Path) -> Numbers:
    train, test = _world("camvid", registry)
    made = registry.get("engine", engine)()
    setup = _setup(protocol, way, folder, registry)
    found = made.segment(_resnet(registry), protocol, train, test, setup)
    return Numbers(_logged(found.log), _gradients(setup.work))


# --- heads and probes --------------------------------------------------------------------------------------------


def _of_image_tasks(tasks: list[Task], registry: Registry) -> Iterator[Case]:
    for several in (False, True):
        pairs = (
            (f"{task.name} {p.id}", _small_image(p))
            for task in tasks for p in task.protocols
            if isinstance(p, ImageProtocol) and isinstance(task, Multilabel) == several
            and not (several and isinstance(p, HeadProtocol) and p.head != "linear")  # only the loss differs
        )  # fmt: skip
        for where, protocol in _distinct(pairs):
            tuned = protocol.tune if isinstance(protocol, HeadProtocol) else None
            loader = {None: "", False: "heads", True: "heads, tuned"}[tuned]
            yield Case(f"head: {where}", partial(_fit, protocol, several, registry), loader)
    yield Case("features", partial(_encode, registry), "features")


def _small_image(protocol: ImageProtocol) -> ImageProtocol:
    plain: dict[str, Any] = {"fraction": 1.0, "rule": "squash", "outputs": ("pooled",), "validation": 0.5}
    if isinstance(protocol, HeadProtocol):
        outputs = ("map32",) if protocol.head in ("conv", "alexnet") else ("pooled",)
        return dataclasses.replace(protocol, **plain | {
            "size": SIDE, "outputs": outputs, "layers": (), "batch_size": 8 * protocol.accumulate, "epochs": 2 / 3,
            "lrs": (0.01,), "backbone_lr": 0.001 if protocol.tune else 0.0, "warmup_epochs": 0.0,
        })  # fmt: skip
    if isinstance(protocol, ProbeProtocol):
        few = {key: getattr(protocol, key)[:2] for key in ("costs", "alphas", "lrs", "weight_decays")}
        shots = {"shots": (2,), "draws": 2} if hasattr(protocol, "shots") else {}
        return dataclasses.replace(protocol, **plain | few | shots | {
            "ks": (3,) if protocol.ks else (), "epochs": min(protocol.epochs, 2),
            "batch_size": min(protocol.batch_size, 8),
        })  # fmt: skip
    return dataclasses.replace(protocol, fraction=1.0)


def _fit(protocol: ImageProtocol, several: bool, registry: Registry, way: Way, folder: Path) -> Numbers:
    train, test = _images("train", 24, several), _images("test", 9, several)
    hidden = dataclasses.replace(test, labels=np.full_like(test.labels, -1))
    setup = _setup(protocol, way, folder, registry)
    found: Fitted = protocol.fit(_small_net(), train, hidden, _right, setup)
    scores = found.scores if isinstance(found.scores, np.ndarray) else np.stack([s.scores for s in found.scores])
    numbers = {"scores": scores.astype(float)}
    if "log" not in found.details:
        return Numbers({}, numbers)
    return Numbers(_logged(found.details["log"]), numbers | _gradients(setup.work))


def _right(scores: Any, labels: Any, scale: Any) -> float:
    if labels.ndim == 1:
        return float(top_k_hits(scores, labels).mean())
    return float(((scores > 0.5 * (scale == "probabilities")) == (labels > 0)).mean())


def _images(split: str, count: int, several: bool) -> ClassificationSet:
    """Images of three colours under noise."""
    rng, labels = np.random.default_rng(len(split)), np.arange(count) % 3
    colours = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200)])[labels]
    pixels = (colours[:, None, None] + rng.normal(0, 60, (count, SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
    told = np.eye(3, dtype=np.int64)[labels] if several else labels.astype(np.int64)
    ids = np.array([f"{split}{place:03d}" for place in range(count)])
    rows = Arrays(count, lambda: pixels, split)
    return ClassificationSet("colours", split, ("red", "green", "blue"), ids, told, rows, np.arange(count))


def _encode(registry: Registry, way: Way, folder: Path) -> Numbers:
    names = ("pooled", "tokens/avg", "map16/max2", "layer:conv1")
    found = Cache().features(
        _small_net(), _images("test", 9, False), names, precision=way.precision, workers=way.workers,
        channels_last=way.channels_last, pin_memory=way.pin_memory,
    )  # fmt: skip
    return Numbers({}, {name: np.array(found.arrays[name], float) for name in names})


def _is_encoded(protocol: Protocol) -> bool:
    """Whether all a protocol does with a network is to encode images into the cache: the case ``features``."""
    return hasattr(protocol, "output")


# --- worlds ------------------------------------------------------------------------------------------------------


class _Goal:
    """Worlds whose episodes are short."""

    def make(self, count: int, variant: str, observation: str) -> ObjectsVector:
        seen: Any = observation
        return ObjectsVector(count, "object-goal", variant, seen, steps=8, time_limit_is_terminal=True)


def _small_agents(protocol: Protocol) -> Iterator[PPOProtocol]:
    if not isinstance(protocol, PPOProtocol):
        return
    small = dataclasses.replace(
        protocol, steps=16, environments=2, rollout=8, batch_size=16, epochs=1, lr=1e-3, encode_size=SIDE,
        variant="objects-1", unseen=(), test_every=16, curve_episodes=2, test_episodes=2, discount=0.99, clip=0.2,
        entropy=0.01,
    )  # fmt: skip
    yield small
    yield dataclasses.replace(small, fine_tune=True)


def _play(engine: str, protocol: PPOProtocol, registry: Registry, way: Way, folder: Path) -> Numbers:
    setup = _setup(protocol, way, folder, registry)
    registry.get("engine", engine)().play(_small_net(), protocol, _Goal(), setup)
    return Numbers({}, _gradients(setup.work))


def _of_world_tasks(tasks: list[Task], registry: Registry) -> Iterator[Case]:
    """Heads on features of frames, fitted in this process."""
    named: dict[str, tuple[Task, Any]] = {f"{task.name} {p.id}": (task, p) for task in tasks for p in task.protocols}
    small: dict[str, Any] = {"train_images": 16, "test_images": 8, "epochs": 2, "batch_size": 8, "encode_size": SIDE}
    pairs = (
        (name, dataclasses.replace(p, **small | ({"unseen": ()} if isinstance(p, ProxyProtocol) else {})))
        for name, (_, p) in named.items() if isinstance(p, ProxyProtocol | DiscoveryProtocol)
    )  # fmt: skip
    for name, protocol in _distinct(pairs):
        yield Case(name, partial(_look, named[name][0], protocol, registry))


def _look(task: Task, protocol: Protocol, registry: Registry, way: Way, folder: Path) -> Numbers:
    setup = _setup(protocol, way, folder, registry)
    torch.manual_seed(0)
    options = {"slots": 3, "width": 8, "hidden": 8, "channels": 4}
    task.run(build("objects:slot-attention", registry, **options).eval(), setup)
    log = torch.load(setup.work / "state.pt", weights_only=True)["log"]
    return Numbers(_logged(log), _gradients(setup.work))


KINDS = (
    PPOProtocol, DetectionProtocol, DiscoveryProtocol, ImageProtocol, ProxyProtocol, SegmentationProtocol, Suite,
)  # fmt: skip


# --- pretraining -------------------------------------------------------------------------------------------------


def _of_method(name: str, registry: Registry) -> Case:
    kind: type[Method] = registry.get("method", name)

    def train(**way: Any) -> Any:
        backbone = partial(small_backbone, kind, registry)
        options = small_options(kind)
        if isinstance(options, Training) and options.optimizer != "lars":
            options = dataclasses.replace(options, lr=1e-3)
        return tiny_train(lambda: kind(options), steps=2, corpus=small_corpus(kind), backbone=backbone, **way)

    return Case(f"method: {name}", partial(_pretrain, train), f"pretrain, {kind.data.partition(':')[0]}")


def _of_modifier(name: str, registry: Registry) -> Case:
    """On SimCLR, slowly, over two epochs, for some begin only then."""
    kind: type[Modifier] = registry.get("modifier", name)
    options = SimCLR.Options(size=16, width=16, hidden=16, head="plain", optimizer="sgd", lr=1e-4, warmup=0.0)
    train = partial(
        tiny_train, lambda: SimCLR(options), lambda: _modifier(kind), steps=6, epochs=2, backbone=tiny_backbone
    )
    return Case(f"modifier: {name}", partial(_pretrain, train))


def _modifier(kind: type[Modifier]) -> Modifier:
    options = small_options(kind)
    if getattr(options, "generated", ...) is None:  # it adds images of a file
        path = Path(_folder().name) / "generated.npz"
        np.savez(path, image=np.random.default_rng(1).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8))
        options = dataclasses.replace(options, generated=path)
    return kind(options)


def _pretrain(train: Callable[..., Any], way: Way, folder: Path) -> Numbers:
    found = train(
        out=folder, precision=way.precision, workers=way.workers, channels_last=way.channels_last,
        pin_memory=way.pin_memory,
    )  # fmt: skip
    log = losses(found)
    names = {name: None for entry in log for name in entry if name != "step"}
    return Numbers({name: np.array([entry.get(name, 0.0) for entry in log]) for name in names}, _gradients(folder))
