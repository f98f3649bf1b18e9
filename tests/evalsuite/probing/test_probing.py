"""What tasks on labelled images share: what protocols are given, few shots, shares of the labels, what is chosen by."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from torch import nn

from evalsuite import probes, probing
from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.data.classification import ClassificationSet
from evalsuite.errors import DataError, UsageError
from evalsuite.hooks import Registry
from evalsuite.probing import tasks
from evalsuite.results import Result, read_all
from evalsuite.runner import run
from evalsuite.tasks.classification import Classify, ClassifyMultilabel, MedMnist, Voc07Classification
from evalsuite.tasks.retrieval import ChexpertRetrieval

COLOURS = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200), (180, 180, 40)])
FROZEN = tuple(p.id for p in probing.recipes("crop"))
SMALL: dict[str, dict[str, str]] = {  # grids that a test can wait for
    "linear": {"costs": "0.1,1,10"},
    "linear-1": {"costs": "0.1,1,10", "fraction": "0.5"},
    "linear-10": {"costs": "0.1,1,10", "fraction": "0.5"},
    "knn": {"ks": "1,5"},
    "svm": {"costs": "1,10"},
    "sweep": {"epochs": "10", "lrs": "0.1,1,10"},
    "few-shot": {"shots": "1,4"},
    "few-shot-linear": {"shots": "1,4"},
}


class Eye(nn.Module):
    """The mean colour of an image, and a map that is blind."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("name", torch.ones(1))

    def forward(self, x: torch.Tensor) -> Features:
        return Features(x.mean((2, 3)), {4: torch.zeros_like(nn.functional.avg_pool2d(x, 4))})


def build() -> Backbone:
    gives = frozenset({"pooled", "maps"})
    return Backbone(Eye(), BackboneSpec("eye", 3, {4: 3}, gives, image_size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1)))


@pytest.fixture
def ask(registry, monkeypatch, tmp_path) -> Callable[..., Result]:
    """Evaluate the eye; results lie below ``out``."""
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))
    module = types.ModuleType("eyes")
    module.build = build
    monkeypatch.setitem(sys.modules, "eyes", module)
    shelf = Registry()
    for entry in registry.entries():
        getattr(shelf, entry.shelf)(entry.name, entry.target, entry.summary)
    shelf.backbone("eye", "eyes:build")

    def ask(data: Path | None, task: str = "classify", out: str = "out", **flags: Any) -> Result:
        source = None if data is None else f"npz:{data}"
        (result,) = run("random:eye", task, registry=shelf, data=source, out=tmp_path / out, **flags)
        assert result.error is None, result.error
        return result

    return ask


def pixels(labels: np.ndarray, seed: int, spread: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    colours = COLOURS[labels] + rng.normal(0, spread, (len(labels), 3))
    return np.broadcast_to(colours.clip(0, 255).astype(np.uint8)[:, None, None], (len(labels), 8, 8, 3))


def write(path: Path, spread: float = 60.0, train: int = 80, test: int = 60, marks: bool = False) -> Path:
    """Four classes of colours, or four labels that say which of two colours an image is near."""
    arrays: dict[str, np.ndarray] = {}
    for split, count, seed in (("train", train, 1), ("test", test, 2)):
        labels = np.arange(count) % 4
        arrays[f"{split}_images"] = pixels(labels, seed, spread)
        several = np.stack([labels == 0, labels >= 2, labels % 2 == 0, labels == 3], axis=1).astype(int)
        arrays[f"{split}_labels"] = several if marks else labels
    np.savez(path, **arrays)
    return path


def arrays(out: Path, result: Result, name: str) -> dict[str, np.ndarray]:
    (path,) = (p for p, r in read_all(out) if r == result)
    with np.load(path.with_name(result.files[name]), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


# --- what a protocol is given


@pytest.mark.parametrize("protocol", [p.id for p in Classify.protocols])
def test_no_protocol_is_shown_a_label_of_the_test_images(ask, tmp_path, monkeypatch, protocol):
    """Nobody can choose by what he has not: whatever is fitted gets the test images with every label hidden."""
    chosen = next(p for p in Classify.protocols if p.id == protocol)
    home = next(c for c in type(chosen).__mro__ if "fit" in vars(c))
    seen = []

    class Stop(Exception):
        pass

    def spy(self, backbone, train, test, criterion, setup):
        seen.append((self.id, len(test), set(test.labels.tolist()), set(train.labels.tolist())))
        raise Stop

    monkeypatch.setattr(home, "fit", spy)
    with pytest.raises(AssertionError, match="Stop"):
        ask(write(tmp_path / "a.npz"), protocol=protocol)
    assert seen == [(protocol, 60, {-1}, {0, 1, 2, 3})]


@pytest.mark.parametrize("protocol", FROZEN)
def test_other_test_labels_change_no_choice_and_no_prediction(ask, tmp_path, protocol):
    first = write(tmp_path / "a.npz")
    with np.load(first) as file:
        planted = {key: file[key] for key in file.files}
    planted["test_labels"] = np.random.default_rng(0).permutation(planted["test_labels"])
    np.savez(tmp_path / "b.npz", **planted)
    one, other = (ask(tmp_path / f"{n}.npz", protocol=protocol, settings=SMALL.get(protocol), out=n) for n in "ab")
    assert one.selected == other.selected
    assert one.details["validation"] == other.details["validation"]
    if "predictions" in one.files:
        kept = [arrays(tmp_path / n, r, "predictions") for n, r in (("a", one), ("b", other))]
        np.testing.assert_array_equal(kept[0]["scores"], kept[1]["scores"])
        assert (kept[0]["labels"] != kept[1]["labels"]).any()


@pytest.mark.parametrize("protocol", FROZEN)
def test_every_protocol_learns(ask, tmp_path, protocol):
    result = ask(write(tmp_path / "a.npz", spread=5), protocol=protocol, settings=SMALL.get(protocol))
    # No plane divides one of four colours from three others well, which is what a machine a class needs.
    assert result.scores["top1"].value > (0.7 if protocol == "svm" else 0.95)


# --- what is chosen by


def test_what_is_chosen_by_is_the_primary_metric():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(60, 3)), rng.integers(0, 3, 60)
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert Classify().criterion(scores, labels, "logits") == accuracy_score(labels, scores.argmax(axis=1))
    expected = roc_auc_score(labels, chances, multi_class="ovr")
    assert MedMnist().criterion(scores, labels, "logits") == pytest.approx(expected)
    assert np.isnan(MedMnist().criterion(scores, np.zeros(60, dtype=int), "logits"))

    class Balanced(Classify):
        primary = "balanced_accuracy"

    class Calibrated(Classify):
        primary = "ece"

    labels = np.minimum(labels, rng.integers(0, 3, 60))
    expected = balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert Balanced().criterion(scores, labels, "logits") == pytest.approx(expected)
    assert Calibrated().criterion(scores, labels, "logits") < 0  # lower is better


def test_medmnist_chooses_by_auroc_and_others_by_accuracy(ask, tmp_path):
    path = write(tmp_path / "a.npz", spread=90)
    results = [ask(path, task, protocol="ridge") for task in ("classify", "medmnist")]
    shares, areas = (np.array([row["score"] for row in result.details["validation"]]) for result in results)
    held = results[0].selected["validation_images"]
    np.testing.assert_allclose(shares * held, (shares * held).round())
    assert (np.abs(areas * held - (areas * held).round()) > 0.01).any()


def test_an_output_is_chosen_with_its_head(ask, tmp_path):
    settings = {"outputs": "map4,pooled", "epochs": "5"}
    result = ask(write(tmp_path / "a.npz", spread=5), protocol="sweep", settings=settings)
    assert result.selected["features"] == "pooled"
    grid = {(row["features"], row["lr"], row["weight_decay"]) for row in result.details["validation"]}
    assert len(grid) == len(result.details["validation"]) == 2 * 10 * 3


def test_the_edge_of_a_sweep_is_warned_of_and_no_decay_is_none(ask, tmp_path):
    settings = {"lrs": "0.0001,0.0002", "weight_decays": "0.0", "epochs": "5"}
    result = ask(write(tmp_path / "a.npz"), protocol="sweep", settings=settings)
    assert [w for w in result.warnings if "edge of its grid" in w] == [
        f"lr={result.selected['lr']:g} is at the edge of its grid, 0.0001 to 0.0002"
    ]
    table = [({"weight_decay": d, "lr": lr}, float(d == 0)) for d in (1e-4, 0.0) for lr in (0.1, 1.0, 3.0)]
    assert not any("weight_decay" in w for w in probes.choose(table, 500).warnings)


def test_few_images_are_chosen_on_in_folds_and_the_numbers_are_told(ask, tmp_path):
    result = ask(write(tmp_path / "a.npz"), protocol="linear", settings=SMALL["linear"])
    assert result.selected["validation_images"] == result.data["train_images"] < 100
    assert result.selected["validation_folds"] == 5
    (told,) = [w for w in result.warnings if w.startswith("chosen on")]
    assert told.startswith(f"chosen on {result.data['train_images']} validation images in 5 folds")
    tenth = ask(write(tmp_path / "a.npz"), settings={**SMALL["linear"], "folds_below": "0"}, out="tenth")
    assert tenth.selected["validation_folds"] == 1
    assert tenth.selected["validation_images"] < result.selected["validation_images"]


@pytest.mark.parametrize("setting", [{"validation": "1.5"}, {"folds": "1"}])
def test_numbers_by_which_nothing_can_be_chosen_are_refused_before_any_work(setting):
    with pytest.raises(UsageError, match="a validation share of"):
        probing.recipes()[0].override(setting)


def test_the_view_is_that_of_the_training_images_whatever_is_drawn_of_them(ask, tmp_path):
    result = ask(write(tmp_path / "a.npz"), protocol="linear-1", settings=SMALL["linear-1"])
    assert result.details["preprocess"] == {
        "size": [8, 8], "rule": "crop", "ratio": 1.0, "interpolation": "bilinear", "resize": "workers"
    }  # fmt: skip
    margin = ask(write(tmp_path / "a.npz"), protocol="knn-20", settings={"rule": "crop"}, out="margin")
    assert margin.details["preprocess"]["ratio"] == 0.875


def test_classes_with_few_test_images_are_named():
    rare = ClassificationSet(
        "d", "test", ("ant", "bee", "cow", "dog"), np.array([str(i) for i in range(12)]),
        np.array([0] * 6 + [1] * 4 + [2] * 2), None, np.arange(12),
    )  # fmt: skip
    assert "test has fewer than 5 images of 2 classes: bee (4), cow (2)" in tasks._warnings(rare, rare)
    marks = np.array([[1, 1, -1]] * 6 + [[0, 1, -1]] * 6)
    marks[0, 1], marks[:4, 2], marks[4:, 2] = 0, 1, 0
    several = dataclasses.replace(rare, labels=marks, classes=("ant", "bee", "cow"))
    assert "test has fewer than 5 images of 2 classes: bee (1), cow (4)" in tasks._warnings(several, several)


def test_a_protocol_says_whether_its_seed_moves_anything():
    moved = {p.id: p.seeded for p in probing.recipes()}
    assert [name for name, seeded in moved.items() if not seeded] == ["knn-20"]
    (knn,) = (p for p in probing.recipes() if p.id == "knn-20")
    assert knn.override({"fraction": "0.1"}).seeded
    assert knn.override({"ks": "1,5"}).seeded
    assert knn.override({"outputs": "pooled,map4"}).seeded
    assert not any(protocol.seeded for protocol in ChexpertRetrieval.protocols)


# --- few shots


def test_few_shots_are_means_over_draws_of_heads_on_k_images_a_class(ask, tmp_path):
    path = write(tmp_path / "a.npz", spread=70)
    result = ask(path, protocol="few-shot", settings={"shots": "1,4", "draws": "3"})
    with np.load(path) as file:
        data = {key: file[key] for key in file.files}
    known, asked = (data[f"{split}_images"].mean((1, 2)) / 255 for split in ("train", "test"))
    for k in (1, 4):
        values = []
        for draw in range(3):
            rows = probes.draw_shots(data["train_labels"], k, draw, seed=0)
            units = known[rows] / np.linalg.norm(known[rows], axis=1, keepdims=True)
            means = np.stack([units[data["train_labels"][rows] == c].mean(axis=0) for c in range(4)])
            means /= np.linalg.norm(means, axis=1, keepdims=True)
            values.append(float(((asked @ means.T).argmax(axis=1) == data["test_labels"]).mean()))
        assert result.details["draws"][f"top1_k{k}"] == pytest.approx(values)
        assert result.scores[f"top1_k{k}"].value == pytest.approx(np.mean(values))
        assert result.scores[f"top1_k{k}"].low < np.mean(values) < result.scores[f"top1_k{k}"].high
    assert result.scores["top1"].value == pytest.approx(np.mean([result.scores[f"top1_k{k}"].value for k in (1, 4)]))
    assert set(result.scores) == {"top1", "top1_k1", "top1_k4"}
    assert result.details["encoded"] == 140


def test_all_draws_cost_one_encoding_and_other_draws_none(ask, tmp_path):
    path = write(tmp_path / "a.npz")
    encoded = [ask(path, protocol="few-shot", settings={"shots": "2"}, seeds=[s]).details["encoded"] for s in (0, 1)]
    encoded.append(ask(path, protocol="few-shot-linear", settings={"shots": "2"}).details["encoded"])
    assert encoded == [140, 0, 0]


def test_the_interval_of_few_shots_is_of_draws_too(ask, tmp_path):
    """With thousands of test images nearly all of the spread is that of five unlike draws."""
    path = write(tmp_path / "a.npz", spread=70, test=4000)
    result = ask(path, protocol="few-shot", settings={"shots": "1"})
    draws = np.array(result.details["draws"]["top1_k1"])
    mean, wide = result.scores["top1_k1"].value, result.scores["top1_k1"]
    samples_alone = 2 * 1.96 * np.sqrt(mean * (1 - mean) / 4000)
    between = 2 * 1.96 * draws.std() / np.sqrt(5)
    assert between > 2 * samples_alone
    assert wide.high - wide.low == pytest.approx(np.hypot(between, samples_alone), rel=0.25)


def test_numbers_of_images_that_a_class_does_not_reach_are_told(ask, tmp_path):
    result = ask(write(tmp_path / "a.npz", train=20), protocol="few-shot-linear")
    assert result.scores["top1_k8"].value is None
    assert result.scores["top1_k4"].value is not None
    assert "no draws of 8, 16, 32, 64, 96 images: some class has 5" in result.warnings
    with pytest.raises(AssertionError, match="some class of a train has 5 images"):
        ask(write(tmp_path / "a.npz", train=20), protocol="few-shot", settings={"shots": "6"})


def test_few_shots_of_several_labels_are_drawn_label_by_label(ask, tmp_path):
    path = write(tmp_path / "a.npz", spread=5, marks=True)
    result = ask(path, "classify-multilabel", protocol="few-shot-linear", settings={"shots": "2,30", "draws": "2"})
    assert set(result.scores) == {"auroc", "auroc_k2", "auroc_k30"}
    assert result.scores["auroc_k30"].value > 0.9
    assert "draws of 30 images hold all of some label: there are 20" in result.warnings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shots": "0"}, "nothing to draw"),
        ({"draws": "0"}, "nothing to draw"),
        ({"outputs": "pooled,map4"}, "something to choose"),
        ({"probe": "ridge", "alphas": "1,10"}, "something to choose"),
    ],
)
def test_few_shots_that_say_nothing_are_refused(ask, tmp_path, settings, words):
    with pytest.raises(UsageError, match=words):
        ask(write(tmp_path / "a.npz"), protocol="few-shot", settings=settings)


# --- shares of the labels


def test_a_share_of_the_labels_is_drawn_of_each_class_by_the_seed(ask, tmp_path):
    path = write(tmp_path / "a.npz", train=200)
    costs = {"costs": "1,10"}
    found = [ask(path, protocol="linear-10", settings=costs, seeds=[seed]) for seed in (0, 1)]
    assert [r.data["train_images"] for r in found] == [20, 20]
    assert [r.data["train_subset"] for r in found] == [f"0.1 of each class, drawn with seed {s}" for s in (0, 1)]
    assert found[0].data["fingerprint"] == found[1].data["fingerprint"]  # so that seeds are averaged
    assert found[0].details["encoded"] == 80
    whole = ask(path, protocol="linear", settings=costs)
    assert "train_subset" not in whole.data
    assert whole.data["train_images"] == 200
    with pytest.raises(UsageError, match=r"0\.0 of the training labels"):
        ask(path, protocol="linear", settings={"fraction": "0.0"})


def test_one_image_a_class_leaves_nothing_to_choose_by(ask, tmp_path):
    with pytest.raises(AssertionError, match="no validation part can be made of 4 training samples"):
        ask(write(tmp_path / "a.npz"), protocol="linear-1")


# --- several labels


def test_voc_is_scored_by_two_kinds_of_precision():
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=(50, 3)), rng.integers(-1, 2, (50, 3))
    task = Voc07Classification()
    found = task.measure(scores, labels, "margins", ["map", "map_11point"])(np.ones((1, 50)))
    areas, points = [], []
    for column in range(3):
        known = labels[:, column] >= 0
        truth = labels[known, column][np.argsort(-scores[known, column])]
        recall, precision = np.cumsum(truth) / truth.sum(), np.cumsum(truth) / np.arange(1, len(truth) + 1)
        envelope = np.array([precision[i:].max() for i in range(len(truth))])
        areas.append((np.diff(np.append(0, recall)) * envelope).sum())
        points.append(np.mean([precision[recall >= t - 1e-9].max() for t in np.linspace(0, 1, 11)]))
    assert found["map"][0] == pytest.approx(np.mean(areas))
    assert found["map_11point"][0] == pytest.approx(np.mean(points))
    assert task.criterion(scores, labels, "margins") == pytest.approx(np.mean(areas))
    assert set(ClassifyMultilabel.kinds) == {m.name for m in ClassifyMultilabel.metrics}


def test_voc07_runs_on_its_demo(ask):
    for protocol in ("svm-obow", "ridge"):
        result = ask(None, "voc07-cls", demo=True, protocol=protocol)
        assert result.primary == "map"
        assert 0 < result.scores["map"].value < 1
        told = result.details["ap_by_class"]
        assert result.scores["map"].value == pytest.approx(np.mean([v for v in told.values() if v is not None]))
        assert told["cat"] is None  # the demo has none
    settings = {"shots": "1,4", "draws": "2"}
    result = ask(None, "voc07-cls", demo=True, protocol="svm-low-shot", settings=settings)
    assert set(result.scores) == {"map", "map_k1", "map_k4"}
    assert result.details["encoded"] == 0


def test_real_voc_images_have_their_annotated_labels(ask, realdata, tmp_path):
    settings = {"train_split": "2012:train", "test_split": "2012:val"}
    root = realdata / "det_voc2012_100"
    result = ask(None, "voc07-cls", data_root=root, protocol="svm-obow", settings=settings)
    assert (result.data["train_images"], result.data["test_images"]) == (80, 20)
    assert 0 < result.scores["map"].value < 0.6


@pytest.mark.parametrize("task", ["classify", "classify-multilabel", "places", "places365"])
def test_demo_worlds_run(ask, task):
    result = ask(None, task, demo=True, protocol="ridge")
    assert result.demo
    assert not result.ranked


def test_a_protocol_of_ones_own_runs_in_the_same_task(ask, tmp_path, monkeypatch):
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Guess(probing.ImageProtocol):
        def fit(self, backbone, train, test, criterion, setup):
            share = np.bincount(train.labels, minlength=4) / len(train)
            value = criterion(np.tile(share, (len(train), 1)), train.labels, "probabilities")
            scores = np.tile(share, (len(test), 1))
            return probing.Fitted(scores=scores, scale="probabilities", choice={"seen": value})

    monkeypatch.setattr(Classify, "protocols", (Guess(id="guess", version=1),))
    result = ask(write(tmp_path / "a.npz"))
    assert result.scores["top1"].value == pytest.approx(0.25)
    assert result.scores["ece"].value == pytest.approx(0.0)
    assert result.selected == {"seen": 0.25}


def test_splits_of_other_classes_are_refused(ask, tmp_path):
    with pytest.raises(DataError, match="single class"):
        ask(write(tmp_path / "a.npz"), limit=1)
