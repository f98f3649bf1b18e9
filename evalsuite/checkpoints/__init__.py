"""Any checkpoint to a backbone whose weights are known to be loaded, or a refusal.

:mod:`reading` opens files without running them, :mod:`layouts` knows how architectures name their tensors,
:mod:`origins` which network of a file is meant, :mod:`matching` how much of an architecture is filled, :mod:`loading`
puts it together, :mod:`sanity_check` looks at what comes out, :mod:`exporting` writes it for others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evalsuite.hooks import Registry, hookimpl
from evalsuite.lazy import lazy

if TYPE_CHECKING:
    from evalsuite.checkpoints.exporting import Exported, convert
    from evalsuite.checkpoints.layouts import Candidate, Layout
    from evalsuite.checkpoints.loading import Loaded, load_backbone
    from evalsuite.checkpoints.matching import NEEDED, LoadReport
    from evalsuite.checkpoints.reading import File, State
    from evalsuite.checkpoints.sanity_check import SanityReport, describe, natural_images, sanity

__all__ = [
    "NEEDED",
    "Candidate",
    "Exported",
    "File",
    "Layout",
    "LoadReport",
    "Loaded",
    "SanityReport",
    "State",
    "convert",
    "describe",
    "load_backbone",
    "natural_images",
    "sanity",
]

_HOMES = {
    "exporting": ("Exported", "convert"),
    "layouts": ("Candidate", "Layout"),
    "loading": ("Loaded", "load_backbone"),
    "matching": ("NEEDED", "LoadReport"),
    "reading": ("File", "State"),
    "sanity_check": ("SanityReport", "describe", "natural_images", "sanity"),
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _HOMES)


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    here = "evalsuite.checkpoints.layouts"
    registry.checkpoint(
        "resnet", f"{here}:resnet", "torchvision's ResNet names, wide, grouped, and for small images (CIFAR) too"
    )
    registry.checkpoint(
        "resnet-indexed", f"{here}:indexed", "a ResNet's children in a Sequential (lightly, SimCLR ports)"
    )
    registry.checkpoint("resnet-obow", f"{here}:obow", "OBoW's blocks of features")
    registry.checkpoint("resnet-detectron2", f"{here}:detectron2", "detectron2's stem and res2 to res5")
    registry.checkpoint("resnet-wide", f"{here}:wide_resnet", "wide ResNets for CIFAR with block1.layer names")
    registry.checkpoint(
        "resnet-cifar100", f"{here}:cifar100", "ResNets with residual_function names (pytorch-cifar100)"
    )
    registry.checkpoint("resnet-staged", f"{here}:staged", "CIFAR ResNets with stage_1.0.conv_a names")
    registry.checkpoint("vit", f"{here}:vit", "timm's ViT names: DINO, iBOT, MAE, MoCo v3, DINOv2")
    registry.checkpoint("vit-torchvision", f"{here}:torchvision_vit", "torchvision's ViT names")
    registry.checkpoint("convnext", f"{here}:convnext", "timm's and the official ConvNeXt names")
    registry.checkpoint("swin", f"{here}:swin", "timm's and the official Swin names")
    registry.checkpoint(
        "openmmlab-vit", "evalsuite.checkpoints.openmmlab:vit", "mmpretrain's ViTs: MAE, MoCo v3, DeiT, DINOv2, BEiT"
    )
    registry.checkpoint("clip", "evalsuite.checkpoints.openclip:vit", "OpenAI's CLIP and OpenCLIP: the vision tower")
    theirs = "evalsuite.checkpoints.huggingface"
    registry.checkpoint("transformers-vit", f"{theirs}:vit", "transformers' ViT, DeiT, ViT-MAE, BEiT, DINOv2 and 3")
    registry.checkpoint("transformers-clip", f"{theirs}:clip", "the vision towers of transformers' CLIP and SigLIP")
    registry.checkpoint("transformers-convnext", f"{theirs}:convnext", "transformers' ConvNeXt, both versions")
    registry.checkpoint("transformers-resnet", f"{theirs}:resnet", "transformers' ResNet")
    registry.checkpoint("transformers-swin", f"{theirs}:swin", "transformers' Swin, both versions")
    registry.checkpoint("transformers-other", f"{theirs}:other", "says what transformers' other networks are")
    registry.checkpoint(
        "features", f"{here}:torchvision_features", "torchvision's networks with a sequence of features"
    )
