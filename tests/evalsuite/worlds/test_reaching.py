"""Object reaching: the benchmark's rules, that it can be solved by who knows the state, and not by chance."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter

import mujoco
import numpy as np
import pytest

from evalsuite.errors import ResourceError, UsageError
from evalsuite.worlds import Objects, ReachingWorld, reaching, rules, variants
from evalsuite.worlds.reaching import COLOURS, HIGHEST, LOWEST, RAISED

STAY = 2 * (np.array(RAISED) - LOWEST) / (HIGHEST - LOWEST) - 1


def fresh(variant: str = "default", seed: int = 0, **changes: object) -> ReachingWorld:
    place = ReachingWorld(rules("object-reaching", variant, **changes))
    place.reset(np.random.default_rng(seed))
    return place


def many(variant: str = "default", count: int = 60) -> list[ReachingWorld]:
    return [fresh(variant, seed) for seed in range(count)]


def lay(place: ReachingWorld, *centres: tuple[float, float, float]) -> None:
    place._data.mocap_pos[:] = centres
    place._settle()


def solve(place: ReachingWorld, aim: np.ndarray) -> np.ndarray:
    """The action that brings the tip to ``aim``: damped least squares by the simulator's own Jacobian."""
    model, data = place._model, mujoco.MjData(place._model)
    best = (np.inf, place.joints)
    for start in (place.joints, np.array([0.0, 0.9, -1.7]), np.array([-0.5, -0.5, -1.5])):
        data.qpos[:] = start
        for _ in range(60):
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            jacobian = np.zeros((3, 3))
            mujoco.mj_jacSite(model, data, jacobian, None, model.site("tip").id)
            off = aim - data.site("tip").xpos
            if np.linalg.norm(off) < best[0]:
                best = (float(np.linalg.norm(off)), data.qpos.copy())
            data.qpos[:] += jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-4 * np.eye(3), off)
            data.qpos[:] = data.qpos.clip(LOWEST, HIGHEST)
        if best[0] < 0.002:
            break
    return (2 * (best[1] - LOWEST) / (HIGHEST - LOWEST) - 1).clip(-1, 1)


# --- where things are -------------------------------------------------------------------------------------------


def test_one_cube_is_blue_and_it_is_any():
    worlds = many()
    for place in worlds:
        assert [n for n, colour in enumerate(place.colours) if colour == "blue"] == [place.target]
        assert set(place.colours) <= {"blue", "green", "yellow", "red"}
    assert set(Counter(place.target for place in worlds)) == {0, 1, 2, 3}


def test_cubes_lie_in_the_sector_and_apart_along_an_axis():
    for place in many():
        x, y, z = place.cubes.T
        assert np.hypot(x, y).max() <= 0.15
        assert np.all(np.arctan2(y, x) <= 0.785)
        assert np.all(np.arctan2(y, x) >= -3.14)
        assert np.all(z == 0.0325)
        for one, other in itertools.combinations(place.cubes[:, :2], 2):
            assert np.abs(one - other).max() > 0.065


def test_the_sector_is_filled_evenly():
    radii = np.concatenate([np.hypot(*place.cubes[:, :2].T) for place in many("objects-1", 300)])
    assert np.mean(radii**2) == pytest.approx(0.15**2 / 2, rel=0.1)


def test_easy_cubes_lie_where_the_original_puts_them():
    radius, angle = np.array([[0.14, -1.0], [0.15, -2.34], [0.15, 0.01], [0.03, -3.14]]).T
    assert np.allclose(fresh("easy").cubes[:, :2], np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))


def test_variants_have_their_colours_and_numbers():
    for variant in variants("object-reaching"):
        found = rules("object-reaching", variant)
        for place in many(variant, 5):
            assert len(place.colours) == len(place.cubes) == found.objects
            assert set(place.colours) <= {*found.colours, "blue"}
    odd = many("odd", 30)
    for place in odd:
        assert Counter(place.colours)[place.colours[place.target]] == 1
        assert len(set(place.colours)) == 2
    assert len({place.colours[place.target] for place in odd}) == 3
    assert {colour for place in many("pretraining") for colour in place.colours} == set(COLOURS)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"mode": "easy", "objects": 5}, "four places"),
        ({"objects": 7}, "not 1 to 6"),
        ({"colours": ("blue", "teal")}, "unknown colours"),
        ({"colours": ("blue",)}, "no second colour"),
        ({"kind": "comparison", "objects": 2}, "none is the odd one"),
    ],
)
def test_rules_that_make_no_world_are_refused(changes: dict[str, object], cause: str):
    with pytest.raises(UsageError, match=cause):
        rules("object-reaching", **changes)


# --- the finger -------------------------------------------------------------------------------------------------


def test_the_tip_is_where_the_links_of_the_original_put_it():
    """By hand from trifinger_edu.urdf: offsets and axes of the three joints, at the finger that is turned by 120."""

    def turn(axis: str, angle: float) -> np.ndarray:
        c, s = np.cos(angle), np.sin(angle)
        rows = {"x": [[1, 0, 0], [0, c, -s], [0, s, c]], "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]]}
        return np.array({**rows, "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]]}[axis])

    place = fresh()
    for angles in (RAISED, (0.0, 0.9, -1.7), (-0.4, 0.2, -0.1)):
        place._data.qpos[:] = angles
        place._settle()
        lower = np.array([0, -0.03745, -0.16]) + turn("y", angles[2]) @ np.array([0, -0.008, -0.16])
        upper = turn("x", -angles[0]) @ (np.array([0, -0.014, 0]) + turn("y", angles[1]) @ lower)
        base = np.array([0.02275, 0.0394041558722, 0]) + turn("z", -2.09439510239) @ upper
        assert np.allclose(place.tip, turn("z", -1.57079632679) @ base + (0, 0, 0.34 - 0.011), atol=1e-6)


def test_the_finger_goes_where_it_is_told_and_stays():
    place = fresh()
    assert np.allclose(place.joints, RAISED)
    for _ in range(30):
        place.act(STAY)
    assert np.allclose(place.joints, RAISED, atol=0.02)
    for _ in range(60):
        place.act(np.zeros(3))
    assert np.allclose(place.joints, (LOWEST + HIGHEST) / 2, atol=0.02)


def test_the_table_stops_the_finger():
    place = fresh()
    for _ in range(40):
        place.act(solve(place, np.array([0.05, -0.05, 0.05])))
    down = solve(place, np.array([0.05, -0.05, -0.02]))
    for _ in range(40):
        place.act(down)
    assert place.tip[2] == pytest.approx(0.0085, abs=0.002)  # half the lower link, on a table at -0.001


def test_the_finger_goes_through_cubes():
    place = fresh()
    for _ in range(40):
        place.act(STAY)
    before = place.joints
    lay(place, *[tuple(place.tip)] * 4)
    cubes = place.cubes
    assert place.act(STAY)[2]
    assert np.allclose(place.joints, before, atol=1e-4)
    assert np.array_equal(place.cubes, cubes)


@pytest.mark.parametrize("action", [(0, 0, 1.01), (0, 0, float("nan")), (0, 0), 1, "up"])
def test_another_action_is_refused(action: object):
    with pytest.raises(ValueError, match=r"three numbers from -1 to 1|could not convert"):
        fresh().act(action)


# --- touching ---------------------------------------------------------------------------------------------------


FAR = (0.1, -0.1, 0.0325)


@pytest.mark.parametrize(
    ("offset", "near"),
    [((0.062, 0, 0), True), ((0.064, 0, 0), False), ((0.02, 0.02, 0.022), True), ((0.022, 0.022, 0.022), False)],
)
def test_touch_is_a_mean_of_absolute_differences_below_21_mm(offset: tuple[float, float, float], near: bool):
    place = fresh(seed=1)
    for _ in range(40):
        place.act(STAY)
    centre = tuple(place.tip + offset)
    lay(place, *[centre if n == place.target else FAR for n in range(4)])
    assert place.act(STAY) == ((1.0, True, True) if near else (0.0, False, False))


def test_a_wrong_cube_ends_the_episode_and_the_target_beside_it_still_counts():
    place = fresh(seed=1)
    wrong = (place.target + 1) % 4
    lay(place, *[tuple(place.tip) if n == wrong else FAR for n in range(4)])
    assert place.act(STAY) == (0.0, False, True)
    lay(place, *[tuple(place.tip) if n in (wrong, place.target) else FAR for n in range(4)])
    assert place.act(STAY) == (1.0, True, True)


def test_the_original_ends_an_episode_at_its_126th_step():
    env = Objects("object-reaching", observation="state")
    env.reset(seed=0)
    ends = [env.step(STAY.astype(np.float32))[2:4] for _ in range(126)]
    assert set(ends[:-1]) == {(False, False)}
    assert ends[-1] == (False, True)


# --- who knows the state, and who does not ----------------------------------------------------------------------


def informed(env: Objects) -> bool:
    """Over the blue cube, high above all, then down; what is where is read off the observed state."""
    seen, _ = env.reset()
    blue = next(row for row in seen if row[16] == 1 and np.allclose(row[13:16], (-1, -1, 1)))
    aim = blue[10:13] * (0.5, 0.5, 0.25) + (0, 0, 0.25)
    above = solve(env.world, aim + np.array([0, 0, 0.11]))
    over = tip = False
    while not over:
        tip = tip or bool(np.abs((seen[-1, 7:9] - blue[10:12]) * 0.5).max() < 0.015)
        seen, _, ended, late, told = env.step(solve(env.world, aim) if tip else above)
        over = ended or late
    return told["is_success"]


def test_who_knows_the_state_touches_the_blue_cube_and_chance_does_not():
    env = Objects("object-reaching", observation="state")
    env.reset(seed=0)
    assert np.mean([informed(env) for _ in range(60)]) > 0.9
    env.action_space.seed(0)
    hits = touched = 0
    for _ in range(40):
        env.reset()
        over = False
        while not over:
            _, _, ended, late, told = env.step(env.action_space.sample())
            over = ended or late
        hits, touched = hits + told["is_success"], touched + ended
    assert hits / 40 < 0.5
    assert hits < touched  # mostly it is the wrong ones


# --- pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pictures")
def test_a_picture_shows_the_cubes_in_their_colours():
    place = fresh("objects-1", 3)
    image, masks = np.zeros((64, 64, 3), np.uint8), np.zeros((3, 64, 64), np.uint8)
    place.image(image)
    place.masks(masks)
    assert 15 < masks[0].sum() < 150
    inner = masks[0].astype(bool) & (place.segments() == 0)
    red, green, blue = image[inner].mean(axis=0)
    assert blue > 3 * max(red, green)
    assert np.array_equal(masks[-1], ~masks[:-1].any(axis=0))
    again = np.zeros_like(image)
    fresh("objects-1", 3).image(again)
    assert np.array_equal(again, image)


@pytest.mark.usefixtures("pictures")
def test_a_mask_is_whole_where_the_finger_is_in_front():
    place = fresh("objects-1")
    alone, hidden = np.zeros((3, 64, 64), np.uint8), np.zeros((3, 64, 64), np.uint8)
    lay(place, (0.06, -0.06, 0.0325))
    place.masks(alone)
    finger = alone[1].copy()
    lay(place, tuple(place.tip))
    place.masks(hidden)
    assert np.array_equal(hidden[1], finger)
    seen = place.segments()
    assert (hidden[0].astype(bool) & (seen == 1)).any()  # the mask goes on behind the finger
    assert set(np.unique(seen)) <= {-1, 0, 1}


@pytest.mark.usefixtures("pictures")
def test_the_camera_looks_as_the_original_does():
    """Distance 0.6, 60 degrees down, 60 degrees from top to bottom, 4 : 3 pressed into a square."""
    place = fresh("objects-1")
    masks = np.zeros((3, 64, 64), np.uint8)
    for centre in ((0.1, -0.1, 0.0325), (-0.08, -0.1, 0.0325), (0.02, 0.05, 0.0325)):
        lay(place, centre)
        place.masks(masks)
        rows, columns = np.nonzero(masks[0])
        eye = np.array([0, -0.6 * np.cos(np.pi / 3), 0.6 * np.sin(np.pi / 3)])
        ahead, up = -eye / 0.6, np.array([0, np.sin(np.pi / 3), np.cos(np.pi / 3)])
        ray = np.array(centre) + np.array([0, 0, 0.011]) - eye
        depth, half = ray @ ahead, np.tan(np.pi / 6)
        x, y = ray[0] / depth / (half * 4 / 3), (ray @ up) / depth / half
        assert columns.mean() + 0.5 == pytest.approx(32 + 32 * x, abs=1.5)
        assert rows.mean() + 0.5 == pytest.approx(32 - 32 * y, abs=1.5)


def test_without_mujoco_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ResourceError, match="needs mujoco") as refused:
        Objects("object-reaching")
    assert "robotics" in refused.value.fix
    assert rules("object-reaching").steps == 126


def test_without_opengl_states_are_there_and_pictures_are_refused(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr(reaching.importlib, "import_module", missing)
    place = ReachingWorld(rules("object-reaching"), size=48)
    place.reset(np.random.default_rng(0))
    place.state(np.zeros((5, 17), np.float32))
    with pytest.raises(ResourceError, match="no picture of object-reaching") as refused:
        place.image(np.zeros((48, 48, 3), np.uint8))
    assert "libosmesa6" in refused.value.fix


def test_the_worlds_are_imported_without_mujoco():
    code = "import sys, evalsuite.worlds; assert 'mujoco' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
