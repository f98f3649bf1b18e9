"""The straight way from a backbone to its scores: Protocol, Setup, Outcome, Task and evaluate()."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, cast

import numpy as np
import torch
from typing_extensions import TypeVar  # with defaults, which typing has from Python 3.13

from evalsuite.backbone import KINDS, Backbone
from evalsuite.data.digests import data_session
from evalsuite.errors import BackboneError, DataError, PluginError
from evalsuite.features import Cache
from evalsuite.hooks import unknown
from evalsuite.seeding import manual_seed
from evalsuite.settings import typed

if TYPE_CHECKING:
    from evalsuite.hooks import Registry
    from evalsuite.progress import Progress

__all__ = ["Metric", "Outcome", "Protocol", "Setup", "Task", "evaluate"]


@dataclass(frozen=True)
class Metric:
    """A number a task promises, which way is better, and between what it lies. ``undefined`` says why it has no value
    where it has none, in words that follow ``it has no value: ``."""

    name: str
    higher_is_better: bool = True
    low: float = 0.0
    high: float = 1.0
    undefined: str = "the test data hold nothing that it measures"


DIGITS = 8  # of a protocol's numbers: the seventeenth of a computed one differs between processors


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A recipe with a name and a version. Every number that can move a score is a field of it.

    Two results are comparable if and only if their protocols' hashes are equal. ``modified`` lists the fields that
    were overridden by hand; such a result is marked, and never ranked. Nor is one by a protocol whose ``ranked`` is
    false: it is there to see that everything works. These two move no score, and are no part of the hash.
    Numbers are kept to eight significant digits, so that a grid that was computed is the same one on every processor; a
    subclass with a ``__post_init__`` of its own calls this one first.
    """

    id: str
    version: int
    modified: tuple[str, ...] = ()
    ranked: bool = True

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self)):
            object.__setattr__(self, name, _short(getattr(self, name)))

    @property
    def hash(self) -> str:
        """sha256 over all fields but ``modified`` and ``ranked``, in 16 hexadecimal digits.

        Raises :class:`PluginError` for a number of more than eight significant digits.
        """
        values = {k: v for k, v in self.fields().items() if k not in ("modified", "ranked")}
        for name, value in values.items():
            if _short(value) != value:
                raise PluginError(
                    f"protocol {self.id!r} has a number of more than {DIGITS} digits in {name}",
                    cause=f"its {type(self).__name__} does not round them, and last digits differ between processors",
                    fix="call super().__post_init__() in its __post_init__",
                )
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def seeded(self) -> bool:
        """Whether the run's seed can move a score; where it cannot, one run says all that more would."""
        return True

    def fields(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    def override(self, settings: Mapping[str, str]) -> Self:
        """A copy with fields replaced by text from the command line, each read as its field's type.

        Raises :class:`UsageError` for a field that does not exist or a value of another type.
        """
        types = typing.get_type_hints(type(self))
        open_fields = {f.name for f in dataclasses.fields(self)} - {"id", "version", "modified", "ranked"}
        values: dict[str, Any] = {}
        for name, text in settings.items():
            if name not in open_fields:
                raise unknown(f"setting of protocol {self.id!r}", name, open_fields)
            values[name] = typed(text, types[name], name, getattr(self, name))
        other = dataclasses.replace(self, **values)
        changed = {k for k in values if getattr(other, k) != getattr(self, k)}
        return dataclasses.replace(other, modified=tuple(sorted({*self.modified, *changed})))


def _short(value: Any) -> Any:
    """Every float of a value to :data:`DIGITS` significant digits; containers are looked into."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {k: _short(v) for k, v in value.items()}
    return type(value)(map(_short, value)) if type(value) in (tuple, list) else value


P = TypeVar("P", bound=Protocol, default=Any)
P_co = TypeVar("P_co", bound=Protocol, covariant=True, default=Protocol)


@dataclass
class Setup(Generic[P_co]):
    """What a run is given besides the backbone; ``Setup[DetectionProtocol]`` is one by a protocol of that type.

    ``data_root`` is where data sets lie; ``data`` names the data of a generic task (``voc:PATH``, ``coco:PATH``).
    ``work`` is a folder of this cell's own that outlives a crash: state to resume from belongs there, and it is
    removed when the cell is written; training saves its state there every ``save_every`` seconds. ``workers`` read
    training images, ``encode_workers`` those that are encoded once (``"auto"``: as many as pay, by measurement).
    ``patient`` begins what would take very long on this device all the same (:mod:`evalsuite.preflight`).
    ``limit`` caps the number of images of every split. ``strict``: where images cannot be read or rows have no label,
    refuse the data rather than leave those out and count them. ``channels_last`` (the layout of convolutions) and
    ``pin_memory`` (of batches, in page-locked memory) are what a GPU wants (None: there).
    ``cache`` keeps encoded features between runs.
    """

    protocol: P_co
    work: Path
    registry: Registry
    progress: Progress
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "32-true"
    devices: int = 1
    workers: int = 0
    encode_workers: int | Literal["auto"] = 0
    data_root: Path | None = None
    data: str | None = None
    engine: str | None = None
    limit: int | None = None
    demo: bool = False
    save_every: float = 60.0
    strict: bool = False
    patient: bool = False
    channels_last: bool | None = None
    pin_memory: bool | None = None
    cache: Cache = field(default_factory=Cache)

    def __post_init__(self) -> None:
        gpu = self.device.type == "cuda"
        self.channels_last = gpu if self.channels_last is None else self.channels_last
        self.pin_memory = gpu if self.pin_memory is None else self.pin_memory

    def by(self, protocol: P, **changes: Any) -> Setup[P]:
        """This setup for another protocol, with ``changes`` of other fields."""
        return cast("Setup[P]", dataclasses.replace(cast(Any, self), protocol=protocol, **changes))

    @property
    def rng(self) -> np.random.Generator:
        """A generator fresh from the seed."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an evaluation found.

    ``scores`` are the promised metrics (None: undefined on these data, for example AP of small objects where there
    are none; the leading one must have a value). ``replicates`` are bootstrap replicates of scores, {metric: (R,)},
    drawn with resampling weights that depend only on ``units`` and the data fingerprint, so two backbones' replicates
    are paired.
    ``samples`` are per-sample scores {name: (N,)} with their ids in ``ids`` for paired tests; those that
    bear a metric's name have it as their mean. ``figures`` are PNG files
    by name. ``selected`` are hyper-parameters chosen on validation data. ``data`` describes what was read and must
    hold ``fingerprint``. ``records`` are files to keep beside the cell (predictions), by name.
    """

    scores: Mapping[str, float | None]
    data: Mapping[str, Any]
    replicates: Mapping[str, np.ndarray] = field(default_factory=dict)
    samples: Mapping[str, np.ndarray] = field(default_factory=dict)
    ids: Iterable[str] = ()
    figures: Mapping[str, Path] = field(default_factory=dict)
    records: Mapping[str, Path] = field(default_factory=dict)
    selected: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Task(ABC, Generic[P]):
    """An evaluator. Subclasses set the class attributes and say how to run; instances hold nothing.

    ``Task[DetectionProtocol]`` is one by protocols of that type: :func:`evaluate` refuses any other.

    ``protocols[0]`` is the default. ``needs`` is what of :class:`evalsuite.Features` it reads. ``shows`` are kinds of
    input (:data:`evalsuite.backbone.KINDS`), one of which a backbone must take; a kind among ``needs`` it must take as
    well, for example ``text`` beside images. ``engines`` are the
    names of the engines it can use, the default first (empty: none). A ``generic`` task takes anybody's data; ``world``
    is the layout whose demo world it runs on (None: that of the data set of the task's own name).
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[Metric, ...]]
    primary: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    shows: ClassVar[frozenset[str]] = frozenset({"image"})
    protocols: ClassVar[tuple[Protocol, ...]]
    engines: ClassVar[tuple[str, ...]] = ()
    generic: ClassVar[bool] = False
    world: ClassVar[str | None] = None

    @abstractmethod
    def run(self, backbone: Backbone, setup: Setup[P]) -> Outcome:
        """Evaluate; must be a function of its arguments alone."""

    @abstractmethod
    def fingerprint(self, setup: Setup[P]) -> str:
        """A digest of the data this setup would read, found without decoding them.

        Raises :class:`evalsuite.errors.DataError` where they are missing.
        """

    def protocol(self, name: str | None = None) -> P:
        """The protocol of that name, or the default one."""
        if name is None:
            return cast(P, self.protocols[0])
        for protocol in self.protocols:
            if protocol.id == name:
                return cast(P, protocol)
        raise unknown(f"protocol of task {self.name!r}", name, [p.id for p in self.protocols])

    def requires(self, protocol: P) -> frozenset[str]:
        """What a backbone must give or take for this protocol; ``needs``, unless a protocol takes more."""
        return self.needs

    def lacking(
        self, protocol: P, gives: frozenset[str], takes: frozenset[str]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What this protocol needs of a backbone that does not give it, and the kinds of input it does not take."""
        required = self.requires(protocol)
        kinds = sorted((required & KINDS) - takes)
        if not self.shows & takes:
            kinds.append(" or ".join(sorted(self.shows)))
        return tuple(sorted(required - KINDS - gives)), tuple(dict.fromkeys(kinds))

    def fits(self, backbone: Backbone, protocol: P) -> bool:
        """Whether the backbone gives and takes what the protocol requires."""
        return not any(self.lacking(protocol, backbone.gives, backbone.takes))

    def promises(self, protocol: P) -> tuple[Metric, ...]:
        """The metrics of this protocol; ``metrics``, unless a protocol measures others. The leading one is in them."""
        return self.metrics

    def leading(self, protocol: P) -> str:
        """The name of the metric that counts; ``primary``, unless a protocol measures something else."""
        return self.primary

    def oracle(self) -> Backbone | None:
        """A backbone that knows what this task asks for, which checks hold against a blind one.

        None: that of :class:`evalsuite.testing.OracleBackbone`, to which thumbnails tell enough.
        """
        return None

    def refuse(self, backbone: Backbone, protocol: P) -> None:
        """Raise :class:`BackboneError` if the backbone does not give or take what the protocol requires."""
        if self.fits(backbone, protocol):
            return
        able = [p.id for p in self.protocols if self.fits(backbone, cast(P, p))]
        fix = f"--protocol {' or '.join(able)}" if able else "choose a task that needs only that"
        if protocol.id in able:  # as it is published it could be run
            fix = f"leave out {' and '.join(f'--set {name}=...' for name in protocol.modified)}"
        lacks = zip(self.lacking(protocol, backbone.gives, backbone.takes), ("give", "take"), strict=True)
        who, parts, causes = backbone.spec.arch, [], []
        for names, verb in lacks:
            if names:
                parts.append(f"{' and '.join(names)}, which {who} does not {verb}")
                causes.append(f"it {verb}s {', '.join(sorted(getattr(backbone, f'{verb}s')))}")
                who = "it"
        raise BackboneError(
            f"{self.name} by {protocol.id} needs {', and '.join(parts)}", cause=", and ".join(causes), fix=fix
        )


def evaluate(task: Task[P], backbone: Backbone, setup: Setup[P]) -> Outcome:
    """Run one task on one backbone and hold the outcome to what the task promises.

    The backbone comes back as it was: same weights, same mode. Raises :class:`BackboneError` before any work if
    the backbone lacks what the task needs, :class:`PluginError` if the protocol is none of the task's types or the
    outcome breaks the promise, :class:`DataError` if the metric that counts has no value; every other one without a
    value is a warning that says why.
    """
    _refuse_foreign(task, setup.protocol)
    task.refuse(backbone, setup.protocol)
    was_training = backbone.training
    manual_seed(setup.seed)
    try:
        with data_session(setup.progress):
            outcome = task.run(backbone.eval(), setup)
    finally:
        backbone.train(was_training)
    promised = {metric.name for metric in task.promises(setup.protocol)}
    if set(outcome.scores) != promised:
        odd = sorted(promised.symmetric_difference(outcome.scores))
        raise PluginError(
            f"task {task.name!r} broke its promise",
            cause=f"missing or unpromised metrics: {', '.join(odd)}",
            fix="make metrics and the scores it returns agree",
        )
    for name, value in outcome.scores.items():
        if value is not None and not math.isfinite(value):
            raise PluginError(
                f"task {task.name!r} returned {value} as {name}",
                cause="scores are finite numbers, or None where they are undefined",
                fix="find where it comes from; a result file cannot hold it",
            )
        samples = outcome.samples.get(name)
        if samples is not None and (value is None or not math.isclose(float(np.mean(samples)), value, abs_tol=1e-4)):
            raise PluginError(
                f"task {task.name!r} returned {value} as {name}, and samples of that name whose mean is another",
                cause="samples named as a metric are what it is the mean of; leaderboards check it",
                fix="name them otherwise, or return their mean",
            )
    return _valued(task, outcome, setup.protocol)


def _refuse_foreign(task: Task[P], protocol: Protocol) -> None:
    """Raise :class:`PluginError` for a protocol of another type than the task's own, before it reads its fields."""
    kinds = {type(own) for own in task.protocols}
    if not isinstance(protocol, tuple(kinds)):
        raise PluginError(
            f"task {task.name!r} was given protocol {protocol.id!r}, which is none of its kind",
            cause=f"it is a {type(protocol).__name__}, no {' or '.join(sorted(kind.__name__ for kind in kinds))}",
            fix=f"pass task.protocol(name), of the names {', '.join(own.id for own in task.protocols)}",
        )


def _valued(task: Task, outcome: Outcome, protocol: Protocol) -> Outcome:
    """The outcome with a warning of every metric that has no value; refuses one whose leading metric has none."""
    reasons: dict[str, list[str]] = {}
    for metric in task.promises(protocol):
        if outcome.scores[metric.name] is None:
            if metric.name == task.leading(protocol):
                raise DataError(
                    f"{task.name} cannot be scored: {metric.name} has no value",
                    cause=metric.undefined,
                    fix="check the labels of the test split: evalsuite data verify",
                )
            reasons.setdefault(metric.undefined, []).append(metric.name)
    undefined = [
        f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no value: {why}" for why, names in reasons.items()
    ]
    return dataclasses.replace(outcome, warnings=(*outcome.warnings, *undefined))
