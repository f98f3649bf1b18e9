"""Classifiers trained on augmented images: heads on a frozen backbone, many in one pass, and fine-tuning of all of it.

A :class:`HeadProtocol` is a published recipe. :func:`train_heads` trains what it asks for: one head for each of its
learning rates and outputs. While the backbone is frozen all of them learn from one forward pass; a backbone that is
fine-tuned is copied for each. Of several settings one is chosen on a part held out of the training images, and of the
test images only the pixels are ever read here. Training runs in :mod:`evalsuite.training`, so a killed run goes on from
``setup.work`` to the same numbers. Schedules are in epochs; batches are cut from one stream of epochs, so that none is
smaller than the others, and an epoch ends wherever its last image falls in a batch.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from evalsuite.backbone import Backbone
from evalsuite.data.classification import ClassificationSet
from evalsuite.errors import BackboneError, DataError, UsageError
from evalsuite.features import Encoder, Output, Preprocess, Taps, images_in_order
from evalsuite.preflight import Demand
from evalsuite.probes import Choice, choose, hold_out, tied_for_best
from evalsuite.probing.protocols import Criterion, Fitted, Floats, ImageProtocol, vectors_only
from evalsuite.resize import resize
from evalsuite.seeding import seeded
from evalsuite.signals import ignore_signals
from evalsuite.task import Setup
from evalsuite.training import LARS, Fit, Steps, fit, launched, uncast
from evalsuite.training.processes import together

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["HeadProtocol", "train_heads"]


Setting = Mapping[str, Any]

_LOGGED = 100  # lines of a training log that a result keeps
_READ_AHEAD = 1 << 30  # bytes of batches that wait for the device


@dataclass(frozen=True, kw_only=True)
class HeadProtocol(ImageProtocol):
    """A classifier trained on augmented images, with every number that can move its score.

    **Data.** As of :class:`evalsuite.probing.ImageProtocol`. Where there is more than one setting, the share
    ``validation`` is held out of the training images to choose by the task's primary metric, and with ``refit`` the
    chosen one is trained again on all of them.

    **What is looked at.** ``size`` is the side of the network's input in pixels (None: its own image size). A training
    image is ``resized``: a random crop of a share ``crop`` of its area, of a width over height in ``crop_ratio``;
    ``cut``: a random square of an image that is resized to cover ``size / ratio``; ``padded``: resized as a test image,
    padded with black by ``padding`` of its side, and a random square of it taken; or ``whole``: as a test image. It is
    mirrored with probability ``flip``; ``jitter`` (brightness, contrast, saturation, hue; empty: none), ``grey`` and
    ``blur`` (a Gaussian, its deviation in pixels uniform in 0.1 to 2) come with the probabilities ``jitter_p``,
    ``grey`` and ``blur``. ``resize`` is of test images; training images are always resized by the workers.

    **What is read.** ``outputs`` as of :class:`evalsuite.features.Output`, and ``maps``, which is the map of every
    stride; where ``width`` is given, a pool of ``maps`` is to the grid that leaves about so many numbers (9,216: 12, 7,
    5, 6 and 6 on AlexNet). ``layers`` are taken instead of ``outputs`` by a network that has every one of them.

    **Heads.** ``linear``; ``conv``: three convolutions of 192 (3x3, 1x1, 1x1), the mean over places, linear;
    ``mlp``: two hidden layers of 20 units a class, at most 2,048; ``alexnet``: a 3x3 convolution of 256 but for the
    last output, a pool to 6x6 (or what leaves about 9,216 numbers), two hidden layers of 4,096. All hidden layers have
    batch norm and ReLU. Before a linear head ``norm`` is batch norm, ``plain`` without or ``affine`` with scale and
    shift, channel by channel. ``init``: weights of N(0, 0.01) (``small``), ``zero``, N(0, 2 / fan out), or torch's own;
    biases are zero but for torch's.

    **Training.** Heads have each of ``lrs``; ``weight_decay`` is on everything. With ``tune`` the backbone learns too,
    at ``backbone_lr``. ``backbone_norm``: its batch norm uses running statistics (``eval``) or those of the batch, and
    moves the running ones (``train``). LARS has ``trust``, ``trust_ratio`` and ``trust_clip``
    (:class:`evalsuite.training.LARS`), and ``unscaled`` is what it neither scales nor decays. ``batch_size`` counts
    images over all devices; a step's gradient is the mean over ``accumulate`` parts of it. The rate rises linearly from
    ``warmup_factor`` over ``warmup_epochs``; then it falls by ``gamma`` at each of ``milestones`` (epochs), or along a
    cosine to ``final_factor``, changing ``per`` epoch or step.
    """

    validation: float = 0.1
    refit: bool = True

    size: int | None = None
    view: Literal["resized", "cut", "padded", "whole"] = "resized"
    crop: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: float = 0.125
    flip: float = 0.5
    jitter: tuple[float, ...] = ()
    jitter_p: float = 0.8
    grey: float = 0.0
    blur: float = 0.0

    layers: tuple[str, ...] = ()
    width: int | None = None
    head: Literal["linear", "conv", "mlp", "alexnet"] = "linear"
    norm: Literal["none", "plain", "affine"] = "none"
    init: Literal["small", "zero", "fan-out", "torch"] = "small"

    tune: bool = False
    backbone_lr: float = 0.0
    backbone_norm: Literal["eval", "train"] = "eval"
    optimizer: Literal["sgd", "lars"] = "sgd"
    lrs: tuple[float, ...]
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    trust: float = 0.001
    trust_ratio: Literal["summed", "decayed"] = "summed"
    trust_clip: bool = False
    unscaled: Literal["nothing", "vectors", "vectors and head"] = "nothing"
    epochs: float = 100
    batch_size: int = 256
    accumulate: int = 1
    schedule: Literal["step", "cosine"] = "step"
    per: Literal["epoch", "step"] = "epoch"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    final_factor: float = 0.0
    warmup_epochs: float = 0.0
    warmup_factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.head in ("conv", "alexnet")
        faults = {
            "no learning rate": not self.lrs,
            f"{self.epochs} epochs": self.epochs <= 0,
            "Nesterov momentum with LARS": self.nesterov and self.optimizer == "lars",
            "Nesterov momentum of 0": self.nesterov and not self.momentum,
            "a learning rate for a frozen backbone": not self.tune and self.backbone_lr != 0,
            f"{len(self.jitter)} strengths of jitter": len(self.jitter) not in (0, 4),
            f"a pool before {self.head} heads": whole and any("/" in name for name in (*self.outputs, *self.layers)),
            f"{self.accumulate} parts of {self.batch_size} images": not 0 < self.accumulate <= self.batch_size
            or self.batch_size % self.accumulate != 0,
            f"{self.warmup_epochs} of {self.epochs} epochs to warm up": not 0 <= self.warmup_epochs < self.epochs,
        }
        for problem, is_so in faults.items():
            if is_so:
                raise UsageError(
                    f"{self.id} cannot have {problem}",
                    cause="the settings of a protocol must go together",
                    fix="leave out one of the --set, or set what goes with it",
                )

    @property
    def needs(self) -> frozenset[str]:
        """What a backbone must give. ``layers`` are not in it, for ``outputs`` stand in for them."""
        every = [{"maps"} if name.partition("/")[0] == "maps" else Output.parse(name).needs for name in self.outputs]
        return frozenset[str]().union(*every)

    def input_size(self, backbone: Backbone) -> tuple[int, int]:
        return (self.size, self.size) if self.size else super().input_size(backbone)

    def fit(
        self, backbone: Backbone, train: ClassificationSet, test: ClassificationSet, criterion: Criterion, setup: Setup
    ) -> Fitted:
        """:func:`train_heads`."""
        return train_heads(backbone, self, train, test, criterion, setup)

    def rate(self, epoch: float) -> float:
        """The factor on the learning rates after ``epoch`` epochs."""
        if epoch < self.warmup_epochs:
            return self.warmup_factor + (1 - self.warmup_factor) * epoch / self.warmup_epochs
        at = math.floor(epoch) if self.per == "epoch" else epoch
        if self.schedule == "step":
            return float(self.gamma ** sum(at >= m for m in self.milestones))
        done = min((at - self.warmup_epochs) / (self.epochs - self.warmup_epochs), 1.0)
        return self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * done)) / 2

    def read(self, backbone: Backbone) -> tuple[Output, ...]:
        """The outputs of this backbone. Raises :class:`BackboneError` for one it does not give."""
        named = [Output.parse(name) for name in self.layers]
        modules = dict(backbone.net.named_modules())
        if named and all(output.module in modules for output in named):
            return tuple(named)
        found = tuple(Output.parse(n) for name in self.outputs for n in self._spelled(name, backbone))
        vectors_only(self.id, found)
        for output in found:
            output.check(backbone)
        return found

    def _spelled(self, name: str, backbone: Backbone) -> Iterator[str]:
        source, slash, pool = name.partition("/")
        if source != "maps":
            yield name
            return
        side = self.size or min(backbone.spec.image_size)
        for stride, channels in sorted(backbone.spec.strides.items()):
            grid = "" if not pool or self.width is None else min(_grid(self.width, channels), max(1, side // stride))
            yield f"map{stride}{slash}{pool}{grid}"

    def settings(self, outputs: Sequence[Output]) -> list[dict[str, Any]]:
        """What there is to choose among: learning rates, and outputs where there are several."""
        several = len(outputs) > 1
        return [({"features": o.name} if several else {}) | {"lr": lr} for o in outputs for lr in sorted(self.lrs)]


def _grid(width: int, channels: int) -> int:
    """The side of the square grid that leaves about ``width`` numbers of a map."""
    return max(1, round(math.sqrt(width / channels)))


def train_heads(
    backbone: Backbone,
    protocol: HeadProtocol,
    train: ClassificationSet,
    test: ClassificationSet,
    criterion: Criterion,
    setup: Setup,
) -> Fitted:
    """Train the heads of ``protocol`` on ``train``, choose one there by ``criterion``, score the images of ``test``.

    The backbone comes back as it was; what is fine-tuned is a copy. Raises :class:`BackboneError` for an output it
    does not give, :class:`evalsuite.errors.DataError` for labels that no validation part can be made of, and
    :class:`evalsuite.errors.TrainingError` where the loss of the only setting is not finite; of several settings, one
    that diverges loses.
    """
    frozen = not protocol.tune and protocol.backbone_norm == "eval"
    # heads alone need no other precision
    fabric = launched(setup.device, setup.devices, precision="32-true" if frozen else setup.precision)
    with together(fabric):
        return _train_heads(_Trainer(backbone, protocol, train, setup, fabric), train, test, criterion)


def _train_heads(trainer: _Trainer, train: ClassificationSet, test: ClassificationSet, criterion: Criterion) -> Fitted:
    began, protocol = monotonic(), trainer.protocol
    settings = protocol.settings(trainer.outputs)
    if len(settings) == 1:
        choice, chosen = Choice(settings[0], None, (), ()), None
    else:
        choice, chosen = _choose(trainer, settings, train, criterion)
    decided = monotonic()
    if chosen is None or protocol.refit:
        chosen = _Pick(trainer.train([choice.setting], train, "train"), 0)
    trained = monotonic()
    (scores,) = chosen.run.scores(test, [chosen.place])
    return Fitted(
        scores=scores, scale="logits", table=choice.table, details=chosen.run.details,
        choice=choice.told(),
        timings={"choose": decided - began, "train": trained - decided, "test": monotonic() - trained},
        warnings=(*choice.warnings, *chosen.run.warnings),
    )  # fmt: skip


class _Pick(NamedTuple):
    """One of the heads that a run trained."""

    run: _Trained
    place: int


def _choose(
    trainer: _Trainer, settings: Sequence[Setting], train: ClassificationSet, criterion: Criterion
) -> tuple[Choice, _Pick]:
    """The setting that is best on a held-out part, and its head, which has not seen that part."""
    protocol, seed = trainer.protocol, trainer.setup.seed
    fit_on, held = hold_out(train.labels, protocol.validation, seed, train.groups)
    part, points = train.take(fit_on), train.take(held)
    table: list[tuple[Setting, float]] = []
    best: list[tuple[Setting, _Pick]] = []  # a run that cannot be chosen any more gives its memory back
    shared = [list(settings)] if not protocol.tune else [[setting] for setting in settings]
    for number, group in enumerate(shared):
        run = trainer.train(group, part, f"choose-{number}", several=True, times=len(shared) if not number else 0)
        for place, scores in enumerate(run.scores(points, range(len(group)))):
            value = criterion(scores, points.labels, "logits") if np.isfinite(scores).all() else -math.inf
            table.append((group[place], -math.inf if math.isnan(value) else value))
            tied = tied_for_best(table)
            best = [row for row in (*best, (group[place], _Pick(run, place))) if row[0] in tied]
    choice = choose(table, len(held))
    return choice, next(pick for setting, pick in best if setting == choice.setting)


# --- training ---------------------------------------------------------------------------------------------------


class _Trainer:
    """Everything the runs of one evaluation share."""

    def __init__(
        self, backbone: Backbone, protocol: HeadProtocol, train: ClassificationSet, setup: Setup, fabric: Fabric
    ) -> None:
        self.backbone, self.protocol, self.setup, self.fabric = backbone, protocol, setup, fabric
        self.outputs = protocol.read(backbone)
        self.whole = protocol.head in ("conv", "alexnet")
        self.columns = train.labels.shape[1] if train.multilabel else len(train.classes)
        self.sizing = protocol.preprocess(backbone, train)
        self.frozen = not protocol.tune and protocol.backbone_norm == "eval"
        self.identity = backbone.identity
        with self.encoder(self.outputs) as encoder:
            blank = torch.zeros(1, 3, *self.sizing.size, dtype=torch.uint8)
            self.shapes = {o.name: tuple(t.shape[1:]) for o, t in zip(self.outputs, encoder(blank), strict=True)}

    def encoder(self, outputs: Sequence[Output], whole: bool = True) -> Encoder:
        return Encoder(
            self.backbone, outputs, self.sizing, self.fabric.device, self.setup.precision,
            channels_last=self.setup.channels_last, progress=self.setup.progress, whole=whole,
        )  # fmt: skip

    def demand(self, part: int, batch: int, data: ClassificationSet, times: int) -> Demand | None:
        """What ``times`` trainings ask of the machine; None of one that another was like."""
        if not times:
            return None
        height, width = self.sizing.size
        return Demand(
            what=f"training by {self.protocol.id}", pixels=height * width, batch=batch, at_once=part, times=times,
            steps=max(1, math.ceil(self.protocol.epochs * len(data) / batch)), patient=self.setup.patient,
            shorter=("--set epochs={}", math.floor(self.protocol.epochs)),
        )  # fmt: skip

    def train(
        self, settings: Sequence[Setting], data: ClassificationSet, name: str, several: bool = False, times: int = 1
    ) -> _Trained:
        """Train one head a setting on ``data``, or go on from the state of that name; in all there are ``times``
        trainings like this one (0: it is not the first of them)."""
        protocol, fabric = self.protocol, self.fabric
        names = list(dict.fromkeys(setting.get("features", self.outputs[0].name) for setting in settings))
        outputs = [output for output in self.outputs if output.name in names]
        places = [[o.name for o in outputs].index(s.get("features", outputs[0].name)) for s in settings]
        model: nn.Module = _Classifiers([self.head(outputs[p]) for p in places], places, settings, data, several)
        encoder = self.encoder(outputs, self.whole) if self.frozen else None
        if encoder is None:
            model = _Network(
                copy.deepcopy(self.backbone), model, outputs, self.whole, bool(self.setup.channels_last), protocol
            )
        if fabric.device.type == "cuda" and fabric.world_size > 1:
            model = convert_sync_batchnorm(model)  # timm's: it keeps the activations its norms carry
        if self.setup.channels_last:
            model = model.to(memory_format=torch.channels_last)
        part = max(1, min(protocol.batch_size, len(data)) // protocol.accumulate)
        batch = part * protocol.accumulate
        run = Fit(
            model=model, optimizer=_optimizer(model, settings, protocol),
            lr_factor=lambda step: protocol.rate(step * batch / len(data)),
            iterations=max(1, math.ceil(round(protocol.epochs * len(data), 6) / batch)), seed=self.setup.seed,
            key=f"{self.identity} {protocol.hash} {data.digest} {self.setup.seed} {fabric.world_size} {settings}",
            state=self.setup.work / f"{name}.pt", what=f"{name} of {protocol.id}", saves=self.setup.save_every,
            accumulate=protocol.accumulate, demand=self.demand(part, batch, data, times),
        )  # fmt: skip
        run.logs = max(20, run.iterations // _LOGGED)
        trained = _Trained(self, model, encoder, run, data, part)
        with trained.ready():
            run.batches, run.few = trained.batches, trained.few
            fit(run, fabric, self.setup.progress)
        return trained

    def head(self, output: Output) -> nn.Module:
        """A fresh head, the same whatever others there are."""
        protocol, shape = self.protocol, self.shapes[output.name]
        channels, cells = shape[-1], 1
        if len(shape) == 3:
            channels, cells = shape[0], shape[1] * shape[2] if output.pool == "full" else output.grid**2
        if self.whole and len(shape) != 3:
            raise BackboneError(
                f"{output.name!r} is no map for a {protocol.head} head",
                cause=f"it has the shape {shape} an image, not (channels, height, width)",
                fix="name a map or a convolutional layer: --set outputs=map16",
            )
        with seeded(self.setup.seed):
            if protocol.head == "linear":
                built = _linear(channels, cells, self.columns, protocol.norm)
            elif protocol.head == "conv":
                built = _conv(channels, self.columns)
            elif protocol.head == "mlp":
                hidden = min(20 * self.columns, 2048)
                built = nn.Sequential(*_hidden(channels * cells, hidden), nn.Linear(hidden, self.columns))
            else:
                built = _alexnet(channels, self.columns, last=output == self.outputs[-1])
            _start(built, protocol.init)
        return built


class _Trained:
    """A run: its model, the frozen backbone where there is one, and the ways of feeding and asking it."""

    def __init__(
        self, trainer: _Trainer, model: nn.Module, encoder: Encoder | None, run: Fit, data: ClassificationSet, part: int
    ) -> None:
        self.trainer, self.model, self.encoder, self.run, self.data = trainer, model, encoder, run, data
        self.part, batch = part, part * trainer.protocol.accumulate
        self.device = trainer.fabric.device
        self.details = {
            "images": len(data), "batch_size": batch, "iterations": run.iterations, "log": run.log,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "outputs": [output.name for output in trainer.outputs],
            "preprocess": dataclasses.asdict(trainer.sizing),
        }  # fmt: skip
        asked = trainer.protocol.batch_size
        short = f"{len(data)} training images are fewer than a batch of {asked}: a step sees all of them"
        self.warnings = (short,) if batch < asked else ()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """While hooks are on the layers, and a frozen backbone is in evaluation mode."""
        context: Any = self.encoder
        if isinstance(self.model, _Network):
            context = self.model.taps
        with context:
            yield

    def _steps(self, part: int) -> Steps:
        trainer = self.trainer
        views = _Views(self.data, trainer.protocol, trainer.sizing)
        place = trainer.fabric.global_rank, trainer.fabric.world_size
        return Steps(views, len(self.data), part, trainer.setup.seed, *place)

    def few(self, images: int) -> tuple[Any, Tensor]:
        """A batch of so many images."""
        found = _stacked(self._steps(images)[0])
        if isinstance(found, DataError):
            raise found
        return self._inputs(found[0]), found[1].to(self.device)

    def batches(self, first: int) -> Iterator[tuple[Any, Tensor]]:
        """What the model learns from, from the batch of that number on: features or pixels, and labels."""
        protocol, setup, steps = self.trainer.protocol, self.trainer.setup, self._steps(self.part)
        loader = DataLoader(
            steps, batch_size=None, sampler=range(first, self.run.iterations * protocol.accumulate),
            num_workers=setup.workers, collate_fn=_stacked, pin_memory=bool(setup.pin_memory),
            prefetch_factor=self._ahead() if setup.workers else None, worker_init_fn=ignore_signals,
        )  # fmt: skip
        for found in loader:
            if isinstance(found, DataError):
                raise found
            pixels, labels = found
            yield self._inputs(pixels), labels.to(self.device, non_blocking=True)

    def _ahead(self) -> int:
        """Batches a worker reads ahead; of 4,096 images one is enough."""
        height, width = self.trainer.sizing.size
        return max(1, min(4, _READ_AHEAD // (3 * height * width * self.part * self.trainer.setup.workers)))

    def _inputs(self, pixels: Any) -> Any:
        if self.encoder is not None:
            return self.encoder(pixels)
        return pixels.to(self.device, non_blocking=True)

    def scores(self, data: ClassificationSet, places: Iterable[int]) -> list[Floats]:
        """(N, C) logits of these heads for the images of ``data``, whose labels are not asked for."""
        fabric, setup = self.trainer.fabric, self.trainer.setup
        rows = range(fabric.global_rank, len(data), fabric.world_size)
        size = min(self.part, 256)
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        wanted, found = list(places), list[list[Tensor]]()
        self.model.eval()
        with self.ready(), torch.no_grad(), setup.progress.track("score", len(rows)) as meter:
            loader = images_in_order(data, self.trainer.sizing, batches, setup.workers, bool(setup.pin_memory))
            for done, pixels in enumerate(loader, 1):
                with fabric.autocast():
                    logits = self.model((self._inputs(pixels), None))
                found.append([logits[place].float().cpu() for place in wanted])
                meter.update(min(done * size, len(rows)))
        mine = [torch.cat(column).numpy() for column in zip(*found, strict=True)]
        return mine if fabric.world_size == 1 else _joined(mine, len(data), fabric.world_size)


def _joined(mine: list[Floats], rows: int, world: int) -> list[Floats]:
    """The scores of all processes, each of which has every ``world``-th row."""
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, mine)
    whole = [np.empty((rows, scores.shape[1]), scores.dtype) for scores in mine]
    for rank, theirs in enumerate(parts):
        for scores, part in zip(whole, theirs, strict=True):
            scores[rank::world] = part
    return whole


def _optimizer(model: nn.Module, settings: Sequence[Setting], protocol: HeadProtocol) -> torch.optim.Optimizer:
    heads = model.heads if isinstance(model, _Network) else model
    assert isinstance(heads, _Classifiers)
    groups = []
    for setting, head in zip(settings, heads.heads, strict=True):
        groups += _groups(head, setting["lr"], protocol, protocol.unscaled == "vectors and head")
    if protocol.tune and isinstance(model, _Network):
        groups += _groups(model.backbone, protocol.backbone_lr, protocol, False)
    lr = settings[0]["lr"]
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr, protocol.momentum, weight_decay=protocol.weight_decay, nesterov=protocol.nesterov
        )
    return LARS(
        groups, lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay, trust=protocol.trust,
        ratio=protocol.trust_ratio, clip=protocol.trust_clip,
    )  # fmt: skip


def _groups(module: nn.Module, lr: float, protocol: HeadProtocol, plain: bool) -> list[dict[str, Any]]:
    """The parameters of a module; under LARS in two groups, those that are scaled and those that are not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if protocol.optimizer == "sgd":
        return [{"params": trained, "lr": lr}]
    left = [plain or (protocol.unscaled != "nothing" and p.ndim <= 1) for p in trained]
    scaled = {"params": [p for p, out in zip(trained, left, strict=True) if not out], "lr": lr}
    others = [p for p, out in zip(trained, left, strict=True) if out]
    return [g for g in (scaled, {"params": others, "lr": lr, "adapt": False, "weight_decay": 0.0}) if g["params"]]


# --- models -----------------------------------------------------------------------------------------------------


class _Classifiers(nn.Module):
    """Heads, each on one of the features: in training a loss for each, in evaluation the logits of each (B, C).

    ``several``: a head whose loss is not finite is left to itself, so that it does not end the others.
    """

    def __init__(
        self,
        heads: Sequence[nn.Module],
        places: Sequence[int],
        settings: Sequence[Setting],
        data: ClassificationSet,
        several: bool,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.places, self.several, self.multilabel = list(places), several, data.multilabel
        self.names = [" ".join(f"{key}={value}" for key, value in s.items()) for s in settings]

    def forward(self, batch: tuple[list[Tensor], Tensor | None]) -> Any:
        features, labels = batch
        with uncast(features[0].device):
            logits = [head(features[place]) for head, place in zip(self.heads, self.places, strict=True)]
            if labels is None:
                return logits
            losses = [_loss(scores, labels, self.multilabel) for scores in logits]
        if self.several:
            losses = [loss.nan_to_num(0.0, 0.0, 0.0) for loss in losses]
        return dict(zip(self.names, losses, strict=True))


def _loss(logits: Tensor, labels: Tensor, multilabel: bool) -> Tensor:
    """Cross-entropy; for several labels the mean logistic loss of those that are known."""
    if not multilabel:
        return F.cross_entropy(logits, labels)
    known = labels >= 0
    terms = F.binary_cross_entropy_with_logits(logits, labels.clamp_min(0).to(logits.dtype), reduction="none")
    return (terms * known).sum() / known.sum().clamp_min(1)


class _Network(nn.Module):
    """A backbone with its heads, on pixels (B, 3, H, W) uint8. It learns with them, or only its batch norm moves."""

    def __init__(
        self, backbone: Backbone, heads: nn.Module, outputs: Sequence[Output], whole: bool, channels_last: bool,
        protocol: HeadProtocol,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels_last = channels_last
        self.backbone, self.heads = backbone.requires_grad_(protocol.tune), heads
        self.taps = Taps(backbone, outputs, whole)
        self._tune, self._norm = protocol.tune, protocol.backbone_norm

    def train(self, mode: bool = True) -> _Network:
        super().train(mode)
        if self._norm == "eval":
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, batch: tuple[Tensor, Tensor | None]) -> Any:
        pixels, labels = batch
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._tune):
            features = self.taps(pixels.float() / 255)
        return self.heads((features, labels))


def _linear(channels: int, cells: int, columns: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    if norm != "none":
        by_channel = nn.BatchNorm1d(channels, affine=norm == "affine")
        layers = [nn.Unflatten(1, (channels, cells)), by_channel, nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels * cells, columns))


def _conv(channels: int, columns: int) -> nn.Sequential:
    """RotNet's third block of a Network in Network."""
    layers: list[nn.Module] = []
    for before, kernel in ((channels, 3), (192, 1), (192, 1)):
        unit = nn.Conv2d(before, 192, kernel, padding=kernel // 2, bias=False)
        layers += [unit, nn.BatchNorm2d(192), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, columns))


def _alexnet(channels: int, columns: int, last: bool) -> nn.Sequential:
    """What follows conv4 or conv5 of AlexNet. On its maps of 13 x 13 the pool is the 3 x 3 one of stride 2."""
    before: list[nn.Module] = []
    if not last:
        before = [nn.Conv2d(channels, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU(inplace=True)]
        channels = 256
    grid = _grid(9216, channels)
    pool = [nn.AdaptiveMaxPool2d(grid), nn.Flatten()]
    hidden = [*_hidden(channels * grid**2, 4096), nn.Linear(4096, columns)]
    return nn.Sequential(*before, *pool, *hidden)


def _hidden(width: int, hidden: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before in (width, hidden):
        layers += [nn.Linear(before, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    return layers


def _start(head: nn.Module, init: str) -> None:
    """Starting weights; batch norm keeps its own."""
    for layer in head.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or init == "torch":
            continue
        fan = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels * math.prod(layer.kernel_size)
        std = {"small": 0.01, "zero": 0.0, "fan-out": math.sqrt(2 / fan)}[init]
        nn.init.normal_(layer.weight, std=std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# --- views ------------------------------------------------------------------------------------------------------


class _Views:
    """Training images by number: (3, H, W) uint8 as a seed makes one look at them, and the label.

    An image that is refused comes back as its refusal, for a loader's worker cannot raise it.
    """

    def __init__(self, data: ClassificationSet, protocol: HeadProtocol, sizing: Preprocess) -> None:
        self.data, self.look = data, _look(protocol, sizing)

    def __call__(self, index: int, seed: int) -> tuple[Tensor, Any] | DataError:
        try:
            image = torch.from_numpy(np.ascontiguousarray(self.data[index])).permute(2, 0, 1)
        except DataError as refused:
            return refused
        with _seeded(seed):
            return self.look(image), self.data.labels[index]


class _Crop(v2.RandomResizedCrop):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's, resized to the same bytes on every processor."""

    def transform(self, inpt: Tensor, params: dict[str, int]) -> Tensor:
        height, width = self.size
        return resize(v2.functional.crop_image(inpt, **params), height, width, self.interpolation.value)


def _look(protocol: HeadProtocol, sizing: Preprocess) -> Callable[[Tensor], Tensor]:
    """torchvision's transforms, in the order of the published code."""
    size, mode = list(sizing.size), InterpolationMode(protocol.interpolation)
    padding = [round(size[1] * protocol.padding), round(size[0] * protocol.padding)]
    crop: list[Callable[..., Any]] = {
        "resized": [_Crop(size, protocol.crop, protocol.crop_ratio, mode)],
        "cut": [sizing.covering, v2.RandomCrop(size)],
        "padded": [sizing.sized, v2.RandomCrop(size, padding)],
        "whole": [sizing.sized],
    }[protocol.view]
    others: list[nn.Module] = [v2.RandomHorizontalFlip(protocol.flip)]
    if protocol.jitter:
        others.insert(0, v2.RandomApply([v2.ColorJitter(*protocol.jitter)], protocol.jitter_p))
    if protocol.grey:
        others.insert(-1, v2.RandomGrayscale(protocol.grey))
    if protocol.blur:
        others.insert(-1, v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], protocol.blur))
    look: Callable[[Tensor], Tensor] = v2.Compose([*crop, *others])
    return look


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's generator of the CPU from a seed; as it was, when the block ends."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _stacked(samples: Sequence[tuple[Tensor, Any] | DataError]) -> tuple[Tensor, Tensor] | DataError:
    """Images and labels; or the refusal of the first that has one."""
    sound = [sample for sample in samples if not isinstance(sample, DataError)]
    if len(sound) < len(samples):
        return next(sample for sample in samples if isinstance(sample, DataError))
    return torch.stack([image for image, _ in sound]), torch.from_numpy(np.stack([label for _, label in sound]))
