"""How far do bf16 arithmetic and resizing on the device move features, and the scores of probes on them?

``bf16``: the features of two networks, a ResNet-20 trained on CIFAR-10 and an untrained ResNet-18, of 2,000 + 1,000
images, in float32 and in bf16; ``feature_error`` is the length of the difference over that of the feature, in the mean.
``knn_moved`` and ``linear_moved`` are differences in accuracy, to be held against ``noise``, the standard error of an
accuracy on that many test images; ``knn_flips`` and ``linear_flips`` are the shares of answers that changed.
``resize``: photographs resized by the workers (fixed point) and on the device (floating point) against Pillow, in
eight-bit levels. The real data are needed: EVALSUITE_REALDATA, or ``../shared/data`` beside the repository.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from evalsuite import probes
from evalsuite.backbone import Backbone, BackboneSpec, Features, build
from evalsuite.data.classification import ClassificationSet, Folder
from evalsuite.features import Cache, Preprocess
from evalsuite.hooks import load

__all__ = ["run"]

REAL = Path(os.environ.get("EVALSUITE_REALDATA") or Path(__file__).parents[2] / "shared" / "data")
Kind = tuple[str, Preprocess]


def run() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    registry = load(environ={"EVALSUITE_PLUGINS": ""}).registry
    train, test = (Folder().load(REAL / "cls_cifar10_jpeg", split) for split in ("train", "test"))
    rows = []
    for name, backbone, size in (("trained", _trained(), 32), ("untrained", build("timm:resnet18", registry), 64)):
        how = Preprocess((size, size), "squash")
        full, half = (_answers(backbone, train, test, (kind, how)) for kind in ("32-true", "bf16-mixed"))
        moved = {f"{p}_moved": float(half[p][1] - full[p][1]) for p in ("knn", "linear")}
        flips = {f"{p}_flips": float(np.mean(half[p][0] != full[p][0])) for p in ("knn", "linear")}
        accuracy = {f"{p}_accuracy": float(full[p][1]) for p in ("knn", "linear")}
        noise = float(np.sqrt(full["knn"][1] * (1 - full["knn"][1]) / len(test)))
        error = _apart(full["features"], half["features"])
        rows.append({"benchmark": f"bf16 {name}", "feature_error": error, "noise": noise, **accuracy, **moved, **flips})
    return [*rows, resize(registry)]


def _answers(backbone: Backbone, train: ClassificationSet, test: ClassificationSet, kind: Kind) -> Mapping[str, Any]:
    """The test features; and, for each probe, the classes it answers and its accuracy."""
    precision, how = kind
    with tempfile.TemporaryDirectory() as folder:
        known, asked = (
            np.array(Cache(folder).features(backbone, part, preprocess=how, precision=precision).arrays["pooled"])
            for part in (train, test)
        )
    found: dict[str, Any] = {"features": asked}
    for name, probe in (("knn", probes.NearestNeighbours((20,), (0.07,))), ("linear", probes.Logistic())):
        scores = probes.evaluate(probe, probes.Train({"pooled": known}, train.labels), {"pooled": asked}).scores
        found[name] = scores.argmax(1), float((scores.argmax(1) == test.labels).mean())
    return found


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    return float((np.linalg.norm(other - one, axis=1) / np.linalg.norm(one, axis=1)).mean())


def resize(registry: Any, images: int = 24) -> dict[str, Any]:
    """Real photographs to 224 pixels, three ways."""
    paths = sorted((REAL / "det_voc2012_100").rglob("*.jpg"))[:images]
    photographs = [np.array(Image.open(path).convert("RGB")) for path in paths]
    fixed = Preprocess((224, 224), "squash")
    backbone = build("timm:resnet18", registry).eval()
    levels: dict[str, list[Tensor]] = {"workers": [], "device": [], "pillow": []}
    for pixels in photographs:
        planes = torch.from_numpy(pixels).permute(2, 0, 1)
        levels["workers"].append(fixed(pixels))
        floats = F.interpolate(planes[None].float(), (224, 224), mode="bilinear", antialias=True)
        levels["device"].append(floats[0].round_().to(torch.uint8))
        small = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR)
        levels["pillow"].append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
    stacked = {name: torch.stack(found) for name, found in levels.items()}
    row: dict[str, Any] = {"benchmark": "resize", "images": len(photographs)}
    for name in ("workers", "device"):
        apart = (stacked[name].int() - stacked["pillow"].int()).abs()
        row |= {f"{name}_most": int(apart.max()), f"{name}_share": float((apart > 0).float().mean())}
    with torch.inference_mode():
        seen = {name: backbone(pixels.float() / 255).pooled.numpy() for name, pixels in stacked.items()}
    return row | {"feature_error": _apart(seen["workers"], seen["device"])}


class _Block(nn.Module):
    """Two convolutions and a shortcut that is cut and padded with zeros (He et al. 2016, option A)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.stride, self.pad = stride, (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(kept, (0, 0, 0, 0, self.pad, self.pad)))


class _ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for i, (before, width, stride) in enumerate(((16, 16, 1), (16, 32, 2), (32, 64, 2)), 1):
            blocks = [_Block(before, width, stride), _Block(width, width, 1), _Block(width, width, 1)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Features:
        x = F.relu(self.bn1(self.conv1(x)))
        for i in (1, 2, 3):
            x = self.get_submodule(f"layer{i}")(x)
        return Features(x.mean((2, 3)))


def _trained() -> Backbone:
    """The ResNet-20 of akamaster/pytorch_resnet_cifar10."""
    content = torch.load(REAL / "ckpt_cifar_resnet" / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)
    state = {key.removeprefix("module."): value for key, value in content["state_dict"].items()}
    net = _ResNet20()
    net.load_state_dict({key: value for key, value in state.items() if not key.startswith("linear.")})
    spec = BackboneSpec("benchmark:resnet20", 64, {}, frozenset({"pooled"}), image_size=(32, 32))
    return Backbone(net, spec).eval()
