"""Networks for small images: torchvision's ResNets with a 3x3 stem, and the ResNets of 6n+2 layers made for CIFAR."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal, TypedDict, Unpack

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.options import Blocks, Side, Width

__all__ = ["build"]

SMALL: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
NAMES = (*SMALL, "resnet20 to resnet110 and beyond (6n+2 layers)", "preresnetN", "wrn28_10 (depth, widening)",
         "resnet and preresnet with layers=[...]")  # fmt: skip


class Options(TypedDict, total=False):
    """Options of small networks: those of torchvision's with a 3x3 stem, and the fields of :class:`Design`."""

    width: Width
    stem_padding: Annotated[int, Field(ge=0, le=8)]
    layers: Annotated[tuple[Blocks, ...], Field(max_length=16)]
    widen: Annotated[int, Field(ge=1, le=64)]
    bottleneck: bool
    shortcut: Literal["A", "B"]
    zeros: Literal["both", "end"]
    preactivated: bool
    shortcut_from: Literal["input", "activated"]
    final_norm: bool
    stride_in: Literal[1, 2, 3] | None
    bias: bool


def build(name: str, *, image_size: Side = 32, **options: Unpack[Options]) -> Backbone:
    """A network for small images by name.

    ``resnet10`` to ``resnet152`` of four stages are torchvision's with a 3x3 stem of stride 1 and no pooling after it
    (SimCLR, appendix B.9), under torchvision's names. ``width`` is the number of channels of the first stage (64 in
    the paper); ``stem_padding=2`` is what solo-learn and with it AdaInf use. Maps come at strides 1, 2, 4 and 8.

    ``resnet20``, 32, 44, 56, 110 and any other of 6n+2 layers are those of He et al. (CVPR 2016, section 4.2): three
    stages of 16, 32 and 64 channels, maps at strides 1, 2 and 4. ``preresnetN`` are their pre-activated form (He et
    al., ECCV 2016), ``wrnD_W`` wide ones (Zagoruyko and Komodakis, BMVC 2016). Their options are the fields of
    :class:`Design`; ``resnet`` and ``preresnet`` take their ``layers`` from there.

    Raises ValueError for an unknown name, TypeError for an unknown option.
    """
    given: dict[str, Any] = dict(options)
    if name in SMALL:
        return _of_torchvision(name, image_size, **given)
    design = _design(name, given)
    net = CifarResNet(design)
    said = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(design).items() if k in given}
    spec = BackboneSpec(
        arch=f"small:{name}",
        options={**said, "shortcut": design.shortcut, "image_size": image_size},
        image_size=(image_size, image_size),
        dim=net.channels[-1],
        strides={2**stage: c for stage, c in enumerate(net.channels)},
        gives=frozenset({"pooled", "maps"}),
    )
    return Backbone(net, spec, partial(_look, stages=_cifar_stages), partial(_split, stages=_cifar_stages))


# ------------------------------------------------------------------------------------- torchvision's with a 3x3 stem


def _of_torchvision(name: str, image_size: int, width: int = 64, stem_padding: int = 1) -> Backbone:
    net = _SmallResNet(*SMALL[name], width=width, stem_padding=stem_padding)
    channels = [width * 2**stage * net.expansion for stage in range(4)]
    spec = BackboneSpec(
        arch=f"small:{name}",
        options={"width": width, "stem_padding": stem_padding, "image_size": image_size},
        image_size=(image_size, image_size),
        dim=channels[-1],
        strides={2**stage: c for stage, c in enumerate(channels)},
        gives=frozenset({"pooled", "maps"}),
    )
    return Backbone(net, spec, partial(_look, stages=_stages), partial(_split, stages=_stages))


class _SmallResNet(ResNet):  # type: ignore[misc]  # torchvision is not typed
    def __init__(self, block: type[BasicBlock | Bottleneck], layers: list[int], width: int, stem_padding: int) -> None:
        super().__init__(block, layers, num_classes=1)
        self.expansion, self.inplanes = block.expansion, width
        self.conv1 = nn.Conv2d(3, width, 3, padding=stem_padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._make_layer(block, width, layers[0])
        for stage in (1, 2, 3):
            setattr(self, f"layer{stage + 1}", self._make_layer(block, width * 2**stage, layers[stage], stride=2))
        self.maxpool = nn.Identity()
        self.fc = nn.Identity()
        _draw(self)


def _draw(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _stages(net: Any) -> list[nn.Module]:
    stem = nn.Sequential(net.conv1, net.bn1, net.relu)
    return [nn.Sequential(stem, net.layer1), net.layer2, net.layer3, net.layer4]


def _look(net: Any, x: Tensor, stages: Any) -> Features:
    maps = {}
    for stage, module in enumerate(stages(net)):
        x = maps[2**stage] = module(x)
    return Features(x.mean((2, 3)), maps)


def _split(net: nn.Module, stages: Any) -> tuple[nn.Module, nn.Module]:
    *trunk, tail = stages(net)
    return nn.Sequential(*trunk), tail


# ------------------------------------------------------------------------------------------------ made for CIFAR


@dataclass(frozen=True)
class Design:
    """What tells the ResNets of 6n+2 layers apart.

    ``layers`` are blocks by stage, ``width`` the channels of the stem and, ``widen`` times as many, of the first stage;
    each further stage has twice as many at half the resolution. Blocks are two 3x3 convolutions, or with
    ``bottleneck`` 1x1, 3x3 and 1x1 to four times as many channels. ``shortcut`` is He et al.'s option where the number
    of channels changes: "A" takes every second pixel and adds channels of zeros, "B" is a 1x1 convolution; ``zeros``
    come on "both" sides of the channels (akamaster/pytorch_resnet_cifar10) or at the "end" (fb.resnet.torch).

    ``preactivated`` blocks have norm and ReLU before each convolution. Code in use then differs in whether a
    shortcut's convolution sees the block's "input" or what its first norm and ReLU make of it (``shortcut_from``
    "activated"), in whether a norm and ReLU follow the last block (``final_norm``), in the number of the convolution
    that has the stride (``stride_in``; None: the first 3x3 one) and in whether convolutions have a ``bias``.
    """

    layers: tuple[int, ...]
    width: int = 16
    widen: int = 1
    bottleneck: bool = False
    shortcut: Literal["A", "B"] = "A"
    zeros: Literal["both", "end"] = "both"
    preactivated: bool = False
    shortcut_from: Literal["input", "activated"] = "activated"
    final_norm: bool = True
    stride_in: int | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        choices = {"shortcut": ("A", "B"), "zeros": ("both", "end"), "shortcut_from": ("input", "activated")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {' or '.join(known)}, not {getattr(self, name)!r}")
        if not self.layers or min(self.layers) < 1:
            raise ValueError(f"layers are the blocks of each stage, for example [3, 3, 3], not {list(self.layers)}")


def _design(name: str, options: dict[str, Any]) -> Design:
    """The design that a name stands for, with ``options`` in place of its own."""
    plain = re.fullmatch(r"(pre)?resnet(\d*)", name)
    wide = re.fullmatch(r"wrn(\d+)_(\d+)", name)
    unknown = options.keys() - {f.name for f in fields(Design)}
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(sorted(unknown))}")
    given = options | ({"layers": tuple(options["layers"])} if "layers" in options else {})
    if wide and int(wide[1]) % 6 == 4 and int(wide[1]) > 4:
        design = Design((int(wide[1]) // 6,) * 3, widen=int(wide[2]), shortcut="B", preactivated=True)
    elif plain and plain[1] and f"resnet{plain[2]}" in SMALL:
        block, layers = SMALL[f"resnet{plain[2]}"]
        design = Design(tuple(layers), 64, bottleneck=block is Bottleneck, shortcut="B", preactivated=True)
    elif plain and plain[2] and int(plain[2]) % 6 == 2 and int(plain[2]) > 2:
        design = Design((int(plain[2]) // 6,) * 3, shortcut="B" if plain[1] else "A", preactivated=bool(plain[1]))
    elif plain and not plain[2] and "layers" in given:
        design = Design(given["layers"], shortcut="B" if plain[1] else "A", preactivated=bool(plain[1]))
    else:
        raise ValueError(f"no small network {name!r}; there are {', '.join(NAMES)}")
    return replace(design, **given)


class CifarResNet(nn.Module):
    """He et al.'s ResNets for CIFAR, under torchvision's names: ``conv1``, ``bn1``, ``layer1`` and further, and of
    pre-activated ones ``norm`` at the end in place of ``bn1``."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        out = 4 if design.bottleneck else 1
        inner = [design.width * design.widen * 2**stage for stage in range(len(design.layers))]
        self.channels = [out * c for c in inner]
        self.conv1 = nn.Conv2d(3, design.width, 3, padding=1, bias=design.bias)
        if not design.preactivated:
            self.bn1 = nn.BatchNorm2d(design.width)
        before = [design.width, *self.channels]
        for stage, blocks in enumerate(design.layers):
            first = _Block(before[stage], inner[stage], 2 if stage else 1, design)
            rest = [_Block(self.channels[stage], inner[stage], 1, design) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, *rest))
        if design.preactivated and design.final_norm:
            self.norm = nn.BatchNorm2d(self.channels[-1])
        _draw(self)


class _Block(nn.Module):
    """Convolutions ``conv1``, ``conv2`` (, ``conv3``) with norms ``bn1`` and so on, beside a shortcut."""

    def __init__(self, inside: int, inner: int, stride: int, design: Design) -> None:
        super().__init__()
        self.design, self.stride = design, stride
        channels = [inside, inner, inner, 4 * inner] if design.bottleneck else [inside, inner, inner]
        kernels = (1, 3, 1) if design.bottleneck else (3, 3)
        strided = design.stride_in or 1 + kernels.index(3)
        for i, (one, other) in enumerate(pairwise(channels), 1):
            step, kernel = stride if i == strided else 1, kernels[i - 1]
            setattr(self, f"conv{i}", nn.Conv2d(one, other, kernel, step, kernel // 2, bias=design.bias))
            setattr(self, f"bn{i}", nn.BatchNorm2d(one if design.preactivated else other))
        self.more = channels[-1] - inside
        if design.shortcut == "B" and (stride > 1 or self.more):
            norm = () if design.preactivated else (nn.BatchNorm2d(channels[-1]),)
            self.downsample = nn.Sequential(nn.Conv2d(inside, channels[-1], 1, stride, bias=design.bias), *norm)

    def forward(self, x: Tensor) -> Any:
        pairs = list(zip(self._all("conv"), self._all("bn"), strict=True))
        if not self.design.preactivated:
            y = x
            for conv, norm in pairs[:-1]:
                y = norm(conv(y)).relu()
            conv, norm = pairs[-1]
            return (norm(conv(y)) + self._shortcut(x)).relu()
        y = activated = pairs[0][1](x).relu()
        for i, (conv, norm) in enumerate(pairs):
            y = conv(norm(y).relu() if i else y)
        projected = hasattr(self, "downsample") and self.design.shortcut_from == "activated"
        return y + self._shortcut(activated if projected else x)

    def _all(self, kind: str) -> list[Any]:
        return [getattr(self, f"{kind}{i}") for i in range(1, 4 if self.design.bottleneck else 3)]

    def _shortcut(self, x: Tensor) -> Any:
        if hasattr(self, "downsample"):
            return self.downsample(x)
        x = x[..., :: self.stride, :: self.stride]
        before = self.more // 2 if self.design.zeros == "both" else 0
        return F.pad(x, (0, 0, 0, 0, before, self.more - before)) if self.more else x


def _cifar_stages(net: CifarResNet) -> list[nn.Module]:
    stages: list[nn.Module] = [getattr(net, f"layer{i + 1}") for i in range(len(net.channels))]
    stem = [net.conv1] if not hasattr(net, "bn1") else [net.conv1, net.bn1, nn.ReLU()]
    stages[0] = nn.Sequential(*stem, stages[0])
    if hasattr(net, "norm"):
        stages[-1] = nn.Sequential(stages[-1], net.norm, nn.ReLU())
    return stages
