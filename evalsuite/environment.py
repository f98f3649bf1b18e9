"""What a result says of where it was made, versions, device and peak memory; and where the user's folders are.

Importing this loads no torch; what asks for a device does.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalsuite.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import torch

__all__ = [
    "PACKAGES",
    "cache_root",
    "data_root",
    "describe",
    "expanded",
    "peak_memory",
    "pick_device",
    "reset_peak_memory",
    "versions",
]

PACKAGES = (
    "evalsuite",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "faster-coco-eval",
    "lightning-fabric",
    "detectron2",
)


def cache_root() -> Path:
    """The folder of all that is kept between runs (features, digests, demo worlds): ``EVALSUITE_CACHE``, or
    ``~/.cache/evalsuite``. Raises as :func:`expanded`."""
    return expanded(os.environ.get("EVALSUITE_CACHE") or "~/.cache/evalsuite", "EVALSUITE_CACHE")


def data_root() -> Path | None:
    """The folder of the data sets that ``EVALSUITE_DATA`` names, if it names one. Raises as :func:`expanded`."""
    root = os.environ.get("EVALSUITE_DATA")
    return expanded(root, "EVALSUITE_DATA") if root else None


def expanded(path: str | Path, name: str) -> Path:
    """A path with ``~`` or ``~user`` at its beginning expanded, as a shell does only where neither quotes nor a file
    of settings keep it from it. Raises :class:`evalsuite.UsageError` where there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{name}: {path} is no folder",
            cause=str(error),
            fix=f"give {name} a path without ~, which is not known here",
        ) from error


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of the packages that a score may depend on; those that are not installed are left out."""
    installed = {}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def pick_device(name: str) -> torch.device:
    """The device of a name such as ``cpu`` or ``cuda:1``; of ``auto``, a GPU where there is one.

    Raises :class:`evalsuite.ResourceError` where it cannot be used.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ResourceError(
            f"device {name!r} cannot be used",
            cause=str(error).splitlines()[0],
            fix="--device auto, or see: evalsuite doctor",
        ) from error
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """Interpreter, system, packages, device and threads, as plain JSON values."""
    import torch

    return {
        "python": platform.python_version(), "platform": platform.platform(), "packages": versions(),
        "device": str(device), "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory in MiB: of this process (``host``), and of a GPU since :func:`reset_peak_memory` (``device``)."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    if device.type == "cuda":
        import torch

        peak["device"] = torch.cuda.max_memory_allocated(device) / 2**20
    return peak


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure a GPU's peak memory anew; a process's own cannot be."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
