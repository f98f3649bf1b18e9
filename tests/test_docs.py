"""The documents tell the truth: their Python runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evalsuite.backbone import build
from evalsuite.hooks import SHELVES

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
    exec(compile(blocks(page, "python")[number], f"{page.name}[{number}]", "exec"), {"__name__": "documented"})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_documents_parse(command):
    """``--help`` after the arguments: options are checked, nothing is run."""
    words = shlex.split(command)[1:]
    code = f"import sys; sys.argv = ['evalsuite', *{words!r}, '--help']; from evalsuite.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    assert options <= set(re.findall(r"--[\w-]+", done.stdout))


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
