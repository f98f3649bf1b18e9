"""What goes through files in child processes finds those that do harm, among many that do none."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest


def consume(folder: Path, file: Any, registry: Any) -> None:
    if file.content == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if file.content == b"leave":
        os._exit(3)
    if file.content == b"raise":
        raise ValueError("of this file")
    if file.content == b"grow":
        assert b"x" * (256 << 20)
    if file.content == b"":
        raise MemoryError


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"crash", "signal 11"), (b"leave", "exit 3"), (b"raise", "ValueError: of this file"), (b"grow", "it took 2"),
     (b"", "MemoryError")],
)  # fmt: skip
def test_the_one_file_that_does_harm_is_found(files: Any, registry: Any, content: bytes, told: str):
    tried = type(files)(consume, registry, 48 << 20)
    for index in range(10):
        tried.add(content if index == 6 else b"%d" % index)
    tried.finish()
    (fault,) = tried.faults
    assert told in fault
    kept = Path(fault.rpartition("\nof ")[2].partition(" (")[0])
    assert kept.read_bytes() == content
    kept.unlink()
    assert tried.count == 10


def test_files_that_do_no_harm_are_counted(files: Any):
    for index in range(95):
        files.add(b"%d" % index)
    assert files.count == 80
    files.finish()
    assert (files.count, files.faults) == (95, [])
