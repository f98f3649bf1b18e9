"""The agent: one encoding an observation, the same numbers after a kill, tests that pair, and learning at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.engines.sb3 import StableBaselines3
from evalsuite.errors import UsageError
from evalsuite.hooks import load
from evalsuite.preflight import TooLarge
from evalsuite.progress import Meter, Progress
from evalsuite.protocols import AgentProtocol, Played
from evalsuite.task import Setup
from evalsuite.worlds import ObjectsVector

TINY = AgentProtocol(
    id="tiny", version=1, steps=192, environments=2, rollout=32, batch_size=16, epochs=2, pooling="mlp", lr=1e-3,
    test_every=64, curve_episodes=4, test_episodes=6, variant="objects-1", encode_size=32,
)  # fmt: skip


class Arena:
    def make(self, count: int, variant: str, observation: str) -> ObjectsVector:
        return ObjectsVector(count, "object-goal", variant, observation, steps=20, time_limit_is_terminal=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Features:
        return Features(tokens=self.norm(self.conv(x)).flatten(2).transpose(1, 2))


def encoder() -> Backbone:
    torch.manual_seed(0)
    spec = BackboneSpec(arch="test:net", dim=4, strides={}, gives=frozenset({"tokens"}), image_size=(64, 64))
    return Backbone(Net(), spec).eval()


def setup(work: Path, protocol: AgentProtocol, progress: Progress | None = None) -> Setup:
    work.mkdir(exist_ok=True)
    return Setup(
        protocol=protocol,
        work=work,
        registry=load().registry,
        progress=progress or Progress(quiet=True),
        save_every=0.0,
    )


def play(work: Path, protocol: AgentProtocol = TINY, progress: Progress | None = None) -> Played:
    torch.manual_seed(0)
    return StableBaselines3().play(encoder(), protocol, Arena(), setup(work, protocol, progress))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play(tmp_path_factory.mktemp("whole"))


def test_an_observation_is_encoded_once(whole: Played):
    assert [point["steps"] for point in whole.curve] == [0, 64, 128, 192]
    assert whole.details["encoded"] == whole.details["steps"] == 192


def test_what_is_brought_back(whole: Played):
    assert whole.successes["objects-1"].shape == (6,)
    assert (whole.lengths["objects-1"] <= 20).all()
    assert whole.film.shape[1:] == (64, 64, 3)
    assert 1 <= len(whole.film) <= 20
    assert all(0 <= point["success"] <= 1 for point in whole.curve)


class _Killed(Progress):
    """Dies after so many updates, as by kill -9; or is told to stop."""

    def __init__(self, after: int, how: str) -> None:
        super().__init__(quiet=True)
        self.after, self.how = after, how

    def track(self, what: str, total: int, done: int = 0):  # type: ignore[no-untyped-def]
        outer = self

        class Count(Meter):
            def update(self, done: int, **numbers: float) -> None:
                outer.after -= 1
                if outer.after == 0 and outer.how == "kill":
                    raise KeyboardInterrupt
                if outer.after == 0:
                    os.kill(os.getpid(), signal.SIGUSR1)

        return contextlib.nullcontext(Count())


@pytest.mark.parametrize("how", ["kill", "told"])
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(tmp_path: Path, whole: Played, how: str):
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises((KeyboardInterrupt, SystemExit)) as stop:
        play(tmp_path, progress=_Killed(2, how))
    if how == "told":
        assert stop.value.code == 138
    assert (tmp_path / "agent.pt").exists()
    again = play(tmp_path)
    assert again.curve == whole.curve
    assert np.array_equal(again.successes["objects-1"], whole.successes["objects-1"])
    assert np.array_equal(again.film, whole.film)


def test_a_game_of_years_is_refused_before_its_first_step(tmp_path: Path):
    with pytest.raises(TooLarge, match="an agent by tiny would take about") as refusal:
        play(tmp_path, dataclasses.replace(TINY, steps=10**11))
    assert refusal.value.fix.startswith("--set steps=")


class Finger:
    def make(self, count: int, variant: str, observation: str) -> ObjectsVector:
        return ObjectsVector(count, "object-reaching", variant, observation, steps=20, time_limit_is_terminal=True)


@pytest.mark.usefixtures("pictures")
def test_actions_may_be_numbers_in_a_range_and_a_killed_run_goes_on_to_the_same(tmp_path: Path):
    from evalsuite_objects.zoo import build

    def reach(work: Path, progress: Progress | None = None) -> Played:
        return StableBaselines3().play(build("state").eval(), protocol, Finger(), setup(work, protocol, progress))

    protocol = dataclasses.replace(TINY, pooling="relation", unseen=("objects-2",))
    whole = reach(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        reach(tmp_path / "killed", _Killed(2, "kill"))
    again = reach(tmp_path / "killed")
    assert again.curve == whole.curve
    assert all(np.array_equal(again.successes[name], whole.successes[name]) for name in ("objects-1", "objects-2"))
    policy = torch.load(tmp_path / "whole" / "agent.pt", weights_only=True)["policy"]
    assert policy["log_std"].shape == (3,)
    assert policy["log_std"].abs().max() > 0


def test_a_state_of_another_run_is_not_taken_up(tmp_path: Path, whole: Played):
    other = dataclasses.replace(TINY, lr=5e-3)
    play(tmp_path, other)
    assert play(tmp_path).curve == whole.curve


def test_fine_tuning_begins_at_the_encoder_and_leaves_it_alone(tmp_path: Path):
    protocol = dataclasses.replace(TINY, fine_tune=True, steps=64)
    backbone = encoder()
    before = backbone.identity
    found = StableBaselines3().play(backbone, protocol, Arena(), setup(tmp_path, protocol))
    assert backbone.identity == before
    state = torch.load(tmp_path / "agent.pt", weights_only=True)["policy"]
    trained = {
        k.split("trained.net.")[1]: v for k, v in state.items() if k.startswith("features_extractor.trained.net")
    }
    own = backbone.net.state_dict()
    assert set(trained) == set(own)
    drift = (trained["conv.weight"] - own["conv.weight"]).abs().max()
    assert 0 < drift < 0.1  # trained from there, not from an orthogonal draw
    assert torch.equal(trained["norm.running_mean"], own["norm.running_mean"])
    assert found.details["policy_parameters"] > sum(p.numel() for p in backbone.parameters())


def test_an_encoder_is_not_trained_in_half_precision(tmp_path: Path):
    """float16 needs its loss scaled, which stable-baselines3 does not."""
    protocol = dataclasses.replace(TINY, fine_tune=True)
    given = dataclasses.replace(setup(tmp_path, protocol), precision="16-mixed")
    with pytest.raises(UsageError, match="does not train its encoder in precision 16-mixed"):
        StableBaselines3().play(encoder(), protocol, Arena(), given)


def test_a_pooling_of_fixed_width_cannot_be_tested_on_more_objects(tmp_path: Path):
    from evalsuite_objects.zoo import build

    protocol = dataclasses.replace(TINY, unseen=("objects-2",))
    with pytest.raises(UsageError, match="cannot be tested on objects-2"):
        StableBaselines3().play(build("state").eval(), protocol, Arena(), setup(tmp_path, protocol))


def test_a_pooling_of_sets_can(tmp_path: Path):
    from evalsuite_objects.zoo import build

    protocol = dataclasses.replace(TINY, unseen=("objects-2",), pooling="relation", steps=64)
    found = StableBaselines3().play(build("state").eval(), protocol, Arena(), setup(tmp_path, protocol))
    assert set(found.successes) == {"objects-1", "objects-2"}


def test_the_process_keeps_its_random_numbers(tmp_path: Path):
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    play(tmp_path, dataclasses.replace(TINY, steps=64))
    assert np.array_equal(np.random.get_state()[1], before)


def test_minibatches_must_divide_the_rollout():
    with pytest.raises(UsageError, match="no whole number of minibatches of 48"):
        dataclasses.replace(TINY, batch_size=48)


@pytest.mark.slow
def test_an_agent_that_sees_the_state_learns_to_reach_one_object(tmp_path: Path):
    from evalsuite_objects.zoo import build

    protocol = AgentProtocol(
        id="learn", version=1, steps=40_960, variant="objects-1", pooling="mlp", batch_size=128, lr=1e-3,
        test_every=40_960, curve_episodes=100, test_episodes=200,
    )  # fmt: skip

    class Long:
        def make(self, count: int, variant: str, observation: str) -> ObjectsVector:
            return ObjectsVector(count, "object-goal", variant, observation, time_limit_is_terminal=True)

    found = StableBaselines3().play(build("state").eval(), protocol, Long(), setup(tmp_path, protocol))
    assert found.curve[0]["success"] < 0.75
    assert found.successes["objects-1"].mean() > 0.9
