"""What every test lives in: one thread, fixed seeds, no network, and no plugin but our own."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from evalsuite import hooks

REPOSITORY = Path(__file__).resolve().parent.parent

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # torch and numpy are not loaded yet, and child processes inherit it
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples in every run, and no deadline, which a busy machine would miss;
# pytest --hypothesis-profile=default searches for others.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("fuzz", max_examples=10_000, deadline=None, print_blob=True)  # make fuzz
hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "realdata" in getattr(item, "fixturenames", ()):
            item.add_marker("realdata")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for package in ("detectron2", "mmseg"):
        if item.get_closest_marker(package) and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """Every test starts from the same seeds, on one thread; torch is touched only where a test loaded it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        from evalsuite.seeding import manual_seed

        torch.set_num_threads(1)
        manual_seed(0)


def _is_here(family: int, address: Any) -> bool:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True  # a unix socket, as data workers use
    host = address[0]
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Connecting anywhere but to this machine fails, so that no test can come to need the network."""

    def guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
        def checked(self: socket.socket, address: Any) -> Any:
            if not _is_here(self.family, address):
                raise RuntimeError(f"tests have no network, and this one connects to {address!r}")
            return connect(self, address)

        return checked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        yield


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real data: EVALSUITE_REALDATA, or ``../shared/data`` beside the repository."""
    root = Path(os.environ.get("EVALSUITE_REALDATA") or REPOSITORY.parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip("the real data are not here; point EVALSUITE_REALDATA to them")
    return root


@pytest.fixture(scope="session")
def loaded() -> hooks.Loaded:
    """Our own plugins and nobody else's."""
    return hooks.load(environ={"EVALSUITE_PLUGINS": ""})


@pytest.fixture(scope="session")
def registry(loaded: hooks.Loaded) -> hooks.Registry:
    return loaded.registry
