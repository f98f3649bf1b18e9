"""Numbers that the systems' authors publish, each with where it was read. They are shown, and never ranked.

They are of the authors' own protocols and code. A number that was only seen quoted by others is not here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Published", "published"]


@dataclass(frozen=True)
class Published:
    """A published number, in the unit its source uses: accuracies and AP in per cent, success rates as shares."""

    system: str
    backbone: str
    task: str
    metric: str
    value: float
    source: str


_MOCO = "README of facebookresearch/moco"
_PIXPRO = "README of zdaxie/PixPro"
_SWAV = "README of facebookresearch/swav"
_INTERCLR = "README of InterCLR in open-mmlab/mmselfsup 0.x"
_ADAINF = "README of PKU-ML/adainf"
_OCRL = "scores/model_wise_performances.json of jsikyoon/OCRL"
_LINEAR = "ImageNet, linear"
_R50 = "ResNet-50"
_CHILD = "training logs shipped with eminorhan/silicon-menagerie"

PUBLISHED = (
    *(
        Published(system, _R50, _LINEAR, "top-1 (%)", value, source)
        for system, value, source in (
            ("MoCo v1, 200 epochs", 60.6, _MOCO), ("MoCo v2, 200 epochs", 67.7, _MOCO),
            ("MoCo v2, 800 epochs", 71.1, _MOCO), ("SimCLR v1", 69.1, "README of google-research/simclr"),
            ("SwAV, 100 epochs", 72.1, _SWAV), ("SwAV, 200 epochs", 73.9, _SWAV), ("SwAV, 400 epochs", 74.6, _SWAV),
            ("SwAV, 800 epochs", 75.3, _SWAV), ("SwAV, 200 epochs, batch 256", 72.7, _SWAV),
            ("OBoW", 73.8, "README of valeoai/obow"), ("InterCLR on MoCo v2", 68.04, _INTERCLR),
        )
    ),
    *(
        Published(system, _R50, "VOC07+12 detection, C4", "AP (%)", value, source)
        for system, value, source in (
            ("supervised", 53.5, _MOCO), ("MoCo v1, 200 epochs", 55.9, _MOCO), ("MoCo v2, 200 epochs", 57.0, _MOCO),
            ("MoCo v2, 800 epochs", 57.4, _MOCO), ("PixPro, 100 epochs", 58.8, _PIXPRO),
            ("PixPro, 400 epochs", 60.2, _PIXPRO),
        )
    ),
    Published("PixPro with instance branch, 400 epochs", _R50, "COCO detection, FPN 1x", "box AP (%)", 41.4, _PIXPRO),
    Published("PixPro with instance branch, 400 epochs", _R50, "COCO detection, FPN 1x", "mask AP (%)", 37.4, _PIXPRO),
    Published("InterCLR on MoCo v2", _R50, "VOC07 classification, SVM", "mAP (%)", 85.24, _INTERCLR),
    *(
        Published(f"{system} with AdaInf", "ResNet-18", "CIFAR-10, online linear", "top-1 (%)", value, _ADAINF)
        for system, value in (("SimCLR", 93.42), ("MoCo v2", 94.19), ("BYOL", 92.87))
    ),
    *(
        Published("RotNet", f"NIN, 4 blocks, {layer}", "CIFAR-10, classifier on a layer", "top-1 (%)", value,
                  "issue 6 of gidariss/FeatureLearningRotNet, by the authors")
        for layer, value in (("conv1", 85.07), ("conv2", 89.06), ("conv3", 86.21), ("conv4", 61.73))
    ),
    *(
        Published(system, encoder, task, "success rate", value, _OCRL)
        for system, encoder, values in (
            ("ground truth", "state", (0.974, 0.795, 0.973, 0.968)),
            ("end to end", "CNN", (0.987, 0.784, 0.225, 0.232)),
            ("pre-trained", "VAE", (0.674, 0.340, 0.386, 0.387)),
            ("pre-trained", "MAE, patches", (0.901, 0.049, 0.216, 0.219)),
            ("pre-trained", "SLATE", (0.985, 0.787, 0.979, 0.980)),
            ("pre-trained", "Slot Attention", (0.983, 0.000, 0.975, 0.947)),
            ("pre-trained", "IODINE", (0.916, 0.003, 0.701, 0.624)),
        )
        for task, value in zip(
            ("object-goal", "object-interaction", "object-comparison", "property-comparison"), values, strict=True
        )
    ),
    *(
        Published(f"DINO, {data}", "ViT-B/14", "ImageNet, linear probe", "top-1 (%)", value, _CHILD)
        for data, value in (("ImageNet", 72.57), ("SAYCam", 42.31), ("child S of SAYCam", 41.77), ("untrained", 5.05))
    ),
)  # fmt: skip


def published() -> tuple[dict[str, Any], ...]:
    """All of them, as plain values."""
    return tuple(asdict(one) for one in PUBLISHED)
