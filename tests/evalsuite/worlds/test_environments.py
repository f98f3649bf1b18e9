"""The gymnasium face: the checkers of gymnasium and stable-baselines3, seeds, time-outs, and many worlds at once."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import stable_baselines3.common.env_checker
from gymnasium.utils.env_checker import check_env

from evalsuite.errors import UsageError
from evalsuite.worlds import TASKS, Objects, ObjectsVector

NAMES = {task: "evalsuite/" + "".join(part.capitalize() for part in task.split("-")) + "-v0" for task in TASKS}


@pytest.mark.filterwarnings("ignore:Your observation  has an unconventional shape:UserWarning")  # rows, not a vector
@pytest.mark.parametrize("observation", ["image", "state", "mask"])
@pytest.mark.parametrize("task", TASKS)
def test_the_checkers_of_gymnasium_and_stable_baselines_pass(task: str, observation: str):
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


@pytest.mark.parametrize("task", ["object-interaction", "property-comparison"])
def test_many_worlds_are_as_many_single_ones(task: str):
    many = ObjectsVector(3, task, steps=12)
    ones = [Objects(task, steps=12) for _ in range(3)]
    seen, info = many.reset(seed=7)
    assert not info["is_success"].any()
    for place, one in enumerate(ones):
        assert np.array_equal(one.reset(seed=7 + place)[0], seen[place])
    actions, ends = np.random.default_rng(0), 0
    for _ in range(60):
        chosen = actions.integers(4, size=3)
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


def test_an_unknown_observation_is_refused():
    with pytest.raises(UsageError, match="no observation 'pixels'"):
        Objects("object-goal", observation="pixels")
