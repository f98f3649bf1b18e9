"""Medical tasks end to end on their demo worlds and on broken ones: what is scored, by whom, and what is told."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.cli import main
from evalsuite.data.chexpert import BLANK, COMPETITION, LABELS, UNCERTAIN, Chexpert
from evalsuite.data.classification import ClassificationSet
from evalsuite.data.covidx import Covidx
from evalsuite.data.mura import Mura as MuraData
from evalsuite.data.mura import study_of
from evalsuite.data.rsna import Rsna
from evalsuite.errors import DataError
from evalsuite.hooks import Registry
from evalsuite.probing import on_readable
from evalsuite.progress import Progress
from evalsuite.results import Result, read_all
from evalsuite.runner import run
from evalsuite.tasks.classification import MedMnist
from evalsuite.tasks.medical import Chexpert as ChexpertTask
from evalsuite.tasks.medical import Covidx as CovidxTask
from evalsuite.tasks.medical import Mura
from evalsuite.tasks.medical import Rsna as RsnaTask

pytest.importorskip("pydicom", reason="needs the medical extra")

SIZE = 24


class Eye(nn.Module):
    """All pixels of a small image; or, blind, those of its first row, where there is nothing to see."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("name", torch.tensor([float(ord(kind[0]))]))

    def forward(self, x: Tensor) -> Features:
        return Features(x[:, :1, :1].flatten(1) if self.kind == "blind" else x[:, :1].flatten(1))


def eye(name: str) -> Backbone:
    dim = SIZE if name == "blind" else SIZE**2
    return Backbone(Eye(name), BackboneSpec(f"eye:{name}", dim, {}, frozenset({"pooled"}), image_size=(SIZE, SIZE)))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def ask(registry, monkeypatch, tmp_path) -> Callable[..., Result]:
    module = types.ModuleType("eyes")
    module.eye = eye  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eyes", module)
    shelf = Registry()
    for entry in registry.entries():
        getattr(shelf, entry.shelf)(entry.name, entry.target, entry.summary)
    shelf.backbone("eye", "eyes:eye")

    def ask(task: str, root: Path | None, backbone: str = "sharp", **flags: Any) -> Result:
        given = {"out": tmp_path / "out", "protocol": "ridge", "data_root": root, **flags}
        (result,) = run(f"random:eye:{backbone}", task, registry=shelf, **given)
        return result

    return ask


LAYOUTS = {"rsna": Rsna(), "chexpert": Chexpert(), "covidx": Covidx(), "mura": MuraData()}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("worlds")
    for layout in LAYOUTS.values():
        layout.demo(root, seed=1, images=96)
    return root


@pytest.fixture
def world(worlds, tmp_path) -> Callable[[str], Path]:
    """A copy of a demo world, to be broken; its data root, the world alone in it."""

    def copy(name: str) -> Path:
        source = LAYOUTS[name].locate(worlds)
        shutil.copytree(source, tmp_path / "data" / source.name)
        return tmp_path / "data"

    return copy


def arrays(result: Result, out: Path, name: str) -> dict[str, np.ndarray]:
    (path,) = (p for p, r in read_all(out) if r == result)
    with np.load(path.with_name(result.files[name]), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def margins(told: dict[str, np.ndarray]) -> np.ndarray:
    """Scores by class, from the file of predictions."""
    return np.take_along_axis(told["scores"], np.argsort(told["classes"], axis=1), axis=1).astype(np.float64)


@pytest.mark.parametrize("task", LAYOUTS)
def test_every_task_ranks_one_that_sees_above_one_that_does_not(task, ask, worlds):
    sharp, blind = (ask(task, worlds, name) for name in ("sharp", "blind"))
    assert sharp.error is None
    primary = sharp.scores[sharp.primary]
    assert primary.value > 0.8
    assert blind.scores[sharp.primary].value < 0.68
    assert primary.low <= primary.value <= primary.high
    assert sharp.ranked
    assert sharp.data["test_groups"] <= sharp.data["test_images"]
    assert set(sharp.scores) == {"rsna": {"auroc", "top1", "balanced_accuracy", "ece"}, "mura": {
        "auroc", "top1", "balanced_accuracy", "ece"}, "covidx": {"auroc", "top1", "balanced_accuracy", "ece"},
        "chexpert": {"auroc", "map", *(f"auroc_{c.lower().replace(' ', '_')}" for c in COMPETITION)},
    }[task]  # fmt: skip


@pytest.mark.parametrize("task", LAYOUTS)
def test_a_demo_runs_and_is_marked(task, ask):
    result = ask(task, None, demo=True, protocol="knn-20", settings={"ks": "3"})
    assert result.error is None
    assert result.demo
    assert not result.ranked


@pytest.mark.parametrize("task", ["rsna", "mura", "covidx"])
def test_heads_are_chosen_by_what_counts_and_probabilities_calibrate(task, ask, worlds):
    result = ask(task, worlds, protocol="linear", settings={"costs": "0.001,0.1,10"})
    assert result.scores["ece"].value is not None
    assert result.selected["validation_score"] == max(row["score"] for row in result.details["validation"])
    assert ask(task, worlds, protocol="ridge").scores["ece"].value is None
    part = ask(task, worlds, protocol="linear-10", settings={"costs": "1"})
    assert part.data["train_images"] < 0.3 * result.data["train_images"]
    assert part.data["train_subset"].startswith("0.1 of each class")


def test_the_metric_that_counts_is_the_one_heads_are_chosen_by():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    scores = rng.normal(0, 1, (60, 2)) + 9 * np.array([1, 0])  # every image is called the first class
    ranks = scores[:, 1] - scores[:, 0]
    for task in (RsnaTask(), Mura(), MedMnist()):
        assert task.criterion(scores, labels, "logits") == pytest.approx(roc_auc_score(labels, ranks))
    assert CovidxTask().criterion(scores, labels, "logits") == (labels == 0).mean()


def test_rsna_is_scored_on_the_peers_split(ask, worlds, tmp_path):
    result = ask("rsna", worlds)
    data = Rsna().load(Rsna().locate(worlds), "test")
    told = arrays(result, tmp_path / "out", "predictions")
    np.testing.assert_array_equal(told["labels"], data.labels)
    scores = margins(told)
    assert result.scores["auroc"].value == pytest.approx(roc_auc_score(data.labels, scores[:, 1] - scores[:, 0]))
    assert result.data["test"] == "rsna test"
    assert result.data["train_images"] + result.data["test_images"] < 137  # the rest is val


# --- CheXpert ---------------------------------------------------------------------------------------------------


def test_chexpert_scores_each_finding_and_their_mean(ask, worlds, tmp_path):
    result = ask("chexpert", worlds)
    told = arrays(result, tmp_path / "out", "predictions")
    assert told["names"].tolist() == list(COMPETITION)
    by_label = [roc_auc_score(told["labels"][:, i], told["scores"][:, i]) for i in range(5)]
    for name, expected in zip(COMPETITION, by_label, strict=True):
        score = result.scores[f"auroc_{name.lower().replace(' ', '_')}"]
        assert score.value == pytest.approx(expected)
        assert score.low <= expected <= score.high
    assert result.scores["auroc"].value == pytest.approx(np.mean(by_label))
    valid = Chexpert().load(Chexpert().locate(worlds), "valid")
    assert result.data["test_images"] == (valid.tags == "Frontal").sum() < len(valid)
    kept = arrays(result, tmp_path / "out", "samples")
    assert len(set(kept["samples/group"].tolist())) == result.data["test_groups"] < result.data["test_images"]


def test_chexpert_learns_from_what_the_policy_makes_of_its_marks(worlds):
    raw = Chexpert().load(Chexpert().locate(worlds), "train")
    task = ChexpertTask()
    columns = [LABELS.index(name) for name in COMPETITION]
    for policy, put in {"zeros": [0] * 5, "ones": [1] * 5, "ignore": [-1] * 5, "peers": [1, 0, 0, 1, 1]}.items():
        protocol = task.protocol().override({"uncertain": policy})
        part = task.prepared(raw, protocol)
        assert part.classes == COMPETITION
        assert set(part.tags.tolist()) == {"Frontal"}
        front = raw.labels[raw.tags == "Frontal"][:, columns]
        expected = np.where(front == UNCERTAIN, put, np.where(front == BLANK, 0, front))
        np.testing.assert_array_equal(part.labels, expected)
        assert bool(protocol.modified) == (policy != "peers")
    unknown = task.prepared(raw, task.protocol().override({"blank": "ignore", "views": "all"}))
    assert len(unknown) == len(raw)
    assert (unknown.labels == -1).any()
    valid = Chexpert().load(Chexpert().locate(worlds), "valid")
    valid.labels[0, columns] = UNCERTAIN  # the experts' labels are never guessed
    assert (task.prepared(valid, task.protocol()).labels[0] == -1).all()


def test_a_view_that_is_not_there_is_refused(ask, world):
    root = world("chexpert")
    for split in ("train", "valid"):
        file = Chexpert().locate(root) / f"{split}.csv"
        first, *lines = file.read_text().splitlines()
        file.write_text("\n".join([first, *(line.replace(",Lateral,", ",Frontal,") for line in lines)]) + "\n")
    with pytest.raises(DataError, match="has no lateral image"):
        ask("chexpert", root, settings={"views": "Lateral"})


def test_findings_that_the_test_images_lack_are_left_out_and_told(ask, world):
    root = world("chexpert")
    file = Chexpert().locate(root) / "valid.csv"
    first, *lines = file.read_text().splitlines()
    column = first.split(",").index("Edema")
    cells = [line.split(",") for line in lines]
    for row in cells:
        row[column] = "0.0"
    file.write_text("\n".join([first, *(",".join(row) for row in cells)]) + "\n")
    result = ask("chexpert", root)
    assert result.scores["auroc_edema"].value is None
    others = [
        result.scores[f"auroc_{n}"].value for n in ("atelectasis", "cardiomegaly", "consolidation", "pleural_effusion")
    ]
    assert result.scores["auroc"].value == pytest.approx(np.mean(others))
    assert "means over classes leave out 1 that valid does not tell apart: Edema" in result.warnings


# --- COVIDx and MURA --------------------------------------------------------------------------------------------


def test_another_version_of_covidx_is_named_by_its_splits(ask, world):
    root = world("covidx")
    for split in ("train", "test"):
        (root / "covidx" / f"{split}_COVIDx9A.txt").rename(root / "covidx" / f"{split}_COVIDx5.txt")
    with pytest.raises(DataError, match="has no list 'train 9A'") as told:
        ask("covidx", root)
    assert told.value.fix == "--set 'train_split=train 5' --set 'test_split=test 5'"
    result = ask("covidx", root, settings={"train_split": "train 5", "test_split": "test 5"})
    assert result.data["test"] == "covidx test 5"
    assert not result.ranked  # another protocol than the one of its name


def test_scores_are_told_by_source_and_part_of_the_body(ask, worlds):
    assert set(ask("covidx", worlds).details["top1_by_tag"]) == {"cohen", "rsna", "sirm"}
    parts = ask("mura", worlds).details["auroc_by_tag"]
    assert parts
    assert all(0 <= value <= 1 for value in parts.values())
    assert set(parts) <= {"ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST"}


def test_mura_joins_the_images_of_a_study(worlds):
    test = MuraData().load(MuraData().locate(worlds), "valid")
    scores = np.random.default_rng(0).normal(0, 3, (len(test), 2))
    studies = [study_of(name) for name in test.names.tolist()]
    names = sorted(set(studies))
    chances = softmax(scores, axis=1)
    of_study = np.array(
        [np.mean([c for c, s in zip(chances, studies, strict=True) if s == name], axis=0) for name in names]
    )
    joined, units = Mura().units(scores, "logits", test)
    np.testing.assert_allclose(np.exp(log_softmax(joined, axis=1)), of_study, rtol=1e-12)
    np.testing.assert_allclose(Mura().units(chances, "probabilities", test)[0], of_study)
    margins = np.array(
        [np.mean([c for c, s in zip(scores, studies, strict=True) if s == name], axis=0) for name in names]
    )
    np.testing.assert_allclose(Mura().units(scores, "margins", test)[0], margins)
    assert units.names.tolist() == names
    assert [("positive" in name) for name in names] == (units.labels == 1).tolist()
    assert all(group in name for group, name in zip(units.groups.tolist(), names, strict=True))


def test_mura_is_scored_by_study_and_resampled_by_patient(ask, worlds, tmp_path):
    result = ask("mura", worlds, protocol="linear", settings={"costs": "0.01"})
    kept, told = (arrays(result, tmp_path / "out", name) for name in ("samples", "predictions"))
    test = MuraData().load(MuraData().locate(worlds), "valid")
    studies = sorted({study_of(name) for name in test.names.tolist()})
    assert kept["ids"].tolist() == studies
    assert len(told["labels"]) == len(studies) < len(test)
    scores = margins(told)
    assert result.scores["auroc"].value == pytest.approx(roc_auc_score(told["labels"], scores[:, 1] - scores[:, 0]))
    assert len(set(kept["samples/group"].tolist())) == len(set(test.groups.tolist())) < len(studies)


# --- bad input --------------------------------------------------------------------------------------------------


def test_corrupt_and_missing_dicoms_are_counted_or_refused(ask, world, tmp_path):
    root = world("rsna")
    layout = Rsna()
    train, test = (layout.load(layout.locate(root), split) for split in ("train", "test"))
    train.pixels.path(3).write_bytes(b"x" * 500)
    test.pixels.path(1).unlink()
    refused = ask("rsna", root, strict=True, out=tmp_path / "strict")
    assert (refused.status, refused.error_code) == ("failed", 3)
    assert len(refused.error.splitlines()) == 3
    result = ask("rsna", root)
    assert (result.data["train_unreadable"], result.data["test_unreadable"]) == (1, 1)
    assert (result.data["train_images"], result.data["test_images"]) == (len(train) - 1, len(test) - 1)
    assert sum("cannot be read and are left out" in warning for warning in result.warnings) == 2


def test_missing_targets_are_counted_or_refused(ask, world):
    root = world("rsna")
    layout = Rsna()
    patient = layout.load(layout.locate(root), "test").groups[0]
    file = layout.locate(root) / "stage_2_train_labels.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line[:-1] if line.startswith(patient) else line for line in lines) + "\n")
    result = ask("rsna", root)
    assert result.data["test_unlabelled"] == 1
    assert "test: 1 images have no label and are left out" in result.warnings
    with pytest.raises(DataError, match="1 of 21 images of rsna test have no label"):
        ask("rsna", root, strict=True)


def test_a_class_with_one_image_is_told(ask, world):
    root = world("covidx")
    file = root / "covidx" / "train_COVIDx9A.txt"
    seen = 0
    kept = []
    for line in file.read_text().splitlines():
        seen += " COVID-19 " in line
        if " COVID-19 " not in line or seen == 1:
            kept.append(line)
    file.write_text("\n".join(kept) + "\n")
    result = ask("covidx", root)
    assert result.status == "ok"
    assert "1 classes have a single training image" in result.warnings


def test_work_that_starts_again_resumes_nothing(world, tmp_path):
    root = world("mura")
    part = MuraData().load(MuraData().locate(root), "train")
    part.pixels.path(2).write_bytes(b"broken")
    setup = types.SimpleNamespace(strict=False, work=tmp_path / "work", progress=Progress(quiet=True))
    setup.work.mkdir()
    found = []

    def work(data: ClassificationSet) -> Any:
        found.append((len(data), list(setup.work.iterdir())))
        (setup.work / "state").touch()
        for row in range(len(data)):
            _ = data[row]
        return "done"

    assert on_readable(work, setup, part) == "done"  # type: ignore[arg-type]
    assert found == [(len(part), []), (len(part) - 1, [])]


def test_the_command_line_counts_or_refuses(world, monkeypatch, capsys, tmp_path):
    root = world("mura")
    part = MuraData().load(MuraData().locate(root), "train")
    part.pixels.path(0).write_bytes(b"broken")
    command = ["evalsuite", "run", "-b", "random:timm:test_resnet.r160_in1k", "-t", "mura", "--protocol", "ridge",
               "--data-root", str(root), "-q"]  # fmt: skip
    monkeypatch.setenv("EVALSUITE_PLUGINS", "")
    codes = {}
    for flags in (["-o", str(tmp_path / "a")], ["-o", str(tmp_path / "b"), "--strict"]):
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        with pytest.raises(SystemExit) as left:
            main()
        codes["--strict" in flags] = int(left.value.code or 0), capsys.readouterr()
    assert codes[False][0] == 0
    assert "train: 1 images cannot be read and are left out" in codes[False][1].out
    assert codes[True][0] == 3
    assert codes[True][1].err.count("\n") == 3
    assert codes[True][1].err.startswith(f"error: 1 of {len(part)} images cannot be read")
