"""Vision transformers on images of other sizes than they learnt on: positions are brought there as their own code does.

The formulas were typed off ``interpolate_pos_encoding`` of facebookresearch/dino and dinov2 and bytedance/ibot, and
``interpolate_pos_embed`` of facebookresearch/mae.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalsuite import Backbone, Registry, load_backbone
from evalsuite.backbones import timm_zoo

PATCH, SIDE = 8, 4  # the table is that of images of 32 pixels
SIZES = [(32, 32), (64, 64), (16, 16), (24, 40), (64, 16)]


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": PATCH * SIDE, "patch_size": PATCH, "embed_dim": 64, "depth": 2, "num_heads": 1}
    net = timm.create_model("vit_base_patch16_224", num_classes=0, **small, **options).eval()
    nn.init.normal_(net.pos_embed, std=0.5)
    return net


def dino(square: Tensor, grid: tuple[int, int]) -> Tensor:
    factors = tuple((cells + 0.1) / math.sqrt(SIDE * SIDE) for cells in grid)
    return F.interpolate(square, scale_factor=factors, mode="bicubic")


def plain(square: Tensor, grid: tuple[int, int]) -> Tensor:
    return F.interpolate(square, size=grid, mode="bicubic", align_corners=False)


def smooth(square: Tensor, grid: tuple[int, int]) -> Tensor:
    return F.interpolate(square, size=grid, mode="bicubic", antialias=True)


def official(net: Any, pixels: Tensor, resample: Any) -> Tensor:
    """The tokens of a network with one class token, whose positions come to it by ``resample``."""
    patches = net.patch_embed.proj(pixels)
    grid = tuple(patches.shape[2:])
    square = net.pos_embed[:, 1:].reshape(1, SIDE, SIDE, -1).permute(0, 3, 1, 2)
    table = square if grid == (SIDE, SIDE) else resample(square, grid)
    first = net.cls_token + net.pos_embed[:, :1]
    rows = (patches + table).flatten(2).transpose(1, 2)
    return net.norm(net.blocks(torch.cat([first.expand(len(rows), -1, -1), rows], dim=1)))


def under(prefix: str, net: nn.Module) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in net.state_dict().items()}


def files(net: nn.Module) -> dict[str, tuple[str, dict[str, Any], Any]]:
    """Name of the file, what it holds, and how that code resamples; the network's own names throughout."""
    head = {"head.last_layer.weight_g": torch.ones(8, 1)}
    student = {"student": under("module.backbone.", net), "teacher": under("backbone.", net) | head}
    masked = {"backbone.mask_token": torch.zeros(1, 1, 64)}
    decoder = {"mask_token": torch.zeros(1, 1, 32), "decoder_embed.weight": torch.zeros(32, 64)}
    return {
        "dino": ("checkpoint.pth", student, dino),
        "dino, published": ("dino_deitsmall16_pretrain.pth", under("", net), dino),
        "ibot": ("checkpoint.pth", {"teacher": under("backbone.", net) | masked, "student": {}}, dino),
        "dinov2, published": ("teacher.pth", under("", net) | {"mask_token": torch.zeros(1, 64)}, dino),
        "mae": ("checkpoint-799.pth", {"model": under("", net) | decoder}, plain),
        "of nobody in particular": ("net.pth", under("", net), smooth),
        "moco-v3": ("vit.pth", {"state_dict": under("module.base_encoder.", net)}, smooth),
    }


@pytest.mark.parametrize("name", files(nn.Identity()))
def test_features_are_those_of_the_code_that_wrote_the_file(name: str, registry: Registry, tmp_path: Path):
    net = vit(init_values=1.0) if "dinov2" in name else vit()
    path, content, resample = files(net)[name]
    torch.save(content, tmp_path / path)
    loaded = load_backbone(tmp_path / path, registry, options={"num_heads": 1})
    path = tmp_path / "backbone.safetensors"
    loaded.backbone.save(path, {})
    with torch.no_grad():
        for size in SIZES:
            pixels = torch.rand(2, 3, *size)
            expected = official(net, loaded.backbone.normalise(pixels), resample)
            for backbone in (loaded.backbone, copy.deepcopy(loaded.backbone), Backbone.load(path, registry).eval()):
                found = backbone(pixels)
                torch.testing.assert_close(found.tokens, expected[:, 1:])
                torch.testing.assert_close(found.pooled, expected[:, 0])
    own = {dino: "dino", plain: "bicubic"}.get(resample)
    assert loaded.report.options.get("positions") == own
    assert any("positions" in reason for reason in loaded.report.reason) is (own is not None)


def test_registers_are_resampled_as_timm_does(registry: Registry, tmp_path: Path):
    """dinov2 builds its networks with registers with antialiasing and without an offset."""
    net: Any = vit(reg_tokens=4, no_embed_class=True, init_values=1.0)
    content = net.state_dict()
    content["register_tokens"] = content.pop("reg_token")
    content["pos_embed"] = torch.cat([torch.zeros(1, 1, 64), content["pos_embed"]], 1)
    torch.save(content | {"mask_token": torch.zeros(1, 64)}, tmp_path / "dinov2_reg4.pth")
    backbone = load_backbone(tmp_path / "dinov2_reg4.pth", registry, options={"num_heads": 1}).backbone
    pixels = torch.rand(1, 3, 24, 64)
    square = net.pos_embed.reshape(1, SIDE, SIDE, -1).permute(0, 3, 1, 2)
    rows = (net.patch_embed.proj(backbone.normalise(pixels)) + smooth(square, (3, 8))).flatten(2).transpose(1, 2)
    with torch.no_grad():
        expected = net.norm(net.blocks(torch.cat([net.cls_token, net.reg_token, rows], dim=1)))
        torch.testing.assert_close(backbone(pixels).tokens, expected[:, 5:])


def test_the_user_has_the_last_word(registry: Registry, tmp_path: Path):
    net = vit()
    torch.save(under("", net), tmp_path / "dino.pth")
    options = {"num_heads": 1, "positions": "timm"}
    backbone = load_backbone(tmp_path / "dino.pth", registry, options=options).backbone
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = official(net, backbone.normalise(pixels), smooth)
        torch.testing.assert_close(backbone(pixels).tokens, expected[:, 1:])


def test_positions_are_trained_through_the_resampling_in_any_precision(registry: Registry):
    backbone = timm_zoo.build("test_vit", positions="dino").double()
    backbone(torch.rand(1, 3, 64, 96, dtype=torch.float64)).tokens.square().sum().backward()
    assert backbone.net.pos_embed.grad.abs().sum() > 0
    assert backbone.net.pos_embed.grad.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "positions", "reason"),
    [("test_vit", "nearest", "not 'nearest'"), ("test_resnet", "dino", "no table of positions")],
)
def test_positions_that_cannot_be_are_refused(name: str, positions: Any, reason: str):
    with pytest.raises(ValueError, match=reason):
        timm_zoo.build(name, positions=positions)
