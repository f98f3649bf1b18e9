"""A file is there whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.errors import ResourceError, UsageError
from evalsuite.files import atomic, forget_partials, is_aside, room_for, set_aside, writable, writable_file, write_text


def test_the_file_takes_its_place_only_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "cell.json"
    with atomic(path) as partial:
        partial.write_bytes(b"whole")
        assert not path.exists()
        assert partial.parent == path.parent
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_the_old_file_and_no_litter(tmp_path, error):
    path = tmp_path / "cell.json"
    path.write_text("old")

    def fail() -> None:
        with atomic(path) as partial:
            partial.write_text("half a new o")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_file_is_replaced_whole_even_while_it_is_being_read(tmp_path):
    path = tmp_path / "cell.json"
    path.write_text("old" * 1000)
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old" * 1000
    assert path.read_text() == "new"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_mode_is_that_of_any_new_file(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "cell.json", "{}")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cell.json").stat().st_mode) == mode


class Crowded(Exception):
    """A writer's own words for a full disk."""


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(122, "quota"), Crowded("I/O error: x (os error 28)")]
)
def test_a_full_disk_is_told_whoever_noticed_it(tmp_path, error):
    def write() -> None:
        with atomic(tmp_path / "cell.json"):
            try:
                raise error
            finally:
                raise RuntimeError("unexpected position")

    with pytest.raises(ResourceError, match=r"cell\.json cannot be written") as refusal:
        write()
    assert refusal.value.code == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [PermissionError(13, "no"), RuntimeError("bug")])
def test_other_errors_are_left_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as found, room_for(tmp_path / "log"):
        raise error
    assert found.value is error


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("state.pt", ".state.pt", ".other.pt.x.partial", "state.pt.partial")]
    for path in (*kept, tmp_path / ".state.pt.a1.partial", tmp_path / ".state.pt.b2.partial"):
        path.write_text("x")
    forget_partials(tmp_path / "state.pt")
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    forget_partials(tmp_path / "nowhere" / "state.pt")


def test_what_another_user_left_stays(tmp_path, monkeypatch):
    partial = tmp_path / ".state.pt.a1.partial"
    partial.touch()

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        forget_partials(tmp_path / "state.pt")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", denied)
        forget_partials(tmp_path / "state.pt")
    assert partial.exists()


def test_a_relative_path_in_the_working_directory_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("cell.json", "{}")
    assert Path("cell.json").read_text() == "{}"


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")))
def test_text_comes_back_as_it_was(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "café.txt"
    write_text(path, text)
    assert path.read_text(encoding="utf-8") == text


def test_a_folder_to_be_is_tried_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "a" / "b", tmp_path / "there" / "c"):
        writable(folder)
    writable_file(tmp_path / "there" / "x.html")
    writable_file(tmp_path / "new" / "x.html")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_cannot_be_where_a_file_is(tmp_path, below):
    (tmp_path / "out.json").write_text("{}")
    with pytest.raises(UsageError, match=r"out\.json is a file"):
        writable(tmp_path / "out.json" / below)


def test_neither_where_a_link_leads_nowhere(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match="a link to nothing"):
        writable(tmp_path / "out")


def test_nor_a_file_where_a_folder_is(tmp_path):
    with pytest.raises(UsageError, match="it is a folder"):
        writable_file(tmp_path)


@pytest.mark.parametrize("folder", ["x" * 300, "nul\0", "/proc/new/er"])
def test_a_path_that_cannot_be_made_is_refused_with_what_the_system_says(tmp_path, folder):
    for check in (writable, lambda path: writable_file(path / "file")):
        with pytest.raises(ResourceError, match="the system says: "):
            check(tmp_path / folder)


@pytest.fixture
def sealed(tmp_path):
    """A folder nobody may write into: by its mode, or where the tests run as root by what root cannot change."""
    (tmp_path / "sealed").mkdir()
    (tmp_path / "sealed").chmod(0o555)
    if not os.access(tmp_path / "sealed", os.W_OK):
        yield tmp_path / "sealed"
    else:
        yield Path("/proc/self/fdinfo")
    (tmp_path / "sealed").chmod(0o755)


def test_without_the_permission_it_is_refused(sealed):
    with pytest.raises(ResourceError, match="cannot be written"):
        writable(sealed)
    with pytest.raises(ResourceError, match="cannot be written"):
        writable_file(sealed / "report.html")


def test_a_file_whose_folder_is_a_file_is_refused_and_another_error_is_not_taken_for_it(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(ResourceError, match=r"Not a directory|File exists"):
        write_text(tmp_path / "results" / "cell.json", "{}")
    (tmp_path / "other").mkdir()
    with pytest.raises(IsADirectoryError), atomic(tmp_path / "made" / "cell.json"):
        (tmp_path / "other").read_text()


def test_what_a_living_writer_writes_is_not_removed(tmp_path):
    with atomic(tmp_path / "state.pt") as partial:
        partial.write_text("half")
        forget_partials(tmp_path / "state.pt")
        assert partial.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_what_is_set_aside_keeps_its_content_and_takes_no_other_name(tmp_path):
    path = tmp_path / "state.pt"
    for text in ("one", "two"):
        path.write_text(text)
        there = set_aside(path)
        assert is_aside(there)
        assert there.read_text() == text
        assert not path.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.pt.aside-1", "state.pt.aside-2"]
    assert not any(is_aside(Path(name)) for name in ("state.pt", ".aside-1", "a.aside-", "a.aside-x"))


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Another process clears up in the moment between making and locking."""
    made, make = [], tempfile.mkstemp

    def and_cleared(**where):
        made.append(make(**where))
        if len(made) == 1:
            forget_partials(tmp_path / "a.json")
        return made[-1]

    monkeypatch.setattr(tempfile, "mkstemp", and_cleared)
    with atomic(tmp_path / "a.json") as partial:
        partial.write_text("whole")
        forget_partials(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "whole"
    assert len(made) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
