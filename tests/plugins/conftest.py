"""A bench to try modifiers on: a small network, two methods, and the stages in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evalsuite import Backbone, BackboneSpec, Features, hookimpl
from pretrain import Arrays, Batch, Images, Method, Modifier, Pairs, Recipe, Run, Training, blocks
from pretrain.batch import collate


class Small(nn.Module):
    """A network of a few hundred weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())

    def forward(self, pixels: Tensor) -> Features:
        return Features(self.body(pixels).mean((2, 3)))


class Twins(Method):
    """Learns from two views by NT-Xent."""

    @property
    def width(self) -> int:
        return 6

    @hookimpl
    def prepared(self, run: Run) -> None:
        self.head = blocks.mlp_head(run.dim, self.width, norm=False)

    @hookimpl
    def pairs(self, batch: Batch, features: list[Features]) -> list[Pairs]:
        left, right = (self.head(f.pooled) for f in features)
        return [Pairs(left, right, batch.index)]

    @hookimpl
    def losses(self, pairs: list[Pairs]) -> dict[str, Tensor]:
        return {"twins": sum(blocks.nt_xent(p.query, p.key, p.source, temperature=0.5) for p in pairs)}  # type: ignore[dict-item]


class Alone(Method):
    """Has a loss and no positives."""

    @hookimpl
    def losses(self, features: list[Features]) -> dict[str, Tensor]:
        assert features[0].pooled is not None
        return {"alone": features[0].pooled.square().mean()}


class Bench:
    """A recipe on some images, ready to make steps."""

    def __init__(self, method: Method, *modifiers: Modifier, data: Images, out: Path, **numbers: Any) -> None:
        torch.manual_seed(0)
        spec = BackboneSpec("test:small", 12, {}, frozenset({"pooled"}), image_size=(16, 16))
        settings = {"seed": 0, "epochs": 3, "batch_size": 16, "micro_size": 16} | numbers
        training = method.options if isinstance(method.options, Training) else Training(size=16)
        self.run = Run(
            Backbone(Small(), spec),
            device=torch.device("cpu"),
            out=out,
            width=method.width,
            training=training,
            **settings,
        )
        self.recipe = Recipe(method, *modifiers)
        self.data = self.recipe.dataset(self.run, data)
        self.run.data, self.run.epoch_steps = self.data, len(self.data) // self.run.batch_size
        self.run.steps = self.run.epoch_steps * self.run.epochs
        self.looks = self.recipe.views(self.run)
        self.recipe.prepared(self.run, self.data)
        self.modules = nn.ModuleList([self.run.backbone, method, *modifiers])
        self.optimizer = torch.optim.SGD([p for p in self.modules.parameters() if p.requires_grad], 0.1)

    def batch(self, rows: Tensor) -> Batch:
        rng = torch.Generator().manual_seed(self.run.step)
        samples = [self.data[row] for row in rows.tolist()]
        views = [[look(sample, rng) for look in self.looks] for sample in samples]
        return collate(views, samples, rows.tolist()).to(self.run.device)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], list[Pairs]]:
        self.run.rng.manual_seed(self.run.step)
        features = self.recipe.features(self.run, batch)
        pairs = self.recipe.pairs(self.run, batch, features)
        return self.recipe.losses(self.run, batch, features, pairs), pairs

    def steps(self, count: int) -> Iterator[dict[str, float]]:
        """Make steps, each giving its terms."""
        last = self.run.step + count
        while self.run.step < last:
            for rows in self.recipe.batches(self.run, self.data, self.run.epoch):
                batch = self.batch(rows)
                terms, pairs = self.forward(batch)
                self.optimizer.zero_grad()
                torch.stack(list(terms.values())).sum().backward()
                self.optimizer.step()
                self.recipe.stepped(self.run, batch, [p.detach() for p in pairs])
                if (self.run.step + 1) % self.run.epoch_steps == 0:
                    self.recipe.epoch_ended(self.run)
                self.run.step += 1
                yield {name: term.item() for name, term in terms.items()}
                if self.run.step == last:
                    return


@pytest.fixture
def twins() -> type[Method]:
    return Twins


@pytest.fixture
def alone() -> type[Method]:
    return Alone


@pytest.fixture
def bench(tmp_path: Path, colours: Arrays) -> Callable[..., Bench]:
    """``bench(method, *modifiers)`` on 64 images in four colours, 16 a batch."""

    def made(method: Method, *modifiers: Modifier, **options: Any) -> Bench:
        data = options.pop("data", colours)
        return Bench(method, *modifiers, data=data, out=tmp_path, **options)

    return made


@pytest.fixture(scope="session")
def colours() -> Arrays:
    """64 images of 16 x 16, four colours in turn under a little noise."""
    rng = np.random.default_rng(0)
    base = np.array([[230, 20, 20], [20, 230, 20], [20, 20, 230], [230, 230, 20]])
    pixels = base[np.arange(64) % 4, None, None] + rng.normal(0, 8, (64, 16, 16, 3))
    return Arrays(pixels.clip(0, 255).astype(np.uint8), np.arange(64) % 4)
