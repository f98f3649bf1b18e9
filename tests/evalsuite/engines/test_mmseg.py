"""The engine mmseg: that it is mmsegmentation that runs, by the protocol's numbers, and that it leaves no traces."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evalsuite.backbone import build
from evalsuite.data import source
from evalsuite.data.segmentation import IGNORE, SegmentationSet
from evalsuite.engines.native import Native
from evalsuite.engines.native import build_model as build_native
from evalsuite.errors import BackboneError, ResourceError, TrainingError, UsageError
from evalsuite.hooks import Registry
from evalsuite.metrics.segmentation import scores
from evalsuite.preflight import TooLarge
from evalsuite.progress import Meter, Progress
from evalsuite.protocols import SegmentationProtocol, Segmented
from evalsuite.resize import resize
from evalsuite.task import Setup
from evalsuite.tasks.segmentation import Ade20k, CamVid, Cityscapes, Segment, VocSegmentation

pytestmark = pytest.mark.mmseg

PUBLISHED = {f"{t.name} {p.id}": p for t in (Cityscapes, VocSegmentation, Ade20k, CamVid, Segment) for p in t.protocols}
TRAINED = {name: p for name, p in PUBLISHED.items() if p.encode is None}
HEADS = {
    "fcn": "FCNHead",
    "psp": "PSPHead",
    "upernet": "UPerHead",
    "deeplabv3plus": "DepthwiseSeparableASPPHead",
    "segformer": "SegformerHead",
}
SIDE = 64


@pytest.fixture(scope="module")
def engine() -> Any:
    """The engine's module, which needs the extra."""
    from evalsuite.engines import mmseg as module

    return module


@pytest.fixture(scope="module")
def loop() -> Any:
    from evalsuite.engines import _mmengine as module

    return module


def tiny(**changes: Any) -> SegmentationProtocol:
    plain: dict[str, Any] = {
        "id": "tiny", "version": 1, "head": "fcn", "train_split": "train", "test_split": "val", "iterations": 2,
        "batch_size": 2, "lr": 0.01, "width": 8, "crop": (64, 64), "scale": (1.0, 1.0), "stride": (32, 32),
    }  # fmt: skip
    return SegmentationProtocol(**{**plain, **changes})


def arch(registry: Registry, name: str = "timm:test_resnet") -> Any:
    torch.manual_seed(0)
    return build(name, registry).eval()


def segment(
    protocol: SegmentationProtocol, data: SegmentationSet, folder: Path, registry: Registry,
    name: str = "timm:test_resnet", by: str = "mmseg", **options: Any,
) -> Segmented:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    backbone = arch(registry, name)
    before = backbone.identity
    given: dict[str, Any] = {"progress": Progress(quiet=True), **options}
    setup = Setup(protocol=protocol, work=folder, registry=registry, **given)
    try:
        found: Segmented = registry.get("engine", by)().segment(backbone, protocol, data, data, setup)
    finally:
        assert backbone.identity == before, "the engine trained the backbone it was lent"
    return found


# --- the network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_mmsegmentations(head, blocks, registry, tmp_path, engine):
    protocol = tiny(head=head, auxiliary=0.4, auxiliary_width=4, dropout=0.1)
    name = "timm:test_vit" if head == "upernet" else "timm:test_resnet"
    found = segment(protocol, blocks, tmp_path, registry, name)
    assert set(found.log[-1]) == {"step", "loss", "loss_auxiliary"}
    assert all(np.isfinite(value) for value in found.log[-1].values())
    labelled = SIDE * SIDE - 64
    assert (found.counts[:, :, 2].sum(axis=1) == labelled).all()
    assert (found.counts[:, :, 1].sum(axis=1) == labelled).all()
    assert found.matrix.sum() == 4 * labelled
    assert found.details["config"]["decode_head"]["type"] == HEADS[head]
    model, _ = engine.build_model(arch(registry, name), protocol, 4, seed=0)
    assert [type(part).__name__ for part in (model, model.decode_head, model.auxiliary_head)] == [
        "EncoderDecoder", HEADS[head], "FCNHead",
    ]  # fmt: skip
    assert type(model.decode_head).__module__.startswith("mmseg.")


@pytest.mark.parametrize("head", ["fcn", "psp", "upernet", "segformer"])
def test_both_engines_build_the_same_network(head, registry, engine):
    """Tensors of the same shapes (DeepLabV3+ differs: torchvision's convolutions are not separable)."""
    protocol = tiny(head=head, auxiliary=0.4, auxiliary_width=4, concat=True, output_stride=16)
    ours = build_native(arch(registry), protocol, 4, seed=0)
    theirs, _ = engine.build_model(arch(registry), protocol, 4, seed=0)
    assert sorted(p.shape for p in ours.parameters()) == sorted(p.shape for p in theirs.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"inference": "slide", "crop": (32, 64), "stride": (16, 32)},
        {"short_side": 80},
        {"short_side": 75, "align_corners": True},
        {"test_flip": True, "test_scales": (1.0, 1.5)},
    ],
)
def test_both_engines_label_alike_with_the_same_weights(changes, blocks, registry, engine, loop):
    protocol = tiny(concat=True, **changes)
    ours = build_native(arch(registry), protocol, 4, seed=0).eval()
    for module in ours.head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.5)
    theirs, _ = engine.build_model(arch(registry), protocol, 4, seed=1)
    names = {"classify": "conv_seg", "merge.0": "conv_cat.conv", "merge.1": "conv_cat.bn"}
    names |= {f"convs.{i}.{part}": f"convs.{i}.{kind}" for i in range(2) for part, kind in enumerate(("conv", "bn"))}
    state = {}
    for name, value in ours.head.state_dict().items():
        part, _, last = name.rpartition(".")
        state[f"{names[part]}.{last}"] = value
    theirs.decode_head.load_state_dict(state)
    with loop.apart(), torch.inference_mode():
        tested = engine.Segmenter(theirs, protocol).eval()
        for index in range(2):
            data, mask = engine._view(blocks, theirs.backbone, protocol, index)
            (found,) = tested([(data, mask)])
            (expected,) = ours([(torch.from_numpy(blocks.image(index)).permute(2, 0, 1), mask)])
            assert len(expected.unique()) > 1
            assert found.dtype == torch.uint8
            assert (found != expected).float().mean() < 0.002  # rounding at ties


def test_pixels_are_normalised_as_the_backbone_wants_and_filled_up_with_zeros(blocks, registry, engine, loop):
    backbone = arch(registry).respec(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    protocol = tiny(short_side=40)
    model, _ = engine.build_model(backbone, protocol, 4, seed=0)
    data, mask = engine._view(blocks, model.backbone, protocol, 0)
    with loop.apart():
        seen = model.data_preprocessor(data, False)["inputs"]
    small = resize(torch.from_numpy(blocks.image(0)).permute(2, 0, 1), 40, 40)
    torch.testing.assert_close(seen[:, :, :40, :40], backbone.normalise(small[None] / 255), rtol=1e-4, atol=1e-5)
    assert seen.shape == (1, 3, 64, 64)
    assert seen[:, :, 40:].abs().max() < 1e-5
    assert mask.shape == (64, 64)


def test_the_cityscapes_recipe_is_mmsegmentations_own(registry, engine):
    """configs/fcn/fcn_r50-d8_4xb2-40k_cityscapes-769x769.py of mmsegmentation 1.2.2, and its base."""
    protocol = PUBLISHED["cityscapes fcn-d8"]
    body = arch(registry, "torchvision:resnet50").dilated(8)
    found = engine.configure(engine.Maps(body, protocol), protocol, 19)
    head = {"type": "FCNHead", "in_channels": 2048, "channels": 512, "num_convs": 2, "concat_input": True}
    auxiliary = {"type": "FCNHead", "in_channels": 1024, "channels": 256, "num_convs": 1, "concat_input": False}
    both = {"dropout_ratio": 0.1, "num_classes": 19, "align_corners": True}
    assert (head | both).items() <= found["decode_head"].items()
    assert (auxiliary | both).items() <= found["auxiliary_head"].items()
    assert found["auxiliary_head"]["loss_decode"]["loss_weight"] == 0.4
    assert found["test_cfg"] == {"mode": "slide", "crop_size": (769, 769), "stride": (513, 513)}
    pre = found["data_preprocessor"]
    assert pre["mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert pre["std"] == pytest.approx([58.395, 57.12, 57.375])
    assert (pre["size"], pre["pad_val"], pre["seg_pad_val"]) == ((769, 769), 0, 255)  # 96 strides of 8, and one


# --- training ----------------------------------------------------------------------------------------------------


def shrunk(protocol: SegmentationProtocol) -> SegmentationProtocol:
    """A published recipe on small images and few steps; its network, schedule and inference as they are."""
    sgd = protocol.optimizer == "sgd"
    steps = 60 if not sgd else 80 if protocol.auxiliary else 120
    small: dict[str, Any] = {
        "train_split": "train", "test_split": "val", "iterations": steps, "batch_size": 4, "width": 24,
        "auxiliary_width": 8, "crop": (65, 65) if protocol.align_corners else (64, 64), "stride": (33, 33),
        "scale": (1.0, 1.0), "short_side": None, "photometric": False, "crop_share": 1.0, "dropout": 0.0,
        "milestones": tuple(steps * m // protocol.iterations for m in protocol.milestones), "warmup_iterations": 0,
        "lr": 0.05 if sgd else 0.01, "lr_min": 0.0,
    }  # fmt: skip
    return dataclasses.replace(protocol, **small)


# one of each distinct recipe: what shrinking takes away is all in which some of them differ
DISTINCT = {shrunk(dataclasses.replace(p, id="x")).hash: name for name, p in reversed(TRAINED.items())}
SGD = {"lr": 0.05, "iterations": 120, "batch_size": 4, "width": 24, "output_stride": 8}
ADAMW = {"optimizer": "adamw", "lr": 0.01, "schedule": "poly", "iterations": 60, "batch_size": 4, "width": 24}
LEARNT = {
    **{name: shrunk(TRAINED[name]) for name in sorted(DISTINCT.values())},
    "psp": tiny(head="psp", **SGD),
    "deeplabv3plus": tiny(head="deeplabv3plus", **ADAMW),
    "segformer": tiny(head="segformer", **ADAMW),
}
QUICK = ("cityscapes smoke", "segformer")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LEARNT])
def test_four_images_are_learnt_by_heart(name, blocks, registry, tmp_path):
    """The standard proof that nothing is miswired: mIoU above 0.95 on the very images it was trained on."""
    found = segment(LEARNT[name], blocks, tmp_path, registry)
    reached = scores(found.counts, blocks.classes).scores["mIoU"]
    assert reached is not None
    assert reached > 0.95


def test_frozen_and_trained_backbones_and_norms(registry, engine, loop):
    for freeze, norm in ((True, "frozen"), (False, "frozen"), (False, "train")):
        protocol = tiny(freeze_backbone=freeze, backbone_norm=norm, auxiliary=0.4, head="upernet")
        model, _ = engine.build_model(arch(registry), protocol, 4, seed=0)
        body = model.train().backbone.body
        before = body.net.bn1.running_mean.clone()
        maps = model.backbone(torch.randn(2, 3, 64, 64))
        sum(head(maps).mean() for head in (model.decode_head, model.auxiliary_head)).backward()
        assert any(p.grad is not None for p in body.parameters()) is not freeze
        assert bool((body.net.bn1.running_mean != before).any()) is (norm == "train")
        assert all(p.grad is not None for p in model.decode_head.parameters())
        assert all(p.grad is not None for p in model.auxiliary_head.parameters())


@pytest.mark.parametrize("name", ["cityscapes fcn-moco", "cityscapes fcn-d8", "cityscapes upernet"])
def test_learning_rates_are_those_of_mmengines_own_schedules(name, loop):
    from mmengine.optim import LinearLR, MultiStepLR, OptimWrapper, PolyLR

    protocol = dataclasses.replace(
        PUBLISHED[name], iterations=50, milestones=(35, 45) if PUBLISHED[name].milestones else (),
        warmup_iterations=min(10, PUBLISHED[name].warmup_iterations),
    )  # fmt: skip

    def wrapped() -> Any:
        return OptimWrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))], protocol.lr))

    def rates(optimizer: Any, schedules: list[Any]) -> list[float]:
        seen = []
        for _ in range(protocol.iterations):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            for schedule in schedules:
                schedule.step()
        return seen

    with loop.apart():
        ours, theirs = wrapped(), wrapped()
        schedules = []
        if protocol.milestones:
            schedules.append(MultiStepLR(theirs, list(protocol.milestones), protocol.gamma, by_epoch=False))
        else:
            end = protocol.iterations + 1  # what mmengine's schedules end in they reach a step before their end
            schedules.append(PolyLR(theirs, protocol.lr_min, protocol.power, end=end, by_epoch=False))
        if protocol.warmup_iterations:
            warm = protocol.warmup_iterations + 1
            schedules.append(LinearLR(theirs, protocol.warmup_factor, end=warm, by_epoch=False))
        assert rates(ours, [loop.LrFactor(ours, protocol.lr_factor)]) == pytest.approx(
            rates(theirs, schedules), rel=1e-6
        )


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_state(blocks, registry, tmp_path):
    with pytest.raises(TrainingError, match="not finite at step"):
        segment(tiny(lr=1e30, iterations=6), blocks, tmp_path, registry, save_every=0.0)
    state = torch.load(tmp_path / "mmengine.pt", weights_only=True)
    assert state["meta"]["iter"] < 6


def test_camvid_itself_runs(realdata, registry, tmp_path):
    layout = source(registry, "camvid")
    data = layout.load(layout.locate(realdata / "seg_camvid"), "train").limit(3)
    few = {"iterations": 3, "batch_size": 2, "width": 8, "crop": (64, 96), "short_side": 96, "warmup_iterations": 0}
    protocol = dataclasses.replace(PUBLISHED["camvid smoke"], **few)
    found = segment(protocol, data, tmp_path, registry)
    assert found.counts.shape == (3, 11, 3)
    assert found.log[-1]["step"] == 3
    labelled = [int((data.mask(i) != IGNORE).sum()) for i in range(3)]
    assert found.counts[:, :, 1].sum(axis=1).tolist() == labelled


# --- going on ----------------------------------------------------------------------------------------------------


class Stopping(Progress):
    """At a step of something, what ``stop`` does happens."""

    def __init__(self, what: str, step: int, stop: Any) -> None:
        super().__init__(quiet=True)
        self.what, self.step, self.stop = what, step, stop

    @contextmanager
    def track(self, what: str, total: int, done: int = 0) -> Iterator[Meter]:
        meter = Meter()
        if what == self.what:
            meter.update = self._update  # type: ignore[method-assign]
        yield meter

    def _update(self, done: int, **numbers: float) -> None:
        if done == self.step:
            self.stop()


def killed() -> None:
    raise RuntimeError("killed")


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(blocks, registry, tmp_path_factory) -> tuple[SegmentationProtocol, Segmented]:
    """A protocol, and a run by it from beginning to end."""
    protocol = tiny(head="upernet", iterations=4, auxiliary=0.4, dropout=0.2, scale=(0.5, 2.0), photometric=True)
    return protocol, segment(protocol, blocks, tmp_path_factory.mktemp("whole"), registry)


@pytest.mark.parametrize(
    ("what", "stop", "error", "every", "kept"),
    [("train", killed, RuntimeError, 0.0, 1), ("segment", killed, RuntimeError, 60.0, 4),
     ("train", terminated, SystemExit, 60.0, 2)],
)  # fmt: skip
def test_a_resumed_run_ends_in_the_same_numbers(
    what, stop, error, every, kept, whole, blocks, registry, tmp_path, engine
):
    protocol, expected = whole
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error) as caught:
        segment(protocol, blocks, tmp_path, registry, progress=Stopping(what, 2, stop), save_every=every)
    assert error is not SystemExit or caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert torch.load(tmp_path / engine.STATE, weights_only=True)["meta"]["iter"] == kept
    torch.rand(3)  # whatever happened before must not matter
    resumed = segment(protocol, blocks, tmp_path, registry)
    assert resumed.log == expected.log
    assert np.array_equal(resumed.counts, expected.counts)
    assert np.array_equal(resumed.matrix, expected.matrix)


def test_a_run_of_years_is_refused_before_its_first_step(blocks, registry, tmp_path):
    with pytest.raises(TooLarge, match="training by tiny would take about"):
        segment(tiny(iterations=10**11), blocks, tmp_path, registry)


def test_the_batches_of_steps_that_were_made_are_not_made_again(blocks, registry, engine):
    class Steps:
        made: list[int] = []  # noqa: RUF012

        def __getitem__(self, step: int) -> list[Any]:
            self.made.append(step)
            return [(torch.zeros(3, 8, 8), torch.zeros(8, 8))]

    batches = engine._Batches(Steps(), 3)
    assert [batches[i] for i in range(3)] == [None] * 3
    assert batches[3]["inputs"][0].shape == (3, 8, 8)
    assert Steps.made == [3]


def test_the_state_of_something_else_is_not_gone_on_from(whole, blocks, registry, tmp_path, engine):
    protocol, expected = whole
    segment(protocol, blocks, tmp_path, registry, seed=1)
    again = segment(protocol, blocks, tmp_path, registry)
    assert again.log == expected.log
    other = segment(protocol, blocks, tmp_path / "other", registry, seed=1, workers=1)
    assert other.log != expected.log


# --- traces ------------------------------------------------------------------------------------------------------


def test_nothing_is_left_but_in_the_work_folder(blocks, registry, tmp_path, monkeypatch, capfd, loop):
    import cv2
    from mmengine.registry import MODELS

    monkeypatch.chdir(tmp_path)
    kept = lambda: (  # noqa: E731
        [list(kind._instance_dict) for kind in loop.SHARED], len(MODELS.module_dict), cv2.getNumThreads(),
        multiprocessing.get_start_method(allow_none=True), random.getstate(), np.random.get_state()[1].tolist(),
        torch.backends.cudnn.benchmark, signal.getsignal(signal.SIGTERM),
    )  # fmt: skip
    before = kept()
    for name in ("a", "b"):
        segment(tiny(), blocks, tmp_path / "work" / name, registry)
    assert kept() == before
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_progress_hears_of_every_step(blocks, registry, tmp_path, capfd):
    segment(tiny(), blocks, tmp_path, registry, progress=Progress())
    err = capfd.readouterr().err
    assert "train: 2/2 loss" in err
    assert "segment: 4/4" in err


def test_an_operator_that_is_not_there_says_so(loop):
    operators = sys.modules["mmcv._ext"]
    if not isinstance(operators, loop._NoOperators):
        pytest.skip("mmcv has its operators here")
    with pytest.raises(ResourceError, match="deform_conv"):
        operators.deform_conv_forward()


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "problem"),
    [
        ({"head": "linear"}, {}, "head linear"),
        ({"encode": (64, 64), "freeze_backbone": True}, {}, "encoded once"),
        ({"convs": 0}, {}, "without a convolution"),
        ({"class_weights": (1.0, 2.0, 1.0, 1.0)}, {}, "class weights"),
        ({"precise_bn": 2}, {}, "precise_bn"),
        ({}, {"devices": 2}, "2 devices"),
        ({}, {"precision": "16-mixed"}, "precision 16-mixed"),
    ],
)
def test_what_it_cannot_do_is_refused_with_another_engine(changes, options, problem, blocks, registry, tmp_path):
    with pytest.raises(UsageError, match=problem) as caught:
        segment(tiny(**changes), blocks, tmp_path, registry, **options)
    assert caught.value.fix == "--engine native"
    assert not list(tmp_path.iterdir())


def test_recipes_that_do_not_fit_are_refused_as_by_the_other_engine(blocks, registry, tmp_path):
    with pytest.raises(UsageError, match="2 class weights for 4 classes"):
        segment(tiny(class_weights=(1.0, 2.0)), blocks, tmp_path, registry)
    with pytest.raises(BackboneError, match="cannot be dilated to an output stride of 8"):
        segment(tiny(output_stride=8), blocks, tmp_path, registry, "torchvision:squeezenet1_1")


def test_without_the_extra_the_pip_line_is_told(registry, monkeypatch):
    for name in ("evalsuite.engines.mmseg", "evalsuite.engines._mmengine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "mmengine", None)
    monkeypatch.setitem(sys.modules, "mmengine.hooks", None)
    with pytest.raises(ResourceError, match="needs mmengine") as caught:
        registry.get("engine", "mmseg")
    assert caught.value.fix == "pip install 'evalsuite[mmseg]'"


def test_the_tasks_offer_it_and_it_says_its_version(registry):
    assert CamVid.engines == ("native", "mmseg")
    assert registry.get("engine", "mmseg")().version().startswith("mmsegmentation 1.")
    assert registry.get("engine", "native") is Native
