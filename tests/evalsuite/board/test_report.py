"""The report: one file that asks for nothing, in which strangers' text is text and failures are not hidden."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from evalsuite.board.report import HEAVIEST, report
from evalsuite.cli import app
from evalsuite.errors import DataError

Write = Callable[..., Path]
EVIL = "</script><img src=x onerror=alert(1)>"


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def put(path: Path, **arrays: np.ndarray) -> None:
    np.savez(path.with_name("predictions.npz"), **arrays)


@pytest.fixture
def page(write: Write, tmp_path: Path) -> str:
    path = write(
        tmp_path, EVIL, 0.7, identity="d" * 64, selected={"C": 1.0, "validation_score": 0.8},
        files={"predictions": "predictions.npz", "sheet": "sheet.png", "large": "large.png", "gone": "gone.png"},
        details={
            "accuracy_by_class": {"cat": 0.9, EVIL: 0.1, "eel": None},
            "log": [{"step": s, "loss_a": 1 / s} for s in (1, 2)],
            "validation": [{"C": 10.0**k, "score": 0.5 + 0.1 * k} for k in range(4)],
            "precision_by_recall": {"0.50": [1.0, 0.5, 0.0]},
        },
        command=f"evalsuite run {EVIL}", warnings=(EVIL,), timings={"encode": 1.5},
    )  # fmt: skip
    put(
        path, labels=np.array([0, 0, 1, 1]), classes=np.array([[0, 1], [1, 0], [1, 0], [1, 0]]),
        scores=np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2]]), names=np.array(["cat", "dog"]),
    )  # fmt: skip
    Image.new("RGB", (2400, 600), (10, 200, 30)).save(path.with_name("sheet.png"))
    noise = np.random.default_rng(0).integers(0, 256, (1300, 2400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path.with_name("large.png"))
    write(tmp_path, "broken", 0.1, task="voc", status="failed", scores={}, error="RuntimeError: no disk")
    return report(tmp_path).read_text()


def test_it_holds_scores_plots_matrix_pictures_and_the_command(page: str):
    assert "0.7000" in page
    assert "0.6900&ndash;0.7100" in page
    assert page.count("<svg") == 4  # the sweep, the loss, and two precision-recall curves
    assert "validation score over C, the choice dashed" in page
    assert 'class="chosen"' in page
    cells = [int(n) for n in re.findall(r'--share:[\d.]+" title="[\d.%]+">(\d*)</td>', page) if n]
    assert cells == [1, 1, 2]
    assert "RuntimeError: no disk" in page
    assert "evalsuite run &lt;/script&gt;" in page


def test_it_asks_for_nothing_and_runs_nothing(page: str):
    tags = _Tags(page).found
    assert not [tag for tag, _ in tags if tag in ("script", "iframe", "object")]
    sources = [a.get("src") or "" for tag, a in tags if tag == "img"]
    assert len(sources) == 2
    assert all(source.startswith("data:image/") for source in sources)
    assert not [name for _, a in tags for name in a if name.startswith("on")]
    assert not re.search(r"https?://", page)


def test_pictures_are_made_small_or_named(page: str):
    sources = [a["src"] or "" for tag, a in _Tags(page).found if tag == "img"]
    assert all(len(source) < 1.4 * HEAVIEST for source in sources)
    assert "gone.png cannot be shown" in page


def test_marks_say_what_keeps_a_result_from_being_compared(write: Write, tmp_path: Path):
    write(tmp_path, "a", 0.5, demo=True, limited=7)
    text = report(tmp_path, tmp_path / "elsewhere.html").read_text()
    assert "A generated demo world" in text
    assert "Limited to 7 images" in text


def test_seeds_of_a_protocol_that_draws_nothing_are_one_result(write: Write, tmp_path: Path):
    for seed in (0, 1):
        write(tmp_path, "plain", 0.625, seed=seed, seeded=False)
        write(tmp_path, "drawn", 0.875, seed=seed)
    text = report(tmp_path).read_text()
    assert (text.count("knn-1: plain</h2>"), text.count("knn-1, seed 1: drawn</h2>")) == (1, 1)
    assert "seed" not in text.partition("knn-1: plain")[0].rpartition("<h2>")[2]


def test_damaged_arrays_cost_what_is_drawn_of_them(write: Write, tmp_path: Path):
    path = write(tmp_path, "a", 0.5, files={"predictions": "predictions.npz"})
    path.with_name("predictions.npz").write_bytes(b"PK\x03\x04 nothing")
    text = report(tmp_path).read_text()
    assert "the predictions cannot be shown" in text
    assert "0.5000" in text


@pytest.mark.parametrize(
    "details",
    [
        {"log": [1, 2]}, {"log": [{"step": "a", "loss": 1}, {"step": 2, "loss": 2}]}, {"curve": [{}]}, {"curve": [3]},
        {"precision_by_recall": {"0.5": 3}}, {"precision_by_recall": {"0.5": ["a", "b"]}}, {"validation": [3]},
        {"validation": [{"k": 1, "score": "a"}, {"k": 2, "score": "b"}]},
    ],
)  # fmt: skip
def test_odd_details_cost_what_is_drawn_of_them(write: Write, tmp_path: Path, details: dict):
    write(tmp_path, "a", 0.5, details=details | {"accuracy_by_class": {"cat": 0.5}})
    text = report(tmp_path).read_text()
    assert "cannot be shown" in text
    assert "accuracy by class" in text


def _claims(side: int) -> Callable[[Path], object]:
    """A PNG of one pixel whose header says that it has ``side`` times ``side``."""

    def make(path: Path) -> None:
        Image.new("L", (1, 1)).save(path, "PNG")
        content = bytearray(path.read_bytes())
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(content)

    return make


def _hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


def _postscript(path: Path) -> None:
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("large.png", _claims(8000), "it has 8000x8000 pixels"), ("bomb.png", _claims(40_000), "exceeds limit"),
        ("hole.png", _hole, "it has 1024 MiB"), ("eps.png", _postscript, "cannot identify image file"),
        ("tiff.png", lambda p: Image.new("L", (9, 9)).save(p, "TIFF"), "cannot identify image file"),
        ("png.gif", lambda p: Image.new("L", (9, 9)).save(p, "PNG"), "cannot identify image file"),
        ("cut.png", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(9)), "cannot be shown"),
        ("pipe.png", os.mkfifo, "there is no such file"),
    ],
)  # fmt: skip
def test_a_picture_that_is_none_costs_itself_alone(
    write: Write, tmp_path: Path, name: str, make: Callable[[Path], object], reason: str
):
    path = write(tmp_path, "a", 0.5, files={"bad": name, "good": "good.png"})
    make(path.with_name(name))
    Image.new("L", (9, 9)).save(path.with_name("good.png"))
    text = report(tmp_path).read_text()
    assert f"{name} cannot be shown" in text
    assert reason in text
    assert text.count("data:image/png") == 1


def test_files_outside_the_folder_are_not_read(write: Write, tmp_path: Path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (5, 5)).save(secret)
    write(tmp_path / "runs", "a", 0.5, files={"x": "../../../../secret.png"})
    assert "data:image" not in report(tmp_path / "runs").read_text()


def test_a_folder_without_results_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="holds no result"):
        report(tmp_path)


def test_the_command_line_writes_it(write: Write, tmp_path: Path):
    write(tmp_path, "a", 0.5)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0
    assert (tmp_path / "report.html").is_file()
    assert json.dumps("report.html")[1:-1] in done.stdout
