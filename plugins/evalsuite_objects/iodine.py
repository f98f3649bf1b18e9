"""IODINE (Greff et al., ICML 2019): slots that are inferred by asking the decoder how it would have them changed.

Arithmetic and sizes are those of jsikyoon/OCRL, ocrs/iodine, at commit 01d0bd56 (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from evalsuite import Backbone, BackboneSpec, Features, UsageError, hookimpl
from evalsuite.metrics.objects import foreground_adjusted_rand, owners
from evalsuite.training import uncast
from evalsuite_objects.discovery import picture, segments
from pretrain import Batch, Centre, Images, Look, Method, Preset, Run, Training, look_through
from pretrain.blocks import Noise, full_precision

__all__ = ["IODINE", "Inferred", "Iodine", "iodine"]

SMALL = 1e-5  # added to what is divided by
TINY = 1e-12  # added to masks before their logarithm
INPUTS = 17  # channels that a refiner sees of each slot: image, colours and their gradient by threes, and eight more

State = tuple[Tensor, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Inferred(Features):
    """The slots of images, and how they came about.

    ``rebuilt`` (B, 3, H, W) is the image that the last slots make, of ``colours`` (B, S, 3, H, W) by ``masks``.
    ``likelihoods`` and ``divergences`` (B, T) are, after each step, the logarithm of the image's likelihood and the
    divergence of the slots' distribution from the standard normal one, in nats an image.
    """

    rebuilt: Tensor
    colours: Tensor
    likelihoods: Tensor
    divergences: Tensor

    def detach(self) -> Inferred:
        """Without gradients."""
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        detached: dict[str, Any] = {name: value.detach() for name, value in every.items() if torch.is_tensor(value)}
        return replace(self, **detached)


@dataclass(frozen=True)
class _Drawn:
    """What slots make of an image: ``part`` and ``whole`` are logarithms of likelihoods, of each slot's colours (B, S,
    3, H, W) and of their mixture (B, 1, 3, H, W)."""

    colours: Tensor
    logits: Tensor
    masks: Tensor
    part: Tensor
    whole: Tensor


class _Convolutions(nn.Module):
    """3x3 convolutions with ELU."""

    def __init__(self, inputs: int, channels: int, count: int, stride: int = 1) -> None:
        super().__init__()
        widths = [inputs] + [channels] * (count - 1)
        self.layers = nn.ModuleList(nn.Conv2d(width, channels, 3, stride, padding=1) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.elu(layer(x))
        return x


def _coordinates(size: int, like: Tensor) -> Tensor:
    """Coordinates of each pixel, to the right and down from -1 to 1, (2, ``size``, ``size``)."""
    line = torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device)
    return torch.stack([line.expand(size, size), line[:, None].expand(size, size)])


class Decoder(nn.Module):
    """Slots (B, S, ``width``), each spread over the whole image and convolved alone, to colours (B, S, 3, H, W) and
    the logits of masks (B, S, 1, H, W)."""

    def __init__(self, width: int, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.mlc = _Convolutions(width + 2, channels, 4)
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        x, size = slots.flatten(0, 1), self.size
        coordinates = _coordinates(size, slots).expand(len(x), -1, -1, -1)
        spread = torch.cat([x[:, :, None, None].expand(-1, -1, size, size), coordinates], dim=1)
        drawn = self.conv(self.mlc(spread)).unflatten(0, slots.shape[:2]).to(slots.dtype)
        colours, logits = drawn.split([3, 1], dim=2)
        return colours, logits


class Refiner(nn.Module):
    """By what a slot sees (B, S, 17, H, W) and where it stands (B, S, 4 ``width``), how to move its mean and the
    logarithm of its standard deviation, (B, S, ``width``) each."""

    def __init__(self, width: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.mlc = _Convolutions(INPUTS, channels, 4, stride=2)
        self.mlp = nn.Linear(channels, hidden)
        self.lstm = nn.LSTMCell(hidden + 4 * width, hidden)
        self.mean_update, self.logsig_update = nn.Linear(hidden, width), nn.Linear(hidden, width)

    def forward(self, seen: Tensor, stand: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        shape = stand.shape[:2]
        x = full_precision(self.mlc(seen.flatten(0, 1))).mean((2, 3))
        x = F.elu(F.elu(self.mlp(x)))  # twice, as in the official code
        with uncast(x.device):  # what steps hand on, and where a slot stands
            state = self.lstm(torch.cat([full_precision(x), stand.flatten(0, 1)], dim=1), state)
        cell = state[1]  # which the official code takes for the hidden state: its layers have learned to read this one
        moves = (update(cell).unflatten(0, shape).to(stand.dtype) for update in (self.mean_update, self.logsig_update))
        return (*moves, state)


def _evened(x: Tensor) -> Tensor:
    """Vectors (B, S, D) or maps (B, S, C, H, W) of each slot to mean zero and deviation one. That of vectors is the
    sample's, that of maps the population's, as in the official code."""
    axes = tuple(range(2, x.ndim))
    mean = x.mean(axes, keepdim=True)
    deviation = x.std(2, keepdim=True) if x.ndim == 3 else (x - mean).square().mean(axes, keepdim=True).sqrt()
    return (x - mean) / (deviation + SMALL)


class Iodine(nn.Module):
    """Images (B, 3, ``size``, ``size``) in [0, 1] to slots.

    Every step draws the slots from their distributions, draws the image from the slots, and refines the distributions
    by the gradient of the evidence lower bound, no gradient of which is taken again. Likelihoods are normal with the
    deviation ``sigma`` about each slot's colours, mixed by the masks; divergences weigh ``beta``. In evaluation mode
    the draws are of fixed noise, the same for every image: the official code draws there too, and the same image would
    have other features each time; without any noise all slots would begin alike and stay so.

    The gradients that inference needs are its own: it may be called without any (``torch.no_grad``,
    ``torch.inference_mode``), and then keeps none.
    """

    noise: Tensor

    def __init__(
        self, slots: int = 6, width: int = 64, iterations: int = 5, channels: int = 64, hidden: int = 256,
        sigma: float = 0.35, beta: float = 1.0, size: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.slots, self.iterations, self.sigma, self.beta = slots, iterations, sigma, beta
        self.refine, self.decoder = Refiner(width, channels, hidden), Decoder(width, channels, size)
        self.slot_mean_init, self.slot_logsig_init = (nn.Parameter(torch.zeros(1, 1, width)) for _ in range(2))
        fixed = torch.randn(1, iterations, slots, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", fixed, persistent=False)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Inferred:
        """``noise`` (B, iterations, slots, width), normal numbers, is what slots are drawn by; without it they are
        drawn as said above."""
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (images, *self.parameters()))
        with torch.inference_mode(False), torch.enable_grad():
            if noise is None:
                noise = self.noise.expand(len(images), -1, -1, -1)
                noise = torch.randn_like(noise, memory_format=torch.contiguous_format) if self.training else noise
            if images.is_inference():
                images, noise = images.clone(), noise.clone()
            inferred = self._infer(images, noise.to(images.dtype), learns)
        return inferred if learns else inferred.detach()

    def _infer(self, images: Tensor, noise: Tensor, learns: bool) -> Inferred:
        means, logs = (
            start.expand(len(images), self.slots, -1).to(images.dtype)
            for start in (self.slot_mean_init, self.slot_logsig_init)
        )
        state: State = None
        likelihoods, divergences = [], []
        for step in range(self.iterations):
            means, logs = (x if learns and x.requires_grad else x.detach().requires_grad_() for x in (means, logs))
            slots = means + logs.exp() * noise[:, step]
            drawn = self.draw(slots, images)
            likelihoods.append(drawn.whole.flatten(1).sum(1))
            divergences.append((0.5 * (means.square() + (2 * logs).exp() - 1) - logs).flatten(1).sum(1))
            if step + 1 < self.iterations:
                bound = (likelihoods[-1] - self.beta * divergences[-1]).sum()
                wanted = torch.autograd.grad(bound, [means, logs, drawn.colours, drawn.masks], retain_graph=learns)
                seen, stand = self._seen(images, drawn, *wanted[2:]), self._stand(means, logs, *wanted[:2])
                if not learns:
                    seen, stand = seen.detach(), stand.detach()
                    state = state and (state[0].detach(), state[1].detach())
                moved, widened, state = self.refine(seen, stand, state)
                means, logs = means + moved, logs + widened
        return Inferred(
            pooled=slots.mean(dim=1), tokens=slots, masks=drawn.masks.squeeze(2),
            rebuilt=(drawn.masks * drawn.colours).sum(dim=1), colours=drawn.colours,
            likelihoods=torch.stack(likelihoods, dim=1), divergences=torch.stack(divergences, dim=1),
        )  # fmt: skip

    def draw(self, slots: Tensor, images: Tensor) -> _Drawn:
        """What slots (B, S, width) make of images, and how likely these are then."""
        colours, logits = self.decoder(slots)
        masks = logits.softmax(dim=1)
        part = -0.5 * ((images[:, None] - colours) / self.sigma).square() - math.log(
            self.sigma * math.sqrt(2 * math.pi)
        )
        whole = torch.logsumexp((masks + TINY).log() + part, dim=1, keepdim=True)
        return _Drawn(colours, logits, masks, part, whole)

    def _seen(self, images: Tensor, drawn: _Drawn, to_colours: Tensor, to_masks: Tensor) -> Tensor:
        """What a slot sees: the image, its own part of it, and what would make that likelier."""
        masks, part = drawn.masks, drawn.part.sum(dim=2, keepdim=True)
        weighed = masks * part.exp()
        without = (weighed.sum(dim=1, keepdim=True) - weighed) / (1 - masks + SMALL)
        likelihood = drawn.whole.sum(dim=2, keepdim=True).exp()
        shape = (-1, self.slots, -1, -1, -1)
        return torch.cat([
            images[:, None].expand(shape), drawn.colours, masks, drawn.logits, part.log_softmax(dim=1),
            _evened(to_colours), _evened(to_masks), _evened(likelihood).detach().expand(shape),
            _evened(without).detach(), _coordinates(images.shape[-1], images).expand(*masks.shape[:2], -1, -1, -1),
        ], dim=2)  # fmt: skip

    @staticmethod
    def _stand(means: Tensor, logs: Tensor, to_means: Tensor, to_logs: Tensor) -> Tensor:
        """Where a slot stands, and where it is drawn to."""
        return torch.cat([means, logs, _evened(to_means), _evened(to_logs)], dim=2)


Few = Annotated[int, Field(ge=1, le=256)]


def iodine(
    slots: Few = 6, width: int = 64, iterations: Few = 5, channels: int = 64, hidden: int = 256,
    sigma: Annotated[float, Field(gt=0, le=100)] = 0.35, beta: float = 1.0,
    size: Annotated[int, Field(ge=8, le=1024)] = 64,
) -> Backbone:  # fmt: skip
    """``objects:iodine``: tokens are slots, drawn as in the last step; masks are whose each pixel is; the mean of the
    slots is the pooled vector."""
    options = {
        "slots": slots, "width": width, "iterations": iterations, "channels": channels, "hidden": hidden,
        "sigma": sigma, "beta": beta, "size": size,
    }  # fmt: skip
    spec = BackboneSpec(
        arch="objects:iodine", dim=width, strides={}, gives=frozenset({"pooled", "tokens", "masks"}), options=options,
        image_size=(size, size), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    return Backbone(Iodine(slots, width, iterations, channels, hidden, sigma, beta, size), spec)


class IODINE(Method):
    """Infers slots step by step (Greff et al., "Multi-Object Representation Learning with Iterative Variational
    Inference", ICML 2019, arXiv 1903.00450), as Yoon et al. (ICML 2023, arXiv 2302.04419) train it.

    The loss is the negative evidence lower bound after each of T steps, the i-th weighed by i / T, summed over an image
    and averaged over images; the log has its two parts. It trains ``objects:iodine`` alone, whose options say how many
    slots and steps there are, and how likelihood and divergence weigh.

    On held-out images (``--knn-every``) the log has the squared error of what the last slots draw, summed over an
    image, their divergence, and, on worlds that know whose pixel is whose, ``fg_ari``, the adjusted Rand index of the
    pixels of objects by the masks. ``objects.png`` beside the log shows a few images.

    Recipe (code): Adam at 3e-4, gradients clipped to a length of 5, batches of 24, 10 epochs of a million images of
    random objects, 6 slots of 64 and 5 steps. What departs from the paper is the code's: a decoder of four
    convolutions of 64 channels, each channel of a pixel its own mixture, and a distribution that is read off the LSTM's
    cell.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        size: int = 64
        optimizer: Literal["sgd", "lars", "adamw"] = "adamw"
        lr: float = 3e-4
        scaling: Literal["linear", "sqrt", "none"] = "none"
        weight_decay: float = 0.0
        schedule: Literal["cosine", "step", "constant"] = "constant"
        clip: float | None = 5.0

    presets: ClassVar[Mapping[str, Preset]] = {"objects": Preset("jsikyoon/OCRL configs", 10, 24)}
    arch: ClassVar[str] = "objects:iodine"
    data: ClassVar[str] = "worlds:random-objects"
    small: ClassVar[Mapping[str, Any]] = {"size": 16}
    small_arch: ClassVar[Mapping[str, Any]] = {
        "slots": 2, "width": 4, "iterations": 3, "channels": 8, "hidden": 8, "size": 16
    }  # fmt: skip

    @hookimpl
    def views(self) -> tuple[Look, ...]:
        return (Centre(self.options.size, share=1.0),)

    @hookimpl
    def prepared(self, run: Run) -> None:
        spec, size = run.backbone.spec, self.options.size
        if not isinstance(run.backbone.net, Iodine) or spec.image_size != (size, size):
            raise UsageError(
                f"iodine cannot train {spec.arch} on images of {size} pixels",
                cause="it learns to infer by a decoder and a refiner, which objects:iodine has for one size of images",
                fix=f"--arch objects:iodine --arch-option size={size}",
            )

    @hookimpl
    def features(self, run: Run, batch: Batch) -> list[Features]:
        """Slots by noise that does not depend on how many processes share the batch."""
        (view,) = batch.views
        net: Iodine = run.backbone.net  # type: ignore[assignment]  # prepared has seen to that
        noise = Noise(run.rng, len(batch), run.device).normal(net.noise.expand(len(batch), -1, -1, -1))
        return [net(run.backbone.normalise(view.data), noise)]

    @hookimpl
    def losses(self, run: Run, features: list[Inferred]) -> dict[str, Tensor]:
        (inferred,) = features
        beta: float = run.backbone.net.beta  # type: ignore[assignment]
        steps = inferred.likelihoods.shape[1]
        weights = torch.arange(1, steps + 1, device=run.device) / steps
        return {
            "likelihood": -(weights * inferred.likelihoods).sum(dim=1).mean(),
            "divergence": beta * (weights * inferred.divergences).sum(dim=1).mean(),
        }

    @hookimpl
    def measures(self, run: Run, data: Images) -> dict[str, float]:
        """The squared error summed over an image and the last divergence, averaged over images; FG-ARI of the masks
        where it is known whose pixels are whose; and the picture."""
        error = divergence = 0.0
        scores: list[npt.NDArray[np.float64]] = []
        looked = look_through(run, data, Centre(self.options.size, share=1.0))
        for index, (images, truth) in enumerate(zip(looked, segments(data), strict=True)):
            parts = [run.backbone(some) for some in images.split(32)]  # each is drawn as often as there are slots
            rebuilt, masks = torch.cat([p.rebuilt for p in parts]), torch.cat([p.masks for p in parts])
            error += float((images - rebuilt).square().sum())
            divergence += float(sum(p.divergences[:, -1].sum() for p in parts))
            if truth is not None:
                scores.append(foreground_adjusted_rand(truth, owners(masks, truth.shape[1:])))
            if index == 0:
                picture(run, images, {"reconstruction": rebuilt}, {"masks": masks})
        measured = {"fg_ari": float(np.nanmean(np.concatenate(scores)))} if scores else {}
        return {"reconstruction_error": error / len(data), "divergence": divergence / len(data), **measured}
