"""Files of strangers are gone through in child processes, many in each; what ends one, or makes it grow, is found by
going through its files one by one."""

from __future__ import annotations

import gc
import hashlib
import os
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from evalsuite.hooks import Registry

MANY = 40  # files of a child
SPARE = 400 << 20  # bytes that a file of kilobytes may take, with what is computed with it
SECONDS = 600  # for a file, on a machine under load


class File(NamedTuple):
    """A file's bytes, and the text of a ``config.json`` beside it ("" for none)."""

    content: bytes
    beside: str = ""


Consume = Callable[[Path, File, Registry], None]  # raises where a file did what it must not


class Files:
    """Files, given one by one, which ``consume`` goes through."""

    def __init__(self, consume: Consume, registry: Registry, spare: int = SPARE) -> None:
        self._consume, self._registry, self._spare = consume, registry, spare
        self._held: list[File] = []
        self.faults: list[str] = []
        self.count, self.growth = 0, 0

    def add(self, content: bytes, beside: str = "") -> None:
        self._held.append(File(content, beside))
        if len(self._held) == MANY:
            self.finish()

    def finish(self) -> None:
        """Go through what is held."""
        held, self._held = self._held, []
        self.count += len(held)
        fault = self._fault(held)
        if fault and len(held) > 1:
            alone = [(file, why) for file in held if (why := self._fault([file]))]
            if not alone and "MB" not in fault:  # many files may take more than one may
                self.faults.append(
                    f"{fault}\nof {len(held)} files together, of none alone:\n" + "\n".join(map(_shown, held))
                )
            self.faults += [f"{why}\nof {_shown(file)}" for file, why in alone]
        elif fault:
            self.faults.append(f"{fault}\nof {_shown(held[0])}")

    def _fault(self, files: list[File]) -> str:
        """What a child that goes through them did that it must not; "" for nothing."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            self._go_through(files, writing)
        os.close(writing)
        with open(reading, encoding="utf-8", errors="replace") as pipe:
            before, _, told = pipe.read().partition("\n")
        _, status, usage = os.wait4(child, 0)
        if os.WIFSIGNALED(status):
            return f"signal {os.WTERMSIG(status)}"
        if status:
            return told or f"exit {os.WEXITSTATUS(status)}"
        growth = 1024 * (usage.ru_maxrss - int(before))
        self.growth = max(self.growth, growth)
        return f"it took {growth >> 20} MB" if growth > self._spare else ""

    def _go_through(self, files: list[File], pipe: int) -> None:
        """As a child: 0 where all are harmless, else 1 and the traceback."""
        gc.freeze()  # memory of the parent's garbage, given back here, would hide what a file takes
        status = 1
        try:
            os.write(pipe, b"%d\n" % resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            with tempfile.TemporaryDirectory() as folder:
                for index, file in enumerate(files):
                    signal.alarm(SECONDS)
                    own = Path(folder) / str(index)
                    own.mkdir()
                    self._consume(own, file, self._registry)
            status = 0
        except BaseException:
            os.write(pipe, traceback.format_exc().encode("utf-8", "backslashreplace"))
        finally:
            os._exit(status)


def _shown(file: File) -> str:
    """Where its bytes are kept, and what lay beside it."""
    name = f"evalsuite-fuzz-{hashlib.sha256(file.content).hexdigest()[:16]}"
    kept = Path(tempfile.gettempdir()) / name
    kept.write_bytes(file.content)
    return f"{kept} ({len(file.content)} bytes), beside it {file.beside!r}"


@pytest.fixture
def files(request: pytest.FixtureRequest, registry: Registry) -> Iterator[Files]:
    """Those that a test adds, gone through by its module's ``consume``; all are by the end of the test."""
    added = Files(request.module.consume, registry)
    yield added
    added.finish()
    print(f"{request.node.name}: {added.count} files, of which {MANY} took at most {added.growth >> 20} MB")
    if added.faults:
        pytest.fail(f"{len(added.faults)} files do harm, the first by\n{added.faults[0]}", pytrace=False)
