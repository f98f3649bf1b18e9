"""A page for each method and modifier, made of its docstring, options and presets."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from typing import Any

from evalsuite import Registry, UsageError
from pretrain.hooks import Recipe
from pretrain.plugin import Method, Plugin, Training

__all__ = ["pages"]

MADE = "<!-- Made of docstrings, options and presets by pretrain.docs: change those instead. -->"
SHARED = frozenset(f.name for f in fields(Training))


def pages(registry: Registry) -> dict[str, str]:
    """The Markdown of every page, by file name; ``README.md`` lists them and tells what all methods share."""
    found = {shelf: {e.name: e.summary for e in registry.entries(shelf)} for shelf in ("method", "modifier")}
    made = {
        f"{name}.md": _page(registry, shelf, name, summary)
        for shelf, summaries in found.items()
        for name, summary in summaries.items()
    }
    return {"README.md": _index(found)} | made


def _index(found: Mapping[str, Mapping[str, str]]) -> str:
    told = (
        "A recipe is one method and any modifiers, each an option `--with`. Published numbers were read in the "
        "official repository: (README) in its README, (code) in its code."
    )
    parts = [MADE, "# Methods and modifiers", told]
    for shelf, summaries in found.items():
        rows = ([f"[{name}]({name}.md)", summary] for name, summary in summaries.items())
        parts.append(_table([shelf, "what it does"], rows))
    rows = ([f"`{f.name}`", _kind(f), _shown(f.default)] for f in fields(Training))
    parts += ["## Training", _prose(Training), _table(["option", "type", "default"], rows)]
    return "\n\n".join(parts) + "\n"


def _page(registry: Registry, shelf: str, name: str, summary: str) -> str:
    plugin: type[Plugin] = registry.get(shelf, name)
    paper = inspect.cleandoc(sys.modules[plugin.__module__].__doc__ or "").partition("\n\n")[2]
    own = [f for f in fields(plugin.Options) if not _is_shared(plugin, f)]
    told = _comments(plugin.Options)
    parts = [MADE, f"# {name}", f"{summary[:1].upper()}{summary[1:]}.", _markdown(paper)]
    parts += [_prose(plugin), f"```\n{_command(shelf, name, own)}\n```"]
    if own:
        rows = [[f"`{name}.{f.name}`", _kind(f), _shown(f.default), told.get(f.name, "")] for f in own]
        parts += ["## Options", _table(["`--set`", "type", "default", ""], rows)]
    if issubclass(plugin, Method):
        parts += _method(name, plugin)
    else:
        fitting = [e.name for e in registry.entries("method") if _compose(registry.get("method", e.name), plugin)]
        parts += ["## Composes with", ", ".join(f"[{other}]({other}.md)" for other in fitting)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _method(name: str, method: type[Method]) -> list[str]:
    parts = []
    if shared := [f for f in fields(method.Options) if _is_shared(method, f)]:
        rows: list[list[str]] = [[f"`{name}.{f.name}`", _shown(f.default)] for f in shared]
        parts += ["What [all methods](README.md#training) have:", _table(["`--set`", "default"], rows)]
    if method.presets:
        rows = [
            [
                f"`{key}`",
                p.source,
                str(p.epochs),
                str(p.batch_size),
                ", ".join(f"{k}={v}" for k, v in p.options.items()),
            ]
            for key, p in method.presets.items()
        ]
        columns = ["`--preset`", "from", "epochs", "batch", "options other than the defaults"]
        parts += ["## Presets", _table(columns, rows)]
    return parts


def _is_shared(plugin: type[Plugin], field: Field[Any]) -> bool:
    return issubclass(plugin.Options, Training) and field.name in SHARED


def _compose(method: type[Method], modifier: type[Any]) -> bool:
    try:
        Recipe(method(), modifier())
    except UsageError:
        return False
    return True


def _command(shelf: str, name: str, own: Iterable[Field[Any]]) -> str:
    part = f"--method {name}" if shelf == "method" else f"--method simclr --with {name}"
    files = "".join(f" --set {name}.{f.name}=FILE" for f in own if "Path" in str(f.type))
    return f"evalsuite pretrain {part}{files} --data folder:/data/images --arch timm:resnet50 --out runs/{name}"


# Words -------------------------------------------------------------------------------------------------------


def _prose(thing: type[Any]) -> str:
    return _markdown(inspect.getdoc(thing) or "")


def _markdown(text: str) -> str:
    """Docstrings quote code twice and name the role of what they refer to; Markdown does not."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def _comments(options: type[Any]) -> dict[str, str]:
    """What is written beside each option in the source, of all classes the options derive from."""
    found: dict[str, str] = {}
    for kind in reversed(options.__mro__[:-1]):
        found |= re.findall(r"^\s+(\w+): .*?  # (.*)$", inspect.getsource(kind), re.MULTILINE)
    return found


def _kind(field: Field[Any]) -> str:
    literal = re.fullmatch(r"Literal\[(.*)\]", str(field.type))
    return ", ".join(re.findall(r"[\w-]+", literal[1])) if literal else f"`{field.type}`"


def _shown(value: Any) -> str:
    """A value as one would write it after ``--set``."""
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
