"""Hallucinator: extra positives, imagined in feature space away from the key.

"Hallucination Improves the Performance of Unsupervised Visual Representation Learning", Wu, Hobbs,
Hovakimyan, ICCV 2023, arXiv 2307.12168; the facts are those of the official code, ``models/generator.py``,
``datasets/transforms/ContrastiveCrop.py`` and the configs.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from evalsuite import UsageError, hookimpl
from pretrain import Augment, Look, Modifier, Pairs, Run, Sample, View, blocks


class Imagination(nn.Module):
    """The generator G: features x (M, d) and k (M, d), reach r -> imagined features (M, d).

    y = MLP([x, (1 + r) x - r k]): three linear layers, 2d -> 2d -> 2d -> d, with biases and no normalisation.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = blocks.mlp_head(2 * width, 2 * width, 2 * width, width, norm=False)

    def forward(self, x: Tensor, k: Tensor, r: float | Tensor) -> Tensor:
        imagined: Tensor = self.mlp(torch.cat([x, (1 + r) * x - r * k], 1))
        return imagined


class Hallucinator(Modifier):
    """Doubles the positives of any method that learns from pairs.

    For each query a small network, trained with the rest, imagines a further one from the query and from
    its extrapolation away from its mate, y = G(q, (1 + r) q - r k) with r ~ U(0, reach), and y shares the
    key of q. Rows 0..N-1 stay the real queries, rows N..2N-1 are imagined. In MoCo and SimCLR the mate is
    the key, in SimSiam and BYOL the prediction of the other view.

    Two habits of the official code are set right unless ``official_duplicates`` asks for them: MoCo puts
    each key into its queue twice, so that it holds half as many images and its size must be a multiple of
    twice the batch; and SimCLR's loss takes a key's own copy, at similarity 1, for a negative. Here rows of
    one image keep one source: they are never each other's negatives, and a queue takes each key once.

    ``box`` is the paper's other half, the crop of view 1: its centre stays within the middle of the image,
    from ``box`` to 1 - ``box`` of each side, and Beta(alpha, alpha) drives it to the rim. The published
    configs have ``box=0.25 alpha=0.1`` on CIFAR and STL-10, 0.15 and 0.1 on Tiny ImageNet, 0.2 and 0.6 on
    ImageNet (there after 20 epochs of plain crops, which are not imitated); 0, the default, leaves the
    views alone. The official code draws one r a step; ``per_sample`` draws one a row. With SimSiam's
    constant predictor rate the official generator stays as it was initialised; here it is always trained.

    The paper's tables could not be checked, so no number is claimed: compare with a run without it.
    """

    @dataclass(frozen=True)
    class Options:
        reach: float = 0.1  # how far past the query, away from its mate, a positive may be imagined
        per_sample: bool = False
        official_duplicates: bool = False
        box: float = 0.0  # margin around where view 1's crops may be centred; 0: ordinary crops
        alpha: float = 0.1  # below 1 crops avoid the centre

        def __post_init__(self) -> None:
            if self.reach < 0 or not 0 <= self.box < 0.5 or self.alpha <= 0:
                raise ValueError("reach is at least 0, box lies in [0, 0.5) and alpha is above 0")

    options: Options

    @hookimpl(wrapper=True)
    def views(self) -> Generator[None, tuple[Look, ...], tuple[Look, ...]]:
        looks = yield
        if not self.options.box:
            return looks
        first = looks[0]
        if not isinstance(first, Augment) or first.crop is None:
            raise UsageError(
                "hallucinator.box has no crop to move",
                cause="the method's first view is no randomly cropped image",
                fix="--set hallucinator.box=0",
            )
        values = {f.name: getattr(first, f.name) for f in fields(Augment)}
        return (RimCrop(**values, box=self.options.box, alpha=self.options.alpha), *looks[1:])

    @hookimpl
    def prepared(self, run: Run) -> None:
        self.imagine = Imagination(run.width)

    @hookimpl(wrapper=True)
    def pairs(self, run: Run) -> Generator[None, list[Pairs], list[Pairs]]:
        all_pairs = yield
        return [self.extended(pairs, run.rng) for pairs in all_pairs]

    def extended(self, pairs: Pairs, rng: torch.Generator) -> Pairs:
        """Pairs of M rows and the imagined ones: 2 M rows, the first half as it was."""
        query = blocks.full_precision(pairs.query)
        mate = blocks.full_precision(pairs.key if pairs.mate is None else pairs.mate)
        rows = (len(query), 1) if self.options.per_sample else (1, 1)
        r = self.options.reach * torch.rand(rows, generator=rng).to(query)
        copies = blocks.apart(pairs.source) if self.options.official_duplicates else pairs.source
        return Pairs(
            torch.cat([query, self.imagine(query, mate, r).to(query.dtype)]),
            pairs.key.repeat(2, 1),
            torch.cat([pairs.source, copies]),
            None if pairs.mate is None else pairs.mate.repeat(2, 1),
        )


# Crops that avoid the centre --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RimCrop(Augment):
    """An :class:`Augment` whose crops are centred within the middle of the image and pushed to its rim."""

    box: float = 0.25
    alpha: float = 0.1

    def __call__(self, sample: Sample, rng: torch.Generator) -> View:
        image: Tensor = sample["image"]
        height, width = image.shape[1:]
        top, left, h, w = self.rectangle(height, width, rng)
        whole = Augment(**{f.name: getattr(self, f.name) for f in fields(Augment)} | {"crop": None})
        view = whole({**sample, "image": image[:, top : top + h, left : left + w]}, rng)
        assert view.box is not None
        far = torch.tensor([max(1, width - 1), max(1, height - 1)] * 2)
        box = (view.box * torch.tensor([w - 1, h - 1] * 2) + torch.tensor([left, top] * 2)) / far
        return View(view.data, box, view.kind)

    def rectangle(self, height: int, width: int, rng: torch.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop in an image of that size."""
        assert self.crop is not None
        low, high = (math.log(r) for r in self.ratio)
        for _ in range(10):
            share, shape = torch.rand(2, generator=rng, dtype=torch.float64).tolist()
            area = height * width * (self.crop[0] + share * (self.crop[1] - self.crop[0]))
            ratio = math.exp(low + shape * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = placed(height, h, self.box, beta(self.alpha, rng))
                return top, placed(width, w, self.box, beta(self.alpha, rng)), h, w
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        return (height - h) // 2, (width - w) // 2, h, w


def placed(side: int, crop: int, box: float, share: float) -> int:
    """Where a crop of ``crop`` pixels begins on a side of ``side``: ``share`` of the way from the first to
    the last place that has its centre in the box, [box, 1 - box] of the side.
    """
    first, last = (min(max(int(side * edge) - crop // 2, 0), side - crop) for edge in (box, 1 - box))
    return first + int((last - first) * share)


def beta(alpha: float, rng: torch.Generator) -> float:
    """One draw of Beta(alpha, alpha), by Johnk's method: torch's own sampler takes no generator."""
    while True:
        x, y = (torch.rand(2, generator=rng, dtype=torch.float64) ** (1 / alpha)).tolist()
        if 0 < x + y <= 1:
            return float(x / (x + y))
