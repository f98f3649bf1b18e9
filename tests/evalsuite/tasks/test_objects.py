"""The object tasks: what they promise by each protocol, what they refuse, and that the proxy ranks encoders."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features, build
from evalsuite.errors import BackboneError, Refusal, ResourceError, UsageError
from evalsuite.hooks import load
from evalsuite.progress import Progress
from evalsuite.protocols import AgentProtocol, Arena, Played
from evalsuite.runner import run
from evalsuite.statistics import iqm
from evalsuite.task import Outcome, Protocol, Setup, evaluate
from evalsuite.tasks import objects
from evalsuite.tasks.objects import (
    ObjectCentric,
    ObjectComparison,
    ObjectGoal,
    ObjectInteraction,
    ObjectReaching,
    PropertyComparison,
)
from evalsuite.worlds import reaching

TASKS = (ObjectGoal, ObjectInteraction, ObjectComparison, PropertyComparison)
REGISTRY = load().registry


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Features:
        return Features(pooled=x.mean(dim=(2, 3)))


def mean_colour() -> Backbone:
    return Backbone(
        _Mean(), BackboneSpec("test:mean", dim=3, strides={}, gives=frozenset({"pooled"}), image_size=(64, 64))
    )


def measure(
    task, backbone: Backbone, work: Path, protocol: Protocol, registry: object = REGISTRY, **named: object
) -> Outcome:
    work.mkdir(exist_ok=True)
    setup = Setup(protocol=protocol, work=work, registry=registry, progress=Progress(quiet=True), **named)
    return evaluate(task, backbone, setup)


def truth() -> Backbone:
    return build("objects:state", REGISTRY)


@pytest.mark.parametrize("task", TASKS)
def test_the_papers_recipe_is_the_default(task: type):
    protocol = task().protocol()
    assert protocol.id == "ppo-2m"
    assert (protocol.steps, protocol.environments, protocol.rollout, protocol.batch_size) == (2_000_000, 4, 512, 32)
    assert (protocol.lr, protocol.discount, protocol.smoothing, protocol.clip) == (3e-4, 0.99, 0.95, 0.2)
    assert (protocol.entropy, protocol.value, protocol.epochs, protocol.clip_gradient) == (0.01, 0.5, 10, 0.5)
    assert (protocol.test_every, protocol.curve_episodes, protocol.time_limit_is_terminal) == (4000, 100, True)
    assert "ocr-color1" in protocol.unseen


def test_the_papers_recipe_for_reaching_learns_more_slowly():
    protocol = ObjectReaching().protocol()
    assert (protocol.lr, protocol.clip, protocol.entropy, protocol.steps) == (5e-5, 0.1, 0.0, 2_000_000)
    assert (protocol.environments, protocol.rollout, protocol.value) == (4, 512, 0.5)


@pytest.mark.parametrize("task", [ObjectGoal, ObjectReaching])
def test_play_brings_scores_intervals_a_curve_and_a_film(task: type, tmp_path: Path, request: pytest.FixtureRequest):
    if task is ObjectReaching:
        request.getfixturevalue("pictures")
    task = task()
    unseen = ("objects-1", task.protocol().unseen[0])
    protocol = dataclasses.replace(
        task.protocol("ppo-short"), steps=128, environments=2, rollout=32, batch_size=32, epochs=1, pooling="relation",
        test_every=64, curve_episodes=3, test_episodes=5, unseen=unseen,
    )  # fmt: skip
    found = measure(task, truth(), tmp_path, protocol)
    assert set(found.scores) == {"success", "area", "generalisation"}
    assert found.scores["success"] == found.samples["success"].mean()
    assert set(found.replicates) == {"success", "generalisation"}
    assert set(found.details["success_by_variant"]) == {"default", *unseen}
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


@pytest.mark.parametrize("task", [*TASKS, ObjectReaching])
def test_the_proxy_promises_other_metrics_and_says_so(task: type, tmp_path: Path):
    protocol = dataclasses.replace(task().protocol("proxy"), epochs=1)
    assert task().leading(protocol) == "accuracy"
    found = measure(task(), truth() if task is ObjectReaching else mean_colour(), tmp_path, protocol, limit=64)
    assert set(found.scores) == {"accuracy", "generalisation"}
    assert "no agent" in found.details["proxy"]
    assert found.details["encoded"] == 64 * (2 + len(protocol.unseen))


def test_the_proxy_ranks_the_ground_truth_above_a_mean_colour(tmp_path: Path):
    task = ObjectGoal()
    protocol = dataclasses.replace(
        task.protocol("proxy"), train_images=1500, test_images=400, epochs=6, lr=1e-3, pooling="relation", unseen=()
    )
    seeing = measure(task, truth(), tmp_path / "a", protocol)
    vector = dataclasses.replace(protocol, pooling="mlp")
    blind = measure(task, mean_colour(), tmp_path / "b", vector)
    assert seeing.scores["accuracy"] > 0.6
    assert blind.scores["accuracy"] < 0.45
    assert seeing.scores["generalisation"] is None


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
    from evalsuite.features.poolings import ObservationEncoder
    from evalsuite.tasks.objects import _frames

    encoder = ObservationEncoder(truth(), torch.device("cpu"))
    for task in (*TASKS, ObjectReaching):
        _, labels = _frames(task.name, "default", 200, 0, encoder)
        assert np.bincount(labels, minlength=4).min() > 25


# --- the benchmark ----------------------------------------------------------------------------------------------


class Player:
    """An engine whose agents succeed as often as a table says, and which may be told to die."""

    def __init__(self, rates: dict[str, tuple[float, ...]], seeds: tuple[int, ...], dies: int = -1) -> None:
        self.rates, self.seeds, self.left, self.played = rates, seeds, dies, list[tuple[str, int]]()

    def get(self, shelf: str, name: str):  # type: ignore[no-untyped-def]  # the registry it stands in for
        assert (shelf, name) == ("engine", "sb3")
        return lambda: self

    def play(self, backbone: Backbone, protocol: AgentProtocol, arena: Arena, setup: Setup) -> Played:
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        self.played.append((arena.task, setup.seed))
        rate = self.rates[arena.task][self.seeds.index(setup.seed)]
        won = np.arange(protocol.test_episodes) < round(rate * protocol.test_episodes)
        curve = [{"steps": s, "success": rate * s / 10, "return": 0.0, "length": 5.0} for s in (0.0, 5.0, 10.0)]
        film = np.zeros((2, 8, 8, 3), np.uint8)
        names = (protocol.variant, *protocol.unseen)
        lengths = np.full(len(won), 5)
        return Played(dict.fromkeys(names, won), dict.fromkeys(names, lengths), curve, film, {"train": 1.0}, {"x": 1})


RATES = {
    "object-goal": (0.9, 1.0, 0.8), "object-interaction": (0.1, 0.0, 0.2), "object-comparison": (0.5, 0.7, 0.6),
    "property-comparison": (0.3, 0.3, 0.3), "object-reaching": (0.4, 1.0, 0.1),
}  # fmt: skip
SEEDS = (1234, 2345, 3456)


def suite(**settings: object) -> Protocol:
    return (
        ObjectCentric()
        .protocol("ppo-short")
        .override(
            {"runs": "3", "test_episodes": "10", "unseen": "objects-3"} | {k: str(v) for k, v in settings.items()}
        )
    )


def test_the_benchmark_is_five_tasks_three_agents_and_the_papers_seeds(tmp_path: Path):
    assert ObjectCentric().protocol().runs == 3
    player = Player(RATES, SEEDS)
    found = measure(ObjectCentric(), truth(), tmp_path, suite(), registry=player, seed=1234)
    assert player.played == [(name, seed) for name in RATES for seed in SEEDS]
    table = np.array(list(RATES.values())).T
    assert found.scores["success"] == pytest.approx(table.mean())
    assert found.scores["iqm"] == pytest.approx(iqm(table))
    assert found.scores["area"] == pytest.approx(table.mean() / 2)
    assert found.scores["generalisation"] == pytest.approx(table.mean())
    for name, rates in RATES.items():
        assert found.scores[name] == pytest.approx(np.mean(rates))
    low, high = np.quantile(found.replicates["iqm"], (0.025, 0.975))
    assert low < found.scores["iqm"] < high
    assert np.std(found.replicates["success"]) < np.std(found.replicates["object-reaching"]) / 2
    assert found.ids[10:12] == ["object-goal/run-1/episode-0", "object-goal/run-1/episode-1"]
    assert found.samples["group"].tolist() == np.repeat(np.arange(15), 10).tolist()
    assert {path.suffix for path in found.figures.values()} == {".png", ".gif"}
    assert all(path.exists() for path in found.figures.values())


def test_killed_in_its_third_task_it_does_not_redo_the_first_two(tmp_path: Path):
    once = suite(runs=1)
    whole = measure(ObjectCentric(), truth(), tmp_path / "a", once, registry=Player(RATES, SEEDS), seed=1234)
    killed = Player(RATES, SEEDS, dies=2)
    with pytest.raises(KeyboardInterrupt):
        measure(ObjectCentric(), truth(), tmp_path / "b", once, registry=killed, seed=1234)
    assert [name for name, _ in killed.played] == ["object-goal", "object-interaction"]
    rest = Player(RATES, SEEDS)
    again = measure(ObjectCentric(), truth(), tmp_path / "b", once, registry=rest, seed=1234)
    assert [name for name, _ in rest.played] == ["object-comparison", "property-comparison", "object-reaching"]
    assert again.scores == whole.scores
    assert again.ids == whole.ids
    assert all(np.array_equal(again.replicates[name], whole.replicates[name]) for name in whole.replicates)
    other = Player(RATES, SEEDS)
    measure(ObjectCentric(), truth(), tmp_path / "b", suite(runs=1, lr=1e-3), registry=other, seed=1234)
    assert len(other.played) == 5  # what another recipe found does not count


def test_one_agent_is_the_task_alone_and_has_no_interval_over_agents(tmp_path: Path):
    protocol = suite(runs=1, tasks="object-goal", test_episodes=4, steps=64, environments=2, rollout=32, epochs=1,
                     pooling="relation", curve_episodes=2)  # fmt: skip
    both = measure(ObjectCentric(), truth(), tmp_path / "a", protocol, seed=3)
    alone = measure(ObjectGoal(), truth(), tmp_path / "b", protocol.parts()["object-goal"], seed=3)
    assert set(both.scores) == {"success", "iqm", "area", "generalisation", "object-goal"}
    assert both.scores["success"] == both.scores["iqm"] == alone.scores["success"]
    assert both.scores["area"] == alone.scores["area"]
    assert "iqm" not in both.replicates
    assert np.array_equal(both.replicates["success"], alone.replicates["success"])


def test_settings_reach_every_task_and_move_the_hash():
    plain = ObjectCentric().protocol("ppo-short")
    changed = plain.override({"lr": "0.001", "tasks": "object-goal,object-reaching"})
    assert changed.modified == ("lr", "tasks")
    assert {part.lr for part in changed.parts().values()} == {0.001}
    assert list(changed.parts()) == ["object-goal", "object-reaching"]
    assert len({plain.hash, changed.hash, plain.override({"runs": "2"}).hash}) == 3
    assert plain.override({"runs": "1"}).hash == plain.hash
    assert changed.parts()["object-reaching"].clip == 0.1
    assert changed.recipes[1] == f"object-reaching@{changed.parts()['object-reaching'].hash}"
    assert plain.parts()["object-reaching"] == ObjectReaching().protocol("ppo-short")


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"tasks": "object-gaol"}, "it has the tasks object-goal"),
        ({"runs": "0"}, "at least one run"),
        ({"gravity": "1"}, "known: "),
    ],
)
def test_settings_that_make_no_benchmark_are_refused(settings: dict[str, str], cause: str):
    with pytest.raises(UsageError, match=cause):
        ObjectCentric().protocol().override(settings)


def test_the_benchmark_by_proxy(tmp_path: Path):
    protocol = ObjectCentric().protocol("proxy").override({"epochs": "1", "unseen": "objects-3", "runs": "2"})
    found = measure(ObjectCentric(), truth(), tmp_path, protocol, limit=32)
    assert set(found.scores) == {"accuracy", "iqm", "generalisation", *RATES}
    assert found.figures == {}


def test_the_rules_of_all_its_tasks_are_its_data(tmp_path: Path):
    def fingerprint(protocol: Protocol) -> str:
        progress = Progress(quiet=True)
        setup = Setup(protocol=protocol, work=tmp_path, registry=REGISTRY, progress=progress)
        return ObjectCentric().fingerprint(setup)

    found = {fingerprint(suite()), fingerprint(suite(variant="objects-3")), fingerprint(suite(tasks="object-goal"))}
    assert len(found) == 3


# --- what is missing --------------------------------------------------------------------------------------------


def test_without_mujoco_the_four_other_tasks_are_named(monkeypatch: pytest.MonkeyPatch):
    objects._try_simulator.cache_clear()
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ResourceError, match="object-reaching needs mujoco") as refused:
        ObjectCentric().refuse(truth(), ObjectCentric().protocol())
    assert refused.value.fix.endswith(
        "--set tasks=object-goal,object-interaction,object-comparison,property-comparison"
    )
    assert refused.value.code == 7
    ObjectCentric().refuse(truth(), suite(tasks="object-goal,property-comparison"))


def test_without_opengl_only_what_needs_pictures_is_refused(monkeypatch: pytest.MonkeyPatch):
    def none(model: object, size: int) -> None:
        raise ResourceError("no picture", cause="no OpenGL", fix="libosmesa6")

    objects._try_simulator.cache_clear()
    monkeypatch.setattr(reaching, "_contexts", none)
    reaching._painter.cache_clear()
    ObjectReaching().refuse(truth(), ObjectReaching().protocol())
    with pytest.raises(ResourceError, match="no picture"):
        ObjectReaching().refuse(mean_colour(), ObjectReaching().protocol())


@pytest.mark.parametrize(
    ("settings", "message", "code"),
    [
        ({"variant": "ocr-color9"}, "object-goal has no variant 'ocr-color9'", 2),
        ({"unseen": "objects-9"}, "object-goal has no variant 'objects-9'", 2),
        ({"reads": "pooled"}, r"needs pooled, which objects:state does not give(.|\n)*leave out --set reads", 4),
        ({"batch_size": "48"}, "no whole number of minibatches", 2),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_it_runs(
    settings: dict[str, str], message: str, code: int, tmp_path: Path
):
    with pytest.raises(Refusal, match=message) as refused:
        run("objects:state", "object-goal", settings=settings, out=tmp_path)
    assert refused.value.code == code
    assert len(str(refused.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("settings", "missing", "message", "code"),
    [
        ({"pooling": "cnn-linear"}, (), "cnn-linear cannot pool 5 tokens", 2),
        ({}, ("stable_baselines3",), "engine 'sb3' needs stable_baselines3", 7),
    ],
)
def test_a_run_that_fails_says_why_in_three_lines(
    settings: dict[str, str], missing: tuple[str, ...], message: str, code: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    for name in missing:
        monkeypatch.delitem(sys.modules, "evalsuite.engines.sb3", raising=False)
        monkeypatch.setitem(sys.modules, name, None)
    (found,) = run("objects:state", "object-goal", protocol="ppo-short", settings=settings, out=tmp_path)
    assert found.status == "failed"
    assert found.error_code == code
    assert message in found.error
    assert len(found.error.splitlines()) == 3


PUBLISHED = {  # results name them: a field that moves between classes must not change one
    "object-comparison@ppo-2m": "c6cfaa205c89bb4a",
    "object-comparison@ppo-short": "e4231784131f4447",
    "object-comparison@proxy": "f308b565fb13192e",
    "object-goal@ppo-2m": "4cbb21d3c99d151f",
    "object-goal@ppo-short": "a24810a6bc1879cf",
    "object-goal@proxy": "b3ed045b0aaf2b8e",
    "object-interaction@ppo-2m": "71891cabcf9fbb39",
    "object-interaction@ppo-short": "eba9adaf44f0ffb9",
    "object-interaction@proxy": "b3ed045b0aaf2b8e",
    "object-reaching@ppo-2m": "1c8e11101f53435d",
    "object-reaching@ppo-short": "e0aa3332622ea4b4",
    "object-reaching@proxy": "a597f5e8e5b81f2a",
    "ocrl@ppo-2m": "2b390a30e6970b81",
    "ocrl@ppo-short": "63a7b96db6bf1867",
    "ocrl@proxy": "12cc3831613d5caa",
    "property-comparison@ppo-2m": "c6cfaa205c89bb4a",
    "property-comparison@ppo-short": "e4231784131f4447",
    "property-comparison@proxy": "f308b565fb13192e",
}


def test_published_agents_keep_their_hashes():
    tasks = (*(task() for task in TASKS), ObjectReaching(), ObjectCentric())
    assert {f"{task.name}@{p.id}": p.hash for task in tasks for p in task.protocols} == PUBLISHED
