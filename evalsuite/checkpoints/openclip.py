"""The layout of OpenAI's CLIP and of OpenCLIP: a vision transformer whose tensors torch's own attention names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from evalsuite.checkpoints.huggingface import CLIP_MEAN, CLIP_STD, published_clip
from evalsuite.checkpoints.layouts import Candidate, as_vit, behind, renamed
from evalsuite.checkpoints.reading import State

__all__ = ["vit"]

OUTSIDE = {
    "conv1.weight": "patch_embed.proj.weight",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
}
HEADS = {1280: 16, 1408: 16, 1664: 16}  # OpenCLIP's model_configs; of the others a head has 64 channels
OPENAI = {"input_resolution", "context_length", "vocab_size"}  # numbers that only OpenAI's own files keep beside


def vit(state: State) -> Iterator[Candidate]:
    """The vision tower, alone or under ``visual.``; the text tower and the projection are left."""
    for prefix, state_dict in behind(state.tensors, "transformer.resblocks.0.attn.in_proj_weight"):
        if "conv1.weight" not in state_dict or "class_embedding" not in state_dict:
            continue  # a text tower
        tensors, sources = renamed(state_dict, _timm_name)
        tensors["cls_token"] = tensors["cls_token"].reshape(1, 1, -1)
        tensors["pos_embed"] = tensors["pos_embed"][None]
        read = as_vit(tensors, sources, prefix, state)
        if read.arch is None:
            yield read
            continue
        width = tensors["patch_embed.proj.weight"].shape[0]
        act, heads, why, certain = _words(state, width)
        options = {**read.options, "norm_eps": 1e-5, "num_heads": heads} | ({"act_layer": act} if act != "gelu" else {})
        beside = "open_clip_config.json" in state.file.beside
        seen: dict[str, Any] = {} if beside else {"mean": CLIP_MEAN, "std": CLIP_STD}
        guesses = {} if certain else {"act_layer": (act, "OpenCLIP's; OpenAI's weights have quick_gelu")}
        yield published_clip(replace(read, options=options, note=why, guesses=guesses, **seen))


def _timm_name(name: str) -> str | None:
    name = OUTSIDE.get(name, name)
    name = re.sub(r"^ln_pre\.", "norm_pre.", re.sub(r"^ln_post\.", "norm.", name))
    name = re.sub(r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1.", name)
    name = re.sub(r"\.attn\.in_proj_(\w+)$", r".attn.qkv.\1", name).replace(".attn.out_proj.", ".attn.proj.")
    name = (
        re.sub(r"\.ln_([12])\.", r".norm\1.", name)
        .replace(".mlp.c_fc.", ".mlp.fc1.")
        .replace(".mlp.c_proj.", ".mlp.fc2.")
    )
    return re.sub(r"\.ls_([12])\.gamma$", r".ls\1.gamma", name)


def _words(state: State, width: int) -> tuple[str, int, str, bool]:
    """The activation, the heads, by whose word, and whether that word is of this file."""
    config = state.file.beside.get("open_clip_config.json", {}).get("model_cfg", {})
    config = config if isinstance(config, Mapping) else {}
    tower = config.get("vision_cfg")
    tower = tower if isinstance(tower, Mapping) and tower.get("width") == width else {}
    head = tower.get("head_width", 64)
    heads = width // head if isinstance(head, int) and head > 0 and width % head == 0 else width // 64
    if tower:
        return (
            ("quick_gelu" if config.get("quick_gelu") is True else "gelu"),
            heads,
            "as open_clip_config.json beside says",
            True,
        )
    heads = HEADS.get(width, max(width // 64, 1))
    if state.tensors.keys() >= OPENAI:
        return "quick_gelu", heads, "OpenAI's own file, whose activation is quick_gelu", True
    return "gelu", heads, f"{heads} attention heads, as OpenCLIP's configurations have for this width", False
