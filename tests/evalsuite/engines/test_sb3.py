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
from stable_baselines3 import A2C
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.engines.sb3 import Policy, StableBaselines3, policy_arguments
from evalsuite.errors import PluginError, UsageError
from evalsuite.hooks import load
from evalsuite.preflight import TooLarge
from evalsuite.progress import Meter, Progress
from evalsuite.protocols import AgentProtocol, Played, PPOProtocol
from evalsuite.task import Setup
from evalsuite.worlds import ObjectsVector, Rewarded

TINY = PPOProtocol(
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


def setup(work: Path, protocol: PPOProtocol, progress: Progress | None = None) -> Setup:
    work.mkdir(exist_ok=True)
    return Setup(
        protocol=protocol,
        work=work,
        registry=load().registry,
        progress=progress or Progress(quiet=True),
        save_every=0.0,
    )


def play(work: Path, protocol: PPOProtocol = TINY, progress: Progress | None = None) -> Played:
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

    protocol = PPOProtocol(
        id="learn", version=1, steps=40_960, variant="objects-1", pooling="mlp", batch_size=128, lr=1e-3,
        test_every=40_960, curve_episodes=100, test_episodes=200,
    )  # fmt: skip

    class Long:
        def make(self, count: int, variant: str, observation: str) -> ObjectsVector:
            return ObjectsVector(count, "object-goal", variant, observation, time_limit_is_terminal=True)

    found = StableBaselines3().play(build("state").eval(), protocol, Long(), setup(tmp_path, protocol))
    assert found.curve[0]["success"] < 0.75
    assert found.successes["objects-1"].mean() > 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Critic(AgentProtocol):
    """The protocol of another algorithm: A2C (Mnih et al. 2016)."""

    rollout: int = 8
    lr: float = 1e-3


class WithA2C(StableBaselines3):
    def algorithm(self, encoder, worlds, protocol, setup):
        if not isinstance(protocol, Critic):
            return super().algorithm(encoder, worlds, protocol, setup)
        return A2C(
            Policy, worlds, learning_rate=protocol.lr, n_steps=protocol.rollout, seed=setup.seed, device=setup.device,
            policy_kwargs=policy_arguments(encoder, protocol),
        )  # fmt: skip


A2C_TINY = Critic(
    id="a2c", version=1, steps=64, environments=2, pooling="mlp", test_every=32, curve_episodes=2, test_episodes=2,
    variant="objects-1", encode_size=32,
)  # fmt: skip


def test_another_algorithm_is_a_protocol_and_a_subclass(tmp_path: Path):
    torch.manual_seed(0)
    played = WithA2C().play(encoder(), A2C_TINY, Arena(), setup(tmp_path, A2C_TINY))
    assert [point["steps"] for point in played.curve] == [0, 32, 64]
    assert played.details["encoded"] == played.details["steps"] == 64


def test_a_protocol_of_an_algorithm_that_it_does_not_have_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="engine sb3 does not learn by a2c") as refusal:
        play(tmp_path, A2C_TINY)
    assert "a Critic" in refusal.value.cause


def brightness(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """A made-up reward: how much redder the picture is than before."""
    return (after[..., 0].mean(axis=(1, 2)) - before[..., 0].mean(axis=(1, 2))) / 255


def test_a_reward_of_what_is_seen_replaces_the_worlds_own():
    worlds, bare = Rewarded(Arena(), brightness).make(3, "objects-1", "image"), Arena().make(3, "objects-1", "image")
    before, ends = worlds.reset(seed=4)[0], 0
    assert np.array_equal(before, bare.reset(seed=4)[0])
    rng = np.random.default_rng(0)
    for _ in range(45):  # episodes end after at most 20 steps
        actions = rng.integers(0, worlds.single_action_space.n, 3)
        seen, rewards, ended, late, info = worlds.step(actions)
        same, _, *over, told = bare.step(actions)
        assert np.array_equal(seen, same)
        assert np.array_equal([ended, late], over)
        after = seen.copy()
        for place in np.flatnonzero(ended | late):
            ends += 1
            after[place] = info["final_obs"][place]
            assert np.array_equal(after[place], told["final_obs"][place])
        assert rewards.tolist() == brightness(before, after).tolist()
        before = seen.copy()
    assert ends >= 6


def test_an_agent_with_another_reward_resumes_and_leaves_the_backbone_alone(tmp_path: Path, whole: Played):
    def learn(work: Path, progress: Progress | None = None) -> Played:
        torch.manual_seed(0)
        backbone = encoder()
        before = backbone.identity
        played = StableBaselines3().play(
            backbone, TINY, Rewarded(Arena(), brightness), setup(work, TINY, progress)
        )  # fmt: skip
        assert backbone.identity == before
        return played

    straight = learn(tmp_path / "whole")
    assert straight.curve[0]["length"] == whole.curve[0]["length"]
    assert [p["return"] for p in straight.curve] != [p["return"] for p in whole.curve]
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "killed", _Killed(2, "kill"))
    assert learn(tmp_path / "killed").curve == straight.curve


@pytest.mark.parametrize("wrong", [np.zeros(2), np.full(3, np.nan), np.zeros((3, 1))])
def test_a_reward_that_is_not_a_number_a_world_is_refused(wrong: np.ndarray):
    worlds = Rewarded(Arena(), lambda before, after: wrong).make(3, "objects-1", "image")
    worlds.reset(seed=0)
    with pytest.raises(PluginError, match="no 3 finite numbers"):
        worlds.step(np.zeros(3, dtype=np.int64))
