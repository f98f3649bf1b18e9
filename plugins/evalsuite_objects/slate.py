"""SLATE (Singh, Deng and Ahn, ICLR 2022): slots that explain the tokens of a discrete VAE through a transformer.

Two of them share their code. :class:`SLATE` is the original, whose slots read the words of the discrete VAE; its
arithmetic, sizes and names of tensors are those of singhgautam/slate at commit 06f63c53 (MIT). :class:`PixelSLATE` is
that of the object-centric RL benchmark, jsikyoon/OCRL at 01d0bd56 (MIT), whose slots read pixels. Published files of
both load (:mod:`evalsuite_objects.layouts`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from evalsuite import Backbone, BackboneSpec, Features
from evalsuite_objects.slots import PositionEmbedding, Slots, as_masks, linear
from pretrain.blocks import Noise, full_precision

__all__ = [
    "SLATE",
    "DiscreteVae",
    "Explained",
    "PixelSLATE",
    "TransformerDecoder",
    "gumbel_softmax",
    "slate",
    "slate_pixels",
]


def gumbel_softmax(logits: Tensor, temperature: float, hard: bool, dim: int = 1, noise: Noise | None = None) -> Tensor:
    """A draw from a relaxed categorical; ``hard``: one-hot, with the gradient of the relaxed one (straight through).

    The noise is -log(Exp(1) + the smallest number), as in the official code, and not torch's own, whose noise may
    be infinite. It is drawn from ``noise``, image by image, or from torch's generator.
    """
    tiny = torch.finfo(logits.dtype).tiny
    if noise is None:
        drawn = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_()
    else:
        drawn = noise.exponential(logits)
    soft = F.softmax((logits - (drawn + tiny).log()) / temperature, dim)
    if not hard:
        return soft
    onehot = torch.zeros_like(logits).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return onehot - soft.detach() + soft


class _Conv(nn.Module):
    """A convolution and ReLU; with ``norm`` over all channels and pixels of an image between them, else with a bias."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, *, norm: bool = True
    ) -> None:
        super().__init__()
        self.norm = norm
        self.m = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=not norm)
        nn.init.kaiming_uniform_(self.m.weight, nonlinearity="relu")
        if norm:
            self.weight, self.bias = nn.Parameter(torch.ones(outputs)), nn.Parameter(torch.zeros(outputs))
        elif self.m.bias is not None:
            nn.init.zeros_(self.m.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.m(x)
        return F.relu(F.group_norm(x, 1, self.weight, self.bias) if self.norm else x)


def _last(inputs: int, outputs: int, kernel: int = 1) -> nn.Conv2d:
    """A convolution that nothing follows."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class DiscreteVae(nn.Module):
    """4x4 patches to logits over ``words``, and words back to an image four times as large."""

    def __init__(self, words: int, channels: int = 3, *, norm: bool = True) -> None:
        super().__init__()
        conv = partial(_Conv, norm=norm)
        self.encoder = nn.Sequential(conv(channels, 64, 4, 4), *(conv(64, 64, 1) for _ in range(6)), _last(64, words))

        def doubled() -> list[nn.Module]:
            convs = [conv(64, 64, 3, 1, 1), conv(64, 64, 1), conv(64, 64, 1), conv(64, 256, 1)]
            return [*convs, nn.PixelShuffle(2)]

        self.decoder = nn.Sequential(conv(words, 64, 1), *doubled(), *doubled(), _last(64, channels))


class _Attention(nn.Module):
    """Multi-head attention without biases."""

    def __init__(self, width: int, heads: int, dropout: float, gain: float) -> None:
        super().__init__()
        self.heads = heads
        self.attn_dropout, self.output_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.proj_q, self.proj_k, self.proj_v = (linear(width, width, bias=False) for _ in range(3))
        self.proj_o = linear(width, width, bias=False, gain=gain)

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project, x in ((self.proj_q, query), (self.proj_k, memory), (self.proj_v, memory))
        )
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        if mask is not None:
            logits = logits.masked_fill(mask, float("-inf"))
        mixed = self.attn_dropout(full_precision(logits).softmax(dim=-1)) @ v
        output: Tensor = self.output_dropout(self.proj_o(mixed.transpose(1, 2).flatten(2)))
        return output


class _Block(nn.Module):
    """Self-attention to what came before, attention to the slots, and an MLP, each after a norm and with a residual.

    In the first block the norm of the input replaces the input in the residual stream, too.
    """

    def __init__(self, length: int, width: int, heads: int, dropout: float, gain: float, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = _Attention(width, heads, dropout, gain)
        later = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        self.self_attn_mask = nn.Parameter(later, requires_grad=False)  # a parameter, as in the published files
        self.encoder_decoder_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_decoder_attn = _Attention(width, heads, dropout, gain)
        self.ffn_layer_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            linear(width, 4 * width, gain=None), nn.ReLU(), linear(4 * width, width, gain=gain), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        normed = self.self_attn_layer_norm(x)
        length = x.shape[1]
        x = (normed if self.first else x) + self.self_attn(normed, normed, self.self_attn_mask[:length, :length])
        x = x + self.encoder_decoder_attn(self.encoder_decoder_attn_layer_norm(x), slots)
        output: Tensor = x + self.ffn(self.ffn_layer_norm(x))
        return output


class TransformerDecoder(nn.Module):
    """Embedded tokens (B, T, width) and slots (B, S, width) to what each next token is read off, (B, T, width)."""

    def __init__(self, blocks: int, length: int, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        gain = (3 * blocks) ** -0.5
        self.blocks = nn.ModuleList(_Block(length, width, heads, dropout, gain, n == 0) for n in range(blocks))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, slots)
        output: Tensor = self.layer_norm(x)
        return output


class _Positions(nn.Module):
    def __init__(self, length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.pe = nn.Parameter(torch.zeros(1, length, width))
        nn.init.trunc_normal_(self.pe)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.dropout(x + self.pe[:, : x.shape[1]])
        return output


class _Dictionary(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.dictionary = nn.Embedding(words, width)

    def forward(self, words: Tensor) -> Tensor:
        embedded: Tensor = self.dictionary(words)
        return embedded


@dataclass(frozen=True)
class Explained(Features):
    """What is seen of a batch in training, and the named losses."""

    losses: Mapping[str, Tensor] = field(default_factory=dict)


class _Begin(nn.Module):
    """What stands before the first word, (1, 1, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 1, width))
        nn.init.xavier_uniform_(self.token)

    def forward(self) -> Tensor:
        return self.token


class SLATE(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to slots, by the words of a discrete VAE; and how well the slots explain them.

    ``size`` is H and W, ``words`` are so many, ``width`` that of the transformer, ``slot_width`` that of slots and
    ``hidden`` that of their MLP (both ``width`` by default); ``blocks`` and ``heads`` are the transformer's. Word 0 is
    the one that begins a sequence; the VAE's words follow. ``channels``, of what slots read, is :class:`PixelSLATE`'s.
    """

    def __init__(
        self, slots: int = 6, size: int = 64, words: int = 4096, width: int = 192, hidden: int | None = None,
        iterations: int = 3, slot_heads: int = 1, blocks: int = 4, heads: int = 4, dropout: float = 0.1,
        slot_width: int | None = None, channels: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if size % 4 or width % heads:
            raise ValueError(f"there are no 4x4 patches of {size} pixels, or no {heads} heads of {width} numbers")
        self.words, self.side = words, size // 4
        slot_width = slot_width or width
        self.dvae = DiscreteVae(words, norm=channels is None)
        self.positional_encoder = _Positions(1 + self.side**2, width, dropout)
        self.slot_attn = Slots(channels or width, slots, slot_width, hidden or width, iterations, slot_heads)
        self.dictionary = _Dictionary(words + (channels is None), width)
        self.slot_proj = linear(slot_width, width, bias=False)
        self.tf_dec = TransformerDecoder(blocks, self.side**2, width, heads, dropout)
        self.out = linear(width, words, bias=False)

    def forward(self, images: Tensor) -> Features:
        slots, masks = self.attend(self.read(images))
        return Features(pooled=slots.mean(dim=1), tokens=slots, masks=masks)

    def likeliest(self, images: Tensor) -> Tensor:
        """The words (B, T) of images."""
        logits: Tensor = self.dvae.encoder(images)
        return logits.argmax(dim=1).flatten(1)

    def attend(self, inputs: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """The slots (B, S, slot width) of what was read (B, N, D), and each slot's share of each cell, (B, S, h, w)."""
        start = None if noise is None else noise.normal(self.slot_attn.noise.expand(len(inputs), -1, -1))
        slots, attention = self.slot_attn(inputs, start)
        side = math.isqrt(attention.shape[1])
        return slots, as_masks(attention, torch.Size((side, side)))

    def read(self, images: Tensor, embedded: Tensor | None = None) -> Tensor:
        """What the slots attend to (B, N, D): here the embedded words, the likeliest where none are given."""
        return (self.embedded(self.likeliest(images)) if embedded is None else embedded)[:, 1:]

    def begun(self, words: Tensor) -> Tensor:
        """Words (B, T) with the beginning before them, as vectors (B, 1 + T, width)."""
        begun: Tensor = self.dictionary(F.pad(words + 1, (1, 0)))
        return begun

    def embedded(self, words: Tensor) -> Tensor:
        """Words (B, T) with the beginning before them, and their positions encoded, (B, 1 + T, width)."""
        embedded: Tensor = self.positional_encoder(self.begun(words))
        return embedded

    def explains(self) -> list[nn.Module]:
        """The transformer and what it reads besides slots."""
        return [self.positional_encoder, self.dictionary, self.tf_dec, self.out]

    def explain(self, images: Tensor, temperature: float, hard: bool = False, noise: Noise | None = None) -> Explained:
        """The losses ``mse``, the VAE's squared error, and ``cross_entropy`` of its words given the slots, each
        summed over an image and averaged over images.

        The words to predict are a second, independent, hard draw, through which no gradient flows.
        """
        logits = F.log_softmax(full_precision(self.dvae.encoder(images)), dim=1)
        rebuilt = self.dvae.decoder(gumbel_softmax(logits, temperature, hard, noise=noise))
        words = gumbel_softmax(logits.detach(), temperature, True, noise=noise).argmax(dim=1).flatten(1)
        embedded = self.embedded(words)
        slots, masks = self.attend(self.read(images, embedded), noise)
        predicted = full_precision(self.out(self.tf_dec(embedded[:, :-1], self.slot_proj(slots))))
        losses = {
            "mse": (images - rebuilt).square().sum() / len(images),
            "cross_entropy": F.cross_entropy(predicted.flatten(0, 1), words.flatten(), reduction="sum") / len(images),
        }
        return Explained(pooled=slots.mean(dim=1), tokens=slots, masks=masks, losses=losses)

    def rebuild(self, words: Tensor) -> Tensor:
        """The images (B, 3, H, W) in [0, 1] that words (B, T) stand for."""
        onehot = F.one_hot(words, self.words).to(self.out.weight.dtype)
        rebuilt: Tensor = self.dvae.decoder(onehot.transpose(1, 2).unflatten(2, (self.side, self.side)))
        return rebuilt.clamp(0, 1)

    @torch.no_grad()
    def generate(self, slots: Tensor) -> Tensor:
        """Images (B, 3, H, W) drawn from slots alone: the likeliest next word, one after the other."""
        memory = self.slot_proj(slots)
        words = torch.empty(len(slots), 0, dtype=torch.long, device=slots.device)
        for _ in range(self.side**2):
            following = self.out(self.tf_dec(self.embedded(words), memory)[:, -1:]).argmax(dim=-1)
            words = torch.cat([words, following], dim=1)
        return self.rebuild(words)


class PixelSLATE(SLATE):
    """SLATE as the object-centric RL benchmark has it: slots attend to pixels, not to words.

    They go through four 5x5 convolutions of ``channels`` without norms, the last not rectified, and get a linear map
    of their distances to the four sides. The VAE has biases instead of norms, and what begins a sequence is a vector
    of its own.
    """

    def __init__(self, channels: int = 64, **sizes: Any) -> None:
        super().__init__(**sizes, channels=channels)
        convs = [_Conv(inputs, channels, 5, 1, 2, norm=False) for inputs in (3, channels, channels)]
        self.cnn = nn.Sequential(*convs, _last(channels, channels, 5))
        self.position = PositionEmbedding(channels)
        self.position.dense.reset_parameters()  # torch's own, as there
        self.bos = _Begin(self.out.in_features)

    def read(self, images: Tensor, embedded: Tensor | None = None) -> Tensor:
        """The pixels, as vectors."""
        vectors: Tensor = self.position(self.cnn(images)).flatten(2).transpose(1, 2)
        return vectors

    def begun(self, words: Tensor) -> Tensor:
        return torch.cat([self.bos().expand(len(words), -1, -1), self.dictionary(words)], dim=1)

    def explains(self) -> list[nn.Module]:
        return [*super().explains(), self.bos]


SIZES: dict[str, Any] = {
    "slots": 6, "size": 64, "words": 4096, "width": 192, "hidden": None, "iterations": 3, "slot_heads": 1,
    "blocks": 4, "heads": 4, "dropout": 0.1, "slot_width": None,
}  # fmt: skip


class Options(TypedDict, total=False):
    """The sizes of :class:`SLATE`, and ``channels`` of :class:`PixelSLATE`."""

    slots: Annotated[int, Field(ge=1, le=256)]
    size: Annotated[int, Field(ge=4, le=1024)]
    words: Annotated[int, Field(ge=1, le=1 << 16)]
    width: Annotated[int, Field(ge=1, le=1 << 14)]
    hidden: Annotated[int, Field(ge=1, le=1 << 14)] | None
    iterations: Annotated[int, Field(ge=1, le=64)]
    slot_heads: Annotated[int, Field(ge=1, le=256)]
    blocks: Annotated[int, Field(ge=1, le=256)]
    heads: Annotated[int, Field(ge=1, le=256)]
    dropout: Annotated[float, Field(ge=0, le=1)]
    slot_width: Annotated[int, Field(ge=1, le=1 << 14)] | None
    channels: Annotated[int, Field(ge=1, le=1 << 14)]


def slate(**options: Unpack[Options]) -> Backbone:
    """``objects:slate``: tokens are slots, their mean is the pooled vector, masks are of 16x16 cells.

    ``options`` are those of :class:`SLATE`. By default six slots and 4,096 words, as the object-centric RL benchmark
    has them.
    """
    return _backbone("objects:slate", SLATE, SIZES, dict(options))


def slate_pixels(**options: Unpack[Options]) -> Backbone:
    """``objects:slate-pixels``, the benchmark's variant: as ``objects:slate``, with masks of 64x64 cells.

    ``options`` are those of :class:`PixelSLATE`.
    """
    return _backbone("objects:slate-pixels", PixelSLATE, SIZES | {"channels": 64}, dict(options))


def _backbone(arch: str, kind: type[SLATE], defaults: dict[str, Any], options: dict[str, Any]) -> Backbone:
    if unknown := sorted(options.keys() - defaults.keys()):
        raise TypeError(f"it has no option {unknown[0]}; there are {', '.join(defaults)}")
    options = defaults | options
    net = kind(**options)
    spec = BackboneSpec(
        arch, net.slot_proj.in_features, {}, frozenset({"pooled", "tokens", "masks"}), options,
        image_size=(options["size"], options["size"]), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    return Backbone(net, spec, heads=frozenset())  # all of it learns; the choice of a word passes no gradient on
