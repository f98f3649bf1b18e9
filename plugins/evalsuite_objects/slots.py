"""Slot Attention (Locatello et al., NeurIPS 2020), and the encoder that discovers objects by it.

Modules bear the names of singhgautam/slate at commit 06f63c53, whose checkpoints therefore load; the arithmetic is
that of google-research/slot_attention at 0c1bbe5f, which has one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalsuite import Backbone, BackboneSpec, Features

__all__ = ["BroadcastDecoder", "Discovery", "PositionEmbedding", "SlotAttention", "Slots", "linear", "slot_attention"]

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
        attention = inputs.new_zeros(0)
        for _ in range(self.iterations):
            before = slots
            queries = self._split(self.project_q(self.norm_slots(slots)))
            logits = torch.einsum("bhnd,bhsd->bnhs", keys, queries)
            attention = logits.flatten(2).softmax(dim=-1).unflatten(2, logits.shape[2:])
            weights = attention + EPSILON
            weights = weights / weights.sum(dim=1, keepdim=True)
            updates = torch.einsum("bnhs,bhnd->bshd", weights, values).flatten(2)
            slots = self.gru(updates.flatten(0, 1), before.flatten(0, 1)).view_as(before)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, attention.sum(dim=2)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, D / heads)."""
        split: Tensor = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
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

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The slots (B, S, width), and the attention (B, N, S)."""
        noise = self.noise.expand(len(inputs), -1, -1)
        if self.training:
            noise = torch.randn_like(noise)
        found: tuple[Tensor, Tensor] = self.slot_attention(
            self.mlp(self.layer_norm(inputs)), self.slot_mu + self.slot_log_sigma.exp() * noise
        )
        return found


class PositionEmbedding(nn.Module):
    """Adds a linear map of each place's distances to the four sides to maps (B, C, H, W): the soft positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense = linear(4, channels)

    def forward(self, maps: Tensor) -> Tensor:
        rows, columns = (torch.linspace(0, 1, n, device=maps.device, dtype=maps.dtype) for n in maps.shape[-2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        embedded: Tensor = self.dense(torch.cat([grid, 1 - grid], dim=-1))
        return maps + embedded.permute(2, 0, 1)


class Discovery(nn.Module):
    """The encoder of object discovery: four 5x5 convolutions of 64 channels, positions, and slot attention."""

    def __init__(self, count: int = 7, width: int = 64, hidden: int = 128, iterations: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (3, 64, 64, 64):
            layers += [nn.Conv2d(inputs, 64, 5, padding=2), nn.ReLU()]
        self.cnn = nn.Sequential(*layers)
        self.position = PositionEmbedding(64)
        self.slots = Slots(64, count, width, hidden, iterations)

    def forward(self, x: Tensor) -> Features:
        slots, _ = self.attend(x)
        return Features(pooled=slots.mean(dim=1), tokens=slots)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slots (B, S, width) and the attention (B, H W, S) of images (B, 3, H, W)."""
        found: tuple[Tensor, Tensor] = self.slots(self.position(self.cnn(x)).flatten(2).transpose(1, 2))
        return found


class BroadcastDecoder(nn.Module):
    """Slots (B, S, ``width``) to an image and its parts: each slot is spread over an 8x8 map and deconvolved alone.

    Four transposed convolutions of 5x5 by stride 2, as many as the size takes, one by stride 1, and one 3x3 to colours
    and a mask; masks are normalised over slots. ``forward`` gives the image (B, 3, H, W), the colours (B, S, 3, H, W)
    and the masks (B, S, H, W).
    """

    def __init__(self, width: int, size: int = 64) -> None:
        super().__init__()
        doublings = (size // 8).bit_length() - 1
        if size != 8 << doublings:
            raise ValueError(f"images of {size} pixels a side are no 8 doubled some times")
        self.position = PositionEmbedding(width)
        layers: list[nn.Module] = []
        for n in range(doublings):
            layers += [nn.ConvTranspose2d(64 if n else width, 64, 5, 2, padding=2, output_padding=1), nn.ReLU()]
        layers += [nn.ConvTranspose2d(64 if doublings else width, 64, 5, 1, padding=2), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.ConvTranspose2d(64, 4, 3, 1, padding=1))

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spread = slots.flatten(0, 1)[:, :, None, None].expand(-1, -1, 8, 8)
        drawn = self.net(self.position(spread)).unflatten(0, slots.shape[:2])
        colours, masks = drawn[:, :, :3], F.softmax(drawn[:, :, 3], dim=1)
        return (colours * masks.unsqueeze(2)).sum(dim=1), colours, masks


def slot_attention(slots: int = 6, width: int = 64, hidden: int = 128, iterations: int = 3) -> Backbone:
    """``objects:slot-attention``: tokens are slots, their mean is the pooled vector; images of 64 pixels."""
    options = {"slots": slots, "width": width, "hidden": hidden, "iterations": iterations}
    spec = BackboneSpec(
        arch="objects:slot-attention", dim=width, strides={}, gives=frozenset({"pooled", "tokens"}), options=options,
        image_size=(64, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    return Backbone(Discovery(slots, width, hidden, iterations), spec)
