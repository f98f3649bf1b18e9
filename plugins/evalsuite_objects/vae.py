"""A variational autoencoder (Kingma and Welling, ICLR 2014): an encoder, and the method that teaches it.

Arithmetic and sizes are those of Yoon et al. (ICML 2023), jsikyoon/OCRL, ocrs/vaes and ocrs/common/models.py, at commit
01d0bd56 (MIT).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from evalsuite import Backbone, BackboneSpec, Features, UsageError, hookimpl
from pretrain import Batch, Centre, Images, Look, Method, Preset, Run, Training, look_through
from pretrain.blocks import Noise

__all__ = ["VAE", "Encoder", "divergence", "vae"]

CHANNELS, CELLS = 64, 4  # of the map that everything is made of


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> Iterator[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding)
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    yield from (layer, nn.ReLU())


def _last(outputs: int) -> nn.Conv2d:
    layer = nn.Conv2d(CHANNELS, outputs, 1)
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _stages(size: int) -> int:
    """How often an image is halved until it has 4 x 4 cells. Raises ValueError where no number of times will do."""
    stages = (size // CELLS).bit_length() - 1
    if size != CELLS << max(stages, 0):
        raise ValueError(f"images of {size} pixels a side are no 4 doubled some times")
    return stages


class Encoder(nn.Module):
    """Images (B, 3, ``size``, ``size``) to a map (B, 64, 4, 4), and that to the mean (B, ``latent``) of what is behind
    it. A stage halves the image and then applies three 1x1 convolutions."""

    def __init__(self, size: int = 64, latent: int = 256) -> None:
        super().__init__()
        self.stride = size // CELLS
        layers: list[nn.Module] = []
        for stage in range(_stages(size)):
            layers += _conv(CHANNELS if stage else 3, CHANNELS, 2, 2)
            for _ in range(3):
                layers += _conv(CHANNELS, CHANNELS, 1)
        self.cnn = nn.Sequential(*layers, _last(CHANNELS))
        self.mean = nn.Linear(CHANNELS * CELLS**2, latent)

    def forward(self, x: Tensor) -> Features:
        maps = self.cnn(x)
        return Features(self.mean(maps.flatten(1)), {self.stride: maps}, maps.flatten(2).transpose(1, 2))


class Decoder(nn.Sequential):
    """What is behind an image (B, ``latent``) to the image (B, 3, ``size``, ``size``)."""

    def __init__(self, size: int, latent: int) -> None:
        layers = [nn.Linear(latent, CHANNELS * CELLS**2), nn.Unflatten(1, (CHANNELS, CELLS, CELLS))]
        layers += _conv(CHANNELS, CHANNELS, 1)
        for _ in range(_stages(size)):
            layers += _conv(CHANNELS, CHANNELS, 3, 1, 1)
            layers += _conv(CHANNELS, CHANNELS, 1)
            layers += _conv(CHANNELS, CHANNELS, 1)
            layers += _conv(CHANNELS, 4 * CHANNELS, 1)
            layers.append(nn.PixelShuffle(2))
        super().__init__(*layers, _last(3))


def vae(size: Annotated[int, Field(ge=8, le=1024)] = 64, latent: int = 256) -> Backbone:
    """``objects:vae``: the mean of the latent as the pooled vector, and the map of 4 x 4 cells as sixteen tokens."""
    stride = size // CELLS
    spec = BackboneSpec(
        arch="objects:vae", dim=latent, strides={stride: CHANNELS}, gives=frozenset({"pooled", "maps", "tokens"}),
        options={"size": size, "latent": latent}, image_size=(size, size), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    return Backbone(Encoder(size, latent), spec)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback and Leibler's, of normal distributions (B, D) from the standard one, in nats an image (B,)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)


class VAE(Method):
    """Rebuilds images from a noisy vector (Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, arXiv
    1312.6114), as Yoon et al. (ICML 2023, arXiv 2302.04419) train the encoder that they compare with slots.

    The loss is the squared error summed over an image, plus ``beta`` times the divergence of the latent's distribution
    from the standard normal one, each averaged over images. It trains ``objects:vae`` alone. Agents read its tokens;
    ``--set reads=pooled`` gives them the vector.

    With ``--knn-every`` the log has both of held-out images, the error being that of the mean.

    Recipe (code): Adam at 1e-4, batches of 24, 10 epochs of a million images of random objects. ``beta`` is 5 as the
    README trains it; the configuration file says 1e-4.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        beta: float = 5.0
        size: int = 64
        optimizer: Literal["sgd", "lars", "adamw"] = "adamw"
        lr: float = 1e-4
        scaling: Literal["linear", "sqrt", "none"] = "none"
        weight_decay: float = 0.0
        schedule: Literal["cosine", "step", "constant"] = "constant"

    presets: ClassVar[Mapping[str, Preset]] = {"objects": Preset("jsikyoon/OCRL README and configs", 10, 24)}
    arch: ClassVar[str] = "objects:vae"
    data: ClassVar[str] = "worlds:random-objects"
    small: ClassVar[Mapping[str, Any]] = {"size": 16}
    small_arch: ClassVar[Mapping[str, Any]] = {"size": 16, "latent": 8}

    @hookimpl
    def views(self) -> tuple[Look, ...]:
        return (Centre(self.options.size, share=1.0),)

    @hookimpl
    def prepared(self, run: Run) -> None:
        net, spec, size = run.backbone.net, run.backbone.spec, self.options.size
        if not isinstance(net, Encoder) or spec.image_size != (size, size):
            raise UsageError(
                f"vae cannot train {spec.arch} on images of {size} pixels",
                cause="it has a decoder for the map of 4 x 4 cells of objects:vae, made for one size of images",
                fix=f"--arch objects:vae --arch-option size={size}",
            )
        self.log_variance = nn.Linear(CHANNELS * CELLS**2, spec.dim)
        self.decoder = Decoder(size, spec.dim)

    @hookimpl
    def losses(self, run: Run, batch: Batch, features: list[Features]) -> dict[str, Tensor]:
        (images,) = (view.data for view in batch.views)
        mean, log_variance = self.posterior(features[0], images.dtype)
        noise = Noise(run.rng, len(batch), run.device).normal(mean)
        rebuilt = self.decoder(mean + (0.5 * log_variance).exp() * noise)
        return {
            "reconstruction": (images - rebuilt).square().sum() / len(images),
            "divergence": self.options.beta * divergence(mean, log_variance).mean(),
        }

    def posterior(self, features: Features, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The mean and the logarithm of the variance of the latent, (B, ``latent``) each."""
        (maps,) = features.maps.values()
        assert features.pooled is not None
        return features.pooled.to(dtype), self.log_variance(maps.flatten(1)).to(dtype)

    @hookimpl
    def measures(self, run: Run, data: Images) -> dict[str, float]:
        """The squared error summed over an image whose mean is decoded, and the divergence, averaged over images."""
        error = kl = 0.0
        for images in look_through(run, data, Centre(self.options.size, share=1.0)):
            mean, log_variance = self.posterior(run.backbone(images), images.dtype)
            error += float((images - self.decoder(mean)).square().sum())
            kl += float(divergence(mean, log_variance).sum())
        return {"reconstruction_error": error / len(data), "divergence": kl / len(data)}
