"""Text after ``--set`` is read one way everywhere, and what a page shows can be given back."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from evalsuite.errors import UsageError
from evalsuite.settings import assignments, shown, typed, untyped
from pretrain.plugin import Training, read_options
from pretrain.train import compose


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("none", int | None, None),
        ("None", int | None, None),
        ("null", tuple[float, ...] | None, None),
        ("none", Literal["none", "cosine"], "none"),
        ("none", str, "none"),
        ("true", bool, True),
        ("False", bool, False),
        (".5", float, 0.5),
        ("1E-3", float, 1e-3),
        ("3", float, 3.0),
        ("3", int, 3),
        ("3", str, "3"),
        ("auto", int | Literal["auto"], "auto"),
        ("1,2", tuple[int, ...], (1, 2)),
        ("[1, 2]", tuple[int, ...], (1, 2)),
        ("7", tuple[int, ...], (7,)),
        (".5, 2", tuple[float, ...], (0.5, 2.0)),
        ("", tuple[int, ...], ()),
        ("(empty)", tuple[int, ...], ()),
        ("", str, ""),
        ("a,b", tuple[str, ...], ("a", "b")),
        ("a", str | tuple[str, ...], "a"),
        ("a,b", str | tuple[str, ...], ("a", "b")),
        ("a,b", str, "a,b"),
        ("[0.1, 1], [0.2, 1]", tuple[tuple[float, float], ...], ((0.1, 1.0), (0.2, 1.0))),
        ('{"a": 1}', dict[str, int], {"a": 1}),
        ("1,none", tuple[int | None, ...], (1, None)),
    ],
)
def test_a_value_is_read_as_its_type(text, kind, value):
    read = typed(text, kind, "x", None)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("big", int),
        ("3.5", int),
        ("none", int),
        ("inf", float),
        ("nan", float),
        ("maybe", bool),
        ("1,x", tuple[int, ...]),
    ],
)
def test_what_is_none_is_refused_with_an_example(text, kind):
    with pytest.raises(UsageError) as refused:
        typed(text, kind, "width", 16)
    assert refused.value.problem == f"--set width={text} cannot be read"
    assert refused.value.cause.endswith("now it is 16")
    assert refused.value.fix == "for example --set width=16"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16), ("[1,2]", (1, 2)), ("1,2", (1, 2)), ("true", True), ("True", True), ("none", None), ("null", None),
        (".5", 0.5), ("gelu", "gelu"), ("a,b", "a,b"), ('"16"', "16"), ("", ""),
    ],
)  # fmt: skip
def test_a_value_of_no_known_type_is_what_it_looks_like(text, value):
    read = untyped(text)
    assert read == value
    assert type(read) is type(value)


def test_assignments():
    assert assignments(["a=1", " b = x=y ", "a=2", "c="], "--set") == {"a": "2", "b": "x=y", "c": ""}
    for item in ("a", "=1", " =1"):
        with pytest.raises(UsageError, match="is no setting"):
            assignments([item], "--arch-option")


def test_every_value_that_a_task_shows_can_be_set(registry):
    given = 0
    for task in registry.names("task"):
        for protocol in registry.get("task", task).protocols:
            own = {f.name for f in dataclasses.fields(protocol) if f.init}
            own -= {"id", "version", "modified", "ranked", "recipes", "settings"}  # the last two are made of the others
            values = {name: getattr(protocol, name) for name in own}
            same = protocol.override({name: shown(value) for name, value in values.items()})
            assert same == protocol, f"{task} {protocol.id}"
            given += len(values)
    assert given > 1000


def test_every_value_that_a_method_shows_can_be_set(registry):
    parts = [registry.get(shelf, name) for shelf in ("method", "modifier") for name in registry.names(shelf)]
    for part in parts:
        for preset in ({}, *(preset.options for preset in getattr(part, "presets", {}).values())):
            options = read_options(part, "part", {}, preset)
            texts = {f.name: shown(getattr(options, f.name)) for f in dataclasses.fields(options) if f.init}
            assert read_options(part, "part", texts, {}) == options
    assert any(issubclass(part.Options, Training) for part in parts)


def test_a_part_may_be_left_out_where_one_part_has_the_option(registry):
    recipe, _ = compose(
        "simclr", ["adainf"], registry=registry, settings={"temperature": "0.7", "adainf.copies": "3", "lr": ".5"}
    )
    assert recipe.method.options.temperature == 0.7
    assert recipe.method.options.lr == 0.5
    with pytest.raises(UsageError, match="has no setting 'temprature'") as refused:
        compose("simclr", ["adainf"], registry=registry, settings={"temprature": "1"})
    assert refused.value.fix == "did you mean 'temperature'?"


def test_an_option_of_several_parts_needs_the_part(registry):
    with pytest.raises(UsageError, match="may be of several parts") as refused:
        compose("moco", ["interclr"], registry=registry, settings={"temperature": "0.7"})
    assert refused.value.cause == "moco and interclr have an option temperature"
    assert refused.value.fix == "for example --set moco.temperature=0.7"
