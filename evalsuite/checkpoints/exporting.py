"""A backbone in a file that torchvision, timm or detectron2 reads as it is, under its own names."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from evalsuite.backbone import Backbone, build
from evalsuite.checkpoints.loading import load_backbone
from evalsuite.checkpoints.matching import heads_of
from evalsuite.checkpoints.reading import NOTE
from evalsuite.errors import BackboneError, UsageError
from evalsuite.files import atomic

if TYPE_CHECKING:
    from evalsuite.hooks import Registry

__all__ = ["TARGETS", "Exported", "convert"]

# who reads the file, and by which endings it knows how
TARGETS: dict[str, tuple[str, ...]] = {
    "torchvision": (".safetensors",),
    "timm": (".safetensors",),
    "detectron2": (".pkl", ".pth"),
}
# torchvision's ResNets, whose tensors timm calls alike, with detectron2's depth, groups and width of a group
RESNETS = {
    "resnet18": (18, 1, 64),
    "resnet34": (34, 1, 64),
    "resnet50": (50, 1, 64),
    "resnet101": (101, 1, 64),
    "resnet152": (152, 1, 64),
    "resnext50_32x4d": (50, 32, 4),
    "resnext101_32x8d": (101, 32, 8),
    "resnext101_64x4d": (101, 64, 4),
    "wide_resnet50_2": (50, 1, 128),
    "wide_resnet101_2": (101, 1, 128),
}
ALIKE = 1e-4  # how far features of the same network may lie apart in two implementations, of the largest


@dataclass(frozen=True)
class Exported:
    """A file that was written: for which architecture of the target, the identity of the backbone in it, and what
    the target has to be configured to use it."""

    path: Path
    arch: str
    identity: str
    use: Mapping[str, Any]


def convert(backbone: Backbone, to: str, out: str | Path, registry: Registry) -> Exported:
    """Write ``backbone`` to ``out`` under the names of ``to``: ``torchvision``, ``timm`` or ``detectron2``.

    The first two are safetensors files of exactly the tensors that ``torchvision.models.get_model(NAME)`` or
    ``timm.create_model(NAME, num_classes=0)`` want (a classifier that torchvision has is zero). detectron2's is its
    model zoo's form, a pickled dict of numpy arrays (``.pkl``) or torch's of tensors (``.pth``), with
    ``matching_heuristics``. A network of one zoo goes to another if it is a ResNet of both; its features are
    compared before anything is written. The file takes its name only when it was read back to the same identity.

    Raises :class:`UsageError` for an unknown target, another ending or a file that is there already, and
    :class:`BackboneError` for an architecture that has no such names.
    """
    out = Path(out)
    _check(to, out)
    theirs = _as_theirs(backbone, to, registry)
    tensors = {name: value.detach().cpu().contiguous() for name, value in theirs.net.state_dict().items()}
    name = theirs.spec.arch.partition(":")[2].partition(".")[0]
    use: dict[str, Any] = {key: list(getattr(backbone.spec, key)) for key in ("image_size", "mean", "std")}
    note = {"arch": backbone.spec.arch} | {key: json.dumps(value) for key, value in use.items()}
    with atomic(out) as partial:
        if to == "detectron2":
            heads = heads_of(theirs)
            renamed = {_detectron2_name(k): v for k, v in tensors.items() if k not in heads}
            _save_detectron2(renamed, note, partial, out.suffix)
            use = _detectron2_settings(name, backbone)
        else:
            safetensors.torch.save_file(tensors, partial, {"format": "pt", **note})
        again = load_backbone(partial, registry, options=backbone.spec.options).backbone
        if again.digest != backbone.digest:
            raise BackboneError(
                f"{backbone.spec.arch} would not come back from a file for {to}",
                cause="read again, its tensors are others",
                fix="keep the backbone's own file, and report this",
            )
    return Exported(out, theirs.spec.arch, backbone.digest, use)


def _check(to: str, out: Path) -> None:
    if to not in TARGETS:
        raise UsageError(
            f"nothing is known of names of {to!r}", cause=f"known: {', '.join(TARGETS)}", fix="--to torchvision"
        )
    if out.suffix not in TARGETS[to]:
        raise UsageError(
            f"{out} does not end as a file for {to} does",
            cause=f"it is written as {' or '.join(TARGETS[to])}",
            fix=f"name it {out.with_suffix(TARGETS[to][0]).name}",
        )
    if out.exists():
        raise UsageError(f"{out} is there already", cause="nothing is overwritten", fix="name another file")


def _as_theirs(backbone: Backbone, to: str, registry: Registry) -> Backbone:
    """The same network as an architecture of the target's, torchvision's standing for detectron2's."""
    scheme, _, full = backbone.spec.arch.partition(":")
    name, zoo = full.partition(".")[0], "torchvision" if to == "detectron2" else to
    if scheme == to:
        return backbone
    if scheme not in ("timm", "torchvision") or name not in RESNETS:
        raise BackboneError(
            f"{backbone.spec.arch} has no names in {to}",
            cause=f"of torchvision's and timm's architectures, {', '.join(RESNETS)} have",
            fix=f"train one of them, for example --arch {zoo}:resnet50, or keep the backbone's own file",
        )
    theirs = build(f"{zoo}:{name}", registry).eval().respec(mean=backbone.spec.mean, std=backbone.spec.std)
    heads, own_heads = heads_of(theirs), heads_of(backbone)
    given = {k: v for k, v in backbone.net.state_dict().items() if k not in own_heads}
    wanted = {k: v for k, v in theirs.net.state_dict().items() if k not in heads}
    same = {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in wanted.items()}
    if same:
        blank = {k: torch.zeros_like(v) for k, v in theirs.net.state_dict().items() if k in heads}
        theirs.net.load_state_dict(given | blank)
    if not same or not _alike(backbone, theirs):
        raise BackboneError(
            f"{backbone.spec.arch} is not the {name} of {to}",
            cause=f"its options make it another network: {dict(backbone.spec.options)}",
            fix="keep the backbone's own file",
        )
    return theirs


@torch.no_grad()
def _alike(one: Backbone, other: Backbone) -> bool:
    """Whether both give the same features of an image."""
    device = next(one.parameters()).device
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    training = one.training
    maps = one.eval()(pixels.to(device)).maps
    one.train(training)
    other_maps = other(pixels).maps
    if maps.keys() != other_maps.keys():
        return False
    differences = (
        float((maps[s].cpu() - other_maps[s]).abs().max()) / max(float(other_maps[s].abs().max()), 1e-12)
        for s in other_maps
    )
    return all(distance < ALIKE for distance in differences)


# detectron2 --------------------------------------------------------------------------------------------------


def _detectron2_name(name: str) -> str:
    """``layer2.0.bn3.weight`` is ``res3.0.conv3.norm.weight``, ``conv1.weight`` is ``stem.conv1.weight``."""
    match = re.fullmatch(r"(?:layer([1-4])\.(\d+)\.)?(conv|bn|downsample\.)([0-3])\.(\w+)", name)
    assert match, name
    stage, block, kind, number, leaf = match.groups()
    prefix = "stem" if stage is None else f"res{int(stage) + 1}.{block}"
    parts = {"conv": f"conv{number}", "bn": f"conv{number}.norm"}
    return f"{prefix}.{parts.get(kind, 'shortcut' if number == '0' else 'shortcut.norm')}.{leaf}"


def _save_detectron2(tensors: Mapping[str, Tensor], note: Mapping[str, str], path: Path, suffix: str) -> None:
    """What ``DetectionCheckpointer`` takes for a file of the model zoo's; it passes over our note."""
    about = {"__author__": "evalsuite", "matching_heuristics": True, NOTE: dict(note)}
    if suffix == ".pth":
        torch.save({"model": dict(tensors), **about}, path)
        return
    with path.open("wb") as file:
        pickle.dump({"model": {name: value.numpy() for name, value in tensors.items()}, **about}, file, protocol=4)


def _detectron2_settings(name: str, backbone: Backbone) -> dict[str, Any]:
    """What a configuration of detectron2's must say for this backbone; its defaults are for others."""
    depth, groups, width = RESNETS[name]
    return {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if depth < 50 else 256,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [round(255 * v, 3) for v in backbone.spec.mean],
        "MODEL.PIXEL_STD": [round(255 * v, 3) for v in backbone.spec.std],
    }
