"""``python tests/pages.py`` writes anew what is made of the source: tasks, methods, hooks, the tables of the README."""

from __future__ import annotations

import re
from pathlib import Path

import evalsuite.docs
import pretrain.docs
from evalsuite.docs import table
from evalsuite.hooks import Loaded, Registry, Suite, load
from pretrain import Stages

ROOT = Path(__file__).resolve().parent.parent
# The systems this suite grows from: each is a plugin, by the name of its entry point.
SYSTEMS = {
    "adainf": "AdaInf",
    "convirt": "ConVIRT",
    "gsimclr": "G-SimCLR",
    "hallucinator": "Hallucinator",
    "headcam": "a child's perspective (head-camera video)",
    "interclr": "InterCLR",
    "objects": "object-centric reinforcement learning",
    "obow": "OBoW",
    "pixel_linguist": "Pixel Linguist",
    "pixpro": "PixPro",
    "rasl": "RASL, video highlights",
    "rewards": "robot rewards from goal images",
    "rotnet": "RotNet",
    "swav": "SwAV",
}


def written(loaded: Loaded) -> dict[Path, str]:
    """What each file that is made of the source should say."""
    registry = loaded.registry
    made = {ROOT / "docs" / "tasks" / name: text for name, text in evalsuite.docs.pages(registry).items()}
    made |= {ROOT / "docs" / "methods" / name: text for name, text in pretrain.docs.pages(registry).items()}
    made[ROOT / "docs" / "hooks-reference.md"] = _hooks()
    made[ROOT / "README.md"] = _readme((ROOT / "README.md").read_text(encoding="utf-8"), loaded)
    return made


def _hooks() -> str:
    return "\n\n".join(
        [
            evalsuite.docs.MADE, "# Hooks reference", "Made of the specifications in the source. [Hooks and shelves]"
            "(hooks.md) tells how they are used.", "## The suite", evalsuite.docs.prose(Suite),
            evalsuite.docs.hooks(Suite), "## The shelves", "Methods of the `Registry` that the hook is given.",
            *(f"### {name}\n\n{evalsuite.docs.prose(getattr(Registry, name))}" for name in evalsuite.hooks.SHELVES),
            "## A training run", evalsuite.docs.prose(Stages), evalsuite.docs.hooks(Stages),
        ]
    ) + "\n"  # fmt: skip


def _readme(text: str, loaded: Loaded) -> str:
    tables = {"tasks": _tasks(loaded.registry), "methods": _methods(loaded.registry), "systems": _systems(loaded)}
    for name, made in tables.items():
        marks = f"<!-- {name}: made by tests/pages.py -->\n", f"<!-- end of {name} -->"
        text = re.sub(
            f"{re.escape(marks[0])}.*?{marks[1]}", lambda _, m=marks, t=made: f"{m[0]}{t}\n{m[1]}", text, flags=re.S
        )
    return text


def _tasks(registry: Registry) -> str:
    rows = [
        [about.rstrip("."), ", ".join(f"[{t.name}](docs/tasks/{t.name}.md)" for t in tasks),
         ", ".join(dict.fromkeys(engine for t in tasks for engine in t.engines)) or "-"]
        for about, tasks in evalsuite.docs.families(registry).items()
    ]  # fmt: skip
    return table(["", "tasks", "engines"], rows)


def _methods(registry: Registry) -> str:
    rows = [
        [f"{shelf}s", ", ".join(f"[{name}](docs/methods/{name}.md)" for name in registry.names(shelf))]
        for shelf in ("method", "modifier")
    ]
    return table(["", "for `evalsuite pretrain`"], rows)


def _systems(loaded: Loaded) -> str:
    there = {plugin.name for plugin in loaded.plugins}
    rows = []
    for name, title in SYSTEMS.items():
        brings = [f"{e.shelf} `{e.name}`" for e in loaded.registry.entries() if e.owner == name]
        rows.append([title, "there" if name in there else "not yet", ", ".join(brings)])
    return table(["system", "state", "its plugin brings"], rows)


def main() -> None:
    made = written(load(environ={"EVALSUITE_PLUGINS": ""}))
    for folder in {path.parent for path in made} - {ROOT, ROOT / "docs"}:
        folder.mkdir(parents=True, exist_ok=True)
        for path in set(folder.glob("*.md")) - set(made):
            path.unlink()
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
