"""What a method or a modifier is: an nn.Module with typed options; and what a run tells it."""

from __future__ import annotations

import hashlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from evalsuite import Backbone, UsageError
from evalsuite.files import atomic, forget_partials
from evalsuite.hooks import unknown
from evalsuite.settings import typed
from pretrain.blocks import rank, world_size

if typing.TYPE_CHECKING:
    from pretrain.data import Images

__all__ = ["Method", "Modifier", "Plugin", "Preset", "Run", "Training", "read_options"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """The part of a recipe that every method has: image size, optimiser and learning-rate schedule.

    A method whose ``Options`` derive from this class carries its own numbers; others are trained by those of
    ``defaults`` (``--set defaults.lr=0.1``). The learning rate is ``lr`` at a batch of 256 images, all processes
    together, and grows with it as ``scaling`` says: ``linear`` as B / 256, ``sqrt`` as sqrt(B / 256), ``none`` not
    at all. Over the first ``warmup`` epochs it rises linearly from ``start`` of itself, as ``rise`` says
    (:func:`pretrain.blocks.warmup_share`), then follows ``schedule`` to the end: half a cosine to ``floor`` of
    itself, or a ``step`` by ``factor`` at each of ``milestones`` (shares of the run). ``by_epoch`` holds it
    constant within an epoch once it has risen. ``nesterov`` is a kind of momentum of SGD alone, ``betas`` are those
    of AdamW. ``decay_vectors`` says whether biases and the scales and shifts of normalisation decay (and, under
    LARS, are adapted) too. ``trust``, ``trust_ratio`` and ``trust_clip`` are those of
    :class:`pretrain.blocks.LARS`. Gradients are scaled down where their norm is above ``clip`` (``--clip-gradient``
    is stronger): their length, ``l2``, or their largest entry, ``max``.

    Where neither a preset nor the user says a size, ``size`` follows the data, and with it, in proportion, the other
    fields that ``pixels`` names; a class that declares a ``size`` of its own has said it.
    """

    pixels: ClassVar[tuple[str, ...]] = ("size",)
    size: int = 224
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    lr: float = 0.05
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    decay_vectors: bool = True
    warmup: float = 0.0
    start: float = 0.0
    rise: Literal["next", "last", "ahead"] = "next"
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    floor: float = 0.0
    milestones: tuple[float, ...] = (0.6, 0.8)
    factor: float = 0.1
    by_epoch: bool = False
    trust: float = 0.001
    trust_ratio: Literal["decayed", "summed"] = "decayed"
    trust_clip: bool = False
    clip: float | None = None
    clip_norm: Literal["l2", "max"] = "l2"

    @classmethod
    def says_size(cls) -> bool:
        """Whether the method's own options, rather than these, say how large images are."""
        first = next(kind for kind in cls.__mro__ if "size" in inspect.get_annotations(kind))
        return first is not Training

    def sized(self, size: int) -> Self:
        """The same options for images of another size."""
        return replace(self, **{name: round(getattr(self, name) * size / self.size) for name in self.pixels})

    def __post_init__(self) -> None:
        if self.nesterov and (self.optimizer != "sgd" or self.momentum <= 0):
            raise ValueError(f"nesterov is for SGD with momentum, not {self.optimizer} with {self.momentum}")


@dataclass(frozen=True)
class Preset:
    """A published recipe, or ours where nothing was published: options, epochs and batch size, and where they are
    from."""

    source: str
    epochs: int
    batch_size: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """What a training run is: handed to every stage that asks for it.

    ``batch_size`` counts images of one optimiser step over all processes, ``micro_size`` those of one backward pass
    on this process. ``steps`` are all optimiser steps, ``epoch_steps`` those of one epoch. ``workers`` processes
    decode images. ``rng`` is drawn afresh for every step, the same in all processes. ``width`` is the method's: how
    wide the rows of its pairs are.
    """

    backbone: Backbone
    seed: int
    device: torch.device
    out: Path
    epochs: int
    batch_size: int
    micro_size: int
    steps: int = 0
    epoch_steps: int = 0
    step: int = 0
    width: int = 0
    data: Images | None = None
    workers: int = 0
    rng: torch.Generator = field(default_factory=torch.Generator)
    training: Training = field(default_factory=Training)

    @property
    def dim(self) -> int:
        """The width of the backbone's pooled features."""
        return self.backbone.spec.dim

    @property
    def epoch(self) -> int:
        """The epoch of the current step, from 0."""
        return self.step // max(1, self.epoch_steps)

    @property
    def progress(self) -> float:
        """The share of the run that lies behind the current step: 0 at the first."""
        return self.step / max(1, self.steps)

    def cached(self, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that are costly to make, made once in a run and read from its folder when it is resumed.

        ``key`` names all they depend on besides the data and the seed. One process makes them, all read them.
        """
        fingerprint = self.data.fingerprint if self.data is not None else ""
        digest = hashlib.sha256(f"{key}\n{fingerprint}\n{self.seed}".encode()).hexdigest()
        path = self.out / "cache" / f"{digest[:16]}.safetensors"
        if rank() == 0 and not path.exists():
            tensors = {name: value.detach().cpu().contiguous() for name, value in make().items()}
            forget_partials(path)
            with atomic(path) as partial:
                safetensors.torch.save_file(tensors, partial)
        if world_size() > 1:
            dist.barrier()
        return safetensors.torch.load_file(path)


@dataclass(frozen=True)
class NoOptions:
    """The options of a plugin that has none."""


class Plugin(nn.Module):
    """A part of a recipe: its marked methods are stages (:class:`pretrain.hooks.Stages`).

    What it learns or remembers are parameters and buffers, so devices, processes and checkpoints need no word from
    it. They are built in ``prepared``. ``options`` is an instance of the class's ``Options``, a frozen dataclass.
    ``small`` are options by which ``evalsuite plugins check`` tries it on a few images of 16 pixels, 8 at once.
    """

    Options: ClassVar[type[Any]] = NoOptions
    small: ClassVar[Mapping[str, Any]] = {}
    options: Any

    def __init__(self, options: Any = None) -> None:
        super().__init__()
        self.options = self.Options() if options is None else options
        if not isinstance(self.options, self.Options):
            raise TypeError(f"{type(self).__name__} takes {self.Options}, not {type(self.options).__name__}")


class Method(Plugin):
    """A way to learn without labels. It offers ``losses`` at least.

    ``width`` is the width of its pairs. ``presets`` are recipes by name. ``arch`` is the architecture it trains where
    the user names none, ``data`` an example for its page. A method that learns with its own architecture alone has
    ``small_arch``, the options by which ``evalsuite plugins check`` builds that for a few images of 16 pixels; others
    are tried on a small network of the kit. ``norm_groups`` says over how many images batch normalisation takes its
    statistics: the batch of all processes is put into that many groups, 1 being the whole batch (synchronised over
    processes), so that numbers do not depend on how many processes share the work.
    """

    presets: ClassVar[Mapping[str, Preset]] = {}
    arch: ClassVar[str] = "timm:resnet50"
    data: ClassVar[str] = "folder:/data/images"
    small_arch: ClassVar[Mapping[str, Any] | None] = None

    @property
    def width(self) -> int:
        return int(getattr(self.options, "width", 0))

    @property
    def norm_groups(self) -> int:
        return 1

    @classmethod
    def preset(cls, name: str) -> Preset:
        """The recipe of that name. Raises :class:`UsageError` for an unknown one."""
        if name not in cls.presets:
            raise unknown("preset", name, cls.presets, owner=cls.__name__)
        return cls.presets[name]


class Modifier(Plugin):
    """A change to any method that offers the stages it wraps.

    ``off`` are options that turn it off (None: there are none such): with them a method's numbers are its own, to which
    :func:`pretrain.testing.check_modifier` and ``evalsuite plugins check`` hold it.
    """

    off: ClassVar[Mapping[str, Any] | None] = None


Part = typing.TypeVar("Part", bound=Plugin)


def read_options(
    plugin: type[Plugin], name: str, settings: Mapping[str, str], preset: Mapping[str, Any] | None = None
) -> Any:
    """The options of a plugin: its defaults, then a preset's, then text from the command line, read as each field's
    type (:mod:`evalsuite.settings`).

    Raises :class:`UsageError` for a field that does not exist or a value of another type.
    """
    kind = plugin.Options
    if not is_dataclass(kind):
        raise TypeError(f"{plugin.__name__}.Options is no dataclass")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind) if f.init]
    values, before = dict(preset or {}), kind()
    for key, text in settings.items():
        if key not in known:
            raise unknown("setting", key, known, owner=name)
        values[key] = typed(text, hints[key], f"{name}.{key}", values.get(key, getattr(before, key)))
    try:
        return replace(before, **values)
    except ValueError as error:  # an Options class may check itself
        raise UsageError(
            f"the settings of {name} do not fit", cause=f"{error}", fix=f"see --set {name}.KEY=VALUE"
        ) from error
