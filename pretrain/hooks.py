"""The stages of a training run, and the Recipe that composes plugins over them and refuses what cannot work."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import pluggy
from torch import Tensor, nn
from torch.optim import Optimizer

from evalsuite import Features, PluginError, UsageError
from evalsuite.seeding import manual_seed
from evalsuite.training import mix_seed
from pretrain.batch import Batch, Look, Pairs
from pretrain.data import Images
from pretrain.plugin import Method, Modifier, Plugin, Run

__all__ = ["Recipe", "Stages"]

NAME = "evalsuite"  # one marker, evalsuite.hookimpl, serves the suite and the stages
hookspec = pluggy.HookspecMarker(NAME)


class Stages:
    """The hooks of one training run, in the order in which they are called.

    A noun returns that noun: the method's own answer, else the default one; modifiers wrap it. ``losses`` are
    collected and summed. A past participle only hears. Every argument may be left out.
    """

    @hookspec(firstresult=True)
    def dataset(self, run: Run, data: Images) -> Images:
        """What to learn from; default: ``data``, which the user named."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def views(self, run: Run) -> tuple[Look, ...]:
        """How to look at a sample: one view for each look. An :class:`Augment` is a look."""
        raise NotImplementedError

    @hookspec
    def prepared(self, run: Run, data: Images) -> None:
        """Build what depends on the backbone, on ``run.width`` or on the final data set."""

    @hookspec(firstresult=True)
    def optimizer(self, run: Run, modules: nn.Module) -> Optimizer:
        """The optimiser of everything that is trained, at its highest learning rate."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def rate(self, run: Run) -> float:
        """The factor on every learning rate at ``run.step``; a parameter group with ``constant`` set keeps its own."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def batches(self, run: Run, data: Images, epoch: int) -> Iterable[Tensor]:
        """Which rows go together: the batches (batch_size,) of one epoch, of all processes together."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def features(self, run: Run, batch: Batch) -> list[Features]:
        """One :class:`Features` a view; default: the backbone on all views of a size at once."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def pairs(self, run: Run, batch: Batch, features: list[Features]) -> list[Pairs]:
        """What belongs together. It has no default: only methods that learn from positives offer it."""
        raise NotImplementedError

    @hookspec
    def losses(self, run: Run, batch: Batch, features: list[Features], pairs: list[Pairs]) -> dict[str, Tensor]:
        """Named terms of the loss, added up over all plugins; one name twice is refused."""
        raise NotImplementedError

    @hookspec
    def stepped(self, run: Run, batch: Batch, pairs: list[Pairs]) -> None:
        """The optimiser has made a step on ``batch``: move what follows (twins, queues, banks). Pairs are detached.
        Where gradients were accumulated, these are all batches of the step together."""

    @hookspec
    def epoch_ended(self, run: Run) -> None:
        """The last step of ``run.epoch`` is made."""

    @hookspec
    def measures(self, run: Run, data: Images) -> dict[str, float]:
        """Numbers to watch, of held-out images (:func:`pretrain.look_through` reads them): whenever k-NN is evaluated,
        by one process alone, in evaluation mode and without gradients. They are logged, and nothing is learned from
        them; those of all plugins are put together, and one name twice is refused."""
        raise NotImplementedError


STAGES = tuple(name for name in vars(Stages) if not name.startswith("_"))
OWED = ("dataset", "views", "optimizer", "rate", "batches", "features", "losses")


class Recipe:
    """Defaults, one method and its modifiers, in that order: the last one registered is the outermost wrapper.

    ``Recipe(method, a, b)`` answers ``pairs`` with ``b(a(method))``. Raises :class:`PluginError` for a plugin that
    is wrong in itself and :class:`UsageError` for parts that do not go together, before any work is done.
    """

    def __init__(self, method: Method, *modifiers: Modifier, names: Sequence[str] = ()) -> None:
        from pretrain.defaults import Defaults

        self.method, self.modifiers = method, modifiers
        given = list(names) or [type(p).__name__.lower() for p in (method, *modifiers)]
        self.parts: dict[str, Plugin] = {"defaults": Defaults()}
        for name, plugin in zip(given, (method, *modifiers), strict=True):
            if name in self.parts:
                raise UsageError(
                    f"{name!r} is in the recipe twice", cause="each part is taken once", fix="name it once"
                )
            self.parts[name] = plugin
        self._manager = pluggy.PluginManager(NAME)
        self._manager.add_hookspecs(Stages)
        for name, plugin in self.parts.items():
            _check(plugin)
            self._register(name, plugin)
        for stage in STAGES:
            self._offered(stage)

    def _register(self, name: str, plugin: Plugin) -> None:
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(
                f"{type(plugin).__name__} cannot be part of a recipe",
                cause=" ".join(str(error).split()),
                fix=f"the stages are {', '.join(STAGES)}",
            ) from error

    def _offered(self, stage: str) -> None:
        """Refuse a stage that is wrapped or needed, and that nobody offers."""
        implementations = getattr(self._manager.hook, stage).get_hookimpls()
        if any(not (i.wrapper or i.hookwrapper) for i in implementations):
            return
        method = type(self.method).__name__
        if implementations:
            raise UsageError(
                f"{type(implementations[0].plugin).__name__} wraps {stage!r}, which {method} does not offer",
                cause=f"{method} offers {', '.join(self._own(self.method))}",
                fix="take another method, or leave the modifier out",
            )
        if stage in OWED:
            raise PluginError(
                f"nothing gives {stage!r}",
                cause=f"{method} does not offer it and there is no default",
                fix=f"give {method} a method {stage} marked @hookimpl",
            )

    def _own(self, plugin: Plugin) -> list[str]:
        return [s for s in STAGES if any(i.plugin is plugin for i in getattr(self._manager.hook, s).get_hookimpls())]

    @property
    def name(self) -> str:
        """The method and its modifiers: ``simclr+hallucinator``."""
        return "+".join(list(self.parts)[1:])

    def offers(self, stage: str) -> bool:
        """Whether somebody offers a stage."""
        return bool(getattr(self._manager.hook, stage).get_hookimpls())

    def dataset(self, run: Run, data: Images) -> Images:
        return cast(Images, self._manager.hook.dataset(run=run, data=data))

    def views(self, run: Run) -> tuple[Look, ...]:
        return tuple(self._manager.hook.views(run=run))

    def prepared(self, run: Run, data: Images) -> None:
        """Prepare the parts one by one, in order, each from a random state of its own: a modifier that draws
        numbers does not move those of its method."""
        plugins = list(self.parts.values())
        for name, plugin in self.parts.items():
            manual_seed(mix_seed(run.seed, zlib.crc32(name.encode())))
            others = [p for p in plugins if p is not plugin]
            self._manager.subset_hook_caller("prepared", others)(run=run, data=data)

    def optimizer(self, run: Run, modules: nn.Module) -> Optimizer:
        return cast(Optimizer, self._manager.hook.optimizer(run=run, modules=modules))

    def rate(self, run: Run) -> float:
        return float(self._manager.hook.rate(run=run))

    def batches(self, run: Run, data: Images, epoch: int) -> Iterator[Tensor]:
        return iter(self._manager.hook.batches(run=run, data=data, epoch=epoch))

    def features(self, run: Run, batch: Batch) -> list[Features]:
        return list(self._manager.hook.features(run=run, batch=batch))

    def pairs(self, run: Run, batch: Batch, features: list[Features]) -> list[Pairs]:
        """Empty where the method learns from no positives."""
        if not self._manager.hook.pairs.get_hookimpls():
            return []
        return list(self._manager.hook.pairs(run=run, batch=batch, features=features))

    def losses(self, run: Run, batch: Batch, features: list[Features], pairs: list[Pairs]) -> dict[str, Tensor]:
        """All terms. Raises :class:`PluginError` where two parts use one name."""
        terms = self._manager.hook.losses(run=run, batch=batch, features=features, pairs=pairs)
        return self._merged("losses", terms)

    def _merged(self, what: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for part in reversed(parts):  # pluggy asks the last registered first
            for name, value in part.items():
                if name in merged:
                    raise PluginError(
                        f"two {what} of {self.name} are called {name!r}",
                        cause="one would hide the other",
                        fix="give each its own name",
                    )
                merged[name] = value
        return merged

    def stepped(self, run: Run, batch: Batch, pairs: list[Pairs]) -> None:
        self._manager.hook.stepped(run=run, batch=batch, pairs=pairs)

    def epoch_ended(self, run: Run) -> None:
        self._manager.hook.epoch_ended(run=run)

    def measures(self, run: Run, data: Images) -> dict[str, float]:
        """All numbers. Raises :class:`PluginError` where two parts use one name."""
        parts = self._manager.hook.measures(run=run, data=data)
        return {name: float(value) for name, value in self._merged("measures", parts).items()}


def _check(plugin: Plugin) -> None:
    """Refuse what pluggy takes in silence: a stage without its mark, and an argument it would never pass."""
    kind = type(plugin)
    for stage in STAGES:
        function = getattr(kind, stage, None)
        if function is None:
            continue
        if not callable(function) or getattr(function, f"{NAME}_impl", None) is None:
            raise PluginError(
                f"{kind.__name__}.{stage} is named like a stage but is not marked @hookimpl",
                cause="it would never be called",
                fix="mark it with @evalsuite.hookimpl, or give it another name",
            )
        _check_arguments(kind.__name__, stage, function)


def _check_arguments(owner: str, stage: str, function: Any) -> None:
    known = list(inspect.signature(getattr(Stages, stage)).parameters)
    for index, argument in enumerate(inspect.signature(function).parameters.values()):
        if argument.default is not argument.empty or argument.kind is argument.KEYWORD_ONLY:
            raise PluginError(
                f"{owner}.{stage} has a default for {argument.name!r}"
                if argument.default is not argument.empty
                else f"{owner}.{stage} takes {argument.name!r} by keyword only",
                cause="such an argument of a stage is never passed",
                fix=f"write it as a plain argument: def {stage}(self, {argument.name})",
            )
        if index and argument.name not in known:
            raise PluginError(
                f"{owner}.{stage} asks for {argument.name!r}",
                cause=f"a stage {stage} may ask for {', '.join(known[1:])}",
                fix="leave it out, or take one of these",
            )
