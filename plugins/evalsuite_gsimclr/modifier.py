"""G-SimCLR: batches with one image of each pseudo-class, so that negatives seldom share a meaning.

"G-SimCLR: Self-Supervised Contrastive Learning with Guided Projection via Pseudo Labelling", Chakraborty,
Gosthipaty, Paul, ICDM workshop on deep learning for knowledge transfer 2020, arXiv 2009.12007; the facts
are those of the official notebooks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from evalsuite import DataError, UsageError, hookimpl
from evalsuite.resize import resize
from evalsuite.seeding import manual_seed
from evalsuite.training import mix_seed
from pretrain import Images, Modifier, Run, blocks


class GSimCLR(Modifier):
    """Guides which images share a batch; the method itself is untouched.

    A denoising autoencoder is trained on the images, its pooled codes are clustered by k-means into as many
    pseudo-classes as a batch has images, and batches take one image of each: images are ranked within their
    class, and the first batch is everybody ranked first. Classes are not of one size, so once the small
    ones are used up a batch holds several images of the large ones; with ``strict`` small classes are gone
    through again instead, every batch has one image of each class, and an epoch no longer shows every image
    once.

    Ranks, the order of classes within a rank and the order of batches are drawn afresh each epoch.
    ``reshuffle=false`` gives the published order: ranks by index, classes by number, the same every epoch,
    so that the images at its end are never seen where the batch does not divide the set. The sort is stable
    (pandas' default there was not).

    The autoencoder is the notebooks' for CIFAR; theirs for 224 pixels is ``side=224
    channels=64,128,256,512,1024 kernel=5 lr=0.0001 patience=5``. Clustering is done once a run; resuming
    reads it from the run's folder. All images are held in memory at ``side`` x ``side`` pixels meanwhile.
    Early stopping watches a tenth of the images that is held out, where the notebooks watch the test set.

    Two habits of the notebooks are the views', not the batches', and are not imitated: they draw one
    augmentation for a whole batch, and their greyscale on CIFAR does nothing (``jitter`` without grey comes
    near it). Published on CIFAR-10 after 15 epochs, linear on the 256 units before the last projection:
    39.40 SimCLR, 41.01 G-SimCLR; to be read as a difference.
    """

    @dataclass(frozen=True)
    class Options:
        clusters: int = 0  # pseudo-classes; 0: as many as a batch has images
        strict: bool = False
        reshuffle: bool = True
        side: int = 32  # of the images as the autoencoder sees them, in pixels
        channels: tuple[int, ...] = (32, 64, 128)  # of the encoder's layers, each of which halves the side
        kernel: int = 3
        noise: float = 0.01  # standard deviation of what is added to pixels in [0,1]
        lr: float = 0.001
        batch: int = 64
        epochs: int = 100  # at most
        patience: int = 2  # epochs without a better held-out error before it stops

        def __post_init__(self) -> None:
            if not self.channels or self.side % 2 ** len(self.channels):
                raise ValueError(f"side {self.side} cannot be halved {len(self.channels)} times")

    options: Options
    small: ClassVar[Mapping[str, Any]] = {"epochs": 2, "channels": (8, 8, 8)}
    labels: Tensor

    @hookimpl
    def prepared(self, run: Run, data: Images) -> None:
        clusters = self.options.clusters or run.batch_size
        if clusters > len(data):
            raise UsageError(
                f"gsimclr cannot make {clusters} pseudo-classes of {len(data)} images",
                cause="there is one for each image of a batch",
                fix="use a smaller batch, more images or --set gsimclr.clusters=N",
            )
        choices = {k: v for k, v in asdict(self.options).items() if k not in ("strict", "reshuffle")}
        key = json.dumps({"gsimclr": 1, **choices, "clusters": clusters}, sort_keys=True)
        cached = run.cached(key, lambda: {"labels": self.clustered(data, clusters, run.seed, run.device)})
        self.register_buffer("labels", cached["labels"])

    def clustered(self, data: Images, clusters: int, seed: int, device: torch.device) -> Tensor:
        """The pseudo-class of every image (N,)."""
        images = shrunk(data, self.options.side)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            manual_seed(seed)
            model = denoiser(images, self.options, seed, device)
        codes = torch.cat([model.codes(chunk.to(device)).cpu() for chunk in images.split(512)])
        return blocks.kmeans(codes, clusters, seed=seed)[0]

    @hookimpl
    def batches(self, run: Run, epoch: int) -> Iterator[Tensor]:
        rng = None
        if self.options.reshuffle:
            rng = torch.Generator().manual_seed(mix_seed(run.seed, epoch, 1))
        return guided(self.labels.cpu(), run.batch_size, rng, strict=self.options.strict)


# Which images go together -----------------------------------------------------------------------------------


def guided(labels: Tensor, size: int, rng: torch.Generator | None = None, *, strict: bool = False) -> Iterator[Tensor]:
    """Batches (size,) of rows, of as many different ``labels`` (N,) as the classes allow. The rest is
    dropped.

    Without ``rng`` the order is the published one. ``strict`` puts no class into a batch twice; the rows of
    a class that is used up come again.
    """
    if strict:
        yield from _dealt(labels, size, rng)
        return
    order = ranked(labels, rng)
    batches = order[: len(order) // size * size].view(-1, size)
    yield from batches if rng is None else batches[torch.randperm(len(batches), generator=rng)]


def ranked(labels: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Rows (N,) sorted by their rank within their class, then by class: everybody's first, then the seconds.

    Rows of a class are ranked by their number. With ``rng`` ranks are drawn instead, and the classes come
    in another order at each rank.
    """
    rows, sizes = _by_class(labels, rng)
    rank = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes)[labels[rows]]
    if rng is not None:
        shuffled = torch.randperm(len(rows), generator=rng)
        rows, rank = rows[shuffled], rank[shuffled]
    return rows[rank.argsort(stable=True)]


def _by_class(labels: Tensor, rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Rows class by class, in drawn order within each where there is ``rng``; and the sizes of the
    classes.
    """
    rows = torch.arange(len(labels)) if rng is None else torch.randperm(len(labels), generator=rng)
    return rows[labels[rows].argsort(stable=True)], labels.bincount()


def _dealt(labels: Tensor, size: int, rng: torch.Generator | None) -> Iterator[Tensor]:
    """Rounds of one row of each class that has any, cut into batches, until N rows are dealt.

    What of a round does not fill a batch is left out of it; a class goes on where it was left.
    """
    rows, sizes = _by_class(labels, rng)
    classes, first = sizes.nonzero()[:, 0], sizes.cumsum(0) - sizes
    used = len(classes) // size * size  # a batch lies within one round
    if used == 0:
        raise UsageError(
            f"gsimclr cannot fill a batch of {size} from {len(classes)} pseudo-classes",
            cause="strict batches hold one image of each",
            fix=f"--set gsimclr.clusters={size} or more, or --set gsimclr.strict=false",
        )
    left, taken = len(labels) // size, torch.zeros_like(classes)
    for turn in range(left):
        if rng is None:
            order = torch.arange(len(classes)).roll(-turn * used)  # whom one round leaves out, the next begins with
        else:
            order = torch.randperm(len(classes), generator=rng)
        chosen = order[:used]
        dealt = rows[first[classes[chosen]] + taken[chosen] % sizes[classes[chosen]]]
        taken[chosen] += 1
        yield from dealt.view(-1, size)[:left]
        left -= used // size
        if left <= 0:
            return


# The autoencoder --------------------------------------------------------------------------------------------


def shrunk(data: Images, side: int) -> Tensor:
    """All images of a data set as (N, 3, side, side) uint8.

    One that does not decode is grey here: training counts it and passes it over, or refuses it.
    """
    images = torch.full((len(data), 3, side, side), 128, dtype=torch.uint8)

    def read(row: int) -> None:
        with suppress(DataError):
            images[row] = resize(data[row]["image"], side, side)

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoding and resizing leave the interpreter's lock
        for _ in threads.map(read, range(len(data))):
            pass
    return images


class Autoencoder(nn.Module):
    """Convolution, normalisation, ReLU and pooling for each of ``channels``, and the way back, to pixels in
    [0,1].
    """

    def __init__(self, channels: tuple[int, ...], kernel: int) -> None:
        super().__init__()
        widths, pad = (3, *channels), kernel // 2
        down: list[nn.Module] = []
        for before, after in zip(widths[:-1], channels, strict=True):
            down += [nn.Conv2d(before, after, kernel, padding=pad), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        up: list[nn.Module] = []
        for before, after in zip(channels[::-1], (*channels[-2::-1], channels[0]), strict=True):
            up += [nn.Conv2d(before, after, kernel, padding=pad), nn.BatchNorm2d(after), nn.ReLU()]
            up += [nn.Upsample(scale_factor=2)]
        self.encoder = nn.Sequential(*down)
        self.decoder = nn.Sequential(*up, nn.Conv2d(channels[0], 3, kernel, padding=pad), nn.Sigmoid())

    def forward(self, pixels: Tensor) -> Tensor:
        restored: Tensor = self.decoder(self.encoder(pixels))
        return restored

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Embeddings (B, C) of images (B, 3, H, W) uint8: the encoder's maps, averaged over space."""
        maps: Tensor = self.eval().encoder(images / 255)
        return maps.mean((2, 3))


def denoiser(images: Tensor, options: GSimCLR.Options, seed: int, device: torch.device) -> Autoencoder:
    """An autoencoder trained to restore images (N, 3, H, W) uint8 from noisy ones, as long as that gets
    better.
    """
    model = Autoencoder(options.channels, options.kernel).to(device)
    optimizer = torch.optim.Adam(model.parameters(), options.lr)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, used = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    rng = torch.Generator().manual_seed(seed)
    whole = len(used) > options.batch  # a last batch of one image has no batch statistics
    loader = DataLoader(TensorDataset(used), options.batch, shuffle=True, generator=rng, drop_last=whole)
    best, waited = float("inf"), 0
    for _ in range(options.epochs):
        model.train()
        for (rows,) in loader:
            clean = images[rows].to(device) / 255
            error = F.mse_loss(model(clean + options.noise * torch.randn_like(clean)), clean)
            optimizer.zero_grad(set_to_none=True)
            error.backward()
            optimizer.step()
        loss = restoration_error(model, images[held_out], device)
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited > options.patience:
            break
    return model


@torch.no_grad()
def restoration_error(model: Autoencoder, images: Tensor, device: torch.device) -> float:
    """Mean squared error over pixels, images being clean."""
    model.eval()
    total = 0.0
    for chunk in images.split(512):
        clean = chunk.to(device) / 255
        total += F.mse_loss(model(clean), clean, reduction="sum").item()
    return total / images.numel()
