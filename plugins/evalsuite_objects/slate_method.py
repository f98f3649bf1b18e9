"""SLATE learns slots from which a transformer can tell every word of an image's discrete code.

"Illiterate DALL-E Learns to Compose", Singh, Deng and Ahn, ICLR 2022, arXiv 2110.11405; recipe and arithmetic of
singhgautam/slate at 06f63c53, and of jsikyoon/OCRL at 01d0bd56 for the variant of the object-centric RL benchmark (Yoon
et al., ICML 2023, arXiv 2302.04419).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evalsuite import Features, UsageError, hookimpl
from evalsuite.metrics.objects import foreground_adjusted_rand, owners
from evalsuite.pictures import columns_sheet, painted
from evalsuite_objects.discovery import segments
from evalsuite_objects.slate import SLATE, Explained
from pretrain import Batch, Centre, Images, Look, Method, Preset, Run, Training, build_optimizer, look_through
from pretrain.blocks import Noise, cosine_schedule, warmup_share

__all__ = ["SlateMethod"]

ROWS = 6  # images that are drawn from their slots, word by word
CHUNK = 32  # images at once: one has a million logits


class SlateMethod(Method):
    """Explains the words of images by slots.

    A discrete VAE writes an image down as 16 x 16 words; slots compete for them, and a transformer that sees only the
    slots predicts each word from those before it. The loss is the VAE's squared error plus the cross-entropy of the
    words, each summed over an image and averaged over images. The VAE learns through a relaxed draw of its words whose
    temperature falls; the words to be predicted are a second, hard draw that passes no gradient on. Draws, and the
    noise that slots begin at, are an image's own whatever number of processes shares the batch; only dropout is each
    process's.

    It trains ``objects:slate``, whose slots read the words, and ``objects:slate-pixels``, whose slots read pixels, as
    the RL benchmark has it.

    On held-out images (``--knn-every``) the log has ``reconstruction_error``, of the VAE by its likeliest words, and
    ``slots_error``, of six images drawn from their slots alone, both squared and averaged over pixels and channels in
    [0, 1]; on worlds that know whose pixel is whose ``attention_fg_ari``, the adjusted Rand index of the pixels of
    objects by the slots' attention. ``slate.png`` beside the log shows the six.

    Official recipe (code): batches of 50, 20 epochs of 3D Shapes; Adam at 3e-4 for the VAE and at 1e-4 for all else,
    which rises over 30,000 steps; temperature from 1 to 0.1 by a cosine over 30,000 steps; gradients scaled down to a
    largest entry of 1. What departs here: rates are not halved after four epochs without a better validation loss, for
    nothing is learned from held-out images.

    ``benchmark`` is that of OCRL, for ``--arch objects:slate-pixels``: ten epochs of a million images in batches of 24,
    3e-4 for the transformer and what it reads, all rates but the VAE's halved every 250,000 steps, and a largest entry
    of 0.05. It keeps the state of the best validation loss; ours is the last.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        lr_vae: float = 3e-4  # of the discrete VAE, from the first step on
        lr_decoder: float = 1e-4  # of the transformer and of the embedding of words
        warmup_steps: int = 30_000  # over which the rates of all but the VAE rise
        halving_steps: int | None = None  # in which they halve, from the first step on; none: never
        temperature: float = 1.0  # of the draw of words, at first
        coldest: float = 0.1
        cooling_steps: int = 30_000  # from the one to the other
        hard: bool = False  # the VAE's draw is one-hot, too
        size: int = 64
        optimizer: Literal["sgd", "lars", "adamw"] = "adamw"  # without decay it is Adam
        lr: float = 1e-4
        scaling: Literal["linear", "sqrt", "none"] = "none"
        weight_decay: float = 0.0
        schedule: Literal["cosine", "step", "constant"] = "constant"
        clip: float | None = 1.0
        clip_norm: Literal["l2", "max"] = "max"

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 < self.coldest <= self.temperature:
                raise ValueError(f"the draw cannot cool from {self.temperature} to {self.coldest}")
            if min(self.warmup_steps, self.cooling_steps, 1 if self.halving_steps is None else self.halving_steps) < 1:
                raise ValueError("warmup_steps, cooling_steps and halving_steps are 1 at least")

    arch: ClassVar[str] = "objects:slate"
    data: ClassVar[str] = "worlds:random-objects"
    presets: ClassVar[Mapping[str, Preset]] = {
        "official": Preset("singhgautam/slate train.py", 20, 50),
        "benchmark": Preset(
            "jsikyoon/OCRL configs", 10, 24, {"lr_decoder": 3e-4, "halving_steps": 250_000, "clip": 0.05}
        ),
    }
    small: ClassVar[Mapping[str, Any]] = {"warmup_steps": 1, "cooling_steps": 4}
    small_arch: ClassVar[Mapping[str, Any] | None] = {
        "slots": 2, "size": 16, "words": 8, "width": 8, "blocks": 1, "heads": 2,
    }  # fmt: skip

    @hookimpl
    def views(self) -> tuple[Look, ...]:
        return (Centre(self.options.size, share=1.0),)

    @hookimpl
    def prepared(self, run: Run) -> None:
        size, side, spec = self.options.size, 4 * _net(run).side, run.backbone.spec
        if size != side:
            raise UsageError(
                f"this {spec.arch} has no words for images of {size} pixels",
                cause=f"its positions are those of {side} pixels",
                fix=f"--arch-option size={size}, or --set slate.size={side}",
            )

    @hookimpl
    def optimizer(self, run: Run, modules: nn.Module) -> Optimizer:
        """Three groups: the VAE; the transformer and what it reads; and the rest, the slots."""
        o, net = self.options, _net(run)
        vae = _trained(net.dvae.parameters())
        decoder = _trained(p for part in net.explains() for p in part.parameters())
        apart = {id(p) for p in (*vae, *decoder)}
        slots = [p for p in _trained(modules.parameters()) if id(p) not in apart]
        groups: list[dict[str, Any]] = [
            {"params": slots, "constant": False},
            {"params": decoder, "constant": False, "lr": o.lr_decoder},
            {"params": vae, "constant": True, "lr": o.lr_vae},
        ]
        return build_optimizer(o, run.batch_size, groups)

    @hookimpl(wrapper=True)
    def rate(self, run: Run) -> Generator[None, float, float]:
        o = self.options
        risen = warmup_share(run.step, o.warmup_steps, "ahead")
        halved = 1.0 if o.halving_steps is None else math.pow(0.5, run.step / o.halving_steps)
        return (yield) * risen * halved

    def temperature(self, step: int) -> float:
        """Of the draw of words at a step."""
        o = self.options
        return cosine_schedule(step, o.cooling_steps, o.temperature, floor=o.coldest)

    @hookimpl
    def features(self, run: Run, batch: Batch) -> list[Features]:
        (view,) = batch.views
        noise = Noise(run.rng, len(batch), run.device)
        images = run.backbone.normalise(view.data)
        return [_net(run).explain(images, self.temperature(run.step), self.options.hard, noise)]

    @hookimpl
    def losses(self, features: list[Features]) -> dict[str, Tensor]:
        (explained,) = features
        assert isinstance(explained, Explained)
        return dict(explained.losses)

    @hookimpl
    def measures(self, run: Run, data: Images) -> dict[str, float]:
        """Both errors, FG-ARI where it is known whose pixels are whose; and the picture."""
        net, errors, scores, measured = _net(run), [], [], {}
        looked = look_through(run, data, Centre(self.options.size, share=1.0))
        for index, (pixels, truth) in enumerate(zip(looked, segments(data), strict=True)):
            if index == 0:
                measured["slots_error"] = _pictured(run, pixels[:ROWS])
            images = run.backbone.normalise(pixels)
            for part in images.split(CHUNK):
                errors.append((net.rebuild(net.likeliest(part)) - part).square().mean(dim=(1, 2, 3)))
            if truth is not None:
                masks = torch.cat([net(part).masks for part in images.split(CHUNK)])
                scores.append(foreground_adjusted_rand(truth, owners(masks, truth.shape[1:])))
        measured["reconstruction_error"] = float(torch.cat(errors).mean())
        return measured | ({"attention_fg_ari": float(np.nanmean(np.concatenate(scores)))} if scores else {})


def _net(run: Run) -> SLATE:
    """What is trained. Raises :class:`evalsuite.UsageError` where it is no SLATE."""
    net = run.backbone.net
    if not isinstance(net, SLATE):
        raise UsageError(
            f"slate cannot train {run.backbone.spec.arch}",
            cause="its losses are of the words of a discrete VAE and a transformer that explains them by slots",
            fix="--arch objects:slate or objects:slate-pixels, or leave --arch out",
        )
    return net


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _pictured(run: Run, pixels: Tensor) -> float:
    """Draw ``slate.png`` in the run's folder, and return the mean squared error of images drawn from slots alone."""
    net, images = _net(run), run.backbone.normalise(pixels)
    features = net(images)
    drawn = net.generate(features.tokens)
    columns = {
        "image": pixels, "by its words": net.rebuild(net.likeliest(images)), "by its slots": drawn,
        "attention": painted(features.masks),
    }  # fmt: skip
    columns_sheet(columns, run.out / "slate.png")
    return float((drawn - images).square().mean())
