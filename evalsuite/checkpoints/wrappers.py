"""What wrappers of modules leave in the names of tensors, taken off at any depth, and parametrisations put together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Unwrapped", "flattened", "unwrapped"]

# a component of a name that a wrapper puts there, and what that is
COMPONENTS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
OTHER = re.compile(r"_\w+_(module|mod)")  # as wrappers name what they hold: with a mark of what is private
DATA_PARALLEL = "data parallel"  # "module", which in front is a prefix as any other
FLAT = r"(^|\.)(_fsdp_)?_?flat_param(_\d+)?$"  # torch's FSDP and fairscale's, tensors joined end to end
# torch.nn.utils.parametrizations, and what came before it
WEIGHT_NORMS = {".parametrizations.{}.original0": ".parametrizations.{}.original1", ".weight_g": ".weight_v"}
SPECTRAL = (".parametrizations.{}.original", ".parametrizations.{}.0._u", ".parametrizations.{}.0._v")


@dataclass(frozen=True)
class Unwrapped:
    """Tensors under names without wrappers, the file's names where they differ, and which wrappers there were."""

    tensors: Mapping[str, Tensor]
    names: Mapping[str, str] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()


def unwrapped(tensors: Mapping[str, Tensor]) -> Unwrapped:
    """Take wrappers off the names of ``tensors``, and put weights together that were kept in parts.

    A name stays as it is where another tensor has the shorter one.
    """
    taken: dict[str, None] = {}
    names: dict[str, str] = {}
    for name in tensors:
        short, wrappers = _short(name)
        if short in names or (short != name and short in tensors):
            short, wrappers = name, []
        names[short] = name
        taken |= dict.fromkeys(wrappers)
    given = {short: tensors[name] for short, name in names.items()}
    whole, parts = _composed(given)
    if parts:
        taken |= dict.fromkeys(parts)
    renamed = {short: name for short, name in names.items() if short != name and short in whole}
    return Unwrapped(whole, renamed, tuple(taken))


def flattened(names: Iterable[str]) -> str | None:
    """The first name that is FSDP's for many tensors joined end to end; nothing separates them any more."""
    return next((name for name in names if re.search(FLAT, name)), None)


def _short(name: str) -> tuple[str, list[str]]:
    components = name.split(".")
    taken = [c for c in components[:-1] if c in COMPONENTS or OTHER.fullmatch(c)]
    wrappers = [COMPONENTS.get(c, c) for c in taken]
    kept = [c for c in components if c not in taken]
    if "module" in kept[1:-1]:
        wrappers.append(DATA_PARALLEL)
        kept = [kept[0], *(c for c in kept[1:-1] if c != "module"), kept[-1]]
    return ".".join(kept), wrappers


def _composed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights from length and direction (weight normalisation) or from a matrix and its norm (spectral)."""
    whole, kinds = dict(tensors), []
    for short, long in WEIGHT_NORMS.items():
        for stem, leaf in _stems(whole, short):
            length, direction = whole[stem + short.format(leaf)], whole.get(stem + long.format(leaf))
            if direction is not None and _is_length(length, direction):
                del whole[stem + short.format(leaf)], whole[stem + long.format(leaf)]
                whole[f"{stem}.{leaf}"] = _scaled(length, direction)
                kinds.append("weight normalisation")
    for stem, leaf in _stems(whole, SPECTRAL[0]):
        parts = [whole.get(stem + part.format(leaf)) for part in SPECTRAL]
        weight, left, right = parts
        if weight is not None and left is not None and right is not None:
            for part in SPECTRAL:
                del whole[stem + part.format(leaf)]
            matrix = weight.flatten(1).float()
            if matrix.shape == (len(left), len(right)):
                whole[f"{stem}.{leaf}"] = weight / torch.dot(left.float(), matrix @ right.float()).to(weight.dtype)
                kinds.append("spectral normalisation")
    return whole, kinds


def _stems(tensors: Mapping[str, Tensor], pattern: str) -> list[tuple[str, str]]:
    """(module, parameter) of every name of the form ``pattern``."""
    form = re.escape(pattern).replace(r"\{\}", r"(\w+)")
    matches = (re.fullmatch(f"(.+){form}", name) for name in tensors)
    return [(m[1], m[2] if len(m.groups()) > 1 else "weight") for m in matches if m]


def _is_length(length: Tensor, direction: Tensor) -> bool:
    if length.ndim == 0:
        return True
    pairs = list(zip(length.shape, direction.shape, strict=False))
    return length.ndim == direction.ndim and 1 in length.shape and all(one in (1, other) for one, other in pairs)


def _scaled(length: Tensor, direction: Tensor) -> Tensor:
    """``direction`` with the norm ``length``, over all dimensions in which the length has one number (torch's
    weight_norm)."""
    over = [d for d in range(direction.ndim) if length.ndim == 0 or length.shape[d] == 1]
    scale: Tensor = length / direction.norm(2, over, keepdim=True)
    return direction * scale
