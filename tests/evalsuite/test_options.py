"""Options of builders: what users may say is bounded, what files may say is less, and neither brings weights."""

from __future__ import annotations

import inspect
import json
import math
import socket
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypedDict, Unpack

import pytest
import timm
import torch
from evalsuite_objects import zoo
from pydantic import Field
from timm.models import build_model_with_cfg
from torch import nn

from evalsuite.backbone import Backbone, BackboneSpec
from evalsuite.backbones import small_zoo, timm_zoo, torchvision_zoo
from evalsuite.checkpoints import configs
from evalsuite.options import LOADING, OptionError, by_content, check, declared_by_name, offline, sayable

ZOOS = {
    "timm": timm_zoo.build, "torchvision": torchvision_zoo.build, "small": small_zoo.build, "objects": zoo.build,
}  # fmt: skip


Key = Annotated[str, Field(pattern="^[a-z]$")]


class More(TypedDict, total=False):
    ratio: Annotated[float, Field(gt=0, lt=1)]
    word: Annotated[str, Field(pattern="^[a-z]{1,5}$")]
    free: str


def builder(
    name: str = "a", *, width: int = 4, sizes: Sequence[int] = (), deep: dict[Key, list[float]] | None = None,
    kind: Literal["one", "two"] = "one", pretrained: bool = False, path: str = "", unsaid=0, **options: Unpack[More],
) -> None:  # fmt: skip
    """Declares some of what it takes."""


SAYABLE: dict[str, Any] = {"width": 8, "sizes": [1, 2], "deep": {"x": [0.5]}, "kind": "two", "ratio": 0.5, "word": "ab"}


def test_a_file_may_set_what_is_declared_and_plain():
    assert sayable(builder, "a", SAYABLE) == SAYABLE
    assert sayable(builder, "a", {"deep": None}) == {"deep": None}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("path", "/etc/passwd"), ("free", "x"), ("pretrained", True), ("unsaid", 1), ("name", "b"), ("nothing", 1),
        ("width", "8"), ("width", True), ("width", 8.5), ("width", 10**400), ("width", 1 << 20), ("width", None),
        ("sizes", list(range(65))), ("sizes", ["1"]), ("sizes", [1 << 20]), ("deep", {"x": [math.nan]}),
        ("deep", {"x": [math.inf]}), ("deep", {"x": {"y": 1}}), ("deep", {"../x": []}),
        ("kind", "three"), ("ratio", 1), ("ratio", -math.inf),
        ("word", "A"), ("word", "ab\n"), ("word", "\ud800"), ("\x1b[2J", 1),
    ],
)  # fmt: skip
def test_what_else_a_file_says_is_refused(option: str, value: Any):
    with pytest.raises(OptionError) as refused:
        sayable(builder, "a", {option: value})
    assert len(str(refused.value)) < 400


def test_values_as_deep_as_the_stack_are_refused():
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    with pytest.raises(OptionError, match="deep"):
        sayable(builder, "a", {"deep": value})


def test_users_may_say_what_is_not_declared_but_nothing_that_loads():
    check(builder, "a", {"path": "/data", "unsaid": object(), "nothing": 1})
    for option in LOADING:
        with pytest.raises(OptionError, match="no option"):
            check(builder, "a", {option: None})
    with pytest.raises(OptionError, match="ratio=2"):
        check(builder, "a", {"ratio": 2})


def test_a_builder_that_declares_nothing_gets_nothing_from_files():
    def bare(name, **options):
        pass

    for undeclared in (bare, lambda **options: None, dict):
        assert sayable(undeclared, "a", {}) == {}
        with pytest.raises(OptionError, match="nothing"):
            sayable(undeclared, "a", {"width": 1})


def test_options_may_follow_from_the_name():
    def wide(width: int = 1) -> None: ...

    @declared_by_name({"wide": wide}.get)
    def build(name: str, **options: Any) -> None: ...

    assert sayable(build, "wide", {"width": 2}) == {"width": 2}
    with pytest.raises(OptionError, match="nothing"):
        sayable(build, "other", {"width": 2})


@pytest.mark.parametrize("scheme", ZOOS)
@pytest.mark.parametrize("option", ["pretrained", "checkpoint_path", "weights", "pretrained_cfg", "norm_layer.x"])
def test_no_zoo_of_ours_is_led_astray(scheme: str, option: str):
    with pytest.raises(OptionError):
        sayable(ZOOS[scheme], "cnn" if scheme == "objects" else "resnet18", {option: "http://evil.example/x"})


def test_timm_has_no_loading_option_that_we_let_through():
    """Whatever its factory itself takes is about where weights come from, but for what we list."""
    own = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    declared = set(inspect.get_annotations(timm_zoo.Options))
    assert not own & declared
    assert not LOADING & declared
    assert declared | {"norm_eps"} >= configs.OPTIONS


@pytest.mark.parametrize("value", [0, -1, 100_000, 224.5, "224", [224, 100_000], True])
def test_sizes_of_images_are_bounded_for_users_too(value: Any):
    with pytest.raises(OptionError, match="img_size"):
        check(timm_zoo.build, "test_vit", {"img_size": value})
    with pytest.raises(OptionError, match="image_size"):
        check(small_zoo.build, "resnet20", {"image_size": value})


def test_offline_no_host_is_reached_from_this_thread():
    with offline():
        with pytest.raises(OptionError, match="network"):
            socket.create_connection(("127.0.0.1", 9), 0.1)
        with pytest.raises(OptionError, match="network"):
            socket.getaddrinfo("localhost", 80)
    assert json.dumps(socket.getaddrinfo("127.0.0.1", 80)[0][4]) == '["127.0.0.1", 80]'


# --- options that name files


def test_what_names_a_file_counts_by_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, copy, folder = tmp_path / "words.txt", tmp_path / "again.txt", tmp_path / "parts"
    one.write_text("a b")
    copy.write_text("a b")
    folder.mkdir()
    (folder / "x").write_text("1")
    (tmp_path / "avg").write_text("no file is meant by a bare word")
    plain = {
        "pool": "avg",
        "depth": 3,
        "gain": 0.5,
        "name": "none.txt",
        "far": "/no/such/file",
        "flag": True,
        "off": None,
    }
    assert by_content(plain) == plain
    first = by_content({"table": str(one), "more": [one, {"deep": "words.txt"}], "folder": str(folder)})
    assert first["table"] == first["more"][0] == first["more"][1]["deep"] == by_content(copy)
    assert first["table"].startswith("sha256:")
    one.write_text("a c")
    (folder / "x").write_text("2")
    later = by_content({"table": str(one), "folder": str(folder)})
    assert later["table"] != first["table"]
    assert later["folder"] != first["folder"]
    assert by_content("\0/x") == "\0/x"


@pytest.mark.parametrize("seed", [None, 3])
def test_a_backbone_is_known_by_the_content_of_the_files_of_its_options(tmp_path, seed):
    table = tmp_path / "table.txt"

    def make(text, path=table):
        path.write_text(text)
        torch.manual_seed(0)
        spec = BackboneSpec("eye", 3, {}, frozenset({"pooled"}), {"table": str(path)}, image_size=(8, 8))
        backbone = Backbone(nn.Linear(2, 2), spec)
        return backbone if seed is None else backbone.drawn(seed)

    one = make("a").identity
    assert make("a").identity == one == make("a", tmp_path / "copy.txt").identity
    assert make("b").identity != one
