"""The contract of the data room: names, errors, demo worlds that pass their own verification."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evalsuite.data
from evalsuite.data import parse, source
from evalsuite.data.coco import Coco
from evalsuite.data.voc import Voc
from evalsuite.errors import DataError, UsageError
from evalsuite.hooks import Registry


@pytest.fixture(scope="module")
def shelf() -> Registry:
    registry = Registry()
    evalsuite.data.evalsuite_register(registry)
    return registry


def test_everything_registered_keeps_the_contract(shelf: Registry, tmp_path: Path) -> None:
    for name in shelf.names("dataset"):
        found = source(shelf, name)
        assert found.name == name
        assert all(found.tree.splitlines())
        assert found.homepage.startswith("http") or found.generated
        assert found.licence
        assert found.citation
        if found.generated:
            continue
        with pytest.raises(DataError):
            found.locate(tmp_path / "empty")


def test_parse_finds_the_layout(shelf: Registry, tmp_path: Path) -> None:
    path = Voc().demo(tmp_path, images=2)
    assert parse(f"voc:{tmp_path}", shelf) == (Voc(official=False), path)
    assert parse(f"voc:{path / 'VOC2007'}", shelf) == (Voc(official=False), path / "VOC2007")


def test_parse_expands_home(shelf: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Coco().demo(tmp_path / "mine", images=2)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("coco:~/mine", shelf) == (Coco(official=False), path)


@pytest.mark.parametrize("text", ["", "voc", "voc:", ":x"])
def test_parse_refuses_what_is_no_scheme_and_path(shelf: Registry, text: str) -> None:
    with pytest.raises(UsageError) as told:
        parse(text, shelf)
    assert "coco:PATH" in told.value.fix


def test_parse_refuses_unknown_schemes_and_missing_paths(shelf: Registry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no dataset named 'cocoo'") as told:
        parse("cocoo:x", shelf)
    assert "coco" in told.value.fix
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError) as missing:
            parse(f"voc:{path}", shelf)
        assert missing.value.code == 3
        assert len(str(missing.value).splitlines()) == 3


def test_the_room_opens_without_torch() -> None:
    code = "import sys, evalsuite.data; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    root = Path(evalsuite.data.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


class _Steps:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def track(self, what: str, total: int) -> Any:
        from contextlib import nullcontext

        seen = self.seen

        class Meter:
            def update(self, done: int) -> None:
                seen.append((what, done, total))

        return nullcontext(Meter())


def test_verify_tells_how_far_it_is(tmp_path: Path) -> None:
    steps: Any = _Steps()
    Coco().verify(Coco().demo(tmp_path, images=3), progress=steps)
    assert steps.seen == [("decode", i, 5) for i in range(1, 6)]


@pytest.mark.parametrize("layout", [Coco(), Voc()])
def test_a_demo_is_found_and_sound(layout: Any, tmp_path: Path) -> None:
    path = layout.demo(tmp_path, seed=3, images=24)
    assert layout.locate(tmp_path) == layout.locate(path) == path
    report = layout.verify(path)
    assert report.faults == []
    assert report.notes == []
    for split in layout.roles(path).values():
        assert len(layout.load(path, split)) >= 8


@pytest.mark.parametrize("layout", [Coco(), Voc()])
def test_a_demo_is_the_same_by_seed_and_written_once(layout: Any, tmp_path: Path) -> None:
    first = layout.demo(tmp_path / "a", seed=1, images=4)
    second = layout.demo(tmp_path / "b", seed=1, images=4)
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)
    times = {f: (first / f).stat().st_mtime_ns for f in files}
    assert layout.demo(tmp_path / "a", seed=1, images=4) == first
    assert {f: (first / f).stat().st_mtime_ns for f in files} == times
    split = layout.roles(first)["train"]
    before = layout.load(first, split).fingerprint
    layout.demo(tmp_path / "a", seed=2, images=4)
    assert layout.load(first, split).fingerprint != before
    layout.demo(tmp_path / "a", seed=2, images=6)
    assert len(layout.load(first, split)) > len(layout.load(second, split))
    assert [p.name for p in (tmp_path / "a").iterdir()] == [first.name]  # nothing is left beside it


@pytest.mark.parametrize("layout", [Coco(), Voc()])
def test_a_demo_never_replaces_data(layout: Any, tmp_path: Path) -> None:
    folder = tmp_path / layout.tree.partition("/")[0]
    folder.mkdir()
    (folder / "precious.jpg").touch()
    with pytest.raises(DataError, match="demo world cannot be written"):
        layout.demo(tmp_path)
    assert [p.name for p in folder.iterdir()] == ["precious.jpg"]


def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evalsuite.data import demo

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_save", fail)
    with pytest.raises(KeyboardInterrupt):
        Coco().demo(tmp_path, images=2)
    assert list(tmp_path.iterdir()) == []


def test_two_who_write_a_demo_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evalsuite.data import demo

    save: Callable[..., None] = demo._save
    nested = []

    def meanwhile(*args: Any) -> None:
        if not nested:
            nested.append(True)
            Coco().demo(tmp_path, images=2)  # another process, done before us
        save(*args)

    monkeypatch.setattr(demo, "_save", meanwhile)
    path = Coco().demo(tmp_path, images=2)
    assert Coco().verify(path).ok
    assert [p.name for p in tmp_path.iterdir()] == ["coco"]
