"""What no tensor shows of a vision transformer: by the file's word, its layout's code, or a guess that is told."""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from evalsuite.checkpoints import Candidate, File, State, layouts, load_backbone
from evalsuite.checkpoints.layouts import vit
from evalsuite.checkpoints.vits import REGISTERED
from evalsuite.errors import BackboneError


def net(width: int, heads: int, depth: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "img_size": 32, "patch_size": 16}
    made = timm.create_model("vit_base_patch16_224", num_classes=0, **(sizes | options))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def state(source: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + k: v for k, v in source.state_dict().items()}


def lightning(width: int, heads: int, hyper: Any) -> tuple[nn.Module, Any]:
    made = net(width, heads)
    content = state(made, "backbone.") | {
        "classifier.weight": torch.zeros(3, width),
        "projector.0.weight": torch.ones(1),
    }
    return made, {"pytorch-lightning_version": "2.1", "state_dict": content, "hyper_parameters": hyper}


def solo(method: str, width: int, heads: int, name: str) -> tuple[nn.Module, Any]:
    return lightning(width, heads, {"method": method, "backbone": {"name": name, "kwargs": {"img_size": 32}}})


def moco_positions(made: Any) -> Any:
    """MoCo v3's fixed table: for a patch in row i and column j sines and cosines of i, then of j."""
    width, side = made.embed_dim, made.patch_embed.grid_size[0]
    rates = [10_000 ** (-k / (width // 4)) for k in range(width // 4)]
    rows = [[0.0] * width]
    for i, j in itertools.product(range(side), repeat=2):
        rows.append([f(n * r) for n in (i, j) for f in (math.sin, math.cos) for r in rates])
    made.pos_embed.data = torch.tensor([rows])
    return made


def omegaconf_like(tree: Any) -> Any:
    """What unpickled nodes of OmegaConf are here: attributes without behaviour."""
    if isinstance(tree, dict):
        return Namespace(_content={k: omegaconf_like(v) for k, v in tree.items()}, _metadata=None)
    return Namespace(_val=tree)


def dino() -> tuple[nn.Module, Any]:
    made = net(384, 6)
    teacher = state(made, "backbone.") | {"head.last_layer.weight_g": torch.ones(8, 1)}
    return made, {"teacher": teacher, "student": state(net(384, 6), "module.backbone."), "epoch": 1}


def mae() -> tuple[nn.Module, Any]:
    made = net(768, 12)
    return made, {
        "model": state(made) | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.ones(8, 768)}
    }


def of_args() -> tuple[nn.Module, Any]:
    made = net(96, 6)
    return made, {"model": state(made), "args": Namespace(lr=0.1, num_heads=6, decoder={"num_heads": 2})}


def of_node() -> tuple[nn.Module, Any]:
    made = net(96, 4)
    config = omegaconf_like({"model": {"encoder": {"num_heads": 4}, "predictor": {"num_heads": 12}}})
    return made, {"model": state(made), "cfg": config}


def of_timm() -> tuple[nn.Module, Any]:
    made = timm.create_model("test_vit", num_classes=0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made, {"arch": "test_vit", "state_dict": state(made), "epoch": 1}


def of_timm_with_options() -> tuple[nn.Module, Any]:
    made = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, img_size=32, num_heads=6).eval()
    options = {"depth": 1, "img_size": 32, "num_heads": 6}
    return made, {"state_dict": state(made), "args": Namespace(model="vit_tiny_patch16_224", model_kwargs=options)}


def moco_plain() -> tuple[nn.Module, Any]:
    made = moco_positions(net(384, 12))
    return made, {"arch": "vit_small", "state_dict": state(made, "module.")}


def openmmlab(arch: str, width: int, heads: int) -> tuple[nn.Module, Any]:
    made = net(width, heads)
    text = f"model = dict(\n    backbone=dict(type='VisionTransformer', arch='{arch}'),\n    head=dict(num_classes=3))"
    return made, {"meta": {"cfg": text, "epoch": 3}, "state_dict": state(made, "backbone.")}


def named(key: str, name: str, width: int, heads: int) -> tuple[nn.Module, Any]:
    made = net(width, heads)
    return made, {"model": state(made), "args": Namespace(**{key: name})}


SAID: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "solo-learn's mocov3, tiny": lambda: solo("mocov3", 192, 12, "vit_tiny"),
    "solo-learn's mae, small": lambda: solo("mae", 384, 12, "vit_small"),
    "solo-learn's dino, small": lambda: solo("dino", 384, 6, "vit_small"),
    "solo-learn, flat and old": lambda: lightning(192, 12, {"method": "mocov3", "backbone": "vit_tiny", "lr": 1}),
    "solo-learn, a configuration of OmegaConf": lambda: lightning(192, 12, omegaconf_like({"method": "mae"})),
    "solo-learn's options": lambda: lightning(96, 3, {"method": "byol", "backbone": {"kwargs": {"num_heads": 3}}}),
    "DINO": dino,
    "MAE": mae,
    "MoCo v3 by its fixed positions": moco_plain,
    "args": of_args,
    "nodes of a configuration": of_node,
    "MAE's fine-tuning": lambda: named("model", "vit_base_patch16", 768, 12),
    "DeiT's code": lambda: named("model", "deit_tiny", 192, 3),
    "mmpretrain's text": lambda: openmmlab("mocov3-small", 384, 12),
    "mmpretrain's text of DeiT": lambda: openmmlab("deit-s", 384, 6),
    "timm's name": of_timm,
    "timm's name and options": of_timm_with_options,
}


def pooled(source: Any, size: int) -> tuple[Tensor, Tensor]:
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        features = source.forward_features((pixels - mean) / std)
        return pixels, source.forward_head(features, pre_logits=True)


@pytest.mark.parametrize("case", SAID)
def test_heads_come_from_the_word_of_the_file_or_of_its_code(case, tmp_path, registry):
    source, content = SAID[case]()
    torch.save(content, tmp_path / "a.ckpt")
    loaded = load_backbone(tmp_path / "a.ckpt", registry)
    pixels, theirs = pooled(source, loaded.backbone.spec.image_size[0])
    with torch.no_grad():
        torch.testing.assert_close(loaded.backbone(pixels).pooled, theirs, rtol=1e-5, atol=1e-5)
    assert loaded.report.guesses == ()
    assert "guess" not in str(loaded.report)


def test_what_a_folder_of_solo_learn_says_is_read(tmp_path, registry):
    _, content = solo("mocov3", 192, 12, "vit_tiny")
    content["hyper_parameters"] = {}
    torch.save(content, tmp_path / "a.ckpt")
    assert load_backbone(tmp_path / "a.ckpt", registry).report.guesses
    (tmp_path / "args.json").write_text('{"method": "mocov3"}')
    loaded = load_backbone(tmp_path / "a.ckpt", registry)
    assert (loaded.report.guesses, loaded.report.options["num_heads"]) == ((), 12)


UNSAID: dict[str, tuple[int, Any]] = {
    "nothing": (3, {}),
    "two numbers": (3, {"args": Namespace(a={"num_heads": 2}, b={"num_heads": 6})}),
    "a number that does not divide the width": (3, {"args": Namespace(num_heads=5)}),
    "the decoder's": (3, {"args": Namespace(decoder_cfg={"num_heads": 12})}),
    "a name that two codes give": (3, {"arch": "vit_tiny"}),
    "a name of another width": (3, {"args": Namespace(model="vit_base_patch16")}),
    "another method's": (3, {"hyper_parameters": {"method": "mocov3"}}),
}


@pytest.mark.parametrize("case", UNSAID)
def test_a_guess_is_told_with_the_way_to_say_otherwise(case, tmp_path, registry):
    guessed, beside = UNSAID[case]
    torch.save({"model": state(net(192, 12))} | beside, tmp_path / "a.pth")
    report = load_backbone(tmp_path / "a.pth", registry).report
    (guess,) = report.guesses
    assert guess.startswith(f"num_heads={guessed} is a guess")
    assert "--backbone-arg num_heads=" in guess
    assert guess in str(report)
    assert report.to_json()["guesses"] == [guess]
    given = load_backbone(tmp_path / "a.pth", registry, options={"num_heads": 12})
    assert given.report.guesses == ()
    pixels, theirs = pooled(net(192, 12), 32)
    with torch.no_grad():
        torch.testing.assert_close(given.backbone(pixels).pooled, theirs, rtol=1e-5, atol=1e-5)


def test_a_network_of_clips_is_refused_as_one(tmp_path, registry):
    tensors = state(net(64, 1))
    tensors["patch_embed.proj.weight"] = torch.ones(64, 3, 2, 16, 16)
    torch.save({"target_encoder": tensors}, tmp_path / "a.pth")
    with pytest.raises(BackboneError, match="a length in time"):
        load_backbone(tmp_path / "a.pth", registry)


def test_a_width_that_64_does_not_divide_gets_heads_that_do(tmp_path, registry):
    torch.save(state(net(200, 4)), tmp_path / "a.pth")
    assert load_backbone(tmp_path / "a.pth", registry).backbone.spec.options["num_heads"] == 2


def test_a_named_architecture_is_no_guess(tmp_path, registry):
    torch.save(state(net(192, 3, depth=12, img_size=224)), tmp_path / "a.pth")
    assert load_backbone(tmp_path / "a.pth", registry).report.guesses
    assert not load_backbone(tmp_path / "a.pth", registry, arch="vit_tiny_patch16_224").report.guesses


def test_an_activation_is_a_guess_where_common_networks_differ(tmp_path, registry):
    source = net(64, 1, pre_norm=True, act_layer="quick_gelu", norm_layer="layernorm")
    torch.save(state(source), tmp_path / "a.pth")
    report = load_backbone(tmp_path / "a.pth", registry).report
    assert report.arch == "timm:vit_base_patch16_clip_224"  # its norms have CLIP's epsilon
    assert any(g.startswith("act_layer=gelu is a guess") for g in report.guesses)
    loaded = load_backbone(tmp_path / "a.pth", registry, options={"act_layer": "quick_gelu", "num_heads": 1})
    assert loaded.report.guesses == ()
    for norm in (m for m in source.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = 1e-5
    pixels, theirs = pooled(source, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.backbone(pixels).pooled, theirs, rtol=1e-5, atol=1e-5)


def test_the_epsilon_of_norms_is_an_option(tmp_path, registry):
    source = net(64, 1)
    torch.save(state(source), tmp_path / "a.pth")
    for norm in (m for m in source.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = 1e-2
    loaded = load_backbone(tmp_path / "a.pth", registry, options={"norm_eps": 1e-2})
    loaded.backbone.save(tmp_path / "b.safetensors")
    pixels, theirs = pooled(source, 32)
    for backbone in (loaded.backbone, load_backbone(tmp_path / "b.safetensors", registry).backbone):
        with torch.no_grad():
            torch.testing.assert_close(backbone(pixels).pooled, theirs, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- names


def shapes(name: str, **options: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        made = timm.create_model(name, num_classes=0, **options)
    return {k: tuple(v.shape) for k, v in made.state_dict().items()}


def inferred(name: str, **options: Any) -> Candidate:
    with torch.device("meta"):
        tensors = timm.create_model(name, num_classes=0, **options).state_dict()
    (candidate,) = vit(State(tensors, "", File(Path("x.pth"), tensors, "")))
    return candidate


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_a_registered_vit_is_called_by_its_name_and_has_the_heads_of_the_table(name):
    with torch.device("meta"):
        made = timm.create_model(name, num_classes=0)
    tensors, row = made.state_dict(), REGISTERED[name]
    (candidate,) = vit(State(tensors, "", File(Path("x.pth"), tensors, "")))
    assert (candidate.arch, dict(candidate.options)) == (f"timm:{name}", {})
    assert "custom" not in candidate.note
    found = (made.embed_dim, len(made.blocks), made.blocks[0].attn.num_heads)
    assert found == (row["embed_dim"], row["depth"], row["num_heads"])


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("vit_small_patch16_224", {"patch_size": 14, "img_size": 56}, "vit_small_patch16_224"),
        ("vit_small_patch16_224", {"patch_size": 7, "init_values": 1e-5}, "vit_small_patch16_224"),
        ("vit_small_patch16_224", {"reg_tokens": 2, "qkv_bias": False}, "vit_small_patch16_224"),
        (
            "vit_tiny_patch16_224",
            {"class_token": False, "global_pool": "avg", "fc_norm": False},
            "vit_tiny_patch16_224",
        ),
        ("vit_base_patch16_224", {"patch_size": 14, "init_values": 1, "img_size": 224}, "vit_base_patch14_dinov2"),
    ],
)
def test_a_vit_of_registered_width_is_called_by_that_width(name, options, wanted):
    candidate = inferred(name, **options)
    assert candidate.arch == f"timm:{wanted}"
    assert not candidate.options.keys() & {"embed_dim", "depth", "num_heads"}
    assert shapes(wanted, **candidate.options) == shapes(name, **options)


def test_a_width_that_nobody_registers_is_called_custom():
    candidate = inferred("vit_base_patch16_224", embed_dim=320, depth=5, num_heads=5, img_size=64)
    assert "custom: timm registers no such ViT of width 320 and depth 5" in candidate.note
    assert candidate.options["embed_dim"] == 320


FAMILIES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("resnet26", {}, "resnet26", {}),
    ("resnet34d", {}, "resnet34d", {}),
    ("resnext50d_32x4d", {}, "resnet50d", {"cardinality": 32, "base_width": 4}),
    ("resnet50c", {}, "resnet50d", {"avg_down": False}),
    ("resnet26t", {}, "resnet26d", {"stem_type": "deep_tiered"}),
    ("resnet50", {"layers": [1, 2, 3, 1]}, "resnet50", {"layers": [1, 2, 3, 1]}),
    ("swin_tiny_patch4_window7_224", {"window_size": 14}, "swin_tiny_patch4_window7_224", {"window_size": 14}),
    ("swin_small_patch4_window7_224", {"patch_size": 2}, "swin_small_patch4_window7_224", {"patch_size": 2}),
    ("convnext_nano", {"depths": [1, 1, 2, 1]}, "convnext_tiny", {"depths": [1, 1, 2, 1]}),
]


@pytest.mark.parametrize(("name", "options", "wanted", "told"), FAMILIES)
def test_other_families_are_called_by_the_nearest_name_too(name, options, wanted, told):
    with torch.device("meta"):
        tensors = timm.create_model(name, num_classes=0, **options).state_dict()
    state = State(tensors, "", File(Path("x.pth"), tensors, ""))
    (candidate,) = [c for layout in (layouts.resnet, layouts.swin, layouts.convnext) for c in layout(state)]
    assert candidate.arch == f"timm:{wanted}"
    assert candidate.options.items() >= told.items()
    assert shapes(wanted, **candidate.options) == shapes(name, **options)
    assert ("custom" in candidate.note) == ("layers" in told or "depths" in told)
