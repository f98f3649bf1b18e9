"""What a file says of itself: it builds no other network than its tensors are, loads nothing, asks no network, and what
can be measured is measured."""

from __future__ import annotations

import hashlib
import json
import pickle
import socket
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from evalsuite.backbone import HEADER, Backbone, BackboneSpec, Features, build, read_header, rebuild
from evalsuite.checkpoints import load_backbone
from evalsuite.errors import BackboneError
from evalsuite.hooks import Registry

TINY = {"layers": [1, 1], "width": 4, "image_size": 8}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    asked: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        raise OSError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked


class Sentinel:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Path:
    path = tmp_path_factory.mktemp("whole") / "backbone.safetensors"
    build("small:resnet", registry, **TINY).save(path, {"method": "none"})
    return path


def changed(whole: Path, path: Path, **changes: Any) -> Path:
    """The same tensors under another header; ``changes`` are of the header or, by their names, of its spec."""
    header = read_header(whole)
    assert header is not None
    for name, value in changes.items():
        (header if name in header else header["spec"])[name] = value
    safetensors.torch.save_file(safetensors.torch.load_file(whole), path, {HEADER: json.dumps(header)})
    return path


def refused(path: Path, registry: Registry, match: str = ".") -> None:
    for load in (lambda: load_backbone(path, registry), lambda: Backbone.load(path, registry)):
        with pytest.raises(BackboneError, match=match) as told:
            load()
        assert len(str(told.value).splitlines()) == 3
        assert len(str(told.value)) < 1500


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_path": "SENTINEL"}, {"pretrained": True}, {"pretrained_cfg": {"url": "http://evil.example/x.pth"}},
        {"pretrained_cfg_overlay": {"file": "SENTINEL"}}, {"cache_dir": "/tmp"}, {"features_only": True},
        {"pretrained": True, "pretrained_cfg": {"hf_hub_id": "evil/x"}}, {"img_size": 100_000}, {"depth": 10**9},
        {"embed_dim": 1 << 30}, {"no_such_option": 1}, {"drop_path_rate": float("nan")}, {"norm_eps": {"x": 1e400}},
        {"act_layer": "os.system"}, {"act_layer": "\ud800"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("arch", ["timm:test_vit", "timm:test_resnet"])
def test_options_of_a_header_load_nothing(whole, tmp_path, registry, arch: str, options: dict[str, Any]):
    sentinel = tmp_path / "sentinel"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Sentinel(sentinel)))
    options = json.loads(json.dumps(options).replace("SENTINEL", str(tmp_path / "evil.pth")))
    refused(changed(whole, tmp_path / "x.safetensors", arch=arch, options=options), registry)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "arch",
    ["timm:hf-hub:evil/x", "timm:local-dir:/tmp", "hf-hub:evil/x", "timm:../x", "nobody:x", "", "timm", ":", "a b",
     "small", "random:timm:test_vit", "timm:\ud800", "timm:test_vit\n", "x" * 10_000, "timm:vit_giant_patch14_dinov2",
     "torchvision:vit_h_14"],
)  # fmt: skip
def test_architectures_of_a_header_are_registered_names_of_the_size_of_the_file(whole, tmp_path, registry, arch: str):
    refused(changed(whole, tmp_path / "x.safetensors", arch=arch, options={}), registry)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", [float("nan"), 0, 0]), ("mean", [0, 0]), ("mean", ["0", 0, 0]), ("mean", [10**400, 0, 0]),
        ("mean", None),
        ("std", [0, 1, 1]), ("std", [-1, 1, 1]), ("std", [float("inf"), 1, 1]), ("std", [1e-300, 1, 1]), ("std", 1),
        ("image_size", [100_000, 8]), ("image_size", [0, 8]), ("image_size", [8.5, 8]), ("image_size", [8]),
        ("image_size", [True, 8]), ("image_size", "8"), ("options", []), ("options", {"x": 1e400}), ("format", 2),
        ("provenance", []), ("provenance", {"x": float("nan")}), ("provenance", {"x": 10**400}), ("spec", None),
        ("provenance", {"x": "\ud800"}),
    ],
)  # fmt: skip
def test_numbers_of_a_header_by_which_nothing_is_computed_are_refused(whole, tmp_path, registry, name, value):
    refused(changed(whole, tmp_path / "x.safetensors", **{name: value}), registry)


@pytest.mark.parametrize(
    "text", ["", "[", "[]", "null", "1" * 5000, "[" * 200_000, '{"format": 1}', '{"format": {}}', "x" * (2 << 20)]
)
def test_headers_that_are_none_are_refused_or_passed_over(whole, tmp_path, registry, text: str):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(whole), path, {HEADER: text})
    with pytest.raises(BackboneError):
        Backbone.load(path, registry)
    with pytest.raises(BackboneError):
        load_backbone(path, registry)


def test_where_a_file_lies_and_what_it_holds_is_measured(whole, tmp_path, registry):
    lie = {"sha256": "ab" * 32, "source": "elsewhere", "trusted": True, "layout": "official", "method": "moco"}
    path = changed(whole, tmp_path / "x.safetensors", provenance=lie)
    provenance = load_backbone(path, registry).provenance
    assert provenance["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert provenance["source"] == str(path)
    assert provenance["trusted"] is False
    assert provenance["method"] == "moco"


def test_a_user_may_say_what_the_header_may_not(whole, tmp_path, registry):
    path = changed(whole, tmp_path / "x.safetensors", options=TINY | {"shortcut": "A", "zeros": "nowhere"})
    refused(path, registry, "zeros")
    loaded = load_backbone(path, registry, options={"zeros": "end"})
    assert loaded.backbone.spec.options["zeros"] == "end"


@pytest.mark.parametrize(
    "header",
    [
        {"mean": "[NaN, 0, 0]"}, {"mean": "nonsense"}, {"std": "[0, 1, 1]"}, {"std": "-1"}, {"std": "1e400"},
        {"image_size": "100000"}, {"image_size": "[8, 0]"}, {"image_size": "[" * 100_000}, {"mean": "1" * 5000},
        {"note": "RGB in [0,1], std (1/0, 1/255, 1/255)"}, {"note": "RGB in [0,1], mean (1/2/3, 0, 0)"},
        {"note": "RGB in [0,1], std (0, 0, 0)"}, {"note": "RGB in [0,1], 100000x8"}, {"arch": "timm:hf-hub:evil/x"},
        {"arch": "nobody:x"}, {"arch": "timm:vit_giant_patch14_dinov2"}, {"arch": "\x1b[2J"}, {"arch": ""},
    ],
)  # fmt: skip
def test_headers_of_strangers_are_refused_likewise(whole, tmp_path, registry, header: dict[str, str]):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(whole), path, header)
    with pytest.raises(BackboneError) as told:
        load_backbone(path, registry)
    assert len(str(told.value).splitlines()) == 3


CONFIGS: list[dict[str, Any]] = [
    {"architecture": "test_vit", "model_args": {"checkpoint_path": "SENTINEL", "pretrained": True}},
    {"architecture": "test_vit", "pretrained_cfg": {"url": "http://evil.example/x", "file": "SENTINEL"}},
    {"architecture": "test_vit", "model_args": {"img_size": 100_000, "depth": 10_000}},
    {"architecture": "hf-hub:evil/x"}, {"architecture": "vit_giant_patch14_dinov2"}, {"architecture": ["test_vit"]},
    {"architecture": "test_vit", "model_args": {"depth": 10**400, "img_size": [10**400]}, "num_heads": 10**400},
    {"pretrained_cfg": {"mean": [float("nan")] * 3, "std": [0, 0, 0], "input_size": [3, 10**9, 10**9]}},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_texts_beside_a_file_load_nothing(tmp_path, registry, config: dict[str, Any], name: str):
    sentinel = tmp_path / "sentinel"
    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps(Sentinel(sentinel)))
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config).replace("SENTINEL", str(evil)))
    state = build("small:resnet10", registry, width=4).net.state_dict()
    if name.endswith("bin"):
        torch.save(state, folder / name)
    else:
        safetensors.torch.save_file(state, folder / name)
    assert load_backbone(folder, registry).report.arch == "small:resnet10"
    assert not sentinel.exists()


@pytest.mark.parametrize("saved", ["hyper_parameters", "args", "cfg"])
def test_settings_in_a_file_load_nothing(tmp_path, registry, saved: str):
    settings = {
        "model_name": "test_vit", "arch": "hf-hub:evil/x", "backbone": "vit_giant_patch14_dinov2",
        "model_kwargs": {"pretrained": True, "checkpoint_path": "/evil.pth", "img_size": 100_000},
    }  # fmt: skip
    torch.save({"state_dict": {"w": torch.ones(3, 3)}, saved: settings}, tmp_path / "x.ckpt")
    with pytest.raises(BackboneError) as told:
        load_backbone(tmp_path / "x.ckpt", registry)
    assert len(str(told.value).splitlines()) == 3


class Towers:
    """Builders of a plugin, which note on which device each of their networks was begun, and how many blocks it got."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.blocks = 0

    def tower(self, *, width: int = 4, dropped: int = 1, blocks: int = 1) -> Backbone:
        net = nn.Sequential()
        self.begun.append(torch.zeros(0).device.type)
        for _ in range(blocks):
            self.blocks += 1
            net.append(nn.Linear(3, width))
        net.head = nn.Linear(width, dropped)
        del net.head
        spec = BackboneSpec("tower", width, {}, frozenset({"pooled"}), {"width": width} if width != 4 else {}, (8, 8))
        return Backbone(net, spec, lambda net, pixels: Features(pooled=net(pixels.mean((2, 3)))))

    def high(self) -> Backbone:
        return self.tower(width=1 << 10, blocks=200)

    def topped(self) -> Backbone:
        return self.tower(dropped=1 << 24)

    def looking(self, *, width: int = 4) -> Backbone:
        assert float(torch.ones(1)) == 1  # which no tensor on the meta device can say
        return self.tower(width=width)


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> tuple[Towers, Registry]:
    made, registry = Towers(), Registry()
    module = types.ModuleType("towers")
    monkeypatch.setitem(sys.modules, "towers", module)
    for name in ("tower", "high", "topped", "looking"):
        setattr(module, name, getattr(made, name))
        registry.backbone(name, f"towers:{name}")
    return made, registry


def test_a_network_without_options_is_built_once(towers, tmp_path):
    made, registry = towers
    made.tower().save(tmp_path / "x.safetensors")
    made.begun.clear()
    Backbone.load(tmp_path / "x.safetensors", registry)
    assert made.begun == ["cpu"]


def test_a_network_far_larger_than_its_file_is_not_built_to_its_end(towers):
    made, registry = towers
    with pytest.raises(BackboneError, match="819,200 numbers"):
        rebuild("high", registry, {}, {}, largest=10_000, source="a file")
    assert made.begun == ["cpu", "meta"]
    assert made.blocks == 3 + 200, "blocks on the processor that fit, and all on the meta device"


def test_what_a_builder_takes_away_again_does_not_count(towers):
    made, registry = towers
    torch.manual_seed(0)
    wanted = made.topped().digest
    made.begun.clear()
    torch.manual_seed(0)
    backbone = rebuild("topped", registry, {}, {}, largest=1000, source="a file")
    assert made.begun == ["cpu", "meta", "cpu"]
    assert backbone.digest == wanted, "other weights than without a bound"


def test_options_of_a_file_are_not_given_to_what_cannot_be_sized_before(towers, tmp_path):
    made, registry = towers
    rebuild("looking", registry, {}, {"width": 8}, largest=1000, source="a file")
    made.begun.clear()
    with pytest.raises(BackboneError, match="meta device") as told:
        rebuild("looking", registry, {"width": 8}, {}, largest=1000, source="a file")
    assert len(str(told.value).splitlines()) == 3
    assert made.begun == []
