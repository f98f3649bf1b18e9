"""What flows through a training step: views of images, batches of them, and pairs of features that belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Batch", "Draw", "Look", "Pairs", "Sample", "View", "collate", "join", "join_pairs"]

Sample = Mapping[str, Any]
"""One row of a data set. Images have ``image``, (3,H,W) uint8; any other number or tensor in it reaches
``Batch.extra``."""


@dataclass(frozen=True)
class View:
    """One way a sample was looked at; in a batch, all of them stacked.

    ``data`` is (3,H,W) uint8 as a look gives it, and (B,3,H,W) in [0,1] as stages see it. ``box`` (4,) tells where
    the crop lay in its source, x0, y0, x1, y1 with the centres of the outermost pixels at 0 and 1; x0 > x1 where it
    was flipped. Views of another ``kind`` hold whatever their method reads.
    """

    data: Tensor
    box: Tensor | None = None
    kind: Literal["image", "video", "audio", "text"] = "image"


Look = Callable[[Sample, torch.Generator], View]
"""How to look at a sample: a pure function of the sample and of what it draws from the generator."""


@dataclass(frozen=True)
class Batch:
    """What one step learns from: the views, each stacked; ``index`` (B,), the rows of the data set; and whatever else
    the samples brought, stacked."""

    views: tuple[View, ...]
    index: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        views = tuple(View(change(v.data), None if v.box is None else change(v.box), v.kind) for v in self.views)
        return Batch(views, change(self.index), {name: change(value) for name, value in self.extra.items()})

    def pin_memory(self) -> Batch:
        """In page-locked memory, from which a copy to a GPU need not wait."""
        return self.map(Tensor.pin_memory)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        """On a device, image pixels scaled to [0,1] there: eight-bit pixels are a quarter of the traffic."""
        moved = self.map(lambda t: t.to(device, non_blocking=True))
        return replace(moved, views=tuple(_unit(v, dtype) for v in moved.views))


def _unit(view: View, dtype: torch.dtype) -> View:
    eight_bit = view.kind in ("image", "video") and view.data.dtype == torch.uint8
    return replace(view, data=view.data.to(dtype).div_(255)) if eight_bit else view


@dataclass(frozen=True)
class Pairs:
    """Features that belong together: row i of ``query`` (M,D) and row i of ``key`` (M,D).

    ``query`` carries a gradient and is not normalised. ``source`` (M,) names the sample of a row: rows of one source
    are never each other's negatives. ``mate`` (M,D) is the other view in the space of the queries, for modifiers
    that mix views; None means ``key``.
    """

    query: Tensor
    key: Tensor
    source: Tensor
    mate: Tensor | None = None

    def detach(self) -> Pairs:
        """Without gradients."""
        mate = None if self.mate is None else self.mate.detach()
        return Pairs(self.query.detach(), self.key.detach(), self.source, mate)


@dataclass(frozen=True)
class Draw:
    """A batch, the step and the part of it that it belongs to, and the rows that could not be read for it."""

    step: int
    micro: int
    batch: Batch
    bad: tuple[int, ...] = ()

    def pin_memory(self) -> Draw:
        return replace(self, batch=self.batch.pin_memory())


def collate(views: Sequence[Sequence[View]], samples: Sequence[Sample], index: Sequence[int]) -> Batch:
    """Stack the views of samples: ``views[i]`` are those of sample i, row ``index[i]`` of the data set."""
    extra = {
        name: torch.stack([torch.as_tensor(sample[name]) for sample in samples])
        for name, value in samples[0].items()
        if name != "image" and isinstance(value, int | float | Tensor)
    }
    return Batch(tuple(_stack(same) for same in zip(*views, strict=True)), torch.tensor(index), extra)


def _stack(views: Sequence[View]) -> View:
    boxes = [v.box for v in views if v.box is not None]
    if boxes and len(boxes) != len(views):
        raise ValueError("a look gave a box for some samples and none for others")
    return View(torch.stack([v.data for v in views]), torch.stack(boxes) if boxes else None, views[0].kind)


def join(batches: Sequence[Batch]) -> Batch:
    """Several batches as one, in order."""
    if len(batches) == 1:
        return batches[0]
    views = tuple(
        View(torch.cat([v.data for v in same]), _cat([v.box for v in same]), same[0].kind)
        for same in zip(*(b.views for b in batches), strict=True)
    )
    extra = {name: torch.cat([b.extra[name] for b in batches]) for name in batches[0].extra}
    return Batch(views, torch.cat([b.index for b in batches]), extra)


def join_pairs(pairs: Sequence[Sequence[Pairs]]) -> list[Pairs]:
    """The pairs of several batches as those of one: ``pairs[i]`` are those of batch i."""
    if len(pairs) == 1:
        return list(pairs[0])
    return [
        Pairs(
            torch.cat([p.query for p in same]),
            torch.cat([p.key for p in same]),
            torch.cat([p.source for p in same]),
            _cat([p.mate for p in same]),
        )
        for same in zip(*pairs, strict=True)
    ]


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [t for t in tensors if t is not None]
    return torch.cat(there) if there else None
