"""Logistic regression at a grid of costs, by L-BFGS in the space that the features span."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from evalsuite.errors import DataError
from evalsuite.probes.rows import CHUNK, Part, Predictions, Rows, Runtime, Setting, free_memory

__all__ = ["Basis", "Logistic", "minimise"]


# DINOv2's 45 costs of logistic regression, four a decade, written out: computed, their last digits differ by processor.
COSTS = (*(float(f"{digits}e{power}") for power in range(-6, 5) for digits in ("1", "1.78", "3.16", "5.62")), 1e5)


@dataclass(frozen=True)
class Logistic:
    """Logistic regression for a path of costs C, all of them solved at once by batched L-BFGS.

    Minimises scikit-learn's objective, ``C sum loss + |w|^2 / 2`` with a free intercept: softmax cross-entropy for
    three classes and more, one logistic loss for two, and one per label for several labels a sample (unknown ones
    left out). It ends when the gradient of the objective divided by C N is shorter than ``tolerance`` (scikit-learn
    compares its largest entry). ``together`` is how many costs are solved in one batch (None: as many as memory
    allows); each batch starts where the one before ended. A class that has no training samples scores minus infinity.
    """

    costs: tuple[float, ...] = COSTS
    tolerance: float = 1e-5
    max_evaluations: int = 1000
    together: int | None = None
    dtype: Literal["float32", "float64"] = "float32"
    scale: Literal["logits"] = "logits"

    def settings(self, samples: int) -> list[dict[str, Any]]:
        return [{"C": cost} for cost in sorted(self.costs)]

    def fit(self, part: Part, points: Rows, settings: Sequence[Setting], runtime: Runtime) -> Iterator[Predictions]:
        problem = _LogisticProblem(part, runtime.device, getattr(torch, self.dtype))
        costs = torch.tensor([s["C"] for s in settings], dtype=torch.float64)
        together = self.together or max(1, problem.fitting(len(costs)))
        start: Tensor | None = None
        projected = [problem.basis.project(rows) for _, rows in points.chunks(runtime.device)]
        for at in range(0, len(costs), together):
            here = costs[at : at + together]
            solution = problem.solve(here, start, self.tolerance, self.max_evaluations)
            start = solution.x[-1]
            for i in range(len(here)):
                yield self._fitted(problem, solution, i, float(here[i]), projected)

    def _fitted(
        self, problem: _LogisticProblem, solution: Solution, i: int, cost: float, projected: Sequence[Tensor]
    ) -> Predictions:
        details = {
            "objective": float(solution.value[i]) * cost * problem.samples,
            "gradient": float(solution.gradient_norm[i]),
            "evaluations": int(solution.evaluations[i]),
        }
        told: tuple[str, ...] = ()
        if not solution.converged[i]:
            told = (f"logistic regression at C={cost:g} stopped at a gradient of {details['gradient']:.2g}",)
        scores = torch.cat([problem.scores(solution.x[i], z).cpu() for z in projected])
        return Predictions(scores.numpy(), details, told)


class Basis:
    """The principal axes of centred features: mean (D,), axes (D, r), eigenvalues (r,) of the scatter matrix.

    An L2 penalty leaves a solution in the span of the centred features, so r numbers a class are enough.
    """

    def __init__(self, mean: Tensor, axes: Tensor, eigenvalues: Tensor) -> None:
        self.mean, self.axes, self.eigenvalues = mean, axes, eigenvalues
        self.rank = axes.shape[1]

    @classmethod
    def of(cls, rows: Rows, device: torch.device | str) -> Basis:
        """From the scatter matrix, D x D, or from inner products, N x N, whichever is smaller; in float64."""
        total = torch.zeros(rows.width, dtype=torch.float64, device=device)
        for _, chunk in rows.chunks(device):
            total += chunk.sum(0, dtype=torch.float64)
        mean = total / len(rows)
        if len(rows) < rows.width:
            centred = rows.at(slice(None), device).double() - mean
            values, vectors = torch.linalg.eigh(centred @ centred.T)
            keep = _kept(values, rows)
            return cls(mean, centred.T @ vectors[:, keep] / values[keep].sqrt(), values[keep])
        scatter = torch.zeros(rows.width, rows.width, dtype=torch.float64, device=device)
        for _, chunk in rows.chunks(device):
            centred = chunk.double() - mean
            scatter += centred.T @ centred
        values, vectors = torch.linalg.eigh(scatter)
        keep = _kept(values, rows)
        return cls(mean, vectors[:, keep], values[keep])

    def project(self, rows: Tensor) -> Tensor:
        """(b, D) to (b, r), as precise as its input."""
        projected: Tensor = (rows - self.mean.to(rows.dtype)) @ self.axes.to(rows.dtype)
        return projected


def _kept(eigenvalues: Tensor, rows: Rows) -> Tensor:
    """Which eigenvalues are not rounding errors of a zero."""
    floor = eigenvalues[-1] * max(len(rows), rows.width) * torch.finfo(torch.float64).eps
    return (eigenvalues > floor).nonzero()[:, 0]


class _LogisticProblem:
    """Regularised logistic regression at many strengths, in the principal axes of the features.

    A point is (G, K, r + 1): weights along the axes, then the intercept of the centred features. K is the number of
    columns: the classes that are there, 1 for two, the labels where there are several a sample.
    """

    def __init__(self, part: Part, device: torch.device | str, dtype: torch.dtype) -> None:
        self.classes, self.dtype, self.device = part.classes, dtype, torch.device(device)
        self.rows, self.samples = part.rows, len(part.rows)
        self.basis = Basis.of(part.rows, device)
        self._targets(part)
        self.data = self._resident()
        self.moments = torch.zeros(self.columns, self.basis.rank + 1, dtype=torch.float64, device=self.device)
        for where, z in self._chunks():
            y = self.targets[where].to(self.device, self.dtype).nan_to_num()
            self.moments[:, :-1] += (y.T @ z).double()
            self.moments[:, -1] += y.sum(0, dtype=torch.float64)

    def _targets(self, part: Part) -> None:
        targets = torch.from_numpy(part.targets())
        present = torch.arange(part.classes) if part.multilabel else targets.any(0).nonzero()[:, 0]
        if len(present) < 2 and not part.multilabel:
            raise DataError(
                "the training data hold a single class", cause="there is nothing to tell apart", fix="check the labels"
            )
        self.present, self.softmax = present, not part.multilabel and len(present) > 2
        binary = not part.multilabel and len(present) == 2
        self.targets = targets[:, present[1:]] if binary else targets[:, present]
        self.columns = self.targets.shape[1]
        self.known = None if not torch.isnan(self.targets).any() else ~torch.isnan(self.targets)

    def _resident(self) -> Tensor | None:
        if self.samples * self.basis.rank * 8 > free_memory(self.device) // 2:
            return None
        return torch.cat([self.basis.project(rows.to(self.dtype)) for _, rows in self.rows.chunks(self.device)])

    def _chunks(self, size: int = CHUNK) -> Iterator[tuple[slice, Tensor]]:
        if self.data is None:
            for where, rows in self.rows.chunks(self.device, size):
                yield where, self.basis.project(rows.to(self.dtype))
        else:
            for start in range(0, self.samples, size):
                yield slice(start, start + size), self.data[start : start + size]

    def fitting(self, wanted: int) -> int:
        """How many problems fit into a quarter of the free memory: a point, its history and its logits."""
        each = self.columns * ((self.basis.rank + 1) * 30 + 4 * 512) * self.dtype.itemsize
        return min(wanted, free_memory(self.device) // 4 // each)

    def solve(self, costs: Tensor, start: Tensor | None, tolerance: float, most: int) -> Solution:
        """Solve for all ``costs`` (G,) at once, from ``start`` (K (r + 1),) or from zero."""
        penalty = (1 / (costs * self.samples)).to(self.device, self.dtype)
        shape = (len(costs), self.columns * (self.basis.rank + 1))
        x = torch.zeros(shape, dtype=self.dtype, device=self.device) if start is None else start.expand(shape)
        scatter = torch.cat([self.basis.eigenvalues / self.samples, self.basis.eigenvalues.new_ones(1)])
        scatter = scatter.to(self.dtype)
        curvature = torch.ones(len(costs), self.columns, dtype=self.dtype, device=self.device)

        def value(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            values, gradient, curvature[which] = self._value(points, penalty[which])
            return values, gradient

        def precondition(vectors: Tensor, which: Tensor) -> Tensor:
            # The Hessian, were the probabilities of all samples alike: curvature times scatter, plus the penalty.
            diagonal = curvature[which, :, None] * scatter
            diagonal[:, :, :-1] += penalty[which, None, None]
            moved: Tensor = vectors.unflatten(1, (self.columns, -1)) / diagonal
            return moved.flatten(1)

        return minimise(value, x.clone(), precondition, tolerance=tolerance, max_evaluations=most)

    def _value(self, points: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss plus penalty (G,), its gradient (G, P), and the mean curvature of the loss (G, K)."""
        count, weights = len(points), points.unflatten(1, (self.columns, -1))
        flat = weights.transpose(0, 1).reshape(self.columns * count, -1)  # (K G, r + 1): classes lead
        slopes, offsets = flat[:, :-1].contiguous(), flat[:, -1:].contiguous()
        # Targets enter linearly: sum of y z w is the product with the moments, once for all samples.
        loss = -(self.moments * weights.double()).sum((1, 2))
        gradient = -self.moments.to(self.dtype).repeat(count, 1, 1)
        curvature = None
        for where, z in self._chunks(max(256, min(4096, 1 << 20 // (self.columns * count)))):
            logits = torch.addmm(offsets, slopes, z.T).unflatten(0, (self.columns, count))
            known = None if self.known is None else self.known[where].T[:, None].to(self.device)
            part, p = self._loss(logits, known)
            loss += part
            if curvature is None:  # of the first chunk; it serves the preconditioner alone
                curvature = self._curvature(p)
            flat_p = p.flatten(0, 1)
            step = torch.cat([flat_p @ z, flat_p.sum(1, keepdim=True)], 1)
            gradient += step.unflatten(0, (self.columns, count)).transpose(0, 1)
        gradient = gradient / self.samples
        gradient[:, :, :-1] += penalty[:, None, None] * weights[:, :, :-1]
        square = weights[:, :, :-1].double().pow(2).sum((1, 2))
        assert curvature is not None
        return loss / self.samples + penalty.double() * square / 2, gradient.flatten(1), curvature

    def _loss(self, logits: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of the losses but for the targets' linear term (G,), and the probabilities, in place of logits."""
        if self.softmax:
            top = logits.amax(0)
            p = logits.sub_(top).exp_()
            total = p.sum(0)
            p *= total.reciprocal()
            return (top + total.log_()).sum(1, dtype=torch.float64), p
        terms = torch.nn.functional.softplus(logits)
        p = logits.sigmoid_()
        if known is not None:
            terms, p = terms * known, p * known
        return terms.sum((0, 2), dtype=torch.float64), p

    def _curvature(self, p: Tensor) -> Tensor:
        if self.softmax:
            spread = ((1 - p.pow(2).sum(0)).mean(1) / (self.columns - 1))[:, None].expand(-1, self.columns)
        else:
            spread = (p * (1 - p)).mean(2).T
        return spread.clamp_min(1e-6)

    def scores(self, x: Tensor, z: Tensor) -> Tensor:
        """(b, C) logits of points given along the axes."""
        weights = x.unflatten(0, (self.columns, -1))
        logits: Tensor = (z.to(self.dtype) @ weights[:, :-1].T + weights[:, -1]).float()
        if not self.softmax and self.columns == 1 and self.classes > 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        if logits.shape[1] == self.classes:
            return logits
        table = torch.full((len(z), self.classes), -math.inf, device=logits.device)
        table[:, self.present.to(logits.device)] = logits
        return table


class Solution(NamedTuple):
    """Minima of G functions: points (G, P), values, gradient lengths, evaluations and whether each converged (G,)."""

    x: Tensor
    value: Tensor
    gradient_norm: Tensor
    evaluations: Tensor
    converged: Tensor


def minimise(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    precondition: Callable[[Tensor, Tensor], Tensor],
    *,
    tolerance: float,
    max_evaluations: int = 1000,
    history: int = 10,
) -> Solution:
    """L-BFGS (Nocedal and Wright 2006, algorithm 7.4) on G smooth convex functions at once, each at its own pace.

    ``function(points (g, P), which (g,))`` gives values (g,), float64, and gradients (g, P) of the functions
    ``which``; ``precondition(vectors, which)`` applies an approximate inverse Hessian. Every evaluation moves each
    function on by one trial, accepted or shortened, and those that are done drop out of the batch. A function is done
    when its gradient is no longer than ``tolerance``, and given up when neither it nor a shorter step brings it lower
    than rounding errors.
    """
    count, device = len(x), x.device
    noise = 8 * torch.finfo(x.dtype).eps
    which = torch.arange(count, device=device)
    value, gradient = function(x, which)
    evaluations = torch.ones(count, dtype=torch.long, device=device)
    memory = _History(x, history)
    direction = -precondition(gradient, which)
    step = torch.ones(count, dtype=x.dtype, device=device)
    tries, idle = torch.zeros_like(evaluations), torch.zeros_like(evaluations)
    norm = gradient.norm(dim=1)
    for _ in range(max_evaluations - 1):
        which = ((norm > tolerance) & (tries < 20) & (idle < 5)).nonzero()[:, 0]
        if not len(which):
            break
        trial = x[which] + step[which, None] * direction[which]
        found, slope_there = function(trial, which)
        evaluations[which] += 1
        slope = (gradient[which] * direction[which]).sum(1).double()
        length = step[which].double()
        limit = value[which] + 1e-4 * length * slope + noise * value[which].abs()
        good = torch.isfinite(found) & (found <= limit)
        bad = which[~good]
        # Shorten to the minimum of the parabola through what is known, within a tenth and a half.
        parabola = -slope * length / (2 * (found - value[which] - slope * length)).clamp_min(1e-300)
        shorter = (torch.nan_to_num(parabola, 0.1).clamp(0.1, 0.5) * length).to(x.dtype)
        step[bad] = shorter[~good]
        tries[bad] += 1
        done = which[good]
        memory.push(done, trial[good] - x[done], slope_there[good] - gradient[done])
        length_there = slope_there[good].norm(dim=1)
        gained = (value[done] - found[good] > noise * value[done].abs()) | (length_there < 0.9 * norm[done])
        idle[done] = torch.where(gained, 0, idle[done] + 1)
        x[done], value[done], gradient[done] = trial[good], found[good], slope_there[good]
        norm[done], step[done], tries[done] = length_there, 1.0, 0
        direction[done] = -memory.inverse_hessian(gradient[done], done, precondition)
    return Solution(x, value, norm, evaluations, norm <= tolerance)


class _History:
    """The last steps and changes of gradient of each function: (m, G, P) rings, each with its own place."""

    def __init__(self, x: Tensor, length: int) -> None:
        self.length = length
        self.steps, self.changes = x.new_zeros(length, *x.shape), x.new_zeros(length, *x.shape)
        self.inverse = x.new_zeros(length, len(x))  # 1 / (step . change); 0: there is none
        self.place = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def push(self, which: Tensor, step: Tensor, change: Tensor) -> None:
        product = (step * change).sum(1)
        # Convex, so never negative but for rounding; such a pair would spoil the estimate.
        sound = product > torch.finfo(step.dtype).eps * step.norm(dim=1) * change.norm(dim=1)
        which, step, change = which[sound], step[sound], change[sound]
        place = self.place[which]
        self.steps[place, which], self.changes[place, which] = step, change
        self.inverse[place, which] = 1 / product[sound]
        self.place[which] = (place + 1) % self.length

    def inverse_hessian(
        self, vector: Tensor, which: Tensor, precondition: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The two-loop recursion around the preconditioner, scaled to the newest pair."""
        places = [(self.place[which] - 1 - j) % self.length for j in range(self.length)]
        factors = []
        vector = vector.clone()
        for place in places:
            factor = self.inverse[place, which] * (self.steps[place, which] * vector).sum(1)
            vector -= factor[:, None] * self.changes[place, which]
            factors.append(factor)
        change, inverse = self.changes[places[0], which], self.inverse[places[0], which]
        scale = 1 / (inverse * (change * precondition(change, which)).sum(1))
        result = precondition(vector, which) * torch.where(inverse > 0, scale, 1.0)[:, None]
        for place, factor in zip(reversed(places), reversed(factors), strict=True):
            back = self.inverse[place, which] * (self.changes[place, which] * result).sum(1)
            result += (factor - back)[:, None] * self.steps[place, which]
        return result
