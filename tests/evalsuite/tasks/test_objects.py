"""The object tasks: what they promise by each protocol, what they refuse, and that the proxy ranks encoders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features, build
from evalsuite.errors import BackboneError
from evalsuite.hooks import load
from evalsuite.progress import Progress
from evalsuite.task import Outcome, Protocol, Setup, evaluate
from evalsuite.tasks.objects import ObjectComparison, ObjectGoal, ObjectInteraction, PropertyComparison

TASKS = (ObjectGoal, ObjectInteraction, ObjectComparison, PropertyComparison)
REGISTRY = load().registry


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Features:
        return Features(pooled=x.mean(dim=(2, 3)))


def mean_colour() -> Backbone:
    return Backbone(
        _Mean(), BackboneSpec("test:mean", dim=3, strides={}, gives=frozenset({"pooled"}), image_size=(64, 64))
    )


def measure(task, backbone: Backbone, work: Path, protocol: Protocol, **named: object) -> Outcome:
    work.mkdir(exist_ok=True)
    setup = Setup(protocol=protocol, work=work, registry=REGISTRY, progress=Progress(quiet=True), **named)
    return evaluate(task, backbone, setup)


@pytest.mark.parametrize("task", TASKS)
def test_the_papers_recipe_is_the_default(task: type):
    protocol = task().protocol()
    assert protocol.id == "ppo-2m"
    assert (protocol.steps, protocol.environments, protocol.rollout, protocol.batch_size) == (2_000_000, 4, 512, 32)
    assert (protocol.lr, protocol.discount, protocol.smoothing, protocol.clip) == (3e-4, 0.99, 0.95, 0.2)
    assert (protocol.entropy, protocol.value, protocol.epochs, protocol.clip_gradient) == (0.01, 0.5, 10, 0.5)
    assert (protocol.test_every, protocol.curve_episodes, protocol.time_limit_is_terminal) == (4000, 100, True)
    assert "ocr-color1" in protocol.unseen


def test_play_brings_scores_intervals_a_curve_and_a_film(tmp_path: Path):
    task = ObjectGoal()
    protocol = dataclasses.replace(
        task.protocol("ppo-short"), steps=128, environments=2, rollout=32, batch_size=32, epochs=1, pooling="relation",
        test_every=64, curve_episodes=3, test_episodes=5, unseen=("objects-1", "ocr-color1"),
    )  # fmt: skip
    found = measure(task, build("objects:state", REGISTRY), tmp_path, protocol)
    assert set(found.scores) == {"success", "area", "generalisation"}
    assert found.scores["success"] == found.samples["success"].mean()
    assert set(found.replicates) == {"success", "generalisation"}
    assert set(found.details["success_by_variant"]) == {"default", "objects-1", "ocr-color1"}
    steps = [point["steps"] for point in found.details["curve"]]
    assert steps == [0, 64, 128]
    with Image.open(found.figures["episode"]) as film:
        assert film.size == (256, 256)
    with Image.open(found.figures["curve"]) as picture:
        assert picture.format == "PNG"


def test_the_area_is_the_mean_success_over_steps():
    from evalsuite.tasks.objects import _area

    curve = [{"steps": 0.0, "success": 0.0}, {"steps": 10.0, "success": 1.0}, {"steps": 30.0, "success": 1.0}]
    assert _area(curve) == pytest.approx((5 + 20) / 30)


@pytest.mark.parametrize("task", TASKS)
def test_the_proxy_promises_other_metrics_and_says_so(task: type, tmp_path: Path):
    protocol = dataclasses.replace(task().protocol("proxy"), epochs=1)
    assert task().leading(protocol) == "accuracy"
    found = measure(task(), mean_colour(), tmp_path, protocol, limit=64)
    assert set(found.scores) == {"accuracy", "generalisation"}
    assert "no agent" in found.details["proxy"]
    assert found.details["encoded"] == 64 * (2 + len(protocol.unseen))


def test_the_proxy_ranks_the_ground_truth_above_a_mean_colour(tmp_path: Path):
    task = ObjectGoal()
    protocol = dataclasses.replace(
        task.protocol("proxy"), train_images=1500, test_images=400, epochs=6, lr=1e-3, pooling="relation", unseen=()
    )
    truth = measure(task, build("objects:state", REGISTRY), tmp_path / "a", protocol)
    vector = dataclasses.replace(protocol, pooling="mlp")
    blind = measure(task, mean_colour(), tmp_path / "b", vector)
    assert truth.scores["accuracy"] > 0.6
    assert blind.scores["accuracy"] < 0.45
    assert truth.scores["generalisation"] is None


def test_all_seeds_are_tested_on_the_same_frames(tmp_path: Path):
    task = PropertyComparison()
    protocol = dataclasses.replace(task.protocol("proxy"), epochs=1, unseen=())
    runs = [measure(task, mean_colour(), tmp_path / str(s), protocol, limit=64, seed=s) for s in (0, 1)]
    assert runs[0].ids == runs[1].ids
    assert runs[0].data["fingerprint"] == runs[1].data["fingerprint"]


def test_other_rules_are_other_data(tmp_path: Path):
    def fingerprint(task, **changes: object) -> str:
        protocol = dataclasses.replace(task.protocol("proxy"), **changes)
        return task.fingerprint(
            Setup(protocol=protocol, work=tmp_path, registry=REGISTRY, progress=Progress(quiet=True))
        )

    found = {
        fingerprint(ObjectGoal()), fingerprint(ObjectGoal(), variant="objects-1"), fingerprint(ObjectGoal(), unseen=()),
        fingerprint(PropertyComparison()),
    }  # fmt: skip
    assert len(found) == 4


def test_a_backbone_without_vectors_is_refused():
    spec = BackboneSpec("test:maps", dim=3, strides={4: 3}, gives=frozenset({"maps"}))
    with pytest.raises(BackboneError, match="needs tokens or pooled"):
        ObjectGoal().refuse(Backbone(nn.Identity(), spec), ObjectGoal().protocol())
    protocol = dataclasses.replace(ObjectGoal().protocol("proxy"), reads="tokens")
    with pytest.raises(BackboneError, match="needs tokens"):
        ObjectGoal().refuse(mean_colour(), protocol)


def test_quadrants_are_all_there():
    from evalsuite.poolings import Encoder
    from evalsuite.tasks.objects import _frames

    encoder = Encoder(mean_colour(), torch.device("cpu"))
    for task in TASKS:
        _, labels = _frames(task.name, "default", 200, 0, encoder)
        assert np.bincount(labels, minlength=4).min() > 25
