"""How names become objects: the suite's one hook, the loader that isolates plugins, and the Registry."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import pluggy

from evalsuite.errors import PluginError, Refusal, ResourceError, UsageError

__all__ = [
    "EXTRAS",
    "SHELVES",
    "Entry",
    "Fault",
    "Loaded",
    "Plugin",
    "Registry",
    "Suite",
    "hookimpl",
    "hookspec",
    "load",
    "unknown",
]

NAME = "evalsuite"
PROGRAM = "this program"  # who owns what is bound outside a plugin
PATIENCE = 120.0  # seconds that importing a plugin may take; EVALSUITE_PLUGIN_TIMEOUT has another number, 0 for no end
GRACE = 5.0  # seconds more for one that does not let itself be interrupted, before the process ends
# a module that is not always there -> the extra that brings it
EXTRAS = {
    "mmseg": "mmseg", "mmengine": "mmseg", "mmcv": "mmseg", "gymnasium": "rl", "pygame": "rl",
    "stable_baselines3": "rl",
    "mujoco": "robotics", "metaworld": "robotics", "av": "video", "pydicom": "medical", "transformers": "text",
    "ray": "ray",
}  # fmt: skip
SHELVES = ("task", "method", "modifier", "backbone", "engine", "dataset", "checkpoint")

hookspec = pluggy.HookspecMarker(NAME)
hookimpl = pluggy.HookimplMarker(NAME)


class Suite:
    """The hooks of the suite. There is one."""

    @hookspec
    def evalsuite_register(self, registry: Registry) -> None:
        """Called once after loading: bind names to ``"module:attr"`` targets on the registry's shelves."""


class Entry(NamedTuple):
    """One name on one shelf."""

    shelf: str
    name: str
    target: str
    owner: str
    summary: str


class Registry:
    """Shelves of names, each bound to a ``"module:attr"`` string that is imported only when it is requested.

    >>> registry = Registry()
    >>> registry.task("counting", "evalsuite_counting:Counting")
    >>> registry.names("task")
    ['counting']
    """

    def __init__(self) -> None:
        self.owner = PROGRAM
        self._entries: dict[tuple[str, str], list[Entry]] = {}

    def task(self, name: str, target: str, summary: str = "") -> None:
        """An evaluator: a :class:`evalsuite.Task`."""
        self._bind("task", name, target, summary)

    def method(self, name: str, target: str, summary: str = "") -> None:
        """A way to pretrain: a ``pretrain.Method``."""
        self._bind("method", name, target, summary)

    def modifier(self, name: str, target: str, summary: str = "") -> None:
        """A change to any method that offers what it touches: a ``pretrain.Modifier``."""
        self._bind("modifier", name, target, summary)

    def backbone(self, name: str, target: str, summary: str = "") -> None:
        """A builder ``(name, **options) -> Backbone`` for specs of the form ``scheme:name``."""
        self._bind("backbone", name, target, summary)

    def engine(self, name: str, target: str, summary: str = "") -> None:
        """Who trains a dense head: see :mod:`evalsuite.engines`."""
        self._bind("engine", name, target, summary)

    def dataset(self, name: str, target: str, summary: str = "") -> None:
        """A :class:`evalsuite.data.Source`: a data set's layout, how to find and to verify it."""
        self._bind("dataset", name, target, summary)

    def checkpoint(self, name: str, target: str, summary: str = "") -> None:
        """A :class:`evalsuite.checkpoints.Layout`: how a family of foreign files names its tensors."""
        self._bind("checkpoint", name, target, summary)

    def entries(self, shelf: str | None = None) -> list[Entry]:
        """Everything registered, on one shelf or on all, by shelf and name."""
        if shelf is not None:
            self._check_shelf(shelf)
        chosen = (e for claims in self._entries.values() for e in claims if shelf in (None, e.shelf))
        return sorted(chosen, key=lambda e: (SHELVES.index(e.shelf), e.name, e.owner))

    def names(self, shelf: str) -> list[str]:
        """The names on a shelf, sorted, each once."""
        return sorted({e.name for e in self.entries(shelf)})

    def entry(self, shelf: str, name: str) -> Entry:
        """The entry of that name; refuses an unknown name, and one that two plugins claim."""
        self._check_shelf(shelf)
        claims = self._entries.get((shelf, name), [])
        if not claims:
            raise unknown(shelf, name, self.names(shelf))
        if len(claims) > 1:
            raise _clash(claims)
        return claims[0]

    def get(self, shelf: str, name: str) -> Any:
        """Import and return what ``name`` is bound to.

        Raises :class:`UsageError` for an unknown name and :class:`PluginError` for a name claimed twice or a
        target that cannot be imported.
        """
        entry = self.entry(shelf, name)
        module, _, attribute = entry.target.partition(":")
        try:
            with nullcontext() if module in sys.modules else _watched(entry.owner, module):
                target: Any = importlib.import_module(module)
                for part in attribute.split("."):
                    target = getattr(target, part)
        except Refusal:
            raise
        except (Exception, SystemExit, _Exited) as error:  # a plugin's module may raise anything
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and (extra := EXTRAS.get(missing.partition(".")[0])):
                raise ResourceError(
                    f"{shelf} {name!r} needs {missing}, which is not installed",
                    cause=f"it comes with the extra {extra!r}",
                    fix=f"pip install 'evalsuite[{extra}]'",
                ) from error
            raise PluginError(
                f"{shelf} {name!r} cannot be imported",
                cause=f"{entry.owner} binds it to {entry.target!r}: {_reason(error)}",
                fix=f"pip install what provides {missing!r}" if missing else f"mend or leave out: -p no:{entry.owner}",
            ) from error
        return target

    def clashes(self) -> list[list[Entry]]:
        """Names claimed by more than one plugin."""
        return [claims for claims in self._entries.values() if len(claims) > 1]

    def _bind(self, shelf: str, name: str, target: str, summary: str) -> None:
        module, colon, attribute = target.partition(":")
        if not (name and module and colon and attribute):
            raise ValueError(f"{shelf} {name!r} needs a target of the form 'module:attr', not {target!r}")
        self._entries.setdefault((shelf, name), []).append(Entry(shelf, name, target, self.owner, summary))

    def _drop(self, owner: str) -> None:
        for key, claims in list(self._entries.items()):
            kept = [e for e in claims if e.owner != owner]
            if kept:
                self._entries[key] = kept
            else:
                del self._entries[key]

    def _check_shelf(self, shelf: str) -> None:
        if shelf not in SHELVES:
            raise unknown("shelf", shelf, SHELVES)


def unknown(kind: str, name: str, known: Iterable[str], owner: str = "") -> UsageError:
    """The refusal of a name that nobody registered, or that ``owner`` does not have, with the nearest known one."""
    names = list(known) if owner else sorted(known)  # an owner's in the order in which it declares them
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = f"see: evalsuite list {kind if kind in SHELVES else ''}".rstrip()
    other = f"choose one of them, or leave the {kind} out" if owner else listed
    return UsageError(
        f"{owner} has no {kind} {name!r}" if owner else f"no {kind} named {name!r}",
        cause=f"known: {', '.join(names) or 'none'}",
        fix=f"did you mean {near[0]!r}?" if near else other,
    )


def _clash(claims: list[Entry]) -> PluginError:
    owners = " and ".join(f"{e.owner} ({e.target})" for e in claims)
    return PluginError(
        f"{claims[0].shelf} {claims[0].name!r} is offered twice",
        cause=f"by {owners}",
        fix=f"leave one out: -p no:{claims[-1].owner}",
    )


@dataclass(frozen=True)
class Plugin:
    """A discovered plugin: its entry-point (or module) name and the distribution that brings it."""

    name: str
    distribution: str
    version: str
    module: str

    @property
    def ours(self) -> bool:
        return self.distribution == NAME


@dataclass(frozen=True)
class Fault:
    """A plugin that could not be used, and why."""

    plugin: Plugin
    reason: str

    def __str__(self) -> str:
        where = f" ({self.plugin.distribution} {self.plugin.version})" if self.plugin.distribution else ""
        return f"plugin {self.plugin.name!r}{where} is broken and was left out: {self.reason}"


@dataclass(frozen=True)
class Loaded:
    """What loading gave: the registry, the plugins in use, the blocked ones and the faults."""

    registry: Registry
    plugins: list[Plugin]
    blocked: list[Plugin]
    faults: list[Fault] = field(default_factory=list)


def load(requests: Iterable[str] = (), environ: dict[str, str] | None = None) -> Loaded:
    """Load every plugin, each on its own, and let it register.

    ``requests`` are the values of ``-p``: a name or a module to load besides, ``no:name`` to leave out.
    ``EVALSUITE_PLUGINS=a,b`` is an allow-list over other people's plugins (empty: none); what the suite
    itself brings stays unless it is blocked by name. A plugin that raises, exits or carries a wrong hook is
    a :class:`Fault`, never a crash.

    What a plugin prints meanwhile goes to standard error. Raises :class:`UsageError` for a name to leave out that
    nobody has, and :class:`PluginError` for a plugin that takes longer than ``EVALSUITE_PLUGIN_TIMEOUT`` seconds (120).
    """
    _patience()  # refused before a plugin is blamed for it
    block, wanted = _requests(requests)
    allowed = _allowed(os.environ if environ is None else environ)
    manager = pluggy.PluginManager(NAME)
    manager.add_hookspecs(Suite)
    loaded = Loaded(Registry(), [], [])
    known = set()
    distributions = set()
    for plugin, point in _installed():
        known.add(plugin.name)
        distributions.add(plugin.distribution)
        refused = plugin.name in block or plugin.distribution in block
        listed = plugin.ours or allowed is None or plugin.name in allowed or plugin.name in wanted
        if refused or not listed:
            loaded.blocked.append(plugin)
        else:
            _admit(manager, loaded, plugin, point.load)
    for name in wanted:
        module = Plugin(name, "", "", name)
        if name not in known and name in block:
            loaded.blocked.append(module)
        elif name not in known:
            _admit(manager, loaded, module, lambda name=name: importlib.import_module(name))  # type: ignore[misc]
    for name in sorted(block - known - distributions - set(wanted)):
        raise unknown("plugin", name, known)  # a misspelt no:NAME would leave in what was to be left out
    for claims in loaded.registry.clashes():
        late = next((p for p in loaded.plugins if p.name == claims[-1].owner), None)
        if late is not None:
            loaded.faults.append(Fault(late, f"{_clash(claims).problem} {_clash(claims).cause}"))
    return loaded


def _requests(requests: Iterable[str]) -> tuple[set[str], list[str]]:
    given = [r.strip() for r in requests]
    wanted = [r for r in given if r and not r.startswith("no:")]
    return {r[3:] for r in given if r.startswith("no:")}, list(dict.fromkeys(wanted))


def _allowed(environ: Any) -> set[str] | None:
    listed = environ.get("EVALSUITE_PLUGINS")
    return None if listed is None else {name.strip() for name in listed.split(",") if name.strip()}


def _installed() -> Iterator[tuple[Plugin, EntryPoint]]:
    seen = set()
    for point in sorted(entry_points(group=NAME), key=lambda p: (p.name, p.value)):
        distribution = point.dist.name if point.dist else ""
        if (point.name, point.value, distribution) in seen:  # an editable install may be listed twice
            continue
        seen.add((point.name, point.value, distribution))
        yield Plugin(point.name, distribution, point.dist.version if point.dist else "", point.value), point


def _admit(manager: pluggy.PluginManager, loaded: Loaded, plugin: Plugin, find: Callable[[], ModuleType]) -> None:
    """Load one plugin and let it register; on any failure nothing of it stays registered."""
    registry = loaded.registry
    if any(p.name == plugin.name for p in loaded.plugins):
        loaded.faults.append(Fault(plugin, "another distribution brings a plugin of that name"))
        return
    registry.owner = plugin.name
    try:
        with _watched(plugin.name, plugin.module):
            module = find()
            manager.register(module, plugin.name)
            manager.check_pending()
            if not manager.get_hookcallers(module):
                raise TypeError("it has no hook: mark evalsuite_register with @evalsuite.hookimpl")
            others = [p for p in manager.get_plugins() if p is not module]
            manager.subset_hook_caller("evalsuite_register", others)(registry=registry)
    except (KeyboardInterrupt, _Hang):
        raise
    except BaseException as error:  # a plugin may raise anything, SystemExit among it
        if manager.has_plugin(plugin.name):
            manager.unregister(name=plugin.name)
        registry._drop(plugin.name)
        loaded.faults.append(Fault(plugin, _reason(error)))
    else:
        loaded.plugins.append(plugin)
    finally:
        registry.owner = PROGRAM


class _Exited(BaseException):
    """A plugin's module calls ``os._exit``, which would end the process with a code of the plugin's."""

    def __init__(self, status: int) -> None:
        super().__init__(f"it calls os._exit({status})")


class _Hang(PluginError):
    """A plugin that does not finish loading: unlike other faults it is not left out, for nobody knows what it holds."""


class _TooLong(BaseException):
    """A plugin's module is still running at the end of its time."""

    def __init__(self, plugin: str, module: str, seconds: float) -> None:
        super().__init__(plugin, module, seconds)
        self.plugin, self.module, self.seconds = plugin, module, seconds

    def refusal(self) -> _Hang:
        return _Hang(
            f"plugin {self.plugin!r} does not finish loading",
            cause=f"its module {self.module} has been running for {self.seconds:g} s",
            fix=f"leave it out: -p no:{self.plugin}, or give it longer: EVALSUITE_PLUGIN_TIMEOUT=600",
        )


_watching = threading.local()


@contextmanager
def _watched(plugin: str, module: str) -> Iterator[None]:
    """A plugin's code runs: it prints to standard error, cannot end the process, and has so many seconds.

    At the end of them the main thread is interrupted by a signal, which raises in the plugin; where that does not help
    (another thread, an exception swallowed), the process ends a little later with the same words.
    """
    if getattr(_watching, "on", False):  # a plugin's import that requests another's target
        yield
        return
    late = _TooLong(plugin, module, _patience())
    _watching.on = True
    try:
        with _ended(late), redirect_stdout(sys.stderr), _no_exit(), _interrupted(late):
            yield
    except _TooLong:
        raise late.refusal() from None
    finally:
        _watching.on = False


def _patience() -> float:
    text = os.environ.get("EVALSUITE_PLUGIN_TIMEOUT", "").strip() or PATIENCE
    try:
        seconds = float(text)
        if not 0 <= seconds < threading.TIMEOUT_MAX - GRACE:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"EVALSUITE_PLUGIN_TIMEOUT={text} is no time",
            cause="it is a number of seconds, or 0 for no end",
            fix=f"EVALSUITE_PLUGIN_TIMEOUT={PATIENCE:g}, or leave it out",
        ) from None
    return seconds


@contextmanager
def _no_exit() -> Iterator[None]:
    """``os._exit`` raises in this process and this thread; in forked children it is what it was."""
    real, pid, thread = os._exit, os.getpid(), threading.get_ident()
    open_still = [True]

    def refuse(status: int) -> None:
        if open_still and os.getpid() == pid and threading.get_ident() == thread:
            raise _Exited(status)
        real(status)

    os._exit = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = real
        open_still.clear()  # for modules that keep the name


@contextmanager
def _interrupted(late: _TooLong) -> Iterator[None]:
    if not late.seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise late

    handler = signal.signal(signal.SIGALRM, interrupt)
    left, interval = signal.setitimer(signal.ITIMER_REAL, late.seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody's own alarm goes on
            signal.setitimer(signal.ITIMER_REAL, left, interval)


@contextmanager
def _ended(late: _TooLong) -> Iterator[None]:
    over, real = threading.Event(), os._exit

    def end() -> None:
        if not over.wait(late.seconds + GRACE):
            print(late.refusal(), file=sys.stderr, flush=True)
            real(PluginError.code)

    if late.seconds:
        threading.Thread(target=end, name="plugin watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _reason(error: BaseException) -> str:
    if isinstance(error, _Exited):
        return str(error)
    if isinstance(error, SystemExit):
        return f"it calls sys.exit({error.code!r})"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines) or 'no message'}"
