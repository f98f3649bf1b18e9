"""SwAV against lightly's example loop, and what is left of the difference when only the stages are taken away.

All loops train the same network with the same head, prototypes, crops, batch, loss and optimiser on the same images, in
one process, which also augments. Lightly's is that of its documentation, with its transform, head, prototypes and loss:
its crops go through the network one after the other. The bare loop has our crops, codes and loss, and no stages.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from evalsuite_swav.method import SwAV, swapped
from lightly.loss import SwaVLoss
from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
from lightly.transforms.swav_transform import SwaVTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import _loops as loops
from benchmarks._loops import Case
from evalsuite import Backbone
from pretrain import Images, swav
from pretrain.blocks import mlp_head, sinkhorn

LR, HIDDEN, WIDTH, PROTOTYPES = 0.001, 512, 128, 512  # those of lightly's example
LARGE, SMALL = 2, 6
CASES = (Case("CIFAR", "small:resnet10", 32, 8, 0.5, 0.0), Case("96 px", "timm:resnet18", 96, 8, 1.0, 0.5))


def run() -> list[dict[str, Any]]:
    return [row for case in CASES for row in _speed(case)]


def _speed(case: Case) -> list[dict[str, Any]]:
    rate = loops.steps_a_second(case, {"ours": _ours, "bare": _bare, "lightly": _lightly})
    about = {"batch": case.batch, "crops": f"{LARGE}+{SMALL}", "ours_steps_s": rate["ours"]}
    return [
        {
            "name": f"SwAV {case.name} against {whose}",
            **about,
            f"{other}_steps_s": rate[other],
            "ratio": rate["ours"] / rate[other],
            "goal": goal,
        }
        for other, whose, goal in (("lightly", "lightly", ">= 1.0"), ("bare", "a bare loop", ">= 0.95"))
    ]


def _ours(case: Case, backbone: Backbone, data: Images, steps: int) -> list[float]:
    method = SwAV(
        SwAV.Options(
            size=case.size, small=case.size // 2, crops=(LARGE, SMALL), strength=case.strength, blur=case.blur,
            hidden=HIDDEN, width=WIDTH, prototypes=PROTOTYPES, frozen=0.0, optimizer="sgd", lr=LR, scaling="none",
            momentum=0.0, weight_decay=0.0, warmup=0.0, schedule="constant",
        )
    )  # fmt: skip
    return loops.train_by(method, case, backbone, data, steps)


class _Crops(Dataset[list[Tensor]]):
    def __init__(self, data: Images, case: Case) -> None:
        self.data, self.rng = data, torch.Generator()
        self.looks = swav(case.size, case.size // 2, (LARGE, SMALL), strength=case.strength, blur=case.blur)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> list[Tensor]:
        sample = self.data[row]
        return [look(sample, self.rng).data for look in self.looks]


def _bare(case: Case, backbone: Backbone, data: Images, steps: int) -> list[float]:
    """What a person would write in torch, with our crops, codes and loss."""
    head = mlp_head(backbone.spec.dim, HIDDEN, WIDTH, hidden_bias=True)
    prototypes = nn.Linear(WIDTH, PROTOTYPES, bias=False)
    model = nn.ModuleList([backbone, head, prototypes]).train()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    at = []
    for crops in loops.forever(DataLoader(_Crops(data, case), case.batch, shuffle=True, drop_last=True), steps):
        with torch.no_grad():
            prototypes.weight.copy_(F.normalize(prototypes.weight))
        pixels = [crop.float() / 255 for crop in crops]
        pooled = torch.cat([backbone(torch.cat(some)).pooled for some in (pixels[:LARGE], pixels[LARGE:])])
        scores = prototypes(F.normalize(head(pooled))).chunk(len(crops))
        loss = swapped(scores, {place: sinkhorn(scores[place].detach()) for place in range(LARGE)})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        at.append(time.perf_counter())
    return at


def _lightly(case: Case, backbone: Backbone, data: Images, steps: int) -> list[float]:
    """The loop of lightly's SwaV example, at our sizes and strengths."""
    head = SwaVProjectionHead(backbone.spec.dim, HIDDEN, WIDTH)
    prototypes = SwaVPrototypes(WIDTH, PROTOTYPES)
    model = nn.ModuleList([backbone.net, head, prototypes]).train()
    criterion, optimizer = SwaVLoss(), torch.optim.SGD(model.parameters(), LR)
    transform: Any = SwaVTransform(
        crop_sizes=(case.size, case.size // 2), crop_counts=(LARGE, SMALL), cj_strength=case.strength,
        gaussian_blur=case.blur,
    )  # fmt: skip
    pictures = loops.Pictures(data, transform)
    at = []
    for crops in loops.forever(DataLoader(pictures, case.batch, shuffle=True, drop_last=True), steps):
        prototypes.normalize()
        scores = [prototypes(F.normalize(head(_flat(backbone, crop)), dim=1, p=2)) for crop in crops]
        loss = criterion(scores[:LARGE], scores[LARGE:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        at.append(time.perf_counter())
    return at


def _flat(backbone: Backbone, normalised: Tensor) -> Tensor:
    """The network's pooled features (B, D); its classifier is the identity."""
    features: Tensor = backbone.net(normalised)
    return features
