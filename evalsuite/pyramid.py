"""Any backbone to maps of strides 4, 8, 16 and 32, for dense heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

__all__ = ["Levels", "Pyramid"]

LEVELS = (4, 8, 16, 32)


class Levels(nn.Module):
    """Maps of a backbone {stride: (B,C,H,W)} at strides 4, 8, 16 and 32, each as wide as it comes.

    ``strides`` is {stride: channels} of the maps that will come. Strides the backbone lacks are made from its nearest
    map: by transposed convolutions up, by max-pooling down, as in the simple feature pyramid of ViTDet (Li et al.,
    2022, section 3), so that ViT, SqueezeNet (to 16) or a CIFAR ResNet (to 8) serve every head. ``channels`` is
    {stride: channels} of what comes out; ``single``: all of it is made from one map.
    """

    def __init__(self, strides: Mapping[int, int]) -> None:
        super().__init__()
        usable = {s: c for s, c in strides.items() if s in LEVELS}
        if not usable:
            finest = min(strides, key=lambda s: (abs(math.log2(s / 16)), s))
            usable = {finest: strides[finest]}
        self.single = len(usable) == 1
        self.sources = {level: min(usable, key=lambda s: abs(math.log2(s / level))) for level in LEVELS}
        resized = {level: _Resize(source, level, usable[source]) for level, source in self.sources.items()}
        self.resize = nn.ModuleDict({str(level): module for level, module in resized.items()})
        self.channels = {level: resized[level].channels for level in LEVELS}

    def forward(self, maps: Mapping[int, Tensor], size: tuple[int, int]) -> dict[int, Tensor]:
        """``size`` is that of the images, (H, W): level ``s`` comes out at (ceil(H/s), ceil(W/s)) exactly.

        Networks without padding (AlexNet, SqueezeNet) and patches of other than 16 pixels give maps of other sizes,
        on which anchors and regions would drift across the image; such maps are resampled first.
        """
        levels = {}
        for level, source in self.sources.items():
            exact = -(-size[0] // level), -(-size[1] // level)
            levels[level] = _exactly(self.resize[str(level)](maps[source]), exact)
        return levels


class Pyramid(nn.Module):
    """Maps of a backbone {stride: (B,C,H,W)} to maps of one width at strides 4, 8, 16 and 32.

    A backbone with several strides gets a feature pyramid network (Lin et al., 2017, section 3; 1x1 laterals,
    nearest-neighbour top-down sums, 3x3 outputs) on its :class:`Levels`. One with a single stride, such as a ViT,
    gets the simple feature pyramid of ViTDet (Li et al., 2022, section 3): on each level 1x1 and 3x3 convolutions
    with layer norms.

    ``norm`` is the normalisation of the FPN's convolutions ("BN", or None as in the paper; a synchronised one is
    made of it by the engine); ``strides`` is {stride: channels} of the maps that will come.
    """

    def __init__(self, strides: Mapping[int, int], width: int = 256, norm: Literal["BN"] | None = None) -> None:
        super().__init__()
        self.levels = Levels(strides)
        channels = list(self.levels.channels.values())
        self.channels = width
        if self.levels.single:
            self.outputs = nn.ModuleList(_simple_output(c, width) for c in channels)
        else:
            self.fpn = FeaturePyramidNetwork(channels, width, norm_layer=nn.BatchNorm2d if norm == "BN" else None)

    def forward(self, maps: Mapping[int, Tensor], size: tuple[int, int]) -> dict[int, Tensor]:
        """``size`` is that of the images, (H, W): level ``s`` comes out at (ceil(H/s), ceil(W/s)) exactly."""
        levels = self.levels(maps, size)
        if self.levels.single:
            return {level: out(levels[level]) for level, out in zip(LEVELS, self.outputs, strict=True)}
        merged: dict[str, Tensor] = self.fpn({str(level): x for level, x in levels.items()})
        return {int(level): merged[level] for level in merged}


def _exactly(level: Tensor, size: tuple[int, int]) -> Tensor:
    if level.shape[-2:] == size:
        return level
    return F.interpolate(level, size, mode="bilinear", align_corners=False)


class _Resize(nn.Sequential):
    """A map of one stride to another: doublings by transposed convolution, halvings by max-pooling."""

    def __init__(self, source: int, target: int, channels: int) -> None:
        steps: list[nn.Module] = []
        doublings = round(math.log2(source / target))
        for step in range(doublings):
            halved = max(channels // 2, 1)
            steps += [nn.ConvTranspose2d(channels, halved, 2, stride=2)]
            if step + 1 < doublings:
                steps += [_ChannelNorm(halved), nn.GELU()]
            channels = halved
        steps += [nn.MaxPool2d(2) for _ in range(-doublings)]
        super().__init__(*steps)
        self.channels = channels


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map (B,C,H,W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _simple_output(channels: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False),
        _ChannelNorm(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        _ChannelNorm(width),
    )
