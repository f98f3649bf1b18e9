"""Any backbone's maps to strides 4, 8, 16 and 32."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import evalsuite.backbones
from evalsuite.backbone import build
from evalsuite.hooks import Registry
from evalsuite.pyramid import LEVELS, Pyramid

BACKBONES = {
    "resnet, strides 2 to 32": ("timm:resnet18", {"layers": [1, 1, 1, 1]}),
    "small resnet, strides 1 to 8": ("small:resnet10", {"width": 8}),
    "convnext, strides 4 to 32": ("timm:convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
    "vit, stride 16": ("timm:vit_base_patch16_224", {"embed_dim": 64, "depth": 1, "num_heads": 1, "img_size": 64}),
    "vit, stride 8": (
        "timm:vit_base_patch16_224",
        {"embed_dim": 64, "depth": 1, "num_heads": 1, "img_size": 64, "patch_size": 8},
    ),
    "vit, stride 14": (
        "timm:vit_base_patch16_224",
        {"embed_dim": 64, "depth": 1, "num_heads": 1, "img_size": 56, "patch_size": 14},
    ),
    "squeezenet, strides 2 to 16": ("torchvision:squeezenet1_1", {}),
}


def maps(strides: dict[int, int], size: int = 64) -> dict[int, Tensor]:
    return {s: torch.randn(2, c, size // s, size // s) for s, c in strides.items()}


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = Registry()
    evalsuite.backbones.evalsuite_register(registry)
    return registry


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_gets_four_levels_of_one_width_and_its_gradient(name, registry):
    arch, options = BACKBONES[name]
    backbone = build(arch, registry, **options).eval()
    pyramid = Pyramid(backbone.spec.strides, width=32)
    levels = pyramid(backbone(torch.rand(1, 3, 128, 128)).maps, (128, 128))
    assert tuple(levels) == LEVELS
    for stride, level in levels.items():
        assert level.shape[:2] == (1, 32)
        assert level.shape[-2:] == (128 // stride, 128 // stride)
        assert level.isfinite().all()
    sum(level.square().mean() for level in levels.values()).backward()
    unreached = [k for k, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []
    first = next(p for p in backbone.parameters())
    assert first.grad is not None
    assert first.grad.any()


subsets = st.sets(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), min_size=1)


@settings(deadline=None, max_examples=40)
@given(strides=subsets)
def test_any_set_of_strides_gives_true_strides(strides):
    channels = {s: 4 + s for s in strides}
    levels = Pyramid(channels, width=8)(maps(channels, 64), (64, 64))
    assert {s: level.shape for s, level in levels.items()} == {s: (2, 8, 64 // s, 64 // s) for s in LEVELS}


@pytest.mark.parametrize("present", [c for n in (2, 3, 4) for c in itertools.combinations(LEVELS, n)])
def test_a_stride_that_is_there_is_taken_as_it_is(present):
    pyramid = Pyramid(dict.fromkeys(present, 6), width=8)
    for level in LEVELS:
        if level in present:
            assert pyramid.levels.sources[level] == level
            assert len(pyramid.levels.resize[str(level)]) == 0
        else:
            assert pyramid.levels.sources[level] in present


def test_several_strides_make_an_fpn_and_one_makes_the_simple_pyramid():
    assert isinstance(Pyramid({4: 8, 8: 16, 16: 32, 32: 64}).fpn, nn.Module)
    single = Pyramid({16: 64}, width=8)
    assert not hasattr(single, "fpn")
    kinds = [[type(m).__name__ for m in single.levels.resize[str(level)]] for level in LEVELS]
    assert kinds == [
        ["ConvTranspose2d", "_ChannelNorm", "GELU", "ConvTranspose2d"],
        ["ConvTranspose2d"],
        [],
        ["MaxPool2d"],
    ]


def test_levels_of_the_simple_pyramid_are_layer_normalised_over_channels():
    levels = Pyramid({16: 64}, width=16)(maps({16: 64}), (64, 64))
    for level in levels.values():
        torch.testing.assert_close(level.mean(1), torch.zeros_like(level[:, 0]), atol=1e-5, rtol=0)
        # within the norm's epsilon: a map of small variance stays a little below one
        assert level.var(1, correction=0).max() <= 1 + 1e-4


@pytest.mark.parametrize(("norm", "count"), [(None, 0), ("BN", 8)])
def test_the_norm_of_the_fpn_is_an_option(norm, count):
    pyramid = Pyramid({4: 8, 8: 16, 16: 32, 32: 64}, norm=norm)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in pyramid.modules()) == count


def test_a_fine_level_hears_of_a_coarse_one():
    pyramid = Pyramid({4: 8, 8: 8, 16: 8, 32: 8}, width=8)
    given = maps({4: 8, 8: 8, 16: 8, 32: 8})
    changed = given | {32: given[32] + 1}
    before, after = pyramid(given, (64, 64)), pyramid(changed, (64, 64))
    assert not torch.equal(before[4], after[4])
    assert not torch.equal(before[32], after[32])


@pytest.mark.parametrize("size", [(64, 96), (60, 90), (70, 33)])
def test_levels_cover_the_image_exactly_whatever_sizes_the_maps_have(size):
    """A network without padding gives smaller maps; a pixel of level s must still stand for s pixels."""
    height, width = size
    short = {s: torch.rand(1, 4, max(1, height // s - 1), max(1, width // s - 1)) for s in LEVELS}
    levels = Pyramid(dict.fromkeys(LEVELS, 4), width=8)(short, size)
    exact = {s: (-(-height // s), -(-width // s)) for s in LEVELS}
    assert {s: level.shape[-2:] for s, level in levels.items()} == exact
