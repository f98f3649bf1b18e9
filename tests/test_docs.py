"""The documents tell the truth: their Python runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from evalsuite.backbone import build
from evalsuite.cli import app
from evalsuite.hooks import SHELVES, Suite
from pretrain import Stages, Training

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


PYTHON = [(page, number) for page in PAGES for number in range(len(blocks(page, "python")))]
COMMANDS = sorted(
    {
        line
        for page in PAGES
        for block in blocks(page, "")
        for line in block.splitlines()
        if line.startswith("evalsuite ")
    }
)


@pytest.mark.parametrize(("page", "number"), PYTHON, ids=[f"{p.stem}-{n}" for p, n in PYTHON])
def test_python_in_the_documents_runs(page, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EVALSUITE_PLUGINS", "")
    code = compile(blocks(page, "python")[number], f"{page.name}[{number}]", "exec", dont_inherit=True)
    exec(code, {"__name__": "documented"})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_documents_parse(command):
    """``--help`` after the arguments: options are checked, nothing is run."""
    words = shlex.split(command)[1:]
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0, done.output
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= set(re.findall(r"--[\w-]+", done.output))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_the_documents_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_layout_in_the_documents_reads_its_file(registry, tmp_path):
    """The example of docs/hooks.md, on a checkpoint as its reader would have."""
    scope: dict = {}
    example = next(block for block in blocks(REPOSITORY / "docs" / "hooks.md", "python") if "def acme" in block)
    exec(example, scope)
    net = build("timm:resnet50", registry).net
    torch.save({f"trunk.{k}": v for k, v in net.state_dict().items()}, tmp_path / "acme.pth")
    from evalsuite.checkpoints.reading import State, read

    file = read(tmp_path / "acme.pth")
    (candidate,) = scope["acme"](State(torch.load(tmp_path / "acme.pth", weights_only=True), "", file))
    assert candidate.arch == "timm:resnet50"
    assert set(candidate.tensors) == set(net.state_dict())


def test_every_shelf_is_documented():
    text = (REPOSITORY / "docs" / "hooks.md").read_text()
    assert [shelf for shelf in SHELVES if f"`{shelf}`" not in text] == []


# --- what is made of the source ----------------------------------------------------------------------------------


def test_pages_made_of_the_source_are_up_to_date(loaded):
    """If not: python tests/pages.py"""
    made = runpy.run_path(str(REPOSITORY / "tests" / "pages.py"))["written"](loaded)
    stale = [str(path.relative_to(REPOSITORY)) for path, text in made.items() if path.read_text("utf-8") != text]
    assert stale == []
    assert {path.name for path in (REPOSITORY / "docs" / "tasks").iterdir()} == {
        path.name for path in made if path.parent.name == "tasks"
    }


def test_every_task_and_every_protocol_has_its_place(registry):
    for name in registry.names("task"):
        page = (REPOSITORY / "docs" / "tasks" / f"{name}.md").read_text()
        task = registry.get("task", name)()
        for protocol in task.protocols:
            assert f"### {protocol.id}\n" in page
            assert protocol.hash in page
        for metric in task.metrics:
            better = "higher" if metric.higher_is_better else "lower"
            assert f"| `{metric.name}` | {better} |" in page


def test_every_field_of_a_protocol_is_in_its_page(registry):
    """What a page does not list, protocols.md does, with the value that holds then."""
    kinds = (REPOSITORY / "docs" / "tasks" / "protocols.md").read_text()
    for name in registry.names("task"):
        page = (REPOSITORY / "docs" / "tasks" / f"{name}.md").read_text()
        for protocol in registry.get("task", name)().protocols:
            section = page.partition(f"### {protocol.id}\n")[2].partition("\n### ")[0]
            assert f"protocols.md#{type(protocol).__name__.lower()}" in section
            for field in set(protocol.fields()) - {"id", "version", "modified", "ranked"}:
                assert f"| `{field}` |" in section or f"| `{field}` |" in kinds, (name, protocol.id, field)


def test_the_hooks_are_those_of_the_specifications():
    page = (REPOSITORY / "docs" / "hooks-reference.md").read_text()
    for specs in (Suite, Stages):
        for name, function in vars(specs).items():
            if not name.startswith("_"):
                arguments = ", ".join(list(inspect.signature(function).parameters)[1:])
                (signature,) = re.findall(rf"^{name}\((.*)\) -> ", page, re.MULTILINE)
                assert ", ".join(re.findall(r"(\w+): ", signature)) == arguments
    for shelf in SHELVES:
        assert f"\n### {shelf}\n" in page


# --- names and flags ---------------------------------------------------------------------------------------------

OURS = [page for page in PAGES if page.parent.name != "decisions"]


def flags_of(*commands: str) -> set[str]:
    group = typer.main.get_command(app)
    found = {"--help"}
    for words in commands:
        command = group
        for word in words.split():
            command = command.commands[word]
        found |= {option for parameter in command.params for option in parameter.opts}
    return found


WRITTEN = {"whole", "dots", "vicreg", "vicreg.lr"}  # what the pages on writing one's own bring


def test_what_the_documents_name_is_there(registry):
    """Tasks, protocols, engines, methods and fields that stand behind our flags, in commands and in the text."""
    parts = {n: registry.get(shelf, n) for shelf in ("method", "modifier") for n in registry.names(shelf)}
    protocols = [p for name in registry.names("task") for p in registry.get("task", name)().protocols]
    options = {f"{name}.{field.name}" for name, part in parts.items() for field in fields(part.Options)}
    known = {shelf: {*registry.names(shelf), *WRITTEN} for shelf in ("task", "method", "engine")}
    known["with"] = set(registry.names("modifier"))
    known["protocol"] = {p.id for p in protocols}
    known["set"] = options | WRITTEN | {f for p in protocols for f in p.fields()}
    known["set"] |= {f"defaults.{field.name}" for field in fields(Training)}
    odd = []
    for page in OURS:
        for flag, said in re.findall(rf"--({'|'.join(known)})[ =]'?([a-z][\w.,-]*)", page.read_text()):
            names = said.rstrip(".,").split(",") if flag == "task" else [said.rstrip(".,")]
            odd += [f"{page.name}: --{flag} {n}" for n in names if n not in known[flag] and not n.startswith("my-")]
    assert odd == []


def test_our_column_of_the_migration_page_has_flags_of_ours():
    ours = flags_of("run", "pretrain")
    page = (REPOSITORY / "docs" / "migration.md").read_text()
    rows = [line.split(" | ")[-1] for line in page.splitlines() if line.startswith("| ") and " | " in line]
    assert len(rows) > 40
    named = {flag for row in rows for flag in re.findall(r"--[a-z][\w-]+", row)}
    assert named <= ours, named - ours


# --- the site ----------------------------------------------------------------------------------------------------


def test_the_site_builds_and_fetches_nothing(tmp_path):
    """Every page has its place, every link and anchor leads somewhere, and no page loads a foreign file."""
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    loads = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\s>]+")
    for page in (tmp_path / "site").rglob("*.html"):
        assert loads.findall(page.read_text(encoding="utf-8")) == [], page
