"""Cells are plain values: they go to other processes, and weights are in memory only where one runs, one at a time."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evalsuite import hooks, runner
from evalsuite.backbone import build
from evalsuite.checkpoints import load_backbone
from evalsuite.errors import BackboneError, DataError, PluginError, UsageError
from evalsuite.progress import Progress
from evalsuite.results import Result, read
from evalsuite.runner import Request, existing, plan, settle

QUIET = Progress(quiet=True)
PLUGIN = '''
"""A task that looks at one image, and backbones of which there is a list."""

import weakref

import torch

from evalsuite import Metric, Outcome, Protocol, Task, hookimpl
from pretrain.testing import tiny_backbone

ALIVE = weakref.WeakSet()
BUILT, SEEN, FAILING = [], [], set()  # how many there were when one was built, and when one was looked at


@hookimpl
def evalsuite_register(registry):
    registry.task("glance", "glances:Glance")
    registry.task("stare", "glances:Stare")
    registry.backbone("tiny", "glances:tiny")


def tiny(seed):
    BUILT.append(len(ALIVE))
    backbone = tiny_backbone(int(seed))
    ALIVE.add(backbone)
    return backbone


class Glance(Task):
    name, primary, needs = "glance", "mean", frozenset({"pooled"})
    metrics = (Metric("mean", low=-10.0, high=10.0),)
    protocols = (Protocol(id="one", version=1),)

    def fingerprint(self, setup):
        return f"content:{setup.limit}"

    def run(self, backbone, setup):
        SEEN.append(len(ALIVE))
        if setup.seed in FAILING:
            raise ZeroDivisionError(f"seed {setup.seed}")
        pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(setup.seed))
        with torch.no_grad():
            mean = float(backbone(pixels).pooled.mean())
        return Outcome(scores={"mean": mean}, data={"fingerprint": self.fingerprint(setup)})


class Stare(Glance):
    name = "stare"
'''


@pytest.fixture
def glances(tmp_path, monkeypatch):
    """The module of the plugin, with nothing built or seen yet."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "glances.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EVALSUITE_PLUGINS", "")
    monkeypatch.delitem(sys.modules, "glances", raising=False)
    import glances

    yield glances
    del sys.modules["glances"]


@pytest.fixture
def registry(glances) -> hooks.Registry:
    return hooks.load(["glances"]).registry


def request(tmp_path: Path, backbones: Sequence[str] = ("tiny:0",), **changes: Any) -> Request:
    flags = {"tasks": ["glance"], "out": tmp_path / "out", "device": "cpu", "plugins": ("glances",), **changes}
    return Request(backbones=backbones, **flags)


def comparable(result: Result) -> dict[str, Any]:
    """All of a result that is not of its moment."""
    return result.model_dump(exclude={"created", "timings", "peak_memory_mb"})


class Listed(pickle.Unpickler):
    """Unpickles, and lists the modules that are imported for it."""

    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self.modules: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.modules.add(module)
        return super().find_class(module, name)


def test_a_cell_is_small_and_names_no_network(registry, tmp_path):
    flags = {"command": "evalsuite run " + "-b checkpoints/some-name.pth " * 20, "backbone_options": {"image_size": 32}}
    for cell in plan(request(tmp_path, ["tiny:0", "random:timm:test_resnet"], **flags), registry, QUIET):
        pickled = pickle.dumps(cell)
        assert len(pickled) <= 4096
        listed = Listed(pickled)
        assert listed.load() == cell
        assert {module.partition(".")[0] for module in listed.modules} <= {"evalsuite", "pathlib"}
        cloudpickle = pytest.importorskip("cloudpickle")
        assert len(cloudpickle.dumps(cell)) <= 4096


SETTLE = """
    import pickle, sys
    from evalsuite.runner import existing, settle

    *there, missing = pickle.loads(sys.stdin.buffer.read())
    assert all(existing(cell).seed == cell.seed == settle(cell).seed for cell in there)
    assert existing(missing) is None
    assert "torch" not in sys.modules, "torch is loaded"
    assert settle(missing).status == "ok"
"""


def test_another_process_decides_without_torch_and_makes_what_is_missing(registry, tmp_path):
    cells = plan(request(tmp_path, seeds=100), registry, QUIET)
    first = settle(cells[0], registry, QUIET)
    for cell in cells[1:-1]:
        first.model_copy(update={"seed": cell.seed}).write(cell.path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = textwrap.dedent(SETTLE)
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(cells), env=environment, check=True)
    ((_, here),) = runner.execute(request(tmp_path, out=tmp_path / "here", seeds=[99]), registry, QUIET)
    assert comparable(read(cells[-1].path)) == comparable(here)


def test_there_is_one_backbone_at_a_time_and_each_is_loaded_once_for_all_its_cells(glances, registry, tmp_path):
    glances.FAILING.add(1)
    wanted = request(tmp_path, ["tiny:0", "tiny:1", "tiny:2"], tasks=["glance", "stare"], seeds=3)
    results = [result for _, result in runner.execute(wanted, registry, QUIET)]
    assert [result.status for result in results] == ["ok", "failed", "ok"] * 6
    assert glances.BUILT == [0] * 6  # planned, and run
    assert glances.SEEN == [1] * 18


def test_the_only_backbone_is_loaded_once_and_that_of_cells_that_are_there_not_again(glances, registry, tmp_path):
    runner.execute(request(tmp_path, tasks=["glance", "stare"], seeds=2), registry, QUIET)
    assert len(glances.BUILT) == 1
    runner.execute(request(tmp_path, ["tiny:0", "tiny:1"], seeds=2), registry, QUIET)
    assert len(glances.BUILT) == 1 + 2  # both are looked at; the second is kept until its cells run
    del glances.SEEN[:]
    runner.execute(request(tmp_path, ["tiny:0", "tiny:1"], seeds=2), registry, QUIET)
    assert glances.SEEN == []


@pytest.fixture
def file(registry, tmp_path) -> Path:
    path = tmp_path / "net.safetensors"
    build("small:resnet10", registry, width=4).save(path)
    return path


def other(file: Path, registry: hooks.Registry) -> None:
    backbone = load_backbone(file, registry).backbone
    next(backbone.net.parameters()).data += 1.0
    backbone.save(file)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (other, r"is another backbone than when the run was planned\n.*were {} then, and are .{{8}} now"),
        (lambda file, registry: file.unlink(), "net.safetensors"),
        (lambda file, registry: file.write_bytes(b"nothing"), "is not a checkpoint"),
    ],
)
def test_a_file_that_changed_since_the_plan_fails_its_cells_alone(registry, tmp_path, file, change, text):
    cells = plan(request(tmp_path, [str(file), "tiny:0"], seeds=2), registry, QUIET)
    change(file, registry)
    results = [settle(cell, registry, QUIET) for cell in cells]
    assert [(r.status, r.error_code) for r in results] == [("failed", 4)] * 2 + [("ok", 0)] * 2
    first = results[0]
    assert re.search(text.format(cells[0].identity[:8]), first.error)
    assert first.backbone.identity == cells[0].identity
    assert (first.backbone.spec["arch"], first.backbone.load) == ("small:resnet10", {})
    assert first.backbone.parameters > 1000


def test_a_cell_is_not_run_by_another_protocol_than_it_was_planned_with(glances, registry, tmp_path, monkeypatch):
    (cell,) = plan(request(tmp_path), registry, QUIET)
    monkeypatch.setattr(glances.Glance, "version", 2)
    with pytest.raises(PluginError, match="glance, one-1, seed 0 cannot be run here"):
        settle(cell, registry)
    assert not cell.path.exists()


def test_what_is_there_is_decided_by_the_cell(registry, tmp_path):
    (cell,) = plan(request(tmp_path), registry, QUIET)
    assert existing(cell) is None
    result = settle(cell, registry)
    assert existing(cell) == result
    with pytest.raises(UsageError, match="holds the result on other data"):
        existing(replace(cell, fingerprint="content:other"))
    with pytest.raises(UsageError, match="by another one-1"):
        existing(replace(cell, protocol=cell.protocol._replace(hash="0" * 16)))
    cell.path.write_text("{")
    assert existing(cell) is None
    assert cell.path.read_text() == "{"  # it only looks
    cell.path.unlink()
    cell.path.mkdir()
    assert existing(cell) is None


def test_data_are_looked_at_once_for_all_backbones(glances, registry, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(glances.Glance, "fingerprint", lambda self, setup: looked.append(setup.seed) or "content:x")
    cells = plan(request(tmp_path, ["tiny:0", "tiny:1"], tasks=["glance", "stare"], seeds=[4, 7]), registry, QUIET)
    assert [cell.name for cell in cells] == ["tiny-0"] * 4 + ["tiny-1"] * 4
    assert looked == [4, 7] * 2


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"tasks": ["glance", "cifar10"]}, DataError),
        ({"backbones": ["tiny:0", "tiny:one"]}, BackboneError),
        ({"backbones": ["tiny:0", "random:timm:test_vit"], "tasks": ["glance", "voc"]}, BackboneError),
    ],
)
def test_nothing_runs_where_any_cell_is_refused(glances, registry, tmp_path, changes, refusal):
    with pytest.raises(refusal):
        runner.execute(request(tmp_path, data_root=tmp_path, **changes), registry, QUIET)
    assert glances.SEEN == []
