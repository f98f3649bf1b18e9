"""What an agent is told of what it sees: an encoder's vectors, and how a set of them becomes one.

The poolings of Yoon et al., ICML 2023 (arXiv 2302.04419), with the sizes and habits of jsikyoon/OCRL, poolings/, at
commit 01d0bd56. A single vector is a set of one.
"""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import pairwise, permutations
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalsuite.backbone import Backbone, Features
from evalsuite.errors import BackboneError, UsageError
from evalsuite.features.encoder import autocast
from evalsuite.lazy import moved

__all__ = ["NatureCNN", "ObservationEncoder", "PoolingName", "RelationNetwork", "TransformerPooling", "pooling"]

PoolingName = Literal["transformer", "relation", "mlp", "identity", "cnn-linear", "cnn-transformer"]


def pooling(name: PoolingName, tokens: int, dim: int, *, layers: int = 1, position: bool = False) -> nn.Module:
    """A module (B, ``tokens``, ``dim``) -> (B, width); its attribute ``width`` says how wide.

    ``"transformer"``: a class token through ``layers`` of an encoder (width 128). ``"relation"``: a relation network
    (64). ``"mlp"``: the concatenated tokens through two layers (128). ``"identity"``: them alone. ``"cnn-linear"``
    and ``"cnn-transformer"``: the tokens as a square map, through the convolutions of DQN's network (512 and 128).
    ``position``: tokens have places, which the transformers are told. ``cnn-transformer`` tells them always.

    Raises :class:`UsageError` for an unknown name, and for tokens that make no square map of 36 or more a side.
    """
    if name == "transformer":
        return TransformerPooling(dim, layers=layers, places=tokens if position else 0)
    if name == "relation":
        return RelationNetwork(dim)
    if name == "mlp":
        return _Mlp(tokens * dim)
    if name == "identity":
        return _Identity(tokens * dim)
    if name not in get_args(PoolingName):
        raise UsageError(
            f"there is no pooling {name!r}",
            cause=f"there are {', '.join(get_args(PoolingName))}",
            fix="use one of them",
        )
    side = math.isqrt(tokens)
    if side**2 != tokens or side < NatureCNN.smallest:
        raise UsageError(
            f"{name} cannot pool {tokens} tokens",
            cause=f"it takes a square map of at least {NatureCNN.smallest} x {NatureCNN.smallest} of them",
            fix="--set pooling=transformer or --set pooling=mlp",
        )
    return _CnnLinear(dim, side) if name == "cnn-linear" else _CnnTransformer(dim, side, layers)


class ObservationEncoder:
    """What worlds show to the vectors an agent pools, (B, tokens, width) as float32.

    ``reads``: ``"tokens"`` or ``"pooled"`` of the backbone's features; ``"auto"``: tokens where it gives them.
    ``pooling``: a name of :func:`pooling`; ``"auto"``: ``transformer`` of tokens, ``mlp`` of one vector. ``size`` is
    the side in pixels of what the backbone sees (None: its own image size). A backbone that takes ``"state"`` is shown
    the state of the worlds, not their images. ``precision`` is that of the network on images, as of
    :meth:`evalsuite.features.Cache.features`; a state is coordinates, and read in float32. ``calls`` and ``encoded``
    count what was done; ``tokens`` and ``width`` are known after the first call.

    Raises :class:`BackboneError` where the backbone does not give what is read.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        *,
        reads: Literal["auto", "tokens", "pooled"] = "auto",
        pooling: Literal["auto", PoolingName] = "auto",
        layers: int = 1,
        size: int | None = None,
        precision: str = "32-true",
    ) -> None:
        # A copy, for tasks that come after see the original's layout. Channels last spares a convolution to order its
        # weights anew at every call, which for the few images of a step is half of the time.
        self.backbone = deepcopy(backbone).to(memory_format=torch.channels_last)
        self.device, self.layers = device, layers
        self.observation: Literal["state", "image"] = "state" if backbone.spec.takes == "state" else "image"
        self.precision = precision if self.observation == "image" else "32-true"
        self.reads = reads if reads != "auto" else "tokens" if "tokens" in backbone.gives else "pooled"
        if self.reads not in backbone.gives:
            raise BackboneError(
                f"{self.reads} are to be pooled, which {backbone.spec.arch} does not give",
                cause=f"it gives {', '.join(sorted(backbone.gives))}",
                fix="--set reads=auto, or another backbone",
            )
        fitting: PoolingName = "transformer" if self.reads == "tokens" else "mlp"
        self.pooling: PoolingName = fitting if pooling == "auto" else pooling
        self.size = (size, size) if size is not None else backbone.spec.image_size
        self.calls = self.encoded = self.tokens = self.width = 0

    def pool(self) -> nn.Module:
        """The pooling of what was encoded; patches of a map are told their places, slots and rows of a state not."""
        position = self.reads == "tokens" and "maps" in self.backbone.gives
        return pooling(self.pooling, self.tokens, self.width, layers=self.layers, position=position)

    @torch.no_grad()
    def encode(self, seen: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Images (B, H, W, 3) or states (B, rows, 5), encoded."""
        vectors: npt.NDArray[np.float32] = self.vectors(self.features(seen)).cpu().numpy()
        return vectors

    @torch.no_grad()
    def features(self, seen: npt.NDArray[Any]) -> Features:
        """All that the backbone says of images (B, H, W, 3) or states (B, rows, 5)."""
        tensor = torch.from_numpy(np.ascontiguousarray(seen)).to(self.device)
        shown = tensor.permute(0, 3, 1, 2).float() / 255 if self.observation == "image" else tensor
        features = self._look(shown)
        self.calls, self.encoded = self.calls + 1, self.encoded + len(seen)
        self.tokens, self.width = self.vectors(features).shape[1:]
        return features

    def look(self, seen: Tensor) -> Tensor:
        """The vectors of pixels (B, 3, H, W) in [0, 1], or of states."""
        return self.vectors(self._look(seen))

    def vectors(self, features: Features) -> Tensor:
        """Of what a backbone says, the vectors that are read (B, tokens, width)."""
        vectors = features.tokens if self.reads == "tokens" else features.pooled
        assert vectors is not None
        return vectors.float() if vectors.ndim == 3 else vectors.float().unsqueeze(1)

    def _look(self, seen: Tensor) -> Features:
        if self.observation == "image" and seen.shape[-2:] != torch.Size(self.size):
            seen = F.interpolate(seen, self.size, mode="bilinear", antialias=True)
        with autocast(self.device, self.precision):
            features: Features = self.backbone(seen)
        return features


class TransformerPooling(nn.Module):
    """Tokens (B, N, D) and a class token through torch's encoder as it is (post-norm, dropout 0.1, 8 heads).

    The class token begins at zero. ``places``: how many positions are told, by sinusoids scaled by 0.001, the class
    token's being the first; 0: none, and the order of the tokens does not matter.
    """

    def __init__(self, dim: int, width: int = 128, layers: int = 1, heads: int = 8, places: int = 0) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(dim, width)
        self.cls = nn.Parameter(torch.zeros(width))
        self.places = _sinusoids(places + 1, width) if places else None
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, heads, batch_first=True), layers, enable_nested_tensor=False
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(tokens), 1, -1), self.embed(tokens)], dim=1)
        if self.places is not None:
            x = x + self.places.to(x)
        pooled: Tensor = self.encoder(x)[:, 0]
        return pooled


class RelationNetwork(nn.Module):
    """Santoro et al. 2017: every ordered pair of different tokens through g, their sum through f.

    ReLU follows every layer, the last one too. A single token has no pair: its sum is zero.
    """

    width = 64

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = _layers(2 * dim, 256, 256, 256, 256)
        self.f = _layers(256, 256, 128, 64, self.width)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled: Tensor = self.f(self.g(self.pairs(tokens)).sum(dim=1))
        return pooled

    @staticmethod
    def pairs(tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N (N - 1), 2 D)."""
        order = torch.tensor(list(permutations(range(tokens.shape[1]), 2)), dtype=torch.long).reshape(-1, 2)
        return tokens[:, order.to(tokens.device)].flatten(2)


class NatureCNN(nn.Module):
    """The convolutions of Mnih et al. 2015 on maps (B, C, H, W): 32 of 8x8 by 4, 64 of 4x4 by 2, 64 of 3x3, ReLU."""

    smallest = 36

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, 32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3), nn.ReLU(),
        )  # fmt: skip

    def forward(self, maps: Tensor) -> Tensor:
        found: Tensor = self.net(maps)
        return found

    @staticmethod
    def side(pixels: int) -> int:
        """The side of what comes out of a square map."""
        return ((pixels - 8) // 4 + 1 - 4) // 2 + 1 - 2


class _Identity(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(1)


class _Mlp(nn.Module):
    width = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = _layers(width, self.width, self.width)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled: Tensor = self.net(tokens.flatten(1))
        return pooled


class _CnnLinear(nn.Module):
    width = 512

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.cnn = NatureCNN(dim)
        self.linear = _layers(64 * NatureCNN.side(side) ** 2, self.width)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled: Tensor = self.linear(self.cnn(_square(tokens)).flatten(1))
        return pooled


class _CnnTransformer(nn.Module):
    def __init__(self, dim: int, side: int, layers: int) -> None:
        super().__init__()
        self.cnn = NatureCNN(dim)
        self.transformer = TransformerPooling(64, layers=layers, places=NatureCNN.side(side) ** 2)
        self.width = self.transformer.width

    def forward(self, tokens: Tensor) -> Tensor:
        pooled: Tensor = self.transformer(self.cnn(_square(tokens)).flatten(2).transpose(1, 2))
        return pooled


def _layers(*widths: int) -> nn.Sequential:
    found: list[nn.Module] = []
    for before, after in pairwise(widths):
        found += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*found)


def _square(tokens: Tensor) -> Tensor:
    side = math.isqrt(tokens.shape[1])
    square: Tensor = tokens.transpose(1, 2).unflatten(2, (side, side))
    return square


def _sinusoids(places: int, width: int) -> Tensor:
    place = torch.arange(places).unsqueeze(1)
    angles = place * torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    table: Tensor = 0.001 * torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
    buffer: Tensor = nn.Buffer(table, persistent=False)
    return buffer


__getattr__ = moved(__name__, renamed={"Encoder": f"{__name__}.ObservationEncoder"})
