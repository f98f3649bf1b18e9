"""SwAV: every crop predicts which prototypes the other crops of its image were assigned to.

"Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", Caron, Misra, Mairal, Goyal,
Bojanowski, Joulin, NeurIPS 2020, arXiv 2006.09882; the facts are those of the official code, ``main_swav.py``,
``src/multicropdataset.py`` and the scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalsuite import Features, UsageError, hookimpl
from evalsuite.training import uncast
from pretrain import Look, Method, Preset, Run, Training, swav
from pretrain.blocks import Queue, mlp_head, reached, sinkhorn, world_size

CIFAR: dict[str, Any] = {
    "size": 32, "small": 16, "crops": (2, 2), "areas": (0.3, 1.0, 0.1, 0.4), "strength": 0.5, "blur": 0.0,
    "hidden": 512, "prototypes": 100, "epsilon": 0.02, "optimizer": "adamw", "lr": 2e-3, "scaling": "none",
    "weight_decay": 1e-4, "warmup": 0.0,
}  # fmt: skip


class SwAV(Method):
    """Learns ``prototypes`` and, by them, features: swapped prediction over crops of several sizes.

    All crops of a size go through the backbone at once, and all crops together through the head: one hidden layer of
    ``hidden`` with batch normalisation, then ``width`` numbers of unit length, z. The scores of a crop are its cosines
    with the prototypes. Of each of the crops ``assign`` codes q are computed, balanced over the samples of all
    processes by Sinkhorn-Knopp (:func:`pretrain.blocks.sinkhorn`); they carry no gradient, and with V crops

        L = mean over i in assign of 1 / (V - 1) sum over v != i of -mean q_i . log softmax(scores_v / temperature).

    Prototypes are brought back to unit length after every step. For the first ``frozen`` epochs they take no
    gradient, as in the official scripts, whose counts of steps are one epoch each. With a ``queue``, the embeddings of
    the last so many images of all processes, for each of the crops ``assign``, take part in the balancing from the
    step on at which it is full; it is filled from epoch ``queue_start`` on and helps where a batch is small.

    Official recipe (code): ResNet-50, two crops of 224 and six of 96 pixels, 3000 prototypes, batch 4096, LARC
    (trust 0.001, not clipped, biases and normalisation included) at 4.8 with ten epochs of warm-up from 0.3 and a
    cosine by iteration to a thousandth, weight decay 1e-6. Linear top-1 on ImageNet (README): 75.3 after 800 epochs,
    74.6 after 400, 73.9 after 200, 72.1 after 100. ``imagenet-256`` is the recipe for one machine: batch 256 at 0.6
    without warm-up, a queue of 3840 from epoch 15; 72.7 after 200 epochs, 74.3 after 400. The two rates are not
    in proportion to the batch; other batches scale the rate of the preset. ``imagenet-2x224`` has no small crops:
    70.1 after 400 epochs. ``cifar`` is ours, for 32 pixels: larger shares, 100 prototypes, AdamW, and
    a lower ``epsilon``: at 0.05 its loss stayed near the logarithm of their number, of which the README warns.

    Where this differs from the official code: pixels are normalised as the backbone's spec says, and with
    ``official_std`` by its slip, a standard deviation of 0.228 for red; batch normalisation sees the batch of all
    processes (officially, at batch 4096, of eight of the 64 at a time); blur is by a true Gaussian, cut at three
    standard deviations, where Pillow's approximates one.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        width: int = 128
        hidden: int = 2048
        prototypes: int = 3000
        temperature: float = 0.1
        epsilon: float = 0.05  # of Sinkhorn-Knopp: lower is sharper
        iterations: int = 3  # of Sinkhorn-Knopp
        crops: tuple[int, int] = (2, 6)  # how many large ones, of `size` pixels, and small ones
        pixels: ClassVar[tuple[str, ...]] = ("size", "small")
        small: int = 96  # pixels of the small ones
        areas: tuple[float, float, float, float] = (0.14, 1.0, 0.05, 0.14)  # shares of the image: large, small
        assign: tuple[int, ...] = (0, 1)  # the crops that are assigned to prototypes
        frozen: float = 1.0  # epochs in which the prototypes stand still
        queue: int = 0  # embeddings of earlier images, over all processes; 0: no queue
        queue_start: int = 15  # the epoch, from 0, in which the queue begins to fill
        strength: float = 1.0  # of the colour jitter
        blur: float = 0.5
        official_std: bool = False  # divide red by 0.228 instead of 0.229
        optimizer: Literal["sgd", "lars", "adamw"] = "lars"
        lr: float = 0.3  # 4.8 at 4096
        weight_decay: float = 1e-6
        trust_ratio: Literal["decayed", "summed"] = "summed"
        warmup: float = 10.0
        start: float = 0.0625  # 0.3 / 4.8
        rise: Literal["next", "last", "ahead"] = "last"
        floor: float = 0.001

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.assign or not set(self.assign) <= set(range(sum(self.crops))) or sum(self.crops) < 2:
                raise ValueError(
                    f"{sum(self.crops)} crops cannot be assigned by {self.assign}: two are needed at least"
                )
            if any(crop >= self.crops[0] for crop in self.assign):
                raise ValueError(f"assign is {self.assign}, and small crops are never assigned")

    options: Options
    small: ClassVar[Mapping[str, Any]] = {"small": 8, "width": 8, "hidden": 16, "prototypes": 12}
    presets: ClassVar[Mapping[str, Preset]] = {
        "imagenet": Preset("facebookresearch/swav scripts/swav_800ep_pretrain.sh", 800, 4096),
        "imagenet-256": Preset(
            "facebookresearch/swav scripts/swav_200ep_bs256_pretrain.sh",
            200,
            256,
            {"lr": 0.6, "warmup": 0.0, "queue": 3840},
        ),
        "imagenet-2x224": Preset(
            "facebookresearch/swav scripts/swav_400ep_2x224_pretrain.sh",
            400,
            4096,
            {"crops": (2, 0), "areas": (0.08, 1.0, 0.05, 0.14)},
        ),
        "cifar": Preset("ours", 200, 256, CIFAR),
    }

    head: nn.Module
    prototypes: nn.Parameter
    queues: nn.ModuleList

    @hookimpl
    def views(self) -> tuple[Look, ...]:
        o = self.options
        return swav(o.size, o.small, o.crops, areas=o.areas, strength=o.strength, blur=o.blur)

    @hookimpl
    def prepared(self, run: Run) -> None:
        o = self.options
        self.head = mlp_head(run.dim, o.hidden, o.width, hidden_bias=True)
        self.prototypes = nn.Parameter(F.normalize(nn.Linear(o.width, o.prototypes, bias=False).weight.detach()))
        if o.queue % run.batch_size:
            raise UsageError(
                f"a queue of {o.queue} cannot be filled {run.batch_size} images at a time",
                cause="its size must be a multiple of the batch",
                fix=f"--set swav.queue={max(1, round(o.queue / run.batch_size)) * run.batch_size}, or another batch",
            )
        own = o.queue // world_size()  # each process keeps the embeddings of its own images
        kept = [Queue(own, o.width, empty=True, shared=False) for _ in o.assign] if o.queue else []
        self.queues = nn.ModuleList(kept)
        self._seen: list[list[Tensor]] = [[] for _ in kept]
        if o.official_std:
            run.backbone.respec(std=(0.228, *run.backbone.spec.std[1:]))

    @hookimpl
    def losses(self, run: Run, features: list[Features]) -> dict[str, Tensor]:
        rows = self.head(torch.cat([f.pooled for f in features if f.pooled is not None]))
        frozen = not reached(run.step, self.options.frozen * run.epoch_steps)
        prototypes = self.prototypes.detach() if frozen else self.prototypes
        with uncast(rows.device):
            z = F.normalize(rows.to(prototypes.dtype)).chunk(len(features))
            scores = [crop @ prototypes.T for crop in z]
            codes = {
                crop_index: self.codes(which, scores[crop_index])
                for which, crop_index in enumerate(self.options.assign)
            }
            loss = swapped(scores, codes, self.options.temperature)
        if run.epoch >= self.options.queue_start:
            for crop_index, seen in zip(self.options.assign, self._seen, strict=False):
                seen.append(z[crop_index].detach())
        return {"swapped": loss}

    @torch.no_grad()
    def codes(self, which: int, scores: Tensor) -> Tensor:
        """The codes (B, K) of the crop with these scores, balanced together with its queue where that is full."""
        o = self.options
        rows = scores.detach()
        if which < len(self.queues):
            queue = self.queues[which]
            assert isinstance(queue, Queue)
            if queue.filled:
                rows = torch.cat([queue.rows @ self.prototypes.T, rows])
        return sinkhorn(rows, o.epsilon, o.iterations)[-len(scores) :]

    @hookimpl
    def stepped(self) -> None:
        """Bring the prototypes back to unit length and remember the step's embeddings. The official code normalises
        before the next forward pass and fills the queue during this one, which is the same."""
        with torch.no_grad():
            self.prototypes.copy_(F.normalize(self.prototypes))
        for queue, seen in zip(self.queues, self._seen, strict=True):
            assert isinstance(queue, Queue)
            if seen:
                queue.push(torch.cat(seen))
                seen.clear()


def swapped(scores: Sequence[Tensor], codes: Mapping[int, Tensor], temperature: float = 0.1) -> Tensor:
    """The loss of swapped prediction (eq. 1 to 3 of the paper, for any number of crops).

    ``scores`` are those of each crop (B, K), ``codes`` those of the crops that have them (B, K). Each code is
    predicted from every other crop, the means over those crops are averaged over the codes.
    """
    said = torch.stack([F.log_softmax(s / temperature, 1) for s in scores])
    total = said.sum(0)
    terms = [-(code * (total - said[index])).sum(1).mean() for index, code in codes.items()]
    return torch.stack(terms).mean() / (len(scores) - 1)
