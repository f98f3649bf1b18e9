"""torchvision's classifiers: feature maps at every stride, without touching their modules."""

from __future__ import annotations

import copy
import math
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
import torchvision
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.options import Share, Side, Width

__all__ = ["build"]


class Options(TypedDict, total=False):
    """Options of torchvision's classifiers that change what a network is or how it is trained, and fetch nothing."""

    image_size: Side
    num_classes: Width
    groups: Width
    width_per_group: Width
    zero_init_residual: bool
    init_weights: bool
    width_mult: Annotated[float, Field(gt=0, le=64)]
    alpha: Annotated[float, Field(gt=0, le=64)]
    mlp_ratio: Annotated[float, Field(gt=0, le=64)]
    layer_scale: Annotated[float, Field(ge=0, le=100)]
    growth_rate: Width
    num_init_features: Width
    bn_size: Annotated[int, Field(ge=1, le=64)]
    memory_efficient: bool
    drop_rate: Share
    dropout: Share
    attention_dropout: Share
    stochastic_depth_prob: Share


def build(
    name: str, *, pretrained: bool = False, output_stride: int | None = None, **options: Unpack[Options]
) -> Backbone:
    """The torchvision classifier ``name``; ``options`` go to its constructor.

    ``output_stride`` 8 or 16 dilates a ResNet of bottleneck blocks (torchvision's others cannot be).

    ``pretrained`` fetches torchvision's default weights. ``pooled`` is the average of the coarsest map (for
    AlexNet and VGG too, whose published features are a fully connected layer of the classifier), normalised first
    where the network ends in a norm (ConvNeXt, Swin); of a ViT it is the class token. Raises ValueError for an
    unknown name or an architecture without stages.
    """
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        near = get_close_matches(name, known, n=3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"torchvision {torchvision.__version__} has no classifier {name!r}{meant}")
    weights = "DEFAULT" if pretrained else None
    dilation = {} if output_stride is None else _dilation(output_stride)
    given: dict[str, Any] = dict(options)
    net = torchvision.models.get_model(name, weights=weights, **given, **dilation)
    if isinstance(net, torchvision.models.VisionTransformer):
        return Backbone(net, _spec_vit(name, net, given), _look_vit)
    if not isinstance(net, ResNet) and not isinstance(getattr(net, "features", None), nn.Sequential):
        raise ValueError(f"torchvision's {name} has no sequence of stages to read maps from")
    shadow = copy.deepcopy(net).eval().to("meta")
    if isinstance(net, ResNet):
        look = partial(_look_stages, strides=tuple(min(s, output_stride or 32) for s in (2, 4, 8, 16, 32)))
    else:
        look = partial(_look_features, strides=_strides(shadow))
    with torch.no_grad():
        shapes = look(shadow, torch.empty(1, 3, 256, 256, device="meta"))
    assert shapes.pooled is not None
    spec = BackboneSpec(
        arch=f"torchvision:{name}",
        options=given if output_stride is None else {**given, "output_stride": output_stride},
        dim=shapes.pooled.shape[1],
        strides={stride: level.shape[1] for stride, level in shapes.maps.items()},
        gives=frozenset({"pooled", "maps"}),
    )
    if not isinstance(net, ResNet):
        return Backbone(net, spec, look)
    dilates = isinstance(net.layer1[0], Bottleneck)  # torchvision refuses to dilate its other block
    return Backbone(net, spec, look, _resnet_split, partial(_dilated, name, given) if dilates else None)


def _dilated(name: str, options: dict[str, Any], output_stride: int) -> Backbone:
    return build(name, **{**options, "output_stride": output_stride})


def _dilation(output_stride: int) -> dict[str, Any]:
    if output_stride not in (8, 16, 32):
        raise ValueError(f"an output stride is 8, 16 or 32, not {output_stride}")
    return {"replace_stride_with_dilation": [False, output_stride <= 8, output_stride <= 16]}


def _resnet_stages(net: Any) -> list[nn.Module]:
    stem = nn.Sequential(net.conv1, net.bn1, net.relu)
    return [stem, nn.Sequential(net.maxpool, net.layer1), net.layer2, net.layer3, net.layer4]


def _resnet_split(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    *trunk, tail = _resnet_stages(net)
    return nn.Sequential(*trunk), tail


def _look_stages(net: nn.Module, x: Tensor, strides: tuple[int, ...]) -> Features:
    maps: dict[int, Tensor] = {}
    for stride, module in zip(strides, _resnet_stages(net), strict=True):
        x = maps[stride] = module(x)
    return Features(x.mean((2, 3)), maps)


def _channels_last(net: nn.Module) -> bool:
    return isinstance(net, torchvision.models.swin_transformer.SwinTransformer)


def _strides(net: Any) -> tuple[int, ...]:
    """The stride after each child of ``net.features``, for a network on the meta device.

    Read off a large image, where what unpadded convolutions lose at the edges does not count: on a small one
    AlexNet's last map is a single pixel, which says nothing of its stride.
    """
    size = 1024
    x = torch.empty(1, 3, size, size, device="meta")
    strides = []
    with torch.no_grad():
        for module in net.features:
            x = module(x)
            strides.append(2 ** round(math.log2(size / x.shape[2])))
    return tuple(strides)


def _look_features(net: Any, x: Tensor, strides: tuple[int, ...]) -> Features:
    """Run ``net.features`` child by child and keep the last map of each stride."""
    maps: dict[int, Tensor] = {}
    for stride, module in zip(strides, net.features, strict=True):
        x = module(x)
        maps[stride] = x.permute(0, 3, 1, 2) if _channels_last(net) else x
    maps.pop(1, None)
    if _channels_last(net):
        return Features(net.norm(x).mean((1, 2)), maps)
    if isinstance(net, torchvision.models.DenseNet):
        x = F.relu(x)
    pooled = F.adaptive_avg_pool2d(x, 1)
    if isinstance(net, torchvision.models.ConvNeXt):
        pooled = net.classifier[0](pooled)
    return Features(pooled.flatten(1), maps)


def _spec_vit(name: str, net: Any, options: dict[str, Any]) -> BackboneSpec:
    return BackboneSpec(
        arch=f"torchvision:{name}",
        options=options,
        image_size=(net.image_size, net.image_size),
        dim=net.hidden_dim,
        strides={net.patch_size: net.hidden_dim},
        gives=frozenset({"pooled", "maps", "tokens"}),
    )


def _look_vit(net: Any, x: Tensor) -> Features:
    """torchvision's ViT at any size: its position grid is resized bicubically, as timm does."""
    grid = net.conv_proj(x)  # a last strip narrower than a patch is not seen
    height, width = grid.shape[-2:]
    tokens = grid.flatten(2).transpose(1, 2)
    position = net.encoder.pos_embedding
    side = round(math.sqrt(position.shape[1] - 1))
    if (height, width) != (side, side):
        square = position[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        resized = F.interpolate(square, (height, width), mode="bicubic", antialias=True)
        position = torch.cat([position[:, :1], resized.flatten(2).transpose(1, 2)], 1)
    tokens = torch.cat([net.class_token.expand(len(x), -1, -1), tokens], 1) + position
    encoded = net.encoder.ln(net.encoder.layers(net.encoder.dropout(tokens)))
    patches = encoded[:, 1:]
    return Features(encoded[:, 0], {net.patch_size: patches.transpose(1, 2).unflatten(2, (height, width))}, patches)
