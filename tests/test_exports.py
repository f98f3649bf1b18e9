"""The public face holds what it promises, and costs nothing until it is touched."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import evalsuite

FACE = Path(evalsuite.__file__)


def test_names_are_sorted_and_each_is_there_once():
    assert evalsuite.__all__ == sorted(set(evalsuite.__all__))


@pytest.mark.parametrize("name", evalsuite.__all__)
def test_every_exported_name_resolves(name: str):
    assert getattr(evalsuite, name) is not None
    assert name in dir(evalsuite)


def test_the_checker_sees_the_same_names_from_the_same_homes():
    blocks = [n for n in ast.parse(FACE.read_text()).body if isinstance(n, ast.If)]
    typed = {
        alias.name: str(node.module).removeprefix("evalsuite.")
        for node in blocks[0].body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == evalsuite._HOME
    assert {*typed, "__version__"} == set(evalsuite.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Bakcbone'"):
        _ = evalsuite.Bakcbone  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_distribution():
    assert evalsuite.__version__ == importlib.metadata.version("evalsuite")


@pytest.mark.parametrize("statement", ["import evalsuite", "import evalsuite.hooks", "from evalsuite import hookimpl"])
def test_importing_the_face_loads_no_heavy_package(statement: str):
    heavy = ["torch", "torchvision", "timm", "numpy", "pydantic", "matplotlib", "scipy"]
    code = f"{statement}; import sys; print([m for m in {heavy!r} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
