"""Layouts of Hugging Face transformers' image networks, and what their ``config.json`` says that no tensor shows.

Files have the names that ``save_pretrained`` writes, or those of the modules of transformers 5. Both become a few names
of our own first (``blocks.0.attn.q``), then timm's. Only towers that are shown images are read, not the text beside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from evalsuite.checkpoints import configs
from evalsuite.checkpoints.layouts import (
    Candidate,
    Sources,
    as_beit,
    as_convnext,
    as_resnet,
    as_swin,
    as_vit,
    behind,
    count,
)
from evalsuite.checkpoints.reading import State

__all__ = ["CLIP_MEAN", "CLIP_STD", "clip", "convnext", "other", "published_clip", "resnet", "swin", "vit"]

Tensors = Mapping[str, Tensor]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# transformers' names of activations -> timm's
ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu",
               "swish": "silu"}  # fmt: skip


class Words(NamedTuple):
    """What is known of a tower beside its tensors: epsilon of norms, activation; by whose word."""

    eps: float
    act: str
    config: Mapping[str, Any]

    @property
    def note(self) -> str:
        if self.config:
            return f"epsilon {self.eps:g} and activation {self.act} from config.json beside it"
        return f"no config.json beside it: epsilon {self.eps:g} and activation {self.act} are transformers' defaults"


def _words(state: State, eps: float, act: str, width: int, sizes: str = "hidden_size") -> Words:
    """``config.json`` beside the file, where it is of a network of this width; else transformers' defaults."""
    tower = configs.tower(state.file, width, sizes)
    said, theirs = tower.get("layer_norm_eps", eps), tower.get("hidden_act", act)
    eps = float(said) if isinstance(said, int | float) and 0 < said < 1 else eps
    return Words(eps, theirs if isinstance(theirs, str) else act, tower)


# ------------------------------------------------------------------------------------------------------ transformers

OUTSIDE = (
    (r"embeddings\.(?:cls_token|class_embedding)", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.register_tokens", "register_tokens"),
    (r"embeddings\.position_embeddings?(?:\.weight)?", "pos_embed"),
    (r"embeddings\.patch_embeddings?(?:\.projection)?\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"(?:encoder\.relative|shared)_position_bias\.(relative_position_bias_table)", r"rel_pos_bias.\1"),
    (r"pre_layr?norm\.(\w+)", r"norm_pre.\1"),
    (r"(?:post_)?layernorm\.(\w+)|norm\.(\w+)", r"norm.\1\2"),
    (r"pooler\.layernorm\.(\w+)", r"fc_norm.\1"),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.in_proj_(\w+)", r"attn_pool.in.\1"),
    (r"head\.attention\.out_proj\.(\w+)", r"attn_pool.proj.\1"),
    (r"head\.layernorm\.(\w+)", r"attn_pool.norm.\1"),
    (r"head\.mlp\.(fc[12])\.(\w+)", r"attn_pool.mlp.\1.\2"),
)  # fmt: skip
INSIDE = (
    (r"(?:attention|self_attn)(?:\.attention|\.self)?\.([qkv])(?:uery|ey|alue|_proj)\.(\w+)", r"attn.\1.\2"),
    (r"attention\.output\.dense\.(\w+)|(?:attention|self_attn)\.(?:o|out)_proj\.(\w+)", r"attn.proj.\1\2"),
    (r"(?:attention\.)?(?:attention\.|self\.)?(?:relative_position_bias\.)?(relative_position_bias_table)", r"attn.\1"),
    (r"attention\.self\.continuous_position_bias_mlp\.(.*)", r"attn.cpb_mlp.\1"),
    (r"attention\.self\.(logit_scale)", r"attn.\1"),
    (r"(?:layernorm_before|layer_norm1|norm1)\.(\w+)", r"norm1.\1"),
    (r"(?:layernorm_after|layer_norm2|norm2)\.(\w+)", r"norm2.\1"),
    (r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(\w+)", r"mlp.fc1.\1"),
    (r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(\w+)", r"mlp.fc2.\1"),
    (r"mlp\.(gate|up)_proj\.(\w+)", r"mlp.\1.\2"),
    (r"layer_scale([12])\.lambda1|lambda_([12])", r"scale\1\2"),
)  # fmt: skip
COMPUTED = re.compile(r"(mask_token|position_ids|relative_position_index|relative_coords_table)$")
POOLER = re.compile(r"pooler\.dense\.")


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, to in rules:
        if match := re.fullmatch(pattern, name):
            return re.sub(r"\\(\d)", lambda m: match[int(m[1])] or "", to)
    return None


class Tower(NamedTuple):
    """The tensors of a transformer under our few names, where each came from, and names within that are of no ViT."""

    tensors: dict[str, Tensor]
    sources: Sources
    unknown: list[str]


def _tower(state_dict: Tensors, block: str = r"(?:encoder\.|model\.)*layers?\.(\d+)\.") -> Tower:
    tensors: dict[str, Tensor] = {}
    sources: Sources = {}
    unknown = []
    for name, tensor in state_dict.items():
        if COMPUTED.search(name) or POOLER.match(name):
            continue
        inner = re.match(block, name)
        new = _renamed(name[inner.end() :], INSIDE) if inner else _renamed(name, OUTSIDE)
        if inner and new is not None:
            new = f"{'.'.join(('blocks', *inner.groups()))}.{new}"
        if new is None and (inner or name.startswith(("embeddings.", "encoder."))):
            unknown.append(name)
            continue
        tensors[new or name], sources[new or name] = tensor, name
    return Tower(tensors, sources, unknown)


def _join(tower: Tower, parts: tuple[str, ...], into: str) -> None:
    """Tensors ``blocks.N.PART`` one above the other as ``blocks.N.INTO``; of biases, missing ones are zero."""
    tensors, sources = tower.tensors, tower.sources
    for name in [k for k in tensors if k.endswith(f".{parts[0]}")]:
        before = name.removesuffix(parts[0])
        given = [before + p for p in parts if before + p in tensors]
        if len(given) < len(parts) and not into.endswith("bias"):
            continue  # left as they are, they are inside the network and no part of it: refused
        pieces = [tensors.get(before + p, torch.zeros_like(tensors[name])) for p in parts]
        tensors[before + into] = torch.cat(pieces)
        sources[before + into] = tuple(str(sources[k]) for k in given)
        for k in given:
            del tensors[k], sources[k]


def _rename(tower: Tower, *pairs: tuple[str, str]) -> None:
    for old, new in pairs:
        for name in [k for k in tower.tensors if re.search(old, k)]:
            to = re.sub(old, new, name)
            tower.tensors[to], tower.sources[to] = tower.tensors.pop(name), tower.sources.pop(name)


def _shaped(tower: Tower) -> None:
    """Class token and positions as timm has them, (1, N, width)."""
    for name in ("cls_token", "pos_embed"):
        if name in tower.tensors and tower.tensors[name].ndim < 3:
            width = tower.tensors[name].shape[-1]
            tower.tensors[name] = tower.tensors[name].reshape(1, -1, width)
    if "register_tokens" in tower.tensors and not tower.tensors["register_tokens"].numel():
        del tower.tensors["register_tokens"], tower.sources["register_tokens"]


def vit(state: State) -> Iterator[Candidate]:
    """ViT, DeiT, ViT-MAE, ViT-MSN, DINOv2 (with registers), DINOv3's ViTs and BEiT."""
    for anchor in ("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.weight"):
        for prefix, state_dict in behind(state.tensors, anchor):
            tower = _tower(state_dict)
            if "blocks.0.attn.q.weight" in tower.tensors:
                yield _of_vit(tower, prefix, state, "norm1" in " ".join(map(str, tower.sources.values())))


def _of_vit(tower: Tower, prefix: str, state: State, dino: bool) -> Candidate:
    """One tower: DINOv2 and 3 name their norms ``norm1``, the others ``layernorm_before``."""
    tensors = tower.tensors
    _shaped(tower)
    if (odd := _odd(tower, prefix, state, "a ViT")) is not None:
        return odd
    width = tensors["patch_embed.proj.weight"].shape[0]
    relative = any("relative_position_bias_table" in k for k in tensors)
    if relative or (not dino and "pos_embed" not in tensors):
        return _beit(tower, prefix, _words(state, 1e-12, "gelu", width), configs.heads(state.file, width))
    if "pos_embed" not in tensors:
        return _dinov3(tower, prefix, _words(state, 1e-5, "gelu", width), configs.heads(state.file, width))
    return _plain(tower, prefix, state, _words(state, 1e-6 if dino else 1e-12, "gelu", width))


def _odd(tower: Tower, prefix: str, state: State, kind: str) -> Candidate | None:
    """Why a transformer's tensors are no whole ViT: parts of no ViT, or not as many layers as config.json says."""
    if tower.unknown:
        return _none(tower, prefix, state, kind)
    patches = tower.tensors["patch_embed.proj.weight"]
    depth = count(tower.tensors, r"blocks\.(\d+)\.norm1\.weight")
    said = _words(state, 0.0, "", patches.shape[0]).config.get("num_hidden_layers", depth)
    if patches.ndim != 4 or patches.shape[1] != 3:
        note = f"{kind} without square RGB patches, but of shape {tuple(patches.shape)}"
    elif not {"blocks.0.mlp.fc2.weight", "blocks.0.norm1.weight"} <= tower.tensors.keys():
        note = f"{kind} whose first layer is not whole"
    elif said != depth:
        note = f"{kind} of {depth} layers, where config.json beside it says {said}"
    else:
        return None
    return Candidate(tower.tensors, None, {}, prefix, tower.sources, note)


def _none(tower: Tower, prefix: str, state: State, kind: str) -> Candidate:
    config = state.file.beside.get("config.json", {})
    word = f" (config.json says {config['model_type']})" if isinstance(config.get("model_type"), str) else ""
    note = f"a transformers network like {kind}, with parts that none of ours has{word}, first {tower.unknown[0]}"
    return Candidate(tower.tensors, None, {}, prefix, tower.sources, note)


def _plain(tower: Tower, prefix: str, state: State, words: Words) -> Candidate:
    """A ViT of timm's own class."""
    gated = "blocks.0.mlp.gate.weight" in tower.tensors
    for leaf in ("weight", "bias"):
        _join(tower, tuple(f"attn.{p}.{leaf}" for p in "qkv"), f"attn.qkv.{leaf}")
        _join(tower, tuple(f"mlp.{p}.{leaf}" for p in ("gate", "up")), f"mlp.fc1.{leaf}")
    _rename(tower, (r"\.scale([12])$", r".ls\1.gamma"))
    read = as_vit(tower.tensors, tower.sources, prefix, state)
    return _said(read, words, gated or read.arch == "timm:vit_giant_patch14_dinov2")


def _said(read: Candidate, words: Words, gated: bool = False) -> Candidate:
    """A candidate of timm's ViT with what config.json says; gated networks have an activation of their own."""
    act = ACTIVATIONS.get(words.act)
    if read.arch is None:
        return read
    if act is None:
        return replace(read, arch=None, note=f"a ViT with the activation {words.act}, which timm has not")
    options = dict(read.options) | {"norm_eps": words.eps}
    if act != "gelu" and not gated:
        options["act_layer"] = act
    guesses = {k: v for k, v in read.guesses.items() if k != "act_layer"}
    return replace(read, options=options, note="; ".join(n for n in (words.note, read.note) if n), guesses=guesses)


def _beit(tower: Tower, prefix: str, words: Words, heads: tuple[int, str] | None) -> Candidate:
    _join(tower, ("attn.q.weight", "attn.k.weight", "attn.v.weight"), "attn.qkv.weight")
    _rename(tower, (r"\.attn\.([qv])\.bias$", r".attn.\1_bias"), (r"\.scale([12])$", r".gamma_\1"))
    if words.act != "gelu":
        return Candidate(tower.tensors, None, {}, prefix, tower.sources, f"a BEiT with the activation {words.act}")
    return as_beit(tower.tensors, tower.sources, prefix, heads and heads[0], words.eps, words.note)


def _dinov3(tower: Tower, prefix: str, words: Words, heads: tuple[int, str] | None) -> Candidate:
    """timm's Eva as DINOv3 uses it: positions turn queries and keys, and the class token is the pooled feature."""
    tensors = tower.tensors
    _join(tower, ("attn.q.weight", "attn.k.weight", "attn.v.weight"), "attn.qkv.weight")
    gated, biased = "blocks.0.mlp.gate.weight" in tensors, "blocks.0.attn.q.bias" in tensors
    _rename(
        tower,
        (r"\.attn\.([qv])\.bias$", r".attn.\1_bias"),
        (r"\.scale([12])$", r".gamma_\1"),
        (r"\.mlp\.gate\.", ".mlp.fc1_g."),
        (r"\.mlp\.up\.", ".mlp.fc1_x." if gated else ".mlp.fc1."),
        (r"^register_tokens$", "reg_token"),
    )
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    if words.act != ("silu" if gated else "gelu") and words.config:
        return Candidate(tensors, None, {}, prefix, tower.sources, f"a DINOv3 ViT with the activation {words.act}")
    first = tensors.get("blocks.0.mlp.fc1_x.weight", tensors.get("blocks.0.mlp.fc1.weight"))
    if first is None:
        return Candidate(tensors, None, {}, prefix, tower.sources, "a DINOv3 ViT whose first layer is not whole")
    options: dict[str, Any] = {
        "embed_dim": width,
        "depth": count(tensors, r"blocks\.(\d+)\.norm1\.weight"),
        "patch_size": patch,
        "num_heads": heads[0] if heads else width // 64,
        "mlp_ratio": first.shape[0] / width,
        "global_pool": "token",
        "norm_eps": words.eps,
    }
    if gated:  # timm builds two matrices rather than one only where their height is to be a multiple
        options |= {"swiglu_mlp": True, "swiglu_align_to": 1 if first.shape[0] % 8 else 8}
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    options |= {"num_reg_tokens": registers} if registers != 4 else {}
    theta = words.config.get("rope_theta", 100.0)
    options |= {"rope_temperature": float(theta)} if isinstance(theta, int | float) and theta != 100 else {}
    name = {384: "small", 768: "base", 1024: "large", 1280: "huge_plus"}.get(width, "base")
    arch = f"timm:vit_{name}_patch16_dinov3" + ("_qkvb" if biased else "")
    return Candidate(tensors, arch, options, prefix, tower.sources, words.note)


def clip(state: State) -> Iterator[Candidate]:
    """The vision towers of CLIP and SigLIP, alone or beside a text tower (which is left)."""
    for prefix, state_dict in behind(state.tensors, "embeddings.patch_embedding.weight"):
        tower = _tower(state_dict)
        if "blocks.0.attn.q.weight" not in tower.tensors:
            continue
        _shaped(tower)
        if (odd := _odd(tower, prefix, state, "CLIP's vision tower")) is not None:
            yield odd
            continue
        classed = "cls_token" in tower.tensors
        defaults = (1e-5, "quick_gelu") if classed else (1e-6, "gelu_pytorch_tanh")
        words = _words(state, *defaults, tower.tensors["patch_embed.proj.weight"].shape[0])
        _attention_pool(tower)
        read = _plain(tower, prefix, state, words)
        if "attn_pool.latent" in tower.tensors and read.arch is not None:
            read = replace(read, options={**read.options, "global_pool": "map"})
        read = published_clip(read, classed)
        if "preprocessor_config.json" not in state.file.beside:
            half = (0.5, 0.5, 0.5)
            read = replace(read, mean=CLIP_MEAN if classed else half, std=CLIP_STD if classed else half)
        yield read


def published_clip(read: Candidate, classed: bool = True) -> Candidate:
    """The same network under the name timm has for that tower, where it has one of these sizes."""
    size = re.fullmatch(r"timm:(vit_\w+_patch\d+)(_clip)?_224", read.arch or "")
    if size is None or "embed_dim" in read.options:
        return read
    quick = read.options.get("act_layer") == "quick_gelu"
    name = f"{size[1]}_{'clip' if classed else 'siglip'}_{'quickgelu_' if quick else ''}224"
    own = (
        {"pre_norm", "act_layer"} if classed and quick else {"pre_norm"} if classed else {"class_token", "global_pool"}
    )
    own -= {"pre_norm"} if size[2] else set()
    if not timm.is_model(name) or not own <= read.options.keys():
        return read
    return replace(read, arch=f"timm:{name}", options={k: v for k, v in read.options.items() if k not in own})


def _attention_pool(tower: Tower) -> None:
    """SigLIP's pooling by attention under timm's names: keys and values are one matrix, queries another."""
    for leaf in ("weight", "bias"):
        name = f"attn_pool.in.{leaf}"
        if name in tower.tensors:
            joined, source = tower.tensors.pop(name), tower.sources.pop(name)
            width = joined.shape[0] // 3
            tower.tensors[f"attn_pool.q.{leaf}"], tower.tensors[f"attn_pool.kv.{leaf}"] = joined[:width], joined[width:]
            tower.sources[f"attn_pool.q.{leaf}"] = tower.sources[f"attn_pool.kv.{leaf}"] = source


# ---------------------------------------------------------------------------------------------- convolutions, Swin

CONVNEXT = (
    (r"embeddings\.patch_embeddings\.(\w+)", r"stem.0.\1"),
    (r"embeddings\.layernorm\.(\w+)", r"stem.1.\1"),
    (r"encoder\.stages\.(\d)\.downsampling_layer\.([01])\.(\w+)", r"stages.\1.downsample.\2.\3"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.dwconv\.(\w+)", r"stages.\1.blocks.\2.conv_dw.\3"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.layernorm\.(\w+)", r"stages.\1.blocks.\2.norm.\3"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.pwconv([12])\.(\w+)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer_scale_parameter", r"stages.\1.blocks.\2.gamma"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.grn\.(\w+)", r"stages.\1.blocks.\2.mlp.grn.\3"),
    (r"layernorm\.(\w+)", r"head.norm.\1"),
)  # fmt: skip
RESNET = (
    (r"embedder\.embedder\.convolution\.(\w+)", r"conv1.\1"),
    (r"embedder\.embedder\.normalization\.(\w+)", r"bn1.\1"),
)  # fmt: skip
RESNET_BLOCK = re.compile(
    r"encoder\.stages\.(\d)\.layers\.(\d+)\.(?:layer\.([012])|(shortcut))\.(?:(convolution)|normalization)\.(\w+)"
)


def _by_rules(state_dict: Tensors, rules: tuple[tuple[str, str], ...]) -> Tower:
    tower = Tower({}, {}, [])
    for name, tensor in state_dict.items():
        new = _renamed(name, rules)
        if new is None and name.startswith(("embeddings.", "encoder.", "embedder.")):
            tower.unknown.append(name)
            continue
        tower.tensors[new or name], tower.sources[new or name] = tensor, name
    return tower


def convnext(state: State) -> Iterator[Candidate]:
    """ConvNeXt and its second version. All norms have timm's epsilon but the last, whose is config.json's."""
    for prefix, state_dict in behind(state.tensors, "encoder.stages.0.layers.0.dwconv.weight"):
        tower = _by_rules(state_dict, CONVNEXT)
        if tower.unknown:
            yield _none(tower, prefix, state, "a ConvNeXt")
            continue
        tensors = {k: v.flatten() if ".grn." in k else v for k, v in tower.tensors.items()}
        read = as_convnext(tensors, tower.sources, prefix)
        last = tensors.get("head.norm.weight")
        words = _words(state, 1e-12, "gelu", 0 if last is None else last.shape[0], "hidden_sizes")
        act = ACTIVATIONS.get(words.act)
        if read.arch is None or act is None:
            yield replace(read, arch=None, note=read.note or f"a ConvNeXt with the activation {words.act}")
            continue
        options = {**read.options, "norm_eps": {"head": words.eps}} | ({} if act == "gelu" else {"act_layer": act})
        yield replace(read, options=options)


def resnet(state: State) -> Iterator[Candidate]:
    """ResNets, whose bottlenecks have their stride in the 3x3 convolution as torchvision's have."""
    for prefix, state_dict in behind(state.tensors, "embedder.embedder.convolution.weight"):
        tower = _by_rules({_resnet_name(k) or k: v for k, v in state_dict.items()}, RESNET)
        sources = {(_resnet_name(k) or _renamed(k, RESNET) or k): k for k in state_dict}
        tower = tower._replace(sources=dict(sources))
        whole = state.file.beside.get("config.json", {})
        inner = whole.get("backbone_config")
        config = inner if isinstance(inner, Mapping) else whole
        kind = whole.get("model_type", "resnet")
        note = "" if kind == "resnet" else f"the ResNet of a network of the type {kind} (config.json); the rest is left"
        odd = [k for k in ("downsample_in_bottleneck", "downsample_in_first_stage") if config.get(k) is True]
        if tower.unknown:
            yield _none(tower, prefix, state, "a ResNet")
        elif odd or config.get("hidden_act", "relu") != "relu":
            note = f"a ResNet with {odd[0] if odd else config['hidden_act']} in config.json, which none of ours has"
            yield Candidate(tower.tensors, None, {}, prefix, tower.sources, note)
        else:
            yield as_resnet(tower.tensors, tower.sources, prefix, note)


def _resnet_name(name: str) -> str | None:
    match = RESNET_BLOCK.fullmatch(name)
    if match is None:
        return None
    stage, block, layer, shortcut, convolution, leaf = match.groups()
    if shortcut:
        part = "downsample.0" if convolution else "downsample.1"
    else:
        part = f"{'conv' if convolution else 'bn'}{int(layer) + 1}"
    return f"layer{int(stage) + 1}.{block}.{part}.{leaf}"


def swin(state: State) -> Iterator[Candidate]:
    """Swin and its second version; of the latter the window is in config.json alone."""
    for prefix, state_dict in behind(state.tensors, "embeddings.patch_embeddings.projection.weight"):
        if not any(re.match(r"encoder\.layers\.0\.blocks\.0\.", k) for k in state_dict):
            continue
        downsampled = {k: v for k, v in state_dict.items() if re.match(r"encoder\.layers\.\d\.downsample\.", k)}
        tower = _tower(
            {k: v for k, v in state_dict.items() if k not in downsampled}, r"encoder\.layers\.(\d)\.blocks\.(\d+)\."
        )
        for old, tensor in downsampled.items():
            new = re.sub(r"^encoder\.layers\.(\d)\.", lambda m: f"layers.{int(m[1]) + 1}.", old)
            tower.tensors[new], tower.sources[new] = tensor, old
        _rename(tower, (r"^blocks\.(\d)\.(\d+)\.", r"layers.\1.blocks.\2."))
        tower.unknown[:] = [k for k in tower.unknown if not k.startswith("embeddings.norm.")]
        for leaf in ("weight", "bias"):
            if f"embeddings.norm.{leaf}" in state_dict:
                tower.tensors[f"patch_embed.norm.{leaf}"] = state_dict[f"embeddings.norm.{leaf}"]
                tower.sources[f"patch_embed.norm.{leaf}"] = f"embeddings.norm.{leaf}"
        if tower.unknown:
            yield _none(tower, prefix, state, "a Swin transformer")
        else:
            yield _of_swin(tower, prefix, state)


def _of_swin(tower: Tower, prefix: str, state: State) -> Candidate:
    tensors = tower.tensors
    second = "layers.0.blocks.0.attn.logit_scale" in tensors
    _join(tower, ("attn.q.weight", "attn.k.weight", "attn.v.weight"), "attn.qkv.weight")
    if second:
        _rename(tower, (r"\.attn\.([qv])\.bias$", r".attn.\1_bias"))
    else:
        _join(tower, ("attn.q.bias", "attn.k.bias", "attn.v.bias"), "attn.qkv.bias")
    words = _words(state, 1e-5, "gelu", tensors["patch_embed.proj.weight"].shape[0], "embed_dim")
    if words.act != "gelu":
        return Candidate(
            tensors, None, {}, prefix, tower.sources, f"a Swin transformer with the activation {words.act}"
        )
    if second:
        return _swin_v2(tower, prefix, words)
    read = as_swin(tensors, tower.sources, prefix)
    size = words.config.get("image_size")
    options = dict(read.options) | ({"norm_eps": words.eps} if words.eps != 1e-5 else {})
    if isinstance(size, int) and "embed_dim" in options:
        options["img_size"] = size
    return replace(read, options=options)


def _swin_v2(tower: Tower, prefix: str, words: Words) -> Candidate:
    tensors = tower.tensors
    window, size = words.config.get("window_size"), words.config.get("image_size")
    pretrained = words.config.get("pretrained_window_sizes", [0, 0, 0, 0])
    depths = [count(tensors, rf"layers\.{i}\.blocks\.(\d+)\.norm1\.weight") for i in range(4)]
    heads = [len(tensors.get(f"layers.{i}.blocks.0.attn.logit_scale", ())) for i in range(4)]
    if not isinstance(window, int) or not isinstance(size, int) or not all(depths) or not all(heads):
        note = "a Swin transformer of the second version, whose window only a config.json beside it gives"
        return Candidate(tensors, None, {}, prefix, tower.sources, note)
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    options = {
        "embed_dim": width,
        "depths": depths,
        "num_heads": heads,
        "window_size": window,
        "img_size": size,
        "patch_size": patch,
        "pretrained_window_sizes": list(pretrained),
    }
    options |= {"norm_eps": words.eps} if words.eps != 1e-5 else {}
    return Candidate(tensors, "timm:swinv2_tiny_window8_256", options, prefix, tower.sources, words.note)


# ------------------------------------------------------------------------------------------------- what is none of it


def other(state: State) -> Iterator[Candidate]:
    """Says what a file is that no layout reads: a language model, a segmenter, a detector of transformers'."""
    config = state.file.beside.get("config.json", {})
    kind = config.get("model_type")
    named = f"a transformers network of the type {kind} (config.json)" if isinstance(kind, str) else ""
    if any(re.search(r"(word_embeddings|embed_tokens|wte|shared)\.weight$", k) for k in state.tensors):
        named = f"{named or 'a network'} with a table of words: a language model, which is shown no images"
    elif any(re.search(r"(^|\.)mask_decoder\.", k) for k in state.tensors):
        named = f"{named or 'SAM'}, a segmenter whose encoder attends in windows, which no layout reads"
    if named:
        yield Candidate({}, None, note=named)
