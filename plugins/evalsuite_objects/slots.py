"""Slot Attention (Locatello et al., NeurIPS 2020), and the encoder that discovers objects by it.

Modules bear the names of singhgautam/slate at commit 06f63c53, whose checkpoints therefore load; the arithmetic is
that of google-research/slot_attention at 0c1bbe5f, which has one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from evalsuite import Backbone, BackboneSpec, Features
from evalsuite.training import uncast
from pretrain.blocks import full_precision

__all__ = [
    "BroadcastDecoder",
    "Discovery",
    "PositionEmbedding",
    "SlotAttention",
    "Slots",
    "as_masks",
    "linear",
    "slot_attention",
    "slot_set",
]

EPSILON = 1e-8  # added to the attention after its softmax


def linear(inputs: int, outputs: int, *, bias: bool = True, gain: float | None = 1.0) -> nn.Linear:
    """A layer drawn by Xavier's uniform rule with ``gain``, or, with None, by Kaiming's for ReLU; its bias is zero."""
    layer = nn.Linear(inputs, outputs, bias)
    if gain is None:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    else:
        nn.init.xavier_uniform_(layer.weight, gain)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _glorot(layers: nn.Sequential) -> nn.Sequential:
    """Convolutions drawn as Keras draws them: by Xavier's uniform rule, and biases zero."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return layers


class SlotAttention(nn.Module):
    """Slots compete for inputs: attention is normalised over slots (and heads), then averaged over inputs.

    ``forward(inputs, slots)`` takes (B, N, ``inputs``) and (B, S, ``width``) and returns the slots after
    ``iterations`` rounds and the attention (B, N, S) of the last one, summed over heads. A round: slots query the
    inputs; what they get updates them through a GRU, whose state are the slots before their norm, and a residual MLP.
    """

    def __init__(self, inputs: int, width: int, hidden: int, iterations: int = 3, heads: int = 1) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"slots of {width} numbers cannot be shared by {heads} heads")
        self.iterations, self.heads = iterations, heads
        self.norm_inputs, self.norm_slots, self.norm_mlp = (
            nn.LayerNorm(inputs),
            nn.LayerNorm(width),
            nn.LayerNorm(width),
        )
        self.project_q = linear(width, width, bias=False)
        self.project_k = linear(inputs, width, bias=False)
        self.project_v = linear(inputs, width, bias=False)
        self.gru = nn.GRUCell(width, width)
        nn.init.xavier_uniform_(self.gru.weight_ih)
        nn.init.orthogonal_(self.gru.weight_hh)
        nn.init.zeros_(self.gru.bias_ih)
        nn.init.zeros_(self.gru.bias_hh)
        self.mlp = nn.Sequential(linear(width, hidden, gain=None), nn.ReLU(), linear(hidden, width))

    def forward(self, inputs: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.norm_inputs(inputs)
        keys, values = self._split(self.project_k(inputs)), self._split(self.project_v(inputs))
        keys = keys * keys.shape[-1] ** -0.5
        slots = full_precision(slots)
        attention = slots.new_zeros(0)
        for _ in range(self.iterations):
            queries = self._split(self.project_q(self.norm_slots(slots)))
            with uncast(slots.device):
                slots, attention = self._round(keys, values, queries, slots)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, attention.sum(dim=2)

    def _round(self, keys: Tensor, values: Tensor, queries: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Slots after one round but for the MLP, and the attention (B, N, heads, S): a share of thousands of inputs,
        and a state that rounds hand on, would be lost in less than float32."""
        logits = torch.einsum("bhnd,bhsd->bnhs", keys, queries)
        attention = logits.flatten(2).softmax(dim=-1).unflatten(2, logits.shape[2:])
        weights = attention + EPSILON
        weights = weights / weights.sum(dim=1, keepdim=True)
        updates = torch.einsum("bnhs,bhnd->bshd", weights, values).flatten(2)
        return self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots), attention

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, D / heads), in float32 at least."""
        split: Tensor = full_precision(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return split


class Slots(nn.Module):
    """Inputs (B, N, ``inputs``) through a norm, an MLP and slot attention, from slots that are drawn anew.

    All slots share one mean and one standard deviation. In evaluation mode they begin at one fixed draw, the same for
    every image: the official code draws there too, and the same image would have other features each time.
    """

    noise: Tensor

    def __init__(self, inputs: int, count: int, width: int, hidden: int, iterations: int = 3, heads: int = 1) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(inputs)
        self.mlp = nn.Sequential(linear(inputs, inputs, gain=None), nn.ReLU(), linear(inputs, inputs))
        self.slot_mu, self.slot_log_sigma = (nn.Parameter(torch.zeros(1, 1, width)) for _ in range(2))
        nn.init.xavier_uniform_(self.slot_mu)
        nn.init.xavier_uniform_(self.slot_log_sigma)
        self.slot_attention = SlotAttention(inputs, width, hidden, iterations, heads)
        fixed = torch.randn(1, count, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", fixed, persistent=False)

    def forward(self, inputs: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The slots (B, S, width), and the attention (B, N, S). ``noise`` (B, S, width), normal numbers, is what they
        begin at; without it they are drawn as said above."""
        if noise is None:
            noise = self.noise.expand(len(inputs), -1, -1)
            noise = torch.randn_like(noise) if self.training else noise
        output: tuple[Tensor, Tensor] = self.slot_attention(
            self.mlp(self.layer_norm(inputs)), self.slot_mu + self.slot_log_sigma.exp() * noise
        )
        return output


class PositionEmbedding(nn.Module):
    """Adds a linear map of each cell's distances to the four sides to maps (B, C, H, W): the soft positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense = linear(4, channels)

    def forward(self, maps: Tensor) -> Tensor:
        dtype = self.dense.weight.dtype  # not that of maps under autocast: neighbours of a long line would coincide
        rows, columns = (torch.linspace(0, 1, n, device=maps.device, dtype=dtype) for n in maps.shape[-2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        with uncast(maps.device):
            embedded: Tensor = self.dense(torch.cat([grid, 1 - grid], dim=-1))
        return maps + embedded.permute(2, 0, 1)


def as_masks(attention: Tensor, cells: torch.Size) -> Tensor:
    """Attention (B, N, S) of N = h w cells as masks (B, S, h, w): each slot's share of each cell."""
    masks: Tensor = attention.transpose(1, 2).unflatten(2, tuple(cells))
    return masks


class Discovery(nn.Module):
    """The encoder of object discovery: four 5x5 convolutions, positions, and slot attention.

    Each convolution has ``channels`` and steps by one of ``strides``; set prediction has strides 1, 2, 2, 1. The
    object-centric RL benchmark leaves the last one without its ReLU: not ``rectified``.
    """

    def __init__(
        self,
        count: int = 7,
        width: int = 64,
        hidden: int = 128,
        iterations: int = 3,
        channels: int = 64,
        strides: Sequence[int] = (1, 1, 1, 1),
        rectified: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, stride in enumerate(strides):
            layers += [nn.Conv2d(channels if index else 3, channels, 5, stride, padding=2), nn.ReLU()]
        self.cnn = _glorot(nn.Sequential(*(layers if rectified else layers[:-1])))
        self.position = PositionEmbedding(channels)
        self.slots = Slots(channels, count, width, hidden, iterations)

    def forward(self, x: Tensor) -> Features:
        return self.attend(x)

    def attend(self, x: Tensor, noise: Tensor | None = None) -> Features:
        """Slots and their masks for images (B, 3, H, W); ``noise`` (B, S, width) is what slots begin at."""
        maps = self.position(self.cnn(x))
        slots, attention = self.slots(maps.flatten(2).transpose(1, 2), noise)
        return Features(pooled=slots.mean(dim=1), tokens=slots, masks=as_masks(attention, maps.shape[2:]))


class BroadcastDecoder(nn.Module):
    """Slots (B, S, ``width``) to an image and its parts: each slot is spread over an 8x8 map and deconvolved alone.

    Transposed convolutions of 5x5 and ``channels`` by stride 2, as many as the size takes (four for 128 pixels), one by
    stride 1, and one 3x3 to colours and a mask; masks are normalised over slots. ``forward`` gives the image
    (B, 3, H, W), the colours (B, S, 3, H, W) and the masks (B, S, H, W).
    """

    def __init__(self, width: int, size: int = 64, channels: int = 64) -> None:
        super().__init__()
        doublings = (size // 8).bit_length() - 1
        if size < 8 or size != 8 << doublings:
            raise ValueError(f"images of {size} pixels a side are no 8 doubled some times")
        self.position = PositionEmbedding(width)
        widths = [width, *[channels] * doublings]
        layers: list[nn.Module] = []
        for inputs in widths[:-1]:
            layers += [nn.ConvTranspose2d(inputs, channels, 5, 2, padding=2, output_padding=1), nn.ReLU()]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 5, 1, padding=2), nn.ReLU()]
        self.net = _glorot(nn.Sequential(*layers, nn.ConvTranspose2d(channels, 4, 3, 1, padding=1)))

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spread = slots.flatten(0, 1)[:, :, None, None].expand(-1, -1, 8, 8)
        drawn = full_precision(self.net(self.position(spread))).unflatten(0, slots.shape[:2])
        colours, masks = drawn[:, :, :3], F.softmax(drawn[:, :, 3], dim=1)
        return (colours * masks.unsqueeze(2)).sum(dim=1), colours, masks


Few = Annotated[int, Field(ge=1, le=256)]


def slot_attention(
    slots: Few = 6,
    width: int = 64,
    hidden: int = 128,
    iterations: Few = 3,
    channels: int = 64,
    strides: Sequence[Few] = (1, 1, 1, 1),
    rectified: bool = True,
) -> Backbone:
    """``objects:slot-attention``: tokens are slots, their mean is the pooled vector; images of 64 pixels."""
    return _backbone("slot-attention", slots, width, hidden, iterations, channels, strides, rectified)


def slot_set(
    slots: Few = 10,
    width: int = 64,
    hidden: int = 128,
    iterations: Few = 3,
    channels: int = 64,
    strides: Sequence[Few] = (1, 2, 2, 1),
) -> Backbone:
    """``objects:slot-set``: the encoder of set prediction, whose map is a quarter as wide as the image."""
    return _backbone("slot-set", slots, width, hidden, iterations, channels, strides)


def _backbone(
    name: str,
    slots: int,
    width: int,
    hidden: int,
    iterations: int,
    channels: int,
    strides: Sequence[int],
    rectified: bool = True,
) -> Backbone:
    options = {
        "slots": slots, "width": width, "hidden": hidden, "iterations": iterations, "channels": channels,
        "strides": list(strides),
    } | ({} if rectified else {"rectified": False})  # fmt: skip
    spec = BackboneSpec(
        arch=f"objects:{name}", dim=width, strides={}, gives=frozenset({"pooled", "tokens", "masks"}), options=options,
        image_size=(64, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    return Backbone(Discovery(slots, width, hidden, iterations, channels, strides, rectified), spec)
