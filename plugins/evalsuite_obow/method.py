"""OBoW: crops predict the bag of visual words that a slow copy of the network sees in the whole image.

"Online Bag-of-Visual-Words Generation for Unsupervised Representation Learning", Gidaris, Bursuc, Puy, Komodakis,
Cord, Pérez, CVPR 2021, arXiv 2012.11552; the facts are those of the official code, ``obow/builder_obow.py``,
``obow/datasets.py`` and the configurations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalsuite import Features, UsageError, hookimpl
from evalsuite.training import uncast
from pretrain import (
    Augment,
    Batch,
    Centre,
    Images,
    Look,
    Method,
    Preset,
    Run,
    Sample,
    Training,
    View,
    look_through,
    multi_crop,
)
from pretrain.blocks import EmaTwin, Queue, full_precision, gather, mlp_head, rank, world_size

DECAY = 0.99  # of the running mean of distances
GRID = 3  # patches are cut at the cells of a grid of 3 x 3
RESNET18: dict[str, Any] = {
    "inv_delta": 10.0, "kappa": 5.0, "lr": 0.05, "scaling": "none", "weight_decay": 5e-4, "warmup": 0.0, "floor": 0.0,
}  # fmt: skip

CIFAR: dict[str, Any] = {
    "size": 32, "share": 1.0, "margin": 0, "words": 2048, "inv_delta": 30.0, "kappa": 5.0, "crops": 1, "crop": 24,
    "crop_area": (0.2, 0.8), "patches": 3, "patch": 16, "source": 36, "shift": 4, "blur": 0.0, "optimizer": "adamw",
    "lr": 1e-3, "scaling": "none", "warmup": 1.0,
}  # fmt: skip


class OBoW(Method):
    """A slow copy of the backbone, the teacher, describes the whole image by the visual words in it; the backbone
    predicts that from crops and patches.

    Teacher: the middle of the image, flipped or not. On each of the ``levels`` coarsest maps, less a border of
    ``margin`` cells, every cell is softly assigned to ``words`` by softmax(-inv_delta / m d), d being squared
    distances and m the running mean of a cell's distance to its nearest word, which follows before it is used. The
    bag of an image is the maximum over cells, scaled to a sum of one. After the step one cell an image, at random out
    of the map averaged over windows of ``window`` cells, replaces the oldest words.

    Student: ``crops`` of ``crop`` pixels, and ``patches`` of ``patch`` pixels cut at jittered cells of a grid out
    of one further view of ``source`` pixels. Its pooled features f give logits ``kappa`` f . w, the weight w of a word
    being made of the word itself by a network of two layers (n, linear, batch normalisation, ReLU, linear, n). Every
    crop predicts the bags of all levels. The loss of a kind of crop is the Kullback-Leibler divergence, mean over
    rows and levels; those of both kinds are added.

    Official recipe (code): ResNet-50, batch 256, SGD at 0.03 with momentum 0.9 and weight decay 1e-4 on everything,
    ten epochs of warm-up by iteration, then a cosine by epoch to 3e-5, 200 epochs; the teacher's momentum rises from
    0.99 to 1 on a cosine by iteration; 8192 words, a multiple of the batch. Linear top-1 on ImageNet 73.8
    (README). ``resnet18`` is its recipe for a fifth of ImageNet, the first 260 images of a class, which the user
    chooses; ``vanilla`` the same with the last map and one crop alone. ``cifar`` is ours, for 32 pixels: one crop
    and three patches, fewer words, sharper assignments and AdamW; a run of a few hundred steps needs a quicker
    teacher, ``momentum_twin=0.95``.

    Where this differs from the official code: the linear classifier that it trains on the teacher's features, for
    monitoring only, is left out (``--knn-every`` tells as much); patches are cut on the device, out of a view that is
    rounded to eight bits; the teacher may be a copy of any backbone with maps. The official log has the
    perplexity of a batch's words; with ``--knn-every`` ours has that of the held-out images, level by level: how
    many words there are in an image and in all images.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        size: int = 224  # said here, for maps with a margin need images as large
        words: int = 8192  # of each level
        levels: int = 2  # maps of the teacher, the coarsest ones
        inv_delta: float | None = 15.0  # sharpness of assignments; none: to the nearest word alone
        kappa: float = 8.0  # scale of the student's logits
        momentum_twin: float = 0.99
        margin: int = 1  # cells of the teacher's maps that are cut off on each side
        window: int = 3  # cells over which a new word is averaged, in each direction
        share: float = 0.875  # of the image's shorter side that the teacher sees
        crops: int = 2
        crop: int = 160  # pixels
        crop_area: tuple[float, float] = (0.08, 0.6)  # shares of the image
        patches: int = 5  # 9 at most
        patch: int = 96  # pixels
        source: int = 256  # pixels of the view that patches are cut from
        source_area: tuple[float, float] = (0.6, 1.0)
        shift: int = 24  # pixels by which patches are moved at most
        blur: float = 0.5  # of the crops
        normalise_student: bool = False  # the authors found it slightly worse
        lr: float = 0.03
        warmup: float = 10.0
        by_epoch: bool = True
        floor: float = 0.001

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.patches <= GRID**2 or self.crops < 0 or self.crops + self.patches == 0:
                raise ValueError(f"there is nothing to predict from, or no cell for it: {self.crops=}, {self.patches=}")
            if self.patches and self.patch + self.shift > self.source:
                raise ValueError(f"patches of {self.patch} moved by {self.shift} do not fit into {self.source} pixels")

    options: Options
    small: ClassVar[Mapping[str, Any]] = {
        "words": 32, "margin": 0, "crop": 12, "patch": 8, "source": 16, "shift": 2, "patches": 3
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Preset]] = {
        "imagenet": Preset("valeoai/obow config/ImageNetFull/ResNet50_OBoW_full.yaml", 200, 256),
        "resnet18": Preset("valeoai/obow config/ImageNet20/ResNet18_OBoW_full.yaml", 80, 128, RESNET18),
        "vanilla": Preset(
            "valeoai/obow config/ImageNet20/ResNet18_OBoW_vanilla.yaml",
            80,
            256,
            RESNET18 | {"levels": 1, "crops": 1, "patches": 0},
        ),
        "cifar": Preset("ours", 200, 256, CIFAR),
    }

    teacher: EmaTwin
    vocabularies: nn.ModuleList
    generators: nn.ModuleList

    @hookimpl
    def views(self) -> tuple[Look, ...]:
        """The whole for the teacher, the crops, and where there are patches the view that they are cut from."""
        o = self.options
        crop = Augment(o.crop, crop=o.crop_area, blur=o.blur)
        source = Augment(o.source, crop=o.source_area)
        return Whole(o.size, o.share), *multi_crop((o.crops, crop), (min(1, o.patches), source))

    @hookimpl
    def prepared(self, run: Run) -> None:
        o = self.options
        self.strides = self._read(run)
        self.teacher = EmaTwin(run.backbone, o.momentum_twin, total=run.steps)
        self.teacher.update(run.backbone)  # the official copy follows before its first look, when both are the same
        widths = [run.backbone.spec.strides[stride] for stride in self.strides]
        self.vocabularies = nn.ModuleList(Vocabulary(o.words, width, o.inv_delta) for width in widths)
        self.generators = nn.ModuleList(mlp_head(width, 2 * run.dim, run.dim) for width in widths)
        self._levels[0].words.fits(run.batch_size // world_size())
        self._cells: list[list[Tensor]] = [[] for _ in widths]

    def _read(self, run: Run) -> list[int]:
        """The strides of the maps that the teacher reads. Raises :class:`UsageError` where they do not suffice."""
        o, spec = self.options, run.backbone.spec
        strides = sorted(spec.strides)[-o.levels :]
        least = 2 * o.margin + o.window
        cells = [-(-o.size // stride) for stride in strides]
        if "maps" in spec.gives and len(strides) == o.levels and min(cells) >= least:
            return strides
        raise UsageError(
            f"obow cannot read its words off {spec.arch}",
            cause=f"it needs {o.levels} maps of {least} cells a side at least; "
            f"at {o.size} pixels those at strides {strides} have {cells}",
            fix="--set obow.levels=N, obow.margin=N or obow.window=N, or another --arch",
        )

    @property
    def _levels(self) -> list[Vocabulary]:
        return [v for v in self.vocabularies if isinstance(v, Vocabulary)]

    @hookimpl
    def features(self, run: Run, batch: Batch) -> list[Features]:
        """The teacher's of the whole; those of the crops, pooled; those of the patches, as an image's tokens."""
        o = self.options
        whole, *others = (view.data for view in batch.views)
        features = [self.teacher(whole)]
        if o.crops:
            rows = _pooled(run.backbone(torch.cat(others[: o.crops])))
            features += [Features(crop) for crop in rows.chunk(o.crops)]
        if o.patches:
            drawn = corners(len(whole) * world_size(), o.patches, o.source, o.patch, o.shift, run.rng)
            cut = cut_out(others[-1], _mine(drawn).to(whole.device), o.patch)
            rows = _pooled(run.backbone(cut.flatten(0, 1)))
            features.append(Features(tokens=rows.unflatten(0, cut.shape[:2])))
        return features

    @hookimpl
    def losses(self, run: Run, features: list[Features]) -> dict[str, Tensor]:
        o, (teacher, *student) = self.options, features
        weights = [self.weights(level) for level in range(o.levels)]
        maps = self.maps(teacher)
        bags = [vocabulary(m) for vocabulary, m in zip(self._levels, maps, strict=True)]
        for cells, m in zip(self._cells, maps, strict=True):
            cells.append(self.drawn(m, run.rng))
        kinds: dict[str, Tensor] = {}
        if o.crops:
            kinds["crops"] = torch.stack([_pooled(f) for f in student[: o.crops]], 1)
        if o.patches and (tokens := student[-1].tokens) is not None:
            kinds["patches"] = tokens
        return {name: divergence(self.logits(rows.flatten(0, 1), weights), bags) for name, rows in kinds.items()}

    def maps(self, features: Features) -> list[Tensor]:
        """The teacher's maps less their borders, fine to coarse."""
        cut = self.options.margin
        maps = [features.maps[stride] for stride in self.strides]
        return [m[:, :, cut : m.shape[2] - cut, cut : m.shape[3] - cut] for m in maps]

    def weights(self, level: int) -> Tensor:
        """The student's weight (K, D) for each word of a level: a unit vector made of the word."""
        return F.normalize(full_precision(self.generators[level](F.normalize(self._levels[level].words.rows))))

    def logits(self, rows: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """The student's logits (M, K) for the words of each level, of features (M, D)."""
        with uncast(rows.device):
            rows = rows.to(self._levels[0].words.rows.dtype)
            rows = F.normalize(rows) if self.options.normalise_student else rows
            return [self.options.kappa * rows @ weight.to(rows.dtype).T for weight in weights]

    def drawn(self, cells: Tensor, rng: torch.Generator) -> Tensor:
        """A new word of each image (B, C): one cell, at random, of its averaged map (B, C, H, W)."""
        vectors = F.avg_pool2d(full_precision(cells), self.options.window, 1).flatten(2)
        chosen = _mine(torch.randint(vectors.shape[2], (len(cells) * world_size(),), generator=rng))
        return vectors[torch.arange(len(cells), device=cells.device), :, chosen.to(cells.device)]

    @hookimpl
    def stepped(self, run: Run) -> None:
        """The teacher follows, and the step's new words replace the oldest. The official code does both in
        the next forward pass or this one, before and after the words are read, which is the same."""
        self.teacher.update(run.backbone)
        for vocabulary, cells in zip(self._levels, self._cells, strict=True):
            vocabulary.words.push(torch.cat(cells))
            cells.clear()

    @hookimpl
    def measures(self, run: Run, data: Images) -> dict[str, float]:
        """The perplexity of the words of an image, its mean over images, and that of the words of all images."""
        single, summed, count = [0.0] * self.options.levels, [torch.zeros(())] * self.options.levels, 0
        for pixels in look_through(run, data, Centre(self.options.size, self.options.share)):
            count += len(pixels)
            for level, m in enumerate(self.maps(self.teacher(pixels))):
                bags = self._levels[level](m)
                single[level] += float(perplexity(bags).sum())
                summed[level] = bags.sum(0) + summed[level].to(bags.device)
        image = {f"words_image_{s}": total / count for s, total in zip(self.strides, single, strict=True)}
        return image | {f"words_all_{s}": float(perplexity(bag)) for s, bag in zip(self.strides, summed, strict=True)}


class Vocabulary(nn.Module):
    """The words of one level, and the bags that maps are put into: (B, C, H, W) -> (B, K), rows of sum 1.

    ``words.rows`` (K, C) begin as the positive part of noise, like the features that come to replace them, the oldest
    first. ``distance`` is the running mean, over all processes, of the squared distance between a cell and its nearest
    word; in training it follows each batch before it is used.
    """

    distance: Tensor

    def __init__(self, size: int, width: int, inv_delta: float | None) -> None:
        super().__init__()
        self.words = Queue(size, width, unit=False)
        self.words.rows.copy_(torch.randn(size, width).clamp(min=0))
        self.register_buffer("distance", torch.tensor(0.5))
        self.inv_delta = inv_delta

    @torch.no_grad()
    def forward(self, cells: Tensor) -> Tensor:
        words = self.words.rows
        with uncast(words.device):
            rows = cells.flatten(2).transpose(1, 2).to(words.dtype)
            far = rows.square().sum(2, keepdim=True) + words.square().sum(1) - 2 * rows @ words.T
            nearest, which = far.min(2)
            if self.training:
                self.distance.lerp_(gather(nearest.mean()[None]).mean(), 1 - DECAY)
            if self.inv_delta is None:
                codes = F.one_hot(which, len(words)).to(words.dtype)
            else:
                codes = (far * (-self.inv_delta / self.distance)).softmax(2)
            return F.normalize(codes.amax(1), p=1, dim=1)


def divergence(logits: Sequence[Tensor], bags: Sequence[Tensor]) -> Tensor:
    """The Kullback-Leibler divergence of predictions from bags (B, K), mean over rows and levels.

    ``logits`` are (B n, K), the n crops of an image one after the other. It is the cross-entropy less the entropy of
    the bags, so it can reach 0.
    """
    terms = [
        F.kl_div(F.log_softmax(said, 1), bag.repeat_interleave(len(said) // len(bag), 0), reduction="batchmean")
        for said, bag in zip(logits, bags, strict=True)
    ]
    return torch.stack(terms).mean()


def perplexity(bags: Tensor) -> Tensor:
    """How many words a bag (..., K) holds: the exponential of its entropy (...), with the official 1e-5."""
    share = F.normalize(bags, p=1, dim=-1)
    return (-(share * (share + 1e-5).log()).sum(-1)).exp()


# Looking -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """The middle of an image, flipped or not: what the teacher sees. Cropping is that of :class:`pretrain.Centre`."""

    size: int = 224
    share: float = 0.875

    def __call__(self, sample: Sample, rng: torch.Generator) -> View:
        view = Centre(self.size, self.share)(sample)
        return replace(view, data=view.data.flip(-1)) if torch.rand((), generator=rng) < 0.5 else view


def corners(count: int, patches: int, source: int, patch: int, shift: int, rng: torch.Generator) -> Tensor:
    """Where patches are cut out of ``count`` images of ``source`` pixels: top and left of each (count, patches, 2).

    The cells are drawn without repetition from a grid of three by three, each moved down and to the right by up to
    ``shift`` pixels (``CropImagePatches`` of the official code).
    """
    step = (source - patch - shift) // (GRID - 1)
    cells = torch.rand(count, GRID**2, generator=rng).argsort(1)[:, :patches]
    grid = torch.stack([cells // GRID, cells % GRID], 2) * step
    return grid + torch.randint(shift + 1, grid.shape, generator=rng)


def cut_out(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """Squares (B, P, 3, side, side) of images (B, 3, H, W), with these top left corners (B, P, 2)."""
    reach = torch.arange(side, device=images.device)
    rows, columns = (corners[:, :, axis, None] + reach for axis in (0, 1))
    image = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    return images[image, :, rows[..., :, None], columns[..., None, :]].movedim(4, 2).contiguous()


def _mine(rows: Tensor) -> Tensor:
    """This process's share of what was drawn for the batch of all processes, of which it holds every world-th row."""
    return rows[rank() :: world_size()]


def _pooled(features: Features) -> Tensor:
    assert features.pooled is not None
    return features.pooled
