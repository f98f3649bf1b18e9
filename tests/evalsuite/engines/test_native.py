"""The native segmenters: that they learn by heart, that pixels keep their places, and what they refuse."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evalsuite.backbone import BackboneSpec, build
from evalsuite.data.segmentation import IGNORE, SegmentationSet
from evalsuite.engines import native
from evalsuite.engines._segmentation import target_size, training_sample, windows
from evalsuite.engines.native import Native, build_model, padded
from evalsuite.errors import BackboneError, UsageError
from evalsuite.hooks import Registry
from evalsuite.metrics.segmentation import scores
from evalsuite.preflight import TooLarge
from evalsuite.progress import Progress
from evalsuite.protocols import SegmentationProtocol, Segmented
from evalsuite.task import Setup
from evalsuite.tasks.segmentation import Ade20k, CamVid, Cityscapes, Segment, VocSegmentation

TASKS = (Cityscapes, VocSegmentation, Ade20k, CamVid, Segment)
PUBLISHED = {f"{task.name} {p.id}": p for task in TASKS for p in task.protocols}
HEADS = ("linear", "fcn", "psp", "upernet", "deeplabv3plus", "segformer")
SIDE = 64


def tiny(**changes: Any) -> SegmentationProtocol:
    plain: dict[str, Any] = {
        "id": "tiny", "version": 1, "head": "fcn", "train_split": "train", "test_split": "val", "iterations": 2,
        "batch_size": 2, "lr": 0.01, "width": 8, "crop": (64, 64), "scale": (1.0, 1.0), "stride": (32, 32),
    }  # fmt: skip
    return SegmentationProtocol(**{**plain, **changes})


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))


def segment(
    arch: str, protocol: SegmentationProtocol, data: SegmentationSet, folder: Path, registry: Registry,
    progress: Progress | None = None, test: SegmentationSet | None = None,
) -> Segmented:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    backbone = build(arch, registry).eval()
    before = backbone.identity
    setup = Setup(protocol=protocol, work=folder, registry=registry, progress=progress or Progress(quiet=True))
    found = Native().segment(backbone, protocol, data, test or data, setup)
    assert backbone.identity == before, "the engine trained the backbone it was lent"
    return found


# --- every head and protocol -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["timm:test_resnet", "timm:test_vit", "torchvision:squeezenet1_1"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_stands_on_any_backbone(head, arch, blocks, registry, tmp_path):
    protocol = tiny(head=head, auxiliary=0.4, auxiliary_width=4, dropout=0.1)
    found = segment(arch, protocol, blocks, tmp_path, registry)
    assert set(found.log[-1]) == {"step", "loss", "loss_auxiliary"}
    assert all(np.isfinite(value) for value in found.log[-1].values())
    labelled = SIDE * SIDE - 64
    assert (found.counts[:, :, 2].sum(axis=1) == labelled).all()
    assert (found.counts[:, :, 1].sum(axis=1) == labelled).all()
    assert found.matrix.sum() == 4 * labelled
    assert (np.diagonal(found.matrix) == found.counts[:, :, 0].sum(axis=0)).all()
    assert all(labels.shape == (SIDE, SIDE) and labels.max() < 4 for labels in found.predictions.values())


def shrunk(protocol: SegmentationProtocol) -> SegmentationProtocol:
    """A published recipe on small images and few steps; its network, views and inference as they are."""
    sgd = protocol.optimizer == "sgd"
    steps = 150 if protocol.encode else 60 if not sgd else 80 if protocol.auxiliary else 120
    small: dict[str, Any] = {
        "train_split": "train", "test_split": "val", "iterations": steps, "batch_size": 4, "width": 24,
        "auxiliary_width": 8, "crop": (65, 65) if protocol.align_corners else (64, 64), "stride": (33, 33),
        "scale": (1.0, 1.0), "short_side": None, "photometric": False, "crop_share": 1.0, "dropout": 0.0,
        "milestones": tuple(steps * m // protocol.iterations for m in protocol.milestones), "warmup_iterations": 0,
        "lr": 0.05 if sgd else 0.01, "lr_min": 0.0, "encode": (192, 192) if protocol.encode else None,
    }  # fmt: skip
    return dataclasses.replace(protocol, **small)


# one of each distinct recipe: what shrinking takes away is all in which some of them differ
DISTINCT = {shrunk(dataclasses.replace(p, id="x")).hash: name for name, p in reversed(PUBLISHED.items())}


@pytest.mark.parametrize("name", sorted(DISTINCT.values()))
def test_four_images_are_learnt_by_heart(name, blocks, registry, tmp_path):
    """The standard proof that nothing is miswired: mIoU above 0.95 on the very images it was trained on."""
    found = segment("timm:test_resnet", shrunk(PUBLISHED[name]), blocks, tmp_path, registry)
    reached = scores(found.counts, blocks.classes).scores["mIoU"]
    assert reached is not None
    assert reached > 0.95


# --- training images ---------------------------------------------------------------------------------------------

SPEC = BackboneSpec("none", 1, {4: 1}, frozenset({"maps"}), mean=(0.2, 0.4, 0.6))


class Ramp:
    """One image whose pixels tell where they are: red the row, green the column, blue the class."""

    classes = ("a", "b", "c", "d")

    def __init__(self, height: int = 60, width: int = 80) -> None:
        rows, columns = np.mgrid[:height, :width]
        self.labels = ((rows // 20 + columns // 20) % 4).astype(np.uint8)
        self.pixels = np.stack([rows, columns, self.labels * 50], 2).astype(np.uint8)

    def image(self, index: int) -> np.ndarray:
        return self.pixels

    def mask(self, index: int) -> np.ndarray:
        return self.labels


def drawn(seed: int, data: Any = None, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return training_sample(data or Ramp(), tiny(crop=(40, 48), **changes), SPEC, 0, seed)


def test_a_crop_is_cut_from_image_and_mask_alike_and_mirrored_alike():
    seen = set()
    for seed in range(12):
        image, mask = drawn(seed)
        assert image.shape == (3, 40, 48)
        assert mask.shape == (40, 48)
        assert torch.equal(image[2], mask * 50)
        steps = image[1].int().diff(dim=1)
        assert (steps == steps[0, 0]).all()
        seen.add((int(image[0, 0, 0]), int(image[1, 0].min()), int(steps[0, 0])))
    assert {step for _, _, step in seen} == {1, -1}
    assert len(seen) > 8, "crops are always cut at the same place"


def test_what_an_image_lacks_is_the_mean_colour_and_has_no_class():
    image, mask = drawn(0, Ramp(20, 30), flip=0.0)
    assert torch.equal(image[:, :20, :30], torch.from_numpy(Ramp(20, 30).pixels).permute(2, 0, 1))
    assert (mask[20:] == IGNORE).all()
    assert (mask[:, 30:] == IGNORE).all()
    assert (mask[:20, :30] != IGNORE).all()
    assert image[:, 39, 47].tolist() == [51, 102, 153]
    assert image[:, 0, 40].tolist() == [51, 102, 153]


def test_a_sample_depends_on_its_seed_alone_and_scales_vary():
    changes = {"scale": (0.5, 2.0), "photometric": True}
    one, again, other = (drawn(seed, **changes) for seed in (3, 3, 4))
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])
    widths = [int((drawn(seed, scale=(0.5, 1.0), flip=0.0)[1] != IGNORE).any(0).sum()) for seed in range(8)]
    assert min(widths) < 48, "no image was ever made smaller than the crop"


def test_a_resized_mask_stays_with_its_image():
    """Blue is 50 times the class, so away from borders the resized image still says the resized mask."""
    image, mask = drawn(1, scale=(1.7, 1.7), flip=0.0)
    agree = (image[2].float() / 50 - mask).abs() < 0.02
    assert agree.float().mean() > 0.9


def test_a_crop_that_one_class_fills_is_drawn_again():
    class Half(Ramp):
        def __init__(self) -> None:
            super().__init__(60, 400)
            self.labels = np.zeros((60, 400), np.uint8)
            self.labels[:, 370:] = 1

    def mixed(share: float) -> int:
        return sum(len(drawn(seed, Half(), crop_share=share)[1].unique()) > 1 for seed in range(40))

    assert mixed(1.0) < 20
    assert mixed(0.75) > mixed(1.0) + 5


def test_colours_change_pixels_and_not_masks():
    plain, coloured = drawn(5, flip=0.0), [drawn(seed, flip=0.0, photometric=True) for seed in range(5, 15)]
    assert any((image.float() - plain[0].float()).abs().mean() > 5 for image, _ in coloured)
    assert torch.equal(coloured[0][1], plain[1])


# --- test images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [((40, 100), (40, 40), (40, 30)), ((30, 20), (40, 40), (10, 10)), ((81, 55), (32, 48), (21, 32))],
)
def test_windows_cover_an_image_and_keep_inside(size, crop, stride):
    hits = torch.zeros(size)
    for rows, columns in windows(size, tiny(crop=crop, stride=stride)):
        part = hits[rows, columns]
        assert part.shape == (min(crop[0], size[0]), min(crop[1], size[1]))
        part += 1
    assert hits.min() >= 1


def test_windows_of_cityscapes_are_those_of_mmsegmentation():
    """Its grid: rows from max(h - 769 + 513 - 1, 0) // 513 + 1 windows, the last moved back to the edge."""
    starts = [(rows.start, columns.start) for rows, columns in windows((1024, 2048), PUBLISHED["cityscapes fcn-d8"])]
    assert starts == [(top, left) for top in (0, 255) for left in (0, 513, 1026, 1279)]


def labels(registry: Registry, image: torch.Tensor, **changes: Any) -> torch.Tensor:
    """Of a network whose weights are drawn anew from the same seed every time."""
    torch.manual_seed(0)
    backbone = build("timm:test_resnet", registry)
    model = build_model(backbone, tiny(head="upernet", **changes), 4, seed=0).eval()
    for module in model.head.modules():
        if isinstance(module, torch.nn.Conv2d) and module.out_channels == 4:
            torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found: torch.Tensor = model([(image, None)])[0]
    return found


def test_one_window_as_large_as_the_image_is_the_whole_image(registry):
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    whole = labels(registry, image)
    assert len(whole.unique()) > 1
    assert torch.equal(labels(registry, image, inference="slide", crop=(50, 70)), whole)
    many = labels(registry, image, inference="slide", crop=(32, 32), stride=(16, 16))
    assert many.shape == whole.shape
    assert not torch.equal(many, whole)


def test_mirrored_views_make_labels_that_mirror(registry):
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    flipped = {"test_flip": True}
    plain = labels(registry, image), labels(registry, image.flip(-1)).flip(-1)
    assert not torch.equal(*plain)
    both = labels(registry, image, **flipped), labels(registry, image.flip(-1), **flipped).flip(-1)
    assert (both[0] != both[1]).float().mean() < 0.001  # ties of two sums in another order
    several = labels(registry, image, test_scales=(0.75, 1.0, 1.25), **flipped)
    assert several.shape == (64, 96)
    assert not torch.equal(several, both[0])


def test_short_side_sizes_images_and_labels_come_back_in_their_own_size(registry):
    protocol = tiny(short_side=48)
    assert target_size((96, 200), protocol) == (48, 100)
    assert target_size((96, 200), protocol, 1.5) == (72, 150)
    image = torch.randint(0, 256, (3, 96, 130), dtype=torch.uint8)
    assert labels(registry, image, short_side=48).shape == (96, 130)


def test_logits_lie_where_their_pixels_are(registry):
    """A padded image's logits are those of the larger image: what is beyond the edge is cut off, not squeezed in."""
    backbone = build("timm:test_resnet", registry)
    model = build_model(backbone, tiny(), 4, seed=0)
    assert padded((360, 480), 32, False) == (384, 480)
    assert padded((769, 1024), 16, True) == (769, 1025)
    grid = torch.arange(12.0)[None, None, :, None].expand(1, 4, 12, 15)  # stride 32 of 384 by 480
    grown = model._grown(grid, (360, 480))
    rows = (torch.arange(360) + 0.5) / 32 - 0.5
    assert torch.allclose(grown[0, 0, 16:, 0], rows[16:], atol=1e-4)


def test_the_best_class_is_found_some_classes_at_a_time(registry):
    scored = native._Scored(tiny(), 150)
    logits = torch.randn(1, 150, 9, 11)
    logits[:, 40:60] = logits[:, :20]  # ties go to the first, as in argmax
    grow = lambda part: F.interpolate(part, (36, 44), mode="bilinear")  # noqa: E731
    assert torch.equal(scored.labels(logits, grow).long(), grow(logits)[0].argmax(0))


def test_the_loss_is_the_mean_over_labelled_pixels_and_nothing_without_any():
    weights = (1.0, 2.0, 0.5, 4.0)
    scored = native._Scored(tiny(class_weights=weights), 4)
    logits = torch.randn(2, 4, 5, 6, requires_grad=True)
    masks = torch.randint(0, 4, (2, 5, 6))
    masks[0, :3] = IGNORE
    expected = F.cross_entropy(logits, masks, torch.tensor(weights), ignore_index=IGNORE)
    assert torch.allclose(scored.loss(logits, masks), expected)
    nothing = scored.loss(logits, torch.full_like(masks, IGNORE))
    nothing.backward()
    assert nothing == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


# --- what stays, and what comes back -----------------------------------------------------------------------------


def test_frozen_and_trained_backbones_and_norms(registry, blocks):
    samples = [training_sample(blocks, tiny(), SPEC, i, i) for i in range(2)]
    for freeze, norm in ((True, "frozen"), (False, "frozen"), (False, "train")):
        protocol = tiny(freeze_backbone=freeze, backbone_norm=norm, auxiliary=0.4)
        model = build_model(build("timm:test_resnet", registry), protocol, 4, seed=0)
        norms = model.body.net.bn1.running_mean.clone()
        sum(model(samples).values()).backward()
        assert any(p.grad is not None for p in model.body.parameters()) is not freeze
        assert all(p.grad is not None for p in model.head.parameters())
        assert bool((model.body.net.bn1.running_mean != norms).any()) is (norm == "train")


def test_the_auxiliary_head_reads_what_goes_into_the_last_stage(registry):
    for stride, name in ((None, "timm:test_resnet"), (16, "timm:test_resnet"), (8, "timm:test_resnet")):
        model = build_model(build(name, registry), tiny(auxiliary=1.0, output_stride=stride), 4, seed=0).eval()
        maps = model._maps(torch.rand(1, 3, 64, 64) * 255)
        before = model.before.take(maps)
        assert torch.equal(model.body.net.layer4(before), maps[max(maps)])
    model = build_model(build("torchvision:squeezenet1_1", registry), tiny(auxiliary=1.0), 4, seed=0)
    maps = model._maps(torch.rand(1, 3, 64, 64) * 255)
    assert model.before.take(maps) is maps[8]


class Stopping(Progress):
    """Dies at a step of something, as a process that is killed does."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(quiet=True)
        self.what, self.step = what, step

    def track(self, what: str, total: int, start: int = 0) -> Any:
        tracked = super().track(what, total, start)
        if what != self.what:
            return tracked
        step = self.step

        class Meter:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                return None

            def update(self, done: int, **numbers: float) -> None:
                if done == step:
                    raise RuntimeError("killed")

        return Meter()


@pytest.mark.parametrize("what", ["train", "segment"])
def test_a_resumed_run_ends_in_the_same_numbers(what, blocks, registry, tmp_path):
    protocol = tiny(head="upernet", iterations=4, auxiliary=0.4, dropout=0.2, scale=(0.5, 2.0), photometric=True)
    whole = segment("timm:test_resnet", protocol, blocks, tmp_path / "whole", registry)
    folder = tmp_path / "killed"
    folder.mkdir()
    setup = Setup(protocol=protocol, work=folder, registry=registry, progress=Stopping(what, 2), save_every=0.0)
    torch.manual_seed(0)
    backbone = build("timm:test_resnet", registry).eval()
    with pytest.raises(RuntimeError, match="killed"):
        Native().segment(backbone, protocol, blocks, blocks, setup)
    assert (folder / "state.pt").exists()
    torch.rand(3)  # whatever happened before must not matter
    resumed = segment("timm:test_resnet", protocol, blocks, folder, registry)
    assert resumed.log == whole.log
    assert np.array_equal(resumed.counts, whole.counts)
    assert np.array_equal(resumed.matrix, whole.matrix)


def test_a_run_of_years_is_refused_before_its_first_step(blocks, registry, tmp_path):
    with pytest.raises(TooLarge, match="training by tiny would take") as refusal:
        segment("timm:test_resnet", tiny(iterations=10**11), blocks, tmp_path, registry)
    assert re.fullmatch(r"--set iterations=\d+, or --yes to begin all the same", refusal.value.fix)
    assert not any(tmp_path.rglob("state.pt"))


def test_seeds_differ_and_one_seed_does_not(blocks, registry, tmp_path):
    protocol = tiny(scale=(0.5, 2.0))
    backbone = build("timm:test_resnet", registry).eval()

    def losses(name: str, seed: int) -> list[dict[str, float]]:
        (tmp_path / name).mkdir()
        given = Setup(
            protocol=protocol, work=tmp_path / name, registry=registry, progress=Progress(quiet=True), seed=seed
        )
        return Native().segment(backbone, protocol, blocks, blocks, given).log

    assert losses("a", 0) == losses("b", 0)
    assert losses("c", 1) != losses("d", 0)


def test_features_are_encoded_once_for_all_frozen_protocols(blocks, registry, tmp_path):
    linear = tiny(head="linear", freeze_backbone=True, encode=(64, 64), maps=2)
    first = segment("timm:test_resnet", linear, blocks, tmp_path / "a", registry)
    again = segment("timm:test_resnet", linear, blocks, tmp_path / "b", registry)
    assert first.details["encoded"] == 4, "train and test are the same images here, and are encoded once"
    assert again.details["encoded"] == 0
    assert np.array_equal(first.counts, again.counts)
    fcn = dataclasses.replace(linear, head="fcn")
    other = segment("timm:test_resnet", fcn, blocks, tmp_path / "c", registry)
    assert other.details["encoded"] == 0, "the coarsest map is among those that were encoded"
    assert set(other.timings) == {"encode", "train", "segment"}


def test_cached_features_are_those_of_the_network(blocks, registry, tmp_path):
    """A linear head on the cache and the same head on the network itself label the same pixels alike."""
    protocol = tiny(head="linear", freeze_backbone=True, backbone_norm="frozen", encode=(64, 64), flip=0.0)
    cached = segment("timm:test_resnet", protocol, blocks, tmp_path / "a", registry)
    live = segment("timm:test_resnet", dataclasses.replace(protocol, encode=None), blocks, tmp_path / "b", registry)
    for one, other in zip(cached.log, live.log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)  # half precision on disk


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"encode": (64, 64)}, "without freeze_backbone"),
        ({"encode": (64, 64), "freeze_backbone": True, "test_flip": True}, "several views"),
        ({"encode": (64, 64), "freeze_backbone": True, "head": "upernet"}, "many maps"),
        ({"encode": (64, 64), "freeze_backbone": True, "auxiliary": 0.4}, "many maps"),
        ({"test_scales": ()}, "no test scale"),
        ({"scale": (2.0, 0.5)}, "scale"),
        ({"crop": (0, 8)}, "crop"),
        ({"inference": "slide", "crop": (32, 32), "stride": (48, 16)}, "windows"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes, problem):
    with pytest.raises(UsageError, match=problem):
        tiny(**changes)


def test_recipes_that_do_not_fit_the_data_are_refused(blocks, registry, tmp_path):
    with pytest.raises(UsageError, match="2 class weights for 4 classes"):
        segment("timm:test_resnet", tiny(class_weights=(1.0, 2.0)), blocks, tmp_path, registry)
    with pytest.raises(UsageError, match="a batch of 1 images"):
        segment("timm:test_resnet", tiny(head="psp", batch_size=1), blocks, tmp_path, registry)
    with pytest.raises(BackboneError, match="cannot be dilated to an output stride of 8"):
        segment("torchvision:squeezenet1_1", tiny(output_stride=8), blocks, tmp_path, registry)


def test_the_polynomial_rate_falls_to_its_floor():
    protocol = tiny(schedule="poly", iterations=100, lr=0.01, lr_min=1e-4, warmup_iterations=10, warmup_factor=0.1)
    rates = [protocol.lr * protocol.lr_factor(i) for i in range(100)]
    plain = [(0.01 - 1e-4) * (1 - i / 100) ** 0.9 + 1e-4 for i in range(100)]
    assert rates[10:] == pytest.approx(plain[10:])
    assert rates[0] == pytest.approx(0.1 * plain[0])
    assert rates[99] == pytest.approx(1e-4 + (0.01 - 1e-4) * 0.01**0.9)
