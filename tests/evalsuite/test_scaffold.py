"""What ``plugins new`` writes is right as it is written, and it never overwrites; a stranger's distribution works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from evalsuite import conformance, hooks, runner, scaffold
from evalsuite.conformance import Finding, check_plugin
from evalsuite.data import source
from evalsuite.errors import UsageError
from evalsuite.hooks import Registry
from evalsuite.scaffold import KINDS
from pretrain import train
from pretrain.testing import losses

REPOSITORY = Path(__file__).resolve().parent.parent.parent
THIRD_PARTY = REPOSITORY / "tests" / "fixtures" / "third_party"
LONG = "as-long-as-a-name-may-be"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package of each kind, and with the shortest and the longest of names."""
    out = tmp_path_factory.mktemp("written")
    registry = Registry()
    found = {f"a-{kind}": scaffold.write(f"a-{kind}", kind, out, registry).path for kind in KINDS}
    for kind in KINDS:
        for name in ("x", LONG):
            found[f"{kind} {name}"] = scaffold.write(name, kind, out / kind, registry).path
    return found


def ran(*command: str | Path, path: list[Path] | None = None) -> None:
    environment = os.environ | {"EVALSUITE_PLUGINS": "", "PYTHONPATH": os.pathsep.join(map(str, path or []))}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_is_whole_formatted_and_linted(written):
    for path in written.values():
        module = path.name.replace("-", "_")
        files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        tests = f"tests/test_{module}.py"
        assert files == {
            "README.md",
            "pyproject.toml",
            ".gitignore",
            ".github/workflows/test.yml",
            f"{module}.py",
            tests,
        }
    for command in ("format --check", "check --no-cache"):
        ran(sys.executable, "-m", "ruff", *command.split(), *written.values())


def test_its_entry_point_is_its_module_and_it_asks_for_this_version(written):
    project = tomllib.loads((written["a-method"] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"evalsuite": {"a-method": "evalsuite_a_method"}}
    major_minor = ".".join(version("evalsuite").split(".")[:2])
    assert project["dependencies"] == [f"evalsuite>={major_minor},<1"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_green_at_once(kind, written, monkeypatch):
    monkeypatch.setattr(conformance, "_import", lambda plugin: Finding(f"import {plugin.module}", ()))
    monkeypatch.syspath_prepend(str(written[f"a-{kind}"]))
    module = f"evalsuite_a_{kind}"
    found = list(check_plugin(module, hooks.load([module], environ={"EVALSUITE_PLUGINS": ""})))
    assert [finding.subject for finding in found] == [f"import {module}", f"{kind} a-{kind}"]
    assert [fault for finding in found for fault in finding.faults] == []


def test_the_documents_say_how_many_lines_there_are(written):
    table = (REPOSITORY / "docs" / "plugins.md").read_text()
    told = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", table, re.MULTILINE))
    lines = {kind: len((written[f"a-{kind}"] / f"evalsuite_a_{kind}.py").read_text().splitlines()) for kind in KINDS}
    assert {kind: int(count) for kind, count in told.items()} == lines


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes of one core, on a machine that may have none to spare
def test_the_tests_of_every_kind_pass(written):
    kinds = [written[f"a-{kind}"] for kind in KINDS]
    flags = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", kinds[0].parent]
    ran(sys.executable, "-m", "pytest", *flags, *(kind / "tests" for kind in kinds), path=kinds)


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path, registry):
    scaffold.write("new-one", "method", tmp_path, registry)
    module = tmp_path / "evalsuite-new-one" / "evalsuite_new_one.py"
    module.write_text("mine")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        scaffold.write("new-one", "task", tmp_path, registry)
    (tmp_path / "evalsuite-dangling").symlink_to("nowhere")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        scaffold.write("dangling", "task", tmp_path, registry)
    assert module.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evalsuite-dangling", "evalsuite-new-one"]


@pytest.mark.parametrize(
    "name", ["", "New", "my_method", "-x", "x-", "x--y", "9lives", "../up", "no:x", "x y", "é", f"{LONG}r", "x\n"]
)
def test_a_bad_name_is_refused(name, tmp_path, registry):
    with pytest.raises(UsageError, match="cannot be a plugin's name"):
        scaffold.write(name, "method", tmp_path, registry)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_name_and_an_unknown_kind_are_refused(tmp_path, registry):
    with pytest.raises(UsageError, match="there is a method named 'simclr'"):
        scaffold.write("simclr", "method", tmp_path, registry)
    for kind, name in (("task", "task"), ("method", "training"), ("engine", "segmented")):
        with pytest.raises(UsageError, match=f"a {kind} cannot be named '{name}'"):
            scaffold.write(name, kind, tmp_path, registry)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="no plugin of kind 'metric'"):
        scaffold.write("fine", "metric", tmp_path, registry)


def test_a_distribution_of_a_third_party_passes_and_works(tmp_path, monkeypatch):
    """Installed for real by ``.ci/run``; here it is only on the path."""
    monkeypatch.setattr(conformance, "_import", lambda plugin: Finding(f"import {plugin.module}", ()))
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(THIRD_PARTY / "src"))
    loaded = hooks.load(["evalsuite_acme"], environ={"EVALSUITE_PLUGINS": ""})
    found = [finding for finding in check_plugin("evalsuite_acme", loaded)]
    assert [fault for finding in found for fault in finding.faults] == []
    assert len(found) == 5
    shapes = source(loaded.registry, "acme-shapes").demo(tmp_path / "data", images=24)
    trained = train.run(
        "simclr", ["acme-dropout"], data=f"acme-shapes:{shapes}", arch="acme:tiny", registry=loaded.registry,
        out=tmp_path / "learnt", batch_size=8, steps=2, device="cpu", workers=0,
    )  # fmt: skip
    assert np.isfinite(losses(trained)[-1]["nt_xent"])
    flags = {"protocol": "knn", "registry": loaded.registry, "out": tmp_path / "out"}
    (result,) = runner.run(str(trained.path), "acme-shapes", data_root=tmp_path / "data", **flags)
    assert (result.status, result.task, result.demo) == ("ok", "acme-shapes", False)
    (result,) = runner.run(str(trained.path), "classify", data=f"acme-shapes:{shapes}", **flags)
    assert (result.status, result.data["train_images"]) == ("ok", 24)


def test_an_engine_of_a_third_party_does_what_the_tasks_own_does(written, tmp_path, monkeypatch):
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(written["a-engine"]))
    registry = hooks.load(["evalsuite_a_engine"], environ={"EVALSUITE_PLUGINS": ""}).registry
    flags = {"engine": "a-engine", "demo": True, "registry": registry, "out": tmp_path / "out", "limit": 6}
    (result,) = runner.run("random:small:resnet10", "camvid", **flags)
    assert (result.status, result.engine, result.engine_version) == ("ok", "a-engine", "a-engine 1")
    with pytest.raises(UsageError, match="coco has no engine 'a-engine'"):
        runner.run("random:small:resnet10", "coco", **flags)
