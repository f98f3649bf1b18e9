"""RotNet: by how many quarter turns was the image rotated?

"Unsupervised Representation Learning by Predicting Image Rotations", Gidaris, Singh, Komodakis, ICLR 2018, arXiv
1803.07728; the facts are those of the official code, ``dataloader.py``, ``architectures`` and ``config``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalsuite import Backbone, BackboneSpec, DataError, Features, hookimpl
from evalsuite.checkpoints import Candidate, State
from pretrain import (
    Augment,
    Batch,
    Centre,
    Images,
    Look,
    Method,
    Preset,
    Run,
    Sample,
    Training,
    View,
    look_at,
    look_through,
)
from pretrain.blocks import full_precision

TURNS = 4


def rotations(pixels: Tensor) -> list[Tensor]:
    """Images (B,C,H,W) turned counter-clockwise by 0, 90, 180 and 270 degrees: exact, for pixels are only permuted."""
    return [torch.rot90(pixels, turns, (2, 3)) for turns in range(TURNS)]


class RotNet(Method):
    """Predicts by how much an image was turned.

    Every image is in the batch four times, the same crop turned by 0, 90, 180 and 270 degrees, and a linear layer on
    the pooled features says which turn it was; the loss is the mean cross-entropy over all four. Turns are exact, for
    interpolation would give them away. A batch of 128 images is 512 for the network.

    Any backbone will do. Those of the paper are ``rotnet:alexnet`` (with batch normalisation; its pooled features are
    the fully connected ones, 4096 wide) and ``rotnet:nin4`` for CIFAR. Their layers are outputs that a classifier can
    be fitted on, ``layer:conv1`` to ``layer:conv5``: middle layers are the best of such a network, so never judge it by
    its last alone. Published checkpoints of both load without a flag.

    On held-out images the log has the share of turns predicted correctly, whenever k-NN is evaluated
    (``--knn-every``).

    Official recipe (code): SGD with Nesterov momentum and weight decay 5e-4; AlexNet on ImageNet 50 epochs at 0.01 for
    192 images, down by ten at 15, 30 and 45; NIN on CIFAR-10 200 epochs at 0.1 for 128 images, down by five at 60, 120
    and 160, on crops of the image padded by 4 pixels. Rotation accuracy 89.18 on ImageNet and 93.65 on CIFAR-10; a
    convolutional classifier on the frozen second block reaches 89.06 on CIFAR-10, non-linear ones on ImageNet 52.9 on
    conv4 and 46.1 on conv5 (what users and authors reported in the repository's issues). ``imagenet-resnet50`` is the
    recipe of open-mmlab/mmselfsup, there 48.12 by a linear classifier.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        pad: int = 0  # pixels of black around an image, of which a crop of ``size`` is taken; 0: crops of any size
        lr: float = 0.01
        scaling: Literal["linear", "sqrt", "none"] = "none"
        nesterov: bool = True
        weight_decay: float = 5e-4
        schedule: Literal["cosine", "step", "constant"] = "step"
        milestones: tuple[float, ...] = (0.3, 0.6, 0.9)

    presets: ClassVar[Mapping[str, Preset]] = {
        "imagenet": Preset("gidariss/FeatureLearningRotNet config", 50, 192),
        "cifar": Preset(
            "gidariss/FeatureLearningRotNet config",
            200,
            128,
            {"size": 32, "pad": 4, "lr": 0.1, "milestones": (0.3, 0.6, 0.8), "factor": 0.2},
        ),
        "imagenet-resnet50": Preset(
            "open-mmlab/mmselfsup config",
            70,
            128,
            {
                "lr": 0.2,
                "nesterov": False,
                "weight_decay": 1e-4,
                "milestones": (3 / 7, 5 / 7),
                "warmup": 5.0,
                "start": 0.1,
            },
        ),
    }

    @hookimpl
    def views(self) -> tuple[Look, ...]:
        o = self.options
        if o.pad:
            return (PaddedCrop(o.size, o.pad),)
        return (Augment(o.size, crop=(0.08, 1.0), jitter=None, gray=0.0),)

    @hookimpl
    def prepared(self, run: Run) -> None:
        self.classifier = nn.Linear(run.dim, TURNS)

    @hookimpl
    def features(self, run: Run, batch: Batch) -> list[Features]:
        """Of the four turns of the one view, all in one forward pass."""
        (view,) = batch.views
        return look_at(run, Batch(tuple(View(turned) for turned in rotations(view.data)), batch.index))

    @hookimpl
    def losses(self, features: list[Features]) -> dict[str, Tensor]:
        return {"rotation": F.cross_entropy(*self.answers(features))}

    def answers(self, features: list[Features]) -> tuple[Tensor, Tensor]:
        """Logits (4B, 4) for the turns, and which turn it was (4B,)."""
        logits = full_precision(torch.cat([self.classifier(f.pooled) for f in features]))
        turn = torch.arange(len(features), device=logits.device)
        return logits, turn.repeat_interleave(len(logits) // len(features))

    @hookimpl
    def measures(self, run: Run, data: Images) -> dict[str, float]:
        """The share of the four turns of every image, seen whole or in its middle, that is predicted correctly."""
        o = self.options
        right = total = 0
        for pixels in look_through(run, data, Centre(o.size, share=1.0 if o.pad else 0.875)):
            features = self.features(run, Batch((View(pixels),), torch.arange(len(pixels))))
            logits, turn = self.answers(features)
            right += int((logits.argmax(1) == turn).sum())
            total += len(turn)
        return {"rotation_accuracy": right / total}


@dataclass(frozen=True)
class PaddedCrop:
    """A crop of ``size`` from anywhere in the image with ``pad`` black pixels around it, and a flip half the time: what
    CIFAR is trained with. Raises :class:`evalsuite.DataError` for an image too small for that."""

    size: int = 32
    pad: int = 4

    def __call__(self, sample: Sample, rng: torch.Generator) -> View:
        pixels = F.pad(sample["image"], [self.pad] * 4)
        height, width = pixels.shape[1:]
        if min(height, width) < self.size:
            raise DataError(
                f"an image of {width - 2 * self.pad} x {height - 2 * self.pad} pixels is too small",
                cause=f"with {self.pad} pixels around it, it must hold a crop of {self.size}",
                fix="--set rotnet.pad=0 resizes crops, or set a smaller rotnet.size",
            )
        u = torch.rand(3, generator=rng, dtype=torch.float64).tolist()
        top, left = int(u[0] * (height - self.size + 1)), int(u[1] * (width - self.size + 1))
        crop = pixels[:, top : top + self.size, left : left + self.size]
        return View(crop.flip(2) if u[2] < 0.5 else crop.contiguous())


# The networks of the paper -----------------------------------------------------------------------------------

CIFAR_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


def build(name: str) -> Backbone:
    """RotNet's ``alexnet`` (``architectures/AlexNet.py``, for 224 pixels) or ``nin4``
    (``architectures/NetworkInNetwork.py`` with four blocks, the third without pooling, for CIFAR).

    Children bear the paper's names: conv1, pool1, ... Weights start as torch's own, for the official code never calls
    its initialisation. ``pooled`` is what the official last layer reads: the average over space of NIN's last block
    (192), AlexNet's fully connected features (4096), for which maps of other sizes are brought to 6 x 6.
    Raises ValueError for another name.
    """
    if name == "nin4":
        spec = BackboneSpec(
            "rotnet:nin4", 192, {2: 96, 4: 192}, frozenset({"pooled", "maps"}), image_size=(32, 32), mean=CIFAR_MEAN,
            std=CIFAR_STD,
        )  # fmt: skip
        return Backbone(NIN(), spec)
    if name == "alexnet":
        strides = {4: 64, 8: 192, 16: 256, 32: 256}
        return Backbone(AlexNet(), BackboneSpec("rotnet:alexnet", 4096, strides, frozenset({"pooled", "maps"})))
    raise ValueError(f"no network {name!r}; there are alexnet and nin4")


def unit(channels: int, out: int, kernel: int, *, stride: int = 1, padding: int, bias: bool) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    convolution = nn.Conv2d(channels, out, kernel, stride, padding, bias=bias)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class NIN(nn.Module):
    """Four blocks of three units each: a convolution of the width of its kernel, and two of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = self.block(3, 192, 160, 96, kernel=5, pool=nn.MaxPool2d(3, 2, 1))
        self.conv2 = self.block(96, 192, 192, 192, kernel=5, pool=nn.AvgPool2d(3, 2, 1))
        self.conv3 = self.block(192, 192, 192, 192, kernel=3)
        self.conv4 = self.block(192, 192, 192, 192, kernel=3)

    @staticmethod
    def block(channels: int, *widths: int, kernel: int, pool: nn.Module | None = None) -> nn.Sequential:
        layers: list[nn.Module] = []
        for index, width in enumerate(widths):
            size = kernel if index == 0 else 1
            layers.append(unit(channels, width, size, padding=size // 2, bias=False))
            channels = width
        return nn.Sequential(*layers, *([pool] if pool is not None else []))

    def forward(self, x: Tensor) -> Features:
        fine = self.conv1(x)
        coarse = self.conv4(self.conv3(self.conv2(fine)))
        return Features(coarse.mean((2, 3)), {2: fine, 4: coarse})


class AlexNet(nn.Module):
    """Five convolutions with batch normalisation and two fully connected layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = unit(3, 64, 11, stride=4, padding=2, bias=True)
        self.pool1 = nn.MaxPool2d(3, 2)
        self.conv2 = unit(64, 192, 5, padding=2, bias=True)
        self.pool2 = nn.MaxPool2d(3, 2)
        self.conv3 = unit(192, 384, 3, padding=1, bias=True)
        self.conv4 = unit(384, 256, 3, padding=1, bias=True)
        self.conv5 = unit(256, 256, 3, padding=1, bias=True)
        self.pool5 = nn.MaxPool2d(3, 2)
        layers = [(nn.Linear(width, 4096, bias=False), nn.BatchNorm1d(4096), nn.ReLU(inplace=True))
                  for width in (256 * 6 * 6, 4096)]  # fmt: skip
        self.fc_block = nn.Sequential(nn.Flatten(), *(layer for triple in layers for layer in triple))

    def forward(self, x: Tensor) -> Features:
        maps = {4: self.conv1(x)}
        maps[8] = self.conv2(self.pool1(maps[4]))
        maps[16] = self.conv5(self.conv4(self.conv3(self.pool2(maps[8]))))
        maps[32] = self.pool5(maps[16])
        square = maps[32] if maps[32].shape[2:] == (6, 6) else F.adaptive_avg_pool2d(maps[32], 6)
        return Features(self.fc_block(square), maps)


# Their published checkpoints ---------------------------------------------------------------------------------

NIN_FIRST = "_feature_blocks.0.Block1_ConvB1.layers.Conv.weight"
ALEXNET_DENSE = "_feature_blocks.8.1.weight"
ALEXNET_NAMES = ("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc_block")


def layout(state: State) -> Iterator[Candidate]:
    """Both networks as the official code names their tensors, ``_feature_blocks.0`` and so on. The last layer, which
    predicts the turn, is no part of the backbone."""
    for arch, anchor, rename in (
        ("rotnet:nin4", NIN_FIRST, nin_name),
        ("rotnet:alexnet", ALEXNET_DENSE, alexnet_name),
    ):
        for key in state.tensors:
            if key == anchor or key.endswith("." + anchor):
                prefix = key.removesuffix(anchor)
                tensors = {k.removeprefix(prefix): v for k, v in state.tensors.items() if k.startswith(prefix)}
                sources = {new: name for name in tensors if (new := rename(name)) is not None}
                yield Candidate({new: tensors[name] for new, name in sources.items()}, arch, {}, prefix, sources)


def nin_name(name: str) -> str | None:
    """``_feature_blocks.1.Block2_ConvB3.layers.Conv.weight`` is ``conv2.2.0.weight``."""
    match = re.fullmatch(r"_feature_blocks\.(\d)\.Block\d_ConvB([123])\.layers\.(Conv|BatchNorm)\.(\w+)", name)
    if match is None:
        return None
    block, position, part, leaf = match.groups()
    return f"conv{int(block) + 1}.{int(position) - 1}.{0 if part == 'Conv' else 1}.{leaf}"


def alexnet_name(name: str) -> str | None:
    """``_feature_blocks.2.0.weight`` is ``conv2.0.weight``."""
    match = re.fullmatch(r"_feature_blocks\.([0-8])\.(\d\.\w+)", name)
    return f"{ALEXNET_NAMES[int(match[1])]}.{match[2]}" if match else None
