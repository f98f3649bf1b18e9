"""Imports only point down: these tables say who may import whom, and the source is held to them.

Imports are read with ``ast``, those inside functions and under TYPE_CHECKING among them, for a type that only
the checker sees still ties two rooms together.
"""

from __future__ import annotations

import ast
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
INSTALL = "python -m pip install -c constraints.txt -e '.[all,dev]'"

TOLD = {  # anyone may use them
    "evalsuite.environment",
    "evalsuite.errors",
    "evalsuite.files",
    "evalsuite.lazy",
    "evalsuite.locks",
    "evalsuite.progress",
    "evalsuite.seeding",
    "evalsuite.settings",
    "evalsuite.signals",
}
NUMBERS = {"evalsuite.metrics", "evalsuite.results", "evalsuite.statistics"}
MIDDLE = (  # each may import those before it
    "evalsuite.resize",
    "evalsuite.options",
    "evalsuite.backbone",
    "evalsuite.checkpoints",
    "evalsuite.features",
    "evalsuite.probes",
    "evalsuite.pyramid",
    "evalsuite.data",
    "evalsuite.pictures",
    "evalsuite.task",
    "evalsuite.protocols",
    "evalsuite.probing",
)
RENAMED = {"evalsuite.cache", "evalsuite.fit", "evalsuite.heads", "evalsuite.poolings", "evalsuite.processes"}
OUTER = {"evalsuite.engines", "evalsuite.tasks", "evalsuite.backbones", "evalsuite.board"}
LOWER = {
    *TOLD,
    "evalsuite.hooks",
    *NUMBERS,
    *MIDDLE,
    "evalsuite.preflight",
    "evalsuite.states",
    "evalsuite.training",
    "evalsuite.worlds",
}

MAY_IMPORT: dict[str, set[str]] = {
    "evalsuite.lazy": set(),
    **{room: {"evalsuite.lazy"} for room in RENAMED},
    "evalsuite.errors": set(),
    "evalsuite.environment": {"evalsuite.errors"},
    "evalsuite.files": {"evalsuite.errors"},
    "evalsuite.progress": {"evalsuite.errors"},
    "evalsuite.locks": {"evalsuite.errors", "evalsuite.files", "evalsuite.progress"},
    "evalsuite.seeding": set(),
    "evalsuite.settings": {"evalsuite.errors"},
    "evalsuite.signals": set(),
    "evalsuite.preflight": {"evalsuite.errors", "evalsuite.progress", "evalsuite.signals"},
    "evalsuite.hooks": {"evalsuite.errors"},
    **{room: {*TOLD, *NUMBERS} for room in NUMBERS},
    **{room: {*TOLD, *NUMBERS, "evalsuite.hooks", *MIDDLE[:i]} for i, room in enumerate(MIDDLE)},
    "evalsuite.data": {
        *TOLD,
        *NUMBERS,
        "evalsuite.hooks",
        *MIDDLE[: MIDDLE.index("evalsuite.data")],
        "evalsuite.worlds",  # whose frames are data to learn from
    },
    "evalsuite.states": TOLD,
    "evalsuite.training": {*TOLD, "evalsuite.backbone", "evalsuite.preflight", "evalsuite.states"},
    "evalsuite.probing": {
        *TOLD,
        *NUMBERS,
        "evalsuite.hooks",
        *MIDDLE[:-1],
        "evalsuite.preflight",
        "evalsuite.training",
    },
    "evalsuite.worlds": TOLD,
    **{room: LOWER for room in OUTER},
    "evalsuite.compare": {*TOLD, *NUMBERS},
    "evalsuite.board": {*LOWER, "evalsuite.compare"},
    "evalsuite.runner": LOWER,
    "evalsuite.testing": {*LOWER, "evalsuite.runner"},
    "evalsuite.doctor": {*LOWER, "evalsuite.runner"},
    "evalsuite.docs": LOWER,
    "evalsuite.scaffold": {*TOLD, "evalsuite.hooks"},
    "evalsuite.conformance": {*LOWER, "evalsuite.testing", "pretrain"},
    "evalsuite.cli": {
        *LOWER,
        *OUTER,
        "evalsuite.compare",
        "evalsuite.docs",
        "evalsuite.runner",
        "evalsuite.conformance",
        "evalsuite.scaffold",
        "evalsuite.testing",
        "evalsuite.doctor",
        "pretrain",
    },
    "evalsuite.__main__": {"evalsuite.cli"},
}

# What a room may import from outside; a room that is not here may import anything that is installed.
NUMERIC = {
    "faster_coco_eval",
    "numpy",
    "pydantic",
    "scipy",
    "sklearn",
    "torch",
    "torchmetrics",
    "torchvision",
}
OUTSIDE: dict[str, set[str]] = {
    "evalsuite.environment": {"torch"},
    "evalsuite.errors": set(),
    "evalsuite.files": set(),
    "evalsuite.locks": {"filelock"},
    "evalsuite.progress": {"rich"},
    "evalsuite.seeding": {"torch"},
    "evalsuite.settings": {"pydantic"},
    "evalsuite.signals": set(),
    "evalsuite.hooks": {"pluggy"},
    **{room: NUMERIC for room in NUMBERS},
}

# ``evalsuite --help`` must not pay for these rooms' imports: at module level they may import only this.
QUICK: dict[str, set[str]] = {
    "evalsuite.cli": {
        "click",
        "evalsuite.errors",
        "evalsuite.files",
        "evalsuite.hooks",
        "evalsuite.progress",
        "rich",
        "typer",
    },
    "evalsuite": {"evalsuite.lazy"},
}

# Files of these rooms are independent of each other; what they share is in a lower room.
APART = ("evalsuite.engines", "evalsuite.tasks", "evalsuite.backbones", "pretrain.methods")

# Submodules that belong to the public face, names of their __all__ included.
PUBLIC = {
    "evalsuite": {
        *("checkpoints", "data", "docs", "environment", "errors", "features", "files", "hooks"),
        *("lazy", "locks", "metrics", "options", "pictures", "preflight"),
        *("probes", "probing", "progress", "protocols", "pyramid", "resize"),
        *("seeding", "settings", "signals", "statistics", "testing", "training"),
        *("worlds",),
    },
    "pretrain": {"blocks", "testing"},
}


class Import(NamedTuple):
    """``from module import name``, or ``import module`` (name None); ``deep``: not run with the module."""

    line: int
    module: str
    name: str | None
    deep: bool


def imports(source: str, package: str = "") -> Iterator[Import]:
    """Every import of a source text; ``package`` is what relative ones start from."""

    def walk(node: ast.AST, deep: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(child.lineno, alias.name, None, deep)
            elif isinstance(child, ast.ImportFrom):
                parts = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                module = ".".join([*parts, child.module] if child.module else parts)
                for alias in child.names:
                    yield Import(child.lineno, module, alias.name, deep)
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, deep or function or typing)

    return walk(ast.parse(source), False)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the product by import name."""
    for top, root in (
        ("evalsuite", REPOSITORY),
        ("pretrain", REPOSITORY),
        ("plugins", REPOSITORY / "plugins"),
    ):
        for path in sorted((REPOSITORY / top).rglob("*.py")):
            yield module_name(path, root), path


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2]) if module.startswith("evalsuite.") else module.split(".")[0]


@cache
def exported(module: str) -> set[str]:
    """``__all__`` of one of our modules, read from its source."""
    path = REPOSITORY.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.exists():
        return set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def is_public(found: Import) -> bool:
    """Whether a stranger may write this import of ``evalsuite`` or ``pretrain``."""
    top, *rest = found.module.split(".")
    name = found.name
    if not rest:
        return name is None or name in exported(top) or name in PUBLIC[top]
    if rest[0] not in PUBLIC[top] or any(part.startswith("_") for part in rest):
        return False
    submodule = REPOSITORY.joinpath(*found.module.split("."), f"{name}.py").exists()
    return name is None or name in exported(found.module) or (submodule and not name.startswith("_"))


def targets(found: Import) -> str:
    """The module an import ends in: ``from evalsuite import task`` is an import of ``evalsuite.task``."""
    if found.name is not None:
        path = REPOSITORY.joinpath(*found.module.split("."), found.name)
        if path.with_suffix(".py").exists() or path.is_dir():
            return f"{found.module}.{found.name}"
    return found.module


@cache
def is_package(module: str) -> bool:
    return any(root.joinpath(*module.split(".")).is_dir() for root in (REPOSITORY, REPOSITORY / "plugins"))


def violations(module: str, source: str) -> list[str]:
    """Each import of ``source``, taken as the text of ``module``, that the house does not allow."""
    package = module if is_package(module) else module.rpartition(".")[0]
    return [
        f"{module}:{found.line} imports {targets(found)}: {why}"
        for found in imports(source, package)
        if (why := refusal(module, found))
    ]


def refusal(module: str, found: Import) -> str:
    """Why ``module`` may not import this; empty where it may."""
    target = targets(found)
    top = target.split(".")[0]
    if top == "__future__" or top in sys.stdlib_module_names:
        return ""
    if why := _too_early(module, found, target):
        return why
    if top in ("evalsuite", "pretrain") or top.startswith("evalsuite_"):
        if module.startswith("evalsuite_"):
            return _of_a_plugin(module, found, top)
        if module.split(".")[0] == "pretrain":
            return _of_pretrain(module, found, target)
        return _of_the_suite(module, found, target)
    room = room_of(module)
    return f"{room} does without {top}" if room in OUTSIDE and top not in OUTSIDE[room] else ""


def _too_early(module: str, found: Import, target: str) -> str:
    quick = QUICK.get(module)
    if quick is None or found.deep or target in quick or target.split(".")[0] in quick | {module}:
        return ""
    return "import it inside the function that needs it, so that --help stays quick"


def _of_the_suite(module: str, found: Import, target: str) -> str:
    room, other = room_of(module), room_of(target)
    if room == "evalsuite":
        return "" if found.deep or other == "evalsuite.lazy" else "the face is lazy"
    if target == "evalsuite":
        return "" if found.name in (None, "__version__") and room == "evalsuite.cli" else "name the module it lives in"
    if other == room:
        apart = room in APART and target != room and module != room
        return f"files of {room} stand apart" if apart and not _private(target) else ""
    if room not in MAY_IMPORT:
        return f"{room} has no line in the table of this test"
    return "" if other in MAY_IMPORT[room] else f"{room} may not know {other}"


def _private(target: str) -> bool:
    return target.rpartition(".")[2].startswith("_")


def _of_pretrain(module: str, found: Import, target: str) -> str:
    if target.split(".")[0] == "evalsuite":
        return "" if is_public(found) else "not a public name of evalsuite"
    if target.startswith("evalsuite_"):
        return "no plugin is known by name"
    if not module.startswith("pretrain.methods") or target == "pretrain.methods":
        return ""
    if target.startswith("pretrain.methods"):
        return "" if module == "pretrain.methods" or _private(target) else "files of pretrain.methods stand apart"
    return "" if is_public(found) else "methods use only public names of pretrain and its blocks"


def _of_a_plugin(module: str, found: Import, top: str) -> str:
    if top.startswith("evalsuite_"):
        return "" if top == module.split(".")[0] else "plugins do not know each other"
    return "" if is_public(found) else f"not a public name of {top}"


def test_every_import_points_down():
    found = [line for module, path in modules() for line in violations(module, path.read_text())]
    assert not found, "\n" + "\n".join(found)


def test_every_room_of_the_table_may_be_named_and_the_order_has_no_circle():
    order = list(MAY_IMPORT)
    for room, others in MAY_IMPORT.items():
        assert room not in others or room in NUMBERS, room
        for other in others - {"pretrain"}:
            assert other in order, f"{room} may import {other}, which is no room"
            mutual = room in MAY_IMPORT[other] and room != other
            assert not mutual or {room, other} <= NUMBERS, f"{room} and {other} may import each other"


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("evalsuite.hooks", "import torch", "evalsuite.hooks does without torch"),
        ("evalsuite.errors", "import rich", "evalsuite.errors does without rich"),
        ("evalsuite.metrics.detection", "import timm", "evalsuite.metrics does without timm"),
        (
            "evalsuite.metrics.detection",
            "from evalsuite.hooks import Registry",
            "may not know evalsuite.hooks",
        ),
        ("evalsuite.metrics.detection", "from evalsuite.task import Metric", "may not know evalsuite.task"),
        (
            "evalsuite.backbone",
            "def f():\n    from evalsuite.task import Task",
            "may not know evalsuite.task",
        ),
        ("evalsuite.task", "from evalsuite.engines import x", "may not know evalsuite.engines"),
        ("evalsuite.task", "from evalsuite import cli", "may not know evalsuite.cli"),
        ("evalsuite.task", "from evalsuite import Backbone", "name the module it lives in"),
        ("evalsuite.training", "from evalsuite.task import Setup", "may not know evalsuite.task"),
        (
            "evalsuite.tasks.detection",
            "from evalsuite.engines import torchvision_rcnn",
            "may not know evalsuite.engines",
        ),
        (
            "evalsuite.tasks.detection",
            "if TYPE_CHECKING:\n    from evalsuite.board import x",
            "may not know evalsuite.board",
        ),
        (
            "evalsuite.tasks.detection",
            "from evalsuite.tasks.classify import x",
            "files of evalsuite.tasks stand apart",
        ),
        ("evalsuite.tasks.other", "from . import detection", "files of evalsuite.tasks stand apart"),
        ("evalsuite.tasks.detection", "from ..board import html", "may not know evalsuite.board"),
        ("evalsuite.attic", "from evalsuite.errors import Refusal", "has no line in the table"),
        ("evalsuite.cli", "from evalsuite.runner import run", "inside the function"),
        ("evalsuite.cli", "import torch", "inside the function"),
        ("evalsuite", "import numpy", "inside the function"),
        ("pretrain.train", "from evalsuite.runner import Cell", "not a public name of evalsuite"),
        ("pretrain.train", "import evalsuite_adainf", "no plugin is known by name"),
        ("pretrain.methods.moco", "from pretrain.methods.simclr import SimCLR", "stand apart"),
        ("pretrain.methods.moco", "from pretrain.train import fit", "only public names of pretrain"),
        ("evalsuite_adainf", "from evalsuite.cli import main", "not a public name of evalsuite"),
        ("evalsuite_adainf", "from evalsuite.backbone import build", "not a public name of evalsuite"),
        ("evalsuite_adainf", "from evalsuite import nothing", "not a public name of evalsuite"),
        ("evalsuite_adainf", "from evalsuite.errors import _rebuild", "not a public name of evalsuite"),
        ("evalsuite_adainf", "from pretrain.train import fit", "not a public name of pretrain"),
        ("evalsuite_adainf", "import evalsuite_hallucinator", "plugins do not know each other"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, why: str):
    found = violations(module, source)
    assert len(found) == 1, found
    assert why in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("evalsuite.hooks", "import pluggy\nfrom evalsuite.errors import Refusal"),
        ("evalsuite.progress", "from rich.progress import Progress"),
        (
            "evalsuite.task",
            "from evalsuite.backbone import Backbone\nfrom evalsuite.hooks import unknown\nimport timm",
        ),
        (
            "evalsuite.training",
            "import torch\nfrom lightning_fabric import Fabric\nfrom evalsuite.files import atomic",
        ),
        ("evalsuite.tasks.detection", "from evalsuite import statistics\nfrom evalsuite.training import fit"),
        ("evalsuite.cli", "import typer\ndef run():\n    import torch\n    from evalsuite.runner import run"),
        ("evalsuite", "if TYPE_CHECKING:\n    from evalsuite.task import Task"),
        (
            "evalsuite_adainf",
            "from evalsuite import hookimpl, Registry\nfrom evalsuite.errors import DataError\nimport av",
        ),
    ],
)
def test_an_allowed_import_passes(module: str, source: str):
    assert violations(module, source) == []


def declared() -> dict[str, str]:
    table = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]["evalsuite"]
    return dict(table)


def test_every_module_with_a_hook_has_its_entry_point_and_the_reverse():
    hooked = {m for m, path in modules() if any(_registers(node) for node in ast.parse(path.read_text()).body)}
    assert hooked == set(declared().values()), "the table [project.entry-points.evalsuite] is the index of the house"
    for name, module in declared().items():
        assert name == module.rpartition(".")[2].removeprefix("evalsuite_"), f"{module} is not to be called {name!r}"


def _registers(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "evalsuite_register"


def test_plugins_are_named_as_a_stranger_would_name_them():
    found = {p.stem for p in (REPOSITORY / "plugins").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert all(name.startswith("evalsuite_") for name in found), found
    assert found == {module for module in declared().values() if module.startswith("evalsuite_")}
    assert not (REPOSITORY / "plugins" / "__init__.py").exists(), "plugins/ is a source root, not a package"


def test_what_is_installed_is_what_is_declared():
    points = importlib.metadata.entry_points(group="evalsuite")
    installed = {p.name: p.value for p in points if p.dist is not None and p.dist.name == "evalsuite"}
    assert installed == declared(), f"the entry points changed since the last install; type: {INSTALL}"
