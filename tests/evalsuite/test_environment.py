"""Where results are made and where the user's folders are: each is read in one place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evalsuite import environment
from evalsuite.data import reading
from evalsuite.data.digests import of_paths
from evalsuite.errors import UsageError
from evalsuite.features import Cache
from evalsuite.progress import Progress
from evalsuite.runner import Request, demo_root
from evalsuite.task import Setup


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize(("given", "below"), [("~/c", "c"), ("~", ""), ("", ".cache/evalsuite")])
def test_all_that_is_kept_between_runs_is_in_one_folder(home, tmp_path, registry, monkeypatch, given, below):
    monkeypatch.setenv("EVALSUITE_CACHE", given)
    root = home / below
    task = registry.get("task", "camvid")()
    file = tmp_path / "file"
    file.write_text("content")
    setup = Setup(task.protocols[0], tmp_path, registry, Progress(quiet=True))
    assert environment.cache_root() == root
    assert Cache().root == setup.cache.root == root / "features"
    assert demo_root(task, registry).is_relative_to(root / "demo")
    assert of_paths([file]).any()
    assert list((root / "digests").iterdir())
    assert reading._memory("readable", "key").parent == root / "readable"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "home"]


def test_the_data_root_is_expanded_wherever_it_is_given(home, monkeypatch):
    monkeypatch.delenv("EVALSUITE_DATA", raising=False)
    assert environment.data_root() is None
    monkeypatch.setenv("EVALSUITE_DATA", "~/data")
    assert environment.data_root() == home / "data"
    assert Request(backbones=[], tasks=[], data_root="~/sets").data_root == home / "sets"


def test_the_home_of_nobody_is_refused(monkeypatch):
    monkeypatch.setenv("EVALSUITE_CACHE", "~nobody-of-that-name/c")
    with pytest.raises(UsageError, match="EVALSUITE_CACHE: ~nobody-of-that-name/c is no folder"):
        Cache()


def test_only_what_is_installed_has_a_version():
    assert set(environment.versions(["torch", "no-such-package"])) == {"torch"}
    assert {"evalsuite", "torch", "numpy"} <= set(environment.versions())


def test_a_device_is_described_with_its_peak_memory():
    device = environment.pick_device("cpu")
    assert device == torch.device("cpu")
    told = environment.describe(device)
    assert (told["device"], told["gpu"], told["threads"]) == ("cpu", None, 1)
    environment.reset_peak_memory(device)
    (host,) = environment.peak_memory(device).values()
    assert 10 < host < 1e6  # MiB


def test_versions_and_folders_are_told_without_torch():
    code = "import sys; from evalsuite.environment import *; versions(), cache_root(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
