"""Pages of documentation that are made of the source: tasks, their protocols, hooks; and the words they are made of."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

from evalsuite.hooks import Registry
from evalsuite.settings import shown
from evalsuite.task import Metric, Protocol, Task

__all__ = ["comments", "families", "hooks", "kind", "markdown", "pages", "prose", "table"]

MADE = "<!-- Made of docstrings and fields by evalsuite.docs: change those instead. -->"
NAMES = frozenset(field.name for field in fields(Protocol))


def pages(registry: Registry) -> dict[str, str]:
    """The Markdown of every task, by file name; ``README.md`` lists them, ``protocols.md`` has the fields of recipes.
    Raises what :meth:`Registry.get` does for a task that cannot be imported."""
    made = {f"{task.name}.md": _page(registry, task) for task in _tasks(registry)}
    return {"README.md": _index(registry), "protocols.md": _recipes(registry)} | made


def families(registry: Registry) -> dict[str, list[Task]]:
    """Tasks by the subject of their module: the first line of its docstring."""
    by_subject: dict[str, list[Task]] = {}
    for task in _tasks(registry):
        subject = inspect.cleandoc(sys.modules[type(task).__module__].__doc__ or "").partition("\n")[0]
        by_subject.setdefault(subject, []).append(task)
    return dict(sorted(by_subject.items()))


def hooks(specs: type[Any]) -> str:
    """The hooks of a class of specifications: their signatures, how answers are joined, and what they are for."""
    parts = []
    for name, function in vars(specs).items():
        marks = getattr(function, "__dict__", {})
        options = next((value for key, value in marks.items() if key.endswith("_spec")), None)
        if options is None:
            continue
        signature = str(inspect.signature(function)).replace("(self, ", "(").replace("'", "")
        answer = "nothing" if signature.endswith("None") else "all, together"
        joined = "of the first that answers" if options["firstresult"] else answer
        parts.append(f"### {name}\n\n```\n{name}{signature}\n```\n\n{prose(function)}\n\nWhat is returned: {joined}.")
    return "\n\n".join(parts)


def _tasks(registry: Registry) -> list[Task]:
    return [registry.get("task", name)() for name in registry.names("task")]


# --- pages ------------------------------------------------------------------------------------------------------


def _index(registry: Registry) -> str:
    intro = (
        "Made of the source, like the page of each task. A protocol is a recipe with a version and a hash; results of "
        "different hashes never share a column. [Protocols](protocols.md) explains the fields of each kind."
    )
    parts = [MADE, "# Tasks", intro]
    for subject, tasks in families(registry).items():
        rows = [
            [f"[{t.name}]({t.name}.md)", registry.entry("task", t.name).summary, t.primary, _codes(t.engines) or "-"]
            for t in tasks
        ]
        parts += [f"## {subject}", table(["task", "", "counts", "engines"], rows)]
    return _joined(parts)


def _page(registry: Registry, task: Task) -> str:
    entry = registry.entry("task", task.name)
    data = " --data SCHEME:PATH" if task.generic else ""
    facts = [
        ["counts", f"`{task.primary}`"],
        ["needs of a backbone", _codes(sorted(task.needs)) or "nothing in particular"],
        ["engines", _codes(task.engines) or "none"],
    ]
    return _joined(
        [
            MADE, f"# {task.name}", f"{entry.summary[:1].upper()}{entry.summary[1:]}.", prose(type(task)),
            f"```\nevalsuite run --backbone ckpt.pth --task {task.name}{data}\n```",
            table(["version", str(task.version)], facts),
            "## Data", *_data(registry, task), "## Metrics", *_metrics(task), "## Protocols",
            f"The first one is the default. What is not listed is as in [protocols](protocols.md); "
            f"`evalsuite run --task {task.name} --set FIELD=VALUE` changes a field and marks the result.",
            *(_protocol(task, protocol) for protocol in task.protocols),
        ]
    )  # fmt: skip


def _data(registry: Registry, task: Task) -> list[str]:
    if task.name not in registry.names("dataset"):
        return ["Data of your own, named by `--data`." if task.generic else "None on disk: its worlds are generated."]
    source = registry.get("dataset", task.name)
    licence = f"Licence, in short: {source.licence}. Home: <{source.homepage}>."
    return ["Expected below the data root:", f"```text\n{inspect.cleandoc(source.tree).strip()}\n```", licence]


def _metrics(task: Task) -> list[str]:
    parts = [table(["metric", "better", "range"], map(_metric, task.metrics))]
    for protocol in task.protocols:
        own = [metric for metric in task.promises(protocol) if metric not in task.metrics]
        if own:
            parts += [f"Of `{protocol.id}` besides:", table(["metric", "better", "range"], map(_metric, own))]
        if task.leading(protocol) != task.primary:
            parts.append(f"By `{protocol.id}` it is `{task.leading(protocol)}` that counts.")
    return parts


def _metric(metric: Metric) -> list[str]:
    return [f"`{metric.name}`", "higher" if metric.higher_is_better else "lower", f"{metric.low:g} to {metric.high:g}"]


def _protocol(task: Task, protocol: Protocol) -> str:
    recipe = type(protocol)
    link = f"[{recipe.__name__}](protocols.md#{_anchor(recipe)})"
    summary = f"Version {protocol.version}, hash `{protocol.hash}`, of kind {link}."
    if not protocol.ranked:
        summary += " It is for trying things out: no leaderboard ranks it."
    if more := task.requires(protocol) - task.needs:
        summary += f" It needs {_codes(sorted(more))} of the backbone, too."
    own = [f for f in fields(protocol) if f.name not in NAMES and getattr(protocol, f.name) != f.default]
    rows = [[f"`{f.name}`", shown(getattr(protocol, f.name))] for f in own]
    return _joined([f"### {protocol.id}", summary, table(["field", "value"], rows) if rows else ""]).rstrip()


def _recipes(registry: Registry) -> str:
    """One section a kind of protocol, and one for each kind it is made of."""
    kinds: dict[type[Protocol], None] = {}
    for task in _tasks(registry):
        for protocol in task.protocols:
            kinds |= dict.fromkeys(c for c in reversed(type(protocol).__mro__) if c in _kinds(type(protocol)))
    parts = [MADE, "# Protocols", prose(Protocol)]
    for recipe in kinds:
        base = next((c for c in recipe.__mro__[1:] if c in kinds), None)
        descriptions = comments(recipe)
        above = {f.name: f.default for f in (fields(base) if base else ())}
        rows = [
            [
                f"`{f.name}`",
                kind(f),
                "*its own*" if f.default is MISSING else shown(f.default),
                descriptions.get(f.name, ""),
            ]
            for f in fields(recipe)
            if f.name not in NAMES and (f.name not in above or above[f.name] != f.default)
        ]
        more = f"It has all fields of [{base.__name__}](#{_anchor(base)}), too." if base else ""
        own = table(["field", "type", "default", ""], rows) if rows else ""
        parts += [f"## {recipe.__name__}", prose(recipe), own, more]
    return _joined(parts)


def _kinds(recipe: type[Protocol]) -> list[type[Protocol]]:
    return [c for c in recipe.__mro__ if issubclass(c, Protocol) and c is not Protocol]


def _anchor(recipe: type[Any]) -> str:
    return recipe.__name__.lower()


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


# --- words ------------------------------------------------------------------------------------------------------


def prose(thing: Any) -> str:
    """The docstring of something, as Markdown."""
    return markdown(inspect.getdoc(thing) or "")


def markdown(text: str) -> str:
    """Text of docstrings as Markdown: code is quoted once, roles are left out, and paragraphs of terms become lists."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    term = r"(`[\w-]+`(?: \([^)]*\))?:)"
    listed = (part if len(re.findall(rf"(?m)^{term}", part)) < 2 or not re.match(term, part) else
              re.sub(rf"(?m)^{term}", r"- \1", part) for part in text.split("\n\n"))  # fmt: skip
    return "\n\n".join(listed)


def comments(options: type[Any]) -> dict[str, str]:
    """What is written beside each field in the source, of all classes a dataclass derives from."""
    descriptions: dict[str, str] = {}
    for parent in reversed(options.__mro__[:-1]):
        descriptions |= re.findall(r"^\s+(\w+): .*?  # (.*)$", inspect.getsource(parent), re.MULTILINE)
    return descriptions


def kind(field: Field[Any]) -> str:
    """The type of a field; of a literal its values."""
    literal = re.fullmatch(r"Literal\[(.*)\]", str(field.type))
    return ", ".join(re.findall(r"[\w-]+", literal[1])) if literal else f"`{field.type}`".replace(" | ", " or ")


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
