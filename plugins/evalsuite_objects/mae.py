"""Masked autoencoding (He et al., CVPR 2022) of timm's plain vision transformers, written from the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from evalsuite import Features, UsageError, hookimpl
from pretrain import Augment, Batch, Centre, Images, Look, Method, Preset, Run, Training, look_through
from pretrain.blocks import Noise, full_precision

__all__ = ["MAE", "Decoder", "Masked", "patches", "visible"]


@dataclass(frozen=True, kw_only=True)
class Masked(Features):
    """What is said of an image some of whose N patches are hidden: ``every`` (B, P + V, D) is the prefix, a class token
    say, and the visible patches, V of them, which are the first of ``order`` (B, N), the indices of all patches."""

    every: Tensor
    order: Tensor


def patches(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, H, W) as patches (B, N, 3 ``side`` ``side``), row by row."""
    return F.unfold(images, side, stride=side).transpose(1, 2)


def _of(x: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` (B, K) of x (B, N, D)."""
    return x.gather(1, indices.unsqueeze(2).expand(-1, -1, x.shape[2]))


def visible(net: VisionTransformer, normalised: Tensor, indices: Tensor) -> Tensor:
    """The prefix and the patches ``indices`` (B, V) of images after all blocks, which have seen no others."""
    prefix = net.num_prefix_tokens

    def drop(_: nn.Module, __: Any, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, :prefix], _of(tokens[:, prefix:], indices)], dim=1)

    hook = net.patch_drop.register_forward_hook(drop)
    try:
        return net.forward_features(normalised)
    finally:
        hook.remove()


def _sines(grid: tuple[int, int], width: int) -> Tensor:
    """Positions (N, ``width``), row by row: half by where a patch lies across, half by where it lies down, in each the
    sines and then the cosines, as published encoders have them."""
    table: Tensor = build_sincos2d_pos_embed(list(grid), width)  # sines down and across, then cosines
    ordered: Tensor = table.unflatten(1, (2, 2, -1)).flip(2).transpose(1, 2).flatten(1)
    return ordered


def _drawn(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def begin(net: VisionTransformer) -> None:
    """Begin as the paper does: Xavier's uniform rule, positions by sines. They are not trained. A network that has
    learned already, which the gains of its norms tell, keeps what it has."""
    assert net.pos_embed is not None
    gains = [p for name, p in net.named_parameters() if p.ndim == 1 and name.endswith("weight")]
    if gains and all(bool((gain == 1).all()) for gain in gains):
        net.apply(_drawn)
        nn.init.xavier_uniform_(net.patch_embed.proj.weight.data.view(net.embed_dim, -1))
        for token in (net.cls_token, net.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        table = _sines(net.patch_embed.grid_size, net.embed_dim)
        with torch.no_grad():
            net.pos_embed.zero_()[0, -len(table) :] = table
    net.pos_embed.requires_grad_(False)


class Decoder(nn.Module):
    """What the encoder says of visible patches to the pixels (B, N - V, ``pixels``) of the hidden ones."""

    positions: Tensor

    def __init__(
        self, dim: int, grid: tuple[int, int], prefix: int, pixels: int, width: int, blocks: int, heads: int
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(blocks)))
        self.norm, self.predict = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, pixels)
        self.register_buffer("positions", _sines(grid, width), persistent=False)
        self.apply(_drawn)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, every: Tensor, order: Tensor) -> Tensor:
        """``every`` and ``order`` are those of :class:`Masked`."""
        x = full_precision(self.embed(every))  # positions are added in float32, as the encoder does
        prefix, seen = x[:, : self.prefix], x[:, self.prefix :]
        shown = order[:, : seen.shape[1], None].expand(-1, -1, x.shape[2])
        masked = self.mask_token.to(x.dtype).expand(*order.shape, -1)
        placed = masked.scatter(1, shown, seen) + self.positions.to(x.dtype)
        decoded = self.blocks(torch.cat([prefix, placed], dim=1))[:, self.prefix :]
        predicted: Tensor = self.predict(self.norm(_of(decoded, order[:, seen.shape[1] :])))
        return predicted


class MAE(Method):
    """He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (arXiv 2111.06377).

    Three quarters of an image's patches are hidden, others for every image. The encoder sees the rest alone; a small
    decoder gets what it says of them, a mask token for each hidden patch, and where all of them lie, and draws the
    pixels of the hidden ones. The loss is the mean squared error of these, of pixels normalised as the backbone takes
    them; with ``normalise`` each patch is brought to mean zero and deviation one first.

    It trains any of timm's plain vision transformers, whose positions are then fixed. Fresh ones are drawn anew by the
    paper's rules; one that has learned keeps its weights and positions. The trained backbone is that transformer:
    agents read its patches, or by ``--set reads=pooled`` its class token ("MAE-Patch" and "MAE-CLS" of Yoon et al.).
    The normalisation of pixels is that of timm's configuration, which may not be ImageNet's mean.

    With ``--knn-every`` the log has the loss of held-out images, the same patches of which are hidden each time.

    ``imagenet`` is the official recipe (README and paper): AdamW with betas 0.9 and 0.95 and weight decay 0.05,
    1.5e-4 B / 256, 40 epochs of warm-up and a cosine, 800 epochs of 4096 images, crops of 20 to 100 percent and flips.
    That crops are bicubic, that biases and norms do not decay and that the decoder has 16 heads is the code's.
    ``objects`` is what Yoon et al. train (jsikyoon/OCRL, code), with ``--arch timm:vit_base_patch8_224 --arch-option
    img_size=64``: 1e-3 B / 256 without a schedule, plain pixels, and a weight decay of 0.01 on everything, for the 0.05
    of its configuration never reaches the optimiser. It is shown pixels in [0, 1], which are normalised here.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        mask: float = 0.75  # the share of patches that is hidden
        normalise: bool = True  # each patch of the target
        decoder_width: int = 512
        decoder_blocks: int = 8
        decoder_heads: int = 16
        crop: tuple[float, float] | None = (0.2, 1.0)  # shares of the area; none: the whole image, unflipped
        optimizer: Literal["sgd", "lars", "adamw"] = "adamw"
        lr: float = 1.5e-4
        betas: tuple[float, float] = (0.9, 0.95)
        weight_decay: float = 0.05
        decay_vectors: bool = False
        warmup: float = 40.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 < self.mask < 1:
                raise ValueError(f"mask is the share of hidden patches, between 0 and 1, not {self.mask}")
            if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
                raise ValueError(f"a decoder_width of {self.decoder_width} is no multiple of decoder_heads and of 4")

    presets: ClassVar[Mapping[str, Preset]] = {
        "imagenet": Preset("facebookresearch/mae PRETRAIN.md", 800, 4096),
        "objects": Preset(
            "jsikyoon/OCRL configs and code",
            10,
            24,
            {
                "size": 64,
                "normalise": False,
                "crop": None,
                "lr": 1e-3,
                "weight_decay": 0.01,
                "decay_vectors": True,
                "warmup": 0.0,
                "schedule": "constant",
            },
        ),
    }
    arch: ClassVar[str] = "timm:vit_base_patch16_224"
    small: ClassVar[Mapping[str, Any]] = {
        "size": 16, "decoder_width": 16, "decoder_blocks": 1, "decoder_heads": 2
    }  # fmt: skip
    small_arch: ClassVar[Mapping[str, Any]] = {
        "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2
    }  # fmt: skip

    @hookimpl
    def views(self) -> tuple[Look, ...]:
        o = self.options
        if o.crop is None:
            return (Centre(o.size, share=1.0),)
        return (Augment(o.size, crop=o.crop, interpolation="bicubic", jitter=None, gray=0.0),)

    @hookimpl
    def prepared(self, run: Run) -> None:
        o, net = self.options, _plain(run)
        embed = net.patch_embed
        if embed.img_size != (o.size, o.size):
            raise UsageError(
                f"{run.backbone.spec.arch} has positions for images of {embed.img_size[0]} pixels, not {o.size}",
                cause="positions of a masked autoencoder are fixed, one for each patch",
                fix=f"--arch-option img_size={o.size}, or --set mae.size={embed.img_size[0]}",
            )
        self.side = embed.patch_size[0]
        if o.size % self.side:
            raise UsageError(
                f"images of {o.size} pixels are no whole number of patches of {self.side}",
                cause="each patch is hidden or seen, and drawn, as a whole",
                fix=f"--arch-option img_size={max(o.size // self.side, 1) * self.side}, and mae.size alike",
            )
        self.shown = int(embed.num_patches * (1 - o.mask))
        if not 0 < self.shown < embed.num_patches:
            raise UsageError(
                f"of {embed.num_patches} patches {self.shown} are to be seen",
                cause=f"a share of {o.mask} is hidden; some must be, and some must be left",
                fix="--set mae.mask=0.75, or smaller patches",
            )
        begin(net)
        shape = (net.embed_dim, embed.grid_size, net.num_prefix_tokens, 3 * self.side**2)
        self.decoder = Decoder(*shape, o.decoder_width, o.decoder_blocks, o.decoder_heads)

    @hookimpl
    def features(self, run: Run, batch: Batch) -> list[Features]:
        (view,) = batch.views
        noise = Noise(run.rng, len(batch), run.device)
        return [self.masked(run, view.data, noise)]

    def masked(self, run: Run, images: Tensor, noise: Noise) -> Masked:
        """What the encoder says of images whose patches are hidden by ``noise``."""
        net = cast(VisionTransformer, run.backbone.net)
        order = noise.normal(images.new_empty(len(images), net.patch_embed.num_patches)).argsort(dim=1)
        every = visible(net, run.backbone.normalise(images), order[:, : self.shown])
        pooled = net.forward_head(every, pre_logits=True)
        return Masked(pooled, tokens=every[:, net.num_prefix_tokens :], every=every, order=order)

    @hookimpl
    def losses(self, run: Run, batch: Batch, features: list[Masked]) -> dict[str, Tensor]:
        (masked,), (view,) = features, batch.views
        return {"reconstruction": self.errors(run, view.data, masked).mean()}

    def errors(self, run: Run, images: Tensor, masked: Masked) -> Tensor:
        """The squared error of each pixel of the hidden patches (B, N - V, pixels)."""
        target = _of(patches(run.backbone.normalise(images), self.side), masked.order[:, self.shown :])
        if self.options.normalise:
            variance, mean = torch.var_mean(target, dim=2, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        errors: Tensor = (self.decoder(masked.every, masked.order) - target).square()
        return errors

    @hookimpl
    def measures(self, run: Run, data: Images) -> dict[str, float]:
        """The mean squared error of the hidden pixels, in the units of the loss."""
        total, rng = 0.0, torch.Generator().manual_seed(0)
        for images in look_through(run, data, Centre(self.options.size, share=1.0)):
            masked = self.masked(run, images, Noise(rng, len(images), run.device))
            total += float(self.errors(run, images, masked).mean((1, 2)).sum())
        return {"reconstruction_error": total / len(data)}


def _plain(run: Run) -> VisionTransformer:
    """The plain vision transformer that the backbone is. Raises :class:`UsageError` for any other."""
    net = run.backbone.net
    if isinstance(net, VisionTransformer) and type(net.patch_embed) is PatchEmbed and net.pos_embed is not None:
        across, down = net.patch_embed.patch_size
        if across == down:
            return net
    raise UsageError(
        f"mae cannot train {run.backbone.spec.arch}",
        cause="it leaves hidden patches out of the network, which only a plain vision transformer allows",
        fix="--arch timm:vit_base_patch16_224, or another of timm's plain ViTs",
    )
