"""What all pages share: the templates, their style, and the policy that lets a page load nothing."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["embedded", "environment", "frame", "text"]


def environment() -> Environment:
    """The templates; everything that is not marked as safe is escaped."""
    pages = Environment(
        loader=PackageLoader("evalsuite.board"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    pages.filters["pretty"] = lambda value: json.dumps(value, indent=2, default=str)
    return pages


@cache
def text(name: str) -> str:
    """A file of the templates as it is."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def frame(script: str = "") -> dict[str, Any]:
    """Style and policy of a page: it may run the one script that has this hash, and load nothing."""
    allowed = f" 'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" if script else " 'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src{allowed}; base-uri 'none'"
    return {"style": Markup(text("style.css")), "policy": policy}


def embedded(content: Mapping[str, Any]) -> str:
    """JSON inside a script element: no character of it can end the element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028")
