"""The published files of SLATE and of the object-centric RL benchmark, as architectures of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from evalsuite.checkpoints import Candidate, State
from evalsuite.checkpoints.layouts import vit

__all__ = ["ocrl", "ocrl_encoders", "slate"]

Tensors = Mapping[str, Tensor]
UNTOLD = "unless told otherwise, {} slots and {} iterations, which no tensor shows (options slots, iterations)"
SLATES = {"positional_encoder.pe": 3, "slot_attn.slot_mu": 3, "out.weight": 2}
PARTS = {  # of OCRL's SLATE and of ours
    "_dvae._encoder": "dvae.encoder",
    "_dvae._decoder": "dvae.decoder",
    "_enc._encoder": "cnn",
    "_slotattn": "slot_attn",
    "_slotproj": "slot_proj",
    "_dict": "dictionary",
    "_z_pos": "positional_encoder",
    "_tfdec": "tf_dec",
    "_out": "out",
}


def slate(state: State) -> Iterator[Candidate]:
    """singhgautam/slate: our SLATE bears its names. Its own default is three slots."""
    for prefix, found in _behind(state.tensors, "dvae.encoder.0.m.weight"):
        if not _shaped(found, **SLATES):
            continue
        note = UNTOLD.format(3, 3)
        yield Candidate(found, "objects:slate", {"slots": 3} | _sizes(found), prefix, note=note)


def ocrl(state: State) -> Iterator[Candidate]:
    """jsikyoon/OCRL: its SLATE; and its Slot Attention, which is that without its transformer and with a decoder
    ``_dec`` of its own. Pixels are in [0, 1]. Its published commands have six slots, and seven iterations of Slot
    Attention."""
    for prefix, found in _behind(state.tensors, "_enc._encoder.0.m.weight"):
        alone = any(name.startswith("_dec.") for name in found)
        sources = {new: name for name in found if (new := (_discovery if alone else _slate)(name)) is not None}
        tensors = {new: found[name] for new, name in sources.items()}
        if not _shaped(tensors, **({"slots.slot_mu": 3} if alone else SLATES), **{"position.dense.weight": 4}):
            continue
        tensors["position.dense.weight"] = _turned(tensors["position.dense.weight"])
        if alone:
            options = {"iterations": 7, "rectified": False, "channels": len(tensors["position.dense.weight"])}
            black, white = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
            note = UNTOLD.format(6, 7)
            options |= _attention(tensors, "slots")
            yield Candidate(
                tensors, "objects:slot-attention", options, prefix, sources, note, black, white, _size(found)
            )
        else:
            options = _sizes(tensors) | {"channels": len(tensors["position.dense.weight"])}
            yield Candidate(tensors, "objects:slate-pixels", options, prefix, sources, UNTOLD.format(6, 3))


def ocrl_encoders(state: State) -> Iterator[Candidate]:
    """jsikyoon/OCRL: what it compares slots with, a VAE and a masked autoencoder, and its IODINE. Pixels are in
    [0, 1]; IODINE's published configuration has six slots and five iterations."""
    for prefix, found in _behind(state.tensors, "_enc._encoder.0.m.weight"):
        if _shaped(found, **{"_mu.weight": 2}):
            yield _vae(found, prefix)
    for prefix, found in _behind(state.tensors, "refine.lstm.weight_hh"):
        if _shaped(found, **{"slot_mean_init": 3, "decoder.conv.weight": 4}):
            sources = {name.replace("mlp.layers.0.", "mlp."): name for name in found if name != "slot_init"}
            options = {
                "width": found["slot_mean_init"].shape[-1],
                "channels": found["decoder.conv.weight"].shape[1],
                "hidden": found["refine.lstm.weight_hh"].shape[1],
            }
            tensors = {new: found[name] for new, name in sources.items()}
            yield Candidate(tensors, "objects:iodine", options, prefix, sources, UNTOLD.format(6, 5))
    for candidate in vit(state):
        if candidate.prefix.endswith("_mae."):
            yield replace(candidate, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _vae(found: Tensors, prefix: str) -> Candidate:
    """Our convolutions and rectifiers alternate in one list, the last is alone."""
    sources = {f"mean.{leaf}": f"_mu.{leaf}" for leaf in ("weight", "bias") if f"_mu.{leaf}" in found}
    for name in found:
        if match := re.fullmatch(r"_enc\._encoder\.(\d+)\.(?:m\.)?(weight|bias)", name):
            sources[f"cnn.{2 * int(match[1])}.{match[2]}"] = name
    tensors = {new: found[name] for new, name in sources.items()}
    latent, places = found["_mu.weight"].shape
    if places != 64 * 16:
        note = f"OCRL's VAE with a map of {places // 64} places, where objects:vae has 16"
        return Candidate(tensors, None, {}, prefix, sources, note)
    halvings = sum(tensor.shape[2:] == (2, 2) for tensor in tensors.values())
    return Candidate(tensors, "objects:vae", {"size": 4 << halvings, "latent": latent}, prefix, sources)


def _behind(tensors: Tensors, anchor: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every prefix before the name ``anchor``, with the tensors that carry it, under their names without it."""
    for key in tensors:
        if key == anchor or key.endswith("." + anchor):
            prefix = key.removesuffix(anchor)
            yield prefix, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _size(found: Tensors) -> tuple[int, int] | None:
    """That of the map of distances to the sides (1, 4, H, W), which OCRL's files hold."""
    maps = found.get("_enc_pos.linear_position_embedding")
    return None if maps is None or maps.ndim != 4 else (maps.shape[2], maps.shape[3])


def _shaped(found: Tensors, **dimensions: int) -> bool:
    """Whether these tensors are there, with so many dimensions, none of them empty."""
    known = {name: found[name] for name in dimensions if name in found}
    return all(name in known and known[name].ndim == n and known[name].numel() for name, n in dimensions.items())


def _attention(found: Tensors, part: str) -> dict[str, Any]:
    hidden = found.get(f"{part}.slot_attention.mlp.0.bias")
    return {"width": found[f"{part}.slot_mu"].shape[-1]} | ({} if hidden is None else {"hidden": len(hidden)})


def _sizes(found: Tensors) -> dict[str, Any]:
    """The options of a SLATE that shapes show."""
    attention = _attention(found, "slot_attn")
    attention["slot_width"] = attention.pop("width")  # ``width`` is the transformer's
    words, width = found["out.weight"].shape
    blocks = {match[1] for name in found if (match := re.match(r"tf_dec\.blocks\.(\d+)\.", name))}
    side = math.isqrt(max(found["positional_encoder.pe"].shape[1] - 1, 1))
    return {"words": words, "width": width, "blocks": len(blocks), "size": 4 * side} | attention


def _slate(name: str) -> str | None:
    special = {"_bos_token._bos_token": "bos.token"} | _position("_enc_pos")
    if name in special:
        return special[name]
    return next((ours + name[len(part) :] for part, ours in PARTS.items() if name.startswith(part + ".")), None)


def _discovery(name: str) -> str | None:
    """Our convolutions and rectifiers alternate in one list: ``_enc._encoder.1.m.weight`` is ``cnn.2.weight``."""
    if match := re.fullmatch(r"_enc\._encoder\.([0-3])\.(?:m\.)?(weight|bias)", name):
        return f"cnn.{2 * int(match[1])}.{match[2]}"
    if name.startswith("_slotattn."):
        return name.replace("_slotattn", "slots", 1)
    return _position("_enc_pos").get(name)


def _position(part: str) -> dict[str, str]:
    return {f"{part}.channels_map.{leaf}": f"position.dense.{leaf}" for leaf in ("weight", "bias")}


def _turned(kernel: Tensor) -> Tensor:
    """The kernel (C, 4, 1, 1) over the distances to the bottom, top, right and left as a matrix over those to the top,
    left, bottom and right. One of another shape is left as it is, and will not fit."""
    return kernel.flatten(1)[:, [1, 3, 0, 2]] if kernel.shape[1:] == (4, 1, 1) else kernel
