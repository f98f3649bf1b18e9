"""Set prediction by Slot Attention: a slot an object, and of each object what it is and where.

"Object-Centric Learning with Slot Attention", Locatello et al., NeurIPS 2020, arXiv 2006.15055; recipe and arithmetic
of google-research/slot_attention at 0c1bbe5f.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from evalsuite import DataError, Features, hookimpl
from evalsuite.metrics.objects import ObjectSet, set_precision
from evalsuite.worlds import COLOURS, SCALES, SHAPES
from evalsuite_objects.discovery import SlotMethod, discovery
from evalsuite_objects.slots import linear
from pretrain import Batch, Centre, Images, Preset, Run, look_through
from pretrain.blocks import full_precision

__all__ = ["KINDS", "SlotSet", "hungarian_huber", "targets"]

KINDS = (len(COLOURS), len(SHAPES), len(SCALES))
WIDTH = sum(KINDS) + 3  # x, y and whether there is an object at all
ROW = 5  # numbers of an item in the state of a flat world
FLOOR = 6.0  # how wide CLEVR's floor is, in whose units the official distances are
DISTANCES = (float("inf"), 1.0, 0.5, 0.25, 0.125)


def targets(state: Tensor, segments: Tensor, slots: int) -> Tensor:
    """What is to be predicted (B, max(rows, slots), 24): x and y, one-hot colour, shape and scale, and 1.

    ``state`` (B, rows, 5) are the rows of a world and ``segments`` (B, H, W) say which row is seen at a pixel. Rows
    that are seen nowhere (an agent that is not shown, what is wholly covered, padding) are zero throughout, as are
    those beyond the objects.
    """
    rows = torch.arange(state.shape[1], device=state.device)
    seen = (segments.flatten(1).unsqueeze(2) == rows).any(dim=1).unsqueeze(2)
    kinds = [F.one_hot(state[:, :, column].long(), count) for column, count in enumerate(KINDS)]
    numbers = torch.cat([state[:, :, 3:], *kinds, torch.ones_like(state[:, :, :1])], dim=2) * seen
    return F.pad(numbers, (0, 0, 0, max(0, slots - numbers.shape[1])))


def hungarian_huber(predicted: Tensor, elements: Tensor) -> Tensor:
    """The cost (B,) of the best way to match predictions (B, S, D) with elements (B, R, D), R at least S: the sum over
    matched pairs of their Huber loss (delta 1), averaged over D. Which are matched is no part of the gradient."""
    pairs = F.huber_loss(
        predicted.unsqueeze(1).expand(-1, elements.shape[1], -1, -1),
        elements.unsqueeze(2).expand(-1, -1, predicted.shape[1], -1),
        reduction="none",
    ).mean(dim=3)
    matched = [linear_sum_assignment(cost) for cost in pairs.detach().double().cpu().numpy()]
    return torch.stack([cost[rows, columns].sum() for cost, (rows, columns) in zip(pairs, matched, strict=True)])


class SlotSet(SlotMethod):
    """Predicts what every object of an image is: supervised by the state of a world, and no self-supervision.

    An MLP with a hidden layer of 64 turns each slot into numbers between 0 and 1: x and y, colour, shape and scale, and
    whether it is an object. They are matched with the objects at the least cost (Hungarian algorithm), those that are
    no object with zeros; the loss is the Huber loss of matched pairs, averaged over their numbers, summed over
    elements and averaged over images.

    On held-out images (``--knn-every``) the log has average precision: a prediction is right if colour, shape and scale
    are, and its position is within a distance: ``ap_inf`` (any), ``ap_1``, ``ap_0.5``, ``ap_0.25`` and ``ap_0.125``, in
    the units of CLEVR, whose floor is six wide: our canvas is one wide, and its distances are taken six times.

    Official recipe (code): Adam at 4e-4, warmed up over 1,000 steps and halved every 50,000 from the first step on,
    batches of 512 images of 128 pixels, 150,000 steps, ten slots; ``official`` says that as epochs of a million images
    of 64 pixels (``--set slot-set.size=128``). What departs here: CLEVR's objects have 19 numbers (three coordinates,
    two sizes, two materials, three shapes, eight colours), those of our worlds 24 (two coordinates, seven colours,
    twelve shapes, two scales). Only objects that are seen count. Norms and initial weights depart as in
    ``slot-attention``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(SlotMethod.Options):
        warmup: float = 0.512
        half_life: float | None = 25.6

    arch: ClassVar[str] = "objects:slot-set"
    presets: ClassVar[Mapping[str, Preset]] = {
        "official": Preset("google-research/slot_attention set_prediction/train.py", 77, 512),
    }

    @hookimpl
    def prepared(self, run: Run, data: Images) -> None:
        discovery(run, self.arch)
        fields = data[0].keys() & data[len(data) - 1].keys()  # images that a modifier adds come after the others
        lacking = {"state", "segments"} - fields
        if not lacking and data[0]["state"].shape[1] != ROW:
            lacking = {"rows of colour, shape, scale and position"}
        if lacking:
            raise DataError(
                f"slot-set cannot learn from images without {' and '.join(sorted(lacking))}",
                cause="it is supervised: it needs to know which objects there are, and which are seen",
                fix="--data worlds:random-objects and no modifier that adds images, or --method slot-attention",
            )
        self.head = nn.Sequential(linear(run.dim, 64), nn.ReLU(), linear(64, WIDTH), nn.Sigmoid())

    @hookimpl
    def losses(self, batch: Batch, features: list[Features]) -> dict[str, Tensor]:
        predicted = full_precision(self.head(features[0].tokens))
        elements = targets(batch.extra["state"], batch.extra["segments"], predicted.shape[1])
        return {"huber": hungarian_huber(predicted, elements.to(predicted.dtype)).mean()}

    @hookimpl
    def measures(self, run: Run, data: Images) -> dict[str, float]:
        looked = look_through(run, data, Centre(self.options.size, share=1.0))
        predicted = torch.cat([self.head(run.backbone(pixels).tokens).float().cpu() for pixels in looked])
        rows = [data[row] for row in range(len(data))]
        state, segments = (torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("state", "segments"))
        scores = precisions(predicted, targets(state, segments, 0))
        return {f"ap_{distance:g}": score for distance, score in zip(DISTANCES, scores, strict=True)}


def precisions(predicted: Tensor, elements: Tensor, distances: Sequence[float] = DISTANCES) -> list[float]:
    """Average precision of predictions (B, S, 24) by each distance, in CLEVR's units."""
    scores: npt.NDArray[np.float64] = set_precision(_as_set(predicted), _as_set(elements), distances)
    return [float(score) for score in scores]


def _as_set(numbers: Tensor) -> ObjectSet:
    positions, *kinds, sure = numbers.split((2, *KINDS, 1), dim=2)
    return ObjectSet(
        torch.stack([kind.argmax(dim=2) for kind in kinds], dim=2).numpy(),
        FLOOR * positions.double().numpy(),
        sure.squeeze(2).double().numpy(),
    )
