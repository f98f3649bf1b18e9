"""The contract of a backbone, over one architecture of every family, and the file it lives in."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import evalsuite.backbones
from evalsuite.backbone import (
    HEADER,
    Backbone,
    BackboneSpec,
    Features,
    Tower,
    build,
    identity_of,
    outline,
    parse_header,
    read_header,
    shapes_only,
)
from evalsuite.checkpoints import load_backbone, sanity
from evalsuite.checkpoints.matching import heads_of
from evalsuite.errors import BackboneError, UsageError
from evalsuite.hooks import Registry

TINY_VIT = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 64}
TINY_SWIN = {"embed_dim": 32, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "small resnet": ("small:resnet10", {"width": 8}),
    "small resnet, wide padding": ("small:resnet10", {"width": 8, "stem_padding": 2}),
    "small resnet of CIFAR": ("small:resnet8", {}),
    "small resnet of CIFAR, projections": ("small:resnet", {"layers": [1, 2], "bottleneck": True, "shortcut": "B"}),
    "small pre-activated resnet": ("small:preresnet8", {"shortcut_from": "input"}),
    "small wide resnet": ("small:wrn10_2", {}),
    "timm resnet": ("timm:resnet18", {"layers": [1, 1, 1, 1]}),
    "timm convnext": ("timm:convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
    "timm swin": ("timm:swin_tiny_patch4_window7_224", TINY_SWIN),
    "timm vit": ("timm:vit_base_patch16_224", TINY_VIT),
    "timm vit, registers": ("timm:vit_base_patch16_224", TINY_VIT | {"reg_tokens": 4, "no_embed_class": True}),
    "timm vit, no class token": (
        "timm:vit_base_patch16_224",
        TINY_VIT | {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
    "timm vit, patch 8": ("timm:vit_base_patch16_224", TINY_VIT | {"patch_size": 8}),
    "torchvision resnet": ("torchvision:resnet18", {}),
    "torchvision squeezenet": ("torchvision:squeezenet1_0", {}),
    "torchvision mobilenet": ("torchvision:mobilenet_v3_small", {}),
    "torchvision densenet": ("torchvision:densenet121", {}),
    "torchvision alexnet": ("torchvision:alexnet", {}),
    "torchvision convnext": ("torchvision:convnext_tiny", {}),
    "torchvision swin": ("torchvision:swin_t", {}),
    "torchvision vit": ("torchvision:vit_b_32", {"image_size": 64}),
}
EXACT = [name for name in ARCHITECTURES if "squeezenet" not in name and "alexnet" not in name and "padding" not in name]
LIGHT = [name for name in ARCHITECTURES if name.startswith(("small", "timm")) or "squeezenet" in name]


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = Registry()
    evalsuite.backbones.evalsuite_register(registry)
    return registry


@pytest.fixture(scope="module")
def make(registry: Registry) -> Callable[[str], Backbone]:
    """The backbone of that name, the same one for all tests of this file: do not change it."""
    made: dict[str, Backbone] = {}

    def get(name: str) -> Backbone:
        if name not in made:
            arch, options = ARCHITECTURES[name]
            torch.manual_seed(0)
            made[name] = build(arch, registry, **options).eval()
        return made[name]

    return get


def pixels(height: int, width: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_are_what_the_spec_says(name, size, make):
    backbone = make(name)
    spec = backbone.spec
    with torch.no_grad():
        features = backbone(pixels(*size))
    assert features.pooled.shape == (2, spec.dim)
    assert {s: m.shape[1] for s, m in features.maps.items()} == dict(spec.strides)
    assert spec.gives == {"pooled", "maps"} | ({"tokens"} if features.tokens is not None else set())
    for stride, level in features.maps.items():
        exact = (2, spec.strides[stride], size[0] // stride, size[1] // stride)
        if name in EXACT:
            assert level.shape == exact
        else:
            assert all(abs(a - b) <= 3 for a, b in zip(level.shape, exact, strict=True))
    if features.tokens is not None:
        (stride,) = spec.strides
        assert features.tokens.shape == (2, size[0] // stride * (size[1] // stride), spec.dim)
    assert all(torch.isfinite(t).all() for t in (features.pooled, *features.maps.values()))


@pytest.mark.parametrize("name", LIGHT)
def test_save_and_load_give_back_the_same_network(name, make, registry, tmp_path):
    backbone = make(name)
    backbone.save(tmp_path / "backbone.safetensors", {"method": "none", "epochs": 3})
    again = Backbone.load(tmp_path / "backbone.safetensors", registry).eval()
    assert again.identity == backbone.identity
    assert again.spec == backbone.spec
    assert read_header(tmp_path / "backbone.safetensors")["provenance"] == {"method": "none", "epochs": 3}
    with torch.no_grad():
        before, after = backbone(pixels(64, 64)), again(pixels(64, 64))
    assert torch.equal(before.pooled, after.pooled)
    assert all(torch.equal(before.maps[s], after.maps[s]) for s in before.maps)


@pytest.mark.parametrize("name", LIGHT)
def test_normalisation_happens_inside(name, registry):
    arch, options = ARCHITECTURES[name]
    backbone = build(arch, registry, **options).eval()
    x = pixels(64, 64)
    mean, std = torch.tensor([0.3, 0.4, 0.5]).view(1, 3, 1, 1), torch.tensor([0.1, 0.2, 0.4]).view(1, 3, 1, 1)
    with torch.no_grad():
        backbone.respec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        by_hand = backbone((x - mean) / std)
        backbone.respec(mean=(0.3, 0.4, 0.5), std=(0.1, 0.2, 0.4))
        inside = backbone(x)
    torch.testing.assert_close(inside.pooled, by_hand.pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LIGHT)
def test_gradients_reach_every_parameter_that_features_need(name, make):
    backbone = make(name)
    features = backbone(pixels(64, 64))
    outputs = [features.pooled, *features.maps.values()]
    wanted = {k: p for k, p in backbone.named_parameters() if "classifier" not in k}
    gradients = torch.autograd.grad([o.square().sum() for o in outputs], list(wanted.values()), allow_unused=True)
    unreached = [k for k, g in zip(wanted, gradients, strict=True) if g is None]
    assert unreached == []


@pytest.mark.parametrize("name", ["timm vit", "timm vit, registers", "timm vit, no class token", "timm vit, patch 8"])
def test_a_vit_takes_any_size_and_gives_its_patches_in_place(name, make):
    backbone = make(name)
    (stride,) = backbone.spec.strides
    with torch.no_grad():
        odd = backbone(pixels(50, 75))
        native = backbone(pixels(64, 64))
    height, width = -(-50 // stride), -(-75 // stride)  # padded up to whole patches
    assert odd.maps[stride].shape[-2:] == (height, width)
    assert odd.tokens.shape[1] == height * width
    tokens = native.maps[stride].flatten(2).transpose(1, 2)
    assert torch.equal(tokens, native.tokens)


def test_tokens_of_a_vit_are_its_patches_without_class_and_registers(make):
    backbone = make("timm vit, registers")
    net: Any = backbone.net
    with torch.no_grad():
        x = (pixels(64, 64) - backbone.mean) / backbone.std
        every = net.forward_features(x)
        features = backbone(pixels(64, 64))
    assert every.shape[1] == 1 + 4 + 16
    assert torch.equal(features.tokens, every[:, 5:])
    assert torch.equal(features.pooled, every[:, 0])


@pytest.mark.parametrize("name", ["small resnet", "timm resnet", "torchvision resnet"])
def test_a_resnet_splits_before_its_last_stage(name, make):
    backbone = make(name)
    trunk, tail = backbone.split()
    with torch.no_grad():
        x = (pixels(64, 64) - backbone.mean) / backbone.std
        features = backbone(pixels(64, 64))
        stage = trunk(x)
    last, before = sorted(features.maps, reverse=True)[:2]
    torch.testing.assert_close(stage, features.maps[before])
    torch.testing.assert_close(tail(stage), features.maps[last])


def test_what_has_no_last_stage_says_so(make):
    with pytest.raises(BackboneError, match="no last stage"):
        make("timm vit").split()


@settings(deadline=None, max_examples=15)
@given(height=st.integers(8, 70), width=st.integers(8, 70))
def test_maps_of_a_small_resnet_halve_rounding_up_at_any_size(make, height, width):
    with torch.no_grad():
        features = make("small resnet")(pixels(height, width, 1))
    for stride, level in features.maps.items():
        assert level.shape[-2:] == (-(-height // stride), -(-width // stride))


def test_the_state_dict_keeps_the_published_names(make):
    import torchvision

    with torch.device("meta"):
        published = torchvision.models.resnet18().state_dict()
    assert set(make("torchvision resnet").net.state_dict()) == set(published)


# -------------------------------------------------------------------------------------------------- names and options


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("timm:resnet1984", {}),
        ("timm:resnet18", {"no_such_option": 1}),
        ("torchvision:resnet1984", {}),
        ("torchvision:mnasnet0_5", {}),
        ("small:resnet21", {}),
        ("small:resnet", {}),
        ("small:resnet20", {"layers": []}),
        ("small:resnet20", {"shortcut": "C"}),
        ("small:resnet20", {"stem_padding": 2}),
        ("small", {}),
    ],
)
def test_what_cannot_be_built_is_refused(arch, options, registry):
    with pytest.raises(BackboneError) as refused:
        build(arch, registry, **options)
    assert arch in refused.value.problem


def test_a_network_of_one_size_says_so_of_another(registry):
    """timm's BEiT, whose table of relative positions is of one size."""
    backbone = build("timm:beit_base_patch16_224", registry, **TINY_VIT).eval()
    with torch.no_grad():
        features = backbone(torch.rand(2, 3, 64, 64))
        assert features.pooled.shape == (2, 64)
        assert features.tokens.shape == (2, 16, 64)
        assert features.maps[16].shape == (2, 64, 4, 4)
        with pytest.raises(BackboneError, match="images of 64x64 pixels alone, not of 32x96"):
            backbone(torch.rand(2, 3, 32, 96))


def test_an_unknown_scheme_is_a_usage_error_with_the_nearest_name(registry):
    with pytest.raises(UsageError, match="did you mean 'timm'"):
        build("tim:resnet18", registry)


def test_a_builder_that_returns_something_else_is_told(registry, monkeypatch):
    monkeypatch.setattr("evalsuite.backbones.timm_zoo.build", lambda name, **options: nn.Identity())
    with pytest.raises(BackboneError, match="is not a backbone"):
        build("timm:resnet18", registry)


# --------------------------------------------------------------------------------------------------- identity, files


def test_identity_depends_on_every_number_and_name_and_on_nothing_else(registry):
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    same = {"b": torch.ones(2), "a": torch.arange(6.0).view(3, 2).view(2, 3)}
    assert identity_of(state) == identity_of(same)
    assert identity_of(state) == identity_of(state | {"a": torch.arange(6.0).view(2, 3).T.contiguous().T})
    others = [
        state | {"b": torch.tensor([1.0, 1.0000001])},
        state | {"b": torch.ones(2).double()},
        state | {"b": torch.ones(2, 1)},
        {"a": state["a"], "c": state["b"]},
    ]
    assert len({identity_of(s) for s in [state, *others]}) == 5


def test_identity_is_pinned():
    """The identity is written into results; it may not drift between versions."""
    state = {"w": torch.tensor([1.0, -2.0]), "n": torch.tensor(3)}
    assert identity_of(state) == "1c023e33e179b9e37b218c95114cb0347a0d42b967683e1898219eae18054984"


class Parts(nn.Module):
    def forward(self, x: Tensor) -> Features:
        return Features(tokens=x.flatten(2).transpose(1, 2))


def test_a_module_that_returns_features_needs_no_look():
    spec = BackboneSpec("parts", 3, {}, frozenset({"tokens"}), mean=(0, 0, 0), std=(1, 1, 1))
    features = Backbone(Parts(), spec)(pixels(4, 4))
    assert features.tokens.shape == (2, 16, 3)
    assert features.pooled is None
    assert features.maps == {}


def test_mean_and_std_follow_the_pixels_type(make):
    arch = make("small resnet")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = arch(pixels(32, 32).bfloat16())
    assert features.pooled.dtype is torch.bfloat16


def test_the_spec_is_plain_json(make):
    spec = make("timm vit, registers").spec
    told = json.loads(json.dumps(spec.to_json()))
    assert told["strides"] == {"16": 64}
    assert told["options"]["reg_tokens"] == 4
    assert replace(spec, image_size=(1, 2)).to_json()["image_size"] == (1, 2)


def test_a_file_that_is_not_ours_is_refused(tmp_path, registry):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    assert read_header(path) is None
    with pytest.raises(BackboneError, match="not a backbone of this suite"):
        Backbone.load(path, registry)
    path.write_bytes(b"")
    with pytest.raises(BackboneError, match="cannot be read"):
        Backbone.load(path, registry)
    safetensors.torch.save_file({"w": torch.ones(2)}, path, {HEADER: json.dumps({"format": 99})})
    with pytest.raises(BackboneError, match="format 99"):
        Backbone.load(path, registry)


def test_saving_over_a_file_leaves_no_partial_one(make, tmp_path):
    path = tmp_path / "backbone.safetensors"
    for _ in range(2):
        make("small resnet").save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["backbone.safetensors"]


DILATED = [(arch, stride) for arch in ("timm:resnet18", "timm:resnet50", "torchvision:resnet50") for stride in (16, 8)]


@pytest.mark.parametrize(("arch", "stride"), DILATED)
def test_a_dilated_resnet_is_the_plain_one_at_every_second_place(arch, stride, registry):
    """The mathematics of it (a trous): dilation undoes a stride but for the places in between, borders included."""
    torch.manual_seed(0)
    options, size = {"layers": [1, 2, 2, 2]} if arch.startswith("timm") else {}, (97, 66)
    plain = build(arch, registry, **options).respec(mean=(0.1, 0.2, 0.3)).eval()
    _shake_norms(plain)
    dilated = plain.dilated(stride)
    assert dilated.identity == plain.identity
    assert dilated.spec.mean == plain.spec.mean
    assert dilated.spec.options["output_stride"] == stride
    assert max(dilated.spec.strides) == stride
    assert dilated.spec.strides[stride] == plain.spec.strides[32]
    pixels = torch.rand(1, 3, *size)
    with torch.no_grad():
        found, expected = dilated(pixels).maps, plain(pixels).maps
    coarse, step = found[stride], 32 // stride
    assert coarse.shape[-2:] == torch.Size(-(-side // stride) for side in size)
    torch.testing.assert_close(coarse[..., ::step, ::step], expected[32], rtol=1e-3, atol=1e-3)
    for level in [s for s in expected if s < stride]:
        assert torch.equal(found[level], expected[level])


def _shake_norms(backbone: Backbone) -> None:
    """Statistics and weights other than a fresh network's, which hide what they do."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)


def test_pooled_features_of_an_image_of_one_place_do_not_change_by_dilation(registry):
    """Of 16 pixels the dilated map has no place but the plain one's."""
    torch.manual_seed(0)
    plain = build("torchvision:resnet50", registry).eval()
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        one, other = plain(pixels).pooled, plain.dilated(16)(pixels).pooled
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_needs_no_dilation_is_copied_and_what_cannot_be_dilated_says_so(registry):
    vit = build("timm:test_vit", registry)
    copied = vit.dilated(16)
    assert copied is not vit
    assert copied.identity == vit.identity
    assert copied.spec == vit.spec
    for arch, stride in (
        ("torchvision:resnet18", 16), ("torchvision:squeezenet1_0", 8), ("timm:test_resnet", 4), ("timm:test_vit", 8),
    ):  # fmt: skip
        backbone = build(arch, registry)
        assert not backbone.dilates(stride)
        with pytest.raises(BackboneError, match=f"{arch} cannot be dilated to an output stride of {stride}"):
            backbone.dilated(stride)
    with pytest.raises(BackboneError, match="8, 16 or 32"):
        build("torchvision:resnet50", registry, output_stride=5)


def test_a_dilated_network_keeps_its_dilation_on_disk(registry, tmp_path):
    dilated = build("timm:test_resnet", registry).dilated(16).eval()
    dilated.save(tmp_path / "b.safetensors")
    again = Backbone.load(tmp_path / "b.safetensors", registry).eval()
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(pixels).maps[16], dilated(pixels).maps[16])


@pytest.mark.parametrize("arch", ["timm:test_vit", "timm:test_convnext", "torchvision:resnet18", "small:resnet10"])
def test_an_outline_has_the_shapes_of_the_network_and_no_numbers(arch, registry):
    net, drawn = outline(arch, registry, {}, {}), build(arch, registry).net
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in drawn.state_dict().items()}
    assert all(tensor.is_meta for tensor in net.state_dict().values())


def test_what_has_room_is_filled_where_only_shapes_are_built():
    with shapes_only():
        here = torch.zeros(2, device="cpu").add_(3)
        nn.init.constant_(here, 4.0)
    assert here.tolist() == [4.0, 4.0]


# --- what a backbone takes, and its towers


class Painter(nn.Module):
    """An encoder, a decoder that no feature depends on, a classifier, and words."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(48, 6), nn.Linear(6, 48)
        self.classifier, self.words = nn.Linear(6, 3), nn.Embedding(26, 6)

    def forward(self, pixels: Tensor) -> Features:
        return Features(pooled=self.encoder(pixels.flatten(1)))


def words(net: Painter, texts: list[str]) -> Tensor:
    return torch.stack([net.words(torch.tensor([ord(c) % 26 for c in text])).mean(0) for text in texts])


def draw(net: Painter, latent: Tensor) -> Features:
    return Features(maps={1: net.decoder(latent).unflatten(1, (3, 4, 4))})


def painter(towers: str = "") -> Backbone:
    known: dict[str, Tower] = {"text": words, "latent": draw}
    spec = BackboneSpec(f"painter:{towers}" if towers else "painter", 6, {}, frozenset({"pooled"}), image_size=(4, 4))
    return Backbone(Painter(), spec, towers={kind: known[kind] for kind in towers.split("-") if kind})


@pytest.fixture
def painters(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    module = types.ModuleType("painters_of_the_test")
    module.painter = painter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    shelf = Registry()
    for entry in registry.entries():
        getattr(shelf, entry.shelf)(entry.name, entry.target, entry.summary)
    shelf.backbone("painter", f"{module.__name__}:painter")
    return shelf


def parts(backbone: Backbone) -> set[str]:
    """The parts of the network whose weights are not all zero."""
    return {name.partition(".")[0] for name, value in backbone.net.state_dict().items() if value.any()}


ALL = {"encoder", "decoder", "classifier", "words"}


@pytest.mark.parametrize(
    ("towers", "heads", "kept"),
    [
        ("", {"decoder", "classifier", "words"}, {"encoder"}),
        ("text", {"decoder", "classifier"}, {"encoder", "words"}),
        ("latent", set(), ALL),  # nothing says what a latent is: all may be its own
        ("text-latent", set(), ALL),
    ],
)
def test_weights_that_a_tower_uses_are_no_heads(
    painters: Registry, tmp_path: Path, towers: str, heads: set[str], kept: set[str]
) -> None:
    name = f"painter:{towers}" if towers else "painter"
    assert {k.partition(".")[0] for k in heads_of(painter(towers))} == heads
    drawn = load_backbone(f"random:{name}", painters).backbone
    assert parts(drawn) == kept
    trained = painter(towers)  # a generator is trained and saved: its decoder is there when it is read again
    trained.save(tmp_path / "a.safetensors")
    again = load_backbone(tmp_path / "a.safetensors", painters).backbone
    assert again.identity == trained.identity
    torch.save(trained.net.state_dict(), tmp_path / "foreign.pth")
    foreign = load_backbone(tmp_path / "foreign.pth", painters, arch=name).backbone
    assert parts(foreign) == kept
    if towers == "latent":
        latent = torch.rand(2, 6)
        assert torch.equal(foreign.encode("latent", latent).maps[1], trained.encode("latent", latent).maps[1])
        assert foreign.encode("latent", latent).maps[1].shape == (2, 3, 4, 4)


def test_a_tower_that_passes_no_gradient_keeps_all_weights() -> None:
    @torch.inference_mode()
    def sealed(net: Painter, texts: list[str]) -> Tensor:
        return words(net, texts)

    spec = BackboneSpec("painter", 6, {}, frozenset({"pooled"}), image_size=(4, 4))
    assert heads_of(Backbone(Painter(), spec, read=sealed)) == frozenset()


def test_a_joint_vector_is_a_feature() -> None:
    class Joined(Painter):
        def forward(self, pixels: Tensor) -> Features:
            return Features(joint=self.decoder(self.encoder(pixels.flatten(1))))

    spec = BackboneSpec("painter", 6, {}, frozenset({"joint"}), image_size=(4, 4))
    assert {k.partition(".")[0] for k in heads_of(Backbone(Joined(), spec))} == {"classifier", "words"}


def test_inputs_go_to_the_tower_of_their_kind() -> None:
    backbone = painter("text")
    assert backbone.takes == {"image", "text"}
    assert backbone.gives == {"pooled"}
    pixels = torch.rand(2, 3, 4, 4)
    one, other = backbone.encode("image", pixels).pooled, backbone(pixels).pooled
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)
    assert torch.equal(backbone.encode_text(["a", "bc"]), words(backbone.net, ["a", "bc"]))
    with pytest.raises(BackboneError, match="painter:text does not take sound") as told:
        backbone.encode("sound", torch.zeros(1, 8))
    assert told.value.cause == "it takes image, text"


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 4)

    def forward(self, texts: list[str]) -> Features:
        return Features(pooled=torch.stack([self.table(torch.tensor(list(t.encode()))).mean(0) for t in texts]))


def test_a_backbone_of_texts_alone(tmp_path: Path) -> None:
    backbone = Backbone(Reader(), BackboneSpec("reader", 4, {}, frozenset({"pooled"}), takes="text"))
    assert backbone.encode_text(["one", "two"]).shape == (2, 4)  # nothing is normalised
    assert backbone.flops() is None
    assert heads_of(backbone) == frozenset()
    assert sanity(backbone).ok
    backbone.save(tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert header is not None
    assert header["spec"]["takes"] == "text"
    with pytest.raises(BackboneError, match="does not take image"):
        backbone.encode("image", torch.zeros(1, 3, 8, 8))


def test_a_header_without_takes_is_of_images_and_no_other_word_is_read() -> None:
    spec: dict[str, Any] = {"arch": "a:b", "options": {}, "image_size": [8, 8], "mean": [0, 0, 0], "std": [1, 1, 1]}
    assert parse_header(json.dumps({"format": 1, "spec": spec}), "f")["spec"].get("takes", "image") == "image"
    assert parse_header(json.dumps({"format": 1, "spec": spec | {"takes": "clip"}}), "f")["spec"]["takes"] == "clip"
    with pytest.raises(BackboneError, match="takes"):
        parse_header(json.dumps({"format": 1, "spec": spec | {"takes": "smell"}}), "f")
    with pytest.raises(ValueError, match="takes one of clip, image, sound, state, text, not 'smell'"):
        BackboneSpec("a:b", 1, {}, frozenset(), takes="smell")
    old = BackboneSpec("a:b", 1, {}, frozenset({"state", "tokens"}))  # as it was said before there was ``takes``
    assert (old.takes, old.gives) == ("state", {"tokens"})
