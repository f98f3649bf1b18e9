"""Segmentation from a request to a cell: every task's data and recipes, scores that are what they claim, refusals."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evalsuite.backbone import build
from evalsuite.data import source
from evalsuite.data.segmentation import IGNORE
from evalsuite.engines._segmentation import Reading
from evalsuite.errors import BackboneError, DataError, UsageError
from evalsuite.hooks import Registry
from evalsuite.protocols import SegmentationProtocol, Segmented
from evalsuite.results import read_all
from evalsuite.runner import run
from evalsuite.statistics import interval
from evalsuite.tasks.segmentation import Ade20k, CamVid, Cityscapes, Segment, VocSegmentation

TASKS = (Cityscapes, VocSegmentation, Ade20k, CamVid, Segment)
NAMED = tuple(task.name for task in TASKS if not task.generic)
FEW = {"iterations": "2", "width": "8", "batch_size": "2", "short_side": "64", "crop": "64,64"}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def demo(registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a small world of every named task, drawn once."""
    root: Path = tmp_path_factory.getbasetemp() / "segmentation-worlds"
    for name in NAMED:
        source(registry, name).demo(root, seed=0, images=4)
    return root


def run_one(registry: Registry, out: Path, task: str, protocol: str = "smoke", **flags: Any) -> Any:
    flags.setdefault("settings", FEW)
    (cell,) = run("random:timm:test_resnet", task, registry=registry, protocol=protocol, out=out, **flags)
    return cell


class Oracle:
    """An engine that labels as ``answer`` says, given the truth."""

    name = "native"
    answer: Any = staticmethod(lambda truth: np.where(truth == IGNORE, 0, truth))

    def version(self) -> str:
        return "oracle 1"

    def segment(self, backbone: Any, protocol: Any, train: Any, test: Any, setup: Any) -> Segmented:
        import torch

        reading = Reading(test)
        seen = []
        for i in range(len(test)):
            truth = torch.from_numpy(test.mask(i))
            seen.append(reading(i, (None, truth), torch.from_numpy(self.answer(truth.numpy()).astype(np.uint8))))
        matrix = np.zeros((len(test.classes),) * 2, np.int64)
        for image in seen:
            matrix.reshape(-1)[image.cells] += image.pixels
        predictions = {i: image.prediction for i, image in enumerate(seen) if image.prediction is not None}
        counts, boundary = (np.stack([getattr(image, name) for image in seen]) for name in ("counts", "boundary"))
        return Segmented(counts, boundary, matrix, predictions, [], {"train": 0.0}, {})


@pytest.fixture
def oracle(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    module: Any = types.ModuleType("segmentation_oracle")
    module.Oracle = Oracle
    monkeypatch.setitem(sys.modules, "segmentation_oracle", module)
    ours = Registry()
    for entry in registry.entries():
        target = "segmentation_oracle:Oracle" if (entry.shelf, entry.name) == ("engine", "native") else entry.target
        getattr(ours, entry.shelf)(entry.name, target, entry.summary)
    return ours


# --- from end to end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_every_data_set_runs_from_its_tree_to_a_cell(name, demo, registry, tmp_path):
    cell = run_one(registry, tmp_path / "out", name, data_root=demo)
    assert cell.status == "ok", cell.error
    assert set(cell.scores) == {"mIoU", "mAcc", "aAcc", "boundary_mIoU"}
    assert all(score.value is None or 0 <= score.value <= 1 for score in cell.scores.values())
    assert cell.scores["mIoU"].low is not None
    assert cell.engine == "native"
    assert set(cell.timings) == {"train", "segment", "score", "total"}
    folder = next((tmp_path / "out" / "results").rglob("seed-0.json")).parent
    for file in ("segmentation.png", "classes.png"):
        with Image.open(folder / f"seed-0.{file}") as picture:
            assert min(picture.size) > 100
    with np.load(folder / "seed-0.predictions.npz", allow_pickle=False) as kept:
        assert kept["counts"].shape == kept["boundary"].shape == (cell.data["test_images"], cell.data["classes"], 3)
        assert kept["matrix"].sum() == kept["counts"][:, :, 2].sum()
        assert sum(name.startswith("labels/") for name in kept.files) == min(4, cell.data["test_images"])
    assert set(cell.details["IoU_by_class"]) == set(kept_classes(cell))
    assert not (tmp_path / "out" / "work").exists() or not any((tmp_path / "out" / "work").iterdir())


def kept_classes(cell: Any) -> list[str]:
    return list(cell.details["accuracy_by_class"])


@pytest.mark.parametrize("protocol", ["linear", "frozen-fcn"])
def test_frozen_protocols_run_from_end_to_end(protocol, demo, registry, tmp_path):
    few = {"iterations": "2", "batch_size": "2", "encode": "[64,96]", "width": "8"}
    cell = run_one(registry, tmp_path / "out", "camvid", protocol, data_root=demo, settings=few)
    assert cell.status == "ok", cell.error
    assert cell.details["encoded"] == cell.data["train_images"] + cell.data["test_images"]
    again = run_one(registry, tmp_path / "again", "camvid", protocol, data_root=demo, settings=few)
    assert again.details["encoded"] == 0
    assert {n: s.value for n, s in again.scores.items()} == {n: s.value for n, s in cell.scores.items()}


def test_a_second_run_does_only_what_is_missing(demo, registry, tmp_path):
    first = run_one(registry, tmp_path / "out", "camvid", data_root=demo)
    ((_, cell),) = read_all(tmp_path / "out")
    again = run_one(registry, tmp_path / "out", "camvid", data_root=demo)
    assert again.created == first.created == cell.created


def test_the_truth_scores_one_and_a_constant_what_it_must(demo, oracle, tmp_path, monkeypatch):
    cell = run_one(oracle, tmp_path / "a", "camvid", data_root=demo)
    assert {name: score.value for name, score in cell.scores.items()} == dict.fromkeys(cell.scores, 1.0)
    assert cell.scores["mIoU"].low == cell.scores["mIoU"].high == 1.0
    monkeypatch.setattr(Oracle, "answer", staticmethod(lambda truth: np.full_like(truth, 3)))
    constant = run_one(oracle, tmp_path / "b", "camvid", data_root=demo)
    layout = source(oracle, "camvid")
    test = layout.load(layout.locate(demo), "test")
    truth = np.concatenate([test.mask(i).ravel() for i in range(len(test))])
    truth = truth[truth != IGNORE]
    assert constant.scores["aAcc"].value == pytest.approx((truth == 3).mean())
    seen = len(np.unique(truth))
    assert constant.scores["mIoU"].value == pytest.approx((truth == 3).mean() / seen)
    assert constant.scores["mAcc"].value == pytest.approx(1 / seen)


def test_intervals_come_from_resampling_the_images(demo, oracle, tmp_path, monkeypatch):
    """Right on every other image: replicates then spread between the two, and the file's make the cell's interval."""
    turn = iter(range(100))
    monkeypatch.setattr(Oracle, "answer", staticmethod(
        lambda truth: np.where(truth == IGNORE, 0, truth) if next(turn) % 2 else np.zeros_like(truth)
    ))  # fmt: skip
    cell = run_one(oracle, tmp_path / "out", "camvid", data_root=demo)
    score = cell.scores["mIoU"]
    assert score.low < score.value < score.high
    (samples,) = (tmp_path / "out").rglob("*samples.npz")
    with np.load(samples, allow_pickle=False) as kept:
        assert set(kept.files) == {f"replicates/{name}" for name in cell.scores} | {"ids"}
        assert interval(kept["replicates/mIoU"]) == pytest.approx((score.low, score.high))


# --- data of one's own -------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for kind in ("images", "masks"):
            (tmp_path / "own" / kind / split).mkdir(parents=True)
        for n in range(count):
            mask = rng.integers(0, 2, (48, 64)).astype(np.uint8)
            Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(
                tmp_path / "own" / "images" / split / f"{n}.png"
            )
            Image.fromarray(mask).save(tmp_path / "own" / "masks" / split / f"{n}.png")
    (tmp_path / "own" / "classes.txt").write_text("cell\nground\n")
    return tmp_path / "own"


def test_pairs_of_images_and_masks_run(pairs, registry, tmp_path):
    cell = run_one(registry, tmp_path / "out", "segment", data=f"pairs:{pairs}")
    assert cell.status == "ok", cell.error
    assert (cell.data["train"], cell.data["test"]) == ("pairs train", "pairs val")
    assert set(cell.details["IoU_by_class"]) == {"cell", "ground"}


def test_any_layout_of_masks_is_data_of_ones_own_and_others_are_not(demo, registry, tmp_path):
    few = FEW | {"train_split": "val", "test_split": "val"}
    cell = run_one(registry, tmp_path / "out", "segment", data=f"cityscapes:{demo / 'cityscapes'}", settings=few)
    assert cell.status == "ok", cell.error
    assert cell.data["train"] == "cityscapes val"
    with pytest.raises(UsageError, match="segment needs data"):
        run_one(registry, tmp_path / "out", "segment")
    (tmp_path / "coco").mkdir()
    with pytest.raises((UsageError, DataError)):
        run_one(registry, tmp_path / "out", "segment", data=f"coco:{tmp_path / 'coco'}")
    with pytest.raises(UsageError, match="has its own data set"):
        run_one(registry, tmp_path / "out", "camvid", data=f"pairs:{demo}")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda own: (own / "masks/train/1.png").unlink(), "1"),
        (lambda own: Image.new("L", (9, 9)).save(own / "masks/train/1.png"), "1.png"),
        (lambda own: Image.new("L", (64, 48), 77).save(own / "masks/train/1.png"), "77"),
    ],
    ids=["no mask", "another size", "no class"],
)
def test_broken_masks_are_refused_with_their_names_and_exit_code_3(spoil, told, pairs, registry, tmp_path):
    spoil(pairs)
    try:
        cell = run_one(registry, tmp_path / "out", "segment", data=f"pairs:{pairs}")
        code, text = cell.error_code, cell.error
    except DataError as error:
        code, text = error.code, str(error)
    assert code == 3
    assert told in text


def test_data_without_a_pixel_to_judge_by_fail(pairs, registry, tmp_path):
    for mask in (pairs / "masks" / "val").iterdir():
        Image.new("L", (64, 48), IGNORE).save(mask)
    cell = run_one(registry, tmp_path / "out", "segment", data=f"pairs:{pairs}")
    assert (cell.status, cell.error_code) == ("failed", 3)
    assert "no pixel to judge by" in cell.error


def test_unreadable_images_and_masks_are_left_out_before_training_and_counted(pairs, oracle, tmp_path):
    images, masks = (sorted((pairs / kind / "train").iterdir()) for kind in ("images", "masks"))
    images[0].write_bytes(images[0].read_bytes()[:200])
    masks[1].write_bytes(b"")
    ask = {"data": f"pairs:{pairs}", "settings": {}}
    cell = run_one(oracle, tmp_path / "out", "segment", **ask)
    assert cell.status == "ok"
    assert cell.data["train_unreadable"] == 2
    assert cell.data["train_images"] == len(images) - 2
    assert any("train: 2 images cannot be read and are left out" in told for told in cell.warnings)
    with pytest.raises(DataError, match=f"2 of {len(images)} images cannot be read"):
        run_one(oracle, tmp_path / "strict", "segment", strict=True, **ask)


# --- recipes and backbones ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_recipes_of_a_task_are_told_apart_and_explained(task):
    assert len({p.hash for p in task.protocols}) == len(task.protocols)
    for protocol in task.protocols:
        assert isinstance(protocol, SegmentationProtocol)
        assert f"``{protocol.id}``" in task.__doc__, f"{task.name}: {protocol.id} is not explained"


def test_moco_s_recipe_is_what_its_appendix_says():
    city, voc = Cityscapes().protocol("fcn-moco"), VocSegmentation().protocol("fcn-moco")
    for p in (city, voc):
        assert isinstance(p, SegmentationProtocol)
        assert (p.head, p.output_stride, p.convs, p.width, p.head_dilation) == ("fcn", 16, 2, 256, 6)
        assert (p.batch_size, p.weight_decay, p.scale, p.inference) == (16, 1e-4, (0.5, 2.0), "whole")
        assert [m / p.iterations for m in p.milestones] == [0.7, 0.9]
    assert (city.crop, city.lr, city.iterations) == ((769, 769), 0.01, 90_000)
    assert (voc.crop, voc.lr, voc.iterations, voc.train_split) == ((513, 513), 0.003, 30_000, "train_aug")


def test_a_backbone_that_cannot_be_dilated_is_refused_before_any_work(demo, registry, tmp_path):
    task = Cityscapes()
    task.refuse(build("timm:test_resnet", registry), task.protocol("fcn-moco"))
    task.refuse(build("timm:test_vit", registry), task.protocol("fcn-moco"))
    with pytest.raises(BackboneError, match="torchvision:resnet18 cannot be dilated to an output stride of 16"):
        run("random:torchvision:resnet18", "cityscapes", registry=registry, data_root=demo, out=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_a_network_without_maps_is_refused(registry):
    backbone = build("timm:test_resnet", registry)
    backbone.respec(gives=frozenset({"pooled"}))
    with pytest.raises(BackboneError, match="needs maps"):
        CamVid().refuse(backbone, CamVid().protocol())


def test_camvid_itself_runs(realdata, registry, tmp_path):
    few = FEW | {"iterations": "3"}
    cell = run_one(registry, tmp_path, "camvid", data_root=realdata / "seg_camvid", settings=few, limit=3)
    assert cell.status == "ok", cell.error
    assert (cell.data["train_images"], cell.data["test_images"], cell.data["classes"]) == (3, 3, 11)


def test_the_full_ade20k_runs_as_data_of_ones_own(realdata, registry, tmp_path):
    few = FEW | {"train_split": "train", "test_split": "train"}
    data = f"ade20k-full:{realdata / 'seg_ade20k_2021'}"
    cell = run_one(registry, tmp_path, "segment", data=data, settings=few, limit=1)
    assert cell.status == "ok", cell.error
    assert cell.data["classes"] == 150
    assert any("not the scene parsing benchmark" in told for told in cell.warnings)
