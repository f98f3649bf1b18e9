"""Backbones whose worth is known beforehand, small worlds, and a registry with one plugin in it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.data import source
from evalsuite.errors import PluginError
from evalsuite.hooks import Registry, load

__all__ = ["GIVES", "OracleBackbone", "RandomBackbone", "plugin_registry", "tiny_world"]

GIVES = frozenset({"pooled", "maps", "tokens"})
STRIDES = (4, 8, 16, 32)
SIDE = 64  # of the images they say they want, in pixels
THUMB = 8  # the side of a thumbnail

Answer = Callable[[Tensor], Tensor]


def _spec(name: str, dim: int, channels: int, gives: Iterable[str]) -> BackboneSpec:
    return BackboneSpec(
        f"testing:{name}", dim, {s: channels for s in STRIDES}, frozenset(gives), image_size=(SIDE, SIDE),
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip


def _only(features: Features, gives: frozenset[str]) -> Features:
    """Outputs that are not promised are left out, so that a task fails that reads more than it requires."""
    return Features(
        features.pooled if "pooled" in gives else None,
        features.maps if "maps" in gives else {},
        features.tokens if "tokens" in gives else None,
    )


class _Net(nn.Module):
    """Features of pixels, times a weight of one, so that there is something to train and to tell apart by."""

    def __init__(self, mark: int, gives: frozenset[str]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.mark: Tensor
        self.register_buffer("mark", torch.tensor(mark))
        self.given = gives


class _Blind(_Net):
    def __init__(self, seed: int, gives: frozenset[str]) -> None:
        super().__init__(seed, gives)
        self.seed = seed

    def forward(self, pixels: Tensor) -> Features:
        height, width = pixels.shape[-2:]
        shapes = [(64,), *((16, max(1, height // s), max(1, width // s)) for s in STRIDES), (64, 16)]
        drawn = [self._draw(image, shapes) for image in pixels]
        pooled, *maps, tokens = (torch.stack(part).to(pixels) * self.scale for part in zip(*drawn, strict=True))
        return _only(Features(pooled, dict(zip(STRIDES, maps, strict=True)), tokens), self.given)

    def _draw(self, image: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        content = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy().tobytes()
        rng = torch.Generator().manual_seed(zlib.crc32(content, self.seed))
        return [torch.randn(shape, generator=rng) for shape in shapes]


class _Seeing(_Net):
    def __init__(self, answer: Answer, gives: frozenset[str]) -> None:
        super().__init__(-1, gives)
        self.answer = answer

    def forward(self, pixels: Tensor) -> Features:
        maps = {s: F.avg_pool2d(torch.cat([pixels, pixels**2], 1), s, ceil_mode=True) * self.scale for s in STRIDES}
        tokens = maps[STRIDES[1]].flatten(2).transpose(1, 2)
        return _only(Features(self.answer(pixels) * self.scale, maps, tokens), self.given)


class RandomBackbone(Backbone):
    """It sees nothing: features are noise drawn from ``seed`` and the image's content, the same for the same image.

    64 wide, maps at strides 4 to 32 of 16 channels, 64 tokens; of these, what ``gives`` names.
    """

    def __init__(self, seed: int = 0, *, gives: Iterable[str] = GIVES) -> None:
        kept = frozenset(gives)
        super().__init__(_Blind(seed, kept), _spec("random", 64, 16, kept))


class OracleBackbone(Backbone):
    """It knows the answer: ``pooled`` is ``answer(pixels)`` of images (B,3,H,W) in [0,1], one row (B,D) an image.

    Without ``answer`` it is a thumbnail of 8 x 8 pixels, which is enough of an oracle where colours tell. Maps are the
    mean of the pixels and of their squares in every cell of strides 4 to 32; tokens are the cells of stride 8.
    """

    def __init__(self, answer: Answer | None = None, *, gives: Iterable[str] = GIVES) -> None:
        answer, kept = answer or _thumbnail, frozenset(gives)
        dim = answer(torch.zeros(1, 3, SIDE, SIDE)).shape[1]
        super().__init__(_Seeing(answer, kept), _spec("oracle", dim, 6, kept))


def _thumbnail(pixels: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(pixels, THUMB).flatten(1)


def tiny_world(name: str, root: Path, *, images: int = 24, registry: Registry | None = None) -> Path:
    """The demo world of a data set with that many training images, written below ``root``; returns its folder.

    Raises :class:`evalsuite.UsageError` for an unknown name.
    """
    return source(registry or load().registry, name).demo(root, 0, images)


def plugin_registry(module: str) -> Registry:
    """The suite's own names and those of one plugin, installed or not, named by its module.

    Raises :class:`evalsuite.PluginError` where the plugin does not load.
    """
    ours = {"EVALSUITE_PLUGINS": ""}
    known = load(environ=ours)
    name = next((p.name for p in [*known.plugins, *known.blocked] if p.module == module), module)
    loaded = load([name], environ=ours)
    for fault in loaded.faults:
        raise PluginError(
            f"plugin {fault.plugin.name!r} does not load", cause=fault.reason, fix="see: evalsuite plugins list"
        )
    return loaded.registry
