"""The warning of a network that was never trained, whoever drew its weights, and no false alarm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from evalsuite.backbone import Backbone, build
from evalsuite.checkpoints import load_backbone, sanity


def told(backbone: Backbone, registry: Any) -> bool:
    backbone.respec(image_size=(32, 32))
    report = sanity(backbone.eval(), registry, count=4)
    return any("untrained" in warning for warning in report.warnings)


def resnet50_ending_in_zeros() -> dict[str, Tensor]:
    return torchvision.models.resnet50(zero_init_residual=True).state_dict()


def xavier(arch: str, **options: Any) -> dict[str, Tensor]:
    net = timm.create_model(arch, num_classes=0, **options)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias) if module.bias is not None else None
    return net.state_dict()


def passed_through() -> dict[str, Tensor]:
    """Fresh, but for running statistics: images went through it in training mode, and nothing was learnt."""
    net = torchvision.models.resnet18().train()
    with torch.no_grad():
        net(torch.rand(4, 3, 32, 32))
    return net.state_dict()


FRESH: dict[str, Callable[[], dict[str, Tensor]]] = {
    "ResNet-50 whose blocks end in zeros": resnet50_ending_in_zeros,
    "ResNet-18 with measured statistics": passed_through,
    "ViT by Xavier": lambda: xavier("vit_tiny_patch16_224", depth=2, img_size=32, num_heads=3),
    "ConvNeXt by Xavier": lambda: xavier("convnext_atto"),
    "timm's ResNet": lambda: timm.create_model("resnet18d", num_classes=0).state_dict(),
}


@pytest.mark.parametrize("kind", FRESH)
def test_fresh_weights_are_called_untrained_whoever_drew_them(kind, tmp_path, registry):
    torch.save(FRESH[kind](), tmp_path / "a.pth")
    assert told(load_backbone(tmp_path / "a.pth", registry).backbone, registry)


def step(backbone: Backbone) -> None:
    optimizer = torch.optim.SGD(backbone.train().parameters(), lr=0.01)
    for _ in range(2):
        features = backbone(torch.rand(4, 3, 64, 64)).pooled
        optimizer.zero_grad()
        (features - torch.rand_like(features)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("small:resnet10", {"width": 16}),
        ("timm:vit_tiny_patch16_224", {"depth": 2, "img_size": 32, "num_heads": 3}),
        ("torchvision:alexnet", {}),  # without norms, and its biases are drawn too
    ],
)
def test_two_steps_are_enough_to_be_trained(arch, options, registry):
    torch.manual_seed(0)
    backbone = build(arch, registry, **options)
    step(backbone)
    like = sanity(backbone, registry, count=4).numbers["like_fresh"]
    assert like < 0.5


def trained_filters(net: nn.Module) -> None:
    """Filters of unlike length, as learning makes them."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(torch.rand(len(module.weight), 1, 1, 1) * 2)


def test_frozen_norms_at_their_constants_are_no_alarm(registry):
    backbone = build("torchvision:resnet18", registry)
    trained_filters(backbone.net)
    assert not told(backbone, registry)


def test_norms_that_hold_statistics_as_scale_and_shift_are_no_alarm(registry):
    backbone = build("torchvision:resnet18", registry)
    trained_filters(backbone.net)
    with torch.no_grad():
        for norm in (m for m in backbone.net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    assert not told(backbone, registry)
