"""The public face holds what it promises, and costs nothing until it is touched."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import evalsuite
import evalsuite.checkpoints
import pretrain

FACES = [evalsuite, evalsuite.checkpoints, pretrain]


def name_of(face: ModuleType) -> str:
    return face.__name__


@pytest.mark.parametrize("face", FACES, ids=name_of)
def test_each_name_is_there_once(face):
    assert len(face.__all__) == len(set(face.__all__))


@pytest.mark.parametrize(("face", "name"), [(face, name) for face in FACES for name in face.__all__])
def test_every_exported_name_resolves(face, name):
    assert getattr(face, name) is not None
    assert not isinstance(getattr(face, name), ModuleType)


@pytest.mark.parametrize("face", FACES, ids=name_of)
def test_what_is_not_imported_yet_is_listed(face):
    assert set(face.__all__) <= set(dir(face))


@pytest.mark.parametrize("face", FACES, ids=name_of)
def test_the_checker_sees_the_same_names_from_the_same_homes(face):
    blocks = [n for n in ast.parse(Path(face.__file__).read_text()).body if isinstance(n, ast.If)]
    typed: dict[str, list[str]] = {}
    for node in (n for n in blocks[0].body if isinstance(n, ast.ImportFrom)):
        home = str(node.module).removeprefix(f"{face.__name__}.")
        typed.setdefault(home, []).extend(alias.name for alias in node.names)
    assert {home: sorted(names) for home, names in face._HOMES.items()} == {h: sorted(n) for h, n in typed.items()}
    assert set(face.__all__) - {"__version__"} == {name for names in typed.values() for name in names}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Bakcbone'"):
        _ = evalsuite.Bakcbone  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_distribution():
    assert evalsuite.__version__ == importlib.metadata.version("evalsuite")


@pytest.mark.parametrize(
    "statement",
    [
        "import evalsuite, evalsuite.checkpoints, evalsuite.hooks, pretrain",
        "from evalsuite import hookimpl",
        "from evalsuite.hooks import load; load(environ={'EVALSUITE_PLUGINS': ''})",
    ],
)
def test_importing_the_face_and_loading_our_plugins_load_no_heavy_package(statement: str):
    heavy = ["torch", "torchvision", "timm", "numpy", "pydantic", "matplotlib", "scipy"]
    code = f"{statement}; import sys; print([m for m in {heavy!r} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
