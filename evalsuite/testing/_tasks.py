"""What a task owes to those who trust its scores."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from evalsuite.backbone import KINDS, Backbone
from evalsuite.errors import DataError, UsageError
from evalsuite.hooks import Registry, load
from evalsuite.progress import Progress
from evalsuite.runner import demo_root
from evalsuite.task import Outcome, Protocol, Setup, Task, evaluate
from evalsuite.testing._faults import Faults, offline, plain
from evalsuite.testing._worlds import GIVES, OracleBackbone, RandomBackbone

__all__ = ["cheapest", "check_task", "runnable"]

NAMED = GIVES | {"joint", "stages"} | KINDS  # what a backbone can give or take
MARGIN = 1e-6  # by how much an oracle must be better than the blind


def check_task(
    make: Callable[[], Task],
    *,
    protocol: str | None = None,
    settings: Mapping[str, str] | None = None,
    data: str | None = None,
    data_root: Path | None = None,
    limit: int | None = None,
    oracle: Callable[[], Backbone] | None = None,
    registry: Registry | None = None,
    run: bool = True,
) -> None:
    """Check what every task owes.

    What it says of itself holds together; data that are not there are refused as such; a run returns the metrics it
    promises, within their bounds and as plain JSON values, and the same again; it needs no more of a backbone than it
    says, changes nothing of it and fetches nothing; and a backbone that sees is better than one that does not.

    It runs by ``protocol`` with ``settings``, as ``--set`` has them, on ``data`` or ``data_root``, or else on its demo
    world. ``oracle`` makes the backbone that sees (default: the task's own :meth:`evalsuite.Task.oracle`, or an
    :class:`OracleBackbone` of thumbnails). Without ``run`` only what needs no run is checked. Raises
    AssertionError with a line for each fault.
    """
    faults, registry = Faults(), registry or load().registry
    with faults.during("making it"):
        task = make()
        _check_words(task, faults)
        if not faults.lines:
            recipe = task.protocol(protocol).override(settings or {})
            with _world(task, data, data_root, registry) as location:
                _check_missing(task, recipe, registry, faults)
                if run:
                    _Runs(task, recipe, registry, location, limit, faults).check(oracle)
            faults.unless(not vars(task), f"it keeps {', '.join(vars(task))} in itself: tasks hold nothing")
    faults.settle()


def cheapest(task: Task) -> str:
    """The protocol to check by: the one for smoke tests, if it has one, or else its first."""
    names = [p.id for p in task.protocols]
    return "smoke" if "smoke" in names else names[0]


def runnable(task: Task, protocol: str) -> bool:
    """Whether the task's own oracle, or else those of the kit, give all that it needs by that protocol."""
    oracle = task.oracle()
    given = (GIVES, frozenset({"image"})) if oracle is None else (oracle.gives, oracle.takes)
    return not any(task.lacking(task.protocol(protocol), *given))


@contextmanager
def _world(
    task: Task, data: str | None, data_root: Path | None, registry: Registry
) -> Iterator[tuple[str | None, Path | None]]:
    """Where its data lie: those given, or its demo world, which is written to a folder that goes again."""
    with tempfile.TemporaryDirectory() as folder, _cached(Path(folder)):
        if data is not None or data_root is not None:
            yield data, data_root
            return
        try:
            root = demo_root(task, registry)
        except UsageError:  # no data set, no demo world: it makes its own
            yield None, None
        else:
            yield (f"{task.world}:{root}" if task.world else None), root


@contextmanager
def _cached(folder: Path) -> Iterator[None]:
    before = os.environ.get("EVALSUITE_CACHE")
    os.environ["EVALSUITE_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["EVALSUITE_CACHE"]
        else:
            os.environ["EVALSUITE_CACHE"] = before


def _check_words(task: Task, faults: Faults) -> None:
    if not faults.unless(isinstance(task, Task), f"it is a {type(task).__name__}, no Task"):
        return
    wanted = ("name", "metrics", "primary", "needs", "protocols")
    lacking = [name for name in wanted if not getattr(task, name, None) and name != "needs"]
    lacking += ["needs"] if not hasattr(task, "needs") else []
    if not faults.unless(not lacking, f"it does not say its {', '.join(lacking)}"):
        return
    faults.unless(bool(re.fullmatch(r"[a-z0-9][a-z0-9-]*", task.name)), f"its name {task.name!r} is no lower-case word")
    faults.unless(task.needs <= NAMED, f"it needs {sorted(task.needs - NAMED)}, which no backbone gives")
    ids = [p.id for p in task.protocols]
    faults.unless(len(set(ids)) == len(ids), f"two of its protocols have one id: {', '.join(ids)}")
    for protocol in task.protocols:
        metrics = {m.name: m for m in task.promises(protocol)}
        leading = task.leading(protocol)
        faults.unless(leading in metrics, f"by {protocol.id} {leading!r} counts, which is not among its metrics")
        for metric in metrics.values():
            faults.unless(metric.low < metric.high, f"{metric.name} lies between {metric.low} and {metric.high}")
        with faults.during(f"taking the hash of protocol {protocol.id}"):
            same = json.loads(json.dumps(protocol.fields())) == protocol.fields() and len(protocol.hash) == 16
            faults.unless(same, f"the fields of protocol {protocol.id} are no JSON values")


def _check_missing(task: Task, recipe: Protocol, registry: Registry, faults: Faults) -> None:
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(recipe, Path(folder), registry, Progress(quiet=True), data_root=Path(folder))
        with faults.during("with a data root that is empty it refuses nothing, but"):
            try:
                task.fingerprint(setup)
            except (DataError, UsageError):
                return


class _Runs:
    """A task by one recipe on one world."""

    def __init__(
        self, task: Task, recipe: Protocol, registry: Registry, location: tuple[str | None, Path | None],
        limit: int | None, faults: Faults,
    ) -> None:  # fmt: skip
        self.task, self.recipe, self.registry, self.location = task, recipe, registry, location
        self.limit, self.faults = limit, faults
        self.requires = task.requires(recipe)

    def check(self, oracle: Callable[[], Backbone] | None) -> None:
        faults, task = self.faults, self.task
        seeing = oracle() if oracle else task.oracle() or self._kit(OracleBackbone)
        if not faults.unless(
            task.fits(seeing, self.recipe),
            f"it needs {', '.join(sorted(self.requires))}: give the check an oracle that gives that",
        ):
            return
        identity, mode = seeing.identity, seeing.training
        with faults.during("a run"):
            outcome = self.run(seeing)
            faults.unless(seeing.identity == identity, "a run changes the weights of the backbone it is given")
            faults.unless(seeing.training == mode, "a run leaves the backbone in another mode")
            _check_outcome(outcome, task, self.recipe, faults)
            again = self.run(seeing)
            for name in sorted(n for n, v in outcome.scores.items() if v != again.scores[n]):
                odd = f"{name} is {outcome.scores[name]}, and {again.scores[name]} when it is run again"
                faults.unless(False, f"{odd}: draw from setup.rng alone")
            if not any(task.lacking(self.recipe, GIVES, frozenset({"image"}))):
                blind = self.run(self._kit(RandomBackbone))
                self._check_better(outcome, blind)

    def _kit(self, kind: type[OracleBackbone | RandomBackbone]) -> Backbone:
        return kind(gives=self.requires & GIVES)

    def run(self, backbone: Backbone) -> Outcome:
        data, root = self.location
        with tempfile.TemporaryDirectory() as folder, _cached(Path(folder) / "cache"), offline():
            work = Path(folder) / "work"
            work.mkdir()
            setup = Setup(
                self.recipe, work, self.registry, Progress(quiet=True), data_root=root, data=data, limit=self.limit,
                demo=True,
            )  # fmt: skip
            fingerprint = self.task.fingerprint(setup)
            outcome = evaluate(self.task, backbone, setup)
            same = fingerprint == self.task.fingerprint(setup) == outcome.data.get("fingerprint")
            self.faults.unless(
                same and bool(fingerprint),
                "its fingerprint of one setup is not one text: before, after, and in outcome.data",
            )
            for name, file in {**outcome.figures, **outcome.records}.items():
                self.faults.unless(file.is_file(), f"the file of {name!r} was not written")
        return outcome

    def _check_better(self, seeing: Outcome, blind: Outcome) -> None:
        name = self.task.leading(self.recipe)
        metric = next(m for m in self.task.promises(self.recipe) if m.name == name)
        best, worst = seeing.scores[name], blind.scores[name]
        if not self.faults.unless(best is not None, f"{name} of a backbone that sees is undefined"):
            return
        assert best is not None
        sign = 1 if metric.higher_is_better else -1
        better = worst is None or sign * (best - worst) > MARGIN
        way = "higher" if metric.higher_is_better else "lower"
        self.faults.unless(
            better,
            f"a backbone that sees has {name} {best}, a blind one {worst}, and {way} is "
            "said to be better: mend higher_is_better, or give the task an oracle()",
        )


def _check_outcome(outcome: Outcome, task: Task, recipe: Protocol, faults: Faults) -> None:
    for metric in task.promises(recipe):
        value = outcome.scores[metric.name]
        inside = value is None or metric.low - 1e-9 <= value <= metric.high + 1e-9
        faults.unless(inside, f"{metric.name} is {value}, outside of [{metric.low}, {metric.high}]")
    for part in ("scores", "data", "selected", "timings", "details"):
        for line in plain(getattr(outcome, part), part):
            faults.unless(False, line)
    for name, values in outcome.replicates.items():
        faults.unless(name in outcome.scores, f"there are replicates of {name!r}, which is no score")
        sound = values.ndim == 1 and values.size > 0 and not np.isinf(np.asarray(values, np.float64)).any()
        faults.unless(sound, f"replicates of {name} are no row of finite numbers")
    ids = list(outcome.ids)
    faults.unless(len(set(ids)) == len(ids), "two samples have one id: paired tests would mix them up")
    for name, values in outcome.samples.items():
        faults.unless(len(values) == len(ids), f"there are {len(values)} samples of {name} and {len(ids)} ids")
    for name, seconds in outcome.timings.items():
        faults.unless(_number(seconds), f"the timing of {name} is no number of seconds")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0
