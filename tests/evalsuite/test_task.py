from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.errors import BackboneError, DataError, PluginError, UsageError
from evalsuite.hooks import Registry
from evalsuite.progress import Progress
from evalsuite.protocols import DetectionProtocol
from evalsuite.task import Metric, Outcome, Protocol, Setup, Task, evaluate


@dataclass(frozen=True, kw_only=True)
class Recipe(Protocol):
    lr: float = 0.1
    steps: int = 5
    sizes: tuple[int, ...] = (1, 2)
    name: str = "x"
    flip: bool = True
    clip: float | None = None
    norm: Literal["BN"] | None = None
    words: tuple[str, ...] = ("a",)


RECIPE = Recipe(id="r", version=1)


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({"lr": "1"}, "lr", 1.0),
        ({"lr": "3e-2"}, "lr", 0.03),
        ({"steps": "7"}, "steps", 7),
        ({"sizes": "3,4,5"}, "sizes", (3, 4, 5)),
        ({"sizes": "[3]"}, "sizes", (3,)),
        ({"name": "07+12"}, "name", "07+12"),
        ({"flip": "false"}, "flip", False),
        ({"clip": "2.5"}, "clip", 2.5),
        ({"norm": "BN"}, "norm", "BN"),
        ({"words": "pooled"}, "words", ("pooled",)),
        ({"words": "pooled, layer:a.b/max6"}, "words", ("pooled", "layer:a.b/max6")),
        ({"words": "3,4"}, "words", ("3", "4")),
        ({"words": '["a,b"]'}, "words", ("a,b",)),
        ({"words": '"a,b","c"'}, "words", ("a,b", "c")),
    ],
)
def test_override_reads_each_field_as_its_type(settings, field, value):
    changed = RECIPE.override(settings)
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)
    assert changed.modified == (field,)
    assert changed.hash != RECIPE.hash


def test_overriding_by_the_same_value_modifies_nothing():
    assert RECIPE.override({"lr": "0.1"}) == RECIPE


@pytest.mark.parametrize(
    "settings", [{"lr": "fast"}, {"steps": "1.5"}, {"flip": "1"}, {"lr": "null"}, {"steps": "true"}, {"norm": "GN"}]
)
def test_override_refuses_values_of_another_type(settings):
    with pytest.raises(UsageError, match="cannot be read"):
        RECIPE.override(settings)


def test_override_refuses_unknown_fields_with_the_nearest():
    with pytest.raises(UsageError) as refusal:
        RECIPE.override({"step": "3"})
    assert "did you mean 'steps'" in str(refusal.value)


@pytest.mark.parametrize("field", ["id", "version", "modified", "ranked"])
def test_the_name_of_a_protocol_cannot_be_overridden(field):
    with pytest.raises(UsageError):
        RECIPE.override({field: "2"})


def test_every_field_moves_the_hash():
    other = {
        "lr": 0.2,
        "steps": 6,
        "sizes": (1,),
        "name": "y",
        "flip": False,
        "clip": 1.0,
        "id": "q",
        "version": 2,
    }
    hashes = {dataclasses.replace(RECIPE, **{k: v}).hash for k, v in other.items()} | {RECIPE.hash}
    assert len(hashes) == len(other) + 1
    assert dataclasses.replace(RECIPE, ranked=False).hash == RECIPE.hash


def test_a_schedule_warms_up_then_steps_down():
    protocol = DetectionProtocol(
        id="p", version=1, model="fpn", train_split="a", test_split="b", iterations=100, batch_size=2,
        lr=1.0, warmup_iterations=10, warmup_factor=0.1, milestones=(50, 80),
    )  # fmt: skip
    rates = [protocol.lr_factor(i) for i in (0, 5, 10, 49, 50, 79, 80)]
    assert rates == pytest.approx([0.1, 0.55, 1.0, 1.0, 0.1, 0.1, 0.01])


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> Features:
        return Features(pooled=self.norm(x).mean((2, 3)))


class Mean(Task):
    name = "mean"
    metrics = (Metric("mean"),)
    primary = "mean"
    needs = frozenset({"pooled"})
    protocols = (RECIPE,)
    answer: dict[str, float | None] | None = None

    def fingerprint(self, setup: Setup) -> str:
        return "none"

    def run(self, backbone: Backbone, setup: Setup) -> Outcome:
        pixels = torch.from_numpy(setup.rng.random((4, 3, 8, 8), np.float32))
        with torch.no_grad():
            value = float(backbone(pixels).pooled.mean())
        return Outcome(scores={"mean": value} if self.answer is None else self.answer, data={"fingerprint": "none"})


@pytest.fixture
def backbone() -> Backbone:
    return Backbone(Net(), BackboneSpec(arch="net", dim=3, strides={}, gives=frozenset({"pooled"})))


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(protocol=RECIPE, work=tmp_path, registry=Registry(), progress=Progress(quiet=True))


def test_a_protocol_of_another_type_does_not_reach_a_task(backbone, setup):
    other = DetectionProtocol(
        id="d", version=1, model="fpn", train_split="a", test_split="b", iterations=1, batch_size=1, lr=1.0
    )  # fmt: skip
    with pytest.raises(PluginError, match="task 'mean' was given protocol 'd'") as refusal:
        evaluate(Mean(), backbone, setup.by(other))
    assert refusal.value.cause == "it is a DetectionProtocol, no Recipe"
    assert refusal.value.fix.endswith("of the names r")

    @dataclass(frozen=True, kw_only=True)
    class Longer(Recipe):
        more: int = 1

    assert evaluate(Mean(), backbone, setup.by(Longer(id="l", version=1), seed=3)).scores["mean"] is not None


def test_evaluating_leaves_the_backbone_as_it_was(backbone, setup):
    backbone.train()
    identity = backbone.identity
    first = evaluate(Mean(), backbone, setup)
    assert backbone.training
    assert backbone.identity == identity
    assert evaluate(Mean(), backbone, setup).scores == first.scores


def test_a_backbone_that_lacks_what_is_needed_is_refused_before_any_work(backbone, setup):
    task = Mean()
    task.needs = frozenset({"maps"})
    task.run = lambda *_: pytest.fail("it ran")
    with pytest.raises(BackboneError, match="mean by r needs maps, which net does not give"):
        evaluate(task, backbone, setup)


@pytest.mark.parametrize("answer", [{}, {"mean": 1.0, "more": 1.0}, {"mean": float("nan")}, {"mean": float("inf")}])
def test_a_task_is_held_to_its_promise(backbone, setup, answer):
    task = Mean()
    task.answer = answer
    with pytest.raises(PluginError):
        evaluate(task, backbone, setup)


def test_a_result_without_the_score_that_counts_is_refused(backbone, setup):
    task = Mean()
    task.answer = {"mean": None}
    with pytest.raises(DataError, match="mean cannot be scored: mean has no value") as told:
        evaluate(task, backbone, setup)
    assert "data verify" in told.value.fix


def test_a_metric_without_a_value_is_a_warning_that_says_why(backbone, setup):
    task = Mean()
    small = "no image is small"
    task.metrics = (Metric("mean"), Metric("a", undefined=small), Metric("b"), Metric("c", undefined=small))
    task.answer = {"mean": 0.5, "a": None, "b": 1.0, "c": None}
    outcome = evaluate(task, backbone, setup)
    assert outcome.scores == task.answer
    assert outcome.warnings == (f"a, c have no value: {small}",)
