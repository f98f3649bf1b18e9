"""``evalsuite plugins new``: a package of one plugin that passes its own checks as it is written."""

from __future__ import annotations

import ast
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jinja2

from evalsuite.errors import UsageError
from evalsuite.hooks import Registry

__all__ = ["KINDS", "Written", "write"]

KINDS = ("method", "modifier", "task", "backbone", "checkpoint", "engine")
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST = 24  # so that no line of what is written is too long

# file of the package -> template
FILES = {
    "pyproject.toml": "pyproject.toml.j2",
    "README.md": "README.md.j2",
    ".gitignore": "gitignore.j2",
    ".github/workflows/test.yml": "workflow.yml.j2",
    "{module}.py": "{kind}.py.j2",
    "tests/test_{module}.py": "test_{kind}.py.j2",
}


@dataclass(frozen=True)
class Written:
    """Where a new package lies, its files, and how many lines its module has."""

    path: Path
    files: tuple[str, ...]
    lines: int


def write(name: str, kind: str, out: Path, registry: Registry) -> Written:
    """Write ``out/evalsuite-NAME``: a distribution with an entry point, a module, tests, a CI workflow and a README.

    Raises :class:`UsageError` for an unknown kind, a name that cannot be one or is taken, and where something lies in
    the way: nothing is ever overwritten.
    """
    _refuse(name, kind, registry)
    path = out / f"evalsuite-{name}"
    if path.exists() or path.is_symlink():
        raise UsageError(
            f"{path} is there already", cause="nothing is overwritten", fix="choose another name, or another --out"
        )
    words = {
        "name": name,
        "kind": kind,
        "module": f"evalsuite_{name.replace('-', '_')}",
        "cls": "".join(part.capitalize() for part in name.split("-")),
        "suite": ".".join(version("evalsuite").split(".")[:2]),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evalsuite.scaffold"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
        trim_blocks=True, lstrip_blocks=True, autoescape=False,
    )  # fmt: skip
    texts = {
        file.format(**words): environment.get_template(template.format(**words)).render(words)
        for file, template in FILES.items()
    }
    _refuse_hidden(words, texts[f"{words['module']}.py"])
    _place(path, texts)
    return Written(path, tuple(texts), len(texts[f"{words['module']}.py"].splitlines()))


def _refuse(name: str, kind: str, registry: Registry) -> None:
    if kind not in KINDS:
        raise UsageError(
            f"no plugin of kind {kind!r} can be written", cause=f"kinds: {', '.join(KINDS)}", fix="--kind method"
        )
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        raise UsageError(
            f"{name!r} cannot be a plugin's name",
            cause=f"a name is lower-case words and numbers joined by hyphens, at most {LONGEST} characters",
            fix="for example: my-method",
        )
    if name in registry.names(kind):
        entry = registry.entry(kind, name)
        raise UsageError(
            f"there is a {kind} named {name!r}", cause=f"{entry.owner} brings it", fix="choose another name"
        )


def _refuse_hidden(words: dict[str, str], text: str) -> None:
    imported = {a.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) for a in node.names}
    if words["cls"] in imported:
        raise UsageError(
            f"a {words['kind']} cannot be named {words['name']!r}",
            cause=f"its class would be {words['cls']}, which is what it is made of",
            fix=f"for example: my-{words['name']}",
        )


def _place(path: Path, texts: dict[str, str]) -> None:
    """Write all files beside ``path``, then give the folder its name: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for name, text in texts.items():
            file = scratch / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        scratch.chmod(0o777 & ~_umask())
        os.rename(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
