"""One result is one cell, backbone x task x protocol x seed, in one JSON file that is written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from evalsuite.errors import DataError
from evalsuite.files import write_text

__all__ = [
    "BY_FILE_SIZES",
    "SCHEMA",
    "BackboneRecord",
    "ProtocolRecord",
    "Result",
    "Score",
    "arrays",
    "cell_files",
    "cell_path",
    "read",
    "read_all",
    "read_arrays",
    "validated",
]

SCHEMA = "1.0"
BY_FILE_SIZES = "made before data fingerprints were of content, so that nothing says what its images held"
LARGEST = 64 << 20  # bytes of a result file
UNPACKED = 512 << 20  # bytes of the arrays in one file
LONGEST = 1_000_000  # characters of a text
DEEPEST = 30  # levels of lists and objects
GREATEST = 1e100  # of what is measured: squares and sums of such numbers are numbers too


def _text(value: str) -> str:
    """Text that can be written to a file: a lone surrogate cannot."""
    if len(value) > LONGEST:
        raise ValueError(f"text of {len(value)} characters; {LONGEST} are taken")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("text with a lone surrogate, which no file can hold")
    return value


def _whole(value: int) -> int:
    if abs(value) >= 2**63:
        raise ValueError("a whole number of more than 64 bits")
    return value


def _measured(value: float) -> float:
    if abs(value) > GREATEST:
        raise ValueError(f"{value} is more than anything measures")
    return value


def _plain(value: Any) -> Any:
    """Any JSON, of finite numbers, text that can be written, and so many levels."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} levels deep")
        below: list[Any] = []
        for inner in level:
            if isinstance(inner, str):
                if len(inner) > LONGEST or not inner.isascii():  # a call for each text would be half of reading
                    _text(inner)
            elif isinstance(inner, int):
                if inner.bit_length() > 63:
                    _whole(inner)
            elif isinstance(inner, float):
                if not math.isfinite(inner):
                    raise ValueError(f"{inner} is no number")
            elif isinstance(inner, dict):
                below.extend(inner)
                below.extend(inner.values())
            elif isinstance(inner, list | tuple):
                below.extend(inner)
        level = below
    return value


Text = Annotated[str, AfterValidator(_text)]
Whole = Annotated[int, AfterValidator(_whole)]
Measured = Annotated[float, AfterValidator(_measured)]
Json = Annotated[dict[str, Any], AfterValidator(_plain)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True)


class Score(_Record):
    """A metric's value with its interval; None where it is undefined on the data."""

    value: Measured | None
    low: Measured | None = None
    high: Measured | None = None
    level: float = Field(default=0.95, gt=0, lt=1)
    higher_is_better: bool = True


class BackboneRecord(_Record):
    """Which weights were evaluated.

    ``identity`` is :attr:`evalsuite.Backbone.identity`. ``parameters`` counts those that features depend on, so no
    classifier that came with the file; ``flops`` are of one image.
    """

    name: Text
    request: Text
    identity: Text
    spec: Json
    parameters: Annotated[Whole, Field(ge=0)]
    flops: Annotated[Whole, Field(ge=0)] | None = None
    load: Json = Field(default_factory=dict)
    provenance: Json = Field(default_factory=dict)


class ProtocolRecord(_Record):
    """Which recipe. Results share a column only if their hashes are equal.

    ``ranked``: whether results by it may be ranked at all; those of a smoke test may not. ``seeded``: whether the seed
    can move a score; where it cannot, runs of several seeds are one run.
    """

    id: Text
    version: Whole
    hash: Text
    modified: tuple[Text, ...] = ()
    ranked: bool = True
    seeded: bool = True
    fields: Json = Field(default_factory=dict)


class Result(_Record):
    """A cell. ``scores`` hold the promised metrics; a failed cell has ``error`` instead.

    ``limited``, ``demo``, ``trusted``, ``partial``, a modified protocol and one that is not for ranking are reasons
    never to rank a result.
    ``files`` are names of files beside the cell (figures, predictions, replicates).
    """

    schema_version: Text = SCHEMA
    status: Literal["ok", "failed"]
    backbone: BackboneRecord
    task: Text
    task_version: Whole
    protocol: ProtocolRecord
    engine: Text | None = None
    engine_version: Text | None = None
    seed: Whole
    primary: Text
    scores: dict[Text, Score] = Field(default_factory=dict)
    selected: Json = Field(default_factory=dict)
    details: Json = Field(default_factory=dict)
    data: Json = Field(default_factory=dict)
    files: dict[Text, Text] = Field(default_factory=dict)
    limited: Whole | None = None
    demo: bool = False
    trusted: bool = False
    partial: bool = False
    warnings: tuple[Text, ...] = ()
    error: Text | None = None
    error_code: Whole = 0
    timings: dict[Text, Measured] = Field(default_factory=dict)
    peak_memory_mb: dict[Text, Measured] = Field(default_factory=dict)
    environment: Json = Field(default_factory=dict)
    command: Text = ""
    created: Text

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

    @property
    def by_file_sizes(self) -> bool:
        """Whether its data fingerprint is of files' names and sizes, as all were before they were of contents: equal
        ones do not say that the data were the same."""
        return re.fullmatch("[0-9a-f]{16}-[0-9a-f]{16}", str(self.data.get("fingerprint"))) is not None

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


def validated(content: Any) -> Result:
    """A result of what a JSON file holds. Raises :class:`ValueError` for anything else, and for another schema."""
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version is None:
        raise ValueError("no schema version")
    if not isinstance(version, str) or not _is_ours(version):
        raise ValueError(f"schema version {str(version)[:20]!r}; this version reads {SCHEMA}")
    return Result.model_validate(content)


def _is_ours(version: str) -> bool:
    return version.partition(".")[0] == SCHEMA.partition(".")[0]


def _parsed(text: bytes) -> Result:
    """:func:`validated` of JSON text, in one pass, since thousands may be read; what fails says why by the long way."""
    with suppress(ValueError):
        result = Result.model_validate_json(text)
        if "schema_version" in result.model_fields_set and _is_ours(result.schema_version):
            return result
    return validated(json.loads(text.decode()))


def read(path: str | Path) -> Result:
    """Read a cell back. Raises :class:`DataError` for anything that is not one."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > LARGEST:
            raise ValueError(f"{status.st_size >> 20} MiB; {LARGEST >> 20} MiB are taken")
        with open(path, "rb") as file:
            return _parsed(file.read())
    except (OSError, ValueError, RecursionError) as error:
        first = str(error).splitlines()
        raise DataError(
            f"{path} is not a result of this suite",
            cause=" ".join(first[:3]),
            fix="leave it out, or write it again with evalsuite run",
        ) from error


def cell_files(out: str | Path) -> list[Path]:
    """The files of all cells below a folder, sorted."""
    return sorted(Path(out).rglob("seed-*.json"))


def read_all(out: str | Path) -> Iterator[tuple[Path, Result]]:
    """Every cell below a folder, sorted by path. Raises as :func:`read` at the first that is none."""
    for path in cell_files(out):
        yield path, read(path)


def arrays(path: Path, result: Result, name: str) -> dict[str, npt.NDArray[Any]]:
    """The arrays in the file ``name`` ("samples", "predictions") beside the cell at ``path``; none where it has none.

    Raises :class:`DataError` where they are damaged, or unpack to more than 512 MiB.
    """
    file = result.files.get(name)
    if file is None:
        return {}
    where = path.with_name(Path(file).name)  # beside the cell, whatever the name says
    try:
        return read_arrays(where)
    except Exception as error:  # a broken archive raises nearly anything
        raise DataError(
            f"{where} cannot be read",
            cause=f"{type(error).__name__}: {error}",
            fix=f"remove {path} and evaluate again",
        ) from error


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an ``.npz`` file, nothing in it unpickled. Raises :class:`ValueError`, or what numpy does."""
    if not path.is_file():
        raise ValueError("there is no such file")
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > UNPACKED:
        raise ValueError(f"{size / 2**20:.0f} MiB unpacked; {UNPACKED >> 20} MiB are taken")
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
