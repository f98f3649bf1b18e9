"""What one watches while a network learns without labels: collapse, held-out images, curves, and a line of numbers a
step."""

from __future__ import annotations

import json
from collections import UserList
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from evalsuite import Backbone, DataError
from evalsuite.features import Preprocess
from evalsuite.files import atomic, room_for, set_aside, write_text
from evalsuite.probes import NearestNeighbours, Part, Rows, Runtime, accuracy
from evalsuite.progress import Progress
from pretrain.batch import Look
from pretrain.blocks import gather, world_size
from pretrain.data import Images, readable
from pretrain.views import Centre

__all__ = ["Journal", "collapsed", "health", "knn_accuracy", "last_collapse", "plot"]

SPREAD = 0.1  # below this share of what rows can be apart they are nearly one point
FALL = 0.4  # and so they are becoming below this share of what they were apart before
RANK = 2.0  # below this many directions they lie nearly on a line
STRIKES = 3  # in so many logged steps one after the other
ROWS = 512  # of a batch are looked at


@torch.no_grad()
def health(rows: Tensor) -> dict[str, float]:
    """How far features (M,D) are from collapse; several processes ask together, and each brings as many rows.

    ``spread``, in [0,1], is the root of 1 - c, c being the median cosine of two rows: how far apart a typical pair
    lies, 0 if all rows point one way. It is not the mean (SimSiam, section 4.1, watches the standard deviation of each
    channel): a batch normalisation at the end of a head keeps that up by a few far rows when all others have become
    one point. ``effective_rank`` is the exponential of the entropy of the singular values of the centred rows (Roy and
    Vetterli, 2007): in how many directions they differ.
    """
    unit = F.normalize(_some(rows.float()))
    values = torch.linalg.svdvals((unit - unit.mean(0)).cpu())
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    apart = torch.ones(len(unit), len(unit), device=unit.device).triu(1).bool()
    typical = (unit @ unit.T)[apart].median() if len(unit) > 1 else torch.ones(())
    return {"spread": float((1 - typical).clamp(0, 1).sqrt()), "effective_rank": float(entropy.exp())}


def _some(rows: Tensor) -> Tensor:
    """At most ``ROWS`` rows, as many from each process: no more than the process with the fewest has."""
    if world_size() == 1:
        return rows[:ROWS]
    fewest = torch.tensor(min(len(rows), ROWS // world_size()), device=rows.device)
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    return gather(rows[: int(fewest)].contiguous())


def collapsed(log: Sequence[Mapping[str, float]]) -> str:
    """What the last logged step says of a collapse; empty if nothing."""
    reasons = [reason for _, reason in _signs(log)]
    return reasons[-1] if reasons else ""


def last_collapse(log: Sequence[Mapping[str, float]]) -> str:
    """When a log last showed a collapse, and which; empty if never, or if features were later farther apart than before
    it: slots lie together for long before they part, and that is no collapse in the end."""
    collapse, peak, before = "", 0.0, 0.0
    for entry, reason in _signs(log):
        if reason:
            collapse, before = f"step {int(entry['step'])}: {reason}", peak
        elif entry["spread"] > before:
            collapse = ""
        peak = max(peak, entry["spread"])
    return collapse


def _signs(log: Sequence[Mapping[str, float]]) -> Iterator[tuple[Mapping[str, float], str]]:
    """Each logged step with what it and the two before it agree on.

    The fall is measured against the run itself: a head without batch normalisation starts at a spread of a quarter
    and rises, where SimSiam without its predictor falls from 1 to a fifth.
    """
    peak = 0.0
    low, narrow = 0, 0
    for entry in log:
        if "spread" not in entry:
            continue
        peak = max(peak, entry["spread"])
        low = low + 1 if entry["spread"] < max(SPREAD, FALL * peak) else 0
        narrow = narrow + 1 if entry["effective_rank"] < RANK else 0
        if low >= STRIKES:
            yield entry, f"all images look alike (spread {entry['spread']:.2g}, once {peak:.2g})"
        elif narrow >= STRIKES:
            yield entry, f"images differ in one direction only (effective rank {entry['effective_rank']:.2g})"
        else:
            yield entry, ""


class _Pooled(NamedTuple):
    """Features (M,D) of the images of a set that can be read, and their labels (M,)."""

    features: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]


@torch.no_grad()
def _pooled(backbone: Backbone, data: Images, look: Look, device: torch.device, workers: int) -> _Pooled:
    rows: list[int] = []
    features: list[Tensor] = []
    for some, pixels in readable(data, look, device, workers):
        pooled = backbone(pixels).pooled
        if pooled is not None:
            rows += some
            features.append(pooled.float().cpu())
    if not rows:
        raise DataError(
            "no held-out image can be read",
            cause=f"there are {len(data)}",
            fix="restore them, or leave out --knn-every",
        )
    return _Pooled(torch.cat(features).numpy(), data.labels[rows])


def knn_accuracy(
    backbone: Backbone, bank: Images, queries: Images, size: int, *, k: int = 20, workers: int = 0
) -> float:
    """Top-1 accuracy of weighted k-NN on frozen pooled features, the evaluators' own (temperature 0.07), of images as
    they are shown there by default (:meth:`evalsuite.features.Preprocess.resolved`, decided on the bank). Images that
    cannot be read are left out.

    The backbone is evaluated in eval mode and its mode is restored. Raises :class:`evalsuite.DataError` where none can
    be read.
    """
    device = next(backbone.parameters()).device
    shape = Preprocess((size, size), "auto").resolved(lambda i: bank[i]["image"].shape[1:], len(bank))
    look = Centre(size, share=shape.ratio)
    training = backbone.training
    backbone.eval()
    try:
        train, test = (_pooled(backbone, data, look, device, workers) for data in (bank, queries))
    finally:
        backbone.train(training)
    setting = {"k": min(k, len(train.labels)), "temperature": 0.07}
    part = Part(Rows(train.features), train.labels, None, int(bank.labels.max()) + 1)
    (fitted,) = NearestNeighbours().fit(part, Rows(test.features), [setting], Runtime(device))
    return accuracy(fitted.scores, test.labels)


class Journal(UserList[dict[str, float]]):
    """The log of a run, with a line of JSON in ``path`` for each entry. The log is part of the state; the file follows
    it: after :meth:`rewrite` it holds what the state holds, so a resumed run repeats no line and loses none."""

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self.path = path

    def append(self, item: dict[str, float]) -> None:
        super().append(item)
        if self.path is not None:
            with room_for(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(item) + "\n")

    def rewrite(self, progress: Progress) -> None:
        """Make the file what the log is. One with a line that is none, or of a run whose state is gone, is set aside,
        which is said."""
        if self.path is None:
            return
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        odd = sum(not _is_entry(line) for line in lines)
        if odd or (lines and not self.data):
            why = f"has {odd} lines that are none" if odd else "is of a run whose state is not here"
            progress.say(f"warning: {self.path} {why}; it is set aside as {set_aside(self.path).name}")
        write_text(self.path, "".join(json.dumps(item) + "\n" for item in self))


def _is_entry(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def plot(log: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Curves of the loss, of k-NN accuracy where it was evaluated, and of the signs of collapse, as a PNG."""
    steps = [e for e in log if "spread" in e]
    knn = [e for e in log if "knn" in e]
    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    known = {"step", "lr", "images_s", "wait", "spread", "effective_rank", "knn", "epoch"}
    for name in sorted({key for e in steps for key in e} - known):
        upper.plot([e["step"] for e in steps if name in e], [e[name] for e in steps if name in e], label=name)
    upper.set(ylabel="loss", title=title)
    upper.legend(loc="upper right") if upper.lines else None
    if knn:
        right = upper.twinx()
        right.plot([e["step"] for e in knn], [e["knn"] for e in knn], "k.--")
        right.set(ylabel="k-NN accuracy (dots)", ylim=(0, 1))
    lower.plot([e["step"] for e in steps], [e["spread"] for e in steps], label="spread")
    lower.set(xlabel="step", ylabel="spread", ylim=(0, 1))
    ranks = lower.twinx()
    ranks.plot([e["step"] for e in steps], [e["effective_rank"] for e in steps], "C1")
    ranks.set(ylabel="effective rank", ylim=(0, None))
    with atomic(path) as partial:
        figure.set_canvas(FigureCanvasAgg(figure))
        figure.savefig(partial, format="png")
