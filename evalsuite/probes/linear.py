"""Ridge regression in closed form, and linear heads trained by SGD."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from evalsuite.probes.logistic import Basis
from evalsuite.probes.rows import Floats, Part, Predictions, Rows, Runtime, Setting

__all__ = ["LinearHeads", "Ridge", "SgdHeads"]


# --- ridge and logistic regression ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ridge:
    """Least squares with an L2 penalty, the whole grid from one eigendecomposition: on targets +1 and -1 of classes, or
    on numbers.

    Minimises ``sum (x w + b - y)^2 + alpha |w|^2`` per class or number, b free: scikit-learn's ``RidgeClassifier`` and
    ``Ridge``.
    """

    alphas: tuple[float, ...] = tuple(float(f"1e{e}") for e in range(-4, 7))
    scale: Literal["margins"] = "margins"
    regression: ClassVar[bool] = True

    def settings(self, samples: int) -> list[dict[str, Any]]:
        return [{"alpha": alpha} for alpha in sorted(self.alphas, reverse=True)]

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], runtime: Runtime) -> Iterator[Predictions]:
        signs = part.targets() if part.kind == "regression" else np.nan_to_num(part.targets() * 2 - 1, nan=0.0)
        targets = torch.from_numpy(signs).double()
        basis = Basis.of(part.rows, runtime.device)
        mean = targets.mean(0)
        cross = torch.zeros(basis.rank, part.classes, dtype=torch.float64, device=runtime.device)
        for where, rows in part.rows.chunks(runtime.device):
            cross += basis.project(rows).double().T @ (targets[where] - mean).to(runtime.device)
        projected = [(basis.project(rows)).double() for _, rows in points.chunks(runtime.device)]
        for setting in settings:
            weights = cross / (basis.eigenvalues + setting["alpha"])[:, None]
            yield Predictions(torch.cat([(z @ weights).cpu() + mean for z in projected]).float().numpy())


# --- heads trained by SGD ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SgdHeads:
    """Linear heads trained by SGD, one for each learning rate and weight decay, all in one pass over the features.

    The rate falls along a cosine to zero, step by step. Heads on augmented images are :mod:`evalsuite.probing.heads`.
    """

    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...] = (0.0,)
    epochs: int = 100
    batch_size: int = 256
    momentum: float = 0.9
    scale: Literal["logits"] = "logits"

    def settings(self, samples: int) -> list[dict[str, Any]]:
        decays, lrs = sorted(self.weight_decays, reverse=True), sorted(self.lrs)
        return [{"lr": lr, "weight_decay": decay} for lr in lrs for decay in decays]

    def rate(self, epoch: float) -> float:
        """The factor on the learning rate after ``epoch`` epochs."""
        return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], runtime: Runtime) -> Iterator[Predictions]:
        heads = LinearHeads(
            part.rows.width, part.classes, [s["lr"] for s in settings], [s["weight_decay"] for s in settings],
            momentum=self.momentum, seed=runtime.seed, device=runtime.device,
        )  # fmt: skip
        whole, targets = part.rows.resident(runtime.device), torch.from_numpy(part.targets()).to(runtime.device)
        samples, rng = len(part.rows), np.random.default_rng(runtime.seed)
        starts = range(0, samples, self.batch_size)
        with runtime.progress.track("linear heads", self.epochs * len(starts)) as meter:
            for epoch in range(self.epochs):
                order = rng.permutation(samples)
                for i, start in enumerate(starts):
                    batch = np.sort(order[start : start + self.batch_size])
                    index = torch.from_numpy(batch).to(runtime.device)
                    x = part.rows.at(batch, runtime.device) if whole is None else whole[index]
                    rate = self.rate(epoch + i / len(starts))
                    loss = heads.step(x, targets[index], rate, softmax=not part.multilabel)
                    if (epoch * len(starts) + i) % 100 == 0:
                        meter.update(epoch * len(starts) + i, loss=float(loss.min()))
            meter.update(self.epochs * len(starts))
        yield from (Predictions(scores) for scores in self._scores(heads, points, runtime))

    def _scores(self, heads: LinearHeads, points: Rows, runtime: Runtime) -> Iterator[Floats]:
        for head in range(heads.count):  # one at a time: all at once would be G x M x C numbers
            yield torch.cat([heads.scores(x, head).cpu() for _, x in points.chunks(runtime.device)]).numpy()


class LinearHeads:
    """G linear heads on the same features, and SGD on them, one learning rate and weight decay each.

    ``weight`` is (D, G, C) and ``bias`` (G, C), so that the heads of a batch are one matrix product, and so is their
    gradient. As ``torch.optim.SGD``: ``g += decay w; v = momentum v + g; w -= lr v``. Weights start from N(0, 0.01),
    the same for all heads; biases from zero.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        lrs: Sequence[float],
        weight_decays: Sequence[float],
        *,
        momentum: float = 0.9,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.count, self.momentum = len(lrs), momentum
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(width, 1, classes, generator=generator) * 0.01
        self.weight = first.repeat(1, self.count, 1).to(device)
        self.bias = torch.zeros(self.count, classes, device=device)
        self.velocity = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self.lr = torch.tensor(lrs, dtype=torch.float32, device=device)[:, None]
        self.decay = torch.tensor(weight_decays, dtype=torch.float32, device=device)[:, None]

    def step(self, x: Tensor, targets: Tensor, rate: float = 1.0, *, softmax: bool = True) -> Tensor:
        """One step on features (B, D) and targets (B, C), NaN where unknown; the loss of each head before it (G,).

        ``rate`` is the factor on the learning rates. ``softmax``: cross-entropy; else a logistic loss per label,
        averaged over what is known.
        """
        logits = (x @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias  # (B, G, C)
        known = ~torch.isnan(targets[:, None])
        y = targets[:, None].nan_to_num()
        if softmax:
            logs = torch.log_softmax(logits, 2)
            loss, error, total = -(logs * y).sum((0, 2)), logs.exp() - y, len(x)
        else:
            terms = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none")
            loss, error, total = (terms * known).sum((0, 2)), (logits.sigmoid() - y) * known, max(1, int(known.sum()))
        error = error / total
        self._update(self.weight, (x.T @ error.flatten(1)).view_as(self.weight), 0, rate)
        self._update(self.bias, error.sum(0), 1, rate)
        return loss / total

    def scores(self, x: Tensor, head: int) -> Tensor:
        """(B, C) logits of one head."""
        return x @ self.weight[:, head] + self.bias[head]

    def _update(self, tensor: Tensor, gradient: Tensor, place: int, rate: float) -> None:
        velocity = self.velocity[place].mul_(self.momentum).add_(gradient + self.decay * tensor)
        tensor.sub_(self.lr * rate * velocity)
