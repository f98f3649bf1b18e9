"""How families of architectures name their tensors, and what the shapes say of the architecture.

A layout is a function from one dict of tensors to candidates: the tensors under the names of an architecture of
ours, and that architecture. It never sees training frameworks: it looks for the names of its family behind any
prefix, so that ``module.encoder_q.layer1.0.conv1.weight`` and ``backbone.layer1.0.conv1.weight`` are the same to it.
Which of several candidates is the backbone to judge is decided in :mod:`evalsuite.checkpoints.origins`.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torchvision
from torch import Tensor

from evalsuite.backbone import shapes_only
from evalsuite.checkpoints import vits
from evalsuite.checkpoints.cifar import small_resnet
from evalsuite.checkpoints.reading import State

__all__ = [
    "Candidate",
    "Layout",
    "Sources",
    "as_beit",
    "as_convnext",
    "as_resnet",
    "as_swin",
    "as_vit",
    "behind",
    "cifar100",
    "convnext",
    "count",
    "detectron2",
    "indexed",
    "obow",
    "renamed",
    "resnet",
    "staged",
    "swin",
    "torchvision_features",
    "torchvision_vit",
    "vit",
    "wide_resnet",
]

Tensors = Mapping[str, Tensor]
Sources = dict[str, str | tuple[str, ...]]  # the name in the file of each tensor; several where it is made of several


@dataclass(frozen=True)
class Candidate:
    """One reading of a dict of tensors: ``tensors`` under the names of architecture ``arch`` built with ``options``.

    ``prefix`` is what preceded the names in the file. ``sources`` gives for each name the name in the file where they
    differ by more than the prefix. ``arch`` is None where the tensors are of the family but no architecture of ours
    has their shapes; ``note`` then says why. ``mean``, ``std`` and ``image_size`` are for a layout that knows them.
    ``guesses`` are options that no shape shows and nobody's word gives: the value taken, and why this one.
    """

    tensors: Tensors
    arch: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    sources: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    note: str = ""
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    image_size: tuple[int, int] | None = None
    guesses: Mapping[str, tuple[Any, str]] = field(default_factory=dict)


class Layout(Protocol):
    """What a third party puts on the ``checkpoint`` shelf: a function, yielding nothing for what is not its own."""

    def __call__(self, state: State) -> Iterable[Candidate]: ...


def behind(tensors: Tensors, anchor: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every prefix before the name ``anchor``, with the tensors that carry it, under their names without it."""
    for key in tensors:
        if key == anchor or key.endswith("." + anchor):
            prefix = key[: len(key) - len(anchor)]
            yield prefix, {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def renamed(tensors: Tensors, rename: Callable[[str], str | None]) -> tuple[dict[str, Tensor], Sources]:
    """``tensors`` under new names (None drops one), and for each new name the old one."""
    names = {k: new for k in tensors if (new := rename(k)) is not None}
    return {new: tensors[k] for k, new in names.items()}, {new: k for k, new in names.items()}


def count(names: Iterable[str], pattern: str) -> int:
    """How many indices 0, 1, 2, ... the one group of ``pattern`` takes among ``names``, without a gap."""
    seen = {int(m[1]) for k in names if (m := re.match(pattern, k))}
    return next(i for i in range(len(seen) + 1) if i not in seen)


# --------------------------------------------------------------------------------------------------------- ResNets

BASIC: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}
BOTTLENECK: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "50", (3, 4, 23, 3): "101", (3, 8, 36, 3): "152"}
# (blocks by stage, whether they are bottlenecks) -> timm's name; each with "d" behind is there too
REGISTERED: dict[tuple[tuple[int, ...], bool], str] = {
              ((2, 2, 2, 2), False): "resnet18", ((3, 4, 6, 3), False): "resnet34", ((2, 2, 2, 2), True): "resnet26",
              ((3, 4, 6, 3), True): "resnet50", ((3, 4, 23, 3), True): "resnet101",
              ((3, 8, 36, 3), True): "resnet152", ((3, 24, 36, 3), True): "resnet200"}  # fmt: skip
# (width of the first 3x3 convolution, its groups) -> torchvision's name, where depth has one
WIDE = {(64, 1): "resnet{}", (128, 1): "wide_resnet{}_2", (128, 32): "resnext{}_32x4d", (256, 32): "resnext{}_32x8d",
        (256, 64): "resnext{}_64x4d"}  # fmt: skip


def resnet(state: State) -> Iterator[Candidate]:
    """torchvision's names, which are timm's and most training code's: ``conv1``, ``bn1``, ``layer1`` to ``layer4``.

    ``shortcut`` instead of ``downsample`` is kuangliu/pytorch-cifar's name.
    """
    for prefix, state_dict in behind(state.tensors, "layer1.0.conv1.weight"):
        yield as_resnet(
            *renamed(state_dict, lambda k: re.sub(r"^(layer\d\.\d+\.)shortcut\.", r"\1downsample.", k)), prefix
        )


def wide_resnet(state: State) -> Iterator[Candidate]:
    """Wide ResNets as in xternalz/WideResNet-pytorch: ``block1.layer.0``, ``convShortcut``."""
    for prefix, state_dict in behind(state.tensors, "block1.layer.0.conv1.weight"):
        tensors, sources = renamed(state_dict, _from_wide)
        yield as_resnet(tensors, sources, prefix, "activations taken as ReLU", shortcut_from="activated")


def _from_wide(name: str) -> str:
    name = re.sub(r"^block(\d)\.layer\.", r"layer\1.", name)
    return name.replace(".convShortcut.", ".downsample.0.")


def cifar100(state: State) -> Iterator[Candidate]:
    """weiaicunzai/pytorch-cifar100's ResNets: ``conv2_x.0.residual_function.0``."""
    for prefix, state_dict in behind(state.tensors, "conv2_x.0.residual_function.0.weight"):
        yield as_resnet(*renamed(state_dict, _from_cifar100), prefix)


def _from_cifar100(name: str) -> str:
    name = re.sub(r"^conv([2-5])_x\.", lambda m: f"layer{int(m[1]) - 1}.", name)
    name = re.sub(r"^conv1\.0\.", "conv1.", re.sub(r"^conv1\.1\.", "bn1.", name)).replace(".shortcut.", ".downsample.")
    parts = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
    return re.sub(r"\.residual_function\.([013467])\.", lambda m: f".{parts[m[1]]}.", name)


def staged(state: State) -> Iterator[Candidate]:
    """D-X-Y/ResNeXt-DenseNet's ResNets for CIFAR: ``conv_1_3x3``, ``stage_1.0.conv_a``."""
    for prefix, state_dict in behind(state.tensors, "stage_1.0.conv_a.weight"):
        yield as_resnet(*renamed(state_dict, _from_staged), prefix, zeros="end")


def _from_staged(name: str) -> str:
    for old, new in (
        (r"^conv_1_3x3\.", "conv1."),
        (r"^bn_1\.", "bn1."),
        (r"^stage_(\d)\.(\d+)\.(conv|bn)_([ab])\.", lambda m: f"layer{m[1]}.{m[2]}.{m[3]}{'ab'.index(m[4]) + 1}."),
    ):
        name = re.sub(old, new, name)
    return name


def indexed(state: State) -> Iterator[Candidate]:
    """A ResNet's children in a Sequential, named by index (lightly, and ports of SimCLR that name it ``f``)."""
    for first in (3, 4):  # without and with the pooling after the stem
        children = {"0": "conv1", "1": "bn1"} | {str(first + i): f"layer{1 + i}" for i in range(4)}
        for prefix, state_dict in behind(state.tensors, f"{first}.0.conv1.weight"):
            if (
                "0.weight" in state_dict
                and f"{first + 3}.0.conv1.weight" in state_dict
                and "1.running_mean" in state_dict
            ):
                yield as_resnet(*_under(state_dict, children), prefix)


def obow(state: State) -> Iterator[Candidate]:
    """OBoW's feature extractor: block 0 holds Conv and bn, blocks 1 to 4 are torchvision's layers."""
    children = {"0.Conv": "conv1", "0.bn": "bn1"} | {str(i): f"layer{i}" for i in (1, 2, 3, 4)}
    for prefix, state_dict in behind(state.tensors, "0.Conv.weight"):
        if "4.0.conv1.weight" in state_dict:
            yield as_resnet(*_under(state_dict, children), prefix)


def detectron2(state: State) -> Iterator[Candidate]:
    """detectron2's ResNets: ``stem.conv1``, ``res2`` to ``res5``, norms inside convolutions, ``shortcut``.

    The last stage of a C4 detector is in ``roi_heads.res5``.
    """
    for prefix, state_dict in behind(state.tensors, "stem.conv1.weight"):
        if not any(k.startswith("res5.") for k in state_dict):
            inner = next((k[: k.index("res5.")] for k in state.tensors if "roi_heads.res5." in k), None)
            if inner is not None:
                state_dict |= {k[len(inner) :]: v for k, v in state.tensors.items() if k.startswith(inner + "res5.")}
        note = "channels taken as RGB, as in converted torchvision weights; detectron2's own MSRA models expect BGR"
        yield as_resnet(*renamed(state_dict, _from_detectron2), prefix, note)


def _from_detectron2(name: str) -> str | None:
    match = re.fullmatch(r"(?:stem|res([2-5])\.(\d+))\.(conv[123]|shortcut)(\.norm)?\.(\w+)", name)
    if not match:
        return None
    stage, block, part, norm, leaf = match.groups()
    if part == "shortcut":
        part = "downsample.1" if norm else "downsample.0"
    elif norm:
        part = f"bn{part[-1]}"
    return f"{part}.{leaf}" if stage is None else f"layer{int(stage) - 1}.{block}.{part}.{leaf}"


def _under(state_dict: Tensors, children: Mapping[str, str]) -> tuple[dict[str, Tensor], Sources]:
    pattern = re.compile(f"({'|'.join(re.escape(c) for c in children)})\\.(.*)")
    return renamed(state_dict, lambda k: f"{children[m[1]]}.{m[2]}" if (m := pattern.fullmatch(k)) else None)


def as_resnet(tensors: dict[str, Tensor], sources: Sources, prefix: str, note: str = "", **known: Any) -> Candidate:
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    depths = tuple(count(shapes, rf"layer{i}\.(\d+)\.conv1\.weight") for i in (1, 2, 3, 4))
    small = small_resnet(shapes, tuple(itertools.takewhile(bool, depths)), known)
    if small is None:
        arch, options, odd = _resnet_arch(shapes, depths)
        return Candidate(tensors, arch, options, prefix, sources, "; ".join(n for n in (note, odd) if n))
    if small.norm:
        final = re.compile(rf"^{small.norm}\.")
        tensors = {final.sub("norm.", k): v for k, v in tensors.items()}
        sources = {final.sub("norm.", k): sources.get(k, k) for k in sources or tensors}
    return Candidate(tensors, small.arch, small.options, prefix, sources, "; ".join(n for n in (note, small.note) if n))


def _resnet_arch(
    shapes: Mapping[str, tuple[int, ...]], depths: tuple[int, ...]
) -> tuple[str | None, dict[str, Any], str]:
    """The architecture of a ResNet, from its shapes and blocks by stage; None and the reason where there is none."""
    bottleneck = "layer1.0.conv3.weight" in shapes
    stem = shapes.get("conv1.weight")
    if not all(depths):
        return None, {}, f"a ResNet with {sum(map(bool, depths))} stages and no 3x3 stem; torchvision's have four"
    if stem is None:
        return _deep_stem(depths, bottleneck, shapes)
    width = stem[0]
    inner, per_group = shapes.get("layer1.0.conv2.weight", (0, 1))[:2]
    name = BOTTLENECK.get(depths) if bottleneck else BASIC.get(depths)
    if not inner:
        return None, {}, "a ResNet whose first block is not whole"
    if width != 64:
        return None, {}, f"a ResNet whose 7x7 stem has {width} channels; torchvision's and timm's have 64"
    groups = inner // per_group
    wide = WIDE.get((inner, groups))
    if bottleneck and name and wide and wide.format(name) in torchvision.models.list_models(torchvision.models):
        return f"torchvision:{wide.format(name)}", {}, ""
    if not bottleneck and name:
        return f"torchvision:{name}", {}, ""
    return _named_resnet(depths, bottleneck, "", _grouped(bottleneck, inner, groups))


def _grouped(bottleneck: bool, inner: int, groups: int) -> dict[str, Any]:
    wide = bottleneck and (inner, groups) != (64, 1)
    return {"cardinality": groups, "base_width": inner // groups} if wide else {}


def _named_resnet(
    depths: tuple[int, ...], bottleneck: bool, suffix: str, options: dict[str, Any]
) -> tuple[str, dict[str, Any], str]:
    """timm's name for a ResNet of these blocks by stage; a base with all of its options where timm has none."""
    if name := REGISTERED.get((depths, bottleneck)):
        return f"timm:{name}{suffix}", options, ""
    base = "resnet50" if bottleneck else "resnet18"
    note = f"custom: timm registers no such ResNet of depths {depths}"
    return f"timm:{base}{suffix}", {"layers": list(depths), **options}, note


def _deep_stem(
    depths: tuple[int, ...], bottleneck: bool, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str | None, dict[str, Any], str]:
    """timm's ResNet-D: a stem of three 3x3 convolutions, average pooling in the shortcuts (but not in ResNet-C)."""
    block = shapes.get("layer1.0.conv2.weight", ())
    if not {"conv1.0.weight", "conv1.3.weight", "conv1.6.weight"} <= shapes.keys() or len(block) != 4:
        return None, {}, "a ResNet without a known stem"
    first, second = shapes["conv1.0.weight"][0], shapes["conv1.3.weight"][0]
    options = _grouped(bottleneck, block[0], block[0] // block[1])
    options |= {"stem_width": second} if second != 32 else {}
    options |= {"stem_type": "deep_tiered"} if first != second else {}
    options |= {"avg_down": False} if "layer2.0.downsample.0.weight" in shapes else {}
    return _named_resnet(depths, bottleneck, "d", options)


# ------------------------------------------------------------------------------------------------------------ ViTs


def vit(state: State) -> Iterator[Candidate]:
    """timm's names, which DINO, iBOT, MAE, MoCo v3 and DINOv2 share: ``cls_token``, ``patch_embed``, ``blocks``."""
    for prefix, state_dict in behind(state.tensors, "patch_embed.proj.weight"):
        chunked = any(re.match(r"blocks\.\d+\.\d+\.norm1", k) for k in state_dict)  # DINOv2 under FSDP
        tensors, sources = renamed(state_dict, functools.partial(_timm_vit_name, chunked=chunked))
        if "blocks.0.attn.qkv.weight" in tensors and tensors["patch_embed.proj.weight"].ndim == 5:
            note = "a ViT of clips, whose patches have a length in time (V-JEPA, VideoMAE); here backbones see images"
            yield Candidate(tensors, None, {}, prefix, sources, note)
        elif "blocks.0.attn.qkv.weight" in tensors and tensors["patch_embed.proj.weight"].ndim == 4:
            beit = "blocks.0.attn.q_bias" in tensors or "pos_embed" not in tensors
            yield as_beit(tensors, sources, prefix) if beit else as_vit(tensors, sources, prefix, state)


def _timm_vit_name(name: str, chunked: bool) -> str | None:
    if name == "mask_token" or name.startswith("decoder_") or name.endswith("relative_position_index"):
        return None
    if chunked:
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    return name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def as_vit(tensors: dict[str, Tensor], sources: Sources, prefix: str, state: State) -> Candidate:
    """A ViT under timm's names, by the nearest of timm's architectures."""
    width, channels, patch, wide = tensors["patch_embed.proj.weight"].shape
    if channels != 3 or patch != wide or "pos_embed" not in tensors or tensors["pos_embed"].ndim != 3:
        return Candidate(tensors, None, {}, prefix, sources, _no_vit(tensors))
    counted = vits.heads(width, state, prefix, tensors["pos_embed"])
    options: dict[str, Any] = {"embed_dim": width, "depth": count(tensors, r"blocks\.(\d+)\.norm1\.weight")}
    options |= {"patch_size": patch, "num_heads": counted.number}
    kind = "distilled" if "dist_token" in tensors else "plain"
    if "blocks.0.mlp.fc1.weight" in tensors and "blocks.0.mlp.fc2.weight" in tensors:
        out, back = tensors["blocks.0.mlp.fc1.weight"].shape[0], tensors["blocks.0.mlp.fc2.weight"].shape[1]
        options["mlp_ratio"], kind = out / width, "gated" if out == 2 * back else kind
    grid = _positions(tensors, sources, options)
    if grid is None:
        odd = f"a ViT whose {tensors['pos_embed'].shape[1]} positions are no square"
        return Candidate(tensors, None, {}, prefix, sources, odd)
    options["img_size"] = grid * patch
    _vit_variants(tensors, options)
    name, options, custom = vits.nearest(options, kind)
    guesses: dict[str, tuple[Any, str]] = {"num_heads": (counted.number, counted.why)} if counted.guess else {}
    if "norm_pre.weight" in tensors or "attn_pool.latent" in tensors:
        guesses["act_layer"] = ("gelu", "OpenAI's CLIP and some after it have quick_gelu, SigLIP 2 gelu_tanh")
    note = "; ".join(n for n in (custom, "" if counted.guess else counted.why) if n)
    return Candidate(tensors, f"timm:{name}", options, prefix, sources, note, guesses=guesses)


def _no_vit(tensors: Tensors) -> str:
    if tensors.get("pos_embed", tensors["patch_embed.proj.weight"][0]).ndim == 4:
        return "SAM's ViT, whose positions are a map and whose attention is in windows, which no layout reads"
    return "a ViT without square RGB patches or a table of positions"


def as_beit(
    tensors: Tensors, sources: Sources, prefix: str, heads: int | None = None, eps: float = 1e-6, note: str = ""
) -> Candidate:
    """A BEiT under timm's names: biases of queries and values, relative positions in each block or shared by all."""
    width, channels, patch, wide = tensors["patch_embed.proj.weight"].shape
    depth = count(tensors, r"blocks\.(\d+)\.norm1\.weight")
    tables = [v for k, v in tensors.items() if k.endswith("relative_position_bias_table")]
    side = (math.isqrt(tables[0].shape[0] - 3) + 1) // 2 if tables else 0
    if "pos_embed" in tensors and tensors["pos_embed"].ndim == 3:
        side = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    if not side or channels != 3 or patch != wide or "blocks.0.mlp.fc1.weight" not in tensors:
        return Candidate(tensors, None, {}, prefix, sources, _no_vit(tensors))
    shared = "rel_pos_bias.relative_position_bias_table" in tensors
    ratio = tensors["blocks.0.mlp.fc1.weight"].shape[0] / width
    options: dict[str, Any] = {"img_size": side * patch} if side * patch != 224 else {}
    name = {(768, 12, 16): "beit_base_patch16_224", (1024, 24, 16): "beit_large_patch16_224"}.get((width, depth, patch))
    shown = heads or (tables[0].shape[1] if tables else 0)
    counted = vits.Heads(shown, "") if shown else vits.usual(width)
    heads = counted.number
    if name is None:
        options |= {"embed_dim": width, "depth": depth, "patch_size": patch}
    options |= {"num_heads": heads} if name is None or heads != vits.PLAIN[width] else {}
    options |= {"mlp_ratio": ratio} if ratio != 4 else {}
    options |= {"use_abs_pos_emb": True} if "pos_embed" in tensors else {}
    options |= {} if tables and not shared else {"use_rel_pos_bias": False}
    options |= {"use_shared_rel_pos_bias": True} if shared else {}
    options |= {} if "blocks.0.gamma_1" in tensors else {"init_values": 0.0}
    options |= {} if "blocks.0.attn.q_bias" in tensors else {"qkv_bias": False}
    options |= {} if "fc_norm.weight" in tensors else {"global_pool": "token"}
    options |= {"norm_eps": eps} if eps != 1e-6 else {}
    guesses = {"num_heads": (heads, counted.why)} if counted.guess else {}
    return Candidate(
        tensors, f"timm:{name or 'beit_base_patch16_224'}", options, prefix, sources, note, guesses=guesses
    )


def _positions(tensors: dict[str, Tensor], sources: Sources, options: dict[str, Any]) -> int | None:
    """The side of the grid of positions; sets the options of class and register tokens.

    DINOv2 adds positions before its registers come in; adding the class token's position to the token itself is the
    same thing under timm's names.
    """
    length, classed = tensors["pos_embed"].shape[1], "cls_token" in tensors
    if "register_tokens" in tensors:
        tensors["reg_token"], sources["reg_token"] = (
            tensors.pop("register_tokens"),
            sources.pop("register_tokens"),
        )
        if classed and length - 1 == math.isqrt(length - 1) ** 2:
            tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
            tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
            length -= 1
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    distilled = int("dist_token" in tensors)
    if not classed:
        options |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    if registers:
        options["reg_tokens"] = registers
    for extra in sorted({0, int(classed) + registers + distilled}, reverse=not registers):
        side = math.isqrt(length - extra) if length > extra else 0
        if side and side * side == length - extra:
            if extra == 0 and (classed or registers or distilled):
                options["no_embed_class"] = True
            return side
    return None


def _vit_variants(tensors: Tensors, options: dict[str, Any]) -> None:
    """Options seen from which tensors exist."""
    if "blocks.0.ls1.gamma" in tensors:
        options["init_values"] = 1.0  # its value comes with the weights
    if "blocks.0.attn.qkv.bias" not in tensors:
        options["qkv_bias"] = False
    if "blocks.0.attn.q_norm.weight" in tensors:
        options["qk_norm"] = True
    if "norm_pre.weight" in tensors:
        options["pre_norm"] = True
    if "fc_norm.weight" in tensors:
        options |= {"global_pool": "avg", "fc_norm": True}
    if "attn_pool.latent" in tensors:
        options |= {"global_pool": "map", "fc_norm": None}


def torchvision_vit(state: State) -> Iterator[Candidate]:
    """torchvision's ViT: ``class_token``, ``conv_proj``, ``encoder.layers.encoder_layer_0``."""
    for prefix, state_dict in behind(state.tensors, "encoder.pos_embedding"):
        tensors, sources = renamed(
            state_dict, lambda k: k.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")
        )
        if "conv_proj.weight" not in tensors:
            continue
        width, _, patch, _ = tensors["conv_proj.weight"].shape
        depth = count(tensors, r"encoder\.layers\.encoder_layer_(\d+)\.ln_1\.weight")
        size = {(768, 12): "b", (1024, 24): "l", (1280, 32): "h"}.get((width, depth))
        side = math.isqrt(tensors["encoder.pos_embedding"].shape[1] - 1) * patch
        options = {} if side == 224 else {"image_size": side}
        name = f"vit_{size}_{patch}"
        if name in torchvision.models.list_models(torchvision.models):
            yield Candidate(tensors, f"torchvision:{name}", options, prefix, sources)
        else:
            yield Candidate(
                tensors,
                None,
                {},
                prefix,
                sources,
                f"a torchvision ViT of width {width}, depth {depth}, patch {patch}",
            )


# ------------------------------------------------------------------------------------------------- ConvNeXt and Swin

CONVNEXTS: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {
    ((2, 2, 6, 2), (40, 80, 160, 320)): "atto",
    ((2, 2, 6, 2), (48, 96, 192, 384)): "femto",
    ((2, 2, 6, 2), (64, 128, 256, 512)): "pico",
    ((2, 2, 8, 2), (80, 160, 320, 640)): "nano",
    ((3, 3, 9, 3), (96, 192, 384, 768)): "tiny",
    ((3, 3, 27, 3), (96, 192, 384, 768)): "small",
    ((3, 3, 27, 3), (128, 256, 512, 1024)): "base",
    ((3, 3, 27, 3), (192, 384, 768, 1536)): "large",
    ((3, 3, 27, 3), (256, 512, 1024, 2048)): "xlarge",
    ((3, 4, 30, 3), (384, 768, 1536, 3072)): "xxlarge",
}


def convnext(state: State) -> Iterator[Candidate]:
    """ConvNeXt and its second version under timm's names and under the official ones (torchvision's: by signature)."""
    for prefix, state_dict in behind(state.tensors, "stages.0.blocks.0.conv_dw.weight"):
        yield as_convnext(state_dict, {}, prefix)
    for prefix, state_dict in behind(state.tensors, "stages.0.0.dwconv.weight"):
        tensors, sources = renamed(state_dict, _from_official_convnext)
        tensors = {k: v.flatten() if ".grn." in k else v for k, v in tensors.items()}
        yield as_convnext(tensors, sources, prefix)


def _from_official_convnext(name: str) -> str:
    for pattern, to in (
        (r"downsample_layers\.0\.", "stem."),
        (r"downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"norm\.", "head.norm."),
    ):
        if re.match(pattern, name):
            name = re.sub("^" + pattern, to, name)
            break
    for old, new in ((".dwconv.", ".conv_dw."), (".pwconv1.", ".mlp.fc1."), (".pwconv2.", ".mlp.fc2.")):
        name = name.replace(old, new)
    return re.sub(r"\.grn\.(gamma|beta)$", lambda m: f".mlp.grn.{'weight' if m[1] == 'gamma' else 'bias'}", name)


def as_convnext(tensors: dict[str, Tensor], sources: Sources, prefix: str) -> Candidate:
    stages = range(4)
    depths = tuple(count(tensors, rf"stages\.{i}\.blocks\.(\d+)\.conv_dw\.weight") for i in stages)
    if not all(depths) or "stem.0.weight" not in tensors:
        return Candidate(tensors, None, {}, prefix, sources, "a ConvNeXt without its stem or a stage")
    dims = tuple(tensors[f"stages.{i}.blocks.0.conv_dw.weight"].shape[0] for i in stages)
    block = "stages.0.blocks.0."
    options: dict[str, Any] = {}
    note = ""
    if (depths, dims) not in CONVNEXTS:
        options |= {"depths": list(depths), "dims": list(dims)}
        note = f"custom: timm registers no ConvNeXt of depths {depths} and widths {dims}"
    size = CONVNEXTS.get((depths, dims), "tiny")
    if tensors["stem.0.weight"].shape[-1] != 4 or "stem.1.weight" not in tensors:
        return Candidate(tensors, None, {}, prefix, sources, "a ConvNeXt with another stem than 4x4 patches")
    second = block + "gamma" not in tensors  # version 2 has response normalisation instead of layer scale
    if second and (block + "mlp.grn.weight" not in tensors or size in ("xlarge", "xxlarge")):
        return Candidate(tensors, None, {}, prefix, sources, "a ConvNeXt that is neither of the two versions")
    pointwise = tensors.get(block + "mlp.fc1.weight")
    convolutions = pointwise is not None and pointwise.ndim == 4
    if convolutions != (not second and size in ("atto", "femto", "pico", "nano")):  # what timm builds by default
        options["conv_mlp"] = convolutions
    return Candidate(tensors, f"timm:convnext{'v2' if second else ''}_{size}", options, prefix, sources, note)


# (width, depths, window) -> name
SWINS: dict[tuple[int, tuple[int, ...], int], str] = {
    (96, (2, 2, 6, 2), 7): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2), 7): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2), 7): "swin_base_patch4_window7_224",
    (128, (2, 2, 18, 2), 12): "swin_base_patch4_window12_384",
    (192, (2, 2, 18, 2), 7): "swin_large_patch4_window7_224",
    (192, (2, 2, 18, 2), 12): "swin_large_patch4_window12_384",
}


def swin(state: State) -> Iterator[Candidate]:
    """Swin under timm's names and under the official ones, which differ in where a stage's downsampling lies."""
    for prefix, state_dict in behind(state.tensors, "layers.0.blocks.0.attn.relative_position_bias_table"):
        official = "layers.0.downsample.norm.weight" in state_dict
        tensors, sources = renamed(state_dict, functools.partial(_timm_swin_name, official=official))
        if "patch_embed.proj.weight" in tensors:
            yield as_swin(tensors, sources, prefix)


def as_swin(tensors: Tensors, sources: Sources, prefix: str) -> Candidate:
    """A Swin under timm's names."""
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    depths = tuple(count(tensors, rf"layers\.{i}\.blocks\.(\d+)\.norm1\.weight") for i in range(4))
    tables = [tensors.get(f"layers.{i}.blocks.0.attn.relative_position_bias_table") for i in range(4)]
    if not all(depths) or any(t is None for t in tables):
        return Candidate(tensors, None, {}, prefix, sources, "a Swin transformer with fewer than four stages")
    length, _ = tables[0].shape  # type: ignore[union-attr]
    heads = [t.shape[1] for t in tables if t is not None]
    window = (math.isqrt(length) + 1) // 2
    options: dict[str, Any] = {}
    name, note = SWINS.get((width, depths, window)), ""
    if name is None:
        name, options = SWINS.get((width, depths, 7)), {"window_size": window}
    if name is None:
        name, options = SWINS[96, (2, 2, 6, 2), 7], {"embed_dim": width, "depths": list(depths), "window_size": window}
        note = f"custom: timm registers no such Swin of width {width} and depths {depths}"
    options |= {"num_heads": heads} if heads != [width // 32 * 2**i for i in range(4)] or note else {}
    options |= {"patch_size": patch} if patch != 4 else {}
    return Candidate(tensors, f"timm:{name}", options, prefix, sources, note)


def _timm_swin_name(name: str, official: bool) -> str | None:
    if name.endswith(("relative_position_index", "attn_mask")):
        return None  # computed, not learnt
    if official:
        return re.sub(r"^layers\.(\d)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)
    return name


# --------------------------------------------------------------------------- torchvision's sequences of features


# families and a name that only they have
FAMILIES = {
    "alexnet": r"features\.0\.weight",
    "vgg": r"features\.0\.weight",
    "squeezenet": r"\.squeeze\.weight",
    "densenet": r"denseblock1\.",
    "mobilenet_v2": r"\.conv\.0\.0\.",
    "mobilenet_v3": r"features\.1\.block\.0\.0\.",
    "efficientnet": r"features\.1\.0\.block\.",
    "convnext": r"layer_scale",
    "swin": r"\.attn\.qkv\.",
}


def torchvision_features(state: State) -> Iterator[Candidate]:
    """torchvision's AlexNet, VGG, SqueezeNet, DenseNet, MobileNet, EfficientNet, ConvNeXt and Swin.

    They differ by the names and shapes of every tensor under ``features``; the nearest is the candidate.
    """
    prefixes = {k[: k.index("features.")] for k in state.tensors if re.search(r"(^|\.)features\.", k)}
    for prefix in sorted(prefixes):
        state_dict = {k[len(prefix) :]: v for k, v in state.tensors.items() if k.startswith(prefix)}
        tensors, sources = renamed(state_dict, _densenet_name)
        shapes = {k: tuple(v.shape) for k, v in tensors.items() if k.startswith("features.")}
        families = [f for f, mark in FAMILIES.items() if any(re.search(mark, k) for k in shapes)]
        signatures = {name: signature for f in families for name, signature in _signatures(f).items()}
        if signatures:
            name = min(signatures, key=lambda n: _distance(shapes, signatures[n]))
            yield Candidate(tensors, f"torchvision:{name}", {}, prefix, sources)


def _densenet_name(name: str) -> str:
    """torchvision's DenseNet weights of 2017 number what the modules since name."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)


def _distance(shapes: Mapping[str, tuple[int, ...]], signature: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers lie in tensors that one of the two has and the other lacks."""
    return sum(math.prod(s) for k, s in signature.items() if shapes.get(k) != s) + sum(
        math.prod(s) for k, s in shapes.items() if signature.get(k) != s
    )


@functools.cache
def _signatures(family: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes under ``features`` of torchvision's classifiers of a family."""
    signatures = {}
    with shapes_only():
        for name in torchvision.models.list_models(torchvision.models):
            if name.startswith(family):
                net = torchvision.models.get_model(name, weights=None)
                signatures[name] = {k: tuple(v.shape) for k, v in net.state_dict().items() if k.startswith("features.")}
    return signatures
