"""Parts that several methods share: heads, twins, queues, banks, codes, contrastive losses, LARS and
schedules.

Three conventions hold throughout. Rows are samples, so a feature matrix is (rows, width). Losses take
features as the network gives them, normalise them here, and are computed in float32 or better whatever the
autocast around them. What reaches across processes goes through :func:`gather`, in rank order and with the
same number of rows from each process; where no process group exists every function works on its own rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from evalsuite import UsageError
from evalsuite.training import LARS, full_precision, uncast

__all__ = [
    "LARS",
    "Bank",
    "EmaTwin",
    "Noise",
    "Queue",
    "Tally",
    "apart",
    "contrast",
    "cosine_schedule",
    "ema_momentum",
    "firsts",
    "full_precision",
    "gather",
    "info_nce",
    "kmeans",
    "mlp_head",
    "neg_cosine",
    "nt_xent",
    "rank",
    "reached",
    "sample_of",
    "simclr_head",
    "sinkhorn",
    "split_decay",
    "step_schedule",
    "warmup_share",
    "world_size",
]

P = ParamSpec("P")
R = TypeVar("R")


# Processes -------------------------------------------------------------------------------------------------


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """Concatenate over processes; each gets back the gradients that all of them have for its rows, summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        out = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(out, rows.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.count :][: ctx.count]


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes in rank order (world * rows, ...); differentiable. Every process brings
    equally many.

    The gradient of one process's rows is the *sum* over the losses of all processes.
    DistributedDataParallel then averages over processes, so a loss that is a mean over local rows trains
    exactly as its mean over all rows would.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


class Noise:
    """Random numbers for the images of a batch, each image's from a generator of its own on the device.

    ``Noise(rng, count, device)`` draws a seed for every image of all processes from ``rng``, which all of them have
    alike (``run.rng``), and keeps those of this process's ``count`` images: what an image is given does not depend on
    how many processes share the batch.
    """

    def __init__(self, rng: torch.Generator, count: int, device: torch.device) -> None:
        seeds = torch.randint(2**62, (count * world_size(),), generator=rng)[rank() :: world_size()]
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape of ``like`` (B, ...)."""
        return self._filled(like, Tensor.normal_)

    def exponential(self, like: Tensor) -> Tensor:
        """Exponential numbers of rate one in the shape of ``like`` (B, ...)."""
        return self._filled(like, Tensor.exponential_)

    def _filled(self, like: Tensor, fill: Callable[..., Tensor]) -> Tensor:
        if len(like) != len(self.generators):
            raise ValueError(f"there is noise for {len(self.generators)} images, not for {len(like)}")
        drawn = torch.empty_like(like, memory_format=torch.contiguous_format)  # numbers fill memory in its order
        for row, generator in zip(drawn, self.generators, strict=True):
            fill(row, generator=generator)
        return drawn


def firsts(source: Tensor, index: Tensor | None = None) -> Tensor:
    """Positions, ascending, at which each value of ``source`` (M,) stands for the first time.

    With ``index``, the rows of a batch: for as many times as its sample stands there. A queue that takes the
    keys of these positions takes every image of the batch once, whatever copies were added to the pairs and
    even where an image is in the batch twice, so that their number does not depend on the images.
    """
    order = source.argsort(stable=True)
    _, counts = source[order].unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    nth = torch.empty_like(order)
    nth[order] = torch.arange(len(order), device=order.device) - starts.repeat_interleave(counts)
    if index is None:
        return (nth == 0).nonzero()[:, 0]
    times = (sample_of(source)[:, None] == index).sum(1)
    return (nth < times).nonzero()[:, 0]


def apart(source: Tensor) -> Tensor:
    """Sources for copies of samples that shall count as samples of their own: one to one, and all below 0."""
    return -1 - source


def sample_of(source: Tensor) -> Tensor:
    """The samples that rows come from, whether they go by those or were set :func:`apart`."""
    return torch.where(source < 0, apart(source), source)


class Tally(nn.Module):
    """A count that travels in the state dict as the buffer ``value`` and is read without waiting for the
    device.
    """

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros((), dtype=torch.long))
        self._count = 0
        self.register_load_state_dict_post_hook(_recount)  # type: ignore[no-untyped-call]

    def __int__(self) -> int:
        return self._count

    def add(self, amount: int = 1) -> None:
        """Count further."""
        self._count += amount
        self.value.fill_(self._count)


def _recount(tally: nn.Module, _: object) -> None:
    assert isinstance(tally, Tally)
    tally._count = int(tally.value)


# Heads -----------------------------------------------------------------------------------------------------


def mlp_head(
    *widths: int,
    norm: bool = True,
    last_norm: Literal["none", "affine", "scale", "plain"] = "none",
    hidden_bias: bool | None = None,
    last_bias: bool = True,
) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them, for (B, widths[0]) -> (B, widths[-1]).

    ``norm`` puts batch normalisation before each ReLU; hidden layers then go without a bias unless
    ``hidden_bias`` says otherwise. ``last_norm`` normalises the output too: ``affine`` with scale and
    shift, ``scale`` with a scale alone (SimCLR), ``plain`` with neither (SimSiam). MoCo v2: ``mlp_head(d,
    d, 128, norm=False)``; BYOL: ``mlp_head(d, 4096, 256, hidden_bias=True)``; SimSiam's projector:
    ``mlp_head(d, d, d, d, last_norm="plain", last_bias=False)`` (the official last bias is frozen, and a
    shift before batch normalisation has no effect).
    """
    if len(widths) < 2:
        raise ValueError(f"a head needs a width to start from and one to end with, not {widths}")
    hidden_bias = not norm if hidden_bias is None else hidden_bias
    layers: list[nn.Module] = []
    for width, following in pairwise(widths[:-1]):
        layers.append(nn.Linear(width, following, bias=hidden_bias))
        layers += [nn.BatchNorm1d(following)] * norm + [nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    if last_norm != "none":
        last = nn.BatchNorm1d(widths[-1], affine=last_norm != "plain")
        if last_norm == "scale":
            last.bias.requires_grad_(False)  # it stays at zero; without the tensor cuDNN's kernels do not run
        layers.append(last)
    return nn.Sequential(*layers)


def simclr_head(dim: int, width: int = 128, version: Literal["v1", "v2"] = "v2") -> nn.Sequential:
    """SimCLR's projection head, two layers (v1) or three (v2), (B, dim) -> (B, width).

    As ``projection_head`` of google-research/simclr: batch normalisation after every layer, the last with a
    scale and no shift, so no layer has a bias; hidden layers keep ``dim``; weights start as N(0, 0.01).
    """
    hidden = [dim] * {"v1": 1, "v2": 2}[version]
    head = mlp_head(dim, *hidden, width, last_norm="scale", last_bias=False)
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
    return head


# What is remembered ----------------------------------------------------------------------------------------


def ema_momentum(step: int, total: int, start: float, end: float = 1.0) -> float:
    """The momentum at ``step`` of ``total`` on a cosine from ``start`` to ``end``; it stays at ``end``
    afterwards.

    BYOL and PixPro (start 0.99) write it as 1 - (1 - start) (cos(pi t / T) + 1) / 2.
    """
    return end - (end - start) * (math.cos(math.pi * min(step / total, 1.0)) + 1) / 2


class EmaTwin(nn.Module):
    """A slow copy of a module: ``twin(x)`` runs it, ``twin.update(online)`` moves it a step.

    Only parameters are averaged. Buffers, the statistics of batch normalisation among them, are the twin's
    own and evolve by its forward passes, as in MoCo, PixPro and BYOL; it follows the train/eval mode of its
    owner. Nothing in it takes a gradient. ``momentum`` is constant, or with ``total`` rises from it to
    ``end`` over that many updates (:func:`ema_momentum`); the first update uses step 0. The number of
    updates so far is in the state dict, so that a resumed run goes on along the schedule (the official
    PixPro starts it anew).
    """

    def __init__(
        self, online: nn.Module, momentum: float = 0.999, *, total: int | None = None, end: float = 1.0
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1 or (total is not None and total < 1):
            raise ValueError(f"a twin needs {momentum=} in [0,1] and a positive {total=}")
        self.net = copy.deepcopy(online).requires_grad_(False)
        self.updates = Tally()
        self._start, self._end, self._total = momentum, end, total

    @property
    def momentum(self) -> float:
        """The momentum of the next update."""
        if self._total is None:
            return self._start
        return ema_momentum(int(self.updates), self._total, self._start, self._end)

    @torch.no_grad()
    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.net(*inputs, **options)

    @torch.no_grad()
    def update(self, online: nn.Module) -> None:
        """twin <- m twin + (1 - m) online, parameter by parameter."""
        slow: list[Tensor] = list(self.net.parameters())
        fast: list[Tensor] = list(online.parameters())
        if len(slow) != len(fast):
            raise ValueError(f"the twin has {len(slow)} parameters and the online module {len(fast)}")
        torch._foreach_lerp_(slow, fast, 1 - self.momentum)
        self.updates.add()


class Queue(nn.Module):
    """The last ``size`` keys, oldest overwritten first: MoCo's dictionary.

    ``rows`` is (size, width), one unit vector a row, as everywhere here; the official
    MoCo keeps the transpose, (width, size). Without ``unit`` keys are kept as they are (OBoW's words). It
    starts with random unit vectors drawn from ``rng``, or with zeros if ``empty``, and ``filled`` tells
    whether every row has been pushed. ``shared`` queues take the
    keys of all processes in rank order and so hold the same rows everywhere; the others keep to their own
    process (SwAV). What was pushed so far is in the state dict.
    """

    rows: Tensor

    def __init__(
        self,
        size: int,
        width: int,
        *,
        rng: torch.Generator | None = None,
        empty: bool = False,
        shared: bool = True,
        unit: bool = True,
    ) -> None:
        super().__init__()
        start = torch.zeros(size, width) if empty else F.normalize(torch.randn(size, width, generator=rng))
        self.register_buffer("rows", start)
        self.pushed = Tally()
        self._shared, self._unit = shared, unit

    @property
    def pointer(self) -> int:
        """The row that is overwritten next."""
        return int(self.pushed) % len(self.rows)

    @property
    def filled(self) -> bool:
        """Whether every row has been pushed at least once."""
        return int(self.pushed) >= len(self.rows)

    def fits(self, rows: int) -> None:
        """Refuse a push of ``rows`` from every process that would not tile the queue; ask before training
        starts.
        """
        total = rows * (world_size() if self._shared else 1)
        if total == 0 or len(self.rows) % total:
            raise UsageError(
                f"a queue of {len(self.rows)} cannot be filled {total} keys at a time",
                cause="its size must be a multiple of the keys that one step adds over all processes",
                fix=f"choose a queue of {_nearest(len(self.rows), total)}, or another batch size",
            )

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Replace the oldest rows by keys (M, width). Raises :class:`evalsuite.UsageError` where
        :meth:`fits` does.
        """
        self.fits(len(keys))
        keys = keys.detach().to(self.rows.dtype)
        keys = F.normalize(keys) if self._unit else keys
        keys = gather(keys) if self._shared else keys
        indices = torch.arange(self.pointer, self.pointer + len(keys), device=keys.device) % len(self.rows)
        self.rows[indices] = keys
        self.pushed.add(len(keys))


def _nearest(size: int, step: int) -> int:
    """The multiple of ``step`` nearest to ``size``."""
    return max(1, round(size / max(1, step))) * max(1, step)


class Bank(nn.Module):
    """One unit vector for each sample of the data set: ``rows`` (size, width), written by sample index.

    ``rate`` is the share of the new feature: row <- n((1 - rate) row + rate n(new)); 1 replaces the row
    (InterCLR). Rows start as random unit vectors drawn from ``rng``. Every process holds the same bank.
    """

    rows: Tensor

    def __init__(self, size: int, width: int, *, rate: float = 1.0, rng: torch.Generator | None = None) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"the rate of a bank lies in (0,1], not at {rate}")
        self.register_buffer("rows", F.normalize(torch.randn(size, width, generator=rng)))
        self._rate = rate

    @torch.no_grad()
    def write(self, index: Tensor, features: Tensor) -> Tensor:
        """Write features (M, width) of all processes at rows ``index`` (M,); returns which rows were written.

        Of several features for one row the first, in rank order, counts.
        """
        index, features = gather(index), gather(features.detach().to(self.rows.dtype))
        kept = firsts(index)
        index, features = index[kept], F.normalize(features[kept])
        self.rows[index] = F.normalize(torch.lerp(self.rows[index], features, self._rate))
        return index


# Assignments -----------------------------------------------------------------------------------------------


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """SwAV's codes: scores (B, K) of samples against prototypes -> balanced soft assignments (B, K).

    Sinkhorn-Knopp on exp(scores / epsilon), over the samples of all processes. The last step normalises
    samples, so that rows sum to 1 exactly and columns to B / K only nearly. It works on logarithms: the
    same numbers as the official code, whose exp overflows in half precision and for scores that are not
    cosines; the constants it divides by (K, B and the grand total) cancel in the next normalisation and are
    left out.
    """
    with uncast(scores.device):
        log = full_precision(scores) / epsilon
        for _ in range(iterations):
            prototypes = log.logsumexp(0, keepdim=True)
            log = log - gather(prototypes).logsumexp(0, keepdim=True)
            log = log - log.logsumexp(1, keepdim=True)
        return log.exp()


def kmeans(
    rows: Tensor, clusters: int, *, seed: int = 0, iterations: int = 300, batch: int | None = None
) -> tuple[Tensor, Tensor]:
    """Clusters of rows (N, D) by scikit-learn: labels (N,) int64 and centres (clusters, D), on the rows'
    device.

    ``batch`` asks for mini-batch k-means with that many rows a step, for sets too large for Lloyd's
    algorithm. Raises :class:`evalsuite.UsageError` where there are fewer rows than clusters.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans  # slow to import, and few methods cluster

    if not 1 <= clusters <= len(rows):
        raise UsageError(
            f"{len(rows)} samples cannot be put into {clusters} clusters",
            cause="every cluster needs a sample",
            fix="ask for fewer clusters or bring more data",
        )
    options = {"n_clusters": clusters, "random_state": seed % 2**32, "max_iter": iterations, "n_init": 1}
    model = KMeans(**options) if batch is None else MiniBatchKMeans(batch_size=batch, **options)
    fitted = model.fit(full_precision(rows.detach()).cpu().numpy())
    labels = torch.as_tensor(fitted.labels_, dtype=torch.long, device=rows.device)
    return labels, torch.as_tensor(fitted.cluster_centers_, dtype=rows.dtype, device=rows.device)


# Losses ----------------------------------------------------------------------------------------------------


def _precise(loss: Callable[P, R]) -> Callable[P, R]:
    """Run a loss outside autocast, on half-precision features widened: its exponentials need the range."""

    @wraps(loss)
    def precisely(*args: P.args, **kwargs: P.kwargs) -> R:
        wide, named = tree_map_only(Tensor, full_precision, (args, kwargs))
        kind = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        with torch.autocast(kind, enabled=False):
            return loss(*wide, **named)

    return precisely


@_precise
def contrast(positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of one positive similarity (M,) against its negatives (M, K): mean of -log softmax at
    the positive.

    A negative of minus infinity does not count.
    """
    logits = torch.cat([positive[:, None], negative], 1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


@_precise
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    source: Tensor | None = None,
    temperature: float = 0.07,
) -> Tensor:
    """InfoNCE of queries (M, D) and their keys (M, D): CE over [q.k+, q.k-] / temperature, mean over queries.

    ``negatives`` (K, D) are rows of unit length that all queries share: a :class:`Queue` (MoCo, eq. 1).
    Without them the keys of the other rows of all processes are the negatives, gathered with their
    gradients, but for rows of the same ``source`` (M,).
    """
    query, key = F.normalize(query), F.normalize(key)
    positive = (query * key).sum(1)
    if negatives is not None:
        return contrast(positive, query @ negatives.to(query.dtype).T, temperature)
    source = _sources(query, source)
    same = source[:, None] == gather(source)
    return contrast(positive, (query @ gather(key).T).masked_fill(same, -math.inf), temperature)


@_precise
def nt_xent(
    query: Tensor,
    key: Tensor,
    source: Tensor | None = None,
    *,
    temperature: float = 0.1,
    kin: Literal["ignored", "positive"] = "ignored",
) -> Tensor:
    """NT-Xent of two views (M, D) each, mean over the 2 M anchors (SimCLR, eq. 1); both sides take gradients.

    Row i of ``query`` and row i of ``key`` are each other's positive; every other row of all processes,
    gathered with its gradient, is a negative, but for rows of the same ``source`` (M,; default: all
    differ). Such kin are ``ignored``, or ``positive``: then the loss is -log of the softmax mass on all
    rows of the source, as in solo-learn's ``simclr_loss_func``, which AdaInf trains with.

    google-research/simclr adds the means of the two directions: twice this value. The
    supervised-contrastive form with a base temperature t0 (official Hallucinator, t0 = 0.07) is this value
    times temperature / t0.
    """
    z = torch.cat([F.normalize(query), F.normalize(key)])
    count = len(query)
    source = _sources(query, source).repeat(2)
    row = torch.arange(2 * count, device=z.device)
    offset = rank() * 2 * count
    logits = z @ gather(z).T / temperature
    same = source[:, None] == gather(source)
    itself = torch.zeros_like(same)
    itself[row, offset + row] = True
    mate = (row + count) % (2 * count)  # the other view of each row
    if kin == "positive":
        target = logits.masked_fill(~same | itself, -math.inf).logsumexp(1)
        others = logits.masked_fill(itself, -math.inf)
    else:
        target = logits[row, offset + mate]
        same[row, offset + mate] = False
        others = logits.masked_fill(same, -math.inf)
    return (others.logsumexp(1) - target).mean()


def _sources(rows: Tensor, source: Tensor | None) -> Tensor:
    if source is not None:
        return source
    return torch.arange(len(rows), device=rows.device) + rank() * len(rows)


@_precise
def neg_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """-mean cos(prediction, stop-gradient(target)) of rows (M, D), in [-1, 1] (SimSiam, eq. 1).

    SimSiam halves the sum of the two directions; BYOL's loss of one direction is 2 + 2 times this.
    """
    return -F.cosine_similarity(prediction, target.detach(), dim=1).mean()


# Optimisation ----------------------------------------------------------------------------------------------


def split_decay(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and kernels, which decay; and vectors (biases and the scales and
    shifts of normalisation), which neither decay nor are adapted by :class:`LARS`. Frozen parameters are
    left out.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    return [g for g in groups if g["params"]]


def cosine_schedule(
    step: float, total: float, peak: float, *, floor: float = 0.0, warmup: float = 0, start: float = 0.0
) -> float:
    """The learning rate at ``step``: a straight line from ``start`` to ``peak`` over ``warmup``, then half
    a cosine down to ``floor`` at ``total``. For other lines see :func:`warmup_share`.

    Steps may be iterations (SimCLR, PixPro, SwAV) or whole epochs from 0 (MoCo, SimSiam); the unit of all
    three must be the same.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    done = min((step - warmup) / max(total - warmup, 1e-12), 1.0)
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


def step_schedule(step: float, peak: float, milestones: Sequence[float], factor: float = 0.1) -> float:
    """The learning rate at ``step``: ``peak`` times ``factor`` for each milestone reached (MoCo v1: 120,
    160).
    """
    return peak * factor ** sum(reached(step, m) for m in milestones)


def reached(count: float, mark: float) -> bool:
    """Whether a count of steps or epochs has come to a mark that may be a product: 0.28 of 25 epochs is
    7.000000000000001, and means 7.
    """
    return count >= mark or math.isclose(count, mark, rel_tol=1e-12)


def warmup_share(step: int, steps: float, rise: Literal["next", "last", "ahead"] = "next") -> float:
    """How far the learning rate has risen at ``step``, from 0, of ``steps`` of warm-up: 0 at its start, 1 at the peak.

    ``next``: ``step / steps``, so that the first step after the warm-up has the peak (google-research/simclr,
    facebookresearch/mae, zdaxie/PixPro, valeoai/obow, google-research slot_attention). ``last``: the last step of the
    warm-up has it (facebookresearch/swav, whose rates are ``np.linspace(start, peak, steps)``, and solo-learn's
    LinearWarmupCosineAnnealingLR). ``ahead``: ``(step + 1) / steps``, so that it has it too, and no step the start
    (singhgautam/slate, jsikyoon/OCRL, lightly).
    """
    if rise == "next":
        return step / steps
    if rise == "ahead":
        return min(1.0, (step + 1) / steps)
    return step / max(1, math.ceil(steps) - 1)
