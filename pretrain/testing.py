"""What an author of methods and modifiers tests with: a tiny world, and checks of what any part of a recipe owes.

>>> from pretrain.testing import check_method
>>> check_method(lambda: VICReg(VICReg.Options(width=8)))  # doctest: +SKIP
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalsuite import Backbone, BackboneSpec, Features, Refusal, Registry, load_backbone
from evalsuite.seeding import seeded
from pretrain.batch import Draw, Sample
from pretrain.data import Corpus, Images, demo, parse
from pretrain.hooks import Recipe
from pretrain.methods.simclr import SimCLR
from pretrain.plugin import Method, Modifier, Plugin, Training, read_options
from pretrain.train import Plan, Trained, prepare, train

__all__ = [
    "check_method",
    "check_modifier",
    "losses",
    "small_backbone",
    "small_corpus",
    "small_options",
    "tiny_backbone",
    "tiny_corpus",
    "tiny_method",
    "tiny_train",
]

SIZE = 16
BATCH = 8
ROWS = 32

Make = Callable[[], Method]
MakeBackbone = Callable[[], Backbone]
MakeCorpus = Callable[[], Corpus]
MakeModifier = Callable[[], Modifier]


class _TinyNet(nn.Module):
    """Two strided convolutions with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, pixels: Tensor) -> Features:
        fine = F.relu(self.bn1(self.conv1(pixels)))
        coarse = F.relu(self.bn2(self.conv2(fine)))
        return Features(coarse.mean((2, 3)), {2: fine, 4: coarse}, coarse.flatten(2).transpose(1, 2))


def tiny_backbone(seed: int = 0) -> Backbone:
    """A network of 1,500 weights that gives everything: pooled (B,16), maps at strides 2 and 4, tokens."""
    with seeded(seed):
        net = _TinyNet()
    spec = BackboneSpec("tiny", 16, {2: 8, 4: 16}, frozenset({"pooled", "maps", "tokens"}), image_size=(SIZE, SIZE))
    return Backbone(net, spec)


def tiny_corpus(images: int = ROWS) -> Corpus:
    """Generated images of 16 pixels in eight classes."""
    return demo(images, size=SIZE)


def small_corpus(kind: type[Method]) -> Corpus:
    """What to try a method on: frames of a world, if its :attr:`pretrain.Method.data` are such, for it may ask whose
    pixels are whose, else :func:`tiny_corpus`."""
    return parse(f"{kind.data}:{ROWS}") if kind.data.startswith("worlds:") else tiny_corpus()


def tiny_method() -> Method:
    """SimCLR, small enough for the tiny world: a method to try modifiers on."""
    return SimCLR(SimCLR.Options(size=SIZE, width=16, hidden=16, optimizer="sgd", lr=0.05, warmup=0.0))


def small_options(kind: type[Plugin]) -> Any:
    """The options to try a method or modifier by: its :attr:`pretrain.Method.small` ones; of a :class:`Training`,
    images as small as the tiny world's and no warm-up."""
    options = kind.Options()
    training = {"size": SIZE, "warmup": 0.0} if isinstance(options, Training) else {}
    return replace(options, **(training | dict(kind.small)))


def _recipe(make: Make, *modifiers: MakeModifier) -> Recipe:
    recipe = Recipe(make(), *(m() for m in modifiers))
    recipe.parts["defaults"].options = Training(size=SIZE)
    return recipe


def small_backbone(kind: type[Method], registry: Registry) -> Backbone:
    """What to try a method on: its own architecture with :attr:`pretrain.Method.small_arch`, else
    :func:`tiny_backbone`."""
    if kind.small_arch is None:
        return tiny_backbone()
    return load_backbone(f"random:{kind.arch}", registry, options=kind.small_arch).backbone


def tiny_train(
    make: Make,
    *modifiers: MakeModifier,
    steps: int = 4,
    out: Path | None = None,
    corpus: Corpus | None = None,
    backbone: MakeBackbone = tiny_backbone,
    **plan: Any,
) -> Trained:
    """Train a fresh recipe on the tiny world for some steps of 8 images, logging each; on the CPU, with no worker."""
    numbers: dict[str, Any] = {
        "epochs": 1, "batch_size": BATCH, "steps": steps, "device": "cpu", "workers": 0, "log_every": 1,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        made = Plan(out=out or Path(folder), **(numbers | plan))
        return train(_recipe(make, *modifiers), backbone(), corpus or tiny_corpus(), made)


def losses(trained: Trained) -> list[dict[str, float]]:
    """The terms of the loss at every logged step, without what the clock had to say."""
    measured = {"lr", "images_s", "wait", "spread", "effective_rank", "epoch"}
    return [{k: v for k, v in entry.items() if k not in measured} for entry in trained.log if "spread" in entry]


def check_method(
    make: Make, *, steps: int = 4, backbone: MakeBackbone = tiny_backbone, corpus: MakeCorpus = tiny_corpus
) -> None:
    """Check what every method owes: presets whose options it has; finite losses of one number each; a gradient that
    reaches the backbone; batches left as they were; tensors that move with it, to another precision or device; the same
    numbers from the same seed; and the same end through a checkpoint in the middle.

    ``make`` gives a fresh method, with options small enough for batches of 8 images of 16 pixels, ``backbone`` what
    it learns with, and ``corpus`` what from. Raises AssertionError with a sentence for what is wrong.
    """
    method = make()
    assert isinstance(method, Method), f"it is a {type(method).__name__}, no Method"
    for name, preset in method.presets.items():
        try:
            read_options(type(method), name, {}, preset.options)
        except (TypeError, ValueError, Refusal) as error:
            raise AssertionError(f"preset {name!r} does not fit the options: {error}") from error
    _check(make, (), steps, backbone, corpus)


def check_modifier(
    make: MakeModifier, method: Make, *others: MakeModifier, off: MakeModifier | None = None, steps: int = 4
) -> None:
    """Check that a modifier composes with a method (and ``others``) as :func:`check_method` does with a method alone;
    ``off`` gives the modifier with settings that turn it off, which must leave the method's exact numbers; by default
    those of :attr:`pretrain.Modifier.off`, if it has any."""
    modifier = make()
    assert isinstance(modifier, Modifier), f"it is a {type(modifier).__name__}, no Modifier"
    off = off or _off(modifier)
    _check(method, (*others, make), steps)
    if off is not None:
        alone, idle = (losses(tiny_train(method, *parts, steps=steps)) for parts in (others, (*others, off)))
        shared = [{k: v for k, v in terms.items() if k in before} for terms, before in zip(idle, alone, strict=True)]
        assert shared == alone, f"turned off, it still changes the losses: {idle} instead of {alone}"


def _off(modifier: Modifier) -> MakeModifier | None:
    if modifier.off is None:
        return None
    options = replace(modifier.options, **modifier.off)
    return lambda: type(modifier)(options)


def _check(
    make: Make,
    modifiers: tuple[MakeModifier, ...],
    steps: int,
    backbone: MakeBackbone = tiny_backbone,
    corpus: MakeCorpus = tiny_corpus,
) -> None:
    data = corpus()
    run = partial(tiny_train, make, *modifiers, backbone=backbone, corpus=data)
    with tempfile.TemporaryDirectory() as folder:
        _check_step(make, modifiers, backbone, data, Path(folder) / "step")
        _check_moves(run)
        whole = run(steps=steps, out=Path(folder) / "whole")
        again = run(steps=steps, out=Path(folder) / "again")
        for terms in losses(whole):
            assert len(terms) > 1, "no loss was logged"
        assert losses(again) == losses(whole), "the same seed gave other losses"
        assert again.backbone.identity == whole.backbone.identity, "the same seed gave another backbone"
        cut = _Cut(data.train, (steps // 2) * BATCH)
        try:
            run(steps=steps, out=Path(folder) / "cut", corpus=Corpus(cut), save_every=0.0)
        except _Enough:
            pass
        else:
            raise AssertionError("the run did not read its data: it cannot be cut in the middle")
        resumed = run(steps=steps, out=Path(folder) / "cut")
        assert losses(resumed) == losses(whole), "resumed from a checkpoint, the losses are others"
        assert resumed.backbone.identity == whole.backbone.identity, "resumed, it ends in another backbone"


def _check_step(
    make: Make, modifiers: tuple[MakeModifier, ...], backbone: MakeBackbone, corpus: Corpus, out: Path
) -> None:
    plan = Plan(out=out, epochs=1, batch_size=BATCH, device="cpu", workers=0)
    state = prepare(_recipe(make, *modifiers), backbone(), corpus, plan)
    draw = next(iter(state.draws(plan)))
    before = draw.batch.map(Tensor.clone)
    terms = state.objective(draw)
    assert terms, "there is no loss"
    for name, term in terms.items():
        assert term.shape == (), f"loss {name!r} is no single number: its shape is {tuple(term.shape)}"
        assert torch.isfinite(term), f"loss {name!r} is {float(term)}"
    torch.stack(list(terms.values())).sum().backward()
    reached = any(p.grad is not None and p.grad.abs().sum() > 0 for p in state.run.backbone.parameters())
    assert reached, "no gradient reaches the backbone"
    _check_same(before, draw)


def _check_moves(run: Callable[..., Trained]) -> None:
    """In double precision, and on a GPU where there is one: what is no parameter, buffer or batch stays behind."""
    trips: list[dict[str, Any]] = [{"precision": "64-true"}]
    trips += [{"device": "cuda"}] if torch.cuda.is_available() else []
    for trip in trips:
        try:
            run(steps=1, **trip)
        except (RuntimeError, TypeError) as error:
            where = " ".join(trip.values())
            message = f"trained in {where}, it fails: is a tensor of it neither parameter nor buffer? ({error})"
            raise AssertionError(message) from error


def _check_same(before: Any, draw: Draw) -> None:
    for index, (old, new) in enumerate(zip(before.views, draw.batch.views, strict=True)):
        assert torch.equal(old.data, new.data), f"view {index} of the batch was written to"
    assert torch.equal(before.index, draw.batch.index), "the index of the batch was written to"


class _Enough(Exception):
    pass


class _Cut(Images):
    """Images that end a run, as a crash would, once so many were read."""

    def __init__(self, data: Images, after: int) -> None:
        self.data, self.left = data, after
        self.labels, self.fingerprint = data.labels, data.fingerprint

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Sample:
        if self.left == 0:
            raise _Enough
        self.left -= 1
        return self.data[row]
