"""From names on a command line to a backbone in a file: compose the recipe, prepare it, train it, save it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from evalsuite import Backbone, DataError, Features, PluginError, Registry, ResourceError, UsageError, load_backbone
from evalsuite.data.digests import data_session
from evalsuite.environment import versions
from evalsuite.errors import Refusal
from evalsuite.files import forget_partials, set_aside, writable, write_text
from evalsuite.hooks import unknown
from evalsuite.locks import RANKS, locked, refuse_held
from evalsuite.preflight import Demand, killed_workers
from evalsuite.progress import Progress
from evalsuite.signals import ignore_signals
from evalsuite.training import Fit, StepInfo, fit, launched, mix_seed
from evalsuite.training.processes import together
from pretrain.batch import Batch, Draw, Look, Pairs, Sample, collate, join, join_pairs
from pretrain.blocks import rank, world_size
from pretrain.data import Corpus, Images, parse, typical_side
from pretrain.hooks import Recipe
from pretrain.monitor import Journal, collapsed, health, knn_accuracy, last_collapse, plot
from pretrain.norms import group_norms
from pretrain.plugin import Method, Modifier, Plugin, Preset, Run, Training, read_options

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Plan", "State", "Trained", "compose", "prepare", "run", "train"]

PACKAGES = ("evalsuite", "torch", "torchvision", "timm", "lightning-fabric", "numpy")
UNPUBLISHED = Preset("no recipe of its own", 100, 256)
CPU = torch.device("cpu")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "64-true")
NOTE, STATE, METRICS, CURVES, BACKBONE = "run.json", "state.pt", "metrics.jsonl", "metrics.png", "backbone.safetensors"
LOCK = "run.lock"
TRIES = 64  # neighbours that may stand in for an unreadable image, one after the other


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a recipe is trained. ``batch_size`` counts images of one optimiser step over all processes; it is taken in
    ``accumulate`` parts, and negatives and batch statistics come from one part. ``save_every`` is in seconds,
    ``log_every`` in steps, ``knn_every`` in epochs (0: never). ``strict`` refuses unreadable images, which are else
    replaced by the next row and counted. ``patient`` begins what would take very long on this device all the same.
    ``channels_last`` (the layout of convolutions) and ``pin_memory`` (of batches, in page-locked memory) are what a GPU
    wants (None: there)."""

    out: Path
    epochs: int
    batch_size: int
    seed: int = 0
    device: str = "auto"
    devices: int = 1
    nodes: int = 1
    precision: str = "auto"
    workers: int | None = None
    accumulate: int = 1
    clip_gradient: float | None = None
    strict: bool = False
    resume: bool = True
    knn_every: int = 0
    log_every: int = 20
    save_every: float = 60.0
    steps: int | None = None
    patient: bool = False
    channels_last: bool | None = None
    pin_memory: bool | None = None
    note: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What came of it: the backbone, its file, the log (an entry a logged step), when it last showed a collapse
    (empty: never), and the rows whose images could not be read."""

    backbone: Backbone
    path: Path
    log: list[dict[str, float]]
    collapse: str
    unreadable: tuple[int, ...]


def run(
    method: str,
    modifiers: Sequence[str] = (),
    *,
    data: str,
    out: Path | str,
    registry: Registry,
    arch: str | None = None,
    arch_options: Mapping[str, Any] | None = None,
    preset: str | None = None,
    settings: Mapping[str, str] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **plan: Any,
) -> Trained:
    """Pretrain ``arch`` by names: what ``evalsuite pretrain`` does.

    ``data`` is ``layout:path`` or ``demo`` (:func:`pretrain.data.parse`); ``arch`` an architecture with fresh weights,
    or a checkpoint to go on from (None: the method's own, :attr:`pretrain.Method.arch`); ``settings`` are
    ``{"simclr.temperature": "0.2"}``; ``plan`` holds further fields of :class:`Plan`. Epochs and batch size are the
    preset's where none are given; images are as large as a preset or a setting says, else as they are, and no larger
    than the network's own.

    Raises a :class:`evalsuite.Refusal` for whatever cannot work, before any work is done.
    """
    said = progress or Progress(quiet=True)
    recipe, chosen = compose(method, modifiers, registry=registry, preset=preset, settings=settings or {})
    writable(out)
    if not any(name in os.environ for name in RANKS):  # of several processes the first one holds the lock
        refuse_held(Path(out) / LOCK, _doing(Path(out)))
    with said.doing(f"reading {data}"), data_session(said):
        corpus = parse(data, registry)
    arch = recipe.method.arch if arch is None else arch
    spec = arch if Path(arch).expanduser().exists() or arch.startswith("random:") else f"random:{arch}"
    with said.doing(f"loading {arch}"):
        backbone = load_backbone(spec, registry, options=arch_options or {}, seed=seed).backbone
    owner = recipe.parts[_owner(recipe)]
    if preset is None and f"{_owner(recipe)}.size" not in (settings or {}):
        _follow_data(owner, corpus, backbone, said)
    made = Plan(
        out=Path(out),
        epochs=chosen.epochs if epochs is None else epochs,
        batch_size=chosen.batch_size if batch_size is None else batch_size,
        seed=seed,
        note={"data": data, "arch": arch, "preset": preset},
        **plan,
    )
    return train(recipe, backbone, corpus, made, progress)


def _follow_data(part: Plugin, corpus: Corpus, backbone: Backbone, progress: Progress) -> None:
    """Let the size of images follow the data and the network where nobody says it: what is enlarged shows nothing
    more, and costs more. Networks that cut images into patches keep the size they have positions for."""
    options: Training = part.options
    if options.says_size() or hasattr(backbone.net, "patch_embed"):
        return
    with progress.doing("looking at the size of images"):
        side = typical_side(corpus.train) or options.size
    size = min(options.size, side, *backbone.spec.image_size)
    if size < options.size:
        part.options = options.sized(size)
        progress.say(f"images are learnt at {size} pixels: theirs are {side}, the network's {backbone.spec.image_size}")


def compose(
    method: str,
    modifiers: Sequence[str] = (),
    *,
    registry: Registry,
    preset: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> tuple[Recipe, Preset]:
    """The recipe of these names, with options from the preset and from ``part.key=value`` settings; and the preset
    (the method's first where none is named), for its epochs and batch size.

    Raises :class:`evalsuite.UsageError` where names or settings do not fit.
    """
    names = [method, *modifiers]
    kind = _part(registry, "method", method, Method)
    kinds = {name: _part(registry, "modifier", name, Modifier) for name in modifiers}
    texts = _by_part({method: kind, **kinds}, settings or {})
    published = kind.preset(preset) if preset else next(iter(kind.presets.values()), UNPUBLISHED)
    options = read_options(kind, method, texts[method], published.options if preset else {})
    plugins: list[Plugin] = [kind(options)]
    plugins += [modifier(read_options(modifier, name, texts[name])) for name, modifier in kinds.items()]
    recipe = Recipe(plugins[0], *plugins[1:], names=names)  # type: ignore[arg-type]  # held to their kinds above
    defaults = recipe.parts["defaults"]
    defaults.options = read_options(type(defaults), "defaults", texts["defaults"])
    if texts["defaults"] and isinstance(recipe.method.options, Training):
        raise UsageError(
            f"{method} does not follow the defaults",
            cause="it brings its own learning rate, optimiser and image size",
            fix=f"set its own: --set {method}.{next(iter(texts['defaults']))}=...",
        )
    return recipe, published


def _by_part(kinds: Mapping[str, type[Plugin]], settings: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The settings of each part and of the defaults. ``part.`` may be left out of an option that only one has."""
    own = {name: {f.name for f in fields(kind.Options)} for name, kind in kinds.items() if is_dataclass(kind.Options)}
    texts: dict[str, dict[str, str]] = {name: {} for name in [*kinds, "defaults"]}
    if not any(issubclass(kind.Options, Training) for kind in kinds.values()):
        own["defaults"] = {f.name for f in fields(Training)}
    for key, text in settings.items():
        part, dot, option = key.rpartition(".")
        owners = [part] if dot else [name for name, options in own.items() if key in options]
        if len(owners) > 1:
            raise UsageError(
                f"--set {key}={text} may be of several parts of the recipe",
                cause=f"{' and '.join(owners)} have an option {key}",
                fix=f"for example --set {owners[0]}.{key}={text}",
            )
        if not owners:
            known = sorted({option for options in own.values() for option in options})
            raise unknown("setting", key, known, owner=f"the recipe {'+'.join(kinds)}")
        if owners[0] not in texts:
            raise UsageError(
                f"--set {key}={text} names no part of the recipe",
                cause=f"settings have the form part.key=value; the parts are {', '.join(texts)}",
                fix=f"for example --set {next(iter(kinds))}.{option}={text}",
            )
        texts[owners[0]][option] = text
    return texts


def _part(registry: Registry, shelf: str, name: str, base: type[Any]) -> Any:
    target = registry.get(shelf, name)
    if not (isinstance(target, type) and issubclass(target, base)):
        raise PluginError(
            f"{shelf} {name!r} is no {base.__name__}",
            cause=f"its target is {target!r}",
            fix=f"bind it to a subclass of pretrain.{base.__name__}",
        )
    return target


# Training --------------------------------------------------------------------------------------------------


class Objective(nn.Module):
    """A recipe over a backbone as one module: the seam for devices, processes and checkpoints. ``objective(draw)``
    gives the named losses of a batch and remembers what it saw until the step is made."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        super().__init__()
        self.backbone = run.backbone
        self.parts = nn.ModuleDict(recipe.parts)
        self._run, self._recipe = run, recipe
        self.seen: list[tuple[Batch, list[Pairs]]] = []
        self.rows: Tensor | None = None
        self.unreadable: set[int] = set()

    def forward(self, draw: Draw) -> dict[str, Tensor]:
        run, recipe = self._run, self._recipe
        run.step = draw.step
        run.rng.manual_seed(mix_seed(run.seed, draw.step, draw.micro, 1))
        self.unreadable.update(draw.bad)
        batch = draw.batch.to(run.device, next(self.backbone.parameters()).dtype)
        features = recipe.features(run, batch)
        pairs = recipe.pairs(run, batch, features)
        losses = recipe.losses(run, batch, features, pairs)
        self.seen.append((batch, [p.detach() for p in pairs]))
        self.rows = pairs[0].key.detach() if pairs else _rows(features[0])
        return losses

    def take(self) -> tuple[Batch, list[Pairs]]:
        """What was seen since the last step; it is forgotten."""
        batch = join([b for b, _ in self.seen])
        pairs = join_pairs([p for _, p in self.seen])
        self.seen.clear()
        return batch, pairs

    def get_extra_state(self) -> Tensor:
        """What could not be read so far: a resumed run counts on."""
        return torch.tensor(sorted(self.unreadable), dtype=torch.long)

    def set_extra_state(self, state: Tensor) -> None:
        self.unreadable = set(state.tolist())


def _rows(features: Features) -> Tensor | None:
    """The vectors that must not all become one: of images; of slots, where there are such, for their mean may."""
    if features.masks is not None and features.tokens is not None:
        return features.tokens.flatten(0, 1)
    return features.pooled


class _Reader(Dataset[Draw | Refusal]):
    """Batches by task: decode and look at the rows of one. A refusal comes back as a value, for a data worker cannot
    raise one whole."""

    def __init__(self, data: Images, looks: Sequence[Look], seed: int, strict: bool) -> None:
        self.data, self.looks, self.seed, self.strict = data, looks, seed, strict

    def __getitem__(self, task: tuple[int, int, list[tuple[int, int]]]) -> Draw | Refusal:
        """``task``: step, part of the step, and (position in the whole batch, row) of each sample."""
        step, micro, positions = task
        try:
            bad: list[int] = []
            samples = [self._sample(row, bad) for _, row in positions]
            views = [
                self._views(sample, step, position)
                for (_, sample), (position, _) in zip(samples, positions, strict=True)
            ]
            return Draw(step, micro, collate(views, [s for _, s in samples], [row for row, _ in samples]), tuple(bad))
        except Refusal as error:
            return error

    def _views(self, sample: Sample, step: int, position: int) -> list[Any]:
        rng = torch.Generator().manual_seed(mix_seed(self.seed, step, position, 4))
        return [look(sample, rng) for look in self.looks]

    def _sample(self, row: int, bad: list[int]) -> tuple[int, Sample]:
        for other in range(row, row + min(TRIES, len(self.data))):
            other %= len(self.data)
            try:
                return other, self.data[other]
            except DataError:
                if self.strict:
                    raise
                bad.append(other)
        raise DataError(
            f"{len(set(bad))} images in a row cannot be read",
            cause="the last of them: see --strict",
            fix="restore the images; --strict names the first that cannot be read",
        )


class _Tasks:
    """The rows of each batch that this process takes, from a given one on: every world-th of a part of a step."""

    def __init__(self, run: Run, recipe: Recipe, data: Images, accumulate: int, first: int) -> None:
        self.run, self.recipe, self.data, self.accumulate, self.first = run, recipe, data, accumulate, first

    def __iter__(self) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        run = self.run
        part = run.batch_size // self.accumulate
        for epoch in range(self.first // self.accumulate // run.epoch_steps, run.epochs + 1):
            for batch, rows in enumerate(self._epoch(epoch)):
                step = epoch * run.epoch_steps + batch
                if step >= run.steps:
                    return
                for micro in range(self.accumulate):
                    if step * self.accumulate + micro >= self.first:
                        mine = range(micro * part + rank(), (micro + 1) * part, world_size())
                        yield step, micro, [(p, int(rows[p])) for p in mine]

    def _epoch(self, epoch: int) -> list[Tensor]:
        run = self.run
        batches = [b for _, b in zip(range(run.epoch_steps), self.recipe.batches(run, self.data, epoch), strict=False)]
        if len(batches) < run.epoch_steps or any(b.shape != (run.batch_size,) for b in batches):
            raise PluginError(
                f"{self.recipe.name} does not fill an epoch of {run.epoch_steps} batches of {run.batch_size}",
                cause=f"its batches stage gave {len(batches)}, of shapes {sorted({tuple(b.shape) for b in batches})}",
                fix="give len(data) // run.batch_size batches of run.batch_size rows",
            )
        return batches


def train(recipe: Recipe, backbone: Backbone, corpus: Corpus, plan: Plan, progress: Progress | None = None) -> Trained:
    """Train a recipe on images, or go on where an earlier run in ``plan.out`` was stopped.

    Writes ``state.pt``, ``metrics.jsonl``, ``metrics.png`` and at the end ``backbone.safetensors`` there. The backbone
    is trained in place. With one count of workers or another, killed and resumed or not, the same seed ends in the
    same bits on the same machine and number of processes. A signal to stop
    (:func:`evalsuite.signals.signals`) saves the state and exits with 128 and its number.

    Raises :class:`evalsuite.UsageError` and :class:`evalsuite.DataError` before any work,
    :class:`evalsuite.ResourceError` where another process trains in that folder, and
    :class:`evalsuite.TrainingError` when the loss is not finite: the last good state stays. Where one of several
    processes fails, all stop, with its exit code.
    """
    if plan.knn_every and not _watched(recipe, corpus):
        raise UsageError(
            "there is nothing to ask k-NN about",
            cause="the data have no labels",
            fix="leave out --knn-every, or put the images of a class into a folder of their own",
        )
    fabric = _fabric(plan)
    said = progress if progress is not None and fabric.is_global_zero else Progress(quiet=True)
    with together(fabric), killed_workers():
        alone = locked(plan.out / LOCK, said, _doing(plan.out), wait=False) if fabric.is_global_zero else nullcontext()
        with alone:
            return _train(recipe, backbone, corpus, plan, fabric, said)


def _doing(out: Path) -> str:
    return f"pretraining in {out}"


def _train(
    recipe: Recipe, backbone: Backbone, corpus: Corpus, plan: Plan, fabric: Fabric, progress: Progress
) -> Trained:
    with progress.doing(f"preparing {recipe.name}"):
        state = prepare(recipe, backbone, corpus, plan, fabric.device)
    _claim(plan, state.description, fabric, progress)
    journal = Journal(plan.out / METRICS if fabric.is_global_zero else None)
    optimizer = recipe.optimizer(state.run, state.objective)
    watch = _Watch(state, plan, corpus, journal, progress, optimizer)
    job = Fit(
        model=state.objective,
        optimizer=optimizer,
        lr_factor=watch.lr_factor,
        iterations=state.run.steps,
        seed=plan.seed,
        key=state.key,
        state=plan.out / STATE,
        what=recipe.name,
        clip_gradient=state.run.training.clip if plan.clip_gradient is None else plan.clip_gradient,
        clip_norm={"l2": 2.0, "max": math.inf}[state.run.training.clip_norm],
        saves=plan.save_every,
        log=journal,  # type: ignore[arg-type]  # a list in all but name
        logs=plan.log_every,
        accumulate=plan.accumulate,
        batches=lambda first: state.draws(plan, first),
        stepped=watch.stepped,
        resumed=lambda step: _resumed(step, plan, journal, progress),
        demand=_demand(state, plan),
        few=lambda images: state.few(images, plan),
        advice=f"lower the learning rate (--set {_owner(recipe)}.lr=...) or clip gradients (--clip-gradient 1)",
    )
    fit(job, fabric, progress)
    return _finish(state, plan, journal, fabric, progress)


def _resumed(step: int, plan: Plan, journal: Journal, progress: Progress) -> None:
    """Make the files beside the state fit it: those of a run that cannot be gone on from are set aside."""
    journal.rewrite(progress)
    if step == 0 and rank() == 0 and (plan.out / BACKBONE).exists():
        aside = set_aside(plan.out / BACKBONE)
        progress.say(f"warning: {plan.out / BACKBONE} is of a run whose state is not here; it is now {aside.name}")


def _demand(state: State, plan: Plan) -> Demand:
    """What the run asks of the machine; views are taken to be as large as the largest."""
    run, recipe = state.run, state.recipe
    side = run.training.size
    return Demand(
        what=f"training {run.backbone.spec.arch} by {recipe.name}",
        pixels=len(state.looks) * side**2, batch=run.batch_size, at_once=run.micro_size, steps=run.steps,
        groups=recipe.method.norm_groups, patient=plan.patient,
        less=("--batch-size {}",) if plan.accumulate == 1 else (), shorter=("--epochs {}", run.epochs),
        smaller=(f"--set {_owner(recipe)}.size={{}}", side),
    )  # fmt: skip


def _owner(recipe: Recipe) -> str:
    """The part whose numbers the recipe is trained by."""
    return list(recipe.parts)[1] if isinstance(recipe.method.options, Training) else "defaults"


@dataclass
class State:
    """A recipe that is ready to be trained."""

    recipe: Recipe
    run: Run
    data: Images
    looks: tuple[Look, ...]
    objective: Objective
    description: dict[str, Any]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def few(self, images: int, plan: Plan) -> Draw:
        """A batch of the first so many images. Raises what a data worker would not read."""
        reader = _Reader(self.data, self.looks, plan.seed, plan.strict)
        draw = reader[0, 0, [(row, row % len(self.data)) for row in range(images)]]
        if isinstance(draw, Refusal):
            raise draw
        return draw

    def draws(self, plan: Plan, first: int = 0) -> Iterator[Draw]:
        """This process's batches from the ``first``-th on. Raises what a data worker would not read."""
        workers = _workers(plan)
        loader = DataLoader(
            _Reader(self.data, self.looks, plan.seed, plan.strict),
            batch_size=None,
            sampler=_Tasks(self.run, self.recipe, self.data, plan.accumulate, first),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=self.run.device.type == "cuda" if plan.pin_memory is None else plan.pin_memory,
            worker_init_fn=ignore_signals,
        )
        for draw in loader:
            if isinstance(draw, Refusal):
                raise draw
            yield draw


def _fabric(plan: Plan) -> Fabric:
    kind = plan.device.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda") or plan.precision not in PRECISIONS:
        raise UsageError(
            f"no training on {plan.device!r} in {plan.precision!r}",
            cause="a loss scale (16-mixed) would not survive a resume; bfloat16 needs none",
            fix=f"--device auto, cpu, cuda or cuda:1; --precision {', '.join(PRECISIONS)}",
        )
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ResourceError("there is no CUDA device", cause="torch finds none", fix="--device cpu")
    number = plan.device.partition(":")[2]
    precision = ("bf16-mixed" if kind == "cuda" else "32-true") if plan.precision == "auto" else plan.precision
    device = torch.device(kind, int(number)) if number else torch.device(kind)
    return launched(device, plan.devices, nodes=plan.nodes, precision=precision, own_buffers=True)


def prepare(recipe: Recipe, backbone: Backbone, corpus: Corpus, plan: Plan, device: torch.device = CPU) -> State:
    """Make a recipe ready for its first step: data, looks, heads. Nothing is written but what parts keep in the run's
    cache.

    Raises :class:`evalsuite.UsageError` for numbers that do not go together and for a folder that holds another run.
    """
    start = backbone.identity
    run = _arrange(recipe, backbone.to(device), plan)
    data = run.data = recipe.dataset(run, corpus.train)
    run.epoch_steps = len(data) // plan.batch_size
    if not run.epoch_steps:
        raise UsageError(
            f"a batch of {plan.batch_size} is larger than the data set",
            cause=f"there are {len(data)} images",
            fix=f"--batch-size {max(1, len(data))} or less",
        )
    run.steps = run.epoch_steps * plan.epochs if plan.steps is None else plan.steps
    run.epochs = -(-run.steps // run.epoch_steps)
    looks = recipe.views(run)
    description = _describe(recipe, run, plan, looks, start)
    _refuse_another(plan, description)
    recipe.prepared(run, data)
    objective = Objective(run, recipe).to(device)
    if plan.channels_last or (plan.channels_last is None and device.type == "cuda"):
        objective = objective.to(memory_format=torch.channels_last)
    group_norms(objective, recipe.method.norm_groups, run.micro_size)
    return State(recipe, run, data, looks, objective, description)


def _arrange(recipe: Recipe, backbone: Backbone, plan: Plan) -> Run:
    world = world_size()
    least = min(plan.epochs, 1 if plan.steps is None else plan.steps)
    if plan.batch_size < 1 or plan.batch_size % (plan.accumulate * world) or least < 1:
        raise UsageError(
            f"a batch of {plan.batch_size} cannot be shared out over {world} processes and {plan.accumulate} parts",
            cause="each takes as many images as any other",
            fix=f"choose a multiple of {plan.accumulate * world}, and one epoch at least",
        )
    own = recipe.method.options
    return Run(
        backbone=backbone,
        seed=plan.seed,
        device=next(backbone.parameters()).device,
        out=plan.out,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        micro_size=plan.batch_size // plan.accumulate // world,
        workers=_workers(plan),
        width=recipe.method.width,
        training=own if isinstance(own, Training) else recipe.parts["defaults"].options,
    )


def _describe(recipe: Recipe, run: Run, plan: Plan, looks: Sequence[Look], start: str) -> dict[str, Any]:
    """All that moves the numbers of a run but the versions of packages and the number of processes."""
    assert run.data is not None
    options = {name: dataclasses.asdict(part.options) for name, part in recipe.parts.items()}
    return {
        "recipe": recipe.name,
        "options": json.loads(json.dumps(options, default=str)),
        "views": [_named(look) for look in looks],
        "data": run.data.fingerprint,
        "images": len(run.data),
        "backbone": run.backbone.spec.arch,
        "start": start,
        "seed": plan.seed,
        "epochs": plan.epochs,
        "steps": run.steps,
        "batch_size": plan.batch_size,
        "accumulate": plan.accumulate,
        "clip_gradient": plan.clip_gradient,
    }


def _named(look: Look) -> str:
    """A look's own words where it is a value; the repr of anything else changes from process to process."""
    return repr(look) if dataclasses.is_dataclass(look) else getattr(look, "__qualname__", type(look).__qualname__)


def _refuse_another(plan: Plan, description: Mapping[str, Any]) -> None:
    before = _noted(plan.out / NOTE) if plan.resume else None
    if before is None:
        return
    changed = [key for key in description if before.get(key) != description[key]]
    if changed:
        raise UsageError(
            f"{plan.out} holds another run",
            cause=f"not the same: {', '.join(changed)}",
            fix="choose another --out, repeat the earlier command to resume it, or --restart to replace it",
        )


def _noted(note: Path) -> dict[str, Any] | None:
    """What a run's file says of it; None where there is none, or none that is whole."""
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise ResourceError(
            f"{note} cannot be read",
            cause=f"the system says: {error.strerror}",
            fix="make it readable, or choose another --out",
        ) from error
    return content if isinstance(content, dict) else None


def _claim(plan: Plan, description: Mapping[str, Any], fabric: Fabric, progress: Progress) -> None:
    """Make the folder this run's own, once every process agrees that it may be."""
    fabric.barrier()
    if fabric.is_global_zero:
        note = plan.out / NOTE
        for name in (NOTE, STATE, METRICS, CURVES, BACKBONE):
            forget_partials(plan.out / name)
            if not plan.resume:
                (plan.out / name).unlink(missing_ok=True)
        if os.path.lexists(note) and _noted(note) is None:
            aside = set_aside(note).name
            progress.say(f"warning: {note} is not whole; it is set aside as {aside}, and the state says whose it is")
        write_text(note, json.dumps(description, indent=1))
    fabric.barrier()


def _watched(recipe: Recipe, corpus: Corpus) -> bool:
    """Whether anything can be measured on held-out images: k-NN needs labels, a method's own measures do not."""
    return corpus.probe is not None and (all(part.labelled for part in corpus.probe) or recipe.offers("measures"))


def _workers(plan: Plan) -> int:
    return min(8, ((os.cpu_count() or 1) - 1) // plan.devices) if plan.workers is None else plan.workers


class _Watch:
    """What is done besides the steps: stages that hear, the signs of collapse, k-NN, curves."""

    def __init__(
        self, state: State, plan: Plan, corpus: Corpus, journal: Journal, progress: Progress, optimizer: Optimizer
    ) -> None:
        self.state, self.plan, self.journal, self.progress = state, plan, journal, progress
        self.probe, self.optimizer = corpus.probe, optimizer
        self.alarmed = self.warned = False

    def lr_factor(self, step: int) -> float:
        self.state.run.step = step
        return self.state.recipe.rate(self.state.run)

    def stepped(self, info: StepInfo) -> dict[str, float]:
        state, run = self.state, self.state.run
        batch, pairs = state.objective.take()
        state.recipe.stepped(run, batch, pairs)
        numbers = self._numbers(info) if info.logged else {}
        if info.step == 1 and not info.logged and state.objective.rows is not None:
            self.journal.append({"step": 1, **health(state.objective.rows)})  # what a fall is measured against
        if info.step % run.epoch_steps == 0:
            state.recipe.epoch_ended(run)
            self._epoch(info.step)
        return numbers

    def _numbers(self, info: StepInfo) -> dict[str, float]:
        run, objective = self.state.run, self.state.objective
        steps = min(self.plan.log_every, info.step)
        numbers = {
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "images_s": steps * run.batch_size / max(info.passed, 1e-9),
            "wait": info.waited / max(info.passed, 1e-9),
        }
        if objective.rows is not None:
            numbers |= health(objective.rows)
        objective.unreadable = _of_all(objective.unreadable)
        reason = collapsed([*self.journal.data, numbers])
        if reason and not self.alarmed:
            self.progress.say(f"warning: step {info.step}: the features have collapsed: {reason}")
        self.alarmed = bool(reason)
        if objective.unreadable and not self.warned:
            self.warned = True
            self.progress.say("warning: some images cannot be read; the next ones stand in for them")
        return numbers

    def _epoch(self, step: int) -> None:
        run, plan = self.state.run, self.plan
        epoch = step // run.epoch_steps
        if not plan.knn_every or self.probe is None or (epoch % plan.knn_every and step != run.steps):
            return
        if rank() == 0:
            bank, queries = self.probe
            measured = self._measures(queries)
            if bank.labelled and queries.labelled:
                measured["knn"] = knn_accuracy(run.backbone, bank, queries, run.training.size, workers=run.workers)
            self.journal.append({"step": step, "epoch": epoch, **measured})
            shown = [f"{'k-NN accuracy' if name == 'knn' else name} {value:.3f}" for name, value in measured.items()]
            self.progress.say(f"epoch {epoch}: {', '.join(shown)}")
            plot(self.journal.data, plan.out / CURVES, self.state.recipe.name)

    @torch.no_grad()
    def _measures(self, held_out: Images) -> dict[str, float]:
        """What the parts say of held-out images; every module is left in the mode it was in."""
        objective = self.state.objective
        modes = {module: module.training for module in objective.modules()}
        objective.eval()
        try:
            return self.state.recipe.measures(self.state.run, held_out)
        finally:
            for module, training in modes.items():
                module.training = training


def _finish(state: State, plan: Plan, journal: Journal, fabric: Fabric, progress: Progress) -> Trained:
    run, path = state.run, plan.out / BACKBONE
    run.backbone.respec(image_size=(run.training.size, run.training.size))
    collapse = last_collapse(journal.data)
    unreadable = tuple(sorted(_of_all(state.objective.unreadable)))
    if fabric.is_global_zero:
        provenance = {
            "kind": "pretrained",
            **state.description,
            **plan.note,
            "data_fingerprint": state.data.fingerprint,
            "collapse": collapse,
            "unreadable": len(unreadable),
            "versions": versions(PACKAGES),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        run.backbone.save(path, provenance)
        plot(journal.data, plan.out / CURVES, state.recipe.name)
        if unreadable:
            progress.say(f"warning: {len(unreadable)} images could not be read and were skipped")
        progress.say(f"backbone {run.backbone.identity[:12]} in {path}")
    fabric.barrier()
    return Trained(run.backbone, path, list(journal), collapse, unreadable)


def _of_all(rows: set[int]) -> set[int]:
    """The rows that any process has."""
    if world_size() == 1:
        return rows
    gathered: list[set[int]] = [set()] * world_size()
    dist.all_gather_object(gathered, rows)
    return set().union(*gathered)
