"""Layouts of mmpretrain's, mmselfsup's and mmcls's vision transformers. Their ResNets have torchvision's names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from evalsuite.checkpoints.layouts import Candidate, as_beit, as_vit, behind, renamed
from evalsuite.checkpoints.reading import State

__all__ = ["vit"]

INSIDE = (
    (r"ln([12])\.(\w+)", r"norm\1.\2"),
    (r"attn\.gamma1\.weight", "ls1.gamma"),
    (r"ffn\.gamma2\.weight", "ls2.gamma"),
    (r"ffn\.layers\.0\.0\.(\w+)|ffn\.w12\.(\w+)", r"mlp.fc1.\1\2"),
    (r"ffn\.layers\.1\.(\w+)|ffn\.w3\.(\w+)", r"mlp.fc2.\1\2"),
)
OUTSIDE = (
    (r"patch_embed\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"pre_norm\.(\w+)", r"norm_pre.\1"),
    (r"(?:ln1|norm1)\.(\w+)", r"norm.\1"),
    (r"(?:ln2|norm2)\.(\w+)", r"fc_norm.\1"),
)


def vit(state: State) -> Iterator[Candidate]:
    """ViT, MAE, MoCo v3, distilled DeiT, DINOv2 and BEiT: ``layers.0.attn.qkv``, ``layers.0.ffn.layers.0.0``."""
    for prefix, state_dict in behind(state.tensors, "patch_embed.projection.weight"):
        parts = {"layers.0.attn.qkv.weight", "layers.0.ln1.weight"}
        if not parts <= state_dict.keys() or state_dict["patch_embed.projection.weight"].ndim != 4:
            continue
        tensors, sources = renamed(state_dict, _timm_name)
        if "norm.weight" in tensors and "fc_norm.weight" in tensors:
            note = "a ViT with a norm before and one after averaging (final_norm and avg_featmap), which timm has not"
            yield Candidate(tensors, None, {}, prefix, sources, note)
        elif "blocks.0.attn.q_bias" in tensors or "pos_embed" not in tensors:
            yield as_beit(tensors, sources, prefix)
        else:
            yield _heads(as_vit(tensors, sources, prefix, state), state)


def _timm_name(name: str) -> str | None:
    if name.endswith(("relative_position_index", "mask_token")):
        return None
    inner = re.match(r"layers\.(\d+)\.", name)
    rest = name[inner.end() :] if inner else name
    for pattern, to in INSIDE if inner else OUTSIDE:
        if match := re.fullmatch(pattern, rest):
            rest = match.expand(to)
            break
    return f"blocks.{inner[1]}.{rest}" if inner else rest


def _heads(read: Candidate, state: State) -> Candidate:
    """The numbers of heads that its configurations have where they are not a 64th of the width."""
    width = read.options.get("embed_dim", 384 if read.arch and "small" in read.arch else 0)
    heads = None
    if width == 384 and any("momentum_encoder." in k for k in state.tensors):
        heads = 12  # mocov3-small
    elif (width, read.options.get("depth")) == (768, 8):
        heads = 8  # small, of 768 channels and 8 layers
    if heads is None:
        return read
    guesses = {k: v for k, v in read.guesses.items() if k != "num_heads"}
    return replace(read, options={**read.options, "num_heads": heads}, guesses=guesses)
