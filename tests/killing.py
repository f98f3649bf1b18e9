"""Runs that are killed beside others: a process that imports all once, and forks whoever runs and is killed.

python tests/killing.py FOLDER    reads trials, a JSON object a line, and answers each with one (:func:`tried`)
"""

from __future__ import annotations

import builtins
import faulthandler
import gc
import hashlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import pretrain.train
from evalsuite import hooks, locks, runner
from evalsuite.errors import Refusal
from evalsuite.features import Cache, Preprocess, cache
from evalsuite.files import is_aside, write_text
from evalsuite.progress import Progress
from evalsuite.results import arrays, read_all
from evalsuite.task import Metric, Outcome, Protocol, Task
from evalsuite.training import Fit, fit, launched
from pretrain.methods.simclr import SimCLR
from pretrain.plugin import Training
from pretrain.testing import tiny_backbone, tiny_corpus

LIMIT = 180  # seconds that a process may take, of which it needs less than one
HELD = 7  # the exit code of who is refused what another process is at
WRITES = ("fsync", "posix_fallocate", "replace", "rename", "mkdir", "unlink", "rmdir", "chmod")
QUIET = Progress(quiet=True)


class Child:
    """A fork that does some work; it stops itself before its write number ``stop`` (0: never).

    Where it takes longer than the limit, it says where all its threads are and ends.
    """

    def __init__(self, work: Callable[[Progress], object], stop: int = 0) -> None:
        self.reading, writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.said = b""
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(writing, 2)
            faulthandler.dump_traceback_later(LIMIT, exit=True, file=2)
            code = 1
            try:
                stop_at(stop)
                work(Progress(stream=os.fdopen(writing, "w")))
                code = 0
            except Refusal as error:
                code = error.code
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(code)
        os.close(writing)
        self.code: int | None = None

    def until(self, text: str = "\0") -> str:
        """What comes first: it has ``stopped`` at its write, has ``ended``, or has ``said`` a text."""
        end = time.monotonic() + LIMIT + 30
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED) if self.code is None else (0, 0)
            self.hear()
            if pid and os.WIFSTOPPED(status):
                return "stopped"
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            if self.code is not None:
                return "ended"
            if text.encode() in self.said:
                return "said"
            time.sleep(0.002)
        self.kill()
        raise AssertionError(f"neither its end nor {text!r} came")

    def hear(self) -> None:
        while True:
            try:
                more = os.read(self.reading, 65536)
            except BlockingIOError:
                return
            if not more:
                return
            self.said += more

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.reading)

    def end(self) -> int:
        """Its exit code at its end; it goes on where it had stopped."""
        if self.code is None:
            os.kill(self.pid, signal.SIGCONT)
        assert self.until() == "ended", "it stopped twice"
        os.close(self.reading)
        assert self.code in (0, HELD), f"exit code {self.code}: {self.said.decode()}"
        return self.code


def stop_at(stop: int) -> None:
    """Stop this process before its write of that number."""
    count = 0

    def counted(real: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if writes(*arguments, **named):
                count += 1
                if count == stop:
                    os.kill(os.getpid(), signal.SIGSTOP)
            return real(*arguments, **named)

        return call

    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    os.open = counted(os.open, lambda _, given, *__, **___: bool(given & flags))
    for name in WRITES:
        setattr(os, name, counted(getattr(os, name), lambda *_, **__: True))
    io.open = builtins.open = counted(io.open, lambda _, mode="r", *__, **___: any(c in mode for c in "wax+"))


@dataclass(frozen=True)
class Kind:
    """A kind of run below a folder, and all its numbers once it is over; ``readable`` reads whatever may be read at any
    moment, and raises where something is half-written; ``litter`` is what a killed process may leave until the next
    run. A run takes so many ``seconds``."""

    run: Callable[[Path, Progress], object]
    numbers: Callable[[Path], str]
    readable: Callable[[Path], object]
    litter: Callable[[Path], list[Path]]
    whole: str = ""
    seconds: float = 0.0

    def known(self, root: Path) -> Kind:
        """With the numbers of an undisturbed run and its time, all being imported."""
        self.run(root / "first", QUIET)
        began = time.monotonic()
        assert Child(partial(self.run, root / "second")).end() == 0
        seconds = time.monotonic() - began
        whole = self.numbers(root / "first")
        assert self.numbers(root / "second") == whole
        return replace(self, whole=whole, seconds=seconds)


# Cells


class Trains(Task):
    """Three steps, each saved."""

    name, primary, needs = "trains", "loss", frozenset({"pooled"})
    protocols: ClassVar = (Protocol(id="steps", version=1),)
    metrics: ClassVar = (Metric("loss", higher_is_better=False, high=100.0),)

    def fingerprint(self, setup: Any) -> str:
        return "of nothing"

    def run(self, backbone: Any, setup: Any) -> Outcome:
        torch.manual_seed(0)
        model = Line()
        job = Fit(
            model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), lr_factor=lambda step: 1.0,
            iterations=3, seed=0, key="k", state=setup.work / "state.pt", sample=drawn, length=8, batch_size=4,
            saves=0.0, logs=1,
        )  # fmt: skip
        fit(job, launched(setup.device), setup.progress)
        (setup.work / "curve.txt").write_text(json.dumps(job.log))
        losses = np.array([entry["square"] for entry in job.log])
        return Outcome(
            scores={"loss": float(losses.mean())}, samples={"loss": losses}, ids=["1", "2", "3"],
            data={"fingerprint": "of nothing"}, records={"curve": setup.work / "curve.txt"},
        )  # fmt: skip


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(3, 1)

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"square": self.line(torch.stack(batch)).square().mean()}


def drawn(index: int, seed: int) -> torch.Tensor:
    return torch.randn(3, generator=torch.Generator().manual_seed(seed)) + index


def classifying(folder: Path) -> runner.Request:
    """Ridge regression on cached features of 24 images."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=24)
    images = (rng.integers(0, 90, (24, 8, 8, 3)) + 120 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(
        folder / "data.npz", train_images=images[:16], train_labels=labels[:16], test_images=images[16:],
        test_labels=labels[16:],
    )  # fmt: skip
    data = f"npz:{folder / 'data.npz'}"
    return runner.Request(backbones=["tiny"], tasks=["classify"], data=data, protocol="ridge", device="cpu", workers=0)


def planned(request: runner.Request, folder: Path, backbones: runner.Backbones) -> runner.Cell:
    """The only cell of a request; the backbone is kept for those who are forked."""
    (cell,) = runner.plan(replace(request, out=folder / "out"), backbones.registry, QUIET, backbones)
    return cell


def settle(cell: runner.Cell, backbones: runner.Backbones, root: Path, progress: Progress) -> None:
    os.environ["EVALSUITE_CACHE"] = str(root / "cache")
    out = root / "out"
    cell = replace(
        cell, request=replace(cell.request, out=out), path=out / "results" / "backbone" / "task" / "seed-0.json"
    )
    result = runner.settle(cell, backbones.registry, progress, backbones)
    assert result.status == "ok", result.error


def cell_numbers(root: Path) -> str:
    """All that the only result says, which is whole."""
    ((path, result),) = read_all(root / "out")
    samples = {name: values.tolist() for name, values in arrays(path, result, "samples").items()}
    scores = {name: (score.value, score.low, score.high) for name, score in result.scores.items()}
    return json.dumps([result.status, scores, samples, result.selected, sorted(result.files)], sort_keys=True)


def cell_litter(root: Path) -> list[Path]:
    return [*partials(root), *(path for path in (root / "out").iterdir() if path.name != "results")]


def partials(root: Path) -> list[Path]:
    return list(root.rglob("*.partial"))


def cell_readable(root: Path) -> None:
    for path, result in read_all(root / "out"):
        arrays(path, result, "samples")


# The cache


class Images:
    """Six images, in two shards."""

    fingerprint, split, ids, labels = "f0", "train", tuple(f"im{i}" for i in range(6)), range(6)

    def __getitem__(self, index: int) -> Any:
        return np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def encode(root: Path, progress: Progress) -> None:
    outputs, plain = ("pooled", "map2"), Preprocess((16, 16), "none")
    Cache(root).features(tiny_backbone(), Images(), outputs, preprocess=plain, batch_size=3, progress=progress)


def features(root: Path) -> dict[str, str]:
    """The digests of what readers would see, by entry."""
    return {
        path.parent.name: hashlib.sha256((path.parent / "features.npy").read_bytes()).hexdigest()
        for path in root.rglob("manifest.json")
    }


def all_features(root: Path) -> str:
    seen = features(root)
    assert len(seen) == 2
    return json.dumps(seen, sort_keys=True)


def right_features(whole: Callable[[], str], root: Path) -> None:
    """Whatever is readable is what it will be."""
    assert features(root).items() <= json.loads(whole()).items()


# Pretraining


def pretraining(registry: hooks.Registry, root: Path, progress: Progress) -> None:
    """Two steps, each saved."""
    recipe, _ = pretrain.train.compose("simclr", registry=registry)
    recipe.method.options = SimCLR.Options(size=16, width=8, hidden=8, warmup=0.0)
    recipe.parts["defaults"].options = Training(size=16)
    plan = pretrain.train.Plan(
        out=root, epochs=1, batch_size=4, steps=2, device="cpu", workers=0, log_every=1, save_every=0.0
    )
    pretrain.train.train(recipe, tiny_backbone(), tiny_corpus(8), plan, progress)


def pretrained_numbers(out: Path) -> str:
    """The log and the weights."""
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(out / "state.pt", weights_only=True)
    assert log == state["log"]
    kept = [{name: value for name, value in entry.items() if name not in ("images_s", "wait")} for entry in log]
    weights = {name: value.tolist() for name, value in state["model"].items()}
    return json.dumps([kept, weights, state["step"], (out / "backbone.safetensors").stat().st_size])


def pretrained_litter(out: Path) -> list[Path]:
    """A log whose state was not saved yet is set aside."""
    names = ("backbone.safetensors", "metrics.jsonl", "metrics.png", "run.json", "state.pt")
    return [path for path in out.rglob("*") if path.name not in names and not is_aside(path)]


def pretrained_readable(out: Path) -> None:
    if (out / "state.pt").exists():
        torch.load(out / "state.pt", weights_only=True)


# Trials


def at_write(kind: Kind, root: Path, point: int, victim: str, second_point: int = 0) -> dict[str, Any]:
    """A process stops at a write, a second one runs beside it to its own write, to where it waits or to its end; one of
    the two is killed, the other goes on."""
    run = partial(kind.run, root)
    first = Child(run, point)
    if first.until() == "ended":
        first.end()
        return {"first": "ended"}
    kind.readable(root)
    second = Child(run, second_point)
    came = second.until("waiting for")
    killed, other = (first, second) if victim == "first" else (second, first)
    killed.kill()
    kind.readable(root)
    finish(other, run)
    return {"first": "stopped", "second": came, "said": other.said.decode()}


def at_moment(kind: Kind, root: Path, share: float, victim: str) -> dict[str, Any]:
    """Two processes begin at once, and one is killed after so much of the time that a run takes."""
    run = partial(kind.run, root)
    children = [Child(run), Child(run)]
    time.sleep(share * kind.seconds)
    children.pop(("first", "second").index(victim)).kill()
    kind.readable(root)
    finish(children[0], run)
    return {}


def finish(child: Child, run: Callable[[Progress], object]) -> None:
    """Let it go on to its end, or where it is refused, the next one."""
    if child.end() == HELD:
        assert Child(run).end() == 0, "it is refused what nobody is at"


def tried(kind: Kind, root: Path, trial: dict[str, Any]) -> dict[str, Any]:
    """What came of a trial; ``fault`` is what went wrong."""
    try:
        answer = (at_write if "point" in trial else at_moment)(kind, root, **trial)
        if kind.litter(root):
            assert Child(partial(kind.run, root)).end() == 0
            assert not (left := kind.litter(root)), f"left over after the next run: {left}"
        numbers = kind.numbers(root)
        assert numbers == kind.whole, f"numbers differ: {numbers} instead of {kind.whole}"
    except Exception as error:
        return {"fault": f"{trial} in {root}: {type(error).__name__}: {error}"}
    return answer


def kinds_of(folder: Path) -> dict[str, Kind]:
    registry = hooks.load(environ={"EVALSUITE_PLUGINS": ""}).registry
    registry.backbone("tiny", "pretrain.testing:tiny_backbone")
    registry.task("trains", f"{__name__}:Trains")
    backbones = runner.Backbones(registry)
    classify = planned(classifying(folder), folder, backbones)
    trains = planned(runner.Request(backbones=["tiny"], tasks=["trains"], device="cpu", workers=0), folder, backbones)
    kinds = {
        "classify": Kind(partial(settle, classify, backbones), cell_numbers, cell_readable, cell_litter),
        "trains": Kind(partial(settle, trains, backbones), cell_numbers, cell_readable, cell_litter),
        "encode": Kind(encode, all_features, partial(right_features, lambda: kinds["encode"].whole), partials),
        "pretrain": Kind(partial(pretraining, registry), pretrained_numbers, pretrained_readable, pretrained_litter),
    }
    for name, kind in kinds.items():
        kinds[name] = kind.known(folder / name)
    return kinds


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    locks.POLL = 0.01
    cache.SHARD = 4
    os.fsync = lambda _: None  # a process that is killed loses no page of the kernel's
    pretrain.train.plot = lambda log, path, title: write_text(path, title)  # curves take longer than these runs
    kinds = kinds_of(folder)
    gc.collect()
    gc.freeze()
    for number, line in enumerate(sys.stdin):
        trial = json.loads(line)
        kind = kinds[trial.pop("kind")]
        print(json.dumps(tried(kind, folder / str(number), trial)), flush=True)
    os._exit(0)  # torch takes a second to leave


if __name__ == "__main__":
    main(Path(sys.argv[1]))
