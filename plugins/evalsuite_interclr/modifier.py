"""InterCLR: positives among other images of the same online pseudo-class, negatives that are semi-hard.

"Delving into Inter-Image Invariance for Unsupervised Visual Representations", Xie, Zhan, Liu, Ong, Loy,
IJCV 2022, arXiv 2008.11702; official code: mmselfsup 0.x, ``interclr_moco.py``, ``interclr_memory.py``,
``interclr_hook.py``.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sized
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from evalsuite import UsageError, hookimpl
from evalsuite.training import uncast
from pretrain import Modifier, Pairs, Run, blocks

UNSEEN = -1  # the label of a row that no step has written yet
LLOYD = 100_000  # rows up to which every k-means iteration looks at all of them


def with_margin(cosine: Tensor, margin: float, kind: Literal["cos", "arc"]) -> Tensor:
    """The similarity of a positive after its margin; a negative margin raises it and relaxes the boundary.

    ``cos`` subtracts it. ``arc`` adds it to the angle: cos(theta + margin), and where the angle would leave
    [0, pi] the similarity less |margin sin(margin)| or, for a negative margin, more by that. The two pieces
    do not meet, as in ArcFace.
    """
    if kind == "cos":
        return cosine - margin
    turned = cosine * math.cos(margin) - (1 - cosine.square()).clamp(0, 1).sqrt() * math.sin(margin)
    if margin < 0:
        return torch.where(cosine < math.cos(margin), turned, cosine + math.sin(margin) * margin)
    inside = cosine > math.cos(math.pi - margin)
    return torch.where(inside, turned, cosine - math.sin(math.pi - margin) * margin)


def class_means(rows: Tensor, labels: Tensor, previous: Tensor) -> Tensor:
    """The mean row of each class, not normalised, (K, D); an empty class keeps its ``previous`` one.

    Tight classes so have longer centroids and draw more samples by dot product: the official behaviour.
    """
    sums = torch.zeros_like(previous).index_add_(0, labels, rows)
    counts = torch.bincount(labels, minlength=len(previous))[:, None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), previous)


def companions(labels: Tensor, index: Tensor, rng: torch.Generator, may_be_self: bool = True) -> Tensor:
    """For each row of ``index`` (B,) a uniformly drawn row of the same label: (B,).

    Without ``may_be_self`` only the single member of a class is its own companion.
    """
    order = labels.argsort(stable=True)
    ordered, wanted = labels[order], labels[index]
    start = torch.searchsorted(ordered, wanted)
    count = torch.searchsorted(ordered, wanted, right=True) - start
    chance = torch.rand(len(index), generator=rng, device=labels.device)
    if may_be_self:
        return order[start + (chance * count).long().clamp(max=count - 1)]
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    others = count - 1
    drawn = start + (chance * others).long().clamp(max=(others - 1).clamp(min=0))
    drawn = drawn + ((drawn >= position[index]) & (others > 0)).long()
    return order[drawn]


def mined(
    similarity: Tensor,
    excluded: Tensor,
    count: int,
    pool: int,
    mining: Literal["semi-hard", "semi-easy", "hard", "random"],
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Rows of the bank as negatives of each query: their indices (B, count), and which of them are ones (B,
    count).

    ``similarity`` and ``excluded`` are (B, N). ``semi-hard`` draws without replacement from the ``pool``
    most similar rows, ``semi-easy`` from the least similar, ``random`` from all; ``hard`` takes the most
    similar. Excluded rows never count, so a query may have fewer negatives. The official code draws again
    until no row of the query's own class is left, which may repeat rows and never ends where one class
    fills the pool.
    """
    count = min(count, similarity.shape[1])
    if mining == "hard":
        hardest = similarity.masked_fill(excluded, -math.inf).topk(count)
        return hardest.indices, hardest.values > -math.inf
    if mining == "random":
        lots = torch.rand(similarity.shape, generator=rng, device=similarity.device)
        drawn = lots.masked_fill_(excluded, -1).topk(count)
        return drawn.indices, drawn.values >= 0
    pool = min(max(pool, count), similarity.shape[1])
    candidates = similarity.topk(pool, largest=mining == "semi-hard", sorted=False).indices
    lots = torch.rand(candidates.shape, generator=rng, device=similarity.device)
    drawn = lots.masked_fill_(excluded.gather(1, candidates), -1).topk(count)
    return candidates.gather(1, drawn.indices), drawn.values >= 0


class InterCLR(Modifier):
    """Adds to any method with positives a branch that contrasts each query with *other* images.

    A memory bank holds one key for each image, and a pseudo-label that is renewed whenever the image is
    seen: the centroid with the largest dot product. The positive of a query is drawn from its pseudo-class,
    the negatives from the most similar tenth of the bank but for that class, and a margin of -0.5 relaxes
    the boundary:

        L = (1 - weight) L_method + weight CE([cos(q, v+) - margin, cos(q, v-)] / temperature, 0)

    Defaults are those of the published MoCo v2 run on ImageNet; ``clusters``, ``negatives`` and ``pool`` shrink
    with smaller data sets to the same shares of them (1/128, 1.28 % and 10 %; the pool is twice an average
    class at least). Published result: ImageNet linear 68.04 for ResNet-50 after 200 epochs, against 67.58 of
    MoCo v2 in the same code.

    Where this differs from the official code: the bank is filled by the keys of the first ``warmup``
    epochs, during which the method's loss stands alone, and clustered then (officially: features of the
    untrained network before training, and no warm-up); negatives are drawn without repetition; every
    process holds the same bank and updates it alike, so nothing is broadcast. Kept as published, with
    switches: an image may be its own positive (``positive_may_be_self``) and centroids are means that are
    not normalised (``centroid_normalised``).
    """

    @dataclass(frozen=True)
    class Options:
        weight: float = 0.25  # of the inter-image term; the method's own terms keep the rest
        temperature: float = 0.2
        margin: float = -0.5  # taken from the positive's similarity; negative relaxes
        margin_kind: Literal["cos", "arc"] = "cos"
        mining: Literal["semi-hard", "semi-easy", "hard", "random"] = "semi-hard"
        clusters: int = 10000
        negatives: int = 16384  # for each query
        pool: int = 128000  # how many rows semi-hard negatives are drawn from
        min_size: int = 20  # smaller clusters are dissolved, and the largest split in their stead
        refresh: int = 10  # steps between two computations of all centroids
        warmup: int = 1  # epochs that fill the bank before the branch begins
        positive_may_be_self: bool = True
        centroid_normalised: bool = False

    options: Options
    labels: Tensor
    centroids: Tensor

    @hookimpl
    def prepared(self, run: Run, data: Sized) -> None:
        o, size = self.options, len(data)
        if o.warmup < 1:
            raise UsageError(
                f"interclr.warmup is {o.warmup}",
                cause="the bank is empty before the first epoch, so there is nothing to cluster",
                fix="--set interclr.warmup=1",
            )
        clusters = max(2, min(o.clusters, size // 128))
        self.negatives = min(o.negatives, math.ceil(0.0128 * size))
        # A pool no larger than a class would hold nothing but the query's own, where there are few classes.
        self.pool = min(o.pool, max(math.ceil(0.1 * size), 2 * math.ceil(size / clusters)))
        self.min_size = min(o.min_size, max(1, size // clusters // 6))
        self.bank = blocks.Bank(size, run.width)
        self.register_buffer("labels", torch.full((size,), UNSEEN))
        self.register_buffer("centroids", torch.zeros(clusters, run.width))
        self.epochs, self.steps = blocks.Tally(), blocks.Tally()  # steps since the bank was clustered

    @property
    def started(self) -> bool:
        """Whether the bank has been clustered."""
        return int(self.epochs) >= self.options.warmup

    @hookimpl(wrapper=True)
    def pairs(self) -> Generator[None, list[Pairs], list[Pairs]]:
        pairs = yield  # unchanged: to wrap them is to need them, so a method without positives is refused
        return pairs

    @hookimpl(wrapper=True)
    def losses(self, run: Run, pairs: list[Pairs]) -> Generator[None, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        terms = yield
        if not self.started:
            return terms
        weight = self.options.weight
        inter = torch.stack([self.inter(p.query, blocks.sample_of(p.source), run.rng) for p in pairs]).mean()
        intra = [{name: (1 - weight) * term for name, term in losses.items()} for losses in terms]
        return [*intra, {"inter": weight * inter}]

    def inter(self, query: Tensor, index: Tensor, rng: torch.Generator) -> Tensor:
        """The inter-image loss of queries (M, D) of the data set's rows ``index`` (M,)."""
        known = self.labels[index] != UNSEEN  # an image that the warm-up left out has no class yet
        query, index = query[known], index[known]
        if not len(index):
            return query.sum() * 0.0
        draw = torch.Generator(query.device)
        draw.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        o = self.options
        with uncast(query.device):
            query = F.normalize(query.to(torch.promote_types(query.dtype, self.bank.rows.dtype)))
            cosine = query @ self.bank.rows.to(query.dtype).T
            friend = companions(self.labels, index, draw, o.positive_may_be_self)
            excluded = (self.labels == UNSEEN) | (self.labels == self.labels[index][:, None])
            chosen, real = mined(cosine.detach(), excluded, self.negatives, self.pool, o.mining, draw)
            positive = with_margin(cosine.gather(1, friend[:, None])[:, 0], o.margin, o.margin_kind)
            negative = cosine.gather(1, chosen).masked_fill(~real, -math.inf)
            return blocks.contrast(positive, negative, o.temperature)

    @hookimpl
    def stepped(self, pairs: list[Pairs]) -> None:
        first = pairs[0]
        written = self.bank.write(blocks.sample_of(first.source), first.key)
        if not self.started:
            self.labels[written] = 0
            return
        self.labels[written] = (self.bank.rows[written] @ self.centroids.T).argmax(1)
        self.steps.add()
        if int(self.steps) % self.options.refresh == 0:
            self.recentre()
        self.tend()

    @hookimpl
    def epoch_ended(self) -> None:
        self.epochs.add()
        if int(self.epochs) == self.options.warmup:
            self.cluster()

    @torch.no_grad()
    def cluster(self) -> None:
        """Give every row of the bank that has been seen a class, by k-means."""
        seen = (self.labels != UNSEEN).nonzero()[:, 0]
        batch = None if len(seen) <= LLOYD else 16384
        labels, _ = blocks.kmeans(self.bank.rows[seen], len(self.centroids), iterations=20, batch=batch)
        self.labels[seen] = blocks.gather(labels[None])[0]  # rank 0 decides, should rounding ever differ
        self.recentre()
        self.tend()

    @torch.no_grad()
    def recentre(self) -> None:
        """Compute the centroids of all classes anew."""
        seen = self.labels != UNSEEN
        means = class_means(self.bank.rows[seen], self.labels[seen], self.centroids)
        self.centroids.copy_(F.normalize(means) if self.options.centroid_normalised else means)

    @torch.no_grad()
    def tend(self) -> None:
        """Dissolve clusters below ``min_size``, and replace each by half of the largest cluster."""
        counts = torch.bincount(self.labels[self.labels != UNSEEN], minlength=len(self.centroids))
        small = counts < self.min_size
        if not small.any() or small.all():
            return
        moving = (small[self.labels.clamp(min=0)] & (self.labels != UNSEEN)).nonzero()[:, 0]
        scores = (self.bank.rows[moving] @ self.centroids.T).masked_fill(small, -math.inf)
        self.labels[moving] = scores.argmax(1)
        for empty in small.nonzero()[:, 0].tolist():
            counts = torch.bincount(self.labels[self.labels != UNSEEN], minlength=len(self.centroids))
            largest = int(counts.argmax())
            members = (self.labels == largest).nonzero()[:, 0]
            if len(members) < 2:
                return
            halves, _ = blocks.kmeans(self.bank.rows[members], 2, iterations=20)
            self.labels[members[halves == 1]] = empty
            both = torch.tensor([largest, empty], device=members.device)
            means = class_means(self.bank.rows[members], halves, self.centroids[both])
            self.centroids[both] = F.normalize(means) if self.options.centroid_normalised else means
