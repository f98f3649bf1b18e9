"""The pages of docs/methods are those that the source makes, and say what is in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from evalsuite import Registry, hookimpl
from pretrain import Method, Modifier
from pretrain.docs import pages

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "methods"


def test_the_pages_are_up_to_date(registry):
    """If not: python tests/pages.py"""
    written = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert written == pages(registry)


def test_every_method_and_modifier_has_a_page(registry):
    names = [*registry.names("method"), *registry.names("modifier")]
    assert {path.stem for path in FOLDER.iterdir()} == {*names, "README"}


@dataclass(frozen=True)
class Settings:
    reach: float = 0.5  # how far
    kind: Literal["a", "b-c"] = "a"
    limit: int | None = None


class Loner(Method):
    """Learns ``alone``; see :class:`pretrain.Method`."""

    Options = Settings

    @hookimpl
    def losses(self):
        return {}


class Coupler(Modifier):
    """Wraps pairs."""

    @hookimpl(wrapper=True)
    def pairs(self):
        return (yield)


@pytest.fixture
def made():
    registry = Registry()
    registry.method("loner", f"{__name__}:Loner", "learns alone")
    registry.method("simclr", "pretrain.methods.simclr:SimCLR", "pairs")
    registry.modifier("coupler", f"{__name__}:Coupler", "wraps")
    return pages(registry)


def test_a_page_tells_options_with_types_defaults_and_what_stands_beside_them(made):
    page = made["loner.md"]
    assert "Learns `alone`; see `pretrain.Method`." in page
    assert "| `loner.reach` | `float` | 0.5 | how far |" in page
    assert "| `loner.kind` | a, b-c | a |  |" in page
    assert "| `loner.limit` | `int or None` | none |  |" in page
    assert "all methods" not in page  # it has no training options of its own
    assert "| `simclr.lr` | 1.2 |" in made["simclr.md"]


def test_a_modifiers_page_names_the_methods_it_composes_with(made):
    assert made["coupler.md"].rstrip().endswith("[simclr](simclr.md)")
