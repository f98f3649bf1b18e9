"""Which of timm's vision transformers a set of tensors is, and the number of heads that none of them shows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evalsuite.checkpoints import configs, origins
from evalsuite.checkpoints.reading import State

__all__ = ["PLAIN", "Heads", "heads", "nearest", "usual"]

SIZES: dict[str, tuple[int, int, int]] = {  # width, depth and heads by the word in timm's names
    "tiny": (192, 12, 3), "small": (384, 12, 6), "medium": (512, 12, 8), "mediumd": (512, 20, 8),
    "betwixt": (640, 12, 10), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16),
    "giant": (1408, 40, 16),
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "num_heads": 12, "patch_size": 16, "img_size": 224, "mlp_ratio": 4.0, "init_values": None, "qkv_bias": True,
    "qk_norm": False, "class_token": True, "no_embed_class": False, "reg_tokens": 0, "pre_norm": False,
    "global_pool": "token", "fc_norm": None,
}  # fmt: skip
SCALED = {"init_values": 1.0}  # its value comes with the weights
POOLED = {"class_token": False, "global_pool": "avg"}
GATED, GATED_REGISTERS = "vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"


def _registered() -> Iterator[tuple[str, dict[str, Any]]]:
    """timm's names with their options, the plain ones first. tests hold them against timm."""
    giant = {"mlp_ratio": 48 / 11}
    for size, patches in (
        ("tiny", (16,)), ("small", (16, 32, 8)), ("base", (16, 32, 8)), ("large", (16, 32, 14)), ("huge", (14,)),
        ("giant", (14,)),
    ):  # fmt: skip
        for patch in patches:
            more = giant if size == "giant" else {}
            yield f"vit_{size}_patch{patch}_224", {**_size(size), "patch_size": patch, **more}
    for size in ("small", "base", "large"):
        dinov2 = {**_size(size), "patch_size": 14, "img_size": 518, **SCALED}
        yield f"vit_{size}_patch14_dinov2", dinov2
        yield f"vit_{size}_patch14_reg4_dinov2", {**dinov2, "reg_tokens": 4, "no_embed_class": True}
    gated = {"embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 16 / 3}
    gated |= {"patch_size": 14, "img_size": 518, **SCALED}
    yield GATED, gated
    yield GATED_REGISTERS, {**gated, "reg_tokens": 4, "no_embed_class": True}
    for size, patch in (("base", 16), ("base", 32), ("large", 14), ("huge", 14), ("giant", 14), ("medium", 16)):
        more = giant if size == "giant" else {}
        yield f"vit_{size}_patch{patch}_clip_224", {**_size(size), "patch_size": patch, "pre_norm": True, **more}
    for size, patch in (("small", 16), ("medium", 16), ("base", 16), ("large", 16), ("huge", 14)):
        yield f"deit3_{size}_patch{patch}_224", {**_size(size), "patch_size": patch, "no_embed_class": True, **SCALED}
    unbiased = {"qkv_bias": False, "fc_norm": False, **POOLED, **SCALED}
    yield "vit_medium_patch16_gap_256", {**_size("medium"), "img_size": 256, **unbiased}
    yield "vit_betwixt_patch16_gap_256", {**_size("betwixt"), "img_size": 256, **unbiased}
    registers = {"reg_tokens": 4, "no_embed_class": True, "img_size": 256, "fc_norm": True, **POOLED, **SCALED}
    for size in ("medium", "mediumd", "betwixt"):
        yield f"vit_{size}_patch16_reg4_gap_256", {**_size(size), **registers}
    for size in ("base", "small", "tiny"):
        yield f"deit_{size}_distilled_patch16_224", _size(size)


def _size(size: str) -> dict[str, Any]:
    return dict(zip(("embed_dim", "depth", "num_heads"), SIZES[size], strict=True))


REGISTERED = dict(_registered())


def _kind(name: str) -> str:
    """What no option of timm's changes: the class that a name builds."""
    return "distilled" if "_distilled_" in name else "gated" if name in (GATED, GATED_REGISTERS) else "plain"


def nearest(options: Mapping[str, Any], kind: str = "plain") -> tuple[str, dict[str, Any], str]:
    """timm's name for a ViT of these ``options`` (``embed_dim``, ``depth`` and what departs from a plain ViT-B/16).

    Gives the registered architecture of that width and depth from which the fewest options differ, the options that
    do, and a note where no registered one has that width and depth. ``kind`` is "plain", "gated" (MLPs of two branches
    multiplied) or "distilled" (with DeiT's second token).
    """
    wanted = DEFAULTS | dict(options)
    rows = {name: DEFAULTS | row for name, row in REGISTERED.items() if _kind(name) == kind}
    alike = [n for n, row in rows.items() if all(row[k] == wanted[k] for k in ("embed_dim", "depth"))]
    heads_option, note = {}, ""
    if not alike:
        heads_option = {"num_heads": wanted["num_heads"]}
        note = f"custom: timm registers no such ViT of width {wanted['embed_dim']} and depth {wanted['depth']}"
        base = [n for n, row in rows.items() if row["embed_dim"] == 768] or [GATED]
        alike = [n for n in base if rows[n]["pre_norm"] == wanted["pre_norm"]] or base
    name = min(alike, key=lambda n: len(_departures(wanted, rows[n])))
    return name, _departures(wanted, rows[name]) | heads_option, note


def _departures(wanted: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    def same(one: Any, other: Any) -> bool:
        numbers = isinstance(one, float) and isinstance(other, int | float)
        return math.isclose(one, other, rel_tol=1e-6) if numbers else bool(one == other)

    return {k: v for k, v in wanted.items() if not same(v, row[k])}


# ------------------------------------------------------------------------------------------------------------- heads


class Heads(NamedTuple):
    """The number of attention heads, by whose word, and whether that is a guess."""

    number: int
    why: str
    guess: bool = False


PLAIN = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
# heads by width in the official code of a layout: dino/vision_transformer.py, ibot/models/vision_transformer.py,
# dinov2/models/vision_transformer.py, mae/models_mae.py, moco-v3/vits.py, msn/src/deit.py, ijepa/src/models
OFFICIAL: dict[str, dict[int, int]] = {
    "dino": {192: 3, 384: 6, 768: 12},
    "ibot": {192: 3, 384: 6, 768: 12, 1024: 16},
    "dinov2": {384: 6, 768: 12, 1024: 16, 1536: 24},
    "mae": {768: 12, 1024: 16, 1280: 16},
    "moco-v3": {384: 12, 768: 12, 1024: 16, 1280: 16},
    "msn": {192: 3, 384: 6, 768: 12, 1024: 16},
    "ijepa": {**PLAIN, 1408: 16},
}
# solo-learn/solo/backbones/vit: vit_mocov3.py and vit_mae.py; of its other methods it takes timm's
SOLO_TWELVE = {192: 12, 384: 12, 768: 12, 1024: 16, 1280: 16}
WIDE = {1152: 16, 1408: 16, 1536: 24, 1664: 16}  # timm's, where it is not one for 64 channels


# names in use whose heads are known by the code they come from: mae and its fine-tuning, deit and msn, dinov2,
# mmpretrain. A bare vit_tiny or vit_small is timm's and DINO's, and MoCo v3's with twice as many
NAMED = (
    (r"(^|[_-])(vit|deit|dinov2)[_-]?(b|base|l|large|h|huge)([_-]|$|\d)", PLAIN),
    (r"(^|[_-])(deit|dinov2)[_-]?(t|tiny|s|small)([_-]|$|\d)", PLAIN),
    (r"(^|[_-])mocov3[_-](s|small|b|base|l|large)$", OFFICIAL["moco-v3"]),
)


def heads(width: int, state: State, prefix: str, positions: Tensor) -> Heads:
    """The number of heads of a ViT: by the word of the file, else by the official code of its layout, else guessed."""
    origin = origins.origin(state, prefix)
    said = configs.heads(state.file, width)
    if said is not None:
        return Heads(*said)
    if origin == "solo-learn" and (method := configs.solo_method(state.file)):
        twelve = method in ("mocov3", "mae")
        number = (SOLO_TWELVE if twelve else PLAIN).get(width)
        if number:
            return Heads(number, f"{number} attention heads, as solo-learn's vit has for {method}")
    if number := OFFICIAL.get(origin, {}).get(width):
        return Heads(number, f"{number} attention heads, as the official code of {origin} has")
    for name, where in configs.names(state.file):
        for pattern, table in NAMED:
            if width in table and re.search(pattern, name) and _size_of(name, width):
                return Heads(table[width], f"{table[width]} attention heads, as {name} has ({where})")
    if width in SOLO_TWELVE and _fixed_by_moco(positions):
        number = SOLO_TWELVE[width]
        return Heads(number, f"{number} attention heads, as MoCo v3 has, whose fixed positions these are")
    return usual(width)


def _size_of(name: str, width: int) -> bool:
    """Whether a name's word for its size, or the letter of it, is that of a width."""
    words = [size for size, (w, _, _) in SIZES.items() if w == width]
    return any(re.search(rf"[_-]({size}|{size[0]})([_-]|$|\d)", name) for size in words)


def usual(width: int) -> Heads:
    """The number of heads that timm has for a width, else one for 64 channels: a guess."""
    known = {w: h for w, _, h in SIZES.values()} | WIDE
    why = "timm's for this width" if width in known else "one for 64 channels"
    return Heads(known.get(width) or _divisor(width), why, guess=True)


def _divisor(width: int) -> int:
    """The number of heads next to one for 64 channels that divides the width."""
    return next(n for n in range(max(width // 64, 1), 0, -1) if width % n == 0)


def _fixed_by_moco(positions: Tensor) -> bool:
    """Whether a table of positions is the fixed one of MoCo v3 (vits.py): sines and cosines, rows before columns."""
    length, width = positions.shape[-2] - 1, positions.shape[-1]
    side = math.isqrt(max(length, 0))
    if positions.is_meta or side < 2 or side * side != length or width % 4:
        return False
    rates = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    table = torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], 1)
    given = positions[0].float()
    return bool(given[0].abs().max() < 1e-3 and (given[1:] - table).abs().max() < 1e-2)
