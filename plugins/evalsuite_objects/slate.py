"""SLATE (Singh, Deng and Ahn, ICLR 2022): slots that explain the tokens of a discrete VAE through a transformer.

Arithmetic, sizes and names of tensors are those of singhgautam/slate at commit 06f63c53 (MIT): its checkpoints load.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalsuite import Backbone, BackboneSpec, Features
from evalsuite_objects.slots import Slots, linear

__all__ = ["SLATE", "DiscreteVae", "TransformerDecoder", "gumbel_softmax", "slate"]


def gumbel_softmax(logits: Tensor, temperature: float, hard: bool, dim: int = 1) -> Tensor:
    """A draw from a relaxed categorical; ``hard``: one-hot, with the gradient of the relaxed one (straight through).

    The noise is -log(Exp(1) + the smallest number), as in the official code, and not torch's own, whose noise may
    be infinite.
    """
    tiny = torch.finfo(logits.dtype).tiny
    noise = -(torch.empty_like(logits).exponential_() + tiny).log()
    soft = F.softmax((logits + noise) / temperature, dim)
    if not hard:
        return soft
    onehot = torch.zeros_like(logits).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return onehot - soft.detach() + soft


class _Conv(nn.Module):
    """A convolution without bias, a norm over all channels and places of an image, and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.m = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        nn.init.kaiming_uniform_(self.m.weight, nonlinearity="relu")
        self.weight, self.bias = nn.Parameter(torch.ones(outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.group_norm(self.m(x), 1, self.weight, self.bias))


def _last(inputs: int, outputs: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 1)
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class DiscreteVae(nn.Module):
    """4x4 patches to logits over ``words``, and words back to an image four times as large."""

    def __init__(self, words: int, channels: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(_Conv(channels, 64, 4, 4), *(_Conv(64, 64, 1) for _ in range(6)), _last(64, words))

        def doubled(inputs: int) -> list[nn.Module]:
            first = [_Conv(inputs, 64, 1), _Conv(64, 64, 3, 1, 1)] if inputs != 64 else [_Conv(64, 64, 3, 1, 1)]
            return [*first, _Conv(64, 64, 1), _Conv(64, 64, 1), _Conv(64, 256, 1), nn.PixelShuffle(2)]

        head: list[nn.Module] = [_Conv(words, 64, 1), *doubled(64), *doubled(64)]
        self.decoder = nn.Sequential(*head, _last(64, channels))


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
        mixed = self.attn_dropout(logits.softmax(dim=-1)) @ v
        found: Tensor = self.output_dropout(self.proj_o(mixed.transpose(1, 2).flatten(2)))
        return found


class _Block(nn.Module):
    """Self-attention to what came before, attention to the slots, and an MLP, each after a norm and with a residual.

    In the first block the norm of the input takes the place of the input in the residual stream, too.
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
        found: Tensor = x + self.ffn(self.ffn_layer_norm(x))
        return found


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
        found: Tensor = self.layer_norm(x)
        return found


class _Positions(nn.Module):
    def __init__(self, length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.pe = nn.Parameter(torch.zeros(1, length, width))
        nn.init.trunc_normal_(self.pe)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.dropout(x + self.pe[:, : x.shape[1]])
        return found


class _Dictionary(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.dictionary = nn.Embedding(words, width)

    def forward(self, words: Tensor) -> Tensor:
        found: Tensor = self.dictionary(words)
        return found


class SLATE(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to slots; and the two losses it is trained by.

    Word 0 is the one that begins a sequence; the VAE's words follow.
    """

    def __init__(
        self, slots: int = 3, size: int = 64, words: int = 1024, width: int = 192, hidden: int = 192,
        iterations: int = 3, slot_heads: int = 1, blocks: int = 4, heads: int = 4, dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        tokens = (size // 4) ** 2
        self.words = words
        self.dvae = DiscreteVae(words)
        self.positional_encoder = _Positions(1 + tokens, width, dropout)
        self.slot_attn = Slots(width, slots, width, hidden, iterations, slot_heads)
        self.dictionary = _Dictionary(words + 1, width)
        self.slot_proj = linear(width, width, bias=False)
        self.tf_dec = TransformerDecoder(blocks, tokens, width, heads, dropout)
        self.out = linear(width, words, bias=False)

    def forward(self, images: Tensor) -> Features:
        words = self.dvae.encoder(images).argmax(dim=1).flatten(1)
        slots, _ = self.slot_attn(self.embedded(words)[:, 1:])
        return Features(pooled=slots.mean(dim=1), tokens=slots)

    def losses(
        self, images: Tensor, temperature: float, hard: bool = False, draw: Callable[..., Tensor] = gumbel_softmax
    ) -> dict[str, Tensor]:
        """The VAE's squared error and the cross-entropy of its words, each summed over an image, averaged over them.

        The words to predict are a second, independent, hard draw, through which no gradient flows.
        """
        logits = F.log_softmax(self.dvae.encoder(images), dim=1)
        rebuilt = self.dvae.decoder(draw(logits, temperature, hard))
        words = draw(logits, temperature, True).argmax(dim=1).flatten(1)
        embedded = self.embedded(words)
        slots, _ = self.slot_attn(embedded[:, 1:])
        predicted = self.out(self.tf_dec(embedded[:, :-1], self.slot_proj(slots)))
        return {
            "mse": (images - rebuilt).square().sum() / len(images),
            "cross_entropy": F.cross_entropy(predicted.flatten(0, 1), words.flatten(), reduction="sum") / len(images),
        }

    def embedded(self, words: Tensor) -> Tensor:
        """Words (B, T) with the beginning before them and their places, (B, 1 + T, width)."""
        found: Tensor = self.positional_encoder(self.dictionary(F.pad(words + 1, (1, 0))))
        return found

    @torch.no_grad()
    def generate(self, images: Tensor) -> Tensor:
        """Images drawn from the slots of images alone: the likeliest next word, one after the other."""
        side = images.shape[-1] // 4
        found = self.dvae.encoder(images).argmax(dim=1).flatten(1)
        slots = self.slot_proj(self.slot_attn(self.embedded(found)[:, 1:])[0])
        words = found[:, :0]
        for _ in range(side**2):
            following = self.out(self.tf_dec(self.embedded(words), slots))[:, -1:].argmax(dim=-1)
            words = torch.cat([words, following], dim=1)
        onehot = F.one_hot(words, self.words).to(images.dtype).transpose(1, 2).unflatten(2, (side, side))
        drawn: Tensor = self.dvae.decoder(onehot)
        return drawn.clamp(0, 1)


def slate(slots: int = 6, words: int = 4096, width: int = 192, iterations: int = 3, size: int = 64) -> Backbone:
    """``objects:slate``: tokens are slots, their mean is the pooled vector.

    By default six slots and 4,096 words, as the object-centric RL benchmark has them; its own variant reads pixels
    instead of words, and is not this one.
    """
    options = {"slots": slots, "words": words, "width": width, "iterations": iterations, "size": size}
    spec = BackboneSpec(
        arch="objects:slate", dim=width, strides={}, gives=frozenset({"pooled", "tokens"}), options=options,
        image_size=(size, size), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    return Backbone(SLATE(slots, size, words, width, width, iterations), spec)
