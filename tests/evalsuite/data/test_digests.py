"""Data fingerprints are of what files hold: whatever sizes and times say, wherever the files lie, read once."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evalsuite.data.digests as module
from evalsuite.data.cifar import Stl10
from evalsuite.data.classification import Csv, Folder, Npz
from evalsuite.data.coco import Coco
from evalsuite.data.digests import data_session, digests, fingerprint, joined, loaded, marks, of_paths
from evalsuite.data.pairs import Pairs
from evalsuite.data.voc import Voc
from evalsuite.progress import Progress

LOUD = ["first.bmp", "below/second.bmp", "third.txt"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are opened to be digested."""
    names: list[str] = []

    def noted(path: str) -> Any:
        names.append(os.path.basename(path))
        return open_regular(path)

    open_regular = module.open_regular
    monkeypatch.setattr(module, "open_regular", noted)
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(LOUD):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * 50)
    return tmp_path / "data"


def replace_content(path: Path) -> None:
    """Other bytes, of the same number, and the time of modification set back."""
    before, content = path.stat(), bytearray(path.read_bytes())
    digit = re.search(rb'(?:"area": |<xmin>)\d+', content)
    content[digit.end() - 1 if digit else -1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def said(work: Callable[[], object], verify: bool = False) -> str:
    stream = io.StringIO()
    with data_session(Progress(stream=stream), verify):
        work()
    return stream.getvalue()


def test_a_digest_is_the_sha256_of_what_a_file_holds(folder: Path) -> None:
    expected = [sha256((folder / name).read_bytes()).hexdigest() for name in LOUD]
    assert marks(digests(folder, LOUD)) == expected
    assert marks(of_paths([folder / name for name in LOUD])) == expected
    assert marks(digests(folder, LOUD[::-1])) == expected[::-1]
    assert marks(digests(folder, [LOUD[0], LOUD[0]])) == expected[:1] * 2
    assert of_paths([]).shape == digests(folder, []).shape == (0, 32)


def test_files_are_opened_once(folder: Path, opened: list[str]) -> None:
    first = digests(folder, LOUD[:2])
    assert len(opened) == 2
    assert np.array_equal(digests(folder, LOUD)[:2], first)
    assert opened[2:] == ["third.txt"]
    digests(folder, LOUD)
    assert len(opened) == 3


def test_only_a_file_that_changed_is_opened_again_whatever_its_times_say(folder: Path, opened: list[str]) -> None:
    before = digests(folder, LOUD)
    replace_content(folder / LOUD[1])
    after = digests(folder, LOUD)
    assert opened[3:] == ["second.bmp"]
    assert (before != after).any(axis=1).tolist() == [False, True, False]
    (folder / "new").write_bytes((folder / LOUD[0]).read_bytes())  # another inode of the same size and time
    stat = (folder / LOUD[0]).stat()
    os.utime(folder / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (folder / "new").replace(folder / LOUD[0])
    assert np.array_equal(digests(folder, LOUD), after)
    assert opened[4:] == ["first.bmp"]


def test_a_file_written_within_one_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    seen = set()
    for content in range(20):
        (tmp_path / "a").write_bytes(bytes([content]))
        seen |= set(marks(digests(tmp_path, ["a"])))
    assert len(seen) == 20


def test_what_cannot_be_read_has_no_digest_until_it_can(folder: Path, opened: list[str]) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "zero").symlink_to("/dev/zero")
    names = ["gone", "pipe", "loop", "zero", "below", LOUD[0]]
    assert [bool(mark) for mark in marks(digests(folder, names))] == [False] * 5 + [True]
    (folder / "gone").write_bytes(b"here")
    assert marks(digests(folder, names))[0] == sha256(b"here").hexdigest()
    assert opened.count("first.bmp") == 1


def test_a_damaged_memory_is_left_out_with_a_line(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    expected = digests(folder, LOUD)
    (memory,) = (tmp_path / "cache" / "digests").iterdir()
    whole = memory.read_bytes()
    with np.load(memory) as arrays:
        parts = dict(arrays)
    damaged = [b"", b"no archive", whole[: len(whole) // 2], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]]
    for changes in ({"names": parts["names"][:-1]}, {"states": parts["states"][:2]}, {"digests": np.zeros(3)}, None):
        held = io.BytesIO()
        np.savez(held, **({**parts, **changes} if changes else {"other": np.array([object()], dtype=object)}))
        damaged.append(held.getvalue())
    for content in damaged[:4] + damaged[5:]:
        memory.write_bytes(content)
        opened.clear()
        text = said(lambda: np.testing.assert_array_equal(digests(folder, LOUD), expected))
        assert f"{memory} is damaged (" in text
        assert len(opened) == 3
        assert not said(lambda: digests(folder, LOUD))  # it was written anew
    assert len(opened) == 3


def test_what_a_killed_process_was_remembering_is_removed_by_the_next(folder: Path, tmp_path: Path) -> None:
    digests(folder, LOUD[:2])
    (memory,) = (tmp_path / "cache" / "digests").iterdir()
    memory.with_name(f".{memory.name}.a1b2.partial").write_bytes(b"half")
    digests(folder, LOUD)
    assert [path.name for path in memory.parent.iterdir()] == [memory.name]


def test_verifying_opens_every_file_once_a_session_and_tells_of_what_changed(
    folder: Path, tmp_path: Path, opened: list[str]
) -> None:
    expected = digests(folder, LOUD)
    assert said(lambda: [digests(folder, LOUD) for _ in range(3)], verify=True) == ""
    assert len(opened) == 6
    (memory,) = (tmp_path / "cache" / "digests").iterdir()
    with np.load(memory) as arrays:
        parts = dict(arrays)
    parts["digests"][1] ^= 1  # as if the disk had changed a file without a trace
    np.savez(memory, **parts)
    assert not np.array_equal(digests(folder, LOUD), expected)
    text = said(lambda: np.testing.assert_array_equal(digests(folder, LOUD), expected), verify=True)
    assert text.startswith(f"warning: 1 files in {folder} hold something else than before")
    assert np.array_equal(digests(folder, LOUD), expected)


def test_two_who_remember_at_once_leave_a_whole_memory(folder: Path) -> None:
    names = [f"{i}.bin" for i in range(64)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    expected = [sha256(name.encode()).hexdigest() for name in names]
    with ThreadPoolExecutor(8) as pool:
        parts = [names[i::8] for i in range(8)]
        for part, found in zip(parts, pool.map(lambda part: digests(folder, part), parts), strict=True):
            assert marks(found) == [expected[names.index(name)] for name in part]
    assert said(lambda: digests(folder, names)) == ""
    assert marks(digests(folder, names)) == expected


def test_digests_that_cannot_be_remembered_are_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "file" / "cache"))
    assert said(lambda: digests(folder, LOUD)).startswith("digests of data cannot be remembered: ")


def test_long_work_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Noted(Progress):
        def doing(self, what: str) -> Any:
            told.append(what)
            return super().doing(what)

    with data_session(Noted(quiet=True)):
        digests(folder, LOUD)
        digests(folder, LOUD)
    assert told == [f"digesting 3 of 3 files in {folder}"]


def test_many_files_are_digested_in_threads(tmp_path: Path) -> None:
    names = [f"{i}" for i in range(600)]
    for name in names:
        (tmp_path / name).write_text(name)
    assert marks(digests(tmp_path, names)) == [sha256(name.encode()).hexdigest() for name in names]


def test_the_last_splits_are_kept_within_a_session() -> None:
    made: list[str] = []

    def load(name: str) -> str:
        return loaded(name, lambda: made.append(name) or name)  # type: ignore[func-returns-value]

    assert [load("a"), load("a")] == ["a", "a"]
    assert made == ["a", "a"]
    with data_session(Progress(quiet=True)):
        with data_session(Progress(quiet=True)):
            load("a")
        assert [load("a"), load("b"), load("b"), load("a")] == ["a", "b", "b", "a"]
    assert made == ["a", "a", "a", "b", "a"]


def test_joined_parts_and_fingerprints_tell_their_parts() -> None:
    one = np.ones((1, 32), np.uint8)
    assert len({joined(["a"]), joined(["a"], one), joined(["a", "b"]), joined(["ab"]), joined(["a"], 2 * one)}) == 5
    assert fingerprint("a" * 64, "b" * 64) == f"content:{'a' * 16}-{'b' * 16}"


# --- layouts ----------------------------------------------------------------------------------------------------


def _npz(root: Path) -> Path:
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {f"{split}_images": rng.integers(0, 256, (4, 8, 8), np.uint8) for split in ("train", "test")}
    np.savez(root / "a.npz", **arrays, train_labels=np.arange(4) % 2, test_labels=np.arange(4) % 2)
    return root / "a.npz"


def _masks(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for name in "ab":
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / "images" / split / f"{name}.bmp")
            Image.fromarray(rng.integers(0, 2, (8, 8), np.uint8)).save(root / "masks" / split / f"{name}.bmp")
    (root / "classes.txt").write_text("ground\nthing\n")
    return root


LAYOUTS: dict[str, tuple[Any, Callable[[Path], Path], str, Sequence[str]]] = {
    "folder": (Folder(), lambda root: Folder().demo(root, images=4), "train", ["train/*/*.jpg"]),
    "csv": (Csv(), lambda root: Csv().demo(root, images=4), "train", ["train*.jpg"]),
    "coco": (
        Coco(False), lambda root: Coco().demo(root, images=2), "train2017", ["train2017/*.jpg", "*_train2017.json"],
    ),
    "voc": (
        Voc(False), lambda root: Voc().demo(root, images=2), "2007:trainval", ["VOC2007/*/*1.jpg", "VOC2007/*/*1.xml"],
    ),
    "masks": (Pairs(), _masks, "train", ["images/train/*.bmp", "masks/train/*.bmp"]),
    "npz": (Npz(), _npz, "train", ["*.npz"]),
    "stl": (Stl10(), lambda root: Stl10().demo(root, images=8), "train", ["train_X.bin"]),
}  # fmt: skip


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, str, Sequence[str]]:
    source, make, split, victims = LAYOUTS[request.param]
    return source, make(tmp_path / "here"), split, victims


def mark(source: Any, path: Path, split: str) -> tuple[str, str]:
    """What a result, and what the cache, know data by."""
    part = source.load(path, split)
    return getattr(part, "digest", part.fingerprint), part.fingerprint


def test_other_contents_of_the_same_size_and_time_are_other_data(layout: Any) -> None:
    source, path, split, victims = layout
    known = {mark(source, path, split)}
    folder = path if path.is_dir() else path.parent
    for count, victim in enumerate(victims, 2):
        replace_content(sorted(folder.rglob(victim))[0])
        known.add(mark(source, path, split))
        assert len({digest for digest, _ in known}) == len({print_ for _, print_ in known}) == count


def test_the_same_files_elsewhere_are_the_same_data(layout: Any, tmp_path: Path) -> None:
    source, path, split, _ = layout
    moved = shutil.copytree(tmp_path / "here", tmp_path / "there" / "copy", copy_function=shutil.copyfile)
    assert mark(source, moved / path.relative_to(tmp_path / "here"), split) == mark(source, path, split)


def test_only_files_that_are_read_are_digested(tmp_path: Path, opened: list[str]) -> None:
    path = Coco().demo(tmp_path, images=6)
    part = Coco().load(path, "train2017").limit(2)
    assert opened == []
    assert part.fingerprint
    assert sorted(opened) == sorted(record.path.name for record in part.records)
    opened.clear()
    masks = Pairs().load(_masks(tmp_path / "masks"), "train").limit(1)
    assert masks.fingerprint
    assert opened == ["a.bmp", "a.bmp"]
    opened.clear()
    few = Folder().load(Folder().demo(tmp_path, images=8), "train").limit(3)
    assert few.digest
    assert few.fingerprint
    assert len(opened) == 3
