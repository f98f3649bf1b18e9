"""Slot Attention learns what objects are: by putting an image together again from slots, each drawn alone.

"Object-Centric Learning with Slot Attention", Locatello et al., NeurIPS 2020, arXiv 2006.15055; recipe and arithmetic
of google-research/slot_attention at 0c1bbe5f.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from evalsuite import Features, UsageError, hookimpl
from evalsuite.metrics.objects import foreground_adjusted_rand, owners
from evalsuite.pictures import columns_sheet, painted
from evalsuite_objects.slots import BroadcastDecoder, Discovery
from pretrain import Batch, Centre, Images, Look, Method, Preset, Run, Training, look_through
from pretrain.blocks import Noise

__all__ = ["SlotDiscovery", "SlotMethod", "segments"]

ROWS = 6  # images of the picture


class SlotMethod(Method):
    """What methods on the slots of :class:`evalsuite_objects.slots.Discovery` share.

    Images are seen whole. Slots begin at noise that an image is given whatever number of processes shares the batch.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        half_life: float | None = None  # epochs in which the learning rate halves, from the first step on; none: never
        size: int = 64
        optimizer: Literal["sgd", "lars", "adamw"] = "adamw"  # without decay it is Adam
        lr: float = 4e-4
        scaling: Literal["linear", "sqrt", "none"] = "none"
        weight_decay: float = 0.0
        schedule: Literal["cosine", "step", "constant"] = "constant"

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.half_life is not None and self.half_life <= 0:
                raise ValueError(f"a rate cannot halve in {self.half_life} epochs")

    data: ClassVar[str] = "worlds:random-objects"
    small_arch: ClassVar[Mapping[str, Any] | None] = {"slots": 3, "width": 8, "hidden": 8, "channels": 4}

    @hookimpl
    def views(self, run: Run) -> tuple[Look, ...]:
        return (Centre(run.training.size, share=1.0),)

    @hookimpl(wrapper=True)
    def rate(self, run: Run) -> Generator[None, float, float]:
        half, rate = self.options.half_life, (yield)
        return rate if half is None else rate * 0.5 ** (run.step / run.epoch_steps / half)

    @hookimpl
    def features(self, run: Run, batch: Batch) -> list[Features]:
        (view,) = batch.views
        net = discovery(run, type(self).arch)
        fixed = net.slots.noise.expand(len(batch), -1, -1)
        noise = Noise(run.rng, len(batch), run.device).normal(fixed) if net.training else fixed
        return [net.attend(run.backbone.normalise(view.data), noise)]


def discovery(run: Run, arch: str) -> Discovery:
    """The encoder that is trained. Raises :class:`evalsuite.UsageError` where it is another architecture."""
    net = run.backbone.net
    if not isinstance(net, Discovery):
        raise UsageError(
            f"slots cannot be learned in {run.backbone.spec.arch}",
            cause="slot attention is a part of the encoder, and this one has none",
            fix=f"--arch {arch}, or leave --arch out",
        )
    return net


def segments(data: Images, size: int = 256) -> Iterator[npt.NDArray[np.int64] | None]:
    """Which object is seen at each pixel (B, H, W), -1 the ground, in the batches of :func:`pretrain.look_through`;
    None for each where the data do not tell."""
    told = "segments" in data[0]
    for start in range(0, len(data), size):
        rows = range(start, min(start + size, len(data)))
        yield np.stack([np.asarray(data[row]["segments"]) for row in rows]) if told else None


class SlotDiscovery(SlotMethod):
    """Rebuilds the image from its slots.

    Every slot is drawn alone by a spatial broadcast decoder, as colours and a mask; masks are normalised over slots,
    and the picture mixed of the slots' colours by their masks is held against the image: the mean squared error over
    pixels and channels, in [-1, 1]. Nothing says what an object is; slots compete for pixels.

    On held-out images (``--knn-every``) the log has ``reconstruction_error``, and on worlds that know whose pixel is
    whose ``fg_ari``, the adjusted Rand index of the pixels of objects by the decoder's masks, and
    ``attention_fg_ari``, that by the encoder's own attention, which is all a task can see. ``objects.png`` beside the
    log shows a few images and their masks.

    Official recipe (code): Adam at 4e-4, warmed up over 10,000 steps and halved every 100,000 from the first step on,
    batches of 64, 500,000 steps; seven slots, three iterations, on CLEVR with up to six objects, cropped to 128 pixels
    (``--set slot-attention.size=128``). ``official`` says that as epochs of a million images, on 64 pixels. What
    departs here: layer norms have torch's epsilon of 1e-5 instead of Keras's 1e-3, the GRU torch's two biases; hidden
    layers of MLPs begin by Kaiming's rule, as in singhgautam/slate, instead of Glorot's.

    ``benchmark`` is that of the RL benchmark (jsikyoon/OCRL at 01d0bd56): ten epochs of a million images in batches of
    24 at 1e-4, warmed up over 30,000 steps, halved every 250,000, gradients clipped at 0.05 by their largest entry. Its
    encoders have seven iterations and a last convolution without ReLU (``--arch-option iterations=7 --arch-option
    rectified=false``), the large one also slots of 192 numbers (``width=192``, ``hidden=192``). What departs from
    there: its loss is the sum over an image of pixels in [0, 1], which scales gradients, so that its clipping bites at
    other times; its decoder spreads slots over all 64 x 64 places at once and has no strides.

    ``quick`` is ours: a quarter of an hour of one processor core, on frames of 32 pixels, with a small encoder
    (``--data worlds:random-objects:16384 --arch-option channels=32 --arch-option width=32 --arch-option hidden=64
    --arch-option strides=[1,2]``). Its attention then has an FG-ARI of 0.77 in ``object-discovery`` (seed 0), where
    untrained ones have 0.00 to 0.21 (eight seeds), and k-means on colours 0.58. Sprites are flat: connected
    components of one colour have 0.91 without an encoder.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(SlotMethod.Options):
        channels: int = 64  # of the decoder's convolutions
        warmup: float = 0.64
        half_life: float | None = 6.4

    arch: ClassVar[str] = "objects:slot-attention"
    presets: ClassVar[Mapping[str, Preset]] = {
        "official": Preset("google-research/slot_attention object_discovery/train.py", 32, 64),
        "benchmark": Preset(
            "jsikyoon/OCRL configs",
            10,
            24,
            {"lr": 1e-4, "warmup": 0.72, "rise": "ahead", "half_life": 6.0, "clip": 0.05, "clip_norm": "max"},
        ),
        "quick": Preset(
            "ours, for fifteen minutes of one processor core",
            5,
            16,
            {
                "size": 32,
                "channels": 16,
                "lr": 1e-3,
                "warmup": 0.25,
                "half_life": None,
                "schedule": "cosine",
                "clip": 1.0,
            },
        ),
    }
    small: ClassVar[Mapping[str, Any]] = {"channels": 4}

    @hookimpl
    def prepared(self, run: Run) -> None:
        discovery(run, self.arch)
        try:
            self.decoder = BroadcastDecoder(run.dim, self.options.size, self.options.channels)
        except ValueError as error:
            raise UsageError(
                f"the decoder cannot draw images of {self.options.size} pixels",
                cause=f"{error}",
                fix="--set slot-attention.size=64, or 8, 16, 32, 128",
            ) from error

    @hookimpl
    def losses(self, batch: Batch, features: list[Features]) -> dict[str, Tensor]:
        rebuilt, _, _ = self.decoder(features[0].tokens)
        return {"reconstruction": F.mse_loss(rebuilt, 2 * batch.views[0].data - 1)}

    @hookimpl
    def measures(self, run: Run, data: Images) -> dict[str, float]:
        """Reconstruction error, and FG-ARI where it is known whose pixels are whose; and the picture."""
        errors: list[Tensor] = []
        scores: dict[str, list[npt.NDArray[np.float64]]] = {"fg_ari": [], "attention_fg_ari": []}
        looked = look_through(run, data, Centre(self.options.size, share=1.0))
        for place, (pixels, truth) in enumerate(zip(looked, segments(data), strict=True)):
            found = run.backbone(pixels)
            rebuilt, _, masks = self.decoder(found.tokens)
            errors.append((rebuilt - (2 * pixels - 1)).square().mean(dim=(1, 2, 3)))
            if truth is not None:
                for name, parts in (("fg_ari", masks), ("attention_fg_ari", found.masks)):
                    scores[name].append(foreground_adjusted_rand(truth, owners(parts, truth.shape[1:])))
            if place == 0:
                picture(run, pixels, {"reconstruction": (rebuilt + 1) / 2}, {"masks": masks, "attention": found.masks})
        told = {name: float(np.nanmean(np.concatenate(found))) for name, found in scores.items() if found}
        return {"reconstruction_error": float(torch.cat(errors).mean()), **told}


def picture(run: Run, pixels: Tensor, drawn: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """``objects.png`` in the run's folder: a few images, what is drawn of them, and masks, a colour a slot."""
    columns = {"image": pixels, **drawn, **{title: painted(found[:ROWS]) for title, found in masks.items()}}
    columns_sheet({title: shown[:ROWS] for title, shown in columns.items()}, run.out / "objects.png")
