"""A page for each method and modifier, made of its docstring, options and presets."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from typing import Any

from evalsuite import Registry, UsageError
from evalsuite.docs import comments, kind, markdown, prose, table
from evalsuite.settings import shown
from pretrain.hooks import Recipe
from pretrain.plugin import Method, Plugin, Training

__all__ = ["pages"]

MADE = "<!-- Made of docstrings, options and presets by pretrain.docs: change those instead. -->"
SHARED = frozenset(f.name for f in fields(Training))


def pages(registry: Registry) -> dict[str, str]:
    """The Markdown of every page, by file name; ``README.md`` lists them and says what all methods share."""
    shelves = {shelf: {e.name: e.summary for e in registry.entries(shelf)} for shelf in ("method", "modifier")}
    made = {
        f"{name}.md": _page(registry, shelf, name, summary)
        for shelf, summaries in shelves.items()
        for name, summary in summaries.items()
    }
    return {"README.md": _index(shelves)} | made


def _index(shelves: Mapping[str, Mapping[str, str]]) -> str:
    intro = (
        "A recipe is one method and any modifiers, each an option `--with`. Published numbers were read in the "
        "official repository: (README) in its README, (code) in its code."
    )
    parts = [MADE, "# Methods and modifiers", intro]
    for shelf, summaries in shelves.items():
        rows = ([f"[{name}]({name}.md)", summary] for name, summary in summaries.items())
        parts.append(table([shelf, "what it does"], rows))
    rows = ([f"`{f.name}`", kind(f), shown(f.default)] for f in fields(Training))
    parts += ["## Training", prose(Training), table(["option", "type", "default"], rows)]
    return "\n\n".join(parts) + "\n"


def _page(registry: Registry, shelf: str, name: str, summary: str) -> str:
    plugin: type[Plugin] = registry.get(shelf, name)
    paper = inspect.cleandoc(sys.modules[plugin.__module__].__doc__ or "").partition("\n\n")[2]
    own = [f for f in fields(plugin.Options) if not _is_shared(plugin, f)]
    descriptions = comments(plugin.Options)
    parts = [MADE, f"# {name}", f"{summary[:1].upper()}{summary[1:]}.", markdown(paper)]
    parts += [prose(plugin), f"```\n{_command(plugin, shelf, name, own)}\n```"]
    if own:
        rows = [[f"`{name}.{f.name}`", kind(f), shown(f.default), descriptions.get(f.name, "")] for f in own]
        parts += ["## Options", table(["`--set`", "type", "default", ""], rows)]
    if issubclass(plugin, Method):
        parts += _method(name, plugin)
    else:
        fitting = [e.name for e in registry.entries("method") if _compose(registry.get("method", e.name), plugin)]
        parts += ["## Composes with", ", ".join(f"[{other}]({other}.md)" for other in fitting)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _method(name: str, method: type[Method]) -> list[str]:
    parts = []
    if shared := [f for f in fields(method.Options) if _is_shared(method, f)]:
        rows: list[list[str]] = [[f"`{name}.{f.name}`", shown(f.default)] for f in shared]
        parts += ["What [all methods](README.md#training) have:", table(["`--set`", "default"], rows)]
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
        parts += ["## Presets", table(columns, rows)]
    return parts


def _is_shared(plugin: type[Plugin], field: Field[Any]) -> bool:
    return issubclass(plugin.Options, Training) and field.name in SHARED


def _compose(method: type[Method], modifier: type[Any]) -> bool:
    try:
        Recipe(method(), modifier())
    except UsageError:
        return False
    return True


def _command(plugin: type[Plugin], shelf: str, name: str, own: Iterable[Field[Any]]) -> str:
    part = f"--method {name}" if shelf == "method" else f"--method simclr --with {name}"
    files = "".join(f" --set {name}.{f.name}=FILE" for f in own if "Path" in str(f.type))
    method = plugin if issubclass(plugin, Method) else Method
    return f"evalsuite pretrain {part}{files} --data {method.data} --arch {method.arch} --out runs/{name}"
