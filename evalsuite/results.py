"""One result is one cell, backbone x task x protocol x seed, in one JSON file that is written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evalsuite.errors import DataError
from evalsuite.files import write_text

__all__ = ["SCHEMA", "BackboneRecord", "ProtocolRecord", "Result", "Score", "arrays", "cell_path", "read", "read_all"]

SCHEMA = "1.0"


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True)


class Score(_Record):
    """A metric's value with its interval; None where it is undefined on the data."""

    value: float | None
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    higher_is_better: bool = True


class BackboneRecord(_Record):
    """Which weights were evaluated.

    ``identity`` is the sha256 of the tensors. ``parameters`` counts those that features depend on, so no classifier
    that came with the file; ``flops`` are of one image.
    """

    name: str
    request: str
    identity: str
    spec: dict[str, Any]
    parameters: int
    flops: int | None = None
    load: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)


class ProtocolRecord(_Record):
    """Which recipe. Results share a column only if their hashes are equal.

    ``ranked``: whether results by it may be ranked at all; those of a smoke test may not.
    """

    id: str
    version: int
    hash: str
    modified: tuple[str, ...] = ()
    ranked: bool = True
    fields: dict[str, Any] = Field(default_factory=dict)


class Result(_Record):
    """A cell. ``scores`` hold the promised metrics; a failed cell has ``error`` instead.

    ``limited``, ``demo``, ``trusted``, ``partial``, a modified protocol and one that is not for ranking are reasons
    never to rank a result.
    ``files`` are names of files beside the cell (figures, predictions, replicates).
    """

    schema_version: str = SCHEMA
    status: Literal["ok", "failed"]
    backbone: BackboneRecord
    task: str
    task_version: int
    protocol: ProtocolRecord
    engine: str | None = None
    engine_version: str | None = None
    seed: int
    primary: str
    scores: dict[str, Score] = Field(default_factory=dict)
    selected: dict[str, Any] = Field(default_factory=dict)
    details: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    limited: int | None = None
    demo: bool = False
    trusted: bool = False
    partial: bool = False
    warnings: tuple[str, ...] = ()
    error: str | None = None
    error_code: int = 0
    timings: dict[str, float] = Field(default_factory=dict)
    peak_memory_mb: dict[str, float] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    command: str = ""
    created: str

    @property
    def ranked(self) -> bool:
        """Whether this result may stand on a leaderboard."""
        flags = (
            self.limited is not None,
            self.demo,
            self.trusted,
            self.partial,
            bool(self.protocol.modified),
            not self.protocol.ranked,
        )
        return self.status == "ok" and not any(flags)

    def write(self, path: Path) -> None:
        """Write atomically: fields in the order of the schema, scores in that of the task, two spaces, UTF-8."""
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=2) + "\n")


def cell_path(
    out: Path,
    name: str,
    identity: str,
    task: str,
    protocol: ProtocolRecord,
    seed: int,
    variant: tuple[str, ...] = (),
) -> Path:
    """Where a cell lives: ``<out>/results/<backbone>-<sha8>/<task>@<protocol>-<version>[+variant]/seed-<n>.json``.

    ``variant`` keeps apart what must not overwrite each other: a modified protocol, another engine, other data,
    a limit, the demo world.
    """
    recipe = "+".join([f"{task}@{protocol.id}-{protocol.version}", *variant])
    return out / "results" / f"{_safe(name)}-{identity[:8]}" / _safe(recipe) / f"seed-{seed}.json"


def _safe(name: str) -> str:
    return re.sub(r"[^\w.@+=-]+", "-", name).strip("-.") or "unnamed"


def read(path: str | Path) -> Result:
    """Read a cell back. Raises :class:`DataError` for anything that is not one."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        major = str(content.get("schema_version", "")).partition(".")[0] if isinstance(content, dict) else ""
        if major != SCHEMA.partition(".")[0]:
            raise ValueError(f"schema version {content.get('schema_version')!r}" if major else "no schema version")
        return Result.model_validate(content)
    except (OSError, ValueError, ValidationError) as error:
        first = str(error).splitlines()
        raise DataError(
            f"{path} is not a result of this suite",
            cause=" ".join(first[:3]),
            fix="leave it out, or write it again with evalsuite run",
        ) from error


def read_all(out: str | Path) -> Iterator[tuple[Path, Result]]:
    """Every cell under a folder, sorted by path."""
    for path in sorted(Path(out).rglob("seed-*.json")):
        yield path, read(path)


def arrays(path: Path, result: Result, name: str) -> dict[str, npt.NDArray[Any]]:
    """The arrays in the file ``name`` ("samples", "predictions") beside the cell at ``path``; none where it has none.

    Raises :class:`DataError` where they are damaged.
    """
    file = result.files.get(name)
    if file is None:
        return {}
    where = path.with_name(Path(file).name)  # beside the cell, whatever the name says
    try:
        with where.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception as error:  # a broken archive raises nearly anything
        raise DataError(
            f"{where} cannot be read",
            cause=f"{type(error).__name__}: {error}",
            fix=f"remove {path} and evaluate again",
        ) from error
