"""``python tests/pages.py`` writes docs/methods anew, from the docstrings and options of our methods and modifiers."""

from __future__ import annotations

from pathlib import Path

from evalsuite.hooks import load
from pretrain.docs import pages

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "methods"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages(load(environ={"EVALSUITE_PLUGINS": ""}).registry).items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
