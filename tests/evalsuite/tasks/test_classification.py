"""Classification end to end: a backbone that sees the classes against one that does not, and what is told of both."""

from __future__ import annotations

import io
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score
from torch import Tensor, nn

from evalsuite import compare as comparing
from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.board.report import report
from evalsuite.board.table import collect
from evalsuite.checkpoints import Candidate, State
from evalsuite.data import digests
from evalsuite.data.coco import Coco
from evalsuite.errors import BackboneError, DataError, UsageError
from evalsuite.hooks import Registry
from evalsuite.progress import Progress
from evalsuite.results import Result, read_all
from evalsuite.runner import run

PROTOCOLS = ("linear", "knn", "knn-20", "ridge", "svm")
COLOURS = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200), (180, 180, 40), (40, 180, 180), (180, 40, 180)])


class Eye(nn.Module):
    """Sees the colour of the lower half of an image, where the class is; or, blind, its first row, where noise is; or
    all its pixels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("name", torch.tensor([float(ord(kind[0]))]))

    def forward(self, x: Tensor) -> Features:
        seen = {"blind": x[:, :, 0].flatten(1), "pixels": x.flatten(1)}.get(self.kind, x[:, :, 4:].mean((2, 3)))
        return Features(seen, {4: nn.functional.avg_pool2d(x, 4)})


def eye(name: str) -> Backbone:
    gives = frozenset({"maps"} if name == "maps" else {"pooled", "maps"})
    dim = {"blind": 24, "pixels": 192}.get(name, 3)
    return Backbone(Eye(name), BackboneSpec(f"eye:{name}", dim, {4: 3}, gives, image_size=(8, 8)))


def world(labels: np.ndarray, seed: int = 0, spread: float = 10.0) -> np.ndarray:
    """(N, 8, 8, 3): noise above, the class's colour below."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (len(labels), 8, 8, 3)).astype(np.float64)
    pixels[:, 4:] = (COLOURS[labels] + rng.normal(0, spread, (len(labels), 3)))[:, None, None]
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def ours(registry, monkeypatch) -> Registry:
    module = types.ModuleType("eyes")
    module.eye = eye
    module.build = build_resnet20
    module.read = read_resnet20
    monkeypatch.setitem(sys.modules, "eyes", module)
    shelf = Registry()
    for entry in registry.entries():
        getattr(shelf, entry.shelf)(entry.name, entry.target, entry.summary)
    shelf.backbone("eye", "eyes:eye")
    shelf.backbone("resnet20", "eyes:build")
    shelf.checkpoint("resnet20", "eyes:read")
    return shelf


@pytest.fixture
def ask(ours, tmp_path) -> Callable[..., Result]:
    def ask(data: str | None, task: str = "classify", backbone: str = "sharp", **flags: Any) -> Result:
        (result,) = run(f"random:eye:{backbone}", task, registry=ours, data=data, **{"out": tmp_path / "out", **flags})
        return result

    return ask


def write_folders(root: Path, classes: int = 6, train: int = 12, test: int = 6, spread: float = 10.0) -> Path:
    for split, count, seed in (("train", train, 1), ("test", test, 2)):
        labels = np.repeat(np.arange(classes), count)
        for i, (label, pixels) in enumerate(zip(labels, world(labels, seed, spread), strict=True)):
            path = root / split / f"class {label}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def write_npz(path: Path, train: np.ndarray, test: np.ndarray, spread: float = 10.0, **more: Any) -> Path:
    np.savez(
        path, train_images=world(train, 1, spread), train_labels=train, test_images=world(test, 2, spread),
        test_labels=test, **more,
    )  # fmt: skip
    return path


def arrays(result: Result, out: Path, name: str) -> dict[str, np.ndarray]:
    (path,) = (p for p, r in read_all(out) if r == result)
    with np.load(path.with_name(result.files[name]), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def test_every_head_tells_a_backbone_that_sees_from_one_that_does_not(ask, tmp_path):
    data = f"folder:{write_folders(tmp_path / 'mine')}"
    for protocol in PROTOCOLS:
        sharp, blind = (ask(data, backbone=name, protocol=protocol) for name in ("sharp", "blind"))
        assert sharp.error is None
        assert sharp.scores["top1"].value == pytest.approx(1.0), protocol
        assert blind.scores["top1"].value < 0.5, protocol
        assert sharp.scores["top5"].value == pytest.approx(1.0)
        assert sharp.scores["auroc"].value is None  # of two classes alone
        assert (sharp.scores["ece"].value is None) == (protocol in ("ridge", "svm"))
        assert not sharp.scores["ece"].higher_is_better


def test_data_are_encoded_once_for_all_heads(ask, tmp_path):
    data = f"folder:{write_folders(tmp_path / 'mine', train=4, test=2)}"
    settings = {"ks": "3"}
    encoded = [ask(data, protocol=p, settings=settings).details["encoded"] for p in ("knn-20", "linear", "ridge")]
    assert encoded == [36, 0, 0]


def test_a_result_has_what_comparing_takes(ask, tmp_path):
    result = ask(f"folder:{write_folders(tmp_path / 'mine', spread=60)}")
    kept = arrays(result, tmp_path / "out", "samples")
    top1 = result.scores["top1"]
    assert kept["samples/top1"].mean() == pytest.approx(top1.value)
    assert kept["samples/top1"].shape == kept["ids"].shape == (36,)
    assert kept["ids"][0] == "class 0/000.png"
    for name in ("top1", "top5", "balanced_accuracy", "ece"):
        assert kept[f"replicates/{name}"].shape == (1000,)
    assert top1.low < top1.value < top1.high
    assert result.selected["C"] in result.protocol.fields["costs"]
    assert len(result.details["validation"]) == 45
    assert max(row["score"] for row in result.details["validation"]) == result.selected["validation_score"]
    assert result.data["train_images"] == 72
    assert result.engine is None
    assert {"encode", "fit", "score", "total"} <= set(result.timings)
    predictions = arrays(result, tmp_path / "out", "predictions")
    hits = predictions["classes"][:, 0] == predictions["labels"]
    np.testing.assert_array_equal(hits, kept["samples/top1"] == 1)
    expected = balanced_accuracy_score(predictions["labels"], predictions["classes"][:, 0])
    assert result.scores["balanced_accuracy"].value == pytest.approx(expected)


def test_two_classes_have_an_auroc(ask, tmp_path):
    rng = np.random.default_rng(3)
    path = write_npz(tmp_path / "two.npz", rng.integers(0, 2, 80), rng.integers(0, 2, 60), spread=90)
    for protocol in ("linear", "ridge", "knn"):
        result = ask(f"npz:{path}", protocol=protocol, settings={"ks": "10"} if protocol == "knn" else None)
        told = arrays(result, tmp_path / "out", "predictions")
        order = np.argsort(told["classes"], axis=1)
        scores = np.take_along_axis(told["scores"], order, axis=1).astype(np.float64)
        expected = roc_auc_score(told["labels"], scores[:, 1] - scores[:, 0])
        assert result.scores["auroc"].value == pytest.approx(expected)
        assert 0.6 < result.scores["auroc"].value < 1
        assert result.scores["auroc"].low < expected < result.scores["auroc"].high
        assert result.scores["top5"].value is None


def test_medmnist_takes_its_auroc_of_every_class_against_the_rest(ask, tmp_path):
    rng = np.random.default_rng(4)
    (tmp_path / "data" / "medmnist").mkdir(parents=True)
    write_npz(tmp_path / "data" / "medmnist" / "bloodmnist.npz", rng.integers(0, 4, 90), rng.integers(0, 4, 60), 90)
    result = ask(None, "medmnist", data_root=tmp_path / "data")
    assert result.primary == "auroc"
    told = arrays(result, tmp_path / "out", "predictions")
    order = np.argsort(told["classes"], axis=1)
    logits = np.take_along_axis(told["scores"], order, axis=1).astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = roc_auc_score(told["labels"], chances, multi_class="ovr", average="macro")
    assert result.scores["auroc"].value == pytest.approx(expected, abs=1e-4)
    again = ask(f"npz:{tmp_path / 'data' / 'medmnist' / 'bloodmnist.npz'}", "medmnist")
    assert again.scores == result.scores


def write_marks(tmp_path: Path) -> Path:
    """Three labels over colours; some unknown, one that the test split never shows."""
    rng = np.random.default_rng(5)
    lines = ["path,split,label:warm,label:green,label:absent"]
    for split, count in (("train", 60), ("test", 40)):
        labels = rng.integers(0, 6, count)
        for i, (label, pixels) in enumerate(zip(labels, world(labels, count, 70), strict=True)):
            Image.fromarray(pixels).save(tmp_path / f"{split}{i}.png")
            marks = [int(label in (0, 3, 5)), int(label in (1, 3, 4)), int(split == "train" and i % 5 == 0)]
            row = ["" if i % 10 == 9 else str(marks[0]), *map(str, marks[1:])]
            lines.append(",".join([f"{split}{i}.png", split, *row]))
    path = tmp_path / "marks.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_several_labels_are_scored_where_they_are_known(ask, tmp_path):
    data = f"csv:{write_marks(tmp_path)}"
    for protocol in ("linear", "ridge", "knn"):
        result = ask(
            data, "classify-multilabel", protocol=protocol, settings={"ks": "5"} if protocol == "knn" else None
        )
        assert result.error is None
        told = arrays(result, tmp_path / "out", "predictions")
        known = told["labels"] >= 0
        assert not known[:, 0].all()
        columns = [(told["labels"][known[:, i], i], told["scores"][known[:, i], i]) for i in (0, 1)]
        expected = np.mean([roc_auc_score(*column) for column in columns])
        assert result.scores["auroc"].value == pytest.approx(expected)
        expected = np.mean([average_precision_score(*column) for column in columns])
        assert result.scores["map"].value == pytest.approx(expected)
        assert result.details["auroc_by_class"]["absent"] is None


def test_each_task_refuses_the_others_labels(ask, tmp_path):
    with pytest.raises(DataError, match="several labels") as told:
        ask(f"csv:{write_marks(tmp_path)}")
    assert "classify-multilabel" in told.value.fix
    with pytest.raises(DataError, match="one class an image"):
        ask(f"folder:{write_folders(tmp_path / 'mine', train=3, test=1)}", "classify-multilabel")


def write_groups(tmp_path: Path, copies: int, shared: bool = False) -> Path:
    """Images of patients, each ``copies`` times; a label is missing in each split."""
    rng = np.random.default_rng(13)
    lines = ["path,label,split,group"]
    for split, count in (("train", 60), ("test", 48)):
        labels = rng.integers(0, 3, count)
        pixels = world(labels, count, 70)
        for i in range(count):
            Image.fromarray(pixels[i // copies * copies]).save(tmp_path / f"{copies}{split}{i}.png")
            group = f"{'' if shared else split}p{i // copies}"
            lines.append(f"{copies}{split}{i}.png,{labels[i // copies * copies] if i else ''},{split},{group}")
    path = tmp_path / f"groups{copies}{shared}.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_patients_are_resampled_whole(ask, tmp_path):
    grouped = ask(f"csv:{write_groups(tmp_path, copies=6)}", protocol="ridge")
    kept = arrays(grouped, tmp_path / "out", "samples")
    assert len(set(kept["samples/group"].tolist())) == 8
    assert grouped.data["test_groups"] == 8
    top1 = grouped.scores["top1"]
    naive = 2 * 1.96 * np.sqrt(top1.value * (1 - top1.value) / 47)
    assert top1.high - top1.low > 1.3 * naive


def test_missing_labels_and_shared_patients_are_told(ask, tmp_path):
    data = f"csv:{write_groups(tmp_path, copies=2, shared=True)}"
    result = ask(data, protocol="ridge")
    assert "train: 1 images have no label and are left out" in result.warnings
    assert "test: 1 images have no label and are left out" in result.warnings
    assert any(w.startswith("24 groups are in both train and test") for w in result.warnings)
    assert (result.data["train_images"], result.data["test_images"]) == (59, 47)
    assert (result.data["train_unlabelled"], result.data["test_unlabelled"]) == (1, 1)
    with pytest.raises(DataError, match="1 of 60 images") as told:
        ask(data, protocol="ridge", strict=True)
    assert "2train0.png" in told.value.cause


def test_a_choice_at_the_edge_of_its_grid_is_warned_of(ask, tmp_path):
    data = f"folder:{write_folders(tmp_path / 'mine', spread=60)}"
    result = ask(data, protocol="knn", settings={"ks": "1,30", "temperatures": "0.07"})
    assert result.selected["k"] in (1, 30)
    assert any("k=" in w and "edge of its grid" in w for w in result.warnings)
    svm = ask(data, protocol="svm", settings={"costs": "0.01,0.1"})
    assert len(svm.selected["C"]) == 6


def test_several_outputs_are_chosen_among(ask, tmp_path):
    data = f"folder:{write_folders(tmp_path / 'mine', train=6, test=3)}"
    result = ask(data, backbone="blind", settings={"outputs": '["pooled", "map4/avg2"]'})
    assert result.selected["features"] == "map4/avg2"
    assert result.scores["top1"].value == pytest.approx(1.0)


def test_limits_seeds_and_changed_data(ask, tmp_path):
    root = write_folders(tmp_path / "mine")
    limited = ask(f"folder:{root}", protocol="ridge", limit=12)
    assert limited.limited == 12
    assert not limited.ranked
    assert (limited.data["train_images"], limited.data["test_images"]) == (12, 12)
    with pytest.raises(DataError, match="single class"):
        ask(f"folder:{root}", limit=1)
    whole = ask(f"folder:{root}", protocol="ridge")
    assert ask(f"folder:{root}", protocol="ridge", seeds=[1]).scores["top1"] == whole.scores["top1"]
    (root / "test" / "class 0" / "000.png").unlink()
    with pytest.raises(UsageError, match="other data"):
        ask(f"folder:{root}", protocol="ridge")


def test_images_that_do_not_decode_are_left_out_and_counted_or_refused(ask, tmp_path):
    root = write_folders(tmp_path / "mine", train=4, test=2)
    whole = ask(f"folder:{root}", protocol="ridge", strict=True)
    (root / "train" / "class 2" / "008.png").write_bytes(b"broken")
    (root / "train" / "class 3" / "013.png").unlink()
    (root / "train" / "class 3" / "013.png").symlink_to(tmp_path / "nowhere.png")
    (root / "test" / "class 1" / "003.png").write_bytes((root / "test" / "class 1" / "002.png").read_bytes()[:60])
    refused = ask(f"folder:{root}", protocol="ridge", strict=True, out=tmp_path / "refused")
    assert (refused.status, refused.error_code, len(refused.error.splitlines())) == ("failed", 3, 3)
    assert "class 2/008.png" in refused.error
    for workers in (0, 2):  # a worker hands over the refusal itself
        result = ask(f"folder:{root}", protocol="ridge", workers=workers, out=tmp_path / f"{workers}")
        assert result.status == "ok"
        assert (result.data["train_unreadable"], result.data["test_unreadable"]) == (2, 1)
        assert (result.data["train_images"], result.data["test_images"]) == (22, 11)
        (told,) = (w for w in result.warnings if w.startswith("train"))
        assert told.startswith("train: 2 images cannot be read and are left out; image ")
    assert whole.data["fingerprint"] != result.data["fingerprint"]
    assert result.details["encoded"] == 0  # what is broken is remembered, and the rest is in the cache
    with pytest.raises(DataError, match="2 of 24 images cannot be read"):  # now known before any work
        ask(f"folder:{root}", protocol="ridge", strict=True, out=tmp_path / "refused")


def test_images_in_two_splits_are_a_warning(ask, tmp_path):
    root = write_folders(tmp_path / "mine", train=4, test=2)
    assert not any("scores are too high" in told for told in ask(f"folder:{root}", protocol="ridge").warnings)
    (root / "test" / "class 1" / "002.png").unlink()
    shutil.copy(root / "train" / "class 2" / "008.png", root / "test" / "class 1" / "002.png")
    (told,) = (w for w in ask(f"folder:{root}", protocol="ridge", out=tmp_path / "again").warnings if "too high" in w)
    assert told.startswith("1 of the images of test are in train too, so that scores are too high: ")
    assert told.endswith("class 1/002.png is class 2/008.png there")
    labels = np.repeat(np.arange(3), 4)
    pixels = world(labels, 1, 10.0)
    np.savez(
        tmp_path / "a.npz", train_images=pixels, train_labels=labels, test_images=pixels[:5], test_labels=labels[:5]
    )
    warnings = ask(f"npz:{tmp_path / 'a.npz'}", protocol="ridge", out=tmp_path / "arrays").warnings
    assert any(told.startswith("5 of the images of test are in train too") for told in warnings)


def test_a_split_without_a_readable_image_is_refused(ask, tmp_path):
    root = write_folders(tmp_path / "mine", train=4, test=1)
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"broken")
    result = ask(f"folder:{root}", protocol="ridge")
    assert (result.status, result.error_code) == ("failed", 3)
    assert "6 of 6 images cannot be read" in result.error


def test_what_cannot_be_run_is_refused_before_work(ask, tmp_path):
    with pytest.raises(UsageError, match="classify needs data"):
        ask(None)
    with pytest.raises(DataError, match="cifar10"):
        ask(None, "cifar10", data_root=tmp_path)
    data = f"folder:{write_folders(tmp_path / 'mine', train=3, test=1)}"
    with pytest.raises(BackboneError, match="needs pooled"):
        ask(data, backbone="maps")
    assert ask(data, backbone="maps", protocol="ridge", settings={"outputs": '["map4"]'}).status == "ok"
    coco = Coco().demo(tmp_path / "coco", images=2)
    with pytest.raises(UsageError, match="does not label whole images"):
        ask(f"coco:{coco}")
    with pytest.raises(UsageError, match="has no boxes"):
        ask(data, "detect")


def test_named_data_sets_are_found_below_the_data_root(ask, tmp_path):
    write_folders(tmp_path / "data" / "cifar10", classes=3, train=5, test=4)
    write_folders(tmp_path / "data" / "imagenet", classes=3, train=5, test=4)
    (tmp_path / "data" / "imagenet" / "test").rename(tmp_path / "data" / "imagenet" / "val")
    for task in ("cifar10", "imagenet"):
        result = ask(None, task, data_root=tmp_path / "data", protocol="ridge")
        assert result.scores["top1"].value == pytest.approx(1.0)
        assert result.ranked


def test_a_demo_runs_and_is_marked(ask):
    for task in ("cifar10", "medmnist"):
        result = ask(None, task, backbone="pixels", demo=True, protocol="ridge")
        assert result.demo
        assert not result.ranked
        assert result.scores["top1"].value > 1 / 6


# --------------------------------------------------------------------------------------------- a real checkpoint


class ResNet20(nn.Module):
    """CIFAR ResNet whose shortcuts drop every other pixel and pad channels with zeros (He et al., 2016, option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        for stage, (inside, out) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            setattr(self, f"layer{stage}", nn.Sequential(*(Block(inside if i == 0 else out, out) for i in range(3))))

    def forward(self, x: Tensor) -> Features:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return Features(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.stride, self.pad = out // inside, (out - inside) // 2
        self.conv1 = nn.Conv2d(inside, out, 3, stride=self.stride, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        short = nn.functional.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + short).relu()


def build_resnet20() -> Backbone:
    return Backbone(ResNet20(), BackboneSpec("resnet20", 64, {}, frozenset({"pooled"}), image_size=(32, 32)))


def read_resnet20(found: State):
    prefix = "module."
    if prefix + "linear.weight" in found.tensors and prefix + "layer4.0.conv1.weight" not in found.tensors:
        tensors = {k.removeprefix(prefix): v for k, v in found.tensors.items()}
        yield Candidate(tensors, "resnet20", prefix=prefix)


@pytest.mark.slow
def test_a_real_checkpoint_gives_the_known_answers_and_is_told_from_chance(realdata, ours, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar10").symlink_to(realdata / "cls_cifar10_jpeg")
    trained = str(realdata / "ckpt_cifar_resnet" / "resnet20-12fca82f.th")
    found = {}
    for name, backbone in (("trained", trained), ("random", "random:resnet20"), ("copy", trained)):
        for protocol in ("knn-20", "ridge"):
            flags = {"data_root": tmp_path / "data", "out": tmp_path / name, "protocol": protocol}
            (found[name, protocol],) = run(backbone, "cifar10", registry=ours, **flags)
    assert found["trained", "knn-20"].scores["top1"].value == pytest.approx(0.8320, abs=0.0021)
    assert found["trained", "knn-20"].ranked
    flags = {"data": f"folder:{realdata / 'cls_cifar10_jpeg'}", "out": tmp_path / "own", "protocol": "knn-20"}
    (own,) = run(
        trained, "classify", registry=ours, **flags
    )  # as one's own data they score the same, and without a mark
    assert own.scores["top1"].value == found["trained", "knn-20"].scores["top1"].value
    assert own.protocol.modified == ()
    assert own.details["preprocess"] | {"rule": "crop", "ratio": 1.0} == own.details["preprocess"]
    assert found["trained", "ridge"].scores["top1"].value > 0.78
    assert found["random", "knn-20"].scores["top1"].value < 0.4
    assert found["random", "ridge"].scores["top1"].value < 0.5
    assert found["copy", "ridge"].details["encoded"] == 0
    report = comparing.compare([tmp_path / name for name in ("trained", "random", "copy")])
    first, second, third = report.backbones
    for comparison in report.comparisons:
        apart = {(p.first, p.second): p.separable for p in comparison.pairs}
        assert apart == {(first, second): True, (first, third): False, (second, third): True}
        assert comparison.groups == ((first, third), (second,))


def test_real_pneumonia_is_seen_in_sixty_four_pixels(realdata, ask):
    (path,) = (realdata / "med_pneumoniamnist").glob("*.npz")
    result = ask(f"npz:{path}", "medmnist", backbone="pixels", protocol="ridge")
    assert result.data["test_images"] == 624
    assert result.data["train_images"] == 4708
    assert 0.8 < result.scores["auroc"].value < 0.97
    assert result.scores["auroc"].low < result.scores["auroc"].value < result.scores["auroc"].high
    mean = ask(f"npz:{path}", "medmnist", protocol="ridge")
    assert mean.scores["auroc"].value < result.scores["auroc"].low


# --- data by their content --------------------------------------------------------------------------------------


def write_bitmaps(root: Path, seed: int, classes: int = 6) -> Path:
    """Class folders of images of one size in bytes, all of one time."""
    for split in ("train", "test"):
        labels = np.repeat(np.arange(classes), 4)
        colours = labels if seed == 0 else np.random.default_rng((seed, len(split))).permutation(labels)
        for i, (label, pixels) in enumerate(zip(labels, world(colours, seed), strict=True)):
            path = root / split / f"class {label}" / f"{i:03d}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            os.utime(path, ns=(10**18, 10**18))
    return root


def test_other_pixels_in_files_of_the_same_sizes_and_times_are_other_data(ask, tmp_path):
    root = write_bitmaps(tmp_path / "mine", 0)
    first = ask(f"folder:{root}", protocol="knn")
    write_bitmaps(root, 1)
    with pytest.raises(UsageError, match="on other data"):
        ask(f"folder:{root}", protocol="knn")
    again = ask(f"folder:{root}", protocol="knn", out=tmp_path / "again")
    assert again.details["encoded"] == 48  # none of the features of the old pixels
    assert first.scores["top1"].value == 1.0
    assert again.scores["top1"].value < 0.8
    with pytest.raises(UsageError, match="no task in common") as refusal:
        comparing.compare([tmp_path / "out", tmp_path / "again"])
    assert "on these data" in refusal.value.cause


def test_the_same_files_elsewhere_are_the_same_data(ask, tmp_path):
    root = write_bitmaps(tmp_path / "mine", 0)
    first = ask(f"folder:{root}", protocol="knn")
    moved = shutil.copytree(root, tmp_path / "moved", copy_function=shutil.copyfile)
    second = ask(f"folder:{moved}", protocol="knn", out=tmp_path / "again")
    assert second.details["encoded"] == 0
    assert first.data["fingerprint"] == second.data["fingerprint"]
    assert first.data["fingerprint"].startswith("content:")
    (made,) = comparing.compare([tmp_path / "out", tmp_path / "again"]).comparisons
    assert made.pairs[0].difference == 0


def test_data_are_digested_once_or_whenever_that_is_asked_for(ask, tmp_path, monkeypatch):
    root = write_bitmaps(tmp_path / "mine", 0, classes=2)
    opened: list[str] = []
    read = digests.open_regular
    monkeypatch.setattr(digests, "open_regular", lambda path: opened.append(path) or read(path))
    for flags, count in (({}, 16), ({}, 16), ({"verify_data": True, "seeds": [1]}, 32), ({"seeds": [2]}, 32)):
        ask(f"folder:{root}", protocol="linear", **flags)
        assert len(opened) == count


def test_results_of_the_old_kind_of_fingerprint_are_told_and_made_again(ask, tmp_path):
    root = write_bitmaps(tmp_path / "mine", 0, classes=2)
    made = ask(f"folder:{root}", protocol="knn")
    ((path, _),) = read_all(tmp_path / "out")
    old = made.model_copy(update={"data": {**made.data, "fingerprint": f"{'0' * 16}-{'f' * 16}"}})
    old.write(path)
    other = old.model_copy(update={"backbone": old.backbone.model_copy(update={"name": "b", "identity": "b" * 64})})
    other.write(tmp_path / "other" / "seed-0.json")
    with pytest.raises(UsageError, match="no task in common") as refusal:
        comparing.compare([tmp_path / "out", tmp_path / "other"])
    assert "made before data fingerprints were of content" in refusal.value.cause
    with pytest.raises(DataError) as unranked:
        collect([tmp_path / "other"])
    assert "made before data fingerprints were of content" in unranked.value.cause
    assert "It was made before data fingerprints were of content" in report(tmp_path / "out").read_text()
    (line,) = (line for line in _said(ask, f"folder:{root}").splitlines() if "made before" in line)
    assert line.endswith("the cell is run again")
    assert path.with_name("seed-0.json.aside-1").is_file()
    assert next(read_all(tmp_path / "out"))[1].data["fingerprint"] == made.data["fingerprint"]
    assert "there already" in _said(ask, f"folder:{root}")


def _said(ask: Callable[..., Result], data: str) -> str:
    said = io.StringIO()
    ask(data, protocol="knn", progress=Progress(stream=said))
    return said.getvalue()
