"""One process at a time, whoever is killed; and who it is."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import filelock
import pytest

from evalsuite.errors import ResourceError
from evalsuite.locks import Holder, holder, locked
from evalsuite.progress import Progress

FORK = multiprocessing.get_context("fork")


def heard() -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress(stream=stream), stream


def enter(path: Path) -> None:
    with locked(path, Progress(quiet=True), "work", wait=False):
        pass


def held_in_a_child(path: Path, **options):
    """A process that holds the lock until it is killed."""
    ready = FORK.Event()

    def hold() -> None:
        with locked(path, Progress(quiet=True), "work", wait=False, **options):
            ready.set()
            time.sleep(60)

    process = FORK.Process(target=hold)
    process.start()
    assert ready.wait(30)
    return process


def killed(process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_it_is_held_inside_the_block_and_nothing_is_left_of_it(tmp_path):
    path = tmp_path / "a" / "b" / "cell.lock"
    progress, stream = heard()
    with locked(path, progress, "work", wait=False):
        note = json.loads(path.read_text())
        assert (note["pid"], bool(note["host"]), bool(note["since"])) == (os.getpid(), True, True)
        assert holder(path) == Holder(**note)
        with pytest.raises(ResourceError, match="work is being done by another process") as refusal:
            enter(path)
        assert refusal.value.code == 7
        assert f"process {os.getpid()} on " in refusal.value.cause
        assert str(path) in refusal.value.cause
    assert list(tmp_path.iterdir()) == []
    assert holder(path) is None
    assert stream.getvalue() == ""


def test_folders_that_hold_something_or_were_there_stay(tmp_path):
    (tmp_path / "there").mkdir()
    enter(tmp_path / "there" / "x.lock")
    with locked(tmp_path / "a" / "b" / "x.lock", Progress(quiet=True), "work", wait=False):
        (tmp_path / "a" / "kept").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "kept", "there"]


def test_a_second_process_waits_says_for_whom_and_goes_on(tmp_path):
    path, (progress, stream) = tmp_path / "new" / "cell.lock", heard()
    process = held_in_a_child(path)
    timer = threading.Timer(0.3, killed, [process])
    timer.start()
    with locked(path, progress, "work", wait=True, within=tmp_path):
        assert not process.is_alive()
        assert holder(path).pid == os.getpid()
    timer.join()
    first, *others = stream.getvalue().splitlines()
    assert first.startswith(f"work: waiting for process {process.pid} on ")
    assert any(f"process {process.pid} on " in line and "was killed at it" in line for line in others)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_may_vanish_with_the_one_that_is_waited_for(tmp_path):
    path = tmp_path / "new" / "deep" / "cell.lock"
    inside, out = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(path, Progress(quiet=True), "work", wait=False, within=tmp_path):
            inside.set()
            out.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)
    threading.Timer(0.3, out.set).start()
    progress, stream = heard()
    with locked(path, progress, "work", wait=True, within=tmp_path):
        assert path.exists()
    thread.join()
    assert "killed" not in stream.getvalue()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_next_one_hears_of_a_process_that_was_killed_once(tmp_path, number):
    path = tmp_path / "cell.lock"
    process = held_in_a_child(path)
    os.kill(process.pid, number)
    process.join()
    assert holder(path) is None
    for times in (1, 0):
        progress, stream = heard()
        with locked(path, progress, "work", wait=False):
            pass
        assert stream.getvalue().count(f"warning: work: process {process.pid} on ") == times


@pytest.mark.parametrize("note", ["", "{", "[]", '{"pid": "x"}', "\x00" * 20])
def test_a_note_that_is_not_whole_hinders_nobody(tmp_path, note):
    path = tmp_path / "cell.lock"
    path.write_text(note)
    with locked(path, Progress(quiet=True), "work", wait=False):
        path.write_text(note)  # as the holder has it while it writes
        assert str(holder(path)) == "another process"
        with pytest.raises(ResourceError, match="another process holds"):
            enter(path)


def test_children_do_not_hold_it_on(tmp_path):
    """A data worker outlives a trainer that was killed for some seconds."""
    path, (reading, writing) = tmp_path / "cell.lock", os.pipe()

    def hold() -> None:
        with locked(path, Progress(quiet=True), "work", wait=False):
            if os.fork() == 0:
                os.write(writing, str(os.getpid()).encode())
            time.sleep(60)

    process = FORK.Process(target=hold)
    process.start()
    child = int(os.read(reading, 20))
    try:
        killed(process)
        with locked(path, Progress(quiet=True), "work", wait=False):
            os.kill(child, 0)  # it is alive
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_in_the_file_system_it_is_said_and_work_goes_on(tmp_path, monkeypatch, number):
    def none(self) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.UnixFileLock, "_acquire", none)
    progress, stream = heard()
    (tmp_path / "cell.lock").write_text(json.dumps({"pid": 12, "host": "far", "since": "noon"}))
    with locked(tmp_path / "cell.lock", progress, "work", wait=True):
        pass
    assert "knows no locks" in stream.getvalue()
    assert "process 12 on far, since noon, may still be at it" in stream.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written"):
        enter(tmp_path / "file" / "cell.lock")
