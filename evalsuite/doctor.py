"""What this machine has and lacks for evaluating."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from evalsuite.data import source
from evalsuite.environment import versions
from evalsuite.errors import DataError
from evalsuite.hooks import EXTRAS, Loaded

__all__ = ["examine"]


def examine(loaded: Loaded, data_root: Path | None) -> dict[str, Any]:
    """Findings by subject, as plain JSON values."""
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": versions(),
        "devices": _devices(),
        "extras": {
            extra: f"not installed: pip install 'evalsuite[{extra}]'" if missing else "installed"
            for extra, missing in _missing().items()
        },
        "engines": {entry.name: _engine(loaded, entry.name) for entry in loaded.registry.entries("engine")},
        "data": _data(loaded, data_root),
        "plugins": {
            "loaded": [plugin.name for plugin in loaded.plugins],
            "left out": [plugin.name for plugin in loaded.blocked],
            "broken": [str(fault) for fault in loaded.faults],
        },
    }


def _missing() -> dict[str, list[str]]:
    """The modules of each extra that are not there."""
    found: dict[str, list[str]] = {}
    for module, extra in EXTRAS.items():
        found.setdefault(extra, []).extend([] if importlib.util.find_spec(module) else [module])
    return found


def _devices() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    devices = {"cpu": f"{os.cpu_count()} cores, {memory:.0f} GiB, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    devices["disk"] = f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free here"
    return devices


def _engine(loaded: Loaded, name: str) -> str:
    try:
        version: str = loaded.registry.get("engine", name)().version()
    except Exception as error:  # an engine's library may fail in any way; here that is a finding
        return f"unusable: {getattr(error, 'cause', None) or error}"
    return version


def _data(loaded: Loaded, root: Path | None) -> dict[str, str]:
    if root is None:
        return {"root": "none: set EVALSUITE_DATA or give --data-root"}
    found = {"root": str(root)}
    for name in loaded.registry.names("dataset"):
        try:
            layout = source(loaded.registry, name)
            found[name] = "generated" if layout.generated else str(layout.locate(root))
        except DataError as missing:
            found[name] = f"not found ({missing.cause})"
    return found
