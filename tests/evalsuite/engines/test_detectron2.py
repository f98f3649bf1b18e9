"""The detectron2 engine: the same network, recipe and bits as promised, on the real library."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from evalsuite.backbone import Backbone, build
from evalsuite.data.detection import DetectionSet, Record
from evalsuite.engines import _dense
from evalsuite.engines import detectron2_rcnn as engine
from evalsuite.errors import BackboneError, TrainingError, UsageError
from evalsuite.hooks import Registry
from evalsuite.metrics.detection import coco_scores
from evalsuite.progress import Meter, Progress
from evalsuite.protocols import DetectionProtocol
from evalsuite.task import Setup
from evalsuite.tasks.detection import Coco, Detect, Voc

needs_detectron2 = pytest.mark.detectron2
TINY: dict[str, Any] = {
    "iterations": 2, "batch_size": 2, "min_sizes": (64, 72), "max_size": 96,
    "test_min_size": 64, "test_max_size": 96,
    "roi_batch": 8, "rpn_post_nms_train": 20, "rpn_post_nms_test": 5, "score_threshold": 0.0,
}  # fmt: skip
SQUARE = ((-1, -1), (1, -1), (1, 1), (-1, 1))


def shapes(folder: Path, count: int, size: tuple[int, int] = (60, 80)) -> DetectionSet:
    """White rectangles (class 0) and ellipses (class 1) on dark images, one of each, with their masks."""
    folder.mkdir(exist_ok=True)
    rng, (height, width), records = np.random.default_rng(7), size, []
    for index in range(count):
        image = Image.fromarray(rng.integers(0, 40, (height, width, 3), np.uint8))
        outlines = []
        for label, left in enumerate((0, width // 2)):
            x0, y0 = rng.integers((left + 2, 2), (left + width // 8, height // 3))
            x1, y1 = x0 + rng.integers(width // 5, width // 3), y0 + rng.integers(height // 4, height // 2)
            angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            unit = np.stack([np.cos(angle), np.sin(angle)], 1) if label else np.array(SQUARE)
            outline = np.array([x0 + x1, y0 + y1]) / 2 + np.array([x1 - x0, y1 - y0]) / 2 * unit
            ImageDraw.Draw(image).polygon([tuple(p) for p in outline - 0.5], fill=(255, 255, 255))
            outlines.append(outline)
        path = folder / f"{index}.png"
        image.save(path)
        boxes = np.array([[*o.min(0), *o.max(0)] for o in outlines])
        no = np.zeros(2, bool)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        masks = tuple([o.ravel().tolist()] for o in outlines)
        records.append(Record(index, path, height, width, boxes, np.array([0, 1]), no, no, area, masks))
    return DetectionSet("shapes", ("rectangle", "ellipse"), (1, 2), tuple(records), f"shapes {count} {size}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DetectionSet:
    return shapes(tmp_path_factory.mktemp("shapes"), 4)


def make(arch: str, registry: Registry, **options: Any) -> Backbone:
    """A backbone whose norms all differ, so that no two of them can be confused unnoticed."""
    torch.manual_seed(0)
    backbone = build(arch, registry, **options).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            for values in (module.bias, module.running_mean):
                assert values is not None
                nn.init.uniform_(values, -0.1, 0.1)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return backbone


def tiny(protocol: DetectionProtocol, **changes: Any) -> DetectionProtocol:
    return dataclasses.replace(protocol, **(TINY | changes))


def of(task: type[Voc] | type[Coco] | type[Detect], name: str) -> DetectionProtocol:
    return next(protocol for protocol in task.protocols if protocol.id == name)


def setup(protocol: DetectionProtocol, work: Path, registry: Registry, progress: Progress | None = None) -> Setup:
    work.mkdir(exist_ok=True)
    return Setup(protocol=protocol, work=work, registry=registry, progress=progress or Progress(quiet=True))


def test_its_absence_is_told_before_any_work(
    monkeypatch: pytest.MonkeyPatch, registry: Registry, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", None)
    engine._library.cache_clear()
    protocol, nothing = of(Voc, "smoke"), DetectionSet("none", ("a",), (1,), (), "")
    with pytest.raises(UsageError, match=r"not installed.*\n.*docs/detectron2\.md") as caught:
        registry.get("engine", "detectron2")().detect(
            build("torchvision:resnet18", registry),
            protocol,
            nothing,
            nothing,
            setup(protocol, tmp_path, registry),
        )
    assert caught.value.code == 2
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(UsageError):
        engine.Detectron2RCNN().version()


@needs_detectron2
def test_version_names_the_library() -> None:
    assert re.fullmatch(r"detectron2 0\.\d+( [0-9a-f]{7})?", engine.Detectron2RCNN().version())


@needs_detectron2
@pytest.mark.parametrize(
    ("arch", "parameters", "norm"),
    [
        ("torchvision:resnet50", 159, "train"),
        ("timm:resnet18", 60, "train"),
        ("timm:resnet18", 60, "frozen"),
        ("torchvision:resnext50_32x4d", 159, "frozen"),
    ],
)
def test_a_resnet_becomes_detectron2s_own_with_equal_maps(
    arch: str, parameters: int, norm: Literal["train", "frozen"], registry: Registry
) -> None:
    backbone = make(arch, registry)
    ours = dict(backbone.net.named_parameters())
    mapped = engine.detectron2_state(ours)
    assert len(mapped) == parameters == len([name for name in ours if not name.startswith("fc.")])

    pixels = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        maps = backbone.look(pixels).maps
        protocol = dataclasses.replace(of(Coco, "fpn-1x"), backbone_norm=norm)
        fpn: Any = engine.build_detector(backbone, protocol, 3, seed=0).eval()
        protocol = dataclasses.replace(of(Voc, "c4"), backbone_norm=norm)
        c4: Any = engine.build_detector(backbone, protocol, 3, seed=0).eval()
        assert fpn.network == c4.network == f"detectron2's ResNet-{18 if parameters == 60 else 50}"
        for name, level in fpn.rcnn.backbone.bottom_up(pixels).items():
            torch.testing.assert_close(level, maps[2 ** int(name[3])], rtol=1e-4, atol=1e-5)
        res4 = c4.rcnn.backbone(pixels)["res4"]
        torch.testing.assert_close(res4, maps[16], rtol=1e-4, atol=1e-5)
        stage, extra = c4.rcnn.roi_heads.res5[:-1], c4.rcnn.roi_heads.res5[-1]
        torch.testing.assert_close(stage(res4), maps[32], rtol=1e-4, atol=1e-5)
    assert type(extra) is nn.BatchNorm2d
    assert type(c4.rcnn.roi_heads).__name__ == "EvalsuiteRes5ROIHeadsExtraNorm"


@needs_detectron2
def test_pixels_are_normalised_as_the_backbone_wants(registry: Registry) -> None:
    backbone = make("torchvision:resnet18", registry).respec(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    rcnn: Any = engine.build_detector(backbone, of(Voc, "fpn"), 3, seed=0).rcnn
    image = torch.randint(0, 256, (3, 32, 64), dtype=torch.uint8)
    seen = rcnn.preprocess_image([{"image": image}]).tensor
    torch.testing.assert_close(seen, backbone.normalise(image[None] / 255))


@needs_detectron2
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("timm:resnet18d", {}),
        ("timm:resnet18", {"drop_path_rate": 0.2}),
        ("timm:resnet18", {"act_layer": "silu"}),
        ("timm:resnet18", {"output_stride": 16}),
        ("timm:convnext_atto", {}),
        ("timm:vit_tiny_patch16_224", {}),
        ("torchvision:squeezenet1_1", {}),
    ],
)
def test_what_is_no_plain_resnet_is_wrapped(arch: str, options: dict[str, Any], registry: Registry) -> None:
    backbone = build(arch, registry, **options).eval()
    detector: Any = engine.build_detector(backbone, of(Voc, "fpn"), 3, seed=0).eval()
    assert detector.network == f"{arch}, wrapped"
    with torch.no_grad():
        levels = detector.rcnn.backbone(torch.zeros(1, 3, 256, 320))
    shapes = {name: (s.channels, s.stride) for name, s in detector.rcnn.backbone.output_shape().items()}
    found = {n: (level.shape[1], 2 ** round(math.log2(256 / level.shape[2]))) for n, level in levels.items()}
    assert found == shapes
    assert list(shapes) == ["p2", "p3", "p4", "p5", "p6"]


@needs_detectron2
def test_both_engines_build_the_same_network(registry: Registry) -> None:
    """Equal numbers of parameters, but for the background class detectron2 draws no boxes and masks of."""
    from evalsuite.engines.torchvision_rcnn import build_model

    def count(module: nn.Module) -> int:
        return sum(p.numel() for name, p in module.named_parameters() if ".fc." not in name)

    for arch in ("torchvision:resnet18", "timm:resnet18d", "timm:vit_tiny_patch16_224"):
        for protocol in (of(Coco, "fpn-1x"), of(Coco, "c4-1x"), of(Detect, "smoke")):
            if protocol.model == "c4" and "vit" in arch:
                continue
            backbone = build(arch, registry)
            background = 4 * ((512 if protocol.model == "c4" else protocol.box_head_width) + 1)
            background += 257 if protocol.masks else 0
            theirs = count(engine.build_detector(backbone, protocol, 5, seed=0))
            assert theirs + background == count(build_model(backbone, protocol, 5, 0)), (arch, protocol.id)


@needs_detectron2
def test_c4_needs_a_network_that_can_be_cut(registry: Registry) -> None:
    for arch in ("timm:convnext_atto", "small:resnet18"):
        with pytest.raises(BackboneError, match="--protocol fpn") as caught:
            engine.build_detector(build(arch, registry), of(Voc, "c4"), 3, seed=0)
        assert caught.value.code == 4


CHANGED: dict[str, Any] = {
    "iterations": 7, "batch_size": 3, "lr": 0.5, "momentum": 0.5, "weight_decay": 0.5, "milestones": (3,),
    "gamma": 0.5, "warmup_iterations": 3, "warmup_factor": 0.5, "backbone_norm": "frozen", "precise_bn": 3,
    "model": "c4", "masks": False, "min_sizes": (99,), "max_size": 99, "test_min_size": 99, "test_max_size": 99,
    "pyramid_width": 99, "pyramid_norm": None, "anchor_sizes": (1, 2, 3, 4, 5), "anchor_ratios": (1.0,),
    "rpn_pre_nms_train": 9, "rpn_pre_nms_test": 9, "rpn_post_nms_train": 9, "rpn_post_nms_test": 9, "rpn_nms": 0.9,
    "rpn_batch": 9, "roi_batch": 9, "roi_positive": 0.9, "roi_size": 9, "box_head_width": 9, "score_threshold": 0.9,
    "nms": 0.9, "detections": 9, "mask_head_width": 9,
}  # fmt: skip
ELSEWHERE = {
    "id", "version", "modified",                   # names
    "train_split", "test_split",                   # the task's business
    "flip", "freeze_backbone", "clip_gradient",    # done by this engine and the training loop
    "optimizer",                                   # built beside the configuration
    "res5_norm",                                   # of C4 models only; below
}  # fmt: skip


@needs_detectron2
def test_every_field_of_a_protocol_reaches_the_configuration(registry: Registry) -> None:
    assert CHANGED.keys() | ELSEWHERE == {f.name for f in dataclasses.fields(DetectionProtocol)}
    spec, base = build("torchvision:resnet18", registry).spec, of(Coco, "fpn-1x")
    texts = {"": engine.configure(base, spec, 5, {}).dump()}
    for name, value in CHANGED.items():
        text = engine.configure(dataclasses.replace(base, **{name: value}), spec, 5, {}).dump()
        assert text not in texts.values(), name
        texts[name] = text
    c4 = of(Voc, "c4")
    plain = dataclasses.replace(c4, res5_norm=False)
    assert engine.configure(plain, spec, 5, {}).dump() != engine.configure(c4, spec, 5, {}).dump()


@needs_detectron2
def test_the_published_recipes_are_detectron2s_own_numbers(registry: Registry) -> None:
    """Against the library's Base files, with what MoCo's configurations change written out by hand."""
    from detectron2.config import get_cfg

    spec = build("torchvision:resnet50", registry).spec
    changes: dict[str, list[Any]] = {
        "FPN": ["MODEL.MASK_ON", True, "MODEL.FPN.NORM", "BN", "MODEL.ROI_HEADS.NUM_CLASSES", 80],
        "C4": [
            "MODEL.ROI_HEADS.NAME", "EvalsuiteRes5ROIHeadsExtraNorm", "MODEL.ROI_HEADS.NUM_CLASSES", 20,
            "INPUT.MIN_SIZE_TRAIN", tuple(range(480, 801, 32)), "SOLVER.MAX_ITER", 24000,
            "SOLVER.STEPS", (18000, 22000), "SOLVER.WARMUP_ITERS", 100,
            "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 200,
        ],
    }  # fmt: skip
    both = [
        "MODEL.DEVICE", "cpu", "INPUT.FORMAT", "RGB", "INPUT.MASK_FORMAT", "bitmask",
        "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], "MODEL.PIXEL_STD", [58.395, 57.12, 57.375],
        "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STRIDE_IN_1X1", False,
    ]  # fmt: skip
    irrelevant = {
        "C4": {"MODEL.ROI_BOX_HEAD.FC_DIM", "MODEL.FPN.OUT_CHANNELS"},
        "FPN": {"TEST.PRECISE_BN.NUM_ITER"},
    }
    for kind, protocol, classes in (("FPN", of(Coco, "fpn-1x"), 80), ("C4", of(Voc, "c4"), 20)):
        expected = get_cfg()
        expected.merge_from_file(str(engine._library().configs / f"Base-RCNN-{kind}.yaml"))
        expected.merge_from_list(both + changes[kind])
        found = flat(engine.configure(protocol, spec, classes, {}))
        differing = {key for key, value in flat(expected).items() if not same(found[key], value)}
        assert differing <= irrelevant[kind]


def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in cfg.items():
        values |= flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
    return values


def same(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == pytest.approx(other) if isinstance(one, float) else one == other)


@needs_detectron2
def test_the_learning_rate_is_detectron2s_schedule(registry: Registry) -> None:
    from detectron2.solver import build_lr_scheduler

    spec = build("torchvision:resnet18", registry).spec
    for protocol in (of(Voc, "c4"), of(Coco, "fpn-1x"), of(Detect, "smoke")):
        cfg = engine.configure(protocol, spec, 5, {})
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], cfg.SOLVER.BASE_LR)
        multiplier = build_lr_scheduler(cfg, optimizer)._multiplier
        edges = {0, 1, protocol.iterations - 1, protocol.warmup_iterations, *protocol.milestones}
        steps = {step + d for step in edges for d in (-1, 0, 1) if 0 <= step + d < protocol.iterations}
        for step in steps | set(range(0, protocol.iterations, 97)):
            theirs = multiplier(step / protocol.iterations)
            assert theirs == pytest.approx(protocol.lr_factor(step), rel=1e-6), step


@needs_detectron2
def test_a_sample_is_a_function_of_its_seed_and_truth_moves_with_the_image(world: DetectionSet) -> None:
    protocol = tiny(of(Coco, "fpn-1x"), flip=1.0, min_sizes=(120,), max_size=200)
    np.random.seed(3)
    expected = np.random.random(2)
    np.random.seed(3)
    sample = engine.training_sample(world, list(world.records), protocol, 0, 5 << 40)
    assert (np.random.random(2) == expected).all()
    instances, record = sample["instances"], world.records[0]
    assert sample["image"].shape == (3, 120, 160)
    assert sample["image"].dtype == torch.uint8
    x0, y0, x1, y1 = 2 * record.boxes.T
    flipped = torch.tensor(np.stack([160 - x1, y0, 160 - x0, y1], 1), dtype=torch.float32)
    torch.testing.assert_close(instances.gt_boxes.tensor, flipped)
    assert instances.gt_classes.tolist() == [0, 1]
    drawn = instances.gt_masks.get_bounding_boxes().tensor
    assert (drawn - instances.gt_boxes.tensor).abs().max() <= 2.5
    white = sample["image"].float().mean(0) > 128
    assert (white == instances.gt_masks.tensor.any(0)).float().mean() > 0.98

    varied = tiny(of(Voc, "fpn"), min_sizes=tuple(range(40, 90)))
    once, twice = (
        [engine.training_sample(world, list(world.records), varied, 0, seed) for seed in range(9)] for _ in range(2)
    )
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(once, twice, strict=True))
    assert len({sample["image"].shape for sample in once}) > 3
    assert not once[0]["instances"].has("gt_masks")


@needs_detectron2
def test_crowds_are_not_learnt(world: DetectionSet) -> None:
    record = dataclasses.replace(world.records[0], crowd=np.array([True, False]))
    sample = engine.training_sample(world, [record], tiny(of(Coco, "fpn-1x")), 0, 0)
    assert sample["instances"].gt_classes.tolist() == [1]
    assert len(sample["instances"].gt_masks) == 1


@needs_detectron2
@pytest.mark.parametrize("native", [True, False])
def test_a_frozen_backbone_stays(native: bool, registry: Registry, world: DetectionSet) -> None:
    backbone = make("torchvision:resnet18" if native else "timm:resnet18d", registry)
    for protocol in (of(Voc, "frozen-fpn"), dataclasses.replace(of(Voc, "c4"), freeze_backbone=True)):
        protocol = tiny(protocol)
        detector = engine.build_detector(backbone, protocol, 2, seed=0)
        assert ("wrapped" in detector.network) is not native
        body = nn.ModuleList(detector._body)
        before = {name: value.clone() for name, value in body.state_dict().items()}
        optimizer = engine._library().build_optimizer(detector.cfg, detector)
        batch = [engine.training_sample(world, list(world.records), protocol, i, i) for i in range(2)]
        total = sum(detector.train()(batch).values())
        total.backward()
        optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())
        moved = [name for name, p in detector.named_parameters() if p.grad is not None and p.grad.any()]
        assert any("box_predictor" in name for name in moved)
        if protocol.res5_norm:
            norm = "rcnn.roi_heads.res5.norm.weight" if native else "rcnn.roi_heads.res5.1.weight"
            assert norm in moved


@needs_detectron2
@pytest.mark.parametrize("arch", ["torchvision:resnet18", "timm:resnet18d"])
def test_frozen_norms_stay_while_weights_learn(arch: str, registry: Registry, world: DetectionSet) -> None:
    protocol = tiny(of(Voc, "fpn"), backbone_norm="frozen", pyramid_norm=None)
    detector = engine.build_detector(make(arch, registry), protocol, 2, seed=0).train()
    buffers = {name: b.clone() for name, b in detector.named_buffers()}
    batch = [engine.training_sample(world, list(world.records), protocol, i, i) for i in range(2)]
    sum(detector(batch).values()).backward()
    assert all(torch.equal(b, buffers[name]) for name, b in detector.named_buffers())
    learnt = {name for name, p in detector.named_parameters() if p.grad is not None}
    assert any(re.search(r"(res5|layer4)\.1\.conv2\.weight", name) for name in learnt)
    assert not any(re.search(r"(norm|bn\d)\.(weight|bias)", name) for name in learnt)


@needs_detectron2
@pytest.mark.parametrize(
    ("task", "name", "arch", "network"),
    [
        (Voc, "c4", "torchvision:resnet50", "detectron2's ResNet-50"),
        (Coco, "fpn-1x", "timm:resnet50", "detectron2's ResNet-50"),
        (Coco, "c4-1x", "timm:resnet18d", "timm:resnet18d, wrapped"),
        (Coco, "frozen-fpn", "torchvision:squeezenet1_1", "torchvision:squeezenet1_1, wrapped"),
    ],
)
def test_recipes_train_and_detect(
    task: Any, name: str, arch: str, network: str, registry: Registry, world: DetectionSet, tmp_path: Path
) -> None:
    protocol = tiny(of(task, name), precise_bn=2 if of(task, name).precise_bn else 0, lr=1e-3)
    backbone = make(arch, registry)
    identity = backbone.identity
    given = setup(protocol, tmp_path, registry)
    found = engine.Detectron2RCNN().detect(backbone, protocol, world, world, given)
    assert backbone.identity == identity
    assert found.details["network"] == network
    losses = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert found.log[-1].keys() == losses | {"step"} | ({"loss_mask"} if protocol.masks else set())
    assert [d.image_id for d in found.detections] == [r.image_id for r in world.records]
    assert sum(len(d.scores) for d in found.detections) > 0
    for detections in found.detections:
        assert detections.boxes.dtype == detections.scores.dtype == np.float64
        assert (detections.boxes >= 0).all()
        assert (detections.boxes <= (80, 60, 80, 60)).all()
        assert set(detections.labels.tolist()) <= {0, 1}
        if protocol.masks:
            assert detections.masks is not None
            assert len(detections.masks) == len(detections.scores)
            assert all(mask["size"] == [60, 80] for mask in detections.masks)
        else:
            assert detections.masks is None


class Stopping(Progress):
    """Ends activity ``what`` at a step: by a termination signal in training, by an error elsewhere."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(quiet=True)
        self.what, self.step = what, step

    @contextmanager
    def track(self, what: str, total: int, done: int = 0) -> Iterator[Meter]:
        meter = Meter()
        if what == self.what:
            meter.update = self.stop  # type: ignore[method-assign]
        yield meter

    def stop(self, done: int, **numbers: float) -> None:
        if done == self.step and self.what == "train":
            os.kill(os.getpid(), signal.SIGTERM)
        elif done == self.step:
            raise RuntimeError("killed")


@needs_detectron2
def test_a_resumed_run_ends_in_the_same_bits(registry: Registry, world: DetectionSet, tmp_path: Path) -> None:
    protocol = tiny(of(Voc, "c4"), iterations=3, precise_bn=1, lr=0.005, roi_batch=4)
    backbone, world = make("torchvision:resnet18", registry), world.limit(2)

    def run(name: str, progress: Progress | None = None) -> Any:
        return engine.Detectron2RCNN().detect(
            backbone, protocol, world, world, setup(protocol, tmp_path / name, registry, progress)
        )

    whole = run("whole")
    with pytest.raises(SystemExit, match="143"):
        run("train", Stopping("train", 1))
    with pytest.raises(RuntimeError, match="killed"):
        run("detect", Stopping("detect", 1))
    for name in ("train", "detect"):
        torch.rand(3)  # whatever happened before must not matter
        resumed = run(name)
        assert resumed.log == whole.log
        for one, other in zip(whole.detections, resumed.detections, strict=True):
            assert np.array_equal(one.boxes, other.boxes)
            assert np.array_equal(one.scores, other.scores)
            assert np.array_equal(one.labels, other.labels)


@needs_detectron2
def test_precise_statistics_are_those_of_the_final_weights(
    registry: Registry, world: DetectionSet, tmp_path: Path
) -> None:
    """With a rate of zero the weights stay, so statistics over the training images are known."""
    protocol = tiny(of(Voc, "fpn"), lr=0.0, min_sizes=(64,), flip=0.0, batch_size=4, iterations=1, precise_bn=1)
    backbone = make("torchvision:resnet18", registry)
    detector, kept = None, _dense.infer_all

    def spy(model: Any, *rest: Any) -> Any:
        nonlocal detector
        detector = model
        return kept(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dense, "infer_all", spy)
        engine.Detectron2RCNN().detect(backbone, protocol, world, world, setup(protocol, tmp_path, registry))
    batch = [engine.training_sample(world, list(world.records), protocol, i, 0)["image"] for i in range(4)]
    net: Any = backbone.net
    normalised = backbone.normalise(torch.stack(batch) / 255)
    stem = net.conv1(nn.functional.pad(normalised, (0, -normalised.shape[3] % 32)))
    assert detector is not None
    measured = detector.rcnn.backbone.bottom_up.stem.conv1.norm.running_mean
    torch.testing.assert_close(measured, stem.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


@needs_detectron2
def test_divergence_is_told_as_such(registry: Registry, world: DetectionSet, tmp_path: Path) -> None:
    wild = {
        "lr": 1e8,
        "warmup_iterations": 0,
        "iterations": 5,
        "backbone_norm": "frozen",
        "pyramid_norm": None,
    }
    protocol, backbone = tiny(of(Voc, "fpn"), **wild), make("torchvision:resnet18", registry)
    given = setup(protocol, tmp_path, registry)
    with pytest.raises(TrainingError, match="lower the learning rate"):
        engine.Detectron2RCNN().detect(backbone, protocol, world, world, given)


@needs_detectron2
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_eight_images_are_learnt_by_heart(registry: Registry, tmp_path: Path) -> None:
    world = shapes(tmp_path / "images", 8, (120, 160))
    protocol = dataclasses.replace(
        of(Coco, "smoke"), iterations=150, batch_size=2, optimizer="sgd", lr=0.01, weight_decay=1e-4,
        milestones=(), min_sizes=(120,), max_size=160,
        test_min_size=120, test_max_size=160, roi_batch=64, rpn_post_nms_train=200, rpn_post_nms_test=100, flip=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = build("torchvision:resnet18", registry)
    given = setup(protocol, tmp_path / "work", registry)
    found = engine.Detectron2RCNN().detect(backbone, protocol, world, world, given)
    box = coco_scores(world.records, found.detections, world.classes, "bbox").scores
    mask = coco_scores(world.records, found.detections, world.classes, "segm").scores
    assert box["AP50"] is not None
    assert box["AP50"] > 0.9, found.log[-1]
    assert mask["AP50"] is not None
    assert mask["AP50"] > 0.9, found.log[-1]


@needs_detectron2
def test_both_optimisers_leave_norms_undecayed(registry: Registry) -> None:
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        protocol = dataclasses.replace(of(Coco, "smoke"), optimizer=name, weight_decay=0.05)
        model = engine.build_detector(build("timm:test_resnet", registry), protocol, 3, seed=0)
        optimizer = engine._optimizer(model, protocol)
        assert type(optimizer) is kind
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        assert decay[id(norm.weight)] == 0
        assert max(decay.values()) == 0.05
