"""The default engine: that it learns, that it keeps its promises, and that boxes end where they began."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from evalsuite.backbone import build
from evalsuite.data import source
from evalsuite.engines.torchvision_rcnn import TorchvisionRCNN, build_model, training_sample
from evalsuite.errors import BackboneError
from evalsuite.metrics.detection import coco_scores
from evalsuite.progress import Progress
from evalsuite.task import Setup
from evalsuite.tasks.detection import Coco, Detect, Voc

SMOKE = Coco().protocol("smoke")
TINY = dataclasses.replace(SMOKE, min_sizes=(96,), max_size=160, test_min_size=96, test_max_size=160)


@pytest.fixture(scope="session")
def world(tmp_path_factory, registry):
    layout = source(registry, "coco")
    path = layout.demo(tmp_path_factory.mktemp("demo"), seed=0, images=8)
    return layout.load(path, "train2017"), layout.load(path, "val2017")


def setup_for(protocol, folder: Path, registry, seed: int = 0) -> Setup:
    folder.mkdir(parents=True, exist_ok=True)
    return Setup(protocol=protocol, work=folder, registry=registry, progress=Progress(quiet=True), seed=seed)


@pytest.mark.parametrize("arch", ["timm:test_resnet", "timm:test_vit", "torchvision:squeezenet1_0"])
def test_a_pyramid_of_any_backbone_trains_and_detects(arch, world, registry, tmp_path):
    train, test = world
    protocol = dataclasses.replace(TINY, iterations=2, batch_size=2)
    backbone = build(arch, registry).eval()
    before = backbone.identity
    found = TorchvisionRCNN().detect(backbone, protocol, train, test.limit(2), setup_for(protocol, tmp_path, registry))
    assert backbone.identity == before, "the engine trained the backbone it was lent"
    assert [d.image_id for d in found.detections] == [r.image_id for r in test.records[:2]]
    for record, detections in zip(test.records, found.detections, strict=False):
        assert len(detections.boxes) <= protocol.detections
        assert (detections.boxes[:, 2:] <= (record.width, record.height)).all()
        assert detections.masks is not None
        assert all(mask["size"] == [record.height, record.width] for mask in detections.masks)
    assert set(found.log[-1]) == {
        "step",
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
        "loss_objectness",
        "loss_rpn_box_reg",
    }


def published(task, name: str):
    """A published recipe on small images and few steps; all else as published."""
    protocol = task.protocol(name)
    small = {"min_sizes": (96,), "max_size": 160, "test_min_size": 96, "test_max_size": 160}
    few = {
        "iterations": 2,
        "batch_size": 2,
        "roi_batch": 16,
        "rpn_post_nms_train": 50,
        "rpn_post_nms_test": 20,
    }
    return dataclasses.replace(protocol, **small, **few, precise_bn=min(protocol.precise_bn, 1))


@pytest.mark.parametrize("task", [Coco(), Voc()], ids=["coco", "voc"])
def test_every_published_recipe_builds_and_steps(task, world, registry, tmp_path):
    train, test = world
    backbone = build("timm:test_resnet", registry)
    for name in [p.id for p in task.protocols]:
        protocol = published(task, name)
        setup = setup_for(protocol, tmp_path / name, registry)
        found = TorchvisionRCNN().detect(backbone, protocol, train, test.limit(1), setup)
        assert len(found.detections) == 1, name


def test_c4_runs_the_last_stage_on_regions_and_is_refused_where_there_is_none(registry):
    protocol = dataclasses.replace(Voc().protocol("c4"), rpn_post_nms_train=10)
    model = build_model(build("timm:test_resnet", registry), protocol, 3, seed=0)
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    sum(model([(image, target)]).values()).backward()
    assert any("norm" in name and p.grad is not None for name, p in model.detector.roi_heads.named_parameters())
    with pytest.raises(BackboneError, match="no last stage"):
        build_model(build("torchvision:squeezenet1_0", registry), protocol, 3, seed=0)


def test_a_frozen_backbone_stays_as_it_is_and_its_norms_too(registry, world, tmp_path):
    protocol = dataclasses.replace(TINY, freeze_backbone=True, backbone_norm="frozen", masks=False)
    backbone = build("timm:test_resnet", registry)
    model = build_model(backbone, protocol, 6, seed=0)
    data, _ = world
    model([training_sample(data, list(data.records), protocol, i, i) for i in range(2)])["loss_classifier"].backward()
    assert model.detector.backbone.body.identity == backbone.identity
    assert not any(p.grad is not None for p in model.detector.backbone.body.parameters())
    assert any(p.grad is not None for p in model.detector.backbone.pyramid.parameters())


def test_trained_norms_move_and_frozen_ones_do_not(registry, world):
    data, _ = world
    for norm, moves in (("train", True), ("frozen", False)):
        protocol = dataclasses.replace(TINY, backbone_norm=norm, masks=False)
        model = build_model(build("timm:test_resnet", registry), protocol, 6, seed=0)
        body = model.detector.backbone.body
        before = body.net.bn1.running_mean.clone()
        model([training_sample(data, list(data.records), protocol, 0, 0)])
        assert bool((body.net.bn1.running_mean != before).any()) == moves


def test_boxes_and_masks_follow_the_image(world):
    data, _ = world
    records = [r for r in data.records if len(r.boxes) and not r.crowd.any()]
    plain = dataclasses.replace(TINY, flip=0.0)
    mirrored = dataclasses.replace(TINY, flip=1.0)
    image, target = training_sample(data, records, plain, 0, seed=5)
    flipped, other = training_sample(data, records, mirrored, 0, seed=5)
    assert torch.equal(flipped, image.flip(-1))
    assert torch.equal(other["masks"], target["masks"].flip(-1))
    width = image.shape[2]
    assert torch.allclose(other["boxes"][:, [2, 0]], width - target["boxes"][:, [0, 2]])
    for box, mask in zip(target["boxes"], target["masks"], strict=True):
        rows, columns = torch.nonzero(mask.any(1)).flatten(), torch.nonzero(mask.any(0)).flatten()
        outline = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert (outline - box).abs().max() < 2.5, "the mask is not where its box is"


def test_a_sample_depends_on_its_seed_alone(world):
    data, _ = world
    protocol = dataclasses.replace(TINY, min_sizes=(80, 96, 112))
    one = [training_sample(data, list(data.records), protocol, 1, seed) for seed in (7, 7, 8, 9, 10, 11)]
    assert torch.equal(one[0][0], one[1][0])
    assert len({image.shape for image, _ in one}) > 1


@pytest.mark.parametrize("name", ["fpn-1x", "c4-1x"])
def test_boxes_keep_their_pixels_in_bfloat16(name, registry):
    """bfloat16 has no odd numbers above 256, and of those above 512 every fourth: anchors, regions and boxes have."""
    protocol = dataclasses.replace(
        Coco().protocol(name), rpn_pre_nms_test=50, rpn_post_nms_test=10, score_threshold=0.0, box_head_width=8,
        pyramid_width=8, mask_head_width=8,
    )  # fmt: skip
    model = build_model(build("timm:test_resnet", registry), protocol, 3, seed=0).eval()
    seen = {}
    for part in (model.detector.rpn.anchor_generator, model.detector.rpn):
        part.register_forward_hook(lambda module, _, output: seen.update({type(module).__name__: output}))
    view = torch.zeros(3, 64, 896, dtype=torch.uint8), (64, 896)
    with torch.no_grad():
        model([view])
        anchors = seen["_Anchors"][0]
        with torch.autocast("cpu", torch.bfloat16):
            (output,) = model([view])
    assert torch.equal(seen["_Anchors"][0], anchors)
    assert not torch.equal(anchors, anchors.bfloat16().float())
    (proposals,), _ = seen["RegionProposalNetwork"]
    for boxes in (proposals, output["boxes"]):
        assert boxes.dtype == torch.float32
        assert not torch.equal(boxes, boxes.bfloat16().float())
    assert output["scores"].dtype == output["masks"].dtype == torch.float32


def test_eight_images_are_learnt_by_heart(world, registry, tmp_path):
    """The standard proof that nothing is miswired: AP50 above 0.9 on the very images it was trained on."""
    train, _ = world
    protocol = dataclasses.replace(
        Detect().protocol("smoke"), iterations=120, lr=0.002, milestones=(100,), flip=0.0, min_sizes=(96,),
        max_size=160, test_min_size=96, test_max_size=160, anchor_sizes=(8, 16, 32, 64, 128), pyramid_width=32,
        box_head_width=128, roi_batch=64, rpn_batch=64, rpn_pre_nms_train=300, rpn_post_nms_train=100,
        rpn_post_nms_test=100,
    )  # fmt: skip
    backbone = build("timm:test_resnet", registry)
    found = TorchvisionRCNN().detect(backbone, protocol, train, train, setup_for(protocol, tmp_path, registry))
    scores = coco_scores(train.records, found.detections, train.classes, "bbox").scores
    assert scores["AP50"] is not None
    assert scores["AP50"] > 0.9
