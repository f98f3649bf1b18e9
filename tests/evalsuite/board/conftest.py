"""Cells of results as they are on disk."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from evalsuite.results import BackboneRecord, ProtocolRecord, Result, Score, cell_path

numbers = itertools.count()


def write_cell(
    root: Path, name: str, value: float, half: float | None = 0.01, *, task: str = "cifar10", seed: int = 0,
    better: bool = True, **fields: object,
) -> Path:  # fmt: skip
    seeded = bool(fields.pop("seeded", True))
    protocol = ProtocolRecord(id="knn", version=1, hash=str(fields.pop("hash", "a" * 16)), seeded=seeded)
    interval = (None, None) if half is None else (value - half, value + half)
    identity = str(fields.pop("identity", hashlib.sha256(name.encode()).hexdigest()))
    provenance = fields.pop("provenance", {})
    content = {
        "status": "ok", "task": task, "task_version": 1, "protocol": protocol, "seed": seed, "primary": "top1",
        "backbone": BackboneRecord(
            name=name, request=name, identity=identity, spec={"arch": "timm:resnet18"}, parameters=11_000_000,
            provenance=provenance,
        ),
        "scores": {"top1": Score(value=value, low=interval[0], high=interval[1], higher_is_better=better)},
        "data": {"fingerprint": "f" * 32}, "created": "2026-11-21T00:00:00+00:00",
    }  # fmt: skip
    result = Result(**{**content, **fields})
    path = cell_path(root, name, identity, task, protocol, seed, (str(next(numbers)),) if seeded else ())
    result.write(path)
    return path


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    """``write(root, name, value, half, task=..., seed=..., ...)``: one cell below ``root``."""
    return write_cell
