"""timm's architectures: feature maps and tokens read off the unmodified module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, Literal, TypedDict, Unpack, get_args

import timm
import torch
import torch.nn.functional as F
from pydantic import Field
from timm.models import is_model_in_modules
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.errors import BackboneError
from evalsuite.options import Blocks, Share, Side, Width, Word

__all__ = ["build"]

# these families are built for one image size unless told otherwise; neither option changes a parameter
TOKENS = ["vision_transformer", "deit", "eva", "vision_transformer_hybrid"]
WINDOWS = ["swin_transformer", "swin_transformer_v2"]


Positions = Literal["timm", "bicubic", "dino"]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Sides = Side | tuple[Side, Side] | None
Size = Annotated[int, Field(ge=1, le=256)]  # of a patch, a window, a kernel
Sizes = Size | tuple[Size, ...] | None
Widths = Width | tuple[Width, ...] | None
Depths = Blocks | tuple[Blocks, ...]
Ratio = Annotated[float, Field(gt=0, le=64)]
Ratios = Ratio | tuple[Ratio, ...] | None
Start = Annotated[float, Field(ge=0, le=100)] | None  # of a layer's scale


class Options(TypedDict, total=False):
    """Options of timm's architectures that change what a network is or how it is trained, and fetch nothing.

    timm has more, of single families; those are for users to say, and a file may not.
    """

    img_size: Sides
    patch_size: Sizes
    window_size: Sizes
    window_ratio: Sizes
    pretrained_window_sizes: Annotated[int, Field(ge=0, le=256)] | tuple[Annotated[int, Field(ge=0, le=256)], ...]
    kernel_size: Size
    kernel_sizes: Sizes
    embed_dim: Widths
    embed_dims: Widths
    dims: Widths
    channels: Widths
    num_features: Width
    head_hidden_size: Width | None
    depth: Depths
    depths: Depths
    layers: Depths
    num_heads: Widths
    num_kv_heads: Widths
    head_dim: Width | None
    attn_pool_num_heads: Width | None
    mlp_ratio: Ratios
    mlp_ratios: Ratios
    attn_pool_mlp_ratio: Ratio | None
    expand_ratio: Ratio
    cardinality: Width
    base_width: Width
    stem_width: Width
    stem_size: Width
    stem_type: Word
    replace_stem_pool: bool
    block_reduce_first: Annotated[int, Field(ge=1, le=8)]
    down_kernel_size: Size
    avg_down: bool
    output_stride: Literal[8, 16, 32]
    qkv_bias: bool
    qkv_fused: bool
    qk_norm: bool
    swiglu_mlp: bool
    swiglu_align_to: Annotated[int, Field(ge=0, le=1024)]
    scale_mlp: bool
    class_token: bool
    no_embed_class: bool
    reg_tokens: Annotated[int, Field(ge=0, le=256)]
    num_reg_tokens: Annotated[int, Field(ge=0, le=256)]
    pos_embed: Word
    use_abs_pos_emb: bool
    use_rel_pos_bias: bool
    use_shared_rel_pos_bias: bool
    use_rot_pos_emb: bool
    rope_temperature: Annotated[float, Field(gt=0, le=1e9)]
    pre_norm: bool
    fc_norm: bool | None
    use_fc_norm: bool | None
    final_norm: bool
    head_norm_first: bool
    init_values: Start
    ls_init_value: Start
    layer_scale_init_value: Start
    use_grn: bool
    conv_mlp: bool
    conv_bias: bool
    global_pool: Word
    act_layer: Word | None
    norm_layer: Word | None
    aa_layer: Word | None
    always_partition: bool
    strict_img_size: bool
    dynamic_img_size: bool
    dynamic_img_pad: bool
    drop_rate: Share
    pos_drop_rate: Share
    patch_drop_rate: Share
    proj_drop_rate: Share
    attn_drop_rate: Share
    drop_path_rate: Share
    drop_block_rate: Share
    zero_init_last: bool
    fix_init: bool
    weight_init: Word


def build(
    name: str,
    *,
    pretrained: bool = False,
    norm_eps: Epsilon | Mapping[Annotated[str, Field(pattern=r"^[\w.]{0,80}$")], Epsilon] | None = None,
    positions: Positions = "timm",
    **options: Unpack[Options],
) -> Backbone:
    """The timm model ``name`` without its classifier; ``options`` go to ``timm.create_model``.

    ``pretrained`` fetches timm's weights (from its cache, else the network). ``norm_eps`` is the epsilon of every layer
    normalisation, or of those whose names begin so, where a network was trained with another than timm's.
    ``positions`` says how a vision transformer's table of them is brought to images of another size than it was learnt
    on: ``timm`` by bicubic interpolation with antialiasing, as DINOv2 with registers has it too; ``bicubic`` without
    (facebookresearch/mae, transformers); ``dino`` without and by a factor a tenth of a patch too large, as
    facebookresearch/dino, bytedance/ibot and dinov2 without registers do against rounding.

    Raises ValueError for a name timm does not know, a model without feature maps, and ``positions`` that are unknown
    or of a model without a table of them.
    """
    _refuse_unknown(name)
    given: dict[str, Any] = dict(options)
    net: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **_any_size(name) | given)
    if not hasattr(net, "forward_intermediates"):
        raise ValueError(f"timm's {name} gives no feature maps (no forward_intermediates)")
    if norm_eps is not None:
        _set_eps(net, norm_eps if isinstance(norm_eps, Mapping) else {"": norm_eps})
        given["norm_eps"] = norm_eps
    if positions != "timm":
        _set_positions(net, name, positions)
        given["positions"] = positions
    tokens = (
        hasattr(net, "patch_embed") and hasattr(net, "num_prefix_tokens") and not is_model_in_modules(name, WINDOWS)
    )
    config = net.pretrained_cfg
    spec = BackboneSpec(
        arch=f"timm:{name}",
        options=given,
        image_size=_size(net, config),
        mean=tuple(config.get("mean", BackboneSpec.mean)),
        std=tuple(config.get("std", BackboneSpec.std)),
        dim=int(getattr(net, "head_hidden_size", None) or net.num_features),
        strides={level["reduction"]: level["num_chs"] for level in net.feature_info},
        gives=frozenset({"pooled", "maps"} | ({"tokens"} if tokens else set())),
    )
    look = _look_tokens if tokens else _look_maps
    if isinstance(net, ResNet):
        return Backbone(net, spec, look, _split, partial(_dilated, name, given))
    return Backbone(net, spec, look)


def _set_eps(net: nn.Module, by_name: Mapping[str, float]) -> None:
    for name, module in net.named_modules():
        for start, eps in by_name.items():
            if isinstance(module, nn.LayerNorm) and name.startswith(start):
                module.eps = eps


def _set_positions(net: Any, name: str, positions: Positions) -> None:
    if positions not in get_args(Positions):
        raise ValueError(f"positions are {' or '.join(get_args(Positions))}, not {positions!r}")
    if type(net) is not VisionTransformer or net.pos_embed is None:
        raise ValueError(f"timm's {name} has no table of positions, which could be {positions!r}")
    vars(net)["_pos_embed"] = partial(_with_positions, net, positions)


def _refuse_unknown(name: str) -> None:
    """Raise ValueError, with the nearest names, where timm has no such model or no weights by that tag."""
    base, _, tag = name.partition(".")
    if not timm.is_model(name):
        near = get_close_matches(base, timm.list_models(), n=3)
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{_meant(near)}")
    try:
        timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
        near = [f"{base}.{known}" for known in get_close_matches(tag, tags, n=3) or tags[:3]]
        raise ValueError(f"timm {timm.__version__} has no weights {tag!r} of {base}{_meant(near)}") from error


def _meant(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _dilated(name: str, options: dict[str, Any], output_stride: int) -> Backbone:
    return build(name, **{**options, "output_stride": output_stride})


def _any_size(name: str) -> dict[str, Any]:
    base = name.split(".")[0]
    if is_model_in_modules(base, TOKENS):
        return {"dynamic_img_size": True, "dynamic_img_pad": True}
    return {"strict_img_size": False} if is_model_in_modules(base, WINDOWS) else {}


def _size(net: nn.Module, config: Any) -> tuple[int, int]:
    built = getattr(getattr(net, "patch_embed", None), "img_size", None)
    if built is not None:
        return int(built[0]), int(built[1])
    _, height, width = config.get("input_size", (3, 224, 224))
    return int(height), int(width)


def _look_maps(net: Any, x: Tensor) -> Features:
    final, levels = net.forward_intermediates(x)
    # several levels may share a stride; feature_info runs from fine to coarse, so the last of a stride stays
    maps = {info["reduction"]: level for info, level in zip(net.feature_info, levels, strict=True)}
    return Features(net.forward_head(final, pre_logits=True), maps)


def _look_tokens(net: Any, x: Tensor) -> Features:
    built, given = net.patch_embed.img_size, tuple(x.shape[-2:])
    if net.patch_embed.strict_img_size and built is not None and given != tuple(built):
        raise BackboneError(
            f"{type(net).__name__} takes images of {built[0]}x{built[1]} pixels alone, not of {given[0]}x{given[1]}",
            cause="its positions are tied to that size, and timm does not resize them",
            fix="a task or protocol at that size, or another backbone",
        )
    every = net.forward_features(x)
    tokens = every[:, net.num_prefix_tokens :]
    height, width = net.patch_embed.dynamic_feat_size(x.shape[-2:])
    stride = net.feature_info[-1]["reduction"]
    grid = tokens.transpose(1, 2).unflatten(2, (height, width))
    return Features(net.forward_head(every, pre_logits=True), {stride: grid}, tokens)


def _with_positions(net: Any, positions: Positions, x: Tensor) -> Tensor:
    """Patches (B, H, W, C) as the sequence that the blocks take; in the place of timm's ``_pos_embed``."""
    extra = 0 if net.no_embed_class else net.num_prefix_tokens
    table = torch.cat([net.pos_embed[:, :extra], _resampled(net, positions, x.shape[1:3], extra)], dim=1)
    prefix = [token.expand(len(x), -1, -1) for token in (net.cls_token, net.reg_token) if token is not None]
    patches = x.flatten(1, 2)
    if net.no_embed_class:
        return net.pos_drop(torch.cat([*prefix, patches + table], dim=1))  # type: ignore[no-any-return]
    return net.pos_drop(torch.cat([*prefix, patches], dim=1) + table)  # type: ignore[no-any-return]


def _resampled(net: Any, positions: Positions, grid: tuple[int, ...], extra: int) -> Tensor:
    learnt, table = net.patch_embed.grid_size, net.pos_embed[:, extra:]
    if tuple(grid) == tuple(learnt):
        return table  # type: ignore[no-any-return]
    square = table.float().transpose(1, 2).unflatten(2, learnt)
    if positions == "dino":
        factors = [(cells + 0.1) / before for cells, before in zip(grid, learnt, strict=True)]
        square = F.interpolate(square, scale_factor=factors, mode="bicubic")
    else:
        square = F.interpolate(square, size=tuple(grid), mode="bicubic")
    return square.flatten(2).transpose(1, 2).to(table.dtype)


def _split(net: Any) -> tuple[nn.Module, nn.Module]:
    trunk = nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool, net.layer1, net.layer2, net.layer3)
    return trunk, net.layer4
