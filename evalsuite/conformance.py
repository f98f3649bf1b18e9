"""``evalsuite plugins check``: everything a plugin registers is held to what its kind owes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from evalsuite.errors import PluginError, Refusal, UsageError
from evalsuite.hooks import Entry, Loaded, Plugin, Registry, unknown

__all__ = ["Finding", "check_plugin", "refuse_faults"]


@dataclass(frozen=True)
class Finding:
    """What checking one thing found: its faults, a line each, and what there is to say besides."""

    subject: str
    faults: tuple[str, ...]
    note: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        told = f" ({self.note})" if self.note else ""
        if not self.faults:
            return f"ok     {self.subject}{told}, {self.seconds:.1f} s"
        return "\n".join(f"fault  {self.subject}: {fault}" for fault in self.faults)


def check_plugin(name: str, loaded: Loaded) -> Iterator[Finding]:
    """Check a plugin, named as in ``evalsuite plugins list`` or by its module: its import, then all it registers.

    A task runs on its demo world by its smoke protocol or else its first; a method trains for some steps; a modifier
    does on a small SimCLR. Raises :class:`UsageError` for a plugin that is not there.
    """
    registry = loaded.registry
    broken = [fault for fault in loaded.faults if name in (fault.plugin.name, fault.plugin.module)]
    plugin = next((p for p in loaded.plugins if name in (p.name, p.module)), None)
    plugin = plugin or next((fault.plugin for fault in broken), None)
    if plugin is None:
        raise unknown("plugin", name, [p.name for p in loaded.plugins])
    yield _import(plugin)
    if broken:
        yield Finding(f"plugin {plugin.name}", tuple(fault.reason for fault in broken))
    mine = [entry for entry in registry.entries() if entry.owner == plugin.name]
    if plugin in loaded.plugins and not mine:
        yield Finding(f"plugin {plugin.name}", ("it registers nothing",))
    for entry in mine:
        if len([e for e in registry.entries(entry.shelf) if e.name == entry.name]) == 1:  # else told above as broken
            yield _entry(entry, registry)


def refuse_faults(name: str, findings: list[Finding]) -> None:
    """Raise :class:`PluginError` if anything was found."""
    count = sum(len(finding.faults) for finding in findings)
    if count:
        raise PluginError(
            f"plugin {name!r} has {count} fault{'s' * (count > 1)}",
            cause="they are listed above",
            fix="mend them; docs/plugins.md says what each kind of plugin owes",
        )


def _import(plugin: Plugin) -> Finding:
    from evalsuite.testing import check_import

    told: dict[str, Any] = {}
    finding = _finding(f"import {plugin.module}", lambda: told.update(check_import(plugin.module)))
    if not told:
        return finding
    loads = ", loads torch" if told["torch"] else ""
    return Finding(finding.subject, (), f"{told['own']:.2f} s of its own{loads}", finding.seconds)


def _entry(entry: Entry, registry: Registry) -> Finding:
    subject = f"{entry.shelf} {entry.name}"
    try:
        target = registry.get(entry.shelf, entry.name)
    except Refusal as refusal:
        return Finding(subject, (f"{refusal.problem}: {refusal.cause}",))
    note, check = CHECKS[entry.shelf](entry, target, registry)
    found = _finding(subject, check)
    note = found.note or note
    if getattr(target, "name", entry.name) != entry.name:
        fault = f"it is registered as {entry.name!r}, and its own name is {target.name!r}"
        found = Finding(subject, (fault, *found.faults), note, found.seconds)
    return Finding(subject, found.faults, note, found.seconds)


def _finding(subject: str, check: Callable[[], object]) -> Finding:
    began = time.monotonic()
    faults: tuple[str, ...] = ()
    try:
        check()
    except NotFitting as refusal:
        return Finding(subject, (), f"not run: {refusal}", time.monotonic() - began)
    except AssertionError as error:
        faults = tuple(str(error).splitlines()) or ("an assertion without a word failed",)
    except Refusal as refusal:
        faults = (f"{refusal.problem}: {refusal.cause}",)
    except Exception as error:  # a plugin may raise anything
        faults = (f"its check ends in {type(error).__name__}: {' '.join(str(error).split())}",)
    return Finding(subject, faults, "", time.monotonic() - began)


Check = tuple[str, Callable[[], object]]


class NotFitting(Exception):
    """With the options it is tried by, a part cannot be trained on the tiny world: that is no fault of it."""


def _fitting(check: Callable[[], None]) -> None:
    try:
        check()
    except UsageError as refusal:
        raise NotFitting(f"{refusal.problem}; say in its class which small options fit") from None


def _task(entry: Entry, target: Any, registry: Registry) -> Check:
    from evalsuite import testing
    from evalsuite.task import Task
    from evalsuite.testing import cheapest, runnable

    if not (isinstance(target, type) and issubclass(target, Task)):
        return "", lambda: _refuse_kind(target, "a subclass of Task")
    task = target()
    recipe = cheapest(task)
    run = runnable(task, recipe)
    note = f"by {recipe}" if run else "not run: no backbone of the kit gives what it needs"
    return note, lambda: testing.check_task(target, protocol=recipe, registry=registry, run=run)


def _backbone(entry: Entry, target: Any, registry: Registry) -> Check:
    from evalsuite.testing import check_backbone

    named = [p for p in inspect.signature(target).parameters.values() if p.default is p.empty]
    if any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in named):
        return "not built: its first name has no default", lambda: None
    return "by its default name", lambda: check_backbone(target, registry=registry)


def _engine(entry: Entry, target: Any, registry: Registry) -> Check:
    from evalsuite.testing import check_engine

    return "", lambda: check_engine(target, registry=registry)


def _dataset(entry: Entry, target: Any, registry: Registry) -> Check:
    from evalsuite.testing import check_dataset

    return "", lambda: check_dataset(target)


def _checkpoint(entry: Entry, target: Any, registry: Registry) -> Check:
    from evalsuite.testing import check_checkpoint

    return "on files of others", lambda: check_checkpoint(target, registry=registry)


def _method(entry: Entry, target: Any, registry: Registry) -> Check:
    from pretrain import Method
    from pretrain.testing import check_method, small_backbone, small_corpus, small_options

    if not (isinstance(target, type) and issubclass(target, Method)):
        return "", lambda: _refuse_kind(target, "a subclass of Method")
    check = partial(
        check_method, backbone=partial(small_backbone, target, registry), corpus=partial(small_corpus, target)
    )
    return "", lambda: _fitting(lambda: check(lambda: target(small_options(target))))


def _modifier(entry: Entry, target: Any, registry: Registry) -> Check:
    from pretrain import Modifier
    from pretrain.testing import check_modifier, small_options, tiny_method

    if not (isinstance(target, type) and issubclass(target, Modifier)):
        return "", lambda: _refuse_kind(target, "a subclass of Modifier")
    note = "with simclr" if target.off is not None else "with simclr; it names no options that turn it off"
    return note, lambda: _fitting(lambda: check_modifier(lambda: target(small_options(target)), tiny_method))


def _refuse_kind(target: Any, wanted: str) -> None:
    raise AssertionError(f"its target is {target!r}, not {wanted}")


CHECKS: dict[str, Callable[[Entry, Any, Registry], Check]] = {
    "task": _task, "method": _method, "modifier": _modifier, "backbone": _backbone, "engine": _engine,
    "dataset": _dataset, "checkpoint": _checkpoint,
}  # fmt: skip
