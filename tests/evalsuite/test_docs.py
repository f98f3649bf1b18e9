"""Pages made of the source say what is in it; docs/tasks itself is compared in tests/test_docs.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from evalsuite.docs import hooks, markdown, pages
from evalsuite.hooks import Registry, Suite
from evalsuite.settings import shown
from evalsuite.task import Metric, Protocol, Task


@dataclass(frozen=True, kw_only=True)
class Steps(Protocol):
    """How long.

    ``steps`` are counted from 0.
    """

    steps: int
    rule: Literal["crop", "pad-it"] = "crop"  # what happens to the borders
    sizes: tuple[int, ...] = ()
    clip: float | None = None


@dataclass(frozen=True, kw_only=True)
class LongSteps(Steps):
    """Longer."""

    clip: float | None = 1.0
    patience: int = 3


class Walk(Task):
    """How far it gets.

    ``short``: ten steps.
    ``long`` (default): a thousand, of
    which many.
    """

    name = "walk"
    metrics = (Metric("distance", low=0.0, high=9.5), Metric("falls", higher_is_better=False))
    primary = "distance"
    needs = frozenset({"maps"})
    engines = ("legs",)
    protocols = (LongSteps(id="long", version=2, steps=1000), Steps(id="short", version=1, steps=10, sizes=(1, 2)))

    def requires(self, protocol):
        return self.needs | ({"stages"} if protocol.id == "short" else set())

    def promises(self, protocol):
        return (*self.metrics, Metric("tumbles")) if protocol.id == "short" else self.metrics

    def leading(self, protocol):
        return "tumbles" if protocol.id == "short" else self.primary

    def fingerprint(self, setup): ...

    def run(self, backbone, setup): ...


@pytest.fixture
def made() -> dict[str, str]:
    registry = Registry()
    registry.task("walk", f"{__name__}:Walk", "a walk | a run")
    return pages(registry)


def test_the_index_tells_what_counts_and_who_trains(made: dict[str, str]):
    assert set(made) == {"README.md", "protocols.md", "walk.md"}
    assert "| [walk](walk.md) | a walk \\| a run | distance | `legs` |" in made["README.md"]
    assert "## Pages made of the source say what is in it;" in made["README.md"]  # the family: its module's first line


def test_a_page_has_metrics_with_their_direction_and_range(made: dict[str, str]):
    assert "| `distance` | higher | 0 to 9.5 |" in made["walk.md"]
    assert "| `falls` | lower | 0 to 1 |" in made["walk.md"]
    assert "Of `short` besides:\n\n| metric | better | range |\n| --- | --- | --- |\n| `tumbles` |" in made["walk.md"]
    assert "By `short` it is `tumbles` that counts." in made["walk.md"]


def test_a_page_has_each_protocols_own_numbers_its_hash_and_its_needs(made: dict[str, str]):
    long, short = made["walk.md"].partition("## Protocols")[2].split("\n### ")[1:]
    assert f"Version 2, hash `{Walk.protocols[0].hash}`, of kind [LongSteps](protocols.md#longsteps).\n" in long
    assert "| `steps` | 1000 |" in long
    assert "`clip`" not in long  # as its kind has it
    assert "It needs `stages` of the backbone, too." in short
    assert "| `sizes` | 1,2 |" in short


def test_kinds_of_protocols_tell_types_defaults_and_what_they_are_made_of(made: dict[str, str]):
    steps, longer = made["protocols.md"].split("\n## ")[1:]
    assert "`steps` are counted from 0." in steps
    assert "| `steps` | `int` | *its own* |  |" in steps
    assert "| `rule` | crop, pad-it | crop | what happens to the borders |" in steps
    assert "| `sizes` | `tuple[int, ...]` | (empty) |  |" in steps
    assert "| `clip` | `float or None` | none |  |" in steps
    assert "| `clip` | `float or None` | 1.0 |  |" in longer  # the default is another
    assert "`rule`" not in longer
    assert "It has all fields of [Steps](#steps), too." in longer


def test_terms_become_a_list_and_sentences_stay(made: dict[str, str]):
    assert "- `short`: ten steps.\n- `long` (default): a thousand, of\nwhich many." in made["walk.md"]
    assert markdown("``one``: of one term, see :class:`~a.B`.") == "`one`: of one term, see `a.B`."


def test_hooks_are_told_with_their_signature():
    assert hooks(Suite).startswith(
        "### evalsuite_register\n\n```\nevalsuite_register(registry: Registry) -> None\n```\n"
    )
    assert hooks(Suite).endswith("What is returned: nothing.")


@pytest.mark.parametrize(
    ("value", "text"), [(True, "true"), (None, "none"), ((0.5, 2), "0.5,2"), ((), "(empty)"), ("a|b", "a|b")]
)
def test_values_are_shown_as_one_would_set_them(value: object, text: str):
    assert shown(value) == text
