"""What the shapes of a ResNet for small images say of its architecture: ``small:`` names and options.

Of He et al.'s networks for CIFAR several forms are in use that have the same tensors and compute other features. Where
the names show whose code it is, that code's form is taken; the note says what else it could be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

__all__ = ["SMALL", "Small", "small_resnet"]

Shapes = Mapping[str, tuple[int, ...]]
# blocks by stage, and whether they are bottlenecks, of ``small:`` networks of four stages
SMALL: dict[tuple[tuple[int, ...], bool], str] = {
    ((1, 1, 1, 1), False): "resnet10",
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
ZEROS = {"both": "zeros on both sides of the channels", "end": "zeros behind the channels"}
SEES = {"input": "the block's input", "activated": "the activated input"}


class Small(NamedTuple):
    """An architecture of the scheme ``small``, its options, what was assumed, and its final norm's name in the file."""

    arch: str | None
    options: dict[str, Any]
    note: str = ""
    norm: str = ""


def small_resnet(shapes: Shapes, depths: tuple[int, ...], known: Mapping[str, Any]) -> Small | None:
    """The small network with a 3x3 stem that has these ``shapes`` and blocks by stage, under torchvision's names.

    ``known`` are options that follow from the file's naming. None for a network with another stem.
    """
    stem, inner = shapes.get("conv1.weight", ()), shapes.get("layer1.0.conv2.weight", (0, 0))
    if stem[1:] != (3, 3, 3) or not depths:
        return None
    if inner[0] % stem[0] or shapes["layer1.0.conv1.weight"][0] != inner[1]:
        return Small(
            None, {}, f"a ResNet of depths {depths} with a 3x3 stem whose stages are not of our small networks"
        )
    width, widen, bottleneck = stem[0], inner[0] // stem[0], "layer1.0.conv3.weight" in shapes
    four = SMALL.get((depths, bottleneck))
    even = len(depths) == 3 and len(set(depths)) == 1 and not bottleneck  # what names of 6n+2 layers stand for
    scaled = {k: v for k, v in (("width", width), ("widen", widen)) if v != {"width": 16, "widen": 1}[k]}
    shape = {"layers": list(depths), **scaled} | ({"bottleneck": True} if bottleneck else {})
    layers = 6 * depths[0] + 2
    named = even and f"resnet{layers}" not in SMALL.values()
    if not _preactivated(shapes):
        if four and widen == 1:
            return Small(f"small:{four}", {} if width == 64 else {"width": width})
        options, note = _shortcuts(shapes, known)
        if named:
            return Small(f"small:resnet{layers}", scaled | options, note)
        return Small("small:resnet", shape | options, note)
    options, note, norm = _preactivation(shapes, depths, bottleneck, known)
    if even and width == 16 and widen > 1:
        return Small(f"small:wrn{layers + 2}_{widen}", options, note, norm)
    if four and (width, widen) == (64, 1):
        return Small(f"small:pre{four}", options, note, norm)
    if named:
        return Small(f"small:preresnet{layers}", scaled | options, note, norm)
    return Small("small:preresnet", shape | options, note, norm)


def _preactivated(shapes: Shapes) -> bool:
    """Whether norms come before convolutions: where the width changes they then have the channels of the input."""
    blocks = {m[1] for k in shapes if (m := re.match(r"(layer\d\.0\.)conv1\.weight", k))}
    sizes = ((shapes.get(f"{b}bn1.weight", (0,))[0], *shapes[f"{b}conv1.weight"][:2]) for b in blocks)
    return any(norm == inside != outside for norm, outside, inside in sizes)


def _projected(shapes: Shapes) -> Literal["A", "B"]:
    return "B" if any(".downsample." in k for k in shapes) else "A"


def _shortcuts(shapes: Shapes, known: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if _projected(shapes) == "B":
        return {"shortcut": "B"}, ""
    options = {"shortcut": "A"} | {k: v for k, v in known.items() if k == "zeros"}
    zeros = ZEROS[options.get("zeros", "both")]
    return options, f"shortcuts without tensors are option A, taken to put {zeros} (option zeros)"


def _preactivation(
    shapes: Shapes, depths: tuple[int, ...], bottleneck: bool, known: Mapping[str, Any]
) -> tuple[dict[str, Any], str, str]:
    """Options of a pre-activated network: without a final norm it is taken as kuangliu/pytorch-cifar's, with biases as
    meliketoy/wide-resnet.pytorch's, else as bearpaw/pytorch-classification's."""
    out = shapes[f"layer{len(depths)}.0.conv{3 if bottleneck else 2}.weight"][:1]
    norm = next((n for n in ("bn1", "bn", "norm") if shapes.get(f"{n}.weight") == out), "")
    options: dict[str, Any] = {"shortcut": _projected(shapes), "shortcut_from": "input" if norm else "activated"}
    options |= {} if norm else {"final_norm": False}
    options |= {"bias": True, "stride_in": 2} if "conv1.bias" in shapes else {}
    options |= known
    note = f"pre-activated, shortcuts taken to see {SEES[options['shortcut_from']]} (option shortcut_from)"
    return options, note, norm
