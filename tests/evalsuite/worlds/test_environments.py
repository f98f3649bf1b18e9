"""The gymnasium face: the checkers of gymnasium and stable-baselines3, seeds, time-outs, and many worlds at once."""

from __future__ import annotations

import json
import sys

import gymnasium
import numpy as np
import pygame
import pytest
import stable_baselines3.common.env_checker
from gymnasium.utils.env_checker import check_env

from evalsuite.errors import ResourceError, UsageError
from evalsuite.worlds import TASKS, Objects, ObjectsVector, rules, world

NAMES = {task: "evalsuite/" + "".join(part.capitalize() for part in task.split("-")) + "-v0" for task in TASKS}


@pytest.fixture(autouse=True)
def _no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are opened by gymnasium's checker, too; SDL must not look for a screen, nor end OpenGL with it."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


@pytest.mark.filterwarnings("ignore:Your observation  has an unconventional shape:UserWarning")  # rows, not a vector
@pytest.mark.parametrize("observation", ["image", "state", "mask"])
@pytest.mark.parametrize("task", TASKS)
def test_the_checkers_of_gymnasium_and_stable_baselines_pass(
    task: str, observation: str, request: pytest.FixtureRequest
):
    if task == "object-reaching":
        request.getfixturevalue("pictures")
    env = gymnasium.make(NAMES[task], observation=observation, render_mode="rgb_array").unwrapped
    check_env(env)
    if observation != "mask":  # bytes, but no image: stable-baselines3 knows none such
        stable_baselines3.common.env_checker.check_env(env)


def test_the_name_imports_what_registers_it():
    env = gymnasium.make("evalsuite.worlds:evalsuite/ObjectGoal-v0", variant="objects-1")
    assert env.unwrapped.rules.objects == (1, 1)


def test_a_seed_fixes_the_episodes_and_no_global_generator_moves():
    before = np.random.get_state()[1].copy()

    def episode() -> list[np.ndarray]:
        env = Objects("property-comparison")
        frames = [env.reset(seed=5)[0]]
        return [*frames, *(env.step(action)[0] for action in (0, 1, 2, 3)), env.reset()[0]]

    assert all(np.array_equal(a, b) for a, b in zip(episode(), episode(), strict=True))
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_time_out_is_truncation_unless_asked_otherwise(terminal: bool):
    env = Objects("object-goal", time_limit_is_terminal=terminal, steps=2, mode="easy")
    env.reset(seed=0)
    assert env.step(0)[2:4] == (False, False)
    assert env.step(2)[2:4] == (terminal, not terminal)


def test_render_shows_what_the_state_says():
    env = Objects("object-goal", observation="state", render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    env.step(0)
    assert first.shape == (64, 64, 3)
    assert not np.array_equal(env.render(), first)


@pytest.mark.parametrize("task", ["object-interaction", "property-comparison", "object-reaching"])
def test_many_worlds_are_as_many_single_ones(task: str):
    observation = "state" if task == "object-reaching" else "image"
    many = ObjectsVector(3, task, observation=observation, steps=12)
    ones = [Objects(task, observation=observation, steps=12) for _ in range(3)]
    seen, info = many.reset(seed=7)
    assert not info["is_success"].any()
    for place, one in enumerate(ones):
        assert np.array_equal(one.reset(seed=7 + place)[0], seen[place])
    many.action_space.seed(0)
    ends = 0
    for _ in range(60):
        chosen = many.action_space.sample()
        seen, rewards, ended, late, info = many.step(chosen)
        for place, one in enumerate(ones):
            frame, reward, over, timeout, told = one.step(chosen[place])
            assert (rewards[place], ended[place], late[place]) == (reward, over, timeout)
            if over or timeout:
                ends += 1
                assert np.array_equal(info["final_obs"][place], frame)
                assert info["final_info"]["is_success"][place] == told["is_success"]
                frame, _ = one.reset()
            assert np.array_equal(seen[place], frame)
    assert ends > 6


def test_make_vec_takes_the_vector_environment():
    env = gymnasium.make_vec(
        NAMES["object-goal"], num_envs=4, vectorization_mode="vector_entry_point", variant="ocr-color1"
    )
    assert isinstance(env.unwrapped, ObjectsVector)
    seen, _ = env.reset(seed=0)
    assert seen.shape == (4, 64, 64, 3)
    assert env.observation_space.contains(seen)


@pytest.mark.parametrize("task", ["object-goal", "object-reaching"])
def test_what_a_snapshot_holds_goes_on_as_if_nothing_had_been(task: str):
    def steps(env: ObjectsVector) -> list[np.ndarray]:
        env.action_space.seed(1)
        return [env.step(env.action_space.sample())[0] for _ in range(30)]

    env, other = (ObjectsVector(2, task, observation="state", steps=9) for _ in range(2))
    env.reset(seed=3)
    steps(env)
    other.reset(seed=0)
    other.restore(json.loads(json.dumps(env.snapshot())))
    assert all(np.array_equal(a, b) for a, b in zip(steps(env), steps(other), strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_a_label_of_four_says_where_the_target_is(task: str):
    place, rng = world(rules(task)), np.random.default_rng(0)
    labels = []
    for _ in range(100):
        place.reset(rng)
        labels.append(place.where())
    assert set(labels) <= {0, 1, 2, 3}
    if task not in ("object-interaction", "random-objects"):  # those have the target, if any, in one place
        assert np.bincount(labels, minlength=4).min() > 10


# --- what is refused --------------------------------------------------------------------------------------------


def test_an_unknown_observation_is_refused():
    with pytest.raises(UsageError, match="no observation 'pixels'"):
        Objects("object-goal", observation="pixels")


@pytest.mark.parametrize("task", ["object-goal", "object-reaching"])
def test_an_unknown_variant_rule_or_render_mode_is_refused(task: str):
    with pytest.raises(UsageError, match=f"{task} has no variant 'ocr-color9'"):
        Objects(task, "ocr-color9")
    with pytest.raises(UsageError, match="rules have no gravity"):
        Objects(task, gravity=0)
    with pytest.raises(UsageError, match="no render_mode 'ansi'"):
        Objects(task, render_mode="ansi")
    with pytest.raises(UsageError, match="no render_mode 'human'"):
        ObjectsVector(2, task, render_mode="human")


@pytest.mark.parametrize("action", [4, -1, 0.5, float("nan"), [0], None])
def test_an_action_that_is_none_of_four_is_refused(action: object):
    env = Objects("object-goal")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="an action is 0"):
        env.step(action)


@pytest.mark.parametrize(
    ("task", "actions"),
    [
        ("object-goal", [0, 4]),
        ("object-goal", [0, -1]),
        ("object-goal", [0.0, 0.5]),
        ("object-goal", [0.0, float("nan")]),
        ("object-goal", [0]),
        ("object-reaching", [[0, 0, 0], [0, 0, 1.1]]),
        ("object-reaching", [[0, 0, 0], [0, 0, float("nan")]]),
        ("object-reaching", [0, 0, 0]),
    ],
)
def test_actions_of_many_worlds_are_refused_before_any_has_moved(task: str, actions: list[object]):
    env = ObjectsVector(2, task, observation="state")
    env.reset(seed=0)
    before = env.snapshot()
    with pytest.raises(ValueError, match="the actions of 2 worlds are"):
        env.step(np.array(actions))
    assert env.snapshot() == before


# --- a window ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["object-goal", "object-reaching"])
def test_a_window_shows_every_step(task: str, request: pytest.FixtureRequest):
    if task == "object-reaching":
        request.getfixturevalue("pictures")
    env = gymnasium.make(NAMES[task], observation="state", render_mode="human")
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert env.render() is None
    shown = pygame.surfarray.array3d(pygame.display.get_surface())
    drawn = Objects(task, render_mode="rgb_array")
    drawn.world.restore(env.unwrapped.world.snapshot())
    assert np.array_equal(shown[3::8, 3::8].swapaxes(0, 1), drawn.render())
    env.close()
    assert not pygame.display.get_init()


def test_a_window_without_pygame_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(ResourceError, match="needs pygame") as refused:
        Objects("object-goal", render_mode="human")
    assert "evalsuite[rl]" in refused.value.fix
    assert refused.value.code == 7
