"""The site's pages: escaped, self-contained, linked; the same table in JSON and CSV; served to this machine alone."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evalsuite.board.site import build, serve
from evalsuite.board.table import Board, collect
from evalsuite.cli import app
from evalsuite.errors import RegressionError, ResourceError

Write = Callable[..., Path]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


@pytest.fixture
def board(write: Write, tmp_path: Path) -> Board:
    root = tmp_path / "results"
    for place, name in enumerate(("alpha", "beta", "gamma")):
        for task in ("cifar10", "voc"):
            for seed in (0, 1):
                write(root, name, 0.9 - 0.1 * place + 0.001 * seed, task=task, seed=seed, command=f"run {name}")
    write(root, "delta", 0.4, demo=True)
    return collect(
        [root], [{"system": "X", "backbone": "R50", "task": "t", "metric": "top-1", "value": 1.0, "source": "s"}]
    )


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name.startswith("on"):
                self.handlers.append(name)


def test_every_link_leads_to_a_page_of_the_site(board: Board, tmp_path: Path):
    index = build(board, tmp_path / "site")
    pages = list(index.parent.rglob("*.html"))
    assert len(pages) == 1 + 3 + 2
    for page in pages:
        for link in _Page(page.read_text()).links:
            assert link == "data:," or (page.parent / link).resolve().is_file(), link
    data = json.loads(re.search(r'id="data">(.*?)</script>', index.read_text()).group(1))
    for linked in (*data["columns"], *data["backbones"]):
        assert (index.parent / linked["link"]).is_file()


def test_pages_ask_for_nothing_from_elsewhere(board: Board, tmp_path: Path):
    index = build(board, tmp_path / "site")
    for page in index.parent.rglob("*.html"):
        text = page.read_text()
        assert "default-src 'none'" in unescape(text)
        assert not re.search(r"(https?:)?//[a-z]", text.replace("http://www.w3.org", ""))


def test_what_strangers_wrote_is_text(write: Write, tmp_path: Path):
    root = tmp_path / "results"
    write(root, EVIL, 0.5, provenance={"recipe": EVIL, "note": EVIL}, command=EVIL, identity="c" * 64)
    write(root, "other", 0.6)
    index = build(collect([root]), tmp_path / "site", title=EVIL)
    for page in index.parent.rglob("*.html"):
        parsed = _Page(page.read_text())
        assert parsed.tags.count("script") == (2 if page == index else 0)
        assert "img" not in parsed.tags
        assert not parsed.handlers
    assert all(re.fullmatch(r"[a-z0-9-]+\.html", page.name) for page in index.parent.rglob("*.html"))


def test_the_json_and_the_csv_hold_the_board(board: Board, tmp_path: Path):
    index = build(board, tmp_path / "site")
    content = json.loads((index.parent / "leaderboard.json").read_text())
    assert content == json.loads(json.dumps(board.to_json()))
    assert len((index.parent / "leaderboard.csv").read_text().splitlines()) == 1 + 3 * 2


def test_results_that_are_not_ranked_and_published_numbers_stand_apart(board: Board, tmp_path: Path):
    text = build(board, tmp_path / "site").read_text()
    assert "1 results are not ranked" in text
    assert "a demo world" in text
    assert "not ranked, and not comparable" in " ".join(text.split())
    assert "delta" not in json.dumps(json.loads(re.search(r'id="data">(.*?)</script>', text).group(1)))


def test_the_server_is_for_this_machine(board: Board, tmp_path: Path):
    index = build(board, tmp_path / "site")
    with serve(index.parent, 0) as server:
        assert server.server_address[0] == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        port = server.server_address[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/index.html") as answer:
            assert b"Leaderboard" in answer.read()
        with pytest.raises(ResourceError, match=f"port {port} cannot be used"):
            serve(index.parent, port)
        server.shutdown()
        thread.join()


def test_a_link_leads_nobody_out_of_the_site(board: Board, tmp_path: Path):
    index = build(board, tmp_path / "site")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (index.parent / "key").symlink_to(tmp_path / "secret" / "key")
    (index.parent / "folder").symlink_to(tmp_path / "secret")
    (index.parent / "again.html").symlink_to(index)
    with serve(index.parent, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_address[1]}"
        for path in ("key", "folder/key", "folder/", "../secret/key", "%2e%2e/secret/key"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{at}/{path}")
        with urllib.request.urlopen(f"{at}/again.html") as answer:
            assert b"Leaderboard" in answer.read()
        server.shutdown()


def test_the_command_line_builds_and_checks(board: Board, write: Write, tmp_path: Path):
    run = CliRunner()
    done = run.invoke(app, ["leaderboard", "build", str(tmp_path / "results"), "--out", str(tmp_path / "site")])
    assert done.exit_code == 0
    assert "3 backbones, 2 columns" in done.stdout
    assert "Published numbers" in (tmp_path / "site" / "index.html").read_text()
    write(tmp_path / "old", "net", 0.9)
    write(tmp_path / "new", "net", 0.8)
    ask = ["leaderboard", "check", str(tmp_path / "new"), "--baseline", str(tmp_path / "old"), "--fail-if-worse"]
    assert run.invoke(app, [*ask, "cifar10:0.2"]).exit_code == 0
    worse = run.invoke(app, [*ask, "cifar10:0.05"])
    assert isinstance(worse.exception, RegressionError)
