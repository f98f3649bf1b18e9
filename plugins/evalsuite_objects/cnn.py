"""Convolutional encoders that have no loss of their own: what an agent earns teaches them, by ``fine_tune``.

Names and sizes are those of Yoon et al. (ICML 2023) and of jsikyoon/OCRL, ocrs/naturecnn and ocrs/multiple_cnns, at
commit 01d0bd56. They see images of 64 pixels, in [0, 1].
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from evalsuite import Backbone, BackboneSpec, Features
from evalsuite.features.poolings import NatureCNN

__all__ = ["cnn", "cnn_map", "multi_cnn"]

SIZE = 64
CELLS = NatureCNN.side(SIZE)


def _drawn(module: nn.Module) -> None:
    """Orthogonal weights of gain sqrt 2 and no bias: how stable-baselines3 begins every encoder inside a policy."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.orthogonal_(module.weight, 2**0.5)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


class _Vector(nn.Module):
    """Images (B, 3, 64, 64) through the network of Mnih et al. 2015 to (B, ``width``)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cnn = NatureCNN(3)
        self.linear = nn.Sequential(nn.Linear(64 * CELLS**2, width), nn.ReLU())
        self.apply(_drawn)

    def forward(self, x: Tensor) -> Tensor:
        vector: Tensor = self.linear(self.cnn(x).flatten(1))
        return vector


class _One(_Vector):
    def forward(self, x: Tensor) -> Features:  # type: ignore[override]  # the same number, as features
        return Features(super().forward(x))


class _Map(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cnn = NatureCNN(3)
        self.apply(_drawn)

    def forward(self, x: Tensor) -> Features:
        maps = self.cnn(x)
        return Features(maps.mean((2, 3)), {SIZE // CELLS: maps}, maps.flatten(2).transpose(1, 2))


class _Many(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.cnns = nn.ModuleList(_Vector(width) for _ in range(count))

    def forward(self, x: Tensor) -> Features:
        tokens = torch.stack([cnn(x) for cnn in self.cnns], dim=1)
        return Features(tokens.mean(dim=1), tokens=tokens)


def _backbone(net: nn.Module, name: str, dim: int, strides: dict[int, int], *gives: str, **options: int) -> Backbone:
    spec = BackboneSpec(
        arch=f"objects:{name}", dim=dim, strides=strides, gives=frozenset(gives), options=options,
        image_size=(SIZE, SIZE), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    return Backbone(net, spec)


def cnn(width: int = 512) -> Backbone:
    """``objects:cnn``: the network of DQN as one vector of ``width`` numbers."""
    return _backbone(_One(width), "cnn", width, {}, "pooled", width=width)


def cnn_map() -> Backbone:
    """``objects:cnn-map``: its last convolution, 4 x 4 cells of 64 channels, as sixteen tokens.

    Convolutions do not reach over the border, so a cell sees 36 pixels of the image and lies 8 from the next; as a map
    of stride 16 it is stretched over the whole of it.
    """
    return _backbone(_Map(), "cnn-map", 64, {SIZE // CELLS: 64}, "pooled", "maps", "tokens")


def multi_cnn(count: Annotated[int, Field(ge=1, le=64)] = 5, width: int = 512) -> Backbone:
    """``objects:multi-cnn``: ``count`` such networks that share nothing, each of which is a token; their mean is the
    pooled vector."""
    return _backbone(_Many(count, width), "multi-cnn", width, {}, "pooled", "tokens", count=count, width=width)
