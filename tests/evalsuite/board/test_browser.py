"""Leaderboard and report in a real browser: sorting, filtering, phone and dark, and no word to anybody else."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evalsuite.board.report import report
from evalsuite.board.site import build, serve
from evalsuite.board.table import collect

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("needs the program chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")


@pytest.fixture(scope="module")
def site(write: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("board")
    for place in range(130):
        method = ("simclr", "byol")[place % 2]
        for task in ("cifar10", "voc"):
            value = 0.2 + 0.005 * (place if task == "voc" else 129 - place)
            write(root / "results", f"net-{place:03d}", value, task=task, provenance={"recipe": method}, command="x")
    index = build(collect([root / "results"]), root / "site")
    log = [{"step": step, "loss": 1 / step} for step in (1, 2)]
    write(root / "one", "net", 0.7, details={"accuracy_by_class": {"cat": 0.9}, "log": log})
    report(root / "one", index.parent / "report.html")
    with serve(index.parent, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        program = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield program
        program.close()


@pytest.fixture
def page(browser: Any, site: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page that fails the test on any console message, error, or request to another host."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1200, "height": 800}}))
    opened, faults = context.new_page(), []
    opened.on("console", lambda message: faults.append(message.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda asked: None if asked.url.startswith((site, "data:")) else faults.append(asked.url))
    opened.goto(f"{site}/index.html")
    yield opened
    context.close()
    assert faults == []


def first(page: Any) -> str:
    return str(page.locator("#scores tbody th a").first.text_content())


def test_sort(page: Any):
    assert first(page) == "net-000"  # the best on the first column
    page.get_by_role("button", name="voc knn-1").click()
    assert first(page) == "net-129"
    page.get_by_role("button", name="voc knn-1").click()
    assert first(page) == "net-000"
    page.get_by_role("button", name="Backbone").click()
    page.get_by_role("button", name="Backbone").click()
    assert first(page) == "net-129"
    assert page.locator("th[aria-sort=descending]").count() == 1


def test_filter(page: Any):
    page.get_by_label("Backbone").fill("net-01")
    assert page.locator("#count").text_content() == "10 of 130"
    page.get_by_label("Method").select_option("byol")
    assert page.locator("#count").text_content() == "5 of 130"
    page.get_by_label("Task").select_option("voc")
    assert page.locator("#scores thead th").count() == 2
    assert first(page) == "net-019"


def test_many_rows_come_by_the_hundred(page: Any):
    assert page.locator("#scores tbody tr").count() == 100
    page.get_by_role("button", name="Show more").click()
    assert page.locator("#scores tbody tr").count() == 130
    assert not page.get_by_role("button", name="Show more").is_visible()


def test_backbone_and_task_pages(page: Any):
    page.locator("#scores tbody th a").first.click()
    assert page.locator("h1").text_content() == "net-000"
    assert page.locator("tbody tr").count() == 2
    page.locator("tbody th a").first.click()
    assert page.locator("h1").text_content() == "cifar10"
    assert page.locator("tbody tr").count() == 130
    page.get_by_role("link", name="Leaderboard").click()
    assert page.locator("#scores").is_visible()


@pytest.mark.parametrize("page", [{"color_scheme": "dark"}], indirect=True)
def test_dark(page: Any):
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")) < 120


@pytest.mark.parametrize("page", [{"viewport": {"width": 390, "height": 800}}], indirect=True)
def test_phone(page: Any):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("#scores").is_visible()
    assert page.get_by_label("Backbone").is_visible()


PHONE = {"viewport": {"width": 390, "height": 800}}


@pytest.mark.parametrize("page", [{**PHONE, "color_scheme": "dark"}, {}], indirect=True)
def test_report(page: Any, site: str):
    page.goto(f"{site}/report.html")
    assert page.locator("svg").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.get_by_role("link", name="cifar10").click()
    assert page.url.endswith("#result-0")
